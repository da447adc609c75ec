//! Discovery, compared with upstream's recorded resource lists.
//!
//! The recording lies outside the repository (set `KNARR_REFERENCE` to where); without it the test says so.

mod common;

use std::path::{Path, PathBuf};

use common::get;
use knarr_api::object::Object;
use serde_json::{Value, json};

/// What is listed otherwise, each with its reason.
const CHANGED: &[&str] = &[
    // Resources and subresources of old versions that are not served.
    "podsecuritypolicies",
];

#[tokio::test]
async fn resources_are_listed_as_upstream_lists_them() {
    let root = std::env::var_os("KNARR_REFERENCE").map(PathBuf::from);
    let above = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().map(|dir| dir.join("shared/reference"));
    let mut files = root.into_iter().chain(above).map(|root| root.join("golden/reads.jsonl"));
    let Some(recording) = files.find_map(|file| std::fs::read_to_string(file).ok()) else {
        eprintln!("SKIPPED: the recorded lists are not here; nothing was compared");
        return;
    };
    let api = common::server().await;
    let (mut compared, mut different) = (0, Vec::new());
    for line in recording.lines() {
        let pair: Value = serde_json::from_str(line).expect("a recording is json");
        if pair.str_at("answer.kind") != "APIResourceList" {
            continue;
        }
        let path = pair.str_at("path");
        let ours = get(&api, path).await;
        if ours.status == 404 {
            continue;
        }
        let ours = ours.json();
        for theirs in pair.list_at("answer.resources") {
            let name = theirs.str_at("name");
            if CHANGED.contains(&name.split('/').next().unwrap_or_default()) {
                continue;
            }
            compared += 1;
            let Some(listed) = ours.list_at("resources").iter().find(|r| r.str_at("name") == name) else {
                different.push(format!("{path} {name} is missing"));
                continue;
            };
            for field in ["kind", "namespaced", "shortNames", "categories", "verbs", "group", "version"] {
                let sorted = |value: Option<&Value>| match value {
                    Some(Value::Array(items)) => {
                        let mut items: Vec<&str> = items.iter().filter_map(Value::as_str).collect();
                        items.sort_unstable();
                        json!(items)
                    }
                    other => other.cloned().unwrap_or_default(),
                };
                let (a, b) = (sorted(listed.at(field)), sorted(theirs.at(field)));
                if a != b {
                    different.push(format!("{path} {name} {field}: {a} instead of {b}"));
                }
            }
        }
    }
    assert!(compared > 60, "only {compared} resources were compared");
    assert!(different.is_empty(), "{} differences:\n{}", different.len(), different.join("\n"));
}
