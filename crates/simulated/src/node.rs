//! Nodes: their range, status and lease, as a kubelet keeps them. The status is written on change and every five
//! minutes; between, only the lease is renewed, each node's at its own moment.

use crate::Config;
use crate::addresses::{NodeRanges, PodAddresses, node_address};
use crate::pods::range_of;
use crate::profile::{self, Draw, Span};
use crate::seen::SeenPod;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::{Node, NodeCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use knarr_client::{
    Change, Client, Clock, During, Error, Informer, ObjectKey, Reconcile, Requeue, Result, or_none, patch,
};
use kube::api::{Api, Patch, PatchParams, PostParams};
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

const LEASE_NAMESPACE: &str = "kube-node-lease";
const LEASE_DURATION_S: i32 = 40;
/// Ten seconds, and a little earlier or later each time, so that thousands of nodes do not fall into step.
const LEASE_RENEW: Span = Span { least: Duration::from_millis(9_500), most: Duration::from_millis(10_500) };
const STATUS_PERIOD: Span = Span { least: Duration::from_secs(285), most: Duration::from_secs(315) };
/// Images told in the status.
const IMAGES_MAX: usize = 50;
const IMAGE_BYTES: i64 = 100 << 20;
/// What a kubelet reports: condition, status, reason and message while all is well.
const CONDITIONS: [(&str, &str, &str, &str); 4] = [
    ("MemoryPressure", "False", "KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
    ("DiskPressure", "False", "KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
    ("PIDPressure", "False", "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
    ("Ready", "True", "KubeletReady", "kubelet is posting ready status"),
];

/// All simulated nodes of the process.
pub struct Machines {
    client: Client,
    clock: Clock,
    config: Config,
    nodes: Informer<Node>,
    ranges: Arc<NodeRanges>,
    pub pods: PodAddresses,
    known: Arc<Mutex<HashMap<String, Known>>>,
}

/// What is remembered of a node.
#[derive(Default)]
struct Known {
    lease_due: Option<Instant>,
    status_due: Option<Instant>,
    renewals: i64,
    images: BTreeSet<String>,
    images_changed: bool,
    /// The capacity that was declared when the status was last written.
    capacity: Option<String>,
}

impl Machines {
    pub fn new(client: Client, clock: Clock, config: Config, nodes: Informer<Node>) -> Self {
        let ranges = Arc::new(NodeRanges::new(config.pod_range));
        let known = Arc::default();
        Machines { client, clock, config, nodes, ranges, pods: PodAddresses::default(), known }
    }

    /// Keeps the books on ranges and says which key a change concerns.
    pub fn observer(&self) -> impl Fn(&Change<Node>) -> Vec<ObjectKey> + Send + Sync + 'static {
        let (ranges, known) = (self.ranges.clone(), self.known.clone());
        move |change| {
            let node = change.object();
            let name = node.metadata.name.as_deref().unwrap_or_default();
            if change.is_deleted() {
                ranges.release(name);
                known.lock().remove(name);
            } else if let Some(range) = range_of(node) {
                ranges.hold(name, range);
            }
            vec![ObjectKey::of(&**node)]
        }
    }

    /// The node's own address; `None` as long as it has no range.
    pub fn address(&self, node: &Node) -> Option<String> {
        node_address(range_of(node)?).map(|address| address.to_string())
    }

    /// A pod's images are on its node now; the next heartbeat says so.
    pub fn ran(&self, pod: &SeenPod) {
        let mut all = self.known.lock();
        let Some(known) = all.get_mut(&pod.spec.node_name) else { return };
        for container in &pod.spec.containers {
            if known.images.len() < IMAGES_MAX && !known.images.contains(&container.image) {
                known.images.insert(container.image.clone());
                known.images_changed = true;
            }
        }
    }

    async fn take_range(&self, name: &str) -> Result<()> {
        let Some(range) = self.ranges.take(name) else {
            let range = self.config.pod_range;
            return Err(Error::not_yet(
                format!("give node {name} a range of pod addresses"),
                format!("all {} ranges of {range} are taken", range.nodes_max()),
            ));
        };
        let api: Api<Node> = Api::all(self.client.clone());
        let wanted = json!({ "spec": { "podCIDR": range, "podCIDRs": [range] } });
        or_none(patch::merge(&api, name, wanted).await).map(|_| ())
    }

    /// Writes the status where it differs or is due.
    async fn report(&self, name: &str, node: &Node, images: Vec<String>) -> Result<()> {
        let status = self.status(node, images);
        let patch = json!({ "metadata": { "uid": node.metadata.uid }, "status": status });
        let api: Api<Node> = Api::all(self.client.clone());
        let written = api.patch_status(name, &PatchParams::default(), &Patch::Strategic(patch)).await;
        or_none(written.during(|| format!("write status of node {name}"))).map(|_| ())
    }

    fn status(&self, node: &Node, images: Vec<String>) -> Value {
        let (capacity, wrong) = profile::capacity(node.metadata.annotations.as_ref());
        if let Some(wrong) = wrong {
            tracing::warn!(
                node = node.metadata.name,
                wrong,
                "the capacity of a simulated node is not understood"
            );
        }
        let name = node.metadata.name.as_deref().unwrap_or_default();
        let address = self.address(node).unwrap_or_default();
        let images: Vec<Value> =
            images.into_iter().map(|image| json!({ "names": [image], "sizeBytes": IMAGE_BYTES })).collect();
        json!({
            "capacity": capacity, "allocatable": capacity,
            "addresses": [{ "type": "InternalIP", "address": address }, { "type": "Hostname", "address": name }],
            "conditions": self.conditions(node),
            "images": images,
            "daemonEndpoints": { "kubeletEndpoint": { "Port": 10_250 } },
            "nodeInfo": {
                "architecture": "amd64", "operatingSystem": "linux", "osImage": "Simulated", "kernelVersion": "simulated",
                "containerRuntimeVersion": "simulated://1", "kubeletVersion": self.config.version, "kubeProxyVersion": "",
                "machineID": name, "systemUUID": name, "bootID": name,
            },
        })
    }

    fn conditions(&self, node: &Node) -> Vec<NodeCondition> {
        let now = self.clock.time();
        let one = |(type_, status, reason, message): &(&str, &str, &str, &str)| {
            let known = condition(node, type_).filter(|known| known.status == *status);
            NodeCondition {
                type_: (*type_).to_owned(),
                status: (*status).to_owned(),
                reason: Some((*reason).to_owned()),
                message: Some((*message).to_owned()),
                last_heartbeat_time: Some(now.clone()),
                last_transition_time: known
                    .and_then(|known| known.last_transition_time.clone())
                    .or_else(|| Some(now.clone())),
            }
        };
        CONDITIONS.iter().map(one).collect()
    }

    async fn renew(&self, name: &str, node: &Node) -> Result<()> {
        let api: Api<Lease> = Api::namespaced(self.client.clone(), LEASE_NAMESPACE);
        let now = self.clock.micro_time();
        let renewed = json!({ "spec": { "holderIdentity": name, "renewTime": now } });
        let patched = api.patch(name, &PatchParams::default(), &Patch::Merge(renewed)).await;
        if or_none(patched.during(|| format!("renew the lease of node {name}")))?.is_some() {
            return Ok(());
        }
        let owner = OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Node".to_owned(),
            name: name.to_owned(),
            uid: node.metadata.uid.clone().unwrap_or_default(),
            ..Default::default()
        };
        let lease = Lease {
            metadata: ObjectMeta {
                name: Some(name.to_owned()),
                owner_references: Some(vec![owner]),
                ..Default::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: Some(name.to_owned()),
                lease_duration_seconds: Some(LEASE_DURATION_S),
                renew_time: Some(now),
                ..Default::default()
            }),
        };
        let created = api.create(&PostParams::default(), &lease).await;
        match created.during(|| format!("create the lease of node {name}")) {
            Err(error) if !error.is_already_exists() => Err(error),
            _ => Ok(()),
        }
    }

    /// What is due, and with what.
    fn due(&self, name: &str, node: &Node) -> Due {
        let now = Instant::now();
        let mut all = self.known.lock();
        let known = all.entry(name.to_owned()).or_insert_with(|| Known {
            images: reported_images(node).map(str::to_owned).collect(),
            ..Known::default()
        });
        let passed = |at: Option<Instant>| at.is_none_or(|at| at <= now);
        let lease = passed(known.lease_due);
        let capacity = declared_capacity(node);
        let differs = !is_well(node) || known.capacity.as_deref() != Some(capacity);
        let status = passed(known.status_due) || differs || (lease && known.images_changed);
        Due {
            lease,
            status,
            capacity: capacity.to_owned(),
            images: if status { known.images.iter().cloned().collect() } else { Vec::new() },
        }
    }

    /// When the node has to be looked at again.
    fn done(&self, name: &str, due: &Due) -> Duration {
        let now = Instant::now();
        let mut all = self.known.lock();
        let Some(known) = all.get_mut(name) else { return Duration::ZERO };
        let draw = Draw { uid: name, round: known.renewals };
        if due.lease {
            known.lease_due = Some(now + LEASE_RENEW.draw(draw, "lease"));
            known.renewals += 1;
        }
        if due.status {
            known.status_due = Some(now + STATUS_PERIOD.draw(draw, "status"));
            known.images_changed &= known.images.len() != due.images.len();
            known.capacity = Some(due.capacity.clone());
        }
        let next = known.lease_due.min(known.status_due).unwrap_or(now);
        next.saturating_duration_since(now)
    }
}

struct Due {
    lease: bool,
    status: bool,
    capacity: String,
    images: Vec<String>,
}

impl Reconcile for Machines {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let Some(node) = self.nodes.get_key(&key) else { return Ok(Requeue::Done) };
        if profile::is_down(node.metadata.annotations.as_ref()) {
            return Ok(Requeue::Done);
        }
        if range_of(&node).is_none() {
            self.take_range(&key.name).await?;
            return Ok(Requeue::Done);
        }
        let due = self.due(&key.name, &node);
        if due.lease {
            self.renew(&key.name, &node).await?;
        }
        if due.status {
            self.report(&key.name, &node, due.images.clone()).await?;
        }
        Ok(Requeue::After(self.done(&key.name, &due).max(Duration::from_millis(1))))
    }
}

fn condition<'a>(node: &'a Node, type_: &str) -> Option<&'a NodeCondition> {
    node.status.as_ref()?.conditions.as_ref()?.iter().find(|condition| condition.type_ == type_)
}

/// Whether the Node's conditions say what a healthy kubelet reports.
fn is_well(node: &Node) -> bool {
    let told = |type_: &str, status: &str| condition(node, type_).is_some_and(|known| known.status == status);
    CONDITIONS.iter().all(|(type_, status, ..)| told(type_, status))
}

fn declared_capacity(node: &Node) -> &str {
    let annotations = node.metadata.annotations.as_ref();
    annotations.and_then(|all| all.get(profile::CAPACITY_KEY)).map(String::as_str).unwrap_or_default()
}

fn reported_images(node: &Node) -> impl Iterator<Item = &str> {
    let images = node.status.as_ref().and_then(|status| status.images.as_ref());
    images.into_iter().flatten().filter_map(|image| image.names.as_ref()?.first().map(String::as_str))
}
