//! NodeResourcesFit: a node must have what a pod requests; the emptier one scores higher (LeastAllocated).

use super::{Cycle, Plugin, Scale, Score, Verdict};
use crate::table::{CPU_COLUMN, MEMORY_COLUMN, PODS_COLUMN, Slot};
use std::borrow::Cow;

pub const PLUGIN: Plugin = Plugin {
    name: "NodeResourcesFit",
    prepare: None,
    filter: Some(filter),
    score: Some(Score { weight: 1, raw: score, scale: Scale::AsIs }),
    wakes: |event, _| event.node_added || event.node_allocatable || event.pod_removed,
};

fn filter(cycle: &Cycle, slot: Slot) -> Verdict {
    let table = cycle.table;
    let mut reasons: Vec<Cow<'static, str>> = Vec::new();
    let mut hopeless = false;
    let pods = &table.resources[PODS_COLUMN];
    if pods.requested[slot] + 1 > pods.allocatable[slot] {
        reasons.push("Too many pods".into());
    }
    for (name, wanted) in cycle.pod.requests.iter().filter(|(_, wanted)| **wanted > 0) {
        let column = table.find_column(name).map(|column| &table.resources[column]);
        let (allocatable, requested) =
            column.map_or((0, 0), |column| (column.allocatable[slot], column.requested[slot]));
        if *wanted > allocatable - requested {
            reasons.push(format!("Insufficient {name}").into());
            hopeless |= *wanted > allocatable;
        }
    }
    match reasons.is_empty() {
        true => Verdict::Fits,
        false if hopeless => Verdict::Hopeless(reasons),
        false => Verdict::Refused(reasons),
    }
}

fn score(cycle: &Cycle, slot: Slot) -> i64 {
    let table = cycle.table;
    let cpu = table.assumed_cpu[slot] + cycle.pod.assumed_cpu;
    let memory = table.assumed_memory[slot] + cycle.pod.assumed_memory;
    let shares = [
        free_share(table.resources[CPU_COLUMN].allocatable[slot], cpu),
        free_share(table.resources[MEMORY_COLUMN].allocatable[slot], memory),
    ];
    let known: Vec<i64> = shares.into_iter().flatten().collect();
    if known.is_empty() { 0 } else { known.iter().sum::<i64>() / known.len() as i64 }
}

/// The percentage left free; `None` for a resource the node does not have.
fn free_share(allocatable: i64, used: i64) -> Option<i64> {
    match allocatable {
        ..=0 => None,
        _ if used > allocatable => Some(0),
        _ => Some((i128::from(allocatable - used) * 100 / i128::from(allocatable)) as i64),
    }
}
