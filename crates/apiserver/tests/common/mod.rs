//! An API server in memory, and requests to it as a client would send them.
#![allow(dead_code, reason = "not every test file uses everything here")]

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, Request};
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

pub struct Reply {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("no json: {:?}", self.body))
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default()
    }

    pub fn warnings(&self) -> Vec<String> {
        self.headers.get_all("warning").iter().map(|v| v.to_str().expect("text").to_owned()).collect()
    }
}

/// Commits at once, in the caller's thread: nothing races.
pub async fn server() -> Api {
    server_with("10.96.0.0/16").await
}

/// With these ranges of service addresses.
pub async fn server_with(ranges: &str) -> Api {
    let store = Embedded::open_inline(Memory::default(), Options::default()).expect("opens");
    server_on_with(Arc::new(store), ranges).await
}

/// A server on what an earlier one left.
pub async fn server_after(memory: &Memory) -> Api {
    server_on(Arc::new(Embedded::open_inline(memory.clone(), Options::default()).expect("opens"))).await
}

/// Commits in groups, in a thread of its own, as on a disk.
pub async fn racing_server() -> Api {
    server_on(Arc::new(Embedded::open(Memory::default(), Options::default()).expect("opens"))).await
}

pub async fn server_on(store: Arc<dyn Store>) -> Api {
    server_on_with(store, "10.96.0.0/16").await
}

/// On this store, with these ranges of service addresses.
pub async fn server_on_with(store: Arc<dyn Store>, ranges: &str) -> Api {
    let registry = Arc::new(Registry {
        store: store.clone(),
        schema: Schema::builtin(),
        services: Allocator::load(store.as_ref(), ranges.parse().expect("ranges"), 30_000..=32_767),
        quotas: Default::default(),
        health: Default::default(),
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
    if registry.lookup("", "serviceaccounts", "default", "default").is_none() {
        registry.create(kind, "default", account, &context).await.expect("creates");
    }
    Api {
        rbac: Rbac::new(store),
        registry,
        tokens: Arc::new(tokens),
        dialer: Dialer::new(Arc::new(client)),
        address: "192.0.2.2:6443".into(),
        old_versions: true,
    }
}

/// Sends a request as an administrator; the headers are `name: value` pairs.
pub async fn send(
    api: &Api,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: impl Into<Bytes>,
) -> Reply {
    Client::admin(api).ask(method, path, headers, body).await
}

pub async fn get(api: &Api, path: &str) -> Reply {
    send(api, "GET", path, &[], "").await
}

pub async fn post(api: &Api, path: &str, object: &Value) -> Reply {
    send(api, "POST", path, &[("content-type", "application/json")], object.to_string()).await
}

/// One answer: status and body.
pub type Answer = (u16, Value);

/// A client with an identity.
pub struct Client<'a> {
    pub api: &'a Api,
    pub peer: Peer,
}

impl<'a> Client<'a> {
    pub fn admin(api: &'a Api) -> Self {
        Self::named(api, "admin", &["system:masters"])
    }

    pub fn named(api: &'a Api, name: &str, groups: &[&str]) -> Self {
        Client { api, peer: Peer::InProcess(User::new(name, groups)) }
    }

    pub async fn ask(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Reply {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(full(body.into())).expect("a request");
        let (parts, body) = self.api.handle(request, &self.peer).await.into_parts();
        let body = body.collect().await.expect("a body").to_bytes();
        Reply { status: parts.status.as_u16(), headers: parts.headers, body }
    }

    pub async fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
        let reply = self.ask(method, path, headers, body.to_owned()).await;
        let text = String::from_utf8_lossy(&reply.body);
        (reply.status, serde_json::from_str(&text).unwrap_or_else(|_| json!({ "_text": text })))
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], "").await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send("POST", path, &[("content-type", "application/json")], &body.to_string()).await
    }

    pub async fn put(&self, path: &str, body: &Value) -> Answer {
        self.send("PUT", path, &[("content-type", "application/json")], &body.to_string()).await
    }

    pub async fn patch(&self, path: &str, body: &Value) -> Answer {
        let headers = [("content-type", "application/merge-patch+json")];
        self.send("PATCH", path, &headers, &body.to_string()).await
    }

    pub async fn delete(&self, path: &str) -> Answer {
        self.send("DELETE", path, &[], "").await
    }

    /// Creates, and insists.
    pub async fn create(&self, path: &str, body: &Value) -> Value {
        let (status, answer) = self.post(path, body).await;
        assert_eq!(status, 201, "{path}: {answer}");
        answer
    }
}

/// A watch that says nothing for so long has missed something.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(20);

/// The events of a watch, one at a time.
pub struct Events {
    body: knarr_apiserver::respond::Body,
    buffer: Vec<u8>,
}

impl Events {
    pub async fn open(api: &Api, path: &str) -> Self {
        let admin = Client::admin(api);
        let request = Request::builder().uri(path).body(full(String::new())).expect("a request");
        let answer = api.handle(request, &admin.peer).await;
        assert_eq!(answer.status(), 200, "{path}");
        Events { body: answer.into_body(), buffer: Vec::new() }
    }

    pub async fn next(&mut self) -> (String, Value) {
        loop {
            if let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                let event: Value = serde_json::from_slice(&line).expect("an event is json");
                return (event.str_at("type").to_owned(), event["object"].clone());
            }
            let frame = tokio::time::timeout(PATIENCE, self.body.frame()).await;
            let frame = frame.expect("another event").expect("the watch goes on").expect("a frame");
            self.buffer.extend(frame.into_data().expect("data"));
        }
    }
}
