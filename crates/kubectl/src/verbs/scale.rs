//! `scale`: through the scale subresource.

use http::Method;
use knarr_api::object::Object;
use serde_json::json;

use crate::context::{Ask, Context, MERGE_PATCH};
use crate::error::{Error, Result};
use crate::manifest;
use crate::output::OutputArgs;
use crate::target::{self, Found};
use crate::verbs::apply::DryRunArgs;

#[derive(clap::Args)]
pub struct Args {
    words: Vec<String>,
    #[arg(short, long)]
    filename: Vec<String>,
    #[arg(short = 'R', long)]
    recursive: bool,
    /// The new desired number of replicas.
    #[arg(long)]
    replicas: i64,
    /// Precondition for current size.
    #[arg(long)]
    current_replicas: Option<i64>,
    /// Precondition for resource version.
    #[arg(long)]
    resource_version: Option<String>,
    #[arg(short = 'l', long)]
    selector: Option<String>,
    #[arg(long)]
    all: bool,
    /// Wait this long until the size is reached; zero does not wait.
    #[arg(long, default_value = "0s")]
    timeout: String,
    #[command(flatten)]
    dry_run: DryRunArgs,
    #[command(flatten)]
    output: OutputArgs,
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    if args.replicas < 0 {
        return Err(Error::plain("The --replicas=COUNT flag is required, and COUNT must be greater than or equal to 0"));
    }
    let mut errors = Vec::new();
    for found in objects(context, &args).await? {
        if let Err(error) = scale(context, &args, &found).await {
            errors.push(error);
        }
    }
    Error::collect(errors)
}

async fn objects(context: &Context, args: &Args) -> Result<Vec<Found>> {
    if args.filename.is_empty() {
        target::need_choice(&args.words, args.all || args.selector.is_some())?;
        let found = target::fetch(context, &args.words, args.selector.as_deref(), None, false).await?;
        return if found.is_empty() { Err(Error::plain("no objects passed to scale")) } else { Ok(found) };
    }
    let mut found = Vec::new();
    for document in manifest::read(&args.filename, args.recursive)? {
        let (resource, namespace) = super::apply::locate(context, &document.object).await?;
        found.push(Found { resource, namespace, object: document.object });
    }
    Ok(found)
}

async fn scale(context: &Context, args: &Args, found: &Found) -> Result<()> {
    if !found.resource.subresources.iter().any(|s| s == "scale") {
        return Err(Error::plain(format!("the server doesn't allow to scale {}", found.resource.qualified())));
    }
    let path = format!("{}/scale", found.path());
    if args.current_replicas.is_some() || args.resource_version.is_some() {
        let current = context.get(&path).await?;
        let (size, version) = (current.int_at("spec.replicas").unwrap_or(0), current.str_at("metadata.resourceVersion"));
        if args.current_replicas.is_some_and(|c| c != size) {
            return Err(Error::plain(format!("Expected replicas to be {}, was {size}", args.current_replicas.unwrap_or(0))));
        }
        if args.resource_version.as_ref().is_some_and(|v| v != version) {
            return Err(Error::plain(format!("Expected resource version to be {}, was {version}", args.resource_version.as_deref().unwrap_or_default())));
        }
    }
    if !args.dry_run.is_client() {
        let patch = json!({ "spec": { "replicas": args.replicas } });
        let ask = Ask::patch(MERGE_PATCH, &patch).with("fieldManager", "kubectl-scale");
        context.json(Method::PATCH, &path, args.dry_run.ask(ask)).await?;
    }
    let limit = crate::context::parse_duration(&args.timeout).filter(|t| !t.is_zero());
    if let Some(limit) = limit {
        reached(context, args, found, limit).await?;
    }
    args.output.done(&found.named(), &found.object, &args.dry_run.words("scaled"))
}

async fn reached(context: &Context, args: &Args, found: &Found, limit: std::time::Duration) -> Result<()> {
    let query = [("fieldSelector", format!("metadata.name={}", found.object.name()))];
    let collection = found.resource.path(found.namespace.as_deref(), None);
    let wanted = args.replicas;
    let done = super::wait::watch_until(context, &collection, &query, |_, object| {
        object.is_none_or(|o| o.int_at("status.replicas").unwrap_or(0) == wanted)
    });
    tokio::time::timeout(limit, done).await.unwrap_or_else(|_| Err(Error::plain("timed out waiting for the condition")))
}
