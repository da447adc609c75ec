//! How long a decision takes, in memory, without an API server:
//! `cargo bench -p knarr-scheduler --bench decide [-- NODES] [NAME …]`; of names, those workloads that contain one.
//!
//! Each workload fills a cluster and then decides and counts pods one after another; printed are the times of the
//! decision alone, and the CPU time of everything a pod costs (its digest, the decision, counting it).

use k8s_openapi::api::core::v1::{Node, Pod};
use knarr_scheduler::Config;
use knarr_scheduler::offline::{Answer, Offline, Waiting};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const PODS: usize = 5_000;
const ZONES: usize = 10;

fn node(number: usize) -> Node {
    let name = format!("node-{number}");
    let node = json!({
        "metadata": {"name": name, "labels": {
            "kubernetes.io/hostname": name, "topology.kubernetes.io/zone": format!("zone-{}", number % ZONES),
        }},
        "status": {"allocatable": {"cpu": "4", "memory": "32Gi", "pods": "110"}},
    });
    serde_json::from_value(node).expect("a node")
}

fn pod(number: usize, labels: Value, spec: Value) -> Pod {
    let mut spec = spec;
    if spec["containers"].is_null() {
        spec["containers"] = json!([{"name": "c", "image": "pause", "resources": {"requests": {"cpu": "100m", "memory": "500Mi"}}}]);
    }
    let meta = json!({"name": format!("pod-{number}"), "namespace": "bench", "uid": number.to_string(), "labels": labels});
    serde_json::from_value(json!({"metadata": meta, "spec": spec})).expect("a pod")
}

fn affinity(kind: &str, topology: &str, app: &str) -> Value {
    let term = json!({"topologyKey": topology, "labelSelector": {"matchLabels": {"app": app}}});
    json!({"affinity": {kind: {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}})
}

fn preferred(kind: &str, topology: &str, app: &str) -> Value {
    let term = json!({"topologyKey": topology, "labelSelector": {"matchLabels": {"app": app}}});
    let weighted = json!({"weight": 1, "podAffinityTerm": term});
    json!({"affinity": {kind: {"preferredDuringSchedulingIgnoredDuringExecution": [weighted]}}})
}

fn spread(when: &str) -> Value {
    json!({"topologySpreadConstraints": [{
        "maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": when,
        "labelSelector": {"matchLabels": {"app": "a"}},
    }]})
}

type Make = Box<dyn Fn(usize) -> Pod>;

fn workloads() -> Vec<(&'static str, Make)> {
    let app = || json!({"app": "a"});
    let host = "kubernetes.io/hostname";
    let zone = "topology.kubernetes.io/zone";
    let big = || json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": "5"}}}]});
    vec![
        ("plain", Box::new(move |n| pod(n, app(), json!({})))),
        ("required pod affinity, zone", Box::new(move |n| pod(n, app(), affinity("podAffinity", zone, "a")))),
        (
            "required anti-affinity, host, 10 groups",
            Box::new(move |n| {
                let group = format!("g{}", n % 10);
                pod(n, json!({"app": group}), affinity("podAntiAffinity", host, &group))
            }),
        ),
        (
            "preferred pod affinity, host",
            Box::new(move |n| pod(n, app(), preferred("podAffinity", host, "a"))),
        ),
        (
            "preferred anti-affinity, host",
            Box::new(move |n| pod(n, app(), preferred("podAntiAffinity", host, "a"))),
        ),
        ("spread over zones, required", Box::new(move |n| pod(n, app(), spread("DoNotSchedule")))),
        ("spread over zones, preferred", Box::new(move |n| pod(n, app(), spread("ScheduleAnyway")))),
        ("node selector", Box::new(move |n| pod(n, app(), json!({"nodeSelector": {zone: "zone-3"}})))),
        ("unschedulable", Box::new(move |n| pod(n, app(), big()))),
    ]
}

/// The middle and the 99th of a hundred, in microseconds.
fn microseconds(mut times: Vec<Duration>) -> (f64, f64) {
    times.sort_unstable();
    let at = |percent: usize| times[times.len() * percent / 100].as_secs_f64() * 1e6;
    (at(50), at(99))
}

/// CPU time of this thread in microseconds: what counts on a machine that others use, too.
fn cpu_microseconds() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split(' ').next().and_then(|nanos| nanos.parse::<f64>().ok()).unwrap_or(f64::NAN) / 1e3
}

/// Memory of this process in bytes.
fn resident_bytes() -> f64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    text.split(' ').nth(1).and_then(|pages| pages.parse::<f64>().ok()).unwrap_or(f64::NAN) * 4096.0
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let nodes = args.iter().find_map(|arg| arg.parse().ok()).unwrap_or(5_000);
    let names: Vec<&String> = args.iter().filter(|arg| arg.parse::<usize>().is_err()).collect();
    let wanted = |name: &str| names.is_empty() || names.iter().any(|part| name.contains(part.as_str()));
    let (begin, before) = (Instant::now(), resident_bytes());
    let empty = cluster(nodes);
    println!(
        "{nodes} nodes: {:.0} bytes and {:.1} us each to take in",
        (resident_bytes() - before) / nodes as f64,
        begin.elapsed().as_secs_f64() * 1e6 / nodes as f64,
    );
    drop(empty);
    println!("{PODS} pods; times of one pod in microseconds");
    println!("{:<42} {:>8} {:>8} {:>16}", "workload", "p50", "p99", "CPU of whole pod");
    for (name, make) in workloads().into_iter().filter(|(name, _)| wanted(name)) {
        run(name, PODS, &mut cluster(nodes), &make);
    }
    if wanted("preemption") {
        preemption(nodes);
    }
    if wanted("nodes that come and go") {
        churn(nodes);
    }
}

fn cluster(nodes: usize) -> Offline {
    let mut scheduler = Offline::new(Config::default(), 1);
    (0..nodes).for_each(|number| scheduler.set_node(node(number)));
    scheduler
}

fn run(name: &str, pods: usize, scheduler: &mut Offline, make: &Make) {
    let pods: Vec<Pod> = (0..pods).map(make).collect();
    let (count, mut decisions) = (pods.len(), Vec::new());
    let begin = cpu_microseconds();
    for pod in pods {
        let pod: Waiting = Offline::wait(pod);
        let deciding = Instant::now();
        let answer = scheduler.decide(&pod);
        decisions.push(deciding.elapsed());
        if let Answer::Node(node) = answer {
            scheduler.place(&pod, &node);
        }
    }
    let cpu = (cpu_microseconds() - begin) / count as f64;
    let (middle, p99) = microseconds(decisions);
    println!("{name:<42} {middle:>8.1} {p99:>8.1} {cpu:>16.1}");
}

/// Four unimportant pods fill each node; important ones push them out.
fn preemption(nodes: usize) {
    let mut scheduler = cluster(nodes);
    let small =
        || json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": "900m"}}}], "priority": 0});
    for number in 0..4 * nodes {
        let pod = Offline::wait(pod(number, json!({}), small()));
        scheduler.place(&pod, &format!("node-{}", number % nodes));
    }
    let (mut times, count) = (Vec::new(), 1_000.min(nodes));
    let begin_cpu = cpu_microseconds();
    for number in 0..count {
        let large =
            json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": "3"}}}], "priority": 10});
        let pod = Offline::wait(pod(1_000_000 + number, json!({}), large));
        let begin = Instant::now();
        let answer = scheduler.decide(&pod);
        times.push(begin.elapsed());
        if let Answer::Preempt { node, victims } = answer {
            victims.iter().for_each(|(namespace, name)| scheduler.remove(namespace, name));
            scheduler.place(&pod, &node);
        }
    }
    let cpu = (cpu_microseconds() - begin_cpu) / count as f64;
    let (middle, p99) = microseconds(times);
    println!("{:<42} {middle:>8.1} {p99:>8.1} {cpu:>16.1}", format!("preemption among {} pods", 4 * nodes));
}

/// Before every hundredth pod a node goes, one comes and one changes its labels.
fn churn(nodes: usize) {
    let mut scheduler = cluster(nodes);
    let (mut times, mut number) = (Vec::new(), nodes);
    let pods: Vec<Waiting> =
        (0..PODS).map(|n| Offline::wait(pod(n, json!({"app": "a"}), spread("ScheduleAnyway")))).collect();
    let begin_cpu = cpu_microseconds();
    for (index, pod) in pods.iter().enumerate() {
        let begin = Instant::now();
        if index % 100 == 0 {
            scheduler.remove_node(&format!("node-{}", number - nodes));
            scheduler.set_node(node(number));
            let mut changed = node(number - nodes / 2);
            let labels = changed.metadata.labels.get_or_insert_default();
            labels.insert("changed".to_owned(), index.to_string());
            scheduler.set_node(changed);
            number += 1;
        }
        let answer = scheduler.decide(pod);
        times.push(begin.elapsed());
        if let Answer::Node(node) = answer {
            scheduler.place(pod, &node);
        }
    }
    let cpu = (cpu_microseconds() - begin_cpu) / PODS as f64;
    let (middle, p99) = microseconds(times);
    println!("{:<42} {middle:>8.1} {p99:>8.1} {cpu:>16.1}", "nodes that come and go, one in 100 pods");
}
