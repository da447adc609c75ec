//! CronJob: starts a job at each time of its schedule. Upstream's `pkg/controller/cronjob` (the second version).
//!
//! A job's name is made from its time, so that a time is never served twice, whoever crashes when.

use crate::job;
use crate::{Context, pods};
use futures::future::BoxFuture;
use jiff::{SignedDuration, Timestamp, tz::TimeZone};
use k8s_openapi::api::batch::v1::{CronJob, CronJobSpec, CronJobStatus, Job};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use knarr_api::cron::{self, Schedule};
use knarr_client::patch::{self, Guard};
use knarr_client::{
    Controller, During, EventType, Informer, ObjectKey, Reconcile, Recorder, Requeue, Result, ignore_gone,
    or_none, owner, reference_to,
};
use kube::api::{Api, DeleteParams, PostParams};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// The time a job was due, for the job to read.
const SCHEDULED: &str = "batch.kubernetes.io/cronjob-scheduled-timestamp";
/// More missed times than this hint at a clock or a schedule gone wrong.
const MISSED_MAX: usize = 100;
/// Jobs are due on whole seconds: look a moment later.
const MOMENT: Duration = Duration::from_millis(100);

pub fn start(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let crons = context.informers.get::<CronJob>();
    let jobs = context.informers.get::<Job>();
    pods::index_by_controller(&jobs);
    let recorder = context.recorder.for_component("cronjob-controller");
    let this = Arc::new(CronJobs { crons: crons.clone(), jobs: jobs.clone(), recorder, context });
    let controller = Controller::new("cronjob")
        .watch(&crons)
        .watch_map(&jobs, |job| owner::controller_key::<CronJob>(&job.metadata).into_iter().collect());
    Box::pin(controller.run(this, shutdown))
}

struct CronJobs {
    context: Context,
    recorder: Recorder,
    crons: Informer<CronJob>,
    jobs: Informer<Job>,
}

impl Reconcile for CronJobs {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let Some(cron) = self.crons.get_key(&key) else { return Ok(Requeue::Done) };
        let spec = &cron.spec;
        let jobs = self.jobs.by_index(pods::BY_CONTROLLER, pods::uid(&cron.metadata));
        self.clean_up(&cron, spec, &jobs).await?;
        let mut status = cron.status.clone().unwrap_or_default();
        self.note_endings(&cron, &mut status, &jobs).await?;
        let requeue = self.start_due(&cron, spec, &mut status, &jobs).await;
        // What was found out is written even when starting failed.
        let api: Api<CronJob> = Api::namespaced(self.context.client.clone(), &key.namespace);
        ignore_gone(patch::write_status(&api, &*cron, &cron.status, &status, Guard::Version).await)?;
        requeue
    }
}

impl CronJobs {
    fn job_api(&self, cron: &CronJob) -> Api<Job> {
        let namespace = cron.metadata.namespace.as_deref().unwrap_or_default();
        Api::namespaced(self.context.client.clone(), namespace)
    }

    fn warn(&self, cron: &CronJob, reason: &str, message: String) {
        self.recorder.event(cron, EventType::Warning, reason, message);
    }

    fn tell(&self, cron: &CronJob, reason: &str, message: String) {
        self.recorder.event(cron, EventType::Normal, reason, message);
    }

    /// Deletes ended jobs beyond the limits, oldest first.
    async fn clean_up(&self, cron: &CronJob, spec: &CronJobSpec, jobs: &[Arc<Job>]) -> Result<()> {
        let limits = [(true, spec.successful_jobs_history_limit), (false, spec.failed_jobs_history_limit)];
        for (succeeded, limit) in limits {
            let Some(limit) = limit else { continue };
            let mut ended: Vec<_> = jobs.iter().filter(|job| job::outcome(job) == Some(succeeded)).collect();
            ended.sort_by_key(|job| job.status.as_ref().and_then(|s| s.start_time.as_ref().map(|t| t.0)));
            let surplus = ended.len().saturating_sub(usize::try_from(limit).unwrap_or(0));
            for job in ended.into_iter().take(surplus) {
                self.delete(cron, job).await?;
            }
        }
        Ok(())
    }

    async fn delete(&self, cron: &CronJob, job: &Job) -> Result<()> {
        let name = job.metadata.name.as_deref().unwrap_or_default();
        let deleted = self.job_api(cron).delete(name, &DeleteParams::background()).await;
        match deleted.during(|| format!("delete job {name}")) {
            Ok(_) => {
                self.tell(cron, "SuccessfulDelete", format!("Deleted job {name}"));
                Ok(())
            }
            Err(error) if error.is_not_found() => Ok(()),
            Err(error) => {
                let why = pods::message_of(&error);
                self.warn(cron, "FailedDelete", format!("Deleted job: {why}"));
                Err(error)
            }
        }
    }

    /// Takes jobs off the list of active ones that have ended or gone.
    async fn note_endings(
        &self,
        cron: &CronJob,
        status: &mut CronJobStatus,
        jobs: &[Arc<Job>],
    ) -> Result<()> {
        let mut active = status.active.take().unwrap_or_default();
        for job in jobs {
            let (uid, name) = (&job.metadata.uid, job.metadata.name.as_deref().unwrap_or_default());
            let listed = active.iter().any(|reference| reference.uid == *uid);
            let outcome = job::outcome(job);
            if !listed && outcome.is_none() {
                let message = format!("Saw a job that the controller did not create or forgot: {name}");
                self.warn(cron, "UnexpectedJob", message);
            }
            if listed && let Some(succeeded) = outcome {
                active.retain(|reference| reference.uid != *uid);
                let how = if succeeded { "Complete" } else { "Failed" };
                let message = format!("Saw completed job: {name}, condition: {how}");
                self.tell(cron, "SawCompletedJob", message);
            }
            let completed = job.status.as_ref().and_then(|status| status.completion_time.clone());
            if outcome == Some(true)
                && completed.as_ref().map(|t| t.0) > status.last_successful_time.as_ref().map(|t| t.0)
            {
                status.last_successful_time = completed;
            }
        }
        let known = |uid: &Option<String>| jobs.iter().any(|job| job.metadata.uid == *uid);
        for reference in std::mem::take(&mut active) {
            // One that the cache has not shown yet still exists: the server knows.
            let name = reference.name.clone().unwrap_or_default();
            if known(&reference.uid)
                || or_none(self.job_api(cron).get(&name).await.during(|| format!("read job {name}")))?
                    .is_some_and(|job| job.metadata.uid == reference.uid)
            {
                active.push(reference);
            } else {
                self.tell(cron, "MissingJob", format!("Active job went missing: {name}"));
            }
        }
        status.active = (!active.is_empty()).then_some(active);
        Ok(())
    }

    /// Starts the job that is due, if any, and says when the next is.
    async fn start_due(
        &self,
        cron: &CronJob,
        spec: &CronJobSpec,
        status: &mut CronJobStatus,
        jobs: &[Arc<Job>],
    ) -> Result<Requeue> {
        let zone = spec.time_zone.as_deref();
        if cron.metadata.deletion_timestamp.is_some() || spec.suspend == Some(true) {
            return Ok(Requeue::Done);
        }
        if let Some(zone) = zone.filter(|zone| !cron::is_time_zone(zone)) {
            self.warn(
                cron,
                "UnknownTimeZone",
                format!("invalid timeZone: {zone:?}: unknown time zone {zone}"),
            );
            return Ok(Requeue::Done);
        }
        let schedule = match Schedule::parse(&spec.schedule, zone) {
            Ok(schedule) => schedule,
            Err(why) => {
                let message = format!("unparseable schedule: {:?} : {why}", spec.schedule);
                self.warn(cron, "UnparseableSchedule", message);
                return Ok(Requeue::Done);
            }
        };
        let now = self.context.clock.now();
        let again = schedule
            .next(now)
            .map_or(Requeue::Done, |next| Requeue::After(self.context.clock.until(next) + MOMENT));
        let last = status.last_schedule_time.as_ref().map(|time| time.0);
        let Some(due) = self.most_recent(cron, spec, last, &schedule, now) else { return Ok(again) };
        let deadline = spec.starting_deadline_seconds.map(SignedDuration::from_secs);
        if deadline.is_some_and(|deadline| due.checked_add(deadline).is_ok_and(|latest| latest < now)) {
            let time = due.to_zoned(TimeZone::UTC).strftime("%a, %d %b %Y %H:%M:%S %z").to_string();
            self.warn(cron, "MissSchedule", format!("Missed scheduled time to start a job: {time}"));
            return Ok(again);
        }
        let active = status.active.as_ref().map_or(0, Vec::len);
        match spec.concurrency_policy.as_deref() {
            Some("Forbid") if active > 0 => {
                let message =
                    "Not starting job because prior execution is running and concurrency policy is Forbid";
                self.tell(cron, "JobAlreadyActive", message.to_owned());
                // When that execution ends its event wakes us; the missed time is served then, within the deadline.
                return Ok(again);
            }
            Some("Replace") => {
                for reference in status.active.take().into_iter().flatten() {
                    if let Some(job) = jobs.iter().find(|job| job.metadata.uid == reference.uid) {
                        self.delete(cron, job).await?;
                    }
                }
            }
            _ => {}
        }
        self.start_job(cron, spec, status, due).await?;
        Ok(again)
    }

    /// The latest time that is due and was not served yet.
    fn most_recent(
        &self,
        cron: &CronJob,
        spec: &CronJobSpec,
        last: Option<Timestamp>,
        schedule: &Schedule,
        now: Timestamp,
    ) -> Option<Timestamp> {
        let created = cron.metadata.creation_timestamp.as_ref().map_or(now, |time| time.0);
        let mut since = last.unwrap_or(created);
        let deadline = spec.starting_deadline_seconds.map(SignedDuration::from_secs);
        if let Some(start) = deadline.and_then(|deadline| now.checked_sub(deadline).ok()) {
            since = since.max(start);
        }
        let mut due = schedule.next(since).filter(|time| *time <= now)?;
        for _ in 1..MISSED_MAX {
            match schedule.next(due).filter(|time| *time <= now) {
                Some(next) => due = next,
                None => return Some(due),
            }
        }
        let message =
            "too many missed start times. Set or decrease .spec.startingDeadlineSeconds or check clock skew";
        self.warn(cron, "TooManyMissedTimes", message.to_owned());
        Some(latest_before(schedule, due, now))
    }

    async fn start_job(
        &self,
        cron: &CronJob,
        spec: &CronJobSpec,
        status: &mut CronJobStatus,
        due: Timestamp,
    ) -> Result<()> {
        let wanted = job_for(cron, spec, due);
        let name = wanted.metadata.name.clone().unwrap_or_default();
        let created = self.job_api(cron).create(&PostParams::default(), &wanted).await;
        let job = match created.during(|| format!("create job {name}")) {
            Ok(job) => {
                self.tell(cron, "SuccessfulCreate", format!("Created job {name}"));
                job
            }
            Err(error) if error.is_already_exists() => {
                let api = self.job_api(cron);
                let existing = or_none(api.get(&name).await.during(|| format!("read job {name}")))?;
                match existing {
                    // Ours, from a turn that ended before it could write its status.
                    Some(job) if owner::is_controlled_by(&job.metadata, pods::uid(&cron.metadata)) => job,
                    _ => return Err(error),
                }
            }
            Err(error) if error.is_namespace_terminating() => return Ok(()),
            Err(error) => {
                self.warn(cron, "FailedCreate", format!("Error creating job: {}", pods::message_of(&error)));
                return Err(error);
            }
        };
        status.last_schedule_time = Some(Time(due));
        let active = status.active.get_or_insert_default();
        if job::outcome(&job).is_none() && !active.iter().any(|known| known.uid == job.metadata.uid) {
            active.push(reference_to(&job));
        }
        Ok(())
    }
}

/// The last time up to `now`, found by halving: a schedule of every minute that slept for a year has half a million.
fn latest_before(schedule: &Schedule, from: Timestamp, now: Timestamp) -> Timestamp {
    let (mut low, mut high) = (from, now);
    while high.duration_since(low) > SignedDuration::from_secs(1) {
        let middle = low.checked_add(high.duration_since(low) / 2).unwrap_or(high);
        match schedule.next(middle).filter(|time| *time <= now) {
            Some(later) => low = later,
            None => high = middle,
        }
    }
    low
}

fn job_for(cron: &CronJob, spec: &CronJobSpec, due: Timestamp) -> Job {
    let template = spec.job_template.metadata.clone().unwrap_or_default();
    let mut annotations: BTreeMap<String, String> = template.annotations.unwrap_or_default();
    let zone = spec.time_zone.as_deref().and_then(|zone| TimeZone::get(zone).ok()).unwrap_or(TimeZone::UTC);
    let offset = if zone == TimeZone::UTC { "%Y-%m-%dT%H:%M:%SZ" } else { "%Y-%m-%dT%H:%M:%S%:z" };
    annotations.insert(SCHEDULED.to_owned(), due.to_zoned(zone).strftime(offset).to_string());
    let name = cron.metadata.name.as_deref().unwrap_or_default();
    Job {
        metadata: ObjectMeta {
            name: Some(format!("{name}-{}", due.as_second() / 60)),
            namespace: cron.metadata.namespace.clone(),
            labels: template.labels,
            annotations: Some(annotations),
            owner_references: Some(vec![owner::controller_ref(cron)]),
            ..Default::default()
        },
        spec: spec.job_template.spec.clone(),
        status: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::Harness;
    use knarr_client::testing::Faults;
    use serde_json::{Value, json};

    fn cron(more: Value) -> Value {
        let mut cron = json!({"metadata": {"name": "tick"}, "spec": {
            "schedule": "*/1 * * * *", "timeZone": "Etc/UTC",
            "jobTemplate": {"metadata": {"labels": {"of": "tick"}}, "spec": {"template": {"spec": {
                "containers": [{"name": "c"}], "restartPolicy": "Never",
            }}}},
        }});
        for (name, value) in more.as_object().unwrap() {
            cron["spec"][name] = value.clone();
        }
        cron
    }

    async fn finish(harness: &Harness, name: &str) {
        let now = harness.context.clock.time();
        let done = json!({
            "startTime": now, "completionTime": now, "conditions": [{"type": "Complete", "status": "True"}],
        });
        harness.patch_status::<Job>(name, done).await;
    }

    fn names(jobs: &[Job]) -> Vec<String> {
        jobs.iter().filter_map(|job| job.metadata.name.clone()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn each_minute_has_exactly_one_job_under_faults() {
        for seed in 0..10 {
            let faults = Faults { conflict: 0.2, error: 0.2, drop_watch: 0.3, duplicate: 0.3 };
            let harness = Harness::new(seed, faults);
            harness.start(start);
            harness.create::<CronJob>(cron(json!({}))).await;
            let jobs = harness.api.wait_for::<Job>("5 jobs", |jobs| jobs.len() == 5).await;
            let mut minutes: Vec<i64> =
                names(&jobs).iter().map(|name| name.rsplit('-').next().unwrap().parse().unwrap()).collect();
            minutes.sort_unstable();
            assert!(minutes.windows(2).all(|pair| pair[1] == pair[0] + 1), "seed {seed}: {minutes:?}");
            assert!(jobs[0].metadata.annotations.as_ref().unwrap().contains_key(SCHEDULED));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn ended_jobs_beyond_the_limit_go_and_the_last_success_is_told() {
        let harness = Harness::quiet();
        harness.start(start);
        harness.create::<CronJob>(cron(json!({"successfulJobsHistoryLimit": 1}))).await;
        let first = names(&harness.api.wait_for::<Job>("a job", |jobs| jobs.len() == 1).await).remove(0);
        finish(&harness, &first).await;
        let jobs = harness.api.wait_for::<Job>("a second", |jobs| jobs.len() == 2).await;
        let second = names(&jobs).into_iter().find(|name| *name != first).unwrap();
        finish(&harness, &second).await;
        harness.api.wait_for::<Job>("the first is gone", |jobs| !names(jobs).contains(&first)).await;
        let told = |crons: &[CronJob]| crons[0].status.as_ref().unwrap().last_successful_time.is_some();
        harness.api.wait_for::<CronJob>("the last success", told).await;
    }

    #[tokio::test(start_paused = true)]
    async fn forbid_waits_for_the_running_job_and_replace_ends_it() {
        for (policy, expected) in [("Forbid", 1), ("Replace", 1), ("Allow", 3)] {
            let harness = Harness::quiet();
            harness.start(start);
            harness.create::<CronJob>(cron(json!({"concurrencyPolicy": policy}))).await;
            let first = names(&harness.api.wait_for::<Job>("a job", |jobs| jobs.len() == 1).await);
            tokio::time::sleep(Duration::from_secs(121)).await;
            let jobs = harness.api.objects::<Job>();
            assert_eq!(jobs.len(), expected, "{policy}");
            assert_eq!(names(&jobs).contains(&first[0]), policy != "Replace", "{policy}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_suspended_or_senseless_schedule_starts_nothing() {
        for more in
            [json!({"suspend": true}), json!({"schedule": "every day"}), json!({"timeZone": "Moon/Crater"})]
        {
            let harness = Harness::quiet();
            harness.start(start);
            harness.create::<CronJob>(cron(more)).await;
            tokio::time::sleep(Duration::from_secs(300)).await;
            assert!(harness.api.objects::<Job>().is_empty());
        }
    }

    #[test]
    fn the_latest_missed_time_is_found_without_counting() {
        let schedule = Schedule::parse("*/5 * * * *", Some("UTC")).unwrap();
        let (from, now) = ("2020-01-01T00:00:00Z".parse().unwrap(), "2026-01-01T00:03:00Z".parse().unwrap());
        assert_eq!(latest_before(&schedule, from, now).to_string(), "2026-01-01T00:00:00Z");
    }
}
