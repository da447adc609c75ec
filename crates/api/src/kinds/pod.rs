//! The strategy of pods and pod templates.

use std::collections::HashSet;

use serde_json::{Value, json};

use crate::apply::Reach;
use crate::field::{self, child, index};
use crate::kinds::core::keep;
use crate::kinds::resources::{self, qos_class};
use crate::names;
use crate::object::Object;
use crate::rules::{
    Errors, Face, Rules, annotations, label_selector, labels, named, non_negative, one_of, required,
};

pub const POD: Rules = Rules {
    create: |object| {
        object.set_at("status", json!({ "phase": "Pending" }));
        gated_condition(object);
    },
    complete: |object| {
        let class = qos_class(object);
        object.set_at("status.qosClass", class);
    },
    update: |new, old| keep(new, old, "status"),
    update_status: |new, old| {
        for path in ["spec", "metadata.deletionTimestamp", "metadata.ownerReferences"] {
            keep(new, old, path);
        }
        keep(new, old, "status.qosClass");
        keep_observed_generations(new, old);
    },
    validate: |object, errors| {
        pod_spec("spec", object.at("spec").unwrap_or(&Value::Null), errors);
    },
    validate_update,
    faces: &[EPHEMERAL_CONTAINERS, resources::RESIZE],
    selectable: &[
        "spec.nodeName",
        "spec.restartPolicy",
        "spec.schedulerName",
        "spec.serviceAccountName",
        "spec.hostNetwork",
        "status.phase",
        "status.podIP",
        "status.podIPs",
        "status.nominatedNodeName",
    ],
    selectable_value: Some(|object, path| match path {
        "spec.hostNetwork" => Some(object.bool_at(path).to_string()),
        "status.podIPs" => {
            Some(object.list_at(path).iter().map(|ip| ip.str_at("ip")).collect::<Vec<_>>().join(","))
        }
        _ => None,
    }),
    returns_deleted: true,
    ..Rules::DEFAULT
};

pub const POD_TEMPLATE: Rules = Rules {
    returns_deleted: true,
    validate: |object, errors| {
        validate_template("template", object.at("template").unwrap_or(&Value::Null), errors);
    },
    ..Rules::DEFAULT
};

/// Adds containers for a look at a running pod: nothing else may change, and none may go.
const EPHEMERAL_CONTAINERS: Face = Face {
    name: "ephemeralcontainers",
    update: |new, old| {
        let wanted = new.remove_at("spec.ephemeralContainers");
        for part in ["metadata", "spec", "status"] {
            keep(new, old, part);
        }
        match wanted {
            Some(containers) => new.set_at("spec.ephemeralContainers", containers),
            None => drop(new.remove_at("spec.ephemeralContainers")),
        }
    },
    validate: |new, old, errors| {
        if old.at("metadata.annotations").is_some_and(|a| a.get("kubernetes.io/config.mirror").is_some()) {
            errors.push(field::Error::forbidden("", "static pods do not support ephemeral containers"));
            return;
        }
        pod_spec("spec", new.at("spec").unwrap_or(&Value::Null), errors);
        let path = "spec.ephemeralContainers";
        for old in old.list_at(path) {
            let name = old.str_at("name");
            match new.list_at(path).iter().find(|c| c.name_is(name)) {
                None => {
                    let detail = format!("existing ephemeral containers {name:?} may not be removed\n");
                    errors.push(field::Error::forbidden(path, detail));
                }
                Some(same) if same == old => {}
                Some(_) => {
                    let detail = format!("existing ephemeral containers {name:?} may not be changed\n");
                    errors.push(field::Error::forbidden(path, detail));
                }
            }
        }
    },
    reach: Reach::Only(&["spec.ephemeralContainers"]),
};

/// A writer that knows nothing of observed generations does not take them away.
fn keep_observed_generations(new: &mut Value, old: &Value) {
    if new.int_at("status.observedGeneration").unwrap_or(0) == 0 {
        keep(new, old, "status.observedGeneration");
    }
    let conditions =
        new.get_mut("status").and_then(|s| s.get_mut("conditions")).and_then(Value::as_array_mut);
    for condition in conditions.into_iter().flatten() {
        let before = old.list_at("status.conditions").iter();
        let mut before = before.filter(|c| c.str_at("type") == condition.str_at("type"));
        if condition.int_at("observedGeneration").unwrap_or(0) == 0
            && let Some(seen) = before.next().and_then(|c| c.at("observedGeneration"))
        {
            condition["observedGeneration"] = seen.clone();
        }
    }
}

/// A pod with scheduling gates says from the start why it is not scheduled.
fn gated_condition(object: &mut Value) {
    if !object.list_at("spec.schedulingGates").is_empty() {
        let condition = json!([{ "type": "PodScheduled", "status": "False", "reason": "SchedulingGated",
            "message": "Scheduling is blocked due to non-empty scheduling gates" }]);
        object.set_at("status.conditions", condition);
    }
}

/// A pod template: labels, annotations and spec.
pub fn validate_template(path: &str, template: &Value, errors: &mut Errors) {
    // Upstream leaves "metadata" out of these two paths.
    labels(&child(path, "labels"), template.at("metadata.labels"), errors);
    annotations(&child(path, "annotations"), template.at("metadata.annotations"), errors);
    let spec = template.at("spec").unwrap_or(&Value::Null);
    pod_spec(&child(path, "spec"), spec, errors);
    if !spec.list_at("ephemeralContainers").is_empty() {
        let detail = "ephemeral containers not allowed in pod template";
        errors.push(field::Error::forbidden(child(&child(path, "spec"), "ephemeralContainers"), detail));
    }
}

pub fn pod_spec(path: &str, spec: &Value, errors: &mut Errors) {
    let volumes = validate_volumes(&child(path, "volumes"), spec, errors);
    let containers = spec.list_at("containers");
    if containers.is_empty() {
        errors.push(field::Error::required(child(path, "containers"), ""));
    }
    let mut names = HashSet::new();
    for (list, init) in [("containers", false), ("initContainers", true)] {
        for (i, container) in spec.list_at(list).iter().enumerate() {
            let at = index(&child(path, list), i);
            validate_container(&at, container, init, &volumes, &mut names, errors);
            let restarts = match (container.str_at("restartPolicy"), spec.str_at("restartPolicy")) {
                ("", pods) => pods,
                (own, _) => own,
            };
            resources::validate_policies(&child(&at, "resizePolicy"), container, restarts, errors);
        }
    }
    one_of(path, spec, "restartPolicy", &["Always", "OnFailure", "Never"], errors);
    one_of(path, spec, "dnsPolicy", &["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"], errors);
    non_negative(path, spec, "terminationGracePeriodSeconds", errors);
    if let Some(seconds) =
        spec.int_at("activeDeadlineSeconds").filter(|s| !(1..=i64::from(i32::MAX)).contains(s))
    {
        let detail = "must be between 1 and 2147483647, inclusive";
        errors.push(field::Error::invalid(child(path, "activeDeadlineSeconds"), seconds, detail));
    }
    labels(&child(path, "nodeSelector"), spec.at("nodeSelector"), errors);
    for (name, rule) in [
        ("serviceAccountName", names::dns_subdomain as fn(&str) -> Vec<String>),
        ("nodeName", names::dns_subdomain),
        ("hostname", names::dns_label),
        ("subdomain", names::dns_label),
    ] {
        let value = spec.str_at(name);
        for problem in if value.is_empty() { Vec::new() } else { rule(value) } {
            errors.push(field::Error::invalid(child(path, name), value, problem));
        }
    }
    if spec.str_at("dnsPolicy") == "None" && spec.list_at("dnsConfig.nameservers").is_empty() {
        let detail = "must provide at least one DNS nameserver when `dnsPolicy` is None";
        errors.push(field::Error::required(child(path, "dnsConfig.nameservers"), detail));
    }
    for (i, toleration) in spec.list_at("tolerations").iter().enumerate() {
        validate_toleration(&index(&child(path, "tolerations"), i), toleration, errors);
    }
    validate_affinity(&child(path, "affinity"), spec.at("affinity").unwrap_or(&Value::Null), errors);
    for (i, alias) in spec.list_at("hostAliases").iter().enumerate() {
        let address = alias.str_at("ip");
        crate::kinds::core::ip(&format!("{}.ip", index(&child(path, "hostAliases"), i)), address, errors);
        for name in alias.list_at("hostnames") {
            let name = name.as_str().unwrap_or_default();
            named(&child(path, "hostAliases.hostnames"), name, names::dns_subdomain, errors);
        }
    }
    topology_spread(path, spec, errors);
    security_ids(&child(path, "securityContext"), spec.at("securityContext"), errors);
    host_ports(path, spec, errors);
    validate_ephemeral(path, spec, &volumes, &mut names, errors);
    resources::validate_pod_level(path, spec, errors);
}

fn validate_ephemeral(
    path: &str,
    spec: &Value,
    volumes: &HashSet<String>,
    names: &mut HashSet<String>,
    errors: &mut Errors,
) {
    for (i, container) in spec.list_at("ephemeralContainers").iter().enumerate() {
        let at = index(&child(path, "ephemeralContainers"), i);
        validate_container(&at, container, false, volumes, names, errors);
        let target = container.str_at("targetContainerName");
        let known = ["containers", "initContainers"];
        let exists = known.iter().any(|list| spec.list_at(list).iter().any(|c| c.name_is(target)));
        if !target.is_empty() && !exists {
            errors.push(field::Error::not_found(child(&at, "targetContainerName"), target));
        }
        for name in ["ports", "livenessProbe", "readinessProbe", "startupProbe", "lifecycle"] {
            if container.at(name).is_some() {
                errors.push(field::Error::forbidden(
                    child(&at, name),
                    "cannot be set for an Ephemeral Container",
                ));
            }
        }
        if container.map_at("resources").is_some_and(|r| !r.is_empty()) {
            let detail = "cannot be set for an Ephemeral Container";
            errors.push(field::Error::forbidden(child(&at, "resources"), detail));
        }
    }
}

trait Named {
    fn name_is(&self, name: &str) -> bool;
}

impl Named for Value {
    fn name_is(&self, name: &str) -> bool {
        self.str_at("name") == name
    }
}

/// A port of the node belongs to one container of the pod.
fn host_ports(path: &str, spec: &Value, errors: &mut Errors) {
    let mut seen = HashSet::new();
    for (i, container) in spec.list_at("containers").iter().enumerate() {
        for (j, port) in container.list_at("ports").iter().enumerate() {
            let Some(number) = port.int_at("hostPort").filter(|n| *n != 0) else { continue };
            let text = format!("{}/{}/{number}", port.str_at("protocol"), port.str_at("hostIP"));
            let at = index(&child(&index(&child(path, "containers"), i), "ports"), j);
            if !seen.insert(text.clone()) {
                errors.push(field::Error::duplicate(child(&at, "hostPort"), text));
            }
            let inside = port.int_at("containerPort").unwrap_or(0);
            if spec.bool_at("hostNetwork") && number != inside {
                let detail = "must match `containerPort` when `hostNetwork` is true";
                errors.push(field::Error::invalid(child(&at, "hostPort"), number, detail));
            }
        }
    }
}

fn topology_spread(path: &str, spec: &Value, errors: &mut Errors) {
    let constraints = spec.list_at("topologySpreadConstraints");
    for (i, constraint) in constraints.iter().enumerate() {
        let at = index(&child(path, "topologySpreadConstraints"), i);
        let skew = constraint.int_at("maxSkew").unwrap_or(0);
        if skew <= 0 {
            errors.push(field::Error::invalid(child(&at, "maxSkew"), skew, "must be greater than zero"));
        }
        required(&at, constraint, "topologyKey", "can not be empty", errors);
        let when = constraint.str_at("whenUnsatisfiable");
        if !["DoNotSchedule", "ScheduleAnyway"].contains(&when) {
            let supported = ["DoNotSchedule", "ScheduleAnyway"];
            errors.push(field::Error::not_supported(child(&at, "whenUnsatisfiable"), when, &supported));
        }
        let pair = |c: &Value| (c.str_at("topologyKey").to_owned(), c.str_at("whenUnsatisfiable").to_owned());
        if constraints[..i].iter().any(|c| pair(c) == pair(constraint)) {
            let (key, when) = pair(constraint);
            let text = format!("{{{key}, {when}}}");
            errors.push(field::Error::duplicate(child(&at, "{topologyKey, whenUnsatisfiable}"), text));
        }
        for name in ["nodeAffinityPolicy", "nodeTaintsPolicy"] {
            one_of(&at, constraint, name, &["Honor", "Ignore"], errors);
        }
        label_selector(&child(&at, "labelSelector"), constraint.at("labelSelector"), errors);
    }
}

fn validate_affinity(at: &str, affinity: &Value, errors: &mut Errors) {
    const REQUIRED: &str = "requiredDuringSchedulingIgnoredDuringExecution";
    const PREFERRED: &str = "preferredDuringSchedulingIgnoredDuringExecution";
    let weight = |at: &str, item: &Value, errors: &mut Errors| {
        let number = item.int_at("weight").unwrap_or(0);
        if !(1..=100).contains(&number) {
            let detail = "must be in the range 1-100";
            errors.push(field::Error::invalid(child(at, "weight"), number, detail));
        }
    };
    if let Some(node) = affinity.at("nodeAffinity") {
        let at = child(at, "nodeAffinity");
        if let Some(selector) = node.at(REQUIRED) {
            node_selector(&child(&at, REQUIRED), selector, errors);
        }
        for (i, item) in node.list_at(PREFERRED).iter().enumerate() {
            let at = index(&child(&at, PREFERRED), i);
            weight(&at, item, errors);
            node_selector_term(
                &child(&at, "preference"),
                item.at("preference").unwrap_or(&Value::Null),
                errors,
            );
        }
    }
    for name in ["podAffinity", "podAntiAffinity"] {
        let Some(pods) = affinity.at(name) else { continue };
        let at = child(at, name);
        for (i, term) in pods.list_at(REQUIRED).iter().enumerate() {
            pod_affinity_term(&index(&child(&at, REQUIRED), i), term, errors);
        }
        for (i, item) in pods.list_at(PREFERRED).iter().enumerate() {
            let at = index(&child(&at, PREFERRED), i);
            weight(&at, item, errors);
            let term = item.at("podAffinityTerm").unwrap_or(&Value::Null);
            pod_affinity_term(&child(&at, "podAffinityTerm"), term, errors);
        }
    }
}

fn pod_affinity_term(at: &str, term: &Value, errors: &mut Errors) {
    for name in ["labelSelector", "namespaceSelector"] {
        label_selector(&child(at, name), term.at(name), errors);
    }
    for namespace in term.list_at("namespaces") {
        let namespace = namespace.as_str().unwrap_or_default();
        named(&child(at, "namespace"), namespace, names::dns_label, errors);
    }
    if required(at, term, "topologyKey", "can not be empty", errors) {
        named(&child(at, "topologyKey"), term.str_at("topologyKey"), names::qualified_name, errors);
    }
}

/// `core.NodeSelector`.
pub fn node_selector(at: &str, selector: &Value, errors: &mut Errors) {
    let terms = selector.list_at("nodeSelectorTerms");
    let at = child(at, "nodeSelectorTerms");
    if terms.is_empty() {
        errors.push(field::Error::required(at, "must have at least one node selector term"));
        return;
    }
    for (i, term) in terms.iter().enumerate() {
        node_selector_term(&index(&at, i), term, errors);
    }
}

fn node_selector_term(at: &str, term: &Value, errors: &mut Errors) {
    for (i, item) in term.list_at("matchExpressions").iter().enumerate() {
        let at = index(&child(at, "matchExpressions"), i);
        let (values, path) = (item.list_at("values"), child(&at, "values"));
        match item.str_at("operator") {
            "In" | "NotIn" if values.is_empty() => {
                let detail = "must be specified when `operator` is 'In' or 'NotIn'";
                errors.push(field::Error::required(path, detail));
            }
            "Exists" | "DoesNotExist" if !values.is_empty() => {
                let detail = "may not be specified when `operator` is 'Exists' or 'DoesNotExist'";
                errors.push(field::Error::forbidden(path, detail));
            }
            "Gt" | "Lt" if values.len() != 1 => {
                let detail = "must be specified single value when `operator` is 'Lt' or 'Gt'";
                errors.push(field::Error::required(path, detail));
            }
            "In" | "NotIn" | "Exists" | "DoesNotExist" | "Gt" | "Lt" => {}
            other => {
                let path = child(&at, "operator");
                errors.push(field::Error::invalid(path, other, "not a valid selector operator"));
            }
        }
        named(&child(&at, "key"), item.str_at("key"), names::qualified_name, errors);
    }
    for (i, item) in term.list_at("matchFields").iter().enumerate() {
        let at = index(&child(at, "matchFields"), i);
        match item.str_at("operator") {
            "In" | "NotIn" if item.list_at("values").len() != 1 => {
                let detail =
                    "must be only one value when `operator` is 'In' or 'NotIn' for node field selector";
                errors.push(field::Error::required(child(&at, "values"), detail));
            }
            "In" | "NotIn" => {}
            other => {
                let path = child(&at, "operator");
                errors.push(field::Error::invalid(path, other, "not a valid selector operator"));
            }
        }
        if item.str_at("key") != "metadata.name" {
            let detail = "not a valid field selector key";
            errors.push(field::Error::invalid(child(&at, "key"), item.str_at("key"), detail));
        }
    }
}

pub fn validate_toleration(at: &str, toleration: &Value, errors: &mut Errors) {
    let key = toleration.str_at("key");
    if !key.is_empty() {
        for problem in names::qualified_name(key) {
            errors.push(field::Error::invalid(child(at, "key"), key, problem));
        }
    } else if toleration.str_at("operator") != "Exists" {
        let detail =
            "operator must be Exists when `key` is empty, which means \"match all values and all keys\"";
        errors.push(field::Error::invalid(child(at, "operator"), toleration.str_at("operator"), detail));
    }
    if toleration.at("tolerationSeconds").is_some() && toleration.str_at("effect") != "NoExecute" {
        let detail = "effect must be 'NoExecute' when `tolerationSeconds` is set";
        errors.push(field::Error::invalid(child(at, "effect"), toleration.str_at("effect"), detail));
    }
    match toleration.str_at("operator") {
        "Exists" if !toleration.str_at("value").is_empty() => errors.push(field::Error::invalid(
            child(at, "operator"),
            toleration.clone(),
            "value must be empty when `operator` is 'Exists'",
        )),
        "" | "Equal" | "Exists" => {}
        other => errors.push(field::Error::not_supported(child(at, "operator"), other, &["Equal", "Exists"])),
    }
    one_of(at, toleration, "effect", &["NoSchedule", "PreferNoSchedule", "NoExecute"], errors);
}

/// Checks volumes; returns their names.
fn validate_volumes(path: &str, spec: &Value, errors: &mut Errors) -> HashSet<String> {
    let mut seen = HashSet::new();
    for (i, volume) in spec.list_at("volumes").iter().enumerate() {
        let (at, name) = (index(path, i), volume.str_at("name"));
        let before = errors.len();
        if name.is_empty() {
            errors.push(field::Error::required(child(&at, "name"), ""));
        } else {
            for problem in names::dns_label(name) {
                errors.push(field::Error::invalid(child(&at, "name"), name, problem));
            }
        }
        if seen.contains(name) {
            errors.push(field::Error::duplicate(child(&at, "name"), name));
        }
        let sources: Vec<&String> =
            volume.as_object().into_iter().flat_map(|v| v.keys()).filter(|k| *k != "name").collect();
        match sources[..] {
            [] => errors.push(field::Error::required(at.clone(), "must specify a volume type")),
            [_] => {}
            [_, ref more @ ..] => more.iter().for_each(|source| {
                let detail = "may not specify more than 1 volume type";
                errors.push(field::Error::forbidden(child(&at, source), detail));
            }),
        }
        volume_source(&at, volume, errors);
        // A broken volume cannot be mounted; upstream says that too.
        if errors.len() == before && !name.is_empty() {
            seen.insert(name.to_owned());
        }
    }
    seen
}

fn volume_source(at: &str, volume: &Value, errors: &mut Errors) {
    for (source, required) in [
        ("hostPath", "path"),
        ("secret", "secretName"),
        ("configMap", "name"),
        ("persistentVolumeClaim", "claimName"),
    ] {
        if volume.get(source).is_some_and(|s| s.str_at(required).is_empty()) {
            errors.push(field::Error::required(format!("{at}.{source}.{required}"), ""));
        }
    }
    for source in ["secret", "configMap", "downwardAPI", "projected"] {
        let Some(mode) = volume.get(source).and_then(|s| s.int_at("defaultMode")) else { continue };
        if !(0..=0o777).contains(&mode) {
            let detail = "must be a number between 0 and 0777 (octal), both inclusive";
            errors.push(field::Error::invalid(format!("{at}.{source}.defaultMode"), mode, detail));
        }
    }
    for source in ["secret", "configMap", "downwardAPI"] {
        let Some(items) = volume.get(source).map(|s| s.list_at("items")) else { continue };
        for (i, item) in items.iter().enumerate() {
            let at = index(&format!("{at}.{source}.items"), i);
            key_to_path(&at, item, source == "downwardAPI", errors);
        }
    }
    if let Some(path) =
        volume.get("hostPath").map(|h| h.str_at("path")).filter(|p| p.split('/').any(|s| s == ".."))
    {
        errors.push(field::Error::invalid(format!("{at}.hostPath.path"), path, "must not contain '..'"));
    }
}

fn key_to_path(at: &str, item: &Value, downward: bool, errors: &mut Errors) {
    if !downward {
        required(at, item, "key", "", errors);
    }
    let path = item.str_at("path");
    if required(at, item, "path", "", errors) {
        if path.starts_with('/') {
            errors.push(field::Error::invalid(child(at, "path"), path, "must be a relative path"));
        } else if path.split('/').any(|s| s == "..") {
            errors.push(field::Error::invalid(child(at, "path"), path, "must not contain '..'"));
        }
    }
    if let Some(mode) = item.int_at("mode").filter(|m| !(0..=0o777).contains(m)) {
        let detail = "must be a number between 0 and 0777 (octal), both inclusive";
        errors.push(field::Error::invalid(child(at, "mode"), mode, detail));
    }
}

fn validate_container(
    at: &str,
    container: &Value,
    init: bool,
    volumes: &HashSet<String>,
    names_seen: &mut HashSet<String>,
    errors: &mut Errors,
) {
    let name = container.str_at("name");
    if name.is_empty() {
        errors.push(field::Error::required(child(at, "name"), ""));
    } else {
        for problem in names::dns_label(name) {
            errors.push(field::Error::invalid(child(at, "name"), name, problem));
        }
    }
    if !names_seen.insert(name.to_owned()) {
        errors.push(field::Error::duplicate(child(at, "name"), name));
    }
    let image = container.str_at("image");
    if image.is_empty() {
        errors.push(field::Error::required(child(at, "image"), ""));
    } else if image.trim() != image {
        let detail = "must not have leading or trailing whitespace";
        errors.push(field::Error::invalid(child(at, "image"), image, detail));
    }
    one_of(at, container, "imagePullPolicy", &["Always", "IfNotPresent", "Never"], errors);
    one_of(at, container, "terminationMessagePolicy", &["FallbackToLogsOnError", "File"], errors);
    validate_ports(at, container, errors);
    validate_env(at, container, errors);
    validate_mounts(at, container, volumes, errors);
    resources::validate(&child(at, "resources"), container.at("resources"), errors);
    security_ids(&child(at, "securityContext"), container.at("securityContext"), errors);
    let sidecar = init && container.str_at("restartPolicy") == "Always";
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let Some(value) = container.at(probe) else { continue };
        if init && !sidecar {
            errors.push(field::Error::forbidden(
                child(at, probe),
                "may not be set for init containers without restartPolicy=Always",
            ));
            continue;
        }
        validate_probe(&child(at, probe), value, probe != "readinessProbe", errors);
    }
    if init && !sidecar && container.at("lifecycle").is_some() {
        let detail = "may not be set for init containers without restartPolicy=Always";
        errors.push(field::Error::forbidden(child(at, "lifecycle"), detail));
    }
    for hook in ["postStart", "preStop"] {
        if let Some(handler) = container.at("lifecycle").and_then(|l| l.at(hook)) {
            validate_handler(
                &format!("{at}.lifecycle.{hook}"),
                handler,
                &["exec", "httpGet", "tcpSocket", "sleep"],
                errors,
            );
        }
    }
}

fn security_ids(at: &str, context: Option<&Value>, errors: &mut Errors) {
    for name in ["runAsUser", "runAsGroup", "fsGroup"] {
        let Some(id) = context.and_then(|c| c.int_at(name)) else { continue };
        if !(0..=i64::from(i32::MAX)).contains(&id) {
            let detail = "must be between 0 and 2147483647, inclusive";
            errors.push(field::Error::invalid(child(at, name), id, detail));
        }
    }
}

fn validate_ports(at: &str, container: &Value, errors: &mut Errors) {
    let mut names_seen = HashSet::new();
    for (i, port) in container.list_at("ports").iter().enumerate() {
        let at = index(&child(at, "ports"), i);
        let name = port.str_at("name");
        if !name.is_empty() {
            for problem in names::port_name(name) {
                errors.push(field::Error::invalid(child(&at, "name"), name, problem));
            }
            if !names_seen.insert(name.to_owned()) {
                errors.push(field::Error::duplicate(child(&at, "name"), name));
            }
        }
        match port.int_at("containerPort").unwrap_or(0) {
            0 => errors.push(field::Error::required(child(&at, "containerPort"), "")),
            number => names::port_number(number)
                .into_iter()
                .for_each(|p| errors.push(field::Error::invalid(child(&at, "containerPort"), number, p))),
        }
        if let Some(number) = port.int_at("hostPort").filter(|n| *n != 0) {
            names::port_number(number)
                .into_iter()
                .for_each(|p| errors.push(field::Error::invalid(child(&at, "hostPort"), number, p)));
        }
        one_of(&at, port, "protocol", &["SCTP", "TCP", "UDP"], errors);
    }
}

fn validate_env(at: &str, container: &Value, errors: &mut Errors) {
    for (i, env) in container.list_at("env").iter().enumerate() {
        let at = index(&child(at, "env"), i);
        let name = env.str_at("name");
        if name.is_empty() {
            errors.push(field::Error::required(child(&at, "name"), ""));
        } else {
            for problem in names::env_name(name) {
                errors.push(field::Error::invalid(child(&at, "name"), name, problem));
            }
        }
        let Some(source) = env.at("valueFrom") else { continue };
        let from = child(&at, "valueFrom");
        let count = source.as_object().map_or(0, |s| s.len());
        if count == 0 {
            let detail = "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, `secretKeyRef` or `fileKeyRef`";
            errors.push(field::Error::invalid(from.clone(), "", detail));
        } else if !env.str_at("value").is_empty() {
            errors.push(field::Error::invalid(
                from.clone(),
                "",
                "may not be specified when `value` is not empty",
            ));
        } else if count > 1 {
            errors.push(field::Error::invalid(
                from.clone(),
                "",
                "may not have more than one field specified at a time",
            ));
        }
        if let Some(reference) = source.at("fieldRef") {
            field_reference(&child(&from, "fieldRef"), reference, errors);
        }
        for reference in ["configMapKeyRef", "secretKeyRef"] {
            let Some(value) = source.at(reference) else { continue };
            let at = child(&from, reference);
            if value.str_at("name").is_empty() {
                errors.push(field::Error::required(child(&at, "name"), ""));
            }
            if value.str_at("key").is_empty() {
                errors.push(field::Error::required(child(&at, "key"), ""));
            }
        }
    }
}

const ENV_FIELDS: [&str; 8] = [
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.podIP",
    "status.podIPs",
];

/// `fieldRef` of an environment variable.
fn field_reference(at: &str, reference: &Value, errors: &mut Errors) {
    required(at, reference, "apiVersion", "", errors);
    let path = reference.str_at("fieldPath");
    if !required(at, reference, "fieldPath", "", errors) {
        return;
    }
    let subscripted = ["metadata.annotations['", "metadata.labels['"];
    if let Some(prefix) = subscripted.iter().find(|p| path.starts_with(**p)) {
        let key = path[prefix.len()..].strip_suffix("']").unwrap_or_default();
        let key = if prefix.contains("annotations") { key.to_lowercase() } else { key.to_owned() };
        named(&child(at, "fieldPath"), &key, names::qualified_name, errors);
        return;
    }
    let known = ENV_FIELDS.contains(&path) || path == "status.hostIPs";
    if known {
        return;
    }
    // Fields that may be selected on convert, and are then refused as unsupported here.
    let converts = [
        "metadata.labels",
        "metadata.annotations",
        "spec.restartPolicy",
        "spec.schedulerName",
        "status.phase",
    ];
    if converts.contains(&path) {
        errors.push(field::Error::not_supported(child(at, "fieldPath"), path, &ENV_FIELDS));
    } else {
        let detail = format!("error converting fieldPath: field label not supported: {path}");
        errors.push(field::Error::invalid(child(at, "fieldPath"), path, detail));
    }
}

fn validate_mounts(at: &str, container: &Value, volumes: &HashSet<String>, errors: &mut Errors) {
    let mut paths = HashSet::new();
    for (i, mount) in container.list_at("volumeMounts").iter().enumerate() {
        let at = index(&child(at, "volumeMounts"), i);
        let (name, path) = (mount.str_at("name"), mount.str_at("mountPath"));
        if name.is_empty() {
            errors.push(field::Error::required(child(&at, "name"), ""));
        }
        // The token volume of the service account is added by admission, before validation.
        if !volumes.contains(name) {
            errors.push(field::Error::not_found(child(&at, "name"), name));
        }
        if path.is_empty() {
            errors.push(field::Error::required(child(&at, "mountPath"), ""));
        }
        if !paths.insert(path.to_owned()) {
            errors.push(field::Error::invalid(child(&at, "mountPath"), path, "must be unique"));
        }
        for name in ["subPath", "subPathExpr"] {
            let value = mount.str_at(name);
            if value.starts_with('/') {
                errors.push(field::Error::invalid(child(&at, name), value, "must be a relative path"));
            } else if value.split('/').any(|s| s == "..") {
                errors.push(field::Error::invalid(child(&at, name), value, "must not contain '..'"));
            }
        }
    }
}

fn validate_probe(at: &str, probe: &Value, once: bool, errors: &mut Errors) {
    validate_handler(at, probe, &["exec", "httpGet", "tcpSocket", "grpc"], errors);
    for name in
        ["initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"]
    {
        non_negative(at, probe, name, errors);
    }
    if once && probe.int_at("successThreshold").is_some_and(|n| n != 1) {
        let value = probe.int_at("successThreshold").unwrap_or(0);
        errors.push(field::Error::invalid(child(at, "successThreshold"), value, "must be 1"));
    }
}

fn validate_handler(at: &str, handler: &Value, kinds: &[&str], errors: &mut Errors) {
    let given: Vec<&&str> = kinds.iter().filter(|k| handler.at(k).is_some()).collect();
    match given[..] {
        [] => errors.push(field::Error::required(at, "must specify a handler type")),
        [_] => {}
        [_, ref more @ ..] => more.iter().for_each(|kind| {
            errors.push(field::Error::forbidden(child(at, kind), "may not specify more than 1 handler type"));
        }),
    }
    if handler.at("exec").is_some() && handler.list_at("exec.command").is_empty() {
        errors.push(field::Error::required(format!("{at}.exec.command"), ""));
    }
    for kind in ["httpGet", "tcpSocket"] {
        let Some(action) = handler.at(kind) else { continue };
        let path = format!("{at}.{kind}.port");
        match action.get("port") {
            Some(Value::Number(n)) => {
                let number = n.as_i64().unwrap_or(0);
                names::port_number(number)
                    .into_iter()
                    .for_each(|p| errors.push(field::Error::invalid(path.clone(), number, p)));
            }
            Some(Value::String(name)) => {
                names::port_name(name)
                    .into_iter()
                    .for_each(|p| errors.push(field::Error::invalid(path.clone(), name.as_str(), p)));
            }
            // Go's zero is a port like any other.
            _ => names::port_number(0)
                .into_iter()
                .for_each(|p| errors.push(field::Error::invalid(path.clone(), 0, p))),
        }
        one_of(&child(at, kind), action, "scheme", &["HTTP", "HTTPS"], errors);
    }
}

/// After creation only a few fields may change.
fn validate_update(new: &Value, old: &Value, errors: &mut Errors) {
    let mut munged = new.at("spec").cloned().unwrap_or(Value::Null);
    let before = old.at("spec").cloned().unwrap_or(Value::Null);
    for list in ["containers", "initContainers"] {
        let (Some(Value::Array(items)), olds) = (munged.get_mut(list), before.list_at(list)) else {
            continue;
        };
        if items.len() != olds.len() {
            let detail = "pod updates may not add or remove containers";
            errors.push(field::Error::forbidden(format!("spec.{list}"), detail));
            return;
        }
        for (item, old) in items.iter_mut().zip(olds) {
            if item.str_at("image").is_empty() {
                errors.push(field::Error::required(format!("spec.{list}[0].image"), ""));
            }
            keep(item, old, "image");
        }
    }
    for name in ["activeDeadlineSeconds", "terminationGracePeriodSeconds"] {
        let allowed = match name {
            "terminationGracePeriodSeconds" => {
                before.int_at(name).is_some_and(|n| n < 0) && munged.int_at(name) == Some(1)
            }
            _ => true,
        };
        if allowed {
            keep(&mut munged, &before, name);
        }
    }
    if before.list_at("tolerations").iter().all(|t| munged.list_at("tolerations").contains(t)) {
        keep(&mut munged, &before, "tolerations");
    }
    // Gates may go, not come; while gated, node selection may be narrowed.
    if munged.list_at("schedulingGates").iter().all(|g| before.list_at("schedulingGates").contains(g)) {
        if !before.list_at("schedulingGates").is_empty() {
            keep(&mut munged, &before, "nodeSelector");
            keep(&mut munged, &before, "affinity");
        }
        keep(&mut munged, &before, "schedulingGates");
    }
    if munged != before {
        let detail = "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)";
        errors.push(field::Error::forbidden("spec", detail));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errors(spec: Value) -> Vec<String> {
        let mut errors = Vec::new();
        pod_spec("spec", &spec, &mut errors);
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn every_broken_rule_is_collected() {
        let found = errors(json!({"containers":[
            {"name":"A","image":"", "ports":[{"containerPort":70000}]},
            {"name":"b","image":"x","volumeMounts":[{"name":"v","mountPath":"/x"}]}]}));
        assert_eq!(found.len(), 4, "{found:?}");
        assert!(found.contains(&"spec.containers[0].image: Required value".to_owned()));
        assert!(found.contains(&r#"spec.containers[1].volumeMounts[0].name: Not found: "v""#.to_owned()));
        assert_eq!(errors(json!({})), ["spec.containers: Required value"]);
    }

    #[test]
    fn only_images_and_a_few_others_may_change() {
        let old = json!({"spec":{"containers":[{"name":"a","image":"x"}]}});
        let mut errors = Vec::new();
        validate_update(
            &json!({"spec":{"containers":[{"name":"a","image":"y"}],"activeDeadlineSeconds":5}}),
            &old,
            &mut errors,
        );
        assert!(errors.is_empty(), "{errors:?}");
        validate_update(&json!({"spec":{"containers":[{"name":"b","image":"x"}]}}), &old, &mut errors);
        assert_eq!(errors.len(), 1);
    }
}
