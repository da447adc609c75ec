//! The strategy of CustomResourceDefinitions: names, versions, and that schemas are structural.

use std::collections::HashSet;

use serde_json::{Value, json};

use crate::field::{self, child, index, key};
use crate::kinds::core::keep;
use crate::names;
use crate::object::Object;
use crate::rules::{Errors, Rules, named, required};

pub const DEFINITION: Rules = Rules {
    lenient_finalizers: true,
    returns_deleted: true,
    create: |object| {
        let stored: Vec<Value> = object
            .list_at("spec.versions")
            .iter()
            .filter(|v| v.bool_at("storage"))
            .map(|v| v["name"].clone())
            .collect();
        object.set_at("status", json!({ "conditions": null, "acceptedNames": { "plural": "", "kind": "" }, "storedVersions": stored }));
    },
    update_status: |new, old| keep(new, old, "spec"),
    validate,
    validate_update: |new, old, errors| {
        let established = old
            .list_at("status.conditions")
            .iter()
            .any(|c| c.str_at("type") == "Established" && c.str_at("status") == "True");
        for path in ["spec.scope", "spec.names.kind"] {
            if established {
                crate::rules::immutable(path, new, old, errors);
            }
        }
        for path in ["spec.group", "spec.names.plural"] {
            crate::rules::immutable(path, new, old, errors);
        }
    },
    ..Rules::DEFAULT
};

const MIXED: &str = "may have mixed case, but should otherwise match: ";

fn validate(object: &Value, errors: &mut Errors) {
    let spec = object.at("spec").unwrap_or(&Value::Null);
    let (group, names) = (spec.str_at("group"), spec.at("names").unwrap_or(&Value::Null));
    if object.name() != format!("{}.{group}", names.str_at("plural")) {
        let detail = "must be spec.names.plural+\".\"+spec.group";
        errors.push(field::Error::invalid("metadata.name", object.name(), detail));
    }
    if group.is_empty() {
        errors.push(field::Error::required("spec.group", ""));
    } else {
        let before = errors.len();
        named("spec.group", group, names::dns_subdomain, errors);
        if errors.len() == before && group.split('.').count() < 2 {
            let detail = "should be a domain with at least one dot";
            errors.push(field::Error::invalid("spec.group", group, detail));
        }
    }
    match spec.str_at("scope") {
        "" => errors.push(field::Error::required("spec.scope", "")),
        "Cluster" | "Namespaced" => {}
        other => errors.push(field::Error::not_supported("spec.scope", other, &["Cluster", "Namespaced"])),
    }
    versions(object, spec, errors);
    definition_names(names, errors);
}

fn definition_names(names: &Value, errors: &mut Errors) {
    for name in ["plural", "singular"] {
        if required("spec.names", names, name, "", errors) {
            named(&child("spec.names", name), names.str_at(name), names::dns_label_1035, errors);
        }
    }
    for name in ["kind", "listKind"] {
        if !required("spec.names", names, name, "", errors) {
            continue;
        }
        let value = names.str_at(name);
        for problem in names::dns_label_1035(&value.to_lowercase()) {
            errors.push(field::Error::invalid(child("spec.names", name), value, format!("{MIXED}{problem}")));
        }
    }
    if names.str_at("kind") == names.str_at("listKind") && !names.str_at("kind").is_empty() {
        let detail = "kind and listKind may not be the same";
        errors.push(field::Error::invalid("spec.names.listKind", names.str_at("listKind"), detail));
    }
    for list in ["shortNames", "categories"] {
        for (i, name) in names.list_at(list).iter().enumerate() {
            let name = name.as_str().unwrap_or_default();
            named(&index(&child("spec.names", list), i), name, names::dns_label_1035, errors);
        }
    }
}

fn versions(object: &Value, spec: &Value, errors: &mut Errors) {
    let versions = spec.list_at("versions");
    let mut seen = HashSet::new();
    // Upstream moves what all versions share to the top, and its paths follow.
    let shared = |name: &str| -> bool {
        versions.split_first().is_some_and(|(first, rest)| {
            first.at(name).is_some() && rest.iter().all(|v| v.at(name) == first.at(name))
        })
    };
    for (i, version) in versions.iter().enumerate() {
        let at = index("spec.versions", i);
        let name = version.str_at("name");
        if !name.is_empty() && !seen.insert(name) {
            let detail = "must contain unique version names";
            errors.push(field::Error::invalid("spec.versions", versions.to_vec(), detail));
        }
        if version.at("schema.openAPIV3Schema").is_none() {
            let path = child(&at, "schema.openAPIV3Schema");
            errors.push(field::Error::required(path, "schemas are required"));
        } else if !shared("schema") {
            root_schema(&child(&at, "schema.openAPIV3Schema"), &version["schema"]["openAPIV3Schema"], errors);
        }
        named(&child(&at, "name"), name, names::dns_label_1035, errors);
        if !shared("additionalPrinterColumns") {
            printer_columns(&child(&at, "additionalPrinterColumns"), version, errors);
        }
        if !shared("subresources") {
            subresources(&child(&at, "subresources"), version, errors);
        }
    }
    if let Some(first) = versions.first() {
        // The oldest field for the version's name, which upstream still keeps.
        if versions.len() == 1
            && !first.str_at("name").is_empty()
            && !names::dns_label_1035(first.str_at("name")).is_empty()
        {
            named("spec.version", first.str_at("name"), names::dns_label_1035, errors);
        }
        if shared("schema") && first.at("schema.openAPIV3Schema").is_some() {
            let at = "spec.validation.openAPIV3Schema";
            root_schema(at, &first["schema"]["openAPIV3Schema"], errors);
        }
        if shared("additionalPrinterColumns") {
            printer_columns("spec.additionalPrinterColumns", first, errors);
        }
        if shared("subresources") {
            subresources("spec.subresources", first, errors);
        }
    }
    let stored: Vec<&str> =
        versions.iter().filter(|v| v.bool_at("storage")).map(|v| v.str_at("name")).collect();
    if stored.len() != 1 {
        let detail = "must have exactly one version marked as storage version";
        errors.push(field::Error::invalid("spec.versions", versions.to_vec(), detail));
    }
    let kept = object.list_at("status.storedVersions");
    if kept.is_empty() {
        let detail = "must have at least one stored version";
        errors.push(field::Error::invalid("status.storedVersions", kept.to_vec(), detail));
    }
    for (i, name) in kept.iter().enumerate() {
        if !versions.iter().any(|v| v.get("name") == Some(name)) {
            let at = index("status.storedVersions", i);
            errors.push(field::Error::invalid(at, name.clone(), "must appear in spec.versions"));
        }
    }
}

fn simple_path(path: &str, value: &str, errors: &mut Errors) {
    if !value.is_empty() && !value.starts_with('.') {
        errors.push(field::Error::invalid(path, value, "must be a simple json path starting with ."));
    }
}

fn printer_columns(at: &str, version: &Value, errors: &mut Errors) {
    for (i, column) in version.list_at("additionalPrinterColumns").iter().enumerate() {
        let at = index(at, i);
        required(&at, column, "name", "", errors);
        let kind = column.str_at("type");
        let known = ["boolean", "date", "integer", "number", "string"];
        if required(&at, column, "type", &format!("must be one of {}", known.join(",")), errors)
            && !known.contains(&kind)
        {
            let detail = format!("must be one of {}", known.join(","));
            errors.push(field::Error::invalid(child(&at, "type"), kind, detail));
        }
        if column.str_at("jsonPath").is_empty() {
            errors.push(field::Error::required(child(&at, "JSONPath"), ""));
        } else {
            simple_path(&child(&at, "JSONPath"), column.str_at("jsonPath"), errors);
        }
    }
}

fn subresources(at: &str, version: &Value, errors: &mut Errors) {
    let Some(scale) = version.at("subresources.scale") else { return };
    for (name, prefix) in [("specReplicasPath", ".spec."), ("statusReplicasPath", ".status.")] {
        let (path, value) = (format!("{at}.scale.{name}"), scale.str_at(name));
        if value.is_empty() {
            errors.push(field::Error::required(path, ""));
        } else if !value.starts_with('.') {
            simple_path(&path, value, errors);
        } else if !value.starts_with(prefix) {
            let detail = format!("should be a json path under {}", prefix.trim_end_matches('.'));
            errors.push(field::Error::invalid(path, value, detail));
        }
    }
    simple_path(&format!("{at}.scale.labelSelectorPath"), scale.str_at("labelSelectorPath"), errors);
}

const TYPES: [&str; 6] = ["array", "boolean", "integer", "number", "object", "string"];

fn root_schema(at: &str, schema: &Value, errors: &mut Errors) {
    known_types(at, schema, errors);
    common_properties(at, schema, errors);
    structural(at, schema, "root", errors);
    match schema.str_at("type") {
        "object" => {}
        "" => errors.push(field::Error::required(child(at, "type"), "must not be empty at the root")),
        other => {
            let detail = "must be object at the root";
            errors.push(field::Error::invalid(child(at, "type"), other, detail));
        }
    }
}

/// What every object has is said before what structure asks for.
fn common_properties(at: &str, schema: &Value, errors: &mut Errors) {
    for (name, wanted) in [("apiVersion", "string"), ("kind", "string"), ("metadata", "object")] {
        let Some(property) = schema.at("properties").and_then(|p| p.get(name)) else { continue };
        let kind = property.str_at("type");
        if kind != wanted {
            let path = child(&key(&child(at, "properties"), name), "type");
            errors.push(field::Error::invalid(path, kind, format!("must be {wanted}")));
        }
    }
}

/// Types are those of OpenAPI: upstream says so first, of all that are nested.
fn known_types(at: &str, schema: &Value, errors: &mut Errors) {
    let kind = schema.str_at("type");
    if !kind.is_empty() && !TYPES.contains(&kind) {
        errors.push(field::Error::not_supported(child(at, "type"), kind, &TYPES));
    }
    for (name, property) in schema.map_at("properties").into_iter().flatten() {
        known_types(&key(&child(at, "properties"), name), property, errors);
    }
    for name in ["items", "additionalProperties"] {
        if let Some(inner) = schema.at(name).filter(|inner| inner.is_object()) {
            known_types(&child(at, name), inner, errors);
        }
    }
}

/// Every value has a type; logical parts only narrow what the structure says.
fn structural(at: &str, schema: &Value, place: &str, errors: &mut Errors) {
    let kind = schema.str_at("type");
    let free = schema.bool_at("x-kubernetes-preserve-unknown-fields")
        || schema.bool_at("x-kubernetes-int-or-string");
    if kind.is_empty() && !free && place != "root" {
        let detail = match place {
            "items" => "must not be empty for specified array items",
            _ => "must not be empty for specified object fields",
        };
        errors.push(field::Error::required(child(at, "type"), detail));
    }
    if kind == "array" && !schema.at("items").is_some_and(Value::is_object) {
        errors.push(field::Error::required(child(at, "items"), "must be specified"));
    }
    list_type(at, schema, errors);
    unsupported(at, schema, errors);
    if let Some(default) = schema.get("default").filter(|d| !d.is_null()) {
        crate::open_schema::validate(schema, default, &child(at, "default"), "", errors);
    }
    for (name, property) in schema.map_at("properties").into_iter().flatten() {
        structural(&key(&child(at, "properties"), name), property, "property", errors);
    }
    if let Some(items) = schema.at("items").filter(|i| i.is_object()) {
        structural(&child(at, "items"), items, "items", errors);
    }
    if let Some(values) = schema.at("additionalProperties").filter(|a| a.is_object()) {
        structural(&child(at, "additionalProperties"), values, "property", errors);
    }
    // The one pattern that may name types again: `anyOf: [{type: integer}, {type: string}]`.
    let either = [json!({ "type": "integer" }), json!({ "type": "string" })];
    let numbers = schema.bool_at("x-kubernetes-int-or-string");
    for list in ["allOf", "anyOf", "oneOf"] {
        let allowed = numbers && list == "anyOf" && schema.list_at(list) == either;
        for (i, part) in schema.list_at(list).iter().enumerate().filter(|_| !allowed) {
            narrowing(&index(&child(at, list), i), part, numbers && list == "allOf", errors);
        }
    }
    if let Some(part) = schema.at("not") {
        narrowing(&child(at, "not"), part, false, errors);
    }
}

/// What OpenAPI has and custom resources do not.
fn unsupported(at: &str, schema: &Value, errors: &mut Errors) {
    for name in ["$ref", "definitions", "dependencies", "id", "additionalItems", "patternProperties"] {
        let given = schema.get(name).is_some_and(|v| !v.is_null() && v.as_str() != Some(""));
        if given {
            errors.push(field::Error::forbidden(child(at, name), format!("{name} is not supported")));
        }
    }
    if schema.bool_at("uniqueItems") {
        let detail = "uniqueItems cannot be set to true since the runtime complexity becomes quadratic";
        errors.push(field::Error::forbidden(child(at, "uniqueItems"), detail));
    }
    let properties = schema.map_at("properties").is_some_and(|p| !p.is_empty());
    if properties
        && schema.get("additionalProperties").is_some_and(|a| !a.is_null() && *a != Value::Bool(true))
    {
        let detail = "additionalProperties and properties are mutual exclusive";
        errors.push(field::Error::forbidden(child(at, "additionalProperties"), detail));
    }
    let pattern = schema.str_at("pattern");
    if let Err(error) = regex::Regex::new(pattern) {
        let detail = format!("must be a valid regular expression, but isn't: {error}");
        errors.push(field::Error::invalid(child(at, "pattern"), pattern, detail));
    }
    const PRESERVE: &str = "x-kubernetes-preserve-unknown-fields";
    if schema.get(PRESERVE) == Some(&Value::Bool(false)) {
        errors.push(field::Error::invalid(child(at, PRESERVE), false, "must be true or undefined"));
    }
    const EMBEDDED: &str = "x-kubernetes-embedded-resource";
    if schema.bool_at(EMBEDDED) {
        if schema.str_at("type") != "object" {
            let detail = format!("must be object if {EMBEDDED} is true");
            errors.push(field::Error::invalid(child(at, "type"), schema.str_at("type"), detail));
        }
        if !schema.bool_at(PRESERVE) && !properties {
            let detail = format!("must not be empty if {EMBEDDED} is true without {PRESERVE}");
            errors.push(field::Error::required(child(at, "properties"), detail));
        }
    }
}

fn list_type(at: &str, schema: &Value, errors: &mut Errors) {
    const LIST: &str = "x-kubernetes-list-type";
    const KEYS: &str = "x-kubernetes-list-map-keys";
    let Some(list) = schema.get(LIST).and_then(Value::as_str) else { return };
    if schema.str_at("type") != "array" {
        let path = child(at, "type");
        let detail = format!("must be array if {LIST} is specified");
        errors.push(match schema.str_at("type") {
            "" => field::Error::required(path, detail),
            other => field::Error::invalid(path, other, detail),
        });
    }
    if !["atomic", "set", "map"].contains(&list) {
        errors.push(field::Error::not_supported(child(at, LIST), list, &["atomic", "map", "set"]));
    }
    if list != "map" {
        return;
    }
    let keys = schema.list_at(KEYS);
    if keys.is_empty() {
        let detail = format!("must not be empty if {LIST} is map");
        errors.push(field::Error::required(child(at, KEYS), detail));
    }
    let Some(items) = schema.at("items").filter(|i| i.is_object()) else {
        let detail = format!("must have a schema if {LIST} is map");
        errors.push(field::Error::required(child(at, "items"), detail));
        return;
    };
    if items.str_at("type") != "object" {
        let detail = format!("must be object if parent array's {LIST} is map");
        errors.push(field::Error::invalid(child(at, "items.type"), items.str_at("type"), detail));
    }
    let known = |key: &Value| {
        items.map_at("properties").is_some_and(|p| p.contains_key(key.as_str().unwrap_or_default()))
    };
    if !keys.is_empty() && !keys.iter().all(known) {
        let detail = "entries must all be names of item properties";
        errors.push(field::Error::invalid(child(at, KEYS), keys.to_vec(), detail));
    }
}

/// Inside `anyOf` and the like a schema may not introduce structure.
fn narrowing(at: &str, schema: &Value, typed: bool, errors: &mut Errors) {
    let detail = "must be empty to be structural";
    let text = |name: &str| !schema.str_at(name).is_empty();
    for name in ["description", "title"].iter().filter(|n| text(n)) {
        errors.push(field::Error::forbidden(child(at, name), detail));
    }
    if text("type") && !typed {
        errors.push(field::Error::forbidden(child(at, "type"), detail));
    }
    if schema.at("default").is_some() {
        errors.push(field::Error::forbidden(child(at, "default"), "must be undefined to be structural"));
    }
    if schema.at("additionalProperties").is_some() {
        let path = child(at, "additionalProperties");
        errors.push(field::Error::forbidden(path, "must be undefined to be structural"));
    }
    for (name, property) in schema.map_at("properties").into_iter().flatten() {
        narrowing(&key(&child(at, "properties"), name), property, typed, errors);
    }
    if let Some(items) = schema.at("items").filter(|i| i.is_object()) {
        narrowing(&child(at, "items"), items, typed, errors);
    }
    for list in ["allOf", "anyOf", "oneOf"] {
        for (i, part) in schema.list_at(list).iter().enumerate() {
            narrowing(&index(&child(at, list), i), part, typed, errors);
        }
    }
}
