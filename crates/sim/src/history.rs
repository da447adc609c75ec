//! The model: everything that ever became durable, in order, and the state it adds up to. What components are told is
//! compared with it, and every record is checked against the rules ([`crate::rules`]).

use crate::rules::{self, Change, Slack};
use crate::trace::Trace;
use crate::wire::Actor;
use crate::world::entries_of;
use knarr_store::engine::Record;
use knarr_store::{Embedded, Store};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// One object as it is now.
#[derive(Clone, Debug)]
pub struct Object {
    pub revision: u64,
    pub value: Arc<Value>,
}

/// All objects of a kind, by `namespace/name`.
pub type Objects = BTreeMap<String, Object>;

/// Everything that became durable.
#[derive(Default)]
pub struct History {
    revision: u64,
    /// Partition → its objects.
    pub state: BTreeMap<String, Objects>,
    /// Partition → revision and key of each of its changes.
    changes: HashMap<String, Vec<(u64, String)>>,
    /// Of every object there ever was.
    uids: BTreeSet<String>,
    pub memory: rules::Memory,
}

/// What a watch has to tell next.
pub struct WatchCheck {
    partition: String,
    /// `namespace/`, or empty for all.
    prefix: String,
    last: u64,
    /// Every change is told: there is no selector. Otherwise only the order is checked.
    complete: bool,
}

impl History {
    pub fn revision(&self) -> u64 {
        self.revision
    }

    pub fn objects(&self, partition: &str) -> &Objects {
        static NONE: Objects = Objects::new();
        self.state.get(partition).unwrap_or(&NONE)
    }

    pub fn get(&self, partition: &str, key: &str) -> Option<&Object> {
        self.objects(partition).get(key)
    }

    /// Whether an object of this uid exists anywhere.
    pub fn by_uid(&self, uid: &str) -> Option<(&str, &Object)> {
        self.state.iter().find_map(|(partition, objects)| {
            let found = objects.values().find(|object| text(&object.value, "/metadata/uid") == uid)?;
            Some((partition.as_str(), found))
        })
    }

    /// A record became durable; what it breaks.
    pub fn record(&mut self, record: &Record, actor: &Actor, trace: &Trace) -> Vec<String> {
        let (partition, key) = (record.partition.to_string(), record.key.to_string());
        let mut found = Vec::new();
        if record.revision != self.revision + 1 {
            found.push(format!("revision {} follows {}", record.revision, self.revision));
        }
        self.revision = record.revision;
        self.changes.entry(partition.clone()).or_default().push((record.revision, key.clone()));
        let before = self.get(&partition, &key).cloned();
        let after: Option<Arc<Value>> =
            record.value.as_ref().map(|bytes| Arc::new(serde_json::from_slice(bytes).unwrap_or_default()));
        trace.line(&actor.name, &describe(record, &partition, &key, after.as_deref()));
        if let Some(after) = &after
            && before.is_none()
            && !self.uids.insert(text(after, "/metadata/uid").to_owned())
        {
            found.push(format!("{partition} {key}: a uid was given twice"));
        }
        let objects = self.state.entry(partition.clone()).or_default();
        match &after {
            Some(value) => {
                _ = objects.insert(key.clone(), Object { revision: record.revision, value: value.clone() })
            }
            None => _ = objects.remove(&key),
        }
        let change = Change {
            partition: &partition,
            key: &key,
            before: before.as_ref().map(|object| &*object.value),
            after: after.as_deref(),
            actor,
        };
        let mut memory = std::mem::take(&mut self.memory);
        found.extend(rules::check(self, &mut memory, &change));
        self.memory = memory;
        found
    }

    /// How often each partition was written.
    pub fn writes(&self) -> BTreeMap<String, usize> {
        self.changes.iter().map(|(partition, changes)| (partition.clone(), changes.len())).collect()
    }

    /// A component does not know whether its write happened: it may do it once more.
    pub fn ambiguous(&mut self, request: &str) {
        self.memory.slack.push(Slack::now(request));
    }

    /// A server that starts must have exactly what became durable.
    pub fn check_loaded(&self, store: &Embedded) -> Vec<String> {
        let mut found = Vec::new();
        if store.revision() != self.revision {
            found.push(format!(
                "after a restart the revision is {}, not {}",
                store.revision(),
                self.revision
            ));
        }
        let partitions: Vec<String> = self.state.keys().cloned().collect();
        let loaded: BTreeMap<(String, String), u64> =
            entries_of(store, &partitions).into_iter().map(|(p, k, r)| ((p, k), r)).collect();
        let mut known = BTreeMap::new();
        for (partition, objects) in &self.state {
            for (key, object) in objects {
                known.insert((partition.clone(), key.clone()), object.revision);
            }
        }
        for (place, revision) in &known {
            match loaded.get(place) {
                Some(loaded) if loaded == revision => {}
                other => found.push(format!(
                    "acknowledged write lost: {} {} has revision {revision}, after a restart {other:?}",
                    place.0, place.1
                )),
            }
        }
        let risen = loaded.keys().filter(|place| !known.contains_key(place));
        found.extend(risen.map(|place| format!("{} {} is back after a restart", place.0, place.1)));
        found
    }

    /// A write was acknowledged: is it durable?
    pub fn check_acknowledged(&self, request: &str, answer: &Value) -> Option<String> {
        let (partition, key, subresource) = place(request)?;
        let is_collection = answer.get("items").is_some();
        if request.contains("dryRun")
            || is_collection
            || answer["kind"] == "Status"
            || partition.ends_with("reviews.authorization.k8s.io")
        {
            return None;
        }
        let version = text(answer, "/metadata/resourceVersion");
        if version.is_empty() || matches!(subresource.as_str(), "binding" | "eviction" | "token" | "scale") {
            return None;
        }
        let revision: u64 = version.parse().ok()?;
        let key = match key.ends_with('/') || key.is_empty() {
            true => format!("{key}{}", text(answer, "/metadata/name")),
            false => key,
        };
        let told = self.changes.get(&partition)?.iter().rev().any(|(r, k)| *r == revision && *k == key);
        (!told)
            .then(|| format!("acknowledged revision {revision} of {partition} {key} is not in the history"))
    }

    /// A read was answered: is it of the present?
    pub fn check_read(&self, request: &str, asked_at: u64, answer: &Value) -> Option<String> {
        let (partition, key, subresource) = place(request)?;
        if !subresource.is_empty() || partition.starts_with("events") || request.contains("resourceVersion=")
        {
            return None;
        }
        let Some(items) = answer["items"].as_array() else {
            let version: u64 = text(answer, "/metadata/resourceVersion").parse().ok()?;
            let newest =
                self.changes.get(&partition)?.iter().rev().find(|(r, k)| *r <= asked_at && *k == key)?.0;
            return (version < newest)
                .then(|| format!("read revision {version}, but {newest} was there before"));
        };
        let version: u64 = text(answer, "/metadata/resourceVersion").parse().ok()?;
        if version < asked_at {
            return Some(format!("list of revision {version}, but {asked_at} was there before"));
        }
        if request.contains("Selector=") || request.contains("limit=") || version != self.revision {
            return None;
        }
        let expected = self.objects(&partition).keys().filter(|known| known.starts_with(&key)).count();
        (expected != items.len()).then(|| format!("list of {} objects of {expected}", items.len()))
    }

    /// A watch begins.
    pub fn watch(&self, request: &str) -> WatchCheck {
        let (partition, prefix, _) = place(request).unwrap_or_default();
        let query = request.split_once('?').map(|(_, query)| query).unwrap_or_default();
        let version = query.split('&').find_map(|part| part.strip_prefix("resourceVersion="));
        let last = version.and_then(|version| version.parse().ok()).unwrap_or(0);
        let complete = last > 0 && !request.contains("Selector=") && !partition.starts_with("events");
        WatchCheck { partition, prefix, last, complete }
    }

    /// An event arrives, as a line of JSON: is it the next one?
    pub fn check_event(&self, check: &mut WatchCheck, line: &[u8]) -> Option<String> {
        // Made-up events have their type last, those of stored bytes first.
        let is_mark = line.ends_with(b"\"type\":\"BOOKMARK\"}\n");
        let is_error = line.ends_with(b"\"type\":\"ERROR\"}\n");
        let version = version_of(line).filter(|_| !is_error)?;
        let expected = self.next_change(check);
        let last = std::mem::replace(&mut check.last, version);
        if version < last || (version == last && !is_mark && last > 0 && check.complete) {
            return Some(format!("watch goes back from {last} to {version}"));
        }
        if !check.complete {
            return None;
        }
        match expected {
            Some(next) if is_mark && next <= version => Some(format!(
                "watch of {} is marked complete up to {version} without {next}",
                check.partition
            )),
            next if !is_mark && next != Some(version) => Some(format!(
                "watch of {} has a gap: after {last} came {version}, not {next:?}",
                check.partition
            )),
            _ => None,
        }
    }

    fn next_change(&self, check: &WatchCheck) -> Option<u64> {
        let changes = self.changes.get(&check.partition)?;
        let start = changes.partition_point(|(revision, _)| *revision <= check.last);
        changes[start..].iter().find(|(_, key)| key.starts_with(&check.prefix)).map(|(revision, _)| *revision)
    }
}

/// The version of the object in an event. Parsing all of it would take most of the simulation's time; metadata comes
/// before everything that may hold the version of something else.
fn version_of(line: &[u8]) -> Option<u64> {
    const NAME: &[u8] = b"\"resourceVersion\":\"";
    let start = line.windows(NAME.len()).position(|part| part == NAME)? + NAME.len();
    let digits = line[start..].iter().take_while(|byte| byte.is_ascii_digit());
    digits.fold(None, |number, digit| Some(number.unwrap_or(0) * 10 + u64::from(digit - b'0')))
}

/// A text of a value, or the empty one.
pub fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// A number of a value, or zero.
pub fn number(value: &Value, pointer: &str) -> i64 {
    value.pointer(pointer).and_then(Value::as_i64).unwrap_or(0)
}

/// Partition, key (`namespace/` or empty for collections) and subresource of a request line.
pub fn place(request: &str) -> Option<(String, String, String)> {
    let path = request.split(' ').nth(1)?.split('?').next()?;
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let (group, rest) = match *parts.first()? {
        "api" => ("", parts.get(2..)?),
        "apis" => (*parts.get(1)?, parts.get(3..)?),
        _ => return None,
    };
    let (namespace, rest) = match rest {
        ["namespaces", namespace, plural, rest @ ..] if !matches!(*plural, "status" | "finalize") => {
            (format!("{namespace}/"), [&[*plural], rest].concat())
        }
        rest => (String::new(), rest.to_vec()),
    };
    let plural = rest.first()?;
    let partition = if group.is_empty() { (*plural).to_owned() } else { format!("{plural}.{group}") };
    let name = rest.get(1).copied().unwrap_or_default();
    let subresource = rest.get(2).copied().unwrap_or_default().to_owned();
    Some((partition, format!("{namespace}{name}"), subresource))
}

/// One line about a record: what a reader of the trace wants to know.
fn describe(record: &Record, partition: &str, key: &str, after: Option<&Value>) -> String {
    let revision = record.revision;
    let Some(after) = after else { return format!("#{revision} removed {partition} {key}") };
    let mut line = format!("#{revision} wrote {partition} {key}");
    let mut add = |name: &str, value: &str| {
        if !value.is_empty() {
            line += &format!(" {name}={value}");
        }
    };
    match partition {
        "pods" => {
            add("node", text(after, "/spec/nodeName"));
            add("phase", text(after, "/status/phase"));
            add("ready", rules::condition(after, "Ready"));
        }
        "events" => add("reason", &format!("{} {}", text(after, "/reason"), text(after, "/message"))),
        _ => {
            for (name, pointer) in [
                ("replicas", "/spec/replicas"),
                ("has", "/status/replicas"),
                ("ready", "/status/readyReplicas"),
                ("succeeded", "/status/succeeded"),
                ("failed", "/status/failed"),
            ] {
                if let Some(value) = after.pointer(pointer) {
                    add(name, &value.to_string());
                }
            }
        }
    }
    if after.pointer("/metadata/deletionTimestamp").is_some() {
        line += " deleting";
    }
    line
}
