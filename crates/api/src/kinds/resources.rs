//! What pods ask for and may use: rules for requests and limits, their totals, the quality of service that follows
//! from them, and what of them may change while the pod runs (`pods/resize`).

use std::collections::BTreeMap;

use serde_json::Value;

use crate::apply::Reach;
use crate::field::{self, child, index};
use crate::kinds::core::{keep, quantity};
use crate::kinds::pod::pod_spec;
use crate::object::Object;
use crate::quantity::Quantity;
use crate::rules::{Errors, Face};

/// Amounts by resource name.
pub type List = BTreeMap<String, Quantity>;

/// Changes cpu and memory of a pod in place (KEP-1287).
pub const RESIZE: Face = Face {
    name: "resize",
    update: keep_all_but_resources,
    validate: validate_resize,
    reach: Reach::Only(&[
        "spec.containers.*.resources",
        "spec.containers.*.resizePolicy",
        "spec.initContainers.*.resources",
        "spec.initContainers.*.resizePolicy",
        "spec.resources",
    ]),
};

/// The amounts in a map of quantities.
pub fn quantities(map: Option<&Value>) -> List {
    let entries = map.and_then(Value::as_object).into_iter().flatten();
    entries.filter_map(|(name, value)| Some((name.clone(), quantity(Some(value))?))).collect()
}

/// Resources that can be given to a pod as a whole (KEP-2837).
pub fn is_pod_level(name: &str) -> bool {
    matches!(name, "cpu" | "memory") || name.starts_with("hugepages-")
}

/// What a pod takes in all, of `requests` or `limits`: its containers and sidecars together, or what an init container
/// needs beside the sidecars before it, if that is more; of what the pod says as a whole, that; and its overhead.
pub fn total(pod: &Value, list: &str) -> List {
    let mut sum =
        of_containers(pod, |container| quantities(container.at("resources").and_then(|r| r.at(list))));
    for (name, amount) in quantities(pod.at("spec.resources").and_then(|r| r.at(list))) {
        if is_pod_level(&name) {
            sum.insert(name, amount);
        }
    }
    add_overhead(pod, list, &mut sum);
    sum
}

/// What a pod holds of its node while it is being resized: of each container the most of what it asks for, was given
/// and has.
pub fn held_requests(pod: &Value) -> List {
    let statuses =
        || pod.list_at("status.containerStatuses").iter().chain(pod.list_at("status.initContainerStatuses"));
    // What can never be given is not held.
    let infeasible = pod
        .list_at("status.conditions")
        .iter()
        .any(|c| c.str_at("type") == "PodResizePending" && c.str_at("reason") == "Infeasible");
    let mut sum = of_containers(pod, |container| {
        let wanted = quantities(container.at("resources.requests"));
        let status = statuses().find(|s| s.str_at("name") == container.str_at("name"));
        let given = quantities(status.and_then(|s| s.at("allocatedResources")));
        let actual = quantities(status.and_then(|s| s.at("resources.requests")));
        if given.is_empty() && actual.is_empty() {
            return wanted;
        }
        let mut most = if infeasible { List::new() } else { wanted.clone() };
        for (name, amount) in given.into_iter().chain(actual) {
            let slot = most.entry(name).or_insert(amount);
            *slot = (*slot).max(amount);
        }
        // Other resources than those that resize stay as asked for.
        for (name, amount) in wanted {
            most.entry(name).or_insert(amount);
        }
        most
    });
    for (name, amount) in quantities(pod.at("spec.resources.requests")) {
        if is_pod_level(&name) {
            sum.insert(name, amount);
        }
    }
    add_overhead(pod, "requests", &mut sum);
    sum
}

fn add_overhead(pod: &Value, list: &str, sum: &mut List) {
    for (name, amount) in quantities(pod.at("spec.overhead")) {
        match sum.get_mut(&name) {
            Some(have) => *have = *have + amount,
            None if list == "requests" => drop(sum.insert(name, amount)),
            None => {}
        }
    }
}

fn of_containers(pod: &Value, of: impl Fn(&Value) -> List) -> List {
    let mut sum = List::new();
    for container in pod.list_at("spec.containers") {
        add(&mut sum, of(container));
    }
    let (mut sidecars, mut peak) = (List::new(), List::new());
    for container in pod.list_at("spec.initContainers") {
        let mut now = of(container);
        if is_sidecar(container) {
            add(&mut sum, now.clone());
            add(&mut sidecars, now);
            now = sidecars.clone();
        } else {
            add(&mut now, sidecars.clone());
        }
        largest(&mut peak, now);
    }
    largest(&mut sum, peak);
    sum
}

fn add(sum: &mut List, more: List) {
    for (name, amount) in more {
        // An amount of zero would lose the form of the other.
        sum.entry(name).and_modify(|have| *have = *have + amount).or_insert(amount);
    }
}

fn largest(sum: &mut List, other: List) {
    for (name, amount) in other {
        sum.entry(name).and_modify(|have| *have = (*have).max(amount)).or_insert(amount);
    }
}

/// An init container that runs on beside the others.
pub fn is_sidecar(container: &Value) -> bool {
    container.str_at("restartPolicy") == "Always"
}

/// `Guaranteed`, `Burstable` or `BestEffort`, from the requests and limits of cpu and memory: the pod's as a whole if it
/// has any, or those of all its containers.
pub fn qos_class(pod: &Value) -> &'static str {
    let whole = pod
        .at("spec.resources")
        .filter(|r| ["requests", "limits"].iter().any(|list| r.map_at(list).is_some_and(|m| !m.is_empty())));
    let each = pod.list_at("spec.containers").iter().chain(pod.list_at("spec.initContainers"));
    let all: Vec<&Value> = match whole {
        Some(resources) => vec![resources],
        None => each.map(|container| container.at("resources").unwrap_or(&Value::Null)).collect(),
    };
    let mut any = false;
    let mut guaranteed = true;
    for resources in all {
        for name in ["cpu", "memory"] {
            let read = |list: &str| {
                quantity(resources.at(list).and_then(|l| l.get(name))).filter(|amount| !amount.is_zero())
            };
            let (request, limit) = (read("requests"), read("limits"));
            any |= request.is_some() || limit.is_some();
            // A missing request is the limit.
            guaranteed &= limit.is_some() && request.is_none_or(|r| Some(r) == limit);
        }
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

/// `ResourceRequirements` of a container.
pub fn validate(at: &str, resources: Option<&Value>, errors: &mut Errors) {
    let Some(resources) = resources else { return };
    for list in ["limits", "requests"] {
        for (name, value) in resources.map_at(list).into_iter().flatten() {
            let path = field::key(&child(at, list), name);
            if quantity(Some(value)).is_some_and(|q| q.is_negative()) {
                errors.push(field::Error::invalid(path, value.clone(), "must be greater than or equal to 0"));
            } else if !name.contains('/')
                && !["cpu", "memory", "ephemeral-storage"].contains(&name.as_str())
                && !name.starts_with("hugepages-")
            {
                let detail = "must be a standard resource type or fully qualified";
                errors.push(field::Error::invalid(path, name.as_str(), detail));
            }
        }
    }
    requests_within_limits(at, resources, errors);
}

fn requests_within_limits(at: &str, resources: &Value, errors: &mut Errors) {
    for (name, value) in resources.map_at("requests").into_iter().flatten() {
        let limit = resources.at("limits").and_then(|l| l.get(name));
        if let (Some(request), Some(limit)) = (quantity(Some(value)), quantity(limit))
            && request > limit
        {
            let detail = format!("must be less than or equal to {name} limit of {limit}");
            errors.push(field::Error::invalid(child(at, "requests"), value.clone(), detail));
        }
    }
}

/// `resizePolicy` of a container that is restarted by `restarts`.
pub fn validate_policies(at: &str, container: &Value, restarts: &str, errors: &mut Errors) {
    let policies = container.list_at("resizePolicy");
    for (i, policy) in policies.iter().enumerate() {
        let (name, action) = (policy.str_at("resourceName"), policy.str_at("restartPolicy"));
        if policies[..i].iter().any(|p| p.str_at("resourceName") == name) {
            errors.push(field::Error::duplicate(index(at, i), name));
        }
        match name {
            "cpu" | "memory" => {}
            "" => errors.push(field::Error::required(at, "")),
            other => errors.push(field::Error::not_supported(at, other, &["cpu", "memory"])),
        }
        match action {
            "NotRequired" => {}
            "RestartContainer" if restarts == "Never" => {
                let detail = "must be 'NotRequired' when `restartPolicy` is 'Never'";
                errors.push(field::Error::invalid(at, action, detail));
            }
            "RestartContainer" => {}
            "" => errors.push(field::Error::required(at, "")),
            other => {
                errors.push(field::Error::not_supported(at, other, &["NotRequired", "RestartContainer"]));
            }
        }
    }
}

/// `spec.resources`: what the containers share. It covers what they ask for, and none may use more alone.
pub fn validate_pod_level(path: &str, spec: &Value, errors: &mut Errors) {
    let Some(resources) = spec.at("resources") else { return };
    let at = child(path, "resources");
    if !resources.list_at("claims").is_empty() {
        errors.push(field::Error::forbidden(
            child(&at, "claims"),
            "claims may not be set for Resources at pod-level",
        ));
    }
    for list in ["limits", "requests"] {
        for (name, value) in resources.map_at(list).into_iter().flatten() {
            let path = field::key(&child(&at, list), name);
            if !is_pod_level(name) {
                errors.push(field::Error::not_supported(
                    path,
                    name.as_str(),
                    &["cpu", "hugepages-", "memory"],
                ));
            } else if quantity(Some(value)).is_some_and(|q| q.is_negative()) {
                errors.push(field::Error::invalid(path, value.clone(), "must be greater than or equal to 0"));
            }
        }
    }
    requests_within_limits(&at, resources, errors);
    let pod = serde_json::json!({ "spec": { "containers": spec.list_at("containers"), "initContainers": spec.list_at("initContainers") } });
    let (requests, limits) = (quantities(resources.at("requests")), quantities(resources.at("limits")));
    for (name, sum) in total(&pod, "requests") {
        if let Some(request) = requests.get(&name).filter(|request| **request < sum) {
            let path = field::key(&child(&at, "requests"), &name);
            let detail = format!("must be greater than or equal to aggregate container requests of {sum}");
            errors.push(field::Error::invalid(path, request.to_string(), detail));
        }
    }
    for (i, container) in spec.list_at("containers").iter().enumerate() {
        for (name, limit) in quantities(container.at("resources").and_then(|r| r.at("limits"))) {
            if let Some(most) = limits.get(&name).filter(|most| **most < limit) {
                let own = format!("{}.resources.limits", index(&child(path, "containers"), i));
                let detail = format!("must be less than or equal to pod limits of {most}");
                errors.push(field::Error::invalid(field::key(&own, &name), limit.to_string(), detail));
            }
        }
    }
}

/// Requests and limits of the pod as a whole that follow from those of its containers (KEP-2837).
pub fn pod_level_defaults(spec: &mut Value) {
    let has = |spec: &Value, list: &str| {
        spec.at("resources").is_some_and(|r| r.map_at(list).is_some_and(|m| !m.is_empty()))
    };
    let (requested, limited) = (has(spec, "requests"), has(spec, "limits"));
    if !requested && !limited {
        return;
    }
    let pod = serde_json::json!({ "spec": { "containers": spec.list_at("containers"), "initContainers": spec.list_at("initContainers") } });
    let mut fill = |list: &str, name: &str, amount: String| {
        let path = format!("resources.{list}");
        if spec.at(&path).is_none_or(|have| have.get(name).is_none()) {
            let mut all = spec.map_at(&path).cloned().unwrap_or_default();
            all.insert(name.to_owned(), Value::String(amount));
            spec.set_at(&path, Value::Object(all));
        }
    };
    if limited {
        for (name, sum) in
            total(&pod, "requests").into_iter().filter(|(name, _)| matches!(name.as_str(), "cpu" | "memory"))
        {
            fill("requests", &name, sum.to_string());
        }
    }
    if requested && !limited {
        let everywhere = |name: &str| {
            let sidecars = pod.list_at("spec.initContainers").iter();
            pod.list_at("spec.containers").iter().chain(sidecars).all(|container| {
                container.at("resources").and_then(|r| r.at("limits")).is_some_and(|l| l.get(name).is_some())
            })
        };
        for (name, sum) in total(&pod, "limits") {
            if matches!(name.as_str(), "cpu" | "memory") && everywhere(&name) {
                fill("limits", &name, sum.to_string());
            }
        }
    }
}

// ---- resize ----

/// Lists of containers whose resources may be resized.
const LISTS: [&str; 2] = ["containers", "initContainers"];

/// Only resources and their policies get through; containers added, taken away, moved or renamed are left for
/// validation to refuse.
fn keep_all_but_resources(new: &mut Value, old: &Value) {
    let same = LISTS.iter().all(|list| {
        let path = format!("spec.{list}");
        let names = |pod: &Value| -> Vec<String> {
            pod.list_at(&path).iter().map(|c| c.str_at("name").to_owned()).collect()
        };
        names(new) == names(old)
    });
    if !same {
        return;
    }
    let wanted = new.remove_at("spec").unwrap_or_default();
    for part in ["metadata", "spec", "status"] {
        keep(new, old, part);
    }
    match wanted.at("resources") {
        Some(resources) => new.set_at("spec.resources", resources.clone()),
        None => drop(new.remove_at("spec.resources")),
    }
    for list in LISTS {
        let containers =
            new.get_mut("spec").and_then(|spec| spec.get_mut(list)).and_then(Value::as_array_mut);
        for (container, wanted) in containers.into_iter().flatten().zip(wanted.list_at(list)) {
            keep(container, wanted, "resources");
            keep(container, wanted, "resizePolicy");
        }
    }
}

const ONLY: &str = "only cpu and memory resources are mutable";

fn validate_resize(new: &Value, old: &Value, errors: &mut Errors) {
    pod_spec("spec", new.at("spec").unwrap_or(&Value::Null), errors);
    let mirror =
        old.at("metadata.annotations").is_some_and(|a| a.get("kubernetes.io/config.mirror").is_some());
    for (refused, why) in [
        (mirror, "static pods cannot be resized"),
        (old.str_at("spec.os.name") == "windows", "windows pods cannot be resized"),
    ] {
        if refused {
            *errors = vec![field::Error::forbidden("", why)];
            return;
        }
    }
    let class = match old.str_at("status.qosClass") {
        "" => qos_class(old),
        class => class,
    };
    if class != qos_class(new) {
        let detail = "Pod QOS Class may not change as a result of resizing";
        errors.push(field::Error::invalid("spec", class, detail));
    }
    // A node that does not tell what its containers have cannot change it.
    let running = old.list_at("status.containerStatuses").iter().find(|c| c.at("state.running").is_some());
    if running.is_some_and(|container| container.at("resources").is_none()) {
        errors.push(field::Error::forbidden("spec", "Pod running on node without support for resize"));
    }
    let mut same = new.at("spec").cloned().unwrap_or_default();
    let before = old.at("spec").unwrap_or(&Value::Null);
    pod_level_resize(&mut same, before, errors);
    if !old.list_at("status.nodeAllocatableResourceClaimStatuses").is_empty() {
        let detail = "pods with node allocatable resource claims cannot be resized";
        errors.push(field::Error::forbidden("spec", detail));
    }
    if !same_containers(&same, before, errors) {
        return;
    }
    for list in LISTS {
        let containers = same.get_mut(list).and_then(Value::as_array_mut);
        for (i, (container, old)) in containers.into_iter().flatten().zip(before.list_at(list)).enumerate() {
            resize_container(&index(&format!("spec.{list}"), i), list, container, old, errors);
        }
    }
    if errors.is_empty() && same != *before {
        errors.push(field::Error::forbidden("spec", ONLY));
    }
}

/// Containers are neither added nor taken away, and stay in their order.
fn same_containers(new: &Value, old: &Value, errors: &mut Errors) -> bool {
    let before = errors.len();
    for list in LISTS {
        let (news, olds) = (new.list_at(list), old.list_at(list));
        if news.len() != olds.len() {
            let detail = format!("{list} may not be added or removed on resize");
            errors.push(field::Error::forbidden(format!("spec.{list}"), detail));
            continue;
        }
        for (i, _) in
            news.iter().zip(olds).enumerate().filter(|(_, (n, o))| n.str_at("name") != o.str_at("name"))
        {
            let detail = format!("{list} may not be renamed or reordered on resize");
            errors.push(field::Error::forbidden(child(&index(&format!("spec.{list}"), i), "name"), detail));
        }
    }
    errors.len() == before
}

/// Leaves of the container what may not differ from the old one.
fn resize_container(at: &str, list: &str, container: &mut Value, old: &Value, errors: &mut Errors) {
    let resized = container != old;
    nothing_removed(&child(at, "resources"), "resource", container, old, errors);
    keep_cpu_and_memory(container, old);
    forget_default_policies(container, old);
    if list == "containers" {
        if container != old {
            errors.push(field::Error::forbidden("spec", ONLY));
        }
        return;
    }
    if container != old {
        let detail = "only cpu and memory resources for init or sidecar containers are mutable";
        errors.push(field::Error::forbidden(at, detail));
    }
    let restarts = |policy: &Value| policy.str_at("restartPolicy") == "RestartContainer";
    if resized && !is_sidecar(old) && container.list_at("resizePolicy").iter().any(restarts) {
        let detail = "non-sidecar init containers with a resize policy of RestartContainer cannot be resized";
        errors.push(field::Error::forbidden(at, detail));
    }
}

/// A resource asked for anew gets a default policy; others stay as they are.
fn forget_default_policies(container: &mut Value, old: &Value) {
    let known: Vec<&str> = old.list_at("resizePolicy").iter().map(|p| p.str_at("resourceName")).collect();
    let Some(policies) = container.get_mut("resizePolicy").and_then(Value::as_array_mut) else { return };
    policies.retain(|policy| {
        known.contains(&policy.str_at("resourceName")) || policy.str_at("restartPolicy") != "NotRequired"
    });
    if policies.is_empty() && old.at("resizePolicy").is_none() {
        container.remove_at("resizePolicy");
    }
}

fn pod_level_resize(new: &mut Value, old: &Value, errors: &mut Errors) {
    if old.at("resources").is_some() && new.at("resources").is_none() {
        errors.push(field::Error::forbidden("spec.resources", "pod-level resources cannot be removed"));
        return;
    }
    nothing_removed("spec.resources", "pod-level resource", new, old, errors);
    keep_cpu_and_memory(new, old);
    if new.at("resources") != old.at("resources") {
        let detail = "only cpu and memory resources are mutable at pod-level";
        errors.push(field::Error::forbidden("spec", detail));
    }
}

fn nothing_removed(at: &str, what: &str, new: &Value, old: &Value, errors: &mut Errors) {
    for list in ["requests", "limits"] {
        let has = |holder: &Value, name: &str| {
            holder.at("resources").and_then(|r| r.at(list)).is_some_and(|l| l.get(name).is_some())
        };
        let had = old.at("resources").and_then(|r| r.map_at(list));
        if had.into_iter().flatten().any(|(name, _)| !has(new, name)) {
            let detail = format!("{what} {list} cannot be removed");
            errors.push(field::Error::forbidden(child(at, list), detail));
        }
    }
}

/// What is left of a change after those that are allowed.
fn keep_cpu_and_memory(new: &mut Value, old: &Value) {
    for list in ["requests", "limits"] {
        for name in ["cpu", "memory"] {
            keep(new, old, &format!("resources.{list}.{name}"));
        }
        let path = format!("resources.{list}");
        if new.map_at(&path).is_some_and(|m| m.is_empty()) && old.at(&path).is_none() {
            new.remove_at(&path);
        }
    }
    if new.map_at("resources").is_some_and(|m| m.is_empty()) && old.at("resources").is_none() {
        new.remove_at("resources");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn quality_of_service_follows_requests_and_limits() {
        let class = |resources: Value| qos_class(&json!({"spec":{"containers":[{"resources":resources}]}}));
        assert_eq!(class(json!({})), "BestEffort");
        assert_eq!(class(json!({"requests":{"cpu":"1"}})), "Burstable");
        let whole = json!({"limits":{"cpu":"1","memory":"1Gi"},"requests":{"cpu":"1","memory":"1Gi"}});
        assert_eq!(class(whole.clone()), "Guaranteed");
        assert_eq!(qos_class(&json!({"spec":{"resources": whole, "containers":[{}]}})), "Guaranteed");
    }

    #[test]
    fn totals_count_sidecars_beside_the_init_containers_after_them() {
        let needs = |cpu: &str| json!({"requests": {"cpu": cpu}});
        let pod = json!({"spec": {
            "containers": [{"resources": needs("1")}, {"resources": needs("500m")}],
            "initContainers": [{"restartPolicy": "Always", "resources": needs("1")}, {"resources": needs("2")}],
            "overhead": {"cpu": "100m"}}});
        assert_eq!(total(&pod, "requests")["cpu"].to_string(), "3100m");
    }

    #[test]
    fn a_pod_being_resized_holds_the_most_of_what_it_wants_and_has() {
        let mut pod = json!({"spec": {"containers": [{"name": "a", "resources": {"requests": {"cpu": "1"}}}]},
            "status": {"containerStatuses": [{"name": "a", "allocatedResources": {"cpu": "2"}}]}});
        assert_eq!(held_requests(&pod)["cpu"].to_string(), "2");
        pod.set_at("spec.containers", json!([{"name": "a", "resources": {"requests": {"cpu": "3"}}}]));
        assert_eq!(held_requests(&pod)["cpu"].to_string(), "3");
        pod.set_at("status.conditions", json!([{"type": "PodResizePending", "reason": "Infeasible"}]));
        assert_eq!(held_requests(&pod)["cpu"].to_string(), "2", "what can never be given is not held");
    }
}
