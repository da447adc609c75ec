//! What can go wrong in the network, one variant per step.

use std::net::IpAddr;
use std::path::PathBuf;

/// A failed step. All may be retried behind a backoff: every operation of this crate is idempotent and
/// picks up where the failed attempt stopped.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// Reading or writing the crate's own state on disk.
    #[error("network state {path}: {source}; is the directory writable?")]
    State { path: PathBuf, source: std::io::Error },
    /// The state on disk is not what this crate wrote.
    #[error("network state {path} cannot be read ({reason}); stop all pods and delete it to start afresh")]
    Corrupt { path: PathBuf, reason: String },
    /// Every address of the range is taken.
    #[error(
        "no free pod address left in {subnet} ({held} held); delete pods or give the node a larger pod CIDR"
    )]
    Exhausted { subnet: String, held: usize },
    /// An address range that cannot be used.
    #[error("bad address range {value:?}: {reason}")]
    BadSubnet { value: String, reason: &'static str },
    /// A host port another pod holds.
    #[error("host port {port}/{protocol} is already held by pod {holder}")]
    PortTaken { port: u16, protocol: crate::Protocol, holder: String },
    /// The pod's network namespace.
    #[error("network namespace {path}: {source}")]
    Namespace { path: PathBuf, source: std::io::Error },
    /// A netlink request about links, addresses or routes.
    #[error("{step} {subject}: {reason}")]
    Netlink { step: &'static str, subject: String, reason: String },
    /// The firewall refused a transaction, or `nft` could not be run.
    #[error("nftables: {step}: {reason}")]
    Nftables { step: &'static str, reason: String },
    /// The kernel's connection table.
    #[error("connection tracking: {step}: {source}")]
    Conntrack { step: &'static str, source: std::io::Error },
    /// A kernel setting.
    #[error("kernel setting {path}: {source}")]
    Sysctl { path: PathBuf, source: std::io::Error },
    /// A device name held by a device that is not ours.
    #[error("device {name} exists but is a {kind}; choose another bridge name or remove it")]
    ForeignDevice { name: String, kind: String },
    /// A pod that should be attached is not, or not as recorded.
    #[error("pod {pod}: {what} (address {address:?})")]
    NotAttached { pod: String, what: &'static str, address: Option<IpAddr> },
}

/// The crate's result.
pub type Result<T, E = NetworkError> = std::result::Result<T, E>;
