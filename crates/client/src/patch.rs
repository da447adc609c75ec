//! Small writes: finalizers, status, and the retry on conflict.

use crate::{During, Error, ObjectKey, Result};
use kube::Resource;
use kube::api::{Api, Patch, PatchParams};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::fmt::Debug;
use std::future::Future;

/// How often a conflicting write is tried in place before the loop's back-off takes over.
pub const CONFLICT_TRIES_MAX: usize = 5;

/// Calls `attempt` (which must read afresh and write) until it does not end in a conflict.
pub async fn retry_on_conflict<T, F>(mut attempt: impl FnMut() -> F) -> Result<T>
where
    F: Future<Output = Result<T>>,
{
    for _ in 1..CONFLICT_TRIES_MAX {
        match attempt().await {
            Err(error) if error.is_conflict() => {}
            result => return result,
        }
    }
    attempt().await
}

/// A finalizer change as a JSON merge patch bound to the version of the object it was computed from: a list is
/// replaced as a whole, so a concurrent change must be a conflict.
fn finalizers_patch<K: Resource>(object: &K, finalizers: Vec<String>) -> Value {
    let meta = object.meta();
    json!({"metadata": {
        "uid": meta.uid, "resourceVersion": meta.resource_version, "finalizers": finalizers,
    }})
}

/// Takes `finalizer` off `object`; `Ok(None)` when there is nothing to do.
pub async fn remove_finalizer<K>(api: &Api<K>, object: &K, finalizer: &str) -> Result<Option<K>>
where
    K: Resource + Clone + DeserializeOwned + Debug,
{
    let mut finalizers = object.meta().finalizers.clone().unwrap_or_default();
    let before = finalizers.len();
    finalizers.retain(|entry| entry != finalizer);
    if finalizers.len() == before {
        return Ok(None);
    }
    let key = ObjectKey::of(object);
    let patch = finalizers_patch(object, finalizers);
    let patched = api.patch(&key.name, &PatchParams::default(), &Patch::Merge(patch)).await;
    match patched.during(|| format!("remove finalizer {finalizer} from {key}")) {
        Ok(object) => Ok(Some(object)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Merge-patches `object`'s metadata or spec.
pub async fn merge<K>(api: &Api<K>, name: &str, patch: Value) -> Result<K>
where
    K: Resource + Clone + DeserializeOwned + Debug,
{
    api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await.during(|| format!("patch {name}"))
}

/// Replaces `object`'s status with what the caller put into it (its resource version guards the write).
pub async fn update_status<K>(api: &Api<K>, object: &K) -> Result<K>
where
    K: Resource + Clone + DeserializeOwned + Serialize + Debug,
{
    let key = ObjectKey::of(object);
    api.replace_status(&key.name, &Default::default(), object)
        .await
        .during(|| format!("update status of {key}"))
}

/// Whether an error is final for a single create: the namespace goes away, or the object is not acceptable.
pub fn is_final_for_create(error: &Error) -> bool {
    error.is_namespace_terminating() || error.is_code(422)
}

/// The JSON merge patch that turns `old` into `new`: `Null` where nothing differs.
pub fn merge_diff(old: &Value, new: &Value) -> Value {
    let (Value::Object(old_fields), Value::Object(new_fields)) = (old, new) else {
        return if old == new { Value::Null } else { new.clone() };
    };
    let mut patch = serde_json::Map::new();
    for name in old_fields.keys().filter(|name| !new_fields.contains_key(*name)) {
        patch.insert(name.clone(), Value::Null);
    }
    for (name, value) in new_fields {
        match old_fields.get(name) {
            None => _ = patch.insert(name.clone(), value.clone()),
            Some(before) if before == value => {}
            Some(before) => _ = patch.insert(name.clone(), merge_diff(before, value)),
        }
    }
    if patch.is_empty() { Value::Null } else { Value::Object(patch) }
}

/// How a status write is protected from others' writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guard {
    /// Only if it is still the same object: for a status with one writer, whose value does not depend on counting.
    Uid,
    /// Only if nothing changed since it was read.
    Version,
}

/// Writes `new` as the status of `object` if it differs from `old`. `Ok(None)` when there was nothing to write.
pub async fn write_status<K, S>(
    api: &Api<K>,
    object: &K,
    old: &Option<S>,
    new: &S,
    guard: Guard,
) -> Result<Option<K>>
where
    K: Resource + Clone + DeserializeOwned + Debug,
    S: Serialize,
{
    let key = ObjectKey::of(object);
    let json = |value: serde_json::Result<Value>| {
        value.map_err(|error| Error::terminal(format!("encode status of {key}"), error.to_string()))
    };
    let before = match old {
        Some(status) => json(serde_json::to_value(status))?,
        None => json!({}),
    };
    let status = merge_diff(&before, &json(serde_json::to_value(new))?);
    if status.is_null() {
        return Ok(None);
    }
    let meta = object.meta();
    let mut patch = json!({"metadata": {"uid": meta.uid}, "status": status});
    if guard == Guard::Version {
        patch["metadata"]["resourceVersion"] = json!(meta.resource_version);
    }
    let patched = api.patch_status(&key.name, &PatchParams::default(), &Patch::Merge(patch)).await;
    patched.map(Some).during(|| format!("write status of {key}"))
}
