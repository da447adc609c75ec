//! What a request costs the server itself: no sockets, no TLS, a store on the disk, one reader of all pods as the
//! control loops have (`bare`: without). Prints rates and CPU time per request; `knarr bench` measures the same over the network.

#[path = "../tests/common/mod.rs"]
mod common;

use std::sync::{Arc, LazyLock};
use std::time::Instant;

use bytes::Bytes;
use http::Request;
use http_body_util::BodyExt;
use k8s_openapi::api::core::v1::Pod;
use knarr_apiserver::api::{Api, Peer};
use knarr_apiserver::identity::User;
use knarr_apiserver::respond::full;
use knarr_apiserver::server::InProcess;
use knarr_client::{Informers, connect, lean};
use knarr_store::engine::Disk;
use knarr_store::{Embedded, Options};
use serde_json::json;

const CLIENTS: usize = 256;
/// The first argument that is a number.
static PODS: LazyLock<usize> =
    LazyLock::new(|| std::env::args().find_map(|a| a.parse().ok()).unwrap_or(10_000));

#[tokio::main(worker_threads = 2)]
async fn main() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = Embedded::open(Disk::open(dir.path()).expect("a log"), Options::default()).expect("opens");
    let api = Arc::new(common::server_on(Arc::new(store)).await);
    let informers = Informers::new(connect::in_process(InProcess::new(
        api.clone(),
        User::new("loops", &["system:masters"]),
    )));
    informers.trim(lean::pod);
    let bare = std::env::args().any(|argument| argument == "bare");
    let pods = (!bare).then(|| informers.get::<Pod>());
    if let Some(pods) = &pods {
        pods.wait_synced().await;
    }
    let pod = json!({
        "metadata": { "name": "b@", "annotations": { "payload": "x".repeat(4096) } },
        "spec": { "containers": [{ "name": "c", "image": "none" }] },
    });
    let (pod, before) = (pod.to_string(), resident());
    run("creates, one by one", &api, 1, 500, |n| post(&pod.replace('@', &format!("s{n}")))).await;
    run("creates", &api, CLIENTS, *PODS, |n| post(&pod.replace('@', &n.to_string()))).await;
    while pods.as_ref().is_some_and(|pods| pods.len() < *PODS + 500) {
        tokio::task::yield_now().await;
    }
    let each = (resident() - before) as f64 / (*PODS + 500) as f64;
    println!("{:<28} {each:>8.1} KB each", if bare { "resident" } else { "resident, with one reader" });
    let label = |n: usize| {
        let body = json!({ "metadata": { "labels": { "n": n.to_string() } } }).to_string();
        let request = Request::patch(format!("/api/v1/namespaces/default/pods/b{}", n % *PODS));
        let request = request.header("content-type", "application/merge-patch+json");
        request.body(full(body)).expect("a request")
    };
    run("patches", &api, CLIENTS, *PODS, label).await;
    run("gets", &api, CLIENTS, *PODS * 4, |n| get(&format!("/b{}", n % *PODS))).await;
    run("lists", &api, 1, 20, |_| get("")).await;
    run("first list by a label", &api, 1, 1, |_| get("?labelSelector=none%3Dsuch")).await;
    run("lists that match nothing", &api, 1, 20, |_| get("?labelSelector=none%3Dsuch")).await;
    parallel_lists(&api).await;
    watchers(&api).await;
    drop((informers, pods, api));
    restart(dir.path()).await;
}

/// What 16 readers of everything at once add to the memory.
async fn parallel_lists(api: &Arc<Api>) {
    let peer = Peer::Remote(Some(User::new("admin", &["system:masters"])));
    let before = resident();
    let answers = (0..16).map(|_| api.handle(get(""), &peer));
    let mut bodies: Vec<_> =
        futures::future::join_all(answers).await.into_iter().map(|a| a.into_body()).collect();
    let mut size = 0;
    for body in &mut bodies {
        while let Some(frame) = body.frame().await {
            size += frame.expect("a body").data_ref().map_or(0, Bytes::len);
        }
    }
    let more = resident().saturating_sub(before);
    println!("{:<28} {:>8.1} MB each, {more} KB more resident", "16 parallel lists", size as f64 / 16e6);
}

/// How long after the request for a change those who watch hear of it, while nobody waits for a stalled one.
async fn watchers(api: &Arc<Api>) {
    const WATCHERS: usize = 1000;
    /// Those whose delays count: looking into every event would cost more than delivering it.
    const MEASURED: usize = 20;
    const EVENTS: usize = 3000;
    let peer = Peer::Remote(Some(User::new("admin", &["system:masters"])));
    let path = "/api/v1/namespaces/default/configmaps";
    let (begin, delays) = (Instant::now(), Arc::new(std::sync::Mutex::new(Vec::new())));
    let mut stalled = None;
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..=WATCHERS {
        let watch = format!("{path}?watch=1&resourceVersion={}", api.registry.store.revision());
        let answer = api.handle(Request::get(watch).body(full("")).expect("a request"), &peer).await;
        if n == WATCHERS {
            stalled = Some(answer);
            continue;
        }
        let (mut body, delays) = (answer.into_body(), delays.clone());
        tasks.spawn(async move {
            let mut seen = 0;
            while seen < EVENTS {
                let frame = body.frame().await.expect("no end").expect("a chunk").into_data().expect("data");
                let now = begin.elapsed().as_nanos() as u64;
                seen += memchr::memchr_iter(b'\n', &frame).count();
                if n < MEASURED {
                    let text = String::from_utf8_lossy(&frame);
                    let sent = text
                        .split("\"sent\":\"")
                        .skip(1)
                        .filter_map(|t| t.split('"').next()?.parse::<u64>().ok());
                    delays.lock().expect("unpoisoned").extend(sent.map(|sent| now - sent));
                }
            }
        });
    }
    let cpu = cpu_seconds();
    let mut tick = tokio::time::interval(std::time::Duration::from_millis(1));
    let start = Instant::now();
    for n in 0..EVENTS {
        tick.tick().await;
        let body = json!({ "metadata": { "name": format!("w{n}") },
            "data": { "sent": begin.elapsed().as_nanos().to_string(), "payload": "x".repeat(512) } });
        let request = Request::post(path).body(full(body.to_string())).expect("a request");
        let (api, peer) = (api.clone(), peer.clone());
        tasks.spawn(async move { assert!(api.handle(request, &peer).await.status().is_success()) });
    }
    while let Some(done) = tasks.join_next().await {
        done.expect("a watcher");
    }
    drop(stalled);
    let rate = EVENTS as f64 / start.elapsed().as_secs_f64();
    let mut delays = std::mem::take(&mut *delays.lock().expect("unpoisoned"));
    delays.sort_unstable();
    let at = |share: f64| delays[((delays.len() - 1) as f64 * share) as usize] as f64 / 1e6;
    println!(
        "{:<28} {rate:>8.0} /s {:>10.1} us CPU each delivery, p50 {:.1} ms, p99 {:.1} ms after the request",
        format!("changes to {WATCHERS} watchers"),
        (cpu_seconds() - cpu) / (EVENTS * WATCHERS) as f64 * 1e6,
        at(0.5),
        at(0.99)
    );
}

/// A server that starts on all of this, until its first list is answered.
async fn restart(dir: &std::path::Path) {
    let (start, cpu) = (Instant::now(), cpu_seconds());
    let disk = Disk::open(dir).expect("a log");
    let opened = start.elapsed();
    let store = Embedded::open(disk, Options::default()).expect("opens");
    let loaded = start.elapsed();
    let api = Arc::new(common::server_on(Arc::new(store)).await);
    run("the first list after a start", &api, 1, 1, |_| get("")).await;
    let (all, cpu) = (start.elapsed(), cpu_seconds() - cpu);
    println!(
        "{:<28} {all:>8.2?}: log open at {opened:.2?}, store loaded at {loaded:.2?}, {cpu:.2} s CPU",
        "restart"
    );
}

fn post(body: &str) -> Request<knarr_apiserver::respond::Body> {
    Request::post("/api/v1/namespaces/default/pods")
        .body(full(Bytes::from(body.to_owned())))
        .expect("a request")
}

fn get(rest: &str) -> Request<knarr_apiserver::respond::Body> {
    Request::get(format!("/api/v1/namespaces/default/pods{rest}")).body(full("")).expect("a request")
}

async fn run(
    what: &str,
    api: &Arc<Api>,
    clients: usize,
    count: usize,
    request: impl Fn(usize) -> Request<knarr_apiserver::respond::Body>,
) {
    let peer = Peer::Remote(Some(User::new("admin", &["system:masters"])));
    let next = std::sync::atomic::AtomicUsize::new(0);
    let (start, cpu) = (Instant::now(), cpu_seconds());
    let workers = (0..clients).map(|_| async {
        loop {
            let n = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            if n >= count {
                return;
            }
            let answer = api.handle(request(n), &peer).await;
            assert!(answer.status().is_success(), "{}", answer.status());
            let mut body = answer.into_body();
            while let Some(frame) = body.frame().await {
                frame.expect("a body");
            }
        }
    });
    futures::future::join_all(workers).await;
    let (rate, each) =
        (count as f64 / start.elapsed().as_secs_f64(), (cpu_seconds() - cpu) / count as f64 * 1e6);
    println!("{what:<28} {rate:>8.0} /s {each:>10.0} us CPU each");
}

fn status(name: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").expect("a status");
    let line = text.lines().find(|l| l.starts_with(name)).expect("the line");
    line.split_whitespace().nth(1).expect("a number").parse().expect("a number")
}

/// KB.
fn resident() -> u64 {
    status("VmRSS:")
}

fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("a stat");
    let fields: Vec<f64> =
        stat.split_whitespace().skip(13).take(2).map(|f| f.parse().expect("ticks")).collect();
    (fields[0] + fields[1]) / 100.0
}
