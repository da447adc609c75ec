//! What the server counts, under upstream's names, for `/metrics`.
//!
//! Counting is on the path of every request, so a series is found by its own label text in one map, and
//! then only atomics change. One process has one set of counters, however many servers it carries.

use std::collections::HashMap;
use std::fmt::Write;
use std::pin::Pin;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;
use parking_lot::RwLock;

use crate::request::{RequestInfo, Target};
use crate::respond::{Answer, Body};

/// Upper bounds of the duration histogram, in seconds: upstream's.
const BUCKETS: [f64; 23] = [
    0.005, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0,
    20.0, 30.0, 45.0, 60.0,
];
/// More series are not opened: labels come from the schema, so this is only reached by a flood of kinds.
const SERIES_MAX: usize = 20_000;

static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::default);

/// All counters of the process.
pub fn metrics() -> &'static Metrics {
    &METRICS
}

/// What others of this process count beside the server, each printing its own part of `/metrics`.
static SOURCES: RwLock<Vec<fn() -> String>> = RwLock::new(Vec::new());

/// Adds a part to `/metrics`; adding it again does nothing.
pub fn add_source(print: fn() -> String) {
    let mut sources = SOURCES.write();
    if !sources.iter().any(|known| std::ptr::fn_addr_eq(*known, print)) {
        sources.push(print);
    }
}

#[derive(Default)]
pub struct Metrics {
    /// Finished requests by all labels with the code.
    requests: RwLock<HashMap<String, Arc<AtomicU64>>>,
    /// Durations by labels without the code; requests that stay open are not in it.
    durations: RwLock<HashMap<String, Arc<Histogram>>>,
    /// Requests that stay open: watches, logs, exec.
    open: RwLock<HashMap<String, Arc<AtomicI64>>>,
    reading: AtomicI64,
    writing: AtomicI64,
    /// Events sent to watchers.
    pub watch_events: AtomicU64,
}

#[derive(Default)]
struct Histogram {
    buckets: [AtomicU64; BUCKETS.len()],
    count: AtomicU64,
    micros: AtomicU64,
}

/// A request being served; counted as in flight until dropped.
pub struct InFlight(&'static AtomicI64);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// The verb as upstream's label has it.
fn verb_label(info: &RequestInfo, target: &Target, apply: bool) -> &'static str {
    match (info.verb, target.subresource.as_str()) {
        (_, "exec" | "attach" | "portforward" | "proxy" | "log") => "CONNECT",
        ("get", _) => "GET",
        ("list", _) => "LIST",
        ("watch", _) => "WATCH",
        ("create", _) => "POST",
        ("update", _) => "PUT",
        ("patch", _) if apply => "APPLY",
        ("patch", _) => "PATCH",
        ("delete", _) => "DELETE",
        ("deletecollection", _) => "DELETECOLLECTION",
        _ => "other",
    }
}

/// True for requests that stay open as long as the client likes.
pub fn is_long_running(info: &RequestInfo) -> bool {
    info.verb == "watch"
        || info.target.as_ref().is_some_and(|t| {
            matches!(t.subresource.as_str(), "exec" | "attach" | "portforward" | "proxy" | "log")
        })
}

/// The labels that all series of a request share, without braces.
pub fn labels(info: &RequestInfo, target: &Target, apply: bool) -> String {
    let scope = match (target.name.is_empty(), target.namespace.is_empty()) {
        (false, _) => "resource",
        (true, false) => "namespace",
        (true, true) => "cluster",
    };
    let dry_run = if info.query.get("dryRun").is_some() { "All" } else { "" };
    let mut text = String::with_capacity(192);
    for (name, value) in [
        ("component=\"", "apiserver"),
        ("\",dry_run=\"", dry_run),
        ("\",group=\"", &target.group),
        ("\",resource=\"", &target.resource),
        ("\",scope=\"", scope),
        ("\",subresource=\"", &target.subresource),
        ("\",verb=\"", verb_label(info, target, apply)),
        ("\",version=\"", &target.version),
    ] {
        text.push_str(name);
        text.push_str(value);
    }
    text.push('"');
    text
}

impl Metrics {
    /// Counts a request as in flight.
    pub fn begin(&'static self, info: &RequestInfo) -> Option<InFlight> {
        if is_long_running(info) {
            return None;
        }
        let gauge = if matches!(info.verb, "get" | "list" | "") { &self.reading } else { &self.writing };
        gauge.fetch_add(1, Relaxed);
        Some(InFlight(gauge))
    }

    /// Counts a finished request.
    pub fn finish(&self, labels: &str, code: u16, took: Option<Duration>) {
        let mut with_code = String::with_capacity(labels.len() + 12);
        let mut digits = [0; 3];
        digits
            .iter_mut()
            .zip([code / 100 % 10, code / 10 % 10, code % 10])
            .for_each(|(d, n)| *d = b'0' + n as u8);
        with_code.push_str("code=\"");
        with_code.push_str(std::str::from_utf8(&digits).unwrap_or("000"));
        with_code.push_str("\",");
        with_code.push_str(labels);
        if let Some(counter) = series(&self.requests, &with_code) {
            counter.fetch_add(1, Relaxed);
        }
        let Some(took) = took else { return };
        let Some(histogram) = series(&self.durations, labels) else { return };
        let seconds = took.as_secs_f64();
        if let Some(index) = BUCKETS.iter().position(|bound| seconds <= *bound) {
            histogram.buckets[index].fetch_add(1, Relaxed);
        }
        histogram.count.fetch_add(1, Relaxed);
        histogram.micros.fetch_add(took.as_micros() as u64, Relaxed);
    }

    /// Counts an answer as open until its body ends.
    pub fn hold_open(&self, labels: &str, answer: Answer) -> Answer {
        let Some(gauge) = series(&self.open, labels) else { return answer };
        gauge.fetch_add(1, Relaxed);
        answer.map(|inner| Held { inner, gauge }.boxed_unsync())
    }

    /// The text of `/metrics`, but for what others count.
    pub fn print(&self) -> String {
        let mut text = String::new();
        heading(&mut text, "apiserver_request_total", "counter", "Requests by verb, resource and HTTP code.");
        for (labels, counter) in sorted(&self.requests) {
            line(&mut text, "apiserver_request_total", &labels, counter.load(Relaxed));
        }
        let name = "apiserver_request_duration_seconds";
        heading(&mut text, name, "histogram", "How long requests took that do not stay open.");
        for (labels, histogram) in sorted(&self.durations) {
            let mut sum = 0;
            for (bound, bucket) in BUCKETS.iter().zip(&histogram.buckets) {
                sum += bucket.load(Relaxed);
                line(&mut text, &format!("{name}_bucket"), &format!("{labels},le=\"{bound}\""), sum);
            }
            let count = histogram.count.load(Relaxed);
            line(&mut text, &format!("{name}_bucket"), &format!("{labels},le=\"+Inf\""), count);
            line(&mut text, &format!("{name}_sum"), &labels, histogram.micros.load(Relaxed) as f64 / 1e6);
            line(&mut text, &format!("{name}_count"), &labels, count);
        }
        let name = "apiserver_current_inflight_requests";
        heading(&mut text, name, "gauge", "Requests being served.");
        line(&mut text, name, "request_kind=\"mutating\"", self.writing.load(Relaxed));
        line(&mut text, name, "request_kind=\"readOnly\"", self.reading.load(Relaxed));
        let name = "apiserver_longrunning_requests";
        heading(&mut text, name, "gauge", "Requests that stay open: watches, logs, exec.");
        for (labels, gauge) in sorted(&self.open) {
            line(&mut text, name, &labels, gauge.load(Relaxed));
        }
        let name = "apiserver_watch_events_total";
        heading(&mut text, name, "counter", "Events sent to watchers.");
        text.push_str(&format!("{name} {}\n", self.watch_events.load(Relaxed)));
        SOURCES.read().iter().for_each(|print| text.push_str(&print()));
        text
    }
}

/// The series of these labels, opened at first use.
fn series<T: Default>(map: &RwLock<HashMap<String, Arc<T>>>, labels: &str) -> Option<Arc<T>> {
    if let Some(found) = map.read().get(labels) {
        return Some(found.clone());
    }
    let mut map = map.write();
    if map.len() >= SERIES_MAX {
        return None;
    }
    Some(map.entry(labels.to_owned()).or_default().clone())
}

fn sorted<T>(map: &RwLock<HashMap<String, Arc<T>>>) -> Vec<(String, Arc<T>)> {
    let mut all: Vec<_> =
        map.read().iter().map(|(labels, series)| (labels.clone(), series.clone())).collect();
    all.sort_by(|(a, _), (b, _)| a.cmp(b));
    all
}

pub fn heading(text: &mut String, name: &str, kind: &str, help: &str) {
    write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n").expect("strings can be written to");
}

pub fn line(text: &mut String, name: &str, labels: &str, value: impl std::fmt::Display) {
    writeln!(text, "{name}{{{labels}}} {value}").expect("strings can be written to");
}

/// A body that counts as open while it exists.
struct Held {
    inner: Body,
    gauge: Arc<AtomicI64>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.gauge.fetch_sub(1, Relaxed);
    }
}

impl http_body::Body for Held {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        Pin::new(&mut self.inner).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
