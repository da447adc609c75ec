//! PodDisruptionBudget: counts how many pods under a budget are healthy and how many may be evicted. Upstream's
//! `pkg/controller/disruption`. The evictions themselves, which count down what this loop counts up, are the API
//! server's.

use crate::context::REST_MAX;
use crate::{Context, pods, util};
use futures::future::BoxFuture;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::core::v1::{Pod, ReplicationController};
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec, PodDisruptionBudgetStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector, OwnerReference, Time};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use knarr_client::patch::{self, Guard};
use knarr_client::selector::Selector;
use knarr_client::{
    Controller, EventType, Informer, ObjectKey, Reconcile, Recorder, Requeue, Result, ignore_gone, owner,
};
use kube::api::Api;
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// An evicted pod that is not deleted by then counts as staying. Upstream's value.
const EVICTION_TAKES: SignedDuration = SignedDuration::from_mins(2);

pub fn start(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let informers = &context.informers;
    let budgets = informers.get::<PodDisruptionBudget>();
    let all_pods = informers.get::<Pod>();
    let this = Arc::new(Disruption {
        budgets: budgets.clone(),
        pods: all_pods.clone(),
        deployments: informers.get(),
        replica_sets: informers.get(),
        stateful_sets: informers.get(),
        replication_controllers: informers.get(),
        recorder: context.recorder.for_component("controllermanager"),
        context,
    });
    // A change of a wish concerns the budgets over its pods: few are, so all of the namespace are looked at.
    macro_rules! scaled {
        ($controller:expr, $($field:ident),*) => {
            $controller$(.watch_changes(&this.$field, {
                let this = this.clone();
                move |change| {
                    let (new, old) = (change.object(), change.old());
                    let same = old.is_some_and(|old| old.metadata.generation == new.metadata.generation);
                    if same { Vec::new() } else { this.budgets_in(new.metadata.namespace.as_deref()) }
                }
            }))*
        };
    }
    let observer = this.clone();
    let controller = Controller::new("disruption")
        .paced(4, REST_MAX)
        .watch(&budgets)
        .watch_changes(&all_pods, move |change| observer.budgets_of(change.object(), change.old()));
    let controller = scaled!(controller, deployments, replica_sets, stateful_sets, replication_controllers);
    Box::pin(controller.run(this, shutdown))
}

struct Disruption {
    context: Context,
    recorder: Recorder,
    budgets: Informer<PodDisruptionBudget>,
    pods: Informer<Pod>,
    deployments: Informer<Deployment>,
    replica_sets: Informer<ReplicaSet>,
    stateful_sets: Informer<StatefulSet>,
    replication_controllers: Informer<ReplicationController>,
}

impl Reconcile for Disruption {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let Some(budget) = self.budgets.get_key(&key) else { return Ok(Requeue::Done) };
        let Some(spec) = &budget.spec else { return Ok(Requeue::Done) };
        let now = self.context.clock.now();
        let selector = selector(spec)?;
        let mut pods = self.pods.list_in(&key.namespace);
        pods.retain(|pod| selector.matches(pod.metadata.labels.as_ref()) && !pods::is_finished(pod));
        if pods.is_empty() {
            self.recorder.event(&*budget, EventType::Normal, "NoPods", "No matching pods found");
        }
        let (disrupted, requeue) = self.still_disrupted(&budget, &pods, now);
        let status = match self.expectation(&budget, spec, &pods) {
            Ok((expected, desired)) => {
                let counts = |pod: &&Arc<Pod>| {
                    let name = pod.metadata.name.as_deref().unwrap_or_default();
                    pods::is_ready(pod) && !pods::is_terminating(pod) && !disrupted.contains_key(name)
                };
                let healthy = pods.iter().filter(counts).count() as i32;
                self.status(&budget, healthy, desired, expected, disrupted)
            }
            Err(why) => self.failed(&budget, why),
        };
        let api: Api<PodDisruptionBudget> = Api::namespaced(self.context.client.clone(), &key.namespace);
        // Guarded by the version: evictions count down in the same status.
        ignore_gone(patch::write_status(&api, &*budget, &budget.status, &status, Guard::Version).await)?;
        Ok(requeue)
    }
}

impl Disruption {
    fn budgets_in(&self, namespace: Option<&str>) -> Vec<ObjectKey> {
        self.budgets.list_in(namespace.unwrap_or_default()).iter().map(|b| ObjectKey::of(&**b)).collect()
    }

    /// Budgets over a pod, as it is and as it was.
    fn budgets_of(&self, pod: &Pod, old: Option<&Arc<Pod>>) -> Vec<ObjectKey> {
        let budgets = self.budgets.list_in(pod.metadata.namespace.as_deref().unwrap_or_default());
        let over = |budget: &&Arc<PodDisruptionBudget>| {
            let selector = budget.spec.as_ref().and_then(|spec| selector(spec).ok());
            selector.is_some_and(|selector| {
                selector.matches(pod.metadata.labels.as_ref())
                    || old.is_some_and(|old| selector.matches(old.metadata.labels.as_ref()))
            })
        };
        budgets.iter().filter(over).map(|budget| ObjectKey::of(&**budget)).collect()
    }

    /// Evicted pods that are still there and not yet terminating; those that never went are told of and forgotten.
    fn still_disrupted(
        &self,
        budget: &PodDisruptionBudget,
        pods: &[Arc<Pod>],
        now: Timestamp,
    ) -> (BTreeMap<String, Time>, Requeue) {
        let evicted = budget.status.as_ref().and_then(|status| status.disrupted_pods.clone());
        let (mut left, mut requeue) = (BTreeMap::new(), Requeue::Done);
        for (name, since) in evicted.unwrap_or_default() {
            let pod = pods.iter().find(|pod| pod.metadata.name.as_ref() == Some(&name));
            let Some(pod) = pod.filter(|pod| !pods::is_terminating(pod)) else { continue };
            let until = since.0.saturating_add(EVICTION_TAKES).unwrap_or(Timestamp::MAX);
            let wait = Duration::try_from(until.duration_since(now)).unwrap_or_default();
            if wait.is_zero() {
                let key = ObjectKey::of(budget);
                let message = format!("Pod was expected by PDB {key} to be deleted but it wasn't");
                self.recorder.event(&**pod, EventType::Warning, "NotDeleted", message);
            } else {
                requeue = requeue.sooner(Requeue::After(wait));
                left.insert(name, since);
            }
        }
        (left, requeue)
    }

    /// How many pods there should be, and how many of them healthy.
    fn expectation(
        &self,
        budget: &PodDisruptionBudget,
        spec: &PodDisruptionBudgetSpec,
        pods: &[Arc<Pod>],
    ) -> Result<(i32, i32), String> {
        if let Some(limit) = &spec.max_unavailable {
            let expected = self.wished(budget, spec, pods)?;
            return Ok((expected, (expected - util::scaled(limit, expected, true)).max(0)));
        }
        match spec.min_available.as_ref().unwrap_or(&IntOrString::Int(1)) {
            IntOrString::Int(count) => Ok((pods.len() as i32, *count)),
            percentage => {
                let expected = self.wished(budget, spec, pods)?;
                Ok((expected, util::scaled(percentage, expected, true)))
            }
        }
    }

    /// The sum of what the pods' controllers wish for: percentages are of the wish, not of what happens to run.
    fn wished(
        &self,
        budget: &PodDisruptionBudget,
        spec: &PodDisruptionBudgetSpec,
        pods: &[Arc<Pod>],
    ) -> Result<i32, String> {
        let (mut seen, mut sum, mut unmanaged) = (HashSet::new(), 0, false);
        for pod in pods {
            let Some(controller) = owner::controller_of(&pod.metadata) else {
                unmanaged = true;
                continue;
            };
            let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
            let (uid, replicas) = self
                .scale(namespace, controller)
                .ok_or_else(|| format!("{} does not implement the scale subresource", controller.kind))?;
            if seen.insert(uid) {
                sum += replicas;
            }
        }
        if unmanaged {
            let selector = serde_json::to_string(&spec.selector).unwrap_or_default();
            let message = format!(
                "Pods selected by this PodDisruptionBudget (selector: {selector}) were found to be unmanaged. As a \
                 result, the status of the PDB cannot be calculated correctly, which may result in undefined \
                 behavior. To account for these pods please set \".spec.minAvailable\" field of the PDB to an \
                 integer value."
            );
            self.recorder.event(budget, EventType::Warning, "UnmanagedPods", message);
        }
        Ok(sum)
    }

    /// Who wishes for the pods of a controller (a deployment stands behind its sets), and for how many.
    fn scale(&self, namespace: &str, controller: &OwnerReference) -> Option<(String, i32)> {
        let uid = || controller.uid.clone();
        let name = controller.name.as_str();
        match controller.kind.as_str() {
            "ReplicaSet" => {
                let set = self.replica_sets.get(namespace, name).filter(|s| s.metadata.uid == Some(uid()))?;
                let parent = owner::controller_of(&set.metadata).filter(|p| p.kind == "Deployment");
                let parent = parent.and_then(|parent| {
                    self.deployments
                        .get(namespace, &parent.name)
                        .filter(|d| d.metadata.uid.as_ref() == Some(&parent.uid))
                });
                match parent {
                    Some(parent) => {
                        let replicas = parent.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
                        Some((parent.metadata.uid.clone()?, replicas))
                    }
                    None => Some((uid(), crate::replicaset::replicas(&set))),
                }
            }
            "StatefulSet" => {
                let set = self.stateful_sets.get(namespace, name)?;
                Some((uid(), set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1)))
            }
            "ReplicationController" => {
                let controller = self.replication_controllers.get(namespace, name)?;
                Some((uid(), controller.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1)))
            }
            _ => None,
        }
    }

    fn status(
        &self,
        budget: &PodDisruptionBudget,
        healthy: i32,
        desired: i32,
        expected: i32,
        disrupted: BTreeMap<String, Time>,
    ) -> PodDisruptionBudgetStatus {
        let allowed = if expected <= 0 { 0 } else { (healthy - desired).max(0) };
        let (status, reason) =
            if allowed > 0 { ("True", "SufficientPods") } else { ("False", "InsufficientPods") };
        PodDisruptionBudgetStatus {
            current_healthy: Some(healthy),
            desired_healthy: Some(desired),
            expected_pods: Some(expected),
            disruptions_allowed: Some(allowed),
            disrupted_pods: (!disrupted.is_empty()).then_some(disrupted),
            observed_generation: budget.metadata.generation,
            conditions: self.condition(budget, status, reason, ""),
        }
    }

    /// What cannot be counted allows nothing.
    fn failed(&self, budget: &PodDisruptionBudget, why: String) -> PodDisruptionBudgetStatus {
        let message = format!("Failed to calculate the number of expected pods: {why}");
        self.recorder.event(budget, EventType::Warning, "CalculateExpectedPodCountFailed", message);
        PodDisruptionBudgetStatus {
            disruptions_allowed: Some(0),
            observed_generation: budget.metadata.generation,
            conditions: self.condition(budget, "False", "SyncFailed", &why),
            ..budget.status.clone().unwrap_or_default()
        }
    }

    fn condition(
        &self,
        budget: &PodDisruptionBudget,
        status: &str,
        reason: &str,
        message: &str,
    ) -> Option<Vec<Condition>> {
        let known = budget.status.as_ref().and_then(|status| status.conditions.as_ref());
        let before = known.and_then(|known| known.iter().find(|c| c.type_ == "DisruptionAllowed"));
        let since = before.filter(|c| c.status == status).map(|c| c.last_transition_time.clone());
        let mut conditions: Vec<_> =
            known.into_iter().flatten().filter(|c| c.type_ != "DisruptionAllowed").cloned().collect();
        conditions.push(Condition {
            type_: "DisruptionAllowed".to_owned(),
            status: status.to_owned(),
            reason: reason.to_owned(),
            message: message.to_owned(),
            observed_generation: budget.metadata.generation,
            last_transition_time: since.unwrap_or_else(|| self.context.clock.time()),
        });
        Some(conditions)
    }
}

/// In this API an empty selector is for all pods of the namespace, and none at all for none.
fn selector(spec: &PodDisruptionBudgetSpec) -> Result<Selector> {
    match &spec.selector {
        None => Ok(Selector::none()),
        Some(selector) if *selector == LabelSelector::default() => Ok(Selector::equal(&BTreeMap::new())),
        Some(selector) => Selector::new(selector),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::Harness;
    use serde_json::{Value, json};

    async fn pods(harness: &Harness, ready: usize, all: usize) {
        let set = json!({
            "metadata": {"name": "web"},
            "spec": {"replicas": all, "selector": {"matchLabels": {"app": "web"}}, "template": {}},
        });
        let set = harness.create::<ReplicaSet>(set).await;
        for n in 0..all {
            let name = format!("web-{n}");
            let pod = json!({
                "metadata": {"name": name, "labels": {"app": "web"}, "ownerReferences": [owner::controller_ref(&set)]},
                "spec": {"containers": []},
            });
            harness.create::<Pod>(pod).await;
            if n < ready {
                harness.make_ready(&name).await;
            }
        }
    }

    async fn counted(spec: Value, ready: usize, all: usize) -> (i32, i32, i32) {
        let harness = Harness::quiet();
        pods(&harness, ready, all).await;
        let mut budget = json!({"metadata": {"name": "web"}, "spec": spec});
        budget["spec"]["selector"] = json!({"matchLabels": {"app": "web"}});
        harness.create::<PodDisruptionBudget>(budget).await;
        harness.start(start);
        harness.api.settle(Duration::from_secs(10)).await;
        harness.assert_quiet().await;
        let status = harness.api.objects::<PodDisruptionBudget>()[0].status.clone().unwrap();
        let conditions = status.conditions.unwrap();
        let allowed = status.disruptions_allowed.unwrap();
        assert_eq!(conditions[0].status == "True", allowed > 0);
        (status.current_healthy.unwrap(), status.desired_healthy.unwrap(), allowed)
    }

    #[tokio::test(start_paused = true)]
    async fn what_may_be_evicted_is_counted_as_documented() {
        for (spec, ready, all, expected) in [
            (json!({"minAvailable": 2}), 4, 4, (4, 2, 2)),
            (json!({"minAvailable": 2}), 2, 4, (2, 2, 0)),
            (json!({"minAvailable": "50%"}), 5, 5, (5, 3, 2)),
            (json!({"maxUnavailable": 1}), 4, 4, (4, 3, 1)),
            (json!({"maxUnavailable": 1}), 3, 4, (3, 3, 0)),
            (json!({"maxUnavailable": "50%"}), 5, 5, (5, 2, 3)),
            (json!({"maxUnavailable": 0}), 4, 4, (4, 4, 0)),
        ] {
            assert_eq!(counted(spec.clone(), ready, all).await, expected, "{spec} {ready}/{all}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_evicted_pod_counts_as_gone_until_it_is_or_never_went() {
        let harness = Harness::quiet();
        pods(&harness, 3, 3).await;
        let budget = json!({
            "metadata": {"name": "web"},
            "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": "web"}}},
        });
        harness.create::<PodDisruptionBudget>(budget).await;
        harness.start(start);
        let allowed = |count: i32| {
            move |budgets: &[PodDisruptionBudget]| {
                budgets[0].status.as_ref().is_some_and(|status| status.disruptions_allowed == Some(count))
            }
        };
        harness.api.wait_for::<PodDisruptionBudget>("2 allowed", allowed(2)).await;
        let evicted =
            json!({"disruptedPods": {"web-0": harness.context.clock.time()}, "disruptionsAllowed": 0});
        harness.patch_status::<PodDisruptionBudget>("web", evicted).await;
        harness.api.wait_for::<PodDisruptionBudget>("1 allowed", allowed(1)).await;
        harness.api.wait_for::<PodDisruptionBudget>("it never went", allowed(2)).await;
    }
}
