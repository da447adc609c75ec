//! Deployment: replica sets for each template it had, scaled so that the newest takes over within `maxSurge` and
//! `maxUnavailable`; revisions, history and the progress told in conditions. Upstream's
//! `pkg/controller/deployment`, in the same order: find sets → pause and scale → strategy → status.

mod annotations;
mod rollout;
mod scale;
mod status;

use crate::Context;
use crate::context::REST_MAX;
use crate::pods::{self, message_of};
use crate::util::{same_template, template_hash};
use annotations::{REVISION, revision};
use futures::future::BoxFuture;
use k8s_openapi::api::apps::v1::{Deployment, DeploymentStatus, ReplicaSet, ReplicaSetSpec};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use knarr_client::expectations::Expectations;
use knarr_client::owner::{self, Claim};
use knarr_client::patch::{self, Guard};
use knarr_client::selector::Selector;
use knarr_client::{Change, Controller, During, Error, EventType, Informer, ObjectKey, Reconcile, Recorder};
use knarr_client::{Requeue, Result};
use kube::api::{Api, PostParams};
use serde_json::json;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// Tells the pods of one template from those of another.
const HASH_LABEL: &str = "pod-template-hash";

pub fn start(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let deployments = context.informers.get::<Deployment>();
    let sets = context.informers.get::<ReplicaSet>();
    let all_pods = context.informers.get::<Pod>();
    pods::index_by_controller(&sets);
    pods::index_by_controller(&all_pods);
    let this = Arc::new(Deployments {
        recorder: context.recorder.for_component("deployment-controller"),
        deployments: deployments.clone(),
        sets: sets.clone(),
        pods: all_pods.clone(),
        expectations: Expectations::new(),
        context,
    });
    let (for_sets, for_pods) = (this.clone(), this.clone());
    let controller = Controller::new("deployment")
        .paced(2, REST_MAX)
        .watch(&deployments)
        .watch_changes(&sets, move |change| for_sets.set_changed(change))
        .watch_changes(&all_pods, move |change| for_pods.pod_changed(change));
    Box::pin(controller.run(this, shutdown))
}

struct Deployments {
    context: Context,
    recorder: Recorder,
    deployments: Informer<Deployment>,
    sets: Informer<ReplicaSet>,
    pods: Informer<Pod>,
    /// Sets we made or sized that the cache does not show so yet: a turn on old sizes would wish for too many pods when
    /// the template or the size has changed again. Upstream took that risk for long.
    expectations: Expectations,
}

/// A deployment and its replica sets during one turn; writes are reflected here, so later steps see them.
struct Rollout {
    deployment: Deployment,
    /// The set of the present template, once it exists.
    new: Option<ReplicaSet>,
    /// All others.
    old: Vec<ReplicaSet>,
}

impl Rollout {
    fn all(&self) -> impl Iterator<Item = &ReplicaSet> {
        self.old.iter().chain(&self.new)
    }
}

impl Reconcile for Deployments {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let Some(deployment) = self.deployments.get_key(&key) else {
            self.expectations.forget(&key);
            return Ok(Requeue::Done);
        };
        if let Some(wait) = self.expectations.pending(&key) {
            return Ok(Requeue::After(wait));
        }
        let deployment = Deployment::clone(&deployment);
        let Some(spec) = &deployment.spec else { return Ok(Requeue::Done) };
        if spec.selector == Default::default() {
            return self.refuse_empty_selector(&deployment).await;
        }
        let mut sets = self.claim(&deployment).await?;
        sets.sort_by_key(|set| (created(set), name(&set.metadata).to_owned()));
        let mut rollout = split(deployment, sets);
        if rollout.deployment.metadata.deletion_timestamp.is_some() {
            return self.sync_status(&mut rollout).await;
        }
        self.note_pause(&mut rollout).await?;
        let paused = paused(&rollout.deployment);
        if paused || scale::is_scaling_event(&rollout) {
            self.sync_revision(&mut rollout, false).await?;
            self.scale(&mut rollout).await?;
            if paused {
                self.clean_up(&mut rollout).await?;
            }
            return self.sync_status(&mut rollout).await;
        }
        match strategy(&rollout.deployment) {
            "Recreate" => self.recreate(&mut rollout).await,
            _ => self.roll(&mut rollout).await,
        }
    }
}

impl Deployments {
    fn set_changed(&self, change: &Change<ReplicaSet>) -> Vec<ObjectKey> {
        let set = change.object();
        let mut keys: Vec<_> = [Some(set), change.old()]
            .into_iter()
            .flatten()
            .filter_map(|set| owner::controller_key::<Deployment>(&set.metadata))
            .collect();
        let seen = if change.is_deleted() { u64::MAX } else { revision_of(set) };
        keys.iter().for_each(|key| self.expectations.change_seen(key, pods::uid(&set.metadata), seen));
        if keys.is_empty() && !change.is_deleted() && owner::controller_of(&set.metadata).is_none() {
            let deployments = self.deployments.list_in(set.metadata.namespace.as_deref().unwrap_or_default());
            let matches = |deployment: &&Arc<Deployment>| {
                selector(deployment).is_ok_and(|selector| {
                    !selector.is_empty() && selector.matches(set.metadata.labels.as_ref())
                })
            };
            keys.extend(deployments.iter().filter(matches).map(|deployment| ObjectKey::of(&**deployment)));
        }
        keys
    }

    /// Only `Recreate` waits for pods to disappear; everything else shows in the sets' status.
    fn pod_changed(&self, change: &Change<Pod>) -> Vec<ObjectKey> {
        let pod = change.object();
        if !change.is_deleted() && !pods::is_finished(pod) {
            return Vec::new();
        }
        let set = owner::controller_key::<ReplicaSet>(&pod.metadata).and_then(|key| self.sets.get_key(&key));
        let Some(key) = set.and_then(|set| owner::controller_key::<Deployment>(&set.metadata)) else {
            return Vec::new();
        };
        let recreates = |deployment: &Arc<Deployment>| strategy(deployment) == "Recreate";
        if self.deployments.get_key(&key).is_some_and(|d| recreates(&d)) { vec![key] } else { Vec::new() }
    }

    async fn refuse_empty_selector(&self, deployment: &Deployment) -> Result<Requeue> {
        let message = "This deployment is selecting all pods. A non-empty selector is required.";
        self.recorder.event(deployment, EventType::Warning, "SelectingAll", message);
        let mut status = deployment.status.clone().unwrap_or_default();
        status.observed_generation = deployment.metadata.generation;
        let api = self.api::<Deployment>(deployment);
        patch::write_status(&api, deployment, &deployment.status, &status, Guard::Uid).await?;
        Ok(Requeue::Done)
    }

    fn api<K>(&self, deployment: &Deployment) -> Api<K>
    where
        K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>,
    {
        let namespace = deployment.metadata.namespace.as_deref().unwrap_or_default();
        Api::namespaced(self.context.client.clone(), namespace)
    }

    /// The deployment's sets, after adopting orphans that match and releasing sets that no longer do.
    async fn claim(&self, deployment: &Deployment) -> Result<Vec<ReplicaSet>> {
        let selector = selector(deployment)?;
        let namespace = deployment.metadata.namespace.as_deref().unwrap_or_default();
        let mut candidates = self.sets.by_index(pods::BY_CONTROLLER, pods::uid(&deployment.metadata));
        candidates.extend(self.sets.by_index(pods::BY_CONTROLLER, &pods::orphans_of(namespace)));
        let mut claimed = Vec::new();
        for set in candidates {
            match owner::claim(
                &deployment.metadata,
                &set.metadata,
                selector.matches(set.metadata.labels.as_ref()),
            ) {
                Claim::Keep => claimed.push(ReplicaSet::clone(&set)),
                Claim::Release => {
                    owner::release(&self.context.client, pods::uid(&deployment.metadata), &*set).await?;
                }
                Claim::Adopt if self.still_exists(deployment).await? => {
                    claimed.push(owner::adopt(&self.context.client, deployment, &*set).await?);
                }
                Claim::Adopt | Claim::Ignore => {}
            }
        }
        Ok(claimed)
    }

    async fn still_exists(&self, deployment: &Deployment) -> Result<bool> {
        let fresh = self.api::<Deployment>(deployment).get_opt(name(&deployment.metadata)).await;
        let fresh = fresh.during(|| format!("read deployment {}", ObjectKey::of(deployment)))?;
        Ok(fresh.is_some_and(|fresh| {
            fresh.metadata.uid == deployment.metadata.uid && fresh.metadata.deletion_timestamp.is_none()
        }))
    }

    /// Brings the new set's annotations and the deployment's revision up to date; with `create`, makes the new set
    /// when there is none.
    async fn sync_revision(&self, rollout: &mut Rollout, create: bool) -> Result<()> {
        let next = rollout.old.iter().map(revision).max().unwrap_or(0).max(0) + 1;
        if let Some(new) = rollout.new.take() {
            let new = self.refresh_new(&rollout.deployment, new, next).await?;
            let revision = annotations::get(&new.metadata, REVISION).unwrap_or_default().to_owned();
            rollout.new = Some(new);
            self.write_revision(rollout, &revision).await?;
            return self.note_set(rollout, "FoundNewReplicaSet", "Found new replica set").await;
        }
        if create {
            self.create_new(rollout, next).await?;
        }
        Ok(())
    }

    /// Copies annotations, revision and minReadySeconds to the set that already exists.
    async fn refresh_new(
        &self,
        deployment: &Deployment,
        set: ReplicaSet,
        revision: i64,
    ) -> Result<ReplicaSet> {
        let mut wanted = set.clone();
        annotations::set_on_new(deployment, &mut wanted, revision, true);
        if let Some(spec) = wanted.spec.as_mut() {
            let seconds = deployment.spec.as_ref().and_then(|spec| spec.min_ready_seconds);
            if spec.min_ready_seconds.unwrap_or(0) != seconds.unwrap_or(0) {
                spec.min_ready_seconds = seconds;
            }
        }
        self.write_set(&set, wanted).await
    }

    /// Writes the difference between a set and what it should be, guarded by its version.
    async fn write_set(&self, old: &ReplicaSet, new: ReplicaSet) -> Result<ReplicaSet> {
        if *old == new {
            return Ok(new);
        }
        let key = ObjectKey::of(old);
        let encode = |set: &ReplicaSet| {
            serde_json::to_value(set)
                .map_err(|error| Error::terminal(format!("encode {key}"), error.to_string()))
        };
        let mut difference = patch::merge_diff(&encode(old)?, &encode(&new)?);
        difference["metadata"]["uid"] = json!(old.metadata.uid);
        difference["metadata"]["resourceVersion"] = json!(old.metadata.resource_version);
        let api: Api<ReplicaSet> = Api::namespaced(self.context.client.clone(), &key.namespace);
        let written = patch::merge(&api, &key.name, difference).await?;
        if let Some(deployment) = owner::controller_key::<Deployment>(&written.metadata) {
            self.expect(&deployment, &written);
        }
        Ok(written)
    }

    async fn write_revision(&self, rollout: &mut Rollout, revision: &str) -> Result<()> {
        let deployment = &rollout.deployment;
        if annotations::get(&deployment.metadata, REVISION) == Some(revision) {
            return Ok(());
        }
        let change = json!({"metadata": {
            "uid": deployment.metadata.uid, "annotations": {REVISION: revision},
        }});
        let api = self.api::<Deployment>(deployment);
        rollout.deployment = patch::merge(&api, name(&deployment.metadata), change).await?;
        Ok(())
    }

    /// The first word of progress about a set: only when nothing was said before.
    async fn note_set(&self, rollout: &mut Rollout, reason: &str, message: &str) -> Result<()> {
        let deployment = &rollout.deployment;
        let known = status::find(deployment, "Progressing").is_some();
        let Some(set) = rollout.new.as_ref().filter(|_| status::has_deadline(deployment) && !known) else {
            return Ok(());
        };
        let message = format!("{message} {:?}", name(&set.metadata));
        self.write_progress(rollout, "True", reason, message).await
    }

    async fn write_progress(
        &self,
        rollout: &mut Rollout,
        condition_status: &str,
        reason: &str,
        message: String,
    ) -> Result<()> {
        let mut new = rollout.deployment.status.clone().unwrap_or_default();
        let condition =
            status::condition("Progressing", condition_status, reason, message, self.context.clock.time());
        status::set(&mut new, condition);
        self.write_deployment_status(rollout, new).await
    }

    async fn write_deployment_status(&self, rollout: &mut Rollout, new: DeploymentStatus) -> Result<()> {
        let (deployment, api) = (&rollout.deployment, self.api::<Deployment>(&rollout.deployment));
        let written = patch::write_status(&api, deployment, &deployment.status, &new, Guard::Uid).await?;
        if let Some(written) = written {
            rollout.deployment = written;
        }
        Ok(())
    }

    async fn create_new(&self, rollout: &mut Rollout, revision: i64) -> Result<()> {
        let deployment = rollout.deployment.clone();
        let set = new_set(&deployment, rollout, revision);
        let set_name = name(&set.metadata).to_owned();
        let created = self.api::<ReplicaSet>(&deployment).create(&PostParams::default(), &set).await;
        let created = match created.during(|| format!("create replica set {set_name}")) {
            Ok(created) => {
                self.expect(&ObjectKey::of(&deployment), &created);
                let replicas = crate::replicaset::replicas(&created);
                if replicas > 0 {
                    let message = format!("Scaled up replica set {set_name} from 0 to {replicas}");
                    self.recorder.event(&deployment, EventType::Normal, "ScalingReplicaSet", message);
                }
                created
            }
            Err(error) if error.is_already_exists() => {
                let Some(existing) = self.resolve_collision(rollout, &set_name).await? else {
                    return Err(error);
                };
                // What there was to tell was told when the set was made.
                self.expect(&ObjectKey::of(&deployment), &existing);
                rollout.new = Some(existing);
                return self.write_revision(rollout, &revision.to_string()).await;
            }
            // The namespace goes away and the deployment with it.
            Err(error) if error.is_namespace_terminating() => return Ok(()),
            Err(error) => return self.note_failed_create(rollout, &set_name, error).await,
        };
        rollout.new = Some(created);
        self.write_revision(rollout, &revision.to_string()).await?;
        if status::has_deadline(&rollout.deployment) {
            let message = format!("Created new replica set {set_name:?}");
            self.write_progress(rollout, "True", "NewReplicaSetCreated", message).await?;
        }
        Ok(())
    }

    /// The cache has to show the set as it is now before the next turn.
    fn expect(&self, deployment: &ObjectKey, set: &ReplicaSet) {
        let revision = revision_of(set);
        let is_cached =
            || self.sets.get_key(&ObjectKey::of(set)).is_some_and(|cached| revision_of(&cached) >= revision);
        self.expectations.changed(deployment, pods::uid(&set.metadata), revision, is_cached);
    }

    /// A set of that name exists. If it is ours after all the cache was behind; otherwise count the collision, which
    /// changes the name.
    async fn resolve_collision(&self, rollout: &mut Rollout, set_name: &str) -> Result<Option<ReplicaSet>> {
        let deployment = rollout.deployment.clone();
        let existing = self.api::<ReplicaSet>(&deployment).get(set_name).await;
        let existing = existing.during(|| format!("read replica set {set_name}"))?;
        let ours = owner::is_controlled_by(&existing.metadata, pods::uid(&deployment.metadata));
        if ours && has_template_of(&existing, &deployment) {
            return Ok(Some(existing));
        }
        let mut new = deployment.status.unwrap_or_default();
        new.collision_count = Some(new.collision_count.unwrap_or(0) + 1);
        self.write_deployment_status(rollout, new).await?;
        Ok(None)
    }

    async fn note_failed_create(&self, rollout: &mut Rollout, set_name: &str, error: Error) -> Result<()> {
        let message = format!("Failed to create new replica set {set_name:?}: {}", message_of(&error));
        let reason = "ReplicaSetCreateError";
        self.recorder.event(&rollout.deployment, EventType::Warning, reason, message.clone());
        if status::has_deadline(&rollout.deployment) {
            self.write_progress(rollout, "False", reason, message).await?;
        }
        Err(error)
    }
}

/// The set of a deployment's present template.
fn new_set(deployment: &Deployment, rollout: &Rollout, revision: i64) -> ReplicaSet {
    let spec = deployment.spec.clone().unwrap_or_default();
    let collisions = deployment.status.as_ref().and_then(|status| status.collision_count);
    let hash = template_hash(&spec.template, collisions);
    let mut template = spec.template;
    let labels = template.metadata.get_or_insert_default().labels.get_or_insert_default();
    labels.insert(HASH_LABEL.to_owned(), hash.clone());
    let set_labels = labels.clone();
    let mut selector = spec.selector;
    selector.match_labels.get_or_insert_default().insert(HASH_LABEL.to_owned(), hash.clone());
    let mut set = ReplicaSet {
        metadata: ObjectMeta {
            name: Some(format!("{}-{hash}", name(&deployment.metadata))),
            namespace: deployment.metadata.namespace.clone(),
            labels: Some(set_labels),
            owner_references: Some(vec![owner::controller_ref(deployment)]),
            ..Default::default()
        },
        spec: Some(ReplicaSetSpec {
            replicas: Some(0),
            min_ready_seconds: spec.min_ready_seconds,
            selector,
            template: Some(template),
        }),
        status: None,
    };
    let replicas = scale::new_replicas(deployment, rollout.all(), &set);
    if let Some(spec) = set.spec.as_mut() {
        spec.replicas = Some(replicas);
    }
    annotations::set_on_new(deployment, &mut set, revision, false);
    set
}

/// The oldest set with the present template is the new one; the rest are old.
fn split(deployment: Deployment, sets: Vec<ReplicaSet>) -> Rollout {
    let (mut new, mut old) = (None, Vec::new());
    for set in sets {
        if new.is_none() && has_template_of(&set, &deployment) {
            new = Some(set);
        } else {
            old.push(set);
        }
    }
    Rollout { deployment, new, old }
}

fn has_template_of(set: &ReplicaSet, deployment: &Deployment) -> bool {
    let wanted = deployment.spec.as_ref().map(|spec| &spec.template);
    let has = set.spec.as_ref().and_then(|spec| spec.template.as_ref());
    wanted.zip(has).is_some_and(|(wanted, has)| same_template(wanted, has, HASH_LABEL))
}

fn created(set: &ReplicaSet) -> Option<jiff::Timestamp> {
    set.metadata.creation_timestamp.as_ref().map(|time| time.0)
}

/// Resource versions of one cluster are numbers that grow.
fn revision_of(set: &ReplicaSet) -> u64 {
    set.metadata.resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or(0)
}

fn name(meta: &ObjectMeta) -> &str {
    meta.name.as_deref().unwrap_or_default()
}

fn replicas(deployment: &Deployment) -> i32 {
    deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1)
}

fn paused(deployment: &Deployment) -> bool {
    deployment.spec.as_ref().and_then(|spec| spec.paused).unwrap_or(false)
}

fn strategy(deployment: &Deployment) -> &str {
    let strategy = deployment.spec.as_ref().and_then(|spec| spec.strategy.as_ref()?.type_.as_deref());
    strategy.unwrap_or("RollingUpdate")
}

fn selector(deployment: &Deployment) -> Result<Selector> {
    match &deployment.spec {
        Some(spec) => Selector::new(&spec.selector),
        None => Err(Error::terminal("read deployment", "spec is missing")),
    }
}

#[cfg(test)]
mod tests;
