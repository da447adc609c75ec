//! All nodes, in columns: one vector per property, one slot per node. Filters walk a column; an event touches one
//! slot. Slots of vanished nodes are used again.
//!
//! Beside the columns stand what rules ask for: sets of nodes (`filters`), and pods counted by domain (`groups`).
//! Every change of a pod or node goes through here, so that all of them agree at every moment.

use crate::filters::{Filter, FilterId, Filters, keeps_away};
use crate::groups::{ClassId, CounterId, Groups, OwnerId, OwnerKind, TopologyId};
use crate::pod::PodInfo;
use crate::requests::{Amounts, CPU, MEMORY, STORAGE, amounts};
use crate::shapes::Shapes;
use k8s_openapi::api::core::v1::{Node, Taint};
use knarr_client::ObjectKey;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Region and zone of a node, as its labels say.
type Zone = Option<(String, String)>;

/// The resource every pod takes one of.
const PODS: &str = "pods";

/// Position of a node in every column.
pub type Slot = usize;

/// Two columns: what nodes offer of one resource and what their pods requested.
#[derive(Debug, Default)]
pub struct Resource {
    pub name: Arc<str>,
    pub allocatable: Vec<i64>,
    pub requested: Vec<i64>,
    /// The difference: what the filter asks for every node.
    pub free: Vec<i64>,
}

impl Resource {
    fn offer(&mut self, slot: Slot, amount: i64) {
        self.allocatable[slot] = amount;
        self.free[slot] = amount - self.requested[slot];
    }

    fn request(&mut self, slot: Slot, amount: i64) {
        self.requested[slot] += amount;
        self.free[slot] -= amount;
    }
}

/// Zones remembered though they may have no nodes any more.
const ZONES_MAX: usize = 64;

/// Columns every table has.
pub const CPU_COLUMN: usize = 0;
pub const MEMORY_COLUMN: usize = 1;
pub const STORAGE_COLUMN: usize = 2;
pub const PODS_COLUMN: usize = 3;

/// Taints of a node; equal lists share one number.
pub type TaintsId = usize;

/// A pod on a node, and what it counts for there. The numbers are copies: preemption goes through many pods, and a
/// look at each pod itself would be a look into cold memory.
#[derive(Debug)]
pub struct Placed {
    pub pod: Arc<PodInfo>,
    pub priority: i32,
    /// Seconds; the far future if it did not start yet.
    pub started: i64,
    cpu: i64,
    memory: i64,
    storage: i64,
    scored_cpu: i64,
    scored_memory: i64,
    /// It has other resources or claims.
    has_more: bool,
    class: ClassId,
    /// Its own rules as others see them, with their weights.
    owned: Vec<(OwnerId, i64)>,
}

impl Placed {
    /// How much of a column it takes. Columns are those of one table.
    pub fn takes(&self, column: usize, name: &str) -> i64 {
        match column {
            CPU_COLUMN => self.cpu,
            MEMORY_COLUMN => self.memory,
            STORAGE_COLUMN => self.storage,
            _ if self.has_more => self.pod.requests.get(name),
            _ => 0,
        }
    }
}

/// An image, and the nodes that have it.
#[derive(Debug, Default)]
pub struct Image {
    pub size_bytes: i64,
    pub nodes: u32,
    bits: Vec<u64>,
}

impl Image {
    pub fn is_on(&self, slot: Slot) -> bool {
        self.bits.get(slot / 64).is_some_and(|word| word >> (slot % 64) & 1 == 1)
    }

    fn set(&mut self, slot: Slot, there: bool) {
        if self.bits.len() <= slot / 64 {
            self.bits.resize(slot / 64 + 1, 0);
        }
        match there {
            true => self.bits[slot / 64] |= 1 << (slot % 64),
            false => self.bits[slot / 64] &= !(1 << (slot % 64)),
        }
    }
}

#[derive(Debug, Default)]
pub struct NodeTable {
    /// Slots with a node object; from the beginning of a cycle on, zones take turns.
    live: Arc<Vec<Slot>>,
    out_of_order: bool,
    /// Counts the orders of `live`: what was made of one is made anew for the next.
    order: u64,
    /// By slot, the number of its zone; and the numbers of zones.
    zones: Vec<u32>,
    zone_ids: BTreeMap<Zone, u32>,
    by_name: HashMap<String, Slot>,
    free: Vec<Slot>,
    pub names: Vec<Arc<str>>,
    pub nodes: Vec<Option<Arc<Node>>>,
    pub taints: Vec<TaintsId>,
    /// The lists behind the numbers, with how many nodes have them. The first is empty.
    pub taint_lists: Vec<(Vec<Taint>, u32)>,
    pub unschedulable: Vec<bool>,
    unschedulable_nodes: usize,
    /// Cpu, memory, ephemeral storage and pods first; others as they appear.
    pub resources: Vec<Resource>,
    /// Counts changes of a slot in the columns of resources; never 0.
    pub versions: Vec<u32>,
    pub shapes: Shapes,
    /// Requests with defaults, for scoring.
    pub scored_cpu: Vec<i64>,
    pub scored_memory: Vec<i64>,
    pub pods: Vec<Vec<Placed>>,
    /// The lowest priority of the pods on a node.
    pub lowest_priority: Vec<i32>,
    pub images: HashMap<String, Image>,
    place: HashMap<ObjectKey, Slot>,
    /// Pods using a claim, by its namespace and name.
    claims: HashMap<ObjectKey, u32>,
    /// Pods that get a node once room was made there, by node.
    nominated: HashMap<String, Vec<Arc<PodInfo>>>,
    nominations: HashMap<ObjectKey, String>,
    pub filters: Filters,
    pub groups: Groups,
    /// Counts decisions: what was used in this one is not forgotten.
    pub cycle: u64,
}

/// Reading.
impl NodeTable {
    pub fn new() -> Self {
        let mut table = NodeTable { taint_lists: vec![(Vec::new(), 0)], ..NodeTable::default() };
        for name in [CPU, MEMORY, STORAGE, PODS] {
            table.column(name);
        }
        table
    }

    /// Slots of all nodes that exist.
    pub fn live(&self) -> &Arc<Vec<Slot>> {
        &self.live
    }

    /// The nodes of a set, in the order of `live`.
    pub fn nodes_of(&mut self, filter: FilterId) -> Arc<Vec<Slot>> {
        self.filters.list(filter, &self.live, self.order)
    }

    /// Makes the lists of nodes by domain ready.
    pub fn gather(&mut self, topology: TopologyId) {
        self.groups.topology_mut(topology).gather(&self.live, self.order);
    }

    pub fn slot_of(&self, name: &str) -> Option<Slot> {
        self.by_name.get(name).copied().filter(|slot| self.nodes[*slot].is_some())
    }

    pub fn node(&self, slot: Slot) -> &Node {
        self.nodes[slot].as_deref().expect("decisions look at live slots only")
    }

    pub fn label(&self, slot: Slot, key: &str) -> Option<&str> {
        self.nodes[slot].as_ref()?.metadata.labels.as_ref()?.get(key).map(String::as_str)
    }

    pub fn has_unschedulable_nodes(&self) -> bool {
        self.unschedulable_nodes > 0
    }

    /// The node a pod is counted on.
    pub fn node_of(&self, key: &ObjectKey) -> Option<&str> {
        self.place.get(key).map(|slot| &*self.names[*slot])
    }

    pub fn pods_len(&self) -> usize {
        self.place.len()
    }

    /// The pod as it is counted.
    pub fn get_pod(&self, key: &ObjectKey) -> Option<&Arc<PodInfo>> {
        let slot = *self.place.get(key)?;
        self.pods[slot].iter().map(|placed| &placed.pod).find(|pod| pod.key == *key)
    }

    pub fn find_column(&self, name: &str) -> Option<usize> {
        self.resources.iter().position(|resource| &*resource.name == name)
    }

    /// How many pods on nodes use a claim.
    pub fn users_of_claim(&self, key: &ObjectKey) -> u32 {
        self.claims.get(key).copied().unwrap_or(0)
    }

    pub fn has_nominated(&self) -> bool {
        !self.nominated.is_empty()
    }

    /// Nodes that were promised to pods, with these.
    pub fn nominated(&self) -> impl Iterator<Item = (Slot, &[Arc<PodInfo>])> {
        self.nominated.iter().filter_map(|(node, pods)| Some((self.slot_of(node)?, pods.as_slice())))
    }

    pub fn nominated_on(&self, slot: Slot) -> &[Arc<PodInfo>] {
        self.nominated.get(&*self.names[slot]).map_or(&[], Vec::as_slice)
    }
}

/// Nodes.
impl NodeTable {
    /// Puts in or updates a node.
    pub fn set_node(&mut self, node: Arc<Node>) {
        let name = node.metadata.name.clone().unwrap_or_default();
        let slot = self.slot(&name);
        let old = self.nodes[slot].clone();
        let moves = old
            .as_deref()
            .is_none_or(|old| old.metadata.labels != node.metadata.labels || taints(old) != taints(&node));
        if moves {
            self.count_slot(slot, -1);
        }
        self.set_images(slot, old.as_deref(), Some(&node));
        let status = node.status.as_ref();
        let offered = amounts(&status.and_then(|status| status.allocatable.clone()));
        self.set_allocatable(slot, &offered);
        let spec = node.spec.as_ref();
        self.set_taints(slot, taints(&node));
        self.set_unschedulable(slot, spec.and_then(|spec| spec.unschedulable).unwrap_or(false));
        if old.is_none() {
            Arc::make_mut(&mut self.live).push(slot);
        }
        self.nodes[slot] = Some(node.clone());
        if moves {
            let zones = self.zone_ids.len() as u32;
            self.zones[slot] = *self.zone_ids.entry(zone(&node)).or_insert(zones);
            self.filters.set_node(slot, Some(&node));
            self.groups.set_node(slot, Some(&node));
            self.count_slot(slot, 1);
            self.out_of_order = true;
        }
    }

    /// Takes a node out. Its pods keep their slot until they go too.
    pub fn remove_node(&mut self, name: &str) {
        let Some(&slot) = self.by_name.get(name) else { return };
        let Some(old) = self.nodes[slot].clone() else { return };
        self.count_slot(slot, -1);
        self.set_images(slot, Some(&old), None);
        self.set_taints(slot, &[]);
        self.set_unschedulable(slot, false);
        self.nodes[slot] = None;
        self.filters.set_node(slot, None);
        self.groups.set_node(slot, None);
        Arc::make_mut(&mut self.live).retain(|live| *live != slot);
        self.out_of_order = true;
        self.release(slot);
    }

    /// Counts a node and its pods into domains (`1`) or out of them (`-1`), as filters and topologies know it now.
    fn count_slot(&mut self, slot: Slot, sign: i64) {
        if self.nodes[slot].is_none() {
            return;
        }
        self.groups.count_node(slot, sign, &self.filters);
        for placed in &self.pods[slot] {
            self.groups.bump(placed.class, slot, sign, &self.filters);
            for (owner, weight) in &placed.owned {
                self.groups.add_owned(*owner, slot, sign * weight);
            }
        }
    }

    fn set_allocatable(&mut self, slot: Slot, offered: &Amounts) {
        self.touch(slot);
        for resource in &mut self.resources {
            resource.offer(slot, 0);
        }
        for (name, amount) in offered {
            let column = self.column(name);
            self.resources[column].offer(slot, *amount);
        }
    }

    fn set_taints(&mut self, slot: Slot, taints: &[Taint]) {
        let old = self.taints[slot];
        if self.taint_lists[old].0 == taints {
            return;
        }
        if old > 0 {
            self.taint_lists[old].1 -= 1;
        }
        let same = self
            .taint_lists
            .iter()
            .position(|(list, nodes)| list == taints && (*nodes > 0 || list.is_empty()));
        let unused =
            || self.taint_lists.iter().skip(1).position(|(_, nodes)| *nodes == 0).map(|index| index + 1);
        let id = same.or_else(unused).unwrap_or(self.taint_lists.len());
        if id == self.taint_lists.len() {
            self.taint_lists.push(Default::default());
        }
        if same.is_none() {
            self.taint_lists[id].0 = taints.to_vec();
        }
        if id > 0 {
            self.taint_lists[id].1 += 1;
        }
        self.taints[slot] = id;
    }

    fn set_unschedulable(&mut self, slot: Slot, unschedulable: bool) {
        self.unschedulable_nodes -= usize::from(self.unschedulable[slot]);
        self.unschedulable_nodes += usize::from(unschedulable);
        self.unschedulable[slot] = unschedulable;
    }

    fn set_images(&mut self, slot: Slot, old: Option<&Node>, new: Option<&Node>) {
        let images = |node: Option<&Node>| {
            node.and_then(|node| node.status.as_ref()?.images.clone()).unwrap_or_default()
        };
        let (old, new) = (images(old), images(new));
        if old == new {
            return;
        }
        for name in old.iter().flat_map(|image| image.names.iter().flatten()) {
            let Some(image) = self.images.get_mut(name).filter(|image| image.is_on(slot)) else { continue };
            image.set(slot, false);
            image.nodes -= 1;
            if image.nodes == 0 {
                self.images.remove(name);
            }
        }
        for listed in &new {
            for name in listed.names.iter().flatten() {
                let image = self.images.entry(name.clone()).or_default();
                if image.nodes == 0 {
                    image.size_bytes = listed.size_bytes.unwrap_or(0);
                }
                if !image.is_on(slot) {
                    image.set(slot, true);
                    image.nodes += 1;
                }
            }
        }
    }

    /// A decision begins. Zones take turns, so that looking at a part of the nodes looks at all zones.
    pub fn begin_cycle(&mut self) {
        self.cycle += 1;
        if !std::mem::take(&mut self.out_of_order) {
            return;
        }
        self.order += 1;
        let mut by_zone: Vec<Vec<Slot>> = vec![Vec::new(); self.zone_ids.len()];
        for (slot, _) in self.nodes.iter().enumerate().filter(|(_, node)| node.is_some()) {
            by_zone[self.zones[slot] as usize].push(slot);
        }
        let mut lists: Vec<&[Slot]> =
            self.zone_ids.values().map(|zone| by_zone[*zone as usize].as_slice()).collect();
        lists.retain(|slots| !slots.is_empty());
        let zones = lists.len();
        let mut live = Vec::with_capacity(self.live.len());
        for turn in 0.. {
            lists.retain(|slots| slots.len() > turn);
            if lists.is_empty() {
                break;
            }
            live.extend(lists.iter().map(|slots| slots[turn]));
        }
        self.live = Arc::new(live);
        // Names of zones that were are kept while there are not too many.
        if self.zone_ids.len() > ZONES_MAX.max(2 * zones) {
            self.number_zones();
        }
    }

    fn number_zones(&mut self) {
        self.zone_ids.clear();
        for (slot, node) in self.nodes.iter().enumerate() {
            if let Some(node) = node {
                let zones = self.zone_ids.len() as u32;
                self.zones[slot] = *self.zone_ids.entry(zone(node)).or_insert(zones);
            }
        }
    }
}

fn taints(node: &Node) -> &[Taint] {
    node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default()
}

fn zone(node: &Node) -> Zone {
    let label = |keys: [&str; 2]| {
        let labels = node.metadata.labels.as_ref()?;
        keys.into_iter().find_map(|key| labels.get(key).cloned())
    };
    let region = label(["topology.kubernetes.io/region", "failure-domain.beta.kubernetes.io/region"]);
    let zone = label(["topology.kubernetes.io/zone", "failure-domain.beta.kubernetes.io/zone"]);
    (region.is_some() || zone.is_some()).then(|| (region.unwrap_or_default(), zone.unwrap_or_default()))
}

/// Pods.
impl NodeTable {
    /// Counts a pod on a node, replacing what was known of it. The node may still be unknown.
    pub fn add_pod(&mut self, node: &str, pod: Arc<PodInfo>) {
        self.remove_pod(&pod.key);
        let slot = self.slot(node);
        self.place.insert(pod.key.clone(), slot);
        self.lowest_priority[slot] = self.lowest_priority[slot].min(pod.priority);
        let placed = self.prepare(pod);
        self.groups.set_place(placed.class, slot, 1);
        self.put(slot, placed);
    }

    /// A newer version of a pod that counts as the one before (`PodInfo::counts_as`).
    pub fn refresh_pod(&mut self, pod: Arc<PodInfo>) {
        let Some(&slot) = self.place.get(&pod.key) else { return };
        if let Some(placed) = self.pods[slot].iter_mut().find(|placed| placed.pod.key == pod.key) {
            placed.started = pod.started().as_second();
            placed.pod = pod;
        }
    }

    /// The pod that was counted.
    pub fn remove_pod(&mut self, key: &ObjectKey) -> Option<Arc<PodInfo>> {
        let slot = self.place.remove(key)?;
        let index = self.pods[slot].iter().position(|placed| placed.pod.key == *key);
        let placed = self.take(slot, index.expect("a pod with a place is there"));
        let pod = placed.pod.clone();
        self.groups.set_place(placed.class, slot, -1);
        self.discard(placed);
        if self.lowest_priority[slot] == pod.priority {
            let rest = self.pods[slot].iter().map(|placed| placed.priority);
            self.lowest_priority[slot] = rest.min().unwrap_or(i32::MAX);
        }
        self.release(slot);
        Some(pod)
    }

    /// Makes ready what [`NodeTable::put`] counts. To be given to [`NodeTable::discard`] in the end.
    pub fn prepare(&mut self, pod: Arc<PodInfo>) -> Placed {
        let class = self.groups.join_class(&pod.class);
        let mut owned = Vec::new();
        if let Some(affinity) = &pod.affinity {
            let mut own = |rule: &crate::pod::Rule, kind, weight| {
                owned.push((
                    self.groups.get_owner(&rule.predicate, &rule.topology, kind, &self.nodes),
                    weight,
                ));
            };
            affinity.required_anti.iter().for_each(|rule| own(rule, OwnerKind::Repels, 1));
            affinity.attracts.iter().for_each(|rule| own(rule, OwnerKind::Attracts, 1));
            affinity.preferred.iter().for_each(|(weight, rule)| own(rule, OwnerKind::Prefers, *weight));
        }
        Placed {
            priority: pod.priority,
            started: pod.started().as_second(),
            cpu: pod.requests.cpu,
            memory: pod.requests.memory,
            storage: pod.requests.storage,
            scored_cpu: pod.scored_cpu,
            scored_memory: pod.scored_memory,
            has_more: !pod.requests.others.is_empty() || !pod.claims.is_empty(),
            pod,
            class,
            owned,
        }
    }

    pub fn discard(&mut self, placed: Placed) {
        placed.owned.iter().for_each(|(owner, _)| self.groups.drop_owner(*owner));
        self.groups.leave_class(placed.class);
    }

    /// Counts a prepared pod on a slot: for good in [`NodeTable::add_pod`], or while preemption and nominations try
    /// what would be. No counter may be asked for anew while pods are tried.
    pub fn put(&mut self, slot: Slot, placed: Placed) {
        self.count(slot, &placed, 1);
        self.pods[slot].push(placed);
    }

    /// Takes a pod off a slot, to be put back or discarded.
    pub fn take(&mut self, slot: Slot, index: usize) -> Placed {
        let placed = self.pods[slot].swap_remove(index);
        self.count(slot, &placed, -1);
        placed
    }

    /// The columns of resources change at this slot.
    fn touch(&mut self, slot: Slot) {
        let version = &mut self.versions[slot];
        *version = version.wrapping_add(1).max(1);
    }

    fn count(&mut self, slot: Slot, placed: &Placed, sign: i64) {
        self.touch(slot);
        self.resources[CPU_COLUMN].request(slot, sign * placed.cpu);
        self.resources[MEMORY_COLUMN].request(slot, sign * placed.memory);
        self.resources[STORAGE_COLUMN].request(slot, sign * placed.storage);
        self.resources[PODS_COLUMN].request(slot, sign);
        self.scored_cpu[slot] += sign * placed.scored_cpu;
        self.scored_memory[slot] += sign * placed.scored_memory;
        self.groups.bump(placed.class, slot, sign, &self.filters);
        for (owner, weight) in &placed.owned {
            self.groups.add_owned(*owner, slot, sign * weight);
        }
        if placed.has_more {
            self.count_more(slot, &placed.pod, sign);
        }
    }

    fn count_more(&mut self, slot: Slot, pod: &PodInfo, sign: i64) {
        for (name, amount) in &pod.requests.others {
            let column = self.column(name);
            self.resources[column].request(slot, sign * amount);
        }
        for (claim, _) in &pod.claims {
            let key = ObjectKey::new(pod.namespace(), claim);
            let users = self.claims.entry(key.clone()).or_insert(0);
            *users = (i64::from(*users) + sign) as u32;
            if *users == 0 {
                self.claims.remove(&key);
            }
        }
    }

    /// The pod will get this node once room was made there; `None` takes that back.
    pub fn nominate(&mut self, pod: &Arc<PodInfo>, node: Option<&str>) {
        if let Some(old) = self.nominations.remove(&pod.key)
            && let Some(pods) = self.nominated.get_mut(&old)
        {
            pods.retain(|other| other.key != pod.key);
            if pods.is_empty() {
                self.nominated.remove(&old);
            }
        }
        if let Some(node) = node {
            self.nominated.entry(node.to_owned()).or_default().push(pod.clone());
            self.nominations.insert(pod.key.clone(), node.to_owned());
        }
    }

    pub fn nominated_node(&self, key: &ObjectKey) -> Option<&str> {
        self.nominations.get(key).map(String::as_str)
    }
}

/// What rules ask for.
impl NodeTable {
    pub fn filter(&mut self, filter: Filter) -> FilterId {
        self.filters.get(filter, &self.nodes, self.cycle)
    }

    pub fn counter(
        &mut self,
        predicate: &Arc<crate::groups::PredicateSpec>,
        topology: &str,
        filter: Option<FilterId>,
        leveled: bool,
    ) -> CounterId {
        let NodeTable { groups, filters, nodes, cycle, .. } = self;
        groups.get_counter(predicate, (topology, filter, leveled), nodes, filters, *cycle)
    }

    /// Whether some node has a taint of these effects.
    pub fn has_taints(&self, keeping_away: bool) -> bool {
        let lists = self.taint_lists.iter().filter(|(_, nodes)| *nodes > 0);
        lists.flat_map(|(taints, _)| taints).any(|taint| keeps_away(taint) == keeping_away)
    }
}

/// Slots and columns.
impl NodeTable {
    /// The column of a resource, made when it is new.
    fn column(&mut self, name: &str) -> usize {
        if let Some(column) = self.find_column(name) {
            return column;
        }
        let zero = vec![0; self.names.len()];
        self.resources.push(Resource {
            name: name.into(),
            allocatable: zero.clone(),
            requested: zero.clone(),
            free: zero,
        });
        self.resources.len() - 1
    }

    fn slot(&mut self, name: &str) -> Slot {
        if let Some(&slot) = self.by_name.get(name) {
            return slot;
        }
        let slot = self.free.pop().unwrap_or_else(|| self.grow());
        self.names[slot] = name.into();
        self.by_name.insert(name.to_owned(), slot);
        slot
    }

    fn grow(&mut self) -> Slot {
        self.names.push("".into());
        self.nodes.push(None);
        self.zones.push(0);
        self.taints.push(0);
        self.unschedulable.push(false);
        self.versions.push(1);
        self.scored_cpu.push(0);
        self.scored_memory.push(0);
        self.pods.push(Vec::new());
        self.lowest_priority.push(i32::MAX);
        for resource in &mut self.resources {
            resource.allocatable.push(0);
            resource.requested.push(0);
            resource.free.push(0);
        }
        self.names.len() - 1
    }

    /// Gives a slot back that has neither node nor pods.
    fn release(&mut self, slot: Slot) {
        if self.nodes[slot].is_some() || !self.pods[slot].is_empty() {
            return;
        }
        self.by_name.remove(&*self.names[slot]);
        self.lowest_priority[slot] = i32::MAX;
        for resource in &mut self.resources {
            resource.offer(slot, 0);
            debug_assert_eq!(resource.requested[slot], 0, "a slot without pods has no requests");
        }
        self.free.push(slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(name: &str, cpu: &str) -> Arc<PodInfo> {
        let pod = json!({
            "metadata": {"name": name, "namespace": "ns"},
            "spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": cpu, "x.io/gpu": "1"}}}]},
        });
        Arc::new(PodInfo::new(Arc::new(serde_json::from_value(pod).unwrap())))
    }

    #[test]
    fn pods_are_counted_once_and_slots_are_used_again() {
        let mut table = NodeTable::new();
        table.add_pod("n1", pod("a", "1"));
        table.add_pod("n1", pod("a", "2"));
        assert!(table.live().is_empty(), "the node itself is not known yet");
        let node = json!({"metadata": {"name": "n1"}, "status": {"allocatable": {"cpu": "4", "pods": "10"}}});
        table.set_node(Arc::new(serde_json::from_value(node).unwrap()));
        let slot = table.live()[0];
        assert_eq!(table.resources[CPU_COLUMN].requested[slot], 2000);
        assert_eq!(table.resources[CPU_COLUMN].allocatable[slot], 4000);
        table.remove_node("n1");
        assert!(table.remove_pod(&ObjectKey::new("ns", "a")).is_some());
        table.add_pod("n2", pod("b", "1"));
        assert_eq!(table.names.len(), 1);
        assert_eq!(table.resources[CPU_COLUMN].requested[slot], 1000);
    }

    #[test]
    fn zones_take_turns() {
        let mut table = NodeTable::new();
        for (name, zone) in [("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b")] {
            let node = json!({"metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone}}});
            table.set_node(Arc::new(serde_json::from_value(node).unwrap()));
        }
        table.begin_cycle();
        let names: Vec<&str> = table.live().iter().map(|slot| &*table.names[*slot]).collect();
        assert_eq!(names, ["a1", "b1", "a2", "a3"]);
    }
}
