//! The Node object: registration, status, and the lease that says the kubelet lives.
//!
//! The status is written on change and every five minutes; between, only the lease is renewed.

use crate::config::KubeletConfig;
use crate::context::NodeContext;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::{
    ContainerImage, DaemonEndpoint, Node, NodeCondition, NodeDaemonEndpoints, NodeSpec, NodeStatus,
    NodeSystemInfo,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use knarr_api::quantity::Quantity;
use knarr_client::EventType;
use knarr_client::patch::merge_diff;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;
use tokio::time::Instant;

const LEASE_NAMESPACE: &str = "kube-node-lease";
const LEASE_DURATION_S: i32 = 40;
const LEASE_RENEW: Duration = Duration::from_secs(10);
/// The lease is tried again this soon when it could not be renewed.
const LEASE_RETRY: Duration = Duration::from_secs(1);
const STATUS_PERIOD: Duration = Duration::from_secs(300);
const STATUS_RETRY: Duration = Duration::from_secs(2);
/// How long to gather changes before the status is looked at.
const STATUS_SETTLE: Duration = Duration::from_secs(1);
/// How often a conflict over the node's taints is resolved in place.
const TAINT_TRIES_MAX: usize = 5;
const NOT_READY_TAINT: &str = "node.kubernetes.io/not-ready";
/// Images told in the status.
const IMAGES_MAX: usize = 50;
/// Less than this much free, and the node says so: memory in bytes, disk in percent, process ids in percent.
const MEMORY_FREE_MIN: i64 = 100 << 20;
const DISK_FREE_PERCENT_MIN: i64 = 10;
const PIDS_FREE_PERCENT_MIN: i64 = 5;

/// What the machine is and has.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    pub cpus: i64,
    pub memory_bytes: i64,
    pub disk_bytes: i64,
    pub huge_page_sizes: Vec<String>,
    pub info: NodeSystemInfo,
}

impl Machine {
    /// Reads what the kernel and `/etc` tell.
    pub fn read(root_dir: &Path, runtime_version: String, kubelet_version: &str) -> Machine {
        let file = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let uname = nix::sys::utsname::uname().ok();
        let kernel = uname.as_ref().map(|uname| uname.release().to_string_lossy().into_owned());
        Machine {
            cpus: std::thread::available_parallelism().map_or(1, |count| count.get() as i64),
            memory_bytes: memory("MemTotal:"),
            disk_bytes: disk(root_dir).map_or(0, |(total, _)| total),
            huge_page_sizes: huge_pages(),
            info: NodeSystemInfo {
                architecture: architecture().to_owned(),
                boot_id: file("/proc/sys/kernel/random/boot_id"),
                container_runtime_version: runtime_version,
                kernel_version: kernel.unwrap_or_default(),
                kube_proxy_version: String::new(),
                kubelet_version: kubelet_version.to_owned(),
                machine_id: file("/etc/machine-id"),
                operating_system: "linux".to_owned(),
                os_image: os_image(&file("/etc/os-release")),
                swap: None,
                system_uuid: match file("/sys/class/dmi/id/product_uuid") {
                    uuid if uuid.is_empty() => file("/etc/machine-id"),
                    uuid => uuid,
                },
            },
        }
    }

    /// What pods may use: `cpu` in thousandths, the others in bytes.
    pub fn allocatable(&self, config: &KubeletConfig) -> BTreeMap<&'static str, i64> {
        let kept = |resource: &str| -> i64 {
            let Some(kept) = config.reserved.get(resource).and_then(|text| text.parse::<Quantity>().ok())
            else {
                return 0;
            };
            if resource == "cpu" { kept.millis() } else { kept.units() }
        };
        let all = [
            ("cpu", self.cpus * 1000),
            ("memory", self.memory_bytes),
            ("ephemeral-storage", self.disk_bytes),
        ];
        all.into_iter().map(|(name, amount)| (name, (amount - kept(name)).max(0))).collect()
    }

    fn quantities(&self, config: &KubeletConfig, allocatable: bool) -> BTreeMap<String, ApiQuantity> {
        let amounts = match allocatable {
            true => self.allocatable(config),
            false => [
                ("cpu", self.cpus * 1000),
                ("memory", self.memory_bytes),
                ("ephemeral-storage", self.disk_bytes),
            ]
            .into(),
        };
        let print = |name: &str, amount: i64| match name {
            "cpu" => Quantity::from_millis(amount).to_string(),
            _ if amount % 1024 == 0 => format!("{}Ki", amount / 1024),
            _ => amount.to_string(),
        };
        let mut out: BTreeMap<String, ApiQuantity> = amounts
            .into_iter()
            .map(|(name, amount)| (name.to_owned(), ApiQuantity(print(name, amount))))
            .collect();
        out.insert("pods".to_owned(), ApiQuantity(config.pods_max.to_string()));
        for size in &self.huge_page_sizes {
            out.insert(format!("hugepages-{size}"), ApiQuantity("0".to_owned()));
        }
        out
    }
}

/// Go's names of architectures.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" => "ppc64le",
        other => other,
    }
}

fn os_image(release: &str) -> String {
    let line = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    line.map_or("Linux".to_owned(), |name| name.trim_matches('"').to_owned())
}

/// A line of `/proc/meminfo` in bytes.
fn memory(field: &str) -> i64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<i64>().ok()).unwrap_or(0) * 1024
}

/// Size and free space of the file system a path is on, in bytes.
fn disk(path: &Path) -> Option<(i64, i64)> {
    let mut at = path;
    while !at.exists() {
        at = at.parent()?;
    }
    let stat = nix::sys::statvfs::statvfs(at).ok()?;
    let unit = stat.fragment_size() as i64;
    Some((stat.blocks() as i64 * unit, stat.blocks_available() as i64 * unit))
}

fn huge_pages() -> Vec<String> {
    let Ok(entries) = std::fs::read_dir("/sys/kernel/mm/hugepages") else { return Vec::new() };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let sizes =
        names.filter_map(|name| name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse::<u64>().ok());
    let mut out: Vec<String> = sizes
        .map(|kib| match kib {
            kib if kib % (1 << 20) == 0 => format!("{}Gi", kib >> 20),
            kib if kib % 1024 == 0 => format!("{}Mi", kib >> 10),
            kib => format!("{kib}Ki"),
        })
        .collect();
    out.sort();
    out
}

/// Process ids in use and how many there may be.
fn pids() -> Option<(i64, i64)> {
    let load = std::fs::read_to_string("/proc/loadavg").ok()?;
    let used = load.split(' ').nth(3)?.split('/').nth(1)?.parse().ok()?;
    let max = std::fs::read_to_string("/proc/sys/kernel/pid_max").ok()?.trim().parse().ok()?;
    Some((used, max))
}

/// Makes the node known to the API, or takes over the one that is there. Tries until it succeeds.
pub async fn register(context: &NodeContext) -> Node {
    loop {
        match try_register(context).await {
            Ok(node) => return node,
            Err(error) => {
                tracing::warn!(node = context.config.node_name, %error, "node not registered, trying again");
                tokio::time::sleep(STATUS_RETRY).await;
            }
        }
    }
}

async fn try_register(context: &NodeContext) -> Result<Node, kube::Error> {
    let (config, api) = (&context.config, Api::<Node>::all(context.client.clone()));
    let labels = labels(config);
    if let Some(node) = api.get_opt(&config.node_name).await? {
        let mut patch = json!({"metadata": {"labels": labels}});
        let has_range = node.spec.as_ref().is_some_and(|spec| spec.pod_cidr.is_some());
        if let (false, Some(first)) = (has_range, config.pod_cidrs.first()) {
            patch["spec"] = json!({"podCIDR": first, "podCIDRs": config.pod_cidrs});
        }
        return api.patch(&config.node_name, &PatchParams::default(), &Patch::Merge(patch)).await;
    }
    let mut taints = config.taints.clone();
    taints.push(k8s_openapi::api::core::v1::Taint {
        key: NOT_READY_TAINT.to_owned(),
        effect: "NoSchedule".to_owned(),
        ..Default::default()
    });
    let node = Node {
        metadata: ObjectMeta {
            name: Some(config.node_name.clone()),
            labels: Some(labels),
            ..Default::default()
        },
        spec: Some(NodeSpec {
            pod_cidr: config.pod_cidrs.first().cloned(),
            pod_cidrs: (!config.pod_cidrs.is_empty()).then(|| config.pod_cidrs.clone()),
            taints: Some(taints),
            ..Default::default()
        }),
        status: None,
    };
    api.create(&PostParams::default(), &node).await
}

fn labels(config: &KubeletConfig) -> BTreeMap<String, String> {
    let mut labels = config.labels.clone();
    let own = [
        ("kubernetes.io/hostname", config.node_name.as_str()),
        ("kubernetes.io/os", "linux"),
        ("kubernetes.io/arch", architecture()),
    ];
    for (key, value) in own {
        labels.entry(key.to_owned()).or_insert_with(|| value.to_owned());
    }
    if config.control_plane {
        labels.insert("node-role.kubernetes.io/control-plane".to_owned(), String::new());
    }
    labels
}

/// Keeps the status up to date until the task ends; `changed` asks for a look soon.
pub async fn keep_status(context: &NodeContext, changed: &tokio::sync::Notify) {
    let mut told = Told::default();
    loop {
        let wait = match post_status(context, &mut told).await {
            Ok(()) => STATUS_PERIOD,
            Err(error) => {
                tracing::warn!(node = context.config.node_name, %error, "node status not written, trying again");
                STATUS_RETRY
            }
        };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            // Many pods come and go together: one look is for all of them.
            () = changed.notified() => tokio::time::sleep(STATUS_SETTLE).await,
        }
    }
}

/// What the API was told last.
#[derive(Default)]
struct Told {
    ready: Option<bool>,
    /// When the status was written, be it only for its heartbeats.
    at: Option<Instant>,
}

async fn post_status(context: &NodeContext, told: &mut Told) -> Result<(), kube::Error> {
    let api = Api::<Node>::all(context.client.clone());
    let name = &context.config.node_name;
    let node = match api.get_opt(name).await? {
        Some(node) => node,
        // Somebody deleted the node; it comes back, as upstream's does.
        None => try_register(context).await?,
    };
    let status = status(context, &node).await;
    let ready = status
        .conditions
        .iter()
        .flatten()
        .any(|condition| condition.type_ == "Ready" && condition.status == "True");
    let due = told.at.is_none_or(|at| at.elapsed() >= STATUS_PERIOD);
    if due || !same_but_heartbeats(node.status.as_ref(), &status) {
        write_status(&api, &node, &status).await?;
        told.at = Some(Instant::now());
    }
    if ready {
        remove_not_ready_taint(&api, node.clone()).await?;
    }
    if told.ready != Some(ready) {
        let reason = if ready { "NodeReady" } else { "NodeNotReady" };
        context.recorder.event(
            &node,
            EventType::Normal,
            reason,
            format!("Node {name} status is now: {reason}"),
        );
        told.ready = Some(ready);
    }
    Ok(())
}

/// Whether the two differ in nothing but when they were told.
fn same_but_heartbeats(old: Option<&NodeStatus>, new: &NodeStatus) -> bool {
    let timeless = |status: &NodeStatus| {
        let mut status = status.clone();
        for condition in status.conditions.iter_mut().flatten() {
            condition.last_heartbeat_time = None;
        }
        // Others add conditions of their own, in whatever order.
        let ours = |condition: &NodeCondition| {
            new.conditions.iter().flatten().any(|new| new.type_ == condition.type_)
        };
        if let Some(conditions) = &mut status.conditions {
            conditions.retain(ours);
            conditions.sort_by(|a, b| a.type_.cmp(&b.type_));
        }
        status
    };
    old.is_some_and(|old| timeless(old) == timeless(new))
}

async fn write_status(api: &Api<Node>, node: &Node, status: &NodeStatus) -> Result<(), kube::Error> {
    let old =
        node.status.as_ref().map_or(json!({}), |status| serde_json::to_value(status).unwrap_or_default());
    let mut change = merge_diff(&old, &serde_json::to_value(status).unwrap_or_default());
    if change == Value::Null {
        return Ok(());
    }
    // Others add conditions of their own: ours are merged by type.
    if change.get("conditions").is_some() {
        change["conditions"] = json!(status.conditions);
    }
    if change.get("addresses").is_some() {
        change["addresses"] = json!(status.addresses);
    }
    let name = node.metadata.name.as_deref().unwrap_or_default();
    let patch = json!({"status": change});
    api.patch_status(name, &PatchParams::default(), &Patch::Strategic(patch)).await.map(drop)
}

/// The node is ready now; waiting for the node controller to say so would delay the first pods. That controller
/// may be at it, too: a conflict means to look again.
async fn remove_not_ready_taint(api: &Api<Node>, mut node: Node) -> Result<(), kube::Error> {
    let has_taint = |node: &Node| {
        node.spec.iter().flat_map(|spec| spec.taints.iter().flatten()).any(|t| t.key == NOT_READY_TAINT)
    };
    let name = node.metadata.name.clone().unwrap_or_default();
    if !has_taint(&node) {
        return Ok(());
    }
    for tries_left in (0..TAINT_TRIES_MAX).rev() {
        // Our own status write has moved the version on.
        node = api.get(&name).await?;
        if !has_taint(&node) {
            return Ok(());
        }
        let taints = node.spec.as_ref().and_then(|spec| spec.taints.clone()).unwrap_or_default();
        let left: Vec<_> = taints.into_iter().filter(|taint| taint.key != NOT_READY_TAINT).collect();
        // A list is replaced as a whole: `null` where nothing is left, and only if nobody changed it meanwhile.
        let left = if left.is_empty() { Value::Null } else { json!(left) };
        let version = &node.metadata.resource_version;
        let patch = json!({"metadata": {"resourceVersion": version}, "spec": {"taints": left}});
        match api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await {
            Err(kube::Error::Api(status)) if status.code == 409 && tries_left > 0 => {}
            result => return result.map(drop),
        }
    }
    Ok(())
}

async fn status(context: &NodeContext, node: &Node) -> NodeStatus {
    let (config, machine) = (&context.config, &context.machine);
    let port = config.listen.port();
    let images = context.runtime.list_images(None).await.unwrap_or_default();
    NodeStatus {
        addresses: Some(config.told_addresses()),
        capacity: Some(machine.quantities(config, false)),
        allocatable: Some(machine.quantities(config, true)),
        conditions: Some(conditions(context, node).await),
        daemon_endpoints: Some(NodeDaemonEndpoints {
            kubelet_endpoint: Some(DaemonEndpoint { port: i32::from(port) }),
        }),
        images: Some(told_images(images)),
        node_info: Some(machine.info.clone()),
        ..node.status.clone().unwrap_or_default()
    }
}

fn told_images(mut images: Vec<knarr_runtime::cri::v1::Image>) -> Vec<ContainerImage> {
    images.sort_by_key(|image| (std::cmp::Reverse(image.size), image.id.clone()));
    images.truncate(IMAGES_MAX);
    let tell = |image: knarr_runtime::cri::v1::Image| ContainerImage {
        names: Some(image.repo_digests.into_iter().chain(image.repo_tags).collect()),
        size_bytes: i64::try_from(image.size).ok(),
    };
    images.into_iter().map(tell).collect()
}

async fn conditions(context: &NodeContext, node: &Node) -> Vec<NodeCondition> {
    let old = node.status.as_ref().and_then(|status| status.conditions.clone()).unwrap_or_default();
    let short_memory = memory("MemAvailable:") < MEMORY_FREE_MIN;
    let short_disk = disk(&context.config.root_dir)
        .is_some_and(|(total, free)| free * 100 < total * DISK_FREE_PERCENT_MIN);
    let short_pids = pids().is_some_and(|(used, max)| (max - used) * 100 < max * PIDS_FREE_PERCENT_MIN);
    let pressure = |kind: &str, holds: bool, yes: (&str, &str), no: (&str, &str)| {
        let (reason, message) = if holds { yes } else { no };
        (kind.to_owned(), holds, reason.to_owned(), message.to_owned())
    };
    let mut all = vec![
        pressure(
            "MemoryPressure",
            short_memory,
            ("KubeletHasInsufficientMemory", "kubelet has insufficient memory available"),
            ("KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
        ),
        pressure(
            "DiskPressure",
            short_disk,
            ("KubeletHasDiskPressure", "kubelet has disk pressure"),
            ("KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
        ),
        pressure(
            "PIDPressure",
            short_pids,
            ("KubeletHasInsufficientPID", "kubelet has insufficient PID available"),
            ("KubeletHasSufficientPID", "kubelet has sufficient PID available"),
        ),
    ];
    all.push(match runtime_trouble(context).await {
        None => (
            "Ready".to_owned(),
            true,
            "KubeletReady".to_owned(),
            "kubelet is posting ready status".to_owned(),
        ),
        Some(trouble) => ("Ready".to_owned(), false, "KubeletNotReady".to_owned(), trouble),
    });
    let now = context.clock.time();
    let tell = |(kind, holds, reason, message): (String, bool, String, String)| {
        let status = if holds { "True" } else { "False" };
        let before = old.iter().find(|condition| condition.type_ == kind && condition.status == status);
        let since = before.and_then(|before| before.last_transition_time.clone());
        NodeCondition {
            type_: kind,
            status: status.to_owned(),
            reason: Some(reason),
            message: Some(message),
            last_heartbeat_time: Some(now.clone()),
            last_transition_time: since.or_else(|| Some(now.clone())),
        }
    };
    all.into_iter().map(tell).collect()
}

async fn runtime_trouble(context: &NodeContext) -> Option<String> {
    let status = match context.runtime.status(false).await {
        Ok(answer) => answer.status.unwrap_or_default(),
        Err(error) => return Some(format!("container runtime is down: {error}")),
    };
    // A network of our own is ready when it is there; the runtime only knows of CNI.
    let counts = |kind: &str| kind == "RuntimeReady" || (kind == "NetworkReady" && context.network.is_none());
    let bad = status.conditions.iter().find(|condition| counts(&condition.r#type) && !condition.status)?;
    Some(match bad.r#type.as_str() {
        "NetworkReady" => format!(
            "container runtime network not ready: NetworkReady=false reason:{} message:{}",
            bad.reason, bad.message
        ),
        _ => format!(
            "container runtime not ready: RuntimeReady=false reason:{} message:{}",
            bad.reason, bad.message
        ),
    })
}

/// Renews the node's lease until the task ends.
pub async fn keep_lease(context: &NodeContext, node_uid: &str) {
    loop {
        let wait = match renew(context, node_uid).await {
            Ok(()) => LEASE_RENEW,
            Err(error) => {
                tracing::warn!(node = context.config.node_name, %error, "node lease not renewed, trying again");
                LEASE_RETRY
            }
        };
        tokio::time::sleep(wait).await;
    }
}

async fn renew(context: &NodeContext, node_uid: &str) -> Result<(), kube::Error> {
    let name = &context.config.node_name;
    let api = Api::<Lease>::namespaced(context.client.clone(), LEASE_NAMESPACE);
    let spec = LeaseSpec {
        holder_identity: Some(name.clone()),
        lease_duration_seconds: Some(LEASE_DURATION_S),
        renew_time: Some(context.clock.micro_time()),
        ..Default::default()
    };
    let patch = json!({"spec": spec});
    match api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await {
        Err(kube::Error::Api(status)) if status.code == 404 => {}
        result => return result.map(drop),
    }
    let owner = OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: name.clone(),
        uid: node_uid.to_owned(),
        ..Default::default()
    };
    let metadata = ObjectMeta {
        name: Some(name.clone()),
        namespace: Some(LEASE_NAMESPACE.to_owned()),
        owner_references: Some(vec![owner]),
        ..Default::default()
    };
    api.create(&PostParams::default(), &Lease { metadata, spec: Some(spec) }).await.map(drop)
}
