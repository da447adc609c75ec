//! OpenAPI v3 schemas as custom resources have them: does a value fit, and if not, why, in the words of the validator
//! upstream uses (`kube-openapi/pkg/validation`). Pure; the schema is JSON as its author wrote it.
//!
//! Left out: CEL rules (`x-kubernetes-validations`), and formats that are not common.

use std::net::IpAddr;

use regex::Regex;
use serde_json::Value;

use crate::field;
use crate::object::Object;
use crate::rules::Errors;

/// Schemas are nested by their authors, values by clients: deeper ones than this are not looked into. JSON readers
/// stop earlier.
const DEPTH_MAX: usize = 128;

/// Every way in which the value does not fit the schema. `path` is where the value is; `root` is the name that
/// messages give it, which upstream leaves empty for defaults.
pub fn validate(schema: &Value, value: &Value, path: &str, root: &str, errors: &mut Errors) {
    Place { path: path.to_owned(), name: root.to_owned() }.check(schema, value, errors, 0);
}

struct Place {
    /// For the error.
    path: String,
    /// For its message.
    name: String,
}

impl Place {
    fn property(&self, name: &str) -> Place {
        let join = |at: &str| if at.is_empty() { name.to_owned() } else { format!("{at}.{name}") };
        Place { path: join(&self.path), name: join(&self.name) }
    }

    fn item(&self, index: usize) -> Place {
        Place { path: field::index(&self.path, index), name: format!("{}[{index}]", self.name) }
    }

    fn refuse(&self, value: &Value, why: impl std::fmt::Display, errors: &mut Errors) {
        errors.push(field::Error::invalid(
            self.path.clone(),
            value.clone(),
            format!("{} in body {why}", self.name),
        ));
    }

    fn check(&self, schema: &Value, value: &Value, errors: &mut Errors, depth: usize) {
        if depth > DEPTH_MAX || (value.is_null() && schema.bool_at("nullable")) {
            return;
        }
        if !self.has_type(schema, value, errors) {
            return;
        }
        self.is_listed(schema, value, errors);
        match value {
            Value::String(text) => self.text(schema, text, value, errors),
            Value::Number(_) => self.number(schema, value, errors),
            Value::Array(items) => self.list(schema, items, value, errors, depth),
            Value::Object(_) => self.object(schema, value, errors, depth),
            _ => {}
        }
        self.logic(schema, value, errors, depth);
    }

    fn has_type(&self, schema: &Value, value: &Value, errors: &mut Errors) -> bool {
        let actual = match value {
            Value::Null => "null",
            Value::Bool(_) => "boolean",
            Value::Number(n) if is_whole(n) => "integer",
            Value::Number(_) => "number",
            Value::String(_) => "string",
            Value::Array(_) => "array",
            Value::Object(_) => "object",
        };
        if schema.bool_at("x-kubernetes-int-or-string") {
            let fits = matches!(actual, "integer" | "string");
            if !fits {
                let text = format!("{} in body must be of type integer,string: {actual:?}", self.name);
                errors.push(field::Error::type_invalid(self.path.clone(), actual, text));
            }
            return fits;
        }
        let wanted = schema.str_at("type");
        let fits = wanted.is_empty() || wanted == actual || (wanted == "number" && actual == "integer");
        if !fits {
            let text = format!("{} in body must be of type {wanted}: {actual:?}", self.name);
            errors.push(field::Error::type_invalid(self.path.clone(), actual, text));
        }
        fits
    }

    fn is_listed(&self, schema: &Value, value: &Value, errors: &mut Errors) {
        let listed = schema.list_at("enum");
        if !listed.is_empty() && !listed.contains(value) {
            let shown: Vec<String> =
                listed.iter().map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned)).collect();
            let shown: Vec<&str> = shown.iter().map(String::as_str).collect();
            errors.push(field::Error::not_supported(self.path.clone(), value.clone(), &shown));
        }
    }

    fn text(&self, schema: &Value, text: &str, value: &Value, errors: &mut Errors) {
        let length = text.chars().count() as i64;
        if let Some(most) = schema.int_at("maxLength").filter(|most| length > *most) {
            errors.push(field::Error::too_long(self.path.clone(), usize::try_from(most).unwrap_or(0)));
        }
        if let Some(least) = schema.int_at("minLength").filter(|least| length < *least) {
            self.refuse(value, format!("should be at least {least} chars long"), errors);
        }
        let pattern = schema.str_at("pattern");
        // A pattern that cannot be read was refused with its schema.
        if !pattern.is_empty() && Regex::new(pattern).is_ok_and(|regex| !regex.is_match(text)) {
            self.refuse(value, format!("should match '{pattern}'"), errors);
        }
        let format = schema.str_at("format");
        if !is_of_format(format, text) {
            let why = format!("{} in body must be of type {format}: {text:?}", self.name);
            errors.push(field::Error::type_invalid(self.path.clone(), text, why));
        }
    }

    fn number(&self, schema: &Value, value: &Value, errors: &mut Errors) {
        let number = value.as_f64().unwrap_or(0.0);
        let bound = |name: &str| schema.at(name).and_then(Value::as_f64).map(|bound| (bound, &schema[name]));
        if let Some((most, shown)) = bound("maximum") {
            match schema.bool_at("exclusiveMaximum") {
                true if number >= most => self.refuse(value, format!("should be less than {shown}"), errors),
                false if number > most => {
                    self.refuse(value, format!("should be less than or equal to {shown}"), errors)
                }
                _ => {}
            }
        }
        if let Some((least, shown)) = bound("minimum") {
            match schema.bool_at("exclusiveMinimum") {
                true if number <= least => {
                    self.refuse(value, format!("should be greater than {shown}"), errors)
                }
                false if number < least => {
                    self.refuse(value, format!("should be greater than or equal to {shown}"), errors);
                }
                _ => {}
            }
        }
        if let Some((unit, shown)) = bound("multipleOf").filter(|(unit, _)| *unit > 0.0)
            && (number / unit).fract() != 0.0
        {
            self.refuse(value, format!("should be a multiple of {shown}"), errors);
        }
        let whole = value.as_i64();
        if schema.str_at("format") == "int32" && whole.is_some_and(|n| i32::try_from(n).is_err()) {
            self.refuse(value, "must be of type int32", errors);
        }
    }

    fn list(&self, schema: &Value, items: &[Value], value: &Value, errors: &mut Errors, depth: usize) {
        let count = items.len();
        let bound = |name: &str| schema.int_at(name).and_then(|n| usize::try_from(n).ok());
        if let Some(most) = bound("maxItems").filter(|most| count > *most) {
            errors.push(field::Error::too_many(self.path.clone(), count, most));
        }
        if let Some(least) = bound("minItems").filter(|least| count < *least) {
            self.refuse(value, format!("should have at least {least} items"), errors);
        }
        if let Some(of) = schema.at("items") {
            items.iter().enumerate().for_each(|(i, item)| self.item(i).check(of, item, errors, depth + 1));
        }
        match schema.str_at("x-kubernetes-list-type") {
            "set" => self.unique(items, |item| item.clone(), errors),
            "map" => {
                let keys = schema.list_at("x-kubernetes-list-map-keys");
                let names = || keys.iter().filter_map(Value::as_str);
                self.unique(items, |item| names().map(|k| (k.to_owned(), item[k].clone())).collect(), errors);
            }
            _ => {}
        }
    }

    fn unique(&self, items: &[Value], key: impl Fn(&Value) -> Value, errors: &mut Errors) {
        let mut seen = std::collections::HashSet::new();
        for (i, item) in items.iter().enumerate() {
            let key = key(item);
            if !seen.insert(key.to_string()) {
                errors.push(field::Error::duplicate(field::index(&self.path, i), key));
            }
        }
    }

    fn object(&self, schema: &Value, value: &Value, errors: &mut Errors, depth: usize) {
        let Some(map) = value.as_object() else { return };
        let bound = |name: &str| schema.int_at(name).and_then(|n| usize::try_from(n).ok());
        if let Some(most) = bound("maxProperties").filter(|most| map.len() > *most) {
            errors.push(field::Error::too_many(self.path.clone(), map.len(), most));
        }
        if let Some(least) = bound("minProperties").filter(|least| map.len() < *least) {
            self.refuse(value, format!("should have at least {least} properties"), errors);
        }
        for name in schema.list_at("required").iter().filter_map(Value::as_str) {
            if !map.contains_key(name) {
                errors.push(field::Error::required(self.property(name).path, ""));
            }
        }
        let properties = schema.map_at("properties");
        for (name, item) in map {
            if let Some(of) = properties.and_then(|p| p.get(name)) {
                self.property(name).check(of, item, errors, depth + 1);
                continue;
            }
            match schema.at("additionalProperties") {
                Some(Value::Bool(false)) => {
                    let why = format!("{}.{name} in body is a forbidden property", self.name);
                    errors.push(field::Error::invalid(self.path.clone(), value.clone(), why));
                }
                Some(of @ Value::Object(_)) => self.property(name).check(of, item, errors, depth + 1),
                _ => {}
            }
        }
    }

    fn logic(&self, schema: &Value, value: &Value, errors: &mut Errors, depth: usize) {
        let broken = |part: &Value| {
            let mut errors = Errors::new();
            self.check(part, value, &mut errors, depth + 1);
            errors
        };
        let say = |why: &str, errors: &mut Errors| {
            errors.push(field::Error::invalid(
                self.path.clone(),
                value.clone(),
                format!("{:?} {why}", self.name),
            ));
        };
        let fitting = |list: &str| schema.list_at(list).iter().filter(|part| broken(part).is_empty()).count();
        for part in schema.list_at("allOf") {
            errors.extend(broken(part));
        }
        if !schema.list_at("anyOf").is_empty() && fitting("anyOf") == 0 {
            say("must validate at least one schema (anyOf)", errors);
        }
        if !schema.list_at("oneOf").is_empty() && fitting("oneOf") != 1 {
            let found = if fitting("oneOf") == 0 { "Found none valid" } else { "Found more than one valid" };
            say(&format!("must validate one and only one schema (oneOf). {found}"), errors);
        }
        if schema.at("not").is_some_and(|part| broken(part).is_empty()) {
            say("must not validate the schema (not)", errors);
        }
    }
}

fn is_whole(number: &serde_json::Number) -> bool {
    number.is_i64() || number.is_u64() || number.as_f64().is_some_and(|n| n.fract() == 0.0)
}

/// Formats that are checked; others are remarks.
fn is_of_format(format: &str, text: &str) -> bool {
    match format {
        "date-time" | "datetime" => text.parse::<jiff::Timestamp>().is_ok(),
        "date" => text.parse::<jiff::civil::Date>().is_ok(),
        "ipv4" => matches!(text.parse(), Ok(IpAddr::V4(_))),
        "ipv6" => matches!(text.parse(), Ok(IpAddr::V6(_))),
        "cidr" => crate::kinds::networking::Cidr::parse(text).is_some(),
        "byte" => {
            use base64::Engine;
            base64::engine::general_purpose::STANDARD.decode(text).is_ok()
        }
        "uuid" => is_uuid(text),
        _ => true,
    }
}

fn is_uuid(text: &str) -> bool {
    let bare: String = text.chars().filter(|c| *c != '-').collect();
    bare.len() == 32 && bare.chars().all(|c| c.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_are_judged_in_upstreams_words() {
        let schema = json!({ "type": "object", "required": ["name"], "properties": {
            "name": { "type": "string", "pattern": "^[a-z]+$", "maxLength": 5 },
            "count": { "type": "integer", "minimum": 1, "maximum": 3 },
            "port": { "x-kubernetes-int-or-string": true },
            "kind": { "type": "string", "enum": ["A", "B"] },
            "when": { "type": "string", "format": "date-time" },
            "list": { "type": "array", "maxItems": 2, "items": { "type": "string" }, "x-kubernetes-list-type": "set" },
            "map": { "type": "object", "additionalProperties": { "type": "boolean" } },
            "either": { "type": "object", "oneOf": [{ "required": ["a"] }, { "required": ["b"] }] },
        } });
        for (value, wanted) in [
            (
                json!({ "name": "abc", "count": 2, "port": "http", "kind": "A", "list": ["a"], "map": { "x": true } }),
                vec![],
            ),
            (json!({ "name": "abc", "count": 2.0, "either": { "a": 1 } }), vec![]),
            (json!({}), vec!["x.name: Required value"]),
            (
                json!({ "name": "A" }),
                vec!["x.name: Invalid value: \"A\": x.name in body should match '^[a-z]+$'"],
            ),
            (json!({ "name": "abcdef" }), vec!["x.name: Too long: may not be more than 5 bytes"]),
            (
                json!({ "name": "a", "count": 5 }),
                vec!["x.count: Invalid value: 5: x.count in body should be less than or equal to 3"],
            ),
            (
                json!({ "name": 1 }),
                vec![
                    "x.name: Invalid value: \"integer\": x.name in body must be of type string: \"integer\"",
                ],
            ),
            (
                json!({ "name": "a", "kind": "C" }),
                vec!["x.kind: Unsupported value: \"C\": supported values: \"A\", \"B\""],
            ),
            (json!({ "name": "a", "list": ["a", "a"] }), vec!["x.list[1]: Duplicate value: \"a\""]),
            (
                json!({ "name": "a", "map": { "k": 1 } }),
                vec![
                    "x.map.k: Invalid value: \"integer\": x.map.k in body must be of type boolean: \"integer\"",
                ],
            ),
            (
                json!({ "name": "a", "either": {} }),
                vec![
                    "x.either: Invalid value: {}: \"x.either\" must validate one and only one schema (oneOf). Found none valid",
                ],
            ),
            (
                json!({ "name": "a", "when": "today" }),
                vec!["x.when: Invalid value: \"today\": x.when in body must be of type date-time: \"today\""],
            ),
        ] {
            let mut errors = Errors::new();
            validate(&schema, &value, "x", "x", &mut errors);
            let found: Vec<String> = errors.iter().map(ToString::to_string).collect();
            assert_eq!(found, wanted, "{value}");
        }
    }
}
