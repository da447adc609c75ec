//! All loops together.

use super::*;
use crate::harness::{Harness, NAMESPACE, run_kubelet};
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use knarr_client::leader::Election;
use knarr_client::testing::Faults;
use kube::api::{Api, DeleteParams};
use serde_json::json;
use std::time::Duration;

fn start_all(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    Box::pin(ControllerManager::run_with(context, shutdown))
}

fn deployment() -> serde_json::Value {
    json!({
        "metadata": {"name": "web"},
        "spec": {
            "replicas": 3, "selector": {"matchLabels": {"app": "web"}},
            "template": {
                "metadata": {"labels": {"app": "web"}},
                "spec": {"nodeName": "n1", "containers": [{"name": "c"}]},
            },
        },
    })
}

/// Reports addresses and readiness for pods, as a kubelet would.
async fn make_all_ready(harness: &Harness) {
    for (index, pod) in harness.api.objects::<Pod>().iter().enumerate() {
        let ready =
            json!([{"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}]);
        let status = json!({"phase": "Running", "podIP": format!("10.0.0.{index}"), "conditions": ready});
        harness.patch_status::<Pod>(pod.metadata.name.as_deref().unwrap(), status).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_namespace_lives_and_dies_with_all_loops_running() {
    for seed in 0..4 {
        let harness =
            Harness::new(seed, Faults { conflict: 0.1, error: 0.05, drop_watch: 0.1, duplicate: 0.2 });
        harness.start(start_all);
        let node = json!({
            "metadata": {"name": "n1"}, "status": {"conditions": [{"type": "Ready", "status": "True"}]},
        });
        harness.create_global::<Node>(node).await;
        harness.create_global::<Namespace>(json!({"metadata": {"name": NAMESPACE}})).await;
        harness.api.wait_for::<ServiceAccount>("the account", |accounts| !accounts.is_empty()).await;
        harness.api.wait_for::<ConfigMap>("the root CA", |maps| !maps.is_empty()).await;
        let service = json!({"metadata": {"name": "web"}, "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]}});
        harness.create::<Service>(service).await;
        harness.create::<Deployment>(deployment()).await;
        harness.api.wait_for::<Pod>("3 pods", |pods| pods.len() == 3).await;
        make_all_ready(&harness).await;
        let listed = |slices: &[EndpointSlice]| {
            slices.iter().map(|slice| slice.endpoints.as_ref().map_or(0, Vec::len)).sum::<usize>() == 3
        };
        harness.api.wait_for::<EndpointSlice>("3 endpoints", listed).await;
        run_kubelet(&harness);
        let namespaces: Api<Namespace> = Api::all(harness.client());
        while namespaces.delete(NAMESPACE, &DeleteParams::default()).await.is_err() {}
        harness.api.wait_for::<Namespace>("no namespace", |namespaces| namespaces.is_empty()).await;
        assert!(harness.api.objects::<Pod>().is_empty());
        assert!(harness.api.objects::<ReplicaSet>().is_empty());
        assert!(harness.api.objects::<EndpointSlice>().is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_cluster_writes_nothing() {
    let harness = Harness::quiet();
    harness.start(start_all);
    harness.create_global::<Namespace>(json!({"metadata": {"name": NAMESPACE}})).await;
    harness.create::<Deployment>(deployment()).await;
    harness.api.wait_for::<Pod>("3 pods", |pods| pods.len() == 3).await;
    harness.api.settle(Duration::from_secs(30)).await;
    harness.api.take_writes();
    // Within pod GC's quarantine: the node of these pods is never made.
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(harness.api.take_writes().is_empty());
}

/// A process with all loops that stands for election. Aborting it is a crash: the lease is not given back.
fn candidate(harness: &Harness, name: &str) -> tokio::task::JoinHandle<()> {
    let election = Election::new("kube-system", "kube-controller-manager", name);
    let config = Config { election: Some(election), ..Config::default() };
    let context = Context::new(harness.client(), config, harness.context.clock.clone());
    tokio::spawn(ControllerManager::run_with(context, CancellationToken::new()))
}

fn led_by<'a>(name: &'a str, transitions: i32) -> impl Fn(&[Lease]) -> bool + 'a {
    move |leases| {
        leases.iter().filter_map(|lease| lease.spec.as_ref()).any(|spec| {
            spec.holder_identity.as_deref() == Some(name) && spec.lease_transitions == Some(transitions)
        })
    }
}

async fn deploy(harness: &Harness, name: &str) {
    let mut deployment = deployment();
    deployment["metadata"]["name"] = json!(name);
    harness.create::<Deployment>(deployment).await;
}

/// How many deployments have their set.
fn sets(sets: &[ReplicaSet]) -> usize {
    sets.len()
}

#[tokio::test(start_paused = true)]
async fn when_the_leader_crashes_another_process_goes_on() {
    let harness = Harness::quiet();
    let first = candidate(&harness, "first");
    harness.api.wait_for::<Lease>("the first to lead", led_by("first", 0)).await;
    let second = candidate(&harness, "second");
    deploy(&harness, "a").await;
    harness.api.wait_for::<ReplicaSet>("the first's work", |all| sets(all) == 1).await;
    first.abort();
    let began = tokio::time::Instant::now();
    deploy(&harness, "b").await;
    harness.api.wait_for::<ReplicaSet>("the second's work", |all| sets(all) == 2).await;
    let took = began.elapsed().as_secs();
    assert!((11..=20).contains(&took), "when the lease is over, not after {took} s");
    harness.api.wait_for::<Lease>("the second to lead", led_by("second", 1)).await;
    second.abort();
}

#[tokio::test(start_paused = true)]
async fn loops_stop_when_leadership_is_lost_and_go_on_when_it_is_regained() {
    let harness = Harness::quiet();
    let only = candidate(&harness, "only");
    deploy(&harness, "a").await;
    harness.api.wait_for::<ReplicaSet>("its work", |all| sets(all) == 1).await;
    let api: Api<Lease> = Api::namespaced(harness.client(), "kube-system");
    let stolen =
        json!({"spec": {"holderIdentity": "thief", "renewTime": harness.context.clock.micro_time()}});
    api.patch("kube-controller-manager", &Default::default(), &kube::api::Patch::Merge(stolen))
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    deploy(&harness, "b").await;
    tokio::time::sleep(Duration::from_secs(8)).await;
    assert_eq!(sets(&harness.api.objects::<ReplicaSet>()), 1, "nobody leads who works");
    harness.api.wait_for::<ReplicaSet>("its work again", |all| sets(all) == 2).await;
    harness.api.wait_for::<Lease>("it to lead again", led_by("only", 1)).await;
    only.abort();
}
