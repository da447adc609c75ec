//! Garbage collector: objects whose owners are gone go too; owners deleted in the foreground wait for the children
//! that block them; owners deleted with orphaning let their children go free.
//!
//! A graph of all objects with owners (and of those that have children) is kept from the metadata of every kind that
//! discovery shows. The graph only says *where to look*: each decision reads the object afresh.

mod graph;

use crate::Context;
use futures::future::BoxFuture;
use graph::{Graph, Identity};
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use knarr_client::informer::MetaChange;
use knarr_client::{During, Error, EventType, Recorder, Result, WorkQueue, ignore_gone, or_none};
use kube::Client;
use kube::api::{
    Api, ApiResource, DeleteParams, DynamicObject, PartialObjectMeta, Patch, PatchParams, Preconditions,
    PropagationPolicy,
};
use kube::discovery::{ApiCapabilities, Discovery, Scope, verbs};
use parking_lot::{Mutex, RwLock};
use serde_json::json;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

const FOREGROUND: &str = "foregroundDeletion";
const ORPHAN: &str = "orphan";
/// Objects worked on at a time: upstream's default.
const CONCURRENCY: usize = 20;
/// Owners known to be absent; more are forgotten and asked for again.
const ABSENT_MAX: usize = 500;
/// Between tries of a discovery that failed.
const DISCOVERY_RETRY: Duration = Duration::from_secs(2);
/// How long to wait for the first lists of all kinds.
const SYNC_MAX: Duration = Duration::from_secs(30);
/// Kinds that come in floods and never own or are owned.
const IGNORED: [(&str, &str); 2] = [("", "events"), ("events.k8s.io", "events")];

pub fn start(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let collector = Arc::new(Collector {
        client: context.client.clone(),
        recorder: context.recorder.for_component("garbage-collector-controller"),
        graph: Mutex::new(Graph::default()),
        queue: WorkQueue::new(),
        kinds: RwLock::default(),
        kinds_changed: Notify::new(),
        absent: Mutex::default(),
    });
    Box::pin(collector.run(context, shutdown))
}

struct Collector {
    client: Client,
    recorder: Recorder,
    graph: Mutex<Graph>,
    /// Uids to look at.
    queue: WorkQueue<String>,
    /// By API group and kind.
    kinds: RwLock<HashMap<(String, String), (ApiResource, Scope)>>,
    /// A custom resource definition changed.
    kinds_changed: Notify,
    /// Owners (uid, namespace looked in) that the server said do not exist.
    absent: Mutex<HashSet<(String, String)>>,
}

impl Collector {
    async fn run(self: Arc<Self>, context: Context, shutdown: CancellationToken) {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = self.follow_kinds(&context) => {}
        }
        let mut in_work = JoinSet::new();
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                () = self.kinds_changed.notified() => self.follow_kinds(&context).await,
                Some(_) = in_work.join_next() => {}
                Some(uid) = self.queue.next(), if in_work.len() < CONCURRENCY => {
                    in_work.spawn(self.clone().work(uid));
                }
            }
        }
        self.queue.shut_down();
    }

    /// Starts a metadata watch for every kind that has none, and waits until its objects are known: a graph with holes
    /// would take owners for absent more often than needed (never wrongly: absence is always asked for). Ends the
    /// watches of kinds that are gone.
    async fn follow_kinds(self: &Arc<Self>, context: &Context) {
        let found = loop {
            match self.discover().await {
                Ok(kinds) => break kinds,
                Err(error) => {
                    tracing::debug!(%error, "discovery failed, retrying");
                    tokio::time::sleep(DISCOVERY_RETRY).await;
                }
            }
        };
        let found: HashMap<_, _> = found
            .into_iter()
            .map(|(resource, capabilities)| {
                ((resource.group.clone(), resource.kind.clone()), (resource, capabilities.scope))
            })
            .collect();
        let gone: Vec<_> =
            self.kinds.read().keys().filter(|key| !found.contains_key(*key)).cloned().collect();
        for key in gone {
            if let Some((resource, _)) = self.kinds.write().remove(&key) {
                context.informers.stop_metadata(&resource);
            }
        }
        let mut informers = Vec::new();
        for (key, (resource, scope)) in found {
            if self.kinds.write().insert(key, (resource.clone(), scope)).is_some() {
                continue;
            }
            let informer = context.informers.metadata(&resource);
            let (this, kind) = (self.clone(), Arc::new(resource));
            informer.on_change(move |change| this.changed(&kind, change));
            informers.push(informer);
        }
        let synced = futures::future::join_all(informers.iter().map(|informer| informer.wait_synced()));
        if tokio::time::timeout(SYNC_MAX, synced).await.is_err() {
            // One kind that cannot be listed must not stop all others.
            tracing::warn!("not every kind could be listed, collecting garbage without those");
        }
    }

    async fn discover(&self) -> Result<Vec<(ApiResource, ApiCapabilities)>> {
        let discovery = Discovery::new(self.client.clone()).run().await;
        let discovery = discovery.during(|| "discover all kinds".to_owned())?;
        let all = discovery.groups().flat_map(|group| group.recommended_resources());
        Ok(all
            .filter(|(resource, capabilities)| {
                // `extensions` shows objects of other groups once more.
                let ignored = resource.group == "extensions"
                    || IGNORED.contains(&(resource.group.as_str(), resource.plural.as_str()));
                let needed = [verbs::DELETE, verbs::LIST, verbs::WATCH];
                !ignored && needed.iter().all(|verb| capabilities.supports_operation(verb))
            })
            .collect())
    }

    fn changed(&self, kind: &Arc<ApiResource>, change: MetaChange<'_>) {
        if kind.group == "apiextensions.k8s.io" {
            self.kinds_changed.notify_one();
        }
        let look_at = match change {
            MetaChange::Applied(meta) => self.graph.lock().apply(kind, meta),
            MetaChange::Deleted(meta) => self.graph.lock().remove(meta.uid.as_deref().unwrap_or_default()),
        };
        for uid in look_at {
            self.queue.add(uid);
        }
    }

    async fn work(self: Arc<Self>, uid: String) {
        match self.reconcile(&uid).await {
            Ok(()) => self.queue.forget(&uid),
            Err(error) => {
                tracing::debug!(uid, %error, "garbage collection of an object failed, retrying");
                self.queue.add_rate_limited(uid.clone());
            }
        }
        self.queue.done(&uid);
    }

    /// Looks at one object: its own deletion first, then whether an owner is left.
    async fn reconcile(&self, uid: &str) -> Result<()> {
        let Some(identity) = self.graph.lock().identity(uid) else { return Ok(()) };
        let Some(live) = self.read(&identity).await? else {
            // Gone; the watch will say so. Its children need not wait for that.
            for dependent in self.graph.lock().dependents(uid) {
                self.queue.add(dependent);
            }
            return Ok(());
        };
        if live.deletion_timestamp.is_some() {
            if has_finalizer(&live, ORPHAN) {
                return self.orphan_dependents(&identity, &live).await;
            }
            if has_finalizer(&live, FOREGROUND) {
                return self.wait_for_dependents(&identity, &live).await;
            }
            return Ok(());
        }
        self.check_owners(&identity, &live).await
    }

    /// The object as the server has it, if it still is the same one.
    async fn read(&self, identity: &Identity) -> Result<Option<ObjectMeta>> {
        let api = self.metadata_api(&identity.kind, &identity.namespace);
        let live = api.get(&identity.name).await.during(|| format!("read {identity}"));
        Ok(or_none(live)?.map(|live| live.metadata).filter(|meta| meta.uid.as_deref() == Some(&identity.uid)))
    }

    fn metadata_api(&self, kind: &ApiResource, namespace: &str) -> Api<PartialObjectMeta<DynamicObject>> {
        if namespace.is_empty() {
            Api::all_with(self.client.clone(), kind)
        } else {
            Api::namespaced_with(self.client.clone(), namespace, kind)
        }
    }

    async fn check_owners(&self, identity: &Identity, live: &ObjectMeta) -> Result<()> {
        let references = live.owner_references.clone().unwrap_or_default();
        if references.is_empty() {
            return Ok(());
        }
        let (mut solid, mut dangling, mut waiting) = (0, Vec::new(), Vec::new());
        for reference in references {
            match self.owner_state(identity, &reference).await? {
                OwnerState::Solid => solid += 1,
                OwnerState::Absent => dangling.push(reference.uid),
                OwnerState::WaitsForDependents => waiting.push(reference.uid),
            }
        }
        if solid > 0 {
            dangling.extend(waiting);
            return self.drop_owners(identity, live, &dangling).await;
        }
        let has_dependents = !self.graph.lock().dependents(&identity.uid).is_empty();
        let policy = if !waiting.is_empty() && has_dependents {
            // The owner waits for us, so we wait for ours.
            PropagationPolicy::Foreground
        } else if has_finalizer(live, ORPHAN) {
            PropagationPolicy::Orphan
        } else if has_finalizer(live, FOREGROUND) {
            PropagationPolicy::Foreground
        } else {
            PropagationPolicy::Background
        };
        self.delete(identity, live, policy).await
    }

    async fn owner_state(&self, dependent: &Identity, reference: &OwnerReference) -> Result<OwnerState> {
        if let Some(state) = self.graph.lock().owner_state(dependent, &reference.uid) {
            return Ok(state);
        }
        let group = reference.api_version.rsplit_once('/').map_or("", |(group, _)| group).to_owned();
        let kind = self.kinds.read().get(&(group, reference.kind.clone())).cloned();
        // A kind nobody serves: it may come back. Keep the dependent, as upstream does.
        let Some((kind, scope)) = kind else { return Ok(OwnerState::Solid) };
        let namespace = if scope == Scope::Cluster { "" } else { dependent.namespace.as_str() };
        if scope == Scope::Namespaced && namespace.is_empty() {
            self.tell_of_misplaced(dependent, reference);
            return Ok(OwnerState::Solid);
        }
        let remembered = (reference.uid.clone(), namespace.to_owned());
        if scope == Scope::Namespaced && self.graph.lock().identity(&reference.uid).is_some() {
            // Known, but not where the dependent may look for it.
            self.tell_of_misplaced(dependent, reference);
        }
        if self.absent.lock().contains(&remembered) {
            return Ok(OwnerState::Absent);
        }
        let api = self.metadata_api(&kind, namespace);
        let live =
            or_none(api.get(&reference.name).await.during(|| format!("read owner {}", reference.name)))?;
        match live.filter(|live| live.metadata.uid.as_ref() == Some(&reference.uid)) {
            Some(live) if is_waiting(&live.metadata) => Ok(OwnerState::WaitsForDependents),
            Some(_) => Ok(OwnerState::Solid),
            None => {
                let mut absent = self.absent.lock();
                if absent.len() >= ABSENT_MAX {
                    absent.clear();
                }
                absent.insert(remembered);
                Ok(OwnerState::Absent)
            }
        }
    }

    /// An owner in another namespace, or in any for an object that is in none, counts as absent: whoever wrote that is told.
    fn tell_of_misplaced(&self, dependent: &Identity, owner: &OwnerReference) {
        let namespace = &dependent.namespace;
        let message = format!(
            "ownerRef [{}/{}, namespace: {namespace}, name: {}, uid: {}] does not exist in namespace {namespace:?}",
            owner.api_version, owner.kind, owner.name, owner.uid
        );
        tracing::warn!(%dependent, owner = owner.name, "an owner in another namespace counts as absent");
        let about = ObjectReference {
            api_version: Some(dependent.kind.api_version.clone()),
            kind: Some(dependent.kind.kind.clone()),
            namespace: (!namespace.is_empty()).then(|| namespace.clone()),
            name: Some(dependent.name.clone()),
            uid: Some(dependent.uid.clone()),
            ..Default::default()
        };
        self.recorder.event_about(about, EventType::Warning, "OwnerRefInvalidNamespace", message);
    }

    async fn drop_owners(&self, identity: &Identity, live: &ObjectMeta, uids: &[String]) -> Result<()> {
        if uids.is_empty() {
            return Ok(());
        }
        let mut left = live.owner_references.clone().unwrap_or_default();
        left.retain(|reference| !uids.contains(&reference.uid));
        self.patch(identity, live, json!({"ownerReferences": left})).await
    }

    async fn patch(
        &self,
        identity: &Identity,
        live: &ObjectMeta,
        mut metadata: serde_json::Value,
    ) -> Result<()> {
        metadata["uid"] = json!(live.uid);
        metadata["resourceVersion"] = json!(live.resource_version);
        let api = self.metadata_api(&identity.kind, &identity.namespace);
        let change = Patch::Merge(json!({"metadata": metadata}));
        let patched = api.patch_metadata(&identity.name, &PatchParams::default(), &change).await;
        ignore_gone(patched.during(|| format!("patch {identity}")))
    }

    async fn delete(&self, identity: &Identity, live: &ObjectMeta, policy: PropagationPolicy) -> Result<()> {
        let params = DeleteParams {
            propagation_policy: Some(policy),
            preconditions: Some(Preconditions {
                uid: live.uid.clone(),
                resource_version: live.resource_version.clone(),
            }),
            ..Default::default()
        };
        let api: Api<DynamicObject> = if identity.namespace.is_empty() {
            Api::all_with(self.client.clone(), &*identity.kind)
        } else {
            Api::namespaced_with(self.client.clone(), &identity.namespace, &*identity.kind)
        };
        tracing::debug!(object = %identity, ?params.propagation_policy, "deleting: no owner is left");
        ignore_gone(api.delete(&identity.name, &params).await.during(|| format!("delete {identity}")))
    }

    /// Deleted in the foreground: as long as a child blocks, delete the children; then let go.
    async fn wait_for_dependents(&self, identity: &Identity, live: &ObjectMeta) -> Result<()> {
        let blocking = self.graph.lock().blocking_dependents(&identity.uid);
        if blocking.is_empty() {
            return self.remove_finalizer(identity, live, FOREGROUND).await;
        }
        for dependent in self.graph.lock().dependents(&identity.uid) {
            self.queue.add(dependent);
        }
        Ok(())
    }

    /// Deleted with orphaning: the children lose this owner, then it goes.
    async fn orphan_dependents(&self, identity: &Identity, live: &ObjectMeta) -> Result<()> {
        let dependents = self.graph.lock().dependents(&identity.uid);
        for uid in dependents {
            let Some(dependent) = self.graph.lock().identity(&uid) else { continue };
            if let Some(meta) = self.read(&dependent).await? {
                let owned =
                    meta.owner_references.iter().flatten().any(|reference| reference.uid == identity.uid);
                if owned {
                    self.drop_owners(&dependent, &meta, std::slice::from_ref(&identity.uid)).await?;
                }
            }
        }
        self.remove_finalizer(identity, live, ORPHAN).await
    }

    async fn remove_finalizer(&self, identity: &Identity, live: &ObjectMeta, finalizer: &str) -> Result<()> {
        let mut finalizers = live.finalizers.clone().unwrap_or_default();
        finalizers.retain(|name| name != finalizer);
        match self.patch(identity, live, json!({"finalizers": finalizers})).await {
            // Someone changed it meanwhile: look again.
            Err(error) if error.is_conflict() => {
                Err(Error::not_yet(format!("finalize {identity}"), "it changed"))
            }
            result => result,
        }
    }
}

/// What an owner means for a dependent without other owners.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum OwnerState {
    /// It exists: the dependent stays.
    Solid,
    Absent,
    /// It is being deleted in the foreground: its dependents go first, blocking or not.
    WaitsForDependents,
}

fn has_finalizer(meta: &ObjectMeta, finalizer: &str) -> bool {
    meta.finalizers.iter().flatten().any(|name| name == finalizer)
}

/// Deleted, and waiting for its dependents.
fn is_waiting(meta: &ObjectMeta) -> bool {
    meta.deletion_timestamp.is_some() && has_finalizer(meta, FOREGROUND)
}

#[cfg(test)]
mod tests;
