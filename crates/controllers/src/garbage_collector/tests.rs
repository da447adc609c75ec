//! Ownership against an in-memory API, whatever gets lost.

use super::*;
use crate::harness::{Harness, NAMESPACE};
use k8s_openapi::api::core::v1::{ConfigMap, Event};
use knarr_client::testing::Faults;
use serde_json::Value;

fn faults() -> Faults {
    Faults { conflict: 0.2, error: 0.1, drop_watch: 0.2, duplicate: 0.3 }
}

async fn object(harness: &Harness, name: &str, owners: &[(&str, &str)]) -> String {
    let owners: Vec<Value> = owners
        .iter()
        .map(|(name, uid)| {
            json!({"apiVersion": "v1", "kind": "ConfigMap", "name": name, "uid": uid, "blockOwnerDeletion": true})
        })
        .collect();
    let object = json!({"metadata": {"name": name, "namespace": NAMESPACE, "ownerReferences": owners}});
    harness.create::<ConfigMap>(object).await.metadata.uid.unwrap()
}

async fn delete(harness: &Harness, name: &str, policy: PropagationPolicy) {
    let api = harness.api_of::<ConfigMap>();
    let params = DeleteParams { propagation_policy: Some(policy), ..Default::default() };
    while api
        .delete(name, &params)
        .await
        .is_err_and(|error| !matches!(error, kube::Error::Api(s) if s.code == 404))
    {}
}

fn names(objects: &[ConfigMap]) -> Vec<&str> {
    objects.iter().map(|object| object.metadata.name.as_deref().unwrap()).collect()
}

#[tokio::test(start_paused = true)]
async fn children_follow_their_owner_down_the_generations() {
    for (seed, policy) in
        (0..8).zip([PropagationPolicy::Background, PropagationPolicy::Foreground].into_iter().cycle())
    {
        let harness = Harness::new(seed, faults());
        harness.start(start);
        let parent = object(&harness, "parent", &[]).await;
        let child = object(&harness, "child", &[("parent", &parent)]).await;
        object(&harness, "grandchild", &[("child", &child)]).await;
        object(&harness, "stranger", &[]).await;
        let foreground = matches!(policy, PropagationPolicy::Foreground);
        delete(&harness, "parent", policy).await;
        let gone = |objects: &[ConfigMap]| {
            let names = names(objects);
            if foreground && names.contains(&"child") {
                assert!(names.contains(&"parent"), "the owner waits for its children");
            }
            names == ["stranger"]
        };
        harness.api.wait_for::<ConfigMap>("only the stranger", gone).await;
        harness.api.set_faults(Faults::default());
        harness.assert_quiet().await;
    }
}

#[tokio::test(start_paused = true)]
async fn orphaned_children_stay_and_lose_their_owner() {
    let harness = Harness::new(3, faults());
    harness.start(start);
    let parent = object(&harness, "parent", &[]).await;
    object(&harness, "child", &[("parent", &parent)]).await;
    harness.api.settle(Duration::from_secs(5)).await;
    delete(&harness, "parent", PropagationPolicy::Orphan).await;
    let free = |objects: &[ConfigMap]| {
        names(objects) == ["child"] && objects[0].metadata.owner_references.iter().flatten().next().is_none()
    };
    harness.api.wait_for::<ConfigMap>("a free child", free).await;
}

#[tokio::test(start_paused = true)]
async fn a_child_with_another_owner_stays_and_one_with_an_absent_owner_goes() {
    let harness = Harness::quiet();
    harness.start(start);
    let (first, second) = (object(&harness, "first", &[]).await, object(&harness, "second", &[]).await);
    object(&harness, "shared", &[("first", &first), ("second", &second)]).await;
    object(&harness, "lost", &[("never", "no-such-uid")]).await;
    delete(&harness, "first", PropagationPolicy::Background).await;
    let left = |objects: &[ConfigMap]| {
        names(objects) == ["second", "shared"]
            && objects[1].metadata.owner_references.as_ref().unwrap().len() == 1
    };
    harness.api.wait_for::<ConfigMap>("second and shared", left).await;
    harness.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn an_owner_in_another_namespace_counts_as_absent_and_that_is_told() {
    let harness = Harness::quiet();
    harness.start(start);
    let elsewhere: Api<ConfigMap> = Api::namespaced(harness.client(), "elsewhere");
    let owner = serde_json::from_value(json!({"metadata": {"name": "owner"}})).unwrap();
    let owner = elsewhere.create(&Default::default(), &owner).await.unwrap().metadata.uid.unwrap();
    harness.api.settle(Duration::from_secs(5)).await;
    object(&harness, "child", &[("owner", &owner)]).await;
    harness.api.wait_for::<ConfigMap>("the child gone", |objects| names(objects) == ["owner"]).await;
    let wanted = format!(
        "ownerRef [v1/ConfigMap, namespace: {NAMESPACE}, name: owner, uid: {owner}] does not exist in namespace \"{NAMESPACE}\""
    );
    let told = |events: &[Event]| {
        events.iter().any(|event| {
            event.reason.as_deref() == Some("OwnerRefInvalidNamespace")
                && event.involved_object.name.as_deref() == Some("child")
                && event.message.as_ref() == Some(&wanted)
        })
    };
    harness.api.wait_for::<Event>("the event", told).await;
}
