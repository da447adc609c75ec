//! The control loops, one module each. Every module has the same shape: its documentation says what the loop
//! keeps true, `start` wires its watches, `reconcile` brings one key closer to the wish, and its tests drive it
//! against an in-memory API.
//!
//! Invariant: loops talk to the API server like any other client and to nothing else; they keep no state that a
//! restart would lose.

mod context;
mod manager;

/// An owner and its pods: claims, expectations, batches.
mod family;
/// Templates kept as ControllerRevisions.
mod history;
/// What loops share about pods: readiness, creation, deletion, ranking.
mod pods;
/// Condition lists and hashes.
mod util;

mod autoscaler;
mod bootstrap;
mod certificates;
mod cluster_role_aggregation;
mod cronjob;
mod daemonset;
mod deployment;
mod disruption;
mod endpoints;
mod endpointslice;
mod garbage_collector;
mod job;
mod namespace;
mod node_ipam;
mod node_lifecycle;
mod pod_gc;
mod replicaset;
mod resource_claim;
mod root_ca;
mod service;
mod service_account;
mod service_cidr;
mod statefulset;
mod ttl;
mod volume_protection;

#[cfg(test)]
mod harness;

pub use certificates::Authority;
pub use context::{Config, Context};
pub use manager::ControllerManager;
pub use node_ipam::NodeRanges;
pub use node_lifecycle::EvictionRates;
