//! NodeResourcesBalancedAllocation: prefers nodes whose cpu and memory would be used to the same degree.

use super::{Cycle, Plugin, Scale, Score};
use crate::pod::{CPU, MEMORY};
use crate::table::{CPU_COLUMN, MEMORY_COLUMN, Slot};

pub const PLUGIN: Plugin = Plugin {
    name: "NodeResourcesBalancedAllocation",
    prepare: None,
    filter: None,
    score: Some(Score { weight: 1, raw: score, scale: Scale::AsIs }),
    wakes: |_, _| false,
};

fn score(cycle: &Cycle, slot: Slot) -> i64 {
    let share = |column: usize, name: &str| {
        let resource = &cycle.table.resources[column];
        let used = resource.requested[slot] + cycle.pod.requests.get(name).copied().unwrap_or(0);
        let allocatable = resource.allocatable[slot];
        if allocatable <= 0 { 1.0 } else { (used as f64 / allocatable as f64).min(1.0) }
    };
    // The standard deviation of two values is half their distance.
    let deviation = (share(CPU_COLUMN, CPU) - share(MEMORY_COLUMN, MEMORY)).abs() / 2.0;
    ((1.0 - deviation) * 100.0) as i64
}
