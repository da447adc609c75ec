//! `replace`: puts manifests in the place of what is there.

use http::Method;
use knarr_api::object::Object;
use serde_json::json;

use crate::context::{Ask, Context};
use crate::error::{Error, Result};
use crate::manifest::{self, Document};
use crate::output::OutputArgs;
use crate::verbs::apply::{DryRunArgs, ValidateArgs, locate};

#[derive(clap::Args)]
pub struct Args {
    #[arg(short, long)]
    filename: Vec<String>,
    #[arg(short = 'R', long)]
    recursive: bool,
    /// Delete and re-create the resource.
    #[arg(long)]
    force: bool,
    #[arg(long)]
    subresource: Option<String>,
    #[arg(long)]
    save_config: bool,
    #[arg(long, default_value_t = -1, allow_hyphen_values = true)]
    grace_period: i64,
    #[command(flatten)]
    validate: ValidateArgs,
    #[command(flatten)]
    dry_run: DryRunArgs,
    #[command(flatten)]
    output: OutputArgs,
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    let mut errors = Vec::new();
    for document in manifest::read(&args.filename, args.recursive)? {
        if let Err(error) = replace(context, &args, document).await {
            errors.push(error);
        }
    }
    Error::collect(errors)
}

async fn replace(context: &Context, args: &Args, document: Document) -> Result<()> {
    let Document { source, mut object } = document;
    let (resource, namespace) = locate(context, &object).await?;
    if let Some(namespace) = &namespace {
        object.set_at("metadata.namespace", namespace.clone());
    }
    if args.save_config {
        object = crate::merge::with_last_applied(&object);
    }
    let named = resource.named(object.name());
    let path = resource.path(namespace.as_deref(), Some(object.name()));
    let collection = resource.path(namespace.as_deref(), None);
    if args.dry_run.is_client() {
        return args.output.done(&named, &object, &args.dry_run.words("replaced"));
    }
    let ask = || args.dry_run.ask(Ask::json(&object).with("fieldManager", "kubectl-replace").with("fieldValidation", args.validate.level()));
    if args.force {
        let mut options = json!({});
        if args.grace_period >= 0 {
            options["gracePeriodSeconds"] = args.grace_period.into();
        }
        match context.json(Method::DELETE, &path, Ask::json(&options)).await {
            Ok(deleted) => super::wait::until_gone(context, &path, &collection, &deleted, None).await?,
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
        let created = context.json(Method::POST, &collection, ask()).await.map_err(|e| e.when("creating", &source))?;
        return args.output.done(&named, &created, "replaced");
    }
    let sub = args.subresource.as_deref().map(|s| format!("/{s}")).unwrap_or_default();
    let replaced = context.json(Method::PUT, &format!("{path}{sub}"), ask()).await.map_err(|e| e.when("replacing", &source))?;
    args.output.done(&named, &replaced, &args.dry_run.words("replaced"))
}
