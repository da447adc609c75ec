//! TaintToleration: taints keep pods away that do not tolerate them; `PreferNoSchedule` only lowers the score.
//!
//! Nodes with equal taints share a number, so each list of taints is judged once per pod.

use super::{Cycle, Plugin, Point, Prepared, Scored, Sees, Verdict, normalize};
use crate::event::kind;
use crate::filters::keeps_away;
use crate::objects::World;
use crate::table::{NodeTable, Slot};
use k8s_openapi::api::core::v1::{Node, Taint, Toleration};
use knarr_client::placement;

pub const PLUGIN: Plugin = Plugin {
    name: "TaintToleration",
    points: &[Point::Filter, Point::PreScore, Point::Score],
    weight: 3,
    prepare: Some(prepare),
    filter: Some(filter),
    sees: Sees::Node,
    explain,
    score: Some(score),
    filter_many: None,
    hears: kind::NODE,
    wakes: |event, pod| {
        event.taints_changed()
            && event.node().is_some_and(|node| untolerated(taints(node), pod.tolerations()).is_none())
    },
};

#[derive(Debug, Default)]
pub struct State {
    /// By list of taints: the position of the first that keeps the pod away.
    refused: Vec<Option<u16>>,
}

fn taints(node: &Node) -> &[Taint] {
    node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default()
}

fn untolerated(taints: &[Taint], tolerations: Option<&Vec<Toleration>>) -> Option<u16> {
    let blocks = |taint: &Taint| keeps_away(taint) && !placement::tolerates(tolerations, taint);
    taints.iter().position(blocks).map(|place| place as u16)
}

fn prepare(cycle: &mut Cycle, world: &mut World) -> Prepared {
    if !world.table.has_taints(true) {
        return Prepared::Skip;
    }
    let lists = world.table.taint_lists.iter();
    cycle.taints.refused = lists.map(|(taints, _)| untolerated(taints, cycle.pod.tolerations())).collect();
    Prepared::Ready
}

fn filter(cycle: &Cycle, world: &World, slot: Slot) -> Verdict {
    let list = world.table.taints[slot];
    match cycle.taints.refused[list] {
        None => Verdict::Fits,
        Some(place) => Verdict::Hopeless((list as u32) << 16 | u32::from(place)),
    }
}

fn explain(_: &Cycle, world: &World, code: u32) -> Vec<String> {
    let taint = &world.table.taint_lists[(code >> 16) as usize].0[(code & 0xffff) as usize];
    let value = taint.value.as_deref().unwrap_or_default();
    vec![format!("node(s) had untolerated taint {{{}: {value}}}", taint.key)]
}

/// The fewer soft taints the pod does not tolerate, the better.
fn score(cycle: &mut Cycle, world: &mut World, slots: &[Slot], scores: &mut [i64]) -> Scored {
    if !world.table.has_taints(false) {
        return Scored::Alike(100);
    }
    let by_list: Vec<i64> = soft_taints(&world.table, cycle.pod.tolerations());
    for (score, slot) in scores.iter_mut().zip(slots) {
        *score = by_list[world.table.taints[*slot]];
    }
    normalize(scores, true);
    Scored::Each
}

fn soft_taints(table: &NodeTable, tolerations: Option<&Vec<Toleration>>) -> Vec<i64> {
    let count = |taints: &Vec<Taint>| {
        let soft = taints.iter().filter(|taint| taint.effect == "PreferNoSchedule");
        soft.filter(|taint| !placement::tolerates(tolerations, taint)).count() as i64
    };
    table.taint_lists.iter().map(|(taints, _)| count(taints)).collect()
}
