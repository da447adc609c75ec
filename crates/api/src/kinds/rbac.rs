//! Strategies of roles and bindings.

use serde_json::Value;

use crate::field;
use crate::names;
use crate::object::Object;
use crate::rules::{Errors, Rules, label_selector, named};

pub const ROLE: Rules = Rules {
    name: names::path_segment,
    generation: false,
    create_on_update: true,
    validate: |object, errors| {
        let cluster = object.namespace().is_empty();
        for (index, selector) in object.list_at("aggregationRule.clusterRoleSelectors").iter().enumerate() {
            let at = field::index("aggregationRule.clusterRoleSelectors", index);
            let before = errors.len();
            label_selector(&at, Some(selector), errors);
            if errors.len() > before {
                // Upstream shows the selector it could not make.
                errors.push(field::Error::invalid(at, "null", "invalid label selector."));
            }
        }
        for (index, rule) in object.list_at("rules").iter().enumerate() {
            policy_rule(&field::index("rules", index), rule, cluster, errors);
        }
    },
    ..Rules::DEFAULT
};

fn policy_rule(at: &str, rule: &Value, cluster: bool, errors: &mut Errors) {
    if rule.list_at("verbs").is_empty() {
        errors
            .push(field::Error::required(field::child(at, "verbs"), "verbs must contain at least one value"));
    }
    if !rule.list_at("nonResourceURLs").is_empty() {
        if !cluster {
            let detail = "namespaced rules cannot apply to non-resource URLs";
            let value = rule.list_at("nonResourceURLs").to_vec();
            errors.push(field::Error::invalid(field::child(at, "nonResourceURLs"), value, detail));
        }
        if !rule.list_at("resources").is_empty() || !rule.list_at("apiGroups").is_empty() {
            let detail = "rules cannot apply to both regular resources and non-resource URLs";
            let value = rule.list_at("nonResourceURLs").to_vec();
            errors.push(field::Error::invalid(field::child(at, "nonResourceURLs"), value, detail));
        }
        return;
    }
    if rule.list_at("apiGroups").is_empty() {
        let detail = "resource rules must supply at least one api group";
        errors.push(field::Error::required(field::child(at, "apiGroups"), detail));
    }
    if rule.list_at("resources").is_empty() {
        let detail = "resource rules must supply at least one resource";
        errors.push(field::Error::required(field::child(at, "resources"), detail));
    }
}

pub const BINDING: Rules = Rules {
    name: names::path_segment,
    generation: false,
    create_on_update: true,
    validate: |object, errors| {
        let group = object.str_at("roleRef.apiGroup");
        if group != GROUP {
            errors.push(field::Error::not_supported("roleRef.apiGroup", group, &[GROUP]));
        }
        let kinds: &[&str] =
            if object.namespace().is_empty() { &["ClusterRole"] } else { &["Role", "ClusterRole"] };
        let kind = object.str_at("roleRef.kind");
        if !kinds.contains(&kind) {
            errors.push(field::Error::not_supported("roleRef.kind", kind, kinds));
        }
        if object.str_at("roleRef.name").is_empty() {
            errors.push(field::Error::required("roleRef.name", ""));
        }
        for (index, subject) in object.list_at("subjects").iter().enumerate() {
            validate_subject(
                &field::index("subjects", index),
                subject,
                object.namespace().is_empty(),
                errors,
            );
        }
    },
    validate_update: |new, old, errors| {
        if new.at("roleRef") != old.at("roleRef") {
            let value = new.at("roleRef").cloned().unwrap_or(Value::Null);
            errors.push(field::Error::invalid("roleRef", value, "cannot change roleRef"));
        }
    },
    ..Rules::DEFAULT
};

const GROUP: &str = "rbac.authorization.k8s.io";

fn validate_subject(at: &str, subject: &Value, cluster: bool, errors: &mut Errors) {
    if subject.str_at("name").is_empty() {
        errors.push(field::Error::required(field::child(at, "name"), ""));
    }
    let group = subject.str_at("apiGroup");
    match subject.str_at("kind") {
        "ServiceAccount" => {
            if !subject.str_at("name").is_empty() {
                named(&field::child(at, "name"), subject.str_at("name"), names::dns_subdomain, errors);
            }
            if !group.is_empty() {
                errors.push(field::Error::not_supported(field::child(at, "apiGroup"), group, &[""]));
            }
            if cluster && subject.str_at("namespace").is_empty() {
                errors.push(field::Error::required(field::child(at, "namespace"), ""));
            }
        }
        "User" | "Group" => {
            if group != GROUP {
                errors.push(field::Error::not_supported(field::child(at, "apiGroup"), group, &[GROUP]));
            }
        }
        other => errors.push(field::Error::not_supported(
            field::child(at, "kind"),
            other,
            &["ServiceAccount", "User", "Group"],
        )),
    }
}
