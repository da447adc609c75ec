//! Owner references: who controls an object, adoption of orphans that match, release of children that no longer do.

use crate::{During, ObjectKey, Result, ignore_gone};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::api::{Api, Patch, PatchParams};
use kube::{Client, Resource};
use serde::de::DeserializeOwned;
use serde_json::json;
use std::fmt::Debug;

/// The reference a child carries to its controller `owner`.
pub fn controller_ref<K>(owner: &K) -> OwnerReference
where
    K: Resource<DynamicType = ()>,
{
    OwnerReference { controller: Some(true), block_owner_deletion: Some(true), ..owner_ref(owner) }
}

/// A plain reference to `owner`.
pub fn owner_ref<K>(owner: &K) -> OwnerReference
where
    K: Resource<DynamicType = ()>,
{
    let meta = owner.meta();
    OwnerReference {
        api_version: K::api_version(&()).into_owned(),
        kind: K::kind(&()).into_owned(),
        name: meta.name.clone().unwrap_or_default(),
        uid: meta.uid.clone().unwrap_or_default(),
        controller: None,
        block_owner_deletion: None,
    }
}

/// The one reference with `controller: true`.
pub fn controller_of(meta: &ObjectMeta) -> Option<&OwnerReference> {
    meta.owner_references.iter().flatten().find(|reference| reference.controller == Some(true))
}

/// Whether `owner` (by uid) controls the object.
pub fn is_controlled_by(meta: &ObjectMeta, owner_uid: &str) -> bool {
    controller_of(meta).is_some_and(|reference| reference.uid == owner_uid)
}

/// The key of the controller, if it is of kind `K` (any version of its group).
pub fn controller_key<K>(meta: &ObjectMeta) -> Option<ObjectKey>
where
    K: Resource<DynamicType = ()>,
{
    let reference = controller_of(meta)?;
    let group = reference.api_version.rsplit_once('/').map_or("", |(group, _)| group);
    if reference.kind != K::kind(&()) || group != K::group(&()) {
        return None;
    }
    Some(ObjectKey::new(meta.namespace.clone().unwrap_or_default(), reference.name.clone()))
}

/// Index values for `by_index`: the uid of the controller, or the empty string for an object without one.
pub fn controller_uid_index<K: Resource>(object: &K) -> Vec<String> {
    vec![controller_of(object.meta()).map_or(String::new(), |reference| reference.uid.clone())]
}

/// What to do with an object a controller found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// It is ours already.
    Keep,
    /// It matches and has no controller: take it.
    Adopt,
    /// It is ours but no longer matches: let go.
    Release,
    /// Not our business.
    Ignore,
}

/// Upstream's rule (`controller_ref_manager.go`): an owner that is being deleted adopts nothing and releases
/// nothing; an object that is being deleted is not adopted.
pub fn claim(owner: &ObjectMeta, object: &ObjectMeta, matches: bool) -> Claim {
    let deleting = owner.deletion_timestamp.is_some();
    match controller_of(object) {
        Some(reference) if Some(&reference.uid) != owner.uid.as_ref() => Claim::Ignore,
        Some(_) if matches => Claim::Keep,
        Some(_) if deleting => Claim::Ignore,
        Some(_) => Claim::Release,
        None if deleting || !matches || object.deletion_timestamp.is_some() => Claim::Ignore,
        None if object.namespace != owner.namespace => Claim::Ignore,
        None => Claim::Adopt,
    }
}

/// Makes `owner` the controller of `child`. Fails with a conflict when `child` changed meanwhile.
pub async fn adopt<O, K>(client: &Client, owner: &O, child: &K) -> Result<K>
where
    O: Resource<DynamicType = ()>,
    K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + DeserializeOwned
        + Debug,
{
    let key = ObjectKey::of(child);
    let mut references = child.meta().owner_references.clone().unwrap_or_default();
    references.push(controller_ref(owner));
    let patch = json!({"metadata": {
        "uid": child.meta().uid, "resourceVersion": child.meta().resource_version, "ownerReferences": references,
    }});
    let api: Api<K> = Api::namespaced(client.clone(), &key.namespace);
    api.patch(&key.name, &PatchParams::default(), &Patch::Merge(patch))
        .await
        .during(|| format!("adopt {} {key}", K::kind(&())))
}

/// Removes `owner_uid` from `child`'s owners. A child that is gone or no longer ours needs no release.
pub async fn release<K>(client: &Client, owner_uid: &str, child: &K) -> Result<()>
where
    K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + DeserializeOwned
        + Debug,
{
    let key = ObjectKey::of(child);
    let mut references = child.meta().owner_references.clone().unwrap_or_default();
    references.retain(|reference| reference.uid != owner_uid);
    let patch = json!({"metadata": {
        "uid": child.meta().uid, "resourceVersion": child.meta().resource_version, "ownerReferences": references,
    }});
    let api: Api<K> = Api::namespaced(client.clone(), &key.namespace);
    let released = api.patch(&key.name, &PatchParams::default(), &Patch::Merge(patch)).await;
    ignore_gone(released.during(|| format!("release {} {key}", K::kind(&()))))
}
