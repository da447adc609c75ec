//! `rollout`: status, history, undo, restart, pause, resume.

use std::time::Duration;

use http::Method;
use knarr_api::object::Object;
use serde_json::{Value, json};

use crate::context::{Ask, Context, JSON_PATCH, MERGE_PATCH, STRATEGIC_PATCH, parse_duration};
use crate::error::{Error, Result};
use crate::table::{DESCRIBE, align};
use crate::target::{self, Found};
use crate::verbs::apply::DryRunArgs;
use crate::workload::{CHANGE_CAUSE, REVISION, annotation, controlled_by, rollout_status, selector_text};

const HASH_LABEL: &str = "pod-template-hash";
const RESTARTED_AT: &str = "kubectl.kubernetes.io/restartedAt";

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Sub,
}

#[derive(clap::Subcommand)]
enum Sub {
    /// Show the status of the rollout.
    Status(StatusArgs),
    /// View rollout history.
    History(HistoryArgs),
    /// Undo a previous rollout.
    Undo(UndoArgs),
    /// Restart a resource.
    Restart(WhichArgs),
    /// Mark the provided resource as paused.
    Pause(WhichArgs),
    /// Resume a paused resource.
    Resume(WhichArgs),
}

#[derive(clap::Args)]
struct WhichArgs {
    words: Vec<String>,
    #[arg(short = 'l', long)]
    selector: Option<String>,
    #[arg(short, long)]
    filename: Vec<String>,
}

#[derive(clap::Args)]
struct StatusArgs {
    #[command(flatten)]
    which: WhichArgs,
    /// Watch the status of the rollout until it's done.
    #[arg(short, long, action = clap::ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "true")]
    watch: bool,
    /// Pin to a specific revision for showing its status; 0 takes the last.
    #[arg(long, default_value_t = 0)]
    revision: i64,
    /// How long to wait; zero means no limit.
    #[arg(long, default_value = "0s")]
    timeout: String,
}

#[derive(clap::Args)]
struct HistoryArgs {
    #[command(flatten)]
    which: WhichArgs,
    /// See the details, including the pod template, of this revision.
    #[arg(long, default_value_t = 0)]
    revision: i64,
}

#[derive(clap::Args)]
struct UndoArgs {
    #[command(flatten)]
    which: WhichArgs,
    /// The revision to roll back to; 0 is the one before the last.
    #[arg(long, default_value_t = 0)]
    to_revision: i64,
    #[command(flatten)]
    dry_run: DryRunArgs,
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    let which = match &args.command {
        Sub::Status(args) => &args.which,
        Sub::History(args) => &args.which,
        Sub::Undo(args) => &args.which,
        Sub::Restart(which) | Sub::Pause(which) | Sub::Resume(which) => which,
    };
    let found = find(context, which).await?;
    let mut errors = Vec::new();
    for found in &found {
        let result = match &args.command {
            Sub::Status(args) => status(context, args, found).await,
            Sub::History(args) => history(context, args, found).await,
            Sub::Undo(args) => undo(context, args, found).await,
            Sub::Restart(_) => restart(context, found).await,
            Sub::Pause(_) => pause(context, found, true).await,
            Sub::Resume(_) => pause(context, found, false).await,
        };
        errors.extend(result.err());
    }
    Error::collect(errors)
}

async fn find(context: &Context, which: &WhichArgs) -> Result<Vec<Found>> {
    let mut words = which.words.clone();
    for document in if which.filename.is_empty() { Vec::new() } else { crate::manifest::read(&which.filename, false)? } {
        words.push(format!("{}/{}", document.object.str_at("kind"), document.object.name()));
    }
    if words.is_empty() {
        return Err(Error::plain("required resource not specified"));
    }
    target::fetch(context, &words, which.selector.as_deref(), None, false).await
}

async fn status(context: &Context, args: &StatusArgs, found: &Found) -> Result<()> {
    let kind = found.resource.kind.as_str();
    let limit = parse_duration(&args.timeout).ok_or_else(|| Error::plain(format!("invalid argument {:?} for \"--timeout\" flag", args.timeout)))?;
    let limit = if limit.is_zero() { Duration::from_secs(365 * 86_400) } else { limit };
    let query = [("fieldSelector", format!("metadata.name={}", found.object.name()))];
    let collection = found.resource.path(found.namespace.as_deref(), None);
    let (mut failure, mut last) = (None, String::new());
    let watched = super::wait::watch_until(context, &collection, &query, |_, object| {
        let Some(object) = object else {
            failure = Some(Error::plain("object has been deleted"));
            return true;
        };
        match rollout_status(kind, object, args.revision) {
            Ok((line, done)) => {
                if line != last {
                    println!("{line}");
                    last = line;
                }
                done || !args.watch
            }
            Err(error) => {
                failure = Some(error);
                true
            }
        }
    });
    let result = tokio::time::timeout(limit, watched).await;
    match (result, failure) {
        (_, Some(error)) => Err(error),
        (Ok(result), None) => result,
        (Err(_), None) => Err(Error::plain("timed out waiting for the condition")),
    }
}

/// One revision: its number, why it came to be, and its pod template.
struct Revision {
    number: i64,
    cause: String,
    template: Value,
    annotations: Value,
    name: String,
}

/// All revisions of the workload, oldest first.
async fn revisions(context: &Context, found: &Found) -> Result<Vec<Revision>> {
    let plural = match found.resource.kind.as_str() {
        "Deployment" => "replicasets.apps",
        "DaemonSet" | "StatefulSet" => "controllerrevisions.apps",
        kind => return Err(Error::plain(format!("no history viewer has been implemented for {kind}"))),
    };
    let resource = context.resource(plural).await?;
    let query = [("labelSelector", selector_text(found.object.at("spec.selector")))];
    let list = context.list(&resource.path(found.namespace.as_deref(), None), &query, None).await?;
    let owned = list.list_at("items").iter().filter(|o| controlled_by(o, found.object.uid()));
    let mut revisions: Vec<Revision> = owned.filter_map(read_revision).collect();
    revisions.sort_by_key(|r| r.number);
    Ok(revisions)
}

fn read_revision(object: &Value) -> Option<Revision> {
    let (number, template) = match object.int_at("revision") {
        Some(number) => {
            let mut template = object.at("data.spec.template").cloned().unwrap_or_default();
            // The data is a strategic merge patch; we send the template itself.
            template.as_object_mut().and_then(|template| template.remove("$patch"));
            (number, template)
        }
        None => (annotation(object, REVISION)?.parse().ok()?, object.at("spec.template").cloned().unwrap_or_default()),
    };
    Some(Revision {
        number,
        cause: annotation(object, CHANGE_CAUSE).unwrap_or("<none>").to_owned(),
        template,
        annotations: object.at("metadata.annotations").cloned().unwrap_or_default(),
        name: object.name().to_owned(),
    })
}

async fn history(context: &Context, args: &HistoryArgs, found: &Found) -> Result<()> {
    let revisions = revisions(context, found).await?;
    let named = found.named();
    if args.revision > 0 {
        let revision = revisions.iter().find(|r| r.number == args.revision).ok_or_else(|| Error::plain(format!("unable to find the specified revision {}", args.revision)))?;
        let mut template = super::describe::Doc::default();
        template.line(0, "Pod Template:");
        template.pod_template(&revision.template, 1);
        println!("{named} with revision #{}\n{}", args.revision, align(&template.text, DESCRIBE));
        return Ok(());
    }
    let mut text = "REVISION\tCHANGE-CAUSE\n".to_owned();
    for revision in &revisions {
        text += &format!("{}\t{}\n", revision.number, revision.cause);
    }
    if revisions.is_empty() {
        println!("{named} \nNo rollout history found.");
    } else {
        println!("{named} \n{}", align(&text, DESCRIBE));
    }
    Ok(())
}

async fn undo(context: &Context, args: &UndoArgs, found: &Found) -> Result<()> {
    let kind = found.resource.kind.as_str();
    let (name, named) = (found.object.name(), found.named());
    if found.object.bool_at("spec.paused") {
        return Err(Error::plain(format!("you cannot rollback a paused deployment; resume it first with 'kubectl rollout resume {named}' and try again")));
    }
    let revisions = revisions(context, found).await?;
    let target = match args.to_revision {
        0 if revisions.len() < 2 => return Err(Error::plain(format!("no rollout history found for {} {name:?}", kind.to_lowercase()))),
        0 => &revisions[revisions.len() - 2],
        number => revisions.iter().find(|r| r.number == number).ok_or_else(|| Error::plain(format!("unable to find specified revision {number} in history")))?,
    };
    let mut template = target.template.clone();
    if let Some(labels) = template.get_mut("metadata").and_then(|m| m.get_mut("labels")).and_then(Value::as_object_mut) {
        labels.remove(HASH_LABEL);
    }
    if found.object.at("spec.template") == Some(&template) {
        println!("{named} skipped rollback (current template already matches revision {})", target.number);
        return Ok(());
    }
    if args.dry_run.is_client() {
        println!("{named} {} (revision {})", args.dry_run.words("rolled back"), target.number);
        return Ok(());
    }
    let mut operations = vec![json!({ "op": "replace", "path": "/spec/template", "value": template })];
    if kind == "Deployment" {
        operations.push(json!({ "op": "add", "path": "/metadata/annotations", "value": annotations_after(&found.object, &target.annotations) }));
    }
    let ask = Ask::patch(JSON_PATCH, &json!(operations)).with("fieldManager", "kubectl-rollout");
    context.json(Method::PATCH, &found.path(), args.dry_run.ask(ask)).await.map_err(|e| e.when("rolling back to", &target.name))?;
    println!("{named} {}", args.dry_run.words("rolled back"));
    Ok(())
}

/// The annotations of the revision, but what belongs to the deployment itself stays as it is.
fn annotations_after(deployment: &Value, revision: &Value) -> Value {
    const OWN: [&str; 6] = [
        crate::merge::LAST_APPLIED,
        REVISION,
        "deployment.kubernetes.io/revision-history",
        "deployment.kubernetes.io/desired-replicas",
        "deployment.kubernetes.io/max-replicas",
        "deprecated.deployment.rollback.to",
    ];
    let is_own = |key: &String| OWN.contains(&key.as_str());
    let empty = serde_json::Map::new();
    let (theirs, ours) = (revision.as_object().unwrap_or(&empty), deployment.map_at("metadata.annotations").unwrap_or(&empty));
    let kept = ours.iter().filter(|(k, _)| is_own(k)).chain(theirs.iter().filter(|(k, _)| !is_own(k)));
    Value::Object(kept.map(|(k, v)| (k.clone(), v.clone())).collect())
}

async fn restart(context: &Context, found: &Found) -> Result<()> {
    if !matches!(found.resource.kind.as_str(), "Deployment" | "DaemonSet" | "StatefulSet") {
        return Err(Error::plain(format!("{} {:?} restarting is not supported", found.resource.qualified(), found.object.name())));
    }
    if found.object.bool_at("spec.paused") {
        return Err(Error::plain("can't restart paused deployment (run rollout resume first)"));
    }
    let now = knarr_api::time::print(jiff::Timestamp::now(), 0);
    let patch = json!({ "spec": { "template": { "metadata": { "annotations": { RESTARTED_AT: now } } } } });
    found.patch(context, "", Ask::patch(STRATEGIC_PATCH, &patch).with("fieldManager", "kubectl-rollout")).await?;
    println!("{} restarted", found.named());
    Ok(())
}

async fn pause(context: &Context, found: &Found, paused: bool) -> Result<()> {
    let (resource, name) = (found.resource.qualified(), found.object.name());
    if found.resource.kind != "Deployment" {
        return Err(Error::plain(format!("{resource} {name:?} {} is not supported", if paused { "pausing" } else { "resuming" })));
    }
    if found.object.bool_at("spec.paused") == paused {
        return Err(Error::plain(format!("{resource} {name:?} is {}", if paused { "already paused" } else { "not paused" })));
    }
    let patch = json!({ "spec": { "paused": if paused { json!(true) } else { Value::Null } } });
    found.patch(context, "", Ask::patch(MERGE_PATCH, &patch).with("fieldManager", "kubectl-rollout")).await?;
    println!("{} {}", found.named(), if paused { "paused" } else { "resumed" });
    Ok(())
}
