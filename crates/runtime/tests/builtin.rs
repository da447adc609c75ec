//! Containers of the built-in runtime on a real kernel. Needs root and busybox-static; skips loudly without.

mod common;

use std::time::{Duration, Instant};

use common::{Node, can_run, container, security, wait_for};
use futures::StreamExt;
use knarr_runtime::cri::{Event, v1};
use knarr_runtime::{BuiltinRuntime, Runtime};
use knarr_runtime::{Kind, TerminalSize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::test]
async fn a_container_runs_logs_and_tells_its_exit_code() {
    if !can_run() {
        return;
    }
    let node = Node::start().await;
    let mut events = node.runtime.events();
    let sandbox = node.sandbox("web").await;
    let id = node.run(&sandbox, "main", "echo out; echo err >&2; exit 3").await;
    let status = node.wait_exit(&id).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (3, "Error"));
    assert!(status.started_at > 0 && status.finished_at >= status.started_at);
    let mut lines: Vec<String> = node.log("main").lines().map(str::to_owned).collect();
    lines.sort();
    assert_eq!(lines, ["stderr F err", "stdout F out"]);
    let mut seen = Vec::new();
    while seen.len() < 4 {
        let event = tokio::time::timeout(Duration::from_secs(5), events.next()).await.unwrap().unwrap();
        seen.push(match event {
            Event::SandboxStarted { .. } => "sandbox".to_owned(),
            Event::ContainerCreated { .. } => "created".to_owned(),
            Event::ContainerStarted { .. } => "started".to_owned(),
            Event::ContainerExited { exit, .. } => format!("exited {}", exit.code),
            other => format!("{other:?}"),
        });
    }
    assert_eq!(seen[..2], ["sandbox", "created"]);
    assert!(seen.contains(&"exited 3".to_owned()), "{seen:?}");
    node.runtime.remove_container(&id).await.unwrap();
    node.runtime.remove_container(&id).await.unwrap();
    node.runtime.stop_pod_sandbox(&sandbox).await.unwrap();
    node.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
    node.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
    assert!(node.runtime.pod_sandbox_status(&sandbox, false).await.unwrap_err().is_not_found());
}

#[tokio::test]
async fn commands_run_inside_with_streams_exit_codes_and_timeouts() {
    if !can_run() {
        return;
    }
    let node = Node::start().await;
    let sandbox = node.sandbox("execs").await;
    let id = node.run(&sandbox, "main", "sleep 1000").await;
    assert_eq!(node.sh(&id, "echo hi; hostname; echo $FROM_IMAGE").await, "hi\nexecs\nyes\n");

    let command = |script: &str| ["sh", "-c", script].map(str::to_owned).to_vec();
    let answer = node.runtime.exec_sync(&id, command("echo no >&2; exit 7"), Duration::ZERO).await.unwrap();
    assert_eq!((answer.exit_code, answer.stderr.as_slice()), (7, b"no\n".as_slice()));

    let error = node.runtime.exec_sync(&id, vec!["/nope".into()], Duration::ZERO).await.unwrap_err();
    assert_eq!(error.kind, Kind::CannotRun);
    assert!(error.message.contains("exec: \"/nope\": stat /nope: no such file or directory"), "{error}");

    let begun = Instant::now();
    let error =
        node.runtime.exec_sync(&id, command("sleep 100"), Duration::from_millis(200)).await.unwrap_err();
    assert_eq!(error.kind, Kind::DeadlineExceeded);
    assert!(begun.elapsed() < Duration::from_secs(5));
    wait_for("the timed-out command to die", async || {
        (!node.sh(&id, "ps").await.contains("sleep 100\n")).then_some(())
    })
    .await;

    let request = v1::ExecRequest {
        container_id: id.clone(),
        cmd: vec!["cat".into()],
        stdin: true,
        stdout: true,
        ..Default::default()
    };
    let mut session = node.runtime.exec(request).await.unwrap();
    let mut stdin = session.stdin.take().unwrap();
    stdin.write_all(b"through").await.unwrap();
    stdin.shutdown().await.unwrap();
    let mut text = String::new();
    session.stdout.take().unwrap().read_to_string(&mut text).await.unwrap();
    assert_eq!((text.as_str(), session.exit.await.unwrap()), ("through", 0));
}

#[tokio::test]
async fn a_terminal_has_a_size_and_one_stream() {
    if !can_run() {
        return;
    }
    let node = Node::start().await;
    let sandbox = node.sandbox("tty").await;
    let id = node.run(&sandbox, "main", "sleep 1000").await;
    let request = v1::ExecRequest {
        container_id: id.clone(),
        cmd: vec!["sh".into()],
        tty: true,
        stdin: true,
        stdout: true,
        ..Default::default()
    };
    let mut session = node.runtime.exec(request).await.unwrap();
    assert!(session.stderr.is_none());
    let size = TerminalSize { width: 111, height: 44 };
    session.resize.as_ref().unwrap().send(size).await.unwrap();
    let (mut stdin, mut stdout) = (session.stdin.take().unwrap(), session.stdout.take().unwrap());
    let mut text = String::new();
    // The size is set by a task of its own: ask until it shows.
    while !text.contains("44 111") {
        stdin.write_all(b"stty size\n").await.unwrap();
        let mut bytes = [0u8; 1024];
        let count =
            tokio::time::timeout(Duration::from_secs(5), stdout.read(&mut bytes)).await.unwrap().unwrap();
        text.push_str(&String::from_utf8_lossy(&bytes[..count]));
    }
    stdin.write_all(b"exit 5\n").await.unwrap();
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest).await.unwrap();
    assert_eq!(session.exit.await.unwrap(), 5);
}

#[tokio::test]
async fn attached_clients_see_output_and_type_input() {
    if !can_run() {
        return;
    }
    let node = Node::start().await;
    let sandbox = node.sandbox("attach").await;
    let mut config = container("main", &["sh", "-c", "while read line; do echo got $line; done; echo end"]);
    (config.stdin, config.stdin_once) = (true, true);
    let id = node.run_config(&sandbox, config).await;
    let request =
        v1::AttachRequest { container_id: id.clone(), stdin: true, stdout: true, stderr: true, tty: false };
    let mut session = node.runtime.attach(request).await.unwrap();
    let mut stdin = session.stdin.take().unwrap();
    stdin.write_all(b"one\ntwo\n").await.unwrap();
    stdin.shutdown().await.unwrap();
    drop(stdin);
    let mut text = String::new();
    session.stdout.take().unwrap().read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "got one\ngot two\nend\n");
    assert_eq!(session.exit.await.unwrap(), 0);
    assert_eq!(node.log("main"), "stdout F got one\nstdout F got two\nstdout F end\n");

    let mut config = container("tty", &["sh"]);
    (config.stdin, config.tty) = (true, true);
    let id = node.run_config(&sandbox, config).await;
    let request =
        v1::AttachRequest { container_id: id.clone(), stdin: true, stdout: true, stderr: false, tty: true };
    let mut session = node.runtime.attach(request).await.unwrap();
    session.stdin.as_mut().unwrap().write_all(b"tty; exit 9\n").await.unwrap();
    let mut text = String::new();
    session.stdout.take().unwrap().read_to_string(&mut text).await.unwrap();
    assert!(text.contains("/dev/pts/0") || text.contains("/dev/console"), "{text}");
    assert_eq!(session.exit.await.unwrap(), 9);
}

#[tokio::test]
async fn stopping_asks_first_and_kills_after_the_grace_time() {
    if !can_run() {
        return;
    }
    let node = Node::start().await;
    let sandbox = node.sandbox("stop").await;
    let polite = node
        .run(&sandbox, "polite", "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.05; done")
        .await;
    let deaf = node.run(&sandbox, "deaf", "trap '' TERM; echo up; while :; do sleep 0.05; done").await;
    node.wait_log("polite", "up").await;
    node.wait_log("deaf", "up").await;
    node.runtime.stop_container(&polite, Duration::from_secs(10)).await.unwrap();
    assert_eq!(node.status(&polite).await.exit_code, 0);
    assert!(node.log("polite").contains("bye"));
    let begun = Instant::now();
    node.runtime.stop_container(&deaf, Duration::from_millis(300)).await.unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(300));
    assert_eq!(node.status(&deaf).await.exit_code, 137);
    node.runtime.stop_container(&deaf, Duration::from_millis(300)).await.unwrap();
}

#[tokio::test]
async fn running_out_of_memory_is_told() {
    if !can_run() {
        return;
    }
    let node = Node::start().await;
    let sandbox = node.sandbox("oom").await;
    let mut config = container("main", &["sh", "-c", "head -c 200000000 /dev/zero | tail"]);
    config.linux.as_mut().unwrap().resources = Some(v1::LinuxContainerResources {
        memory_limit_in_bytes: 16 << 20,
        memory_swap_limit_in_bytes: 16 << 20,
        ..Default::default()
    });
    let id = node.run_config(&sandbox, config).await;
    let status = node.wait_exit(&id).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));
}

#[tokio::test]
async fn commands_that_cannot_run_fail_the_start_with_the_reason() {
    if !can_run() {
        return;
    }
    let node = Node::start().await;
    let sandbox = node.sandbox("bad").await;
    for (name, command, want) in [
        ("missing", "nosuch", "exec: \"nosuch\": executable file not found in $PATH"),
        ("denied", "/etc/passwd", "exec: \"/etc/passwd\": permission denied"),
        ("directory", "/etc", "exec: \"/etc\": is a directory"),
    ] {
        let id = node.create(&sandbox, container(name, &[command])).await;
        let error = node.runtime.start_container(&id).await.unwrap_err();
        assert_eq!(error.kind, Kind::CannotRun, "{error}");
        assert!(error.message.contains(want), "{error}");
        let status = node.status(&id).await;
        assert_eq!((status.exit_code, status.reason.as_str()), (128, "StartError"));
        node.runtime.remove_container(&id).await.unwrap();
    }
}

#[tokio::test]
async fn the_security_context_is_applied() {
    if !can_run() {
        return;
    }
    let node = Node::start().await;
    let sandbox = node.sandbox("secure").await;
    let mut config = container("user", &["sleep", "1000"]);
    security(&mut config).run_as_user = Some(v1::Int64Value { value: 101 });
    security(&mut config).supplemental_groups = vec![300];
    security(&mut config).readonly_rootfs = true;
    security(&mut config).no_new_privs = true;
    config.working_dir = "/made/up".into();
    let volume = tempfile::tempdir().unwrap();
    std::fs::write(volume.path().join("file"), "content").unwrap();
    config.mounts = vec![v1::Mount {
        container_path: "/data".into(),
        host_path: volume.path().display().to_string(),
        readonly: true,
        ..Default::default()
    }];
    let id = node.run_config(&sandbox, config).await;
    let out = node
        .sh(&id, "id -u; id -g; id -G; pwd; cat /data/file; touch /data/x 2>&1; touch /x 2>&1; cat /secret 2>&1; true")
        .await;
    assert_eq!(
        out,
        "101\n102\n102 200 300\n/made/up\ncontenttouch: /data/x: Read-only file system\n\
         touch: /x: Read-only file system\ncat: can't open '/secret': Permission denied\n"
    );
    let status = node.sh(&id, "grep -E 'CapEff|NoNewPrivs' /proc/self/status").await;
    assert!(status.contains("CapEff:\t0000000000000000") && status.contains("NoNewPrivs:\t1"), "{status}");
    // Opening /dev/stdout again is what many images' logs do, also as a user.
    node.sh(&id, "echo again > /dev/stdout").await;

    let mut config = container("caps", &["sleep", "1000"]);
    security(&mut config).capabilities = Some(v1::Capability {
        drop_capabilities: vec!["ALL".into()],
        add_capabilities: vec!["NET_BIND_SERVICE".into()],
        ..Default::default()
    });
    let id = node.run_config(&sandbox, config).await;
    let status = node.sh(&id, "grep CapEff /proc/self/status").await;
    assert_eq!(status, "CapEff:\t0000000000000400\n");
    let masked =
        node.sh(&id, "head -c 1 /proc/kcore | wc -c; touch /proc/sys/kernel/x 2>&1; ls /sys/fs/cgroup").await;
    assert!(masked.starts_with("0\n") && masked.contains("memory"), "{masked}");
    let mut config = container("confined", &["sleep", "1000"]);
    security(&mut config).seccomp = Some(v1::SecurityProfile::default());
    security(&mut config).capabilities =
        Some(v1::Capability { add_capabilities: vec!["SYS_TIME".into()], ..Default::default() });
    let id = node.run_config(&sandbox, config).await;
    let status =
        node.sh(&id, "grep Seccomp: /proc/1/status /proc/self/status; sh -c 'echo fork works'").await;
    assert_eq!(status, "/proc/1/status:Seccomp:\t2\n/proc/self/status:Seccomp:\t2\nfork works\n");
    // A node can be made, but what is not on the list cannot be opened: here the kernel's log.
    let denied =
        node.sh(&id, "mknod /tmp/kmsg c 1 11 && head -c 1 /tmp/kmsg 2>&1; head -c 1 /dev/zero | wc -c").await;
    assert_eq!(denied, "head: /tmp/kmsg: Operation not permitted\n1\n");

    let mut config = container("privileged", &["sleep", "1000"]);
    security(&mut config).privileged = true;
    let id = node.run_config(&sandbox, config).await;
    node.sh(&id, "mkdir /tmp/m && mount -t tmpfs none /tmp/m && touch /tmp/m/x && head -c 1 /dev/kmsg").await;
}

#[tokio::test]
async fn limits_can_be_changed_while_running_and_figures_read() {
    if !can_run() {
        return;
    }
    let node = Node::start().await;
    let sandbox = node.sandbox("limits").await;
    let mut config =
        container("main", &["sh", "-c", "head -c 5000000 /dev/zero > /tmp/file; echo done; sleep 1000"]);
    config.linux.as_mut().unwrap().resources = Some(v1::LinuxContainerResources {
        memory_limit_in_bytes: 64 << 20,
        cpu_shares: 512,
        cpu_quota: 50_000,
        cpu_period: 100_000,
        ..Default::default()
    });
    let id = node.run_config(&sandbox, config).await;
    node.wait_log("main", "done").await;
    let stats = node.runtime.container_stats(&id).await.unwrap();
    assert!(stats.cpu.unwrap().usage_core_nano_seconds.unwrap().value > 0);
    let memory = stats.memory.unwrap();
    assert!(memory.working_set_bytes.unwrap().value > 0 && memory.available_bytes.unwrap().value < 64 << 20);
    assert!(stats.writable_layer.unwrap().used_bytes.unwrap().value >= 5_000_000);
    let pod = node.runtime.pod_sandbox_stats(&sandbox).await.unwrap().linux.unwrap();
    assert!(pod.process.unwrap().process_count.unwrap().value >= 1);
    assert_eq!(pod.containers.len(), 1);
    let raised = v1::LinuxContainerResources { memory_limit_in_bytes: 128 << 20, ..Default::default() };
    node.runtime.update_container_resources(&id, raised).await.unwrap();
    let limits = node.status(&id).await.resources.unwrap().linux.unwrap();
    assert_eq!((limits.memory_limit_in_bytes, limits.cpu_shares), (128 << 20, 512));
    let memory = node.runtime.container_stats(&id).await.unwrap().memory.unwrap();
    assert!(memory.available_bytes.unwrap().value > 64 << 20);
}

#[tokio::test]
async fn containers_of_a_pod_share_network_shm_and_if_asked_processes() {
    if !can_run() {
        return;
    }
    let node = Node::start().await;
    let mut pod = node.pod("shared");
    pod.linux.as_mut().unwrap().security_context = Some(v1::LinuxSandboxSecurityContext {
        namespace_options: Some(v1::NamespaceOption {
            pid: v1::NamespaceMode::Pod as i32,
            ..Default::default()
        }),
        ..Default::default()
    });
    pod.linux.as_mut().unwrap().sysctls.insert("net.core.somaxconn".into(), "77".into());
    pod.dns_config = Some(v1::DnsConfig { servers: vec!["10.0.0.10".into()], ..Default::default() });
    let sandbox = node.runtime.run_pod_sandbox(pod, "").await.unwrap();
    let shared = |name: &str, script: &str| {
        let mut config = container(name, &["sh", "-c", script]);
        security(&mut config).namespace_options =
            Some(v1::NamespaceOption { pid: v1::NamespaceMode::Pod as i32, ..Default::default() });
        config
    };
    let one = node
        .run_config(&sandbox, shared("one", "echo shared > /dev/shm/x; exec nc -l -p 8080 -e echo hello"))
        .await;
    let two = node.run_config(&sandbox, shared("two", "sleep 1234")).await;
    wait_for("shared memory", async || {
        (node.sh(&two, "cat /dev/shm/x || true").await == "shared\n").then_some(())
    })
    .await;
    let ps = node.sh(&one, "ps").await;
    assert!(ps.contains("sleep 1234") && ps.contains("pause"), "{ps}");
    assert_eq!(
        node.sh(&two, "cat /proc/sys/net/core/somaxconn /etc/resolv.conf").await,
        "77\nnameserver 10.0.0.10\n"
    );
    let verbose = node.runtime.pod_sandbox_status(&sandbox, true).await.unwrap();
    assert!(knarr_runtime::cri::netns_path(&verbose).unwrap().exists());
    let mut stream = node.runtime.port_forward(&sandbox, 8080).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "hello\n");
    assert!(node.runtime.port_forward(&sandbox, 9).await.is_err());
    node.runtime.set_sandbox_addresses(&sandbox, &["10.1.2.3".parse().unwrap()]).await.unwrap();
    node.runtime.stop_pod_sandbox(&sandbox).await.unwrap();
    let status = node.runtime.pod_sandbox_status(&sandbox, false).await.unwrap().status.unwrap();
    assert_eq!(status.network.unwrap().ip, "10.1.2.3");
    assert_eq!(node.status(&two).await.exit_code, 137);
}

#[tokio::test]
async fn a_new_server_takes_up_what_runs() {
    if !can_run() {
        return;
    }
    let mut node = Node::start().await;
    let sandbox = node.sandbox("stay").await;
    let script = "i=0; while :; do i=$((i+1)); echo line $i; sleep 0.01; done";
    let running = node.run(&sandbox, "main", script).await;
    let mut config = container("tty", &["sh"]);
    (config.stdin, config.tty) = (true, true);
    let terminal = node.run_config(&sandbox, config).await;
    let ending = node.run(&sandbox, "ending", "sleep 0.3; exit 4").await;
    let keeper = node.runtime.keeper_pid();
    let before = node.status(&running).await;
    node.restart().await;
    assert_eq!(node.runtime.keeper_pid(), keeper);
    assert_eq!(node.status(&running).await, before);
    assert_eq!(node.wait_exit(&ending).await.exit_code, 4);
    assert_eq!(node.sh(&running, "echo in").await, "in\n");
    let request =
        v1::AttachRequest { container_id: terminal, stdin: true, stdout: true, tty: true, stderr: false };
    let mut session = node.runtime.attach(request).await.unwrap();
    session.stdin.as_mut().unwrap().write_all(b"exit 6\n").await.unwrap();
    assert_eq!(session.exit.await.unwrap(), 6);
    let lines = node.log("main").lines().count();
    wait_for("the log to grow on", async || (node.log("main").lines().count() > lines + 5).then_some(()))
        .await;
    let numbers: Vec<usize> =
        node.log("main").lines().map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect();
    assert_eq!(numbers, (1..=numbers.len()).collect::<Vec<_>>(), "no line is lost or doubled");
}

#[tokio::test]
async fn a_killed_keeper_is_replaced_and_containers_run_on() {
    if !can_run() {
        return;
    }
    let node = Node::start().await;
    let sandbox = node.sandbox("orphans").await;
    let script = "i=0; while :; do i=$((i+1)); echo line $i; sleep 0.01; done";
    let running = node.run(&sandbox, "main", script).await;
    let mut config = container("tty", &["sh"]);
    (config.stdin, config.tty) = (true, true);
    let terminal = node.run_config(&sandbox, config).await;
    let ending = node.run(&sandbox, "ending", "sleep 1.5; exit 4").await;
    node.wait_log("main", "line 5").await;
    let keeper = node.runtime.keeper_pid();
    // SAFETY: the keeper is this test's own.
    unsafe { libc::kill(keeper, libc::SIGKILL) };
    wait_for("another keeper", async || (node.runtime.keeper_pid() != keeper).then_some(())).await;
    assert_eq!(node.sh(&running, "echo in").await, "in\n");
    let lines = node.log("main").lines().count();
    wait_for("the log to grow on", async || (node.log("main").lines().count() > lines + 5).then_some(()))
        .await;
    let numbers: Vec<usize> =
        node.log("main").lines().map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect();
    assert!(numbers.windows(2).all(|pair| pair[0] < pair[1]), "{numbers:?}");
    let status = node.wait_exit(&ending).await;
    // Learnt from the process's descriptor where the kernel tells it (6.15), else from /proc while it is a zombie.
    assert!(status.exit_code == 4 || status.reason == "ContainerStatusUnknown", "{status:?}");
    assert_eq!(status.exit_code, 4, "kernels before 6.15 may not tell");
    let request =
        v1::AttachRequest { container_id: terminal, stdin: true, stdout: true, tty: true, stderr: false };
    let mut session = node.runtime.attach(request).await.unwrap();
    session.stdin.as_mut().unwrap().write_all(b"exit 6\n").await.unwrap();
    assert_eq!(session.exit.await.unwrap(), 6);
    node.runtime.stop_container(&running, Duration::ZERO).await.unwrap();
    assert_eq!(node.status(&running).await.exit_code, 137);
}

#[tokio::test]
async fn a_renamed_log_is_reopened() {
    if !can_run() {
        return;
    }
    let node = Node::start().await;
    let sandbox = node.sandbox("rotate").await;
    let id = node
        .run(&sandbox, "main", "echo one; while [ ! -e /tmp/go ]; do sleep 0.01; done; echo two; sleep 1000")
        .await;
    node.wait_log("main", "one").await;
    std::fs::rename(node.logs.join("main.log"), node.logs.join("main.log.1")).unwrap();
    node.runtime.reopen_container_log(&id).await.unwrap();
    node.sh(&id, "touch /tmp/go").await;
    node.wait_log("main", "two").await;
    assert_eq!(node.log("main"), "stdout F two\n");
}

/// Not a test by itself: the server that [`a_killed_server_leaves_containers_running`] kills.
#[tokio::test]
#[ignore = "run by another test"]
async fn the_server_to_kill() {
    let Ok(dir) = std::env::var("KNARR_TEST_DIR") else { return };
    let dir = std::path::Path::new(&dir);
    let runtime = BuiltinRuntime::start(common::config(dir)).await.unwrap();
    let pod = v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: "kill".into(),
            uid: "kill".into(),
            ..Default::default()
        }),
        log_directory: dir.join("logs").display().to_string(),
        ..Default::default()
    };
    let sandbox = runtime.run_pod_sandbox(pod, "").await.unwrap();
    let script = "i=0; while :; do i=$((i+1)); echo line $i; sleep 0.01; done";
    let config = container("main", &["sh", "-c", script]);
    let id = runtime.create_container(&sandbox, config, Default::default()).await.unwrap();
    runtime.start_container(&id).await.unwrap();
    std::fs::write(dir.join("started"), id).unwrap();
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn a_killed_server_leaves_containers_running() {
    if !can_run() {
        return;
    }
    let mut node = Node::start().await;
    let dir = node.logs.parent().unwrap().to_owned();
    let mut server = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_server_to_kill", "--ignored"])
        .env("KNARR_TEST_DIR", &dir)
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let id = wait_for("the other server", async || std::fs::read_to_string(dir.join("started")).ok()).await;
    node.wait_log("main", "line 3").await;
    server.kill().unwrap();
    server.wait().unwrap();
    let lines = node.log("main").lines().count();
    wait_for("the log to grow on", async || (node.log("main").lines().count() > lines + 5).then_some(()))
        .await;
    node.restart().await;
    assert_eq!(node.status(&id).await.state, v1::ContainerState::ContainerRunning as i32);
    assert_eq!(node.sh(&id, "echo in").await, "in\n");
    node.runtime.stop_container(&id, Duration::ZERO).await.unwrap();
    assert_eq!(node.status(&id).await.exit_code, 137);
    let numbers: Vec<usize> =
        node.log("main").lines().map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect();
    assert_eq!(numbers, (1..=numbers.len()).collect::<Vec<_>>(), "no line is lost or doubled");
}

#[tokio::test]
async fn mounts_propagate_as_asked() {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    use v1::MountPropagation::{PropagationBidirectional, PropagationHostToContainer, PropagationPrivate};
    if !can_run() {
        return;
    }
    let node = Node::start().await;
    let sandbox = node.sandbox("mounts").await;
    let volume = tempfile::tempdir().unwrap();
    let (host, none) = (volume.path(), None::<&str>);
    mount(Some("tmpfs"), host, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    mount(none, host, none, MsFlags::MS_SHARED, none).unwrap();
    for name in ["before", "later", "inside"] {
        std::fs::create_dir(host.join(name)).unwrap();
    }
    mount(Some("tmpfs"), &host.join("before"), Some("tmpfs"), MsFlags::empty(), none).unwrap();
    std::fs::write(host.join("before/x"), "").unwrap();
    let bind = |path: &str, propagation: v1::MountPropagation| v1::Mount {
        container_path: path.into(),
        host_path: host.display().to_string(),
        propagation: propagation as i32,
        ..Default::default()
    };
    let mut config = container("plain", &["sleep", "1000"]);
    config.mounts = vec![bind("/private", PropagationPrivate), bind("/slave", PropagationHostToContainer)];
    config.mounts.push(v1::Mount {
        host_path: host.join("made/up").display().to_string(),
        ..bind("/new", PropagationPrivate)
    });
    let plain = node.run_config(&sandbox, config).await;
    let mut config = container("both", &["sleep", "1000"]);
    security(&mut config).privileged = true;
    config.mounts = vec![bind("/both", PropagationBidirectional), bind("/private", PropagationPrivate)];
    let both = node.run_config(&sandbox, config).await;

    mount(Some("tmpfs"), &host.join("later"), Some("tmpfs"), MsFlags::empty(), none).unwrap();
    std::fs::write(host.join("later/x"), "").unwrap();
    let out =
        node.sh(&plain, "ls /private/before /private/later /slave/before /slave/later; ls -d /new").await;
    assert_eq!(
        out,
        "/private/before:\nx\n\n/private/later:\n\n/slave/before:\nx\n\n/slave/later:\nx\n/new\n"
    );
    node.sh(&both, "ls /both/later/x && mount -t tmpfs none /both/inside && touch /both/inside/y").await;
    assert!(host.join("inside/y").exists(), "what the container mounts appears on the host");
    node.sh(&both, "mkdir /private/own && mount -t tmpfs none /private/own && touch /private/own/z").await;
    assert!(!host.join("own/z").exists());
    for id in [plain, both] {
        node.runtime.remove_container(&id).await.unwrap();
    }
    for name in ["inside", "later", "before", ""] {
        umount2(&host.join(name), MntFlags::MNT_DETACH).unwrap();
    }
}

/// The same tests once more where cgroup v2 is alone: in a mount namespace with nothing else on /sys/fs/cgroup.
/// Joining by `CLONE_INTO_CGROUP`, the device filter, views, kill and removal are v2's there. Controllers stay
/// with v1 on a hybrid host, so what needs the memory controller is left out.
#[test]
fn all_of_it_works_on_a_unified_hierarchy() {
    const OURS: &str = "KNARR_TEST_UNIFIED";
    if std::env::var_os(OURS).is_some() || !can_run() {
        return;
    }
    let alone = "mount --make-rprivate / && umount -R /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup";
    let works = std::process::Command::new("unshare").args(["-m", "sh", "-c", alone]).status();
    if !works.is_ok_and(|status| status.success()) {
        eprintln!("skipped: cgroup2 cannot be mounted alone here");
        return;
    }
    let program = std::env::current_exe().unwrap();
    let skipped = ["limits_can_be_changed", "running_out_of_memory"].map(|name| format!("--skip {name}"));
    let script = format!("{alone} && {} {}", program.display(), skipped.join(" "));
    let output = std::process::Command::new("unshare")
        .args(["-m", "sh", "-c", &script])
        .env(OURS, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("a_container_runs_logs_and_tells_its_exit_code ... ok"), "{text}");
}
