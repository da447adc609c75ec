//! When a job is over, and why. A verdict is first told as an interim condition (`SuccessCriteriaMet`,
//! `FailureTarget`); the final one follows when every pod has ended and is counted.

use super::Turn;
use super::policy::{self, Meaning};
use super::tracking::{self, Tally};
use crate::{pods, util};
use jiff::SignedDuration;
use k8s_openapi::api::batch::v1::JobCondition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

/// Why a job is over.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    pub succeeded: bool,
    pub reason: String,
    pub message: String,
}

impl Verdict {
    fn failed(reason: &str, message: impl Into<String>) -> Option<Self> {
        Some(Verdict { succeeded: false, reason: reason.to_owned(), message: message.into() })
    }

    fn succeeded(reason: &str, message: impl Into<String>) -> Option<Self> {
        Some(Verdict { succeeded: true, reason: reason.to_owned(), message: message.into() })
    }
}

/// The verdict, if there is one: that told before, or the first reason in upstream's order.
pub fn judge(turn: &Turn, tally: &Tally) -> Option<Verdict> {
    told(turn)
        .or_else(|| fail_job_rule(turn))
        .or_else(|| {
            policy::success(turn, &tally.completed_indexes)
                .and_then(|text| Verdict::succeeded("SuccessPolicy", text))
        })
        .or_else(|| too_many_failures(turn, tally))
        .or_else(|| too_late(turn))
        .or_else(|| failed_indexes(turn, tally))
        .or_else(|| completed(turn, tally))
}

fn told(turn: &Turn) -> Option<Verdict> {
    let interim = [("SuccessCriteriaMet", true), ("FailureTarget", false)];
    interim.into_iter().find_map(|(type_, succeeded)| {
        let condition =
            util::find(&turn.status.conditions, type_).filter(|condition| condition.status == "True")?;
        let text = |field: &Option<String>| field.clone().unwrap_or_default();
        Some(Verdict { succeeded, reason: text(&condition.reason), message: text(&condition.message) })
    })
}

fn fail_job_rule(turn: &Turn) -> Option<Verdict> {
    turn.spec.pod_failure_policy.as_ref()?;
    let failed = turn.pods.iter().filter(|pod| tracking::counts_as_failed(turn, pod));
    failed.into_iter().find_map(|pod| match policy::meaning(turn, pod) {
        Meaning::FailJob(message) => Verdict::failed("PodFailurePolicy", message),
        _ => None,
    })
}

fn too_many_failures(turn: &Turn, tally: &Tally) -> Option<Verdict> {
    let default = if turn.spec.backoff_limit_per_index.is_some() { i32::MAX } else { 6 };
    let limit = turn.spec.backoff_limit.unwrap_or(default);
    if tally.failed > limit || restarts_exceed(turn, tally, limit) {
        return Verdict::failed("BackoffLimitExceeded", "Job has reached the specified backoff limit");
    }
    None
}

/// Where containers restart in place, their restarts count.
fn restarts_exceed(turn: &Turn, tally: &Tally, limit: i32) -> bool {
    let spec = turn.spec.template.spec.as_ref();
    if spec.and_then(|spec| spec.restart_policy.as_deref()) != Some("OnFailure") {
        return false;
    }
    let running = tally.active.iter().filter_map(|pod| pod.status.as_ref());
    let restarts: i32 = running
        .flat_map(|status| {
            status.init_container_statuses.iter().flatten().chain(status.container_statuses.iter().flatten())
        })
        .map(|status| status.restart_count)
        .sum();
    if limit == 0 { restarts > 0 } else { restarts >= limit }
}

fn too_late(turn: &Turn) -> Option<Verdict> {
    let (seconds, start) = turn.spec.active_deadline_seconds.zip(turn.status.start_time.as_ref())?;
    let passed = turn.now.duration_since(start.0);
    if turn.is_suspended() || passed < SignedDuration::from_secs(seconds) {
        return None;
    }
    Verdict::failed("DeadlineExceeded", "Job was active longer than specified deadline")
}

fn failed_indexes(turn: &Turn, tally: &Tally) -> Option<Verdict> {
    let failed = tally.failed_indexes.as_ref().filter(|failed| !failed.is_empty())?;
    if turn.spec.max_failed_indexes.is_some_and(|most| failed.len() as i32 > most) {
        let message = "Job has exceeded the specified maximal number of failed indexes";
        return Verdict::failed("MaxFailedIndexesExceeded", message);
    }
    let completions = turn.completions_if_indexed()?;
    if (failed.len() + tally.completed_indexes.len()) as i32 >= completions {
        return Verdict::failed("FailedIndexes", "Job has failed indexes");
    }
    None
}

fn completed(turn: &Turn, tally: &Tally) -> Option<Verdict> {
    let done = match turn.spec.completions {
        // A work queue is done when a pod succeeded and the others have ended.
        None => tally.succeeded > 0 && tally.active.is_empty(),
        Some(completions) => tally.succeeded >= completions,
    };
    let suspended = turn.is_suspended() && turn.spec.completions != Some(0);
    if !done || suspended {
        return None;
    }
    Verdict::succeeded("CompletionsReached", "Reached expected number of succeeded pods")
}

/// Tells the verdict before the pods have ended.
pub fn note_interim(turn: &mut Turn, verdict: &Verdict) {
    let type_ = if verdict.succeeded { "SuccessCriteriaMet" } else { "FailureTarget" };
    add(turn, type_, verdict);
}

/// Tells it for good.
pub fn note_final(turn: &mut Turn, verdict: &Verdict) {
    add(turn, if verdict.succeeded { "Complete" } else { "Failed" }, verdict);
    if verdict.succeeded {
        turn.status.completion_time = Some(time(turn));
    }
}

fn add(turn: &mut Turn, type_: &str, verdict: &Verdict) {
    if util::find(&turn.status.conditions, type_).is_some() {
        return;
    }
    let now = time(turn);
    turn.status.conditions.get_or_insert_default().push(JobCondition {
        type_: type_.to_owned(),
        status: "True".to_owned(),
        reason: Some(verdict.reason.clone()),
        message: Some(verdict.message.clone()),
        last_probe_time: Some(now.clone()),
        last_transition_time: Some(now),
    });
}

fn time(turn: &Turn) -> Time {
    Time(jiff::Timestamp::from_second(turn.now.as_second()).unwrap_or(turn.now))
}

/// Whether the final word may be said: nothing runs, nothing is ending, everything is counted.
pub fn may_finish(turn: &Turn) -> bool {
    let running = turn.pods.iter().any(|pod| !pods::is_finished(pod));
    let uncounted = turn.status.uncounted_terminated_pods.as_ref().is_some_and(|uncounted| {
        uncounted.succeeded.iter().flatten().chain(uncounted.failed.iter().flatten()).next().is_some()
    });
    !running && !uncounted
}
