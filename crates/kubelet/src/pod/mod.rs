//! Pods: one worker each. Read in this order: [`observe`] (what runs), [`plan`] (what to do about it, pure),
//! [`status`] (what to tell the API, pure), then `start` and `stop` (doing it) and `worker` (the loop).

pub mod observe;
pub mod plan;
pub mod resize;
mod start;
pub mod status;
mod stop;
mod worker;

#[cfg(test)]
mod tests;

pub use worker::{Handle, spawn};

use crate::context::NodeContext;
use crate::probe::Results;
use crate::references::PodReferences;
use crate::volumes::Ready;
use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use knarr_client::{EventType, ObjectKey, reference_to};
use parking_lot::Mutex;
use plan::Restarts;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use tokio::sync::Notify;
use tokio::time::Instant;

/// What the worker of a pod and its tasks share.
pub struct PodContext {
    pub node: Arc<NodeContext>,
    pub key: ObjectKey,
    pub uid: String,
    /// Wakes the worker.
    pub wake: Arc<Notify>,
    /// An object the pod refers to has changed.
    pub references_changed: Arc<Notify>,
    pub state: Mutex<State>,
    pub probes: Results,
}

/// What is known of a pod beyond the API and the runtime. Lost with the process, and only makes it wait less or
/// explain less when it is.
#[derive(Default)]
pub struct State {
    pub references: Option<Arc<PodReferences>>,
    /// Why a container could not be started, until it is.
    pub waiting: BTreeMap<String, Waiting>,
    pub restarts: Restarts,
    /// Containers whose postStart hook has not returned yet, by id.
    pub in_hook: BTreeSet<String>,
    /// Termination messages read, by container id.
    pub messages: HashMap<String, String>,
    /// Volumes as they were set up last.
    pub volumes: Option<BTreeMap<String, Ready>>,
    /// When volumes have to be looked at though nothing changed.
    pub volumes_due: Option<Instant>,
    /// When to try again to make volumes, sandbox and network, and how often that failed in a row.
    pub retry_at: Option<Instant>,
    pub failures: u32,
    /// When to try again to start a container.
    pub not_before: BTreeMap<String, Instant>,
    /// The network of the present sandbox is attached, or need not be.
    pub attached: Option<String>,
    pub resize: resize::Progress,
}

/// A container waits, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    pub reason: String,
    pub message: String,
}

impl PodContext {
    /// Whether a resize waits for other pods to go or to shrink.
    pub fn wants_room(&self) -> bool {
        matches!(self.state.lock().resize.pending, Some((resize::DEFERRED, _)))
    }

    pub fn event(&self, pod: &Pod, event_type: EventType, reason: &str, message: impl Into<String>) {
        self.node.recorder.event(pod, event_type, reason, message);
    }

    pub fn container_event(
        &self,
        pod: &Pod,
        name: &str,
        event_type: EventType,
        reason: &str,
        message: String,
    ) {
        self.node.recorder.event_about(container_reference(pod, name), event_type, reason, message);
    }
}

/// A reference to a container of a pod, as events carry it.
pub fn container_reference(pod: &Pod, name: &str) -> ObjectReference {
    let spec = pod.spec.as_ref();
    let is_init = spec.iter().flat_map(|spec| spec.init_containers.iter().flatten()).any(|c| c.name == name);
    let field = if is_init {
        "initContainers"
    } else if crate::build::find_ephemeral(pod, name).is_some() {
        "ephemeralContainers"
    } else {
        "containers"
    };
    ObjectReference { field_path: Some(format!("spec.{field}{{{name}}}")), ..reference_to(pod) }
}
