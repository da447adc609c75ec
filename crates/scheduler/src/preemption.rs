//! Making room: which pods of lower priority have to go, and where that harms least. Pods are taken off the table and
//! put back to see what would be, so the answer follows every filter's rules; where no active filter but that of
//! resources sees pods, sums tell the same without touching the table. Ranking, limits and words are upstream's
//! (`DefaultPreemption`).

use crate::cycle::{Found, check_with_nominated, explained, promised_slots};
use crate::objects::World;
use crate::plugins::{Cycle, PLUGINS, PluginId, Room, Sees, Verdict};
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
    let mut trial = Trial::new(cycle, world, found);
    let mut candidates = trial.dry_run(world, random);
    if candidates.is_empty() {
        return Outcome::Useless(trial.reasons(world));
    }
    let asked = if cycle.profile.asks_about_victims { candidates.len() } else { 1 };
    match asked {
        1 => candidates = candidates.into_iter().min().into_iter().collect(),
        _ => candidates.sort_unstable(),
    }
    // Who has to go is worked out again for those that are asked about: most candidates are not.
    let mut named = Vec::with_capacity(asked);
    for candidate in candidates.iter().take(asked) {
        let mut harm = Harm { pods: Some(Vec::new()), ..Harm::default() };
        if trial.try_node(world, candidate.slot, &mut harm).is_ok() {
            let mut victims = harm.pods.unwrap_or_default();
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

/// What the victims of one node come to.
struct Harm {
    violations: usize,
    highest: i32,
    sum: i64,
    count: usize,
    /// When the first of the most important ones started.
    started: i64,
    /// Their names, if somebody asks.
    pods: Option<Vec<Arc<PodInfo>>>,
}

impl Default for Harm {
    fn default() -> Self {
        Harm { violations: 0, highest: i32::MIN, sum: 0, count: 0, started: i64::MAX, pods: None }
    }
}

impl Harm {
    fn add(&mut self, victim: &Placed, violates: bool) {
        if victim.priority > self.highest {
            (self.highest, self.started) = (victim.priority, i64::MAX);
        }
        if victim.priority == self.highest {
            self.started = self.started.min(victim.started);
        }
        // Priorities may be negative; each victim weighs something.
        self.sum += i64::from(victim.priority) + i64::from(i32::MAX) + 1;
        self.count += 1;
        self.violations += usize::from(violates);
        if let Some(pods) = &mut self.pods {
            pods.push(victim.pod.clone());
        }
    }

    fn at(&self, slot: Slot, number: usize) -> Candidate {
        Candidate {
            violations: self.violations,
            highest: self.highest,
            sum: self.sum,
            count: self.count,
            started: Reverse(self.started),
            number,
            slot,
        }
    }
}

/// Why a node is no candidate.
enum Useless {
    NoVictims,
    /// A filter refuses it whoever goes.
    Refused(PluginId, u32),
}

/// What trying nodes needs, and how many were useless for which reason.
struct Trial<'a> {
    cycle: &'a Cycle<'a>,
    found: &'a Found,
    budgets: Budgets,
    /// Of the active filters only the one of resources sees which pods are on a node: then it is a matter of sums.
    only_resources: bool,
    /// By slot, nodes promised to pods that go before this one; empty if there are none.
    promised: Vec<bool>,
    useless: Vec<(PluginId, u32, usize)>,
    without_victims: usize,
    /// Positions of less important pods on the node in question; kept to be filled again.
    lower: Vec<usize>,
}

impl<'a> Trial<'a> {
    fn new(cycle: &'a Cycle<'a>, world: &World, found: &'a Found) -> Self {
        let seen = || found.active.iter().map(|id| PLUGINS[*id].sees);
        Trial {
            cycle,
            found,
            budgets: Budgets::new(world),
            only_resources: seen().all(|sees| sees != Sees::Pods)
                && seen().any(|sees| sees == Sees::Requests),
            promised: promised_slots(cycle, world),
            useless: Vec::new(),
            without_victims: 0,
            lower: Vec::new(),
        }
    }

    fn dry_run(&mut self, world: &mut World, random: &mut impl Rng) -> Vec<Candidate> {
        let args = &self.cycle.profile.args.preemption;
        let potential = &self.found.refused;
        let wanted = (potential.len() * args.min_candidate_nodes_percentage / 100)
            .max(args.min_candidate_nodes_absolute);
        let start = if potential.is_empty() { 0 } else { random.random_range(0..potential.len()) };
        let (mut candidates, mut harmless) = (Vec::new(), false);
        for slot in potential[start..].iter().chain(&potential[..start]).copied() {
            let mut harm = Harm::default();
            match self.try_node(world, slot, &mut harm) {
                Ok(()) => {
                    harmless |= harm.violations == 0;
                    candidates.push(harm.at(slot, candidates.len()));
                }
                Err(Useless::NoVictims) => self.without_victims += 1,
                Err(Useless::Refused(plugin, code)) => self.note(plugin, code),
            }
            if harmless && candidates.len() >= wanted {
                break;
            }
        }
        candidates
    }

    fn note(&mut self, plugin: PluginId, code: u32) {
        let known = self.useless.iter_mut().rev().find(|(by, what, _)| (*by, *what) == (plugin, code));
        match known {
            Some((_, _, nodes)) => *nodes += 1,
            None => self.useless.push((plugin, code, 1)),
        }
    }

    /// Why no node is a candidate, counted.
    fn reasons(&self, world: &World) -> Vec<String> {
        let mut reasons: HashMap<String, usize> = HashMap::new();
        let hopeless = world.table.live().len() - self.found.refused.len();
        let mut add = |reason: String, nodes| *reasons.entry(reason).or_insert(0) += nodes;
        add(USELESS.to_owned(), hopeless);
        add(NO_VICTIMS.to_owned(), self.without_victims);
        for (plugin, code, nodes) in &self.useless {
            explained(self.cycle, world, *plugin, *code).into_iter().for_each(|text| add(text, *nodes));
        }
        let reasons = reasons.into_iter().filter(|(_, nodes)| *nodes > 0);
        reasons.map(|(reason, nodes)| format!("{nodes} {reason}")).collect()
    }

    /// Finds the pods that have to go from a node, and adds them to `harm`: first all less important ones go, then as
    /// many as possible stay, those with budgets and the most important first. The table stays as it is.
    fn try_node(&mut self, world: &mut World, slot: Slot, harm: &mut Harm) -> Result<(), Useless> {
        if world.table.lowest_priority[slot] >= self.cycle.pod.priority {
            return Err(Useless::NoVictims);
        }
        let promised = self.promised.get(slot).copied().unwrap_or(false);
        match self.only_resources && !promised {
            true => self.reckon(world, slot, harm)?,
            false => self.remove_and_see(world, slot, harm)?,
        }
        // Without victims it would fit as it is: the next try will find that.
        if harm.count == 0 { Err(Useless::NoVictims) } else { Ok(()) }
    }

    /// With sums: no other rule asks which pods are there.
    fn reckon(&mut self, world: &World, slot: Slot, harm: &mut Harm) -> Result<(), Useless> {
        let pods = &world.table.pods[slot];
        let mut room = Room::new(self.cycle, world, slot);
        self.lower.clear();
        for (index, placed) in pods.iter().enumerate() {
            if placed.priority < self.cycle.pod.priority {
                room.leave(placed);
                self.lower.push(index);
            }
        }
        for &id in &self.found.active {
            let verdict = match PLUGINS[id].sees == Sees::Requests {
                true => room.verdict(world),
                false => PLUGINS[id].filter.map_or(Verdict::Fits, |filter| filter(self.cycle, world, slot)),
            };
            if let Verdict::Refused(code) | Verdict::Hopeless(code) = verdict {
                return Err(Useless::Refused(id, code));
            }
        }
        self.lower.sort_by_key(|index| (Reverse(pods[*index].priority), pods[*index].started));
        let violating = self.budgets.split(&mut self.lower, |index| pods[*index].pod.clone());
        for (place, index) in self.lower.iter().enumerate() {
            if !room.stays(&pods[*index]) {
                harm.add(&pods[*index], place < violating);
            }
        }
        Ok(())
    }

    /// With the pods taken off the table and put back, so that every filter sees what would be.
    fn remove_and_see(&self, world: &mut World, slot: Slot, harm: &mut Harm) -> Result<(), Useless> {
        let mut lower = Vec::new();
        for index in (0..world.table.pods[slot].len()).rev() {
            if world.table.pods[slot][index].priority < self.cycle.pod.priority {
                lower.push(world.table.take(slot, index));
            }
        }
        if let Err((plugin, Verdict::Refused(code) | Verdict::Hopeless(code))) =
            check_with_nominated(self.cycle, world, &self.found.active, slot)
        {
            lower.into_iter().for_each(|placed| world.table.put(slot, placed));
            return Err(Useless::Refused(plugin, code));
        }
        lower.sort_by_key(|placed| (Reverse(placed.priority), placed.started));
        let violating = self.budgets.split(&mut lower, |placed| placed.pod.clone());
        let mut victims = Vec::new();
        for (place, placed) in lower.into_iter().enumerate() {
            world.table.put(slot, placed);
            if check_with_nominated(self.cycle, world, &self.found.active, slot).is_err() {
                let last = world.table.pods[slot].len() - 1;
                let victim = world.table.take(slot, last);
                harm.add(&victim, place < violating);
                victims.push(victim);
            }
        }
        victims.into_iter().for_each(|placed| world.table.put(slot, placed));
        Ok(())
    }
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

    /// Puts those first whose removal breaks a budget, and says how many these are; both keep their order.
    fn split<T>(&self, pods: &mut Vec<T>, pod: impl Fn(&T) -> Arc<PodInfo>) -> usize {
        if self.0.is_empty() {
            return 0;
        }
        let mut allowed: Vec<i32> = self.0.iter().map(|(_, _, allowed)| *allowed).collect();
        let all = std::mem::take(pods).into_iter();
        let (violating, others): (Vec<T>, Vec<T>) =
            all.partition(|placed| self.is_broken_by(&pod(placed), &mut allowed));
        let count = violating.len();
        *pods = violating;
        pods.extend(others);
        count
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cycle::inspect;
    use crate::profile::Profile;
    use k8s_openapi::api::core::v1::{Node, Pod};
    use rand::SeedableRng;
    use rand::rngs::SmallRng;
    use serde_json::json;

    fn pod(name: &str, random: &mut SmallRng, priority: i32) -> Arc<PodInfo> {
        let mut requests = json!({"cpu": format!("{}00m", random.random_range(0..20))});
        if random.random_bool(0.3) {
            requests["x.io/device"] = json!("1");
        }
        let pod = json!({
            "metadata": {"name": name, "namespace": "ns", "uid": name, "labels": {"app": random.random_range(0..3).to_string()}},
            "spec": {"containers": [{"name": "c", "resources": {"requests": requests}}], "priority": priority},
            // No two alike, so that there is one order.
            "status": {"startTime": jiff::Timestamp::from_second(name[1..].parse().unwrap()).unwrap().to_string()},
        });
        let pod: Pod = serde_json::from_value(pod).unwrap();
        Arc::new(PodInfo::new(Arc::new(pod)))
    }

    fn world(random: &mut SmallRng) -> World {
        let mut world = World::default();
        for number in 0..6 {
            let node = json!({
                "metadata": {"name": format!("n{number}")},
                "status": {"allocatable": {"cpu": "4", "pods": random.random_range(2..9).to_string(), "x.io/device": "2"}},
            });
            let node: Node = serde_json::from_value(node).unwrap();
            world.table.set_node(Arc::new(node));
        }
        for number in 0..30 {
            let priority = random.random_range(0..4);
            let pod = pod(&format!("p{number}"), random, priority);
            world.table.add_pod(&format!("n{}", random.random_range(0..6)), pod);
        }
        for app in 0..2 {
            let budget = json!({
                "metadata": {"name": format!("b{app}"), "namespace": "ns"},
                "spec": {"selector": {"matchLabels": {"app": app.to_string()}}},
                "status": {"disruptionsAllowed": app, "currentHealthy": 1, "desiredHealthy": 1, "expectedPods": 1},
            });
            let budget: PodDisruptionBudget = serde_json::from_value(budget).unwrap();
            world.objects.budgets.set(&knarr_client::Change::Added(Arc::new(budget)));
        }
        world
    }

    type Told = Result<(Vec<String>, usize, i64), Option<(PluginId, u32)>>;

    fn told(result: Result<(), Useless>, harm: Harm) -> Told {
        match result {
            Err(Useless::NoVictims) => Err(None),
            Err(Useless::Refused(plugin, code)) => Err(Some((plugin, code))),
            Ok(()) => {
                let mut names: Vec<String> =
                    harm.pods.unwrap().iter().map(|pod| pod.key.name.clone()).collect();
                names.sort();
                Ok((names, harm.violations, harm.started))
            }
        }
    }

    #[test]
    fn sums_name_the_same_victims_as_removing_pods_and_looking() {
        let profile = Profile::default();
        let mut named = 0;
        for seed in 0..60 {
            let random = &mut SmallRng::seed_from_u64(seed);
            let mut world = world(random);
            let important = pod("p1000", random, 3);
            inspect::refused(&important, &profile, &mut world, |cycle, world, found| {
                let mut trial = Trial::new(cycle, world, found);
                assert!(trial.only_resources, "the pod has no rules about others");
                for &slot in &found.refused {
                    let ask = |trial: &mut Trial, world: &mut World| {
                        let mut harm = Harm { pods: Some(Vec::new()), ..Harm::default() };
                        told(trial.try_node(world, slot, &mut harm), harm)
                    };
                    let reckoned = ask(&mut trial, world);
                    trial.only_resources = false;
                    let seen = ask(&mut trial, world);
                    trial.only_resources = true;
                    assert_eq!(reckoned, seen, "seed {seed}, node {}", world.table.names[slot]);
                    named += usize::from(seen.is_ok());
                }
            });
        }
        assert!(named > 50, "only {named} nodes had victims: the test shows little");
    }
}
