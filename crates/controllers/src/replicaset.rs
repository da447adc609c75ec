//! ReplicaSet: as many active pods as `spec.replicas` says, of those its selector matches and nobody else controls.

use crate::Context;
use crate::pods::{self, PodControl};
use crate::util::{find, remove};
use futures::future::{BoxFuture, join_all};
use k8s_openapi::api::apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetStatus};
use k8s_openapi::api::core::v1::Pod;
use knarr_client::expectations::Expectations;
use knarr_client::owner::{self, Claim};
use knarr_client::patch::{self, Guard};
use knarr_client::selector::Selector;
use knarr_client::{Change, Controller, During, Error, Informer, ObjectKey, Reconcile, Requeue, Result};
use kube::api::Api;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// Pods created or deleted in one turn at most.
const BURST: usize = 500;
/// The first batch of creates; doubled while all succeed, so that a quota or a bad template costs few refusals.
const FIRST_BATCH: usize = 1;

pub fn start(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let sets = context.informers.get::<ReplicaSet>();
    let all_pods = context.informers.get::<Pod>();
    pods::index_by_controller(&all_pods);
    pods::index_by_controller(&sets);
    let recorder = context.recorder.for_component("replicaset-controller");
    let this = Arc::new(ReplicaSets {
        control: PodControl::new(context.client.clone(), recorder),
        sets: sets.clone(),
        pods: all_pods.clone(),
        expectations: Expectations::new(),
        context,
    });
    let observer = this.clone();
    let controller = Controller::new("replicaset")
        .watch(&sets)
        .watch_changes(&all_pods, move |change| observer.pod_changed(change));
    Box::pin(controller.run(this, shutdown))
}

struct ReplicaSets {
    context: Context,
    control: PodControl,
    sets: Informer<ReplicaSet>,
    pods: Informer<Pod>,
    expectations: Expectations,
}

impl Reconcile for ReplicaSets {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let Some(set) = self.sets.get_key(&key) else {
            self.expectations.forget(&key);
            return Ok(Requeue::Done);
        };
        if let Some(wait) = self.expectations.pending(&key) {
            return Ok(Requeue::After(wait));
        }
        let claimed = self.claim(&set).await?;
        let active: Vec<_> = claimed.iter().filter(|pod| pods::is_active(pod)).cloned().collect();
        let failure = match set.metadata.deletion_timestamp {
            None => self.manage(&key, &set, &active).await.err(),
            Some(_) => None,
        };
        // The status is about what was there before this turn; what was done wakes the loop again.
        self.write_status(&set, &claimed, &active, failure.as_ref()).await?;
        if let Some((_, error)) = failure {
            return Err(error);
        }
        let now = self.context.clock.now();
        let min_ready_s = min_ready_seconds(&set);
        Ok(pods::next_available(&active, min_ready_s, now).map_or(Requeue::Done, Requeue::After))
    }
}

/// What failed, for the condition's reason, and how.
type Failure = (&'static str, Error);

impl ReplicaSets {
    /// Which sets a pod's change concerns; on the way, fulfils expectations.
    fn pod_changed(&self, change: &Change<Pod>) -> Vec<ObjectKey> {
        let pod = change.object();
        let mut keys = Vec::new();
        for pod in [Some(pod), change.old()].into_iter().flatten() {
            if let Some(key) = owner::controller_key::<ReplicaSet>(&pod.metadata) {
                keys.push(key);
            }
        }
        if let Some(key) = keys.first() {
            let uid = pods::uid(&pod.metadata);
            self.expectations.creation_seen(key, uid);
            if change.is_deleted() || pods::is_terminating(pod) {
                self.expectations.deletion_seen(key, uid);
            }
        }
        if keys.is_empty() && !change.is_deleted() {
            keys.extend(self.would_adopt(pod));
        }
        keys
    }

    /// Sets whose selector matches an orphan.
    fn would_adopt(&self, pod: &Pod) -> Vec<ObjectKey> {
        let sets = self.sets.list_in(pod.metadata.namespace.as_deref().unwrap_or_default());
        let matches = |set: &Arc<ReplicaSet>| {
            selector(set).is_ok_and(|selector| selector.matches(pod.metadata.labels.as_ref()))
        };
        sets.iter().filter(|set| matches(set)).map(|set| ObjectKey::of(&**set)).collect()
    }

    /// The set's pods, after adopting orphans that match and releasing pods that no longer do.
    async fn claim(&self, set: &ReplicaSet) -> Result<Vec<Arc<Pod>>> {
        let selector = selector(set)?;
        let namespace = set.metadata.namespace.as_deref().unwrap_or_default();
        let mut candidates = self.pods.by_index(pods::BY_CONTROLLER, pods::uid(&set.metadata));
        let orphans = self.pods.by_index(pods::BY_CONTROLLER, &pods::orphans_of(namespace));
        candidates.extend(orphans.into_iter().filter(|pod| pods::is_active(pod)));
        let mut claimed = Vec::new();
        let mut may_adopt = None;
        for pod in candidates {
            match owner::claim(&set.metadata, &pod.metadata, selector.matches(pod.metadata.labels.as_ref())) {
                Claim::Keep => claimed.push(pod),
                Claim::Release => {
                    owner::release(&self.context.client, pods::uid(&set.metadata), &*pod).await?;
                }
                Claim::Adopt => {
                    if may_adopt.is_none() {
                        may_adopt = Some(self.still_exists(set).await?);
                    }
                    if may_adopt == Some(true) {
                        claimed.push(Arc::new(owner::adopt(&self.context.client, set, &*pod).await?));
                    }
                }
                Claim::Ignore => {}
            }
        }
        Ok(claimed)
    }

    /// Asks the server, not the cache: an owner that was deleted meanwhile must not adopt.
    async fn still_exists(&self, set: &ReplicaSet) -> Result<bool> {
        let key = ObjectKey::of(set);
        let api: Api<ReplicaSet> = Api::namespaced(self.context.client.clone(), &key.namespace);
        let fresh = api.get_opt(&key.name).await.during(|| format!("read replica set {key}"))?;
        Ok(fresh.is_some_and(|fresh| {
            fresh.metadata.uid == set.metadata.uid && fresh.metadata.deletion_timestamp.is_none()
        }))
    }

    async fn manage(&self, key: &ObjectKey, set: &ReplicaSet, active: &[Arc<Pod>]) -> Result<(), Failure> {
        let wanted = usize::try_from(replicas(set)).unwrap_or(0);
        if active.len() < wanted {
            let missing = (wanted - active.len()).min(BURST);
            self.create(key, set, missing).await.map_err(|error| ("FailedCreate", error))
        } else {
            let surplus = (active.len() - wanted).min(BURST);
            self.delete(key, set, active, surplus).await.map_err(|error| ("FailedDelete", error))
        }
    }

    /// Creates `missing` pods in growing batches; the first batch with a failure is the last.
    async fn create(&self, key: &ObjectKey, set: &ReplicaSet, missing: usize) -> Result<()> {
        let Some(template) = set.spec.as_ref().and_then(|spec| spec.template.as_ref()) else {
            return Ok(());
        };
        let pod = pods::from_template(template, &set.metadata, owner::controller_ref(set));
        let (mut left, mut batch) = (missing, FIRST_BATCH);
        while left > 0 {
            let now = batch.min(left);
            let results = join_all((0..now).map(|_| self.create_one(key, set, &pod))).await;
            for result in results {
                match result {
                    Err(error) if error.is_namespace_terminating() => return Ok(()),
                    result => result?,
                }
            }
            left -= now;
            batch *= 2;
        }
        Ok(())
    }

    async fn create_one(&self, key: &ObjectKey, set: &ReplicaSet, pod: &Pod) -> Result<()> {
        let created = self.control.create(set, pod).await?;
        let is_cached = || self.pods.get_key(&ObjectKey::of(&created)).is_some();
        self.expectations.created(key, pods::uid(&created.metadata), is_cached);
        Ok(())
    }

    async fn delete(
        &self,
        key: &ObjectKey,
        set: &ReplicaSet,
        active: &[Arc<Pod>],
        surplus: usize,
    ) -> Result<()> {
        if surplus == 0 {
            return Ok(());
        }
        let mut candidates = active.to_vec();
        let family = self.family(set);
        let rank =
            |pod: &Pod| family.iter().filter(|other| pods::node_of(other) == pods::node_of(pod)).count();
        pods::rank_for_deletion(&mut candidates, self.context.clock.now(), rank);
        let deletions = candidates.into_iter().take(surplus).map(|pod| async move {
            let uid = pods::uid(&pod.metadata);
            self.expectations.deleting(key, uid);
            let deleted = self.control.delete(set, &pod).await;
            let gone = self.pods.get_key(&ObjectKey::of(&*pod)).is_none_or(|pod| pods::is_terminating(&pod));
            if deleted.is_err() || gone {
                self.expectations.deletion_seen(key, uid);
            }
            deleted
        });
        join_all(deletions).await.into_iter().collect()
    }

    /// The active pods of all sets with the same controller: what counts as crowded on a node.
    fn family(&self, set: &ReplicaSet) -> Vec<Arc<Pod>> {
        let siblings = match owner::controller_of(&set.metadata) {
            Some(controller) => self.sets.by_index(pods::BY_CONTROLLER, &controller.uid),
            None => self.sets.get_key(&ObjectKey::of(set)).into_iter().collect(),
        };
        let of = |set: &Arc<ReplicaSet>| self.pods.by_index(pods::BY_CONTROLLER, pods::uid(&set.metadata));
        siblings.iter().flat_map(of).filter(|pod| pods::is_active(pod)).collect()
    }

    async fn write_status(
        &self,
        set: &ReplicaSet,
        claimed: &[Arc<Pod>],
        active: &[Arc<Pod>],
        failure: Option<&Failure>,
    ) -> Result<()> {
        let new = self.status(set, claimed, active, failure);
        let namespace = set.metadata.namespace.as_deref().unwrap_or_default();
        let api: Api<ReplicaSet> = Api::namespaced(self.context.client.clone(), namespace);
        knarr_client::ignore_gone(patch::write_status(&api, set, &set.status, &new, Guard::Uid).await)
    }

    fn status(
        &self,
        set: &ReplicaSet,
        claimed: &[Arc<Pod>],
        active: &[Arc<Pod>],
        failure: Option<&Failure>,
    ) -> ReplicaSetStatus {
        let now = self.context.clock.now();
        let template = set.spec.as_ref().and_then(|spec| spec.template.as_ref());
        let labels =
            template.and_then(|template| template.metadata.as_ref()?.labels.clone()).unwrap_or_default();
        let fully_labeled = Selector::equal(&labels);
        let count = |test: &dyn Fn(&Pod) -> bool| active.iter().filter(|pod| test(pod)).count() as i32;
        let terminating =
            claimed.iter().filter(|pod| pods::is_terminating(pod) && !pods::is_finished(pod)).count();
        let old = set.status.clone().unwrap_or_default();
        ReplicaSetStatus {
            replicas: active.len() as i32,
            fully_labeled_replicas: Some(count(&|pod| fully_labeled.matches(pod.metadata.labels.as_ref()))),
            ready_replicas: Some(count(&pods::is_ready)),
            available_replicas: Some(count(&|pod| pods::is_available(pod, min_ready_seconds(set), now))),
            terminating_replicas: Some(terminating as i32),
            observed_generation: set.metadata.generation,
            conditions: self.conditions(old.conditions, failure),
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
                    last_transition_time: Some(self.context.clock.time()),
                });
            }
            Some(_) => {}
        }
        conditions
    }
}

pub fn replicas(set: &ReplicaSet) -> i32 {
    set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1)
}

fn min_ready_seconds(set: &ReplicaSet) -> i32 {
    set.spec.as_ref().and_then(|spec| spec.min_ready_seconds).unwrap_or(0)
}

fn selector(set: &ReplicaSet) -> Result<Selector> {
    match &set.spec {
        Some(spec) => Selector::new(&spec.selector),
        None => Err(Error::terminal("read replica set", "spec is missing")),
    }
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
}
