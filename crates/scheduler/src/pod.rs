//! A pod digested: requests, ports and rules in the form filters want. Made once per version of the pod.

use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use knarr_client::ObjectKey;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What scoring assumes for a container that requests nothing (upstream's values): 0.1 core and 200 MB.
const DEFAULT_CPU_MILLIS: i64 = 100;
const DEFAULT_MEMORY_BYTES: i64 = 200 * 1024 * 1024;

pub const CPU: &str = "cpu";
pub const MEMORY: &str = "memory";

/// Amounts by resource name: cpu in millicores, everything else in units (bytes, devices).
pub type Amounts = BTreeMap<String, i64>;

/// A port a pod occupies on its node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostPort {
    pub ip: String,
    pub protocol: String,
    pub port: i32,
}

impl HostPort {
    /// The wildcard address collides with every address.
    pub fn collides(&self, other: &HostPort) -> bool {
        let any = |ip: &str| ip == "0.0.0.0";
        self.port == other.port
            && self.protocol == other.protocol
            && (self.ip == other.ip || any(&self.ip) || any(&other.ip))
    }
}

/// A pod as the scheduler sees it.
#[derive(Debug)]
pub struct PodInfo {
    pub pod: Arc<Pod>,
    pub key: ObjectKey,
    pub priority: i32,
    pub requests: Amounts,
    /// Cpu and memory with defaults where nothing is requested: for scoring only.
    pub assumed_cpu: i64,
    pub assumed_memory: i64,
    pub ports: Vec<HostPort>,
    /// It keeps other pods away from its domain.
    pub repels: bool,
}

impl PodInfo {
    pub fn new(pod: Arc<Pod>) -> Self {
        let none = BTreeMap::new();
        let requests = requests(&pod, &none);
        let defaults =
            [(CPU.to_owned(), DEFAULT_CPU_MILLIS), (MEMORY.to_owned(), DEFAULT_MEMORY_BYTES)].into();
        let assumed = self::requests(&pod, &defaults);
        PodInfo {
            key: ObjectKey::of(&*pod),
            priority: pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or(0),
            assumed_cpu: assumed.get(CPU).copied().unwrap_or(0),
            assumed_memory: assumed.get(MEMORY).copied().unwrap_or(0),
            requests,
            ports: host_ports(&pod),
            repels: repels(&pod),
            pod,
        }
    }

    pub fn uid(&self) -> &str {
        self.pod.metadata.uid.as_deref().unwrap_or_default()
    }

    pub fn namespace(&self) -> &str {
        &self.key.namespace
    }
}

/// What a pod needs of its node (upstream's `PodRequests`): the containers and sidecars together, or more if an init
/// container needs more at its time beside the sidecars started before it; pod-level requests override; plus
/// overhead. A resize in progress counts with the larger of the wished and the allocated amount.
fn requests(pod: &Pod, defaults: &Amounts) -> Amounts {
    let Some(spec) = &pod.spec else { return Amounts::new() };
    let mut running = Amounts::new();
    for container in &spec.containers {
        add(&mut running, &container_requests(pod, container, defaults));
    }
    let (mut sidecars, mut peak) = (Amounts::new(), Amounts::new());
    for container in spec.init_containers.iter().flatten() {
        let own = container_requests(pod, container, defaults);
        let mut at_its_time = sidecars.clone();
        add(&mut at_its_time, &own);
        if container.restart_policy.as_deref() == Some("Always") {
            add(&mut running, &own);
            add(&mut sidecars, &own);
        }
        raise(&mut peak, &at_its_time);
    }
    raise(&mut running, &peak);
    if let Some(resources) = &spec.resources {
        running.extend(amounts(&resources.requests));
    }
    add(&mut running, &amounts(&spec.overhead));
    running
}

fn container_requests(pod: &Pod, container: &Container, defaults: &Amounts) -> Amounts {
    let mut own = container.resources.as_ref().map(requested).unwrap_or_default();
    let statuses = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref());
    let status = statuses.into_iter().flatten().find(|status| status.name == container.name);
    if let Some(status) = status {
        raise(&mut own, &amounts(&status.allocated_resources));
    }
    for (name, amount) in defaults {
        own.entry(name.clone()).or_insert(*amount);
    }
    own
}

fn requested(resources: &ResourceRequirements) -> Amounts {
    amounts(&resources.requests)
}

fn add(into: &mut Amounts, more: &Amounts) {
    for (name, amount) in more {
        let sum = into.entry(name.clone()).or_insert(0);
        *sum = sum.saturating_add(*amount);
    }
}

fn raise(into: &mut Amounts, other: &Amounts) {
    for (name, amount) in other {
        let most = into.entry(name.clone()).or_insert(0);
        *most = (*most).max(*amount);
    }
}

/// Reads a resource list; what is not a quantity counts as nothing (the API server lets none through).
pub fn amounts(list: &Option<BTreeMap<String, Quantity>>) -> Amounts {
    let read = |(name, quantity): (&String, &Quantity)| {
        let parsed: knarr_api::quantity::Quantity = quantity.0.parse().ok()?;
        Some((name.clone(), if name == CPU { parsed.millis() } else { parsed.units() }))
    };
    list.iter().flatten().filter_map(read).collect()
}

fn repels(pod: &Pod) -> bool {
    let affinity = pod.spec.as_ref().and_then(|spec| spec.affinity.as_ref());
    let rules = affinity.and_then(|affinity| affinity.pod_anti_affinity.as_ref());
    rules.is_some_and(|rules| rules.required_during_scheduling_ignored_during_execution.is_some())
}

fn host_ports(pod: &Pod) -> Vec<HostPort> {
    let Some(spec) = &pod.spec else { return Vec::new() };
    let sidecars = spec.init_containers.iter().flatten();
    let sidecars = sidecars.filter(|container| container.restart_policy.as_deref() == Some("Always"));
    let containers = spec.containers.iter().chain(sidecars);
    let ports = containers.flat_map(|container| container.ports.iter().flatten());
    ports
        .filter_map(|port| {
            let host_port = port.host_port.filter(|port| *port > 0)?;
            let ip = port.host_ip.clone().filter(|ip| !ip.is_empty()).unwrap_or_else(|| "0.0.0.0".to_owned());
            let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
            Some(HostPort { ip, protocol, port: host_port })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn container(name: &str, cpu: &str, always: bool) -> Value {
        let policy = if always { json!("Always") } else { Value::Null };
        json!({"name": name, "resources": {"requests": {"cpu": cpu}}, "restartPolicy": policy})
    }

    #[test]
    fn requests_follow_the_order_in_which_containers_run() {
        let cases = [
            (
                "containers add up",
                json!({"containers": [container("a", "1", false), container("b", "500m", false)]}),
                1500,
            ),
            (
                "a larger init container decides",
                json!({"containers": [container("a", "1", false)], "initContainers": [container("i", "3", false)]}),
                3000,
            ),
            (
                "an init container runs beside the sidecars before it",
                json!({
                    "containers": [container("a", "1", false)],
                    "initContainers": [container("s", "1", true), container("i", "3", false)],
                }),
                4000,
            ),
            (
                "sidecars add to containers, and overhead to all",
                json!({
                    "containers": [container("a", "1", false)],
                    "initContainers": [container("s", "1", true)], "overhead": {"cpu": "250m"},
                }),
                2250,
            ),
        ];
        for (what, spec, expected) in cases {
            let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": spec})).unwrap();
            assert_eq!(PodInfo::new(Arc::new(pod)).requests[CPU], expected, "{what}");
        }
    }
}
