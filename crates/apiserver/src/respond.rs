//! Answers: content negotiation, and the forms an object or list can take on the way out.
//!
//! JSON of whole objects is what is stored, so it is passed on as it is. Tables, partial metadata, YAML and
//! protobuf are made per request.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use http_body::{Frame, SizeHint};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use knarr_api::columns::{Clock, Columns};
use knarr_api::object::Object;
use knarr_api::schema::Kind;
use knarr_api::status::{Result, Status};
use knarr_api::versions;
use serde_json::{Value, json};

use crate::{encode, wire};

/// The body of every answer.
pub type Body = UnsyncBoxBody<Bytes, std::io::Error>;
pub type Answer = Response<Body>;

/// Forms of answers and of bodies.
pub const MEDIA_TYPES: &str = "application/json, application/yaml, application/vnd.kubernetes.protobuf";
/// Forms of watches.
pub const STREAM_TYPES: &str =
    "application/json;stream=watch, application/vnd.kubernetes.protobuf;stream=watch";
/// More clauses of one `Accept` header are not looked at.
const ACCEPT_CLAUSES_MAX: usize = 32;

/// The form the client asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Form {
    pub encoding: Encoding,
    pub shape: Shape,
    pub pretty: bool,
    /// The version to show objects in, if they are stored in another.
    pub version: Option<&'static Kind>,
    /// False leaves `managedFields` out of whole objects in JSON: the loops of this process never look at them.
    pub owners: bool,
}

/// An extension of requests whose answers need no `managedFields`.
#[derive(Debug, Clone, Copy)]
pub struct WithoutOwners;

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Encoding {
    Json,
    Yaml,
    Protobuf,
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
    pub const JSON: Form =
        Form { encoding: Encoding::Json, shape: Shape::Whole, pretty: false, version: None, owners: true };

    /// Picks the form of the `Accept` header that the server has and the client likes best.
    pub fn negotiate(headers: &HeaderMap, query: &crate::request::Query, stream: bool) -> Result<Form> {
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
        let mut clauses: Vec<Clause> =
            accept.split(',').take(ACCEPT_CLAUSES_MAX).map(Clause::parse).collect();
        // Stable: equal clauses keep the client's order.
        clauses.sort_by(|a, b| b.quality.total_cmp(&a.quality));
        let chosen = clauses.iter().find_map(|clause| clause.form(include, pretty, stream));
        chosen.ok_or_else(|| Status::not_acceptable(if stream { STREAM_TYPES } else { MEDIA_TYPES }))
    }

    pub fn content_type(&self) -> &'static str {
        match self.encoding {
            Encoding::Json => "application/json",
            Encoding::Yaml => "application/yaml",
            Encoding::Protobuf => wire::MEDIA_TYPE,
        }
    }

    /// A stored object in the version to show.
    pub fn in_version(&self, mut object: Value) -> Value {
        if let Some(kind) = self.version {
            versions::from_hub(kind, &mut object);
        }
        object
    }

    /// True if stored bytes are already the answer, but for the owners perhaps.
    pub fn is_stored_form(&self) -> bool {
        let Form { encoding, shape, pretty, version, owners: _ } = self;
        *encoding == Encoding::Json && *shape == Shape::Whole && !pretty && version.is_none()
    }

    /// Stored bytes as the answer, in two parts.
    pub fn stored<'b>(&self, kind: &Kind, bytes: &'b [u8]) -> (&'b [u8], &'b [u8]) {
        if self.owners { (bytes, &[]) } else { encode::without_owners(kind, bytes) }
    }

    /// The value in this form; `None` if it has no protobuf form.
    pub fn encode(&self, value: &Value) -> Option<Bytes> {
        let text = match (self.encoding, self.pretty) {
            (Encoding::Protobuf, _) => return wire::body(value).map(Bytes::from),
            (Encoding::Yaml, _) => serde_yaml_ng::to_string(value).expect("trees encode"),
            (Encoding::Json, true) => {
                let mut text = serde_json::to_string_pretty(value).expect("trees encode");
                text.push('\n');
                text
            }
            (Encoding::Json, false) => value.to_string(),
        };
        Some(Bytes::from(text))
    }
}

/// One clause of an `Accept` header.
struct Clause<'h> {
    media_type: &'h str,
    parameters: Vec<(&'h str, &'h str)>,
    quality: f32,
}

impl<'h> Clause<'h> {
    fn parse(text: &'h str) -> Self {
        let mut parts = text.split(';').map(str::trim);
        let media_type = parts.next().unwrap_or_default();
        let parameters: Vec<(&str, &str)> = parts.filter_map(|p| p.split_once('=')).collect();
        let quality = parameters.iter().find(|(n, _)| *n == "q").and_then(|(_, v)| v.parse().ok());
        Clause { media_type, parameters, quality: quality.unwrap_or(1.0) }
    }

    fn find(&self, name: &str) -> Option<&'h str> {
        self.parameters.iter().find(|(n, _)| *n == name).map(|(_, v)| *v)
    }

    /// The form this clause stands for, if the server has it.
    fn form(&self, include: Include, pretty: bool, stream: bool) -> Option<Form> {
        let encoding = match self.media_type {
            "application/json" | "*/*" | "application/*" | "" => Encoding::Json,
            "application/yaml" if !stream => Encoding::Yaml,
            wire::MEDIA_TYPE => Encoding::Protobuf,
            _ => return None,
        };
        if self.find("stream").is_some_and(|s| s != "watch" || !stream) {
            return None;
        }
        let version = self.find("v").unwrap_or("v1").to_owned();
        let transforms =
            self.find("g").is_none_or(|g| g == "meta.k8s.io") && matches!(version.as_str(), "v1" | "v1beta1");
        let shape = match self.find("as") {
            None => Shape::Whole,
            Some("Table") if transforms && encoding != Encoding::Protobuf => {
                Shape::Table { version, include }
            }
            Some("PartialObjectMetadata" | "PartialObjectMetadataList") if transforms => {
                Shape::Partial { version }
            }
            Some(_) => return None,
        };
        let pretty = self.find("pretty").map_or(pretty, |p| p == "1");
        Some(Form { encoding, shape, pretty, version: None, owners: true })
    }
}

/// A fixed body.
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// A body of pieces that already exist: nothing is copied together, and its length is known.
pub fn pieces(chunks: Vec<Bytes>) -> Body {
    let left = chunks.iter().map(|c| c.len() as u64).sum();
    Pieces { chunks: chunks.into(), left }.boxed_unsync()
}

struct Pieces {
    chunks: VecDeque<Bytes>,
    /// Bytes to come.
    left: u64,
}

impl http_body::Body for Pieces {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<std::result::Result<Frame<Bytes>, std::io::Error>>> {
        let chunk = self.chunks.pop_front();
        self.left -= chunk.as_ref().map_or(0, |c| c.len() as u64);
        Poll::Ready(chunk.map(|c| Ok(Frame::data(c))))
    }

    fn is_end_stream(&self) -> bool {
        self.chunks.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
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

/// A value in the form asked for; refused if it has none in protobuf.
pub fn value(code: u16, value: &Value, form: &Form) -> Answer {
    match form.encode(value) {
        Some(bytes) => answer(code, form.content_type(), full(bytes)),
        None => refuse(&Status::not_acceptable("application/json, application/yaml"), &Form::JSON),
    }
}

pub fn refuse(status: &Status, form: &Form) -> Answer {
    let mut response = value(status.code, &status.to_value(), form);
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
    let object: Value = serde_json::from_slice(bytes).expect("answers are json");
    value(code, &shaped(kind, object, form, clock, true), form)
}

/// An object as a whole, a one-row table, or its metadata.
pub fn shaped(kind: &Kind, value: Value, form: &Form, clock: Clock, headings: bool) -> Value {
    match &form.shape {
        Shape::Whole => form.in_version(value),
        Shape::Partial { version } => partial(&value, version),
        Shape::Table { version, include } => {
            let columns = Columns::of(kind);
            let revision = value.str_at("metadata.resourceVersion").to_owned();
            let rows = vec![row(&columns, value, *include, version, form, clock)];
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

fn row(columns: &Columns, value: Value, include: Include, version: &str, form: &Form, clock: Clock) -> Value {
    let cells = columns.cells(&value, clock);
    match include {
        Include::None => json!({ "cells": cells }),
        Include::Metadata => json!({ "cells": cells, "object": partial(&value, version) }),
        Include::Object => json!({ "cells": cells, "object": form.in_version(value) }),
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
            let mut chunks = Vec::with_capacity(items.len() * 3 + 2);
            chunks.push(Bytes::from(head));
            for (index, item) in items.iter().enumerate() {
                chunks.push(Bytes::from_static(if index == 0 { b"{" } else { b",{" }));
                let (head, tail) = form.stored(kind, item);
                chunks.push(encode::list_item(kind, &item.slice_ref(head)));
                if !tail.is_empty() {
                    chunks.push(item.slice_ref(tail));
                }
            }
            chunks.push(Bytes::from_static(b"]}\n"));
            answer(200, form.content_type(), pieces(chunks))
        }
        Shape::Whole
            if form.encoding == Encoding::Protobuf && form.version.is_none() && wire::is_known(kind) =>
        {
            answer(200, form.content_type(), pieces(wire::list(kind, &metadata, items)))
        }
        shape => {
            let parse =
                |bytes: &Bytes| -> Value { serde_json::from_slice(bytes).expect("stored bytes are json") };
            let whole = match shape {
                Shape::Table { version, include } => {
                    let columns = Columns::of(kind);
                    let rows = items
                        .iter()
                        .map(|i| row(&columns, parse(i), *include, version, form, clock))
                        .collect();
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
                    "apiVersion": form.version.unwrap_or(kind).api_version(),
                    "metadata": metadata,
                    "items": items.iter().map(|i| form.in_version(parse(i))).collect::<Vec<_>>(),
                }),
            };
            value(200, &whole, form)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn negotiate(accept: &str) -> Result<Form> {
        negotiate_for(accept, false)
    }

    fn negotiate_for(accept: &str, stream: bool) -> Result<Form> {
        let mut headers = HeaderMap::new();
        headers.insert(header::ACCEPT, accept.parse().expect("a header"));
        Form::negotiate(&headers, &crate::request::Query::default(), stream)
    }

    #[test]
    fn the_best_liked_form_the_server_has_is_taken() {
        assert_eq!(negotiate("application/json"), Ok(Form::JSON));
        let encoding = |accept: &str| negotiate(accept).map(|f| f.encoding);
        assert_eq!(encoding("application/vnd.kubernetes.protobuf, application/json"), Ok(Encoding::Protobuf));
        assert_eq!(encoding("application/json;q=0.5,application/yaml"), Ok(Encoding::Yaml));
        assert_eq!(encoding("text/html,*/*;q=0.8"), Ok(Encoding::Json));
        let table =
            negotiate("application/json;as=Table;v=v1;g=meta.k8s.io,application/json").expect("has it");
        assert_eq!(table.shape, Shape::Table { version: "v1".into(), include: Include::Metadata });
        let refused = negotiate("text/html").expect_err("has not");
        assert_eq!(
            (refused.code, refused.message.as_str()),
            (
                406,
                "only the following media types are accepted: application/json, application/yaml, application/vnd.kubernetes.protobuf"
            )
        );
    }

    #[test]
    fn tables_are_not_protobuf_but_partial_metadata_may_be() {
        let table = "application/vnd.kubernetes.protobuf;as=Table;v=v1;g=meta.k8s.io";
        assert_eq!(negotiate(table).expect_err("has not").code, 406);
        let both = format!("{table},application/json");
        assert_eq!(negotiate(&both), Ok(Form::JSON));
        let partial =
            negotiate("application/vnd.kubernetes.protobuf;as=PartialObjectMetadata;v=v1;g=meta.k8s.io");
        assert_eq!(partial.expect("has it").shape, Shape::Partial { version: "v1".into() });
    }

    #[test]
    fn watches_stream_json_and_protobuf() {
        let encoding = |accept: &str| negotiate_for(accept, true).map(|f| f.encoding);
        assert_eq!(encoding("application/vnd.kubernetes.protobuf;stream=watch"), Ok(Encoding::Protobuf));
        assert_eq!(encoding("application/json;stream=watch"), Ok(Encoding::Json));
        let refused = encoding("application/yaml").expect_err("no such stream");
        assert_eq!(
            refused.message,
            "only the following media types are accepted: application/json;stream=watch, application/vnd.kubernetes.protobuf;stream=watch"
        );
        assert!(negotiate("application/json;stream=watch").is_err());
    }
}
