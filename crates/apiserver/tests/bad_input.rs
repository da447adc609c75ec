//! Bad input end to end: exact status, reason and message, and nothing changed by what was refused.

mod common;

use common::{Client, server};
use serde_json::json;

const MAPS: &str = "/api/v1/namespaces/default/configmaps";
const JSON: &str = "application/json";

struct Case {
    what: &'static str,
    method: &'static str,
    path: &'static str,
    content_type: &'static str,
    body: String,
    status: u16,
    reason: &'static str,
    /// The whole message, or its beginning if it ends with `…`.
    message: &'static str,
}

fn case(
    what: &'static str,
    (method, path, content_type): (&'static str, &'static str, &'static str),
    body: impl Into<String>,
    (status, reason, message): (u16, &'static str, &'static str),
) -> Case {
    Case { what, method, path, content_type, body: body.into(), status, reason, message }
}

fn cases() -> Vec<Case> {
    let post = ("POST", MAPS, JSON);
    let put = ("PUT", "/api/v1/namespaces/default/configmaps/kept", JSON);
    let bomb = |open: &str, close: &str| format!("{}{}", open.repeat(20_000), close.repeat(20_000));
    vec![
        case(
            "empty body",
            post,
            "",
            (
                400,
                "BadRequest",
                "ConfigMap in version \"v1\" cannot be handled as a ConfigMap: unexpected end of JSON input",
            ),
        ),
        case(
            "cut JSON",
            post,
            r#"{"kind":"ConfigMap""#,
            (
                400,
                "BadRequest",
                "ConfigMap in version \"v1\" cannot be handled as a ConfigMap: unexpected end of JSON input",
            ),
        ),
        case(
            "no JSON",
            post,
            "hello",
            (400, "BadRequest", "ConfigMap in version \"v1\" cannot be handled as a ConfigMap: …"),
        ),
        case(
            "no object",
            post,
            "[1]",
            (400, "BadRequest", "ConfigMap in version \"v1\" cannot be handled as a ConfigMap: …"),
        ),
        case(
            "broken YAML",
            ("POST", MAPS, "application/yaml"),
            "a: [",
            (400, "BadRequest", "error converting YAML to JSON: yaml: …"),
        ),
        case(
            "nested objects",
            post,
            bomb(r#"{"metadata":"#, "}"),
            (400, "BadRequest", "ConfigMap in version \"v1\" cannot be handled as a ConfigMap: …"),
        ),
        case(
            "nested lists",
            post,
            format!(r#"{{"data":{}}}"#, bomb("[", "]")),
            (400, "BadRequest", "ConfigMap in version \"v1\" cannot be handled as a ConfigMap: …"),
        ),
        case(
            "unknown kind",
            post,
            r#"{"kind":"Nonsense","apiVersion":"v1"}"#,
            (400, "BadRequest", "Nonsense in version \"v1\" cannot be handled as a ConfigMap: …"),
        ),
        case(
            "another kind",
            post,
            r#"{"kind":"Secret","apiVersion":"v1","metadata":{"name":"x"}}"#,
            (400, "BadRequest", "Secret in version \"v1\" cannot be handled as a ConfigMap: …"),
        ),
        case(
            "wrong version",
            ("POST", "/apis/apps/v1/namespaces/default/deployments", JSON),
            r#"{"kind":"Deployment","apiVersion":"apps/v9","metadata":{"name":"x"}}"#,
            (400, "BadRequest", "Deployment in version \"v9\" cannot be handled as a Deployment: …"),
        ),
        case(
            "oversized body",
            post,
            format!(r#"{{"data":{{"k":"{}"}}}}"#, "x".repeat(3 << 20)),
            (413, "RequestEntityTooLarge", "Request entity too large: limit is 3145728"),
        ),
        case(
            "oversized data",
            post,
            json!({"metadata":{"name":"big"},"data":{"k":"x".repeat((1 << 20) + 1)}}).to_string(),
            (
                422,
                "Invalid",
                "ConfigMap \"big\" is invalid: []: Too long: may not be more than 1048576 bytes",
            ),
        ),
        case(
            "no name",
            post,
            "{}",
            (
                422,
                "Invalid",
                "ConfigMap \"\" is invalid: metadata.name: Required value: name or generateName is required",
            ),
        ),
        case(
            "bad name",
            post,
            r#"{"metadata":{"name":"A_b"}}"#,
            (
                422,
                "Invalid",
                "ConfigMap \"A_b\" is invalid: metadata.name: Invalid value: \"A_b\": a lowercase RFC 1123 subdomain must consist of …",
            ),
        ),
        case(
            "bad label",
            post,
            r#"{"metadata":{"name":"a","labels":{"a b":"c"}}}"#,
            (
                422,
                "Invalid",
                "ConfigMap \"a\" is invalid: metadata.labels: Invalid value: \"a b\": name part must consist of …",
            ),
        ),
        case(
            "another namespace",
            post,
            r#"{"metadata":{"name":"a","namespace":"kube-system"}}"#,
            (
                400,
                "BadRequest",
                "the namespace of the provided object does not match the namespace sent on the request",
            ),
        ),
        case(
            "missing namespace",
            ("POST", "/api/v1/namespaces/nowhere/configmaps", JSON),
            r#"{"metadata":{"name":"a"}}"#,
            (404, "NotFound", "namespaces \"nowhere\" not found"),
        ),
        case(
            "a version to start with",
            post,
            r#"{"metadata":{"name":"a","resourceVersion":"5"}}"#,
            (400, "BadRequest", "resourceVersion should not be set on objects to be created"),
        ),
        case(
            "created twice",
            post,
            r#"{"metadata":{"name":"kept"}}"#,
            (409, "AlreadyExists", "configmaps \"kept\" already exists"),
        ),
        case(
            "wrong type of field",
            post,
            r#"{"metadata":{"name":"a"},"data":{"k":7}}"#,
            (
                400,
                "BadRequest",
                "ConfigMap in version \"v1\" cannot be handled as a ConfigMap: json: cannot unmarshal number into Go struct field ConfigMap.data of type string",
            ),
        ),
        case(
            "unknown field",
            ("POST", "/api/v1/namespaces/default/configmaps?fieldValidation=Strict", JSON),
            r#"{"metadata":{"name":"a"},"dta":{}}"#,
            (
                400,
                "BadRequest",
                "ConfigMap in version \"v1\" cannot be handled as a ConfigMap: strict decoding error: unknown field \"dta\"",
            ),
        ),
        case(
            "field given twice",
            ("POST", "/api/v1/namespaces/default/configmaps?fieldValidation=Strict", JSON),
            r#"{"metadata":{"name":"a","name":"b"}}"#,
            (
                400,
                "BadRequest",
                "ConfigMap in version \"v1\" cannot be handled as a ConfigMap: strict decoding error: duplicate field \"metadata.name\"",
            ),
        ),
        case(
            "stale update",
            put,
            r#"{"metadata":{"name":"kept","resourceVersion":"1"},"data":{"k":"new"}}"#,
            (
                409,
                "Conflict",
                "Operation cannot be fulfilled on configmaps \"kept\": the object has been modified; please apply your changes to the latest version and try again",
            ),
        ),
        case(
            "another name",
            put,
            r#"{"metadata":{"name":"other"}}"#,
            (400, "BadRequest", "the name of the object (other) does not match the name on the URL (kept)"),
        ),
        case(
            "update of nothing",
            ("PUT", "/api/v1/namespaces/default/configmaps/none", JSON),
            r#"{"metadata":{"name":"none"}}"#,
            (404, "NotFound", "configmaps \"none\" not found"),
        ),
        case(
            "patch of nothing",
            ("PATCH", "/api/v1/namespaces/default/configmaps/none", "application/merge-patch+json"),
            "{}",
            (404, "NotFound", "configmaps \"none\" not found"),
        ),
        case(
            "patch that is none",
            ("PATCH", "/api/v1/namespaces/default/configmaps/kept", "application/json-patch+json"),
            "{}",
            (400, "BadRequest", "json: cannot unmarshal object into Go value of type jsonpatch.Patch"),
        ),
        case(
            "patch of unknown type",
            ("PATCH", "/api/v1/namespaces/default/configmaps/kept", "text/plain"),
            "{}",
            (
                415,
                "UnsupportedMediaType",
                "the body of the request was in an unknown format - accepted media types include: application/json-patch+json, application/merge-patch+json, application/strategic-merge-patch+json, application/apply-patch+yaml",
            ),
        ),
        case(
            "body of unknown type",
            ("POST", MAPS, "text/plain"),
            "{}",
            (
                415,
                "UnsupportedMediaType",
                "the body of the request was in an unknown format - accepted media types include: …",
            ),
        ),
        case(
            "apply without a manager",
            ("PATCH", "/api/v1/namespaces/default/configmaps/kept", "application/apply-patch+yaml"),
            "{}",
            (
                422,
                "Invalid",
                "PatchOptions.meta.k8s.io \"\" is invalid: fieldManager: Required value: is required for apply patch",
            ),
        ),
        case(
            "deletion of nothing",
            ("DELETE", "/api/v1/namespaces/default/configmaps/none", JSON),
            "",
            (404, "NotFound", "configmaps \"none\" not found"),
        ),
        case(
            "deletion of another",
            ("DELETE", "/api/v1/namespaces/default/configmaps/kept", JSON),
            r#"{"preconditions":{"uid":"x"}}"#,
            (
                409,
                "Conflict",
                "Operation cannot be fulfilled on ConfigMap \"kept\": the UID in the precondition (x) does not match the UID in record …",
            ),
        ),
        case(
            "unknown policy",
            ("DELETE", "/api/v1/namespaces/default/configmaps/kept", JSON),
            r#"{"propagationPolicy":"Maybe"}"#,
            (
                422,
                "Invalid",
                "DeleteOptions.meta.k8s.io \"\" is invalid: propagationPolicy: Unsupported value: \"Maybe\": …",
            ),
        ),
        case(
            "a namespace that must stay",
            ("DELETE", "/api/v1/namespaces/kube-system", JSON),
            "",
            (403, "Forbidden", "namespaces \"kube-system\" is forbidden: this namespace may not be deleted"),
        ),
        case(
            "unknown resource",
            ("POST", "/api/v1/namespaces/default/nonsense", JSON),
            "{}",
            (404, "NotFound", "the server could not find the requested resource"),
        ),
        case(
            "unknown group",
            ("POST", "/apis/nonsense.io/v1/things", JSON),
            "{}",
            (404, "NotFound", "the server could not find the requested resource"),
        ),
        case(
            "method a kind has not",
            ("POST", "/api/v1/namespaces/default/configmaps/kept", JSON),
            "{}",
            (405, "MethodNotAllowed", "…"),
        ),
        case(
            "unknown dry run",
            ("POST", "/api/v1/namespaces/default/configmaps?dryRun=Some", JSON),
            r#"{"metadata":{"name":"a"}}"#,
            (422, "Invalid", "…"),
        ),
        case(
            "bad selector",
            ("DELETE", "/api/v1/namespaces/default/configmaps?labelSelector=a%3D%3D%3Db", JSON),
            "",
            (400, "BadRequest", "…"),
        ),
        case(
            "bad field selector",
            ("DELETE", "/api/v1/namespaces/default/configmaps?fieldSelector=data.k%3Dv", JSON),
            "",
            (
                400,
                "BadRequest",
                "\"data.k\" is not a known field selector: only \"metadata.name\", \"metadata.namespace\"",
            ),
        ),
    ]
}

#[tokio::test]
async fn what_is_refused_says_why_and_changes_nothing() {
    let api = server().await;
    let admin = Client::admin(&api);
    admin.create(MAPS, &json!({ "metadata": { "name": "kept" }, "data": { "k": "v" } })).await;
    let mut wrong = Vec::new();
    for case in cases() {
        let before = api.registry.store.revision();
        let headers = [("content-type", case.content_type)];
        let (status, answer) = admin.send(case.method, case.path, &headers, &case.body).await;
        let message = answer["message"].as_str().unwrap_or_default();
        let right = match case.message.strip_suffix('…') {
            Some(start) => message.starts_with(start),
            None => message == case.message,
        };
        if (status, answer["reason"].as_str().unwrap_or_default()) != (case.status, case.reason) || !right {
            wrong.push(format!("{}: {status} {} {message:.300}", case.what, answer["reason"]));
        }
        assert_eq!(answer["kind"], "Status", "{}: {answer}", case.what);
        assert_eq!(answer["code"], status, "{}", case.what);
        assert_eq!(api.registry.store.revision(), before, "{} changed something", case.what);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test]
async fn a_dry_run_of_each_verb_answers_and_changes_nothing() {
    let api = server().await;
    let admin = Client::admin(&api);
    admin.create(MAPS, &json!({ "metadata": { "name": "kept" }, "data": { "k": "v" } })).await;
    let before = api.registry.store.revision();
    let one = "/api/v1/namespaces/default/configmaps/kept?dryRun=All";
    let new = json!({ "metadata": { "name": "new" } });
    let changed = json!({ "metadata": { "name": "kept" }, "data": { "k": "w" } });
    assert_eq!(admin.post(&format!("{MAPS}?dryRun=All"), &new).await.0, 201);
    let (status, answer) = admin.put(one, &changed).await;
    assert_eq!((status, &answer["data"]["k"]), (200, &json!("w")));
    let (status, answer) = admin.patch(one, &json!({ "data": { "k": "x" } })).await;
    assert_eq!((status, &answer["data"]["k"]), (200, &json!("x")));
    let apply = [("content-type", "application/apply-patch+yaml")];
    let config =
        json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "fresh" } }).to_string();
    let fresh = "/api/v1/namespaces/default/configmaps/fresh?dryRun=All&fieldManager=me";
    assert_eq!(admin.send("PATCH", fresh, &apply, &config).await.0, 201);
    assert_eq!(admin.delete(one).await.0, 200);
    assert_eq!(admin.delete(&format!("{MAPS}?dryRun=All")).await.0, 200);
    let pods = "/api/v1/namespaces/default/pods";
    let pod =
        json!({ "metadata": { "name": "p" }, "spec": { "containers": [{ "name": "c", "image": "i" }] } });
    assert_eq!(admin.post(&format!("{pods}?dryRun=All"), &pod).await.0, 201);
    assert_eq!(api.registry.store.revision(), before);
}
