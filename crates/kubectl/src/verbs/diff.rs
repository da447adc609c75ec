//! `diff`: what an apply would change, by the server's own dry run.

use http::Method;
use knarr_api::object::Object;
use serde_json::Value;
use std::process::Command;

use crate::context::{APPLY_PATCH, Ask, Context, MERGE_PATCH, STRATEGIC_PATCH};
use crate::error::{Error, Result};
use crate::manifest;
use crate::merge;
use crate::output::strip_managed_fields;
use crate::verbs::apply::locate;
use crate::yaml;

#[derive(clap::Args)]
pub struct Args {
    #[arg(short, long)]
    filename: Vec<String>,
    #[arg(short = 'R', long)]
    recursive: bool,
    #[arg(long)]
    server_side: bool,
    #[arg(long)]
    force_conflicts: bool,
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    let directory = std::env::temp_dir().join(format!("kubectl-diff-{}", std::process::id()));
    let (live, merged) = (directory.join("LIVE"), directory.join("MERGED"));
    let result = async {
        for path in [&live, &merged] {
            std::fs::create_dir_all(path)?;
        }
        for document in manifest::read(&args.filename, args.recursive)? {
            let (resource, namespace) = locate(context, &document.object).await?;
            let (before, after) = both(context, &args, document.object).await.map_err(|e| e.when("diffing", &document.source))?;
            let name = format!("{}.{}.{}.{}", resource.api_version().replace('/', "."), resource.kind, namespace.unwrap_or_default(), after.name());
            for (path, object) in [(&live, before), (&merged, Some(after))] {
                std::fs::write(path.join(&name), object.map(|o| yaml::print(&o)).unwrap_or_default())?;
            }
        }
        compare(&live, &merged)
    }
    .await;
    // The copies may hold secrets; nothing of them is left behind.
    let _ = std::fs::remove_dir_all(&directory);
    result
}

/// The object as it is, and as it would be.
async fn both(context: &Context, args: &Args, mut object: Value) -> Result<(Option<Value>, Value)> {
    let (resource, namespace) = locate(context, &object).await?;
    if let Some(namespace) = &namespace {
        object.set_at("metadata.namespace", namespace.clone());
    }
    let path = resource.path(namespace.as_deref(), Some(object.name()));
    let current = match context.get(&path).await {
        Ok(current) => Some(current),
        Err(error) if error.is_not_found() => None,
        Err(error) => return Err(error),
    };
    let dry = |ask: Ask<'static>| ask.with("dryRun", "All");
    let after = match &current {
        _ if args.server_side => {
            let force = if args.force_conflicts { "true" } else { "" };
            context.json(Method::PATCH, &path, dry(Ask::patch(APPLY_PATCH, &object)).with("fieldManager", "kubectl").with("force", force)).await?
        }
        None => context.json(Method::POST, &resource.path(namespace.as_deref(), None), dry(Ask::json(&merge::with_last_applied(&object)))).await?,
        Some(current) => {
            let modified = merge::with_last_applied(&object);
            let type_id = merge::type_of(object.str_at("apiVersion"), object.str_at("kind"));
            let patch = merge::three_way(type_id, &merge::last_applied(current).unwrap_or_default(), &modified, current);
            let kind = if type_id.is_some() { STRATEGIC_PATCH } else { MERGE_PATCH };
            context.json(Method::PATCH, &path, dry(Ask::patch(kind, &patch))).await?
        }
    };
    let clean = |mut object: Value| {
        strip_managed_fields(&mut object);
        object.remove_at("metadata.resourceVersion");
        mask_secret(&mut object);
        object
    };
    Ok((current.map(clean), clean(after)))
}

/// The bytes of secrets are not for the screen; that they differ shows in their length only.
fn mask_secret(object: &mut Value) {
    if object.str_at("kind") != "Secret" {
        return;
    }
    for field in ["data", "stringData"] {
        if let Some(Value::Object(map)) = object.get_mut(field) {
            map.values_mut().for_each(|v| *v = format!("*** ({} characters)", v.as_str().unwrap_or_default().len()).into());
        }
    }
    if let Some(Value::Object(annotations)) = object.get_mut("metadata").and_then(|m| m.get_mut("annotations")) {
        annotations.remove(merge::LAST_APPLIED);
    }
}

/// Runs the user's or the system's `diff`; its exit code 1 says that something differs.
fn compare(live: &std::path::Path, merged: &std::path::Path) -> Result<()> {
    let program = std::env::var("KUBECTL_EXTERNAL_DIFF").unwrap_or_else(|_| "diff -u -N".into());
    let mut words = program.split_whitespace();
    let name = words.next().unwrap_or("diff");
    let status = Command::new(name).args(words).args([live, merged]).status();
    let status = status.map_err(|e| Error::plain(format!("failed to run {name:?}: {e}; install diffutils or set KUBECTL_EXTERNAL_DIFF")))?;
    match status.code() {
        Some(0) => Ok(()),
        Some(code) => Err(Error::Exit(code)),
        None => Err(Error::plain(format!("{name} was killed"))),
    }
}
