//! What must be true in the end, when nothing fails any more: everybody has what was wished for, and nothing is left
//! of what was deleted.

use crate::history::{History, number, text};
use crate::rules::{condition, controller, is_deleting, is_finished};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

type Wish = fn(&History) -> Vec<String>;

const WISHES: &[Wish] = &[
    nothing_is_being_deleted,
    no_orphans,
    nodes_are_ready,
    pods_run,
    deployments,
    replica_sets,
    stateful_sets,
    daemon_sets,
    jobs,
    endpoints,
    budgets,
    namespaces_are_furnished,
];

/// What is still missing.
pub fn missing(history: &History) -> Vec<String> {
    WISHES.iter().flat_map(|wish| wish(history)).collect()
}

/// Partitions that may be written while nothing happens: heartbeats, and events that end.
pub fn may_be_written_when_idle(partition: &str) -> bool {
    matches!(partition, "leases.coordination.k8s.io" | "nodes") || partition.starts_with("events")
}

fn each<'a>(history: &'a History, partition: &'a str) -> impl Iterator<Item = (&'a String, &'a Value)> {
    history.objects(partition).iter().map(|(key, object)| (key, &*object.value))
}

fn equal(what: &str, key: &str, pairs: &[(&str, i64, i64)]) -> Vec<String> {
    let wrong = pairs.iter().filter(|(_, is, wanted)| is != wanted);
    wrong.map(|(name, is, wanted)| format!("{what} {key}: {name} is {is}, not {wanted}")).collect()
}

fn observed(object: &Value) -> (&'static str, i64, i64) {
    (
        "observedGeneration",
        number(object, "/status/observedGeneration"),
        number(object, "/metadata/generation"),
    )
}

fn nothing_is_being_deleted(history: &History) -> Vec<String> {
    let all = history
        .state
        .iter()
        .flat_map(|(partition, objects)| objects.iter().map(move |(k, o)| (partition, k, o)));
    let deleting = all.filter(|(_, _, object)| is_deleting(&object.value));
    deleting
        .map(|(partition, key, object)| {
            format!(
                "{partition} {key} is still being deleted; finalizers {}",
                object.value["metadata"]["finalizers"]
            )
        })
        .collect()
}

/// Who has owners has at least one that exists.
fn no_orphans(history: &History) -> Vec<String> {
    let uids: BTreeSet<&str> = history
        .state
        .values()
        .flat_map(|objects| objects.values())
        .map(|object| text(&object.value, "/metadata/uid"))
        .collect();
    let mut found = Vec::new();
    for (partition, objects) in &history.state {
        for (key, object) in objects {
            let owners = object.value.pointer("/metadata/ownerReferences").and_then(Value::as_array);
            let owners: Vec<&str> =
                owners.into_iter().flatten().filter_map(|owner| owner["uid"].as_str()).collect();
            if !owners.is_empty() && !owners.iter().any(|uid| uids.contains(uid)) {
                found.push(format!("{partition} {key} has outlived its owners"));
            }
        }
    }
    found
}

fn nodes_are_ready(history: &History) -> Vec<String> {
    let mut found = Vec::new();
    for (key, node) in each(history, "nodes") {
        if condition(node, "Ready") != "True" {
            found.push(format!("node {key} is not ready"));
        }
        if node.pointer("/spec/taints").and_then(Value::as_array).is_some_and(|taints| !taints.is_empty()) {
            found.push(format!("node {key} is tainted: {}", node["spec"]["taints"]));
        }
    }
    found
}

fn pods_run(history: &History) -> Vec<String> {
    let waiting =
        each(history, "pods").filter(|(_, pod)| !is_finished(pod) && condition(pod, "Ready") != "True");
    waiting
        .map(|(key, pod)| {
            let (phase, node) = (text(pod, "/status/phase"), text(pod, "/spec/nodeName"));
            format!("pod {key} is not ready: phase {phase}, node {node:?}")
        })
        .collect()
}

fn wanted(object: &Value) -> i64 {
    object.pointer("/spec/replicas").and_then(Value::as_i64).unwrap_or(1)
}

fn status(object: &Value, field: &str) -> i64 {
    number(object, &format!("/status/{field}"))
}

fn deployments(history: &History) -> Vec<String> {
    let mut found = Vec::new();
    for (key, object) in each(history, "deployments.apps") {
        let replicas = wanted(object);
        found.extend(equal(
            "deployment",
            key,
            &[
                observed(object),
                ("replicas", status(object, "replicas"), replicas),
                ("updatedReplicas", status(object, "updatedReplicas"), replicas),
                ("availableReplicas", status(object, "availableReplicas"), replicas),
            ],
        ));
    }
    found
}

fn active_pods(history: &History, uid: &str) -> i64 {
    let owned =
        each(history, "pods").filter(|(_, pod)| controller(pod).is_some_and(|(_, owner)| owner == uid));
    owned.filter(|(_, pod)| !is_finished(pod)).count() as i64
}

fn replica_sets(history: &History) -> Vec<String> {
    let mut found = Vec::new();
    for (key, object) in each(history, "replicasets.apps") {
        let replicas = wanted(object);
        found.extend(equal(
            "replica set",
            key,
            &[
                observed(object),
                ("replicas", status(object, "replicas"), replicas),
                ("readyReplicas", status(object, "readyReplicas"), replicas),
                ("pods", active_pods(history, text(object, "/metadata/uid")), replicas),
            ],
        ));
    }
    found
}

fn stateful_sets(history: &History) -> Vec<String> {
    let mut found = Vec::new();
    for (key, object) in each(history, "statefulsets.apps") {
        let replicas = wanted(object);
        found.extend(equal(
            "stateful set",
            key,
            &[
                observed(object),
                ("replicas", status(object, "replicas"), replicas),
                ("readyReplicas", status(object, "readyReplicas"), replicas),
                ("pods", active_pods(history, text(object, "/metadata/uid")), replicas),
            ],
        ));
    }
    found
}

fn daemon_sets(history: &History) -> Vec<String> {
    let nodes = history.objects("nodes").len() as i64;
    let mut found = Vec::new();
    for (key, object) in each(history, "daemonsets.apps") {
        found.extend(equal(
            "daemon set",
            key,
            &[
                observed(object),
                ("desiredNumberScheduled", status(object, "desiredNumberScheduled"), nodes),
                ("updatedNumberScheduled", status(object, "updatedNumberScheduled"), nodes),
                ("numberAvailable", status(object, "numberAvailable"), nodes),
                ("pods", active_pods(history, text(object, "/metadata/uid")), nodes),
            ],
        ));
    }
    found
}

fn jobs(history: &History) -> Vec<String> {
    let mut found = Vec::new();
    for (key, object) in each(history, "jobs.batch") {
        let over = ["Complete", "Failed"].iter().any(|type_| condition(object, type_) == "True");
        if !over {
            found.push(format!("job {key} is not over: {}", object["status"]));
        }
        let held = each(history, "pods").filter(|(_, pod)| {
            controller(pod).is_some_and(|(_, owner)| owner == text(object, "/metadata/uid"))
        });
        let held = held.filter(|(_, pod)| pod.pointer("/metadata/finalizers").is_some()).count();
        if over && held > 0 {
            found.push(format!("job {key} is over and holds {held} pods"));
        }
        // Counted from a time that a jump of the clock may have put far ahead.
        if over && object.pointer("/spec/ttlSecondsAfterFinished").is_some() {
            found.push(format!("job {key} is over and not deleted yet"));
        }
    }
    found
}

/// Every service leads to exactly the ready pods it selects.
fn endpoints(history: &History) -> Vec<String> {
    let mut found = Vec::new();
    for (key, service) in each(history, "services") {
        let Some(selector) = service.pointer("/spec/selector").and_then(Value::as_object) else { continue };
        let (namespace, name) = key.split_once('/').unwrap_or(("", key));
        let prefix = format!("{namespace}/");
        let selects = |pod: &Value| {
            selector.iter().all(|(label, value)| pod["metadata"]["labels"].get(label) == Some(value))
        };
        let pods = each(history, "pods").filter(|(key, pod)| key.starts_with(&prefix) && selects(pod));
        let ready: BTreeSet<&str> = pods
            .filter(|(_, pod)| condition(pod, "Ready") == "True")
            .map(|(_, pod)| text(pod, "/status/podIP"))
            .collect();
        let mut told: BTreeMap<&str, usize> = BTreeMap::new();
        for (key, slice) in each(history, "endpointslices.discovery.k8s.io") {
            if !key.starts_with(&prefix)
                || text(slice, "/metadata/labels/kubernetes.io~1service-name") != name
            {
                continue;
            }
            for endpoint in slice["endpoints"].as_array().into_iter().flatten() {
                if endpoint["conditions"]["ready"] == true {
                    *told.entry(endpoint["addresses"][0].as_str().unwrap_or_default()).or_default() += 1;
                }
            }
        }
        if ready != told.keys().copied().collect() || told.values().any(|count| *count > 1) {
            found.push(format!("service {key} leads to {told:?}, not {ready:?}"));
        }
    }
    found
}

fn budgets(history: &History) -> Vec<String> {
    let mut found = Vec::new();
    for (key, budget) in each(history, "poddisruptionbudgets.policy") {
        let Some(labels) = budget.pointer("/spec/selector/matchLabels").and_then(Value::as_object) else {
            continue;
        };
        let namespace = key.split_once('/').map_or("", |(namespace, _)| namespace);
        let prefix = format!("{namespace}/");
        let selects = |pod: &Value| {
            labels.iter().all(|(label, value)| pod["metadata"]["labels"].get(label) == Some(value))
        };
        let pods = each(history, "pods")
            .filter(|(key, pod)| key.starts_with(&prefix) && selects(pod) && !is_finished(pod));
        let healthy = pods.filter(|(_, pod)| condition(pod, "Ready") == "True").count() as i64;
        found.extend(equal(
            "budget",
            key,
            &[observed(budget), ("currentHealthy", status(budget, "currentHealthy"), healthy)],
        ));
    }
    found
}

/// Every namespace has its account and its certificate.
fn namespaces_are_furnished(history: &History) -> Vec<String> {
    let names = history.objects("namespaces").keys();
    let missing = names.flat_map(|name| {
        let needed = [
            ("serviceaccounts", format!("{name}/default")),
            ("configmaps", format!("{name}/kube-root-ca.crt")),
        ];
        needed.into_iter().filter(|(partition, key)| history.get(partition, key).is_none())
    });
    missing.map(|(partition, key)| format!("{partition} {key} is missing")).collect()
}
