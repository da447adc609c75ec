//! What kubectl knows of the kinds that run pods: whether a rollout is done, and how it says so.
//!
//! Follows `k8s.io/kubectl/pkg/polymorphichelpers/rollout_status.go`.

use knarr_api::object::Object;
use serde_json::Value;

use crate::error::{Error, Result};

pub const REVISION: &str = "deployment.kubernetes.io/revision";
pub const CHANGE_CAUSE: &str = "kubernetes.io/change-cause";

/// The line to print, and whether the rollout is done.
pub fn rollout_status(kind: &str, object: &Value, revision: i64) -> Result<(String, bool)> {
    match kind {
        "Deployment" => deployment(object, revision),
        "DaemonSet" => daemon_set(object),
        "StatefulSet" => stateful_set(object),
        _ => Err(Error::plain(format!("no status viewer has been implemented for {kind}"))),
    }
}

/// Has the controller seen the newest spec?
fn observed(object: &Value) -> bool {
    object.int_at("metadata.generation").unwrap_or(0)
        <= object.int_at("status.observedGeneration").unwrap_or(0)
}

fn deployment(object: &Value, revision: i64) -> Result<(String, bool)> {
    let name = object.name();
    if revision > 0 {
        let found = annotation(object, REVISION).and_then(|r| r.parse::<i64>().ok());
        if found != Some(revision) {
            return Err(Error::plain(format!(
                "desired revision ({revision}) is different from the running revision ({})",
                found.unwrap_or(0)
            )));
        }
    }
    if !observed(object) {
        return Ok(("Waiting for deployment spec update to be observed...".into(), false));
    }
    let progressing = condition(object, "Progressing");
    if progressing.is_some_and(|c| c.str_at("reason") == "ProgressDeadlineExceeded") {
        return Err(Error::plain(format!("deployment {name:?} exceeded its progress deadline")));
    }
    let count = |path: &str| object.int_at(path).unwrap_or(0);
    let (wanted, replicas) = (object.int_at("spec.replicas").unwrap_or(1), count("status.replicas"));
    let (updated, available) = (count("status.updatedReplicas"), count("status.availableReplicas"));
    let waiting =
        |what: String| Ok((format!("Waiting for deployment {name:?} rollout to finish: {what}..."), false));
    if updated < wanted {
        return waiting(format!("{updated} out of {wanted} new replicas have been updated"));
    }
    if replicas > updated {
        return waiting(format!("{} old replicas are pending termination", replicas - updated));
    }
    if available < updated {
        return waiting(format!("{available} of {updated} updated replicas are available"));
    }
    Ok((format!("deployment {name:?} successfully rolled out"), true))
}

fn daemon_set(object: &Value) -> Result<(String, bool)> {
    only_rolling(object)?;
    let name = object.name();
    if !observed(object) {
        return Ok(("Waiting for daemon set spec update to be observed...".into(), false));
    }
    let count = |path: &str| object.int_at(path).unwrap_or(0);
    let desired = count("status.desiredNumberScheduled");
    let (updated, available) = (count("status.updatedNumberScheduled"), count("status.numberAvailable"));
    let waiting =
        |what: String| Ok((format!("Waiting for daemon set {name:?} rollout to finish: {what}..."), false));
    if updated < desired {
        return waiting(format!("{updated} out of {desired} new pods have been updated"));
    }
    if available < desired {
        return waiting(format!("{available} of {desired} updated pods are available"));
    }
    Ok((format!("daemon set {name:?} successfully rolled out"), true))
}

/// Nobody knows when a user will delete the rest of the old pods.
fn only_rolling(object: &Value) -> Result<()> {
    match object.str_at("spec.updateStrategy.type") {
        "OnDelete" => Err(Error::plain("rollout status is only available for RollingUpdate strategy type")),
        _ => Ok(()),
    }
}

fn stateful_set(object: &Value) -> Result<(String, bool)> {
    only_rolling(object)?;
    if !observed(object) {
        return Ok(("Waiting for statefulset spec update to be observed...".into(), false));
    }
    let count = |path: &str| object.int_at(path).unwrap_or(0);
    let wanted = object.int_at("spec.replicas").unwrap_or(1);
    let (ready, updated) = (count("status.readyReplicas"), count("status.updatedReplicas"));
    if ready < wanted {
        return Ok((format!("Waiting for {} pods to be ready...", wanted - ready), false));
    }
    if let Some(partition) = object.int_at("spec.updateStrategy.rollingUpdate.partition").filter(|p| *p > 0) {
        if updated < wanted - partition {
            let goal = wanted - partition;
            return Ok((
                format!(
                    "Waiting for partitioned roll out to finish: {updated} out of {goal} new pods have been updated..."
                ),
                false,
            ));
        }
        return Ok((format!("partitioned roll out complete: {updated} new pods have been updated..."), true));
    }
    let revision = object.str_at("status.updateRevision");
    if revision != object.str_at("status.currentRevision") {
        return Ok((
            format!(
                "waiting for statefulset rolling update to complete {updated} pods at revision {revision}..."
            ),
            false,
        ));
    }
    Ok((
        format!(
            "statefulset rolling update complete {} pods at revision {revision}...",
            count("status.currentReplicas")
        ),
        true,
    ))
}

/// The condition of this type.
pub fn condition<'o>(object: &'o Value, kind: &str) -> Option<&'o Value> {
    object.list_at("status.conditions").iter().find(|c| c.str_at("type") == kind)
}

/// An annotation; its key holds dots, so it is no path.
pub fn annotation<'o>(object: &'o Value, key: &str) -> Option<&'o str> {
    object.map_at("metadata.annotations")?.get(key)?.as_str()
}

/// Is the object owned by one with this uid, as its controller?
pub fn controlled_by(object: &Value, uid: &str) -> bool {
    object
        .list_at("metadata.ownerReferences")
        .iter()
        .any(|o| o.bool_at("controller") && o.uid() == uid || o.str_at("uid") == uid)
}

/// The selector of a workload or service as a query: `a=b,c in (d)`.
pub fn selector_text(selector: Option<&Value>) -> String {
    let Some(selector) = selector else { return String::new() };
    let structured = selector.get("matchLabels").is_some() || selector.get("matchExpressions").is_some();
    let labels = if structured { selector.map_at("matchLabels") } else { selector.as_object() };
    let mut terms: Vec<String> = labels
        .into_iter()
        .flatten()
        .map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or_default()))
        .collect();
    for expression in selector.list_at("matchExpressions") {
        let key = expression.str_at("key");
        let values: Vec<&str> = expression.list_at("values").iter().filter_map(Value::as_str).collect();
        let values = values.join(",");
        terms.push(match expression.str_at("operator") {
            "In" => format!("{key} in ({values})"),
            "NotIn" => format!("{key} notin ({values})"),
            "Exists" => key.to_owned(),
            _ => format!("!{key}"),
        });
    }
    terms.join(",")
}

/// Where the pod template or pod spec of a workload lies: `spec.template.spec`, `spec`.
pub fn pod_spec_path(kind: &str) -> Result<&'static str> {
    match kind {
        "Pod" => Ok("spec"),
        "CronJob" => Ok("spec.jobTemplate.spec.template.spec"),
        "Deployment" | "ReplicaSet" | "DaemonSet" | "StatefulSet" | "Job" | "ReplicationController" => {
            Ok("spec.template.spec")
        }
        _ => Err(Error::plain(format!("{kind} has no pod template"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn rollout_status_reads_as_upstream_prints_it() {
        let deploy = |spec: i64, replicas: i64, updated: i64, available: i64| {
            json!({"metadata":{"name":"web","generation":2},"spec":{"replicas":spec},"status":{"observedGeneration":2,
                "replicas":replicas,"updatedReplicas":updated,"availableReplicas":available}})
        };
        let mut unseen = deploy(1, 1, 1, 1);
        unseen.set_at("status.observedGeneration", 1);
        for (kind, object, line, done) in [
            ("Deployment", unseen, "Waiting for deployment spec update to be observed...", false),
            (
                "Deployment",
                deploy(3, 3, 1, 3),
                "Waiting for deployment \"web\" rollout to finish: 1 out of 3 new replicas have been updated...",
                false,
            ),
            (
                "Deployment",
                deploy(3, 4, 3, 3),
                "Waiting for deployment \"web\" rollout to finish: 1 old replicas are pending termination...",
                false,
            ),
            (
                "Deployment",
                deploy(3, 3, 3, 2),
                "Waiting for deployment \"web\" rollout to finish: 2 of 3 updated replicas are available...",
                false,
            ),
            ("Deployment", deploy(3, 3, 3, 3), "deployment \"web\" successfully rolled out", true),
            (
                "DaemonSet",
                json!({"metadata":{"name":"d"},"status":{"desiredNumberScheduled":2,"updatedNumberScheduled":1}}),
                "Waiting for daemon set \"d\" rollout to finish: 1 out of 2 new pods have been updated...",
                false,
            ),
            (
                "DaemonSet",
                json!({"metadata":{"name":"d"},"status":{"desiredNumberScheduled":1,"updatedNumberScheduled":1,"numberAvailable":1}}),
                "daemon set \"d\" successfully rolled out",
                true,
            ),
            (
                "StatefulSet",
                json!({"metadata":{"name":"s"},"spec":{"replicas":2},"status":{"readyReplicas":1}}),
                "Waiting for 1 pods to be ready...",
                false,
            ),
        ] {
            assert_eq!(rollout_status(kind, &object, 0).expect("has a status"), (line.to_owned(), done));
        }
    }

    #[test]
    fn a_missed_deadline_is_an_error() {
        let object = json!({"metadata":{"name":"web"},"status":{"conditions":[{"type":"Progressing","reason":"ProgressDeadlineExceeded"}]}});
        let error = rollout_status("Deployment", &object, 0).expect_err("too late");
        assert_eq!(error.to_string(), "error: deployment \"web\" exceeded its progress deadline");
    }

    #[test]
    fn what_only_users_replace_has_no_status_to_wait_for() {
        let object = json!({"metadata":{"name":"agent"},"spec":{"updateStrategy":{"type":"OnDelete"}}});
        for kind in ["DaemonSet", "StatefulSet"] {
            let error = rollout_status(kind, &object, 0).expect_err("it might never end");
            assert!(error.to_string().ends_with("only available for RollingUpdate strategy type"), "{error}");
        }
    }

    #[test]
    fn selectors_become_queries() {
        for (selector, text) in [
            (json!({"app":"web","x":"y"}), "app=web,x=y"),
            (
                json!({"matchLabels":{"app":"web"},"matchExpressions":[{"key":"t","operator":"In","values":["a","b"]},{"key":"g","operator":"DoesNotExist"}]}),
                "app=web,t in (a,b),!g",
            ),
        ] {
            assert_eq!(selector_text(Some(&selector)), text);
        }
    }
}
