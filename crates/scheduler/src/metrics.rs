//! What the scheduler counts, under upstream's names, as text for `/metrics`. One process has one set of counters,
//! however many schedulers it runs.

use crate::plugins::PLUGINS;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Arc, LazyLock, Weak};
use std::time::Duration;

/// Upper bounds in seconds, each twice the one before: upstream's for decisions and for pods.
const ATTEMPT_BUCKETS: (f64, usize) = (0.001, 15);
const SLI_BUCKETS: (f64, usize) = (0.01, 20);
/// Upper bounds for attempts and victims.
const ATTEMPTS: (f64, usize) = (1.0, 5);
const VICTIMS: (f64, usize) = (1.0, 7);

static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::default);

pub fn metrics() -> &'static Metrics {
    &METRICS
}

/// The text of all metrics of schedulers in this process; empty if there was none.
pub fn print() -> String {
    METRICS.print()
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Attempted {
    Scheduled,
    Unschedulable,
    Error,
}

impl Attempted {
    fn label(self) -> &'static str {
        match self {
            Attempted::Scheduled => "scheduled",
            Attempted::Unschedulable => "unschedulable",
            Attempted::Error => "error",
        }
    }
}

/// What a scheduler says of itself when asked: its queue and its table.
pub trait Gauges: Send + Sync {
    /// Active, backing off, unschedulable, gated.
    fn pending(&self) -> [usize; 4];
    /// Nodes, pods, assumed pods.
    fn cached(&self) -> [usize; 3];
    fn refused_by(&self, plugin: usize) -> usize;
}

#[derive(Default)]
pub struct Metrics {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    schedulers: Vec<Weak<dyn Gauges>>,
    attempts: BTreeMap<(Arc<str>, Attempted), Histogram>,
    algorithm: Histogram,
    pods: BTreeMap<u32, Histogram>,
    tries: Histogram,
    incoming: BTreeMap<(&'static str, &'static str), u64>,
    preemption_attempts: u64,
    victims: Histogram,
}

#[derive(Default)]
struct Histogram {
    /// By bucket, not summed up.
    counts: Vec<u64>,
    count: u64,
    sum: f64,
}

impl Histogram {
    fn observe(&mut self, (first, len): (f64, usize), value: f64) {
        self.counts.resize(len, 0);
        if let Some(bucket) = bounds((first, len)).position(|bound| value <= bound) {
            self.counts[bucket] += 1;
        }
        self.count += 1;
        self.sum += value;
    }

    fn print(&self, text: &mut String, name: &str, labels: &str, buckets: (f64, usize)) {
        let comma = if labels.is_empty() { "" } else { "," };
        let mut sum = 0;
        for (bound, count) in bounds(buckets).zip(&self.counts) {
            sum += count;
            line(text, &format!("{name}_bucket"), &format!("{labels}{comma}le=\"{bound}\""), sum);
        }
        line(text, &format!("{name}_bucket"), &format!("{labels}{comma}le=\"+Inf\""), self.count);
        line(text, &format!("{name}_sum"), labels, self.sum);
        line(text, &format!("{name}_count"), labels, self.count);
    }
}

fn bounds((first, len): (f64, usize)) -> impl Iterator<Item = f64> {
    (0..len as i32).map(move |power| first * 2f64.powi(power))
}

fn heading(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn line(text: &mut String, name: &str, labels: &str, value: impl std::fmt::Display) {
    let _ = match labels {
        "" => writeln!(text, "{name} {value}"),
        _ => writeln!(text, "{name}{{{labels}}} {value}"),
    };
}

impl Metrics {
    /// A scheduler whose gauges are printed while it exists.
    pub fn register(&self, scheduler: Weak<dyn Gauges>) {
        let mut state = self.state.lock();
        state.schedulers.retain(|known| known.strong_count() > 0);
        state.schedulers.push(scheduler);
    }

    pub fn attempt(&self, profile: &Arc<str>, result: Attempted, took: Duration) {
        let mut state = self.state.lock();
        let attempts = state.attempts.entry((profile.clone(), result)).or_default();
        attempts.observe(ATTEMPT_BUCKETS, took.as_secs_f64());
    }

    pub fn decided(&self, took: Duration) {
        self.state.lock().algorithm.observe(ATTEMPT_BUCKETS, took.as_secs_f64());
    }

    /// A pod was bound after so many tries and this time since it was first seen.
    pub fn bound(&self, attempts: u32, took: Duration) {
        let mut state = self.state.lock();
        // Upstream's label is open-ended; more than this many tries are not told apart.
        state.pods.entry(attempts.min(16)).or_default().observe(SLI_BUCKETS, took.as_secs_f64());
        state.tries.observe(ATTEMPTS, attempts.into());
    }

    pub fn queued(&self, queue: &'static str, event: &'static str, pods: usize) {
        if pods > 0 {
            *self.state.lock().incoming.entry((queue, event)).or_default() += pods as u64;
        }
    }

    pub fn preempted(&self, victims: usize) {
        let mut state = self.state.lock();
        state.preemption_attempts += 1;
        if victims > 0 {
            state.victims.observe(VICTIMS, victims as f64);
        }
    }

    fn print(&self) -> String {
        let state = self.state.lock();
        let schedulers: Vec<Arc<dyn Gauges>> = state.schedulers.iter().filter_map(Weak::upgrade).collect();
        let mut text = String::new();
        if schedulers.is_empty() && state.attempts.is_empty() {
            return text;
        }
        state.print_attempts(&mut text);
        state.print_pods(&mut text);
        drop(state);
        print_gauges(&mut text, &schedulers);
        text
    }
}

impl State {
    fn print_attempts(&self, text: &mut String) {
        let name = "scheduler_schedule_attempts_total";
        heading(text, name, "counter", "Attempts to schedule pods, by result.");
        for ((profile, result), attempts) in &self.attempts {
            line(text, name, &format!("profile=\"{profile}\",result=\"{}\"", result.label()), attempts.count);
        }
        let name = "scheduler_scheduling_attempt_duration_seconds";
        heading(text, name, "histogram", "Time of an attempt: decision and binding.");
        for ((profile, result), attempts) in &self.attempts {
            let labels = format!("profile=\"{profile}\",result=\"{}\"", result.label());
            attempts.print(text, name, &labels, ATTEMPT_BUCKETS);
        }
        let name = "scheduler_scheduling_algorithm_duration_seconds";
        heading(text, name, "histogram", "Time of a decision.");
        self.algorithm.print(text, name, "", ATTEMPT_BUCKETS);
        let name = "scheduler_preemption_attempts_total";
        heading(text, name, "counter", "Times preemption was tried.");
        line(text, name, "", self.preemption_attempts);
        let name = "scheduler_preemption_victims";
        heading(text, name, "histogram", "Pods that had to go at once.");
        self.victims.print(text, name, "", VICTIMS);
    }

    fn print_pods(&self, text: &mut String) {
        let name = "scheduler_pod_scheduling_sli_duration_seconds";
        heading(text, name, "histogram", "Time from first sight of a pod until it was bound.");
        for (attempts, pods) in &self.pods {
            pods.print(text, name, &format!("attempts=\"{attempts}\""), SLI_BUCKETS);
        }
        let name = "scheduler_pod_scheduling_attempts";
        heading(text, name, "histogram", "Tries until a pod was bound.");
        self.tries.print(text, name, "", ATTEMPTS);
        let name = "scheduler_queue_incoming_pods_total";
        heading(text, name, "counter", "Pods that entered a queue, by the event that brought them.");
        for ((queue, event), pods) in &self.incoming {
            line(text, name, &format!("event=\"{event}\",queue=\"{queue}\""), pods);
        }
    }
}

fn print_gauges(text: &mut String, schedulers: &[Arc<dyn Gauges>]) {
    let name = "scheduler_pending_pods";
    heading(text, name, "gauge", "Pods without a node, by queue.");
    for (index, queue) in ["active", "backoff", "unschedulable", "gated"].into_iter().enumerate() {
        let pods: usize = schedulers.iter().map(|scheduler| scheduler.pending()[index]).sum();
        line(text, name, &format!("queue=\"{queue}\""), pods);
    }
    let name = "scheduler_cache_size";
    heading(text, name, "gauge", "Nodes, pods and assumed pods in the table.");
    for (index, kind) in ["nodes", "pods", "assumed_pods"].into_iter().enumerate() {
        let size: usize = schedulers.iter().map(|scheduler| scheduler.cached()[index]).sum();
        line(text, name, &format!("type=\"{kind}\""), size);
    }
    let name = "scheduler_unschedulable_pods";
    heading(text, name, "gauge", "Unschedulable pods, by the plugin that refused them.");
    for (id, plugin) in PLUGINS.iter().enumerate() {
        let pods: usize = schedulers.iter().map(|scheduler| scheduler.refused_by(id)).sum();
        if pods > 0 {
            line(text, name, &format!("plugin=\"{}\"", plugin.name), pods);
        }
    }
}
