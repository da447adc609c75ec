//! One decision, without I/O: which node, or why none. The wording is upstream's `FitError`.

use crate::plugins::{Cycle, PLUGINS, Scale, Verdict};
use crate::pod::PodInfo;
use crate::table::{NodeTable, Slot};
use rand::Rng;
use std::borrow::Cow;
use std::collections::BTreeMap;

/// In larger clusters not all nodes are looked at: upstream's adaptive share, between these bounds.
const NODES_TO_FIND_MIN: usize = 100;
const PERCENT_MIN: usize = 5;

/// What became of a pod.
#[derive(Debug, PartialEq)]
pub enum Decision {
    Node(String),
    Unschedulable {
        /// For events and the PodScheduled condition.
        message: String,
        /// The plugins whose refusal an event has to turn around (by position in `PLUGINS`); empty when there is no
        /// node at all.
        rejected_by: Vec<usize>,
    },
}

/// Decides for one pod. `start` remembers where the last cycle stopped looking, so that all nodes get their turn;
/// `random` breaks ties fairly.
pub fn decide(pod: &PodInfo, table: &NodeTable, start: &mut usize, random: &mut impl Rng) -> Decision {
    let live = table.live();
    if live.is_empty() {
        return Decision::Unschedulable {
            message: "no nodes available to schedule pods".to_owned(),
            rejected_by: Vec::new(),
        };
    }
    let mut cycle = Cycle::new(pod, table);
    for (index, plugin) in PLUGINS.iter().enumerate() {
        if let Some(Err(reason)) = plugin.prepare.map(|prepare| prepare(&mut cycle)) {
            let message =
                explain(live.len(), Some(&reason), &BTreeMap::new(), Some(&preemption_hopeless(live.len())));
            return Decision::Unschedulable { message, rejected_by: vec![index] };
        }
    }
    let found = filter(&cycle, start);
    if found.fitting.is_empty() {
        return found.refuse(&cycle);
    }
    Decision::Node(table.names[best(&cycle, &found.fitting, random)].clone())
}

/// What the filters left.
#[derive(Default)]
struct Found {
    fitting: Vec<Slot>,
    reasons: BTreeMap<Cow<'static, str>, usize>,
    rejected_by: Vec<usize>,
    /// Nodes where the removal of pods could help.
    refused: Vec<Slot>,
    hopeless: usize,
}

fn filter(cycle: &Cycle, start: &mut usize) -> Found {
    let live = cycle.table.live();
    let enough = nodes_to_find(live.len());
    let mut found = Found::default();
    let mut looked_at = 0;
    for offset in 0..live.len() {
        let slot = live[(*start + offset) % live.len()];
        looked_at += 1;
        found.look_at(cycle, slot);
        if found.fitting.len() >= enough {
            break;
        }
    }
    *start = (*start + looked_at) % live.len();
    found
}

fn nodes_to_find(nodes: usize) -> usize {
    let percent = 50usize.saturating_sub(nodes / 125).max(PERCENT_MIN);
    if nodes <= NODES_TO_FIND_MIN { nodes } else { (nodes * percent / 100).max(NODES_TO_FIND_MIN) }
}

impl Found {
    fn look_at(&mut self, cycle: &Cycle, slot: Slot) {
        for (index, plugin) in PLUGINS.iter().enumerate() {
            let reasons = match plugin.filter.map(|filter| filter(cycle, slot)) {
                None | Some(Verdict::Fits) => continue,
                Some(Verdict::Refused(reasons)) => {
                    self.refused.push(slot);
                    reasons
                }
                Some(Verdict::Hopeless(reasons)) => {
                    self.hopeless += 1;
                    reasons
                }
            };
            for reason in reasons {
                *self.reasons.entry(reason).or_insert(0) += 1;
            }
            if !self.rejected_by.contains(&index) {
                self.rejected_by.push(index);
            }
            return;
        }
        self.fitting.push(slot);
    }

    fn refuse(self, cycle: &Cycle) -> Decision {
        let nodes = cycle.table.live().len();
        let preemption = self.preemption(cycle, nodes);
        let message = explain(nodes, None, &self.reasons, Some(&preemption));
        Decision::Unschedulable { message, rejected_by: self.rejected_by }
    }

    /// What preemption would have to say.
    fn preemption(&self, cycle: &Cycle, nodes: usize) -> String {
        let spec = cycle.pod.pod.spec.as_ref();
        if spec.and_then(|spec| spec.preemption_policy.as_deref()) == Some("Never") {
            return "not eligible due to preemptionPolicy=Never.".to_owned();
        }
        let lower =
            |slot: &&Slot| cycle.table.pods[**slot].values().any(|pod| pod.priority < cycle.pod.priority);
        let with_victims = self.refused.iter().filter(lower).count();
        let mut reasons = BTreeMap::new();
        let mut add = |reason: &'static str, count: usize| {
            if count > 0 {
                reasons.insert(Cow::Borrowed(reason), count);
            }
        };
        add("No preemption victims found for incoming pod", self.refused.len() - with_victims);
        add("Preemption is not helpful for scheduling", self.hopeless);
        add("Preemption of lower priority pods is not supported yet", with_victims);
        explain(nodes, None, &reasons, None)
    }
}

fn preemption_hopeless(nodes: usize) -> String {
    let reasons = BTreeMap::from([(Cow::Borrowed("Preemption is not helpful for scheduling"), nodes)]);
    explain(nodes, None, &reasons, None)
}

/// `0/3 nodes are available: 1 reason, 2 other reason. preemption: ...`
fn explain(
    nodes: usize,
    reason: Option<&str>,
    reasons: &BTreeMap<Cow<'static, str>, usize>,
    preemption: Option<&str>,
) -> String {
    let mut message = format!("0/{nodes} nodes are available:");
    if let Some(reason) = reason {
        message += &format!(" {reason}.");
    }
    // Sorted as text, counts included, as upstream does.
    let mut counted: Vec<String> =
        reasons.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
    counted.sort();
    if !counted.is_empty() {
        message += &format!(" {}.", counted.join(", "));
    }
    if let Some(preemption) = preemption {
        message += &format!(" preemption: {preemption}");
    }
    message
}

/// The node with the highest weighted score; of equals any.
fn best(cycle: &Cycle, fitting: &[Slot], random: &mut impl Rng) -> Slot {
    let mut totals = vec![0i64; fitting.len()];
    for score in PLUGINS.iter().filter_map(|plugin| plugin.score.as_ref()) {
        let mut raw: Vec<i64> = fitting.iter().map(|slot| (score.raw)(cycle, *slot)).collect();
        scale(&mut raw, score.scale);
        for (total, value) in totals.iter_mut().zip(raw) {
            *total += score.weight * value;
        }
    }
    let top = totals.iter().copied().max().unwrap_or(0);
    let ties: Vec<Slot> =
        fitting.iter().zip(&totals).filter(|(_, total)| **total == top).map(|(slot, _)| *slot).collect();
    ties[random.random_range(0..ties.len())]
}

fn scale(raw: &mut [i64], scale: Scale) {
    let most = raw.iter().copied().max().unwrap_or(0);
    for value in raw {
        *value = match scale {
            Scale::AsIs => *value,
            Scale::Proportional if most == 0 => 0,
            Scale::Proportional => *value * 100 / most,
            Scale::Reversed if most == 0 => 100,
            Scale::Reversed => 100 - *value * 100 / most,
        };
    }
}

#[cfg(test)]
mod tests;
