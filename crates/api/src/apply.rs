//! Server-side apply and field ownership: who set which field, and what happens when two disagree.
//!
//! The rules are those of `sigs.k8s.io/structured-merge-diff` (KEP-555): every write is compared with
//! the live object and the changed fields become the writer's; an apply also gives up the fields it no
//! longer mentions, and conflicts with other owners of fields it changes unless forced.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use crate::fieldset::{FieldSet, Node, Step};
use crate::object::Object;
use crate::schema::{Field, ListType, Schema, Shape, TypeId};
use crate::status::{Result, Status};
use crate::versions;

/// How many distinct `Update` managers an object keeps; the oldest beyond become `ancient-changes`.
pub const UPDATE_MANAGERS_MAX: usize = 10;

/// Who writes, and how.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Manager {
    /// True for server-side apply.
    pub applies: bool,
    pub name: String,
    pub api_version: String,
    pub subresource: String,
}

/// One write, for the record.
#[derive(Clone, Copy)]
pub struct Write<'a> {
    pub manager: &'a Manager,
    pub reach: Reach<'a>,
    pub now: &'a str,
}

/// What can be owned through the endpoint that is written to, as dotted paths.
#[derive(Debug, Clone, Copy)]
pub enum Reach<'a> {
    /// All but these: `status` on the main resource, and so on.
    AllBut(&'a [&'a str]),
    /// These alone; `*` stands for any item of a list or map.
    Only(&'a [&'a str]),
}

/// The object before the write.
#[derive(Clone, Copy)]
pub struct Live<'a> {
    pub object: &'a Value,
    /// Its `managedFields` as JSON; those in the object are not looked at.
    pub owners: &'a str,
}

/// The owners of an object's fields: `metadata.managedFields` in memory.
#[derive(Debug, Clone, Default)]
pub struct Managers {
    entries: BTreeMap<Manager, Owned>,
}

#[derive(Debug, Clone, Default, PartialEq)]
struct Owned {
    set: FieldSet,
    time: String,
}

/// Fields nobody owns: identity and bookkeeping.
const STRIPPED: &[&[&str]] = &[
    &["apiVersion"],
    &["kind"],
    &["metadata", "name"],
    &["metadata", "namespace"],
    &["metadata", "creationTimestamp"],
    &["metadata", "deletionTimestamp"],
    &["metadata", "selfLink"],
    &["metadata", "uid"],
    &["metadata", "generation"],
    &["metadata", "managedFields"],
    &["metadata", "resourceVersion"],
];

impl Managers {
    /// Reads `metadata.managedFields` of the object from their JSON; empty for none.
    pub fn parse(owners: &str, object: &Value) -> Managers {
        let owners: Value = serde_json::from_str(owners).unwrap_or_default();
        let mut entries = BTreeMap::new();
        for item in owners.as_array().into_iter().flatten() {
            let manager = Manager {
                applies: item.str_at("operation") == "Apply",
                name: item.str_at("manager").to_owned(),
                api_version: item.str_at("apiVersion").to_owned(),
                subresource: item.str_at("subresource").to_owned(),
            };
            let mut set = item.get("fieldsV1").map(FieldSet::from_value).unwrap_or_default();
            versions::set_to_hub(Schema::builtin(), &manager.api_version, object, &mut set);
            entries.insert(manager, Owned { set, time: item.str_at("time").to_owned() });
        }
        Managers { entries }
    }

    /// `metadata.managedFields` as JSON, ordered as upstream: by operation, time, name. Empty without owners.
    fn print(&self, object: &Value) -> String {
        let mut list: Vec<(&Manager, &Owned)> =
            self.entries.iter().filter(|(_, o)| !o.set.is_empty()).collect();
        list.sort_by_key(|(m, o)| (!m.applies, &o.time, &m.name, &m.api_version, &m.subresource));
        let mut out = String::new();
        for (manager, owned) in list {
            out.push(if out.is_empty() { '[' } else { ',' });
            let operation = if manager.applies { "Apply" } else { "Update" };
            let (name, version, time) = (json!(manager.name), json!(manager.api_version), json!(owned.time));
            write!(
                out,
                r#"{{"apiVersion":{version},"fieldsType":"FieldsV1","manager":{name},"operation":"{operation}""#
            )
            .expect("strings take everything");
            if !manager.subresource.is_empty() {
                write!(out, r#","subresource":{}"#, json!(manager.subresource))
                    .expect("strings take everything");
            }
            write!(out, r#","time":{time},"fieldsV1":"#).expect("strings take everything");
            let set = versions::set_from_hub(Schema::builtin(), &manager.api_version, object, &owned.set);
            set.write(&mut out);
            out.push('}');
        }
        if !out.is_empty() {
            out.push(']');
        }
        out
    }

    /// Everything owned by anybody but `except`.
    fn others(&self, except: &Manager) -> FieldSet {
        let mut union = FieldSet::default();
        for (_, owned) in self.entries.iter().filter(|(m, _)| *m != except) {
            union.union(owned.set.clone());
        }
        union
    }

    fn cap_updates(&mut self) {
        let updates: Vec<(Manager, String)> = self
            .entries
            .iter()
            .filter(|(m, _)| !m.applies && m.subresource.is_empty())
            .map(|(m, o)| (m.clone(), o.time.clone()))
            .collect();
        let Some(excess) = updates.len().checked_sub(UPDATE_MANAGERS_MAX + 1).map(|e| e + 1) else { return };
        let mut oldest = updates;
        oldest.sort_by(|a, b| a.1.cmp(&b.1));
        for (manager, time) in oldest.into_iter().take(excess + 1) {
            let Some(owned) = self.entries.remove(&manager) else { continue };
            let bucket = Manager { name: "ancient-changes".into(), ..manager };
            let slot = self.entries.entry(bucket).or_default();
            slot.set.union(owned.set);
            slot.time = slot.time.clone().max(time);
        }
    }
}

/// The owners after a create, update or classic patch: the changed fields become the manager's. The result is
/// the new `metadata.managedFields` as JSON, empty if nobody owns anything.
pub fn record_update(
    schema: &Schema,
    type_id: TypeId,
    live: Option<Live>,
    new: &Value,
    write: Write,
) -> String {
    let Write { manager, reach, now } = write;
    let mut managers = match live {
        // A client may clear the record by sending one empty entry; otherwise it is the server's.
        Some(live) if !is_cleared(new) => Managers::parse(live.owners, live.object),
        _ => Managers::default(),
    };
    let walker = Walker { schema };
    let zero;
    let before = match live {
        Some(live) => live.object,
        None => {
            zero = walker.zero(type_id);
            &zero
        }
    };
    let Changes { touched, removed } = walker.compare_objects(type_id, before, new, reach);
    release_from_others(&mut managers, manager, &touched, &removed);
    match managers.entries.get_mut(manager) {
        None if touched.is_empty() => {}
        None => drop(managers.entries.insert(manager.clone(), Owned { set: touched, time: now.to_owned() })),
        Some(owned) => {
            let mut set = owned.set.clone();
            set.subtract(&removed);
            set.union(touched);
            if set != owned.set {
                *owned = Owned { set, time: now.to_owned() };
            }
        }
    }
    managers.cap_updates();
    managers.print(new)
}

fn is_cleared(new: &Value) -> bool {
    matches!(new.list_at("metadata.managedFields"), [one] if one.as_object().is_some_and(Map::is_empty))
}

fn release_from_others(managers: &mut Managers, except: &Manager, touched: &FieldSet, removed: &FieldSet) {
    for (manager, owned) in &mut managers.entries {
        if manager != except {
            owned.set.subtract(touched);
            owned.set.subtract(removed);
        }
    }
}

/// Merges an applied configuration into the live object (or into nothing).
///
/// Returns the object to store, its `managedFields` still those of `live`: pass it through defaulting
/// and then through [`record_apply`]. Conflicts are refused unless `force`.
pub fn merge(
    schema: &Schema,
    type_id: TypeId,
    Live { object: live, owners }: Live,
    config: &Value,
    write: Write,
    force: bool,
) -> Result<Applied> {
    let Write { manager, reach, .. } = write;
    let walker = Walker { schema };
    let mut managers = Managers::parse(owners, live);
    let mut set = walker.field_set(type_id, config);
    strip(&mut set, reach);
    let last = managers.entries.get(manager).map(|o| o.set.clone()).unwrap_or_default();
    let mut merged = walker.merge(&Shape::Object(type_id), None, live, config);
    if !last.is_empty() {
        let mut kept = managers.others(manager);
        kept.union(set.clone());
        walker.remove_lost(type_id, &mut merged, &last, &kept);
    }
    let touched = walker.compare_objects(type_id, live, &merged, reach).touched;
    let conflicts: Vec<(Manager, FieldSet)> = managers
        .entries
        .iter()
        .filter(|(m, _)| *m != manager)
        .map(|(m, o)| (m.clone(), o.set.intersection(&touched).intersection(&set)))
        .filter(|(_, c)| !c.is_empty())
        .collect();
    if !conflicts.is_empty() && !force {
        return Err(conflict(managers, &conflicts));
    }
    for (other, lost) in &conflicts {
        if let Some(owned) = managers.entries.get_mut(other) {
            owned.set.subtract(lost);
        }
    }
    Ok(Applied { object: merged, managers, set })
}

/// The outcome of a merge, before the record is written.
#[derive(Debug)]
pub struct Applied {
    pub object: Value,
    managers: Managers,
    set: FieldSet,
}

/// The owners after an apply, for the object about to be stored, as [`record_update`] gives them.
pub fn record_apply(
    schema: &Schema,
    type_id: TypeId,
    live: &Value,
    applied: Applied,
    object: &Value,
    write: Write,
) -> String {
    let Write { manager, reach, now } = write;
    let mut managers = applied.managers;
    let changes = Walker { schema }.compare_objects(type_id, live, object, reach);
    for (other, owned) in &mut managers.entries {
        if other != manager {
            owned.set.subtract(&changes.removed);
        }
    }
    let same = managers.entries.get(manager).is_some_and(|o| o.set == applied.set);
    if !same {
        managers.entries.insert(manager.clone(), Owned { set: applied.set, time: now.to_owned() });
    }
    managers.print(object)
}

fn conflict(managers: Managers, conflicts: &[(Manager, FieldSet)]) -> Box<Status> {
    let mut causes = Vec::new();
    let mut by_manager: Vec<(String, Vec<String>)> = Vec::new();
    for (manager, set) in conflicts {
        let time = managers.entries.get(manager).map(|o| o.time.clone()).unwrap_or_default();
        let mut label = format!("{:?}", manager.name);
        if !manager.subresource.is_empty() {
            label.push_str(&format!(" with subresource {:?}", manager.subresource));
        }
        if !manager.applies {
            label.push_str(&format!(" using {}", manager.api_version));
            if !time.is_empty() {
                label.push_str(&format!(" at {time}"));
            }
        }
        let paths = set.paths();
        for path in &paths {
            causes.push(json!({
                "reason": "FieldManagerConflict",
                "message": format!("conflict with {label}"),
                "field": path,
            }));
        }
        by_manager.push((label, paths));
    }
    let count = causes.len();
    let mut text = format!("Apply failed with {count} conflict{}: ", if count == 1 { "" } else { "s" });
    match &by_manager[..] {
        [(label, paths)] if paths.len() == 1 => {
            text.push_str(&format!("conflict with {label}: {}", paths[0]))
        }
        many => {
            let parts: Vec<String> = many
                .iter()
                .map(|(label, paths)| {
                    let list: String = paths.iter().map(|p| format!("\n- {p}")).collect();
                    format!("conflicts with {label}:{list}")
                })
                .collect();
            text.push_str(&parts.join("\n"));
        }
    }
    let mut status = Status::new(409, "Conflict", text);
    status.details = Some(json!({ "causes": causes }));
    status
}

/// Checks that a configuration may be applied: keyed lists name their keys, once each.
pub fn check_config(schema: &Schema, type_id: TypeId, config: &Value) -> Vec<String> {
    let mut errors = Vec::new();
    Walker { schema }.check_lists(&Shape::Object(type_id), None, config, "", &mut errors);
    errors
}

fn strip(set: &mut FieldSet, reach: Reach) {
    for path in STRIPPED {
        set.remove_tree(path);
    }
    match reach {
        Reach::AllBut(paths) => {
            for path in paths {
                set.remove_tree(&path.split('.').collect::<Vec<_>>());
            }
        }
        Reach::Only(paths) => {
            let patterns: Vec<Vec<&str>> = paths.iter().map(|path| path.split('.').collect()).collect();
            set.retain_matching(&patterns);
        }
    }
}

/// What differs between two objects.
#[derive(Default)]
struct Changes {
    /// Added or modified.
    touched: FieldSet,
    removed: FieldSet,
}

/// What differs at one path and below it.
#[derive(Default)]
struct Difference {
    touched: Node,
    removed: Node,
}

impl Difference {
    fn put(&mut self, step: Step, below: Difference) {
        match (below.touched.is_empty(), below.removed.is_empty()) {
            (true, true) => {}
            (false, true) => self.touched.below.put(step, below.touched),
            (true, false) => self.removed.below.put(step, below.removed),
            (false, false) => {
                self.touched.below.put(step.clone(), below.touched);
                self.removed.below.put(step, below.removed);
            }
        }
    }
}

struct Walker<'s> {
    schema: &'s Schema,
}

/// How server-side apply sees a value.
enum Nature<'a> {
    /// Owned as a whole: scalars, atomic lists, maps and objects.
    Leaf,
    /// Fields by name; `None` is a free-form map.
    Fields(Option<TypeId>, Option<&'a Shape>),
    /// A list whose items have identity: keys of a map list, or the values of a set.
    Items(&'a Shape, &'a ListType),
}

impl Walker<'_> {
    fn nature<'a>(&self, shape: &'a Shape, field: Option<&'a Field>) -> Nature<'a> {
        if field.is_some_and(|f| f.atomic) {
            return Nature::Leaf;
        }
        match shape {
            Shape::Object(id) if self.schema.type_of(*id).atomic => Nature::Leaf,
            Shape::Object(id) => Nature::Fields(Some(*id), None),
            Shape::Map(inner) => Nature::Fields(None, Some(inner)),
            Shape::List(inner) => match field.map(|f| &f.list) {
                Some(list @ (ListType::Set | ListType::Map(_))) => Nature::Items(inner, list),
                _ => Nature::Leaf,
            },
            _ => Nature::Leaf,
        }
    }

    /// The object Go would have before anything is set: structures that are no pointers exist.
    fn zero(&self, type_id: TypeId) -> Value {
        let mut map = Map::new();
        for field in &self.schema.type_of(type_id).fields {
            let always = field.required
                || field.default.as_ref().is_some_and(|d| d.replaces_zero && d.value.is_object())
                || (field.name == "metadata" && field.object_type().is_some());
            if always {
                let value = match &field.shape {
                    Shape::Object(id) => self.zero(*id),
                    _ => Value::Null,
                };
                map.insert(field.name.clone(), value);
            }
        }
        Value::Object(map)
    }

    fn child<'a>(
        &'a self,
        id: Option<TypeId>,
        element: Option<&'a Shape>,
        name: &str,
    ) -> Option<(&'a Shape, Option<&'a Field>)> {
        match id {
            Some(id) => self.schema.type_of(id).field(name).map(|f| (&f.shape, Some(f))),
            None => element.map(|shape| (shape, None)),
        }
    }

    /// The step that identifies a list item.
    fn item_step(&self, inner: &Shape, list: &ListType, item: &Value) -> Step {
        match list {
            ListType::Map(keys) => {
                let structure = inner.object_type().map(|id| self.schema.type_of(id));
                let default = |key: &str| structure?.field(key)?.default.as_ref().map(|d| &d.value);
                let mut fields: Vec<(&str, &Value)> = keys
                    .iter()
                    .filter_map(|key| Some((key.as_str(), item.get(key).or_else(|| default(key))?)))
                    .collect();
                fields.sort_unstable_by_key(|(key, _)| *key);
                let mut text = String::from("{");
                for (index, (key, value)) in fields.into_iter().enumerate() {
                    let comma = if index > 0 { "," } else { "" };
                    write!(text, r#"{comma}"{key}":{value}"#).expect("strings take everything");
                }
                text.push('}');
                Step::Key(text.into())
            }
            _ => Step::Value(item.to_string().into()),
        }
    }

    // ---- the set of fields a configuration names ----

    fn field_set(&self, type_id: TypeId, value: &Value) -> FieldSet {
        self.collect(&Shape::Object(type_id), None, value).below
    }

    fn collect(&self, shape: &Shape, field: Option<&Field>, value: &Value) -> Node {
        let mut set = FieldSet::default();
        match (self.nature(shape, field), value) {
            (Nature::Fields(id, element), Value::Object(map)) => {
                for (name, item) in map {
                    let Some((shape, field)) = self.child(id, element, name) else { continue };
                    let mut node = self.collect(shape, field, item);
                    let empty = item.is_null() || item.as_object().is_some_and(Map::is_empty);
                    node.member |= id.is_none() || empty;
                    if !node.is_empty() {
                        set.put(Step::field(name), node);
                    }
                }
            }
            (Nature::Items(inner, list), Value::Array(items)) => {
                for item in items {
                    let node = self.collect(inner, None, item);
                    set.put(self.item_step(inner, list, item), Node { member: true, ..node });
                }
            }
            _ => return Node::leaf(),
        }
        Node { member: false, below: set }
    }

    // ---- what changed between two objects ----

    fn compare_objects(&self, type_id: TypeId, before: &Value, after: &Value, reach: Reach) -> Changes {
        let all = self.compare(&Shape::Object(type_id), None, Some(before), Some(after));
        let mut changes = Changes { touched: all.touched.below, removed: all.removed.below };
        for set in [&mut changes.touched, &mut changes.removed] {
            if !set.is_empty() {
                strip(set, reach);
            }
        }
        changes
    }

    fn compare(
        &self,
        shape: &Shape,
        field: Option<&Field>,
        before: Option<&Value>,
        after: Option<&Value>,
    ) -> Difference {
        let is_void = |v: Option<&Value>| match v {
            None | Some(Value::Null) => true,
            Some(Value::Object(map)) => map.is_empty(),
            Some(Value::Array(items)) => items.is_empty(),
            _ => false,
        };
        let mut found = Difference::default();
        let nature = self.nature(shape, field);
        if matches!(nature, Nature::Leaf) || (is_void(before) && is_void(after)) {
            match (before, after) {
                (None, Some(_)) => found.touched.member = true,
                (Some(_), None) => found.removed.member = true,
                (Some(a), Some(b)) if !same(a, b) => found.touched.member = true,
                _ => {}
            }
            return found;
        }
        match nature {
            Nature::Fields(id, element) => {
                let a = before.and_then(Value::as_object);
                let b = after.and_then(Value::as_object);
                let only_before =
                    a.into_iter().flatten().filter(|(k, _)| b.is_none_or(|b| !b.contains_key(*k)));
                for (name, _) in b.into_iter().flatten().chain(only_before) {
                    let Some((shape, field)) = self.child(id, element, name) else { continue };
                    let (old, new) = (a.and_then(|a| a.get(name)), b.and_then(|b| b.get(name)));
                    found.put(Step::field(name), self.compare(shape, field, old, new));
                }
            }
            Nature::Items(inner, list) => {
                let steps = |v: Option<&'_ Value>| -> Vec<Step> {
                    let items = v.and_then(Value::as_array).into_iter().flatten();
                    items.map(|item| self.item_step(inner, list, item)).collect()
                };
                let (a, b) = (steps(before), steps(after));
                let at = |steps: &[Step], step: &Step| steps.iter().position(|s| s == step);
                let only_before = a.iter().filter(|step| at(&b, step).is_none());
                for step in b.iter().chain(only_before) {
                    let old = at(&a, step).and_then(|i| before?.get(i));
                    let new = at(&b, step).and_then(|i| after?.get(i));
                    found.put(step.clone(), self.compare(inner, None, old, new));
                }
            }
            Nature::Leaf => {}
        }
        match (before, after) {
            (None, Some(_)) => found.touched.member = true,
            (Some(_), None) => found.removed.member = true,
            _ => {}
        }
        found
    }

    // ---- overlaying a configuration ----

    fn merge(&self, shape: &Shape, field: Option<&Field>, live: &Value, config: &Value) -> Value {
        match (self.nature(shape, field), live, config) {
            (Nature::Fields(id, element), Value::Object(base), Value::Object(over)) => {
                let mut result = base.clone();
                for (name, value) in over {
                    let merged = match (self.child(id, element, name), base.get(name)) {
                        (Some((shape, field)), Some(old)) => self.merge(shape, field, old, value),
                        _ => value.clone(),
                    };
                    result.insert(name.clone(), merged);
                }
                Value::Object(result)
            }
            (Nature::Items(inner, list), Value::Array(base), Value::Array(over)) => {
                Value::Array(self.merge_items(inner, list, base, over))
            }
            _ => config.clone(),
        }
    }

    /// Items of both lists, in the order of the configuration where it says one.
    fn merge_items(&self, inner: &Shape, list: &ListType, base: &[Value], over: &[Value]) -> Vec<Value> {
        let steps =
            |items: &[Value]| -> Vec<Step> { items.iter().map(|i| self.item_step(inner, list, i)).collect() };
        let (base_steps, over_steps) = (steps(base), steps(over));
        let mut result = Vec::new();
        let mut left = 0;
        for (item, step) in over.iter().zip(&over_steps) {
            // Items only the live list has keep their place before the next shared one.
            while left < base.len() && !over_steps.contains(&base_steps[left]) {
                result.push(base[left].clone());
                left += 1;
            }
            if left < base.len() && over_steps.contains(&base_steps[left]) {
                left += 1;
            }
            match base_steps.iter().position(|s| s == step) {
                Some(at) => result.push(self.merge(inner, None, &base[at], item)),
                None => result.push(item.clone()),
            }
        }
        result.extend(
            (left..base.len()).filter(|i| !over_steps.contains(&base_steps[*i])).map(|i| base[i].clone()),
        );
        result
    }

    // ---- giving up fields ----

    /// Removes what the manager owned before and nobody owns now.
    fn remove_lost(&self, type_id: TypeId, object: &mut Value, last: &FieldSet, kept: &FieldSet) {
        self.remove(&Shape::Object(type_id), None, object, last, kept);
    }

    fn remove(
        &self,
        shape: &Shape,
        field: Option<&Field>,
        value: &mut Value,
        last: &FieldSet,
        kept: &FieldSet,
    ) {
        let empty = FieldSet::default();
        match (self.nature(shape, field), value) {
            (Nature::Fields(id, element), Value::Object(map)) => {
                for (step, member, below) in last.steps() {
                    let Step::Field(name) = step else { continue };
                    let still = kept.contains_at_or_below(step);
                    let named = id.is_some();
                    if still.is_none() && (member || named) {
                        map.remove(name.as_str());
                    } else if let (Some(child), Some((shape, field))) =
                        (map.get_mut(name.as_str()), self.child(id, element, name))
                    {
                        self.remove(shape, field, child, below, still.unwrap_or(&empty));
                    }
                }
            }
            (Nature::Items(inner, list), Value::Array(items)) => {
                items.retain_mut(|item| {
                    let step = self.item_step(inner, list, item);
                    let Some((_, member, below)) = last.steps().find(|(s, _, _)| **s == step) else {
                        return true;
                    };
                    let still = kept.contains_at_or_below(&step);
                    if still.is_none() && member {
                        return false;
                    }
                    self.remove(inner, None, item, below, still.unwrap_or(&empty));
                    true
                });
            }
            _ => {}
        }
    }

    fn check_lists(
        &self,
        shape: &Shape,
        field: Option<&Field>,
        value: &Value,
        path: &str,
        errors: &mut Vec<String>,
    ) {
        match (self.nature(shape, field), value) {
            (Nature::Fields(id, element), Value::Object(map)) => {
                for (name, item) in map {
                    if let Some((shape, field)) = self.child(id, element, name) {
                        self.check_lists(shape, field, item, &format!("{path}.{name}"), errors);
                    }
                }
            }
            (Nature::Items(inner, list), Value::Array(items)) => {
                let mut seen: Vec<Step> = Vec::new();
                for (index, item) in items.iter().enumerate() {
                    let step = self.item_step(inner, list, item);
                    if let (ListType::Map(keys), Step::Key(found)) = (list, &step)
                        && found == "{}"
                    {
                        let wanted = keys.join(", ");
                        let detail = format!(
                            "element {index}: associative list with keys has an element that omits key field {wanted:?} (and doesn't have default value)"
                        );
                        errors.push(format!("{path}: {detail}"));
                    }
                    if seen.contains(&step) {
                        errors.push(format!("{path}: duplicate entries for key {}", shown_key(&step)));
                    }
                    self.check_lists(inner, None, item, &format!("{path}[{index}]"), errors);
                    seen.push(step);
                }
            }
            _ => {}
        }
    }
}

/// `[name="a"]`, as the merge library prints keys.
fn shown_key(step: &Step) -> String {
    let (Step::Field(text) | Step::Value(text)) = step else {
        let Step::Key(text) = step else { return String::new() };
        let keys: serde_json::Map<String, Value> = serde_json::from_str(text).unwrap_or_default();
        let parts: Vec<String> = keys.iter().map(|(name, value)| format!("{name}={value}")).collect();
        return format!("[{}]", parts.join(","));
    };
    format!("[{text}]")
}

/// Equality of leaves; null and absent differ, numbers compare by value.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(x), Value::Number(y)) => x.as_f64() == y.as_f64(),
        _ => a == b,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config_map() -> (&'static Schema, TypeId) {
        let schema = Schema::builtin();
        (schema, schema.resource("", "v1", "configmaps").expect("served").type_id)
    }

    fn owners_of(object: &Value) -> String {
        object.at("metadata.managedFields").map_or_else(String::new, Value::to_string)
    }

    fn parsed(owners: &str) -> Value {
        serde_json::from_str(owners).expect("JSON")
    }

    fn applier(name: &str) -> Manager {
        Manager { applies: true, name: name.into(), api_version: "v1".into(), subresource: String::new() }
    }

    fn apply(live: &Value, config: Value, by: &str, force: bool) -> Result<Value> {
        let (schema, id) = config_map();
        let manager = applier(by);
        let write = Write { manager: &manager, reach: Reach::AllBut(&[]), now: "2026-01-01T00:00:00Z" };
        let owners = owners_of(live);
        let applied = merge(schema, id, Live { object: live, owners: &owners }, &config, write, force)?;
        let mut object = applied.object.clone();
        let owners = record_apply(schema, id, live, applied, &object, write);
        object.set_at("metadata.managedFields", parsed(&owners));
        Ok(object)
    }

    #[test]
    fn two_appliers_share_conflict_and_force() {
        let first = apply(&json!({}), json!({"data":{"a":"1","b":"1"}}), "one", false).expect("no owner yet");
        let both =
            apply(&first, json!({"data":{"a":"1","c":"1"}}), "two", false).expect("same value is shared");
        assert_eq!(both["data"], json!({"a":"1","b":"1","c":"1"}));
        let refused = apply(&both, json!({"data":{"b":"2"}}), "two", false).expect_err("`one` owns b");
        assert_eq!(refused.message, r#"Apply failed with 1 conflict: conflict with "one": .data.b"#);
        let forced = apply(&both, json!({"data":{"b":"2"}}), "two", true).expect("forced");
        assert_eq!(forced["data"], json!({"a":"1","b":"2"}), "`two` gave up c, `one` still holds a");
    }

    #[test]
    fn applying_again_changes_nothing() {
        let config = json!({"data":{"a":"1"},"metadata":{"labels":{"x":"y"}}});
        let first = apply(&json!({}), config.clone(), "one", false).expect("applies");
        assert_eq!(apply(&first, config, "one", false).expect("applies"), first);
    }

    #[test]
    fn updates_take_ownership_of_what_they_change() {
        let (schema, id) = config_map();
        let live = apply(&json!({}), json!({"data":{"a":"1","b":"1"}}), "one", false).expect("applies");
        let mut new = live.clone();
        new["data"]["a"] = json!("2");
        let updater = Manager { applies: false, ..applier("kubectl-edit") };
        let write = Write { manager: &updater, reach: Reach::AllBut(&[]), now: "2026-01-01T00:00:01Z" };
        let owners = owners_of(&live);
        let live = Live { object: &live, owners: &owners };
        let owners = parsed(&record_update(schema, id, Some(live), &new, write));
        let owners: Vec<(String, Value)> = owners
            .as_array()
            .expect("a list")
            .iter()
            .map(|m| (m.str_at("manager").to_owned(), m["fieldsV1"].clone()))
            .collect();
        assert_eq!(
            owners,
            [
                ("one".to_owned(), json!({"f:data":{"f:b":{}}})),
                ("kubectl-edit".to_owned(), json!({"f:data":{"f:a":{}}})),
            ]
        );
    }

    #[test]
    fn a_created_pod_records_structures_as_upstream() {
        let schema = Schema::builtin();
        let id = schema.resource("", "v1", "pods").expect("served").type_id;
        let pod = json!({"metadata":{"labels":{"app":"x"}},"spec":{"containers":[{"name":"a","image":"i"}]}});
        let manager = Manager { applies: false, ..applier("curl") };
        let write = Write { manager: &manager, reach: Reach::AllBut(&[]), now: "2026-01-01T00:00:00Z" };
        let owners = record_update(schema, id, None, &pod, write);
        assert_eq!(
            parsed(&owners)[0]["fieldsV1"],
            json!({"f:metadata":{"f:labels":{".":{},"f:app":{}}},
                "f:spec":{"f:containers":{"k:{\"name\":\"a\"}":{".":{},"f:image":{},"f:name":{}}}}})
        );
    }
}
