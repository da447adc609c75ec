//! The rules, as twins: each module has one `PLUGIN` with the same fields, and one line in [`PLUGINS`]. Order, default
//! weights and wording are those of upstream's default profile.

mod balanced_allocation;
mod binder;
mod dynamic_resources;
mod fit;
mod image_locality;
mod inter_pod_affinity;
mod node_affinity;
mod node_name;
mod node_ports;
mod preemption;
mod priority_sort;
mod scheduling_gates;
mod taint_toleration;
mod topology_spread;
mod unschedulable;
mod volume_binding;
mod volume_limits;
mod volume_restrictions;
mod volume_zone;

use crate::event::ClusterEvent;
use crate::groups::ClassId;
use crate::objects::World;
use crate::pod::PodInfo;
use crate::profile::Profile;
use crate::table::Slot;
use std::sync::Arc;

pub use balanced_allocation::BalancedArgs;
pub use fit::{FitArgs, Room, Strategy};
pub use inter_pod_affinity::AffinityArgs;
pub use node_affinity::NodeAffinityArgs;
pub use preemption::PreemptionArgs;
pub use scheduling_gates::is_gated as gated;
pub use topology_spread::{SpreadArgs, SpreadDefaults};
pub use volume_binding::{
    SELECTED_NODE, VolumeBindingArgs, VolumePlan, has_selected_node, is_bound as is_claim_bound,
    plan as plan_volumes,
};

/// In the order filters run; the first that refuses a node gives the reason.
pub const PLUGINS: &[Plugin] = &[
    scheduling_gates::PLUGIN,
    priority_sort::PLUGIN,
    unschedulable::PLUGIN,
    node_name::PLUGIN,
    taint_toleration::PLUGIN,
    node_affinity::PLUGIN,
    node_ports::PLUGIN,
    fit::PLUGIN,
    volume_restrictions::PLUGIN,
    volume_limits::PLUGIN,
    volume_binding::PLUGIN,
    volume_zone::PLUGIN,
    topology_spread::PLUGIN,
    inter_pod_affinity::PLUGIN,
    dynamic_resources::PLUGIN,
    preemption::PLUGIN,
    balanced_allocation::PLUGIN,
    image_locality::PLUGIN,
    binder::PLUGIN,
];

/// Nodes that filters look at together.
pub const BLOCK: usize = 256;

/// Position in [`PLUGINS`].
pub type PluginId = usize;

type FilterMany = fn(&Cycle, &World, &[Slot], &mut [Verdict]);
type Score = fn(&mut Cycle, &mut World, &[Slot], &mut [i64]) -> Scored;

/// One rule.
pub struct Plugin {
    pub name: &'static str,
    /// Where upstream calls it: what a configuration may switch on and off.
    pub points: &'static [Point],
    /// How much its score counts by default; 0 without a score.
    pub weight: i64,
    /// Called once per cycle, before any filter: makes ready what the filter reads.
    pub prepare: Option<fn(&mut Cycle, &mut World) -> Prepared>,
    /// Whether the pod may run on the node. Pure; called at most once per node and cycle, and by preemption again after
    /// each change of the node's pods, without `prepare` in between.
    pub filter: Option<fn(&Cycle, &World, Slot) -> Verdict>,
    /// The same for up to [`BLOCK`] nodes at once, where that is faster: what is refused already stays so.
    pub filter_many: Option<FilterMany>,
    /// What the filter's answer depends on: preemption asks again what depends on pods.
    pub sees: Sees,
    /// The words for a code that the filter gave.
    pub explain: fn(&Cycle, &World, u32) -> Vec<String>,
    /// How well nodes suit that passed all filters: 0 to 100, written into the last argument.
    pub score: Option<Score>,
    /// Kinds of events (`event::kind`) that may turn this rule's refusal around for some pod.
    pub hears: u16,
    /// Whether an event may turn this rule's refusal of the pod around. A wrong "no" leaves the pod waiting for five
    /// minutes, a wrong "yes" costs one cycle.
    pub wakes: fn(&ClusterEvent, &PodInfo) -> bool,
}

impl Plugin {
    /// A plugin that does nothing: what each fills in.
    const NONE: Plugin = Plugin {
        name: "",
        points: &[],
        weight: 0,
        prepare: None,
        filter: None,
        filter_many: None,
        sees: Sees::Pods,
        explain: |_, _, _| Vec::new(),
        score: None,
        hears: 0,
        wakes: |_, _| false,
    };
}

/// What a score came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scored {
    /// No opinion (upstream's `Skip`).
    Skip,
    /// All nodes alike.
    Alike(i64),
    /// As written.
    Each,
}

/// What a filter reads about a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sees {
    /// Nothing of its pods.
    Node,
    /// What its pods request in sum ([`Room`]).
    Requests,
    /// Which pods are there, or elsewhere.
    Pods,
}

/// Upstream's extension points, in a configuration's spelling.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Point {
    PreEnqueue,
    QueueSort,
    PreFilter,
    Filter,
    PostFilter,
    PreScore,
    Score,
    Reserve,
    Permit,
    PreBind,
    Bind,
    PostBind,
}

/// What `prepare` found.
#[derive(Debug, PartialEq)]
pub enum Prepared {
    /// Ask the filter.
    Ready,
    /// The pod has nothing to do with this rule: the filter need not be asked.
    Skip,
    /// The pod fits nowhere, for this reason.
    Rejected(String),
}

/// A filter's answer. The codes are the plugin's own; its `explain` has the words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Fits,
    /// Refused; fewer pods on the node could help.
    Refused(u32),
    /// Refused, and no pod's removal would change that.
    Hopeless(u32),
}

/// One pod against the world, and what plugins prepared for it.
pub struct Cycle<'a> {
    pub pod: &'a PodInfo,
    pub profile: &'a Profile,
    /// The pod's class, held for the length of the cycle.
    pub class: ClassId,
    /// Only these nodes by name, sorted, if some rule names nodes.
    pub only: Option<Vec<String>>,
    /// Only these nodes can fit: the shortest list that a rule came up with. `None` if any node may.
    pub near: Option<Arc<Vec<Slot>>>,
    pub taints: taint_toleration::State,
    pub node_affinity: node_affinity::State,
    pub fit: fit::State,
    pub balanced: balanced_allocation::State,
    pub volumes: volume_binding::State,
    pub restrictions: volume_restrictions::State,
    pub limits: volume_limits::State,
    pub zones: volume_zone::State,
    pub spread: topology_spread::State,
    pub affinity: inter_pod_affinity::State,
}

impl<'a> Cycle<'a> {
    /// Begins a decision; [`Cycle::end`] must follow.
    pub fn begin(pod: &'a PodInfo, profile: &'a Profile, world: &mut World) -> Self {
        world.table.begin_cycle();
        Cycle {
            pod,
            profile,
            class: world.table.groups.join_class(&pod.class),
            only: None,
            near: None,
            taints: Default::default(),
            node_affinity: Default::default(),
            fit: Default::default(),
            balanced: Default::default(),
            volumes: Default::default(),
            restrictions: Default::default(),
            limits: Default::default(),
            zones: Default::default(),
            spread: Default::default(),
            affinity: Default::default(),
        }
    }

    /// Only some nodes can fit, so many of them: the list is made if none so far is as short.
    fn narrow(&mut self, len: usize, world: &mut World, list: impl FnOnce(&mut World) -> Arc<Vec<Slot>>) {
        let so_far = self.near.as_ref().map_or(world.table.live().len(), |near| near.len());
        if len < so_far {
            self.near = Some(list(world));
        }
    }

    pub fn end(self, world: &mut World) {
        world.table.groups.leave_class(self.class);
    }
}

/// The whole quotient of a part, not negative, and a whole, above 0, both below 2^45 or so. Division of floating point
/// numbers is several times faster than that of integers; where it is off by one, that is put right.
fn quotient(part: i64, whole: i64) -> i64 {
    let guess = (part as f64 / whole as f64) as i64;
    guess - i64::from(guess * whole > part) + i64::from((guess + 1) * whole <= part)
}

/// Upstream's `DefaultNormalizeScore`: the largest becomes 100; reversed, it becomes 0.
fn normalize(scores: &mut [i64], reverse: bool) {
    let most = scores.iter().copied().max().unwrap_or(0);
    for score in scores {
        let share = if most == 0 { 0 } else { quotient(*score * 100, most) };
        *score = if reverse { 100 - share } else { share };
    }
}

#[cfg(test)]
mod tests;

pub fn plugin_id(name: &str) -> Option<PluginId> {
    PLUGINS.iter().position(|plugin| plugin.name == name)
}
