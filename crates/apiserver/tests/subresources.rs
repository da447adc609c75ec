//! Subresources through which a part of an object is written: who may change what, and whom it belongs to then.

mod common;

use common::{Client, server};
use knarr_api::object::Object;
use serde_json::{Value, json};

const PODS: &str = "/api/v1/namespaces/default/pods";
const STRATEGIC: &str = "application/strategic-merge-patch+json";

fn container(name: &str, cpu: &str, memory: &str) -> Value {
    let list = json!({ "cpu": cpu, "memory": memory });
    json!({ "name": name, "image": "i", "resources": { "requests": list, "limits": list } })
}

fn pod(name: &str, spec: Value) -> Value {
    json!({ "metadata": { "name": name }, "spec": spec })
}

async fn patch(client: &Client<'_>, path: &str, kind: &str, body: &Value) -> (u16, Value) {
    client.send("PATCH", path, &[("content-type", kind)], &body.to_string()).await
}

#[tokio::test]
async fn a_pods_cpu_and_memory_change_through_resize_and_nothing_else() {
    let api = server().await;
    let admin = Client::admin(&api);
    let spec = json!({ "containers": [container("a", "1", "1Gi")] });
    let made = admin.create(PODS, &pod("p", spec)).await;
    assert_eq!(made["metadata"]["generation"], 1);
    let path = format!("{PODS}/p/resize");
    assert_eq!(admin.get(&path).await.0, 200);
    let twice = json!({ "cpu": "2", "memory": "1Gi" });
    let more = json!({ "spec": { "containers": [{ "name": "a", "image": "other",
        "resources": { "requests": twice, "limits": twice } }], "priority": 9 },
        "metadata": { "labels": { "a": "b" } }, "status": { "phase": "Running" } });
    let (status, resized) = patch(&admin, &path, STRATEGIC, &more).await;
    assert_eq!(status, 200, "{resized}");
    let shown = &resized["spec"]["containers"][0];
    assert_eq!((&shown["image"], &shown["resources"]["limits"]), (&json!("i"), &twice));
    let restarts = json!({ "spec": { "containers": [{ "name": "a",
        "resizePolicy": [{ "resourceName": "memory", "restartPolicy": "RestartContainer" }] }] } });
    assert_eq!(patch(&admin, &path, STRATEGIC, &restarts).await.0, 422, "policies stay");
    assert_eq!(resized["metadata"]["generation"], 2);
    assert_eq!(
        (&resized["status"]["phase"], &resized["metadata"]["labels"]),
        (&json!("Pending"), &Value::Null)
    );
    let direct =
        json!({ "spec": { "containers": [{ "name": "a", "resources": { "limits": { "cpu": "3" } } }] } });
    let (status, answer) = patch(&admin, &format!("{PODS}/p"), STRATEGIC, &direct).await;
    assert_eq!(
        (status, &answer["reason"]),
        (422, &json!("Invalid")),
        "the pod itself lets no resources change"
    );
    let apply = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "p" }, "spec": { "containers": [
        { "name": "a", "resources": { "limits": { "cpu": "3" }, "requests": { "cpu": "3" } } }] } });
    let query = format!("{path}?fieldManager=sizer&force=true");
    let (status, applied) = patch(&admin, &query, "application/apply-patch+yaml", &apply).await;
    assert_eq!(status, 200, "{applied}");
    let mut entries = applied["metadata"]["managedFields"].as_array().expect("managers").iter();
    let own = entries.find(|e| e["manager"] == "sizer").expect("the applier owns something");
    assert_eq!(own["subresource"], "resize");
    let containers = &own["fieldsV1"]["f:spec"]["f:containers"]["k:{\"name\":\"a\"}"];
    assert_eq!(containers.as_object().expect("fields").len(), 1, "resources alone: {containers}");
}

#[tokio::test]
async fn what_a_resize_may_not_do_is_refused_in_upstreams_words() {
    let api = server().await;
    let admin = Client::admin(&api);
    let mut sidecar = container("side", "1", "1Gi");
    sidecar["restartPolicy"] = json!("Always");
    let spec = json!({ "containers": [container("a", "1", "1Gi")], "initContainers": [container("init", "1", "1Gi"), sidecar] });
    let made = admin.create(PODS, &pod("p", spec)).await;
    let path = format!("{PODS}/p/resize");
    let refused = |list: &str, name: &str, resources: Value| {
        let mut item = json!({ "name": name });
        item["resources"] = resources;
        let mut spec = json!({});
        spec[list] = json!([item]);
        json!({ "spec": spec })
    };
    let both = |cpu: &str| json!({ "requests": { "cpu": cpu }, "limits": { "cpu": cpu } });
    for (body, why) in [
        (
            refused("containers", "a", json!({ "requests": { "cpu": "500m" } })),
            "spec: Invalid value: \"Guaranteed\": Pod QOS Class may not change as a result of resizing",
        ),
        (
            refused("containers", "a", json!({ "requests": { "cpu": null }, "limits": { "cpu": null } })),
            "spec.containers[0].resources.limits: Forbidden: resource limits cannot be removed",
        ),
        (
            refused("containers", "a", json!({ "limits": { "ephemeral-storage": "1Gi" } })),
            "spec: Forbidden: only cpu and memory resources are mutable",
        ),
        (
            refused("initContainers", "init", json!({ "limits": { "ephemeral-storage": "1Gi" } })),
            "spec.initContainers[0]: Forbidden: only cpu and memory resources for init or sidecar containers are mutable",
        ),
        (
            refused("containers", "b", both("2")),
            "spec.containers: Forbidden: containers may not be added or removed on resize",
        ),
        (
            json!({ "spec": { "containers": [{ "name": "b" }, { "$patch": "delete", "name": "a" }] } }),
            "spec.containers[0].name: Forbidden: containers may not be renamed or reordered on resize",
        ),
    ] {
        let (status, answer) = patch(&admin, &path, STRATEGIC, &body).await;
        let message = answer["message"].as_str().unwrap_or_default();
        assert!(status == 422 && message.contains(why), "{body}: {status} {message}");
    }
    for name in ["init", "side"] {
        let (status, answer) =
            patch(&admin, &path, STRATEGIC, &refused("initContainers", name, both("2"))).await;
        assert_eq!(status, 200, "{name}: {answer}");
    }
    // A node that does not say what containers have cannot change it.
    let running = json!({ "status": { "containerStatuses": [{ "name": "a", "image": "i", "imageID": "", "ready": true,
        "restartCount": 0, "state": { "running": {} } }] } });
    admin.patch(&format!("{PODS}/p/status"), &running).await;
    let (_, answer) = patch(&admin, &path, STRATEGIC, &refused("containers", "a", both("2"))).await;
    let message = answer["message"].as_str().unwrap_or_default();
    assert!(message.contains("Pod running on node without support for resize"), "{message}");
    let (status, _) = admin.put(&path, &made).await;
    assert_eq!(status, 409, "a stale update");
}

#[tokio::test]
async fn quotas_and_limit_ranges_judge_a_resize() {
    let api = server().await;
    let admin = Client::admin(&api);
    let spec = json!({ "containers": [container("a", "1", "1Gi")] });
    admin.create(PODS, &pod("p", spec)).await;
    let limits = json!({ "spec": { "limits": [{ "type": "Container", "max": { "cpu": "3" } }] }, "metadata": { "name": "l" } });
    admin.create("/api/v1/namespaces/default/limitranges", &limits).await;
    let quota = json!({ "metadata": { "name": "q" }, "spec": { "hard": { "requests.cpu": "2" } } });
    admin.create("/api/v1/namespaces/default/resourcequotas", &quota).await;
    let resize = |cpu: &str| {
        json!({ "spec": { "containers": [{ "name": "a",
        "resources": { "requests": { "cpu": cpu }, "limits": { "cpu": cpu } } }] } })
    };
    let path = format!("{PODS}/p/resize");
    for (cpu, status, why) in [
        ("4", 403, "maximum cpu usage per Container is 3, but limit is 4"),
        (
            "3",
            403,
            "exceeded quota: q, requested: requests.cpu=2, used: requests.cpu=1, limited: requests.cpu=2",
        ),
        ("2", 200, ""),
    ] {
        let (answered, answer) = patch(&admin, &path, STRATEGIC, &resize(cpu)).await;
        let message = answer["message"].as_str().unwrap_or_default();
        assert!(answered == status && message.contains(why), "{cpu}: {answered} {message}");
    }
    let (_, quota) = admin.get("/api/v1/namespaces/default/resourcequotas/q").await;
    assert_eq!(quota["status"]["used"]["requests.cpu"], "2");
}

#[tokio::test]
async fn resources_of_a_whole_pod_follow_from_its_containers_and_resize_too() {
    let api = server().await;
    let admin = Client::admin(&api);
    let mut spec = json!({ "containers": [container("a", "1", "1Gi")], "resources": { "limits": { "cpu": "2", "memory": "2Gi" } } });
    let made = admin.create(PODS, &pod("p", spec.clone())).await;
    assert_eq!(made["spec"]["resources"]["requests"], json!({ "cpu": "1", "memory": "1Gi" }));
    assert_eq!(made["status"]["qosClass"], "Burstable");
    let more = json!({ "spec": { "resources": { "limits": { "cpu": "4" } } } });
    let (status, answer) = patch(&admin, &format!("{PODS}/p/resize"), STRATEGIC, &more).await;
    assert_eq!((status, &answer["spec"]["resources"]["limits"]["cpu"]), (200, &json!("4")), "{answer}");
    spec["resources"] = json!({ "requests": { "cpu": "500m" }, "limits": { "memory": "512Mi" } });
    let (status, answer) = admin.post(PODS, &pod("q", spec)).await;
    let message = answer["message"].as_str().unwrap_or_default();
    assert_eq!(status, 422);
    for why in [
        "spec.resources.requests[cpu]: Invalid value: \"500m\": must be greater than or equal to aggregate container requests of 1",
        "spec.containers[0].resources.limits[memory]: Invalid value: \"1Gi\": must be less than or equal to pod limits of 512Mi",
    ] {
        assert!(message.contains(why), "{message}");
    }
}

#[tokio::test]
async fn ephemeral_containers_come_and_stay() {
    let api = server().await;
    let admin = Client::admin(&api);
    let spec = json!({ "containers": [container("a", "1", "1Gi")] });
    admin.create(PODS, &pod("p", spec)).await;
    let path = format!("{PODS}/p/ephemeralcontainers");
    let look = json!({ "spec": { "ephemeralContainers": [{ "name": "look", "image": "tools", "targetContainerName": "a" }],
        "containers": [{ "name": "a", "image": "other" }] } });
    let (status, answer) = patch(&admin, &path, STRATEGIC, &look).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["spec"]["containers"][0]["image"], "i", "nothing else changes");
    assert_eq!(answer["metadata"]["generation"], 2);
    for (body, why) in [
        (
            json!({ "spec": { "ephemeralContainers": null } }),
            "existing ephemeral containers \"look\" may not be removed",
        ),
        (
            json!({ "spec": { "ephemeralContainers": [{ "name": "look", "image": "others" }] } }),
            "existing ephemeral containers \"look\" may not be changed",
        ),
    ] {
        let (status, answer) = patch(&admin, &path, "application/merge-patch+json", &body).await;
        let message = answer["message"].as_str().unwrap_or_default();
        assert!(status == 422 && message.contains(why), "{message}");
    }
    let owned = answer["metadata"]["managedFields"].as_array().expect("managers").iter();
    let subresources: Vec<&str> = owned.map(|e| e.str_at("subresource")).collect();
    assert_eq!(subresources, ["", "ephemeralcontainers"]);
}

#[tokio::test]
async fn a_status_writer_that_knows_no_observed_generation_does_not_take_it_away() {
    let api = server().await;
    let admin = Client::admin(&api);
    admin.create(PODS, &pod("p", json!({ "containers": [container("a", "1", "1Gi")] }))).await;
    let path = format!("{PODS}/p/status");
    let ready = |seen: Value| json!({ "type": "Ready", "status": "True", "observedGeneration": seen });
    let told = json!({ "status": { "observedGeneration": 1, "conditions": [ready(json!(1))] } });
    assert_eq!(admin.patch(&path, &told).await.0, 200);
    let (_, pod) = admin.get(&path).await;
    let mut old = pod.clone();
    old.remove_at("status.observedGeneration");
    old.set_at("status.conditions", json!([{ "type": "Ready", "status": "False" }]));
    let (_, kept) = admin.put(&path, &old).await;
    assert_eq!(
        (&kept["status"]["observedGeneration"], &kept["status"]["conditions"][0]["observedGeneration"]),
        (&json!(1), &json!(1))
    );
}

const REQUESTS: &str = "/apis/certificates.k8s.io/v1/certificatesigningrequests";

fn signing_request() -> Value {
    use base64::Engine;
    let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
    let pem = encode("-----BEGIN CERTIFICATE REQUEST-----\nAA==\n-----END CERTIFICATE REQUEST-----\n");
    json!({ "metadata": { "name": "r" }, "spec": { "request": pem, "signerName": "acme.io/s", "usages": ["client auth"] } })
}

#[tokio::test]
async fn a_signing_request_is_judged_through_approval_and_signed_through_status() {
    use base64::Engine;
    let api = server().await;
    let admin = Client::admin(&api);
    admin.create(REQUESTS, &signing_request()).await;
    let (approval, status) = (format!("{REQUESTS}/r/approval"), format!("{REQUESTS}/r/status"));
    let verdict = |kind: &str| json!({ "type": kind, "status": "True", "reason": "r", "message": "m" });
    let with = |conditions: Value| json!({ "status": { "conditions": conditions } });
    for (path, body, why) in [
        (&status, with(json!([verdict("Approved")])), "updates may not add a condition of type \"Approved\""),
        (
            &approval,
            with(json!([verdict("Approved"), verdict("Denied")])),
            "Approved and Denied conditions are mutually exclusive",
        ),
        (
            &approval,
            with(json!([{ "type": "Approved", "status": "False" }])),
            "status.conditions[0].status: Unsupported value: \"False\": supported values: \"True\"",
        ),
        (&status, json!({ "status": { "certificate": "AAAA" } }), "must contain one or more PEM blocks"),
    ] {
        let (code, answer) = admin.patch(path, &body).await;
        let message = answer["message"].as_str().unwrap_or_default();
        assert!(code == 422 && message.contains(why), "{body}: {code} {message}");
    }
    let (code, approved) = admin.patch(&approval, &with(json!([verdict("Approved")]))).await;
    assert_eq!(code, 200, "{approved}");
    let condition = &approved["status"]["conditions"][0];
    assert!(
        condition["lastUpdateTime"].is_string() && condition["lastTransitionTime"].is_string(),
        "{condition}"
    );
    let (code, answer) = admin.patch(&approval, &with(json!([]))).await;
    let why = "updates may not remove a condition of type \"Approved\"";
    assert!(code == 422 && answer["message"].as_str().unwrap_or_default().contains(why), "{answer}");
    let certificate = |body: &str| {
        let pem = format!("-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n");
        json!({ "status": { "certificate": base64::engine::general_purpose::STANDARD.encode(pem) } })
    };
    let (_, untouched) = admin.patch(&approval, &certificate("AA==")).await;
    assert_eq!(untouched["status"]["certificate"], Value::Null, "approvers sign nothing");
    assert_eq!(admin.patch(&status, &certificate("AA==")).await.0, 200);
    let (code, answer) = admin.patch(&status, &certificate("AAAA")).await;
    let why = "updates may not modify existing certificate content";
    assert!(code == 422 && answer["message"].as_str().unwrap_or_default().contains(why), "{answer}");
}

#[tokio::test]
async fn events_of_the_newer_group_are_of_the_newer_form() {
    let api = server().await;
    let admin = Client::admin(&api);
    let events = "/apis/events.k8s.io/v1/namespaces/default/events";
    let event = |name: &str| {
        json!({ "metadata": { "name": name }, "regarding": { "namespace": "default" }, "eventTime": "2026-01-01T00:00:00.000000Z",
            "reportingController": "acme.io/c", "reportingInstance": "c-1", "action": "a", "reason": "r", "type": "Normal" })
    };
    admin.create(events, &event("e")).await;
    let change = |path: &str, value: Value| {
        let mut event = event("x");
        event.set_at(path, value);
        event
    };
    for (event, why) in [
        (change("eventTime", Value::Null), "eventTime: Required value"),
        (change("type", json!("Odd")), "type: Invalid value: \"\": has invalid value: Odd"),
        (change("deprecatedCount", json!(3)), "count: Invalid value: \"\": needs to be unset"),
        (
            change("series", json!({ "count": 1, "lastObservedTime": "2026-01-01T00:00:00.000000Z" })),
            "series.count: Invalid value: \"\": should be at least 2",
        ),
        (change("action", json!("")), "action: Required value"),
        (
            change("reason", json!("r".repeat(129))),
            "reason: Invalid value: \"\": can have at most 128 characters",
        ),
    ] {
        let (status, answer) = admin.post(events, &event).await;
        let message = answer["message"].as_str().unwrap_or_default();
        assert!(status == 422 && message.contains(why), "{why}: {status} {message}");
    }
    let path = format!("{events}/e");
    let series = json!({ "series": { "count": 2, "lastObservedTime": "2026-01-01T00:00:01.000000Z" } });
    let (status, grown) = admin.patch(&path, &series).await;
    assert_eq!((status, &grown["series"]["count"]), (200, &json!(2)), "{grown}");
    let (status, answer) = admin.patch(&path, &json!({ "reason": "other" })).await;
    assert_eq!(status, 422, "{answer}");
    let (_, old) = admin.get("/api/v1/namespaces/default/events/e").await;
    assert_eq!(
        (&old["series"]["count"], &old["reportingComponent"]),
        (&json!(2), &json!("acme.io/c")),
        "one object"
    );
}

#[tokio::test]
async fn a_dry_run_leaves_nothing_behind_whatever_the_verb() {
    let api = server().await;
    let admin = Client::admin(&api);
    admin.create(PODS, &pod("p", json!({ "containers": [container("a", "1", "1Gi")] }))).await;
    let maps = "/api/v1/namespaces/default/configmaps";
    admin.create(maps, &json!({ "metadata": { "name": "m" } })).await;
    let deployments = "/apis/apps/v1/namespaces/default/deployments";
    let template = json!({ "metadata": { "labels": { "a": "b" } }, "spec": { "containers": [{ "name": "c", "image": "i" }] } });
    let spec = json!({ "selector": { "matchLabels": { "a": "b" } }, "template": template });
    admin.create(deployments, &json!({ "metadata": { "name": "d" }, "spec": spec })).await;
    admin.create(REQUESTS, &signing_request()).await;
    let before = api.registry.store.revision();
    let dry = json!({ "dryRun": ["All"] });
    let resize = json!({ "spec": { "containers": [{ "name": "a", "resources": { "requests": { "cpu": "2" }, "limits": { "cpu": "2" } } }] } });
    let look = json!({ "spec": { "ephemeralContainers": [{ "name": "look", "image": "tools" }] } });
    let approved = json!({ "status": { "conditions": [{ "type": "Approved", "status": "True" }] } });
    let evict = |options: Value| json!({ "metadata": { "name": "p" }, "deleteOptions": options });
    let (merge, json_body) = ("application/merge-patch+json", "application/json");
    let apply = json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "n" } });
    let scale = json!({ "spec": { "replicas": 5 } });
    let q = "?dryRun=All";
    for (method, path, kind, body) in [
        ("POST", format!("{maps}{q}"), json_body, json!({ "metadata": { "name": "n" } })),
        (
            "PUT",
            format!("{maps}/m{q}"),
            json_body,
            json!({ "metadata": { "name": "m" }, "data": { "a": "b" } }),
        ),
        ("PATCH", format!("{maps}/m{q}"), merge, json!({ "data": { "a": "b" } })),
        ("PATCH", format!("{maps}/n{q}&fieldManager=x"), "application/apply-patch+yaml", apply),
        ("DELETE", format!("{maps}/m{q}"), json_body, json!({})),
        ("DELETE", format!("{maps}/m"), json_body, dry.clone()),
        ("DELETE", maps.to_owned(), json_body, dry.clone()),
        ("PATCH", format!("{PODS}/p/status{q}"), merge, json!({ "status": { "phase": "Running" } })),
        ("PATCH", format!("{PODS}/p/resize{q}"), STRATEGIC, resize),
        ("PATCH", format!("{PODS}/p/ephemeralcontainers{q}"), STRATEGIC, look),
        (
            "POST",
            format!("{PODS}/p/binding{q}"),
            json_body,
            json!({ "metadata": { "name": "p" }, "target": { "name": "n" } }),
        ),
        ("POST", format!("{PODS}/p/eviction{q}"), json_body, evict(json!({}))),
        ("POST", format!("{PODS}/p/eviction"), json_body, evict(dry.clone())),
        ("PATCH", format!("{deployments}/d/scale{q}"), merge, scale),
        ("PATCH", format!("{REQUESTS}/r/approval{q}"), merge, approved),
        (
            "POST",
            format!("{SERVICES}{q}"),
            json_body,
            json!({ "metadata": { "name": "s" }, "spec": { "ports": [{ "port": 80 }] } }),
        ),
        (
            "POST",
            format!("/api/v1/namespaces/default/serviceaccounts/default/token{q}"),
            json_body,
            json!({ "spec": {} }),
        ),
    ] {
        let (status, answer) = admin.send(method, &path, &[("content-type", kind)], &body.to_string()).await;
        assert!(matches!(status, 200 | 201), "{method} {path}: {status} {answer}");
        assert_eq!(answer["status"]["token"].as_str().unwrap_or_default(), "", "{path}");
        assert_eq!(api.registry.store.revision(), before, "{method} {path} has written something");
    }
    let (status, answer) =
        admin.send("DELETE", &format!("{maps}/m"), &[], &json!({ "dryRun": ["Some"] }).to_string()).await;
    assert_eq!(status, 422, "{answer}");
}

const SERVICES: &str = "/api/v1/namespaces/default/services";

#[tokio::test]
async fn a_binding_gives_a_pod_its_node_once_and_the_nodes_zone() {
    let api = server().await;
    let admin = Client::admin(&api);
    let labels =
        json!({ "topology.kubernetes.io/zone": "z", "topology.kubernetes.io/region": "r", "other": "o" });
    admin.create("/api/v1/nodes", &json!({ "metadata": { "name": "n", "labels": labels } })).await;
    let mut unbound = pod("p", json!({ "containers": [container("a", "1", "1Gi")] }));
    unbound["metadata"]["labels"] = json!({ "topology.kubernetes.io/region": "mine" });
    let made = admin.create(PODS, &unbound).await;
    let nominated = json!({ "status": { "nominatedNodeName": "other" } });
    assert_eq!(admin.patch(&format!("{PODS}/p/status"), &nominated).await.0, 200);
    let path = format!("{PODS}/p/binding");
    let binding = |uid: &Value| {
        json!({ "target": { "kind": "Node", "name": "n" },
        "metadata": { "name": "p", "uid": uid, "annotations": { "by": "me" } } })
    };
    let (status, refused) = admin.post(&path, &binding(&json!("another"))).await;
    assert_eq!((status, refused["reason"].as_str()), (409, Some("Conflict")), "{refused}");
    let (status, answer) = admin.post(&path, &binding(&made["metadata"]["uid"])).await;
    assert_eq!((status, &answer["status"]), (201, &json!("Success")), "{answer}");
    let (_, bound) = admin.get(&format!("{PODS}/p")).await;
    assert_eq!(bound["spec"]["nodeName"], "n");
    assert_eq!(bound["metadata"]["generation"], 1, "a binding is no change of the wish");
    assert_eq!(bound["metadata"]["annotations"], json!({ "by": "me" }));
    let zone = json!({ "topology.kubernetes.io/zone": "z", "topology.kubernetes.io/region": "mine" });
    assert_eq!(bound["metadata"]["labels"], zone);
    assert_eq!(bound["status"]["nominatedNodeName"], Value::Null);
    let scheduled = &bound["status"]["conditions"][0];
    assert_eq!((&scheduled["type"], &scheduled["status"]), (&json!("PodScheduled"), &json!("True")));
    let mut owners = bound["metadata"]["managedFields"].as_array().expect("owners").iter();
    let owns = |owner: &Value| owner["fieldsV1"]["f:spec"].get("f:nodeName").is_some();
    assert!(!owners.any(owns), "nobody owns what a binding sets");
    let (status, again) = admin.post(&path, &binding(&made["metadata"]["uid"])).await;
    let why = again["message"].as_str().unwrap_or_default();
    assert!(status == 409 && why.ends_with("pod p is already assigned to node \"n\""), "{status} {why}");
}
