//! Versions that upstream has removed: manifests of older books, accepted, stored in today's version and
//! readable in both.

mod common;

use common::{get, post, send};
use knarr_api::object::Object;
use knarr_apiserver::api::Api;
use serde_json::{Value, json};

/// A pod template whose labels are `app: NAME`.
fn template(name: &str) -> Value {
    json!({ "metadata": { "labels": { "app": name } }, "spec": { "containers": [{ "name": "c", "image": "nginx:1" }] } })
}

fn path(api_version: &str, plural: &str, namespace: &str) -> String {
    let scope = if namespace.is_empty() { String::new() } else { format!("/namespaces/{namespace}") };
    format!("/apis/{api_version}{scope}/{plural}")
}

/// Posts the object as its own version; reads it in that version and in the stored one.
async fn stored(api: &Api, plural: &str, hub: &str, object: &Value) -> (Value, Value) {
    let version = object.str_at("apiVersion");
    let namespaced =
        !matches!(plural, "clusterroles" | "clusterrolebindings" | "storageclasses" | "priorityclasses");
    let namespace = if namespaced { "default" } else { "" };
    let name = object.name();
    let created = post(api, &path(version, plural, namespace), object).await;
    assert_eq!(created.status, 201, "{version} {plural}: {}", created.json());
    assert_eq!(created.json().str_at("apiVersion"), version);
    let warnings = created.warnings();
    let wanted = format!("299 - \"{version} {} is deprecated in v", object.str_at("kind"));
    assert!(warnings.iter().any(|w| w.starts_with(&wanted)), "{warnings:?}");
    let old = get(api, &format!("{}/{name}", path(version, plural, namespace))).await.json();
    let new = get(api, &format!("{}/{name}", path(hub, plural, namespace))).await;
    assert_eq!(new.warnings(), Vec::<String>::new());
    assert_eq!((old.str_at("apiVersion"), new.json().str_at("apiVersion")), (version, hub));
    assert_eq!(old.str_at("metadata.resourceVersion"), new.json().str_at("metadata.resourceVersion"));
    (old, new.json())
}

#[tokio::test]
async fn workloads_of_the_books_need_no_selector() {
    let api = common::server().await;
    for (version, kind, plural) in [
        ("apps/v1beta1", "Deployment", "deployments"),
        ("extensions/v1beta1", "Deployment", "deployments"),
        ("extensions/v1beta1", "DaemonSet", "daemonsets"),
        ("extensions/v1beta1", "ReplicaSet", "replicasets"),
        ("apps/v1beta1", "StatefulSet", "statefulsets"),
    ] {
        let name = format!("{}-{}", kind.to_lowercase(), version.split('/').next().unwrap_or_default());
        let mut spec = json!({ "template": template(&name) });
        if kind == "StatefulSet" {
            spec["serviceName"] = json!("web");
        }
        let object =
            json!({ "apiVersion": version, "kind": kind, "metadata": { "name": name }, "spec": spec });
        let (old, new) = stored(&api, plural, "apps/v1", &object).await;
        for read in [&old, &new] {
            assert_eq!(read.at("spec.selector.matchLabels.app"), Some(&json!(name)), "{version} {kind}");
            assert_eq!(read.at("metadata.labels.app"), Some(&json!(name)), "{version} {kind}");
        }
        match kind {
            "DaemonSet" | "StatefulSet" => assert_eq!(new.str_at("spec.updateStrategy.type"), "OnDelete"),
            "Deployment" if version == "apps/v1beta1" => {
                assert_eq!(new.int_at("spec.revisionHistoryLimit"), Some(2));
                assert_eq!(new.str_at("spec.strategy.rollingUpdate.maxSurge"), "25%");
            }
            "Deployment" => {
                assert_eq!(new.int_at("spec.progressDeadlineSeconds"), Some(i64::from(i32::MAX)));
                assert_eq!(new.int_at("spec.strategy.rollingUpdate.maxSurge"), Some(1));
            }
            _ => {}
        }
    }
    let object = json!({ "apiVersion": "apps/v1beta2", "kind": "ReplicaSet", "metadata": { "name": "hello-rs" },
        "spec": { "selector": { "matchLabels": { "app": "hello" } }, "template": template("hello") } });
    stored(&api, "replicasets", "apps/v1", &object).await;
    // From apps/v1beta2 on the selector must be given.
    let object = json!({ "apiVersion": "apps/v1beta2", "kind": "Deployment", "metadata": { "name": "x" }, "spec": { "template": template("x") } });
    let refused = post(&api, &path("apps/v1beta2", "deployments", "default"), &object).await;
    assert_eq!(refused.status, 422, "{}", refused.json());
    assert!(refused.json().str_at("message").contains("spec.selector: Required value"));
}

#[tokio::test]
async fn ingresses_change_their_shape_and_back() {
    let api = common::server().await;
    for version in ["extensions/v1beta1", "networking.k8s.io/v1beta1"] {
        let name = version.replace('/', "-").to_lowercase();
        let object = json!({ "apiVersion": version, "kind": "Ingress",
            "metadata": { "name": name, "annotations": { "ingress.kubernetes.io/rewrite-target": "/" } },
            "spec": { "backend": { "serviceName": "rest", "servicePort": "http" }, "rules": [{ "host": "a.example", "http": { "paths": [
                { "path": "/welcome", "backend": { "serviceName": "nginx", "servicePort": 80 } } ] } }] } });
        let (old, new) = stored(&api, "ingresses", "networking.k8s.io/v1", &object).await;
        let mut spec = object["spec"].clone();
        spec["rules"][0]["http"]["paths"][0]["pathType"] = json!("ImplementationSpecific");
        assert_eq!(old["spec"], spec);
        assert_eq!(
            new["spec"]["defaultBackend"]["service"],
            json!({ "name": "rest", "port": { "name": "http" } })
        );
        assert_eq!(
            new["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]["port"],
            json!({ "number": 80 })
        );
        // Each owner's fields are recorded in the words of its version.
        let entry = &new["metadata"]["managedFields"][0];
        assert_eq!(entry["apiVersion"], json!(version));
        assert!(entry["fieldsV1"]["f:spec"]["f:backend"].is_object(), "{entry}");
    }
}

#[tokio::test]
async fn every_other_version_is_stored_as_todays() {
    let api = common::server().await;
    let job = json!({ "spec": { "template": { "spec": { "restartPolicy": "Never", "containers": [{ "name": "c", "image": "i" }] } } } });
    let scale_target = json!({ "apiVersion": "apps/v1", "kind": "Deployment", "name": "web" });
    let cases = [
        (
            "cronjobs",
            "batch/v1",
            json!({ "apiVersion": "batch/v1beta1", "kind": "CronJob", "metadata": { "name": "b" }, "spec": { "schedule": "* * * * *", "jobTemplate": job } }),
        ),
        (
            "cronjobs",
            "batch/v1",
            json!({ "apiVersion": "batch/v2alpha1", "kind": "CronJob", "metadata": { "name": "c" }, "spec": { "schedule": "* * * * *", "jobTemplate": job } }),
        ),
        (
            "poddisruptionbudgets",
            "policy/v1",
            json!({ "apiVersion": "policy/v1beta1", "kind": "PodDisruptionBudget", "metadata": { "name": "p" }, "spec": { "minAvailable": 1, "selector": { "matchLabels": { "a": "b" } } } }),
        ),
        (
            "networkpolicies",
            "networking.k8s.io/v1",
            json!({ "apiVersion": "extensions/v1beta1", "kind": "NetworkPolicy", "metadata": { "name": "n" }, "spec": { "podSelector": {}, "ingress": [{}] } }),
        ),
        (
            "horizontalpodautoscalers",
            "autoscaling/v2",
            json!({ "apiVersion": "autoscaling/v2beta1", "kind": "HorizontalPodAutoscaler", "metadata": { "name": "h1" }, "spec": { "maxReplicas": 3, "scaleTargetRef": scale_target, "metrics": [{ "type": "Resource", "resource": { "name": "cpu", "targetAverageUtilization": 60 } }] } }),
        ),
        (
            "horizontalpodautoscalers",
            "autoscaling/v2",
            json!({ "apiVersion": "autoscaling/v2beta2", "kind": "HorizontalPodAutoscaler", "metadata": { "name": "h2" }, "spec": { "maxReplicas": 3, "scaleTargetRef": scale_target } }),
        ),
        (
            "roles",
            "rbac.authorization.k8s.io/v1",
            json!({ "apiVersion": "rbac.authorization.k8s.io/v1beta1", "kind": "Role", "metadata": { "name": "r" }, "rules": [{ "apiGroups": ["", "extensions", "apps"], "resources": ["deployments"], "verbs": ["*"] }] }),
        ),
        (
            "rolebindings",
            "rbac.authorization.k8s.io/v1",
            json!({ "apiVersion": "rbac.authorization.k8s.io/v1beta1", "kind": "RoleBinding", "metadata": { "name": "rb" }, "subjects": [{ "kind": "User", "name": "linda", "apiGroup": "" }], "roleRef": { "kind": "Role", "name": "r", "apiGroup": "" } }),
        ),
        (
            "clusterrolebindings",
            "rbac.authorization.k8s.io/v1",
            json!({ "apiVersion": "rbac.authorization.k8s.io/v1alpha1", "kind": "ClusterRoleBinding", "metadata": { "name": "crb" }, "subjects": [{ "kind": "User", "name": "*" }], "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "view" } }),
        ),
        (
            "storageclasses",
            "storage.k8s.io/v1",
            json!({ "apiVersion": "storage.k8s.io/v1beta1", "kind": "StorageClass", "metadata": { "name": "fast" }, "provisioner": "kubernetes.io/no-provisioner" }),
        ),
        (
            "priorityclasses",
            "scheduling.k8s.io/v1",
            json!({ "apiVersion": "scheduling.k8s.io/v1beta1", "kind": "PriorityClass", "metadata": { "name": "high" }, "value": 10 }),
        ),
        (
            "leases",
            "coordination.k8s.io/v1",
            json!({ "apiVersion": "coordination.k8s.io/v1beta1", "kind": "Lease", "metadata": { "name": "l" }, "spec": { "holderIdentity": "a" } }),
        ),
        (
            "endpointslices",
            "discovery.k8s.io/v1",
            json!({ "apiVersion": "discovery.k8s.io/v1beta1", "kind": "EndpointSlice", "metadata": { "name": "e" }, "addressType": "IPv4", "endpoints": [{ "addresses": ["10.0.0.1"], "topology": { "topology.kubernetes.io/zone": "z" } }] }),
        ),
    ];
    for (plural, hub, object) in &cases {
        let (_, new) = stored(&api, plural, hub, object).await;
        match object.str_at("metadata.name") {
            "crb" => assert_eq!(new["subjects"][0]["name"], json!("system:authenticated")),
            "rb" => assert_eq!(new["subjects"][0]["apiGroup"], json!("rbac.authorization.k8s.io")),
            "e" => assert_eq!(new["endpoints"][0]["zone"], json!("z")),
            "h1" => assert_eq!(
                new.at("spec.metrics").and_then(|m| m[0].at("resource.target.averageUtilization")),
                Some(&json!(60))
            ),
            _ => {}
        }
    }
}

#[tokio::test]
async fn old_versions_can_be_patched_applied_replaced_listed_watched_and_deleted() {
    let api = common::server().await;
    let base = path("extensions/v1beta1", "ingresses", "default");
    let object = json!({ "apiVersion": "extensions/v1beta1", "kind": "Ingress", "metadata": { "name": "i" },
        "spec": { "backend": { "serviceName": "a", "servicePort": 80 } } });
    assert_eq!(post(&api, &base, &object).await.status, 201);
    let one = format!("{base}/i");
    for (kind, patch, wanted) in [
        ("application/merge-patch+json", json!({ "spec": { "backend": { "serviceName": "b" } } }), "b"),
        (
            "application/strategic-merge-patch+json",
            json!({ "spec": { "backend": { "serviceName": "c" } } }),
            "c",
        ),
        (
            "application/json-patch+json",
            json!([{ "op": "replace", "path": "/spec/backend/serviceName", "value": "d" }]),
            "d",
        ),
    ] {
        let patched = send(&api, "PATCH", &one, &[("content-type", kind)], patch.to_string()).await;
        assert_eq!(patched.status, 200, "{kind}: {}", patched.json());
        assert_eq!(patched.json().str_at("spec.backend.serviceName"), wanted);
    }
    // Applied through the old version, then through the new: the conflict is about the same field.
    let apply = [("content-type", "application/apply-patch+yaml")];
    let config = json!({ "apiVersion": "extensions/v1beta1", "kind": "Ingress", "metadata": { "name": "j" },
        "spec": { "backend": { "serviceName": "a", "servicePort": 80 } } });
    let applied =
        send(&api, "PATCH", &format!("{base}/j?fieldManager=old"), &apply, config.to_string()).await;
    assert_eq!(applied.status, 201, "{}", applied.json());
    let again = send(&api, "PATCH", &format!("{base}/j?fieldManager=old"), &apply, config.to_string()).await;
    assert_eq!(again.json()["metadata"]["resourceVersion"], applied.json()["metadata"]["resourceVersion"]);
    let config = json!({ "apiVersion": "networking.k8s.io/v1", "kind": "Ingress", "metadata": { "name": "j" },
        "spec": { "defaultBackend": { "service": { "name": "b", "port": { "number": 80 } } } } });
    let new = format!("{}/j?fieldManager=new", path("networking.k8s.io/v1", "ingresses", "default"));
    let conflict = send(&api, "PATCH", &new, &apply, config.to_string()).await;
    assert_eq!(conflict.status, 409, "{}", conflict.json());
    assert_eq!(conflict.json()["details"]["causes"][0]["field"], json!(".spec.defaultBackend.service.name"));
    // What `kubectl get -o json | kubectl replace` does.
    let mut read = get(&api, &one).await.json();
    read["spec"]["backend"]["servicePort"] = json!("http");
    let replaced = send(&api, "PUT", &one, &[("content-type", "application/json")], read.to_string()).await;
    assert_eq!(replaced.status, 200, "{}", replaced.json());
    let list = get(&api, &base).await.json();
    assert_eq!((list.str_at("kind"), list.str_at("apiVersion")), ("IngressList", "extensions/v1beta1"));
    assert_eq!(list["items"][0]["spec"]["backend"]["servicePort"], json!("http"));
    let events = get(&api, &format!("{base}?watch=1&timeoutSeconds=1")).await;
    let text = String::from_utf8(events.body.to_vec()).expect("text");
    let first: Value = serde_json::from_str(text.lines().next().expect("an event")).expect("json");
    assert_eq!(first["object"]["spec"]["backend"]["serviceName"], json!("d"));
    let table = [("accept", "application/json;as=Table;v=v1;g=meta.k8s.io")];
    let table = send(&api, "GET", &base, &table, "").await.json();
    assert_eq!(table["columnDefinitions"][0]["name"], json!("Name"));
    let missing = get(&api, &format!("{base}/none")).await.json();
    assert_eq!(missing.str_at("message"), "ingresses.extensions \"none\" not found");
    assert_eq!(send(&api, "DELETE", &one, &[], "").await.status, 200);
    assert_eq!(get(&api, &one).await.status, 404);
}

#[tokio::test]
async fn autoscalers_and_events_are_one_object_in_both_their_versions() {
    let api = common::server().await;
    let target = json!({ "apiVersion": "apps/v1", "kind": "Deployment", "name": "web" });
    let v1 = path("autoscaling/v1", "horizontalpodautoscalers", "default");
    let object = json!({ "apiVersion": "autoscaling/v1", "kind": "HorizontalPodAutoscaler", "metadata": { "name": "h" },
        "spec": { "maxReplicas": 5, "scaleTargetRef": target, "targetCPUUtilizationPercentage": 70 } });
    let created = post(&api, &v1, &object).await;
    assert_eq!((created.status, created.warnings()), (201, vec![]), "{}", created.json());
    assert_eq!(created.json().int_at("spec.targetCPUUtilizationPercentage"), Some(70));
    let v2 = get(&api, &format!("{}/h", path("autoscaling/v2", "horizontalpodautoscalers", "default")))
        .await
        .json();
    assert_eq!(v2["spec"]["metrics"][0]["resource"]["target"]["averageUtilization"], json!(70));
    let event = json!({ "apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": { "name": "e" }, "eventTime": "2026-01-02T03:04:05.000000Z",
        "type": "Normal", "reason": "R", "action": "A", "note": "hello", "reportingController": "c", "reportingInstance": "i",
        "regarding": { "kind": "Pod", "namespace": "default", "name": "p" } });
    let created = post(&api, &path("events.k8s.io/v1", "events", "default"), &event).await;
    assert_eq!(created.status, 201, "{}", created.json());
    assert_eq!(created.json().str_at("note"), "hello");
    let core = get(&api, "/api/v1/namespaces/default/events").await.json();
    let found = core["items"].as_array().expect("items").iter().find(|e| e.name() == "e").expect("listed");
    assert_eq!((found.str_at("message"), found.str_at("involvedObject.name")), ("hello", "p"));
}

#[tokio::test]
async fn old_versions_are_listed_last_and_can_be_switched_off() {
    let api = common::server().await;
    let group = get(&api, "/apis/apps").await.json();
    let versions: Vec<&str> = group.list_at("versions").iter().map(|v| v.str_at("version")).collect();
    assert_eq!(versions, ["v1", "v1beta2", "v1beta1"]);
    assert_eq!(group.str_at("preferredVersion.version"), "v1");
    let group = get(&api, "/apis/autoscaling").await.json();
    let versions: Vec<&str> = group.list_at("versions").iter().map(|v| v.str_at("version")).collect();
    assert_eq!(versions, ["v2", "v1", "v2beta2", "v2beta1"]);
    let groups = get(&api, "/apis").await.json();
    assert_eq!(groups.list_at("groups").last().map(|g| g.str_at("name")), Some("extensions"));
    assert_eq!(get(&api, "/openapi/v3/apis/extensions/v1beta1").await.status, 200);
    let api = Api { old_versions: false, ..api };
    assert_eq!(get(&api, "/apis/extensions/v1beta1/ingresses").await.status, 404);
    assert_eq!(get(&api, "/apis/apps/v1beta1").await.status, 404);
    assert_eq!(get(&api, "/openapi/v3/apis/extensions/v1beta1").await.status, 404);
    let groups = get(&api, "/apis").await.json();
    assert!(groups.list_at("groups").iter().all(|g| g.str_at("name") != "extensions"));
}
