//! Cluster DNS: names of Services and pods, answered in the node's own process.
//!
//! Read in this order: [`index`] turns Services and EndpointSlices into names, [`answer`] answers a question
//! from it by the Kubernetes DNS specification 1.1, [`forward`] asks the world about all other names,
//! [`server`] moves packets. The first two are pure.
//!
//! # How pods reach it
//!
//! Pods ask the cluster IP of the Service `kube-system/kube-dns` (10.96.0.10 by custom). On each node the
//! server listens on an address of that node which pods can reach: the pod network's gateway
//! (`knarr_network::RoutedNetwork::gateways`). [`wiring::objects`] makes the Service (without selector) and the
//! EndpointSlice that names those addresses; the Service proxy does the rest. `internalTrafficPolicy: Local`
//! keeps each pod's questions on its own node.
//!
//! Left to others: `/etc/resolv.conf` inside pods is the kubelet's.

pub mod answer;
pub mod forward;
pub mod index;
pub mod server;
pub mod wiring;

pub use answer::Zone;
pub use forward::{Upstreams, lookup};
pub use index::Index;
pub use server::{DnsConfig, DnsServer};
