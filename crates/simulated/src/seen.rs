//! The little of a pod that a simulated node needs to know. Decoding skips the rest, so that a cache of 150,000 pods
//! stays small and an event costs little.

use crate::profile::PREFIX;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::Resource;
use serde::{Deserialize, Deserializer};
use std::borrow::Cow;
use std::collections::BTreeMap;

/// A pod as its node sees it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SeenPod {
    /// Identity, deletion, finalizers, and the annotations of the simulation.
    #[serde(deserialize_with = "seen_meta")]
    pub metadata: ObjectMeta,
    #[serde(default)]
    pub spec: SeenSpec,
    #[serde(default)]
    pub status: SeenStatus,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SeenSpec {
    pub node_name: String,
    pub containers: Vec<SeenContainer>,
    pub init_containers: Vec<SeenContainer>,
    pub restart_policy: String,
    pub readiness_gates: Vec<SeenGate>,
    pub host_network: bool,
    pub active_deadline_seconds: Option<i64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SeenContainer {
    pub name: String,
    pub image: String,
    pub restart_policy: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SeenGate {
    pub condition_type: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SeenStatus {
    pub phase: String,
    #[serde(rename = "podIP")]
    pub pod_ip: String,
    pub start_time: Option<Time>,
    pub conditions: Vec<SeenCondition>,
    pub container_statuses: Vec<SeenContainerStatus>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SeenCondition {
    #[serde(rename = "type")]
    pub type_: String,
    pub status: String,
    pub last_transition_time: Option<Time>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SeenContainerStatus {
    pub restart_count: i32,
    pub state: SeenState,
    pub last_state: SeenState,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SeenState {
    pub running: Option<SeenRunning>,
    pub waiting: Option<SeenWaiting>,
    pub terminated: Option<SeenTerminated>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SeenRunning {
    pub started_at: Option<Time>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SeenWaiting {
    pub reason: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SeenTerminated {
    pub exit_code: i32,
    pub started_at: Option<Time>,
    pub finished_at: Option<Time>,
}

impl SeenPod {
    pub fn name(&self) -> &str {
        self.metadata.name.as_deref().unwrap_or_default()
    }

    pub fn uid(&self) -> &str {
        self.metadata.uid.as_deref().unwrap_or_default()
    }

    /// Grows with every change.
    pub fn version(&self) -> u64 {
        self.metadata.resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or(0)
    }

    pub fn is_finished(&self) -> bool {
        matches!(self.status.phase.as_str(), "Succeeded" | "Failed")
    }

    pub fn is_deleting(&self) -> bool {
        self.metadata.deletion_timestamp.is_some()
    }

    pub fn has_finalizers(&self) -> bool {
        self.metadata.finalizers.as_ref().is_some_and(|list| !list.is_empty())
    }

    pub fn condition(&self, type_: &str) -> Option<&SeenCondition> {
        self.status.conditions.iter().find(|condition| condition.type_ == type_)
    }

    pub fn is_true(&self, type_: &str) -> bool {
        self.condition(type_).is_some_and(|condition| condition.status == "True")
    }

    /// Since when a condition has its status.
    pub fn since(&self, type_: &str) -> Option<Timestamp> {
        self.condition(type_)?.last_transition_time.as_ref().map(|time| time.0)
    }

    /// All containers share one fate, so the first speaks for all.
    pub fn container(&self) -> Option<&SeenContainerStatus> {
        self.status.container_statuses.first()
    }

    pub fn restarts(&self) -> i32 {
        self.container().map_or(0, |container| container.restart_count)
    }
}

impl Resource for SeenPod {
    type DynamicType = ();
    type Scope = k8s_openapi::NamespaceResourceScope;

    fn kind(_: &()) -> Cow<'_, str> {
        "Pod".into()
    }

    fn group(_: &()) -> Cow<'_, str> {
        "".into()
    }

    fn version(_: &()) -> Cow<'_, str> {
        "v1".into()
    }

    fn plural(_: &()) -> Cow<'_, str> {
        "pods".into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

fn seen_meta<'de, D: Deserializer<'de>>(from: D) -> Result<ObjectMeta, D::Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase", default)]
    #[derive(Default)]
    struct Meta {
        name: Option<String>,
        namespace: Option<String>,
        uid: Option<String>,
        resource_version: Option<String>,
        generation: Option<i64>,
        creation_timestamp: Option<Time>,
        deletion_timestamp: Option<Time>,
        deletion_grace_period_seconds: Option<i64>,
        finalizers: Option<Vec<String>>,
        annotations: BTreeMap<String, String>,
    }
    let mut meta = Meta::deserialize(from)?;
    meta.annotations.retain(|key, _| key.starts_with(PREFIX));
    Ok(ObjectMeta {
        name: meta.name,
        namespace: meta.namespace,
        uid: meta.uid,
        resource_version: meta.resource_version,
        generation: meta.generation,
        creation_timestamp: meta.creation_timestamp,
        deletion_timestamp: meta.deletion_timestamp,
        deletion_grace_period_seconds: meta.deletion_grace_period_seconds,
        finalizers: meta.finalizers,
        annotations: (!meta.annotations.is_empty()).then_some(meta.annotations),
        ..Default::default()
    })
}
