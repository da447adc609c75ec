//! Keys waiting for work. A key that is added many times waits once; a key is never worked on by two workers at
//! the same time; a key added while it is being worked on waits again when the worker is done. The semantics are
//! those of client-go's `workqueue`.
//!
//! Memory is bounded by the number of distinct keys. There is no timer unless a key is delayed.

use parking_lot::Mutex;
use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// The first delay after a failure; doubled with every further one.
pub const BACKOFF_BASE: Duration = Duration::from_millis(5);
/// The longest delay after failures.
pub const BACKOFF_MAX: Duration = Duration::from_secs(1000);

/// How many keys may be remembered as resting before those that have rested are forgotten.
const RESTING_MAX: usize = 1024;

/// A queue of keys; clones share it.
pub struct WorkQueue<T> {
    shared: Arc<Shared<T>>,
}

struct Shared<T> {
    state: Mutex<State<T>>,
    changed: Notify,
    backoff_base: Duration,
    backoff_max: Duration,
}

struct State<T> {
    /// Ready, in order of arrival. Holds exactly the keys in `dirty` that are not in `processing`.
    ready: VecDeque<T>,
    /// Keys that need work.
    dirty: HashSet<T>,
    /// Keys being worked on.
    processing: HashSet<T>,
    /// Keys that become dirty later, by time and by key.
    delayed: BTreeSet<(Instant, T)>,
    delayed_until: HashMap<T, Instant>,
    failures: HashMap<T, u32>,
    /// Keys that were worked on a moment ago and rest until then.
    resting: HashMap<T, Instant>,
    shutting_down: bool,
}

impl<T> Clone for WorkQueue<T> {
    fn clone(&self) -> Self {
        WorkQueue { shared: self.shared.clone() }
    }
}

impl<T: Ord + Hash + Clone> Default for WorkQueue<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: Ord + Hash + Clone> WorkQueue<T> {
    /// A queue with client-go's default back-off.
    pub fn new() -> Self {
        Self::with_backoff(BACKOFF_BASE, BACKOFF_MAX)
    }

    /// A queue whose failures are delayed by `base`, doubling up to `max`.
    pub fn with_backoff(base: Duration, max: Duration) -> Self {
        let state = State {
            ready: VecDeque::new(),
            dirty: HashSet::new(),
            processing: HashSet::new(),
            delayed: BTreeSet::new(),
            delayed_until: HashMap::new(),
            failures: HashMap::new(),
            resting: HashMap::new(),
            shutting_down: false,
        };
        let shared =
            Shared { state: Mutex::new(state), changed: Notify::new(), backoff_base: base, backoff_max: max };
        WorkQueue { shared: Arc::new(shared) }
    }

    /// Marks `key` as needing work.
    pub fn add(&self, key: T) {
        if self.shared.state.lock().add(key) {
            self.shared.changed.notify_one();
        }
    }

    /// Marks `key` as needing work after `delay`. Of several delays of one key the shortest counts.
    pub fn add_after(&self, key: T, delay: Duration) {
        if delay.is_zero() {
            return self.add(key);
        }
        let due = Instant::now() + delay;
        if self.shared.state.lock().delay(key, due) {
            self.shared.changed.notify_one();
        }
    }

    /// Marks `key` as needing work after a delay that doubles with every call until [`WorkQueue::forget`].
    pub fn add_rate_limited(&self, key: T) {
        let failures = {
            let mut state = self.shared.state.lock();
            let failures = state.failures.entry(key.clone()).or_insert(0);
            let before = *failures;
            *failures = failures.saturating_add(1);
            before
        };
        let delay = self.shared.backoff_base.saturating_mul(2u32.saturating_pow(failures.min(31)));
        self.add_after(key, delay.min(self.shared.backoff_max));
    }

    /// Ends the delay of failed keys: what they failed for may be over.
    pub fn hasten(&self, concerned: impl Fn(&T) -> bool) {
        let mut state = self.shared.state.lock();
        let failed =
            state.delayed.iter().filter(|(_, key)| state.failures.contains_key(key) && concerned(key));
        let failed: Vec<_> = failed.cloned().collect();
        for (due, key) in &failed {
            state.delayed.remove(&(*due, key.clone()));
            state.delayed_until.remove(key);
            state.add(key.clone());
        }
        drop(state);
        if !failed.is_empty() {
            self.shared.changed.notify_one();
        }
    }

    /// Work on `key` succeeded: its next failure starts from the shortest delay again.
    pub fn forget(&self, key: &T) {
        self.shared.state.lock().failures.remove(key);
    }

    /// How often work on `key` failed in a row.
    pub fn failures(&self, key: &T) -> u32 {
        self.shared.state.lock().failures.get(key).copied().unwrap_or(0)
    }

    /// The next key to work on, or `None` after shutdown. The caller must call [`WorkQueue::done`] with it.
    pub async fn next(&self) -> Option<T> {
        loop {
            // Registered before looking, so that no notification between looking and waiting is lost.
            let changed = self.shared.changed.notified();
            let due = {
                let mut state = self.shared.state.lock();
                state.promote(Instant::now());
                if state.shutting_down {
                    return None;
                }
                if let Some(key) = state.take() {
                    if !state.ready.is_empty() {
                        self.shared.changed.notify_one();
                    }
                    return Some(key);
                }
                state.delayed.first().map(|(due, _)| *due)
            };
            match due {
                None => changed.await,
                Some(due) => {
                    tokio::select! {
                        () = changed => {}
                        () = tokio::time::sleep_until(due) => {}
                    }
                }
            }
        }
    }

    /// Work on `key` is over; if it was added meanwhile it waits again.
    pub fn done(&self, key: &T) {
        self.done_resting(key, Duration::ZERO);
    }

    /// The same, and it is not worked on again before `rest` has passed: additions until then become one.
    pub fn done_resting(&self, key: &T, rest: Duration) {
        let mut state = self.shared.state.lock();
        state.processing.remove(key);
        if !rest.is_zero() {
            state.rest(key, rest);
        }
        if state.dirty.remove(key) && state.add(key.clone()) {
            drop(state);
            self.shared.changed.notify_one();
        }
    }

    /// Keys ready for work now (delayed ones and those in work not counted).
    pub fn len(&self) -> usize {
        self.shared.state.lock().ready.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether nothing is ready, delayed or being worked on.
    pub fn is_idle(&self) -> bool {
        let state = self.shared.state.lock();
        state.ready.is_empty() && state.processing.is_empty() && state.delayed.is_empty()
    }

    /// Ends every `next`; later additions are ignored.
    pub fn shut_down(&self) {
        self.shared.state.lock().shutting_down = true;
        self.shared.changed.notify_waiters();
        self.shared.changed.notify_one();
    }
}

impl<T: Ord + Hash + Clone> State<T> {
    /// Whether a worker has to be woken.
    fn add(&mut self, key: T) -> bool {
        if let Some(due) = self.resting.get(&key).copied() {
            if due > Instant::now() && !self.processing.contains(&key) {
                return self.delay(key, due);
            }
            self.resting.remove(&key);
        }
        if self.shutting_down || !self.dirty.insert(key.clone()) || self.processing.contains(&key) {
            return false;
        }
        self.ready.push_back(key);
        true
    }

    fn rest(&mut self, key: &T, rest: Duration) {
        let now = Instant::now();
        if self.resting.len() >= RESTING_MAX {
            self.resting.retain(|_, due| *due > now);
        }
        self.resting.insert(key.clone(), now + rest);
    }

    /// Whether a worker has to be woken to take a new, earlier deadline into account.
    fn delay(&mut self, key: T, due: Instant) -> bool {
        if self.shutting_down {
            return false;
        }
        if let Some(&current) = self.delayed_until.get(&key) {
            if current <= due {
                return false;
            }
            self.delayed.remove(&(current, key.clone()));
        }
        self.delayed_until.insert(key.clone(), due);
        self.delayed.insert((due, key));
        true
    }

    /// Moves keys whose delay has passed to the ready ones.
    fn promote(&mut self, now: Instant) {
        while self.delayed.first().is_some_and(|(due, _)| *due <= now) {
            let (_, key) = self.delayed.pop_first().expect("the set has a first element");
            self.delayed_until.remove(&key);
            self.add(key);
        }
    }

    fn take(&mut self) -> Option<T> {
        let key = self.ready.pop_front()?;
        self.dirty.remove(&key);
        self.processing.insert(key.clone());
        Some(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_key_added_often_is_worked_on_once() {
        let queue = WorkQueue::new();
        for key in ["a", "b", "a", "a"] {
            queue.add(key);
        }
        assert_eq!(queue.next().await, Some("a"));
        assert_eq!(queue.next().await, Some("b"));
        assert_eq!(queue.len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_added_during_its_work_waits_until_that_is_done() {
        let queue = WorkQueue::new();
        queue.add("a");
        assert_eq!(queue.next().await, Some("a"));
        queue.add("a");
        assert_eq!(queue.len(), 0, "two workers must never have the same key");
        queue.done(&"a");
        assert_eq!(queue.next().await, Some("a"));
        queue.done(&"a");
        assert!(queue.is_idle());
    }

    #[tokio::test(start_paused = true)]
    async fn a_resting_key_is_worked_on_once_for_all_that_came_meanwhile() {
        let queue = WorkQueue::new();
        let start = Instant::now();
        queue.add("a");
        queue.next().await;
        queue.add("a");
        queue.done_resting(&"a", Duration::from_millis(50));
        for _ in 0..4 {
            tokio::time::advance(Duration::from_millis(10)).await;
            queue.add("a");
        }
        queue.next().await;
        assert_eq!(start.elapsed(), Duration::from_millis(50));
        queue.done(&"a");
        queue.add("a");
        queue.next().await;
        assert_eq!(start.elapsed(), Duration::from_millis(50), "whoever has rested need not rest again");
        queue.done(&"a");
        assert!(queue.is_idle());
    }

    #[tokio::test(start_paused = true)]
    async fn failures_are_delayed_ever_longer_until_forgotten() {
        let queue = WorkQueue::with_backoff(Duration::from_secs(1), Duration::from_secs(4));
        let mut waits = Vec::new();
        for _ in 0..4 {
            let start = Instant::now();
            queue.add_rate_limited("a");
            queue.next().await;
            queue.done(&"a");
            waits.push(start.elapsed().as_secs());
        }
        assert_eq!(waits, [1, 2, 4, 4]);
        queue.forget(&"a");
        assert_eq!(queue.failures(&"a"), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_key_can_be_called_before_its_delay_is_over() {
        let queue = WorkQueue::with_backoff(Duration::from_secs(60), Duration::from_secs(60));
        queue.add_rate_limited("failed");
        queue.add_rate_limited("another");
        queue.add_after("planned", Duration::from_secs(60));
        queue.hasten(|key| *key != "another");
        assert_eq!(queue.next().await, Some("failed"));
        assert_eq!(queue.len(), 0, "nothing else is called");
    }

    #[tokio::test(start_paused = true)]
    async fn of_several_delays_the_shortest_counts() {
        let queue = WorkQueue::new();
        let start = Instant::now();
        queue.add_after("a", Duration::from_secs(9));
        queue.add_after("a", Duration::from_secs(3));
        queue.add_after("a", Duration::from_secs(6));
        queue.next().await;
        assert_eq!(start.elapsed(), Duration::from_secs(3));
        queue.done(&"a");
        assert!(queue.is_idle());
    }

    #[tokio::test(start_paused = true)]
    async fn shutdown_ends_every_waiting_worker() {
        let queue = WorkQueue::<&str>::new();
        let waiting: Vec<_> = (0..3)
            .map(|_| {
                let queue = queue.clone();
                tokio::spawn(async move { queue.next().await })
            })
            .collect();
        tokio::task::yield_now().await;
        queue.shut_down();
        for task in waiting {
            assert_eq!(task.await.unwrap(), None);
        }
    }
}
