//! ResourceQuota: what a namespace may hold, checked before each write and kept exact.
//!
//! Usage is computed from what is stored, under a lock of the namespace that is held until the write is
//! committed: no two writers can both take the last place, and nothing can drift. Namespaces without quotas
//! pay one look at an empty partition. Each object's usage is remembered beside its stored bytes, so that a
//! check adds numbers and decodes nothing twice.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Weak};

use knarr_api::kinds::core::quantity;
use knarr_api::kinds::resources::{held_requests, qos_class, total};
use knarr_api::object::Object;
use knarr_api::quantity::Quantity;
use knarr_api::schema::Kind;
use knarr_api::status::{Result, Status};
use knarr_store::{Entry, Expect, Range, Write};
use parking_lot::Mutex;
use serde_json::{Map, Value, json};

use crate::encode::{self, View};
use crate::registry::{Place, Registry, partition, prefix};

/// How often a quota's status is written anew when somebody else writes the quota meanwhile.
const STATUS_TRIES_MAX: usize = 5;
const PARTITION: &str = "resourcequotas";

/// Resource name and amount, such as `requests.cpu` and `500m`.
pub type Usage = BTreeMap<String, Quantity>;

/// One lock per namespace that has quotas and is being written to.
#[derive(Default)]
pub struct Quotas {
    locks: Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>,
}

/// Held while a write that quotas judge is under way.
pub struct Pass {
    _guard: Option<tokio::sync::OwnedMutexGuard<()>>,
    judged: bool,
}

impl Quotas {
    async fn enter(&self, namespace: &str) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.locks.lock();
            locks.retain(|_, lock| lock.strong_count() > 0);
            match locks.get(namespace).and_then(Weak::upgrade) {
                Some(lock) => lock,
                None => {
                    let fresh = Arc::default();
                    locks.insert(namespace.to_owned(), Arc::downgrade(&fresh));
                    fresh
                }
            }
        };
        lock.lock_owned().await
    }
}

fn quotas_of(registry: &Registry, namespace: &str) -> Vec<Arc<Entry>> {
    if namespace.is_empty() || registry.store.count(PARTITION) == 0 {
        return Vec::new();
    }
    let range = Range { prefix: prefix(namespace), ..Range::default() };
    registry.store.list(PARTITION, &range).map(|l| l.entries).unwrap_or_default()
}

/// Refuses a write that would exceed a quota. The pass is to be kept until the write is committed, and then
/// handed to [`settle`].
pub async fn judge(registry: &Registry, place: Place<'_>, new: &Value, old: Option<&Value>) -> Result<Pass> {
    let namespace = place.namespace;
    if quotas_of(registry, namespace).is_empty() {
        return Ok(Pass { _guard: None, judged: place.kind.plural == PARTITION });
    }
    let guard = registry.quotas.enter(namespace).await;
    let before = old.map(|old| usage(place.kind, old)).unwrap_or_default();
    let wanted: Usage = usage(place.kind, new)
        .into_iter()
        .filter_map(|(name, amount)| {
            let more = amount - before.get(&name).copied().unwrap_or_default();
            (!more.is_negative() && !more.is_zero()).then_some((name, more))
        })
        .collect();
    for entry in quotas_of(registry, namespace) {
        let quota = View::tree(&entry);
        if in_scope(&quota, place.kind, new) {
            check(registry, place, &quota, new, old, &wanted)?;
        }
    }
    Ok(Pass { _guard: Some(guard), judged: true })
}

fn check(
    registry: &Registry,
    place: Place,
    quota: &Value,
    new: &Value,
    old: Option<&Value>,
    wanted: &Usage,
) -> Result<()> {
    let name = if place.name.is_empty() { new.name() } else { place.name };
    let refuse = |why: String| Err(Status::forbidden(place.kind, name, why));
    let hard = hard(quota);
    if old.is_none() && place.kind.resource() == "pods" {
        let missing = unsaid(new, &hard);
        if !missing.is_empty() {
            return refuse(format!("failed quota: {}: must specify {}", quota.name(), missing.join("; ")));
        }
    }
    let asked: Usage =
        wanted.iter().filter(|(n, _)| hard.contains_key(*n)).map(|(n, q)| (n.clone(), *q)).collect();
    if asked.is_empty() {
        return Ok(());
    }
    let used = used(registry, place.namespace, quota);
    let over: Vec<&String> = asked
        .iter()
        .filter(|(n, more)| used.get(*n).copied().unwrap_or_default() + **more > hard[*n])
        .map(|(n, _)| n)
        .collect();
    if over.is_empty() {
        return Ok(());
    }
    let show = |all: &Usage| {
        let parts = over.iter().map(|n| format!("{n}={}", all.get(*n).copied().unwrap_or_default()));
        parts.collect::<Vec<_>>().join(",")
    };
    refuse(format!(
        "exceeded quota: {}, requested: {}, used: {}, limited: {}",
        quota.name(),
        show(&asked),
        show(&used),
        show(&hard)
    ))
}

/// After a write: brings the quotas' status up to date, and lets the next writer in.
pub async fn settle(registry: &Registry, namespace: &str, pass: Pass) {
    if pass.judged {
        publish(registry, namespace).await;
    }
}

/// After a deletion, or another write that frees something.
pub async fn released(registry: &Registry, namespace: &str) {
    if !quotas_of(registry, namespace).is_empty() {
        let _guard = registry.quotas.enter(namespace).await;
        publish(registry, namespace).await;
    }
}

async fn publish(registry: &Registry, namespace: &str) {
    let Some(kind) = registry.schema.resource("", "v1", PARTITION) else { return };
    for entry in quotas_of(registry, namespace) {
        let mut entry = entry;
        for _ in 0..STATUS_TRIES_MAX {
            let old = encode::decode(&entry);
            let mut new = old.clone();
            let used = used(registry, namespace, &old);
            new.set_at("status.hard", old.at("spec.hard").cloned().unwrap_or(json!({})));
            new.set_at("status.used", shown(&used));
            if new == old {
                break;
            }
            let write = Write {
                partition: partition(kind).into(),
                key: entry.key.clone(),
                expect: Expect::Revision(entry.revision),
                change: encode::put(kind, &new, None),
            };
            if registry.store.commit(write).await.is_ok() {
                break;
            }
            match registry.store.get(PARTITION, &entry.key) {
                Some(newer) => entry = newer,
                None => break,
            }
        }
    }
}

fn shown(usage: &Usage) -> Value {
    let entries: Map<String, Value> = usage.iter().map(|(n, q)| (n.clone(), json!(q.to_string()))).collect();
    Value::Object(entries)
}

fn hard(quota: &Value) -> Usage {
    let entries = quota.map_at("spec.hard").into_iter().flatten();
    entries.filter_map(|(n, v)| Some((n.clone(), quantity(Some(v))?))).collect()
}

/// What is used now of everything the quota limits.
fn used(registry: &Registry, namespace: &str, quota: &Value) -> Usage {
    let hard = hard(quota);
    // A zero in the form of its limit, so that sums print alike.
    let zero = |limit: Quantity, all: Quantity| limit - all;
    let mut used: Usage = hard.iter().map(|(name, limit)| (name.clone(), zero(*limit, *limit))).collect();
    let mut kinds: Vec<&Kind> = hard.keys().filter_map(|name| kind_of(registry, name)).collect();
    kinds.sort_by_key(|k| k.resource());
    kinds.dedup_by_key(|k| k.resource());
    for kind in kinds {
        let range = Range { prefix: prefix(namespace), ..Range::default() };
        let entries = registry.store.list(&partition(kind), &range).map(|l| l.entries).unwrap_or_default();
        let scoped = quota.at("spec.scopes").is_some() || quota.at("spec.scopeSelector").is_some();
        for entry in entries.iter().filter(|e| !scoped || in_scope(quota, kind, &encode::decode(e))) {
            let view = View::of(entry);
            let amounts = view.usage.get_or_init(|| usage(kind, &encode::decode(entry)));
            for (name, amount) in amounts {
                if let Some(sum) = used.get_mut(name) {
                    *sum = *sum + *amount;
                }
            }
        }
    }
    used
}

/// The kind whose objects use a resource.
fn kind_of<'r>(registry: &'r Registry, name: &str) -> Option<&'r Kind> {
    let core = |plural| registry.schema.resource("", "v1", plural);
    if let Some(counted) = name.strip_prefix("count/") {
        let (plural, group) = counted.split_once('.').unwrap_or((counted, ""));
        return registry.schema.kinds().iter().find(|k| k.plural == plural && k.group == group);
    }
    match name {
        "services" | "services.loadbalancers" | "services.nodeports" => core("services"),
        "configmaps" | "secrets" | "replicationcontrollers" | "resourcequotas" => core(name),
        "persistentvolumeclaims" | "requests.storage" => core("persistentvolumeclaims"),
        _ if name.contains(".storageclass.storage.k8s.io/") => core("persistentvolumeclaims"),
        _ => core("pods"),
    }
}

/// What one object uses.
pub fn usage(kind: &Kind, object: &Value) -> Usage {
    let one = Quantity::from_units(1);
    let mut usage = Usage::from([(format!("count/{}", kind.resource()), one)]);
    match kind.resource().as_str() {
        "pods" => pod_usage(object, &mut usage),
        "persistentvolumeclaims" => {
            let size = quantity(object.at("spec.resources.requests.storage")).unwrap_or_default();
            let class = object.str_at("spec.storageClassName");
            usage.insert("persistentvolumeclaims".into(), one);
            usage.insert("requests.storage".into(), size);
            if !class.is_empty() {
                let of = format!("{class}.storageclass.storage.k8s.io");
                usage.insert(format!("{of}/persistentvolumeclaims"), one);
                usage.insert(format!("{of}/requests.storage"), size);
            }
        }
        "services" => {
            let ports = i64::try_from(object.list_at("spec.ports").len()).unwrap_or(i64::MAX);
            let kind = object.str_at("spec.type");
            usage.insert("services".into(), one);
            let allocates = object.at("spec.allocateLoadBalancerNodePorts") != Some(&Value::Bool(false));
            if kind == "NodePort" || (kind == "LoadBalancer" && allocates) {
                usage.insert("services.nodeports".into(), Quantity::from_units(ports));
            }
            if kind == "LoadBalancer" {
                usage.insert("services.loadbalancers".into(), one);
            }
        }
        name @ ("configmaps" | "secrets" | "replicationcontrollers" | "resourcequotas") => {
            usage.insert(name.to_owned(), one);
        }
        _ => {}
    }
    usage
}

/// Pods that have ended use their place in the store only.
fn pod_usage(pod: &Value, usage: &mut Usage) {
    if matches!(pod.str_at("status.phase"), "Succeeded" | "Failed") {
        return;
    }
    usage.insert("pods".into(), Quantity::from_units(1));
    for (name, amount) in held_requests(pod) {
        let native =
            matches!(name.as_str(), "cpu" | "memory" | "ephemeral-storage") || name.starts_with("hugepages-");
        if native {
            usage.insert(name.clone(), amount);
        }
        usage.insert(format!("requests.{name}"), amount);
    }
    for (name, amount) in total(pod, "limits") {
        if matches!(name.as_str(), "cpu" | "memory" | "ephemeral-storage") {
            usage.insert(format!("limits.{name}"), amount);
        }
    }
}

/// Under a quota of cpu or memory each container must say what it needs: `limits.cpu for: a,b`.
fn unsaid(pod: &Value, hard: &Usage) -> Vec<String> {
    let mut missing: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for name in ["cpu", "memory", "requests.cpu", "requests.memory", "limits.cpu", "limits.memory"] {
        if !hard.contains_key(name) {
            continue;
        }
        let (list, resource) = name.split_once('.').unwrap_or(("requests", name));
        for container in pod.list_at("spec.containers").iter().chain(pod.list_at("spec.initContainers")) {
            let said = container.at("resources").and_then(|r| r.at(list)).and_then(|l| l.get(resource));
            if said.is_none() {
                missing.entry(name).or_default().push(container.str_at("name"));
            }
        }
    }
    let text = missing.into_iter().map(|(name, mut containers)| {
        containers.sort_unstable();
        containers.dedup();
        format!("{name} for: {}", containers.join(","))
    });
    text.collect()
}

/// Does the quota speak of this object?
fn in_scope(quota: &Value, kind: &Kind, object: &Value) -> bool {
    let plain =
        quota.list_at("spec.scopes").iter().map(|s| (s.as_str().unwrap_or_default(), "Exists", &[][..]));
    let selected = quota.list_at("spec.scopeSelector.matchExpressions").iter();
    let selected = selected.map(|e| (e.str_at("scopeName"), e.str_at("operator"), e.list_at("values")));
    plain.chain(selected).all(|(scope, operator, values)| match (kind.resource().as_str(), scope) {
        ("persistentvolumeclaims", "VolumeAttributesClass") => {
            select(object.str_at("spec.volumeAttributesClassName"), operator, values)
        }
        ("pods", "PriorityClass") => select(object.str_at("spec.priorityClassName"), operator, values),
        ("pods", scope) => pod_in_scope(object, scope),
        _ => false,
    })
}

fn select(value: &str, operator: &str, values: &[Value]) -> bool {
    match operator {
        "In" => values.iter().any(|v| v == value),
        "NotIn" => !values.iter().any(|v| v == value),
        "DoesNotExist" => value.is_empty(),
        _ => !value.is_empty(),
    }
}

fn pod_in_scope(pod: &Value, scope: &str) -> bool {
    let bounded = pod.int_at("spec.activeDeadlineSeconds").is_some_and(|s| s >= 0);
    match scope {
        "Terminating" => bounded,
        "NotTerminating" => !bounded,
        "BestEffort" => qos_class(pod) == "BestEffort",
        "NotBestEffort" => qos_class(pod) != "BestEffort",
        "CrossNamespacePodAffinity" => ["podAffinity", "podAntiAffinity"].iter().any(|name| {
            let affinity = &pod["spec"]["affinity"][*name];
            let required = affinity.list_at("requiredDuringSchedulingIgnoredDuringExecution").iter();
            let preferred = affinity.list_at("preferredDuringSchedulingIgnoredDuringExecution").iter();
            required
                .chain(preferred.map(|p| &p["podAffinityTerm"]))
                .any(|term| !term.list_at("namespaces").is_empty() || term.at("namespaceSelector").is_some())
        }),
        _ => false,
    }
}
