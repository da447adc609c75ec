//! What happened in the cluster, as far as it can make room for a waiting pod.

use crate::pod::PodInfo;
use k8s_openapi::api::core::v1::{Node, PersistentVolumeClaim};

/// One change. Plugins say in `wakes` whether it may help a pod they refused.
#[derive(Clone, Copy, Debug)]
pub enum ClusterEvent<'a> {
    NodeAdded(&'a Node),
    /// What the scheduler knows of a node changed.
    NodeChanged {
        old: &'a Node,
        new: &'a Node,
    },
    NodeRemoved,
    /// A pod came to a node, bound here or by others.
    PodPlaced(&'a PodInfo),
    /// A pod on a node changed its labels, its requests or began to terminate.
    PodChanged {
        old: &'a PodInfo,
        new: &'a PodInfo,
    },
    /// A pod left its node, or ended.
    PodRemoved(&'a PodInfo),
    NamespaceChanged,
    ClaimChanged(&'a PersistentVolumeClaim),
    /// Volumes, storage classes, drivers or their capacities.
    StorageChanged,
    /// Claims, slices or classes of devices.
    DevicesChanged,
}

/// Kinds of events as bits, so that a plugin can say what it hears at all.
pub mod kind {
    pub const NODE: u16 = 1;
    pub const POD_PLACED: u16 = 1 << 1;
    pub const POD_CHANGED: u16 = 1 << 2;
    pub const POD_REMOVED: u16 = 1 << 3;
    pub const NAMESPACE: u16 = 1 << 4;
    pub const STORAGE: u16 = 1 << 5;
    pub const DEVICES: u16 = 1 << 6;
}

impl ClusterEvent<'_> {
    pub fn kind(&self) -> u16 {
        match self {
            ClusterEvent::NodeAdded(_) | ClusterEvent::NodeChanged { .. } | ClusterEvent::NodeRemoved => {
                kind::NODE
            }
            ClusterEvent::PodPlaced(_) => kind::POD_PLACED,
            ClusterEvent::PodChanged { .. } => kind::POD_CHANGED,
            ClusterEvent::PodRemoved(_) => kind::POD_REMOVED,
            ClusterEvent::NamespaceChanged => kind::NAMESPACE,
            ClusterEvent::ClaimChanged(_) | ClusterEvent::StorageChanged => kind::STORAGE,
            ClusterEvent::DevicesChanged => kind::DEVICES,
        }
    }

    /// Upstream's label of the event in metrics.
    pub fn label(&self) -> &'static str {
        match self {
            ClusterEvent::NodeAdded(_) => "NodeAdd",
            ClusterEvent::NodeChanged { .. } => "NodeUpdate",
            ClusterEvent::NodeRemoved => "NodeDelete",
            ClusterEvent::PodPlaced(_) => "AssignedPodAdd",
            ClusterEvent::PodChanged { .. } => "AssignedPodUpdate",
            ClusterEvent::PodRemoved(_) => "AssignedPodDelete",
            ClusterEvent::NamespaceChanged => "NamespaceUpdate",
            ClusterEvent::ClaimChanged(_) => "PersistentVolumeClaimUpdate",
            ClusterEvent::StorageChanged => "StorageClassUpdate",
            ClusterEvent::DevicesChanged => "ResourceClaimUpdate",
        }
    }

    /// The node as it is now, for rules that a node alone decides.
    pub fn node(&self) -> Option<&Node> {
        match self {
            ClusterEvent::NodeAdded(node) | ClusterEvent::NodeChanged { new: node, .. } => Some(node),
            _ => None,
        }
    }

    pub fn labels_changed(&self) -> bool {
        match self {
            ClusterEvent::NodeAdded(_) => true,
            ClusterEvent::NodeChanged { old, new } => old.metadata.labels != new.metadata.labels,
            _ => false,
        }
    }

    pub fn taints_changed(&self) -> bool {
        let taints = |node: &Node| {
            let spec = node.spec.as_ref();
            (spec.and_then(|spec| spec.taints.clone()), spec.and_then(|spec| spec.unschedulable))
        };
        match self {
            ClusterEvent::NodeAdded(_) => true,
            ClusterEvent::NodeChanged { old, new } => taints(old) != taints(new),
            _ => false,
        }
    }

    pub fn allocatable_changed(&self) -> bool {
        let allocatable = |node: &Node| node.status.as_ref().and_then(|status| status.allocatable.clone());
        match self {
            ClusterEvent::NodeAdded(_) => true,
            ClusterEvent::NodeChanged { old, new } => allocatable(old) != allocatable(new),
            _ => false,
        }
    }
}

/// Whether a change of a node can matter to any decision: heartbeats and conditions cannot.
pub fn node_matters(old: &Node, new: &Node) -> bool {
    let event = ClusterEvent::NodeChanged { old, new };
    event.labels_changed() || event.taints_changed() || event.allocatable_changed()
}
