//! Rolling update: replaces pods of old templates node by node, within `maxUnavailable` (old first out) or
//! `maxSurge` (new first in). `OnDelete` leaves it to the user.

use super::{DaemonSets, PodsByNode, is_current, min_ready_seconds, placement};
use crate::history::History;
use crate::pods;
use crate::util::scaled;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use knarr_client::{Requeue, Result};
use std::sync::Arc;

fn is_rolling(set: &DaemonSet) -> bool {
    let strategy = set.spec.as_ref().and_then(|spec| spec.update_strategy.as_ref());
    strategy.and_then(|strategy| strategy.type_.as_deref()).unwrap_or("RollingUpdate") == "RollingUpdate"
}

fn limit(set: &DaemonSet, surge: bool) -> Option<&IntOrString> {
    let strategy = set.spec.as_ref()?.update_strategy.as_ref()?;
    let rolling = strategy.rolling_update.as_ref()?;
    if surge { rolling.max_surge.as_ref() } else { rolling.max_unavailable.as_ref() }
}

/// Nodes that may have an old and a new pod at once.
pub fn max_surge(set: &DaemonSet, desired: i32) -> i32 {
    if is_rolling(set) { limit(set, true).map_or(0, |limit| scaled(limit, desired, true)) } else { 0 }
}

fn max_unavailable(set: &DaemonSet, desired: i32) -> i32 {
    let default = IntOrString::Int(1);
    let unavailable = scaled(limit(set, false).unwrap_or(&default), desired, true);
    // Both zero would never move.
    if unavailable == 0 && max_surge(set, desired) == 0 { 1 } else { unavailable }
}

/// What there is on a node while an update goes on.
struct OnNode {
    name: String,
    old: Option<Arc<Pod>>,
    new: Option<Arc<Pod>>,
    old_available: bool,
    new_available: bool,
}

impl DaemonSets {
    pub(super) async fn update(
        &self,
        set: &DaemonSet,
        by_node: &PodsByNode,
        history: &History,
    ) -> Result<Requeue> {
        if !is_rolling(set) {
            return Ok(Requeue::Done);
        }
        let nodes = self.look_at_nodes(set, by_node, history);
        let desired = nodes.len() as i32;
        let (create, delete) = match max_surge(set, desired) {
            0 => (Vec::new(), replace(&nodes, max_unavailable(set, desired))),
            surge => replace_with_surge(&nodes, surge, max_unavailable(set, desired)),
        };
        self.carry_out(set, history, create, delete).await?;
        Ok(Requeue::Done)
    }

    fn look_at_nodes(&self, set: &DaemonSet, by_node: &PodsByNode, history: &History) -> Vec<OnNode> {
        let now = self.context.clock.now();
        let available = |pod: &Option<Arc<Pod>>| {
            pod.as_ref().is_some_and(|pod| pods::is_available(pod, min_ready_seconds(set), now))
        };
        let nodes = self.nodes.list();
        let wanted = nodes.iter().filter(|node| placement::verdict(set, node).should_run);
        wanted
            .map(|node| {
                let name = node.metadata.name.clone().unwrap_or_default();
                let active = by_node.get(&name).into_iter().flatten().filter(|pod| pods::is_active(pod));
                let (new, old): (Vec<_>, Vec<_>) = active.cloned().partition(|pod| is_current(history, pod));
                let (old, new) = (old.into_iter().next(), new.into_iter().next());
                OnNode { old_available: available(&old), new_available: available(&new), name, old, new }
            })
            .collect()
    }
}

/// Old pods to delete so that at most `limit` nodes are without an available pod. Old pods that are not available
/// cost nothing.
fn replace(nodes: &[OnNode], limit: i32) -> Vec<Arc<Pod>> {
    let unavailable = nodes.iter().filter(|node| !node.old_available && !node.new_available);
    let mut room = limit - unavailable.clone().count() as i32;
    let mut delete: Vec<Arc<Pod>> = unavailable.filter_map(|node| node.old.clone()).collect();
    for node in nodes.iter().filter(|node| node.old_available && node.new.is_none()) {
        if room > 0 {
            delete.extend(node.old.clone());
            room -= 1;
        }
    }
    delete
}

/// New pods to create beside old ones, at most `surge` at a time; an old pod goes when the new one is available, or
/// at once when it is not available itself (within `limit`, zero as a rule).
fn replace_with_surge(nodes: &[OnNode], surge: i32, limit: i32) -> (Vec<String>, Vec<Arc<Pod>>) {
    let (mut create, mut delete) = (Vec::new(), Vec::new());
    let surging =
        nodes.iter().filter(|node| node.old.is_some() && node.new.is_some() && !node.new_available).count();
    let mut room = surge - surging as i32;
    let mut broken = limit.max(0);
    for node in nodes {
        match (&node.old, &node.new) {
            (Some(old), Some(_)) if node.new_available => delete.push(old.clone()),
            (Some(old), None) if !node.old_available && broken > 0 => {
                broken -= 1;
                delete.push(old.clone());
            }
            (Some(_), None) if room > 0 => {
                room -= 1;
                create.push(node.name.clone());
            }
            _ => {}
        }
    }
    (create, delete)
}
