//! `delete`: by file, name, selector or all, and waits until the objects are gone.

use http::Method;
use knarr_api::object::Object;
use serde_json::{Value, json};

use crate::context::{Ask, Context, parse_duration};
use crate::error::{Error, Result};
use crate::manifest;
use crate::target::{self, Found, Target};

#[derive(clap::Args)]
pub struct Args {
    words: Vec<String>,
    #[arg(short, long)]
    filename: Vec<String>,
    #[arg(short = 'R', long)]
    recursive: bool,
    #[arg(short = 'l', long)]
    selector: Option<String>,
    #[arg(long)]
    field_selector: Option<String>,
    /// Delete all resources, in the namespace of the specified resource types.
    #[arg(long)]
    all: bool,
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// Seconds given to the resource to terminate gracefully; negative is ignored.
    #[arg(long, default_value_t = -1, allow_hyphen_values = true)]
    grace_period: i64,
    /// Immediately remove resources from the API.
    #[arg(long)]
    force: bool,
    /// Resources are signaled for immediate shutdown (same as --grace-period=1).
    #[arg(long)]
    now: bool,
    /// Wait for resources to be gone before returning.
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "true")]
    wait: bool,
    /// How long to wait; zero means as long as the object's own grace period asks for.
    #[arg(long, default_value = "0s")]
    timeout: String,
    /// "background", "orphan", or "foreground".
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "background", default_value = "background", value_parser = ["background", "orphan", "foreground", "true", "false"])]
    cascade: String,
    #[arg(long)]
    ignore_not_found: bool,
    #[command(flatten)]
    dry_run: super::apply::DryRunArgs,
    /// Use "-o name" for shorter output (resource/name).
    #[arg(short, long, value_parser = ["name"])]
    output: Option<String>,
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    let grace = grace_period(&args)?;
    let mut errors = Vec::new();
    let targets = find(context, &args, &mut errors).await?;
    if args.force && grace == Some(0) && !targets.is_empty() {
        eprintln!("Warning: Immediate deletion does not wait for confirmation that the running resource has been terminated. The resource may continue to run on the cluster indefinitely.");
    }
    let mut waiting = Vec::new();
    let none = targets.is_empty() && errors.is_empty();
    for found in targets {
        match delete(context, &args, grace, &found).await {
            Ok(answer) => waiting.push((found, answer)),
            Err(error) if error.is_not_found() && (args.ignore_not_found || args.all) => {}
            Err(error) => errors.push(error),
        }
    }
    if none && !args.ignore_not_found {
        println!("No resources found");
    }
    if args.wait && !args.dry_run.is_client() {
        let limit = parse_duration(&args.timeout)
            .ok_or_else(|| Error::plain(format!("invalid argument {:?} for \"--timeout\" flag", args.timeout)))?;
        for (found, answer) in waiting {
            let collection = found.resource.path(found.namespace.as_deref(), None);
            let limit = (!limit.is_zero()).then_some(limit);
            super::wait::until_gone(context, &found.path(), &collection, &answer, limit).await?;
        }
    }
    Error::collect(errors)
}

/// The grace period to send, if any.
fn grace_period(args: &Args) -> Result<Option<i64>> {
    if args.now && args.grace_period >= 0 {
        return Err(Error::plain("--now and --grace-period cannot be specified together"));
    }
    if args.now {
        return Ok(Some(1));
    }
    match args.grace_period {
        0 if !args.force => Ok(Some(1)),
        period if period > 0 && args.force => Err(Error::plain("--force and --grace-period greater than 0 cannot be specified together")),
        _ if args.force => Ok(Some(0)),
        period => Ok((period >= 0).then_some(period)),
    }
}

async fn find(context: &Context, args: &Args, errors: &mut Vec<Error>) -> Result<Vec<Found>> {
    let mut found = Vec::new();
    if !args.filename.is_empty() {
        for document in manifest::read(&args.filename, args.recursive)? {
            let (resource, namespace) = super::apply::locate(context, &document.object).await?;
            found.push(Found { resource, namespace, object: document.object });
        }
        return Ok(found);
    }
    let targets = target::resolve(context.discovery().await?, &args.words)?;
    if targets.is_empty() {
        return Err(Error::plain("You must provide one or more resources by argument or filename.\nExample resource specifications include:\n   '-f rsrc.yaml'\n   '--filename=rsrc.json'\n   '<resource> <name>'\n   '<resource>'"));
    }
    let scope = context.namespace()?;
    for Target { resource, name } in targets {
        let Some(name) = name else {
            if args.selector.is_none() && args.field_selector.is_none() && !args.all {
                return Err(Error::plain("resource(s) were provided, but no name was specified"));
            }
            let words = [resource.qualified()];
            found.extend(target::fetch(context, &words, args.selector.as_deref(), args.field_selector.as_deref(), args.all_namespaces).await?);
            continue;
        };
        if args.selector.is_some() || args.all {
            return Err(Error::plain("name cannot be provided when a selector is specified"));
        }
        let namespace = resource.namespaced.then(|| scope.clone());
        let path = resource.path(namespace.as_deref(), Some(&name));
        match context.get(&path).await {
            Ok(object) => found.push(Found { resource, namespace, object }),
            Err(error) if error.is_not_found() && args.ignore_not_found => {}
            Err(error) => errors.push(error),
        }
    }
    Ok(found)
}

async fn delete(context: &Context, args: &Args, grace: Option<i64>, found: &Found) -> Result<Value> {
    let mut answer = Value::Null;
    if !args.dry_run.is_client() {
        let policy = match args.cascade.as_str() {
            "orphan" | "false" => "Orphan",
            "foreground" => "Foreground",
            _ => "Background",
        };
        let mut options = json!({ "propagationPolicy": policy });
        if let Some(grace) = grace {
            options["gracePeriodSeconds"] = grace.into();
        }
        if args.dry_run.words("") == " (server dry run)" {
            options["dryRun"] = json!(["All"]);
        }
        answer = context.json(Method::DELETE, &found.path(), Ask::json(&options)).await?;
    }
    if args.output.is_some() {
        println!("{}", found.named());
        return Ok(answer);
    }
    let what = args.dry_run.words(if grace == Some(0) { "force deleted" } else { "deleted" });
    let from = found.namespace.as_ref().map(|n| format!(" from {n} namespace")).unwrap_or_default();
    println!("{} {:?} {what}{from}", found.resource.label(), found.object.name());
    Ok(answer)
}
