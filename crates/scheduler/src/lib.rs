//! Which node runs a pod.
//!
//! Pods wait in a queue; one at a time is held against a table of nodes by filters, the nodes that fit are scored,
//! the pod is assumed on the best one and bound in the background. Everything is driven by watch events.
//!
//! Invariant: a scheduling cycle does no I/O. It reads the table and decides; only `scheduler`, `writes` and `extender`
//! talk to others.

/// Events of bound pods.
mod announcer;
/// `KubeSchedulerConfiguration`.
mod config;
/// One decision: filter, score, choose, or explain.
mod cycle;
/// What happened, as far as it can help a waiting pod.
mod event;
/// Others who are asked over HTTP.
mod extender;
/// Sets of nodes that rules describe.
mod filters;
/// Pods counted by rule and domain.
mod groups;
/// What is counted.
pub mod metrics;
/// Services, storage, budgets: what else decisions read.
mod objects;
/// The scheduler without an API.
pub mod offline;
/// The rules, one module each.
mod plugins;
/// What the scheduler needs to know of a pod, digested once.
mod pod;
/// Making room for more important pods.
mod preemption;
/// Which rules, with which weights and arguments.
mod profile;
/// Pods waiting: active, backing off, unschedulable, gated.
mod queue;
/// The default profile, slow and obvious: what tests compare with.
#[cfg(test)]
mod reference;
/// What a pod takes of its node.
mod requests;
/// The wiring: watches, the loop.
mod scheduler;
/// Answers about resources, remembered by what pods request.
mod shapes;
/// Nodes in columns, updated incrementally.
mod table;
/// Labels of nodes as numbers.
mod topology;
/// Binding, events and conditions, victims: what follows from a decision.
mod writes;

pub use config::{Config, ConfigError};
pub use scheduler::Scheduler;

/// The scheduler of pods that name none.
pub const DEFAULT_NAME: &str = "default-scheduler";
