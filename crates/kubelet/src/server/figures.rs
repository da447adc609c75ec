//! Figures and lists: `/pods`, `/runningpods`, `/stats/summary`, `/metrics`, `/metrics/resource`.

use super::{Answer, json, text};
use crate::context::NodeContext;
use crate::names;
use http::StatusCode;
use knarr_runtime::cri::v1;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;

type Failed = (StatusCode, String);

fn failed(error: knarr_runtime::Error) -> Failed {
    (StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
}

pub fn pods(context: &NodeContext) -> Answer {
    let pods: Vec<_> = context.pods.list();
    let items: Vec<&k8s_openapi::api::core::v1::Pod> = pods.iter().map(|pod| &**pod).collect();
    json(&json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items}))
}

pub async fn running_pods(context: &NodeContext) -> Answer {
    let state = Some(v1::ContainerStateValue { state: v1::ContainerState::ContainerRunning as i32 });
    let filter = v1::ContainerFilter { state, ..Default::default() };
    let containers = context.runtime.list_containers(Some(filter)).await.map_err(failed)?;
    let mut pods: BTreeMap<(String, String, String), Vec<Value>> = BTreeMap::new();
    for container in containers {
        let Some(key) = pod_of(&container.labels) else { continue };
        let label = container.labels.get(names::CONTAINER_NAME).cloned().unwrap_or_default();
        let image = container.image.map(|image| image.image).unwrap_or_default();
        pods.entry(key).or_default().push(json!({"name": label, "image": image}));
    }
    let item = |((namespace, name, uid), containers): ((String, String, String), Vec<Value>)| json!({"metadata": {"namespace": namespace, "name": name, "uid": uid}, "spec": {"containers": containers}, "status": {}});
    let items: Vec<Value> = pods.into_iter().map(item).collect();
    json(&json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items}))
}

type Labels = std::collections::HashMap<String, String>;

fn pod_of(labels: &Labels) -> Option<(String, String, String)> {
    let label = |key: &str| labels.get(key).cloned();
    Some((label(names::POD_NAMESPACE)?, label(names::POD_NAME)?, label(names::POD_UID)?))
}

fn value(figure: &Option<v1::UInt64Value>) -> Option<u64> {
    figure.as_ref().map(|figure| figure.value)
}

fn time(nanos: i64) -> String {
    jiff::Timestamp::from_second(nanos.div_euclid(1_000_000_000)).unwrap_or_default().to_string()
}

fn cpu(figures: &Option<v1::CpuUsage>) -> Value {
    let Some(cpu) = figures else { return Value::Null };
    json!({
        "time": time(cpu.timestamp),
        "usageNanoCores": value(&cpu.usage_nano_cores),
        "usageCoreNanoSeconds": value(&cpu.usage_core_nano_seconds),
    })
}

fn memory(figures: &Option<v1::MemoryUsage>) -> Value {
    let Some(memory) = figures else { return Value::Null };
    json!({
        "time": time(memory.timestamp),
        "availableBytes": value(&memory.available_bytes),
        "usageBytes": value(&memory.usage_bytes),
        "workingSetBytes": value(&memory.working_set_bytes),
        "rssBytes": value(&memory.rss_bytes),
        "pageFaults": value(&memory.page_faults),
        "majorPageFaults": value(&memory.major_page_faults),
    })
}

/// The Summary API (`k8s.io/kubelet/pkg/apis/stats/v1alpha1`).
pub async fn summary(context: &NodeContext) -> Answer {
    let stats = context.runtime.list_pod_sandbox_stats(None).await.map_err(failed)?;
    let mut pods = Vec::new();
    for pod in stats {
        let attributes = pod.attributes.unwrap_or_default();
        let Some((namespace, name, uid)) = pod_of(&attributes.labels) else { continue };
        let linux = pod.linux.unwrap_or_default();
        let container = |stats: &v1::ContainerStats| {
            let name = stats.attributes.as_ref().and_then(|own| own.labels.get(names::CONTAINER_NAME));
            json!({"name": name, "cpu": cpu(&stats.cpu), "memory": memory(&stats.memory)})
        };
        pods.push(json!({
            "podRef": {"name": name, "namespace": namespace, "uid": uid},
            "cpu": cpu(&linux.cpu),
            "memory": memory(&linux.memory),
            "containers": linux.containers.iter().map(container).collect::<Vec<_>>(),
        }));
    }
    let node = host();
    let now = context.clock.time();
    json(&json!({
        "node": {
            "nodeName": context.config.node_name,
            "cpu": {"time": now, "usageCoreNanoSeconds": node.cpu_nanos},
            "memory": {"time": now, "availableBytes": node.memory_available,
                "workingSetBytes": node.memory_total.saturating_sub(node.memory_available),
                "usageBytes": node.memory_total.saturating_sub(node.memory_free)},
        },
        "pods": pods,
    }))
}

/// What the whole machine uses.
struct Host {
    cpu_nanos: u64,
    memory_total: u64,
    memory_available: u64,
    memory_free: u64,
}

fn host() -> Host {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let fields: Vec<u64> = stat
        .lines()
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(1)
        .filter_map(|field| field.parse().ok())
        .collect();
    // user, nice, system, idle, iowait, irq, softirq, steal: in hundredths of a second.
    let busy: u64 = [0, 1, 2, 5, 6, 7].iter().filter_map(|index| fields.get(*index)).sum();
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = |name: &str| {
        let found = text.lines().find_map(|line| line.strip_prefix(name));
        found.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) * 1024
    };
    Host {
        cpu_nanos: busy * 10_000_000,
        memory_total: line("MemTotal:"),
        memory_available: line("MemAvailable:"),
        memory_free: line("MemFree:"),
    }
}

/// The kubelet's own figures.
pub fn metrics(context: &NodeContext) -> Answer {
    let mut out = String::new();
    let node = &context.config.node_name;
    let _ = writeln!(out, "# HELP kubelet_node_name The node's name. The count is always 1.");
    let _ = writeln!(out, "# TYPE kubelet_node_name gauge\nkubelet_node_name{{node={node:?}}} 1");
    let _ = writeln!(out, "# HELP kubelet_running_pods Number of pods that have a running pod sandbox");
    let _ = writeln!(out, "# TYPE kubelet_running_pods gauge\nkubelet_running_pods {}", context.pods.len());
    Ok(text(StatusCode::OK, out))
}

/// CPU and memory of containers and pods, as metrics-server reads them.
pub async fn resource_metrics(context: &NodeContext) -> Answer {
    let stats = context.runtime.list_container_stats(None).await.map_err(failed)?;
    let (mut cpus, mut memories) = (String::new(), String::new());
    for one in stats {
        let labels = one.attributes.map(|attributes| attributes.labels).unwrap_or_default();
        let Some((namespace, pod, _)) = pod_of(&labels) else { continue };
        let name = labels.get(names::CONTAINER_NAME).cloned().unwrap_or_default();
        let labels = format!("{{container={name:?},namespace={namespace:?},pod={pod:?}}}");
        if let Some((nanos, at)) =
            one.cpu.as_ref().and_then(|cpu| Some((value(&cpu.usage_core_nano_seconds)?, cpu.timestamp)))
        {
            let _ = writeln!(
                cpus,
                "container_cpu_usage_seconds_total{labels} {} {}",
                nanos as f64 / 1e9,
                at / 1_000_000
            );
        }
        if let Some((bytes, at)) =
            one.memory.as_ref().and_then(|memory| Some((value(&memory.working_set_bytes)?, memory.timestamp)))
        {
            let _ =
                writeln!(memories, "container_memory_working_set_bytes{labels} {bytes} {}", at / 1_000_000);
        }
    }
    let node = host();
    let out = format!(
        "# TYPE container_cpu_usage_seconds_total counter\n{cpus}# TYPE container_memory_working_set_bytes gauge\n{memories}\
         # TYPE node_cpu_usage_seconds_total counter\nnode_cpu_usage_seconds_total {}\n\
         # TYPE node_memory_working_set_bytes gauge\nnode_memory_working_set_bytes {}\n",
        node.cpu_nanos as f64 / 1e9,
        node.memory_total.saturating_sub(node.memory_available)
    );
    Ok(text(StatusCode::OK, out))
}
