//! An owner and its pods: which pods are its, which loop a pod's change concerns, creating and deleting them in
//! batches without ever acting on a cache that has not seen the last turn. ReplicaSets, ReplicationControllers,
//! DaemonSets, StatefulSets and Jobs differ only in what they want.

use crate::Context;
use crate::pods::{self, PodControl};
use futures::future::join_all;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{Pod, ResourceQuota, ResourceQuotaStatus};
use knarr_client::expectations::Expectations;
use knarr_client::informer::Cached;
use knarr_client::owner::{self, Claim};
use knarr_client::selector::Selector;
use knarr_client::{Change, Client, Controller, During, Informer, ObjectKey, Result};
use kube::Resource;
use kube::api::Api;
use std::sync::Arc;

/// The first batch of creates; doubled while all succeed, so that a quota or a bad template costs few refusals.
const FIRST_BATCH: usize = 1;

/// A kind that controls pods through a selector.
pub trait PodOwner: Cached + Resource<DynamicType = (), Scope = NamespaceResourceScope> {
    /// Which pods are its.
    fn selector(&self) -> Result<Selector>;

    /// Whether it takes a pod without a controller that its selector matches.
    fn adopts(&self, pod: &Pod) -> bool {
        _ = pod;
        true
    }
}

/// Tries keys that failed again at once when a quota of their namespace leaves more room. Upstream waits for the
/// back-off, up to 17 minutes.
pub fn retry_with_more_room(context: &Context, controller: Controller) -> Controller {
    let queue = controller.queue();
    controller.watch_changes(&context.informers.get::<ResourceQuota>(), move |change| {
        if leaves_more_room(change) {
            let namespace = change.object().metadata.namespace.as_deref().unwrap_or_default();
            queue.hasten(|key: &ObjectKey| key.namespace == namespace);
        }
        Vec::new()
    })
}

/// A quota is gone, or differs in its limits, or fewer is used of something. Quantities are not compared as numbers:
/// waking in vain costs little.
fn leaves_more_room(change: &Change<ResourceQuota>) -> bool {
    let Some(old) = change.old() else { return change.is_deleted() };
    let (old, new) = (old.status.as_ref(), change.object().status.as_ref());
    let hard = |status: Option<&ResourceQuotaStatus>| status.and_then(|status| status.hard.clone());
    let count = |status: Option<&ResourceQuotaStatus>| {
        status?.used.as_ref()?.get("pods").and_then(|used| used.0.parse::<u64>().ok())
    };
    let used = |status: Option<&ResourceQuotaStatus>| status.and_then(|status| status.used.clone());
    hard(old) != hard(new) || (used(old) != used(new) && count(new) <= count(old))
}

/// Asks the server, not the cache: an owner that was deleted meanwhile must not adopt.
pub async fn still_exists<K: PodOwner>(client: &Client, owner: &K) -> Result<bool> {
    let key = ObjectKey::of(owner);
    let api: Api<K> = Api::namespaced(client.clone(), &key.namespace);
    let fresh = api.get_opt(&key.name).await.during(|| format!("read {} {key}", K::kind(&())))?;
    Ok(fresh.is_some_and(|fresh| {
        fresh.meta().uid == owner.meta().uid && fresh.meta().deletion_timestamp.is_none()
    }))
}

/// All owners of a kind and their pods.
pub struct Family<K> {
    pub context: Context,
    pub control: PodControl,
    pub owners: Informer<K>,
    pub pods: Informer<Pod>,
    pub expectations: Expectations,
}

impl<K: PodOwner> Family<K> {
    pub fn new(context: Context, owners: Informer<K>, control: PodControl) -> Self {
        let pods = context.informers.get::<Pod>();
        pods::index_by_controller(&pods);
        let expectations = if context.config.planted_forgetfulness {
            Expectations::forgetful()
        } else {
            Expectations::new()
        };
        Family { control, owners, pods, expectations, context }
    }

    /// Which owners a pod's change concerns; on the way, fulfils expectations.
    pub fn pod_changed(&self, change: &Change<Pod>) -> Vec<ObjectKey> {
        let pod = change.object();
        let versions = [Some(pod), change.old()].into_iter().flatten();
        let mut keys: Vec<_> = versions.filter_map(|pod| owner::controller_key::<K>(&pod.metadata)).collect();
        if let Some(key) = keys.first() {
            let uid = pods::uid(&pod.metadata);
            self.expectations.creation_seen(key, uid);
            if change.is_deleted() || pods::is_terminating(pod) {
                self.expectations.deletion_seen(key, uid);
            }
        }
        if keys.is_empty() && !change.is_deleted() && owner::controller_of(&pod.metadata).is_none() {
            let owners = self.owners.list_in(pod.metadata.namespace.as_deref().unwrap_or_default());
            let would_adopt = |owner: &&Arc<K>| {
                owner.selector().is_ok_and(|selector| {
                    !selector.is_empty() && selector.matches(pod.metadata.labels.as_ref())
                })
            };
            keys.extend(owners.iter().filter(would_adopt).map(|owner| ObjectKey::of(&**owner)));
        }
        keys
    }

    /// What is to be done with each pod that is or might be `owner`'s.
    pub fn sort(&self, owner: &K) -> Result<Vec<(Claim, Arc<Pod>)>> {
        let selector = owner.selector()?;
        let namespace = owner.meta().namespace.as_deref().unwrap_or_default();
        let own = self.pods.by_index(pods::BY_CONTROLLER, pods::uid(owner.meta()));
        let mut orphans = self.pods.by_index(pods::BY_CONTROLLER, &pods::orphans_of(namespace));
        orphans.retain(|pod| owner.adopts(pod));
        let verdict = |pod: Arc<Pod>| {
            let matches = !selector.is_empty() && selector.matches(pod.metadata.labels.as_ref());
            (owner::claim(owner.meta(), &pod.metadata, matches), pod)
        };
        Ok(own.into_iter().chain(orphans).map(verdict).collect())
    }

    /// The owner's pods, after adopting orphans that match and releasing pods that no longer do.
    pub async fn claim(&self, owner: &K) -> Result<Vec<Arc<Pod>>> {
        let client = &self.context.client;
        let mut claimed = Vec::new();
        let mut exists = None;
        for (claim, pod) in self.sort(owner)? {
            match claim {
                Claim::Keep => claimed.push(pod),
                Claim::Release => owner::release(client, pods::uid(owner.meta()), &*pod).await?,
                Claim::Adopt => {
                    if exists.is_none() {
                        exists = Some(self.still_exists(owner).await?);
                    }
                    if exists == Some(true) {
                        claimed.push(Arc::new(owner::adopt(client, owner, &*pod).await?));
                    }
                }
                Claim::Ignore => {}
            }
        }
        Ok(claimed)
    }

    /// See [`still_exists`].
    pub async fn still_exists(&self, owner: &K) -> Result<bool> {
        still_exists(&self.context.client, owner).await
    }

    /// Creates the pods in growing batches; the first batch with a failure is the last. How many there are now:
    /// none when the namespace is going away.
    pub async fn create(&self, owner: &K, wanted: Vec<Pod>) -> Result<usize> {
        let (mut batch, mut left) = (FIRST_BATCH, wanted.as_slice());
        while !left.is_empty() {
            let (now, later) = left.split_at(batch.min(left.len()));
            for result in join_all(now.iter().map(|pod| self.create_one(owner, pod))).await {
                match result {
                    Err(error) if error.is_namespace_terminating() => return Ok(0),
                    result => result?,
                }
            }
            (left, batch) = (later, batch * 2);
        }
        Ok(wanted.len())
    }

    async fn create_one(&self, owner: &K, pod: &Pod) -> Result<()> {
        let created = self.control.create(owner, pod).await?;
        let cached = || self.pods.get_key(&ObjectKey::of(&created)).is_some();
        self.expectations.created(&ObjectKey::of(owner), pods::uid(&created.metadata), cached);
        Ok(())
    }

    pub async fn delete(&self, owner: &K, pods: impl IntoIterator<Item = Arc<Pod>>) -> Result<()> {
        let deletions = pods.into_iter().map(|pod| async move { self.delete_one(owner, &pod).await });
        join_all(deletions).await.into_iter().collect()
    }

    async fn delete_one(&self, owner: &K, pod: &Pod) -> Result<()> {
        let (key, uid) = (ObjectKey::of(owner), pods::uid(&pod.metadata));
        self.expectations.deleting(&key, uid);
        let deleted = self.control.delete(owner, pod).await;
        let gone = self.pods.get_key(&ObjectKey::of(pod)).is_none_or(|pod| pods::is_terminating(&pod));
        if deleted.is_err() || gone {
            self.expectations.deletion_seen(&key, uid);
        }
        deleted
    }
}
