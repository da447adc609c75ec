//! From requests and limits to the kernel's numbers: CPU shares and quota, memory, how dear a process is to the
//! OOM killer, and a pod's place in the tree of control groups. Pure.

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;
use knarr_api::quantity::Quantity;
use knarr_runtime::cri::v1::LinuxContainerResources;
use std::collections::BTreeMap;

/// The kernel's least share of CPU; what a container without a request gets.
const SHARES_MIN: i64 = 2;
const SHARES_MAX: i64 = 262_144;
const SHARES_PER_CPU: i64 = 1024;
/// Length of the period a CPU quota is given for, in microseconds.
const QUOTA_PERIOD_US: i64 = 100_000;
/// The kernel takes no smaller quota.
const QUOTA_MIN_US: i64 = 1000;
const OOM_GUARANTEED: i64 = -997;
const OOM_BEST_EFFORT: i64 = 1000;
/// Pods of at least this priority (`system-node-critical` has 2000001000) are kept like guaranteed ones.
const CRITICAL_PRIORITY: i32 = 2_000_000_000;

type List = BTreeMap<String, ApiQuantity>;

/// A pod's quality of service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Qos {
    Guaranteed,
    Burstable,
    BestEffort,
}

impl Qos {
    pub fn as_str(self) -> &'static str {
        match self {
            Qos::Guaranteed => "Guaranteed",
            Qos::Burstable => "Burstable",
            Qos::BestEffort => "BestEffort",
        }
    }

    /// The class of a pod: what the API says, or computed by its rules.
    pub fn of(pod: &Pod) -> Qos {
        match pod.status.as_ref().and_then(|status| status.qos_class.as_deref()) {
            Some("Guaranteed") => Qos::Guaranteed,
            Some("BestEffort") => Qos::BestEffort,
            Some("Burstable") => Qos::Burstable,
            _ => pod.spec.as_ref().map_or(Qos::BestEffort, Qos::compute),
        }
    }

    fn compute(spec: &PodSpec) -> Qos {
        let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
        let (mut any, mut guaranteed) = (false, true);
        for container in containers {
            for resource in ["cpu", "memory"] {
                let (request, limit) = (request_of(container, resource), limit_of(container, resource));
                any |= request.is_some_and(|amount| amount > 0) || limit.is_some_and(|amount| amount > 0);
                guaranteed &= limit.is_some_and(|limit| limit > 0) && (request.is_none() || request == limit);
            }
        }
        match (any, guaranteed) {
            (false, _) => Qos::BestEffort,
            (true, true) => Qos::Guaranteed,
            (true, false) => Qos::Burstable,
        }
    }
}

/// A quantity in thousandths for `cpu`, in whole units for everything else. Unreadable ones count as absent: the
/// API does not let them in.
pub fn amount(list: Option<&List>, resource: &str) -> Option<i64> {
    let quantity: Quantity = list?.get(resource)?.0.parse().ok()?;
    Some(if resource == "cpu" { quantity.millis() } else { quantity.units() })
}

fn of(resources: Option<&ResourceRequirements>, limits: bool) -> Option<&List> {
    let resources = resources?;
    if limits { resources.limits.as_ref() } else { resources.requests.as_ref() }
}

pub fn limit_of(container: &Container, resource: &str) -> Option<i64> {
    amount(of(container.resources.as_ref(), true), resource)
}

/// A request that is not given is the limit.
pub fn request_of(container: &Container, resource: &str) -> Option<i64> {
    amount(of(container.resources.as_ref(), false), resource).or_else(|| limit_of(container, resource))
}

pub fn cpu_shares(milli: i64) -> i64 {
    (milli * SHARES_PER_CPU / 1000).clamp(SHARES_MIN, SHARES_MAX)
}

pub fn cpu_quota(milli: i64) -> i64 {
    (milli * QUOTA_PERIOD_US / 1000).max(QUOTA_MIN_US)
}

/// The control group values of a container.
pub fn container_resources(
    pod: &Pod,
    container: &Container,
    memory_capacity: i64,
) -> LinuxContainerResources {
    let request = request_of(container, "cpu").unwrap_or(0);
    let mut out = LinuxContainerResources {
        cpu_period: QUOTA_PERIOD_US,
        cpu_shares: cpu_shares(request),
        memory_limit_in_bytes: limit_of(container, "memory").unwrap_or(0),
        oom_score_adj: oom_score_adj(pod, container, memory_capacity),
        ..Default::default()
    };
    if let Some(limit) = limit_of(container, "cpu").filter(|limit| *limit > 0) {
        out.cpu_quota = cpu_quota(limit);
    }
    out
}

/// How ready the kernel is to kill the container when memory runs out (`pkg/kubelet/qos/policy.go`).
pub fn oom_score_adj(pod: &Pod, container: &Container, memory_capacity: i64) -> i64 {
    let priority = pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or(0);
    match Qos::of(pod) {
        _ if priority >= CRITICAL_PRIORITY => OOM_GUARANTEED,
        Qos::Guaranteed => OOM_GUARANTEED,
        Qos::BestEffort => OOM_BEST_EFFORT,
        Qos::Burstable => {
            let request = request_of(container, "memory").unwrap_or(0);
            let score = 1000 - (1000 * i128::from(request) / i128::from(memory_capacity.max(1)));
            // Never as dear as a guaranteed pod, never as cheap as a best-effort one.
            i64::try_from(score).unwrap_or(0).clamp(1000 + OOM_GUARANTEED, OOM_BEST_EFFORT - 1)
        }
    }
}

/// What a pod asks of a resource in total: containers and sidecars at once, or the largest init container.
pub fn pod_request(spec: &PodSpec, resource: &str) -> i64 {
    if let Some(amount) = amount(of(spec.resources.as_ref(), false), resource) {
        return amount + overhead(spec, resource);
    }
    combine(spec, |container| Some(request_of(container, resource).unwrap_or(0))).unwrap_or(0)
        + overhead(spec, resource)
}

/// A pod's limit of a resource; `None` when one of its containers has none.
pub fn pod_limit(spec: &PodSpec, resource: &str) -> Option<i64> {
    let own = amount(of(spec.resources.as_ref(), true), resource);
    let limit =
        own.or_else(|| combine(spec, |container| limit_of(container, resource).filter(|limit| *limit > 0)))?;
    Some(limit + overhead(spec, resource))
}

fn overhead(spec: &PodSpec, resource: &str) -> i64 {
    amount(spec.overhead.as_ref(), resource).unwrap_or(0)
}

fn combine(spec: &PodSpec, of: impl Fn(&Container) -> Option<i64>) -> Option<i64> {
    let (mut sidecars, mut init_max) = (0, 0);
    for container in spec.init_containers.iter().flatten() {
        if container.restart_policy.as_deref() == Some("Always") {
            sidecars += of(container)?;
            init_max = init_max.max(sidecars);
        } else {
            init_max = init_max.max(of(container)? + sidecars);
        }
    }
    let mut main = 0;
    for container in &spec.containers {
        main += of(container)?;
    }
    Some((main + sidecars).max(init_max))
}

/// The values of a pod's own control group, around all its containers.
pub fn pod_resources(spec: &PodSpec) -> LinuxContainerResources {
    let mut out = LinuxContainerResources {
        cpu_period: QUOTA_PERIOD_US,
        cpu_shares: cpu_shares(pod_request(spec, "cpu")),
        ..Default::default()
    };
    if let Some(limit) = pod_limit(spec, "cpu") {
        out.cpu_quota = cpu_quota(limit);
    }
    if let Some(limit) = pod_limit(spec, "memory") {
        out.memory_limit_in_bytes = limit;
    }
    out
}

/// Where the pod's control group is: `/kubepods/burstable/podUID`, or as systemd names slices.
pub fn cgroup_parent(root: &str, qos: Qos, uid: &str, systemd: bool) -> String {
    let root = root.trim_matches('/');
    let class = match qos {
        Qos::Guaranteed => None,
        Qos::Burstable => Some("burstable"),
        Qos::BestEffort => Some("besteffort"),
    };
    if systemd {
        let class = class.map(|class| format!("-{class}")).unwrap_or_default();
        // A dash would be a level in the tree of slices.
        return format!("{root}{class}-pod{}.slice", uid.replace('-', "_"));
    }
    let class = class.map(|class| format!("/{class}")).unwrap_or_default();
    format!("/{root}{class}/pod{uid}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": spec})).unwrap()
    }

    #[test]
    fn limits_become_cgroup_values() {
        let pod = pod(json!({"containers": [{"name": "a", "image": "i", "resources": {
            "requests": {"cpu": "250m", "memory": "64Mi"}, "limits": {"cpu": "500m", "memory": "128Mi"}}}]}));
        let spec = pod.spec.as_ref().unwrap();
        let values = container_resources(&pod, &spec.containers[0], 1 << 30);
        assert_eq!((values.cpu_shares, values.cpu_quota), (256, 50_000));
        assert_eq!(values.memory_limit_in_bytes, 128 << 20);
        assert_eq!(values.oom_score_adj, 1000 - 62);
        assert_eq!(Qos::of(&pod), Qos::Burstable);
    }

    #[test]
    fn class_follows_requests_and_limits() {
        let equal =
            json!({"containers": [{"name": "a", "resources": {"limits": {"cpu": "1", "memory": "1Gi"}}}]});
        assert_eq!(Qos::of(&pod(equal)), Qos::Guaranteed);
        assert_eq!(Qos::of(&pod(json!({"containers": [{"name": "a"}]}))), Qos::BestEffort);
    }

    #[test]
    fn a_pods_request_is_the_larger_of_init_and_main_with_sidecars_in_both() {
        let pod = pod(json!({
            "initContainers": [
                {"name": "s", "restartPolicy": "Always", "resources": {"requests": {"cpu": "100m"}}},
                {"name": "i", "resources": {"requests": {"cpu": "500m"}}}],
            "containers": [{"name": "a", "resources": {"requests": {"cpu": "200m"}}}]}));
        assert_eq!(pod_request(&pod.spec.unwrap(), "cpu"), 600);
    }

    #[test]
    fn groups_are_named_by_class() {
        assert_eq!(cgroup_parent("/kubepods", Qos::Guaranteed, "u-1", false), "/kubepods/podu-1");
        assert_eq!(cgroup_parent("/kubepods", Qos::Burstable, "u-1", false), "/kubepods/burstable/podu-1");
        let slice = cgroup_parent("/kubepods", Qos::BestEffort, "u-1", true);
        assert_eq!(slice, "kubepods-besteffort-podu_1.slice");
    }
}
