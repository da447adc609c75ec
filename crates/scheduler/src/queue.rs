//! Pods waiting for a node: *active* ones are tried next, by priority and age; *backing off* ones were tried a
//! moment ago; *unschedulable* ones wait for an event that may turn their refusal around.

use crate::plugins::{ClusterEvent, PLUGINS};
use crate::pod::PodInfo;
use knarr_client::ObjectKey;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Delays between tries of one pod: upstream's.
const BACKOFF_BASE: Duration = Duration::from_secs(1);
const BACKOFF_MAX: Duration = Duration::from_secs(10);

/// Priority first, then age.
type Rank = (Reverse<i32>, u64);

#[derive(Default)]
pub struct Queue {
    entries: HashMap<ObjectKey, Entry>,
    active: BTreeMap<Rank, ObjectKey>,
    backoff: BTreeSet<(Instant, ObjectKey)>,
    unschedulable: BTreeSet<ObjectKey>,
    arrivals: u64,
}

struct Entry {
    pod: Arc<PodInfo>,
    rank: Rank,
    attempts: u32,
    last_attempt: Option<Instant>,
    place: Place,
}

#[derive(Clone, Debug, PartialEq)]
enum Place {
    Active,
    BackingOff(Instant),
    /// By position in `PLUGINS`.
    Unschedulable(Vec<usize>),
    /// Being decided or bound.
    InWork,
}

impl Queue {
    /// A new pod, or a pod that changed: it is tried (again).
    pub fn add(&mut self, pod: Arc<PodInfo>, now: Instant) {
        let key = pod.key.clone();
        let (attempts, last_attempt, age) = match self.entries.get_mut(&key) {
            // It is being bound: what changed matters only if that fails.
            Some(entry) if entry.place == Place::InWork => {
                entry.pod = pod;
                return;
            }
            Some(entry) if entry.pod.uid() == pod.uid() => (entry.attempts, entry.last_attempt, entry.rank.1),
            _ => {
                self.arrivals += 1;
                (0, None, self.arrivals)
            }
        };
        self.remove(&key);
        let rank = (Reverse(pod.priority), age);
        let entry = Entry { pod, rank, attempts, last_attempt, place: Place::InWork };
        self.entries.insert(key.clone(), entry);
        self.requeue(&key, now);
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
        if let Some(entry) = self.entries.remove(key) {
            self.unplace(key, &entry.place, entry.rank);
        }
    }

    /// The next pod to decide about. It stays known, `InWork`, until one of the other calls settles it.
    pub fn pop(&mut self, now: Instant) -> Option<Arc<PodInfo>> {
        self.promote(now);
        let (_, key) = self.active.pop_first()?;
        let entry = self.entries.get_mut(&key).expect("what is active has an entry");
        entry.place = Place::InWork;
        entry.attempts += 1;
        entry.last_attempt = Some(now);
        Some(entry.pod.clone())
    }

    /// When the next pod has backed off; `None` when none does.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.backoff.first().map(|(due, _)| *due)
    }

    /// No node fits: wait for an event one of these plugins cares for.
    pub fn unschedulable(&mut self, key: &ObjectKey, rejected_by: Vec<usize>) {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.place = Place::Unschedulable(rejected_by);
            self.unschedulable.insert(key.clone());
        }
    }

    /// Something else went wrong: try again after the back-off.
    pub fn retry(&mut self, key: &ObjectKey, now: Instant) {
        if self.entries.contains_key(key) {
            self.requeue(key, now);
        }
    }

    /// Tries again the pods whose refusal the event may turn around.
    pub fn wake(&mut self, event: &ClusterEvent, now: Instant) {
        if event.is_nothing() {
            return;
        }
        let woken: Vec<ObjectKey> =
            self.unschedulable.iter().filter(|key| self.may_help(event, key)).cloned().collect();
        for key in woken {
            self.unschedulable.remove(&key);
            self.requeue(&key, now);
        }
    }

    fn may_help(&self, event: &ClusterEvent, key: &ObjectKey) -> bool {
        let Some(entry) = self.entries.get(key) else { return false };
        let Place::Unschedulable(rejected_by) = &entry.place else { return false };
        // Without any node there was no rule to refuse: only a node can help.
        (rejected_by.is_empty() && event.node_added)
            || rejected_by.iter().any(|plugin| (PLUGINS[*plugin].wakes)(event, &entry.pod))
    }

    fn requeue(&mut self, key: &ObjectKey, now: Instant) {
        let entry = self.entries.get_mut(key).expect("only known pods are queued");
        let due = entry.last_attempt.map(|last| last + backoff(entry.attempts));
        match due.filter(|due| *due > now) {
            Some(due) => {
                entry.place = Place::BackingOff(due);
                self.backoff.insert((due, key.clone()));
            }
            None => {
                entry.place = Place::Active;
                self.active.insert(entry.rank, key.clone());
            }
        }
    }

    fn promote(&mut self, now: Instant) {
        while self.backoff.first().is_some_and(|(due, _)| *due <= now) {
            let (_, key) = self.backoff.pop_first().expect("the set has a first element");
            let entry = self.entries.get_mut(&key).expect("what backs off has an entry");
            entry.place = Place::Active;
            self.active.insert(entry.rank, key);
        }
    }

    fn unplace(&mut self, key: &ObjectKey, place: &Place, rank: Rank) {
        match place {
            Place::Active => _ = self.active.remove(&rank),
            Place::BackingOff(due) => _ = self.backoff.remove(&(*due, key.clone())),
            Place::Unschedulable(_) => _ = self.unschedulable.remove(key),
            Place::InWork => {}
        }
    }
}

fn backoff(attempts: u32) -> Duration {
    BACKOFF_BASE.saturating_mul(2u32.saturating_pow(attempts.saturating_sub(1).min(16))).min(BACKOFF_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(name: &str, priority: i32) -> Arc<PodInfo> {
        let pod = json!({"metadata": {"name": name, "uid": name}, "spec": {"containers": [], "priority": priority}});
        Arc::new(PodInfo::new(Arc::new(serde_json::from_value(pod).unwrap())))
    }

    fn plugin(name: &str) -> usize {
        PLUGINS.iter().position(|plugin| plugin.name == name).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn the_most_important_pod_goes_first_and_of_equals_the_oldest() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        for (name, priority) in [("a", 0), ("b", 0), ("c", 9)] {
            queue.add(pod(name, priority), now);
        }
        let order: Vec<_> = std::iter::from_fn(|| queue.pop(now)).map(|pod| pod.key.name.clone()).collect();
        assert_eq!(order, ["c", "a", "b"]);
    }

    #[tokio::test(start_paused = true)]
    async fn only_an_event_its_refusal_depends_on_wakes_a_pod_and_not_before_its_back_off() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.add(pod("a", 0), now);
        let key = queue.pop(now).unwrap().key.clone();
        queue.unschedulable(&key, vec![plugin("TaintToleration")]);
        queue.wake(&ClusterEvent { pod_removed: true, ..Default::default() }, now);
        assert_eq!(queue.next_deadline(), None);
        queue.wake(&ClusterEvent { node_taints: true, ..Default::default() }, now);
        assert!(queue.pop(now).is_none());
        assert_eq!(queue.next_deadline(), Some(now + BACKOFF_BASE));
        assert!(queue.pop(now + BACKOFF_BASE).is_some());
    }
}
