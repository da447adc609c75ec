//! Sizes: how many replicas each set may have. Pure arithmetic, then the writes.

use super::annotations::{self, DESIRED, MAX};
use super::{Deployments, Rollout, created, name, replicas, strategy};
use crate::replicaset::replicas as size;
use crate::util::scaled;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use knarr_client::{EventType, Result};

/// Surge and unavailability in pods. Both zero would never move: then one may be unavailable.
fn limits(deployment: &Deployment) -> (i32, i32) {
    let rolling = deployment.spec.as_ref().and_then(|spec| spec.strategy.as_ref()?.rolling_update.as_ref());
    let default = IntOrString::String("25%".to_owned());
    let surge = rolling.and_then(|rolling| rolling.max_surge.as_ref()).unwrap_or(&default);
    let unavailable = rolling.and_then(|rolling| rolling.max_unavailable.as_ref()).unwrap_or(&default);
    let desired = replicas(deployment);
    match (scaled(surge, desired, true), scaled(unavailable, desired, false)) {
        (0, 0) => (0, 1),
        limits => limits,
    }
}

/// Pods above the wish a rolling update may have.
pub fn max_surge(deployment: &Deployment) -> i32 {
    if strategy(deployment) == "Recreate" { 0 } else { limits(deployment).0 }
}

/// Pods below the wish that may be unavailable.
pub fn max_unavailable(deployment: &Deployment) -> i32 {
    if strategy(deployment) == "Recreate" || replicas(deployment) == 0 {
        return 0;
    }
    limits(deployment).1.min(replicas(deployment))
}

/// The size the new set should have now.
pub fn new_replicas<'a>(
    deployment: &Deployment,
    all: impl Iterator<Item = &'a ReplicaSet>,
    new: &ReplicaSet,
) -> i32 {
    if strategy(deployment) == "Recreate" {
        return replicas(deployment);
    }
    let current: i32 = all.map(size).sum();
    let room = replicas(deployment) + max_surge(deployment) - current;
    if room <= 0 {
        return size(new);
    }
    size(new) + room.min(replicas(deployment) - size(new))
}

/// Whether the deployment's size changed since its active sets were sized.
pub fn is_scaling_event(rollout: &Rollout) -> bool {
    let active = rollout.all().filter(|set| size(set) > 0);
    active
        .filter_map(|set| annotations::number(set, DESIRED))
        .any(|desired| desired != replicas(&rollout.deployment))
}

/// How many pods `set` gains or loses when `to_add` are spread in proportion to size and `added` are spread already.
fn proportion(set: &ReplicaSet, rollout: &Rollout, to_add: i32, added: i32) -> i32 {
    if size(set) == 0 || to_add == 0 || to_add == added {
        return 0;
    }
    let share = fraction(set, rollout);
    let left = to_add - added;
    if to_add > 0 { share.min(left) } else { share.max(left) }
}

fn fraction(set: &ReplicaSet, rollout: &Rollout) -> i32 {
    let deployment = &rollout.deployment;
    if replicas(deployment) == 0 {
        return -size(set);
    }
    let max_now = replicas(deployment) + max_surge(deployment);
    let recorded = deployment.status.as_ref().and_then(|status| status.replicas);
    let max_before = annotations::number(set, MAX).or(recorded).filter(|max| *max > 0);
    let Some(max_before) = max_before else { return 0 };
    let new = f64::from(size(set)) * f64::from(max_now) / f64::from(max_before);
    new.round() as i32 - size(set)
}

/// The sizes of active sets after spreading a change of the deployment's size, in the order given.
fn spread(rollout: &Rollout, active: &[&ReplicaSet], to_add: i32) -> Vec<i32> {
    let mut added = 0;
    let mut sizes: Vec<i32> = active
        .iter()
        .map(|set| {
            let share = proportion(set, rollout, to_add, added);
            added += share;
            size(set) + share
        })
        .collect();
    if let Some(first) = sizes.first_mut().filter(|_| to_add != 0) {
        *first = (*first + to_add - added).max(0);
    }
    sizes
}

impl Deployments {
    /// Brings the sets to a changed size of the deployment without moving the roll-out forward.
    pub(super) async fn scale(&self, rollout: &mut Rollout) -> Result<()> {
        if let Some(only) = active_or_latest(rollout) {
            let wanted = replicas(&rollout.deployment);
            // A set that has the size keeps its annotations too: they are refreshed when it is sized.
            if size(set_at(rollout, only)) != wanted || rollout.all().filter(|set| size(set) > 0).count() == 1
            {
                self.resize(rollout, only, wanted).await?;
            }
            return Ok(());
        }
        if is_saturated(rollout) {
            for index in 0..rollout.old.len() {
                if size(&rollout.old[index]) > 0 {
                    self.resize(rollout, At::Old(index), 0).await?;
                }
            }
            return Ok(());
        }
        if strategy(&rollout.deployment) == "Recreate" {
            return Ok(());
        }
        let (order, sizes) = proportional(rollout);
        for (at, size) in order.into_iter().zip(sizes) {
            self.resize(rollout, at, size).await?;
        }
        Ok(())
    }

    /// Sizes a set, refreshes its size annotations, and tells of it. Whether the size changed.
    pub(super) async fn resize(&self, rollout: &mut Rollout, at: At, wanted: i32) -> Result<bool> {
        let set = set_at(rollout, at).clone();
        let before = size(&set);
        let mut new = set.clone();
        annotations::note_sizes(&rollout.deployment, &mut new);
        if let Some(spec) = new.spec.as_mut() {
            spec.replicas = Some(wanted);
        }
        let written = self.write_set(&set, new).await?;
        match at {
            At::New => rollout.new = Some(written),
            At::Old(index) => rollout.old[index] = written,
        }
        if before != wanted {
            let direction = if before < wanted { "up" } else { "down" };
            let name = name(&set.metadata);
            let message = format!("Scaled {direction} replica set {name} from {before} to {wanted}");
            self.recorder.event(&rollout.deployment, EventType::Normal, "ScalingReplicaSet", message);
        }
        Ok(before != wanted)
    }
}

/// Which set of a roll-out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum At {
    New,
    Old(usize),
}

pub fn set_at(rollout: &Rollout, at: At) -> &ReplicaSet {
    match at {
        At::New => rollout.new.as_ref().expect("`At::New` is only made where the new set exists"),
        At::Old(index) => &rollout.old[index],
    }
}

/// All sets that exist, old ones first.
fn places(rollout: &Rollout) -> impl Iterator<Item = At> {
    (0..rollout.old.len()).map(At::Old).chain(rollout.new.as_ref().map(|_| At::New))
}

/// The only active set; without any, the new or else the latest one; `None` when several are active.
fn active_or_latest(rollout: &Rollout) -> Option<At> {
    let active: Vec<At> = places(rollout).filter(|at| size(set_at(rollout, *at)) > 0).collect();
    match active.as_slice() {
        [] if rollout.new.is_some() => Some(At::New),
        [] => (0..rollout.old.len()).max_by_key(|index| created(&rollout.old[*index])).map(At::Old),
        [only] => Some(*only),
        _ => None,
    }
}

/// The new set has taken over completely.
fn is_saturated(rollout: &Rollout) -> bool {
    let wanted = replicas(&rollout.deployment);
    rollout.new.as_ref().is_some_and(|new| {
        let available = new.status.as_ref().and_then(|status| status.available_replicas).unwrap_or(0);
        size(new) == wanted && annotations::number(new, DESIRED) == Some(wanted) && available == wanted
    })
}

/// Active sets, largest first (of equals the newer first when growing, the older first when shrinking), and the
/// sizes they get.
fn proportional(rollout: &Rollout) -> (Vec<At>, Vec<i32>) {
    let mut order: Vec<At> = places(rollout).filter(|at| size(set_at(rollout, *at)) > 0).collect();
    let total: i32 = order.iter().map(|at| size(set_at(rollout, *at))).sum();
    let wanted = replicas(&rollout.deployment);
    let allowed = if wanted > 0 { wanted + max_surge(&rollout.deployment) } else { 0 };
    let to_add = allowed - total;
    order.sort_by(|a, b| {
        let (a, b) = (set_at(rollout, *a), set_at(rollout, *b));
        let age = if to_add > 0 { created(b).cmp(&created(a)) } else { created(a).cmp(&created(b)) };
        size(b).cmp(&size(a)).then(age)
    });
    let sets: Vec<&ReplicaSet> = order.iter().map(|at| set_at(rollout, *at)).collect();
    let sizes = spread(rollout, &sets, to_add);
    (order, sizes)
}
