//! `top`: needs the metrics API, which this cluster does not serve yet.

use crate::context::Context;
use crate::error::{Error, Result};

#[derive(clap::Args)]
pub struct Args {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    words: Vec<String>,
}

pub async fn run(_context: &Context, args: Args) -> Result<()> {
    let what = args.words.first().map(|w| format!(" {w}")).unwrap_or_default();
    Err(Error::plain(format!("Metrics API not available: `top{what}` is not built into this kubectl yet; `knarr status` shows whether the cluster is well")))
}
