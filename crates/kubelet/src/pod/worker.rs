//! The loop of one pod: woken by the API, the runtime, probes and deadlines, it compares what runs with what shall
//! run, sets a task to work where they differ, and tells the API. It never waits for that task, so it always knows
//! of deletion and can tell the status.

use super::observe::Observed;
use super::resize::{Answer, Grant, Progress};
use super::{PodContext, State, plan, resize, start, status, stop};
use crate::admission;
use crate::context::NodeContext;
use crate::names;
use crate::probe::{Probed, Probers};
use crate::resources::{self, Qos};
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use knarr_client::patch::merge_diff;
use knarr_client::{EventType, ObjectKey};
use knarr_runtime::cri::v1;
use kube::api::{Api, DeleteParams, Patch, PatchParams, Preconditions};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// How long after a failed step (runtime or API out of reach) the worker looks again.
const FAILED_RETRY: Duration = Duration::from_secs(2);
/// How often a conflicting status is computed afresh in place.
const CONFLICTS_MAX: usize = 5;
/// Longest termination message, and longest one taken from the log.
const MESSAGE_BYTES_MAX: u64 = 4096;
const MESSAGE_LOG_BYTES_MAX: u64 = 2048;
const DEADLINE: (&str, &str) =
    ("DeadlineExceeded", "Pod was active on the node longer than the specified deadline");

/// A running worker.
pub struct Handle {
    pub context: Arc<PodContext>,
    task: JoinHandle<()>,
}

impl Handle {
    pub fn wake(&self) {
        self.context.wake.notify_one();
    }
}

impl Drop for Handle {
    /// The process ends: pods run on.
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Starts the worker of a pod; `done` is told the uid when the pod is gone for good. A pod the API does not know is taken
/// down.
pub fn spawn(node: Arc<NodeContext>, key: ObjectKey, uid: String, done: mpsc::Sender<String>) -> Handle {
    let wake = Arc::new(Notify::new());
    let probers = Probers::new(node.runtime.clone(), node.recorder.clone(), wake.clone());
    let context = Arc::new(PodContext {
        node,
        key,
        uid,
        wake,
        references_changed: Arc::new(Notify::new()),
        state: parking_lot::Mutex::new(State::default()),
        probes: probers.results.clone(),
    });
    let worker = Worker {
        context: context.clone(),
        probers,
        op: None,
        kill: None,
        latest: None,
        last_pod: None,
        released: false,
        failure: None,
        rejected: false,
        admitted: false,
        grant: None,
        volumes_stale: false,
    };
    let task = tokio::spawn(async move {
        let uid = worker.context.uid.clone();
        worker.run().await;
        let _ = done.send(uid).await;
    });
    Handle { context, task }
}

struct Worker {
    context: Arc<PodContext>,
    probers: Probers,
    /// Starting, or ending the whole pod.
    op: Option<Op>,
    /// Ending single containers, beside a start: a hook or pull under way is not cut off by it.
    kill: Option<Op>,
    /// The pod as our last write left it, until the informer has it.
    latest: Option<Arc<Pod>>,
    /// The pod as last seen: what is stopped after the API has forgotten it.
    last_pod: Option<Arc<Pod>>,
    /// Network, sandbox and volumes are gone.
    released: bool,
    /// Why the node ended the pod.
    failure: Option<(String, String)>,
    rejected: bool,
    admitted: bool,
    /// The resources the node has granted.
    grant: Option<Grant>,
    volumes_stale: bool,
}

/// What is being done about the pod.
struct Op {
    kind: OpKind,
    task: JoinHandle<()>,
    /// Set before the worker is woken; the task itself ends a moment later.
    done: Arc<AtomicBool>,
}

#[derive(Clone, Copy, PartialEq)]
enum OpKind {
    Start,
    Kill,
    /// Of everything, with this grace period in seconds.
    KillAll(i64),
}

impl Drop for Op {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What a pass of the loop ended in.
enum Next {
    Wait(Option<Instant>),
    Gone,
}

type Step<T> = Result<T, String>;

impl Worker {
    async fn run(mut self) {
        loop {
            let at = match self.sync().await {
                Ok(Next::Gone) => return,
                Ok(Next::Wait(at)) => at,
                Err(error) => {
                    tracing::warn!(pod = %self.context.key, error, "pod not synced, trying again");
                    Some(Instant::now() + FAILED_RETRY)
                }
            };
            let context = self.context.clone();
            tokio::select! {
                () = context.wake.notified() => {}
                () = context.references_changed.notified() => self.references_changed(),
                () = sleep_until(at) => {}
            }
        }
    }

    /// What failed for a missing object may go well now.
    fn references_changed(&mut self) {
        self.volumes_stale = true;
        let mut state = self.context.state.lock();
        state.retry_at = None;
        let State { waiting, not_before, .. } = &mut *state;
        not_before.retain(|name, _| {
            waiting.get(name).is_some_and(|why| why.reason != "CreateContainerConfigError")
        });
    }

    async fn sync(&mut self) -> Step<Next> {
        let pod = self.pod();
        let observed = self.observe().await?;
        self.read_messages(&observed);
        for slot in [&mut self.op, &mut self.kill] {
            if slot.as_ref().is_some_and(|op| op.done.load(Ordering::Acquire)) {
                *slot = None;
            }
        }
        let Some(pod) = pod else { return self.take_down(&observed).await };
        if let Some(last) = &self.last_pod {
            let moved = last.metadata.labels != pod.metadata.labels
                || last.metadata.annotations != pod.metadata.annotations;
            self.volumes_stale |= moved;
        }
        self.last_pod = Some(pod.clone());
        let ended = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        let ended = matches!(ended, Some("Failed" | "Succeeded"));
        if pod.metadata.deletion_timestamp.is_some() {
            return self.terminate(&pod, &observed).await;
        }
        if ended || self.rejected {
            return self.rest(&pod, &observed).await;
        }
        if !self.admit(&pod, &observed).await? {
            return Ok(Next::Wait(None));
        }
        let (pod, restart, resize_again) = self.resize(&pod, &observed).await;
        let deadline = self.deadline(&pod);
        if deadline.is_some_and(|at| at <= Instant::now()) && self.failure.is_none() {
            self.context.event(&pod, EventType::Normal, DEADLINE.0, DEADLINE.1);
            self.failure = Some((DEADLINE.0.to_owned(), DEADLINE.1.to_owned()));
        }
        if self.failure.is_some() {
            return self.fail(&pod, &observed).await;
        }
        self.update_probes(&pod, &observed);
        let mut plan = self.make_plan(&pod, &observed);
        plan.kill.extend(restart);
        let mut look_again = earliest(earliest(plan.look_again, deadline), resize_again);
        look_again = earliest(look_again, self.refresh_volumes(&pod, &observed).await);
        let waiting = plan.waiting.clone();
        let retry_at = self.carry_out(&pod, &observed, plan);
        look_again = earliest(look_again, retry_at);
        self.publish(&pod, &observed, &waiting, false).await?;
        Ok(Next::Wait(look_again))
    }

    /// The pod as the API has it: the informer's, or what our last write answered if that is newer. `None` when
    /// it is gone, or another pod has its name.
    fn pod(&mut self) -> Option<Arc<Pod>> {
        let found = self.context.node.pods.get_key(&self.context.key);
        let found = found.filter(|pod| names::uid(pod) == self.context.uid)?;
        if self.latest.as_ref().is_some_and(|latest| version(latest) <= version(&found)) {
            self.latest = None;
        }
        Some(self.latest.clone().unwrap_or(found))
    }

    async fn observe(&self) -> Step<Observed> {
        let observed = Observed::read(&*self.context.node.runtime, &self.context.uid).await;
        observed.map_err(|error| format!("ask the runtime about the pod: {error}"))
    }

    fn now_ns(&self) -> i64 {
        i64::try_from(self.context.node.clock.now().as_nanosecond()).unwrap_or(i64::MAX)
    }

    /// Whether the pod may run here. A pod that has a sandbox already was let in before.
    async fn admit(&mut self, pod: &Arc<Pod>, observed: &Observed) -> Step<bool> {
        if self.admitted || !observed.sandboxes.is_empty() {
            self.admitted = true;
            return Ok(true);
        }
        let node = &self.context.node;
        let others: Vec<Arc<Pod>> = node.pods.list();
        let labels = node.node.get("", &node.config.node_name);
        let rejection = admission::check(
            pod,
            &others,
            labels.as_deref(),
            &node.machine.allocatable(&node.config),
            node.config.pods_max,
        );
        let Some(rejection) = rejection else {
            self.admitted = true;
            return Ok(true);
        };
        self.context.event(pod, EventType::Warning, rejection.reason, rejection.message.clone());
        self.rejected = true;
        let mut status = pod.status.clone().unwrap_or_default();
        status.phase = Some("Failed".to_owned());
        status.reason = Some(rejection.reason.to_owned());
        status.message = Some(format!("Pod was rejected: {}", rejection.message));
        status.start_time = status.start_time.or_else(|| Some(node.clock.time()));
        self.write(pod, &status).await?;
        Ok(false)
    }

    /// Grants what the pod asks for, if the node can, and brings its containers to what is granted. Returns the pod as
    /// granted, containers that want to be started anew for it, and when to try again what failed.
    async fn resize(
        &mut self,
        pod: &Arc<Pod>,
        observed: &Observed,
    ) -> (Arc<Pod>, Vec<plan::Kill>, Option<Instant>) {
        let Some(spec) = &pod.spec else { return (pod.clone(), Vec::new(), None) };
        let wanted = Grant::of(spec);
        let fresh = observed.containers.is_empty();
        let told = || if fresh { wanted.clone() } else { Grant::told(pod) };
        let before = self.grant.clone().unwrap_or_else(told);
        let mut progress = Progress::default();
        let mut granted = before.clone();
        if wanted != before {
            let node = &self.context.node;
            match resize::answer(pod, &node.pods.list(), &node.machine.allocatable(&node.config)) {
                Answer::Granted => granted = wanted,
                Answer::Deferred(message) => progress.pending = Some((resize::DEFERRED, message)),
                Answer::Infeasible(message) => progress.pending = Some((resize::INFEASIBLE, message)),
            }
        }
        let old = before.apply(pod);
        let pod_granted = granted.apply(pod);
        self.grant = Some(granted);
        let restart = self.act_on_resize(&old, &pod_granted, observed, &mut progress).await;
        let failed = progress.doing.as_ref().is_some_and(|message| !message.is_empty());
        self.tell_of_resize(pod, progress);
        (pod_granted, restart, failed.then(|| Instant::now() + resize::FAILED_RETRY))
    }

    async fn act_on_resize(
        &self,
        old: &Pod,
        granted: &Pod,
        observed: &Observed,
        progress: &mut Progress,
    ) -> Vec<plan::Kill> {
        let node = &self.context.node;
        let mut restart = Vec::new();
        let mut updates = Vec::new();
        let spec = granted.spec.iter();
        for container in spec.flat_map(|s| s.containers.iter().chain(s.init_containers.iter().flatten())) {
            let Some(seen) = observed.latest(&container.name).filter(|seen| seen.is_running()) else {
                continue;
            };
            match resize::change(granted, container, seen, node.machine.memory_bytes) {
                resize::Change::None => continue,
                resize::Change::Restart => {
                    progress.doing.get_or_insert_default();
                    restart.push(plan::Kill {
                        id: seen.status.id.clone(),
                        name: container.name.clone(),
                        message: format!("Container {} resize requires restart", container.name),
                        grace_s: None,
                    });
                }
                resize::Change::Update(step) => updates.push((container, seen, step)),
            }
            let statuses = granted.status.iter().flat_map(|s| {
                s.container_statuses.iter().flatten().chain(s.init_container_statuses.iter().flatten())
            });
            let has = statuses.filter(|s| s.name == container.name).find_map(|s| s.resources.clone());
            progress.behind.extend(has.map(|has| (container.name.clone(), has)));
        }
        if !updates.is_empty() {
            self.limit_group(old, granted, true);
        }
        for (container, seen, step) in updates {
            match self.update_container(&seen.status.id, &step.from, &step.to).await {
                Ok(()) => drop(progress.behind.remove(&container.name)),
                Err(error) => progress.doing = Some(error),
            }
        }
        if old.spec != granted.spec && progress.doing.is_none() {
            self.limit_group(granted, granted, false);
        }
        restart
    }

    async fn update_container(
        &self,
        id: &str,
        from: &v1::LinuxContainerResources,
        to: &v1::LinuxContainerResources,
    ) -> Step<()> {
        let runtime = &self.context.node.runtime;
        let (had, limit) = (from.memory_limit_in_bytes, to.memory_limit_in_bytes);
        if limit > 0 && (had == 0 || limit < had) {
            // The kernel would make room by killing.
            let stats = runtime.container_stats(id).await.ok();
            let usage = stats.and_then(|stats| stats.memory?.usage_bytes).map_or(0, |usage| usage.value);
            if usage >= limit.unsigned_abs() {
                return Err(format!(
                    "attempting to set container memory limit ({limit}) below current usage ({usage})"
                ));
            }
        }
        let updated = runtime.update_container_resources(id, to.clone()).await;
        updated.map_err(|error| format!("change the resources of container {id}: {error}"))
    }

    /// Sets the values of the pod's own group; with `roomy` to the larger ones of old and new, so that neither growing
    /// nor shrinking containers get stuck in it.
    fn limit_group(&self, old: &Pod, new: &Pod, roomy: bool) {
        let node = &self.context.node;
        let (Some(cgroups), Some(before), Some(after)) = (&node.cgroups, &old.spec, &new.spec) else {
            return;
        };
        if node.systemd_cgroups {
            return;
        }
        let (before, after) = (resources::pod_resources(before), resources::pod_resources(after));
        let values = if roomy { resize::roomier(&before, &after) } else { after };
        let path = resources::cgroup_parent(&node.config.cgroup_root, Qos::of(new), &self.context.uid, false);
        if let Err(error) = cgroups.update(&path, &values) {
            tracing::warn!(pod = %self.context.key, %error, "the pod's control group keeps its limits");
        }
    }

    /// Tells of a resize by events, once each; its conditions go with the status.
    fn tell_of_resize(&self, pod: &Arc<Pod>, progress: Progress) {
        let before = std::mem::replace(&mut self.context.state.lock().resize, progress.clone());
        if let Some((reason, message)) =
            progress.pending.as_ref().filter(|now| before.pending.as_ref() != Some(now))
        {
            let reason = if *reason == resize::DEFERRED { "ResizeDeferred" } else { "ResizeInfeasible" };
            self.context.event(pod, EventType::Warning, reason, message.clone());
        }
        let error = progress.doing.as_ref().filter(|message| !message.is_empty());
        if let Some(message) = error.filter(|_| before.doing != progress.doing) {
            self.context.event(pod, EventType::Warning, "ResizeError", message.clone());
        }
    }

    fn deadline(&self, pod: &Pod) -> Option<Instant> {
        let seconds = pod.spec.as_ref()?.active_deadline_seconds?;
        let started = pod.status.as_ref()?.start_time.as_ref()?.0;
        let at = started.saturating_add(jiff::SignedDuration::from_secs(seconds)).ok()?;
        Some(Instant::now() + self.context.node.clock.until(at))
    }

    fn make_plan(&self, pod: &Pod, observed: &Observed) -> plan::Plan {
        let probes = self.context.probes.lock().clone();
        let state = self.context.state.lock();
        plan::plan(&plan::Input {
            pod,
            observed,
            state: &state,
            probes: &probes,
            now: Instant::now(),
            now_ns: self.now_ns(),
        })
    }

    /// Sets a task to work on the plan; returns when to look again if it must wait.
    fn carry_out(&mut self, pod: &Arc<Pod>, observed: &Observed, mut plan: plan::Plan) -> Option<Instant> {
        let state_retry = self.context.state.lock().retry_at;
        if self.op.as_ref().is_some_and(|op| op.kind != OpKind::Start) {
            return None;
        }
        let grace = stop::grace(pod);
        if plan.kill_all && observed.running().next().is_some() {
            self.kill_all(pod, observed, grace);
            return None;
        }
        self.note_backoff(pod, &plan);
        if !plan.kill.is_empty() {
            let (context, pod, kills) = (self.context.clone(), pod.clone(), std::mem::take(&mut plan.kill));
            let work = async move {
                futures::future::join_all(kills.iter().map(|kill| stop::kill(&context, &pod, kill, grace)))
                    .await;
            };
            if self.kill.is_none() {
                self.kill = Some(self.begin(OpKind::Kill, work));
            }
            return None;
        }
        if (plan.start.is_empty() && plan.sandbox.is_none()) || self.op.is_some() {
            return None;
        }
        if let Some(at) = state_retry.filter(|at| *at > Instant::now()) {
            return Some(at);
        }
        let work = start::run(self.context.clone(), pod.clone(), observed.clone(), plan);
        self.op = Some(self.begin(OpKind::Start, work));
        None
    }

    /// Tells of containers that wait after a crash, once per crash.
    fn note_backoff(&self, pod: &Pod, plan: &plan::Plan) {
        for (name, waiting) in &plan.waiting {
            let news = self.context.state.lock().waiting.insert(name.clone(), waiting.clone()).as_ref()
                != Some(waiting);
            if news {
                let message =
                    format!("Back-off restarting failed container {name} in pod {}", names::display(pod));
                self.context.container_event(pod, name, EventType::Warning, "BackOff", message);
            }
        }
    }

    fn begin(&self, kind: OpKind, work: impl Future<Output = ()> + Send + 'static) -> Op {
        let wake = self.context.wake.clone();
        let done = Arc::new(AtomicBool::new(false));
        let told = done.clone();
        let task = tokio::spawn(async move {
            work.await;
            told.store(true, Ordering::Release);
            wake.notify_one();
        });
        Op { kind, task, done }
    }

    fn kill_all(&mut self, pod: &Arc<Pod>, observed: &Observed, grace_s: i64) {
        // A shorter grace period overtakes a longer one under way.
        if matches!(self.op.as_ref().map(|op| op.kind), Some(OpKind::KillAll(have)) if have <= grace_s) {
            return;
        }
        (self.op, self.kill) = (None, None);
        let work = stop::kill_all(self.context.clone(), pod.clone(), observed.clone(), grace_s);
        self.op = Some(self.begin(OpKind::KillAll(grace_s), work));
    }

    fn update_probes(&mut self, pod: &Arc<Pod>, observed: &Observed) {
        let now = Instant::now();
        let in_hook = self.context.state.lock().in_hook.clone();
        let host_network = pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or(false);
        let ips = if host_network { self.context.node.config.host_ips() } else { observed.pod_ips() };
        let containers: BTreeMap<&str, _> = pod
            .spec
            .iter()
            .flat_map(|spec| spec.containers.iter().chain(spec.init_containers.iter().flatten()))
            .map(|container| (container.name.as_str(), container))
            .collect();
        let clock = self.now_ns();
        let running =
            observed.running().filter(|seen| !in_hook.contains(&seen.status.id)).filter_map(|seen| {
                let ago = u64::try_from(clock.saturating_sub(seen.status.started_at)).unwrap_or(0);
                let started_at = now.checked_sub(Duration::from_nanos(ago)).unwrap_or(now);
                Some(Probed { container: containers.get(seen.name())?, id: &seen.status.id, started_at })
            });
        let running: Vec<Probed<'_>> = running.collect();
        self.probers.update(pod, ips.first().map_or("", String::as_str), &running);
    }

    /// Brings the files of a running pod up to date; returns when they are due again.
    async fn refresh_volumes(&mut self, pod: &Pod, observed: &Observed) -> Option<Instant> {
        let due = self.context.state.lock().volumes_due;
        let known = self.context.state.lock().volumes.is_some();
        // After a restart of ours nobody watches what the pod refers to, or its tokens, yet.
        let adopt = !known && self.op.is_none() && observed.running().next().is_some();
        let stale = (self.volumes_stale && known) || due.is_some_and(|at| at <= Instant::now()) || adopt;
        if !stale || self.op.as_ref().is_some_and(|op| op.kind == OpKind::Start) {
            return due.filter(|at| *at > Instant::now());
        }
        let references = start::references(&self.context, pod);
        references.wait().await;
        let host = self.context.node.host(observed.pod_ips());
        match start::set_up_volumes(&self.context, pod, &references, &host).await {
            Ok(_) => self.volumes_stale = false,
            Err(message) => {
                self.context.event(pod, EventType::Warning, "FailedMount", message);
                let at = Instant::now() + FAILED_RETRY * 5;
                self.context.state.lock().volumes_due = Some(at);
                self.volumes_stale = false;
            }
        }
        self.context.state.lock().volumes_due
    }

    /// Ends a pod the node has given up on.
    async fn fail(&mut self, pod: &Arc<Pod>, observed: &Observed) -> Step<Next> {
        self.probers.stop();
        if observed.running().next().is_some() {
            self.kill_all(pod, observed, stop::grace(pod));
            return Ok(Next::Wait(self.context.state.lock().retry_at));
        }
        self.op = None;
        self.publish(pod, observed, &BTreeMap::new(), true).await?;
        // The next pass finds the pod ended.
        self.context.wake.notify_one();
        Ok(Next::Wait(None))
    }

    /// A pod that has ended keeps its containers (for their logs) and nothing else.
    async fn rest(&mut self, pod: &Arc<Pod>, observed: &Observed) -> Step<Next> {
        self.probers.stop();
        if observed.running().next().is_some() {
            self.kill_all(pod, observed, stop::grace(pod));
            return Ok(Next::Wait(None));
        }
        self.op = None;
        self.release(observed).await?;
        if !self.rejected && !observed.containers.is_empty() {
            let now = self.observe().await?;
            self.publish(pod, &now, &BTreeMap::new(), true).await?;
        }
        Ok(Next::Wait(None))
    }

    async fn release(&mut self, observed: &Observed) -> Step<()> {
        if self.released {
            return Ok(());
        }
        stop::release(&self.context, observed).await?;
        stop::unmount(&self.context)?;
        self.context.state.lock().references = None;
        self.context.state.lock().volumes_due = None;
        self.released = true;
        Ok(())
    }

    /// A pod that is being deleted: stop it, tell how it ended, let the API forget it.
    async fn terminate(&mut self, pod: &Arc<Pod>, observed: &Observed) -> Step<Next> {
        if matches!(self.op.as_ref().map(|op| op.kind), Some(OpKind::Start)) {
            self.op = None;
        }
        if observed.running().next().is_some() {
            // Readiness still counts while a pod ends; liveness does not.
            self.kill_all(pod, observed, stop::grace(pod));
            self.publish(pod, observed, &BTreeMap::new(), true).await?;
            return Ok(Next::Wait(self.context.state.lock().retry_at));
        }
        self.probers.stop();
        self.op = None;
        self.release(observed).await?;
        if !self.rejected {
            let now = self.observe().await?;
            self.publish(pod, &now, &BTreeMap::new(), true).await?;
        }
        let api = Api::<Pod>::namespaced(self.context.node.client.clone(), &self.context.key.namespace);
        let preconditions = Preconditions { uid: Some(self.context.uid.clone()), resource_version: None };
        let params = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(preconditions),
            ..Default::default()
        };
        match api.delete(&self.context.key.name, &params).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
            Err(error) => return Err(format!("delete the pod from the API: {error}")),
        }
        stop::remove(&self.context, Some(pod), observed).await?;
        // Finalizers may keep the object; there is nothing left to do for it here.
        Ok(Next::Gone)
    }

    /// A pod the API does not know (any more).
    async fn take_down(&mut self, observed: &Observed) -> Step<Next> {
        self.probers.stop();
        if matches!(self.op.as_ref().map(|op| op.kind), Some(OpKind::Start)) {
            self.op = None;
        }
        let last = self.last_pod.clone().unwrap_or_else(|| Arc::new(self.orphan(observed)));
        if observed.running().next().is_some() {
            self.kill_all(&last, observed, stop::grace(&last));
            return Ok(Next::Wait(self.context.state.lock().retry_at));
        }
        self.op = None;
        self.release(observed).await?;
        stop::remove(&self.context, self.last_pod.as_deref(), observed).await?;
        Ok(Next::Gone)
    }

    /// A pod made up from what its sandbox says, to stop its containers with.
    fn orphan(&self, observed: &Observed) -> Pod {
        let (namespace, name) = stop::identity(observed)
            .unwrap_or_else(|| (self.context.key.namespace.clone(), self.context.key.name.clone()));
        let grace =
            observed.containers.first().and_then(|seen| seen.status.annotations.get(names::POD_GRACE));
        let mut pod = Pod::default();
        pod.metadata.namespace = Some(namespace);
        pod.metadata.name = Some(name);
        pod.metadata.uid = Some(self.context.uid.clone());
        pod.spec = Some(k8s_openapi::api::core::v1::PodSpec {
            termination_grace_period_seconds: grace.and_then(|text| text.parse().ok()),
            ..Default::default()
        });
        pod
    }

    /// Reads what ended containers left to say, once each.
    fn read_messages(&self, observed: &Observed) {
        let mut state = self.context.state.lock();
        state.messages.retain(|id, _| observed.containers.iter().any(|seen| seen.status.id == *id));
        for seen in observed.containers.iter().filter(|seen| seen.has_exited()) {
            if !state.messages.contains_key(&seen.status.id) {
                state.messages.insert(seen.status.id.clone(), message(&seen.status));
            }
        }
    }

    async fn publish(
        &mut self,
        pod: &Arc<Pod>,
        observed: &Observed,
        waiting: &BTreeMap<String, super::Waiting>,
        stopping: bool,
    ) -> Step<()> {
        let mut pod = pod.clone();
        for _ in 0..CONFLICTS_MAX {
            let status = self.compute(&pod, observed, waiting, stopping);
            match self.write(&pod, &status).await? {
                Written::Done => return Ok(()),
                Written::Conflict(fresh) => pod = fresh,
            }
        }
        Err("status not written: others keep writing the pod".to_owned())
    }

    fn compute(
        &self,
        pod: &Arc<Pod>,
        observed: &Observed,
        waiting: &BTreeMap<String, super::Waiting>,
        stopping: bool,
    ) -> PodStatus {
        let node = &self.context.node;
        let granted = self.grant.as_ref().map(|grant| grant.apply(pod));
        let pod = granted.as_ref().unwrap_or(pod);
        let probes = self.context.probes.lock().clone();
        let state = self.context.state.lock();
        let failure = self.failure.as_ref().map(|(reason, message)| (reason.as_str(), message.as_str()));
        status::status(&status::Input {
            pod,
            observed,
            state: &state,
            probes: &probes,
            waiting,
            runtime_name: &node.runtime_name,
            host_ips: &node.config.host_ips(),
            now: node.clock.time(),
            stopping,
            failure,
        })
    }

    /// Writes a status if it differs from the pod's.
    async fn write(&mut self, pod: &Arc<Pod>, status: &PodStatus) -> Step<Written> {
        let old =
            pod.status.as_ref().map_or(json!({}), |status| serde_json::to_value(status).unwrap_or_default());
        let new = serde_json::to_value(status).unwrap_or_default();
        let change = merge_diff(&old, &new);
        if change == Value::Null {
            return Ok(Written::Done);
        }
        let version = &pod.metadata.resource_version;
        let patch =
            json!({"metadata": {"uid": self.context.uid, "resourceVersion": version}, "status": change});
        let api = Api::<Pod>::namespaced(self.context.node.client.clone(), &self.context.key.namespace);
        let name = &self.context.key.name;
        match api.patch_status(name, &PatchParams::default(), &Patch::Merge(patch)).await {
            Ok(pod) => {
                self.latest = Some(Arc::new(pod));
                Ok(Written::Done)
            }
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(Written::Done),
            Err(kube::Error::Api(status)) if status.code == 409 => match api.get(name).await {
                Ok(fresh) if names::uid(&fresh) == self.context.uid => Ok(Written::Conflict(Arc::new(fresh))),
                Ok(_) => Ok(Written::Done),
                Err(kube::Error::Api(status)) if status.code == 404 => Ok(Written::Done),
                Err(error) => Err(format!("read the pod after a conflict: {error}")),
            },
            Err(error) => Err(format!("write the pod's status: {error}")),
        }
    }
}

enum Written {
    Done,
    /// Someone else wrote first; this is the pod now.
    Conflict(Arc<Pod>),
}

fn version(pod: &Pod) -> u64 {
    pod.metadata.resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or(0)
}

fn earliest(a: Option<Instant>, b: Option<Instant>) -> Option<Instant> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// What a container that ended has to say: its message file, or the end of its log.
fn message(status: &v1::ContainerStatus) -> String {
    let annotation = |key: &str| status.annotations.get(key).map(String::as_str).unwrap_or_default();
    let file = annotation(names::MESSAGE_FILE);
    let text = if file.is_empty() { String::new() } else { tail(file, MESSAGE_BYTES_MAX) };
    let from_log = annotation(names::MESSAGE_POLICY) == "FallbackToLogsOnError" && status.exit_code != 0;
    if !text.is_empty() || !from_log {
        return text;
    }
    crate::logs::tail_text(std::path::Path::new(&status.log_path), MESSAGE_LOG_BYTES_MAX as usize)
}

/// The last bytes of a file; nothing if it cannot be read.
fn tail(path: &str, bytes_max: u64) -> String {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = std::fs::File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(bytes_max)))?;
        let mut bytes = Vec::new();
        file.take(bytes_max).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    read().map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}
