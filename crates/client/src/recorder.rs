//! Events about objects (`v1` Event): repeated ones become a count, many similar ones are combined, and a source
//! that floods is cut. The rules and constants are client-go's event correlator
//! (`tools/record/events_cache.go`). Recording never blocks: a bounded channel feeds one task, and what does not
//! fit is dropped. No timer runs.

use crate::{Clock, reference_to};
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::{Client, Resource};
use serde_json::json;
use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::Hash;
use std::sync::atomic::{AtomicI64, Ordering};
use tokio::sync::mpsc;

/// Events waiting to be written; more are dropped.
const QUEUE_LEN_MAX: usize = 1000;
/// Distinct events remembered for counting.
const CACHE_LEN_MAX: usize = 4096;
/// Similar events (same object and reason, different message) written apart before they are combined.
const SIMILAR_MAX: usize = 10;
/// How long similar events are remembered, in seconds.
const SIMILAR_WINDOW_S: i64 = 600;
/// Events one source may write about one object at once, and how many seconds earn one more.
const BURST: f64 = 25.0;
const REFILL_S: f64 = 300.0;
/// How often one write is tried.
const TRIES_MAX: u32 = 5;

/// The two types of events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EventType {
    Normal,
    Warning,
}

impl EventType {
    pub fn as_str(self) -> &'static str {
        match self {
            EventType::Normal => "Normal",
            EventType::Warning => "Warning",
        }
    }
}

/// Records events as one component; clones share the task that writes. Dropping all clones ends it after what is
/// queued is written.
#[derive(Clone)]
pub struct Recorder {
    component: String,
    host: String,
    sender: mpsc::Sender<Observation>,
}

#[derive(Clone, Debug)]
struct Observation {
    component: String,
    host: String,
    about: ObjectReference,
    event_type: EventType,
    reason: String,
    message: String,
    annotations: Vec<(String, String)>,
}

impl Recorder {
    /// Starts the writing task. `component` is the event's source (`deployment-controller`), `host` the node for
    /// components that run on one, else empty. Must run inside tokio.
    pub fn new(client: Client, clock: Clock, component: &str, host: &str) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE_LEN_MAX);
        tokio::spawn(write_all(client, clock, receiver));
        Recorder { component: component.to_owned(), host: host.to_owned(), sender }
    }

    /// A recorder for another component that shares the task.
    pub fn for_component(&self, component: &str) -> Self {
        Recorder { component: component.to_owned(), host: self.host.clone(), sender: self.sender.clone() }
    }

    /// Records an event about `object`.
    pub fn event<K>(&self, object: &K, event_type: EventType, reason: &str, message: impl Into<String>)
    where
        K: Resource<DynamicType = ()>,
    {
        self.event_about(reference_to(object), event_type, reason, message);
    }

    /// Records an event about whatever `about` refers to (a container: with `field_path`).
    pub fn event_about(
        &self,
        about: ObjectReference,
        event_type: EventType,
        reason: &str,
        message: impl Into<String>,
    ) {
        let observation = Observation {
            component: self.component.clone(),
            host: self.host.clone(),
            about,
            event_type,
            reason: reason.to_owned(),
            message: message.into(),
            annotations: Vec::new(),
        };
        if self.sender.try_send(observation).is_err() {
            tracing::debug!(component = self.component, reason, "event dropped, the queue is full");
        }
    }
}

async fn write_all(client: Client, clock: Clock, mut receiver: mpsc::Receiver<Observation>) {
    let mut correlator = Correlator::default();
    while let Some(observation) = receiver.recv().await {
        let now = clock.now();
        if let Some(write) = correlator.observe(observation, now.as_second()) {
            write_one(&client, &clock, &mut correlator, write).await;
        }
    }
}

/// What the correlator decided to write.
#[derive(Debug)]
struct Write {
    key: EventKey,
    observation: Observation,
    /// The event to count up, if one like it was written before.
    known: Option<Known>,
}

#[derive(Clone, Debug)]
struct Known {
    name: String,
    count: i32,
}

async fn write_one(client: &Client, clock: &Clock, correlator: &mut Correlator, write: Write) {
    let namespace = match write.observation.about.namespace.as_deref() {
        None | Some("") => "default",
        Some(namespace) => namespace,
    };
    let api: Api<Event> = Api::namespaced(client.clone(), namespace);
    for attempt in 1..=TRIES_MAX {
        let result = match &write.known {
            Some(known) => count_up(&api, clock, known, &write.observation.message).await,
            None => Err(None),
        };
        let result = match result {
            // Counted up, or the known event expired meanwhile: then it is a new one.
            Ok(known) => Ok(known),
            Err(Some(error)) => Err(error),
            Err(None) => create(&api, clock, namespace, &write.observation).await,
        };
        match result {
            Ok(known) => return correlator.written(write.key, known),
            // An answer of the server will not change; only a lost connection is worth another try.
            Err(kube::Error::Api(status)) => {
                let (reason, error) = (&write.observation.reason, status.message.as_str());
                return tracing::debug!(reason, error, "event refused");
            }
            Err(error) => {
                tracing::debug!(attempt, %error, "event not written, retrying");
                tokio::time::sleep(std::time::Duration::from_millis(200) * attempt).await;
            }
        }
    }
}

/// `Err(None)` when the event does not exist any more.
async fn count_up(
    api: &Api<Event>,
    clock: &Clock,
    known: &Known,
    message: &str,
) -> Result<Known, Option<kube::Error>> {
    let count = known.count + 1;
    let patch = json!({"count": count, "lastTimestamp": clock.time(), "message": message});
    match api.patch(&known.name, &PatchParams::default(), &Patch::Merge(patch)).await {
        Ok(_) => Ok(Known { name: known.name.clone(), count }),
        Err(kube::Error::Api(status)) if status.code == 404 => Err(None),
        Err(error) => Err(Some(error)),
    }
}

async fn create(
    api: &Api<Event>,
    clock: &Clock,
    namespace: &str,
    observation: &Observation,
) -> Result<Known, kube::Error> {
    let now = clock.time();
    let about = &observation.about;
    let name = format!("{}.{:x}", about.name.as_deref().unwrap_or_default(), unique_nanos(clock));
    let annotations =
        (!observation.annotations.is_empty()).then(|| observation.annotations.iter().cloned().collect());
    let host = (!observation.host.is_empty()).then(|| observation.host.clone());
    let event = Event {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            namespace: Some(namespace.to_owned()),
            annotations,
            ..Default::default()
        },
        involved_object: about.clone(),
        type_: Some(observation.event_type.as_str().to_owned()),
        reason: Some(observation.reason.clone()),
        message: Some(observation.message.clone()),
        source: Some(EventSource { component: Some(observation.component.clone()), host: host.clone() }),
        reporting_component: Some(observation.component.clone()),
        reporting_instance: Some(host.unwrap_or_default()),
        first_timestamp: Some(now.clone()),
        last_timestamp: Some(now.clone()),
        count: Some(1),
        ..Default::default()
    };
    api.create(&PostParams::default(), &event).await?;
    Ok(Known { name, count: 1 })
}

/// The time in nanoseconds, but never the same twice: it makes event names.
fn unique_nanos(clock: &Clock) -> i64 {
    static LAST: AtomicI64 = AtomicI64::new(0);
    let now = i64::try_from(clock.now().as_nanosecond()).unwrap_or(i64::MAX);
    let next = |last: i64| Some(now.max(last.saturating_add(1)));
    match LAST.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next) {
        Ok(last) | Err(last) => now.max(last.saturating_add(1)),
    }
}

/// Who speaks about what.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct SourceKey {
    component: String,
    host: String,
    uid: String,
    namespace: String,
    name: String,
    kind: String,
    field_path: String,
}

/// Similar events share this.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct SimilarKey {
    source: SourceKey,
    event_type: EventType,
    reason: String,
}

/// Equal events share this; the message is empty for combined ones.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct EventKey {
    similar: SimilarKey,
    message: String,
}

/// Decides, without I/O, what becomes of an observation.
#[derive(Default)]
struct Correlator {
    similar: Recent<SimilarKey, Similar>,
    known: Recent<EventKey, Known>,
    tokens: Recent<SourceKey, Bucket>,
}

#[derive(Default)]
struct Similar {
    messages: HashSet<String>,
    last_s: i64,
}

struct Bucket {
    tokens: f64,
    filled_s: i64,
}

impl Correlator {
    /// `None` when the source said too much about the object.
    fn observe(&mut self, mut observation: Observation, now_s: i64) -> Option<Write> {
        let key = self.aggregate(&mut observation, now_s);
        if !self.admit(&key.similar.source, now_s) {
            return None;
        }
        let known = self.known.get_mut(&key).cloned();
        Some(Write { key, observation, known })
    }

    fn aggregate(&mut self, observation: &mut Observation, now_s: i64) -> EventKey {
        let similar = similar_key(observation);
        let group = self.similar.get_or_insert(similar.clone(), Similar::default);
        if now_s - group.last_s > SIMILAR_WINDOW_S {
            group.messages.clear();
        }
        group.last_s = now_s;
        if group.messages.len() < SIMILAR_MAX || group.messages.contains(&observation.message) {
            group.messages.insert(observation.message.clone());
        }
        let combined = group.messages.len() >= SIMILAR_MAX;
        if combined {
            observation.message = format!("(combined from similar events): {}", observation.message);
            return EventKey { similar, message: String::new() };
        }
        EventKey { similar, message: observation.message.clone() }
    }

    fn admit(&mut self, source: &SourceKey, now_s: i64) -> bool {
        let bucket = self.tokens.get_or_insert(source.clone(), || Bucket { tokens: BURST, filled_s: now_s });
        let earned = (now_s - bucket.filled_s).max(0) as f64 / REFILL_S;
        bucket.tokens = (bucket.tokens + earned).min(BURST);
        bucket.filled_s = now_s;
        if bucket.tokens < 1.0 {
            return false;
        }
        bucket.tokens -= 1.0;
        true
    }

    fn written(&mut self, key: EventKey, known: Known) {
        let count = known.count;
        self.known.get_or_insert(key, || known).count = count;
    }
}

fn similar_key(observation: &Observation) -> SimilarKey {
    let about = &observation.about;
    let text = |field: &Option<String>| field.clone().unwrap_or_default();
    SimilarKey {
        source: SourceKey {
            component: observation.component.clone(),
            host: observation.host.clone(),
            uid: text(&about.uid),
            namespace: text(&about.namespace),
            name: text(&about.name),
            kind: text(&about.kind),
            field_path: text(&about.field_path),
        },
        event_type: observation.event_type,
        reason: observation.reason.clone(),
    }
}

/// A map that forgets the oldest entries beyond [`CACHE_LEN_MAX`].
struct Recent<K, V> {
    entries: HashMap<K, V>,
    order: VecDeque<K>,
}

impl<K, V> Default for Recent<K, V> {
    fn default() -> Self {
        Recent { entries: HashMap::new(), order: VecDeque::new() }
    }
}

impl<K: Eq + Hash + Clone, V> Recent<K, V> {
    fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        self.entries.get_mut(key)
    }

    fn get_or_insert(&mut self, key: K, value: impl FnOnce() -> V) -> &mut V {
        if !self.entries.contains_key(&key) {
            if self.order.len() >= CACHE_LEN_MAX
                && let Some(oldest) = self.order.pop_front()
            {
                self.entries.remove(&oldest);
            }
            self.order.push_back(key.clone());
        }
        self.entries.entry(key).or_insert_with(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeApi;

    fn observation(name: &str, message: &str) -> Observation {
        Observation {
            component: "test".into(),
            host: String::new(),
            about: ObjectReference { name: Some(name.into()), ..Default::default() },
            event_type: EventType::Normal,
            reason: "Tested".into(),
            message: message.into(),
            annotations: Vec::new(),
        }
    }

    #[test]
    fn the_tenth_similar_event_is_combined() {
        let mut correlator = Correlator::default();
        let messages: Vec<String> = (0..12)
            .filter_map(|i| correlator.observe(observation("pod", &format!("message {i}")), 0))
            .map(|write| write.observation.message)
            .collect();
        assert_eq!(messages[8], "message 8");
        assert_eq!(messages[9], "(combined from similar events): message 9");
        assert_eq!(messages[11], "(combined from similar events): message 11");
    }

    #[test]
    fn a_source_that_floods_is_cut_and_earns_one_event_every_five_minutes() {
        let mut correlator = Correlator::default();
        let written =
            (0..100).filter(|_| correlator.observe(observation("pod", "same"), 0).is_some()).count();
        assert_eq!(written, 25);
        assert!(correlator.observe(observation("pod", "same"), 299).is_none());
        assert!(correlator.observe(observation("pod", "same"), 301).is_some());
        assert!(correlator.observe(observation("other", "same"), 301).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_repeated_event_is_counted_up() {
        let api = FakeApi::new();
        let recorder = Recorder::new(api.client(), Clock::System, "test", "");
        let about = ObjectReference {
            kind: Some("Pod".into()),
            namespace: Some("ns".into()),
            name: Some("a".into()),
            ..Default::default()
        };
        for _ in 0..3 {
            recorder.event_about(about.clone(), EventType::Warning, "Failed", "it failed");
        }
        let events = api
            .wait_for::<Event>("an event with count 3", |events| events.iter().any(|e| e.count == Some(3)))
            .await;
        assert_eq!(events.len(), 1);
        assert_eq!(events[0].message.as_deref(), Some("it failed"));
    }
}
