//! What probes and lifecycle hooks do: run a command, ask over HTTP, TCP or gRPC. Results and messages are
//! upstream's (`pkg/probe`).

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::{TokioExecutor, TokioIo};
use k8s_openapi::api::core::v1::{Container, GRPCAction, HTTPGetAction, Pod, TCPSocketAction};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use knarr_runtime::{Kind, Runtime};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use tokio::net::TcpStream;

/// Of an answer no more than this is read, and told.
const BODY_BYTES_MAX: usize = 10 * 1024;
const REDIRECTS_MAX: usize = 10;

/// Failed with a message for people, or could not be done at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Success,
    Failure(String),
    Unknown(String),
}

/// What is asked, of whom.
pub struct Target<'a> {
    pub runtime: &'a dyn Runtime,
    pub pod: &'a Pod,
    pub container: &'a Container,
    pub container_id: &'a str,
    /// Where HTTP and TCP go unless the action names a host.
    pub pod_ip: &'a str,
}

/// Runs a command in the container. A code other than zero is a failure; its output is the message.
pub async fn exec(target: &Target<'_>, command: &[String], timeout: Duration) -> Outcome {
    match target.runtime.exec_sync(target.container_id, command.to_vec(), timeout).await {
        Ok(answer) if answer.exit_code == 0 => Outcome::Success,
        Ok(answer) => {
            let mut output = answer.stdout;
            output.extend_from_slice(&answer.stderr);
            output.truncate(BODY_BYTES_MAX);
            Outcome::Failure(String::from_utf8_lossy(&output).into_owned())
        }
        Err(error) if error.kind == Kind::DeadlineExceeded => {
            let seconds = timeout.as_secs();
            Outcome::Failure(format!("command timed out: {:?} timed out after {seconds}s", command.join(" ")))
        }
        Err(error) => Outcome::Unknown(error.to_string()),
    }
}

/// A port by number or by its name in the container.
fn port(container: &Container, port: &IntOrString) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(number) => Some(*number),
        IntOrString::String(name) => {
            let ports = container.ports.iter().flatten();
            let named =
                ports.filter(|port| port.name.as_ref() == Some(name)).map(|port| port.container_port).next();
            named.or_else(|| name.parse().ok())
        }
    };
    let valid = number.and_then(|number| u16::try_from(number).ok()).filter(|number| *number > 0);
    valid.ok_or_else(|| {
        format!(
            "invalid port: {}",
            match port {
                IntOrString::Int(number) => number.to_string(),
                IntOrString::String(name) => name.clone(),
            }
        )
    })
}

fn join(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// Opens a connection; that is all.
pub async fn tcp(target: &Target<'_>, action: &TCPSocketAction, timeout: Duration) -> Outcome {
    let host = action.host.as_deref().filter(|host| !host.is_empty()).unwrap_or(target.pod_ip);
    let port = match port(target.container, &action.port) {
        Ok(port) => port,
        Err(error) => return Outcome::Unknown(error),
    };
    let address = join(host, port);
    match tokio::time::timeout(timeout, TcpStream::connect(&address)).await {
        Ok(Ok(_)) => Outcome::Success,
        Ok(Err(error)) => Outcome::Failure(dial_error(&address, &error)),
        Err(_) => Outcome::Failure(format!("dial tcp {address}: i/o timeout")),
    }
}

fn dial_error(address: &str, error: &std::io::Error) -> String {
    let cause = match error.kind() {
        std::io::ErrorKind::ConnectionRefused => "connect: connection refused".to_owned(),
        std::io::ErrorKind::HostUnreachable => "connect: no route to host".to_owned(),
        _ => error.to_string(),
    };
    format!("dial tcp {address}: {cause}")
}

/// A GET; statuses from 200 to 399 are a success. Redirects within the host are followed.
pub async fn http(target: &Target<'_>, action: &HTTPGetAction, timeout: Duration) -> Outcome {
    let request = match HttpRequest::new(target, action) {
        Ok(request) => request,
        Err(error) => return Outcome::Unknown(error),
    };
    let url = request.url();
    match tokio::time::timeout(timeout, request.follow()).await {
        Ok(Ok(status)) if (200..400).contains(&status) => Outcome::Success,
        Ok(Ok(status)) => Outcome::Failure(format!("HTTP probe failed with statuscode: {status}")),
        Ok(Err(error)) => Outcome::Failure(format!("Get {url:?}: {error}")),
        Err(_) => Outcome::Failure(format!(
            "Get {url:?}: context deadline exceeded (Client.Timeout exceeded while awaiting headers)"
        )),
    }
}

struct HttpRequest {
    tls: bool,
    host: String,
    port: u16,
    path: String,
    headers: Vec<(String, String)>,
}

impl HttpRequest {
    fn new(target: &Target<'_>, action: &HTTPGetAction) -> Result<Self, String> {
        let host = action.host.as_deref().filter(|host| !host.is_empty()).unwrap_or(target.pod_ip);
        let mut path = action.path.clone().unwrap_or_default();
        if !path.starts_with('/') {
            path.insert(0, '/');
        }
        let headers = action.http_headers.iter().flatten();
        Ok(HttpRequest {
            tls: action.scheme.as_deref().is_some_and(|scheme| scheme.eq_ignore_ascii_case("https")),
            host: host.to_owned(),
            port: port(target.container, &action.port)?,
            path,
            headers: headers.map(|header| (header.name.clone(), header.value.clone())).collect(),
        })
    }

    fn address(&self) -> String {
        join(&self.host, self.port)
    }

    fn url(&self) -> String {
        let scheme = if self.tls { "https" } else { "http" };
        format!("{scheme}://{}{}", self.address(), self.path)
    }

    async fn follow(mut self) -> Result<u16, String> {
        for _ in 0..REDIRECTS_MAX {
            let (status, location) = self.send().await?;
            let next = location.filter(|_| (300..400).contains(&status));
            let Some(path) = next.and_then(|location| self.same_host(&location)) else { return Ok(status) };
            self.path = path;
        }
        Err(format!("stopped after {REDIRECTS_MAX} redirects"))
    }

    /// The path of a redirect that stays with the host; one that leaves it counts as a success.
    fn same_host(&self, location: &str) -> Option<String> {
        let uri: http::Uri = location.parse().ok()?;
        let here = uri.host().is_none_or(|host| host == self.host)
            && uri.port_u16().is_none_or(|port| port == self.port)
            && uri.scheme_str().is_none_or(|scheme| (scheme == "https") == self.tls);
        here.then(|| uri.path_and_query().map_or("/".to_owned(), ToString::to_string))
    }

    async fn send(&self) -> Result<(u16, Option<String>), String> {
        let address = self.address();
        let stream = TcpStream::connect(&address).await.map_err(|error| dial_error(&address, &error))?;
        if !self.tls {
            return self.talk(TokioIo::new(stream)).await;
        }
        let name = ServerName::try_from(self.host.clone()).map_err(|error| error.to_string())?;
        let stream = tokio_rustls::TlsConnector::from(UNVERIFIED.clone()).connect(name, stream).await;
        self.talk(TokioIo::new(stream.map_err(|error| error.to_string())?)).await
    }

    async fn talk<I>(&self, io: I) -> Result<(u16, Option<String>), String>
    where
        I: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
    {
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(io).await.map_err(|error| error.to_string())?;
        let connection = AbortOnDrop(tokio::spawn(async move {
            let _ = connection.await;
        }));
        let mut request = http::Request::get(&self.path).header("connection", "close");
        let given = |name: &str| self.headers.iter().any(|(have, _)| have.eq_ignore_ascii_case(name));
        for (name, value) in
            [("host", self.address().as_str()), ("user-agent", "kube-probe/1.36"), ("accept", "*/*")]
        {
            if !given(name) {
                request = request.header(name, value);
            }
        }
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        let request = request.body(Full::<Bytes>::default()).map_err(|error| error.to_string())?;
        let answer = sender.send_request(request).await.map_err(|error| error.to_string())?;
        let location = answer.headers().get(http::header::LOCATION).and_then(|value| value.to_str().ok());
        let result = (answer.status().as_u16(), location.map(str::to_owned));
        // Read so that the server is not cut off in the middle of an answer; what is too long is left.
        let _ = Limited::new(answer.into_body(), BODY_BYTES_MAX).collect().await;
        drop(connection);
        Ok(result)
    }
}

struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// `grpc.health.v1.Health/Check`: success when the service says SERVING.
pub async fn grpc(target: &Target<'_>, action: &GRPCAction, timeout: Duration) -> Outcome {
    let Ok(port) = u16::try_from(action.port) else {
        return Outcome::Unknown(format!("invalid port: {}", action.port));
    };
    let address = join(target.pod_ip, port);
    let service = action.service.clone().unwrap_or_default();
    match tokio::time::timeout(timeout, check(&address, &service)).await {
        Ok(Ok(1)) => Outcome::Success,
        Ok(Ok(status)) => {
            let name = ["UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN"].get(status as usize);
            let name = name.copied().unwrap_or("UNKNOWN");
            Outcome::Failure(format!("service unhealthy (responded with {name:?})"))
        }
        Ok(Err(error)) => Outcome::Failure(error),
        Err(_) => {
            let seconds = timeout.as_secs();
            Outcome::Failure(format!("timeout: health rpc did not complete within {seconds}s"))
        }
    }
}

async fn check(address: &str, service: &str) -> Result<u64, String> {
    let failed =
        |error: &dyn std::fmt::Display| format!("timeout: failed to connect service {address:?}: {error}");
    let stream = TcpStream::connect(address).await.map_err(|error| failed(&dial_error(address, &error)))?;
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .map_err(|error| failed(&error))?;
    let _connection = AbortOnDrop(tokio::spawn(async move {
        let _ = connection.await;
    }));
    let request = http::Request::post(format!("http://{address}/grpc.health.v1.Health/Check"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("user-agent", "kube-probe/1.36")
        .body(Full::new(health_request(service)))
        .map_err(|error| failed(&error))?;
    let answer = sender.send_request(request).await.map_err(|error| failed(&error))?;
    let (parts, body) = answer.into_parts();
    let body = Limited::new(body, BODY_BYTES_MAX).collect().await.map_err(|error| error.to_string())?;
    let trailer = |name: &str| {
        let value = body.trailers().and_then(|trailers| trailers.get(name)).or(parts.headers.get(name));
        value.and_then(|value| value.to_str().ok()).map(str::to_owned)
    };
    match trailer("grpc-status").as_deref() {
        None | Some("0") => {
            health_status(&body.to_bytes()).ok_or_else(|| "malformed health answer".to_owned())
        }
        Some("12") => {
            Err("error: this server does not implement the grpc health protocol (grpc.health.v1.Health)"
                .into())
        }
        Some(code) => {
            let message = trailer("grpc-message").unwrap_or_default();
            Err(format!("error: health rpc failed: rpc error: code = {code} desc = {message}"))
        }
    }
}

/// A length-prefixed `HealthCheckRequest`: field 1 is the service.
fn health_request(service: &str) -> Bytes {
    let mut message = Vec::new();
    if !service.is_empty() {
        message.push(0x0a);
        let mut length = service.len();
        while length >= 0x80 {
            message.push((length as u8 & 0x7f) | 0x80);
            length >>= 7;
        }
        message.push(length as u8);
        message.extend_from_slice(service.as_bytes());
    }
    let mut frame = vec![0];
    frame.extend_from_slice(&(message.len() as u32).to_be_bytes());
    frame.extend(message);
    frame.into()
}

/// Field 1 of `HealthCheckResponse`; absent means 0, UNKNOWN.
fn health_status(frame: &[u8]) -> Option<u64> {
    match frame.get(5..)? {
        [] => Some(0),
        [0x08, value, ..] => Some(u64::from(*value)),
        _ => None,
    }
}

/// Probes do not check certificates: what is asked is whether the pod answers, not who it is.
#[derive(Debug)]
struct AnyCertificate(Arc<rustls::crypto::CryptoProvider>);

static UNVERIFIED: LazyLock<Arc<rustls::ClientConfig>> = LazyLock::new(|| {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .expect("ring has the default versions")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
        .with_no_client_auth();
    Arc::new(config)
});

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(
            message,
            cert,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            cert,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Runs a lifecycle hook; the error is the message of the event.
pub async fn hook(
    target: &Target<'_>,
    handler: &k8s_openapi::api::core::v1::LifecycleHandler,
) -> Result<(), String> {
    // Hooks have no time limit of their own: the grace period, or the end of the container, is theirs.
    let forever = Duration::from_secs(365 * 24 * 3600);
    let outcome = if let Some(action) = &handler.exec {
        exec(target, action.command.as_deref().unwrap_or_default(), Duration::ZERO).await
    } else if let Some(action) = &handler.http_get {
        http(target, action, forever).await
    } else if let Some(action) = &handler.tcp_socket {
        tcp(target, action, forever).await
    } else if let Some(action) = &handler.sleep {
        tokio::time::sleep(Duration::from_secs(action.seconds.max(0) as u64)).await;
        Outcome::Success
    } else {
        return Err("the hook names no action".to_owned());
    };
    match outcome {
        Outcome::Success => Ok(()),
        Outcome::Failure(message) | Outcome::Unknown(message) => Err(message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn health_messages_are_framed() {
        assert_eq!(&health_request("")[..], [0, 0, 0, 0, 0]);
        assert_eq!(&health_request("ab")[..], [0, 0, 0, 0, 4, 0x0a, 2, b'a', b'b']);
        assert_eq!(health_status(&[0, 0, 0, 0, 2, 0x08, 1]), Some(1));
        assert_eq!(health_status(&[0, 0, 0, 0, 0]), Some(0));
    }

    #[test]
    fn ports_are_found_by_name() {
        let container = serde_json::json!({"name": "c", "ports": [{"name": "web", "containerPort": 8080}]});
        let container: Container = serde_json::from_value(container).unwrap();
        assert_eq!(port(&container, &IntOrString::String("web".into())), Ok(8080));
        assert_eq!(port(&container, &IntOrString::Int(80)), Ok(80));
        assert!(port(&container, &IntOrString::String("none".into())).is_err());
    }
}
