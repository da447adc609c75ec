//! The revisioned, watchable key-value store: what etcd gives Kubernetes.
//!
//! Invariants:
//! - one global revision; every change gets the next one;
//! - a write is acknowledged after it is durable, and visible to reads and watches before it is
//!   acknowledged;
//! - a watch delivers every change after its revision, in order, once, or says `Compacted`;
//! - slow watchers hold no memory: they read from the shared history, and lose their place if it moves on.
//!
//! Keys live in partitions, one per resource, so that readers of one resource never meet the others'
//! traffic. Reads come from memory ([`partition`]); the [`engine`] is only the durable log that rebuilds it.

/// The contract as tests, for every back end.
#[cfg(any(test, feature = "contract"))]
pub mod contract;
/// The embedded store: one committer, group commit, a durable log.
pub mod embedded;
/// Where the log is kept: on disk by fjall, or in memory for tests and simulation.
pub mod engine;
/// One resource in memory: current entries and recent history.
pub mod partition;

use std::hash::Hasher;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;

pub use embedded::{Embedded, Options};
pub use partition::{Event, Listing, Watcher};

/// A point in the store's history; 0 is before everything.
pub type Revision = u64;

/// A stored value. Shared by everyone who reads it: the bytes exist once.
#[derive(Debug)]
pub struct Entry {
    /// `namespace/name`, or `name`.
    pub key: Arc<str>,
    /// Of the change that wrote this value.
    pub revision: Revision,
    pub bytes: Bytes,
    /// When the store deletes the entry by itself.
    pub expires: Option<SystemTime>,
    /// A reader's decoded view of the bytes, made at first use and shared by all watchers.
    pub view: std::sync::OnceLock<Arc<dyn std::any::Any + Send + Sync>>,
    /// What the value is about, in the writer's words.
    pub digest: Digest,
}

/// A set of words in 128 bits (a Bloom filter): it may say "perhaps" of a word that is not in it, never "no" of one
/// that is. It is kept in the log, so that lists after a start skip entries too.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Digest {
    /// Which words go in. Digests of different versions know nothing of each other; 0 is no digest.
    version: u32,
    bits: [u64; 2],
}

impl Digest {
    /// An empty set. `version` changes with what the writer puts into its digests.
    pub fn new(version: u32) -> Self {
        Digest { version, bits: [0; 2] }
    }

    /// Adds the word that the parts make together.
    pub fn add(&mut self, parts: &[&str]) {
        // Kept on disk, so not the standard library's hash, which may change.
        let mut hasher = fnv::FnvHasher::default();
        for part in parts {
            hasher.write(part.as_bytes());
            hasher.write_u8(0xff);
        }
        let hash = hasher.finish();
        for bit in [hash & 127, hash >> 32 & 127] {
            self.bits[(bit >> 6) as usize] |= 1 << (bit & 63);
        }
    }

    /// False if a word of `others` is surely missing.
    pub fn may_hold(&self, others: Digest) -> bool {
        let holds = |i: usize| self.bits[i] & others.bits[i] == others.bits[i];
        self.version != others.version || (holds(0) && holds(1))
    }
}

/// One change to one key.
#[derive(Debug)]
pub struct Write {
    /// The resource, such as `pods` or `deployments.apps`.
    pub partition: Arc<str>,
    pub key: Arc<str>,
    pub expect: Expect,
    pub change: Change,
}

/// What must hold for the write to happen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Expect {
    /// The key does not exist.
    Absent,
    /// The key's value is the one of this revision.
    Revision(Revision),
    /// Nothing.
    Any,
}

/// What the write does.
#[derive(Debug)]
pub enum Change {
    Put {
        /// The value, with the revision of the change to be written in at `splice`.
        bytes: Vec<u8>,
        /// Offset in `bytes` where the decimal revision is inserted; `None` stores the bytes as they are.
        splice: Option<usize>,
        time_to_live: Option<Duration>,
        /// What the value is about; lists by [`Range::about`] skip it without reading it.
        digest: Digest,
    },
    /// The last state stays in the history, with `bytes` (if given) as its final form.
    Delete { last: Option<(Vec<u8>, Option<usize>)> },
}

/// A write that happened.
#[derive(Debug, Clone)]
pub struct Committed {
    pub revision: Revision,
    /// The new value; for deletes the last one.
    pub entry: Arc<Entry>,
}

/// Why a write did not happen.
#[derive(Debug, Clone, thiserror::Error)]
pub enum WriteError {
    #[error("the key exists already")]
    Exists,
    #[error("the key does not exist")]
    NotFound,
    /// The value has another revision: this one.
    #[error("the key was changed at revision {}", .0.revision)]
    Changed(Arc<Entry>),
    #[error("the store is closed")]
    Closed,
    /// The disk refused; nothing was stored.
    #[error("cannot write the log: {0}")]
    Disk(String),
}

/// The history asked for is no longer kept.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum ReadError {
    #[error("revision {requested} is compacted; the oldest kept is {oldest}")]
    Compacted { requested: Revision, oldest: Revision },
    #[error("revision {requested} is in the future; the newest is {newest}")]
    Future { requested: Revision, newest: Revision },
}

/// Which entries of a partition to list.
#[derive(Debug, Clone, Default)]
pub struct Range {
    /// Only keys that start with this.
    pub prefix: String,
    /// Only keys after this one.
    pub after: Option<String>,
    /// At most so many; 0 means all.
    pub limit: usize,
    /// As of this revision; `None` means now.
    pub at: Option<Revision>,
    /// Without entries whose digest lacks one of these words. Entries with a digest of another version are listed.
    pub about: Digest,
}

/// The store: everything the API server needs of a back end.
#[async_trait::async_trait]
pub trait Store: Send + Sync {
    /// The newest revision visible to reads.
    fn revision(&self) -> Revision;

    /// The current value of a key.
    fn get(&self, partition: &str, key: &str) -> Option<Arc<Entry>>;

    /// Entries in key order, all of one revision.
    fn list(&self, partition: &str, range: &Range) -> Result<Listing, ReadError>;

    /// The newest revision that changed the partition: readers that derive something know when to derive anew.
    fn changed(&self, partition: &str) -> Revision;

    /// Number of entries in a partition.
    fn count(&self, partition: &str) -> usize;

    /// Every change after `from`. Fails if the history does not reach back so far.
    fn watch(&self, partition: &str, from: Revision) -> Result<Watcher, ReadError>;

    /// Makes a change durable, then visible, then returns.
    async fn commit(&self, write: Write) -> Result<Committed, WriteError>;

    /// Forgets history up to and including `revision`; current values stay.
    fn compact(&self, revision: Revision);
}
