//! Namespace: when one is deleted, everything in it is deleted, pods first, and then the namespace lets go of its
//! last finalizer. What is left and why is told in conditions.

use crate::{Context, pods, util};
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{Namespace, NamespaceCondition, Pod};
use knarr_client::patch::{self, Guard};
use knarr_client::{
    Change, Controller, During, Error, Informer, ObjectKey, Reconcile, Requeue, Result, ignore_gone, or_none,
};
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, ListParams, PartialObjectMeta, PostParams};
use kube::discovery::{Discovery, Scope, verbs};
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Objects that one request deletes at most.
const PAGE: u32 = if cfg!(test) { 2 } else { 500 };
const FINALIZER: &str = "kubernetes";
/// Pods still ending are looked at again when their grace period is over, if no event came before.
const GRACE_DEFAULT_S: i64 = 30;

pub fn start(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let namespaces = context.informers.get::<Namespace>();
    let all_pods = context.informers.get::<Pod>();
    let known = namespaces.clone();
    let controller = Controller::new("namespace")
        .watch(&namespaces)
        .watch_changes(&all_pods, move |change| terminating_namespace(&known, change))
        .concurrency(10);
    Box::pin(controller.run(Arc::new(Namespaces { context, namespaces }), shutdown))
}

/// The namespace of a pod that went away, if it is being deleted.
fn terminating_namespace(namespaces: &Informer<Namespace>, change: &Change<Pod>) -> Vec<ObjectKey> {
    if !change.is_deleted() {
        return Vec::new();
    }
    let name = change.object().metadata.namespace.clone().unwrap_or_default();
    let terminating =
        namespaces.get("", &name).is_some_and(|namespace| namespace.metadata.deletion_timestamp.is_some());
    if terminating { vec![ObjectKey::cluster(name)] } else { Vec::new() }
}

struct Namespaces {
    context: Context,
    namespaces: Informer<Namespace>,
}

impl Reconcile for Namespaces {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let Some(namespace) = self.namespaces.get_key(&key) else { return Ok(Requeue::Done) };
        let finalizers = namespace.spec.as_ref().and_then(|spec| spec.finalizers.clone()).unwrap_or_default();
        let ours = finalizers.iter().any(|finalizer| finalizer == FINALIZER);
        if namespace.metadata.deletion_timestamp.is_none() || !ours {
            return Ok(Requeue::Done);
        }
        let swept = self.sweep(&key.name).await?;
        self.write_status(&namespace, &swept).await?;
        if let Some(error) = swept.failures.into_iter().next() {
            return Err(error);
        }
        if !swept.remaining.is_empty() {
            return match swept.pods_wait_s {
                Some(seconds) => Ok(Requeue::After(Duration::from_secs(seconds as u64 / 2 + 1))),
                // Mostly objects whose finalizers other loops take off in a moment.
                None => Err(Error::not_yet(format!("empty namespace {key}"), "some content is left")),
            };
        }
        self.finalize(&namespace, finalizers).await?;
        Ok(Requeue::Done)
    }
}

/// What a sweep found.
#[derive(Default)]
struct Swept {
    /// Number of objects left, by resource (`pods`, `deployments.apps`).
    remaining: BTreeMap<String, usize>,
    /// Number of objects that have it, by finalizer.
    finalizers: BTreeMap<String, usize>,
    failures: Vec<Error>,
    discovery_failure: Option<String>,
    /// The longest grace period of the pods left.
    pods_wait_s: Option<i64>,
}

impl Namespaces {
    /// Deletes everything in the namespace: pods first, all else when the pods are gone (upstream's ordered deletion:
    /// what protects or feeds pods stays as long as they run).
    async fn sweep(&self, namespace: &str) -> Result<Swept> {
        let mut swept = Swept::default();
        let discovery = Discovery::new(self.context.client.clone()).run().await;
        let discovery = match discovery.during(|| "discover what a namespace may hold".to_owned()) {
            Ok(discovery) => discovery,
            Err(error) => {
                swept.discovery_failure = Some(pods::message_of(&error));
                swept.failures.push(error);
                return Ok(swept);
            }
        };
        let deletable: Vec<_> = discovery
            .groups()
            .flat_map(|group| group.recommended_resources())
            .filter(|(resource, capabilities)| {
                // `extensions` shows objects of other groups once more.
                resource.group != "extensions"
                    && capabilities.scope == Scope::Namespaced
                    && capabilities.supports_operation(verbs::DELETE)
                    && capabilities.supports_operation(verbs::LIST)
            })
            .collect();
        let is_pods = |resource: &ApiResource| resource.group.is_empty() && resource.plural == "pods";
        for pods_first in [true, false] {
            for (resource, capabilities) in
                deletable.iter().filter(|(resource, _)| is_pods(resource) == pods_first)
            {
                let collection = capabilities.supports_operation(verbs::DELETE_COLLECTION);
                if let Err(error) = self.delete_all(namespace, resource, collection, &mut swept).await {
                    swept.failures.push(error);
                }
            }
            if !swept.remaining.is_empty() || !swept.failures.is_empty() {
                break;
            }
        }
        Ok(swept)
    }

    async fn delete_all(
        &self,
        namespace: &str,
        resource: &ApiResource,
        collection: bool,
        swept: &mut Swept,
    ) -> Result<()> {
        let api: Api<DynamicObject> = Api::namespaced_with(self.context.client.clone(), namespace, resource);
        let metadata: Api<PartialObjectMeta<DynamicObject>> =
            Api::namespaced_with(self.context.client.clone(), namespace, resource);
        let name = qualified(resource);
        let list = || async {
            let list = metadata.list(&ListParams::default()).await;
            list.during(|| format!("list {name} in namespace {namespace}"))
        };
        let before = list().await?;
        if before.items.is_empty() {
            return Ok(());
        }
        let params = DeleteParams::background();
        if collection {
            self.delete_pages(&api, &params, || format!("delete all {name} in namespace {namespace}"))
                .await?;
        } else {
            for object in &before.items {
                let object_name = object.metadata.name.as_deref().unwrap_or_default();
                let deleted = api.delete(object_name, &params).await;
                ignore_gone(deleted.during(|| format!("delete {name} {namespace}/{object_name}")))?;
            }
        }
        let left = list().await?;
        swept.count(&name, &left.items);
        Ok(())
    }

    /// Deletes all objects, some at a time: each answer holds what it deleted.
    async fn delete_pages(
        &self,
        api: &Api<DynamicObject>,
        params: &DeleteParams,
        step: impl Fn() -> String,
    ) -> Result<()> {
        let first = ListParams::default().limit(PAGE);
        let mut page = first.clone();
        loop {
            match or_none(api.delete_collection(params, &page).await.during(&step)) {
                Ok(deleted) => {
                    let list = deleted.and_then(|deleted| deleted.left());
                    let token =
                        list.and_then(|list| list.metadata.continue_).filter(|token| !token.is_empty());
                    let Some(token) = token else { return Ok(()) };
                    page = first.clone().continue_token(&token);
                }
                // So much was written since the first page that its moment is forgotten.
                Err(error) if error.is_code(410) => page = first.clone(),
                Err(error) => return Err(error),
            }
        }
    }

    async fn write_status(&self, namespace: &Namespace, swept: &Swept) -> Result<()> {
        let mut status = namespace.status.clone().unwrap_or_default();
        let mut conditions = status.conditions.take();
        for (type_, condition_status, reason, message) in swept.conditions() {
            let old = util::find(&conditions, type_);
            let same = |old: &&NamespaceCondition| {
                old.status == condition_status
                    && old.reason.as_deref() == Some(reason)
                    && old.message.as_deref() == Some(&message)
            };
            if old.is_some_and(|old| same(&old)) {
                continue;
            }
            let since = old
                .filter(|old| old.status == condition_status)
                .and_then(|old| old.last_transition_time.clone());
            let new = NamespaceCondition {
                type_: type_.to_owned(),
                status: condition_status.to_owned(),
                reason: Some(reason.to_owned()),
                message: Some(message),
                last_transition_time: since.or_else(|| Some(self.context.clock.time())),
            };
            let list = conditions.get_or_insert_default();
            match list.iter_mut().find(|condition| condition.type_ == type_) {
                Some(place) => *place = new,
                None => list.push(new),
            }
        }
        status.conditions = conditions;
        let api: Api<Namespace> = Api::all(self.context.client.clone());
        ignore_gone(patch::write_status(&api, namespace, &namespace.status, &status, Guard::Uid).await)
    }

    async fn finalize(&self, namespace: &Namespace, mut finalizers: Vec<String>) -> Result<()> {
        finalizers.retain(|finalizer| finalizer != FINALIZER);
        let name = namespace.metadata.name.as_deref().unwrap_or_default();
        let body = json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": name, "uid": namespace.metadata.uid}, "spec": {"finalizers": finalizers},
        });
        let api: Api<Namespace> = Api::all(self.context.client.clone());
        let body: Namespace = serde_json::from_value(body)
            .map_err(|error| Error::terminal(format!("finalize namespace {name}"), error.to_string()))?;
        let finalized = api.replace_subresource("finalize", name, &PostParams::default(), &body).await;
        ignore_gone(finalized.during(|| format!("finalize namespace {name}")))
    }
}

impl Swept {
    fn count(&mut self, resource: &str, left: &[PartialObjectMeta<DynamicObject>]) {
        if left.is_empty() {
            return;
        }
        self.remaining.insert(resource.to_owned(), left.len());
        for object in left {
            for finalizer in object.metadata.finalizers.iter().flatten() {
                *self.finalizers.entry(finalizer.clone()).or_insert(0) += 1;
            }
            if resource == "pods" && object.metadata.finalizers.iter().flatten().next().is_none() {
                let grace = object.metadata.deletion_grace_period_seconds.unwrap_or(GRACE_DEFAULT_S);
                self.pods_wait_s = self.pods_wait_s.max(Some(grace));
            }
        }
    }

    /// Type, status, reason and message of all five conditions, in upstream's words.
    fn conditions(&self) -> [(&'static str, &'static str, &'static str, String); 5] {
        let list = |counts: &BTreeMap<String, usize>, word: &str| {
            counts
                .iter()
                .map(|(name, count)| format!("{name}{word} {count} resource instances"))
                .collect::<Vec<_>>()
                .join(", ")
        };
        let discovery = match &self.discovery_failure {
            None => ("False", "ResourcesDiscovered", "All resources successfully discovered".to_owned()),
            Some(error) => {
                ("True", "DiscoveryFailed", format!("Discovery failed for some groups, 1 failing: {error}"))
            }
        };
        let parsed = ("False", "ParsedGroupVersions", "All legacy kube types successfully parsed".to_owned());
        let failures =
            self.failures.iter().filter(|_| self.discovery_failure.is_none()).map(ToString::to_string);
        let failures = failures.collect::<Vec<_>>().join(", ");
        let content = if failures.is_empty() {
            let done = "All content successfully deleted, may be waiting on finalization";
            ("False", "ContentDeleted", done.to_owned())
        } else {
            let message =
                format!("Failed to delete all resource types, {} remaining: {failures}", self.failures.len());
            ("True", "ContentDeletionFailed", message)
        };
        let remaining = if self.remaining.is_empty() {
            ("False", "ContentRemoved", "All content successfully removed".to_owned())
        } else {
            let message = format!("Some resources are remaining: {}", list(&self.remaining, ". has"));
            ("True", "SomeResourcesRemain", message)
        };
        let finalizers = if self.finalizers.is_empty() {
            ("False", "ContentHasNoFinalizers", "All content-preserving finalizers finished".to_owned())
        } else {
            let counted = list(&self.finalizers, " in");
            let message = format!("Some content in the namespace has finalizers remaining: {counted}");
            ("True", "SomeFinalizersRemain", message)
        };
        let named = |name, (status, reason, message)| (name, status, reason, message);
        [
            named("NamespaceDeletionDiscoveryFailure", discovery),
            named("NamespaceDeletionGroupVersionParsingFailure", parsed),
            named("NamespaceDeletionContentFailure", content),
            named("NamespaceContentRemaining", remaining),
            named("NamespaceFinalizersRemaining", finalizers),
        ]
    }
}

/// `pods`, `deployments.apps`.
fn qualified(resource: &ApiResource) -> String {
    if resource.group.is_empty() {
        resource.plural.clone()
    } else {
        format!("{}.{}", resource.plural, resource.group)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::{Harness, NAMESPACE};
    use k8s_openapi::api::core::v1::ConfigMap;
    use knarr_client::testing::Faults;

    #[tokio::test(start_paused = true)]
    async fn a_deleted_namespace_goes_when_its_last_object_does() {
        for seed in 0..5 {
            let harness =
                Harness::new(seed, Faults { conflict: 0.2, error: 0.2, drop_watch: 0.2, duplicate: 0.2 });
            harness.start(start);
            harness.create_global::<Namespace>(json!({"metadata": {"name": NAMESPACE}})).await;
            let held = json!({"metadata": {"name": "held", "finalizers": ["test/hold"]}});
            harness.create::<ConfigMap>(held).await;
            for i in 0..5 {
                harness.create::<ConfigMap>(json!({"metadata": {"name": format!("c{i}")}})).await;
            }
            harness.create::<Pod>(json!({"metadata": {"name": "p"}, "spec": {"containers": []}})).await;
            let api: Api<Namespace> = Api::all(harness.client());
            while api.delete(NAMESPACE, &DeleteParams::default()).await.is_err() {}
            let told = |namespaces: &[Namespace]| {
                let status = namespaces[0].status.clone().unwrap_or_default();
                let message =
                    |type_: &str| util::find(&status.conditions, type_).and_then(|c| c.message.clone());
                message("NamespaceFinalizersRemaining").as_deref()
                    == Some(
                        "Some content in the namespace has finalizers remaining: test/hold in 1 resource instances",
                    )
                    && message("NamespaceContentRemaining").as_deref()
                        == Some("Some resources are remaining: configmaps. has 1 resource instances")
            };
            harness.api.wait_for::<Namespace>("the conditions", told).await;
            harness.patch::<ConfigMap>("held", json!({"metadata": {"finalizers": null}})).await;
            harness.api.wait_for::<Namespace>("no namespace", |namespaces| namespaces.is_empty()).await;
        }
    }
}
