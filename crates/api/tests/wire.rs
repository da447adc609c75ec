//! Upstream's fully filled objects, as protobuf and as JSON: both must decode to the same object.
//!
//! The files lie outside the repository (set `KNARR_REFERENCE` to where); without them the test says so.

use std::path::PathBuf;

use knarr_api::schema::Schema;
use knarr_api::{decode, protobuf};
use serde_json::Value;

fn wire() -> Option<PathBuf> {
    let root = std::env::var_os("KNARR_REFERENCE").map(PathBuf::from);
    let root =
        root.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/reference"));
    Some(root.join("wire")).filter(|p| p.is_dir())
}

#[test]
fn filled_objects_read_the_same_from_both_encodings() {
    let Some(dir) = wire() else {
        eprintln!("SKIPPED: the filled objects are not here; nothing was compared");
        return;
    };
    let schema = Schema::builtin();
    let (mut compared, mut different) = (0, Vec::new());
    for kind in schema.kinds() {
        let group = if kind.group.is_empty() { "core" } else { &kind.group };
        let file = |end: &str| dir.join(format!("{group}.{}.{}.{end}", kind.version, kind.kind));
        let (Ok(json), Ok(bytes)) = (std::fs::read(file("json")), std::fs::read(file("pb"))) else {
            continue;
        };
        compared += 1;
        let from_json = decode::json(schema, kind.type_id, &json).expect("upstream's json decodes").value;
        let result = protobuf::decode(schema, kind.type_id, &bytes)
            .and_then(|tree| decode::value(schema, kind.type_id, tree).map(|d| d.value));
        match result {
            Err(error) => different.push(format!("{}: {error}", kind.kind)),
            Ok(value) => {
                if let Some(path) = difference(&from_json, &value, "") {
                    different.push(format!("{} at {path}", kind.kind));
                }
            }
        }
    }
    assert!(compared > 30, "only {compared} kinds were compared");
    assert!(different.is_empty(), "{} of {compared} differ:\n{}", different.len(), different.join("\n"));
}

#[test]
fn filled_objects_are_written_byte_for_byte_as_upstream_writes_them() {
    let Some(dir) = wire() else {
        eprintln!("SKIPPED: the filled objects are not here; nothing was compared");
        return;
    };
    let schema = Schema::builtin();
    let (mut compared, mut different) = (0, Vec::new());
    for kind in schema.kinds() {
        let group = if kind.group.is_empty() { "core" } else { &kind.group };
        let file = dir.join(format!("{group}.{}.{}.pb", kind.version, kind.kind));
        let Ok(bytes) = std::fs::read(file) else { continue };
        compared += 1;
        let tree = protobuf::decode(schema, kind.type_id, &bytes).expect("decodes");
        let written = protobuf::encode(schema, kind.type_id, &tree);
        if written != bytes {
            let at = written.iter().zip(&bytes).take_while(|(a, b)| a == b).count();
            let around = |b: &[u8]| {
                String::from_utf8_lossy(&b[at.saturating_sub(40)..(at + 40).min(b.len())]).into_owned()
            };
            different.push(format!(
                "{} at byte {at}: {:?}\n   instead of {:?}",
                kind.kind,
                around(&written),
                around(&bytes)
            ));
        }
    }
    assert!(compared > 30, "only {compared} kinds were compared");
    assert!(different.is_empty(), "{} of {compared} differ:\n{}", different.len(), different.join("\n"));
}

/// Zeros of pointers and of plain fields cannot be told apart on the wire.
fn is_zero(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(s) => s.is_empty(),
        Value::Number(n) => n.as_i64() == Some(0),
        _ => false,
    }
}

fn difference(a: &Value, b: &Value, path: &str) -> Option<String> {
    match (a, b) {
        (Value::Object(x), Value::Object(y)) => {
            // The envelope names the version; the two recordings do not always agree on it.
            let keys = x.keys().chain(y.keys().filter(|k| !x.contains_key(*k)));
            keys.filter(|k| !(path.is_empty() && *k == "apiVersion")).find_map(|k| {
                let null = Value::Null;
                difference(x.get(k).unwrap_or(&null), y.get(k).unwrap_or(&null), &format!("{path}.{k}"))
            })
        }
        (Value::Array(x), Value::Array(y)) if x.len() == y.len() => {
            x.iter().zip(y).enumerate().find_map(|(i, (x, y))| difference(x, y, &format!("{path}[{i}]")))
        }
        _ if a == b || (is_zero(a) && is_zero(b)) => None,
        _ => Some(path.to_owned()),
    }
}
