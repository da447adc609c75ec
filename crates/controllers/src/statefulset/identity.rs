//! What makes a pod the n-th of its set: name, host name, labels, volumes.

use crate::history::{self, REVISION_LABEL};
use k8s_openapi::api::apps::v1::{ControllerRevision, StatefulSet};
use k8s_openapi::api::core::v1::{PersistentVolumeClaimVolumeSource, Pod, PodTemplateSpec, Volume};
use knarr_client::owner;
use std::collections::BTreeMap;

const NAME_LABEL: &str = "statefulset.kubernetes.io/pod-name";
const INDEX_LABEL: &str = "apps.kubernetes.io/pod-index";

pub fn pod_name(set: &StatefulSet, ordinal: i32) -> String {
    format!("{}-{ordinal}", set.metadata.name.as_deref().unwrap_or_default())
}

/// The pod's place in `set`, if its name says that it has one there.
pub fn ordinal_in(set: &StatefulSet, pod: &Pod) -> Option<i32> {
    let (parent, ordinal) = pod.metadata.name.as_deref()?.rsplit_once('-')?;
    let digits = !ordinal.is_empty() && ordinal.bytes().all(|byte| byte.is_ascii_digit());
    (digits && Some(parent) == set.metadata.name.as_deref()).then(|| ordinal.parse().ok()).flatten()
}

/// The name of a pod's claim for one of the set's templates.
pub fn claim_name(set: &StatefulSet, template: &str, ordinal: i32) -> String {
    format!("{template}-{}", pod_name(set, ordinal))
}

/// The labels that name a pod of a set.
pub fn labels(pod_name: &str, ordinal: i32) -> BTreeMap<String, String> {
    [(NAME_LABEL, pod_name.to_owned()), (INDEX_LABEL, ordinal.to_string())]
        .map(|(label, value)| (label.to_owned(), value))
        .into()
}

pub fn is_labelled(pod: &Pod, ordinal: i32) -> bool {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let present = pod.metadata.labels.as_ref();
    labels(name, ordinal).iter().all(|(label, value)| present.and_then(|l| l.get(label)) == Some(value))
}

/// The pod for a place, of the template that `revision` holds.
pub fn pod(set: &StatefulSet, revision: &ControllerRevision, ordinal: i32) -> Pod {
    let name = pod_name(set, ordinal);
    let present = || set.spec.as_ref().map(|spec| spec.template.clone());
    let template: PodTemplateSpec = history::template_of(revision).or_else(present).unwrap_or_default();
    let mut pod = crate::pods::from_template(&template, &set.metadata, owner::controller_ref(set));
    pod.metadata.generate_name = Some(format!("{}-", set.metadata.name.as_deref().unwrap_or_default()));
    pod.metadata.name = Some(name.clone());
    let labels_of = pod.metadata.labels.get_or_insert_default();
    labels_of.extend(labels(&name, ordinal));
    labels_of.insert(REVISION_LABEL.to_owned(), history::name_of(revision).to_owned());
    if let Some(spec) = &mut pod.spec {
        spec.hostname = Some(name);
        spec.subdomain = set.spec.as_ref().and_then(|spec| spec.service_name.clone());
        give_volumes(set, ordinal, spec.volumes.get_or_insert_default());
    }
    pod
}

/// A volume of a claim takes the place of one of the same name in the template.
fn give_volumes(set: &StatefulSet, ordinal: i32, volumes: &mut Vec<Volume>) {
    let templates = set.spec.iter().flat_map(|spec| spec.volume_claim_templates.iter().flatten());
    for name in templates.filter_map(|template| template.metadata.name.as_deref()) {
        volumes.retain(|volume| volume.name != name);
        volumes.push(Volume {
            name: name.to_owned(),
            persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
                claim_name: claim_name(set, name, ordinal),
                read_only: Some(false),
            }),
            ..Default::default()
        });
    }
}
