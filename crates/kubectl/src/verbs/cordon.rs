//! `cordon` and `uncordon`: whether new pods may come to a node.

use knarr_api::object::Object;
use serde_json::json;

use crate::context::{Ask, Context, STRATEGIC_PATCH};
use crate::error::{Error, Result};
use crate::target::{self, Found};
use crate::verbs::apply::DryRunArgs;

#[derive(clap::Args)]
pub struct Args {
    /// Names of nodes.
    names: Vec<String>,
    #[arg(short = 'l', long)]
    selector: Option<String>,
    #[command(flatten)]
    dry_run: DryRunArgs,
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    mark(context, &args, true).await
}

/// Marks the named nodes.
pub async fn mark(context: &Context, args: &Args, unschedulable: bool) -> Result<()> {
    for node in nodes(context, &args.names, args.selector.as_deref()).await? {
        mark_one(context, &node, unschedulable, &args.dry_run).await?;
    }
    Ok(())
}

/// The nodes of these names, or of the selector.
pub async fn nodes(context: &Context, names: &[String], selector: Option<&str>) -> Result<Vec<Found>> {
    if names.is_empty() && selector.is_none() {
        return Err(Error::plain("USAGE: one or more nodes must be named, or selected with -l"));
    }
    let plain = names.iter().map(|n| n.rsplit('/').next().unwrap_or(n).to_owned());
    let words: Vec<String> = std::iter::once("nodes".to_owned()).chain(plain).collect();
    target::fetch(context, &words, selector, None, false).await
}

pub async fn mark_one(context: &Context, node: &Found, unschedulable: bool, dry_run: &DryRunArgs) -> Result<()> {
    let what = if unschedulable { "cordoned" } else { "uncordoned" };
    if node.object.bool_at("spec.unschedulable") == unschedulable {
        println!("{} already {}", node.named(), dry_run.words(what));
        return Ok(());
    }
    if !dry_run.is_client() {
        let patch = json!({ "spec": { "unschedulable": if unschedulable { json!(true) } else { json!(null) } } });
        node.patch(context, "", dry_run.ask(Ask::patch(STRATEGIC_PATCH, &patch))).await?;
    }
    println!("{} {}", node.named(), dry_run.words(what));
    Ok(())
}
