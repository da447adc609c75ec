//! Nobody grants what they do not hold: roles and bindings are checked against the writer's own rules.

use std::collections::BTreeMap;

use knarr_api::object::Object;
use knarr_api::status::{Result, Status};
use serde_json::Value;

use crate::admission::{Attributes, Operation};
use crate::identity::{MASTERS, User};
use crate::rbac::{Action, PolicyRule, Rbac};

const GROUP: &str = "rbac.authorization.k8s.io";

/// Refuses a role with rules, or a binding to a role with rules, that the writer does not have.
pub fn check(a: &Attributes, object: &Value) -> Result<()> {
    let (Some(rbac), user) = (&a.context.rbac, &a.context.user) else { return Ok(()) };
    let kind = a.place.kind;
    if kind.group != GROUP || a.operation == Operation::Delete || user.is_in(MASTERS) {
        return Ok(());
    }
    let namespace = a.place.namespace;
    let name = if a.place.name.is_empty() { object.name() } else { a.place.name };
    let may = |verb: &str, resource: &str, name: &str| {
        let action = Action { verb, group: GROUP, resource, subresource: "", namespace, name, path: None };
        rbac.allows(user, &action)
    };
    let refuse = |why: String| Status::forbidden(kind, name, why);
    match kind.plural.as_str() {
        "roles" | "clusterroles" => {
            let unchanged = a.old.is_some_and(|old| {
                old.at("rules") == object.at("rules")
                    && old.at("aggregationRule") == object.at("aggregationRule")
            });
            if unchanged || may("escalate", &kind.plural, name) {
                return Ok(());
            }
            let everything = [all_resources(), all_urls()];
            if object.at("aggregationRule").is_some() && !missing(rbac, user, "", &everything).is_empty() {
                return Err(refuse("must have cluster-admin privileges to use an aggregationRule".into()));
            }
            let rules: Vec<PolicyRule> = object.list_at("rules").iter().map(PolicyRule::read).collect();
            judge(rbac, user, namespace, &rules).map_err(refuse)
        }
        "rolebindings" | "clusterrolebindings" => {
            let unchanged = a.old.is_some_and(|old| {
                old.at("roleRef") == object.at("roleRef") && old.at("subjects") == object.at("subjects")
            });
            let (role_kind, role) = (object.str_at("roleRef.kind"), object.str_at("roleRef.name"));
            let plural = if role_kind == "ClusterRole" { "clusterroles" } else { "roles" };
            if unchanged || may("bind", plural, role) {
                return Ok(());
            }
            let Some(rules) = rbac.rules_of(role_kind, namespace, role) else {
                let found = a.registry.schema.resource(GROUP, "v1", plural).expect("roles are built in");
                return Err(Status::not_found(found, role));
            };
            judge(rbac, user, namespace, &rules).map_err(refuse)
        }
        _ => Ok(()),
    }
}

fn all_resources() -> PolicyRule {
    let star = || vec!["*".to_owned()];
    PolicyRule { verbs: star(), groups: star(), resources: star(), ..PolicyRule::default() }
}

fn all_urls() -> PolicyRule {
    PolicyRule { verbs: vec!["*".to_owned()], urls: vec!["*".to_owned()], ..PolicyRule::default() }
}

fn judge(rbac: &Rbac, user: &User, namespace: &str, rules: &[PolicyRule]) -> std::result::Result<(), String> {
    let missing = missing(rbac, user, namespace, rules);
    if missing.is_empty() {
        return Ok(());
    }
    let groups: Vec<String> = user.groups.iter().map(|g| format!("{g:?}")).collect();
    Err(format!(
        "user {:?} (groups=[{}]) is attempting to grant RBAC permissions not currently held:\n{}",
        user.name,
        groups.join(" "),
        compact(&missing).join("\n")
    ))
}

/// The parts of the rules, each with one verb and one thing, that the user does not have in the namespace.
fn missing(rbac: &Rbac, user: &User, namespace: &str, rules: &[PolicyRule]) -> Vec<PolicyRule> {
    let held = rbac.rules_for(user, namespace);
    let parts = rules.iter().flat_map(split);
    parts.filter(|part| !held.iter().any(|rule| covers(rule, part))).collect()
}

fn split(rule: &PolicyRule) -> Vec<PolicyRule> {
    let mut parts = Vec::new();
    let one = |text: &String| vec![text.clone()];
    for verb in &rule.verbs {
        for group in &rule.groups {
            for resource in &rule.resources {
                let part = PolicyRule {
                    verbs: one(verb),
                    groups: one(group),
                    resources: one(resource),
                    ..PolicyRule::default()
                };
                if rule.names.is_empty() {
                    parts.push(part);
                } else {
                    parts.extend(
                        rule.names.iter().map(|name| PolicyRule { names: one(name), ..part.clone() }),
                    );
                }
            }
        }
        for url in &rule.urls {
            parts.push(PolicyRule { verbs: one(verb), urls: one(url), ..PolicyRule::default() });
        }
    }
    parts
}

/// Does the rule allow all that the part (one of each) allows?
fn covers(rule: &PolicyRule, part: &PolicyRule) -> bool {
    let has = |list: &[String], wanted: &[String]| {
        wanted.iter().all(|w| list.iter().any(|have| have == "*" || have == w))
    };
    let resource = |wanted: &String| {
        rule.resources.iter().any(|have| {
            have == "*"
                || have == wanted
                || match (have.strip_prefix("*/"), wanted.split_once('/')) {
                    (Some(sub), Some((_, wanted))) => sub == wanted,
                    _ => false,
                }
        })
    };
    let url = |wanted: &String| {
        rule.urls.iter().any(|have| {
            have == wanted || have.strip_suffix('*').is_some_and(|prefix| wanted.starts_with(prefix))
        })
    };
    if !has(&rule.verbs, &part.verbs) {
        return false;
    }
    if !part.urls.is_empty() {
        return part.urls.iter().all(url);
    }
    let named = rule.names.is_empty()
        || (!part.names.is_empty() && part.names.iter().all(|n| rule.names.contains(n)));
    has(&rule.groups, &part.groups) && part.resources.iter().all(resource) && named
}

/// Rules that differ in their verbs alone become one; each printed as upstream does, sorted.
fn compact(rules: &[PolicyRule]) -> Vec<String> {
    let mut merged: BTreeMap<String, (PolicyRule, Vec<String>)> = BTreeMap::new();
    for rule in rules {
        let key = show(&PolicyRule { verbs: Vec::new(), ..rule.clone() });
        let (_, verbs) = merged.entry(key).or_insert_with(|| (rule.clone(), Vec::new()));
        verbs.extend(rule.verbs.iter().cloned());
    }
    let shown = merged.into_values().map(|(rule, verbs)| show(&PolicyRule { verbs, ..rule }));
    let mut shown: Vec<String> = shown.collect();
    shown.sort();
    shown
}

fn show(rule: &PolicyRule) -> String {
    let lists = [
        ("APIGroups", &rule.groups),
        ("Resources", &rule.resources),
        ("NonResourceURLs", &rule.urls),
        ("ResourceNames", &rule.names),
        ("Verbs", &rule.verbs),
    ];
    let quoted = |list: &[String]| list.iter().map(|v| format!("{v:?}")).collect::<Vec<_>>().join(" ");
    let parts =
        lists.iter().filter(|(_, l)| !l.is_empty()).map(|(name, l)| format!("{name}:[{}]", quoted(l)));
    format!("{{{}}}", parts.collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn missing_rules_are_split_compared_and_shown_as_upstream_does() {
        let rule = |value| PolicyRule::read(&value);
        let wanted = rule(json!({"verbs":["get","list","delete"],"apiGroups":[""],"resources":["pods"]}));
        let held = rule(json!({"verbs":["get"],"apiGroups":["*"],"resources":["*"]}));
        let left: Vec<PolicyRule> = split(&wanted).into_iter().filter(|part| !covers(&held, part)).collect();
        assert_eq!(compact(&left), [r#"{APIGroups:[""], Resources:["pods"], Verbs:["list" "delete"]}"#]);
        let narrow =
            rule(json!({"verbs":["get"],"apiGroups":[""],"resources":["pods"],"resourceNames":["a"]}));
        assert!(!split(&wanted).iter().any(|part| covers(&narrow, part)));
    }
}
