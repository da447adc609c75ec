//! `knarr bench loops`: how quick the control loops are, on simulated nodes of a running cluster. What is measured is
//! what a client sees by its watches.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use knarr_client::Client;
use knarr_simulated::seen::SeenPod;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams};
use serde_json::{Value, json};

use super::{Processes, idle, millis};
use crate::settings::{self, Settings};

const NAMESPACE: &str = "knarr-bench-loops";
const NAME: &str = "load";
/// No phase takes longer.
const PHASE_MAX: Duration = Duration::from_secs(600);
/// Creates under way at a time.
const CONCURRENCY: usize = 64;

#[derive(Args, Debug)]
pub struct LoopsArgs {
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    #[arg(long, default_value = settings::DATA_DIR)]
    data_dir: PathBuf,
    /// Simulated nodes to have at least.
    #[arg(long, default_value_t = 100)]
    nodes: usize,
    /// Pods of the deployment that is scaled up from nothing.
    #[arg(long, default_value_t = 10_000)]
    pods: usize,
    /// Pods of the deployment that is updated, and whose endpoints are watched.
    #[arg(long, default_value_t = 1_000)]
    rolling: usize,
    /// Objects of the namespace that is deleted.
    #[arg(long, default_value_t = 20_000)]
    objects: usize,
    /// Seconds to watch the idle loops' CPU; 0 leaves this out.
    #[arg(long, default_value_t = 30)]
    idle_seconds: u64,
}

pub async fn loops(args: &LoopsArgs) -> Result<()> {
    let settings = Settings::load(&args.data_dir)?;
    let kubeconfig = match (&args.kubeconfig, &settings) {
        (Some(path), _) => path.clone(),
        (None, Some(settings)) => settings.admin_kubeconfig(),
        (None, None) => bail!("no cluster in {}; name one with --kubeconfig", args.data_dir.display()),
    };
    let client = knarr_client::connect::from_kubeconfig(&kubeconfig, None).await?;
    let processes = Processes::of(settings.as_ref());
    crate::simulated::ensure(&client, args.nodes).await?;
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let namespace: Namespace = serde_json::from_value(json!({ "metadata": { "name": NAMESPACE } }))?;
    namespaces
        .create(&PostParams::default(), &namespace)
        .await
        .context("create the benchmark's namespace")?;
    let result = measure(args, &client, &processes).await;
    let deleted = delete_namespace(&client).await;
    result?;
    println!(
        "{:<52} {:>8.1} s",
        format!("namespace of {} objects, deleted until gone", args.objects),
        deleted?
    );
    if args.idle_seconds > 0 {
        idle(&processes, Duration::from_secs(args.idle_seconds)).await;
    }
    Ok(())
}

async fn measure(args: &LoopsArgs, client: &Client, processes: &Processes) -> Result<()> {
    let load = Load { client: client.clone() };
    load.create(args.rolling).await?;
    endpoints(&load, args.rolling).await?;
    load.print("rolling update", args.rolling, processes, async || load.roll(args.rolling).await).await?;
    load.remove().await?;
    load.create(0).await?;
    let up = load.scale(args.pods).await?;
    println!("{:<52} {:>8.1} s", format!("deployment scaled to {} pods: created", args.pods), up.created);
    println!("{:<52} {:>8.1} s", "until all are ready", up.ready);
    load.remove().await?;
    fill(client, args.objects).await
}

/// The deployment under load.
struct Load {
    client: Client,
}

struct Times {
    created: f64,
    ready: f64,
}

impl Load {
    fn deployments(&self) -> Api<Deployment> {
        Api::namespaced(self.client.clone(), NAMESPACE)
    }

    fn pods(&self) -> Api<SeenPod> {
        Api::namespaced(self.client.clone(), NAMESPACE)
    }

    async fn print<F: Future<Output = Result<f64>>>(
        &self,
        what: &str,
        pods: usize,
        processes: &Processes,
        run: impl FnOnce() -> F,
    ) -> Result<()> {
        let before = processes.cpu_seconds();
        let seconds = run().await?;
        print!("{:<52} {seconds:>8.1} s", format!("{what} of {pods} pods"));
        match (before, processes.cpu_seconds()) {
            (Some(before), Some(after)) => println!("  server {:>6.1} s CPU", after - before),
            _ => println!(),
        }
        Ok(())
    }

    async fn create(&self, replicas: usize) -> Result<()> {
        let labels = json!({ "app": NAME });
        let tolerations = json!([{ "key": knarr_simulated::NODE_LABEL, "operator": "Exists" }]);
        let spec = json!({
            "containers": [{ "name": "c", "image": "load:1" }], "tolerations": tolerations, "automountServiceAccountToken": false,
            "nodeSelector": { knarr_simulated::NODE_LABEL: "true" },
        });
        let deployment: Deployment = serde_json::from_value(json!({ "metadata": { "name": NAME }, "spec": {
            "replicas": replicas, "selector": { "matchLabels": labels },
            "template": { "metadata": { "labels": labels }, "spec": spec },
        } }))?;
        self.deployments()
            .create(&PostParams::default(), &deployment)
            .await
            .context("create the deployment")?;
        let service: Service = serde_json::from_value(json!({ "metadata": { "name": NAME }, "spec": {
            "selector": labels, "ports": [{ "port": 80 }] } }))?;
        let services: Api<Service> = Api::namespaced(self.client.clone(), NAMESPACE);
        match services.create(&PostParams::default(), &service).await {
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
            result => result.map(|_| ()).context("create the service"),
        }
    }

    async fn patch(&self, spec: Value) -> Result<()> {
        let patch = Patch::Merge(json!({ "spec": spec }));
        self.deployments()
            .patch(NAME, &PatchParams::default(), &patch)
            .await
            .context("change the deployment")?;
        Ok(())
    }

    async fn scale(&self, pods: usize) -> Result<Times> {
        let version = self.pods().list_metadata(&ListParams::default()).await?.metadata.resource_version;
        let mut watch =
            self.pods().watch(&WatchParams::default(), &version.unwrap_or_default()).await?.boxed();
        let begun = Instant::now();
        self.patch(json!({ "replicas": pods })).await?;
        let (mut created, mut ready) = (0, HashSet::new());
        let mut times = Times { created: 0.0, ready: 0.0 };
        while ready.len() < pods {
            let left = PHASE_MAX.checked_sub(begun.elapsed()).context("not all pods were ready in time")?;
            let event = tokio::time::timeout(left, watch.try_next())
                .await
                .context("not all pods were ready in time")?;
            match event?.context("the watch of pods ended")? {
                WatchEvent::Added(_) => {
                    created += 1;
                    if created == pods {
                        times.created = begun.elapsed().as_secs_f64();
                    }
                }
                WatchEvent::Modified(pod) if pod.is_true("Ready") => _ = ready.insert(pod.name().to_owned()),
                _ => {}
            }
        }
        times.ready = begun.elapsed().as_secs_f64();
        Ok(times)
    }

    async fn roll(&self, pods: usize) -> Result<f64> {
        let begun = Instant::now();
        self.patch(json!({ "template": { "spec": { "containers": [{ "name": "c", "image": "load:2" }] } } }))
            .await?;
        let version = "0";
        let params = WatchParams::default().fields(&format!("metadata.name={NAME}"));
        let mut watch = self.deployments().watch(&params, version).await?.boxed();
        let wanted = Some(pods as i32);
        while begun.elapsed() < PHASE_MAX {
            let event = watch.try_next().await?.context("the watch of the deployment ended")?;
            let (WatchEvent::Added(deployment) | WatchEvent::Modified(deployment)) = event else { continue };
            let status = deployment.status.unwrap_or_default();
            let complete = status.updated_replicas == wanted
                && status.available_replicas == wanted
                && status.replicas == wanted;
            if complete && status.observed_generation == deployment.metadata.generation {
                return Ok(begun.elapsed().as_secs_f64());
            }
        }
        bail!("the update was not complete in time")
    }

    /// Deletes the deployment and waits until its pods are gone.
    async fn remove(&self) -> Result<()> {
        self.deployments()
            .delete(NAME, &DeleteParams::background())
            .await
            .context("delete the deployment")?;
        let begun = Instant::now();
        while begun.elapsed() < PHASE_MAX {
            let left = self.pods().list_metadata(&ListParams::default().limit(1)).await?;
            if left.items.is_empty() {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        bail!("the deployment's pods did not go in time")
    }
}

/// How long after a pod's readiness an endpoint slice tells it.
async fn endpoints(load: &Load, pods: usize) -> Result<()> {
    let slices: Api<EndpointSlice> = Api::namespaced(load.client.clone(), NAMESPACE);
    let mut pod_events = load.pods().watch(&WatchParams::default(), "0").await?.boxed();
    let mut slice_events = slices.watch(&WatchParams::default(), "0").await?.boxed();
    let (mut ready, mut told, mut writes) = (HashMap::new(), HashMap::new(), 0);
    let begun = Instant::now();
    while told.len() < pods {
        let left = PHASE_MAX.checked_sub(begun.elapsed()).context("not all endpoints were told in time")?;
        tokio::select! {
            () = tokio::time::sleep(left) => bail!("not all endpoints were told in time"),
            event = pod_events.try_next() => match event?.context("the watch of pods ended")? {
                WatchEvent::Added(pod) | WatchEvent::Modified(pod) if pod.is_true("Ready") => {
                    ready.entry(pod.status.pod_ip.clone()).or_insert_with(Instant::now);
                }
                _ => {}
            },
            event = slice_events.try_next() => {
                let event = event?.context("the watch of slices ended")?;
                let (WatchEvent::Added(slice) | WatchEvent::Modified(slice)) = event else { continue };
                writes += 1;
                let now = Instant::now();
                for endpoint in slice.endpoints.into_iter().flatten() {
                    if endpoint.conditions.is_some_and(|conditions| conditions.ready == Some(true)) {
                        endpoint.addresses.into_iter().for_each(|address| _ = told.entry(address).or_insert(now));
                    }
                }
            }
        }
    }
    let late =
        |(address, told): (&String, &Instant)| Some(told.saturating_duration_since(*ready.get(address)?));
    let mut times: Vec<Duration> = told.iter().filter_map(late).collect();
    times.sort_unstable();
    println!(
        "{:<52} p50 {:>6.1} ms  p99 {:>6.1} ms  ({writes} writes of slices)",
        format!("{pods} pods ready at once, until in a slice"),
        millis(&times, 50),
        millis(&times, 99)
    );
    Ok(())
}

async fn fill(client: &Client, objects: usize) -> Result<()> {
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), NAMESPACE);
    let created = futures::stream::iter(0..objects).map(|number| {
        let api = api.clone();
        async move {
            let map = serde_json::from_value(json!({ "metadata": { "name": format!("m{number}") } }))?;
            api.create(&PostParams::default(), &map).await.context("create an object")?;
            Ok::<_, anyhow::Error>(())
        }
    });
    created.buffer_unordered(CONCURRENCY).try_collect::<Vec<()>>().await?;
    Ok(())
}

async fn delete_namespace(client: &Client) -> Result<f64> {
    let api: Api<Namespace> = Api::all(client.clone());
    let begun = Instant::now();
    api.delete(NAMESPACE, &DeleteParams::default()).await.context("delete the benchmark's namespace")?;
    while begun.elapsed() < PHASE_MAX {
        if api.get_opt(NAMESPACE).await?.is_none() {
            return Ok(begun.elapsed().as_secs_f64());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    bail!("namespace {NAMESPACE} did not go in time")
}
