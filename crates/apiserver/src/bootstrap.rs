//! What every cluster has from its first start: namespaces, roles, priority classes, and itself as a service.
//!
//! Run at every start; what is there already stays as it is, except that bootstrap roles regain missing
//! rules (as upstream's reconciliation does).

use std::net::{IpAddr, SocketAddr};

use futures::future::try_join_all;
use futures::try_join;
use knarr_api::object::Object;
use knarr_api::status::Result;
use serde_json::{Value, json};

use crate::flow_objects;
use crate::identity::{MASTERS, User};
use crate::registry::{Context, Edit, Endpoint, Place, Registry};

const RBAC: &str = "rbac.authorization.k8s.io";

/// Creates what is missing. Objects of one step are written together: each durable commit waits for the disk.
pub async fn run(registry: &Registry, advertised: &[SocketAddr]) -> Result<()> {
    let context = Context::new(User::new("system:apiserver", &[MASTERS]), "knarr");
    let context = &context;
    let named = |name: &str| json!({ "metadata": { "name": name } });
    let namespaces = ["default", "kube-system", "kube-public", "kube-node-lease"];
    try_join_all(namespaces.map(|name| ensure(registry, "", "namespaces", "", named(name), context))).await?;
    let classes = PRIORITY_CLASSES.iter().map(|(name, value, description)| {
        let class = json!({ "metadata": { "name": name }, "value": value, "description": description });
        ensure(registry, "scheduling.k8s.io", "priorityclasses", "", class, context)
    });
    let roles = cluster_roles().into_iter().map(|(name, rules)| {
        let mut labels = json!({ "kubernetes.io/bootstrapping": "rbac-defaults" });
        if let Some(to) = name.strip_prefix("system:aggregate-to-") {
            labels[format!("{AGGREGATE}{to}")] = json!("true");
        }
        let role = json!({ "metadata": { "name": name, "labels": labels }, "rules": rules });
        ensure_rules(registry, role, context)
    });
    let aggregates =
        aggregates().into_iter().map(|role| ensure(registry, RBAC, "clusterroles", "", role, context));
    let bindings = BINDINGS.iter().map(|(name, role, kind, subjects)| {
        let subjects: Vec<Value> = subjects.iter().map(|s| subject(kind, s)).collect();
        let labels = json!({ "kubernetes.io/bootstrapping": "rbac-defaults" });
        let binding = json!({ "metadata": { "name": name, "labels": labels }, "subjects": subjects,
            "roleRef": { "apiGroup": RBAC, "kind": "ClusterRole", "name": role } });
        ensure(registry, RBAC, "clusterrolebindings", "", binding, context)
    });
    let flow = |plural: &'static str, objects: Vec<Value>| {
        let each = objects
            .into_iter()
            .map(move |object| ensure(registry, "flowcontrol.apiserver.k8s.io", plural, "", object, context));
        try_join_all(each)
    };
    try_join!(
        try_join_all(classes),
        try_join_all(roles),
        try_join_all(aggregates),
        try_join_all(bindings),
        flow("prioritylevelconfigurations", flow_objects::priority_levels()),
        flow("flowschemas", flow_objects::flow_schemas()),
    )?;
    unbind_nodes(registry, context).await?;
    service_ranges(registry, context).await?;
    publish_self(registry, advertised, context).await
}

/// The ranges of service addresses, as the ServiceCIDR `kubernetes`. It stays what it first was, but for a second
/// family that is added.
async fn service_ranges(registry: &Registry, context: &Context) -> Result<()> {
    const GROUP: &str = "networking.k8s.io";
    let kind = registry.schema.resource(GROUP, "v1", "servicecidrs").expect("ranges are built in");
    let cidrs: Vec<String> = registry.services.configured().iter().map(|range| range.to_string()).collect();
    let object = json!({ "metadata": { "name": "kubernetes" }, "spec": { "cidrs": cidrs } });
    ensure(registry, GROUP, "servicecidrs", "", object, context).await?;
    let stored = registry.lookup(GROUP, "servicecidrs", "", "kubernetes").unwrap_or_default();
    let place = Place { kind, namespace: "", name: "kubernetes" };
    let had = stored.list_at("spec.cidrs");
    if had.len() < cidrs.len() && had.first().and_then(Value::as_str) == cidrs.first().map(String::as_str) {
        let grow = |old: &Value| {
            let mut new = old.clone();
            new.set_at("spec.cidrs", cidrs.clone());
            Ok(new)
        };
        registry.modify(place, Endpoint::Main, &Edit::With(&grow), context).await?;
    } else if had.iter().filter_map(Value::as_str).ne(cidrs.iter().map(String::as_str)) {
        tracing::warn!(stored = ?had, configured = ?cidrs, "the ranges of services stay what they were first");
    }
    if stored.list_at("status.conditions").is_empty() {
        let ready = json!([{ "type": crate::services::addresses::READY, "status": "True", "reason": "",
            "message": "Kubernetes default Service CIDR is ready", "lastTransitionTime": registry.now() }]);
        let tell = |old: &Value| {
            let mut new = old.clone();
            new.set_at("status.conditions", ready.clone());
            Ok(new)
        };
        registry.modify(place, Endpoint::Status, &Edit::With(&tell), context).await?;
    }
    crate::services::addresses::repair(registry).await;
    Ok(())
}

/// Name, value, description.
const PRIORITY_CLASSES: &[(&str, i64, &str)] = &[
    (
        "system-node-critical",
        2_000_001_000,
        "Used for system critical pods that must not be moved from their current node.",
    ),
    (
        "system-cluster-critical",
        2_000_000_000,
        "Used for system critical pods that must run in the cluster, but can be moved to another node if necessary.",
    ),
];

/// Clusters from before the Node authorizer bound all nodes to a role that reads every secret.
async fn unbind_nodes(registry: &Registry, context: &Context) -> Result<()> {
    let found = registry.lookup(RBAC, "clusterrolebindings", "", "system:node");
    if found.is_none_or(|binding| binding.list_at("subjects").is_empty()) {
        return Ok(());
    }
    let kind = registry.schema.resource(RBAC, "v1", "clusterrolebindings").expect("bindings are built in");
    let place = Place { kind, namespace: "", name: "system:node" };
    let empty = |old: &Value| {
        let mut new = old.clone();
        new.remove_at("subjects");
        Ok(new)
    };
    registry.modify(place, Endpoint::Main, &Edit::With(&empty), context).await.map(|_| ())
}

async fn ensure(
    registry: &Registry,
    group: &str,
    plural: &str,
    namespace: &str,
    object: Value,
    context: &Context,
) -> Result<()> {
    let kind =
        registry.schema.resource(group, "v1", plural).expect("bootstrap objects are of built-in kinds");
    if registry.lookup(group, plural, namespace, object.name()).is_some() {
        return Ok(());
    }
    let object = registry.decode(kind, object, context)?;
    match registry.create(kind, namespace, object, context).await {
        Err(status) if status.reason != "AlreadyExists" => Err(status),
        _ => Ok(()),
    }
}

/// Roles for people are the sum of all roles with a label, so that others can add to them.
const AGGREGATE: &str = "rbac.authorization.k8s.io/aggregate-to-";

/// `admin`, `edit` and `view`. Their rules are kept by the aggregation controller; the first ones are written
/// here, so that they hold before it runs.
fn aggregates() -> Vec<Value> {
    let roles = cluster_roles();
    let (mut below, mut aggregates) = (Vec::<Value>::new(), Vec::new());
    for (name, next) in [("view", "edit"), ("edit", "admin"), ("admin", "")] {
        let own = roles.iter().find(|(n, _)| n.strip_prefix("system:aggregate-to-") == Some(name));
        for rule in own.map(|(_, rules)| rules.clone()).unwrap_or_default() {
            if !below.contains(&rule) {
                below.push(rule);
            }
        }
        let mut labels = json!({ "kubernetes.io/bootstrapping": "rbac-defaults" });
        if !next.is_empty() {
            labels[format!("{AGGREGATE}{next}")] = json!("true");
        }
        let selector = json!({ "matchLabels": { format!("{AGGREGATE}{name}"): "true" } });
        aggregates.push(json!({ "metadata": { "name": name, "labels": labels }, "rules": below,
            "aggregationRule": { "clusterRoleSelectors": [selector] } }));
    }
    aggregates
}

async fn ensure_rules(registry: &Registry, role: Value, context: &Context) -> Result<()> {
    let name = role.name().to_owned();
    let Some(found) = registry.lookup("rbac.authorization.k8s.io", "clusterroles", "", &name) else {
        return ensure(registry, "rbac.authorization.k8s.io", "clusterroles", "", role, context).await;
    };
    let wanted = role.list_at("rules").to_vec();
    let missing = |object: &Value| {
        wanted.iter().filter(|r| !object.list_at("rules").contains(r)).cloned().collect::<Vec<_>>()
    };
    if missing(&found).is_empty() {
        return Ok(());
    }
    let kind = registry
        .schema
        .resource("rbac.authorization.k8s.io", "v1", "clusterroles")
        .expect("roles are built in");
    let add = |old: &Value| {
        let mut new = old.clone();
        let mut rules = old.list_at("rules").to_vec();
        rules.extend(missing(old));
        new["rules"] = Value::Array(rules);
        Ok(new)
    };
    let place = Place { kind, namespace: "", name: &name };
    registry.modify(place, Endpoint::Main, &Edit::With(&add), context).await.map(|_| ())
}

fn subject(kind: &str, name: &str) -> Value {
    match name.split_once('/') {
        Some((namespace, name)) => json!({ "kind": "ServiceAccount", "namespace": namespace, "name": name }),
        None => json!({ "kind": kind, "name": name, "apiGroup": "rbac.authorization.k8s.io" }),
    }
}

/// Name, role, kind of subject, subjects.
const BINDINGS: &[(&str, &str, &str, &[&str])] = &[
    ("cluster-admin", "cluster-admin", "Group", &["system:masters"]),
    ("system:basic-user", "system:basic-user", "Group", &["system:authenticated"]),
    ("system:discovery", "system:discovery", "Group", &["system:authenticated"]),
    (
        "system:public-info-viewer",
        "system:public-info-viewer",
        "Group",
        &["system:authenticated", "system:unauthenticated"],
    ),
    (
        "system:service-account-issuer-discovery",
        "system:service-account-issuer-discovery",
        "Group",
        &["system:serviceaccounts"],
    ),
    ("system:node-proxier", "system:node-proxier", "User", &["system:kube-proxy"]),
    ("system:kube-scheduler", "system:kube-scheduler", "User", &["system:kube-scheduler"]),
    (
        "system:kube-controller-manager",
        "system:kube-controller-manager",
        "User",
        &["system:kube-controller-manager"],
    ),
    ("system:kube-dns", "system:kube-dns", "User", &["kube-system/kube-dns", "system:kube-dns"]),
];

const READ: [&str; 3] = ["get", "list", "watch"];
const WRITE: [&str; 5] = ["create", "delete", "deletecollection", "patch", "update"];
const ALL: [&str; 8] = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];

fn rule(groups: &[&str], resources: &[&str], verbs: &[&str]) -> Value {
    json!({ "apiGroups": groups, "resources": resources, "verbs": verbs })
}

fn urls(urls: &[&str]) -> Value {
    json!({ "nonResourceURLs": urls, "verbs": ["get"] })
}

fn cluster_roles() -> Vec<(&'static str, Vec<Value>)> {
    let everything =
        || vec![rule(&["*"], &["*"], &["*"]), json!({ "nonResourceURLs": ["*"], "verbs": ["*"] })];
    let workloads = &[
        "deployments",
        "deployments/scale",
        "replicasets",
        "replicasets/scale",
        "statefulsets",
        "statefulsets/scale",
        "daemonsets",
        "controllerrevisions",
    ][..];
    let core = &[
        "configmaps",
        "endpoints",
        "persistentvolumeclaims",
        "pods",
        "replicationcontrollers",
        "replicationcontrollers/scale",
        "serviceaccounts",
        "services",
    ][..];
    let view = || {
        vec![
            rule(&[""], core, &READ),
            rule(
                &[""],
                &[
                    "bindings",
                    "events",
                    "limitranges",
                    "namespaces/status",
                    "pods/log",
                    "pods/status",
                    "replicationcontrollers/status",
                    "resourcequotas",
                    "resourcequotas/status",
                    "persistentvolumeclaims/status",
                    "services/status",
                    "namespaces",
                ],
                &READ,
            ),
            rule(&["apps"], workloads, &READ),
            rule(
                &["apps"],
                &["deployments/status", "replicasets/status", "statefulsets/status", "daemonsets/status"],
                &READ,
            ),
            rule(&["batch"], &["jobs", "cronjobs", "jobs/status", "cronjobs/status"], &READ),
            rule(&["autoscaling"], &["horizontalpodautoscalers", "horizontalpodautoscalers/status"], &READ),
            rule(&["networking.k8s.io"], &["ingresses", "ingresses/status", "networkpolicies"], &READ),
            rule(&["policy"], &["poddisruptionbudgets", "poddisruptionbudgets/status"], &READ),
            rule(&["discovery.k8s.io"], &["endpointslices"], &READ),
        ]
    };
    let edit = || {
        vec![
            rule(&[""], core, &WRITE),
            rule(&[""], &["secrets"], &ALL),
            rule(&[""], &["events"], &WRITE),
            rule(
                &[""],
                &["pods/attach", "pods/exec", "pods/portforward", "pods/proxy", "services/proxy"],
                &["get", "list", "watch", "create", "delete", "patch", "update"],
            ),
            rule(&[""], &["pods/eviction", "serviceaccounts/token"], &["create"]),
            rule(&[""], &["serviceaccounts"], &["impersonate"]),
            rule(&["apps"], workloads, &WRITE),
            rule(&["batch"], &["jobs", "cronjobs"], &WRITE),
            rule(&["autoscaling"], &["horizontalpodautoscalers"], &WRITE),
            rule(&["networking.k8s.io"], &["ingresses", "networkpolicies"], &WRITE),
            rule(&["policy"], &["poddisruptionbudgets"], &WRITE),
            rule(&["coordination.k8s.io"], &["leases"], &ALL),
        ]
    };
    let admin = || {
        vec![
            rule(&["rbac.authorization.k8s.io"], &["roles", "rolebindings"], &ALL),
            rule(&["authorization.k8s.io"], &["localsubjectaccessreviews"], &["create"]),
        ]
    };
    vec![
        ("cluster-admin", everything()),
        ("system:aggregate-to-admin", admin()),
        ("system:aggregate-to-edit", edit()),
        ("system:aggregate-to-view", view()),
        (
            "system:basic-user",
            vec![
                rule(
                    &["authorization.k8s.io"],
                    &["selfsubjectaccessreviews", "selfsubjectrulesreviews"],
                    &["create"],
                ),
                rule(&["authentication.k8s.io"], &["selfsubjectreviews"], &["create"]),
            ],
        ),
        (
            "system:discovery",
            vec![urls(&[
                "/api",
                "/api/*",
                "/apis",
                "/apis/*",
                "/healthz",
                "/livez",
                "/openapi",
                "/openapi/*",
                "/readyz",
                "/version",
                "/version/",
            ])],
        ),
        (
            "system:public-info-viewer",
            vec![urls(&["/healthz", "/livez", "/readyz", "/version", "/version/"])],
        ),
        (
            "system:service-account-issuer-discovery",
            vec![urls(&[
                "/.well-known/openid-configuration",
                "/.well-known/openid-configuration/",
                "/openid/v1/jwks",
                "/openid/v1/jwks/",
            ])],
        ),
        ("system:node", node_rules()),
        (
            "system:node-proxier",
            vec![
                rule(&[""], &["services", "endpoints", "nodes"], &READ),
                rule(&["discovery.k8s.io"], &["endpointslices"], &READ),
                rule(&["", "events.k8s.io"], &["events"], &["create", "patch", "update"]),
            ],
        ),
        (
            "system:kube-scheduler",
            vec![
                rule(&["", "events.k8s.io"], &["events"], &["create", "patch", "update"]),
                rule(&["coordination.k8s.io"], &["leases"], &ALL),
                rule(
                    &[""],
                    &[
                        "nodes",
                        "namespaces",
                        "services",
                        "replicationcontrollers",
                        "persistentvolumeclaims",
                        "persistentvolumes",
                    ],
                    &READ,
                ),
                rule(&[""], &["pods"], &["delete", "get", "list", "watch"]),
                rule(&[""], &["bindings", "pods/binding"], &["create"]),
                rule(&[""], &["pods/status"], &["patch", "update"]),
                rule(&["apps"], &["replicasets", "statefulsets"], &READ),
                rule(&["policy"], &["poddisruptionbudgets"], &READ),
                rule(&["scheduling.k8s.io"], &["priorityclasses"], &READ),
                rule(
                    &["storage.k8s.io"],
                    &[
                        "csinodes",
                        "csidrivers",
                        "csistoragecapacities",
                        "storageclasses",
                        "volumeattachments",
                    ],
                    &READ,
                ),
                rule(&["resource.k8s.io"], &["*"], &READ),
                // What upstream grants as system:volume-scheduler, and for claims of devices.
                rule(&[""], &["persistentvolumeclaims", "persistentvolumes"], &["patch", "update"]),
                rule(
                    &["resource.k8s.io"],
                    &["resourceclaims", "resourceclaims/status"],
                    &["patch", "update"],
                ),
            ],
        ),
        // The loops run as one identity for now; the garbage collector among them must reach every kind.
        ("system:kube-controller-manager", everything()),
        (
            "system:kube-dns",
            vec![
                rule(&[""], &["endpoints", "services", "pods", "namespaces", "nodes"], &READ),
                rule(&["discovery.k8s.io"], &["endpointslices"], &READ),
            ],
        ),
    ]
}

/// What any node may do, whatever runs on it. What depends on its pods is decided in `node.rs`.
pub fn node_rules() -> Vec<Value> {
    let own = ["create", "get", "list", "watch", "patch", "update"];
    vec![
        rule(&[""], &["nodes"], &own),
        rule(&[""], &["nodes/status"], &["patch", "update"]),
        rule(&[""], &["pods"], &["get", "list", "watch", "create", "delete"]),
        rule(&[""], &["pods/status"], &["patch", "update"]),
        rule(&[""], &["pods/eviction"], &["create"]),
        rule(&[""], &["services", "endpoints", "namespaces"], &READ),
        rule(&[""], &["events"], &["create", "patch", "update"]),
        rule(&["events.k8s.io"], &["events"], &["create", "patch", "update"]),
        rule(&["discovery.k8s.io"], &["endpointslices"], &READ),
        rule(&["node.k8s.io"], &["runtimeclasses"], &READ),
        rule(&["authentication.k8s.io"], &["tokenreviews"], &["create"]),
        rule(&["authorization.k8s.io"], &["subjectaccessreviews", "localsubjectaccessreviews"], &["create"]),
        rule(&["certificates.k8s.io"], &["certificatesigningrequests"], &["create", "get", "list", "watch"]),
        rule(&["storage.k8s.io"], &["csidrivers"], &READ),
        rule(
            &["resource.k8s.io"],
            &["resourceslices"],
            &["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"],
        ),
    ]
}

/// The `kubernetes` service and its endpoints: how pods reach the API server.
async fn publish_self(registry: &Registry, advertised: &[SocketAddr], context: &Context) -> Result<()> {
    let labels = json!({ "component": "apiserver", "provider": "kubernetes" });
    let port = advertised.first().map_or(6443, SocketAddr::port);
    let service = json!({
        "metadata": { "name": "kubernetes", "labels": labels },
        "spec": {
            "clusterIP": registry.services.range().nth(1).to_string(),
            "ports": [{ "name": "https", "port": 443, "protocol": "TCP", "targetPort": port }],
        },
    });
    ensure(registry, "", "services", "default", service, context).await?;
    let addresses: Vec<String> =
        advertised.iter().map(|a| a.ip()).filter(IpAddr::is_ipv4).map(|a| a.to_string()).collect();
    let endpoints = json!({
        "metadata": { "name": "kubernetes", "labels": { "endpointslice.kubernetes.io/skip-mirror": "true" } },
        "subsets": [{
            "addresses": addresses.iter().map(|a| json!({ "ip": a })).collect::<Vec<_>>(),
            "ports": [{ "name": "https", "port": port, "protocol": "TCP" }],
        }],
    });
    replace(registry, "", "endpoints", endpoints, &["subsets"], context).await?;
    let slice = json!({
        "metadata": { "name": "kubernetes", "labels": { "kubernetes.io/service-name": "kubernetes" } },
        "addressType": "IPv4",
        "endpoints": [{ "addresses": addresses, "conditions": { "ready": true } }],
        "ports": [{ "name": "https", "port": port, "protocol": "TCP" }],
    });
    replace(registry, "discovery.k8s.io", "endpointslices", slice, &["endpoints", "ports"], context).await
}

/// Creates the object in `default`, or brings the named fields up to date: addresses change with restarts.
async fn replace(
    registry: &Registry,
    group: &str,
    plural: &str,
    object: Value,
    fields: &[&str],
    context: &Context,
) -> Result<()> {
    let kind =
        registry.schema.resource(group, "v1", plural).expect("bootstrap objects are of built-in kinds");
    let name = object.name().to_owned();
    if registry.lookup(group, plural, "default", &name).is_none() {
        return ensure(registry, group, plural, "default", object, context).await;
    }
    let change = |old: &Value| {
        let mut new = old.clone();
        for field in fields {
            new[*field] = object[*field].clone();
        }
        Ok(new)
    };
    let place = Place { kind, namespace: "default", name: &name };
    registry.modify(place, Endpoint::Main, &Edit::With(&change), context).await.map(|_| ())
}
