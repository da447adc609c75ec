//! One decision, without I/O: which node, or why none. The wording is upstream's `FitError`.

use crate::metrics::{Status, Timing};
use crate::objects::World;
use crate::plugins::{
    BLOCK, Cycle, PLUGINS, PluginId, Point, Prepared, Scored, Verdict, VolumePlan, plan_volumes, plugin_id,
};
use crate::pod::PodInfo;
use crate::preemption::{self, Preemption};
use crate::profile::Profile;
use crate::table::Slot;
use rand::Rng;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// In larger clusters not all nodes are looked at: upstream's adaptive share, between these bounds.
const NODES_TO_FIND_MIN: usize = 100;
const PERCENT_MIN: usize = 5;
/// The code of nodes that a rule by name leaves out before any filter.
const LEFT_OUT: u32 = u32::MAX;

/// What became of a pod.
#[derive(Debug)]
pub enum Decision {
    /// The node, and what has to be written before the pod can be bound there.
    Node(Arc<str>, VolumePlan),
    Unschedulable(Box<Refusal>),
}

/// Why a pod fits nowhere, and what is done about it.
#[derive(Debug, Default)]
pub struct Refusal {
    /// For events and the PodScheduled condition.
    pub message: String,
    /// The plugins whose refusal an event has to turn around; empty when there is no node at all.
    pub rejected_by: Vec<PluginId>,
    /// Room is made for it.
    pub preemption: Option<Preemption>,
    /// The node it was nominated for cannot help it any more.
    pub forget_nomination: bool,
}

/// What others than our plugins (extenders) said about nodes.
#[derive(Debug, Default)]
pub struct Advice {
    /// The nodes they were asked about: no other may be chosen.
    pub asked: HashSet<Arc<str>>,
    /// By node: why not, and whether it is hopeless: no preemption could change that.
    pub refused: HashMap<String, (String, bool)>,
    /// By node: more score, weighted already.
    pub scores: HashMap<String, i64>,
}

impl Advice {
    fn accepts(&self, node: &Arc<str>) -> bool {
        self.asked.contains(node) && !self.refused.contains_key(&**node)
    }
}

/// What the scheduler keeps from one decision to the next.
#[derive(Debug)]
pub struct Chooser<R> {
    /// Where the last cycle stopped looking, so that all nodes get their turn.
    pub start: usize,
    /// Breaks ties fairly.
    pub random: R,
    /// How long the parts of the last decision took.
    pub timing: Timing,
    buffers: Buffers,
}

impl<R> Chooser<R> {
    pub fn new(random: R) -> Self {
        Chooser { start: 0, random, timing: Timing::default(), buffers: Buffers::default() }
    }
}

/// Memory that every decision fills anew.
#[derive(Debug, Default)]
struct Buffers {
    fitting: Vec<Slot>,
    totals: Vec<i64>,
    scores: Vec<i64>,
}

/// Decides for one pod.
pub fn decide(
    pod: &PodInfo,
    profile: &Profile,
    world: &mut World,
    chooser: &mut Chooser<impl Rng>,
    advice: Option<&Advice>,
) -> Decision {
    let mut cycle = Cycle::begin(pod, profile, world);
    let decision = in_cycle(&mut cycle, world, chooser, advice);
    cycle.end(world);
    decision
}

/// The nodes that fit, for an extender to look at; or what it comes to without one.
pub fn fitting_nodes(
    pod: &PodInfo,
    profile: &Profile,
    world: &mut World,
    chooser: &mut Chooser<impl Rng>,
) -> Result<Vec<Arc<str>>, Decision> {
    let mut cycle = Cycle::begin(pod, profile, world);
    let result = match find(&mut cycle, world, chooser, None) {
        Err(refusal) => Err(Decision::Unschedulable(refusal)),
        Ok(found) if found.fitting.is_empty() => {
            Err(Decision::Unschedulable(Box::new(found.refuse(&cycle, world, chooser))))
        }
        Ok(found) => Ok(found.fitting.iter().map(|slot| world.table.names[*slot].clone()).collect()),
    };
    cycle.end(world);
    result
}

fn in_cycle(
    cycle: &mut Cycle,
    world: &mut World,
    chooser: &mut Chooser<impl Rng>,
    advice: Option<&Advice>,
) -> Decision {
    let found = match find(cycle, world, chooser, advice) {
        Ok(found) => found,
        Err(refusal) => return Decision::Unschedulable(refusal),
    };
    if found.fitting.is_empty() {
        return Decision::Unschedulable(Box::new(found.refuse(cycle, world, chooser)));
    }
    let Chooser { random, buffers, timing, .. } = chooser;
    let begin = Instant::now();
    let slot = best(cycle, world, &found.fitting, advice, random, buffers, timing);
    timing.point(Point::Score, Status::Success, begin);
    buffers.fitting = found.fitting;
    Decision::Node(world.table.names[slot].clone(), plan_volumes(cycle, world, slot))
}

fn find(
    cycle: &mut Cycle,
    world: &mut World,
    chooser: &mut Chooser<impl Rng>,
    advice: Option<&Advice>,
) -> Result<Found, Box<Refusal>> {
    chooser.timing.begin();
    let nodes = world.table.live().len();
    if nodes == 0 {
        let message = "no nodes available to schedule pods".to_owned();
        return Err(Box::new(Refusal { message, ..Refusal::default() }));
    }
    let begin = Instant::now();
    let prepared = prepare(cycle, world, &mut chooser.timing);
    let status = if prepared.is_ok() { Status::Success } else { Status::Hopeless };
    chooser.timing.point(Point::PreFilter, status, begin);
    let active = prepared.map_err(|(plugin, reason)| {
        let hopeless = format!("{nodes} Preemption is not helpful for scheduling");
        let preemption = preemption::ineligible(cycle, world, &[])
            .unwrap_or_else(|| explain(nodes, None, vec![hopeless], None));
        let preempts = cycle.profile.preempts().then_some(preemption);
        Box::new(Refusal {
            message: explain(nodes, Some(&reason), Vec::new(), preempts.as_deref()),
            rejected_by: vec![plugin],
            forget_nomination: true,
            ..Refusal::default()
        })
    })?;
    let mut fitting = std::mem::take(&mut chooser.buffers.fitting);
    fitting.clear();
    let begin = Instant::now();
    let times = if chooser.timing.samples() {
        vec![(Duration::ZERO, Status::Success); active.len()]
    } else {
        Vec::new()
    };
    let found = Found { active, fitting, times, ..Found::default() };
    let found = found.look(cycle, world, &mut chooser.start, advice);
    let status = if found.fitting.is_empty() { Status::Unschedulable } else { Status::Success };
    chooser.timing.point(Point::Filter, status, begin);
    for (id, (took, status)) in found.active.iter().zip(&found.times) {
        chooser.timing.plugin(*id, Point::Filter, *status, *took);
    }
    Ok(found)
}

/// The filters that have something to say about the pod; or the rule that rejects it everywhere.
fn prepare(
    cycle: &mut Cycle,
    world: &mut World,
    timing: &mut Timing,
) -> Result<Vec<PluginId>, (PluginId, String)> {
    let mut active = Vec::with_capacity(cycle.profile.filters.len());
    for &id in &cycle.profile.filters {
        let begin = timing.samples().then(Instant::now);
        let prepared = PLUGINS[id].prepare.map_or(Prepared::Ready, |prepare| prepare(cycle, world));
        if let Some(begin) = begin.filter(|_| PLUGINS[id].prepare.is_some()) {
            let status = match prepared {
                Prepared::Ready => Status::Success,
                Prepared::Skip => Status::Skip,
                Prepared::Rejected(_) => Status::Hopeless,
            };
            timing.plugin(id, Point::PreFilter, status, begin.elapsed());
        }
        match prepared {
            Prepared::Ready if PLUGINS[id].filter.is_some() => active.push(id),
            Prepared::Ready | Prepared::Skip => {}
            Prepared::Rejected(reason) => return Err((id, reason)),
        }
    }
    Ok(active)
}

/// Whether the node takes the pod; otherwise the first filter that refuses.
pub fn check(
    cycle: &Cycle,
    world: &World,
    active: &[PluginId],
    slot: Slot,
) -> Result<(), (PluginId, Verdict)> {
    for &id in active {
        let filter = PLUGINS[id].filter.expect("only plugins with a filter are active");
        match filter(cycle, world, slot) {
            Verdict::Fits => {}
            refused => return Err((id, refused)),
        }
    }
    Ok(())
}

/// The same, reckoning with pods at least as important that were promised room there: with them, and without, since
/// they may yet go elsewhere.
pub fn check_with_nominated(
    cycle: &Cycle,
    world: &mut World,
    active: &[PluginId],
    slot: Slot,
) -> Result<(), (PluginId, Verdict)> {
    let promised: Vec<Arc<PodInfo>> = match world.table.has_nominated() {
        false => Vec::new(),
        true => {
            let nominated = world.table.nominated_on(slot).iter();
            let ahead = |pod: &&Arc<PodInfo>| pod.priority >= cycle.pod.priority && pod.key != cycle.pod.key;
            nominated.filter(ahead).cloned().collect()
        }
    };
    if !promised.is_empty() {
        for pod in &promised {
            let placed = world.table.prepare(pod.clone());
            world.table.put(slot, placed);
        }
        let verdict = check(cycle, world, active, slot);
        for _ in &promised {
            let last = world.table.pods[slot].len() - 1;
            let placed = world.table.take(slot, last);
            world.table.discard(placed);
        }
        verdict?;
    }
    check(cycle, world, active, slot)
}

/// What the filters left.
#[derive(Default)]
pub struct Found {
    pub active: Vec<PluginId>,
    fitting: Vec<Slot>,
    /// How many nodes a filter refused for the same reason.
    reasons: Vec<(PluginId, u32, usize)>,
    /// Reasons of others than plugins.
    foreign: Vec<String>,
    /// Nodes where the removal of pods could help.
    pub refused: Vec<Slot>,
    nodes: usize,
    /// How long each active filter took for all nodes; empty if that is not measured.
    times: Vec<(Duration, Status)>,
}

impl Found {
    fn look(mut self, cycle: &Cycle, world: &mut World, start: &mut usize, advice: Option<&Advice>) -> Self {
        self.nodes = world.table.live().len();
        // A node that was promised is looked at alone first.
        let promised = world.table.nominated_node(&cycle.pod.key).or_else(|| cycle.pod.nominated_node());
        if let Some(slot) = promised.and_then(|node| world.table.slot_of(node))
            && is_asked(cycle, world, slot)
            && advice.is_none_or(|advice| advice.accepts(&world.table.names[slot]))
            && check_with_nominated(cycle, world, &self.active, slot).is_ok()
        {
            self.fitting.push(slot);
            return self;
        }
        match &cycle.only {
            Some(names) => {
                let slots: Vec<Slot> = names.iter().filter_map(|name| world.table.slot_of(name)).collect();
                let left_out = self.nodes - slots.len();
                slots.into_iter().for_each(|slot| self.look_at(cycle, world, slot, advice));
                if left_out > 0 {
                    let by = plugin_id("NodeAffinity").expect("the plugin that names nodes exists");
                    self.reasons.push((by, LEFT_OUT, left_out));
                }
            }
            None => self.look_around(cycle, world, start, advice),
        }
        self
    }

    fn look_around(&mut self, cycle: &Cycle, world: &mut World, start: &mut usize, advice: Option<&Advice>) {
        let enough = match advice {
            Some(_) => self.nodes,
            None if cycle.profile.scores.is_empty() => 1,
            None => nodes_to_find(self.nodes, cycle.profile.percentage_of_nodes_to_score),
        };
        let promised = promised_slots(cycle, world);
        if let Some(near) = &cycle.near {
            self.walk(cycle, world, near, &promised, enough, start, advice);
            if !self.fitting.is_empty() {
                return;
            }
            // It fits nowhere: why not, all nodes have to say.
            let (active, times) = (std::mem::take(&mut self.active), std::mem::take(&mut self.times));
            *self = Found { active, times, nodes: self.nodes, ..Found::default() };
        }
        let live = world.table.live().clone();
        self.walk(cycle, world, &live, &promised, enough, start, advice);
    }

    /// Looks at nodes from where the last decision stopped, until enough of them fit.
    #[allow(clippy::too_many_arguments)]
    fn walk(
        &mut self,
        cycle: &Cycle,
        world: &mut World,
        slots: &[Slot],
        promised: &[bool],
        enough: usize,
        start: &mut usize,
        advice: Option<&Advice>,
    ) {
        if slots.is_empty() {
            return;
        }
        let (before, after) = slots.split_at(*start % slots.len());
        for part in [after, before] {
            let mut ahead = part;
            while !ahead.is_empty() && self.fitting.len() < enough {
                // Somebody else's advice is asked for node by node, so these all have to be looked at.
                let wanted =
                    if advice.is_some() { 1 } else { (enough - self.fitting.len()).clamp(16, BLOCK) };
                let (block, rest) = ahead.split_at(wanted.min(ahead.len()));
                let looked_at = match advice {
                    Some(_) => {
                        self.look_at(cycle, world, block[0], advice);
                        1
                    }
                    None => self.look_at_many(cycle, world, block, promised, enough),
                };
                *start = (*start + looked_at) % self.nodes;
                ahead = rest;
            }
        }
    }

    /// Looks at nodes together, filter by filter, until enough of them fit; how many it came to.
    fn look_at_many(
        &mut self,
        cycle: &Cycle,
        world: &mut World,
        slots: &[Slot],
        promised: &[bool],
        enough: usize,
    ) -> usize {
        let mut verdicts = [Verdict::Fits; BLOCK];
        let verdicts = &mut verdicts[..slots.len()];
        let mut refused_by = [PluginId::MAX; BLOCK];
        for (number, &id) in self.active.iter().enumerate() {
            let begin = (!self.times.is_empty()).then(Instant::now);
            match (PLUGINS[id].filter_many, PLUGINS[id].filter) {
                (Some(filter), _) if !cycle.node_affinity.direct => filter(cycle, world, slots, verdicts),
                (_, Some(filter)) => {
                    for (slot, verdict) in slots.iter().zip(&mut *verdicts) {
                        if *verdict == Verdict::Fits {
                            *verdict = filter(cycle, world, *slot);
                        }
                    }
                }
                (_, None) => unreachable!("only plugins with a filter are active"),
            }
            if let Some(begin) = begin {
                self.times[number].0 += begin.elapsed();
                if verdicts.iter().all(|verdict| *verdict != Verdict::Fits) {
                    self.times[number].1 = Status::Unschedulable;
                }
            }
            if self.active.len() == 1 {
                refused_by.fill(id);
                break;
            }
            for (verdict, by) in verdicts.iter().zip(&mut refused_by) {
                if *verdict != Verdict::Fits && *by == PluginId::MAX {
                    *by = id;
                }
            }
        }
        if !promised.is_empty() {
            for (index, slot) in slots.iter().enumerate().filter(|(_, slot)| promised[**slot]) {
                (refused_by[index], verdicts[index]) =
                    match check_with_nominated(cycle, world, &self.active, *slot) {
                        Ok(()) => (PluginId::MAX, Verdict::Fits),
                        Err(refused) => refused,
                    };
            }
        }
        self.count(slots, verdicts, &refused_by, enough)
    }

    /// Takes over what filters said of a block, until enough nodes fit; how many it came to. Neighbours are mostly
    /// refused for the same reason, so equal verdicts in a row are noted together.
    fn count(
        &mut self,
        slots: &[Slot],
        verdicts: &[Verdict],
        refused_by: &[PluginId],
        enough: usize,
    ) -> usize {
        let (mut begin, mut looked_at) = (0, slots.len());
        while begin < looked_at {
            let (verdict, by) = (verdicts[begin], refused_by[begin]);
            let others = verdicts.iter().zip(refused_by).skip(begin + 1);
            let same = 1 + others.take_while(|(other, id)| **other == verdict && **id == by).count();
            let mut run = &slots[begin..begin + same];
            match verdict {
                Verdict::Fits => {
                    run = &run[..run.len().min(enough - self.fitting.len())];
                    self.fitting.extend_from_slice(run);
                    if self.fitting.len() >= enough {
                        looked_at = begin + run.len();
                    }
                }
                Verdict::Hopeless(code) => self.note(by, code, same),
                Verdict::Refused(code) => {
                    self.refused.extend_from_slice(run);
                    self.note(by, code, same);
                }
            }
            begin += same;
        }
        looked_at
    }

    fn look_at(&mut self, cycle: &Cycle, world: &mut World, slot: Slot, advice: Option<&Advice>) {
        let verdict = match world.table.has_nominated() {
            false => check(cycle, world, &self.active, slot),
            true => check_with_nominated(cycle, world, &self.active, slot),
        };
        match verdict {
            Ok(()) => match advice.and_then(|advice| advice.refused.get(&*world.table.names[slot])) {
                None if advice.is_some_and(|advice| !advice.asked.contains(&world.table.names[slot])) => {}
                None => self.fitting.push(slot),
                Some((reason, hopeless)) => {
                    self.foreign.push(reason.clone());
                    if !hopeless {
                        self.refused.push(slot);
                    }
                }
            },
            Err((plugin, Verdict::Hopeless(code))) => self.note(plugin, code, 1),
            Err((plugin, Verdict::Refused(code))) => {
                self.refused.push(slot);
                self.note(plugin, code, 1);
            }
            Err((_, Verdict::Fits)) => unreachable!("a refusal is not a fit"),
        }
    }

    fn note(&mut self, plugin: PluginId, code: u32, nodes: usize) {
        let known = self.reasons.iter_mut().rev().find(|(by, what, _)| (*by, *what) == (plugin, code));
        match known {
            Some((_, _, known)) => *known += nodes,
            None => self.reasons.push((plugin, code, nodes)),
        }
    }

    fn refuse(self, cycle: &Cycle, world: &mut World, chooser: &mut Chooser<impl Rng>) -> Refusal {
        let mut rejected_by: Vec<PluginId> = self.reasons.iter().map(|(plugin, ..)| *plugin).collect();
        rejected_by.sort_unstable();
        rejected_by.dedup();
        let mut reasons: HashMap<String, usize> = HashMap::new();
        for (plugin, code, nodes) in &self.reasons {
            for text in explained(cycle, world, *plugin, *code) {
                *reasons.entry(text).or_insert(0) += nodes;
            }
        }
        for text in &self.foreign {
            *reasons.entry(text.clone()).or_insert(0) += 1;
        }
        let reasons = reasons.into_iter().map(|(reason, nodes)| format!("{nodes} {reason}")).collect();
        let (mut preemption, mut said, mut forget) = (None, None, false);
        if cycle.profile.preempts() {
            let begin = Instant::now();
            let outcome = preemption::preempt(cycle, world, &self, &mut chooser.random);
            let succeeded = matches!(outcome, preemption::Outcome::Preempt(_));
            let status = if succeeded { Status::Success } else { Status::Unschedulable };
            chooser.timing.point(Point::PostFilter, status, begin);
            match outcome {
                preemption::Outcome::Preempt(found) => preemption = Some(found),
                preemption::Outcome::Ineligible(message) => said = Some(message),
                preemption::Outcome::Useless(reasons) => {
                    forget = true;
                    said = Some(explain(self.nodes, None, reasons, None));
                }
            }
        }
        let message = explain(self.nodes, None, reasons, said.as_deref());
        Refusal { message, rejected_by, preemption, forget_nomination: forget }
    }
}

/// By slot, nodes promised to pods that go before this one: looked at with these pods there, too. Empty if there are
/// none.
pub fn promised_slots(cycle: &Cycle, world: &World) -> Vec<bool> {
    let ahead = |pod: &Arc<PodInfo>| pod.priority >= cycle.pod.priority && pod.key != cycle.pod.key;
    let mut promised = Vec::new();
    for (slot, _) in world.table.nominated().filter(|(_, pods)| pods.iter().any(ahead)) {
        promised.resize(world.table.names.len(), false);
        promised[slot] = true;
    }
    promised
}

fn is_asked(cycle: &Cycle, world: &World, slot: Slot) -> bool {
    let name = &world.table.names[slot];
    cycle.only.as_ref().is_none_or(|names| names.iter().any(|only| **only == **name))
}

/// The words for a filter's refusal.
pub fn explained(cycle: &Cycle, world: &World, plugin: PluginId, code: u32) -> Vec<String> {
    match code {
        LEFT_OUT => vec![format!("node(s) didn't satisfy plugin(s) [{}]", PLUGINS[plugin].name)],
        _ => (PLUGINS[plugin].explain)(cycle, world, code),
    }
}

fn nodes_to_find(nodes: usize, percentage: usize) -> usize {
    if nodes <= NODES_TO_FIND_MIN || percentage >= 100 {
        return nodes;
    }
    let adaptive = || 50usize.saturating_sub(nodes / 125).max(PERCENT_MIN);
    let percent = if percentage == 0 { adaptive() } else { percentage };
    (nodes * percent / 100).max(NODES_TO_FIND_MIN)
}

/// `0/3 nodes are available: 1 reason, 2 other reason. preemption: ...`
pub fn explain(
    nodes: usize,
    reason: Option<&str>,
    mut counted: Vec<String>,
    preemption: Option<&str>,
) -> String {
    let mut message = format!("0/{nodes} nodes are available:");
    if let Some(reason) = reason {
        message += &format!(" {reason}.");
    }
    // Sorted as text, counts included, as upstream does.
    counted.sort();
    if !counted.is_empty() {
        message += &format!(" {}.", counted.join(", "));
    }
    if let Some(preemption) = preemption {
        message += &format!(" preemption: {preemption}");
    }
    message
}

/// The weighted sum of all scores, node by node, into `totals` of the buffers.
fn sum_scores(
    cycle: &mut Cycle,
    world: &mut World,
    fitting: &[Slot],
    advice: Option<&Advice>,
    buffers: &mut Buffers,
    timing: &mut Timing,
) {
    let Buffers { totals, scores, .. } = buffers;
    let mut alike = 0;
    totals.clear();
    totals.resize(fitting.len(), 0);
    scores.resize(fitting.len(), 0);
    for &(id, weight) in &cycle.profile.scores {
        let score = PLUGINS[id].score.expect("only plugins with a score are listed");
        let begin = timing.samples().then(Instant::now);
        let scored = score(cycle, world, fitting, scores);
        if let Some(begin) = begin {
            let status = if scored == Scored::Skip { Status::Skip } else { Status::Success };
            timing.plugin(id, Point::Score, status, begin.elapsed());
        }
        match scored {
            Scored::Skip => {}
            Scored::Alike(score) => alike += weight * score,
            Scored::Each => {
                totals.iter_mut().zip(&*scores).for_each(|(total, score)| *total += weight * score);
            }
        }
    }
    totals.iter_mut().for_each(|total| *total += alike);
    if let Some(advice) = advice.filter(|advice| !advice.scores.is_empty()) {
        for (total, slot) in totals.iter_mut().zip(fitting) {
            *total += advice.scores.get(&*world.table.names[*slot]).copied().unwrap_or(0);
        }
    }
}

/// The node with the highest score; of equals any.
fn best(
    cycle: &mut Cycle,
    world: &mut World,
    fitting: &[Slot],
    advice: Option<&Advice>,
    random: &mut impl Rng,
    buffers: &mut Buffers,
    timing: &mut Timing,
) -> Slot {
    if let [only] = fitting {
        return *only;
    }
    sum_scores(cycle, world, fitting, advice, buffers, timing);
    let totals = &buffers.totals;
    let top = totals.iter().copied().max().unwrap_or(0);
    let ties = totals.iter().filter(|total| **total == top).count();
    let chosen = random.random_range(0..ties.max(1));
    let mut tied = fitting.iter().zip(totals).filter(|(_, total)| **total == top);
    tied.nth(chosen).map_or(fitting[0], |(slot, _)| *slot)
}

#[cfg(test)]
pub mod inspect {
    //! All that a decision is made of, for comparison with the reference.

    use super::*;

    /// Lets `look` see what the filters left, if it is nothing.
    pub fn refused(
        pod: &PodInfo,
        profile: &Profile,
        world: &mut World,
        look: impl FnOnce(&Cycle, &mut World, &Found),
    ) {
        let mut cycle = Cycle::begin(pod, profile, world);
        let mut chooser = Chooser::new(<rand::rngs::SmallRng as rand::SeedableRng>::seed_from_u64(0));
        if let Ok(found) = find(&mut cycle, world, &mut chooser, None)
            && found.fitting.is_empty()
        {
            look(&cycle, world, &found);
        }
        cycle.end(world);
    }

    /// Every node that fits with its total score, or the refusal's message.
    pub fn judge(pod: &PodInfo, profile: &Profile, world: &mut World) -> Result<Vec<(String, i64)>, String> {
        let mut cycle = Cycle::begin(pod, profile, world);
        let mut chooser = Chooser::new(<rand::rngs::SmallRng as rand::SeedableRng>::seed_from_u64(0));
        let result = match find(&mut cycle, world, &mut chooser, None) {
            Err(refusal) => Err(refusal.message),
            Ok(found) if found.fitting.is_empty() => Err(found.refuse(&cycle, world, &mut chooser).message),
            Ok(found) => {
                let Chooser { mut buffers, mut timing, .. } = chooser;
                sum_scores(&mut cycle, world, &found.fitting, None, &mut buffers, &mut timing);
                let totals = buffers.totals;
                let names = found.fitting.iter().map(|slot| world.table.names[*slot].to_string());
                let mut judged: Vec<(String, i64)> = names.zip(totals).collect();
                judged.sort();
                Ok(judged)
            }
        };
        cycle.end(world);
        result
    }
}

#[cfg(test)]
mod tests;
