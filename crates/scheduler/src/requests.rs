//! What a pod takes of its node: the arithmetic of containers, init containers, sidecars, pod-level resources,
//! overhead and resizes in progress (upstream's `PodRequests`), and what scoring assumes where nothing is requested.

use k8s_openapi::api::core::v1::{Container, ContainerStatus, Pod};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What scoring assumes for a container that requests nothing (upstream's values): 0.1 core and 200 MB.
const DEFAULT_CPU_MILLIS: i64 = 100;
const DEFAULT_MEMORY_BYTES: i64 = 200 * 1024 * 1024;

pub const CPU: &str = "cpu";
pub const MEMORY: &str = "memory";
pub const STORAGE: &str = "ephemeral-storage";

/// Amounts by resource name: cpu in millicores, everything else in units (bytes, devices).
pub type Amounts = BTreeMap<String, i64>;

/// Amounts with the common resources apart: cpu in millicores, bytes, and units of others in order of name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Requests {
    pub cpu: i64,
    pub memory: i64,
    pub storage: i64,
    pub others: Vec<(Arc<str>, i64)>,
}

impl Requests {
    pub fn new(amounts: &Amounts) -> Self {
        let get = |name: &str| amounts.get(name).copied().unwrap_or(0);
        let others = amounts.iter().filter(|(name, _)| ![CPU, MEMORY, STORAGE].contains(&name.as_str()));
        Requests {
            cpu: get(CPU),
            memory: get(MEMORY),
            storage: get(STORAGE),
            others: others.map(|(name, amount)| (name.as_str().into(), *amount)).collect(),
        }
    }

    pub fn get(&self, name: &str) -> i64 {
        match name {
            CPU => self.cpu,
            MEMORY => self.memory,
            STORAGE => self.storage,
            _ => self.others.iter().find(|(other, _)| &**other == name).map_or(0, |(_, amount)| *amount),
        }
    }

    /// Whether this asks less of any resource than `other`.
    pub fn is_less_somewhere(&self, other: &Requests) -> bool {
        self.cpu < other.cpu
            || self.memory < other.memory
            || self.storage < other.storage
            || other.others.iter().any(|(name, amount)| self.get(name) < *amount)
    }
}

/// The pod's requests, and its cpu and memory as scoring sees them.
pub fn of_pod(pod: &Pod) -> (Requests, i64, i64) {
    let plain = total(pod, &Amounts::new());
    let defaults = defaults(pod, &plain);
    let scored = if defaults.is_empty() { plain.clone() } else { total(pod, &defaults) };
    let get = |name| scored.get(name).copied().unwrap_or(0);
    (Requests::new(&plain), get(CPU), get(MEMORY))
}

/// Which defaults apply to containers: with pod-level requests only those of resources nobody asks for.
fn defaults(pod: &Pod, plain: &Amounts) -> Amounts {
    let all = [(CPU, DEFAULT_CPU_MILLIS), (MEMORY, DEFAULT_MEMORY_BYTES)];
    let pod_level = pod.spec.as_ref().and_then(|spec| spec.resources.as_ref());
    let pod_level = pod_level.is_some_and(|resources| resources.requests.is_some());
    let applies = |name: &str| !pod_level || plain.get(name).copied().unwrap_or(0) == 0;
    all.into_iter()
        .filter(|(name, _)| applies(name))
        .map(|(name, amount)| (name.to_owned(), amount))
        .collect()
}

/// The containers and sidecars together, or more if an init container needs more at its time beside the sidecars
/// started before it; pod-level requests override; plus overhead.
fn total(pod: &Pod, defaults: &Amounts) -> Amounts {
    let Some(spec) = &pod.spec else { return Amounts::new() };
    let status = pod.status.as_ref();
    let statuses = status.and_then(|status| status.container_statuses.as_deref()).unwrap_or_default();
    let infeasible = is_resize_infeasible(pod);
    let mut running = Amounts::new();
    for container in &spec.containers {
        add(&mut running, &of_container(container, statuses, infeasible, defaults));
    }
    let statuses = status.and_then(|status| status.init_container_statuses.as_deref()).unwrap_or_default();
    let (mut sidecars, mut peak) = (Amounts::new(), Amounts::new());
    for container in spec.init_containers.iter().flatten() {
        let sidecar = container.restart_policy.as_deref() == Some("Always");
        // Only sidecars can be resized.
        let own = of_container(container, if sidecar { statuses } else { &[] }, infeasible, defaults);
        let mut at_its_time = sidecars.clone();
        add(&mut at_its_time, &own);
        if sidecar {
            add(&mut running, &own);
            add(&mut sidecars, &own);
        }
        raise(&mut peak, &at_its_time);
    }
    raise(&mut running, &peak);
    if let Some(resources) = &spec.resources {
        let supported = |name: &str| name == CPU || name == MEMORY || name.starts_with("hugepages-");
        let in_force = status.and_then(|status| status.resources.as_ref());
        let allocated = status.map(|status| amounts(&status.allocated_resources)).unwrap_or_default();
        let in_force = in_force.map(|resources| amounts(&resources.requests));
        let of_pod = while_resized(|| amounts(&resources.requests), in_force, allocated, infeasible);
        // Only what the pod itself asks for replaces the sum of its containers.
        let asked = |name: &str| resources.requests.as_ref().is_some_and(|list| list.contains_key(name));
        running.extend(of_pod.into_iter().filter(|(name, _)| supported(name) && asked(name)));
    }
    add(&mut running, &amounts(&spec.overhead));
    running
}

/// While something is resized: the largest of what is wished, in force and allocated; and when the node said that the
/// wish can never be met, of the latter two.
fn while_resized(
    wished: impl FnOnce() -> Amounts,
    in_force: Option<Amounts>,
    allocated: Amounts,
    infeasible: bool,
) -> Amounts {
    let known = in_force.is_some() || !allocated.is_empty();
    let mut most = if infeasible && known { Amounts::new() } else { wished() };
    raise(&mut most, &in_force.unwrap_or_default());
    raise(&mut most, &allocated);
    most
}

/// A container's requests, with defaults where it has none.
fn of_container(
    container: &Container,
    statuses: &[ContainerStatus],
    infeasible: bool,
    defaults: &Amounts,
) -> Amounts {
    let wished =
        || container.resources.as_ref().map(|resources| amounts(&resources.requests)).unwrap_or_default();
    let mut own = match statuses.iter().find(|status| status.name == container.name) {
        None => wished(),
        Some(status) => {
            let in_force = status.resources.as_ref().map(|resources| amounts(&resources.requests));
            while_resized(wished, in_force, amounts(&status.allocated_resources), infeasible)
        }
    };
    for (name, amount) in defaults {
        own.entry(name.clone()).or_insert(*amount);
    }
    own
}

fn is_resize_infeasible(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|condition| {
        condition.type_ == "PodResizePending" && condition.reason.as_deref() == Some("Infeasible")
    })
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn container(name: &str, cpu: &str, always: bool) -> Value {
        let policy = if always { json!("Always") } else { Value::Null };
        json!({"name": name, "resources": {"requests": {"cpu": cpu}}, "restartPolicy": policy})
    }

    fn cpu(spec: Value, status: Value) -> (i64, i64) {
        let pod: Pod =
            serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": spec, "status": status}))
                .unwrap();
        let (requests, scored, _) = of_pod(&pod);
        (requests.cpu, scored)
    }

    #[test]
    fn requests_follow_the_order_in_which_containers_run() {
        let (one, half) = (container("a", "1", false), container("b", "500m", false));
        let cases = [
            ("containers add up", json!({"containers": [one, half]}), 1500),
            (
                "a larger init container decides",
                json!({"containers": [one], "initContainers": [container("i", "3", false)]}),
                3000,
            ),
            (
                "an init container runs beside the sidecars before it",
                json!({
                    "containers": [one],
                    "initContainers": [container("s", "1", true), container("i", "3", false)],
                }),
                4000,
            ),
            (
                "an init container runs before the sidecars after it",
                json!({
                    "containers": [one],
                    "initContainers": [container("i", "3", false), container("s", "1", true)],
                }),
                3000,
            ),
            (
                "sidecars add to containers, and overhead to all",
                json!({
                    "containers": [one], "initContainers": [container("s", "1", true)], "overhead": {"cpu": "250m"},
                }),
                2250,
            ),
            (
                "pod-level requests replace those of containers",
                json!({"containers": [one], "resources": {"requests": {"cpu": "3"}}, "overhead": {"cpu": "1"}}),
                4000,
            ),
        ];
        for (what, spec, expected) in cases {
            assert_eq!(cpu(spec, json!({})).0, expected, "{what}");
        }
    }

    #[test]
    fn a_resize_counts_with_its_largest_amount_until_it_is_infeasible() {
        let status = |condition: Value| {
            json!({
                "conditions": [condition],
                "containerStatuses": [{
                    "name": "a", "image": "", "imageID": "", "ready": true, "restartCount": 0,
                    "allocatedResources": {"cpu": "2"}, "resources": {"requests": {"cpu": "1500m"}},
                }],
            })
        };
        let spec = json!({"containers": [container("a", "4", false)]});
        let pending = json!({"type": "PodResizePending", "status": "True", "reason": "Deferred"});
        assert_eq!(cpu(spec.clone(), status(pending)).0, 4000);
        let infeasible = json!({"type": "PodResizePending", "status": "True", "reason": "Infeasible"});
        assert_eq!(cpu(spec, status(infeasible)).0, 2000);
    }

    #[test]
    fn a_resize_of_the_whole_pod_counts_with_its_largest_amount_too() {
        let status = |reason: &str| {
            json!({
                "conditions": [{"type": "PodResizePending", "status": "True", "reason": reason}],
                "allocatedResources": {"cpu": "3", "memory": "1Gi"}, "resources": {"requests": {"cpu": "2500m"}},
            })
        };
        let spec = |wished: &str| {
            json!({
                "containers": [container("a", "1", false)], "resources": {"requests": {"cpu": wished}},
                "overhead": {"cpu": "100m"},
            })
        };
        let cases = [
            ("5", "Deferred", 5100, "growing: the wish is reserved already"),
            ("2", "Deferred", 3100, "shrinking: what was granted is still taken"),
            ("5", "Infeasible", 3100, "the wish can never be met"),
        ];
        for (wished, reason, expected, what) in cases {
            assert_eq!(cpu(spec(wished), status(reason)).0, expected, "{what}");
        }
        assert_eq!(cpu(spec("2"), json!({})).0, 2100, "nothing was granted yet");
    }

    #[test]
    fn scoring_assumes_something_of_containers_that_ask_for_nothing() {
        let empty = json!({"name": "e"});
        let cases = [
            (json!({"containers": [empty, empty]}), 200),
            (json!({"containers": [empty, container("a", "1", false)]}), 1100),
            (json!({"containers": [empty], "resources": {"requests": {"cpu": "2"}}}), 2000),
            (json!({"containers": [empty], "resources": {"requests": {"memory": "1Gi"}}}), 100),
        ];
        for (spec, scored) in cases {
            assert_eq!(cpu(spec.clone(), json!({})).1, scored, "{spec}");
        }
    }
}
