//! Topologies: the values of one label over all nodes, as small numbers. A pod's rule names a label; whether two
//! nodes lie in the same domain is then a comparison of integers.

use crate::table::Slot;
use k8s_openapi::api::core::v1::Node;
use std::collections::HashMap;

/// A value of the label, or [`NOWHERE`].
pub type DomainId = u32;

/// The domain of nodes without the label, and of slots without a node.
pub const NOWHERE: DomainId = u32::MAX;

/// The topology in which every node is its own domain, whatever its labels.
pub const EACH_NODE: &str = "";

#[derive(Debug)]
pub struct Topology {
    pub key: String,
    /// By slot.
    pub of: Vec<DomainId>,
    ids: HashMap<String, DomainId>,
    values: Vec<String>,
    /// Nodes by domain.
    nodes: Vec<u32>,
    free: Vec<DomainId>,
    /// Made when a rule asks for the nodes of a domain.
    members: Members,
}

/// Slots by domain: those of a domain are a range of `slots`.
#[derive(Debug, Default)]
struct Members {
    /// The order of nodes (`NodeTable::order`) this was made of.
    order: u64,
    begins: Vec<u32>,
    slots: Vec<u32>,
}

impl Topology {
    pub fn new(key: &str) -> Self {
        Topology {
            key: key.to_owned(),
            of: Vec::new(),
            ids: HashMap::new(),
            values: Vec::new(),
            nodes: Vec::new(),
            free: Vec::new(),
            members: Members::default(),
        }
    }

    /// Domains there have ever been at once: the length of columns by domain.
    pub fn len(&self) -> usize {
        if self.key == EACH_NODE { self.of.len() } else { self.values.len() }
    }

    pub fn domain(&self, slot: Slot) -> DomainId {
        self.of.get(slot).copied().unwrap_or(NOWHERE)
    }

    /// Nodes of a domain.
    pub fn nodes_in(&self, domain: DomainId) -> u32 {
        self.nodes.get(domain as usize).copied().unwrap_or(0)
    }

    /// Makes [`Topology::members`] ready; `live` are all nodes in the order that has this number.
    pub fn gather(&mut self, live: &[Slot], order: u64) {
        let of = |slot: &Slot| self.of.get(*slot).copied().filter(|domain| *domain != NOWHERE);
        let Members { order: made, begins, slots } = &mut self.members;
        if *made == order {
            return;
        }
        // One sweep counts, one puts in; then each begin stands where the next domain's was.
        *begins = vec![0; self.values.len() + 2];
        live.iter().filter_map(of).for_each(|domain| begins[domain as usize + 2] += 1);
        (2..begins.len()).for_each(|index| begins[index] += begins[index - 1]);
        *slots = vec![0; begins.last().copied().unwrap_or(0) as usize];
        for (slot, domain) in live.iter().filter_map(|slot| Some((*slot, of(slot)?))) {
            let place = &mut begins[domain as usize + 1];
            slots[*place as usize] = slot as u32;
            *place += 1;
        }
        *made = order;
    }

    /// The nodes of a domain, as [`Topology::gather`] found them.
    pub fn members(&self, domain: DomainId) -> &[u32] {
        let begins = &self.members.begins;
        match (begins.get(domain as usize), begins.get(domain as usize + 1)) {
            (Some(from), Some(to)) => &self.members.slots[*from as usize..*to as usize],
            _ => &[],
        }
    }

    /// A node changed or went. What is counted by domain must not count the slot at this moment.
    pub fn set_node(&mut self, slot: Slot, node: Option<&Node>) {
        if self.of.len() <= slot {
            self.of.resize(slot + 1, NOWHERE);
        }
        if self.key == EACH_NODE {
            self.of[slot] = if node.is_some() { slot as DomainId } else { NOWHERE };
            return;
        }
        let labels = node.and_then(|node| node.metadata.labels.as_ref());
        let value = labels.and_then(|labels| labels.get(&self.key));
        let old = self.of[slot];
        if old != NOWHERE && value == Some(&self.values[old as usize]) {
            return;
        }
        self.leave(old);
        self.of[slot] = value.map_or(NOWHERE, |value| self.enter(value));
    }

    fn leave(&mut self, domain: DomainId) {
        if domain == NOWHERE {
            return;
        }
        self.nodes[domain as usize] -= 1;
        if self.nodes[domain as usize] == 0 {
            self.ids.remove(&self.values[domain as usize]);
            self.free.push(domain);
        }
    }

    fn enter(&mut self, value: &str) -> DomainId {
        let domain = match self.ids.get(value) {
            Some(&domain) => domain,
            None => {
                let domain = self.free.pop().unwrap_or_else(|| {
                    self.values.push(String::new());
                    self.nodes.push(0);
                    self.values.len() as DomainId - 1
                });
                self.values[domain as usize] = value.to_owned();
                self.ids.insert(value.to_owned(), domain);
                domain
            }
        };
        self.nodes[domain as usize] += 1;
        domain
    }
}
