//! Protobuf answers: whole bodies, lists and watch events, made from the stored JSON when a client asks.
//!
//! JSON is the stored form and the common one, so nothing is kept in protobuf. Which type a value has
//! follows from its `apiVersion` and `kind`; values of no type in the schema have no protobuf form.

use bytes::Bytes;
use knarr_api::object::Object;
use knarr_api::protobuf::{self, Writer};
use knarr_api::schema::{Kind, Schema, TypeId};
use serde_json::Value;

/// The media type of bodies; of watch streams with `;stream=watch` after it.
pub const MEDIA_TYPE: &str = "application/vnd.kubernetes.protobuf";

/// The schema's type for what a body says it is. Options and discovery are of the meta group whatever they claim.
pub fn type_of(api_version: &str, kind: &str) -> Option<TypeId> {
    let schema = Schema::builtin();
    let group = match api_version.split_once('/') {
        Some((group, version)) => format!("{}.{version}", group.split('.').next().unwrap_or_default()),
        None => format!("core.{api_version}"),
    };
    schema.type_named(&format!("{group}.{kind}")).or_else(|| schema.type_named(&format!("meta.v1.{kind}")))
}

/// A whole body of any value that has a protobuf form.
pub fn body(value: &Value) -> Option<Vec<u8>> {
    let schema = Schema::builtin();
    let (api_version, kind) = (value.str_at("apiVersion"), value.str_at("kind"));
    if let Some(id) = type_of(api_version, kind) {
        return Some(protobuf::encode(schema, id, value));
    }
    let id = type_of(api_version, kind.strip_suffix("List")?)?;
    let writer = Writer { schema };
    let items = value.list_at("items").iter().map(|item| writer.object(id, item));
    let metadata = value.get("metadata").unwrap_or(&Value::Null);
    Some(protobuf::wrap(api_version, kind, &writer.list(metadata, items)))
}

/// Has the kind a protobuf form? Custom resources have none.
pub fn is_known(kind: &Kind) -> bool {
    type_of(&kind.api_version(), &kind.kind) == Some(kind.type_id)
}

/// The body of a list, in pieces: one object is decoded at a time.
pub fn list(kind: &Kind, metadata: &Value, items: &[Bytes]) -> Vec<Bytes> {
    let writer = Writer { schema: Schema::builtin() };
    let messages = items.iter().map(|bytes| {
        let value: Value = serde_json::from_slice(bytes).expect("stored bytes are json");
        writer.object(kind.type_id, &value)
    });
    protobuf::list_pieces(
        &kind.api_version(),
        &format!("{}List", kind.kind),
        &writer.list(metadata, []),
        messages,
    )
    .into_iter()
    .map(Bytes::from)
    .collect()
}

/// An event of a watch stream, about any value that has a protobuf form.
pub fn event(name: &str, value: &Value) -> Option<Vec<u8>> {
    Some(protobuf::frame(name, &body(value)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_list_in_pieces_is_the_list_as_a_whole() {
        let kind = Schema::builtin().resource("", "v1", "configmaps").expect("served");
        let item = json!({ "metadata": { "name": "a" }, "data": { "k": "v".repeat(300) } });
        let metadata = json!({ "resourceVersion": "7" });
        let whole = json!({ "kind": "ConfigMapList", "apiVersion": "v1", "metadata": metadata, "items": [item, item] });
        let bytes = Bytes::from(item.to_string());
        let pieces = list(kind, &metadata, &[bytes.clone(), bytes]).concat();
        assert_eq!(Some(pieces), body(&whole));
    }

    #[test]
    fn statuses_and_partial_metadata_have_a_form_and_tables_have_none() {
        let status = knarr_api::status::Status::bad_request("why").to_value();
        assert!(body(&status).is_some_and(|b| b.starts_with(b"k8s\0")));
        let partial =
            json!({ "kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1", "items": [] });
        assert!(body(&partial).is_some());
        assert!(body(&json!({ "kind": "Table", "apiVersion": "meta.k8s.io/v1" })).is_none());
    }
}
