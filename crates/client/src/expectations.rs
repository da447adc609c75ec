//! Creates and deletes of ours that the cache has not shown yet. A loop that counts children must not count again
//! before its cache shows what it just did, or it would create too many. Unlike upstream, which counts, we
//! remember the uids: exact, and immune to duplicated or lost events.

use crate::ObjectKey;
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::time::Duration;
use tokio::time::Instant;

/// How long to wait for the cache at most; then the loop acts on what it sees. Upstream's value.
pub const EXPECTATIONS_TIMEOUT: Duration = Duration::from_secs(5 * 60);

/// What each owner (by key) still waits to see.
#[derive(Default)]
pub struct Expectations {
    waiting: Mutex<HashMap<ObjectKey, Waiting>>,
    forgetful: bool,
}

struct Waiting {
    created: HashSet<String>,
    deleted: HashSet<String>,
    since: Instant,
}

impl Waiting {
    fn is_over(&self) -> bool {
        (self.created.is_empty() && self.deleted.is_empty()) || self.since.elapsed() >= EXPECTATIONS_TIMEOUT
    }
}

impl Expectations {
    pub fn new() -> Self {
        Self::default()
    }

    /// A bug on purpose, for the simulator to find: it expects nothing.
    #[doc(hidden)]
    pub fn forgetful() -> Self {
        Expectations { forgetful: true, ..Self::default() }
    }

    /// We created `uid` for `owner`. `is_cached` tells whether the cache has it already; it is asked under the lock
    /// that [`Expectations::creation_seen`] takes after the cache changed, so the two cannot miss each other.
    pub fn created(&self, owner: &ObjectKey, uid: &str, is_cached: impl FnOnce() -> bool) {
        let mut waiting = self.waiting.lock();
        if !is_cached() && !self.forgetful {
            entry(&mut waiting, owner).created.insert(uid.to_owned());
        }
    }

    /// We are about to delete `uid` of `owner`.
    pub fn deleting(&self, owner: &ObjectKey, uid: &str) {
        entry(&mut self.waiting.lock(), owner).deleted.insert(uid.to_owned());
    }

    /// The cache shows `uid`. Call it from the informer's change handler.
    pub fn creation_seen(&self, owner: &ObjectKey, uid: &str) {
        self.see(owner, |waiting| waiting.created.remove(uid));
    }

    /// The cache no longer shows `uid` or shows it terminating, or the delete failed.
    pub fn deletion_seen(&self, owner: &ObjectKey, uid: &str) {
        self.see(owner, |waiting| {
            // Gone before it was ever shown counts for both.
            waiting.created.remove(uid);
            waiting.deleted.remove(uid)
        });
    }

    fn see(&self, owner: &ObjectKey, remove: impl FnOnce(&mut Waiting) -> bool) {
        let mut all = self.waiting.lock();
        if let Some(waiting) = all.get_mut(owner) {
            remove(waiting);
            if waiting.created.is_empty() && waiting.deleted.is_empty() {
                all.remove(owner);
            }
        }
    }

    /// Whether the cache shows all that was done for `owner`. Otherwise the time after which to act anyway; the
    /// events that fulfil the expectations wake the loop sooner.
    pub fn pending(&self, owner: &ObjectKey) -> Option<Duration> {
        let mut all = self.waiting.lock();
        let waiting = all.get(owner)?;
        if waiting.is_over() {
            all.remove(owner);
            return None;
        }
        Some(EXPECTATIONS_TIMEOUT.saturating_sub(waiting.since.elapsed()))
    }

    /// `owner` is gone.
    pub fn forget(&self, owner: &ObjectKey) {
        self.waiting.lock().remove(owner);
    }
}

fn entry<'a>(waiting: &'a mut HashMap<ObjectKey, Waiting>, owner: &ObjectKey) -> &'a mut Waiting {
    let entry = waiting.entry(owner.clone()).or_insert_with(|| Waiting {
        created: HashSet::new(),
        deleted: HashSet::new(),
        since: Instant::now(),
    });
    entry.since = Instant::now();
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_create_is_expected_until_seen() {
        let (expectations, owner) = (Expectations::new(), ObjectKey::new("ns", "rs"));
        expectations.created(&owner, "a", || false);
        expectations.created(&owner, "b", || true);
        assert!(expectations.pending(&owner).is_some());
        expectations.creation_seen(&owner, "a");
        assert!(expectations.pending(&owner).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn an_expectation_never_fulfilled_times_out() {
        let (expectations, owner) = (Expectations::new(), ObjectKey::new("ns", "rs"));
        expectations.deleting(&owner, "a");
        let wait = expectations.pending(&owner).unwrap();
        tokio::time::advance(wait).await;
        assert!(expectations.pending(&owner).is_none());
    }
}
