//! The whole scheduler against an in-memory API.

use super::*;
use k8s_openapi::api::coordination::v1::Lease;
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

impl Cluster {
    fn with(config: crate::Config) -> Self {
        let api = FakeApi::new();
        Cluster::over(api, config)
    }

    fn over(api: FakeApi, config: crate::Config) -> Self {
        let client = api.client();
        let informers = Informers::new(client.clone());
        let clock = Clock::starting_at(jiff::Timestamp::now());
        let recorder = Recorder::new(client.clone(), clock.clone(), "test", "");
        let shutdown = CancellationToken::new();
        let scheduler = Scheduler::new(config, &informers, &recorder, clock, 1);
        tokio::spawn(scheduler.run(shutdown.clone()));
        Cluster { api, client, _informers: informers, _stop: shutdown.drop_guard() }
    }

    async fn create<K>(&self, object: Value)
    where
        K: kube::Resource<DynamicType = ()>
            + serde::Serialize
            + serde::de::DeserializeOwned
            + Clone
            + std::fmt::Debug,
    {
        let api: Api<kube::api::DynamicObject> = match object["metadata"]["namespace"].as_str() {
            Some(namespace) => {
                Api::namespaced_with(self.client.clone(), namespace, &kube::api::ApiResource::erase::<K>(&()))
            }
            None => Api::all_with(self.client.clone(), &kube::api::ApiResource::erase::<K>(&())),
        };
        let mut object = object;
        object["apiVersion"] = json!(K::api_version(&()));
        object["kind"] = json!(K::kind(&()));
        api.create(&PostParams::default(), &serde_json::from_value(object).unwrap()).await.unwrap();
    }
}

fn node_named(pods: &[Pod], name: &str) -> Option<String> {
    pods.iter()
        .find(|pod| pod.metadata.name.as_deref() == Some(name))
        .and_then(|pod| node_of(pod).map(str::to_owned))
}

fn find<'a>(pods: &'a [Pod], name: &str) -> Option<&'a Pod> {
    pods.iter().find(|pod| pod.metadata.name.as_deref() == Some(name))
}

#[tokio::test(start_paused = true)]
async fn an_important_pod_makes_a_less_important_one_go() {
    let cluster = Cluster::with(crate::Config::default());
    cluster.node("n1", "4").await;
    cluster.pod("low", "3", json!({"terminationGracePeriodSeconds": 30})).await;
    cluster.api.wait_for::<Pod>("the low pod bound", |pods| bound(pods) == 1).await;
    cluster.pod("high", "3", json!({"priority": 10})).await;
    let nominated_and_leaving = |pods: &[Pod]| {
        let leaving = find(pods, "low").is_some_and(|low| low.metadata.deletion_timestamp.is_some());
        let waits = find(pods, "high").and_then(|high| nominated(high)).is_some_and(|node| node == "n1");
        leaving && waits
    };
    let pods = cluster.api.wait_for::<Pod>("victim leaving, node promised", nominated_and_leaving).await;
    let conditions = find(&pods, "low").unwrap().status.as_ref().unwrap().conditions.clone().unwrap();
    let disrupted = conditions.iter().find(|condition| condition.type_ == "DisruptionTarget").unwrap();
    assert_eq!(disrupted.reason.as_deref(), Some("PreemptionByScheduler"));
    let message = "default-scheduler: preempting to accommodate a higher priority pod";
    assert_eq!(disrupted.message.as_deref(), Some(message));
    // The room is promised: a pod of the same size and less importance does not slip in.
    cluster.pod("late", "3", json!({"priority": 5})).await;
    let api: Api<Pod> = Api::namespaced(cluster.client.clone(), "ns");
    api.delete("low", &DeleteParams::default().grace_period(0)).await.unwrap();
    let pods =
        cluster.api.wait_for::<Pod>("the high pod bound", |pods| node_named(pods, "high").is_some()).await;
    assert_eq!(node_named(&pods, "late"), None);
    let preempted = |events: &[Event]| {
        let mut events = events.iter().filter(|event| event.reason.as_deref() == Some("Preempted"));
        events.any(|event| event.message.as_deref().is_some_and(|text| text.ends_with("on node n1")))
    };
    cluster.api.wait_for::<Event>("the victim's event", preempted).await;
}

#[tokio::test(start_paused = true)]
async fn a_claim_gets_a_volume_on_the_node_before_its_pod_is_bound() {
    use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
    use k8s_openapi::api::storage::v1::StorageClass;
    let cluster = Cluster::with(crate::Config::default());
    cluster.node("n1", "4").await;
    cluster.node("n2", "4").await;
    cluster
        .create::<StorageClass>(json!({
            "metadata": {"name": "local"}, "provisioner": "kubernetes.io/no-provisioner",
            "volumeBindingMode": "WaitForFirstConsumer",
        }))
        .await;
    cluster
        .create::<PersistentVolume>(json!({
            "metadata": {"name": "disk"},
            "spec": {
                "capacity": {"storage": "5Gi"}, "accessModes": ["ReadWriteOnce"], "storageClassName": "local",
                "nodeAffinity": {"required": {"nodeSelectorTerms": [
                    {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n2"]}]},
                ]}},
            },
            "status": {"phase": "Available"},
        }))
        .await;
    let claim = json!({
        "metadata": {"name": "data", "namespace": "ns"},
        "spec": {
            "accessModes": ["ReadWriteOnce"], "storageClassName": "local", "resources": {"requests": {"storage": "1Gi"}},
        },
        "status": {"phase": "Pending"},
    });
    cluster.create::<PersistentVolumeClaim>(claim).await;
    let volume = json!({"volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "data"}}]});
    cluster.pod("p", "1", volume).await;
    let given = |volumes: &[PersistentVolume]| {
        let claim = volumes.first().and_then(|volume| volume.spec.as_ref()?.claim_ref.as_ref());
        claim.is_some_and(|claim| claim.name.as_deref() == Some("data"))
    };
    cluster.api.wait_for::<PersistentVolume>("the volume given to the claim", given).await;
    assert_eq!(bound(&cluster.api.objects::<Pod>()), 0);
    // What the persistent volume controller does then.
    let api: Api<PersistentVolumeClaim> = Api::namespaced(cluster.client.clone(), "ns");
    let complete = json!({
        "metadata": {"annotations": {"pv.kubernetes.io/bind-completed": "yes"}}, "spec": {"volumeName": "disk"},
    });
    api.patch("data", &PatchParams::default(), &Patch::Merge(complete)).await.unwrap();
    let pods = cluster.api.wait_for::<Pod>("the pod bound", |pods| bound(pods) == 1).await;
    assert_eq!(node_named(&pods, "p").as_deref(), Some("n2"));
}

#[tokio::test(start_paused = true)]
async fn each_profile_schedules_its_own_pods() {
    let config = "
apiVersion: kubescheduler.config.k8s.io/v1
kind: KubeSchedulerConfiguration
profiles:
- schedulerName: default-scheduler
- schedulerName: packing
  pluginConfig:
  - name: NodeResourcesFit
    args: {scoringStrategy: {type: MostAllocated}}
  plugins:
    score:
      disabled: [{name: '*'}]
      enabled: [{name: NodeResourcesFit}]
";
    let cluster = Cluster::with(crate::Config::parse(config).unwrap());
    cluster.node("large", "8").await;
    cluster.node("small", "4").await;
    cluster.pod("packed", "1", json!({"schedulerName": "packing"})).await;
    cluster.api.wait_for::<Pod>("one pod bound", |pods| bound(pods) == 1).await;
    cluster.pod("spread", "1", json!({})).await;
    cluster.pod("foreign", "1", json!({"schedulerName": "other"})).await;
    let pods = cluster.api.wait_for::<Pod>("two pods bound", |pods| bound(pods) == 2).await;
    assert_eq!(node_named(&pods, "spread").as_deref(), Some("large"));
    assert_eq!(node_named(&pods, "packed").as_deref(), Some("small"));
}

/// An extender on loopback: answers each POST with what `answer` makes of path and body.
async fn extender(answer: impl Fn(&str, &Value) -> Value + Send + Sync + 'static) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let answer = Arc::new(answer);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream, answer.clone()));
        }
    });
    format!("http://{address}/ext")
}

/// The same over TLS.
async fn extender_with_tls(
    tls: rustls::ServerConfig,
    answer: impl Fn(&str, &Value) -> Value + Send + Sync + 'static,
) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (answer, acceptor) = (Arc::new(answer), tokio_rustls::TlsAcceptor::from(Arc::new(tls)));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (answer, acceptor) = (answer.clone(), acceptor.clone());
            tokio::spawn(async move {
                if let Ok(stream) = acceptor.accept(stream).await {
                    serve(stream, answer).await;
                }
            });
        }
    });
    format!("localhost:{port}/ext")
}

async fn serve(
    mut stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    answer: Arc<impl Fn(&str, &Value) -> Value>,
) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut bytes = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.to_lowercase();
            let length = length.split("content-length: ").nth(1).and_then(|rest| rest.lines().next());
            if body.len() >= length.and_then(|n| n.trim().parse().ok()).unwrap_or(0) {
                let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
                let body = answer(&path, &serde_json::from_str(body).unwrap_or_default()).to_string();
                let head = format!(
                    "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
                    body.len()
                );
                if stream.write_all((head + &body).as_bytes()).await.is_err() {
                    return;
                }
                bytes.clear();
                continue;
            }
        }
        let mut more = [0; 65536];
        match stream.read(&mut more).await {
            Ok(0) | Err(_) => return,
            Ok(read) => bytes.extend_from_slice(&more[..read]),
        }
    }
}

#[tokio::test]
async fn an_extender_over_tls_proves_who_it_is_and_so_do_we() {
    use base64::Engine;
    use rustls::pki_types::PrivateKeyDer;
    let encoded = |pem: String| base64::engine::general_purpose::STANDARD.encode(pem);
    let of = |name: &str| rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
    let (server, client, stranger) = (of("localhost"), of("scheduler"), of("localhost"));
    let mut clients = rustls::RootCertStore::empty();
    clients.add(client.cert.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier =
        rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(clients), provider.clone());
    let tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(
            vec![server.cert.der().clone()],
            PrivateKeyDer::try_from(server.signing_key.serialize_der()).unwrap(),
        )
        .unwrap();
    let url = extender_with_tls(tls, |_, args| {
        let names: Vec<&Value> =
            args["NodeNames"].as_array().unwrap().iter().filter(|n| **n == "n2").collect();
        json!({"nodenames": names})
    })
    .await;
    let ours = format!(
        "certData: {}, keyData: {}",
        encoded(client.cert.pem()),
        encoded(client.signing_key.serialize_pem())
    );
    let known = |authority: &str| {
        format!(
            "urlPrefix: '{url}', enableHTTPS: true, filterVerb: filter, nodeCacheCapable: true, tlsConfig: \
             {{caData: {authority}, {ours}}}"
        )
    };
    let told = |events: &[Event]| events.iter().any(|e| e.reason.as_deref() == Some("FailedScheduling"));
    for (authority, trusted) in [(server.cert.pem(), true), (stranger.cert.pem(), false)] {
        let cluster = with_extender(&known(&encoded(authority)));
        cluster.node("n1", "4").await;
        cluster.node("n2", "4").await;
        cluster.pod("p", "1", json!({})).await;
        if !trusted {
            cluster.api.wait_for::<Event>("the pod waits for an extender it can trust", told).await;
            assert_eq!(bound(&cluster.api.objects::<Pod>()), 0);
            continue;
        }
        let pods = cluster.api.wait_for::<Pod>("the pod bound", |pods| bound(pods) == 1).await;
        assert_eq!(node_named(&pods, "p").as_deref(), Some("n2"));
    }
}

#[tokio::test]
async fn extenders_filter_score_and_refuse() {
    let url = extender(|path, args| match path {
        "/ext/filter" => {
            let names: Vec<&str> =
                args["NodeNames"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
            let wanted = args["Pod"]["metadata"]["name"] != "unwanted";
            let left: Vec<&str> = names.iter().copied().filter(|name| wanted && *name != "n1").collect();
            let failed: serde_json::Map<String, Value> = names
                .iter()
                .filter(|name| !left.contains(name))
                .map(|name| (name.to_string(), json!("no licence")))
                .collect();
            json!({"nodenames": left, "failedNodes": failed})
        }
        "/ext/prioritize" => json!([{"Host": "n3", "Score": 10}, {"Host": "n2", "Score": 0}]),
        _ => json!({"Error": format!("unknown path {path}")}),
    })
    .await;
    let config = format!(
        "
apiVersion: kubescheduler.config.k8s.io/v1
kind: KubeSchedulerConfiguration
extenders:
- {{urlPrefix: '{url}', filterVerb: filter, prioritizeVerb: prioritize, weight: 100, nodeCacheCapable: true}}
- {{urlPrefix: 'http://127.0.0.1:1', filterVerb: filter, ignorable: true}}
"
    );
    let cluster = Cluster::with(crate::Config::parse(&config).unwrap());
    for name in ["n1", "n2", "n3"] {
        cluster.node(name, "4").await;
    }
    cluster.pod("wanted", "1", json!({})).await;
    let pods = cluster.api.wait_for::<Pod>("the pod bound", |pods| bound(pods) == 1).await;
    assert_eq!(node_named(&pods, "wanted").as_deref(), Some("n3"));
    cluster.pod("unwanted", "1", json!({})).await;
    let told = |pods: &[Pod]| {
        let conditions = find(pods, "unwanted")
            .and_then(|pod| pod.status.as_ref()?.conditions.clone())
            .unwrap_or_default();
        conditions.iter().any(|condition| {
            let message = condition.message.as_deref().unwrap_or_default();
            message.starts_with("0/3 nodes are available: 3 no licence. preemption: ")
        })
    };
    cluster.api.wait_for::<Pod>("the refusal", told).await;
}

fn with_extender(settings: &str) -> Cluster {
    let config = format!(
        "
apiVersion: kubescheduler.config.k8s.io/v1
kind: KubeSchedulerConfiguration
podInitialBackoffSeconds: 1
podMaxBackoffSeconds: 1
extenders:
- {{{settings}}}
"
    );
    Cluster::with(crate::Config::parse(&config).unwrap())
}

#[tokio::test]
async fn an_extender_binds_in_our_stead() {
    let (asked, mut questions) = tokio::sync::mpsc::unbounded_channel();
    let refusals = Arc::new(std::sync::atomic::AtomicUsize::new(1));
    let url = extender(move |path, args| {
        asked.send((path.to_owned(), args.clone())).unwrap();
        // The first time it has a reason not to.
        match refusals.fetch_sub(1, std::sync::atomic::Ordering::SeqCst) {
            1 => json!({"Error": "the licence server is down"}),
            _ => json!({}),
        }
    })
    .await;
    let cluster = with_extender(&format!("urlPrefix: '{url}', bindVerb: bind"));
    cluster.node("n1", "4").await;
    cluster.pod("p", "1", json!({})).await;
    let failed = |events: &[Event]| {
        events.iter().any(|event| {
            let message = event.message.as_deref().unwrap_or_default();
            event.reason.as_deref() == Some("FailedScheduling") && message.contains("licence server is down")
        })
    };
    cluster.api.wait_for::<Event>("the refusal told", failed).await;
    for _ in 0..2 {
        let (path, args) = questions.recv().await.unwrap();
        assert_eq!(path, "/ext/bind");
        let named = [&args["PodName"], &args["PodNamespace"], &args["Node"]];
        assert_eq!(named, ["p", "ns", "n1"]);
    }
    // What it did about the second question, only it knows; the pod counts as bound.
    let told = |events: &[Event]| events.iter().any(|event| event.reason.as_deref() == Some("Scheduled"));
    cluster.api.wait_for::<Event>("the binding told", told).await;
    let bindings = cluster.api.take_writes();
    assert!(bindings.iter().all(|write| !write.ends_with("/binding")), "we bound, too: {bindings:?}");
}

#[tokio::test]
async fn an_extender_chooses_whose_victims_go() {
    let url = extender(|path, args| {
        assert_eq!(path, "/ext/preempt");
        let victims = &args["NodeNameToMetaVictims"];
        assert!(["n1", "n2", "n3"].iter().all(|node| victims[node]["Pods"][0]["UID"].is_string()), "{args}");
        json!({"nodeNameToMetaVictims": {"n2": victims["n2"]}})
    })
    .await;
    let cluster = with_extender(&format!("urlPrefix: '{url}', preemptVerb: preempt, nodeCacheCapable: true"));
    for name in ["n1", "n2", "n3"] {
        cluster.node(name, "4").await;
        cluster.pod(&format!("low-{name}"), "3", json!({})).await;
    }
    cluster.api.wait_for::<Pod>("the low pods bound", |pods| bound(pods) == 3).await;
    cluster.pod("high", "3", json!({"priority": 10})).await;
    let promised = |pods: &[Pod]| find(pods, "high").and_then(|high| nominated(high)) == Some("n2");
    let pods = cluster.api.wait_for::<Pod>("the node of its choice promised", promised).await;
    let left: Vec<Option<String>> =
        pods.iter().filter_map(|pod| node_of(pod).map(|n| Some(n.to_owned()))).collect();
    assert!(left.contains(&Some("n1".to_owned())) && left.contains(&Some("n3".to_owned())), "{left:?}");
}

#[tokio::test]
async fn without_the_extender_that_must_agree_nobody_goes() {
    let cluster = with_extender("urlPrefix: 'http://127.0.0.1:1/ext', preemptVerb: preempt");
    cluster.node("n1", "4").await;
    cluster.pod("low", "3", json!({})).await;
    cluster.api.wait_for::<Pod>("the low pod bound", |pods| bound(pods) == 1).await;
    cluster.pod("high", "3", json!({"priority": 10})).await;
    let told = |events: &[Event]| events.iter().any(|e| e.reason.as_deref() == Some("FailedScheduling"));
    cluster.api.wait_for::<Event>("the refusal told", told).await;
    let pods = cluster.api.objects::<Pod>();
    assert_eq!((pods.len(), nominated(find(&pods, "high").unwrap())), (2, None));
}

/// As the workload of the benchmark: gated pods do not hold up others, and go when they may, the most important first.
#[tokio::test(start_paused = true)]
async fn gated_pods_cost_the_others_nothing_and_go_when_their_gates_do() {
    let cluster = Cluster::with(crate::Config::default());
    for number in 0..10 {
        cluster.node(&format!("n{number}"), "10").await;
    }
    for number in 0..50 {
        let priority = if number % 2 == 0 { 5 } else { 0 };
        let gates = json!({"schedulingGates": [{"name": "a"}, {"name": "b"}], "priority": priority});
        cluster.pod(&format!("gated-{number}"), "1", gates).await;
        cluster.pod(&format!("plain-{number}"), "1", json!({})).await;
    }
    cluster.api.wait_for::<Pod>("the plain pods bound", |pods| bound(pods) == 50).await;
    let api: Api<Pod> = Api::namespaced(cluster.client.clone(), "ns");
    let gates = |left: Value| Patch::Merge(json!({"spec": {"schedulingGates": left}}));
    for number in 0..50 {
        let name = format!("gated-{number}");
        api.patch(&name, &PatchParams::default(), &gates(json!([{"name": "b"}]))).await.unwrap();
    }
    cluster.api.settle(Duration::from_secs(60)).await;
    assert_eq!(bound(&cluster.api.objects::<Pod>()), 50, "one gate of two is enough to wait");
    for number in 0..50 {
        api.patch(&format!("gated-{number}"), &PatchParams::default(), &gates(json!(null))).await.unwrap();
    }
    cluster.api.wait_for::<Pod>("all pods bound", |pods| bound(pods) == 100).await;
}

/// As the workload of the benchmark: all kinds of pods, while nodes and pods come and go, and writes fail.
#[tokio::test(start_paused = true)]
async fn all_kinds_of_pods_find_their_nodes_while_nodes_and_pods_come_and_go() {
    for seed in 0..3 {
        let faults = Faults { conflict: 0.05, error: 0.1, drop_watch: 0.05, duplicate: 0.1 };
        let cluster = Cluster::new(seed, faults);
        let node = |number: usize| {
            json!({
                "metadata": {"name": format!("n{number}"), "labels": {
                    HOST: format!("n{number}"), ZONE: format!("z{}", number % 3),
                }},
                "status": {"allocatable": {"cpu": "16", "memory": "8Gi", "pods": "110"}},
            })
        };
        let nodes: Api<Node> = Api::all(cluster.client.clone());
        let add = async |number: usize| {
            let node: Node = serde_json::from_value(node(number)).unwrap();
            while nodes.create(&PostParams::default(), &node).await.is_err_and(|error| !is(&error, 409)) {}
        };
        for number in 0..9 {
            add(number).await;
        }
        let term = |topology: &str, app: &str| json!([{"topologyKey": topology, "labelSelector": {"matchLabels": {"app": app}}}]);
        let required = |term: Value| json!({"requiredDuringSchedulingIgnoredDuringExecution": term});
        let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), "ns");
        for number in 0..36 {
            let (app, spec) = match number % 4 {
                0 => ("plain", json!({})),
                1 => ("near", json!({"affinity": {"podAffinity": required(term(ZONE, "near"))}})),
                2 => ("apart", json!({"affinity": {"podAntiAffinity": required(term(HOST, "apart"))}})),
                _ => (
                    "even",
                    json!({"topologySpreadConstraints": [{
                        "maxSkew": 1, "topologyKey": ZONE, "whenUnsatisfiable": "DoNotSchedule",
                        "labelSelector": {"matchLabels": {"app": "even"}},
                    }]}),
                ),
            };
            let mut pod = json!({
                "metadata": {"name": format!("p{number}"), "labels": {"app": app}}, "spec": spec,
            });
            pod["spec"]["containers"] = json!([{"name": "c", "resources": {"requests": {"cpu": "1"}}}]);
            let pod: Pod = serde_json::from_value(pod).unwrap();
            while pods.create(&PostParams::default(), &pod).await.is_err() {}
            // A node without pods comes and goes, and with it a pod that fits nowhere else.
            match number % 6 {
                0 => cluster.pod(&format!("passing-{number}"), "100", json!({})).await,
                3 => add(100).await,
                5 => {
                    while nodes.delete("n100", &DeleteParams::default()).await.is_err_and(|e| !is(&e, 404)) {}
                }
                _ => {}
            }
        }
        let settled = |pods: &[Pod]| bound(pods) == 36;
        let there = cluster.api.wait_for::<Pod>("all but the passing pods bound", settled).await;
        let on = |app: &str| -> Vec<&str> {
            let of_app = there.iter().filter(|pod| {
                pod.metadata.labels.as_ref().is_some_and(|labels| labels.get("app").is_some_and(|a| a == app))
            });
            of_app.filter_map(|pod| node_of(pod)).collect()
        };
        let zone = |node: &str| node[1..].parse::<usize>().unwrap() % 3;
        let near: BTreeSet<usize> = on("near").into_iter().map(zone).collect();
        assert_eq!(near.len(), 1, "seed {seed}: {:?}", on("near"));
        let apart: BTreeSet<&str> = on("apart").into_iter().collect();
        assert_eq!(apart.len(), 9, "seed {seed}: {:?}", on("apart"));
        let even = on("even");
        for number in 0..3 {
            assert_eq!(even.iter().filter(|node| zone(node) == number).count(), 3, "seed {seed}: {even:?}");
        }
    }
}

const HOST: &str = "kubernetes.io/hostname";
const ZONE: &str = "topology.kubernetes.io/zone";

fn is(error: &kube::Error, code: u16) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == code)
}

const ELECTED: &str = "
apiVersion: kubescheduler.config.k8s.io/v1
kind: KubeSchedulerConfiguration
leaderElection: {leaderElect: true}
";

async fn lease(api: &FakeApi) -> (Api<Lease>, Lease) {
    let leases: Api<Lease> = Api::namespaced(api.client(), "kube-system");
    api.wait_for::<Lease>("a lease", |leases| !leases.is_empty()).await;
    let lease = leases.get("kube-scheduler").await.unwrap();
    (leases, lease)
}

#[tokio::test(start_paused = true)]
async fn of_two_schedulers_one_decides_and_each_pod_is_bound_once() {
    let mut cluster = Cluster::new(1, Faults::default());
    // The cluster's own scheduler is not wanted here.
    cluster._stop = CancellationToken::new().drop_guard();
    cluster.api.settle(Duration::from_secs(1)).await;
    let config = crate::Config::parse(ELECTED).unwrap();
    let stops: Vec<CancellationToken> = (0..2).map(|_| CancellationToken::new()).collect();
    let schedulers: Vec<_> = stops
        .iter()
        .map(|stop| {
            let informers = Informers::new(cluster.api.client());
            tokio::spawn(Scheduler::run_with(informers, config.clone(), stop.clone()))
        })
        .collect();
    cluster.node("n1", "64").await;
    cluster.api.take_writes();
    let mut expected = 0;
    let mut holders = BTreeSet::new();
    for term in 0..4 {
        for number in 0..5 {
            cluster.pod(&format!("p{term}-{number}"), "1", json!({})).await;
        }
        expected += 5;
        cluster.api.wait_for::<Pod>("all bound", |pods| bound(pods) == expected).await;
        let (leases, mut held) = lease(&cluster.api).await;
        let spec = held.spec.as_mut().unwrap();
        holders.insert(spec.holder_identity.replace("an intruder".to_owned()).unwrap());
        // Whoever led finds the lease in other hands; both stand again, and one leads once it has run out.
        leases.replace("kube-scheduler", &PostParams::default(), &held).await.unwrap();
        tokio::time::sleep(Duration::from_secs(3)).await;
        cluster.pod(&format!("late-{term}"), "1", json!({})).await;
        expected += 1;
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(bound(&cluster.api.objects::<Pod>()), expected - 1, "nobody leads, so nobody binds");
        cluster.api.wait_for::<Pod>("the late pod bound", |pods| bound(pods) == expected).await;
    }
    assert!(holders.len() >= 4, "each term has a candidacy of its own: {holders:?}");
    let mut bindings: Vec<String> =
        cluster.api.take_writes().into_iter().filter(|write| write.ends_with("/binding")).collect();
    bindings.sort();
    let all = bindings.len();
    bindings.dedup();
    assert_eq!((all, bindings.len()), (expected, expected), "each pod is bound once");
    // A leader that goes in peace gives the lease back: the other need not wait for it to run out.
    let (_, held) = lease(&cluster.api).await;
    stops[0].cancel();
    tokio::time::sleep(Duration::from_secs(3)).await;
    cluster.pod("last", "1", json!({})).await;
    let begin = Instant::now();
    cluster.api.wait_for::<Pod>("the last pod bound", |pods| bound(pods) == expected + 1).await;
    assert!(begin.elapsed() < Duration::from_secs(5), "it took {:?}, held by {held:?}", begin.elapsed());
    stops[1].cancel();
    for scheduler in schedulers {
        scheduler.await.unwrap();
    }
}

/// What a term left undone, the next one does: the very same scheduler, with the watches it has.
#[tokio::test(start_paused = true)]
async fn a_pod_whose_binding_was_cut_off_is_bound_in_the_next_term() {
    let api = FakeApi::new();
    let informers = Informers::new(api.client());
    let recorder = Recorder::new(api.client(), Clock::System, "test", "");
    let scheduler = Scheduler::new(crate::Config::default(), &informers, &recorder, Clock::System, 1);
    let watchers = Arc::weak_count(&scheduler.shared);
    for term in 0..3 {
        let stop = CancellationToken::new();
        let cluster = Cluster {
            api: api.clone(),
            client: api.client(),
            _informers: informers.clone(),
            _stop: CancellationToken::new().drop_guard(),
        };
        if term == 0 {
            cluster.node("n1", "64").await;
        }
        cluster.pod(&format!("p{term}"), "1", json!({})).await;
        // Every write fails for now, so the pod is in work when the term ends.
        api.set_faults(Faults { error: 1.0, ..Faults::default() });
        let term_length = Duration::from_millis(700);
        let _ = tokio::time::timeout(term_length, scheduler.decide_until(&stop)).await;
        stop.cancel();
        scheduler.stand_down();
        assert!(scheduler.shared.state.lock().assumed.is_empty(), "nothing is promised to nobody");
        api.set_faults(Faults::default());
        let stop = CancellationToken::new();
        let all_bound = api.wait_for::<Pod>("all bound", |pods| bound(pods) == term + 1);
        tokio::select! {
            () = scheduler.decide_until(&stop) => panic!("nobody stopped it"),
            _ = all_bound => {}
        }
        stop.cancel();
        scheduler.stand_down();
    }
    assert_eq!(Arc::weak_count(&scheduler.shared), watchers, "terms add no watches");
}

#[tokio::test(start_paused = true)]
async fn what_was_done_is_counted_under_upstream_s_names() {
    let cluster = Cluster::with(crate::Config::default());
    cluster.node("n1", "4").await;
    cluster.pod("p", "3", json!({})).await;
    cluster.api.wait_for::<Pod>("the pod bound", |pods| bound(pods) == 1).await;
    let text = crate::metrics::print();
    cluster.pod("too-big", "30", json!({})).await;
    cluster.pod("gated", "1", json!({"schedulingGates": [{"name": "wait"}]})).await;
    let told = |events: &[Event]| events.iter().any(|e| e.reason.as_deref() == Some("FailedScheduling"));
    cluster.api.wait_for::<Event>("the refusal told", told).await;
    let text = text + &crate::metrics::print();
    let point = |point: &str, status: &str| {
        format!(
            "scheduler_framework_extension_point_duration_seconds_bucket{{extension_point=\"{point}\",\
             profile=\"default-scheduler\",status=\"{status}\",le=\"0.0001\"}}"
        )
    };
    for name in [
        "scheduler_schedule_attempts_total{profile=\"default-scheduler\",result=\"scheduled\"}",
        "scheduler_pending_pods{queue=\"active\"}",
        "scheduler_pending_pods{queue=\"gated\"} ",
        "scheduler_unschedulable_pods{plugin=\"NodeResourcesFit\",profile=\"default-scheduler\"} ",
        "scheduler_preemption_victims_bucket{le=\"64\"}",
        "scheduler_preemption_attempts_total",
        "scheduler_queue_incoming_pods_total{event=\"UnschedulablePodAdd\",queue=\"active\"}",
        "scheduler_queue_incoming_pods_total{event=\"UnschedulablePodAdd\",queue=\"unschedulable\"}",
        "scheduler_queue_incoming_pods_total{event=\"ScheduleAttemptFailure\",queue=\"unschedulable\"}",
        "scheduler_plugin_execution_duration_seconds_count{extension_point=\"Filter\",\
         plugin=\"NodeResourcesFit\",status=\"Success\"}",
        &point("PreFilter", "Success"),
        &point("Filter", "Unschedulable"),
        &point("PostFilter", "Unschedulable"),
        &point("PreBind", "Success"),
        &point("Bind", "Success"),
    ] {
        assert!(text.contains(name), "{name} is missing in\n{text}");
    }
}
