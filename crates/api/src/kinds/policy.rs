//! Strategies of disruption budgets and autoscalers.

use serde_json::{Value, json};

use crate::field::{self, child, index};
use crate::kinds::apps::{BAD_PERCENT, int_or_percent};
use crate::kinds::core::{keep, quantity};
use crate::names;
use crate::object::Object;
use crate::rules::{Errors, Rules, label_selector, named, one_of, required};

pub const DISRUPTION_BUDGET: Rules = Rules {
    name: names::path_segment,
    lenient_finalizers: true,
    create: |object| {
        object.set_at(
            "status",
            json!({ "currentHealthy": 0, "desiredHealthy": 0, "disruptionsAllowed": 0, "expectedPods": 0 }),
        )
    },
    update_status: |new, old| keep(new, old, "spec"),
    validate: |object, errors| {
        let spec = object.at("spec").unwrap_or(&Value::Null);
        if spec.at("minAvailable").is_some() && spec.at("maxUnavailable").is_some() {
            let detail = "minAvailable and maxUnavailable cannot be both set";
            errors.push(field::Error::invalid("spec", spec.clone(), detail));
        }
        for name in ["minAvailable", "maxUnavailable"] {
            let Some(value) = spec.at(name) else { continue };
            let at = child("spec", name);
            match int_or_percent(value) {
                None => errors.push(field::Error::invalid(at, value.clone(), BAD_PERCENT)),
                Some((number, _)) if number < 0 => {
                    let detail = "must be greater than or equal to 0";
                    errors.push(field::Error::invalid(at, value.clone(), detail));
                }
                Some((number, true)) if number > 100 => {
                    errors.push(field::Error::invalid(at, value.clone(), "must not be greater than 100%"));
                }
                Some(_) => {}
            }
        }
        label_selector("spec.selector", spec.at("selector"), errors);
        one_of("spec", spec, "unhealthyPodEvictionPolicy", &["AlwaysAllow", "IfHealthyBudget"], errors);
    },
    ..Rules::DEFAULT
};

pub const AUTOSCALER: Rules = Rules {
    create: |object| {
        let first = object.str_at("apiVersion") == "autoscaling/v1";
        let status = if first {
            json!({ "currentReplicas": 0, "desiredReplicas": 0 })
        } else {
            json!({ "currentMetrics": null, "desiredReplicas": 0 })
        };
        object.set_at("status", status);
    },
    update_status: |new, old| keep(new, old, "spec"),
    validate: |object, errors| {
        let spec = object.at("spec").unwrap_or(&Value::Null);
        let (least, most) = (spec.int_at("minReplicas"), spec.int_at("maxReplicas").unwrap_or(0));
        if let Some(least) = least.filter(|n| *n < 1) {
            let detail = "must be greater than or equal to 1";
            errors.push(field::Error::invalid("spec.minReplicas", least, detail));
        }
        if most < 1 {
            errors.push(field::Error::invalid("spec.maxReplicas", most, "must be greater than 0"));
        }
        if least.is_some_and(|least| most < least) {
            let detail = "must be greater than or equal to `minReplicas`";
            errors.push(field::Error::invalid("spec.maxReplicas", most, detail));
        }
        let target = spec.at("scaleTargetRef").unwrap_or(&Value::Null);
        object_reference("spec.scaleTargetRef", target, errors);
        for (i, metric) in spec.list_at("metrics").iter().enumerate() {
            metric_spec(&index("spec.metrics", i), metric, errors);
        }
        for direction in ["scaleUp", "scaleDown"] {
            let Some(rules) = spec.at("behavior").and_then(|b| b.at(direction)) else { continue };
            scaling_rules(&format!("spec.behavior.{direction}"), rules, errors);
        }
        if let Some(percent) = spec.int_at("targetCPUUtilizationPercentage").filter(|n| *n < 1) {
            let at = "spec.targetCPUUtilizationPercentage";
            errors.push(field::Error::invalid(at, percent, "must be greater than 0"));
        }
    },
    ..Rules::DEFAULT
};

fn object_reference(at: &str, reference: &Value, errors: &mut Errors) {
    for name in ["kind", "name"] {
        if required(at, reference, name, "", errors) {
            named(&child(at, name), reference.str_at(name), names::path_segment, errors);
        }
    }
}

/// The types of metric, and the field that describes each.
const METRIC_TYPES: [(&str, &str); 5] = [
    ("ContainerResource", "containerResource"),
    ("External", "external"),
    ("Object", "object"),
    ("Pods", "pods"),
    ("Resource", "resource"),
];

fn metric_spec(at: &str, metric: &Value, errors: &mut Errors) {
    let kind = metric.str_at("type");
    required(at, metric, "type", "must specify a metric source type", errors);
    let present: Vec<&str> =
        METRIC_TYPES.iter().map(|(_, f)| *f).filter(|f| metric.at(f).is_some()).collect();
    if let [first, ..] = present[..] {
        metric_source(&child(at, first), first, &metric[first], errors);
    }
    let Some((_, expected)) = METRIC_TYPES.iter().find(|(k, _)| *k == kind) else {
        let supported: Vec<&str> = METRIC_TYPES.iter().map(|(k, _)| *k).collect();
        let error = field::Error::not_supported(child(at, "type"), kind, &supported);
        errors.push(error);
        return;
    };
    if !present.contains(expected) {
        let detail = "must populate information for the given metric source";
        errors.push(field::Error::required(child(at, expected), detail));
    }
    if present.len() > 1 {
        for other in present.iter().filter(|p| *p != expected) {
            let detail = "must populate the given metric source only";
            errors.push(field::Error::forbidden(child(at, other), detail));
        }
    }
}

fn metric_source(at: &str, kind: &str, source: &Value, errors: &mut Errors) {
    let target = source.at("target").unwrap_or(&Value::Null);
    let target_at = child(at, "target");
    let forbid = |name: &str, detail: &str| field::Error::forbidden(child(&target_at, name), detail);
    match kind {
        "resource" | "containerResource" => {
            if kind == "containerResource" {
                required(at, source, "container", "must specify a container name", errors);
            }
            required(at, source, "name", "must specify a resource name", errors);
            metric_target(&target_at, target, errors);
            match (target.at("averageUtilization"), target.at("averageValue")) {
                (None, None) => errors.push(field::Error::required(
                    child(&target_at, "averageUtilization"),
                    "must set either a target raw value or a target utilization",
                )),
                (Some(_), Some(_)) => errors.push(forbid(
                    "averageValue",
                    "may not set both a target raw value and a target utilization",
                )),
                _ => {}
            }
            if target.at("value").is_some() {
                errors.push(forbid("value", "may not set the value"));
            }
        }
        _ => {
            if kind == "object" {
                let described = source.at("describedObject").unwrap_or(&Value::Null);
                object_reference(&child(at, "describedObject"), described, errors);
            }
            let metric = source.at("metric").unwrap_or(&Value::Null);
            if required(&child(at, "metric"), metric, "name", "must specify a metric name", errors) {
                named(&child(at, "metric.name"), metric.str_at("name"), names::path_segment, errors);
            }
            label_selector(&child(at, "metric.selector"), metric.at("selector"), errors);
            metric_target(&target_at, target, errors);
            let positive =
                |name: &str| quantity(target.at(name)).is_some_and(|q| !q.is_zero() && !q.is_negative());
            if kind == "pods" && !positive("averageValue") {
                let detail = "must specify a positive target averageValue";
                errors.push(field::Error::required(child(&target_at, "averageValue"), detail));
            }
            if kind != "pods" && target.at("value").is_none() && target.at("averageValue").is_none() {
                let detail = "must set either a target value for metric or a per-pod target";
                errors.push(field::Error::required(child(&target_at, "averageValue"), detail));
            }
        }
    }
}

fn metric_target(at: &str, target: &Value, errors: &mut Errors) {
    let kind = target.str_at("type");
    required(at, target, "type", "must specify a metric target type", errors);
    if !["Utilization", "Value", "AverageValue"].contains(&kind) {
        let detail = "must be either Utilization, Value, or AverageValue";
        errors.push(field::Error::invalid(child(at, "type"), kind, detail));
    }
    for name in ["value", "averageValue"] {
        if quantity(target.at(name)).is_some_and(|q| q.is_zero() || q.is_negative()) {
            errors.push(field::Error::invalid(child(at, name), target[name].clone(), "must be positive"));
        }
    }
    if let Some(percent) = target.int_at("averageUtilization").filter(|n| *n < 1) {
        let path = child(at, "averageUtilization");
        errors.push(field::Error::invalid(path, percent, "must be greater than 0"));
    }
}

fn bounded(at: &str, object: &Value, name: &str, least: i64, most: i64, errors: &mut Errors) {
    let number = object.int_at(name).unwrap_or(0);
    if number < least {
        let detail =
            if least == 0 { "must be greater than or equal to zero" } else { "must be greater than zero" };
        errors.push(field::Error::invalid(child(at, name), number, detail));
    }
    if number > most {
        let detail = format!("must be less than or equal to {most}");
        errors.push(field::Error::invalid(child(at, name), number, detail));
    }
}

fn scaling_rules(at: &str, rules: &Value, errors: &mut Errors) {
    bounded(at, rules, "stabilizationWindowSeconds", 0, 3600, errors);
    one_of(at, rules, "selectPolicy", &["Disabled", "Max", "Min"], errors);
    required(at, rules, "policies", "must specify at least one Policy", errors);
    for (i, policy) in rules.list_at("policies").iter().enumerate() {
        let at = index(&child(at, "policies"), i);
        if !["Percent", "Pods"].contains(&policy.str_at("type")) {
            let error =
                field::Error::not_supported(child(&at, "type"), policy.str_at("type"), &["Percent", "Pods"]);
            errors.push(error);
        }
        bounded(&at, policy, "value", 1, i64::MAX, errors);
        bounded(&at, policy, "periodSeconds", 1, 1800, errors);
    }
}
