//! Taint eviction: deletes pods from nodes with `NoExecute` taints, at once or after the time they tolerate them.

use super::NO_EXECUTE;
use crate::Context;
use crate::pods::{self, BY_NODE};
use futures::future::BoxFuture;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Node, Pod, Taint, Toleration};
use knarr_client::{
    Controller, During, EventType, Informer, ObjectKey, Reconcile, Recorder, Requeue, Result, ignore_gone,
    placement,
};
use kube::api::{Api, DeleteParams, Patch, PatchParams, Preconditions};
use parking_lot::Mutex;
use serde_json::json;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

pub fn start_eviction(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let nodes = context.informers.get::<Node>();
    let all_pods = context.informers.get::<Pod>();
    pods::index_by_node(&all_pods);
    let on_nodes = all_pods.clone();
    let controller = Controller::new("taint-eviction")
        .watch_changes(&nodes, move |change| {
            let taints = |node: &Node| no_execute(node);
            if change.old().is_some_and(|old| taints(old) == taints(change.object())) {
                return Vec::new();
            }
            let name = change.object().metadata.name.as_deref().unwrap_or_default();
            on_nodes.by_index(BY_NODE, name).iter().map(|pod| ObjectKey::of(&**pod)).collect()
        })
        .watch(&all_pods);
    let recorder = context.recorder.for_component("taint-eviction-controller");
    let this = Eviction { context, recorder, nodes, pods: all_pods, scheduled: Mutex::default() };
    Box::pin(controller.run(Arc::new(this), shutdown))
}

fn no_execute(node: &Node) -> Vec<Taint> {
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    taints.filter(|taint| taint.effect == NO_EXECUTE).cloned().collect()
}

struct Eviction {
    context: Context,
    recorder: Recorder,
    nodes: Informer<Node>,
    pods: Informer<Pod>,
    /// Pods (by uid) that will be deleted, and since when they sit on a tainted node: for taints that do not say when
    /// they were added.
    scheduled: Mutex<HashMap<ObjectKey, (String, Timestamp)>>,
}

impl Reconcile for Eviction {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let Some(pod) = self.pods.get_key(&key).filter(|pod| !pods::is_terminating(pod)) else {
            self.scheduled.lock().remove(&key);
            return Ok(Requeue::Done);
        };
        let node = pods::node_of(&pod).and_then(|name| self.nodes.get("", name));
        let taints = node.map(|node| no_execute(&node)).unwrap_or_default();
        if taints.is_empty() || pods::is_finished(&pod) {
            self.cancel(&key, &pod);
            return Ok(Requeue::Done);
        }
        let now = self.context.clock.now();
        match patience(&pod, &taints) {
            Patience::Endless => {
                self.cancel(&key, &pod);
                Ok(Requeue::Done)
            }
            Patience::None => self.evict(&key, &pod).await,
            Patience::For(tolerated) => {
                let since = self.since(&key, &pod, &taints, now);
                let due = since.saturating_add(tolerated).unwrap_or(Timestamp::MAX);
                match Duration::try_from(due.duration_since(now)) {
                    Ok(left) if !left.is_zero() => Ok(Requeue::After(left)),
                    _ => self.evict(&key, &pod).await,
                }
            }
        }
    }
}

/// How long a pod bears a node's taints.
enum Patience {
    None,
    For(SignedDuration),
    Endless,
}

/// All taints must be tolerated; of the tolerations used the shortest time counts.
fn patience(pod: &Pod, taints: &[Taint]) -> Patience {
    let tolerations = pod.spec.as_ref().and_then(|spec| spec.tolerations.clone()).unwrap_or_default();
    if taints.iter().any(|taint| !placement::tolerates(Some(&tolerations), taint)) {
        return Patience::None;
    }
    let used = |toleration: &&Toleration| taints.iter().any(|taint| placement::covers(toleration, taint));
    let times = tolerations.iter().filter(used).filter_map(|toleration| toleration.toleration_seconds);
    match times.min() {
        None => Patience::Endless,
        Some(..=0) => Patience::None,
        Some(seconds) => Patience::For(SignedDuration::from_secs(seconds)),
    }
}

impl Eviction {
    /// When the pod's patience began: when the last taint was added, if the taints say so; else when we first saw it.
    /// So a restart of ours does not start the time again.
    fn since(&self, key: &ObjectKey, pod: &Pod, taints: &[Taint], now: Timestamp) -> Timestamp {
        let uid = pods::uid(&pod.metadata);
        let mut scheduled = self.scheduled.lock();
        if let Some((known, since)) = scheduled.get(key).filter(|(known, _)| known == uid) {
            let _ = known;
            return *since;
        }
        let added: Option<Vec<Timestamp>> =
            taints.iter().map(|taint| taint.time_added.as_ref().map(|time| time.0)).collect();
        let bound = pod.status.as_ref().and_then(|status| status.start_time.as_ref()).map(|time| time.0);
        let since = added.and_then(|added| added.into_iter().chain(bound).max()).unwrap_or(now);
        scheduled.insert(key.clone(), (uid.to_owned(), since));
        since
    }

    fn cancel(&self, key: &ObjectKey, pod: &Pod) {
        if self.scheduled.lock().remove(key).is_some() {
            let message = format!("Cancelling deletion of Pod {key}");
            self.recorder.event(pod, EventType::Normal, "TaintManagerEviction", message);
        }
    }

    async fn evict(&self, key: &ObjectKey, pod: &Pod) -> Result<Requeue> {
        let message = format!("Marking for deletion Pod {key}");
        self.recorder.event(pod, EventType::Normal, "TaintManagerEviction", message);
        let api: Api<Pod> = Api::namespaced(self.context.client.clone(), &key.namespace);
        let condition = json!({
            "type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager",
            "message": "Taint manager: deleting due to NoExecute taint",
            "lastTransitionTime": self.context.clock.time(), "observedGeneration": pod.metadata.generation,
        });
        let change = json!({"metadata": {"uid": pod.metadata.uid}, "status": {"conditions": [condition]}});
        let patched = api.patch_status(&key.name, &PatchParams::default(), &Patch::Strategic(change)).await;
        ignore_gone(patched.during(|| format!("write condition of pod {key}")))?;
        let params = DeleteParams {
            preconditions: Some(Preconditions { uid: pod.metadata.uid.clone(), resource_version: None }),
            ..Default::default()
        };
        ignore_gone(api.delete(&key.name, &params).await.during(|| format!("evict pod {key}")))?;
        self.scheduled.lock().remove(key);
        Ok(Requeue::Done)
    }
}
