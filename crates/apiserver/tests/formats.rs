//! Bodies and answers in other forms than JSON, through the whole API server.

mod common;

use common::{get, post, send};
use knarr_api::protobuf;
use knarr_api::schema::Schema;
use serde_json::json;

const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";

#[tokio::test]
async fn objects_lists_errors_and_watches_are_protobuf_when_asked_for() {
    let api = common::server().await;
    let schema = Schema::builtin();
    let kind = schema.resource("", "v1", "configmaps").expect("served");
    let object =
        json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "a" }, "data": { "k": "v" } });
    let headers = [("content-type", PROTOBUF), ("accept", PROTOBUF)];
    let body = protobuf::encode(schema, kind.type_id, &object);
    let created = send(&api, "POST", "/api/v1/namespaces/default/configmaps", &headers, body).await;
    assert_eq!((created.status, created.header("content-type")), (201, PROTOBUF));
    let path = "/api/v1/namespaces/default/configmaps/a";
    let read = send(&api, "GET", path, &[("accept", PROTOBUF)], "").await;
    let decoded = protobuf::decode(schema, kind.type_id, &read.body).expect("protobuf");
    assert_eq!(decoded, get(&api, path).await.json());
    let list = send(&api, "GET", "/api/v1/configmaps", &[("accept", PROTOBUF)], "").await;
    assert_eq!(protobuf::envelope(&list.body).expect("protobuf").1, "ConfigMapList");
    let missing =
        send(&api, "GET", "/api/v1/namespaces/default/configmaps/b", &[("accept", PROTOBUF)], "").await;
    assert_eq!(
        (missing.status, protobuf::envelope(&missing.body).expect("protobuf").1.as_str()),
        (404, "Status")
    );
    let discovery = send(&api, "GET", "/apis/apps/v1", &[("accept", PROTOBUF)], "").await;
    assert_eq!(protobuf::envelope(&discovery.body).expect("protobuf").1, "APIResourceList");

    let watch = "/api/v1/namespaces/default/configmaps?watch=1&timeoutSeconds=1";
    let events =
        send(&api, "GET", watch, &[("accept", "application/vnd.kubernetes.protobuf;stream=watch")], "").await;
    assert_eq!(events.header("content-type"), "application/vnd.kubernetes.protobuf;stream=watch");
    let len = u32::from_be_bytes(events.body[..4].try_into().expect("four bytes")) as usize;
    assert_eq!(events.body.len(), 4 + len, "one event, of the one object");
    assert!(events.body[4..].starts_with(b"\x0a\x05ADDED"));
    let at = events.body.windows(4).position(|w| w == protobuf::MAGIC).expect("an embedded body");
    let (_, embedded, _) = protobuf::envelope(&events.body[at..]).expect("a body");
    assert_eq!(embedded, "ConfigMap");
}

#[tokio::test]
async fn forms_the_server_has_not_are_refused_in_upstreams_words() {
    let api = common::server().await;
    let wanted = [
        (
            "/api/v1/configmaps",
            "application/cbor",
            "application/json, application/yaml, application/vnd.kubernetes.protobuf",
        ),
        (
            "/api/v1/configmaps?watch=1",
            "application/yaml",
            "application/json;stream=watch, application/vnd.kubernetes.protobuf;stream=watch",
        ),
    ];
    for (path, accept, offered) in wanted {
        let refused = send(&api, "GET", path, &[("accept", accept)], "").await;
        let message = format!("only the following media types are accepted: {offered}");
        assert_eq!((refused.status, &refused.json()["message"]), (406, &json!(message)));
    }
    let cbor = send(
        &api,
        "POST",
        "/api/v1/namespaces/default/configmaps",
        &[("content-type", "application/cbor")],
        "x",
    )
    .await;
    assert_eq!((cbor.status, &cbor.json()["reason"]), (415, &json!("UnsupportedMediaType")));
    let message = "the body of the request was in an unknown format - accepted media types include: application/json, application/yaml, application/vnd.kubernetes.protobuf";
    assert_eq!(cbor.json()["message"], json!(message));
    let ok =
        post(&api, "/api/v1/namespaces/default/configmaps", &json!({ "metadata": { "name": "c" } })).await;
    assert_eq!(ok.status, 201);
}

#[tokio::test]
async fn large_answers_are_packed_for_clients_that_take_it() {
    let api = common::server().await;
    for n in 0..20 {
        let object = json!({ "metadata": { "name": format!("c{n}") }, "data": { "k": "v".repeat(10_000) } });
        assert_eq!(post(&api, "/api/v1/namespaces/default/configmaps", &object).await.status, 201);
    }
    let path = "/api/v1/namespaces/default/configmaps";
    let plain = get(&api, path).await;
    let packed = send(&api, "GET", path, &[("accept-encoding", "gzip, br")], "").await;
    assert_eq!(packed.header("content-encoding"), "gzip");
    assert!(packed.body.len() * 10 < plain.body.len());
    let mut unpacked = Vec::new();
    std::io::copy(&mut flate2::read::GzDecoder::new(&packed.body[..]), &mut unpacked).expect("gzip");
    assert_eq!(unpacked, plain.body);
    let small = send(&api, "GET", &format!("{path}/c1"), &[("accept-encoding", "gzip")], "").await;
    assert_eq!(small.header("content-encoding"), "");
}

#[tokio::test]
async fn requests_are_counted_under_upstreams_names() {
    let api = common::server().await;
    get(&api, "/api/v1/namespaces/default/configmaps/none").await;
    get(&api, "/api/v1/nonsense").await;
    let text = String::from_utf8(get(&api, "/metrics").await.body.to_vec()).expect("text");
    let labels = r#"component="apiserver",dry_run="",group="",resource="configmaps",scope="resource",subresource="",verb="GET",version="v1""#;
    assert!(text.contains(&format!("apiserver_request_total{{code=\"404\",{labels}}} ")), "{text}");
    assert!(text.contains(&format!("apiserver_request_duration_seconds_count{{{labels}}} ")), "{text}");
    assert!(text.contains("apiserver_current_inflight_requests{request_kind=\"readOnly\"} "), "{text}");
    assert!(!text.contains("nonsense"));
}

#[tokio::test]
async fn health_is_told_check_by_check() {
    let api = common::server().await;
    let text = |path: &'static str| {
        let api = &api;
        async move { String::from_utf8(get(api, path).await.body.to_vec()).expect("text") }
    };
    assert_eq!(text("/readyz").await, "ok");
    assert_eq!(text("/livez/etcd").await, "ok");
    assert_eq!(text("/livez/nothing").await, "404 page not found\n");
    assert_eq!(
        text("/livez?verbose&exclude=etcd&exclude=x").await,
        "[+]ping ok\n[+]log ok\n[+]etcd excluded: ok\nwarn: some health checks cannot be excluded: no matches for \"x\"\nlivez check passed\n"
    );
    assert!(text("/readyz?verbose").await.contains("[+]informer-sync ok\n"));
    let keys = get(&api, "/openid/v1/jwks").await;
    assert_eq!(keys.header("content-type"), "application/jwk-set+json");
    let about = get(&api, "/.well-known/openid-configuration").await.json();
    assert_eq!(about["jwks_uri"], "https://192.0.2.2:6443/openid/v1/jwks");
}
