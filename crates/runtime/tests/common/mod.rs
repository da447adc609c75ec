//! A runtime with directories and a control group of its own, and shorthand for pods in it. Everything is purged
//! at the end, and must then be gone.
#![allow(dead_code)] // each test file uses its part

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use knarr_runtime::builtin::{BuiltinRuntime, Config, purge};
use knarr_runtime::cri::v1;
use knarr_runtime::image::build::{self, Entry};
use knarr_runtime::{Runtime, keeper};

pub const IMAGE: &str = "docker.io/library/busybox:test";
/// From the Debian package `busybox-static`.
const BUSYBOX: &str = "/bin/busybox";
const APPLETS: [&str; 25] = [
    "sh", "true", "false", "echo", "cat", "sleep", "id", "ls", "stat", "head", "tail", "dd", "hostname",
    "env", "mkdir", "touch", "grep", "ps", "kill", "nc", "tty", "stty", "mount", "wc", "mknod",
];

/// Whether containers can be run here; says why not.
pub fn can_run() -> bool {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: running containers needs root");
        return false;
    }
    if !Path::new(BUSYBOX).exists() {
        eprintln!("skipped: {BUSYBOX} is missing; install busybox-static");
        return false;
    }
    true
}

pub struct Node {
    pub runtime: BuiltinRuntime,
    pub config: Config,
    pub logs: PathBuf,
    _dir: tempfile::TempDir,
}

pub fn config(dir: &Path) -> Config {
    let name = dir.file_name().unwrap().to_str().unwrap().trim_start_matches('.').to_owned();
    let mut config = Config::new(dir.join("data"), dir.join("run"));
    config.keeper_command = vec![env!("CARGO_BIN_EXE_runtime-keeper").into(), keeper::ARGUMENT.into()];
    config.cgroup_root = format!("/knarr-test-{name}");
    config
}

impl Node {
    pub async fn start() -> Self {
        let _ = tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_test_writer()
            .try_init();
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        let runtime = BuiltinRuntime::start(config.clone()).await.unwrap();
        let archive = dir.path().join("busybox.tar");
        build::write(&busybox(), &archive, true).unwrap();
        let imported = runtime.import_image(&archive, None, false).await.unwrap();
        assert_eq!(imported[0].tags, [IMAGE]);
        let logs = dir.path().join("logs");
        std::fs::create_dir_all(&logs).unwrap();
        Self { runtime, config, logs, _dir: dir }
    }

    /// Drops the runtime and starts another on the same directories, as a restart of the server does.
    pub async fn restart(&mut self) {
        self.runtime = BuiltinRuntime::start(self.config.clone()).await.unwrap();
    }

    pub fn pod(&self, name: &str) -> v1::PodSandboxConfig {
        v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: name.into(),
                uid: format!("uid-{name}"),
                namespace: "default".into(),
                attempt: 0,
            }),
            hostname: name.into(),
            log_directory: self.logs.display().to_string(),
            linux: Some(v1::LinuxPodSandboxConfig {
                cgroup_parent: format!("{}/pods/{name}", self.config.cgroup_root),
                security_context: Some(v1::LinuxSandboxSecurityContext {
                    namespace_options: Some(v1::NamespaceOption {
                        pid: v1::NamespaceMode::Container as i32,
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    pub async fn sandbox(&self, name: &str) -> String {
        self.runtime.run_pod_sandbox(self.pod(name), "").await.unwrap()
    }

    pub async fn create(&self, sandbox: &str, config: v1::ContainerConfig) -> String {
        self.runtime.create_container(sandbox, config, v1::PodSandboxConfig::default()).await.unwrap()
    }

    /// Creates and starts `sh -c script`.
    pub async fn run(&self, sandbox: &str, name: &str, script: &str) -> String {
        self.run_config(sandbox, container(name, &["sh", "-c", script])).await
    }

    pub async fn run_config(&self, sandbox: &str, config: v1::ContainerConfig) -> String {
        let id = self.create(sandbox, config).await;
        self.runtime.start_container(&id).await.unwrap();
        id
    }

    pub async fn status(&self, id: &str) -> v1::ContainerStatus {
        self.runtime.container_status(id, false).await.unwrap().status.unwrap()
    }

    pub async fn wait_exit(&self, id: &str) -> v1::ContainerStatus {
        wait_for("the container to exit", async || {
            let status = self.status(id).await;
            (status.state == v1::ContainerState::ContainerExited as i32).then_some(status)
        })
        .await
    }

    /// The log without times: `stdout F line`.
    pub fn log(&self, name: &str) -> String {
        let text = std::fs::read_to_string(self.logs.join(format!("{name}.log"))).unwrap_or_default();
        text.lines()
            .map(|line| line.split_once(' ').map_or(line, |(_, rest)| rest).to_owned() + "\n")
            .collect()
    }

    pub async fn wait_log(&self, name: &str, text: &str) {
        wait_for(&format!("{text:?} in the log of {name}"), async || {
            self.log(name).contains(text).then_some(())
        })
        .await
    }

    /// Runs a shell script in a container and returns what it writes.
    pub async fn sh(&self, id: &str, script: &str) -> String {
        let command = ["sh", "-c", script].map(str::to_owned).to_vec();
        let answer = self.runtime.exec_sync(id, command, Duration::from_secs(20)).await.unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert_eq!(answer.exit_code, 0, "{script}: {}{}", text(&answer.stdout), text(&answer.stderr));
        text(&answer.stdout)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let purged = purge::purge(&self.config);
        let checks = purge::verify_clean(&self.config);
        if !std::thread::panicking() {
            purged.unwrap();
            for check in checks.unwrap() {
                assert!(check.leftovers.is_empty(), "{}: {:?}", check.what, check.leftovers);
            }
        }
    }
}

pub fn busybox() -> build::Image {
    let mut files = vec![
        Entry::file("/bin/busybox", BUSYBOX, 0o755),
        Entry::directory("/tmp", 0o1777),
        Entry::bytes(
            "/etc/passwd",
            "root:x:0:0:root:/root:/bin/sh\nweb:x:101:102:web:/home/web:/bin/sh\n",
            0o644,
        ),
        Entry::bytes("/etc/group", "root:x:0:\nweb:x:102:\nlogs:x:200:web\n", 0o644),
        Entry::bytes("/secret", "root only\n", 0o600),
    ];
    files.extend(APPLETS.iter().map(|applet| Entry::symlink(&format!("/bin/{applet}"), "busybox")));
    build::Image {
        names: vec!["busybox:test".into()],
        files,
        cmd: vec!["sh".into()],
        env: vec!["FROM_IMAGE=yes".into()],
        ..Default::default()
    }
}

pub fn container(name: &str, command: &[&str]) -> v1::ContainerConfig {
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: name.into(), attempt: 0 }),
        image: Some(v1::ImageSpec { image: IMAGE.into(), ..Default::default() }),
        command: command.iter().map(|part| (*part).to_owned()).collect(),
        log_path: format!("{name}.log"),
        linux: Some(v1::LinuxContainerConfig {
            security_context: Some(v1::LinuxContainerSecurityContext {
                namespace_options: Some(v1::NamespaceOption {
                    pid: v1::NamespaceMode::Container as i32,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

pub fn security(config: &mut v1::ContainerConfig) -> &mut v1::LinuxContainerSecurityContext {
    config.linux.get_or_insert_default().security_context.get_or_insert_default()
}

/// Asks until there is an answer; panics with what was awaited after 20 seconds.
pub async fn wait_for<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited 20 s for {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
