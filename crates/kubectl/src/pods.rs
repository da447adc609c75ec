//! From what the user named to a pod and a container: for logs, exec, attach, port-forward and cp.

use knarr_api::object::Object;
use serde_json::Value;

use crate::context::Context;
use crate::error::{Error, Result};
use crate::target::{self, Found};
use crate::workload::{controlled_by, selector_text};

const DEFAULT_CONTAINER: &str = "kubectl.kubernetes.io/default-container";

/// The pods behind `pod`, `pod/x`, `deployment/x`, `service/x`...; the best of several first.
pub async fn behind(context: &Context, words: &[String]) -> Result<Vec<Value>> {
    let found = target::fetch_one(context, words, "pods").await?;
    if found.resource.kind == "Pod" {
        return Ok(vec![found.object]);
    }
    let pods = of_workload(context, &found).await?;
    if pods.is_empty() {
        return Err(Error::plain(format!("no pods found for {}", found.named())));
    }
    Ok(pods)
}

/// The pods a workload or service selects, running and ready ones first.
pub async fn of_workload(context: &Context, found: &Found) -> Result<Vec<Value>> {
    let selector = selector_text(found.object.at("spec.selector"));
    if selector.is_empty() {
        return Err(Error::plain(format!("cannot attach to {}: it selects no pods", found.named())));
    }
    let namespace = found.namespace.clone().unwrap_or_else(|| "default".into());
    let mut pods = list(context, Some(&namespace), &selector, "").await?;
    let kind = found.resource.kind.as_str();
    if matches!(kind, "ReplicaSet" | "DaemonSet" | "StatefulSet" | "Job") {
        pods.retain(|pod| controlled_by(pod, found.object.uid()));
    }
    pods.sort_by_key(|pod| {
        (
            !is_ready(pod),
            pod.str_at("status.phase") != "Running",
            pod.at("metadata.deletionTimestamp").is_some(),
        )
    });
    Ok(pods)
}

/// Lists pods by selectors; all namespaces where none is given.
pub async fn list(
    context: &Context,
    namespace: Option<&str>,
    labels: &str,
    fields: &str,
) -> Result<Vec<Value>> {
    let path =
        namespace.map_or_else(|| "/api/v1/pods".to_owned(), |n| format!("/api/v1/namespaces/{n}/pods"));
    let mut query = Vec::new();
    if !labels.is_empty() {
        query.push(("labelSelector", labels.to_owned()));
    }
    if !fields.is_empty() {
        query.push(("fieldSelector", fields.to_owned()));
    }
    let mut list = context.list(&path, &query, None).await?;
    Ok(match list["items"].take() {
        Value::Array(items) => items,
        _ => Vec::new(),
    })
}

pub fn is_ready(pod: &Value) -> bool {
    crate::workload::condition(pod, "Ready").is_some_and(|c| c.str_at("status") == "True")
}

/// Names of all containers of these lists, in order.
pub fn container_names<'p>(pod: &'p Value, lists: &[&str]) -> Vec<&'p str> {
    lists.iter().flat_map(|list| pod.list_at(list)).map(|c| c.str_at("name")).collect()
}

/// The container asked for, or the default one; says on standard error which it took if there are others.
pub fn choose_container(pod: &Value, asked: Option<&str>, quiet: bool) -> Result<String> {
    let all = container_names(pod, &["spec.containers", "spec.initContainers", "spec.ephemeralContainers"]);
    if let Some(asked) = asked.filter(|a| !a.is_empty()) {
        if all.contains(&asked) {
            return Ok(asked.to_owned());
        }
        return Err(Error::plain(format!("container {asked} is not valid for pod {}", pod.name())));
    }
    if let Some(default) = crate::workload::annotation(pod, DEFAULT_CONTAINER).filter(|d| all.contains(d)) {
        return Ok(default.to_owned());
    }
    let Some(first) = all.first() else {
        return Err(Error::plain(format!("pod {} has no containers", pod.name())));
    };
    if all.len() > 1 && !quiet {
        let described: Vec<String> = all
            .iter()
            .map(|name| {
                let is_init = pod.list_at("spec.initContainers").iter().any(|c| c.str_at("name") == *name);
                if is_init { format!("{name} (init)") } else { (*name).to_owned() }
            })
            .collect();
        eprintln!("Defaulted container {first:?} out of: {}", described.join(", "));
    }
    Ok((*first).to_owned())
}
