//! From what the metrics ask for to what is done: bounds, rates and stabilization, without any I/O. Upstream's
//! `normalizeDesiredReplicas` and its twin with `behavior`.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::autoscaling::v2::{
    HPAScalingPolicy, HPAScalingRules, HorizontalPodAutoscalerBehavior, HorizontalPodAutoscalerSpec,
};

/// Without a word about it, the highest recommendation of this long counts on the way down. Upstream's value.
const DOWN_STABILIZATION_S: i32 = 300;

/// What one autoscaler did and wanted lately. Kept in memory only, as upstream: after a restart the windows begin
/// again with the number of replicas found.
#[derive(Clone, Debug, Default)]
pub struct History {
    recommendations: Vec<(Timestamp, i32)>,
    added: Vec<(Timestamp, i32)>,
    removed: Vec<(Timestamp, i32)>,
}

/// A verdict for a condition.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    pub status: bool,
    pub reason: &'static str,
    pub message: &'static str,
}

/// What becomes of a recommendation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    pub replicas: i32,
    /// The condition `AbleToScale`.
    pub able: Verdict,
    /// The condition `ScalingLimited`.
    pub limited: Verdict,
}

const UP_STABILIZED: (&str, &str) = (
    "ScaleUpStabilized",
    "recent recommendations were lower than current one, applying the lowest recent recommendation",
);
const DOWN_STABILIZED: (&str, &str) = (
    "ScaleDownStabilized",
    "recent recommendations were higher than current one, applying the highest recent recommendation",
);
const UP_LIMIT: (&str, &str) =
    ("ScaleUpLimit", "the desired replica count is increasing faster than the maximum scale rate");
const DOWN_LIMIT: (&str, &str) =
    ("ScaleDownLimit", "the desired replica count is decreasing faster than the maximum scale rate");
const TOO_MANY: (&str, &str) =
    ("TooManyReplicas", "the desired replica count is more than the maximum replica count");
const TOO_FEW: (&str, &str) =
    ("TooFewReplicas", "the desired replica count is less than the minimum replica count");
const WITHIN: (&str, &str) = ("DesiredWithinRange", "the desired count is within the acceptable range");
const READY: (&str, &str) = ("ReadyForNewScale", "recommended size matches current size");

/// The smallest number of replicas asked for.
pub fn minimum(spec: &HorizontalPodAutoscalerSpec) -> i32 {
    spec.min_replicas.unwrap_or(1)
}

/// Rules of both directions with upstream's defaults for what is not said.
struct Rules {
    policies: Vec<HPAScalingPolicy>,
    select: String,
    window: i32,
}

impl Rules {
    fn of(rules: Option<&HPAScalingRules>, window: i32, default: &[(&str, i32)]) -> Rules {
        let default = default.iter().map(|(type_, value)| HPAScalingPolicy {
            type_: (*type_).to_owned(),
            value: *value,
            period_seconds: 15,
        });
        let policies = rules.and_then(|rules| rules.policies.clone()).filter(|list| !list.is_empty());
        Rules {
            policies: policies.unwrap_or_else(|| default.collect()),
            select: rules.and_then(|rules| rules.select_policy.clone()).unwrap_or_else(|| "Max".to_owned()),
            window: rules.and_then(|rules| rules.stabilization_window_seconds).unwrap_or(window),
        }
    }

    fn up(behavior: &HorizontalPodAutoscalerBehavior) -> Rules {
        Rules::of(behavior.scale_up.as_ref(), 0, &[("Pods", 4), ("Percent", 100)])
    }

    fn down(behavior: &HorizontalPodAutoscalerBehavior) -> Rules {
        Rules::of(behavior.scale_down.as_ref(), DOWN_STABILIZATION_S, &[("Percent", 100)])
    }

    /// How long its policies look back.
    fn longest_period(&self) -> i32 {
        self.policies.iter().map(|policy| policy.period_seconds).max().unwrap_or(0)
    }
}

impl History {
    /// Remembers the number found first: nothing falls below it before its window is over.
    pub fn begin(&mut self, replicas: i32, now: Timestamp) {
        if self.recommendations.is_empty() {
            self.recommendations.push((now, replicas));
        }
    }

    /// Remembers a change of the scale.
    pub fn scaled(&mut self, spec: &HorizontalPodAutoscalerSpec, from: i32, to: i32, now: Timestamp) {
        let Some(behavior) = &spec.behavior else { return };
        let longest = Rules::up(behavior).longest_period().max(Rules::down(behavior).longest_period());
        let cutoff = before(now, longest);
        for list in [&mut self.added, &mut self.removed] {
            list.retain(|(at, _)| *at >= cutoff);
        }
        if to > from {
            self.added.push((now, to - from));
        } else {
            self.removed.push((now, from - to));
        }
    }

    /// What to do about `wanted` replicas when there are `current`.
    pub fn settle(
        &mut self,
        spec: &HorizontalPodAutoscalerSpec,
        current: i32,
        wanted: i32,
        now: Timestamp,
    ) -> Outcome {
        let (stable, why) = match &spec.behavior {
            None => self.stabilize(wanted, now),
            Some(behavior) => self.stabilize_by(behavior, current, wanted, now),
        };
        let able = if stable == wanted { READY } else { why };
        let (replicas, limit) = match &spec.behavior {
            None => bounded(spec, current, stable),
            Some(behavior) => self.bounded_by(spec, behavior, current, stable, now),
        };
        let verdict = |status, (reason, message)| Verdict { status, reason, message };
        Outcome { replicas, able: verdict(true, able), limited: verdict(replicas != stable, limit) }
    }

    /// The highest recommendation of the window.
    fn stabilize(&mut self, wanted: i32, now: Timestamp) -> (i32, (&'static str, &'static str)) {
        let cutoff = before(now, DOWN_STABILIZATION_S);
        self.recommendations.retain(|(at, _)| *at >= cutoff);
        self.recommendations.push((now, wanted));
        let highest = self.recommendations.iter().map(|(_, recommended)| *recommended).max();
        (highest.unwrap_or(wanted), DOWN_STABILIZED)
    }

    /// As near to the present number as the recommendations of both windows allow.
    fn stabilize_by(
        &mut self,
        behavior: &HorizontalPodAutoscalerBehavior,
        current: i32,
        wanted: i32,
        now: Timestamp,
    ) -> (i32, (&'static str, &'static str)) {
        let (up, down) = (Rules::up(behavior).window, Rules::down(behavior).window);
        let within = |window: i32| {
            let cutoff = before(now, window);
            let recent = self.recommendations.iter().filter(move |(at, _)| *at > cutoff);
            recent.map(|(_, recommended)| *recommended).chain([wanted])
        };
        let lowest = within(up).min().unwrap_or(wanted);
        let highest = within(down).max().unwrap_or(wanted);
        let oldest = before(now, up.max(down));
        self.recommendations.retain(|(at, _)| *at >= oldest);
        self.recommendations.push((now, wanted));
        let why = if wanted >= current { UP_STABILIZED } else { DOWN_STABILIZED };
        (current.max(lowest).min(highest), why)
    }

    fn bounded_by(
        &self,
        spec: &HorizontalPodAutoscalerSpec,
        behavior: &HorizontalPodAutoscalerBehavior,
        current: i32,
        wanted: i32,
        now: Timestamp,
    ) -> (i32, (&'static str, &'static str)) {
        if wanted > current {
            let limit = self.limit(&Rules::up(behavior), current, true, now).max(current);
            let (most, why) =
                if spec.max_replicas > limit { (limit, UP_LIMIT) } else { (spec.max_replicas, TOO_MANY) };
            if wanted > most {
                return (most, why);
            }
        } else if wanted < current {
            let limit = self.limit(&Rules::down(behavior), current, false, now).min(current);
            let least = minimum(spec);
            let (least, why) = if least < limit { (limit, DOWN_LIMIT) } else { (least, TOO_FEW) };
            if wanted < least {
                return (least, why);
            }
        }
        (wanted, WITHIN)
    }

    /// How far one direction's policies let the number go, counted from what it was at the start of each period.
    fn limit(&self, rules: &Rules, current: i32, up: bool, now: Timestamp) -> i32 {
        let proposals = rules.policies.iter().map(|policy| {
            let cutoff = before(now, policy.period_seconds);
            let sum = |list: &[(Timestamp, i32)]| -> i32 {
                list.iter().filter(|(at, _)| *at > cutoff).map(|(_, change)| *change).sum()
            };
            let start = current - sum(&self.added) + sum(&self.removed);
            let percent = f64::from(policy.value) / 100.0;
            match (policy.type_.as_str(), up) {
                ("Percent", true) => (f64::from(start) * (1.0 + percent)).ceil() as i32,
                ("Percent", false) => (f64::from(start) * (1.0 - percent)) as i32,
                (_, true) => start.saturating_add(policy.value),
                (_, false) => start.saturating_sub(policy.value),
            }
        });
        // The smallest change is the lowest number on the way up and the highest on the way down.
        let limit = match (rules.select.as_str(), up) {
            ("Disabled", _) => None,
            ("Min", true) | ("Max", false) => proposals.min(),
            _ => proposals.max(),
        };
        limit.unwrap_or(current)
    }
}

/// Without `behavior`: at most doubled (four are always allowed), between minimum and maximum.
fn bounded(
    spec: &HorizontalPodAutoscalerSpec,
    current: i32,
    wanted: i32,
) -> (i32, (&'static str, &'static str)) {
    let limit = current.saturating_mul(2).max(4);
    let (most, why) =
        if spec.max_replicas > limit { (limit, UP_LIMIT) } else { (spec.max_replicas, TOO_MANY) };
    let least = minimum(spec);
    if wanted < least {
        (least, TOO_FEW)
    } else if wanted > most {
        (most, why)
    } else {
        (wanted, WITHIN)
    }
}

fn before(now: Timestamp, seconds: i32) -> Timestamp {
    now.saturating_sub(SignedDuration::from_secs(seconds.into())).unwrap_or(Timestamp::MIN)
}
