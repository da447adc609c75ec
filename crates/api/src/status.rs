//! What went wrong, as the API says it: the `Status` object with upstream's reasons, codes and wording.
//!
//! Every refusal in the API server is built here, so that a reason has one spelling and one HTTP code.

use serde_json::{Value, json};

use crate::field;
use crate::object::Object;
use crate::rules::Rules;
use crate::schema::Kind;

/// The result of anything a request may be refused for.
pub type Result<T> = std::result::Result<T, Box<Status>>;

/// A refusal: `metav1.Status` with `status: Failure`.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct Status {
    /// HTTP status code.
    pub code: u16,
    /// Machine-readable reason, such as `NotFound`.
    pub reason: &'static str,
    pub message: String,
    /// `details`: name, group, kind, causes, `retryAfterSeconds`; absent where upstream has none.
    pub details: Option<Value>,
    /// A token to go on with in spite of the refusal, for lists whose snapshot is gone.
    pub continue_token: Option<String>,
}

impl Status {
    pub fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Box<Status> {
        Box::new(Status { code, reason, message: message.into(), details: None, continue_token: None })
    }

    fn about(mut self: Box<Self>, kind: &Kind, name: &str) -> Box<Self> {
        let mut details = json!({ "kind": kind.plural });
        if !name.is_empty() {
            details["name"] = json!(name);
        }
        if !kind.group.is_empty() {
            details["group"] = json!(kind.group);
        }
        self.details = Some(details);
        self
    }

    pub fn bad_request(message: impl Into<String>) -> Box<Status> {
        Status::new(400, "BadRequest", message)
    }

    pub fn unauthorized() -> Box<Status> {
        Status::new(401, "Unauthorized", "Unauthorized")
    }

    pub fn forbidden(kind: &Kind, name: &str, why: impl std::fmt::Display) -> Box<Status> {
        let subject = if name.is_empty() { kind.resource() } else { format!("{} {name:?}", kind.resource()) };
        Status::new(403, "Forbidden", format!("{subject} is forbidden: {why}")).about(kind, name)
    }

    pub fn not_found(kind: &Kind, name: &str) -> Box<Status> {
        Status::new(404, "NotFound", format!("{} {name:?} not found", kind.resource())).about(kind, name)
    }

    /// The path names no resource at all.
    pub fn no_such_resource() -> Box<Status> {
        let mut status = Status::new(404, "NotFound", "the server could not find the requested resource");
        status.details = Some(json!({}));
        status
    }

    pub fn method_not_allowed(kind: &Kind, verb: &str) -> Box<Status> {
        let message = format!("{verb} is not supported on resources of kind {:?}", kind.resource());
        Status::new(405, "MethodNotAllowed", message).about(kind, "")
    }

    pub fn not_acceptable(supported: &str) -> Box<Status> {
        let message = format!("only the following media types are accepted: {supported}");
        Status::new(406, "NotAcceptable", message)
    }

    pub fn already_exists(kind: &Kind, name: &str) -> Box<Status> {
        Status::new(409, "AlreadyExists", format!("{} {name:?} already exists", kind.resource()))
            .about(kind, name)
    }

    pub fn conflict(kind: &Kind, name: &str, why: impl std::fmt::Display) -> Box<Status> {
        let message = format!("Operation cannot be fulfilled on {} {name:?}: {why}", kind.resource());
        Status::new(409, "Conflict", message).about(kind, name)
    }

    /// The stored object is newer than the one the request was made from.
    pub fn modified(kind: &Kind, name: &str) -> Box<Status> {
        let why =
            "the object has been modified; please apply your changes to the latest version and try again";
        Status::conflict(kind, name, why)
    }

    /// The revision asked for is compacted away, or the watcher fell too far behind.
    pub fn expired(message: impl Into<String>) -> Box<Status> {
        Status::new(410, "Expired", message)
    }

    pub fn too_large(limit_bytes: usize) -> Box<Status> {
        let message = format!("Request entity too large: limit is {limit_bytes}");
        Status::new(413, "RequestEntityTooLarge", message)
    }

    pub fn unsupported_media_type(supported: &str) -> Box<Status> {
        let message = format!(
            "the body of the request was in an unknown format - accepted media types include: {supported}"
        );
        Status::new(415, "UnsupportedMediaType", message)
    }

    /// The object breaks rules of its kind; every broken rule is a cause.
    pub fn invalid(kind: &Kind, name: &str, errors: &[field::Error]) -> Box<Status> {
        let mut texts: Vec<String> = Vec::new();
        for error in errors {
            let text = error.to_string();
            if !texts.contains(&text) {
                texts.push(text);
            }
        }
        let list = match &texts[..] {
            [one] => one.clone(),
            many => format!("[{}]", many.join(", ")),
        };
        let group = Rules::of(kind).reported_group.unwrap_or(&kind.group);
        let qualified = if group.is_empty() { kind.kind.clone() } else { format!("{}.{group}", kind.kind) };
        let mut status =
            Status::new(422, "Invalid", format!("{qualified} {name:?} is invalid: {list}")).about(kind, name);
        let details = status.details.get_or_insert_default();
        details["kind"] = json!(kind.kind);
        match group {
            "" => drop(details.remove_at("group")),
            group => details["group"] = json!(group),
        }
        details["causes"] = errors.iter().map(field::Error::to_cause).collect();
        status
    }

    /// Options of a request that contradict each other or the kind of request.
    /// A patch whose result is no object of the kind; `shown` is the patch or what it led to.
    pub fn invalid_patch(shown: &str, why: &str) -> Box<Status> {
        let error = field::Error::invalid("patch", shown, why);
        let mut status = Status::new(422, "Invalid", format!(" \"\" is invalid: {error}"));
        status.details = Some(json!({ "causes": [error.to_cause()] }));
        status
    }

    pub fn invalid_options(kind: &str, errors: &[field::Error]) -> Box<Status> {
        let texts: Vec<String> = errors.iter().map(ToString::to_string).collect();
        let list = match &texts[..] {
            [one] => one.clone(),
            many => format!("[{}]", many.join(", ")),
        };
        let mut status = Status::new(422, "Invalid", format!("{kind}.meta.k8s.io \"\" is invalid: {list}"));
        let causes: Vec<Value> = errors.iter().map(field::Error::to_cause).collect();
        status.details = Some(json!({ "group": "meta.k8s.io", "kind": kind, "causes": causes }));
        status
    }

    pub fn too_many_requests(message: impl Into<String>, retry_after_seconds: u32) -> Box<Status> {
        let mut status = Status::new(429, "TooManyRequests", message);
        status.details = Some(json!({ "retryAfterSeconds": retry_after_seconds }));
        status
    }

    pub fn internal(why: impl std::fmt::Display) -> Box<Status> {
        Status::new(500, "InternalError", format!("Internal error occurred: {why}"))
    }

    pub fn service_unavailable(message: impl Into<String>) -> Box<Status> {
        Status::new(503, "ServiceUnavailable", message)
    }

    pub fn timeout(message: impl Into<String>) -> Box<Status> {
        Status::new(504, "Timeout", message)
    }

    /// The object for the wire.
    pub fn to_value(&self) -> Value {
        let mut value = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "code": self.code,
        });
        if !self.reason.is_empty() {
            value["reason"] = json!(self.reason);
        }
        if let Some(token) = &self.continue_token {
            value["metadata"]["continue"] = json!(token);
        }
        if let Some(details) = &self.details {
            value["details"] = details.clone();
        }
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::Schema;

    #[test]
    fn messages_are_upstreams() {
        let kind = Schema::builtin().resource("apps", "v1", "deployments").expect("served");
        let status = Status::not_found(kind, "web");
        assert_eq!(status.message, r#"deployments.apps "web" not found"#);
        let errors = [field::Error::required("spec.selector", "")];
        let invalid = Status::invalid(kind, "web", &errors);
        assert_eq!(invalid.message, r#"Deployment.apps "web" is invalid: spec.selector: Required value"#);
    }
}
