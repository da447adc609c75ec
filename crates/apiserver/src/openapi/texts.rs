//! The descriptions of types and fields: upstream's words, packed at build time, unpacked when asked for.

use std::collections::HashMap;
use std::io::Read;

use flate2::read::GzDecoder;

/// Made by `build.rs`.
const PACKED: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptions.gz"));

/// Where types of removed versions went.
const SUCCESSORS: [&str; 12] = [
    "apps.v1",
    "autoscaling.v2",
    "batch.v1",
    "coordination.v1",
    "discovery.v1",
    "events.v1",
    "networking.v1",
    "node.v1",
    "policy.v1",
    "rbac.v1",
    "scheduling.v1",
    "storage.v1",
];

/// All descriptions; a few milliseconds and a megabyte, so not kept beyond the document being written.
pub struct Texts {
    all: HashMap<String, Entry>,
}

#[derive(Default)]
struct Entry {
    own: String,
    fields: HashMap<String, String>,
}

impl Texts {
    pub fn unpack() -> Texts {
        let mut text = String::new();
        GzDecoder::new(PACKED).read_to_string(&mut text).expect("packed by our own build");
        let mut all: HashMap<String, Entry> = HashMap::new();
        let mut current = String::new();
        for line in text.lines() {
            let mut columns = line.splitn(3, '\t');
            match (columns.next(), columns.next(), columns.next()) {
                (Some(""), Some(field), Some(text)) => {
                    let entry = all.entry(current.clone()).or_default();
                    entry.fields.insert(field.to_owned(), unescape(text));
                }
                (Some(name), Some(text), _) => {
                    current = name.to_owned();
                    all.entry(current.clone()).or_default().own = unescape(text);
                }
                _ => {}
            }
        }
        Texts { all }
    }

    /// What the definition is for; empty if unknown.
    pub fn of_type(&self, definition: &str) -> &str {
        self.find(definition).map_or("", |e| e.own.as_str())
    }

    /// What the field of the definition is for; empty if unknown.
    pub fn of_field(&self, definition: &str, field: &str) -> &str {
        self.find(definition).and_then(|e| e.fields.get(field)).map_or("", String::as_str)
    }

    /// Versions that upstream has removed are described by their successors.
    fn find(&self, definition: &str) -> Option<&Entry> {
        self.all.get(definition).or_else(|| {
            let (_, name) = definition.rsplit_once('.')?;
            SUCCESSORS.iter().find_map(|group| self.all.get(&format!("io.k8s.api.{group}.{name}")))
        })
    }
}

fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text.chars();
    while let Some(char) = rest.next() {
        match (char, char == '\\') {
            (_, true) => match rest.next() {
                Some('n') => out.push('\n'),
                Some('t') => out.push('\t'),
                Some(other) => out.push(other),
                None => {}
            },
            (plain, false) => out.push(plain),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_and_fields_have_upstreams_words() {
        let texts = Texts::unpack();
        assert!(PACKED.len() < 350_000, "{} bytes", PACKED.len());
        assert!(texts.of_type("io.k8s.api.core.v1.Pod").contains("collection of containers"));
        assert!(texts.of_field("io.k8s.api.core.v1.Container", "livenessProbe").contains("liveness"));
        assert!(texts.of_field("io.k8s.api.core.v1.ContainerPort", "protocol").contains("\"TCP\""));
    }
}
