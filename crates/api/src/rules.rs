//! What a schema cannot say of a kind: its strategy.
//!
//! Every kind has [`Rules`]; most are the default ones. A rule is a plain function on values, so a
//! strategy reads as a short list of what is special. The registry runs them at fixed points:
//!
//! - `create`: before defaulting and validation of a new object (reset what clients may not set);
//! - `complete`: after admission, before validation (what follows from all the rest);
//! - `update`: as `create`, for a replacement, with the stored object at hand;
//! - `update_status`: the same on the `status` subresource;
//! - `validate` / `validate_update`: collect every broken rule; `validate_status` those of a status;
//! - `faces`: the same for subresources that let a part of the object be written;
//! - `warnings`: what the client should know though it is no error.

use serde_json::Value;

use crate::apply::Reach;
use crate::field;
use crate::object::Object;
use crate::schema::Kind;

pub type Errors = Vec<field::Error>;

/// A kind's strategy.
#[derive(Clone, Copy)]
pub struct Rules {
    /// Which names are good.
    pub name: fn(&str) -> Vec<String>,
    pub create: fn(&mut Value),
    /// What follows from all the rest of a new object, after defaulting and admission.
    pub complete: fn(&mut Value),
    pub update: fn(&mut Value, &Value),
    pub update_status: fn(&mut Value, &Value),
    pub validate: fn(&Value, &mut Errors),
    pub validate_update: fn(&Value, &Value, &mut Errors),
    /// Broken rules of a status about to be written.
    pub validate_status: fn(&Value, &Value, &mut Errors),
    pub warnings: fn(&Value) -> Vec<String>,
    /// Subresources that show the whole object and let a part of it be written.
    pub faces: &'static [Face],
    /// Field selectors beside `metadata.name` and `metadata.namespace`.
    pub selectable: &'static [&'static str],
    /// What [`Rules::selectable_value`] reads beside the selectable paths themselves.
    pub selectable_reads: &'static [&'static str],
    /// A selectable field whose value is not simply what stands at its path.
    pub selectable_value: Option<fn(&Value, &str) -> Option<String>>,
    /// PUT creates what does not exist.
    pub create_on_update: bool,
    /// An update must name the resourceVersion it was made from.
    pub needs_revision: bool,
    /// A new generation is counted when anything outside metadata and status changes.
    pub generation: bool,
    /// Seconds until the store deletes the object by itself.
    pub time_to_live_seconds: Option<u64>,
    /// What `propagationPolicy` defaults to.
    pub orphans_by_default: bool,
    /// DELETE answers with the object instead of a `Status`.
    pub returns_deleted: bool,
    /// Finalizers without a domain are no error: kinds upstream validates by its general rules alone.
    pub lenient_finalizers: bool,
    /// The group that errors name, where upstream's differs from the kind's.
    pub reported_group: Option<&'static str>,
}

/// A subresource through which a part of an object is written, by those who may not write the rest.
#[derive(Clone, Copy)]
pub struct Face {
    pub name: &'static str,
    /// Takes back what may not change here.
    pub update: fn(&mut Value, &Value),
    pub validate: fn(&Value, &Value, &mut Errors),
    /// The fields a writer comes to own.
    pub reach: Reach<'static>,
}

fn nothing(_: &mut Value) {}
fn nothing_of(_: &mut Value, _: &Value) {}

impl Rules {
    pub const DEFAULT: Rules = Rules {
        name: crate::names::dns_subdomain,
        create: nothing,
        complete: nothing,
        update: nothing_of,
        update_status: nothing_of,
        validate: |_, _| {},
        validate_update: |_, _, _| {},
        validate_status: |_, _, _| {},
        warnings: |_| Vec::new(),
        faces: &[],
        selectable: &[],
        selectable_reads: &[],
        selectable_value: None,
        create_on_update: false,
        needs_revision: false,
        generation: true,
        time_to_live_seconds: None,
        orphans_by_default: false,
        returns_deleted: false,
        lenient_finalizers: false,
        reported_group: None,
    };

    /// The rules of a kind.
    pub fn of(kind: &Kind) -> &'static Rules {
        let found = crate::kinds::RULES.iter().find(|(g, p, _)| *g == kind.group && *p == kind.plural);
        found.map_or(&Rules::DEFAULT, |(_, _, rules)| rules)
    }

    /// The face served as this subresource.
    pub fn face(&self, subresource: &str) -> Option<&'static Face> {
        self.faces.iter().find(|face| face.name == subresource)
    }

    /// May the field be selected on?
    pub fn is_selectable(&self, field: &str) -> bool {
        matches!(field, "metadata.name" | "metadata.namespace") || self.selectable.contains(&field)
    }

    /// The value a field selector compares with: absent fields are empty, numbers and booleans as text.
    pub fn field_value(&self, object: &Value, field: &str) -> String {
        if let Some(special) = self.selectable_value.and_then(|read| read(object, field)) {
            return special;
        }
        match object.at(field) {
            Some(Value::String(s)) => s.clone(),
            Some(Value::Null) | None => String::new(),
            Some(other) => other.to_string(),
        }
    }
}

/// Metadata rules that hold for every kind. `namespaced` and `name` come from the kind.
pub fn validate_metadata(kind: &Kind, rules: &Rules, object: &Value, errors: &mut Errors) {
    let (name, generate) = (object.name(), object.str_at("metadata.generateName"));
    if !generate.is_empty() {
        // The suffix makes any base a valid name, so judge it as one would with it.
        let padded =
            format!("{}a", generate.strip_suffix('-').map_or(generate.to_owned(), |b| format!("{b}-")));
        for problem in (rules.name)(&padded) {
            errors.push(field::Error::invalid("metadata.generateName", generate, problem));
        }
    }
    if name.is_empty() {
        errors.push(field::Error::required("metadata.name", "name or generateName is required"));
    } else {
        for problem in (rules.name)(name) {
            errors.push(field::Error::invalid("metadata.name", name, problem));
        }
    }
    if kind.namespaced {
        let namespace = object.namespace();
        if namespace.is_empty() {
            errors.push(field::Error::required("metadata.namespace", ""));
        } else {
            for problem in crate::names::dns_label(namespace) {
                errors.push(field::Error::invalid("metadata.namespace", namespace, problem));
            }
        }
    } else if !object.namespace().is_empty() {
        errors.push(field::Error::forbidden("metadata.namespace", "not allowed on this type"));
    }
    labels("metadata.labels", object.at("metadata.labels"), errors);
    annotations("metadata.annotations", object.at("metadata.annotations"), errors);
    owner_references(object, errors);
    for (index, finalizer) in object.list_at("metadata.finalizers").iter().enumerate() {
        let name = finalizer.as_str().unwrap_or_default();
        let known = ["foregroundDeletion", "orphan", "kubernetes"].contains(&name);
        named("metadata.finalizers", name, crate::names::qualified_name, errors);
        if !known && !name.contains('/') && !rules.lenient_finalizers {
            let path = field::index("metadata.finalizers", index);
            let detail = "name is neither a standard finalizer name nor is it fully qualified";
            errors.push(field::Error::invalid(path, name, detail));
        }
    }
    let has = |name: &str| object.list_at("metadata.finalizers").iter().any(|f| f == name);
    if has("orphan") && has("foregroundDeletion") {
        let value = object.list_at("metadata.finalizers").to_vec();
        let detail = "finalizer orphan and foregroundDeletion cannot be both set";
        errors.push(field::Error::invalid("metadata.finalizers", value, detail));
    }
}

/// Metadata that never changes.
pub fn validate_metadata_update(new: &Value, old: &Value, errors: &mut Errors) {
    for name in ["name", "namespace", "uid", "creationTimestamp"] {
        let path = format!("metadata.{name}");
        if new.at(&path) != old.at(&path) {
            let value = new.at(&path).cloned().unwrap_or(Value::Null);
            errors.push(field::Error::invalid(path, value, IMMUTABLE));
        }
    }
    if let Some(time) = old.at("metadata.deletionTimestamp") {
        if new.at("metadata.deletionTimestamp") != Some(time) {
            let value = new.at("metadata.deletionTimestamp").cloned().unwrap_or(Value::Null);
            errors.push(field::Error::invalid("metadata.deletionTimestamp", value, IMMUTABLE));
        }
        let had: Vec<&Value> = old.list_at("metadata.finalizers").iter().collect();
        let added: Vec<&str> = new
            .list_at("metadata.finalizers")
            .iter()
            .filter(|f| !had.contains(f))
            .filter_map(Value::as_str)
            .collect();
        if !added.is_empty() {
            let list = added.iter().map(|a| format!("{a:?}")).collect::<Vec<_>>().join(", ");
            errors.push(field::Error::forbidden(
                "metadata.finalizers",
                format!("no new finalizers can be added if the object is being deleted, found new finalizers []string{{{list}}}"),
            ));
        }
    }
}

pub const IMMUTABLE: &str = "field is immutable";

/// The field may not change once set.
pub fn immutable(path: &str, new: &Value, old: &Value, errors: &mut Errors) {
    if new.at(path) != old.at(path) {
        let value = new.at(path).cloned().unwrap_or(Value::Null);
        errors.push(field::Error::invalid(path, value, IMMUTABLE));
    }
}

/// Label keys and values.
pub fn labels(path: &str, labels: Option<&Value>, errors: &mut Errors) {
    for (key, value) in labels.and_then(Value::as_object).into_iter().flatten() {
        for problem in crate::names::qualified_name(key) {
            errors.push(field::Error::invalid(path, key.as_str(), problem));
        }
        let value = value.as_str().unwrap_or_default();
        for problem in crate::names::label_value(value) {
            errors.push(field::Error::invalid(path, value, problem));
        }
    }
}

/// All annotations of an object together may not be larger.
pub const ANNOTATIONS_BYTES_MAX: usize = 256 << 10;

pub fn annotations(path: &str, annotations: Option<&Value>, errors: &mut Errors) {
    let mut total = 0;
    for (key, value) in annotations.and_then(Value::as_object).into_iter().flatten() {
        for problem in crate::names::qualified_name(&key.to_lowercase()) {
            errors.push(field::Error::invalid(path, key.as_str(), problem));
        }
        total += key.len() + value.as_str().map_or(0, str::len);
    }
    if total > ANNOTATIONS_BYTES_MAX {
        errors.push(field::Error::too_long(path, ANNOTATIONS_BYTES_MAX));
    }
}

fn owner_references(object: &Value, errors: &mut Errors) {
    let path = "metadata.ownerReferences";
    let owners = object.list_at(path);
    for (index, owner) in owners.iter().enumerate() {
        let at = field::index(path, index);
        for (name, detail) in [
            ("apiVersion", "version must not be empty"),
            ("kind", "must not be empty"),
            ("name", "must not be empty"),
            ("uid", "must not be empty"),
        ] {
            if owner.str_at(name).is_empty() {
                errors.push(field::Error::invalid(field::child(&at, name), "", detail));
            }
        }
        if owner.str_at("apiVersion") == "v1" && owner.str_at("kind") == "Event" {
            errors.push(field::Error::invalid(
                at,
                owner.clone(),
                "/v1, Kind=Event is disallowed from being an owner",
            ));
        }
    }
    let controllers: Vec<&Value> = owners.iter().filter(|o| o.bool_at("controller")).collect();
    if let [first, second, ..] = controllers[..] {
        let detail = format!(
            "Only one reference can have Controller set to true. Found \"true\" in references for {}/{} and {}/{}",
            first.str_at("kind"),
            first.str_at("name"),
            second.str_at("kind"),
            second.str_at("name")
        );
        errors.push(field::Error::invalid(path, owners.to_vec(), detail));
    }
}

/// `metav1.LabelSelector` in an object.
pub fn label_selector(path: &str, selector: Option<&Value>, errors: &mut Errors) {
    let Some(selector) = selector else { return };
    labels(&field::child(path, "matchLabels"), selector.at("matchLabels"), errors);
    for (index, item) in selector.list_at("matchExpressions").iter().enumerate() {
        let at = field::index(&field::child(path, "matchExpressions"), index);
        let values = item.list_at("values");
        match item.str_at("operator") {
            "In" | "NotIn" if values.is_empty() => errors.push(field::Error::required(
                field::child(&at, "values"),
                "must be specified when `operator` is 'In' or 'NotIn'",
            )),
            "Exists" | "DoesNotExist" if !values.is_empty() => errors.push(field::Error::forbidden(
                field::child(&at, "values"),
                "may not be specified when `operator` is 'Exists' or 'DoesNotExist'",
            )),
            "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
            other => errors.push(field::Error::invalid(
                field::child(&at, "operator"),
                other,
                "not a valid selector operator",
            )),
        }
        for problem in crate::names::qualified_name(item.str_at("key")) {
            errors.push(field::Error::invalid(field::child(&at, "key"), item.str_at("key"), problem));
        }
        for (i, value) in values.iter().enumerate() {
            let value = value.as_str().unwrap_or_default();
            for problem in crate::names::label_value(value) {
                errors.push(field::Error::invalid(
                    field::index(&field::child(&at, "values"), i),
                    value,
                    problem,
                ));
            }
        }
    }
}

/// Every problem a name rule finds, as errors.
pub fn named(path: &str, value: &str, rule: fn(&str) -> Vec<String>, errors: &mut Errors) {
    errors.extend(rule(value).into_iter().map(|problem| field::Error::invalid(path, value, problem)));
}

/// The field must not be empty; true if it is not.
pub fn required(path: &str, object: &Value, name: &str, detail: &str, errors: &mut Errors) -> bool {
    let present = match object.at(name) {
        None => false,
        Some(Value::String(text)) => !text.is_empty(),
        Some(Value::Array(items)) => !items.is_empty(),
        Some(_) => true,
    };
    if !present {
        errors.push(field::Error::required(field::child(path, name), detail));
    }
    present
}

/// A port as number or name.
pub fn port_or_name(path: &str, value: &Value, errors: &mut Errors) {
    match value {
        Value::String(name) => named(path, name, crate::names::port_name, errors),
        other => {
            let number = other.as_i64().unwrap_or(0);
            let problems = crate::names::port_number(number).into_iter();
            errors.extend(problems.map(|p| field::Error::invalid(path, number, p)));
        }
    }
}

/// The field may not change once set; refused as forbidden, in upstream's words for it.
pub fn frozen(path: &str, new: &Value, old: &Value, detail: &str, errors: &mut Errors) {
    if new.at(path) != old.at(path) {
        errors.push(field::Error::forbidden(path, detail));
    }
}

/// The value must be one of these; empty is for `required` to judge.
pub fn one_of(path: &str, object: &Value, name: &str, supported: &[&str], errors: &mut Errors) {
    let value = object.str_at(name);
    if !value.is_empty() && !supported.contains(&value) {
        errors.push(field::Error::not_supported(field::child(path, name), value, supported));
    }
}

/// The number must not be negative.
pub fn non_negative(path: &str, object: &Value, name: &str, errors: &mut Errors) {
    if let Some(number) = object.int_at(name).filter(|n| *n < 0) {
        errors.push(field::Error::invalid(
            field::child(path, name),
            number,
            "must be greater than or equal to 0",
        ));
    }
}
