//! A profile: which plugins decide for pods of one `schedulerName`, how much each score counts, and their arguments.

use crate::plugins::{
    AffinityArgs, BalancedArgs, FitArgs, NodeAffinityArgs, PLUGINS, PluginId, Point, PreemptionArgs,
    SpreadArgs, VolumeBindingArgs,
};
use std::collections::HashMap;

#[derive(Debug, Clone, PartialEq)]
pub struct Profile {
    pub scheduler_name: String,
    /// By extension point, in the order they are called, with the weight of their score.
    pub points: HashMap<Point, Vec<(PluginId, i64)>>,
    /// Those with a filter, in order: the hot path's copy of `points`.
    pub filters: Vec<PluginId>,
    pub scores: Vec<(PluginId, i64)>,
    pub args: Args,
    /// How many of the nodes are scored once they fit; 0 lets the size of the cluster decide.
    pub percentage_of_nodes_to_score: usize,
    /// Extenders choose among all candidates for preemption.
    pub asks_about_victims: bool,
}

/// Arguments of plugins that have some.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Args {
    pub fit: FitArgs,
    pub balanced: BalancedArgs,
    pub affinity: AffinityArgs,
    pub spread: SpreadArgs,
    pub node_affinity: NodeAffinityArgs,
    pub preemption: PreemptionArgs,
    pub volume_binding: VolumeBindingArgs,
}

impl Default for Profile {
    fn default() -> Self {
        let mut points: HashMap<Point, Vec<(PluginId, i64)>> = HashMap::new();
        for (id, plugin) in PLUGINS.iter().enumerate() {
            for point in plugin.points {
                points.entry(*point).or_default().push((id, plugin.weight));
            }
        }
        Profile::new(crate::DEFAULT_NAME, points, Args::default(), 0)
    }
}

impl Profile {
    pub fn new(
        name: &str,
        points: HashMap<Point, Vec<(PluginId, i64)>>,
        args: Args,
        percentage_of_nodes_to_score: usize,
    ) -> Self {
        let at = |point: Point| points.get(&point).map(Vec::as_slice).unwrap_or_default();
        // What only prepares (a rule that rejects a pod whatever the node) is a filter that lets every node pass.
        let mut filters: Vec<PluginId> = at(Point::Filter).iter().map(|(id, _)| *id).collect();
        let prepare_only =
            at(Point::PreFilter).iter().map(|(id, _)| *id).filter(|id| PLUGINS[*id].filter.is_none());
        filters.extend(prepare_only.filter(|id| !at(Point::Filter).iter().any(|(other, _)| other == id)));
        let scores = at(Point::Score).iter().copied();
        let scores = scores.filter(|(id, weight)| PLUGINS[*id].score.is_some() && *weight > 0).collect();
        Profile {
            scheduler_name: name.to_owned(),
            filters,
            scores,
            points,
            args,
            percentage_of_nodes_to_score,
            asks_about_victims: false,
        }
    }

    pub fn has(&self, point: Point, name: &str) -> bool {
        self.points.get(&point).into_iter().flatten().any(|(id, _)| PLUGINS[*id].name == name)
    }

    pub fn preempts(&self) -> bool {
        self.has(Point::PostFilter, "DefaultPreemption")
    }
}
