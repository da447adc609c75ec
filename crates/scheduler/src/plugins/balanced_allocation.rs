//! NodeResourcesBalancedAllocation: prefers nodes whose resources would be used to the same degree.

use super::{Cycle, Plugin, Point};
use crate::objects::World;
use crate::table::Slot;

pub const PLUGIN: Plugin = Plugin {
    name: "NodeResourcesBalancedAllocation",
    points: &[Point::PreScore, Point::Score],
    weight: 1,
    score: Some(score),
    ..Plugin::NONE
};

/// Which resources are compared.
#[derive(Debug, Clone, PartialEq)]
pub struct BalancedArgs {
    pub resources: Vec<String>,
}

impl Default for BalancedArgs {
    fn default() -> Self {
        BalancedArgs { resources: vec!["cpu".to_owned(), "memory".to_owned()] }
    }
}

fn score(cycle: &mut Cycle, world: &mut World, slots: &[Slot], scores: &mut [i64]) -> bool {
    let table = &world.table;
    let names = &cycle.profile.args.balanced.resources;
    // A pod that asks for nothing would draw all its like to the best balanced node.
    if names.iter().all(|name| cycle.pod.requests.get(name) == 0) {
        return false;
    }
    let columns: Vec<(&crate::table::Resource, i64)> = names
        .iter()
        .filter_map(|name| Some((&table.resources[table.find_column(name)?], cycle.pod.requests.get(name))))
        // Resources of devices count only for pods that want some.
        .filter(|(resource, wanted)| *wanted > 0 || is_native(&resource.name))
        .collect();
    if let [(a, wants_a), (b, wants_b)] = columns.as_slice() {
        let share = |resource: &crate::table::Resource, wanted: i64, slot: Slot| {
            let used = resource.requested[slot] + wanted;
            (used as f64 / resource.allocatable[slot] as f64).min(1.0)
        };
        for (score, slot) in scores.iter_mut().zip(slots) {
            let known = a.allocatable[*slot] != 0 && b.allocatable[*slot] != 0;
            let apart = || ((share(a, *wants_a, *slot) - share(b, *wants_b, *slot)) / 2.0).abs();
            *score = ((1.0 - if known { apart() } else { 0.0 }) * 100.0) as i64;
        }
        return true;
    }
    let mut shares = Vec::with_capacity(columns.len());
    for (score, slot) in scores.iter_mut().zip(slots) {
        shares.clear();
        for (resource, wanted) in &columns {
            let allocatable = resource.allocatable[*slot];
            if allocatable != 0 {
                let used = resource.requested[*slot] + wanted;
                shares.push((used as f64 / allocatable as f64).min(1.0));
            }
        }
        *score = ((1.0 - deviation(&shares)) * 100.0) as i64;
    }
    true
}

pub fn is_native(name: &str) -> bool {
    !name.contains('/') && !name.starts_with("hugepages-")
}

/// The standard deviation; of two values half their distance.
fn deviation(shares: &[f64]) -> f64 {
    match shares {
        [] | [_] => 0.0,
        [a, b] => ((a - b) / 2.0).abs(),
        _ => {
            let mean = shares.iter().sum::<f64>() / shares.len() as f64;
            let squares = shares.iter().map(|share| (share - mean) * (share - mean)).sum::<f64>();
            (squares / shares.len() as f64).sqrt()
        }
    }
}
