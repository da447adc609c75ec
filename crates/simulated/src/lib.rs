//! Simulated nodes: Nodes without a machine, whose pods start, become ready, end and fail by declaration.
//!
//! A Node with the label [`NODE_LABEL`] is played by [`run`]: it gets a range of pod addresses, a status and a lease
//! that is renewed, and the pods bound to it live the life that the annotations of [`profile`] describe. All nodes of a
//! process share one watch on pods and one queue of deadlines, so that thousands of them cost little and an idle one
//! costs its lease.
//!
//! Nothing is remembered that the objects do not tell: what happens next to a pod follows from its status, its
//! annotations and its uid ([`life`]). A restarted process goes on where the last one stopped.
//!
//! Invariant: a simulated node is a client of the API like any kubelet. Scheduler, controllers and admission cannot
//! tell it from a real one, except by label and taint.

/// Pod addresses: a range for each node, an address for each pod.
mod addresses;
/// What happens next to a pod: a pure function.
pub mod life;
/// Nodes: range, status, lease.
mod node;
/// Pods: carrying out what [`life`] decides.
mod pods;
/// What nodes and pods declare: delays and chances.
pub mod profile;
/// The little of a pod that a simulated node needs to know.
pub mod seen;

pub use addresses::Range;

use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{Node, NodeSpec, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use knarr_client::informer::Selection;
use knarr_client::{Client, Clock, Controller, Informers, Recorder};
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// Marks a Node as simulated; the value is `true`. The taint of simulated nodes has the same key.
pub const NODE_LABEL: &str = "simulated.knarr.dev/node";
/// Where simulated pods get their addresses unless told otherwise: 16,384 nodes of 254 pods. Shared address space
/// (RFC 6598), so that neither the pods of real nodes nor the machine's own network are hit.
pub const POD_RANGE: &str = "100.64.0.0/10";
/// How many nodes and how many pods are worked on at a time.
const NODES_AT_A_TIME: usize = 32;
const PODS_AT_A_TIME: usize = 128;

/// Settings of all simulated nodes of a process.
#[derive(Clone, Debug)]
pub struct Config {
    /// Nodes get their `podCIDR` (a /24 each) from here.
    pub pod_range: Range,
    /// The Kubernetes version the nodes report.
    pub version: String,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            pod_range: POD_RANGE.parse().expect("the default is a range"),
            version: "v1.36.0".to_owned(),
        }
    }
}

/// Plays every simulated node of the cluster until `shutdown`. `client` needs to read pods, and to write nodes, leases,
/// events and the status of pods. Without simulated nodes it costs one idle watch.
pub fn run(
    client: Client,
    clock: Clock,
    config: Config,
    shutdown: CancellationToken,
) -> BoxFuture<'static, ()> {
    Box::pin(async move {
        let informers = Informers::new(client.clone());
        let labels = format!("{NODE_LABEL}=true");
        let nodes = informers.select::<Node>(Selection { labels, ..Default::default() });
        let first = nodes.subscribe();
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = first.next() => {}
        }
        let recorder = Recorder::new(client.clone(), clock.clone(), "kubelet", "");
        let everywhere = Selection::fields("spec.nodeName!=");
        let seen = informers.select::<seen::SeenPod>(everywhere);
        let machines = node::Machines::new(client.clone(), clock.clone(), config, nodes.clone());
        let on_nodes = Controller::new("simulated-nodes")
            .concurrency(NODES_AT_A_TIME)
            .watch_changes(&nodes, machines.observer())
            .needs(&seen);
        let machines = Arc::new(machines);
        let life = pods::Pods::new(client, clock, recorder, nodes.clone(), seen.clone(), machines.clone());
        let on_pods = life.wire(Controller::new("simulated-pods").concurrency(PODS_AT_A_TIME));
        let nodes = on_nodes.run(machines, shutdown.clone());
        futures::future::join(nodes, on_pods.run(Arc::new(life), shutdown)).await;
    })
}

/// A simulated node to be created.
#[derive(Clone, Debug, Default)]
pub struct NewNode {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    /// Keeps pods away that do not tolerate the taint [`NODE_LABEL`].
    pub tainted: bool,
}

impl NewNode {
    /// The object to create; [`run`] does the rest.
    pub fn object(self) -> Node {
        let NewNode { name, mut labels, annotations, tainted } = self;
        labels.insert(NODE_LABEL.to_owned(), "true".to_owned());
        for (key, value) in [
            ("kubernetes.io/hostname", name.as_str()),
            ("kubernetes.io/os", "linux"),
            ("kubernetes.io/arch", "amd64"),
        ] {
            labels.entry(key.to_owned()).or_insert_with(|| value.to_owned());
        }
        let taint = Taint {
            key: NODE_LABEL.to_owned(),
            value: Some("true".to_owned()),
            effect: "NoSchedule".to_owned(),
            time_added: None,
        };
        Node {
            metadata: ObjectMeta {
                name: Some(name),
                labels: Some(labels),
                annotations: (!annotations.is_empty()).then_some(annotations),
                ..Default::default()
            },
            spec: tainted.then(|| NodeSpec { taints: Some(vec![taint]), ..Default::default() }),
            status: None,
        }
    }
}
