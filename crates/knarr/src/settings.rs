//! What a node is told: where its data lies, which ports and ranges it uses. Chosen at the first `up`,
//! kept in `settings.json` of the data directory, and read by every later command.

use std::fs;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::ops::RangeInclusive;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// The default data directory.
pub const DATA_DIR: &str = "/var/lib/knarr";
/// The default directory for sockets and state that dies with the machine's uptime.
pub const RUN_DIR: &str = "/run/knarr";

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Settings {
    pub data_dir: PathBuf,
    pub run_dir: PathBuf,
    /// The API server's port, on all addresses.
    pub port: u16,
    pub kubelet_port: u16,
    pub node_name: String,
    /// The node's own address: where pods and other nodes reach it.
    pub node_ip: IpAddr,
    /// Pod addresses of the whole cluster, and of this node.
    pub cluster_cidr: String,
    pub node_cidr: String,
    pub service_cidr: String,
    /// Clusters made before it could be chosen have the default one.
    #[serde(default = "default_node_ports")]
    pub service_node_port_range: String,
    pub domain: String,
    /// The device that holds the pods' gateway.
    pub device: String,
    /// A CRI socket; the built-in runtime if there is none.
    pub container_runtime_endpoint: Option<String>,
    /// Archives or directories of archives imported when the node starts.
    pub images: Vec<PathBuf>,
    /// No node: the control plane alone.
    pub server_only: bool,
    /// API versions that upstream has removed are served too.
    #[serde(default = "yes")]
    pub legacy_api: bool,
    /// A KubeSchedulerConfiguration; the default scheduler if there is none.
    #[serde(default)]
    pub scheduler_config: Option<PathBuf>,
    /// Name of the context in the kubeconfig.
    pub context: String,
    /// The kubeconfig that `up` merged the context into, to take it out again.
    pub kubeconfig: Option<PathBuf>,
}

/// Clusters made before the setting was there have it on.
fn yes() -> bool {
    true
}

fn default_node_ports() -> String {
    "30000-32767".into()
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            data_dir: DATA_DIR.into(),
            run_dir: RUN_DIR.into(),
            port: 6443,
            kubelet_port: 10_250,
            node_name: host_name(),
            node_ip: own_address(),
            cluster_cidr: "10.42.0.0/16".into(),
            node_cidr: "10.42.0.0/24".into(),
            service_cidr: "10.96.0.0/16".into(),
            service_node_port_range: default_node_ports(),
            domain: "cluster.local".into(),
            device: "knarr0".into(),
            container_runtime_endpoint: None,
            images: Vec::new(),
            server_only: false,
            legacy_api: true,
            scheduler_config: None,
            context: "knarr".into(),
            kubeconfig: None,
        }
    }
}

impl Settings {
    pub fn path(data_dir: &Path) -> PathBuf {
        data_dir.join("settings.json")
    }

    /// Those of a cluster made before; `None` if there is none.
    pub fn load(data_dir: &Path) -> Result<Option<Settings>> {
        let path = Settings::path(data_dir);
        match fs::read(&path) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map(Some).with_context(|| format!("read {}", path.display()))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error)
                if error.kind() == std::io::ErrorKind::PermissionDenied
                    && !nix::unistd::geteuid().is_root() =>
            {
                bail!("needed: root privileges; run it with sudo")
            }
            Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
        }
    }

    pub fn save(&self) -> Result<()> {
        fs::create_dir_all(&self.data_dir).with_context(|| format!("make {}", self.data_dir.display()))?;
        write_private(&Settings::path(&self.data_dir), serde_json::to_string_pretty(self)?.as_bytes())
    }

    pub fn pki_dir(&self) -> PathBuf {
        self.data_dir.join("pki")
    }

    /// The kubeconfig of the cluster's administrator.
    pub fn admin_kubeconfig(&self) -> PathBuf {
        self.data_dir.join("admin.kubeconfig")
    }

    /// The n-th address of the service range: 1 is the API server, 10 the cluster DNS.
    pub fn service_address(&self, n: u32) -> Result<IpAddr> {
        Ok(self.service_ranges()?.primary().nth(n))
    }

    /// One range, or one of each family.
    pub fn service_ranges(&self) -> Result<knarr_apiserver::services::Ranges> {
        self.service_cidr.parse().map_err(|e: String| anyhow::anyhow!("--service-cidr: {e}"))
    }

    /// The ports that Services may have on nodes.
    pub fn node_ports(&self) -> Result<RangeInclusive<u16>> {
        let range = self.service_node_port_range.split_once('-').and_then(|(low, high)| {
            Some((low.trim().parse::<u16>().ok()?, high.trim().parse::<u16>().ok()?))
        });
        match range {
            Some((low, high)) if 0 < low && low <= high => Ok(low..=high),
            _ => bail!(
                "--service-node-port-range: {:?} is no range of ports, such as 30000-32767",
                self.service_node_port_range
            ),
        }
    }

    /// Where the supervisor writes its process id.
    pub fn pid_file(&self) -> PathBuf {
        self.run_dir.join("knarr.pid")
    }

    pub fn log_file(&self) -> PathBuf {
        self.data_dir.join("knarr.log")
    }
}

/// Writes a file that only its owner may read, all or nothing.
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<()> {
    write(path, bytes, true)
}

/// The same for what can be made anew: it may be damaged after a power failure.
pub fn write_unflushed(path: &Path, bytes: &[u8]) -> Result<()> {
    write(path, bytes, false)
}

fn write(path: &Path, bytes: &[u8], flush: bool) -> Result<()> {
    let temporary = path.with_extension("new");
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .with_context(|| format!("write {}", temporary.display()))?;
    file.write_all(bytes)?;
    if flush {
        file.sync_all()?;
    }
    fs::rename(&temporary, path).with_context(|| format!("write {}", path.display()))
}

/// The machine's name, as a node may be called.
fn host_name() -> String {
    let name = nix::unistd::gethostname().map(|n| n.to_string_lossy().to_lowercase()).unwrap_or_default();
    if knarr_api::names::dns_subdomain(&name).is_empty() { name } else { "node".to_owned() }
}

/// The address the machine would use towards the world. Nothing is sent: connecting a datagram socket only
/// asks the routing table.
fn own_address() -> IpAddr {
    let ask = || -> std::io::Result<IpAddr> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect((Ipv4Addr::new(198, 51, 100, 1), 9))?;
        Ok(socket.local_addr()?.ip())
    };
    ask().unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
}
