//! Resources that change while a pod runs (KEP-1287): what the node grants of what the pod asks for, what has to be
//! done to each container for it, and what is told of it. Values in, values out; the worker acts.
//!
//! A pod has three sets of resources: what it asks for (its spec), what the node has granted it (told as
//! `allocatedResources`, and read back from there after a restart), and what its containers have (the runtime knows).

use super::observe::Seen;
use crate::resources::{self, pod_request};
use k8s_openapi::api::core::v1::{Container, Pod, PodCondition, PodSpec, ResourceRequirements};
use knarr_runtime::cri::v1::LinuxContainerResources;
use std::collections::BTreeMap;
use std::sync::Arc;

pub const PENDING: &str = "PodResizePending";
pub const IN_PROGRESS: &str = "PodResizeInProgress";

/// Why a resize is not granted: not now, and never.
pub const DEFERRED: &str = "Deferred";
pub const INFEASIBLE: &str = "Infeasible";
/// How long after a failure the resize is tried again.
pub const FAILED_RETRY: std::time::Duration = std::time::Duration::from_secs(10);

/// What the node has granted a pod.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Grant {
    containers: BTreeMap<String, Option<ResourceRequirements>>,
    whole: Option<ResourceRequirements>,
}

/// The node's answer to what a pod asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Granted,
    /// Not now: others have it.
    Deferred(String),
    /// Never: the node is too small.
    Infeasible(String),
}

impl Grant {
    /// Everything the spec asks for.
    pub fn of(spec: &PodSpec) -> Grant {
        let containers = containers(spec).map(|c| (c.name.clone(), c.resources.clone())).collect();
        Grant { containers, whole: spec.resources.clone() }
    }

    /// What the pod's status tells it was granted, and what its spec asks for where the status tells nothing.
    pub fn told(pod: &Pod) -> Grant {
        let Some(spec) = &pod.spec else { return Grant::default() };
        let mut grant = Grant::of(spec);
        let status = pod.status.iter();
        let told = status.flat_map(|status| {
            status.container_statuses.iter().flatten().chain(status.init_container_statuses.iter().flatten())
        });
        for status in told {
            let Some(granted) = grant.containers.get_mut(&status.name) else { continue };
            let Some(actual) = status.resources.as_ref() else { continue };
            let mut resources = granted.clone().unwrap_or_default();
            resources.limits = actual.limits.clone();
            resources.requests = status.allocated_resources.clone().or_else(|| actual.requests.clone());
            *granted = Some(resources);
        }
        grant
    }

    /// The pod as granted: what is run.
    pub fn apply(&self, pod: &Arc<Pod>) -> Arc<Pod> {
        if pod.spec.as_ref().is_none_or(|spec| Grant::of(spec) == *self) {
            return pod.clone();
        }
        let mut pod = Pod::clone(pod);
        if let Some(spec) = &mut pod.spec {
            spec.resources.clone_from(&self.whole);
            let inits = spec.init_containers.iter_mut().flatten();
            for container in spec.containers.iter_mut().chain(inits) {
                if let Some(granted) = self.containers.get(&container.name) {
                    container.resources.clone_from(granted);
                }
            }
        }
        Arc::new(pod)
    }

    pub fn container(&self, name: &str) -> Option<&ResourceRequirements> {
        self.containers.get(name)?.as_ref()
    }
}

fn containers(spec: &PodSpec) -> impl Iterator<Item = &Container> {
    spec.containers.iter().chain(spec.init_containers.iter().flatten())
}

/// Whether a pod may have what its spec asks for, beside the others on the node as granted. `allocatable` has `cpu` in
/// thousandths.
pub fn answer(pod: &Pod, others: &[Arc<Pod>], allocatable: &BTreeMap<&'static str, i64>) -> Answer {
    let Some(spec) = &pod.spec else { return Answer::Granted };
    let active = |other: &&Arc<Pod>| {
        let phase = other.status.as_ref().and_then(|status| status.phase.as_deref());
        other.metadata.uid != pod.metadata.uid && !matches!(phase, Some("Failed" | "Succeeded"))
    };
    let granted: Vec<Arc<Pod>> =
        others.iter().filter(active).map(|other| Grant::told(other).apply(other)).collect();
    for resource in ["cpu", "memory"] {
        let wanted = pod_request(spec, resource);
        let Some(capacity) = allocatable.get(resource).copied() else { continue };
        if wanted > capacity {
            return Answer::Infeasible(format!(
                "Node didn't have enough capacity: {resource}, requested: {wanted}, capacity: {capacity}"
            ));
        }
        let used: i64 = granted
            .iter()
            .filter_map(|other| other.spec.as_ref())
            .map(|spec| pod_request(spec, resource))
            .sum();
        if used + wanted > capacity {
            return Answer::Deferred(format!(
                "Node didn't have enough resource: {resource}, requested: {wanted}, used: {used}, capacity: {capacity}"
            ));
        }
    }
    Answer::Granted
}

/// The values a container goes from, and those it goes to.
#[derive(Debug, PartialEq)]
pub struct Step {
    pub from: LinuxContainerResources,
    pub to: LinuxContainerResources,
}

/// What has to be done so that a running container has what was granted.
#[derive(Debug, PartialEq)]
pub enum Change {
    None,
    /// In place.
    Update(Box<Step>),
    /// The container wants to be started anew.
    Restart,
}

/// `granted` is the pod as granted. A runtime that does not tell what its containers have is taken to have done it.
pub fn change(granted: &Pod, container: &Container, seen: &Seen, memory_capacity: i64) -> Change {
    let Some(actual) = seen.status.resources.as_ref().and_then(|told| told.linux.as_ref()) else {
        return Change::None;
    };
    let wanted = resources::container_resources(granted, container, memory_capacity);
    let cpu = wanted.cpu_shares != actual.cpu_shares || wanted.cpu_quota != actual.cpu_quota;
    let memory = wanted.memory_limit_in_bytes != actual.memory_limit_in_bytes;
    let restarts = |resource: &str| {
        container
            .resize_policy
            .iter()
            .flatten()
            .any(|policy| policy.resource_name == resource && policy.restart_policy == "RestartContainer")
    };
    match (cpu, memory) {
        (false, false) => Change::None,
        _ if (cpu && restarts("cpu")) || (memory && restarts("memory")) => Change::Restart,
        _ => Change::Update(Box::new(Step { from: actual.clone(), to: wanted })),
    }
}

/// What is told of a resize that is not done.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Progress {
    /// Reason and message of what is not granted.
    pub pending: Option<(&'static str, String)>,
    /// Granted and not yet done; with a message if that failed.
    pub doing: Option<String>,
    /// What containers still have that were granted something else.
    pub behind: BTreeMap<String, ResourceRequirements>,
}

impl Progress {
    /// The conditions it is told by.
    pub fn conditions(&self) -> Vec<PodCondition> {
        let condition = |kind: &str, reason: Option<&str>, message: &str| PodCondition {
            type_: kind.to_owned(),
            status: "True".to_owned(),
            reason: reason.map(str::to_owned),
            message: (!message.is_empty()).then(|| message.to_owned()),
            ..Default::default()
        };
        let pending = self.pending.iter().map(|(reason, message)| condition(PENDING, Some(reason), message));
        let doing = self
            .doing
            .iter()
            .map(|message| condition(IN_PROGRESS, (!message.is_empty()).then_some("Error"), message));
        pending.chain(doing).collect()
    }
}

/// The values of the pod's own group while its containers go from some values to others: the larger of each. Zero is
/// no limit for quota and memory.
pub fn roomier(a: &LinuxContainerResources, b: &LinuxContainerResources) -> LinuxContainerResources {
    let limit = |a: i64, b: i64| if a == 0 || b == 0 { 0 } else { a.max(b) };
    LinuxContainerResources {
        cpu_shares: a.cpu_shares.max(b.cpu_shares),
        cpu_quota: limit(a.cpu_quota, b.cpu_quota),
        memory_limit_in_bytes: limit(a.memory_limit_in_bytes, b.memory_limit_in_bytes),
        ..b.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use knarr_runtime::cri::v1;
    use serde_json::{Value, json};

    fn pod(uid: &str, cpu: &str, status: Value) -> Arc<Pod> {
        let container = json!({"name": "c", "resources": {"requests": {"cpu": cpu}, "limits": {"cpu": cpu}}});
        let value = json!({"metadata": {"name": uid, "uid": uid}, "spec": {"containers": [container]}, "status": status});
        Arc::new(serde_json::from_value(value).unwrap())
    }

    fn granted(cpu: &str) -> Value {
        let status = json!({"name": "c", "image": "", "imageID": "", "ready": true, "restartCount": 0,
            "allocatedResources": {"cpu": cpu}, "resources": {"requests": {"cpu": cpu}, "limits": {"cpu": cpu}}});
        json!({"containerStatuses": [status]})
    }

    #[test]
    fn what_does_not_fit_now_waits_and_what_never_fits_is_told_so() {
        let allocatable = [("cpu", 4000)].into();
        // The other asks for three and was granted two.
        let others = [pod("b", "3", granted("2"))];
        let answer = |cpu: &str| answer(&pod("a", cpu, json!({})), &others, &allocatable);
        assert_eq!(answer("2"), Answer::Granted);
        assert_eq!(
            answer("3"),
            Answer::Deferred(
                "Node didn't have enough resource: cpu, requested: 3000, used: 2000, capacity: 4000".into()
            )
        );
        assert_eq!(
            answer("5"),
            Answer::Infeasible(
                "Node didn't have enough capacity: cpu, requested: 5000, capacity: 4000".into()
            )
        );
    }

    #[test]
    fn a_grant_is_read_back_from_the_status_and_shapes_the_pod() {
        let asked = pod("a", "3", granted("2"));
        let given = Grant::told(&asked).apply(&asked);
        let container = &given.spec.as_ref().unwrap().containers[0];
        assert_eq!(resources::limit_of(container, "cpu"), Some(2000));
        assert_eq!(Grant::of(asked.spec.as_ref().unwrap()).apply(&asked), asked);
    }

    #[test]
    fn containers_change_in_place_or_start_anew_by_their_policy() {
        let mut pod = Pod::clone(&pod("a", "2", json!({})));
        let linux = LinuxContainerResources { cpu_shares: 1024, cpu_quota: 100_000, ..Default::default() };
        let told = v1::ContainerResources { linux: Some(linux), windows: None };
        let status = v1::ContainerStatus { resources: Some(told), ..Default::default() };
        let seen = Seen { status, sandbox_id: String::new() };
        let change = |pod: &Pod| change(pod, &pod.spec.as_ref().unwrap().containers[0], &seen, 1 << 30);
        assert!(matches!(change(&pod), Change::Update(step) if step.to.cpu_quota == 200_000));
        let policy = json!([{"resourceName": "cpu", "restartPolicy": "RestartContainer"}]);
        pod.spec.as_mut().unwrap().containers[0].resize_policy = serde_json::from_value(policy).unwrap();
        assert_eq!(change(&pod), Change::Restart);
    }
}
