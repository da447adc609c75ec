//! The three fields of JSON schemas that hold one thing or another in JSON, and a message with a field for
//! each in protobuf: `JSONSchemaPropsOrArray`, `OrBool` and `OrStringArray`.

use serde_json::{Map, Value};

use super::read::{Fields, Reader, Wire};
use super::utf8;
use super::write::{Writer, bytes, nested, varint_field};
use crate::decode::DecodeError;
use crate::schema::{Field, Schema, Type, TypeId};

const OWNER: &str = "apiextensions.v1.JSONSchemaProps";

/// What else than a schema the field may hold.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Union {
    /// `items`: a schema or a list of them.
    Schemas,
    /// `additionalProperties`, `additionalItems`: a schema or true or false.
    Bool,
    /// `dependencies`: a schema or a list of property names.
    Names,
}

/// The union a field is, if it is one.
pub(super) fn of(owner: &Type, field: &Field) -> Option<Union> {
    if owner.full != OWNER {
        return None;
    }
    match field.name.as_str() {
        "items" => Some(Union::Schemas),
        "additionalProperties" | "additionalItems" => Some(Union::Bool),
        "dependencies" => Some(Union::Names),
        _ => None,
    }
}

fn schema_type(schema: &Schema) -> TypeId {
    schema.type_named(OWNER).expect("a field of the type was just at hand")
}

impl Union {
    fn schema_number(self) -> u32 {
        if self == Union::Bool { 2 } else { 1 }
    }

    pub(super) fn read(self, reader: &Reader, message: &[u8], depth: usize) -> Result<Value, DecodeError> {
        let schema = |raw: &[u8]| -> Result<Value, DecodeError> {
            let mut map = Map::new();
            reader.message(schema_type(reader.schema), &[], raw, depth + 1, &mut map)?;
            Ok(Value::Object(map))
        };
        let (mut one, mut many, mut allowed) = (None, Vec::new(), false);
        for field in Fields(message) {
            match field? {
                (1, Wire::Varint(flag)) if self == Union::Bool => allowed = flag != 0,
                (number, Wire::Bytes(raw)) if number == self.schema_number() => one = Some(schema(raw)?),
                (2, Wire::Bytes(raw)) if self == Union::Schemas => many.push(schema(raw)?),
                (2, Wire::Bytes(raw)) if self == Union::Names => many.push(utf8(raw)?.into()),
                _ => {}
            }
        }
        Ok(match (one, self) {
            (Some(schema), _) => schema,
            (None, Union::Bool) => Value::Bool(allowed),
            (None, _) => Value::Array(many),
        })
    }

    pub(super) fn write(self, writer: &Writer, value: &Value, out: &mut Vec<u8>) {
        let id = schema_type(writer.schema);
        match (self, value) {
            (Union::Bool, Value::Bool(allowed)) => varint_field(out, 1, u64::from(*allowed)),
            (Union::Bool, Value::Object(_)) => {
                // Go sets `allows` beside every schema.
                varint_field(out, 1, 1);
                nested(out, 2, |out| writer.message(id, value, out));
            }
            (_, Value::Object(_)) => nested(out, 1, |out| writer.message(id, value, out)),
            (Union::Schemas, Value::Array(items)) => {
                items.iter().for_each(|item| nested(out, 2, |out| writer.message(id, item, out)));
            }
            (Union::Names, Value::Array(names)) => {
                names.iter().filter_map(Value::as_str).for_each(|name| bytes(out, 2, name.as_bytes()));
            }
            _ => {}
        }
    }
}
