//! The CRI client against Debian's containerd, started here with directories and a socket of its own. Needs root,
//! `containerd`, `runc` and busybox-static; skips loudly without.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{can_run, container, wait_for};
use futures::StreamExt;
use knarr_runtime::cgroup::Cgroups;
use knarr_runtime::cri::{Event, v1};
use knarr_runtime::image::build;
use knarr_runtime::{RemoteRuntime, Runtime, TerminalSize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const GROUP: &str = "/knarr-test-containerd";

struct Containerd {
    child: Child,
    dir: tempfile::TempDir,
}

impl Containerd {
    fn start() -> Option<Self> {
        let found = |program: &str| {
            let dirs = ["/usr/bin", "/usr/sbin", "/usr/local/bin"];
            dirs.iter().any(|dir| Path::new(dir).join(program).exists())
        };
        if !["containerd", "ctr", "runc"].iter().all(|program| found(program)) {
            eprintln!("skipped: containerd or runc is missing");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        let config = format!(
            r#"version = 2
root = "{root}"
state = "{state}"
[grpc]
  address = "{socket}"
[ttrpc]
  address = "{socket}.ttrpc"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "knarr.test/pause:1"
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{cni}"
    conf_dir = "{cni}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{opt}"
"#,
            root = at("root"),
            state = at("state"),
            socket = at("sock"),
            cni = at("cni"),
            opt = at("opt"),
        );
        std::fs::write(dir.path().join("config.toml"), config).unwrap();
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let child = Command::new("containerd")
            .arg("--config")
            .arg(dir.path().join("config.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        Some(Self { child, dir })
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("sock")
    }

    fn import(&self, image: &build::Image) {
        let archive = self.dir.path().join("image.tar");
        build::write(image, &archive, true).unwrap();
        let status = Command::new("ctr")
            .arg("--address")
            .arg(self.socket())
            .args(["--namespace", "k8s.io", "images", "import"])
            .arg(&archive)
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(status.success(), "containerd takes our archives");
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points: Vec<&str> = mounts.lines().filter_map(|line| line.split(' ').nth(4)).collect();
        for point in points.iter().rev().filter(|point| Path::new(point).starts_with(self.dir.path())) {
            let _ = nix::mount::umount2(*point, nix::mount::MntFlags::MNT_DETACH);
        }
        let cgroups = Cgroups::detect().unwrap();
        cgroups.kill(GROUP);
        let _ = cgroups.remove(GROUP);
        // runc makes groups in every hierarchy, also in those that we leave alone.
        for hierarchy in std::fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
            let group = hierarchy.path().join(GROUP.trim_start_matches('/'));
            let _ = std::fs::remove_dir(group.join("pod"));
            let _ = std::fs::remove_dir(group);
        }
    }
}

#[tokio::test]
async fn containerd_is_driven_over_its_socket() {
    if !can_run() {
        return;
    }
    let Some(containerd) = Containerd::start() else { return };
    let endpoint = format!("unix://{}", containerd.socket().display());
    let runtime =
        wait_for("containerd to answer", async || RemoteRuntime::connect(&endpoint).await.ok()).await;
    let mut pause = common::busybox();
    pause.names = vec!["knarr.test/pause:1".into()];
    pause.cmd = vec!["/bin/busybox".into(), "sleep".into(), "100000".into()];
    containerd.import(&pause);
    containerd.import(&common::busybox());
    assert!(runtime.attaches_network());
    wait_for("the image to be listed", async || {
        let spec = v1::ImageSpec { image: "busybox:test".into(), ..Default::default() };
        runtime.image_status(spec, false).await.unwrap().image
    })
    .await;

    let logs = containerd.dir.path().join("logs");
    std::fs::create_dir_all(&logs).unwrap();
    let options = || v1::NamespaceOption {
        network: v1::NamespaceMode::Node as i32,
        pid: v1::NamespaceMode::Container as i32,
        ..Default::default()
    };
    let pod = v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: "remote".into(),
            uid: "uid-remote".into(),
            namespace: "default".into(),
            attempt: 0,
        }),
        log_directory: logs.display().to_string(),
        linux: Some(v1::LinuxPodSandboxConfig {
            cgroup_parent: format!("{GROUP}/pod"),
            security_context: Some(v1::LinuxSandboxSecurityContext {
                namespace_options: Some(options()),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let mut events = runtime.events();
    let sandbox = runtime.run_pod_sandbox(pod.clone(), "").await.unwrap();
    let mut config = container("main", &["sh", "-c", "echo started; sleep 1000"]);
    common::security(&mut config).namespace_options = Some(options());
    let id = runtime.create_container(&sandbox, config, pod.clone()).await.unwrap();
    runtime.start_container(&id).await.unwrap();
    wait_for("the log", async || {
        std::fs::read_to_string(logs.join("main.log")).ok()?.contains("stdout F started").then_some(())
    })
    .await;

    let command = |script: &str| ["sh", "-c", script].map(str::to_owned).to_vec();
    let answer = runtime.exec_sync(&id, command("echo hi; exit 3"), Duration::from_secs(10)).await.unwrap();
    assert_eq!((answer.exit_code, answer.stdout.as_slice()), (3, b"hi\n".as_slice()));

    let request = |tty: bool, cmd: Vec<String>| v1::ExecRequest {
        container_id: id.clone(),
        cmd,
        tty,
        stdin: true,
        stdout: true,
        stderr: !tty,
    };
    let script = "read line; echo out $line; echo err >&2; exit 7";
    let mut session = runtime.exec(request(false, command(script))).await.unwrap();
    session.stdin.as_mut().unwrap().write_all(b"typed\n").await.unwrap();
    let (mut out, mut err) = (String::new(), String::new());
    session.stdout.take().unwrap().read_to_string(&mut out).await.unwrap();
    session.stderr.take().unwrap().read_to_string(&mut err).await.unwrap();
    assert_eq!((out.as_str(), err.as_str()), ("out typed\n", "err\n"));
    assert_eq!(session.exit.await.unwrap(), 7);

    let mut session = runtime.exec(request(true, vec!["sh".into()])).await.unwrap();
    session.resize.as_ref().unwrap().send(TerminalSize { width: 99, height: 33 }).await.unwrap();
    let (mut stdin, mut stdout) = (session.stdin.take().unwrap(), session.stdout.take().unwrap());
    let mut text = String::new();
    while !text.contains("33 99") {
        stdin.write_all(b"stty size\n").await.unwrap();
        let mut bytes = [0u8; 1024];
        let read = tokio::time::timeout(Duration::from_secs(10), stdout.read(&mut bytes)).await.unwrap();
        text.push_str(&String::from_utf8_lossy(&bytes[..read.unwrap()]));
    }
    stdin.write_all(b"exit 0\n").await.unwrap();
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest).await.unwrap();
    assert_eq!(session.exit.await.unwrap(), 0);

    runtime.stop_container(&id, Duration::from_secs(1)).await.unwrap();
    let exited = async {
        while let Some(event) = events.next().await {
            if let Event::ContainerExited { container_id, exit, .. } = event
                && container_id == id
            {
                return exit.code;
            }
        }
        panic!("events ended");
    };
    assert_eq!(tokio::time::timeout(Duration::from_secs(10), exited).await.unwrap(), 137);
    runtime.remove_container(&id).await.unwrap();
    runtime.stop_pod_sandbox(&sandbox).await.unwrap();
    runtime.remove_pod_sandbox(&sandbox).await.unwrap();
    assert!(runtime.list_containers(None).await.unwrap().is_empty());
    assert!(runtime.pod_sandbox_status(&sandbox, false).await.unwrap_err().is_not_found());
}
