//! The templates an owner of pods had, as ControllerRevisions: the newest revision is the present template. For
//! DaemonSets and StatefulSets.

use crate::family::{PodOwner, still_exists};
use crate::util::template_hash;
use crate::{Context, pods};
use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::runtime::RawExtension;
use knarr_client::owner::{self, Claim};
use knarr_client::patch;
use knarr_client::selector::Selector;
use knarr_client::{Client, During, Error, Informer, Result, ignore_gone};
use kube::api::{Api, DeleteParams, PostParams};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::sync::Arc;

/// Which revision a pod is of.
pub const REVISION_LABEL: &str = "controller-revision-hash";
/// Revisions kept beside those in use, unless the owner says otherwise.
const LIMIT_DEFAULT: i32 = 10;

/// An owner whose templates are kept.
pub trait Revisioned: PodOwner {
    /// The label of a revision that holds its hash.
    const HASH_LABEL: &'static str;
    fn template(&self) -> Option<&PodTemplateSpec>;
    fn history_limit(&self) -> Option<i32>;
    fn collision_count(&self) -> Option<i32>;
}

/// All revisions of all owners.
pub struct Revisions {
    client: Client,
    pub informer: Informer<ControllerRevision>,
}

/// The revisions of one owner.
pub struct History {
    /// Of the present template.
    pub current: Arc<ControllerRevision>,
    /// How many names were found taken; to be written into the owner's status.
    pub collision_count: Option<i32>,
    /// All others, oldest first.
    pub old: Vec<Arc<ControllerRevision>>,
}

impl History {
    pub fn current_name(&self) -> &str {
        name_of(&self.current)
    }
}

pub fn name_of(revision: &ControllerRevision) -> &str {
    revision.metadata.name.as_deref().unwrap_or_default()
}

/// The revision a pod says it is of.
pub fn revision_of(pod: &Pod) -> Option<&str> {
    pod.metadata.labels.as_ref()?.get(REVISION_LABEL).map(String::as_str)
}

/// The hash a revision of a `K` is named by.
pub fn hash_of<K: Revisioned>(revision: &ControllerRevision) -> &str {
    let labels = revision.metadata.labels.as_ref();
    labels.and_then(|labels| labels.get(K::HASH_LABEL)).map(String::as_str).unwrap_or_default()
}

/// The template a revision brings back.
pub fn template_of(revision: &ControllerRevision) -> Option<PodTemplateSpec> {
    let mut template = revision.data.as_ref()?.0.pointer("/spec/template")?.clone();
    template.as_object_mut()?.remove("$patch");
    serde_json::from_value(template).ok()
}

/// What a revision stores: a patch that brings the template back, and so the base of comparison.
fn data<K: Revisioned>(owner: &K) -> Value {
    let mut template = json!(owner.template());
    template["$patch"] = json!("replace");
    json!({"spec": {"template": template}})
}

fn is_to_adopt<K: Revisioned>(owner: &K, selector: &Selector, revision: &ControllerRevision) -> bool {
    let matches = !selector.is_empty() && selector.matches(revision.metadata.labels.as_ref());
    owner::claim(owner.meta(), &revision.metadata, matches) == Claim::Adopt
}

impl Revisions {
    pub fn new(context: &Context) -> Self {
        let informer = context.informers.get::<ControllerRevision>();
        pods::index_by_controller(&informer);
        Revisions { client: context.client.clone(), informer }
    }

    /// Finds or makes the revision of the present template, and sees to it that it is the newest.
    pub async fn history<K: Revisioned>(&self, owner: &K) -> Result<History> {
        let data = data(owner);
        let mut known = self.informer.by_index(pods::BY_CONTROLLER, pods::uid(owner.meta()));
        known.extend(self.adopt_orphans(owner).await?);
        known.sort_by_key(|revision| revision.revision);
        let newest = known.last().map_or(0, |revision| revision.revision);
        let same =
            |revision: &Arc<ControllerRevision>| revision.data.as_ref().is_some_and(|known| known.0 == data);
        let Some(place) = known.iter().rposition(same) else {
            return self.create(owner, data, newest + 1, known).await;
        };
        let mut current = known.remove(place);
        if current.revision < newest {
            let change = json!({
                "metadata": {"uid": current.metadata.uid, "resourceVersion": current.metadata.resource_version},
                "revision": newest + 1,
            });
            current = Arc::new(patch::merge(&self.api(owner), name_of(&current), change).await?);
        }
        Ok(History { current, collision_count: owner.collision_count(), old: known })
    }

    /// Takes over what an earlier owner left, so that the pods it left are found to be of the present revision.
    async fn adopt_orphans<K: Revisioned>(&self, owner: &K) -> Result<Vec<Arc<ControllerRevision>>> {
        let namespace = owner.meta().namespace.as_deref().unwrap_or_default();
        let mut orphans = self.informer.by_index(pods::BY_CONTROLLER, &pods::orphans_of(namespace));
        let selector = owner.selector()?;
        orphans.retain(|revision| is_to_adopt(owner, &selector, revision));
        if orphans.is_empty() || !still_exists(&self.client, owner).await? {
            return Ok(Vec::new());
        }
        let mut adopted = Vec::new();
        for orphan in orphans {
            adopted.push(Arc::new(owner::adopt(&self.client, owner, &*orphan).await?));
        }
        Ok(adopted)
    }

    fn api<K: Revisioned>(&self, owner: &K) -> Api<ControllerRevision> {
        let namespace = owner.meta().namespace.as_deref().unwrap_or_default();
        Api::namespaced(self.client.clone(), namespace)
    }

    async fn create<K: Revisioned>(
        &self,
        owner: &K,
        data: Value,
        number: i64,
        old: Vec<Arc<ControllerRevision>>,
    ) -> Result<History> {
        let collision_count = owner.collision_count();
        let template = owner.template();
        let hash = template_hash(&template, collision_count);
        let name = format!("{}-{hash}", owner.meta().name.as_deref().unwrap_or_default());
        let mut labels =
            template.and_then(|template| template.metadata.as_ref()?.labels.clone()).unwrap_or_default();
        labels.insert(K::HASH_LABEL.to_owned(), hash);
        let revision = ControllerRevision {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                namespace: owner.meta().namespace.clone(),
                labels: Some(labels),
                annotations: owner.meta().annotations.clone(),
                owner_references: Some(vec![owner::controller_ref(owner)]),
                ..Default::default()
            },
            data: Some(RawExtension(data.clone())),
            revision: number,
        };
        let api = self.api(owner);
        let created = api.create(&PostParams::default(), &revision).await;
        match created.during(|| format!("create controller revision {name}")) {
            Ok(current) => Ok(History { current: Arc::new(current), collision_count, old }),
            Err(error) if error.is_already_exists() => {
                let existing = api.get(&name).await.during(|| format!("read controller revision {name}"))?;
                let ours = owner::is_controlled_by(&existing.metadata, pods::uid(owner.meta()));
                if ours && existing.data.as_ref().is_some_and(|known| known.0 == data) {
                    return Ok(History { current: Arc::new(existing), collision_count, old });
                }
                if is_to_adopt(owner, &owner.selector()?, &existing) {
                    // The cache has yet to show that nobody owns it any more.
                    owner::adopt(&self.client, owner, &existing).await?;
                    return Err(Error::not_yet(
                        format!("adopt controller revision {name}"),
                        "the cache is behind",
                    ));
                }
                self.count_collision(owner, collision_count).await?;
                Err(Error::not_yet(
                    format!("create controller revision {name}"),
                    "the name is taken, trying another",
                ))
            }
            Err(error) => Err(error),
        }
    }

    async fn count_collision<K: Revisioned>(&self, owner: &K, count: Option<i32>) -> Result<()> {
        let meta = owner.meta();
        let api: Api<K> = Api::namespaced(self.client.clone(), meta.namespace.as_deref().unwrap_or_default());
        let change =
            json!({"metadata": {"uid": meta.uid}, "status": {"collisionCount": count.unwrap_or(0) + 1}});
        let name = meta.name.as_deref().unwrap_or_default();
        let patched = api.patch_status(name, &Default::default(), &kube::api::Patch::Merge(change)).await;
        patched.map(|_| ()).during(|| format!("count a taken name in {name}"))
    }

    /// Deletes old revisions beyond the limit. Those named in `live` are in use and do not count.
    pub async fn clean_up<K: Revisioned>(
        &self,
        owner: &K,
        history: &History,
        live: &HashSet<&str>,
    ) -> Result<()> {
        let limit = usize::try_from(owner.history_limit().unwrap_or(LIMIT_DEFAULT)).unwrap_or(0);
        let unused: Vec<_> = history.old.iter().filter(|old| !live.contains(name_of(old))).collect();
        for revision in unused.iter().take(unused.len().saturating_sub(limit)) {
            let name = name_of(revision);
            let deleted = self.api(owner).delete(name, &DeleteParams::default()).await;
            ignore_gone(deleted.during(|| format!("delete controller revision {name}")))?;
        }
        Ok(())
    }
}
