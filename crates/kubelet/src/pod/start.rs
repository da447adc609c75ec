//! Starting: volumes, the sandbox and its network, then containers in order. Runs as a task beside the worker, which
//! aborts it when the pod is to stop; everything here may be done again.

use super::observe::Observed;
use super::plan::{Plan, Start};
use super::{PodContext, Waiting};
use crate::build::{self, ContainerInput};
use crate::handler::{self, Target};
use crate::names;
use crate::references::PodReferences;
use crate::resources::{self, Qos};
use crate::volumes::{self, Ready};
use crate::{dns, env};
use k8s_openapi::api::core::v1::{Container, ImageVolumeSource, Pod};
use knarr_client::EventType;
use knarr_network::pod::PodRef;
use knarr_runtime::cri::{netns_path, v1};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// First wait after something failed that has no back-off of its own; doubles.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(10);

/// Carries out a plan. Failures are told by events and waiting reasons, and tried again later.
pub(super) async fn run(context: Arc<PodContext>, pod: Arc<Pod>, observed: Observed, plan: Plan) {
    let result = prepare(&context, &pod, &observed, &plan).await;
    let ready = match result {
        Ok(ready) => ready,
        Err((reason, message)) => {
            context.event(&pod, EventType::Warning, reason, message);
            return retry(&context);
        }
    };
    {
        let mut state = context.state.lock();
        (state.failures, state.retry_at) = (0, None);
    }
    for item in &plan.start {
        let Some(container) = build::find_container(&pod, &item.name) else { continue };
        let result = start(&context, &pod, &container, item, &ready).await;
        let at = result.err().map(|after| Instant::now() + after);
        let mut state = context.state.lock();
        match at {
            Some(at) => _ = state.not_before.insert(item.name.clone(), at),
            None => _ = state.not_before.remove(&item.name),
        }
        drop(state);
        context.wake.notify_one();
    }
}

fn retry(context: &PodContext) {
    let mut state = context.state.lock();
    let delay = (RETRY_FIRST * 2u32.saturating_pow(state.failures.min(16))).min(RETRY_MAX);
    state.failures += 1;
    state.retry_at = Some(Instant::now() + delay);
    drop(state);
    context.wake.notify_one();
}

/// What containers are put into.
struct ReadyPod {
    sandbox: v1::PodSandboxStatus,
    config: v1::PodSandboxConfig,
    references: Arc<PodReferences>,
    volumes: BTreeMap<String, Ready>,
    host: crate::fields::Host,
    hosts_file: Option<PathBuf>,
}

type Failed = (&'static str, String);

async fn prepare(
    context: &PodContext,
    pod: &Pod,
    observed: &Observed,
    plan: &Plan,
) -> Result<ReadyPod, Failed> {
    let node = &context.node;
    make_dirs(context, pod).map_err(|error| ("FailedCreatePodContainer", error))?;
    let references = references(context, pod);
    references.wait().await;
    let host = node.host(observed.pod_ips());
    let volumes =
        set_up_volumes(context, pod, &references, &host).await.map_err(|error| ("FailedMount", error))?;
    let qos = Qos::of(pod);
    let parent = resources::cgroup_parent(&node.config.cgroup_root, qos, &context.uid, node.systemd_cgroups);
    let attempt = plan.sandbox.or_else(|| {
        observed.sandboxes.first().and_then(|sandbox| sandbox.metadata.as_ref()).map(|meta| meta.attempt)
    });
    let text = std::fs::read_to_string(&node.config.resolv_conf).unwrap_or_default();
    let resolver = dns::resolver(pod, &node.config, &text);
    let config = build::sandbox(pod, &node.config, attempt.unwrap_or(0), resolver, parent.clone());
    let failed = |error: String| ("FailedCreatePodSandBox", format!("Failed to create pod sandbox: {error}"));
    let id = match (plan.sandbox, observed.live_sandbox()) {
        (None, Some(live)) => live.id.clone(),
        _ => {
            limit_pod(context, pod, &parent).map_err(failed)?;
            forget_network(context).await.map_err(failed)?;
            create_sandbox(context, pod, config.clone()).await.map_err(failed)?
        }
    };
    attach(context, pod, &id).await.map_err(failed)?;
    let status = node.runtime.pod_sandbox_status(&id, false).await;
    let sandbox = status.map_err(|error| failed(error.to_string()))?.status.unwrap_or_default();
    let now = Observed { sandboxes: vec![sandbox.clone()], containers: Vec::new() };
    let host = node.host(if host_network(pod) { node.config.host_ips() } else { now.pod_ips() });
    let hosts_file = hosts_file(context, pod, &host.pod_ips).map_err(|error| ("FailedMount", error))?;
    // The addresses are told as soon as they are known.
    context.wake.notify_one();
    Ok(ReadyPod { sandbox, config, references, volumes, host, hosts_file })
}

fn host_network(pod: &Pod) -> bool {
    pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or(false)
}

fn make_dirs(context: &PodContext, pod: &Pod) -> Result<(), String> {
    let config = &context.node.config;
    let logs = config.pod_log_dir(names::namespace(pod), names::name(pod), &context.uid);
    for dir in [config.pod_dir(&context.uid), logs] {
        std::fs::create_dir_all(&dir)
            .map_err(|error| format!("make directory {}: {error}", dir.display()))?;
    }
    Ok(())
}

/// The objects the pod refers to, watched from now on.
pub(super) fn references(context: &PodContext, pod: &Pod) -> Arc<PodReferences> {
    let known = context.state.lock().references.clone();
    // Ephemeral containers may bring new references.
    let grows = pod.spec.as_ref().is_some_and(|spec| spec.ephemeral_containers.is_some());
    match known {
        Some(known) if !grows => known,
        _ => {
            let references = Arc::new(context.node.references.of_pod(pod, &context.references_changed));
            context.state.lock().references = Some(references.clone());
            references
        }
    }
}

/// Makes the volumes, or brings them up to date.
pub(super) async fn set_up_volumes(
    context: &PodContext,
    pod: &Pod,
    references: &PodReferences,
    host: &crate::fields::Host,
) -> Result<BTreeMap<String, Ready>, String> {
    let node = &context.node;
    let inputs =
        volumes::Context { pod, config: &node.config, lookup: references, tokens: &node.tokens, host };
    let volumes = volumes::set_up(&inputs).await?;
    let refresh = volumes.values().filter_map(|volume| volume.refresh).min();
    let mut state = context.state.lock();
    state.volumes = Some(volumes.clone());
    state.volumes_due = refresh.map(|after| Instant::now() + after);
    Ok(volumes)
}

/// The pod's own group, around all its containers'.
fn limit_pod(context: &PodContext, pod: &Pod, parent: &str) -> Result<(), String> {
    let (Some(cgroups), Some(spec)) = (&context.node.cgroups, &pod.spec) else { return Ok(()) };
    if context.node.systemd_cgroups {
        return Ok(());
    }
    cgroups.create(parent, &resources::pod_resources(spec)).map_err(|error| error.to_string())
}

async fn create_sandbox(
    context: &PodContext,
    pod: &Pod,
    config: v1::PodSandboxConfig,
) -> Result<String, String> {
    let handler = match pod.spec.as_ref().and_then(|spec| spec.runtime_class_name.as_deref()) {
        Some(class) if !class.is_empty() => runtime_handler(context, class).await?,
        _ => String::new(),
    };
    context.node.runtime.run_pod_sandbox(config, &handler).await.map_err(|error| error.to_string())
}

async fn runtime_handler(context: &PodContext, class: &str) -> Result<String, String> {
    use k8s_openapi::api::node::v1::RuntimeClass;
    let api = kube::Api::<RuntimeClass>::all(context.node.client.clone());
    let found =
        api.get(class).await.map_err(|error| format!("failed to get RuntimeClass {class:?}: {error}"))?;
    Ok(found.handler)
}

/// A new sandbox has a new network namespace: what led to an old one goes first.
async fn forget_network(context: &PodContext) -> Result<(), String> {
    let node = &context.node;
    let Some(network) = node.network.as_ref().filter(|_| !node.runtime.attaches_network()) else {
        return Ok(());
    };
    context.state.lock().attached = None;
    network
        .detach(&context.uid)
        .await
        .map_err(|error| format!("detach the former sandbox's network: {error}"))
}

/// Gives the sandbox its network, once in a worker's life: after a restart it repairs what is missing.
async fn attach(context: &PodContext, pod: &Pod, sandbox_id: &str) -> Result<(), String> {
    let node = &context.node;
    let Some(network) =
        node.network.as_ref().filter(|_| !node.runtime.attaches_network() && !host_network(pod))
    else {
        return Ok(());
    };
    if context.state.lock().attached.as_deref() == Some(sandbox_id) {
        return Ok(());
    }
    let status =
        node.runtime.pod_sandbox_status(sandbox_id, true).await.map_err(|error| error.to_string())?;
    let netns = netns_path(&status).ok_or("the runtime told no network namespace of the sandbox")?;
    let ports = build::host_ports(&pod.spec.clone().unwrap_or_default())?;
    let who = PodRef::new(names::namespace(pod), names::name(pod), &context.uid);
    let addresses = network.attach(&who, &netns, &ports).await;
    let addresses =
        addresses.map_err(|error| format!("failed to set up the network of the sandbox: {error}"))?;
    node.runtime
        .set_sandbox_addresses(sandbox_id, &addresses.ips)
        .await
        .map_err(|error| error.to_string())?;
    context.state.lock().attached = Some(sandbox_id.to_owned());
    Ok(())
}

/// `/etc/hosts` of the pod, which all its containers share.
fn hosts_file(context: &PodContext, pod: &Pod, pod_ips: &[String]) -> Result<Option<PathBuf>, String> {
    let path = context.node.config.pod_dir(&context.uid).join("etc-hosts");
    let text = if host_network(pod) {
        dns::node_hosts_file(pod, &std::fs::read_to_string("/etc/hosts").unwrap_or_default())
    } else {
        dns::hosts_file(pod, &context.node.config, pod_ips)
    };
    // Written in place: containers have this very file mounted.
    if std::fs::read_to_string(&path).ok().as_deref() != Some(&text) {
        std::fs::write(&path, text).map_err(|error| format!("write {}: {error}", path.display()))?;
    }
    Ok(Some(path))
}

/// Starts one container. The error says after which time to try again.
async fn start(
    context: &Arc<PodContext>,
    pod: &Arc<Pod>,
    container: &Container,
    item: &Start,
    ready: &ReadyPod,
) -> Result<(), Duration> {
    let name = &container.name;
    let about = super::container_reference(pod, name);
    if let Some(failed_at) = item.failed_at {
        context.state.lock().restarts.entry(name.clone()).or_default().next(failed_at, Instant::now());
    }
    let images = async {
        let images = &context.node.images;
        // Volumes first: the container's image is the one to go on with.
        for volume in image_volumes(container, ready) {
            images.ensure(pod, &volume, &about, &*ready.references).await?;
        }
        images.ensure(pod, container, &about, &*ready.references).await
    };
    let image = match images.await {
        Ok(image) => image,
        Err(failure) => {
            let message = format!("Error: {}", failure.reason);
            context.container_event(pod, name, EventType::Warning, "Failed", message);
            wait(context, name, failure.reason, &failure.message);
            return Err(failure.retry.unwrap_or(RETRY_MAX));
        }
    };
    let (config, message_file) = match configure(context, pod, container, item, ready, &image).await {
        Ok(configured) => configured,
        Err(message) => return Err(refuse(context, pod, name, "CreateContainerConfigError", message)),
    };
    let runtime = &context.node.runtime;
    // A container of this attempt that never started is in the way.
    remove_unstarted(context, name).await;
    if let Some(file) = &message_file {
        make_message_file(file).map_err(|error| refuse(context, pod, name, "CreateContainerError", error))?;
    }
    let log_path = config.log_path.clone();
    // Runtimes expect the directory of a container's log to be there.
    if let Some(dir) = PathBuf::from(&ready.config.log_directory).join(&log_path).parent() {
        let made = std::fs::create_dir_all(dir);
        made.map_err(|error| {
            refuse(context, pod, name, "CreateContainerError", format!("make {}: {error}", dir.display()))
        })?;
    }
    let created = runtime.create_container(&ready.sandbox.id, config, ready.config.clone()).await;
    let id =
        created.map_err(|error| refuse(context, pod, name, "CreateContainerError", error.to_string()))?;
    context.container_event(pod, name, EventType::Normal, "Created", format!("Container created: {name}"));
    let hook = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.post_start.clone());
    if hook.is_some() {
        context.state.lock().in_hook.insert(id.clone());
    }
    if let Err(error) = runtime.start_container(&id).await {
        context.state.lock().in_hook.remove(&id);
        return Err(refuse(context, pod, name, "RunContainerError", error.to_string()));
    }
    context.state.lock().waiting.remove(name);
    context.container_event(pod, name, EventType::Normal, "Started", format!("Container started: {name}"));
    link_log(context, pod, name, &id, &ready.config.log_directory, &log_path);
    let Some(hook) = hook else { return Ok(()) };
    context.wake.notify_one();
    let pod_ip = ready.host.pod_ips.first().map_or("", String::as_str);
    let target = Target { runtime: &**runtime, pod, container, container_id: &id, pod_ip };
    let outcome = handler::hook(&target, &hook).await;
    context.state.lock().in_hook.remove(&id);
    let Err(message) = outcome else { return Ok(()) };
    tracing::debug!(pod = %context.key, container = name, message, "postStart hook failed");
    context.container_event(
        pod,
        name,
        EventType::Warning,
        "FailedPostStartHook",
        "PostStartHook failed".to_owned(),
    );
    let grace = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds).unwrap_or(30);
    let kill = super::plan::Kill {
        id,
        name: name.clone(),
        message: "FailedPostStartHook".to_owned(),
        grace_s: Some(grace),
    };
    super::stop::kill(context, pod, &kill, grace).await;
    wait(context, name, "PostStartHookError", &message);
    // It counts as a crash; the back-off of those does the waiting.
    Ok(())
}

/// The images a container mounts, each as a container of it would be pulled.
fn image_volumes(container: &Container, ready: &ReadyPod) -> Vec<Container> {
    let mounted = container.volume_mounts.iter().flatten().filter_map(|mount| ready.volumes.get(&mount.name));
    let source = mounted.filter_map(|volume| volume.image.clone());
    let as_container = |source: ImageVolumeSource| Container {
        image: source.reference,
        image_pull_policy: source.pull_policy,
        ..Container::default()
    };
    source.map(as_container).collect()
}

fn wait(context: &PodContext, name: &str, reason: &str, message: &str) {
    let waiting = Waiting { reason: reason.to_owned(), message: message.to_owned() };
    context.state.lock().waiting.insert(name.to_owned(), waiting);
}

/// Tells why a container cannot be started; a later try may go better.
fn refuse(context: &PodContext, pod: &Pod, name: &str, reason: &str, message: String) -> Duration {
    context.container_event(pod, name, EventType::Warning, "Failed", format!("Error: {message}"));
    wait(context, name, reason, &message);
    RETRY_MAX
}

async fn remove_unstarted(context: &PodContext, name: &str) {
    let Ok(observed) = Observed::read(&*context.node.runtime, &context.uid).await else { return };
    let unstarted = |seen: &&super::observe::Seen| {
        seen.name() == name && seen.state() == v1::ContainerState::ContainerCreated
    };
    for seen in observed.containers.iter().filter(unstarted) {
        if let Err(error) = context.node.runtime.remove_container(&seen.status.id).await {
            tracing::warn!(pod = %context.key, container = name, %error, "container that never started stays");
        }
    }
}

fn make_message_file(path: &std::path::Path) -> Result<(), String> {
    use std::os::unix::fs::PermissionsExt;
    let failed = |error: std::io::Error| format!("make {}: {error}", path.display());
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(failed)?;
    }
    std::fs::write(path, "").map_err(failed)?;
    // Whatever user the container runs as writes into it.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666)).map_err(failed)
}

/// The container's configuration, and the file its termination message is read from.
async fn configure(
    context: &PodContext,
    pod: &Pod,
    container: &Container,
    item: &Start,
    ready: &ReadyPod,
    image: &v1::Image,
) -> Result<(v1::ContainerConfig, Option<PathBuf>), String> {
    let node = &context.node;
    if let Some(devices) = container.volume_devices.as_ref().filter(|devices| !devices.is_empty()) {
        return Err(format!(
            "block volume {:?} cannot be used: this node mounts file systems only",
            devices[0].name
        ));
    }
    let services = node.services.list();
    let env = env::environment(pod, container, &services, &*ready.references, &ready.host)?;
    let dir = node.config.container_dir(&context.uid, &container.name);
    let links = node.config.pod_dir(&context.uid).join("volume-subpaths").join(&container.name);
    let mut mounts = volumes::subpath::mounts(container, &ready.volumes, &env, &links)?;
    let mounted = |mounts: &[v1::Mount], path: &str| mounts.iter().any(|mount| mount.container_path == path);
    if let Some(hosts) = ready.hosts_file.as_ref().filter(|_| !mounted(&mounts, "/etc/hosts")) {
        mounts.push(bind("/etc/hosts", hosts));
    }
    let message_path = container.termination_message_path.as_deref().unwrap_or("/dev/termination-log");
    let message_file = (!message_path.is_empty()).then(|| dir.join(format!("message-{}", item.attempt)));
    if let Some(file) = &message_file {
        mounts.push(bind(message_path, file));
    }
    let target =
        build::find_ephemeral(pod, &container.name).and_then(|found| found.target_container_name.clone());
    let target = match target.filter(|name| !name.is_empty()) {
        None => None,
        Some(name) => {
            let observed =
                Observed::read(&*node.runtime, &context.uid).await.map_err(|error| error.to_string())?;
            let found = observed.latest(&name).filter(|seen| seen.is_running());
            Some(found.ok_or(format!("unable to find target container {name}"))?.status.id.clone())
        }
    };
    let input = ContainerInput {
        pod,
        container,
        attempt: item.attempt,
        image_ref: image.id.clone(),
        env,
        mounts,
        message_file: message_file.clone(),
        memory_capacity: node.machine.memory_bytes,
        target: target.as_deref(),
        image_user: (image.uid.as_ref().map(|uid| uid.value), &image.username),
    };
    Ok((build::container(&input, &node.config)?, message_file))
}

fn bind(container_path: &str, host_path: &std::path::Path) -> v1::Mount {
    v1::Mount {
        container_path: container_path.to_owned(),
        host_path: host_path.display().to_string(),
        ..Default::default()
    }
}

/// A flat name for the log, as collectors look for it.
fn link_log(context: &PodContext, pod: &Pod, name: &str, id: &str, directory: &str, log_path: &str) {
    let config = &context.node.config;
    let Some(link) = config.container_log_link(names::namespace(pod), names::name(pod), name, id) else {
        return;
    };
    let target = PathBuf::from(directory).join(log_path);
    let made = link.parent().map_or(Ok(()), std::fs::create_dir_all);
    if let Err(error) = made.and_then(|()| std::os::unix::fs::symlink(target, &link)) {
        tracing::debug!(link = %link.display(), %error, "no link to the container's log");
    }
}
