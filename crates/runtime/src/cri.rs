//! The contract between the kubelet and whatever runs its containers.
//!
//! Messages are CRI v1's own ([`k8s_cri::v1`], re-exported as [`v1`]), so that a remote runtime is a thin client and
//! the built-in one can be served on a socket. Three things differ from the wire protocol, because the kubelet
//! sits in the same process: streams are returned as streams instead of URLs, lifecycle events are a first-class
//! stream (the kubelet never relists on a timer), and the caller learns who owns the pod's network.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::BoxStream;
pub use k8s_cri::v1;

use crate::error::{Error, Result};
use crate::stream::{Duplex, ExecSession};

/// A container runtime. Object safe; use as `Arc<dyn Runtime>`.
///
/// Rules that hold for every implementation, as in CRI:
/// - Stopping and removing are idempotent: what is already stopped or gone is a success.
/// - `*_status` of something unknown fails with [`crate::Kind::NotFound`].
/// - Dropping a returned future may leave the work going on in the background; asking again is safe.
/// - All times in messages are nanoseconds since the epoch.
#[async_trait]
pub trait Runtime: Send + Sync + 'static {
    /// Name and version of the runtime; `runtime_api_version` is `v1`.
    async fn version(&self) -> Result<v1::VersionResponse>;

    /// Conditions `RuntimeReady` and `NetworkReady`; with `verbose` also an info map.
    async fn status(&self, verbose: bool) -> Result<v1::StatusResponse>;

    /// Which cgroup driver the runtime expects parents of pods to be named for.
    async fn runtime_config(&self) -> Result<v1::RuntimeConfigResponse>;

    /// True if sandboxes come with addresses (a remote runtime calls CNI itself). False if the caller attaches the
    /// network to [`netns_path`] and then reports the addresses by [`Runtime::set_sandbox_addresses`].
    fn attaches_network(&self) -> bool;

    // Sandboxes.

    /// Makes and starts a sandbox; returns its id. A live sandbox of the same pod uid and attempt is an error
    /// ([`crate::Kind::AlreadyExists`]).
    async fn run_pod_sandbox(&self, config: v1::PodSandboxConfig, runtime_handler: &str) -> Result<String>;

    /// Records the addresses the caller gave to the sandbox, so that status shows them, also after a restart.
    async fn set_sandbox_addresses(&self, sandbox_id: &str, addresses: &[IpAddr]) -> Result<()>;

    /// Kills the sandbox's containers and releases its namespaces. Detach the pod's network before.
    async fn stop_pod_sandbox(&self, sandbox_id: &str) -> Result<()>;

    /// Removes the sandbox and every container in it, killing what still runs.
    async fn remove_pod_sandbox(&self, sandbox_id: &str) -> Result<()>;

    /// With `verbose`, the info map holds `netns` (path of the network namespace; absent with host network) for the
    /// built-in runtime, or whatever the remote runtime tells; read it with [`netns_path`].
    async fn pod_sandbox_status(
        &self,
        sandbox_id: &str,
        verbose: bool,
    ) -> Result<v1::PodSandboxStatusResponse>;

    async fn list_pod_sandbox(&self, filter: Option<v1::PodSandboxFilter>) -> Result<Vec<v1::PodSandbox>>;

    // Containers.

    /// Prepares a container in a sandbox; returns its id. The image must be present.
    async fn create_container(
        &self,
        sandbox_id: &str,
        config: v1::ContainerConfig,
        sandbox_config: v1::PodSandboxConfig,
    ) -> Result<String>;

    /// Starts a created container. When the command cannot be run, fails with [`crate::Kind::CannotRun`] and the
    /// container is left exited (code 128, reason `StartError`).
    async fn start_container(&self, container_id: &str) -> Result<()>;

    /// Sends the stop signal (the image's, or SIGTERM), waits `grace`, then kills. Returns when it has exited.
    async fn stop_container(&self, container_id: &str, grace: Duration) -> Result<()>;

    /// Removes a container, killing it if it runs. Its log file stays: the kubelet owns it.
    async fn remove_container(&self, container_id: &str) -> Result<()>;

    async fn list_containers(&self, filter: Option<v1::ContainerFilter>) -> Result<Vec<v1::Container>>;

    async fn container_status(
        &self,
        container_id: &str,
        verbose: bool,
    ) -> Result<v1::ContainerStatusResponse>;

    /// Changes cpu, memory and cpuset limits of a running container in place.
    async fn update_container_resources(
        &self,
        container_id: &str,
        resources: v1::LinuxContainerResources,
    ) -> Result<()>;

    /// Opens the container's log file anew, after the caller has renamed the old one away.
    async fn reopen_container_log(&self, container_id: &str) -> Result<()>;

    // Streams.

    /// Runs a command to its end, at most `timeout` (zero: no limit), collecting output. Of each stream at most
    /// 16 MiB is kept. Running out of time kills the command and fails with [`crate::Kind::DeadlineExceeded`].
    async fn exec_sync(
        &self,
        container_id: &str,
        command: Vec<String>,
        timeout: Duration,
    ) -> Result<v1::ExecSyncResponse>;

    /// Starts a command in a running container. Streams are present as asked for in the request; with `tty`,
    /// output and errors are one stream, `stdout`, and `resize` is present.
    async fn exec(&self, request: v1::ExecRequest) -> Result<ExecSession>;

    /// Joins the streams of the container's main process. `exit` resolves when that process exits.
    async fn attach(&self, request: v1::AttachRequest) -> Result<ExecSession>;

    /// Connects to a TCP port on the sandbox's loopback address.
    async fn port_forward(&self, sandbox_id: &str, port: u16) -> Result<Duplex>;

    // Figures.

    async fn container_stats(&self, container_id: &str) -> Result<v1::ContainerStats>;

    async fn list_container_stats(
        &self,
        filter: Option<v1::ContainerStatsFilter>,
    ) -> Result<Vec<v1::ContainerStats>>;

    async fn pod_sandbox_stats(&self, sandbox_id: &str) -> Result<v1::PodSandboxStats>;

    async fn list_pod_sandbox_stats(
        &self,
        filter: Option<v1::PodSandboxStatsFilter>,
    ) -> Result<Vec<v1::PodSandboxStats>>;

    // Images.

    /// Pulls an image if the registry's digest is not here yet; returns the image's id.
    async fn pull_image(&self, image: v1::ImageSpec, auth: Option<v1::AuthConfig>) -> Result<String>;

    async fn list_images(&self, filter: Option<v1::ImageFilter>) -> Result<Vec<v1::Image>>;

    /// The image by reference, digest or id; `image` is `None` when it is not here.
    async fn image_status(&self, image: v1::ImageSpec, verbose: bool) -> Result<v1::ImageStatusResponse>;

    /// Forgets an image and frees layers nobody else needs. Unknown images are a success.
    async fn remove_image(&self, image: v1::ImageSpec) -> Result<()>;

    /// Bytes and inodes used by image and container storage, by mount point.
    async fn image_fs_info(&self) -> Result<v1::ImageFsInfoResponse>;

    // Events.

    /// Lifecycle events from now on. Any number of subscribers. After [`Event::Resync`] the subscriber has missed
    /// some and lists once.
    fn events(&self) -> BoxStream<'static, Event>;
}

/// What happened to a sandbox or container. Ids are the runtime's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    SandboxStarted {
        sandbox_id: String,
    },
    SandboxStopped {
        sandbox_id: String,
    },
    SandboxRemoved {
        sandbox_id: String,
    },
    ContainerCreated {
        sandbox_id: String,
        container_id: String,
    },
    ContainerStarted {
        sandbox_id: String,
        container_id: String,
    },
    ContainerExited {
        sandbox_id: String,
        container_id: String,
        exit: ContainerExit,
    },
    ContainerRemoved {
        sandbox_id: String,
        container_id: String,
    },
    /// Events were lost (slow subscriber, connection to the runtime renewed): list to see the present.
    Resync,
}

/// How a container ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ContainerExit {
    /// Exit code; 128 + signal for a killed process.
    pub code: i32,
    /// The kernel killed a process of the container for lack of memory.
    pub oom_killed: bool,
    /// Nanoseconds since the epoch.
    pub finished_at: i64,
    /// `Completed`, `Error`, `OOMKilled`, `StartError`, `ContainerStatusUnknown`.
    pub reason: String,
    pub message: String,
}

/// Key in the sandbox's verbose info map under which the built-in runtime tells the network namespace's path.
pub const INFO_NETNS: &str = "netns";

/// Where the sandbox's network namespace is pinned, from a verbose status. `None` with host network.
/// Understands the built-in runtime's info map and containerd's.
pub fn netns_path(status: &v1::PodSandboxStatusResponse) -> Option<PathBuf> {
    if let Some(path) = status.info.get(INFO_NETNS) {
        return Some(PathBuf::from(path));
    }
    let info: serde_json::Value = serde_json::from_str(status.info.get("info")?).ok()?;
    let namespaces = info.pointer("/runtimeSpec/linux/namespaces")?.as_array()?;
    let network = namespaces.iter().find(|namespace| namespace["type"] == "network")?;
    network["path"].as_str().map(PathBuf::from)
}

/// The one pid of a sandbox or container that a verbose info map tells, if it does.
pub fn info_pid(info: &std::collections::HashMap<String, String>) -> Option<i32> {
    if let Some(pid) = info.get("pid") {
        return pid.parse().ok();
    }
    let info: serde_json::Value = serde_json::from_str(info.get("info")?).ok()?;
    info["pid"].as_i64().and_then(|pid| pid.try_into().ok())
}

/// Fails with the text every runtime uses for a container it does not know.
pub(crate) fn no_container(id: &str) -> Error {
    Error::not_found(format!("no container with id {id:?}"))
}

/// Fails with the text every runtime uses for a sandbox it does not know.
pub(crate) fn no_sandbox(id: &str) -> Error {
    Error::not_found(format!("no pod sandbox with id {id:?}"))
}
