//! `uncordon`: as `cordon`, the other way.

use crate::context::Context;
use crate::error::Result;
pub use crate::verbs::cordon::Args;

pub async fn run(context: &Context, args: Args) -> Result<()> {
    super::cordon::mark(context, &args, false).await
}
