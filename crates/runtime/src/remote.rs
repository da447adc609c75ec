//! The [`Runtime`] trait over a CRI v1 socket: containerd, CRI-O. Calls are passed on as they are. Streams go by
//! WebSocket to the address the runtime answers (`v5.channel.k8s.io` where it can, else `v4.channel.k8s.io`).
//! Events come by `GetContainerEvents` where the runtime has it; elsewhere (containerd before 1.7) two lists a
//! second apart are compared: the one place where something is asked for on a timer.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::{BoxStream, StreamExt};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::sync::{broadcast, watch};
use tokio_stream::wrappers::BroadcastStream;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::cri::v1::image_service_client::ImageServiceClient;
use crate::cri::v1::runtime_service_client::RuntimeServiceClient;
use crate::cri::{ContainerExit, Event, Runtime, v1};
use crate::error::{Error, Kind, Result};
use crate::imports::Imports;
use crate::stream::{Duplex, ExecSession};

mod websocket;

/// Longest answer: a full node's list with all its labels.
const ANSWER_BYTES_MAX: usize = 16 << 20;
/// How long any call may take by default; upstream's.
const CALL_TIMEOUT: Duration = Duration::from_secs(120);
/// Pulls take as long as they take; a pull without progress for so long is given up by the runtime itself.
const PULL_TIMEOUT: Duration = Duration::from_secs(3600);
/// Between lists, where the runtime has no events.
const LIST_PERIOD: Duration = Duration::from_secs(1);
/// Between attempts to hear events again after the runtime went away.
const RETRY_PAUSE: Duration = Duration::from_secs(2);
const EVENTS_MAX: usize = 1024;

/// A runtime behind a socket. Cheap to clone.
#[derive(Clone)]
pub struct RemoteRuntime {
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
    events: broadcast::Sender<Event>,
    imports: Imports,
    /// Dropped with the last clone, which ends the task that hears events.
    _alive: Arc<watch::Sender<()>>,
}

impl RemoteRuntime {
    /// Connects to `endpoint`: `unix:///run/containerd/containerd.sock`, or a path. Fails unless a runtime that
    /// speaks CRI v1 answers.
    pub async fn connect(endpoint: &str) -> Result<Self> {
        let path = PathBuf::from(endpoint.strip_prefix("unix://").unwrap_or(endpoint));
        if !path.is_absolute() {
            return Err(Error::invalid(format!(
                "container runtime endpoint {endpoint:?} is not a Unix socket (unix:///path)"
            )));
        }
        let channel = channel(&path);
        let (alive, mut dropped) = watch::channel(());
        let limit =
            |channel: Channel| RuntimeServiceClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX);
        let remote = Self {
            runtime: limit(channel.clone()),
            images: ImageServiceClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX),
            events: broadcast::Sender::new(EVENTS_MAX),
            imports: Imports::new(),
            _alive: Arc::new(alive),
        };
        let version = remote.version().await.map_err(|error| {
            Error::new(
                Kind::Unavailable,
                format!(
                    "no container runtime answers at {}: {error}; is it running, with its CRI plugin enabled?",
                    path.display()
                ),
            )
        })?;
        tracing::info!(
            runtime = version.runtime_name,
            version = version.runtime_version,
            "connected to the container runtime"
        );
        let following = follow(remote.runtime.clone(), remote.events.downgrade());
        tokio::spawn(async move {
            tokio::select! {
                () = following => {}
                _ = dropped.changed() => {}
            }
        });
        Ok(remote)
    }
}

/// What a runtime tells of its own configuration. Empty where it does not tell.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Configuration {
    /// Where it looks for network plug-ins, and for their configuration.
    pub plugin_dir: Option<PathBuf>,
    pub network_dir: Option<PathBuf>,
    /// The image of a sandbox's first process.
    pub sandbox_image: Option<String>,
    /// Control groups are made by systemd.
    pub systemd_cgroups: bool,
}

impl Configuration {
    /// Reads what containerd tells in its verbose status.
    fn read(info: &HashMap<String, String>) -> Configuration {
        let config: serde_json::Value =
            info.get("config").and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
        let text = |pointer: &str| {
            config
                .pointer(pointer)
                .and_then(|value| value.as_str())
                .filter(|t| !t.is_empty())
                .map(str::to_owned)
        };
        let runtime = text("/containerd/defaultRuntimeName").unwrap_or_else(|| "runc".to_owned());
        let systemd = config.pointer(&format!("/containerd/runtimes/{runtime}/options/SystemdCgroup"));
        Configuration {
            plugin_dir: text("/cni/binDir").or_else(|| text("/cni/binDirs/0")).map(PathBuf::from),
            network_dir: text("/cni/confDir").map(PathBuf::from),
            sandbox_image: text("/sandboxImage"),
            systemd_cgroups: systemd.and_then(|value| value.as_bool()).unwrap_or(false),
        }
    }
}

impl RemoteRuntime {
    /// What the runtime tells of its configuration.
    pub async fn configuration(&self) -> Result<Configuration> {
        Ok(Configuration::read(&self.status(true).await?.info))
    }

    /// Announces imports that somebody else makes: until the returned value is dropped, whoever asks for an image
    /// that is not there waits. [`Imports::arrived`] has them look again.
    pub fn imports(&self) -> &Imports {
        &self.imports
    }
}

/// Connects when first used, and again whenever the runtime has been restarted.
fn channel(path: &Path) -> Channel {
    let path = path.to_owned();
    // The address is never used: the connector always dials the socket.
    Endpoint::from_static("http://localhost").connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    }))
}

fn request<T>(message: T) -> tonic::Request<T> {
    with_timeout(message, CALL_TIMEOUT)
}

fn with_timeout<T>(message: T, timeout: Duration) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(timeout);
    request
}

/// Tells events until nobody can listen any more.
async fn follow(mut client: RuntimeServiceClient<Channel>, events: broadcast::WeakSender<Event>) {
    loop {
        match client.get_container_events(tonic::Request::new(v1::GetEventsRequest {})).await {
            Ok(stream) => {
                send(&events, [Event::Resync]);
                let mut stream = stream.into_inner();
                loop {
                    // A runtime that accepts the call but has events switched off ends the stream at once.
                    match stream.message().await {
                        Ok(Some(event)) => {
                            if !send(&events, told(event)) {
                                return;
                            }
                        }
                        Ok(None) => break,
                        Err(status) => {
                            if no_events(&status) {
                                return by_lists(client, events).await;
                            }
                            tracing::debug!(%status, "events from the container runtime ended");
                            break;
                        }
                    }
                }
            }
            Err(status) if no_events(&status) => return by_lists(client, events).await,
            Err(status) => tracing::debug!(%status, "no events from the container runtime"),
        }
        tokio::time::sleep(RETRY_PAUSE).await;
        if events.upgrade().is_none() {
            return;
        }
    }
}

/// The runtime has no such call, or has it switched off.
fn no_events(status: &tonic::Status) -> bool {
    status.code() == tonic::Code::Unimplemented
}

/// False when the last listener's owner is gone.
fn send(events: &broadcast::WeakSender<Event>, all: impl IntoIterator<Item = Event>) -> bool {
    let Some(sender) = events.upgrade() else { return false };
    for event in all {
        let _ = sender.send(event);
    }
    true
}

/// One event in our words. The id is a container's or, when it is the sandbox's own, the sandbox's.
fn told(event: v1::ContainerEventResponse) -> Vec<Event> {
    let sandbox_id = event.pod_sandbox_status.as_ref().map(|status| status.id.clone()).unwrap_or_default();
    let container_id = event.container_id.clone();
    let kind = v1::ContainerEventType::try_from(event.container_event_type);
    if container_id == sandbox_id {
        return match kind {
            Ok(v1::ContainerEventType::ContainerStartedEvent) => vec![Event::SandboxStarted { sandbox_id }],
            Ok(v1::ContainerEventType::ContainerStoppedEvent) => vec![Event::SandboxStopped { sandbox_id }],
            Ok(v1::ContainerEventType::ContainerDeletedEvent) => vec![Event::SandboxRemoved { sandbox_id }],
            _ => Vec::new(),
        };
    }
    let status = event.containers_statuses.into_iter().find(|status| status.id == container_id);
    vec![match kind {
        Ok(v1::ContainerEventType::ContainerCreatedEvent) => {
            Event::ContainerCreated { sandbox_id, container_id }
        }
        Ok(v1::ContainerEventType::ContainerStartedEvent) => {
            Event::ContainerStarted { sandbox_id, container_id }
        }
        Ok(v1::ContainerEventType::ContainerStoppedEvent) => {
            let exit = status.map(exit_of).unwrap_or_default();
            Event::ContainerExited { sandbox_id, container_id, exit }
        }
        Ok(v1::ContainerEventType::ContainerDeletedEvent) => {
            Event::ContainerRemoved { sandbox_id, container_id }
        }
        Err(_) => Event::Resync,
    }]
}

fn exit_of(status: v1::ContainerStatus) -> ContainerExit {
    ContainerExit {
        code: status.exit_code,
        oom_killed: status.reason == "OOMKilled",
        finished_at: status.finished_at,
        reason: status.reason,
        message: status.message,
    }
}

/// What a list shows: sandboxes with whether they are ready, containers with their sandbox and state.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Seen {
    sandboxes: HashMap<String, bool>,
    containers: HashMap<String, (String, i32)>,
}

async fn by_lists(mut client: RuntimeServiceClient<Channel>, events: broadcast::WeakSender<Event>) {
    tracing::info!("the container runtime has no events, listing instead");
    let mut before: Option<Seen> = None;
    while events.upgrade().is_some() {
        match see(&mut client).await {
            Ok(now) => {
                let changes =
                    before.as_ref().map_or_else(|| vec![Event::Resync], |before| compare(before, &now));
                for mut event in changes {
                    if let Event::ContainerExited { container_id, exit, .. } = &mut event {
                        let asked =
                            v1::ContainerStatusRequest { container_id: container_id.clone(), verbose: false };
                        if let Ok(answer) = client.container_status(request(asked)).await {
                            *exit = answer.into_inner().status.map(exit_of).unwrap_or_default();
                        }
                    }
                    send(&events, [event]);
                }
                before = Some(now);
            }
            Err(status) => tracing::debug!(%status, "cannot list containers"),
        }
        tokio::time::sleep(LIST_PERIOD).await;
    }
}

async fn see(client: &mut RuntimeServiceClient<Channel>) -> Result<Seen, tonic::Status> {
    let sandboxes =
        client.list_pod_sandbox(request(v1::ListPodSandboxRequest::default())).await?.into_inner();
    let containers =
        client.list_containers(request(v1::ListContainersRequest::default())).await?.into_inner();
    Ok(Seen {
        sandboxes: sandboxes.items.into_iter().map(|one| (one.id, one.state == 0)).collect(),
        containers: containers
            .containers
            .into_iter()
            .map(|one| (one.id, (one.pod_sandbox_id, one.state)))
            .collect(),
    })
}

fn compare(before: &Seen, now: &Seen) -> Vec<Event> {
    let mut events = Vec::new();
    for (id, ready) in &now.sandboxes {
        let sandbox_id = id.clone();
        match (before.sandboxes.get(id), ready) {
            (None, true) => events.push(Event::SandboxStarted { sandbox_id }),
            (Some(true), false) => events.push(Event::SandboxStopped { sandbox_id }),
            _ => {}
        }
    }
    const CREATED: i32 = v1::ContainerState::ContainerCreated as i32;
    const EXITED: i32 = v1::ContainerState::ContainerExited as i32;
    for (id, (sandbox, state)) in &now.containers {
        let old = before.containers.get(id).map(|(_, state)| *state);
        let names = || (sandbox.clone(), id.clone());
        if old.is_none() {
            let (sandbox_id, container_id) = names();
            events.push(Event::ContainerCreated { sandbox_id, container_id });
        }
        if *state != CREATED && old.is_none_or(|old| old == CREATED) {
            let (sandbox_id, container_id) = names();
            events.push(Event::ContainerStarted { sandbox_id, container_id });
        }
        if *state == EXITED && old != Some(EXITED) {
            let (sandbox_id, container_id) = names();
            events.push(Event::ContainerExited { sandbox_id, container_id, exit: ContainerExit::default() });
        }
    }
    for (id, (sandbox, _)) in &before.containers {
        if !now.containers.contains_key(id) {
            events.push(Event::ContainerRemoved { sandbox_id: sandbox.clone(), container_id: id.clone() });
        }
    }
    for id in before.sandboxes.keys().filter(|id| !now.sandboxes.contains_key(*id)) {
        events.push(Event::SandboxRemoved { sandbox_id: id.clone() });
    }
    events
}

fn lacking(what: &str) -> Error {
    Error::internal(format!("the container runtime's answer lacks {what}"))
}

#[async_trait]
impl Runtime for RemoteRuntime {
    async fn version(&self) -> Result<v1::VersionResponse> {
        Ok(self.runtime.clone().version(request(v1::VersionRequest::default())).await?.into_inner())
    }

    async fn status(&self, verbose: bool) -> Result<v1::StatusResponse> {
        Ok(self.runtime.clone().status(request(v1::StatusRequest { verbose })).await?.into_inner())
    }

    async fn runtime_config(&self) -> Result<v1::RuntimeConfigResponse> {
        match self.runtime.clone().runtime_config(request(v1::RuntimeConfigRequest {})).await {
            Ok(answer) => Ok(answer.into_inner()),
            // Containerd before 2.0 does not tell; its configuration does.
            Err(status) if status.code() == tonic::Code::Unimplemented => {
                let systemd = self.configuration().await?.systemd_cgroups;
                let driver =
                    if systemd { v1::CgroupDriver::Systemd } else { v1::CgroupDriver::Cgroupfs } as i32;
                let linux = v1::LinuxRuntimeConfiguration { cgroup_driver: driver };
                Ok(v1::RuntimeConfigResponse { linux: Some(linux) })
            }
            Err(status) => Err(status.into()),
        }
    }

    fn attaches_network(&self) -> bool {
        true
    }

    async fn run_pod_sandbox(&self, config: v1::PodSandboxConfig, runtime_handler: &str) -> Result<String> {
        let message =
            v1::RunPodSandboxRequest { config: Some(config), runtime_handler: runtime_handler.to_owned() };
        Ok(self.runtime.clone().run_pod_sandbox(request(message)).await?.into_inner().pod_sandbox_id)
    }

    /// Nothing to record: the runtime attached the network itself.
    async fn set_sandbox_addresses(&self, _sandbox_id: &str, _addresses: &[IpAddr]) -> Result<()> {
        Ok(())
    }

    async fn stop_pod_sandbox(&self, sandbox_id: &str) -> Result<()> {
        let message = v1::StopPodSandboxRequest { pod_sandbox_id: sandbox_id.to_owned() };
        self.runtime.clone().stop_pod_sandbox(request(message)).await?;
        Ok(())
    }

    async fn remove_pod_sandbox(&self, sandbox_id: &str) -> Result<()> {
        let message = v1::RemovePodSandboxRequest { pod_sandbox_id: sandbox_id.to_owned() };
        self.runtime.clone().remove_pod_sandbox(request(message)).await?;
        Ok(())
    }

    async fn pod_sandbox_status(
        &self,
        sandbox_id: &str,
        verbose: bool,
    ) -> Result<v1::PodSandboxStatusResponse> {
        let message = v1::PodSandboxStatusRequest { pod_sandbox_id: sandbox_id.to_owned(), verbose };
        Ok(self.runtime.clone().pod_sandbox_status(request(message)).await?.into_inner())
    }

    async fn list_pod_sandbox(&self, filter: Option<v1::PodSandboxFilter>) -> Result<Vec<v1::PodSandbox>> {
        let message = v1::ListPodSandboxRequest { filter };
        Ok(self.runtime.clone().list_pod_sandbox(request(message)).await?.into_inner().items)
    }

    async fn create_container(
        &self,
        sandbox_id: &str,
        config: v1::ContainerConfig,
        sandbox_config: v1::PodSandboxConfig,
    ) -> Result<String> {
        let message = v1::CreateContainerRequest {
            pod_sandbox_id: sandbox_id.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox_config),
        };
        Ok(self.runtime.clone().create_container(request(message)).await?.into_inner().container_id)
    }

    async fn start_container(&self, container_id: &str) -> Result<()> {
        let message = v1::StartContainerRequest { container_id: container_id.to_owned() };
        self.runtime.clone().start_container(request(message)).await.map_err(|status| {
            let error = Error::from(status);
            // Runtimes tell this only in words, all of them runc's.
            match error.message.contains("unable to start container process") {
                true => Error::new(Kind::CannotRun, error.message),
                false => error,
            }
        })?;
        Ok(())
    }

    async fn stop_container(&self, container_id: &str, grace: Duration) -> Result<()> {
        let timeout = grace.as_secs_f64().ceil() as i64;
        let message = v1::StopContainerRequest { container_id: container_id.to_owned(), timeout };
        self.runtime.clone().stop_container(with_timeout(message, grace + CALL_TIMEOUT)).await?;
        Ok(())
    }

    async fn remove_container(&self, container_id: &str) -> Result<()> {
        let message = v1::RemoveContainerRequest { container_id: container_id.to_owned() };
        self.runtime.clone().remove_container(request(message)).await?;
        Ok(())
    }

    async fn list_containers(&self, filter: Option<v1::ContainerFilter>) -> Result<Vec<v1::Container>> {
        let message = v1::ListContainersRequest { filter };
        Ok(self.runtime.clone().list_containers(request(message)).await?.into_inner().containers)
    }

    async fn container_status(
        &self,
        container_id: &str,
        verbose: bool,
    ) -> Result<v1::ContainerStatusResponse> {
        let message = v1::ContainerStatusRequest { container_id: container_id.to_owned(), verbose };
        Ok(self.runtime.clone().container_status(request(message)).await?.into_inner())
    }

    async fn update_container_resources(
        &self,
        container_id: &str,
        resources: v1::LinuxContainerResources,
    ) -> Result<()> {
        let message = v1::UpdateContainerResourcesRequest {
            container_id: container_id.to_owned(),
            linux: Some(resources),
            ..Default::default()
        };
        self.runtime.clone().update_container_resources(request(message)).await?;
        Ok(())
    }

    async fn reopen_container_log(&self, container_id: &str) -> Result<()> {
        let message = v1::ReopenContainerLogRequest { container_id: container_id.to_owned() };
        self.runtime.clone().reopen_container_log(request(message)).await?;
        Ok(())
    }

    async fn exec_sync(
        &self,
        container_id: &str,
        command: Vec<String>,
        timeout: Duration,
    ) -> Result<v1::ExecSyncResponse> {
        let message = v1::ExecSyncRequest {
            container_id: container_id.to_owned(),
            cmd: command,
            timeout: timeout.as_secs_f64().ceil() as i64,
        };
        let mut request = tonic::Request::new(message);
        if !timeout.is_zero() {
            request.set_timeout(timeout + CALL_TIMEOUT);
        }
        Ok(self.runtime.clone().exec_sync(request).await?.into_inner())
    }

    async fn exec(&self, message: v1::ExecRequest) -> Result<ExecSession> {
        let wanted = websocket::Wanted {
            stdin: message.stdin,
            stdout: message.stdout,
            stderr: message.stderr && !message.tty,
            tty: message.tty,
        };
        let url = self.runtime.clone().exec(request(message)).await?.into_inner().url;
        websocket::session(&url, wanted).await
    }

    async fn attach(&self, message: v1::AttachRequest) -> Result<ExecSession> {
        let wanted = websocket::Wanted {
            stdin: message.stdin,
            stdout: message.stdout,
            stderr: message.stderr && !message.tty,
            tty: message.tty,
        };
        let url = self.runtime.clone().attach(request(message)).await?.into_inner().url;
        websocket::session(&url, wanted).await
    }

    async fn port_forward(&self, sandbox_id: &str, port: u16) -> Result<Duplex> {
        let message =
            v1::PortForwardRequest { pod_sandbox_id: sandbox_id.to_owned(), port: vec![port.into()] };
        let url = self.runtime.clone().port_forward(request(message)).await?.into_inner().url;
        websocket::port(&url, port).await
    }

    async fn container_stats(&self, container_id: &str) -> Result<v1::ContainerStats> {
        let message = v1::ContainerStatsRequest { container_id: container_id.to_owned() };
        let answer = self.runtime.clone().container_stats(request(message)).await?.into_inner();
        answer.stats.ok_or_else(|| lacking("stats"))
    }

    async fn list_container_stats(
        &self,
        filter: Option<v1::ContainerStatsFilter>,
    ) -> Result<Vec<v1::ContainerStats>> {
        let message = v1::ListContainerStatsRequest { filter };
        Ok(self.runtime.clone().list_container_stats(request(message)).await?.into_inner().stats)
    }

    async fn pod_sandbox_stats(&self, sandbox_id: &str) -> Result<v1::PodSandboxStats> {
        let message = v1::PodSandboxStatsRequest { pod_sandbox_id: sandbox_id.to_owned() };
        let answer = self.runtime.clone().pod_sandbox_stats(request(message)).await?.into_inner();
        answer.stats.ok_or_else(|| lacking("stats"))
    }

    async fn list_pod_sandbox_stats(
        &self,
        filter: Option<v1::PodSandboxStatsFilter>,
    ) -> Result<Vec<v1::PodSandboxStats>> {
        let message = v1::ListPodSandboxStatsRequest { filter };
        Ok(self.runtime.clone().list_pod_sandbox_stats(request(message)).await?.into_inner().stats)
    }

    async fn pull_image(&self, image: v1::ImageSpec, auth: Option<v1::AuthConfig>) -> Result<String> {
        let message = v1::PullImageRequest { image: Some(image), auth, sandbox_config: None };
        Ok(self.images.clone().pull_image(with_timeout(message, PULL_TIMEOUT)).await?.into_inner().image_ref)
    }

    async fn list_images(&self, filter: Option<v1::ImageFilter>) -> Result<Vec<v1::Image>> {
        Ok(self
            .images
            .clone()
            .list_images(request(v1::ListImagesRequest { filter }))
            .await?
            .into_inner()
            .images)
    }

    async fn image_status(&self, image: v1::ImageSpec, verbose: bool) -> Result<v1::ImageStatusResponse> {
        let message = v1::ImageStatusRequest { image: Some(image), verbose };
        let mut arrivals = self.imports.arrivals();
        loop {
            let answer = self.images.clone().image_status(request(message.clone())).await?.into_inner();
            if answer.image.is_some() || !arrivals.next().await {
                return Ok(answer);
            }
        }
    }

    async fn remove_image(&self, image: v1::ImageSpec) -> Result<()> {
        self.images.clone().remove_image(request(v1::RemoveImageRequest { image: Some(image) })).await?;
        Ok(())
    }

    async fn image_fs_info(&self) -> Result<v1::ImageFsInfoResponse> {
        Ok(self.images.clone().image_fs_info(request(v1::ImageFsInfoRequest {})).await?.into_inner())
    }

    fn events(&self) -> BoxStream<'static, Event> {
        BroadcastStream::new(self.events.subscribe()).map(|event| event.unwrap_or(Event::Resync)).boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containerd_tells_its_configuration() {
        let config = serde_json::json!({
            "containerd": {"defaultRuntimeName": "r", "runtimes": {"r": {"options": {"SystemdCgroup": true}}}},
            "cni": {"binDir": "/opt/cni/bin", "confDir": "/etc/cni/net.d"},
            "sandboxImage": "example.org/pause:1",
        });
        let told = Configuration::read(&[("config".to_owned(), config.to_string())].into());
        let want = Configuration {
            plugin_dir: Some("/opt/cni/bin".into()),
            network_dir: Some("/etc/cni/net.d".into()),
            sandbox_image: Some("example.org/pause:1".into()),
            systemd_cgroups: true,
        };
        assert_eq!(told, want);
        assert_eq!(Configuration::read(&HashMap::new()), Configuration::default());
    }

    #[test]
    fn lists_a_second_apart_become_events() {
        let seen = |sandboxes: &[(&str, bool)], containers: &[(&str, i32)]| Seen {
            sandboxes: sandboxes.iter().map(|(id, ready)| ((*id).to_owned(), *ready)).collect(),
            containers: containers
                .iter()
                .map(|(id, state)| ((*id).to_owned(), ("s".to_owned(), *state)))
                .collect(),
        };
        let kinds = |before: &Seen, now: &Seen| {
            let name = |event: Event| format!("{event:?}").split(' ').next().unwrap().to_owned();
            compare(before, now).into_iter().map(name).collect::<Vec<_>>().join(" ")
        };
        let none = Seen::default();
        let created = seen(&[("s", true)], &[("c", 0)]);
        let running = seen(&[("s", true)], &[("c", 1)]);
        let exited = seen(&[("s", true)], &[("c", 2)]);
        let stopped = seen(&[("s", false)], &[]);
        assert_eq!(kinds(&none, &created), "SandboxStarted ContainerCreated");
        assert_eq!(kinds(&created, &running), "ContainerStarted");
        assert_eq!(kinds(&running, &running), "");
        assert_eq!(kinds(&running, &exited), "ContainerExited");
        assert_eq!(kinds(&none, &exited), "SandboxStarted ContainerCreated ContainerStarted ContainerExited");
        assert_eq!(kinds(&exited, &stopped), "SandboxStopped ContainerRemoved");
        assert_eq!(kinds(&stopped, &none), "SandboxRemoved");
    }
}
