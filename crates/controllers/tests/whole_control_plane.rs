//! Controllers and scheduler against the real API server, in process, over a store in memory: no sockets, no disk,
//! real time.

use k8s_openapi::ByteString;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, ReplicaSet};
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{
    ConfigMap, Endpoints, Event, Namespace, Node, Pod, Secret, Service, ServiceAccount,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::resource::v1::{ResourceClaim, ResourceClaimTemplate};
use knarr_apiserver::api::Api as Server;
use knarr_apiserver::authn::Tokens;
use knarr_apiserver::identity::{MASTERS, User};
use knarr_apiserver::proxy::Dialer;
use knarr_apiserver::rbac::Rbac;
use knarr_apiserver::registry::Registry;
use knarr_apiserver::server::InProcess;
use knarr_apiserver::services::{Allocator, Ranges};
use knarr_client::leader::Election;
use knarr_client::{Client, Clock, connect};
use knarr_controllers::{Authority, Config, Context, ControllerManager, NodeRanges};
use knarr_scheduler::Scheduler;
use knarr_store::engine::Memory;
use knarr_store::{Embedded, Options};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::fmt::Debug;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::sync::{CancellationToken, DropGuard};

const NAMESPACE: &str = "shop";
const WAIT_MAX: Duration = Duration::from_secs(60);

struct Cluster {
    client: Client,
    _stop: DropGuard,
}

fn server() -> Arc<Server> {
    let store =
        Arc::new(Embedded::open_inline(Memory::default(), Options::default()).expect("an empty store opens"));
    let ranges: Ranges = "10.96.0.0/16".parse().expect("a valid range");
    let registry = Registry {
        services: Allocator::load(&*store, ranges, 30000..=32767),
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
        Self::start_with(Config { root_ca: "PEM".to_owned(), ..Default::default() }).await
    }

    async fn start_with(config: Config) -> Self {
        let server = server();
        knarr_apiserver::bootstrap::run(&server.registry, &["127.0.0.1:6443".parse().unwrap()])
            .await
            .unwrap();
        let as_user = |name: &str, groups: &[&str]| {
            connect::in_process(InProcess::new(server.clone(), User::new(name, groups)))
        };
        let client = as_user("admin", &[MASTERS]);
        // With their own identities: what the bootstrap roles forbid them fails here too.
        let controllers = as_user("system:kube-controller-manager", &["system:authenticated"]);
        let shutdown = CancellationToken::new();
        let context = Context::new(controllers, config, Clock::System);
        tokio::spawn(ControllerManager::run_with(context, shutdown.clone()));
        let scheduling = as_user("system:kube-scheduler", &["system:authenticated"]);
        tokio::spawn(Scheduler::run_default(scheduling, shutdown.clone()));
        Cluster { client, _stop: shutdown.drop_guard() }
    }

    fn api<K>(&self) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), NAMESPACE)
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

    async fn node(&self, name: &str) {
        let api: Api<Node> = Api::all(self.client.clone());
        let node = serde_json::from_value(json!({"metadata": {"name": name}})).unwrap();
        api.create(&PostParams::default(), &node).await.unwrap();
        let now = jiff::Timestamp::now().to_string();
        let status = json!({"status": {
            "allocatable": {"cpu": "4", "memory": "8Gi", "pods": "110"},
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "", "lastHeartbeatTime": now,
                            "lastTransitionTime": now}],
        }});
        api.patch_status(name, &PatchParams::default(), &Patch::Merge(status)).await.unwrap();
    }

    async fn wait_for<K>(&self, what: &str, condition: impl Fn(&[K]) -> bool) -> Vec<K>
    where
        K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
            + Clone
            + DeserializeOwned
            + Debug,
    {
        let deadline = Instant::now() + WAIT_MAX;
        loop {
            let items = self.api::<K>().list(&ListParams::default()).await.unwrap().items;
            if condition(&items) {
                return items;
            }
            assert!(Instant::now() < deadline, "waited {WAIT_MAX:?} for {what}; there is {items:#?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Plays kubelet: bound pods run, are ready (or, for jobs, end), and deleted pods go.
    fn run_kubelet(&self) {
        let api = self.api::<Pod>();
        tokio::spawn(async move {
            for number in 1.. {
                for pod in api.list(&ListParams::default()).await.map(|list| list.items).unwrap_or_default() {
                    play(&api, &pod, number).await;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
    }
}

async fn play(api: &Api<Pod>, pod: &Pod, number: u32) {
    let status = pod.status.clone().unwrap_or_default();
    let bound = pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some());
    let name = pod.name_any();
    if pod.metadata.deletion_timestamp.is_some() {
        let _ = api.delete(&name, &DeleteParams::default().grace_period(0)).await;
    } else if bound && status.phase.as_deref() == Some("Pending") {
        let ends = pod.labels().contains_key("batch.kubernetes.io/job-name");
        let (phase, ready) = if ends { ("Succeeded", "False") } else { ("Running", "True") };
        let conditions = json!([{"type": "Ready", "status": ready, "lastTransitionTime": jiff::Timestamp::now().to_string()}]);
        let ip = format!(
            "10.1.{}.{}",
            number % 250,
            name.len() + name.bytes().map(usize::from).sum::<usize>() % 200
        );
        let status = json!({"status": {"phase": phase, "podIP": ip, "podIPs": [{"ip": ip}], "conditions": conditions}});
        let _ = api.patch_status(&name, &PatchParams::default(), &Patch::Strategic(status)).await;
    }
}

fn image(pod: &Pod) -> &str {
    pod.spec.as_ref().unwrap().containers[0].image.as_deref().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shop_opens_changes_and_closes() {
    if std::env::var_os("SHOW_LOG").is_some() {
        tracing_subscriber::fmt()
            .with_env_filter("knarr_client=debug,knarr_controllers=debug,knarr_scheduler=debug")
            .init();
    }
    let cluster = Cluster::start().await;
    cluster.node("n1").await;
    cluster.node("n2").await;
    let namespaces: Api<Namespace> = Api::all(cluster.client.clone());
    let namespace = serde_json::from_value(json!({"metadata": {"name": NAMESPACE}})).unwrap();
    namespaces.create(&PostParams::default(), &namespace).await.unwrap();
    cluster.wait_for::<ServiceAccount>("the default account", |accounts| accounts.len() == 1).await;
    cluster.wait_for::<ConfigMap>("the root CA", |maps| maps.len() == 1).await;
    cluster.run_kubelet();

    let template = json!({"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "c", "image": "a"}]}});
    let deployment = json!({"metadata": {"name": "web"}, "spec": {
        "replicas": 3, "selector": {"matchLabels": {"app": "web"}}, "template": template,
    }});
    cluster.create::<Deployment>(deployment).await;
    let service =
        json!({"metadata": {"name": "web"}, "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]}});
    cluster.create::<Service>(service).await;
    let complete = |deployments: &[Deployment]| {
        let (wanted, status) = (
            deployments[0].spec.as_ref().unwrap().replicas,
            deployments[0].status.clone().unwrap_or_default(),
        );
        status.observed_generation == deployments[0].metadata.generation
            && status.updated_replicas == wanted
            && status.available_replicas == wanted
            && status.replicas == wanted
    };
    cluster.wait_for::<Deployment>("the roll-out", complete).await;
    let endpoints = |slices: &[EndpointSlice]| {
        slices
            .iter()
            .flat_map(|slice| slice.endpoints.iter().flatten())
            .filter(|endpoint| {
                endpoint.conditions.as_ref().is_some_and(|conditions| conditions.ready == Some(true))
            })
            .count()
    };
    cluster.wait_for::<EndpointSlice>("3 ready endpoints", |slices| endpoints(slices) == 3).await;
    cluster
        .wait_for::<Endpoints>("old-style endpoints", |all| all.iter().any(|one| one.subsets.is_some()))
        .await;
    cluster
        .wait_for::<Event>("the events of scheduling", |events| {
            let with = |reason: &str| events.iter().any(|event| event.reason.as_deref() == Some(reason));
            with("Scheduled") && with("SuccessfulCreate") && with("ScalingReplicaSet")
        })
        .await;

    let change =
        json!({"spec": {"replicas": 5, "template": {"spec": {"containers": [{"name": "c", "image": "b"}]}}}});
    cluster.api::<Deployment>().patch("web", &PatchParams::default(), &Patch::Merge(change)).await.unwrap();
    cluster.wait_for::<Deployment>("the update", complete).await;
    cluster
        .wait_for::<Pod>("5 new pods", |pods| pods.len() == 5 && pods.iter().all(|pod| image(pod) == "b"))
        .await;

    let daemon = json!({"metadata": {"name": "agent"}, "spec": {
        "selector": {"matchLabels": {"app": "agent"}},
        "template": {"metadata": {"labels": {"app": "agent"}}, "spec": {"containers": [{"name": "c", "image": "d"}]}},
    }});
    cluster.create::<DaemonSet>(daemon).await;
    cluster
        .wait_for::<DaemonSet>("a daemon on both nodes", |sets| {
            sets[0]
                .status
                .as_ref()
                .is_some_and(|status| status.number_ready == 2 && status.updated_number_scheduled == Some(2))
        })
        .await;
    let job = json!({"metadata": {"name": "work"}, "spec": {"completions": 3, "template": {"spec": {
        "restartPolicy": "Never", "containers": [{"name": "c", "image": "j"}],
    }}}});
    cluster.create::<Job>(job).await;
    cluster
        .wait_for::<Job>("the job complete", |jobs| {
            jobs[0].status.as_ref().is_some_and(|status| {
                status.succeeded == Some(3)
                    && status.conditions.iter().flatten().any(|condition| condition.type_ == "Complete")
            })
        })
        .await;

    cluster.api::<Deployment>().delete("web", &DeleteParams::background()).await.unwrap();
    cluster.wait_for::<ReplicaSet>("no replica sets", |sets| sets.is_empty()).await;
    cluster
        .wait_for::<Pod>("no pods of the deployment", |pods| pods.iter().all(|pod| image(pod) != "b"))
        .await;
    namespaces.delete(NAMESPACE, &DeleteParams::default()).await.unwrap();
    let deadline = Instant::now() + WAIT_MAX;
    while let Some(left) = namespaces.get_opt(NAMESPACE).await.unwrap() {
        assert!(Instant::now() < deadline, "waited {WAIT_MAX:?} for the namespace to go: {left:#?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// An authority as a cluster has one.
fn authority() -> Authority {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    Authority { certificate: params.self_signed(&key).unwrap().pem(), key: key.serialize_pem() }
}

/// A kubelet's request for a client certificate, as PEM.
fn node_request(name: &str) -> String {
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::OrganizationName, "system:nodes");
    params.distinguished_name.push(rcgen::DnType::CommonName, format!("system:node:{name}"));
    params.serialize_request(&rcgen::KeyPair::generate().unwrap()).unwrap().pem().unwrap()
}

/// Waits for one object of any kind.
async fn wait_for_one<K>(api: &Api<K>, name: &str, what: &str, condition: impl Fn(&K) -> bool) -> K
where
    K: Resource + Clone + DeserializeOwned + Debug,
{
    let deadline = Instant::now() + WAIT_MAX;
    loop {
        let found = api.get_opt(name).await.unwrap();
        if let Some(found) = found.clone().filter(&condition) {
            return found;
        }
        assert!(Instant::now() < deadline, "waited {WAIT_MAX:?} for {what}; there is {found:#?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn make<K>(api: &Api<K>, object: Value) -> K
where
    K: Resource + Clone + DeserializeOwned + Serialize + Debug,
{
    api.create(&PostParams::default(), &serde_json::from_value(object).unwrap()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_loops_of_the_platform_get_on_with_the_real_server() {
    let ranges = NodeRanges { cluster: vec!["10.42.0.0/16".into()], ..Default::default() };
    let election = Election::new("kube-system", "kube-controller-manager", "this");
    let config = Config {
        root_ca: "PEM".to_owned(),
        authority: Some(authority()),
        node_ranges: ranges,
        election: Some(election),
        ..Default::default()
    };
    let cluster = Cluster::start_with(config).await;
    let client = || cluster.client.clone();
    let namespaces: Api<Namespace> = Api::all(client());
    make(&namespaces, json!({"metadata": {"name": NAMESPACE}})).await;
    let leases: Api<Lease> = Api::namespaced(client(), "kube-system");
    let held = |lease: &Lease| {
        lease.spec.as_ref().is_some_and(|spec| spec.holder_identity.as_deref() == Some("this"))
    };
    wait_for_one(&leases, "kube-controller-manager", "the lease", held).await;

    // A node gets its range and is told how long to cache.
    cluster.node("n1").await;
    let nodes: Api<Node> = Api::all(client());
    let labels = json!({"metadata": {"labels": {"topology.kubernetes.io/zone": "a"}}});
    nodes.patch("n1", &PatchParams::default(), &Patch::Merge(labels)).await.unwrap();
    wait_for_one(&nodes, "n1", "range and time", |node| {
        node.spec.as_ref().is_some_and(|spec| spec.pod_cidr.as_deref() == Some("10.42.0.0/24"))
            && node.annotations().get("node.alpha.kubernetes.io/ttl").is_some_and(|seconds| seconds == "0")
    })
    .await;

    // A kubelet's request is approved and signed.
    let requests: Api<CertificateSigningRequest> = Api::all(client());
    let request = json!({"metadata": {"name": "n2"}, "spec": {
        "signerName": "kubernetes.io/kube-apiserver-client-kubelet", "expirationSeconds": 3600,
        "request": ByteString(node_request("n2").into_bytes()), "usages": ["digital signature", "client auth"],
    }});
    make(&requests, request).await;
    let signed = wait_for_one(&requests, "n2", "the certificate", |request| {
        request.status.as_ref().is_some_and(|status| status.certificate.is_some())
    })
    .await;
    let certificate = signed.status.unwrap().certificate.unwrap();
    assert!(certificate.0.starts_with(b"-----BEGIN CERTIFICATE-----"));
    let other = json!({"metadata": {"name": "odd"}, "spec": {
        "signerName": "kubernetes.io/kubelet-serving",
        "request": ByteString(node_request("n2").into_bytes()), "usages": ["digital signature", "server auth"],
    }});
    make(&requests, other).await;
    let approved = json!({"status": {"conditions": [
        {"type": "Approved", "status": "True", "reason": "ByHand", "message": "fine"},
    ]}});
    requests.patch_approval("odd", &PatchParams::default(), &Patch::Merge(approved)).await.unwrap();
    wait_for_one(&requests, "odd", "the refusal", |request| {
        let status = request.status.clone().unwrap_or_default();
        status.conditions.iter().flatten().any(|condition| condition.type_ == "Failed")
    })
    .await;

    // What is public is signed with a token.
    let secrets: Api<Secret> = Api::namespaced(client(), "kube-system");
    let token = json!({"metadata": {"name": "bootstrap-token-abcdef"}, "type": "bootstrap.kubernetes.io/token",
        "stringData": {"token-id": "abcdef", "token-secret": "0123456789abcdef", "usage-bootstrap-signing": "true"}});
    make(&secrets, token).await;
    let maps: Api<ConfigMap> = Api::namespaced(client(), "kube-public");
    make(&maps, json!({"metadata": {"name": "cluster-info"}, "data": {"kubeconfig": "x"}})).await;
    wait_for_one(&maps, "cluster-info", "the signature", |map| {
        map.data.as_ref().is_some_and(|data| data.contains_key("jws-kubeconfig-abcdef"))
    })
    .await;

    // A deployment is brought within the bounds of its autoscaler, which says that there are no metrics.
    cluster.run_kubelet();
    let resources = json!({"requests": {"cpu": "100m"}});
    let template = json!({"metadata": {"labels": {"app": "web"}}, "spec": {
        "containers": [{"name": "c", "image": "a", "resources": resources}],
    }});
    cluster
        .create::<Deployment>(json!({"metadata": {"name": "web"}, "spec": {
            "replicas": 1, "selector": {"matchLabels": {"app": "web"}}, "template": template,
        }}))
        .await;
    let target = json!({"apiVersion": "apps/v1", "kind": "Deployment", "name": "web"});
    cluster
        .create::<HorizontalPodAutoscaler>(json!({"metadata": {"name": "web"}, "spec": {
            "minReplicas": 2, "maxReplicas": 4, "scaleTargetRef": target,
        }}))
        .await;
    cluster.wait_for::<Pod>("two pods", |pods| pods.len() == 2).await;
    // Nothing but the next look, up to 15 s later, finds the bounds kept and the metrics missing.
    cluster
        .wait_for::<HorizontalPodAutoscaler>("the conditions", |all| {
            let status = all[0].status.clone().unwrap_or_default();
            status.conditions.iter().flatten().any(|condition| {
                condition.type_ == "ScalingActive"
                    && condition.reason.as_deref() == Some("FailedGetResourceMetric")
            })
        })
        .await;

    // Its endpoints are meant for where they are.
    let service = json!({"metadata": {"name": "web"}, "spec": {
        "selector": {"app": "web"}, "ports": [{"port": 80}], "trafficDistribution": "PreferSameNode",
    }});
    cluster.create::<Service>(service).await;
    cluster
        .wait_for::<EndpointSlice>("the hints", |slices| {
            let endpoints = slices.iter().flat_map(|slice| slice.endpoints.iter().flatten());
            let hinted = endpoints.filter(|endpoint| {
                let hints = endpoint.hints.clone().unwrap_or_default();
                hints.for_zones.is_some() && hints.for_nodes.is_some()
            });
            hinted.count() == 2
        })
        .await;

    // A pod gets a claim of its own.
    cluster
        .create::<ResourceClaimTemplate>(json!({"metadata": {"name": "gpu"}, "spec": {"spec": {
            "devices": {"requests": [{"name": "one", "exactly": {"deviceClassName": "gpus"}}]},
        }}}))
        .await;
    cluster
        .create::<Pod>(json!({"metadata": {"name": "claims"}, "spec": {
            "containers": [{"name": "c", "image": "a", "resources": {"claims": [{"name": "gpu"}]}}],
            "resourceClaims": [{"name": "gpu", "resourceClaimTemplateName": "gpu"}],
        }}))
        .await;
    let told = |pods: &[Pod]| {
        pods.iter().any(|pod| {
            let status = pod.status.clone().unwrap_or_default();
            status.resource_claim_statuses.iter().flatten().any(|one| one.resource_claim_name.is_some())
        })
    };
    cluster.wait_for::<Pod>("the claim's name", told).await;
    cluster.wait_for::<ResourceClaim>("the claim", |claims| claims.len() == 1).await;
    cluster.api::<Pod>().delete("claims", &DeleteParams::default()).await.unwrap();
    cluster.wait_for::<ResourceClaim>("no claim", |claims| claims.is_empty()).await;
}
