//! Making room: which pods of lower priority have to go, and where that harms least. Pods are taken off the table and
//! put back to see what would be, so the answer follows every filter's rules. Ranking, limits and words are upstream's
//! (`DefaultPreemption`).

use crate::cycle::{Found, check_with_nominated, explained};
use crate::objects::World;
use crate::plugins::{Cycle, Verdict};
use crate::pod::PodInfo;
use crate::table::{Placed, Slot};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use knarr_client::selector::Selector;
use rand::Rng;
use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;

/// Room made for a pod.
#[derive(Debug, Clone)]
pub struct Preemption {
    pub node: Arc<str>,
    pub victims: Vec<Arc<PodInfo>>,
    /// Victims whose disruption budgets do not allow it.
    pub violations: usize,
    /// Less important pods that were promised room there and have to look again.
    pub unpromised: Vec<Arc<PodInfo>>,
    /// The other candidates, best first, for extenders to choose from.
    pub others: Vec<(Arc<str>, Vec<Arc<PodInfo>>, usize)>,
}

pub enum Outcome {
    Preempt(Preemption),
    /// The pod may not preempt now, and why.
    Ineligible(String),
    /// No removal would help; by node, counted.
    Useless(Vec<String>),
}

const USELESS: &str = "Preemption is not helpful for scheduling";
const NO_VICTIMS: &str = "No preemption victims found for incoming pod";

/// Looks for pods whose removal makes room.
pub fn preempt(cycle: &Cycle, world: &mut World, found: &Found, random: &mut impl Rng) -> Outcome {
    if let Some(message) = ineligible(cycle, world, &found.refused) {
        return Outcome::Ineligible(message);
    }
    let mut reasons: HashMap<String, usize> = HashMap::new();
    let nodes = world.table.live().len();
    if found.refused.len() < nodes {
        reasons.insert(USELESS.to_owned(), nodes - found.refused.len());
    }
    let mut candidates = dry_run(cycle, world, found, random, &mut reasons);
    if candidates.is_empty() {
        return Outcome::Useless(
            reasons.into_iter().map(|(reason, nodes)| format!("{nodes} {reason}")).collect(),
        );
    }
    candidates.sort_unstable();
    // Who has to go is worked out again for those that are asked about: most candidates are not.
    let budgets = Budgets::new(world);
    let asked = if cycle.profile.asks_about_victims { candidates.len() } else { 1 };
    let mut named = Vec::with_capacity(asked);
    for candidate in candidates.iter().take(asked) {
        let mut victims = Vec::new();
        let note = &mut |placed: &[Placed], _| victims.extend(placed.iter().map(|placed| placed.pod.clone()));
        if try_node(cycle, world, found, candidate.slot, &budgets, note).is_ok() {
            victims.sort_by_key(|pod| (Reverse(pod.priority), pod.started()));
            named.push((world.table.names[candidate.slot].clone(), victims, candidate.violations));
        }
    }
    let others = named.split_off(1.min(named.len()));
    let Some((node, victims, violations)) = named.pop() else { return Outcome::Useless(Vec::new()) };
    let lower =
        world.table.nominated_on(candidates[0].slot).iter().filter(|pod| pod.priority < cycle.pod.priority);
    let unpromised = lower.cloned().collect();
    Outcome::Preempt(Preemption { node, victims, violations, unpromised, others })
}

/// Why the pod may not preempt: it does not want to, or its victims are still going.
pub fn ineligible(cycle: &Cycle, world: &World, refused: &[Slot]) -> Option<String> {
    let spec = cycle.pod.spec();
    if spec.and_then(|spec| spec.preemption_policy.as_deref()) == Some("Never") {
        return Some("not eligible due to preemptionPolicy=Never.".to_owned());
    }
    let promised = world.table.nominated_node(&cycle.pod.key).or_else(|| cycle.pod.nominated_node())?;
    let slot = world.table.slot_of(promised).filter(|slot| refused.contains(slot))?;
    let going = |placed: &Placed| placed.pod.priority < cycle.pod.priority && is_preempted(&placed.pod);
    let waits = world.table.pods[slot].iter().any(going);
    waits.then(|| "not eligible due to a terminating pod on the nominated node.".to_owned())
}

fn is_preempted(pod: &PodInfo) -> bool {
    let conditions = pod.pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    let preempted = conditions.into_iter().flatten().any(|condition| {
        condition.type_ == "DisruptionTarget"
            && condition.status == "True"
            && condition.reason.as_deref() == Some("PreemptionByScheduler")
    });
    pod.is_terminating() && preempted
}

/// A node where room can be made. The smallest harms least: budgets, then the most important victim, then all of them,
/// then how many; and of equals the one whose most important victims started last.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    violations: usize,
    highest: i32,
    sum: i64,
    count: usize,
    started: Reverse<i64>,
    /// The order in which candidates were found.
    number: usize,
    slot: Slot,
}

impl Candidate {
    fn new(number: usize, slot: Slot, victims: &[Placed], violations: usize) -> Self {
        let highest = victims.iter().map(|placed| placed.priority).max().unwrap_or(i32::MIN);
        // Priorities may be negative; each victim weighs something.
        let weight = |placed: &Placed| i64::from(placed.priority) + i64::from(i32::MAX) + 1;
        let of_highest = victims.iter().filter(|placed| placed.priority == highest);
        Candidate {
            violations,
            highest,
            sum: victims.iter().map(weight).sum(),
            count: victims.len(),
            started: Reverse(of_highest.map(|placed| placed.started).min().unwrap_or(i64::MAX)),
            number,
            slot,
        }
    }
}

fn dry_run(
    cycle: &Cycle,
    world: &mut World,
    found: &Found,
    random: &mut impl Rng,
    reasons: &mut HashMap<String, usize>,
) -> Vec<Candidate> {
    let args = &cycle.profile.args.preemption;
    let potential = &found.refused;
    let wanted =
        (potential.len() * args.min_candidate_nodes_percentage / 100).max(args.min_candidate_nodes_absolute);
    let start = if potential.is_empty() { 0 } else { random.random_range(0..potential.len()) };
    let budgets = Budgets::new(world);
    let (mut candidates, mut harmless, mut without_victims) = (Vec::new(), false, 0);
    for offset in 0..potential.len() {
        let slot = potential[(start + offset) % potential.len()];
        if world.table.lowest_priority[slot] >= cycle.pod.priority {
            without_victims += 1;
            continue;
        }
        let number = candidates.len();
        let note = &mut |victims: &[Placed], violations| {
            harmless |= violations == 0;
            candidates.push(Candidate::new(number, slot, victims, violations));
        };
        if let Err(texts) = try_node(cycle, world, found, slot, &budgets, note) {
            texts.into_iter().for_each(|text| *reasons.entry(text).or_insert(0) += 1);
        }
        if harmless && candidates.len() >= wanted {
            break;
        }
    }
    if without_victims > 0 {
        *reasons.entry(NO_VICTIMS.to_owned()).or_insert(0) += without_victims;
    }
    candidates
}

/// Finds the pods that have to go from a node, tells `note`, and puts them back: first all less important ones go, then
/// as many as possible stay, those with budgets and the most important first.
fn try_node(
    cycle: &Cycle,
    world: &mut World,
    found: &Found,
    slot: Slot,
    budgets: &Budgets,
    note: &mut dyn FnMut(&[Placed], usize),
) -> Result<(), Vec<String>> {
    let mut lower = Vec::new();
    for index in (0..world.table.pods[slot].len()).rev() {
        if world.table.pods[slot][index].priority < cycle.pod.priority {
            lower.push(world.table.take(slot, index));
        }
    }
    if lower.is_empty() {
        return Err(vec![NO_VICTIMS.to_owned()]);
    }
    if let Err((plugin, Verdict::Refused(code) | Verdict::Hopeless(code))) =
        check_with_nominated(cycle, world, &found.active, slot)
    {
        lower.into_iter().for_each(|placed| world.table.put(slot, placed));
        return Err(explained(cycle, world, plugin, code));
    }
    lower.sort_by_key(|placed| (Reverse(placed.priority), placed.started));
    let (violating, others) = budgets.split(lower);
    let (mut victims, mut violations) = (Vec::new(), 0);
    let violating = violating.into_iter().map(|placed| (placed, true));
    for (placed, violates) in violating.chain(others.into_iter().map(|placed| (placed, false))) {
        world.table.put(slot, placed);
        if check_with_nominated(cycle, world, &found.active, slot).is_err() {
            let last = world.table.pods[slot].len() - 1;
            victims.push(world.table.take(slot, last));
            violations += usize::from(violates);
        }
    }
    let result = match victims.is_empty() {
        // It would fit as it is: the next try will find that.
        true => Err(vec![NO_VICTIMS.to_owned()]),
        false => {
            note(&victims, violations);
            Ok(())
        }
    };
    victims.into_iter().for_each(|placed| world.table.put(slot, placed));
    result
}

/// Disruption budgets, with how many more disruptions each allows.
struct Budgets(Vec<(Arc<PodDisruptionBudget>, Selector, i32)>);

impl Budgets {
    fn new(world: &World) -> Self {
        let known = world.objects.budgets.iter().filter_map(|budget| {
            let selector = Selector::new(budget.spec.as_ref()?.selector.as_ref()?).ok()?;
            let allowed = budget.status.as_ref().map_or(0, |status| status.disruptions_allowed.unwrap_or(0));
            (!selector.is_empty()).then(|| (budget.clone(), selector, allowed))
        });
        Budgets(known.collect())
    }

    /// Pods whose removal breaks a budget, and the others; both keep their order.
    fn split(&self, pods: Vec<Placed>) -> (Vec<Placed>, Vec<Placed>) {
        if self.0.is_empty() {
            return (Vec::new(), pods);
        }
        let mut allowed: Vec<i32> = self.0.iter().map(|(_, _, allowed)| *allowed).collect();
        pods.into_iter().partition(|placed| self.is_broken_by(&placed.pod, &mut allowed))
    }

    fn is_broken_by(&self, pod: &PodInfo, allowed: &mut [i32]) -> bool {
        let mut broken = false;
        for ((budget, selector, _), allowed) in self.0.iter().zip(allowed) {
            let here = budget.metadata.namespace.as_deref() == Some(pod.namespace());
            let disrupted = budget.status.as_ref().and_then(|status| status.disrupted_pods.as_ref());
            // Counted already.
            let going = disrupted.is_some_and(|disrupted| disrupted.contains_key(&pod.key.name));
            if here && !going && pod.labels().is_some() && selector.matches(pod.labels()) {
                *allowed -= 1;
                broken |= *allowed < 0;
            }
        }
        broken
    }
}
