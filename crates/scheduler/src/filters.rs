//! Sets of nodes that rules of pods describe: by labels and name, by tolerated taints, by having topology labels.
//! Equal descriptions share one column of bits, kept up to date as nodes change, so that asking whether a node is in
//! the set costs one look.

use crate::table::Slot;
use k8s_openapi::api::core::v1::{Node, NodeSelector, PodSpec, Taint, Toleration};
use knarr_client::placement;
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::hash::{Hash, Hasher};
use std::sync::Arc;

/// Sets kept; of more, those unused for longest are forgotten and made again when asked for.
const FILTERS_MAX: usize = 512;
/// In large clusters fewer: a set takes a byte for each node, and its list eight for each node in it.
const FILTERS_BYTES_MAX: usize = 32 << 20;

pub type FilterId = usize;

/// `nodeSelector` and required node affinity of a pod.
#[derive(Debug, Clone)]
pub struct Selection {
    spec: PodSpec,
    hash: u64,
}

impl Selection {
    /// `None` if the pod has neither.
    pub fn of(spec: &PodSpec) -> Option<Self> {
        let affinity = spec.affinity.as_ref().and_then(|affinity| affinity.node_affinity.as_ref());
        let required = affinity
            .and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref());
        let selector = spec.node_selector.as_ref().filter(|selector| !selector.is_empty());
        (required.is_some() || selector.is_some()).then(|| Self::new(selector, required))
    }

    fn new(selector: Option<&BTreeMap<String, String>>, required: Option<&NodeSelector>) -> Self {
        let spec = PodSpec {
            node_selector: selector.cloned(),
            affinity: required.map(|required| k8s_openapi::api::core::v1::Affinity {
                node_affinity: Some(k8s_openapi::api::core::v1::NodeAffinity {
                    required_during_scheduling_ignored_during_execution: Some(required.clone()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let hash = hash_of(&(selector, required.map(text)));
        Selection { spec, hash }
    }

    pub fn matches(&self, node: &Node) -> bool {
        let none = BTreeMap::new();
        let labels = node.metadata.labels.as_ref().unwrap_or(&none);
        placement::selects_node(&self.spec, labels, node.metadata.name.as_deref().unwrap_or_default())
    }
}

impl PartialEq for Selection {
    fn eq(&self, other: &Self) -> bool {
        self.hash == other.hash && self.spec == other.spec
    }
}

impl Eq for Selection {}

impl Hash for Selection {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.hash.hash(state);
    }
}

fn text<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_value(value).unwrap_or(Value::Null).to_string()
}

fn hash_of(value: &impl Hash) -> u64 {
    let mut hasher = std::collections::hash_map::DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// Tolerations as part of a description of nodes.
#[derive(Debug, Clone, PartialEq)]
pub struct Tolerations(pub Vec<Toleration>);

impl Eq for Tolerations {}

impl Hash for Tolerations {
    fn hash<H: Hasher>(&self, state: &mut H) {
        for toleration in &self.0 {
            (&toleration.key, &toleration.operator, &toleration.value, &toleration.effect).hash(state);
        }
    }
}

/// Nodes described by rules; all that is given must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Filter {
    pub selection: Option<Arc<Selection>>,
    /// Taints that keep pods away must be tolerated.
    pub tolerations: Option<Tolerations>,
    /// Labels the node must have.
    pub keys: Vec<String>,
}

impl Filter {
    pub fn is_everything(&self) -> bool {
        *self == Filter::default()
    }

    pub fn holds(&self, node: &Node) -> bool {
        let labels = node.metadata.labels.as_ref();
        let has = |key: &String| labels.is_some_and(|labels| labels.contains_key(key));
        self.keys.iter().all(has)
            && self.selection.as_ref().is_none_or(|selection| selection.matches(node))
            && self.tolerations.as_ref().is_none_or(|Tolerations(tolerations)| {
                let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_ref());
                let mut taints = taints.into_iter().flatten().filter(|taint| keeps_away(taint));
                taints.all(|taint| placement::tolerates(Some(tolerations), taint))
            })
    }
}

/// Whether a taint keeps pods off a node, rather than only lowering its score.
pub fn keeps_away(taint: &Taint) -> bool {
    matches!(taint.effect.as_str(), "NoSchedule" | "NoExecute")
}

#[derive(Debug, Default)]
pub struct Filters {
    by_filter: HashMap<Arc<Filter>, FilterId>,
    entries: Vec<Option<Entry>>,
    free: Vec<FilterId>,
}

#[derive(Debug)]
struct Entry {
    filter: Arc<Filter>,
    bits: Vec<bool>,
    /// How many nodes are in the set.
    nodes: usize,
    /// The set as a list, with the order of nodes (`NodeTable::order`) it was made of.
    list: Option<(u64, Arc<Vec<Slot>>)>,
    /// Counters that depend on it.
    users: u32,
    used: u64,
}

impl Filters {
    /// The set of that description; `nodes` are the present ones by slot.
    pub fn get(&mut self, filter: Filter, nodes: &[Option<Arc<Node>>], cycle: u64) -> FilterId {
        if let Some(&id) = self.by_filter.get(&filter) {
            self.entry_mut(id).used = cycle;
            return id;
        }
        if self.by_filter.len() >= FILTERS_MAX.min(FILTERS_BYTES_MAX / nodes.len().max(1)) {
            self.forget_oldest(cycle);
        }
        let holds = |node: &Option<Arc<Node>>| node.as_ref().is_some_and(|node| filter.holds(node));
        let bits: Vec<bool> = nodes.iter().map(holds).collect();
        let nodes = bits.iter().filter(|bit| **bit).count();
        let filter = Arc::new(filter);
        let entry = Entry { filter: filter.clone(), bits, nodes, list: None, users: 0, used: cycle };
        let id = self.free.pop().unwrap_or_else(|| {
            self.entries.push(None);
            self.entries.len() - 1
        });
        self.entries[id] = Some(entry);
        self.by_filter.insert(filter, id);
        id
    }

    pub fn contains(&self, id: FilterId, slot: Slot) -> bool {
        self.entry(id).bits[slot]
    }

    /// The set, by slot.
    pub fn bits(&self, id: FilterId) -> &[bool] {
        &self.entry(id).bits
    }

    /// How many nodes are in the set.
    pub fn len(&self, id: FilterId) -> usize {
        self.entry(id).nodes
    }

    /// The set as a list in the order of `live`, which has this number.
    pub fn list(&mut self, id: FilterId, live: &[Slot], order: u64) -> Arc<Vec<Slot>> {
        let entry = self.entry_mut(id);
        match &entry.list {
            Some((made, list)) if *made == order => list.clone(),
            _ => {
                let slots = live.iter().copied().filter(|slot| entry.bits[*slot]).collect();
                let list: Arc<Vec<Slot>> = Arc::new(slots);
                entry.list = Some((order, list.clone()));
                list
            }
        }
    }

    pub fn hold(&mut self, id: FilterId) {
        self.entry_mut(id).users += 1;
    }

    pub fn let_go(&mut self, id: FilterId) {
        self.entry_mut(id).users -= 1;
    }

    /// A node changed or went.
    pub fn set_node(&mut self, slot: Slot, node: Option<&Node>) {
        for entry in self.entries.iter_mut().flatten() {
            if entry.bits.len() <= slot {
                entry.bits.resize(slot + 1, false);
            }
            let holds = node.is_some_and(|node| entry.filter.holds(node));
            entry.nodes = entry.nodes + usize::from(holds) - usize::from(entry.bits[slot]);
            entry.bits[slot] = holds;
            entry.list = None;
        }
    }

    fn forget_oldest(&mut self, cycle: u64) {
        let unused = self.entries.iter().enumerate().filter_map(|(id, entry)| {
            let entry = entry.as_ref()?;
            (entry.users == 0 && entry.used < cycle).then_some((entry.used, id))
        });
        if let Some((_, id)) = unused.min()
            && let Some(entry) = self.entries[id].take()
        {
            self.by_filter.remove(&entry.filter);
            self.free.push(id);
        }
    }

    fn entry(&self, id: FilterId) -> &Entry {
        self.entries[id].as_ref().expect("ids are given out for live filters only")
    }

    fn entry_mut(&mut self, id: FilterId) -> &mut Entry {
        self.entries[id].as_mut().expect("ids are given out for live filters only")
    }
}
