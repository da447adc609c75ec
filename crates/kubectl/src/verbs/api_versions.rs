//! `api-versions`: every group and version served.

use crate::context::Context;
use crate::error::Result;

#[derive(clap::Args)]
pub struct Args {}

pub async fn run(context: &Context, _args: Args) -> Result<()> {
    let mut versions = context.discovery().await?.versions.clone();
    versions.sort();
    versions.dedup();
    versions.iter().for_each(|version| println!("{version}"));
    Ok(())
}
