//! LimitRange: defaults for what a container does not say, and bounds for what it says.

use knarr_api::kinds::core::quantity;
use knarr_api::object::Object;
use knarr_api::quantity::Quantity;
use knarr_api::status::{Result, Status};
use serde_json::{Value, json};

use crate::admission::{Attributes, Operation};

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
    if is_new(a, "pods") {
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
                match find(&requests, &name) {
                    None => broken.push(format!("{about}.  No request is specified")),
                    Some(have) if have > most => broken.push(format!("{about}, but request is {have}")),
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

type List = Vec<(String, Quantity)>;

fn quantities(map: Option<&Value>) -> List {
    let entries = map.and_then(Value::as_object).into_iter().flatten();
    entries.filter_map(|(name, value)| Some((name.clone(), quantity(Some(value))?))).collect()
}

fn lists(resources: &Value) -> (List, List) {
    (quantities(resources.at("requests")), quantities(resources.at("limits")))
}

fn find(list: &List, name: &str) -> Option<Quantity> {
    list.iter().find(|(n, _)| n == name).map(|(_, q)| *q)
}

/// What a pod asks for in all: its containers together, or its greediest init container.
pub fn total(pod: &Value, list: &str) -> Vec<(String, Quantity)> {
    let of = |container: &Value| quantities(container.at("resources").and_then(|r| r.at(list)));
    let mut names: Vec<String> = Vec::new();
    let mut sums: Vec<Quantity> = Vec::new();
    let mut add = |name: &str, value: Quantity, largest: bool| match names.iter().position(|n| n == name) {
        Some(at) if largest => sums[at] = sums[at].max(value),
        Some(at) => sums[at] = sums[at] + value,
        None => {
            names.push(name.to_owned());
            sums.push(value);
        }
    };
    let sidecar = |c: &&Value| c.str_at("restartPolicy") == "Always";
    let (init, main) = (pod.list_at("spec.initContainers"), pod.list_at("spec.containers"));
    for container in main.iter().chain(init.iter().filter(sidecar)) {
        of(container).iter().for_each(|(name, value)| add(name, *value, false));
    }
    for container in init.iter().filter(|c| !sidecar(c)) {
        of(container).iter().for_each(|(name, value)| add(name, *value, true));
    }
    let limited = names.clone();
    for (name, value) in quantities(pod.at("spec.overhead")) {
        match names.iter().position(|n| *n == name) {
            Some(at) => sums[at] = sums[at] + value,
            None if list == "requests" || limited.contains(&name) => {
                names.push(name);
                sums.push(value);
            }
            None => {}
        }
    }
    names.into_iter().zip(sums).collect()
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
    match (find(requests, name), find(limits, name)) {
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
        match (find(limits, &name), find(requests, &name)) {
            (None, _) => broken.push(format!("{about}.  No limit is specified")),
            (Some(have), _) if have > most => broken.push(format!("{about}, but limit is {have}")),
            (_, Some(have)) if have > most => broken.push(format!("{about}, but request is {have}")),
            _ => {}
        }
    }
    for (name, most) in quantities(item.at("maxLimitRequestRatio")) {
        let about = format!("{name} max limit to request ratio per {kind} is {most}");
        let nonzero = |list: &List| find(list, &name).filter(|q| !q.is_zero());
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
