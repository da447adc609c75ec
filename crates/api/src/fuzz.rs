//! Fuzz targets of everything here that reads foreign bytes. Each takes any bytes, and fails by panicking or by a
//! broken promise: what is read back is what was written, what was decoded once is decoded again without complaint.
//!
//! Run by an ordinary test (`tests/fuzz.rs`) for a moment each time, and by `cargo fuzz` (folder `fuzz/`) for as long
//! as one likes.

use serde_json::{Value, json};

use crate::apply::{self, Manager, Reach};
use crate::fieldset::FieldSet;
use crate::quantity::Quantity;
use crate::rules::{self, Rules};
use crate::schema::{Kind, Schema};
use crate::selector::{FieldSelector, LabelSelector};
use crate::{cron, decode, defaults, open_schema, patch, protobuf, versions};

/// A target: its name, and what it does with bytes.
pub type Target = (&'static str, fn(&[u8]));

pub const TARGETS: &[Target] = &[
    ("json", read_json),
    ("yaml", read_yaml),
    ("protobuf", read_protobuf),
    ("json_patch", |bytes| with_target(bytes, |_, live, body| drop(patch::json(live, body)))),
    ("merge_patch", |bytes| with_target(bytes, |_, live, body| drop(patch::merge(live, body)))),
    ("strategic_patch", |bytes| {
        with_target(bytes, |kind, live, body| {
            drop(patch::strategic(Schema::builtin(), kind.type_id, live, body));
        });
    }),
    ("apply", read_apply),
    ("fields_v1", read_fields),
    ("label_selector", |bytes| read_text(bytes, |text| drop(LabelSelector::parse(text)))),
    ("field_selector", |bytes| read_text(bytes, |text| drop(FieldSelector::parse(text)))),
    ("quantity", read_quantity),
    ("cron", |bytes| read_text(bytes, read_cron)),
    ("open_schema", read_open_schema),
];

/// Runs one target by name.
pub fn run(name: &str, bytes: &[u8]) {
    let target = TARGETS.iter().find(|(known, _)| *known == name);
    let (_, run) = target.unwrap_or_else(|| panic!("no fuzz target is called {name:?}"));
    run(bytes);
}

/// The first byte chooses a kind, the rest is for it.
pub fn kind_of(bytes: &[u8]) -> Option<(&'static Kind, &[u8])> {
    let (first, rest) = bytes.split_first()?;
    let schema = Schema::builtin();
    let all = schema.kinds().len() + schema.old_kinds().len();
    let at = usize::from(*first) % all;
    Some((schema.kinds().get(at).unwrap_or_else(|| &schema.old_kinds()[at - schema.kinds().len()]), rest))
}

fn read_text(bytes: &[u8], read: impl FnOnce(&str)) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        read(text);
    }
}

fn read_json(bytes: &[u8]) {
    let Some((kind, body)) = kind_of(bytes) else { return };
    if let Ok(decoded) = decode::json(Schema::builtin(), kind.type_id, body) {
        go_through(kind, decoded.value);
    }
}

fn read_yaml(bytes: &[u8]) {
    let Some((kind, body)) = kind_of(bytes) else { return };
    let Ok(tree) = decode::yaml_as(Schema::builtin(), kind.type_id, body) else { return };
    if let Ok(decoded) = decode::value(Schema::builtin(), kind.type_id, tree) {
        go_through(kind, decoded.value);
    }
}

fn read_protobuf(bytes: &[u8]) {
    let Some((kind, body)) = kind_of(bytes) else { return };
    let schema = Schema::builtin();
    let Ok(value) = protobuf::decode(schema, kind.type_id, body) else { return };
    let written = protobuf::encode(schema, kind.type_id, &value);
    let again = protobuf::decode(schema, kind.type_id, &written).expect("what was written can be read");
    assert_eq!(protobuf::encode(schema, kind.type_id, &again), written, "written twice, {}", kind.kind);
    go_through(kind, value);
}

/// What happens to every object that is written: versions, defaults, rules, the ways back.
fn go_through(served: &Kind, mut object: Value) {
    let schema = Schema::builtin();
    if !object.is_object() {
        return;
    }
    let again = decode::value(schema, served.type_id, object.clone()).expect("a decoded object decodes");
    assert_eq!((&again.value, again.issues), (&object, Vec::new()), "decoding is idempotent");
    let kind = schema.hub(served);
    versions::to_hub(schema, served, &mut object);
    let rules = Rules::of(kind);
    let old = object.clone();
    (rules.create)(&mut object);
    versions::apply_defaults(served, &mut object);
    defaults::apply(schema, kind.type_id, &mut object);
    let mut twice = object.clone();
    defaults::apply(schema, kind.type_id, &mut twice);
    assert_eq!(twice, object, "defaulting is idempotent, {}", kind.kind);
    (rules.complete)(&mut object);
    let mut errors = Vec::new();
    rules::validate_metadata(kind, rules, &object, &mut errors);
    (rules.validate)(&object, &mut errors);
    (rules.warnings)(&object);
    for face in rules.faces {
        let mut new = object.clone();
        (face.update)(&mut new, &old);
        (face.validate)(&new, &old, &mut errors);
    }
    (rules.update)(&mut object, &old);
    (rules.validate_update)(&object, &old, &mut errors);
    (rules.update_status)(&mut object, &old);
    (rules.validate_status)(&object, &old, &mut errors);
    rules.selectable.iter().for_each(|field| drop(rules.field_value(&object, field)));
    if !std::ptr::eq(served, kind) {
        versions::from_hub(served, &mut object);
    }
}

/// An object to patch.
fn live(kind: &Kind) -> Value {
    let container = |name: &str| json!({ "name": name, "image": "i", "ports": [{ "containerPort": 80, "protocol": "TCP" }] });
    let template = json!({ "metadata": { "labels": { "a": "b" } }, "spec": { "containers": [container("x"), container("y")] } });
    json!({
        "apiVersion": kind.api_version(), "kind": kind.kind,
        "metadata": { "name": "a", "namespace": "n", "labels": { "a": "b" }, "finalizers": ["x/y"] },
        "spec": { "template": template, "containers": [container("x")], "ports": [{ "port": 80, "protocol": "TCP" }] },
        "data": { "a": "b" }, "subsets": [{ "addresses": [{ "ip": "192.0.2.1" }] }],
    })
}

fn with_target(bytes: &[u8], run: impl FnOnce(&Kind, &Value, &[u8])) {
    let Some((kind, body)) = kind_of(bytes) else { return };
    run(kind, &live(kind), body);
}

/// Applying the same configuration twice changes nothing more.
fn read_apply(bytes: &[u8]) {
    let Some((kind, body)) = kind_of(bytes) else { return };
    let (schema, kind) = (Schema::builtin(), Schema::builtin().hub(kind));
    let Ok(decoded) = decode::json(schema, kind.type_id, body) else { return };
    let config = decoded.value;
    if !config.is_object() || !apply::check_config(schema, kind.type_id, &config).is_empty() {
        return;
    }
    let manager = Manager {
        applies: true,
        name: "fuzz".into(),
        api_version: kind.api_version(),
        subresource: String::new(),
    };
    let write =
        apply::Write { manager: &manager, reach: Reach::AllBut(&["status"]), now: "2026-01-01T00:00:00Z" };
    // The object and its owners after an apply.
    let once = |live: &Value, owners: &str| -> (Value, String) {
        let before = apply::Live { object: live, owners };
        let applied = apply::merge(schema, kind.type_id, before, &config, write, true).expect("forced");
        let object = applied.object.clone();
        let owners = apply::record_apply(schema, kind.type_id, live, applied, &object, write);
        (object, owners)
    };
    let first = once(&live(kind), "");
    assert_eq!(once(&first.0, &first.1), first, "apply is idempotent, {}", kind.kind);
}

fn read_fields(bytes: &[u8]) {
    let Ok(value) = serde_json::from_slice::<Value>(bytes) else { return };
    let set = FieldSet::from_value(&value);
    let mut text = String::new();
    set.write(&mut text);
    let again: Value = serde_json::from_str(&text).expect("what was written is JSON");
    assert_eq!(FieldSet::from_value(&again), set, "field sets come back: {text}");
    drop(set.paths());
    let mut rest = set.clone();
    rest.subtract(&set);
    assert!(rest.is_empty(), "a set less itself is empty");
}

fn read_quantity(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(quantity) = text.parse::<Quantity>() else { return };
    let printed = quantity.to_string();
    let again: Quantity =
        printed.parse().unwrap_or_else(|_| panic!("{text:?} printed as {printed:?} is no quantity"));
    assert_eq!(again, quantity, "{text:?} printed as {printed:?}");
    let _ = (quantity + again, quantity - again, quantity.millis(), quantity.units(), quantity.as_f64());
}

fn read_cron(text: &str) {
    if let Ok(schedule) = cron::Schedule::parse(text, None) {
        let from = jiff::Timestamp::UNIX_EPOCH;
        if let Some(next) = schedule.next(from) {
            assert!(next > from, "{text:?} goes back");
        }
    }
}

/// Two JSON values: a schema and what is to fit it.
fn read_open_schema(bytes: &[u8]) {
    let mut values = serde_json::Deserializer::from_slice(bytes).into_iter::<Value>();
    if let (Some(Ok(schema)), Some(Ok(value))) = (values.next(), values.next()) {
        open_schema::validate(&schema, &value, "x", "x", &mut Vec::new());
    }
}
