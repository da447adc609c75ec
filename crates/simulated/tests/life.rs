//! Simulated nodes under the real API server, controllers and scheduler, in process, over a store in memory.

use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, StatefulSet};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, Pod, ResourceQuota};
use knarr_apiserver::api::Api as Server;
use knarr_apiserver::authn::Tokens;
use knarr_apiserver::identity::{MASTERS, User};
use knarr_apiserver::proxy::Dialer;
use knarr_apiserver::rbac::Rbac;
use knarr_apiserver::registry::Registry;
use knarr_apiserver::server::InProcess;
use knarr_apiserver::services::Allocator;
use knarr_client::{Client, Clock, connect};
use knarr_controllers::ControllerManager;
use knarr_scheduler::Scheduler;
use knarr_simulated::{Config, NODE_LABEL, NewNode};
use knarr_store::engine::Memory;
use knarr_store::{Embedded, Options};
use kube::api::{Api, DeleteParams, ListParams, LogParams, Patch, PatchParams, PostParams};
use kube::{Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

const NAMESPACE: &str = "default";
const WAIT_MAX: Duration = Duration::from_secs(60);

struct Cluster {
    server: Arc<Server>,
    client: Client,
    shutdown: CancellationToken,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

fn server() -> Arc<Server> {
    let store =
        Arc::new(Embedded::open_inline(Memory::default(), Options::default()).expect("an empty store opens"));
    let registry = Registry {
        services: Allocator::load(&*store, "10.96.0.0/16".parse().expect("a valid range"), 30000..=32767),
        schema: knarr_api::schema::Schema::builtin(),
        quotas: Default::default(),
        health: Default::default(),
        clock: Arc::new(jiff::Timestamp::now),
        store: store.clone(),
    };
    let key = rcgen::KeyPair::generate().expect("a key is generated");
    let tokens =
        Tokens::new("https://kubernetes.default.svc", key.serialize_pem().as_bytes(), key.public_key_raw())
            .expect("a fresh key is valid");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring speaks TLS")
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    Arc::new(Server {
        rbac: Rbac::new(store),
        registry: Arc::new(registry),
        tokens: Arc::new(tokens),
        dialer: Dialer::new(Arc::new(tls)),
        address: "127.0.0.1:6443".to_owned(),
        old_versions: true,
    })
}

impl Cluster {
    async fn start() -> Self {
        let server = server();
        knarr_apiserver::bootstrap::run(&server.registry, &["127.0.0.1:6443".parse().unwrap()])
            .await
            .unwrap();
        let as_user = |name: &str, groups: &[&str]| {
            connect::in_process(InProcess::new(server.clone(), User::new(name, groups)))
        };
        let client = as_user("admin", &[MASTERS]);
        let shutdown = CancellationToken::new();
        let controllers = as_user("system:kube-controller-manager", &["system:authenticated"]);
        let config = knarr_controllers::Config {
            root_ca: "PEM".to_owned(),
            node_grace: Duration::from_secs(2),
            ..Default::default()
        };
        tokio::spawn(ControllerManager::run(controllers, config, shutdown.clone()));
        let scheduling = as_user("system:kube-scheduler", &["system:authenticated"]);
        tokio::spawn(Scheduler::run_default(scheduling, shutdown.clone()));
        let cluster = Cluster { server, client, shutdown };
        cluster.simulate(cluster.shutdown.clone());
        cluster
            .wait_for::<k8s_openapi::api::core::v1::ServiceAccount>("the default account", |all| {
                !all.is_empty()
            })
            .await;
        cluster
    }

    /// Another process that plays the nodes.
    fn simulate(&self, shutdown: CancellationToken) {
        let user = User::new("system:simulated-nodes", &[MASTERS]);
        let client = connect::in_process(InProcess::new(self.server.clone(), user));
        tokio::spawn(knarr_simulated::run(client, Clock::System, Config::default(), shutdown));
    }

    fn nodes(&self) -> Api<Node> {
        Api::all(self.client.clone())
    }

    fn api<K>(&self) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), NAMESPACE)
    }

    async fn add_nodes(&self, count: usize, annotations: &[(&str, &str)]) {
        for number in 0..count {
            let annotations = annotations
                .iter()
                .map(|(key, value)| (format!("simulated.knarr.dev/{key}"), (*value).to_owned()))
                .collect();
            let node = NewNode { name: format!("sim-{number}"), annotations, ..Default::default() };
            self.nodes().create(&PostParams::default(), &node.object()).await.unwrap();
        }
    }

    async fn create<K>(&self, object: Value) -> K
    where
        K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
            + Clone
            + DeserializeOwned
            + Serialize
            + Debug,
    {
        let object = serde_json::from_value(object).unwrap();
        self.api::<K>().create(&PostParams::default(), &object).await.unwrap()
    }

    async fn wait_for<K>(&self, what: &str, condition: impl Fn(&[K]) -> bool) -> Vec<K>
    where
        K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug,
    {
        let deadline = Instant::now() + WAIT_MAX;
        loop {
            let all: Api<K> = Api::all(self.client.clone());
            let items = all.list(&ListParams::default()).await.unwrap().items;
            if condition(&items) {
                return items;
            }
            assert!(Instant::now() < deadline, "waited {WAIT_MAX:?} for {what}; there is {items:#?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn ready_node(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

fn is(pod: &Pod, type_: &str) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|condition| condition.type_ == type_ && condition.status == "True")
}

fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

fn pod(name: &str, annotations: &[(&str, &str)], spec: Value) -> Value {
    let annotations: serde_json::Map<String, Value> =
        annotations.iter().map(|(key, value)| (format!("simulated.knarr.dev/{key}"), json!(value))).collect();
    let mut pod = json!({
        "metadata": { "name": name, "annotations": annotations },
        "spec": { "containers": [{ "name": "c", "image": "registry.example/app:1" }] },
    });
    for (key, value) in spec.as_object().unwrap() {
        pod["spec"][key] = value.clone();
    }
    pod
}

fn container(pod: &Pod) -> &k8s_openapi::api::core::v1::ContainerStatus {
    &pod.status.as_ref().unwrap().container_statuses.as_ref().unwrap()[0]
}

#[test]
fn the_server_knows_a_simulated_node_by_the_same_label() {
    assert_eq!(NODE_LABEL, knarr_apiserver::proxy::SIMULATED_NODE);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deployment_and_a_job_live_on_simulated_nodes_and_survive_a_restart_of_the_simulation() {
    let cluster = Cluster::start().await;
    cluster.add_nodes(3, &[("capacity", "cpu=4,example.com/gpu=2")]).await;
    let nodes = cluster
        .wait_for::<Node>("ready nodes", |nodes| nodes.len() == 3 && nodes.iter().all(ready_node))
        .await;
    let ranges: BTreeSet<_> = nodes.iter().map(|node| node.spec.as_ref().unwrap().pod_cidr.clone()).collect();
    assert_eq!(ranges.len(), 3, "a range of its own for each: {ranges:?}");
    let capacity = nodes[0].status.as_ref().unwrap().capacity.as_ref().unwrap();
    assert_eq!((capacity["cpu"].0.as_str(), capacity["example.com/gpu"].0.as_str()), ("4", "2"));
    cluster.wait_for::<Lease>("a lease each", |leases| leases.len() == 3).await;

    let template = json!({ "metadata": { "labels": { "app": "web" } }, "spec": { "containers": [{ "name": "c", "image": "a" }] } });
    cluster
        .create::<Deployment>(json!({ "metadata": { "name": "web" }, "spec": {
            "replicas": 6, "selector": { "matchLabels": { "app": "web" } }, "template": template } }))
        .await;
    let pods = cluster
        .wait_for::<Pod>("6 ready pods", |pods| pods.iter().filter(|pod| is(pod, "Ready")).count() == 6)
        .await;
    let addresses: BTreeSet<_> = pods.iter().filter_map(|pod| pod.status.as_ref()?.pod_ip.clone()).collect();
    assert_eq!(addresses.len(), 6, "an address of its own for each: {addresses:?}");

    let error = cluster.api::<Pod>().logs(&pods[0].name_any(), &LogParams::default()).await.unwrap_err();
    assert!(error.to_string().contains("is simulated"), "{error}");

    // The process that plays the nodes is replaced: nothing but the objects is left to go by.
    cluster.shutdown.cancel();
    let shutdown = CancellationToken::new();
    cluster.simulate(shutdown.clone());
    let controllers = connect::in_process(InProcess::new(
        cluster.server.clone(),
        User::new("system:kube-controller-manager", &["system:authenticated"]),
    ));
    tokio::spawn(ControllerManager::run(controllers, Default::default(), shutdown.clone()));
    let scheduling = connect::in_process(InProcess::new(
        cluster.server.clone(),
        User::new("system:kube-scheduler", &["system:authenticated"]),
    ));
    tokio::spawn(Scheduler::run_default(scheduling, shutdown.clone()));
    let _stop = shutdown.drop_guard();
    cluster
        .create::<Job>(json!({ "metadata": { "name": "work" }, "spec": { "completions": 4, "parallelism": 2, "template": {
            "metadata": { "annotations": { "simulated.knarr.dev/run-time": "20ms-100ms" } },
            "spec": { "restartPolicy": "Never", "containers": [{ "name": "c", "image": "j" }] } } } }))
        .await;
    cluster
        .wait_for::<Job>("the job complete", |jobs| {
            jobs.iter().any(|job| job.status.as_ref().is_some_and(|status| status.succeeded == Some(4)))
        })
        .await;
    let pods = cluster
        .wait_for::<Pod>("the web pods as before", |pods| {
            pods.iter().filter(|pod| is(pod, "Ready")).count() == 6
        })
        .await;
    let all: BTreeSet<_> = pods.iter().filter_map(|pod| pod.status.as_ref()?.pod_ip.clone()).collect();
    assert!(addresses.is_subset(&all), "held addresses are not given to others");

    cluster.api::<Deployment>().delete("web", &DeleteParams::background()).await.unwrap();
    cluster.wait_for::<Pod>("no web pods", |pods| pods.iter().all(|pod| phase(pod) == "Succeeded")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_do_what_their_annotations_declare() {
    let cluster = Cluster::start().await;
    cluster.add_nodes(1, &[("ready-delay", "100ms")]).await;
    let gates = json!({ "readinessGates": [{ "conditionType": "example.com/open" }] });
    for object in [
        pod("plain", &[], json!({})),
        pod("gated", &[("ready-delay", "0s")], gates),
        pod(
            "fails",
            &[("run-time", "50ms"), ("failure-chance", "100%"), ("failure-exit-code", "3")],
            json!({ "restartPolicy": "Never" }),
        ),
        pod("ends", &[("run-time", "50ms")], json!({ "restartPolicy": "OnFailure" })),
        pod("crashes", &[("run-time", "50ms"), ("exit-code", "2")], json!({})),
        pod("stuck", &[("start-failure-chance", "1")], json!({})),
        pod("late", &[("start-delay", "1h")], json!({ "activeDeadlineSeconds": 7200 })),
        pod("slow", &[("stop-delay", "300ms")], json!({})),
        pod("flaps", &[("unready-after", "50ms"), ("unready-for", "50ms"), ("ready-delay", "0s")], json!({})),
        pod("wrong", &[("ready-delay", "soon")], json!({})),
    ] {
        cluster.create::<Pod>(object).await;
    }
    let named = |pods: &[Pod], name: &str| pods.iter().find(|pod| pod.name_any() == name).cloned().unwrap();
    let pods = cluster
        .wait_for::<Pod>("everybody's state", |pods| {
            let phases = [
                ("plain", "Running"),
                ("fails", "Failed"),
                ("ends", "Succeeded"),
                ("crashes", "Running"),
                ("slow", "Running"),
            ];
            phases.iter().all(|(name, wanted)| phase(&named(pods, name)) == *wanted)
                && is(&named(pods, "plain"), "Ready")
                && is(&named(pods, "gated"), "ContainersReady")
                && container(&named(pods, "crashes")).restart_count == 1
                && named(pods, "stuck").status.unwrap().container_statuses.is_some()
        })
        .await;
    assert!(!is(&named(&pods, "gated"), "Ready"), "the gate is closed");
    let failed = named(&pods, "fails");
    assert_eq!(container(&failed).state.as_ref().unwrap().terminated.as_ref().unwrap().exit_code, 3);
    let waiting = container(&named(&pods, "stuck")).state.clone().unwrap().waiting.unwrap();
    assert_eq!(waiting.reason.as_deref(), Some("ImagePullBackOff"));
    assert_eq!(phase(&named(&pods, "late")), "Pending");

    let open = json!({ "status": { "conditions": [{ "type": "example.com/open", "status": "True" }] } });
    cluster
        .api::<Pod>()
        .patch_status("gated", &PatchParams::default(), &Patch::Strategic(open))
        .await
        .unwrap();
    cluster.wait_for::<Pod>("the gated pod ready", |pods| is(&named(pods, "gated"), "Ready")).await;
    cluster.wait_for::<Pod>("a flap", |pods| !is(&named(pods, "flaps"), "Ready")).await;
    cluster.wait_for::<Pod>("and back", |pods| is(&named(pods, "flaps"), "Ready")).await;
    cluster
        .wait_for::<k8s_openapi::api::core::v1::Event>("a word on the wrong annotation", |events| {
            events.iter().any(|event| event.reason.as_deref() == Some("InvalidSimulation"))
        })
        .await;

    let asked = Instant::now();
    cluster.api::<Pod>().delete("slow", &DeleteParams::default()).await.unwrap();
    cluster
        .wait_for::<Pod>("the slow pod gone", |pods| pods.iter().all(|pod| pod.name_any() != "slow"))
        .await;
    assert!(
        asked.elapsed() >= Duration::from_millis(250),
        "it takes its time to stop: {:?}",
        asked.elapsed()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_declared_down_is_missed_and_returns() {
    let cluster = Cluster::start().await;
    cluster.add_nodes(2, &[]).await;
    cluster.wait_for::<Node>("ready nodes", |nodes| nodes.iter().all(ready_node)).await;
    let down = |value: Value| json!({ "metadata": { "annotations": { "simulated.knarr.dev/down": value } } });
    let patch = |value: Value| Patch::Merge(down(value));
    cluster.nodes().patch("sim-1", &PatchParams::default(), &patch(json!("true"))).await.unwrap();
    cluster.wait_for::<Node>("sim-1 not ready", |nodes| nodes.iter().any(|node| !ready_node(node))).await;
    cluster.nodes().patch("sim-1", &PatchParams::default(), &patch(Value::Null)).await.unwrap();
    cluster.wait_for::<Node>("sim-1 back", |nodes| nodes.iter().all(ready_node)).await;
}

/// Found by the simulator: sets and jobs that a quota held back wrote no status, and went on only after a back-off of
/// up to 17 minutes when the quota was gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_quota_holds_back_says_so_and_goes_on_at_once_when_there_is_room() {
    let cluster = Cluster::start().await;
    cluster.add_nodes(1, &[]).await;
    cluster.wait_for::<Node>("a ready node", |nodes| nodes.iter().all(ready_node)).await;
    cluster
        .create::<ResourceQuota>(
            json!({ "metadata": { "name": "none" }, "spec": { "hard": { "pods": "0" } } }),
        )
        .await;
    let quota_counts =
        |quotas: &[ResourceQuota]| quotas[0].status.as_ref().is_some_and(|status| status.hard.is_some());
    cluster.wait_for::<ResourceQuota>("the quota in force", quota_counts).await;
    let template = json!({ "metadata": { "labels": { "app": "x" } }, "spec": { "containers": [{ "name": "c", "image": "a" }] } });
    let set = |name: &str| json!({ "metadata": { "name": name }, "spec": { "selector": { "matchLabels": { "app": "x" } }, "template": template } });
    cluster.create::<DaemonSet>(set("agent")).await;
    cluster.create::<StatefulSet>(set("data")).await;
    let job = json!({ "metadata": { "name": "work" }, "spec": { "template": { "spec": {
        "restartPolicy": "Never", "containers": [{ "name": "c", "image": "j" }] } } } });
    cluster.create::<Job>(job).await;
    cluster
        .wait_for::<DaemonSet>("the daemon set's status", |sets| {
            sets[0].status.as_ref().is_some_and(|status| status.desired_number_scheduled == 1)
        })
        .await;
    cluster
        .wait_for::<StatefulSet>("the stateful set's status", |sets| {
            sets[0].status.as_ref().is_some_and(|status| status.observed_generation == Some(1))
        })
        .await;
    cluster
        .wait_for::<Job>("the job's start", |jobs| {
            jobs[0].status.as_ref().is_some_and(|status| status.start_time.is_some())
        })
        .await;
    // Some failures later the back-off is seconds long.
    tokio::time::sleep(Duration::from_secs(6)).await;
    let begun = Instant::now();
    cluster.api::<ResourceQuota>().delete("none", &DeleteParams::default()).await.unwrap();
    cluster.wait_for::<Pod>("all pods", |pods| pods.len() == 3).await;
    assert!(begun.elapsed() < Duration::from_secs(3), "nobody waits out a back-off: {:?}", begun.elapsed());
}
