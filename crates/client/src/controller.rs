//! The runner of a control loop. A loop is a function of a key: read the present, compare with the wish, act, say
//! when to look again. It never learns which event woke it. Watching, de-duplication, back-off, concurrency and
//! shutdown are here, once.

use crate::informer::{Cached, Change, Informer, MetaInformer};
use crate::{Error, ObjectKey, Result, WorkQueue};
use futures::future::BoxFuture;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// When to look at a key again although nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Requeue {
    /// Only when a watched object changes.
    Done,
    /// After this time: a real deadline, not a poll.
    After(Duration),
}

impl Requeue {
    /// The sooner of two.
    pub fn sooner(self, other: Requeue) -> Requeue {
        match (self, other) {
            (Requeue::After(a), Requeue::After(b)) => Requeue::After(a.min(b)),
            (Requeue::Done, other) => other,
            (this, Requeue::Done) => this,
        }
    }
}

/// One control loop. `reconcile` is called for a key after any change that may concern it, never twice at the same
/// time for the same key, and again after a back-off when it fails (except with [`Error::Terminal`]). It must be
/// idempotent: a second call without a change writes nothing. At shutdown it may be dropped at any await.
pub trait Reconcile: Send + Sync + 'static {
    fn reconcile(&self, key: ObjectKey) -> impl Future<Output = Result<Requeue>> + Send;
}

/// How many keys one loop works on at a time, unless it says otherwise. Upstream's default is 5.
pub const CONCURRENCY_DEFAULT: usize = 5;

/// Watches, a queue and, once [`Controller::run`], one task.
pub struct Controller {
    name: &'static str,
    queue: WorkQueue<ObjectKey>,
    synced: Vec<BoxFuture<'static, ()>>,
    concurrency: usize,
    pace: Pace,
}

/// How long a key rests after its turn: so many times what the turn took, at most so long.
#[derive(Clone, Copy, Default)]
struct Pace {
    turns: u32,
    most: Duration,
}

/// Shorter turns need no rest.
const REST_MIN: Duration = Duration::from_millis(1);

impl Controller {
    /// `name` appears in logs.
    pub fn new(name: &'static str) -> Self {
        Controller {
            name,
            queue: WorkQueue::new(),
            synced: Vec::new(),
            concurrency: CONCURRENCY_DEFAULT,
            pace: Pace::default(),
        }
    }

    /// How many keys to work on at a time.
    pub fn concurrency(mut self, keys: usize) -> Self {
        self.concurrency = keys.max(1);
        self
    }

    /// Lets a key rest after a turn for `turns` times what that took, at most for `most`. For loops whose turn costs more
    /// the larger the object is: of many changes in a row, as when a thousand pods become ready, most become one turn,
    /// while a single change is still answered at once.
    pub fn paced(mut self, turns: u32, most: Duration) -> Self {
        self.pace = Pace { turns, most };
        self
    }

    /// The loop's queue, to add keys from elsewhere.
    pub fn queue(&self) -> WorkQueue<ObjectKey> {
        self.queue.clone()
    }

    /// Adds the key of every object of a kind that changes.
    pub fn watch<K: Cached>(self, informer: &Informer<K>) -> Self {
        self.watch_map(informer, |object| vec![ObjectKey::of(object)])
    }

    /// Adds `keys(object)` for every object that changes; for an update those of the old state as well.
    pub fn watch_map<K: Cached>(
        self,
        informer: &Informer<K>,
        keys: impl Fn(&K) -> Vec<ObjectKey> + Send + Sync + 'static,
    ) -> Self {
        self.watch_changes(informer, move |change| {
            let mut all = keys(change.object());
            if let Some(old) = change.old() {
                all.extend(keys(old));
            }
            all
        })
    }

    /// Adds `keys(change)` for every change.
    pub fn watch_changes<K: Cached>(
        mut self,
        informer: &Informer<K>,
        keys: impl Fn(&Change<K>) -> Vec<ObjectKey> + Send + Sync + 'static,
    ) -> Self {
        let queue = self.queue.clone();
        informer.on_change(move |change| {
            for key in keys(change) {
                queue.add(key);
            }
        });
        let informer = informer.clone();
        self.synced.push(Box::pin(async move { informer.wait_synced().await }));
        self
    }

    /// Waits for an informer's first list before starting, without being woken by its changes.
    pub fn needs<K: Cached>(mut self, informer: &Informer<K>) -> Self {
        let informer = informer.clone();
        self.synced.push(Box::pin(async move { informer.wait_synced().await }));
        self
    }

    /// The same for metadata.
    pub fn needs_metadata(mut self, informer: &MetaInformer) -> Self {
        let informer = informer.clone();
        self.synced.push(Box::pin(async move { informer.wait_synced().await }));
        self
    }

    /// Runs until `shutdown`; starts working when every watched informer has its first list.
    pub async fn run<R: Reconcile>(self, reconciler: Arc<R>, shutdown: CancellationToken) {
        let Controller { name, queue, synced, concurrency, pace } = self;
        tokio::select! {
            () = shutdown.cancelled() => return queue.shut_down(),
            _ = futures::future::join_all(synced) => {}
        }
        tracing::debug!(controller = name, "caches are complete");
        let mut in_work = JoinSet::new();
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                Some(_) = in_work.join_next() => {}
                Some(key) = queue.next(), if in_work.len() < concurrency => {
                    in_work.spawn(work(name, queue.clone(), reconciler.clone(), key, pace));
                }
            }
        }
        queue.shut_down();
        in_work.shutdown().await;
    }
}

/// One reconcile and what follows from it. A panic loses only this key's turn: the guard gives the key back.
async fn work<R: Reconcile>(
    name: &'static str,
    queue: WorkQueue<ObjectKey>,
    reconciler: Arc<R>,
    key: ObjectKey,
    pace: Pace,
) {
    let begun = Instant::now();
    let mut guard = Guard { queue: &queue, key: &key, finished: false, rest: Duration::ZERO };
    let result = reconciler.reconcile(key.clone()).await;
    settle(name, &queue, &key, result);
    guard.rest = pace.rest(begun.elapsed());
    guard.finish();
}

impl Pace {
    fn rest(&self, turn: Duration) -> Duration {
        let rest = turn.saturating_mul(self.turns).min(self.most);
        if rest < REST_MIN { Duration::ZERO } else { rest }
    }
}

struct Guard<'a> {
    queue: &'a WorkQueue<ObjectKey>,
    key: &'a ObjectKey,
    finished: bool,
    rest: Duration,
}

impl Guard<'_> {
    fn finish(mut self) {
        self.finished = true;
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if !self.finished {
            self.queue.add_rate_limited(self.key.clone());
        }
        self.queue.done_resting(self.key, self.rest);
    }
}

fn settle(name: &'static str, queue: &WorkQueue<ObjectKey>, key: &ObjectKey, result: Result<Requeue>) {
    match result {
        Ok(Requeue::Done) => queue.forget(key),
        Ok(Requeue::After(delay)) => {
            queue.forget(key);
            queue.add_after(key.clone(), delay);
        }
        Err(error) if !error.is_retryable() => {
            tracing::warn!(controller = name, %key, %error, "reconcile failed for good, waiting for a change");
            queue.forget(key);
        }
        Err(error) => {
            log_retry(name, key, &error, queue.failures(key));
            queue.add_rate_limited(key.clone());
        }
    }
}

/// Conflicts are everyday life and the first failures often are races: only what lasts is worth a warning.
fn log_retry(name: &'static str, key: &ObjectKey, error: &Error, attempt: u32) {
    if attempt < 5 || error.is_conflict() {
        tracing::debug!(controller = name, %key, attempt, %error, "reconcile failed, retrying");
    } else {
        tracing::warn!(controller = name, %key, attempt, %error, "reconcile keeps failing, retrying");
    }
}
