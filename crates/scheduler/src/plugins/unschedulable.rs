//! NodeUnschedulable: cordoned nodes take only pods that tolerate it.

use super::{Cycle, Plugin, Point, Prepared, Sees, Verdict};
use crate::event::kind;
use crate::objects::World;
use crate::pod::PodInfo;
use crate::table::Slot;
use k8s_openapi::api::core::v1::{Node, Taint};
use knarr_client::placement;

pub const PLUGIN: Plugin = Plugin {
    name: "NodeUnschedulable",
    points: &[Point::Filter],
    prepare: Some(prepare),
    filter: Some(filter),
    explain: |_, _, _| vec!["node(s) were unschedulable".to_owned()],
    hears: kind::NODE,
    wakes: |event, pod| {
        let open = |node: &Node| node.spec.as_ref().is_none_or(|spec| spec.unschedulable != Some(true));
        event.taints_changed() && event.node().is_some_and(|node| open(node) || tolerates(pod))
    },
    sees: Sees::Node,
    ..Plugin::NONE
};

fn tolerates(pod: &PodInfo) -> bool {
    let taint = Taint {
        key: "node.kubernetes.io/unschedulable".to_owned(),
        effect: "NoSchedule".to_owned(),
        ..Default::default()
    };
    placement::tolerates(pod.tolerations(), &taint)
}

fn prepare(cycle: &mut Cycle, world: &mut World) -> Prepared {
    let matters = world.table.has_unschedulable_nodes() && !tolerates(cycle.pod);
    if matters { Prepared::Ready } else { Prepared::Skip }
}

fn filter(_: &Cycle, world: &World, slot: Slot) -> Verdict {
    if world.table.unschedulable[slot] { Verdict::Hopeless(0) } else { Verdict::Fits }
}
