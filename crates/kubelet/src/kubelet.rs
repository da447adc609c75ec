//! The kubelet itself: takes over what runs, starts a worker per pod, wakes workers on events of the runtime, and
//! keeps node, lease, server, logs and garbage in order. Pods run on when it ends.

use crate::config::KubeletConfig;
use crate::context::NodeContext;
use crate::images::Images;
use crate::names;
use crate::node::{self, Machine};
use crate::pod::{self, Handle};
use crate::references::References;
use crate::volumes::token::ApiTokens;
use crate::{gc, logs, server};
use futures::StreamExt;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use knarr_client::informer::Selection;
use knarr_client::{Clock, Informers, ObjectKey, Recorder};
use knarr_network::pod::PodNetwork;
use knarr_runtime::Runtime;
use knarr_runtime::cgroup::Cgroups;
use knarr_runtime::cri::{Event, v1};
use kube::Client;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

/// How long to wait before asking a runtime again that does not answer.
const RUNTIME_RETRY: Duration = Duration::from_secs(1);

/// Workers that have ended and are not cleared away yet; more wait.
const DONE_LEN_MAX: usize = 64;

/// A node's agent. [`Kubelet::run`] does everything.
pub struct Kubelet {
    config: KubeletConfig,
    client: Client,
    informers: Informers,
    runtime: Arc<dyn Runtime>,
    network: Option<Arc<dyn PodNetwork>>,
    clock: Clock,
    cgroups: Option<Cgroups>,
}

impl Kubelet {
    /// `informers` may be shared with others of the process: the kubelet takes pods of its node only, its own node,
    /// and all services. `network` is `None` where the runtime attaches networks itself.
    pub fn new(
        config: KubeletConfig,
        client: Client,
        informers: Informers,
        runtime: Arc<dyn Runtime>,
        network: Option<Arc<dyn PodNetwork>>,
    ) -> Self {
        let cgroups = Cgroups::detect().inspect_err(|error| {
            tracing::warn!(%error, "pods get no control groups of their own");
        });
        Kubelet { config, client, informers, runtime, network, clock: Clock::System, cgroups: cgroups.ok() }
    }

    /// Another clock, and no control groups: for tests.
    pub fn simulated(mut self, clock: Clock) -> Self {
        (self.clock, self.cgroups) = (clock, None);
        self
    }

    /// Runs until `shutdown`. Fails only if the server's address cannot be had.
    pub async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let listener = match &self.config.tls {
            Some(tls) => Some(server::Listener::bind(self.config.listen, tls.clone()).await?),
            None => None,
        };
        tokio::select! {
            result = self.serve(listener) => result,
            () = shutdown.cancelled() => Ok(()),
        }
    }

    async fn serve(self, listener: Option<server::Listener>) -> anyhow::Result<()> {
        let context = Arc::new(self.context().await);
        // Before the first list of pods: nothing that happens from here on may be missed.
        let events = context.runtime.events();
        let changed = Arc::new(Notify::new());
        let node = node::register(&context).await;
        let uid = node.metadata.uid.clone().unwrap_or_default();
        let server = async {
            match listener {
                Some(listener) => server::serve(listener, context.clone()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = node::keep_status(&context, &changed) => {}
            () = node::keep_lease(&context, &uid) => {}
            () = server => {}
            () = logs::rotation::keep(&context) => {}
            () = gc::keep(&context, &changed) => {}
            () = dispatch(&context, events, &changed) => {}
        }
        Ok(())
    }

    async fn context(self) -> NodeContext {
        let version = loop {
            match self.runtime.version().await {
                Ok(version) => break version,
                Err(error) => {
                    tracing::warn!(%error, "the container runtime does not answer, trying again");
                    tokio::time::sleep(RUNTIME_RETRY).await;
                }
            }
        };
        let driver = self.runtime.runtime_config().await.ok().and_then(|answer| answer.linux);
        let systemd = driver.is_some_and(|linux| linux.cgroup_driver == v1::CgroupDriver::Systemd as i32);
        let config = self.config;
        let runtime_version = format!("{}://{}", version.runtime_name, version.runtime_version);
        let recorder = Recorder::new(self.client.clone(), self.clock.clone(), "kubelet", &config.node_name);
        let on_node = Selection::fields(format!("spec.nodeName={}", config.node_name));
        let own = Selection::fields(format!("metadata.name={}", config.node_name));
        NodeContext {
            machine: Machine::read(&config.root_dir, runtime_version, &config.version),
            images: Images::new(self.runtime.clone(), recorder.clone()),
            tokens: ApiTokens::new(self.client.clone(), self.clock.clone()),
            references: References::new(self.client.clone()),
            pods: self.informers.select::<Pod>(on_node),
            services: self.informers.get::<Service>(),
            node: self.informers.select::<Node>(own),
            systemd_cgroups: systemd,
            runtime_name: version.runtime_name,
            runtime: self.runtime,
            network: self.network,
            cgroups: self.cgroups,
            client: self.client,
            informers: self.informers,
            clock: self.clock,
            recorder,
            config,
        }
    }
}

/// Which workers there are, by pod uid.
type Workers = BTreeMap<String, Handle>;

/// Starts and wakes workers, for ever.
async fn dispatch(
    context: &Arc<NodeContext>,
    mut events: impl futures::Stream<Item = Event> + Unpin,
    changed: &Notify,
) {
    let keys = context.pods.subscribe();
    context.pods.wait_synced().await;
    context.services.wait_synced().await;
    context.node.wait_synced().await;
    let (done, mut finished) = mpsc::channel(DONE_LEN_MAX);
    let mut workers = Workers::new();
    let mut sandboxes = adopt(context, &mut workers, &done).await;
    for pod in context.pods.list() {
        ensure(context, &mut workers, &ObjectKey::of(&*pod), names::uid(&pod), &done);
    }
    let mut images_seen = 0usize;
    loop {
        tokio::select! {
            key = keys.next() => pod_changed(context, &mut workers, &key, &done),
            event = events.next() => match event {
                Some(event) => happened(context, &mut workers, &mut sandboxes, event).await,
                // A runtime that has ended has nothing to say; the node's status tells of it.
                None => std::future::pending().await,
            },
            // The pod may still be there, with finalizers: its next change brings a worker again.
            uid = finished.recv() => {
                uid.and_then(|uid| workers.remove(&uid));
            }
        }
        // New images are told with the status; they come with new workers.
        if workers.len() != images_seen {
            images_seen = workers.len();
            changed.notify_one();
        }
    }
}

fn ensure(
    context: &Arc<NodeContext>,
    workers: &mut Workers,
    key: &ObjectKey,
    uid: &str,
    done: &mpsc::Sender<String>,
) {
    if !workers.contains_key(uid) {
        let worker = pod::spawn(context.clone(), key.clone(), uid.to_owned(), done.clone());
        workers.insert(uid.to_owned(), worker);
    }
}

fn pod_changed(
    context: &Arc<NodeContext>,
    workers: &mut Workers,
    key: &ObjectKey,
    done: &mpsc::Sender<String>,
) {
    // Whatever changed on another pod may have made room.
    for worker in workers.values().filter(|worker| worker.context.key == *key || worker.context.wants_room())
    {
        worker.wake();
    }
    if let Some(pod) = context.pods.get_key(key) {
        ensure(context, workers, key, names::uid(&pod), done);
    }
}

/// Takes over what runs already, after a restart: what the API knows goes on, what it does not know is taken down
/// by its worker. Returns which pod each sandbox is of.
async fn adopt(
    context: &Arc<NodeContext>,
    workers: &mut Workers,
    done: &mpsc::Sender<String>,
) -> HashMap<String, String> {
    let sandboxes = loop {
        match context.runtime.list_pod_sandbox(None).await {
            Ok(sandboxes) => break sandboxes,
            Err(error) => {
                tracing::warn!(%error, "sandboxes not listed, trying again");
                tokio::time::sleep(RUNTIME_RETRY).await;
            }
        }
    };
    let mut uids = BTreeSet::new();
    let mut of_pod = HashMap::new();
    for sandbox in sandboxes {
        let label = |key: &str| sandbox.labels.get(key).cloned();
        let (Some(uid), Some(namespace), Some(name)) =
            (label(names::POD_UID), label(names::POD_NAMESPACE), label(names::POD_NAME))
        else {
            // Not a pod of Kubernetes: somebody runs it by hand.
            continue;
        };
        of_pod.insert(sandbox.id, uid.clone());
        ensure(context, workers, &ObjectKey::new(namespace, name), &uid, done);
        uids.insert(uid);
    }
    if let Some(network) = context.network.as_ref().filter(|_| !context.runtime.attaches_network()) {
        match network.gc(&uids).await {
            Ok(freed) if !freed.is_empty() => {
                tracing::info!(pods = freed.len(), "freed networks of pods that are gone")
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "networks of pods that are gone stay"),
        }
    }
    remove_stray_dirs(context, &uids);
    of_pod
}

/// Directories of pods that neither the API nor the runtime knows: they ended while nobody watched.
fn remove_stray_dirs(context: &NodeContext, live: &BTreeSet<String>) {
    let Ok(entries) = std::fs::read_dir(context.config.pods_dir()) else { return };
    let known: BTreeSet<String> = context.pods.list().iter().map(|pod| names::uid(pod).to_owned()).collect();
    for uid in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        if !live.contains(&uid)
            && !known.contains(&uid)
            && let Err(error) = crate::volumes::tear_down(&context.config, &uid)
        {
            tracing::warn!(pod = uid, error, "directory of a pod that is gone stays");
        }
    }
}

async fn happened(
    context: &Arc<NodeContext>,
    workers: &mut Workers,
    sandboxes: &mut HashMap<String, String>,
    event: Event,
) {
    let sandbox_id = match event {
        Event::Resync => {
            workers.values().for_each(Handle::wake);
            return;
        }
        Event::SandboxRemoved { sandbox_id } => {
            sandboxes.remove(&sandbox_id);
            return;
        }
        // Steps of the worker's own, between which there is nothing to tell.
        Event::SandboxStarted { .. } | Event::ContainerCreated { .. } => return,
        Event::SandboxStopped { sandbox_id }
        | Event::ContainerStarted { sandbox_id, .. }
        | Event::ContainerExited { sandbox_id, .. }
        | Event::ContainerRemoved { sandbox_id, .. } => sandbox_id,
    };
    if !sandboxes.contains_key(&sandbox_id) {
        let Ok(answer) = context.runtime.pod_sandbox_status(&sandbox_id, false).await else { return };
        let uid = answer.status.and_then(|status| status.labels.get(names::POD_UID).cloned());
        let Some(uid) = uid else { return };
        sandboxes.insert(sandbox_id.clone(), uid);
    }
    if let Some(worker) = sandboxes.get(&sandbox_id).and_then(|uid| workers.get(uid)) {
        worker.wake();
    }
}
