//! Strategies of volumes and of `storage.k8s.io`.

use std::collections::HashSet;

use serde_json::{Value, json};

use crate::field::{self, child, index, key};
use crate::kinds::core::{keep, quantity};
use crate::kinds::pod::node_selector;
use crate::names;
use crate::object::Object;
use crate::rules::{Errors, IMMUTABLE, Rules, frozen, immutable, label_selector, named, one_of, required};

const ACCESS_MODES: [&str; 4] = ["ReadOnlyMany", "ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"];

fn access_modes(path: &str, modes: &[Value], errors: &mut Errors) {
    for mode in modes.iter().filter(|m| !ACCESS_MODES.contains(&m.as_str().unwrap_or_default())) {
        errors.push(field::Error::not_supported(path, mode.clone(), &ACCESS_MODES));
    }
    if modes.len() > 1 && modes.iter().any(|m| m == "ReadWriteOncePod") {
        let detail = "may not use ReadWriteOncePod with other access modes";
        errors.push(field::Error::forbidden(path, detail));
    }
}

pub const PERSISTENT_VOLUME: Rules = Rules {
    generation: false,
    returns_deleted: true,
    create: |object| object.set_at("status", json!({ "phase": "Pending" })),
    update_status: |new, old| keep(new, old, "spec"),
    validate: |object, errors| {
        let spec = object.at("spec").unwrap_or(&Value::Null);
        required("spec", spec, "accessModes", "", errors);
        access_modes("spec.accessModes", spec.list_at("accessModes"), errors);
        let capacity = spec.map_at("capacity").cloned().unwrap_or_default();
        if capacity.is_empty() {
            errors.push(field::Error::required("spec.capacity", ""));
        }
        if !capacity.contains_key("storage") || capacity.len() > 1 {
            let value = Value::Object(capacity.clone());
            errors.push(field::Error::not_supported("spec.capacity", value, &["storage"]));
        }
        for (name, value) in &capacity {
            positive_quantity(&key("spec.capacity", name), value, errors);
        }
        let policies = ["Delete", "Recycle", "Retain"];
        one_of("spec", spec, "persistentVolumeReclaimPolicy", &policies, errors);
        let affinity = volume_node_affinity(spec, errors);
        volume_source(spec, affinity, errors);
        let class = spec.str_at("storageClassName");
        if !class.is_empty() {
            named("spec.storageClassName", class, names::dns_subdomain, errors);
        }
        one_of("spec", spec, "volumeMode", &["Block", "Filesystem"], errors);
    },
    validate_update: |new, old, errors| {
        let source = |object: &Value| -> Vec<(String, Value)> {
            let spec = object.map_at("spec").into_iter().flatten();
            spec.filter(|(k, _)| !MUTABLE.contains(&k.as_str()))
                .map(|(k, v)| (k.clone(), v.clone()))
                .collect()
        };
        if source(new) != source(old) {
            let detail = "spec.persistentvolumesource is immutable after creation";
            errors.push(field::Error::forbidden("spec.persistentvolumesource", detail));
        }
        immutable("spec.volumeMode", new, old, errors);
        if old.at("spec.nodeAffinity").is_some() {
            immutable("spec.nodeAffinity", new, old, errors);
        }
    },
    ..Rules::DEFAULT
};

/// Fields of a volume's spec beside its source.
const MUTABLE: [&str; 9] = [
    "accessModes",
    "capacity",
    "claimRef",
    "mountOptions",
    "nodeAffinity",
    "persistentVolumeReclaimPolicy",
    "storageClassName",
    "volumeAttributesClassName",
    "volumeMode",
];

fn positive_quantity(path: &str, value: &Value, errors: &mut Errors) {
    if quantity(Some(value)).is_some_and(|q| q.is_negative() || q.is_zero()) {
        errors.push(field::Error::invalid(path, value.clone(), "must be greater than zero"));
    }
}

fn volume_node_affinity(spec: &Value, errors: &mut Errors) -> bool {
    let Some(affinity) = spec.at("nodeAffinity") else { return false };
    match affinity.at("required") {
        Some(selector) => node_selector("spec.nodeAffinity.required", selector, errors),
        None => {
            let detail = "must specify required node constraints";
            errors.push(field::Error::required("spec.nodeAffinity.required", detail));
        }
    }
    true
}

fn volume_source(spec: &Value, affinity: bool, errors: &mut Errors) {
    let sources: Vec<(&String, &Value)> = spec
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(name, _)| !MUTABLE.contains(&name.as_str()))
        .collect();
    let [(name, source), ref more @ ..] = sources[..] else {
        errors.push(field::Error::required("spec", "must specify a volume type"));
        return;
    };
    for (extra, _) in more {
        let detail = "may not specify more than 1 volume type";
        errors.push(field::Error::forbidden(child("spec", extra), detail));
    }
    let at = child("spec", name);
    match name.as_str() {
        "nfs" => {
            required(&at, source, "server", "", errors);
            required(&at, source, "path", "", errors);
            let path = source.str_at("path");
            if !path.starts_with('/') {
                errors.push(field::Error::invalid(child(&at, "path"), path, "must be an absolute path"));
            }
        }
        "hostPath" | "local" => {
            let path = source.str_at("path");
            if required(&at, source, "path", "", errors) && path.split('/').any(|s| s == "..") {
                errors.push(field::Error::invalid(child(&at, "path"), path, "must not contain '..'"));
            }
            if name == "local" && !affinity {
                let detail = "Local volume requires node affinity";
                errors.push(field::Error::required("spec.nodeAffinity", detail));
            }
            if name == "hostPath" && path == "/" && spec.str_at("persistentVolumeReclaimPolicy") == "Recycle"
            {
                let detail = "may not be 'recycle' for a hostPath mount of '/'";
                errors.push(field::Error::forbidden("spec.persistentVolumeReclaimPolicy", detail));
            }
        }
        "csi" => {
            driver_name(&child(&at, "driver"), source.str_at("driver"), errors);
            required(&at, source, "volumeHandle", "", errors);
        }
        "gcePersistentDisk" => drop(required(&at, source, "pdName", "", errors)),
        "awsElasticBlockStore" => drop(required(&at, source, "volumeID", "", errors)),
        _ => {}
    }
}

const DRIVER_BYTES_MAX: usize = 63;

fn driver_name(path: &str, name: &str, errors: &mut Errors) {
    if name.is_empty() {
        errors.push(field::Error::required(path, ""));
    }
    if name.len() > DRIVER_BYTES_MAX {
        errors.push(field::Error::too_long(path, DRIVER_BYTES_MAX));
    }
    for problem in names::dns_subdomain(&name.to_lowercase()) {
        errors.push(field::Error::invalid(path, name, problem));
    }
}

pub const PERSISTENT_VOLUME_CLAIM: Rules = Rules {
    generation: false,
    returns_deleted: true,
    create: |object| object.set_at("status", json!({ "phase": "Pending" })),
    update_status: |new, old| keep(new, old, "spec"),
    validate: |object, errors| claim_spec("spec", object.at("spec").unwrap_or(&Value::Null), errors),
    validate_update: |new, old, errors| {
        let mut munged = new.at("spec").cloned().unwrap_or(Value::Null);
        let before = old.at("spec").cloned().unwrap_or(Value::Null);
        let bound = old.str_at("status.phase") == "Bound";
        if bound {
            keep(&mut munged, &before, "resources.requests");
        }
        keep(&mut munged, &before, "volumeAttributesClassName");
        // The binder and the default class may fill these in, once.
        for name in ["volumeName", "storageClassName"] {
            if before.str_at(name).is_empty() && before.at(name).is_none() {
                keep(&mut munged, &before, name);
            }
        }
        if munged != before {
            let detail = "spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims";
            errors.push(field::Error::forbidden("spec", detail));
        }
        let size =
            |object: &Value| quantity(object.at("spec.resources.requests").and_then(|r| r.get("storage")));
        if let (Some(is), Some(was)) = (size(new), size(old))
            && is < was
            && bound
            && size(&json!({ "spec": { "resources": { "requests": old.at("status.capacity") } } }))
                .is_none_or(|c| is < c)
        {
            let detail = "field can not be less than status.capacity";
            errors.push(field::Error::forbidden("spec.resources.requests.storage", detail));
        }
    },
    ..Rules::DEFAULT
};

/// `core.PersistentVolumeClaimSpec`, of claims and of templates for them.
pub fn claim_spec(path: &str, spec: &Value, errors: &mut Errors) {
    required(path, spec, "accessModes", "at least 1 access mode is required", errors);
    label_selector(&child(path, "selector"), spec.at("selector"), errors);
    access_modes(&child(path, "accessModes"), spec.list_at("accessModes"), errors);
    let at = key(&child(path, "resources"), "storage");
    match spec.at("resources.requests.storage") {
        None => errors.push(field::Error::required(at, "")),
        Some(value) => positive_quantity(&at, value, errors),
    }
    let class = spec.str_at("storageClassName");
    if !class.is_empty() {
        named(&child(path, "storageClassName"), class, names::dns_subdomain, errors);
    }
    one_of(path, spec, "volumeMode", &["Block", "Filesystem"], errors);
}

const PARAMETERS_MAX: usize = 512;
const PARAMETERS_BYTES_MAX: usize = 256 << 10;

pub const STORAGE_CLASS: Rules = Rules {
    generation: false,
    returns_deleted: true,
    validate: |object, errors| {
        let provisioner = object.str_at("provisioner");
        if provisioner.is_empty() {
            errors.push(field::Error::required("provisioner", ""));
        } else {
            named("provisioner", &provisioner.to_lowercase(), names::qualified_name, errors);
        }
        parameters(object, errors);
        one_of("", object, "reclaimPolicy", &["Delete", "Retain"], errors);
        one_of("", object, "volumeBindingMode", &["Immediate", "WaitForFirstConsumer"], errors);
        let mut seen = Vec::new();
        for (i, term) in object.list_at("allowedTopologies").iter().enumerate() {
            topology_term(&index("allowedTopologies", i), term, &mut seen, errors);
        }
    },
    validate_update: |new, old, errors| {
        for name in ["parameters", "provisioner", "reclaimPolicy"] {
            frozen(name, new, old, &format!("updates to {name} are forbidden."), errors);
        }
        immutable("volumeBindingMode", new, old, errors);
    },
    ..Rules::DEFAULT
};

fn parameters(object: &Value, errors: &mut Errors) {
    let Some(map) = object.map_at("parameters") else { return };
    if map.len() > PARAMETERS_MAX {
        errors.push(field::Error::too_long("parameters", PARAMETERS_MAX));
    }
    if map.contains_key("") {
        errors.push(field::Error::invalid("parameters", "", "field can not be empty."));
    }
    let total: usize = map.iter().map(|(k, v)| k.len() + v.as_str().map_or(0, str::len)).sum();
    if total > PARAMETERS_BYTES_MAX {
        errors.push(field::Error::too_long("parameters", PARAMETERS_BYTES_MAX));
    }
}

fn topology_term(at: &str, term: &Value, seen: &mut Vec<Value>, errors: &mut Errors) {
    let mut keys = HashSet::new();
    let expressions = child(at, "matchLabelExpressions");
    for (i, item) in term.list_at("matchLabelExpressions").iter().enumerate() {
        let at = index(&expressions, i);
        required(&at, item, "values", "", errors);
        let mut values = HashSet::new();
        for (j, value) in item.list_at("values").iter().enumerate() {
            if !values.insert(value.as_str()) {
                errors.push(field::Error::duplicate(index(&child(&at, "values"), j), value.clone()));
            }
        }
        named(&child(&at, "key"), item.str_at("key"), names::qualified_name, errors);
        if !keys.insert(item.str_at("key")) {
            errors.push(field::Error::duplicate(child(&at, "key"), item.str_at("key")));
        }
    }
    let mut canonical: Vec<String> =
        term.list_at("matchLabelExpressions").iter().map(Value::to_string).collect();
    canonical.sort();
    let canonical = json!(canonical);
    // Upstream finds a term without expressions equal to no term at all.
    if seen.contains(&canonical) || term.list_at("matchLabelExpressions").is_empty() {
        errors.push(field::Error::duplicate(expressions, ""));
    }
    seen.push(canonical);
}

pub const VOLUME_ATTACHMENT: Rules = Rules {
    returns_deleted: true,
    create: |object| object.set_at("status", json!({ "attached": false })),
    update_status: |new, old| keep(new, old, "spec"),
    validate: |object, errors| {
        driver_name("spec.attacher", object.str_at("spec.attacher"), errors);
        let source = object.at("spec.source").unwrap_or(&Value::Null);
        let detail = "must specify exactly one of inlineVolumeSpec and persistentVolumeName";
        match (source.at("inlineVolumeSpec"), source.at("persistentVolumeName")) {
            (None, None) => errors.push(field::Error::required("spec.source", detail)),
            (Some(_), Some(_)) => errors.push(field::Error::forbidden("spec.source", detail)),
            (None, Some(name)) => {
                let (at, name) = ("spec.source.persistentVolumeName", name.as_str().unwrap_or_default());
                if name.is_empty() {
                    let detail = "must specify non empty persistentVolumeName";
                    errors.push(field::Error::required(at, detail));
                }
                named(at, name, names::dns_subdomain, errors);
            }
            (Some(_), None) => {}
        }
        named("spec.nodeName", object.str_at("spec.nodeName"), names::dns_subdomain, errors);
    },
    validate_update: |new, old, errors| immutable("spec", new, old, errors),
    ..Rules::DEFAULT
};

pub const CSI_DRIVER: Rules = Rules {
    returns_deleted: true,
    validate: |object, errors| {
        let spec = object.at("spec").unwrap_or(&Value::Null);
        let valid = names::dns_subdomain(object.name()).is_empty();
        if valid && object.name().len() > DRIVER_BYTES_MAX {
            errors.push(field::Error::too_long("metadata.name", DRIVER_BYTES_MAX));
        }
        for (i, request) in spec.list_at("tokenRequests").iter().enumerate() {
            let at = index("spec.tokenRequests", i);
            let audience = request.str_at("audience");
            if spec.list_at("tokenRequests")[..i].iter().any(|r| r.str_at("audience") == audience) {
                errors.push(field::Error::duplicate(child(&at, "audience"), audience));
            }
            if let Some(seconds) = request.int_at("expirationSeconds").filter(|s| *s < 600) {
                let detail = "may not specify a duration less than 10 minutes";
                errors.push(field::Error::invalid(child(&at, "expirationSeconds"), seconds, detail));
            }
        }
        for mode in
            spec.list_at("volumeLifecycleModes").iter().filter(|m| *m != "Persistent" && *m != "Ephemeral")
        {
            let supported = ["Persistent", "Ephemeral"];
            errors.push(field::Error::not_supported("spec.volumeLifecycleModes", mode.clone(), &supported));
        }
        one_of("spec", spec, "fsGroupPolicy", &["File", "None", "ReadWriteOnceWithFSType"], errors);
    },
    validate_update: |new, old, errors| {
        for name in ["attachRequired", "volumeLifecycleModes"] {
            immutable(&child("spec", name), new, old, errors);
        }
    },
    ..Rules::DEFAULT
};

const NODE_ID_BYTES_MAX: usize = 192;

pub const CSI_NODE: Rules = Rules {
    generation: false,
    returns_deleted: true,
    validate: |object, errors| {
        let mut seen = HashSet::new();
        for (i, driver) in object.list_at("spec.drivers").iter().enumerate() {
            let at = index("spec.drivers", i);
            driver_name(&child(&at, "name"), driver.str_at("name"), errors);
            let id = driver.str_at("nodeID");
            required(&at, driver, "nodeID", "", errors);
            if id.len() > NODE_ID_BYTES_MAX {
                let detail = format!("must be {NODE_ID_BYTES_MAX} characters or less");
                errors.push(field::Error::invalid(child(&at, "nodeID"), id, detail));
            }
            let mut keys = HashSet::new();
            for topology in driver.list_at("topologyKeys") {
                let topology = topology.as_str().unwrap_or_default();
                if topology.is_empty() || !keys.insert(topology) {
                    errors.push(field::Error::duplicate(at.clone(), topology));
                }
                named(&at, topology, names::qualified_name, errors);
            }
            if let Some(count) = driver.int_at("allocatable.count").filter(|c| *c < 0) {
                let path = child(&at, "allocatable.count");
                errors.push(field::Error::invalid(path, count, "must be greater than or equal to 0"));
            }
            if !seen.insert(driver.str_at("name")) {
                errors.push(field::Error::duplicate(child(&at, "name"), driver.str_at("name")));
            }
        }
    },
    // A driver registers once; how many volumes it can take may change.
    validate_update: |new, old, errors| {
        let fixed = |driver: &Value| {
            let mut driver = driver.clone();
            driver.remove_at("allocatable");
            driver
        };
        for driver in new.list_at("spec.drivers") {
            let before =
                old.list_at("spec.drivers").iter().find(|d| d.str_at("name") == driver.str_at("name"));
            if before.is_some_and(|before| fixed(before) != fixed(driver)) {
                errors.push(field::Error::invalid("CSINodeDrivers", driver.clone(), IMMUTABLE));
            }
        }
    },
    ..Rules::DEFAULT
};

pub const CSI_STORAGE_CAPACITY: Rules = Rules {
    generation: false,
    validate: |object, errors| {
        label_selector("nodeTopology", object.at("nodeTopology"), errors);
        if required("", object, "storageClassName", "", errors) {
            named("storageClassName", object.str_at("storageClassName"), names::dns_subdomain, errors);
        }
        for name in ["capacity", "maximumVolumeSize"] {
            if quantity(object.at(name)).is_some_and(|q| q.is_negative()) {
                let value = object[name].clone();
                errors.push(field::Error::invalid(name, value, "must be greater than or equal to 0"));
            }
        }
    },
    validate_update: |new, old, errors| {
        for name in ["nodeTopology", "storageClassName"] {
            immutable(name, new, old, errors);
        }
    },
    ..Rules::DEFAULT
};

pub const VOLUME_ATTRIBUTES_CLASS: Rules = Rules {
    generation: false,
    validate: |object, errors| {
        if required("", object, "driverName", "", errors) {
            driver_name("driverName", object.str_at("driverName"), errors);
        }
        parameters(object, errors);
        if object.map_at("parameters").is_none_or(|p| p.is_empty()) {
            errors.push(field::Error::required("parameters", "must contain at least one key/value pair"));
        }
    },
    validate_update: |new, old, errors| {
        for name in ["driverName", "parameters"] {
            immutable(name, new, old, errors);
        }
    },
    ..Rules::DEFAULT
};
