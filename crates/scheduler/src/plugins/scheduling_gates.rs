//! SchedulingGates: a pod with gates is not tried. The queue keeps it aside until an update of the pod itself has
//! removed the last one; no other event is asked.

use super::{Plugin, Point};
use crate::pod::PodInfo;

pub const PLUGIN: Plugin = Plugin { name: "SchedulingGates", points: &[Point::PreEnqueue], ..Plugin::NONE };

/// Whether the pod has gates. (The condition that says so is the API server's, which knows it when the pod is made.)
pub fn is_gated(pod: &PodInfo) -> bool {
    pod.spec().and_then(|spec| spec.scheduling_gates.as_ref()).is_some_and(|gates| !gates.is_empty())
}
