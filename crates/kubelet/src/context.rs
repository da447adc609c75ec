//! What all workers of a node share.

use crate::config::KubeletConfig;
use crate::fields::Host;
use crate::images::Images;
use crate::references::References;
use crate::volumes::token::ApiTokens;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use knarr_client::{Clock, Informer, Informers, Recorder};
use knarr_network::pod::PodNetwork;
use knarr_runtime::Runtime;
use knarr_runtime::cgroup::Cgroups;
use kube::Client;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The parts of a node.
pub struct NodeContext {
    pub config: KubeletConfig,
    pub client: Client,
    /// Held so that the watches go on.
    pub informers: Informers,
    pub runtime: Arc<dyn Runtime>,
    /// `builtin`, `containerd`: the scheme of container ids.
    pub runtime_name: String,
    /// The runtime wants groups named as systemd's slices, and makes them itself.
    pub systemd_cgroups: bool,
    pub network: Option<Arc<dyn PodNetwork>>,
    /// `None` where there are none to be had (tests, no rights): pods get no limits of their own then.
    pub cgroups: Option<Cgroups>,
    pub recorder: Recorder,
    pub clock: Clock,
    pub pods: Informer<Pod>,
    pub services: Informer<Service>,
    pub node: Informer<Node>,
    pub references: References,
    pub images: Images,
    pub tokens: ApiTokens,
    pub machine: crate::node::Machine,
}

impl NodeContext {
    /// What the downward API tells about the host of a pod with these addresses.
    pub fn host(&self, pod_ips: Vec<String>) -> Host {
        let allocatable: BTreeMap<String, i64> = self
            .machine
            .allocatable(&self.config)
            .into_iter()
            .map(|(name, amount)| (name.to_owned(), amount))
            .collect();
        Host { ips: self.config.host_ips(), pod_ips, allocatable }
    }
}
