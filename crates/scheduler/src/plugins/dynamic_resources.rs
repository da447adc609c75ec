//! DynamicResources: not there yet; a pod that claims devices must wait, not run as if it did not.

use super::{Cycle, Plugin, Point, Prepared};
use crate::event::{ClusterEvent, kind};
use crate::objects::World;

pub const PLUGIN: Plugin = Plugin {
    name: "DynamicResources",
    points: &[
        Point::PreEnqueue,
        Point::PreFilter,
        Point::Filter,
        Point::PostFilter,
        Point::Reserve,
        Point::PreBind,
    ],
    prepare: Some(prepare),
    hears: kind::DEVICES,
    wakes: |event, _| matches!(event, ClusterEvent::DevicesChanged),
    ..Plugin::NONE
};

fn prepare(cycle: &mut Cycle, _: &mut World) -> Prepared {
    let claims = cycle.pod.spec().and_then(|spec| spec.resource_claims.as_ref());
    match claims.into_iter().flatten().next() {
        Some(claim) => Prepared::Rejected(format!(
            "resource claim {:?}: dynamic resource allocation is not supported",
            claim.name
        )),
        None => Prepared::Skip,
    }
}
