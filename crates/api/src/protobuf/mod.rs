//! Kubernetes' protobuf bodies (`application/vnd.kubernetes.protobuf`), by the schema's field numbers.
//!
//! The form is an envelope, `k8s\0` and a `runtime.Unknown`, around a proto2 message. Go writes every field
//! that is no pointer, zero or not, so zeros are dropped when reading unless the field is known to be a
//! pointer: then zero means zero. When writing, what the object does not have is left out: to every reader
//! the two mean the same. Unknown field numbers are skipped, as protobuf asks.

mod read;
mod unions;
mod write;

use serde_json::{Map, Value};

use crate::decode::DecodeError;
use crate::schema::{Field, Schema, Shape, Type, TypeId};
use read::{Fields, Reader, Wire};

pub use write::{Writer, frame, list_pieces, wrap};

/// What every body starts with.
pub const MAGIC: &[u8] = b"k8s\0";
/// Messages nest no deeper; the schema itself is finite but for JSON schemas of custom resources.
const DEPTH_MAX: usize = 64;

/// Reads a body: `apiVersion`, `kind` and the object's own bytes.
pub fn envelope(bytes: &[u8]) -> Result<(String, String, &[u8]), DecodeError> {
    let body = bytes.strip_prefix(MAGIC).ok_or_else(|| bad("the body does not start with k8s\\0"))?;
    let (mut api_version, mut kind, mut raw) = (String::new(), String::new(), &body[..0]);
    for field in Fields(body) {
        match field? {
            (1, Wire::Bytes(meta)) => {
                for part in Fields(meta) {
                    match part? {
                        (1, Wire::Bytes(text)) => api_version = utf8(text)?,
                        (2, Wire::Bytes(text)) => kind = utf8(text)?,
                        _ => {}
                    }
                }
            }
            (2, Wire::Bytes(bytes)) => raw = bytes,
            _ => {}
        }
    }
    Ok((api_version, kind, raw))
}

/// Decodes a body as an object of the type, with `apiVersion` and `kind` from its envelope.
pub fn decode(schema: &Schema, type_id: TypeId, bytes: &[u8]) -> Result<Value, DecodeError> {
    let (api_version, kind, raw) = envelope(bytes)?;
    let mut map = Map::new();
    Reader { schema }.message(type_id, &[], raw, 0, &mut map)?;
    for (name, text) in [("apiVersion", api_version), ("kind", kind)] {
        if !text.is_empty() {
            map.insert(name.into(), text.into());
        }
    }
    Ok(Value::Object(map))
}

/// Encodes an object of the type as a body: envelope, `apiVersion` and `kind` from the object.
pub fn encode(schema: &Schema, type_id: TypeId, value: &Value) -> Vec<u8> {
    let text = |name: &str| value.get(name).and_then(Value::as_str).unwrap_or_default();
    wrap(text("apiVersion"), text("kind"), &Writer { schema }.object(type_id, value))
}

fn bad(why: &str) -> DecodeError {
    DecodeError(format!("protobuf: {why}"))
}

fn utf8(bytes: &[u8]) -> Result<String, DecodeError> {
    String::from_utf8(bytes.to_vec()).map_err(|_| bad("a string is no UTF-8"))
}

/// Zeros that Go writes only because the field is no pointer.
fn is_dropped(owner: &Type, field: &Field, value: &Value) -> bool {
    let union = unions::of(owner, field).is_some();
    if union || field.shape == Shape::IntOrString && field.name != "targetPort" {
        return false;
    }
    let zero = match value {
        Value::Bool(false) => true,
        Value::Number(n) => n.as_f64() == Some(0.0),
        Value::String(s) => s.is_empty(),
        _ => false,
    };
    zero && !field.required && !is_pointer(owner, field)
}

/// Is the field a pointer upstream, so that false, zero and empty mean what they say?
pub fn is_pointer(owner: &Type, field: &Field) -> bool {
    let named = |list: &[(&str, &str)]| list.contains(&(owner.name.as_str(), field.name.as_str()));
    let by_name = POINTERS.binary_search(&field.name.as_str()).is_ok();
    (by_name && !named(NO_POINTERS)) || named(POINTERS_IN)
}

/// Fields that are pointers in whatever type has them, sorted.
const POINTERS: &[&str] = &[
    "activeDeadlineSeconds",
    "adminAccess",
    "allNodes",
    "allocateLoadBalancerNodePorts",
    "allowMultipleAllocations",
    "allowPrivilegeEscalation",
    "allowVolumeExpansion",
    "attachRequired",
    "automountServiceAccountToken",
    "averageUtilization",
    "backoffLimit",
    "backoffLimitPerIndex",
    "bindsToNode",
    "blockOwnerDeletion",
    "borrowingLimitPercent",
    "collisionCount",
    "completions",
    "controller",
    "currentCPUUtilizationPercentage",
    "defaultMode",
    "deletionGracePeriodSeconds",
    "enableServiceLinks",
    "endPort",
    "errorCode",
    "expirationSeconds",
    "failedJobsHistoryLimit",
    "fsGroup",
    "gracePeriodSeconds",
    "hostProcess",
    "hostUsers",
    "ignoreStoreReadErrorWithClusterBreakingPotential",
    "immutable",
    "leaseDurationSeconds",
    "leaseTransitions",
    "lendablePercent",
    "lun",
    "manualSelector",
    "maxExpirationSeconds",
    "maxFailedIndexes",
    "maxItems",
    "maxLength",
    "maxProperties",
    "maximum",
    "minDomains",
    "minItems",
    "minLength",
    "minProperties",
    "minReplicas",
    "minimum",
    "mode",
    "multipleOf",
    "nodeAllocatableUpdatePeriodSeconds",
    "nominalConcurrencyShares",
    "optional",
    "optionalOldSelf",
    "orphanDependents",
    "parallelism",
    "partition",
    "perDeviceNodeSelection",
    "podInfoOnMount",
    "preventPodSchedulingIfMissing",
    "priority",
    "privileged",
    "progressDeadlineSeconds",
    "readOnlyRootFilesystem",
    "ready",
    "recursiveReadOnlyMounts",
    "remainingItemCount",
    "replicas",
    "requiresRepublish",
    "revisionHistoryLimit",
    "runAsGroup",
    "runAsNonRoot",
    "runAsUser",
    "seLinuxMount",
    "serviceAccountTokenInSecrets",
    "serving",
    "setHostnameAsFQDN",
    "shareProcessNamespace",
    "stabilizationWindowSeconds",
    "started",
    "startingDeadlineSeconds",
    "storageCapacity",
    "storageClassName",
    "succeededCount",
    "successfulJobsHistoryLimit",
    "supplementalGroupsPolicy",
    "suspend",
    "targetCPUUtilizationPercentage",
    "terminating",
    "terminatingReplicas",
    "terminationGracePeriodSeconds",
    "tolerationSeconds",
    "ttlSecondsAfterFinished",
    "userNamespaces",
    "volumeAttributesClassName",
    "x-kubernetes-preserve-unknown-fields",
];

/// Fields of such a name that are none.
const NO_POINTERS: &[(&str, &str)] = &[
    ("CustomResourceColumnDefinition", "priority"),
    ("DeploymentStatus", "replicas"),
    ("ScaleSpec", "replicas"),
    ("AWSElasticBlockStoreVolumeSource", "partition"),
    ("GCEPersistentDiskVolumeSource", "partition"),
    ("PersistentVolumeSpec", "storageClassName"),
    ("IngressClassSpec", "controller"),
    ("PodSecurityContext", "supplementalGroupsPolicy"),
];

/// Pointers whose name is used for plain fields too.
const POINTERS_IN: &[(&str, &str)] = &[
    ("AzureDiskVolumeSource", "fsType"),
    ("AzureDiskVolumeSource", "readOnly"),
    ("CSIVolumeSource", "fsType"),
    ("CSIVolumeSource", "readOnly"),
    ("ClientIPConfig", "timeoutSeconds"),
    ("DeviceAttribute", "bool"),
    ("DeviceAttribute", "int"),
    ("DeviceAttribute", "string"),
    ("DeviceAttribute", "version"),
    ("EndpointPort", "name"),
    ("EndpointPort", "port"),
    ("HorizontalPodAutoscalerStatus", "observedGeneration"),
    ("IngressClassParametersReference", "apiGroup"),
    ("MutatingWebhook", "timeoutSeconds"),
    ("NodeSwapStatus", "capacity"),
    ("PodDNSConfigOption", "value"),
    ("ServiceReference", "port"),
    ("TypedLocalObjectReference", "apiGroup"),
    ("TypedObjectReference", "apiGroup"),
    ("TypedObjectReference", "namespace"),
    ("ValidatingWebhook", "timeoutSeconds"),
    ("VolumeNodeResources", "count"),
];

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A config map as Go writes it: `metadata.name: a`, `data: {k: v}`, and fields that are only zero.
    fn config_map() -> Vec<u8> {
        let meta = [&[0x0a, 1, b'a'][..], &[0x12, 0, 0x1a, 0], &[0x42, 0], &[0x38, 0]].concat();
        let entry = [0x0a, 1, b'k', 0x12, 1, b'v'];
        let object = [&[0x0a, meta.len() as u8][..], &meta, &[0x12, entry.len() as u8], &entry].concat();
        let kind = [&[0x0a, 2][..], b"v1", &[0x12, 9], b"ConfigMap"].concat();
        [MAGIC, &[0x0a, kind.len() as u8], &kind, &[0x12, object.len() as u8], &object].concat()
    }

    #[test]
    fn an_object_is_read_without_gos_zeros() {
        let schema = Schema::builtin();
        let id = schema.resource("", "v1", "configmaps").expect("served").type_id;
        let value = decode(schema, id, &config_map()).expect("decodes");
        assert_eq!(
            value,
            json!({"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"a"},"data":{"k":"v"}})
        );
    }

    #[test]
    fn every_prefix_of_a_body_is_refused_or_read_but_never_panics() {
        let schema = Schema::builtin();
        let id = schema.resource("", "v1", "configmaps").expect("served").type_id;
        let body = config_map();
        for len in 0..body.len() {
            drop(decode(schema, id, &body[..len]));
        }
        assert!(decode(schema, id, b"{}").is_err());
    }
}
