//! OpenAPI version 2 as protobuf (`openapi.v2.Document` of gnostic), which kubectl asks for.
//!
//! The messages follow the JSON closely, so a table of fields per message is all there is: JSON name, field
//! number, and what stands there. Pieces are written one at a time; the whole document never exists as a tree.

use serde_json::{Map, Value};

/// What a field holds, and how its message is made from JSON.
#[derive(Clone, Copy)]
enum Holds {
    Text,
    Texts,
    Bool,
    /// Any JSON, as YAML text (which JSON is).
    Yaml,
    /// A message, and the number of its extensions.
    Message(&'static [Fact], u32),
    /// A message around a list or map of named messages, all under field 1.
    Named(fn(&Value) -> Vec<u8>),
    /// A message of its own making.
    Made(fn(&Value) -> Vec<u8>),
    /// A list of them.
    MadeList(fn(&Value) -> Vec<u8>),
}

/// JSON name, field number, content.
type Fact = (&'static str, u32, Holds);

const INFO: &[Fact] = &[("title", 1, Holds::Text), ("version", 2, Holds::Text)];

const OPERATION: &[Fact] = &[
    ("tags", 1, Holds::Texts),
    ("description", 3, Holds::Text),
    ("operationId", 5, Holds::Text),
    ("produces", 6, Holds::Texts),
    ("consumes", 7, Holds::Texts),
    ("parameters", 8, Holds::MadeList(parameter)),
    ("responses", 9, Holds::Named(response)),
    ("schemes", 10, Holds::Texts),
];

const PATH_ITEM: &[Fact] = &[
    ("get", 2, Holds::Message(OPERATION, 13)),
    ("put", 3, Holds::Message(OPERATION, 13)),
    ("post", 4, Holds::Message(OPERATION, 13)),
    ("delete", 5, Holds::Message(OPERATION, 13)),
    ("options", 6, Holds::Message(OPERATION, 13)),
    ("head", 7, Holds::Message(OPERATION, 13)),
    ("patch", 8, Holds::Message(OPERATION, 13)),
    ("parameters", 9, Holds::MadeList(parameter)),
];

const BODY_PARAMETER: &[Fact] = &[
    ("description", 1, Holds::Text),
    ("name", 2, Holds::Text),
    ("in", 3, Holds::Text),
    ("required", 4, Holds::Bool),
    ("schema", 5, Holds::Message(SCHEMA, 31)),
];

const QUERY_PARAMETER: &[Fact] = &[
    ("required", 1, Holds::Bool),
    ("in", 2, Holds::Text),
    ("description", 3, Holds::Text),
    ("name", 4, Holds::Text),
    ("type", 6, Holds::Text),
    ("uniqueItems", 20, Holds::Bool),
];

const PATH_PARAMETER: &[Fact] = &[
    ("required", 1, Holds::Bool),
    ("in", 2, Holds::Text),
    ("description", 3, Holds::Text),
    ("name", 4, Holds::Text),
    ("type", 5, Holds::Text),
    ("uniqueItems", 19, Holds::Bool),
];

const RESPONSE: &[Fact] = &[("description", 1, Holds::Text), ("schema", 2, Holds::Made(schema_item))];

const SCHEMA: &[Fact] = &[
    ("$ref", 1, Holds::Text),
    ("format", 2, Holds::Text),
    ("title", 3, Holds::Text),
    ("description", 4, Holds::Text),
    ("default", 5, Holds::Yaml),
    ("required", 19, Holds::Texts),
    ("additionalProperties", 21, Holds::Made(additional)),
    ("type", 22, Holds::Made(type_item)),
    ("items", 23, Holds::Made(items)),
    ("properties", 25, Holds::Named(schema)),
];

/// The fields in front of the definitions and paths.
pub fn head(info: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    text(&mut out, 1, "2.0");
    bytes(&mut out, 2, &message(info, INFO, 7));
    out
}

/// All paths, each written when it comes.
pub fn paths(items: impl IntoIterator<Item = (String, Value)>) -> Vec<u8> {
    let mut out = Vec::new();
    for (path, item) in items {
        bytes(&mut out, 2, &named(&path, &message(&item, PATH_ITEM, 10)));
    }
    field(8, &out)
}

/// All definitions, each written when it comes.
pub fn definitions(items: impl IntoIterator<Item = (String, Value)>) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, definition) in items {
        bytes(&mut out, 1, &named(&name, &schema(&definition)));
    }
    field(9, &out)
}

fn schema(value: &Value) -> Vec<u8> {
    message(value, SCHEMA, 31)
}

fn schema_item(value: &Value) -> Vec<u8> {
    field(1, &schema(value))
}

fn additional(value: &Value) -> Vec<u8> {
    field(1, &schema(value))
}

fn items(value: &Value) -> Vec<u8> {
    field(1, &schema(value))
}

fn type_item(value: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    text(&mut out, 1, value.as_str().unwrap_or_default());
    out
}

fn response(value: &Value) -> Vec<u8> {
    field(1, &message(value, RESPONSE, 5))
}

/// A `ParametersItem`: always a parameter, never a reference.
fn parameter(value: &Value) -> Vec<u8> {
    let inner = match value.get("in").and_then(Value::as_str) {
        Some("body") => field(1, &message(value, BODY_PARAMETER, 6)),
        Some("path") => field(2, &field(4, &message(value, PATH_PARAMETER, 22))),
        _ => field(2, &field(3, &message(value, QUERY_PARAMETER, 23))),
    };
    field(1, &inner)
}

/// A message by its table; `x-…` fields go where extensions stand.
fn message(value: &Value, facts: &[Fact], extensions: u32) -> Vec<u8> {
    let mut out = Vec::new();
    let Some(map) = value.as_object() else { return out };
    for (name, number, holds) in facts {
        let Some(value) = map.get(*name) else { continue };
        write(&mut out, *number, *holds, value);
    }
    for (name, value) in map.iter().filter(|(name, _)| name.starts_with("x-")) {
        bytes(&mut out, extensions, &named(name, &yaml(value)));
    }
    out
}

fn write(out: &mut Vec<u8>, number: u32, holds: Holds, value: &Value) {
    let each = |value: &Value| value.as_array().cloned().unwrap_or_default();
    match holds {
        Holds::Text => text(out, number, value.as_str().unwrap_or_default()),
        Holds::Texts => each(value).iter().for_each(|v| text(out, number, v.as_str().unwrap_or_default())),
        Holds::Bool => {
            varint(out, u64::from(number << 3));
            varint(out, u64::from(value == &Value::Bool(true)));
        }
        Holds::Yaml => bytes(out, number, &yaml(value)),
        Holds::Message(facts, extensions) => bytes(out, number, &message(value, facts, extensions)),
        Holds::Named(make) => {
            let empty = Map::new();
            let mut inner = Vec::new();
            for (name, value) in value.as_object().unwrap_or(&empty) {
                bytes(&mut inner, 1, &named(name, &make(value)));
            }
            bytes(out, number, &inner);
        }
        Holds::Made(make) => bytes(out, number, &make(value)),
        Holds::MadeList(make) => each(value).iter().for_each(|v| bytes(out, number, &make(v))),
    }
}

/// An `Any` with only its YAML.
fn yaml(value: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    let mut written = match value {
        Value::String(plain) => plain.clone(),
        other => other.to_string(),
    };
    written.push('\n');
    text(&mut out, 2, &written);
    out
}

fn named(name: &str, value: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len() + value.len() + 12);
    text(&mut out, 1, name);
    bytes(&mut out, 2, value);
    out
}

fn field(number: u32, content: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(content.len() + 6);
    bytes(&mut out, number, content);
    out
}

fn text(out: &mut Vec<u8>, number: u32, content: &str) {
    bytes(out, number, content.as_bytes());
}

fn bytes(out: &mut Vec<u8>, number: u32, content: &[u8]) {
    varint(out, u64::from(number << 3 | 2));
    varint(out, content.len() as u64);
    out.extend(content);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}
