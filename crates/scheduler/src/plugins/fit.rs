//! NodeResourcesFit: a node must have what a pod requests. It scores by how much would be left (LeastAllocated), used
//! (MostAllocated), or by a curve over use (RequestedToCapacityRatio).

use super::balanced_allocation::{self, is_native};
use super::{Cycle, Plugin, Point, Prepared, Scored, Sees, Verdict, quotient};
use crate::event::{ClusterEvent, kind};
use crate::objects::World;
use crate::pod::PodInfo;
use crate::requests::{CPU, MEMORY, amounts};
use crate::shapes::{Answer, ShapeId, ShapeKey, current};
use crate::table::{CPU_COLUMN, MEMORY_COLUMN, NodeTable, PODS_COLUMN, Placed, STORAGE_COLUMN, Slot};
use k8s_openapi::api::core::v1::Node;
use std::sync::Arc;

pub const PLUGIN: Plugin = Plugin {
    name: "NodeResourcesFit",
    points: &[Point::PreFilter, Point::Filter, Point::PreScore, Point::Score],
    weight: 1,
    prepare: Some(prepare),
    filter: Some(filter),
    filter_many: Some(filter_many),
    sees: Sees::Requests,
    explain,
    score: Some(score),
    hears: kind::NODE | kind::POD_REMOVED | kind::POD_CHANGED,
    wakes: |event, pod| match event {
        ClusterEvent::PodRemoved(_) => true,
        ClusterEvent::PodChanged { old, new } => new.requests.is_less_somewhere(&old.requests),
        _ => event.allocatable_changed() && event.node().is_some_and(|node| has_room(node, pod)),
    },
};

#[derive(Debug, Clone, Default, PartialEq)]
pub struct FitArgs {
    pub ignored_resources: Vec<String>,
    pub ignored_groups: Vec<String>,
    pub strategy: Strategy,
}

impl FitArgs {
    fn ignores(&self, name: &str) -> bool {
        let group = name.split_once('/').map(|(group, _)| group);
        let ignored = || self.ignored_resources.iter().any(|ignored| ignored == name);
        name.contains('/')
            && (ignored() || self.ignored_groups.iter().any(|ignored| Some(ignored.as_str()) == group))
    }
}

/// Resources with their weights, and what is good.
#[derive(Debug, Clone, PartialEq)]
pub enum Strategy {
    LeastAllocated(Vec<(String, i64)>),
    MostAllocated(Vec<(String, i64)>),
    /// Points of a curve from use in percent to a score of 0 to 100.
    RequestedToCapacityRatio(Vec<(String, i64)>, Vec<(i64, i64)>),
}

impl Strategy {
    fn resources(&self) -> &[(String, i64)] {
        match self {
            Strategy::LeastAllocated(resources)
            | Strategy::MostAllocated(resources)
            | Strategy::RequestedToCapacityRatio(resources, _) => resources,
        }
    }
}

impl Default for Strategy {
    fn default() -> Self {
        Strategy::LeastAllocated(vec![(CPU.to_owned(), 1), (MEMORY.to_owned(), 1)])
    }
}

/// Column (if any node offers it), amount, and name.
type Wanted = (Option<usize>, i64, Arc<str>);

#[derive(Debug, Default)]
pub struct State {
    /// Cpu, memory and storage first.
    wanted: Vec<Wanted>,
    /// What scoring compares: columns, with what the pod takes and the weight.
    measured: Vec<Measured>,
    /// What nodes said to pods like this one; `None` until somebody asks.
    shape: Option<ShapeId>,
}

/// The bit of "Too many pods" in a code, and of a node that offers too little however empty it is; the others are
/// positions in `wanted`.
const TOO_MANY_PODS: u32 = 1 << 31;
const TOO_SMALL: u32 = 1 << 30;
/// A pod may ask for so many kinds of resources; of more, the last share a bit.
const BITS: usize = 30;

/// One resource as scoring reads it.
#[derive(Debug, Clone, Copy)]
struct Measured {
    column: usize,
    wanted: i64,
    weight: i64,
}

fn prepare(cycle: &mut Cycle, world: &mut World) -> Prepared {
    ask(cycle, world);
    Prepared::Ready
}

/// Makes ready what [`answer`] reads, once per cycle.
pub fn ask(cycle: &mut Cycle, world: &mut World) {
    if cycle.fit.shape.is_some() {
        return;
    }
    let (pod, args, table) = (cycle.pod, &cycle.profile.args, &mut world.table);
    cycle.fit.wanted = wanted(pod, &args.fit, table);
    cycle.fit.measured = measured(pod, args.fit.strategy.resources(), table);
    cycle.balanced = balanced_allocation::State::new(pod, &args.balanced, table);
    let same = |key: &ShapeKey| {
        (key.scored_cpu, key.scored_memory) == (pod.scored_cpu, pod.scored_memory)
            && key.requests == pod.requests
            && key.fit == args.fit
            && key.balanced == args.balanced
    };
    let new = || ShapeKey {
        requests: pod.requests.clone(),
        scored_cpu: pod.scored_cpu,
        scored_memory: pod.scored_memory,
        fit: args.fit.clone(),
        balanced: args.balanced.clone(),
    };
    cycle.fit.shape = Some(table.shapes.get(same, new, table.names.len()));
}

fn wanted(pod: &PodInfo, args: &FitArgs, table: &NodeTable) -> Vec<Wanted> {
    let requests = &pod.requests;
    let common =
        [(CPU_COLUMN, requests.cpu), (MEMORY_COLUMN, requests.memory), (STORAGE_COLUMN, requests.storage)];
    let common = common
        .into_iter()
        .map(|(column, amount)| (Some(column), amount, table.resources[column].name.clone()));
    let others = requests.others.iter().filter(|(name, _)| !args.ignores(name));
    let others = others.map(|(name, amount)| (table.find_column(name), *amount, name.clone()));
    common.chain(others).filter(|(_, amount, _)| *amount > 0).collect()
}

/// What nodes say to the pod about resources; [`ask`] must have been called.
#[inline]
pub fn answers<'a>(
    cycle: &'a Cycle,
    world: &'a World,
    slots: &'a [Slot],
) -> impl Iterator<Item = Answer> + 'a {
    let shape = cycle.fit.shape.expect("whoever reads answers has asked");
    let (given, versions) = (world.table.shapes.answers(shape), &world.table.versions);
    slots.iter().map(move |&slot| current(&given[slot], versions[slot], || work_out(cycle, world, slot)))
}

#[cold]
fn work_out(cycle: &Cycle, world: &World, slot: Slot) -> Answer {
    let refusal = refusal(cycle, world, slot);
    // Nobody scores a node without room.
    if refusal != 0 {
        return Answer { refusal, ..Answer::default() };
    }
    let fit = suits(&cycle.profile.args.fit.strategy, &cycle.fit.measured, &world.table, slot);
    let balanced = cycle.balanced.score(&world.table, slot);
    Answer { refusal, fit: fit as i16, balanced: balanced as i16, ..Answer::default() }
}

/// What is missing on a node: one bit for each thing.
fn refusal(cycle: &Cycle, world: &World, slot: Slot) -> u32 {
    let resources = &world.table.resources;
    let mut code = if resources[PODS_COLUMN].free[slot] < 1 { TOO_MANY_PODS } else { 0 };
    for (bit, (column, wanted, _)) in cycle.fit.wanted.iter().enumerate() {
        if column.is_none_or(|column| resources[column].free[slot] < *wanted) {
            code |= 1 << bit.min(BITS - 1);
        }
    }
    if code == 0 { 0 } else { code | too_small(&cycle.fit.wanted, world, slot) }
}

/// A node that offers less than the pod wants will not help, however empty.
fn too_small(wanted: &[Wanted], world: &World, slot: Slot) -> u32 {
    let offers_less = |(column, wanted, _): &Wanted| {
        column.is_none_or(|column| world.table.resources[column].allocatable[slot] < *wanted)
    };
    if wanted.iter().any(offers_less) { TOO_SMALL } else { 0 }
}

fn verdict(refusal: u32) -> Verdict {
    match refusal {
        0 => Verdict::Fits,
        _ if refusal & TOO_SMALL != 0 => Verdict::Hopeless(refusal),
        _ => Verdict::Refused(refusal),
    }
}

fn filter(cycle: &Cycle, world: &World, slot: Slot) -> Verdict {
    verdict(refusal(cycle, world, slot))
}

/// What would be free on a node if pods left it: the filter's answer without touching the table.
pub struct Room<'a> {
    wanted: &'a [Wanted],
    slot: Slot,
    /// By resource wanted; nothing where no node offers it.
    free: Vec<i64>,
    pods: i64,
}

impl<'a> Room<'a> {
    /// As it is.
    pub fn new(cycle: &'a Cycle, world: &World, slot: Slot) -> Self {
        let wanted = cycle.fit.wanted.as_slice();
        let resources = &world.table.resources;
        let free = |(column, _, _): &Wanted| column.map_or(0, |column| resources[column].free[slot]);
        let pods = resources[PODS_COLUMN].free[slot];
        Room { wanted, slot, free: wanted.iter().map(free).collect(), pods }
    }

    /// Without this pod.
    pub fn leave(&mut self, placed: &Placed) {
        for (wanted, free) in self.wanted.iter().zip(&mut self.free) {
            *free += takes(placed, wanted);
        }
        self.pods += 1;
    }

    /// With the pod again, if that leaves enough; false if it has to stay away.
    pub fn stays(&mut self, placed: &Placed) -> bool {
        let left = |(wanted, free): (&Wanted, &i64)| free - takes(placed, wanted) >= wanted.1;
        let enough = self.pods >= 2 && self.wanted.iter().zip(&self.free).all(left);
        if enough {
            for (wanted, free) in self.wanted.iter().zip(&mut self.free) {
                *free -= takes(placed, wanted);
            }
            self.pods -= 1;
        }
        enough
    }

    /// Whether the pod of the cycle fits then.
    pub fn verdict(&self, world: &World) -> Verdict {
        let mut code = if self.pods < 1 { TOO_MANY_PODS } else { 0 };
        for (bit, ((column, wanted, _), free)) in self.wanted.iter().zip(&self.free).enumerate() {
            if column.is_none() || free < wanted {
                code |= 1 << bit.min(BITS - 1);
            }
        }
        verdict(if code == 0 { 0 } else { code | too_small(self.wanted, world, self.slot) })
    }
}

fn takes(placed: &Placed, (column, _, name): &Wanted) -> i64 {
    column.map_or(0, |column| placed.takes(column, name))
}

fn filter_many(cycle: &Cycle, world: &World, slots: &[Slot], verdicts: &mut [Verdict]) {
    for (answer, said) in answers(cycle, world, slots).zip(verdicts) {
        if *said == Verdict::Fits {
            *said = verdict(answer.refusal);
        }
    }
}

fn explain(cycle: &Cycle, _: &World, code: u32) -> Vec<String> {
    let mut reasons = Vec::new();
    if code & TOO_MANY_PODS != 0 {
        reasons.push("Too many pods".to_owned());
    }
    for (bit, (_, _, name)) in cycle.fit.wanted.iter().enumerate() {
        if code & (1 << bit.min(BITS - 1)) != 0 {
            reasons.push(format!("Insufficient {name}"));
        }
    }
    reasons
}

/// Whether the node could take the pod if it were empty.
pub fn has_room(node: &Node, pod: &PodInfo) -> bool {
    let offered = amounts(&node.status.as_ref().and_then(|status| status.allocatable.clone()));
    offered.iter().all(|(name, amount)| pod.requests.get(name) <= *amount)
        && pod.requests.others.iter().all(|(name, amount)| *amount == 0 || offered.contains_key(&**name))
}

fn measured(pod: &PodInfo, resources: &[(String, i64)], table: &NodeTable) -> Vec<Measured> {
    let one = |(name, weight): &(String, i64)| {
        let column = table.find_column(name)?;
        let wanted = match column {
            CPU_COLUMN => pod.scored_cpu,
            MEMORY_COLUMN => pod.scored_memory,
            _ => pod.requests.get(name),
        };
        // Resources of devices count only for pods that want some.
        let counts = wanted > 0 || is_native(name);
        counts.then_some(Measured { column, wanted, weight: *weight })
    };
    resources.iter().filter_map(one).collect()
}

impl Measured {
    /// What the node offers, and what would be used with the pod there.
    fn at(&self, table: &NodeTable, slot: Slot) -> (i64, i64) {
        let used = match self.column {
            CPU_COLUMN => table.scored_cpu[slot],
            MEMORY_COLUMN => table.scored_memory[slot],
            column => table.resources[column].requested[slot],
        };
        (table.resources[self.column].allocatable[slot], used + self.wanted)
    }
}

fn score(cycle: &mut Cycle, world: &mut World, slots: &[Slot], scores: &mut [i64]) -> Scored {
    ask(cycle, world);
    for (answer, score) in answers(cycle, world, slots).zip(scores) {
        *score = answer.fit.into();
    }
    Scored::Each
}

fn suits(strategy: &Strategy, measured: &[Measured], table: &NodeTable, slot: Slot) -> i64 {
    match strategy {
        Strategy::LeastAllocated(_) => weighted(measured, table, slot, |allocatable, used| {
            if used > allocatable { 0 } else { percent(allocatable - used, allocatable) }
        }),
        Strategy::MostAllocated(_) => {
            weighted(measured, table, slot, |allocatable, used| percent(used.min(allocatable), allocatable))
        }
        Strategy::RequestedToCapacityRatio(_, shape) => by_curve(measured, table, slot, shape),
    }
}

/// The whole percents of a part, not negative, of a whole. Division of floating point numbers is several times faster
/// than that of integers; where it is off by one, that is put right.
fn percent(part: i64, whole: i64) -> i64 {
    let part = part.saturating_mul(100);
    let guess = (part as f64 / whole as f64) as i64;
    guess - i64::from(guess * whole > part) + i64::from((guess + 1).saturating_mul(whole) <= part)
}

/// The weighted mean over the resources that the node has.
fn weighted(measured: &[Measured], table: &NodeTable, slot: Slot, share: impl Fn(i64, i64) -> i64) -> i64 {
    let (mut sum, mut weights) = (0, 0);
    for resource in measured {
        let (allocatable, used) = resource.at(table, slot);
        if allocatable != 0 {
            sum += resource.weight * share(allocatable, used);
            weights += resource.weight;
        }
    }
    if weights == 0 { 0 } else { quotient(sum, weights) }
}

fn by_curve(measured: &[Measured], table: &NodeTable, slot: Slot, shape: &[(i64, i64)]) -> i64 {
    let (mut sum, mut weights) = (0, 0);
    for resource in measured {
        let (allocatable, used) = resource.at(table, slot);
        if allocatable == 0 {
            continue;
        }
        let utilization = if used > allocatable { 100 } else { used * 100 / allocatable };
        let score = on_curve(shape, utilization);
        if score > 0 {
            sum += score * resource.weight;
            weights += resource.weight;
        }
    }
    if weights == 0 { 0 } else { (sum as f64 / weights as f64).round() as i64 }
}

/// A curve of straight lines between the points.
fn on_curve(shape: &[(i64, i64)], utilization: i64) -> i64 {
    let Some(next) = shape.iter().position(|(at, _)| utilization <= *at) else {
        return shape.last().map_or(0, |(_, score)| *score);
    };
    let (at, score) = shape[next];
    match next.checked_sub(1).map(|before| shape[before]) {
        None => score,
        Some((before, low)) => low + (score - low) * (utilization - before) / (at - before),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percents_are_exact() {
        for whole in [1, 3, 7, 4000, 1 << 35, (1 << 50) + 1] {
            for part in [0, 1, whole / 3, whole / 2, whole - 1, whole] {
                let exact = (i128::from(part) * 100 / i128::from(whole)) as i64;
                assert_eq!(percent(part, whole), exact, "{part} of {whole}");
            }
        }
    }
}
