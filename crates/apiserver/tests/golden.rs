//! Upstream's recorded answers, replayed: requests go to an API server in memory, and each answer is
//! compared with the recorded one.
//!
//! The recordings are large and lie outside the repository; without them the test says so and ends. What
//! must never get worse is written down as floors: the shares of equal statuses and equal answers.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use http::Request;
use http_body_util::BodyExt;
use knarr_api::object::Object;
use knarr_api::schema::Schema;
use knarr_apiserver::api::{Api, Peer};
use knarr_apiserver::authn::Tokens;
use knarr_apiserver::bootstrap;
use knarr_apiserver::identity::User;
use knarr_apiserver::proxy::Dialer;
use knarr_apiserver::rbac::Rbac;
use knarr_apiserver::registry::{Context, Registry};
use knarr_apiserver::respond::full;
use knarr_apiserver::services::Allocator;
use knarr_store::engine::Memory;
use knarr_store::{Embedded, Options, Store};
use serde_json::{Value, json};

async fn server() -> Api {
    let store: Arc<dyn Store> =
        Arc::new(Embedded::open_inline(Memory::default(), Options::default()).expect("opens"));
    let registry = Arc::new(Registry {
        store: store.clone(),
        schema: Schema::builtin(),
        services: Allocator::load(store.as_ref(), "10.96.0.0/16".parse().expect("a range"), 30_000..=32_767),
        clock: Arc::new(jiff::Timestamp::now),
    });
    bootstrap::run(&registry, &["192.0.2.2:6443".parse().expect("an address")]).await.expect("bootstraps");
    let key = rcgen::KeyPair::generate().expect("a key");
    let tokens =
        Tokens::new("https://issuer", key.serialize_pem().as_bytes(), key.public_key_raw()).expect("tokens");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    // The recording server ran without service account admission; this account changes no pod.
    let account = json!({ "metadata": { "name": "default" }, "automountServiceAccountToken": false });
    let context = Context::new(User::new("admin", &["system:masters"]), "golden");
    let kind = registry.schema.resource("", "v1", "serviceaccounts").expect("built in");
    registry.create(kind, "default", account, &context).await.expect("creates");
    Api {
        rbac: Rbac::new(store),
        registry,
        tokens: Arc::new(tokens),
        dialer: Dialer::new(Arc::new(client)),
        address: "192.0.2.2:6443".into(),
        old_versions: true,
    }
}

fn recordings(file: &str) -> Option<Vec<Value>> {
    let root =
        PathBuf::from(std::env::var("CARGO_MANIFEST_DIR").ok()?).join("../../../shared/reference/golden");
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
    differences: BTreeMap<String, (usize, String)>,
}

impl Tally {
    fn note(&mut self, pair: &Value, status: u16, answer: &Value) {
        self.all += 1;
        let recorded = pair.int_at("status").unwrap_or(0);
        let expected = &pair["answer"];
        let what = if i64::from(status) != recorded {
            format!("status {recorded} became {status} ({})", expected.str_at("reason"))
        } else {
            self.same_status += 1;
            match first_difference(expected, answer, "") {
                None => {
                    self.same_answer += 1;
                    return;
                }
                Some(path) => format!("differs at {path}"),
            }
        };
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
            "{name}: {} requests, {} statuses equal, {} answers equal",
            self.all, self.same_status, self.same_answer
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
    run("rich.jsonl", 795, 650).await;
}

#[tokio::test]
async fn fixtures_are_answered_as_upstream_did() {
    run("fixtures.jsonl", 910, 800).await;
}

#[tokio::test]
async fn sequences_are_answered_as_upstream_did() {
    run("seq.jsonl", 905, 550).await;
}
