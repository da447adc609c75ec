//! The wiring: watches feed table and queue; one task decides pod after pod; what follows from a decision is written in
//! the background (`writes`). Lock order: there is one lock, and no I/O happens under it.

use crate::announcer::Announcer;
use crate::config::Config;
use crate::cycle::{Advice, Chooser, Decision, Refusal, decide, fitting_nodes};
use crate::event::{ClusterEvent, node_matters};
use crate::extender::Extender;
use crate::metrics::{Attempted, Gauges, metrics};
use crate::objects::World;
use crate::plugins::{VolumePlan, gated};
use crate::pod::PodInfo;
use crate::profile::Profile;
use crate::queue::{ADDED, Attempt, Queue, UPDATED};
use crate::writes;
use k8s_openapi::api::core::v1::{Namespace, Node, PersistentVolume, PersistentVolumeClaim, Pod};
use knarr_client::{Change, Client, Clock, Informer, Informers, ObjectKey, Recorder, leader};
use parking_lot::Mutex;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Bindings and explanations under way at most; then deciding waits. Enough for the API server to make many of them
/// durable at once.
const WRITES_MAX: usize = 256;
/// Decisions between two looks at everything else the thread has to do.
const DECISIONS_AT_ONCE: usize = 16;
/// A pod that was bound but that no watch shows on its node is forgotten after this, and its room is free again.
pub const ASSUMED_MAX: Duration = Duration::from_secs(15 * 60);

/// A scheduler. [`Scheduler::new`] starts its watches, [`Scheduler::run`] decides.
///
/// Who only stands for election watches, too, and so decides at once when it comes to lead.
pub struct Scheduler {
    shared: Arc<Shared>,
    synced: Vec<Box<dyn Fn() -> Synced + Send + Sync>>,
}

type Synced = Pin<Box<dyn Future<Output = ()> + Send>>;

pub(crate) struct Shared {
    pub profiles: HashMap<String, Arc<Profile>>,
    pub extenders: Vec<Extender>,
    pub client: Client,
    pub clock: Clock,
    recorder: Recorder,
    pub announcer: Announcer,
    pub pods: Informer<Pod>,
    pub state: Mutex<State>,
    changed: Notify,
    /// Claims and volumes changed: bindings of volumes may be complete.
    pub storage_changed: Notify,
}

pub(crate) struct State {
    pub world: World,
    pub queue: Queue,
    chooser: Chooser<SmallRng>,
    /// Pods counted on a node that no watch has shown there yet.
    assumed: HashMap<ObjectKey, Option<Instant>>,
    /// Those of them that are bound, by the time when they are given up.
    expiring: BTreeSet<(Instant, ObjectKey)>,
}

/// What a decision leads to.
pub(crate) enum Outcome {
    Bind {
        attempt: Attempt,
        node: Arc<str>,
        plan: VolumePlan,
        began: Instant,
    },
    Explain {
        pod: Arc<PodInfo>,
        refusal: Box<Refusal>,
    },
    /// Others have to be asked first.
    Ask {
        attempt: Attempt,
        nodes: Vec<Arc<str>>,
        began: Instant,
    },
    AskAboutVictims {
        pod: Arc<PodInfo>,
        refusal: Box<Refusal>,
    },
}

impl Outcome {
    fn waits_for_volumes(&self) -> bool {
        matches!(self, Outcome::Bind { plan, .. } if !plan.is_empty())
    }
}

impl Scheduler {
    /// A scheduler for the profiles of `config`. `informers` should be shared with what else runs in the process;
    /// `seed` decides ties.
    pub fn new(config: Config, informers: &Informers, recorder: &Recorder, clock: Clock, seed: u64) -> Self {
        let state = State {
            world: World::default(),
            queue: Queue::new(config.backoff),
            chooser: Chooser::new(SmallRng::seed_from_u64(seed)),
            assumed: HashMap::new(),
            expiring: BTreeSet::new(),
        };
        let profiles = config.profiles.into_iter();
        let shared = Arc::new(Shared {
            profiles: profiles.map(|profile| (profile.scheduler_name.clone(), Arc::new(profile))).collect(),
            extenders: config.extenders,
            client: informers.client(),
            clock,
            recorder: recorder.clone(),
            announcer: Announcer::new(informers.client()),
            pods: informers.get(),
            state: Mutex::new(state),
            changed: Notify::new(),
            storage_changed: Notify::new(),
        });
        let gauges: Weak<dyn Gauges> = Arc::<Shared>::downgrade(&shared);
        metrics().register(gauges);
        let mut scheduler = Scheduler { shared, synced: Vec::new() };
        scheduler.watch_all(informers);
        scheduler
    }

    /// What `knarr server` runs: on the caches of the process, writing as the informers' client.
    pub async fn run_with(informers: Informers, config: Config, shutdown: CancellationToken) {
        let client = informers.client();
        let election = config.election.clone();
        let recorder = Recorder::new(client.clone(), Clock::System, crate::DEFAULT_NAME, "");
        let scheduler = Scheduler::new(config, &informers, &recorder, Clock::System, rand::random());
        let Some(election) = election else { return scheduler.run(shutdown).await };
        // Who lost the lease stands for it again.
        while !shutdown.is_cancelled() {
            let (lease, stop) = (election.lease(), shutdown.child_token());
            let term = || scheduler.decide_until(&stop);
            if let Err(error) =
                leader::run(client.clone(), Clock::System, lease, shutdown.clone(), term).await
            {
                tracing::warn!(%error, "no longer the leading scheduler");
            }
            stop.cancel();
            scheduler.stand_down();
        }
    }

    /// The default scheduler.
    pub async fn run_default(client: Client, shutdown: CancellationToken) {
        Scheduler::run_with(Informers::new(client), Config::default(), shutdown).await;
    }

    fn watch_all(&mut self, informers: &Informers) {
        self.watch(&informers.get::<Namespace>(), Shared::namespace_changed);
        macro_rules! keep {
            ($($field:ident => $told:expr;)*) => {
                $(self.watch(&informers.get(), |shared, change| {
                    let mut state = shared.state.lock();
                    state.world.objects.$field.set(change);
                    let told: fn(&mut State) = $told;
                    told(&mut state);
                    drop(state);
                    shared.changed.notify_one();
                });)*
            };
        }
        keep! {
            services => |state| state.world.objects.selectors_changed();
            replication_controllers => |state| state.world.objects.selectors_changed();
            stateful_sets => |state| state.world.objects.selectors_changed();
            replica_sets => |state| state.world.objects.selectors_changed();
            budgets => |_| {};
            storage_classes => |state| state.wake(&ClusterEvent::StorageChanged);
            csi_nodes => |state| state.wake(&ClusterEvent::StorageChanged);
            csi_drivers => |state| state.wake(&ClusterEvent::StorageChanged);
            attachments => |state| state.wake(&ClusterEvent::StorageChanged);
            csi_capacities => |state| state.wake(&ClusterEvent::StorageChanged);
            resource_claims => |state| state.wake(&ClusterEvent::DevicesChanged);
            resource_slices => |state| state.wake(&ClusterEvent::DevicesChanged);
            device_classes => |state| state.wake(&ClusterEvent::DevicesChanged);
        }
        self.watch(&informers.get::<PersistentVolume>(), Shared::volume_changed);
        self.watch(&informers.get::<PersistentVolumeClaim>(), Shared::claim_changed);
        self.watch(&informers.get::<Node>(), Shared::node_changed);
        self.watch(&self.shared.pods.clone(), Shared::pod_changed);
    }

    fn watch<K: knarr_client::informer::Cached>(
        &mut self,
        informer: &Informer<K>,
        told: impl Fn(&Shared, &Change<K>) + Send + Sync + 'static,
    ) {
        let observer = Arc::downgrade(&self.shared);
        informer.on_change(move |change| {
            if let Some(shared) = observer.upgrade() {
                told(&shared, change);
            }
        });
        let informer = informer.clone();
        self.synced.push(Box::new(move || {
            let informer = informer.clone();
            Box::pin(async move { informer.wait_synced().await })
        }));
    }

    /// Decides until `shutdown`; starts when the cluster is known.
    pub async fn run(self, shutdown: CancellationToken) {
        self.decide_until(&shutdown).await;
    }

    /// The same for one term of office; another may follow after [`Scheduler::stand_down`].
    async fn decide_until(&self, stop: &CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = futures::future::join_all(self.synced.iter().map(|synced| synced())) => {}
        }
        let term = Term { writes: Arc::new(Semaphore::new(WRITES_MAX)), stop: stop.clone() };
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.shared.step(&term) => {}
            }
        }
    }

    /// Somebody else decides from now on. What was being bound counts as not bound; where it was, the watch says so.
    fn stand_down(&self) {
        self.shared.announcer.set_busy(false);
        self.shared.state.lock().stand_down();
    }
}

/// One time of deciding: what it writes ends with it.
struct Term {
    writes: Arc<Semaphore>,
    stop: CancellationToken,
}

impl Shared {
    /// Decides some pods, or waits until there may be one.
    async fn step(self: &Arc<Self>, term: &Term) {
        for _ in 0..DECISIONS_AT_ONCE {
            let permit = term.writes.clone().acquire_owned().await.expect("the semaphore is never closed");
            let (outcome, deadline) = {
                let mut state = self.state.lock();
                let outcome = state.decide_next(self);
                (outcome, state.next_deadline())
            };
            let Some(outcome) = outcome else {
                drop(permit);
                self.announcer.set_busy(false);
                return self.wait(deadline).await;
            };
            self.announcer.set_busy(true);
            // Volumes may take minutes: who waits for them keeps nobody else from being written.
            let permit = (!outcome.waits_for_volumes()).then_some(permit);
            let (this, stop) = (self.clone(), term.stop.clone());
            tokio::spawn(async move {
                tokio::select! {
                    biased;
                    () = stop.cancelled() => {}
                    () = writes::carry_out(&this, outcome) => {}
                }
                drop(permit);
            });
        }
        // Watches and writes get their turn between decisions.
        tokio::task::yield_now().await;
    }

    async fn wait(&self, deadline: Option<Instant>) {
        match deadline {
            Some(deadline) => tokio::select! {
                () = self.changed.notified() => {}
                () = tokio::time::sleep_until(deadline) => {}
            },
            None => self.changed.notified().await,
        }
    }

    pub fn profile(&self, pod: &PodInfo) -> Option<&Arc<Profile>> {
        self.profiles.get(pod.scheduler_name())
    }

    /// Speaks as the scheduler the pod asked for.
    pub fn recorder(&self, pod: &PodInfo) -> Recorder {
        self.recorder.for_component(pod.scheduler_name())
    }

    /// Changes the state and lets the loop look again.
    pub fn update<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.state.lock());
        self.changed.notify_one();
        result
    }

    /// Decides with what extenders said.
    pub fn decide_advised(&self, attempt: Attempt, advice: &Advice, began: Instant) -> Option<Outcome> {
        let profile = self.profile(&attempt.pod)?.clone();
        self.update(|state| {
            // It is no longer ours to decide.
            if !state.queue.is_in_work(&attempt.pod.key) {
                return None;
            }
            let State { world, chooser, .. } = state;
            let decision = decide(&attempt.pod, &profile, world, chooser, Some(advice));
            Some(state.settle(self, attempt, &profile, decision, began))
        })
    }

    fn node_changed(&self, change: &Change<Node>) {
        self.update(|state| match change {
            Change::Deleted(node) => {
                state.world.table.remove_node(node.metadata.name.as_deref().unwrap_or_default());
                // Fewer domains can even satisfy a spread constraint.
                state.wake(&ClusterEvent::NodeRemoved);
            }
            Change::Added(node) => {
                state.world.table.set_node(node.clone());
                state.wake(&ClusterEvent::NodeAdded(node));
            }
            Change::Updated { old, new } => {
                state.world.table.set_node(new.clone());
                if node_matters(old, new) {
                    state.wake(&ClusterEvent::NodeChanged { old, new });
                }
            }
        });
    }

    fn namespace_changed(&self, change: &Change<Namespace>) {
        let namespace = change.object();
        let name = namespace.metadata.name.as_deref().unwrap_or_default();
        let none = Default::default();
        let labels = (!change.is_deleted()).then(|| namespace.metadata.labels.as_ref().unwrap_or(&none));
        self.update(|state| {
            let table = &mut state.world.table;
            table.groups.set_namespace(name, labels, &table.filters);
            state.wake(&ClusterEvent::NamespaceChanged);
        });
    }

    fn volume_changed(&self, change: &Change<PersistentVolume>) {
        self.update(|state| {
            let objects = &mut state.world.objects;
            objects.volumes.set(change);
            let volume = change.object();
            let claimed = volume.spec.as_ref().is_some_and(|spec| spec.claim_ref.is_some());
            if claimed || change.is_deleted() {
                objects.promised_volumes.remove(volume.metadata.name.as_deref().unwrap_or_default());
            }
            state.wake(&ClusterEvent::StorageChanged);
        });
        self.storage_changed.notify_waiters();
    }

    fn claim_changed(&self, change: &Change<PersistentVolumeClaim>) {
        self.update(|state| {
            state.world.objects.claims.set(change);
            state.wake(&ClusterEvent::ClaimChanged(change.object()));
        });
        self.storage_changed.notify_waiters();
    }

    fn pod_changed(&self, change: &Change<Pod>) {
        let pod = change.object();
        let gone = change.is_deleted() || is_finished(pod);
        self.update(|state| match node_of(pod) {
            _ if gone => state.pod_gone(&ObjectKey::of(&**pod)),
            Some(node) => state.pod_placed(node, pod),
            None => state.pod_waits(self, change),
        });
    }
}

impl State {
    fn decide_next(&mut self, shared: &Shared) -> Option<Outcome> {
        let began = Instant::now();
        self.expire(began);
        loop {
            let attempt = self.queue.pop(began)?;
            let Some(profile) = shared.profile(&attempt.pod).cloned() else {
                self.queue.remove(&attempt.pod.key);
                continue;
            };
            let State { world, chooser, .. } = self;
            let interested = shared.extenders.iter().any(|extender| extender.is_interested(&attempt.pod));
            if interested {
                return Some(match fitting_nodes(&attempt.pod, &profile, world, chooser) {
                    Ok(nodes) => {
                        self.queue.in_flight(&attempt.pod.key);
                        Outcome::Ask { attempt, nodes, began }
                    }
                    Err(decision) => self.settle(shared, attempt, &profile, decision, began),
                });
            }
            let decision = decide(&attempt.pod, &profile, world, chooser, None);
            return Some(self.settle(shared, attempt, &profile, decision, began));
        }
    }

    /// Makes a decision part of what is known, and says what has to be written.
    fn settle(
        &mut self,
        shared: &Shared,
        attempt: Attempt,
        profile: &Profile,
        decision: Decision,
        began: Instant,
    ) -> Outcome {
        metrics().decided(&profile.scheduler_name, began.elapsed(), &self.chooser.timing);
        match decision {
            Decision::Node(node, plan) => {
                self.assume(&attempt.pod, &node, &plan);
                Outcome::Bind { attempt, node, plan, began }
            }
            Decision::Unschedulable(refusal) => {
                let name: Arc<str> = profile.scheduler_name.as_str().into();
                metrics().attempt(&name, Attempted::Unschedulable, began.elapsed());
                let pod = attempt.pod;
                tracing::debug!(pod = %pod.key, message = refusal.message, "no node fits");
                let asks = shared.extenders.iter().any(|e| e.preempts() && e.is_interested(&pod));
                self.queue.unschedulable(&pod.key, &refusal.rejected_by, Instant::now());
                if refusal.preemption.is_some() && asks {
                    return Outcome::AskAboutVictims { pod, refusal };
                }
                self.nominate(&pod, &refusal);
                Outcome::Explain { pod, refusal }
            }
        }
    }

    /// Promises the node where room is made, or takes an old promise back.
    pub fn nominate(&mut self, pod: &Arc<PodInfo>, refusal: &Refusal) {
        match &refusal.preemption {
            Some(preemption) => {
                metrics().preempted(preemption.victims.len());
                self.world.table.nominate(pod, Some(&preemption.node));
                for other in &preemption.unpromised {
                    self.world.table.nominate(other, None);
                }
            }
            None if refusal.forget_nomination => self.world.table.nominate(pod, None),
            None => {}
        }
    }

    fn assume(&mut self, pod: &Arc<PodInfo>, node: &str, plan: &VolumePlan) {
        self.world.table.nominate(pod, None);
        self.world.table.add_pod(node, pod.clone());
        self.assumed.insert(pod.key.clone(), None);
        let promises = plan.bind.iter().map(|(volume, claim)| (volume.clone(), claim.clone()));
        self.world.objects.promised_volumes.extend(promises);
        // Pods that want to be near this one may have their chance now.
        self.wake(&ClusterEvent::PodPlaced(pod));
    }

    /// The pod was bound: from now on the watch should show it.
    pub fn bound(&mut self, key: &ObjectKey) {
        self.queue.remove(key);
        if let Some(due) = self.assumed.get_mut(key) {
            let expires = Instant::now() + ASSUMED_MAX;
            *due = Some(expires);
            self.expiring.insert((expires, key.clone()));
        }
    }

    /// The pod was assumed on a node but not bound: forget that, and try again if it still waits.
    pub fn forget(&mut self, pod: &Arc<PodInfo>, plan: &VolumePlan, still_waits: bool) {
        for (volume, claim) in &plan.bind {
            if self.world.objects.promised_volumes.get(volume) == Some(claim) {
                self.world.objects.promised_volumes.remove(volume);
            }
        }
        let assumed = self.assumed.remove(&pod.key).is_some();
        match still_waits {
            true => {
                if assumed {
                    self.world.table.remove_pod(&pod.key);
                }
                self.queue.retry(&pod.key, Instant::now());
            }
            // Bound by someone else, or gone: the watch has told the table already.
            false => self.queue.remove(&pod.key),
        }
        self.wake(&ClusterEvent::PodRemoved(pod));
    }

    /// Takes back what was decided and is not known to be written.
    fn stand_down(&mut self) {
        let open: Vec<ObjectKey> =
            self.assumed.iter().filter(|(_, due)| due.is_none()).map(|(key, _)| key.clone()).collect();
        for key in open {
            self.assumed.remove(&key);
            self.world.table.remove_pod(&key);
        }
        self.world.objects.promised_volumes.clear();
        self.queue.put_back(Instant::now());
    }

    fn expire(&mut self, now: Instant) {
        while let Some((_, key)) = self.expiring.first().filter(|(due, _)| *due <= now).cloned() {
            self.expiring.pop_first();
            tracing::warn!(pod = %key, "a bound pod never appeared on its node; its room is free again");
            self.assumed.remove(&key);
            self.pod_gone(&key);
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let expiry = self.expiring.first().map(|(due, _)| *due);
        [self.queue.next_deadline(), expiry].into_iter().flatten().min()
    }

    fn confirm(&mut self, key: &ObjectKey) -> bool {
        let Some(due) = self.assumed.remove(key) else { return false };
        if let Some(due) = due {
            self.expiring.remove(&(due, key.clone()));
        }
        true
    }

    fn wake(&mut self, event: &ClusterEvent) {
        self.queue.wake(event, Instant::now());
    }

    fn pod_gone(&mut self, key: &ObjectKey) {
        if let Some(pod) = self.queue.get(key).cloned() {
            self.world.table.nominate(&pod, None);
        }
        self.queue.remove(key);
        self.confirm(key);
        if let Some(pod) = self.world.table.remove_pod(key) {
            self.wake(&ClusterEvent::PodRemoved(&pod));
        }
    }

    fn pod_placed(&mut self, node: &str, pod: &Arc<Pod>) {
        let info = Arc::new(PodInfo::new(pod.clone()));
        self.queue.remove(&info.key);
        let assumed = self.confirm(&info.key);
        let table = &mut self.world.table;
        let known = table.get_pod(&info.key).filter(|_| table.node_of(&info.key) == Some(node)).cloned();
        match known {
            Some(old) if old.counts_as(&info) => table.refresh_pod(info),
            Some(old) => {
                table.add_pod(node, info.clone());
                self.wake(&ClusterEvent::PodChanged { old: &old, new: &info });
            }
            None => {
                table.nominate(&info, None);
                let moved = table.remove_pod(&info.key);
                table.add_pod(node, info.clone());
                if let Some(old) = moved {
                    self.wake(&ClusterEvent::PodRemoved(&old));
                }
                if !assumed {
                    self.wake(&ClusterEvent::PodPlaced(&info));
                }
            }
        }
    }

    fn pod_waits(&mut self, shared: &Shared, change: &Change<Pod>) {
        let pod = change.object();
        let info = Arc::new(PodInfo::new(pod.clone()));
        let key = &info.key;
        if shared.profile(&info).is_none() || info.is_terminating() {
            self.world.table.nominate(&info, None);
            return self.queue.remove(key);
        }
        if self.assumed.contains_key(key) {
            // Being bound; what changes matters only if that fails.
            return self.queue.refresh(info);
        }
        let old_nomination = change.old().and_then(|old| nominated(old));
        if nominated(pod) != old_nomination {
            self.world.table.nominate(&info, nominated(pod));
        }
        let only_status = change.old().is_some_and(|old| {
            old.spec == pod.spec
                && old.metadata.labels == pod.metadata.labels
                && old.metadata.annotations == pod.metadata.annotations
        });
        if only_status && self.queue.get(key).is_some() {
            return self.queue.refresh(info);
        }
        let event = if change.old().is_some() { UPDATED } else { ADDED };
        let gates = gated(&info);
        self.queue.add(info, gates, Instant::now(), event);
    }
}

impl Gauges for Shared {
    fn pending(&self) -> [usize; 4] {
        self.state.lock().queue.lens()
    }

    fn cached(&self) -> [usize; 3] {
        let state = self.state.lock();
        [state.world.table.live().len(), state.world.table.pods_len(), state.assumed.len()]
    }

    fn refused_by(&self, plugin: usize) -> BTreeMap<String, usize> {
        self.state.lock().queue.refused_by(plugin)
    }
}

pub(crate) fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref().filter(|name| !name.is_empty())
}

fn nominated(pod: &Pod) -> Option<&str> {
    pod.status.as_ref()?.nominated_node_name.as_deref().filter(|name| !name.is_empty())
}

fn is_finished(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

#[cfg(test)]
mod tests;
