//! The node role: container runtime, pod network, service proxy, cluster DNS and kubelet of this machine.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use k8s_openapi::api::core::v1::ObjectReference;
use knarr_client::{Client, Clock, EventType, Informers, Recorder};
use knarr_dns::{DnsConfig, DnsServer, Upstreams};
use knarr_kubelet::{Kubelet, KubeletConfig};
use knarr_network::nft::NftProgram;
use knarr_network::{ProxyConfig, RoutedConfig, RoutedNetwork, ServiceProxy, Subnet};
use knarr_runtime::imports::Importing;
use knarr_runtime::{BuiltinRuntime, Runtime, builtin};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::foreign::{self, Foreign};
use crate::pki::{Authority, Clients, Subject};
use crate::server::Server;
use crate::settings::Settings;

const DNS_PORT: u16 = 53;

fn runtime_config(settings: &Settings) -> builtin::Config {
    let mut config =
        builtin::Config::new(settings.data_dir.join("runtime"), settings.run_dir.join("runtime"));
    config.cgroup_root = cgroup_root(settings);
    config
}

/// Each cluster of a machine has its own: a purge of one must not meet the other's.
fn cgroup_root(settings: &Settings) -> String {
    if settings.data_dir == Path::new(crate::settings::DATA_DIR) {
        return "/knarr".into();
    }
    let parts = settings.data_dir.components().filter_map(|c| match c {
        std::path::Component::Normal(part) => Some(part.to_string_lossy()),
        _ => None,
    });
    format!("/knarr-{}", parts.collect::<Vec<_>>().join("-"))
}

fn network_config(settings: &Settings) -> Result<RoutedConfig> {
    let parse =
        |cidr: &str| -> Result<Subnet> { cidr.parse().map_err(|e| anyhow!("address range {cidr:?}: {e}")) };
    Ok(RoutedConfig {
        device: settings.device.clone(),
        state_dir: settings.run_dir.join("network"),
        pod_cidrs: vec![parse(&settings.node_cidr)?],
        cluster_cidrs: vec![parse(&settings.cluster_cidr)?],
        service_cidrs: settings
            .service_cidr
            .split(',')
            .map(|cidr| parse(cidr.trim()))
            .collect::<Result<_>>()?,
        mtu: None,
    })
}

/// What of a node needs no API server: it comes up beside it.
pub struct Host {
    runtime: Containers,
    network: Arc<RoutedNetwork>,
}

/// The container runtime in use.
#[derive(Clone)]
enum Containers {
    Builtin(BuiltinRuntime),
    Foreign(Arc<Foreign>),
}

impl Containers {
    fn runtime(&self) -> Arc<dyn Runtime> {
        match self {
            Containers::Builtin(runtime) => Arc::new(runtime.clone()),
            Containers::Foreign(foreign) => Arc::new(foreign.runtime.clone()),
        }
    }

    fn announce_imports(&self) -> Importing {
        match self {
            Containers::Builtin(runtime) => runtime.announce_imports(),
            Containers::Foreign(foreign) => foreign.runtime.imports().announce(),
        }
    }

    async fn import(&self, path: &Path) -> Result<usize> {
        Ok(match self {
            Containers::Builtin(runtime) => runtime.import_image(path, None, true).await?.len(),
            Containers::Foreign(foreign) => foreign.import(path).await?.len(),
        })
    }
}

impl Host {
    /// Brings up the container runtime and the pod network.
    pub async fn start(settings: &Settings) -> Result<Host> {
        let (runtime, network) = match &settings.container_runtime_endpoint {
            None => tokio::try_join!(start_builtin(settings), start_network(settings))?,
            Some(endpoint) => {
                let network = start_network(settings).await?;
                let foreign = Foreign::start(settings, endpoint, network.config()).await?;
                foreign.ensure_pause(settings).await?;
                (Containers::Foreign(Arc::new(foreign)), network)
            }
        };
        tracing::debug!("container runtime and pod network are up");
        Ok(Host { runtime, network })
    }
}

/// Starts everything else a node is made of, except for its DNS.
pub fn start(
    settings: &Settings,
    server: &Server,
    host: Host,
    tasks: &TaskTracker,
    shutdown: &CancellationToken,
) -> Result<Names> {
    let client = server.client(&format!("system:node:{}", settings.node_name), &["system:nodes"]);
    let informers = Informers::new(client.clone());
    let Host { runtime, network } = host;
    start_imports(settings, &runtime, &client, tasks, shutdown)?;
    let gateways = network.gateways();
    let (kept, stop) = (network.clone(), shutdown.clone());
    tasks.spawn(async move {
        if let Err(error) = kept.keep(stop).await {
            tracing::warn!(%error, "nobody watches the pod network's firewall table any more");
        }
    });
    let kubelet =
        kubelet(settings, &server.authority, client, informers.clone(), runtime.runtime(), network)?;
    let stop = shutdown.clone();
    tasks.spawn(async move {
        if let Err(error) = kubelet.run(stop).await {
            tracing::error!(error = %format!("{error:#}"), "the kubelet ended");
        }
    });
    start_proxy(settings, &informers, tasks, shutdown)?;
    Ok(Names { informers, gateways })
}

/// What the cluster DNS of a node is made of; see [`start_dns`].
pub struct Names {
    informers: Informers,
    gateways: Vec<IpAddr>,
}

async fn start_builtin(settings: &Settings) -> Result<Containers> {
    let runtime = BuiltinRuntime::start(runtime_config(settings)).await;
    Ok(Containers::Builtin(runtime.context("built-in container runtime")?))
}

/// Imports the archives of the settings beside everything else; pods that need one of their images wait for it.
fn start_imports(
    settings: &Settings,
    runtime: &Containers,
    client: &Client,
    tasks: &TaskTracker,
    shutdown: &CancellationToken,
) -> Result<()> {
    let archives = archives(settings)?;
    if archives.is_empty() {
        return Ok(());
    }
    let recorder = Recorder::new(client.clone(), Clock::System, "kubelet", &settings.node_name);
    let about = ObjectReference {
        kind: Some("Node".to_owned()),
        name: Some(settings.node_name.clone()),
        // As upstream's kubelet refers to its node.
        uid: Some(settings.node_name.clone()),
        ..Default::default()
    };
    let (importing, runtime) = (runtime.announce_imports(), runtime.clone());
    let work = async move {
        let _importing = importing;
        for path in archives {
            match runtime.import(&path).await {
                Ok(images) => tracing::debug!(path = %path.display(), images, "imported"),
                Err(error) => {
                    let error = format!("{error:#}");
                    tracing::error!(path = %path.display(), error, "image archive not imported");
                    let message = format!("Image archive {} was not imported: {error}", path.display());
                    recorder.event_about(about.clone(), EventType::Warning, "InvalidImageArchive", message);
                }
            }
        }
    };
    let stop = shutdown.clone();
    tasks.spawn(async move { stop.run_until_cancelled(work).await });
    Ok(())
}

/// Image archives named in the settings: files, and those in directories.
fn archives(settings: &Settings) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for path in &settings.images {
        if !path.is_dir() {
            found.push(path.clone());
            continue;
        }
        for entry in std::fs::read_dir(path).with_context(|| format!("read {}", path.display()))? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if [".tar", ".tar.gz", ".tgz"].iter().any(|end| name.ends_with(end)) {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

async fn start_network(settings: &Settings) -> Result<Arc<RoutedNetwork>> {
    Ok(Arc::new(RoutedNetwork::start(network_config(settings)?).await.context("pod network")?))
}

fn start_proxy(
    settings: &Settings,
    informers: &Informers,
    tasks: &TaskTracker,
    shutdown: &CancellationToken,
) -> Result<()> {
    let network = network_config(settings)?;
    let config = ProxyConfig {
        node_name: settings.node_name.clone(),
        cluster_cidrs: network.cluster_cidrs,
        service_cidrs: network.service_cidrs,
    };
    let proxy = ServiceProxy::new(config, Arc::new(NftProgram));
    let (informers, stop) = (informers.clone(), shutdown.clone());
    tasks.spawn(async move {
        if let Err(error) = proxy.follow(&informers, stop).await {
            tracing::error!(%error, "the service proxy ended");
        }
    });
    Ok(())
}

/// DNS listens on the pods' gateways; the `kube-dns` service leads there.
pub async fn start_dns(
    settings: &Settings,
    server: &Server,
    names: Names,
    tasks: &TaskTracker,
    shutdown: &CancellationToken,
) -> Result<()> {
    let Names { informers, gateways } = names;
    let client = server.client("system:apiserver", &["system:masters"]);
    let service = settings.service_address(10)?;
    let mut own = gateways.to_vec();
    own.push(service);
    let config = DnsConfig {
        domain: settings.domain.clone(),
        listen: gateways.iter().map(|ip| SocketAddr::new(*ip, DNS_PORT)).collect(),
        upstreams: Upstreams::from_file("/etc/resolv.conf", own),
    };
    let dns = DnsServer::bind(config).await.context("cluster DNS")?;
    dns.follow(&informers);
    let servers: Vec<knarr_dns::wiring::Server> = gateways
        .iter()
        .map(|ip| knarr_dns::wiring::Server {
            node: settings.node_name.clone(),
            address: *ip,
            port: DNS_PORT,
        })
        .collect();
    let (service, slice) = knarr_dns::wiring::objects(service, &servers);
    tokio::try_join!(publish(&client, service), publish(&client, slice))?;
    tasks.spawn(dns.run(shutdown.clone()));
    Ok(())
}

/// Applies an object of ours in its namespace.
async fn publish<K>(client: &Client, object: K) -> Result<()>
where
    K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
        + Clone
        + serde::Serialize
        + serde::de::DeserializeOwned
        + std::fmt::Debug,
{
    let name = object.meta().name.clone().unwrap_or_default();
    let namespace = object.meta().namespace.clone().unwrap_or_default();
    let api: kube::Api<K> = kube::Api::namespaced(client.clone(), &namespace);
    let options = kube::api::PatchParams::apply("knarr").force();
    let published = api.patch(&name, &options, &kube::api::Patch::Apply(&object)).await;
    published.map(|_| ()).with_context(|| format!("publish {namespace}/{name}"))
}

fn kubelet(
    settings: &Settings,
    authority: &Authority,
    client: Client,
    informers: Informers,
    runtime: Arc<dyn Runtime>,
    network: Arc<RoutedNetwork>,
) -> Result<Kubelet> {
    let (names, addresses) = ([settings.node_name.clone()], [settings.node_ip]);
    let subject = Subject {
        name: &format!("system:node:{}", settings.node_name),
        groups: &["system:nodes"],
        names: &names,
        addresses: &addresses,
    };
    let serving = authority.leaf("kubelet", &subject)?;
    let own_cluster = settings.data_dir == Path::new(crate::settings::DATA_DIR);
    let config = KubeletConfig {
        node_addresses: vec![settings.node_ip],
        root_dir: settings.data_dir.join("kubelet"),
        log_dir: log_dir(settings),
        log_link_dir: own_cluster.then(|| PathBuf::from(LOG_LINKS)),
        cluster_dns: vec![settings.service_address(10)?],
        cluster_domain: settings.domain.clone(),
        pod_cidrs: vec![settings.node_cidr.clone()],
        control_plane: true,
        cgroup_root: format!("{}/kubepods", cgroup_root(settings)),
        listen: SocketAddr::new(IpAddr::from([0, 0, 0, 0]), settings.kubelet_port),
        tls: Some(authority.server_config(&serving, Clients::Required, &["http/1.1"])?),
        ..KubeletConfig::new(&settings.node_name)
    };
    let own_network = settings.container_runtime_endpoint.is_none();
    let network = own_network.then_some(network as Arc<dyn knarr_network::PodNetwork>);
    Ok(Kubelet::new(config, client, informers, runtime, network))
}

/// Ends all containers; their pods start anew with the next `up`.
pub fn stop_containers(settings: &Settings) -> Result<()> {
    if let Some(endpoint) = &settings.container_runtime_endpoint {
        return block_on(foreign::stop_pods(endpoint));
    }
    builtin::purge::stop_all(&runtime_config(settings)).map_err(|e| anyhow!("end the containers: {e}"))
}

/// Removes everything of ours from the machine.
pub fn purge(settings: &Settings) -> Result<()> {
    // First, while the network plug-in is there to detach them. A runtime that is not there keeps nobody from
    // removing the rest.
    let foreign = settings.container_runtime_endpoint.as_deref().map_or(Ok(()), |endpoint| {
        block_on(foreign::remove_pods(endpoint)).and_then(|()| foreign::uninstall(settings))
    });
    builtin::purge::purge(&runtime_config(settings)).map_err(|e| anyhow!("purge containers: {e}"))?;
    block_on(async {
        ServiceProxy::purge(&NftProgram).await.context("purge the service proxy")?;
        knarr_network::builtin::purge(&settings.run_dir.join("network"))
            .await
            .context("purge the pod network")
    })?;
    unmount_below(&settings.data_dir)?;
    remove_pod_logs(settings)?;
    foreign
}

fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

/// Volumes of pods are mounts below the data directory.
fn unmount_below(dir: &Path) -> Result<()> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").context("read the mounts")?;
    let mut below: Vec<&str> =
        table.lines().filter_map(|l| l.split(' ').nth(4)).filter(|m| Path::new(m).starts_with(dir)).collect();
    below.sort_by_key(|m| std::cmp::Reverse(m.len()));
    for mount in below {
        nix::mount::umount2(mount, nix::mount::MntFlags::MNT_DETACH)
            .with_context(|| format!("unmount {mount}"))?;
    }
    Ok(())
}

const LOG_LINKS: &str = "/var/log/containers";

/// Logs of the machine's own cluster lie where log collectors look; others keep to their directory.
fn log_dir(settings: &Settings) -> PathBuf {
    match settings.data_dir == Path::new(crate::settings::DATA_DIR) {
        true => "/var/log/pods".into(),
        false => settings.data_dir.join("pod-logs"),
    }
}

fn remove_pod_logs(settings: &Settings) -> Result<()> {
    let logs = log_dir(settings);
    // The links come first: they lead into the logs and would dangle.
    for entry in std::fs::read_dir(LOG_LINKS).into_iter().flatten().flatten() {
        if std::fs::read_link(entry.path()).is_ok_and(|target| target.starts_with(&logs)) {
            std::fs::remove_file(entry.path())
                .with_context(|| format!("remove {}", entry.path().display()))?;
        }
    }
    match std::fs::remove_dir_all(&logs) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", logs.display()))
        }
        _ => Ok(()),
    }
}

/// What was looked for, each with what is left of it.
pub fn verify_clean(settings: &Settings) -> Result<Vec<(String, Vec<String>)>> {
    let checks = builtin::purge::verify_clean(&runtime_config(settings))
        .map_err(|e| anyhow!("look for containers: {e}"))?;
    let mut found: Vec<(String, Vec<String>)> = checks.into_iter().map(|c| (c.what, c.leftovers)).collect();
    if let Some(endpoint) = &settings.container_runtime_endpoint {
        found.push((format!("pods in the runtime at {endpoint}"), block_on(foreign::left_pods(endpoint))?));
    }
    let report = block_on(async {
        let report =
            knarr_network::builtin::verify_clean(&settings.device, &settings.run_dir.join("network")).await;
        report.context("look for network devices")
    })?;
    found.push((report.checked.join("; "), report.leftovers));
    let table = block_on(async {
        knarr_network::nft::table_exists(&NftProgram, knarr_network::proxy::TABLE)
            .await
            .context("look for firewall tables")
    })?;
    found.push((
        format!("nftables table {}", knarr_network::proxy::TABLE),
        if table { vec![knarr_network::proxy::TABLE.into()] } else { Vec::new() },
    ));
    let table = std::fs::read_to_string("/proc/self/mountinfo").context("read the mounts")?;
    let mounts = table
        .lines()
        .filter_map(|l| l.split(' ').nth(4))
        .filter(|m| Path::new(m).starts_with(&settings.data_dir));
    found
        .push((format!("mounts below {}", settings.data_dir.display()), mounts.map(str::to_owned).collect()));
    Ok(found)
}
