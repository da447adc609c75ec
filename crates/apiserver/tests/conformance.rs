//! The conformance tests of sig-api-machinery that are about the API server alone, each as a short test of its own or
//! named with the test that covers it.
//!
//! | conformance test | covered by |
//! | --- | --- |
//! | API operations of FlowSchema, PriorityLevelConfiguration, admission policies and their bindings, webhook configurations | [`kinds_support_all_operations`] |
//! | AdmissionWebhook: discovery documents; Discovery: group versions, preferred versions | [`discovery_locates_every_resource`] |
//! | AggregatedDiscovery: interface, Accept headers | [`aggregated_discovery_is_negotiated`] |
//! | CustomResourceDefinition: create, list, status, discovery | [`definitions_are_listed_and_have_a_status`] |
//! | FieldValidation of typed objects | [`unknown_and_duplicate_fields_are_judged_as_asked`] |
//! | Namespaces: patch, update, status, finalizer | [`namespaces_change_and_take_finalizers`] |
//! | ResourceQuota: status, lifecycle, scopes, life of objects | `admission.rs`, [`quotas_have_a_life_and_scopes`] |
//! | API chunking: pages, expired tokens | `lists.rs`, [`an_expired_token_goes_on_inconsistently`] |
//! | Table transformation: 406 | [`what_has_no_table_says_so`] |
//! | Watchers: from a revision, restarted, labels that change, same order | `lists.rs`, [`concurrent_watchers_see_one_order`] |
//! | Server version | [`the_server_tells_its_version`] |
//!
//! Garbage collection, namespace deletion and whatever calls a webhook or serves a custom resource need more than the
//! API server.

mod common;

use common::{Client, Events, get, send, server};
use knarr_api::object::Object;
use serde_json::{Value, json};

const APPLY: &str = "application/apply-patch+yaml";

/// Path of the collection, a good object, and whether there is a status to write.
fn operated() -> Vec<(&'static str, Value, bool)> {
    let rules = json!([{ "apiGroups": ["apps"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["deployments"] }]);
    let hook = json!([{ "name": "a.acme.io", "clientConfig": { "url": "https://acme.io/a" }, "sideEffects": "None", "admissionReviewVersions": ["v1"] }]);
    let flow = json!({ "matchingPrecedence": 10_000, "priorityLevelConfiguration": { "name": "global-default" },
        "distinguisherMethod": { "type": "ByUser" }, "rules": [{
            "subjects": [{ "kind": "User", "user": { "name": "a" } }],
            "nonResourceRules": [{ "verbs": ["*"], "nonResourceURLs": ["*"] }] }] });
    let level = json!({ "type": "Limited", "limited": { "limitResponse": { "type": "Reject" } } });
    let validating =
        json!({ "matchConstraints": { "resourceRules": rules }, "validations": [{ "expression": "true" }] });
    let mutating = json!({ "reinvocationPolicy": "Never", "matchConstraints": { "resourceRules": rules }, "mutations": [{
        "patchType": "ApplyConfiguration", "applyConfiguration": { "expression": "Object{}" } }] });
    const FLOW: &str = "/apis/flowcontrol.apiserver.k8s.io/v1";
    vec![
        ("/apis/flowcontrol.apiserver.k8s.io/v1/flowschemas", json!({ "spec": flow }), true),
        ("/apis/flowcontrol.apiserver.k8s.io/v1/prioritylevelconfigurations", json!({ "spec": level }), true),
        (
            "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies",
            json!({ "spec": validating }),
            true,
        ),
        (
            "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings",
            json!({ "spec": { "policyName": "p", "validationActions": ["Deny"] } }),
            false,
        ),
        (
            "/apis/admissionregistration.k8s.io/v1/mutatingadmissionpolicies",
            json!({ "spec": mutating }),
            false,
        ),
        (
            "/apis/admissionregistration.k8s.io/v1/mutatingadmissionpolicybindings",
            json!({ "spec": { "policyName": "p" } }),
            false,
        ),
        (
            "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations",
            json!({ "webhooks": hook }),
            false,
        ),
        (
            "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations",
            json!({ "webhooks": hook }),
            false,
        ),
    ]
    .into_iter()
    .inspect(|(path, ..)| assert!(path.starts_with("/apis/admission") || path.starts_with(FLOW)))
    .collect()
}

#[tokio::test]
async fn kinds_support_all_operations() {
    let api = server().await;
    let admin = Client::admin(&api);
    for (collection, sample, has_status) in operated() {
        let labelled = |generate: bool| {
            let mut object = sample.clone();
            object["metadata"] = json!({ "labels": { "special": "yes" } });
            object["metadata"][if generate { "generateName" } else { "name" }] =
                json!(if generate { "e2e-" } else { "one" });
            object
        };
        let selected = format!("{collection}?labelSelector=special%3Dyes");
        let from = api.registry.store.revision();
        let mut events = Events::open(&api, &format!("{selected}&watch=1&resourceVersion={from}")).await;
        let made = admin.create(collection, &labelled(false)).await;
        for _ in 0..2 {
            admin.create(collection, &labelled(true)).await;
        }
        let one = format!("{collection}/one");
        assert_eq!(admin.get(&one).await.1["metadata"]["uid"], made["metadata"]["uid"]);
        let (_, list) = admin.get(&selected).await;
        assert_eq!(list["items"].as_array().map(Vec::len), Some(3), "{collection}");
        let (status, patched) =
            admin.patch(&one, &json!({ "metadata": { "annotations": { "patched": "true" } } })).await;
        assert_eq!((status, &patched["metadata"]["annotations"]["patched"]), (200, &json!("true")));
        let mut updated = patched.clone();
        updated.set_at("metadata.annotations.updated", "true");
        assert_eq!(admin.put(&one, &updated).await.0, 200, "{collection}");
        for wanted in ["ADDED", "ADDED", "ADDED", "MODIFIED", "MODIFIED"] {
            assert_eq!(events.next().await.0, wanted, "{collection}");
        }
        if has_status {
            let path = format!("{one}/status");
            let condition = json!({ "type": "Tried", "status": "True", "reason": "E2E", "message": "m", "lastTransitionTime": "2026-01-01T00:00:00Z" });
            let (status, patched) =
                admin.patch(&path, &json!({ "status": { "conditions": [condition] } })).await;
            assert_eq!(
                (status, &patched["status"]["conditions"][0]["type"]),
                (200, &json!("Tried")),
                "{collection}"
            );
            let mut updated = patched.clone();
            updated.set_at("status.conditions", json!([condition]));
            assert_eq!(admin.put(&path, &updated).await.0, 200);
            assert_eq!(admin.get(&path).await.0, 200);
        }
        assert_eq!(admin.delete(&one).await.0, 200);
        assert_eq!(admin.get(&one).await.0, 404);
        assert_eq!(admin.delete(&selected).await.0, 200);
        assert_eq!(admin.get(&selected).await.1["items"], json!([]), "{collection}");
    }
}

#[tokio::test]
async fn discovery_locates_every_resource() {
    let api = server().await;
    let groups = get(&api, "/apis").await.json();
    for group in groups["groups"].as_array().expect("groups") {
        let name = group["name"].as_str().expect("a name");
        let alone = get(&api, &format!("/apis/{name}")).await.json();
        assert_eq!(alone["preferredVersion"], group["preferredVersion"]);
        let versions = alone["versions"].as_array().expect("versions");
        assert!(versions.contains(&group["preferredVersion"]), "{name}");
        for version in versions {
            let path = version["groupVersion"].as_str().expect("a group version");
            let list = get(&api, &format!("/apis/{path}")).await.json();
            assert_eq!(list["groupVersion"], version["groupVersion"]);
            assert!(!list["resources"].as_array().expect("resources").is_empty(), "{path}");
        }
    }
    let hooks = get(&api, "/apis/admissionregistration.k8s.io/v1").await.json();
    let names: Vec<&str> =
        hooks["resources"].as_array().expect("resources").iter().map(|r| r.str_at("name")).collect();
    for wanted in ["mutatingwebhookconfigurations", "validatingwebhookconfigurations"] {
        assert!(names.contains(&wanted), "{wanted}");
    }
}

#[tokio::test]
async fn aggregated_discovery_is_negotiated() {
    let api = server().await;
    let v2 = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";
    let beta = "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList";
    for path in ["/api", "/apis"] {
        for (accept, kind, version) in [
            (v2.to_owned(), "APIGroupDiscoveryList", "apidiscovery.k8s.io/v2"),
            (format!("{v2},{beta},application/json"), "APIGroupDiscoveryList", "apidiscovery.k8s.io/v2"),
            (format!("{beta},application/json"), "APIGroupDiscoveryList", "apidiscovery.k8s.io/v2beta1"),
            ("application/json".to_owned(), if path == "/api" { "APIVersions" } else { "APIGroupList" }, ""),
        ] {
            let reply = send(&api, "GET", path, &[("accept", &accept)], "").await;
            let shown = reply.json();
            assert_eq!((reply.status, shown.str_at("kind")), (200, kind), "{path} {accept}");
            if !version.is_empty() {
                assert_eq!(shown["apiVersion"], version, "{path} {accept}");
                assert!(reply.header("content-type").contains("as=APIGroupDiscoveryList"), "{accept}");
            }
        }
    }
}

#[tokio::test]
async fn definitions_are_listed_and_have_a_status() {
    let api = server().await;
    let admin = Client::admin(&api);
    let collection = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
    for i in 0..3 {
        let plural = format!("xs{i}");
        let version = json!({ "name": "v1", "served": true, "storage": true, "schema": { "openAPIV3Schema": { "type": "object" } } });
        let spec = json!({ "group": "acme.io", "scope": "Namespaced", "names": { "plural": plural, "kind": format!("X{i}") }, "versions": [version] });
        admin.create(collection, &json!({ "metadata": { "name": format!("{plural}.acme.io"), "labels": { "run": "a" } }, "spec": spec })).await;
    }
    let path = format!("{collection}/xs0.acme.io/status");
    let condition =
        json!({ "type": "StatusUpdate", "status": "True", "reason": "E2E", "message": "Set from e2e test" });
    let (_, definition) = admin.get(&path).await;
    let mut updated = definition.clone();
    updated.set_at("status.conditions", json!([condition]));
    let (status, updated) = admin.put(&path, &updated).await;
    assert_eq!((status, &updated["status"]["conditions"][0]["message"]), (200, &condition["message"]));
    let patch = json!([{ "op": "add", "path": "/status/conditions/-", "value": { "type": "Second", "status": "True", "reason": "", "message": "" } }]);
    let (status, patched) = admin
        .send("PATCH", &path, &[("content-type", "application/json-patch+json")], &patch.to_string())
        .await;
    assert_eq!(
        (status, patched["status"]["conditions"].as_array().map(Vec::len)),
        (200, Some(2)),
        "{patched}"
    );
    assert_eq!(admin.delete(&format!("{collection}?labelSelector=run%3Da")).await.0, 200);
    assert_eq!(admin.get(collection).await.1["items"], json!([]));
}

#[tokio::test]
async fn unknown_and_duplicate_fields_are_judged_as_asked() {
    let api = server().await;
    let admin = Client::admin(&api);
    let collection = "/apis/apps/v1/namespaces/default/deployments";
    let template = r#"{"metadata":{"labels":{"a":"b"}},"spec":{"containers":[{"name":"c","image":"i"}]}}"#;
    let body = format!(
        r#"{{"apiVersion":"apps/v1","kind":"Deployment","metadata":{{"name":"d","unknownMeta":"foo"}},"spec":{{"unknownField":"foo","replicas":1,"replicas":2,"selector":{{"matchLabels":{{"a":"b"}}}},"template":{template}}}}}"#
    );
    let json_body = [("content-type", "application/json")];
    let strict =
        send(&api, "POST", &format!("{collection}?fieldValidation=Strict"), &json_body, body.clone()).await;
    assert_eq!(strict.status, 400);
    let message = strict.json().str_at("message").to_owned();
    for issue in [
        r#"unknown field "metadata.unknownMeta""#,
        r#"unknown field "spec.unknownField""#,
        r#"duplicate field "spec.replicas""#,
    ] {
        assert!(message.contains(issue), "{message}");
    }
    let warned =
        send(&api, "POST", &format!("{collection}?fieldValidation=Warn"), &json_body, body.clone()).await;
    assert_eq!((warned.status, warned.warnings().len()), (201, 3), "{:?}", warned.warnings());
    assert_eq!(warned.json()["spec"]["replicas"], 2, "the last one counts");
    let ignored =
        send(&api, "PUT", &format!("{collection}/d?fieldValidation=Ignore"), &json_body, body.clone()).await;
    assert_eq!((ignored.status, ignored.warnings().len()), (200, 0));
    let (status, answer) = admin
        .send(
            "PATCH",
            &format!("{collection}/d?fieldManager=m&fieldValidation=Strict"),
            &[("content-type", APPLY)],
            &body.replace(",\"replicas\":2", ""),
        )
        .await;
    assert!(status >= 400, "apply: {answer}");
    let patch = json!({ "spec": { "unknownField": 1 } }).to_string();
    for kind in ["application/merge-patch+json", "application/strategic-merge-patch+json"] {
        let reply = send(
            &api,
            "PATCH",
            &format!("{collection}/d?fieldValidation=Strict"),
            &[("content-type", kind)],
            patch.clone(),
        )
        .await;
        assert_eq!(reply.status, 422, "{kind}: {:?}", reply.body);
    }
}

#[tokio::test]
async fn namespaces_change_and_take_finalizers() {
    let api = server().await;
    let admin = Client::admin(&api);
    admin.create("/api/v1/namespaces", &json!({ "metadata": { "name": "n" } })).await;
    let path = "/api/v1/namespaces/n";
    let (_, patched) = admin.patch(path, &json!({ "metadata": { "labels": { "a": "b" } } })).await;
    assert_eq!(patched["metadata"]["labels"]["a"], "b");
    let mut updated = patched.clone();
    updated.set_at("metadata.labels.c", "d");
    assert_eq!(admin.put(path, &updated).await.0, 200);
    let condition = json!({ "type": "StatusUpdate", "status": "True", "reason": "E2E", "message": "m" });
    let (status, told) = admin
        .patch(
            &format!("{path}/status"),
            &json!({ "metadata": { "annotations": { "x": "y" } }, "status": { "conditions": [condition] } }),
        )
        .await;
    assert_eq!((status, &told["status"]["conditions"][0]["reason"]), (200, &json!("E2E")));
    let (_, namespace) = admin.get(path).await;
    let mut finalized = namespace.clone();
    finalized.set_at("spec.finalizers", json!(["kubernetes", "e2e.example.com/fakeFinalizer"]));
    let (status, answer) = admin.put(&format!("{path}/finalize"), &finalized).await;
    assert_eq!((status, answer["spec"]["finalizers"].as_array().map(Vec::len)), (200, Some(2)), "{answer}");
    finalized.set_at("spec.finalizers", json!(["kubernetes"]));
    finalized.remove_at("metadata.resourceVersion");
    assert_eq!(admin.put(&format!("{path}/finalize"), &finalized).await.0, 200);
    assert_eq!(admin.get(path).await.1["spec"]["finalizers"], json!(["kubernetes"]));
}

#[tokio::test]
async fn quotas_have_a_life_and_scopes() {
    let api = server().await;
    let admin = Client::admin(&api);
    let collection = "/api/v1/namespaces/default/resourcequotas";
    let hard = json!({ "services": "2", "secrets": "9", "replicationcontrollers": "1", "count/replicasets.apps": "1", "resourcequotas": "5" });
    admin
        .create(
            collection,
            &json!({ "metadata": { "name": "q", "labels": { "l": "1" } }, "spec": { "hard": hard } }),
        )
        .await;
    let used =
        async |name: &str| admin.get(&format!("{collection}/q")).await.1["status"]["used"][name].clone();
    assert_eq!(used("resourcequotas").await, "1", "its status is there at once");
    let template = json!({ "metadata": { "labels": { "a": "b" } }, "spec": { "containers": [{ "name": "c", "image": "i" }] } });
    for (path, object, name) in [
        ("/api/v1/namespaces/default/services", json!({ "spec": { "ports": [{ "port": 80 }] } }), "services"),
        ("/api/v1/namespaces/default/secrets", json!({}), "secrets"),
        (
            "/api/v1/namespaces/default/replicationcontrollers",
            json!({ "spec": { "template": template } }),
            "replicationcontrollers",
        ),
        (
            "/apis/apps/v1/namespaces/default/replicasets",
            json!({ "spec": { "selector": { "matchLabels": { "a": "b" } }, "template": template } }),
            "count/replicasets.apps",
        ),
    ] {
        let before: i64 = used(name).await.as_str().expect("a number").parse().expect("a number");
        let mut object = object;
        object["metadata"] = json!({ "name": "o" });
        admin.create(path, &object).await;
        assert_eq!(used(name).await, (before + 1).to_string(), "{name}");
        admin.delete(&format!("{path}/o")).await;
        assert_eq!(used(name).await, before.to_string(), "{name}");
    }
    // Its status can be written, and its bounds change.
    let path = format!("{collection}/q/status");
    let (status, _) = admin.patch(&path, &json!({ "status": { "hard": { "services": "4" } } })).await;
    assert_eq!(status, 200);
    let (_, changed) =
        admin.patch(&format!("{collection}/q"), &json!({ "spec": { "hard": { "services": "7" } } })).await;
    assert_eq!(changed["spec"]["hard"]["services"], "7");
    assert_eq!(admin.delete(&format!("{collection}?labelSelector=l%3D1")).await.0, 200);
    let pods = "/api/v1/namespaces/default/pods";
    for scope in ["Terminating", "NotTerminating"] {
        let quota = json!({ "metadata": { "name": scope.to_lowercase() }, "spec": { "hard": { "pods": "5" }, "scopes": [scope] } });
        admin.create(collection, &quota).await;
    }
    for (name, deadline) in [("bounded", json!(3600)), ("unbounded", Value::Null)] {
        let mut pod = json!({ "metadata": { "name": name }, "spec": { "containers": [{ "name": "c", "image": "i" }] } });
        pod["spec"]["activeDeadlineSeconds"] = deadline;
        admin.create(pods, &pod).await;
    }
    for scope in ["terminating", "notterminating"] {
        assert_eq!(
            admin.get(&format!("{collection}/{scope}")).await.1["status"]["used"]["pods"],
            "1",
            "{scope}"
        );
    }
}

#[tokio::test]
async fn an_expired_token_goes_on_inconsistently() {
    let api = server().await;
    let admin = Client::admin(&api);
    let maps = "/api/v1/namespaces/default/configmaps";
    for i in 0..6 {
        admin.create(maps, &json!({ "metadata": { "name": format!("m{i}") } })).await;
    }
    let (_, first) = admin.get(&format!("{maps}?limit=2")).await;
    let token = first["metadata"]["continue"].as_str().expect("a token").to_owned();
    admin.delete(&format!("{maps}/m3")).await;
    api.registry.store.compact(api.registry.store.revision());
    let (status, expired) = admin.get(&format!("{maps}?limit=2&continue={token}")).await;
    assert_eq!((status, &expired["reason"]), (410, &json!("Expired")), "{expired}");
    assert!(expired["message"].as_str().expect("a message").contains("inconsistent"));
    let token = expired["metadata"]["continue"].as_str().expect("a token to go on with").to_owned();
    let mut names = Vec::new();
    let mut next = Some(token);
    while let Some(token) = next {
        let (status, page) = admin.get(&format!("{maps}?limit=2&continue={token}")).await;
        assert_eq!(status, 200, "{page}");
        names.extend(page["items"].as_array().expect("items").iter().map(|i| i.name().to_owned()));
        next = page["metadata"]["continue"].as_str().map(str::to_owned);
    }
    assert_eq!(names, ["m2", "m4", "m5"], "from the same key, in the present state");
}

#[tokio::test]
async fn what_has_no_table_says_so() {
    let api = server().await;
    let body = json!({ "spec": { "resourceAttributes": { "verb": "get", "resource": "pods" } } });
    let headers =
        [("content-type", "application/json"), ("accept", "application/json;as=Table;v=v1;g=meta.k8s.io")];
    let path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
    let reply = send(&api, "POST", path, &headers, body.to_string()).await;
    assert_eq!(
        (reply.status, reply.json()["reason"].clone()),
        (406, json!("NotAcceptable")),
        "{:?}",
        reply.body
    );
}

#[tokio::test]
async fn concurrent_watchers_see_one_order() {
    let api = server().await;
    let admin = Client::admin(&api);
    let maps = "/api/v1/namespaces/default/configmaps";
    let start = api.registry.store.revision();
    for i in 0..20 {
        admin.create(maps, &json!({ "metadata": { "name": format!("m{}", i % 4) } })).await;
        if i % 2 == 0 {
            admin.patch(&format!("{maps}/m{}", i % 4), &json!({ "data": { "i": i.to_string() } })).await;
        }
        admin.delete(&format!("{maps}/m{}", i % 4)).await;
    }
    let mut histories = Vec::new();
    for _ in 0..4 {
        let mut events = Events::open(&api, &format!("{maps}?watch=1&resourceVersion={start}")).await;
        let mut seen = Vec::new();
        for _ in 0..50 {
            let (kind, object) = events.next().await;
            seen.push((kind, object.str_at("metadata.resourceVersion").to_owned()));
        }
        histories.push(seen);
    }
    assert!(histories.windows(2).all(|pair| pair[0] == pair[1]));
    let versions: Vec<u64> = histories[0].iter().map(|(_, v)| v.parse().expect("a number")).collect();
    assert!(versions.is_sorted() && versions.len() == 50);
    // From the middle, the rest of the same.
    let mut events = Events::open(&api, &format!("{maps}?watch=1&resourceVersion={}", versions[29])).await;
    for wanted in &histories[0][30..] {
        let (kind, object) = events.next().await;
        assert_eq!((&kind, object.str_at("metadata.resourceVersion")), (&wanted.0, wanted.1.as_str()));
    }
}

#[tokio::test]
async fn watches_come_as_tables_and_as_metadata_in_both_versions() {
    let api = server().await;
    let admin = Client::admin(&api);
    let maps = "/api/v1/namespaces/default/configmaps";
    let start = api.registry.store.revision();
    admin
        .create(maps, &json!({ "metadata": { "name": "m", "labels": { "a": "b" } }, "data": { "k": "v" } }))
        .await;
    admin.delete(&format!("{maps}/m")).await;
    for version in ["v1", "v1beta1"] {
        for (form, kind) in [("Table", "Table"), ("PartialObjectMetadata", "PartialObjectMetadata")] {
            let accept = format!("application/json;as={form};v={version};g=meta.k8s.io");
            let path = format!("{maps}?watch=1&timeoutSeconds=1&resourceVersion={start}");
            let reply = send(&api, "GET", &path, &[("accept", &accept)], "").await;
            let text = String::from_utf8(reply.body.to_vec()).expect("text");
            let events: Vec<Value> =
                text.lines().map(|l| serde_json::from_str(l).expect("an event")).collect();
            let kinds: Vec<&str> = events.iter().map(|e| e.str_at("type")).collect();
            assert_eq!(kinds, ["ADDED", "DELETED"], "{accept}");
            for (i, event) in events.iter().enumerate() {
                let object = &event["object"];
                assert_eq!(
                    (object.str_at("kind"), object.str_at("apiVersion")),
                    (kind, format!("meta.k8s.io/{version}").as_str())
                );
                let metadata = if form == "Table" {
                    &object["rows"][0]["object"]["metadata"]
                } else {
                    &object["metadata"]
                };
                assert_eq!(
                    (metadata.str_at("name"), metadata["labels"]["a"].as_str()),
                    ("m", Some("b")),
                    "{object}"
                );
                assert_eq!(object["data"], Value::Null);
                // Columns are told once.
                let columns = object["columnDefinitions"].as_array().map_or(0, Vec::len);
                assert_eq!(columns > 0, form == "Table" && i == 0, "{object}");
            }
        }
    }
}

#[tokio::test]
async fn the_server_tells_its_version() {
    let api = server().await;
    let version = get(&api, "/version").await.json();
    assert_eq!((version.str_at("major"), version.str_at("minor")), ("1", "36"));
    assert!(version.str_at("gitVersion").starts_with("v1.36."));
}
