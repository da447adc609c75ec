//! What a stateful set does next: a pure function of the set, its pods and the time.
//!
//! Ordered sets take one step at a time: a pod is made when all before it are available, removed when all after
//! it are gone. Parallel sets take all steps at once. Updates come last, from the end of the line.

use crate::history::revision_of;
use crate::pods;
use crate::util::scaled;
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{RollingUpdateStatefulSetStrategy, StatefulSet};
use k8s_openapi::api::core::v1::Pod;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// What is seen in one turn.
pub struct View<'a> {
    set: &'a StatefulSet,
    /// By their place in line, also those beyond the wish.
    pub pods: &'a BTreeMap<i32, Arc<Pod>>,
    /// Name of the revision of the present template.
    update: &'a str,
    pub now: Timestamp,
}

/// The steps of one turn.
#[derive(Debug, Default, PartialEq)]
pub struct Plan {
    /// Places to fill.
    pub create: Vec<i32>,
    /// Ended pods whose place is to be filled anew.
    pub replace: Vec<Arc<Pod>>,
    pub delete: Vec<Arc<Pod>>,
}

/// The places the set wants filled.
pub fn range(set: &StatefulSet) -> Range<i32> {
    let spec = set.spec.as_ref();
    let start = spec.and_then(|spec| spec.ordinals.as_ref()?.start).unwrap_or(0);
    let replicas = spec.and_then(|spec| spec.replicas).unwrap_or(1);
    start..start.saturating_add(replicas)
}

fn rolling(set: &StatefulSet) -> Option<&RollingUpdateStatefulSetStrategy> {
    set.spec.as_ref()?.update_strategy.as_ref()?.rolling_update.as_ref()
}

fn partition_start(set: &StatefulSet) -> i32 {
    let partition = rolling(set).and_then(|rolling| rolling.partition).unwrap_or(0);
    range(set).start.saturating_add(partition)
}

/// Whether a new pod at this place is of the revision before the update: below the partition.
pub fn keeps_current(set: &StatefulSet, ordinal: i32) -> bool {
    is_rolling(set) && ordinal < partition_start(set)
}

fn is_rolling(set: &StatefulSet) -> bool {
    let strategy = set.spec.as_ref().and_then(|spec| spec.update_strategy.as_ref());
    strategy.and_then(|strategy| strategy.type_.as_deref()).unwrap_or("RollingUpdate") == "RollingUpdate"
}

impl<'a> View<'a> {
    pub fn new(
        set: &'a StatefulSet,
        pods: &'a BTreeMap<i32, Arc<Pod>>,
        update: &'a str,
        now: Timestamp,
    ) -> Self {
        View { set, pods, update, now }
    }

    pub fn is_rolling(&self) -> bool {
        is_rolling(self.set)
    }

    pub fn replicas(&self) -> i32 {
        range(self.set).len() as i32
    }

    pub fn min_ready_seconds(&self) -> i32 {
        self.set.spec.as_ref().and_then(|spec| spec.min_ready_seconds).unwrap_or(0)
    }

    pub fn is_ready(&self, pod: &Pod) -> bool {
        pods::phase(pod) == "Running" && pods::is_ready(pod)
    }

    pub fn is_available(&self, pod: &Pod) -> bool {
        self.is_ready(pod) && pods::is_available(pod, self.min_ready_seconds(), self.now)
    }

    fn is_healthy(&self, pod: &Pod) -> bool {
        self.is_available(pod) && !pods::is_terminating(pod)
    }

    fn is_ordered(&self) -> bool {
        let policy = self.set.spec.as_ref().and_then(|spec| spec.pod_management_policy.as_deref());
        policy.unwrap_or("OrderedReady") == "OrderedReady"
    }

    pub fn plan(&self) -> Plan {
        let mut plan = Plan::default();
        let settled = self.fill(&mut plan) && self.shrink(&mut plan);
        if settled && self.is_rolling() {
            plan.delete.extend(self.update());
        }
        plan
    }

    /// Fills places from the first on. False when the set must wait before it does anything else.
    fn fill(&self, plan: &mut Plan) -> bool {
        for ordinal in range(self.set) {
            let waits = match self.pods.get(&ordinal) {
                None => {
                    plan.create.push(ordinal);
                    true
                }
                Some(pod) if pods::is_finished(pod) && !pods::is_terminating(pod) => {
                    plan.replace.push(pod.clone());
                    true
                }
                Some(pod) => !self.is_healthy(pod),
            };
            if waits && self.is_ordered() {
                return false;
            }
        }
        true
    }

    /// Removes pods beyond the wish, from the last on.
    fn shrink(&self, plan: &mut Plan) -> bool {
        let wanted = range(self.set);
        let first_unhealthy =
            self.pods.iter().find(|(_, pod)| !self.is_healthy(pod)).map(|(place, _)| *place);
        for (ordinal, pod) in self.pods.iter().rev().filter(|(place, _)| !wanted.contains(*place)) {
            let going = pods::is_terminating(pod);
            if !going && (!self.is_ordered() || self.is_healthy(pod) || first_unhealthy == Some(*ordinal)) {
                plan.delete.push(pod.clone());
            }
            if self.is_ordered() {
                return false;
            }
        }
        true
    }

    /// Pods to replace by those of the present template.
    fn update(&self) -> Vec<Arc<Pod>> {
        let outdated = |pod: &Pod| revision_of(pod) != Some(self.update);
        let first = partition_start(self.set);
        let wanted = range(self.set);
        let targets = || self.pods.range(wanted.clone()).rev();
        let limit = rolling(self.set).and_then(|rolling| rolling.max_unavailable.as_ref());
        let Some(limit) = limit else {
            // One at a time: the last that is old, once all after it are healthy.
            for (_, pod) in targets().take_while(|(place, _)| **place >= first) {
                if outdated(pod) && !pods::is_terminating(pod) {
                    return vec![pod.clone()];
                }
                if !self.is_healthy(pod) {
                    break;
                }
            }
            return Vec::new();
        };
        let limit = scaled(limit, self.replicas(), true).max(1) as usize;
        let unavailable = wanted.len() - targets().filter(|(_, pod)| self.is_healthy(pod)).count();
        let old =
            targets().filter(|(place, pod)| **place >= first && outdated(pod) && !pods::is_terminating(pod));
        let (healthy, broken): (Vec<_>, Vec<_>) =
            old.map(|(_, pod)| pod.clone()).partition(|pod| self.is_healthy(pod));
        // Replacing what is broken anyway costs nothing.
        broken.into_iter().chain(healthy.into_iter().take(limit.saturating_sub(unavailable))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// Pods as words: `-` none, `n` new, `o` old; with `!` broken, `~` terminating, `x` failed.
    fn pods(line: &str) -> BTreeMap<i32, Arc<Pod>> {
        let pod = |(place, word): (usize, &str)| -> Option<(i32, Arc<Pod>)> {
            let revision = if word.starts_with('o') { "old" } else { "new" };
            let ready = !word.contains(['!', 'x']);
            let mut pod: Value = json!({
                "metadata": {"name": format!("web-{place}"), "labels": {"controller-revision-hash": revision}},
                "status": {
                    "phase": if word.contains('x') { "Failed" } else { "Running" },
                    "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}],
                },
            });
            if word.contains('~') {
                pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
            }
            (word != "-").then(|| (place as i32, Arc::new(serde_json::from_value(pod).unwrap())))
        };
        line.split_whitespace().enumerate().filter_map(pod).collect()
    }

    fn planned(spec: Value, line: &str) -> String {
        let set = json!({"metadata": {"name": "web"}, "spec": spec});
        let set: StatefulSet = serde_json::from_value(set).unwrap();
        let pods = pods(line);
        let plan = View::new(&set, &pods, "new", Timestamp::now()).plan();
        let names = |pods: &[Arc<Pod>]| -> Vec<String> {
            pods.iter().map(|pod| pod.metadata.name.clone().unwrap().replace("web-", "")).collect()
        };
        let mut words = Vec::new();
        words.extend(plan.create.iter().map(|place| format!("+{place}")));
        words.extend(names(&plan.replace).iter().map(|place| format!("*{place}")));
        words.extend(names(&plan.delete).iter().map(|place| format!("-{place}")));
        words.join(" ")
    }

    #[test]
    fn steps_are_those_of_the_documentation() {
        let base = |more: Value| {
            let mut spec = json!({
                "replicas": 3, "serviceName": "web", "selector": {}, "template": {},
            });
            set_fields(&mut spec, more);
            spec
        };
        let parallel = || base(json!({"podManagementPolicy": "Parallel"}));
        let rolling =
            |more: Value| base(json!({"updateStrategy": {"type": "RollingUpdate", "rollingUpdate": more}}));
        for (what, spec, line, expected) in [
            ("the first is made first", base(json!({})), "- - -", "+0"),
            ("the next when the first is ready", base(json!({})), "n - -", "+1"),
            ("not before", base(json!({})), "n! - -", ""),
            ("a gap is filled first", base(json!({})), "n - n", "+1"),
            ("all at once", parallel(), "- n! -", "+0 +2"),
            ("a failed pod is replaced", base(json!({})), "n nx n", "*1"),
            ("the last goes first", base(json!({"replicas": 1})), "n n n", "-2"),
            ("one at a time", base(json!({"replicas": 1})), "n n n~", ""),
            ("not while one before is broken", base(json!({"replicas": 1})), "n! n n", ""),
            ("unless it is the broken one", base(json!({"replicas": 1})), "n n n!", "-2"),
            ("all at once", base(json!({"replicas": 0, "podManagementPolicy": "Parallel"})), "n n", "-1 -0"),
            ("updates come from the end", base(json!({})), "o o o", "-2"),
            ("one after the other", base(json!({})), "o o n", "-1"),
            ("waiting for the last", base(json!({})), "o o n!", ""),
            ("above the partition only", rolling(json!({"partition": 2})), "o o n", ""),
            ("above the partition only", rolling(json!({"partition": 1})), "o o n", "-1"),
            ("by the user only", base(json!({"updateStrategy": {"type": "OnDelete"}})), "o o o", ""),
            ("several at once", rolling(json!({"maxUnavailable": 2})), "o o o", "-2 -1"),
            ("ordinals may start anywhere", base(json!({"ordinals": {"start": 2}})), "n n n n n", "-1"),
        ] {
            assert_eq!(planned(spec, line), expected, "{what}: {line}");
        }
    }

    fn set_fields(base: &mut Value, more: Value) {
        for (name, value) in more.as_object().unwrap() {
            base[name] = value.clone();
        }
    }
}
