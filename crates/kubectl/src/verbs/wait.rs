//! `wait`: until a condition holds, a path has a value, or objects exist or are gone.

use std::time::Duration;

use futures::StreamExt;
use knarr_api::object::Object;
use serde_json::Value;

use crate::context::{Context, parse_duration};
use crate::error::{Error, Result};
use crate::jsonpath::{self, Template};
use crate::target::{self, Found};
use crate::workload::condition;

/// Between the end of a watch and the next list: a server that ends every watch at once is not to be flooded.
pub const RELIST_PAUSE: Duration = Duration::from_secs(1);

#[derive(clap::Args)]
pub struct Args {
    /// TYPE NAME, TYPE/NAME, or TYPE with a selector.
    words: Vec<String>,
    /// delete, create, condition=NAME[=VALUE], jsonpath={PATH}[=VALUE].
    #[arg(long = "for", required = true)]
    what: String,
    /// How long to wait; zero checks once, negative waits a week.
    #[arg(long, default_value = "30s", allow_hyphen_values = true)]
    timeout: String,
    #[arg(short = 'l', long)]
    selector: Option<String>,
    #[arg(long)]
    field_selector: Option<String>,
    /// Select all resources in the namespace of the specified resource types.
    #[arg(long)]
    all: bool,
    #[arg(short = 'A', long)]
    all_namespaces: bool,
}

/// What is waited for.
enum Goal {
    Delete,
    Create,
    Condition { name: String, value: String },
    Path { template: Template, value: Option<String> },
}

impl Goal {
    fn parse(text: &str) -> Result<Goal> {
        let lower = text.to_lowercase();
        if lower == "delete" {
            return Ok(Goal::Delete);
        }
        if lower == "create" {
            return Ok(Goal::Create);
        }
        if let Some(rest) = text.strip_prefix("condition=") {
            let (name, value) = rest.split_once('=').unwrap_or((rest, "true"));
            return Ok(Goal::Condition { name: name.into(), value: value.into() });
        }
        if let Some(rest) = text.strip_prefix("jsonpath=") {
            let (path, value) = match rest.split_once("}=").map(|(p, v)| (format!("{p}}}"), v)) {
                Some((path, value)) => (path, Some(value.trim_matches(['\'', '"']).to_owned())),
                None => (rest.trim_matches('\'').to_owned(), None),
            };
            let template = Template::relaxed(path.trim_matches('\'')).map_err(Error::plain)?;
            return Ok(Goal::Path { template, value });
        }
        Err(Error::plain(format!("unrecognized condition: {text:?}")))
    }

    /// Does the object (none: it does not exist) meet the goal?
    fn met(&self, object: Option<&Value>) -> bool {
        match (self, object) {
            (Goal::Delete, found) => found.is_none(),
            (Goal::Create, found) => found.is_some(),
            (_, None) => false,
            (Goal::Condition { name, value }, Some(object)) => {
                let condition = object.list_at("status.conditions").iter().find(|c| c.str_at("type").eq_ignore_ascii_case(name));
                // A condition of an older generation says nothing of this one.
                let seen = condition.and_then(|c| c.int_at("observedGeneration").or(object.int_at("status.observedGeneration")));
                let stale = seen.is_some_and(|seen| seen < object.int_at("metadata.generation").unwrap_or(0));
                !stale && condition.is_some_and(|c| c.str_at("status").eq_ignore_ascii_case(value))
            }
            (Goal::Path { template, value }, Some(object)) => {
                let found = template.find(object);
                match value {
                    None => !found.is_empty(),
                    Some(value) => found.len() == 1 && jsonpath::print(found[0]) == *value,
                }
            }
        }
    }
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    let goal = Goal::parse(&args.what)?;
    let limit = timeout(&args.timeout)?;
    let deadline = tokio::time::Instant::now() + limit;
    let targets = match find(context, &args, &goal, deadline).await {
        Ok(targets) => targets,
        Err(error) if error.is_not_found() && matches!(goal, Goal::Delete) => return Ok(()),
        Err(error) => return Err(error),
    };
    if targets.is_empty() {
        // Nothing left to wait for is what was waited for.
        return if matches!(goal, Goal::Delete) { Ok(()) } else { Err(Error::plain("no matching resources found")) };
    }
    let mut errors = Vec::new();
    for found in targets {
        match until(context, &found, &goal, deadline).await {
            Ok(()) => println!("{} condition met", found.named()),
            Err(error) => errors.push(error),
        }
    }
    Error::collect(errors)
}

fn timeout(text: &str) -> Result<Duration> {
    if text.starts_with('-') {
        return Ok(Duration::from_secs(7 * 86_400));
    }
    parse_duration(text).ok_or_else(|| Error::plain(format!("invalid argument {text:?} for \"--timeout\" flag")))
}

/// Fetches the targets; `--for=create` waits for those named until they are there.
async fn find(context: &Context, args: &Args, goal: &Goal, deadline: tokio::time::Instant) -> Result<Vec<Found>> {
    if args.words.is_empty() {
        return Err(Error::plain("arguments in resource/name form or a resource type are needed"));
    }
    let chosen = args.all || args.selector.is_some() || args.field_selector.is_some();
    target::need_choice(&args.words, chosen)?;
    let fetch = || target::fetch(context, &args.words, args.selector.as_deref(), args.field_selector.as_deref(), args.all_namespaces);
    if !matches!(goal, Goal::Create) {
        return fetch().await;
    }
    let targets = target::resolve(context.discovery().await?, &args.words)?;
    let scope = context.namespace()?;
    for target in &targets {
        let namespace = (!args.all_namespaces).then_some(scope.as_str());
        let collection = target.resource.path(namespace, None);
        let fields = target.name.as_ref().map(|n| format!("metadata.name={n}")).or(args.field_selector.clone());
        let query = target::selectors(args.selector.as_deref(), fields.as_deref());
        let what = target.name.clone().unwrap_or_default();
        let appears = watch_until(context, &collection, &query, |_, object| object.is_some());
        tokio::time::timeout_at(deadline, appears)
            .await
            .map_err(|_| Error::plain(format!("timed out waiting for the condition on {}/{what}", target.resource.qualified())))??;
    }
    fetch().await
}

async fn until(context: &Context, found: &Found, goal: &Goal, deadline: tokio::time::Instant) -> Result<()> {
    let name = found.object.name();
    if goal.met(Some(&found.object)) {
        return Ok(());
    }
    let collection = found.resource.path(found.namespace.as_deref(), None);
    let query = [("fieldSelector", format!("metadata.name={name}"))];
    let uid = found.object.uid();
    let met = watch_until(context, &collection, &query, |_, object| {
        // A new object of the same name is not the one that was to go.
        let object = object.filter(|o| !matches!(goal, Goal::Delete) || o.uid() == uid);
        goal.met(object)
    });
    match tokio::time::timeout_at(deadline, met).await {
        Ok(result) => result,
        Err(_) => Err(Error::plain(format!("timed out waiting for the condition on {}/{name}", found.resource.qualified()))),
    }
}

/// Lists, then watches, until `is` holds for an object (none: there is no object). Lists anew when a watch ends.
pub async fn watch_until(
    context: &Context,
    collection: &str,
    query: &[(&str, String)],
    mut is: impl FnMut(&str, Option<&Value>) -> bool,
) -> Result<()> {
    loop {
        let list = context.list(collection, query, None).await?;
        let items = list.list_at("items");
        if items.is_empty() && is("DELETED", None) || items.iter().any(|item| is("ADDED", Some(item))) {
            return Ok(());
        }
        let mut events = context.watch(collection, query, list.str_at("metadata.resourceVersion"), None).await?;
        while let Some(event) = events.next().await {
            let event = match event {
                // The history is gone, or the connection: the next list tells.
                Err(_) => break,
                Ok(event) if event.kind == "BOOKMARK" => continue,
                Ok(event) => event,
            };
            let object = (event.kind != "DELETED").then_some(&event.object);
            if is(&event.kind, object) {
                return Ok(());
            }
        }
        tokio::time::sleep(RELIST_PAUSE).await;
    }
}

/// Waits until the object that was deleted is gone; `deleted` is the server's answer.
pub async fn until_gone(context: &Context, path: &str, collection: &str, deleted: &Value, limit: Option<Duration>) -> Result<()> {
    let name = path.rsplit('/').next().unwrap_or_default();
    let uid = match deleted.uid() {
        "" => deleted.str_at("details.uid"),
        uid => uid,
    };
    let query = [("fieldSelector", format!("metadata.name={name}"))];
    let gone = watch_until(context, collection, &query, |_, object| object.is_none_or(|o| !uid.is_empty() && o.uid() != uid));
    match limit {
        None => gone.await,
        Some(limit) => tokio::time::timeout(limit, gone)
            .await
            .unwrap_or_else(|_| Err(Error::plain(format!("timed out waiting for the condition on {name}")))),
    }
}

/// For verbs that look at one condition only.
pub fn is_true(object: &Value, name: &str) -> bool {
    condition(object, name).is_some_and(|c| c.str_at("status") == "True")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn goals_are_read_and_met() {
        let pod = json!({"metadata":{"generation":1},"status":{"phase":"Running","conditions":[{"type":"Ready","status":"True"}]}});
        let stale = json!({"metadata":{"generation":2},"status":{"observedGeneration":1,"conditions":[{"type":"Ready","status":"True"}]}});
        for (text, object, met) in [
            ("condition=Ready", Some(&pod), true),
            ("condition=ready=True", Some(&pod), true),
            ("condition=Ready=False", Some(&pod), false),
            ("condition=Ready", Some(&stale), false),
            ("jsonpath={.status.phase}=Running", Some(&pod), true),
            ("jsonpath='{.status.phase}'=Pending", Some(&pod), false),
            ("jsonpath={.status.phase}", Some(&pod), true),
            ("jsonpath={.status.podIP}", Some(&pod), false),
            ("delete", Some(&pod), false),
            ("delete", None, true),
            ("create", None, false),
        ] {
            assert_eq!(Goal::parse(text).expect("parses").met(object), met, "{text}");
        }
        assert!(Goal::parse("foo").is_err());
    }
}
