//! Pulling images from registries: `oci-client` speaks to them, layers are unpacked while they arrive, several at a
//! time. Mirrors are tried before the registry itself.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::stream::{self, StreamExt, TryStreamExt};
use k8s_cri::v1;
use oci_client::client::{Client, ClientConfig, ClientProtocol};
use oci_client::errors::{OciDistributionError, OciErrorCode};
use oci_client::secrets::RegistryAuth;
use tokio_util::io::{StreamReader, SyncIoBridge};

use super::manifest::{
    Config, DOCKER_INDEX, DOCKER_MANIFEST, DOCUMENT_BYTES_MAX, Descriptor, Index, Manifest, OCI_INDEX,
    OCI_MANIFEST, select,
};
use super::reference::Reference;
use super::store::{ImageStore, Names, digest_of};
use crate::error::{Error, Kind, Result};

/// Layers fetched at once.
const LAYERS_AT_ONCE: usize = 3;
/// A registry that is silent for so long is given up.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);

/// How registries are reached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RegistryConfig {
    /// Mirrors by registry (`docker.io`), tried in order before the registry itself. `host` or `host:port`, with
    /// `http://` before it for one without TLS.
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// Registries without TLS. Those on loopback addresses are always included.
    pub insecure: Vec<String>,
}

/// Pulls the image for this machine and records it under its name. Returns its id. When the registry's manifest is
/// one we have with all its layers, only the manifest is fetched.
pub async fn pull(
    store: &ImageStore,
    config: &RegistryConfig,
    reference: &Reference,
    auth: Option<&v1::AuthConfig>,
) -> Result<String> {
    let auth = registry_auth(auth)?;
    let mirrors = config.mirrors.get(&reference.registry).map(Vec::as_slice).unwrap_or_default();
    let own = reference.registry.clone();
    let hosts = mirrors.iter().map(|mirror| (mirror.clone(), true)).chain([(own, false)]);
    let mut last = None;
    for (host, is_mirror) in hosts {
        // Credentials are for the registry they were given for.
        let auth = if is_mirror { RegistryAuth::Anonymous } else { auth.clone() };
        match (Puller::new(config, reference, &host, is_mirror, auth)).pull(store).await {
            Ok(id) => return Ok(id),
            Err(error) => {
                if is_mirror {
                    tracing::warn!(image = %reference, mirror = host, %error, "mirror did not serve the image");
                }
                last = Some(error);
            }
        }
    }
    Err(last.expect("at least the registry itself was tried"))
}

struct Puller<'a> {
    reference: &'a Reference,
    client: Client,
    remote: oci_client::Reference,
    auth: RegistryAuth,
}

impl<'a> Puller<'a> {
    fn new(
        config: &RegistryConfig,
        reference: &'a Reference,
        host: &str,
        is_mirror: bool,
        auth: RegistryAuth,
    ) -> Self {
        // Some other part of the process may have chosen a provider already; either will do.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let plain = host.strip_prefix("http://");
        let host = plain.or_else(|| host.strip_prefix("https://")).unwrap_or(host).trim_end_matches('/');
        let http = plain.is_some() || is_loopback(host) || config.insecure.iter().any(|have| have == host);
        let protocol = if http { ClientProtocol::Http } else { ClientProtocol::Https };
        let client = Client::new(ClientConfig {
            protocol,
            platform_resolver: None,
            read_timeout: Some(READ_TIMEOUT),
            connect_timeout: Some(CONNECT_TIMEOUT),
            user_agent: concat!("knarr/", env!("CARGO_PKG_VERSION")),
            ..Default::default()
        });
        let mut remote = remote(reference);
        if is_mirror {
            remote.set_mirror_registry(host.to_owned());
        }
        Self { reference, client, remote, auth }
    }

    async fn pull(&self, store: &ImageStore) -> Result<String> {
        let accept = [OCI_MANIFEST, DOCKER_MANIFEST, OCI_INDEX, DOCKER_INDEX];
        let (bytes, digest) = self.manifest(&self.remote, &accept).await?;
        let (manifest, manifest_bytes) = match index_of(&bytes)? {
            None => (parse_manifest(&bytes)?, bytes.to_vec()),
            Some(index) => {
                let chosen = select(&index.manifests)?;
                let platform = oci_client::Reference::with_digest(
                    self.remote.registry().to_owned(),
                    self.remote.repository().to_owned(),
                    chosen.digest.clone(),
                );
                let platform = match self.remote.resolve_registry() {
                    mirror if mirror != self.remote.registry() => {
                        let mut platform = platform;
                        platform.set_mirror_registry(mirror.to_owned());
                        platform
                    }
                    _ => platform,
                };
                let (bytes, got) = self.manifest(&platform, &accept[..2]).await?;
                if got != chosen.digest {
                    return Err(mismatch("manifest", &chosen.digest, &got));
                }
                (parse_manifest(&bytes)?, bytes.to_vec())
            }
        };
        if let Some(wanted) = &self.reference.digest
            && *wanted != digest
        {
            return Err(mismatch("manifest", wanted, &digest));
        }
        let config = self.config(store, &manifest.config).await?;
        let diff_ids = Config::parse(&config)?.rootfs.diff_ids;
        if diff_ids.len() != manifest.layers.len() {
            return Err(Error::invalid(format!(
                "the configuration names {} layers, the manifest {}",
                diff_ids.len(),
                manifest.layers.len()
            )));
        }
        let _lease = store.lease(&diff_ids);
        stream::iter(manifest.layers.iter().zip(&diff_ids).map(Ok))
            .try_for_each_concurrent(LAYERS_AT_ONCE, |(layer, diff_id)| self.layer(store, layer, diff_id))
            .await?;
        let names = Names::of(self.reference, Some(&digest));
        let store = store.clone();
        blocking(move || store.commit(&names, &config, Some(&manifest_bytes), false)).await
    }

    async fn manifest(
        &self,
        remote: &oci_client::Reference,
        accept: &[&str],
    ) -> Result<(bytes::Bytes, String)> {
        let (bytes, _) = self
            .client
            .pull_manifest_raw(remote, &self.auth, accept)
            .await
            .map_err(|error| self.explain(error))?;
        if bytes.len() as u64 > DOCUMENT_BYTES_MAX {
            return Err(Error::invalid(format!("manifest is larger than {DOCUMENT_BYTES_MAX} bytes")));
        }
        // The registry's word for the digest is not taken.
        let digest = digest_of(&bytes);
        Ok((bytes, digest))
    }

    async fn config(&self, store: &ImageStore, descriptor: &Descriptor) -> Result<Vec<u8>> {
        if let Ok(bytes) = store.blob(&descriptor.digest) {
            return Ok(bytes);
        }
        if descriptor.size > DOCUMENT_BYTES_MAX {
            return Err(Error::invalid(format!("configuration is larger than {DOCUMENT_BYTES_MAX} bytes")));
        }
        let stream = self
            .client
            .pull_blob_stream(&self.remote, descriptor.digest.as_str())
            .await
            .map_err(|error| self.explain(error))?;
        let mut bytes = Vec::new();
        let mut stream = stream.stream;
        while let Some(chunk) = stream.next().await {
            bytes.extend_from_slice(&chunk.map_err(|error| unreachable_registry(&error))?);
            if bytes.len() as u64 > DOCUMENT_BYTES_MAX {
                return Err(Error::invalid(format!(
                    "configuration is larger than {DOCUMENT_BYTES_MAX} bytes"
                )));
            }
        }
        let got = digest_of(&bytes);
        if got != descriptor.digest {
            return Err(mismatch("configuration", &descriptor.digest, &got));
        }
        Ok(bytes)
    }

    async fn layer(&self, store: &ImageStore, descriptor: &Descriptor, diff_id: &str) -> Result<()> {
        if store.has_layer(diff_id) {
            return Ok(());
        }
        let stream = self
            .client
            .pull_blob_stream(&self.remote, descriptor.digest.as_str())
            .await
            .map_err(|error| self.explain(error))?;
        let reader = SyncIoBridge::new(StreamReader::new(stream.stream));
        let (store, diff_id, digest) = (store.clone(), diff_id.to_owned(), descriptor.digest.clone());
        blocking(move || store.add_layer(&diff_id, Some(&digest), reader)).await
    }

    /// The registry's errors in the words of containerd, which users search for.
    fn explain(&self, error: OciDistributionError) -> Error {
        let name = self.reference;
        let prefix =
            format!("failed to pull and unpack image \"{name}\": failed to resolve reference \"{name}\"");
        let unauthorized = "pull access denied, repository does not exist or may require authorization";
        let (kind, text) = match &error {
            OciDistributionError::ImageManifestNotFoundError(_) => {
                (Kind::NotFound, format!("{name}: not found"))
            }
            OciDistributionError::UnauthorizedError { .. }
            | OciDistributionError::AuthenticationFailure(_) => {
                (Kind::Unauthorized, format!("{unauthorized}: {error}"))
            }
            OciDistributionError::RegistryError { envelope, .. } => {
                let has =
                    |code: &[OciErrorCode]| envelope.errors.iter().any(|error| code.contains(&error.code));
                if has(&[OciErrorCode::ManifestUnknown, OciErrorCode::NameUnknown, OciErrorCode::NotFound]) {
                    (Kind::NotFound, format!("{name}: not found"))
                } else if has(&[OciErrorCode::Unauthorized, OciErrorCode::Denied]) {
                    (Kind::Unauthorized, format!("{unauthorized}: {error}"))
                } else {
                    (Kind::Unavailable, error.to_string())
                }
            }
            OciDistributionError::ServerError { code: 404, .. } => {
                (Kind::NotFound, format!("{name}: not found"))
            }
            OciDistributionError::DigestError(_) => (Kind::InvalidArgument, error.to_string()),
            _ => (Kind::Unavailable, causes(&error)),
        };
        Error::new(kind, format!("{prefix}: {text}"))
    }
}

fn remote(reference: &Reference) -> oci_client::Reference {
    let (registry, repository) = (reference.registry.clone(), reference.repository.clone());
    match (&reference.digest, &reference.tag) {
        (Some(digest), _) => oci_client::Reference::with_digest(registry, repository, digest.clone()),
        (None, tag) => {
            let tag = tag.clone().unwrap_or_else(|| "latest".into());
            oci_client::Reference::with_tag(registry, repository, tag)
        }
    }
}

fn index_of(bytes: &[u8]) -> Result<Option<Index>> {
    let value: serde_json::Value = serde_json::from_slice(bytes)
        .map_err(|error| Error::invalid(format!("manifest is not JSON: {error}")))?;
    if value.get("manifests").is_none() {
        return Ok(None);
    }
    serde_json::from_value(value).map(Some).map_err(|error| Error::invalid(format!("index: {error}")))
}

fn parse_manifest(bytes: &[u8]) -> Result<Manifest> {
    serde_json::from_slice(bytes).map_err(|error| Error::invalid(format!("manifest: {error}")))
}

fn mismatch(what: &str, expected: &str, got: &str) -> Error {
    Error::invalid(format!("{what} does not match its digest: expected {expected}, got {got}"))
}

fn unreachable_registry(error: &dyn std::error::Error) -> Error {
    Error::new(Kind::Unavailable, format!("read from the registry: {}", causes(error)))
}

fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// CRI hands credentials in three forms; a registry token or identity token beats a password.
fn registry_auth(auth: Option<&v1::AuthConfig>) -> Result<RegistryAuth> {
    use base64::Engine;
    let Some(auth) = auth else { return Ok(RegistryAuth::Anonymous) };
    if !auth.registry_token.is_empty() {
        return Ok(RegistryAuth::Bearer(auth.registry_token.clone()));
    }
    if !auth.identity_token.is_empty() {
        return Err(Error::unsupported("identity tokens for registries are not supported; use a password"));
    }
    if !auth.auth.is_empty() {
        let invalid = || Error::invalid("registry credentials are not base64 of user:password");
        let bytes = base64::engine::general_purpose::STANDARD.decode(&auth.auth).map_err(|_| invalid())?;
        let text = String::from_utf8(bytes).map_err(|_| invalid())?;
        let (user, password) = text.split_once(':').ok_or_else(invalid)?;
        return Ok(RegistryAuth::Basic(user.to_owned(), password.trim_end_matches('\0').to_owned()));
    }
    if auth.username.is_empty() {
        return Ok(RegistryAuth::Anonymous);
    }
    Ok(RegistryAuth::Basic(auth.username.clone(), auth.password.clone()))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Error::internal(format!("a worker thread failed: {error}")))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_registries_need_no_tls() {
        for (host, loopback) in [
            ("localhost:5000", true),
            ("127.0.0.1:5000", true),
            ("[::1]:5000", true),
            ("registry.example", false),
            ("10.0.0.1:5000", false),
        ] {
            assert_eq!(is_loopback(host), loopback, "{host}");
        }
    }

    #[test]
    fn credentials_come_in_three_forms() {
        let basic = || RegistryAuth::Basic("u".into(), "p".into());
        let auth = |auth: v1::AuthConfig| registry_auth(Some(&auth)).unwrap();
        assert_eq!(registry_auth(None).unwrap(), RegistryAuth::Anonymous);
        assert_eq!(
            auth(v1::AuthConfig { username: "u".into(), password: "p".into(), ..Default::default() }),
            basic()
        );
        assert_eq!(auth(v1::AuthConfig { auth: "dTpw".into(), ..Default::default() }), basic());
        assert_eq!(
            auth(v1::AuthConfig { registry_token: "t".into(), ..Default::default() }),
            RegistryAuth::Bearer("t".into())
        );
    }
}
