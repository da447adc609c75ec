//! `taint`: KEY=VALUE:EFFECT, or KEY[:EFFECT]- to remove.

use knarr_api::object::Object;
use serde_json::{Value, json};

use crate::context::{Ask, Context, MERGE_PATCH};
use crate::error::{Error, Result};
use crate::verbs::apply::DryRunArgs;
use crate::verbs::cordon::nodes;

const EFFECTS: [&str; 3] = ["NoSchedule", "PreferNoSchedule", "NoExecute"];
/// How often a node that changes meanwhile is read again.
const TRIES_MAX: usize = 5;

#[derive(clap::Args)]
pub struct Args {
    /// node NAME... TAINT...
    words: Vec<String>,
    #[arg(short = 'l', long)]
    selector: Option<String>,
    #[arg(long)]
    all: bool,
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    dry_run: DryRunArgs,
}

/// A taint to set, or to remove (by key, and by effect where given).
#[derive(Debug, PartialEq)]
enum Change {
    Set { key: String, value: String, effect: String },
    Remove { key: String, effect: Option<String> },
}

fn parse(word: &str) -> Result<Change> {
    if let Some(removed) = word.strip_suffix('-') {
        let (key, effect) = removed.split_once(':').map_or((removed, None), |(k, e)| (k, Some(e.to_owned())));
        let key = key.split('=').next().unwrap_or(key).to_owned();
        return Ok(Change::Remove { key, effect });
    }
    let (pair, effect) = word.split_once(':').ok_or_else(|| Error::plain(format!("invalid taint spec: {word}")))?;
    if !EFFECTS.contains(&effect) {
        return Err(Error::plain(format!("invalid taint effect: {effect}, unsupported taint effect")));
    }
    let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
    Ok(Change::Set { key: key.into(), value: value.into(), effect: effect.into() })
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    let rest = match args.words.split_first() {
        Some((kind, rest)) if ["node", "nodes", "no"].contains(&kind.as_str()) => rest,
        _ => return Err(Error::plain("invalid resource type, only node(s) is supported")),
    };
    let is_taint = |w: &&String| w.contains(':') || w.contains('=') || w.ends_with('-');
    let changes = rest.iter().filter(is_taint).map(|w| parse(w)).collect::<Result<Vec<_>>>()?;
    if changes.is_empty() {
        return Err(Error::plain("at least one taint update is required"));
    }
    let names: Vec<String> = rest.iter().filter(|w| !is_taint(w)).cloned().collect();
    let selector = if args.all { Some("") } else { args.selector.as_deref() };
    for mut node in nodes(context, &names, selector).await? {
        for tries in 1.. {
            let taints = apply(node.object.name(), node.object.list_at("spec.taints"), &changes, args.overwrite)?;
            if args.dry_run.is_client() {
                break;
            }
            // The version guards what was read: taints are one atomic list, and others change it too.
            let version = node.object.str_at("metadata.resourceVersion");
            let patch = json!({ "metadata": { "resourceVersion": version }, "spec": { "taints": taints } });
            let ask = args.dry_run.ask(Ask::patch(MERGE_PATCH, &patch)).with("fieldManager", "kubectl-taint");
            match node.patch(context, "", ask).await {
                Err(Error::Server { status, .. }) if status.str_at("reason") == "Conflict" && tries < TRIES_MAX => {
                    let name = [node.object.name().to_owned()];
                    let Some(newer) = nodes(context, &name, None).await?.pop() else { break };
                    node = newer;
                }
                result => {
                    result?;
                    break;
                }
            }
        }
        let removed = changes.iter().all(|c| matches!(c, Change::Remove { .. }));
        println!("{} {}", node.named(), args.dry_run.words(if removed { "untainted" } else { "tainted" }));
    }
    Ok(())
}

fn apply(node: &str, current: &[Value], changes: &[Change], overwrite: bool) -> Result<Vec<Value>> {
    let mut taints = current.to_vec();
    for change in changes {
        match change {
            Change::Remove { key, effect } => {
                let before = taints.len();
                taints.retain(|t| t.str_at("key") != key || effect.as_ref().is_some_and(|e| e != t.str_at("effect")));
                if taints.len() == before {
                    let suffix = effect.as_ref().map(|e| format!(":{e}")).unwrap_or_default();
                    return Err(Error::plain(format!("taint \"{key}{suffix}\" not found")));
                }
            }
            Change::Set { key, value, effect } => {
                let same = |t: &Value| t.str_at("key") == key && t.str_at("effect") == effect;
                if taints.iter().any(same) && !overwrite {
                    return Err(Error::plain(format!("node {node} already has {key} taint(s) with same effect(s) and --overwrite is false")));
                }
                taints.retain(|t| !same(t));
                let mut taint = json!({ "key": key, "effect": effect });
                if !value.is_empty() {
                    taint["value"] = json!(value);
                }
                taints.push(taint);
            }
        }
    }
    Ok(taints)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taints_are_set_and_removed() {
        let change = |word: &str| parse(word).expect(word);
        let one = apply("n", &[], &[change("a=b:NoSchedule")], false).expect("set");
        assert_eq!(json!(one), json!([{"key":"a","value":"b","effect":"NoSchedule"}]));
        assert!(apply("n", &one, &[change("a=c:NoSchedule")], false).is_err());
        assert!(apply("n", &one, &[change("a-")], false).expect("gone").is_empty());
        assert!(apply("n", &one, &[change("a:NoExecute-")], false).is_err());
        assert!(parse("a=b:Never").is_err());
    }
}
