//! Node lifecycle: nodes that stop reporting become `Unknown`; conditions become taints; and pods leave nodes whose
//! `NoExecute` taints they do not tolerate (for longer than they say).

mod eviction;
mod zones;

pub use eviction::start_eviction;
pub use zones::EvictionRates;

use crate::pods::{self, BY_NODE};
use crate::{Context, util};
use futures::future::BoxFuture;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, NodeCondition, ObjectReference, Pod, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use knarr_client::informer::Selection;
use knarr_client::{
    Controller, During, EventType, Informer, ObjectKey, Reconcile, Recorder, Requeue, Result,
};
use knarr_client::{ignore_gone, patch};
use kube::api::{Api, Patch, PatchParams};
use parking_lot::Mutex;
use serde_json::json;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use zones::{Fleet, Verdict};

const LEASES: &str = "kube-node-lease";
const NOT_READY: &str = "node.kubernetes.io/not-ready";
const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
const NO_SCHEDULE: &str = "NoSchedule";
const NO_EXECUTE: &str = "NoExecute";
/// Condition, the status that taints, and the taint that keeps new pods away.
const CONDITION_TAINTS: [(&str, &str, &str); 6] = [
    ("Ready", "False", NOT_READY),
    ("Ready", "Unknown", UNREACHABLE),
    ("MemoryPressure", "True", "node.kubernetes.io/memory-pressure"),
    ("DiskPressure", "True", "node.kubernetes.io/disk-pressure"),
    ("NetworkUnavailable", "True", "node.kubernetes.io/network-unavailable"),
    ("PIDPressure", "True", "node.kubernetes.io/pid-pressure"),
];
const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";
/// Conditions a kubelet reports, which nobody can vouch for once it is silent.
const REPORTED: [&str; 4] = ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"];

pub fn start(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let nodes = context.informers.get::<Node>();
    let all_pods = context.informers.get::<Pod>();
    pods::index_by_node(&all_pods);
    let leases = context.informers.select::<Lease>(Selection::namespace(LEASES));
    let of_lease = |lease: &Lease| lease.metadata.name.iter().map(ObjectKey::cluster).collect();
    let fleet = Arc::new(Mutex::new(Fleet::default()));
    let (counted, rates) = (fleet.clone(), context.config.eviction_rates);
    let controller = Controller::new("node-lifecycle")
        // A zone, or the whole cluster, that breaks down or recovers concerns the others that are in it.
        .watch_changes(&nodes, move |change| {
            let node = change.object();
            let name = node.metadata.name.clone().unwrap_or_default();
            let present = (!change.is_deleted()).then_some(&**node);
            let mut names = counted.lock().count(&name, present, &rates);
            names.push(name);
            names.into_iter().map(ObjectKey::cluster).collect()
        })
        .watch_map(&leases, of_lease)
        .needs(&all_pods);
    let recorder = context.recorder.for_component("node-controller");
    let this =
        Lifecycle { context, recorder, nodes, leases, pods: all_pods, fleet, health: Mutex::default() };
    Box::pin(controller.run(Arc::new(this), shutdown))
}

struct Lifecycle {
    context: Context,
    recorder: Recorder,
    nodes: Informer<Node>,
    leases: Informer<Lease>,
    pods: Informer<Pod>,
    fleet: Arc<Mutex<Fleet>>,
    health: Mutex<HashMap<String, Health>>,
}

/// What was last seen of a node, and when, by our own clock: its clock may be wrong.
struct Health {
    uid: Option<String>,
    seen: Sign,
    since: Instant,
}

/// What a living kubelet keeps changing.
#[derive(Clone, PartialEq, Default)]
struct Sign {
    lease: Option<jiff::Timestamp>,
    heartbeat: Option<Time>,
    ready: Option<String>,
}

impl Reconcile for Lifecycle {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let Some(node) = self.nodes.get_key(&key) else {
            let known = self.health.lock().remove(&key.name);
            if let Some(known) = known {
                self.tell_of_removal(&key.name, known.uid);
            }
            return Ok(Requeue::Done);
        };
        let left = self.time_left(&node);
        let silent = left.is_zero();
        if silent {
            self.mark_unknown(&node).await?;
        }
        let patience = self.write_taints(&node, silent).await?;
        if silent || ready_status(&node) != "True" {
            self.mark_pods(&key.name).await?;
        }
        Ok(patience.sooner(if silent { Requeue::Done } else { Requeue::After(left) }))
    }
}

fn ready_status(node: &Node) -> &str {
    let status = node.status.as_ref();
    status
        .and_then(|status| util::find(&status.conditions, "Ready"))
        .map_or("", |ready| ready.status.as_str())
}

impl Lifecycle {
    /// Until when the node may stay silent; zero when that has passed.
    fn time_left(&self, node: &Node) -> Duration {
        let name = node.metadata.name.clone().unwrap_or_default();
        let ready = node.status.as_ref().and_then(|status| util::find(&status.conditions, "Ready"));
        let lease = self.leases.get(LEASES, &name);
        let seen = Sign {
            lease: lease.and_then(|lease| Some(lease.spec.as_ref()?.renew_time.as_ref()?.0)),
            heartbeat: ready.and_then(|ready| ready.last_heartbeat_time.clone()),
            // Our own verdict is no sign of life.
            ready: ready.map(|ready| ready.status.clone()).filter(|status| status != "Unknown"),
        };
        let config = &self.context.config;
        let grace = if ready.is_some() { config.node_grace } else { config.node_startup_grace };
        let now = Instant::now();
        let mut health = self.health.lock();
        let fresh = !health.contains_key(&name);
        let entry = health.entry(name.clone()).or_insert_with(|| Health {
            uid: node.metadata.uid.clone(),
            seen: seen.clone(),
            since: now,
        });
        if entry.seen != seen {
            // What we wrote ourselves is remembered, so that the kubelet's next word differs, but it is no sign of life.
            let since = if is_only_our_verdict(&entry.seen, &seen) { entry.since } else { now };
            *entry = Health { uid: node.metadata.uid.clone(), seen, since };
        }
        let left = grace.saturating_sub(entry.since.elapsed());
        drop(health);
        if fresh {
            let message = format!("Node {name} event: Registered Node {name} in Controller");
            self.recorder.event(node, EventType::Normal, "RegisteredNode", message);
        }
        left
    }

    fn tell_of_removal(&self, name: &str, uid: Option<String>) {
        tracing::info!(node = name, "node is gone");
        let about = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Node".to_owned()),
            name: Some(name.to_owned()),
            uid,
            ..Default::default()
        };
        let message = format!("Node {name} event: Removing Node {name} from Controller");
        self.recorder.event_about(about, EventType::Normal, "RemovingNode", message);
    }

    async fn mark_unknown(&self, node: &Node) -> Result<()> {
        let conditions = node.status.as_ref().and_then(|status| status.conditions.clone());
        let now = self.context.clock.time();
        let mut changed = Vec::new();
        for type_ in REPORTED {
            match util::find(&conditions, type_) {
                None => changed.push(NodeCondition {
                    type_: type_.to_owned(),
                    status: "Unknown".to_owned(),
                    reason: Some("NodeStatusNeverUpdated".to_owned()),
                    message: Some("Kubelet never posted node status.".to_owned()),
                    last_heartbeat_time: node.metadata.creation_timestamp.clone(),
                    last_transition_time: Some(now.clone()),
                }),
                Some(known) if known.status != "Unknown" => changed.push(NodeCondition {
                    status: "Unknown".to_owned(),
                    reason: Some("NodeStatusUnknown".to_owned()),
                    message: Some("Kubelet stopped posting node status.".to_owned()),
                    last_transition_time: Some(now.clone()),
                    ..known.clone()
                }),
                Some(_) => {}
            }
        }
        if changed.is_empty() {
            return Ok(());
        }
        let name = node.metadata.name.as_deref().unwrap_or_default();
        tracing::warn!(node = name, "node stopped reporting");
        let message = format!("Node {name} status is now: NodeNotReady");
        self.recorder.event(node, EventType::Normal, "NodeNotReady", message);
        let api: Api<Node> = Api::all(self.context.client.clone());
        let change = json!({"metadata": {"uid": node.metadata.uid}, "status": {"conditions": changed}});
        let patched = api.patch_status(name, &PatchParams::default(), &Patch::Strategic(change)).await;
        ignore_gone(patched.during(|| format!("write conditions of node {name}")))
    }

    /// Brings our taints in line with the conditions; others' taints stay. When to try again what may not be done yet.
    async fn write_taints(&self, node: &Node, silent: bool) -> Result<Requeue> {
        let present = node.spec.as_ref().and_then(|spec| spec.taints.clone()).unwrap_or_default();
        let (wanted, patience) = self.wanted_taints(node, silent);
        let mut taints: Vec<Taint> = present
            .iter()
            .filter(|taint| {
                // A node that never reported keeps the taint it was registered with.
                let unreported =
                    taint.key == NOT_READY && taint.effect == NO_SCHEDULE && ready_status(node).is_empty();
                !is_ours(taint) || unreported || wanted.iter().any(|wanted| same(wanted, taint))
            })
            .cloned()
            .collect();
        let missing: Vec<_> =
            wanted.into_iter().filter(|taint| !present.iter().any(|known| same(known, taint))).collect();
        taints
            .extend(missing.into_iter().map(|taint| Taint { time_added: self.time_added(&taint), ..taint }));
        if taints == present {
            return Ok(patience);
        }
        let name = node.metadata.name.as_deref().unwrap_or_default();
        let api: Api<Node> = Api::all(self.context.client.clone());
        let change = json!({
            "metadata": {"uid": node.metadata.uid, "resourceVersion": node.metadata.resource_version},
            "spec": {"taints": taints},
        });
        ignore_gone(patch::merge(&api, name, change).await)?;
        Ok(patience)
    }

    fn time_added(&self, taint: &Taint) -> Option<Time> {
        (taint.effect == NO_EXECUTE).then(|| self.context.clock.time())
    }

    fn wanted_taints(&self, node: &Node, silent: bool) -> (Vec<Taint>, Requeue) {
        let conditions = node.status.as_ref().and_then(|status| status.conditions.clone());
        let status_of = |type_: &str| match util::find(&conditions, type_) {
            _ if silent && type_ == "Ready" => Some("Unknown".to_owned()),
            condition => condition.map(|condition| condition.status.clone()),
        };
        let taint = |key: &str, effect: &str| Taint {
            key: key.to_owned(),
            effect: effect.to_owned(),
            ..Default::default()
        };
        let mut wanted: Vec<Taint> = CONDITION_TAINTS
            .iter()
            .filter(|(type_, status, _)| status_of(type_).as_deref() == Some(status))
            .map(|(_, _, key)| taint(key, NO_SCHEDULE))
            .collect();
        if node.spec.as_ref().and_then(|spec| spec.unschedulable).unwrap_or(false) {
            wanted.push(taint(UNSCHEDULABLE, NO_SCHEDULE));
        }
        let key = match status_of("Ready").as_deref() {
            Some("False") => NOT_READY,
            Some("Unknown") => UNREACHABLE,
            _ => return (wanted, Requeue::Done),
        };
        let patience = match self.may_give_up(node) {
            Verdict::Now => {
                wanted.push(taint(key, NO_EXECUTE));
                Requeue::Done
            }
            Verdict::At(then) => Requeue::After(then.saturating_duration_since(Instant::now())),
            Verdict::No => Requeue::Done,
        };
        (wanted, patience)
    }

    /// Whether the pods of a node that is down shall leave it. Once begun it goes on, except when no node at all reports.
    fn may_give_up(&self, node: &Node) -> Verdict {
        let (name, rates) =
            (node.metadata.name.as_deref().unwrap_or_default(), &self.context.config.eviction_rates);
        let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
        let begun = taints.into_iter().any(|taint| taint.effect == NO_EXECUTE && is_ours(taint));
        let mut fleet = self.fleet.lock();
        if begun && !fleet.all_are_down(rates) {
            fleet.given_up(name);
            return Verdict::Now;
        }
        fleet.ask(name, rates, Instant::now())
    }

    /// Pods of a node that is not ready are not ready either, so that Services leave them out.
    async fn mark_pods(&self, node: &str) -> Result<()> {
        for pod in self.pods.by_index(BY_NODE, node).iter().filter(|pod| pods::is_ready(pod)) {
            let key = ObjectKey::of(&**pod);
            self.recorder.event(&**pod, EventType::Warning, "NodeNotReady", "Node is not ready");
            let ready = json!({
                "type": "Ready", "status": "False", "lastTransitionTime": self.context.clock.time(),
                "observedGeneration": pod.metadata.generation,
            });
            let change = json!({"metadata": {"uid": pod.metadata.uid}, "status": {"conditions": [ready]}});
            let api: Api<Pod> = Api::namespaced(self.context.client.clone(), &key.namespace);
            let patched =
                api.patch_status(&key.name, &PatchParams::default(), &Patch::Strategic(change)).await;
            ignore_gone(patched.during(|| format!("mark pod {key} not ready")))?;
        }
        Ok(())
    }
}

/// The difference is only that we declared the node `Unknown`.
fn is_only_our_verdict(old: &Sign, new: &Sign) -> bool {
    new.ready.is_none() && old.lease == new.lease && old.heartbeat == new.heartbeat
}

fn is_ours(taint: &Taint) -> bool {
    let by_condition =
        CONDITION_TAINTS.iter().any(|(_, _, key)| *key == taint.key) || taint.key == UNSCHEDULABLE;
    match taint.effect.as_str() {
        NO_SCHEDULE => by_condition,
        NO_EXECUTE => taint.key == NOT_READY || taint.key == UNREACHABLE,
        _ => false,
    }
}

fn same(a: &Taint, b: &Taint) -> bool {
    a.key == b.key && a.effect == b.effect
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::Harness;
    use k8s_openapi::api::core::v1::Event;

    fn node(name: &str) -> serde_json::Value {
        json!({"metadata": {"name": name}, "status": {"conditions": [{"type": "Ready", "status": "True"}]}})
    }

    fn taints(node: &Node) -> Vec<(String, String)> {
        let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
        let mut taints: Vec<_> = taints.map(|taint| (taint.key.clone(), taint.effect.clone())).collect();
        taints.sort();
        taints
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_node_is_tainted_its_pods_evicted_and_all_is_well_when_it_comes_back() {
        let harness = Harness::quiet();
        harness.start(start);
        harness.start(start_eviction);
        for name in ["alive", "silent"] {
            harness.create_global::<Node>(node(name)).await;
        }
        let tolerations = json!([{"key": UNREACHABLE, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}]);
        let pod = json!({
            "metadata": {"name": "p"},
            "spec": {"containers": [], "nodeName": "silent", "tolerations": tolerations},
        });
        harness.create::<Pod>(pod).await;
        harness.make_ready("p").await;
        let heartbeats = {
            let (client, clock) = (harness.client(), harness.context.clock.clone());
            tokio::spawn(async move {
                let api: Api<Lease> = Api::namespaced(client, LEASES);
                loop {
                    let lease =
                        json!({"metadata": {"name": "alive"}, "spec": {"renewTime": clock.micro_time()}});
                    let lease: Lease = serde_json::from_value(lease).unwrap();
                    if api.create(&Default::default(), &lease).await.is_err() {
                        let spec = json!({"spec": lease.spec});
                        let _ = api.patch("alive", &PatchParams::default(), &Patch::Merge(spec)).await;
                    }
                    tokio::time::sleep(Duration::from_secs(10)).await;
                }
            })
        };
        let began = Instant::now();
        let tainted = |nodes: &[Node]| {
            let silent = nodes.iter().find(|node| node.metadata.name.as_deref() == Some("silent")).unwrap();
            taints(silent)
                == [
                    (UNREACHABLE.to_owned(), NO_EXECUTE.to_owned()),
                    (UNREACHABLE.to_owned(), NO_SCHEDULE.to_owned()),
                ]
        };
        let nodes = harness.api.wait_for::<Node>("the taints", tainted).await;
        assert!((50..52).contains(&began.elapsed().as_secs()));
        assert!(taints(&nodes[0]).is_empty(), "a node that renews its lease is alive");
        harness.api.wait_for::<Pod>("the pod not ready", |pods| !pods::is_ready(&pods[0])).await;
        harness.api.wait_for::<Pod>("the pod deleted", |pods| pods::is_terminating(&pods[0])).await;
        let elapsed = began.elapsed().as_secs();
        // Taints carry whole seconds.
        assert!((349..353).contains(&elapsed), "50 s until unknown and 300 s tolerated, not {elapsed}");
        let api: Api<Node> = Api::all(harness.client());
        let ready = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}});
        api.patch_status("silent", &PatchParams::default(), &Patch::Merge(ready)).await.unwrap();
        harness
            .api
            .wait_for::<Node>("no taints", |nodes| nodes.iter().all(|node| taints(node).is_empty()))
            .await;
        heartbeats.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn when_no_node_reports_nobody_is_evicted() {
        let harness = Harness::quiet();
        harness.start(start);
        for name in ["a", "b"] {
            harness.create_global::<Node>(node(name)).await;
        }
        let unreachable = |nodes: &[Node]| {
            nodes.iter().all(|node| taints(node) == [(UNREACHABLE.to_owned(), NO_SCHEDULE.to_owned())])
        };
        harness.api.wait_for::<Node>("both unreachable, no eviction", unreachable).await;
        harness.api.settle(Duration::from_secs(200)).await;
        assert!(unreachable(&harness.api.objects::<Node>()));
    }

    #[tokio::test(start_paused = true)]
    async fn nodes_that_come_and_go_are_told_of() {
        let harness = Harness::quiet();
        harness.start(start);
        harness.create_global::<Node>(node("n1")).await;
        let told = |message: &'static str| {
            move |events: &[Event]| events.iter().any(|event| event.message.as_deref() == Some(message))
        };
        harness.api.wait_for("coming", told("Node n1 event: Registered Node n1 in Controller")).await;
        let api: Api<Node> = Api::all(harness.client());
        api.delete("n1", &Default::default()).await.unwrap();
        harness.api.wait_for("going", told("Node n1 event: Removing Node n1 from Controller")).await;
    }

    fn given_up(nodes: &[Node]) -> usize {
        let evicts = |node: &&Node| taints(node).iter().any(|(_, effect)| effect == NO_EXECUTE);
        nodes.iter().filter(evicts).count()
    }

    /// Nodes of a zone: so many that renew their lease, so many that do not.
    async fn zone(
        harness: &Harness,
        zone: &str,
        alive: usize,
        silent: usize,
    ) -> Vec<tokio::task::JoinHandle<()>> {
        let mut beating = Vec::new();
        for n in 0..alive + silent {
            let name = format!("{zone}{n}");
            let mut node = node(&name);
            node["metadata"]["labels"] = json!({"topology.kubernetes.io/zone": zone});
            harness.create_global::<Node>(node).await;
            if n < alive {
                let (client, clock) = (harness.client(), harness.context.clock.clone());
                beating.push(tokio::spawn(async move {
                    let api: Api<Lease> = Api::namespaced(client, LEASES);
                    let lease =
                        json!({"metadata": {"name": name}, "spec": {"renewTime": clock.micro_time()}});
                    let lease: Lease = serde_json::from_value(lease).unwrap();
                    api.create(&Default::default(), &lease).await.unwrap();
                    loop {
                        tokio::time::sleep(Duration::from_secs(10)).await;
                        let spec = json!({"spec": {"renewTime": clock.micro_time()}});
                        api.patch(&name, &PatchParams::default(), &Patch::Merge(spec)).await.unwrap();
                    }
                }));
            }
        }
        beating
    }

    #[tokio::test(start_paused = true)]
    async fn nodes_are_given_up_one_after_the_other_and_each_zone_at_its_own_pace() {
        let harness = Harness::quiet();
        harness.start(start);
        let began = Instant::now();
        let mut beating = zone(&harness, "a", 5, 3).await;
        beating.extend(zone(&harness, "b", 5, 1).await);
        for (count, from) in [(2, 50), (3, 60), (4, 70)] {
            harness.api.wait_for::<Node>("one more", |nodes| given_up(nodes) == count).await;
            let elapsed = began.elapsed().as_secs();
            assert!((from..from + 2).contains(&elapsed), "{count} after {from} s, not {elapsed}");
        }
        beating.iter().for_each(|task| task.abort());
    }

    #[tokio::test(start_paused = true)]
    async fn a_small_zone_that_is_mostly_down_is_left_alone_until_it_is_better() {
        let harness = Harness::quiet();
        harness.start(start);
        let mut beating = zone(&harness, "a", 3, 5).await;
        beating.extend(zone(&harness, "b", 1, 0).await);
        let down = |nodes: &[Node]| nodes.iter().filter(|node| ready_status(node) == "Unknown").count() == 5;
        harness.api.wait_for::<Node>("five down", down).await;
        tokio::time::sleep(Duration::from_secs(600)).await;
        // While it breaks down one may be given up before the others are seen to be down.
        let before = given_up(&harness.api.objects::<Node>());
        assert!(before <= 3, "not {before}");
        tokio::time::sleep(Duration::from_secs(600)).await;
        assert_eq!(given_up(&harness.api.objects::<Node>()), before);
        beating.extend(zone_of_more(&harness, 4).await);
        harness.api.wait_for::<Node>("all that are down", |nodes| given_up(nodes) == 5).await;
        beating.iter().for_each(|task| task.abort());
    }

    /// More nodes for zone `a` that are alive.
    async fn zone_of_more(harness: &Harness, count: usize) -> Vec<tokio::task::JoinHandle<()>> {
        let beating = zone(harness, "more", count, 0).await;
        let api: Api<Node> = Api::all(harness.client());
        for n in 0..count {
            let labels = json!({"metadata": {"labels": {"topology.kubernetes.io/zone": "a"}}});
            api.patch(&format!("more{n}"), &PatchParams::default(), &Patch::Merge(labels)).await.unwrap();
        }
        beating
    }
}
