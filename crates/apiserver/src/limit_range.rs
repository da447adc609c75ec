//! LimitRange: defaults for what a container does not say, and bounds for what it says.

use knarr_api::kinds::resources::{List, quantities, total};
use knarr_api::object::Object;
use knarr_api::quantity::Quantity;
use knarr_api::status::{Result, Status};
use serde_json::{Value, json};

use crate::admission::{Attributes, Operation};
use crate::registry::Endpoint;

/// The items of all limit ranges of the namespace, by upstream's order of names.
fn items(a: &Attributes) -> Vec<Value> {
    if a.place.namespace.is_empty() {
        return Vec::new();
    }
    let ranges = a.registry.policies("limitranges", a.place.namespace);
    ranges.iter().flat_map(|range| range.list_at("spec.limits").to_vec()).collect()
}

fn is_new(a: &Attributes, resource: &str) -> bool {
    a.operation == Operation::Create && a.place.kind.resource() == resource
}

/// Resources of pods are looked at when they are written: at creation, and by a resize.
fn sets_resources(a: &Attributes) -> bool {
    is_new(a, "pods") || a.endpoint == Endpoint::Other("resize")
}

const CONTAINERS: [&str; 2] = ["containers", "initContainers"];

/// Fills in requests and limits, and tells so in an annotation.
pub fn apply_defaults(a: &Attributes, pod: &mut Value) -> Result<()> {
    if !is_new(a, "pods") {
        return Ok(());
    }
    let mut set = Vec::new();
    for item in items(a).iter().filter(|i| i.str_at("type") == "Container") {
        for list in CONTAINERS {
            let containers = pod.get_mut("spec").and_then(|s| s.get_mut(list)).and_then(Value::as_array_mut);
            for container in containers.into_iter().flatten() {
                set.extend(default_container(container, item));
            }
        }
    }
    if !set.is_empty() {
        let mut annotations = pod.map_at("metadata.annotations").cloned().unwrap_or_default();
        annotations.insert(
            "kubernetes.io/limit-ranger".into(),
            json!(format!("LimitRanger plugin set: {}", set.join("; "))),
        );
        pod.set_at("metadata.annotations", Value::Object(annotations));
    }
    Ok(())
}

fn default_container(container: &mut Value, item: &Value) -> Vec<String> {
    let mut set = Vec::new();
    // A request that is not given is the limit that is, before it is the default.
    let given = container.map_at("resources.limits").cloned().unwrap_or_default();
    for (list, defaults, word) in [("requests", "defaultRequest", "request"), ("limits", "default", "limit")]
    {
        let mut have = container.map_at(&format!("resources.{list}")).cloned().unwrap_or_default();
        let mut added = Vec::new();
        for (name, value) in item.map_at(defaults).into_iter().flatten() {
            let said = have.contains_key(name) || (list == "requests" && given.contains_key(name));
            if !said {
                have.insert(name.clone(), value.clone());
                added.push(name.clone());
            }
        }
        if !added.is_empty() {
            container.set_at(&format!("resources.{list}"), Value::Object(have));
            set.push(format!("{} {word} for container {}", added.join(", "), container.str_at("name")));
        }
    }
    set
}

/// Refuses what is out of bounds; every broken bound is told.
pub fn check(a: &Attributes, object: &Value) -> Result<()> {
    let mut broken = Vec::new();
    if sets_resources(a) {
        for item in items(a) {
            match item.str_at("type") {
                "Container" => {
                    for container in CONTAINERS.iter().flat_map(|l| object["spec"].list_at(l)) {
                        let (requests, limits) = lists(container.at("resources").unwrap_or(&Value::Null));
                        bounds(&item, "Container", &requests, &limits, &mut broken);
                    }
                }
                "Pod" => {
                    let requests = total(object, "requests");
                    let limits = total(object, "limits");
                    bounds(&item, "Pod", &requests, &limits, &mut broken);
                }
                _ => {}
            }
        }
    } else if a.place.kind.resource() == "persistentvolumeclaims" && a.operation != Operation::Delete {
        for item in items(a).iter().filter(|i| i.str_at("type") == "PersistentVolumeClaim") {
            let (requests, _) = lists(object.at("spec.resources").unwrap_or(&Value::Null));
            for (name, least) in quantities(item.at("min")) {
                minimum("PersistentVolumeClaim", &name, least, &requests, &List::new(), &mut broken);
            }
            for (name, most) in quantities(item.at("max")) {
                let about = format!("maximum {name} usage per PersistentVolumeClaim is {most}");
                match requests.get(&name) {
                    None => broken.push(format!("{about}.  No request is specified")),
                    Some(have) if *have > most => broken.push(format!("{about}, but request is {have}")),
                    Some(_) => {}
                }
            }
        }
    }
    let text = match &broken[..] {
        [] => return Ok(()),
        [one] => one.clone(),
        many => format!("[{}]", many.join(", ")),
    };
    let name = if a.place.name.is_empty() { object.name() } else { a.place.name };
    Err(Status::forbidden(a.place.kind, name, text))
}

fn lists(resources: &Value) -> (List, List) {
    (quantities(resources.at("requests")), quantities(resources.at("limits")))
}

fn minimum(
    kind: &str,
    name: &str,
    least: Quantity,
    requests: &List,
    limits: &List,
    broken: &mut Vec<String>,
) {
    let about = format!("minimum {name} usage per {kind} is {least}");
    match (requests.get(name).copied(), limits.get(name).copied()) {
        (None, _) => broken.push(format!("{about}.  No request is specified")),
        (Some(have), _) if have < least => broken.push(format!("{about}, but request is {have}")),
        (_, Some(have)) if have < least => broken.push(format!("{about}, but limit is {have}")),
        _ => {}
    }
}

fn bounds(item: &Value, kind: &str, requests: &List, limits: &List, broken: &mut Vec<String>) {
    for (name, least) in quantities(item.at("min")) {
        minimum(kind, &name, least, requests, limits, broken);
    }
    for (name, most) in quantities(item.at("max")) {
        let about = format!("maximum {name} usage per {kind} is {most}");
        match (limits.get(&name).copied(), requests.get(&name).copied()) {
            (None, _) => broken.push(format!("{about}.  No limit is specified")),
            (Some(have), _) if have > most => broken.push(format!("{about}, but limit is {have}")),
            (_, Some(have)) if have > most => broken.push(format!("{about}, but request is {have}")),
            _ => {}
        }
    }
    for (name, most) in quantities(item.at("maxLimitRequestRatio")) {
        let about = format!("{name} max limit to request ratio per {kind} is {most}");
        let nonzero = |list: &List| list.get(&name).copied().filter(|q| !q.is_zero());
        match (nonzero(requests), nonzero(limits)) {
            (None, _) => broken.push(format!("{about}, but no request is specified or request is 0")),
            (_, None) => broken.push(format!("{about}, but no limit is specified or limit is 0")),
            (Some(request), Some(limit)) => {
                let ratio = limit.as_f64() / request.as_f64();
                if ratio > most.as_f64() {
                    broken.push(format!("{about}, but provided ratio is {ratio:.6}"));
                }
            }
        }
    }
}
