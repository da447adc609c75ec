//! What loops share about pods: whether they count, are ready or available; creating and deleting them with the
//! events upstream records; which of several to delete first.

use crate::util::find;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use knarr_client::{Client, During, Error, EventType, Informer, ObjectKey, Recorder, Result};
use kube::Resource;
use kube::api::{Api, DeleteParams, PostParams, Preconditions};
use std::cmp::Ordering;
use std::sync::Arc;
use std::time::Duration;

/// Pods by the uid of their controller; those without one under [`orphans_of`] their namespace.
pub const BY_CONTROLLER: &str = "controller";
/// Pods by node name.
pub const BY_NODE: &str = "node";
/// Lets users say which replicas to give up first.
const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";

/// Adds [`BY_CONTROLLER`].
pub fn index_by_controller<K: knarr_client::informer::Cached>(informer: &Informer<K>) {
    informer.add_index(BY_CONTROLLER, |object| {
        let meta = object.meta();
        vec![match knarr_client::owner::controller_of(meta) {
            Some(reference) => reference.uid.clone(),
            None => orphans_of(meta.namespace.as_deref().unwrap_or_default()),
        }]
    });
}

/// The value of [`BY_CONTROLLER`] for objects of `namespace` that nobody controls.
pub fn orphans_of(namespace: &str) -> String {
    format!("orphans/{namespace}")
}

/// Adds [`BY_NODE`]; pods without a node are not in it.
pub fn index_by_node(pods: &Informer<Pod>) {
    pods.add_index(BY_NODE, |pod| node_of(pod).map(str::to_owned).into_iter().collect());
}

/// The node the pod is bound to.
pub fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref().filter(|name| !name.is_empty())
}

pub fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

/// Its containers have ended for good.
pub fn is_finished(pod: &Pod) -> bool {
    matches!(phase(pod), "Succeeded" | "Failed")
}

pub fn is_terminating(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some()
}

/// It runs or will run: what replica counts are about.
pub fn is_active(pod: &Pod) -> bool {
    !is_finished(pod) && !is_terminating(pod)
}

pub fn is_ready(pod: &Pod) -> bool {
    ready_since(pod).is_some()
}

/// Since when the pod is ready; `None` when it is not. A ready condition without a time counts from the beginning.
pub fn ready_since(pod: &Pod) -> Option<Timestamp> {
    let status = pod.status.as_ref()?;
    let ready = find(&status.conditions, "Ready").filter(|condition| condition.status == "True")?;
    Some(ready.last_transition_time.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0))
}

/// When a ready pod becomes available: ready for `min_ready` without a break. `None` when it is not ready.
pub fn available_at(pod: &Pod, min_ready_s: i32) -> Option<Timestamp> {
    let since = ready_since(pod)?;
    Some(since.saturating_add(SignedDuration::from_secs(min_ready_s.into())).unwrap_or(Timestamp::MAX))
}

pub fn is_available(pod: &Pod, min_ready_s: i32, now: Timestamp) -> bool {
    available_at(pod, min_ready_s).is_some_and(|at| at <= now)
}

/// How long until the next of `pods` that is ready becomes available.
pub fn next_available(pods: &[Arc<Pod>], min_ready_s: i32, now: Timestamp) -> Option<Duration> {
    let waits = pods.iter().filter_map(|pod| available_at(pod, min_ready_s)).filter(|at| *at > now);
    waits.min().and_then(|at| Duration::try_from(at.duration_since(now)).ok())
}

pub fn uid(meta: &ObjectMeta) -> &str {
    meta.uid.as_deref().unwrap_or_default()
}

/// A pod of `template` for `owner`, named by the server.
pub fn from_template(template: &PodTemplateSpec, owner: &ObjectMeta, reference: OwnerReference) -> Pod {
    let meta = template.metadata.clone().unwrap_or_default();
    Pod {
        metadata: ObjectMeta {
            namespace: owner.namespace.clone(),
            generate_name: Some(format!("{}-", owner.name.as_deref().unwrap_or_default())),
            labels: meta.labels,
            annotations: meta.annotations,
            finalizers: meta.finalizers,
            owner_references: Some(vec![reference]),
            ..Default::default()
        },
        spec: template.spec.clone(),
        status: None,
    }
}

/// How events are worded: StatefulSets have words of their own.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Voice {
    Plain,
    StatefulSet,
}

impl Voice {
    fn done(self, past: &str, verb: &str, pod: &str, owner: &str) -> String {
        match self {
            Voice::Plain => format!("{past} pod: {pod}"),
            Voice::StatefulSet => format!("{verb} Pod {pod} in StatefulSet {owner} successful"),
        }
    }

    fn failed(self, trying: &str, verb: &str, pod: &str, owner: &str, why: &str) -> String {
        match self {
            Voice::Plain => format!("Error {trying}: {why}"),
            Voice::StatefulSet => format!("{verb} Pod {pod} in StatefulSet {owner} failed error: {why}"),
        }
    }
}

/// Creates and deletes pods on behalf of owners and tells of it in events.
#[derive(Clone)]
pub struct PodControl {
    client: Client,
    recorder: Recorder,
    voice: Voice,
}

impl PodControl {
    pub fn new(client: Client, recorder: Recorder) -> Self {
        PodControl { client, recorder, voice: Voice::Plain }
    }

    /// The same with other words.
    pub fn speaking(self, voice: Voice) -> Self {
        PodControl { voice, ..self }
    }

    fn api(&self, namespace: &Option<String>) -> Api<Pod> {
        Api::namespaced(self.client.clone(), namespace.as_deref().unwrap_or_default())
    }

    /// Creates `pod` for `owner`.
    pub async fn create<K: Resource<DynamicType = ()>>(&self, owner: &K, pod: &Pod) -> Result<Pod> {
        let owner_key = ObjectKey::of(owner);
        let created = self.api(&owner.meta().namespace).create(&PostParams::default(), pod).await;
        let created = created.during(|| format!("create pod for {owner_key}"));
        match &created {
            Ok(pod) => {
                let name = pod.metadata.name.as_deref().unwrap_or_default();
                let message = self.voice.done("Created", "create", name, &owner_key.name);
                self.recorder.event(owner, EventType::Normal, "SuccessfulCreate", message);
            }
            Err(error) if error.is_namespace_terminating() || error.is_already_exists() => {}
            Err(error) => {
                let (name, why) = (pod.metadata.name.as_deref().unwrap_or_default(), message_of(error));
                let message = self.voice.failed("creating", "create", name, &owner_key.name, &why);
                self.recorder.event(owner, EventType::Warning, "FailedCreate", message);
            }
        }
        created
    }

    /// Deletes `pod` of `owner`; a pod that is gone already counts as deleted.
    pub async fn delete<K: Resource<DynamicType = ()>>(&self, owner: &K, pod: &Pod) -> Result<()> {
        let (name, owner_name) =
            (pod.metadata.name.as_deref().unwrap_or_default(), ObjectKey::of(owner).name);
        let params = DeleteParams {
            preconditions: Some(Preconditions { uid: pod.metadata.uid.clone(), resource_version: None }),
            ..Default::default()
        };
        let deleted = self.api(&pod.metadata.namespace).delete(name, &params).await;
        match deleted.during(|| format!("delete pod {}", ObjectKey::of(pod))) {
            Ok(_) => {
                let message = self.voice.done("Deleted", "delete", name, &owner_name);
                self.recorder.event(owner, EventType::Normal, "SuccessfulDelete", message);
                Ok(())
            }
            // Gone, or another pod has the name now.
            Err(error) if error.is_not_found() || error.is_conflict() => Ok(()),
            Err(error) => {
                let message = self.voice.failed("deleting", "delete", name, &owner_name, &message_of(&error));
                self.recorder.event(owner, EventType::Warning, "FailedDelete", message);
                Err(error)
            }
        }
    }
}

/// What the server said, without our context: the text upstream puts into events and conditions.
pub fn message_of(error: &Error) -> String {
    match error.status() {
        Some(status) => status.message.clone(),
        None => error.to_string(),
    }
}

/// Puts those pods first that are best given up: upstream's order (`ActivePodsWithRanks`). `rank` counts the pods
/// of the same family on a pod's node.
pub fn rank_for_deletion(pods: &mut [Arc<Pod>], now: Timestamp, rank: impl Fn(&Pod) -> usize) {
    pods.sort_by(|a, b| {
        let by = |order: Ordering, next: &dyn Fn() -> Ordering| order.then_with(next);
        let unbound_first = node_of(a).is_some().cmp(&node_of(b).is_some());
        by(unbound_first, &|| phase_order(a).cmp(&phase_order(b)))
            .then_with(|| is_ready(a).cmp(&is_ready(b)))
            .then_with(|| deletion_cost(a).cmp(&deletion_cost(b)))
            .then_with(|| rank(b).cmp(&rank(a)))
            .then_with(|| ready_bucket(a, now).cmp(&ready_bucket(b, now)))
            .then_with(|| restarts(b).cmp(&restarts(a)))
            .then_with(|| created_bucket(a, now).cmp(&created_bucket(b, now)))
            .then_with(|| uid(&a.metadata).cmp(uid(&b.metadata)))
    });
}

fn phase_order(pod: &Pod) -> u8 {
    match phase(pod) {
        "Running" => 2,
        "Unknown" => 1,
        _ => 0,
    }
}

fn deletion_cost(pod: &Pod) -> i32 {
    let cost = pod.metadata.annotations.as_ref().and_then(|annotations| annotations.get(DELETION_COST));
    cost.and_then(|cost| cost.parse().ok()).unwrap_or(0)
}

/// Ages are compared by their logarithm, so that of pods of about the same age it is not always the youngest that
/// goes (upstream's `LogarithmicScaleDown`).
fn age_bucket(since: Timestamp, now: Timestamp) -> u32 {
    let age_ns = now.duration_since(since).as_nanos().max(0);
    (age_ns as u128).checked_ilog2().map_or(0, |log| log + 1)
}

fn ready_bucket(pod: &Pod, now: Timestamp) -> u32 {
    ready_since(pod).map_or(0, |since| age_bucket(since, now))
}

fn created_bucket(pod: &Pod, now: Timestamp) -> u32 {
    pod.metadata.creation_timestamp.as_ref().map_or(0, |time| age_bucket(time.0, now))
}

fn restarts(pod: &Pod) -> i32 {
    let statuses = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref());
    statuses.into_iter().flatten().map(|status| status.restart_count).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn pod(name: &str, node: &str, ready: bool, cost: &str) -> Arc<Pod> {
        let conditions: Vec<Value> =
            if ready { vec![json!({"type": "Ready", "status": "True"})] } else { vec![] };
        let pod = json!({
            "metadata": {"name": name, "uid": name, "annotations": {DELETION_COST: cost}},
            "spec": {"containers": [], "nodeName": node},
            "status": {"phase": "Running", "conditions": conditions},
        });
        Arc::new(serde_json::from_value(pod).unwrap())
    }

    #[test]
    fn unbound_unready_cheap_and_crowded_pods_go_first() {
        let mut pods = vec![
            pod("crowd", "n1", true, "0"),
            pod("lone", "n2", true, "0"),
            pod("dear", "n1", true, "5"),
            pod("unready", "n1", false, "9"),
            pod("unbound", "", false, "9"),
        ];
        rank_for_deletion(&mut pods, Timestamp::now(), |pod| if node_of(pod) == Some("n1") { 3 } else { 1 });
        let names: Vec<_> = pods.iter().map(|pod| pod.metadata.name.as_deref().unwrap()).collect();
        assert_eq!(names, ["unbound", "unready", "crowd", "lone", "dear"]);
    }
}
