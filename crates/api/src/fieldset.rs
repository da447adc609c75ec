//! Field sets: which fields of an object somebody owns, as `managedFields` records them.
//!
//! A set is a tree of path elements. Its JSON form (`FieldsV1`) is the one of
//! `sigs.k8s.io/structured-merge-diff`: `f:name`, `k:{"key":…}`, `v:value`, and `.` for the node itself.

use serde_json::{Map, Value};
use smol_str::SmolStr;

/// One step from a value to a part of it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// A field of an object or an entry of a map.
    Field(SmolStr),
    /// The list item with these key fields, as canonical JSON.
    Key(SmolStr),
    /// The item of a set, as JSON.
    Value(SmolStr),
}

impl Step {
    pub fn field(name: &str) -> Step {
        Step::Field(name.into())
    }

    fn encode(&self) -> (&'static str, &str) {
        match self {
            Step::Field(name) => ("f:", name),
            Step::Key(keys) => ("k:", keys),
            Step::Value(value) => ("v:", value),
        }
    }

    fn decode(text: &str) -> Option<Step> {
        let (kind, rest) = text.split_once(':')?;
        match kind {
            "f" => Some(Step::field(rest)),
            "k" => Some(Step::Key(canonical(rest)?)),
            "v" => Some(Step::Value(canonical(rest)?)),
            _ => None,
        }
    }
}

fn canonical(text: &str) -> Option<SmolStr> {
    serde_json::from_str::<Value>(text).ok().map(|v| v.to_string().into())
}

/// A set of paths. Every object carries a few, and every write compares them: so they are flat, sorted vectors.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FieldSet {
    /// Sorted by step, each step once.
    nodes: Vec<(Step, Node)>,
}

/// What a set says of one path and of those below it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Node {
    /// The path up to here is in the set.
    pub member: bool,
    pub below: FieldSet,
}

impl Node {
    /// A path of the set with nothing below it.
    pub fn leaf() -> Node {
        Node { member: true, below: FieldSet::default() }
    }

    pub fn is_empty(&self) -> bool {
        !self.member && self.below.is_empty()
    }
}

impl FieldSet {
    pub fn is_empty(&self) -> bool {
        self.nodes.iter().all(|(_, n)| n.is_empty())
    }

    fn find(&self, step: &Step) -> Result<usize, usize> {
        self.nodes.binary_search_by(|(s, _)| s.cmp(step))
    }

    fn get(&self, step: &Step) -> Option<&Node> {
        self.find(step).ok().map(|at| &self.nodes[at].1)
    }

    fn get_mut(&mut self, step: &Step) -> Option<&mut Node> {
        self.find(step).ok().map(|at| &mut self.nodes[at].1)
    }

    /// Sets what is known of a step; steps that come in order cost nothing to place.
    pub fn put(&mut self, step: Step, node: Node) {
        if self.nodes.last().is_none_or(|(last, _)| *last < step) {
            return self.nodes.push((step, node));
        }
        match self.find(&step) {
            Ok(at) => self.nodes[at].1 = node,
            Err(at) => self.nodes.insert(at, (step, node)),
        }
    }

    /// Removes the path and everything below it.
    pub fn remove_tree(&mut self, path: &[&str]) {
        let steps: Vec<Step> = path.iter().map(|name| Step::field(name)).collect();
        self.take(&steps);
    }

    /// Moves the path and everything below it to another path, as when a field has another name.
    pub fn rename(&mut self, from: &[Step], to: &[Step]) {
        let Some(node) = self.take(from) else { return };
        let mut steps = to.iter().rev();
        let Some(last) = steps.next() else { return };
        let bottom = FieldSet { nodes: vec![(last.clone(), node)] };
        let moved = steps.fold(bottom, |below, step| FieldSet {
            nodes: vec![(step.clone(), Node { member: false, below })],
        });
        self.union(moved);
    }

    fn take(&mut self, path: &[Step]) -> Option<Node> {
        let (first, rest) = path.split_first()?;
        let at = self.find(first).ok()?;
        if rest.is_empty() {
            return Some(self.nodes.remove(at).1);
        }
        let taken = self.nodes[at].1.below.take(rest)?;
        self.prune();
        Some(taken)
    }

    pub fn union(&mut self, other: FieldSet) {
        if self.nodes.is_empty() {
            self.nodes = other.nodes;
            return;
        }
        for (step, theirs) in other.nodes {
            match self.get_mut(&step) {
                Some(ours) => {
                    ours.member |= theirs.member;
                    ours.below.union(theirs.below);
                }
                None => self.put(step, theirs),
            }
        }
    }

    /// Removes the members of `other`, not what lies below them.
    pub fn subtract(&mut self, other: &FieldSet) {
        for (step, theirs) in &other.nodes {
            if let Some(ours) = self.get_mut(step) {
                ours.member &= !theirs.member;
                ours.below.subtract(&theirs.below);
            }
        }
        self.prune();
    }

    pub fn intersection(&self, other: &FieldSet) -> FieldSet {
        let both = self.nodes.iter().filter_map(|(step, ours)| {
            let theirs = other.get(step)?;
            let below = ours.below.intersection(&theirs.below);
            Some((step.clone(), Node { member: ours.member && theirs.member, below }))
        });
        let mut set = FieldSet { nodes: both.collect() };
        set.prune();
        set
    }

    /// Keeps only what lies at or below one of the patterns: names of fields, `*` for any step.
    pub fn retain_matching(&mut self, patterns: &[Vec<&str>]) {
        self.nodes.retain_mut(|(step, node)| {
            let step = &*step;
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

    /// What lies below a step, if the step or anything below it is in the set.
    pub fn contains_at_or_below(&self, step: &Step) -> Option<&FieldSet> {
        self.get(step).map(|n| &n.below)
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
        self.nodes.retain(|(_, n)| !n.is_empty());
    }

    /// Appends the `FieldsV1` form as JSON.
    pub fn write(&self, out: &mut String) {
        self.write_level(false, out);
    }

    #[cfg(test)]
    pub(crate) fn to_value(&self) -> Value {
        let mut text = String::new();
        self.write(&mut text);
        serde_json::from_str(&text).expect("JSON")
    }

    fn write_level(&self, member: bool, out: &mut String) {
        out.push('{');
        if member && !self.nodes.is_empty() {
            out.push_str("\".\":{},");
        }
        for (index, (step, node)) in self.nodes.iter().enumerate() {
            if index > 0 {
                out.push(',');
            }
            let (kind, text) = step.encode();
            out.push('"');
            out.push_str(kind);
            escape(text, out);
            out.push_str("\":");
            node.below.write_level(node.member, out);
        }
        out.push('}');
    }

    /// Reads `FieldsV1`; what is not understood is left out.
    pub fn from_value(value: &Value) -> FieldSet {
        let mut set = FieldSet::default();
        for (name, below) in value.as_object().into_iter().flatten() {
            let Some(step) = Step::decode(name) else { continue };
            let empty = below.as_object().is_none_or(Map::is_empty);
            let member = empty || below.get(".").is_some();
            set.put(step, Node { member, below: FieldSet::from_value(below) });
        }
        set
    }
}

/// Appends what stands between the quotes of a JSON string.
fn escape(text: &str, out: &mut String) {
    if text.bytes().all(|b| b >= 0x20 && b != b'"' && b != b'\\') {
        return out.push_str(text);
    }
    let quoted = Value::from(text).to_string();
    out.push_str(&quoted[1..quoted.len() - 1]);
}

fn show_keys(keys: &str) -> String {
    let parsed: Map<String, Value> = serde_json::from_str(keys).unwrap_or_default();
    parsed.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

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
