//! The rules, as twins: each module has one `PLUGIN` with the same fields, and one line in [`PLUGINS`]. Order,
//! weights and wording are those of upstream's default profile.

mod balanced_allocation;
mod fit;
mod inter_pod_affinity;
mod node_affinity;
mod node_name;
mod node_ports;
mod taint_toleration;
mod topology_spread;
mod unschedulable;
mod volumes;

use crate::pod::PodInfo;
use crate::table::{NodeTable, Slot};
use std::borrow::Cow;

/// In the order filters run; the first that refuses a node gives the reason.
pub const PLUGINS: &[Plugin] = &[
    unschedulable::PLUGIN,
    node_name::PLUGIN,
    taint_toleration::PLUGIN,
    node_affinity::PLUGIN,
    node_ports::PLUGIN,
    fit::PLUGIN,
    volumes::PLUGIN,
    topology_spread::PLUGIN,
    inter_pod_affinity::PLUGIN,
    balanced_allocation::PLUGIN,
];

/// Works out once per cycle what the filter needs; an error refuses the pod whatever the node.
type Prepare = fn(&mut Cycle) -> Result<(), String>;

/// One rule.
pub struct Plugin {
    pub name: &'static str,
    /// Called once per cycle, before any filter. An error refuses the pod whatever the node, with this reason.
    pub prepare: Option<Prepare>,
    /// Whether the pod may run on the node. Pure; called at most once per node and cycle.
    pub filter: Option<fn(&Cycle, Slot) -> Verdict>,
    /// How well the node suits; called for nodes that passed all filters.
    pub score: Option<Score>,
    /// Whether an event may turn this rule's refusal of the pod around. A wrong "no" leaves the pod waiting for ever,
    /// a wrong "yes" costs one cycle.
    pub wakes: fn(&ClusterEvent, &PodInfo) -> bool,
}

pub struct Score {
    pub weight: i64,
    pub raw: fn(&Cycle, Slot) -> i64,
    pub scale: Scale,
}

/// How raw scores become 0 to 100.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scale {
    /// They are that already.
    AsIs,
    /// The largest becomes 100.
    Proportional,
    /// Zero becomes 100 and the largest 0.
    Reversed,
}

/// A filter's answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    Fits,
    /// Refused; fewer pods on the node could help.
    Refused(Vec<Cow<'static, str>>),
    /// Refused, and no pod's removal would change that.
    Hopeless(Vec<Cow<'static, str>>),
}

impl Verdict {
    fn refused(reason: &'static str) -> Self {
        Verdict::Refused(vec![Cow::Borrowed(reason)])
    }

    fn hopeless(reason: impl Into<Cow<'static, str>>) -> Self {
        Verdict::Hopeless(vec![reason.into()])
    }
}

/// What happened in the cluster, as far as it can make room for a waiting pod.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ClusterEvent {
    pub node_added: bool,
    pub node_allocatable: bool,
    pub node_labels: bool,
    pub node_taints: bool,
    /// A bound pod went away or shrank.
    pub pod_removed: bool,
    /// A pod was bound (here or by others) or its labels changed.
    pub pod_added: bool,
}

impl ClusterEvent {
    pub fn is_nothing(&self) -> bool {
        *self == ClusterEvent::default()
    }
}

/// One pod against the table, and what plugins prepared for it.
pub struct Cycle<'a> {
    pub pod: &'a PodInfo,
    pub table: &'a NodeTable,
    pub affinity: inter_pod_affinity::State,
    pub spread: topology_spread::State,
}

impl<'a> Cycle<'a> {
    pub fn new(pod: &'a PodInfo, table: &'a NodeTable) -> Self {
        Cycle { pod, table, affinity: Default::default(), spread: Default::default() }
    }
}
