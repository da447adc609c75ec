//! One resource in memory: the current entries, and the recent history that watches and exact reads use.
//!
//! The history is a ring shared by all watchers; each watcher is only a position in it. A watcher that
//! falls off the end learns so and starts over: it can never hold memory or slow a writer.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

use parking_lot::RwLock;
use tokio::sync::watch;

use crate::{Digest, Entry, Range, ReadError, Revision};

/// How many changes a partition remembers.
pub const HISTORY_EVENTS_MAX: usize = 16_384;
/// How many bytes of superseded and deleted values a partition remembers.
pub const HISTORY_BYTES_MAX: usize = 16 << 20;
/// How many changes a watcher gets at a time.
pub const WATCH_BATCH_MAX: usize = 512;

/// One change, as a watcher sees it.
#[derive(Debug, Clone)]
pub struct Event {
    pub revision: Revision,
    /// The value before, if there was one.
    pub before: Option<Arc<Entry>>,
    /// The value after; `Err` is the last state of a deleted key.
    pub after: Result<Arc<Entry>, Arc<Entry>>,
}

impl Event {
    pub fn key(&self) -> &Arc<str> {
        match &self.after {
            Ok(entry) | Err(entry) => &entry.key,
        }
    }

    fn retained_bytes(&self) -> usize {
        let last = self.after.as_ref().err().map_or(0, |e| e.bytes.len());
        self.before.as_ref().map_or(0, |e| e.bytes.len()) + last
    }
}

/// Entries of one moment.
#[derive(Debug, Clone)]
pub struct Listing {
    pub entries: Vec<Arc<Entry>>,
    /// The moment.
    pub revision: Revision,
    /// How many more match beyond the limit.
    pub remaining: usize,
}

/// One resource. Cheap to clone: clones share it.
#[derive(Clone)]
pub struct Partition {
    inner: Arc<Inner>,
}

struct Inner {
    state: RwLock<State>,
    /// The newest revision of this partition; wakes watchers.
    changed: watch::Sender<Revision>,
}

struct State {
    /// With the digest of each, so that a list that skips most reads nothing else.
    entries: BTreeMap<Arc<str>, (Digest, Arc<Entry>)>,
    history: VecDeque<Event>,
    history_bytes: usize,
    /// History is complete after this revision.
    floor: Revision,
    /// Everything up to here, also of other partitions, has been applied.
    seen: Revision,
}

impl Partition {
    /// An empty partition whose history starts after `floor`.
    pub fn new(floor: Revision) -> Self {
        let state = State {
            entries: BTreeMap::new(),
            history: VecDeque::new(),
            history_bytes: 0,
            floor,
            seen: floor,
        };
        Partition { inner: Arc::new(Inner { state: RwLock::new(state), changed: watch::Sender::new(floor) }) }
    }

    pub fn get(&self, key: &str) -> Option<Arc<Entry>> {
        self.inner.state.read().entries.get(key).map(|(_, entry)| entry.clone())
    }

    pub fn len(&self) -> usize {
        self.inner.state.read().entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The oldest revision a watch may start from.
    pub fn floor(&self) -> Revision {
        self.inner.state.read().floor
    }

    /// The newest revision that changed something here.
    pub fn changed(&self) -> Revision {
        *self.inner.changed.borrow()
    }

    /// Applies changes in revision order and wakes the watchers once.
    pub fn apply(&self, events: impl IntoIterator<Item = Event>) {
        let mut state = self.inner.state.write();
        for event in events {
            state.apply(event);
        }
        let seen = state.seen;
        drop(state);
        self.inner.changed.send_replace(seen);
    }

    /// Loads an entry without history, at start.
    pub fn load(&self, entry: Arc<Entry>) {
        self.inner.state.write().insert(entry);
    }

    /// Forgets history up to `revision`.
    pub fn compact(&self, revision: Revision) {
        let mut state = self.inner.state.write();
        while state.history.front().is_some_and(|e| e.revision <= revision) {
            state.forget_oldest();
        }
        state.floor = state.floor.max(revision);
    }

    /// Lists a range; `now` is the store's newest revision.
    pub fn list(&self, range: &Range, now: Revision) -> Result<Listing, ReadError> {
        let state = self.inner.state.read();
        let at = range.at.unwrap_or(now);
        if at > now {
            return Err(ReadError::Future { requested: at, newest: now });
        }
        if at < state.floor && range.at.is_some() {
            return Err(ReadError::Compacted { requested: at, oldest: state.floor });
        }
        let undo = state.undo_to(at);
        let start = match &range.after {
            Some(after) => Bound::Excluded(after.as_str()),
            None => Bound::Included(range.prefix.as_str()),
        };
        let end = after_prefix(&range.prefix);
        let end = end.as_deref().map_or(Bound::Unbounded, Bound::Excluded);
        let current = state
            .entries
            .range::<str, _>((start, end))
            .filter(|(_, (digest, _))| digest.may_hold(range.about))
            .filter(|(key, _)| undo.is_empty() || !undo.contains_key(key.as_ref()))
            .map(|(key, (_, entry))| (key.as_ref(), entry));
        let past = undo
            .range::<str, _>((start, end))
            .filter_map(|(key, entry)| entry.map(|e| (*key, e)))
            .filter(|(_, entry)| entry.digest.may_hold(range.about));
        let limit = if range.limit == 0 { usize::MAX } else { range.limit };
        let mut entries = Vec::new();
        let mut remaining = 0;
        for (_, entry) in merge_by_key(current, past) {
            if entries.len() < limit {
                entries.push(entry.clone());
            } else {
                remaining += 1;
            }
        }
        Ok(Listing { entries, revision: at, remaining })
    }

    /// A watcher positioned after `from`.
    pub fn watch(&self, from: Revision) -> Result<Watcher, ReadError> {
        let floor = self.inner.state.read().floor;
        if from < floor {
            return Err(ReadError::Compacted { requested: from, oldest: floor });
        }
        let changed = self.inner.changed.subscribe();
        Ok(Watcher { partition: self.clone(), position: from, changed })
    }
}

impl State {
    fn insert(&mut self, entry: Arc<Entry>) {
        self.entries.insert(entry.key.clone(), (entry.digest, entry));
    }

    fn apply(&mut self, event: Event) {
        debug_assert!(event.revision > self.seen || self.history.is_empty(), "revisions only grow");
        match &event.after {
            Ok(entry) => self.insert(entry.clone()),
            Err(last) => drop(self.entries.remove(&last.key)),
        }
        self.seen = event.revision;
        self.history_bytes += event.retained_bytes();
        self.history.push_back(event);
        while self.history.len() > HISTORY_EVENTS_MAX || self.history_bytes > HISTORY_BYTES_MAX {
            if self.history.len() == 1 {
                break;
            }
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        if let Some(event) = self.history.pop_front() {
            self.history_bytes -= event.retained_bytes();
            self.floor = self.floor.max(event.revision);
        }
    }

    /// What differs between now and `at`: the value each changed key had then.
    fn undo_to(&self, at: Revision) -> BTreeMap<&str, Option<&Arc<Entry>>> {
        let mut undo = BTreeMap::new();
        for event in self.history.iter().rev().take_while(|e| e.revision > at) {
            undo.insert(event.key().as_ref(), event.before.as_ref());
        }
        undo
    }
}

/// The first key after all that start with the prefix; none if there is no such key. Comparing each key with the prefix
/// instead would read all of them from memory.
fn after_prefix(prefix: &str) -> Option<String> {
    let last = prefix.chars().next_back()?;
    let next = (last..=char::MAX).nth(1)?;
    Some(format!("{}{next}", &prefix[..prefix.len() - last.len_utf8()]))
}

/// Joins two sorted, disjoint sequences into one sorted sequence.
fn merge_by_key<'a>(
    left: impl Iterator<Item = (&'a str, &'a Arc<Entry>)>,
    right: impl Iterator<Item = (&'a str, &'a Arc<Entry>)>,
) -> impl Iterator<Item = (&'a str, &'a Arc<Entry>)> {
    let (mut left, mut right) = (left.peekable(), right.peekable());
    std::iter::from_fn(move || match (left.peek(), right.peek()) {
        (Some(l), Some(r)) if l.0 > r.0 => right.next(),
        (Some(_), _) => left.next(),
        (None, _) => right.next(),
    })
}

/// A position in a partition's history.
pub struct Watcher {
    partition: Partition,
    position: Revision,
    changed: watch::Receiver<Revision>,
}

impl Watcher {
    /// The changes after the position, at least one; waits for it.
    ///
    /// # Errors
    /// `Compacted` if the history has moved past the position: list again and start over.
    pub async fn next(&mut self) -> Result<Vec<Event>, ReadError> {
        loop {
            // Marked as seen before reading: a change in between wakes the wait below.
            self.changed.borrow_and_update();
            let events = self.try_next()?;
            if !events.is_empty() {
                return Ok(events);
            }
            if self.changed.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// The changes there are, without waiting.
    pub fn try_next(&mut self) -> Result<Vec<Event>, ReadError> {
        let state = self.partition.inner.state.read();
        if self.position < state.floor {
            return Err(ReadError::Compacted { requested: self.position, oldest: state.floor });
        }
        let start = state.history.partition_point(|e| e.revision <= self.position);
        let events: Vec<Event> = state.history.range(start..).take(WATCH_BATCH_MAX).cloned().collect();
        if let Some(last) = events.last() {
            self.position = last.revision;
        }
        Ok(events)
    }

    /// The revision up to which everything was delivered.
    pub fn position(&self) -> Revision {
        self.position
    }

    /// Declares that everything up to `revision` was delivered: bookmarks move idle watchers forward,
    /// so that a compaction of other keys' history does not cut them off.
    pub fn advance(&mut self, revision: Revision) {
        let state = self.partition.inner.state.read();
        let pending = state.history.back().is_some_and(|e| e.revision > self.position);
        if !pending {
            self.position = self.position.max(revision);
        }
    }
}
