//! What the scheduler counts, under upstream's names, as text for `/metrics`. One process has one set of counters,
//! however many schedulers it runs.

use crate::plugins::{PLUGINS, PluginId, Point};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Arc, LazyLock, Weak};
use std::time::{Duration, Instant};

/// Upper bounds: the first, how many times larger each next one is, and how many there are. Upstream's; in seconds,
/// for decisions, pods, extension points and plugins.
type Buckets = (f64, f64, usize);
const ATTEMPT_BUCKETS: Buckets = (0.001, 2.0, 15);
const SLI_BUCKETS: Buckets = (0.01, 2.0, 20);
const POINT_BUCKETS: Buckets = (0.0001, 2.0, 12);
const PLUGIN_BUCKETS: Buckets = (0.00001, 1.5, 20);
/// Upper bounds for attempts and victims.
const ATTEMPTS: Buckets = (1.0, 2.0, 5);
const VICTIMS: Buckets = (1.0, 2.0, 7);
/// One decision of so many is measured plugin by plugin: upstream's share, 10 %.
const SAMPLE: u64 = 10;

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
    /// How many pods a plugin refused, by profile.
    fn refused_by(&self, plugin: usize) -> BTreeMap<String, usize>;
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
    /// By profile, then by point and status.
    points: BTreeMap<String, BTreeMap<(Point, Status), Histogram>>,
    plugins: BTreeMap<(PluginId, Point, Status), Histogram>,
}

/// How a call ended, in upstream's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Status {
    Success,
    Skip,
    Unschedulable,
    Hopeless,
    Error,
}

impl Status {
    fn label(self) -> &'static str {
        match self {
            Status::Success => "Success",
            Status::Skip => "Skip",
            Status::Unschedulable => "Unschedulable",
            Status::Hopeless => "UnschedulableAndUnresolvable",
            Status::Error => "Error",
        }
    }
}

/// How long the parts of one decision took, until they are counted.
#[derive(Debug, Default)]
pub struct Timing {
    decisions: u64,
    points: Vec<(Point, Status, Duration)>,
    plugins: Vec<(PluginId, Point, Status, Duration)>,
}

impl Timing {
    /// The next decision begins; what the last one left is forgotten.
    pub fn begin(&mut self) {
        self.decisions += 1;
        self.points.clear();
        self.plugins.clear();
    }

    /// Whether plugins are measured this time.
    pub fn samples(&self) -> bool {
        self.decisions % SAMPLE == 1
    }

    pub fn point(&mut self, point: Point, status: Status, since: Instant) {
        self.points.push((point, status, since.elapsed()));
    }

    pub fn plugin(&mut self, plugin: PluginId, point: Point, status: Status, took: Duration) {
        self.plugins.push((plugin, point, status, took));
    }
}

#[derive(Default)]
struct Histogram {
    /// By bucket, not summed up.
    counts: Vec<u64>,
    count: u64,
    sum: f64,
}

impl Histogram {
    fn observe(&mut self, buckets: Buckets, value: f64) {
        self.counts.resize(buckets.2, 0);
        if let Some(bucket) = bounds(buckets).position(|bound| value <= bound) {
            self.counts[bucket] += 1;
        }
        self.count += 1;
        self.sum += value;
    }

    fn print(&self, text: &mut String, name: &str, labels: &str, buckets: Buckets) {
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

fn bounds((first, factor, len): Buckets) -> impl Iterator<Item = f64> {
    std::iter::successors(Some(first), move |bound| Some(bound * factor)).take(len)
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

    /// A decision for a pod of a profile took this time, in total and in its parts.
    pub fn decided(&self, profile: &str, took: Duration, timing: &Timing) {
        let mut state = self.state.lock();
        state.algorithm.observe(ATTEMPT_BUCKETS, took.as_secs_f64());
        for (point, status, took) in &timing.points {
            state.preemption_attempts += u64::from(*point == Point::PostFilter);
            state.point(profile, *point, *status, *took);
        }
        for (plugin, point, status, took) in &timing.plugins {
            let histogram = state.plugins.entry((*plugin, *point, *status)).or_default();
            histogram.observe(PLUGIN_BUCKETS, took.as_secs_f64());
        }
    }

    /// An extension point outside of decisions.
    pub fn point(&self, profile: &str, point: Point, status: Status, took: Duration) {
        self.state.lock().point(profile, point, status, took);
    }

    /// A pod was bound after so many tries and this time since it was first seen.
    pub fn bound(&self, attempts: u32, took: Duration) {
        let mut state = self.state.lock();
        // Upstream's label is open-ended; more than this many tries are not told apart.
        state.pods.entry(attempts.min(16)).or_default().observe(SLI_BUCKETS, took.as_secs_f64());
        state.tries.observe(ATTEMPTS, attempts.into());
    }

    /// A pod entered a queue because of an event.
    pub fn queued(&self, queue: &'static str, event: &'static str) {
        *self.state.lock().incoming.entry((queue, event)).or_default() += 1;
    }

    /// So many pods have to go for one.
    pub fn preempted(&self, victims: usize) {
        self.state.lock().victims.observe(VICTIMS, victims as f64);
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
        state.print_durations(&mut text);
        drop(state);
        print_gauges(&mut text, &schedulers);
        text
    }
}

impl State {
    fn point(&mut self, profile: &str, point: Point, status: Status, took: Duration) {
        if !self.points.contains_key(profile) {
            self.points.insert(profile.to_owned(), BTreeMap::new());
        }
        let of_profile = self.points.get_mut(profile).expect("the profile was put in");
        of_profile.entry((point, status)).or_default().observe(POINT_BUCKETS, took.as_secs_f64());
    }

    fn print_durations(&self, text: &mut String) {
        let name = "scheduler_framework_extension_point_duration_seconds";
        heading(text, name, "histogram", "Time of all plugins of an extension point.");
        for (profile, points) in &self.points {
            for ((point, status), histogram) in points {
                let labels = format!(
                    "extension_point=\"{point:?}\",profile=\"{profile}\",status=\"{}\"",
                    status.label()
                );
                histogram.print(text, name, &labels, POINT_BUCKETS);
            }
        }
        let name = "scheduler_plugin_execution_duration_seconds";
        heading(text, name, "histogram", "Time of a plugin at an extension point, in one decision of ten.");
        for ((plugin, point, status), histogram) in &self.plugins {
            let labels = format!(
                "extension_point=\"{point:?}\",plugin=\"{}\",status=\"{}\"",
                PLUGINS[*plugin].name,
                status.label()
            );
            histogram.print(text, name, &labels, PLUGIN_BUCKETS);
        }
    }

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
        let mut by_profile: BTreeMap<String, usize> = BTreeMap::new();
        for (profile, pods) in schedulers.iter().flat_map(|scheduler| scheduler.refused_by(id)) {
            *by_profile.entry(profile).or_default() += pods;
        }
        for (profile, pods) in by_profile {
            line(text, name, &format!("plugin=\"{}\",profile=\"{profile}\"", plugin.name), pods);
        }
    }
}
