//! DefaultPreemption: where no node fits, pods of lower priority may have to go. What is looked for and chosen lies in
//! `crate::preemption`; this is its line in the list, and its arguments.

use super::{Plugin, Point};
use crate::event::{ClusterEvent, kind};

pub const PLUGIN: Plugin = Plugin {
    name: "DefaultPreemption",
    points: &[Point::PreEnqueue, Point::PostFilter],
    // The victims are gone.
    hears: kind::POD_REMOVED,
    wakes: |event, _| matches!(event, ClusterEvent::PodRemoved(_)),
    ..Plugin::NONE
};

/// How many nodes are tried: this share of those that might help, but at least so many.
#[derive(Debug, Clone, PartialEq)]
pub struct PreemptionArgs {
    pub min_candidate_nodes_percentage: usize,
    pub min_candidate_nodes_absolute: usize,
}

impl Default for PreemptionArgs {
    fn default() -> Self {
        PreemptionArgs { min_candidate_nodes_percentage: 10, min_candidate_nodes_absolute: 100 }
    }
}
