//! Upstream's recorded answers, replayed: requests go to an API server in memory, and each answer is
//! compared with the recorded one.
//!
//! The recordings are large and lie outside the repository; without them the test says so and ends. What
//! must never get worse is written down as floors: the shares of equal statuses and equal answers.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::LazyLock;

use http::Request;
use http_body_util::BodyExt;
use knarr_api::object::Object;
use knarr_api::schema::Schema;
use knarr_apiserver::api::{Api, Peer};
use knarr_apiserver::identity::User;
use knarr_apiserver::respond::full;
use regex::Regex;
use serde_json::{Value, json};

mod common;
use common::server;

fn recordings(file: &str) -> Option<Vec<Value>> {
    let here = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR").ok()?);
    let mut roots = here.ancestors().map(|dir| dir.join("shared/reference/golden"));
    let root = roots.find(|root| root.is_dir())?;
    let text = std::fs::read_to_string(root.join(file)).ok()?;
    Some(text.lines().map(|line| serde_json::from_str(line).expect("a recording is json")).collect())
}

async fn replay(api: &Api, pair: &Value) -> (u16, Value) {
    let body = match pair.get("body") {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Null) | None => String::new(),
        Some(tree) => tree.to_string(),
    };
    let mut request = Request::builder().method(pair.str_at("method")).uri(pair.str_at("path"));
    if let Some(content_type) = pair.get("contentType").and_then(Value::as_str).filter(|c| !c.is_empty()) {
        request = request.header("content-type", content_type);
    }
    request = request.header("user-agent", "golden/1");
    let request = request.body(full(body)).expect("a recorded request is a request");
    let peer = Peer::InProcess(User::new("admin", &["system:masters"]));
    let answer = api.handle(request, &peer).await;
    let status = answer.status().as_u16();
    let bytes = answer.into_body().collect().await.expect("a body").to_bytes();
    (
        status,
        serde_json::from_slice(&bytes)
            .unwrap_or_else(|_| json!({ "_text": String::from_utf8_lossy(&bytes) })),
    )
}

/// Kinds served by v1.24 that are no longer, or not yet: nothing to compare.
fn is_served(path: &str) -> bool {
    let parts: Vec<&str> =
        path.split('?').next().unwrap_or_default().split('/').filter(|s| !s.is_empty()).collect();
    let schema = Schema::builtin();
    let (group, version, rest) = match parts[..] {
        ["api", version, ref rest @ ..] => ("", version, rest),
        ["apis", group, version, ref rest @ ..] => (group, version, rest),
        _ => return true,
    };
    let plural = match rest {
        ["namespaces", _, plural, ..] if !matches!(*plural, "status" | "finalize") => plural,
        [plural, ..] => plural,
        [] => return true,
    };
    schema.resource(group, version, plural).is_some()
}

#[derive(Default)]
struct Tally {
    all: usize,
    same_status: usize,
    same_answer: usize,
    /// Different, and in the reviewed list.
    accepted: usize,
    differences: BTreeMap<String, (usize, String)>,
}

impl Tally {
    fn note(&mut self, pair: &Value, status: u16, answer: &Value) {
        self.all += 1;
        let recorded = pair.int_at("status").unwrap_or(0);
        let expected = &pair["answer"];
        let same_status = i64::from(status) == recorded;
        let what = if !same_status {
            format!("status {recorded} became {status} ({})", expected.str_at("reason"))
        } else {
            let found = if recorded < 300 {
                first_difference(expected, answer, "")
            } else {
                refusal_difference(expected, answer)
            };
            match found {
                None => {
                    self.same_status += 1;
                    self.same_answer += 1;
                    return;
                }
                Some(path) => format!("differs at {path}"),
            }
        };
        let line = format!(
            "{} | {what} | want {} | have {}",
            pair.str_at("case"),
            expected.str_at("message"),
            answer.str_at("message")
        );
        self.same_status += usize::from(same_status || is_accepted(&line));
        if is_accepted(&line) {
            self.same_answer += 1;
            self.accepted += 1;
            return;
        }
        if let Some(path) = std::env::var_os("GOLDEN_DUMP") {
            use std::io::Write;
            let line = json!({ "what": what, "pair": pair, "status": status, "have": answer });
            let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
            writeln!(file.expect("the dump opens"), "{line}").expect("the dump is written");
        }
        let example = format!(
            "{} {} | {}\n      want {}\n      have {}",
            pair.str_at("method"),
            pair.str_at("path"),
            pair.str_at("case"),
            brief(expected),
            brief(answer)
        );
        let slot = self.differences.entry(what).or_insert((0, example));
        slot.0 += 1;
    }

    fn report(&self, name: &str) {
        println!(
            "{name}: {} requests, {} statuses and {} answers as they should be, {} of them other than recorded",
            self.all, self.same_status, self.same_answer, self.accepted
        );
        let mut list: Vec<_> = self.differences.iter().collect();
        list.sort_by_key(|(_, (count, _))| std::cmp::Reverse(*count));
        for (what, (count, example)) in
            list.iter().take(std::env::var("GOLDEN_SHOW").ok().and_then(|n| n.parse().ok()).unwrap_or(5))
        {
            println!("  {count:4} {what}\n      {example}");
        }
    }
}

/// The reviewed list: where v1.36 rightly differs from the recorded v1.24. A line is a regular expression
/// over `case | what | want message | have message`, a tab, and the reason.
fn is_accepted(line: &str) -> bool {
    static LIST: LazyLock<Vec<Regex>> = LazyLock::new(|| {
        let lines = include_str!("golden.accepted").lines().filter(|l| !l.is_empty() && !l.starts_with('#'));
        lines
            .map(|l| {
                let (pattern, reason) = l.split_once('\t').expect("a pattern, a tab, a reason");
                assert!(!reason.trim().is_empty(), "no reason for {pattern}");
                Regex::new(pattern).expect("a regular expression")
            })
            .collect()
    });
    LIST.iter().any(|pattern| pattern.is_match(line))
}

/// Refusals are equal when reason and causes are, and the message where it shows no Go value.
fn refusal_difference(expected: &Value, have: &Value) -> Option<String> {
    if expected.at("_text").is_some() {
        return first_difference(expected, have, "");
    }
    if expected.str_at("reason") != have.str_at("reason") {
        return Some(".reason".into());
    }
    let causes = |answer: &Value| -> BTreeSet<(String, String)> {
        let list = answer.list_at("details.causes").iter();
        list.map(|c| (c.str_at("field").to_owned(), c.str_at("reason").to_owned())).collect()
    };
    if causes(expected) != causes(have) {
        return Some(".details.causes".into());
    }
    let (want, is) = (expected.str_at("message"), have.str_at("message"));
    let masked = want.contains("<uid>") || want.contains("<ip>") || want.contains("<port>");
    if !masked && !shows_go_value(want) && want != is {
        return Some(".message".into());
    }
    None
}

/// `v1.LabelSelector{…}`, `map[string]string(nil)`, `[]string{…}`: v1.36 prints JSON there.
fn shows_go_value(text: &str) -> bool {
    static GO: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"(\w+\.\w+|map\[\w+\]\w+|\[\][\w.]+)(\{|\(nil\))|\(0xc0").expect("a constant")
    });
    GO.is_match(text)
}

fn brief(value: &Value) -> String {
    let text = match value.str_at("message") {
        "" => value.to_string(),
        message => message.to_owned(),
    };
    text.chars().take(600).collect()
}

/// Fields that differ from run to run, or that newer releases add.
const VOLATILE: [&str; 9] = [
    "uid",
    "resourceVersion",
    "creationTimestamp",
    "managedFields",
    "generation",
    "selfLink",
    "deletionTimestamp",
    "clusterIP",
    "clusterIPs",
];

/// The path of the first difference that matters; answers may say more than the recording does.
fn first_difference(expected: &Value, have: &Value, path: &str) -> Option<String> {
    match (expected, have) {
        (Value::Object(e), Value::Object(h)) => {
            for (name, value) in e {
                if VOLATILE.contains(&name.as_str()) {
                    continue;
                }
                let absent = Value::Null;
                let other = h.get(name).unwrap_or(&absent);
                let at = format!("{path}.{name}");
                // Go's empty values and absence are the same to every client.
                let empty = |v: &Value| match v {
                    Value::Null | Value::Bool(false) => true,
                    Value::String(s) => s.is_empty(),
                    Value::Number(n) => n.as_i64() == Some(0),
                    Value::Array(a) => a.is_empty(),
                    Value::Object(o) => o.is_empty(),
                    Value::Bool(true) => false,
                };
                if empty(value) && empty(other) {
                    continue;
                }
                if let Some(found) = first_difference(value, other, &at) {
                    return Some(found);
                }
            }
            None
        }
        (Value::Array(e), Value::Array(h)) if e.len() == h.len() => {
            e.iter().zip(h).find_map(|(e, h)| first_difference(e, h, &format!("{path}[]")))
        }
        (Value::String(e), _) if e.contains("<ip>") || e.contains("<port>") || e.contains("<uid>") => None,
        (e, h) if e == h => None,
        _ => Some(path.to_owned()),
    }
}

async fn run(file: &str, floor_status: usize, floor_answer: usize) {
    let Some(pairs) = recordings(file) else {
        eprintln!("SKIPPED: the recordings of upstream's answers are not here; nothing was compared");
        return;
    };
    let api = server().await;
    let mut tally = Tally::default();
    for pair in pairs.iter().filter(|p| is_served(p.str_at("path"))) {
        let (status, answer) = replay(&api, pair).await;
        tally.note(pair, status, &answer);
    }
    tally.report(file);
    let share = |n: usize| n * 1000 / tally.all.max(1);
    assert!(
        share(tally.same_status) >= floor_status,
        "equal statuses fell to {} per mille",
        share(tally.same_status)
    );
    assert!(
        share(tally.same_answer) >= floor_answer,
        "equal answers fell to {} per mille",
        share(tally.same_answer)
    );
}

#[tokio::test]
async fn rich_objects_are_answered_as_upstream_did() {
    run("rich.jsonl", 998, 997).await;
}

#[tokio::test]
async fn fixtures_are_answered_as_upstream_did() {
    run("fixtures.jsonl", 999, 997).await;
}

#[tokio::test]
async fn sequences_are_answered_as_upstream_did() {
    run("seq.jsonl", 1000, 1000).await;
}
