//! Health in upstream's words: `/healthz`, `/livez` and `/readyz`, whole or check by check.
//!
//! Monitors and load balancers ask by upstream's names, so the store's check is called `etcd`. The checks
//! pass while the server answers: store and server are one process.

use crate::request::Query;
use crate::respond::{self, Answer};

/// The checks behind an endpoint.
fn checks(endpoint: &str) -> &'static [&'static str] {
    match endpoint {
        "readyz" => &["ping", "log", "etcd", "etcd-readiness", "informer-sync", "shutdown"],
        _ => &["ping", "log", "etcd"],
    }
}

/// Answers for an endpoint, or for one check of it.
pub fn answer(endpoint: &str, check: &[&str], query: &Query) -> Answer {
    let checks = checks(endpoint);
    match check {
        [] => whole(endpoint, checks, query),
        [name] if checks.contains(name) => respond::text(200, "ok"),
        _ => respond::text(404, "404 page not found\n"),
    }
}

/// Plain `ok`, or a list with `?verbose`.
fn whole(endpoint: &str, checks: &[&str], query: &Query) -> Answer {
    if query.get("verbose").is_none() {
        return respond::text(200, "ok");
    }
    let excluded: Vec<&str> = query.all("exclude").iter().map(String::as_str).collect();
    let mut lines: String = checks
        .iter()
        .map(|check| match excluded.contains(check) {
            true => format!("[+]{check} excluded: ok\n"),
            false => format!("[+]{check} ok\n"),
        })
        .collect();
    let unknown: Vec<String> =
        excluded.iter().filter(|name| !checks.contains(*name)).map(|name| format!("{name:?}")).collect();
    if !unknown.is_empty() {
        lines.push_str(&format!(
            "warn: some health checks cannot be excluded: no matches for {}\n",
            unknown.join(",")
        ));
    }
    lines.push_str(&format!("{endpoint} check passed\n"));
    respond::text(200, lines)
}
