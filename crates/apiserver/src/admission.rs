//! Built-in admission: what may enter the cluster, and what is added on the way in.
//!
//! Plugins are twins: a mutating or validating function over the same attributes, one line in the list.

use std::sync::Arc;

use knarr_api::object::Object;
use knarr_api::status::{Result, Status};
use serde_json::{Value, json};

use crate::registry::{Context, Endpoint, Place, Registry, generate_name};

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Operation {
    Create,
    Update,
    Delete,
}

/// What a plugin sees.
pub struct Attributes<'a> {
    pub registry: &'a Registry,
    pub operation: Operation,
    /// Which face of the object is written.
    pub endpoint: Endpoint,
    pub place: Place<'a>,
    pub old: Option<&'a Value>,
    pub context: &'a Context,
}

type Mutate = fn(&Attributes, &mut Value) -> Result<()>;
type Validate = fn(&Attributes, &Value) -> Result<()>;

/// In this order, as upstream runs them.
const MUTATING: &[(&str, Mutate)] = &[
    ("NamespaceLifecycle", |a, object| namespace_lifecycle(a, object)),
    ("LimitRanger", crate::limit_range::apply_defaults),
    ("ServiceAccount", service_account),
    ("TaintNodesByCondition", taint_new_nodes),
    ("Priority", priority),
    ("DefaultTolerationSeconds", default_toleration_seconds),
    ("DefaultStorageClass", crate::classes::default_storage_class),
    ("StorageObjectInUseProtection", protect_storage),
    ("RuntimeClass", crate::classes::runtime_class),
    ("DefaultIngressClass", crate::classes::default_ingress_class),
    ("CertificateSigningRequestIdentity", request_identity),
    ("CertificateSigningRequestTimes", crate::signing::date_conditions),
];

const VALIDATING: &[(&str, Validate)] = &[
    ("NamespaceLifecycle", |a, _| protect_namespaces(a)),
    ("LimitRanger", crate::limit_range::check),
    ("NodeRestriction", crate::node::restrict),
    ("PodSecurity", crate::pod_security::check),
    ("CertificateApprovalSigningSubjectRestriction", crate::signing::check),
    ("RBACEscalation", crate::escalation::check),
];

pub fn mutate(
    registry: &Registry,
    (operation, endpoint): (Operation, Endpoint),
    place: Place,
    object: &mut Value,
    old: Option<&Value>,
    context: &Context,
) -> Result<()> {
    let attributes = Attributes { registry, operation, endpoint, place, old, context };
    MUTATING.iter().try_for_each(|(_, plugin)| plugin(&attributes, object))
}

pub fn validate(
    registry: &Registry,
    (operation, endpoint): (Operation, Endpoint),
    place: Place,
    object: &Value,
    old: Option<&Value>,
    context: &Context,
) -> Result<()> {
    let attributes = Attributes { registry, operation, endpoint, place, old, context };
    VALIDATING.iter().try_for_each(|(_, plugin)| plugin(&attributes, object))
}

/// Nothing is created in a namespace that does not exist or is going away.
fn namespace_lifecycle(a: &Attributes, object: &Value) -> Result<()> {
    let Place { kind, namespace, .. } = a.place;
    if a.operation != Operation::Create || !kind.namespaced || namespace.is_empty() {
        return Ok(());
    }
    let Some(found) = a.registry.policy("namespaces", "", namespace) else {
        let namespaces = a.registry.schema.resource("", "v1", "namespaces").expect("namespaces are built in");
        return Err(Status::not_found(namespaces, namespace));
    };
    // Reviews and the like leave nothing behind.
    if found.at("metadata.deletionTimestamp").is_none() || kind.create_only {
        return Ok(());
    }
    let why = format!("unable to create new content in namespace {namespace} because it is being terminated");
    let mut status = Status::forbidden(kind, name_of(a, object), why);
    if let Some(details) = &mut status.details {
        details["causes"] = json!([{ "reason": "NamespaceTerminating",
            "message": format!("namespace {namespace} is being terminated"), "field": "metadata.namespace" }]);
    }
    Err(status)
}

/// What a refusal calls the object: its name, or what its name is to be made from.
fn name_of<'a>(a: &'a Attributes, object: &'a Value) -> &'a str {
    let names = [a.place.name, object.name(), object.str_at("metadata.generateName")];
    names.into_iter().find(|name| !name.is_empty()).unwrap_or("Unknown")
}

/// Namespaces the cluster itself needs stay.
fn protect_namespaces(a: &Attributes) -> Result<()> {
    let name = a.place.name;
    let needed = ["default", "kube-system", "kube-public"].contains(&name);
    if a.operation == Operation::Delete && a.place.kind.resource() == "namespaces" && needed {
        return Err(Status::forbidden(a.place.kind, name, "this namespace may not be deleted"));
    }
    Ok(())
}

/// A new node takes no pods before the node lifecycle controller has seen it ready.
fn taint_new_nodes(a: &Attributes, object: &mut Value) -> Result<()> {
    const NOT_READY: &str = "node.kubernetes.io/not-ready";
    if a.operation != Operation::Create || a.place.kind.resource() != "nodes" {
        return Ok(());
    }
    let mut taints = object.list_at("spec.taints").to_vec();
    if !taints.iter().any(|t| t.str_at("key") == NOT_READY && t.str_at("effect") == "NoSchedule") {
        taints.push(json!({ "key": NOT_READY, "effect": "NoSchedule" }));
        object.set_at("spec.taints", taints);
    }
    Ok(())
}

/// Claims and volumes in use outlive their deletion; the protection controllers take the finalizer away.
fn protect_storage(a: &Attributes, object: &mut Value) -> Result<()> {
    let finalizer = match a.place.kind.resource().as_str() {
        "persistentvolumeclaims" => "kubernetes.io/pvc-protection",
        "persistentvolumes" => "kubernetes.io/pv-protection",
        _ => return Ok(()),
    };
    if a.operation == Operation::Create
        && !object.list_at("metadata.finalizers").iter().any(|f| f == finalizer)
    {
        let mut finalizers = object.list_at("metadata.finalizers").to_vec();
        finalizers.push(json!(finalizer));
        object.set_at("metadata.finalizers", finalizers);
    }
    Ok(())
}

/// A signing request says who made it, whatever the client wrote there.
fn request_identity(a: &Attributes, object: &mut Value) -> Result<()> {
    let is_request = a.place.kind.resource() == "certificatesigningrequests.certificates.k8s.io";
    if a.operation != Operation::Create || !is_request {
        return Ok(());
    }
    let user = &a.context.user;
    for name in ["username", "uid", "groups", "extra"] {
        object.remove_at(&format!("spec.{name}"));
    }
    object.set_at("spec.username", user.name.clone());
    if !user.uid.is_empty() {
        object.set_at("spec.uid", user.uid.clone());
    }
    if !user.groups.is_empty() {
        object.set_at("spec.groups", user.groups.clone());
    }
    if !user.extra.is_empty() {
        let extra: serde_json::Map<String, Value> =
            user.extra.iter().map(|(name, values)| (name.clone(), json!(values))).collect();
        object.set_at("spec.extra", extra);
    }
    Ok(())
}

fn is_new_pod(a: &Attributes) -> bool {
    a.operation == Operation::Create && a.place.kind.resource() == "pods"
}

const TOKEN_PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Pods run as a service account and find its token where clients look for it.
fn service_account(a: &Attributes, pod: &mut Value) -> Result<()> {
    if !is_new_pod(a)
        || pod.at("metadata.annotations").is_some_and(|m| m.get("kubernetes.io/config.mirror").is_some())
    {
        return Ok(());
    }
    if pod.str_at("spec.serviceAccountName").is_empty() {
        pod.set_at("spec.serviceAccountName", "default");
    }
    let name = pod.str_at("spec.serviceAccountName").to_owned();
    pod.set_at("spec.serviceAccount", name.clone());
    let namespace = a.place.namespace;
    let Some(account) = a.registry.policy("serviceaccounts", namespace, &name) else {
        let why =
            format!("error looking up service account {namespace}/{name}: serviceaccount {name:?} not found");
        return Err(Status::forbidden(a.place.kind, pod.name(), why));
    };
    if pod.list_at("spec.imagePullSecrets").is_empty() && !account.list_at("imagePullSecrets").is_empty() {
        pod.set_at("spec.imagePullSecrets", account.list_at("imagePullSecrets").to_vec());
    }
    let wanted =
        pod.at("spec.automountServiceAccountToken").or_else(|| account.at("automountServiceAccountToken"));
    if wanted != Some(&Value::Bool(false)) {
        mount_token(pod);
    }
    Ok(())
}

fn mount_token(pod: &mut Value) {
    let volume = generate_name("kube-api-access-");
    let mut used = false;
    for list in ["initContainers", "containers"] {
        let containers = pod.get_mut("spec").and_then(|s| s.get_mut(list)).and_then(Value::as_array_mut);
        for container in containers.into_iter().flatten() {
            if container.list_at("volumeMounts").iter().any(|m| m.str_at("mountPath") == TOKEN_PATH) {
                continue;
            }
            let mut mounts = container.list_at("volumeMounts").to_vec();
            mounts.push(json!({ "name": volume, "readOnly": true, "mountPath": TOKEN_PATH }));
            container["volumeMounts"] = Value::Array(mounts);
            used = true;
        }
    }
    if !used {
        return;
    }
    let mut volumes = pod.list_at("spec.volumes").to_vec();
    volumes.push(json!({ "name": volume, "projected": { "defaultMode": 420, "sources": [
        { "serviceAccountToken": { "expirationSeconds": 3607, "path": "token" } },
        { "configMap": { "name": "kube-root-ca.crt", "items": [{ "key": "ca.crt", "path": "ca.crt" }] } },
        { "downwardAPI": { "items": [{ "path": "namespace",
            "fieldRef": { "apiVersion": "v1", "fieldPath": "metadata.namespace" } }] } },
    ] } }));
    pod.set_at("spec.volumes", volumes);
}

/// `priorityClassName` becomes a number; pods without one get the global default.
fn priority(a: &Attributes, pod: &mut Value) -> Result<()> {
    if !is_new_pod(a) {
        return Ok(());
    }
    let name = pod.str_at("spec.priorityClassName").to_owned();
    let class = if name.is_empty() {
        global_default(a.registry)
    } else {
        let found = a.registry.policy(PRIORITY_CLASSES, "", &name);
        Some(found.ok_or_else(|| {
            Status::forbidden(
                a.place.kind,
                pod.name(),
                format!("no PriorityClass with name {name} was found"),
            )
        })?)
    };
    let value = class.as_ref().and_then(|c| c.int_at("value")).unwrap_or(0);
    if let Some(given) = pod.int_at("spec.priority").filter(|p| *p != value) {
        let why = format!(
            "the integer value of priority ({given}) must not be provided in pod spec; priority admission controller computed {value} from the given PriorityClass name"
        );
        return Err(Status::forbidden(a.place.kind, pod.name(), why));
    }
    pod.set_at("spec.priority", value);
    if let (Some(class), true) = (&class, name.is_empty()) {
        pod.set_at("spec.priorityClassName", class.name());
    }
    let policy = class.as_ref().map_or("", |c| c.str_at("preemptionPolicy"));
    if pod.str_at("spec.preemptionPolicy").is_empty() {
        pod.set_at("spec.preemptionPolicy", if policy.is_empty() { "PreemptLowerPriority" } else { policy });
    }
    Ok(())
}

const PRIORITY_CLASSES: &str = "priorityclasses.scheduling.k8s.io";

fn global_default(registry: &Registry) -> Option<Arc<Value>> {
    let classes = registry.policies(PRIORITY_CLASSES, "").into_iter();
    classes.filter(|c| c.bool_at("globalDefault")).min_by_key(|c| c.int_at("value"))
}

/// Pods outlive a short absence of their node.
fn default_toleration_seconds(a: &Attributes, pod: &mut Value) -> Result<()> {
    if !is_new_pod(a) {
        return Ok(());
    }
    let mut tolerations = pod.list_at("spec.tolerations").to_vec();
    for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
        let tolerated = tolerations.iter().any(|t| {
            (t.str_at("key") == key || t.str_at("key").is_empty())
                && (t.str_at("effect") == "NoExecute" || t.str_at("effect").is_empty())
        });
        if !tolerated {
            tolerations.push(
                json!({ "key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300 }),
            );
        }
    }
    pod.set_at("spec.tolerations", tolerations);
    Ok(())
}
