//! Which node runs a pod.
//!
//! Pods wait in a queue; one at a time is held against a table of nodes by filters, the nodes that fit are scored,
//! the pod is assumed on the best one and bound in the background. Everything is driven by watch events.
//!
//! Invariant: a scheduling cycle does no I/O. It reads the table and decides; only `scheduler` talks to the API.

/// One decision: filter, score, choose, or explain.
mod cycle;
/// The rules, one module each.
mod plugins;
/// What the scheduler needs to know of a pod, digested once.
mod pod;
/// Pods waiting: active, backing off, unschedulable.
mod queue;
/// The wiring: watches, the loop, binding, events and conditions.
mod scheduler;
/// Nodes in columns, updated incrementally.
mod table;

pub use scheduler::{DEFAULT_NAME, Scheduler};
