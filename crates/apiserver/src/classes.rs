//! Classes at admission: the default storage and ingress class, and what a runtime class adds to a pod.

use std::sync::Arc;

use knarr_api::object::Object;
use knarr_api::status::{Result, Status};
use serde_json::{Value, json};

use crate::admission::{Attributes, Operation};

fn is_new(a: &Attributes, resource: &str) -> bool {
    a.operation == Operation::Create && a.place.kind.resource() == resource
}

/// The class marked as default; the newest, where several are.
fn default_class(a: &Attributes, partition: &str, annotations: &[&str]) -> Option<String> {
    let is_default = |class: &Arc<Value>| {
        let marks = class.map_at("metadata.annotations");
        annotations.iter().any(|name| marks.and_then(|m| m.get(*name)).is_some_and(|v| v == "true"))
    };
    let mut defaults = a.registry.policies(partition, "");
    defaults.retain(is_default);
    defaults.sort_by_key(|c| {
        (std::cmp::Reverse(c.str_at("metadata.creationTimestamp").to_owned()), c.name().to_owned())
    });
    defaults.first().map(|c| c.name().to_owned())
}

/// A claim that names no class gets the default one.
pub fn default_storage_class(a: &Attributes, claim: &mut Value) -> Result<()> {
    const BETA: &str = "volume.beta.kubernetes.io/storage-class";
    let named = claim.at("spec.storageClassName").is_some()
        || claim.map_at("metadata.annotations").is_some_and(|m| m.contains_key(BETA));
    if !is_new(a, "persistentvolumeclaims") || named {
        return Ok(());
    }
    let marks =
        ["storageclass.kubernetes.io/is-default-class", "storageclass.beta.kubernetes.io/is-default-class"];
    if let Some(class) = default_class(a, "storageclasses.storage.k8s.io", &marks) {
        claim.set_at("spec.storageClassName", class);
    }
    Ok(())
}

/// An Ingress that names no class gets the default one.
pub fn default_ingress_class(a: &Attributes, ingress: &mut Value) -> Result<()> {
    const OLD: &str = "kubernetes.io/ingress.class";
    let named = ingress.at("spec.ingressClassName").is_some()
        || ingress.map_at("metadata.annotations").is_some_and(|m| m.contains_key(OLD));
    if !is_new(a, "ingresses.networking.k8s.io") || named {
        return Ok(());
    }
    let marks = ["ingressclass.kubernetes.io/is-default-class"];
    if let Some(class) = default_class(a, "ingressclasses.networking.k8s.io", &marks) {
        ingress.set_at("spec.ingressClassName", class);
    }
    Ok(())
}

/// Overhead, node selector and tolerations of the pod's runtime class.
pub fn runtime_class(a: &Attributes, pod: &mut Value) -> Result<()> {
    if !is_new(a, "pods") {
        return Ok(());
    }
    let refuse = |pod: &Value, why: String| {
        Err(Status::forbidden(a.place.kind, pod.name(), format!("pod rejected: {why}")))
    };
    let Some(name) = pod.at("spec.runtimeClassName").and_then(Value::as_str).map(str::to_owned) else {
        if pod.map_at("spec.overhead").is_some_and(|o| !o.is_empty()) {
            return refuse(
                pod,
                "Pod Overhead set without corresponding RuntimeClass defined Overhead".into(),
            );
        }
        return Ok(());
    };
    let Some(class) = a.registry.policy("runtimeclasses.node.k8s.io", "", &name) else {
        return refuse(pod, format!("RuntimeClass {name:?} not found"));
    };
    match (class.at("overhead.podFixed"), pod.at("spec.overhead")) {
        (Some(fixed), None) => {
            let fixed = fixed.clone();
            pod.set_at("spec.overhead", fixed);
        }
        (fixed, Some(own)) if fixed != Some(own) => {
            return refuse(pod, "Pod's Overhead doesn't match RuntimeClass's defined Overhead".into());
        }
        _ => {}
    }
    let mut selector = pod.map_at("spec.nodeSelector").cloned().unwrap_or_default();
    for (key, value) in class.map_at("scheduling.nodeSelector").into_iter().flatten() {
        match selector.get(key).filter(|own| *own != value) {
            Some(own) => {
                let (class, own) = (value.as_str().unwrap_or_default(), own.as_str().unwrap_or_default());
                return refuse(
                    pod,
                    format!(
                        "conflict: runtimeClass.scheduling.nodeSelector[{key}] = {class}; pod.spec.nodeSelector[{key}] = {own}"
                    ),
                );
            }
            None => drop(selector.insert(key.clone(), value.clone())),
        }
    }
    if !selector.is_empty() {
        pod.set_at("spec.nodeSelector", Value::Object(selector));
    }
    let mut tolerations = pod.list_at("spec.tolerations").to_vec();
    for toleration in class.list_at("scheduling.tolerations") {
        if !tolerations.contains(toleration) {
            tolerations.push(toleration.clone());
        }
    }
    if !tolerations.is_empty() {
        pod.set_at("spec.tolerations", json!(tolerations));
    }
    Ok(())
}
