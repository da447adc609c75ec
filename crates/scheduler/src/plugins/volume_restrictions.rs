//! VolumeRestrictions: a claim that only one pod may use has one user in the whole cluster; a disk that only one node
//! may write is not mounted twice.

use super::volume_binding;
use super::{Cycle, Plugin, Point, Prepared, Verdict};
use crate::event::{ClusterEvent, kind};
use crate::objects::World;
use crate::pod::PodInfo;
use crate::table::Slot;
use k8s_openapi::api::core::v1::Volume;
use knarr_client::ObjectKey;

pub const PLUGIN: Plugin = Plugin {
    name: "VolumeRestrictions",
    points: &[Point::PreFilter, Point::Filter],
    prepare: Some(prepare),
    filter: Some(filter),
    explain: |_, _, code| {
        let text = match code {
            DISK => "node(s) had no available disk",
            _ => {
                "node has pod using PersistentVolumeClaim with the same name and ReadWriteOncePod access mode"
            }
        };
        vec![text.to_owned()]
    },
    hears: kind::NODE | kind::STORAGE | kind::POD_REMOVED,
    wakes: |event, pod| match event {
        ClusterEvent::PodRemoved(gone) => !gone.claims.is_empty() || has_disks(gone),
        ClusterEvent::ClaimChanged(claim) => {
            pod.claims.iter().any(|(name, _)| Some(name) == claim.metadata.name.as_ref())
        }
        ClusterEvent::NodeAdded(_) => true,
        _ => false,
    },
    ..Plugin::NONE
};

const DISK: u32 = 0;
const SINGLE_POD: u32 = 1;

#[derive(Debug, Default)]
pub struct State {
    /// Claims of access mode ReadWriteOncePod.
    single: Vec<ObjectKey>,
    disks: bool,
}

fn volumes(pod: &PodInfo) -> impl Iterator<Item = &Volume> {
    pod.spec().and_then(|spec| spec.volumes.as_ref()).into_iter().flatten()
}

fn has_disks(pod: &PodInfo) -> bool {
    volumes(pod).any(|volume| {
        volume.gce_persistent_disk.is_some()
            || volume.aws_elastic_block_store.is_some()
            || volume.rbd.is_some()
            || volume.iscsi.is_some()
    })
}

fn prepare(cycle: &mut Cycle, world: &mut World) -> Prepared {
    cycle.restrictions.disks = has_disks(cycle.pod);
    if cycle.pod.claims.is_empty() && !cycle.restrictions.disks {
        return Prepared::Skip;
    }
    match volume_binding::claims(cycle.pod, world) {
        Ok(claims) => {
            let single = claims.iter().filter(|claim| {
                let modes = claim.spec.as_ref().and_then(|spec| spec.access_modes.as_ref());
                modes.into_iter().flatten().any(|mode| mode == "ReadWriteOncePod")
            });
            cycle.restrictions.single = single.map(|claim| ObjectKey::of(&**claim)).collect();
        }
        Err(error) => return Prepared::Rejected(error),
    }
    if cycle.restrictions.single.is_empty() && !cycle.restrictions.disks {
        Prepared::Skip
    } else {
        Prepared::Ready
    }
}

fn filter(cycle: &Cycle, world: &World, slot: Slot) -> Verdict {
    let table = &world.table;
    if cycle.restrictions.disks {
        let there = || table.pods[slot].iter().flat_map(|placed| volumes(&placed.pod));
        if volumes(cycle.pod).any(|wanted| there().any(|taken| conflict(wanted, taken))) {
            return Verdict::Refused(DISK);
        }
    }
    if cycle.restrictions.single.iter().any(|claim| table.users_of_claim(claim) > 0) {
        return Verdict::Refused(SINGLE_POD);
    }
    Verdict::Fits
}

/// The same disk, and at least one writes (upstream's `isVolumeConflict`).
fn conflict(a: &Volume, b: &Volume) -> bool {
    let both_read = |a: Option<bool>, b: Option<bool>| a == Some(true) && b == Some(true);
    if let (Some(a), Some(b)) = (&a.gce_persistent_disk, &b.gce_persistent_disk) {
        return a.pd_name == b.pd_name && !both_read(a.read_only, b.read_only);
    }
    if let (Some(a), Some(b)) = (&a.aws_elastic_block_store, &b.aws_elastic_block_store) {
        return a.volume_id == b.volume_id;
    }
    if let (Some(a), Some(b)) = (&a.iscsi, &b.iscsi) {
        return a.iqn == b.iqn && !both_read(a.read_only, b.read_only);
    }
    if let (Some(a), Some(b)) = (&a.rbd, &b.rbd) {
        let same = a.monitors.iter().any(|monitor| b.monitors.contains(monitor)) && a.image == b.image;
        let pool = |pool: &Option<String>| pool.clone().unwrap_or_else(|| "rbd".to_owned());
        return same && pool(&a.pool) == pool(&b.pool) && !both_read(a.read_only, b.read_only);
    }
    false
}
