//! The built-in runtime: images in its own store, overlay snapshots, sandboxes without a process, containers by
//! libcontainer held by the [keeper](crate::keeper).
//!
//! Reading order: here state, start and adoption; [`record`] what is on disk; `sandbox`, `container`, `exec` and
//! `stats` each do one group of calls of the [`Runtime`] trait; [`purge`] takes everything away again.
//!
//! Invariant: after a crash of this process, of the keeper, or of both, [`BuiltinRuntime::start`] finds every
//! sandbox and container again from disk and from the keeper.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::{BoxStream, StreamExt};
use jiff::Timestamp;
use k8s_cri::v1;
use parking_lot::Mutex;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio_stream::wrappers::BroadcastStream;

use crate::cgroup::Cgroups;
use crate::cri::{ContainerExit, Event, Runtime, no_container, no_sandbox};
use crate::error::{Context, Error, Kind, Result};
use crate::host::HostLimits;
use crate::image::Limits;
use crate::image::archive::{self, Imported};
use crate::image::pull::{self, RegistryConfig};
use crate::image::reference::Reference;
use crate::image::store::ImageStore;
use crate::imports::{Importing, Imports};
use crate::keeper::client::{Client, Holdings, Notice};
use crate::keeper::protocol::{AdoptContainer, Event as KeeperEvent, Op, Running, StartContainer, Stdin};
use crate::stream::{Duplex, ExecSession};
use record::{Container, Phase, Sandbox};

mod container;
mod exec;
mod namespaces;
pub mod purge;
pub mod record;
mod sandbox;
mod snapshot;
mod stats;
mod streams;

/// Events a slow subscriber may be behind before it is told to list.
const EVENTS_MAX: usize = 1024;
/// Reason of a container whose command could not be run.
const START_ERROR: &str = "StartError";
/// A control-group path given by the caller for pods that name none.
const POD_CGROUPS: &str = "pods";

/// Where things are and how registries are reached.
#[derive(Debug, Clone)]
pub struct Config {
    /// Images, writable layers and records; survives reboots.
    pub data_dir: PathBuf,
    /// Namespaces, sockets; on a tmpfs. Keep it short: socket addresses hold 107 bytes.
    pub run_dir: PathBuf,
    /// Program and arguments that run [`crate::keeper::main`], to which `--socket PATH` is added.
    pub keeper_command: Vec<String>,
    /// The control group everything of ours lies in: `/knarr`.
    pub cgroup_root: String,
    pub registries: RegistryConfig,
    pub image_limits: Limits,
}

impl Config {
    /// The paths of a node; the keeper is this very program, called with [`crate::keeper::ARGUMENT`].
    pub fn new(data_dir: impl Into<PathBuf>, run_dir: impl Into<PathBuf>) -> Self {
        let program = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("/proc/self/exe"));
        Self {
            data_dir: data_dir.into(),
            run_dir: run_dir.into(),
            keeper_command: vec![program.display().to_string(), crate::keeper::ARGUMENT.into()],
            cgroup_root: "/knarr".into(),
            registries: RegistryConfig::default(),
            image_limits: Limits::default(),
        }
    }

    fn sandboxes(&self) -> PathBuf {
        self.data_dir.join("sandboxes")
    }

    fn containers(&self) -> PathBuf {
        self.data_dir.join("containers")
    }

    fn sandbox_run(&self, id: &str) -> PathBuf {
        self.run_dir.join("sandboxes").join(id)
    }

    fn oci_root(&self) -> PathBuf {
        self.run_dir.join("oci")
    }

    /// The keeper's socket.
    pub fn keeper_socket(&self) -> PathBuf {
        self.run_dir.join("keeper.sock")
    }
}

/// The built-in runtime. Cheap to clone.
#[derive(Clone)]
pub struct BuiltinRuntime {
    inner: Arc<Inner>,
}

struct Inner {
    config: Config,
    cgroups: Cgroups,
    limits: HostLimits,
    images: ImageStore,
    keeper: OnceLock<Client>,
    state: Mutex<State>,
    events: broadcast::Sender<Event>,
    imports: Imports,
    /// Dropped with us, which ends the task that listens to the keeper.
    _alive: watch::Sender<()>,
}

#[derive(Default)]
struct State {
    sandboxes: HashMap<String, SandboxEntry>,
    containers: HashMap<String, ContainerEntry>,
    execs: HashMap<u64, ExecSlot>,
}

struct SandboxEntry {
    record: Sandbox,
    /// One change at a time.
    lock: Arc<tokio::sync::Mutex<()>>,
}

struct ContainerEntry {
    record: Container,
    lock: Arc<tokio::sync::Mutex<()>>,
    exit: watch::Sender<Option<ContainerExit>>,
    /// Our copy of the terminal: writing, resizing, and handing it to a new keeper.
    terminal: Option<streams::Fd>,
}

/// The end of an exec and who waits for it; either may come first.
enum ExecSlot {
    Waiting(oneshot::Sender<i32>),
    Ended(i32),
}

impl BuiltinRuntime {
    /// Opens the store, finds or starts the keeper, and takes up again whatever ran.
    pub async fn start(config: Config) -> Result<Self> {
        for dir in
            [config.sandboxes(), config.containers(), config.oci_root(), config.run_dir.join("sandboxes")]
        {
            fs::create_dir_all(&dir).step(|| format!("make {}", dir.display()))?;
        }
        restrict(&config.run_dir)?;
        restrict(&config.data_dir)?;
        let images = ImageStore::open(&config.data_dir.join("images"), config.image_limits)?;
        let state = load(&config)?;
        let (keeper_socket, keeper_command) = (config.keeper_socket(), config.keeper_command.clone());
        let (alive, dropped) = watch::channel(());
        let inner = Arc::new(Inner {
            _alive: alive,
            cgroups: Cgroups::detect()?,
            limits: HostLimits::detect(),
            config,
            images,
            keeper: OnceLock::new(),
            state: Mutex::new(state),
            events: broadcast::Sender::new(EVENTS_MAX),
            imports: Imports::new(),
        });
        let holdings = Arc::new(Adoption { inner: Arc::downgrade(&inner) });
        let (client, notices) = Client::start(keeper_socket, keeper_command, holdings).await?;
        let _ = inner.keeper.set(client);
        inner.fetch_terminals().await;
        tokio::spawn(follow(Arc::downgrade(&inner), notices, dropped));
        Ok(Self { inner })
    }

    /// The node's images.
    pub fn images(&self) -> &ImageStore {
        &self.inner.images
    }

    /// Imports an archive (OCI layout or `docker save`); see [`archive::import`].
    pub async fn import_image(&self, path: &Path, name: Option<&str>, pinned: bool) -> Result<Vec<Imported>> {
        let (images, path, name) = (self.inner.images.clone(), path.to_owned(), name.map(str::to_owned));
        let imported = blocking(move || archive::import(&images, &path, name.as_deref(), pinned)).await;
        self.inner.imports.arrived();
        imported
    }

    /// Announces imports to come: until the returned value is dropped, whoever asks for an image that is not here
    /// waits, because it may be among them.
    pub fn announce_imports(&self) -> Importing {
        self.inner.imports.announce()
    }

    /// Removes layers that no image and no container needs. Returns the bytes freed.
    pub async fn collect_images(&self) -> Result<u64> {
        let inner = self.inner.clone();
        blocking(move || inner.images.collect(&inner.layers_in_use())).await
    }

    /// The keeper's process id.
    pub fn keeper_pid(&self) -> i32 {
        self.inner.keeper().map_or(0, Client::keeper_pid)
    }
}

impl Inner {
    fn keeper(&self) -> Result<&Client> {
        self.keeper.get().ok_or_else(|| Error::new(Kind::Unavailable, "the keeper is not connected yet"))
    }

    fn emit(&self, event: Event) {
        // No subscriber is no failure.
        let _ = self.events.send(event);
    }

    fn sandbox(&self, id: &str) -> Result<Sandbox> {
        let state = self.state.lock();
        state.sandboxes.get(id).map(|entry| entry.record.clone()).ok_or_else(|| no_sandbox(id))
    }

    fn container(&self, id: &str) -> Result<Container> {
        let state = self.state.lock();
        state.containers.get(id).map(|entry| entry.record.clone()).ok_or_else(|| no_container(id))
    }

    fn sandbox_lock(&self, id: &str) -> Option<Arc<tokio::sync::Mutex<()>>> {
        self.state.lock().sandboxes.get(id).map(|entry| entry.lock.clone())
    }

    fn container_lock(&self, id: &str) -> Option<Arc<tokio::sync::Mutex<()>>> {
        self.state.lock().containers.get(id).map(|entry| entry.lock.clone())
    }

    fn containers_of(&self, sandbox_id: &str) -> Vec<String> {
        let state = self.state.lock();
        let of = |entry: &&ContainerEntry| entry.record.sandbox_id == sandbox_id;
        state.containers.values().filter(of).map(|entry| entry.record.id.clone()).collect()
    }

    /// Changes a container's record, in memory and on disk.
    fn change_container(&self, id: &str, change: impl FnOnce(&mut Container)) -> Result<Container> {
        let mut state = self.state.lock();
        let entry = state.containers.get_mut(id).ok_or_else(|| no_container(id))?;
        change(&mut entry.record);
        record::save(&self.container_record(id), &entry.record)?;
        Ok(entry.record.clone())
    }

    fn change_sandbox(&self, id: &str, change: impl FnOnce(&mut Sandbox)) -> Result<Sandbox> {
        let mut state = self.state.lock();
        let entry = state.sandboxes.get_mut(id).ok_or_else(|| no_sandbox(id))?;
        change(&mut entry.record);
        record::save(&self.sandbox_record(id), &entry.record)?;
        Ok(entry.record.clone())
    }

    fn bundle(&self, id: &str) -> PathBuf {
        self.config.containers().join(id)
    }

    fn container_record(&self, id: &str) -> PathBuf {
        self.bundle(id).join("state.json")
    }

    fn sandbox_record(&self, id: &str) -> PathBuf {
        self.config.sandboxes().join(format!("{id}.json"))
    }

    fn layers_in_use(&self) -> BTreeSet<String> {
        let state = self.state.lock();
        state.containers.values().flat_map(|entry| entry.record.layers.iter().cloned()).collect()
    }

    /// What the keeper needs to know of a container, whether it starts it or takes it over.
    fn start_request(&self, container: &Container) -> StartContainer {
        let views = self.cgroups.views(&container.cgroup);
        StartContainer {
            id: container.id.clone(),
            bundle: self.bundle(&container.id),
            oci_root: self.config.oci_root(),
            cgroup_dirs: self.cgroups.dirs(&container.cgroup),
            cgroup_views: views.into_iter().map(|(_, dir)| dir).collect(),
            staged_mounts: container.staged.clone(),
            terminal: container.config.tty,
            stdin: match (container.config.stdin, container.config.stdin_once) {
                (false, _) => Stdin::Null,
                (true, false) => Stdin::Open,
                (true, true) => Stdin::Once,
            },
            log_path: container.log_path.clone(),
            oom_file: self.cgroups.oom_file(&container.cgroup),
        }
    }

    /// Records how a container ended, once, and tells everyone.
    fn container_ended(self: &Arc<Self>, id: &str, exit: ContainerExit) {
        let mut state = self.state.lock();
        let Some(entry) = state.containers.get_mut(id) else { return };
        if entry.record.phase == Phase::Exited {
            return;
        }
        // Its end may be heard of before the answer to its start.
        let unannounced = entry.record.phase == Phase::Created && exit.reason != START_ERROR;
        entry.record.phase = Phase::Exited;
        entry.record.pid = 0;
        // The keeper saw the end of a short run before this process noted its beginning.
        if unannounced || entry.record.started_at > exit.finished_at {
            entry.record.started_at = exit.finished_at;
        }
        entry.record.exit = Some(exit.clone());
        entry.terminal = None;
        if let Err(error) = record::save(&self.container_record(id), &entry.record) {
            // The exit is also in the keeper's record, read at the next start.
            tracing::error!(container = id, %error, "cannot record a container's end");
        }
        let sandbox_id = entry.record.sandbox_id.clone();
        entry.exit.send_replace(Some(exit.clone()));
        drop(state);
        if unannounced {
            let (sandbox_id, container_id) = (sandbox_id.clone(), id.to_owned());
            self.emit(Event::ContainerStarted { sandbox_id, container_id });
        }
        self.emit(Event::ContainerExited { sandbox_id, container_id: id.to_owned(), exit });
        let (inner, id) = (self.clone(), id.to_owned());
        tokio::task::spawn_blocking(move || inner.tidy_ended(&id));
    }

    /// After the end of the first process: whatever it left running (there may be something where it shared the
    /// process namespace) and libcontainer's state.
    fn tidy_ended(&self, id: &str) {
        if let Ok(container) = self.container(id) {
            self.cgroups.kill(&container.cgroup);
        }
        let _ = fs::remove_dir_all(self.config.oci_root().join(id));
    }

    /// Copies of terminals, to hand to a next keeper, for containers taken up from a running one.
    async fn fetch_terminals(&self) {
        let wanted: Vec<String> = {
            let state = self.state.lock();
            let lacks = |entry: &&ContainerEntry| {
                entry.record.config.tty && entry.record.phase == Phase::Running && entry.terminal.is_none()
            };
            state.containers.values().filter(lacks).map(|entry| entry.record.id.clone()).collect()
        };
        for id in wanted {
            let Ok(keeper) = self.keeper() else { return };
            match keeper.call(Op::Terminal { id: id.clone() }, &[]).await {
                Ok((_, fds)) => self.keep_terminal(&id, fds),
                Err(error) => tracing::warn!(container = id, %error, "the terminal is lost"),
            }
        }
    }

    fn keep_terminal(&self, id: &str, fds: Vec<OwnedFd>) {
        let Some(fd) = fds.into_iter().next() else { return };
        match streams::Fd::new(fd) {
            Ok(terminal) => {
                if let Some(entry) = self.state.lock().containers.get_mut(id) {
                    entry.terminal = Some(terminal);
                }
            }
            Err(error) => tracing::warn!(container = id, %error, "cannot use the terminal"),
        }
    }
}

/// Gives containers to a new keeper and takes them up from a running one.
struct Adoption {
    inner: Weak<Inner>,
}

#[async_trait]
impl Holdings for Adoption {
    fn to_adopt(&self) -> Vec<(AdoptContainer, Option<OwnedFd>)> {
        let Some(inner) = self.inner.upgrade() else { return Vec::new() };
        let running: Vec<(Container, Option<OwnedFd>)> = {
            let state = inner.state.lock();
            state
                .containers
                .values()
                .filter(|entry| entry.record.phase == Phase::Running)
                .map(|entry| {
                    let terminal = entry.terminal.as_ref().and_then(|terminal| terminal.try_clone_fd().ok());
                    (entry.record.clone(), terminal)
                })
                .collect()
        };
        running
            .into_iter()
            .filter(|(container, _)| !inner.bundle(&container.id).join("exit.json").exists())
            .map(|(container, terminal)| {
                let adopt = AdoptContainer {
                    container: inner.start_request(&container),
                    pid: container.pid,
                    start_ticks: container.start_ticks,
                };
                (adopt, terminal)
            })
            .collect()
    }

    async fn connected(&self, running: Vec<Running>, _is_new: bool) {
        let Some(inner) = self.inner.upgrade() else { return };
        // Started, but we died before we wrote it down.
        for found in &running {
            let started = inner.container(&found.id).is_ok_and(|container| container.phase == Phase::Created);
            if started {
                let changed = inner.change_container(&found.id, |container| {
                    container.phase = Phase::Running;
                    container.pid = found.pid;
                    container.start_ticks = crate::keeper::start_ticks(found.pid);
                    container.started_at = now();
                });
                if let Err(error) = changed {
                    tracing::error!(container = found.id, %error, "cannot record a running container");
                }
            }
        }
        // Ended while we were away.
        let ids: Vec<String> = {
            let state = inner.state.lock();
            let open = |entry: &&ContainerEntry| entry.record.phase != Phase::Exited;
            state.containers.values().filter(open).map(|entry| entry.record.id.clone()).collect()
        };
        for id in ids {
            if let Some(exit) = record::load(&inner.bundle(&id).join("exit.json")) {
                inner.container_ended(&id, exit);
            }
        }
    }
}

/// Hears what the keeper tells, until the runtime is dropped.
async fn follow(
    inner: Weak<Inner>,
    mut notices: mpsc::UnboundedReceiver<Notice>,
    mut dropped: watch::Receiver<()>,
) {
    loop {
        let notice = tokio::select! {
            notice = notices.recv() => notice,
            _ = dropped.changed() => return,
        };
        let Some(notice) = notice else { return };
        let Some(inner) = inner.upgrade() else { return };
        match notice {
            Notice::Keeper(KeeperEvent::ContainerExited { id, exit }) => inner.container_ended(&id, exit),
            Notice::Keeper(KeeperEvent::ExecExited { exec, code }) => {
                let mut state = inner.state.lock();
                match state.execs.remove(&exec) {
                    Some(ExecSlot::Waiting(waiting)) => drop(waiting.send(code)),
                    _ => drop(state.execs.insert(exec, ExecSlot::Ended(code))),
                }
            }
            // Dropping the senders tells those who wait.
            Notice::Lost => inner.state.lock().execs.clear(),
        }
    }
}

/// Reads all records. After a reboot nothing runs any more, whatever they say.
fn load(config: &Config) -> Result<State> {
    let mut state = State::default();
    let rebooted = rebooted(config)?;
    for path in files_in(&config.sandboxes())? {
        let Some(mut record) = record::load::<Sandbox>(&path) else { continue };
        if rebooted {
            record.ready = false;
        }
        state.sandboxes.insert(record.id.clone(), SandboxEntry { record, lock: Arc::default() });
    }
    for path in files_in(&config.containers())? {
        let Some(mut record) = record::load::<Container>(&path.join("state.json")) else {
            // Died while it was made.
            let _ = container::unmount(&path);
            let _ = fs::remove_dir_all(&path);
            continue;
        };
        if rebooted && record.phase != Phase::Exited {
            record.phase = Phase::Exited;
            record.pid = 0;
            record.exit = record::load(&path.join("exit.json")).or_else(|| Some(lost_by_reboot()));
            record::save(&path.join("state.json"), &record)?;
        }
        let exit = watch::Sender::new(record.exit.clone());
        let entry = ContainerEntry { record, lock: Arc::default(), exit, terminal: None };
        state.containers.insert(entry.record.id.clone(), entry);
    }
    Ok(state)
}

fn lost_by_reboot() -> ContainerExit {
    ContainerExit {
        code: 255,
        finished_at: now(),
        reason: "Unknown".into(),
        message: "the node was restarted".into(),
        ..Default::default()
    }
}

/// Compares the kernel's boot id with the one of the last start, and remembers it.
fn rebooted(config: &Config) -> Result<bool> {
    let path = config.data_dir.join("boot-id");
    let now = fs::read_to_string("/proc/sys/kernel/random/boot_id").step(|| "read the boot id".into())?;
    let before = fs::read_to_string(&path).unwrap_or_default();
    if before == now {
        return Ok(false);
    }
    fs::write(&path, &now).step(|| format!("write {}", path.display()))?;
    Ok(true)
}

fn files_in(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).step(|| format!("read {}", dir.display()))?;
    Ok(entries.flatten().map(|entry| entry.path()).collect())
}

/// Others must not walk into rootfs directories or reach the keeper.
fn restrict(dir: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).step(|| format!("restrict {}", dir.display()))
}

/// Nanoseconds since the epoch.
fn now() -> i64 {
    Timestamp::now().as_nanosecond() as i64
}

/// 64 random hexadecimal digits, as all runtimes name things.
fn new_id() -> Result<String> {
    use std::io::Read;
    let mut bytes = [0u8; 32];
    fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .step(|| "read random bytes".into())?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Runs what waits for the disk or the kernel on a thread that may.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Error::internal(format!("a worker thread failed: {error}")))?
}

#[async_trait]
impl Runtime for BuiltinRuntime {
    async fn version(&self) -> Result<v1::VersionResponse> {
        Ok(v1::VersionResponse {
            version: "0.1.0".into(),
            runtime_name: "knarr".into(),
            runtime_version: env!("CARGO_PKG_VERSION").into(),
            runtime_api_version: "v1".into(),
        })
    }

    async fn status(&self, verbose: bool) -> Result<v1::StatusResponse> {
        let condition =
            |name: &str| v1::RuntimeCondition { r#type: name.into(), status: true, ..Default::default() };
        let mut info = HashMap::new();
        if verbose {
            info.insert("cgroups".to_owned(), self.inner.cgroups.version().to_owned());
            info.insert("keeperPid".to_owned(), self.keeper_pid().to_string());
        }
        Ok(v1::StatusResponse {
            status: Some(v1::RuntimeStatus {
                conditions: vec![condition("RuntimeReady"), condition("NetworkReady")],
            }),
            info,
            runtime_handlers: vec![v1::RuntimeHandler {
                name: String::new(),
                features: Some(v1::RuntimeHandlerFeatures {
                    recursive_read_only_mounts: true,
                    user_namespaces: false,
                }),
            }],
            features: Some(v1::RuntimeFeatures { supplemental_groups_policy: true }),
        })
    }

    async fn runtime_config(&self) -> Result<v1::RuntimeConfigResponse> {
        let linux = v1::LinuxRuntimeConfiguration { cgroup_driver: v1::CgroupDriver::Cgroupfs as i32 };
        Ok(v1::RuntimeConfigResponse { linux: Some(linux) })
    }

    fn attaches_network(&self) -> bool {
        false
    }

    async fn run_pod_sandbox(&self, config: v1::PodSandboxConfig, runtime_handler: &str) -> Result<String> {
        self.inner.run_sandbox(config, runtime_handler).await
    }

    async fn set_sandbox_addresses(&self, sandbox_id: &str, addresses: &[IpAddr]) -> Result<()> {
        self.inner.change_sandbox(sandbox_id, |sandbox| sandbox.addresses = addresses.to_vec()).map(drop)
    }

    async fn stop_pod_sandbox(&self, sandbox_id: &str) -> Result<()> {
        self.inner.stop_sandbox(sandbox_id).await
    }

    async fn remove_pod_sandbox(&self, sandbox_id: &str) -> Result<()> {
        self.inner.remove_sandbox(sandbox_id).await
    }

    async fn pod_sandbox_status(
        &self,
        sandbox_id: &str,
        verbose: bool,
    ) -> Result<v1::PodSandboxStatusResponse> {
        self.inner.sandbox_status(sandbox_id, verbose)
    }

    async fn list_pod_sandbox(&self, filter: Option<v1::PodSandboxFilter>) -> Result<Vec<v1::PodSandbox>> {
        Ok(self.inner.list_sandboxes(&filter.unwrap_or_default()))
    }

    async fn create_container(
        &self,
        sandbox_id: &str,
        config: v1::ContainerConfig,
        _sandbox_config: v1::PodSandboxConfig,
    ) -> Result<String> {
        self.inner.create_container(sandbox_id, config).await
    }

    async fn start_container(&self, container_id: &str) -> Result<()> {
        self.inner.start_container(container_id).await
    }

    async fn stop_container(&self, container_id: &str, grace: Duration) -> Result<()> {
        self.inner.stop_container(container_id, grace).await
    }

    async fn remove_container(&self, container_id: &str) -> Result<()> {
        self.inner.remove_container(container_id).await
    }

    async fn list_containers(&self, filter: Option<v1::ContainerFilter>) -> Result<Vec<v1::Container>> {
        Ok(self.inner.list_containers(&filter.unwrap_or_default()))
    }

    async fn container_status(
        &self,
        container_id: &str,
        verbose: bool,
    ) -> Result<v1::ContainerStatusResponse> {
        let container = self.inner.container(container_id)?;
        let mut info = HashMap::new();
        if verbose {
            info.insert("pid".to_owned(), container.pid.to_string());
            info.insert("cgroup".to_owned(), container.cgroup.clone());
        }
        Ok(v1::ContainerStatusResponse { status: Some(container.status()), info })
    }

    async fn update_container_resources(
        &self,
        container_id: &str,
        resources: v1::LinuxContainerResources,
    ) -> Result<()> {
        self.inner.update_resources(container_id, resources).await
    }

    async fn reopen_container_log(&self, container_id: &str) -> Result<()> {
        let container = self.inner.container(container_id)?;
        if container.phase != Phase::Running {
            return Err(Error::new(Kind::FailedPrecondition, "container is not running"));
        }
        self.inner.keeper()?.call(Op::ReopenLog { id: container.id }, &[]).await.map(drop)
    }

    async fn exec_sync(
        &self,
        container_id: &str,
        command: Vec<String>,
        timeout: Duration,
    ) -> Result<v1::ExecSyncResponse> {
        self.inner.exec_sync(container_id, command, timeout).await
    }

    async fn exec(&self, request: v1::ExecRequest) -> Result<ExecSession> {
        self.inner.exec(request).await.map(|(session, _)| session)
    }

    async fn attach(&self, request: v1::AttachRequest) -> Result<ExecSession> {
        self.inner.attach(request).await
    }

    async fn port_forward(&self, sandbox_id: &str, port: u16) -> Result<Duplex> {
        self.inner.port_forward(sandbox_id, port).await
    }

    async fn container_stats(&self, container_id: &str) -> Result<v1::ContainerStats> {
        let (inner, container) = (self.inner.clone(), self.inner.container(container_id)?);
        blocking(move || inner.container_stats(&container)).await
    }

    async fn list_container_stats(
        &self,
        filter: Option<v1::ContainerStatsFilter>,
    ) -> Result<Vec<v1::ContainerStats>> {
        let inner = self.inner.clone();
        blocking(move || Ok(inner.list_container_stats(&filter.unwrap_or_default()))).await
    }

    async fn pod_sandbox_stats(&self, sandbox_id: &str) -> Result<v1::PodSandboxStats> {
        let (inner, sandbox) = (self.inner.clone(), self.inner.sandbox(sandbox_id)?);
        blocking(move || inner.sandbox_stats(&sandbox)).await
    }

    async fn list_pod_sandbox_stats(
        &self,
        filter: Option<v1::PodSandboxStatsFilter>,
    ) -> Result<Vec<v1::PodSandboxStats>> {
        let inner = self.inner.clone();
        blocking(move || Ok(inner.list_sandbox_stats(&filter.unwrap_or_default()))).await
    }

    async fn pull_image(&self, image: v1::ImageSpec, auth: Option<v1::AuthConfig>) -> Result<String> {
        let reference: Reference = image.image.parse()?;
        pull::pull(&self.inner.images, &self.inner.config.registries, &reference, auth.as_ref()).await
    }

    async fn list_images(&self, filter: Option<v1::ImageFilter>) -> Result<Vec<v1::Image>> {
        let wanted = filter.and_then(|filter| filter.image).map(|image| image.image).unwrap_or_default();
        if wanted.is_empty() {
            return Ok(self.inner.images.list().iter().map(|image| image.to_cri()).collect());
        }
        Ok(self.inner.images.find(&wanted).iter().map(|image| image.to_cri()).collect())
    }

    async fn image_status(&self, image: v1::ImageSpec, verbose: bool) -> Result<v1::ImageStatusResponse> {
        let mut arrivals = self.inner.imports.arrivals();
        let found = loop {
            let found = self.inner.images.find(&image.image);
            if found.is_some() || !arrivals.next().await {
                break found;
            }
        };
        let mut info = HashMap::new();
        if let (true, Some(image)) = (verbose, &found) {
            let config = self.inner.images.blob(&image.id)?;
            info.insert("imageSpec".to_owned(), String::from_utf8_lossy(&config).into_owned());
        }
        Ok(v1::ImageStatusResponse { image: found.map(|image| image.to_cri()), info })
    }

    async fn remove_image(&self, image: v1::ImageSpec) -> Result<()> {
        let inner = self.inner.clone();
        blocking(move || {
            inner.images.remove(&image.image)?;
            inner.images.collect(&inner.layers_in_use()).map(drop)
        })
        .await
    }

    async fn image_fs_info(&self) -> Result<v1::ImageFsInfoResponse> {
        let inner = self.inner.clone();
        blocking(move || Ok(inner.image_fs_info())).await
    }

    fn events(&self) -> BoxStream<'static, Event> {
        let receiver = self.inner.events.subscribe();
        BroadcastStream::new(receiver).map(|event| event.unwrap_or(Event::Resync)).boxed()
    }
}
