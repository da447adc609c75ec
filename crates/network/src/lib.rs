//! The node's network: addresses for pods, and Services that reach them.
//!
//! Read in this order: [`pod`] is the contract the kubelet speaks, [`builtin`] the network that keeps it,
//! [`cni`] the same spoken to as a CNI plug-in (for containerd and CRI-O), [`proxy`] the Service
//! proxy. Below them, each usable alone: [`ipam`] (who holds which address), [`ledger`] (every change made
//! to the host, so that it can be taken back and the taking back proved), [`link`] (devices, by netlink),
//! [`nft`] (the firewall) and [`conntrack`] (the kernel's connection table).
//!
//! Left to others: the overlay between nodes and NetworkPolicy have their own rooms to come; cluster DNS is
//! `knarr-dns`; who calls [`PodNetwork`] and creates network namespaces is the kubelet's and the runtime's.
//!
//! Invariant: everything here acts on the network namespace of the calling thread. Nothing assumes it is
//! the machine's first one, so several nodes can live on one machine, each in its own namespace.

pub mod builtin;
pub mod cni;
pub mod conntrack;
pub mod ipam;
pub mod ledger;
pub mod link;
pub mod nft;
pub mod pod;
pub mod proxy;

mod error;
mod netlink;
mod netns;
mod state;
mod sysctl;
mod watch;

pub use builtin::{CleanReport, RoutedConfig, RoutedNetwork};
pub use error::NetworkError;
pub use ipam::Subnet;
pub use pod::{HostPort, PodAddresses, PodNetwork, PodRef, Protocol};
pub use proxy::{ProxyConfig, ServiceProxy};
