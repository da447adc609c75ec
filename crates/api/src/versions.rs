//! Versions: one stored object, read and written through every version of its kind.
//!
//! Each kind is stored in one version, the hub. Every other version is the hub's schema with differences that
//! stand in the tables as lines after its `kind`:
//!
//! ```text
//! kind Ingress ingresses namespaced hub=networking.k8s.io/v1 since=1.14 gone=1.22
//! move Ingress spec.backend spec.defaultBackend               another name; `[]` goes through lists
//! move-number Ingress spec.a spec.b.number                    only if the value is a number; move-text: a text
//! default Ingress spec.x "y" unless spec.z="w"                what this version fills in, in the hub's terms
//! derive Deployment selector                                  from the template's labels; also `labels`
//! ```
//!
//! What lines cannot say (a field that becomes a list entry, say) is a pair of functions in [`HOOKS`].

use std::borrow::Cow;

use serde_json::{Map, Value, json};

use crate::fieldset::{FieldSet, Step};
use crate::object::Object;
use crate::schema::{Kind, Schema};

/// How a version differs from the stored one.
#[derive(Debug, Clone, PartialEq)]
pub struct Version {
    pub hub_group: String,
    pub hub_version: String,
    /// Set for versions that upstream has removed.
    pub lifecycle: Option<Lifecycle>,
    moves: Vec<Move>,
    defaults: Vec<VersionDefault>,
    derive_labels: bool,
    derive_selector: bool,
}

/// When upstream deprecated and removed a version, and what took its place.
#[derive(Debug, Clone, PartialEq)]
pub struct Lifecycle {
    pub since: String,
    pub gone: String,
    pub successor: String,
}

#[derive(Debug, Clone, PartialEq)]
struct Move {
    /// In this version.
    here: Path,
    /// In the hub.
    hub: Path,
    only: Only,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Only {
    Anything,
    Numbers,
    Texts,
}

#[derive(Debug, Clone, PartialEq)]
struct VersionDefault {
    path: Path,
    value: Value,
    /// Not if this path has this value.
    unless: Option<(String, Value)>,
}

/// Field names; true where the field is a list to go through.
type Path = Vec<(String, bool)>;

fn path(text: &str) -> Path {
    let step = |part: &str| match part.strip_suffix("[]") {
        Some(name) => (name.to_owned(), true),
        None => (part.to_owned(), false),
    };
    text.split('.').map(step).collect()
}

impl Version {
    /// Reads the options of a `kind` line; `None` if the kind is stored as it is.
    pub fn read(options: &[&str]) -> Result<Option<Version>, &'static str> {
        let option = |name: &str| options.iter().find_map(|o| o.strip_prefix(name)?.strip_prefix('='));
        let Some(hub) = option("hub") else { return Ok(None) };
        let (group, version) = hub.rsplit_once('/').unwrap_or(("", hub));
        let lifecycle = match (option("since"), option("gone")) {
            (Some(since), Some(gone)) => Some(Lifecycle {
                since: since.to_owned(),
                gone: gone.to_owned(),
                successor: option("use").unwrap_or(hub).to_owned(),
            }),
            (None, None) => None,
            _ => return Err("`since` and `gone` go together"),
        };
        Ok(Some(Version {
            hub_group: group.to_owned(),
            hub_version: version.to_owned(),
            lifecycle,
            moves: Vec::new(),
            defaults: Vec::new(),
            derive_labels: false,
            derive_selector: false,
        }))
    }

    /// Reads a line after the `kind` line.
    pub fn read_line(&mut self, word: &str, rest: &[&str]) -> Result<(), &'static str> {
        let only = match word {
            "move-number" => Only::Numbers,
            "move-text" => Only::Texts,
            _ => Only::Anything,
        };
        match (word, rest) {
            ("default", [at, json, condition @ ..]) => {
                let value = serde_json::from_str(json).map_err(|_| "a default is JSON")?;
                let unless = match condition {
                    [] => None,
                    ["unless", condition] => {
                        let (at, json) = condition.split_once('=').ok_or("a condition is path=JSON")?;
                        Some((
                            at.to_owned(),
                            serde_json::from_str(json).map_err(|_| "a condition is path=JSON")?,
                        ))
                    }
                    _ => return Err("a default has a path, a value and at most one condition"),
                };
                self.defaults.push(VersionDefault { path: path(at), value, unless });
            }
            ("derive", ["labels"]) => self.derive_labels = true,
            ("derive", ["selector"]) => self.derive_selector = true,
            ("derive", _) => return Err("labels or selector can be derived"),
            (_, [here, hub]) => self.moves.push(Move { here: path(here), hub: path(hub), only }),
            _ => return Err("a move has two paths"),
        }
        Ok(())
    }
}

/// The warning that upstream's servers send with every answer through a deprecated version.
pub fn warning(kind: &Kind) -> Option<String> {
    let lifecycle = kind.conversion.as_ref()?.lifecycle.as_ref()?;
    Some(format!(
        "{} {} is deprecated in v{}+, unavailable in v{}+; use {} {}",
        kind.api_version(),
        kind.kind,
        lifecycle.since,
        lifecycle.gone,
        lifecycle.successor,
        kind.kind
    ))
}

/// Turns an object of this version into the stored form.
pub fn to_hub(schema: &Schema, kind: &Kind, object: &mut Value) {
    let Some(version) = &kind.conversion else { return };
    version.moves.iter().for_each(|m| m.apply(object, true));
    if let Some((to_hub, _)) = hooks(kind) {
        to_hub(object);
    }
    object["apiVersion"] = json!(schema.hub(kind).api_version());
}

/// Turns a stored object into the form of this version.
pub fn from_hub(kind: &Kind, object: &mut Value) {
    let Some(version) = &kind.conversion else { return };
    if let Some((_, from_hub)) = hooks(kind) {
        from_hub(object);
    }
    version.moves.iter().rev().for_each(|m| m.apply(object, false));
    object["apiVersion"] = json!(kind.api_version());
}

/// Fills in what this version defaults otherwise than the hub, in an object of the hub's form.
pub fn apply_defaults(kind: &Kind, object: &mut Value) {
    let Some(version) = &kind.conversion else { return };
    let labels = object.at("spec.template.metadata.labels").filter(|l| l.is_object()).cloned();
    if let Some(labels) = labels {
        if version.derive_selector && object.at("spec.selector").is_none() {
            object.set_at("spec.selector.matchLabels", labels.clone());
        }
        let own = object.map_at("metadata.labels").is_some_and(|l| !l.is_empty());
        if version.derive_labels && !own {
            object.set_at("metadata.labels", labels);
        }
    }
    for default in &version.defaults {
        let excepted = default.unless.as_ref().is_some_and(|(at, value)| object.at(at) == Some(value));
        if !excepted {
            fill(object, &default.path, &default.value);
        }
    }
}

fn fill(at: &mut Value, path: &[(String, bool)], value: &Value) {
    let Some(((name, list), rest)) = path.split_first() else { return };
    if *list {
        let items = at.get_mut(name).and_then(Value::as_array_mut);
        items.into_iter().flatten().for_each(|item| fill(item, rest, value));
        return;
    }
    let Some(map) = at.as_object_mut() else { return };
    if rest.is_empty() {
        let slot = map.entry(name.clone()).or_insert(Value::Null);
        if slot.is_null() || slot.as_str() == Some("") {
            *slot = value.clone();
        }
    } else if map.contains_key(name) || !rest.iter().any(|(_, list)| *list) {
        fill(map.entry(name.clone()).or_insert_with(|| json!({})), rest, value);
    }
}

impl Move {
    fn apply(&self, object: &mut Value, to_hub: bool) {
        let (from, to) = if to_hub { (&self.here, &self.hub) } else { (&self.hub, &self.here) };
        let only = if to_hub { self.only } else { Only::Anything };
        shift(object, from, to, only);
    }
}

/// Moves a value; what both paths have in common is walked once, through every list on the way.
fn shift(at: &mut Value, from: &[(String, bool)], to: &[(String, bool)], only: Only) {
    if from.first() == to.first()
        && let [(name, list), ..] = from
        && from.len() > 1
        && to.len() > 1
    {
        match at.get_mut(name) {
            Some(Value::Array(items)) if *list => {
                items.iter_mut().for_each(|item| shift(item, &from[1..], &to[1..], only));
            }
            Some(inner) if !list => shift(inner, &from[1..], &to[1..], only),
            _ => {}
        }
        return;
    }
    let Some(value) = take(at, from, only) else { return };
    let mut here = at;
    for (name, _) in to {
        if !here.is_object() {
            *here = json!({});
        }
        here = &mut here[name.as_str()];
    }
    *here = value;
}

/// Takes the value out, and parents that are left empty with it.
fn take(at: &mut Value, path: &[(String, bool)], only: Only) -> Option<Value> {
    let ((name, _), rest) = path.split_first()?;
    let map = at.as_object_mut()?;
    if rest.is_empty() {
        let fits = match (only, map.get(name)?) {
            (Only::Anything, value) => !value.is_null(),
            (Only::Numbers, value) => value.is_number(),
            (Only::Texts, value) => value.is_string(),
        };
        return if fits { map.remove(name) } else { None };
    }
    let inner = map.get_mut(name)?;
    let taken = take(inner, rest, only)?;
    if inner.as_object().is_some_and(Map::is_empty) {
        map.remove(name);
    }
    Some(taken)
}

// ---- field ownership ----

/// Translates a set of owned fields between a version and the hub. Lists that moves go through are owned as
/// a whole, so only plain paths need it.
fn move_set(kind: &Kind, set: &mut FieldSet, to_hub: bool) {
    let Some(version) = &kind.conversion else { return };
    let steps = |path: &Path| -> Vec<Step> { path.iter().map(|(name, _)| Step::field(name)).collect() };
    let plain = |m: &&Move| !m.here.iter().chain(&m.hub).any(|(_, list)| *list);
    if to_hub {
        for m in version.moves.iter().filter(plain) {
            set.rename(&steps(&m.here), &steps(&m.hub));
        }
    } else {
        for m in version.moves.iter().rev().filter(plain) {
            set.rename(&steps(&m.hub), &steps(&m.here));
        }
    }
}

/// The kind of an entry of `managedFields`, if it is another version than the object's.
fn entry_kind<'s>(schema: &'s Schema, api_version: &str, object: &Value) -> Option<&'s Kind> {
    if api_version == object.str_at("apiVersion") {
        return None;
    }
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    schema.any_kind(group, version, object.str_at("kind"))
}

/// The owned fields of an entry, in the terms of the stored object.
pub fn set_to_hub(schema: &Schema, api_version: &str, object: &Value, set: &mut FieldSet) {
    if let Some(kind) = entry_kind(schema, api_version, object) {
        move_set(kind, set, true);
    }
}

/// The owned fields of an entry, in the terms of the version it was written through.
pub fn set_from_hub<'s>(
    schema: &Schema,
    api_version: &str,
    object: &Value,
    set: &'s FieldSet,
) -> Cow<'s, FieldSet> {
    let mut shown = Cow::Borrowed(set);
    if let Some(kind) = entry_kind(schema, api_version, object).filter(|k| k.conversion.is_some()) {
        move_set(kind, shown.to_mut(), false);
    }
    shown
}

// ---- what lines cannot say ----

type Hook = fn(&mut Value);

/// Group, version, kind; to the hub (after the moves), from the hub (before them).
const HOOKS: &[(&str, &str, &str, Hook, Hook)] = &[
    ("apps", "v1beta1", "Deployment", rollback_to_hub, nothing),
    ("autoscaling", "v1", "HorizontalPodAutoscaler", autoscaler_v1_to_hub, autoscaler_v1_from_hub),
    ("autoscaling", "v2beta1", "HorizontalPodAutoscaler", metric_types_to_hub, metric_types_from_hub),
    ("discovery.k8s.io", "v1beta1", "EndpointSlice", topology_to_hub, topology_from_hub),
    ("extensions", "v1beta1", "Deployment", rollback_to_hub, nothing),
    ("extensions", "v1beta1", "DaemonSet", template_generation_to_hub, nothing),
    ("policy", "v1beta1", "PodDisruptionBudget", empty_selector_to_hub, empty_selector_from_hub),
    ("rbac.authorization.k8s.io", "v1alpha1", "ClusterRoleBinding", subjects_to_hub, subjects_from_hub),
    ("rbac.authorization.k8s.io", "v1alpha1", "RoleBinding", subjects_to_hub, subjects_from_hub),
];

fn hooks(kind: &Kind) -> Option<(Hook, Hook)> {
    let found = HOOKS.iter().find(|(g, v, k, ..)| *g == kind.group && *v == kind.version && *k == kind.kind);
    found.map(|(.., to, from)| (*to, *from))
}

fn nothing(_: &mut Value) {}

/// Upstream keeps the revision to roll back to as an annotation.
fn rollback_to_hub(object: &mut Value) {
    let Some(rollback) = object.remove_at("spec.rollbackTo") else { return };
    let revision = rollback.int_at("revision").unwrap_or(0);
    annotate(object, "deprecated.deployment.rollback.to", revision.to_string());
}

/// Upstream keeps the template's generation as an annotation.
fn template_generation_to_hub(object: &mut Value) {
    let Some(generation) = object.remove_at("spec.templateGeneration") else { return };
    annotate(object, "deprecated.daemonset.template.generation", generation.to_string());
}

/// Annotation names have dots, so paths do not reach them.
fn annotate(object: &mut Value, name: &str, text: String) {
    if object.map_at("metadata.annotations").is_none() {
        object.set_at("metadata.annotations", json!({}));
    }
    object["metadata"]["annotations"][name] = json!(text);
}

fn take_annotation(object: &mut Value, name: &str) -> Option<Value> {
    let annotations = object.get_mut("metadata")?.get_mut("annotations")?.as_object_mut()?;
    let text = annotations.remove(name)?;
    if annotations.is_empty() {
        object.remove_at("metadata.annotations");
    }
    serde_json::from_str(text.as_str()?).ok()
}

/// What version 1 of autoscalers has no field for: annotation, field of the hub.
const AUTOSCALER_ANNOTATIONS: &[(&str, &str)] =
    &[(BEHAVIOR, "spec.behavior"), ("autoscaling.alpha.kubernetes.io/conditions", "status.conditions")];
const BEHAVIOR: &str = "autoscaling.alpha.kubernetes.io/behavior";
const METRICS: &str = "autoscaling.alpha.kubernetes.io/metrics";
const CURRENT_METRICS: &str = "autoscaling.alpha.kubernetes.io/current-metrics";

fn is_cpu(metric: &Value, at: &str) -> bool {
    metric.str_at("type") == "Resource"
        && metric.str_at("resource.name") == "cpu"
        && metric.at(&format!("resource.{at}.averageUtilization")).is_some()
}

/// One percentage of CPU becomes the first of the metrics; the others come from an annotation.
fn autoscaler_v1_to_hub(object: &mut Value) {
    for (annotation, field) in AUTOSCALER_ANNOTATIONS {
        if let Some(value) = take_annotation(object, annotation) {
            object.set_at(field, value);
        }
    }
    let mut metrics = Vec::new();
    if let Some(percent) = object.remove_at("spec.targetCPUUtilizationPercentage") {
        let target = json!({ "type": "Utilization", "averageUtilization": percent });
        metrics.push(json!({ "type": "Resource", "resource": { "name": "cpu", "target": target } }));
    }
    if let Some(Value::Array(others)) = take_annotation(object, METRICS) {
        metrics.extend(others);
    }
    if !metrics.is_empty() {
        object.set_at("spec.metrics", metrics);
    }
    let mut current = Vec::new();
    if let Some(percent) = object.remove_at("status.currentCPUUtilizationPercentage") {
        let value = json!({ "averageUtilization": percent, "averageValue": "0" });
        current.push(json!({ "type": "Resource", "resource": { "name": "cpu", "current": value } }));
    }
    if let Some(Value::Array(others)) = take_annotation(object, CURRENT_METRICS) {
        current = others;
    }
    if !current.is_empty() {
        object.set_at("status.currentMetrics", current);
    }
}

fn autoscaler_v1_from_hub(object: &mut Value) {
    for (annotation, field) in AUTOSCALER_ANNOTATIONS {
        if let Some(value) = object.remove_at(field) {
            annotate(object, annotation, value.to_string());
        }
    }
    if let Some(Value::Array(mut metrics)) = object.remove_at("spec.metrics") {
        if let Some(index) = metrics.iter().position(|m| is_cpu(m, "target")) {
            let cpu = metrics.remove(index);
            let percent = cpu["resource"]["target"]["averageUtilization"].clone();
            object.set_at("spec.targetCPUUtilizationPercentage", percent);
        }
        if !metrics.is_empty() {
            annotate(object, METRICS, Value::Array(metrics).to_string());
        }
    }
    if let Some(Value::Array(current)) = object.remove_at("status.currentMetrics") {
        if let Some(cpu) = current.iter().find(|m| is_cpu(m, "current")) {
            let percent = cpu["resource"]["current"]["averageUtilization"].clone();
            object.set_at("status.currentCPUUtilizationPercentage", percent);
        }
        annotate(object, CURRENT_METRICS, Value::Array(current).to_string());
    }
}

/// The hub names the form of each target, which follows from what is set.
fn metric_types_to_hub(object: &mut Value) {
    if let Some(behavior) = take_annotation(object, BEHAVIOR) {
        object.set_at("spec.behavior", behavior);
    }
    each_target(object, |target| {
        let form = match () {
            _ if target.contains_key("averageUtilization") => "Utilization",
            _ if target.contains_key("averageValue") => "AverageValue",
            _ => "Value",
        };
        target.insert("type".into(), json!(form));
    });
}

fn metric_types_from_hub(object: &mut Value) {
    each_target(object, |target| drop(target.remove("type")));
    if let Some(behavior) = object.remove_at("spec.behavior") {
        annotate(object, BEHAVIOR, behavior.to_string());
    }
}

fn each_target(object: &mut Value, change: impl Fn(&mut Map<String, Value>)) {
    let metrics = object.get_mut("spec").and_then(|s| s.get_mut("metrics")).and_then(Value::as_array_mut);
    for metric in metrics.into_iter().flatten() {
        for source in ["object", "pods", "resource", "containerResource", "external"] {
            let target = metric.get_mut(source).and_then(|s| s.get_mut("target"));
            if let Some(target) = target.and_then(Value::as_object_mut) {
                change(target);
            }
        }
    }
}

const ZONE: &str = "topology.kubernetes.io/zone";
const HOSTNAME: &str = "kubernetes.io/hostname";

/// The zone was one of the topology's labels.
fn topology_to_hub(object: &mut Value) {
    for endpoint in object.get_mut("endpoints").and_then(Value::as_array_mut).into_iter().flatten() {
        let Some(Value::Object(mut topology)) = endpoint.remove_at("topology") else { continue };
        if let Some(zone) = topology.remove(ZONE) {
            endpoint["zone"] = zone;
        }
        if let Some(host) = topology.remove(HOSTNAME)
            && endpoint.at("nodeName").is_none()
        {
            endpoint["nodeName"] = host;
        }
        if !topology.is_empty() {
            endpoint["deprecatedTopology"] = Value::Object(topology);
        }
    }
}

fn topology_from_hub(object: &mut Value) {
    for endpoint in object.get_mut("endpoints").and_then(Value::as_array_mut).into_iter().flatten() {
        let mut topology = match endpoint.remove_at("deprecatedTopology") {
            Some(Value::Object(labels)) => labels,
            _ => Map::new(),
        };
        if let Some(zone) = endpoint.remove_at("zone") {
            topology.insert(ZONE.into(), zone);
        }
        if let Some(node) = endpoint.at("nodeName") {
            topology.insert(HOSTNAME.into(), node.clone());
        }
        if !topology.is_empty() {
            endpoint["topology"] = Value::Object(topology);
        }
    }
}

/// An empty selector chose nothing in v1beta1 and chooses everything in v1; upstream marks the difference
/// with this label.
const EMPTY_SELECTOR: &str = "pdb.kubernetes.io/deprecated-v1beta1-empty-selector-match";

fn is_marked(selector: &Value, operator: &str) -> bool {
    let [one] = selector.list_at("matchExpressions") else { return false };
    one.str_at("key") == EMPTY_SELECTOR && one.str_at("operator") == operator
}

fn empty_selector_to_hub(object: &mut Value) {
    let Some(selector) = object.at("spec.selector") else { return };
    if selector.as_object().is_some_and(Map::is_empty) {
        let mark = json!([{ "key": EMPTY_SELECTOR, "operator": "Exists" }]);
        object.set_at("spec.selector.matchExpressions", mark);
    } else if is_marked(selector, "DoesNotExist") {
        object.set_at("spec.selector", json!({}));
    }
}

fn empty_selector_from_hub(object: &mut Value) {
    let Some(selector) = object.at("spec.selector") else { return };
    if selector.as_object().is_some_and(Map::is_empty) {
        let mark = json!([{ "key": EMPTY_SELECTOR, "operator": "DoesNotExist" }]);
        object.set_at("spec.selector.matchExpressions", mark);
    } else if is_marked(selector, "Exists") {
        object.set_at("spec.selector", json!({}));
    }
}

const RBAC_GROUP: &str = "rbac.authorization.k8s.io";

/// Subjects named a version instead of a group; the user `*` meant everybody.
fn subjects_to_hub(object: &mut Value) {
    for subject in object.get_mut("subjects").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(version) = subject.remove_at("apiVersion") {
            let text = version.as_str().unwrap_or_default();
            if let Some((group, _)) = text.split_once('/') {
                subject["apiGroup"] = json!(group);
            }
        }
        if subject.str_at("kind") == "User" && subject.str_at("name") == "*" {
            subject["kind"] = json!("Group");
            subject["apiGroup"] = json!(RBAC_GROUP);
            subject["name"] = json!("system:authenticated");
        }
    }
}

fn subjects_from_hub(object: &mut Value) {
    for subject in object.get_mut("subjects").and_then(Value::as_array_mut).into_iter().flatten() {
        match subject.remove_at("apiGroup") {
            Some(group) if group == RBAC_GROUP => {
                subject["apiVersion"] = json!("rbac.authorization.k8s.io/v1alpha1")
            }
            _ => subject["apiVersion"] = json!("v1"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(group: &str, version: &str, plural: &str) -> &'static Kind {
        Schema::builtin().any_resource(group, version, plural).expect("served")
    }

    /// The object in the hub's form, and back again in the version's.
    fn there_and_back(kind: &Kind, object: &Value) -> (Value, Value) {
        let mut hub = object.clone();
        to_hub(Schema::builtin(), kind, &mut hub);
        let mut back = hub.clone();
        from_hub(kind, &mut back);
        (hub, back)
    }

    #[test]
    fn every_version_has_its_hub() {
        let schema = Schema::builtin();
        for kind in schema.kinds().iter().chain(schema.old_kinds()).filter(|k| k.conversion.is_some()) {
            let hub = schema.hub(kind);
            assert!(
                hub.conversion.is_none() && hub.kind == kind.kind,
                "{} {}",
                kind.api_version(),
                kind.kind
            );
            assert_eq!(hub.namespaced, kind.namespaced);
        }
    }

    #[test]
    fn old_ingresses_name_services_otherwise() {
        let old = json!({ "apiVersion": "extensions/v1beta1", "kind": "Ingress", "spec": {
            "backend": { "serviceName": "rest", "servicePort": "http" },
            "rules": [{ "http": { "paths": [{ "path": "/", "backend": { "serviceName": "web", "servicePort": 80 } }] } }],
        }});
        let (mut hub, back) = there_and_back(kind("extensions", "v1beta1", "ingresses"), &old);
        assert_eq!(back, old);
        apply_defaults(kind("extensions", "v1beta1", "ingresses"), &mut hub);
        assert_eq!(
            hub,
            json!({ "apiVersion": "networking.k8s.io/v1", "kind": "Ingress", "spec": {
                "defaultBackend": { "service": { "name": "rest", "port": { "name": "http" } } },
                "rules": [{ "http": { "paths": [{ "path": "/", "pathType": "ImplementationSpecific",
                    "backend": { "service": { "name": "web", "port": { "number": 80 } } } }] } }],
            }})
        );
    }

    #[test]
    fn one_percentage_of_cpu_is_a_metric_like_others() {
        let old = json!({ "apiVersion": "autoscaling/v1", "kind": "HorizontalPodAutoscaler",
            "spec": { "maxReplicas": 3, "targetCPUUtilizationPercentage": 60 } });
        let (hub, back) = there_and_back(kind("autoscaling", "v1", "horizontalpodautoscalers"), &old);
        assert_eq!(back, old);
        assert_eq!(
            hub["spec"]["metrics"][0]["resource"]["target"],
            json!({ "type": "Utilization", "averageUtilization": 60 })
        );
        let beta = json!({ "apiVersion": "autoscaling/v2beta1", "kind": "HorizontalPodAutoscaler", "spec": { "maxReplicas": 3, "metrics": [
            { "type": "Resource", "resource": { "name": "cpu", "targetAverageUtilization": 60 } },
            { "type": "Object", "object": { "target": { "kind": "Service", "name": "s" }, "metricName": "hits", "targetValue": "10" } },
        ] } });
        let (hub, back) = there_and_back(kind("autoscaling", "v2beta1", "horizontalpodautoscalers"), &beta);
        assert_eq!(back, beta);
        assert_eq!(
            hub["spec"]["metrics"][1]["object"],
            json!({
                "describedObject": { "kind": "Service", "name": "s" }, "metric": { "name": "hits" },
                "target": { "type": "Value", "value": "10" },
            })
        );
    }

    #[test]
    fn selectors_and_labels_come_from_the_template() {
        let mut object = json!({ "spec": { "template": { "metadata": { "labels": { "app": "a" } } } } });
        apply_defaults(kind("extensions", "v1beta1", "deployments"), &mut object);
        assert_eq!(object.at("spec.selector.matchLabels.app"), Some(&json!("a")));
        assert_eq!(object.at("metadata.labels.app"), Some(&json!("a")));
        assert_eq!(object.at("spec.strategy.rollingUpdate.maxSurge"), Some(&json!(1)));
        let mut recreate = json!({ "spec": { "strategy": { "type": "Recreate" } } });
        apply_defaults(kind("extensions", "v1beta1", "deployments"), &mut recreate);
        assert_eq!(recreate.at("spec.strategy"), Some(&json!({ "type": "Recreate" })));
    }

    #[test]
    fn ownership_follows_a_field_to_its_other_name() {
        let ingress = kind("extensions", "v1beta1", "ingresses");
        let old = json!({ "f:spec": { "f:backend": { "f:serviceName": {} } } });
        let mut set = FieldSet::from_value(&old);
        move_set(ingress, &mut set, true);
        assert_eq!(
            set.to_value(),
            json!({ "f:spec": { "f:defaultBackend": { "f:service": { "f:name": {} } } } })
        );
        move_set(ingress, &mut set, false);
        assert_eq!(set.to_value(), old);
    }

    #[test]
    fn warnings_are_upstreams() {
        let text = warning(kind("extensions", "v1beta1", "ingresses")).expect("deprecated");
        assert_eq!(
            text,
            "extensions/v1beta1 Ingress is deprecated in v1.14+, unavailable in v1.22+; use networking.k8s.io/v1 Ingress"
        );
        assert_eq!(warning(kind("apps", "v1", "deployments")), None);
    }
}
