//! Whether a pod may run on this node at all: the kubelet's own check, after the scheduler's, of pods that were
//! bound by hand or on old knowledge (`pkg/kubelet/lifecycle/predicate.go`). Pure.

use crate::resources::pod_request;
use k8s_openapi::api::core::v1::{Node, Pod};
use knarr_client::placement;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Why a pod was turned away; it fails with this reason.
#[derive(Debug, PartialEq, Eq)]
pub struct Rejection {
    pub reason: &'static str,
    pub message: String,
}

/// Checks a pod against the node and the pods that are on it. `allocatable` has `cpu` in thousandths.
pub fn check(
    pod: &Pod,
    others: &[Arc<Pod>],
    node: Option<&Node>,
    allocatable: &BTreeMap<&'static str, i64>,
    pods_max: u32,
) -> Option<Rejection> {
    let spec = pod.spec.as_ref()?;
    let labels = node.and_then(|node| node.metadata.labels.clone()).unwrap_or_default();
    let name = node.and_then(|node| node.metadata.name.as_deref()).unwrap_or_default();
    if node.is_some() && !placement::selects_node(spec, &labels, name) {
        let message =
            "Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector".to_owned();
        return Some(Rejection { reason: "NodeAffinity", message });
    }
    if spec.os.as_ref().is_some_and(|os| os.name != "linux") {
        let message = "Failed to admit pod as the OS field doesn't match node OS".to_owned();
        return Some(Rejection { reason: "PodOSNotSupported", message });
    }
    let beside: Vec<&Arc<Pod>> =
        others.iter().filter(|other| other.metadata.uid != pod.metadata.uid && is_active(other)).collect();
    if beside.len() as u64 >= u64::from(pods_max) {
        let message = format!(
            "Node didn't have enough resource: pods, requested: 1, used: {}, capacity: {pods_max}",
            beside.len()
        );
        return Some(Rejection { reason: "OutOfpods", message });
    }
    let resources =
        [("cpu", "OutOfcpu"), ("memory", "OutOfmemory"), ("ephemeral-storage", "OutOfephemeral-storage")];
    for (resource, reason) in resources {
        let wanted = pod_request(spec, resource);
        let Some(capacity) = allocatable.get(resource).filter(|_| wanted > 0) else { continue };
        let used: i64 = beside
            .iter()
            .filter_map(|other| other.spec.as_ref())
            .map(|spec| pod_request(spec, resource))
            .sum();
        if used + wanted > *capacity {
            let message = format!(
                "Node didn't have enough resource: {resource}, requested: {wanted}, used: {used}, capacity: {capacity}"
            );
            return Some(Rejection { reason, message });
        }
    }
    tainted(pod, node?)
}

fn tainted(pod: &Pod, node: &Node) -> Option<Rejection> {
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    let tolerations = pod.spec.as_ref().and_then(|spec| spec.tolerations.as_ref());
    // Only what would evict the pod at once; NoSchedule is for the scheduler.
    let mut grave = taints.iter().filter(|taint| taint.effect == "NoExecute");
    grave.any(|taint| !placement::tolerates(tolerations, taint)).then(|| Rejection {
        reason: "TaintToleration",
        message: "Predicate TaintToleration failed".to_owned(),
    })
}

/// Pods that hold resources: not ended, on this node.
fn is_active(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    !matches!(phase, Some("Failed" | "Succeeded"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn pod(uid: &str, spec: Value) -> Arc<Pod> {
        Arc::new(
            serde_json::from_value(json!({"metadata": {"name": uid, "uid": uid}, "spec": spec})).unwrap(),
        )
    }

    #[test]
    fn pods_that_do_not_fit_are_turned_away_in_upstreams_words() {
        let with_cpu =
            |cpu: &str| json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": cpu}}}]});
        let others = [pod("a", with_cpu("1500m"))];
        let node: Node =
            serde_json::from_value(json!({"metadata": {"name": "n", "labels": {"disk": "ssd"}}})).unwrap();
        let allocatable = [("cpu", 2000)].into();
        let check = |spec: Value, pods_max| {
            check(&pod("b", spec), &others, Some(&node), &allocatable, pods_max)
                .map(|found| (found.reason, found.message))
        };
        assert_eq!(check(with_cpu("500m"), 110), None);
        let (reason, message) = check(with_cpu("600m"), 110).unwrap();
        assert_eq!(reason, "OutOfcpu");
        assert_eq!(
            message,
            "Node didn't have enough resource: cpu, requested: 600, used: 1500, capacity: 2000"
        );
        assert_eq!(check(with_cpu("0"), 1).unwrap().0, "OutOfpods");
        let selective = json!({"containers": [], "nodeSelector": {"disk": "hdd"}});
        assert_eq!(check(selective, 110).unwrap().0, "NodeAffinity");
    }
}
