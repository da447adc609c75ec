//! The templates a daemon set had, as ControllerRevisions: the newest revision is the present template.

use super::DaemonSets;
use crate::pods;
use crate::util::template_hash;
use k8s_openapi::api::apps::v1::{ControllerRevision, DaemonSet};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use knarr_client::patch::{self, Guard};
use knarr_client::{During, Error, Result, ignore_gone, owner};
use kube::api::{Api, DeleteParams, PostParams};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::sync::Arc;

/// Which template a pod or revision is of.
pub const HASH_LABEL: &str = "controller-revision-hash";

pub struct History {
    /// Of the present template.
    pub hash: String,
    pub collision_count: Option<i32>,
    old: Vec<Arc<ControllerRevision>>,
}

impl History {
    /// Whether the pod is of the present template.
    pub fn is_current(&self, pod: &Pod) -> bool {
        hash_of(&pod.metadata) == Some(self.hash.as_str())
    }
}

fn hash_of(meta: &ObjectMeta) -> Option<&str> {
    meta.labels.as_ref()?.get(HASH_LABEL).map(String::as_str)
}

/// What a revision stores: a patch that brings the template back, and so the base of comparison.
fn data(set: &DaemonSet) -> Value {
    let mut template = json!(set.spec.as_ref().map(|spec| &spec.template));
    template["$patch"] = json!("replace");
    json!({"spec": {"template": template}})
}

impl DaemonSets {
    /// Finds or makes the revision of the present template, and sees to it that it is the newest.
    pub(super) async fn history(&self, set: &DaemonSet) -> Result<History> {
        let data = data(set);
        let mut known = self.revisions.by_index(pods::BY_CONTROLLER, pods::uid(&set.metadata));
        known.sort_by_key(|revision| revision.revision);
        let newest = known.last().map_or(0, |revision| revision.revision);
        let same =
            |revision: &Arc<ControllerRevision>| revision.data.as_ref().is_some_and(|known| known.0 == data);
        let collision_count = set.status.as_ref().and_then(|status| status.collision_count);
        let Some(place) = known.iter().rposition(same) else {
            return self.create_revision(set, data, newest + 1, collision_count, known).await;
        };
        let current = known.remove(place);
        if current.revision < newest {
            let api = self.revision_api(set);
            let name = current.metadata.name.clone().unwrap_or_default();
            let change = json!({
                "metadata": {"uid": current.metadata.uid, "resourceVersion": current.metadata.resource_version},
                "revision": newest + 1,
            });
            patch::merge(&api, &name, change).await?;
        }
        let hash = hash_of(&current.metadata).unwrap_or_default().to_owned();
        Ok(History { hash, collision_count, old: known })
    }

    fn revision_api(&self, set: &DaemonSet) -> Api<ControllerRevision> {
        let namespace = set.metadata.namespace.as_deref().unwrap_or_default();
        Api::namespaced(self.context.client.clone(), namespace)
    }

    async fn create_revision(
        &self,
        set: &DaemonSet,
        data: Value,
        number: i64,
        collision_count: Option<i32>,
        old: Vec<Arc<ControllerRevision>>,
    ) -> Result<History> {
        let template = set.spec.as_ref().map(|spec| &spec.template);
        let hash = template_hash(&template, collision_count);
        let name = format!("{}-{hash}", set.metadata.name.as_deref().unwrap_or_default());
        let mut labels =
            template.and_then(|template| template.metadata.as_ref()?.labels.clone()).unwrap_or_default();
        labels.insert(HASH_LABEL.to_owned(), hash.clone());
        let revision = ControllerRevision {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                namespace: set.metadata.namespace.clone(),
                labels: Some(labels),
                annotations: set.metadata.annotations.clone(),
                owner_references: Some(vec![owner::controller_ref(set)]),
                ..Default::default()
            },
            data: Some(k8s_openapi::apimachinery::pkg::runtime::RawExtension(data.clone())),
            revision: number,
        };
        let api = self.revision_api(set);
        let created = api.create(&PostParams::default(), &revision).await;
        match created.during(|| format!("create controller revision {name}")) {
            Ok(_) => Ok(History { hash, collision_count, old }),
            Err(error) if error.is_already_exists() => {
                let existing = api.get(&name).await.during(|| format!("read controller revision {name}"))?;
                let ours = owner::is_controlled_by(&existing.metadata, pods::uid(&set.metadata));
                if ours && existing.data.as_ref().is_some_and(|known| known.0 == data) {
                    return Ok(History { hash, collision_count, old });
                }
                self.count_collision(set, collision_count).await?;
                Err(Error::not_yet(
                    format!("create controller revision {name}"),
                    "the name is taken, trying another",
                ))
            }
            Err(error) => Err(error),
        }
    }

    async fn count_collision(&self, set: &DaemonSet, count: Option<i32>) -> Result<()> {
        let mut status = set.status.clone().unwrap_or_default();
        status.collision_count = Some(count.unwrap_or(0) + 1);
        let namespace = set.metadata.namespace.as_deref().unwrap_or_default();
        let api: Api<DaemonSet> = Api::namespaced(self.context.client.clone(), namespace);
        patch::write_status(&api, set, &set.status, &status, Guard::Uid).await.map(|_| ())
    }

    /// Deletes old revisions beyond the limit that no pod is of any more.
    pub(super) async fn clean_up_history(
        &self,
        set: &DaemonSet,
        pods: &[Arc<Pod>],
        history: &History,
    ) -> Result<()> {
        let limit = set.spec.as_ref().and_then(|spec| spec.revision_history_limit).unwrap_or(10);
        let live: HashSet<&str> = pods.iter().filter_map(|pod| hash_of(&pod.metadata)).collect();
        let surplus = history.old.len().saturating_sub(usize::try_from(limit).unwrap_or(0));
        let unused =
            history.old.iter().filter(|old| hash_of(&old.metadata).is_none_or(|hash| !live.contains(hash)));
        for revision in unused.take(surplus) {
            let name = revision.metadata.name.as_deref().unwrap_or_default();
            let deleted = self.revision_api(set).delete(name, &DeleteParams::default()).await;
            ignore_gone(deleted.during(|| format!("delete controller revision {name}")))?;
        }
        Ok(())
    }
}
