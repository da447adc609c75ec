//! The columns of every kind's table, compared with upstream's recorded ones.
//!
//! The recording lies outside the repository (set `KNARR_REFERENCE` to where); without it the test says so.

use std::path::{Path, PathBuf};

use knarr_api::columns::Columns;
use knarr_api::object::Object;
use knarr_api::schema::Schema;
use serde_json::Value;

/// Columns that v1.24 had otherwise.
const CHANGED: &[&str] = &[
    // New columns: Timezone, Status, VolumeAttributesClass, PreemptionPolicy, NominalConcurrencyShares.
    "cronjobs",
    "jobs",
    "persistentvolumeclaims",
    "persistentvolumes",
    "priorityclasses",
    "prioritylevelconfigurations",
    // Another order.
    "resourcequotas",
];

#[test]
fn tables_have_upstreams_columns() {
    let root = std::env::var_os("KNARR_REFERENCE").map(PathBuf::from);
    let above = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().map(|dir| dir.join("shared/reference"));
    let mut files = root.into_iter().chain(above).map(|root| root.join("golden/reads.jsonl"));
    let Some(recording) = files.find_map(|file| std::fs::read_to_string(file).ok()) else {
        eprintln!("SKIPPED: the recorded tables are not here; nothing was compared");
        return;
    };
    let schema = Schema::builtin();
    let (mut compared, mut different) = (0, Vec::new());
    for line in recording.lines() {
        let pair: Value = serde_json::from_str(line).expect("a recording is json");
        let wanted = pair.list_at("answer.columnDefinitions");
        let parts: Vec<&str> = pair.str_at("path").split('/').filter(|p| !p.is_empty()).collect();
        let kind = match parts[..] {
            ["api", version, plural] => schema.any_resource("", version, plural),
            ["apis", group, version, plural] => schema.any_resource(group, version, plural),
            _ => None,
        };
        let Some(kind) = kind.map(|k| schema.hub(k)).filter(|k| !CHANGED.contains(&k.plural.as_str())) else {
            continue;
        };
        if wanted.is_empty() {
            continue;
        }
        compared += 1;
        let facts = |columns: &[Value]| -> Vec<String> {
            let fact = |c: &Value| {
                format!("{} {} {} {}", c.str_at("name"), c.str_at("type"), c.str_at("format"), c["priority"])
            };
            columns.iter().map(fact).collect()
        };
        let (ours, theirs) = (facts(&Columns::of(kind).definitions()), facts(wanted));
        if ours != theirs {
            different.push(format!("{}: {ours:?}\n  instead of {theirs:?}", kind.plural));
        }
    }
    assert!(compared > 30, "only {compared} kinds were compared");
    assert!(different.is_empty(), "{}", different.join("\n"));
}
