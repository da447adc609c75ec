//! Writes of ours that the cache has not shown yet. A loop that counts children must not count again before its cache
//! shows what it just did, or it would create too many. Unlike upstream, which counts, we
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
    /// Uid → the least resource version the cache has to show; 0 when any will do.
    written: HashMap<String, u64>,
    deleted: HashSet<String>,
    since: Instant,
}

impl Waiting {
    fn is_empty(&self) -> bool {
        self.written.is_empty() && self.deleted.is_empty()
    }

    fn is_over(&self) -> bool {
        self.is_empty() || self.since.elapsed() >= EXPECTATIONS_TIMEOUT
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

    /// We created `uid` for `owner`. `is_cached` as for [`Expectations::changed`].
    pub fn created(&self, owner: &ObjectKey, uid: &str, is_cached: impl FnOnce() -> bool) {
        self.changed(owner, uid, 0, is_cached);
    }

    /// We changed `uid` of `owner`, and the answer bore the resource version `revision`. `is_cached` tells whether the
    /// cache shows that already; it is asked under the lock that [`Expectations::change_seen`] takes after the cache
    /// changed, so the two cannot miss each other.
    pub fn changed(&self, owner: &ObjectKey, uid: &str, revision: u64, is_cached: impl FnOnce() -> bool) {
        let mut waiting = self.waiting.lock();
        if !is_cached() && !self.forgetful {
            entry(&mut waiting, owner).written.insert(uid.to_owned(), revision);
        }
    }

    /// We are about to delete `uid` of `owner`.
    pub fn deleting(&self, owner: &ObjectKey, uid: &str) {
        entry(&mut self.waiting.lock(), owner).deleted.insert(uid.to_owned());
    }

    /// The cache shows `uid`. Call it from the informer's change handler.
    pub fn creation_seen(&self, owner: &ObjectKey, uid: &str) {
        self.change_seen(owner, uid, u64::MAX);
    }

    /// The cache shows `uid` as of `revision`; a deletion counts as [`u64::MAX`].
    pub fn change_seen(&self, owner: &ObjectKey, uid: &str, revision: u64) {
        self.see(owner, |waiting| {
            if waiting.written.get(uid).is_some_and(|wanted| *wanted <= revision) {
                waiting.written.remove(uid);
            }
        });
    }

    /// The cache no longer shows `uid` or shows it terminating, or the delete failed.
    pub fn deletion_seen(&self, owner: &ObjectKey, uid: &str) {
        self.see(owner, |waiting| {
            // Gone before it was ever shown counts for both.
            waiting.written.remove(uid);
            waiting.deleted.remove(uid);
        });
    }

    fn see(&self, owner: &ObjectKey, remove: impl FnOnce(&mut Waiting)) {
        let mut all = self.waiting.lock();
        if let Some(waiting) = all.get_mut(owner) {
            remove(waiting);
            if waiting.is_empty() {
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
        written: HashMap::new(),
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
    async fn a_change_is_expected_until_the_cache_is_as_new() {
        let (expectations, owner) = (Expectations::new(), ObjectKey::new("ns", "deployment"));
        expectations.changed(&owner, "a", 7, || false);
        expectations.change_seen(&owner, "a", 6);
        assert!(expectations.pending(&owner).is_some());
        expectations.change_seen(&owner, "a", 8);
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
