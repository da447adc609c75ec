//! NodePorts: two pods cannot have the same port of a node.

use super::{Cycle, Plugin, Verdict};
use crate::table::Slot;

pub const PLUGIN: Plugin = Plugin {
    name: "NodePorts",
    prepare: None,
    filter: Some(filter),
    score: None,
    wakes: |event, _| event.node_added || event.pod_removed,
};

fn filter(cycle: &Cycle, slot: Slot) -> Verdict {
    if cycle.pod.ports.is_empty() {
        return Verdict::Fits;
    }
    let mut taken = cycle.table.pods[slot].values().flat_map(|pod| &pod.ports);
    if taken.any(|taken| cycle.pod.ports.iter().any(|port| port.collides(taken))) {
        return Verdict::refused("node(s) didn't have free ports for the requested pod ports");
    }
    Verdict::Fits
}
