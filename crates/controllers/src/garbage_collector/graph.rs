//! Who owns whom, by uid. Only objects with owners, children or a deletion that concerns children are kept: most
//! objects of a cluster are neither.

use super::{FOREGROUND, ORPHAN, OwnerState, has_finalizer, is_waiting};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::ApiResource;
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;

/// Which object a uid belongs to.
#[derive(Clone, Debug)]
pub struct Identity {
    pub kind: Arc<ApiResource>,
    pub namespace: String,
    pub name: String,
    pub uid: String,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}/{}", self.kind.plural, self.namespace, self.name)
    }
}

#[derive(Default)]
pub struct Graph {
    nodes: HashMap<String, Node>,
    /// Children by the uid of an owner, whether or not the owner is known.
    dependents: HashMap<String, BTreeSet<String>>,
}

struct Node {
    identity: Identity,
    /// Uid and `blockOwnerDeletion` of each owner.
    owners: Vec<(String, bool)>,
    /// Deleted in the foreground.
    waiting: bool,
}

impl Graph {
    /// Puts in or updates an object; returns the uids to look at.
    pub fn apply(&mut self, kind: &Arc<ApiResource>, meta: &ObjectMeta) -> Vec<String> {
        let uid = meta.uid.clone().unwrap_or_default();
        let references = meta.owner_references.iter().flatten();
        let owners: Vec<(String, bool)> =
            references.map(|owner| (owner.uid.clone(), owner.block_owner_deletion == Some(true))).collect();
        let old = self.nodes.get(&uid).map(|node| node.owners.clone()).unwrap_or_default();
        self.rewire(&uid, &old, &owners);
        let waiting = is_waiting(meta);
        let concerned = meta.deletion_timestamp.is_some()
            && (has_finalizer(meta, FOREGROUND) || has_finalizer(meta, ORPHAN));
        let mut look_at = Vec::new();
        if concerned {
            look_at.push(uid.clone());
        }
        // Owners that are unknown, wait for us, or are where we may not look must be looked at from here.
        let namespace = meta.namespace.as_deref().unwrap_or_default();
        let unsure = |owner: &str| {
            self.nodes.get(owner).is_none_or(|node| {
                node.waiting || !["", namespace].contains(&node.identity.namespace.as_str())
            })
        };
        if owners.iter().any(|(owner, _)| unsure(owner)) {
            look_at.push(uid.clone());
        }
        // A child that no longer blocks may set its owner free.
        let freed = old.iter().filter(|owner| owner.1 && !owners.contains(owner)).map(|(owner, _)| owner);
        look_at
            .extend(freed.filter(|owner| self.nodes.get(*owner).is_some_and(|node| node.waiting)).cloned());
        let identity = Identity {
            kind: kind.clone(),
            namespace: meta.namespace.clone().unwrap_or_default(),
            name: meta.name.clone().unwrap_or_default(),
            uid: uid.clone(),
        };
        self.nodes.insert(uid, Node { identity, owners, waiting });
        look_at
    }

    /// Takes an object out; returns the uids to look at: its children, and owners that waited for it.
    pub fn remove(&mut self, uid: &str) -> Vec<String> {
        let Some(node) = self.nodes.remove(uid) else { return Vec::new() };
        self.rewire(uid, &node.owners, &[]);
        let mut look_at = self.dependents(uid);
        let waiting = |owner: &&String| self.nodes.get(*owner).is_some_and(|node| node.waiting);
        look_at.extend(node.owners.iter().map(|(owner, _)| owner).filter(waiting).cloned());
        look_at
    }

    fn rewire(&mut self, uid: &str, old: &[(String, bool)], new: &[(String, bool)]) {
        for (owner, _) in old {
            if let Some(children) = self.dependents.get_mut(owner) {
                children.remove(uid);
                if children.is_empty() {
                    self.dependents.remove(owner);
                }
            }
        }
        for (owner, _) in new {
            self.dependents.entry(owner.clone()).or_default().insert(uid.to_owned());
        }
    }

    pub fn identity(&self, uid: &str) -> Option<Identity> {
        self.nodes.get(uid).map(|node| node.identity.clone())
    }

    pub fn dependents(&self, uid: &str) -> Vec<String> {
        self.dependents.get(uid).into_iter().flatten().cloned().collect()
    }

    /// Children whose existence keeps an owner deleted in the foreground.
    pub fn blocking_dependents(&self, uid: &str) -> Vec<String> {
        let blocks = |child: &String| {
            self.nodes
                .get(child)
                .is_some_and(|node| node.owners.iter().any(|(owner, blocks)| owner == uid && *blocks))
        };
        self.dependents(uid).into_iter().filter(blocks).collect()
    }

    /// What the graph knows of an owner; `None` when it knows nothing, or when the owner is where the dependent may
    /// not look (another namespace).
    pub fn owner_state(&self, dependent: &Identity, owner: &str) -> Option<OwnerState> {
        let node = self.nodes.get(owner)?;
        let namespace = &node.identity.namespace;
        if !namespace.is_empty() && *namespace != dependent.namespace {
            return None;
        }
        Some(if node.waiting { OwnerState::WaitsForDependents } else { OwnerState::Solid })
    }
}
