//! What a kubelet is told when it is made. Values only; where they come from is the binary's business.

use k8s_openapi::api::core::v1::{NodeAddress, Taint};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

/// The version the node reports.
pub const VERSION: &str = "v1.36.0+knarr";
/// Where kubelets listen.
pub const PORT: u16 = 10_250;
/// How many pods a node takes unless told otherwise.
pub const PODS_MAX: u32 = 110;

/// Everything that makes this node this node.
#[derive(Clone)]
pub struct KubeletConfig {
    pub node_name: String,
    /// Reported as `InternalIP`, and the pods' `hostIPs`; the first one is their `hostIP`.
    pub node_addresses: Vec<IpAddr>,
    /// State of pods: volumes, hosts files, termination messages.
    pub root_dir: PathBuf,
    /// `/var/log/pods`: one directory per pod.
    pub log_dir: PathBuf,
    /// `/var/log/containers`: links with flat names, which log collectors read. `None` makes none.
    pub log_link_dir: Option<PathBuf>,
    pub cluster_dns: Vec<IpAddr>,
    pub cluster_domain: String,
    /// The node's resolver configuration, for pods that use the node's DNS.
    pub resolv_conf: PathBuf,
    /// Set on the node when it is created; empty where a controller allocates ranges.
    pub pod_cidrs: Vec<String>,
    pub labels: BTreeMap<String, String>,
    pub taints: Vec<Taint>,
    /// Adds the label `node-role.kubernetes.io/control-plane`.
    pub control_plane: bool,
    pub pods_max: u32,
    pub version: String,
    /// Prefix of all control groups of pods: `/kubepods`.
    pub cgroup_root: String,
    /// Kept back from pods: `cpu`, `memory`, `ephemeral-storage`.
    pub reserved: BTreeMap<String, String>,
    /// Where the node's HTTPS server listens.
    pub listen: SocketAddr,
    /// The server's certificate, and the CA its clients' certificates must be signed by: it must demand client
    /// certificates. Without it there is no server, and so no logs, exec and the like.
    pub tls: Option<Arc<rustls::ServerConfig>>,
    /// Who may use the server, by the certificate's groups (organisations).
    pub allowed_groups: Vec<String>,
}

impl Default for KubeletConfig {
    /// The usual places and numbers.
    fn default() -> Self {
        KubeletConfig {
            node_name: String::new(),
            node_addresses: Vec::new(),
            root_dir: PathBuf::from("/var/lib/knarr/kubelet"),
            log_dir: PathBuf::from("/var/log/pods"),
            log_link_dir: Some(PathBuf::from("/var/log/containers")),
            cluster_dns: Vec::new(),
            cluster_domain: "cluster.local".to_owned(),
            resolv_conf: PathBuf::from("/etc/resolv.conf"),
            pod_cidrs: Vec::new(),
            labels: BTreeMap::new(),
            taints: Vec::new(),
            control_plane: false,
            pods_max: PODS_MAX,
            version: VERSION.to_owned(),
            cgroup_root: "/kubepods".to_owned(),
            reserved: BTreeMap::new(),
            listen: SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), PORT),
            tls: None,
            allowed_groups: vec!["system:masters".to_owned()],
        }
    }
}

impl KubeletConfig {
    /// The defaults for a node of this name.
    pub fn new(node_name: impl Into<String>) -> Self {
        KubeletConfig { node_name: node_name.into(), ..KubeletConfig::default() }
    }

    /// The addresses pods see as their host's.
    pub fn host_ips(&self) -> Vec<String> {
        self.node_addresses.iter().map(ToString::to_string).collect()
    }

    /// The addresses in the node's status.
    pub fn told_addresses(&self) -> Vec<NodeAddress> {
        let address = |kind: &str, address: String| NodeAddress { type_: kind.to_owned(), address };
        let mut out: Vec<NodeAddress> =
            self.host_ips().into_iter().map(|ip| address("InternalIP", ip)).collect();
        out.push(address("Hostname", self.node_name.clone()));
        out
    }
}
