//! What must hold after every single write, whatever goes wrong meanwhile: one function a rule.
//!
//! Some rules speak of what a controller may do, and a controller acts on a cache that may be late. So they take the
//! most generous wish of the last [`LAG`], and allow one more for every write of which the writer does not know
//! whether it happened ([`Slack`]).

use crate::history::{History, Object, number, place, text};
use crate::rim;
use crate::wire::Actor;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// How late a cache may be: longer than any watch stays away.
const LAG: Duration = Duration::from_secs(240);

/// How long a pod is available without being missed by who deletes it for one that seems not to be: a cache that is
/// behind cannot tell them apart. Shorter than [`LAG`], or no young pod would ever count.
const NEWS: Duration = Duration::from_secs(15);

/// One record and who wrote it.
pub struct Change<'a> {
    pub partition: &'a str,
    pub key: &'a str,
    pub before: Option<&'a Value>,
    pub after: Option<&'a Value>,
    pub actor: &'a Actor,
}

/// What the rules remember.
#[derive(Default)]
pub struct Memory {
    /// Writes that may have happened, and when.
    pub slack: Vec<Slack>,
    /// Uid of a workload → what it wished for, and since when.
    wishes: BTreeMap<String, Vec<(Duration, Wish)>>,
    /// Uid of a workload → when its pods were last disturbed by somebody else.
    disturbed: BTreeMap<String, Duration>,
    /// Partition and key → how often it was written in the present minute.
    writes: BTreeMap<(String, String), (u64, u32)>,
    /// Uid of a pod → when it became available.
    available: BTreeMap<String, Duration>,
    /// Uid of a job → its pods that succeeded, and the indexes of those.
    succeeded: BTreeMap<String, (BTreeSet<String>, BTreeSet<i64>)>,
}

/// A write that may have happened.
pub struct Slack {
    at: Duration,
    partition: String,
    namespace: String,
}

impl Slack {
    pub fn now(request: &str) -> Slack {
        let (partition, key, _) = place(request).unwrap_or_default();
        let namespace = key.split_once('/').map(|(namespace, _)| namespace.to_owned()).unwrap_or_default();
        Slack { at: rim::elapsed(), partition, namespace }
    }
}

/// How many pods a workload may have and must have.
#[derive(Clone, Copy, Debug, Default)]
struct Wish {
    most: i64,
    least: i64,
}

type Rule = fn(&History, &mut Memory, &Change) -> Option<String>;

const RULES: &[(&str, Rule)] = &[
    ("livelock", livelock),
    ("identity", identity),
    ("bound once", bound_once),
    ("phases end", phases_end),
    ("node capacity", node_capacity),
    ("addresses", addresses),
    ("service addresses", service_addresses),
    ("quota", quota),
    ("replicas", replicas),
    ("surge", surge),
    ("availability", availability),
    ("one daemon a node", one_daemon_a_node),
    ("jobs count once", jobs_count_once),
    ("no innocent deleted", no_innocent_deleted),
];

/// The rules a change breaks.
pub fn check(history: &History, memory: &mut Memory, change: &Change) -> Vec<String> {
    remember(history, memory, change);
    let mut found = Vec::new();
    for (name, rule) in RULES {
        if let Some(why) = rule(history, memory, change) {
            let Change { partition, key, actor, .. } = change;
            found.push(format!("{name}: {partition} {key}: {why} (by {}: {})", actor.name, actor.request));
        }
    }
    found
}

/// The status of a condition.
pub fn condition<'a>(object: &'a Value, type_: &str) -> &'a str {
    let conditions = object.pointer("/status/conditions").and_then(Value::as_array);
    let found = conditions.into_iter().flatten().find(|condition| condition["type"] == type_);
    found.and_then(|condition| condition["status"].as_str()).unwrap_or_default()
}

/// The controlling owner's kind and uid.
pub fn controller(object: &Value) -> Option<(&str, &str)> {
    let owners = object.pointer("/metadata/ownerReferences").and_then(Value::as_array);
    let owner = owners.into_iter().flatten().find(|owner| owner["controller"] == true)?;
    Some((owner["kind"].as_str()?, owner["uid"].as_str()?))
}

pub fn is_deleting(object: &Value) -> bool {
    object.pointer("/metadata/deletionTimestamp").is_some()
}

pub fn is_finished(pod: &Value) -> bool {
    matches!(text(pod, "/status/phase"), "Succeeded" | "Failed")
}

fn is_active(pod: &Value) -> bool {
    !is_finished(pod) && !is_deleting(pod)
}

fn is_available(pod: &Value) -> bool {
    is_active(pod) && condition(pod, "Ready") == "True"
}

/// Deleted now, by this change: removed, or marked.
fn is_deletion(change: &Change) -> bool {
    change.before.is_some_and(|before| !is_deleting(before)) && change.after.is_none_or(is_deleting)
}

fn by_controllers(change: &Change) -> bool {
    change.actor.name.starts_with("controllers")
}

/// A number, or the share of a whole; shares round up where that is generous.
fn share(value: Option<&Value>, whole: i64, default: &str, up: bool) -> i64 {
    let default = Value::from(default);
    match value.unwrap_or(&default) {
        Value::Number(number) => number.as_i64().unwrap_or(0),
        Value::String(text) => {
            let percent: i64 = text.trim_end_matches('%').parse().unwrap_or(0);
            if up { (whole * percent + 99) / 100 } else { whole * percent / 100 }
        }
        _ => 0,
    }
}

fn wish_of(partition: &str, object: &Value) -> Option<Wish> {
    let replicas = object.pointer("/spec/replicas").and_then(Value::as_i64).unwrap_or(1);
    match partition {
        "replicasets.apps" | "statefulsets.apps" => Some(Wish { most: replicas, least: replicas }),
        "deployments.apps" if text(object, "/spec/strategy/type") == "Recreate" => {
            Some(Wish { most: replicas, least: 0 })
        }
        "deployments.apps" => {
            let rolling = "/spec/strategy/rollingUpdate";
            let surge = share(object.pointer(&format!("{rolling}/maxSurge")), replicas, "25%", true);
            let unavailable =
                share(object.pointer(&format!("{rolling}/maxUnavailable")), replicas, "25%", false);
            // Without room to either side, one pod may be missing.
            let unavailable = if surge == 0 { unavailable.max(1) } else { unavailable };
            Some(Wish { most: replicas + surge, least: (replicas - unavailable).max(0) })
        }
        _ => None,
    }
}

/// Keeps what rules need to know of the past.
fn remember(history: &History, memory: &mut Memory, change: &Change) {
    let now = rim::elapsed();
    memory.slack.retain(|slack| now.saturating_sub(slack.at) < LAG);
    if let Some(after) = change.after
        && let Some(wish) = wish_of(change.partition, after)
    {
        let wishes = memory.wishes.entry(text(after, "/metadata/uid").to_owned()).or_default();
        wishes.push((now, wish));
        // The one in force when the window began stays.
        while wishes.len() > 1 && now.saturating_sub(wishes[1].0) > LAG {
            wishes.remove(0);
        }
    }
    if change.partition == "pods" {
        remember_pod(history, memory, change, now);
    }
}

fn remember_pod(history: &History, memory: &mut Memory, change: &Change, now: Duration) {
    let Some(pod) = change.after.or(change.before) else { return };
    let Some((kind, owner)) = controller(pod) else { return };
    if kind == "Job" && change.after.is_some_and(|pod| text(pod, "/status/phase") == "Succeeded") {
        let (uids, indexes) = memory.succeeded.entry(owner.to_owned()).or_default();
        uids.insert(text(pod, "/metadata/uid").to_owned());
        let index = pod.pointer("/metadata/annotations/batch.kubernetes.io~1job-completion-index");
        indexes.extend(index.and_then(Value::as_str).and_then(|index| index.parse::<i64>().ok()));
    }
    if change.after.is_some_and(is_available) && !change.before.is_some_and(is_available) {
        memory.available.insert(text(pod, "/metadata/uid").to_owned(), now);
    }
    let lost = change.before.is_some_and(is_available) && !change.after.is_some_and(is_available);
    if lost && (!by_controllers(change) || is_node_lost(history, pod)) {
        let top = deployment_of(history, owner)
            .map(|deployment| text(&deployment.value, "/metadata/uid").to_owned());
        memory.disturbed.insert(top.unwrap_or_else(|| owner.to_owned()), now);
    }
}

impl Memory {
    /// The most generous wish of late.
    fn most(&self, uid: &str) -> Option<i64> {
        self.wishes.get(uid)?.iter().map(|(_, wish)| wish.most).max()
    }

    fn least(&self, uid: &str) -> Option<i64> {
        self.wishes.get(uid)?.iter().map(|(_, wish)| wish.least).min()
    }

    fn slack(&self, partition: &str, namespace: &str) -> i64 {
        let counts = |slack: &&Slack| slack.partition == partition && slack.namespace == namespace;
        self.slack.iter().filter(counts).count() as i64
    }

    fn is_disturbed(&self, uid: &str) -> bool {
        self.disturbed.get(uid).is_some_and(|at| rim::elapsed().saturating_sub(*at) < LAG)
    }
}

fn owned<'a>(history: &'a History, partition: &str, uid: &'a str) -> impl Iterator<Item = &'a Object> {
    let objects = history.objects(partition).values();
    objects.filter(move |object| controller(&object.value).is_some_and(|(_, owner)| owner == uid))
}

fn replica_set<'a>(history: &'a History, uid: &str) -> Option<&'a Object> {
    history.objects("replicasets.apps").values().find(|object| text(&object.value, "/metadata/uid") == uid)
}

/// The deployment whose replica set has this uid.
fn deployment_of<'a>(history: &'a History, replica_set_uid: &str) -> Option<&'a Object> {
    let (_, owner) = controller(&replica_set(history, replica_set_uid)?.value)?;
    history.objects("deployments.apps").values().find(|object| text(&object.value, "/metadata/uid") == owner)
}

fn namespace_of(key: &str) -> &str {
    key.split_once('/').map_or("", |(namespace, _)| namespace)
}

fn is_namespace_ending(history: &History, key: &str) -> bool {
    let namespace = history.get("namespaces", namespace_of(key));
    namespace.is_none_or(|namespace| is_deleting(&namespace.value))
}

/// The node is gone, or told to be emptied.
fn is_node_lost(history: &History, pod: &Value) -> bool {
    let name = text(pod, "/spec/nodeName");
    let Some(node) = history.get("nodes", name) else { return !name.is_empty() };
    let taints = node.value.pointer("/spec/taints").and_then(Value::as_array);
    condition(&node.value, "Ready") != "True"
        || taints.into_iter().flatten().any(|taint| taint["effect"] == "NoExecute")
}

// ---- the rules ----

/// Nobody does the same thing again and again.
fn livelock(_: &History, memory: &mut Memory, change: &Change) -> Option<String> {
    const WRITES_MAX: u32 = 200;
    let minute = rim::elapsed().as_secs() / 60;
    let place = (change.partition.to_owned(), change.key.to_owned());
    let entry = memory.writes.entry(place).or_default();
    *entry = if entry.0 == minute { (minute, entry.1 + 1) } else { (minute, 1) };
    (entry.1 == WRITES_MAX).then(|| format!("written {WRITES_MAX} times within a minute"))
}

/// What never changes about an object, and what only grows.
fn identity(_: &History, _: &mut Memory, change: &Change) -> Option<String> {
    let (before, after) = (change.before?, change.after?);
    if text(before, "/metadata/uid") != text(after, "/metadata/uid") {
        return Some("another uid without a deletion between".to_owned());
    }
    if is_deleting(before) && !is_deleting(after) {
        return Some("a deletion was taken back".to_owned());
    }
    let generation = |object| number(object, "/metadata/generation");
    (generation(after) < generation(before)).then(|| "the generation went back".to_owned())
}

fn bound_once(_: &History, _: &mut Memory, change: &Change) -> Option<String> {
    if change.partition != "pods" {
        return None;
    }
    let (before, after) = (text(change.before?, "/spec/nodeName"), text(change.after?, "/spec/nodeName"));
    (!before.is_empty() && before != after).then(|| format!("moved from {before} to {after}"))
}

fn phases_end(_: &History, _: &mut Memory, change: &Change) -> Option<String> {
    if change.partition != "pods" {
        return None;
    }
    let (before, after) = (text(change.before?, "/status/phase"), text(change.after?, "/status/phase"));
    let finished = matches!(before, "Succeeded" | "Failed");
    (finished && before != after).then(|| format!("was {before} and is {after}"))
}

/// The scheduler fills no node beyond what it has.
fn node_capacity(history: &History, memory: &mut Memory, change: &Change) -> Option<String> {
    let after = change.after.filter(|_| change.partition == "pods")?;
    let name = text(after, "/spec/nodeName");
    let bound_now =
        !name.is_empty() && change.before.is_some_and(|before| text(before, "/spec/nodeName").is_empty());
    // After an answer that was lost the scheduler does not know what is on which node.
    let unsure = memory.slack.iter().any(|slack| slack.partition == "pods");
    if !bound_now || unsure || !change.actor.name.starts_with("scheduler") {
        return None;
    }
    let node = history.get("nodes", name)?;
    let amount = |value: Option<&Value>| value.and_then(Value::as_str).map_or(0, millis);
    let requests = |pod: &Value| -> i64 {
        let containers = pod.pointer("/spec/containers").and_then(Value::as_array);
        containers.into_iter().flatten().map(|c| amount(c.pointer("/resources/requests/cpu"))).sum()
    };
    let on_node = history.objects("pods").values().filter(|pod| text(&pod.value, "/spec/nodeName") == name);
    let used: i64 = on_node.filter(|pod| !is_finished(&pod.value)).map(|pod| requests(&pod.value)).sum();
    let has = amount(node.value.pointer("/status/allocatable/cpu"));
    (used > has).then(|| format!("{used} of {has} thousandths of a CPU are asked for on {name}"))
}

fn millis(text: &str) -> i64 {
    match text.strip_suffix('m') {
        Some(millis) => millis.parse().unwrap_or(0),
        None => text.parse::<i64>().unwrap_or(0) * 1000,
    }
}

/// No two live pods have the same address.
fn addresses(history: &History, _: &mut Memory, change: &Change) -> Option<String> {
    let after = change.after.filter(|_| change.partition == "pods")?;
    let ip = text(after, "/status/podIP");
    let given_now = !ip.is_empty() && change.before.is_none_or(|before| text(before, "/status/podIP") != ip);
    if !given_now || is_finished(after) {
        return None;
    }
    let others = history.objects("pods").iter().filter(|(key, _)| *key != change.key);
    let other = others
        .into_iter()
        .find(|(_, pod)| text(&pod.value, "/status/podIP") == ip && !is_finished(&pod.value));
    other.map(|(key, _)| format!("address {ip} is also {key}'s"))
}

fn service_addresses(history: &History, _: &mut Memory, change: &Change) -> Option<String> {
    let after = change.after.filter(|_| change.partition == "services" && change.before.is_none())?;
    let ip = text(after, "/spec/clusterIP");
    let others = history.objects("services").iter().filter(|(key, _)| *key != change.key);
    let mut others =
        others.filter(|(_, other)| !matches!(ip, "" | "None") && text(&other.value, "/spec/clusterIP") == ip);
    others.next().map(|(key, _)| format!("cluster address {ip} is also {key}'s"))
}

/// No pod is created beyond a quota.
fn quota(history: &History, _: &mut Memory, change: &Change) -> Option<String> {
    if change.partition != "pods" || change.before.is_some() || change.after.is_none() {
        return None;
    }
    let namespace = format!("{}/", namespace_of(change.key));
    let pods = history.objects("pods").iter().filter(|(key, _)| key.starts_with(&namespace));
    let count = pods.filter(|(_, pod)| is_active(&pod.value)).count();
    let quotas = history.objects("resourcequotas").iter().filter(|(key, _)| key.starts_with(&namespace));
    let hard = quotas
        .filter_map(|(_, quota)| text(&quota.value, "/status/hard/pods").parse::<usize>().ok())
        .min()?;
    (count > hard).then(|| format!("{count} pods, but the quota is {hard}"))
}

/// A replica set has no more pods than it wishes for.
fn replicas(history: &History, memory: &mut Memory, change: &Change) -> Option<String> {
    let after = change.after.filter(|_| change.partition == "pods" && change.before.is_none())?;
    let (_, owner) = controller(after).filter(|(kind, _)| *kind == "ReplicaSet")?;
    let most = memory.most(owner)? + memory.slack("pods", namespace_of(change.key));
    let has = owned(history, "pods", owner).filter(|pod| is_active(&pod.value)).count() as i64;
    (has > most).then(|| format!("{has} pods of a replica set that wishes for {most}"))
}

/// The replica sets of a deployment never wish for more than it and its surge allow.
fn surge(history: &History, memory: &mut Memory, change: &Change) -> Option<String> {
    let after = change.after.filter(|_| change.partition == "replicasets.apps" && by_controllers(change))?;
    let grown =
        number(after, "/spec/replicas") > change.before.map_or(0, |before| number(before, "/spec/replicas"));
    let (_, deployment) = controller(after).filter(|(kind, _)| *kind == "Deployment" && grown)?;
    if memory.slack("replicasets.apps", namespace_of(change.key)) > 0 {
        // A set may exist of which the loop does not know.
        return None;
    }
    let most = memory.most(deployment)?;
    let wished: i64 =
        owned(history, "replicasets.apps", deployment).map(|set| number(&set.value, "/spec/replicas")).sum();
    (wished > most)
        .then(|| format!("its deployment's replica sets wish for {wished} pods, {most} are allowed"))
}

/// No controller takes away a pod whose loss leaves its deployment with too few.
fn availability(history: &History, memory: &mut Memory, change: &Change) -> Option<String> {
    let pod = change.before.filter(|pod| change.partition == "pods" && is_available(pod))?;
    if !is_deletion(change)
        || !by_controllers(change)
        || is_namespace_ending(history, change.key)
        || is_node_lost(history, pod)
    {
        return None;
    }
    let (_, set) = controller(pod).filter(|(kind, _)| *kind == "ReplicaSet")?;
    let deployment = deployment_of(history, set).filter(|deployment| !is_deleting(&deployment.value))?;
    let uid = text(&deployment.value, "/metadata/uid");
    let since = memory.available.get(text(pod, "/metadata/uid")).copied().unwrap_or_default();
    let is_news = rim::elapsed().saturating_sub(since) < NEWS;
    if replica_set(history, set).is_none_or(|set| is_deleting(&set.value))
        || memory.is_disturbed(uid)
        || is_news
    {
        return None;
    }
    let least = memory.least(uid)?;
    let sets = owned(history, "replicasets.apps", uid);
    let left: usize = sets
        .map(|set| {
            owned(history, "pods", text(&set.value, "/metadata/uid"))
                .filter(|pod| is_available(&pod.value))
                .count()
        })
        .sum();
    ((left as i64) < least)
        .then(|| format!("its deployment has {left} available pods left and needs {least}"))
}

fn one_daemon_a_node(history: &History, memory: &mut Memory, change: &Change) -> Option<String> {
    let after = change.after.filter(|_| change.partition == "pods" && change.before.is_none())?;
    let (_, owner) = controller(after).filter(|(kind, _)| *kind == "DaemonSet")?;
    let set =
        history.objects("daemonsets.apps").values().find(|set| text(&set.value, "/metadata/uid") == owner)?;
    let surge = set.value.pointer("/spec/updateStrategy/rollingUpdate/maxSurge");
    let target = target_of(after);
    let same = owned(history, "pods", owner)
        .filter(|pod| is_active(&pod.value) && target_of(&pod.value) == target)
        .count() as i64;
    let most = 1 + i64::from(share(surge, 1, "0", true) > 0) + memory.slack("pods", namespace_of(change.key));
    (same > most).then(|| format!("{same} daemons of one set on node {target}"))
}

/// The node a daemon is meant for.
fn target_of(pod: &Value) -> &str {
    let terms = "/spec/affinity/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution/nodeSelectorTerms/0/matchFields/0/values/0";
    text(pod, terms)
}

/// What a job counts has happened, once.
fn jobs_count_once(_: &History, memory: &mut Memory, change: &Change) -> Option<String> {
    let after = change.after.filter(|_| change.partition == "jobs.batch")?;
    let counted = number(after, "/status/succeeded");
    let nothing = Default::default();
    let (uids, indexes) = memory.succeeded.get(text(after, "/metadata/uid")).unwrap_or(&nothing);
    if counted > uids.len() as i64 {
        return Some(format!("{counted} counted as succeeded, but only {} pods did", uids.len()));
    }
    let completed = completed_indexes(text(after, "/status/completedIndexes"));
    if let Some(index) = completed.iter().find(|index| !indexes.contains(index)) {
        return Some(format!("index {index} counted as completed, but no pod of it succeeded"));
    }
    if text(after, "/spec/completionMode") == "Indexed" && counted != completed.len() as i64 {
        return Some(format!(
            "{counted} counted as succeeded, but {} indexes are completed",
            completed.len()
        ));
    }
    let before = change.before?;
    let back = |field: &str| number(after, field) < number(before, field);
    let restarted = text(before, "/status/startTime") != text(after, "/status/startTime");
    (back("/status/succeeded") && !restarted).then(|| "the count of succeeded pods went back".to_owned())
}

fn completed_indexes(text: &str) -> Vec<i64> {
    let parse = |text: &str| text.parse::<i64>().unwrap_or(0);
    let parts = text.split(',').filter(|part| !part.is_empty());
    parts
        .flat_map(|part| match part.split_once('-') {
            Some((first, last)) => parse(first)..=parse(last),
            None => parse(part)..=parse(part),
        })
        .collect()
}

/// Controllers delete only what lost its owner, its namespace or its node, or what its owner has no use for.
fn no_innocent_deleted(history: &History, _: &mut Memory, change: &Change) -> Option<String> {
    let object = change.before.filter(|_| is_deletion(change) && by_controllers(change))?;
    if change.key.contains('/') && is_namespace_ending(history, change.key) {
        return None;
    }
    let owners = object.pointer("/metadata/ownerReferences").and_then(Value::as_array);
    let owners: Vec<&str> = owners.into_iter().flatten().filter_map(|owner| owner["uid"].as_str()).collect();
    let innocent = match change.partition {
        "configmaps" => owners.is_empty() || owners.iter().any(|uid| lives_on(history, uid)),
        "replicasets.apps" => {
            owners.iter().any(|uid| lives_on(history, uid)) && number(object, "/spec/replicas") > 0
        }
        "deployments.apps" | "statefulsets.apps" | "daemonsets.apps" | "services" | "nodes"
        | "cronjobs.batch" => owners.is_empty(),
        "pods" => owners.is_empty() && !is_finished(object) && !is_node_lost(history, object),
        _ => false,
    };
    innocent.then(|| format!("deleted without a reason; owners {owners:?}"))
}

fn lives_on(history: &History, uid: &str) -> bool {
    history.by_uid(uid).is_some_and(|(_, owner)| !is_deleting(&owner.value))
}
