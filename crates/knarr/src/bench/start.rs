//! `knarr bench start`: how long a cluster takes from an empty disk, round by round.
//!
//! Each round is a whole cluster in a network namespace and a directory of its own, made by `knarr up` and
//! removed by `knarr down`: nothing of the machine's own cluster is touched.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use futures::StreamExt;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use knarr_client::Client;
use kube::api::{Api, PostParams, WatchEvent, WatchParams};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{Processes, millis};
use crate::settings::Settings;

/// How often a round looks whether something has happened that no watch can tell.
const LOOK_AGAIN: Duration = Duration::from_millis(2);
const ROUND_MAX: Duration = Duration::from_secs(60);
/// The Service's address is chosen by us: the tenth of its range is DNS, by custom.
const DNS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);

#[derive(Args, Debug)]
pub struct StartArgs {
    /// How many clusters to start, one after the other.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Image archives, or a directory of them; `nginx:latest` must be among them.
    #[arg(long, default_value = "target/images")]
    images: PathBuf,
    /// Where the clusters' data is written; the disk to measure.
    #[arg(long, default_value = "/var/tmp")]
    dir: PathBuf,
}

/// Moments of one round, each counted from the start of the program.
struct Round {
    api: Duration,
    node: Duration,
    pod: Duration,
    answer: Duration,
    memory_kilobytes: Option<u64>,
}

pub fn start(args: &StartArgs) -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "starting clusters needs root; run this with sudo");
    let images = args.images.canonicalize().with_context(|| {
        format!(
            "{}: no images; build them with `make images` or name them with --images",
            args.images.display()
        )
    })?;
    // Before any other thread is there: namespaces belong to threads.
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).context("make a network namespace")?;
    run(Command::new("ip").args(["link", "set", "lo", "up"]))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut rounds = Vec::new();
    for n in 0..args.rounds {
        let dir = args.dir.join(format!("knarr-bench-{}-{n}", std::process::id()));
        let round = runtime.block_on(round(&dir, &images));
        let removed = run(knarr(&dir, "down").arg("--purge").stdout(Stdio::null()));
        rounds.push(round.with_context(|| format!("round {}", n + 1))?);
        removed?;
        std::fs::remove_dir_all(&dir).ok();
    }
    let show = |what: &str, moment: &dyn Fn(&Round) -> Duration| {
        let mut times: Vec<Duration> = rounds.iter().map(moment).collect();
        times.sort_unstable();
        let (p0, p50, p100) = (millis(&times, 0), millis(&times, 50), millis(&times, 100));
        println!("{what:<44} {p50:>10.0} ms  ({p0:.0} to {p100:.0})");
    };
    show("from an empty disk until the API answers", &|r| r.api);
    show("until the node is Ready", &|r| r.node);
    show("until a first pod is Ready", &|r| r.pod);
    show("until it answers by its Service's DNS name", &|r| r.answer);
    if let Some(memory) = rounds.iter().filter_map(|r| r.memory_kilobytes).max() {
        println!("{:<44} {:>10.1} MB PSS", "memory of all processes then, at most", memory as f64 / 1024.0);
    }
    Ok(())
}

fn knarr(dir: &Path, verb: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap_or_else(|_| "knarr".into()));
    command.arg(verb).arg("--data-dir").arg(dir.join("k"));
    command
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("{command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}

async fn round(dir: &Path, images: &Path) -> Result<Round> {
    std::fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    let begin = Instant::now();
    let mut up = knarr(dir, "up")
        .args(["--node-name", "bench", "--no-kubeconfig", "--images"])
        .arg(images)
        .stdout(Stdio::null())
        .spawn()
        .context("start `knarr up`")?;
    let measured = tokio::time::timeout(ROUND_MAX, moments(&dir.join("k"), begin)).await;
    let status = up.wait()?;
    let round = measured.with_context(|| format!("not done within {} s", ROUND_MAX.as_secs()))??;
    ensure!(status.success(), "`knarr up`: {status}");
    Ok(round)
}

async fn moments(data_dir: &Path, begin: Instant) -> Result<Round> {
    let client = look("the API answers", async || {
        let settings = Settings::load(data_dir).ok().flatten()?;
        let client = knarr_client::connect::from_kubeconfig(&settings.admin_kubeconfig(), None).await.ok()?;
        client.apiserver_version().await.ok().map(|_| client)
    })
    .await;
    let api = begin.elapsed();
    app(&client).await?;
    let node = until::<Node>(Api::all(client.clone()), "bench", begin, |node| {
        let conditions = node.status.as_ref().and_then(|s| s.conditions.as_deref()).unwrap_or_default();
        conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True")
    });
    let pod = until::<Pod>(Api::default_namespaced(client.clone()), "first", begin, |pod| {
        let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_deref()).unwrap_or_default();
        conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True")
    });
    let answer = look("the app answers by name", async || {
        let found = knarr_dns::lookup(SocketAddr::from((DNS, 53)), "first.default.svc.cluster.local.");
        let found = tokio::time::timeout(Duration::from_millis(50), found).await.ok()?.ok()?;
        page(SocketAddr::from((*found.first()?, 80))).await.ok().map(|()| begin.elapsed())
    });
    let (node, pod, answer) = tokio::join!(node, pod, answer);
    let memory_kilobytes = Processes::of(Settings::load(data_dir)?.as_ref()).memory_kilobytes();
    Ok(Round { api, node: node?, pod: pod?, answer, memory_kilobytes })
}

/// A web server and its Service, as soon as the API takes them.
async fn app(client: &Client) -> Result<()> {
    let service: Service = serde_json::from_value(json!({ "metadata": { "name": "first" }, "spec": {
        "selector": { "app": "first" }, "ports": [{ "port": 80 }],
    } }))?;
    let pod: Pod = serde_json::from_value(json!({
        "metadata": { "name": "first", "labels": { "app": "first" } },
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "containers": [{ "name": "c", "image": "docker.io/library/nginx:latest", "imagePullPolicy": "IfNotPresent" }],
        },
    }))?;
    Api::default_namespaced(client.clone()).create(&PostParams::default(), &service).await?;
    // The namespace's service account is made by a loop and may come a moment later.
    let pods: Api<Pod> = Api::default_namespaced(client.clone());
    look("a pod may be created", async || pods.create(&PostParams::default(), &pod).await.ok()).await;
    Ok(())
}

/// When the object first looks as it should.
async fn until<K>(api: Api<K>, name: &str, begin: Instant, is: impl Fn(&K) -> bool) -> Result<Duration>
where
    K: Clone + std::fmt::Debug + serde::de::DeserializeOwned + 'static,
{
    let params = WatchParams::default().fields(&format!("metadata.name={name}"));
    let mut watch = api.watch(&params, "0").await?.boxed();
    while let Some(event) = watch.next().await {
        if let WatchEvent::Added(object) | WatchEvent::Modified(object) = event?
            && is(&object)
        {
            return Ok(begin.elapsed());
        }
    }
    bail!("the watch of {name} ended")
}

async fn look<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    tracing::debug!(what, "awaited");
    loop {
        if let Some(found) = look().await {
            return found;
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

async fn page(address: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    ensure!(answer.contains("200 OK"), "{answer}");
    Ok(())
}
