//! JSON → protobuf → JSON, and version → stored version → version, are the identity, for random objects of
//! every kind made from the schema.

use knarr_api::object::Object;
use knarr_api::schema::{Field, Kind, Schema, Shape, Type, TypeId};
use knarr_api::{decode, protobuf, versions};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng};
use serde_json::{Map, Value, json};

/// Objects nest no deeper than this; JSON schemas contain themselves.
const DEPTH_MAX: usize = 7;

struct Maker<'s> {
    schema: &'s Schema,
    random: TestRng,
}

impl Maker<'_> {
    fn below(&mut self, limit: u32) -> u32 {
        self.random.next_u32() % limit
    }

    fn object(&mut self, id: TypeId, depth: usize) -> Value {
        let structure = self.schema.type_of(id);
        let mut map = Map::new();
        for field in structure.fields.iter().filter(|f| !f.tags.is_empty()) {
            let wanted = if depth < DEPTH_MAX { self.below(3) > 0 } else { false };
            if wanted || field.required {
                let value = match union(structure, field) {
                    true => self.union(&field.name, id, depth),
                    false => self.value(
                        &field.shape,
                        depth,
                        field.required || protobuf::is_pointer(structure, field),
                    ),
                };
                map.insert(field.name.clone(), value);
            }
        }
        Value::Object(map)
    }

    fn union(&mut self, name: &str, id: TypeId, depth: usize) -> Value {
        let schema = self.object(id, depth + 1);
        match (name, self.below(2)) {
            ("items", 0) => json!([schema, {}]),
            ("additionalProperties" | "additionalItems", 0) => json!(self.below(2) == 0),
            ("dependencies", 0) => json!({ "a": ["b", "c"] }),
            ("dependencies", _) => json!({ "a": schema }),
            _ => schema,
        }
    }

    /// `zero`: the field tells zero from absent.
    fn value(&mut self, shape: &Shape, depth: usize, zero: bool) -> Value {
        let number = self.random.next_u32() >> self.below(31);
        match shape {
            Shape::Bool => json!(!zero || number.is_multiple_of(2)),
            Shape::Int32 | Shape::Int64 => match (zero, self.below(4)) {
                (true, 0) => json!(0),
                (_, 1) => json!(-i64::from(number >> 1) - 1),
                (_, 2) if *shape == Shape::Int64 => json!(i64::from(number) << 31 | 1),
                _ => json!((number >> 1) | 1),
            },
            Shape::Double => json!(f64::from(number) + 0.5),
            Shape::String if zero && number.is_multiple_of(8) => json!(""),
            Shape::String => json!(format!("s{number}é")),
            Shape::Bytes => json!("AAECAw=="),
            Shape::Time => json!(format!("20{:02}-02-03T04:05:06Z", number % 60 + 10)),
            Shape::MicroTime => json!(format!("1969-02-03T04:05:06.{:06}Z", number % 1_000_000)),
            Shape::Quantity => json!(format!("{}m", number % 1000 * 2 + 1)),
            Shape::IntOrString if number.is_multiple_of(2) => json!(number % 50_000 + 1),
            Shape::IntOrString => json!(format!("{}%", number % 100)),
            Shape::Any => json!({ "x": [number, null, { "y": "z" }], "f": 1.5 }),
            Shape::Object(id) => self.object(*id, depth + 1),
            Shape::List(inner) => (0..1 + number % 3).map(|_| self.value(inner, depth + 1, true)).collect(),
            Shape::Map(inner) => {
                let keys = (0..1 + number % 3).map(|n| format!("k{n}"));
                keys.map(|k| (k, self.value(inner, depth + 1, true))).collect::<Map<_, _>>().into()
            }
        }
    }
}

/// Fields whose JSON is one of several things.
fn union(owner: &Type, field: &Field) -> bool {
    owner.name == "JSONSchemaProps"
        && matches!(
            field.name.as_str(),
            "items" | "additionalProperties" | "additionalItems" | "dependencies"
        )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn every_kind_comes_back_from_protobuf_as_it_went(seed: [u8; 32]) {
        let schema = Schema::builtin();
        let mut maker = Maker { schema, random: TestRng::from_seed(RngAlgorithm::ChaCha, &seed) };
        for kind in schema.kinds().iter().chain(schema.old_kinds()) {
            let mut object = maker.object(kind.type_id, 0);
            object["apiVersion"] = json!(kind.api_version());
            object["kind"] = json!(kind.kind);
            // The decoder's form is the stored one; it must have nothing to drop here.
            let decoded = decode::value(schema, kind.type_id, object).expect("fits the schema");
            prop_assert!(decoded.issues.is_empty(), "{}: {:?}", kind.kind, decoded.issues);
            let bytes = protobuf::encode(schema, kind.type_id, &decoded.value);
            let back = protobuf::decode(schema, kind.type_id, &bytes).expect("what was written reads");
            prop_assert_eq!(&back, &decoded.value, "{}", &kind.kind);
            // And what was read is written the same again.
            prop_assert_eq!(protobuf::encode(schema, kind.type_id, &back), bytes);
        }
    }

    #[test]
    fn objects_come_back_from_the_stored_version_as_they_went(seed: [u8; 32]) {
        let schema = Schema::builtin();
        let mut maker = Maker { schema, random: TestRng::from_seed(RngAlgorithm::ChaCha, &seed) };
        let converted = schema.kinds().iter().chain(schema.old_kinds()).filter(|k| k.conversion.is_some());
        // These say the same in other words when they come back; unit tests have them.
        let reworded = |k: &&Kind| {
            matches!(
                (k.kind.as_str(), k.version.as_str()),
                ("EndpointSlice", _) | ("HorizontalPodAutoscaler", "v1") | ("RoleBinding" | "ClusterRoleBinding", "v1alpha1")
            )
        };
        for kind in converted.filter(|k| !reworded(k)) {
            let mut object = maker.object(kind.type_id, 0);
            object["apiVersion"] = json!(kind.api_version());
            object["kind"] = json!(kind.kind);
            // Kept as annotations, which only the stored version shows.
            object.remove_at("spec.rollbackTo");
            object.remove_at("spec.templateGeneration");
            let mut there = object.clone();
            versions::to_hub(schema, kind, &mut there);
            let hub = schema.hub(kind);
            let decoded = decode::value(schema, hub.type_id, there.clone()).expect("fits the stored version");
            prop_assert!(decoded.issues.is_empty(), "{} {}: {:?}", kind.api_version(), kind.kind, decoded.issues);
            versions::from_hub(kind, &mut there);
            prop_assert_eq!(there, object, "{} {}", kind.api_version(), &kind.kind);
        }
    }
}
