//! Objects as bytes: the one form that is stored, listed, watched and sent.
//!
//! `kind` and `apiVersion` come first and `resourceVersion` opens the metadata, so that the store can
//! write the revision in, and lists can cut the type off, without parsing.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use knarr_api::object::Object;
use knarr_api::rules::Rules;
use knarr_api::schema::Kind;
use knarr_store::Entry;
use serde_json::{Map, Value};

/// Encodes an object for the store: bytes, and where the revision goes.
pub fn encode(kind: &Kind, object: &Value) -> (Vec<u8>, usize) {
    let mut out = Vec::with_capacity(1024);
    out.extend(prefix(kind).as_bytes());
    out.extend(br#""metadata":{"resourceVersion":""#);
    let splice = out.len();
    out.push(b'"');
    for (name, value) in object.map_at("metadata").into_iter().flatten() {
        if name != "resourceVersion" {
            member(&mut out, name, value);
        }
    }
    out.push(b'}');
    for (name, value) in object.as_object().into_iter().flatten() {
        if !matches!(name.as_str(), "kind" | "apiVersion" | "metadata") {
            member(&mut out, name, value);
        }
    }
    out.push(b'}');
    (out, splice)
}

fn member(out: &mut Vec<u8>, name: &str, value: &Value) {
    out.push(b',');
    serde_json::to_writer(&mut *out, name).expect("strings encode");
    out.push(b':');
    serde_json::to_writer(&mut *out, value).expect("trees encode");
}

fn prefix(kind: &Kind) -> String {
    format!(r#"{{"kind":"{}","apiVersion":"{}","#, kind.kind, kind.api_version())
}

/// The bytes as a list item: without `kind` and `apiVersion`. The opening brace is the caller's.
pub fn list_item(kind: &Kind, bytes: &Bytes) -> Bytes {
    bytes.slice(prefix(kind).len().min(bytes.len())..)
}

/// The object of an entry.
pub fn decode(entry: &Entry) -> Value {
    serde_json::from_slice(&entry.bytes).expect("stored bytes were encoded here")
}

/// What selectors look at; made once per entry, at first use.
pub struct View {
    pub labels: Map<String, Value>,
    /// What the object uses of quotas; made at first use.
    pub usage: OnceLock<crate::quota::Usage>,
    fields: Vec<(&'static str, String)>,
}

impl View {
    pub fn of(rules: &'static Rules, entry: &Entry) -> Arc<View> {
        let shared = entry.view.get_or_init(|| {
            let object = decode(entry);
            let labels = object.map_at("metadata.labels").cloned().unwrap_or_default();
            let fields = rules.selectable.iter().map(|f| (*f, rules.field_value(&object, f))).collect();
            Arc::new(View { labels, usage: OnceLock::new(), fields })
        });
        shared.clone().downcast::<View>().expect("only this function sets the view")
    }

    /// The value of a selectable field; names come from the key.
    pub fn field(&self, name: &str) -> &str {
        self.fields.iter().find(|(n, _)| *n == name).map_or("", |(_, v)| v.as_str())
    }
}

/// Splits a key into namespace and name.
pub fn split_key(key: &str) -> (&str, &str) {
    key.split_once('/').unwrap_or(("", key))
}

/// The key of an object.
pub fn key(namespace: &str, name: &str) -> String {
    if namespace.is_empty() { name.to_owned() } else { format!("{namespace}/{name}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use knarr_api::schema::Schema;
    use serde_json::json;

    #[test]
    fn the_revision_goes_where_the_splice_says() {
        let kind = Schema::builtin().resource("", "v1", "configmaps").expect("served");
        let object = json!({"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"a","resourceVersion":"1"},"data":{"k":"v"}});
        let (mut bytes, at) = encode(kind, &object);
        bytes.splice(at..at, b"42".iter().copied());
        let decoded: Value = serde_json::from_slice(&bytes).expect("json");
        assert_eq!(
            decoded,
            json!({"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"a","resourceVersion":"42"},"data":{"k":"v"}})
        );
        let item = format!("{{{}", String::from_utf8_lossy(&list_item(kind, &Bytes::from(bytes))));
        let item: Value = serde_json::from_str(&item).expect("json");
        assert_eq!(item, json!({"metadata":{"name":"a","resourceVersion":"42"},"data":{"k":"v"}}));
    }
}
