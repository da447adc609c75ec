//! Connections of the load generator: HTTP/1.1 over TLS and nothing else. On one machine what the load costs is taken
//! from the server it measures, and a Kubernetes client costs more than the answer to a `get`.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use http::{HeaderValue, Method, Request, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use kube::client::ConfigExt;
use kube::config::{Config, KubeConfigOptions, Kubeconfig};
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio_rustls::TlsConnector;

/// Where connections go, and how they prove who they are.
pub struct Server {
    address: String,
    name: ServerName<'static>,
    tls: TlsConnector,
}

/// One connection, which carries one request at a time. Clones share it.
#[derive(Clone)]
pub struct Connection {
    requests: Arc<Mutex<SendRequest<Full<Bytes>>>>,
    host: HeaderValue,
}

impl Server {
    /// The server of a kubeconfig; its user has to have a certificate.
    pub async fn of(kubeconfig: &Path) -> Result<Server> {
        let read = || format!("use kubeconfig {}", kubeconfig.display());
        let file = Kubeconfig::read_from(kubeconfig).with_context(read)?;
        let config =
            Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.with_context(read)?;
        let host = config.cluster_url.host().with_context(read)?.trim_matches(['[', ']']).to_owned();
        let mut tls = config.rustls_client_config().with_context(read)?;
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Server {
            address: match config.cluster_url.port_u16() {
                Some(port) => format!("{host}:{port}"),
                None => format!("{host}:443"),
            },
            name: ServerName::try_from(config.tls_server_name.unwrap_or(host)).with_context(read)?,
            tls: TlsConnector::from(Arc::new(tls)),
        })
    }

    pub async fn connect(&self) -> Result<Connection> {
        let step = || format!("connect to {}", self.address);
        let stream = TcpStream::connect(&self.address).await.with_context(step)?;
        stream.set_nodelay(true)?;
        let stream = self.tls.connect(self.name.clone(), stream).await.with_context(step)?;
        let (requests, connection) = handshake(TokioIo::new(stream)).await.with_context(step)?;
        tokio::spawn(connection);
        let host = HeaderValue::from_str(&self.address)?;
        Ok(Connection { requests: Arc::new(Mutex::new(requests)), host })
    }
}

impl Connection {
    /// Sends a request and reads the answer to its end, keeping nothing of it unless it is a refusal.
    pub async fn send(&self, method: Method, path: &str, body: String) -> Result<()> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, &self.host)
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::from(body))?;
        let mut requests = self.requests.lock().await;
        requests.ready().await?;
        let answer = requests.send_request(request).await?;
        let status = answer.status();
        let mut body = answer.into_body();
        let mut why = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame?;
            if let Some(data) = frame.data_ref().filter(|_| !status.is_success()) {
                why.extend_from_slice(data);
            }
        }
        ensure!(status.is_success(), "{status}: {}", String::from_utf8_lossy(&why));
        Ok(())
    }
}
