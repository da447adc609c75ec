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
        workload(spec, "deployment", errors);
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
                errors.push(field::Error::invalid(path, value.clone(), BAD_PERCENT));
            }
            Some((number, _)) if number < 0 => {
                errors.push(field::Error::invalid(path, value.clone(), "must be greater than or equal to 0"));
            }
            Some((number, true)) if number > 100 && (!cap || name == "maxUnavailable") => {
                errors.push(field::Error::invalid(path, value.clone(), "must not be greater than 100%"));
            }
            Some(_) => {}
        }
    }
    // A text that is no percentage counts as zero upstream.
    let zero = |name: &str| rolling.at(name).is_none_or(|v| int_or_percent(v).is_none_or(|(n, _)| n == 0));
    if zero("maxUnavailable") && zero("maxSurge") {
        let value = rolling.at("maxUnavailable").cloned().unwrap_or(json!(0));
        if cap {
            let detail = "may not be 0 when `maxSurge` is 0";
            errors.push(field::Error::invalid(child(at, "maxUnavailable"), value, detail));
        } else {
            let detail = "cannot be 0 when maxSurge is 0";
            errors.push(field::Error::required(child(at, "maxUnavailable"), detail));
        }
    }
}

pub const BAD_PERCENT: &str = "a valid percent string must be a numeric string followed by an ending '%' (e.g. '1%',  or '93%', regex used for validation is '[0-9]+%')";

/// The number, and whether it is a percentage.
pub fn int_or_percent(value: &Value) -> Option<(i64, bool)> {
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
        workload(spec, "deployment", errors);
        non_negative("spec", spec, "minReadySeconds", errors);
    },
    validate_update: |new, old, errors| immutable("spec.selector", new, old, errors),
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
                if spec.at("template").is_some() {
                    template_matches(spec, &chosen, errors);
                }
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

const TEMPLATE_GENERATION: &str = "deprecated.daemonset.template.generation";

/// How often the template changed, kept in an annotation since `apps/v1` has no field for it.
fn set_template_generation(object: &mut Value, generation: i64) {
    let mut annotations = object.map_at("metadata.annotations").cloned().unwrap_or_default();
    annotations.insert(TEMPLATE_GENERATION.into(), json!(generation.to_string()));
    object.set_at("metadata.annotations", Value::Object(annotations));
}

fn template_generation(object: &Value) -> i64 {
    let annotations = object.map_at("metadata.annotations");
    let text = annotations.and_then(|a| a.get(TEMPLATE_GENERATION)).and_then(Value::as_str);
    text.and_then(|t| t.parse().ok()).unwrap_or(0)
}

pub const DAEMON_SET: Rules = Rules {
    create: |object| {
        object.set_at("status", json!({}));
        set_template_generation(object, 1);
    },
    update: |new, old| {
        keep(new, old, "status");
        let changed = new.at("spec.template") != old.at("spec.template");
        let before = template_generation(old);
        if before > 0 || changed {
            set_template_generation(new, before + i64::from(changed));
        }
    },
    update_status,
    validate: |object, errors| {
        let spec = object.at("spec").unwrap_or(&Value::Null);
        workload(spec, "daemonset", errors);
        for name in ["minReadySeconds", "revisionHistoryLimit"] {
            non_negative("spec", spec, name, errors);
        }
        match spec.str_at("updateStrategy.type") {
            "OnDelete" => {}
            "RollingUpdate" => {
                let rolling = spec.at("updateStrategy.rollingUpdate").unwrap_or(&Value::Null);
                surge_and_unavailable("spec.updateStrategy.rollingUpdate", rolling, false, errors);
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
        let policies = ["OrderedReady", "Parallel"];
        if !policies.contains(&spec.str_at("podManagementPolicy")) {
            let detail = format!("must be '{}' or '{}'", policies[0], policies[1]);
            let value = spec.str_at("podManagementPolicy");
            errors.push(field::Error::invalid("spec.podManagementPolicy", value, detail));
        }
        let strategy = spec.at("updateStrategy").unwrap_or(&Value::Null);
        match strategy.str_at("type") {
            "" => errors.push(field::Error::required("spec.updateStrategy", "")),
            "OnDelete" => {
                if strategy.at("rollingUpdate").is_some() {
                    let detail = "only allowed for updateStrategy 'RollingUpdate'";
                    errors.push(field::Error::invalid(
                        "spec.updateStrategy.rollingUpdate",
                        Value::Null,
                        detail,
                    ));
                }
            }
            "RollingUpdate" => {
                let at = "spec.updateStrategy.rollingUpdate";
                let rolling = strategy.at("rollingUpdate").unwrap_or(&Value::Null);
                non_negative(at, rolling, "partition", errors);
            }
            _ => {
                let detail = "must be 'RollingUpdate' or 'OnDelete'";
                errors.push(field::Error::invalid("spec.updateStrategy", strategy.clone(), detail));
            }
        }
        non_negative("spec", spec, "minReadySeconds", errors);
        non_negative("spec.ordinals", spec.at("ordinals").unwrap_or(&Value::Null), "start", errors);
        let retention = spec.at("persistentVolumeClaimRetentionPolicy").unwrap_or(&Value::Null);
        for name in ["whenDeleted", "whenScaled"] {
            one_of(
                "spec.persistentVolumeClaimRetentionPolicy",
                retention,
                name,
                &["Delete", "Retain"],
                errors,
            );
        }
        // Containers mount the claims by the names of their templates.
        let mut whole = spec.clone();
        let mut volumes = spec.list_at("template.spec.volumes").to_vec();
        let claims = spec.list_at("volumeClaimTemplates").iter().map(|c| c.name().to_owned());
        let own: Vec<String> = volumes.iter().map(|v| v.str_at("name").to_owned()).collect();
        volumes.extend(
            claims.filter(|name| !own.contains(name)).map(|name| json!({ "name": name, "emptyDir": {} })),
        );
        if !volumes.is_empty() && whole.at("template.spec").is_some() {
            whole.set_at("template.spec.volumes", volumes);
        }
        workload(&whole, "statefulset", errors);
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
    validate: |object, errors| {
        if object.at("data").is_none() {
            errors.push(field::Error::required("data", "data is mandatory"));
        }
        non_negative("", object, "revision", errors);
    },
    validate_update: |new, old, errors| immutable("data", new, old, errors),
    ..Rules::DEFAULT
};

/// Status writers change status alone; labels and the like are the main resource's.
fn update_status(new: &mut Value, old: &Value) {
    keep(new, old, "spec");
    keep(new, old, "metadata.labels");
}

/// Replicas, selector and template of a workload.
fn workload(spec: &Value, kind: &str, errors: &mut Errors) {
    if kind != "daemonset" {
        non_negative("spec", spec, "replicas", errors);
    }
    match spec.at("selector") {
        None => {
            errors.push(field::Error::required("spec.selector", ""));
            // No selector selects nothing, so no template matches it; upstream says both.
            template_mismatch(spec, errors);
        }
        Some(selector) => {
            let before = errors.len();
            label_selector("spec.selector", Some(selector), errors);
            let bad = errors.len() > before;
            let chosen = LabelSelector::from_value(Some(selector));
            if bad {
                if kind != "daemonset" {
                    let detail = if kind == "statefulset" { "" } else { "invalid label selector" };
                    errors.push(field::Error::invalid("spec.selector", selector.clone(), detail));
                }
            } else if chosen.is_everything() {
                let detail = format!("empty selector is invalid for {kind}");
                errors.push(field::Error::invalid("spec.selector", selector.clone(), detail));
            } else {
                template_matches(spec, &chosen, errors);
            }
        }
    }
    validate_template("spec.template", spec.at("template").unwrap_or(&Value::Null), errors);
    always_restarts(spec, errors);
}

fn template_matches(spec: &Value, selector: &LabelSelector, errors: &mut Errors) {
    let labels = spec.map_at("template.metadata.labels");
    if !selector.matches(labels) {
        template_mismatch(spec, errors);
    }
}

fn template_mismatch(spec: &Value, errors: &mut Errors) {
    let value = spec.at("template.metadata.labels").cloned().unwrap_or(Value::Null);
    let detail = "`selector` does not match template `labels`";
    errors.push(field::Error::invalid("spec.template.metadata.labels", value, detail));
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
