//! Pod GC: deletes pods no kubelet will ever finish: those bound to nodes that are gone, those deleted before they
//! had a node, and ended ones beyond a threshold.

use crate::pods::{self, BY_NODE};
use crate::{Context, util};
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{Node, Pod, PodCondition};
use knarr_client::{
    Controller, During, Informer, ObjectKey, Reconcile, Requeue, Result, ignore_gone, or_none,
};
use kube::api::{Api, DeleteParams, Patch, PatchParams, Preconditions};
use parking_lot::Mutex;
use serde_json::json;
use std::collections::HashMap;
use std::sync::Arc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Index of pods that have ended, under this one value.
const ENDED: &str = "ended";
const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";

pub fn start(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let all_pods = context.informers.get::<Pod>();
    let nodes = context.informers.get::<Node>();
    pods::index_by_node(&all_pods);
    all_pods.add_index(ENDED, |pod| if pods::is_finished(pod) { vec![ENDED.to_owned()] } else { Vec::new() });
    let on_nodes = all_pods.clone();
    let controller = Controller::new("pod-gc")
        .watch_changes(&all_pods, |change| {
            let pod = change.object();
            let mut keys = vec![];
            if !change.is_deleted() {
                keys.push(ObjectKey::of(&**pod));
            }
            let was_ended = change.old().is_some_and(|old| pods::is_finished(old));
            if pods::is_finished(pod) && !was_ended {
                keys.push(threshold_key());
            }
            keys
        })
        .watch_changes(&nodes, move |change| {
            // Heartbeats concern nobody.
            if change.old().is_some_and(|old| is_out_of_service(old) == is_out_of_service(change.object())) {
                return Vec::new();
            }
            let name = change.object().metadata.name.as_deref().unwrap_or_default();
            on_nodes.by_index(BY_NODE, name).iter().map(|pod| ObjectKey::of(&**pod)).collect()
        });
    let this = PodGc { context, pods: all_pods, nodes, missing_since: Mutex::default() };
    Box::pin(controller.run(Arc::new(this), shutdown))
}

/// Stands for the threshold of ended pods; no pod has an empty name.
fn threshold_key() -> ObjectKey {
    ObjectKey::default()
}

struct PodGc {
    context: Context,
    pods: Informer<Pod>,
    nodes: Informer<Node>,
    /// Since when we see pods on a node we do not know, by node.
    missing_since: Mutex<HashMap<String, Instant>>,
}

impl Reconcile for PodGc {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        if key == threshold_key() {
            return self.delete_surplus().await;
        }
        let Some(pod) = self.pods.get_key(&key) else { return Ok(Requeue::Done) };
        let Some(node_name) = pods::node_of(&pod) else {
            if pods::is_terminating(&pod) {
                self.delete(&pod, "PodGC: unscheduled pod is terminating").await?;
            }
            return Ok(Requeue::Done);
        };
        match self.nodes.get("", node_name) {
            Some(node) => {
                self.missing_since.lock().remove(node_name);
                if pods::is_terminating(&pod) && is_out_of_service(&node) {
                    self.delete(&pod, "PodGC: node is out of service").await?;
                }
                Ok(Requeue::Done)
            }
            None => self.orphan(&pod, node_name).await,
        }
    }
}

fn is_out_of_service(node: &Node) -> bool {
    let tainted = node
        .spec
        .iter()
        .flat_map(|spec| spec.taints.iter().flatten())
        .any(|taint| taint.key == OUT_OF_SERVICE);
    let ready = node.status.as_ref().is_some_and(|status| util::is_true(&status.conditions, "Ready"));
    tainted && !ready
}

impl PodGc {
    /// The node is not in the cache. After a while, and after asking the server, its pods go.
    async fn orphan(&self, pod: &Pod, node_name: &str) -> Result<Requeue> {
        let since = *self.missing_since.lock().entry(node_name.to_owned()).or_insert_with(Instant::now);
        let left = self.context.config.orphan_quarantine.saturating_sub(since.elapsed());
        if !left.is_zero() {
            return Ok(Requeue::After(left));
        }
        let nodes: Api<Node> = Api::all(self.context.client.clone());
        let node = or_none(nodes.get(node_name).await.during(|| format!("read node {node_name}")))?;
        if node.is_none() {
            self.delete(pod, "PodGC: node no longer exists").await?;
            if self.pods.count_index(BY_NODE, node_name) <= 1 {
                self.missing_since.lock().remove(node_name);
            }
        }
        Ok(Requeue::Done)
    }

    /// Ended pods beyond the threshold, oldest first.
    async fn delete_surplus(&self) -> Result<Requeue> {
        let threshold = self.context.config.terminated_pod_threshold;
        let threshold = match usize::try_from(threshold) {
            Ok(threshold) if threshold > 0 => threshold,
            _ => return Ok(Requeue::Done),
        };
        if self.pods.count_index(ENDED, ENDED) <= threshold {
            return Ok(Requeue::Done);
        }
        let mut ended = self.pods.by_index(ENDED, ENDED);
        ended.retain(|pod| !pods::is_terminating(pod));
        ended.sort_by_key(|pod| pod.metadata.creation_timestamp.as_ref().map(|time| time.0));
        let surplus = ended.len().saturating_sub(threshold);
        for pod in ended.iter().take(surplus) {
            self.delete(pod, "").await?;
        }
        Ok(Requeue::Done)
    }

    /// Says why in the pod's status, unless it has ended, and removes it at once.
    async fn delete(&self, pod: &Pod, message: &str) -> Result<()> {
        let key = ObjectKey::of(pod);
        let api: Api<Pod> = Api::namespaced(self.context.client.clone(), &key.namespace);
        if !pods::is_finished(pod) {
            let mut status = json!({"phase": "Failed"});
            if pods::node_of(pod).is_some() {
                status["conditions"] = json!([PodCondition {
                    type_: "DisruptionTarget".to_owned(),
                    status: "True".to_owned(),
                    reason: Some("DeletionByPodGC".to_owned()),
                    message: Some(message.to_owned()),
                    last_transition_time: Some(self.context.clock.time()),
                    observed_generation: pod.metadata.generation,
                    ..Default::default()
                }]);
            }
            let change = json!({"metadata": {"uid": pod.metadata.uid}, "status": status});
            let patched =
                api.patch_status(&key.name, &PatchParams::default(), &Patch::Strategic(change)).await;
            ignore_gone(patched.during(|| format!("write status of pod {key}")))?;
        }
        tracing::info!(pod = %key, message, "garbage collecting pod");
        let params = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions { uid: pod.metadata.uid.clone(), resource_version: None }),
            ..Default::default()
        };
        ignore_gone(api.delete(&key.name, &params).await.during(|| format!("delete pod {key}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Config;
    use crate::harness::Harness;
    use knarr_client::testing::Faults;
    use std::time::Duration;

    #[tokio::test(start_paused = true)]
    async fn pods_on_a_vanished_node_go_after_the_quarantine() {
        let harness = Harness::quiet();
        harness.start(start);
        harness.create_global::<Node>(json!({"metadata": {"name": "there"}})).await;
        for node in ["there", "gone"] {
            let pod = json!({"metadata": {"name": node}, "spec": {"containers": [], "nodeName": node}});
            harness.create::<Pod>(pod).await;
        }
        let began = Instant::now();
        let left = harness.api.wait_for::<Pod>("one pod", |pods| pods.len() == 1).await;
        assert_eq!(left[0].metadata.name.as_deref(), Some("there"));
        assert!(began.elapsed() >= Duration::from_secs(40));
        harness.assert_quiet().await;
    }

    #[tokio::test(start_paused = true)]
    async fn ended_pods_beyond_the_threshold_go_oldest_first() {
        let config = Config { terminated_pod_threshold: 2, ..Default::default() };
        let harness = Harness::with_config(0, Faults::default(), config);
        harness.start(start);
        for i in 0..4 {
            let name = format!("p{i}");
            harness.create::<Pod>(json!({"metadata": {"name": name}, "spec": {"containers": []}})).await;
            harness.patch_status::<Pod>(&name, json!({"phase": "Succeeded"})).await;
        }
        harness.api.wait_for::<Pod>("two pods", |pods| pods.len() == 2).await;
        harness.assert_quiet().await;
    }
}
