//! The contract between the kubelet and whatever gives pods their network.
//!
//! Values only: nothing in this file touches the machine.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::path::Path;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::error::Result;

/// Gives pods addresses and takes them back.
///
/// All three operations are idempotent and crash-safe: killed at any point and called again with the same
/// arguments they finish the job. They may be called concurrently for different pods; for one pod the
/// caller serialises. Dropping the future may leave a half-made attachment, which the next `attach`,
/// `detach` or `gc` mends.
#[async_trait]
pub trait PodNetwork: Send + Sync {
    /// Connects the network namespace at `netns` (a path such as `/run/netns/x` or `/proc/PID/ns/net`) and
    /// opens `ports` on the node. Called once per pod sandbox, before the first container, never for pods
    /// with `hostNetwork`. Called again for a pod that is attached it repairs what is missing and returns
    /// the same addresses.
    ///
    /// # Errors
    /// On error nothing needs undoing by the caller except a later `detach`; the kubelet reports
    /// `FailedCreatePodSandBox` and retries with backoff.
    async fn attach(&self, pod: &PodRef, netns: &Path, ports: &[HostPort]) -> Result<PodAddresses>;

    /// Frees everything `attach` made for the pod with this uid. Unknown uids are fine. The namespace
    /// itself may be gone already; it is never opened.
    async fn detach(&self, uid: &str) -> Result<()>;

    /// Detaches every pod whose uid is not in `live`. The kubelet calls it after start, when it knows which
    /// sandboxes survived. Returns the uids it freed.
    async fn gc(&self, live: &BTreeSet<String>) -> Result<Vec<String>>;
}

/// Which pod. Identity is the uid: a pod of the same name created again is another one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PodRef {
    pub namespace: String,
    pub name: String,
    pub uid: String,
}

impl PodRef {
    /// A reference from its three parts.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>, uid: impl Into<String>) -> PodRef {
        PodRef { namespace: namespace.into(), name: name.into(), uid: uid.into() }
    }
}

impl fmt::Display for PodRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// One `containers[].ports[]` entry that has a `hostPort`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct HostPort {
    pub protocol: Protocol,
    /// The port on the node, 1 to 65535.
    pub host_port: u16,
    /// The port in the pod, 1 to 65535.
    pub container_port: u16,
    /// Only this address of the node; `None` (and the unspecified address) means all of them.
    pub host_ip: Option<IpAddr>,
}

/// A transport protocol as in `containers[].ports[].protocol`; TCP where the manifest says nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Protocol {
    #[default]
    #[serde(rename = "TCP")]
    Tcp,
    #[serde(rename = "UDP")]
    Udp,
    #[serde(rename = "SCTP")]
    Sctp,
}

impl Protocol {
    /// From the API's spelling; `None` means TCP, anything unknown is `Err` with that spelling.
    pub fn from_api(value: Option<&str>) -> std::result::Result<Protocol, String> {
        match value {
            None | Some("" | "TCP") => Ok(Protocol::Tcp),
            Some("UDP") => Ok(Protocol::Udp),
            Some("SCTP") => Ok(Protocol::Sctp),
            Some(other) => Err(other.to_owned()),
        }
    }

    /// The number in IP headers.
    pub fn number(self) -> u8 {
        match self {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
            Protocol::Sctp => 132,
        }
    }

    /// The spelling `nft` uses.
    pub fn as_nft(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Sctp => "sctp",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Sctp => "SCTP",
        })
    }
}

/// The addresses of an attached pod, `status.podIPs`: at most one per family, the node's first family
/// first (that one is `status.podIP`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodAddresses {
    pub ips: Vec<IpAddr>,
}

impl PodAddresses {
    /// `status.podIP`.
    pub fn primary(&self) -> Option<IpAddr> {
        self.ips.first().copied()
    }
}
