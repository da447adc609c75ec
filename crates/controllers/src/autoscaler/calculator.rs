//! How many replicas a metric asks for: arithmetic over pods and samples, without any I/O. Upstream's
//! `replica_calculator.go`. Values are thousandths.

use crate::{pods, util};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Container, Pod};
use knarr_api::quantity::Quantity;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// A pod this young may still be starting up: its CPU counts only once it is ready. Upstream's value.
const CPU_STARTS_FOR: SignedDuration = SignedDuration::from_mins(5);
/// An unready pod whose readiness last changed this soon after its start was never ready. Upstream's value.
const FIRST_READINESS: SignedDuration = SignedDuration::from_secs(30);

const NO_SAMPLES: &str = "did not receive metrics for targeted pods (pods might be unready)";

/// One measurement of one pod.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// Thousandths.
    pub value: i64,
    /// The end of the measured window.
    pub at: Timestamp,
    pub window: SignedDuration,
}

/// Measurements by the pods' names.
pub type Samples = BTreeMap<String, Sample>;

/// How far from the target a ratio may be without an effect, downwards and upwards.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    pub down: f64,
    pub up: f64,
}

impl Tolerance {
    pub fn covers(&self, ratio: f64) -> bool {
        1.0 - self.down <= ratio && ratio <= 1.0 + self.up
    }
}

/// What a calculation stands on besides the metric.
pub struct Ground<'a> {
    /// The pods the target's selector picks.
    pub pods: &'a [Arc<Pod>],
    /// What the scale wishes for now.
    pub current: i32,
    pub tolerance: Tolerance,
    pub now: Timestamp,
}

/// What a metric asks for, and what was measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Proposal {
    pub replicas: i32,
    /// The mean per pod, in thousandths; for a value shared by all pods the value.
    pub mean: i64,
    /// Percent of the request.
    pub utilization: Option<i32>,
}

/// Which measurements mean something.
struct Groups {
    ready: usize,
    unready: BTreeSet<String>,
    missing: BTreeSet<String>,
}

/// Replicas for a resource's use in percent of what the pods request.
pub fn of_utilization(
    ground: &Ground<'_>,
    mut samples: Samples,
    resource: &str,
    container: Option<&str>,
    target: i32,
) -> Result<Proposal, String> {
    let groups = group(ground, &mut samples, resource)?;
    let requests = requests(ground.pods, resource, container)?;
    if samples.is_empty() {
        return Err(NO_SAMPLES.to_owned());
    }
    let (ratio, utilization, mean) = utilization(&samples, &requests, target)?;
    let answer = |replicas| Ok(Proposal { replicas, mean, utilization: Some(utilization) });
    let fallback = |pod: &str| {
        let request = requests.get(pod).copied().unwrap_or(0);
        request * i64::from(target.max(100)) / 100
    };
    let Some(samples) = groups.filled(samples, ratio, fallback) else {
        return answer(groups.simply(ground, ratio));
    };
    let (again, _, _) = self::utilization(&samples, &requests, target)?;
    answer(settled(ground, ratio, again, samples.len()))
}

/// Replicas for a mean per pod.
pub fn of_mean(
    ground: &Ground<'_>,
    mut samples: Samples,
    resource: &str,
    target: i64,
) -> Result<Proposal, String> {
    let groups = group(ground, &mut samples, resource)?;
    if samples.is_empty() {
        return Err(NO_SAMPLES.to_owned());
    }
    let (ratio, mean) = mean(&samples, target);
    let answer = |replicas| Ok(Proposal { replicas, mean, utilization: None });
    let Some(samples) = groups.filled(samples, ratio, |_| target) else {
        return answer(groups.simply(ground, ratio));
    };
    answer(settled(ground, ratio, self::mean(&samples, target).0, samples.len()))
}

/// Replicas for a value that all pods share and that more replicas are to bring down.
pub fn of_value(ground: &Ground<'_>, value: i64, target: i64) -> Result<Proposal, String> {
    let ratio = value as f64 / target as f64;
    let replicas = if ground.current == 0 {
        ratio.ceil() as i32
    } else if ground.tolerance.covers(ratio) {
        ground.current
    } else {
        let no_pods =
            "unable to calculate ready pods: no pods returned by selector while calculating replica count";
        if ground.pods.is_empty() {
            return Err(no_pods.to_owned());
        }
        let runs = |pod: &&Arc<Pod>| pods::phase(pod) == "Running" && pods::is_ready(pod);
        (ratio * ground.pods.iter().filter(runs).count() as f64).ceil() as i32
    };
    Ok(Proposal { replicas, mean: value, utilization: None })
}

/// Replicas for a value of which every one of `observed` replicas takes its share.
pub fn of_share(tolerance: Tolerance, observed: i32, value: i64, target: i64) -> Proposal {
    let ratio = value as f64 / (target as f64 * f64::from(observed));
    let replicas =
        if tolerance.covers(ratio) { observed } else { (value as f64 / target as f64).ceil() as i32 };
    let mean = if observed == 0 { 0 } else { (value as f64 / f64::from(observed)).ceil() as i64 };
    Proposal { replicas, mean, utilization: None }
}

impl Groups {
    /// The samples with assumptions for pods that have none; `None` when nothing has to be assumed. Assumed is what
    /// makes the change smaller: pods without a sample use all of their wish when the number goes down and nothing when
    /// it goes up, and pods that are not ready use nothing when it goes up.
    fn filled(&self, mut samples: Samples, ratio: f64, full: impl Fn(&str) -> i64) -> Option<Samples> {
        let waits = !self.unready.is_empty() && ratio > 1.0;
        if !waits && self.missing.is_empty() {
            return None;
        }
        let assumed = |value| Sample { value, at: Timestamp::UNIX_EPOCH, window: SignedDuration::ZERO };
        for pod in &self.missing {
            if ratio < 1.0 {
                samples.insert(pod.clone(), assumed(full(pod)));
            } else if ratio > 1.0 {
                samples.insert(pod.clone(), assumed(0));
            }
        }
        if waits {
            samples.extend(self.unready.iter().map(|pod| (pod.clone(), assumed(0))));
        }
        Some(samples)
    }

    /// The answer when every pod has a sample.
    fn simply(&self, ground: &Ground<'_>, ratio: f64) -> i32 {
        if ground.tolerance.covers(ratio) {
            ground.current
        } else {
            (ratio * self.ready as f64).ceil() as i32
        }
    }
}

/// The answer after assumptions: none that the assumptions alone turned around.
fn settled(ground: &Ground<'_>, before: f64, after: f64, samples: usize) -> i32 {
    let turned = (before < 1.0 && after > 1.0) || (before > 1.0 && after < 1.0);
    if ground.tolerance.covers(after) || turned {
        return ground.current;
    }
    let replicas = (after * samples as f64).ceil() as i32;
    let turned = (after < 1.0 && replicas > ground.current) || (after > 1.0 && replicas < ground.current);
    if turned { ground.current } else { replicas }
}

/// Sorts the pods, and takes away samples that say nothing.
fn group(ground: &Ground<'_>, samples: &mut Samples, resource: &str) -> Result<Groups, String> {
    if ground.pods.is_empty() {
        return Err("no pods returned by selector while calculating replica count".to_owned());
    }
    let mut groups = Groups { ready: 0, unready: BTreeSet::new(), missing: BTreeSet::new() };
    for pod in ground.pods {
        let name = pod.metadata.name.clone().unwrap_or_default();
        if pods::is_terminating(pod) || pods::phase(pod) == "Failed" {
            samples.remove(&name);
            continue;
        }
        let sample = samples.get(&name);
        if pods::phase(pod) == "Pending" {
            groups.unready.insert(name);
        } else if let Some(sample) = sample {
            if resource == "cpu" && is_starting(pod, sample, ground.now) {
                groups.unready.insert(name);
            } else {
                groups.ready += 1;
            }
        } else {
            groups.missing.insert(name);
        }
    }
    samples.retain(|name, _| !groups.unready.contains(name));
    Ok(groups)
}

/// Whether a pod's CPU is that of its start, not of its work.
fn is_starting(pod: &Pod, sample: &Sample, now: Timestamp) -> bool {
    let status = pod.status.as_ref();
    let started = status.and_then(|status| status.start_time.as_ref()).map(|time| time.0);
    let ready = status.and_then(|status| util::find(&status.conditions, "Ready"));
    let (Some(started), Some(ready)) = (started, ready) else { return true };
    let changed = ready.last_transition_time.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0);
    let unready = ready.status == "False";
    let after = |time: Timestamp, by: SignedDuration| time.saturating_add(by).unwrap_or(Timestamp::MAX);
    if after(started, CPU_STARTS_FOR) > now {
        unready || sample.at < after(changed, sample.window)
    } else {
        unready && after(started, FIRST_READINESS) > changed
    }
}

/// What each pod requests of a resource, or one container of each.
fn requests(
    all: &[Arc<Pod>],
    resource: &str,
    container: Option<&str>,
) -> Result<BTreeMap<String, i64>, String> {
    all.iter()
        .map(|pod| Ok((pod.metadata.name.clone().unwrap_or_default(), request(pod, resource, container)?)))
        .collect()
}

fn request(pod: &Pod, resource: &str, only: Option<&str>) -> Result<i64, String> {
    let Some(spec) = &pod.spec else { return Ok(0) };
    let of_pod = spec.resources.as_ref().and_then(|resources| resources.requests.as_ref()?.get(resource));
    if let (None, Some(whole)) = (only, of_pod) {
        return Ok(millis(&whole.0));
    }
    let sidecars = spec.init_containers.iter().flatten();
    let sidecars = sidecars.filter(|container| container.restart_policy.as_deref() == Some("Always"));
    let counted = |container: &&Container| only.is_none_or(|only| container.name == only);
    let mut sum = 0;
    for container in spec.containers.iter().chain(sidecars).filter(counted) {
        let requests = container.resources.as_ref().and_then(|resources| resources.requests.as_ref());
        let Some(request) = requests.and_then(|requests| requests.get(resource)) else {
            let pod = pod.metadata.name.as_deref().unwrap_or_default();
            return Err(format!(
                "missing request for {resource} in container {} of Pod {pod}",
                container.name
            ));
        };
        sum += millis(&request.0);
    }
    Ok(sum)
}

/// A quantity in thousandths; what is none counts as zero.
pub fn millis(text: &str) -> i64 {
    text.parse::<Quantity>().map_or(0, |quantity| quantity.millis())
}

/// The use relative to the target, in percent of the requests, and the mean per pod.
fn utilization(
    samples: &Samples,
    requests: &BTreeMap<String, i64>,
    target: i32,
) -> Result<(f64, i32, i64), String> {
    let known = samples.iter().filter_map(|(pod, sample)| Some((sample.value, requests.get(pod)?)));
    let (mut used, mut requested, mut count) = (0_i64, 0_i64, 0_i64);
    for (value, request) in known {
        used += value;
        requested += request;
        count += 1;
    }
    if requested == 0 {
        return Err("no metrics returned matched known pods".to_owned());
    }
    let percent = i32::try_from(i128::from(used) * 100 / i128::from(requested)).unwrap_or(i32::MAX);
    Ok((f64::from(percent) / f64::from(target), percent, used / count))
}

fn mean(samples: &Samples, target: i64) -> (f64, i64) {
    let sum: i64 = samples.values().map(|sample| sample.value).sum();
    let mean = sum / samples.len().max(1) as i64;
    (mean as f64 / target as f64, mean)
}
