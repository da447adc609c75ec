//! What a node may do: the Node authorizer and NodeRestriction.
//!
//! A kubelet (`system:node:NAME` in `system:nodes`) reads the Secrets, ConfigMaps, claims and volumes of the
//! pods bound to it, and nobody else's; it writes its own Node, Lease, CSINode, and the status of its pods.
//! There is no graph to keep: a question looks at the pods of one namespace in the store's memory, and
//! decodes only those on the node.

use std::collections::HashSet;
use std::sync::{Arc, LazyLock};

use knarr_api::object::Object;
use knarr_api::rules::Rules;
use knarr_api::schema::Schema;
use knarr_api::status::{Result, Status};
use knarr_store::{Entry, Range, Store};
use serde_json::Value;

use crate::admission::{Attributes, Operation};
use crate::encode::{self, View};
use crate::identity::User;
use crate::rbac::{Action, PolicyRule};
use crate::registry::{Endpoint, Place, Registry};

const GROUP: &str = "system:nodes";
const PREFIX: &str = "system:node:";
const LEASES: &str = "kube-node-lease";

/// The node a user is, if it is one.
pub fn node_of(user: &User) -> Option<&str> {
    user.name.strip_prefix(PREFIX).filter(|name| !name.is_empty() && user.is_in(GROUP))
}

/// Does the Node authorizer allow it? A "no" leaves the question to RBAC.
pub fn allows(store: &dyn Store, node: &str, action: &Action) -> bool {
    if action.path.is_some() {
        return false;
    }
    let graph = Graph { store, node };
    let read = matches!(action.verb, "get" | "list" | "watch");
    // A create names nothing in its path; admission looks at what is created.
    let creates = action.verb == "create";
    let one = !matches!(action.verb, "list" | "watch" | "deletecollection");
    match (action.group, action.resource, action.subresource) {
        ("coordination.k8s.io", "leases", "") => {
            action.namespace == LEASES && (creates || one && action.name == node)
        }
        ("storage.k8s.io", "csinodes", "") => creates || one && action.name == node,
        ("", "secrets" | "configmaps", "") => {
            read && !action.name.is_empty() && graph.refers(action.namespace, action.resource, action.name)
        }
        ("", "persistentvolumeclaims", "") => {
            action.verb == "get" && graph.refers(action.namespace, "persistentvolumeclaims", action.name)
        }
        ("", "persistentvolumeclaims", "status") => {
            matches!(action.verb, "update" | "patch")
                && graph.refers(action.namespace, "persistentvolumeclaims", action.name)
        }
        ("", "persistentvolumes", "") => action.verb == "get" && graph.uses_volume(action.name),
        ("storage.k8s.io", "volumeattachments", "") => {
            action.verb == "get" && graph.has_attachment(action.name)
        }
        ("", "serviceaccounts", "token") => {
            action.verb == "create" && graph.refers(action.namespace, "serviceaccounts", action.name)
        }
        _ => node_rules().iter().any(|rule| rule.allows(action)),
    }
}

/// What every node may do, whatever runs on it.
fn node_rules() -> &'static [PolicyRule] {
    static RULES: LazyLock<Vec<PolicyRule>> =
        LazyLock::new(|| crate::bootstrap::node_rules().iter().map(PolicyRule::read).collect());
    &RULES
}

struct Graph<'a> {
    store: &'a dyn Store,
    node: &'a str,
}

impl Graph<'_> {
    /// The pods of a namespace that are bound to the node; of all namespaces if empty.
    fn pods(&self, namespace: &str) -> impl Iterator<Item = Value> {
        static PODS: LazyLock<&'static Rules> = LazyLock::new(|| {
            Rules::of(Schema::builtin().resource("", "v1", "pods").expect("pods are built in"))
        });
        let range = Range { prefix: crate::registry::prefix(namespace), ..Range::default() };
        let entries = self.store.list("pods", &range).map(|l| l.entries).unwrap_or_default();
        let here = |entry: &Arc<Entry>| View::selectable(*PODS, entry).field("spec.nodeName") == self.node;
        entries.into_iter().filter(here).map(|entry| encode::decode(&entry)).collect::<Vec<_>>().into_iter()
    }

    fn refers(&self, namespace: &str, resource: &str, name: &str) -> bool {
        !namespace.is_empty()
            && self.pods(namespace).any(|pod| match resource {
                "serviceaccounts" => pod.str_at("spec.serviceAccountName") == name,
                _ => references(&pod).contains(&(resource, name.to_owned())),
            })
    }

    fn uses_volume(&self, volume: &str) -> bool {
        let Some(entry) = self.store.get("persistentvolumes", volume) else { return false };
        let volume = encode::decode(&entry);
        let (namespace, claim) =
            (volume.str_at("spec.claimRef.namespace"), volume.str_at("spec.claimRef.name"));
        !claim.is_empty() && self.refers(namespace, "persistentvolumeclaims", claim)
    }

    fn has_attachment(&self, name: &str) -> bool {
        let entry = self.store.get("volumeattachments.storage.k8s.io", name);
        entry.is_some_and(|entry| encode::decode(&entry).str_at("spec.nodeName") == self.node)
    }
}

/// Resource and name of everything of its namespace that a pod refers to.
fn references(pod: &Value) -> HashSet<(&'static str, String)> {
    let mut found = HashSet::new();
    let mut add = |resource: &'static str, name: &str| {
        if !name.is_empty() {
            found.insert((resource, name.to_owned()));
        }
    };
    for secret in pod.list_at("spec.imagePullSecrets") {
        add("secrets", secret.str_at("name"));
    }
    for list in ["spec.containers", "spec.initContainers", "spec.ephemeralContainers"] {
        for container in pod.list_at(list) {
            for env in container.list_at("env") {
                add("secrets", env.str_at("valueFrom.secretKeyRef.name"));
                add("configmaps", env.str_at("valueFrom.configMapKeyRef.name"));
            }
            for source in container.list_at("envFrom") {
                add("secrets", source.str_at("secretRef.name"));
                add("configmaps", source.str_at("configMapRef.name"));
            }
        }
    }
    for volume in pod.list_at("spec.volumes") {
        add("secrets", volume.str_at("secret.secretName"));
        add("configmaps", volume.str_at("configMap.name"));
        add("persistentvolumeclaims", volume.str_at("persistentVolumeClaim.claimName"));
        if volume.at("ephemeral").is_some() {
            add("persistentvolumeclaims", &format!("{}-{}", pod.name(), volume.str_at("name")));
        }
        for source in volume.list_at("projected.sources") {
            add("secrets", source.str_at("secret.name"));
            add("configmaps", source.str_at("configMap.name"));
        }
        for (_, source) in volume.as_object().into_iter().flatten() {
            for path in ["secretRef.name", "nodePublishSecretRef.name"] {
                add("secrets", source.str_at(path));
            }
        }
    }
    found
}

const MIRROR: &str = "kubernetes.io/config.mirror";

/// NodeRestriction: what a node writes concerns itself.
pub fn restrict(a: &Attributes, object: &Value) -> Result<()> {
    let Some(node) = node_of(&a.context.user) else { return Ok(()) };
    let refuse = |why: String| Err(Status::forbidden(a.place.kind, name_of(a, object), why));
    match a.place.kind.resource().as_str() {
        "pods" => restrict_pod(a, node, object),
        "nodes" => restrict_node(a, node, object),
        "leases.coordination.k8s.io" => {
            if a.place.namespace != LEASES {
                return refuse(format!("can only access leases in the {LEASES:?} system namespace"));
            }
            if name_of(a, object) != node {
                return refuse("can only access node lease with the same name as the requesting node".into());
            }
            Ok(())
        }
        "csinodes.storage.k8s.io" if name_of(a, object) != node => {
            refuse("can only access CSINode with the same name as the requesting node".into())
        }
        "persistentvolumeclaims" if a.endpoint != Endpoint::Status => {
            refuse("may only update PVC status".into())
        }
        _ => Ok(()),
    }
}

fn name_of<'a>(a: &'a Attributes, object: &'a Value) -> &'a str {
    if a.place.name.is_empty() { object.name() } else { a.place.name }
}

fn restrict_pod(a: &Attributes, node: &str, pod: &Value) -> Result<()> {
    let refuse = |why: String| Err(Status::forbidden(a.place.kind, name_of(a, pod), why));
    match (a.operation, a.endpoint) {
        (Operation::Create, _) => {
            let mirror = pod.map_at("metadata.annotations").is_some_and(|m| m.contains_key(MIRROR));
            if !mirror {
                return refuse(format!(
                    "pod does not have {MIRROR:?} annotation, node {node:?} can only create mirror pods"
                ));
            }
            if pod.str_at("spec.nodeName") != node {
                return refuse(format!(
                    "node {node:?} can only create pods with spec.nodeName set to itself"
                ));
            }
            if !pod.str_at("spec.serviceAccountName").is_empty() {
                return refuse(format!("node {node:?} can not create pods that reference a service account"));
            }
            let mut kinds: Vec<_> = references(pod).into_iter().map(|(resource, _)| resource).collect();
            kinds.sort_unstable();
            match kinds.first() {
                Some(resource) => {
                    refuse(format!("node {node:?} can not create pods that reference {resource}"))
                }
                None => Ok(()),
            }
        }
        (Operation::Delete, _) if pod.str_at("spec.nodeName") != node => {
            refuse(format!("node {node:?} can only delete pods with spec.nodeName set to itself"))
        }
        (Operation::Update, Endpoint::Status) => {
            let old = a.old.unwrap_or(pod);
            if old.str_at("spec.nodeName") != node {
                return refuse(format!(
                    "node {node:?} can only update pod status for pods with spec.nodeName set to itself"
                ));
            }
            if pod.at("metadata.labels") != old.at("metadata.labels") {
                return refuse(format!("node {node:?} cannot update labels through pod status"));
            }
            Ok(())
        }
        (Operation::Update, _) => refuse(format!(
            "unexpected operation \"UPDATE\", node {node:?} can only create and delete mirror pods"
        )),
        _ => Ok(()),
    }
}

/// Evictions are no update of the pod: their code asks here.
pub fn restrict_eviction(user: &User, kind: &knarr_api::schema::Kind, pod: &Value) -> Result<()> {
    match node_of(user) {
        Some(node) if pod.str_at("spec.nodeName") != node => {
            let why = format!("node {node} can only evict pods with spec.nodeName set to itself");
            Err(Status::forbidden(kind, pod.name(), why))
        }
        _ => Ok(()),
    }
}

/// A node asks for tokens of pods that are bound to it, and of nobody else.
pub fn restrict_token(registry: &Registry, place: Place, request: &Value, user: &User) -> Result<()> {
    let Some(node) = node_of(user) else { return Ok(()) };
    let refuse = |why: String| Err(Status::forbidden(place.kind, place.name, why));
    let bound = request.at("spec.boundObjectRef").unwrap_or(&Value::Null);
    let (name, uid) = (bound.str_at("name"), bound.str_at("uid"));
    if bound.str_at("kind") != "Pod" || bound.str_at("apiVersion") != "v1" || name.is_empty() {
        return refuse("node requested token not bound to a pod".into());
    }
    if uid.is_empty() {
        return refuse("node requested token with a pod binding without a uid".into());
    }
    let Some(pod) = registry.lookup("", "pods", place.namespace, name) else {
        let pods = registry.schema.resource("", "v1", "pods").expect("pods are built in");
        return Err(Status::not_found(pods, name));
    };
    if pod.uid() != uid {
        return refuse(format!(
            "the UID in the bound object reference ({uid}) does not match the UID in record. The object might have been deleted and then recreated"
        ));
    }
    if pod.str_at("spec.nodeName") != node {
        return refuse("node requested token bound to a pod scheduled on a different node".into());
    }
    Ok(())
}

fn restrict_node(a: &Attributes, node: &str, object: &Value) -> Result<()> {
    let name = name_of(a, object);
    let refuse = |why: String| Err(Status::forbidden(a.place.kind, name, why));
    if a.operation == Operation::Delete {
        return refuse(format!("node {node:?} is not allowed to delete node {name:?}"));
    }
    if name != node {
        return refuse(format!("node {node:?} is not allowed to modify node {name:?}"));
    }
    let Some(old) = a.old else {
        let set: Vec<&str> =
            labels(object).filter(|(key, _)| !is_own_label(key)).map(|(key, _)| key).collect();
        return match set[..] {
            [] => Ok(()),
            _ => refuse(format!("is not allowed to set the following labels: {}", set.join(", "))),
        };
    };
    if !keeps_taints(object, old) {
        return refuse(format!("node {node:?} is not allowed to modify taints"));
    }
    if object.at("metadata.ownerReferences") != old.at("metadata.ownerReferences") {
        return refuse(format!("node {node:?} is not allowed to modify ownerReferences"));
    }
    let (is, was): (HashSet<_>, HashSet<_>) = (labels(object).collect(), labels(old).collect());
    let mut changed: Vec<&str> =
        is.symmetric_difference(&was).map(|(key, _)| *key).filter(|key| !is_own_label(key)).collect();
    changed.sort_unstable();
    changed.dedup();
    match changed[..] {
        [] => Ok(()),
        _ => refuse(format!("is not allowed to modify labels: {}", changed.join(", "))),
    }
}

/// The built-in kubelet takes its own not-ready taint away, so that first pods wait for nobody else.
fn keeps_taints(new: &Value, old: &Value) -> bool {
    let all = |object: &Value| object.list_at("spec.taints").to_vec();
    let not_ready = |taint: &Value| taint.str_at("key") == "node.kubernetes.io/not-ready";
    let without: Vec<Value> = all(old).into_iter().filter(|t| !not_ready(t)).collect();
    all(new) == all(old) || all(new) == without
}

fn labels(object: &Value) -> impl Iterator<Item = (&str, &str)> {
    let all = object.map_at("metadata.labels").into_iter().flatten();
    all.map(|(key, value)| (key.as_str(), value.as_str().unwrap_or_default()))
}

/// Labels of the system's domains that a kubelet sets on its own node. Others' domains are free.
fn is_own_label(key: &str) -> bool {
    const OWN: [&str; 13] = [
        "beta.kubernetes.io/arch",
        "beta.kubernetes.io/instance-type",
        "beta.kubernetes.io/os",
        "failure-domain.beta.kubernetes.io/region",
        "failure-domain.beta.kubernetes.io/zone",
        "kubernetes.io/arch",
        "kubernetes.io/hostname",
        "kubernetes.io/os",
        "node.kubernetes.io/instance-type",
        "topology.kubernetes.io/region",
        "topology.kubernetes.io/zone",
        // The built-in node of a server says so by itself; see docs/gaps.md.
        "node-role.kubernetes.io/control-plane",
        "node.kubernetes.io/windows-build",
    ];
    let Some((domain, _)) = key.split_once('/') else { return true };
    let under = |suffix: &str| domain == suffix || domain.ends_with(&format!(".{suffix}"));
    let system = under("kubernetes.io") || under("k8s.io");
    !system || OWN.contains(&key) || under("kubelet.kubernetes.io") || under("node.kubernetes.io")
}
