//! InterPodAffinity: affinity and anti-affinity between pods, of the incoming pod and of those that run. Required terms
//! decide, preferred ones score; a running pod's required affinity scores too, as much as the arguments say.
//!
//! Nothing is scanned: the terms name counters of the table, read as they are at the moment of the question.

use super::{Cycle, Plugin, Point, Prepared, Scored, Sees, Verdict};
use crate::event::{ClusterEvent, kind};
use crate::groups::{CounterId, Groups, OwnerId, OwnerKind, TopologyId};
use crate::objects::World;
use crate::pod::PodInfo;
use crate::table::Slot;
use crate::topology::{DomainId, NOWHERE};
use std::sync::Arc;

pub const PLUGIN: Plugin = Plugin {
    name: "InterPodAffinity",
    points: &[Point::PreFilter, Point::Filter, Point::PreScore, Point::Score],
    weight: 2,
    prepare: Some(prepare),
    filter: Some(filter),
    filter_many: Some(filter_many),
    sees: Sees::Pods,
    explain: |_, _, code| {
        let text = match code {
            AFFINITY => "node(s) didn't match pod affinity rules",
            ANTI_AFFINITY => "node(s) didn't match pod anti-affinity rules",
            _ => "node(s) didn't satisfy existing pods anti-affinity rules",
        };
        vec![text.to_owned()]
    },
    score: Some(score),
    hears: kind::NODE | kind::POD_PLACED | kind::POD_REMOVED | kind::POD_CHANGED | kind::NAMESPACE,
    wakes,
};

const AFFINITY: u32 = 0;
const ANTI_AFFINITY: u32 = 1;
const EXISTING: u32 = 2;

#[derive(Debug, Clone, PartialEq)]
pub struct AffinityArgs {
    /// How much a running pod's required affinity scores for pods it means.
    pub hard_weight: i64,
    pub ignores_preferences_of_existing: bool,
}

impl Default for AffinityArgs {
    fn default() -> Self {
        AffinityArgs { hard_weight: 1, ignores_preferences_of_existing: false }
    }
}

#[derive(Debug, Default)]
pub struct State {
    affinity: Vec<(CounterId, TopologyId)>,
    /// The pod matches its own affinity: where nobody else does yet, it may be the first of its group.
    matches_itself: bool,
    anti_affinity: Vec<CounterId>,
    /// Anti-affinity of running pods that means this one.
    repelled_by: Vec<OwnerId>,
}

fn wakes(event: &ClusterEvent, pod: &PodInfo) -> bool {
    let affine = || pod.affinity.as_ref().is_some_and(|affinity| affinity.required.is_some());
    match event {
        // Somebody to be near to.
        ClusterEvent::PodPlaced(other) => affine() && may_want(pod, other),
        ClusterEvent::PodChanged { old, new } => old.class != new.class,
        // Somebody to be away from, who is or keeps away.
        ClusterEvent::PodRemoved(_) => true,
        ClusterEvent::NamespaceChanged => pod.affinity.is_some(),
        _ => event.labels_changed(),
    }
}

/// Whether the other pod's labels and namespace could satisfy the required affinity; labels of namespaces are left to
/// the next try.
fn may_want(pod: &PodInfo, other: &PodInfo) -> bool {
    let required = pod.affinity.as_ref().and_then(|affinity| affinity.required.as_ref());
    required.is_some_and(|(predicate, _)| {
        predicate.terms.iter().all(|term| {
            let namespace = term.namespace_selector.is_some()
                || term.namespaces.iter().any(|name| name == other.namespace());
            namespace && term.selector.matches(other.labels())
        })
    })
}

fn prepare(cycle: &mut Cycle, world: &mut World) -> Prepared {
    if let Some(error) = &cycle.pod.error {
        return Prepared::Rejected(error.clone());
    }
    let table = &mut world.table;
    let mut state = State::default();
    if let Some(affinity) = &cycle.pod.affinity {
        if let Some((predicate, topologies)) = &affinity.required {
            for topology in topologies {
                let counter = table.counter(predicate, topology, None, false);
                state.affinity.push((counter, table.groups.get_topology(topology, &table.nodes)));
            }
            state.matches_itself = predicate.matches(&cycle.pod.class, table.groups.namespaces());
        }
        let anti = affinity.required_anti.iter();
        state.anti_affinity =
            anti.map(|rule| table.counter(&rule.predicate, &rule.topology, None, false)).collect();
    }
    let owners = table.groups.owners_of(cycle.class);
    state.repelled_by =
        owners.filter(|owner| table.groups.owner(*owner).kind() == OwnerKind::Repels).collect();
    let nearest = nearest(&state, &table.groups);
    let idle = state.affinity.is_empty() && state.anti_affinity.is_empty() && state.repelled_by.is_empty();
    cycle.affinity = state;
    if let Some((domains, topology, nodes)) = nearest {
        cycle.narrow(nodes, world, |world| Arc::new(nodes_in(world, topology, &domains)));
    }
    if idle { Prepared::Skip } else { Prepared::Ready }
}

/// The domains with somebody to be near to, of the term that leaves the fewest nodes, and how many nodes these are.
fn nearest(state: &State, groups: &Groups) -> Option<(Vec<DomainId>, TopologyId, usize)> {
    let nobody = || state.affinity.iter().all(|(counter, _)| groups.counter(*counter).total == 0);
    if state.affinity.is_empty() || (state.matches_itself && nobody()) {
        return None;
    }
    let of_term = |(counter, topology): &(CounterId, TopologyId)| {
        let inhabited = (0..).zip(groups.counter(*counter).column()).filter(|(_, pods)| **pods > 0);
        let domains: Vec<DomainId> = inhabited.map(|(domain, _)| domain).collect();
        let known = groups.topology(*topology);
        let nodes = domains.iter().map(|domain| known.nodes_in(*domain) as usize).sum();
        (domains, *topology, nodes)
    };
    state.affinity.iter().map(of_term).min_by_key(|(_, _, nodes)| *nodes)
}

/// The nodes of the domains; these take turns, so that looking at a part looks at all of them.
fn nodes_in(world: &mut World, topology: TopologyId, domains: &[DomainId]) -> Vec<Slot> {
    world.table.gather(topology);
    let topology = world.table.groups.topology(topology);
    let mut lists: Vec<&[u32]> = domains.iter().map(|domain| topology.members(*domain)).collect();
    let mut slots = Vec::with_capacity(lists.iter().map(|list| list.len()).sum());
    if let [only] = lists.as_slice() {
        slots.extend(only.iter().map(|slot| *slot as Slot));
        return slots;
    }
    for turn in 0.. {
        lists.retain(|list| list.len() > turn);
        if lists.is_empty() {
            break;
        }
        slots.extend(lists.iter().map(|list| list[turn] as Slot));
    }
    slots
}

fn filter(cycle: &Cycle, world: &World, slot: Slot) -> Verdict {
    let (state, groups) = (&cycle.affinity, &world.table.groups);
    if !state.affinity.is_empty() {
        let labelled =
            state.affinity.iter().all(|(_, topology)| groups.topology(*topology).domain(slot) != NOWHERE);
        let near = || state.affinity.iter().all(|(counter, _)| groups.count_at(*counter, slot) > 0);
        let nobody = || state.affinity.iter().all(|(counter, _)| groups.counter(*counter).total == 0);
        if !labelled || !(near() || (state.matches_itself && nobody())) {
            return Verdict::Hopeless(AFFINITY);
        }
    }
    if state.anti_affinity.iter().any(|counter| groups.count_at(*counter, slot) > 0) {
        return Verdict::Refused(ANTI_AFFINITY);
    }
    let repelled = |owner: &OwnerId| {
        let owner = groups.owner(*owner);
        owner.get(groups.topology(owner.topology()).domain(slot)) > 0
    };
    if state.repelled_by.iter().any(repelled) {
        return Verdict::Refused(EXISTING);
    }
    Verdict::Fits
}

fn filter_many(cycle: &Cycle, world: &World, slots: &[Slot], verdicts: &mut [Verdict]) {
    let (state, groups) = (&cycle.affinity, &world.table.groups);
    let nobody = state.affinity.iter().all(|(counter, _)| groups.counter(*counter).total == 0);
    let may_be_first = state.matches_itself && nobody;
    let refuse = |verdicts: &mut [Verdict], as_what: Verdict, holds: &dyn Fn(Slot) -> bool| {
        for (slot, verdict) in slots.iter().zip(verdicts) {
            if *verdict == Verdict::Fits && !holds(*slot) {
                *verdict = as_what;
            }
        }
    };
    for (counter, topology) in &state.affinity {
        let (counts, domain_of) = (groups.counter(*counter).column(), &groups.topology(*topology).of);
        refuse(verdicts, Verdict::Hopeless(AFFINITY), &|slot| {
            let domain = domain_of[slot];
            domain != NOWHERE && (may_be_first || counts.get(domain as usize).is_some_and(|pods| *pods > 0))
        });
    }
    for counter in &state.anti_affinity {
        let counter = groups.counter(*counter);
        let (counts, domain_of) = (counter.column(), &groups.topology(counter.topology()).of);
        refuse(verdicts, Verdict::Refused(ANTI_AFFINITY), &|slot| {
            counts.get(domain_of[slot] as usize).is_none_or(|pods| *pods == 0)
        });
    }
    for owner in &state.repelled_by {
        let owner = groups.owner(*owner);
        let domain_of = &groups.topology(owner.topology()).of;
        refuse(verdicts, Verdict::Refused(EXISTING), &|slot| owner.get(domain_of[slot]) <= 0);
    }
}

/// Matching pods in the node's domains times the weights of the terms; the best becomes 100, the worst 0.
fn score(cycle: &mut Cycle, world: &mut World, slots: &[Slot], scores: &mut [i64]) -> Scored {
    let args = &cycle.profile.args.affinity;
    let preferred =
        cycle.pod.affinity.as_ref().map(|affinity| affinity.preferred.as_slice()).unwrap_or_default();
    if preferred.is_empty() && args.ignores_preferences_of_existing {
        return Scored::Skip;
    }
    let table = &mut world.table;
    let own: Vec<(CounterId, i64)> = preferred
        .iter()
        .map(|(weight, rule)| (table.counter(&rule.predicate, &rule.topology, None, false), *weight))
        .collect();
    let groups = &table.groups;
    let weight_of = |owner: OwnerId| match groups.owner(owner).kind() {
        OwnerKind::Repels => None,
        OwnerKind::Attracts => (args.hard_weight > 0).then_some((owner, args.hard_weight)),
        OwnerKind::Prefers => (!args.ignores_preferences_of_existing).then_some((owner, 1)),
    };
    let others: Vec<(OwnerId, i64)> = groups.owners_of(cycle.class).filter_map(weight_of).collect();
    if own.is_empty() && others.is_empty() {
        return Scored::Skip;
    }
    scores.fill(0);
    // Rule by rule: each reads two columns.
    for (counter, weight) in own {
        let counter = groups.counter(counter);
        let (counts, domain_of) = (counter.column(), &groups.topology(counter.topology()).of);
        for (score, slot) in scores.iter_mut().zip(slots) {
            *score += counts.get(domain_of[*slot] as usize).map_or(0, |pods| weight * i64::from(*pods));
        }
    }
    for (owner, weight) in others {
        let owner = groups.owner(owner);
        let (sums, domain_of) = (owner.column(), &groups.topology(owner.topology()).of);
        for (score, slot) in scores.iter_mut().zip(slots) {
            *score += sums.get(domain_of[*slot] as usize).map_or(0, |sum| weight * sum);
        }
    }
    let (least, most) =
        (scores.iter().copied().min().unwrap_or(0), scores.iter().copied().max().unwrap_or(0));
    for score in scores {
        *score = match most - least {
            0 => 0,
            range => (100.0 * ((*score - least) as f64 / range as f64)) as i64,
        };
    }
    Scored::Each
}
