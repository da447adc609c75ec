//! Upstream's fully filled objects, as protobuf and as JSON: both must decode to the same object.
//!
//! The files lie outside the repository (set `KNARR_REFERENCE` to where); without them the test says so.

use std::path::{Path, PathBuf};

use knarr_api::schema::Schema;
use knarr_api::{decode, protobuf};
use serde_json::Value;

fn wire() -> Option<PathBuf> {
    let root = std::env::var_os("KNARR_REFERENCE").map(PathBuf::from);
    let above = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().map(|dir| dir.join("shared/reference"));
    root.into_iter().chain(above).map(|root| root.join("wire")).find(|p| p.is_dir())
}

#[test]
fn filled_objects_read_the_same_from_both_encodings() {
    let Some(dir) = wire() else {
        eprintln!("SKIPPED: the filled objects are not here; nothing was compared");
        return;
    };
    let schema = Schema::builtin();
    let (mut compared, mut different) = (0, Vec::new());
    for kind in schema.kinds().iter().chain(schema.old_kinds()) {
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
fn filled_objects_are_written_as_upstream_writes_them_but_for_gos_zeros() {
    let Some(dir) = wire() else {
        eprintln!("SKIPPED: the filled objects are not here; nothing was compared");
        return;
    };
    let schema = Schema::builtin();
    let (mut compared, mut different) = (0, Vec::new());
    for kind in schema.kinds().iter().chain(schema.old_kinds()) {
        let group = if kind.group.is_empty() { "core" } else { &kind.group };
        let file = dir.join(format!("{group}.{}.{}.pb", kind.version, kind.kind));
        let Ok(bytes) = std::fs::read(file) else { continue };
        compared += 1;
        let tree = protobuf::decode(schema, kind.type_id, &bytes).expect("decodes");
        let written = protobuf::encode(schema, kind.type_id, &tree);
        wire_differences(&written[4..], &bytes[4..], &kind.kind, &mut different);
    }
    different.retain(|d| !GONE.iter().any(|gone| d.contains(gone)));
    assert!(compared > 30, "only {compared} kinds were compared");
    assert!(different.is_empty(), "{} of {compared} differ:\n{}", different.len(), different.join("\n"));
}

/// Fields that v1.24 wrote and v1.36 does not have.
const GONE: &[&str] = &[
    // `metadata.clusterName`, wherever there is metadata.
    ".1.15 missing: ",
    // `readOnly` of ephemeral volumes, in the oldest recording.
    "CronJob.2.2.5.2.6.2.1.2.29.2 missing: ",
    // `status.resizeStatus` of claims.
    "PersistentVolumeClaim.2.3.6 missing: ",
    "StatefulSet.2.2.4.3.6 missing: ",
];

/// The fields of a message: number, and the bytes of the value if it has any, else the number.
fn fields(mut bytes: &[u8]) -> Option<Vec<(u64, &[u8])>> {
    fn varint(bytes: &mut &[u8]) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = bytes.split_first()?;
            *bytes = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes)?;
        let before = bytes;
        let content = match tag & 7 {
            0 => {
                varint(&mut bytes)?;
                &before[..before.len() - bytes.len()]
            }
            kind @ (1 | 2 | 5) => {
                let len = match kind {
                    1 => 8,
                    5 => 4,
                    _ => usize::try_from(varint(&mut bytes)?).ok()?,
                };
                let (content, rest) = bytes.split_at_checked(len)?;
                bytes = rest;
                content
            }
            _ => return None,
        };
        found.push((tag, content));
    }
    Some(found)
}

/// Go writes fields that are no pointers even when they are zero; we leave them out.
fn is_zero_message(bytes: &[u8]) -> bool {
    bytes.iter().all(|b| *b == 0)
        || fields(bytes).is_some_and(|f| f.iter().all(|(_, content)| is_zero_message(content)))
}

/// Where two messages differ, as paths of field numbers.
fn wire_differences(ours: &[u8], theirs: &[u8], path: &str, out: &mut Vec<String>) {
    if ours == theirs {
        return;
    }
    let (Some(a), Some(b)) = (fields(ours), fields(theirs)) else {
        out.push(format!("{path}: {ours:?} instead of {theirs:?}"));
        return;
    };
    let mut ours = a.into_iter().peekable();
    for (tag, theirs) in b {
        let here = format!("{path}.{}", tag >> 3);
        match ours.next_if(|(t, _)| *t == tag) {
            None if is_zero_message(theirs) => {}
            None => out.push(format!("{here} missing: {:?}", String::from_utf8_lossy(theirs))),
            Some((_, ours)) => wire_differences(ours, theirs, &here, out),
        }
    }
    ours.for_each(|(tag, _)| out.push(format!("{path}.{} is too much", tag >> 3)));
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
