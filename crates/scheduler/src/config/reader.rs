//! Reading a document strictly, with the path of every field at hand.

use serde_json::{Map, Value};
use std::collections::HashSet;
use std::time::Duration;

/// An object of the document. Fields are taken by name; at the end [`Reader::no_others`] tells what was not asked for.
pub struct Reader<'a> {
    path: String,
    fields: Option<&'a Map<String, Value>>,
    asked: HashSet<String>,
    errors: &'a mut Vec<String>,
}

impl<'a> Reader<'a> {
    pub fn root(value: &'a Value, errors: &'a mut Vec<String>) -> Self {
        Reader::new(String::new(), value, errors)
    }

    fn new(path: String, value: &'a Value, errors: &'a mut Vec<String>) -> Self {
        let fields = value.as_object();
        if fields.is_none() && !value.is_null() {
            errors.push(format!("{path}: Invalid value: must be an object"));
        }
        Reader { path, fields, asked: HashSet::new(), errors }
    }

    fn path(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    pub fn error(&mut self, name: &str, what: &str) {
        let path = self.path(name);
        self.errors.push(format!("{path}: {what}"));
    }

    pub fn has(&self, name: &str) -> bool {
        self.fields.is_some_and(|fields| fields.get(name).is_some_and(|value| !value.is_null()))
    }

    /// The field is known, whatever it says.
    pub fn accept(&mut self, name: &str) {
        self.asked.insert(name.to_owned());
    }

    fn get(&mut self, name: &str) -> Option<&'a Value> {
        self.accept(name);
        self.fields?.get(name).filter(|value| !value.is_null())
    }

    fn typed<T>(&mut self, name: &str, wanted: &str, read: impl Fn(&Value) -> Option<T>) -> Option<T> {
        let value = self.get(name)?;
        let result = read(value);
        if result.is_none() {
            self.error(name, &format!("Invalid value: {value}: must be {wanted}"));
        }
        result
    }

    pub fn text(&mut self, name: &str) -> Option<String> {
        self.typed(name, "a string", |value| value.as_str().map(str::to_owned))
    }

    pub fn integer(&mut self, name: &str) -> Option<i64> {
        self.typed(name, "an integer", Value::as_i64)
    }

    pub fn boolean(&mut self, name: &str) -> Option<bool> {
        self.typed(name, "a boolean", Value::as_bool)
    }

    /// As Go writes it: `1h30m`, `500ms`.
    pub fn duration(&mut self, name: &str) -> Option<Duration> {
        self.typed(name, "a duration", |value| go_duration(value.as_str()?))
    }

    pub fn texts(&mut self, name: &str) -> Vec<String> {
        self.typed(name, "a list of strings", |value| {
            value.as_array()?.iter().map(|text| text.as_str().map(str::to_owned)).collect()
        })
        .unwrap_or_default()
    }

    /// A part that a library type describes.
    pub fn decoded<T: serde::de::DeserializeOwned>(&mut self, name: &str) -> Option<T> {
        let value = self.get(name)?;
        match serde_json::from_value(value.clone()) {
            Ok(decoded) => Some(decoded),
            Err(error) => {
                self.error(name, &format!("Invalid value: {error}"));
                None
            }
        }
    }

    pub fn object(&mut self, name: &str, read: impl FnOnce(&mut Reader)) {
        if let Some(value) = self.get(name) {
            let path = self.path(name);
            read(&mut Reader::new(path, value, self.errors));
        }
    }

    pub fn list<T>(&mut self, name: &str, mut read: impl FnMut(&mut Reader) -> T) -> Vec<T> {
        let Some(value) = self.get(name) else { return Vec::new() };
        let path = self.path(name);
        let Some(items) = value.as_array() else {
            self.error(name, "Invalid value: must be a list");
            return Vec::new();
        };
        let items = items.iter().enumerate();
        items
            .map(|(index, item)| read(&mut Reader::new(format!("{path}[{index}]"), item, self.errors)))
            .collect()
    }

    pub fn no_others(&mut self) {
        let unknown: Vec<String> = self
            .fields
            .into_iter()
            .flat_map(Map::keys)
            .filter(|name| !self.asked.contains(*name))
            .cloned()
            .collect();
        for name in unknown {
            let path = self.path(&name);
            self.errors.push(format!("strict decoding error: unknown field {path:?}"));
        }
    }
}

fn go_duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let (mut rest, mut seconds) = (text, 0.0);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let units =
            [("ms", 1e-3), ("us", 1e-6), ("µs", 1e-6), ("ns", 1e-9), ("h", 3600.0), ("m", 60.0), ("s", 1.0)];
        let (unit, factor) = units.into_iter().find(|(unit, _)| rest.starts_with(unit))?;
        rest = &rest[unit.len()..];
        seconds += number * factor;
    }
    (!text.is_empty()).then(|| Duration::try_from_secs_f64(seconds).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_go_writes_them() {
        let cases =
            [("1h30m", Some(5400.0)), ("500ms", Some(0.5)), ("0", Some(0.0)), ("5", None), ("", None)];
        for (text, seconds) in cases {
            assert_eq!(go_duration(text), seconds.map(Duration::from_secs_f64), "{text:?}");
        }
    }
}
