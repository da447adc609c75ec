//! PodTopologySpread: pods of a kind spread evenly over topology domains. Hard constraints (`DoNotSchedule`) filter;
//! soft ones (`ScheduleAnyway`) do not score yet.
//!
//! Counted afresh each cycle for pods that have constraints; others pay nothing.

use super::node_affinity::matches_node;
use super::taint_toleration::tolerates;
use super::{Cycle, Plugin, Verdict};
use crate::pod::PodInfo;
use crate::table::{NodeTable, Slot};
use k8s_openapi::api::core::v1::TopologySpreadConstraint;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use knarr_client::selector::Selector;
use std::collections::HashMap;

pub const PLUGIN: Plugin = Plugin {
    name: "PodTopologySpread",
    prepare: Some(prepare),
    filter: Some(filter),
    score: None,
    wakes: |event, _| {
        event.node_added || event.node_labels || event.node_taints || event.pod_removed || event.pod_added
    },
};

#[derive(Default)]
pub struct State {
    constraints: Vec<Constraint>,
}

struct Constraint {
    key: String,
    max_skew: i64,
    /// The pod itself counts where it goes.
    own: i64,
    /// Matching pods by domain, of the domains that count.
    domains: HashMap<String, i64>,
    least: i64,
}

fn hard(pod: &PodInfo) -> impl Iterator<Item = &TopologySpreadConstraint> {
    let constraints = pod.pod.spec.as_ref().and_then(|spec| spec.topology_spread_constraints.as_ref());
    constraints.into_iter().flatten().filter(|constraint| constraint.when_unsatisfiable == "DoNotSchedule")
}

fn prepare(cycle: &mut Cycle) -> Result<(), String> {
    let keys: Vec<String> = hard(cycle.pod).map(|constraint| constraint.topology_key.clone()).collect();
    let constraints = hard(cycle.pod).map(|constraint| count(cycle.pod, cycle.table, constraint, &keys));
    cycle.spread.constraints = constraints.collect::<Result<_, _>>()?;
    Ok(())
}

fn count(
    pod: &PodInfo,
    table: &NodeTable,
    constraint: &TopologySpreadConstraint,
    keys: &[String],
) -> Result<Constraint, String> {
    let selector = selector(pod, constraint)?;
    let key = &constraint.topology_key;
    let mut domains = HashMap::new();
    for &slot in table.live().iter().filter(|slot| counts(pod, table, **slot, constraint, keys)) {
        let matching = table.pods[slot].values().filter(|other| {
            other.namespace() == pod.namespace()
                && other.pod.metadata.deletion_timestamp.is_none()
                && selector.matches(other.pod.metadata.labels.as_ref())
        });
        *domains.entry(table.labels[slot][key].clone()).or_insert(0) += matching.count() as i64;
    }
    let min_domains = constraint.min_domains.unwrap_or(1);
    let enough = domains.len() as i64 >= i64::from(min_domains);
    // With fewer domains than wished the missing ones count as empty.
    let least = if enough { domains.values().copied().min().unwrap_or(0) } else { 0 };
    let own = i64::from(selector.matches(pod.pod.metadata.labels.as_ref()));
    Ok(Constraint { key: key.clone(), max_skew: constraint.max_skew.into(), own, domains, least })
}

/// The constraint's selector, with the values the pod itself has for `matchLabelKeys`.
fn selector(pod: &PodInfo, constraint: &TopologySpreadConstraint) -> Result<Selector, String> {
    // No selector matches no pod.
    let Some(selector) = &constraint.label_selector else { return Ok(Selector::none()) };
    let mut selector: LabelSelector = selector.clone();
    for key in constraint.match_label_keys.iter().flatten() {
        if let Some(value) = pod.pod.metadata.labels.as_ref().and_then(|labels| labels.get(key)) {
            selector.match_labels.get_or_insert_default().insert(key.clone(), value.clone());
        }
    }
    Selector::new(&selector).map_err(|error| error.to_string())
}

/// Whether a node's pods count: it has all topology labels, and the policies let it.
fn counts(
    pod: &PodInfo,
    table: &NodeTable,
    slot: Slot,
    constraint: &TopologySpreadConstraint,
    keys: &[String],
) -> bool {
    let labels = &table.labels[slot];
    let affinity_ignored = constraint.node_affinity_policy.as_deref() == Some("Ignore");
    let taints_honored = constraint.node_taints_policy.as_deref() == Some("Honor");
    let blocked = || {
        let mut taints = table.taints[slot].iter().filter(|taint| taint.effect != "PreferNoSchedule");
        taints.any(|taint| !tolerates(pod, taint))
    };
    keys.iter().all(|key| labels.contains_key(key))
        && (affinity_ignored || matches_node(pod, table, slot))
        && !(taints_honored && blocked())
}

fn filter(cycle: &Cycle, slot: Slot) -> Verdict {
    let labels = &cycle.table.labels[slot];
    for constraint in &cycle.spread.constraints {
        let Some(domain) = labels.get(&constraint.key) else {
            return Verdict::hopeless(
                "node(s) didn't match pod topology spread constraints (missing required label)",
            );
        };
        let there = constraint.domains.get(domain).copied().unwrap_or(0);
        if there + constraint.own - constraint.least > constraint.max_skew {
            return Verdict::refused("node(s) didn't match pod topology spread constraints");
        }
    }
    Verdict::Fits
}
