//! Sandboxes: a pod's namespaces, its shared files and its control group, without a process.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use k8s_cri::v1;

use super::namespaces::{self, Wanted};
use super::record::{self, Sandbox, matches};
use super::{Inner, SandboxEntry, blocking, new_id, now, snapshot};
use crate::cri::{Event, INFO_NETNS};
use crate::error::{Context, Error, Kind, Result};
use crate::keeper::protocol::{Answer, Op};
use crate::stream::Duplex;

/// Size of `/dev/shm`, as every runtime has it.
const SHM_OPTIONS: &std::ffi::CStr = c"mode=1777,size=65536k";
/// Longest host name Linux takes.
const HOSTNAME_BYTES_MAX: usize = 64;

impl Inner {
    pub(super) async fn run_sandbox(
        self: &Arc<Self>,
        config: v1::PodSandboxConfig,
        runtime_handler: &str,
    ) -> Result<String> {
        check(&config, runtime_handler)?;
        let id = new_id()?;
        let asked = config.linux.as_ref().map(|linux| linux.cgroup_parent.clone()).unwrap_or_default();
        let cgroup_parent = match asked.as_str() {
            "" => format!("{}/{}/{id}", self.config.cgroup_root, super::POD_CGROUPS),
            asked => asked.to_owned(),
        };
        let sandbox = Sandbox {
            id: id.clone(),
            made_cgroup_parent: !self.cgroups.exists(&cgroup_parent),
            config,
            runtime_handler: runtime_handler.to_owned(),
            created_at: now(),
            ready: true,
            addresses: Vec::new(),
            cgroup_parent,
        };
        self.claim(&sandbox)?;
        match self.set_up(&sandbox).await {
            Ok(()) => {
                self.emit(Event::SandboxStarted { sandbox_id: id.clone() });
                Ok(id)
            }
            Err(error) => {
                let _ = self.remove_sandbox(&id).await;
                Err(error)
            }
        }
    }

    /// Enters the sandbox into the table, unless it is there already under another id.
    fn claim(&self, sandbox: &Sandbox) -> Result<()> {
        let mut state = self.state.lock();
        let twin = state
            .sandboxes
            .values()
            .find(|entry| entry.record.config.metadata == sandbox.config.metadata && entry.record.ready);
        if let Some(twin) = twin {
            return Err(Error::new(
                Kind::AlreadyExists,
                format!("pod sandbox with the same metadata is running: {}", twin.record.id),
            ));
        }
        record::save(&self.sandbox_record(&sandbox.id), sandbox)?;
        let entry = SandboxEntry { record: sandbox.clone(), lock: Arc::default() };
        state.sandboxes.insert(sandbox.id.clone(), entry);
        Ok(())
    }

    async fn set_up(self: &Arc<Self>, sandbox: &Sandbox) -> Result<()> {
        let (inner, copy) = (self.clone(), sandbox.clone());
        blocking(move || inner.set_up_blocking(&copy)).await?;
        if sandbox.shares_pids() {
            let op = Op::StartPodInit { sandbox: sandbox.id.clone() };
            let (answer, _) = self.keeper()?.call(op, &[]).await?;
            let Answer::Started { pid, .. } = answer else {
                return Err(Error::internal("the keeper told no pid for the pod's first process"));
            };
            let path = self.config.sandbox_run(&sandbox.id).join("ns").join("pid");
            blocking(move || namespaces::pin(&PathBuf::from(format!("/proc/{pid}/ns/pid")), &path)).await?;
        }
        Ok(())
    }

    fn set_up_blocking(&self, sandbox: &Sandbox) -> Result<()> {
        let dir = self.config.sandbox_run(&sandbox.id);
        let wanted = Wanted {
            network: !sandbox.host_network(),
            ipc: !sandbox.host_ipc(),
            // With the host's network a pod has the host's name, too.
            hostname: (!sandbox.host_network()).then(|| hostname(sandbox)),
            sysctls: sysctls(sandbox),
        };
        namespaces::make(&dir.join("ns"), &wanted)?;
        let write = |name: &str, content: &str| {
            let path = dir.join(name);
            fs::write(&path, content).step(|| format!("write {}", path.display()))
        };
        write("hostname", &format!("{}\n", hostname(sandbox)))?;
        if let Some(dns) = &sandbox.config.dns_config {
            write("resolv.conf", &resolv_conf(dns))?;
        }
        if !sandbox.host_ipc() {
            mount_shm(&dir.join("shm"))?;
        }
        self.cgroups.create(&sandbox.cgroup_parent, &v1::LinuxContainerResources::default())
    }

    pub(super) async fn stop_sandbox(self: &Arc<Self>, id: &str) -> Result<()> {
        let Some(lock) = self.sandbox_lock(id) else { return Ok(()) };
        let _guard = lock.lock().await;
        for container in self.containers_of(id) {
            self.stop_container(&container, std::time::Duration::ZERO).await?;
        }
        let Ok(sandbox) = self.sandbox(id) else { return Ok(()) };
        if sandbox.shares_pids() {
            self.keeper()?.call(Op::StopPodInit { sandbox: id.to_owned() }, &[]).await?;
        }
        let dir = self.config.sandbox_run(id);
        blocking(move || release(&dir)).await?;
        if sandbox.ready {
            self.change_sandbox(id, |sandbox| sandbox.ready = false)?;
            self.emit(Event::SandboxStopped { sandbox_id: id.to_owned() });
        }
        Ok(())
    }

    pub(super) async fn remove_sandbox(self: &Arc<Self>, id: &str) -> Result<()> {
        self.stop_sandbox(id).await?;
        for container in self.containers_of(id) {
            self.remove_container(&container).await?;
        }
        let Ok(sandbox) = self.sandbox(id) else { return Ok(()) };
        let inner = self.clone();
        blocking(move || {
            let dir = inner.config.sandbox_run(&sandbox.id);
            release(&dir)?;
            remove_dir(&dir)?;
            if sandbox.made_cgroup_parent {
                inner.cgroups.remove(&sandbox.cgroup_parent)?;
            }
            let path = inner.sandbox_record(&sandbox.id);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    Err(error).step(|| format!("remove {}", path.display()))
                }
                _ => Ok(()),
            }
        })
        .await?;
        if self.state.lock().sandboxes.remove(id).is_some() {
            self.emit(Event::SandboxRemoved { sandbox_id: id.to_owned() });
        }
        Ok(())
    }

    pub(super) fn sandbox_status(&self, id: &str, verbose: bool) -> Result<v1::PodSandboxStatusResponse> {
        let sandbox = self.sandbox(id)?;
        let mut info = HashMap::new();
        if verbose {
            info.insert("cgroupParent".to_owned(), sandbox.cgroup_parent.clone());
            if let Some(path) = self.netns(&sandbox) {
                info.insert(INFO_NETNS.to_owned(), path.display().to_string());
            }
        }
        let state = self.state.lock();
        let of = |entry: &&super::ContainerEntry| entry.record.sandbox_id == id;
        let containers = state.containers.values().filter(of).map(|entry| entry.record.status()).collect();
        Ok(v1::PodSandboxStatusResponse {
            status: Some(sandbox.status()),
            info,
            containers_statuses: containers,
            timestamp: now(),
        })
    }

    pub(super) fn list_sandboxes(&self, filter: &v1::PodSandboxFilter) -> Vec<v1::PodSandbox> {
        let state = self.state.lock();
        let records = state.sandboxes.values().map(|entry| &entry.record);
        let mut found: Vec<v1::PodSandbox> = records
            .filter(|sandbox| filter.id.is_empty() || sandbox.id.starts_with(&filter.id))
            .filter(|sandbox| matches(&filter.label_selector, &sandbox.config.labels))
            .map(Sandbox::to_cri)
            .filter(|sandbox| filter.state.as_ref().is_none_or(|wanted| wanted.state == sandbox.state))
            .collect();
        found.sort_by_key(|sandbox| sandbox.created_at);
        found
    }

    pub(super) async fn port_forward(&self, id: &str, port: u16) -> Result<Duplex> {
        let sandbox = self.sandbox(id)?;
        if !sandbox.ready {
            return Err(Error::new(Kind::FailedPrecondition, format!("sandbox {id} is not running")));
        }
        let netns = self.netns(&sandbox);
        let stream = blocking(move || namespaces::connect(netns.as_deref(), port)).await?;
        stream.set_nonblocking(true).step(|| "forward a port".into())?;
        Ok(Box::pin(tokio::net::TcpStream::from_std(stream).step(|| "forward a port".into())?))
    }

    fn netns(&self, sandbox: &Sandbox) -> Option<PathBuf> {
        (!sandbox.host_network()).then(|| self.config.sandbox_run(&sandbox.id).join("ns").join("net"))
    }
}

fn check(config: &v1::PodSandboxConfig, runtime_handler: &str) -> Result<()> {
    if !runtime_handler.is_empty() {
        return Err(Error::new(
            Kind::NotFound,
            format!(
                "no runtime for {runtime_handler:?} is configured; the built-in runtime has only its own"
            ),
        ));
    }
    if config.metadata.as_ref().is_none_or(|metadata| metadata.uid.is_empty()) {
        return Err(Error::invalid("sandbox config must include metadata with a uid"));
    }
    if config.hostname.len() > HOSTNAME_BYTES_MAX {
        return Err(Error::invalid(format!("host name {:?} is longer than 64 characters", config.hostname)));
    }
    let Some(linux) = &config.linux else { return Ok(()) };
    let options = linux.security_context.as_ref().and_then(|security| security.namespace_options.as_ref());
    let userns = options.and_then(|options| options.userns_options.as_ref());
    if userns.is_some_and(|userns| userns.mode != v1::NamespaceMode::Node as i32) {
        return Err(Error::unsupported("user namespaces are not supported by the built-in runtime"));
    }
    for name in linux.sysctls.keys() {
        let ok = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-' | b'/');
        if name.is_empty() || name.contains("..") || !name.bytes().all(ok) {
            return Err(Error::invalid(format!("sysctl {name:?} is not a valid name")));
        }
    }
    Ok(())
}

fn hostname(sandbox: &Sandbox) -> String {
    match sandbox.config.hostname.as_str() {
        "" => nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
        name => name.to_owned(),
    }
}

/// The pod's, after what lets unprivileged processes listen on any port and ping, as containerd does by default.
fn sysctls(sandbox: &Sandbox) -> Vec<(String, String)> {
    let mut sysctls = Vec::new();
    if !sandbox.host_network() {
        sysctls.push(("net.ipv4.ip_unprivileged_port_start".to_owned(), "0".to_owned()));
        sysctls.push(("net.ipv4.ping_group_range".to_owned(), "0 2147483647".to_owned()));
    }
    if let Some(linux) = &sandbox.config.linux {
        sysctls.extend(linux.sysctls.iter().map(|(name, value)| (name.clone(), value.clone())));
    }
    sysctls
}

/// The file as the resolver reads it; empty parts are left out.
fn resolv_conf(dns: &v1::DnsConfig) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.join(" ")));
    }
    for server in &dns.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.join(" ")));
    }
    text
}

fn mount_shm(path: &std::path::Path) -> Result<()> {
    let step = || format!("mount {}", path.display());
    fs::create_dir_all(path).step(step)?;
    let target = crate::rootdir::c_path(path).step(step)?;
    let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    // SAFETY: all strings are NUL-terminated and outlive the call.
    let result = unsafe {
        libc::mount(c"shm".as_ptr(), target.as_ptr(), c"tmpfs".as_ptr(), flags, SHM_OPTIONS.as_ptr().cast())
    };
    if result < 0 { Err(std::io::Error::last_os_error()).step(step) } else { Ok(()) }
}

/// Lets go of the namespaces and the shared memory; the files stay.
fn release(dir: &std::path::Path) -> Result<()> {
    for name in ["ns/net", "ns/ipc", "ns/uts", "ns/pid", "shm"] {
        snapshot::unmount(&dir.join(name))?;
    }
    Ok(())
}

pub(super) fn remove_dir(dir: &std::path::Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).step(|| format!("remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_is_what_the_resolver_reads() {
        let dns = v1::DnsConfig {
            servers: vec!["10.96.0.10".into()],
            searches: vec!["default.svc.cluster.local".into(), "svc.cluster.local".into()],
            options: vec!["ndots:5".into()],
        };
        assert_eq!(
            resolv_conf(&dns),
            "search default.svc.cluster.local svc.cluster.local\nnameserver 10.96.0.10\noptions ndots:5\n"
        );
        assert_eq!(resolv_conf(&v1::DnsConfig::default()), "");
    }
}
