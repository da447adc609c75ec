//! The OpenAPI documents, compared with upstream's (`swagger.json` of v1.36).
//!
//! Upstream's document lies outside the repository (set `KNARR_REFERENCE` to where); without it the
//! comparison says so and ends.

mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use common::{get, send};
use knarr_api::schema::{Kind, Schema};
use knarr_apiserver::api::Api;
use serde_json::{Map, Value, json};

fn upstream() -> Option<Value> {
    let root = std::env::var_os("KNARR_REFERENCE").map(PathBuf::from);
    let above = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().map(|dir| dir.join("shared/reference"));
    let mut files = root.into_iter().chain(above).map(|root| root.join("swagger.json"));
    let text = files.find_map(|file| std::fs::read_to_string(file).ok())?;
    Some(serde_json::from_str(&text).expect("upstream's document is json"))
}

/// The value without sentences: those are compared by nobody.
fn facts(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let kept = map.iter().filter(|(name, value)| *name != "description" || value.is_object());
            kept.map(|(name, value)| (name.clone(), facts(value))).collect::<Map<_, _>>().into()
        }
        Value::Array(items) => {
            // Names of required fields stand in Go's order there, in ours here.
            let mut items: Vec<Value> = items.iter().map(facts).collect();
            if items.iter().all(Value::is_string) {
                items.sort_by(|a, b| a.as_str().cmp(&b.as_str()));
            }
            Value::Array(items)
        }
        other => other.clone(),
    }
}

fn differences(ours: &Value, theirs: &Value, path: &str, out: &mut Vec<String>) {
    match (ours, theirs) {
        (Value::Object(a), Value::Object(b)) => {
            let names: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            for name in names {
                let null = Value::Null;
                let (a, b) = (a.get(name).unwrap_or(&null), b.get(name).unwrap_or(&null));
                differences(a, b, &format!("{path}.{name}"), out);
            }
        }
        _ if ours == theirs => {}
        _ => out.push(format!("{path}: {ours} instead of {theirs}")),
    }
}

#[tokio::test]
async fn definitions_are_upstreams() {
    let Some(upstream) = upstream() else {
        eprintln!("SKIPPED: upstream's document is not here; nothing was compared");
        return;
    };
    // What upstream has removed it does not describe either.
    let api = Api { old_versions: false, ..common::server().await };
    let ours = get(&api, "/openapi/v2").await.json();
    let (ours, theirs) = (&ours["definitions"], &upstream["definitions"]);
    let mut different = Vec::new();
    for (name, definition) in ours.as_object().expect("definitions") {
        let (mut a, mut b) = (facts(definition), facts(&theirs[name]));
        if b.is_null() {
            different.push(format!("{name} is not upstream's"));
            continue;
        }
        if name.ends_with("DeleteOptions") || name.ends_with("WatchEvent") {
            // Theirs names every version that ever was; ours those that are served.
            for side in [&mut a, &mut b] {
                side.as_object_mut().expect("an object").remove("x-kubernetes-group-version-kind");
            }
        }
        differences(&a, &b, name, &mut different);
    }
    // Everything upstream defines for the groups and versions we serve is there.
    let schema = Schema::builtin();
    let group = |k: &Kind| schema.type_of(k.type_id).full.rsplit_once('.').map(|(group, _)| group);
    let served: BTreeSet<&str> = schema.kinds().iter().filter_map(group).collect();
    for name in theirs.as_object().expect("definitions").keys() {
        let group = name.rsplit('.').nth(2).zip(name.rsplit('.').nth(1));
        let group = group.map(|(group, version)| format!("{group}.{version}")).unwrap_or_default();
        if served.contains(group.as_str()) && ours.get(name).is_none() {
            different.push(format!("{name} is missing"));
        }
    }
    assert!(different.is_empty(), "{} differences:\n{}", different.len(), different.join("\n"));
}

#[tokio::test]
async fn paths_are_upstreams() {
    let Some(upstream) = upstream() else {
        eprintln!("SKIPPED: upstream's document is not here; nothing was compared");
        return;
    };
    // What upstream has removed it does not describe either.
    let api = Api { old_versions: false, ..common::server().await };
    let ours = get(&api, "/openapi/v2").await.json();
    let (ours, theirs) = (ours["paths"].as_object().expect("paths"), &upstream["paths"]);
    let brief = |operation: &Value| {
        let answer = |code: &str| operation["responses"][code]["schema"].clone();
        json!({
            "id": operation["operationId"], "action": operation["x-kubernetes-action"],
            "gvk": operation["x-kubernetes-group-version-kind"], "tags": operation["tags"],
            "200": answer("200"), "201": answer("201"), "202": answer("202"),
        })
    };
    let mut different = Vec::new();
    for (path, item) in ours {
        let Some(other) = theirs.get(path).and_then(Value::as_object) else {
            different.push(format!("{path} is not upstream's"));
            continue;
        };
        let item = item.as_object().expect("an item");
        let methods: BTreeSet<&String> =
            item.keys().chain(other.keys()).filter(|m| *m != "parameters").collect();
        for method in methods {
            match (item.get(method), other.get(method)) {
                (Some(a), Some(b)) => {
                    differences(&brief(a), &brief(b), &format!("{path} {method}"), &mut different)
                }
                (a, _) => different
                    .push(format!("{path} {method}: {}", if a.is_some() { "too much" } else { "missing" })),
            }
        }
    }
    let served = |path: &str| {
        let groups = Schema::builtin().kinds().iter();
        let prefix = |k: &Kind| match k.group.as_str() {
            "" => format!("/api/{}/", k.version),
            group => format!("/apis/{group}/{}/", k.version),
        };
        groups.map(prefix).any(|prefix| path.starts_with(&prefix))
    };
    for path in theirs.as_object().expect("paths").keys().filter(|p| served(p)) {
        if !ours.contains_key(path) {
            different.push(format!("{path} is missing"));
        }
    }
    different.retain(|d| !KNOWN.iter().any(|known| d.starts_with(known)));
    assert!(different.is_empty(), "{} differences:\n{}", different.len(), different.join("\n"));
}

/// Paths that differ, each with its reason.
const KNOWN: &[&str] = &[
    // Resizing needs the kubelet's part.
    "/api/v1/namespaces/{namespace}/pods/{name}/resize is missing",
    // These answer a DELETE with a status; upstream answers with the object. The documents say what is done.
    "/api/v1/namespaces/{namespace}/podtemplates/{name} delete",
    "/api/v1/namespaces/{namespace}/resourcequotas/{name} delete",
    "/apis/resource.k8s.io/v1/",
    "/apis/storage.k8s.io/v1/",
    // This one answers with the object, as upstream's does; upstream's document says otherwise.
    "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name} delete",
];

#[tokio::test]
async fn every_field_of_a_pod_is_explained() {
    let api = common::server().await;
    let document = get(&api, "/openapi/v3/api/v1").await.json();
    let schemas = document["components"]["schemas"].as_object().expect("schemas");
    let mut silent = Vec::new();
    for (name, definition) in schemas.iter().filter(|(name, _)| name.starts_with("io.k8s.api.core.v1.")) {
        if definition["description"].as_str().is_none_or(str::is_empty) {
            silent.push(name.clone());
        }
        for (field, value) in definition["properties"].as_object().into_iter().flatten() {
            if value["description"].as_str().is_none_or(str::is_empty) {
                silent.push(format!("{name}.{field}"));
            }
        }
    }
    assert!(silent.is_empty(), "without a word: {}", silent.join(", "));
}

#[tokio::test]
async fn clients_that_have_the_document_are_told_so() {
    let api = common::server().await;
    let index = get(&api, "/openapi/v3").await.json();
    let url = index["paths"]["apis/apps/v1"]["serverRelativeURL"].as_str().expect("a url").to_owned();
    let first = get(&api, &url).await;
    assert_eq!((first.status, first.header("cache-control")), (200, "public, max-age=31536000, immutable"));
    let again = send(&api, "GET", &url, &[("if-none-match", first.header("etag"))], "").await;
    assert_eq!((again.status, again.body.len()), (304, 0));
    let old = get(&api, "/openapi/v3/apis/apps/v1?hash=OLD").await;
    assert_eq!((old.status, old.header("location")), (301, url.as_str()));
    let accept = ("accept", "application/com.github.proto-openapi.spec.v2@v1.0+protobuf");
    let packed = send(&api, "GET", "/openapi/v2", &[accept], "").await;
    assert!(packed.body.starts_with(b"\x0a\x032.0"));
    let again =
        send(&api, "GET", "/openapi/v2", &[accept, ("if-none-match", packed.header("etag"))], "").await;
    assert_eq!(again.status, 304);
}
