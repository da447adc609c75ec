//! InterPodAffinity: required affinity and anti-affinity between pods, of the incoming pod and of those that run.
//! Preferred terms do not score yet.
//!
//! Counted afresh each cycle: pods are only walked when the incoming pod or a running one has such rules.

use super::{Cycle, Plugin, Verdict};
use crate::pod::PodInfo;
use crate::table::{NodeTable, Slot};
use k8s_openapi::api::core::v1::PodAffinityTerm;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};
use knarr_client::selector::Selector;
use std::collections::HashSet;

pub const PLUGIN: Plugin = Plugin {
    name: "InterPodAffinity",
    prepare: Some(prepare),
    filter: Some(filter),
    score: None,
    wakes: |event, _| event.node_added || event.node_labels || event.pod_removed || event.pod_added,
};

/// A topology label and a value of it.
type Domain = (String, String);

#[derive(Default)]
pub struct State {
    /// Domains that running pods' anti-affinity closes to the incoming pod.
    closed_by_others: HashSet<Domain>,
    affinity: Vec<Wish>,
    anti_affinity: Vec<Wish>,
    /// The pod matches its own affinity and nobody else does: it may be the first of its group.
    first_of_group: bool,
}

struct Wish {
    key: String,
    domains: HashSet<String>,
}

/// A required term, checked.
struct Term {
    key: String,
    selector: Selector,
    namespaces: Namespaces,
}

enum Namespaces {
    These(Vec<String>),
    All,
}

impl Term {
    fn matches(&self, pod: &PodInfo) -> bool {
        let namespace = match &self.namespaces {
            Namespaces::All => true,
            Namespaces::These(names) => names.iter().any(|name| name == pod.namespace()),
        };
        namespace && self.selector.matches(pod.pod.metadata.labels.as_ref())
    }
}

fn prepare(cycle: &mut Cycle) -> Result<(), String> {
    let (affinity, anti_affinity) = (terms(cycle.pod, true)?, terms(cycle.pod, false)?);
    let table = cycle.table;
    let mut state = State { closed_by_others: closed_by_others(cycle.pod, table)?, ..State::default() };
    if !affinity.is_empty() {
        // Upstream: a running pod counts for affinity only when it matches all terms.
        let matching = |other: &PodInfo| affinity.iter().all(|term| term.matches(other));
        state.affinity = affinity.iter().map(|term| wish(table, &term.key, &matching)).collect();
        let nobody = state.affinity.iter().all(|wish| wish.domains.is_empty());
        state.first_of_group = nobody && matching(cycle.pod);
    }
    state.anti_affinity =
        anti_affinity.iter().map(|term| wish(table, &term.key, &|other| term.matches(other))).collect();
    cycle.affinity = state;
    Ok(())
}

/// The required terms of a pod: affinity or anti-affinity.
fn terms(pod: &PodInfo, affinity: bool) -> Result<Vec<Term>, String> {
    let Some(rules) = pod.pod.spec.as_ref().and_then(|spec| spec.affinity.as_ref()) else {
        return Ok(Vec::new());
    };
    let required = if affinity {
        rules
            .pod_affinity
            .as_ref()
            .and_then(|rules| rules.required_during_scheduling_ignored_during_execution.as_ref())
    } else {
        rules
            .pod_anti_affinity
            .as_ref()
            .and_then(|rules| rules.required_during_scheduling_ignored_during_execution.as_ref())
    };
    required.into_iter().flatten().map(|rule| term(pod, rule)).collect()
}

fn term(pod: &PodInfo, rule: &PodAffinityTerm) -> Result<Term, String> {
    let selector = match &rule.label_selector {
        // No selector matches no pod.
        None => Selector::none(),
        Some(selector) => {
            Selector::new(&with_label_keys(pod, rule, selector)).map_err(|error| error.to_string())?
        }
    };
    let named = rule.namespaces.clone().unwrap_or_default();
    let namespaces = match &rule.namespace_selector {
        None if named.is_empty() => Namespaces::These(vec![pod.namespace().to_owned()]),
        None => Namespaces::These(named),
        Some(selector) if *selector == LabelSelector::default() => Namespaces::All,
        Some(_) => return Err("pod affinity with a namespaceSelector is not supported yet".to_owned()),
    };
    Ok(Term { key: rule.topology_key.clone(), selector, namespaces })
}

fn with_label_keys(pod: &PodInfo, rule: &PodAffinityTerm, selector: &LabelSelector) -> LabelSelector {
    let mut selector = selector.clone();
    let lists = [("In", &rule.match_label_keys), ("NotIn", &rule.mismatch_label_keys)];
    for (operator, keys) in lists {
        for key in keys.iter().flatten() {
            let Some(value) = pod.pod.metadata.labels.as_ref().and_then(|labels| labels.get(key)) else {
                continue;
            };
            selector.match_expressions.get_or_insert_default().push(LabelSelectorRequirement {
                key: key.clone(),
                operator: operator.to_owned(),
                values: Some(vec![value.clone()]),
            });
        }
    }
    selector
}

/// The domains in which a pod runs that matches.
fn wish(table: &NodeTable, key: &str, matches: &dyn Fn(&PodInfo) -> bool) -> Wish {
    let live = table.live().iter().filter(|slot| table.pods[**slot].values().any(|pod| matches(pod)));
    let domains = live.filter_map(|slot| table.labels[*slot].get(key).cloned()).collect();
    Wish { key: key.to_owned(), domains }
}

fn closed_by_others(pod: &PodInfo, table: &NodeTable) -> Result<HashSet<Domain>, String> {
    let mut closed = HashSet::new();
    for (slot, other) in table.repelling() {
        for term in terms(other, false)? {
            if let Some(value) = table.labels[slot].get(&term.key).filter(|_| term.matches(pod)) {
                closed.insert((term.key.clone(), value.clone()));
            }
        }
    }
    Ok(closed)
}

fn filter(cycle: &Cycle, slot: Slot) -> Verdict {
    let (state, labels) = (&cycle.affinity, &cycle.table.labels[slot]);
    let inside = |wish: &Wish| labels.get(&wish.key).is_some_and(|value| wish.domains.contains(value));
    let has_keys = state.affinity.iter().all(|wish| labels.contains_key(&wish.key));
    let with_friends = has_keys && (state.first_of_group || state.affinity.iter().all(inside));
    if !with_friends {
        return Verdict::hopeless("node(s) didn't match pod affinity rules");
    }
    if state.anti_affinity.iter().any(inside) {
        return Verdict::refused("node(s) didn't match pod anti-affinity rules");
    }
    let closed = |(key, value): &Domain| labels.get(key) == Some(value);
    if state.closed_by_others.iter().any(closed) {
        return Verdict::refused("node(s) didn't satisfy existing pods anti-affinity rules");
    }
    Verdict::Fits
}
