//! NodePorts: a host port belongs to one pod of the node, by address and protocol.

use super::{Cycle, Plugin, Point, Prepared, Verdict};
use crate::event::{ClusterEvent, kind};
use crate::objects::World;
use crate::pod::{HostPort, PodInfo};
use crate::table::Slot;

pub const PLUGIN: Plugin = Plugin {
    name: "NodePorts",
    points: &[Point::PreFilter, Point::Filter],
    prepare: Some(|cycle, _| if cycle.pod.ports.is_empty() { Prepared::Skip } else { Prepared::Ready }),
    filter: Some(filter),
    explain: |_, _, _| vec!["node(s) didn't have free ports for the requested pod ports".to_owned()],
    hears: kind::NODE | kind::POD_REMOVED,
    wakes: |event, pod| match event {
        ClusterEvent::NodeAdded(_) => true,
        ClusterEvent::PodRemoved(gone) => collide(gone, pod),
        _ => false,
    },
    ..Plugin::NONE
};

fn collide(there: &PodInfo, pod: &PodInfo) -> bool {
    there.ports.iter().any(|taken| pod.ports.iter().any(|port: &HostPort| port.collides(taken)))
}

fn filter(cycle: &Cycle, world: &World, slot: Slot) -> Verdict {
    let taken = world.table.pods[slot].iter().any(|placed| collide(&placed.pod, cycle.pod));
    if taken { Verdict::Refused(0) } else { Verdict::Fits }
}
