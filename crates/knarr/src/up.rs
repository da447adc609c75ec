//! `knarr up`, `down` and `status`: from nothing to a cluster and back.

use std::io::{IsTerminal, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use k8s_openapi::api::core::v1::{Node, Pod};
use knarr_client::Client;
use kube::api::{Api, ListParams};

use crate::settings::{self, Settings};
use crate::{check, daemon, kubeconfig, node, server};

/// How long each step of `up` may take before it is given up.
const STEP_TIMEOUT: Duration = Duration::from_secs(60);
/// How often a step looks again. Starting is a matter of tens of milliseconds.
const STEP_INTERVAL: Duration = Duration::from_millis(10);
/// How long one question to the cluster DNS waits; a question sent too early is lost.
const DNS_PATIENCE: Duration = Duration::from_millis(25);

/// Options of `up`; those not given stay as they were at the first `up`.
#[derive(Args, Debug, Default)]
pub struct UpArgs {
    /// Where the cluster's data lies.
    #[arg(long, default_value = settings::DATA_DIR)]
    pub data_dir: PathBuf,
    /// Where sockets and other short-lived state lie.
    #[arg(long)]
    pub run_dir: Option<PathBuf>,
    /// The API server's port [default: 6443].
    #[arg(long)]
    pub port: Option<u16>,
    /// The node agent's port [default: 10250].
    #[arg(long)]
    pub kubelet_port: Option<u16>,
    /// The node's name [default: the host name].
    #[arg(long)]
    pub node_name: Option<String>,
    /// The node's address [default: that of the default route].
    #[arg(long)]
    pub node_ip: Option<IpAddr>,
    /// Addresses of pods [default: 10.42.0.0/16].
    #[arg(long)]
    pub cluster_cidr: Option<String>,
    /// Addresses of services: one range, or one of each family with a comma between [default: 10.96.0.0/16].
    #[arg(long)]
    pub service_cidr: Option<String>,
    /// Ports that services may have on nodes [default: 30000-32767].
    #[arg(long)]
    pub service_node_port_range: Option<String>,
    /// A CRI socket to use instead of the built-in container runtime.
    #[arg(long)]
    pub container_runtime_endpoint: Option<String>,
    /// An image archive, or a directory of them, to import; repeatable.
    #[arg(long)]
    pub images: Vec<PathBuf>,
    /// The control plane alone, without a node.
    #[arg(long)]
    pub server_only: bool,
    /// Have at least so many simulated nodes: nodes without a machine, whose pods live as their annotations declare.
    #[arg(long, value_name = "N")]
    pub simulated_nodes: Option<usize>,
    /// Serve API versions that upstream has removed, as older manifests use them [default: true].
    #[arg(long, action = clap::ArgAction::Set)]
    pub legacy_api: Option<bool>,
    /// A KubeSchedulerConfiguration (v1) for the scheduler; an empty name goes back to the default.
    #[arg(long, value_name = "FILE")]
    pub scheduler_config: Option<PathBuf>,
    /// Name of the context in the kubeconfig [default: knarr].
    #[arg(long)]
    pub context: Option<String>,
    /// Leave the user's kubeconfig alone.
    #[arg(long)]
    pub no_kubeconfig: bool,
}

impl UpArgs {
    fn settings(&self) -> Result<Settings> {
        let stored = Settings::load(&self.data_dir)?;
        let first = stored.is_none();
        let mut settings =
            stored.unwrap_or_else(|| Settings { data_dir: self.data_dir.clone(), ..Settings::default() });
        if first && self.data_dir != Path::new(settings::DATA_DIR) {
            // A second cluster beside the machine's own keeps to its own directory.
            settings.run_dir = self.data_dir.join("run");
        }
        macro_rules! take {
            ($($field:ident),*) => { $(if let Some(value) = &self.$field { settings.$field = value.clone(); })* };
        }
        take!(
            run_dir,
            port,
            kubelet_port,
            node_name,
            node_ip,
            cluster_cidr,
            service_cidr,
            service_node_port_range,
            legacy_api,
            context
        );
        if let Some(cidr) = &self.cluster_cidr {
            settings.node_cidr = first_range(cidr)?;
        }
        if self.container_runtime_endpoint.is_some() {
            settings.container_runtime_endpoint = self.container_runtime_endpoint.clone();
        }
        if !self.images.is_empty() {
            settings.images =
                self.images.iter().map(|p| std::path::absolute(p).unwrap_or_else(|_| p.clone())).collect();
        }
        if let Some(path) = &self.scheduler_config {
            let named = !path.as_os_str().is_empty();
            settings.scheduler_config =
                named.then(|| std::path::absolute(path).unwrap_or_else(|_| path.clone()));
            server::scheduler_config(&settings).context("--scheduler-config")?;
        }
        settings.server_only |= self.server_only;
        settings.service_ranges()?;
        settings.node_ports()?;
        if settings.node_ip.is_loopback() && !settings.server_only {
            // No way out of the machine: the pods' gateway is an address that both they and the host reach.
            settings.node_ip = IpAddr::V4(gateway(&settings.node_cidr)?);
        }
        Ok(settings)
    }
}

/// The first /24 of the cluster's range, or the range itself if it is no larger: this node's.
fn first_range(cidr: &str) -> Result<String> {
    let (base, prefix) =
        cidr.split_once('/').with_context(|| format!("--cluster-cidr: {cidr:?} is no address range"))?;
    let _: Ipv4Addr = base.parse().with_context(|| format!("--cluster-cidr: {cidr:?} is no IPv4 range"))?;
    let prefix: u8 =
        prefix.parse().with_context(|| format!("--cluster-cidr: {cidr:?} is no address range"))?;
    Ok(format!("{base}/{}", prefix.max(24)))
}

fn gateway(cidr: &str) -> Result<Ipv4Addr> {
    let base: Ipv4Addr = cidr.split('/').next().unwrap_or_default().parse().context("node address range")?;
    Ok(Ipv4Addr::from(u32::from(base) + 1))
}

/// Prints one line a step, with the time it took.
struct Progress {
    started: Instant,
}

impl Progress {
    fn step<T>(&self, what: &str, run: impl FnOnce() -> Result<T>) -> Result<T> {
        let begin = Instant::now();
        let live = std::io::stdout().is_terminal();
        if live {
            print!("  {what} ...");
            std::io::stdout().flush()?;
        }
        let result = run();
        let mark = if result.is_ok() { "✔" } else { "✘" };
        let time = begin.elapsed();
        println!("{}{mark} {what:<44} {:>7.1} ms", if live { "\r" } else { "" }, time.as_secs_f64() * 1000.0);
        result
    }
}

pub fn up(args: &UpArgs) -> Result<()> {
    let mut settings = args.settings()?;
    if daemon::is_running(&settings) {
        if Settings::load(&args.data_dir)?.as_ref().is_some_and(|s| {
            Settings { kubeconfig: None, ..s.clone() } != Settings { kubeconfig: None, ..settings.clone() }
        }) {
            bail!(
                "the cluster is running with other settings; `knarr down` first, then `knarr up` with the new ones"
            );
        }
        println!("The cluster is already up; nothing was changed.");
        let progress = Progress { started: Instant::now() };
        add_simulated(args, &settings, &progress)?;
        return farewell(&settings);
    }
    check::require(&settings)?;
    let progress = Progress { started: Instant::now() };
    if !args.no_kubeconfig {
        settings.kubeconfig = kubeconfig::user_path();
    }
    settings.save()?;
    progress.step("started", || daemon::start(&settings))?;
    let result =
        wait_until_ready(&settings, &progress).and_then(|()| add_simulated(args, &settings, &progress));
    if result.is_err() {
        eprintln!("See {} for what happened.", daemon::log_place(&settings));
    }
    result?;
    println!("Up in {:.2} s.", progress.started.elapsed().as_secs_f64());
    farewell(&settings)
}

fn wait_until_ready(settings: &Settings, progress: &Progress) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let client = progress.step("API answers", || {
        runtime.block_on(async {
            wait("the API server answers", async || -> Result<Option<Client>> {
                if !daemon::is_running(settings) {
                    bail!("the cluster's process ended");
                }
                let Ok(client) =
                    knarr_client::connect::from_kubeconfig(&settings.admin_kubeconfig(), None).await
                else {
                    return Ok(None);
                };
                Ok(client.apiserver_version().await.ok().map(|_| client))
            })
            .await
        })
    })?;
    if let Some(path) = &settings.kubeconfig {
        let what = format!("context {:?} in {}", settings.context, path.display());
        progress.step(&what, || kubeconfig::merge(settings, path))?;
    }
    if settings.server_only {
        return Ok(());
    }
    progress.step(&format!("node {} is Ready", settings.node_name), || {
        runtime.block_on(async {
            let nodes: Api<Node> = Api::all(client.clone());
            wait("the node is Ready", async || {
                Ok(nodes.get_opt(&settings.node_name).await?.filter(is_ready).map(|_| ()))
            })
            .await
        })
    })?;
    progress.step("cluster DNS answers", || {
        runtime.block_on(async {
            wait("cluster DNS answers", async || Ok(dns_answers(settings).await?.then_some(()))).await
        })
    })
}

/// `--simulated-nodes`.
fn add_simulated(args: &UpArgs, settings: &Settings, progress: &Progress) -> Result<()> {
    let Some(wanted) = args.simulated_nodes else { return Ok(()) };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    progress.step(&format!("{wanted} simulated nodes are Ready"), || {
        runtime.block_on(async {
            let client = knarr_client::connect::from_kubeconfig(&settings.admin_kubeconfig(), None).await?;
            crate::simulated::ensure(&client, wanted).await.map(|_| ())
        })
    })
}

async fn wait<T>(what: &str, mut look: impl AsyncFnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + STEP_TIMEOUT;
    loop {
        if let Some(found) = look().await? {
            return Ok(found);
        }
        if Instant::now() > deadline {
            bail!("waited {} s until {what}", STEP_TIMEOUT.as_secs());
        }
        tokio::time::sleep(STEP_INTERVAL).await;
    }
}

pub fn is_ready(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|s| s.conditions.as_deref()).unwrap_or_default();
    conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True")
}

/// Asks the cluster DNS, through its service address, for the API server's name.
async fn dns_answers(settings: &Settings) -> Result<bool> {
    let server = SocketAddr::from((settings.service_address(10)?, 53));
    let name = format!("kubernetes.default.svc.{}.", settings.domain);
    let asked = tokio::time::timeout(DNS_PATIENCE, knarr_dns::lookup(server, &name)).await;
    Ok(matches!(asked, Ok(Ok(addresses)) if !addresses.is_empty()))
}

fn farewell(settings: &Settings) -> Result<()> {
    if settings.kubeconfig.is_none() {
        println!("export KUBECONFIG={}", settings.admin_kubeconfig().display());
    }
    println!(
        "Next: knarr kubectl get nodes    (or kubectl: the context {:?} is the current one)",
        settings.context
    );
    Ok(())
}

#[derive(Args, Debug)]
pub struct DownArgs {
    #[arg(long, default_value = settings::DATA_DIR)]
    pub data_dir: PathBuf,
    /// Also remove all data, network devices, firewall tables, control groups and mounts.
    #[arg(long)]
    pub purge: bool,
    /// List what was looked for afterwards, and fail if anything is left.
    #[arg(long)]
    pub verify: bool,
}

pub fn down(args: &DownArgs) -> Result<()> {
    let stored = Settings::load(&args.data_dir)?;
    let found = stored.is_some();
    let settings =
        stored.unwrap_or_else(|| Settings { data_dir: args.data_dir.clone(), ..Settings::default() });
    if !nix::unistd::geteuid().is_root() {
        bail!("needed: root privileges; run it with sudo");
    }
    let progress = Progress { started: Instant::now() };
    let ran = progress.step("processes ended", || daemon::stop(&settings))?;
    if !settings.server_only && (found || ran) {
        progress.step("containers ended", || node::stop_containers(&settings))?;
    }
    if args.purge {
        progress.step("everything removed", || node::purge(&settings))?;
        if let Some(path) = &settings.kubeconfig {
            progress.step("context removed from the kubeconfig", || kubeconfig::remove(&settings, path))?;
        }
        remove_dirs(&settings)?;
    } else {
        println!(
            "The data stays in {}; `knarr up` brings the cluster back, `knarr down --purge` removes it.",
            settings.data_dir.display()
        );
    }
    if args.verify {
        return verify(&settings);
    }
    Ok(())
}

fn remove_dirs(settings: &Settings) -> Result<()> {
    for dir in [&settings.run_dir, &settings.data_dir] {
        match std::fs::remove_dir_all(dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("remove {}", dir.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Shows that nothing is left, or what is.
fn verify(settings: &Settings) -> Result<()> {
    let mut left = 0;
    let mut checks = node::verify_clean(settings)?;
    for dir in [&settings.run_dir, &settings.data_dir] {
        let leftovers = if dir.exists() { vec![dir.display().to_string()] } else { Vec::new() };
        checks.push((format!("directory {}", dir.display()), leftovers));
    }
    let supervisor = daemon::supervisor(settings).map(|pid| pid.to_string());
    checks.push(("supervisor process".into(), supervisor.into_iter().collect()));
    for (what, leftovers) in checks {
        match leftovers.is_empty() {
            true => println!("✔ none left: {what}"),
            false => println!("✘ left: {what}: {}", leftovers.join(", ")),
        }
        left += leftovers.len();
    }
    if left > 0 {
        bail!("{left} things are left; run `knarr down --purge --verify` again, and report it if they stay");
    }
    println!("Nothing is left.");
    Ok(())
}

/// One screen: is it running, is it well, what next.
pub fn status(data_dir: &Path) -> Result<()> {
    let Some(settings) = Settings::load(data_dir)? else {
        bail!("there is no cluster in {}; `knarr up` makes one", data_dir.display());
    };
    if !daemon::is_running(&settings) {
        bail!("the cluster is down; `knarr up` brings it back");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let client = knarr_client::connect::from_kubeconfig(&settings.admin_kubeconfig(), None).await?;
        let version = client.apiserver_version().await.context("the API server does not answer")?;
        println!("✔ API server   https://{}:{} {}", settings.node_ip, settings.port, version.git_version);
        let nodes: Api<Node> = Api::all(client.clone());
        for node in nodes.list(&ListParams::default()).await? {
            let mark = if is_ready(&node) { "✔" } else { "✘" };
            let state = if is_ready(&node) { "Ready" } else { "NotReady" };
            println!("{mark} node         {} {state}", node.metadata.name.unwrap_or_default());
        }
        let pods: Api<Pod> = Api::all(client);
        let pods = pods.list(&ListParams::default()).await?;
        let running =
            pods.iter().filter(|p| p.status.as_ref().is_some_and(|s| s.phase.as_deref() == Some("Running")));
        println!("  pods         {} of {} running", running.count(), pods.items.len());
        if !settings.server_only {
            let answers = dns_answers(&settings).await?;
            println!("{} cluster DNS  {}", if answers { "✔" } else { "✘" }, settings.service_address(10)?);
        }
        Ok(())
    })
}

/// `knarr check`.
pub fn check(args: &UpArgs) -> Result<()> {
    let settings = args.settings()?;
    check::report(&settings, daemon::is_running(&settings))
}
