//! NodeUnschedulable: cordoned nodes take only pods that tolerate it.

use super::{Cycle, Plugin, Verdict, taint_toleration::tolerates};
use crate::table::Slot;
use k8s_openapi::api::core::v1::Taint;

pub const PLUGIN: Plugin = Plugin {
    name: "NodeUnschedulable",
    prepare: None,
    filter: Some(filter),
    score: None,
    wakes: |event, _| event.node_added || event.node_taints,
};

fn filter(cycle: &Cycle, slot: Slot) -> Verdict {
    if !cycle.table.unschedulable[slot] {
        return Verdict::Fits;
    }
    let taint = Taint {
        key: "node.kubernetes.io/unschedulable".to_owned(),
        effect: "NoSchedule".to_owned(),
        ..Default::default()
    };
    if tolerates(cycle.pod, &taint) { Verdict::Fits } else { Verdict::hopeless("node(s) were unschedulable") }
}
