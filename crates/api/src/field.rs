//! Field errors: which field breaks which rule, worded as upstream's `field.Error`.

use std::fmt;

use serde_json::{Value, json};

/// One broken rule.
#[derive(Debug, Clone, PartialEq)]
pub struct Error {
    /// Path of the field, such as `spec.containers[0].image`.
    pub path: String,
    pub kind: ErrorKind,
    /// The offending value; `Null` where the message shows none.
    pub value: Value,
    pub detail: String,
}

/// The kinds of field error, each with upstream's reason and words.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ErrorKind {
    Required,
    Invalid,
    NotSupported,
    Duplicate,
    Forbidden,
    TooLong,
    TooMany,
    NotFound,
    TypeInvalid,
    Internal,
}

impl Error {
    fn new(path: impl Into<String>, kind: ErrorKind, value: Value, detail: impl Into<String>) -> Self {
        Error { path: path.into(), kind, value, detail: detail.into() }
    }

    pub fn required(path: impl Into<String>, detail: impl Into<String>) -> Self {
        Error::new(path, ErrorKind::Required, Value::Null, detail)
    }

    pub fn invalid(path: impl Into<String>, value: impl Into<Value>, detail: impl Into<String>) -> Self {
        Error::new(path, ErrorKind::Invalid, value.into(), detail)
    }

    /// A value of another type than the field's.
    pub fn type_invalid(path: impl Into<String>, value: impl Into<Value>, detail: impl Into<String>) -> Self {
        Error::new(path, ErrorKind::TypeInvalid, value.into(), detail)
    }

    pub fn duplicate(path: impl Into<String>, value: impl Into<Value>) -> Self {
        Error::new(path, ErrorKind::Duplicate, value.into(), "")
    }

    pub fn forbidden(path: impl Into<String>, detail: impl Into<String>) -> Self {
        Error::new(path, ErrorKind::Forbidden, Value::Null, detail)
    }

    pub fn not_found(path: impl Into<String>, value: impl Into<Value>) -> Self {
        Error::new(path, ErrorKind::NotFound, value.into(), "")
    }

    pub fn not_supported(path: impl Into<String>, value: impl Into<Value>, supported: &[&str]) -> Self {
        let list: Vec<String> = supported.iter().map(|s| format!("{s:?}")).collect();
        let detail = format!("supported values: {}", list.join(", "));
        Error::new(path, ErrorKind::NotSupported, value.into(), detail)
    }

    /// `limit` is in bytes.
    pub fn too_long(path: impl Into<String>, limit: usize) -> Self {
        Error::new(path, ErrorKind::TooLong, Value::Null, format!("may not be more than {limit} bytes"))
    }

    /// `limit` is in items.
    pub fn too_many(path: impl Into<String>, actual: usize, limit: usize) -> Self {
        let detail = format!("must have at most {limit} items");
        Error::new(path, ErrorKind::TooMany, json!(actual), detail)
    }

    /// The machine-readable reason in `details.causes`.
    pub fn reason(&self) -> &'static str {
        match self.kind {
            ErrorKind::Required => "FieldValueRequired",
            ErrorKind::Invalid => "FieldValueInvalid",
            ErrorKind::NotSupported => "FieldValueNotSupported",
            ErrorKind::Duplicate => "FieldValueDuplicate",
            ErrorKind::Forbidden => "FieldValueForbidden",
            ErrorKind::TooLong => "FieldValueTooLong",
            ErrorKind::TooMany => "FieldValueTooMany",
            ErrorKind::NotFound => "FieldValueNotFound",
            ErrorKind::TypeInvalid => "FieldValueTypeInvalid",
            ErrorKind::Internal => "InternalError",
        }
    }

    /// Words and value without the path.
    pub fn body(&self) -> String {
        let words = match self.kind {
            ErrorKind::Required => "Required value",
            ErrorKind::Invalid => "Invalid value",
            ErrorKind::NotSupported => "Unsupported value",
            ErrorKind::Duplicate => "Duplicate value",
            ErrorKind::Forbidden => "Forbidden",
            ErrorKind::TooLong => "Too long",
            ErrorKind::TooMany => "Too many",
            ErrorKind::NotFound => "Not found",
            ErrorKind::TypeInvalid => "Invalid value",
            ErrorKind::Internal => "Internal error",
        };
        let shows_value = !matches!(
            self.kind,
            ErrorKind::Required | ErrorKind::Forbidden | ErrorKind::TooLong | ErrorKind::Internal
        );
        let mut text = words.to_owned();
        if shows_value {
            text.push_str(": ");
            text.push_str(&show(&self.value));
        }
        if !self.detail.is_empty() {
            text.push_str(": ");
            text.push_str(&self.detail);
        }
        text
    }

    /// An entry of `details.causes`.
    pub fn to_cause(&self) -> Value {
        json!({ "reason": self.reason(), "message": self.body(), "field": self.path })
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.body())
    }
}

/// Values as Go prints them: strings quoted, `null` for nothing, objects as JSON.
fn show(value: &Value) -> String {
    match value {
        Value::String(s) => format!("{s:?}"),
        other => other.to_string(),
    }
}

/// Joins a path and a field name.
pub fn child(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

/// `path[index]`.
pub fn index(path: &str, index: usize) -> String {
    format!("{path}[{index}]")
}

/// `path[key]`, for maps.
pub fn key(path: &str, key: &str) -> String {
    format!("{path}[{key}]")
}
