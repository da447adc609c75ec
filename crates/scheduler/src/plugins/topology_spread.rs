//! PodTopologySpread: `DoNotSchedule` constraints keep the skew between domains; `ScheduleAnyway` ones, and those that
//! the configuration gives pods without their own, prefer emptier domains.

use super::{Cycle, Plugin, Point, Prepared, Scored, Sees, Verdict, quotient};
use crate::event::{ClusterEvent, kind};
use crate::filters::{Filter, Tolerations};
use crate::groups::{CounterId, TopologyId};
use crate::objects::World;
use crate::pod::{PodInfo, SpreadRule};
use crate::table::Slot;
use crate::topology::{EACH_NODE, NOWHERE};

pub const PLUGIN: Plugin = Plugin {
    name: "PodTopologySpread",
    points: &[Point::PreFilter, Point::Filter, Point::PreScore, Point::Score],
    weight: 2,
    prepare: Some(prepare),
    filter: Some(filter),
    filter_many: Some(filter_many),
    sees: Sees::Pods,
    explain: |_, _, code| {
        let text = "node(s) didn't match pod topology spread constraints";
        vec![if code == MISSING { format!("{text} (missing required label)") } else { text.to_owned() }]
    },
    score: Some(score),
    hears: kind::NODE | kind::POD_PLACED | kind::POD_REMOVED | kind::POD_CHANGED,
    wakes,
};

const MISSING: u32 = 1;
const HOSTNAME: &str = "kubernetes.io/hostname";
const ZONE: &str = "topology.kubernetes.io/zone";

/// What pods without constraints of their own get, if they belong to a service or an owner.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SpreadArgs {
    pub defaults: SpreadDefaults,
}

#[derive(Debug, Clone, PartialEq, Default)]
pub enum SpreadDefaults {
    /// Over hosts and zones, as preferences; nodes without zones are spread over by host alone.
    #[default]
    System,
    /// These: topology, skew, whether they are required.
    List(Vec<(String, i64, bool)>),
}

#[derive(Debug, Default)]
pub struct State {
    hard: Vec<Hard>,
}

#[derive(Debug)]
struct Hard {
    counter: CounterId,
    topology: TopologyId,
    max_skew: i64,
    min_domains: i64,
    own: i64,
}

fn wakes(event: &ClusterEvent, pod: &PodInfo) -> bool {
    let counts = |other: &PodInfo| other.namespace() == pod.namespace();
    match event {
        ClusterEvent::PodPlaced(other) | ClusterEvent::PodRemoved(other) => counts(other),
        ClusterEvent::PodChanged { old, new } => counts(new) && old.class != new.class,
        ClusterEvent::NodeRemoved => true,
        _ => event.labels_changed() || event.taints_changed(),
    }
}

/// The pod's own rules, or the default ones; and whether the latter are the system's.
fn rules(cycle: &Cycle, world: &mut World) -> (Vec<SpreadRule>, bool) {
    if !cycle.pod.spread.is_empty() {
        return (cycle.pod.spread.clone(), false);
    }
    let defaults = &cycle.profile.args.spread.defaults;
    let (list, system) = match defaults {
        SpreadDefaults::System => (vec![(HOSTNAME.to_owned(), 3, false), (ZONE.to_owned(), 5, false)], true),
        SpreadDefaults::List(list) => (list.clone(), false),
    };
    if list.is_empty() {
        return (Vec::new(), system);
    }
    let Some(predicate) = world.objects.default_group(cycle.pod) else { return (Vec::new(), system) };
    let counts_itself = predicate.matches(&cycle.pod.class, world.table.groups.namespaces());
    let rule = |(topology, max_skew, hard)| SpreadRule {
        hard,
        topology,
        max_skew,
        min_domains: 1,
        predicate: predicate.clone(),
        honors_affinity: true,
        honors_taints: false,
        counts_itself,
    };
    (list.into_iter().map(rule).collect(), system)
}

fn filter_of(pod: &PodInfo, rule: &SpreadRule, keys: &[String]) -> Filter {
    Filter {
        selection: pod.selection.clone().filter(|_| rule.honors_affinity),
        tolerations: rule.honors_taints.then(|| Tolerations(pod.tolerations().cloned().unwrap_or_default())),
        keys: keys.to_vec(),
    }
}

fn prepare(cycle: &mut Cycle, world: &mut World) -> Prepared {
    let has_hard_default = || match &cycle.profile.args.spread.defaults {
        SpreadDefaults::System => false,
        SpreadDefaults::List(list) => list.iter().any(|(_, _, hard)| *hard),
    };
    if !cycle.pod.spread.iter().any(|rule| rule.hard) && (!cycle.pod.spread.is_empty() || !has_hard_default())
    {
        return Prepared::Skip;
    }
    let (rules, _) = rules(cycle, world);
    let rules: Vec<SpreadRule> = rules.into_iter().filter(|rule| rule.hard).collect();
    let mut keys: Vec<String> = rules.iter().map(|rule| rule.topology.clone()).collect();
    keys.sort();
    keys.dedup();
    for rule in &rules {
        let filter = world.table.filter(filter_of(cycle.pod, rule, &keys));
        let counter = world.table.counter(&rule.predicate, &rule.topology, Some(filter), true);
        cycle.spread.hard.push(Hard {
            counter,
            topology: world.table.groups.get_topology(&rule.topology, &world.table.nodes),
            max_skew: rule.max_skew,
            min_domains: rule.min_domains,
            own: rule.counts_itself.into(),
        });
    }
    if rules.is_empty() { Prepared::Skip } else { Prepared::Ready }
}

fn filter(cycle: &Cycle, world: &World, slot: Slot) -> Verdict {
    let groups = &world.table.groups;
    for rule in &cycle.spread.hard {
        let domain = groups.topology(rule.topology).domain(slot);
        if domain == NOWHERE {
            return Verdict::Hopeless(MISSING);
        }
        let counter = groups.counter(rule.counter);
        let (least, domains) = counter.least();
        // With fewer domains than wished the missing ones count as empty.
        let least = if i64::from(domains) < rule.min_domains { 0 } else { least };
        if i64::from(counter.get(domain)) + rule.own - i64::from(least) > rule.max_skew {
            return Verdict::Refused(0);
        }
    }
    Verdict::Fits
}

fn filter_many(cycle: &Cycle, world: &World, slots: &[Slot], verdicts: &mut [Verdict]) {
    let groups = &world.table.groups;
    for rule in &cycle.spread.hard {
        let (counter, domains_of) = (groups.counter(rule.counter), &groups.topology(rule.topology).of);
        let (least, domains) = counter.least();
        let least = if i64::from(domains) < rule.min_domains { 0 } else { i64::from(least) };
        let most = rule.max_skew + least - rule.own;
        let counts = counter.column();
        for (slot, verdict) in
            slots.iter().zip(&mut *verdicts).filter(|(_, verdict)| **verdict == Verdict::Fits)
        {
            let domain = domains_of[*slot];
            *verdict = match counts.get(domain as usize) {
                _ if domain == NOWHERE => Verdict::Hopeless(MISSING),
                Some(count) if i64::from(*count) > most => Verdict::Refused(0),
                None if 0 > most => Verdict::Refused(0),
                _ => Verdict::Fits,
            };
        }
    }
}

struct Soft {
    counter: CounterId,
    topology: TopologyId,
    max_skew: i64,
    weight: f64,
}

/// Fewer matching pods in the domain are better; small topologies weigh less per pod (upstream's formula).
fn score(cycle: &mut Cycle, world: &mut World, slots: &[Slot], scores: &mut [i64]) -> Scored {
    let (rules, system) = rules(cycle, world);
    let rules: Vec<SpreadRule> = rules.into_iter().filter(|rule| !rule.hard).collect();
    if rules.is_empty() {
        return Scored::Skip;
    }
    // The system's constraints also apply to nodes that have only some of the labels.
    let mut keys: Vec<String> =
        if system { Vec::new() } else { rules.iter().map(|rule| rule.topology.clone()).collect() };
    keys.sort();
    keys.dedup();
    let soft: Vec<Soft> = rules.iter().map(|rule| soft(cycle, world, rule, &keys)).collect();
    let all = Filter { keys, ..Default::default() };
    let ignored: Vec<bool> = match all.is_everything() {
        true => vec![false; slots.len()],
        false => {
            let all = world.table.filter(all);
            let bits = world.table.filters.bits(all);
            slots.iter().map(|slot| !bits[*slot]).collect()
        }
    };
    let groups = &world.table.groups;
    let scored = ignored.iter().filter(|ignored| !**ignored).count();
    let soft: Vec<Soft> = soft
        .into_iter()
        .zip(&rules)
        .map(|(soft, rule)| {
            let size = match rule.topology == HOSTNAME {
                true => scored,
                false => domains(world, soft.topology, slots, &ignored),
            };
            Soft { weight: ((size + 2) as f64).ln(), ..soft }
        })
        .collect();
    let mut sums = vec![0.0; slots.len()];
    for rule in &soft {
        let (counter, domain_of) = (groups.counter(rule.counter), &groups.topology(rule.topology).of);
        let (counts, counted_in) = (counter.column(), &groups.topology(counter.topology()).of);
        for (sum, slot) in sums.iter_mut().zip(slots) {
            if domain_of[*slot] != NOWHERE {
                let pods = counts.get(counted_in[*slot] as usize).copied().unwrap_or(0);
                *sum += f64::from(pods) * rule.weight + (rule.max_skew - 1) as f64;
            }
        }
    }
    for ((score, sum), ignored) in scores.iter_mut().zip(&sums).zip(&ignored) {
        *score = if *ignored { 0 } else { rounded(*sum) };
    }
    fewest_is_best(scores, &ignored);
    Scored::Each
}

/// To the nearest whole number, halves up; for what is not negative, and without a call into the mathematics library.
fn rounded(sum: f64) -> i64 {
    let whole = sum as i64;
    whole + i64::from(sum - whole as f64 >= 0.5)
}

fn soft(cycle: &Cycle, world: &mut World, rule: &SpreadRule, keys: &[String]) -> Soft {
    // On its own node every pod counts, whatever the policies say of the node.
    let (counted_by, filter) = match rule.topology == HOSTNAME {
        true => (EACH_NODE, None),
        false => {
            let filter = filter_of(cycle.pod, rule, keys);
            (rule.topology.as_str(), (!filter.is_everything()).then(|| world.table.filter(filter)))
        }
    };
    Soft {
        counter: world.table.counter(&rule.predicate, counted_by, filter, false),
        topology: world.table.groups.get_topology(&rule.topology, &world.table.nodes),
        max_skew: rule.max_skew,
        weight: 0.0,
    }
}

/// The number of domains among the nodes that fit; nodes without the label are one more.
fn domains(world: &World, topology: TopologyId, slots: &[Slot], ignored: &[bool]) -> usize {
    let topology = world.table.groups.topology(topology);
    let mut seen = vec![false; topology.len() + 1];
    for (slot, _) in slots.iter().zip(ignored).filter(|(_, ignored)| !**ignored) {
        let domain = topology.domain(*slot);
        seen[if domain == NOWHERE { topology.len() } else { domain as usize }] = true;
    }
    seen.into_iter().filter(|seen| *seen).count()
}

fn fewest_is_best(scores: &mut [i64], ignored: &[bool]) {
    let counted = || scores.iter().zip(ignored).filter(|(_, ignored)| !**ignored).map(|(score, _)| *score);
    let (least, most) = (counted().min().unwrap_or(0), counted().max().unwrap_or(0));
    for (score, ignored) in scores.iter_mut().zip(ignored) {
        *score = match (ignored, most) {
            (true, _) => 0,
            (_, 0) => 100,
            // Half of the time of scoring would go into divisions of integers; these are small and positive.
            _ => quotient(100 * (most + least - *score), most),
        };
    }
}
