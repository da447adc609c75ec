//! NodeResourcesBalancedAllocation: prefers nodes whose resources would be used to the same degree.

use super::{Cycle, Plugin, Point, Scored, fit};
use crate::objects::World;
use crate::pod::PodInfo;
use crate::table::{NodeTable, Slot};

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

/// The columns compared, with what the pod takes of each.
#[derive(Debug, Default)]
pub struct State {
    columns: Vec<(usize, i64)>,
}

impl State {
    pub fn new(pod: &PodInfo, args: &BalancedArgs, table: &NodeTable) -> Self {
        let columns = args.resources.iter().filter_map(|name| {
            let (column, wanted) = (table.find_column(name)?, pod.requests.get(name));
            // Resources of devices count only for pods that want some.
            (wanted > 0 || is_native(name)).then_some((column, wanted))
        });
        State { columns: columns.collect() }
    }

    /// How evenly the node would be used, 0 to 100.
    pub fn score(&self, table: &NodeTable, slot: Slot) -> i64 {
        let share = |(column, wanted): &(usize, i64)| {
            let resource = &table.resources[*column];
            let (allocatable, used) = (resource.allocatable[slot], resource.requested[slot] + wanted);
            (allocatable != 0).then(|| (used as f64 / allocatable as f64).min(1.0))
        };
        let apart = match self.columns.as_slice() {
            [a, b] => match (share(a), share(b)) {
                (Some(a), Some(b)) => deviation(&[a, b]),
                _ => 0.0,
            },
            columns => deviation(&columns.iter().filter_map(share).collect::<Vec<f64>>()),
        };
        ((1.0 - apart) * 100.0) as i64
    }
}

fn score(cycle: &mut Cycle, world: &mut World, slots: &[Slot], scores: &mut [i64]) -> Scored {
    // A pod that asks for nothing would draw all its like to the best balanced node.
    let mut names = cycle.profile.args.balanced.resources.iter();
    if names.all(|name| cycle.pod.requests.get(name) == 0) {
        return Scored::Skip;
    }
    fit::ask(cycle, world);
    for (answer, score) in fit::answers(cycle, world, slots).zip(scores) {
        *score = answer.balanced.into();
    }
    Scored::Each
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
