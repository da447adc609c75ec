//! StatefulSet: pods with a name, a place in line and storage of their own, made, updated and removed in order
//! (or in parallel). Upstream's `pkg/controller/statefulset`.
//!
//! What to do next is decided by [`plan`], which knows nothing of the API; [`identity`] says what makes a pod the
//! n-th of its set; [`claims`] keeps its volume claims.

mod claims;
mod identity;
mod plan;

use crate::Context;
use crate::family::{Family, PodOwner, retry_with_more_room};
use crate::history::{self, History, Revisioned, Revisions};
use crate::pods::{self, PodControl, Voice};
use futures::future::{BoxFuture, join_all};
use k8s_openapi::api::apps::v1::{ControllerRevision, StatefulSet, StatefulSetStatus};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, PodTemplateSpec};
use knarr_client::patch::{self, Guard};
use knarr_client::selector::Selector;
use knarr_client::{
    Controller, Error, EventType, Informer, ObjectKey, Reconcile, Recorder, Requeue, Result, ignore_gone,
    owner,
};
use kube::api::Api;
use plan::{Plan, View};
use serde_json::json;
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Pods created or deleted in one turn at most.
const BURST: usize = 500;
/// How soon to look again when a claim or a pod of an earlier life is still on its way out.
const STALE_WAIT: Duration = Duration::from_secs(1);

pub fn start(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let sets = context.informers.get::<StatefulSet>();
    let claims = context.informers.get::<PersistentVolumeClaim>();
    let recorder = context.recorder.for_component("statefulset-controller");
    let control = PodControl::new(context.client.clone(), recorder.clone()).speaking(Voice::StatefulSet);
    let this = Arc::new(StatefulSets {
        family: Family::new(context.clone(), sets.clone(), control),
        revisions: Revisions::new(&context),
        claims: claims.clone(),
        recorder,
        context,
    });
    let observer = this.clone();
    let controller = retry_with_more_room(&this.context, Controller::new("statefulset"))
        .watch(&sets)
        .watch_changes(&this.family.pods, move |change| observer.family.pod_changed(change))
        .watch_map(&this.revisions.informer, |revision| {
            owner::controller_key::<StatefulSet>(&revision.metadata).into_iter().collect()
        })
        .needs(&claims);
    Box::pin(controller.run(this, shutdown))
}

impl PodOwner for StatefulSet {
    fn selector(&self) -> Result<Selector> {
        match &self.spec {
            Some(spec) => Selector::new(&spec.selector),
            None => Err(Error::terminal("read stateful set", "spec is missing")),
        }
    }

    fn adopts(&self, pod: &Pod) -> bool {
        identity::ordinal_in(self, pod).is_some()
    }
}

impl Revisioned for StatefulSet {
    const HASH_LABEL: &'static str = "controller.kubernetes.io/hash";

    fn template(&self) -> Option<&PodTemplateSpec> {
        self.spec.as_ref().map(|spec| &spec.template)
    }

    fn history_limit(&self) -> Option<i32> {
        self.spec.as_ref()?.revision_history_limit
    }

    fn collision_count(&self) -> Option<i32> {
        self.status.as_ref()?.collision_count
    }
}

struct StatefulSets {
    context: Context,
    recorder: Recorder,
    family: Family<StatefulSet>,
    revisions: Revisions,
    claims: Informer<PersistentVolumeClaim>,
}

impl Reconcile for StatefulSets {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let Some(set) = self.family.owners.get_key(&key) else {
            self.family.expectations.forget(&key);
            return Ok(Requeue::Done);
        };
        if set.metadata.deletion_timestamp.is_some() {
            // The garbage collector deletes what it owns; a revision made now would be deleted and made for ever.
            return Ok(Requeue::Done);
        }
        if let Some(wait) = self.family.expectations.pending(&key) {
            return Ok(Requeue::After(wait));
        }
        let claimed = self.family.claim(&set).await?;
        let history = self.revisions.history(&*set).await?;
        let current = current_revision(&set, &history);
        let pods: BTreeMap<i32, Arc<Pod>> =
            claimed.iter().filter_map(|pod| Some((identity::ordinal_in(&set, pod)?, pod.clone()))).collect();
        let view = View::new(&set, &pods, history.current_name(), self.context.clock.now());
        let result = self.carry_out(&set, &history, &current, &pods, view.plan()).await;
        // Also when something failed: a set that a quota holds back says how far it is.
        self.write_status(&set, &history, &current, &view).await?;
        let requeue = result?;
        let mut live: HashSet<&str> = claimed.iter().filter_map(|pod| history::revision_of(pod)).collect();
        live.insert(history::name_of(&current));
        self.revisions.clean_up(&*set, &history, &live).await?;
        let next = pods::next_available(&claimed, view.min_ready_seconds(), view.now);
        Ok(requeue.sooner(next.map_or(Requeue::Done, Requeue::After)))
    }
}

/// The revision the set had before the update under way; that of the present template when there is none.
fn current_revision(set: &StatefulSet, history: &History) -> Arc<ControllerRevision> {
    let name = set.status.as_ref().and_then(|status| status.current_revision.as_deref());
    let old = history.old.iter().find(|revision| Some(history::name_of(revision)) == name);
    old.unwrap_or(&history.current).clone()
}

impl StatefulSets {
    async fn carry_out(
        &self,
        set: &StatefulSet,
        history: &History,
        current: &ControllerRevision,
        pods: &BTreeMap<i32, Arc<Pod>>,
        plan: Plan,
    ) -> Result<Requeue> {
        self.keep_identities(set, pods).await?;
        self.keep_claims_owned(set, pods).await?;
        let mut create = Vec::new();
        for ordinal in plan.create.iter().take(BURST) {
            if !self.claims_are_ready(set, *ordinal).await? {
                return Ok(Requeue::After(STALE_WAIT));
            }
            let revision = if plan::keeps_current(set, *ordinal) { current } else { &history.current };
            create.push(identity::pod(set, revision, *ordinal));
        }
        for pod in &plan.replace {
            self.tell_of_replacement(set, pod);
        }
        if let Err(error) = self.family.create(set, create).await {
            // The cache may be behind, or the name is a stranger's: looked at again after a back-off.
            return if error.is_already_exists() {
                Err(Error::not_yet("create pod", "its name is taken; waiting until that pod is gone"))
            } else {
                Err(error)
            };
        }
        let doomed = plan.replace.into_iter().chain(plan.delete).take(BURST);
        self.family.delete(set, doomed).await?;
        Ok(Requeue::Done)
    }

    fn tell_of_replacement(&self, set: &StatefulSet, pod: &Pod) {
        let (key, name) = (ObjectKey::of(set), pod.metadata.name.as_deref().unwrap_or_default());
        let (kind, reason, how) = match pods::phase(pod) {
            "Failed" => (EventType::Warning, "RecreatingFailedPod", "failed"),
            _ => (EventType::Normal, "RecreatingTerminatedPod", "terminated"),
        };
        let message = format!("StatefulSet {key} is recreating {how} Pod {name}");
        self.recorder.event(set, kind, reason, message);
    }

    /// Adopted pods get the labels that name them.
    async fn keep_identities(&self, set: &StatefulSet, pods: &BTreeMap<i32, Arc<Pod>>) -> Result<()> {
        let nameless = pods.iter().filter(|(ordinal, pod)| !identity::is_labelled(pod, **ordinal));
        let labelled = nameless.map(|(ordinal, pod)| async move {
            let name = pod.metadata.name.as_deref().unwrap_or_default();
            let api: Api<Pod> = Api::namespaced(
                self.context.client.clone(),
                set.metadata.namespace.as_deref().unwrap_or_default(),
            );
            let labels = identity::labels(name, *ordinal);
            let change = json!({"metadata": {"uid": pod.metadata.uid, "labels": labels}});
            ignore_gone(patch::merge(&api, name, change).await)
        });
        join_all(labelled).await.into_iter().collect()
    }

    async fn write_status(
        &self,
        set: &StatefulSet,
        history: &History,
        current: &ControllerRevision,
        view: &View<'_>,
    ) -> Result<()> {
        let (current, update) = (history::name_of(current), history.current_name());
        let count = |is: &dyn Fn(&Pod) -> bool| view.pods.values().filter(|pod| is(pod)).count() as i32;
        let exists = |pod: &Pod| !pods::phase(pod).is_empty();
        let of = |pod: &Pod, revision: &str| {
            exists(pod) && !pods::is_terminating(pod) && history::revision_of(pod) == Some(revision)
        };
        let mut status = StatefulSetStatus {
            observed_generation: set.metadata.generation,
            replicas: count(&exists),
            ready_replicas: Some(count(&|pod| view.is_ready(pod))),
            available_replicas: Some(count(&|pod| view.is_available(pod))),
            current_replicas: Some(count(&|pod| of(pod, current))),
            updated_replicas: Some(count(&|pod| of(pod, update))),
            current_revision: Some(current.to_owned()),
            update_revision: Some(update.to_owned()),
            collision_count: Some(history.collision_count.unwrap_or(0)),
            conditions: set.status.as_ref().and_then(|status| status.conditions.clone()),
        };
        let all = Some(status.replicas);
        if view.is_rolling()
            && status.updated_replicas == all
            && status.ready_replicas == all
            && status.replicas == view.replicas()
        {
            status.current_replicas = status.updated_replicas;
            status.current_revision = status.update_revision.clone();
        }
        let api: Api<StatefulSet> = Api::namespaced(
            self.context.client.clone(),
            set.metadata.namespace.as_deref().unwrap_or_default(),
        );
        ignore_gone(patch::write_status(&api, set, &set.status, &status, Guard::Uid).await)
    }
}

#[cfg(test)]
mod tests;
