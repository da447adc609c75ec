//! A runtime in memory, for tests: containers run until the test ends them.

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::BoxStream;
use knarr_client::Clock;
use knarr_runtime::cri::{ContainerExit, Event, v1};
use knarr_runtime::{Duplex, Error, ExecSession, Kind, Result, Runtime};
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::time::Duration;
use tokio::sync::broadcast;

/// Everything a test may look at or change.
#[derive(Default)]
pub struct World {
    pub sandboxes: BTreeMap<String, v1::PodSandboxStatus>,
    pub containers: BTreeMap<String, (String, v1::ContainerStatus)>,
    /// What happened, in order: `start c`, `stop c 30s`, `pull i`, `exec c`.
    pub log: Vec<String>,
    pub broken_images: BTreeSet<String>,
    /// What a command exits with, by container name; zero unless told.
    pub exec_codes: HashMap<String, i32>,
    next_id: u32,
}

pub struct FakeRuntime {
    pub world: Mutex<World>,
    clock: Clock,
    events: broadcast::Sender<Event>,
}

impl FakeRuntime {
    pub fn new(clock: Clock) -> Self {
        FakeRuntime { world: Mutex::default(), clock, events: broadcast::channel(1024).0 }
    }

    fn now(&self) -> i64 {
        self.clock.now().as_nanosecond() as i64
    }

    fn emit(&self, event: Event) {
        let _ = self.events.send(event);
    }

    /// Ends the running container of this name.
    pub fn exit(&self, name: &str, code: i32) {
        let id = {
            let world = self.world.lock();
            let running = v1::ContainerState::ContainerRunning as i32;
            let found = world
                .containers
                .values()
                .find(|(_, status)| status.state == running && name_of(status) == name);
            found
                .map(|(_, status)| status.id.clone())
                .unwrap_or_else(|| panic!("container {name} is not running"))
        };
        self.end(&id, code);
    }

    fn end(&self, id: &str, code: i32) {
        let now = self.now();
        let sandbox_id = {
            let mut world = self.world.lock();
            let Some((sandbox, status)) = world.containers.get_mut(id) else { return };
            if status.state != v1::ContainerState::ContainerRunning as i32 {
                return;
            }
            status.state = v1::ContainerState::ContainerExited as i32;
            (status.exit_code, status.finished_at) = (code, now);
            sandbox.clone()
        };
        let exit = ContainerExit { code, finished_at: now, ..Default::default() };
        self.emit(Event::ContainerExited { sandbox_id, container_id: id.to_owned(), exit });
    }

    /// What happened since the last call.
    pub fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut self.world.lock().log)
    }

    fn note(&self, text: String) {
        self.world.lock().log.push(text);
    }
}

fn name_of(status: &v1::ContainerStatus) -> &str {
    status.metadata.as_ref().map_or("", |meta| &meta.name)
}

fn fits(labels: &HashMap<String, String>, selector: &HashMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

fn unsupported<T>() -> Result<T> {
    Err(Error::unsupported("the fake runtime does not do this"))
}

#[async_trait]
impl Runtime for FakeRuntime {
    async fn version(&self) -> Result<v1::VersionResponse> {
        Ok(v1::VersionResponse {
            runtime_name: "fake".into(),
            runtime_version: "1".into(),
            ..Default::default()
        })
    }

    async fn status(&self, _: bool) -> Result<v1::StatusResponse> {
        Ok(v1::StatusResponse { status: Some(v1::RuntimeStatus::default()), ..Default::default() })
    }

    async fn runtime_config(&self) -> Result<v1::RuntimeConfigResponse> {
        Ok(v1::RuntimeConfigResponse::default())
    }

    fn attaches_network(&self) -> bool {
        true
    }

    async fn run_pod_sandbox(&self, config: v1::PodSandboxConfig, _: &str) -> Result<String> {
        let id = {
            let mut world = self.world.lock();
            world.next_id += 1;
            let id = format!("s{}", world.next_id);
            let status = v1::PodSandboxStatus {
                id: id.clone(),
                metadata: config.metadata,
                state: v1::PodSandboxState::SandboxReady as i32,
                created_at: self.now(),
                network: Some(v1::PodSandboxNetworkStatus {
                    ip: "10.0.0.9".into(),
                    additional_ips: Vec::new(),
                }),
                labels: config.labels,
                ..Default::default()
            };
            world.sandboxes.insert(id.clone(), status);
            id
        };
        self.emit(Event::SandboxStarted { sandbox_id: id.clone() });
        Ok(id)
    }

    async fn set_sandbox_addresses(&self, _: &str, _: &[IpAddr]) -> Result<()> {
        Ok(())
    }

    async fn stop_pod_sandbox(&self, id: &str) -> Result<()> {
        let ids: Vec<String> = {
            let mut world = self.world.lock();
            if let Some(sandbox) = world.sandboxes.get_mut(id) {
                sandbox.state = v1::PodSandboxState::SandboxNotready as i32;
            }
            world
                .containers
                .values()
                .filter(|(sandbox, _)| sandbox == id)
                .map(|(_, status)| status.id.clone())
                .collect()
        };
        for id in ids {
            self.end(&id, 137);
        }
        Ok(())
    }

    async fn remove_pod_sandbox(&self, id: &str) -> Result<()> {
        self.stop_pod_sandbox(id).await?;
        let mut world = self.world.lock();
        world.sandboxes.remove(id);
        world.containers.retain(|_, (sandbox, _)| sandbox != id);
        Ok(())
    }

    async fn pod_sandbox_status(&self, id: &str, _: bool) -> Result<v1::PodSandboxStatusResponse> {
        let found = self.world.lock().sandboxes.get(id).cloned();
        let status = found.ok_or_else(|| Error::not_found(format!("no sandbox {id}")))?;
        Ok(v1::PodSandboxStatusResponse { status: Some(status), ..Default::default() })
    }

    async fn list_pod_sandbox(&self, filter: Option<v1::PodSandboxFilter>) -> Result<Vec<v1::PodSandbox>> {
        let selector = filter.unwrap_or_default().label_selector;
        let world = self.world.lock();
        let all = world.sandboxes.values().filter(|sandbox| fits(&sandbox.labels, &selector));
        let one = |sandbox: &v1::PodSandboxStatus| v1::PodSandbox {
            id: sandbox.id.clone(),
            labels: sandbox.labels.clone(),
            state: sandbox.state,
            ..Default::default()
        };
        Ok(all.map(one).collect())
    }

    async fn create_container(
        &self,
        sandbox_id: &str,
        config: v1::ContainerConfig,
        _: v1::PodSandboxConfig,
    ) -> Result<String> {
        let mut world = self.world.lock();
        world.next_id += 1;
        let id = format!("c{}", world.next_id);
        let status = v1::ContainerStatus {
            id: id.clone(),
            metadata: config.metadata,
            state: v1::ContainerState::ContainerCreated as i32,
            created_at: self.now() + i64::from(world.next_id),
            image: config.image,
            labels: config.labels,
            annotations: config.annotations,
            resources: config
                .linux
                .and_then(|linux| linux.resources)
                .map(|linux| v1::ContainerResources { linux: Some(linux), windows: None }),
            ..Default::default()
        };
        world.containers.insert(id.clone(), (sandbox_id.to_owned(), status));
        Ok(id)
    }

    async fn start_container(&self, id: &str) -> Result<()> {
        let sandbox_id = {
            let mut world = self.world.lock();
            let (sandbox, status) = world.containers.get_mut(id).ok_or_else(|| Error::not_found(id))?;
            status.state = v1::ContainerState::ContainerRunning as i32;
            status.started_at = self.now();
            let text = format!("start {}", name_of(status));
            let sandbox = sandbox.clone();
            world.log.push(text);
            sandbox
        };
        self.emit(Event::ContainerStarted { sandbox_id, container_id: id.to_owned() });
        Ok(())
    }

    async fn stop_container(&self, id: &str, grace: Duration) -> Result<()> {
        let name = self.world.lock().containers.get(id).map(|(_, status)| name_of(status).to_owned());
        self.note(format!("stop {} {}s", name.unwrap_or_default(), grace.as_secs()));
        self.end(id, 143);
        Ok(())
    }

    async fn remove_container(&self, id: &str) -> Result<()> {
        self.world.lock().containers.remove(id);
        Ok(())
    }

    async fn list_containers(&self, filter: Option<v1::ContainerFilter>) -> Result<Vec<v1::Container>> {
        let selector = filter.unwrap_or_default().label_selector;
        let world = self.world.lock();
        let all = world.containers.values().filter(|(_, status)| fits(&status.labels, &selector));
        let one = |(sandbox, status): &(String, v1::ContainerStatus)| v1::Container {
            id: status.id.clone(),
            pod_sandbox_id: sandbox.clone(),
            labels: status.labels.clone(),
            state: status.state,
            ..Default::default()
        };
        Ok(all.map(one).collect())
    }

    async fn container_status(&self, id: &str, _: bool) -> Result<v1::ContainerStatusResponse> {
        let found = self.world.lock().containers.get(id).map(|(_, status)| status.clone());
        let status = found.ok_or_else(|| Error::not_found(format!("no container {id}")))?;
        Ok(v1::ContainerStatusResponse { status: Some(status), ..Default::default() })
    }

    async fn update_container_resources(&self, id: &str, wanted: v1::LinuxContainerResources) -> Result<()> {
        let mut world = self.world.lock();
        let (_, status) =
            world.containers.get_mut(id).ok_or_else(|| Error::not_found(format!("no container {id}")))?;
        let note = format!("update {} quota {}", name_of(status), wanted.cpu_quota);
        status.resources = Some(v1::ContainerResources { linux: Some(wanted), windows: None });
        world.log.push(note);
        Ok(())
    }

    async fn reopen_container_log(&self, _: &str) -> Result<()> {
        Ok(())
    }

    async fn exec_sync(&self, id: &str, _: Vec<String>, _: Duration) -> Result<v1::ExecSyncResponse> {
        let mut world = self.world.lock();
        let name = world.containers.get(id).map(|(_, status)| name_of(status).to_owned()).unwrap_or_default();
        let exit_code = world.exec_codes.get(&name).copied().unwrap_or(0);
        world.log.push(format!("exec {name}"));
        Ok(v1::ExecSyncResponse { exit_code, ..Default::default() })
    }

    async fn exec(&self, _: v1::ExecRequest) -> Result<ExecSession> {
        unsupported()
    }

    async fn attach(&self, _: v1::AttachRequest) -> Result<ExecSession> {
        unsupported()
    }

    async fn port_forward(&self, _: &str, _: u16) -> Result<Duplex> {
        unsupported()
    }

    async fn container_stats(&self, _: &str) -> Result<v1::ContainerStats> {
        unsupported()
    }

    async fn list_container_stats(
        &self,
        _: Option<v1::ContainerStatsFilter>,
    ) -> Result<Vec<v1::ContainerStats>> {
        Ok(Vec::new())
    }

    async fn pod_sandbox_stats(&self, _: &str) -> Result<v1::PodSandboxStats> {
        unsupported()
    }

    async fn list_pod_sandbox_stats(
        &self,
        _: Option<v1::PodSandboxStatsFilter>,
    ) -> Result<Vec<v1::PodSandboxStats>> {
        Ok(Vec::new())
    }

    async fn pull_image(&self, image: v1::ImageSpec, _: Option<v1::AuthConfig>) -> Result<String> {
        self.note(format!("pull {}", image.image));
        match self.world.lock().broken_images.contains(&image.image) {
            true => Err(Error::new(Kind::Unavailable, "no such manifest")),
            false => Ok(image.image),
        }
    }

    async fn list_images(&self, _: Option<v1::ImageFilter>) -> Result<Vec<v1::Image>> {
        Ok(Vec::new())
    }

    async fn image_status(&self, image: v1::ImageSpec, _: bool) -> Result<v1::ImageStatusResponse> {
        let there = !self.world.lock().broken_images.contains(&image.image);
        let found = there.then(|| v1::Image { id: image.image, ..Default::default() });
        Ok(v1::ImageStatusResponse { image: found, ..Default::default() })
    }

    async fn remove_image(&self, _: v1::ImageSpec) -> Result<()> {
        Ok(())
    }

    async fn image_fs_info(&self) -> Result<v1::ImageFsInfoResponse> {
        Ok(v1::ImageFsInfoResponse::default())
    }

    fn events(&self) -> BoxStream<'static, Event> {
        let receiver = self.events.subscribe();
        futures::stream::unfold(receiver, async |mut receiver| match receiver.recv().await {
            Ok(event) => Some((event, receiver)),
            Err(broadcast::error::RecvError::Lagged(_)) => Some((Event::Resync, receiver)),
            Err(broadcast::error::RecvError::Closed) => None,
        })
        .boxed()
    }
}
