//! What is known of sandboxes and containers, as it stands on disk: one file each, replaced by rename, read again
//! at start. No flush to disk: after a power failure the processes are gone anyway.

use std::collections::HashMap;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use k8s_cri::v1;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::cri::ContainerExit;
use crate::error::{Context, Result};
use crate::keeper::protocol::StagedMount;
use crate::user::User;

/// A sandbox.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Sandbox {
    pub id: String,
    pub config: v1::PodSandboxConfig,
    pub runtime_handler: String,
    pub created_at: i64,
    pub ready: bool,
    pub addresses: Vec<IpAddr>,
    /// The pod's control group, and whether we made it.
    pub cgroup_parent: String,
    pub made_cgroup_parent: bool,
}

impl Sandbox {
    pub fn namespace_options(&self) -> v1::NamespaceOption {
        let security = self.config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
        security.and_then(|security| security.namespace_options.clone()).unwrap_or_else(|| {
            v1::NamespaceOption {
                // Without options, a process namespace per container: CRI's zero value would be one per pod.
                pid: v1::NamespaceMode::Container as i32,
                ..Default::default()
            }
        })
    }

    pub fn host_network(&self) -> bool {
        self.namespace_options().network == v1::NamespaceMode::Node as i32
    }

    pub fn host_ipc(&self) -> bool {
        self.namespace_options().ipc == v1::NamespaceMode::Node as i32
    }

    pub fn shares_pids(&self) -> bool {
        self.namespace_options().pid == v1::NamespaceMode::Pod as i32
    }

    pub fn to_cri(&self) -> v1::PodSandbox {
        v1::PodSandbox {
            id: self.id.clone(),
            metadata: self.config.metadata.clone(),
            state: self.state() as i32,
            created_at: self.created_at,
            labels: self.config.labels.clone(),
            annotations: self.config.annotations.clone(),
            runtime_handler: self.runtime_handler.clone(),
        }
    }

    pub fn status(&self) -> v1::PodSandboxStatus {
        let mut addresses = self.addresses.iter().map(IpAddr::to_string);
        let network = addresses.next().map(|ip| v1::PodSandboxNetworkStatus {
            ip,
            additional_ips: addresses.map(|ip| v1::PodIp { ip }).collect(),
        });
        v1::PodSandboxStatus {
            id: self.id.clone(),
            metadata: self.config.metadata.clone(),
            state: self.state() as i32,
            created_at: self.created_at,
            network: Some(network.unwrap_or_default()),
            linux: Some(v1::LinuxPodSandboxStatus {
                namespaces: Some(v1::Namespace { options: Some(self.namespace_options()) }),
            }),
            labels: self.config.labels.clone(),
            annotations: self.config.annotations.clone(),
            runtime_handler: self.runtime_handler.clone(),
        }
    }

    fn state(&self) -> v1::PodSandboxState {
        if self.ready { v1::PodSandboxState::SandboxReady } else { v1::PodSandboxState::SandboxNotready }
    }
}

/// A container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Container {
    pub id: String,
    pub sandbox_id: String,
    pub config: v1::ContainerConfig,
    pub image_id: String,
    /// The name with digest the image was found by, if it has one.
    pub image_ref: String,
    /// Diff ids.
    pub layers: Vec<String>,
    pub created_at: i64,
    pub started_at: i64,
    pub phase: Phase,
    /// Zero unless running.
    pub pid: i32,
    pub start_ticks: u64,
    pub exit: Option<ContainerExit>,
    pub user: User,
    pub stop_signal: i32,
    pub cgroup: String,
    pub log_path: Option<PathBuf>,
    /// Host paths bound before libcontainer runs, in the order of the spec.
    pub staged: Vec<StagedMount>,
    /// As last updated.
    pub resources: v1::LinuxContainerResources,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    Created,
    Running,
    Exited,
}

impl Container {
    pub fn state(&self) -> v1::ContainerState {
        match self.phase {
            Phase::Created => v1::ContainerState::ContainerCreated,
            Phase::Running => v1::ContainerState::ContainerRunning,
            Phase::Exited => v1::ContainerState::ContainerExited,
        }
    }

    pub fn to_cri(&self) -> v1::Container {
        v1::Container {
            id: self.id.clone(),
            pod_sandbox_id: self.sandbox_id.clone(),
            metadata: self.config.metadata.clone(),
            image: self.config.image.clone(),
            image_ref: self.image_ref.clone(),
            state: self.state() as i32,
            created_at: self.created_at,
            labels: self.config.labels.clone(),
            annotations: self.config.annotations.clone(),
            image_id: self.image_id.clone(),
        }
    }

    pub fn status(&self) -> v1::ContainerStatus {
        let exit = self.exit.clone().unwrap_or_default();
        v1::ContainerStatus {
            id: self.id.clone(),
            metadata: self.config.metadata.clone(),
            state: self.state() as i32,
            created_at: self.created_at,
            started_at: self.started_at,
            finished_at: exit.finished_at,
            exit_code: exit.code,
            image: self.config.image.clone(),
            image_ref: self.image_ref.clone(),
            reason: exit.reason,
            message: exit.message,
            labels: self.config.labels.clone(),
            annotations: self.config.annotations.clone(),
            mounts: self.config.mounts.clone(),
            log_path: self.log_path.as_ref().map(|path| path.display().to_string()).unwrap_or_default(),
            resources: Some(v1::ContainerResources { linux: Some(self.resources.clone()), windows: None }),
            image_id: self.image_id.clone(),
            user: Some(v1::ContainerUser {
                linux: Some(v1::LinuxContainerUser {
                    uid: self.user.uid.into(),
                    gid: self.user.gid.into(),
                    supplemental_groups: self.user.groups.iter().copied().map(i64::from).collect(),
                }),
            }),
        }
    }
}

/// Writes a record so that a reader sees the old or the new one.
pub fn save(path: &Path, record: &impl Serialize) -> Result<()> {
    let step = || format!("write {}", path.display());
    let temporary = path.with_extension("new");
    fs::write(&temporary, serde_json::to_vec(record).step(step)?).step(step)?;
    fs::rename(&temporary, path).step(step)
}

/// Reads a record; `None` if there is none. A damaged one is told and left out.
pub fn load<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let bytes = fs::read(path).ok()?;
    match serde_json::from_slice(&bytes) {
        Ok(record) => Some(record),
        Err(error) => {
            tracing::error!(path = %path.display(), %error, "record is damaged, left out");
            None
        }
    }
}

/// Whether all of `selector` are among `labels`.
pub fn matches(selector: &HashMap<String, String>, labels: &HashMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}
