//! Containers of the built-in runtime on a real kernel. Needs root and busybox-static; skips loudly without.

mod common;

use std::time::{Duration, Instant};

use common::{Node, can_run, container, security, wait_for};
use futures::StreamExt;
use knarr_runtime::Runtime;
use knarr_runtime::cri::{Event, v1};
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
