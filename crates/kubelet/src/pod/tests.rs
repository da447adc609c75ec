//! Whole pods on a runtime in memory and the in-memory API, on virtual time.

use crate::config::KubeletConfig;
use crate::fake::FakeRuntime;
use crate::kubelet::Kubelet;
use k8s_openapi::api::core::v1::{ConfigMap, ContainerStatus, Event, Namespace, Node, Pod, PodStatus};
use knarr_client::testing::FakeApi;
use knarr_client::{Clock, Informers};
use kube::api::{Api, DeleteParams, PostParams};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

struct World {
    api: FakeApi,
    client: kube::Client,
    runtime: Arc<FakeRuntime>,
    clock: Clock,
    dir: tempfile::TempDir,
    stop: CancellationToken,
}

impl World {
    async fn new() -> World {
        let _ = tracing_subscriber::fmt().with_max_level(tracing::Level::WARN).with_test_writer().try_init();
        let api = FakeApi::new();
        let client = api.client();
        let clock = Clock::starting_at("2026-01-02T03:04:05Z".parse().unwrap());
        let world = World {
            runtime: Arc::new(FakeRuntime::new(clock.clone())),
            dir: tempfile::tempdir().unwrap(),
            stop: CancellationToken::new(),
            api,
            client,
            clock,
        };
        for name in ["default", "kube-node-lease"] {
            let namespace = json!({"metadata": {"name": name}});
            let namespaces = Api::<Namespace>::all(world.client.clone());
            let _ =
                namespaces.create(&PostParams::default(), &serde_json::from_value(namespace).unwrap()).await;
        }
        world.start();
        world.api.wait_for::<Node>("the node to be ready", |nodes| nodes.iter().any(is_ready)).await;
        world
    }

    /// Starts a kubelet; `self.stop` ends it.
    fn start(&self) {
        let mut config = KubeletConfig::new("node");
        config.node_addresses = vec!["192.0.2.1".parse().unwrap()];
        config.root_dir = self.dir.path().join("kubelet");
        config.log_dir = self.dir.path().join("logs");
        config.log_link_dir = None;
        let kubelet = Kubelet::new(
            config,
            self.client.clone(),
            Informers::new(self.client.clone()),
            self.runtime.clone(),
            None,
        );
        let kubelet = kubelet.simulated(self.clock.clone());
        let stop = self.stop.clone();
        tokio::spawn(async move { kubelet.run(stop).await.unwrap() });
    }

    async fn restart(&mut self) {
        self.stop.cancel();
        tokio::time::sleep(Duration::from_millis(1)).await;
        self.stop = CancellationToken::new();
        self.start();
    }

    async fn pod(&self, mut spec: Value) {
        spec["nodeName"] = "node".into();
        let pod = json!({"metadata": {"name": "p", "namespace": "default"}, "spec": spec});
        let pods = Api::<Pod>::namespaced(self.client.clone(), "default");
        pods.create(&PostParams::default(), &serde_json::from_value(pod).unwrap()).await.unwrap();
    }

    /// Replaces the pod's spec, as a resize does.
    async fn change(&self, mut spec: Value) {
        spec["nodeName"] = "node".into();
        let pods = Api::<Pod>::namespaced(self.client.clone(), "default");
        let patch = kube::api::Patch::Merge(json!({"spec": spec}));
        pods.patch("p", &kube::api::PatchParams::default(), &patch).await.unwrap();
    }

    async fn delete(&self) {
        let pods = Api::<Pod>::namespaced(self.client.clone(), "default");
        pods.delete("p", &DeleteParams::default()).await.unwrap();
    }

    async fn until(&self, what: &str, holds: impl Fn(&PodStatus) -> bool) -> PodStatus {
        let found = self
            .api
            .wait_for::<Pod>(what, |pods| pods.iter().any(|pod| pod.status.as_ref().is_some_and(&holds)));
        found.await[0].status.clone().unwrap()
    }

    async fn running(&self) -> PodStatus {
        self.until("the pod to be ready", |status| condition(status, "Ready") == "True").await
    }

    async fn events(&self, reason: &str) -> Vec<String> {
        self.api.settle(Duration::from_millis(100)).await;
        let all = self.api.objects::<Event>();
        all.into_iter()
            .filter(|event| event.reason.as_deref() == Some(reason))
            .filter_map(|event| event.message)
            .collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn is_ready(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

fn condition<'a>(status: &'a PodStatus, kind: &str) -> &'a str {
    let conditions = status.conditions.as_deref().unwrap_or_default();
    conditions.iter().find(|condition| condition.type_ == kind).map_or("", |condition| &condition.status)
}

fn main(status: &PodStatus) -> ContainerStatus {
    status.container_statuses.as_ref().and_then(|list| list.first().cloned()).unwrap_or_default()
}

fn waiting(status: &PodStatus) -> String {
    main(status).state.and_then(|state| state.waiting?.reason).unwrap_or_default()
}

fn container(name: &str) -> Value {
    json!({"name": name, "image": "busybox:1", "imagePullPolicy": "IfNotPresent"})
}

fn one() -> Value {
    json!({"containers": [container("c")]})
}

#[tokio::test(start_paused = true)]
async fn a_pod_runs_and_tells_everything_about_it() {
    let world = World::new().await;
    world.pod(one()).await;
    let status = world.running().await;
    assert_eq!(status.phase.as_deref(), Some("Running"));
    assert_eq!(status.pod_ip.as_deref(), Some("10.0.0.9"));
    assert_eq!(status.host_ip.as_deref(), Some("192.0.2.1"));
    for kind in ["PodReadyToStartContainers", "Initialized", "ContainersReady", "PodScheduled"] {
        assert_eq!(condition(&status, kind), "True", "{kind}");
    }
    let main = main(&status);
    assert!(main.ready && main.started == Some(true));
    assert!(main.container_id.unwrap().starts_with("fake://"));
    assert_eq!(world.events("Started").await.len(), 1);
    let hosts = std::fs::read_to_string(
        std::fs::read_dir(world.dir.path().join("kubelet/pods"))
            .unwrap()
            .next()
            .unwrap()
            .unwrap()
            .path()
            .join("etc-hosts"),
    );
    assert!(hosts.unwrap().contains("10.0.0.9\tp"));
}

fn sized(cpu: &str, policy: &str) -> Value {
    let mut sized = container("c");
    sized["resources"] = json!({"requests": {"cpu": cpu}, "limits": {"cpu": cpu}});
    sized["resizePolicy"] = json!([{"resourceName": "cpu", "restartPolicy": policy}]);
    json!({"containers": [sized]})
}

fn limit(status: &PodStatus) -> String {
    let limits = main(status).resources.and_then(|resources| resources.limits).unwrap_or_default();
    limits.get("cpu").map(|cpu| cpu.0.clone()).unwrap_or_default()
}

#[tokio::test(start_paused = true)]
async fn a_resize_changes_a_running_container_in_place() {
    let world = World::new().await;
    world.pod(sized("100m", "NotRequired")).await;
    assert_eq!(limit(&world.running().await), "100m");
    world.runtime.take_log();
    world.change(sized("200m", "NotRequired")).await;
    let status = world.until("the new limit", |status| limit(status) == "200m").await;
    assert_eq!(main(&status).allocated_resources.unwrap()["cpu"].0, "200m");
    assert_eq!(main(&status).restart_count, 0);
    assert_eq!(world.runtime.take_log(), ["update c quota 20000"]);
}

#[tokio::test(start_paused = true)]
async fn a_resize_restarts_containers_that_want_it() {
    let world = World::new().await;
    world.pod(sized("100m", "RestartContainer")).await;
    world.running().await;
    world.change(sized("200m", "RestartContainer")).await;
    let again = |status: &PodStatus| main(status).restart_count == 1 && main(status).ready;
    let status = world.until("the restart", again).await;
    assert_eq!(limit(&status), "200m");
    assert_eq!(condition(&status, "PodResizeInProgress"), "", "done");
}

#[tokio::test(start_paused = true)]
async fn a_resize_the_node_can_never_grant_is_told_and_changes_nothing() {
    let mut world = World::new().await;
    world.pod(sized("100m", "NotRequired")).await;
    world.running().await;
    world.change(sized("100000", "NotRequired")).await;
    let pending = |status: &PodStatus| condition(status, "PodResizePending") == "True";
    let status = world.until("the refusal", pending).await;
    let told = status.conditions.as_ref().unwrap().iter().find(|c| c.type_ == "PodResizePending").unwrap();
    assert_eq!(told.reason.as_deref(), Some("Infeasible"));
    assert_eq!((limit(&status), world.events("ResizeInfeasible").await.len()), ("100m".to_owned(), 1));
    world.runtime.take_log();
    world.restart().await;
    world.api.settle(Duration::from_secs(1)).await;
    assert_eq!(limit(&world.running().await), "100m", "a restart of the kubelet grants nothing");
    world.change(sized("150m", "NotRequired")).await;
    world.until("what can be granted", |status| limit(status) == "150m" && !pending(status)).await;
}

#[tokio::test(start_paused = true)]
async fn the_node_registers_with_a_lease_and_loses_its_taint() {
    let world = World::new().await;
    let nodes = world.api.wait_for::<Node>("the taint to go", |nodes| {
        nodes
            .iter()
            .any(|node| node.spec.as_ref().is_none_or(|spec| spec.taints.as_ref().is_none_or(Vec::is_empty)))
    });
    let node = &nodes.await[0];
    assert_eq!(node.metadata.labels.as_ref().unwrap()["kubernetes.io/hostname"], "node");
    let status = node.status.as_ref().unwrap();
    assert_eq!(status.capacity.as_ref().unwrap()["pods"].0, "110");
    assert!(status.conditions.as_ref().unwrap().iter().any(|c| c.reason.as_deref() == Some("KubeletReady")));
    type Lease = k8s_openapi::api::coordination::v1::Lease;
    world.api.wait_for::<Lease>("the lease", |leases| leases.len() == 1).await;
}

#[tokio::test(start_paused = true)]
async fn crashes_back_off_and_are_told() {
    let world = World::new().await;
    world.pod(one()).await;
    world.running().await;
    world.runtime.exit("c", 1);
    world.until("the first restart", |status| main(status).restart_count == 1 && main(status).ready).await;
    world.runtime.exit("c", 1);
    let status = world.until("crash back-off", |status| waiting(status) == "CrashLoopBackOff").await;
    let message = main(&status).state.unwrap().waiting.unwrap().message.unwrap();
    assert!(message.starts_with("back-off 10s restarting failed container=c pod=p_default("), "{message}");
    assert_eq!(main(&status).last_state.unwrap().terminated.unwrap().exit_code, 1);
    assert_eq!(status.phase.as_deref(), Some("Running"));
    world.until("the second restart", |status| main(status).restart_count == 2 && main(status).ready).await;
    assert!(!world.events("BackOff").await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn init_containers_run_in_order_and_sidecars_stay() {
    let world = World::new().await;
    let mut side = container("side");
    side["restartPolicy"] = "Always".into();
    world
        .pod(json!({"restartPolicy": "Never",
        "initContainers": [container("one"), side, container("two")], "containers": [container("c")]}))
        .await;
    world.until("the first init container", |status| condition(status, "Initialized") == "False").await;
    for name in ["one", "two"] {
        world
            .until("the next init container", |status| {
                status.init_container_statuses.iter().flatten().any(|status| {
                    status.name == name && status.state.as_ref().is_some_and(|state| state.running.is_some())
                })
            })
            .await;
        world.runtime.exit(name, 0);
    }
    world.running().await;
    assert_eq!(world.runtime.take_log(), ["start one", "start side", "start two", "start c"]);
    world.runtime.exit("c", 0);
    let status = world.until("the end", |status| status.phase.as_deref() == Some("Succeeded")).await;
    assert_eq!(world.runtime.take_log(), ["stop side 30s"]);
    assert_eq!(condition(&status, "Ready"), "False");
}

#[tokio::test(start_paused = true)]
async fn a_failed_init_container_fails_a_pod_that_never_restarts() {
    let world = World::new().await;
    world.pod(json!({"restartPolicy": "Never", "initContainers": [container("i")], "containers": [container("c")]})).await;
    world
        .until("the init container", |status| {
            status.init_container_statuses.iter().flatten().any(|status| status.started == Some(true))
        })
        .await;
    world.runtime.exit("i", 3);
    world.until("the failure", |status| status.phase.as_deref() == Some("Failed")).await;
    assert_eq!(world.runtime.take_log(), ["start i"]);
}

#[tokio::test(start_paused = true)]
async fn pods_that_run_to_the_end_succeed_or_fail() {
    for (code, policy, want) in
        [(0, "Never", "Succeeded"), (1, "Never", "Failed"), (0, "OnFailure", "Succeeded")]
    {
        let world = World::new().await;
        world.pod(json!({"restartPolicy": policy, "containers": [container("c")]})).await;
        world.running().await;
        world.runtime.exit("c", code);
        let status = world.until(want, |status| status.phase.as_deref() == Some(want)).await;
        assert_eq!(main(&status).state.unwrap().terminated.unwrap().exit_code, code);
    }
}

#[tokio::test(start_paused = true)]
async fn deletion_runs_the_hook_stops_and_leaves_nothing() {
    let world = World::new().await;
    let mut c = container("c");
    c["lifecycle"] = json!({"preStop": {"exec": {"command": ["bye"]}}});
    world.pod(json!({"terminationGracePeriodSeconds": 20, "containers": [c]})).await;
    world.running().await;
    world.runtime.take_log();
    world.delete().await;
    world.api.wait_for::<Pod>("the pod to go", |pods| pods.is_empty()).await;
    assert_eq!(world.runtime.take_log(), ["exec c", "stop c 20s"]);
    world.api.settle(Duration::from_millis(100)).await;
    assert!(world.runtime.world.lock().sandboxes.is_empty());
    assert_eq!(std::fs::read_dir(world.dir.path().join("kubelet/pods")).unwrap().count(), 0);
    assert_eq!(world.events("Killing").await, ["Stopping container c"]);
}

#[tokio::test(start_paused = true)]
async fn a_restarted_kubelet_takes_over_without_restarting_anything() {
    let mut world = World::new().await;
    world.pod(one()).await;
    world.running().await;
    world.runtime.take_log();
    world.restart().await;
    world.api.settle(Duration::from_secs(1)).await;
    assert!(world.runtime.take_log().is_empty());
    world.runtime.exit("c", 1);
    world.until("a restart by the new kubelet", |status| main(status).restart_count == 1).await;
}

#[tokio::test(start_paused = true)]
async fn what_the_api_forgot_is_taken_down() {
    let mut world = World::new().await;
    world.pod(one()).await;
    world.running().await;
    world.stop.cancel();
    tokio::time::sleep(Duration::from_millis(1)).await;
    let pods = Api::<Pod>::namespaced(world.client.clone(), "default");
    pods.delete("p", &DeleteParams::default().grace_period(0)).await.unwrap();
    world.restart().await;
    let gone = async {
        while !world.runtime.world.lock().sandboxes.is_empty() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(120), gone).await.expect("the orphan to be taken down");
}

#[tokio::test(start_paused = true)]
async fn images_that_cannot_be_pulled_back_off() {
    let world = World::new().await;
    world.runtime.world.lock().broken_images.insert("busybox:1".into());
    world.pod(one()).await;
    world.until("the error", |status| waiting(status) == "ErrImagePull").await;
    let status = world.until("the back-off", |status| waiting(status) == "ImagePullBackOff").await;
    let message = main(&status).state.unwrap().waiting.unwrap().message.unwrap();
    assert_eq!(message, "Back-off pulling image \"busybox:1\": ErrImagePull: no such manifest");
    assert_eq!(status.phase.as_deref(), Some("Pending"));
    world.runtime.world.lock().broken_images.clear();
    world.running().await;
}

#[tokio::test(start_paused = true)]
async fn a_failing_liveness_probe_restarts_and_readiness_gates_traffic() {
    let world = World::new().await;
    let mut c = container("c");
    c["livenessProbe"] = json!({"exec": {"command": ["x"]}, "periodSeconds": 5, "failureThreshold": 2});
    c["readinessProbe"] = json!({"exec": {"command": ["x"]}, "periodSeconds": 1});
    world.runtime.world.lock().exec_codes.insert("c".into(), 1);
    world.pod(json!({"containers": [c]})).await;
    world
        .until("it to run unready", |status| main(status).started == Some(true) && !main(status).ready)
        .await;
    world.until("the restart", |status| main(status).restart_count >= 1).await;
    assert!(
        world
            .events("Killing")
            .await
            .contains(&"Container c failed liveness probe, will be restarted".to_owned())
    );
    world.runtime.world.lock().exec_codes.clear();
    world.running().await;
    assert!(
        world.events("Unhealthy").await.iter().any(|message| message.starts_with("Readiness probe failed: "))
    );
}

#[tokio::test(start_paused = true)]
async fn a_missing_config_map_is_told_and_waited_for() {
    let world = World::new().await;
    let mut c = container("c");
    c["env"] = json!([{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "m", "key": "k"}}}]);
    world.pod(json!({"containers": [c]})).await;
    let status = world.until("the error", |status| waiting(status) == "CreateContainerConfigError").await;
    assert_eq!(main(&status).state.unwrap().waiting.unwrap().message.unwrap(), "configmap \"m\" not found");
    let map = json!({"metadata": {"name": "m", "namespace": "default"}, "data": {"k": "v"}});
    let maps = Api::<ConfigMap>::namespaced(world.client.clone(), "default");
    maps.create(&PostParams::default(), &serde_json::from_value(map).unwrap()).await.unwrap();
    world.running().await;
}

#[tokio::test(start_paused = true)]
async fn volumes_follow_their_config_maps() {
    let world = World::new().await;
    let maps = Api::<ConfigMap>::namespaced(world.client.clone(), "default");
    let map = |value: &str| {
        serde_json::from_value(
            json!({"metadata": {"name": "m", "namespace": "default"}, "data": {"k": value}}),
        )
        .unwrap()
    };
    maps.create(&PostParams::default(), &map("old")).await.unwrap();
    let mut c = container("c");
    c["volumeMounts"] = json!([{"name": "v", "mountPath": "/v"}]);
    world.pod(json!({"containers": [c], "volumes": [{"name": "v", "configMap": {"name": "m"}}]})).await;
    world.running().await;
    let pods = world.dir.path().join("kubelet/pods");
    let file = std::fs::read_dir(pods)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path()
        .join("volumes/kubernetes.io~configmap/v/k");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "old");
    maps.replace("m", &PostParams::default(), &map("new")).await.unwrap();
    let changed = async {
        while std::fs::read_to_string(&file).unwrap() != "new" {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), changed).await.expect("the file to follow");
}

#[tokio::test(start_paused = true)]
async fn a_pod_past_its_deadline_fails() {
    let world = World::new().await;
    world.pod(json!({"activeDeadlineSeconds": 30, "containers": [container("c")]})).await;
    world.running().await;
    let status = world.until("the end", |status| status.phase.as_deref() == Some("Failed")).await;
    assert_eq!(status.reason.as_deref(), Some("DeadlineExceeded"));
}

#[tokio::test(start_paused = true)]
async fn a_pod_too_large_is_turned_away() {
    let world = World::new().await;
    let mut c = container("c");
    c["resources"] = json!({"requests": {"cpu": "100000"}});
    world.pod(json!({"containers": [c]})).await;
    let status = world.until("the rejection", |status| status.phase.as_deref() == Some("Failed")).await;
    assert_eq!(status.reason.as_deref(), Some("OutOfcpu"));
    assert!(status.message.unwrap().starts_with("Pod was rejected: Node didn't have enough resource: cpu"));
}

#[tokio::test(start_paused = true)]
async fn an_idle_node_writes_only_its_lease() {
    let world = World::new().await;
    world.pod(one()).await;
    world.running().await;
    world.api.settle(Duration::from_secs(5)).await;
    world.api.take_writes();
    tokio::time::sleep(Duration::from_secs(60)).await;
    let writes = world.api.take_writes();
    assert!(writes.iter().all(|write| write.contains("/leases/")), "{writes:?}");
    assert!(writes.len() <= 7, "{writes:?}");
}
