//! NodeAffinity: `nodeSelector` and required terms decide; preferred terms score.

use super::{Cycle, Plugin, Scale, Score, Verdict};
use crate::pod::PodInfo;
use crate::table::{NodeTable, Slot};
use k8s_openapi::api::core::v1::{NodeAffinity, NodeSelectorRequirement, NodeSelectorTerm};

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
    let Some(spec) = &pod.pod.spec else { return true };
    let labels = &table.labels[slot];
    let selected = spec.node_selector.iter().flatten().all(|(key, value)| labels.get(key) == Some(value));
    let required = affinity(pod).and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref());
    selected && required.is_none_or(|required| required.node_selector_terms.iter().any(|term| holds(term, table, slot)))
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
                field.key == "metadata.name" && field.operator == "In" && !values.into_iter().any(|v| v == name)
            })
        })
}

fn score(cycle: &Cycle, slot: Slot) -> i64 {
    let preferred =
        affinity(cycle.pod).and_then(|affinity| affinity.preferred_during_scheduling_ignored_during_execution.as_ref());
    let terms = preferred.into_iter().flatten();
    // An empty preference says nothing; an empty required term, by contrast, matches no node.
    let terms = terms.filter(|term| {
        let preference = &term.preference;
        preference.match_expressions.is_some() || preference.match_fields.is_some()
    });
    terms.filter(|term| holds(&term.preference, cycle.table, slot)).map(|term| i64::from(term.weight)).sum()
}

/// All expressions and fields of a term hold; an empty term never does.
fn holds(term: &NodeSelectorTerm, table: &NodeTable, slot: Slot) -> bool {
    let expressions = term.match_expressions.iter().flatten();
    let fields = term.match_fields.iter().flatten();
    if expressions.clone().next().is_none() && fields.clone().next().is_none() {
        return false;
    }
    let labels = &table.labels[slot];
    let by_label = |requirement: &NodeSelectorRequirement| {
        meets(requirement, labels.get(&requirement.key).map(String::as_str))
    };
    let by_field = |requirement: &NodeSelectorRequirement| {
        requirement.key == "metadata.name" && meets(requirement, Some(&table.names[slot]))
    };
    expressions.into_iter().all(by_label) && fields.into_iter().all(by_field)
}

fn meets(requirement: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let listed = value.is_some_and(|value| values.iter().any(|listed| listed == value));
    let compare = |test: fn(i64, i64) -> bool| {
        let limit = values.first().and_then(|limit| limit.parse().ok());
        value.and_then(|value| value.parse().ok()).zip(limit).is_some_and(|(value, limit)| test(value, limit))
    };
    match requirement.operator.as_str() {
        "In" => listed,
        "NotIn" => !listed,
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => compare(|value, limit| value > limit),
        "Lt" => compare(|value, limit| value < limit),
        _ => false,
    }
}
