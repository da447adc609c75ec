//! The paths of every kind: operations with upstream's names, actions and options.
//!
//! Clients read from here which verbs a kind has, whether it knows `dryRun` and `fieldValidation`, and how
//! generated methods are called.

use knarr_api::schema::Kind;
use serde_json::{Map, Value, json};

use super::definitions::{Definitions, PATCH, definition_name, gvk, list_name};
use crate::discovery;

const STATUS: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.Status";
const DELETE_OPTIONS: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.DeleteOptions";
const WATCH_EVENT: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.WatchEvent";
const PRODUCES: [&str; 3] = ["application/json", "application/yaml", "application/vnd.kubernetes.protobuf"];
const STREAMS: [&str; 2] =
    ["application/json;stream=watch", "application/vnd.kubernetes.protobuf;stream=watch"];
const PATCHES: [&str; 4] = [
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
    "application/apply-patch+yaml",
];
const LIST: &[&str] = &[
    "allowWatchBookmarks",
    "continue",
    "fieldSelector",
    "labelSelector",
    "limit",
    "resourceVersion",
    "resourceVersionMatch",
    "sendInitialEvents",
    "timeoutSeconds",
    "watch",
];
const WRITE: &[&str] = &["dryRun", "fieldManager", "fieldValidation"];
const PATCH_OPTIONS: &[&str] = &["dryRun", "fieldManager", "fieldValidation", "force"];
const DELETE: &[&str] = &[
    "dryRun",
    "gracePeriodSeconds",
    "ignoreStoreReadErrorWithClusterBreakingPotential",
    "orphanDependents",
    "propagationPolicy",
];
const DELETE_MANY: &[&str] = &[
    "continue",
    "dryRun",
    "fieldSelector",
    "gracePeriodSeconds",
    "ignoreStoreReadErrorWithClusterBreakingPotential",
    "labelSelector",
    "limit",
    "orphanDependents",
    "propagationPolicy",
    "resourceVersion",
    "resourceVersionMatch",
    "sendInitialEvents",
    "timeoutSeconds",
];
const LOG: &[&str] = &[
    "container",
    "follow",
    "insecureSkipTLSVerifyBackend",
    "limitBytes",
    "pretty",
    "previous",
    "sinceSeconds",
    "stream",
    "tailLines",
    "timestamps",
];

/// The options of the query: name, type, what it does.
const OPTIONS: &[(&str, &str, &str)] = &[
    ("allowWatchBookmarks", "boolean", "Ask for BOOKMARK events, which say how far an idle watch is."),
    ("command", "string", "The command to run, one argument each."),
    ("container", "string", "The container; may be left out if the pod has only one."),
    ("continue", "string", "The token of the list's previous page."),
    ("dryRun", "string", "`All`: everything is done but storing."),
    ("fieldManager", "string", "Who makes the change, for field ownership."),
    ("fieldSelector", "string", "Only objects whose fields have these values."),
    ("fieldValidation", "string", "What happens to unknown and duplicate fields: Ignore, Warn or Strict."),
    ("follow", "boolean", "Keep the log open for what comes."),
    ("force", "boolean", "Take over fields that others own. Server-side apply only."),
    ("gracePeriodSeconds", "integer", "How long the object may take to end; zero is at once."),
    (
        "ignoreStoreReadErrorWithClusterBreakingPotential",
        "boolean",
        "Delete an object even if it cannot be read from the store.",
    ),
    ("insecureSkipTLSVerifyBackend", "boolean", "Do not verify the node's certificate."),
    ("labelSelector", "string", "Only objects with these labels."),
    ("limit", "integer", "How many items one page has at most."),
    ("limitBytes", "integer", "How much of the log to send at most."),
    ("orphanDependents", "boolean", "Deprecated: use propagationPolicy."),
    ("path", "string", "The path to ask the pod, service or node for."),
    ("ports", "integer", "The ports to forward."),
    ("pretty", "string", "`true`: indent the answer."),
    ("previous", "boolean", "The log of the container's previous run."),
    ("propagationPolicy", "string", "What happens to dependents: Orphan, Background or Foreground."),
    ("resourceVersion", "string", "Where to read or watch from."),
    ("resourceVersionMatch", "string", "How resourceVersion is meant: Exact or NotOlderThan."),
    ("sendInitialEvents", "boolean", "Begin a watch with the objects there are."),
    ("sinceSeconds", "integer", "Only what was logged in the last so many seconds."),
    ("stderr", "boolean", "Send standard error."),
    ("stdin", "boolean", "Take standard input."),
    ("stdout", "boolean", "Send standard output."),
    ("stream", "string", "Which stream of the log: All, Stdout or Stderr."),
    ("tailLines", "integer", "Only the last so many lines."),
    ("timeoutSeconds", "integer", "When a list or watch ends by itself."),
    ("timestamps", "boolean", "Begin each line with its time."),
    ("tty", "boolean", "Use a terminal."),
    ("watch", "boolean", "Stream changes instead of listing."),
];

/// `api/v1` or `apis/apps/v1`.
pub fn group_path(group: &str, version: &str) -> String {
    if group.is_empty() { format!("api/{version}") } else { format!("apis/{group}/{version}") }
}

/// One operation, before it is written down.
struct Operation<'a> {
    method: &'static str,
    /// The first word of `operationId`.
    verb: &'static str,
    /// What comes after the kind in `operationId`.
    suffix: String,
    action: &'static str,
    text: String,
    options: &'a [&'a str],
    /// The definition of the request body.
    body: Option<&'a str>,
    /// The definition of the answer; text if none.
    answer: Option<&'a str>,
    codes: &'static [u16],
}

/// Writes the paths of one kind.
pub struct Paths<'d> {
    pub definitions: &'d Definitions<'d>,
    pub kind: &'d Kind,
}

impl Paths<'_> {
    pub fn all(&self) -> Vec<(String, Value)> {
        let kind = self.kind;
        let root = format!("/{}", group_path(&kind.group, &kind.version));
        let scope = if kind.namespaced { "/namespaces/{namespace}" } else { "" };
        let collection = format!("{root}{scope}/{}", kind.plural);
        let name = definition_name(&self.definitions.catalog.schema.type_of(kind.type_id).full);
        let list = list_name(self.definitions.catalog.schema, kind);
        let verbs = discovery::verbs(kind);
        let has = |verb: &str| verbs.contains(&verb);
        let mut paths = Vec::new();
        let mut add = |path: String, operations: Vec<Operation>| {
            if !operations.is_empty() {
                let item = self.item(&path, operations, "");
                paths.push((path, item));
            }
        };
        let a = article(&kind.kind);
        let plain = |method, verb, action, text: String| Operation {
            method,
            verb,
            suffix: String::new(),
            action,
            text,
            options: &[],
            body: None,
            answer: Some(&name),
            codes: &[200],
        };
        let mut operations = Vec::new();
        if has("deletecollection") {
            let text = format!("delete collection of {}", kind.kind);
            operations.push(Operation {
                options: DELETE_MANY,
                body: Some(DELETE_OPTIONS),
                answer: Some(STATUS),
                ..plain("delete", "delete", "deletecollection", text)
            });
        }
        let watches = has("watch");
        let watched = if watches { "list or watch" } else { "list" };
        if has("list") {
            let text = format!("{watched} objects of kind {}", kind.kind);
            operations.push(Operation {
                options: LIST,
                answer: Some(&list),
                ..plain("get", "list", "list", text)
            });
        }
        if has("create") {
            let text = format!("create {a} {}", kind.kind);
            operations.push(Operation {
                options: WRITE,
                body: Some(&name),
                codes: &[200, 201, 202],
                ..plain("post", "create", "post", text)
            });
        }
        add(collection.clone(), operations);
        let mut operations = Vec::new();
        if has("delete") {
            let returned = knarr_api::rules::Rules::of(kind).returns_deleted;
            operations.push(Operation {
                options: DELETE,
                body: Some(DELETE_OPTIONS),
                answer: Some(if returned { &name } else { STATUS }),
                codes: &[200, 202],
                ..plain("delete", "delete", "delete", format!("delete {a} {}", kind.kind))
            });
        }
        if has("get") {
            operations.push(plain("get", "read", "get", format!("read the specified {}", kind.kind)));
        }
        if has("patch") {
            operations.push(Operation {
                options: PATCH_OPTIONS,
                body: Some(PATCH),
                codes: &[200, 201],
                ..plain("patch", "patch", "patch", format!("partially update the specified {}", kind.kind))
            });
        }
        if has("update") {
            operations.push(Operation {
                options: WRITE,
                body: Some(&name),
                codes: &[200, 201],
                ..plain("put", "replace", "put", format!("replace the specified {}", kind.kind))
            });
        }
        add(format!("{collection}/{{name}}"), operations);
        if kind.namespaced && has("list") {
            let text = format!("{watched} objects of kind {}", kind.kind);
            let everywhere = Operation {
                options: LIST,
                answer: Some(&list),
                suffix: "ForAllNamespaces".into(),
                ..plain("get", "list", "list", text)
            };
            add(format!("{root}/{}", kind.plural), vec![everywhere]);
        }
        if watches {
            let watch = |suffix: &str, one: bool| {
                let (text, hint) = match one {
                    true => (
                        "changes to an object",
                        ", filtered to a single item with the 'fieldSelector' parameter",
                    ),
                    false => ("individual changes to a list", ""),
                };
                Operation {
                    options: LIST,
                    answer: Some(WATCH_EVENT),
                    suffix: suffix.into(),
                    ..plain(
                        "get",
                        "watch",
                        if one { "watch" } else { "watchlist" },
                        format!(
                            "watch {text} of kind {}. deprecated: use the 'watch' parameter with a list operation instead{hint}.",
                            kind.kind
                        ),
                    )
                }
            };
            add(format!("{root}/watch{scope}/{}", kind.plural), vec![watch("List", false)]);
            add(format!("{root}/watch{scope}/{}/{{name}}", kind.plural), vec![watch("", true)]);
            if kind.namespaced {
                add(format!("{root}/watch/{}", kind.plural), vec![watch("ListForAllNamespaces", false)]);
            }
        }
        for sub in &kind.subresources {
            paths.extend(self.subresource(&format!("{collection}/{{name}}/{sub}"), sub, &name));
        }
        paths
    }

    fn subresource(&self, path: &str, sub: &str, own: &str) -> Vec<(String, Value)> {
        let kind = self.kind;
        let camel = if sub == "portforward" { "Portforward".to_owned() } else { camel(sub) };
        let of = format!("{sub} of the specified {}", kind.kind);
        let (answer, verbs): (&str, &[&str]) = match sub {
            "scale" => ("io.k8s.api.autoscaling.v1.Scale", &["get", "patch", "put"]),
            "eviction" => ("io.k8s.api.policy.v1.Eviction", &["post"]),
            "binding" => ("io.k8s.api.core.v1.Binding", &["post"]),
            "token" => ("io.k8s.api.authentication.v1.TokenRequest", &["post"]),
            "finalize" => (own, &["put"]),
            "log" => ("", &["get"]),
            "exec" | "attach" | "portforward" => ("", &["connect get", "connect post"]),
            "proxy" => (
                "",
                &[
                    "connect delete",
                    "connect get",
                    "connect head",
                    "connect options",
                    "connect patch",
                    "connect post",
                    "connect put",
                ],
            ),
            _ => (own, &["get", "patch", "put"]),
        };
        let answer = Some(answer).filter(|a| !a.is_empty());
        let plain = |method, verb, action, text: String| Operation {
            method,
            verb,
            suffix: camel.clone(),
            action,
            text,
            options: &[],
            body: None,
            answer,
            codes: &[200],
        };
        let connect_options: &[&str] = match sub {
            "exec" => &["command", "container", "stderr", "stdin", "stdout", "tty"],
            "attach" => &["container", "stderr", "stdin", "stdout", "tty"],
            "portforward" => &["ports"],
            _ => &["path"],
        };
        let operations = |tail: &str| -> Vec<Operation> {
            let operation = |verb: &&str| match *verb {
                "get" if sub == "log" => {
                    Operation { options: LOG, ..plain("get", "read", "get", format!("read {of}")) }
                }
                "get" => plain("get", "read", "get", format!("read {of}")),
                "patch" => Operation {
                    options: PATCH_OPTIONS,
                    body: Some(PATCH),
                    codes: &[200, 201],
                    ..plain("patch", "patch", "patch", format!("partially update {of}"))
                },
                "put" => Operation {
                    options: WRITE,
                    body: answer,
                    codes: &[200, 201],
                    ..plain("put", "replace", "put", format!("replace {of}"))
                },
                "post" => Operation {
                    options: WRITE,
                    body: answer,
                    codes: &[200, 201, 202],
                    ..plain(
                        "post",
                        "create",
                        "post",
                        format!("create {sub} of {} {}", article(&kind.kind), kind.kind),
                    )
                },
                connect => {
                    let (method, verb) = CONNECTS
                        .iter()
                        .find(|(method, _)| connect.ends_with(method))
                        .expect("the verbs above are listed");
                    let text =
                        format!("connect {} requests to {sub} of {}", method.to_uppercase(), kind.kind);
                    let suffix = format!("{camel}{tail}");
                    Operation { suffix, options: connect_options, ..plain(method, verb, "connect", text) }
                }
            };
            verbs.iter().map(operation).collect()
        };
        let mut paths = vec![(path.to_owned(), self.item(path, operations(""), sub))];
        if sub == "proxy" {
            let deep = format!("{path}/{{path}}");
            paths.push((deep.clone(), self.item(&deep, operations("WithPath"), sub)));
        }
        paths
    }

    fn item(&self, path: &str, operations: Vec<Operation>, sub: &str) -> Value {
        let mut item = Map::new();
        let mut parameters = Vec::new();
        for (name, text) in [
            ("name", "The object's name."),
            ("namespace", "The object's namespace."),
            ("path", "The path to ask for."),
        ] {
            if path.contains(&format!("{{{name}}}")) {
                parameters.push(self.parameter(name, "path", "string", text));
            }
        }
        if !matches!(sub, "exec" | "attach" | "portforward" | "proxy" | "log") {
            parameters.push(self.option("pretty"));
        }
        if !parameters.is_empty() {
            item.insert("parameters".into(), Value::Array(parameters));
        }
        let namespaced = path.contains("{namespace}");
        for operation in operations {
            item.insert(operation.method.to_owned(), self.operation(&operation, namespaced, sub));
        }
        Value::Object(item)
    }

    fn operation(&self, operation: &Operation, namespaced: bool, sub: &str) -> Value {
        let kind = self.kind;
        let group = group_words(&kind.group);
        let version = camel(&kind.version);
        let collection = if operation.action == "deletecollection" { "Collection" } else { "" };
        let scope = if namespaced { "Namespaced" } else { "" };
        // `connectCoreV1GetNamespacedPodExec`: the method stands before the kind.
        let (verb, method) = match operation.verb.split_once(' ') {
            Some((verb, method)) => (verb, method),
            None => (operation.verb, ""),
        };
        let id =
            format!("{verb}{group}{version}{method}{collection}{scope}{}{}", kind.kind, operation.suffix);
        let shown = match sub {
            "scale" => gvk("autoscaling", "v1", "Scale"),
            "eviction" => gvk("policy", "v1", "Eviction"),
            "token" => gvk("authentication.k8s.io", "v1", "TokenRequest"),
            "binding" => gvk("", "v1", "Binding"),
            _ => gvk(&kind.group, &kind.version, &kind.kind),
        };
        let tag = format!("{}_{}", tag(&kind.group), kind.version);
        let mut parameters: Vec<Value> = operation.options.iter().map(|name| self.option(name)).collect();
        let produces: Vec<&str> = match (sub, operation.action) {
            (_, "connect") => vec!["*/*"],
            ("log", _) => [&["text/plain"][..], &PRODUCES].concat(),
            (_, "list" | "watch" | "watchlist") => [&PRODUCES[..], &STREAMS].concat(),
            _ => PRODUCES.to_vec(),
        };
        let consumes: Vec<&str> = if operation.action == "patch" { PATCHES.to_vec() } else { vec!["*/*"] };
        let schema = match operation.answer {
            Some(name) => self.definitions.body(name),
            None => json!({ "type": "string" }),
        };
        let mut responses = Map::new();
        for code in operation.codes {
            let text = match code {
                201 => "Created",
                202 => "Accepted",
                _ => "OK",
            };
            let answer = match self.definitions.v3 {
                true => json!({ "description": text, "content": content(&produces, &schema) }),
                false => json!({ "description": text, "schema": schema }),
            };
            responses.insert(code.to_string(), answer);
        }
        responses.insert("401".into(), json!({ "description": "Unauthorized" }));
        let mut value = json!({
            "description": operation.text,
            "operationId": id,
            "responses": responses,
            "tags": [tag],
            "x-kubernetes-action": operation.action,
            "x-kubernetes-group-version-kind": shown,
        });
        if let Some(body) = operation.body {
            let required = body != DELETE_OPTIONS;
            let schema = self.definitions.body(body);
            if self.definitions.v3 {
                let mut request = json!({ "content": content(&consumes, &schema) });
                if required {
                    request["required"] = json!(true);
                }
                value["requestBody"] = request;
            } else {
                let mut parameter = json!({ "name": "body", "in": "body", "schema": schema });
                if required {
                    parameter["required"] = json!(true);
                }
                parameters.insert(0, parameter);
            }
        }
        if !parameters.is_empty() {
            value["parameters"] = Value::Array(parameters);
        }
        if !self.definitions.v3 {
            value["consumes"] = json!(consumes);
            value["produces"] = json!(produces);
            value["schemes"] = json!(["https"]);
        }
        value
    }

    fn option(&self, name: &str) -> Value {
        let (_, kind, text) = OPTIONS.iter().find(|(n, ..)| *n == name).expect("every option is listed");
        self.parameter(name, "query", kind, text)
    }

    fn parameter(&self, name: &str, place: &str, kind: &str, text: &str) -> Value {
        let mut value = json!({ "name": name, "in": place, "description": text });
        if place == "path" {
            value["required"] = json!(true);
        }
        if self.definitions.v3 {
            value["schema"] = json!({ "type": kind, "uniqueItems": true });
        } else {
            value["type"] = json!(kind);
            value["uniqueItems"] = json!(true);
        }
        value
    }
}

const CONNECTS: [(&str, &str); 7] = [
    ("delete", "connect Delete"),
    ("get", "connect Get"),
    ("head", "connect Head"),
    ("options", "connect Options"),
    ("patch", "connect Patch"),
    ("post", "connect Post"),
    ("put", "connect Put"),
];

/// A path of the server itself: discovery, version.
pub fn plain(definitions: &Definitions, id: &str, text: &str, answer: Option<&str>, tag: &str) -> Value {
    let schema = answer.map_or_else(|| json!({ "type": "string" }), |name| definitions.body(name));
    let ok = match definitions.v3 {
        true => json!({ "description": "OK", "content": content(&["application/json"], &schema) }),
        false => json!({ "description": "OK", "schema": schema }),
    };
    let mut operation = json!({
        "description": text,
        "operationId": id,
        "responses": { "200": ok, "401": { "description": "Unauthorized" } },
        "tags": [tag],
    });
    if !definitions.v3 {
        operation["consumes"] = json!(["application/json"]);
        operation["produces"] = json!(["application/json"]);
        operation["schemes"] = json!(["https"]);
    }
    json!({ "get": operation })
}

fn content(types: &[&str], schema: &Value) -> Value {
    types.iter().map(|t| ((*t).to_owned(), json!({ "schema": schema }))).collect::<Map<_, _>>().into()
}

/// `rbac.authorization.k8s.io` is `RbacAuthorization` in operations, and `rbacAuthorization` in tags.
pub fn group_words(group: &str) -> String {
    if group.is_empty() {
        return "Core".into();
    }
    group.trim_end_matches(".k8s.io").split('.').map(camel).collect()
}

pub fn tag(group: &str) -> String {
    let words = group_words(group);
    words[..1].to_lowercase() + &words[1..]
}

fn camel(word: &str) -> String {
    let mut chars = word.chars();
    chars.next().map(|c| c.to_uppercase().chain(chars).collect()).unwrap_or_default()
}

fn article(kind: &str) -> &'static str {
    if kind.starts_with(['A', 'E', 'I', 'O', 'U']) { "an" } else { "a" }
}
