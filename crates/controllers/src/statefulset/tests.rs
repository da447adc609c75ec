use super::*;
use crate::harness::{Harness, run_kubelet};
use knarr_client::testing::Faults;
use serde_json::Value;

fn set(replicas: i32, more: Value) -> Value {
    let mut set = json!({
        "metadata": {"name": "web"},
        "spec": {
            "replicas": replicas,
            "serviceName": "web",
            "selector": {"matchLabels": {"app": "web"}},
            "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "c", "image": "a"}]}},
        },
    });
    for (name, value) in more.as_object().unwrap() {
        set["spec"][name] = value.clone();
    }
    set
}

fn names(pods: &[Pod]) -> Vec<&str> {
    let mut names: Vec<_> = pods.iter().filter_map(|pod| pod.metadata.name.as_deref()).collect();
    names.sort_unstable();
    names
}

fn all_ready(count: usize) -> impl Fn(&[Pod]) -> bool {
    move |pods: &[Pod]| pods.len() == count && pods.iter().all(pods::is_ready)
}

#[tokio::test(start_paused = true)]
async fn pods_come_in_order_and_go_in_reverse_under_faults() {
    for seed in 0..10 {
        let faults = Faults { conflict: 0.2, error: 0.1, drop_watch: 0.3, duplicate: 0.3 };
        let harness = Harness::new(seed, faults);
        harness.start(start);
        run_kubelet(&harness);
        harness.create::<StatefulSet>(set(3, json!({}))).await;
        let in_order = |pods: &[Pod]| {
            // Whoever is there has all before it, ready.
            for (place, name) in names(pods).iter().enumerate() {
                assert_eq!(*name, format!("web-{place}"), "seed {seed}");
            }
            all_ready(3)(pods)
        };
        harness.api.wait_for::<Pod>("3 pods", in_order).await;
        harness.patch::<StatefulSet>("web", json!({"spec": {"replicas": 1}})).await;
        harness.api.wait_for::<Pod>("1 pod", |pods| names(pods) == ["web-0"]).await;
        harness.api.set_faults(Faults::default());
        harness.assert_quiet().await;
        let status = harness.api.objects::<StatefulSet>()[0].status.clone().unwrap();
        assert_eq!((status.replicas, status.ready_replicas), (1, Some(1)));
        assert_eq!(status.current_revision, status.update_revision);
    }
}

#[tokio::test(start_paused = true)]
async fn an_update_replaces_one_pod_at_a_time_from_the_end_and_a_rollback_reuses_its_revision() {
    let harness = Harness::quiet();
    harness.start(start);
    run_kubelet(&harness);
    harness.create::<StatefulSet>(set(3, json!({}))).await;
    harness.api.wait_for::<Pod>("3 pods", all_ready(3)).await;
    let image = |image: &str| json!({"spec": {"template": {"spec": {"containers": [{"name": "c", "image": image}]}}}});
    let of = |pods: &[Pod], image: &str| {
        pods.iter()
            .filter(|pod| pod.spec.as_ref().unwrap().containers[0].image.as_deref() == Some(image))
            .count()
    };
    harness.patch::<StatefulSet>("web", image("b")).await;
    let at_most_one_missing = |pods: &[Pod]| {
        assert!(pods.iter().filter(|pod| pods::is_ready(pod)).count() >= 2, "one at a time");
        all_ready(3)(pods) && of(pods, "b") == 3
    };
    harness.api.wait_for::<Pod>("all of the new image", at_most_one_missing).await;
    harness.patch::<StatefulSet>("web", image("a")).await;
    harness
        .api
        .wait_for::<Pod>("all of the old image", |pods| all_ready(3)(pods) && of(pods, "a") == 3)
        .await;
    harness.assert_quiet().await;
    let revisions = harness.api.objects::<ControllerRevision>();
    assert_eq!(revisions.len(), 2, "the first template's revision was found again");
    assert_eq!(revisions.iter().map(|revision| revision.revision).max(), Some(3));
}

#[tokio::test(start_paused = true)]
async fn below_the_partition_the_old_template_is_kept_even_by_new_pods() {
    let harness = Harness::quiet();
    harness.start(start);
    run_kubelet(&harness);
    let strategy = json!({"type": "RollingUpdate", "rollingUpdate": {"partition": 2}});
    harness.create::<StatefulSet>(set(3, json!({"updateStrategy": strategy}))).await;
    harness.api.wait_for::<Pod>("3 pods", all_ready(3)).await;
    let change = json!({"spec": {"template": {"spec": {"containers": [{"name": "c", "image": "b"}]}}}});
    harness.patch::<StatefulSet>("web", change).await;
    let images = |pods: &[Pod]| -> Vec<String> {
        let mut pods = pods.to_vec();
        pods.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
        pods.iter().map(|pod| pod.spec.as_ref().unwrap().containers[0].image.clone().unwrap()).collect()
    };
    harness
        .api
        .wait_for::<Pod>("the last is new", |pods| all_ready(3)(pods) && images(pods) == ["a", "a", "b"])
        .await;
    harness.delete::<Pod>("web-0").await;
    harness.api.wait_for::<Pod>("the first is gone", |pods| pods.len() == 2).await;
    harness
        .api
        .wait_for::<Pod>("the first is back, and old", |pods| {
            all_ready(3)(pods) && images(pods) == ["a", "a", "b"]
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn each_pod_has_its_claims_and_the_policy_says_whom_they_go_with() {
    let harness = Harness::quiet();
    harness.start(start);
    run_kubelet(&harness);
    let spec = json!({
        "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": {"accessModes": ["ReadWriteOnce"]}}],
        "persistentVolumeClaimRetentionPolicy": {"whenDeleted": "Delete", "whenScaled": "Delete"},
    });
    harness.create::<StatefulSet>(set(2, spec)).await;
    let pods = harness.api.wait_for::<Pod>("2 pods", all_ready(2)).await;
    let volume = &pods[1].spec.as_ref().unwrap().volumes.as_ref().unwrap()[0];
    assert_eq!(volume.persistent_volume_claim.as_ref().unwrap().claim_name, "data-web-1");
    let owner_of = |claims: &[PersistentVolumeClaim], name: &str| {
        let claim = claims.iter().find(|claim| claim.metadata.name.as_deref() == Some(name))?;
        Some(claim.metadata.owner_references.as_ref()?.first()?.kind.clone())
    };
    let claimed =
        |claims: &[PersistentVolumeClaim]| owner_of(claims, "data-web-1").as_deref() == Some("StatefulSet");
    harness.api.wait_for::<PersistentVolumeClaim>("the set owns its claims", claimed).await;
    harness.patch::<StatefulSet>("web", json!({"spec": {"replicas": 1}})).await;
    let leaves = |claims: &[PersistentVolumeClaim]| owner_of(claims, "data-web-1").as_deref() == Some("Pod");
    harness.api.wait_for::<PersistentVolumeClaim>("the pod takes its claim along", leaves).await;
    let claims = harness.api.objects::<PersistentVolumeClaim>();
    assert_eq!(owner_of(&claims, "data-web-0").as_deref(), Some("StatefulSet"));
}

/// Found by the simulator: the garbage collector deleted the revisions of a set in foreground deletion, and the loop
/// made them again, without end.
#[tokio::test(start_paused = true)]
async fn a_set_that_is_being_deleted_makes_no_revision() {
    let harness = Harness::quiet();
    let mut object = set(1, json!({}));
    object["metadata"]["finalizers"] = json!(["foregroundDeletion"]);
    harness.create::<StatefulSet>(object).await;
    harness.delete::<StatefulSet>("web").await;
    harness.start(start);
    harness.api.settle(std::time::Duration::from_secs(5)).await;
    assert_eq!(harness.api.objects::<ControllerRevision>(), []);
    assert_eq!(harness.api.objects::<Pod>(), []);
}
