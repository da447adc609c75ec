//! Carrying requests: TLS over TCP for everybody, and straight calls for the loops of this process.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::BodyExt;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::api::{Api, Peer};
use crate::authn;
use crate::identity::User;
use crate::respond::{Answer, Body, WithoutOwners};

/// How long a client may take for the TLS handshake.
const HANDSHAKE_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);
/// Concurrent requests on one HTTP/2 connection; a client with many watches needs many.
const HTTP2_STREAMS_MAX: u32 = 1000;

/// Accepts connections until the future is dropped.
pub async fn serve(api: Arc<Api>, listener: TcpListener, tls: Arc<rustls::ServerConfig>) {
    let acceptor = TlsAcceptor::from(tls);
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of file descriptors, most likely: give others time to end.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        let (api, acceptor) = (api.clone(), acceptor.clone());
        tokio::spawn(async move {
            if let Err(error) = connection(api, stream, acceptor).await {
                tracing::debug!(%error, "a connection ended");
            }
        });
    }
}

async fn connection(
    api: Arc<Api>,
    stream: TcpStream,
    acceptor: TlsAcceptor,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    stream.set_nodelay(true)?;
    let stream = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await??;
    let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let peer = Arc::new(Peer::Remote(certificate.and_then(|c| authn::from_certificate(c))));
    let service = service_fn(move |request: Request<hyper::body::Incoming>| {
        let (api, peer) = (api.clone(), peer.clone());
        async move {
            let request = request.map(|body| body.map_err(std::io::Error::other).boxed_unsync());
            Ok::<_, Infallible>(api.handle(request, &peer).await)
        }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http2().max_concurrent_streams(HTTP2_STREAMS_MAX);
    builder.serve_connection_with_upgrades(TokioIo::new(stream), service).await
}

/// The API server as a service in this process, for one identity: no socket, no TLS, the same code path. Lists and
/// watches leave `managedFields` out.
#[derive(Clone)]
pub struct InProcess {
    api: Arc<Api>,
    peer: Arc<Peer>,
}

impl InProcess {
    pub fn new(api: Arc<Api>, user: User) -> Self {
        InProcess { api, peer: Arc::new(Peer::InProcess(user)) }
    }
}

impl<B> tower::Service<Request<B>> for InProcess
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Answer, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let (api, peer) = (self.api.clone(), self.peer.clone());
        let mut request = request.map(|body| body.map_err(std::io::Error::other).boxed_unsync());
        request.extensions_mut().insert(WithoutOwners);
        Box::pin(async move { Ok(api.handle(request, &peer).await) })
    }
}
