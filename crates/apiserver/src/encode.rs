//! Objects as bytes: the one form that is stored, listed, watched and sent.
//!
//! `kind` and `apiVersion` come first, `resourceVersion` opens the metadata and `managedFields` follow, so that the
//! store can write the revision in, lists can cut the type off, and the loops of this process, who never look at
//! owners, can be spared them: all without parsing.

use std::borrow::Cow;
use std::hash::Hasher;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use knarr_api::object::Object;
use knarr_api::pick;
use knarr_api::rules::Rules;
use knarr_api::schema::Kind;
use knarr_store::{Change, Digest, Entry, Revision};
use serde_json::{Map, Value};

/// Encodes an object for the store: bytes, and where the revision goes. `owners` are the `managedFields` as JSON,
/// empty for none; without them the object's own are kept.
pub fn encode(kind: &Kind, object: &Value, owners: Option<&str>) -> (Vec<u8>, usize) {
    let mut out = Vec::with_capacity(2048);
    out.extend(prefix(kind).as_bytes());
    out.extend(METADATA.as_bytes());
    let splice = out.len();
    out.push(b'"');
    let metadata = object.map_at("metadata");
    match (owners, metadata.and_then(|m| m.get("managedFields"))) {
        (Some(""), _) | (None, None) => {}
        (Some(owners), _) => {
            out.extend(MANAGED.as_bytes());
            out.extend(owners.as_bytes());
        }
        (None, Some(kept)) => member(&mut out, "managedFields", kept),
    }
    for (name, value) in metadata.into_iter().flatten() {
        if !matches!(name.as_str(), "resourceVersion" | "managedFields") {
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

/// Stores an object, for as long as its kind's objects live.
pub fn put(kind: &Kind, object: &Value, owners: Option<&str>) -> Change {
    let rules = Rules::of(kind);
    let (bytes, splice) = encode(kind, object, owners);
    let time_to_live = rules.time_to_live_seconds.map(Duration::from_secs);
    Change::Put { bytes, splice: Some(splice), time_to_live, digest: digest(rules, object) }
}

/// Deletes an object, whose last state this is.
pub fn delete(kind: &Kind, last: &Value, owners: Option<&str>) -> Change {
    let (bytes, splice) = encode(kind, last, owners);
    Change::Delete { last: Some((bytes, Some(splice))) }
}

/// What selectors can ask of the object: the words of [`crate::registry::Selection`].
fn digest(rules: &Rules, object: &Value) -> Digest {
    let mut digest = empty_digest(rules);
    for (key, value) in object.map_at("metadata.labels").into_iter().flatten() {
        digest.add(&["label", key]);
        digest.add(&["label", key, value.as_str().unwrap_or_default()]);
    }
    for field in rules.selectable {
        digest.add(&["field", field, &rules.field_value(object, field)]);
    }
    digest
}

/// Its version stands for the fields that go in: when a kind gets another, digests on the disk say nothing of it.
pub fn empty_digest(rules: &Rules) -> Digest {
    let mut hasher = fnv::FnvHasher::default();
    rules.selectable.iter().for_each(|field| hasher.write(field.as_bytes()));
    Digest::new(hasher.finish() as u32 | 1)
}

const METADATA: &str = r#""metadata":{"resourceVersion":""#;
const MANAGED: &str = r#","managedFields":"#;

/// The stored bytes in two parts, without `managedFields`.
pub fn without_owners<'b>(kind: &Kind, bytes: &'b [u8]) -> (&'b [u8], &'b [u8]) {
    let whole = (bytes, &[][..]);
    let start = revision_digits(kind, bytes).1 + 1;
    let Some(list) = bytes.get(start..).and_then(|rest| rest.strip_prefix(MANAGED.as_bytes())) else {
        return whole;
    };
    match end_of_list(list) {
        Some(end) => (&bytes[..start], &list[end..]),
        None => whole,
    }
}

/// An object that is in no store (made up, or a dry run's) in the order that lists rely on.
pub fn unstored(kind: &Kind, object: &Value) -> Bytes {
    let mut out = prefix(kind).into_bytes();
    out.pop();
    for (name, value) in object.as_object().into_iter().flatten() {
        if !matches!(name.as_str(), "kind" | "apiVersion") {
            member(&mut out, name, value);
        }
    }
    out.push(b'}');
    out.into()
}

/// The stored bytes with another `resourceVersion`: of a deletion, whose last state is that of an older write.
pub fn at_revision(kind: &Kind, bytes: &Bytes, revision: Revision) -> Bytes {
    let (start, end) = revision_digits(kind, bytes);
    let wanted = revision.to_string();
    if &bytes[start..end] == wanted.as_bytes() {
        return bytes.clone();
    }
    [&bytes[..start], wanted.as_bytes(), &bytes[end..]].concat().into()
}

/// Where the digits of the `resourceVersion` are.
fn revision_digits(kind: &Kind, bytes: &[u8]) -> (usize, usize) {
    let start = (prefix(kind).len() + METADATA.len()).min(bytes.len());
    (start, start + bytes[start..].iter().take_while(|b| b.is_ascii_digit()).count())
}

/// The object of an entry without its `managedFields`, and those as JSON (empty for none).
pub fn apart<'e>(kind: &Kind, entry: &'e Entry) -> (Value, Cow<'e, str>) {
    let (head, tail) = without_owners(kind, &entry.bytes);
    if tail.is_empty() {
        // Nobody owns anything, or the bytes were written when owners had no place of their own.
        let mut object = decode(entry);
        let owners = object.remove_at("metadata.managedFields");
        return (object, owners.map_or(Cow::Borrowed(""), |o| Cow::Owned(o.to_string())));
    }
    let object = serde_json::from_slice(&[head, tail].concat()).expect("stored bytes were encoded here");
    let owners = &entry.bytes[head.len() + MANAGED.len()..entry.bytes.len() - tail.len()];
    (object, Cow::Borrowed(std::str::from_utf8(owners).expect("stored bytes were encoded here")))
}

/// Where the JSON list that the bytes begin with ends.
fn end_of_list(bytes: &[u8]) -> Option<usize> {
    let (mut depth, mut at) = (0, 0);
    while at < bytes.len() {
        match bytes[at] {
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth -= 1,
            b'"' => {
                at += 1;
                while *bytes.get(at)? != b'"' {
                    at += 1 + usize::from(bytes[at] == b'\\');
                }
            }
            _ => {}
        }
        at += 1;
        if depth == 0 {
            return Some(at);
        }
    }
    None
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

/// What readers derive from an entry, each part at its first use, kept as long as the entry.
#[derive(Default)]
pub struct View {
    selectable: OnceLock<Selectable>,
    /// What the object uses of quotas.
    pub usage: OnceLock<crate::quota::Usage>,
    tree: OnceLock<Arc<Value>>,
}

/// What selectors look at.
pub struct Selectable {
    pub labels: Map<String, Value>,
    fields: Vec<(&'static str, String)>,
}

impl View {
    pub fn of(entry: &Entry) -> &View {
        let shared = entry.view.get_or_init(|| Arc::new(View::default()));
        shared.downcast_ref::<View>().expect("only this function sets the view")
    }

    pub fn selectable<'e>(rules: &'static Rules, entry: &'e Entry) -> &'e Selectable {
        View::of(entry).selectable.get_or_init(|| {
            let paths = ["metadata.labels"].iter().chain(rules.selectable).chain(rules.selectable_reads);
            let object = pick::fields(&entry.bytes, paths.copied()).expect("stored bytes were encoded here");
            let labels = object.map_at("metadata.labels").cloned().unwrap_or_default();
            let fields = rules.selectable.iter().map(|f| (*f, rules.field_value(&object, f))).collect();
            Selectable { labels, fields }
        })
    }

    /// The object of an entry that many requests ask about (a namespace, a service account, a class). Not for
    /// kinds of which there are many.
    pub fn tree(entry: &Entry) -> Arc<Value> {
        View::of(entry).tree.get_or_init(|| Arc::new(decode(entry))).clone()
    }
}

impl Selectable {
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
        let (mut bytes, at) = encode(kind, &object, None);
        bytes.splice(at..at, b"42".iter().copied());
        let spliced = bytes;
        let decoded: Value = serde_json::from_slice(&spliced).expect("json");
        assert_eq!(
            decoded,
            json!({"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"a","resourceVersion":"42"},"data":{"k":"v"}})
        );
        let owned = br#"[{"manager":"a]\"\\","fieldsV1":{"f:data":{}}}]"#;
        let owners = std::str::from_utf8(owned).expect("text");
        let (bytes, _) = encode(kind, &object, Some(owners));
        let (head, tail) = without_owners(kind, &bytes);
        assert_eq!([head, tail].concat(), encode(kind, &object, None).0, "exactly the owners are cut out");
        let older = at_revision(kind, &Bytes::from(spliced.clone()), 7);
        assert_eq!(
            serde_json::from_slice::<Value>(&older).expect("json")["metadata"]["resourceVersion"],
            "7"
        );
        let item = format!("{{{}", String::from_utf8_lossy(&list_item(kind, &Bytes::from(spliced))));
        let item: Value = serde_json::from_str(&item).expect("json");
        assert_eq!(item, json!({"metadata":{"name":"a","resourceVersion":"42"},"data":{"k":"v"}}));
    }
}
