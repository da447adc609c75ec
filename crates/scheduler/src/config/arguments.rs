//! Arguments of plugins: one reader each.

use super::reader::Reader;
use crate::filters::Selection;
use crate::plugins::{SpreadDefaults, Strategy, plugin_id};
use crate::profile::Args;
use k8s_openapi::api::core::v1::{NodeAffinity, PodSpec};
use std::sync::Arc;
use std::time::Duration;

type Read = fn(&mut Reader, &mut Args);

/// Plugins with arguments.
const READERS: &[(&str, Read)] = &[
    ("DefaultPreemption", preemption),
    ("InterPodAffinity", affinity),
    ("NodeAffinity", node_affinity),
    ("NodeResourcesBalancedAllocation", balanced),
    ("NodeResourcesFit", fit),
    ("PodTopologySpread", spread),
    ("VolumeBinding", volume_binding),
];

pub fn read(profile: &mut Reader) -> Args {
    let mut args = Args::default();
    let mut seen: Vec<String> = Vec::new();
    profile.list("pluginConfig", |entry| {
        let name = entry.text("name").unwrap_or_default();
        if seen.contains(&name) {
            entry.error("name", &format!("Duplicate value: {name:?}"));
        }
        match READERS.iter().find(|(plugin, _)| *plugin == name) {
            Some((_, read)) => entry.object("args", |reader| {
                check_kind(reader, &name);
                read(reader, &mut args);
                reader.no_others();
            }),
            None if plugin_id(&name).is_some() => {
                entry.error("args", &format!("Invalid value: {name} takes none"))
            }
            None => entry.error("name", &format!("Invalid value: {name:?}: plugin does not exist")),
        }
        entry.no_others();
        seen.push(name);
    });
    args
}

/// The arguments may say what they are.
fn check_kind(reader: &mut Reader, plugin: &str) {
    let kind = format!("{plugin}Args");
    if reader.text("kind").is_some_and(|said| said != kind) {
        reader.error("kind", &format!("Invalid value: must be {kind}"));
    }
    if reader.text("apiVersion").is_some_and(|said| said != super::API_VERSION) {
        reader.error("apiVersion", &format!("Unsupported value: must be {}", super::API_VERSION));
    }
}

fn in_range(reader: &mut Reader, name: &str, range: std::ops::RangeInclusive<i64>, default: i64) -> i64 {
    let value = reader.integer(name).unwrap_or(default);
    if !range.contains(&value) {
        let what = format!("Invalid value: {value}: not in valid range [{}-{}]", range.start(), range.end());
        reader.error(name, &what);
        return default;
    }
    value
}

fn preemption(reader: &mut Reader, args: &mut Args) {
    let percentage = in_range(reader, "minCandidateNodesPercentage", 0..=100, 10);
    let absolute = in_range(reader, "minCandidateNodesAbsolute", 0..=i64::from(i32::MAX), 100);
    if percentage == 0 && absolute == 0 {
        reader.error(
            "minCandidateNodesPercentage",
            "Invalid value: 0: cannot be zero at the same time as minCandidateNodesAbsolute",
        );
    }
    args.preemption.min_candidate_nodes_percentage = percentage as usize;
    args.preemption.min_candidate_nodes_absolute = absolute as usize;
}

fn affinity(reader: &mut Reader, args: &mut Args) {
    args.affinity.hard_weight = in_range(reader, "hardPodAffinityWeight", 0..=100, 1);
    args.affinity.ignores_preferences_of_existing =
        reader.boolean("ignorePreferredTermsOfExistingPods").unwrap_or(false);
}

fn node_affinity(reader: &mut Reader, args: &mut Args) {
    let Some(added) = reader.decoded::<NodeAffinity>("addedAffinity") else { return };
    let required = added.required_during_scheduling_ignored_during_execution.as_ref();
    if required.is_some_and(|required| required.node_selector_terms.is_empty()) {
        let field = "addedAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms";
        reader.error(field, "Required value: must have at least one node selector term");
    }
    let affinity =
        k8s_openapi::api::core::v1::Affinity { node_affinity: Some(added.clone()), ..Default::default() };
    let spec = PodSpec { affinity: Some(affinity), ..Default::default() };
    args.node_affinity.added_selection = Selection::of(&spec).map(Arc::new);
    args.node_affinity.added = Some(added);
}

fn resources(reader: &mut Reader, weights: std::ops::RangeInclusive<i64>) -> Vec<(String, i64)> {
    reader.list("resources", |resource| {
        let name = resource.text("name").unwrap_or_default();
        if name.is_empty() {
            resource.error("name", "Required value");
        }
        let weight = in_range(resource, "weight", weights.clone(), 1);
        resource.no_others();
        (name, weight)
    })
}

fn balanced(reader: &mut Reader, args: &mut Args) {
    let resources = resources(reader, 1..=1);
    if !resources.is_empty() {
        args.balanced.resources = resources.into_iter().map(|(name, _)| name).collect();
    }
}

fn fit(reader: &mut Reader, args: &mut Args) {
    args.fit.ignored_resources = reader.texts("ignoredResources");
    args.fit.ignored_groups = reader.texts("ignoredResourceGroups");
    for group in args.fit.ignored_groups.clone().iter().filter(|group| group.contains('/')) {
        reader.error(
            "ignoredResourceGroups",
            &format!("Invalid value: {group:?}: resource group name can't contain '/'"),
        );
    }
    reader.object("scoringStrategy", |strategy| {
        let kind = strategy.text("type").unwrap_or_else(|| "LeastAllocated".to_owned());
        let mut resources = resources(strategy, 1..=100);
        if resources.is_empty() {
            resources = vec![("cpu".to_owned(), 1), ("memory".to_owned(), 1)];
        }
        let mut shape = Vec::new();
        strategy.object("requestedToCapacityRatio", |ratio| {
            shape = curve(ratio);
            ratio.no_others();
        });
        args.fit.strategy = match kind.as_str() {
            "LeastAllocated" => Strategy::LeastAllocated(resources),
            "MostAllocated" => Strategy::MostAllocated(resources),
            "RequestedToCapacityRatio" => {
                if shape.is_empty() {
                    let what = "Required value: at least one point must be specified";
                    strategy.error("requestedToCapacityRatio.shape", what);
                }
                Strategy::RequestedToCapacityRatio(resources, shape)
            }
            other => {
                strategy.error("type", &format!("Unsupported value: {other:?}: supported values: \"LeastAllocated\", \"MostAllocated\", \"RequestedToCapacityRatio\""));
                Strategy::default()
            }
        };
        strategy.no_others();
    });
}

/// Points of use in percent and score; scores of 0 to 10 become ours.
fn curve(ratio: &mut Reader) -> Vec<(i64, i64)> {
    let mut last = -1;
    ratio.list("shape", |point| {
        let utilization = in_range(point, "utilization", 0..=100, 0);
        let score = in_range(point, "score", 0..=10, 0);
        if utilization <= last {
            point.error(
                "utilization",
                &format!(
                    "Invalid value: {utilization}: utilization values must be sorted in increasing order"
                ),
            );
        }
        last = utilization;
        point.no_others();
        (utilization, score * 10)
    })
}

fn spread(reader: &mut Reader, args: &mut Args) {
    let list: Vec<(String, i64, bool)> = reader.list("defaultConstraints", |constraint| {
        let key = constraint.text("topologyKey").unwrap_or_default();
        if key.is_empty() {
            constraint.error("topologyKey", "Required value: can not be empty");
        }
        let skew = in_range(constraint, "maxSkew", 1..=i64::from(i32::MAX), 1);
        let when = constraint.text("whenUnsatisfiable").unwrap_or_default();
        if !["DoNotSchedule", "ScheduleAnyway"].contains(&when.as_str()) {
            constraint.error(
                "whenUnsatisfiable",
                &format!(
                    "Unsupported value: {when:?}: supported values: \"DoNotSchedule\", \"ScheduleAnyway\""
                ),
            );
        }
        if constraint.has("labelSelector") {
            constraint.error(
                "labelSelector",
                "Forbidden: constraint must not define a selector, as they deduced for each pod",
            );
        }
        constraint.accept("labelSelector");
        constraint.no_others();
        (key, skew, when == "DoNotSchedule")
    });
    let kind = reader.text("defaultingType").unwrap_or_else(|| "System".to_owned());
    args.spread.defaults = match kind.as_str() {
        "System" if !list.is_empty() => {
            reader
                .error("defaultingType", "Invalid value: \"System\": when .defaultConstraints are not empty");
            SpreadDefaults::System
        }
        "System" => SpreadDefaults::System,
        "List" => SpreadDefaults::List(list),
        other => {
            reader.error(
                "defaultingType",
                &format!("Unsupported value: {other:?}: supported values: \"System\", \"List\""),
            );
            SpreadDefaults::System
        }
    };
}

fn volume_binding(reader: &mut Reader, args: &mut Args) {
    let seconds = in_range(reader, "bindTimeoutSeconds", 0..=i64::from(i32::MAX), 600);
    args.volume_binding.bind_timeout = Duration::from_secs(seconds as u64);
    if reader.has("shape") {
        reader.error(
            "shape",
            "Invalid value: can not be set when the StorageCapacityScoring feature is disabled",
        );
    }
    reader.accept("shape");
}
