//! What a deployment writes on its sets: revision and its history, the sizes at the last scaling, and copies of its
//! own annotations (among them the change-cause).

use super::scale::max_surge;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

pub const REVISION: &str = "deployment.kubernetes.io/revision";
const HISTORY: &str = "deployment.kubernetes.io/revision-history";
pub const DESIRED: &str = "deployment.kubernetes.io/desired-replicas";
pub const MAX: &str = "deployment.kubernetes.io/max-replicas";
/// Never copied from the deployment to its sets.
const OWN: [&str; 6] = [
    "kubectl.kubernetes.io/last-applied-configuration",
    REVISION,
    HISTORY,
    DESIRED,
    MAX,
    "deprecated.deployment.rollback.to",
];
/// Longer histories lose their oldest revisions.
const HISTORY_LEN_MAX: usize = 2000;

pub fn get<'a>(meta: &'a ObjectMeta, name: &str) -> Option<&'a str> {
    meta.annotations.as_ref()?.get(name).map(String::as_str)
}

fn put(meta: &mut ObjectMeta, name: &str, value: String) {
    meta.annotations.get_or_insert_default().insert(name.to_owned(), value);
}

/// The revision a set carries; zero without one.
pub fn revision(set: &ReplicaSet) -> i64 {
    get(&set.metadata, REVISION).and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// Makes `set` the one of `revision`: copies annotations, raises its revision (remembering the one it had), and,
/// for a set about to be created, notes the sizes.
pub fn set_on_new(deployment: &Deployment, set: &mut ReplicaSet, revision: i64, exists: bool) {
    for (name, value) in deployment.metadata.annotations.iter().flatten() {
        if !OWN.contains(&name.as_str()) {
            put(&mut set.metadata, name, value.clone());
        }
    }
    let old = get(&set.metadata, REVISION).map(str::to_owned);
    if old.as_deref().and_then(|text| text.parse::<i64>().ok()).unwrap_or(0) < revision {
        put(&mut set.metadata, REVISION, revision.to_string());
        if let Some(old) = old {
            remember(&mut set.metadata, &old);
        }
    }
    if !exists {
        note_sizes(deployment, set);
    }
}

fn remember(meta: &mut ObjectMeta, revision: &str) {
    let mut revisions: Vec<String> =
        get(meta, HISTORY).map(|text| text.split(',').map(str::to_owned).collect()).unwrap_or_default();
    revisions.push(revision.to_owned());
    while revisions.len() > 1 && revisions.iter().map(|text| text.len() + 1).sum::<usize>() > HISTORY_LEN_MAX
    {
        revisions.remove(0);
    }
    put(meta, HISTORY, revisions.join(","));
}

/// Notes the wished and the largest size, from which later scaling computes proportions.
pub fn note_sizes(deployment: &Deployment, set: &mut ReplicaSet) {
    let desired = super::replicas(deployment);
    put(&mut set.metadata, DESIRED, desired.to_string());
    put(&mut set.metadata, MAX, (desired + max_surge(deployment)).to_string());
}

/// The number in annotation `name`.
pub fn number(set: &ReplicaSet, name: &str) -> Option<i32> {
    get(&set.metadata, name)?.parse().ok()
}
