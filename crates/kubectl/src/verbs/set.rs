//! `set image`, `set env`, `set resources`, `set serviceaccount`: small changes of pod templates.

use http::Method;
use knarr_api::object::Object;
use serde_json::{Map, Value, json};

use crate::context::{Ask, Context, STRATEGIC_PATCH};
use crate::error::{Error, Result};
use crate::output::OutputArgs;
use crate::target::{self, Found};
use crate::verbs::apply::DryRunArgs;
use crate::workload::pod_spec_path;

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Sub,
}

#[derive(clap::Subcommand)]
enum Sub {
    /// Update the image of a pod template.
    Image(Common),
    /// Update environment variables on a pod template.
    Env(EnvArgs),
    /// Update resource requests/limits on objects with pod templates.
    Resources(ResourcesArgs),
    /// Update the service account of a resource.
    #[command(alias = "sa")]
    Serviceaccount(Common),
}

#[derive(clap::Args)]
struct Common {
    /// TYPE/NAME..., then KEY=VALUE...
    words: Vec<String>,
    #[arg(short = 'l', long)]
    selector: Option<String>,
    /// Select all resources of the given types.
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    dry_run: DryRunArgs,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(clap::Args)]
struct EnvArgs {
    #[command(flatten)]
    common: Common,
    /// The names of containers to change; all by default.
    #[arg(short, long)]
    containers: Option<String>,
    /// List the environment instead.
    #[arg(long)]
    list: bool,
    /// Take variables from a configmap/NAME or secret/NAME.
    #[arg(long)]
    from: Option<String>,
    /// Put in front of the names taken with --from.
    #[arg(long, default_value = "")]
    prefix: String,
    /// Only these keys of --from.
    #[arg(long, value_delimiter = ',')]
    keys: Vec<String>,
}

#[derive(clap::Args)]
struct ResourcesArgs {
    #[command(flatten)]
    common: Common,
    #[arg(short, long)]
    containers: Option<String>,
    /// cpu=200m,memory=512Mi
    #[arg(long, default_value = "")]
    limits: String,
    #[arg(long, default_value = "")]
    requests: String,
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    match args.command {
        Sub::Image(common) => image(context, &common).await,
        Sub::Env(args) => env(context, &args).await,
        Sub::Resources(args) => resources(context, &args).await,
        Sub::Serviceaccount(common) => service_account(context, &common).await,
    }
}

/// Splits words into what is to be changed and how.
fn split(words: &[String], is_change: impl Fn(&str) -> bool) -> (Vec<String>, Vec<String>) {
    let (changes, targets) = words.iter().cloned().partition(|w| is_change(w));
    (targets, changes)
}

async fn find(context: &Context, common: &Common, targets: &[String]) -> Result<Vec<Found>> {
    target::need_choice(targets, common.all || common.selector.is_some())?;
    let found = target::fetch(context, targets, common.selector.as_deref(), None, false).await?;
    if found.is_empty() { Err(Error::plain("one or more resources must be specified as <resource> <name> or <resource>/<name>")) } else { Ok(found) }
}

/// Sends the changed pod spec as a patch; says nothing where nothing changed.
async fn send(context: &Context, common: &Common, found: &Found, change: Value, what: &str) -> Result<()> {
    let mut patch = json!({});
    patch.set_at(pod_spec_path(&found.resource.kind)?, change);
    let words = common.dry_run.words(what);
    if common.dry_run.is_client() {
        let type_id = crate::merge::type_of(found.object.str_at("apiVersion"), found.object.str_at("kind"));
        let patched = match type_id {
            Some(id) => knarr_api::patch::strategic_value(knarr_api::schema::Schema::builtin(), id, found.object.clone(), patch)
                .map_err(|s| Error::Server { status: s.to_value(), during: None })?,
            None => found.object.clone(),
        };
        return common.output.done(&found.named(), &patched, &words);
    }
    let ask = Ask::patch(STRATEGIC_PATCH, &patch).with("fieldManager", "kubectl-set");
    let patched = context.json(Method::PATCH, &found.path(), common.dry_run.ask(ask)).await?;
    if patched.str_at("metadata.resourceVersion") == found.object.str_at("metadata.resourceVersion") && common.output.output.is_none() {
        return Ok(());
    }
    common.output.done(&found.named(), &patched, &words)
}

fn containers<'o>(found: &'o Found, list: &str) -> Result<Vec<&'o Value>> {
    let path = format!("{}.{list}", pod_spec_path(&found.resource.kind)?);
    Ok(found.object.list_at(&path).iter().collect())
}

/// Does a name match `*`, `a*` or a plain name?
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((before, after)) => name.len() >= before.len() + after.len() && name.starts_with(before) && name.ends_with(after),
    }
}

async fn image(context: &Context, common: &Common) -> Result<()> {
    let (targets, changes) = split(&common.words, |w| w.contains('='));
    if changes.is_empty() {
        return Err(Error::plain("at least one image update is required"));
    }
    for found in find(context, common, &targets).await? {
        let mut change = Map::new();
        for list in ["containers", "initContainers"] {
            let all = containers(&found, list)?;
            let mut changed = Vec::new();
            for container in all {
                let name = container.str_at("name");
                for (pattern, image) in changes.iter().filter_map(|c| c.split_once('=')) {
                    if matches(pattern, name) {
                        changed.push(json!({ "name": name, "image": image }));
                    }
                }
            }
            if !changed.is_empty() {
                change.insert(list.into(), changed.into());
            }
        }
        check_known(&found, &changes)?;
        send(context, common, &found, Value::Object(change), "image updated").await?;
    }
    Ok(())
}

fn check_known(found: &Found, changes: &[String]) -> Result<()> {
    let (first, second) = (containers(found, "containers")?, containers(found, "initContainers")?);
    for (pattern, _) in changes.iter().filter_map(|c| c.split_once('=')) {
        if !first.iter().chain(&second).any(|c| matches(pattern, c.str_at("name"))) {
            return Err(Error::plain(format!("unable to find container named {pattern:?}")));
        }
    }
    Ok(())
}

async fn env(context: &Context, args: &EnvArgs) -> Result<()> {
    let common = &args.common;
    let (targets, changes) = split(&common.words, |w| w.contains('=') || w.ends_with('-') && !w.contains('/'));
    let wanted = args.containers.as_deref().unwrap_or("*");
    let mut variables = Vec::new();
    if let Some(from) = &args.from {
        variables.extend(variables_from(context, args, from).await?);
    }
    for change in &changes {
        variables.push(match change.split_once('=') {
            Some((name, value)) => json!({ "name": name, "value": value, "valueFrom": null }),
            None => json!({ "name": change.trim_end_matches('-'), "$patch": "delete" }),
        });
    }
    for found in find(context, common, &targets).await? {
        if args.list {
            list_env(&found, wanted)?;
            continue;
        }
        if variables.is_empty() {
            return Err(Error::plain("at least one environment variable must be provided"));
        }
        let all = containers(&found, "containers")?;
        let names = all.iter().map(|c| c.str_at("name")).filter(|n| matches(wanted, n));
        let changed: Vec<Value> = names.map(|name| json!({ "name": name, "env": variables })).collect();
        send(context, common, &found, json!({ "containers": changed }), "env updated").await?;
    }
    Ok(())
}

async fn variables_from(context: &Context, args: &EnvArgs, from: &str) -> Result<Vec<Value>> {
    let source = target::fetch_one(context, &[from.to_owned()], "").await?;
    let field = match source.resource.kind.as_str() {
        "ConfigMap" => "configMapKeyRef",
        "Secret" => "secretKeyRef",
        kind => return Err(Error::plain(format!("unsupported resource specified in --from: {kind}"))),
    };
    let keys = source.object.map_at("data").into_iter().flat_map(|m| m.keys());
    let keys = keys.filter(|k| args.keys.is_empty() || args.keys.contains(k));
    Ok(keys
        .map(|key| {
            let name: String = key.to_uppercase().chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
            json!({ "name": format!("{}{name}", args.prefix), "value": null, "valueFrom": { field: { "name": source.object.name(), "key": key } } })
        })
        .collect())
}

fn list_env(found: &Found, wanted: &str) -> Result<()> {
    for container in containers(found, "containers")?.into_iter().filter(|c| matches(wanted, c.str_at("name"))) {
        println!("# {}, container {}", found.named(), container.str_at("name"));
        for variable in container.list_at("env") {
            match variable.get("valueFrom").filter(|v| !v.is_null()) {
                None => println!("{}={}", variable.str_at("name"), variable.str_at("value")),
                Some(source) => println!("# {} from {source}", variable.str_at("name")),
            }
        }
    }
    Ok(())
}

async fn resources(context: &Context, args: &ResourcesArgs) -> Result<()> {
    let amounts = |text: &str| if text.is_empty() { Ok(Map::new()) } else { super::expose::pairs(text) };
    let (limits, requests) = (amounts(&args.limits)?, amounts(&args.requests)?);
    if limits.is_empty() && requests.is_empty() {
        return Err(Error::plain("you must specify an update to requests or limits (in the form of --requests/--limits)"));
    }
    let mut change = Map::new();
    for (name, map) in [("limits", limits), ("requests", requests)] {
        if !map.is_empty() {
            change.insert(name.into(), Value::Object(map));
        }
    }
    let wanted = args.containers.as_deref().unwrap_or("*");
    for found in find(context, &args.common, &args.common.words).await? {
        let all = containers(&found, "containers")?;
        let names = all.iter().map(|c| c.str_at("name")).filter(|n| matches(wanted, n));
        let changed: Vec<Value> = names.map(|name| json!({ "name": name, "resources": change })).collect();
        if changed.is_empty() {
            return Err(Error::plain(format!("unable to find container named {wanted}")));
        }
        send(context, &args.common, &found, json!({ "containers": changed }), "resource requirements updated").await?;
    }
    Ok(())
}

async fn service_account(context: &Context, common: &Common) -> Result<()> {
    let Some((account, targets)) = common.words.split_last() else {
        return Err(Error::plain("serviceaccount is required"));
    };
    for found in find(context, common, targets).await? {
        let change = json!({ "serviceAccountName": account, "serviceAccount": account });
        send(context, common, &found, change, "serviceaccount updated").await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn container_patterns_match_names() {
        for (pattern, name, is) in [("*", "web", true), ("web", "web", true), ("web", "webs", false), ("w*", "web", true), ("*b", "web", true), ("a*", "web", false)] {
            assert_eq!(matches(pattern, name), is, "{pattern} {name}");
        }
    }
}
