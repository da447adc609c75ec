//! NodeName: a pod that names its node fits only there.

use super::{Cycle, Plugin, Point, Prepared, Sees, Verdict};
use crate::event::kind;
use crate::objects::World;
use crate::pod::PodInfo;
use crate::table::Slot;

pub const PLUGIN: Plugin = Plugin {
    name: "NodeName",
    points: &[Point::Filter],
    prepare: Some(|cycle, _| if wanted(cycle.pod).is_some() { Prepared::Ready } else { Prepared::Skip }),
    filter: Some(filter),
    explain: |_, _, _| vec!["node(s) didn't match the requested node name".to_owned()],
    hears: kind::NODE,
    wakes: |event, pod| {
        event.labels_changed() && event.node().and_then(|node| node.metadata.name.as_deref()) == wanted(pod)
    },
    sees: Sees::Node,
    ..Plugin::NONE
};

fn wanted(pod: &PodInfo) -> Option<&str> {
    pod.spec()?.node_name.as_deref().filter(|name| !name.is_empty())
}

fn filter(cycle: &Cycle, world: &World, slot: Slot) -> Verdict {
    if wanted(cycle.pod) == Some(&*world.table.names[slot]) { Verdict::Fits } else { Verdict::Hopeless(0) }
}
