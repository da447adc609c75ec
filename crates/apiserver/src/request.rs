//! What a request asks for: verb, resource, name and options, read from method, path and query.
//!
//! There are no routes per kind: `/apis/GROUP/VERSION/namespaces/NS/RESOURCE/NAME/SUBRESOURCE` says it all.

use std::collections::HashMap;

use http::Method;
use knarr_api::selector::{FieldSelector, LabelSelector};
use knarr_api::status::{Result, Status};

/// The resource part of a path.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Target {
    pub group: String,
    pub version: String,
    pub namespace: String,
    pub resource: String,
    pub name: String,
    pub subresource: String,
    /// What follows the subresource: the path given to a proxy.
    pub rest: String,
}

/// A parsed request.
#[derive(Debug, Clone)]
pub struct RequestInfo {
    /// Kubernetes' verb: `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`, `deletecollection`.
    pub verb: &'static str,
    pub path: String,
    /// `None` for paths that are no resource, such as `/healthz`.
    pub target: Option<Target>,
    pub query: Query,
}

impl RequestInfo {
    pub fn parse(method: &Method, uri: &http::Uri) -> RequestInfo {
        let path = uri.path().to_owned();
        let query = Query::parse(uri.query().unwrap_or_default());
        let target = parse_target(&path);
        let named = target.as_ref().is_some_and(|t| !t.name.is_empty());
        let verb = match *method {
            Method::GET | Method::HEAD if target.is_none() => "get",
            Method::GET | Method::HEAD => match (named, query.flag("watch")) {
                (true, _) => "get",
                (false, true) => "watch",
                (false, false) => "list",
            },
            Method::POST => "create",
            Method::PUT => "update",
            Method::PATCH => "patch",
            Method::DELETE if named || target.is_none() => "delete",
            Method::DELETE => "deletecollection",
            _ => "",
        };
        RequestInfo { verb, path, target, query }
    }
}

/// Reads `/api/v1/...` and `/apis/group/version/...`; discovery paths are no targets.
fn parse_target(path: &str) -> Option<Target> {
    let segments: Vec<String> = path.split('/').filter(|s| !s.is_empty()).map(decode_segment).collect();
    let (group, version, rest) = match segments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["api", version, _, ..] => ("", version.to_owned(), &segments[2..]),
        ["apis", group, version, _, ..] => (group, version.to_owned(), &segments[3..]),
        _ => return None,
    };
    let mut target = Target { group: group.to_owned(), version, ..Target::default() };
    // The old watch prefix, `/api/v1/watch/...`, is the same resource.
    let rest = if rest.len() > 1 && rest[0] == "watch" { &rest[1..] } else { rest };
    let rest = match rest {
        [namespaces, namespace, resource, tail @ ..]
            if namespaces == "namespaces" && !matches!(resource.as_str(), "status" | "finalize") =>
        {
            target.namespace = namespace.clone();
            target.resource = resource.clone();
            tail
        }
        [resource, tail @ ..] => {
            target.resource = resource.clone();
            tail
        }
        [] => return None,
    };
    if let [name, tail @ ..] = rest {
        target.name = name.clone();
        if let [subresource, tail @ ..] = tail {
            target.subresource = subresource.clone();
            target.rest = tail.join("/");
        }
    }
    if target.resource == "namespaces" && target.namespace.is_empty() {
        target.namespace = target.name.clone();
    }
    Some(target)
}

fn decode_segment(segment: &str) -> String {
    percent_decode(segment, false)
}

fn percent_decode(text: &str, plus_is_space: bool) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        match byte {
            b'%' => {
                let mut ahead = rest.clone();
                let digits = [ahead.next(), ahead.next()].map(|d| d.and_then(|d| (d as char).to_digit(16)));
                match digits {
                    [Some(high), Some(low)] => {
                        bytes.push((high * 16 + low) as u8);
                        rest = ahead;
                    }
                    _ => bytes.push(b'%'),
                }
            }
            b'+' if plus_is_space => bytes.push(b' '),
            other => bytes.push(other),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The options in the query string.
#[derive(Debug, Clone, Default)]
pub struct Query {
    values: HashMap<String, Vec<String>>,
}

impl Query {
    pub fn parse(text: &str) -> Query {
        let mut values: HashMap<String, Vec<String>> = HashMap::new();
        for pair in text.split('&').filter(|p| !p.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            values.entry(percent_decode(name, true)).or_default().push(percent_decode(value, true));
        }
        Query { values }
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name)?.first().map(String::as_str)
    }

    pub fn all(&self, name: &str) -> &[String] {
        self.values.get(name).map(Vec::as_slice).unwrap_or_default()
    }

    /// True for `1`, `true` and the bare name.
    pub fn flag(&self, name: &str) -> bool {
        self.get(name).is_some_and(|v| matches!(v, "" | "1" | "true" | "True" | "TRUE" | "t"))
    }

    pub fn number(&self, name: &str) -> Result<Option<i64>> {
        match self.get(name) {
            None | Some("") => Ok(None),
            Some(text) => text.parse().map(Some).map_err(|_| {
                Status::bad_request(format!("strconv.ParseInt: parsing {text:?}: invalid syntax"))
            }),
        }
    }

    /// `dryRun=All` is the only form.
    pub fn dry_run(&self) -> Result<bool> {
        match self.all("dryRun") {
            [] => Ok(false),
            values if values.iter().all(|v| v == "All") => Ok(true),
            values => Err(Status::new(
                422,
                "Invalid",
                format!("dryRun: Unsupported value: {:?}: supported values: \"All\"", values[0]),
            )),
        }
    }

    pub fn label_selector(&self) -> Result<LabelSelector> {
        let text = self.get("labelSelector").unwrap_or_default();
        LabelSelector::parse(text).map_err(|e| Status::bad_request(e.0))
    }

    pub fn field_selector(&self) -> Result<FieldSelector> {
        let text = self.get("fieldSelector").unwrap_or_default();
        FieldSelector::parse(text).map_err(|e| Status::bad_request(e.0))
    }

    pub fn field_validation(&self) -> Result<FieldValidation> {
        match self.get("fieldValidation") {
            None | Some("" | "Warn") => Ok(FieldValidation::Warn),
            Some("Strict") => Ok(FieldValidation::Strict),
            Some("Ignore") => Ok(FieldValidation::Ignore),
            Some(other) => Err(Status::new(
                422,
                "Invalid",
                format!(
                    "fieldValidation: Unsupported value: {other:?}: supported values: \"Ignore\", \"Strict\", \"Warn\""
                ),
            )),
        }
    }
}

/// What happens to fields the kind does not have.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum FieldValidation {
    Ignore,
    Warn,
    Strict,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(method: Method, path: &str) -> RequestInfo {
        RequestInfo::parse(&method, &path.parse().expect("a uri"))
    }

    #[test]
    fn paths_say_what_is_asked_for() {
        let info = parse(Method::GET, "/apis/apps/v1/namespaces/default/deployments/web/scale?x=1");
        let target = info.target.expect("a resource");
        assert_eq!((info.verb, target.group.as_str(), target.namespace.as_str()), ("get", "apps", "default"));
        assert_eq!(
            (target.resource.as_str(), target.name.as_str(), target.subresource.as_str()),
            ("deployments", "web", "scale")
        );
        assert_eq!(parse(Method::GET, "/api/v1/pods?watch=true").verb, "watch");
        assert_eq!(parse(Method::DELETE, "/api/v1/namespaces/a/pods").verb, "deletecollection");
        assert!(parse(Method::GET, "/apis/apps/v1").target.is_none());
        assert!(parse(Method::GET, "/healthz").target.is_none());
    }

    #[test]
    fn namespaces_are_resources_too() {
        let target = parse(Method::PUT, "/api/v1/namespaces/a/finalize").target.expect("a resource");
        assert_eq!(
            (target.resource.as_str(), target.name.as_str(), target.subresource.as_str()),
            ("namespaces", "a", "finalize")
        );
        let proxy = parse(Method::GET, "/api/v1/namespaces/a/services/http:web:80/proxy/x/y")
            .target
            .expect("a resource");
        assert_eq!((proxy.name.as_str(), proxy.rest.as_str()), ("http:web:80", "x/y"));
    }

    #[test]
    fn queries_decode() {
        let query = Query::parse("labelSelector=a%20in+(b%2Cc)&watch&limit=5");
        assert_eq!(query.get("labelSelector"), Some("a in (b,c)"));
        assert!(query.flag("watch"));
        assert_eq!(query.number("limit"), Ok(Some(5)));
    }
}
