//! Daemons on nodes of an in-memory API, with a small kubelet.

use super::*;
use crate::harness::{Harness, run_kubelet};
use knarr_client::testing::Faults;
use serde_json::{Value, json};

fn daemon(image: &str, strategy: Value) -> Value {
    json!({
        "metadata": {"name": "agent"},
        "spec": {
            "selector": {"matchLabels": {"app": "agent"}}, "updateStrategy": strategy,
            "template": {
                "metadata": {"labels": {"app": "agent"}},
                "spec": {"containers": [{"name": "c", "image": image}], "nodeSelector": {"os": "linux"}},
            },
        },
    })
}

async fn node(harness: &Harness, name: &str, os: &str, taint: Option<&str>) {
    let taints: Vec<Value> = taint.iter().map(|key| json!({"key": key, "effect": "NoSchedule"})).collect();
    let node = json!({"metadata": {"name": name, "labels": {"os": os}}, "spec": {"taints": taints}});
    harness.create_global::<Node>(node).await;
}

fn image(pod: &Pod) -> &str {
    pod.spec.as_ref().unwrap().containers[0].image.as_deref().unwrap()
}

fn nodes(pods: &[Pod]) -> Vec<String> {
    let mut nodes: Vec<_> = pods.iter().filter_map(placement::target_node).collect();
    nodes.sort();
    nodes
}

#[tokio::test(start_paused = true)]
async fn every_suitable_node_has_one_pod_and_new_nodes_get_theirs() {
    for seed in 0..8 {
        let harness =
            Harness::new(seed, Faults { conflict: 0.1, error: 0.1, drop_watch: 0.2, duplicate: 0.3 });
        harness.start(start);
        run_kubelet(&harness);
        node(&harness, "n1", "linux", None).await;
        node(&harness, "n2", "linux", Some("node.kubernetes.io/unschedulable")).await;
        node(&harness, "n3", "linux", Some("dedicated")).await;
        node(&harness, "n4", "windows", None).await;
        harness.create::<DaemonSet>(daemon("a", json!(null))).await;
        harness.api.wait_for::<Pod>("n1 and n2", |pods| nodes(pods) == ["n1", "n2"]).await;
        node(&harness, "n5", "linux", None).await;
        harness.api.wait_for::<Pod>("n5 too", |pods| nodes(pods) == ["n1", "n2", "n5"]).await;
        let counted = |sets: &[DaemonSet]| {
            let status = sets[0].status.clone().unwrap_or_default();
            (status.desired_number_scheduled, status.number_ready, status.updated_number_scheduled)
                == (3, 3, Some(3))
        };
        harness.api.wait_for::<DaemonSet>("the status", counted).await;
        harness.api.set_faults(Faults::default());
        harness.assert_quiet().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_rolling_update_takes_down_one_node_at_a_time() {
    for seed in 0..8 {
        let harness =
            Harness::new(seed, Faults { conflict: 0.1, error: 0.1, drop_watch: 0.2, duplicate: 0.3 });
        harness.start(start);
        run_kubelet(&harness);
        for i in 0..5 {
            node(&harness, &format!("n{i}"), "linux", None).await;
        }
        harness.create::<DaemonSet>(daemon("a", json!(null))).await;
        let ready =
            |pods: &[Pod]| pods.iter().filter(|pod| pods::is_active(pod) && pods::is_ready(pod)).count();
        harness.api.wait_for::<Pod>("5 ready pods", |pods| ready(pods) == 5).await;
        let template = json!({"spec": {"template": {"spec": {"containers": [{"name": "c", "image": "b"}]}}}});
        harness.patch::<DaemonSet>("agent", template).await;
        let rolled = |pods: &[Pod]| {
            assert!(ready(pods) >= 4, "seed {seed}: {} ready", ready(pods));
            pods.len() == 5 && pods.iter().all(|pod| image(pod) == "b") && ready(pods) == 5
        };
        harness.api.wait_for::<Pod>("5 new pods", rolled).await;
        harness.api.set_faults(Faults::default());
        harness.assert_quiet().await;
        assert_eq!(harness.api.objects::<ControllerRevision>().len(), 2);
    }
}

#[tokio::test(start_paused = true)]
async fn a_surging_update_never_leaves_a_node_without_a_ready_pod() {
    let harness = Harness::quiet();
    harness.start(start);
    run_kubelet(&harness);
    for i in 0..4 {
        node(&harness, &format!("n{i}"), "linux", None).await;
    }
    let strategy = json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 2, "maxUnavailable": 0}});
    harness.create::<DaemonSet>(daemon("a", strategy)).await;
    let ready = |pods: &[Pod]| pods.iter().filter(|pod| pods::is_active(pod) && pods::is_ready(pod)).count();
    harness.api.wait_for::<Pod>("4 ready pods", |pods| ready(pods) == 4).await;
    let template = json!({"spec": {"template": {"spec": {"containers": [{"name": "c", "image": "b"}]}}}});
    harness.patch::<DaemonSet>("agent", template).await;
    let rolled = |pods: &[Pod]| {
        assert!(ready(pods) >= 4);
        let active = pods.iter().filter(|pod| pods::is_active(pod)).count();
        assert!(active <= 6, "{active} pods with a surge of 2");
        pods.len() == 4 && pods.iter().all(|pod| image(pod) == "b")
    };
    harness.api.wait_for::<Pod>("4 new pods", rolled).await;
    harness.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_template_that_changes_during_a_surge_makes_no_third_pod() {
    let harness = Harness::quiet();
    harness.start(start);
    node(&harness, "n1", "linux", None).await;
    let strategy = json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}});
    harness.create::<DaemonSet>(daemon("a", strategy)).await;
    let images = |pods: &[Pod]| {
        let mut images: Vec<_> = pods.iter().filter(|pod| pods::is_active(pod)).map(image).collect();
        images.sort();
        assert!(images.len() <= 2, "{images:?} on one node");
        images.concat()
    };
    let first = harness.api.wait_for::<Pod>("the first", |pods| images(pods) == "a").await;
    harness.make_ready(first[0].metadata.name.as_deref().unwrap()).await;
    for (next, both) in [("b", "ab"), ("c", "ac")] {
        let template =
            json!({"spec": {"template": {"spec": {"containers": [{"name": "c", "image": next}]}}}});
        harness.patch::<DaemonSet>("agent", template).await;
        harness.api.wait_for::<Pod>(both, |pods| images(pods) == both).await;
    }
}

#[tokio::test(start_paused = true)]
async fn on_delete_waits_for_the_user() {
    let harness = Harness::quiet();
    harness.start(start);
    run_kubelet(&harness);
    node(&harness, "n1", "linux", None).await;
    harness.create::<DaemonSet>(daemon("a", json!({"type": "OnDelete"}))).await;
    harness.api.wait_for::<Pod>("a pod", |pods| pods.len() == 1).await;
    let template = json!({"spec": {"template": {"spec": {"containers": [{"name": "c", "image": "b"}]}}}});
    harness.patch::<DaemonSet>("agent", template).await;
    harness.api.settle(Duration::from_secs(60)).await;
    let pods = harness.api.objects::<Pod>();
    assert_eq!(image(&pods[0]), "a");
    harness.delete::<Pod>(pods[0].metadata.name.as_deref().unwrap()).await;
    harness.api.wait_for::<Pod>("the new pod", |pods| pods.len() == 1 && image(&pods[0]) == "b").await;
}
