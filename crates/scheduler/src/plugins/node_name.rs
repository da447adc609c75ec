//! NodeName: a pod that names a node runs there or nowhere.

use super::{Cycle, Plugin, Verdict};
use crate::table::Slot;

pub const PLUGIN: Plugin = Plugin {
    name: "NodeName",
    prepare: None,
    filter: Some(filter),
    score: None,
    wakes: |event, _| event.node_added,
};

fn filter(cycle: &Cycle, slot: Slot) -> Verdict {
    let wanted = cycle.pod.pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or_default();
    if wanted.is_empty() || wanted == cycle.table.names[slot] {
        return Verdict::Fits;
    }
    Verdict::hopeless("node(s) didn't match the requested node name")
}
