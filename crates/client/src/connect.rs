//! Building a `kube::Client`: from a kubeconfig for remote use, or from any tower service for use inside the
//! process that serves the API.

use anyhow::Context;
use kube::client::Body;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use std::path::Path;
use tower::{BoxError, Service};

/// A client for the cluster of `context` (or the current one) in the kubeconfig at `path`.
pub async fn from_kubeconfig(path: &Path, context: Option<&str>) -> anyhow::Result<Client> {
    let kubeconfig =
        Kubeconfig::read_from(path).with_context(|| format!("read kubeconfig {}", path.display()))?;
    let options = KubeConfigOptions { context: context.map(str::to_owned), ..Default::default() };
    let config = Config::from_custom_kubeconfig(kubeconfig, &options)
        .await
        .with_context(|| format!("use kubeconfig {}", path.display()))?;
    Client::try_from(config).context("build a client from the kubeconfig")
}

/// A client whose requests go straight into `service`, without sockets. Who the caller is, the service decides:
/// give each component a service that carries its identity.
pub fn in_process<S, B>(service: S) -> Client
where
    S: Service<http::Request<Body>, Response = http::Response<B>> + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Into<BoxError>,
    B: http_body::Body<Data = bytes::Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    Client::new(service, "default")
}
