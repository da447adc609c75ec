//! VolumeZone: volumes that carry zone or region labels are used in those zones only. (Newer volumes say the same by
//! node affinity, which VolumeBinding reads.)

use super::volume_binding::{self, volume_name, waits_for_consumer};
use super::{Cycle, Plugin, Point, Prepared, Sees, Verdict};
use crate::event::{ClusterEvent, kind};
use crate::objects::World;
use crate::table::Slot;

pub const PLUGIN: Plugin = Plugin {
    name: "VolumeZone",
    points: &[Point::PreFilter, Point::Filter],
    prepare: Some(prepare),
    filter: Some(filter),
    explain: |_, _, _| vec!["node(s) had no available volume zone".to_owned()],
    hears: kind::NODE | kind::STORAGE,
    wakes: |event, _| {
        matches!(event, ClusterEvent::ClaimChanged(_) | ClusterEvent::StorageChanged)
            || event.labels_changed()
    },
    sees: Sees::Node,
    ..Plugin::NONE
};

/// Today's labels and those before them.
const LABELS: [(&str, &str); 4] = [
    ("topology.kubernetes.io/zone", "topology.kubernetes.io/zone"),
    ("topology.kubernetes.io/region", "topology.kubernetes.io/region"),
    ("failure-domain.beta.kubernetes.io/zone", "topology.kubernetes.io/zone"),
    ("failure-domain.beta.kubernetes.io/region", "topology.kubernetes.io/region"),
];

#[derive(Debug, Default)]
pub struct State {
    /// A label of a volume, today's name for it, and the values it allows.
    wanted: Vec<(&'static str, &'static str, Vec<String>)>,
}

fn prepare(cycle: &mut Cycle, world: &mut World) -> Prepared {
    if cycle.pod.claims.is_empty() {
        return Prepared::Skip;
    }
    let claims = match volume_binding::claims(cycle.pod, world) {
        Ok(claims) => claims,
        Err(error) => return Prepared::Rejected(error),
    };
    for claim in claims {
        let Some(name) = volume_name(&claim) else {
            if waits_for_consumer(&claim, world) {
                continue;
            }
            return Prepared::Rejected("PersistentVolume had no name".to_owned());
        };
        let Some(volume) = world.objects.volumes.get("", name) else {
            return Prepared::Rejected(format!("persistentvolume {name:?} not found"));
        };
        for (label, today) in LABELS {
            if let Some(value) = volume.metadata.labels.as_ref().and_then(|labels| labels.get(label)) {
                let values = value.split("__").map(str::to_owned).collect();
                cycle.zones.wanted.push((label, today, values));
            }
        }
    }
    if cycle.zones.wanted.is_empty() { Prepared::Skip } else { Prepared::Ready }
}

fn filter(cycle: &Cycle, world: &World, slot: Slot) -> Verdict {
    let label = |key: &str| world.table.label(slot, key);
    if LABELS.iter().all(|(key, _)| label(key).is_none()) {
        return Verdict::Fits;
    }
    let allowed = |(key, today, values): &(&str, &str, Vec<String>)| {
        label(key).or_else(|| label(today)).is_some_and(|value| values.iter().any(|allowed| allowed == value))
    };
    if cycle.zones.wanted.iter().all(allowed) { Verdict::Fits } else { Verdict::Hopeless(0) }
}
