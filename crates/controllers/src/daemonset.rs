//! DaemonSet: one pod on every node that suits, kept through rolling updates; templates are kept as
//! ControllerRevisions. Upstream's `pkg/controller/daemon`.

mod history;
mod placement;
mod update;

use crate::Context;
use crate::pods::{self, PodControl};
use futures::future::{BoxFuture, join_all};
use history::{HASH_LABEL, History};
use k8s_openapi::api::apps::v1::{ControllerRevision, DaemonSet, DaemonSetStatus};
use k8s_openapi::api::core::v1::{Node, Pod};
use knarr_client::expectations::Expectations;
use knarr_client::owner::{self, Claim};
use knarr_client::patch::{self, Guard};
use knarr_client::selector::Selector;
use knarr_client::{
    Change, Controller, During, Error, EventType, Informer, ObjectKey, Reconcile, Recorder, Requeue, Result,
};
use kube::api::Api;
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
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
    let all_pods = context.informers.get::<Pod>();
    let nodes = context.informers.get::<Node>();
    let revisions = context.informers.get::<ControllerRevision>();
    pods::index_by_controller(&all_pods);
    pods::index_by_controller(&revisions);
    let recorder = context.recorder.for_component("daemonset-controller");
    let this = Arc::new(DaemonSets {
        control: PodControl::new(context.client.clone(), recorder.clone()),
        recorder,
        sets: sets.clone(),
        pods: all_pods.clone(),
        nodes: nodes.clone(),
        revisions: revisions.clone(),
        expectations: Expectations::new(),
        failed: Mutex::default(),
        context,
    });
    let (observer, all_sets) = (this.clone(), sets.clone());
    let controller = Controller::new("daemonset")
        .watch(&sets)
        .watch_changes(&all_pods, move |change| observer.pod_changed(change))
        .watch_changes(&nodes, move |change| placement::sets_concerned(&all_sets, change))
        .watch_map(&revisions, |revision| {
            owner::controller_key::<DaemonSet>(&revision.metadata).into_iter().collect()
        });
    Box::pin(controller.run(this, shutdown))
}

struct DaemonSets {
    context: Context,
    recorder: Recorder,
    control: PodControl,
    sets: Informer<DaemonSet>,
    pods: Informer<Pod>,
    nodes: Informer<Node>,
    revisions: Informer<ControllerRevision>,
    expectations: Expectations,
    /// How often in a row a pod failed, and when last, by daemon set uid and node.
    failed: Mutex<HashMap<(String, String), (u32, Instant)>>,
}

/// A daemon set's pods by node; those without a node under the one they are meant for.
type PodsByNode = BTreeMap<String, Vec<Arc<Pod>>>;

impl Reconcile for DaemonSets {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let Some(set) = self.sets.get_key(&key) else {
            self.expectations.forget(&key);
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
        let history = self.history(&set).await?;
        if let Some(wait) = self.expectations.pending(&key) {
            self.write_status(&set, &self.by_node(&set, self.claim(&set).await?), &history).await?;
            return Ok(Requeue::After(wait));
        }
        let claimed = self.claim(&set).await?;
        let by_node = self.by_node(&set, claimed.clone());
        let mut requeue = self.manage(&key, &set, &by_node, &history).await?;
        if self.expectations.pending(&key).is_none() {
            requeue = requeue.sooner(self.update(&key, &set, &by_node, &history).await?);
        }
        self.clean_up_history(&set, &claimed, &history).await?;
        self.write_status(&set, &by_node, &history).await?;
        let now = self.context.clock.now();
        let next = pods::next_available(&claimed, min_ready_seconds(&set), now);
        Ok(requeue.sooner(next.map_or(Requeue::Done, Requeue::After)))
    }
}

impl DaemonSets {
    fn pod_changed(&self, change: &Change<Pod>) -> Vec<ObjectKey> {
        let pod = change.object();
        let versions = [Some(pod), change.old()].into_iter().flatten();
        let mut keys: Vec<_> =
            versions.filter_map(|pod| owner::controller_key::<DaemonSet>(&pod.metadata)).collect();
        if let Some(key) = keys.first() {
            let uid = pods::uid(&pod.metadata);
            self.expectations.creation_seen(key, uid);
            if change.is_deleted() || pods::is_terminating(pod) {
                self.expectations.deletion_seen(key, uid);
            }
        }
        if keys.is_empty() && !change.is_deleted() && owner::controller_of(&pod.metadata).is_none() {
            let sets = self.sets.list_in(pod.metadata.namespace.as_deref().unwrap_or_default());
            let matches = |set: &&Arc<DaemonSet>| {
                selector(set).is_ok_and(|selector| {
                    !selector.is_empty() && selector.matches(pod.metadata.labels.as_ref())
                })
            };
            keys.extend(sets.iter().filter(matches).map(|set| ObjectKey::of(&**set)));
        }
        keys
    }

    async fn claim(&self, set: &DaemonSet) -> Result<Vec<Arc<Pod>>> {
        let selector = selector(set)?;
        let namespace = set.metadata.namespace.as_deref().unwrap_or_default();
        let mut candidates = self.pods.by_index(pods::BY_CONTROLLER, pods::uid(&set.metadata));
        candidates.extend(self.pods.by_index(pods::BY_CONTROLLER, &pods::orphans_of(namespace)));
        let mut claimed = Vec::new();
        for pod in candidates {
            match owner::claim(&set.metadata, &pod.metadata, selector.matches(pod.metadata.labels.as_ref())) {
                Claim::Keep => claimed.push(pod),
                Claim::Release => {
                    owner::release(&self.context.client, pods::uid(&set.metadata), &*pod).await?;
                }
                Claim::Adopt if self.still_exists(set).await? => {
                    claimed.push(Arc::new(owner::adopt(&self.context.client, set, &*pod).await?));
                }
                Claim::Adopt | Claim::Ignore => {}
            }
        }
        Ok(claimed)
    }

    async fn still_exists(&self, set: &DaemonSet) -> Result<bool> {
        let key = ObjectKey::of(set);
        let api: Api<DaemonSet> = Api::namespaced(self.context.client.clone(), &key.namespace);
        let fresh = api.get_opt(&key.name).await.during(|| format!("read daemon set {key}"))?;
        Ok(fresh.is_some_and(|fresh| {
            fresh.metadata.uid == set.metadata.uid && fresh.metadata.deletion_timestamp.is_none()
        }))
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
    async fn manage(
        &self,
        key: &ObjectKey,
        set: &DaemonSet,
        by_node: &PodsByNode,
        history: &History,
    ) -> Result<Requeue> {
        let (mut create, mut delete) = (Vec::new(), Vec::new());
        let mut requeue = Requeue::Done;
        for node in self.nodes.list() {
            let name = node.metadata.name.clone().unwrap_or_default();
            let present = by_node.get(&name).map(Vec::as_slice).unwrap_or_default();
            let verdict = placement::verdict(set, &node);
            requeue = requeue.sooner(self.one_node(set, &name, present, verdict, &mut create, &mut delete));
        }
        for (name, stranded) in by_node {
            if self.nodes.get("", name).is_none() {
                // Bound pods are pod GC's; those not bound yet would wait for ever.
                delete.extend(stranded.iter().filter(|pod| pods::node_of(pod).is_none()).cloned());
            }
        }
        create.truncate(BURST);
        delete.truncate(BURST);
        self.carry_out(key, set, history, create, delete).await?;
        Ok(requeue)
    }

    fn one_node(
        &self,
        set: &DaemonSet,
        node: &str,
        present: &[Arc<Pod>],
        verdict: placement::Verdict,
        create: &mut Vec<String>,
        delete: &mut Vec<Arc<Pod>>,
    ) -> Requeue {
        if verdict.should_run && present.is_empty() {
            create.push(node.to_owned());
            return Requeue::Done;
        }
        if !verdict.may_stay {
            delete.extend(present.iter().filter(|pod| !pods::is_terminating(pod)).cloned());
            return Requeue::Done;
        }
        let (ended, mut running): (Vec<_>, Vec<_>) = present
            .iter()
            .filter(|pod| !pods::is_terminating(pod))
            .cloned()
            .partition(|pod| pods::is_finished(pod));
        let requeue = self.replace_ended(set, node, &ended, delete);
        // Of several the oldest stays; while an update surges, one old and one new pod are wanted.
        running.sort_by_key(|pod| {
            (pods::node_of(pod).is_none(), pod.metadata.creation_timestamp.as_ref().map(|t| t.0))
        });
        if update::max_surge(set, 1) == 0 {
            delete.extend(running.into_iter().skip(1));
        }
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
        key: &ObjectKey,
        set: &DaemonSet,
        history: &History,
        create: Vec<String>,
        delete: Vec<Arc<Pod>>,
    ) -> Result<()> {
        // Slow start: a template that is refused costs few tries.
        let (mut batch, mut left) = (1, create.as_slice());
        while !left.is_empty() {
            let (now, later) = left.split_at(batch.min(left.len()));
            let results = join_all(now.iter().map(|node| self.create_one(key, set, history, node))).await;
            for result in results {
                match result {
                    Err(error) if error.is_namespace_terminating() => return Ok(()),
                    result => result?,
                }
            }
            (left, batch) = (later, batch * 2);
        }
        let deletions = delete.into_iter().map(|pod| async move { self.delete_one(key, set, &pod).await });
        join_all(deletions).await.into_iter().collect()
    }

    async fn create_one(
        &self,
        key: &ObjectKey,
        set: &DaemonSet,
        history: &History,
        node: &str,
    ) -> Result<()> {
        let Some(spec) = &set.spec else { return Ok(()) };
        let mut pod = pods::from_template(&spec.template, &set.metadata, owner::controller_ref(set));
        let labels = pod.metadata.labels.get_or_insert_default();
        labels.insert(HASH_LABEL.to_owned(), history.hash.clone());
        placement::pin(&mut pod, node);
        let created = self.control.create(set, &pod).await?;
        let cached = || self.pods.get_key(&ObjectKey::of(&created)).is_some();
        self.expectations.created(key, pods::uid(&created.metadata), cached);
        Ok(())
    }

    async fn delete_one(&self, key: &ObjectKey, set: &DaemonSet, pod: &Pod) -> Result<()> {
        let uid = pods::uid(&pod.metadata);
        self.expectations.deleting(key, uid);
        let deleted = self.control.delete(set, pod).await;
        let gone = self.pods.get_key(&ObjectKey::of(pod)).is_none_or(|pod| pods::is_terminating(&pod));
        if deleted.is_err() || gone {
            self.expectations.deletion_seen(key, uid);
        }
        deleted
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
            updated += i32::from(ordered.iter().any(|pod| history.is_current(pod)));
        }
        status.number_available = Some(available);
        status.updated_number_scheduled = Some(updated);
        status.number_unavailable = Some((status.desired_number_scheduled - available).max(0));
        let namespace = set.metadata.namespace.as_deref().unwrap_or_default();
        let api: Api<DaemonSet> = Api::namespaced(self.context.client.clone(), namespace);
        knarr_client::ignore_gone(patch::write_status(&api, set, &set.status, &status, Guard::Uid).await)
    }
}

fn min_ready_seconds(set: &DaemonSet) -> i32 {
    set.spec.as_ref().and_then(|spec| spec.min_ready_seconds).unwrap_or(0)
}

fn selector(set: &DaemonSet) -> Result<Selector> {
    match &set.spec {
        Some(spec) => Selector::new(&spec.selector),
        None => Err(Error::terminal("read daemon set", "spec is missing")),
    }
}

#[cfg(test)]
mod tests;
