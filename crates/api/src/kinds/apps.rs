//! Strategies of the workloads that keep pods running.

use serde_json::{Value, json};

use crate::field::{self, child};
use crate::kinds::core::keep;
use crate::kinds::pod::validate_template;
use crate::object::Object;
use crate::rules::{Errors, Rules, immutable, label_selector, non_negative, one_of};
use crate::selector::LabelSelector;

pub const DEPLOYMENT: Rules = Rules {
    create: |object| object.set_at("status", json!({})),
    update: |new, old| keep(new, old, "status"),
    update_status,
    validate: |object, errors| {
        let spec = object.at("spec").unwrap_or(&Value::Null);
        workload(spec, true, errors);
        for name in ["minReadySeconds", "revisionHistoryLimit", "progressDeadlineSeconds"] {
            non_negative("spec", spec, name, errors);
        }
        if let (Some(deadline), Some(ready)) =
            (spec.int_at("progressDeadlineSeconds"), Some(spec.int_at("minReadySeconds").unwrap_or(0)))
            && deadline <= ready
        {
            errors.push(field::Error::invalid(
                "spec.progressDeadlineSeconds",
                deadline,
                "must be greater than minReadySeconds",
            ));
        }
        deployment_strategy(spec, errors);
    },
    validate_update: |new, old, errors| immutable("spec.selector", new, old, errors),
    ..Rules::DEFAULT
};

fn deployment_strategy(spec: &Value, errors: &mut Errors) {
    let strategy = spec.at("strategy").unwrap_or(&Value::Null);
    match strategy.str_at("type") {
        "Recreate" => {
            if strategy.at("rollingUpdate").is_some() {
                let detail = "may not be specified when strategy `type` is 'Recreate'";
                errors.push(field::Error::forbidden("spec.strategy.rollingUpdate", detail));
            }
        }
        "RollingUpdate" => {
            let at = "spec.strategy.rollingUpdate";
            let rolling = strategy.at("rollingUpdate").unwrap_or(&Value::Null);
            surge_and_unavailable(at, rolling, true, errors);
        }
        other => errors.push(field::Error::not_supported(
            "spec.strategy.type",
            other,
            &["Recreate", "RollingUpdate"],
        )),
    }
}

/// `maxSurge` and `maxUnavailable`: numbers or percentages, not both zero.
fn surge_and_unavailable(at: &str, rolling: &Value, cap: bool, errors: &mut Errors) {
    for name in ["maxUnavailable", "maxSurge"] {
        let Some(value) = rolling.at(name) else { continue };
        let path = child(at, name);
        match int_or_percent(value) {
            None => {
                let detail = "a valid percent string must be a numeric string followed by an ending '%' (e.g. '1%',  or '93%', regex used for validation is '[0-9]+%')";
                errors.push(field::Error::invalid(path, value.clone(), detail));
            }
            Some((number, _)) if number < 0 => {
                errors.push(field::Error::invalid(path, value.clone(), "must be greater than or equal to 0"));
            }
            Some((number, true)) if number > 100 && cap && name == "maxUnavailable" => {
                errors.push(field::Error::invalid(path, value.clone(), "must not be greater than 100%"));
            }
            Some(_) => {}
        }
    }
    let zero = |name: &str| rolling.at(name).and_then(int_or_percent).is_some_and(|(n, _)| n == 0);
    if zero("maxUnavailable") && zero("maxSurge") {
        let value = rolling.at("maxUnavailable").cloned().unwrap_or(json!(0));
        let detail = "may not be 0 when `maxSurge` is 0";
        errors.push(field::Error::invalid(child(at, "maxUnavailable"), value, detail));
    }
}

/// The number, and whether it is a percentage.
fn int_or_percent(value: &Value) -> Option<(i64, bool)> {
    match value {
        Value::Number(n) => n.as_i64().map(|n| (n, false)),
        Value::String(s) => s.strip_suffix('%')?.parse().ok().map(|n| (n, true)),
        _ => None,
    }
}

pub const REPLICA_SET: Rules = Rules {
    create: |object| object.set_at("status", json!({ "replicas": 0 })),
    update: |new, old| keep(new, old, "status"),
    update_status,
    validate: |object, errors| {
        let spec = object.at("spec").unwrap_or(&Value::Null);
        workload(spec, true, errors);
        non_negative("spec", spec, "minReadySeconds", errors);
    },
    validate_update: |new, old, errors| immutable("spec.selector", new, old, errors),
    selectable: &["status.replicas"],
    ..Rules::DEFAULT
};

pub const REPLICATION_CONTROLLER: Rules = Rules {
    create: |object| object.set_at("status", json!({ "replicas": 0 })),
    update: |new, old| keep(new, old, "status"),
    update_status,
    validate: |object, errors| {
        let spec = object.at("spec").unwrap_or(&Value::Null);
        non_negative("spec", spec, "replicas", errors);
        non_negative("spec", spec, "minReadySeconds", errors);
        match spec.at("selector") {
            None => errors.push(field::Error::required("spec.selector", "")),
            Some(selector) => {
                let chosen = LabelSelector::from_labels(Some(selector));
                template_matches(spec, &chosen, errors);
            }
        }
        if spec.at("template").is_none() {
            errors.push(field::Error::required("spec.template", ""));
        } else {
            validate_template("spec.template", spec.at("template").unwrap_or(&Value::Null), errors);
            always_restarts(spec, errors);
        }
    },
    selectable: &["status.replicas"],
    ..Rules::DEFAULT
};

pub const DAEMON_SET: Rules = Rules {
    create: |object| object.set_at("status", json!({})),
    update: |new, old| keep(new, old, "status"),
    update_status,
    validate: |object, errors| {
        let spec = object.at("spec").unwrap_or(&Value::Null);
        workload(spec, false, errors);
        for name in ["minReadySeconds", "revisionHistoryLimit"] {
            non_negative("spec", spec, name, errors);
        }
        match spec.str_at("updateStrategy.type") {
            "OnDelete" => {}
            "RollingUpdate" => {
                let rolling = spec.at("updateStrategy.rollingUpdate").unwrap_or(&Value::Null);
                surge_and_unavailable("spec.updateStrategy.rollingUpdate", rolling, true, errors);
            }
            other => errors.push(field::Error::not_supported(
                "spec.updateStrategy.type",
                other,
                &["OnDelete", "RollingUpdate"],
            )),
        }
    },
    validate_update: |new, old, errors| immutable("spec.selector", new, old, errors),
    ..Rules::DEFAULT
};

pub const STATEFUL_SET: Rules = Rules {
    create: |object| object.set_at("status", json!({ "replicas": 0, "availableReplicas": 0 })),
    update: |new, old| keep(new, old, "status"),
    update_status,
    validate: |object, errors| {
        let spec = object.at("spec").unwrap_or(&Value::Null);
        workload(spec, true, errors);
        one_of("spec", spec, "podManagementPolicy", &["OrderedReady", "Parallel"], errors);
    },
    validate_update: |new, old, errors| {
        let mut munged = new.at("spec").cloned().unwrap_or(Value::Null);
        let before = old.at("spec").unwrap_or(&Value::Null);
        for name in [
            "replicas",
            "ordinals",
            "template",
            "updateStrategy",
            "revisionHistoryLimit",
            "persistentVolumeClaimRetentionPolicy",
            "minReadySeconds",
        ] {
            keep(&mut munged, before, name);
        }
        if munged != *before {
            let detail = "updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', 'updateStrategy', 'revisionHistoryLimit', 'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden";
            errors.push(field::Error::forbidden("spec", detail));
        }
    },
    ..Rules::DEFAULT
};

pub const CONTROLLER_REVISION: Rules = Rules {
    generation: false,
    validate: |object, errors| non_negative("", object, "revision", errors),
    validate_update: |new, old, errors| immutable("data", new, old, errors),
    ..Rules::DEFAULT
};

/// Status writers change status alone; labels and the like are the main resource's.
fn update_status(new: &mut Value, old: &Value) {
    keep(new, old, "spec");
    keep(new, old, "metadata.labels");
}

/// Replicas, selector and template of a workload.
fn workload(spec: &Value, replicas: bool, errors: &mut Errors) {
    if replicas {
        non_negative("spec", spec, "replicas", errors);
    }
    match spec.at("selector") {
        None => errors.push(field::Error::required("spec.selector", "")),
        Some(selector) => {
            label_selector("spec.selector", Some(selector), errors);
            let chosen = LabelSelector::from_value(Some(selector));
            if chosen.is_everything() {
                let detail = "empty selector is invalid for deployment";
                errors.push(field::Error::invalid("spec.selector", selector.clone(), detail));
            }
            template_matches(spec, &chosen, errors);
        }
    }
    validate_template("spec.template", spec.at("template").unwrap_or(&Value::Null), errors);
    always_restarts(spec, errors);
}

fn template_matches(spec: &Value, selector: &LabelSelector, errors: &mut Errors) {
    let labels = spec.map_at("template.metadata.labels");
    if !selector.matches(labels) {
        let value = labels.cloned().map_or(Value::Null, Value::Object);
        let detail = "`selector` does not match template `labels`";
        errors.push(field::Error::invalid("spec.template.metadata.labels", value, detail));
    }
}

fn always_restarts(spec: &Value, errors: &mut Errors) {
    let policy = spec.str_at("template.spec.restartPolicy");
    if policy != "Always" && !policy.is_empty() {
        errors.push(field::Error::not_supported("spec.template.spec.restartPolicy", policy, &["Always"]));
    }
    if spec.at("template.spec.activeDeadlineSeconds").is_some() {
        let at = "spec.template.spec.activeDeadlineSeconds";
        errors.push(field::Error::forbidden(at, "activeDeadlineSeconds in ReplicaSet is not Supported"));
    }
}
