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
