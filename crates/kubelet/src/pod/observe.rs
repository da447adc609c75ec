//! What the runtime has of a pod: its sandboxes and containers, newest first.

use crate::names;
use knarr_runtime::cri::v1;
use knarr_runtime::{Result, Runtime};
use std::collections::HashMap;
use std::net::IpAddr;

/// One pod as the runtime knows it.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// Newest first.
    pub sandboxes: Vec<v1::PodSandboxStatus>,
    /// Newest first; of every sandbox.
    pub containers: Vec<Seen>,
}

/// A container and the sandbox it is in.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub sandbox_id: String,
    pub status: v1::ContainerStatus,
}

impl Seen {
    pub fn name(&self) -> &str {
        self.status.labels.get(names::CONTAINER_NAME).map_or("", String::as_str)
    }

    pub fn attempt(&self) -> u32 {
        self.status.metadata.as_ref().map_or(0, |meta| meta.attempt)
    }

    pub fn state(&self) -> v1::ContainerState {
        v1::ContainerState::try_from(self.status.state).unwrap_or(v1::ContainerState::ContainerUnknown)
    }

    pub fn is_running(&self) -> bool {
        self.state() == v1::ContainerState::ContainerRunning
    }

    pub fn has_exited(&self) -> bool {
        matches!(self.state(), v1::ContainerState::ContainerExited | v1::ContainerState::ContainerUnknown)
    }

    pub fn hash(&self) -> Option<&str> {
        self.status.annotations.get(names::CONTAINER_HASH).map(String::as_str)
    }
}

impl Observed {
    /// Asks the runtime about the pod with this uid.
    pub async fn read(runtime: &dyn Runtime, uid: &str) -> Result<Observed> {
        let selector: HashMap<String, String> = [(names::POD_UID.to_owned(), uid.to_owned())].into();
        let filter = v1::PodSandboxFilter { label_selector: selector.clone(), ..Default::default() };
        let mut out = Observed::default();
        for sandbox in runtime.list_pod_sandbox(Some(filter)).await? {
            match runtime.pod_sandbox_status(&sandbox.id, false).await {
                Ok(answer) => out.sandboxes.extend(answer.status),
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        let filter = v1::ContainerFilter { label_selector: selector, ..Default::default() };
        for container in runtime.list_containers(Some(filter)).await? {
            match runtime.container_status(&container.id, false).await {
                Ok(answer) => out.containers.extend(
                    answer.status.map(|status| Seen { sandbox_id: container.pod_sandbox_id, status }),
                ),
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        out.sort();
        Ok(out)
    }

    fn sort(&mut self) {
        let attempt =
            |sandbox: &v1::PodSandboxStatus| sandbox.metadata.as_ref().map_or(0, |meta| meta.attempt);
        self.sandboxes.sort_by_key(|sandbox| std::cmp::Reverse((attempt(sandbox), sandbox.created_at)));
        self.containers.sort_by_key(|seen| std::cmp::Reverse((seen.attempt(), seen.status.created_at)));
    }

    /// The sandbox in use: the newest one, if it is ready.
    pub fn live_sandbox(&self) -> Option<&v1::PodSandboxStatus> {
        let ready = v1::PodSandboxState::SandboxReady as i32;
        self.sandboxes.first().filter(|sandbox| sandbox.state == ready)
    }

    /// The newest container of a name.
    pub fn latest(&self, name: &str) -> Option<&Seen> {
        self.containers.iter().find(|seen| seen.name() == name)
    }

    pub fn running(&self) -> impl Iterator<Item = &Seen> {
        self.containers.iter().filter(|seen| seen.is_running())
    }

    /// The pod's own addresses, the first one first.
    pub fn pod_ips(&self) -> Vec<String> {
        let network = self.live_sandbox().and_then(|sandbox| sandbox.network.as_ref());
        let all = network.into_iter().flat_map(|network| {
            std::iter::once(&network.ip).chain(network.additional_ips.iter().map(|ip| &ip.ip))
        });
        all.filter(|ip| ip.parse::<IpAddr>().is_ok()).cloned().collect()
    }
}
