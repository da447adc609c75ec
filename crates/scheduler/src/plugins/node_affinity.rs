//! NodeAffinity: `nodeSelector` and required terms decide, and those that the configuration adds for every pod of the
//! profile; preferred terms score.

use super::{Cycle, Plugin, Point, Prepared, Scored, Sees, Verdict, normalize};
use crate::event::kind;
use crate::filters::{Filter, FilterId, Selection};
use crate::objects::World;
use crate::table::Slot;
use k8s_openapi::api::core::v1::{NodeAffinity, Pod, PreferredSchedulingTerm};
use knarr_client::placement;
use std::collections::BTreeMap;
use std::sync::Arc;

pub const PLUGIN: Plugin = Plugin {
    name: "NodeAffinity",
    points: &[Point::PreFilter, Point::Filter, Point::PreScore, Point::Score],
    weight: 2,
    prepare: Some(prepare),
    filter: Some(filter),
    filter_many: Some(filter_many),
    sees: Sees::Node,
    explain: |_, _, code| {
        let text = match code {
            ADDED => "node(s) didn't match scheduler-enforced node affinity",
            _ => "node(s) didn't match Pod's node affinity/selector",
        };
        vec![text.to_owned()]
    },
    score: Some(score),
    hears: kind::NODE,
    wakes: |event, pod| {
        event.labels_changed()
            && event
                .node()
                .is_some_and(|node| pod.selection.as_ref().is_none_or(|selection| selection.matches(node)))
    },
};

/// The code of a refusal by the configuration's affinity.
const ADDED: u32 = 1;

/// A node affinity for every pod of the profile.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct NodeAffinityArgs {
    pub added: Option<NodeAffinity>,
    pub added_selection: Option<Arc<Selection>>,
}

#[derive(Debug, Default)]
pub struct State {
    selection: Option<FilterId>,
    /// Few nodes are asked about: they are held against the rules one by one.
    pub direct: bool,
    added: Option<FilterId>,
}

fn prepare(cycle: &mut Cycle, world: &mut World) -> Prepared {
    let added = &cycle.profile.args.node_affinity.added_selection;
    if cycle.pod.selection.is_none() && added.is_none() {
        return Prepared::Skip;
    }
    if let Some(names) = &cycle.pod.node_names {
        cycle.only = Some(names.clone());
        cycle.node_affinity.direct = true;
    } else if cycle.pod.selection.is_some() {
        let filter = Filter { selection: cycle.pod.selection.clone(), ..Default::default() };
        let filter = world.table.filter(filter);
        cycle.node_affinity.selection = Some(filter);
        cycle.narrow(world.table.filters.len(filter), world, |world| world.table.nodes_of(filter));
    }
    if added.is_some() {
        let filter = Filter { selection: added.clone(), ..Default::default() };
        cycle.node_affinity.added = Some(world.table.filter(filter));
    }
    Prepared::Ready
}

fn filter(cycle: &Cycle, world: &World, slot: Slot) -> Verdict {
    let state = &cycle.node_affinity;
    if state.added.is_some_and(|added| !world.table.filters.contains(added, slot)) {
        return Verdict::Hopeless(ADDED);
    }
    let selected = match state.selection {
        Some(selection) => world.table.filters.contains(selection, slot),
        None if state.direct => {
            cycle.pod.selection.as_ref().is_none_or(|selection| selection.matches(world.table.node(slot)))
        }
        None => true,
    };
    if selected { Verdict::Fits } else { Verdict::Hopeless(0) }
}

fn filter_many(cycle: &Cycle, world: &World, slots: &[Slot], verdicts: &mut [Verdict]) {
    let state = &cycle.node_affinity;
    let filters = &world.table.filters;
    for (filter, code) in [(state.added, ADDED), (state.selection, 0)] {
        let Some(filter) = filter else { continue };
        let bits = filters.bits(filter);
        for (slot, verdict) in slots.iter().zip(&mut *verdicts) {
            if !bits[*slot] && *verdict == Verdict::Fits {
                *verdict = Verdict::Hopeless(code);
            }
        }
    }
}

fn preferred(affinity: Option<&NodeAffinity>) -> impl Iterator<Item = &PreferredSchedulingTerm> {
    let terms =
        affinity.and_then(|affinity| affinity.preferred_during_scheduling_ignored_during_execution.as_ref());
    terms.into_iter().flatten().filter(|term| term.weight != 0)
}

fn of_pod(pod: &Pod) -> Option<&NodeAffinity> {
    pod.spec.as_ref()?.affinity.as_ref()?.node_affinity.as_ref()
}

/// The weights of the preferred terms that hold.
fn score(cycle: &mut Cycle, world: &mut World, slots: &[Slot], scores: &mut [i64]) -> Scored {
    let own = preferred(of_pod(&cycle.pod.pod));
    let terms: Vec<&PreferredSchedulingTerm> =
        own.chain(preferred(cycle.profile.args.node_affinity.added.as_ref())).collect();
    if terms.is_empty() {
        return Scored::Skip;
    }
    let none = BTreeMap::new();
    for (score, slot) in scores.iter_mut().zip(slots) {
        let node = world.table.node(*slot);
        let labels = node.metadata.labels.as_ref().unwrap_or(&none);
        let holds = |term: &&&PreferredSchedulingTerm| {
            placement::term_holds(&term.preference, labels, &world.table.names[*slot])
        };
        *score = terms.iter().filter(holds).map(|term| i64::from(term.weight)).sum();
    }
    normalize(scores, false);
    Scored::Each
}
