//! What a kubelet is told when it is made. Values only; where they come from is the binary's business.

use k8s_openapi::api::core::v1::{NodeAddress, Taint};
use rustls::RootCertStore;
use rustls::server::ResolvesServerCert;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

/// The version the node reports.
pub const VERSION: &str = "v1.36.0+knarr";
/// Where kubelets listen.
pub const PORT: u16 = 10_250;
/// How many pods a node takes unless told otherwise.
pub const PODS_MAX: u32 = 110;

/// Everything that makes this node this node.
#[derive(Clone, Debug)]
pub struct KubeletConfig {
    pub node_name: String,
    /// Reported as they are; the first `InternalIP` is the pods' `hostIP`.
    pub node_addresses: Vec<NodeAddress>,
    /// State of pods: volumes, hosts files, termination messages.
    pub root_dir: PathBuf,
    /// `/var/log/pods`: one directory per pod.
    pub pod_log_dir: PathBuf,
    /// `/var/log/containers`: links with flat names, which log collectors read. `None` makes none.
    pub container_log_dir: Option<PathBuf>,
    pub cluster_dns: Vec<String>,
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
    /// The node's HTTPS server; without it there are no logs, exec and the like.
    pub server: Option<ServerConfig>,
}

/// The node's HTTPS server. Only clients with a certificate signed by `client_ca` get past the handshake.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    pub listen: SocketAddr,
    /// Asked at each handshake, so that certificates renew without a restart.
    pub certificate: Arc<dyn ResolvesServerCert>,
    pub client_ca: Arc<RootCertStore>,
    /// Common names that may use the server (the API server's, `kubelet-client`); empty: every holder of a
    /// certificate of `client_ca` may.
    pub allowed_names: Vec<String>,
}

impl KubeletConfig {
    /// The usual places and numbers for a node of this name.
    pub fn new(node_name: impl Into<String>) -> Self {
        KubeletConfig {
            node_name: node_name.into(),
            node_addresses: Vec::new(),
            root_dir: PathBuf::from("/var/lib/knarr/kubelet"),
            pod_log_dir: PathBuf::from("/var/log/pods"),
            container_log_dir: Some(PathBuf::from("/var/log/containers")),
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
            server: None,
        }
    }

    /// The addresses pods see as their host's: every `InternalIP`.
    pub fn host_ips(&self) -> Vec<String> {
        let internal = self.node_addresses.iter().filter(|address| address.type_ == "InternalIP");
        internal.map(|address| address.address.clone()).collect()
    }
}
