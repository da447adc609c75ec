//! VolumeBinding: a pod goes where its volumes can. Claims that are bound say by their volume's node affinity; claims
//! that wait for their first consumer need a volume that matches on that node, or a class that can provision there.
//! What was chosen is promised when the pod is assumed, and written before it is bound (`writes`).

use super::{Cycle, Plugin, Point, Prepared, Verdict};
use crate::event::{ClusterEvent, kind};
use crate::objects::World;
use crate::pod::PodInfo;
use crate::table::Slot;
use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim, TopologySelectorTerm};
use k8s_openapi::api::storage::v1::StorageClass;
use knarr_api::quantity::Quantity;
use knarr_client::ObjectKey;
use knarr_client::placement;
use knarr_client::selector::Selector;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// What the persistent volume controller says when both sides of a binding are written.
pub const BIND_COMPLETED: &str = "pv.kubernetes.io/bind-completed";
/// Where a claim is to be provisioned.
pub const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";
const BETA_CLASS: &str = "volume.beta.kubernetes.io/storage-class";
const NO_PROVISIONER: &str = "kubernetes.io/no-provisioner";

pub const PLUGIN: Plugin = Plugin {
    name: "VolumeBinding",
    points: &[Point::PreFilter, Point::Filter, Point::Reserve, Point::PreBind, Point::PreScore, Point::Score],
    prepare: Some(prepare),
    filter: Some(filter),
    explain,
    hears: kind::NODE | kind::STORAGE,
    wakes,
    ..Plugin::NONE
};

#[derive(Debug, Clone, PartialEq)]
pub struct VolumeBindingArgs {
    /// How long a bound pod waits for its claims to be bound, too.
    pub bind_timeout: Duration,
}

impl Default for VolumeBindingArgs {
    fn default() -> Self {
        VolumeBindingArgs { bind_timeout: Duration::from_secs(600) }
    }
}

#[derive(Debug, Default)]
pub struct State {
    bound: Vec<Arc<PersistentVolumeClaim>>,
    /// Claims that wait for their first consumer, the smallest first.
    waiting: Vec<Arc<PersistentVolumeClaim>>,
}

/// What has to be written before the pod is bound.
#[derive(Debug, Default, PartialEq)]
pub struct VolumePlan {
    /// Volumes to give to claims: volume, claim.
    pub bind: Vec<(String, ObjectKey)>,
    /// Claims to be provisioned on the node.
    pub provision: Vec<ObjectKey>,
}

impl VolumePlan {
    pub fn is_empty(&self) -> bool {
        self.bind.is_empty() && self.provision.is_empty()
    }
}

const NO_VOLUME: u32 = 1;
const WRONG_NODE: u32 = 2;
const NO_SPACE: u32 = 4;
const LOST_VOLUME: u32 = 8;

fn explain(_: &Cycle, _: &World, code: u32) -> Vec<String> {
    let reasons = [
        (NO_VOLUME, "node(s) didn't find available persistent volumes to bind"),
        (WRONG_NODE, "node(s) didn't match PersistentVolume's node affinity"),
        (NO_SPACE, "node(s) did not have enough free storage"),
        (LOST_VOLUME, "node(s) unavailable due to one or more pvc(s) bound to non-existent pv(s)"),
    ];
    reasons.into_iter().filter(|(bit, _)| code & bit != 0).map(|(_, text)| text.to_owned()).collect()
}

fn wakes(event: &ClusterEvent, pod: &PodInfo) -> bool {
    match event {
        ClusterEvent::ClaimChanged(claim) => {
            claim.metadata.namespace.as_deref().unwrap_or_default() == pod.namespace()
                && pod.claims.iter().any(|(name, _)| Some(name) == claim.metadata.name.as_ref())
        }
        ClusterEvent::StorageChanged => true,
        _ => event.labels_changed(),
    }
}

/// The pod's claims as they are; the error says which is missing or unusable (upstream's `podHasPVCs`).
pub fn claims(pod: &PodInfo, world: &World) -> Result<Vec<Arc<PersistentVolumeClaim>>, String> {
    let mut claims = Vec::new();
    for (name, ephemeral) in &pod.claims {
        let Some(claim) = world.objects.claims.get(pod.namespace(), name) else {
            return Err(match ephemeral {
                true => {
                    format!(
                        "waiting for ephemeral volume controller to create the persistentvolumeclaim {name:?}"
                    )
                }
                false => format!("persistentvolumeclaim {name:?} not found"),
            });
        };
        let phase = claim.status.as_ref().and_then(|status| status.phase.as_deref());
        if phase == Some("Lost") {
            let volume = volume_name(claim).unwrap_or_default();
            return Err(format!(
                "persistentvolumeclaim {name:?} bound to non-existent persistentvolume {volume:?}"
            ));
        }
        if claim.metadata.deletion_timestamp.is_some() {
            return Err(format!("persistentvolumeclaim {name:?} is being deleted"));
        }
        if *ephemeral && !is_made_for(claim, pod) {
            let pod = &pod.key;
            return Err(format!(
                "PVC {}/{name} was not created for pod {pod} (pod is not owner)",
                pod.namespace
            ));
        }
        claims.push(claim.clone());
    }
    Ok(claims)
}

fn is_made_for(claim: &PersistentVolumeClaim, pod: &PodInfo) -> bool {
    knarr_client::owner::controller_of(&claim.metadata).is_some_and(|owner| owner.uid == pod.uid())
}

pub fn volume_name(claim: &PersistentVolumeClaim) -> Option<&str> {
    claim.spec.as_ref()?.volume_name.as_deref().filter(|name| !name.is_empty())
}

fn annotation<'a>(annotations: &'a Option<BTreeMap<String, String>>, key: &str) -> Option<&'a str> {
    annotations.as_ref()?.get(key).map(String::as_str)
}

pub fn is_bound(claim: &PersistentVolumeClaim) -> bool {
    volume_name(claim).is_some() && annotation(&claim.metadata.annotations, BIND_COMPLETED).is_some()
}

pub fn has_selected_node(claim: &PersistentVolumeClaim) -> Option<&str> {
    annotation(&claim.metadata.annotations, SELECTED_NODE)
}

pub fn class_name(claim: &PersistentVolumeClaim) -> &str {
    let beta = annotation(&claim.metadata.annotations, BETA_CLASS);
    let class = || claim.spec.as_ref()?.storage_class_name.as_deref();
    beta.or_else(class).unwrap_or_default()
}

fn class<'a>(claim: &PersistentVolumeClaim, world: &'a World) -> Option<&'a Arc<StorageClass>> {
    world.objects.storage_classes.get("", class_name(claim))
}

pub fn waits_for_consumer(claim: &PersistentVolumeClaim, world: &World) -> bool {
    class(claim, world)
        .is_some_and(|class| class.volume_binding_mode.as_deref() == Some("WaitForFirstConsumer"))
}

fn prepare(cycle: &mut Cycle, world: &mut World) -> Prepared {
    if cycle.pod.claims.is_empty() {
        return Prepared::Skip;
    }
    let claims = match claims(cycle.pod, world) {
        Ok(claims) => claims,
        Err(error) => return Prepared::Rejected(error),
    };
    for claim in claims {
        if is_bound(&claim) {
            cycle.volumes.bound.push(claim);
        } else if waits_for_consumer(&claim, world) && volume_name(&claim).is_none() {
            cycle.volumes.waiting.push(claim);
        } else {
            return Prepared::Rejected("pod has unbound immediate PersistentVolumeClaims".to_owned());
        }
    }
    cycle.volumes.waiting.sort_by_key(|claim| requested_bytes(claim));
    Prepared::Ready
}

fn filter(cycle: &Cycle, world: &World, slot: Slot) -> Verdict {
    match find(&cycle.volumes, world, slot) {
        Ok(_) => Verdict::Fits,
        Err(code) => Verdict::Hopeless(code),
    }
}

/// What has to be written if the pod goes to the node; empty for pods without claims.
pub fn plan(cycle: &Cycle, world: &World, slot: Slot) -> VolumePlan {
    find(&cycle.volumes, world, slot).unwrap_or_default()
}

fn find(state: &State, world: &World, slot: Slot) -> Result<VolumePlan, u32> {
    let node = world.table.node(slot);
    let bound = bound_volumes(state, world, node);
    let plan = waiting_volumes(state, world, node);
    match (bound, plan) {
        (0, Ok(plan)) => Ok(plan),
        (code, Ok(_)) => Err(code),
        (code, Err(more)) => Err(code | more),
    }
}

/// 0 if the volumes of all bound claims can be used on the node.
fn bound_volumes(state: &State, world: &World, node: &Node) -> u32 {
    for claim in &state.bound {
        match world.objects.volumes.get("", volume_name(claim).unwrap_or_default()) {
            None => return LOST_VOLUME,
            Some(volume) if !reaches(volume, node) => return WRONG_NODE,
            Some(_) => {}
        }
    }
    0
}

fn waiting_volumes(state: &State, world: &World, node: &Node) -> Result<VolumePlan, u32> {
    let name = node.metadata.name.as_deref().unwrap_or_default();
    let mut plan = VolumePlan::default();
    let mut to_match = Vec::new();
    for claim in &state.waiting {
        match has_selected_node(claim) {
            Some(selected) if selected != name => return Err(NO_VOLUME),
            Some(_) => provision(&mut plan, claim, world, node)?,
            None => to_match.push(claim),
        }
    }
    for claim in to_match {
        match matching_volume(claim, world, node, &plan) {
            Some(volume) => {
                plan.bind.push((volume.metadata.name.clone().unwrap_or_default(), ObjectKey::of(&**claim)));
            }
            None => provision(&mut plan, claim, world, node)?,
        }
    }
    Ok(plan)
}

/// The volume's node affinity lets it be used on the node.
pub fn reaches(volume: &PersistentVolume, node: &Node) -> bool {
    let affinity = volume.spec.as_ref().and_then(|spec| spec.node_affinity.as_ref());
    let Some(required) = affinity.and_then(|affinity| affinity.required.as_ref()) else { return true };
    let none = BTreeMap::new();
    let labels = node.metadata.labels.as_ref().unwrap_or(&none);
    let name = node.metadata.name.as_deref().unwrap_or_default();
    required.node_selector_terms.iter().any(|term| placement::term_holds(term, labels, name))
}

fn bytes(quantity: Option<&k8s_openapi::apimachinery::pkg::api::resource::Quantity>) -> i64 {
    quantity.and_then(|quantity| quantity.0.parse::<Quantity>().ok()).map_or(0, |quantity| quantity.units())
}

fn requested_bytes(claim: &PersistentVolumeClaim) -> i64 {
    let resources = claim.spec.as_ref().and_then(|spec| spec.resources.as_ref());
    bytes(resources.and_then(|resources| resources.requests.as_ref()?.get("storage")))
}

fn capacity_bytes(volume: &PersistentVolume) -> i64 {
    bytes(volume.spec.as_ref().and_then(|spec| spec.capacity.as_ref()?.get("storage")))
}

/// The smallest free volume that has all the claim wants; one that names the claim already goes before all others.
fn matching_volume<'a>(
    claim: &PersistentVolumeClaim,
    world: &'a World,
    node: &Node,
    plan: &VolumePlan,
) -> Option<&'a Arc<PersistentVolume>> {
    let key = ObjectKey::of(claim);
    let mut best: Option<&Arc<PersistentVolume>> = None;
    for volume in world.objects.volumes.iter() {
        let name = volume.metadata.name.as_deref().unwrap_or_default();
        let promised = world.objects.promised_volumes.get(name).is_some_and(|promised| *promised != key);
        if promised || plan.bind.iter().any(|(taken, _)| taken == name) || !suits(claim, volume) {
            continue;
        }
        match is_for(volume, claim) {
            Some(false) => continue,
            Some(true) => return reaches(volume, node).then_some(volume),
            None => {}
        }
        if is_available(claim, volume)
            && reaches(volume, node)
            && best.is_none_or(|best| capacity_bytes(best) > capacity_bytes(volume))
        {
            best = Some(volume);
        }
    }
    best
}

/// Size, mode and access modes.
fn suits(claim: &PersistentVolumeClaim, volume: &PersistentVolume) -> bool {
    let (Some(wants), Some(has)) = (&claim.spec, &volume.spec) else { return false };
    let mode = |mode: &Option<String>| mode.clone().unwrap_or_else(|| "Filesystem".to_owned());
    let modes = has.access_modes.as_deref().unwrap_or_default();
    capacity_bytes(volume) >= requested_bytes(claim)
        && mode(&wants.volume_mode) == mode(&has.volume_mode)
        && volume.metadata.deletion_timestamp.is_none()
        && wants.access_modes.iter().flatten().all(|mode| modes.contains(mode))
}

/// Whether the volume names this claim, another, or none.
fn is_for(volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> Option<bool> {
    let reference = volume.spec.as_ref()?.claim_ref.as_ref()?;
    let same = reference.name == claim.metadata.name && reference.namespace == claim.metadata.namespace;
    Some(
        same && reference
            .uid
            .as_ref()
            .is_none_or(|uid| uid.is_empty() || Some(uid) == claim.metadata.uid.as_ref()),
    )
}

fn is_available(claim: &PersistentVolumeClaim, volume: &PersistentVolume) -> bool {
    let phase = volume.status.as_ref().and_then(|status| status.phase.as_deref());
    let spec = claim.spec.as_ref();
    let selector = spec.and_then(|spec| spec.selector.as_ref());
    let selected = selector.is_none_or(|selector| {
        Selector::new(selector).is_ok_and(|selector| selector.matches(volume.metadata.labels.as_ref()))
    });
    let class = volume.spec.as_ref().and_then(|spec| spec.storage_class_name.as_deref()).unwrap_or_default();
    let attributes = |name: Option<&String>| name.cloned().unwrap_or_default();
    phase == Some("Available")
        && selected
        && class == class_name(claim)
        && attributes(spec.and_then(|spec| spec.volume_attributes_class_name.as_ref()))
            == attributes(volume.spec.as_ref().and_then(|spec| spec.volume_attributes_class_name.as_ref()))
}

/// Notes that the claim is to be provisioned on the node, if its class can do that.
fn provision(
    plan: &mut VolumePlan,
    claim: &Arc<PersistentVolumeClaim>,
    world: &World,
    node: &Node,
) -> Result<(), u32> {
    let class = class(claim, world).ok_or(NO_VOLUME)?;
    if class.provisioner.is_empty() || class.provisioner == NO_PROVISIONER {
        return Err(NO_VOLUME);
    }
    if !topologies_match(class.allowed_topologies.as_deref().unwrap_or_default(), node) {
        return Err(NO_VOLUME);
    }
    if !has_capacity(claim, class, world, node) {
        return Err(NO_SPACE);
    }
    plan.provision.push(ObjectKey::of(&**claim));
    Ok(())
}

fn topologies_match(terms: &[TopologySelectorTerm], node: &Node) -> bool {
    let value = |key: &String| node.metadata.labels.as_ref().and_then(|labels| labels.get(key));
    let holds = |term: &TopologySelectorTerm| {
        let mut expressions = term.match_label_expressions.iter().flatten();
        expressions
            .all(|expression| value(&expression.key).is_some_and(|value| expression.values.contains(value)))
    };
    terms.is_empty() || terms.iter().any(holds)
}

/// Drivers that publish their capacity must have enough that the node reaches.
fn has_capacity(claim: &PersistentVolumeClaim, class: &StorageClass, world: &World, node: &Node) -> bool {
    let driver = world.objects.csi_drivers.get("", &class.provisioner);
    if driver.is_none_or(|driver| driver.spec.storage_capacity != Some(true)) {
        return true;
    }
    let wanted = requested_bytes(claim);
    world.objects.csi_capacities.iter().any(|capacity| {
        let enough = capacity.maximum_volume_size.as_ref().or(capacity.capacity.as_ref());
        let reached = capacity.node_topology.as_ref().is_some_and(|topology| {
            Selector::new(topology).is_ok_and(|topology| topology.matches(node.metadata.labels.as_ref()))
        });
        Some(&capacity.storage_class_name) == class.metadata.name.as_ref()
            && enough.is_some_and(|enough| bytes(Some(enough)) >= wanted)
            && reached
    })
}
