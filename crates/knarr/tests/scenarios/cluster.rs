//! The cluster of the scenarios: API server in memory, all control loops, the scheduler and simulated nodes in this
//! process, our own kubectl as a program beside it. One cluster serves all tests; each has a namespace of its own.
//!
//! What a user types goes through [`Scene::run`], so that what kubectl prints is checked too. What is awaited is read
//! straight from the server ([`Scene::until`]): a look costs microseconds, not a process.

use std::convert::Infallible;
use std::io::Write;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use http::Request;
use http_body_util::{BodyExt, Full};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use knarr_apiserver::api::{Api, Peer};
use knarr_apiserver::authn::Tokens;
use knarr_apiserver::bootstrap;
use knarr_apiserver::identity::{MASTERS, User};
use knarr_apiserver::proxy::Dialer;
use knarr_apiserver::rbac::Rbac;
use knarr_apiserver::registry::Registry;
use knarr_apiserver::server::InProcess;
use knarr_apiserver::services::Allocator;
use knarr_client::{Client, Clock, connect};
use knarr_controllers::{Config, Context, ControllerManager};
use knarr_scheduler::Scheduler;
use knarr_simulated::NewNode;
use knarr_store::engine::Memory;
use knarr_store::{Embedded, Options};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(40);
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// Nodes that everybody's pods may run on.
const SHARED_NODES: usize = 3;

static CLUSTER: LazyLock<Cluster> = LazyLock::new(Cluster::start);

struct Cluster {
    api: Arc<Api>,
    runtime: tokio::runtime::Runtime,
    /// Holds the kubeconfig.
    home: tempfile::TempDir,
}

impl Cluster {
    fn start() -> Cluster {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime starts");
        let home = tempfile::tempdir().expect("a directory");
        let api = runtime.block_on(async {
            let api = server().await;
            start_loops(&api);
            let address = serve(api.clone()).await;
            let config = json!({
                "apiVersion": "v1", "kind": "Config", "current-context": "scenes",
                "clusters": [{ "name": "scenes", "cluster": { "server": format!("http://{address}") } }],
                "users": [{ "name": "admin", "user": {} }],
                "contexts": [{ "name": "scenes", "context": { "cluster": "scenes", "user": "admin" } }],
            });
            std::fs::write(home.path().join("config"), config.to_string())
                .expect("the directory is writable");
            api
        });
        let cluster = Cluster { api, runtime, home };
        for number in 1..=SHARED_NODES {
            cluster.add_node(NewNode { name: format!("shared-{number}"), ..Default::default() }, json!([]));
        }
        cluster
    }

    fn ask(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("content-type", "application/json")
            .body(Full::new(body.to_owned().into()).map_err(|never| match never {}).boxed_unsync())
            .expect("a request");
        let peer = Peer::InProcess(User::new("admin", &[MASTERS]));
        self.runtime.block_on(async {
            let (parts, body) = self.api.handle(request, &peer).await.into_parts();
            let bytes = body.collect().await.expect("a body").to_bytes();
            (parts.status.as_u16(), serde_json::from_slice(&bytes).unwrap_or_default())
        })
    }

    fn add_node(&self, node: NewNode, taints: Value) {
        let mut object = serde_json::to_value(node.object()).expect("a node is an object");
        object["apiVersion"] = "v1".into();
        object["kind"] = "Node".into();
        object["spec"] = json!({ "taints": taints });
        let (status, answer) = self.ask("POST", "/api/v1/nodes", &object.to_string());
        assert_eq!(status, 201, "{answer}");
    }
}

async fn server() -> Arc<Api> {
    let store = Embedded::open_inline(Memory::default(), Options::default()).expect("an empty store opens");
    let store = Arc::new(store);
    let registry = Arc::new(Registry {
        services: Allocator::load(&*store, "10.96.0.0/16".parse().expect("a range"), 30_000..=32_767),
        schema: knarr_api::schema::Schema::builtin(),
        quotas: Default::default(),
        health: Default::default(),
        clock: Arc::new(jiff::Timestamp::now),
        store: store.clone(),
    });
    bootstrap::run(&registry, &["192.0.2.1:6443".parse().expect("an address")]).await.expect("first objects");
    let key = rcgen::KeyPair::generate().expect("a key");
    let tokens =
        Tokens::new("https://kubernetes.default.svc", key.serialize_pem().as_bytes(), key.public_key_raw())
            .expect("a fresh key is valid");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring speaks TLS")
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    Arc::new(Api {
        rbac: Rbac::new(store),
        registry,
        tokens: Arc::new(tokens),
        dialer: Dialer::new(Arc::new(tls)),
        address: "192.0.2.1:6443".to_owned(),
        old_versions: true,
    })
}

/// As the binary starts them, each under its own name; until the process ends.
fn start_loops(api: &Arc<Api>) {
    let client = |name: &str, groups: &[&str]| -> Client {
        connect::in_process(InProcess::new(api.clone(), User::new(name, groups)))
    };
    let never = CancellationToken::new();
    let config = Config {
        root_ca: "PEM".to_owned(),
        // Pods of a deleted node go without the 40 seconds that a node may take to come back.
        orphan_quarantine: Duration::from_millis(200),
        ..Config::default()
    };
    let authenticated = ["system:authenticated"];
    let context =
        Context::new(client("system:kube-controller-manager", &authenticated), config, Clock::System);
    let caches = context.informers.acting_as(client("system:kube-scheduler", &authenticated));
    tokio::spawn(ControllerManager::run_with(context, never.clone()));
    tokio::spawn(Scheduler::run_with(caches, knarr_scheduler::Config::default(), never.clone()));
    let nodes = client("system:simulated-nodes", &[MASTERS]);
    tokio::spawn(knarr_simulated::run(nodes, Clock::System, knarr_simulated::Config::default(), never));
}

/// Plain HTTP on the loopback interface, for kubectl.
async fn serve(api: Arc<Api>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let api = api.clone();
            let service = service_fn(move |request: Request<hyper::body::Incoming>| {
                let api = api.clone();
                async move {
                    let request = request.map(|body| body.map_err(std::io::Error::other).boxed_unsync());
                    let peer = Peer::InProcess(User::new("admin", &[MASTERS]));
                    Ok::<_, Infallible>(api.handle(request, &peer).await)
                }
            });
            tokio::spawn(async move {
                let builder = auto::Builder::new(TokioExecutor::new());
                drop(builder.serve_connection(TokioIo::new(stream), service).await);
            });
        }
    });
    address
}

/// One scenario: a namespace, and a user at a terminal.
pub struct Scene {
    pub namespace: &'static str,
}

impl Scene {
    /// Makes the namespace; each scenario names its own.
    pub fn new(namespace: &'static str) -> Scene {
        let scene = Scene { namespace };
        scene.says(&format!("create namespace {namespace}"), &format!("namespace/{namespace} created"));
        scene.until("the default service account", "serviceaccounts/default", |account| {
            account["metadata"]["name"] == "default"
        });
        scene
    }

    /// Runs kubectl with the words of the line, in the scenario's namespace: whether it succeeded, and what it printed.
    pub fn run(&self, line: &str, input: &str) -> (bool, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_knarr"));
        command.arg("kubectl").arg("-n").arg(self.namespace).args(words(line)).env_clear();
        command.env("HOME", CLUSTER.home.path()).env("KUBECONFIG", CLUSTER.home.path().join("config"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("kubectl starts");
        let mut stdin = child.stdin.take().expect("a pipe");
        // Who reads no input may be gone already.
        stdin.write_all(input.as_bytes()).ok();
        drop(stdin);
        let output = child.wait_with_output().expect("kubectl ends");
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(text).expect("text"))
    }

    /// What a command prints that succeeds.
    pub fn ok(&self, line: &str) -> String {
        let (ok, text) = self.run(line, "");
        assert!(ok, "kubectl {line}: {text}");
        text
    }

    /// What a command prints that fails.
    pub fn fails(&self, line: &str) -> String {
        let (ok, text) = self.run(line, "");
        assert!(!ok, "kubectl {line} succeeds: {text}");
        text
    }

    /// Runs a command and compares all it prints.
    pub fn says(&self, line: &str, wanted: &str) {
        assert_eq!(self.ok(line).trim_end(), wanted, "kubectl {line}");
    }

    /// `apply -f -`, and what it prints.
    pub fn apply(&self, manifest: &str) -> String {
        let (ok, text) = self.run("apply -f -", manifest);
        assert!(ok, "kubectl apply: {text}\n{manifest}");
        text.trim_end().to_owned()
    }

    /// `apply -f -` of what the server refuses, and its words.
    pub fn refused(&self, manifest: &str) -> String {
        let (ok, text) = self.run("apply -f -", manifest);
        assert!(!ok, "kubectl apply succeeds: {text}\n{manifest}");
        text
    }

    /// The cells of a row of `kubectl get`, but its last, the age.
    pub fn row(&self, line: &str) -> Vec<String> {
        let text = self.ok(&format!("get {line} --no-headers"));
        let mut cells: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        cells.pop();
        cells
    }

    /// Waits as `rollout status` does, and returns its lines.
    pub fn rollout(&self, which: &str) -> Vec<String> {
        let text = self.ok(&format!("rollout status {which} --timeout=30s"));
        text.lines().map(str::to_owned).collect()
    }

    /// An object, or Null: `pods/web-0`, `nodes/x`.
    pub fn object(&self, which: &str) -> Value {
        let (plural, name) = which.split_once('/').expect("plural/name");
        let (status, answer) = CLUSTER.ask("GET", &format!("{}/{name}", self.path(plural)), "");
        if status == 200 { answer } else { Value::Null }
    }

    /// All of a kind in the namespace, oldest first.
    pub fn list(&self, plural: &str) -> Vec<Value> {
        let (status, mut answer) = CLUSTER.ask("GET", &self.path(plural), "");
        assert_eq!(status, 200, "{plural}: {answer}");
        let Value::Array(mut items) = answer["items"].take() else { return Vec::new() };
        items.sort_by_key(|item| item["metadata"]["creationTimestamp"].to_string());
        items
    }

    /// The pods with this label that nobody has deleted.
    pub fn pods(&self, label: &str) -> Vec<Value> {
        let (key, value) = label.split_once('=').expect("key=value");
        let mut pods = self.list("pods");
        pods.retain(|pod| {
            pod["metadata"]["labels"][key] == value && pod["metadata"]["deletionTimestamp"].is_null()
        });
        pods
    }

    /// Sends a request past kubectl; status and answer.
    pub fn post(&self, plural: &str, below: &str, body: &Value) -> (u16, Value) {
        CLUSTER.ask("POST", &format!("{}{below}", self.path(plural)), &body.to_string())
    }

    fn path(&self, plural: &str) -> String {
        let group = match plural {
            "deployments" | "replicasets" | "daemonsets" | "statefulsets" | "controllerrevisions" => {
                "apis/apps/v1"
            }
            "jobs" | "cronjobs" => "apis/batch/v1",
            "horizontalpodautoscalers" => "apis/autoscaling/v2",
            "poddisruptionbudgets" => "apis/policy/v1",
            _ => "api/v1",
        };
        match plural {
            "nodes" | "namespaces" | "persistentvolumes" => format!("/{group}/{plural}"),
            _ => format!("/{group}/namespaces/{}/{plural}", self.namespace),
        }
    }

    /// Waits until an object is as wanted; one that is missing is Null.
    pub fn until(&self, what: &str, which: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let mut last = Value::Null;
        self.wait(what, || {
            last = self.object(which);
            wanted(&last).then(|| last.clone()).ok_or_else(|| format!("{which} is {last:#}"))
        })
    }

    /// Waits until the pods with the label are as wanted; pods on their way out do not count.
    pub fn until_pods(&self, what: &str, label: &str, wanted: impl Fn(&[Value]) -> bool) -> Vec<Value> {
        self.wait(what, || {
            let pods = self.pods(label);
            if wanted(&pods) { Ok(pods) } else { Err(format!("{pods:#?}")) }
        })
    }

    /// Waits until so many pods with the label are ready, and no others are there.
    pub fn until_ready(&self, count: usize, label: &str) -> Vec<Value> {
        let what = format!("{count} ready pods with {label}");
        self.until_pods(&what, label, |pods| pods.len() == count && pods.iter().all(is_ready))
    }

    /// Waits until an event with this reason contains the text; its message.
    pub fn until_event(&self, reason: &str, text: &str) -> String {
        self.wait(&format!("an event {reason} with {text:?}"), || {
            let events = self.list("events");
            let mut messages =
                events.iter().filter(|e| e["reason"] == reason).map(|e| text_of(&e["message"]));
            let found = messages.find(|message| message.contains(text));
            found.ok_or_else(|| {
                format!("{}{}", self.ok("get events"), self.ok("get all -o wide --show-labels"))
            })
        })
    }

    /// Looks until there is an answer; the error says what is there instead.
    pub fn wait<T>(&self, what: &str, mut look: impl FnMut() -> Result<T, String>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match look() {
                Ok(found) => return found,
                Err(state) if Instant::now() > deadline => panic!("waited {PATIENCE:?} for {what}; {state}"),
                Err(_) => std::thread::sleep(LOOK_AGAIN),
            }
        }
    }

    /// Adds simulated nodes named after the namespace and numbered from 1, with a label `pool` of the namespace's name.
    /// Their taint, also of that name, keeps the pods of other scenarios away.
    pub fn nodes(&self, count: usize) -> Vec<String> {
        let names: Vec<String> = (1..=count).map(|number| format!("{}-{number}", self.namespace)).collect();
        for name in &names {
            let labels = [("pool".to_owned(), self.namespace.to_owned())].into();
            let taint = json!([{ "key": "pool", "value": self.namespace, "effect": "NoSchedule" }]);
            CLUSTER.add_node(NewNode { name: name.clone(), labels, ..Default::default() }, taint);
            self.until("the node is ready", &format!("nodes/{name}"), |node| {
                condition(node, "Ready")["status"] == "True"
            });
        }
        names
    }
}

/// Words as a shell splits them, as far as the scenarios need it: single quotes hold words together.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut quoted, mut word) = (Vec::new(), false, None::<String>);
    for letter in line.chars() {
        match letter {
            '\'' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            ' ' | '\n' if !quoted => words.extend(word.take()),
            _ => word.get_or_insert_default().push(letter),
        }
    }
    words.extend(word);
    words
}

pub fn text_of(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

pub fn name(object: &Value) -> String {
    text_of(&object["metadata"]["name"])
}

/// A number in a status, where nothing means none.
pub fn count(value: &Value) -> i64 {
    value.as_i64().unwrap_or(0)
}

/// The names of objects, in alphabetical order.
pub fn names(objects: &[Value]) -> Vec<String> {
    let mut names: Vec<String> = objects.iter().map(name).collect();
    names.sort();
    names
}

/// The condition of a type, or Null.
pub fn condition(object: &Value, kind: &str) -> Value {
    let conditions = object["status"]["conditions"].as_array();
    conditions.into_iter().flatten().find(|c| c["type"] == kind).cloned().unwrap_or_default()
}

pub fn is_ready(pod: &Value) -> bool {
    condition(pod, "Ready")["status"] == "True"
}

pub fn image(pod: &Value) -> String {
    text_of(&pod["spec"]["containers"][0]["image"])
}

/// The name of the controller, or nothing.
pub fn owner(object: &Value) -> String {
    text_of(&object["metadata"]["ownerReferences"][0]["name"])
}
