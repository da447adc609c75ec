//! Printer columns: the rows `kubectl get` shows, made by the server as a `Table`.
//!
//! A kind's columns are one line of text and one function from object to cells. In the line, columns are
//! separated by `|`; a leading `+` marks those only `-o wide` shows; `:type` follows where it is not string.

mod platform;

use serde_json::{Map, Value, json};

use crate::object::Object;
use crate::schema::Kind;
use crate::selector::{LabelSelector, Operator};
use crate::time;

/// What a row may depend on beside the object.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    pub now: jiff::Timestamp,
}

type Cells = fn(&Value, Clock) -> Vec<Value>;

/// Columns of a kind.
pub struct Columns {
    line: &'static str,
    cells: Cells,
}

/// API group, plural, columns, cells. Kinds not listed show name and creation time.
const COLUMNS: &[(&str, &str, &str, Cells)] = &[
    ("", "configmaps", "Name|Data|Age", config_map),
    ("", "endpoints", "Name|Endpoints|Age", endpoints),
    ("", "events", "Last Seen|Type|Reason|Object|+Subobject|+Source|Message|+First Seen|+Count|+Name", event),
    ("", "namespaces", "Name|Status|Age", |o, c| vec![name(o), text(o.str_at("status.phase")), age(o, c)]),
    (
        "",
        "nodes",
        "Name|Status|Roles|Age|Version|+Internal-IP|+External-IP|+OS-Image|+Kernel-Version|+Container-Runtime",
        node,
    ),
    (
        "",
        "persistentvolumeclaims",
        "Name|Status|Volume|Capacity|Access Modes|StorageClass|+VolumeAttributesClass|Age|+VolumeMode",
        claim,
    ),
    (
        "",
        "persistentvolumes",
        "Name|Capacity|Access Modes|Reclaim Policy|Status|Claim|StorageClass|+VolumeAttributesClass|Reason|Age|+VolumeMode",
        volume,
    ),
    ("", "pods", "Name|Ready|Status|Restarts|Age|+IP|+Node|+Nominated Node|+Readiness Gates", pod),
    ("", "podtemplates", "Name|Containers|Images|Pod Labels", |o, _| {
        let (names, images) = containers(o, "template.spec.containers");
        vec![name(o), names, images, text(&labels(o.map_at("template.metadata.labels")))]
    }),
    (
        "",
        "replicationcontrollers",
        "Name|Desired:integer|Current:integer|Ready:integer|Age|+Containers|+Images|+Selector",
        |o, c| {
            let (names, images) = containers(o, "spec.template.spec.containers");
            vec![
                name(o),
                count(o, "spec.replicas"),
                count(o, "status.replicas"),
                count(o, "status.readyReplicas"),
                age(o, c),
                names,
                images,
                text(&labels(o.map_at("spec.selector"))),
            ]
        },
    ),
    ("", "resourcequotas", "Name|Request|Limit|Age", quota),
    ("", "secrets", "Name|Type|Data|Age", |o, c| {
        vec![name(o), text(o.str_at("type")), size(o, "data"), age(o, c)]
    }),
    ("", "serviceaccounts", "Name|Secrets|Age", |o, c| {
        vec![name(o), json!(o.list_at("secrets").len()), age(o, c)]
    }),
    ("", "services", "Name|Type|Cluster-IP|External-IP|Port(s)|Age|+Selector", service),
    ("apps", "controllerrevisions", "Name|Controller|Revision|Age", |o, c| {
        let owner = o.list_at("metadata.ownerReferences").iter().find(|r| r.bool_at("controller"));
        let owner = owner.map(|r| format!("{}/{}", qualified(r), r.str_at("name")));
        vec![name(o), text(&owner.unwrap_or(NONE.into())), count(o, "revision"), age(o, c)]
    }),
    (
        "apps",
        "daemonsets",
        "Name|Desired:integer|Current:integer|Ready:integer|Up-to-date:integer|Available:integer|Node Selector|Age|+Containers|+Images|+Selector",
        |o, c| {
            let (names, images) = containers(o, "spec.template.spec.containers");
            vec![
                name(o),
                count(o, "status.desiredNumberScheduled"),
                count(o, "status.currentNumberScheduled"),
                count(o, "status.numberReady"),
                count(o, "status.updatedNumberScheduled"),
                count(o, "status.numberAvailable"),
                text(&labels(o.map_at("spec.template.spec.nodeSelector"))),
                age(o, c),
                names,
                images,
                text(&selector(o.at("spec.selector"))),
            ]
        },
    ),
    ("apps", "deployments", "Name|Ready|Up-to-date|Available|Age|+Containers|+Images|+Selector", |o, c| {
        let (names, images) = containers(o, "spec.template.spec.containers");
        vec![
            name(o),
            ready(o),
            count(o, "status.updatedReplicas"),
            count(o, "status.availableReplicas"),
            age(o, c),
            names,
            images,
            text(&selector(o.at("spec.selector"))),
        ]
    }),
    (
        "apps",
        "replicasets",
        "Name|Desired:integer|Current:integer|Ready:integer|Age|+Containers|+Images|+Selector",
        |o, c| {
            let (names, images) = containers(o, "spec.template.spec.containers");
            vec![
                name(o),
                count(o, "spec.replicas"),
                count(o, "status.replicas"),
                count(o, "status.readyReplicas"),
                age(o, c),
                names,
                images,
                text(&selector(o.at("spec.selector"))),
            ]
        },
    ),
    ("apps", "statefulsets", "Name|Ready|Age|+Containers|+Images", |o, c| {
        let (names, images) = containers(o, "spec.template.spec.containers");
        vec![name(o), ready(o), age(o, c), names, images]
    }),
    (
        "batch",
        "cronjobs",
        "Name|Schedule|Timezone|Suspend:boolean|Active:integer|Last Schedule|Age|+Containers|+Images|+Selector",
        |o, c| {
            let (names, images) = containers(o, "spec.jobTemplate.spec.template.spec.containers");
            let zone = o.str_at("spec.timeZone");
            let suspended = if o.bool_at("spec.suspend") { "True" } else { "False" };
            vec![
                name(o),
                text(o.str_at("spec.schedule")),
                text(or_none(zone)),
                text(suspended),
                json!(o.list_at("status.active").len()),
                since(o.str_at("status.lastScheduleTime"), c, NONE),
                age(o, c),
                names,
                images,
                text(&selector(o.at("spec.jobTemplate.spec.selector"))),
            ]
        },
    ),
    ("batch", "jobs", "Name|Status|Completions|Duration|Age|+Containers|+Images|+Selector", job),
    (
        "certificates.k8s.io",
        "certificatesigningrequests",
        "Name|Age|SignerName|Requestor|RequestedDuration|Condition",
        |o, c| {
            let duration = o.int_at("spec.expirationSeconds").map_or(NONE.into(), time::age);
            let mut conditions: Vec<&str> =
                o.list_at("status.conditions").iter().map(|x| x.str_at("type")).collect();
            if conditions.is_empty() {
                conditions.push("Pending");
            }
            if !o.str_at("status.certificate").is_empty() {
                conditions.push("Issued");
            }
            vec![
                name(o),
                age(o, c),
                text(o.str_at("spec.signerName")),
                text(o.str_at("spec.username")),
                text(&duration),
                text(&conditions.join(",")),
            ]
        },
    ),
    ("coordination.k8s.io", "leases", "Name|Holder|Age", |o, c| {
        vec![name(o), text(o.str_at("spec.holderIdentity")), age(o, c)]
    }),
    ("discovery.k8s.io", "endpointslices", "Name|AddressType|Ports|Endpoints|Age", slice),
    ("networking.k8s.io", "ingressclasses", "Name|Controller|Parameters|Age", |o, c| {
        let parameters = o.at("spec.parameters").map(|p| match p.str_at("apiGroup") {
            "" => format!("{}/{}", p.str_at("kind"), p.str_at("name")),
            group => format!("{}.{group}/{}", p.str_at("kind"), p.str_at("name")),
        });
        vec![name(o), text(o.str_at("spec.controller")), text(&parameters.unwrap_or(NONE.into())), age(o, c)]
    }),
    ("networking.k8s.io", "ingresses", "Name|Class|Hosts|Address|Ports|Age", ingress),
    ("networking.k8s.io", "networkpolicies", "Name|Pod-Selector|Age", |o, c| {
        vec![name(o), text(&selector(o.at("spec.podSelector"))), age(o, c)]
    }),
    (
        "policy",
        "poddisruptionbudgets",
        "Name|Min Available|Max Unavailable|Allowed Disruptions:integer|Age",
        |o, c| {
            let or_na = |path: &str| o.at(path).map_or("N/A".to_owned(), plain);
            vec![
                name(o),
                text(&or_na("spec.minAvailable")),
                text(&or_na("spec.maxUnavailable")),
                count(o, "status.disruptionsAllowed"),
                age(o, c),
            ]
        },
    ),
    (
        "rbac.authorization.k8s.io",
        "clusterrolebindings",
        "Name|Role|Age|+Users|+Groups|+ServiceAccounts",
        binding,
    ),
    ("rbac.authorization.k8s.io", "rolebindings", "Name|Role|Age|+Users|+Groups|+ServiceAccounts", binding),
    (
        "scheduling.k8s.io",
        "priorityclasses",
        "Name|Value:integer|Global-Default:boolean|Age|+PreemptionPolicy",
        |o, c| {
            vec![
                name(o),
                count(o, "value"),
                json!(o.bool_at("globalDefault")),
                age(o, c),
                text(o.str_at("preemptionPolicy")),
            ]
        },
    ),
    (
        "storage.k8s.io",
        "storageclasses",
        "Name|Provisioner|ReclaimPolicy|VolumeBindingMode|AllowVolumeExpansion|Age",
        |o, c| {
            let annotations = o.map_at("metadata.annotations");
            let default = annotations
                .and_then(|a| a.get("storageclass.kubernetes.io/is-default-class"))
                .is_some_and(|v| v == "true");
            let shown = if default { format!("{} (default)", o.name()) } else { o.name().to_owned() };
            vec![
                text(&shown),
                text(o.str_at("provisioner")),
                text(o.str_at("reclaimPolicy")),
                text(o.str_at("volumeBindingMode")),
                json!(o.bool_at("allowVolumeExpansion")),
                age(o, c),
            ]
        },
    ),
];

const NONE: &str = "<none>";
const UNKNOWN: &str = "<unknown>";

impl Columns {
    pub fn of(kind: &Kind) -> Columns {
        let group = if kind.kind == "Event" { "" } else { kind.group.as_str() };
        let mut all = COLUMNS.iter().chain(platform::COLUMNS);
        let found = all.find(|(g, p, ..)| *g == group && *p == kind.plural);
        match found {
            Some((_, _, line, cells)) => Columns { line, cells: *cells },
            None => Columns {
                line: "Name|Created At:date",
                cells: |o, _| vec![name(o), text(o.str_at("metadata.creationTimestamp"))],
            },
        }
    }

    /// `columnDefinitions` of the table.
    pub fn definitions(&self) -> Vec<Value> {
        self.line
            .split('|')
            .map(|column| {
                let (wide, column) = column.strip_prefix('+').map_or((false, column), |c| (true, c));
                let (name, kind) = column.split_once(':').unwrap_or((column, "string"));
                json!({
                    "name": name,
                    "type": kind,
                    "format": if matches!(name, "Name" | "Attacher") { "name" } else { "" },
                    "description": "",
                    "priority": i32::from(wide),
                })
            })
            .collect()
    }

    pub fn cells(&self, object: &Value, clock: Clock) -> Vec<Value> {
        (self.cells)(object, clock)
    }
}

fn text(value: &str) -> Value {
    Value::String(value.to_owned())
}

fn or_none(value: &str) -> &str {
    if value.is_empty() { NONE } else { value }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn name(object: &Value) -> Value {
    text(object.name())
}

fn count(object: &Value, path: &str) -> Value {
    json!(object.int_at(path).unwrap_or(0))
}

fn size(object: &Value, path: &str) -> Value {
    json!(object.map_at(path).map_or(0, Map::len))
}

fn ready(object: &Value) -> Value {
    let number = |path: &str| object.int_at(path).unwrap_or(0);
    text(&format!("{}/{}", number("status.readyReplicas"), number("spec.replicas")))
}

fn age(object: &Value, clock: Clock) -> Value {
    since(object.str_at("metadata.creationTimestamp"), clock, UNKNOWN)
}

fn seconds_since(time: &str, clock: Clock) -> Option<i64> {
    time.parse::<jiff::Timestamp>().ok().map(|t| clock.now.as_second() - t.as_second())
}

fn since(time: &str, clock: Clock, absent: &str) -> Value {
    text(&seconds_since(time, clock).map_or(absent.to_owned(), time::age))
}

fn labels(labels: Option<&Map<String, Value>>) -> String {
    let parts: Vec<String> = labels
        .into_iter()
        .flatten()
        .map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or_default()))
        .collect();
    if parts.is_empty() { NONE.to_owned() } else { parts.join(",") }
}

/// `app=web,tier in (a,b)`.
fn selector(value: Option<&Value>) -> String {
    let Some(value) = value else { return NONE.to_owned() };
    let selector = LabelSelector::from_value(Some(value));
    let parts: Vec<String> = selector
        .requirements()
        .iter()
        .map(|r| match r.operator {
            Operator::In if value.at("matchLabels").is_some_and(|l| l.get(&r.key).is_some()) => {
                format!("{}={}", r.key, r.values.join(","))
            }
            Operator::In => format!("{} in ({})", r.key, r.values.join(",")),
            Operator::NotIn => format!("{} notin ({})", r.key, r.values.join(",")),
            Operator::Exists => r.key.clone(),
            _ => format!("!{}", r.key),
        })
        .collect();
    if parts.is_empty() { NONE.to_owned() } else { parts.join(",") }
}

fn containers(object: &Value, path: &str) -> (Value, Value) {
    let join = |field: &str| -> Value {
        text(&object.list_at(path).iter().map(|c| c.str_at(field)).collect::<Vec<_>>().join(","))
    };
    (join("name"), join("image"))
}

fn qualified(owner: &Value) -> String {
    let kind = owner.str_at("kind").to_lowercase();
    match owner.str_at("apiVersion").split_once('/') {
        Some((group, _)) => format!("{kind}.{group}"),
        None => kind,
    }
}

fn config_map(o: &Value, c: Clock) -> Vec<Value> {
    let data = o.map_at("data").map_or(0, Map::len) + o.map_at("binaryData").map_or(0, Map::len);
    vec![name(o), json!(data), age(o, c)]
}

/// How many addresses a cell shows before `+ N more...`.
const ADDRESSES_MAX: usize = 3;

fn truncated(all: &[String]) -> String {
    match all.len() {
        0 => NONE.to_owned(),
        n if n > ADDRESSES_MAX => {
            format!("{} + {} more...", all[..ADDRESSES_MAX].join(","), n - ADDRESSES_MAX)
        }
        _ => all.join(","),
    }
}

fn endpoints(o: &Value, c: Clock) -> Vec<Value> {
    let mut all = Vec::new();
    for subset in o.list_at("subsets") {
        let addresses = subset.list_at("addresses").iter().map(|a| a.str_at("ip"));
        let ports = subset.list_at("ports");
        for address in addresses {
            match ports {
                [] => all.push(address.to_owned()),
                ports => {
                    all.extend(ports.iter().map(|p| format!("{address}:{}", p.int_at("port").unwrap_or(0))))
                }
            }
        }
    }
    vec![name(o), text(&truncated(&all)), age(o, c)]
}

fn slice(o: &Value, c: Clock) -> Vec<Value> {
    let ports: Vec<String> =
        o.list_at("ports").iter().map(|p| p.int_at("port").map_or("*".into(), |n| n.to_string())).collect();
    let ports = if o.list_at("ports").is_empty() { "<unset>".to_owned() } else { truncated(&ports) };
    let addresses: Vec<String> = o
        .list_at("endpoints")
        .iter()
        .flat_map(|e| e.list_at("addresses"))
        .filter_map(|a| a.as_str().map(str::to_owned))
        .collect();
    let addresses = if addresses.is_empty() { "<unset>".to_owned() } else { truncated(&addresses) };
    vec![name(o), text(o.str_at("addressType")), text(&ports), text(&addresses), age(o, c)]
}

fn event(o: &Value, c: Clock) -> Vec<Value> {
    let first_set = |paths: &[&str]| {
        paths.iter().map(|p| o.str_at(p)).find(|s| !s.is_empty()).unwrap_or_default().to_owned()
    };
    let first_seen = since(&first_set(&["firstTimestamp", "eventTime"]), c, UNKNOWN);
    let mut last_seen =
        since(&first_set(&["series.lastObservedTime", "lastTimestamp", "eventTime"]), c, UNKNOWN);
    let count = o.int_at("series.count").or_else(|| o.int_at("count")).unwrap_or(1);
    if last_seen == UNKNOWN {
        last_seen = first_seen.clone();
    }
    let subject = o.at("involvedObject").or_else(|| o.at("regarding")).unwrap_or(&Value::Null);
    let kind = subject.str_at("kind").to_lowercase();
    let object =
        if subject.str_at("name").is_empty() { kind } else { format!("{kind}/{}", subject.str_at("name")) };
    let mut source = first_set(&["source.component", "reportingComponent"]);
    let host = first_set(&["source.host", "reportingInstance"]);
    if !host.is_empty() {
        source = format!("{source}, {host}");
    }
    vec![
        last_seen,
        text(o.str_at("type")),
        text(o.str_at("reason")),
        text(&object),
        text(subject.str_at("fieldPath")),
        text(&source),
        text(o.str_at("message").trim()),
        first_seen,
        json!(count),
        name(o),
    ]
}

fn node(o: &Value, c: Clock) -> Vec<Value> {
    let ready = o.list_at("status.conditions").iter().find(|x| x.str_at("type") == "Ready");
    let mut status = match ready.map(|x| x.str_at("status")) {
        Some("True") => "Ready".to_owned(),
        Some(_) => "NotReady".to_owned(),
        None => "Unknown".to_owned(),
    };
    if o.bool_at("spec.unschedulable") {
        status.push_str(",SchedulingDisabled");
    }
    let mut roles: Vec<&str> = Vec::new();
    for (key, value) in o.map_at("metadata.labels").into_iter().flatten() {
        match (key.strip_prefix("node-role.kubernetes.io/"), key.as_str()) {
            (Some(role), _) if !role.is_empty() => roles.push(role),
            (_, "kubernetes.io/role") => roles.extend(value.as_str()),
            _ => {}
        }
    }
    let roles = if roles.is_empty() { NONE.to_owned() } else { roles.join(",") };
    let address = |kind: &str| {
        let list = o.list_at("status.addresses").iter();
        text(list.clone().find(|a| a.str_at("type") == kind).map_or(NONE, |a| a.str_at("address")))
    };
    let info = |field: &str| {
        let value = o.at("status.nodeInfo").map_or("", |i| i.str_at(field));
        text(if value.is_empty() { UNKNOWN } else { value })
    };
    vec![
        name(o),
        text(&status),
        text(&roles),
        age(o, c),
        text(o.str_at("status.nodeInfo.kubeletVersion")),
        address("InternalIP"),
        address("ExternalIP"),
        info("osImage"),
        info("kernelVersion"),
        info("containerRuntimeVersion"),
    ]
}

fn access_modes(modes: &[Value]) -> String {
    let short: Vec<&str> = modes
        .iter()
        .filter_map(Value::as_str)
        .map(|m| match m {
            "ReadWriteOnce" => "RWO",
            "ReadOnlyMany" => "ROX",
            "ReadWriteMany" => "RWX",
            "ReadWriteOncePod" => "RWOP",
            other => other,
        })
        .collect();
    short.join(",")
}

fn storage_class<'o>(o: &'o Value, annotation: &str) -> &'o str {
    let legacy = o.map_at("metadata.annotations").and_then(|a| a.get(annotation)).and_then(Value::as_str);
    legacy.unwrap_or(o.str_at("spec.storageClassName"))
}

fn terminating<'o>(o: &'o Value, phase: &'o str) -> &'o str {
    if o.at("metadata.deletionTimestamp").is_some() { "Terminating" } else { phase }
}

fn claim(o: &Value, c: Clock) -> Vec<Value> {
    let bound = !o.str_at("spec.volumeName").is_empty();
    let capacity = if bound { o.str_at("status.capacity.storage") } else { "" };
    let modes = if bound { access_modes(o.list_at("status.accessModes")) } else { String::new() };
    vec![
        name(o),
        text(terminating(o, o.str_at("status.phase"))),
        text(o.str_at("spec.volumeName")),
        text(capacity),
        text(&modes),
        text(storage_class(o, "volume.beta.kubernetes.io/storage-class")),
        text(if o.str_at("spec.volumeAttributesClassName").is_empty() {
            "<unset>"
        } else {
            o.str_at("spec.volumeAttributesClassName")
        }),
        age(o, c),
        text(o.str_at("spec.volumeMode")),
    ]
}

fn volume(o: &Value, c: Clock) -> Vec<Value> {
    let claim = o.at("spec.claimRef").map(|r| format!("{}/{}", r.str_at("namespace"), r.str_at("name")));
    vec![
        name(o),
        text(o.str_at("spec.capacity.storage")),
        text(&access_modes(o.list_at("spec.accessModes"))),
        text(o.str_at("spec.persistentVolumeReclaimPolicy")),
        text(terminating(o, o.str_at("status.phase"))),
        text(&claim.unwrap_or_default()),
        text(storage_class(o, "volume.beta.kubernetes.io/storage-class")),
        text(if o.str_at("spec.volumeAttributesClassName").is_empty() {
            "<unset>"
        } else {
            o.str_at("spec.volumeAttributesClassName")
        }),
        text(o.str_at("status.reason")),
        age(o, c),
        text(o.str_at("spec.volumeMode")),
    ]
}

fn quota(o: &Value, c: Clock) -> Vec<Value> {
    let (mut requests, mut limits) = (Vec::new(), Vec::new());
    for (name, hard) in o.map_at("status.hard").into_iter().flatten() {
        let used = o.at("status.used").and_then(|u| u.get(name)).map_or("0".into(), plain);
        let part = format!("{name}: {used}/{}", plain(hard));
        if name.starts_with("limits") { limits.push(part) } else { requests.push(part) }
    }
    vec![name(o), text(&requests.join(", ")), text(&limits.join(", ")), age(o, c)]
}

fn service(o: &Value, c: Clock) -> Vec<Value> {
    let kind = o.str_at("spec.type");
    let ports: Vec<String> = o
        .list_at("spec.ports")
        .iter()
        .map(|p| {
            let (port, protocol) = (p.int_at("port").unwrap_or(0), p.str_at("protocol"));
            match p.int_at("nodePort").unwrap_or(0) {
                0 => format!("{port}/{protocol}"),
                node => format!("{port}:{node}/{protocol}"),
            }
        })
        .collect();
    let ports = if ports.is_empty() { NONE.to_owned() } else { ports.join(",") };
    let mut addresses: Vec<&str> = o.list_at("spec.externalIPs").iter().filter_map(Value::as_str).collect();
    let external = match kind {
        "ExternalName" => o.str_at("spec.externalName").to_owned(),
        "LoadBalancer" => {
            let ingress = o.list_at("status.loadBalancer.ingress").iter();
            let balanced = ingress
                .map(|i| if i.str_at("ip").is_empty() { i.str_at("hostname") } else { i.str_at("ip") });
            addresses.splice(0..0, balanced);
            if addresses.is_empty() { "<pending>".to_owned() } else { addresses.join(",") }
        }
        _ if addresses.is_empty() => NONE.to_owned(),
        _ => addresses.join(","),
    };
    vec![
        name(o),
        text(kind),
        text(or_none(o.str_at("spec.clusterIP"))),
        text(&external),
        text(&ports),
        age(o, c),
        text(&labels(o.map_at("spec.selector"))),
    ]
}

fn job(o: &Value, c: Clock) -> Vec<Value> {
    let done = o.int_at("status.succeeded").unwrap_or(0);
    let completions = match (o.int_at("spec.completions"), o.int_at("spec.parallelism").unwrap_or(0)) {
        (Some(total), _) => format!("{done}/{total}"),
        (None, parallelism) if parallelism > 1 => format!("{done}/1 of {parallelism}"),
        (None, _) => format!("{done}/1"),
    };
    let start: Option<jiff::Timestamp> = o.str_at("status.startTime").parse().ok();
    let end: Option<jiff::Timestamp> = o.str_at("status.completionTime").parse().ok();
    let duration = start.map(|s| time::age(end.unwrap_or(c.now).as_second() - s.as_second()));
    let holds = |kind: &str| {
        o.list_at("status.conditions")
            .iter()
            .any(|x| x.str_at("type") == kind && x.str_at("status") == "True")
    };
    let status = match () {
        _ if holds("Complete") => "Complete",
        _ if holds("Failed") => "Failed",
        _ if o.at("metadata.deletionTimestamp").is_some() => "Terminating",
        _ if holds("Suspended") => "Suspended",
        _ if holds("FailureTarget") => "FailureTarget",
        _ if holds("SuccessCriteriaMet") => "SuccessCriteriaMet",
        _ => "Running",
    };
    let (names, images) = containers(o, "spec.template.spec.containers");
    vec![
        name(o),
        text(status),
        text(&completions),
        text(&duration.unwrap_or_default()),
        age(o, c),
        names,
        images,
        text(&selector(o.at("spec.selector"))),
    ]
}

fn ingress(o: &Value, c: Clock) -> Vec<Value> {
    let hosts: Vec<String> = o
        .list_at("spec.rules")
        .iter()
        .map(|r| r.str_at("host").to_owned())
        .filter(|h| !h.is_empty())
        .collect();
    let hosts = if hosts.is_empty() { "*".to_owned() } else { truncated(&hosts) };
    let addresses: Vec<&str> = o
        .list_at("status.loadBalancer.ingress")
        .iter()
        .map(|i| if i.str_at("ip").is_empty() { i.str_at("hostname") } else { i.str_at("ip") })
        .collect();
    let ports = if o.list_at("spec.tls").is_empty() { "80" } else { "80, 443" };
    let class = o
        .map_at("metadata.annotations")
        .and_then(|a| a.get("kubernetes.io/ingress.class"))
        .and_then(Value::as_str);
    let class = if o.str_at("spec.ingressClassName").is_empty() {
        class.unwrap_or(NONE)
    } else {
        o.str_at("spec.ingressClassName")
    };
    vec![name(o), text(class), text(&hosts), text(&addresses.join(",")), text(ports), age(o, c)]
}

fn binding(o: &Value, c: Clock) -> Vec<Value> {
    let role = format!("{}/{}", o.str_at("roleRef.kind"), o.str_at("roleRef.name"));
    let subjects = |kind: &str| -> Value {
        let list: Vec<String> = o
            .list_at("subjects")
            .iter()
            .filter(|s| s.str_at("kind") == kind)
            .map(|s| match (kind, s.str_at("namespace")) {
                ("ServiceAccount", namespace) if !namespace.is_empty() => {
                    format!("{namespace}/{}", s.str_at("name"))
                }
                _ => s.str_at("name").to_owned(),
            })
            .collect();
        text(&list.join(", "))
    };
    vec![name(o), text(&role), age(o, c), subjects("User"), subjects("Group"), subjects("ServiceAccount")]
}

fn pod(o: &Value, c: Clock) -> Vec<Value> {
    let PodLine { ready, total, status, restarts, last_restart } = pod_line(o);
    let restarts = match last_restart.and_then(|t| seconds_since(&t, c)) {
        Some(seconds) if restarts > 0 => format!("{restarts} ({} ago)", time::age(seconds)),
        _ => restarts.to_string(),
    };
    let ip = o.list_at("status.podIPs").first().map_or(o.str_at("status.podIP"), |ip| ip.str_at("ip"));
    let gates = o.list_at("spec.readinessGates");
    let passed = gates
        .iter()
        .filter(|gate| {
            let kind = gate.str_at("conditionType");
            o.list_at("status.conditions")
                .iter()
                .any(|x| x.str_at("type") == kind && x.str_at("status") == "True")
        })
        .count();
    let gates = if gates.is_empty() { NONE.to_owned() } else { format!("{passed}/{}", gates.len()) };
    vec![
        name(o),
        text(&format!("{ready}/{total}")),
        text(&status),
        text(&restarts),
        age(o, c),
        text(or_none(ip)),
        text(or_none(o.str_at("spec.nodeName"))),
        text(or_none(o.str_at("status.nominatedNodeName"))),
        text(&gates),
    ]
}

/// What the pod's row says of its containers.
struct PodLine {
    ready: usize,
    total: usize,
    status: String,
    restarts: i64,
    last_restart: Option<String>,
}

/// The status word follows upstream's `printPod`: the most telling reason wins.
fn pod_line(o: &Value) -> PodLine {
    let is_sidecar = |name: &str| {
        o.list_at("spec.initContainers")
            .iter()
            .any(|c| c.str_at("name") == name && c.str_at("restartPolicy") == "Always")
    };
    let sidecars =
        o.list_at("spec.initContainers").iter().filter(|c| c.str_at("restartPolicy") == "Always").count();
    let total = o.list_at("spec.containers").len() + sidecars;
    let mut line = PodLine { ready: 0, total, status: reason_or_phase(o), restarts: 0, last_restart: None };
    for condition in o.list_at("status.conditions") {
        if condition.str_at("type") == "PodScheduled" && condition.str_at("reason") == "SchedulingGated" {
            line.status = "SchedulingGated".into();
        }
    }
    let inits = o.list_at("status.initContainerStatuses");
    let mut initializing = false;
    let mut restarts_of_sidecars = 0;
    for (index, container) in inits.iter().enumerate() {
        line.note_restarts(container);
        let sidecar = is_sidecar(container.str_at("name"));
        if sidecar {
            restarts_of_sidecars += container.int_at("restartCount").unwrap_or(0);
            line.ready += usize::from(container.bool_at("ready"));
        }
        if initializing
            || container.at("state.terminated").is_some_and(|t| t.int_at("exitCode") == Some(0))
            || (sidecar && container.bool_at("started"))
        {
            continue;
        }
        let waiting = container.str_at("state.waiting.reason");
        line.status = match container.at("state.terminated") {
            Some(terminated) => format!("Init:{}", terminated_reason(terminated)),
            None if !waiting.is_empty() && waiting != "PodInitializing" => format!("Init:{waiting}"),
            None => format!("Init:{index}/{}", o.list_at("spec.initContainers").len()),
        };
        initializing = true;
    }
    let initialized = o
        .list_at("status.conditions")
        .iter()
        .any(|x| x.str_at("type") == "Initialized" && x.str_at("status") == "True");
    if !initializing || initialized {
        line.restarts = restarts_of_sidecars;
        line.containers(o);
    }
    if o.at("metadata.deletionTimestamp").is_some() {
        let lost = o.str_at("status.reason") == "NodeLost";
        let finished = matches!(o.str_at("status.phase"), "Succeeded" | "Failed");
        if lost {
            line.status = "Unknown".into();
        } else if !finished {
            line.status = "Terminating".into();
        }
    }
    line
}

fn reason_or_phase(o: &Value) -> String {
    let reason = o.str_at("status.reason");
    if reason.is_empty() { o.str_at("status.phase").to_owned() } else { reason.to_owned() }
}

fn terminated_reason(terminated: &Value) -> String {
    let reason = terminated.str_at("reason");
    match (reason, terminated.int_at("signal").unwrap_or(0)) {
        ("", 0) => format!("ExitCode:{}", terminated.int_at("exitCode").unwrap_or(0)),
        ("", signal) => format!("Signal:{signal}"),
        (reason, _) => reason.to_owned(),
    }
}

impl PodLine {
    fn note_restarts(&mut self, container: &Value) {
        self.restarts += container.int_at("restartCount").unwrap_or(0);
        let finished = container.str_at("lastState.terminated.finishedAt");
        if !finished.is_empty() && self.last_restart.as_deref().is_none_or(|t| t < finished) {
            self.last_restart = Some(finished.to_owned());
        }
    }

    fn containers(&mut self, o: &Value) {
        let mut running = false;
        for container in o.list_at("status.containerStatuses").iter().rev() {
            self.note_restarts(container);
            let waiting = container.str_at("state.waiting.reason");
            if !waiting.is_empty() {
                self.status = waiting.to_owned();
            } else if let Some(terminated) = container.at("state.terminated") {
                self.status = terminated_reason(terminated);
            } else if container.bool_at("ready") && container.at("state.running").is_some() {
                running = true;
                self.ready += 1;
            }
        }
        // One container completed while another runs: the pod as a whole runs.
        if self.status == "Completed" && running {
            let ready = o
                .list_at("status.conditions")
                .iter()
                .any(|x| x.str_at("type") == "Ready" && x.str_at("status") == "True");
            self.status = if ready { "Running" } else { "NotReady" }.into();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(pod: Value) -> Vec<String> {
        let clock = Clock { now: "2026-01-01T00:10:00Z".parse().expect("a time") };
        super::pod(&pod, clock).iter().map(plain).collect()
    }

    #[test]
    fn pods_show_the_most_telling_status() {
        let base = json!({"metadata":{"name":"a","creationTimestamp":"2026-01-01T00:00:00Z"},
            "spec":{"containers":[{"name":"c"}],"nodeName":"n"},
            "status":{"phase":"Running","podIP":"10.0.0.1","containerStatuses":[{"name":"c","ready":true,"restartCount":0,"state":{"running":{}}}]}});
        assert_eq!(
            row(base.clone()),
            ["a", "1/1", "Running", "0", "10m", "10.0.0.1", "n", "<none>", "<none>"]
        );
        let mut crashed = base.clone();
        crashed["status"]["containerStatuses"][0] = json!({"name":"c","restartCount":3,"state":{"waiting":{"reason":"CrashLoopBackOff"}},
            "lastState":{"terminated":{"finishedAt":"2026-01-01T00:09:50Z"}}});
        assert_eq!(row(crashed)[1..4], ["0/1", "CrashLoopBackOff", "3 (10s ago)"]);
        let mut going = base;
        going["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:10:30Z");
        assert_eq!(row(going)[2], "Terminating");
    }
}
