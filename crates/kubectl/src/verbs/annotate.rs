//! `annotate`: as `label`, but annotations.

use crate::context::Context;
use crate::error::Result;
pub use crate::verbs::label::Args;

pub async fn run(context: &Context, args: Args) -> Result<()> {
    super::label::change(context, &args, "annotations").await
}
