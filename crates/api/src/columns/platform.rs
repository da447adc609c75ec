//! Columns of kinds that carry the cluster rather than run in it: autoscalers, storage, admission, flow
//! control, devices.

use serde_json::{Value, json};

use super::{Cells, Clock, NONE, UNKNOWN, age, count, name, or_none, plain, selector, text};
use crate::object::Object;

/// API group, plural, columns, cells.
pub(super) const COLUMNS: &[(&str, &str, &str, Cells)] = &[
    ("", "componentstatuses", "Name|Status|Message|Error", component),
    (
        "admissionregistration.k8s.io",
        "mutatingadmissionpolicies",
        "Name|Mutations:integer|ParamKind|Age",
        |o, c| vec![name(o), items(o, "spec.mutations"), param_kind(o), age(o, c)],
    ),
    (
        "admissionregistration.k8s.io",
        "mutatingadmissionpolicybindings",
        "Name|PolicyName|ParamRef|Age",
        policy_binding,
    ),
    ("admissionregistration.k8s.io", "mutatingwebhookconfigurations", "Name|Webhooks:integer|Age", webhooks),
    (
        "admissionregistration.k8s.io",
        "validatingadmissionpolicies",
        "Name|Validations:integer|ParamKind|Age",
        |o, c| vec![name(o), items(o, "spec.validations"), param_kind(o), age(o, c)],
    ),
    (
        "admissionregistration.k8s.io",
        "validatingadmissionpolicybindings",
        "Name|PolicyName|ParamRef|Age",
        policy_binding,
    ),
    (
        "admissionregistration.k8s.io",
        "validatingwebhookconfigurations",
        "Name|Webhooks:integer|Age",
        webhooks,
    ),
    ("apiregistration.k8s.io", "apiservices", "Name|Service|Available|Age", api_service),
    (
        "autoscaling",
        "horizontalpodautoscalers",
        "Name|Reference|Targets|MinPods|MaxPods|Replicas|Age",
        autoscaler,
    ),
    (
        "flowcontrol.apiserver.k8s.io",
        "flowschemas",
        "Name|PriorityLevel|MatchingPrecedence:integer|DistinguisherMethod|Age|MissingPL",
        flow_schema,
    ),
    (
        "flowcontrol.apiserver.k8s.io",
        "prioritylevelconfigurations",
        "Name|Type|NominalConcurrencyShares|Queues|HandSize|QueueLengthLimit|Age",
        priority_level,
    ),
    ("networking.k8s.io", "ipaddresses", "Name|ParentRef|Age", |o, c| {
        let parent = |field: &str| o.str_at(&format!("spec.parentRef.{field}"));
        let resource = match parent("group") {
            "" => parent("resource").to_owned(),
            group => format!("{}.{group}", parent("resource")),
        };
        let shown = format!("{resource}/{}/{}", parent("namespace"), parent("name"));
        vec![name(o), text(&shown), age(o, c)]
    }),
    ("networking.k8s.io", "servicecidrs", "Name|CIDRs|Age", |o, c| {
        vec![name(o), joined(o.list_at("spec.cidrs")), age(o, c)]
    }),
    ("node.k8s.io", "runtimeclasses", "Name|Handler|Age", |o, c| {
        vec![name(o), text(o.str_at("handler")), age(o, c)]
    }),
    ("resource.k8s.io", "deviceclasses", "Name|Age", |o, c| vec![name(o), age(o, c)]),
    ("resource.k8s.io", "resourceclaims", "Name|State|Age", resource_claim),
    ("resource.k8s.io", "resourceclaimtemplates", "Name|Age", |o, c| vec![name(o), age(o, c)]),
    ("resource.k8s.io", "resourceslices", "Name|Node|Driver|Pool|Age", |o, c| {
        let field = |path: &str| text(o.str_at(path));
        vec![name(o), field("spec.nodeName"), field("spec.driver"), field("spec.pool.name"), age(o, c)]
    }),
    (
        "storage.k8s.io",
        "csidrivers",
        "Name|AttachRequired:boolean|PodInfoOnMount:boolean|StorageCapacity:boolean|TokenRequests|RequiresRepublish:boolean|Modes|Age",
        csi_driver,
    ),
    ("storage.k8s.io", "csinodes", "Name|Drivers:integer|Age", |o, c| {
        vec![name(o), items(o, "spec.drivers"), age(o, c)]
    }),
    ("storage.k8s.io", "volumeattachments", "Name|Attacher|PV|Node|Attached:boolean|Age", |o, c| {
        vec![
            name(o),
            text(o.str_at("spec.attacher")),
            text(o.str_at("spec.source.persistentVolumeName")),
            text(o.str_at("spec.nodeName")),
            json!(o.bool_at("status.attached")),
            age(o, c),
        ]
    }),
    ("storage.k8s.io", "volumeattributesclasses", "Name|DriverName|Age", |o, c| {
        vec![name(o), text(o.str_at("driverName")), age(o, c)]
    }),
];

const UNSET: &str = "<unset>";
/// More targets of an autoscaler are only counted.
const TARGETS_MAX: usize = 2;

fn items(object: &Value, path: &str) -> Value {
    json!(object.list_at(path).len())
}

fn joined(values: &[Value]) -> Value {
    let all: Vec<&str> = values.iter().filter_map(Value::as_str).collect();
    text(or_none(&all.join(",")))
}

fn condition<'o>(object: &'o Value, kind: &str) -> Option<&'o Value> {
    let conditions = match object.list_at("status.conditions") {
        [] => object.list_at("conditions"),
        conditions => conditions,
    };
    conditions.iter().find(|c| c.str_at("type") == kind)
}

fn component(o: &Value, _: Clock) -> Vec<Value> {
    let healthy = condition(o, "Healthy");
    let status = match healthy.map(|c| c.str_at("status")) {
        Some("True") => "Healthy",
        Some(_) => "Unhealthy",
        None => "Unknown",
    };
    let field = |path: &str| text(healthy.map_or("", |c| c.str_at(path)));
    vec![name(o), text(status), field("message"), field("error")]
}

fn webhooks(o: &Value, c: Clock) -> Vec<Value> {
    vec![name(o), items(o, "webhooks"), age(o, c)]
}

fn param_kind(o: &Value) -> Value {
    match o.at("spec.paramKind") {
        Some(kind) => text(&format!("{}/{}", kind.str_at("apiVersion"), kind.str_at("kind"))),
        None => text(UNSET),
    }
}

fn policy_binding(o: &Value, c: Clock) -> Vec<Value> {
    let param = match o.at("spec.paramRef") {
        Some(param) if param.at("selector").is_some() => selector(param.at("selector")),
        Some(param) => match param.str_at("namespace") {
            "" => param.name_or_star(),
            namespace => format!("{namespace}/{}", param.name_or_star()),
        },
        None => UNSET.to_owned(),
    };
    vec![name(o), text(o.str_at("spec.policyName")), text(&param), age(o, c)]
}

/// The name of a reference; all objects if it names none.
trait NameOrStar {
    fn name_or_star(&self) -> String;
}

impl NameOrStar for Value {
    fn name_or_star(&self) -> String {
        match self.str_at("name") {
            "" => "*".into(),
            name => name.into(),
        }
    }
}

fn api_service(o: &Value, c: Clock) -> Vec<Value> {
    let service = match o.at("spec.service") {
        Some(service) => format!("{}/{}", service.str_at("namespace"), service.str_at("name")),
        None => "Local".to_owned(),
    };
    let available = match condition(o, "Available") {
        Some(found) if found.str_at("status") == "True" => "True".to_owned(),
        Some(found) => format!("{} ({})", found.str_at("status"), found.str_at("reason")),
        None => "Unknown".to_owned(),
    };
    vec![name(o), text(&service), text(&available), age(o, c)]
}

fn autoscaler(o: &Value, c: Clock) -> Vec<Value> {
    let target = o.at("spec.scaleTargetRef").unwrap_or(&Value::Null);
    let reference = format!("{}/{}", target.str_at("kind"), target.str_at("name"));
    let least = o.int_at("spec.minReplicas").map_or_else(|| UNSET.to_owned(), |n| n.to_string());
    vec![
        name(o),
        text(&reference),
        text(&targets(o)),
        text(&least),
        count(o, "spec.maxReplicas"),
        count(o, "status.currentReplicas"),
        age(o, c),
    ]
}

/// `cpu: 12%/60%, 3/10 + 1 more...`: what is measured and what is to be held.
fn targets(o: &Value) -> String {
    let current = o.list_at("status.currentMetrics");
    let metrics = o.list_at("spec.metrics");
    let shown: Vec<String> =
        metrics.iter().enumerate().take(TARGETS_MAX).map(|(i, m)| one_target(m, current.get(i))).collect();
    match metrics.len() {
        0 => NONE.to_owned(),
        all if all > TARGETS_MAX => format!("{} + {} more...", shown.join(", "), all - TARGETS_MAX),
        _ => shown.join(", "),
    }
}

fn one_target(metric: &Value, current: Option<&Value>) -> String {
    let source = match metric.str_at("type") {
        "External" => "external",
        "Pods" => "pods",
        "Object" => "object",
        "Resource" => "resource",
        "ContainerResource" => "containerResource",
        _ => return "<unknown type>".to_owned(),
    };
    let target = |field: &str| metric.at(&format!("{source}.target.{field}"));
    let measured = |field: &str| {
        let found = current.and_then(|c| c.at(&format!("{source}.current.{field}")));
        found.map_or_else(|| UNKNOWN.to_owned(), plain)
    };
    let resource = matches!(source, "resource" | "containerResource");
    let label =
        if resource { format!("{}: ", metric.str_at(&format!("{source}.name"))) } else { String::new() };
    match (target("averageValue"), target("averageUtilization"), target("value")) {
        (Some(value), ..) => {
            let note = if matches!(source, "external" | "object") { " (avg)" } else { "" };
            format!("{label}{}/{}{note}", measured("averageValue"), plain(value))
        }
        (None, Some(percent), _) => {
            let now = match measured("averageUtilization") {
                unknown if unknown == UNKNOWN => unknown,
                number => format!("{number}%"),
            };
            format!("{label}{now}/{}%", plain(percent))
        }
        (None, None, Some(value)) => format!("{label}{}/{}", measured("value"), plain(value)),
        (None, None, None) => format!("{label}{UNKNOWN}/<auto>"),
    }
}

fn flow_schema(o: &Value, c: Clock) -> Vec<Value> {
    let missing = condition(o, "Dangling").map_or("?", |found| found.str_at("status"));
    vec![
        name(o),
        text(o.str_at("spec.priorityLevelConfiguration.name")),
        count(o, "spec.matchingPrecedence"),
        text(or_none(o.str_at("spec.distinguisherMethod.type"))),
        age(o, c),
        text(missing),
    ]
}

fn priority_level(o: &Value, c: Clock) -> Vec<Value> {
    let number = |path: &str| text(&o.int_at(path).map_or_else(|| NONE.to_owned(), |n| n.to_string()));
    let kind = o.str_at("spec.type");
    let shares = if kind == "Exempt" { "spec.exempt" } else { "spec.limited" };
    let queuing = |field: &str| number(&format!("spec.limited.limitResponse.queuing.{field}"));
    vec![
        name(o),
        text(kind),
        number(&format!("{shares}.nominalConcurrencyShares")),
        queuing("queues"),
        queuing("handSize"),
        queuing("queueLengthLimit"),
        age(o, c),
    ]
}

fn resource_claim(o: &Value, c: Clock) -> Vec<Value> {
    let mut states = Vec::new();
    if o.at("metadata.deletionTimestamp").is_some() {
        states.push("deleted");
    }
    match o.at("status.allocation") {
        Some(_) => states.push("allocated"),
        None if o.at("metadata.deletionTimestamp").is_none() => states.push("pending"),
        None => {}
    }
    if !o.list_at("status.reservedFor").is_empty() {
        states.push("reserved");
    }
    vec![name(o), text(&states.join(",")), age(o, c)]
}

fn csi_driver(o: &Value, c: Clock) -> Vec<Value> {
    let flag = |path: &str, absent: bool| json!(o.at(path).and_then(Value::as_bool).unwrap_or(absent));
    let audiences: Vec<&str> = o.list_at("spec.tokenRequests").iter().map(|t| t.str_at("audience")).collect();
    let audiences = if audiences.is_empty() { UNSET.to_owned() } else { audiences.join(",") };
    vec![
        name(o),
        flag("spec.attachRequired", true),
        flag("spec.podInfoOnMount", false),
        flag("spec.storageCapacity", false),
        text(&audiences),
        flag("spec.requiresRepublish", false),
        joined(o.list_at("spec.volumeLifecycleModes")),
        age(o, c),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_of_autoscalers_read_as_kubectl_shows_them() {
        let object = json!({
            "spec": { "metrics": [
                { "type": "Resource", "resource": { "name": "cpu", "target": { "averageUtilization": 60 } } },
                { "type": "Pods", "pods": { "target": { "averageValue": "10" } } },
                { "type": "External", "external": { "target": { "value": "3" } } },
            ] },
            "status": { "currentMetrics": [{ "resource": { "current": { "averageUtilization": 12 } } }] },
        });
        assert_eq!(targets(&object), "cpu: 12%/60%, <unknown>/10 + 1 more...");
        assert_eq!(targets(&json!({})), "<none>");
    }
}
