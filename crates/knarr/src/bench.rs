//! `knarr bench`: measures a running cluster, ours or not, through its API.
//!
//! Load comes from this process, over TLS, on as many connections as asked for. Where the cluster runs on
//! this machine, the server's own CPU time and memory are reported beside the rates, since on a shared
//! machine they say more than times do. How long a cluster takes to start is measured by [`start`], how fast pods
//! get their nodes by [`scheduler`], how fast the control loops are by [`loops`].

mod load;
mod loops;
mod scheduler;
mod start;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use futures::StreamExt;
use http::Method;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use knarr_client::Client;
use kube::api::{Api, DeleteParams, ListParams, PostParams, WatchEvent, WatchParams};
use serde_json::json;

use self::load::{Connection, Server};
use crate::settings::{self, Settings};

const NAMESPACE: &str = "knarr-bench";
const OBJECT_BYTES: usize = 4096;
/// Connections that list at the same time, at most.
const LIST_CONNECTIONS_MAX: usize = 32;
/// No phase takes longer: bounded loops, also against a server that has stopped answering.
const PHASE_MAX: Duration = Duration::from_secs(120);

#[derive(Subcommand, Debug)]
enum What {
    /// Start clusters of its own from an empty disk and time each step; needs root.
    Start(start::StartArgs),
    /// Bind pods to nodes that exist as objects only, and count how many a second.
    Scheduler(scheduler::SchedulerArgs),
    /// Time the control loops on simulated nodes of a running cluster.
    Loops(loops::LoopsArgs),
}

#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct BenchArgs {
    #[command(subcommand)]
    what: Option<What>,
    /// The cluster to measure [default: the one on this machine].
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    #[arg(long, default_value = settings::DATA_DIR)]
    data_dir: PathBuf,
    /// Connections, each with one request at a time; LISTs use at most 32.
    #[arg(long, default_value_t = 256)]
    connections: usize,
    /// Objects to create.
    #[arg(long, default_value_t = 10_000)]
    objects: usize,
    /// Pods to start at once; 0 leaves this out.
    #[arg(long, default_value_t = 30)]
    pods: usize,
    /// The image of those pods; it must be on the node already.
    #[arg(long, default_value = "docker.io/library/busybox:latest")]
    image: String,
    /// Seconds to watch the idle cluster's CPU; 0 leaves this out.
    #[arg(long, default_value_t = 0)]
    idle_seconds: u64,
}

pub fn bench(args: &BenchArgs) -> Result<()> {
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    match &args.what {
        Some(What::Start(args)) => start::start(args),
        Some(What::Loops(args)) => runtime()?.block_on(loops::loops(args)),
        Some(What::Scheduler(args)) => runtime()?.block_on(scheduler::run(args)),
        None => runtime()?.block_on(run(args)),
    }
}

async fn run(args: &BenchArgs) -> Result<()> {
    let settings = Settings::load(&args.data_dir)?;
    let processes = Processes::of(settings.as_ref());
    let kubeconfig = match (&args.kubeconfig, &settings) {
        (Some(path), _) => path.clone(),
        (None, Some(settings)) => settings.admin_kubeconfig(),
        (None, None) => {
            anyhow::bail!("no cluster in {}; name one with --kubeconfig", args.data_dir.display())
        }
    };
    let client = knarr_client::connect::from_kubeconfig(&kubeconfig, None).await?;
    if let Some(memory) = processes.memory_kilobytes() {
        println!(
            "{:<52} {:>10.1} MB PSS",
            "memory of all processes, before the load",
            memory as f64 / 1024.0
        );
    }
    if args.idle_seconds > 0 {
        idle(&processes, Duration::from_secs(args.idle_seconds)).await;
    }
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let namespace: Namespace = serde_json::from_value(json!({ "metadata": { "name": NAMESPACE } }))?;
    namespaces
        .create(&PostParams::default(), &namespace)
        .await
        .context("create the namespace of the benchmark")?;
    let result = measure(args, &kubeconfig, &client, &processes).await;
    namespaces
        .delete(NAMESPACE, &DeleteParams::default())
        .await
        .context("delete the namespace of the benchmark")?;
    result?;
    if let Some(memory) = processes.memory_kilobytes() {
        println!("{:<52} {:>10.1} MB PSS", "memory of all processes, after the load", memory as f64 / 1024.0);
    }
    Ok(())
}

async fn measure(args: &BenchArgs, kubeconfig: &Path, client: &Client, processes: &Processes) -> Result<()> {
    let server = Server::of(kubeconfig).await?;
    let mut clients = Vec::new();
    for _ in 0..args.connections.max(1) {
        clients.push(server.connect().await?);
    }
    let template = pod_template();
    let create = |client: Connection, n: usize| {
        let body = template.replace("@", &n.to_string());
        async move { client.send(Method::POST, &pods_path(""), body).await }
    };
    let few = (args.objects / 20).clamp(1, 500);
    phase("creates of pods, 4 KB each, durable, one by one", &clients[..1], 0..few, processes, create)
        .await?;
    let what = format!("creates of pods, 4 KB each, durable, {} clients", clients.len());
    phase(&what, &clients, few..args.objects, processes, create).await?;
    phase("gets", &clients, 0..args.objects * 2, processes, |client, n| {
        let path = pods_path(&format!("/b{}", n % args.objects));
        async move { client.send(Method::GET, &path, String::new()).await }
    })
    .await?;
    let listing = &clients[..clients.len().min(LIST_CONNECTIONS_MAX)];
    let what = format!("lists of {} pods, {} clients", args.objects, listing.len());
    phase(&what, listing, 0..listing.len() * 4, processes, |client, _| async move {
        client.send(Method::GET, &pods_path(""), String::new()).await
    })
    .await?;
    let what = format!("lists that match none of {} pods", args.objects);
    phase(&what, &clients[..1], 0..20, processes, |client, _| async move {
        client.send(Method::GET, &pods_path("?labelSelector=none%3Dsuch"), String::new()).await
    })
    .await?;
    if args.pods > 0 {
        pod_starts(args, client).await?;
    }
    Ok(())
}

fn pods_path(rest: &str) -> String {
    format!("/api/v1/namespaces/{NAMESPACE}/pods{rest}")
}

/// A pod of 4 KB; `@` stands for its number. Its scheduler is nobody: it is stored, listed and watched, and never run.
fn pod_template() -> String {
    let pod = json!({
        "metadata": { "name": "b@", "annotations": { "payload": "x".repeat(OBJECT_BYTES) } },
        "spec": { "schedulerName": "nobody", "containers": [{ "name": "c", "image": "none" }] },
    });
    pod.to_string()
}

/// Runs the requests over the clients and prints rate, latencies and the server's CPU time per request.
async fn phase<F, Fut>(
    what: &str,
    clients: &[Connection],
    numbers: std::ops::Range<usize>,
    processes: &Processes,
    request: F,
) -> Result<()>
where
    F: Fn(Connection, usize) -> Fut,
    Fut: Future<Output = Result<()>>,
{
    let (next, end) = (Arc::new(AtomicUsize::new(numbers.start)), numbers.end);
    let (start, cpu) = (Instant::now(), processes.cpu_seconds());
    let workers = clients.iter().map(|client| {
        let next = next.clone();
        let request = &request;
        async move {
            let mut times = Vec::new();
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                if n >= end || start.elapsed() > PHASE_MAX {
                    return Ok::<_, anyhow::Error>(times);
                }
                let begin = Instant::now();
                request(client.clone(), n).await?;
                times.push(begin.elapsed());
            }
        }
    });
    let times = futures::future::try_join_all(workers).await.with_context(|| what.to_owned())?;
    let elapsed = start.elapsed().as_secs_f64();
    let mut times: Vec<Duration> = times.into_iter().flatten().collect();
    times.sort_unstable();
    let rate = times.len() as f64 / elapsed;
    print!(
        "{what:<52} {rate:>10.0} /s  p50 {:>7.2} ms  p99 {:>7.2} ms",
        millis(&times, 50),
        millis(&times, 99)
    );
    match (cpu, processes.cpu_seconds()) {
        (Some(before), Some(after)) => {
            println!("  server {:>7.0} us CPU each", (after - before) / times.len().max(1) as f64 * 1e6);
        }
        _ => println!(),
    }
    Ok(())
}

fn millis(sorted: &[Duration], percentile: usize) -> f64 {
    let index = (sorted.len() * percentile / 100).min(sorted.len().saturating_sub(1));
    sorted.get(index).map_or(0.0, |d| d.as_secs_f64() * 1000.0)
}

/// Creates pods all at once and measures, for each, the time until it is Ready.
async fn pod_starts(args: &BenchArgs, client: &Client) -> Result<()> {
    let api: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
    let listed = api.list(&ListParams::default()).await?;
    let version = listed.metadata.resource_version.unwrap_or_default();
    let mut watch = api.watch(&WatchParams::default(), &version).await?.boxed();
    let start = Instant::now();
    for n in 0..args.pods {
        let pod: Pod = serde_json::from_value(json!({ "metadata": { "name": format!("p{n}") }, "spec": {
            "terminationGracePeriodSeconds": 0,
            "containers": [{ "name": "c", "image": args.image, "imagePullPolicy": "IfNotPresent", "command": ["sleep", "3600"] }],
        } }))?;
        api.create(&PostParams::default(), &pod).await?;
    }
    let mut times: Vec<Duration> = Vec::new();
    let mut seen = std::collections::HashSet::new();
    while times.len() < args.pods {
        let left = PHASE_MAX.checked_sub(start.elapsed()).context("pods were not Ready in time")?;
        let event = tokio::time::timeout(left, watch.next()).await.context("pods were not Ready in time")?;
        let Some(WatchEvent::Modified(pod)) = event.transpose()? else { continue };
        let ready = pod.status.as_ref().and_then(|s| s.conditions.as_deref()).unwrap_or_default();
        let is_ready = ready.iter().any(|c| c.type_ == "Ready" && c.status == "True");
        if is_ready && seen.insert(pod.metadata.name.unwrap_or_default()) {
            times.push(start.elapsed());
        }
    }
    times.sort_unstable();
    let what = format!("{} pods created at once, until Ready", args.pods);
    println!("{what:<52} {:>13}  p50 {:>7.0} ms  p99 {:>7.0} ms", "", millis(&times, 50), millis(&times, 99));
    Ok(())
}

async fn idle(processes: &Processes, time: Duration) {
    let before = processes.cpu_seconds();
    tokio::time::sleep(time).await;
    if let (Some(before), Some(after)) = (before, processes.cpu_seconds()) {
        let share = (after - before) / time.as_secs_f64() * 100.0;
        println!("{:<52} {share:>10.2} % of a core", format!("idle CPU over {} s", time.as_secs()));
    }
}

/// The processes of a cluster on this machine: supervisor, server and keeper.
struct Processes {
    pids: Vec<i32>,
}

impl Processes {
    fn of(settings: Option<&Settings>) -> Processes {
        let Some(settings) = settings else { return Processes { pids: Vec::new() } };
        let (data, run) = (settings.data_dir.display().to_string(), settings.run_dir.display().to_string());
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok()).filter(|pid| {
            let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let args: Vec<String> =
                command.split(|b| *b == 0).map(|a| String::from_utf8_lossy(a).into_owned()).collect();
            let role = args.get(1).map(String::as_str).unwrap_or_default();
            let ours = args.iter().any(|a| *a == data || a.starts_with(&format!("{run}/")));
            ours && ["run", "supervise", knarr_runtime::keeper::ARGUMENT].contains(&role)
        });
        Processes { pids: pids.collect() }
    }

    /// Proportional set size of all of them; `None` if there are none here.
    fn memory_kilobytes(&self) -> Option<u64> {
        let each = self.pids.iter().filter_map(|pid| {
            let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
            let line = rollup.lines().find(|l| l.starts_with("Pss:"))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok()
        });
        (!self.pids.is_empty()).then(|| each.sum())
    }

    fn cpu_seconds(&self) -> Option<f64> {
        let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten()? as f64;
        let each = self.pids.iter().filter_map(|pid| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
            let (user, system): (f64, f64) = (fields.get(11)?.parse().ok()?, fields.get(12)?.parse().ok()?);
            Some((user + system) / ticks)
        });
        (!self.pids.is_empty()).then(|| each.sum())
    }
}
