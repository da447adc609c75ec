//! The embedded store: one committer, group commit, a durable log.
//!
//! Writers queue; the committer takes what has gathered, checks each write against the state after the
//! ones before it, appends all of them to the log in one durable commit, makes them visible and answers.
//! While it waits for the disk the next group gathers, so the slower the disk, the larger the groups.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use tokio::sync::{mpsc, oneshot, watch};

use crate::engine::{Engine, EngineError, Marks, Record};
use crate::partition::{Event, Listing, Partition, Watcher};
use crate::{Change, Committed, Digest, Entry, Expect, Range, ReadError, Revision, Store, Write, WriteError};

/// How many writers may wait for the committer; more wait for a place in the queue.
pub const QUEUE_MAX: usize = 4096;
/// How many writes one durable commit takes at most.
pub const GROUP_MAX: usize = 512;
/// Superseded records are dropped from the log in groups of at least this size.
const TRIM_MIN: usize = 512;

/// How the store behaves.
#[derive(Clone)]
pub struct Options {
    /// How long superseded values stay in the log, so that watches survive a restart.
    pub retention: Duration,
    /// How many superseded values stay in the log at most.
    pub retention_records_max: usize,
    /// The time of day, for expiry and retention.
    pub clock: Clock,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            retention: Duration::from_secs(300),
            retention_records_max: 100_000,
            clock: Arc::new(SystemTime::now),
        }
    }
}

/// The store of a single server.
pub struct Embedded {
    shared: Arc<Shared>,
    commit: Commit,
    clock: Clock,
}

type Clock = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// How writes reach the committer.
enum Commit {
    /// Through a queue, to a thread that may block on the disk.
    Thread(mpsc::Sender<Request>),
    /// At once, in the caller: for engines that never block, and for simulations.
    Inline(Mutex<Committer>),
}

struct Shared {
    partitions: RwLock<HashMap<Arc<str>, Partition>>,
    revision: AtomicU64,
    /// The oldest revision from which history can be complete.
    floor: AtomicU64,
    /// When the next entry expires.
    next_expiry: watch::Sender<Option<SystemTime>>,
}

enum Request {
    Write(Write, oneshot::Sender<Result<Committed, WriteError>>),
    Expire(oneshot::Sender<()>),
}

impl Embedded {
    /// Opens the store on an engine that blocks on a disk; commits run in a thread of their own.
    pub fn open(engine: impl Engine + 'static, options: Options) -> Result<Self, EngineError> {
        let clock = options.clock.clone();
        let (shared, mut committer) = load(Box::new(engine), options)?;
        let (queue, mut requests) = mpsc::channel(QUEUE_MAX);
        std::thread::Builder::new()
            .name("store".into())
            .spawn(move || committer.run(&mut requests))
            .map_err(|_| EngineError::Injected("cannot start the committer thread"))?;
        Ok(Embedded { shared, commit: Commit::Thread(queue), clock })
    }

    /// Opens the store on an engine that answers at once; every step is taken in the caller's thread.
    pub fn open_inline(engine: impl Engine + 'static, options: Options) -> Result<Self, EngineError> {
        let clock = options.clock.clone();
        let (shared, committer) = load(Box::new(engine), options)?;
        Ok(Embedded { shared, commit: Commit::Inline(Mutex::new(committer)), clock })
    }

    /// Deletes entries as they expire, for as long as it is polled.
    pub async fn run_expiry(&self) {
        let mut next = self.shared.next_expiry.subscribe();
        loop {
            let due = *next.borrow_and_update();
            let sleep = async {
                match due {
                    Some(at) => {
                        let wait = at.duration_since((self.clock)()).unwrap_or_default();
                        tokio::time::sleep(wait + Duration::from_millis(1)).await;
                    }
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = sleep => self.expire().await,
                changed = next.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Deletes what has expired by now.
    pub async fn expire(&self) {
        match &self.commit {
            Commit::Inline(committer) => committer.lock().expire(),
            Commit::Thread(queue) => {
                let (reply, done) = oneshot::channel();
                if queue.send(Request::Expire(reply)).await.is_ok() && done.await.is_err() {
                    tracing::warn!("the store closed while entries expired");
                }
            }
        }
    }
}

#[async_trait::async_trait]
impl Store for Embedded {
    fn revision(&self) -> Revision {
        self.shared.revision.load(Ordering::Acquire)
    }

    fn get(&self, partition: &str, key: &str) -> Option<Arc<Entry>> {
        self.shared.find(partition)?.get(key)
    }

    fn list(&self, partition: &str, range: &Range) -> Result<Listing, ReadError> {
        self.shared.partition(partition).list(range, self.revision())
    }

    fn changed(&self, partition: &str) -> Revision {
        self.shared.partition(partition).changed()
    }

    fn count(&self, partition: &str) -> usize {
        self.shared.find(partition).map_or(0, |p| p.len())
    }

    fn watch(&self, partition: &str, from: Revision) -> Result<Watcher, ReadError> {
        self.shared.partition(partition).watch(from)
    }

    async fn commit(&self, write: Write) -> Result<Committed, WriteError> {
        match &self.commit {
            Commit::Inline(committer) => committer.lock().commit_one(write),
            Commit::Thread(queue) => {
                let (reply, answer) = oneshot::channel();
                queue.send(Request::Write(write, reply)).await.map_err(|_| WriteError::Closed)?;
                answer.await.map_err(|_| WriteError::Closed)?
            }
        }
    }

    fn compact(&self, revision: Revision) {
        let revision = revision.min(self.revision());
        self.shared.floor.fetch_max(revision, Ordering::AcqRel);
        let partitions: Vec<Partition> = self.shared.partitions.read().values().cloned().collect();
        partitions.iter().for_each(|p| p.compact(revision));
    }
}

impl Shared {
    fn find(&self, name: &str) -> Option<Partition> {
        self.partitions.read().get(name).cloned()
    }

    fn partition(&self, name: &str) -> Partition {
        if let Some(found) = self.find(name) {
            return found;
        }
        let floor = self.floor.load(Ordering::Acquire);
        self.partitions.write().entry(name.into()).or_insert_with(|| Partition::new(floor)).clone()
    }
}

/// Rebuilds memory from the log.
fn load(mut engine: Box<dyn Engine>, options: Options) -> Result<(Arc<Shared>, Committer), EngineError> {
    let shared = Arc::new(Shared {
        partitions: RwLock::default(),
        revision: AtomicU64::new(0),
        floor: AtomicU64::new(0),
        next_expiry: watch::Sender::new(None),
    });
    let mut records = Vec::new();
    let marks = engine.load(&mut |record| records.push(record))?;
    shared.floor.store(marks.floor, Ordering::Release);
    let mut committer = Committer {
        engine,
        options,
        shared: shared.clone(),
        expiries: BTreeSet::new(),
        garbage: VecDeque::new(),
    };
    for record in records {
        committer.replay(record, marks.floor);
    }
    shared.revision.store(marks.highest, Ordering::Release);
    committer.announce_expiry();
    Ok((shared, committer))
}

/// Owns the engine; the only one who changes anything.
struct Committer {
    engine: Box<dyn Engine>,
    options: Options,
    shared: Arc<Shared>,
    expiries: BTreeSet<(SystemTime, Arc<str>, Arc<str>)>,
    /// Log records that no current value needs, oldest first.
    garbage: VecDeque<Garbage>,
}

struct Garbage {
    since: SystemTime,
    /// The change that made the record superfluous.
    by: Revision,
    record: Revision,
}

/// Partition and key.
type Spot = (Arc<str>, Arc<str>);

/// A write that passed its check, ready for the log.
struct Pending {
    record: Record,
    event: Event,
}

impl Committer {
    fn run(&mut self, requests: &mut mpsc::Receiver<Request>) {
        while let Some(first) = requests.blocking_recv() {
            let mut group = vec![first];
            while group.len() < GROUP_MAX
                && let Ok(request) = requests.try_recv()
            {
                group.push(request);
            }
            self.commit_group(group);
        }
    }

    fn commit_one(&mut self, write: Write) -> Result<Committed, WriteError> {
        let mut results = self.commit_writes(vec![write]);
        results.pop().unwrap_or(Err(WriteError::Closed))
    }

    fn commit_group(&mut self, group: Vec<Request>) {
        let (mut writes, mut replies, mut expirations) = (Vec::new(), Vec::new(), Vec::new());
        for request in group {
            match request {
                Request::Write(write, reply) => {
                    writes.push(write);
                    replies.push(reply);
                }
                Request::Expire(reply) => expirations.push(reply),
            }
        }
        for (reply, result) in replies.into_iter().zip(self.commit_writes(writes)) {
            // A writer that gave up waiting does not undo its write.
            reply.send(result).ok();
        }
        for reply in expirations {
            self.expire();
            reply.send(()).ok();
        }
    }

    /// Checks, logs and publishes; answers in the order of the writes.
    fn commit_writes(&mut self, writes: Vec<Write>) -> Vec<Result<Committed, WriteError>> {
        let mut next = self.shared.revision.load(Ordering::Acquire);
        let mut overlay: HashMap<Spot, Option<Arc<Entry>>> = HashMap::new();
        let mut pending: Vec<Pending> = Vec::new();
        let mut results: Vec<Result<Committed, WriteError>> = Vec::new();
        for write in writes {
            let place = (write.partition.clone(), write.key.clone());
            let current = match overlay.get(&place) {
                Some(entry) => entry.clone(),
                None => self.shared.partition(&write.partition).get(&write.key),
            };
            results.push(check(&write, current.as_ref()).map(|()| {
                next += 1;
                let step = self.prepare(write, current, next);
                let entry = match &step.event.after {
                    Ok(entry) | Err(entry) => entry.clone(),
                };
                overlay.insert(place, step.event.after.clone().ok());
                pending.push(step);
                Committed { revision: next, entry }
            }));
        }
        if pending.is_empty() {
            return results;
        }
        let records: Vec<Record> = pending.iter().map(|p| p.record.clone()).collect();
        if let Err(error) = self.engine.append(&records) {
            tracing::error!(%error, writes = records.len(), "cannot write the log");
            let failed = WriteError::Disk(error.to_string());
            return results.into_iter().map(|r| r.and(Err(failed.clone()))).collect();
        }
        self.publish(pending, next);
        self.trim();
        results
    }

    fn prepare(&self, write: Write, before: Option<Arc<Entry>>, revision: Revision) -> Pending {
        let Write { partition, key, change, .. } = write;
        let digest = match change {
            Change::Put { digest, .. } => digest,
            Change::Delete { .. } => Digest::default(),
        };
        let make = |bytes, expires| {
            let key = before.as_ref().map_or_else(|| key.clone(), |b| b.key.clone());
            Arc::new(Entry { key, revision, bytes, expires, digest, view: Default::default() })
        };
        let (value, after) = match change {
            Change::Put { bytes, splice: at, time_to_live, .. } => {
                let expires = time_to_live.map(|ttl| (self.options.clock)() + ttl);
                let bytes = splice(bytes, at, revision);
                (Some(bytes.clone()), Ok(make(bytes, expires)))
            }
            Change::Delete { last } => {
                let bytes = match (last, &before) {
                    (Some((bytes, at)), _) => splice(bytes, at, revision),
                    (None, Some(before)) => before.bytes.clone(),
                    (None, None) => Bytes::new(),
                };
                (None, Err(make(bytes, None)))
            }
        };
        let expires = after.as_ref().ok().and_then(|e: &Arc<Entry>| e.expires);
        let record = Record { revision, partition, key, value, expires, digest };
        Pending { record, event: Event { revision, before, after } }
    }

    /// Makes logged changes visible: entries and history first, the global revision last.
    fn publish(&mut self, pending: Vec<Pending>, newest: Revision) {
        let now = (self.options.clock)();
        let mut groups: Vec<(Arc<str>, Vec<Event>)> = Vec::new();
        for Pending { record, event } in pending {
            self.note(&record, &event, now);
            match groups.iter_mut().find(|(name, _)| *name == record.partition) {
                Some((_, events)) => events.push(event),
                None => groups.push((record.partition, vec![event])),
            }
        }
        for (name, events) in groups {
            self.shared.partition(&name).apply(events);
        }
        self.shared.revision.store(newest, Ordering::Release);
        self.announce_expiry();
    }

    /// Keeps the books on what expires and what the log no longer needs.
    fn note(&mut self, record: &Record, event: &Event, now: SystemTime) {
        let place = |at| (at, record.partition.clone(), record.key.clone());
        if let Some(before) = &event.before {
            self.garbage.push_back(Garbage { since: now, by: record.revision, record: before.revision });
            if let Some(at) = before.expires {
                self.expiries.remove(&place(at));
            }
        }
        if event.after.is_err() {
            self.garbage.push_back(Garbage { since: now, by: record.revision, record: record.revision });
        }
        if let Some(at) = record.expires {
            self.expiries.insert(place(at));
        }
    }

    fn announce_expiry(&self) {
        let next = self.expiries.first().map(|(at, ..)| *at);
        self.shared.next_expiry.send_if_modified(|known| std::mem::replace(known, next) != next);
    }

    fn expire(&mut self) {
        let now = (self.options.clock)();
        let due: Vec<Write> = self
            .expiries
            .iter()
            .take_while(|(at, ..)| *at <= now)
            .take(GROUP_MAX)
            .map(|(_, partition, key)| Write {
                partition: partition.clone(),
                key: key.clone(),
                expect: Expect::Any,
                change: Change::Delete { last: None },
            })
            .collect();
        if !due.is_empty() {
            self.commit_writes(due);
        }
    }

    /// Drops log records whose retention is over.
    fn trim(&mut self) {
        let horizon = (self.options.clock)() - self.options.retention;
        let excess = self.garbage.len().saturating_sub(self.options.retention_records_max);
        let due = self.garbage.iter().take_while(|g| g.since <= horizon).count().max(excess);
        if due < TRIM_MIN.min(self.options.retention_records_max.max(1)) {
            return;
        }
        let dropped: Vec<Garbage> = self.garbage.drain(..due).collect();
        let revisions: Vec<Revision> = dropped.iter().map(|g| g.record).collect();
        let floor = dropped.last().map_or(0, |g| g.by);
        let marks = Marks { highest: self.shared.revision.load(Ordering::Acquire), floor };
        if let Err(error) = self.engine.remove(&revisions, marks) {
            // They stay in the log and are found again at the next start.
            tracing::warn!(%error, records = revisions.len(), "cannot trim the log");
        }
    }

    /// Applies a record read at start; those after `floor` become history again.
    fn replay(&mut self, record: Record, floor: Revision) {
        let partition = self.shared.partition(&record.partition);
        let before = partition.get(&record.key);
        let Record { key, revision, expires, digest, .. } = &record;
        let make = |bytes| {
            let (key, revision, expires, digest) = (key.clone(), *revision, *expires, *digest);
            Arc::new(Entry { key, revision, bytes, expires, digest, view: Default::default() })
        };
        let after = match (&record.value, &before) {
            (Some(value), _) => Ok(make(value.clone())),
            (None, Some(before)) => Err(make(before.bytes.clone())),
            (None, None) => Err(make(Bytes::new())),
        };
        let event = Event { revision: record.revision, before, after };
        let now = (self.options.clock)();
        self.note(&record, &event, now);
        let (revision, is_put) = (event.revision, event.after.is_ok());
        match event.after {
            Ok(entry) if revision <= floor => partition.load(entry),
            _ if revision <= floor && !is_put => {}
            _ => partition.apply([event]),
        }
    }
}

fn check(write: &Write, current: Option<&Arc<Entry>>) -> Result<(), WriteError> {
    match (write.expect, current) {
        (Expect::Absent, Some(_)) => Err(WriteError::Exists),
        (Expect::Revision(wanted), Some(entry)) if entry.revision != wanted => {
            Err(WriteError::Changed(entry.clone()))
        }
        (Expect::Revision(_), None) => Err(WriteError::NotFound),
        (Expect::Any, None) if matches!(write.change, Change::Delete { .. }) => Err(WriteError::NotFound),
        _ => Ok(()),
    }
}

/// Writes the revision into the bytes.
fn splice(mut bytes: Vec<u8>, at: Option<usize>, revision: Revision) -> Bytes {
    if let Some(at) = at {
        let digits = revision.to_string();
        bytes.splice(at..at, digits.bytes());
    }
    bytes.shrink_to_fit();
    bytes.into()
}
