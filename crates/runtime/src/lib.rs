//! Containers: one trait, [`Runtime`], shaped like CRI v1, with two implementations: the built-in runtime
//! (images, overlay snapshots, pause-less sandboxes, containers held by a keeper process) and a client for any
//! CRI v1 socket (containerd, CRI-O).
//!
//! Pods, probes, volumes, restart policy and the pod's network are the kubelet's and the network room's; this
//! crate knows sandboxes, containers and images only.

pub mod cri;
pub mod error;
pub mod stream;

pub use builtin::BuiltinRuntime;
pub use cri::Runtime;
pub use error::{Error, Kind, Result};
pub use remote::RemoteRuntime;
pub use stream::{Duplex, ExecSession, Reader, TerminalSize, Writer};

pub mod builtin;
pub mod cgroup;
mod device_filter;
pub mod host;
pub mod image;
pub mod imports;
pub mod keeper;
pub mod remote;
mod rootdir;
mod seccomp;
pub mod spec;
pub mod user;
