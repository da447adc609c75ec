//! Defaulting: what upstream fills in before an object is validated and stored.
//!
//! Static defaults stand in the tables beside their field. The few that depend on other fields are the
//! rules below, one function a type, run before the type's static defaults. A rule sees one value and
//! must be idempotent: defaulting twice changes nothing.

use std::sync::LazyLock;

use regex::Regex;
use serde_json::{Map, Value, json};

use crate::object::Object;
use crate::schema::{Schema, Shape, TypeId};

/// Fills in every default of the type, in place.
pub fn apply(schema: &Schema, type_id: TypeId, value: &mut Value) {
    let Value::Object(map) = value else { return };
    let structure = schema.type_of(type_id);
    if let Some((_, rule)) = RULES.iter().find(|(name, _)| *name == structure.full) {
        rule(map);
    }
    for field in &structure.fields {
        if let Some(default) = &field.default {
            let absent = match map.get(&field.name) {
                None => true,
                Some(value) => default.replaces_zero && is_zero(value),
            };
            if absent {
                map.insert(field.name.clone(), default.value.clone());
            }
        }
        if let Some(value) = map.get_mut(&field.name) {
            descend(schema, &field.shape, value);
        }
    }
}

fn descend(schema: &Schema, shape: &Shape, value: &mut Value) {
    match (shape, value) {
        (Shape::Object(id), value) => apply(schema, *id, value),
        (Shape::List(inner), Value::Array(items)) if inner.object_type().is_some() => {
            items.iter_mut().for_each(|item| descend(schema, inner, item));
        }
        (Shape::Map(inner), Value::Object(map)) if inner.object_type().is_some() => {
            map.values_mut().for_each(|item| descend(schema, inner, item));
        }
        _ => {}
    }
}

fn is_zero(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(s) => s.is_empty(),
        Value::Number(n) => n.as_i64() == Some(0),
        _ => false,
    }
}

type Rule = fn(&mut Map<String, Value>);

/// Defaults that depend on other fields, by qualified type.
const RULES: &[(&str, Rule)] = &[
    ("core.v1.Pod", pod),
    ("core.v1.PodSpec", pod_spec),
    ("core.v1.Container", container),
    ("core.v1.EphemeralContainer", container),
    ("core.v1.Volume", volume),
    ("core.v1.ServiceSpec", service_spec),
    ("core.v1.ServicePort", service_port),
    ("core.v1.Namespace", namespace),
    ("core.v1.Node", node),
    ("core.v1.ReplicationController", replication_controller),
    ("core.v1.NodeSpec", node_spec),
    ("core.v1.LimitRangeItem", limit_range_item),
    ("apiextensions.v1.CustomResourceDefinitionNames", custom_names),
    ("apps.v1.DeploymentStrategy", rolling_update),
    ("apps.v1.DaemonSetUpdateStrategy", rolling_update),
    ("apps.v1.StatefulSetUpdateStrategy", rolling_update),
    ("apps.v1.StatefulSetSpec", stateful_set_spec),
    ("autoscaling.v2.HorizontalPodAutoscalerSpec", autoscaler_spec),
    ("batch.v1.Job", job),
    ("batch.v1.JobSpec", job_spec),
    ("networking.v1.NetworkPolicySpec", network_policy_spec),
    ("rbac.v1.Subject", subject),
];

fn set(map: &mut Map<String, Value>, name: &str, value: impl Into<Value>) {
    let slot = map.entry(name).or_insert(Value::Null);
    if is_zero(slot) && !slot.is_number() {
        *slot = value.into();
    }
}

fn pod(map: &mut Map<String, Value>) {
    // Go has a spec even where nobody gave one.
    let Value::Object(spec) = map.entry("spec").or_insert_with(|| json!({})) else { return };
    set(spec, "enableServiceLinks", true);
    for list in ["containers", "initContainers"] {
        let Some(Value::Array(containers)) = spec.get_mut(list) else { continue };
        containers.iter_mut().for_each(requests_from_limits);
    }
    // Pod-level resources follow the same rule (KEP-2837).
    if spec.contains_key("resources") {
        let mut shell = json!({ "resources": spec.remove("resources") });
        // First what its containers ask for, then its own limits.
        shell["containers"] = spec.get("containers").cloned().unwrap_or_default();
        shell["initContainers"] = spec.get("initContainers").cloned().unwrap_or_default();
        crate::kinds::resources::pod_level_defaults(&mut shell);
        requests_from_limits(&mut shell);
        spec.insert("resources".into(), shell["resources"].take());
    }
}

/// A limit without a request is the request too.
fn requests_from_limits(container: &mut Value) {
    let Some(Value::Object(resources)) = container.get_mut("resources") else { return };
    let Some(Value::Object(limits)) = resources.get("limits").cloned() else { return };
    let requests = resources.entry("requests").or_insert_with(|| json!({}));
    let Value::Object(requests) = requests else { return };
    for (name, limit) in limits {
        requests.entry(name).or_insert(limit);
    }
}

fn pod_spec(map: &mut Map<String, Value>) {
    if map.get("hostNetwork") == Some(&Value::Bool(true)) {
        for list in ["containers", "initContainers"] {
            host_network_ports(map.get_mut(list));
        }
    }
    mirror(map, "serviceAccount", "serviceAccountName");
}

/// `serviceAccount` is the deprecated name of `serviceAccountName`; upstream keeps both equal.
fn mirror(map: &mut Map<String, Value>, old: &str, new: &str) {
    match (map.get(old).cloned(), map.get(new).cloned()) {
        (_, Some(value)) => map.insert(old.to_owned(), value),
        (Some(value), None) => map.insert(new.to_owned(), value),
        (None, None) => None,
    };
}

fn host_network_ports(containers: Option<&mut Value>) {
    for container in containers.and_then(Value::as_array_mut).into_iter().flatten() {
        for port in container.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
            if let (Some(number), Value::Object(port)) = (port.get("containerPort").cloned(), port) {
                port.entry("hostPort").or_insert(number);
            }
        }
    }
}

fn container(map: &mut Map<String, Value>) {
    if map.get("imagePullPolicy").is_none_or(is_zero) {
        let image = map.get("image").and_then(Value::as_str).unwrap_or_default();
        map.insert("imagePullPolicy".into(), pull_policy(image).into());
    }
}

/// `Always` for `:latest` and untagged images, else `IfNotPresent`.
fn pull_policy(image: &str) -> &'static str {
    if !is_reference(image) {
        return "IfNotPresent";
    }
    let name = image.rsplit('/').next().unwrap_or(image);
    let latest = match (name.contains('@'), name.split_once(':')) {
        (true, _) => false,
        (false, Some((_, tag))) => tag == "latest",
        (false, None) => true,
    };
    if latest { "Always" } else { "IfNotPresent" }
}

/// A name an image can have: what upstream cannot parse it takes to have a tag.
fn is_reference(image: &str) -> bool {
    static REFERENCE: LazyLock<Regex> = LazyLock::new(|| {
        let part = "[a-z0-9]+(?:(?:[._]|__|[-]+)[a-z0-9]+)*";
        let host = "(?:[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?|\\[[a-fA-F0-9:]+\\])(?::[0-9]+)?";
        let text = format!(
            "^(?:{host}/)?{part}(?:/{part})*(?::[a-zA-Z0-9_][a-zA-Z0-9_.-]{{0,127}})?(?:@[a-zA-Z0-9+._-]+:[0-9a-fA-F]{{2,}})?$"
        );
        Regex::new(&text).expect("a constant pattern compiles")
    });
    image.len() <= 255 && REFERENCE.is_match(image)
}

/// A volume without a source is an `emptyDir`.
fn volume(map: &mut Map<String, Value>) {
    if map.keys().all(|k| k == "name") {
        map.insert("emptyDir".into(), json!({}));
    }
}

fn service_spec(map: &mut Map<String, Value>) {
    let kind = map.get("type").and_then(Value::as_str).unwrap_or("ClusterIP").to_owned();
    if map.get("sessionAffinity").and_then(Value::as_str) == Some("ClientIP") {
        let config = map.entry("sessionAffinityConfig").or_insert_with(|| json!({}));
        let timeout = config.get("clientIP").and_then(|c| c.get("timeoutSeconds"));
        if timeout.is_none() && config.is_object() {
            config["clientIP"] = json!({ "timeoutSeconds": 10_800 });
        }
    } else if map.get("sessionAffinity").and_then(Value::as_str).is_none_or(|s| s == "None") {
        map.remove("sessionAffinityConfig");
    }
    if matches!(kind.as_str(), "NodePort" | "LoadBalancer") {
        set(map, "externalTrafficPolicy", "Cluster");
    }
    if kind != "ExternalName" {
        set(map, "internalTrafficPolicy", "Cluster");
    }
    if kind == "LoadBalancer" {
        map.entry("allocateLoadBalancerNodePorts").or_insert(Value::Bool(true));
    }
}

fn service_port(map: &mut Map<String, Value>) {
    if map.get("targetPort").is_none_or(is_zero)
        && let Some(port) = map.get("port").cloned()
    {
        map.insert("targetPort".into(), port);
    }
}

/// Every namespace carries its name as a label, so that selectors can pick it.
fn namespace(map: &mut Map<String, Value>) {
    let Some(Value::Object(metadata)) = map.get_mut("metadata") else { return };
    let Some(name) = metadata.get("name").filter(|n| !is_zero(n)).cloned() else { return };
    let labels = metadata.entry("labels").or_insert_with(|| json!({}));
    if let Value::Object(labels) = labels {
        labels.insert("kubernetes.io/metadata.name".into(), name);
    }
}

fn node(map: &mut Map<String, Value>) {
    let Some(Value::Object(status)) = map.get_mut("status") else { return };
    if let (None, Some(capacity)) = (status.get("allocatable"), status.get("capacity").cloned()) {
        status.insert("allocatable".into(), capacity);
    }
}

/// Labels and selector default to the template's labels.
fn replication_controller(map: &mut Map<String, Value>) {
    let object = Value::Object(std::mem::take(map));
    let labels = object.at("spec.template.metadata.labels").cloned();
    let Value::Object(mut object) = object else { return };
    if let Some(labels) = labels {
        if let Some(Value::Object(spec)) = object.get_mut("spec") {
            spec.entry("selector").or_insert_with(|| labels.clone());
        }
        default_labels(&mut object, labels);
    }
    *map = object;
}

fn default_labels(object: &mut Map<String, Value>, labels: Value) {
    let metadata = object.entry("metadata").or_insert_with(|| json!({}));
    if let Value::Object(metadata) = metadata {
        metadata.entry("labels").or_insert(labels);
    }
}

/// `default` falls back to `max`, `defaultRequest` to `default`, then to `min`; for containers only.
fn limit_range_item(map: &mut Map<String, Value>) {
    if map.get("type").and_then(Value::as_str) != Some("Container") {
        return;
    }
    let take = |map: &Map<String, Value>, name: &str| -> Map<String, Value> {
        map.get(name).and_then(Value::as_object).cloned().unwrap_or_default()
    };
    let (max, min) = (take(map, "max"), take(map, "min"));
    let mut limits = take(map, "default");
    for (name, value) in max {
        limits.entry(name).or_insert(value);
    }
    let mut requests = take(map, "defaultRequest");
    for (name, value) in limits.iter().chain(&min) {
        requests.entry(name).or_insert(value.clone());
    }
    for (name, values) in [("default", limits), ("defaultRequest", requests)] {
        if !values.is_empty() {
            map.insert(name.into(), Value::Object(values));
        }
    }
}

/// `podCIDR` is the first of `podCIDRs`; either brings the other.
fn node_spec(map: &mut Map<String, Value>) {
    let first = map.get("podCIDRs").and_then(|list| list.get(0)).cloned();
    match (map.get("podCIDR").filter(|c| !is_zero(c)).cloned(), first) {
        (Some(one), None) => map.insert("podCIDRs".into(), json!([one])),
        (None, Some(first)) => map.insert("podCIDR".into(), first),
        _ => None,
    };
}

/// Claims in a StatefulSet say what they are, and that they are not bound.
fn stateful_set_spec(map: &mut Map<String, Value>) {
    for claim in map.get_mut("volumeClaimTemplates").and_then(Value::as_array_mut).into_iter().flatten() {
        let Value::Object(claim) = claim else { continue };
        set(claim, "apiVersion", "v1");
        set(claim, "kind", "PersistentVolumeClaim");
        let status = claim.entry("status").or_insert_with(|| json!({}));
        if let Value::Object(status) = status {
            set(status, "phase", "Pending");
        }
    }
}

/// `singular` and `listKind` follow from `kind`.
fn custom_names(map: &mut Map<String, Value>) {
    let kind = map.get("kind").and_then(Value::as_str).unwrap_or_default().to_owned();
    if !kind.is_empty() {
        set(map, "singular", kind.to_lowercase());
        set(map, "listKind", format!("{kind}List"));
    }
}

/// A behaviour that says something about one direction gets upstream's defaults for the rest.
fn autoscaler_spec(map: &mut Map<String, Value>) {
    if map.get("metrics").and_then(Value::as_array).is_none_or(Vec::is_empty) {
        let metric = json!([{ "type": "Resource", "resource": { "name": "cpu",
            "target": { "type": "Utilization", "averageUtilization": 80 } } }]);
        map.insert("metrics".into(), metric);
    }
    let Some(Value::Object(behavior)) = map.get_mut("behavior") else { return };
    let up = json!({ "stabilizationWindowSeconds": 0, "selectPolicy": "Max", "policies": [
        { "type": "Pods", "value": 4, "periodSeconds": 15 },
        { "type": "Percent", "value": 100, "periodSeconds": 15 } ] });
    let down = json!({ "selectPolicy": "Max", "policies": [
        { "type": "Percent", "value": 100, "periodSeconds": 15 } ] });
    for (direction, default) in [("scaleUp", up), ("scaleDown", down)] {
        let rules = behavior.entry(direction).or_insert_with(|| json!({}));
        for (name, value) in default.as_object().into_iter().flatten() {
            if let Value::Object(rules) = rules {
                rules.entry(name.clone()).or_insert_with(|| value.clone());
            }
        }
    }
}

fn rolling_update(map: &mut Map<String, Value>) {
    set(map, "type", "RollingUpdate");
    if map.get("type").and_then(Value::as_str) == Some("RollingUpdate") {
        map.entry("rollingUpdate").or_insert_with(|| json!({}));
    }
}

fn job(map: &mut Map<String, Value>) {
    let object = Value::Object(std::mem::take(map));
    let labels = object.at("spec.template.metadata.labels").cloned();
    let Value::Object(mut object) = object else { return };
    if let Some(labels) = labels {
        default_labels(&mut object, labels);
    }
    *map = object;
}

fn job_spec(map: &mut Map<String, Value>) {
    // A job with neither runs one pod; with only `parallelism` it is a work queue.
    if !map.contains_key("completions") && !map.contains_key("parallelism") {
        map.insert("completions".into(), 1.into());
    }
    map.entry("parallelism").or_insert(1.into());
    let per_index = map.contains_key("backoffLimitPerIndex");
    map.entry("backoffLimit").or_insert(if per_index { i32::MAX.into() } else { 6.into() });
    let replacement = if map.contains_key("podFailurePolicy") { "Failed" } else { "TerminatingOrFailed" };
    map.entry("podReplacementPolicy").or_insert(replacement.into());
}

fn network_policy_spec(map: &mut Map<String, Value>) {
    if !map.contains_key("policyTypes") {
        let types =
            if map.contains_key("egress") { json!(["Ingress", "Egress"]) } else { json!(["Ingress"]) };
        map.insert("policyTypes".into(), types);
    }
}

fn subject(map: &mut Map<String, Value>) {
    if map.get("apiGroup").is_none_or(is_zero) {
        match map.get("kind").and_then(Value::as_str) {
            Some("User" | "Group") => map.insert("apiGroup".into(), "rbac.authorization.k8s.io".into()),
            _ => None,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn defaulted(group: &str, plural: &str, mut value: Value) -> Value {
        let schema = Schema::builtin();
        let kind = schema.resource(group, "v1", plural).expect("served");
        apply(schema, kind.type_id, &mut value);
        let once = value.clone();
        apply(schema, kind.type_id, &mut value);
        assert_eq!(once, value, "defaulting is idempotent");
        value
    }

    #[test]
    fn a_bare_pod_gets_upstreams_defaults() {
        let pod = defaulted(
            "",
            "pods",
            json!({"spec":{"containers":[{"name":"a","image":"nginx","resources":{"limits":{"cpu":"1"}}}],
                "volumes":[{"name":"v"}]}}),
        );
        assert_eq!(
            pod["spec"],
            json!({"containers":[{"name":"a","image":"nginx","imagePullPolicy":"Always",
                    "resources":{"limits":{"cpu":"1"},"requests":{"cpu":"1"}},
                    "terminationMessagePath":"/dev/termination-log","terminationMessagePolicy":"File"}],
                "volumes":[{"name":"v","emptyDir":{}}],
                "restartPolicy":"Always","dnsPolicy":"ClusterFirst","terminationGracePeriodSeconds":30,
                "schedulerName":"default-scheduler","securityContext":{},"enableServiceLinks":true})
        );
    }

    #[test]
    fn a_deployment_rolls_by_a_quarter() {
        let deployment = defaulted("apps", "deployments", json!({"spec":{"template":{}}}));
        assert_eq!(
            deployment["spec"]["strategy"],
            json!({"type":"RollingUpdate","rollingUpdate":{"maxSurge":"25%","maxUnavailable":"25%"}})
        );
        assert_eq!(deployment["spec"]["progressDeadlineSeconds"], 600);
    }

    #[test]
    fn pull_policies_follow_the_tag() {
        for (image, policy) in [
            ("nginx", "Always"),
            ("nginx:latest", "Always"),
            ("nginx:1", "IfNotPresent"),
            ("host:5000/nginx", "Always"),
            ("nginx@sha256:ab", "IfNotPresent"),
        ] {
            assert_eq!(pull_policy(image), policy, "{image}");
        }
    }
}
