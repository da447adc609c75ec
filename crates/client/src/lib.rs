//! One client for in-process and remote use; shared informers, work queues, leader election, events.
//!
//! Everything that talks to the API server stands on this crate: `kube::Client` carries the requests (over
//! sockets or straight into an in-process service, nothing here can tell), and the modules below add what every
//! control loop needs. Read them in this order.
//!
//! Invariant: nothing here polls. A loop that has nothing to do costs no CPU and holds no timer except real
//! deadlines.

mod clock;
mod error;
mod key;

/// Building a `kube::Client` from a kubeconfig or an in-process service.
pub mod connect;
/// The runner of a control loop: watches → keys → reconcile.
pub mod controller;
/// Creates and deletes of ours that the cache has not shown yet.
pub mod expectations;
/// Typed caches of the cluster's objects, one watch per kind for the whole process.
pub mod informer;
/// Leader election by Lease.
pub mod leader;
/// Pods without what only a node looks at.
pub mod lean;
/// Owner references, adoption and release.
pub mod owner;
/// Patches, retry on conflict, finalizers.
pub mod patch;
/// Tolerations and node selection, evaluated.
pub mod placement;
/// Events about objects, aggregated and rate limited.
pub mod recorder;
/// Label selectors, evaluated.
pub mod selector;
/// An in-memory API for tests of loops.
pub mod testing;
/// Keys waiting for work: de-duplicated, serialised per key, with back-off.
pub mod workqueue;

pub use clock::Clock;
pub use controller::{Controller, Reconcile, Requeue};
pub use error::{During, Error, Result, ignore_gone, or_none};
pub use informer::{Change, Informer, Informers};
pub use key::{ObjectKey, reference_to};
pub use kube::Client;
pub use recorder::{EventType, Recorder};
pub use workqueue::WorkQueue;
