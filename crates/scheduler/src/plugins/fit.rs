//! NodeResourcesFit: a node must have what a pod requests. It scores by how much would be left (LeastAllocated), used
//! (MostAllocated), or by a curve over use (RequestedToCapacityRatio).

use super::balanced_allocation::is_native;
use super::{BLOCK, Cycle, Plugin, Point, Prepared, Sees, Verdict, quotient};
use crate::event::{ClusterEvent, kind};
use crate::objects::World;
use crate::pod::PodInfo;
use crate::requests::{CPU, MEMORY, amounts};
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
}

/// The bit of "Too many pods" in a code; the others are positions in `wanted`.
const TOO_MANY_PODS: u32 = 1 << 31;
/// A pod may ask for so many kinds of resources; of more, the last share a bit.
const BITS: usize = 31;

fn prepare(cycle: &mut Cycle, world: &mut World) -> Prepared {
    let requests = &cycle.pod.requests;
    let common =
        [(CPU_COLUMN, requests.cpu), (MEMORY_COLUMN, requests.memory), (STORAGE_COLUMN, requests.storage)];
    let resources = &world.table.resources;
    let common =
        common.into_iter().map(|(column, amount)| (Some(column), amount, resources[column].name.clone()));
    let others = requests.others.iter().filter(|(name, _)| !cycle.profile.args.fit.ignores(name));
    let others = others.map(|(name, amount)| (world.table.find_column(name), *amount, name.clone()));
    cycle.fit.wanted = common.chain(others).filter(|(_, amount, _)| *amount > 0).collect();
    Prepared::Ready
}

fn filter(cycle: &Cycle, world: &World, slot: Slot) -> Verdict {
    let resources = &world.table.resources;
    let mut code = if resources[PODS_COLUMN].free[slot] < 1 { TOO_MANY_PODS } else { 0 };
    for (bit, (column, wanted, _)) in cycle.fit.wanted.iter().enumerate() {
        if column.is_none_or(|column| resources[column].free[slot] < *wanted) {
            code |= 1 << bit.min(BITS - 1);
        }
    }
    verdict(&cycle.fit.wanted, world, slot, code)
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
        verdict(self.wanted, world, self.slot, code)
    }
}

fn takes(placed: &Placed, (column, _, name): &Wanted) -> i64 {
    column.map_or(0, |column| placed.takes(column, name))
}

/// Column by column.
fn filter_many(cycle: &Cycle, world: &World, slots: &[Slot], verdicts: &mut [Verdict]) {
    let resources = &world.table.resources;
    let mut codes = [0u32; BLOCK];
    let pods = &resources[PODS_COLUMN].free;
    for (code, slot) in codes.iter_mut().zip(slots) {
        *code = u32::from(pods[*slot] < 1) << TOO_MANY_PODS.trailing_zeros();
    }
    for (bit, (column, wanted, _)) in cycle.fit.wanted.iter().enumerate() {
        let bit = bit.min(BITS - 1);
        match column {
            Some(column) => {
                let free = &resources[*column].free;
                for (code, slot) in codes.iter_mut().zip(slots) {
                    *code |= u32::from(free[*slot] < *wanted) << bit;
                }
            }
            None => codes.iter_mut().for_each(|code| *code |= 1 << bit),
        }
    }
    for ((code, slot), said) in codes.iter().zip(slots).zip(verdicts) {
        if *code != 0 && *said == Verdict::Fits {
            *said = verdict(&cycle.fit.wanted, world, *slot, *code);
        }
    }
}

/// A node that offers less than the pod wants will not help, however empty.
fn verdict(wanted: &[Wanted], world: &World, slot: Slot, code: u32) -> Verdict {
    if code == 0 {
        return Verdict::Fits;
    }
    let resources = &world.table.resources;
    let too_small = |(column, wanted, _): &Wanted| {
        column.is_none_or(|column| resources[column].allocatable[slot] < *wanted)
    };
    if wanted.iter().any(too_small) { Verdict::Hopeless(code) } else { Verdict::Refused(code) }
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

/// One resource as scoring reads it: columns, the pod's own amount, and its weight.
struct Measured<'a> {
    allocatable: &'a [i64],
    used: &'a [i64],
    wanted: i64,
    weight: i64,
}

fn measured<'a>(table: &'a NodeTable, pod: &PodInfo, resources: &[(String, i64)]) -> Vec<Measured<'a>> {
    let one = |(name, weight): &(String, i64)| {
        let column = table.find_column(name)?;
        let resource = &table.resources[column];
        let (used, wanted) = match column {
            CPU_COLUMN => (&table.scored_cpu, pod.scored_cpu),
            MEMORY_COLUMN => (&table.scored_memory, pod.scored_memory),
            _ => (&resource.requested, pod.requests.get(name)),
        };
        // Resources of devices count only for pods that want some.
        let counts = wanted > 0 || is_native(name);
        counts.then_some(Measured { allocatable: &resource.allocatable, used, wanted, weight: *weight })
    };
    resources.iter().filter_map(one).collect()
}

fn score(cycle: &mut Cycle, world: &mut World, slots: &[Slot], scores: &mut [i64]) -> bool {
    let (table, pod) = (&world.table, cycle.pod);
    match &cycle.profile.args.fit.strategy {
        Strategy::LeastAllocated(resources) => {
            weighted(&measured(table, pod, resources), slots, scores, |allocatable, used| {
                match used > allocatable {
                    true => 0,
                    false => percent(allocatable - used, allocatable),
                }
            });
        }
        Strategy::MostAllocated(resources) => {
            weighted(&measured(table, pod, resources), slots, scores, |allocatable, used| {
                percent(used.min(allocatable), allocatable)
            });
        }
        Strategy::RequestedToCapacityRatio(resources, shape) => {
            let measured = measured(table, pod, resources);
            for (score, slot) in scores.iter_mut().zip(slots) {
                *score = by_curve(&measured, *slot, shape);
            }
        }
    }
    true
}

/// The whole percents of a part, not negative, of a whole. Division of floating point numbers is several times faster
/// than that of integers; where it is off by one, that is put right.
fn percent(part: i64, whole: i64) -> i64 {
    let part = part.saturating_mul(100);
    let guess = (part as f64 / whole as f64) as i64;
    guess - i64::from(guess * whole > part) + i64::from((guess + 1).saturating_mul(whole) <= part)
}

/// The weighted mean over the resources that the node has.
fn weighted(measured: &[Measured], slots: &[Slot], scores: &mut [i64], share: impl Fn(i64, i64) -> i64) {
    for (score, slot) in scores.iter_mut().zip(slots) {
        let (mut sum, mut weights) = (0, 0);
        for resource in measured {
            let allocatable = resource.allocatable[*slot];
            if allocatable != 0 {
                sum += resource.weight * share(allocatable, resource.used[*slot] + resource.wanted);
                weights += resource.weight;
            }
        }
        *score = if weights == 0 { 0 } else { quotient(sum, weights) };
    }
}

fn by_curve(measured: &[Measured], slot: Slot, shape: &[(i64, i64)]) -> i64 {
    let (mut sum, mut weights) = (0, 0);
    for resource in measured {
        let allocatable = resource.allocatable[slot];
        if allocatable == 0 {
            continue;
        }
        let used = resource.used[slot] + resource.wanted;
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
