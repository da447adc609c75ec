//! The two strategies: rolling update, and recreate; and what remains of old sets afterwards.

use super::annotations::revision;
use super::scale::{At, max_unavailable, new_replicas, set_at};
use super::status::is_complete;
use super::{Deployments, Rollout, name, replicas};
use crate::pods;
use crate::replicaset::replicas as size;
use k8s_openapi::api::apps::v1::ReplicaSet;
use knarr_client::{During, Requeue, Result, ignore_gone};
use kube::api::DeleteParams;

impl Deployments {
    /// One step of a rolling update: grow the new set as far as surge allows, else shrink the old ones as far as
    /// availability allows.
    pub(super) async fn roll(&self, rollout: &mut Rollout) -> Result<Requeue> {
        self.sync_revision(rollout, true).await?;
        if self.grow_new(rollout).await? || self.shrink_old(rollout).await? {
            return self.sync_rollout_status(rollout).await;
        }
        self.finish(rollout).await
    }

    /// All old pods end before the first new one starts.
    pub(super) async fn recreate(&self, rollout: &mut Rollout) -> Result<Requeue> {
        self.sync_revision(rollout, false).await?;
        let mut shrunk = false;
        for index in 0..rollout.old.len() {
            if size(&rollout.old[index]) > 0 {
                shrunk |= self.resize(rollout, At::Old(index), 0).await?;
            }
        }
        if shrunk || self.old_pods_run(rollout) {
            return self.sync_rollout_status(rollout).await;
        }
        if rollout.new.is_none() {
            self.sync_revision(rollout, true).await?;
        }
        if rollout.new.is_some() {
            let wanted = replicas(&rollout.deployment);
            self.resize(rollout, At::New, wanted).await?;
        }
        self.finish(rollout).await
    }

    async fn finish(&self, rollout: &mut Rollout) -> Result<Requeue> {
        if is_complete(&rollout.deployment, &rollout.deployment.status.clone().unwrap_or_default()) {
            self.clean_up(rollout).await?;
        }
        self.sync_rollout_status(rollout).await
    }

    async fn grow_new(&self, rollout: &mut Rollout) -> Result<bool> {
        let Some(new) = &rollout.new else { return Ok(false) };
        let wanted = replicas(&rollout.deployment);
        let target =
            if size(new) > wanted { wanted } else { new_replicas(&rollout.deployment, rollout.all(), new) };
        if target == size(new) {
            return Ok(false);
        }
        self.resize(rollout, At::New, target).await
    }

    async fn shrink_old(&self, rollout: &mut Rollout) -> Result<bool> {
        let Some(new) = &rollout.new else { return Ok(false) };
        if rollout.old.iter().map(size).sum::<i32>() == 0 {
            return Ok(false);
        }
        let all: i32 = rollout.all().map(size).sum();
        let min_available = replicas(&rollout.deployment) - max_unavailable(&rollout.deployment);
        let new_unavailable = size(new) - available(new);
        let room = all - min_available - new_unavailable;
        if room <= 0 {
            return Ok(false);
        }
        let unhealthy = self.shrink_unhealthy(rollout, room).await?;
        let healthy = self.shrink_healthy(rollout, min_available).await?;
        Ok(unhealthy + healthy > 0)
    }

    /// Pods of old sets that are not available go first: losing them costs nothing. `rollout.old` is in order of
    /// creation.
    async fn shrink_unhealthy(&self, rollout: &mut Rollout, room: i32) -> Result<i32> {
        let mut total = 0;
        for index in 0..rollout.old.len() {
            let set = &rollout.old[index];
            let unavailable = size(set) - available(set);
            let count = unavailable.min(room - total);
            if count <= 0 {
                continue;
            }
            let target = size(set) - count;
            self.resize(rollout, At::Old(index), target).await?;
            total += count;
        }
        Ok(total)
    }

    async fn shrink_healthy(&self, rollout: &mut Rollout, min_available: i32) -> Result<i32> {
        // What the step before just gave up was unavailable anyway.
        let room = rollout.all().map(available).sum::<i32>() - min_available;
        let mut total = 0;
        for index in 0..rollout.old.len() {
            let count = size(&rollout.old[index]).min(room - total);
            if count <= 0 {
                continue;
            }
            let target = size(set_at(rollout, At::Old(index))) - count;
            self.resize(rollout, At::Old(index), target).await?;
            total += count;
        }
        Ok(total)
    }

    fn old_pods_run(&self, rollout: &Rollout) -> bool {
        let counted =
            rollout.old.iter().any(|set| set.status.as_ref().is_some_and(|status| status.replicas > 0));
        let runs = |set: &ReplicaSet| {
            let pods = self.pods.by_index(pods::BY_CONTROLLER, pods::uid(&set.metadata));
            pods.iter().any(|pod| !pods::is_finished(pod))
        };
        counted || rollout.old.iter().any(runs)
    }

    /// Deletes old sets beyond the history limit, oldest revision first.
    pub(super) async fn clean_up(&self, rollout: &mut Rollout) -> Result<()> {
        let limit =
            rollout.deployment.spec.as_ref().and_then(|spec| spec.revision_history_limit).unwrap_or(10);
        let mut candidates: Vec<&ReplicaSet> =
            rollout.old.iter().filter(|set| set.metadata.deletion_timestamp.is_none()).collect();
        let surplus = candidates.len().saturating_sub(usize::try_from(limit).unwrap_or(0));
        candidates.sort_by_key(|set| revision(set));
        let mut deleted = Vec::new();
        for set in candidates.into_iter().take(surplus).filter(|set| is_empty_and_observed(set)) {
            let api = self.api::<ReplicaSet>(&rollout.deployment);
            let set_name = name(&set.metadata);
            let result = api.delete(set_name, &DeleteParams::background()).await;
            ignore_gone(result.during(|| format!("delete old replica set {set_name}")))?;
            deleted.push(set.metadata.uid.clone());
        }
        rollout.old.retain(|set| !deleted.contains(&set.metadata.uid));
        Ok(())
    }
}

/// The pods of a set that will stay available. A set that was just made smaller still tells of the pods it is
/// about to delete: counting on those (as upstream does) would let go more than `maxUnavailable`.
fn available(set: &ReplicaSet) -> i32 {
    let told = set.status.as_ref().and_then(|status| status.available_replicas).unwrap_or(0);
    told.min(size(set))
}

fn is_empty_and_observed(set: &ReplicaSet) -> bool {
    let status = set.status.clone().unwrap_or_default();
    let observed = status.observed_generation.unwrap_or(0) >= set.metadata.generation.unwrap_or(0);
    status.replicas == 0 && size(set) == 0 && observed
}
