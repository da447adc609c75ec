//! Pods counted instead of scanned: how many pods that a rule means are in each domain of a topology.
//!
//! Pods with the same namespace and labels form a *class*; the selectors of rules (*predicates*) are held against
//! classes, not pods. A *counter* says, by domain, how many pods match a predicate; an *owner counter* says how many
//! running pods have a rule with that predicate, so that a newcomer it means can be kept away or drawn near. A pod
//! that comes or goes changes the counters of its class's predicates by one. Counters are made when a rule first asks
//! and forgotten when too many are unused.

use crate::filters::{FilterId, Filters};
use crate::table::Slot;
use crate::topology::{DomainId, NOWHERE, Topology};
use k8s_openapi::api::core::v1::{Node, Pod};
use knarr_client::selector::{Labels, Selector};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Bytes of counters kept for rules that may ask again.
const COUNTERS_BYTES_MAX: usize = 64 << 20;
/// Topologies kept; beyond it those without counters are forgotten.
const TOPOLOGIES_MAX: usize = 64;

pub type ClassId = usize;
pub type PredicateId = usize;
pub type CounterId = usize;
pub type OwnerId = usize;
pub type TopologyId = usize;

/// What selectors see of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct ClassKey {
    pub namespace: String,
    pub labels: Labels,
    pub terminating: bool,
}

impl ClassKey {
    pub fn of(pod: &Pod) -> Self {
        ClassKey {
            namespace: pod.metadata.namespace.clone().unwrap_or_default(),
            labels: pod.metadata.labels.clone().unwrap_or_default(),
            terminating: pod.metadata.deletion_timestamp.is_some(),
        }
    }
}

/// Pods of certain namespaces that a selector matches.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Term {
    /// Sorted.
    pub namespaces: Vec<String>,
    /// Namespaces by their labels, in addition.
    pub namespace_selector: Option<Selector>,
    pub selector: Selector,
}

/// Pods that all terms mean at once.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PredicateSpec {
    pub terms: Vec<Term>,
    /// Without those that are being deleted.
    pub living_only: bool,
}

impl PredicateSpec {
    pub fn matches(&self, class: &ClassKey, namespaces: &HashMap<String, Labels>) -> bool {
        if self.living_only && class.terminating {
            return false;
        }
        self.terms.iter().all(|term| {
            let named = term.namespaces.binary_search(&class.namespace).is_ok();
            let selected = || {
                let labels = namespaces.get(&class.namespace);
                term.namespace_selector.as_ref().is_some_and(|selector| selector.matches(labels))
            };
            (named || selected()) && term.selector.matches(Some(&class.labels))
        })
    }

    /// The one namespace whose pods it can mean.
    fn only_namespace(&self) -> Option<&str> {
        let term = self.terms.first()?;
        match term.namespaces.as_slice() {
            [namespace] if term.namespace_selector.is_none() => Some(namespace),
            _ => None,
        }
    }
}

/// What a running pod's rule means for the pods it matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OwnerKind {
    /// Required anti-affinity: they may not come.
    Repels,
    /// Required affinity: they are welcome, as much as the plugin's arguments say.
    Attracts,
    /// Preferred terms: weights, negative for anti-affinity.
    Prefers,
}

#[derive(Debug)]
struct Class {
    key: Arc<ClassKey>,
    /// Pods and cycles that use it.
    users: u32,
    /// Sorted.
    matches: Vec<PredicateId>,
    /// How many of its pods are where, on nodes known or not.
    places: HashMap<Slot, u32>,
}

#[derive(Debug)]
struct Predicate {
    spec: Arc<PredicateSpec>,
    /// Counters and owner counters.
    users: u32,
    counters: Vec<CounterId>,
    owners: Vec<OwnerId>,
}

/// Pods by domain.
#[derive(Debug)]
pub struct Counter {
    key: CounterKey,
    counts: Vec<u32>,
    /// Pods in any domain.
    pub total: u64,
    levels: Option<Levels>,
    used: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CounterKey {
    predicate: PredicateId,
    pub topology: TopologyId,
    /// Only nodes of this set count.
    pub filter: Option<FilterId>,
    /// Whether the emptiest domain is asked for.
    leveled: bool,
}

/// Which domains there are, and how full, to know the emptiest without looking.
#[derive(Debug, Default)]
struct Levels {
    /// Nodes that count, by domain.
    nodes: Vec<u32>,
    /// How many domains have so many pods.
    domains: BTreeMap<u32, u32>,
    /// Pods in the emptiest domain, and the number of domains: read for every node, so kept apart.
    least: (u32, u32),
}

/// Weights of running pods' rules by domain.
#[derive(Debug)]
pub struct Owner {
    key: OwnerKey,
    sums: Vec<i64>,
    users: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct OwnerKey {
    predicate: PredicateId,
    topology: TopologyId,
    kind: OwnerKind,
}

impl Counter {
    pub fn get(&self, domain: DomainId) -> u32 {
        self.counts.get(domain as usize).copied().unwrap_or(0)
    }

    /// By domain; domains beyond the end have none.
    pub fn column(&self) -> &[u32] {
        &self.counts
    }

    pub fn topology(&self) -> TopologyId {
        self.key.topology
    }

    /// Pods in the emptiest domain, and the number of domains.
    pub fn least(&self) -> (u32, u32) {
        self.levels.as_ref().map_or((0, 0), |levels| levels.least)
    }

    fn counts_slot(&self, slot: Slot, topologies: &Slab<Topology>, filters: &Filters) -> Option<DomainId> {
        let domain = topologies.get(self.key.topology).domain(slot);
        let counts = domain != NOWHERE && self.key.filter.is_none_or(|filter| filters.contains(filter, slot));
        counts.then_some(domain)
    }

    fn add(&mut self, domain: DomainId, pods: i64) {
        let index = domain as usize;
        grow(&mut self.counts, index);
        let old = self.counts[index];
        let new = (i64::from(old) + pods) as u32;
        self.counts[index] = new;
        self.total = (self.total as i64 + pods) as u64;
        if let Some(levels) = &mut self.levels
            && levels.nodes.get(index).is_some_and(|nodes| *nodes > 0)
        {
            levels.shift(Some(old), Some(new));
        }
    }

    /// A node that counts came (`1`) or went (`-1`), without its pods.
    fn add_node(&mut self, domain: DomainId, nodes: i64) {
        let Some(levels) = &mut self.levels else { return };
        let index = domain as usize;
        grow(&mut levels.nodes, index);
        let old = levels.nodes[index];
        let new = (i64::from(old) + nodes) as u32;
        levels.nodes[index] = new;
        let count = self.counts.get(index).copied().unwrap_or(0);
        match (old, new) {
            (0, 1..) => levels.shift(None, Some(count)),
            (1.., 0) => levels.shift(Some(count), None),
            _ => {}
        }
    }

    fn bytes(&self) -> usize {
        size_of::<Self>()
            + 4 * (self.counts.len() + self.levels.as_ref().map_or(0, |levels| levels.nodes.len()))
    }
}

impl Levels {
    fn shift(&mut self, from: Option<u32>, to: Option<u32>) {
        if let Some(from) = from
            && let Some(domains) = self.domains.get_mut(&from)
        {
            *domains -= 1;
            if *domains == 0 {
                self.domains.remove(&from);
            }
        }
        if let Some(to) = to {
            *self.domains.entry(to).or_insert(0) += 1;
        }
        let number = self.least.1 - u32::from(from.is_some()) + u32::from(to.is_some());
        self.least = (self.domains.keys().next().copied().unwrap_or(0), number);
    }
}

impl Owner {
    pub fn kind(&self) -> OwnerKind {
        self.key.kind
    }

    pub fn topology(&self) -> TopologyId {
        self.key.topology
    }

    /// By domain; domains beyond the end have none.
    pub fn column(&self) -> &[i64] {
        &self.sums
    }

    pub fn get(&self, domain: DomainId) -> i64 {
        self.sums.get(domain as usize).copied().unwrap_or(0)
    }
}

fn grow<T: Clone + Default>(column: &mut Vec<T>, index: usize) {
    if column.len() <= index {
        column.resize(index + 1, T::default());
    }
}

/// Things by number; numbers of what is gone are used again.
#[derive(Debug)]
pub struct Slab<T> {
    entries: Vec<Option<T>>,
    free: Vec<usize>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Slab { entries: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slab<T> {
    fn insert(&mut self, value: T) -> usize {
        match self.free.pop() {
            Some(id) => {
                self.entries[id] = Some(value);
                id
            }
            None => {
                self.entries.push(Some(value));
                self.entries.len() - 1
            }
        }
    }

    fn remove(&mut self, id: usize) -> T {
        self.free.push(id);
        self.entries[id].take().expect("ids are of live entries")
    }

    pub fn get(&self, id: usize) -> &T {
        self.entries[id].as_ref().expect("ids are of live entries")
    }

    fn get_mut(&mut self, id: usize) -> &mut T {
        self.entries[id].as_mut().expect("ids are of live entries")
    }

    fn iter(&self) -> impl Iterator<Item = (usize, &T)> {
        self.entries.iter().enumerate().filter_map(|(id, entry)| Some((id, entry.as_ref()?)))
    }

    fn iter_mut(&mut self) -> impl Iterator<Item = (usize, &mut T)> {
        self.entries.iter_mut().enumerate().filter_map(|(id, entry)| Some((id, entry.as_mut()?)))
    }

    pub fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }
}

#[derive(Debug, Default)]
pub struct Groups {
    topologies: Slab<Topology>,
    topology_ids: HashMap<String, TopologyId>,
    classes: Slab<Class>,
    class_ids: HashMap<Arc<ClassKey>, ClassId>,
    predicates: Slab<Predicate>,
    predicate_ids: HashMap<Arc<PredicateSpec>, PredicateId>,
    /// Predicates that can only mean pods of one namespace, and the others.
    narrow: HashMap<String, Vec<PredicateId>>,
    wide: Vec<PredicateId>,
    counters: Slab<Counter>,
    counter_ids: HashMap<CounterKey, CounterId>,
    counters_bytes: usize,
    owners: Slab<Owner>,
    owner_ids: HashMap<OwnerKey, OwnerId>,
    namespaces: HashMap<String, Labels>,
}

/// Reading, during a cycle.
impl Groups {
    pub fn counter(&self, id: CounterId) -> &Counter {
        self.counters.get(id)
    }

    /// How many pods the counter counts in the domain of a node.
    pub fn count_at(&self, id: CounterId, slot: Slot) -> u32 {
        let counter = self.counters.get(id);
        counter.get(self.topologies.get(counter.key.topology).domain(slot))
    }

    pub fn topology(&self, id: TopologyId) -> &Topology {
        self.topologies.get(id)
    }

    pub fn topology_mut(&mut self, id: TopologyId) -> &mut Topology {
        self.topologies.get_mut(id)
    }

    pub fn owner(&self, id: OwnerId) -> &Owner {
        self.owners.get(id)
    }

    /// Rules of running pods that mean pods of this class.
    pub fn owners_of(&self, class: ClassId) -> impl Iterator<Item = OwnerId> {
        let matches = &self.classes.get(class).matches;
        matches.iter().flat_map(|predicate| self.predicates.get(*predicate).owners.iter().copied())
    }

    /// Labels of namespaces, for predicates that are held against one pod only.
    pub fn namespaces(&self) -> &HashMap<String, Labels> {
        &self.namespaces
    }
}

/// Asking: what a rule needs is made if it is not there.
impl Groups {
    /// The class of a pod; give it back with [`Groups::leave_class`].
    pub fn join_class(&mut self, key: &Arc<ClassKey>) -> ClassId {
        if let Some(&id) = self.class_ids.get(key) {
            self.classes.get_mut(id).users += 1;
            return id;
        }
        let narrow = self.narrow.get(&key.namespace).into_iter().flatten();
        let candidates = narrow.chain(&self.wide).copied();
        let mut matches: Vec<PredicateId> =
            candidates.filter(|id| self.predicates.get(*id).spec.matches(key, &self.namespaces)).collect();
        matches.sort_unstable();
        let id = self.classes.insert(Class { key: key.clone(), users: 1, matches, places: HashMap::new() });
        self.class_ids.insert(key.clone(), id);
        id
    }

    pub fn leave_class(&mut self, id: ClassId) {
        let class = self.classes.get_mut(id);
        class.users -= 1;
        if class.users == 0 {
            debug_assert!(class.places.is_empty(), "a class without pods is nowhere");
            let class = self.classes.remove(id);
            self.class_ids.remove(&class.key);
        }
    }

    pub fn get_topology(&mut self, key: &str, nodes: &[Option<Arc<Node>>]) -> TopologyId {
        if let Some(&id) = self.topology_ids.get(key) {
            return id;
        }
        if self.topologies.len() >= TOPOLOGIES_MAX {
            self.forget_topologies();
        }
        let mut topology = Topology::new(key);
        for (slot, node) in nodes.iter().enumerate() {
            topology.set_node(slot, node.as_deref());
        }
        let id = self.topologies.insert(topology);
        self.topology_ids.insert(key.to_owned(), id);
        id
    }

    /// The counter of pods that match, by domain; with `leveled` it also knows the emptiest domain.
    pub fn get_counter(
        &mut self,
        predicate: &Arc<PredicateSpec>,
        (topology, filter, leveled): (&str, Option<FilterId>, bool),
        nodes: &[Option<Arc<Node>>],
        filters: &mut Filters,
        cycle: u64,
    ) -> CounterId {
        let topology = self.get_topology(topology, nodes);
        let predicate = self.get_predicate(predicate);
        let key = CounterKey { predicate, topology, filter, leveled };
        if let Some(&id) = self.counter_ids.get(&key) {
            self.counters.get_mut(id).used = cycle;
            return id;
        }
        self.predicates.get_mut(predicate).users += 1;
        self.forget_counters(filters, cycle);
        let levels = leveled.then(Levels::default);
        let mut counter = Counter { key, counts: Vec::new(), total: 0, levels, used: cycle };
        for (slot, _) in nodes.iter().enumerate().filter(|(_, node)| node.is_some()) {
            if leveled && let Some(domain) = counter.counts_slot(slot, &self.topologies, filters) {
                counter.add_node(domain, 1);
            }
        }
        for (_, class) in
            self.classes.iter().filter(|(_, class)| class.matches.binary_search(&predicate).is_ok())
        {
            for (&slot, &pods) in &class.places {
                if let Some(domain) = counter.counts_slot(slot, &self.topologies, filters) {
                    counter.add(domain, pods.into());
                }
            }
        }
        counter.counts.resize(self.topologies.get(topology).len().max(counter.counts.len()), 0);
        self.counters_bytes += counter.bytes();
        let id = self.counters.insert(counter);
        self.counter_ids.insert(key, id);
        self.predicates.get_mut(predicate).counters.push(id);
        if let Some(filter) = filter {
            filters.hold(filter);
        }
        id
    }

    /// Adds a running pod's rule; give it back with [`Groups::drop_owner`].
    pub fn get_owner(
        &mut self,
        predicate: &Arc<PredicateSpec>,
        topology: &str,
        kind: OwnerKind,
        nodes: &[Option<Arc<Node>>],
    ) -> OwnerId {
        let topology = self.get_topology(topology, nodes);
        let predicate = self.get_predicate(predicate);
        let key = OwnerKey { predicate, topology, kind };
        if let Some(&id) = self.owner_ids.get(&key) {
            self.owners.get_mut(id).users += 1;
            return id;
        }
        let id = self.owners.insert(Owner { key, sums: Vec::new(), users: 1 });
        self.owner_ids.insert(key, id);
        let entry = self.predicates.get_mut(predicate);
        entry.users += 1;
        entry.owners.push(id);
        id
    }

    pub fn drop_owner(&mut self, id: OwnerId) {
        let owner = self.owners.get_mut(id);
        owner.users -= 1;
        if owner.users > 0 {
            return;
        }
        let owner = self.owners.remove(id);
        self.owner_ids.remove(&owner.key);
        self.predicates.get_mut(owner.key.predicate).owners.retain(|other| *other != id);
        self.drop_predicate(owner.key.predicate);
    }

    /// Without counting a user yet: the caller is about to add one.
    fn get_predicate(&mut self, spec: &Arc<PredicateSpec>) -> PredicateId {
        if let Some(&id) = self.predicate_ids.get(spec) {
            return id;
        }
        let entry = Predicate { spec: spec.clone(), users: 0, counters: Vec::new(), owners: Vec::new() };
        let id = self.predicates.insert(entry);
        self.predicate_ids.insert(spec.clone(), id);
        match spec.only_namespace() {
            Some(namespace) => self.narrow.entry(namespace.to_owned()).or_default().push(id),
            None => self.wide.push(id),
        }
        for (_, class) in self.classes.iter_mut() {
            if spec.matches(&class.key, &self.namespaces)
                && let Err(place) = class.matches.binary_search(&id)
            {
                class.matches.insert(place, id);
            }
        }
        id
    }

    fn drop_predicate(&mut self, id: PredicateId) {
        let predicate = self.predicates.get_mut(id);
        predicate.users -= 1;
        if predicate.users > 0 {
            return;
        }
        let predicate = self.predicates.remove(id);
        self.predicate_ids.remove(&predicate.spec);
        match predicate.spec.only_namespace() {
            Some(namespace) => {
                if let Some(ids) = self.narrow.get_mut(namespace) {
                    ids.retain(|other| *other != id);
                    if ids.is_empty() {
                        self.narrow.remove(namespace);
                    }
                }
            }
            None => self.wide.retain(|other| *other != id),
        }
        for (_, class) in self.classes.iter_mut() {
            if let Ok(place) = class.matches.binary_search(&id) {
                class.matches.remove(place);
            }
        }
    }

    fn forget_counters(&mut self, filters: &mut Filters, cycle: u64) {
        while self.counters_bytes > COUNTERS_BYTES_MAX {
            let unused = self.counters.iter().filter(|(_, counter)| counter.used < cycle);
            let Some((_, id)) = unused.map(|(id, counter)| (counter.used, id)).min() else { return };
            let counter = self.counters.remove(id);
            self.counters_bytes -= counter.bytes().min(self.counters_bytes);
            self.counter_ids.remove(&counter.key);
            if let Some(filter) = counter.key.filter {
                filters.let_go(filter);
            }
            self.predicates.get_mut(counter.key.predicate).counters.retain(|other| *other != id);
            self.drop_predicate(counter.key.predicate);
        }
    }

    fn forget_topologies(&mut self) {
        let mut used: Vec<TopologyId> =
            self.counters.iter().map(|(_, counter)| counter.key.topology).collect();
        used.extend(self.owners.iter().map(|(_, owner)| owner.key.topology));
        let unused: Vec<(String, TopologyId)> = self
            .topology_ids
            .iter()
            .filter(|(_, id)| !used.contains(id))
            .map(|(k, id)| (k.clone(), *id))
            .collect();
        for (key, id) in unused {
            self.topology_ids.remove(&key);
            self.topologies.remove(id);
        }
    }
}

/// Changes of the cluster.
impl Groups {
    /// A pod of a class has its place on a slot (`1`) or no more (`-1`). What counters say is [`Groups::bump`]'s.
    pub fn set_place(&mut self, class: ClassId, slot: Slot, pods: i32) {
        let places = &mut self.classes.get_mut(class).places;
        let there = places.entry(slot).or_insert(0);
        *there = (*there as i32 + pods) as u32;
        if *there == 0 {
            places.remove(&slot);
        }
    }

    /// Pods of a class came to a slot (`1`) or left it (`-1`), for good or on trial; or their node becomes or stops
    /// being one that counts.
    pub fn bump(&mut self, class: ClassId, slot: Slot, pods: i64, filters: &Filters) {
        let Groups { classes, predicates, counters, topologies, .. } = self;
        for predicate in &classes.get(class).matches {
            for counter in &predicates.get(*predicate).counters {
                let counter = counters.get_mut(*counter);
                if let Some(domain) = counter.counts_slot(slot, topologies, filters) {
                    counter.add(domain, pods);
                }
            }
        }
    }

    pub fn add_owned(&mut self, owner: OwnerId, slot: Slot, weight: i64) {
        let owner = self.owners.get_mut(owner);
        let domain = self.topologies.get(owner.key.topology).domain(slot);
        if domain != NOWHERE {
            grow(&mut owner.sums, domain as usize);
            owner.sums[domain as usize] += weight;
        }
    }

    /// A node came (`1`) or went (`-1`), without its pods, as filters and topologies know it now.
    pub fn count_node(&mut self, slot: Slot, nodes: i64, filters: &Filters) {
        let Groups { counters, topologies, .. } = self;
        for (_, counter) in counters.iter_mut().filter(|(_, counter)| counter.levels.is_some()) {
            if let Some(domain) = counter.counts_slot(slot, topologies, filters) {
                counter.add_node(domain, nodes);
            }
        }
    }

    /// The labels of a node changed, or it came or went; nothing on it may be counted at this moment.
    pub fn set_node(&mut self, slot: Slot, node: Option<&Node>) {
        for (_, topology) in self.topologies.iter_mut() {
            topology.set_node(slot, node);
        }
    }

    /// The labels of a namespace, or that it is gone.
    pub fn set_namespace(&mut self, name: &str, labels: Option<&Labels>, filters: &Filters) {
        if self.namespaces.get(name) == labels {
            return;
        }
        match labels {
            Some(labels) => self.namespaces.insert(name.to_owned(), labels.clone()),
            None => self.namespaces.remove(name),
        };
        let of_namespace = self.classes.iter().filter(|(_, class)| class.key.namespace == name);
        let of_namespace: Vec<ClassId> = of_namespace.map(|(id, _)| id).collect();
        for class in of_namespace {
            for predicate in self.wide.clone() {
                self.match_again(class, predicate, filters);
            }
        }
    }

    fn match_again(&mut self, class: ClassId, predicate: PredicateId, filters: &Filters) {
        let Groups { classes, predicates, counters, topologies, namespaces, .. } = self;
        let (class, predicate_entry) = (classes.get_mut(class), predicates.get(predicate));
        let matches = predicate_entry.spec.matches(&class.key, namespaces);
        let sign = match (class.matches.binary_search(&predicate), matches) {
            (Err(place), true) => {
                class.matches.insert(place, predicate);
                1
            }
            (Ok(place), false) => {
                class.matches.remove(place);
                -1
            }
            _ => return,
        };
        for counter in &predicate_entry.counters {
            let counter = counters.get_mut(*counter);
            for (&slot, &pods) in &class.places {
                if let Some(domain) = counter.counts_slot(slot, topologies, filters) {
                    counter.add(domain, sign * i64::from(pods));
                }
            }
        }
    }
}
