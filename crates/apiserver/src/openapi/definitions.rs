//! Types as OpenAPI definitions, in version 2 and version 3, with every `x-kubernetes-*` extension.

use std::collections::BTreeMap;

use knarr_api::schema::{Field, Kind, ListType, Schema, Shape, Type, TypeId};
use serde_json::{Map, Value, json};

use super::texts::Texts;
use crate::discovery::Catalog;

/// Types that are used in requests and answers but are kinds of no resource: name, group, version, kind.
pub const UNLISTED: &[(&str, &str, &str, &str)] = &[
    ("meta.v1.Status", "", "v1", "Status"),
    ("meta.v1.APIGroup", "", "v1", "APIGroup"),
    ("meta.v1.APIGroupList", "", "v1", "APIGroupList"),
    ("meta.v1.APIResourceList", "", "v1", "APIResourceList"),
    ("meta.v1.APIVersions", "", "v1", "APIVersions"),
    ("autoscaling.v1.Scale", "autoscaling", "v1", "Scale"),
    ("policy.v1.Eviction", "policy", "v1", "Eviction"),
    ("authentication.v1.TokenRequest", "authentication.k8s.io", "v1", "TokenRequest"),
];

/// Types that every group and version has as its own.
const EVERYWHERE: [&str; 2] = ["DeleteOptions", "WatchEvent"];

/// A type whose fields exclude each other: its name, the discriminator, and which field each value needs.
type Union = (&'static str, &'static str, &'static [(&'static str, &'static str)]);

const UNIONS: &[Union] = &[
    ("core.v1.AppArmorProfile", "type", &[("localhostProfile", "LocalhostProfile")]),
    ("core.v1.PodSchedulingGroup", "", &[("podGroupName", "PodGroupName")]),
    ("core.v1.SeccompProfile", "type", &[("localhostProfile", "LocalhostProfile")]),
    ("flowcontrol.v1.LimitResponse", "type", &[("queuing", "Queuing")]),
    (
        "flowcontrol.v1.PriorityLevelConfigurationSpec",
        "type",
        &[("exempt", "Exempt"), ("limited", "Limited")],
    ),
    (
        "flowcontrol.v1.Subject",
        "kind",
        &[("group", "Group"), ("serviceAccount", "ServiceAccount"), ("user", "User")],
    ),
];

/// Fields that only removed versions have, so that nobody else describes them.
const OLD_FIELDS: &[(&str, &str)] = &[
    ("backend", "Where requests go that no rule matches."),
    ("currentAverageUtilization", "The average over all pods, in percent of what they request."),
    ("currentAverageValue", "The average over all pods."),
    ("currentValue", "The metric's present value."),
    ("metricName", "The metric's name."),
    ("metricSelector", "Which series of the metric count."),
    ("rollbackTo", "The revision to go back to. Kept as an annotation; no controller follows it."),
    ("servicePort", "The service's port, by number or name."),
    ("serviceName", "The service's name."),
    ("targetAverageUtilization", "The average to hold over all pods, in percent of what they request."),
    ("targetAverageValue", "The average to hold over all pods."),
    ("targetValue", "The value to hold."),
    ("templateGeneration", "Counts changes of the template. Kept as an annotation."),
    ("topology", "Where the endpoint is: zone, node."),
];

/// Extensions that only say what holds anyway: type, field, extension, value.
const ODDITIES: &[(&str, &str, &str, &str)] = &[
    ("core.v1.PersistentVolumeClaimStatus", "allocatedResourceStatuses", "x-kubernetes-map-type", "granular"),
    ("core.v1.PersistentVolumeSpec", "claimRef", "x-kubernetes-map-type", "granular"),
    ("policy.v1.PodDisruptionBudgetSpec", "selector", "x-kubernetes-patch-strategy", "replace"),
];

const TIME: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.Time";
const MICRO_TIME: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.MicroTime";
const QUANTITY: &str = "io.k8s.apimachinery.pkg.api.resource.Quantity";
const INT_OR_STRING: &str = "io.k8s.apimachinery.pkg.util.intstr.IntOrString";
const RAW: &str = "io.k8s.apimachinery.pkg.runtime.RawExtension";
const FIELDS_V1: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.FieldsV1";
pub const PATCH: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.Patch";
pub const VERSION_INFO: &str = "io.k8s.apimachinery.pkg.version.Info";
const JSON: &str = "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSON";

/// `core.v1.Pod` as upstream's documents name it.
pub fn definition_name(full: &str) -> String {
    let prefix = match full.split('.').next() {
        Some("meta") => "io.k8s.apimachinery.pkg.apis.",
        Some("apiextensions") => "io.k8s.apiextensions-apiserver.pkg.apis.",
        Some("apiregistration") => "io.k8s.kube-aggregator.pkg.apis.",
        _ => "io.k8s.api.",
    };
    format!("{prefix}{full}")
}

/// The definition of a kind's list.
pub fn list_name(schema: &Schema, kind: &Kind) -> String {
    format!("{}List", definition_name(&schema.type_of(kind.type_id).full))
}

pub fn gvk(group: &str, version: &str, kind: &str) -> Value {
    json!({ "group": group, "version": version, "kind": kind })
}

/// Writes definitions in one of the two versions.
pub struct Definitions<'s> {
    pub catalog: Catalog,
    pub texts: &'s Texts,
    pub v3: bool,
}

/// What a document needs: types by their definition's name, and leaves.
pub type Needed = BTreeMap<String, Option<TypeId>>;

impl Definitions<'_> {
    /// Everything that is reachable from these types, themselves included.
    pub fn reachable(&self, roots: impl IntoIterator<Item = TypeId>) -> Needed {
        let mut found = Needed::new();
        let mut open: Vec<TypeId> = roots.into_iter().collect();
        while let Some(id) = open.pop() {
            let structure = self.catalog.schema.type_of(id);
            if found.insert(definition_name(&structure.full), Some(id)).is_none() {
                for field in &structure.fields {
                    match (field.object_type(), leaf(structure, field)) {
                        (Some(id), _) => open.push(id),
                        (None, Some(leaf)) => drop(found.insert(leaf.to_owned(), None)),
                        (None, None) => {}
                    }
                }
            }
        }
        found
    }

    /// The definition of this name.
    pub fn definition(&self, name: &str, id: Option<TypeId>) -> Value {
        let mut value = match id {
            Some(id) => self.structure(id),
            None => self.leaf_definition(name),
        };
        self.describe(&mut value, self.texts.of_type(name));
        value
    }

    fn describe(&self, value: &mut Value, text: &str) {
        if !text.is_empty() {
            value["description"] = json!(text);
        }
    }

    fn structure(&self, id: TypeId) -> Value {
        let structure = self.catalog.schema.type_of(id);
        let name = definition_name(&structure.full);
        let mut properties = Map::new();
        let mut required = Vec::new();
        for field in &structure.fields {
            let mut value = self.field(structure, field);
            let mut text = self.texts.of_field(&name, &field.name);
            if text.is_empty() {
                let known = OLD_FIELDS.iter().find(|(field_name, _)| *field_name == field.name);
                text = known.map_or("", |(_, text)| text);
            }
            if text.is_empty() && matches!(field.name.as_str(), "apiVersion" | "kind") {
                text = self.texts.of_field("io.k8s.api.core.v1.Pod", &field.name);
            }
            self.describe(&mut value, text);
            properties.insert(field.name.clone(), value);
            if field.required {
                required.push(json!(field.name));
            }
        }
        let mut value = json!({ "type": "object" });
        if !properties.is_empty() {
            value["properties"] = Value::Object(properties);
        }
        if !required.is_empty() {
            value["required"] = Value::Array(required);
        }
        if structure.atomic {
            value["x-kubernetes-map-type"] = json!("atomic");
        }
        if let Some((_, discriminator, fields)) = UNIONS.iter().find(|(name, ..)| *name == structure.full) {
            let fields: Map<String, Value> =
                fields.iter().map(|(f, v)| ((*f).to_owned(), json!(v))).collect();
            let mut union = json!({ "fields-to-discriminateBy": fields });
            if !discriminator.is_empty() {
                union["discriminator"] = json!(discriminator);
            }
            value["x-kubernetes-unions"] = json!([union]);
        }
        let kinds = self.kinds_of(id, structure);
        if !kinds.is_empty() {
            value["x-kubernetes-group-version-kind"] = Value::Array(kinds);
        }
        value
    }

    fn kinds_of(&self, id: TypeId, structure: &Type) -> Vec<Value> {
        if structure.full.starts_with("meta.") && EVERYWHERE.contains(&structure.name.as_str()) {
            let mut versions: Vec<(&str, &str)> = vec![("", "v1")];
            versions.extend(self.catalog.kinds().map(|k| (k.group.as_str(), k.version.as_str())));
            versions.sort_unstable();
            versions.dedup();
            return versions.iter().map(|(g, v)| gvk(g, v, &structure.name)).collect();
        }
        let listed = self.catalog.kinds().filter(|k| k.type_id == id);
        let mut kinds: Vec<Value> = listed.map(|k| gvk(&k.group, &k.version, &k.kind)).collect();
        if kinds.is_empty() {
            let unlisted = UNLISTED.iter().filter(|(name, ..)| *name == structure.full);
            kinds.extend(unlisted.map(|(_, g, v, k)| gvk(g, v, k)));
        }
        kinds
    }

    /// The list of a kind, which has no type of its own in the schema.
    pub fn list(&self, kind: &Kind) -> Value {
        let name = list_name(self.catalog.schema, kind);
        let text = |field: &str| match self.texts.of_field(&name, field) {
            "" => self.texts.of_field("io.k8s.api.core.v1.PodTemplate", field),
            text => text,
        };
        let item = definition_name(&self.catalog.schema.type_of(kind.type_id).full);
        let mut items = json!({ "type": "array", "items": self.reference(&item) });
        match self.texts.of_field(&name, "items") {
            "" => items["description"] = json!(format!("The {} of this page.", kind.plural)),
            text => self.describe(&mut items, text),
        }
        let mut metadata = self.wrapped(self.reference("io.k8s.apimachinery.pkg.apis.meta.v1.ListMeta"));
        self.describe(&mut metadata, text("metadata"));
        let mut value = json!({
            "type": "object",
            "required": ["items"],
            "properties": {
                "apiVersion": { "type": "string", "description": text("apiVersion") },
                "kind": { "type": "string", "description": text("kind") },
                "metadata": metadata,
                "items": items,
            },
            "x-kubernetes-group-version-kind": [gvk(&kind.group, &kind.version, &format!("{}List", kind.kind))],
        });
        match self.texts.of_type(&name) {
            "" => value["description"] = json!(format!("{}List is a list of {}", kind.kind, kind.kind)),
            text => self.describe(&mut value, text),
        }
        value
    }

    fn field(&self, owner: &Type, field: &Field) -> Value {
        let mut value = self.shape(owner, field, &field.shape);
        if value.get("$ref").is_some() {
            value = self.wrapped(value);
        }
        if self.v3
            && let Some(default) = &field.default
        {
            value["default"] = default.value.clone();
        }
        if matches!(field.shape, Shape::List(_)) {
            match &field.list {
                ListType::Atomic if field.atomic => value["x-kubernetes-list-type"] = json!("atomic"),
                ListType::Atomic => {}
                ListType::Set => value["x-kubernetes-list-type"] = json!("set"),
                ListType::Map(keys) => {
                    value["x-kubernetes-list-type"] = json!("map");
                    value["x-kubernetes-list-map-keys"] = json!(keys);
                }
            }
        } else if field.atomic && field.shape == Shape::Bytes {
            value["x-kubernetes-list-type"] = json!("atomic");
        } else if field.atomic {
            value["x-kubernetes-map-type"] = json!("atomic");
        }
        for (_, _, name, content) in ODDITIES.iter().filter(|(t, f, ..)| *t == owner.full && *f == field.name)
        {
            value[*name] = json!(content);
        }
        match (&field.merge, field.retain_keys) {
            (Some(_), true) => value["x-kubernetes-patch-strategy"] = json!("merge,retainKeys"),
            (Some(_), false) => value["x-kubernetes-patch-strategy"] = json!("merge"),
            (None, true) => value["x-kubernetes-patch-strategy"] = json!("retainKeys"),
            (None, false) => {}
        }
        let key = field.merge.as_ref().and_then(|m| m.key.as_ref()).or(field.sort_key.as_ref());
        if let Some(key) = key {
            value["x-kubernetes-patch-merge-key"] = json!(key);
        }
        value
    }

    fn reference(&self, name: &str) -> Value {
        let place = if self.v3 { "#/components/schemas/" } else { "#/definitions/" };
        json!({ "$ref": format!("{place}{name}") })
    }

    /// In version 3 a reference with siblings must be wrapped, or clients ignore the siblings.
    fn wrapped(&self, reference: Value) -> Value {
        if self.v3 { json!({ "allOf": [reference] }) } else { reference }
    }

    /// A reference to a schema from outside a definition.
    pub fn body(&self, name: &str) -> Value {
        self.reference(name)
    }

    fn shape(&self, owner: &Type, field: &Field, shape: &Shape) -> Value {
        match shape {
            Shape::Bool => json!({ "type": "boolean" }),
            Shape::Int32 => json!({ "type": "integer", "format": "int32" }),
            Shape::Int64 => json!({ "type": "integer", "format": "int64" }),
            Shape::Double => json!({ "type": "number", "format": "double" }),
            Shape::String => json!({ "type": "string" }),
            Shape::Bytes => json!({ "type": "string", "format": "byte" }),
            Shape::Object(id) => self.reference(&definition_name(&self.catalog.schema.type_of(*id).full)),
            Shape::List(inner) => json!({ "type": "array", "items": self.shape(owner, field, inner) }),
            Shape::Map(inner) => {
                json!({ "type": "object", "additionalProperties": self.shape(owner, field, inner) })
            }
            leaf => self.reference(leaf_name(owner, field, leaf).expect("the other shapes are leaves")),
        }
    }

    fn leaf_definition(&self, name: &str) -> Value {
        match name {
            TIME | MICRO_TIME => json!({ "type": "string", "format": "date-time" }),
            QUANTITY if self.v3 => json!({ "oneOf": [{ "type": "string" }, { "type": "number" }] }),
            QUANTITY => json!({ "type": "string" }),
            INT_OR_STRING if self.v3 => {
                json!({ "format": "int-or-string", "oneOf": [{ "type": "integer" }, { "type": "string" }] })
            }
            INT_OR_STRING => json!({ "type": "string", "format": "int-or-string" }),
            RAW | FIELDS_V1 | PATCH => json!({ "type": "object" }),
            VERSION_INFO => version_info(),
            // Anything: JSON, and the unions of JSON schemas.
            _ => json!({}),
        }
    }
}

/// The answer of `/version`.
fn version_info() -> Value {
    let fields = [
        ("buildDate", true),
        ("compiler", true),
        ("emulationMajor", false),
        ("emulationMinor", false),
        ("gitCommit", true),
        ("gitTreeState", true),
        ("gitVersion", true),
        ("goVersion", true),
        ("major", true),
        ("minCompatibilityMajor", false),
        ("minCompatibilityMinor", false),
        ("minor", true),
        ("platform", true),
    ];
    let properties: Map<String, Value> =
        fields.iter().map(|(name, _)| ((*name).to_owned(), json!({ "type": "string" }))).collect();
    let required: Vec<&str> =
        fields.iter().filter(|(_, required)| *required).map(|(name, _)| *name).collect();
    json!({ "type": "object", "properties": properties, "required": required })
}

/// The definition of the leaves in this field, if they have one.
fn leaf(owner: &Type, field: &Field) -> Option<&'static str> {
    let mut shape = &field.shape;
    while let Shape::List(inner) | Shape::Map(inner) = shape {
        shape = inner;
    }
    leaf_name(owner, field, shape)
}

fn leaf_name(owner: &Type, field: &Field, shape: &Shape) -> Option<&'static str> {
    let name = match shape {
        Shape::Time => TIME,
        Shape::MicroTime => MICRO_TIME,
        Shape::Quantity => QUANTITY,
        Shape::IntOrString => INT_OR_STRING,
        Shape::Any => match (owner.name.as_str(), field.name.as_str()) {
            ("ManagedFieldsEntry", _) => FIELDS_V1,
            ("JSONSchemaProps", "items") => {
                "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrArray"
            }
            ("JSONSchemaProps", "additionalItems" | "additionalProperties") => {
                "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrBool"
            }
            ("JSONSchemaProps", "dependencies") => {
                "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrStringArray"
            }
            ("JSONSchemaProps", _) => JSON,
            _ => RAW,
        },
        _ => return None,
    };
    Some(name)
}
