//! The patch of a client-side apply: from what was applied last, what is wanted now and what the server has.
//!
//! What both sides agree on is left out; fields the last manifest had and this one has not are deleted; fields
//! only the server has stay. Built-in kinds merge by the schema's patch strategies, others as a merge patch.

use knarr_api::object::Object;
use knarr_api::schema::{Field, Schema, TypeId};
use serde_json::{Map, Value, json};

/// Where the last applied manifest is kept.
pub const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// The schema's type for objects of this apiVersion and kind; none for custom resources.
pub fn type_of(api_version: &str, kind: &str) -> Option<TypeId> {
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    Schema::builtin().kind(group, version, kind).map(|k| k.type_id)
}

/// The manifest with itself in the annotation, as it is sent to the server.
pub fn with_last_applied(object: &Value) -> Value {
    let mut bare = object.clone();
    bare.remove_at(&format!("metadata.annotations.{LAST_APPLIED}"));
    let mut annotations = bare.map_at("metadata.annotations").cloned().unwrap_or_default();
    annotations.remove(LAST_APPLIED);
    bare.set_at("metadata.annotations", Value::Object(annotations.clone()));
    let mut result = bare.clone();
    annotations.insert(LAST_APPLIED.into(), format!("{bare}\n").into());
    result.set_at("metadata.annotations", Value::Object(annotations));
    result
}

/// The manifest applied last, if the object has one.
pub fn last_applied(current: &Value) -> Option<Value> {
    let text = current.map_at("metadata.annotations")?.get(LAST_APPLIED)?.as_str()?;
    serde_json::from_str(text).ok()
}

/// The patch that leads from `current` to `modified`; an empty object if there is nothing to do.
pub fn three_way(type_id: Option<TypeId>, original: &Value, modified: &Value, current: &Value) -> Value {
    let empty = Map::new();
    let map = |value: &Value| value.as_object().unwrap_or(&empty).clone();
    Value::Object(objects(type_id, &map(original), &map(modified), &map(current)))
}

fn objects(
    type_id: Option<TypeId>,
    original: &Map<String, Value>,
    modified: &Map<String, Value>,
    current: &Map<String, Value>,
) -> Map<String, Value> {
    let mut patch = Map::new();
    for (name, wanted) in modified {
        let field = type_id.and_then(|id| Schema::builtin().type_of(id).field(name));
        add_field(&mut patch, name, field, original.get(name), wanted, current.get(name));
    }
    for name in original.keys().filter(|n| !modified.contains_key(*n) && current.contains_key(*n)) {
        patch.insert(name.clone(), Value::Null);
    }
    patch
}

fn add_field(
    patch: &mut Map<String, Value>,
    name: &str,
    field: Option<&Field>,
    original: Option<&Value>,
    wanted: &Value,
    current: Option<&Value>,
) {
    let empty = Map::new();
    match (wanted, current) {
        (Value::Null, None | Some(Value::Null)) => {}
        (wanted, None) => {
            patch.insert(name.into(), wanted.clone());
        }
        (Value::Object(wanted), Some(Value::Object(current))) => {
            let original = original.and_then(Value::as_object).unwrap_or(&empty);
            let mut inner = objects(field.and_then(Field::object_type), original, wanted, current);
            if !inner.is_empty() {
                if field.is_some_and(|f| f.retain_keys) {
                    inner.insert("$retainKeys".into(), retained(wanted));
                }
                patch.insert(name.into(), Value::Object(inner));
            }
        }
        (Value::Array(wanted), Some(Value::Array(current))) => {
            let original = original.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
            lists(patch, name, field, original, wanted, current);
        }
        (wanted, Some(current)) if wanted != current => {
            patch.insert(name.into(), wanted.clone());
        }
        _ => {}
    }
}

fn retained(wanted: &Map<String, Value>) -> Value {
    json!(wanted.iter().filter(|(_, v)| !v.is_null()).map(|(k, _)| k).collect::<Vec<_>>())
}

fn lists(
    patch: &mut Map<String, Value>,
    name: &str,
    field: Option<&Field>,
    original: &[Value],
    wanted: &[Value],
    current: &[Value],
) {
    match field.and_then(|f| Some((f, f.merge.as_ref()?))) {
        None if wanted != current => {
            patch.insert(name.into(), wanted.into());
        }
        None => {}
        Some((field, merge)) => match &merge.key {
            Some(key) => keyed(patch, name, field, key, original, wanted, current),
            None => primitives(patch, name, original, wanted, current),
        },
    }
}

fn keyed(
    patch: &mut Map<String, Value>,
    name: &str,
    field: &Field,
    key: &str,
    original: &[Value],
    wanted: &[Value],
    current: &[Value],
) {
    let of = |list: &'_ [Value], value: &Value| list.iter().find(|i| i.get(key) == value.get(key)).cloned();
    let empty = Map::new();
    let mut changes = Vec::new();
    for item in wanted {
        let Some(there) = of(current, item) else {
            changes.push(item.clone());
            continue;
        };
        let (Some(item_map), Some(there)) = (item.as_object(), there.as_object()) else { continue };
        let before = of(original, item);
        let before = before.as_ref().and_then(Value::as_object).unwrap_or(&empty);
        let mut change = objects(field.object_type(), before, item_map, there);
        if change.is_empty() {
            continue;
        }
        if field.retain_keys {
            change.insert("$retainKeys".into(), retained(item_map));
        }
        change.insert(key.into(), item[key].clone());
        changes.push(Value::Object(change));
    }
    for gone in original.iter().filter(|o| of(wanted, o).is_none() && of(current, o).is_some()) {
        changes.push(json!({ "$patch": "delete", key: gone[key] }));
    }
    let keys = |list: &[Value]| -> Vec<Value> { list.iter().map(|i| i[key].clone()).collect() };
    if changes.is_empty() && in_order(&keys(wanted), &keys(current)) {
        return;
    }
    let order: Vec<Value> = wanted.iter().map(|i| json!({ key: i[key] })).collect();
    patch.insert(format!("$setElementOrder/{name}"), order.into());
    if !changes.is_empty() {
        patch.insert(name.into(), changes.into());
    }
}

fn primitives(
    patch: &mut Map<String, Value>,
    name: &str,
    original: &[Value],
    wanted: &[Value],
    current: &[Value],
) {
    let added: Vec<Value> = wanted.iter().filter(|v| !current.contains(v)).cloned().collect();
    let gone: Vec<Value> =
        original.iter().filter(|v| !wanted.contains(v) && current.contains(v)).cloned().collect();
    if added.is_empty() && gone.is_empty() && in_order(wanted, current) {
        return;
    }
    patch.insert(format!("$setElementOrder/{name}"), wanted.into());
    if !added.is_empty() {
        patch.insert(name.into(), added.into());
    }
    if !gone.is_empty() {
        patch.insert(format!("$deleteFromPrimitiveList/{name}"), gone.into());
    }
}

/// Do the wanted items stand in this order among the current ones?
fn in_order(wanted: &[Value], current: &[Value]) -> bool {
    let mut rest = current.iter();
    wanted.iter().all(|w| rest.any(|c| c == w))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The server's own patching brings `current` to what is expected.
    fn check(original: Value, modified: Value, current: Value, patch: Value, result: Value) {
        let type_id = type_of("apps/v1", "Deployment");
        let made = three_way(type_id, &original, &modified, &current);
        assert_eq!(made, patch);
        let patched =
            knarr_api::patch::strategic_value(Schema::builtin(), type_id.expect("built in"), current, made);
        assert_eq!(patched.expect("applies"), result);
    }

    fn pod(spec: Value) -> Value {
        json!({"spec":{"template":{"spec":spec}}})
    }

    #[test]
    fn what_the_server_added_stays_and_nothing_is_sent() {
        let mine = pod(json!({"containers":[{"name":"a","image":"x"}]}));
        let theirs = json!({"status":{"replicas":1},"spec":{"replicas":1,"template":{"spec":{
            "restartPolicy":"Always","containers":[{"name":"a","image":"x","imagePullPolicy":"Always"}]}}}});
        check(mine.clone(), mine, theirs.clone(), json!({}), theirs);
    }

    #[test]
    fn changed_fields_are_sent_by_merge_key() {
        check(
            pod(json!({"containers":[{"name":"a","image":"x"}]})),
            pod(json!({"containers":[{"name":"a","image":"y"}]})),
            pod(json!({"containers":[{"name":"a","image":"x","tty":true},{"name":"side"}]})),
            pod(
                json!({"$setElementOrder/containers":[{"name":"a"}],"containers":[{"name":"a","image":"y"}]}),
            ),
            pod(json!({"containers":[{"name":"a","image":"y","tty":true},{"name":"side"}]})),
        );
    }

    #[test]
    fn what_the_manifest_dropped_is_deleted() {
        check(
            json!({"metadata":{"labels":{"a":"1","b":"2"}},"spec":{"template":{"spec":{"containers":[{"name":"a"},{"name":"b"}]}}}}),
            json!({"metadata":{"labels":{"a":"1"}},"spec":{"template":{"spec":{"containers":[{"name":"a"}]}}}}),
            json!({"metadata":{"labels":{"a":"1","b":"2","c":"3"}},"spec":{"template":{"spec":{"containers":[{"name":"a"},{"name":"b"}]}}}}),
            json!({"metadata":{"labels":{"b":null}},"spec":{"template":{"spec":{
                "$setElementOrder/containers":[{"name":"a"}],"containers":[{"$patch":"delete","name":"b"}]}}}}),
            json!({"metadata":{"labels":{"a":"1","c":"3"}},"spec":{"template":{"spec":{"containers":[{"name":"a"}]}}}}),
        );
    }

    #[test]
    fn a_volume_that_changes_its_source_drops_the_old_one() {
        let volume = |v: Value| pod(json!({"volumes":[v]}));
        let from = volume(json!({"name":"v","emptyDir":{}}));
        check(
            from.clone(),
            volume(json!({"name":"v","hostPath":{"path":"/x"}})),
            from,
            pod(json!({"$setElementOrder/volumes":[{"name":"v"}],
                "volumes":[{"name":"v","hostPath":{"path":"/x"},"emptyDir":null,"$retainKeys":["hostPath","name"]}]})),
            volume(json!({"name":"v","hostPath":{"path":"/x"}})),
        );
    }

    #[test]
    fn the_annotation_holds_the_manifest_without_itself() {
        let object =
            json!({"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"x","namespace":"default"}});
        let sent = with_last_applied(&object);
        let text = sent["metadata"]["annotations"][LAST_APPLIED].as_str().expect("is there");
        assert_eq!(
            text,
            "{\"apiVersion\":\"v1\",\"kind\":\"ConfigMap\",\"metadata\":{\"annotations\":{},\"name\":\"x\",\"namespace\":\"default\"}}\n"
        );
        assert_eq!(with_last_applied(&sent), sent);
    }

    #[test]
    fn custom_resources_merge_as_json() {
        let patch =
            three_way(None, &json!({"a":1,"b":[1]}), &json!({"b":[2]}), &json!({"a":1,"b":[1],"c":3}));
        assert_eq!(patch, json!({"a":null,"b":[2]}));
    }
}
