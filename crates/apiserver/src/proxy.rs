//! Passing requests on: to kubelets for logs and streams, to pods, services and nodes for `proxy`.
//!
//! Streams (exec, attach, port-forward) are upgraded connections, SPDY or WebSocket; the server does not
//! look inside, it joins the two ends.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, Request, StatusCode, Uri, header};
use http_body_util::BodyExt;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use knarr_api::object::Object;
use knarr_api::status::{Result, Status};
use rustls::pki_types::ServerName;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use crate::registry::Registry;
use crate::request::{Query, Target};
use crate::respond::{Answer, Body, full};

/// How long the other side may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The kubelet's port where a node does not say.
const KUBELET_PORT: u16 = 10_250;

/// Marks a Node that no machine stands behind; see the crate `simulated`.
pub const SIMULATED_NODE: &str = "simulated.knarr.dev/node";

/// Opens connections to kubelets, with the API server's own certificate.
pub struct Dialer {
    kubelets: tokio_rustls::TlsConnector,
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Where a request goes on to.
struct Upstream {
    address: (String, u16),
    tls: Option<tokio_rustls::TlsConnector>,
    path_and_query: String,
    host: String,
}

impl Dialer {
    /// `client` presents the API server's certificate and trusts the cluster's CA.
    pub fn new(client: Arc<rustls::ClientConfig>) -> Dialer {
        Dialer { kubelets: client.into() }
    }

    /// `pods/{log,exec,attach,portforward}`.
    pub async fn pod_stream(
        &self,
        registry: &Registry,
        target: &Target,
        query: &Query,
        request: Request<Body>,
    ) -> Result<Answer> {
        let pod = find(registry, "pods", &target.namespace, &target.name)?;
        let container = container_of(&pod, &target.subresource, query)?;
        let node = pod.str_at("spec.nodeName");
        if node.is_empty() {
            if target.subresource == "log" {
                return Ok(crate::respond::text(200, ""));
            }
            return Err(Status::bad_request(format!("pod {} does not have a host assigned", pod.name())));
        }
        let (namespace, name) = (&target.namespace, &target.name);
        let path = match target.subresource.as_str() {
            "log" => format!("/containerLogs/{namespace}/{name}/{container}?{}", log_options(query)?),
            "exec" => format!("/exec/{namespace}/{name}/{container}?{}", stream_options(query, true)?),
            "attach" => format!("/attach/{namespace}/{name}/{container}?{}", stream_options(query, false)?),
            _ => {
                let ports: Vec<String> = query.all("ports").iter().map(|p| format!("port={p}")).collect();
                format!("/portForward/{namespace}/{name}?{}", ports.join("&"))
            }
        };
        let upstream = self.kubelet(registry, node, path)?;
        forward(upstream, request).await
    }

    /// `nodes/NAME/proxy/...`, `pods/NAME[:PORT]/proxy/...`, `services/[SCHEME:]NAME[:PORT]/proxy/...`.
    pub async fn proxy(
        &self,
        registry: &Registry,
        target: &Target,
        request: Request<Body>,
    ) -> Result<Answer> {
        let mut path = format!("/{}", target.rest);
        if request.uri().path().ends_with('/') && !path.ends_with('/') {
            path.push('/');
        }
        if let Some(query) = request.uri().query() {
            path = format!("{path}?{query}");
        }
        let (scheme, name, port) = split_name(&target.name);
        let upstream = match target.resource.as_str() {
            "nodes" => self.kubelet(registry, name, path)?,
            "pods" => {
                let pod = find(registry, "pods", &target.namespace, name)?;
                let port = port.map_or_else(|| first_port(&pod), |p| named_port(&pod, p))?;
                plain(pod_address(&pod)?, port, scheme, path)?
            }
            _ => {
                let (address, port) = endpoint(registry, &target.namespace, name, port)?;
                plain(address, port, scheme, path)?
            }
        };
        forward(upstream, request).await
    }

    fn kubelet(&self, registry: &Registry, node: &str, path_and_query: String) -> Result<Upstream> {
        let found = find(registry, "nodes", "", node)?;
        if found.map_at("metadata.labels").is_some_and(|labels| labels.contains_key(SIMULATED_NODE)) {
            return Err(Status::bad_request(format!(
                "node {node:?} is simulated: its pods have no containers, so there is nothing to read logs from, run commands in or connect to"
            )));
        }
        let addresses = found.list_at("status.addresses");
        let address = ["InternalIP", "ExternalIP", "Hostname"]
            .iter()
            .find_map(|kind| addresses.iter().find(|a| a.str_at("type") == *kind))
            .map(|a| a.str_at("address").to_owned())
            .ok_or_else(|| Status::service_unavailable(format!("node {node:?} has no address yet")))?;
        let port = found.int_at("status.daemonEndpoints.kubeletEndpoint.Port");
        let port = port.and_then(|p| u16::try_from(p).ok()).filter(|p| *p != 0).unwrap_or(KUBELET_PORT);
        let host = format!("{address}:{port}");
        Ok(Upstream { address: (address, port), tls: Some(self.kubelets.clone()), path_and_query, host })
    }
}

fn plain(address: String, port: u16, scheme: &str, path_and_query: String) -> Result<Upstream> {
    if scheme == "https" {
        return Err(Status::bad_request(
            "proxying to https ports is not supported yet; use http or port-forward",
        ));
    }
    let host = format!("{address}:{port}");
    Ok(Upstream { address: (address, port), tls: None, path_and_query, host })
}

fn find(registry: &Registry, plural: &str, namespace: &str, name: &str) -> Result<Value> {
    let kind = registry.schema.resource("", "v1", plural).expect("pods, nodes and services are built in");
    registry.lookup("", plural, namespace, name).ok_or_else(|| Status::not_found(kind, name))
}

/// `https:web:443` is scheme, name and port; `web:80` name and port.
fn split_name(name: &str) -> (&str, &str, Option<&str>) {
    match name.split(':').collect::<Vec<_>>()[..] {
        [name, port] => ("http", name, Some(port).filter(|p| !p.is_empty())),
        [scheme, name, port] => {
            (if scheme.is_empty() { "http" } else { scheme }, name, Some(port).filter(|p| !p.is_empty()))
        }
        _ => ("http", name, None),
    }
}

fn pod_address(pod: &Value) -> Result<String> {
    match pod.str_at("status.podIP") {
        "" => Err(Status::service_unavailable(format!("pod {:?} has no address yet", pod.name()))),
        ip => Ok(ip.to_owned()),
    }
}

fn first_port(pod: &Value) -> Result<u16> {
    let ports = pod.list_at("spec.containers").iter().flat_map(|c| c.list_at("ports"));
    let first = ports.filter_map(|p| p.int_at("containerPort")).next().unwrap_or(80);
    u16::try_from(first).map_err(|_| Status::bad_request(format!("invalid port {first}")))
}

fn named_port(pod: &Value, port: &str) -> Result<u16> {
    if let Ok(number) = port.parse() {
        return Ok(number);
    }
    let mut ports = pod.list_at("spec.containers").iter().flat_map(|c| c.list_at("ports"));
    let found = ports.find(|p| p.str_at("name") == port).and_then(|p| p.int_at("containerPort"));
    found
        .and_then(|n| u16::try_from(n).ok())
        .ok_or_else(|| Status::bad_request(format!("no port named {port:?}")))
}

/// A ready endpoint of the service.
fn endpoint(registry: &Registry, namespace: &str, name: &str, port: Option<&str>) -> Result<(String, u16)> {
    let service = find(registry, "services", namespace, name)?;
    let ports = service.list_at("spec.ports");
    let matches = |p: &&Value| match port {
        None => true,
        Some(text) => p.str_at("name") == text || p.int_at("port").is_some_and(|n| n.to_string() == text),
    };
    let port = ports.iter().find(matches).ok_or_else(|| {
        Status::service_unavailable(format!(
            "no service port {:?} found for service {name:?}",
            port.unwrap_or("")
        ))
    })?;
    let endpoints = registry.lookup("", "endpoints", namespace, name).unwrap_or(Value::Null);
    for subset in endpoints.list_at("subsets") {
        let number = subset.list_at("ports").iter().find(|p| p.str_at("name") == port.str_at("name"));
        let addresses = subset.list_at("addresses");
        if let (Some(number), false) = (number.and_then(|p| p.int_at("port")), addresses.is_empty()) {
            let chosen = &addresses[rand::random_range(0..addresses.len())];
            return Ok((chosen.str_at("ip").to_owned(), number as u16));
        }
    }
    Err(Status::service_unavailable(format!("no endpoints available for service {name:?}")))
}

/// The container meant, by name or because there is only one; annotated default first, as kubectl has it.
fn container_of(pod: &Value, subresource: &str, query: &Query) -> Result<String> {
    if subresource == "portforward" {
        return Ok(String::new());
    }
    let names = |list: &str| -> Vec<&str> { pod.list_at(list).iter().map(|c| c.str_at("name")).collect() };
    let (main, init) = (names("spec.containers"), names("spec.initContainers"));
    let ephemeral = names("spec.ephemeralContainers");
    match query.get("container").filter(|c| !c.is_empty()) {
        Some(name) => {
            if main.iter().chain(&init).chain(&ephemeral).any(|n| *n == name) {
                return Ok(name.to_owned());
            }
            Err(Status::bad_request(format!("container {name} is not valid for pod {}", pod.name())))
        }
        None => match main[..] {
            [one] => Ok(one.to_owned()),
            _ => {
                let mut text = format!(
                    "a container name must be specified for pod {}, choose one of: [{}]",
                    pod.name(),
                    main.join(" ")
                );
                if !init.is_empty() {
                    text.push_str(&format!(" or one of the init containers: [{}]", init.join(" ")));
                }
                Err(Status::bad_request(text))
            }
        },
    }
}

/// The options a kubelet understands, under its names.
fn log_options(query: &Query) -> Result<String> {
    let mut options = Vec::new();
    for name in ["follow", "previous", "timestamps"] {
        if query.flag(name) {
            options.push(format!("{name}=true"));
        }
    }
    for (name, minimum) in [("tailLines", 0), ("sinceSeconds", 1), ("limitBytes", 1)] {
        if let Some(number) = query.number(name)? {
            if number < minimum {
                let text = format!(
                    "PodLogOptions \"\" is invalid: {name}: Invalid value: {number}: must be greater than or equal to {minimum}"
                );
                return Err(Status::new(422, "Invalid", text));
            }
            options.push(format!("{name}={number}"));
        }
    }
    for name in ["sinceTime", "stream"] {
        if let Some(value) = query.get(name) {
            options.push(format!("{name}={}", escape(value)));
        }
    }
    Ok(options.join("&"))
}

fn stream_options(query: &Query, with_command: bool) -> Result<String> {
    let mut options = Vec::new();
    for (from, to) in [("stdin", "input"), ("stdout", "output"), ("stderr", "error"), ("tty", "tty")] {
        if query.flag(from) {
            options.push(format!("{to}=1"));
        }
    }
    if options.iter().all(|o| o == "tty=1") {
        return Err(Status::bad_request("you must specify at least 1 of stdin, stdout, stderr"));
    }
    if with_command {
        let commands = query.all("command");
        if commands.is_empty() {
            return Err(Status::bad_request("you must specify at least one command for the container"));
        }
        options.extend(commands.iter().map(|c| format!("command={}", escape(c))));
    }
    Ok(options.join("&"))
}

/// Percent-encodes everything that is not plainly safe in a query.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(byte as char),
            other => out.push_str(&format!("%{other:02X}")),
        }
    }
    out
}

const HOP_BY_HOP: [HeaderName; 6] = [
    header::AUTHORIZATION,
    header::HOST,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
];

async fn forward(upstream: Upstream, mut request: Request<Body>) -> Result<Answer> {
    let unreachable = |what: &str, e: &dyn std::fmt::Display| {
        Status::new(502, "BadGateway", format!("error trying to reach {}: {what}: {e}", upstream.host))
    };
    let (host, port) = (upstream.address.0.as_str(), upstream.address.1);
    let connect = tokio::time::timeout(CONNECT_TIMEOUT, connect(host, port));
    let tcp = match connect.await {
        Ok(result) => result.map_err(|e| unreachable("dial tcp", &e))?,
        Err(_) => return Err(unreachable("dial tcp", &"i/o timeout")),
    };
    let stream: Box<dyn Stream> = match &upstream.tls {
        None => Box::new(tcp),
        Some(tls) => {
            let name = ServerName::try_from(host.to_owned()).map_err(|e| unreachable("tls", &e))?;
            Box::new(tls.connect(name, tcp).await.map_err(|e| unreachable("tls", &e))?)
        }
    };
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|e| unreachable("http", &e))?;
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "a proxied connection ended");
        }
    });
    let client = hyper::upgrade::on(&mut request);
    let upgrading = request.headers().contains_key(header::UPGRADE);
    let (mut parts, body) = request.into_parts();
    parts.version = http::Version::HTTP_11;
    parts.uri = upstream.path_and_query.parse::<Uri>().map_err(|e| Status::bad_request(e.to_string()))?;
    HOP_BY_HOP.iter().for_each(|name| drop(parts.headers.remove(name)));
    let value = upstream.host.parse().map_err(|_| Status::bad_request("the host is no header value"))?;
    parts.headers.insert(header::HOST, value);
    let mut response =
        sender.send_request(Request::from_parts(parts, body)).await.map_err(|e| unreachable("http", &e))?;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS && upgrading {
        let server = hyper::upgrade::on(&mut response);
        tokio::spawn(join(client, server));
        let (parts, _) = response.into_parts();
        return Ok(Answer::from_parts(parts, full("")));
    }
    let (mut parts, body) = response.into_parts();
    // Hop-by-hop: hyper decides anew for this side, which may be HTTP/2.
    for name in [header::CONNECTION, header::TRANSFER_ENCODING] {
        parts.headers.remove(name);
    }
    // The connection lives as long as its body is read.
    let body = body.map_err(std::io::Error::other).boxed_unsync();
    Ok(Answer::from_parts(parts, body))
}

async fn connect(host: &str, port: u16) -> std::io::Result<TcpStream> {
    let stream = match host.parse() {
        Ok(ip) => TcpStream::connect(SocketAddr::new(ip, port)).await?,
        Err(_) => TcpStream::connect((host, port)).await?,
    };
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Copies both ways until both ends are done.
async fn join(client: hyper::upgrade::OnUpgrade, server: hyper::upgrade::OnUpgrade) {
    let result = async {
        let (client, server) = tokio::try_join!(client, server).map_err(std::io::Error::other)?;
        let (mut client, mut server) = (TokioIo::new(client), TokioIo::new(server));
        tokio::io::copy_bidirectional(&mut client, &mut server).await
    };
    if let Err(error) = result.await {
        tracing::debug!(%error, "a stream ended");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proxy_names_carry_scheme_and_port() {
        assert_eq!(split_name("web"), ("http", "web", None));
        assert_eq!(split_name("web:80"), ("http", "web", Some("80")));
        assert_eq!(split_name("https:web:443"), ("https", "web", Some("443")));
        assert_eq!(split_name(":web:http"), ("http", "web", Some("http")));
    }

    #[test]
    fn options_are_renamed_for_the_kubelet() {
        let query = Query::parse("command=sh&command=-c&command=echo+1&stdin=true&stdout=true&tty=true");
        assert_eq!(
            stream_options(&query, true),
            Ok("input=1&output=1&tty=1&command=sh&command=-c&command=echo%201".to_owned())
        );
        assert!(stream_options(&Query::parse("command=sh"), true).is_err());
    }
}
