//! What the loops' tests share: an API, a context on virtual time, and short ways to write objects.

use crate::{Config, Context, pods};
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::Pod;
use knarr_client::Clock;
use knarr_client::testing::{FakeApi, Faults};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use kube::{Client, Resource};
use parking_lot::Mutex;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::fmt::Debug;
use std::time::Duration;
use tokio_util::sync::{CancellationToken, DropGuard};

pub const NAMESPACE: &str = "ns";
/// How often a test's own write is tried when faults are injected.
const TRIES: usize = 100;

pub struct Harness {
    pub api: FakeApi,
    pub context: Context,
    started: Mutex<Vec<Start>>,
    shutdown: CancellationToken,
    _stop: DropGuard,
}

type Start = fn(Context, CancellationToken) -> BoxFuture<'static, ()>;

pub trait Object:
    Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
    + Clone
    + DeserializeOwned
    + Serialize
    + Debug
{
}
impl<K> Object for K where
    K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + DeserializeOwned
        + Serialize
        + Debug
{
}

impl Harness {
    pub fn new(seed: u64, faults: Faults) -> Self {
        Self::with_config(seed, faults, Config { root_ca: "PEM".into(), ..Default::default() })
    }

    pub fn quiet() -> Self {
        Self::new(0, Faults::default())
    }

    pub fn with_config(seed: u64, faults: Faults, config: Config) -> Self {
        let api = FakeApi::seeded(seed, faults);
        let clock = Clock::starting_at(jiff::Timestamp::now());
        let context = Context::new(api.client(), config, clock);
        let shutdown = CancellationToken::new();
        Harness {
            api,
            context,
            started: Mutex::default(),
            shutdown: shutdown.clone(),
            _stop: shutdown.drop_guard(),
        }
    }

    pub fn start(&self, start: Start) {
        self.started.lock().push(start);
        tokio::spawn(start(self.context.clone(), self.shutdown.clone()));
    }

    pub fn client(&self) -> Client {
        self.context.client.clone()
    }

    pub fn api_of<K: Object>(&self) -> Api<K> {
        Api::namespaced(self.client(), NAMESPACE)
    }

    pub async fn create<K: Object>(&self, object: Value) -> K {
        let object: K = serde_json::from_value(object).expect("the test's object has its kind's shape");
        let api = self.api_of::<K>();
        let params = PostParams::default();
        insist(|| api.create(&params, &object)).await
    }

    /// For cluster-scoped kinds.
    pub async fn create_global<K>(&self, object: Value) -> K
    where
        K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Serialize + Debug,
    {
        let object: K = serde_json::from_value(object).expect("the test's object has its kind's shape");
        let api: Api<K> = Api::all(self.client());
        let params = PostParams::default();
        insist(|| api.create(&params, &object)).await
    }

    pub async fn patch<K: Object>(&self, name: &str, patch: Value) -> K {
        let api = self.api_of::<K>();
        let (params, patch) = (PatchParams::default(), Patch::Merge(&patch));
        insist(|| api.patch(name, &params, &patch)).await
    }

    pub async fn patch_status<K: Object>(&self, name: &str, status: Value) -> K {
        let api = self.api_of::<K>();
        let patch = json!({"status": status});
        let (params, patch) = (PatchParams::default(), Patch::Merge(&patch));
        insist(|| api.patch_status(name, &params, &patch)).await
    }

    pub async fn delete<K: Object>(&self, name: &str) {
        let api = self.api_of::<K>();
        let params = DeleteParams::default();
        let _ = insist(|| api.delete(name, &params)).await;
    }

    /// Makes a pod run and be ready since now.
    pub async fn make_ready(&self, name: &str) {
        let now = self.context.clock.time();
        let ready = json!({"type": "Ready", "status": "True", "lastTransitionTime": now});
        self.patch_status::<Pod>(name, json!({"phase": "Running", "conditions": [ready]})).await;
    }

    /// Lets everything settle, then starts every loop afresh beside the first and expects no write: the loops are
    /// idempotent.
    pub async fn assert_quiet(&self) {
        self.api.settle(Duration::from_secs(30)).await;
        self.api.take_writes();
        let config = (*self.context.config).clone();
        let second = Context::new(self.client(), config, self.context.clock.clone());
        for start in self.started.lock().iter() {
            tokio::spawn(start(second.clone(), self.shutdown.clone()));
        }
        self.api.settle(Duration::from_secs(10)).await;
        let writes = self.api.take_writes();
        assert!(writes.is_empty(), "a second run writes nothing, but there was {writes:?}");
    }
}

/// A small kubelet for all pods: makes them ready after a moment and finishes their deletion.
pub fn run_kubelet(harness: &Harness) {
    let pods = harness.context.informers.get::<Pod>();
    let api: Api<Pod> = harness.api_of();
    let keys = pods.subscribe();
    let clock = harness.context.clock.clone();
    tokio::spawn(async move {
        loop {
            let key = keys.next().await;
            let Some(pod) = pods.get_key(&key) else { continue };
            tokio::time::sleep(Duration::from_millis(300)).await;
            if pods::is_terminating(&pod) {
                let _ = api.delete(&key.name, &DeleteParams::default().grace_period(0)).await;
            } else if !pods::is_ready(&pod) {
                let ready = json!({"type": "Ready", "status": "True", "lastTransitionTime": clock.time()});
                let status = json!({"status": {"phase": "Running", "conditions": [ready]}});
                while api
                    .patch_status(&key.name, &Default::default(), &kube::api::Patch::Merge(&status))
                    .await
                    .is_err_and(|error| !matches!(error, kube::Error::Api(status) if status.code == 404))
                {
                }
            }
        }
    });
}

async fn insist<T, F>(mut attempt: impl FnMut() -> F) -> T
where
    F: Future<Output = Result<T, kube::Error>>,
{
    for _ in 1..TRIES {
        if let Ok(value) = attempt().await {
            return value;
        }
    }
    attempt().await.expect("the test's own write must succeed in the end")
}
