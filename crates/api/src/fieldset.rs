//! Field sets: which fields of an object somebody owns, as `managedFields` records them.
//!
//! A set is a tree of path elements. Its JSON form (`FieldsV1`) is the one of
//! `sigs.k8s.io/structured-merge-diff`: `f:name`, `k:{"key":…}`, `v:value`, and `.` for the node itself.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

/// One step from a value to a part of it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// A field of an object or an entry of a map.
    Field(String),
    /// The list item with these key fields, as canonical JSON.
    Key(String),
    /// The item of a set, as JSON.
    Value(String),
}

impl Step {
    fn encode(&self) -> String {
        match self {
            Step::Field(name) => format!("f:{name}"),
            Step::Key(keys) => format!("k:{keys}"),
            Step::Value(value) => format!("v:{value}"),
        }
    }

    fn decode(text: &str) -> Option<Step> {
        let (kind, rest) = text.split_once(':')?;
        match kind {
            "f" => Some(Step::Field(rest.to_owned())),
            "k" => Some(Step::Key(canonical(rest)?)),
            "v" => Some(Step::Value(canonical(rest)?)),
            _ => None,
        }
    }
}

fn canonical(text: &str) -> Option<String> {
    serde_json::from_str::<Value>(text).ok().map(|v| v.to_string())
}

/// A set of paths.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FieldSet {
    nodes: BTreeMap<Step, Node>,
}

#[derive(Debug, Clone, Default, PartialEq)]
struct Node {
    /// The path up to here is in the set.
    member: bool,
    below: FieldSet,
}

impl FieldSet {
    pub fn is_empty(&self) -> bool {
        self.nodes.values().all(|n| !n.member && n.below.is_empty())
    }

    pub fn insert(&mut self, path: &[Step]) {
        let Some((first, rest)) = path.split_first() else { return };
        let node = self.nodes.entry(first.clone()).or_default();
        if rest.is_empty() {
            node.member = true;
        } else {
            node.below.insert(rest);
        }
    }

    /// Removes the path and everything below it.
    pub fn remove_tree(&mut self, path: &[Step]) {
        let Some((first, rest)) = path.split_first() else { return };
        if rest.is_empty() {
            self.nodes.remove(first);
        } else if let Some(node) = self.nodes.get_mut(first) {
            node.below.remove_tree(rest);
            self.prune();
        }
    }

    /// Moves the path and everything below it to another path, as when a field has another name.
    pub fn rename(&mut self, from: &[Step], to: &[Step]) {
        let Some(node) = self.take(from) else { return };
        let mut nodes = BTreeMap::new();
        let mut steps = to.iter().rev();
        let Some(last) = steps.next() else { return };
        nodes.insert(last.clone(), node);
        let moved = steps.fold(FieldSet { nodes }, |below, step| FieldSet {
            nodes: BTreeMap::from([(step.clone(), Node { member: false, below })]),
        });
        self.union(&moved);
    }

    fn take(&mut self, path: &[Step]) -> Option<Node> {
        let (first, rest) = path.split_first()?;
        if rest.is_empty() {
            return self.nodes.remove(first);
        }
        let taken = self.nodes.get_mut(first)?.below.take(rest)?;
        self.prune();
        Some(taken)
    }

    pub fn union(&mut self, other: &FieldSet) {
        for (step, theirs) in &other.nodes {
            let ours = self.nodes.entry(step.clone()).or_default();
            ours.member |= theirs.member;
            ours.below.union(&theirs.below);
        }
    }

    /// Removes the members of `other`, not what lies below them.
    pub fn subtract(&mut self, other: &FieldSet) {
        for (step, theirs) in &other.nodes {
            if let Some(ours) = self.nodes.get_mut(step) {
                ours.member &= !theirs.member;
                ours.below.subtract(&theirs.below);
            }
        }
        self.prune();
    }

    pub fn intersection(&self, other: &FieldSet) -> FieldSet {
        let mut nodes = BTreeMap::new();
        for (step, ours) in &self.nodes {
            if let Some(theirs) = other.nodes.get(step) {
                let node = Node {
                    member: ours.member && theirs.member,
                    below: ours.below.intersection(&theirs.below),
                };
                nodes.insert(step.clone(), node);
            }
        }
        let mut set = FieldSet { nodes };
        set.prune();
        set
    }

    /// Keeps only what lies at or below one of the patterns: names of fields, `*` for any step.
    pub fn retain_matching(&mut self, patterns: &[Vec<&str>]) {
        self.nodes.retain(|step, node| {
            let fits = |name: &str| name == "*" || matches!(step, Step::Field(field) if field == name);
            let below: Vec<Vec<&str>> =
                patterns.iter().filter(|p| fits(p[0])).map(|p| p[1..].to_vec()).collect();
            if below.iter().any(Vec::is_empty) {
                return true;
            }
            node.member = false;
            node.below.retain_matching(&below);
            !node.below.is_empty()
        });
    }

    /// Keeps only what lies at or below one of the top-level fields.
    pub fn retain_top(&mut self, keep: impl Fn(&str) -> bool) {
        self.nodes.retain(|step, _| matches!(step, Step::Field(name) if keep(name)));
    }

    /// Every path with a member at or below it.
    pub fn contains_at_or_below(&self, step: &Step) -> Option<&FieldSet> {
        self.nodes.get(step).map(|n| &n.below)
    }

    /// The steps of this level, each with "is a member" and what lies below.
    pub fn steps(&self) -> impl Iterator<Item = (&Step, bool, &FieldSet)> {
        self.nodes.iter().map(|(step, node)| (step, node.member, &node.below))
    }

    /// Paths in the dotted form that conflict messages use: `.spec.containers[name="a"].image`.
    pub fn paths(&self) -> Vec<String> {
        let mut paths = Vec::new();
        self.collect_paths("", &mut paths);
        paths
    }

    fn collect_paths(&self, prefix: &str, into: &mut Vec<String>) {
        for (step, node) in &self.nodes {
            let path = match step {
                Step::Field(name) => format!("{prefix}.{name}"),
                Step::Key(keys) => format!("{prefix}[{}]", show_keys(keys)),
                Step::Value(value) => format!("{prefix}[={value}]"),
            };
            if node.member {
                into.push(path.clone());
            }
            node.below.collect_paths(&path, into);
        }
    }

    fn prune(&mut self) {
        self.nodes.retain(|_, n| n.member || !n.below.is_empty());
    }

    /// The `FieldsV1` form.
    pub fn to_value(&self) -> Value {
        let mut map = Map::new();
        for (step, node) in &self.nodes {
            let mut below = node.below.to_value();
            if node.member && !node.below.is_empty() {
                below["."] = json!({});
            }
            map.insert(step.encode(), below);
        }
        Value::Object(map)
    }

    /// Reads `FieldsV1`; what is not understood is left out.
    pub fn from_value(value: &Value) -> FieldSet {
        let mut set = FieldSet::default();
        for (name, below) in value.as_object().into_iter().flatten() {
            let Some(step) = Step::decode(name) else { continue };
            let empty = below.as_object().is_none_or(Map::is_empty);
            let member = empty || below.get(".").is_some();
            set.nodes.insert(step, Node { member, below: FieldSet::from_value(below) });
        }
        set
    }
}

fn show_keys(keys: &str) -> String {
    let parsed: Map<String, Value> = serde_json::from_str(keys).unwrap_or_default();
    parsed.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_v1_round_trips() {
        let value = json!({"f:spec":{"f:containers":{"k:{\"name\":\"a\"}":{".":{},"f:image":{}}}},
            "f:metadata":{"f:finalizers":{"v:\"x\"":{}}}});
        assert_eq!(FieldSet::from_value(&value).to_value(), value);
    }

    #[test]
    fn sets_subtract_and_intersect_by_member() {
        let set = |v: Value| FieldSet::from_value(&v);
        let mut a = set(json!({"f:a":{".":{},"f:b":{}},"f:c":{}}));
        let b = set(json!({"f:a":{},"f:c":{}}));
        assert_eq!(a.intersection(&b), b);
        a.subtract(&b);
        assert_eq!(a.to_value(), json!({"f:a":{"f:b":{}}}));
    }

    #[test]
    fn patterns_keep_what_lies_below_them() {
        let mut set = FieldSet::from_value(&json!({"f:spec":{"f:containers":{
            "k:{\"name\":\"a\"}":{".":{},"f:image":{},"f:resources":{".":{},"f:limits":{}}},
            "k:{\"name\":\"b\"}":{".":{},"f:image":{}}}}, "f:status":{}}));
        set.retain_matching(&[vec!["spec", "containers", "*", "resources"]]);
        let kept = json!({"f:spec":{"f:containers":{
            "k:{\"name\":\"a\"}":{"f:resources":{".":{},"f:limits":{}}}}}});
        assert_eq!(set.to_value(), kept);
    }

    #[test]
    fn paths_read_as_in_conflict_messages() {
        let set =
            FieldSet::from_value(&json!({"f:spec":{"f:containers":{"k:{\"name\":\"a\"}":{"f:image":{}}}}}));
        assert_eq!(set.paths(), [r#".spec.containers[name="a"].image"#]);
    }
}
