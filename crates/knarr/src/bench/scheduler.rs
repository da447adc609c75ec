//! `knarr bench scheduler`: how many pods a second any cluster's scheduler binds, over the API, with nodes that exist
//! as objects only. The workloads are those of upstream's scheduler_perf, so that schedulers can be set side by side.
//!
//! A round makes its nodes and the pods that are there before, then creates the measured pods as fast as the server
//! takes them and watches until each has its node. Everything made is removed again.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use futures::StreamExt;
use k8s_openapi::api::core::v1::{Event, Namespace, Node, Pod};
use k8s_openapi::api::scheduling::v1::PriorityClass;
use knarr_client::Client;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams};
use serde_json::{Value, json};

use super::{PHASE_MAX, Processes, millis};
use crate::settings::{self, Settings};

const NAMESPACE: &str = "knarr-bench-scheduler";
const LABEL: &str = "knarr.dev/bench=scheduler";
const PRIORITY_CLASS: &str = "knarr-bench-high";
const HOST: &str = "kubernetes.io/hostname";
const ZONE: &str = "topology.kubernetes.io/zone";
const ZONES: usize = 10;
/// Low priority pods on each node before preemption is measured.
const FILLERS: usize = 4;

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Workload {
    /// Pods that ask for cpu and memory alone.
    Plain,
    /// All in one zone, by required affinity.
    Affinity,
    /// Ten groups, no two of a group on one node.
    AntiAffinity,
    /// Even over zones, by a required constraint.
    Spread,
    /// Important pods on nodes full of unimportant ones.
    Preemption,
    /// Plain pods beside as many that are gated.
    Gated,
    /// All kinds together, while nodes and pods come and go.
    Churn,
}

#[derive(Args, Debug)]
pub struct SchedulerArgs {
    /// The cluster to measure [default: the one on this machine].
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    #[arg(long, default_value = settings::DATA_DIR)]
    data_dir: PathBuf,
    /// What to measure, one after the other [default: all].
    #[arg(long, value_enum)]
    workload: Vec<Workload>,
    /// Node objects to make.
    #[arg(long, default_value_t = 1_000)]
    nodes: usize,
    /// Pods to measure.
    #[arg(long, default_value_t = 2_000)]
    pods: usize,
    /// Connections, each with one request at a time.
    #[arg(long, default_value_t = 32)]
    connections: usize,
    /// The scheduler to ask, if it is not the default one.
    #[arg(long, default_value = "default-scheduler")]
    scheduler_name: String,
    /// Measure no scheduler, but what each of its writes costs the server: this program makes them itself.
    #[arg(long)]
    steps: bool,
}

pub async fn run(args: &SchedulerArgs) -> Result<()> {
    let settings = Settings::load(&args.data_dir)?;
    let kubeconfig = match (&args.kubeconfig, &settings) {
        (Some(path), _) => path.clone(),
        (None, Some(settings)) => settings.admin_kubeconfig(),
        (None, None) => bail!("no cluster in {}; name one with --kubeconfig", args.data_dir.display()),
    };
    let processes = Processes::of(settings.as_ref());
    let mut clients = Vec::new();
    for _ in 0..args.connections.max(1) {
        clients.push(knarr_client::connect::from_kubeconfig(&kubeconfig, None).await?);
    }
    println!("{} nodes, {} pods, {} connections", args.nodes, args.pods, clients.len());
    if args.steps {
        let round = Round { args, workload: Workload::Plain, clients: &clients };
        let result = round.steps(&processes).await;
        round.clean().await.context("remove what the benchmark made")?;
        return result;
    }
    println!("{:<14} {:>9} {:>9} {:>9} {:>9}", "workload", "pods/s", "p50 ms", "p99 ms", "CPU us");
    let workloads = if args.workload.is_empty() { Workload::value_variants() } else { &args.workload };
    for workload in workloads {
        let round = Round { args, workload: *workload, clients: &clients };
        let result = round.measure(&processes).await;
        round.clean().await.context("remove what the benchmark made")?;
        result.with_context(|| format!("workload {workload:?}"))?;
    }
    Ok(())
}

struct Round<'a> {
    args: &'a SchedulerArgs,
    workload: Workload,
    clients: &'a [Client],
}

impl Round<'_> {
    fn client(&self) -> Client {
        self.clients[0].clone()
    }

    fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client(), NAMESPACE)
    }

    async fn measure(&self, processes: &Processes) -> Result<()> {
        self.prepare().await?;
        let listed = self.pods().list(&ListParams::default().limit(1)).await?;
        let version = listed.metadata.resource_version.unwrap_or_default();
        let watch = self.pods().watch(&WatchParams::default().timeout(290), &version).await?.boxed();
        let (begin, cpu) = (Instant::now(), processes.cpu_seconds());
        let churn = tokio::spawn(churn(self.client(), self.workload == Workload::Churn));
        let created = async {
            let times: Vec<(String, Instant)> = self
                .each(self.args.pods, |client, number| async move {
                    let pod = self.measured(number)?;
                    let name = pod.metadata.name.clone().unwrap_or_default();
                    let at = Instant::now();
                    Api::namespaced(client, NAMESPACE).create(&PostParams::default(), &pod).await?;
                    Ok((name, at))
                })
                .await?;
            Ok(times.into_iter().collect::<HashMap<String, Instant>>())
        };
        let result: Result<_> = futures::future::try_join(created, bound(watch, self.args.pods)).await;
        churn.abort();
        let (created, bound) = result?;
        let last = bound.values().max().copied().unwrap_or(begin);
        let mut times: Vec<Duration> = bound
            .iter()
            .filter_map(|(name, at)| Some(at.saturating_duration_since(*created.get(name)?)))
            .collect();
        times.sort_unstable();
        let rate = times.len() as f64 / (last - begin).as_secs_f64();
        let cpu = cpu
            .zip(processes.cpu_seconds())
            .map_or(f64::NAN, |(before, after)| (after - before) / times.len() as f64);
        println!(
            "{:<14} {rate:>9.0} {:>9.1} {:>9.1} {:>9.0}",
            format!("{:?}", self.workload),
            millis(&times, 50),
            millis(&times, 99),
            cpu * 1e6
        );
        Ok(())
    }

    /// What a scheduler writes for each pod, one kind of write after the other, by this program.
    async fn steps(&self, processes: &Processes) -> Result<()> {
        self.prepare().await?;
        println!("{:<24} {:>9} {:>14}", "request", "per s", "server CPU us");
        let nodes = self.args.nodes.max(1);
        self.step(processes, "read a pod's absence", |client, number| async move {
            Api::<Pod>::namespaced(client, NAMESPACE).get_opt(&format!("nobody-{number}")).await?;
            Ok(())
        })
        .await?;
        self.step(processes, "create a pod", |client, number| async move {
            let mut pod = self.pod(&format!("pod-{number}"), json!({}), json!({}), &small())?;
            pod.spec.get_or_insert_default().scheduler_name = Some("nobody".to_owned());
            Api::namespaced(client, NAMESPACE).create(&PostParams::default(), &pod).await?;
            Ok(())
        })
        .await?;
        self.step(processes, "write a condition", |client, number| async move {
            let condition = json!({"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "bench"});
            let patch = Patch::Strategic(json!({"status": {"conditions": [condition]}}));
            let api: Api<Pod> = Api::namespaced(client, NAMESPACE);
            api.patch_status(&format!("pod-{number}"), &PatchParams::default(), &patch).await?;
            Ok(())
        })
        .await?;
        self.step(processes, "bind a pod", |client, number| async move {
            let name = format!("pod-{number}");
            let target = json!({"kind": "Node", "name": format!("bench-{}", number % nodes)});
            let binding = json!({"metadata": {"name": name}, "target": target});
            let api: Api<Pod> = Api::namespaced(client, NAMESPACE);
            api.create_subresource::<_, Value>("binding", &name, &PostParams::default(), &binding).await?;
            Ok(())
        })
        .await?;
        self.step(processes, "create an event", |client, number| async move {
            let name = format!("pod-{number}");
            let about = json!({"apiVersion": "v1", "kind": "Pod", "namespace": NAMESPACE, "name": name});
            let event: Event = serde_json::from_value(json!({
                "metadata": {"name": format!("{name}.{number:x}")}, "involvedObject": about, "type": "Normal",
                "reason": "Scheduled", "message": format!("Successfully assigned {NAMESPACE}/{name} to bench"),
                "count": 1, "source": {"component": "bench"},
            }))?;
            Api::namespaced(client, NAMESPACE).create(&PostParams::default(), &event).await?;
            Ok(())
        })
        .await?;
        Ok(())
    }

    /// One kind of request, once for each pod; then waits until the server has come to rest.
    async fn step<F, Fut>(&self, processes: &Processes, name: &str, act: F) -> Result<()>
    where
        F: Fn(Client, usize) -> Fut,
        Fut: Future<Output = Result<()>>,
    {
        let (begin, before) = (Instant::now(), processes.cpu_seconds());
        self.each(self.args.pods, act).await.with_context(|| name.to_owned())?;
        let took = begin.elapsed();
        // What caches and loops do about it belongs to its price.
        tokio::time::sleep(Duration::from_secs(2)).await;
        let count = self.args.pods as f64;
        let cpu =
            before.zip(processes.cpu_seconds()).map_or(f64::NAN, |(before, after)| (after - before) / count);
        println!("{name:<24} {:>9.0} {:>14.0}", count / took.as_secs_f64(), cpu * 1e6);
        Ok(())
    }

    /// Nodes, and the pods that are there before.
    async fn prepare(&self) -> Result<()> {
        let namespace: Namespace = serde_json::from_value(json!({"metadata": {"name": NAMESPACE}}))?;
        Api::<Namespace>::all(self.client()).create(&PostParams::default(), &namespace).await?;
        let class = json!({"metadata": {"name": PRIORITY_CLASS}, "value": 1000});
        let class: PriorityClass = serde_json::from_value(class)?;
        Api::<PriorityClass>::all(self.client()).create(&PostParams::default(), &class).await?;
        self.each(self.args.nodes, make_node).await?;
        let before: Vec<Pod> = match self.workload {
            Workload::Preemption => {
                let requests = json!({"cpu": "900m", "memory": "100Mi"});
                let filler = |number| self.pod(&format!("filler-{number}"), json!({}), json!({}), &requests);
                (0..self.args.nodes * FILLERS).map(filler).collect::<Result<_>>()?
            }
            Workload::Gated => {
                let gates = json!({"schedulingGates": [{"name": "knarr.dev/bench"}]});
                let gated = |number| self.pod(&format!("gated-{number}"), json!({}), gates.clone(), &small());
                return self.create(&(0..self.args.pods).map(gated).collect::<Result<Vec<_>>>()?).await;
            }
            _ => return Ok(()),
        };
        let listed = self.pods().list(&ListParams::default().limit(1)).await?;
        let version = listed.metadata.resource_version.unwrap_or_default();
        let watch = self.pods().watch(&WatchParams::default().timeout(290), &version).await?.boxed();
        futures::future::try_join(self.create(&before), bound(watch, before.len())).await?;
        Ok(())
    }

    async fn create(&self, pods: &[Pod]) -> Result<()> {
        self.each(pods.len(), |client, number| async move {
            Api::namespaced(client, NAMESPACE).create(&PostParams::default(), &pods[number]).await?;
            Ok(())
        })
        .await?;
        Ok(())
    }

    fn measured(&self, number: usize) -> Result<Pod> {
        let kinds = [Workload::Plain, Workload::Affinity, Workload::AntiAffinity, Workload::Spread];
        let kind = if self.workload == Workload::Churn { kinds[number % kinds.len()] } else { self.workload };
        let group = format!("group-{}", number % 10);
        let (labels, spec) = match kind {
            Workload::Affinity => (json!({"app": "near"}), affinity("podAffinity", ZONE, "near")),
            Workload::AntiAffinity => (json!({"app": group}), affinity("podAntiAffinity", HOST, &group)),
            Workload::Spread => (
                json!({"app": "even"}),
                json!({"topologySpreadConstraints": [{
                    "maxSkew": 5, "topologyKey": ZONE, "whenUnsatisfiable": "DoNotSchedule",
                    "labelSelector": {"matchLabels": {"app": "even"}},
                }]}),
            ),
            Workload::Preemption => {
                let requests = json!({"cpu": "3", "memory": "100Mi"});
                let spec = json!({"priorityClassName": PRIORITY_CLASS});
                return self.pod(&format!("pod-{number}"), json!({}), spec, &requests);
            }
            _ => (json!({}), json!({})),
        };
        self.pod(&format!("pod-{number}"), labels, spec, &small())
    }

    fn pod(&self, name: &str, labels: Value, mut spec: Value, requests: &Value) -> Result<Pod> {
        spec["schedulerName"] = json!(self.args.scheduler_name);
        spec["containers"] = json!([{"name": "c", "image": "none", "resources": {"requests": requests}}]);
        // Nobody runs these nodes: pods stay whatever happens to them, and go at once when they are deleted.
        spec["tolerations"] = json!([{"operator": "Exists"}]);
        spec["terminationGracePeriodSeconds"] = json!(0);
        spec["nodeSelector"] = json!({"knarr.dev/bench": "scheduler"});
        Ok(serde_json::from_value(json!({"metadata": {"name": name, "labels": labels}, "spec": spec}))?)
    }

    /// Does something `count` times over all connections.
    async fn each<T, F, Fut>(&self, count: usize, act: F) -> Result<Vec<T>>
    where
        F: Fn(Client, usize) -> Fut,
        Fut: Future<Output = Result<T>>,
    {
        let next = AtomicUsize::new(0);
        let workers = self.clients.iter().map(|client| {
            let (next, act) = (&next, &act);
            async move {
                let mut done = Vec::new();
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        return Ok::<_, anyhow::Error>(done);
                    }
                    done.push(act(client.clone(), number).await?);
                }
            }
        });
        Ok(futures::future::try_join_all(workers).await?.into_iter().flatten().collect())
    }

    async fn clean(&self) -> Result<()> {
        let pods = self.pods();
        let names: Vec<String> = pods
            .list_metadata(&ListParams::default())
            .await?
            .into_iter()
            .filter_map(|pod| pod.metadata.name)
            .collect();
        let params = DeleteParams::default().grace_period(0);
        self.each(names.len(), |client, number| {
            let (name, params) = (&names[number], &params);
            async move { gone(Api::<Pod>::namespaced(client, NAMESPACE).delete(name, params).await) }
        })
        .await?;
        let marked = ListParams::default().labels(LABEL);
        let nodes = Api::<Node>::all(self.client()).list_metadata(&marked).await?;
        let nodes: Vec<String> = nodes.into_iter().filter_map(|node| node.metadata.name).collect();
        self.each(nodes.len(), |client, number| {
            let (name, params) = (&nodes[number], &params);
            async move { gone(Api::<Node>::all(client).delete(name, params).await) }
        })
        .await?;
        gone(Api::<PriorityClass>::all(self.client()).delete(PRIORITY_CLASS, &params).await)?;
        let namespaces: Api<Namespace> = Api::all(self.client());
        gone(namespaces.delete(NAMESPACE, &DeleteParams::default()).await)?;
        let begin = Instant::now();
        while namespaces.get_opt(NAMESPACE).await?.is_some() {
            if begin.elapsed() > PHASE_MAX {
                bail!("namespace {NAMESPACE} is still there after {} s", PHASE_MAX.as_secs());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(())
    }
}

/// What is gone already needs no removal.
fn gone<T>(result: kube::Result<T>) -> Result<()> {
    match result {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        result => Ok(result.map(|_| ())?),
    }
}

fn small() -> Value {
    json!({"cpu": "1m", "memory": "1Mi"})
}

fn affinity(kind: &str, topology: &str, app: &str) -> Value {
    let term = json!({"topologyKey": topology, "labelSelector": {"matchLabels": {"app": app}}});
    json!({"affinity": {kind: {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}})
}

async fn make_node(client: Client, number: usize) -> Result<()> {
    let name = format!("bench-{number}");
    let status = json!({
        "allocatable": {"cpu": "4", "memory": "32Gi", "pods": "110"},
        "capacity": {"cpu": "4", "memory": "32Gi", "pods": "110"},
        "conditions": [{"type": "Ready", "status": "True", "reason": "Simulated"}],
    });
    let node: Node = serde_json::from_value(json!({
        "metadata": {"name": name, "labels": {
            HOST: name, ZONE: format!("zone-{}", number % ZONES), "knarr.dev/bench": "scheduler",
        }},
        "status": status,
    }))?;
    let api: Api<Node> = Api::all(client);
    let made = api.create(&PostParams::default(), &node).await?;
    // Some servers take a status with the object, some only afterwards.
    if made.status.is_none_or(|status| status.allocatable.is_none()) {
        api.patch_status(&name, &PatchParams::default(), &Patch::Merge(json!({"status": status}))).await?;
    }
    Ok(())
}

type Watch = futures::stream::BoxStream<'static, kube::Result<WatchEvent<Pod>>>;

/// When each of so many pods that are neither fillers nor gated (or all fillers) got its node.
async fn bound(mut watch: Watch, count: usize) -> Result<HashMap<String, Instant>> {
    let begin = Instant::now();
    let mut bound = HashMap::new();
    while bound.len() < count {
        let late = || format!("{} of {count} pods had a node after {} s", bound.len(), PHASE_MAX.as_secs());
        let left = PHASE_MAX.checked_sub(begin.elapsed()).with_context(late)?;
        let event = tokio::time::timeout(left, watch.next()).await.with_context(late)?;
        match event.context("the watch ended")?? {
            WatchEvent::Added(pod) | WatchEvent::Modified(pod) => {
                let name = pod.metadata.name.unwrap_or_default();
                let placed = pod.spec.is_some_and(|spec| spec.node_name.is_some());
                if placed && !name.starts_with("churn-") {
                    bound.entry(name).or_insert_with(Instant::now);
                }
            }
            WatchEvent::Error(status) => bail!("the watch failed: {}", status.message),
            _ => {}
        }
    }
    Ok(bound)
}

/// Makes and removes a node and a pod over and over, until aborted.
async fn churn(client: Client, wanted: bool) -> Result<()> {
    let nodes: Api<Node> = Api::all(client.clone());
    let pods: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
    let params = DeleteParams::default().grace_period(0);
    for number in 0.. {
        if !wanted {
            return Ok(());
        }
        make_node(client.clone(), 1_000_000).await?;
        let pod = json!({"metadata": {"name": format!("churn-{number}")}, "spec": {
            "containers": [{"name": "c", "image": "none", "resources": {"requests": {"cpu": "100"}}}],
        }});
        pods.create(&PostParams::default(), &serde_json::from_value(pod)?).await?;
        tokio::time::sleep(Duration::from_millis(200)).await;
        gone(pods.delete(&format!("churn-{number}"), &params).await)?;
        gone(nodes.delete("bench-1000000", &params).await)?;
    }
    Ok(())
}
