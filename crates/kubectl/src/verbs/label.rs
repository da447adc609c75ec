//! `label`, and `annotate` on the same rails.

use http::Method;
use knarr_api::object::Object;
use serde_json::{Map, Value, json};

use crate::context::{Ask, Context, MERGE_PATCH};
use crate::error::{Error, Result};
use crate::output::OutputArgs;
use crate::target::{self, Found};
use crate::verbs::apply::DryRunArgs;

#[derive(clap::Args)]
pub struct Args {
    /// TYPE NAME... or TYPE/NAME..., then KEY=VALUE or KEY-
    words: Vec<String>,
    #[arg(short = 'l', long)]
    selector: Option<String>,
    #[arg(long)]
    field_selector: Option<String>,
    #[arg(long)]
    all: bool,
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    #[arg(short, long)]
    filename: Vec<String>,
    /// Allow values to be overwritten.
    #[arg(long)]
    overwrite: bool,
    /// Show what is set instead of changing it.
    #[arg(long)]
    list: bool,
    #[arg(long)]
    resource_version: Option<String>,
    #[command(flatten)]
    dry_run: DryRunArgs,
    #[command(flatten)]
    output: OutputArgs,
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    change(context, &args, "labels").await
}

/// `labels` or `annotations` of the named objects.
pub async fn change(context: &Context, args: &Args, field: &str) -> Result<()> {
    let (mut targets, changes) = split(&args.words, field)?;
    for document in if args.filename.is_empty() { Vec::new() } else { crate::manifest::read(&args.filename, false)? } {
        targets.push(format!("{}/{}", document.object.str_at("kind"), document.object.name()));
    }
    if targets.is_empty() {
        return Err(Error::plain("one or more resources must be specified as <resource> <name> or <resource>/<name>"));
    }
    if changes.is_empty() && !args.list {
        return Err(Error::plain(format!("at least one {} update is required", field.trim_end_matches('s'))));
    }
    let chosen = args.all || args.list || args.selector.is_some() || args.field_selector.is_some();
    target::need_choice(&targets, chosen)?;
    let mut errors = Vec::new();
    let all = target::fetch(context, &targets, args.selector.as_deref(), args.field_selector.as_deref(), args.all_namespaces).await?;
    for found in &all {
        if let Err(error) = one(context, args, field, found, &changes).await {
            errors.push(error);
        }
    }
    Error::collect(errors)
}

/// Changes: a value, or null to remove the key.
fn split(words: &[String], field: &str) -> Result<(Vec<String>, Map<String, Value>)> {
    let (mut targets, mut changes) = (Vec::new(), Map::new());
    for word in words {
        let remove = word.strip_suffix('-').filter(|key| !key.contains('=') && !targets.is_empty());
        match (word.split_once('='), remove) {
            (Some((key, value)), _) if !key.is_empty() => {
                if field == "labels" {
                    check_label(word, key, value)?;
                }
                changes.insert(key.to_owned(), json!(value));
            }
            (_, Some(key)) => {
                changes.insert(key.to_owned(), Value::Null);
            }
            _ => targets.push(word.clone()),
        }
    }
    Ok((targets, changes))
}

fn check_label(word: &str, key: &str, value: &str) -> Result<()> {
    let problems = [knarr_api::names::qualified_name(key), knarr_api::names::label_value(value)].concat();
    if problems.is_empty() {
        return Ok(());
    }
    Err(Error::plain(format!("invalid label value: {word:?}: {}", problems.join("; "))))
}

async fn one(context: &Context, args: &Args, field: &str, found: &Found, changes: &Map<String, Value>) -> Result<()> {
    let empty = Map::new();
    let current = found.object.map_at(&format!("metadata.{field}")).unwrap_or(&empty);
    if args.list {
        for (key, value) in current {
            println!("{key}={}", value.as_str().unwrap_or_default());
        }
        return Ok(());
    }
    let single = if field == "labels" { "label" } else { "annotation" };
    for (key, value) in changes {
        match (current.get(key), value) {
            (Some(old), new) if !args.overwrite && !new.is_null() && old != new => {
                let old = old.as_str().unwrap_or_default();
                return Err(Error::plain(if field == "labels" {
                    format!("'{key}' already has a value ({old}), and --overwrite is false")
                } else {
                    format!("--overwrite is false but found the following declared annotation(s): '{key}' already has a value ({old})")
                }));
            }
            (None, Value::Null) => println!("{single} {key:?} not found."),
            _ => {}
        }
    }
    let differs = changes.iter().any(|(k, v)| current.get(k).unwrap_or(&Value::Null) != v);
    let removes_only = changes.values().all(Value::is_null);
    let what = match (field, differs) {
        ("labels", false) => "not labeled",
        ("labels", true) if removes_only => "unlabeled",
        ("labels", true) => "labeled",
        _ => "annotated",
    };
    let mut object = found.object.clone();
    if differs && !args.dry_run.is_client() {
        let mut patch = json!({ "metadata": { field: changes } });
        if let Some(version) = &args.resource_version {
            patch.set_at("metadata.resourceVersion", version.clone());
        }
        let manager = if field == "labels" { "kubectl-label" } else { "kubectl-annotate" };
        let ask = Ask::patch(MERGE_PATCH, &patch).with("fieldManager", manager);
        object = context.json(Method::PATCH, &found.path(), args.dry_run.ask(ask)).await?;
    }
    args.output.done(&found.named(), &object, &args.dry_run.words(what))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_part_into_targets_and_changes() {
        let words: Vec<String> = ["pod", "x", "a=b", "c-"].map(String::from).to_vec();
        let (targets, changes) = split(&words, "labels").expect("fine");
        assert_eq!(targets, ["pod", "x"]);
        assert_eq!(Value::Object(changes), json!({"a":"b","c":null}));
        assert!(split(&["pod".into(), "a=b c".into()], "labels").is_err());
    }
}
