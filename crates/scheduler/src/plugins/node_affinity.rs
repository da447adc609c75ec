//! NodeAffinity: `nodeSelector` and required terms decide; preferred terms score.

use super::{Cycle, Plugin, Scale, Score, Verdict};
use crate::pod::PodInfo;
use crate::table::{NodeTable, Slot};
use k8s_openapi::api::core::v1::NodeAffinity;
use knarr_client::placement;

pub const PLUGIN: Plugin = Plugin {
    name: "NodeAffinity",
    prepare: None,
    filter: Some(filter),
    score: Some(Score { weight: 2, raw: score, scale: Scale::Proportional }),
    wakes: |event, _| event.node_added || event.node_labels,
};

fn filter(cycle: &Cycle, slot: Slot) -> Verdict {
    if matches_node(cycle.pod, cycle.table, slot) {
        return Verdict::Fits;
    }
    if names_other_nodes(cycle.pod, &cycle.table.names[slot]) {
        // Upstream sorts such nodes out before filtering and words it so.
        return Verdict::hopeless("node(s) didn't satisfy plugin(s) [NodeAffinity]");
    }
    Verdict::hopeless("node(s) didn't match Pod's node affinity/selector")
}

/// Whether node selector and required node affinity let the pod on the node.
pub fn matches_node(pod: &PodInfo, table: &NodeTable, slot: Slot) -> bool {
    pod.pod
        .spec
        .as_ref()
        .is_none_or(|spec| placement::selects_node(spec, &table.labels[slot], &table.names[slot]))
}

fn affinity(pod: &PodInfo) -> Option<&NodeAffinity> {
    pod.pod.spec.as_ref()?.affinity.as_ref()?.node_affinity.as_ref()
}

/// Whether every required term names nodes and none names this one.
fn names_other_nodes(pod: &PodInfo, name: &str) -> bool {
    let Some(required) = affinity(pod)
        .and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref())
    else {
        return false;
    };
    let terms = &required.node_selector_terms;
    !terms.is_empty()
        && terms.iter().all(|term| {
            let mut fields = term.match_fields.iter().flatten();
            fields.any(|field| {
                let values = field.values.iter().flatten();
                field.key == "metadata.name"
                    && field.operator == "In"
                    && !values.into_iter().any(|v| v == name)
            })
        })
}

fn score(cycle: &Cycle, slot: Slot) -> i64 {
    let preferred = affinity(cycle.pod)
        .and_then(|affinity| affinity.preferred_during_scheduling_ignored_during_execution.as_ref());
    let terms = preferred.into_iter().flatten();
    // An empty preference says nothing; an empty required term, by contrast, matches no node.
    let terms = terms.filter(|term| {
        let preference = &term.preference;
        preference.match_expressions.is_some() || preference.match_fields.is_some()
    });
    terms
        .filter(|term| {
            placement::term_holds(&term.preference, &cycle.table.labels[slot], &cycle.table.names[slot])
        })
        .map(|term| i64::from(term.weight))
        .sum()
}
