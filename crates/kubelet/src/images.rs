//! Images of containers: whether to pull, with which credentials, one pull per image at a time, and back-off after
//! failures. Reasons, messages and events are upstream's (`pkg/kubelet/images/image_manager.go`).

use crate::backoff::Backoff;
use crate::env::Lookup;
use base64::Engine;
use k8s_openapi::api::core::v1::{Container, ObjectReference, Pod};
use knarr_client::{EventType, Recorder};
use knarr_runtime::cri::v1;
use knarr_runtime::{Kind, Runtime};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::Instant;

/// Pulls at a time; more make each other slow.
const PULLS_MAX: usize = 4;
/// Failing images remembered.
const BACKOFFS_MAX: usize = 4096;

/// Why a container waits for its image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub reason: &'static str,
    pub message: String,
    /// When to try again.
    pub retry: Option<Duration>,
}

/// Pulls images for all pods of the node.
pub struct Images {
    runtime: Arc<dyn Runtime>,
    recorder: Recorder,
    pulls: Semaphore,
    /// By pod uid and image.
    failing: Mutex<HashMap<(String, String), Failing>>,
}

#[derive(Clone, Default)]
struct Failing {
    backoff: Backoff,
    at: Option<Instant>,
    error: String,
}

impl Images {
    pub fn new(runtime: Arc<dyn Runtime>, recorder: Recorder) -> Self {
        Images { runtime, recorder, pulls: Semaphore::new(PULLS_MAX), failing: Mutex::default() }
    }

    /// Makes sure the container's image is on the node; returns it.
    pub async fn ensure(
        &self,
        pod: &Pod,
        container: &Container,
        about: &ObjectReference,
        lookup: &dyn Lookup,
    ) -> Result<v1::Image, Failure> {
        let asked = container.image.clone().unwrap_or_default();
        let image = with_tag(&asked).map_err(|cause| {
            let message = format!("Failed to apply default image tag {asked:?}: {cause}");
            self.warn(about, "InspectFailed", message.clone());
            Failure { reason: "InvalidImageName", message, retry: None }
        })?;
        let present = self.find(&image).await.map_err(|cause| {
            let message = format!("Failed to inspect image {image:?}: {cause}");
            self.warn(about, "InspectFailed", message.clone());
            Failure { reason: "ImageInspectError", message, retry: Some(Duration::from_secs(10)) }
        })?;
        let policy = container.image_pull_policy.as_deref().unwrap_or(default_policy(&image));
        match (present, policy) {
            (Some(found), "IfNotPresent" | "Never") => {
                let message = format!(
                    "Container image {image:?} already present on machine and can be accessed by the pod"
                );
                self.recorder.event_about(about.clone(), EventType::Normal, "Pulled", message);
                Ok(found)
            }
            (None, "Never") => {
                let message = format!("Container image {image:?} is not present with pull policy of Never");
                self.warn(about, "ErrImageNeverPull", message.clone());
                Err(Failure { reason: "ErrImageNeverPull", message, retry: None })
            }
            _ => self.pull(pod, &image, about, lookup).await,
        }
    }

    async fn find(&self, image: &str) -> knarr_runtime::Result<Option<v1::Image>> {
        let spec = v1::ImageSpec { image: image.to_owned(), ..Default::default() };
        Ok(self.runtime.image_status(spec, false).await?.image)
    }

    async fn pull(
        &self,
        pod: &Pod,
        image: &str,
        about: &ObjectReference,
        lookup: &dyn Lookup,
    ) -> Result<v1::Image, Failure> {
        let key = (crate::names::uid(pod).to_owned(), image.to_owned());
        let failing = self.failing.lock().get(&key).cloned().unwrap_or_default();
        let wait = failing.at.and_then(|at| failing.backoff.remaining(at, Instant::now()));
        if let Some(retry) = wait {
            let message = format!("Back-off pulling image {image:?}");
            self.recorder.event_about(about.clone(), EventType::Normal, "BackOff", message.clone());
            let message = format!("{message}: ErrImagePull: {}", failing.error);
            return Err(Failure { reason: "ImagePullBackOff", message, retry: Some(retry) });
        }
        self.recorder.event_about(
            about.clone(),
            EventType::Normal,
            "Pulling",
            format!("Pulling image {image:?}"),
        );
        let asked_at = Instant::now();
        let (outcome, began_at) = self.pull_as_any(pod, image, lookup).await;
        match outcome {
            Ok(found) => {
                self.failing.lock().remove(&key);
                let (took, waited) = (began_at.elapsed(), asked_at.elapsed());
                let message = format!(
                    "Successfully pulled image {image:?} in {} ({} including waiting). Image size: {} bytes.",
                    short(took),
                    short(waited),
                    found.size
                );
                self.recorder.event_about(about.clone(), EventType::Normal, "Pulled", message);
                Ok(found)
            }
            Err(error) => Err(self.failed(key, image, about, error)),
        }
    }

    fn failed(
        &self,
        key: (String, String),
        image: &str,
        about: &ObjectReference,
        error: knarr_runtime::Error,
    ) -> Failure {
        self.warn(about, "Failed", format!("Failed to pull image {image:?}: {error}"));
        let now = Instant::now();
        let mut table = self.failing.lock();
        if table.len() >= BACKOFFS_MAX {
            table.clear();
        }
        let failing = table.entry(key).or_default();
        failing.backoff.next(now, now);
        failing.at = Some(now);
        failing.error = error.to_string();
        let reason = match error.kind {
            Kind::Unavailable if error.message.contains("registry") => "RegistryUnavailable",
            _ => "ErrImagePull",
        };
        // Comes back at once to say that it now waits.
        Failure { reason, message: error.to_string(), retry: Some(Duration::from_millis(500)) }
    }

    /// Tries the pod's credentials for the image, or none; returns also when the pull began.
    async fn pull_as_any(
        &self,
        pod: &Pod,
        image: &str,
        lookup: &dyn Lookup,
    ) -> (knarr_runtime::Result<v1::Image>, Instant) {
        let _turn = self.pulls.acquire().await;
        let began_at = Instant::now();
        let mut credentials: Vec<Option<v1::AuthConfig>> =
            credentials(pod, image, lookup).into_iter().map(Some).collect();
        if credentials.is_empty() {
            credentials.push(None);
        }
        let mut last = None;
        for auth in credentials {
            let spec = v1::ImageSpec { image: image.to_owned(), ..Default::default() };
            match self.runtime.pull_image(spec, auth).await {
                Ok(id) => return (self.pulled(image, id).await, began_at),
                Err(error) => last = Some(error),
            }
        }
        (Err(last.expect("at least one attempt was made")), began_at)
    }

    async fn pulled(&self, image: &str, id: String) -> knarr_runtime::Result<v1::Image> {
        let found = match self.find(image).await? {
            Some(found) => Some(found),
            None => self.find(&id).await?,
        };
        found
            .ok_or_else(|| knarr_runtime::Error::internal(format!("image {image:?} vanished after the pull")))
    }

    fn warn(&self, about: &ObjectReference, reason: &str, message: String) {
        self.recorder.event_about(about.clone(), EventType::Warning, reason, message);
    }

    /// Forgets the failures of a pod that is gone.
    pub fn forget(&self, uid: &str) {
        self.failing.lock().retain(|(owner, _), _| owner != uid);
    }
}

/// `1.234s`, as Go prints durations rounded to milliseconds.
fn short(duration: Duration) -> String {
    match duration.as_millis() {
        millis @ 0..1000 => format!("{millis}ms"),
        millis => format!("{}s", millis as f64 / 1000.0),
    }
}

/// The API fills the policy in; this is for pods that did not pass it.
fn default_policy(image: &str) -> &'static str {
    if image.ends_with(":latest") { "Always" } else { "IfNotPresent" }
}

/// `nginx` means `nginx:latest`. Fails for what is no image name.
pub fn with_tag(image: &str) -> Result<String, String> {
    let refused =
        |why: &str| Err(format!("couldn't parse image name {image:?}: invalid reference format{why}"));
    let valid = |c: char| c.is_ascii_alphanumeric() || "._-/:@".contains(c);
    let name = image.split(['@']).next().unwrap_or_default();
    let path = name.rsplit_once('/').map_or(name, |(_, last)| last);
    let repository = match path.split_once(':') {
        Some((_, "")) => return refused(""),
        Some((last, _)) => &name[..name.len() - path.len() + last.len()],
        None => name,
    };
    let domain_end = repository.split_once('/').map_or(0, |(domain, _)| {
        if domain.contains(['.', ':']) || domain == "localhost" { domain.len() } else { 0 }
    });
    if image.is_empty() || !image.chars().all(valid) || repository.is_empty() || repository.ends_with('/') {
        return refused("");
    }
    if repository[domain_end..].chars().any(|c| c.is_ascii_uppercase()) {
        return refused(": repository name must be lowercase");
    }
    let tagged = path.contains(':') || image.contains('@');
    Ok(if tagged { image.to_owned() } else { format!("{image}:latest") })
}

/// The registry an image lies in and its path there, as credentials are looked up.
fn registry_of(image: &str) -> (String, String) {
    let name = image.split('@').next().unwrap_or_default();
    match name.split_once('/') {
        Some((domain, path)) if domain.contains(['.', ':']) || domain == "localhost" => {
            (domain.to_owned(), path.to_owned())
        }
        Some(_) => ("docker.io".to_owned(), name.to_owned()),
        None => ("docker.io".to_owned(), format!("library/{name}")),
    }
}

/// The credentials in the pod's pull secrets that fit the image, the most specific first.
pub fn credentials(pod: &Pod, image: &str, lookup: &dyn Lookup) -> Vec<v1::AuthConfig> {
    let secrets = pod.spec.iter().flat_map(|spec| spec.image_pull_secrets.iter().flatten());
    let mut found: Vec<(usize, v1::AuthConfig)> = Vec::new();
    for wanted in secrets {
        let Ok(Some(secret)) = lookup.secret(&wanted.name) else { continue };
        let data = secret.data.as_ref();
        let text = |key: &str| data.and_then(|data| data.get(key)).map(|bytes| bytes.0.as_slice());
        let entries = match secret.type_.as_deref() {
            Some("kubernetes.io/dockercfg") => text(".dockercfg").and_then(parse),
            _ => text(".dockerconfigjson").and_then(parse).map(|file| file["auths"].clone()),
        };
        for (server, entry) in entries.iter().filter_map(|entries| entries.as_object()).flatten() {
            if let Some(length) = fits(server, image) {
                found.extend(auth_of(server, entry).map(|auth| (length, auth)));
            }
        }
    }
    found.sort_by_key(|(length, _)| std::cmp::Reverse(*length));
    found.into_iter().map(|(_, auth)| auth).collect()
}

fn parse(bytes: &[u8]) -> Option<serde_json::Value> {
    serde_json::from_slice(bytes).ok()
}

/// How much of the image's name a server entry names; `None` when it is another registry.
fn fits(server: &str, image: &str) -> Option<usize> {
    let server = server.trim_start_matches("https://").trim_start_matches("http://").trim_end_matches('/');
    let (domain, path) = registry_of(image);
    let (host, prefix) = server.split_once('/').unwrap_or((server, ""));
    let host = if matches!(host, "index.docker.io" | "registry-1.docker.io") { "docker.io" } else { host };
    let prefix = if matches!(prefix, "v1" | "v2") { "" } else { prefix };
    let same_host = host == domain || (host.contains('*') && glob(host, &domain));
    (same_host && path.starts_with(prefix)).then_some(host.len() + prefix.len())
}

/// `*.example.org`: each star is within one label.
fn glob(pattern: &str, text: &str) -> bool {
    let (patterns, texts): (Vec<_>, Vec<_>) = (pattern.split('.').collect(), text.split('.').collect());
    patterns.len() == texts.len()
        && patterns.iter().zip(texts).all(|(pattern, text)| match pattern.split_once('*') {
            Some((before, after)) => {
                text.len() >= before.len() + after.len() && text.starts_with(before) && text.ends_with(after)
            }
            None => *pattern == text,
        })
}

fn auth_of(server: &str, entry: &serde_json::Value) -> Option<v1::AuthConfig> {
    let text = |key: &str| entry[key].as_str().unwrap_or_default().to_owned();
    let (mut username, mut password) = (text("username"), text("password"));
    if username.is_empty() {
        let decoded = base64::engine::general_purpose::STANDARD.decode(text("auth")).ok()?;
        let decoded = String::from_utf8(decoded).ok()?;
        let (user, secret) = decoded.split_once(':')?;
        (username, password) = (user.to_owned(), secret.trim_end_matches('\0').to_owned());
    }
    Some(v1::AuthConfig {
        username,
        password,
        server_address: server.to_owned(),
        identity_token: text("identitytoken"),
        registry_token: text("registrytoken"),
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env::tests::Fixed;
    use serde_json::json;

    #[test]
    fn names_get_the_latest_tag_or_are_refused() {
        let cases = [
            ("nginx", Some("nginx:latest")),
            ("nginx:1.2", Some("nginx:1.2")),
            ("host:5000/a/b", Some("host:5000/a/b:latest")),
            ("a@sha256:0123", Some("a@sha256:0123")),
            ("Upper/case", None),
            ("bad name", None),
            ("", None),
            ("a:", None),
        ];
        for (image, want) in cases {
            assert_eq!(with_tag(image).ok().as_deref(), want, "{image}");
        }
    }

    #[test]
    fn pull_secrets_that_fit_are_used_the_most_specific_first() {
        let config = json!({"auths": {
            "r.example.org": {"username": "u", "password": "p"},
            "https://r.example.org/team": {"auth": "dDpx"},
            "*.example.org": {"username": "g", "password": "h"},
            "other.org": {"username": "x", "password": "y"}}});
        let encoded = base64::engine::general_purpose::STANDARD.encode(config.to_string());
        let secret = json!({"metadata": {"name": "s"}, "type": "kubernetes.io/dockerconfigjson",
            "data": {".dockerconfigjson": encoded}});
        let mut lookup = Fixed::default();
        lookup.secrets.insert("s".into(), Arc::new(serde_json::from_value(secret).unwrap()));
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p"},
            "spec": {"containers": [], "imagePullSecrets": [{"name": "s"}, {"name": "none"}]}}))
        .unwrap();
        let users = |image: &str| -> Vec<String> {
            credentials(&pod, image, &lookup).into_iter().map(|auth| auth.username).collect()
        };
        assert_eq!(users("r.example.org/team/app:1"), ["t", "g", "u"].map(String::from));
        assert_eq!(users("r.example.org/else:1").len(), 2);
        assert!(users("docker.io/a").is_empty());
    }
}
