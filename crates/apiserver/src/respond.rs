//! Answers: content negotiation, and the forms an object or list can take on the way out.
//!
//! JSON of whole objects is what is stored, so it is passed on as it is. Tables, partial metadata and YAML
//! are made per request.

use bytes::Bytes;
use futures::stream;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use knarr_api::columns::{Clock, Columns};
use knarr_api::object::Object;
use knarr_api::schema::Kind;
use knarr_api::status::{Result, Status};
use serde_json::{Value, json};

use crate::encode;

/// The body of every answer.
pub type Body = UnsyncBoxBody<Bytes, std::io::Error>;
pub type Answer = Response<Body>;

/// Forms of answers.
pub const OFFERED: &str = "application/json, application/yaml";
/// Forms of bodies.
pub const ACCEPTED: &str = "application/json, application/yaml, application/vnd.kubernetes.protobuf";

/// The form the client asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Form {
    pub encoding: Encoding,
    pub shape: Shape,
    pub pretty: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Encoding {
    Json,
    Yaml,
}

/// What of the object is shown.
#[derive(Debug, Clone, PartialEq)]
pub enum Shape {
    Whole,
    /// Rows for printing, of this `meta.k8s.io` version; `include` says what goes with each row.
    Table {
        version: String,
        include: Include,
    },
    /// Metadata only, of this `meta.k8s.io` version.
    Partial {
        version: String,
    },
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Include {
    None,
    Metadata,
    Object,
}

impl Form {
    pub const JSON: Form = Form { encoding: Encoding::Json, shape: Shape::Whole, pretty: false };

    /// Picks the first form of the `Accept` header that the server has.
    pub fn negotiate(headers: &HeaderMap, query: &crate::request::Query) -> Result<Form> {
        let accept = headers.get(header::ACCEPT).and_then(|v| v.to_str().ok()).unwrap_or("*/*");
        let pretty = match query.get("pretty") {
            Some(value) => matches!(value, "" | "1" | "true"),
            None => {
                let agent = headers.get(header::USER_AGENT).and_then(|v| v.to_str().ok()).unwrap_or_default();
                ["curl", "Wget", "Mozilla/5.0"].iter().any(|a| agent.starts_with(a))
            }
        };
        let include = match query.get("includeObject") {
            Some("None") => Include::None,
            Some("Object") => Include::Object,
            _ => Include::Metadata,
        };
        for clause in accept.split(',') {
            let mut parts = clause.split(';').map(str::trim);
            let encoding = match parts.next().unwrap_or_default() {
                "application/json" | "*/*" | "application/*" | "" => Encoding::Json,
                "application/yaml" => Encoding::Yaml,
                _ => continue,
            };
            let parameters: Vec<(&str, &str)> = parts.filter_map(|p| p.split_once('=')).collect();
            let find = |name: &str| parameters.iter().find(|(n, _)| *n == name).map(|(_, v)| *v);
            let version = find("v").unwrap_or("v1").to_owned();
            let shape = match find("as") {
                None => Shape::Whole,
                _ if find("g").is_some_and(|g| g != "meta.k8s.io") => continue,
                _ if !matches!(version.as_str(), "v1" | "v1beta1") => continue,
                Some("Table") => Shape::Table { version, include },
                Some("PartialObjectMetadata" | "PartialObjectMetadataList") => Shape::Partial { version },
                Some(_) => continue,
            };
            return Ok(Form { encoding, shape, pretty });
        }
        Err(Status::not_acceptable(OFFERED))
    }

    pub fn content_type(&self) -> &'static str {
        match self.encoding {
            Encoding::Json => "application/json",
            Encoding::Yaml => "application/yaml",
        }
    }

    /// True if stored bytes are already the answer.
    pub fn is_stored_form(&self) -> bool {
        *self == Form::JSON
    }

    pub fn encode(&self, value: &Value) -> Bytes {
        let text = match (self.encoding, self.pretty) {
            (Encoding::Yaml, _) => serde_yaml_ng::to_string(value).expect("trees encode"),
            (Encoding::Json, true) => {
                let mut text = serde_json::to_string_pretty(value).expect("trees encode");
                text.push('\n');
                text
            }
            (Encoding::Json, false) => value.to_string(),
        };
        Bytes::from(text)
    }
}

/// A fixed body.
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// A body of pieces that already exist: nothing is copied together.
pub fn pieces(chunks: Vec<Bytes>) -> Body {
    let frames = chunks.into_iter().map(|chunk| Ok(Frame::data(chunk)));
    StreamBody::new(stream::iter(frames)).boxed_unsync()
}

pub fn answer(code: u16, content_type: &'static str, body: Body) -> Answer {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    response
}

pub fn text(code: u16, body: impl Into<Bytes>) -> Answer {
    let mut response = answer(code, "text/plain; charset=utf-8", full(body));
    response.headers_mut().insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    response
}

pub fn json(code: u16, value: &Value, form: &Form) -> Answer {
    answer(code, form.content_type(), full(form.encode(value)))
}

pub fn refuse(status: &Status, form: &Form) -> Answer {
    let mut response = json(status.code, &status.to_value(), form);
    let seconds = status.details.as_ref().and_then(|d| d.int_at("retryAfterSeconds"));
    if let Some(value) = seconds.and_then(|s| HeaderValue::from_str(&s.to_string()).ok()) {
        response.headers_mut().insert(header::RETRY_AFTER, value);
    }
    if status.code == 401 {
        response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

/// One object in the form asked for.
pub fn object(code: u16, kind: &Kind, bytes: &Bytes, form: &Form, clock: Clock) -> Answer {
    if form.is_stored_form() {
        return answer(code, form.content_type(), full(bytes.clone()));
    }
    let value: Value = serde_json::from_slice(bytes).expect("answers are json");
    json(code, &shaped(kind, value, &form.shape, clock, true), form)
}

/// An object as a whole, a one-row table, or its metadata.
pub fn shaped(kind: &Kind, value: Value, shape: &Shape, clock: Clock, headings: bool) -> Value {
    match shape {
        Shape::Whole => value,
        Shape::Partial { version } => partial(&value, version),
        Shape::Table { version, include } => {
            let columns = Columns::of(kind);
            let revision = value.str_at("metadata.resourceVersion").to_owned();
            let rows = vec![row(&columns, value, *include, version, clock)];
            table(version, &columns, rows, json!({ "resourceVersion": revision }), headings)
        }
    }
}

pub fn partial(value: &Value, version: &str) -> Value {
    json!({
        "kind": "PartialObjectMetadata",
        "apiVersion": format!("meta.k8s.io/{version}"),
        "metadata": value.get("metadata").cloned().unwrap_or_else(|| json!({})),
    })
}

fn row(columns: &Columns, value: Value, include: Include, version: &str, clock: Clock) -> Value {
    let cells = columns.cells(&value, clock);
    match include {
        Include::None => json!({ "cells": cells }),
        Include::Metadata => json!({ "cells": cells, "object": partial(&value, version) }),
        Include::Object => json!({ "cells": cells, "object": value }),
    }
}

fn table(version: &str, columns: &Columns, rows: Vec<Value>, metadata: Value, headings: bool) -> Value {
    json!({
        "kind": "Table",
        "apiVersion": format!("meta.k8s.io/{version}"),
        "metadata": metadata,
        "columnDefinitions": if headings { Value::Array(columns.definitions()) } else { Value::Null },
        "rows": rows,
    })
}

/// A list: its kind, its `metadata` and the stored bytes of its items.
pub fn list(kind: &Kind, metadata: Value, items: &[Bytes], form: &Form, clock: Clock) -> Answer {
    match &form.shape {
        Shape::Whole if form.is_stored_form() => {
            let head = format!(
                r#"{{"kind":"{}List","apiVersion":"{}","metadata":{metadata},"items":["#,
                kind.kind,
                kind.api_version()
            );
            let mut chunks = Vec::with_capacity(items.len() * 2 + 2);
            chunks.push(Bytes::from(head));
            for (index, item) in items.iter().enumerate() {
                chunks.push(Bytes::from_static(if index == 0 { b"{" } else { b",{" }));
                chunks.push(encode::list_item(kind, item));
            }
            chunks.push(Bytes::from_static(b"]}\n"));
            answer(200, form.content_type(), pieces(chunks))
        }
        shape => {
            let parse =
                |bytes: &Bytes| -> Value { serde_json::from_slice(bytes).expect("stored bytes are json") };
            let value = match shape {
                Shape::Table { version, include } => {
                    let columns = Columns::of(kind);
                    let rows =
                        items.iter().map(|i| row(&columns, parse(i), *include, version, clock)).collect();
                    table(version, &columns, rows, metadata, true)
                }
                Shape::Partial { version } => json!({
                    "kind": "PartialObjectMetadataList",
                    "apiVersion": format!("meta.k8s.io/{version}"),
                    "metadata": metadata,
                    "items": items.iter().map(|i| partial(&parse(i), version)).collect::<Vec<_>>(),
                }),
                Shape::Whole => json!({
                    "kind": format!("{}List", kind.kind),
                    "apiVersion": kind.api_version(),
                    "metadata": metadata,
                    "items": items.iter().map(parse).collect::<Vec<_>>(),
                }),
            };
            json(200, &value, form)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn negotiate(accept: &str) -> Result<Form> {
        let mut headers = HeaderMap::new();
        headers.insert(header::ACCEPT, accept.parse().expect("a header"));
        Form::negotiate(&headers, &crate::request::Query::default())
    }

    #[test]
    fn the_first_form_the_server_has_is_taken() {
        assert_eq!(negotiate("application/json"), Ok(Form::JSON));
        assert_eq!(negotiate("application/vnd.kubernetes.protobuf, application/json"), Ok(Form::JSON));
        let table =
            negotiate("application/json;as=Table;v=v1;g=meta.k8s.io,application/json").expect("has it");
        assert_eq!(table.shape, Shape::Table { version: "v1".into(), include: Include::Metadata });
        assert_eq!(negotiate("application/yaml").expect("has it").encoding, Encoding::Yaml);
        assert_eq!(negotiate("text/html").expect_err("has not").code, 406);
    }
}
