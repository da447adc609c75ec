//! OpenAPI v3 and v2, written from the schema tables at request time.
//!
//! `kubectl apply`, `explain` and field validation read list types, merge keys and parameters from here.

use std::collections::BTreeSet;

use knarr_api::schema::{Field, Kind, ListType, Schema, Shape, TypeId};
use serde_json::{Map, Value, json};

/// `/openapi/v3`: one document per group and version.
pub fn v3_index(schema: &Schema, hash: &str) -> Value {
    let mut paths = Map::new();
    for kind in schema.kinds() {
        let path = group_path(&kind.group, &kind.version);
        paths.insert(path.clone(), json!({ "serverRelativeURL": format!("/openapi/v3/{path}?hash={hash}") }));
    }
    json!({ "paths": paths })
}

fn group_path(group: &str, version: &str) -> String {
    if group.is_empty() { format!("api/{version}") } else { format!("apis/{group}/{version}") }
}

/// The document of one group and version.
pub fn v3_document(schema: &Schema, group: &str, version: &str) -> Option<Value> {
    let kinds: Vec<&Kind> =
        schema.kinds().iter().filter(|k| k.group == group && k.version == version).collect();
    if kinds.is_empty() {
        return None;
    }
    let writer = Writer { schema, reference: "#/components/schemas/" };
    let (mut schemas, mut paths) = (Map::new(), Map::new());
    for id in writer.reachable(kinds.iter().map(|k| k.type_id)) {
        schemas.insert(definition_name(&schema.type_of(id).full), writer.definition(id, true));
    }
    for kind in &kinds {
        let list = format!("{}List", definition_name(&schema.type_of(kind.type_id).full));
        schemas.insert(list, writer.list_definition(kind, true));
        paths.extend(writer.paths(kind, true));
    }
    Some(json!({
        "openapi": "3.0.0",
        "info": { "title": "Kubernetes", "version": crate::VERSION },
        "paths": paths,
        "components": { "schemas": schemas },
    }))
}

/// `/openapi/v2`, in JSON.
pub fn v2_document(schema: &Schema) -> Value {
    let writer = Writer { schema, reference: "#/definitions/" };
    let (mut definitions, mut paths) = (Map::new(), Map::new());
    for id in writer.reachable(schema.kinds().iter().map(|k| k.type_id)) {
        definitions.insert(definition_name(&schema.type_of(id).full), writer.definition(id, false));
    }
    for kind in schema.kinds() {
        let list = format!("{}List", definition_name(&schema.type_of(kind.type_id).full));
        definitions.insert(list, writer.list_definition(kind, false));
        paths.extend(writer.paths(kind, false));
    }
    json!({
        "swagger": "2.0",
        "info": { "title": "Kubernetes", "version": crate::VERSION },
        "paths": paths,
        "definitions": definitions,
    })
}

/// `core.v1.Pod` as upstream's documents name it.
fn definition_name(full: &str) -> String {
    let prefix = match full.split('.').next() {
        Some("meta") => "io.k8s.apimachinery.pkg.apis.",
        Some("apiextensions") => "io.k8s.apiextensions-apiserver.pkg.apis.",
        Some("apiregistration") => "io.k8s.kube-aggregator.pkg.apis.",
        _ => "io.k8s.api.",
    };
    format!("{prefix}{full}")
}

struct Writer<'s> {
    schema: &'s Schema,
    reference: &'static str,
}

impl Writer<'_> {
    fn reachable(&self, roots: impl Iterator<Item = TypeId>) -> BTreeSet<TypeId> {
        let mut found = BTreeSet::new();
        let mut open: Vec<TypeId> = roots.collect();
        open.extend(
            ["meta.v1.ListMeta", "meta.v1.Status", "meta.v1.DeleteOptions", "meta.v1.WatchEvent"]
                .iter()
                .filter_map(|n| self.schema.type_named(n)),
        );
        while let Some(id) = open.pop() {
            if found.insert(id) {
                open.extend(self.schema.type_of(id).fields.iter().filter_map(Field::object_type));
            }
        }
        found
    }

    fn definition(&self, id: TypeId, v3: bool) -> Value {
        let structure = self.schema.type_of(id);
        let mut properties = Map::new();
        let mut required = Vec::new();
        for field in &structure.fields {
            properties.insert(field.name.clone(), self.field(field, v3));
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
        let kinds: Vec<Value> = self.schema.kinds().iter().filter(|k| k.type_id == id).map(gvk).collect();
        if !kinds.is_empty() {
            value["x-kubernetes-group-version-kind"] = Value::Array(kinds);
        }
        value
    }

    fn list_definition(&self, kind: &Kind, v3: bool) -> Value {
        let item = self.shape(&Shape::Object(kind.type_id), v3);
        let metadata =
            self.schema.type_named("meta.v1.ListMeta").map(|id| self.shape(&Shape::Object(id), v3));
        json!({
            "type": "object",
            "required": ["items"],
            "properties": {
                "apiVersion": { "type": "string" },
                "kind": { "type": "string" },
                "metadata": metadata,
                "items": { "type": "array", "items": item },
            },
            "x-kubernetes-group-version-kind": [{ "group": kind.group, "version": kind.version, "kind": format!("{}List", kind.kind) }],
        })
    }

    fn field(&self, field: &Field, v3: bool) -> Value {
        let mut value = self.shape(&field.shape, v3);
        if let Some(default) = &field.default {
            if v3 && value.get("$ref").is_some() {
                value = json!({ "allOf": [value] });
            }
            value["default"] = default.value.clone();
        } else if v3 && value.get("$ref").is_some() {
            // Clients that merge siblings of a reference need it wrapped, as upstream does.
            value = json!({ "allOf": [value] });
        }
        if matches!(field.shape, Shape::List(_)) {
            match &field.list {
                ListType::Atomic if field.merge.is_none() => {
                    value["x-kubernetes-list-type"] = json!("atomic")
                }
                ListType::Atomic => {}
                ListType::Set => value["x-kubernetes-list-type"] = json!("set"),
                ListType::Map(keys) => {
                    value["x-kubernetes-list-type"] = json!("map");
                    value["x-kubernetes-list-map-keys"] = json!(keys);
                }
            }
        }
        if field.atomic && !matches!(field.shape, Shape::List(_)) {
            value["x-kubernetes-map-type"] = json!("atomic");
        }
        if let Some(merge) = &field.merge {
            value["x-kubernetes-patch-strategy"] =
                json!(if field.retain_keys { "merge,retainKeys" } else { "merge" });
            if let Some(key) = &merge.key {
                value["x-kubernetes-patch-merge-key"] = json!(key);
            }
        } else if field.retain_keys {
            value["x-kubernetes-patch-strategy"] = json!("retainKeys");
        }
        value
    }

    fn shape(&self, shape: &Shape, v3: bool) -> Value {
        match shape {
            Shape::Bool => json!({ "type": "boolean" }),
            Shape::Int32 => json!({ "type": "integer", "format": "int32" }),
            Shape::Int64 => json!({ "type": "integer", "format": "int64" }),
            Shape::Double => json!({ "type": "number", "format": "double" }),
            Shape::String => json!({ "type": "string" }),
            Shape::Bytes => json!({ "type": "string", "format": "byte" }),
            Shape::Time | Shape::MicroTime => json!({ "type": "string", "format": "date-time" }),
            Shape::Quantity if v3 => json!({ "oneOf": [{ "type": "string" }, { "type": "number" }] }),
            Shape::Quantity => json!({ "type": "string" }),
            Shape::IntOrString if v3 => {
                json!({ "format": "int-or-string", "oneOf": [{ "type": "integer" }, { "type": "string" }] })
            }
            Shape::IntOrString => json!({ "type": "string", "format": "int-or-string" }),
            Shape::Any => json!({ "type": "object" }),
            Shape::Object(id) => {
                json!({ "$ref": format!("{}{}", self.reference, definition_name(&self.schema.type_of(*id).full)) })
            }
            Shape::List(inner) => json!({ "type": "array", "items": self.shape(inner, v3) }),
            Shape::Map(inner) => json!({ "type": "object", "additionalProperties": self.shape(inner, v3) }),
        }
    }

    /// The paths of a kind: enough for clients to see which verbs and options there are.
    fn paths(&self, kind: &Kind, v3: bool) -> Vec<(String, Value)> {
        let root = format!("/{}", group_path(&kind.group, &kind.version));
        let scope = if kind.namespaced { "/namespaces/{namespace}" } else { "" };
        let collection = format!("{root}{scope}/{}", kind.plural);
        let item = format!("{collection}/{{name}}");
        let operation = |action: &str, options: &[&str]| self.operation(kind, action, options, v3);
        let lists = &[
            "labelSelector",
            "fieldSelector",
            "limit",
            "continue",
            "resourceVersion",
            "watch",
            "timeoutSeconds",
        ][..];
        let writes = &["dryRun", "fieldManager", "fieldValidation"][..];
        if kind.create_only {
            return vec![(collection, json!({ "post": operation("post", writes) }))];
        }
        vec![
            (
                collection,
                json!({
                    "get": operation("list", lists),
                    "post": operation("post", writes),
                    "delete": operation("deletecollection", lists),
                }),
            ),
            (
                item,
                json!({
                    "get": operation("get", &[]),
                    "put": operation("put", writes),
                    "patch": operation("patch", &["dryRun", "fieldManager", "fieldValidation", "force"]),
                    "delete": operation("delete", &["dryRun", "gracePeriodSeconds", "orphanDependents", "propagationPolicy"]),
                }),
            ),
        ]
    }

    fn operation(&self, kind: &Kind, action: &str, options: &[&str], v3: bool) -> Value {
        let parameters: Vec<Value> = options
            .iter()
            .map(|name| {
                let kind = match *name {
                    "limit" | "timeoutSeconds" | "gracePeriodSeconds" => "integer",
                    "watch" | "force" | "orphanDependents" => "boolean",
                    _ => "string",
                };
                let mut parameter = json!({ "name": name, "in": "query" });
                if v3 {
                    parameter["schema"] = json!({ "type": kind, "uniqueItems": true });
                } else {
                    parameter["type"] = json!(kind);
                    parameter["uniqueItems"] = json!(true);
                }
                parameter
            })
            .collect();
        let reference = self.shape(&Shape::Object(kind.type_id), v3);
        let ok = if v3 {
            json!({ "description": "OK", "content": { "application/json": { "schema": reference } } })
        } else {
            json!({ "description": "OK", "schema": reference })
        };
        json!({
            "operationId": format!("{action}{}{}", kind.kind, kind.version),
            "parameters": parameters,
            "responses": { "200": ok },
            "x-kubernetes-action": action,
            "x-kubernetes-group-version-kind": gvk(kind),
        })
    }
}

fn gvk(kind: &Kind) -> Value {
    json!({ "group": kind.group, "version": kind.version, "kind": kind.kind })
}
