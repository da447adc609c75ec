//! Containers: from config to a running process and away again.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use k8s_cri::v1;
use tokio::sync::watch;

use super::record::{self, Container, Phase, Sandbox, matches};
use super::{ContainerEntry, Inner, blocking, new_id, now, sandbox, snapshot};
use crate::cgroup::{DeviceRule, DeviceRules};
use crate::cri::{ContainerExit, Event};
use crate::error::{Context, Error, Kind, Result};
use crate::image::store::{Image, Lease};
use crate::keeper::protocol::{Answer, Op, StagedMount};
use crate::keeper::{staged_path, view_path};
use crate::rootdir::RootDir;
use crate::spec::{self, HostDevice, Input, Namespaces, PidNamespace};
use crate::user;

/// Where a container's image volumes are mounted, in its directory.
const IMAGES: &str = "images";
/// How long a killed container may take to be gone; longer means the kernel holds it (a dead NFS server).
const KILL_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the processes a container left behind may take to be gone after SIGKILL.
const EMPTY_TIMEOUT: Duration = Duration::from_secs(10);
/// Exit code of a container that never ran, as runc's callers report it.
const START_ERROR_CODE: i32 = 128;
/// Swap limits and the like are set again on update; these need room in the swap accounting first.
const DEVICE_ALL: &str = "rwm";

impl Inner {
    pub(super) async fn create_container(
        self: &Arc<Self>,
        sandbox_id: &str,
        config: v1::ContainerConfig,
    ) -> Result<String> {
        let sandbox = self.sandbox(sandbox_id)?;
        if !sandbox.ready {
            return Err(Error::new(Kind::FailedPrecondition, format!("sandbox {sandbox_id} is not running")));
        }
        let id = new_id()?;
        let inner = self.clone();
        let made_id = id.clone();
        let container = blocking(move || {
            let made = inner.make(&made_id, &sandbox, config);
            if made.is_err() {
                let bundle = inner.bundle(&made_id);
                let _ = unmount(&bundle);
                let _ = fs::remove_dir_all(&bundle);
            }
            made
        })
        .await?;
        let entry = ContainerEntry {
            record: container,
            lock: Arc::default(),
            exit: watch::Sender::new(None),
            terminal: None,
        };
        self.state.lock().containers.insert(id.clone(), entry);
        self.emit(Event::ContainerCreated { sandbox_id: sandbox_id.to_owned(), container_id: id.clone() });
        Ok(id)
    }

    fn make(&self, id: &str, sandbox: &Sandbox, mut config: v1::ContainerConfig) -> Result<Container> {
        let asked = config.image.as_ref().map(|image| image.image.clone()).unwrap_or_default();
        let image = self
            .images
            .find(&asked)
            .ok_or_else(|| Error::not_found(format!("image {asked:?} is not on this node; pull it first")))?;
        // From here to the record on disk, the layers must not be collected.
        let _lease = self.images.lease(&image.layers);
        let bundle = self.bundle(id);
        let rootfs = self.mount_rootfs(&bundle, &image)?;
        let volumes = self.mount_images(&bundle, &mut config.mounts)?;
        let linux = config.linux.clone().unwrap_or_default();
        let security = linux.security_context.clone().unwrap_or_default();
        check_security(&security)?;
        let user = user::resolve(&security, &image.defaults.user, &user::Database::load(&rootfs))?;
        let cgroup = format!("{}/{id}", sandbox.cgroup_parent.trim_end_matches('/'));
        let views = self.cgroups.views(&cgroup);
        let cgroup_mounts: Vec<(String, String)> =
            views.iter().enumerate().map(|(index, (name, _))| (name.clone(), view_path(index))).collect();
        make_missing_sources(&config)?;
        let mut spec = spec::generate(&Input {
            config: &config,
            image: &image.defaults,
            user: &user,
            namespaces: &self.namespaces(sandbox, &security)?,
            hostname: &hostname(sandbox),
            sandbox_mounts: &self.sandbox_mounts(sandbox, &security),
            devices: &devices(&config, security.privileged)?,
            cgroup_mounts: &cgroup_mounts,
            cgroup_path: &cgroup,
            limits: self.limits,
            seccomp: crate::seccomp::profile(&security, &spec::capability_names(&security, &self.limits)?)?,
        })?;
        prepare_rootfs(&rootfs, &spec, &config)?;
        let staged = spec::stage_mounts(&mut spec, staged_path)
            .into_iter()
            .map(|(source, follows_host)| StagedMount { source: source.into(), follows_host })
            .collect();
        let path = bundle.join("config.json");
        let bytes = serde_json::to_vec(&spec).step(|| "encode the container's spec".into())?;
        fs::write(&path, bytes).step(|| format!("write {}", path.display()))?;
        make_pipes(&bundle)?;
        let log_dir = &sandbox.config.log_directory;
        let log_path = (!log_dir.is_empty() && !config.log_path.is_empty())
            .then(|| Path::new(log_dir).join(&config.log_path));
        let container = Container {
            id: id.to_owned(),
            sandbox_id: sandbox.id.clone(),
            image_ref: image.digests.iter().next().cloned().unwrap_or_else(|| image.id.clone()),
            image_id: image.id,
            layers: image.layers.into_iter().chain(volumes.iter().flat_map(Lease::layers).cloned()).collect(),
            created_at: now(),
            started_at: 0,
            phase: Phase::Created,
            pid: 0,
            start_ticks: 0,
            exit: None,
            user,
            stop_signal: signal_number(&image.defaults.stop_signal)?,
            cgroup,
            log_path,
            staged,
            resources: linux.resources.unwrap_or_default(),
            config,
        };
        record::save(&self.container_record(id), &container)?;
        Ok(container)
    }

    fn mount_rootfs(&self, bundle: &Path, image: &Image) -> Result<PathBuf> {
        let (rootfs, upper, work) = (bundle.join("rootfs"), bundle.join("upper"), bundle.join("work"));
        for dir in [&rootfs, &upper, &work] {
            fs::create_dir_all(dir).step(|| format!("make {}", dir.display()))?;
        }
        let mut layers: Vec<PathBuf> =
            image.layers.iter().map(|layer| self.images.layer_dir(layer)).collect();
        if layers.is_empty() {
            // An image of nothing; overlayfs wants at least one directory below.
            let empty = bundle.join("empty");
            fs::create_dir_all(&empty).step(|| format!("make {}", empty.display()))?;
            layers.push(empty);
        }
        // The top directory shows the writable one's owner and mode.
        copy_directory_facts(layers.last().expect("one was just added if there was none"), &upper)?;
        snapshot::mount(&layers, &upper, &work, &rootfs)?;
        Ok(rootfs)
    }

    /// Mounts the images among the mounts, to be read only, and puts their paths in. What is returned keeps their
    /// layers.
    fn mount_images(&self, bundle: &Path, mounts: &mut [v1::Mount]) -> Result<Vec<Lease>> {
        let mut leases = Vec::new();
        for (index, mount) in mounts.iter_mut().enumerate() {
            let Some(asked) = mount.image.take() else { continue };
            let image = self.images.find(&asked.image).ok_or_else(|| {
                Error::not_found(format!("image {:?} is not on this node; pull it first", asked.image))
            })?;
            leases.push(self.images.lease(&image.layers));
            let (target, empty) = (bundle.join(IMAGES).join(index.to_string()), bundle.join("empty"));
            for dir in [&target, &empty] {
                fs::create_dir_all(dir).step(|| format!("make {}", dir.display()))?;
            }
            let layers: Vec<PathBuf> =
                image.layers.iter().map(|layer| self.images.layer_dir(layer)).collect();
            snapshot::mount_read_only(&layers, &empty, &target)?;
            mount.host_path = target.display().to_string();
            mount.readonly = true;
        }
        Ok(leases)
    }

    fn namespaces(
        &self,
        sandbox: &Sandbox,
        security: &v1::LinuxContainerSecurityContext,
    ) -> Result<Namespaces> {
        let dir = self.config.sandbox_run(&sandbox.id).join("ns");
        let path = |name: &str| dir.join(name).display().to_string();
        let options = security.namespace_options.clone().unwrap_or_else(|| sandbox.namespace_options());
        let pid = match v1::NamespaceMode::try_from(options.pid) {
            Ok(v1::NamespaceMode::Node) => PidNamespace::Host,
            Ok(v1::NamespaceMode::Pod) if sandbox.shares_pids() => PidNamespace::Path(path("pid")),
            Ok(v1::NamespaceMode::Target) => {
                let target = self.container(&options.target_id)?;
                if target.phase != Phase::Running || target.sandbox_id != sandbox.id {
                    return Err(Error::new(
                        Kind::FailedPrecondition,
                        format!("target container {} is not running in this pod", options.target_id),
                    ));
                }
                PidNamespace::Path(format!("/proc/{}/ns/pid", target.pid))
            }
            _ => PidNamespace::Own,
        };
        Ok(Namespaces {
            network: (!sandbox.host_network()).then(|| path("net")),
            ipc: (!sandbox.host_ipc()).then(|| path("ipc")),
            uts: (!sandbox.host_network()).then(|| path("uts")),
            pid,
        })
    }

    fn sandbox_mounts(
        &self,
        sandbox: &Sandbox,
        security: &v1::LinuxContainerSecurityContext,
    ) -> Vec<v1::Mount> {
        let dir = self.config.sandbox_run(&sandbox.id);
        let mount = |container_path: &str, host_path: PathBuf, readonly: bool| v1::Mount {
            container_path: container_path.into(),
            host_path: host_path.display().to_string(),
            readonly,
            ..Default::default()
        };
        let readonly = security.readonly_rootfs;
        let mut mounts = vec![mount("/etc/hostname", dir.join("hostname"), readonly)];
        if sandbox.config.dns_config.is_some() {
            mounts.push(mount("/etc/resolv.conf", dir.join("resolv.conf"), readonly));
        }
        let shm = if sandbox.host_ipc() { PathBuf::from("/dev/shm") } else { dir.join("shm") };
        mounts.push(mount("/dev/shm", shm, false));
        mounts
    }

    pub(super) async fn start_container(self: &Arc<Self>, id: &str) -> Result<()> {
        let lock = self.container_lock(id).ok_or_else(|| crate::cri::no_container(id))?;
        let _guard = lock.lock().await;
        let container = self.container(id)?;
        if container.phase != Phase::Created {
            return Err(Error::new(
                Kind::FailedPrecondition,
                format!(
                    "container {id} is in state {:?}, only a created one can be started",
                    container.phase
                ),
            ));
        }
        match self.launch(&container).await {
            Ok(()) => Ok(()),
            Err(error) => {
                let exit = ContainerExit {
                    code: START_ERROR_CODE,
                    finished_at: now(),
                    reason: super::START_ERROR.into(),
                    message: error.message.clone(),
                    ..Default::default()
                };
                // A keeper that died on the way may have started it all the same: it must not live on unseen.
                self.container_ended(id, exit);
                Err(error)
            }
        }
    }

    async fn launch(self: &Arc<Self>, container: &Container) -> Result<()> {
        let (inner, copy) = (self.clone(), container.clone());
        blocking(move || inner.make_cgroup(&copy)).await?;
        let request = self.start_request(container);
        let (answer, fds) = self.keeper()?.call(Op::Start(request), &[]).await?;
        let Answer::Started { pid, start_ticks, .. } = answer else {
            return Err(Error::internal("the keeper told no pid for the container"));
        };
        self.keep_terminal(&container.id, fds);
        let mut started = false;
        self.change_container(&container.id, |container| {
            // It may have ended already, and its end be recorded.
            if container.phase == Phase::Created {
                container.started_at = now();
                container.phase = Phase::Running;
                container.pid = pid;
                container.start_ticks = start_ticks;
                started = true;
            }
        })?;
        if started {
            self.emit(Event::ContainerStarted {
                sandbox_id: container.sandbox_id.clone(),
                container_id: container.id.clone(),
            });
        }
        Ok(())
    }

    fn make_cgroup(&self, container: &Container) -> Result<()> {
        let linux = container.config.linux.clone().unwrap_or_default();
        let security = linux.security_context.unwrap_or_default();
        self.cgroups.create(&container.cgroup, &container.resources)?;
        self.cgroups.set_devices(&container.cgroup, &device_rules(&container.config, security.privileged)?)
    }

    pub(super) async fn stop_container(self: &Arc<Self>, id: &str, grace: Duration) -> Result<()> {
        let Ok(container) = self.container(id) else { return Ok(()) };
        let mut exit = {
            let state = self.state.lock();
            let Some(entry) = state.containers.get(id) else { return Ok(()) };
            entry.exit.subscribe()
        };
        match container.phase {
            Phase::Exited => return Ok(()),
            Phase::Created => {
                let exit = ContainerExit {
                    code: START_ERROR_CODE,
                    finished_at: now(),
                    reason: super::START_ERROR.into(),
                    message: "stopped before it was started".into(),
                    ..Default::default()
                };
                let Some(lock) = self.container_lock(id) else { return Ok(()) };
                let _guard = lock.lock().await;
                if self.container(id).is_ok_and(|container| container.phase == Phase::Created) {
                    self.container_ended(id, exit);
                    return Ok(());
                }
            }
            Phase::Running => {}
        }
        if !grace.is_zero() {
            self.signal(id, container.stop_signal).await?;
            if tokio::time::timeout(grace, exit.wait_for(Option::is_some)).await.is_ok() {
                return Ok(());
            }
        }
        self.signal(id, libc::SIGKILL).await?;
        match tokio::time::timeout(KILL_TIMEOUT, exit.wait_for(Option::is_some)).await {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::new(
                Kind::DeadlineExceeded,
                format!("container {id} did not end within {} s of SIGKILL", KILL_TIMEOUT.as_secs()),
            )),
        }
    }

    async fn signal(&self, id: &str, signal: i32) -> Result<()> {
        match self.keeper()?.call(Op::Signal { id: id.to_owned(), signal }, &[]).await {
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(()),
        }
    }

    pub(super) async fn remove_container(self: &Arc<Self>, id: &str) -> Result<()> {
        self.stop_container(id, Duration::ZERO).await?;
        let Some(lock) = self.container_lock(id) else { return Ok(()) };
        let _guard = lock.lock().await;
        let Ok(container) = self.container(id) else { return Ok(()) };
        match self.keeper()?.call(Op::Forget { id: id.to_owned() }, &[]).await {
            Err(error) if !error.is_not_found() => return Err(error),
            _ => {}
        }
        self.empty_cgroup(&container.cgroup).await?;
        let inner = self.clone();
        let cgroup = container.cgroup.clone();
        let removed_id = container.id.clone();
        blocking(move || {
            inner.cgroups.remove(&cgroup)?;
            let _ = fs::remove_dir_all(inner.config.oci_root().join(&removed_id));
            let bundle = inner.bundle(&removed_id);
            unmount(&bundle)?;
            // Without its record it is not found again after a crash in the middle; `load` then finishes.
            let _ = fs::remove_file(bundle.join("state.json"));
            sandbox::remove_dir(&bundle)
        })
        .await?;
        if self.state.lock().containers.remove(id).is_some() {
            self.emit(Event::ContainerRemoved {
                sandbox_id: container.sandbox_id.clone(),
                container_id: id.to_owned(),
            });
        }
        Ok(())
    }

    /// Kills what is left in a group until it is empty.
    async fn empty_cgroup(self: &Arc<Self>, path: &str) -> Result<()> {
        let deadline = tokio::time::Instant::now() + EMPTY_TIMEOUT;
        let mut pause = Duration::from_millis(1);
        loop {
            let (inner, path_copy) = (self.clone(), path.to_owned());
            let left = blocking(move || {
                let pids = inner.cgroups.pids(&path_copy);
                if !pids.is_empty() {
                    inner.cgroups.kill(&path_copy);
                }
                Ok(pids)
            })
            .await?;
            if left.is_empty() {
                return Ok(());
            }
            if tokio::time::Instant::now() > deadline {
                return Err(Error::internal(format!(
                    "processes {left:?} in {path} do not end after SIGKILL"
                )));
            }
            // v1 has no event for an empty group; exits take a few milliseconds.
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(100));
        }
    }

    pub(super) fn list_containers(&self, filter: &v1::ContainerFilter) -> Vec<v1::Container> {
        let state = self.state.lock();
        let records = state.containers.values().map(|entry| &entry.record);
        let mut found: Vec<v1::Container> = records
            .filter(|container| filter.id.is_empty() || container.id.starts_with(&filter.id))
            .filter(|container| {
                filter.pod_sandbox_id.is_empty() || container.sandbox_id == filter.pod_sandbox_id
            })
            .filter(|container| matches(&filter.label_selector, &container.config.labels))
            .map(Container::to_cri)
            .filter(|container| filter.state.as_ref().is_none_or(|wanted| wanted.state == container.state))
            .collect();
        found.sort_by_key(|container| container.created_at);
        found
    }

    pub(super) async fn update_resources(
        self: &Arc<Self>,
        id: &str,
        resources: v1::LinuxContainerResources,
    ) -> Result<()> {
        let container = self.container(id)?;
        if container.phase == Phase::Exited {
            return Err(Error::new(Kind::FailedPrecondition, format!("container {id} has exited")));
        }
        if container.phase == Phase::Running {
            let (inner, cgroup, wanted) = (self.clone(), container.cgroup.clone(), resources.clone());
            blocking(move || inner.cgroups.update(&cgroup, &wanted)).await?;
        }
        self.change_container(id, |container| merge(&mut container.resources, &resources)).map(drop)
    }
}

/// Takes the mounts of a container off.
pub(super) fn unmount(bundle: &Path) -> Result<()> {
    for entry in fs::read_dir(bundle.join(IMAGES)).into_iter().flatten().flatten() {
        snapshot::unmount(&entry.path())?;
    }
    snapshot::unmount(&bundle.join("rootfs"))
}

/// Zero and empty mean "as before".
fn merge(have: &mut v1::LinuxContainerResources, new: &v1::LinuxContainerResources) {
    let number = |have: &mut i64, new: i64| {
        if new != 0 {
            *have = new;
        }
    };
    number(&mut have.cpu_period, new.cpu_period);
    number(&mut have.cpu_quota, new.cpu_quota);
    number(&mut have.cpu_shares, new.cpu_shares);
    number(&mut have.memory_limit_in_bytes, new.memory_limit_in_bytes);
    number(&mut have.memory_swap_limit_in_bytes, new.memory_swap_limit_in_bytes);
    number(&mut have.oom_score_adj, new.oom_score_adj);
    if !new.cpuset_cpus.is_empty() {
        have.cpuset_cpus.clone_from(&new.cpuset_cpus);
    }
    if !new.cpuset_mems.is_empty() {
        have.cpuset_mems.clone_from(&new.cpuset_mems);
    }
    have.unified.extend(new.unified.clone());
}

fn hostname(sandbox: &Sandbox) -> String {
    match sandbox.config.hostname.as_str() {
        "" => nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
        name => name.to_owned(),
    }
}

/// What the built-in runtime cannot confine as asked is refused, not ignored.
fn check_security(security: &v1::LinuxContainerSecurityContext) -> Result<()> {
    use v1::security_profile::ProfileType;
    if security.selinux_options.as_ref().is_some_and(|options| *options != v1::SeLinuxOption::default()) {
        return Err(Error::unsupported("SELinux labels are not supported by the built-in runtime"));
    }
    let localhost = |profile: &&v1::SecurityProfile| profile.profile_type == ProfileType::Localhost as i32;
    if let Some(profile) = security.apparmor.as_ref().filter(localhost)
        && !Path::new("/sys/kernel/security/apparmor").exists()
    {
        return Err(Error::invalid(format!(
            "apparmor profile {:?} is asked for, but apparmor is not enabled on this node",
            profile.localhost_ref
        )));
    }
    Ok(())
}

fn copy_directory_facts(from: &Path, to: &Path) -> Result<()> {
    let data = fs::metadata(from).step(|| format!("read {}", from.display()))?;
    let step = || format!("set owner and mode of {}", to.display());
    std::os::unix::fs::chown(to, Some(data.uid()), Some(data.gid())).step(step)?;
    fs::set_permissions(to, data.permissions()).step(step)
}

/// A host path that is not there becomes a directory, as with containerd.
fn make_missing_sources(config: &v1::ContainerConfig) -> Result<()> {
    for mount in &config.mounts {
        let path = Path::new(&mount.host_path);
        if !path.is_absolute() {
            return Err(Error::invalid(format!(
                "host path {:?} of a mount must be absolute",
                mount.host_path
            )));
        }
        if !path.exists() {
            fs::create_dir_all(path).step(|| format!("make host path {}", mount.host_path))?;
        }
    }
    Ok(())
}

/// The working directory is made where the image lacks it, as runc does.
fn prepare_rootfs(rootfs: &Path, spec: &serde_json::Value, config: &v1::ContainerConfig) -> Result<()> {
    let root = RootDir::open(rootfs).step(|| format!("open {}", rootfs.display()))?;
    let cwd = spec["process"]["cwd"].as_str().unwrap_or("/");
    // One on a mount is that volume's to have; making it here would be hidden.
    let mounted = config.mounts.iter().any(|mount| Path::new(cwd).starts_with(&mount.container_path));
    if !mounted {
        root.make_dirs(Path::new(cwd)).step(|| format!("make the working directory {cwd}"))?;
    }
    Ok(())
}

/// Named, so that a new keeper finds them; writable by all, so that `/dev/stdout` can be opened again by any user.
fn make_pipes(bundle: &Path) -> Result<()> {
    for name in ["stdin", "stdout", "stderr"] {
        let path = bundle.join(name);
        let step = || format!("make pipe {}", path.display());
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).step(step)?;
        // The directory around it is closed to everyone but root.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).step(step)?;
    }
    Ok(())
}

fn signal_number(name: &str) -> Result<i32> {
    use std::str::FromStr;
    if name.is_empty() {
        return Ok(libc::SIGTERM);
    }
    if let Ok(number) = name.parse::<i32>() {
        return match number {
            1..=64 => Ok(number),
            _ => Err(Error::invalid(format!("image names the stop signal {number}, which does not exist"))),
        };
    }
    let upper = name.to_ascii_uppercase();
    let full = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
    if let Some(offset) = full.strip_prefix("SIGRTMIN+").and_then(|offset| offset.parse::<i32>().ok()) {
        return Ok(libc::SIGRTMIN() + offset);
    }
    nix::sys::signal::Signal::from_str(&full)
        .map(|signal| signal as i32)
        .map_err(|_| Error::invalid(format!("image names the stop signal {name:?}, which does not exist")))
}

fn devices(config: &v1::ContainerConfig, privileged: bool) -> Result<Vec<HostDevice>> {
    let mut devices = Vec::new();
    if privileged {
        host_devices(Path::new("/dev"), &mut devices);
    }
    for device in &config.devices {
        let data = fs::metadata(&device.host_path).step(|| format!("device {}", device.host_path))?;
        let path = if device.container_path.is_empty() { &device.host_path } else { &device.container_path };
        let found = host_device(path, &data, &device.permissions)
            .ok_or_else(|| Error::invalid(format!("{} is not a device", device.host_path)))?;
        devices.retain(|have| have.container_path != found.container_path);
        devices.push(found);
    }
    if !config.cdi_devices.is_empty() {
        return Err(Error::unsupported("CDI devices are not supported by the built-in runtime"));
    }
    Ok(devices)
}

/// Every device of the host, but terminals and what has a mount of its own in containers.
fn host_devices(dir: &Path, out: &mut Vec<HostDevice>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let Ok(data) = fs::symlink_metadata(&path) else { continue };
        if data.is_dir() {
            if !matches!(name.to_str(), Some("pts" | "shm" | "fd" | "mqueue" | "hugepages" | ".udev")) {
                host_devices(&path, out);
            }
            continue;
        }
        if path == Path::new("/dev/console") || path == Path::new("/dev/ptmx") {
            continue;
        }
        if let Some(device) = path.to_str().and_then(|path| host_device(path, &data, DEVICE_ALL)) {
            out.push(device);
        }
    }
}

fn host_device(path: &str, data: &fs::Metadata, access: &str) -> Option<HostDevice> {
    let kind = match data.file_type() {
        kind if kind.is_char_device() => 'c',
        kind if kind.is_block_device() => 'b',
        _ => return None,
    };
    let rule = DeviceRule {
        kind,
        major: Some(libc::major(data.rdev())),
        minor: Some(libc::minor(data.rdev())),
        access: if access.is_empty() { DEVICE_ALL.into() } else { access.to_owned() },
    };
    Some(HostDevice {
        container_path: path.to_owned(),
        rule,
        mode: data.mode() & 0o777,
        uid: data.uid(),
        gid: data.gid(),
    })
}

fn device_rules(config: &v1::ContainerConfig, privileged: bool) -> Result<DeviceRules> {
    if privileged {
        return Ok(DeviceRules { all: true, allow: Vec::new() });
    }
    let mut rules = DeviceRules::standard();
    rules.allow.extend(devices(config, false)?.into_iter().map(|device| device.rule));
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_signals_are_read_as_images_write_them() {
        for (name, number) in
            [("", 15), ("SIGQUIT", 3), ("quit", 3), ("9", 9), ("SIGRTMIN+3", libc::SIGRTMIN() + 3)]
        {
            assert_eq!(signal_number(name).unwrap(), number, "{name}");
        }
        assert!(signal_number("SIGNOPE").is_err());
        assert!(signal_number("0").is_err());
    }

    #[test]
    fn updates_leave_what_they_do_not_name() {
        let mut have =
            v1::LinuxContainerResources { cpu_shares: 2, memory_limit_in_bytes: 10, ..Default::default() };
        merge(&mut have, &v1::LinuxContainerResources { cpu_shares: 5, ..Default::default() });
        assert_eq!((have.cpu_shares, have.memory_limit_in_bytes), (5, 10));
    }
}
