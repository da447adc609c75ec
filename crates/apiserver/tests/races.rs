//! Writers that meet at one object: patches that name no version all land, those that name one land once.

mod common;

use common::{Client, racing_server};
use serde_json::json;

const MAP: &str = "/api/v1/namespaces/default/configmaps/shared";
const WRITERS: usize = 12;

async fn shared(admin: &Client<'_>) {
    let map = json!({ "metadata": { "name": "shared" }, "data": { "first": "v" } });
    admin.create("/api/v1/namespaces/default/configmaps", &map).await;
}

#[tokio::test]
async fn patches_that_name_no_version_all_land() {
    let api = racing_server().await;
    let admin = Client::admin(&api);
    for kind in ["merge-patch+json", "strategic-merge-patch+json", "json-patch+json", "apply-patch+yaml"] {
        shared(&admin).await;
        let patches = (0..WRITERS).map(|n| {
            let admin = &admin;
            async move {
                let key = format!("k{n}");
                let body = match kind {
                    "json-patch+json" => {
                        json!([{ "op": "add", "path": format!("/data/{key}"), "value": "v" }])
                    }
                    "apply-patch+yaml" => json!({ "apiVersion": "v1", "kind": "ConfigMap",
                        "metadata": { "name": "shared" }, "data": { key: "v" } }),
                    _ => json!({ "data": { key: "v" } }),
                };
                let headers = [("content-type", &*format!("application/{kind}"))];
                let path = format!("{MAP}?fieldManager=m{n}");
                admin.send("PATCH", &path, &headers, &body.to_string()).await
            }
        });
        for (status, answer) in futures::future::join_all(patches).await {
            assert_eq!(status, 200, "{kind}: {answer}");
        }
        let (_, map) = admin.get(MAP).await;
        assert_eq!(map["data"].as_object().map(|data| data.len()), Some(WRITERS + 1), "{kind}");
        admin.delete(MAP).await;
    }
}

#[tokio::test]
async fn of_patches_that_name_the_same_version_one_lands() {
    let api = racing_server().await;
    let admin = Client::admin(&api);
    shared(&admin).await;
    let (_, map) = admin.get(MAP).await;
    let version = map["metadata"]["resourceVersion"].clone();
    let patches = (0..WRITERS).map(|n| {
        let body = json!({ "metadata": { "resourceVersion": version }, "data": { format!("k{n}"): "v" } });
        let admin = &admin;
        async move { admin.patch(MAP, &body).await }
    });
    let answers = futures::future::join_all(patches).await;
    let landed = answers.iter().filter(|(status, _)| *status == 200).count();
    let refused = answers.iter().filter(|(status, _)| *status == 409).count();
    assert_eq!((landed, refused), (1, WRITERS - 1));
}
