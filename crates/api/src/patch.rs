//! The three classic patches: JSON patch (RFC 6902), merge patch (RFC 7386) and Kubernetes' strategic merge.
//!
//! Strategic merge is driven by the schema: lists with `patchStrategy: merge` merge by their key. The
//! directives `$patch`, `$retainKeys`, `$setElementOrder/x` and `$deleteFromPrimitiveList/x` are honoured.
//! See "strategic-merge-patch.md" of the Kubernetes contributor documentation.

use serde_json::{Map, Value, json};

use crate::schema::{Field, Schema, Shape, TypeId};
use crate::status::{Result, Status};

/// How many operations one JSON patch may hold; upstream's limit.
pub const JSON_PATCH_OPERATIONS_MAX: usize = 10_000;

/// Applies a JSON patch document.
pub fn json(target: &Value, patch: &[u8]) -> Result<Value> {
    let parsed: Value = serde_json::from_slice(patch)
        .map_err(|e| Status::bad_request(format!("error decoding patch: {e}")))?;
    let Value::Array(operations) = &parsed else {
        let found = if parsed.is_object() { "object" } else { "value" };
        return Err(Status::bad_request(format!(
            "json: cannot unmarshal {found} into Go value of type jsonpatch.Patch"
        )));
    };
    if operations.len() > JSON_PATCH_OPERATIONS_MAX {
        let count = operations.len();
        return Err(Status::new(
            413,
            "RequestEntityTooLarge",
            format!(
                "The allowed maximum operations in a JSON patch is {JSON_PATCH_OPERATIONS_MAX}, got {count}"
            ),
        ));
    }
    let operations: json_patch::Patch = serde_json::from_value(parsed)
        .map_err(|e| Status::new(422, "Invalid", format!("error decoding patch: {e}")))?;
    let operations = replace_adds(operations);
    let mut result = target.clone();
    let mut copied = 0;
    for operation in &operations.0 {
        check_growth(&result, operation, &mut copied)?;
        json_patch::patch(&mut result, std::slice::from_ref(operation))
            .map_err(|error| does_not_apply(operation, &error))?;
    }
    Ok(result)
}

/// So much may the copies of one JSON patch add; upstream's limit.
pub const JSON_PATCH_COPY_BYTES_MAX: usize = 3 << 20;
/// Nothing is nested deeper: whoever walks an object may do so by recursion. JSON readers stop at half of it.
pub const DEPTH_MAX: usize = 256;

/// A small patch must not make a large or a deep object: each copy may double it.
fn check_growth(target: &Value, operation: &json_patch::PatchOperation, copied: &mut usize) -> Result<()> {
    use json_patch::PatchOperation::{Add, Copy, Move, Replace};
    let (place, value, copies) = match operation {
        Add(add) => (&add.path, Some(&add.value), false),
        Replace(replace) => (&replace.path, Some(&replace.value), false),
        Copy(copy) => (&copy.path, target.pointer(copy.from.as_str()), true),
        Move(moved) => (&moved.path, target.pointer(moved.from.as_str()), false),
        _ => return Ok(()),
    };
    let Some(value) = value else { return Ok(()) };
    if place.count() + depth(value) > DEPTH_MAX {
        let text = format!("the patch nests values deeper than {DEPTH_MAX} levels");
        return Err(Status::new(422, "Invalid", text));
    }
    if copies {
        *copied += value.to_string().len();
        if *copied > JSON_PATCH_COPY_BYTES_MAX {
            return Err(Status::new(
                413,
                "RequestEntityTooLarge",
                format!(
                    "Unable to complete the copy, the accumulated size increase of copy is {copied}, exceeding the limit {JSON_PATCH_COPY_BYTES_MAX}"
                ),
            ));
        }
    }
    Ok(())
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(map) => 1 + map.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

fn does_not_apply(operation: &json_patch::PatchOperation, error: &json_patch::PatchError) -> Box<Status> {
    let what = match error.kind {
        json_patch::PatchErrorKind::TestFailed => {
            format!("testing value {} failed: test failed", error.path)
        }
        _ => format!(
            "{} operation does not apply: doc is missing path: {:?}: missing value",
            operation_name(operation),
            error.path.to_string()
        ),
    };
    let mut status =
        Status::new(422, "Invalid", "the server rejected our request due to an error in our request");
    let cause = serde_json::json!({ "reason": "UnexpectedServerResponse", "message": what });
    status.details = Some(serde_json::json!({ "causes": [cause] }));
    status
}

/// Upstream's library replaces map entries that are not there yet; only the map must be.
fn replace_adds(mut patch: json_patch::Patch) -> json_patch::Patch {
    use json_patch::PatchOperation::{Add, Replace};
    for operation in &mut patch.0 {
        let Replace(replace) = operation else { continue };
        let in_map = replace.path.tokens().last().is_some_and(|t| {
            let name = t.decoded();
            name != "-" && name.parse::<usize>().is_err()
        });
        if in_map {
            *operation =
                Add(json_patch::AddOperation { path: replace.path.clone(), value: replace.value.clone() });
        }
    }
    patch
}

fn operation_name(operation: &json_patch::PatchOperation) -> &'static str {
    use json_patch::PatchOperation::*;
    match operation {
        Add(_) => "add",
        Remove(_) => "remove",
        Replace(_) => "replace",
        Move(_) => "move",
        Copy(_) => "copy",
        Test(_) => "test",
    }
}

/// Applies a merge patch: objects merge, null deletes, everything else replaces.
pub fn merge(target: &Value, patch: &[u8]) -> Result<Value> {
    let patch = parse_object(patch)?;
    let mut result = target.clone();
    json_patch::merge(&mut result, &patch);
    Ok(result)
}

/// Applies a strategic merge patch to an object of the type.
pub fn strategic(schema: &Schema, type_id: TypeId, target: &Value, patch: &[u8]) -> Result<Value> {
    let patch = parse_object(patch)?;
    strategic_value(schema, type_id, target.clone(), patch)
}

/// The same, on trees.
pub fn strategic_value(schema: &Schema, type_id: TypeId, target: Value, patch: Value) -> Result<Value> {
    Strategic { schema }.object(Some(type_id), target, patch)
}

fn parse_object(patch: &[u8]) -> Result<Value> {
    let value: Value = serde_json::from_slice(patch)
        .map_err(|e| Status::bad_request(format!("error decoding patch: {e}")))?;
    if !value.is_object() {
        return Err(Status::bad_request("error decoding patch: the patch is not an object"));
    }
    Ok(value)
}

struct Strategic<'s> {
    schema: &'s Schema,
}

const DIRECTIVE: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const SET_ORDER: &str = "$setElementOrder/";
const DELETE_PRIMITIVES: &str = "$deleteFromPrimitiveList/";

impl Strategic<'_> {
    /// Merges `patch` into `target`; without a type, everything merges as a merge patch would.
    fn object(&self, type_id: Option<TypeId>, target: Value, patch: Value) -> Result<Value> {
        let Value::Object(mut patch) = patch else { return Ok(patch) };
        match patch.remove(DIRECTIVE).as_ref().map(|d| d.as_str().unwrap_or_default()) {
            None | Some("merge") => {}
            Some("replace") => return Ok(Value::Object(patch)),
            Some("delete") => return Ok(Value::Object(Map::new())),
            Some(other) => {
                return Err(Status::bad_request(format!("unknown patch type found: {other}")));
            }
        }
        let mut result = if let Value::Object(map) = target { map } else { Map::new() };
        if let Some(Value::Array(keep)) = patch.remove(RETAIN_KEYS) {
            result.retain(|key, _| keep.iter().any(|k| k == key));
        }
        let (directives, plain): (Vec<_>, Vec<_>) = patch.into_iter().partition(|(k, _)| k.starts_with('$'));
        let directives: Map<String, Value> = directives.into_iter().collect();
        for (name, value) in
            directives.iter().filter_map(|(k, v)| Some((k.strip_prefix(DELETE_PRIMITIVES)?, v)))
        {
            if let (Some(Value::Array(items)), Value::Array(gone)) = (result.get_mut(name), value) {
                items.retain(|item| !gone.contains(item));
            }
        }
        let mut ordered: Vec<String> = Vec::new();
        for (name, value) in plain {
            if value.is_null() {
                result.remove(&name);
                continue;
            }
            let order = directives.get(&format!("{SET_ORDER}{name}")).and_then(Value::as_array);
            ordered.push(name.clone());
            let old = result.remove(&name);
            let field = type_id.and_then(|id| self.schema.type_of(id).field(&name));
            let merged = self.field(field, old, value, order.map(Vec::as_slice))?;
            result.insert(name, merged);
        }
        // An order alone reorders the list without changing its items.
        for (name, order) in directives.iter().filter_map(|(k, v)| Some((k.strip_prefix(SET_ORDER)?, v))) {
            if ordered.iter().any(|n| n == name) {
                continue;
            }
            let field = type_id.and_then(|id| self.schema.type_of(id).field(name));
            if let (Some(Value::Array(items)), Value::Array(order)) = (result.get_mut(name), order) {
                let key = field.and_then(|f| f.merge.as_ref()).and_then(|m| m.key.as_deref());
                *items = reorder(std::mem::take(items), order, key);
            }
        }
        Ok(Value::Object(result))
    }

    fn field(
        &self,
        field: Option<&Field>,
        old: Option<Value>,
        patch: Value,
        order: Option<&[Value]>,
    ) -> Result<Value> {
        match patch {
            Value::Object(_) => {
                let inner = field.and_then(|f| match &f.shape {
                    Shape::Object(id) => Some(*id),
                    _ => None,
                });
                self.object(inner, old.unwrap_or(Value::Null), patch)
            }
            Value::Array(items) => {
                let Some(merge) = field.and_then(|f| f.merge.as_ref()) else {
                    return Ok(Value::Array(self.without_directives(items)));
                };
                let old = if let Some(Value::Array(old)) = old { old } else { Vec::new() };
                let inner = field.and_then(Field::object_type);
                let merged = match &merge.key {
                    Some(key) => self.keyed_list(inner, key, old, items, order)?,
                    None => primitives(old, items, order),
                };
                Ok(Value::Array(merged))
            }
            scalar => Ok(scalar),
        }
    }

    /// A list that replaces: `$patch: replace` markers are dropped.
    fn without_directives(&self, items: Vec<Value>) -> Vec<Value> {
        items.into_iter().filter(|i| i.get(DIRECTIVE).is_none()).collect()
    }

    fn keyed_list(
        &self,
        inner: Option<TypeId>,
        key: &str,
        old: Vec<Value>,
        patch: Vec<Value>,
        order: Option<&[Value]>,
    ) -> Result<Vec<Value>> {
        let directive = |item: &Value| item.get(DIRECTIVE).and_then(Value::as_str).map(str::to_owned);
        if patch.iter().any(|item| directive(item).as_deref() == Some("replace")) {
            return Ok(self.without_directives(patch));
        }
        let server_order = old.clone();
        let mut result = old;
        let mut patched: Vec<Value> = Vec::new();
        for item in patch {
            let Some(value) = item.get(key).cloned() else {
                let shown: Vec<String> = item
                    .as_object()
                    .into_iter()
                    .flatten()
                    .map(|(k, v)| format!("{k}:{}", v.as_str().map_or(v.to_string(), str::to_owned)))
                    .collect();
                return Err(Status::new(
                    500,
                    "",
                    format!("map: map[{}] does not contain declared merge key: {key}", shown.join(" ")),
                ));
            };
            let position = result.iter().position(|o| o.get(key) == Some(&value));
            if directive(&item).as_deref() == Some("delete") {
                result.retain(|o| o.get(key) != Some(&value));
                continue;
            }
            match position {
                Some(at) => {
                    let before = result[at].take();
                    result[at] = self.object(inner, before, item)?;
                }
                None => result.push(self.object(inner, Value::Null, item)?),
            }
            patched.push(value);
        }
        // Without a wish for the order, the patch's own order is the wish.
        let own: Vec<Value> = patched.into_iter().map(|value| json!({ key: value })).collect();
        Ok(order_by(result, order.unwrap_or(&own), &server_order, Some(key)))
    }
}

fn primitives(mut old: Vec<Value>, patch: Vec<Value>, order: Option<&[Value]>) -> Vec<Value> {
    let server_order = old.clone();
    for item in &patch {
        if !old.contains(item) {
            old.push(item.clone());
        }
    }
    order_by(old, order.unwrap_or(&patch), &server_order, None)
}

fn reorder(items: Vec<Value>, order: &[Value], key: Option<&str>) -> Vec<Value> {
    let server_order = items.clone();
    order_by(items, order, &server_order, key)
}

/// Orders by the patch; items only the server has come before the first one they preceded on the server,
/// and after those the server did not know.
fn order_by(items: Vec<Value>, order: &[Value], server_order: &[Value], key: Option<&str>) -> Vec<Value> {
    let identity = |item: &Value| -> Option<Value> {
        match key {
            Some(key) => item.get(key).cloned(),
            None => Some(item.clone()),
        }
    };
    let rank = |list: &[Value], item: &Value| list.iter().position(|o| identity(o) == identity(item));
    let (mut named, server_only): (Vec<Value>, Vec<Value>) =
        items.into_iter().partition(|item| rank(order, item).is_some());
    named.sort_by_key(|item| rank(order, item));
    let mut result = Vec::with_capacity(named.len() + server_only.len());
    let (mut left, mut right) = (server_only.into_iter().peekable(), named.into_iter().peekable());
    while let (Some(l), Some(r)) = (left.peek(), right.peek()) {
        let left_first = match (rank(server_order, l), rank(server_order, r)) {
            (Some(l), Some(r)) => l < r,
            _ => false,
        };
        result.extend(if left_first { left.next() } else { right.next() });
    }
    result.extend(left);
    result.extend(right);
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(target: Value, patch: Value, expected: Value) {
        let schema = Schema::builtin();
        let kind = schema.resource("", "v1", "pods").expect("served");
        let result = strategic_value(schema, kind.type_id, target, patch).expect("applies");
        assert_eq!(result, expected);
    }

    #[test]
    fn containers_merge_by_name() {
        check(
            json!({"spec":{"containers":[{"name":"a","image":"x","env":[{"name":"E","value":"1"}]},{"name":"b"}]}}),
            json!({"spec":{"containers":[{"name":"a","image":"y","env":[{"name":"F","value":"2"}]},{"name":"c"}]}}),
            json!({"spec":{"containers":[
                {"name":"a","image":"y","env":[{"name":"F","value":"2"},{"name":"E","value":"1"}]},{"name":"c"},{"name":"b"}]}}),
        );
    }

    #[test]
    fn directives_delete_replace_and_retain() {
        check(
            json!({"spec":{"containers":[{"name":"a"},{"name":"b"}]}}),
            json!({"spec":{"containers":[{"name":"a","$patch":"delete"}]}}),
            json!({"spec":{"containers":[{"name":"b"}]}}),
        );
        check(
            json!({"spec":{"containers":[{"name":"a"},{"name":"b"}]}}),
            json!({"spec":{"containers":[{"name":"c"},{"$patch":"replace"}]}}),
            json!({"spec":{"containers":[{"name":"c"}]}}),
        );
        check(
            json!({"spec":{"volumes":[{"name":"v","emptyDir":{}}]}}),
            json!({"spec":{"volumes":[{"name":"v","$retainKeys":["name","hostPath"],"hostPath":{"path":"/x"}}]}}),
            json!({"spec":{"volumes":[{"name":"v","hostPath":{"path":"/x"}}]}}),
        );
        check(
            json!({"metadata":{"finalizers":["a","b"]}}),
            json!({"metadata":{"$deleteFromPrimitiveList/finalizers":["a"],"finalizers":["c"]}}),
            json!({"metadata":{"finalizers":["c","b"]}}),
        );
    }

    #[test]
    fn set_element_order_orders_and_keeps_server_items_in_place() {
        check(
            json!({"spec":{"containers":[{"name":"a"},{"name":"s"},{"name":"b"}]}}),
            json!({"spec":{"$setElementOrder/containers":[{"name":"b"},{"name":"a"}],"containers":[{"name":"a","image":"x"}]}}),
            json!({"spec":{"containers":[{"name":"s"},{"name":"b"},{"name":"a","image":"x"}]}}),
        );
    }

    #[test]
    fn null_deletes_and_merge_patch_follows_the_rfc() {
        check(
            json!({"metadata":{"labels":{"a":"1","b":"2"}}}),
            json!({"metadata":{"labels":{"a":null}}}),
            json!({"metadata":{"labels":{"b":"2"}}}),
        );
        let merged = merge(&json!({"a":{"b":1,"c":2}}), br#"{"a":{"b":null,"d":[1]}}"#).expect("applies");
        assert_eq!(merged, json!({"a":{"c":2,"d":[1]}}));
    }

    #[test]
    fn small_patches_make_no_large_or_deep_objects() {
        let copy = |from: &str, to: &str| json!({ "op": "copy", "from": from, "path": to });
        let text = "x".repeat(100 << 10);
        let doubling: Vec<Value> = (0..40).map(|i| copy("/data", &format!("/data/k{i}"))).collect();
        let refused = json(&json!({ "data": { "a": text } }), Value::from(doubling).to_string().as_bytes());
        assert_eq!(refused.expect_err("too large").code, 413);
        let add = |path: String| json!({ "op": "add", "path": path, "value": {} });
        let deep: Vec<Value> = (1..400).map(|i| add(format!("/a{}", "/b".repeat(i)))).collect();
        let refused = json(&json!({ "a": {} }), Value::from(deep).to_string().as_bytes());
        assert_eq!(refused.expect_err("too deep").code, 422);
    }

    #[test]
    fn json_patches_apply_or_say_why_not() {
        let patched = json(&json!({"a":1}), br#"[{"op":"add","path":"/b","value":2}]"#).expect("applies");
        assert_eq!(patched, json!({"a":1,"b":2}));
        let refused = json(&json!({}), br#"{"op":"add"}"#).expect_err("no list");
        assert_eq!(refused.message, "json: cannot unmarshal object into Go value of type jsonpatch.Patch");
    }
}
