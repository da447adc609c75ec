//! Writing messages by the schema's field numbers: the twin of `read`, byte for byte what Go writes for
//! the same fields. Fields go out in the order of their numbers, map entries in the order of their keys.
//!
//! Objects come from the decoder, so they fit their schema; a value of another form than its field's (made
//! by hand in this process) is left out rather than written wrongly.

use base64::Engine;
use serde_json::Value;

use super::{MAGIC, unions};
use crate::schema::{Field, Schema, Shape, Type, TypeId};

/// A wire type of protobuf.
const VARINT: u32 = 0;
const FIXED64: u32 = 1;
const BYTES: u32 = 2;

/// Writes objects of one schema.
pub struct Writer<'s> {
    pub schema: &'s Schema,
}

/// Puts a message into Kubernetes' envelope: `k8s\0` and a `runtime.Unknown`.
pub fn wrap(api_version: &str, kind: &str, message: &[u8]) -> Vec<u8> {
    let mut meta = Vec::with_capacity(api_version.len() + kind.len() + 4);
    bytes(&mut meta, 1, api_version.as_bytes());
    bytes(&mut meta, 2, kind.as_bytes());
    let mut out = Vec::with_capacity(MAGIC.len() + meta.len() + message.len() + 16);
    out.extend(MAGIC);
    bytes(&mut out, 1, &meta);
    bytes(&mut out, 2, message);
    // Content encoding and type: no pointers in Go, so always there.
    bytes(&mut out, 3, b"");
    bytes(&mut out, 4, b"");
    out
}

/// A list's body in pieces, each item its own: `head` is the list message without items.
pub fn list_pieces(
    api_version: &str,
    kind: &str,
    head: &[u8],
    items: impl IntoIterator<Item = Vec<u8>>,
) -> Vec<Vec<u8>> {
    let mut pieces = vec![Vec::new()];
    pieces.extend(items.into_iter().map(|item| {
        let mut piece = Vec::with_capacity(item.len() + 6);
        bytes(&mut piece, 2, &item);
        piece
    }));
    let len = head.len() + pieces.iter().map(Vec::len).sum::<usize>();
    let mut meta = Vec::new();
    bytes(&mut meta, 1, api_version.as_bytes());
    bytes(&mut meta, 2, kind.as_bytes());
    let first = &mut pieces[0];
    first.extend(MAGIC);
    bytes(first, 1, &meta);
    tag(first, 2, BYTES);
    varint(first, len as u64);
    first.extend(head);
    let mut last = Vec::new();
    bytes(&mut last, 3, b"");
    bytes(&mut last, 4, b"");
    pieces.push(last);
    pieces
}

/// One event of a watch stream: its length in four bytes, big end first, and the `meta.v1.WatchEvent` whose
/// object is a whole body of its own.
pub fn frame(event_type: &str, body: &[u8]) -> Vec<u8> {
    let mut object = Vec::with_capacity(body.len() + 8);
    bytes(&mut object, 1, body);
    let mut event = Vec::with_capacity(object.len() + event_type.len() + 16);
    bytes(&mut event, 1, event_type.as_bytes());
    bytes(&mut event, 2, &object);
    let len = u32::try_from(event.len()).expect("objects are limited to a few MiB");
    [&len.to_be_bytes()[..], &event].concat()
}

impl Writer<'_> {
    /// The message of an object, without envelope.
    pub fn object(&self, id: TypeId, value: &Value) -> Vec<u8> {
        let mut out = Vec::with_capacity(512);
        self.message(id, value, &mut out);
        out
    }

    /// A list message: `metadata` and items that are messages already.
    pub fn list(&self, metadata: &Value, items: impl IntoIterator<Item = Vec<u8>>) -> Vec<u8> {
        let mut out = Vec::new();
        if let Some(id) = self.schema.type_named("meta.v1.ListMeta") {
            nested(&mut out, 1, |out| self.message(id, metadata, out));
        }
        items.into_iter().for_each(|item| bytes(&mut out, 2, &item));
        out
    }

    pub(super) fn message(&self, id: TypeId, value: &Value, out: &mut Vec<u8>) {
        let structure = self.schema.type_of(id);
        self.fields(structure, &structure.wire, 0, value, out);
    }

    /// Writes the fields of `order`; at depth `depth` of the structures that Go embeds.
    fn fields(&self, owner: &Type, order: &[usize], depth: usize, value: &Value, out: &mut Vec<u8>) {
        let mut rest = order;
        while let Some(first) = rest.first() {
            let tags = &owner.fields[*first].tags;
            let number = tags[depth];
            let same = |i: &&usize| owner.fields[**i].tags[depth] == number;
            let (group, after) = rest.split_at(rest.iter().take_while(same).count());
            if tags.len() > depth + 1 {
                // Embedded structures are no pointers, so they are there even when empty.
                nested(out, number, |out| self.fields(owner, group, depth + 1, value, out));
            } else if let Some(value) = value.get(&owner.fields[*first].name).filter(|v| !v.is_null()) {
                self.field(owner, &owner.fields[*first], number, value, out);
            }
            rest = after;
        }
    }

    fn field(&self, owner: &Type, field: &Field, number: u32, value: &Value, out: &mut Vec<u8>) {
        let union = unions::of(owner, field);
        match (&field.shape, value) {
            (Shape::List(inner), Value::Array(items)) => {
                items.iter().for_each(|item| self.value(inner, number, item, out));
            }
            (Shape::Map(inner), Value::Object(map)) => {
                let mut entries: Vec<_> = map.iter().collect();
                entries.sort_by_key(|(key, _)| *key);
                for (key, value) in entries {
                    nested(out, number, |out| {
                        bytes(out, 1, key.as_bytes());
                        match (inner.as_ref(), union) {
                            (_, Some(union)) => nested(out, 2, |out| union.write(self, value, out)),
                            // Lists as map values are messages with the items as field 1.
                            (Shape::List(item), _) => nested(out, 2, |out| {
                                let items = value.as_array().into_iter().flatten();
                                items.for_each(|value| self.value(item, 1, value, out));
                            }),
                            (shape, _) => self.value(shape, 2, value, out),
                        }
                    });
                }
            }
            (Shape::List(_) | Shape::Map(_), _) => {}
            (shape, value) => match union {
                Some(union) => nested(out, number, |out| union.write(self, value, out)),
                None => self.value(shape, number, value, out),
            },
        }
    }

    fn value(&self, shape: &Shape, number: u32, value: &Value, out: &mut Vec<u8>) {
        match shape {
            Shape::Bool => {
                if let Some(flag) = value.as_bool() {
                    varint_field(out, number, u64::from(flag));
                }
            }
            Shape::Int32 | Shape::Int64 => {
                if let Some(integer) = value.as_i64() {
                    varint_field(out, number, integer as u64);
                }
            }
            Shape::Double => {
                if let Some(double) = value.as_f64() {
                    tag(out, number, FIXED64);
                    out.extend(double.to_le_bytes());
                }
            }
            Shape::String => {
                if let Some(text) = value.as_str() {
                    bytes(out, number, text.as_bytes());
                }
            }
            Shape::Bytes => {
                let decoded =
                    value.as_str().and_then(|t| base64::engine::general_purpose::STANDARD.decode(t).ok());
                if let Some(decoded) = decoded {
                    bytes(out, number, &decoded);
                }
            }
            Shape::Time => timestamp(out, number, value, false),
            Shape::MicroTime => timestamp(out, number, value, true),
            Shape::Quantity => match value {
                Value::String(text) => nested(out, number, |out| bytes(out, 1, text.as_bytes())),
                Value::Number(n) => nested(out, number, |out| bytes(out, 1, n.to_string().as_bytes())),
                _ => {}
            },
            Shape::IntOrString => int_or_string(out, number, value),
            Shape::Any => nested(out, number, |out| bytes(out, 1, value.to_string().as_bytes())),
            Shape::Object(id) => nested(out, number, |out| self.message(*id, value, out)),
            // Lists of lists and maps of maps do not occur in Kubernetes.
            Shape::List(_) | Shape::Map(_) => {}
        }
    }
}

/// Null is Go's zero time: an empty message.
fn timestamp(out: &mut Vec<u8>, number: u32, value: &Value, micros: bool) {
    let time = value.as_str().and_then(|t| t.parse::<jiff::Timestamp>().ok());
    nested(out, number, |out| {
        let Some(time) = time else { return };
        // Go rounds towards the past, so that the nanoseconds are never negative.
        let nanos = time.as_nanosecond();
        varint_field(out, 1, nanos.div_euclid(1_000_000_000) as i64 as u64);
        let rest = nanos.rem_euclid(1_000_000_000) as u64;
        varint_field(out, 2, if micros { rest / 1000 * 1000 } else { 0 });
    });
}

fn int_or_string(out: &mut Vec<u8>, number: u32, value: &Value) {
    let (kind, integer, text) = match value {
        Value::Number(n) => (0, n.as_i64().unwrap_or(0), ""),
        Value::String(s) => (1, 0, s.as_str()),
        _ => return,
    };
    nested(out, number, |out| {
        varint_field(out, 1, kind);
        varint_field(out, 2, integer as u64);
        bytes(out, 3, text.as_bytes());
    });
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn tag(out: &mut Vec<u8>, number: u32, wire: u32) {
    varint(out, u64::from(number << 3 | wire));
}

pub(super) fn varint_field(out: &mut Vec<u8>, number: u32, value: u64) {
    tag(out, number, VARINT);
    varint(out, value);
}

pub(super) fn bytes(out: &mut Vec<u8>, number: u32, content: &[u8]) {
    tag(out, number, BYTES);
    varint(out, content.len() as u64);
    out.extend(content);
}

/// A field that is a message, written in place; its length is put before it when it is known.
pub(super) fn nested(out: &mut Vec<u8>, number: u32, write: impl FnOnce(&mut Vec<u8>)) {
    tag(out, number, BYTES);
    let start = out.len();
    write(out);
    let len = out.len() - start;
    let mut prefix = Vec::with_capacity(5);
    varint(&mut prefix, len as u64);
    out.splice(start..start, prefix);
}
