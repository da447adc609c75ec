//! The node's HTTPS server, which the API server calls for logs, exec, attach, port-forward and figures.
//!
//! Invariant: nobody gets an answer without a client certificate of the cluster's CA in one of the allowed groups;
//! the handshake asks for it (the TLS configuration's business), [`auth`] looks at it.

mod auth;
mod figures;
mod logs;
mod streams;

use crate::context::NodeContext;
use crate::names;
use crate::pod::observe::Observed;
use anyhow::Context as _;
use bytes::Bytes;
use http::{Request, Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use k8s_openapi::api::core::v1::Pod;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;

/// Connections at a time; more wait.
const CONNECTIONS_MAX: usize = 1000;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// An accept that failed (no file descriptors left) is tried again after this.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

pub(crate) type Body = UnsyncBoxBody<Bytes, io::Error>;
/// An answer, or a status with a message.
pub(crate) type Answer = Result<Response<Body>, (StatusCode, String)>;

/// A bound address, not served yet.
pub struct Listener {
    tcp: TcpListener,
    tls: TlsAcceptor,
}

impl Listener {
    /// Takes the address. Fails when it is in use.
    pub async fn bind(address: SocketAddr, tls: Arc<rustls::ServerConfig>) -> anyhow::Result<Listener> {
        let tcp = TcpListener::bind(address).await;
        let tcp = tcp.with_context(|| {
            format!("listen on {address} for the API server; is another kubelet running?")
        })?;
        Ok(Listener { tcp, tls: tls.into() })
    }

    /// The address, with the port chosen by the system where 0 was asked for.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }
}

/// Serves until the task ends.
pub async fn serve(listener: Listener, context: Arc<NodeContext>) {
    let turns = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let turn = turns.clone().acquire_owned().await.expect("the semaphore is never closed");
        let stream = match listener.tcp.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "connection not accepted");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        while connections.try_join_next().is_some() {}
        let (tls, context) = (listener.tls.clone(), context.clone());
        connections.spawn(async move {
            let _turn = turn;
            if let Err(error) = connection(stream, tls, context).await {
                tracing::debug!(%error, "connection ended");
            }
        });
    }
}

async fn connection(stream: TcpStream, tls: TlsAcceptor, context: Arc<NodeContext>) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let stream = tokio::time::timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)).await??;
    let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let allowed = auth::is_allowed(certificates, &context.config.allowed_groups);
    let service = hyper::service::service_fn(move |request| {
        let context = context.clone();
        async move { Ok::<_, Infallible>(respond(request, context, allowed).await) }
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new());
    http.serve_connection(TokioIo::new(stream), service).with_upgrades().await?;
    Ok(())
}

async fn respond(request: Request<Incoming>, context: Arc<NodeContext>, allowed: bool) -> Response<Body> {
    if !allowed {
        return text(
            StatusCode::FORBIDDEN,
            "Forbidden: the client certificate is in no group that may use this node",
        );
    }
    match route(request, context).await {
        Ok(answer) => answer,
        Err((status, message)) => text(status, message),
    }
}

async fn route(request: Request<Incoming>, context: Arc<NodeContext>) -> Answer {
    let path = request.uri().path().to_owned();
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    match parts[..] {
        ["healthz"] | ["healthz", ..] => Ok(text(StatusCode::OK, "ok")),
        ["pods"] => figures::pods(&context),
        ["runningpods"] => figures::running_pods(&context).await,
        ["stats", "summary"] => figures::summary(&context).await,
        ["metrics"] => figures::metrics(&context),
        ["metrics", "resource"] => figures::resource_metrics(&context).await,
        ["containerLogs", namespace, pod, container] => {
            logs::container_logs(&context, namespace, pod, container, &Query::of(&request)).await
        }
        // With a uid in between, which older API servers send.
        ["exec", namespace, pod, container] | ["exec", namespace, pod, _, container] => {
            streams::exec(request, context, namespace, pod, container).await
        }
        ["attach", namespace, pod, container] | ["attach", namespace, pod, _, container] => {
            streams::attach(request, context, namespace, pod, container).await
        }
        ["portForward", namespace, pod] | ["portForward", namespace, pod, _] => {
            streams::port_forward(request, context, namespace, pod).await
        }
        _ => Err((StatusCode::NOT_FOUND, "404 page not found".to_owned())),
    }
}

pub(crate) fn text(status: StatusCode, text: impl Into<String>) -> Response<Body> {
    with_type(status, "text/plain; charset=utf-8", text.into().into_bytes())
}

pub(crate) fn json(value: &impl serde::Serialize) -> Answer {
    let bytes =
        serde_json::to_vec(value).map_err(|error| (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
    Ok(with_type(StatusCode::OK, "application/json", bytes))
}

fn with_type(status: StatusCode, kind: &'static str, bytes: Vec<u8>) -> Response<Body> {
    let mut answer = Response::new(full(bytes));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, http::HeaderValue::from_static(kind));
    answer
}

fn full(bytes: Vec<u8>) -> Body {
    Full::new(Bytes::from(bytes)).map_err(|never| match never {}).boxed_unsync()
}

/// A pod of this node.
fn find_pod(context: &NodeContext, namespace: &str, name: &str) -> Result<Arc<Pod>, (StatusCode, String)> {
    let found = context.pods.get(namespace, name);
    found.ok_or_else(|| (StatusCode::NOT_FOUND, format!("pod {:?} not found", format!("{name}_{namespace}"))))
}

async fn observe(context: &NodeContext, pod: &Pod) -> Result<Observed, (StatusCode, String)> {
    let observed = Observed::read(&*context.runtime, names::uid(pod)).await;
    observed.map_err(|error| (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))
}

/// Parameters of a request, decoded, in their order.
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    fn of<B>(request: &Request<B>) -> Query {
        Query::parse(request.uri().query().unwrap_or_default())
    }

    fn parse(text: &str) -> Query {
        let pairs = text.split('&').filter(|pair| !pair.is_empty());
        let pair = |pair: &str| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode(name), decode(value))
        };
        Query(pairs.map(pair).collect())
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(have, _)| have == name)
            .map(|(_, value)| value.as_str())
            .filter(|value| !value.is_empty())
    }

    fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(have, _)| have == name).map(|(_, value)| value.as_str())
    }

    fn flag(&self, name: &str) -> bool {
        matches!(self.get(name), Some("1" | "true"))
    }
}

/// Percent-decoding, with `+` for a blank.
fn decode(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'+' => out.push(b' '),
            b'%' => {
                let digits = [bytes.next(), bytes.next()]
                    .map(|digit| digit.map(char::from).and_then(|c| c.to_digit(16)));
                if let [Some(high), Some(low)] = digits {
                    out.push((high * 16 + low) as u8);
                }
            }
            byte => out.push(byte),
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_decoded() {
        let query = Query::parse("command=sh&command=-c&command=echo+a%26b%20c&tty=1&input=true&x");
        assert_eq!(query.all("command").collect::<Vec<_>>(), ["sh", "-c", "echo a&b c"]);
        assert!(query.flag("tty") && query.flag("input") && !query.flag("x"));
        assert_eq!(query.get("x"), None);
    }
}
