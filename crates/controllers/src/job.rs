//! Job: runs pods until enough have succeeded, or too much went wrong. Every ended pod is counted exactly once: it
//! carries a finalizer until the status says that it was counted. Upstream's `pkg/controller/job`.

mod finish;
mod indexes;
mod orphans;
mod policy;
mod tracking;
mod ttl;

pub use orphans::start_orphans;
pub use ttl::start_ttl;

use crate::family::{Family, PodOwner, retry_with_more_room};
use crate::pods::{self, PodControl};
use crate::{Context, util};
use futures::future::{BoxFuture, join_all};
use indexes::Indexes;
use jiff::Timestamp;
use k8s_openapi::api::batch::v1::{Job, JobCondition, JobSpec, JobStatus};
use k8s_openapi::api::core::v1::{EnvVar, EnvVarSource, Namespace, ObjectFieldSelector, Pod};
use knarr_client::owner::{self, Claim};
use knarr_client::selector::Selector;
use knarr_client::{Controller, Error, EventType, Informer, ObjectKey, Reconcile, Recorder, Requeue, Result};
use kube::api::Api;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

const FINALIZER: &str = "batch.kubernetes.io/job-tracking";
const INDEX: &str = "batch.kubernetes.io/job-completion-index";
const INDEX_FAILURES: &str = "batch.kubernetes.io/job-index-failure-count";
/// Pods with our finalizer, by the key of their job, also when that is gone.
const TRACKED: &str = "tracked";
/// Pods created or deleted in one turn at most.
const BURST: usize = 500;
/// Delays after failures: doubled with each since the last success.
const BACKOFF_BASE: Duration = Duration::from_secs(10);
const BACKOFF_MAX: Duration = Duration::from_secs(10 * 60);

pub fn start(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let jobs = context.informers.get::<Job>();
    let all_pods = context.informers.get::<Pod>();
    let namespaces = context.informers.get::<Namespace>();
    all_pods.add_index(TRACKED, |pod| {
        let key = owner::controller_key::<Job>(&pod.metadata).filter(|_| is_tracked(pod));
        key.map(|key| key.to_string()).into_iter().collect()
    });
    let recorder = context.recorder.for_component("job-controller");
    let this = Arc::new(Jobs {
        family: Family::new(
            context.clone(),
            jobs.clone(),
            PodControl::new(context.client.clone(), recorder.clone()),
        ),
        recorder,
        namespaces: namespaces.clone(),
        written: Mutex::default(),
        context,
    });
    let (observer, in_it) = (this.clone(), jobs.clone());
    let controller = retry_with_more_room(&this.context, Controller::new("job"))
        .watch_changes(&namespaces, move |change| {
            let began = ends(change.object()) && change.old().is_some_and(|old| !ends(old));
            let name = change.object().metadata.name.as_deref().unwrap_or_default();
            let jobs = if began { in_it.list_in(name) } else { Vec::new() };
            jobs.iter().map(|job| ObjectKey::of(&**job)).collect()
        })
        .watch(&jobs)
        .watch_changes(&all_pods, move |change| observer.family.pod_changed(change));
    Box::pin(controller.run(this, shutdown))
}

fn is_tracked(pod: &Pod) -> bool {
    pod.metadata.finalizers.iter().flatten().any(|finalizer| finalizer == FINALIZER)
}

impl PodOwner for Job {
    fn selector(&self) -> Result<Selector> {
        match self.spec.as_ref().and_then(|spec| spec.selector.as_ref()) {
            Some(selector) => Selector::new(selector),
            None => Err(Error::terminal("read job", "spec.selector is missing")),
        }
    }
}

struct Jobs {
    context: Context,
    recorder: Recorder,
    family: Family<Job>,
    namespaces: Informer<Namespace>,
    /// The version of each job's last status of ours: deciding by an older one would count pods twice or not at all.
    written: Mutex<HashMap<ObjectKey, u64>>,
}

/// One turn over one job.
struct Turn {
    key: ObjectKey,
    job: Arc<Job>,
    spec: JobSpec,
    /// The status as it will be written.
    status: JobStatus,
    pods: Vec<Arc<Pod>>,
    /// Nothing will be created in its namespace any more.
    is_last: bool,
    now: Timestamp,
}

fn ends(namespace: &Namespace) -> bool {
    namespace.metadata.deletion_timestamp.is_some()
}

impl Reconcile for Jobs {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let job = self.family.owners.get_key(&key);
        self.untrack_strangers(&key, job.as_deref()).await?;
        let Some(job) = job else {
            self.family.expectations.forget(&key);
            self.written.lock().remove(&key);
            return Ok(Requeue::Done);
        };
        let foreign = job.spec.as_ref().and_then(|spec| spec.managed_by.as_deref());
        if foreign.is_some_and(|manager| manager != "kubernetes.io/job-controller")
            || self.is_stale(&key, &job)
        {
            return Ok(Requeue::Done);
        }
        if is_finished(&job) {
            self.untrack_all(&self.family.pods.by_index(TRACKED, &key.to_string())).await?;
            return Ok(Requeue::Done);
        }
        if let Some(wait) = self.family.expectations.pending(&key) {
            return Ok(Requeue::After(wait));
        }
        let pods = self.claim(&job).await?;
        let Some(spec) = job.spec.clone() else { return Ok(Requeue::Done) };
        let status = job.status.clone().unwrap_or_default();
        let is_last = self.namespaces.get("", &key.namespace).is_some_and(|namespace| ends(&namespace));
        self.turn(Turn { key, job, spec, status, pods, is_last, now: self.context.clock.now() }).await
    }
}

impl Jobs {
    fn is_stale(&self, key: &ObjectKey, job: &Job) -> bool {
        let version =
            job.metadata.resource_version.as_deref().and_then(|version| version.parse::<u64>().ok());
        let written = self.written.lock().get(key).copied();
        version.zip(written).is_some_and(|(version, written)| version < written)
    }

    async fn claim(&self, job: &Job) -> Result<Vec<Arc<Pod>>> {
        let mut claimed = Vec::new();
        for (claim, pod) in self.family.sort(job)? {
            match claim {
                Claim::Keep => claimed.push(pod),
                Claim::Release => {
                    self.untrack(&pod).await?;
                    owner::release(&self.context.client, pods::uid(&job.metadata), &*pod).await?;
                }
                Claim::Adopt if self.family.still_exists(job).await? => {
                    // An adopted pod that runs is counted when it ends, so it must be tracked like ours.
                    let pod = owner::adopt(&self.context.client, job, &*pod).await?;
                    claimed.push(Arc::new(self.track(pod).await?));
                }
                Claim::Adopt | Claim::Ignore => {}
            }
        }
        Ok(claimed)
    }

    fn api(&self, key: &ObjectKey) -> Api<Job> {
        Api::namespaced(self.context.client.clone(), &key.namespace)
    }

    async fn turn(&self, mut turn: Turn) -> Result<Requeue> {
        self.note_start(&mut turn);
        if !turn.is_suspended() {
            // Before the deadline is judged: a resumed job starts its time again.
            self.note_suspension(&mut turn);
        }
        let mut requeue = turn.deadline_check();
        let tally = tracking::tally(&turn);
        let verdict = finish::judge(&turn, &tally);
        let mut active = tally.active.len() as i32;
        let mut failure = None;
        match &verdict {
            Some(verdict) => {
                finish::note_interim(&mut turn, verdict);
                self.delete_active(&turn, &tally).await?;
                active = 0;
            }
            None if turn.job.metadata.deletion_timestamp.is_some() => {}
            None => {
                match self.manage(&turn, &tally).await {
                    Ok((now_active, again)) => {
                        active = now_active;
                        requeue = requeue.sooner(again);
                    }
                    // Pods that ended are counted also while no new ones can be made.
                    Err(error) => failure = Some(error),
                }
                self.note_suspension(&mut turn);
            }
        }
        turn.status.active = Some(active).filter(|count| *count > 0);
        turn.status.ready = Some(tally.active.iter().filter(|pod| pods::is_ready(pod)).count() as i32);
        turn.status.terminating = Some(tally.terminating as i32);
        self.account(&mut turn, &tally, verdict.as_ref()).await?;
        failure.map_or(Ok(requeue), Err)
    }

    fn note_start(&self, turn: &mut Turn) {
        if turn.status.start_time.is_none() && !turn.is_suspended() {
            turn.status.start_time = Some(self.context.clock.time());
        }
    }

    /// Says in a condition, and by an event, that the job was suspended or resumed.
    fn note_suspension(&self, turn: &mut Turn) {
        let known =
            util::find(&turn.status.conditions, "Suspended").map(|condition| condition.status.clone());
        let (status, reason, message) = match (turn.is_suspended(), known.as_deref()) {
            (true, Some("True")) | (false, None | Some("False")) => return,
            (true, _) => ("True", "JobSuspended", "Job suspended"),
            (false, Some(_)) => ("False", "JobResumed", "Job resumed"),
        };
        if status == "False" {
            // Time spent suspended does not count against the deadline.
            turn.status.start_time = Some(self.context.clock.time());
        }
        util::remove(&mut turn.status.conditions, "Suspended");
        let condition = condition("Suspended", status, reason, message, &self.context);
        turn.status.conditions.get_or_insert_default().push(condition);
        let event = if status == "True" { "Suspended" } else { "Resumed" };
        self.recorder.event(&*turn.job, EventType::Normal, event, message);
    }

    /// Creates or deletes pods so that as many run as should; how many run afterwards, and when to look again.
    async fn manage(&self, turn: &Turn, tally: &tracking::Tally) -> Result<(i32, Requeue)> {
        let active = tally.active.len();
        if turn.is_suspended() {
            let removed = self.remove(turn, tally.active.clone()).await?;
            return Ok(((active - removed) as i32, Requeue::Done));
        }
        let wanted = turn.wanted_active(tally);
        let surplus = turn.surplus(tally, wanted);
        if !surplus.is_empty() {
            let removed = self.remove(turn, surplus).await?;
            return Ok(((active - removed) as i32, Requeue::Done));
        }
        // With the policy `Failed` a terminating pod still holds its place.
        let held = if turn.replaces_only_failed() { tally.terminating } else { 0 };
        let missing = wanted.saturating_sub(active + held).min(BURST);
        if missing == 0 {
            return Ok((active as i32, Requeue::Done));
        }
        let created = match turn.completions_if_indexed() {
            Some(completions) => self.create_indexed(turn, tally, completions, missing).await?,
            None => {
                let wait = turn.backoff(&turn.pods);
                if !wait.is_zero() {
                    return Ok((active as i32, Requeue::After(wait)));
                }
                (self.create(turn, vec![None; missing]).await?, Requeue::Done)
            }
        };
        Ok(((active + created.0) as i32, created.1))
    }

    async fn create_indexed(
        &self,
        turn: &Turn,
        tally: &tracking::Tally,
        completions: i32,
        missing: usize,
    ) -> Result<(usize, Requeue)> {
        let mut requeue = Requeue::Done;
        let mut wanted = Vec::new();
        let whole_job = if turn.spec.backoff_limit_per_index.is_none() {
            turn.backoff(&turn.pods)
        } else {
            Duration::ZERO
        };
        if !whole_job.is_zero() {
            return Ok((0, Requeue::After(whole_job)));
        }
        for index in tally.pending_indexes(turn, completions) {
            if wanted.len() >= missing {
                break;
            }
            if turn.spec.backoff_limit_per_index.is_some() {
                let own: Vec<_> =
                    turn.pods.iter().filter(|pod| index_of(pod) == Some(index)).cloned().collect();
                let wait = turn.backoff(&own);
                if !wait.is_zero() {
                    requeue = requeue.sooner(Requeue::After(wait));
                    continue;
                }
            }
            wanted.push(Some(index));
        }
        Ok((self.create(turn, wanted).await?, requeue))
    }

    /// Creates pods (for indexes, where the job has them); how many.
    async fn create(&self, turn: &Turn, wanted: Vec<Option<i32>>) -> Result<usize> {
        let pod_for = |index: Option<i32>| {
            let reference = owner::controller_ref(&*turn.job);
            let mut pod = pods::from_template(&turn.spec.template, &turn.job.metadata, reference);
            pod.metadata.finalizers.get_or_insert_default().push(FINALIZER.to_owned());
            if let Some(index) = index {
                give_index(&mut pod, turn, index);
            }
            pod
        };
        self.family.create(&turn.job, wanted.into_iter().map(pod_for).collect()).await
    }

    /// Deletes pods that were never meant to end: they are not counted.
    async fn remove(&self, turn: &Turn, surplus: Vec<Arc<Pod>>) -> Result<usize> {
        let count = surplus.len().min(BURST);
        let removals = surplus.into_iter().take(count).map(|pod| async move {
            self.untrack(&pod).await?;
            self.family.delete(&turn.job, [pod]).await
        });
        join_all(removals).await.into_iter().collect::<Result<()>>()?;
        Ok(count)
    }

    /// The job is over: what still runs is ended; it is counted like any other pod.
    async fn delete_active(&self, turn: &Turn, tally: &tracking::Tally) -> Result<()> {
        self.family.delete(&turn.job, tally.active.iter().take(BURST).cloned()).await
    }
}

impl Turn {
    fn is_suspended(&self) -> bool {
        self.spec.suspend.unwrap_or(false)
    }

    fn completions_if_indexed(&self) -> Option<i32> {
        let indexed = self.spec.completion_mode.as_deref() == Some("Indexed");
        self.spec.completions.filter(|_| indexed)
    }

    fn replaces_only_failed(&self) -> bool {
        self.spec.pod_replacement_policy.as_deref() == Some("Failed")
            || self.spec.pod_failure_policy.is_some()
    }

    /// How many pods should run now.
    fn wanted_active(&self, tally: &tracking::Tally) -> usize {
        let parallelism = usize::try_from(self.spec.parallelism.unwrap_or(1)).unwrap_or(0);
        match self.spec.completions {
            // A work queue: once one pod succeeded no new ones start.
            None if tally.succeeded > 0 => tally.active.len().min(parallelism),
            None => parallelism,
            Some(completions) => {
                let failed = tally.failed_indexes.as_ref().map_or(0, Indexes::len) as i32;
                let left = (completions - tally.succeeded - failed).max(0);
                parallelism.min(usize::try_from(left).unwrap_or(0))
            }
        }
    }

    /// Active pods to remove: of indexes that are done or taken twice, and those beyond the wish.
    fn surplus(&self, tally: &tracking::Tally, wanted: usize) -> Vec<Arc<Pod>> {
        let mut surplus = Vec::new();
        let mut keep = tally.active.clone();
        if let Some(completions) = self.completions_if_indexed() {
            let mut taken = Indexes::default();
            keep.sort_by_key(|pod| {
                (!pods::is_ready(pod), pod.metadata.creation_timestamp.as_ref().map(|t| t.0))
            });
            keep.retain(|pod| {
                let index = index_of(pod).filter(|index| *index < completions && !tally.is_done(*index));
                let fine = index.is_some_and(|index| taken.insert(index));
                if !fine {
                    surplus.push(pod.clone());
                }
                fine
            });
        }
        if keep.len() > wanted {
            let beyond = keep.len() - wanted;
            pods::rank_for_deletion(&mut keep, self.now, |_| 0);
            surplus.extend(keep.into_iter().take(beyond));
        }
        surplus
    }

    /// How long to wait before another pod may be created: doubled with every failure since the last success.
    fn backoff(&self, pods: &[Arc<Pod>]) -> Duration {
        let ended = |pod: &Arc<Pod>| ended_at(pod);
        let last_success = pods.iter().filter(|pod| pods::phase(pod) == "Succeeded").filter_map(ended).max();
        let failures = pods.iter().filter(|pod| tracking::counts_as_failed(self, pod)).filter_map(ended);
        let since: Vec<Timestamp> =
            failures.filter(|at| last_success.is_none_or(|success| *at > success)).collect();
        let Some(last) = since.iter().max() else { return Duration::ZERO };
        let doublings = (since.len() as u32 - 1).min(10);
        let delay = BACKOFF_BASE.saturating_mul(1 << doublings).min(BACKOFF_MAX);
        let passed = Duration::try_from(self.now.duration_since(*last)).unwrap_or(Duration::ZERO);
        delay.saturating_sub(passed)
    }

    fn deadline_check(&self) -> Requeue {
        let deadline = self.spec.active_deadline_seconds.zip(self.status.start_time.as_ref());
        let Some((seconds, start)) = deadline.filter(|_| !self.is_suspended()) else { return Requeue::Done };
        let due = start.0.saturating_add(jiff::SignedDuration::from_secs(seconds)).unwrap_or(Timestamp::MAX);
        Duration::try_from(due.duration_since(self.now))
            .map_or(Requeue::Done, |left| if left.is_zero() { Requeue::Done } else { Requeue::After(left) })
    }
}

/// When the pod's last container ended, or when it was deleted.
fn ended_at(pod: &Pod) -> Option<Timestamp> {
    let statuses = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref());
    let states =
        statuses.into_iter().flatten().filter_map(|status| status.state.as_ref()?.terminated.as_ref());
    let finished = states.filter_map(|state| state.finished_at.as_ref().map(|time| time.0)).max();
    let deleted = || pod.metadata.deletion_timestamp.as_ref().map(|time| time.0);
    let changed = || {
        let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
        conditions
            .into_iter()
            .flatten()
            .filter_map(|c| c.last_transition_time.as_ref().map(|time| time.0))
            .max()
    };
    let created = || pod.metadata.creation_timestamp.as_ref().map(|time| time.0);
    finished.or_else(deleted).or_else(changed).or_else(created)
}

/// The completion index a pod works on.
fn index_of(pod: &Pod) -> Option<i32> {
    pod.metadata.annotations.as_ref()?.get(INDEX)?.parse().ok().filter(|index| *index >= 0)
}

/// How often the pod's index had failed before it.
fn failures_before(pod: &Pod) -> i32 {
    let text = pod.metadata.annotations.as_ref().and_then(|annotations| annotations.get(INDEX_FAILURES));
    text.and_then(|text| text.parse().ok()).unwrap_or(0)
}

fn give_index(pod: &mut Pod, turn: &Turn, index: i32) {
    let job = turn.job.metadata.name.as_deref().unwrap_or_default();
    pod.metadata.generate_name = Some(format!("{job}-{index}-"));
    pod.metadata.annotations.get_or_insert_default().insert(INDEX.to_owned(), index.to_string());
    pod.metadata.labels.get_or_insert_default().insert(INDEX.to_owned(), index.to_string());
    if turn.spec.backoff_limit_per_index.is_some() {
        let of_index = turn.pods.iter().filter(|pod| index_of(pod) == Some(index));
        let failed = of_index.filter(|pod| tracking::counts_as_failed(turn, pod));
        let failures = failed.map(|pod| failures_before(pod) + 1).max().unwrap_or(0);
        pod.metadata
            .annotations
            .get_or_insert_default()
            .insert(INDEX_FAILURES.to_owned(), failures.to_string());
    }
    let Some(spec) = pod.spec.as_mut() else { return };
    spec.hostname = Some(format!("{job}-{index}"));
    let field = ObjectFieldSelector { field_path: format!("metadata.labels['{INDEX}']"), api_version: None };
    let variable = EnvVar {
        name: "JOB_COMPLETION_INDEX".to_owned(),
        value_from: Some(EnvVarSource { field_ref: Some(field), ..Default::default() }),
        ..Default::default()
    };
    for container in spec.init_containers.iter_mut().flatten().chain(&mut spec.containers) {
        let env = container.env.get_or_insert_default();
        if !env.iter().any(|known| known.name == variable.name) {
            env.push(variable.clone());
        }
    }
}

fn condition(type_: &str, status: &str, reason: &str, message: &str, context: &Context) -> JobCondition {
    let now = context.clock.time();
    JobCondition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message.to_owned()),
        last_probe_time: Some(now.clone()),
        last_transition_time: Some(now),
    }
}

/// How the job ended: whether it succeeded; `None` while it has not ended.
pub fn outcome(job: &Job) -> Option<bool> {
    let conditions = job.status.as_ref().and_then(|status| status.conditions.clone());
    let failed = || util::is_true(&conditions, "Failed").then_some(false);
    util::is_true(&conditions, "Complete").then_some(true).or_else(failed)
}

/// Complete or failed, for good.
fn is_finished(job: &Job) -> bool {
    outcome(job).is_some()
}

#[cfg(test)]
mod tests;
