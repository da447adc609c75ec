//! DaemonSet: one pod on every node that suits, kept through rolling updates; templates are kept as
//! ControllerRevisions. Upstream's `pkg/controller/daemon`.

mod placement;
mod update;

use crate::Context;
use crate::family::{Family, PodOwner, retry_with_more_room};
use crate::history::{self, History, REVISION_LABEL, Revisioned, Revisions};
use crate::pods::{self, PodControl};
use futures::future::BoxFuture;
use k8s_openapi::api::apps::v1::{ControllerRevision, DaemonSet, DaemonSetStatus};
use k8s_openapi::api::core::v1::{Node, Pod, PodTemplateSpec};
use knarr_client::owner;
use knarr_client::patch::{self, Guard};
use knarr_client::selector::Selector;
use knarr_client::{Controller, Error, EventType, Informer, ObjectKey, Reconcile, Recorder, Requeue, Result};
use kube::api::Api;
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Pods created or deleted in one turn at most.
const BURST: usize = 250;
/// Pods that fail at once are replaced after a delay that doubles: per daemon set and node.
const FAILED_BASE: Duration = Duration::from_secs(1);
const FAILED_MAX: Duration = Duration::from_secs(15 * 60);

pub fn start(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let sets = context.informers.get::<DaemonSet>();
    let nodes = context.informers.get::<Node>();
    let recorder = context.recorder.for_component("daemonset-controller");
    let this = Arc::new(DaemonSets {
        family: Family::new(
            context.clone(),
            sets.clone(),
            PodControl::new(context.client.clone(), recorder.clone()),
        ),
        recorder,
        nodes: nodes.clone(),
        revisions: Revisions::new(&context),
        failed: Mutex::default(),
        context,
    });
    let (observer, all_sets) = (this.clone(), sets.clone());
    let controller = retry_with_more_room(&this.context, Controller::new("daemonset"))
        .watch(&sets)
        .watch_changes(&this.family.pods, move |change| observer.family.pod_changed(change))
        .watch_changes(&nodes, move |change| placement::sets_concerned(&all_sets, change))
        .watch_map(&this.revisions.informer, |revision| {
            owner::controller_key::<DaemonSet>(&revision.metadata).into_iter().collect()
        });
    Box::pin(controller.run(this, shutdown))
}

impl PodOwner for DaemonSet {
    fn selector(&self) -> Result<Selector> {
        match &self.spec {
            Some(spec) => Selector::new(&spec.selector),
            None => Err(Error::terminal("read daemon set", "spec is missing")),
        }
    }
}

impl Revisioned for DaemonSet {
    const HASH_LABEL: &'static str = REVISION_LABEL;

    fn template(&self) -> Option<&PodTemplateSpec> {
        self.spec.as_ref().map(|spec| &spec.template)
    }

    fn history_limit(&self) -> Option<i32> {
        self.spec.as_ref()?.revision_history_limit
    }

    fn collision_count(&self) -> Option<i32> {
        self.status.as_ref()?.collision_count
    }
}

/// Whether the pod is of the present template.
fn is_current(history: &History, pod: &Pod) -> bool {
    history::revision_of(pod) == Some(history::hash_of::<DaemonSet>(&history.current))
}

struct DaemonSets {
    context: Context,
    recorder: Recorder,
    family: Family<DaemonSet>,
    nodes: Informer<Node>,
    revisions: Revisions,
    /// How often in a row a pod failed, and when last, by daemon set uid and node.
    failed: Mutex<HashMap<(String, String), (u32, Instant)>>,
}

/// A daemon set's pods by node; those without a node under the one they are meant for.
type PodsByNode = BTreeMap<String, Vec<Arc<Pod>>>;

impl Reconcile for DaemonSets {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let Some(set) = self.family.owners.get_key(&key) else {
            self.family.expectations.forget(&key);
            return Ok(Requeue::Done);
        };
        let Some(spec) = &set.spec else { return Ok(Requeue::Done) };
        if spec.selector == Default::default() {
            let message = "This daemon set is selecting all pods. A non-empty selector is required.";
            self.recorder.event(&*set, EventType::Warning, "SelectingAll", message);
            return Ok(Requeue::Done);
        }
        if set.metadata.deletion_timestamp.is_some() {
            return Ok(Requeue::Done);
        }
        let history = self.revisions.history(&*set).await?;
        if let Some(wait) = self.family.expectations.pending(&key) {
            self.write_status(&set, &self.by_node(&set, self.family.claim(&set).await?), &history).await?;
            return Ok(Requeue::After(wait));
        }
        let claimed = self.family.claim(&set).await?;
        let by_node = self.by_node(&set, claimed.clone());
        let result = self.act(&key, &set, &claimed, &by_node, &history).await;
        // Also when something failed: a set that a quota holds back says how far it is.
        self.write_status(&set, &by_node, &history).await?;
        let requeue = result?;
        let now = self.context.clock.now();
        let next = pods::next_available(&claimed, min_ready_seconds(&set), now);
        Ok(requeue.sooner(next.map_or(Requeue::Done, Requeue::After)))
    }
}

impl DaemonSets {
    /// Creates and deletes, updates, and cleans up old revisions.
    async fn act(
        &self,
        key: &ObjectKey,
        set: &DaemonSet,
        claimed: &[Arc<Pod>],
        by_node: &PodsByNode,
        history: &History,
    ) -> Result<Requeue> {
        let mut requeue = self.manage(set, by_node, history).await?;
        if self.family.expectations.pending(key).is_none() {
            requeue = requeue.sooner(self.update(set, by_node, history).await?);
        }
        let hashes: HashSet<&str> = claimed.iter().filter_map(|pod| history::revision_of(pod)).collect();
        let in_use = |old: &&Arc<ControllerRevision>| hashes.contains(history::hash_of::<DaemonSet>(old));
        let live = history.old.iter().filter(in_use).map(|old| history::name_of(old)).collect();
        self.revisions.clean_up(set, history, &live).await?;
        Ok(requeue)
    }

    fn by_node(&self, _set: &DaemonSet, claimed: Vec<Arc<Pod>>) -> PodsByNode {
        let mut by_node = PodsByNode::new();
        for pod in claimed {
            if let Some(node) = placement::target_node(&pod) {
                by_node.entry(node).or_default().push(pod);
            }
        }
        by_node
    }

    /// Creates what is missing and deletes what is too much, node by node.
    async fn manage(&self, set: &DaemonSet, by_node: &PodsByNode, history: &History) -> Result<Requeue> {
        let (mut create, mut delete) = (Vec::new(), Vec::new());
        let mut requeue = Requeue::Done;
        for node in self.nodes.list() {
            let name = node.metadata.name.as_deref().unwrap_or_default();
            let present = by_node.get(name).map(Vec::as_slice).unwrap_or_default();
            requeue = requeue.sooner(self.one_node(set, &node, present, history, &mut create, &mut delete));
        }
        for (name, stranded) in by_node {
            if self.nodes.get("", name).is_none() {
                // Bound pods are pod GC's; those not bound yet would wait for ever.
                delete.extend(stranded.iter().filter(|pod| pods::node_of(pod).is_none()).cloned());
            }
        }
        create.truncate(BURST);
        delete.truncate(BURST);
        self.carry_out(set, history, create, delete).await?;
        Ok(requeue)
    }

    fn one_node(
        &self,
        set: &DaemonSet,
        node: &Node,
        present: &[Arc<Pod>],
        history: &History,
        create: &mut Vec<String>,
        delete: &mut Vec<Arc<Pod>>,
    ) -> Requeue {
        let verdict = placement::verdict(set, node);
        let node = node.metadata.name.as_deref().unwrap_or_default();
        if verdict.should_run && present.is_empty() {
            create.push(node.to_owned());
            return Requeue::Done;
        }
        if !verdict.may_stay {
            delete.extend(present.iter().filter(|pod| !pods::is_terminating(pod)).cloned());
            return Requeue::Done;
        }
        let (ended, running): (Vec<_>, Vec<_>) = present
            .iter()
            .filter(|pod| !pods::is_terminating(pod))
            .cloned()
            .partition(|pod| pods::is_finished(pod));
        let requeue = self.replace_ended(set, node, &ended, delete);
        delete.extend(superfluous(set, running, history));
        requeue
    }

    /// Ended pods are removed (their successors come in the next turn), failed ones with a growing delay.
    fn replace_ended(
        &self,
        set: &DaemonSet,
        node: &str,
        ended: &[Arc<Pod>],
        delete: &mut Vec<Arc<Pod>>,
    ) -> Requeue {
        let mut requeue = Requeue::Done;
        for pod in ended {
            let key = ObjectKey::of(&**pod);
            if pods::phase(pod) == "Failed" {
                if let Some(wait) = self.failure_delay(set, node) {
                    requeue = requeue.sooner(Requeue::After(wait));
                    continue;
                }
                let message = format!("Found failed daemon pod {key} on node {node}, will try to kill it");
                self.recorder.event(set, EventType::Warning, "FailedDaemonPod", message);
            } else {
                let message =
                    format!("Found succeeded daemon pod {key} on node {node}, will try to delete it");
                self.recorder.event(set, EventType::Normal, "SucceededDaemonPod", message);
            }
            delete.push(pod.clone());
        }
        requeue
    }

    /// How long to wait before a failed pod may be replaced; counts the failure when it may.
    fn failure_delay(&self, set: &DaemonSet, node: &str) -> Option<Duration> {
        let mut failed = self.failed.lock();
        let entry = failed.entry((pods::uid(&set.metadata).to_owned(), node.to_owned()));
        let (count, last) = *entry.or_insert((0, Instant::now()));
        let delay =
            if count == 0 { Duration::ZERO } else { FAILED_BASE.saturating_mul(1 << (count - 1).min(20)) };
        let left = delay.min(FAILED_MAX).saturating_sub(last.elapsed());
        if !left.is_zero() {
            return Some(left);
        }
        // Long after the last failure it counts as the first.
        let count = if last.elapsed() > FAILED_MAX * 2 { 1 } else { count + 1 };
        failed.insert((pods::uid(&set.metadata).to_owned(), node.to_owned()), (count, Instant::now()));
        None
    }

    async fn carry_out(
        &self,
        set: &DaemonSet,
        history: &History,
        create: Vec<String>,
        delete: Vec<Arc<Pod>>,
    ) -> Result<()> {
        let Some(spec) = &set.spec else { return Ok(()) };
        let pod_for = |node: String| {
            let mut pod = pods::from_template(&spec.template, &set.metadata, owner::controller_ref(set));
            let labels = pod.metadata.labels.get_or_insert_default();
            let hash = history::hash_of::<DaemonSet>(&history.current).to_owned();
            labels.insert(REVISION_LABEL.to_owned(), hash);
            placement::pin(&mut pod, &node);
            pod
        };
        self.family.create(set, create.into_iter().map(pod_for).collect()).await?;
        self.family.delete(set, delete).await
    }

    async fn write_status(&self, set: &DaemonSet, by_node: &PodsByNode, history: &History) -> Result<()> {
        let now = self.context.clock.now();
        let mut status = DaemonSetStatus {
            observed_generation: set.metadata.generation,
            collision_count: history.collision_count,
            conditions: set.status.as_ref().and_then(|status| status.conditions.clone()),
            ..Default::default()
        };
        let (mut updated, mut available) = (0, 0);
        for node in self.nodes.list() {
            let name = node.metadata.name.as_deref().unwrap_or_default();
            let present = by_node.get(name).map(Vec::as_slice).unwrap_or_default();
            if !placement::verdict(set, &node).should_run {
                status.number_misscheduled += i32::from(!present.is_empty());
                continue;
            }
            status.desired_number_scheduled += 1;
            status.current_number_scheduled += i32::from(!present.is_empty());
            // The oldest ready pod speaks for the node.
            let mut ordered: Vec<_> = present.to_vec();
            ordered.sort_by_key(|pod| {
                (!pods::is_ready(pod), pod.metadata.creation_timestamp.as_ref().map(|t| t.0))
            });
            let Some(pod) = ordered.first() else { continue };
            status.number_ready += i32::from(pods::is_ready(pod));
            available += i32::from(pods::is_available(pod, min_ready_seconds(set), now));
            updated += i32::from(ordered.iter().any(|pod| is_current(history, pod)));
        }
        status.number_available = Some(available);
        status.updated_number_scheduled = Some(updated);
        status.number_unavailable = Some((status.desired_number_scheduled - available).max(0));
        let namespace = set.metadata.namespace.as_deref().unwrap_or_default();
        let api: Api<DaemonSet> = Api::namespaced(self.context.client.clone(), namespace);
        knarr_client::ignore_gone(patch::write_status(&api, set, &set.status, &status, Guard::Uid).await)
    }
}

/// The pods too many among those that run on one node. The oldest stays; while an update surges, one of an old and
/// one of the present template, and among the old ready ones first.
fn superfluous(set: &DaemonSet, mut running: Vec<Arc<Pod>>, history: &History) -> Vec<Arc<Pod>> {
    let age =
        |pod: &Pod| (pods::node_of(pod).is_none(), pod.metadata.creation_timestamp.as_ref().map(|t| t.0));
    running.sort_by_key(|pod| age(pod));
    if update::max_surge(set, 1) == 0 {
        return running.split_off(running.len().min(1));
    }
    let (new, mut old): (Vec<_>, Vec<_>) = running.into_iter().partition(|pod| is_current(history, pod));
    old.sort_by_key(|pod| !pods::is_ready(pod));
    new.into_iter().skip(1).chain(old.into_iter().skip(1)).collect()
}

fn min_ready_seconds(set: &DaemonSet) -> i32 {
    set.spec.as_ref().and_then(|spec| spec.min_ready_seconds).unwrap_or(0)
}

#[cfg(test)]
mod tests;
