//! All nodes, in columns: one vector per property, one slot per node. Filters walk a column; an event touches one
//! slot. Slots of vanished nodes are used again.

use crate::pod::{Amounts, CPU, MEMORY, PodInfo, amounts};
use k8s_openapi::api::core::v1::{Node, Taint};
use knarr_client::ObjectKey;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// The resource every pod takes one of.
const PODS: &str = "pods";

/// Position of a node in every column.
pub type Slot = usize;

/// Two columns: what nodes offer of one resource and what their pods requested.
#[derive(Debug, Default)]
pub struct Resource {
    pub name: String,
    pub allocatable: Vec<i64>,
    pub requested: Vec<i64>,
}

#[derive(Debug, Default)]
pub struct NodeTable {
    /// Slots with a node object, in the order nodes came.
    live: Vec<Slot>,
    by_name: HashMap<String, Slot>,
    free: Vec<Slot>,
    pub names: Vec<String>,
    pub nodes: Vec<Option<Arc<Node>>>,
    pub labels: Vec<BTreeMap<String, String>>,
    pub taints: Vec<Vec<Taint>>,
    pub unschedulable: Vec<bool>,
    /// Cpu, memory and pods first; others as they appear.
    pub resources: Vec<Resource>,
    /// Requests with defaults, for scoring.
    pub assumed_cpu: Vec<i64>,
    pub assumed_memory: Vec<i64>,
    pub pods: Vec<BTreeMap<ObjectKey, Arc<PodInfo>>>,
    place: HashMap<ObjectKey, Slot>,
    /// Where the pods are that keep others away.
    repelling: HashMap<ObjectKey, Slot>,
}

/// Columns every table has.
pub const CPU_COLUMN: usize = 0;
pub const MEMORY_COLUMN: usize = 1;
pub const PODS_COLUMN: usize = 2;

impl NodeTable {
    pub fn new() -> Self {
        let mut table = NodeTable::default();
        for name in [CPU, MEMORY, PODS] {
            table.column(name);
        }
        table
    }

    /// Slots of all nodes that exist.
    pub fn live(&self) -> &[Slot] {
        &self.live
    }

    /// Puts in or updates a node.
    pub fn set_node(&mut self, node: Arc<Node>) {
        let name = node.metadata.name.clone().unwrap_or_default();
        let slot = self.slot(&name);
        if self.nodes[slot].is_none() {
            self.live.push(slot);
        }
        let spec = node.spec.as_ref();
        self.labels[slot] = node.metadata.labels.clone().unwrap_or_default();
        self.taints[slot] = spec.and_then(|spec| spec.taints.clone()).unwrap_or_default();
        self.unschedulable[slot] = spec.and_then(|spec| spec.unschedulable).unwrap_or(false);
        let offered = amounts(&node.status.as_ref().and_then(|status| status.allocatable.clone()));
        self.set_allocatable(slot, &offered);
        self.nodes[slot] = Some(node);
    }

    fn set_allocatable(&mut self, slot: Slot, offered: &Amounts) {
        for resource in &mut self.resources {
            resource.allocatable[slot] = 0;
        }
        for (name, amount) in offered {
            let column = self.column(name);
            self.resources[column].allocatable[slot] = *amount;
        }
    }

    /// Takes a node out. Its pods keep their slot until they go too.
    pub fn remove_node(&mut self, name: &str) {
        let Some(&slot) = self.by_name.get(name) else { return };
        self.nodes[slot] = None;
        self.live.retain(|live| *live != slot);
        self.release(slot);
    }

    /// Counts a pod on a node, replacing what was known of it. The node may still be unknown.
    pub fn add_pod(&mut self, node: &str, pod: Arc<PodInfo>) {
        self.remove_pod(&pod.key);
        let slot = self.slot(node);
        self.count(slot, &pod, 1);
        self.place.insert(pod.key.clone(), slot);
        if pod.repels {
            self.repelling.insert(pod.key.clone(), slot);
        }
        self.pods[slot].insert(pod.key.clone(), pod);
    }

    /// Whether the pod was counted.
    pub fn remove_pod(&mut self, key: &ObjectKey) -> bool {
        let Some(slot) = self.place.remove(key) else { return false };
        self.repelling.remove(key);
        if let Some(pod) = self.pods[slot].remove(key) {
            self.count(slot, &pod, -1);
        }
        self.release(slot);
        true
    }

    /// The pods with required anti-affinity, and where they are.
    pub fn repelling(&self) -> impl Iterator<Item = (Slot, &Arc<PodInfo>)> {
        let known = |(key, slot): (&ObjectKey, &Slot)| Some((*slot, self.pods[*slot].get(key)?));
        self.repelling.iter().filter_map(known)
    }

    /// The node a pod is counted on.
    pub fn node_of(&self, key: &ObjectKey) -> Option<&str> {
        self.place.get(key).map(|slot| self.names[*slot].as_str())
    }

    fn count(&mut self, slot: Slot, pod: &PodInfo, sign: i64) {
        for (name, amount) in &pod.requests {
            let column = self.column(name);
            self.resources[column].requested[slot] += sign * amount;
        }
        self.resources[PODS_COLUMN].requested[slot] += sign;
        self.assumed_cpu[slot] += sign * pod.assumed_cpu;
        self.assumed_memory[slot] += sign * pod.assumed_memory;
    }

    /// The column of a resource, made when it is new.
    fn column(&mut self, name: &str) -> usize {
        if let Some(column) = self.find_column(name) {
            return column;
        }
        let slots = self.names.len();
        let zero = vec![0; slots];
        self.resources.push(Resource { name: name.to_owned(), allocatable: zero.clone(), requested: zero });
        self.resources.len() - 1
    }

    pub fn find_column(&self, name: &str) -> Option<usize> {
        self.resources.iter().position(|resource| resource.name == name)
    }

    fn slot(&mut self, name: &str) -> Slot {
        if let Some(&slot) = self.by_name.get(name) {
            return slot;
        }
        let slot = self.free.pop().unwrap_or_else(|| self.grow());
        self.names[slot] = name.to_owned();
        self.by_name.insert(name.to_owned(), slot);
        slot
    }

    fn grow(&mut self) -> Slot {
        self.names.push(String::new());
        self.nodes.push(None);
        self.labels.push(BTreeMap::new());
        self.taints.push(Vec::new());
        self.unschedulable.push(false);
        self.assumed_cpu.push(0);
        self.assumed_memory.push(0);
        self.pods.push(BTreeMap::new());
        for resource in &mut self.resources {
            resource.allocatable.push(0);
            resource.requested.push(0);
        }
        self.names.len() - 1
    }

    /// Gives a slot back that has neither node nor pods.
    fn release(&mut self, slot: Slot) {
        if self.nodes[slot].is_some() || !self.pods[slot].is_empty() {
            return;
        }
        self.by_name.remove(&self.names[slot]);
        self.labels[slot].clear();
        self.taints[slot].clear();
        for resource in &mut self.resources {
            resource.allocatable[slot] = 0;
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
        assert!(table.remove_pod(&ObjectKey::new("ns", "a")));
        table.add_pod("n2", pod("b", "1"));
        assert_eq!(table.names.len(), 1);
        assert_eq!(table.resources[CPU_COLUMN].requested[slot], 1000);
    }
}
