//! Pods waiting for a node: *active* ones are tried next, by priority and age; *backing off* ones were tried a moment
//! ago; *unschedulable* ones wait for an event that may turn their refusal around; *gated* ones for an update of
//! themselves. Event driven: the only timers are real deadlines.

use crate::event::ClusterEvent;
use crate::metrics::metrics;
use crate::plugins::{PLUGINS, PluginId};
use crate::pod::PodInfo;
use knarr_client::ObjectKey;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// A pod that no event helped is tried again after this: upstream's guard against an event forgotten in `wakes`.
pub const UNSCHEDULABLE_MAX: Duration = Duration::from_secs(5 * 60);

/// Upstream's names of what moves pods between queues besides changes of the cluster.
pub const ADDED: &str = "UnschedulablePodAdd";
pub const UPDATED: &str = "UnschedulablePodUpdate";
const FAILED: &str = "ScheduleAttemptFailure";
const BACKED_OFF: &str = "BackoffComplete";
const POPPED_EARLY: &str = "PopFromBackoffQ";
const TIMED_OUT: &str = "UnschedulableTimeout";

/// Delays between tries of one pod.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Backoff {
    pub initial: Duration,
    pub max: Duration,
}

/// Upstream's.
impl Default for Backoff {
    fn default() -> Self {
        Backoff { initial: Duration::from_secs(1), max: Duration::from_secs(10) }
    }
}

impl Backoff {
    fn after(&self, attempts: u32) -> Duration {
        self.initial.saturating_mul(2u32.saturating_pow(attempts.saturating_sub(1).min(16))).min(self.max)
    }
}

/// Priority first, then age.
type Rank = (Reverse<i32>, u64);

#[derive(Default)]
pub struct Queue {
    backoff_times: Backoff,
    entries: HashMap<ObjectKey, Entry>,
    active: BTreeMap<Rank, ObjectKey>,
    backoff: BTreeSet<(Instant, ObjectKey)>,
    /// Those of them that only an event brought there, in the order they would be tried: taken before their time when
    /// there is nothing else to do.
    early: BTreeMap<Rank, ObjectKey>,
    /// Unschedulable pods by what refused them; without a plugin there was no node at all.
    refused: HashMap<Option<PluginId>, HashSet<ObjectKey>>,
    /// When unschedulable pods are tried again whatever happened.
    stale: BTreeSet<(Instant, ObjectKey)>,
    gated: usize,
    /// Pods being decided outside the lock, and whether something happened meanwhile.
    in_flight: HashMap<ObjectKey, bool>,
    arrivals: u64,
}

struct Entry {
    pod: Arc<PodInfo>,
    rank: Rank,
    attempts: u32,
    last_attempt: Option<Instant>,
    since: Instant,
    place: Place,
}

#[derive(Clone, Debug, PartialEq)]
enum Place {
    Active,
    BackingOff(Instant),
    Unschedulable(Vec<Option<PluginId>>, Instant),
    Gated,
    /// Being decided or bound.
    InWork,
}

/// A pod to decide about, how often it was tried (with this time), and since when it waits.
pub struct Attempt {
    pub pod: Arc<PodInfo>,
    pub attempts: u32,
    pub since: Instant,
}

impl Queue {
    pub fn new(backoff_times: Backoff) -> Self {
        Queue { backoff_times, ..Queue::default() }
    }

    /// A new pod, or a pod that changed: it is tried (again), unless it has gates.
    pub fn add(&mut self, pod: Arc<PodInfo>, gated: bool, now: Instant, event: &'static str) {
        let key = pod.key.clone();
        let (attempts, last_attempt, age, since) = match self.entries.get_mut(&key) {
            // It is being bound: what changed matters only if that fails.
            Some(entry) if entry.place == Place::InWork => {
                entry.pod = pod;
                return;
            }
            Some(entry) if entry.pod.uid() == pod.uid() => {
                (entry.attempts, entry.last_attempt, entry.rank.1, entry.since)
            }
            _ => {
                self.arrivals += 1;
                (0, None, self.arrivals, now)
            }
        };
        self.remove(&key);
        let rank = (Reverse(pod.priority), age);
        let place = if gated { Place::Gated } else { Place::InWork };
        self.gated += usize::from(gated);
        self.entries.insert(key.clone(), Entry { pod, rank, attempts, last_attempt, since, place });
        match gated {
            true => metrics().queued("unschedulable", event),
            false => self.requeue(&key, now, false, event),
        }
    }

    /// A newer version of a waiting pod that gives no reason to try again.
    pub fn refresh(&mut self, pod: Arc<PodInfo>) {
        if let Some(entry) = self.entries.get_mut(&pod.key) {
            entry.pod = pod;
        }
    }

    pub fn get(&self, key: &ObjectKey) -> Option<&Arc<PodInfo>> {
        self.entries.get(key).map(|entry| &entry.pod)
    }

    /// The pod is gone or bound.
    pub fn remove(&mut self, key: &ObjectKey) {
        self.in_flight.remove(key);
        if let Some(entry) = self.entries.remove(key) {
            self.unplace(key, &entry.place, entry.rank);
        }
    }

    /// The next pod to decide about. It stays known, in work, until one of the other calls settles it.
    pub fn pop(&mut self, now: Instant) -> Option<Attempt> {
        self.promote(now);
        let key = match self.active.pop_first() {
            Some((_, key)) => key,
            None => {
                let (_, key) = self.early.pop_first()?;
                let Place::BackingOff(due) = self.entries[&key].place else {
                    unreachable!("early pods back off")
                };
                self.backoff.remove(&(due, key.clone()));
                metrics().queued("active", POPPED_EARLY);
                key
            }
        };
        let entry = self.entries.get_mut(&key).expect("what is active has an entry");
        entry.place = Place::InWork;
        entry.attempts += 1;
        entry.last_attempt = Some(now);
        Some(Attempt { pod: entry.pod.clone(), attempts: entry.attempts, since: entry.since })
    }

    /// The decision takes a while, outside the lock: what happens meanwhile is remembered.
    pub fn in_flight(&mut self, key: &ObjectKey) {
        self.in_flight.insert(key.clone(), false);
    }

    /// When the queue has to be looked at again; `None` if only events can change it.
    pub fn next_deadline(&self) -> Option<Instant> {
        [self.backoff.first(), self.stale.first()].into_iter().flatten().map(|(due, _)| *due).min()
    }

    /// No node fits: wait for an event one of these plugins cares for.
    pub fn unschedulable(&mut self, key: &ObjectKey, rejected_by: &[PluginId], now: Instant) {
        let missed = self.in_flight.remove(key) == Some(true);
        let Some(entry) = self.entries.get_mut(key) else { return };
        if missed {
            return self.requeue(key, now, true, FAILED);
        }
        metrics().queued("unschedulable", FAILED);
        let by: Vec<Option<PluginId>> = match rejected_by {
            [] => vec![None],
            _ => rejected_by.iter().copied().map(Some).collect(),
        };
        let due = now + UNSCHEDULABLE_MAX;
        for plugin in &by {
            self.refused.entry(*plugin).or_default().insert(key.clone());
        }
        self.stale.insert((due, key.clone()));
        entry.place = Place::Unschedulable(by, due);
    }

    /// Something else went wrong: try again after the back-off.
    pub fn retry(&mut self, key: &ObjectKey, now: Instant) {
        self.in_flight.remove(key);
        if self.is_in_work(key) {
            self.requeue(key, now, false, FAILED);
        }
    }

    /// Whether the pod is being decided or bound.
    pub fn is_in_work(&self, key: &ObjectKey) -> bool {
        self.entries.get(key).is_some_and(|entry| entry.place == Place::InWork)
    }

    /// Nobody works on any pod any more: those in work wait again.
    pub fn put_back(&mut self, now: Instant) {
        self.in_flight.clear();
        let in_work = self.entries.iter().filter(|(_, entry)| entry.place == Place::InWork);
        let in_work: Vec<ObjectKey> = in_work.map(|(key, _)| key.clone()).collect();
        in_work.iter().for_each(|key| self.requeue(key, now, false, FAILED));
    }

    /// An unschedulable pod is tried again after its back-off: what was done for it did not work out.
    pub fn reconsider(&mut self, key: &ObjectKey, now: Instant) {
        if let Some(entry) = self.entries.get(key)
            && let Place::Unschedulable(..) = entry.place
        {
            let (place, rank) = (entry.place.clone(), entry.rank);
            self.unplace(key, &place, rank);
            self.requeue(key, now, false, FAILED);
        }
    }

    /// Tries again the pods whose refusal the event may turn around; how many these are.
    pub fn wake(&mut self, event: &ClusterEvent, now: Instant) -> usize {
        self.in_flight.values_mut().for_each(|missed| *missed = true);
        let mut woken = Vec::new();
        for (plugin, keys) in self.refused.iter().filter(|(_, keys)| !keys.is_empty()) {
            match plugin {
                // Without any node there was no rule to refuse: only a node can help.
                None if matches!(event, ClusterEvent::NodeAdded(_)) => woken.extend(keys.iter().cloned()),
                None => {}
                Some(plugin) if PLUGINS[*plugin].hears & event.kind() != 0 => {
                    let wakes = PLUGINS[*plugin].wakes;
                    woken.extend(keys.iter().filter(|key| wakes(event, &self.entries[*key].pod)).cloned());
                }
                Some(_) => {}
            }
        }
        let mut moved = 0;
        for key in woken {
            moved += usize::from(self.wake_one(&key, now, event.label()));
        }
        moved
    }

    fn wake_one(&mut self, key: &ObjectKey, now: Instant, event: &'static str) -> bool {
        let Some(entry) = self.entries.get(key) else { return false };
        // More than one plugin may have woken it.
        let Place::Unschedulable(..) = entry.place else { return false };
        let (place, rank) = (entry.place.clone(), entry.rank);
        self.unplace(key, &place, rank);
        self.requeue(key, now, true, event);
        true
    }

    /// How many pods are active, backing off, unschedulable and gated.
    pub fn lens(&self) -> [usize; 4] {
        [self.active.len(), self.backoff.len(), self.stale.len(), self.gated]
    }

    /// How many unschedulable pods a plugin refused, by the scheduler they ask for.
    pub fn refused_by(&self, plugin: PluginId) -> BTreeMap<String, usize> {
        let mut pods = BTreeMap::new();
        for key in self.refused.get(&Some(plugin)).into_iter().flatten() {
            *pods.entry(self.entries[key].pod.scheduler_name().to_owned()).or_insert(0) += 1;
        }
        pods
    }

    fn requeue(&mut self, key: &ObjectKey, now: Instant, early: bool, event: &'static str) {
        let entry = self.entries.get_mut(key).expect("only known pods are queued");
        let due = entry.last_attempt.map(|last| last + self.backoff_times.after(entry.attempts));
        match due.filter(|due| *due > now) {
            Some(due) => {
                metrics().queued("backoff", event);
                entry.place = Place::BackingOff(due);
                self.backoff.insert((due, key.clone()));
                if early {
                    self.early.insert(entry.rank, key.clone());
                }
            }
            None => {
                metrics().queued("active", event);
                entry.place = Place::Active;
                self.active.insert(entry.rank, key.clone());
            }
        }
    }

    fn promote(&mut self, now: Instant) {
        while self.backoff.first().is_some_and(|(due, _)| *due <= now) {
            let (_, key) = self.backoff.pop_first().expect("the set has a first element");
            let entry = self.entries.get_mut(&key).expect("what backs off has an entry");
            metrics().queued("active", BACKED_OFF);
            entry.place = Place::Active;
            self.early.remove(&entry.rank);
            self.active.insert(entry.rank, key);
        }
        while let Some((_, key)) = self.stale.first().filter(|(due, _)| *due <= now).cloned() {
            self.wake_one(&key, now, TIMED_OUT);
        }
    }

    fn unplace(&mut self, key: &ObjectKey, place: &Place, rank: Rank) {
        match place {
            Place::Active => _ = self.active.remove(&rank),
            Place::BackingOff(due) => {
                self.backoff.remove(&(*due, key.clone()));
                self.early.remove(&rank);
            }
            Place::Unschedulable(by, due) => {
                self.stale.remove(&(*due, key.clone()));
                for plugin in by {
                    if let Some(keys) = self.refused.get_mut(plugin) {
                        keys.remove(key);
                    }
                }
            }
            Place::Gated => self.gated -= 1,
            Place::InWork => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::plugin_id;
    use k8s_openapi::api::core::v1::Node;
    use serde_json::{Value, json};

    fn pod(name: &str, priority: i32) -> Arc<PodInfo> {
        let pod = json!({"metadata": {"name": name, "uid": name}, "spec": {"containers": [], "priority": priority}});
        Arc::new(PodInfo::new(Arc::new(serde_json::from_value(pod).unwrap())))
    }

    fn node(taints: Value) -> Node {
        serde_json::from_value(json!({"metadata": {"name": "n"}, "spec": {"taints": taints}})).unwrap()
    }

    fn names(queue: &mut Queue, now: Instant) -> Vec<String> {
        std::iter::from_fn(|| Some(queue.pop(now)?.pod.key.name.clone())).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn the_most_important_pod_goes_first_and_of_equals_the_oldest() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        for (name, priority) in [("a", 0), ("b", 0), ("c", 5)] {
            queue.add(pod(name, priority), false, now, ADDED);
        }
        assert_eq!(names(&mut queue, now), ["c", "a", "b"]);
    }

    #[tokio::test(start_paused = true)]
    async fn only_an_event_its_refusal_depends_on_wakes_a_pod() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.add(pod("a", 0), false, now, ADDED);
        let key = queue.pop(now).unwrap().pod.key.clone();
        queue.unschedulable(&key, &[plugin_id("TaintToleration").unwrap()], now);
        let (tainted, open) = (node(json!([{"key": "k", "effect": "NoSchedule"}])), node(json!([])));
        assert_eq!(queue.wake(&ClusterEvent::PodRemoved(&pod("b", 0)), now), 0);
        assert_eq!(queue.wake(&ClusterEvent::NodeAdded(&tainted), now), 0);
        assert_eq!(queue.wake(&ClusterEvent::NodeChanged { old: &tainted, new: &open }, now), 1);
        // Nothing else is to do, so it need not wait for its back-off.
        assert_eq!(names(&mut queue, now), ["a"]);
    }

    #[tokio::test(start_paused = true)]
    async fn after_an_error_a_pod_waits_for_its_back_off() {
        let (mut queue, mut now) = (Queue::default(), Instant::now());
        queue.add(pod("a", 0), false, now, ADDED);
        for seconds in [1, 2, 4, 8, 10, 10] {
            let key = queue.pop(now).expect("the back-off is over").pod.key.clone();
            queue.retry(&key, now);
            assert!(queue.pop(now).is_none());
            assert_eq!(queue.next_deadline(), Some(now + Duration::from_secs(seconds)));
            now += Duration::from_secs(seconds);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_no_event_helped_is_tried_again_after_five_minutes() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.add(pod("a", 0), false, now, ADDED);
        let key = queue.pop(now).unwrap().pod.key.clone();
        queue.unschedulable(&key, &[plugin_id("NodeName").unwrap()], now);
        assert_eq!(queue.next_deadline(), Some(now + UNSCHEDULABLE_MAX));
        assert_eq!(names(&mut queue, now + UNSCHEDULABLE_MAX), ["a"]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_happens_while_a_pod_is_decided_elsewhere_is_not_missed() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.add(pod("a", 0), false, now, ADDED);
        let key = queue.pop(now).unwrap().pod.key.clone();
        queue.in_flight(&key);
        queue.wake(&ClusterEvent::PodRemoved(&pod("b", 0)), now);
        queue.unschedulable(&key, &[plugin_id("NodeResourcesFit").unwrap()], now);
        assert_eq!(names(&mut queue, now), ["a"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_gated_pod_is_not_tried_until_its_gates_are_gone() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.add(pod("a", 0), true, now, ADDED);
        assert!(queue.pop(now).is_none() && queue.lens() == [0, 0, 0, 1]);
        queue.add(pod("a", 0), false, now, ADDED);
        assert_eq!(names(&mut queue, now), ["a"]);
    }
}
