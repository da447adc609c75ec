//! `patch`: strategic, merge or JSON.

use http::Method;
use knarr_api::object::Object;
use serde_json::Value;

use crate::context::{Ask, Context, JSON_PATCH, MERGE_PATCH, STRATEGIC_PATCH};
use crate::error::{Error, Result};
use crate::manifest;
use crate::merge;
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
    /// The patch, JSON or YAML.
    #[arg(short, long)]
    patch: Option<String>,
    /// A file with the patch.
    #[arg(long)]
    patch_file: Option<String>,
    #[arg(long, default_value = "strategic", value_parser = ["strategic", "merge", "json"])]
    r#type: String,
    /// Patch this subresource.
    #[arg(long)]
    subresource: Option<String>,
    #[command(flatten)]
    dry_run: DryRunArgs,
    #[command(flatten)]
    output: OutputArgs,
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    let text = match (&args.patch, &args.patch_file) {
        (Some(text), None) => text.clone(),
        (None, Some(path)) => std::fs::read_to_string(path).map_err(|e| Error::plain(format!("unable to read patch file: open {path}: {e}")))?,
        _ => return Err(Error::plain("must specify --patch or --patch-file containing the contents of the patch")),
    };
    let patch: Value = serde_yaml_ng::from_str(&text).map_err(|e| Error::plain(format!("unable to parse {text:?}: {e}")))?;
    let mut errors = Vec::new();
    for found in objects(context, &args).await? {
        if let Err(error) = apply(context, &args, &found, &patch).await {
            errors.push(error);
        }
    }
    Error::collect(errors)
}

async fn objects(context: &Context, args: &Args) -> Result<Vec<Found>> {
    if args.filename.is_empty() {
        return target::fetch(context, &args.words, None, None, false).await;
    }
    let mut found = Vec::new();
    for document in manifest::read(&args.filename, args.recursive)? {
        let (resource, namespace) = super::apply::locate(context, &document.object).await?;
        let object = context.get(&resource.path(namespace.as_deref(), Some(document.object.name()))).await?;
        found.push(Found { resource, namespace, object });
    }
    Ok(found)
}

async fn apply(context: &Context, args: &Args, found: &Found, patch: &Value) -> Result<()> {
    let kind = match args.r#type.as_str() {
        "merge" => MERGE_PATCH,
        "json" => JSON_PATCH,
        _ => STRATEGIC_PATCH,
    };
    if args.dry_run.is_client() {
        let patched = locally(found, kind, patch)?;
        return args.output.done(&found.named(), &patched, &args.dry_run.words(said(&found.object, &patched)));
    }
    let sub = args.subresource.as_deref().map(|s| format!("/{s}")).unwrap_or_default();
    let ask = Ask::patch(kind, patch).with("fieldManager", "kubectl-patch");
    let patched = context.json(Method::PATCH, &format!("{}{sub}", found.path()), args.dry_run.ask(ask)).await?;
    args.output.done(&found.named(), &patched, &args.dry_run.words(said(&found.object, &patched)))
}

/// `patched`, and whether that changed anything.
fn said(before: &Value, after: &Value) -> &'static str {
    if before.str_at("metadata.resourceVersion") == after.str_at("metadata.resourceVersion") && before == after {
        "patched (no change)"
    } else {
        "patched"
    }
}

fn locally(found: &Found, kind: &str, patch: &Value) -> Result<Value> {
    let bytes = patch.to_string().into_bytes();
    let object = &found.object;
    let type_id = merge::type_of(object.str_at("apiVersion"), object.str_at("kind"));
    let result = match (kind, type_id) {
        (JSON_PATCH, _) => knarr_api::patch::json(object, &bytes),
        (STRATEGIC_PATCH, Some(id)) => knarr_api::patch::strategic(knarr_api::schema::Schema::builtin(), id, object, &bytes),
        _ => knarr_api::patch::merge(object, &bytes),
    };
    result.map_err(|status| Error::Server { status: status.to_value(), during: None })
}
