//! Pods: carrying out what [`life`](crate::life) decides. Pods of nodes that are down, and of nodes that are not
//! simulated, are left alone.

use crate::life::{self, Memory, Now, Place, Step};
use crate::node::Machines;
use crate::profile::{self, Profile};
use crate::seen::SeenPod;
use k8s_openapi::api::core::v1::{Node, ObjectReference};
use knarr_client::{
    Change, Client, Clock, Controller, During, Error, EventType, Informer, ObjectKey, Reconcile, Recorder,
    Requeue, Result, or_none,
};
use kube::api::{Api, DeleteParams, Patch, PatchParams, Preconditions};
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Arc;
use tokio::time::Instant;

const BY_NODE: &str = "simulated-node";

pub struct Pods {
    client: Client,
    clock: Clock,
    recorder: Recorder,
    nodes: Informer<Node>,
    pods: Informer<SeenPod>,
    machines: Arc<Machines>,
    known: Arc<Mutex<HashMap<ObjectKey, Known>>>,
}

/// What is remembered of a pod.
#[derive(Default)]
struct Known {
    uid: String,
    memory: Memory,
    /// The version our last write made: an older one in the cache tells nothing new.
    written: u64,
}

impl Pods {
    pub fn new(
        client: Client,
        clock: Clock,
        recorder: Recorder,
        nodes: Informer<Node>,
        pods: Informer<SeenPod>,
        machines: Arc<Machines>,
    ) -> Self {
        pods.add_index(BY_NODE, |pod| vec![pod.spec.node_name.clone()]);
        let known: Arc<Mutex<HashMap<ObjectKey, Known>>> = Arc::default();
        let (addresses, forgotten) = (machines.clone(), known.clone());
        pods.on_change(move |change| keep_books(&addresses, &forgotten, change));
        Pods { client, clock, recorder, nodes, pods, machines, known }
    }

    /// Adds what wakes the loop: a pod of a simulated node, or its node, changed.
    pub fn wire(&self, controller: Controller) -> Controller {
        let nodes = self.nodes.clone();
        let pods = self.pods.clone();
        controller
            .watch_changes(&self.pods, move |change| {
                let pod = change.object();
                let ours = !change.is_deleted() && nodes.get("", &pod.spec.node_name).is_some();
                ours.then(|| ObjectKey::of(&**pod)).into_iter().collect()
            })
            .watch_changes(&self.nodes, move |change| {
                // Heartbeats are many; only what pods depend on counts.
                let matters = change.old().is_none_or(|old| {
                    let new = change.object();
                    old.metadata.annotations != new.metadata.annotations || range_of(old) != range_of(new)
                });
                let name = change.object().metadata.name.as_deref().unwrap_or_default();
                let pods = if matters { pods.by_index(BY_NODE, name) } else { Vec::new() };
                pods.iter().map(|pod| ObjectKey::of(&**pod)).collect()
            })
    }

    async fn write(&self, key: &ObjectKey, pod: &SeenPod, status: Value) -> Result<()> {
        let patch = json!({ "metadata": { "uid": pod.uid() }, "status": status });
        let api: Api<SeenPod> = Api::namespaced(self.client.clone(), &key.namespace);
        let params = PatchParams::default();
        let written = api.patch_status(&key.name, &params, &Patch::Strategic(patch)).await;
        let written = or_none(written.during(|| format!("write status of pod {key}")));
        match written {
            Ok(Some(pod)) => self.remember(key, pod.uid(), pod.version()),
            // Gone, or another pod of the same name: the watch tells.
            Ok(None) => {}
            Err(error) if is_other_object(&error) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    async fn delete(&self, key: &ObjectKey, pod: &SeenPod) -> Result<()> {
        let preconditions = Preconditions { uid: Some(pod.uid().to_owned()), resource_version: None };
        let params = DeleteParams::default().grace_period(0).preconditions(preconditions);
        let api: Api<SeenPod> = Api::namespaced(self.client.clone(), &key.namespace);
        let deleted = api.delete(&key.name, &params).await.during(|| format!("delete pod {key}"));
        match or_none(deleted) {
            Err(error) if !is_other_object(&error) => Err(error),
            _ => Ok(()),
        }
    }

    fn remember(&self, key: &ObjectKey, uid: &str, version: u64) {
        if let Some(known) = self.known.lock().get_mut(key)
            && known.uid == uid
        {
            known.written = known.written.max(version);
        }
    }

    /// Decides under the lock of what is remembered; `None` when the cache lags behind our own write.
    fn decide(&self, key: &ObjectKey, pod: &SeenPod, node: &Node) -> Option<Step> {
        let always = !matches!(pod.spec.restart_policy.as_str(), "Never" | "OnFailure");
        let annotations = (pod.metadata.annotations.as_ref(), node.metadata.annotations.as_ref());
        let (profile, wrong) = Profile::of(annotations.0, annotations.1, always);
        let node_address = self.machines.address(node)?;
        let pod_address = match life::wants_address(pod) {
            true => self.machines.pods.take(range_of(node)?, pod.uid()),
            false => None,
        };
        let mut all = self.known.lock();
        let known = all.entry(key.clone()).or_default();
        if known.uid != pod.uid() {
            *known = Known { uid: pod.uid().to_owned(), ..Known::default() };
            self.complain(pod, &wrong);
        }
        if pod.version() < known.written {
            return None;
        }
        let now = Now { instant: Instant::now(), wall: self.clock.now() };
        Some(life::step(
            pod,
            &profile,
            &mut known.memory,
            now,
            Place { node_address: &node_address, pod_address },
        ))
    }

    fn complain(&self, pod: &SeenPod, wrong: &[String]) {
        for message in wrong {
            let about = ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Pod".to_owned()),
                namespace: pod.metadata.namespace.clone(),
                name: pod.metadata.name.clone(),
                uid: pod.metadata.uid.clone(),
                ..Default::default()
            };
            self.recorder.event_about(about, EventType::Warning, "InvalidSimulation", message.as_str());
        }
    }
}

impl Reconcile for Pods {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let Some(pod) = self.pods.get_key(&key) else { return Ok(Requeue::Done) };
        let Some(node) = self.nodes.get("", &pod.spec.node_name) else { return Ok(Requeue::Done) };
        if profile::is_down(node.metadata.annotations.as_ref()) {
            return Ok(Requeue::Done);
        }
        if life::wants_address(&pod) && range_of(&node).is_none() {
            // The node's change brings the pod back.
            return Ok(Requeue::Done);
        }
        match self.decide(&key, &pod, &node) {
            None | Some(Step::Rest) => {}
            Some(Step::Wait(time)) => return Ok(Requeue::After(time)),
            Some(Step::Write(status)) => {
                self.machines.ran(&pod);
                self.write(&key, &pod, status).await?;
            }
            Some(Step::Delete) => self.delete(&key, &pod).await?,
        }
        Ok(Requeue::Done)
    }
}

/// Holds and releases addresses, and forgets what is gone.
fn keep_books(machines: &Machines, known: &Mutex<HashMap<ObjectKey, Known>>, change: &Change<SeenPod>) {
    let pod = change.object();
    let address = pod.status.pod_ip.as_str();
    if change.is_deleted() || pod.is_finished() {
        machines.pods.release(address, pod.uid());
    } else if !address.is_empty() && !pod.spec.host_network {
        machines.pods.hold(address, pod.uid());
    }
    if change.is_deleted() {
        let key = ObjectKey::of(&**pod);
        let mut known = known.lock();
        if known.get(&key).is_some_and(|known| known.uid == pod.uid()) {
            known.remove(&key);
        }
    }
}

/// A conflict because the pod is another one by now.
fn is_other_object(error: &Error) -> bool {
    error.is_conflict()
}

pub fn range_of(node: &Node) -> Option<&str> {
    node.spec.as_ref()?.pod_cidr.as_deref().filter(|range| !range.is_empty())
}
