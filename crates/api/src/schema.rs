//! The schema of every kind: types, fields, list semantics, defaults, and the kinds themselves.
//!
//! The built-in schema is parsed once from the compact tables in `tables/`, one file per group and
//! version; a custom resource brings a schema of the same form. Everything generic (decoding, pruning,
//! defaulting, patches, server-side apply, OpenAPI, discovery) is driven by what stands here, so a new
//! kind is a new table, not new code.
//!
//! A table is lines of text:
//!
//! ```text
//! group apps apps v1                                      short name, API group ("-" for core), version
//! kind Deployment deployments namespaced short=deploy sub=scale,status
//! type ServicePort                                        "atomic": owned and replaced as a whole
//!   3 port int32 !                                        protobuf number; "!": always present upstream
//!   6 ports []ContainerPort map=containerPort,protocol merge=containerPort
//!   1 replicas int32 = 1                                  static default, filled in when absent
//!   2 protocol string ~ "TCP"                             the same, also when empty or zero
//!   1.2 httpGet HTTPGetAction                             inside a structure that Go embeds as field 1
//! type Deployment = apps.v1.Deployment                    a copy, with the fields that follow added or changed
//!   - rollbackTo                                          and this one left out
//! ```
//!
//! A kind may be another version of a stored one (`hub=apps/v1`): lines after it say how the two differ, see
//! [`crate::versions`]. With `gone=1.16` it is a version that upstream has removed.

use std::collections::HashMap;
use std::sync::OnceLock;

use serde_json::Value;

use crate::versions::Version;

/// Index of a type in its [`Schema`].
pub type TypeId = u32;

/// A closed set of types and the kinds that use them.
#[derive(Debug, Default)]
pub struct Schema {
    types: Vec<Type>,
    kinds: Vec<Kind>,
    /// Versions that upstream has removed.
    old_kinds: Vec<Kind>,
    by_name: HashMap<String, TypeId>,
    /// Kinds by plural: whether it is an old one, and its index.
    by_plural: HashMap<String, Vec<(bool, usize)>>,
}

/// One structure: what Go calls a struct and OpenAPI a definition.
#[derive(Debug)]
pub struct Type {
    /// Unqualified name, as in Go and in error messages: `Container`.
    pub name: String,
    /// Qualified name: `core.v1.Container`.
    pub full: String,
    /// Server-side apply owns and replaces the value as a whole.
    pub atomic: bool,
    /// Sorted by name.
    pub fields: Vec<Field>,
    /// Indices of the fields that have protobuf numbers, sorted by them.
    pub wire: Vec<usize>,
}

/// One field of a type.
#[derive(Debug, Clone)]
pub struct Field {
    pub name: String,
    /// Protobuf field number; after those of the structures that Go embeds it in; none if it has none.
    pub tags: Vec<u32>,
    pub shape: Shape,
    pub required: bool,
    pub list: ListType,
    /// Strategic merge patch: lists merge instead of being replaced; by this key when they hold objects.
    pub merge: Option<Merge>,
    /// A merge key without the merge strategy: nothing merges by it, clients are told of it.
    pub sort_key: Option<String>,
    /// Strategic merge patch: keys not named in the patch's `$retainKeys` are cleared.
    pub retain_keys: bool,
    /// The map or object is owned as a whole.
    pub atomic: bool,
    pub default: Option<StaticDefault>,
}

/// A static default.
#[derive(Debug, Clone, PartialEq)]
pub struct StaticDefault {
    pub value: Value,
    /// Go's zero value counts as absent too: the field is no pointer upstream.
    pub replaces_zero: bool,
}

/// How a list or map value may look.
#[derive(Debug, Clone, PartialEq)]
pub enum Shape {
    Bool,
    Int32,
    Int64,
    Double,
    String,
    Bytes,
    Time,
    MicroTime,
    Quantity,
    IntOrString,
    /// Any JSON: raw extensions, field sets.
    Any,
    Object(TypeId),
    List(Box<Shape>),
    Map(Box<Shape>),
}

/// `x-kubernetes-list-type`: how server-side apply merges a list.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum ListType {
    #[default]
    Atomic,
    Set,
    Map(Vec<String>),
}

/// `x-kubernetes-patch-strategy: merge` with its key, if the list holds objects.
#[derive(Debug, Clone, PartialEq)]
pub struct Merge {
    pub key: Option<String>,
}

/// One resource: where it is served and under which names.
#[derive(Debug, Clone, PartialEq)]
pub struct Kind {
    pub group: String,
    pub version: String,
    pub kind: String,
    pub plural: String,
    pub singular: String,
    pub namespaced: bool,
    pub short: Vec<String>,
    pub categories: Vec<String>,
    pub subresources: Vec<String>,
    /// Nothing is stored: the request is answered and forgotten (reviews, `bindings`).
    pub create_only: bool,
    pub type_id: TypeId,
    /// Set if objects are stored in another version than this one.
    pub conversion: Option<Box<Version>>,
}

impl Kind {
    /// `apps/v1`, or `v1` for the core group.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.clone() } else { format!("{}/{}", self.group, self.version) }
    }

    /// `deployments.apps`, or `pods` for the core group: how messages name the resource.
    pub fn resource(&self) -> String {
        if self.group.is_empty() { self.plural.clone() } else { format!("{}.{}", self.plural, self.group) }
    }

    /// Has upstream removed this version?
    pub fn is_old(&self) -> bool {
        self.conversion.as_ref().is_some_and(|v| v.lifecycle.is_some())
    }

    /// Does the kind have this subresource?
    pub fn has_sub(&self, name: &str) -> bool {
        self.subresources.iter().any(|s| s == name)
    }
}

impl Type {
    fn sort(&mut self) {
        self.fields.sort_by(|a, b| a.name.cmp(&b.name));
        self.wire = (0..self.fields.len()).filter(|i| !self.fields[*i].tags.is_empty()).collect();
        self.wire.sort_by(|a, b| self.fields[*a].tags.cmp(&self.fields[*b].tags));
    }

    /// The field of this name.
    pub fn field(&self, name: &str) -> Option<&Field> {
        self.fields.binary_search_by(|f| f.name.as_str().cmp(name)).ok().map(|i| &self.fields[i])
    }
}

impl Field {
    /// The type of the objects in this field, be it one, a list or a map of them.
    pub fn object_type(&self) -> Option<TypeId> {
        self.shape.object_type()
    }
}

impl Shape {
    /// The type of the objects in this shape, at whatever depth.
    pub fn object_type(&self) -> Option<TypeId> {
        match self {
            Shape::Object(id) => Some(*id),
            Shape::List(inner) | Shape::Map(inner) => inner.object_type(),
            _ => None,
        }
    }
}

/// A line of a table that cannot be understood.
#[derive(Debug, thiserror::Error)]
#[error("table line {line}: {problem}: {text:?}")]
pub struct TableError {
    pub line: usize,
    pub problem: &'static str,
    pub text: String,
}

impl Schema {
    /// The schema of the built-in kinds, parsed at first use (about a millisecond).
    pub fn builtin() -> &'static Schema {
        static BUILTIN: OnceLock<Schema> = OnceLock::new();
        BUILTIN.get_or_init(|| {
            Schema::parse(&TABLES.concat()).expect("the built-in tables parse: a unit test keeps them so")
        })
    }

    /// Reads tables; references may point forward.
    pub fn parse(text: &str) -> Result<Schema, TableError> {
        let mut schema = Schema::default();
        schema.declare_types(text);
        let mut scope = Scope::default();
        for (index, line) in text.lines().enumerate() {
            schema.read_line(line, &mut scope).map_err(|problem| TableError {
                line: index + 1,
                problem,
                text: line.to_owned(),
            })?;
        }
        schema.types.iter_mut().for_each(Type::sort);
        for (old, kinds) in [(false, &schema.kinds), (true, &schema.old_kinds)] {
            for (index, kind) in kinds.iter().enumerate() {
                schema.by_plural.entry(kind.plural.clone()).or_default().push((old, index));
            }
        }
        Ok(schema)
    }

    pub fn type_of(&self, id: TypeId) -> &Type {
        &self.types[id as usize]
    }

    pub fn types(&self) -> &[Type] {
        &self.types
    }

    /// The type with this qualified name (`core.v1.Pod`).
    pub fn type_named(&self, full: &str) -> Option<TypeId> {
        self.by_name.get(full).copied()
    }

    pub fn kinds(&self) -> &[Kind] {
        &self.kinds
    }

    /// Kinds in versions that upstream has removed, in the order of discovery.
    pub fn old_kinds(&self) -> &[Kind] {
        &self.old_kinds
    }

    /// The kind at group, version and plural, removed upstream or not.
    pub fn any_resource(&self, group: &str, version: &str, plural: &str) -> Option<&Kind> {
        self.by_plural.get(plural)?.iter().find_map(|(old, index)| {
            let kind = if *old { &self.old_kinds[*index] } else { &self.kinds[*index] };
            (kind.group == group && kind.version == version).then_some(kind)
        })
    }

    /// The kind of this group, version and kind name, removed upstream or not.
    pub fn any_kind(&self, group: &str, version: &str, kind: &str) -> Option<&Kind> {
        self.kind(group, version, kind).or_else(|| {
            self.old_kinds.iter().find(|k| k.group == group && k.version == version && k.kind == kind)
        })
    }

    /// The version of the kind that objects are stored in: itself for most.
    pub fn hub<'s>(&'s self, kind: &'s Kind) -> &'s Kind {
        let Some(version) = &kind.conversion else { return kind };
        self.resource(&version.hub_group, &version.hub_version, &kind.plural).unwrap_or(kind)
    }

    /// The kind served at group, version and plural.
    pub fn resource(&self, group: &str, version: &str, plural: &str) -> Option<&Kind> {
        self.any_resource(group, version, plural).filter(|kind| !kind.is_old())
    }

    /// The kind of this group, version and kind name.
    pub fn kind(&self, group: &str, version: &str, kind: &str) -> Option<&Kind> {
        self.kinds.iter().find(|k| k.group == group && k.version == version && k.kind == kind)
    }

    fn declare_types(&mut self, text: &str) {
        let mut scope = String::new();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("group") if !line.starts_with(' ') => {
                    let short = words.next().unwrap_or_default();
                    let version = words.nth(1).unwrap_or_default();
                    scope = format!("{short}.{version}");
                }
                Some("type") if !line.starts_with(' ') => {
                    let name = words.next().unwrap_or_default().to_owned();
                    let full = format!("{scope}.{name}");
                    self.by_name.insert(full.clone(), self.types.len() as TypeId);
                    let atomic = words.any(|w| w == "atomic");
                    self.types.push(Type { name, full, atomic, fields: Vec::new(), wire: Vec::new() });
                }
                _ => {}
            }
        }
    }

    fn read_line(&mut self, line: &str, scope: &mut Scope) -> Result<(), &'static str> {
        let trimmed = line.trim();
        if trimmed.is_empty() || trimmed.starts_with('#') {
            return Ok(());
        }
        if line.starts_with("  ") {
            let current = scope.current.ok_or("a field outside a type")?;
            if let Some(name) = trimmed.strip_prefix("- ") {
                self.types[current as usize].fields.retain(|f| f.name != name);
                return Ok(());
            }
            let field = self.read_field(trimmed, scope)?;
            let fields = &mut self.types[current as usize].fields;
            fields.retain(|f| f.name != field.name);
            fields.push(field);
            return Ok(());
        }
        let words: Vec<&str> = trimmed.split_whitespace().collect();
        match words[..] {
            ["group", short, group, version] => {
                let group = if group == "-" { "" } else { group };
                *scope = Scope::new(short, group, version);
                Ok(())
            }
            ["type", name, ref rest @ ..] => {
                scope.current = self.type_named(&format!("{}.{name}", scope.name));
                let current = scope.current.ok_or("a type outside a group")?;
                if let ["=", original] = rest {
                    self.copy_type(original, current)?;
                }
                Ok(())
            }
            ["kind", kind, plural, reach, ref options @ ..] => {
                let kind = self.read_kind(kind, plural, reach, options, scope)?;
                if kind.is_old() {
                    self.old_kinds.push(kind)
                } else {
                    self.kinds.push(kind)
                }
                Ok(())
            }
            ["move" | "move-number" | "move-text" | "default" | "derive", kind, ref rest @ ..] => {
                let of_scope =
                    |k: &&mut Kind| k.kind == kind && k.group == scope.group && k.version == scope.version;
                let found = self.kinds.iter_mut().chain(&mut self.old_kinds).find(of_scope);
                let version =
                    found.and_then(|k| k.conversion.as_mut()).ok_or("a kind that is no other's version")?;
                version.read_line(words[0], rest)
            }
            _ => Err("unknown line"),
        }
    }

    /// Types are copied as they stand, so the original comes first.
    fn copy_type(&mut self, original: &str, to: TypeId) -> Result<(), &'static str> {
        let from = self.type_named(original).ok_or("unknown type")?;
        let (fields, atomic) = {
            let original = &self.types[from as usize];
            (original.fields.clone(), original.atomic)
        };
        let copy = &mut self.types[to as usize];
        copy.fields = fields;
        copy.atomic = atomic;
        Ok(())
    }

    fn read_kind(
        &self,
        kind: &str,
        plural: &str,
        reach: &str,
        options: &[&str],
        scope: &Scope,
    ) -> Result<Kind, &'static str> {
        let list = |name: &str| -> Vec<String> {
            let found = options.iter().find_map(|o| o.strip_prefix(name)?.strip_prefix('='));
            found.map(|v| v.split(',').map(str::to_owned).collect()).unwrap_or_default()
        };
        Ok(Kind {
            group: scope.group.clone(),
            version: scope.version.clone(),
            kind: kind.to_owned(),
            plural: plural.to_owned(),
            singular: kind.to_lowercase(),
            namespaced: match reach {
                "namespaced" => true,
                "cluster" => false,
                _ => return Err("a kind is `namespaced` or `cluster`"),
            },
            short: list("short"),
            categories: list("categories"),
            subresources: list("sub"),
            create_only: options.contains(&"verbs=create"),
            type_id: self.type_named(&format!("{}.{kind}", scope.name)).ok_or("a kind without its type")?,
            conversion: Version::read(options)?.map(Box::new),
        })
    }

    fn read_field(&self, line: &str, scope: &Scope) -> Result<Field, &'static str> {
        let found = line
            .split_once(" = ")
            .map(|(facts, json)| (facts, json, false))
            .or_else(|| line.split_once(" ~ ").map(|(facts, json)| (facts, json, true)));
        let (facts, default) = match found {
            Some((facts, json, replaces_zero)) => {
                let value = serde_json::from_str(json).map_err(|_| "a default is JSON")?;
                (facts, Some(StaticDefault { value, replaces_zero }))
            }
            None => (line, None),
        };
        let (first, after) = facts.split_once(' ').ok_or("a field needs a shape")?;
        let tags: Result<Vec<u32>, _> = first.split('.').map(str::parse).collect();
        let (tags, (name, rest)) = match tags {
            Ok(tags) => (tags, after.split_once(' ').ok_or("a field needs a shape")?),
            Err(_) => (Vec::new(), (first, after)),
        };
        let (shape, options) = self.read_shape(rest, scope)?;
        let mut field = Field {
            name: name.to_owned(),
            tags,
            shape,
            required: false,
            list: ListType::Atomic,
            merge: None,
            sort_key: None,
            retain_keys: false,
            atomic: false,
            default,
        };
        for option in options.split_whitespace() {
            match option.split_once('=').unwrap_or((option, "")) {
                ("!", _) => field.required = true,
                ("set", _) => field.list = ListType::Set,
                ("map", keys) => field.list = ListType::Map(keys.split(',').map(str::to_owned).collect()),
                ("atomic", _) => field.atomic = true,
                ("merge", "") => field.merge = Some(Merge { key: None }),
                ("merge", key) => field.merge = Some(Merge { key: Some(key.to_owned()) }),
                ("merge-key", key) => field.sort_key = Some(key.to_owned()),
                ("retain-keys", _) => field.retain_keys = true,
                _ => return Err("unknown option of a field"),
            }
        }
        Ok(field)
    }

    /// Reads a shape from the front of `text`; returns it with what follows.
    fn read_shape<'t>(&self, text: &'t str, scope: &Scope) -> Result<(Shape, &'t str), &'static str> {
        if let Some(inner) = text.strip_prefix("[]") {
            let (shape, rest) = self.read_shape(inner, scope)?;
            return Ok((Shape::List(Box::new(shape)), rest));
        }
        if let Some(inner) = text.strip_prefix("map ") {
            let (shape, rest) = self.read_shape(inner, scope)?;
            return Ok((Shape::Map(Box::new(shape)), rest));
        }
        let (word, rest) = text.split_once(' ').unwrap_or((text, ""));
        let shape = match word {
            "bool" => Shape::Bool,
            "int32" => Shape::Int32,
            "int64" => Shape::Int64,
            "double" => Shape::Double,
            "string" => Shape::String,
            "bytes" => Shape::Bytes,
            "time" => Shape::Time,
            "micro-time" => Shape::MicroTime,
            "quantity" => Shape::Quantity,
            "int-or-string" => Shape::IntOrString,
            "any" => Shape::Any,
            name => {
                let full =
                    if name.contains('.') { name.to_owned() } else { format!("{}.{name}", scope.name) };
                Shape::Object(self.type_named(&full).ok_or("unknown type")?)
            }
        };
        Ok((shape, rest))
    }
}

/// Where the reader stands: the group being read and the type its fields belong to.
#[derive(Default)]
struct Scope {
    name: String,
    group: String,
    version: String,
    current: Option<TypeId>,
}

impl Scope {
    fn new(short: &str, group: &str, version: &str) -> Self {
        Scope {
            name: format!("{short}.{version}"),
            group: group.to_owned(),
            version: version.to_owned(),
            current: None,
        }
    }
}

const TABLES: &[&str] = &[
    include_str!("../tables/meta_v1.txt"),
    include_str!("../tables/core_v1.txt"),
    include_str!("../tables/admissionregistration_v1.txt"),
    include_str!("../tables/apiextensions_v1.txt"),
    include_str!("../tables/apiregistration_v1.txt"),
    include_str!("../tables/apps_v1.txt"),
    include_str!("../tables/authentication_v1.txt"),
    include_str!("../tables/authorization_v1.txt"),
    include_str!("../tables/autoscaling_v1.txt"),
    include_str!("../tables/autoscaling_v2.txt"),
    include_str!("../tables/batch_v1.txt"),
    include_str!("../tables/certificates_v1.txt"),
    include_str!("../tables/coordination_v1.txt"),
    include_str!("../tables/discovery_v1.txt"),
    include_str!("../tables/events_v1.txt"),
    include_str!("../tables/flowcontrol_v1.txt"),
    include_str!("../tables/networking_v1.txt"),
    include_str!("../tables/node_v1.txt"),
    include_str!("../tables/policy_v1.txt"),
    include_str!("../tables/rbac_v1.txt"),
    include_str!("../tables/resource_v1.txt"),
    include_str!("../tables/scheduling_v1.txt"),
    include_str!("../tables/storage_v1.txt"),
    // Last: it copies types of the others.
    include_str!("../tables/old_versions.txt"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_builtin_tables_parse_and_know_pods() {
        let schema = Schema::builtin();
        let pod = schema.resource("", "v1", "pods").expect("pods are served");
        assert!(pod.namespaced && pod.has_sub("exec"));
        let spec = schema.type_of(pod.type_id).field("spec").and_then(Field::object_type).expect("a spec");
        let containers = schema.type_of(spec).field("containers").expect("containers");
        assert_eq!(containers.list, ListType::Map(vec!["name".into()]));
        assert_eq!(containers.merge, Some(Merge { key: Some("name".into()) }));
    }

    #[test]
    fn a_bad_line_is_named() {
        let error = Schema::parse("group x - v1\ntype A\n  b Missing\n").expect_err("unknown type");
        assert_eq!((error.line, error.problem), (3, "unknown type"));
    }
}
