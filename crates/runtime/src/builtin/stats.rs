//! Figures of containers, pods and storage, read when asked for.

use k8s_cri::v1;

use super::record::{Container, Phase, Sandbox, matches};
use super::{Inner, now, snapshot};
use crate::cgroup::Usage;
use crate::error::Result;

impl Inner {
    pub(super) fn container_stats(&self, container: &Container) -> Result<v1::ContainerStats> {
        let timestamp = now();
        let usage = match container.phase {
            Phase::Running => self.cgroups.usage(&container.cgroup)?,
            _ => Usage::default(),
        };
        let upper = self.bundle(&container.id).join("upper");
        let (bytes, inodes) = snapshot::usage(&upper);
        Ok(v1::ContainerStats {
            attributes: Some(v1::ContainerAttributes {
                id: container.id.clone(),
                metadata: container.config.metadata.clone(),
                labels: container.config.labels.clone(),
                annotations: container.config.annotations.clone(),
            }),
            cpu: Some(cpu(timestamp, &usage)),
            memory: Some(memory(timestamp, &usage)),
            writable_layer: Some(filesystem(timestamp, &self.config.data_dir, bytes, inodes)),
            swap: usage.swap_bytes.map(|swap| v1::SwapUsage {
                timestamp,
                swap_available_bytes: None,
                swap_usage_bytes: value(swap),
            }),
        })
    }

    pub(super) fn list_container_stats(&self, filter: &v1::ContainerStatsFilter) -> Vec<v1::ContainerStats> {
        let wanted = |container: &Container| {
            (filter.id.is_empty() || container.id.starts_with(&filter.id))
                && (filter.pod_sandbox_id.is_empty() || container.sandbox_id == filter.pod_sandbox_id)
                && matches(&filter.label_selector, &container.config.labels)
                && container.phase == Phase::Running
        };
        let containers: Vec<Container> = {
            let state = self.state.lock();
            state.containers.values().map(|entry| &entry.record).filter(|one| wanted(one)).cloned().collect()
        };
        // One that ended between listing and reading has no figures any more.
        containers.iter().filter_map(|container| self.container_stats(container).ok()).collect()
    }

    pub(super) fn sandbox_stats(&self, sandbox: &Sandbox) -> Result<v1::PodSandboxStats> {
        let timestamp = now();
        let usage = self.cgroups.usage(&sandbox.cgroup_parent)?;
        let filter = v1::ContainerStatsFilter { pod_sandbox_id: sandbox.id.clone(), ..Default::default() };
        Ok(v1::PodSandboxStats {
            attributes: Some(v1::PodSandboxAttributes {
                id: sandbox.id.clone(),
                metadata: sandbox.config.metadata.clone(),
                labels: sandbox.config.labels.clone(),
                annotations: sandbox.config.annotations.clone(),
            }),
            linux: Some(v1::LinuxPodSandboxStats {
                cpu: Some(cpu(timestamp, &usage)),
                memory: Some(memory(timestamp, &usage)),
                // The network is attached by the caller, who also counts its traffic.
                network: None,
                process: Some(v1::ProcessUsage { timestamp, process_count: value(usage.pids) }),
                containers: self.list_container_stats(&filter),
            }),
            windows: None,
        })
    }

    pub(super) fn list_sandbox_stats(&self, filter: &v1::PodSandboxStatsFilter) -> Vec<v1::PodSandboxStats> {
        let wanted = |sandbox: &Sandbox| {
            (filter.id.is_empty() || sandbox.id.starts_with(&filter.id))
                && matches(&filter.label_selector, &sandbox.config.labels)
                && sandbox.ready
        };
        let sandboxes: Vec<Sandbox> = {
            let state = self.state.lock();
            state.sandboxes.values().map(|entry| &entry.record).filter(|one| wanted(one)).cloned().collect()
        };
        sandboxes.iter().filter_map(|sandbox| self.sandbox_stats(sandbox).ok()).collect()
    }

    pub(super) fn image_fs_info(&self) -> v1::ImageFsInfoResponse {
        let (bytes, inodes) = self.images.usage();
        let (container_bytes, container_inodes) = {
            let ids: Vec<String> = self.state.lock().containers.keys().cloned().collect();
            ids.iter()
                .map(|id| snapshot::usage(&self.bundle(id).join("upper")))
                .fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
        };
        v1::ImageFsInfoResponse {
            image_filesystems: vec![filesystem(now(), self.images.dir(), bytes, inodes)],
            container_filesystems: vec![filesystem(
                now(),
                &self.config.containers(),
                container_bytes,
                container_inodes,
            )],
        }
    }
}

fn value(value: u64) -> Option<v1::UInt64Value> {
    Some(v1::UInt64Value { value })
}

fn cpu(timestamp: i64, usage: &Usage) -> v1::CpuUsage {
    // Nanocores are a rate; whoever asks twice has both figures.
    v1::CpuUsage { timestamp, usage_core_nano_seconds: value(usage.cpu_nanos), usage_nano_cores: None }
}

fn memory(timestamp: i64, usage: &Usage) -> v1::MemoryUsage {
    v1::MemoryUsage {
        timestamp,
        working_set_bytes: value(usage.working_set_bytes),
        available_bytes: usage
            .memory_limit_bytes
            .and_then(|limit| value(limit.saturating_sub(usage.working_set_bytes))),
        usage_bytes: value(usage.memory_bytes),
        rss_bytes: value(usage.rss_bytes),
        page_faults: value(usage.page_faults),
        major_page_faults: value(usage.major_page_faults),
    }
}

fn filesystem(timestamp: i64, path: &std::path::Path, bytes: u64, inodes: u64) -> v1::FilesystemUsage {
    v1::FilesystemUsage {
        timestamp,
        fs_id: Some(v1::FilesystemIdentifier { mountpoint: path.display().to_string() }),
        used_bytes: value(bytes),
        inodes_used: value(inodes),
    }
}
