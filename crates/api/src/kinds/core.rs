//! Strategies of the small kinds of the core group and its neighbours.

use serde_json::{Value, json};

use crate::field;
use crate::names;
use crate::object::Object;
use crate::quantity::Quantity;
use crate::rules::{Errors, Rules, immutable, named, one_of};

/// All values of a ConfigMap or Secret together may not be larger.
const DATA_BYTES_MAX: usize = 1 << 20;

pub const CONFIG_MAP: Rules = Rules {
    generation: false,
    validate: |object, errors| {
        let mut total = 0;
        for map in ["data", "binaryData"] {
            for (key, value) in object.map_at(map).into_iter().flatten() {
                names::config_key(key)
                    .into_iter()
                    .for_each(|p| errors.push(field::Error::invalid(field::key(map, key), key.as_str(), p)));
                if map == "binaryData" && object.at("data").is_some_and(|d| d.get(key).is_some()) {
                    let detail = "duplicate of key present in data";
                    errors.push(field::Error::invalid(field::key(map, key), key.as_str(), detail));
                }
                total += key.len() + value.as_str().map_or(0, str::len);
            }
        }
        if total > DATA_BYTES_MAX {
            // Upstream's root path prints so.
            errors.push(field::Error::too_long("[]", DATA_BYTES_MAX));
        }
    },
    validate_update: validate_immutable_data,
    ..Rules::DEFAULT
};

pub const SECRET: Rules = Rules {
    generation: false,
    create: string_data_into_data,
    update: |new, _| string_data_into_data(new),
    validate: validate_secret,
    validate_update: |new, old, errors| {
        immutable("type", new, old, errors);
        validate_immutable_data(new, old, errors);
    },
    selectable: &["type"],
    ..Rules::DEFAULT
};

/// `stringData` is write-only: it becomes `data`.
fn string_data_into_data(object: &mut Value) {
    use base64::Engine;
    let Some(Value::Object(plain)) = object.remove_at("stringData") else { return };
    for (key, text) in plain {
        let text = text.as_str().unwrap_or_default();
        if !object.get("data").is_some_and(Value::is_object) {
            object["data"] = json!({});
        }
        object["data"][key] = base64::engine::general_purpose::STANDARD.encode(text).into();
    }
}

fn validate_secret(object: &Value, errors: &mut Errors) {
    let data = object.map_at("data");
    let mut total = 0;
    for (key, value) in data.into_iter().flatten() {
        names::config_key(key)
            .into_iter()
            .for_each(|p| errors.push(field::Error::invalid(field::key("data", key), key.as_str(), p)));
        total += value.as_str().map_or(0, str::len) / 4 * 3;
    }
    if total > DATA_BYTES_MAX {
        errors.push(field::Error::too_long("data", DATA_BYTES_MAX));
    }
    let required: &[&str] = match object.str_at("type") {
        "kubernetes.io/dockercfg" => &[".dockercfg"],
        "kubernetes.io/dockerconfigjson" => &[".dockerconfigjson"],
        "kubernetes.io/ssh-auth" => &["ssh-privatekey"],
        "kubernetes.io/tls" => &["tls.crt", "tls.key"],
        _ => &[],
    };
    for key in [".dockercfg", ".dockerconfigjson"].iter().filter(|k| required.contains(*k)) {
        let Some(value) = data.and_then(|d| d.get(*key)).and_then(Value::as_str) else { continue };
        if let Some(detail) = bad_json(value) {
            errors.push(field::Error::invalid(field::key("data", key), "<secret contents redacted>", detail));
        }
    }
    for key in required.iter().filter(|k| !data.is_some_and(|d| d.contains_key(**k))) {
        errors.push(field::Error::required(field::key("data", key), ""));
    }
    if object.str_at("type") == "kubernetes.io/service-account-token" {
        let at = "metadata.annotations[kubernetes.io/service-account.name]";
        let annotations = object.map_at("metadata.annotations");
        if annotations.and_then(|a| a.get("kubernetes.io/service-account.name")).is_none() {
            errors.push(field::Error::required(at, ""));
        }
    }
}

/// Why base64 text holds no JSON, in Go's words.
fn bad_json(encoded: &str) -> Option<String> {
    use base64::Engine;
    let bytes = base64::engine::general_purpose::STANDARD.decode(encoded).ok()?;
    let error = serde_json::from_slice::<serde::de::IgnoredAny>(&bytes).err()?;
    let text = String::from_utf8_lossy(&bytes);
    let bad = text
        .lines()
        .nth(error.line().saturating_sub(1))
        .and_then(|l| l.chars().nth(error.column().saturating_sub(1)));
    match (error.is_eof(), bytes.get(error.column().saturating_sub(1)), bad) {
        (true, _, _) => Some("unexpected end of JSON input".into()),
        // Go goes by bytes, and shows the byte as if it were a character.
        (false, Some(byte), _) => {
            Some(format!("invalid character {:?} looking for beginning of value", char::from(*byte)))
        }
        (false, None, _) => Some("unexpected end of JSON input".into()),
    }
}

fn validate_immutable_data(new: &Value, old: &Value, errors: &mut Errors) {
    if !old.bool_at("immutable") {
        return;
    }
    if !new.bool_at("immutable") {
        errors.push(field::Error::forbidden("immutable", "field is immutable when `immutable` is set"));
    }
    for map in ["data", "binaryData"] {
        if new.at(map) != old.at(map) {
            errors.push(field::Error::forbidden(map, "field is immutable when `immutable` is set"));
        }
    }
}

pub const SERVICE_ACCOUNT: Rules = Rules { generation: false, returns_deleted: true, ..Rules::DEFAULT };

pub const NAMESPACE: Rules = Rules {
    name: names::dns_label,
    create: |object| {
        object.set_at("status", json!({ "phase": "Active" }));
        if !object.list_at("spec.finalizers").iter().any(|f| f == "kubernetes") {
            let mut finalizers = object.list_at("spec.finalizers").to_vec();
            finalizers.push(json!("kubernetes"));
            object.set_at("spec.finalizers", finalizers);
        }
    },
    update: |new, old| {
        // Only the `finalize` subresource removes finalizers.
        keep(new, old, "spec.finalizers");
        keep(new, old, "status");
    },
    update_status: |new, old| keep(new, old, "spec"),
    generation: false,
    selectable: &["status.phase"],
    ..Rules::DEFAULT
};

/// The field stays what it was.
pub fn keep(new: &mut Value, old: &Value, path: &str) {
    match old.at(path) {
        Some(value) => new.set_at(path, value.clone()),
        None => drop(new.remove_at(path)),
    }
}

pub const NODE: Rules = Rules {
    generation: false,
    create_on_update: false,
    validate: |object, errors| {
        for (index, cidr) in object.list_at("spec.podCIDRs").iter().enumerate() {
            let text = cidr.as_str().unwrap_or_default();
            if crate::kinds::networking::Cidr::parse(text).is_none() {
                let at = field::index("spec.podCIDRs", index);
                errors.push(field::Error::invalid(at, json!([text]), crate::kinds::networking::BAD_CIDR));
            }
        }
        for (index, taint) in object.list_at("spec.taints").iter().enumerate() {
            // Upstream names the metadata here.
            let at = field::index("metadata.taints", index);
            for problem in names::qualified_name(taint.str_at("key")) {
                errors.push(field::Error::invalid(field::child(&at, "key"), taint.str_at("key"), problem));
            }
            for problem in names::label_value(taint.str_at("value")) {
                errors.push(field::Error::invalid(
                    field::child(&at, "value"),
                    taint.str_at("value"),
                    problem,
                ));
            }
            match taint.str_at("effect") {
                "" => errors.push(field::Error::required(field::child(&at, "effect"), "")),
                _ => one_of(&at, taint, "effect", &["NoSchedule", "PreferNoSchedule", "NoExecute"], errors),
            }
        }
    },
    validate_update: |new, old, errors| {
        let cidr = old.str_at("spec.podCIDR");
        if !cidr.is_empty() && new.str_at("spec.podCIDR") != cidr {
            let detail = "node updates may not change podCIDR except from \"\" to valid";
            errors.push(field::Error::forbidden("spec.podCIDRs", detail));
        }
    },
    selectable: &["spec.unschedulable"],
    selectable_value: Some(|object, path| {
        (path == "spec.unschedulable").then(|| object.bool_at("spec.unschedulable").to_string())
    }),
    ..Rules::DEFAULT
};

pub const EVENT: Rules = Rules {
    lenient_finalizers: true,
    generation: false,
    create_on_update: true,
    time_to_live_seconds: Some(3600),
    validate: validate_event,
    selectable: &[
        "involvedObject.kind",
        "involvedObject.namespace",
        "involvedObject.name",
        "involvedObject.uid",
        "involvedObject.apiVersion",
        "involvedObject.resourceVersion",
        "involvedObject.fieldPath",
        "reason",
        "reportingComponent",
        "source",
        "type",
    ],
    selectable_value: Some(|object, path| match path {
        "source" => {
            let component = object.str_at("source.component");
            Some(
                if component.is_empty() { object.str_at("reportingComponent") } else { component }.to_owned(),
            )
        }
        _ => None,
    }),
    ..Rules::DEFAULT
};

/// Longest texts of an event that has `eventTime`, in characters.
const EVENT_NAME_CHARS_MAX: usize = 128;
const EVENT_NOTE_CHARS_MAX: usize = 1024;

/// Events are of the namespace of what they are about. Those with `eventTime` say more, and keep to more.
fn validate_event(object: &Value, errors: &mut Errors) {
    let (about, own) = (object.str_at("involvedObject.namespace"), object.namespace());
    let is_new = object.at("eventTime").is_some();
    let agrees = match (about, is_new) {
        ("", false) => matches!(own, "" | "default"),
        ("", true) => matches!(own, "default" | "kube-system"),
        (_, true) => true,
        (about, false) => about == own,
    };
    if !agrees {
        let detail = "does not match event.namespace";
        errors.push(field::Error::invalid("involvedObject.namespace", about, detail));
    }
    if !is_new {
        return;
    }
    let controller = object.str_at("reportingComponent");
    if controller.is_empty() {
        errors.push(field::Error::required("reportingComponent", ""));
    }
    named("reportingComponent", controller, names::qualified_name, errors);
    for name in ["reportingInstance", "action", "reason"] {
        let text = object.str_at(name);
        if text.is_empty() {
            errors.push(field::Error::required(name, ""));
        } else if text.chars().count() > EVENT_NAME_CHARS_MAX {
            let detail = format!("can have at most {EVENT_NAME_CHARS_MAX} characters");
            errors.push(field::Error::invalid(name, "", detail));
        }
    }
    if object.str_at("message").chars().count() > EVENT_NOTE_CHARS_MAX {
        let detail = format!("can have at most {EVENT_NOTE_CHARS_MAX} characters");
        errors.push(field::Error::invalid("message", "", detail));
    }
}

fn validate_series(object: &Value, errors: &mut Errors) {
    let Some(series) = object.at("series") else { return };
    if series.int_at("count").unwrap_or(0) < 2 {
        errors.push(field::Error::invalid("series.count", "", "should be at least 2"));
    }
    if series.at("lastObservedTime").is_none() {
        errors.push(field::Error::required("series.lastObservedTime", ""));
    }
}

/// Upstream reports errors of both groups' events as the core group's. Through the newer group events must be of the
/// newer form, and only their series grows.
pub const EVENTS_EVENT: Rules = Rules {
    validate: |object, errors| {
        if object.at("eventTime").is_none() {
            errors.push(field::Error::required("eventTime", ""));
        }
        let kind = object.str_at("type");
        if !["Normal", "Warning"].contains(&kind) {
            errors.push(field::Error::invalid("type", "", format!("has invalid value: {kind}")));
        }
        for name in ["firstTimestamp", "lastTimestamp"] {
            if object.at(name).is_some() {
                errors.push(field::Error::invalid(name, "", "needs to be unset"));
            }
        }
        if object.int_at("count").unwrap_or(0) != 0 {
            errors.push(field::Error::invalid("count", "", "needs to be unset"));
        }
        if ["component", "host"].iter().any(|name| !object["source"].str_at(name).is_empty()) {
            errors.push(field::Error::invalid("source", "", "needs to be unset"));
        }
        validate_series(object, errors);
    },
    validate_update: |new, old, errors| {
        let fixed = [
            "involvedObject",
            "reason",
            "message",
            "reportingComponent",
            "reportingInstance",
            "action",
            "type",
            "related",
            "eventTime",
        ];
        fixed.iter().for_each(|name| immutable(name, new, old, errors));
        if new.at("series") != old.at("series") {
            validate_series(new, errors);
        }
    },
    generation: false,
    create_on_update: true,
    time_to_live_seconds: Some(3600),
    reported_group: Some(""),
    selectable: EVENT.selectable,
    selectable_value: EVENT.selectable_value,
    ..Rules::DEFAULT
};

pub const LEASE: Rules = Rules {
    generation: false,
    create_on_update: true,
    validate: |object, errors| {
        for name in ["leaseDurationSeconds", "leaseTransitions"] {
            let minimum = i64::from(name == "leaseDurationSeconds");
            if let Some(number) = object.at("spec").and_then(|s| s.int_at(name)).filter(|n| *n < minimum) {
                let detail = if minimum == 1 {
                    "must be greater than 0"
                } else {
                    "must be greater than or equal to 0"
                };
                errors.push(field::Error::invalid(format!("spec.{name}"), number, detail));
            }
        }
    },
    ..Rules::DEFAULT
};

pub const ENDPOINTS: Rules = Rules {
    generation: false,
    create_on_update: true,
    validate: |object, errors| {
        for (i, subset) in object.list_at("subsets").iter().enumerate() {
            let at = field::index("subsets", i);
            if subset.list_at("addresses").is_empty() && subset.list_at("notReadyAddresses").is_empty() {
                let detail = "must specify `addresses` or `notReadyAddresses`";
                errors.push(field::Error::required(at.clone(), detail));
            }
            for list in ["addresses", "notReadyAddresses"] {
                for (j, address) in subset.list_at(list).iter().enumerate() {
                    ip(
                        &field::child(&field::index(&field::child(&at, list), j), "ip"),
                        address.str_at("ip"),
                        errors,
                    );
                }
            }
            for (j, port) in subset.list_at("ports").iter().enumerate() {
                let at = field::index(&field::child(&at, "ports"), j);
                let name = port.str_at("name");
                if !name.is_empty() {
                    named(&field::child(&at, "name"), name, names::dns_label, errors);
                } else if subset.list_at("ports").len() > 1 {
                    errors.push(field::Error::required(field::child(&at, "name"), ""));
                }
                let number = port.int_at("port").unwrap_or(0);
                for problem in names::port_number(number) {
                    errors.push(field::Error::invalid(field::child(&at, "port"), number, problem));
                }
                one_of(&at, port, "protocol", &["SCTP", "TCP", "UDP"], errors);
            }
        }
    },
    ..Rules::DEFAULT
};

pub const ENDPOINT_SLICE: Rules = Rules {
    validate: |object, errors| {
        match object.str_at("addressType") {
            "" => errors.push(field::Error::required("addressType", "")),
            _ => one_of("", object, "addressType", &["FQDN", "IPv4", "IPv6"], errors),
        }
        for (i, endpoint) in object.list_at("endpoints").iter().enumerate() {
            let at = field::child(&field::index("endpoints", i), "addresses");
            let addresses = endpoint.list_at("addresses");
            if addresses.is_empty() {
                errors.push(field::Error::required(at, "must contain at least 1 address"));
                continue;
            }
            for (j, address) in addresses.iter().enumerate() {
                let (at, text) = (field::index(&at, j), address.as_str().unwrap_or_default());
                match object.str_at("addressType") {
                    "FQDN" => named(&at, text, names::dns_subdomain, errors),
                    _ => ip(&at, text, errors),
                }
            }
            let at = field::index("endpoints", i);
            for (name, rule) in [
                ("nodeName", names::dns_subdomain as fn(&str) -> Vec<String>),
                ("hostname", names::dns_label),
            ] {
                if let Some(value) = endpoint.at(name).and_then(Value::as_str) {
                    named(&field::child(&at, name), value, rule, errors);
                }
            }
        }
        for (i, port) in object.list_at("ports").iter().enumerate() {
            let at = field::index("ports", i);
            let name = port.str_at("name");
            if !name.is_empty() {
                named(&field::child(&at, "name"), name, names::dns_label, errors);
            }
            if object.list_at("ports")[..i].iter().any(|p| p.str_at("name") == name) {
                errors.push(field::Error::duplicate(field::child(&at, "name"), name));
            }
            one_of(&at, port, "protocol", &["SCTP", "TCP", "UDP"], errors);
        }
    },
    validate_update: |new, old, errors| immutable("addressType", new, old, errors),
    ..Rules::DEFAULT
};

/// A good IP address.
pub fn ip(path: &str, text: &str, errors: &mut Errors) {
    if text.parse::<std::net::IpAddr>().is_err() {
        let detail = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
        errors.push(field::Error::invalid(path, text, detail));
    }
}

pub const LIMIT_RANGE: Rules = Rules {
    generation: false,
    // Upstream names the nameless by their uid.
    create: |object| {
        if object.name().is_empty() && object.str_at("metadata.generateName").is_empty() {
            let uid = object.uid().to_owned();
            object.set_at("metadata.name", uid);
        }
    },
    validate: |object, errors| {
        let mut types = std::collections::HashSet::new();
        for (index, item) in object.list_at("spec.limits").iter().enumerate() {
            limit_range_item(&field::index("spec.limits", index), item, errors);
            if !types.insert(item.str_at("type")) {
                let at = field::index("spec.limits", index) + ".type";
                errors.push(field::Error::duplicate(at, item.str_at("type")));
            }
        }
    },
    ..Rules::DEFAULT
};

fn limit_range_item(at: &str, item: &Value, errors: &mut Errors) {
    let kind = item.str_at("type");
    let type_at = field::child(at, "type");
    let before = errors.len();
    named(&type_at, kind, names::qualified_name, errors);
    if errors.len() == before
        && !kind.contains('/')
        && !["Container", "Pod", "PersistentVolumeClaim"].contains(&kind)
    {
        let detail = "must be a standard limit type or fully qualified";
        errors.push(field::Error::invalid(type_at, kind, detail));
    }
    let value = |list: &str, name: &str| quantity(item.at(list).and_then(|l| l.get(name)));
    if kind == "Pod" {
        for name in ["default", "defaultRequest"].iter().filter(|n| item.map_at(n).is_some()) {
            let detail = "may not be specified when `type` is 'Pod'";
            errors.push(field::Error::forbidden(field::child(at, name), detail));
        }
    }
    if kind == "PersistentVolumeClaim"
        && value("min", "storage").is_none()
        && value("max", "storage").is_none()
    {
        let detail = "either minimum or maximum storage value is required, but neither was provided";
        errors.push(field::Error::required(field::child(at, "limits"), detail));
    }
    for (low, high, field, text) in LIMIT_ORDER {
        for name in item.map_at(low).into_iter().flatten().map(|(name, _)| name) {
            let (Some(a), Some(b)) = (value(low, name), value(high, name)) else { continue };
            if a > b {
                let detail = text.replacen("{}", &a.to_string(), 1).replacen("{}", &b.to_string(), 1);
                let shown = item.at(field).and_then(|f| f.get(name)).cloned().unwrap_or(Value::Null);
                errors.push(field::Error::invalid(field::key(&field::child(at, field), name), shown, detail));
            }
        }
    }
    for (name, ratio) in item.map_at("maxLimitRequestRatio").into_iter().flatten() {
        limit_ratio(at, item, name, ratio, errors);
    }
}

/// Which may not be greater than which, the field at fault, and upstream's words.
const LIMIT_ORDER: [(&str, &str, &str, &str); 6] = [
    ("min", "max", "min", "min value {} is greater than max value {}"),
    ("min", "defaultRequest", "defaultRequest", "min value {} is greater than default request value {}"),
    ("defaultRequest", "max", "defaultRequest", "default request value {} is greater than max value {}"),
    (
        "defaultRequest",
        "default",
        "defaultRequest",
        "default request value {} is greater than default limit value {}",
    ),
    ("min", "default", "default", "min value {} is greater than default value {}"),
    ("default", "max", "default", "default value {} is greater than max value {}"),
];

fn limit_ratio(at: &str, item: &Value, name: &str, ratio: &Value, errors: &mut Errors) {
    let number = |list: &str| quantity(item.at(list).and_then(|l| l.get(name))).map(|q| q.as_f64());
    let path = field::key(&field::child(at, "maxLimitRequestRatio"), name);
    let Some(wanted) = quantity(Some(ratio)).map(|q| q.as_f64()) else { return };
    if wanted < 1.0 {
        let detail = format!("ratio {wanted} is less than 1");
        errors.push(field::Error::invalid(path.clone(), ratio.clone(), detail));
    }
    let (Some(least), Some(most)) = (number("min"), number("max")) else { return };
    if wanted > most / least {
        let detail = format!("ratio {wanted} is greater than max/min = {:.6}", most / least);
        errors.push(field::Error::invalid(path, ratio.clone(), detail));
    }
}

/// The quantity, if there is one.
pub fn quantity(value: Option<&Value>) -> Option<Quantity> {
    value?.as_str()?.parse().ok()
}

pub const RESOURCE_QUOTA: Rules = Rules {
    generation: false,
    validate: |object, errors| {
        for (name, value) in object.map_at("spec.hard").into_iter().flatten() {
            if quantity(Some(value)).is_some_and(|q| q.is_negative()) {
                let at = field::key("spec.hard", name);
                errors.push(field::Error::invalid(at, value.clone(), "must be greater than or equal to 0"));
            }
        }
        quota_scopes(object, errors);
    },
    create: |object| object.set_at("status", json!({})),
    update_status: |new, old| keep(new, old, "spec"),
    returns_deleted: true,
    validate_update: |new, old, errors| immutable("spec.scopes", new, old, errors),
    ..Rules::DEFAULT
};

const SCOPES: [&str; 7] = [
    "BestEffort",
    "CrossNamespacePodAffinity",
    "NotBestEffort",
    "NotTerminating",
    "PriorityClass",
    "Terminating",
    "VolumeAttributesClass",
];

fn quota_scopes(object: &Value, errors: &mut Errors) {
    for scope in
        object.list_at("spec.scopes").iter().filter(|s| !SCOPES.contains(&s.as_str().unwrap_or_default()))
    {
        errors.push(field::Error::invalid("spec.scopes", scope.clone(), "unsupported scope"));
    }
    for item in object.list_at("spec.scopeSelector.matchExpressions") {
        let at = "spec.scopeSelector.matchExpressions";
        let (scope, values) = (item.str_at("scopeName"), item.list_at("values"));
        if !SCOPES.contains(&scope) {
            errors.push(field::Error::invalid(format!("{at}.scopeName"), scope, "unsupported scope"));
        }
        match item.str_at("operator") {
            "In" | "NotIn" if values.is_empty() => errors.push(field::Error::required(
                format!("{at}.values"),
                "must be at least one value when `operator` is 'In' or 'NotIn' for scope selector",
            )),
            "Exists" | "DoesNotExist" if !values.is_empty() => errors.push(field::Error::invalid(
                format!("{at}.values"),
                values.to_vec(),
                "must be no value when `operator` is 'Exist' or 'DoesNotExist' for scope selector",
            )),
            "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
            other => errors.push(field::Error::invalid(
                format!("{at}.operator"),
                other,
                "not a valid selector operator",
            )),
        }
    }
}

pub const PRIORITY_CLASS: Rules = Rules {
    validate: |object, errors| {
        let (name, value) = (object.name(), object.int_at("value").unwrap_or(0));
        let system = ["system-node-critical", "system-cluster-critical"].contains(&name);
        if name.starts_with("system-") && !system {
            let detail = "priority class names with 'system-' prefix are reserved for system use only";
            errors.push(field::Error::forbidden("metadata.name", detail));
        } else if value > 1_000_000_000 && !system {
            let detail = "maximum allowed value of a user defined priority is 1000000000";
            errors.push(field::Error::forbidden("value", detail));
        }
        one_of("", object, "preemptionPolicy", &["Never", "PreemptLowerPriority"], errors);
    },
    validate_update: |new, old, errors| {
        if new.at("value") != old.at("value") {
            errors.push(field::Error::forbidden("value", "may not be changed in an update."));
        }
        immutable("preemptionPolicy", new, old, errors);
    },
    ..Rules::DEFAULT
};
