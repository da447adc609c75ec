//! Answering requests for documents: which form, whether the client's copy is still right, how long it may
//! be kept.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, header};
use knarr_api::status::{Result, Status};

use super::{V2_PROTOBUF, V2_PROTOBUF_DOTTED};
use crate::discovery::Catalog;
use crate::request::Query;
use crate::respond::{Answer, answer, full};

/// How long a document that was asked for by its digest may be kept: a year, as upstream says.
const FOREVER: &str = "public, max-age=31536000, immutable";

/// `/openapi/v2`.
pub fn v2(catalog: Catalog, headers: &HeaderMap) -> Answer {
    let accept = headers.get(header::ACCEPT).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let protobuf = accept.split(',').find_map(|clause| {
        let media = clause.split(';').next().unwrap_or_default().trim();
        match media {
            V2_PROTOBUF | V2_PROTOBUF_DOTTED => Some(true),
            "application/json" | "*/*" | "application/*" => Some(false),
            _ => None,
        }
    });
    let etag = super::v2_digest(catalog);
    let (content_type, body): (_, fn(Catalog) -> Bytes) = match protobuf {
        Some(true) => (V2_PROTOBUF_DOTTED, |catalog| super::v2_protobuf(catalog).into()),
        _ => ("application/json", |catalog| super::v2_document(catalog).into()),
    };
    with_etag(headers, etag, content_type, || body(catalog))
}

/// A document of version 3, by its path under `/openapi/v3/`.
pub fn v3(catalog: Catalog, path: &str, headers: &HeaderMap, query: &Query) -> Result<Answer> {
    let etag = super::v3_digest(catalog, path).ok_or_else(Status::no_such_resource)?;
    match query.get("hash") {
        // An old address leads to the present one.
        Some(hash) if hash != etag => {
            let mut moved = answer(301, "text/plain; charset=utf-8", full(""));
            let place = format!("/openapi/v3/{path}?hash={etag}");
            moved.headers_mut().insert(header::LOCATION, HeaderValue::from_str(&place).expect("a path"));
            Ok(moved)
        }
        hash => {
            let document = || super::v3_document(catalog, path).unwrap_or_default().into();
            let mut found = with_etag(headers, etag, "application/json", document);
            if hash.is_some() {
                found.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static(FOREVER));
            }
            Ok(found)
        }
    }
}

/// The content with its `ETag`, or 304 if the client has it.
pub fn with_etag(
    headers: &HeaderMap,
    etag: &str,
    content_type: &'static str,
    content: impl FnOnce() -> Bytes,
) -> Answer {
    let quoted = format!("\"{etag}\"");
    let theirs = headers.get(header::IF_NONE_MATCH).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let same = theirs.split(',').any(|t| t.trim() == quoted);
    let mut found = if same {
        let mut unchanged = answer(304, content_type, full(""));
        unchanged.headers_mut().remove(header::CONTENT_TYPE);
        unchanged
    } else {
        answer(200, content_type, full(content()))
    };
    let value = HeaderValue::from_str(&quoted).expect("digests are plain text");
    found.headers_mut().insert(header::ETAG, value);
    found.headers_mut().insert(header::VARY, HeaderValue::from_static("Accept"));
    found
}
