//! The whole scheduler against an in-memory API.

use super::*;
use k8s_openapi::api::core::v1::Event;
use knarr_client::testing::{FakeApi, Faults};
use kube::api::DeleteParams;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::Value;
use serde_json::json;
use tokio_util::sync::DropGuard;

struct Cluster {
    api: FakeApi,
    client: Client,
    _informers: Informers,
    _stop: DropGuard,
}

impl Cluster {
    fn new(seed: u64, faults: Faults) -> Self {
        let api = FakeApi::seeded(seed, faults);
        let client = api.client();
        let informers = Informers::new(client.clone());
        let clock = Clock::starting_at(jiff::Timestamp::now());
        let recorder = Recorder::new(client.clone(), clock.clone(), "test", "");
        let shutdown = CancellationToken::new();
        let scheduler = Scheduler::new(crate::Config::default(), &informers, &recorder, clock, seed);
        tokio::spawn(scheduler.run(shutdown.clone()));
        Cluster { api, client, _informers: informers, _stop: shutdown.drop_guard() }
    }

    async fn node(&self, name: &str, cpu: &str) {
        let node = json!({
            "metadata": {"name": name},
            "status": {"allocatable": {"cpu": cpu, "memory": "8Gi", "pods": "110"}},
        });
        let node: Node = serde_json::from_value(node).unwrap();
        let api: Api<Node> = Api::all(self.client.clone());
        while api.create(&PostParams::default(), &node).await.is_err() {}
    }

    async fn pod(&self, name: &str, cpu: &str, extra: Value) {
        let mut pod = json!({
            "metadata": {"name": name},
            "spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": cpu}}}]},
        });
        for (field, value) in extra.as_object().into_iter().flatten() {
            pod["spec"][field] = value.clone();
        }
        let pod: Pod = serde_json::from_value(pod).unwrap();
        let api: Api<Pod> = Api::namespaced(self.client.clone(), "ns");
        while api.create(&PostParams::default(), &pod).await.is_err() {}
    }
}

fn bound(pods: &[Pod]) -> usize {
    pods.iter().filter(|pod| node_of(pod).is_some()).count()
}

#[tokio::test(start_paused = true)]
async fn pods_are_bound_without_ever_overcommitting_a_node() {
    for seed in 0..10 {
        let faults = Faults { conflict: 0.1, error: 0.2, drop_watch: 0.2, duplicate: 0.3 };
        let cluster = Cluster::new(seed, faults);
        for name in ["n1", "n2", "n3"] {
            cluster.node(name, "4").await;
        }
        for i in 0..14 {
            cluster.pod(&format!("p{i}"), "1", json!({})).await;
        }
        let within = |pods: &[Pod]| {
            for node in ["n1", "n2", "n3"] {
                let there = pods.iter().filter(|pod| node_of(pod) == Some(node)).count();
                assert!(there <= 4, "{there} pods on {node}");
            }
            bound(pods) == 12
        };
        let pods = cluster.api.wait_for::<Pod>("12 bound pods", within).await;
        let victim = pods.iter().find(|pod| node_of(pod).is_some()).unwrap().metadata.name.clone().unwrap();
        let api: Api<Pod> = Api::namespaced(cluster.client.clone(), "ns");
        let params = DeleteParams::default().grace_period(0);
        while api
            .delete(&victim, &params)
            .await
            .is_err_and(|error| !matches!(error, kube::Error::Api(status) if status.code == 404))
        {}
        cluster.api.wait_for::<Pod>("the freed place taken", |pods| pods.len() == 13 && within(pods)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_pod_nobody_can_take_says_why_and_is_bound_when_a_node_comes() {
    let cluster = Cluster::new(1, Faults::default());
    cluster.node("small", "1").await;
    cluster.pod("big", "3", json!({})).await;
    let expected = "0/1 nodes are available: 1 Insufficient cpu. preemption: 0/1 nodes are available: 1 Preemption is \
                    not helpful for scheduling.";
    let told = |pods: &[Pod]| {
        let conditions = pods.iter().filter_map(|pod| pod.status.as_ref()?.conditions.as_ref()).flatten();
        conditions.into_iter().any(|condition| {
            condition.reason.as_deref() == Some("Unschedulable")
                && condition.message.as_deref() == Some(expected)
        })
    };
    cluster.api.wait_for::<Pod>("the condition", told).await;
    let with = |reason: &'static str, message: String| {
        move |events: &[Event]| {
            events.iter().any(|event| {
                event.reason.as_deref() == Some(reason) && event.message.as_deref() == Some(message.as_str())
            })
        }
    };
    cluster.api.wait_for::<Event>("the event", with("FailedScheduling", expected.to_owned())).await;
    cluster.node("large", "8").await;
    cluster.api.wait_for::<Pod>("the pod bound", |pods| bound(pods) == 1).await;
    let assigned = "Successfully assigned ns/big to large".to_owned();
    cluster.api.wait_for::<Event>("the event", with("Scheduled", assigned)).await;
}

#[tokio::test(start_paused = true)]
async fn gated_and_foreign_pods_are_left_alone() {
    let cluster = Cluster::new(1, Faults::default());
    cluster.node("n1", "8").await;
    cluster.pod("gated", "1", json!({"schedulingGates": [{"name": "wait"}]})).await;
    cluster.pod("foreign", "1", json!({"schedulerName": "other"})).await;
    cluster.pod("ours", "1", json!({})).await;
    cluster.api.wait_for::<Pod>("one pod bound", |pods| bound(pods) == 1).await;
    cluster.api.settle(std::time::Duration::from_secs(60)).await;
    assert_eq!(bound(&cluster.api.objects::<Pod>()), 1);
    let api: Api<Pod> = Api::namespaced(cluster.client.clone(), "ns");
    let open = json!({"spec": {"schedulingGates": null}});
    api.patch("gated", &PatchParams::default(), &Patch::Merge(open)).await.unwrap();
    cluster.api.wait_for::<Pod>("the opened pod bound", |pods| bound(pods) == 2).await;
}
