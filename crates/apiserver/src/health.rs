//! Health in upstream's words: `/healthz`, `/livez` and `/readyz`, whole or check by check, and the components that
//! `componentstatuses` tells of.
//!
//! Monitors and load balancers ask by upstream's names, so the store's check is called `etcd`. It fails for a while
//! after a write that the disk refused; that the server answers at all says the rest.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::request::Query;
use crate::respond::{self, Answer};

/// How long a failed write counts. Nodes renew their leases more often, so a broken disk shows all the time.
const FAILURE_COUNTS: Duration = Duration::from_secs(30);

/// What is known of the health of the server's parts.
#[derive(Default)]
pub struct Health {
    /// The last write that failed, and why.
    store: Mutex<Option<(Instant, String)>>,
    components: Arc<Mutex<BTreeMap<&'static str, u32>>>,
}

/// A component that runs as long as this is held.
pub struct Running {
    name: &'static str,
    components: Arc<Mutex<BTreeMap<&'static str, u32>>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(count) = self.components.lock().get_mut(self.name) {
            *count -= 1;
        }
    }
}

type Check = Result<(), String>;

impl Health {
    /// A write failed for the disk's sake.
    pub fn store_failed(&self, why: impl ToString) {
        *self.store.lock() = Some((Instant::now(), why.to_string()));
    }

    /// Tells of a component in this process: healthy while the answer is held, and not after.
    pub fn running(&self, name: &'static str) -> Running {
        *self.components.lock().entry(name).or_insert(0) += 1;
        Running { name, components: self.components.clone() }
    }

    fn store(&self) -> Check {
        match &*self.store.lock() {
            Some((at, why)) if at.elapsed() < FAILURE_COUNTS => Err(why.clone()),
            _ => Ok(()),
        }
    }

    fn check(&self, name: &str) -> Check {
        match name {
            "etcd" | "etcd-readiness" => self.store(),
            _ => Ok(()),
        }
    }

    /// All `ComponentStatus` objects, by name.
    pub fn components(&self) -> Vec<Value> {
        let components = self.components.lock();
        let running = components.iter().map(|(name, count)| {
            let state = if *count > 0 { Ok(()) } else { Err("stopped".to_owned()) };
            (*name, state)
        });
        let mut all: Vec<(&str, Check)> = running.chain([("etcd-0", self.store())]).collect();
        all.sort_by_key(|(name, _)| *name);
        all.into_iter().map(|(name, state)| component(name, state)).collect()
    }
}

fn component(name: &str, state: Check) -> Value {
    let condition = match state {
        Ok(()) => json!({ "type": "Healthy", "status": "True", "message": "ok" }),
        Err(why) => json!({ "type": "Healthy", "status": "False", "message": "", "error": why }),
    };
    json!({
        "kind": "ComponentStatus",
        "apiVersion": "v1",
        "metadata": { "name": name },
        "conditions": [condition],
    })
}

/// The checks behind an endpoint.
fn checks(endpoint: &str) -> &'static [&'static str] {
    match endpoint {
        "readyz" => &["ping", "log", "etcd", "etcd-readiness", "informer-sync", "shutdown"],
        _ => &["ping", "log", "etcd"],
    }
}

/// Answers for an endpoint, or for one check of it.
pub fn answer(health: &Health, endpoint: &str, check: &[&str], query: &Query) -> Answer {
    let checks = checks(endpoint);
    match check {
        [] => whole(health, endpoint, checks, query),
        [name] if checks.contains(name) => match health.check(name) {
            Ok(()) => respond::text(200, "ok"),
            Err(why) => respond::text(500, format!("internal server error: {why}\n")),
        },
        _ => respond::text(404, "404 page not found\n"),
    }
}

/// Plain `ok`, or a list with `?verbose` and whenever something is wrong.
fn whole(health: &Health, endpoint: &str, checks: &[&str], query: &Query) -> Answer {
    let excluded: Vec<&str> = query.all("exclude").iter().map(String::as_str).collect();
    let mut failed = false;
    let mut lines: String = checks
        .iter()
        .map(|check| match excluded.contains(check) {
            true => format!("[+]{check} excluded: ok\n"),
            false if health.check(check).is_ok() => format!("[+]{check} ok\n"),
            false => {
                failed = true;
                format!("[-]{check} failed: reason withheld\n")
            }
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
    if failed {
        return respond::text(500, format!("{lines}{endpoint} check failed\n"));
    }
    if query.get("verbose").is_none() {
        return respond::text(200, "ok");
    }
    respond::text(200, format!("{lines}{endpoint} check passed\n"))
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    async fn ask(health: &Health, endpoint: &str, check: &[&str]) -> (u16, String) {
        let answer = answer(health, endpoint, check, &Query::default());
        let status = answer.status().as_u16();
        let body = answer.into_body().collect().await.expect("a body").to_bytes();
        (status, String::from_utf8(body.to_vec()).expect("text"))
    }

    #[tokio::test]
    async fn a_disk_that_refuses_writes_is_told_of() {
        let health = Health::default();
        assert_eq!(ask(&health, "livez", &[]).await, (200, "ok".into()));
        health.store_failed("no space left on device");
        let (status, text) = ask(&health, "readyz", &[]).await;
        assert_eq!(status, 500);
        assert!(
            text.contains("[-]etcd failed: reason withheld\n") && text.ends_with("readyz check failed\n"),
            "{text}"
        );
        let one = ask(&health, "livez", &["etcd"]).await;
        assert_eq!(one, (500, "internal server error: no space left on device\n".into()));
        assert_eq!(ask(&health, "livez", &["ping"]).await.0, 200);
        assert_eq!(health.components()[0]["conditions"][0]["status"], "False");
    }

    #[test]
    fn a_component_is_healthy_while_it_runs() {
        let health = Health::default();
        let status =
            || health.components().iter().map(|c| c["conditions"][0]["status"].clone()).collect::<Vec<_>>();
        let scheduler = health.running("scheduler");
        assert_eq!(status(), ["True", "True"]);
        drop(scheduler);
        assert_eq!(status(), ["True", "False"]);
    }
}
