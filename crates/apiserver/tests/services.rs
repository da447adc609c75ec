//! Addresses and ports of services: one and two families, changes between them and between types, ranges that come
//! and go, and locks that never leak.

mod common;

use std::sync::Arc;

use common::{Client, server, server_on, server_with};
use knarr_apiserver::bootstrap;
use knarr_store::engine::Memory;
use knarr_store::{Embedded, Options};
use serde_json::{Value, json};

const SERVICES: &str = "/api/v1/namespaces/default/services";
const ADDRESSES: &str = "/apis/networking.k8s.io/v1/ipaddresses";
const RANGES: &str = "/apis/networking.k8s.io/v1/servicecidrs";

fn service(name: &str, spec: Value) -> Value {
    let mut service = json!({ "metadata": { "name": name }, "spec": { "ports": [{ "port": 80 }], "selector": { "a": "b" } } });
    for (key, value) in spec.as_object().expect("a spec") {
        service["spec"][key] = value.clone();
    }
    service
}

fn message(answer: &Value) -> &str {
    answer["message"].as_str().unwrap_or_default()
}

/// The names of all address objects.
async fn locks(admin: &Client<'_>) -> Vec<String> {
    let (_, list) = admin.get(ADDRESSES).await;
    let items = list["items"].as_array().expect("items").iter();
    items.map(|item| item["metadata"]["name"].as_str().expect("a name").to_owned()).collect()
}

#[tokio::test]
async fn each_address_in_use_is_an_object_that_comes_and_goes_with_its_service() {
    let api = server().await;
    let admin = Client::admin(&api);
    assert_eq!(locks(&admin).await, ["10.96.0.1"], "the API server's own");
    let made = admin.create(SERVICES, &service("s", json!({}))).await;
    let address = made["spec"]["clusterIP"].as_str().expect("an address").to_owned();
    assert_eq!(address, "10.96.1.1", "above the band that is for who asks");
    let (_, lock) = admin.get(&format!("{ADDRESSES}/{address}")).await;
    let parent = json!({ "resource": "services", "namespace": "default", "name": "s" });
    assert_eq!(lock["spec"]["parentRef"], parent, "{lock}");
    assert_eq!(lock["metadata"]["labels"]["ipaddress.kubernetes.io/managed-by"], "ipallocator.k8s.io");
    assert_eq!(lock["metadata"]["labels"]["ipaddress.kubernetes.io/ip-family"], "IPv4");
    let (status, answer) = admin.post(SERVICES, &service("t", json!({ "clusterIP": address }))).await;
    assert_eq!(status, 422);
    let why = format!("failed to allocate IP {address}: provided IP is already allocated");
    assert!(message(&answer).contains(&why), "{answer}");
    // Somebody else's lock counts as well.
    let foreign = json!({ "metadata": { "name": "10.96.0.77" }, "spec": { "parentRef": {
        "group": "gateway.networking.k8s.io", "resource": "gateways", "namespace": "default", "name": "g" } } });
    admin.create(ADDRESSES, &foreign).await;
    assert_eq!(admin.post(SERVICES, &service("t", json!({ "clusterIP": "10.96.0.77" }))).await.0, 422);
    // A lock that is taken away from a service comes back.
    admin.delete(&format!("{ADDRESSES}/{address}")).await;
    assert!(locks(&admin).await.contains(&address));
    admin.delete(&format!("{SERVICES}/s")).await;
    assert_eq!(locks(&admin).await, ["10.96.0.1", "10.96.0.77"]);
    // Nothing stays of what is refused, tried or dry.
    assert_eq!(admin.post(&format!("{SERVICES}?dryRun=All"), &service("t", json!({}))).await.0, 201);
    admin.create(SERVICES, &service("t", json!({}))).await;
    assert_eq!(admin.post(SERVICES, &service("t", json!({}))).await.0, 409);
    assert_eq!(locks(&admin).await.len(), 3);
}

#[tokio::test]
async fn what_a_crash_left_behind_is_repaired_at_the_next_start() {
    let store = Arc::new(Embedded::open_inline(Memory::default(), Options::default()).expect("opens"));
    let api = server_on(store.clone()).await;
    let admin = Client::admin(&api);
    let labels = json!({ "ipaddress.kubernetes.io/managed-by": "ipallocator.k8s.io" });
    let parent = json!({ "resource": "services", "namespace": "default", "name": "never-made" });
    let leaked =
        json!({ "metadata": { "name": "10.96.5.5", "labels": labels }, "spec": { "parentRef": parent } });
    admin.create(ADDRESSES, &leaked).await;
    bootstrap::run(&api.registry, &["192.0.2.2:6443".parse().expect("an address")])
        .await
        .expect("starts again");
    assert_eq!(locks(&admin).await, ["10.96.0.1"]);
}

#[tokio::test]
async fn a_cluster_of_one_family_gives_one_address() {
    let api = server().await;
    let admin = Client::admin(&api);
    let made =
        admin.create(SERVICES, &service("prefers", json!({ "ipFamilyPolicy": "PreferDualStack" }))).await;
    assert_eq!(
        (&made["spec"]["ipFamilies"], &made["spec"]["ipFamilyPolicy"]),
        (&json!(["IPv4"]), &json!("PreferDualStack"))
    );
    let headless = service("any", json!({ "clusterIP": "None", "selector": {} }));
    let made = admin.create(SERVICES, &headless).await;
    assert_eq!(made["spec"]["ipFamilies"], json!(["IPv4", "IPv6"]), "endpoints of any family");
    assert_eq!(made["spec"]["ipFamilyPolicy"], "RequireDualStack");
    for (spec, why) in [
        (
            json!({ "ipFamilyPolicy": "RequireDualStack" }),
            "spec.ipFamilyPolicy: Invalid value: \"RequireDualStack\": this cluster is not configured for dual-stack services",
        ),
        (
            json!({ "ipFamilies": ["IPv6"] }),
            "spec.ipFamilies[0]: Invalid value: \"IPv6\": not configured on this cluster",
        ),
        (
            json!({ "ipFamilies": ["IPv5"] }),
            "spec.ipFamilies[0]: Unsupported value: \"IPv5\": supported values: \"IPv4\", \"IPv6\"",
        ),
        (
            json!({ "ipFamilies": ["IPv4", "IPv6"] }),
            "must be 'RequireDualStack' or 'PreferDualStack' when multiple IP families are specified",
        ),
        (
            json!({ "clusterIPs": ["10.96.0.9"] }),
            "spec.clusterIPs: Invalid value: [\"10.96.0.9\"]: must be empty when `clusterIP` is not specified",
        ),
        (
            json!({ "clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.8"] }),
            "first value must match `clusterIP`",
        ),
        (
            json!({ "clusterIP": "10.96.0.9", "ipFamilies": ["IPv6"] }),
            "expected an IPv6 value as indicated by `ipFamilies[0]`",
        ),
        (
            json!({ "clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9", "10.96.0.8"] }),
            "may specify no more than one IP for each IP family",
        ),
        (
            json!({ "clusterIP": "None", "clusterIPs": ["None", "10.96.0.8"] }),
            "'None' must be the first and only value",
        ),
        (
            json!({ "clusterIP": "192.0.2.1" }),
            "failed to allocate IP 192.0.2.1: the provided IP (192.0.2.1) is not in the valid range. The range of valid IPs is 10.96.0.0/16",
        ),
        (json!({ "externalIPs": ["127.0.0.1"] }), "may not be in the loopback range (127.0.0.0/8, ::1/128)"),
        (
            json!({ "ports": [{ "port": 80, "nodePort": 30000 }] }),
            "may not be used when `type` is 'ClusterIP'",
        ),
        (json!({ "loadBalancerClass": "acme.io/x" }), "may only be used when `type` is 'LoadBalancer'"),
        (
            json!({ "type": "ExternalName", "externalName": "x.y", "ipFamilyPolicy": "SingleStack" }),
            "spec.ipFamilyPolicy: Forbidden: may not be set for ExternalName services",
        ),
    ] {
        let (status, answer) = admin.post(SERVICES, &service("x", spec.clone())).await;
        assert!(status == 422 && message(&answer).contains(why), "{spec}: {status} {}", message(&answer));
    }
}

#[tokio::test]
async fn a_cluster_of_two_families_gives_two_addresses_to_who_wants_them() {
    let api = server_with("10.96.0.0/16,fd00:10:96::/112").await;
    let admin = Client::admin(&api);
    for (name, spec, families, policy) in [
        ("plain", json!({}), json!(["IPv4"]), "SingleStack"),
        ("six", json!({ "ipFamilies": ["IPv6"] }), json!(["IPv6"]), "SingleStack"),
        (
            "both",
            json!({ "ipFamilyPolicy": "RequireDualStack" }),
            json!(["IPv4", "IPv6"]),
            "RequireDualStack",
        ),
        (
            "turned",
            json!({ "ipFamilyPolicy": "PreferDualStack", "ipFamilies": ["IPv6"] }),
            json!(["IPv6", "IPv4"]),
            "PreferDualStack",
        ),
        (
            "named",
            json!({ "ipFamilyPolicy": "PreferDualStack", "clusterIP": "fd00:10:96::9" }),
            json!(["IPv6", "IPv4"]),
            "PreferDualStack",
        ),
        (
            "headless",
            json!({ "ipFamilyPolicy": "PreferDualStack", "clusterIP": "None" }),
            json!(["IPv4", "IPv6"]),
            "PreferDualStack",
        ),
    ] {
        let made = admin.create(SERVICES, &service(name, spec)).await;
        let spec = &made["spec"];
        assert_eq!(
            (&spec["ipFamilies"], spec["ipFamilyPolicy"].as_str()),
            (&families, Some(policy)),
            "{name}"
        );
        let count = if name == "headless" { 1 } else { families.as_array().expect("a list").len() };
        assert_eq!(spec["clusterIPs"].as_array().map(Vec::len), Some(count), "{name}: {spec}");
        assert_eq!(spec["clusterIPs"][0], spec["clusterIP"]);
    }
    // One family becomes two by the policy, and one again.
    let one = format!("{SERVICES}/plain");
    let (status, grown) =
        admin.patch(&one, &json!({ "spec": { "ipFamilyPolicy": "PreferDualStack" } })).await;
    assert_eq!((status, &grown["spec"]["ipFamilies"]), (200, &json!(["IPv4", "IPv6"])), "{grown}");
    let second = grown["spec"]["clusterIPs"][1].as_str().expect("a second address").to_owned();
    assert!(locks(&admin).await.contains(&second));
    for (spec, why) in [
        (
            json!({ "clusterIPs": [grown["spec"]["clusterIP"]] }),
            "must be 'SingleStack' to release the secondary cluster IP",
        ),
        (json!({ "ipFamilies": ["IPv4"] }), "must be 'SingleStack' to release the secondary IP family"),
        (json!({ "clusterIPs": [grown["spec"]["clusterIP"], "fd00:10:96::77"] }), "may not change once set"),
        (json!({ "ipFamilies": ["IPv6", "IPv4"] }), "expected an IPv6 value as indicated by `ipFamilies[0]`"),
    ] {
        let (status, answer) = admin.patch(&one, &json!({ "spec": spec })).await;
        assert!(status == 422 && message(&answer).contains(why), "{spec}: {answer}");
    }
    let (status, shrunk) = admin.patch(&one, &json!({ "spec": { "ipFamilyPolicy": "SingleStack" } })).await;
    assert_eq!((status, &shrunk["spec"]["ipFamilies"]), (200, &json!(["IPv4"])));
    assert_eq!(shrunk["spec"]["clusterIPs"], json!([shrunk["spec"]["clusterIP"]]));
    assert!(!locks(&admin).await.contains(&second), "the second address is free again");
}

#[tokio::test]
async fn a_cluster_learns_a_second_family_while_it_runs() {
    let api = server().await;
    let admin = Client::admin(&api);
    admin.create(SERVICES, &service("early", json!({ "ipFamilyPolicy": "PreferDualStack" }))).await;
    let range = format!("{RANGES}/kubernetes");
    let (status, answer) =
        admin.patch(&range, &json!({ "spec": { "cidrs": ["10.97.0.0/16", "fd00::/112"] } })).await;
    assert_eq!(status, 422, "the first range stays: {answer}");
    let (status, grown) =
        admin.patch(&range, &json!({ "spec": { "cidrs": ["10.96.0.0/16", "fd00::/112"] } })).await;
    assert_eq!(status, 200, "{grown}");
    let made =
        admin.create(SERVICES, &service("late", json!({ "ipFamilyPolicy": "RequireDualStack" }))).await;
    assert_eq!(made["spec"]["clusterIPs"][1], "fd00::101");
    let (_, early) =
        admin.patch(&format!("{SERVICES}/early"), &json!({ "metadata": { "labels": { "x": "y" } } })).await;
    assert_eq!(early["spec"]["ipFamilies"], json!(["IPv4"]), "nobody asked it to change");
}

#[tokio::test]
async fn addresses_come_from_every_range_that_is_ready() {
    let api = server_with("10.96.0.0/28").await;
    let admin = Client::admin(&api);
    // 14 usable, one is the API server's.
    for i in 0..13 {
        admin.create(SERVICES, &service(&format!("s{i}"), json!({}))).await;
    }
    let (status, answer) = admin.post(SERVICES, &service("full", json!({}))).await;
    assert_eq!((status, message(&answer).contains("range is full")), (500, true), "{answer}");
    let more = json!({ "metadata": { "name": "more" }, "spec": { "cidrs": ["10.99.0.0/24"] } });
    let made = admin.create(RANGES, &more).await;
    assert_eq!(admin.post(SERVICES, &service("full", json!({}))).await.0, 500, "not ready yet: {made}");
    let ready = |status: &str| {
        json!({ "status": { "conditions": [{ "type": "Ready", "status": status, "reason": "x", "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z" }] } })
    };
    let path = format!("{RANGES}/more/status");
    assert_eq!(admin.patch(&path, &ready("True")).await.0, 200);
    let made = admin.create(SERVICES, &service("more", json!({}))).await;
    assert_eq!(made["spec"]["clusterIP"], "10.99.0.17");
    admin.create(SERVICES, &service("asked", json!({ "clusterIP": "10.99.0.3" }))).await;
    admin.patch(&path, &ready("False")).await;
    assert_eq!(admin.post(SERVICES, &service("none", json!({}))).await.0, 500);
}

#[tokio::test]
async fn services_change_their_type_and_what_belongs_to_it() {
    let api = server().await;
    let admin = Client::admin(&api);
    let path = format!("{SERVICES}/s");
    admin
        .create(SERVICES, &service("s", json!({ "type": "ExternalName", "externalName": "example.org" })))
        .await;
    let step = async |spec: Value| {
        let (status, answer) = admin.patch(&path, &json!({ "spec": spec })).await;
        assert_eq!(status, 200, "{spec}: {answer}");
        answer["spec"].clone()
    };
    let spec = step(json!({ "type": "ClusterIP", "externalName": null })).await;
    assert!(spec["clusterIP"].as_str().expect("an address").starts_with("10.96."), "{spec}");
    let spec = step(json!({ "type": "NodePort" })).await;
    let number = spec["ports"][0]["nodePort"].as_i64().expect("a port");
    let spec = step(json!({ "ports": [{ "port": 81, "protocol": "TCP", "targetPort": 80 }] })).await;
    assert_eq!(spec["ports"][0]["nodePort"], number, "the port is the one of the same name");
    let spec = step(json!({ "type": "LoadBalancer", "externalTrafficPolicy": "Local" })).await;
    assert_eq!(spec["ports"][0]["nodePort"], number);
    let health = spec["healthCheckNodePort"].as_i64().expect("a port for health checks");
    let taken = json!({ "type": "NodePort", "ports": [{ "port": 1, "nodePort": health }] });
    assert_eq!(admin.post(SERVICES, &service("t", taken.clone())).await.0, 422);
    let spec = step(json!({ "type": "ClusterIP" })).await;
    for gone in ["healthCheckNodePort", "externalTrafficPolicy", "allocateLoadBalancerNodePorts"] {
        assert_eq!(spec[gone], Value::Null, "{gone}");
    }
    assert_eq!(spec["ports"][0]["nodePort"], Value::Null);
    assert_eq!(admin.post(SERVICES, &service("t", taken)).await.0, 201, "its ports are free");
    let spec = step(json!({ "type": "ExternalName", "externalName": "example.org" })).await;
    for gone in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
        assert_eq!(spec[gone], Value::Null, "{gone}");
    }
    assert_eq!(locks(&admin).await.len(), 2, "the API server's and t's");
}
