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
        }
    }

    /// Domains there have ever been at once: the length of columns by domain.
    pub fn len(&self) -> usize {
        if self.key == EACH_NODE { self.of.len() } else { self.values.len() }
    }

    pub fn domain(&self, slot: Slot) -> DomainId {
        self.of.get(slot).copied().unwrap_or(NOWHERE)
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
