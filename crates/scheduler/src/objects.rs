//! Objects beside nodes and pods that decisions depend on, as the watches told them last: services and owners (default
//! spreading), storage, disruption budgets, devices. What was decided but is not told yet is assumed here.

use crate::groups::PredicateSpec;
use crate::pod::{PodInfo, own_namespace};
use k8s_openapi::api::apps::v1::{ReplicaSet, StatefulSet};
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, ReplicationController, Service};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::resource::v1::{DeviceClass, ResourceClaim, ResourceSlice};
use k8s_openapi::api::storage::v1::{CSIDriver, CSINode, CSIStorageCapacity, StorageClass, VolumeAttachment};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use knarr_client::owner::controller_of;
use knarr_client::selector::{Labels, Selector};
use knarr_client::{Change, ObjectKey};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Default selectors remembered; then all are worked out again.
const SELECTORS_MAX: usize = 1024;

/// All objects of a kind, by namespace and name.
#[derive(Debug)]
pub struct Store<K>(BTreeMap<ObjectKey, Arc<K>>);

impl<K> Default for Store<K> {
    fn default() -> Self {
        Store(BTreeMap::new())
    }
}

impl<K: kube::Resource> Store<K> {
    pub fn set(&mut self, change: &Change<K>) {
        let object = change.object();
        let key = ObjectKey::of(&**object);
        match change {
            Change::Deleted(_) => self.0.remove(&key),
            _ => self.0.insert(key, object.clone()),
        };
    }

    pub fn get(&self, namespace: &str, name: &str) -> Option<&Arc<K>> {
        self.0.get(&ObjectKey::new(namespace, name))
    }

    pub fn get_key(&self, key: &ObjectKey) -> Option<&Arc<K>> {
        self.0.get(key)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Arc<K>> {
        self.0.values()
    }

    pub fn in_namespace<'a>(&'a self, namespace: &'a str) -> impl Iterator<Item = &'a Arc<K>> {
        let from = ObjectKey::new(namespace, "");
        self.0.range(from..).take_while(move |(key, _)| key.namespace == namespace).map(|(_, object)| object)
    }
}

/// Attachments of volumes, by node.
#[derive(Debug, Default)]
pub struct Attachments {
    by_node: HashMap<String, Store<VolumeAttachment>>,
}

impl Attachments {
    /// The node of an attachment cannot change.
    pub fn set(&mut self, change: &Change<VolumeAttachment>) {
        let node = &change.object().spec.node_name;
        let of_node = self.by_node.entry(node.clone()).or_default();
        of_node.set(change);
        if of_node.0.is_empty() {
            self.by_node.remove(node);
        }
    }

    pub fn on(&self, node: &str) -> impl Iterator<Item = &Arc<VolumeAttachment>> {
        self.by_node.get(node).into_iter().flat_map(Store::iter)
    }
}

#[derive(Debug, Default)]
pub struct Objects {
    pub services: Store<Service>,
    pub replication_controllers: Store<ReplicationController>,
    pub replica_sets: Store<ReplicaSet>,
    pub stateful_sets: Store<StatefulSet>,
    pub claims: Store<PersistentVolumeClaim>,
    pub volumes: Store<PersistentVolume>,
    pub storage_classes: Store<StorageClass>,
    pub csi_nodes: Store<CSINode>,
    pub csi_drivers: Store<CSIDriver>,
    /// Those of nodes that need not have a pod for them.
    pub attachments: Attachments,
    pub csi_capacities: Store<CSIStorageCapacity>,
    pub budgets: Store<PodDisruptionBudget>,
    pub resource_claims: Store<ResourceClaim>,
    pub resource_slices: Store<ResourceSlice>,
    pub device_classes: Store<DeviceClass>,
    /// Volumes promised to claims of pods being bound, by the volume's name.
    pub promised_volumes: HashMap<String, ObjectKey>,
    selectors: HashMap<SelectorKey, Option<Arc<PredicateSpec>>>,
}

/// The class of a pod and its owner decide its default selector.
type SelectorKey = (Arc<crate::groups::ClassKey>, Option<String>);

impl Objects {
    /// Services or owners changed: default selectors have to be worked out again.
    pub fn selectors_changed(&mut self) {
        self.selectors.clear();
    }

    /// The pods that default spreading spreads this one among: those of its services and its owner. `None` without
    /// either.
    pub fn default_group(&mut self, pod: &PodInfo) -> Option<Arc<PredicateSpec>> {
        let owner = controller_of(&pod.pod.metadata);
        let key = (pod.class.clone(), owner.map(|owner| owner.uid.clone()));
        if let Some(known) = self.selectors.get(&key) {
            return known.clone();
        }
        if self.selectors.len() >= SELECTORS_MAX {
            self.selectors.clear();
        }
        let selector = self.default_selector(pod);
        let selector = selector.and_then(|selector| Selector::new(&selector).ok());
        let group = selector.map(|selector| own_namespace(&pod.pod, selector));
        self.selectors.insert(key, group.clone());
        group
    }

    /// Upstream's `helper.DefaultSelector`.
    fn default_selector(&self, pod: &PodInfo) -> Option<LabelSelector> {
        let none = Labels::new();
        let labels = pod.labels().unwrap_or(&none);
        let mut equal = Labels::new();
        for service in self.services.in_namespace(pod.namespace()) {
            let selector = service.spec.as_ref().and_then(|spec| spec.selector.as_ref());
            let Some(selector) = selector.filter(|selector| !selector.is_empty()) else { continue };
            if selector.iter().all(|(key, value)| labels.get(key) == Some(value)) {
                equal.extend(selector.clone());
            }
        }
        let mut selector = LabelSelector::default();
        if let Some(owner) = controller_of(&pod.pod.metadata) {
            let (namespace, name) = (pod.namespace(), owner.name.as_str());
            match (owner.api_version.as_str(), owner.kind.as_str()) {
                ("v1", "ReplicationController") => {
                    let owner = self.replication_controllers.get(namespace, name);
                    equal.extend(owner.and_then(|rc| rc.spec.as_ref()?.selector.clone()).unwrap_or_default());
                }
                ("apps/v1", "ReplicaSet") => {
                    let owner = self.replica_sets.get(namespace, name);
                    selector =
                        owner.and_then(|set| Some(set.spec.as_ref()?.selector.clone())).unwrap_or_default();
                }
                ("apps/v1", "StatefulSet") => {
                    let owner = self.stateful_sets.get(namespace, name);
                    selector =
                        owner.and_then(|set| Some(set.spec.as_ref()?.selector.clone())).unwrap_or_default();
                }
                _ => {}
            }
        }
        for (key, value) in equal {
            selector.match_labels.get_or_insert_default().insert(key, value);
        }
        let empty = selector.match_labels.as_ref().is_none_or(|labels| labels.is_empty())
            && selector.match_expressions.as_ref().is_none_or(|requirements| requirements.is_empty());
        (!empty).then_some(selector)
    }
}

/// Everything a decision reads.
#[derive(Debug)]
pub struct World {
    pub table: crate::table::NodeTable,
    pub objects: Objects,
}

impl Default for World {
    fn default() -> Self {
        World { table: crate::table::NodeTable::new(), objects: Objects::default() }
    }
}
