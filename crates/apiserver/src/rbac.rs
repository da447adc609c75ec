//! Role-based access control: may this user do that?
//!
//! The roles and bindings are read into an index once per change of theirs, so that a decision looks at
//! a few rules in memory and decodes nothing.

use std::collections::HashMap;
use std::sync::Arc;

use knarr_api::object::Object;
use knarr_api::status::Status;
use knarr_store::{Range, Revision, Store};
use parking_lot::RwLock;
use serde_json::{Value, json};

use crate::encode;
use crate::identity::{MASTERS, User};

/// What is to be done.
#[derive(Debug, Clone, Copy)]
pub struct Action<'a> {
    pub verb: &'a str,
    /// Empty for paths that are no resource.
    pub group: &'a str,
    pub resource: &'a str,
    pub subresource: &'a str,
    pub namespace: &'a str,
    pub name: &'a str,
    /// For paths that are no resource.
    pub path: Option<&'a str>,
}

impl Action<'_> {
    /// What is to be done, and why not, in upstream's words.
    pub fn forbidden(&self, user: &User) -> Box<Status> {
        if let Some(path) = self.path {
            let text = format!("forbidden: User {:?} cannot {} path {path:?}", user.name, self.verb);
            let mut status = Status::new(403, "Forbidden", text);
            status.details = Some(json!({}));
            return status;
        }
        let resource = match self.subresource {
            "" => self.resource.to_owned(),
            sub => format!("{}/{sub}", self.resource),
        };
        let whereabouts = match self.namespace {
            "" => "at the cluster scope".to_owned(),
            namespace => format!("in the namespace {namespace:?}"),
        };
        let qualified = match self.group {
            "" => self.resource.to_owned(),
            group => format!("{}.{group}", self.resource),
        };
        let subject = if self.name.is_empty() { qualified } else { format!("{qualified} {:?}", self.name) };
        let text = format!(
            "{subject} is forbidden: User {:?} cannot {} resource {resource:?} in API group {:?} {whereabouts}",
            user.name, self.verb, self.group
        );
        let mut status = Status::new(403, "Forbidden", text);
        let mut details = json!({ "kind": self.resource });
        if !self.name.is_empty() {
            details["name"] = json!(self.name);
        }
        if !self.group.is_empty() {
            details["group"] = json!(self.group);
        }
        status.details = Some(details);
        status
    }
}

/// The authorizer: the Node authorizer for nodes, then roles.
#[derive(Clone)]
pub struct Rbac {
    store: Arc<dyn Store>,
    index: Arc<RwLock<Arc<Index>>>,
}

const SOURCES: [&str; 4] = [
    "clusterroles.rbac.authorization.k8s.io",
    "clusterrolebindings.rbac.authorization.k8s.io",
    "roles.rbac.authorization.k8s.io",
    "rolebindings.rbac.authorization.k8s.io",
];

#[derive(Default)]
struct Index {
    /// The revision of each source when the index was made.
    made_from: [Revision; 4],
    /// Rules granted to each subject, with the namespace they hold in; everywhere if `None`.
    grants: HashMap<Subject, Vec<Grant>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Subject {
    User(String),
    Group(String),
}

struct Grant {
    namespace: Option<String>,
    rules: Arc<Vec<PolicyRule>>,
}

/// One rule of a role, in sets of strings; `*` stands for everything.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct PolicyRule {
    pub verbs: Vec<String>,
    pub groups: Vec<String>,
    pub resources: Vec<String>,
    pub names: Vec<String>,
    pub urls: Vec<String>,
}

impl Rbac {
    pub fn new(store: Arc<dyn Store>) -> Self {
        Rbac { store, index: Arc::default() }
    }

    pub fn allows(&self, user: &User, action: &Action) -> bool {
        if user.is_in(MASTERS) {
            return true;
        }
        if crate::node::node_of(user)
            .is_some_and(|node| crate::node::allows(self.store.as_ref(), node, action))
        {
            return true;
        }
        let index = self.current();
        index.grants_of(user).any(|grant| grant.allows(action))
    }

    /// The rules of a role, as a binding in `namespace` refers to it.
    pub fn rules_of(&self, kind: &str, namespace: &str, name: &str) -> Option<Vec<PolicyRule>> {
        let (source, key) = match kind {
            "ClusterRole" => (SOURCES[0], name.to_owned()),
            _ => (SOURCES[2], encode::key(namespace, name)),
        };
        let role = encode::decode(&*self.store.get(source, &key)?);
        Some(role.list_at("rules").iter().map(PolicyRule::read).collect())
    }

    /// Every rule that holds for the user in a namespace: what `kubectl auth can-i --list` shows.
    pub fn rules_for(&self, user: &User, namespace: &str) -> Vec<PolicyRule> {
        let index = self.current();
        let grants = index.grants_of(user).filter(|g| g.namespace.as_deref().is_none_or(|n| n == namespace));
        let mut rules: Vec<PolicyRule> = grants.flat_map(|g| g.rules.iter().cloned()).collect();
        if user.is_in(MASTERS) {
            let all = || vec!["*".to_owned()];
            rules.push(PolicyRule { verbs: all(), groups: all(), resources: all(), ..PolicyRule::default() });
            rules.push(PolicyRule { verbs: all(), urls: all(), ..PolicyRule::default() });
        }
        rules
    }

    fn current(&self) -> Arc<Index> {
        let newest = SOURCES.map(|source| self.store.changed(source));
        let known = self.index.read().clone();
        if known.made_from == newest && newest != [0; 4] {
            return known;
        }
        let fresh = Arc::new(Index::build(self.store.as_ref(), newest));
        *self.index.write() = fresh.clone();
        fresh
    }
}

impl Index {
    fn build(store: &dyn Store, made_from: [Revision; 4]) -> Index {
        let objects = |source: &str| -> Vec<Value> {
            let listing = store.list(source, &Range::default());
            listing.map(|l| l.entries.iter().map(|e| encode::decode(e)).collect()).unwrap_or_default()
        };
        let rules_by_role = |source: &str| -> HashMap<(String, String), Arc<Vec<PolicyRule>>> {
            objects(source)
                .iter()
                .map(|role| {
                    let rules = role.list_at("rules").iter().map(PolicyRule::read).collect();
                    ((role.namespace().to_owned(), role.name().to_owned()), Arc::new(rules))
                })
                .collect()
        };
        let (cluster_roles, roles) = (rules_by_role(SOURCES[0]), rules_by_role(SOURCES[2]));
        let mut grants: HashMap<Subject, Vec<Grant>> = HashMap::new();
        for binding in objects(SOURCES[1]).iter().chain(&objects(SOURCES[3])) {
            let namespace = binding.namespace();
            let name = binding.str_at("roleRef.name").to_owned();
            let rules = match binding.str_at("roleRef.kind") {
                "ClusterRole" => cluster_roles.get(&(String::new(), name)),
                _ => roles.get(&(namespace.to_owned(), name)),
            };
            let Some(rules) = rules else { continue };
            for subject in binding.list_at("subjects") {
                let Some(subject) = Subject::read(subject, namespace) else { continue };
                let namespace = (!namespace.is_empty()).then(|| namespace.to_owned());
                grants.entry(subject).or_default().push(Grant { namespace, rules: rules.clone() });
            }
        }
        Index { made_from, grants }
    }

    fn grants_of<'a>(&'a self, user: &'a User) -> impl Iterator<Item = &'a Grant> {
        let own = std::iter::once(Subject::User(user.name.clone()));
        let groups = user.groups.iter().map(|g| Subject::Group(g.clone()));
        own.chain(groups).filter_map(|s| self.grants.get(&s)).flatten()
    }
}

impl Subject {
    fn read(subject: &Value, namespace: &str) -> Option<Subject> {
        let name = subject.str_at("name").to_owned();
        match subject.str_at("kind") {
            "User" => Some(Subject::User(name)),
            "Group" => Some(Subject::Group(name)),
            "ServiceAccount" => {
                let own = subject.str_at("namespace");
                let namespace = if own.is_empty() { namespace } else { own };
                Some(Subject::User(format!("system:serviceaccount:{namespace}:{name}")))
            }
            _ => None,
        }
    }
}

impl Grant {
    fn allows(&self, action: &Action) -> bool {
        let here = match (&self.namespace, action.path) {
            (None, _) => true,
            (Some(_), Some(_)) => false,
            (Some(namespace), None) => namespace == action.namespace,
        };
        here && self.rules.iter().any(|rule| rule.allows(action))
    }
}

impl PolicyRule {
    pub fn read(rule: &Value) -> PolicyRule {
        let list = |name: &str| -> Vec<String> {
            rule.list_at(name).iter().filter_map(|v| v.as_str().map(str::to_owned)).collect()
        };
        PolicyRule {
            verbs: list("verbs"),
            groups: list("apiGroups"),
            resources: list("resources"),
            names: list("resourceNames"),
            urls: list("nonResourceURLs"),
        }
    }

    pub fn allows(&self, action: &Action) -> bool {
        let has = |list: &[String], value: &str| list.iter().any(|v| v == "*" || v == value);
        if !has(&self.verbs, action.verb) {
            return false;
        }
        if let Some(path) = action.path {
            return self.urls.iter().any(|url| match url.strip_suffix('*') {
                Some(prefix) => path.starts_with(prefix),
                None => url == path,
            });
        }
        has(&self.groups, action.group)
            && self.covers(action.resource, action.subresource)
            && (self.names.is_empty() || self.names.iter().any(|n| n == action.name))
    }

    /// `pods`, `pods/log`, `*/log` and `*`.
    fn covers(&self, resource: &str, subresource: &str) -> bool {
        self.resources.iter().any(|r| match (r.as_str(), subresource) {
            ("*", _) => true,
            (plain, "") => plain == resource,
            (with, _) => match with.split_once('/') {
                Some((left, right)) => (left == "*" || left == resource) && right == subresource,
                None => false,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn rules_cover_resources_subresources_names_and_urls() {
        let rule = PolicyRule::read(
            &json!({"verbs":["get"],"apiGroups":[""],"resources":["pods","pods/log"],"resourceNames":["a"]}),
        );
        let action = Action {
            verb: "get",
            group: "",
            resource: "pods",
            subresource: "",
            namespace: "x",
            name: "a",
            path: None,
        };
        assert!(rule.allows(&action));
        assert!(rule.allows(&Action { subresource: "log", ..action }));
        assert!(!rule.allows(&Action { subresource: "exec", ..action }));
        assert!(!rule.allows(&Action { name: "b", ..action }));
        assert!(!rule.allows(&Action { verb: "list", ..action }));
        let urls = PolicyRule::read(&json!({"verbs":["get"],"nonResourceURLs":["/healthz","/api/*"]}));
        assert!(urls.allows(&Action { path: Some("/api/v1"), ..action }));
        assert!(!urls.allows(&Action { path: Some("/metrics"), ..action }));
    }
}
