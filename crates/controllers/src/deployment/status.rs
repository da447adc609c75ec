//! What a deployment tells of itself: counts, and the conditions Available, Progressing and ReplicaFailure.

use super::scale::max_unavailable;
use super::{Deployments, Rollout, name, paused, replicas};
use crate::replicaset::replicas as size;
use crate::util::{self, remove};
use jiff::SignedDuration;
use k8s_openapi::api::apps::v1::{
    Deployment, DeploymentCondition, DeploymentStatus, ReplicaSet, ReplicaSetStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use knarr_client::{Requeue, Result};
use std::time::Duration;

const PROGRESSING: &str = "Progressing";
const TIMED_OUT: &str = "ProgressDeadlineExceeded";
const NEW_SET_AVAILABLE: &str = "NewReplicaSetAvailable";

pub fn find<'a>(deployment: &'a Deployment, type_: &str) -> Option<&'a DeploymentCondition> {
    util::find(&deployment.status.as_ref()?.conditions, type_)
}

/// The seconds without progress after which a roll-out counts as stuck; `None` for no limit.
fn deadline(deployment: &Deployment) -> Option<i32> {
    deployment.spec.as_ref()?.progress_deadline_seconds.filter(|seconds| *seconds != i32::MAX)
}

pub fn has_deadline(deployment: &Deployment) -> bool {
    deadline(deployment).is_some()
}

pub fn condition(type_: &str, status: &str, reason: &str, message: String, now: Time) -> DeploymentCondition {
    DeploymentCondition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message),
        last_transition_time: Some(now.clone()),
        last_update_time: Some(now),
    }
}

/// Puts a condition into the list. The same status for the same reason is no news; the same status for another
/// reason keeps the transition time.
pub fn set(status: &mut DeploymentStatus, mut condition: DeploymentCondition) {
    if let Some(old) = util::find(&status.conditions, &condition.type_) {
        if old.status == condition.status && old.reason == condition.reason {
            return;
        }
        if old.status == condition.status {
            condition.last_transition_time = old.last_transition_time.clone();
        }
    }
    remove(&mut status.conditions, &condition.type_);
    status.conditions.get_or_insert_default().push(condition);
}

/// Every replica is of the new template and available.
pub fn is_complete(deployment: &Deployment, status: &DeploymentStatus) -> bool {
    let wanted = Some(replicas(deployment));
    let or_zero = |count: Option<i32>| Some(count.unwrap_or(0));
    or_zero(status.updated_replicas) == wanted
        && or_zero(status.replicas) == wanted
        && or_zero(status.available_replicas) == wanted
        && status.observed_generation >= deployment.metadata.generation
}

fn is_progressing(old: &DeploymentStatus, new: &DeploymentStatus) -> bool {
    let count = |count: Option<i32>| count.unwrap_or(0);
    let outdated = |status: &DeploymentStatus| count(status.replicas) - count(status.updated_replicas);
    count(new.updated_replicas) > count(old.updated_replicas)
        || outdated(new) < outdated(old)
        || count(new.ready_replicas) > count(old.ready_replicas)
        || count(new.available_replicas) > count(old.available_replicas)
}

impl Deployments {
    /// Says in the Progressing condition that a deployment is paused or resumed.
    pub(super) async fn note_pause(&self, rollout: &mut Rollout) -> Result<()> {
        let deployment = &rollout.deployment;
        let reason = find(deployment, PROGRESSING).and_then(|condition| condition.reason.as_deref());
        if !has_deadline(deployment) || reason == Some(TIMED_OUT) {
            return Ok(());
        }
        let (reason, message) = match (paused(deployment), reason == Some("DeploymentPaused")) {
            (true, false) => ("DeploymentPaused", "Deployment is paused"),
            (false, true) => ("DeploymentResumed", "Deployment is resumed"),
            _ => return Ok(()),
        };
        self.write_progress(rollout, "Unknown", reason, message.to_owned()).await
    }

    /// Counts and availability only: what is told of a deployment that is paused, scaled or deleted.
    pub(super) async fn sync_status(&self, rollout: &mut Rollout) -> Result<Requeue> {
        let new = self.calculate(rollout);
        self.write_deployment_status(rollout, new).await?;
        Ok(Requeue::Done)
    }

    /// Counts, availability, progress and failures of a roll-out.
    pub(super) async fn sync_rollout_status(&self, rollout: &mut Rollout) -> Result<Requeue> {
        let mut new = self.calculate(rollout);
        if has_deadline(&rollout.deployment) {
            self.judge_progress(rollout, &mut new);
        } else {
            remove(&mut new.conditions, PROGRESSING);
        }
        match replica_failure(rollout) {
            Some(failure) => set(&mut new, failure),
            None => remove(&mut new.conditions, "ReplicaFailure"),
        }
        self.write_deployment_status(rollout, new).await?;
        Ok(self.deadline_check(&rollout.deployment))
    }

    fn judge_progress(&self, rollout: &Rollout, new: &mut DeploymentStatus) {
        let deployment = &rollout.deployment;
        let current = find(deployment, PROGRESSING).cloned();
        let current_reason = current.as_ref().and_then(|condition| condition.reason.as_deref());
        let was_complete = new.replicas == new.updated_replicas && current_reason == Some(NEW_SET_AVAILABLE);
        if was_complete {
            return;
        }
        let subject = match &rollout.new {
            Some(set) => format!("ReplicaSet {:?}", name(&set.metadata)),
            None => format!("Deployment {:?}", name(&deployment.metadata)),
        };
        let now = self.context.clock.time();
        let old = deployment.status.clone().unwrap_or_default();
        if is_complete(deployment, new) {
            let message = format!("{subject} has successfully progressed.");
            set(new, condition(PROGRESSING, "True", NEW_SET_AVAILABLE, message, now));
        } else if is_progressing(&old, new) {
            let mut progress = condition(
                PROGRESSING,
                "True",
                "ReplicaSetUpdated",
                format!("{subject} is progressing."),
                now,
            );
            if let Some(current) = current.filter(|current| current.status == "True") {
                progress.last_transition_time = current.last_transition_time;
            }
            // Removed first, so that the update time moves although status and reason stay: it restarts the deadline.
            remove(&mut new.conditions, PROGRESSING);
            set(new, progress);
        } else if self.timed_out(deployment, new) {
            let message = format!("{subject} has timed out progressing.");
            set(new, condition(PROGRESSING, "False", TIMED_OUT, message, now));
        }
    }

    fn timed_out(&self, deployment: &Deployment, new: &DeploymentStatus) -> bool {
        let Some(condition) = util::find(&new.conditions, PROGRESSING) else { return false };
        match condition.reason.as_deref() {
            Some(NEW_SET_AVAILABLE) => false,
            Some(TIMED_OUT) => true,
            _ => {
                time_left(deployment, condition, self.context.clock.now()).is_some_and(|left| left.is_zero())
            }
        }
    }

    /// When to look whether an unfinished roll-out is stuck.
    fn deadline_check(&self, deployment: &Deployment) -> Requeue {
        let Some(condition) = find(deployment, PROGRESSING) else { return Requeue::Done };
        let status = deployment.status.clone().unwrap_or_default();
        if paused(deployment)
            || is_complete(deployment, &status)
            || condition.reason.as_deref() == Some(TIMED_OUT)
            || (condition.reason.as_deref() == Some(NEW_SET_AVAILABLE)
                && status.replicas == status.updated_replicas)
        {
            return Requeue::Done;
        }
        // A second later, because the times are in whole seconds.
        time_left(deployment, condition, self.context.clock.now())
            .map_or(Requeue::Done, |left| Requeue::After(left + Duration::from_secs(1)))
    }

    fn calculate(&self, rollout: &Rollout) -> DeploymentStatus {
        let deployment = &rollout.deployment;
        let sum = |count: fn(&ReplicaSetStatus) -> i32| {
            rollout.all().filter_map(|set| set.status.as_ref()).map(count).sum::<i32>()
        };
        let available = sum(|status| status.available_replicas.unwrap_or(0));
        let wished: i32 = rollout.all().map(size).sum();
        let old = deployment.status.clone().unwrap_or_default();
        let mut status = DeploymentStatus {
            observed_generation: deployment.metadata.generation,
            replicas: Some(sum(|status| status.replicas)),
            updated_replicas: Some(rollout.new.as_ref().map_or(0, actual)),
            ready_replicas: Some(sum(|status| status.ready_replicas.unwrap_or(0))),
            available_replicas: Some(available),
            unavailable_replicas: Some((wished - available).max(0)),
            terminating_replicas: Some(sum(|status| status.terminating_replicas.unwrap_or(0))),
            collision_count: old.collision_count,
            conditions: old.conditions,
        };
        let enough = available >= replicas(deployment) - max_unavailable(deployment);
        let (condition_status, reason, message) = if enough {
            ("True", "MinimumReplicasAvailable", "Deployment has minimum availability.")
        } else {
            ("False", "MinimumReplicasUnavailable", "Deployment does not have minimum availability.")
        };
        let now = self.context.clock.time();
        set(&mut status, condition("Available", condition_status, reason, message.to_owned(), now));
        status
    }
}

fn actual(set: &ReplicaSet) -> i32 {
    set.status.as_ref().map_or(0, |status| status.replicas)
}

/// Zero when the deadline has passed.
fn time_left(
    deployment: &Deployment,
    condition: &DeploymentCondition,
    now: jiff::Timestamp,
) -> Option<Duration> {
    let seconds = deadline(deployment)?;
    let from = condition.last_update_time.as_ref()?.0;
    let due = from.saturating_add(SignedDuration::from_secs(seconds.into())).unwrap_or(jiff::Timestamp::MAX);
    Some(Duration::try_from(due.duration_since(now)).unwrap_or(Duration::ZERO))
}

/// The first failure among the sets, the new one's before the old ones'.
fn replica_failure(rollout: &Rollout) -> Option<DeploymentCondition> {
    let sets = rollout.new.iter().chain(&rollout.old);
    let failure =
        sets.filter_map(|set| util::find(&set.status.as_ref()?.conditions, "ReplicaFailure")).next()?;
    let time = failure.last_transition_time.clone();
    Some(DeploymentCondition {
        type_: "ReplicaFailure".to_owned(),
        status: failure.status.clone(),
        reason: failure.reason.clone(),
        message: failure.message.clone(),
        last_transition_time: time.clone(),
        last_update_time: time,
    })
}
