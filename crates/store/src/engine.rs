//! Where the log is kept. An engine only appends records and drops superseded ones; memory does the rest.
//!
//! fjall was chosen over redb and SQLite by measurement: see `docs/decisions/store-engine.md`.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use fjall::config::{BlockSizePolicy, FilterPolicy};
use parking_lot::Mutex;

use crate::{Digest, Revision};

/// One change as the log keeps it.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    pub revision: Revision,
    pub partition: Arc<str>,
    pub key: Arc<str>,
    /// `None` is a deletion.
    pub value: Option<Bytes>,
    pub expires: Option<SystemTime>,
    pub digest: Digest,
}

/// How far the log had come when it was last trimmed.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Marks {
    /// The highest revision ever appended.
    pub highest: Revision,
    /// The log is complete after this revision; before it, only current values are left.
    pub floor: Revision,
}

/// A durable log of records.
///
/// `append` returns after the records survive a power cut; either all of them do or none. `remove` need
/// not be durable: records removed in vain are only superseded ones, and are removed again later.
pub trait Engine: Send {
    /// Visits all records in revision order.
    fn load(&mut self, visit: &mut dyn FnMut(Record)) -> Result<Marks, EngineError>;

    fn append(&mut self, records: &[Record]) -> Result<(), EngineError>;

    /// Drops superseded records and remembers the marks.
    fn remove(&mut self, revisions: &[Revision], marks: Marks) -> Result<(), EngineError>;
}

/// The disk refused, or what it holds makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("log at {path}: {source}")]
    Open { path: String, source: fjall::Error },
    #[error("log: {0}")]
    Disk(#[from] fjall::Error),
    #[error("log: record {0} is damaged; restore a snapshot or remove the data directory")]
    Damaged(Revision),
    /// A fault injected by a test or the simulation.
    #[error("log: {0}")]
    Injected(&'static str),
}

/// Memory the engine may use for its block cache: values are served from the partitions, so little.
const CACHE_BYTES: u64 = 1 << 20;
/// Size at which the write buffer goes to a table file.
const MEMTABLE_BYTES: u64 = 8 << 20;

/// Size of the blocks of table files: the log is read whole, at start, and never at one place.
const BLOCK_BYTES: u32 = 64 << 10;
/// How much of the journal may wait for its tables; a start reads it again. The least the engine takes.
const JOURNAL_BYTES: u64 = 64 << 20;
/// Threads that read the log at start.
const READERS_MAX: u64 = 4;

/// The log on disk.
pub struct Disk {
    database: fjall::Database,
    log: fjall::Keyspace,
    meta: fjall::Keyspace,
}

impl Disk {
    pub fn open(path: &Path) -> Result<Self, EngineError> {
        let fail = |source| EngineError::Open { path: path.display().to_string(), source };
        let database = fjall::Database::builder(path)
            .cache_size(CACHE_BYTES)
            .max_journaling_size(JOURNAL_BYTES)
            .worker_threads(1)
            .open()
            .map_err(fail)?;
        let options = || {
            fjall::KeyspaceCreateOptions::default()
                .max_memtable_size(MEMTABLE_BYTES)
                .data_block_size_policy(BlockSizePolicy::all(BLOCK_BYTES))
                .filter_policy(FilterPolicy::disabled())
        };
        let log = database.keyspace("log", options).map_err(fail)?;
        let meta = database.keyspace("meta", fjall::KeyspaceCreateOptions::default).map_err(fail)?;
        Ok(Disk { database, log, meta })
    }
}

const HIGHEST: &str = "highest";
const FLOOR: &str = "floor";

impl Disk {
    fn mark(&self, name: &str) -> Result<Revision, EngineError> {
        match self.meta.get(name)? {
            Some(value) => revision_of(&value),
            None => Ok(0),
        }
    }

    /// The records of some revisions, in order.
    fn read(&self, revisions: Range<Revision>) -> Result<Vec<Record>, EngineError> {
        let keys = revisions.start.to_be_bytes()..revisions.end.to_be_bytes();
        let read = |item: fjall::Guard| {
            let (key, value) = item.into_inner()?;
            let revision = revision_of(&key)?;
            decode(revision, &value).ok_or(EngineError::Damaged(revision))
        };
        self.log.range(keys).map(read).collect()
    }
}

fn revision_of(bytes: &[u8]) -> Result<Revision, EngineError> {
    bytes.try_into().map(u64::from_be_bytes).map_err(|_| EngineError::Damaged(0))
}

impl Engine for Disk {
    fn load(&mut self, visit: &mut dyn FnMut(Record)) -> Result<Marks, EngineError> {
        let mut marks = Marks { highest: self.mark(HIGHEST)?, floor: self.mark(FLOOR)? };
        let edge = |item: Option<fjall::Guard>| match item {
            Some(item) => revision_of(&item.key()?),
            None => Ok(0),
        };
        let (first, last) = (edge(self.log.first_key_value())?, edge(self.log.last_key_value())?);
        marks.highest = marks.highest.max(last);
        // Decompressing is most of the work: every core takes a share.
        let readers = std::thread::available_parallelism().map_or(1, |n| READERS_MAX.min(n.get() as u64));
        let share = (last + 1 - first).div_ceil(readers);
        let starts = (0..readers).map(|i| first + i * share);
        let parts: Vec<Result<Vec<Record>, EngineError>> = std::thread::scope(|scope| {
            let disk = &*self;
            let threads: Vec<_> =
                starts.map(|start| scope.spawn(move || disk.read(start..start + share))).collect();
            threads.into_iter().map(|t| t.join().expect("readers do not panic")).collect()
        });
        for part in parts {
            part?.into_iter().for_each(&mut *visit);
        }
        Ok(marks)
    }

    fn append(&mut self, records: &[Record]) -> Result<(), EngineError> {
        let mut batch = self.database.batch().durability(Some(fjall::PersistMode::SyncData));
        for record in records {
            batch.insert(&self.log, record.revision.to_be_bytes(), encode(record));
        }
        Ok(batch.commit()?)
    }

    fn remove(&mut self, revisions: &[Revision], marks: Marks) -> Result<(), EngineError> {
        let mut batch = self.database.batch();
        batch.insert(&self.meta, HIGHEST, marks.highest.to_be_bytes());
        batch.insert(&self.meta, FLOOR, marks.floor.to_be_bytes());
        for revision in revisions {
            batch.remove(&self.log, revision.to_be_bytes());
        }
        Ok(batch.commit()?)
    }
}

const HAS_VALUE: u8 = 1;
const EXPIRES: u8 = 2;
const HAS_DIGEST: u8 = 4;

/// flags, expiry in milliseconds, digest, partition, key, value; numbers are little-endian.
fn encode(record: &Record) -> Vec<u8> {
    let value = record.value.as_deref().unwrap_or_default();
    let mut out = Vec::with_capacity(40 + record.partition.len() + record.key.len() + value.len());
    let Digest { version, bits } = record.digest;
    let flag = |set: bool, flag: u8| if set { flag } else { 0 };
    out.push(
        flag(record.value.is_some(), HAS_VALUE)
            | flag(record.expires.is_some(), EXPIRES)
            | flag(version != 0, HAS_DIGEST),
    );
    if let Some(expires) = record.expires {
        let millis = expires.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
        out.extend(millis.to_le_bytes());
    }
    if version != 0 {
        out.extend(version.to_le_bytes());
        bits.iter().for_each(|part| out.extend(part.to_le_bytes()));
    }
    for text in [&record.partition, &record.key] {
        out.extend((text.len() as u32).to_le_bytes());
        out.extend(text.as_bytes());
    }
    out.extend(value);
    out
}

fn decode(revision: Revision, bytes: &[u8]) -> Option<Record> {
    let (flags, mut rest) = bytes.split_first()?;
    let mut take = |n: usize| -> Option<&[u8]> {
        let (head, tail) = rest.split_at_checked(n)?;
        rest = tail;
        Some(head)
    };
    let expires = match flags & EXPIRES {
        0 => None,
        _ => Some(UNIX_EPOCH + Duration::from_millis(u64::from_le_bytes(take(8)?.try_into().ok()?))),
    };
    let mut digest = Digest::default();
    if flags & HAS_DIGEST != 0 {
        digest.version = u32::from_le_bytes(take(4)?.try_into().ok()?);
        for part in &mut digest.bits {
            *part = u64::from_le_bytes(take(8)?.try_into().ok()?);
        }
    }
    let mut text = || -> Option<Arc<str>> {
        let len = u32::from_le_bytes(take(4)?.try_into().ok()?) as usize;
        Some(Arc::from(std::str::from_utf8(take(len)?).ok()?))
    };
    let (partition, key) = (text()?, text()?);
    let value = (flags & HAS_VALUE != 0).then(|| Bytes::copy_from_slice(rest));
    Some(Record { revision, partition, key, value, expires, digest })
}

/// A log in memory that can be made to fail: for tests and the simulation. Clones share the "disk".
#[derive(Clone, Default)]
pub struct Memory {
    disk: Arc<Mutex<MemoryDisk>>,
}

#[derive(Default)]
struct MemoryDisk {
    records: std::collections::BTreeMap<Revision, Record>,
    marks: Marks,
    fail_appends: bool,
}

impl Memory {
    /// Every append fails until told otherwise: a full or broken disk.
    pub fn fail_appends(&self, fail: bool) {
        self.disk.lock().fail_appends = fail;
    }

    /// How many records the log holds.
    pub fn records(&self) -> usize {
        self.disk.lock().records.len()
    }
}

impl Engine for Memory {
    fn load(&mut self, visit: &mut dyn FnMut(Record)) -> Result<Marks, EngineError> {
        let disk = self.disk.lock();
        disk.records.values().cloned().for_each(visit);
        Ok(disk.marks)
    }

    fn append(&mut self, records: &[Record]) -> Result<(), EngineError> {
        let mut disk = self.disk.lock();
        if disk.fail_appends {
            return Err(EngineError::Injected("no space left on device"));
        }
        for record in records {
            disk.marks.highest = disk.marks.highest.max(record.revision);
            disk.records.insert(record.revision, record.clone());
        }
        Ok(())
    }

    fn remove(&mut self, revisions: &[Revision], marks: Marks) -> Result<(), EngineError> {
        let mut disk = self.disk.lock();
        disk.marks = marks;
        revisions.iter().for_each(|r| {
            disk.records.remove(r);
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_round_trip_and_damage_is_noticed() {
        let record = Record {
            revision: 7,
            partition: "pods".into(),
            key: "default/a".into(),
            value: Some(Bytes::from_static(b"{}")),
            expires: Some(UNIX_EPOCH + Duration::from_millis(1234)),
            digest: Digest { version: 3, bits: [1, 2] },
        };
        let bytes = encode(&record);
        assert_eq!(decode(7, &bytes), Some(record));
        assert_eq!(decode(7, &bytes[..10]), None);
    }
}
