//! Reading and changing untyped objects by dotted path, without a cascade of `get`s.

use serde_json::{Map, Value, json};

/// Dotted-path access to a JSON tree. Paths name fields only; list items are reached by iterating.
pub trait Object {
    /// The value at the path, if it is there and not null.
    fn at(&self, path: &str) -> Option<&Value>;

    /// The string at the path; empty when absent.
    fn str_at(&self, path: &str) -> &str;

    /// The integer at the path.
    fn int_at(&self, path: &str) -> Option<i64>;

    /// True if the path holds `true`.
    fn bool_at(&self, path: &str) -> bool;

    /// The items of the list at the path; none when absent.
    fn list_at(&self, path: &str) -> &[Value];

    /// The entries of the map at the path.
    fn map_at(&self, path: &str) -> Option<&Map<String, Value>>;

    /// Sets the value at the path, making objects on the way.
    fn set_at(&mut self, path: &str, value: impl Into<Value>);

    /// Removes and returns the value at the path.
    fn remove_at(&mut self, path: &str) -> Option<Value>;

    fn name(&self) -> &str {
        self.str_at("metadata.name")
    }

    fn namespace(&self) -> &str {
        self.str_at("metadata.namespace")
    }

    fn uid(&self) -> &str {
        self.str_at("metadata.uid")
    }
}

impl Object for Value {
    fn at(&self, path: &str) -> Option<&Value> {
        let mut here = self;
        for part in path.split('.') {
            here = here.get(part)?;
        }
        (!here.is_null()).then_some(here)
    }

    fn str_at(&self, path: &str) -> &str {
        self.at(path).and_then(Value::as_str).unwrap_or_default()
    }

    fn int_at(&self, path: &str) -> Option<i64> {
        self.at(path)?.as_i64()
    }

    fn bool_at(&self, path: &str) -> bool {
        self.at(path).and_then(Value::as_bool).unwrap_or(false)
    }

    fn list_at(&self, path: &str) -> &[Value] {
        self.at(path).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
    }

    fn map_at(&self, path: &str) -> Option<&Map<String, Value>> {
        self.at(path)?.as_object()
    }

    fn set_at(&mut self, path: &str, value: impl Into<Value>) {
        let mut here = self;
        for part in path.split('.') {
            if !here.is_object() {
                *here = json!({});
            }
            here = &mut here[part];
        }
        *here = value.into();
    }

    fn remove_at(&mut self, path: &str) -> Option<Value> {
        let (parents, last) = path.rsplit_once('.').unwrap_or(("", path));
        let mut here = self;
        for part in parents.split('.').filter(|p| !p.is_empty()) {
            here = here.get_mut(part)?;
        }
        here.as_object_mut()?.remove(last)
    }
}
