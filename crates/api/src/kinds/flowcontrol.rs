//! The strategies of flow control: FlowSchema and PriorityLevelConfiguration. Nothing acts on them yet; they are kept
//! to upstream's rules.

use serde_json::Value;

use crate::field::{self, child, index};
use crate::kinds::core::keep;
use crate::names;
use crate::object::Object;
use crate::rules::{Errors, Rules, named, one_of, required};

/// The one that others may not be as important as.
const EXEMPT: &str = "exempt";
const PRECEDENCE_MAX: i64 = 10_000;

pub const FLOW_SCHEMA: Rules = Rules {
    create: |object| object.set_at("status", serde_json::json!({})),
    update_status: |new, old| keep(new, old, "spec"),
    validate: flow_schema,
    ..Rules::DEFAULT
};

pub const PRIORITY_LEVEL: Rules = Rules {
    create: |object| object.set_at("status", serde_json::json!({})),
    update_status: |new, old| keep(new, old, "spec"),
    validate: priority_level,
    ..Rules::DEFAULT
};

fn flow_schema(object: &Value, errors: &mut Errors) {
    let spec = object.at("spec").unwrap_or(&Value::Null);
    let precedence = spec.int_at("matchingPrecedence").unwrap_or(0);
    let at = "spec.matchingPrecedence";
    if precedence <= 0 {
        errors.push(field::Error::invalid(at, precedence, "must be a positive value"));
    }
    if precedence > PRECEDENCE_MAX {
        let detail = format!("must not be greater than {PRECEDENCE_MAX}");
        errors.push(field::Error::invalid(at, precedence, detail));
    }
    if precedence == 1 && object.name() != EXEMPT {
        let detail = "only the schema named 'exempt' may have matchingPrecedence 1";
        errors.push(field::Error::invalid(at, precedence, detail));
    }
    if let Some(method) = spec.at("distinguisherMethod") {
        one_of("spec.distinguisherMethod", method, "type", &["ByNamespace", "ByUser"], errors);
    }
    let level = spec.str_at("priorityLevelConfiguration.name");
    let at = "spec.priorityLevelConfiguration.name";
    if level.is_empty() {
        errors.push(field::Error::required(at, "must reference a priority level"));
    } else {
        named(at, level, names::dns_subdomain, errors);
    }
    for (i, rule) in spec.list_at("rules").iter().enumerate() {
        policy_rule(&index("spec.rules", i), rule, errors);
    }
}

fn policy_rule(at: &str, rule: &Value, errors: &mut Errors) {
    if rule.list_at("subjects").is_empty() {
        let detail = "subjects must contain at least one value";
        errors.push(field::Error::required(child(at, "subjects"), detail));
    }
    for (i, subject) in rule.list_at("subjects").iter().enumerate() {
        validate_subject(&index(&child(at, "subjects"), i), subject, errors);
    }
    let (resources, others) = (rule.list_at("resourceRules"), rule.list_at("nonResourceRules"));
    if resources.is_empty() && others.is_empty() {
        let detail = "at least one of resourceRules and nonResourceRules has to be non-empty";
        errors.push(field::Error::required(at, detail));
    }
    for (i, rule) in resources.iter().enumerate() {
        let at = index(&child(at, "resourceRules"), i);
        wildcard_list(&at, rule, "verbs", "resourcePolicyRules must contain at least one verb", errors);
        wildcard_list(
            &at,
            rule,
            "apiGroups",
            "resourcePolicyRules must contain at least one api group",
            errors,
        );
        wildcard_list(
            &at,
            rule,
            "resources",
            "resourcePolicyRules must contain at least one resource",
            errors,
        );
        let namespaces = rule.list_at("namespaces");
        if namespaces.is_empty() && !rule.bool_at("clusterScope") {
            let detail =
                "resourcePolicyRules that are not cluster scoped must contain at least one namespace";
            errors.push(field::Error::required(child(&at, "namespaces"), detail));
        } else if namespaces.len() > 1 && namespaces.iter().any(|n| n == "*") {
            let detail = "if '*' is present, must not specify other namespaces";
            errors.push(field::Error::invalid(child(&at, "namespaces"), namespaces.to_vec(), detail));
        }
    }
    for (i, rule) in others.iter().enumerate() {
        let at = index(&child(at, "nonResourceRules"), i);
        wildcard_list(&at, rule, "verbs", "nonResourcePolicyRule must contain at least one verb", errors);
        let detail = "nonResourcePolicyRule must contain at least one nonResourceURL";
        wildcard_list(&at, rule, "nonResourceURLs", detail, errors);
    }
}

fn wildcard_list(at: &str, rule: &Value, name: &str, needed: &str, errors: &mut Errors) {
    let (path, items) = (child(at, name), rule.list_at(name));
    if items.is_empty() {
        errors.push(field::Error::required(path, needed));
    } else if items.len() > 1 && items.iter().any(|item| item == "*") {
        let what = match name {
            "apiGroups" => "api groups",
            "nonResourceURLs" => "non-resource URLs",
            other => other,
        };
        let detail = format!("if '*' is present, must not specify other {what}");
        errors.push(field::Error::invalid(path, items.to_vec(), detail));
    }
}

fn validate_subject(at: &str, subject: &Value, errors: &mut Errors) {
    let kind = subject.str_at("kind");
    for (member, of) in [("user", "User"), ("group", "Group"), ("serviceAccount", "ServiceAccount")] {
        let path = child(at, member);
        match (subject.at(member), kind == of) {
            (None, true) => {
                let detail = format!("{member} is required when subject kind is '{of}'");
                errors.push(field::Error::required(path, detail));
            }
            (Some(_), false) => {
                let detail = format!("{member} is forbidden when subject kind is not '{of}'");
                errors.push(field::Error::forbidden(path, detail));
            }
            (Some(given), true) => drop(required(&path, given, "name", "", errors)),
            (None, false) => {}
        }
    }
    if !["User", "Group", "ServiceAccount"].contains(&kind) {
        let known = ["Group", "ServiceAccount", "User"];
        errors.push(field::Error::not_supported(child(at, "kind"), kind, &known));
    }
}

fn priority_level(object: &Value, errors: &mut Errors) {
    let spec = object.at("spec").unwrap_or(&Value::Null);
    let kind = spec.str_at("type");
    if (object.name() == EXEMPT) != (kind == "Exempt") {
        let detail = "type must be 'Exempt' if and only if `name` is 'exempt'";
        errors.push(field::Error::invalid("spec.type", kind, detail));
    }
    let percent = |at: &str, holder: &Value, errors: &mut Errors| {
        if let Some(number) = holder.int_at("lendablePercent").filter(|n| !(0..=100).contains(n)) {
            let detail = "must be between 0 and 100, inclusive";
            errors.push(field::Error::invalid(child(at, "lendablePercent"), number, detail));
        }
        if let Some(number) = holder.int_at("nominalConcurrencyShares").filter(|n| *n < 0) {
            let detail = "must be a non-negative integer";
            errors.push(field::Error::invalid(child(at, "nominalConcurrencyShares"), number, detail));
        }
    };
    match kind {
        "Exempt" => {
            if spec.at("limited").is_some() {
                let detail = "must be nil if the type is not Limited";
                errors.push(field::Error::forbidden("spec.limited", detail));
            }
            percent("spec.exempt", spec.at("exempt").unwrap_or(&Value::Null), errors);
        }
        "Limited" => {
            if spec.at("exempt").is_some() {
                errors.push(field::Error::forbidden("spec.exempt", "must be nil if the type is Limited"));
            }
            match spec.at("limited") {
                None => errors
                    .push(field::Error::required("spec.limited", "must not be empty when type is Limited")),
                Some(limited) => {
                    percent("spec.limited", limited, errors);
                    limit_response(limited.at("limitResponse").unwrap_or(&Value::Null), errors);
                }
            }
        }
        other => errors.push(field::Error::not_supported("spec.type", other, &["Exempt", "Limited"])),
    }
}

fn limit_response(response: &Value, errors: &mut Errors) {
    let at = "spec.limited.limitResponse";
    let queuing = response.at("queuing");
    match response.str_at("type") {
        "Reject" if queuing.is_some() => {
            let detail = "must be nil if limited.limitResponse.type is not Limited";
            errors.push(field::Error::forbidden(child(at, "queuing"), detail));
        }
        "Reject" => {}
        "Queue" => {
            let Some(queuing) = queuing else {
                let detail = "must not be empty if limited.limitResponse.type is Limited";
                errors.push(field::Error::required(child(at, "queuing"), detail));
                return;
            };
            let at = child(at, "queuing");
            let number = |name: &str| queuing.int_at(name).unwrap_or(0);
            for name in ["queueLengthLimit", "queues"] {
                if number(name) <= 0 {
                    errors.push(field::Error::invalid(child(&at, name), number(name), "must be positive"));
                }
            }
            let (hand, queues) = (number("handSize"), number("queues"));
            if hand <= 0 {
                errors.push(field::Error::invalid(child(&at, "handSize"), hand, "must be positive"));
            } else if hand > queues {
                let detail = format!("should not be greater than queues ({queues})");
                errors.push(field::Error::invalid(child(&at, "handSize"), hand, detail));
            }
        }
        other => {
            let path = child(at, "type");
            errors.push(field::Error::not_supported(path, other, &["Queue", "Reject"]));
        }
    }
}
