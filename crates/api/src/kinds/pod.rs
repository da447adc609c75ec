//! The strategy of pods and pod templates.

use std::collections::HashSet;

use serde_json::{Value, json};

use crate::field::{self, child, index};
use crate::kinds::core::{keep, quantity};
use crate::names;
use crate::object::Object;
use crate::rules::{Errors, Rules, annotations, labels, non_negative, one_of};

pub const POD: Rules = Rules {
    create: |object| {
        let class = qos_class(object);
        object.set_at("status", json!({ "phase": "Pending", "qosClass": class }));
        gated_condition(object);
    },
    update: |new, old| keep(new, old, "status"),
    update_status: |new, old| {
        for path in ["spec", "metadata.deletionTimestamp", "metadata.ownerReferences"] {
            keep(new, old, path);
        }
        keep(new, old, "status.qosClass");
    },
    validate: |object, errors| {
        pod_spec("spec", object.at("spec").unwrap_or(&Value::Null), errors);
    },
    validate_update,
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
    validate: |object, errors| {
        validate_template("template", object.at("template").unwrap_or(&Value::Null), errors);
    },
    ..Rules::DEFAULT
};

/// A pod with scheduling gates says from the start why it is not scheduled.
fn gated_condition(object: &mut Value) {
    if !object.list_at("spec.schedulingGates").is_empty() {
        let condition = json!([{ "type": "PodScheduled", "status": "False", "reason": "SchedulingGated",
            "message": "Scheduling is blocked due to non-empty scheduling gates" }]);
        object.set_at("status.conditions", condition);
    }
}

/// `Guaranteed`, `Burstable` or `BestEffort`, from the requests and limits of cpu and memory.
pub fn qos_class(pod: &Value) -> &'static str {
    let containers: Vec<&Value> =
        pod.list_at("spec.containers").iter().chain(pod.list_at("spec.initContainers")).collect();
    let mut any = false;
    let mut guaranteed = true;
    for container in containers {
        for name in ["cpu", "memory"] {
            let read = |list: &str| {
                quantity(container.at("resources").and_then(|r| r.at(list)).and_then(|l| l.get(name)))
                    .filter(|q| !q.is_zero())
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

/// A pod template: labels, annotations and spec.
pub fn validate_template(path: &str, template: &Value, errors: &mut Errors) {
    let metadata = child(path, "metadata");
    labels(&child(&metadata, "labels"), template.at("metadata.labels"), errors);
    annotations(&child(&metadata, "annotations"), template.at("metadata.annotations"), errors);
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
        }
    }
    one_of(path, spec, "restartPolicy", &["Always", "Never", "OnFailure"], errors);
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
}

fn validate_toleration(at: &str, toleration: &Value, errors: &mut Errors) {
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
        if name.is_empty() {
            errors.push(field::Error::required(child(&at, "name"), ""));
        } else {
            for problem in names::dns_label(name) {
                errors.push(field::Error::invalid(child(&at, "name"), name, problem));
            }
        }
        if !name.is_empty() && !seen.insert(name.to_owned()) {
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
    if let Some(path) =
        volume.get("hostPath").map(|h| h.str_at("path")).filter(|p| p.split('/').any(|s| s == ".."))
    {
        errors.push(field::Error::invalid(format!("{at}.hostPath.path"), path, "must not contain '..'"));
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
        if !names_seen.insert(name.to_owned()) {
            errors.push(field::Error::duplicate(child(at, "name"), name));
        }
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
    validate_resources(&child(at, "resources"), container.at("resources"), errors);
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

fn validate_resources(at: &str, resources: Option<&Value>, errors: &mut Errors) {
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
            _ => errors.push(field::Error::required(path, "")),
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
    fn quality_of_service_follows_requests_and_limits() {
        let class = |resources: Value| qos_class(&json!({"spec":{"containers":[{"resources":resources}]}}));
        assert_eq!(class(json!({})), "BestEffort");
        assert_eq!(class(json!({"requests":{"cpu":"1"}})), "Burstable");
        assert_eq!(
            class(json!({"limits":{"cpu":"1","memory":"1Gi"},"requests":{"cpu":"1","memory":"1Gi"}})),
            "Guaranteed"
        );
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
