//! Roll-outs against an in-memory API in which a small "kubelet" makes pods ready and ends deleted ones.

use super::*;
use crate::harness::{Harness, run_kubelet};
use k8s_openapi::api::core::v1::Event;
use knarr_client::testing::Faults;
use serde_json::{Value, json};
use std::time::Duration;

fn deployment(replicas: i32, image: &str, strategy: Value) -> Value {
    json!({
        "metadata": {"name": "web", "annotations": {"kubernetes.io/change-cause": format!("image {image}")}},
        "spec": {
            "replicas": replicas, "progressDeadlineSeconds": 600, "strategy": strategy,
            "selector": {"matchLabels": {"app": "web"}},
            "template": {
                "metadata": {"labels": {"app": "web"}},
                "spec": {"containers": [{"name": "c", "image": image}]},
            },
        },
    })
}

fn rolling(surge: i32, unavailable: i32) -> Value {
    json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}})
}

fn is_done(deployments: &[Deployment]) -> bool {
    deployments.iter().all(|deployment| {
        let status = deployment.status.clone().unwrap_or_default();
        status::is_complete(deployment, &status)
            && status::find(deployment, "Progressing")
                .is_some_and(|condition| condition.reason.as_deref() == Some("NewReplicaSetAvailable"))
    })
}

#[tokio::test(start_paused = true)]
async fn a_rolling_update_keeps_within_surge_and_availability_whatever_goes_wrong() {
    for seed in 0..12 {
        let faults = Faults { conflict: 0.1, error: 0.05, drop_watch: 0.2, duplicate: 0.2 };
        let harness = Harness::new(seed, faults);
        harness.start(start);
        harness.start(crate::replicaset::start);
        run_kubelet(&harness);
        let (surge, unavailable) = [(1, 0), (0, 1), (2, 1), (3, 3)][seed as usize % 4];
        harness.create::<Deployment>(deployment(6, "a", rolling(surge, unavailable))).await;
        harness.api.wait_for::<Deployment>("the first roll-out", is_done).await;
        let template = json!({"spec": {"template": {"spec": {"containers": [{"name": "c", "image": "b"}]}}}});
        harness.patch::<Deployment>("web", template).await;
        // The wish never exceeds the surge; pods on their way out may linger beside it, as upstream.
        let wished = |sets: &[ReplicaSet]| {
            let sum: i32 = sets.iter().map(crate::replicaset::replicas).sum();
            assert!(sum <= 6 + surge, "seed {seed}: {sum} wished, surge {surge}");
            let new = |set: &&ReplicaSet| annotations::revision(set) == 2;
            sets.iter().find(new).is_some_and(|set| crate::replicaset::replicas(set) == 6) && sum == 6
        };
        let available = |pods: &[Pod]| {
            let ready = pods.iter().filter(|pod| pods::is_active(pod) && pods::is_ready(pod)).count();
            assert!(
                ready >= 6 - unavailable as usize,
                "seed {seed}: {ready} ready, unavailable {unavailable}"
            );
            let new = |pod: &Pod| pod.spec.as_ref().unwrap().containers[0].image.as_deref() == Some("b");
            pods.len() == 6 && pods.iter().all(new)
        };
        let sets = harness.api.wait_for::<ReplicaSet>("the new set at full size", wished);
        futures::future::join(sets, harness.api.wait_for::<Pod>("only new pods", available)).await;
        harness.api.wait_for::<Deployment>("the second roll-out", is_done).await;
        harness.api.set_faults(Faults::default());
        harness.assert_quiet().await;
    }
}

#[tokio::test(start_paused = true)]
async fn recreate_never_runs_old_and_new_pods_together() {
    let harness = Harness::quiet();
    harness.start(start);
    harness.start(crate::replicaset::start);
    run_kubelet(&harness);
    harness.create::<Deployment>(deployment(3, "a", json!({"type": "Recreate"}))).await;
    harness.api.wait_for::<Deployment>("the first roll-out", is_done).await;
    let template = json!({"spec": {"template": {"spec": {"containers": [{"name": "c", "image": "b"}]}}}});
    harness.patch::<Deployment>("web", template).await;
    let apart = |pods: &[Pod]| {
        let images: std::collections::BTreeSet<_> =
            pods.iter().map(|pod| pod.spec.as_ref().unwrap().containers[0].image.clone()).collect();
        assert!(images.len() <= 1, "old and new pods together");
        pods.len() == 3 && images.contains(&Some("b".to_owned()))
    };
    harness.api.wait_for::<Pod>("3 new pods", apart).await;
    harness.api.wait_for::<Deployment>("the second roll-out", is_done).await;
    harness.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn going_back_to_an_old_template_reuses_its_set_under_a_new_revision() {
    let harness = Harness::quiet();
    harness.start(start);
    harness.start(crate::replicaset::start);
    run_kubelet(&harness);
    harness.create::<Deployment>(deployment(2, "a", rolling(1, 0))).await;
    for image in ["b", "a"] {
        harness.api.wait_for::<Deployment>("a roll-out", is_done).await;
        let template =
            json!({"spec": {"template": {"spec": {"containers": [{"name": "c", "image": image}]}}}});
        harness.patch::<Deployment>("web", template).await;
    }
    harness.api.wait_for::<Deployment>("the rollback", is_done).await;
    let sets = harness.api.objects::<ReplicaSet>();
    assert_eq!(sets.len(), 2);
    let current = sets.iter().find(|set| crate::replicaset::replicas(set) == 2).unwrap();
    assert_eq!(annotations::get(&current.metadata, REVISION), Some("3"));
    assert_eq!(annotations::get(&current.metadata, "deployment.kubernetes.io/revision-history"), Some("1"));
    assert_eq!(annotations::get(&current.metadata, "kubernetes.io/change-cause"), Some("image a"));
    let deployment = &harness.api.objects::<Deployment>()[0];
    assert_eq!(annotations::get(&deployment.metadata, REVISION), Some("3"));
}

#[tokio::test(start_paused = true)]
async fn a_stuck_rollout_exceeds_its_deadline_and_says_so_once() {
    let harness = Harness::quiet();
    harness.start(start);
    harness.start(crate::replicaset::start);
    harness.create::<Deployment>(deployment(1, "a", rolling(1, 0))).await;
    let stuck = |deployments: &[Deployment]| {
        deployments.iter().any(|deployment| {
            status::find(deployment, "Progressing")
                .is_some_and(|condition| condition.reason.as_deref() == Some("ProgressDeadlineExceeded"))
        })
    };
    let start = tokio::time::Instant::now();
    let deployments = harness.api.wait_for::<Deployment>("the deadline", stuck).await;
    assert!(start.elapsed() >= Duration::from_secs(600) && start.elapsed() < Duration::from_secs(610));
    let condition = status::find(&deployments[0], "Progressing").unwrap();
    assert_eq!(condition.status, "False");
    assert!(condition.message.as_deref().unwrap().ends_with("has timed out progressing."));
    harness.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn scaling_in_the_middle_of_a_rollout_spreads_in_proportion() {
    let harness = Harness::quiet();
    harness.start(start);
    harness.start(crate::replicaset::start);
    harness.create::<Deployment>(deployment(10, "a", rolling(5, 2))).await;
    let pods = harness.api.wait_for::<Pod>("10 pods", |pods| pods.len() == 10).await;
    for pod in &pods {
        harness.make_ready(pod.metadata.name.as_deref().unwrap()).await;
    }
    harness.api.wait_for::<Deployment>("the first roll-out", is_done).await;
    let template = json!({"spec": {"template": {"spec": {"containers": [{"name": "c", "image": "b"}]}}}});
    harness.patch::<Deployment>("web", template).await;
    let sizes = |sets: &[ReplicaSet]| {
        let mut sizes: Vec<i32> = sets.iter().map(crate::replicaset::replicas).collect();
        sizes.sort_unstable();
        sizes
    };
    // 15 pods in all: 8 old ones (at least 8 must be available) and 7 new ones.
    harness.api.wait_for::<ReplicaSet>("8 and 7", |sets| sizes(sets) == [7, 8]).await;
    harness.api.settle(Duration::from_secs(5)).await;
    harness.patch::<Deployment>("web", json!({"spec": {"replicas": 20}})).await;
    // 25 allowed: 10 more, in proportion 8 : 7.
    harness.api.wait_for::<ReplicaSet>("13 and 12", |sets| sizes(sets) == [12, 13]).await;
    let events = harness.api.wait_for::<Event>("the event", |events| {
        events
            .iter()
            .any(|event| event.message.as_deref().is_some_and(|message| message.ends_with("from 8 to 13")))
    });
    events.await;
}

#[tokio::test(start_paused = true)]
async fn history_beyond_its_limit_is_deleted() {
    let harness = Harness::quiet();
    harness.start(start);
    harness.start(crate::replicaset::start);
    run_kubelet(&harness);
    let mut object = deployment(1, "0", rolling(1, 0));
    object["spec"]["revisionHistoryLimit"] = json!(2);
    harness.create::<Deployment>(object).await;
    for image in 1..6 {
        harness.api.wait_for::<Deployment>("a roll-out", is_done).await;
        let containers = json!([{"name": "c", "image": image.to_string()}]);
        let template = json!({"spec": {"template": {"spec": {"containers": containers}}}});
        harness.patch::<Deployment>("web", template).await;
    }
    harness.api.wait_for::<Deployment>("the last roll-out", is_done).await;
    harness.api.wait_for::<ReplicaSet>("the new and two old sets", |sets| sets.len() == 3).await;
    harness.assert_quiet().await;
}
