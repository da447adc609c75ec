//! ImageLocality: nodes that have the pod's images already are preferred, the more so the larger the images and the
//! more nodes share them, so that one image does not draw all pods to one node.

use super::{Cycle, Plugin, Point, Scored};
use crate::objects::World;
use crate::pod::PodInfo;
use crate::table::{Image, Slot};

/// Below this nothing is worth a detour, above the other the score does not grow (upstream's constants).
const THRESHOLD_MIN_BYTES: i64 = 23 << 20;
const THRESHOLD_MAX_BYTES: i64 = 1000 << 20;

pub const PLUGIN: Plugin =
    Plugin { name: "ImageLocality", points: &[Point::Score], weight: 1, score: Some(score), ..Plugin::NONE };

fn score(cycle: &mut Cycle, world: &mut World, slots: &[Slot], scores: &mut [i64]) -> Scored {
    let table = &world.table;
    if table.images.is_empty() {
        return Scored::Alike(0);
    }
    let images = images(cycle.pod);
    let total = table.live().len() as f64;
    let known: Vec<(&Image, i64)> = images
        .iter()
        .filter_map(|name| table.images.get(name))
        .map(|image| (image, (image.size_bytes as f64 * (f64::from(image.nodes) / total)) as i64))
        .collect();
    if known.is_empty() {
        return Scored::Alike(0);
    }
    let most = THRESHOLD_MAX_BYTES * images.len() as i64;
    for (score, slot) in scores.iter_mut().zip(slots) {
        let sum: i64 = known.iter().filter(|(image, _)| image.is_on(*slot)).map(|(_, share)| share).sum();
        *score =
            100 * (sum.clamp(THRESHOLD_MIN_BYTES, most) - THRESHOLD_MIN_BYTES) / (most - THRESHOLD_MIN_BYTES);
    }
    Scored::Each
}

/// The pod's images as nodes list them.
fn images(pod: &PodInfo) -> Vec<String> {
    let Some(spec) = pod.spec() else { return Vec::new() };
    let containers = spec.init_containers.iter().flatten().chain(&spec.containers);
    let of_containers = containers.map(|container| container.image.as_deref().unwrap_or_default());
    let volumes = spec.volumes.iter().flatten();
    let of_volumes = volumes.filter_map(|volume| volume.image.as_ref()?.reference.as_deref());
    of_containers.chain(of_volumes).map(normalized).collect()
}

/// With the tag that is meant if none is given.
fn normalized(name: &str) -> String {
    if name.rfind(':') <= name.rfind('/') { format!("{name}:latest") } else { name.to_owned() }
}
