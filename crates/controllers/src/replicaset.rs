//! ReplicaSet and its elder twin ReplicationController: as many active pods as `spec.replicas` says, of those the
//! selector matches and nobody else controls.

use crate::Context;
use crate::context::REST_MAX;
use crate::family::{Family, PodOwner, retry_with_more_room};
use crate::pods::{self, PodControl};
use crate::util::{find, remove};
use futures::future::BoxFuture;
use k8s_openapi::api::apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetStatus};
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec, ReplicationController};
use knarr_client::owner;
use knarr_client::patch::{self, Guard};
use knarr_client::selector::Selector;
use knarr_client::{Controller, Error, ObjectKey, Reconcile, Requeue, Result};
use kube::api::Api;
use serde::de::DeserializeOwned;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// Pods created or deleted in one turn at most.
const BURST: usize = 500;

pub fn start(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    start_kind::<ReplicaSet>(context, shutdown, "replicaset")
}

pub fn start_replication_controllers(
    context: Context,
    shutdown: CancellationToken,
) -> BoxFuture<'static, ()> {
    start_kind::<ReplicationController>(context, shutdown, "replication")
}

fn start_kind<K: Replicated>(
    context: Context,
    shutdown: CancellationToken,
    name: &'static str,
) -> BoxFuture<'static, ()> {
    let sets = context.informers.get::<K>();
    pods::index_by_controller(&sets);
    // Upstream's components are called `replicaset-controller` and `replication-controller`.
    let recorder = context.recorder.for_component(&format!("{name}-controller"));
    let control = PodControl::new(context.client.clone(), recorder);
    let this = Arc::new(ReplicaSets { family: Family::new(context.clone(), sets.clone(), control) });
    let observer = this.clone();
    let controller = retry_with_more_room(&context, Controller::new(name))
        .paced(2, REST_MAX)
        .watch(&sets)
        .watch_changes(&this.family.pods, move |change| observer.family.pod_changed(change));
    Box::pin(controller.run(this, shutdown))
}

/// What the loop asks of both kinds.
trait Replicated: PodOwner + DeserializeOwned {
    fn replicas(&self) -> Option<i32>;
    fn min_ready_seconds(&self) -> i32;
    fn template(&self) -> Option<&PodTemplateSpec>;
    fn status(&self) -> Option<ReplicaSetStatus>;
    /// Whether its status counts terminating pods.
    const COUNTS_TERMINATING: bool;
}

/// Where the two kinds differ in type only.
macro_rules! same_fields {
    () => {
        fn replicas(&self) -> Option<i32> {
            self.spec.as_ref()?.replicas
        }

        fn min_ready_seconds(&self) -> i32 {
            self.spec.as_ref().and_then(|spec| spec.min_ready_seconds).unwrap_or(0)
        }

        fn template(&self) -> Option<&PodTemplateSpec> {
            self.spec.as_ref()?.template.as_ref()
        }
    };
}

impl PodOwner for ReplicaSet {
    fn selector(&self) -> Result<Selector> {
        match &self.spec {
            Some(spec) => Selector::new(&spec.selector),
            None => Err(Error::terminal("read replica set", "spec is missing")),
        }
    }

    fn adopts(&self, pod: &Pod) -> bool {
        pods::is_active(pod)
    }
}

impl Replicated for ReplicaSet {
    const COUNTS_TERMINATING: bool = true;

    same_fields!();

    fn status(&self) -> Option<ReplicaSetStatus> {
        self.status.clone()
    }
}

impl PodOwner for ReplicationController {
    fn selector(&self) -> Result<Selector> {
        match self.spec.as_ref().and_then(|spec| spec.selector.as_ref()) {
            Some(selector) => Ok(Selector::equal(selector)),
            None => Err(Error::terminal("read replication controller", "spec.selector is missing")),
        }
    }

    fn adopts(&self, pod: &Pod) -> bool {
        pods::is_active(pod)
    }
}

impl Replicated for ReplicationController {
    const COUNTS_TERMINATING: bool = false;

    same_fields!();

    fn status(&self) -> Option<ReplicaSetStatus> {
        let status = self.status.clone()?;
        let condition = |c: k8s_openapi::api::core::v1::ReplicationControllerCondition| ReplicaSetCondition {
            type_: c.type_,
            status: c.status,
            reason: c.reason,
            message: c.message,
            last_transition_time: c.last_transition_time,
        };
        Some(ReplicaSetStatus {
            available_replicas: status.available_replicas,
            fully_labeled_replicas: status.fully_labeled_replicas,
            observed_generation: status.observed_generation,
            ready_replicas: status.ready_replicas,
            replicas: status.replicas,
            conditions: status.conditions.map(|all| all.into_iter().map(condition).collect()),
            terminating_replicas: None,
        })
    }
}

struct ReplicaSets<K> {
    family: Family<K>,
}

impl<K: Replicated> Reconcile for ReplicaSets<K> {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let Some(set) = self.family.owners.get_key(&key) else {
            self.family.expectations.forget(&key);
            return Ok(Requeue::Done);
        };
        if let Some(wait) = self.family.expectations.pending(&key) {
            return Ok(Requeue::After(wait));
        }
        let claimed = self.family.claim(&set).await?;
        let active: Vec<_> = claimed.iter().filter(|pod| pods::is_active(pod)).cloned().collect();
        let failure = match set.meta().deletion_timestamp {
            None => self.manage(&set, &active).await.err(),
            Some(_) => None,
        };
        // The status is about what was there before this turn; what was done wakes the loop again.
        self.write_status(&set, &claimed, &active, failure.as_ref()).await?;
        if let Some((_, error)) = failure {
            return Err(error);
        }
        let now = self.family.context.clock.now();
        Ok(pods::next_available(&active, set.min_ready_seconds(), now).map_or(Requeue::Done, Requeue::After))
    }
}

/// What failed, for the condition's reason, and how.
type Failure = (&'static str, Error);

impl<K: Replicated> ReplicaSets<K> {
    async fn manage(&self, set: &K, active: &[Arc<Pod>]) -> Result<(), Failure> {
        let wanted = usize::try_from(set.replicas().unwrap_or(1)).unwrap_or(0);
        if active.len() < wanted {
            let Some(template) = set.template() else { return Ok(()) };
            let pod = pods::from_template(template, set.meta(), owner::controller_ref(set));
            let missing = vec![pod; (wanted - active.len()).min(BURST)];
            return self.family.create(set, missing).await.map(|_| ()).map_err(|e| ("FailedCreate", e));
        }
        let surplus = self.surplus(set, active, (active.len() - wanted).min(BURST));
        self.family.delete(set, surplus).await.map_err(|error| ("FailedDelete", error))
    }

    /// The pods best given up.
    fn surplus(&self, set: &K, active: &[Arc<Pod>], count: usize) -> Vec<Arc<Pod>> {
        if count == 0 {
            return Vec::new();
        }
        let mut candidates = active.to_vec();
        let kin = self.kin(set);
        let rank = |pod: &Pod| kin.iter().filter(|other| pods::node_of(other) == pods::node_of(pod)).count();
        pods::rank_for_deletion(&mut candidates, self.family.context.clock.now(), rank);
        candidates.truncate(count);
        candidates
    }

    /// The active pods of all sets with the same controller: what counts as crowded on a node.
    fn kin(&self, set: &K) -> Vec<Arc<Pod>> {
        let siblings = match owner::controller_of(set.meta()) {
            Some(controller) => self.family.owners.by_index(pods::BY_CONTROLLER, &controller.uid),
            None => self.family.owners.get_key(&ObjectKey::of(set)).into_iter().collect(),
        };
        let of = |set: &Arc<K>| self.family.pods.by_index(pods::BY_CONTROLLER, pods::uid(set.meta()));
        siblings.iter().flat_map(of).filter(|pod| pods::is_active(pod)).collect()
    }

    async fn write_status(
        &self,
        set: &K,
        claimed: &[Arc<Pod>],
        active: &[Arc<Pod>],
        failure: Option<&Failure>,
    ) -> Result<()> {
        let (old, new) = (set.status(), self.status(set, claimed, active, failure));
        let namespace = set.meta().namespace.as_deref().unwrap_or_default();
        let api: Api<K> = Api::namespaced(self.family.context.client.clone(), namespace);
        knarr_client::ignore_gone(patch::write_status(&api, set, &old, &new, Guard::Uid).await)
    }

    fn status(
        &self,
        set: &K,
        claimed: &[Arc<Pod>],
        active: &[Arc<Pod>],
        failure: Option<&Failure>,
    ) -> ReplicaSetStatus {
        let now = self.family.context.clock.now();
        let labels = set.template().and_then(|template| template.metadata.as_ref()?.labels.clone());
        let fully_labeled = Selector::equal(&labels.unwrap_or_default());
        let count = |test: &dyn Fn(&Pod) -> bool| active.iter().filter(|pod| test(pod)).count() as i32;
        let terminating =
            claimed.iter().filter(|pod| pods::is_terminating(pod) && !pods::is_finished(pod)).count();
        ReplicaSetStatus {
            replicas: active.len() as i32,
            fully_labeled_replicas: Some(count(&|pod| fully_labeled.matches(pod.metadata.labels.as_ref()))),
            ready_replicas: Some(count(&pods::is_ready)),
            available_replicas: Some(count(&|pod| pods::is_available(pod, set.min_ready_seconds(), now))),
            terminating_replicas: K::COUNTS_TERMINATING.then_some(terminating as i32),
            observed_generation: set.meta().generation,
            conditions: self.conditions(set.status().and_then(|old| old.conditions), failure),
        }
    }

    fn conditions(
        &self,
        mut conditions: Option<Vec<ReplicaSetCondition>>,
        failure: Option<&Failure>,
    ) -> Option<Vec<ReplicaSetCondition>> {
        match failure {
            None => remove(&mut conditions, "ReplicaFailure"),
            // A conflict or a lost connection will pass: not worth telling.
            Some((_, error)) if error.is_conflict() => {}
            Some((reason, error)) if find(&conditions, "ReplicaFailure").is_none() => {
                conditions.get_or_insert_default().push(ReplicaSetCondition {
                    type_: "ReplicaFailure".to_owned(),
                    status: "True".to_owned(),
                    reason: Some((*reason).to_owned()),
                    message: Some(pods::message_of(error)),
                    last_transition_time: Some(self.family.context.clock.time()),
                });
            }
            Some(_) => {}
        }
        conditions
    }
}

/// How many pods the set wants.
pub fn replicas(set: &ReplicaSet) -> i32 {
    set.replicas().unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::Harness;
    use knarr_client::testing::Faults;
    use serde_json::json;

    fn set(replicas: i32) -> serde_json::Value {
        json!({
            "metadata": {"name": "web"},
            "spec": {
                "replicas": replicas,
                "selector": {"matchLabels": {"app": "web"}},
                "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "c"}]}},
            },
        })
    }

    #[tokio::test(start_paused = true)]
    async fn pods_follow_the_wish_under_faults_and_never_exceed_it() {
        for seed in 0..20 {
            let faults = Faults { conflict: 0.2, error: 0.1, drop_watch: 0.3, duplicate: 0.3 };
            let harness = Harness::new(seed, faults);
            harness.start(start);
            harness.create::<ReplicaSet>(set(7)).await;
            let exact = |wanted: usize| {
                move |pods: &[Pod]| {
                    assert!(pods.len() <= 7, "never more than the wish");
                    pods.len() == wanted
                }
            };
            harness.api.wait_for::<Pod>("7 pods", exact(7)).await;
            harness.patch::<ReplicaSet>("web", json!({"spec": {"replicas": 3}})).await;
            harness.api.wait_for::<Pod>("3 pods", exact(3)).await;
            harness.api.set_faults(Faults::default());
            harness.assert_quiet().await;
            let set = &harness.api.objects::<ReplicaSet>()[0];
            assert_eq!(set.status.as_ref().unwrap().replicas, 3);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_matching_orphan_is_adopted_and_a_relabelled_pod_released() {
        let harness = Harness::quiet();
        let orphan = json!({
            "metadata": {"name": "orphan", "labels": {"app": "web"}}, "spec": {"containers": []},
        });
        harness.create::<Pod>(orphan).await;
        harness.start(start);
        harness.create::<ReplicaSet>(set(2)).await;
        let owned =
            |pods: &[Pod]| pods.iter().filter(|pod| owner::controller_of(&pod.metadata).is_some()).count();
        let pods = harness.api.wait_for::<Pod>("2 owned pods", |pods| owned(pods) == 2).await;
        assert_eq!(pods.len(), 2, "the orphan counts");
        harness.patch::<Pod>("orphan", json!({"metadata": {"labels": {"app": "other"}}})).await;
        let pods =
            harness.api.wait_for::<Pod>("a replacement", |pods| pods.len() == 3 && owned(pods) == 2).await;
        assert!(pods.iter().any(|pod| pod.metadata.name.as_deref() == Some("orphan")));
        harness.assert_quiet().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_replication_controller_keeps_its_pods_and_counts_them() {
        let harness = Harness::quiet();
        harness.start(start_replication_controllers);
        let controller = json!({"metadata": {"name": "old"}, "spec": {
            "replicas": 3,
            "selector": {"app": "old"},
            "template": {"metadata": {"labels": {"app": "old"}}, "spec": {"containers": [{"name": "c"}]}},
        }});
        harness.create::<ReplicationController>(controller).await;
        let pods = harness.api.wait_for::<Pod>("3 pods", |pods| pods.len() == 3).await;
        harness.delete::<Pod>(pods[0].metadata.name.as_deref().unwrap()).await;
        harness.api.wait_for::<Pod>("a replacement", |pods| pods.len() == 3).await;
        harness.assert_quiet().await;
        let status = harness.api.objects::<ReplicationController>()[0].status.clone().unwrap();
        assert_eq!((status.replicas, status.fully_labeled_replicas), (3, Some(3)));
    }
}
