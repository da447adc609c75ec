//! NodeVolumeLimits: a driver attaches no more volumes to a node than its CSINode says. Volumes of the node's pods count,
//! and those still attached without a pod (VolumeAttachment); each once.

use super::volume_binding::{self, class_name, volume_name};
use super::{Cycle, Plugin, Point, Prepared, Verdict};
use crate::event::{ClusterEvent, kind};
use crate::objects::World;
use crate::pod::PodInfo;
use crate::table::Slot;
use k8s_openapi::api::storage::v1::VolumeAttachment;
use std::collections::BTreeSet;

pub const PLUGIN: Plugin = Plugin {
    name: "NodeVolumeLimits",
    points: &[Point::PreFilter, Point::Filter],
    prepare: Some(prepare),
    filter: Some(filter),
    explain: |_, _, _| vec!["node(s) exceed max volume count".to_owned()],
    hears: kind::NODE | kind::STORAGE | kind::POD_REMOVED,
    wakes: |event, _| match event {
        ClusterEvent::PodRemoved(gone) => !gone.claims.is_empty(),
        ClusterEvent::StorageChanged | ClusterEvent::ClaimChanged(_) | ClusterEvent::NodeAdded(_) => true,
        _ => false,
    },
    ..Plugin::NONE
};

/// Driver, and the volume as it knows it (or the claim that will become one).
type Attached = (String, String);

#[derive(Debug, Default)]
pub struct State {
    wanted: BTreeSet<Attached>,
}

fn attached(pod: &PodInfo, world: &World) -> BTreeSet<Attached> {
    let of_claim = |(name, _): &(String, bool)| {
        let claim = world.objects.claims.get(pod.namespace(), name)?;
        let unbound = || {
            let class = world.objects.storage_classes.get("", class_name(claim))?;
            // Not yet known to the driver: counted by its claim.
            Some((class.provisioner.clone(), format!("{}/{name}", pod.namespace())))
        };
        match volume_name(claim) {
            None => unbound(),
            Some(volume) => match world.objects.volumes.get("", volume) {
                None => unbound(),
                Some(volume) => {
                    let source = volume.spec.as_ref()?.csi.as_ref()?;
                    Some((source.driver.clone(), source.volume_handle.clone()))
                }
            },
        }
    };
    pod.claims.iter().filter_map(of_claim).collect()
}

fn attached_volume(attachment: &VolumeAttachment, world: &World) -> Option<Attached> {
    let source = &attachment.spec.source;
    let named = source.persistent_volume_name.as_ref().and_then(|name| world.objects.volumes.get("", name));
    let spec = source.inline_volume_spec.as_ref().or_else(|| named?.spec.as_ref())?;
    let handle = spec.csi.as_ref()?.volume_handle.clone();
    Some((attachment.spec.attacher.clone(), handle))
}

fn prepare(cycle: &mut Cycle, world: &mut World) -> Prepared {
    if cycle.pod.claims.is_empty() {
        return Prepared::Skip;
    }
    if let Err(error) = volume_binding::claims(cycle.pod, world) {
        return Prepared::Rejected(error);
    }
    cycle.limits.wanted = attached(cycle.pod, world);
    if cycle.limits.wanted.is_empty() { Prepared::Skip } else { Prepared::Ready }
}

fn filter(cycle: &Cycle, world: &World, slot: Slot) -> Verdict {
    let Some(node) = world.objects.csi_nodes.get("", &world.table.names[slot]) else { return Verdict::Fits };
    let limits: Vec<(&str, usize)> = node
        .spec
        .drivers
        .iter()
        .filter_map(|driver| {
            let limit = driver.allocatable.as_ref()?.count?;
            Some((driver.name.as_str(), usize::try_from(limit).unwrap_or(0)))
        })
        .collect();
    if limits.is_empty() {
        return Verdict::Fits;
    }
    let with_claims = world.table.pods[slot].iter().filter(|placed| !placed.pod.claims.is_empty());
    let mut there: BTreeSet<Attached> = with_claims.flat_map(|placed| attached(&placed.pod, world)).collect();
    let attachments = world.objects.attachments.on(&world.table.names[slot]);
    there.extend(attachments.filter_map(|attachment| attached_volume(attachment, world)));
    let exceeded = limits.into_iter().any(|(driver, limit)| {
        let of_driver = |set: &BTreeSet<Attached>| set.iter().filter(|(name, _)| name == driver).count();
        let new: BTreeSet<Attached> = cycle.limits.wanted.difference(&there).cloned().collect();
        let new = of_driver(&new);
        new > 0 && of_driver(&there) + new > limit
    });
    if exceeded { Verdict::Refused(0) } else { Verdict::Fits }
}
