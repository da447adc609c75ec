//! The volume claims of a set's pods: made before the pod, kept when it goes, and given to the set or to the
//! departing pod where the retention policy says that they go with it.

use super::{StatefulSets, identity, plan};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use knarr_client::{During, EventType, ObjectKey, Result, ignore_gone, owner, patch};
use kube::api::{Api, PostParams};
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Arc;

impl StatefulSets {
    fn claim_api(&self, set: &StatefulSet) -> Api<PersistentVolumeClaim> {
        let namespace = set.metadata.namespace.as_deref().unwrap_or_default();
        Api::namespaced(self.context.client.clone(), namespace)
    }

    /// Makes the claims a pod needs. False when one of an earlier life has to go first.
    pub(super) async fn claims_are_ready(&self, set: &StatefulSet, ordinal: i32) -> Result<bool> {
        for wanted in wanted(set, ordinal) {
            match self.claims.get_key(&ObjectKey::of(&wanted)) {
                Some(claim) if claim.metadata.deletion_timestamp.is_some() => return Ok(false),
                Some(claim) if belongs_to_a_former_pod(&claim, set, ordinal) => return Ok(false),
                Some(_) => {}
                None => self.create_claim(set, ordinal, &wanted).await?,
            }
        }
        Ok(true)
    }

    async fn create_claim(
        &self,
        set: &StatefulSet,
        ordinal: i32,
        claim: &PersistentVolumeClaim,
    ) -> Result<()> {
        let created = self.claim_api(set).create(&PostParams::default(), claim).await;
        let (name, pod) = (ObjectKey::of(claim).name, identity::pod_name(set, ordinal));
        let set_name = set.metadata.name.as_deref().unwrap_or_default();
        match created.during(|| format!("create claim {name}")) {
            Ok(_) => {
                let message = format!("create Claim {name} Pod {pod} in StatefulSet {set_name} success");
                self.recorder.event(set, EventType::Normal, "SuccessfulCreate", message);
                Ok(())
            }
            Err(error) if error.is_already_exists() => Ok(()),
            Err(error) => {
                let why = crate::pods::message_of(&error);
                let message = format!(
                    "create Claim {name} for Pod {pod} in StatefulSet {set_name} failed error: {why}"
                );
                self.recorder.event(set, EventType::Warning, "FailedCreate", message);
                Err(error)
            }
        }
    }

    /// Sees to it that claims are owned by whom the retention policy says. Runs before a pod is deleted.
    pub(super) async fn keep_claims_owned(
        &self,
        set: &StatefulSet,
        pods: &BTreeMap<i32, Arc<Pod>>,
    ) -> Result<()> {
        for (ordinal, pod) in pods {
            // Also one that is on its way out already: its claims must not fall back to the set meanwhile.
            let leaves = !plan::range(set).contains(ordinal);
            for name in wanted(set, *ordinal).iter().map(ObjectKey::of) {
                let Some(claim) = self.claims.get_key(&name) else { continue };
                let owners = owners(set, pod, leaves, &claim);
                if claim.metadata.owner_references.clone().unwrap_or_default() != owners {
                    let change = json!({"metadata": {
                        "uid": claim.metadata.uid, "resourceVersion": claim.metadata.resource_version,
                        "ownerReferences": owners,
                    }});
                    ignore_gone(patch::merge(&self.claim_api(set), &name.name, change).await)?;
                }
            }
        }
        Ok(())
    }
}

/// The claims of one place.
fn wanted(set: &StatefulSet, ordinal: i32) -> Vec<PersistentVolumeClaim> {
    let Some(spec) = &set.spec else { return Vec::new() };
    let templates = spec.volume_claim_templates.iter().flatten();
    let claim = |template: &PersistentVolumeClaim| {
        let mut claim = template.clone();
        let name = template.metadata.name.as_deref().unwrap_or_default();
        claim.metadata.name = Some(identity::claim_name(set, name, ordinal));
        claim.metadata.namespace = set.metadata.namespace.clone();
        let labels = spec.selector.match_labels.clone().unwrap_or_default();
        claim.metadata.labels.get_or_insert_default().extend(labels);
        claim.status = None;
        claim
    };
    templates.map(claim).collect()
}

/// A claim that goes with a pod of this name which is gone: it is being collected and must not be used again.
fn belongs_to_a_former_pod(claim: &PersistentVolumeClaim, set: &StatefulSet, ordinal: i32) -> bool {
    let name = identity::pod_name(set, ordinal);
    let owners = claim.metadata.owner_references.iter().flatten();
    owners.filter(|reference| reference.kind == "Pod").any(|reference| reference.name == name)
}

/// The owners the policy wants: those of others stay. A claim goes with its set when that is deleted
/// (`whenDeleted`), with its pod when that leaves because the set shrinks (`whenScaled`).
fn owners(set: &StatefulSet, pod: &Pod, leaves: bool, claim: &PersistentVolumeClaim) -> Vec<OwnerReference> {
    let policy = set.spec.as_ref().and_then(|spec| spec.persistent_volume_claim_retention_policy.as_ref());
    let deletes = |when: Option<&String>| when.is_some_and(|when| when == "Delete");
    let when_deleted = deletes(policy.and_then(|policy| policy.when_deleted.as_ref()));
    let when_scaled = deletes(policy.and_then(|policy| policy.when_scaled.as_ref()));
    let mut owners = claim.metadata.owner_references.clone().unwrap_or_default();
    let (set_uid, pod_name) = (crate::pods::uid(&set.metadata), pod.metadata.name.as_deref());
    let ours = |reference: &OwnerReference| {
        reference.uid == set_uid || (reference.kind == "Pod" && Some(reference.name.as_str()) == pod_name)
    };
    let mut wanted = Vec::new();
    if leaves && when_scaled {
        wanted.push(owner::owner_ref(pod));
    } else if when_deleted {
        wanted.push(owner::controller_ref(set));
    }
    let present: Vec<_> = owners.iter().filter(|reference| ours(reference)).collect();
    let same = present.len() == wanted.len()
        && present.iter().zip(&wanted).all(|(present, wanted)| present.uid == wanted.uid);
    if !same {
        owners.retain(|reference| !ours(reference));
        owners.extend(wanted);
    }
    owners
}
