//! Lists: which objects a selection means, and one page of them.

use std::sync::Arc;

use knarr_api::rules::Rules;
use knarr_api::schema::Kind;
use knarr_api::selector::{FieldSelector, LabelSelector, Operator, Requirement};
use knarr_store::{Digest, Entry, Range, ReadError};

use super::{Registry, partition};
use crate::encode::{self, View};

impl Registry {
    /// Entries that match the selectors, of one moment. A page may be shorter than `limit` is long only at the end.
    pub fn list(
        &self,
        kind: &Kind,
        namespace: &str,
        selection: &Selection,
        range: Range,
    ) -> std::result::Result<Page, ReadError> {
        let rules = Rules::of(kind);
        let mut range = Range { prefix: prefix(namespace), ..range };
        if let Some(name) = selection.fields.exact("metadata.name") {
            let namespace = if namespace.is_empty() {
                selection.fields.exact("metadata.namespace").unwrap_or("")
            } else {
                namespace
            };
            if !kind.namespaced || !namespace.is_empty() {
                range.prefix = encode::key(namespace, name);
            }
        }
        let limit = std::mem::take(&mut range.limit);
        if selection.is_everything() {
            range.limit = limit;
            let listing = self.store.list(&partition(kind), &range)?;
            return Ok(Page {
                entries: listing.entries,
                revision: listing.revision,
                remaining: listing.remaining,
                counted: true,
            });
        }
        range.about = selection.words(rules);
        let listing = self.store.list(&partition(kind), &range)?;
        let mut matching = listing.entries.into_iter().filter(|entry| selection.matches(rules, entry));
        if limit == 0 {
            return Ok(Page {
                entries: matching.collect(),
                revision: listing.revision,
                remaining: 0,
                counted: true,
            });
        }
        let entries: Vec<Arc<Entry>> = matching.by_ref().take(limit).collect();
        let more = matching.next().is_some();
        Ok(Page { entries, revision: listing.revision, remaining: usize::from(more), counted: false })
    }
}

/// Which objects a list or watch is about.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    pub labels: LabelSelector,
    pub fields: FieldSelector,
}

impl Selection {
    pub fn is_everything(&self) -> bool {
        self.labels.is_everything() && self.fields.is_everything()
    }

    /// What every selected object's digest holds.
    fn words(&self, rules: &Rules) -> Digest {
        let mut words = encode::empty_digest(rules);
        for requirement in self.labels.requirements() {
            let Requirement { key, operator, values } = requirement;
            match (operator, &values[..]) {
                (Operator::In, [value]) => words.add(&["label", key, value]),
                (Operator::NotIn | Operator::DoesNotExist, _) => {}
                _ => words.add(&["label", key]),
            }
        }
        let is_name = |field: &str| matches!(field, "metadata.name" | "metadata.namespace");
        for term in self.fields.terms.iter().filter(|t| t.equal && !is_name(&t.field)) {
            words.add(&["field", &term.field, &term.value]);
        }
        words
    }

    pub fn matches(&self, rules: &'static Rules, entry: &Entry) -> bool {
        if self.is_everything() {
            return true;
        }
        let (namespace, name) = encode::split_key(&entry.key);
        let names = |field: &str| match field {
            "metadata.name" => Some(name),
            "metadata.namespace" => Some(namespace),
            _ => None,
        };
        // Names come from the key: no need to look inside.
        if !self.fields.terms.iter().all(|t| names(&t.field).is_none_or(|v| (v == t.value) == t.equal)) {
            return false;
        }
        if self.labels.is_everything() && self.fields.terms.iter().all(|t| names(&t.field).is_some()) {
            return true;
        }
        let view = View::selectable(rules, entry);
        self.labels.matches(Some(&view.labels))
            && self
                .fields
                .terms
                .iter()
                .all(|t| names(&t.field).is_some() || (view.field(&t.field) == t.value) == t.equal)
    }
}

/// One page of a list.
pub struct Page {
    pub entries: Vec<Arc<Entry>>,
    pub revision: u64,
    /// How many more there are.
    pub remaining: usize,
    /// `remaining` is exact; with selectors it only says whether there are more.
    pub counted: bool,
}

/// The key prefix of a namespace; everything without one.
pub fn prefix(namespace: &str) -> String {
    if namespace.is_empty() { String::new() } else { format!("{namespace}/") }
}
