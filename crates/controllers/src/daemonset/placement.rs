//! On which nodes a daemon's pod belongs, and how a pod is tied to one.

use crate::pods;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{
    Affinity, Node, NodeAffinity, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, Pod, PodSpec,
    Taint, Toleration,
};
use knarr_client::{Change, Informer, ObjectKey, placement};
use std::sync::Arc;

/// What daemons tolerate whatever their template says: they belong on troubled nodes too.
const TOLERATED: [(&str, &str); 6] = [
    ("node.kubernetes.io/not-ready", "NoExecute"),
    ("node.kubernetes.io/unreachable", "NoExecute"),
    ("node.kubernetes.io/disk-pressure", "NoSchedule"),
    ("node.kubernetes.io/memory-pressure", "NoSchedule"),
    ("node.kubernetes.io/pid-pressure", "NoSchedule"),
    ("node.kubernetes.io/unschedulable", "NoSchedule"),
];
const NETWORK_UNAVAILABLE: &str = "node.kubernetes.io/network-unavailable";

/// Whether a pod should be started on a node, and whether one that is there may stay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    pub should_run: bool,
    pub may_stay: bool,
}

pub fn verdict(set: &DaemonSet, node: &Node) -> Verdict {
    let never = Verdict { should_run: false, may_stay: false };
    let Some(mut spec) = set.spec.as_ref().and_then(|spec| spec.template.spec.clone()) else { return never };
    let name = node.metadata.name.clone().unwrap_or_default();
    if spec.node_name.as_deref().is_some_and(|wanted| !wanted.is_empty() && wanted != name) {
        return never;
    }
    let labels = node.metadata.labels.clone().unwrap_or_default();
    if !placement::selects_node(&spec, &labels, &name) {
        return never;
    }
    tolerate(&mut spec);
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    let untolerated: Vec<&Taint> =
        taints.filter(|taint| !placement::tolerates(spec.tolerations.as_ref(), taint)).collect();
    let any = |effects: &[&str]| untolerated.iter().any(|taint| effects.contains(&taint.effect.as_str()));
    Verdict { should_run: !any(&["NoSchedule", "NoExecute"]), may_stay: !any(&["NoExecute"]) }
}

fn tolerate(spec: &mut PodSpec) {
    let host_network = spec.host_network == Some(true);
    let more = host_network.then_some((NETWORK_UNAVAILABLE, "NoSchedule"));
    for (key, effect) in TOLERATED.into_iter().chain(more) {
        let toleration = Toleration {
            key: Some(key.to_owned()),
            operator: Some("Exists".to_owned()),
            effect: Some(effect.to_owned()),
            ..Default::default()
        };
        let tolerations = spec.tolerations.get_or_insert_default();
        if !tolerations.contains(&toleration) {
            tolerations.push(toleration);
        }
    }
}

/// Ties a pod to a node by affinity, so that the scheduler still checks resources and binds it.
pub fn pin(pod: &mut Pod, node: &str) {
    let Some(spec) = pod.spec.as_mut() else { return };
    tolerate(spec);
    let only = NodeSelectorRequirement {
        key: "metadata.name".to_owned(),
        operator: "In".to_owned(),
        values: Some(vec![node.to_owned()]),
    };
    let term = NodeSelectorTerm { match_fields: Some(vec![only]), match_expressions: None };
    let affinity = spec.affinity.get_or_insert_with(Affinity::default);
    let node_affinity = affinity.node_affinity.get_or_insert_with(NodeAffinity::default);
    // The wish of the template was checked already; it is replaced, as upstream does.
    node_affinity.required_during_scheduling_ignored_during_execution =
        Some(NodeSelector { node_selector_terms: vec![term] });
}

/// The node a pod runs on or is tied to.
pub fn target_node(pod: &Pod) -> Option<String> {
    if let Some(node) = pods::node_of(pod) {
        return Some(node.to_owned());
    }
    let affinity = pod.spec.as_ref()?.affinity.as_ref()?.node_affinity.as_ref()?;
    let required = affinity.required_during_scheduling_ignored_during_execution.as_ref()?;
    let mut fields = required.node_selector_terms.iter().flat_map(|term| term.match_fields.iter().flatten());
    let field = fields.find(|field| field.key == "metadata.name" && field.operator == "In")?;
    field.values.as_ref()?.first().cloned()
}

/// The daemon sets a node's change concerns: those whose verdict about it changed.
pub fn sets_concerned(sets: &Informer<DaemonSet>, change: &Change<Node>) -> Vec<ObjectKey> {
    let concerned = |set: &&Arc<DaemonSet>| match change.old() {
        Some(old) => verdict(set, old) != verdict(set, change.object()),
        None => change.is_deleted() || verdict(set, change.object()).should_run,
    };
    sets.list().iter().filter(concerned).map(|set| ObjectKey::of(&**set)).collect()
}
