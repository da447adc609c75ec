//! Events of bound pods. There is exactly one for each, never repeated, so there is nothing to correlate: they are
//! written by a few at once, and while pods still wait for their nodes, bindings go first. Other events are the
//! recorder's (`knarr_client`).

use crate::pod::PodInfo;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::Client;
use kube::client::Body;
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;

/// Events waiting to be written; more are dropped.
const WAITING_MAX: usize = 20_000;
/// With so many waiting, they no longer give way.
const YIELDING_MAX: usize = WAITING_MAX / 2;
/// Events under way at once, with pods waiting and without.
const AT_ONCE_BUSY: usize = 1;
const AT_ONCE: usize = 32;
/// How often one write is tried when there is no answer.
const TRIES_MAX: u32 = 5;

/// Clones share the task that writes; it ends when all are dropped and everything is written.
#[derive(Clone)]
pub struct Announcer {
    sender: mpsc::Sender<Binding>,
    busy: Arc<AtomicBool>,
}

struct Binding {
    pod: Arc<PodInfo>,
    node: Arc<str>,
    at: Time,
}

impl Announcer {
    /// Must run inside tokio.
    pub fn new(client: Client) -> Self {
        let (sender, receiver) = mpsc::channel(WAITING_MAX);
        let busy = Arc::new(AtomicBool::new(false));
        tokio::spawn(write_all(client, receiver, busy.clone()));
        Announcer { sender, busy }
    }

    /// Whether pods wait for their nodes.
    pub fn set_busy(&self, busy: bool) {
        self.busy.store(busy, Ordering::Relaxed);
    }

    /// The pod was bound.
    pub fn bound(&self, pod: &Arc<PodInfo>, node: &Arc<str>, at: Time) {
        let binding = Binding { pod: pod.clone(), node: node.clone(), at };
        if self.sender.try_send(binding).is_err() {
            tracing::debug!(pod = %pod.key, "event dropped, too many wait");
        }
    }
}

async fn write_all(client: Client, mut receiver: mpsc::Receiver<Binding>, busy: Arc<AtomicBool>) {
    let mut under_way = FuturesUnordered::new();
    loop {
        let yields = busy.load(Ordering::Relaxed) && receiver.len() < YIELDING_MAX;
        let at_once = if yields { AT_ONCE_BUSY } else { AT_ONCE };
        tokio::select! {
            Some(()) = under_way.next() => {}
            binding = receiver.recv(), if under_way.len() < at_once => match binding {
                Some(binding) => under_way.push(write(client.clone(), binding)),
                None => break,
            },
        }
    }
    while under_way.next().await.is_some() {}
}

async fn write(client: Client, binding: Binding) {
    let Binding { pod, node, at } = binding;
    for attempt in 1..=TRIES_MAX {
        let request = match request(&pod, &node, &at) {
            Ok(request) => request,
            Err(error) => return tracing::debug!(pod = %pod.key, %error, "no request for the event"),
        };
        // The answer is the event as it was stored: nobody wants to read that.
        match client.send(request).await {
            Ok(answer) if answer.status().is_success() => return,
            Ok(answer) => {
                return tracing::debug!(pod = %pod.key, status = answer.status().as_u16(), "event refused");
            }
            Err(error) => {
                tracing::debug!(attempt, %error, "event not written, retrying");
                tokio::time::sleep(Duration::from_millis(200) * attempt).await;
            }
        }
    }
}

fn request(pod: &PodInfo, node: &str, at: &Time) -> Result<http::Request<Body>, http::Error> {
    let (namespace, name, source) = (&pod.key.namespace, &pod.key.name, pod.scheduler_name());
    let event = json!({
        "apiVersion": "v1", "kind": "Event",
        "metadata": {"name": format!("{name}.{:x}", at.0.as_nanosecond()), "namespace": namespace},
        "involvedObject": {
            "apiVersion": "v1", "kind": "Pod", "namespace": namespace, "name": name, "uid": pod.uid(),
            "resourceVersion": pod.pod.metadata.resource_version,
        },
        "type": "Normal", "reason": "Scheduled",
        "message": format!("Successfully assigned {namespace}/{name} to {node}"),
        "source": {"component": source}, "reportingComponent": source, "reportingInstance": "",
        "firstTimestamp": at, "lastTimestamp": at, "count": 1,
    });
    http::Request::post(format!("/api/v1/namespaces/{namespace}/events"))
        .header("content-type", "application/json")
        .body(Body::from(event.to_string().into_bytes()))
}
