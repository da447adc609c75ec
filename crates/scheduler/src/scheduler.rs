//! The wiring: watches feed table and queue; one task decides pod after pod; binding, events and conditions happen in
//! the background. Lock order: there is one lock, and no I/O happens under it.

use crate::cycle::{Decision, decide};
use crate::plugins::{ClusterEvent, PLUGINS};
use crate::pod::PodInfo;
use crate::queue::Queue;
use crate::table::NodeTable;
use k8s_openapi::api::core::v1::{Binding, Node, ObjectReference, Pod, PodCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use knarr_client::{
    Change, Client, Clock, During, Error, EventType, Informer, Informers, ObjectKey, Recorder, Result,
    ignore_gone,
};
use kube::api::{Api, Patch, PatchParams, PostParams};
use parking_lot::Mutex;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use serde_json::json;
use std::sync::Arc;
use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// The scheduler of pods that name none.
pub const DEFAULT_NAME: &str = "default-scheduler";
/// Bindings and explanations under way at most; then deciding waits.
const WRITES_MAX: usize = 100;

/// A scheduler. [`Scheduler::new`] starts its watches, [`Scheduler::run`] decides.
pub struct Scheduler {
    shared: Arc<Shared>,
    pods: Informer<Pod>,
    nodes: Informer<Node>,
}

struct Shared {
    name: String,
    client: Client,
    clock: Clock,
    recorder: Recorder,
    state: Mutex<State>,
    changed: Notify,
}

struct State {
    table: NodeTable,
    queue: Queue,
    /// Where the last cycle stopped looking for nodes.
    start: usize,
    random: SmallRng,
}

impl Scheduler {
    /// A scheduler for pods whose `schedulerName` is `name`. `informers` should be shared with what else runs in the
    /// process; `seed` decides ties.
    pub fn new(name: &str, informers: &Informers, recorder: &Recorder, clock: Clock, seed: u64) -> Self {
        let state = State {
            table: NodeTable::new(),
            queue: Queue::default(),
            start: 0,
            random: SmallRng::seed_from_u64(seed),
        };
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            client: informers.client(),
            clock,
            recorder: recorder.for_component(name),
            state: Mutex::new(state),
            changed: Notify::new(),
        });
        let (pods, nodes) = (informers.get::<Pod>(), informers.get::<Node>());
        let observer = shared.clone();
        nodes.on_change(move |change| observer.node_changed(change));
        let observer = shared.clone();
        pods.on_change(move |change| observer.pod_changed(change));
        Scheduler { shared, pods, nodes }
    }

    /// The default scheduler with everything of its own: what `knarr server` runs.
    pub async fn run_default(client: Client, shutdown: CancellationToken) {
        let informers = Informers::new(client.clone());
        let recorder = Recorder::new(client, Clock::System, DEFAULT_NAME, "");
        Scheduler::new(DEFAULT_NAME, &informers, &recorder, Clock::System, rand::random())
            .run(shutdown)
            .await;
    }

    /// Decides until `shutdown`; starts when pods and nodes are known.
    pub async fn run(self, shutdown: CancellationToken) {
        let Scheduler { shared, pods, nodes } = self;
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = futures::future::join(pods.wait_synced(), nodes.wait_synced()) => {}
        }
        let writes = Arc::new(Semaphore::new(WRITES_MAX));
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = shared.step(&pods, &writes) => {}
            }
        }
    }
}

/// What a decision leads to.
enum Outcome {
    Bind(Arc<PodInfo>, String),
    Explain(Arc<PodInfo>, String),
}

impl Shared {
    /// Decides one pod, or waits until there may be one.
    async fn step(self: &Arc<Self>, pods: &Informer<Pod>, writes: &Arc<Semaphore>) {
        let permit = writes.clone().acquire_owned().await.expect("the semaphore is never closed");
        let changed = self.changed.notified();
        let (outcome, deadline) = {
            let mut state = self.state.lock();
            (state.decide_next(Instant::now()), state.queue.next_deadline())
        };
        match outcome {
            Some(outcome) => {
                let (this, pods) = (self.clone(), pods.clone());
                tokio::spawn(async move {
                    this.carry_out(outcome, &pods).await;
                    drop(permit);
                });
                // Watches and writes get their turn between decisions.
                tokio::task::yield_now().await;
            }
            None => match deadline {
                Some(deadline) => tokio::select! {
                    () = changed => {}
                    () = tokio::time::sleep_until(deadline) => {}
                },
                None => changed.await,
            },
        }
    }

    async fn carry_out(&self, outcome: Outcome, pods: &Informer<Pod>) {
        match outcome {
            Outcome::Bind(pod, node) => match self.bind(&pod, &node).await {
                Ok(()) => {
                    let key = &pod.key;
                    let message = format!("Successfully assigned {key} to {node}");
                    self.recorder.event(&*pod.pod, EventType::Normal, "Scheduled", message);
                    self.state.lock().queue.remove(key);
                }
                Err(error) => self.undo(&pod, pods, &error).await,
            },
            Outcome::Explain(pod, message) => self.explain(&pod, "Unschedulable", &message).await,
        }
    }

    async fn bind(&self, pod: &PodInfo, node: &str) -> Result<()> {
        let binding = Binding {
            metadata: ObjectMeta {
                name: Some(pod.key.name.clone()),
                namespace: Some(pod.key.namespace.clone()),
                uid: pod.pod.metadata.uid.clone(),
                ..Default::default()
            },
            target: ObjectReference {
                kind: Some("Node".to_owned()),
                name: Some(node.to_owned()),
                ..Default::default()
            },
        };
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &pod.key.namespace);
        api.create_subresource::<_, serde_json::Value>(
            "binding",
            &pod.key.name,
            &PostParams::default(),
            &binding,
        )
        .await
        .during(|| format!("bind pod {} to node {node}", pod.key))?;
        Ok(())
    }

    /// The pod was assumed on a node but not bound: forget that and try again later.
    async fn undo(&self, pod: &PodInfo, pods: &Informer<Pod>, error: &Error) {
        tracing::debug!(pod = %pod.key, %error, "binding failed");
        let waiting = pods
            .get_key(&pod.key)
            .filter(|known| node_of(known).is_none() && known.metadata.uid == pod.pod.metadata.uid);
        {
            let mut state = self.state.lock();
            match &waiting {
                Some(_) => {
                    state.table.remove_pod(&pod.key);
                    state.queue.retry(&pod.key, Instant::now());
                }
                // Bound by someone else, or gone: the watch has told the table already.
                None => state.queue.remove(&pod.key),
            }
            state.queue.wake(&ClusterEvent { pod_removed: true, ..Default::default() }, Instant::now());
        }
        self.changed.notify_one();
        if waiting.is_some() && !error.is_not_found() && !error.is_conflict() {
            self.explain(pod, "SchedulerError", &error.to_string()).await;
        }
    }

    /// Tells why the pod has no node: an event and the PodScheduled condition.
    async fn explain(&self, pod: &PodInfo, reason: &str, message: &str) {
        self.recorder.event(&*pod.pod, EventType::Warning, "FailedScheduling", message);
        let Some(condition) = self.condition(&pod.pod, reason, message) else { return };
        let patch = json!({"metadata": {"uid": pod.pod.metadata.uid}, "status": {"conditions": [condition]}});
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &pod.key.namespace);
        // Strategic: conditions of others, merged by type, stay.
        let patched =
            api.patch_status(&pod.key.name, &PatchParams::default(), &Patch::Strategic(patch)).await;
        if let Err(error) = ignore_gone(patched.during(|| format!("write condition of pod {}", pod.key))) {
            tracing::debug!(pod = %pod.key, %error, "condition not written");
        }
    }

    /// `None` when the pod says so already.
    fn condition(&self, pod: &Pod, reason: &str, message: &str) -> Option<PodCondition> {
        let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
        let old = conditions.into_iter().flatten().find(|condition| condition.type_ == "PodScheduled");
        let since = old.filter(|old| old.status == "False").and_then(|old| old.last_transition_time.clone());
        let new = PodCondition {
            type_: "PodScheduled".to_owned(),
            status: "False".to_owned(),
            reason: Some(reason.to_owned()),
            message: Some(message.to_owned()),
            last_transition_time: since.or_else(|| Some(self.clock.time())),
            observed_generation: pod.metadata.generation,
            ..Default::default()
        };
        (old != Some(&new)).then_some(new)
    }

    fn node_changed(&self, change: &Change<Node>) {
        let now = Instant::now();
        let mut state = self.state.lock();
        match change {
            Change::Deleted(node) => {
                state.table.remove_node(node.metadata.name.as_deref().unwrap_or_default());
                // Fewer domains can even satisfy a spread constraint.
                state.queue.wake(&ClusterEvent { node_labels: true, ..Default::default() }, now);
            }
            Change::Added(node) => {
                state.table.set_node(node.clone());
                state.queue.wake(&ClusterEvent { node_added: true, ..Default::default() }, now);
            }
            Change::Updated { old, new } => {
                let event = difference(old, new);
                state.table.set_node(new.clone());
                state.queue.wake(&event, now);
            }
        }
        drop(state);
        self.changed.notify_one();
    }

    fn pod_changed(&self, change: &Change<Pod>) {
        let pod = change.object();
        let gone = change.is_deleted() || is_finished(pod);
        let mut state = self.state.lock();
        match node_of(pod) {
            _ if gone => state.pod_gone(&ObjectKey::of(&**pod)),
            Some(node) => state.pod_bound(node, change),
            None => state.pod_waits(&self.name, change),
        }
        drop(state);
        self.changed.notify_one();
    }
}

impl State {
    fn decide_next(&mut self, now: Instant) -> Option<Outcome> {
        let pod = self.queue.pop(now)?;
        match decide(&pod, &self.table, &mut self.start, &mut self.random) {
            Decision::Node(node) => {
                self.table.add_pod(&node, pod.clone());
                // Pods that want to be near this one may have their chance now.
                self.queue.wake(&ClusterEvent { pod_added: true, ..Default::default() }, now);
                Some(Outcome::Bind(pod, node))
            }
            Decision::Unschedulable { message, rejected_by } => {
                let plugins: Vec<_> = rejected_by.iter().map(|plugin| PLUGINS[*plugin].name).collect();
                tracing::debug!(pod = %pod.key, ?plugins, "no node fits");
                self.queue.unschedulable(&pod.key, rejected_by);
                Some(Outcome::Explain(pod, message))
            }
        }
    }

    fn pod_gone(&mut self, key: &ObjectKey) {
        self.queue.remove(key);
        if self.table.remove_pod(key) {
            self.queue.wake(&ClusterEvent { pod_removed: true, ..Default::default() }, Instant::now());
        }
    }

    fn pod_bound(&mut self, node: &str, change: &Change<Pod>) {
        let info = Arc::new(PodInfo::new(change.object().clone()));
        self.queue.remove(&info.key);
        let known = self.table.node_of(&info.key) == Some(node);
        let changed = change.old().is_some_and(|old| {
            let old = PodInfo::new(old.clone());
            old.requests != info.requests || old.pod.metadata.labels != info.pod.metadata.labels
        });
        self.table.add_pod(node, info);
        let event = ClusterEvent { pod_added: !known || changed, pod_removed: changed, ..Default::default() };
        self.queue.wake(&event, Instant::now());
    }

    fn pod_waits(&mut self, scheduler: &str, change: &Change<Pod>) {
        let pod = change.object();
        let key = ObjectKey::of(&**pod);
        if !is_ours(pod, scheduler) || is_gated(pod) || pod.metadata.deletion_timestamp.is_some() {
            return self.queue.remove(&key);
        }
        let info = Arc::new(PodInfo::new(pod.clone()));
        let only_status = change.old().is_some_and(|old| {
            old.spec == pod.spec
                && old.metadata.labels == pod.metadata.labels
                && old.metadata.annotations == pod.metadata.annotations
        });
        if only_status && self.queue.get(&key).is_some() {
            self.queue.refresh(info);
        } else {
            self.queue.add(info, Instant::now());
        }
    }
}

fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref().filter(|name| !name.is_empty())
}

fn is_finished(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

fn is_ours(pod: &Pod, scheduler: &str) -> bool {
    let wanted =
        pod.spec.as_ref().and_then(|spec| spec.scheduler_name.as_deref()).filter(|name| !name.is_empty());
    wanted.unwrap_or(DEFAULT_NAME) == scheduler
}

fn is_gated(pod: &Pod) -> bool {
    pod.spec.as_ref().and_then(|spec| spec.scheduling_gates.as_ref()).is_some_and(|gates| !gates.is_empty())
}

/// What changed of a node, as far as it can make room.
fn difference(old: &Node, new: &Node) -> ClusterEvent {
    let allocatable = |node: &Node| node.status.as_ref().and_then(|status| status.allocatable.clone());
    let taints = |node: &Node| {
        let spec = node.spec.clone().unwrap_or_default();
        (spec.taints.unwrap_or_default(), spec.unschedulable.unwrap_or(false))
    };
    ClusterEvent {
        node_allocatable: allocatable(old) != allocatable(new),
        node_labels: old.metadata.labels != new.metadata.labels,
        node_taints: taints(old) != taints(new),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests;
