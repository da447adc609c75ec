//! Reading messages by the schema's field numbers.

use base64::Engine;
use serde_json::{Map, Value, json};

use super::{DEPTH_MAX, bad, is_dropped, unions, utf8};
use crate::decode::DecodeError;
use crate::schema::{Field, Schema, Shape, Type, TypeId};
use crate::time;

/// A field's value on the wire.
pub(super) enum Wire<'b> {
    Varint(u64),
    Fixed64(u64),
    Fixed32(u32),
    Bytes(&'b [u8]),
}

/// Iterates over the fields of a message.
pub(super) struct Fields<'b>(pub(super) &'b [u8]);

impl<'b> Fields<'b> {
    fn varint(&mut self) -> Result<u64, DecodeError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.0.split_first().ok_or_else(|| bad("a number is cut off"))?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(bad("a number is too long"))
    }

    fn take(&mut self, len: usize) -> Result<&'b [u8], DecodeError> {
        let (head, rest) = self.0.split_at_checked(len).ok_or_else(|| bad("a field is cut off"))?;
        self.0 = rest;
        Ok(head)
    }

    fn field(&mut self) -> Result<(u32, Wire<'b>), DecodeError> {
        let tag = self.varint()?;
        let number = u32::try_from(tag >> 3).map_err(|_| bad("a field number is too large"))?;
        let fixed = "a fixed number has its size";
        let wire = match tag & 7 {
            0 => Wire::Varint(self.varint()?),
            1 => Wire::Fixed64(u64::from_le_bytes(self.take(8)?.try_into().expect(fixed))),
            2 => {
                let len = usize::try_from(self.varint()?).map_err(|_| bad("a field is too long"))?;
                Wire::Bytes(self.take(len)?)
            }
            5 => Wire::Fixed32(u32::from_le_bytes(self.take(4)?.try_into().expect(fixed))),
            other => return Err(bad(&format!("wire type {other} is not in use"))),
        };
        Ok((number, wire))
    }
}

impl<'b> Iterator for Fields<'b> {
    type Item = Result<(u32, Wire<'b>), DecodeError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.0 = &[];
        }
        Some(field)
    }
}

pub(super) struct Reader<'s> {
    pub(super) schema: &'s Schema,
}

impl Reader<'_> {
    /// Reads a message into `out`; within structures that Go embeds, `inside` holds their numbers.
    pub(super) fn message(
        &self,
        id: TypeId,
        inside: &[u32],
        bytes: &[u8],
        depth: usize,
        out: &mut Map<String, Value>,
    ) -> Result<(), DecodeError> {
        if depth > DEPTH_MAX {
            return Err(bad("messages nest too deeply"));
        }
        let structure = self.schema.type_of(id);
        for item in Fields(bytes) {
            let (number, wire) = item?;
            let tags = [inside, &[number]].concat();
            if let Some(field) = structure.fields.iter().find(|f| f.tags == tags) {
                self.field(structure, field, wire, depth, out)?;
            } else if structure.fields.iter().any(|f| f.tags.starts_with(&tags))
                && let Wire::Bytes(inner) = wire
            {
                self.message(id, &tags, inner, depth + 1, out)?;
            }
        }
        Ok(())
    }

    fn field(
        &self,
        owner: &Type,
        field: &Field,
        wire: Wire,
        depth: usize,
        out: &mut Map<String, Value>,
    ) -> Result<(), DecodeError> {
        match &field.shape {
            Shape::List(inner) => {
                let list = out.entry(&field.name).or_insert_with(|| json!([]));
                let Value::Array(items) = list else { return Ok(()) };
                if let (Wire::Bytes(packed), Shape::Int32 | Shape::Int64 | Shape::Bool) =
                    (&wire, inner.as_ref())
                {
                    let mut numbers = Fields(packed);
                    while !numbers.0.is_empty() {
                        let number = numbers.varint()?;
                        items.extend(self.value(inner, Wire::Varint(number), depth)?);
                    }
                    return Ok(());
                }
                items.push(self.value(inner, wire, depth)?.unwrap_or(Value::Null));
            }
            Shape::Map(inner) => {
                let Wire::Bytes(entry) = wire else { return Err(bad("a map entry is no message")) };
                let (mut key, mut value) = (String::new(), None);
                for part in Fields(entry) {
                    match part? {
                        (1, Wire::Bytes(text)) => key = utf8(text)?,
                        (2, Wire::Bytes(bytes)) if unions::of(owner, field).is_some() => {
                            let union = unions::of(owner, field).expect("just asked");
                            value = Some(union.read(self, bytes, depth)?);
                        }
                        (2, wire) => value = self.map_value(inner, wire, depth)?,
                        _ => {}
                    }
                }
                let map = out.entry(&field.name).or_insert_with(|| json!({}));
                map[key] = value.unwrap_or_else(|| crate::decode::zero(inner));
            }
            shape => {
                let value = match (unions::of(owner, field), &wire) {
                    (Some(union), Wire::Bytes(bytes)) => Some(union.read(self, bytes, depth)?),
                    _ => self.value(shape, wire, depth)?,
                };
                if let Some(value) = value.filter(|v| !is_dropped(owner, field, v)) {
                    out.insert(field.name.clone(), value);
                }
            }
        }
        Ok(())
    }

    /// Lists as map values are messages with the items as field 1 (`map[string][]string`).
    fn map_value(&self, shape: &Shape, wire: Wire, depth: usize) -> Result<Option<Value>, DecodeError> {
        let (Shape::List(inner), Wire::Bytes(bytes)) = (shape, &wire) else {
            return self.value(shape, wire, depth);
        };
        let mut items = Vec::new();
        for part in Fields(bytes) {
            if let (1, wire) = part? {
                items.extend(self.value(inner, wire, depth + 1)?);
            }
        }
        Ok(Some(Value::Array(items)))
    }

    fn value(&self, shape: &Shape, wire: Wire, depth: usize) -> Result<Option<Value>, DecodeError> {
        Ok(Some(match (shape, wire) {
            (Shape::Bool, Wire::Varint(n)) => (n != 0).into(),
            (Shape::Int32 | Shape::Int64, Wire::Varint(n)) => (n as i64).into(),
            (Shape::Double, Wire::Fixed64(bits)) => f64::from_bits(bits).into(),
            (Shape::Double, Wire::Fixed32(bits)) => f64::from(f32::from_bits(bits)).into(),
            (Shape::String, Wire::Bytes(text)) => utf8(text)?.into(),
            (Shape::Bytes, Wire::Bytes(bytes)) => {
                base64::engine::general_purpose::STANDARD.encode(bytes).into()
            }
            (Shape::Object(id), Wire::Bytes(bytes)) => {
                let mut map = Map::new();
                self.message(*id, &[], bytes, depth + 1, &mut map)?;
                Value::Object(map)
            }
            (Shape::Time, Wire::Bytes(bytes)) => return timestamp(bytes, 0),
            (Shape::MicroTime, Wire::Bytes(bytes)) => return timestamp(bytes, 6),
            (Shape::Quantity, Wire::Bytes(bytes)) => match first_bytes(bytes)? {
                Some(text) => utf8(text)?.into(),
                None => "0".into(),
            },
            (Shape::IntOrString, Wire::Bytes(bytes)) => int_or_string(bytes)?,
            (Shape::Any, Wire::Bytes(bytes)) => match first_bytes(bytes)? {
                Some(raw) => serde_json::from_slice(raw).map_err(|e| bad(&format!("embedded JSON: {e}")))?,
                None => return Ok(None),
            },
            (shape, _) => return Err(bad(&format!("a field is no {shape:?}"))),
        }))
    }
}

fn first_bytes(message: &[u8]) -> Result<Option<&[u8]>, DecodeError> {
    for field in Fields(message) {
        if let (1, Wire::Bytes(bytes)) = field? {
            return Ok(Some(bytes));
        }
    }
    Ok(None)
}

/// `None` for Go's zero time, which is an empty message.
fn timestamp(message: &[u8], digits: u8) -> Result<Option<Value>, DecodeError> {
    let (mut seconds, mut nanos) = (0i64, 0i32);
    for field in Fields(message) {
        match field? {
            (1, Wire::Varint(n)) => seconds = n as i64,
            (2, Wire::Varint(n)) => nanos = n as i32,
            _ => {}
        }
    }
    if message.is_empty() {
        return Ok(None);
    }
    let time = jiff::Timestamp::new(seconds, nanos).map_err(|_| bad("a time is out of range"))?;
    Ok(Some(time::print(time, digits).into()))
}

fn int_or_string(message: &[u8]) -> Result<Value, DecodeError> {
    let (mut is_string, mut number, mut text) = (false, 0i64, String::new());
    for field in Fields(message) {
        match field? {
            (1, Wire::Varint(kind)) => is_string = kind == 1,
            (2, Wire::Varint(n)) => number = n as i64,
            (3, Wire::Bytes(bytes)) => text = utf8(bytes)?,
            _ => {}
        }
    }
    Ok(if is_string { text.into() } else { number.into() })
}
