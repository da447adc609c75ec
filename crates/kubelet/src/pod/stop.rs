//! Stopping: preStop hooks, the grace period, and taking a pod down to nothing.

use super::PodContext;
use super::observe::{Observed, Seen};
use super::plan::{Kill, is_sidecar};
use crate::build;
use crate::handler::{self, Target};
use crate::names;
use crate::resources::{self, Qos};
use crate::volumes;
use k8s_openapi::api::core::v1::Pod;
use knarr_client::EventType;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// A container has at least this long to end, however long its hook took.
const GRACE_MIN: Duration = Duration::from_secs(2);

/// Stops one container: hook, signal, kill. Returns when it has ended, or cannot be stopped now.
pub(super) async fn kill(context: &PodContext, pod: &Pod, kill: &Kill, grace_s: i64) {
    let grace_s = kill.grace_s.unwrap_or(grace_s).max(0);
    let mut grace = Duration::from_secs(grace_s as u64);
    let message = match kill.message.as_str() {
        "" => format!("Stopping container {}", kill.name),
        message => message.to_owned(),
    };
    context.container_event(pod, &kill.name, EventType::Normal, "Killing", message);
    if grace_s > 0 {
        let began_at = Instant::now();
        pre_stop(context, pod, kill, grace).await;
        grace = grace.saturating_sub(began_at.elapsed()).max(GRACE_MIN);
    }
    if let Err(error) = context.node.runtime.stop_container(&kill.id, grace).await {
        tracing::warn!(pod = %context.key, container = kill.name, %error, "container not stopped, trying again");
        context.state.lock().retry_at = Some(Instant::now() + GRACE_MIN);
    }
}

async fn pre_stop(context: &PodContext, pod: &Pod, kill: &Kill, grace: Duration) {
    let Some(container) = build::find_container(pod, &kill.name) else { return };
    let Some(hook) = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.pre_stop.clone()) else {
        return;
    };
    let ips = pod.status.as_ref().and_then(|status| status.pod_ip.clone()).unwrap_or_default();
    let target = Target {
        runtime: &*context.node.runtime,
        pod,
        container: &container,
        container_id: &kill.id,
        pod_ip: &ips,
    };
    let outcome = tokio::time::timeout(grace, handler::hook(&target, &hook)).await;
    if let Ok(Err(message)) = outcome {
        tracing::debug!(pod = %context.key, container = kill.name, message, "preStop hook failed");
        let message = "PreStopHook failed".to_owned();
        context.container_event(pod, &kill.name, EventType::Warning, "FailedPreStopHook", message);
    }
}

/// Stops every running container: the main ones together, then sidecars, the last one first.
pub(super) async fn kill_all(context: Arc<PodContext>, pod: Arc<Pod>, observed: Observed, grace_s: i64) {
    let began_at = Instant::now();
    let sidecars: Vec<&str> = pod
        .spec
        .iter()
        .flat_map(|spec| spec.init_containers.iter().flatten())
        .filter(|container| is_sidecar(container))
        .map(|container| container.name.as_str())
        .collect();
    let as_kill = |seen: &Seen| Kill {
        id: seen.status.id.clone(),
        name: seen.name().to_owned(),
        message: String::new(),
        grace_s: None,
    };
    let (side, main): (Vec<&Seen>, Vec<&Seen>) =
        observed.running().partition(|seen| sidecars.contains(&seen.name()));
    let kills: Vec<Kill> = main.into_iter().map(as_kill).collect();
    futures::future::join_all(kills.iter().map(|one| kill(&context, &pod, one, grace_s))).await;
    for name in sidecars.iter().rev() {
        let spent = i64::try_from(began_at.elapsed().as_secs()).unwrap_or(i64::MAX);
        let left = if grace_s > 0 { (grace_s - spent).max(1) } else { 0 };
        for seen in side.iter().filter(|seen| seen.name() == *name) {
            kill(&context, &pod, &as_kill(seen), left).await;
        }
    }
}

/// Takes the network and the sandboxes down; containers and their logs stay to be looked at.
pub(super) async fn release(context: &PodContext, observed: &Observed) -> Result<(), String> {
    let node = &context.node;
    if let Some(network) = node.network.as_ref().filter(|_| !node.runtime.attaches_network()) {
        network.detach(&context.uid).await.map_err(|error| format!("detach the pod's network: {error}"))?;
        context.state.lock().attached = None;
    }
    for sandbox in &observed.sandboxes {
        node.runtime.stop_pod_sandbox(&sandbox.id).await.map_err(|error| format!("stop sandbox: {error}"))?;
    }
    Ok(())
}

/// Takes the volumes down.
pub(super) fn unmount(context: &PodContext) -> Result<(), String> {
    context.state.lock().volumes = None;
    volumes::tear_down(&context.node.config, &context.uid)
}

/// Removes everything the pod left: containers, sandboxes, group, logs.
pub(super) async fn remove(
    context: &PodContext,
    pod: Option<&Pod>,
    observed: &Observed,
) -> Result<(), String> {
    let node = &context.node;
    for sandbox in &observed.sandboxes {
        node.runtime
            .remove_pod_sandbox(&sandbox.id)
            .await
            .map_err(|error| format!("remove sandbox: {error}"))?;
    }
    if let (Some(cgroups), false) = (&node.cgroups, node.systemd_cgroups) {
        let classes = match pod {
            Some(pod) => vec![Qos::of(pod)],
            None => vec![Qos::Guaranteed, Qos::Burstable, Qos::BestEffort],
        };
        for qos in classes {
            let path = resources::cgroup_parent(&node.config.cgroup_root, qos, &context.uid, false);
            if cgroups.exists(&path) {
                cgroups.remove(&path).map_err(|error| error.to_string())?;
            }
        }
    }
    for seen in &observed.containers {
        let link = node.config.container_log_link(
            &context.key.namespace,
            &context.key.name,
            seen.name(),
            &seen.status.id,
        );
        if let Some(link) = link {
            let _ = std::fs::remove_file(link);
        }
    }
    let logs = node.config.pod_log_dir(&context.key.namespace, &context.key.name, &context.uid);
    match std::fs::remove_dir_all(&logs) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::debug!(dir = %logs.display(), %error, "logs of a removed pod stay");
        }
        _ => {}
    }
    node.images.forget(&context.uid);
    node.tokens.forget(&context.uid);
    Ok(())
}

/// Which grace period a pod is stopped with, in seconds.
pub(super) fn grace(pod: &Pod) -> i64 {
    let spec = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds);
    match pod.metadata.deletion_timestamp {
        Some(_) => pod.metadata.deletion_grace_period_seconds.or(spec).unwrap_or(30),
        None => spec.unwrap_or(30),
    }
    .max(1)
}

/// Name and namespace of a pod the API does not know, from its sandbox.
pub(super) fn identity(observed: &Observed) -> Option<(String, String)> {
    let labels = observed.sandboxes.first().map(|sandbox| &sandbox.labels);
    let labels = labels.or_else(|| observed.containers.first().map(|seen| &seen.status.labels))?;
    Some((labels.get(names::POD_NAMESPACE)?.clone(), labels.get(names::POD_NAME)?.clone()))
}
