//! Verbs of upstream that are not built: refused by name, so that nobody wonders.

use crate::context::Context;
use crate::error::{Error, Result};

#[derive(clap::Args)]
pub struct Args {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    words: Vec<String>,
}

pub async fn run(_context: &Context, _args: Args) -> Result<()> {
    Err(Error::refused("this command (one of completion, kustomize, proxy, certificate, debug, plugin, options, alpha)", "use the upstream kubectl for it; it works on this cluster"))
}
