//! Tokens of service accounts, bound to one pod: asked of the API, kept until four fifths of their life are over
//! (`pkg/kubelet/token/token_manager.go`).

use crate::names;
use async_trait::async_trait;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use knarr_client::Clock;
use kube::api::PostParams;
use kube::{Api, Client};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::time::Duration;

/// A token older than this is renewed, however long it may live.
const AGE_MAX: Duration = Duration::from_secs(24 * 3600);
/// Which part of its life a token is used for, in percent.
const USED_PERCENT: u32 = 80;
/// So that tokens made together are not all renewed in one second.
const JITTER_S_MAX: u64 = 10;

/// Where tokens come from; passed in, so that volumes can be tested without an API.
#[async_trait]
pub trait Tokens: Send + Sync {
    /// A token of the pod's service account for `audience` (empty: the API server). Errors are messages.
    async fn token(&self, pod: &Pod, audience: &str, expiration_s: i64) -> Result<Token, String>;
}

#[derive(Clone, Debug)]
pub struct Token {
    pub value: String,
    /// When to ask again, from now.
    pub refresh_after: Duration,
}

/// Asks the API, and remembers.
pub struct ApiTokens {
    client: Client,
    clock: Clock,
    /// By pod uid, then audience and lifetime.
    known: Mutex<BTreeMap<String, OfPod>>,
}

#[derive(Clone)]
struct Known {
    value: String,
    refresh_at: jiff::Timestamp,
}

/// The tokens of one pod, by audience and lifetime in seconds.
type OfPod = BTreeMap<(String, i64), Known>;

impl ApiTokens {
    pub fn new(client: Client, clock: Clock) -> Self {
        ApiTokens { client, clock, known: Mutex::default() }
    }

    /// Forgets the tokens of a pod that is gone.
    pub fn forget(&self, uid: &str) {
        self.known.lock().remove(uid);
    }

    async fn request(&self, pod: &Pod, audience: &str, expiration_s: i64) -> Result<TokenRequest, String> {
        let account = pod.spec.as_ref().and_then(|spec| spec.service_account_name.as_deref());
        let account = account.filter(|name| !name.is_empty()).unwrap_or("default");
        let bound = BoundObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            name: Some(names::name(pod).to_owned()),
            uid: Some(names::uid(pod).to_owned()),
        };
        let audiences = (!audience.is_empty()).then(|| vec![audience.to_owned()]);
        let spec = TokenRequestSpec {
            audiences,
            expiration_seconds: Some(expiration_s),
            bound_object_ref: Some(bound),
        };
        let request = TokenRequest { spec: Some(spec), ..Default::default() };
        let api = Api::<ServiceAccount>::namespaced(self.client.clone(), names::namespace(pod));
        let answer = api.create_token_request(account, &PostParams::default(), &request).await;
        answer.map_err(|error| format!("failed to fetch token: {error}"))
    }
}

#[async_trait]
impl Tokens for ApiTokens {
    async fn token(&self, pod: &Pod, audience: &str, expiration_s: i64) -> Result<Token, String> {
        let (uid, key) = (names::uid(pod), (audience.to_owned(), expiration_s));
        let known = self.known.lock().get(uid).and_then(|tokens| tokens.get(&key)).cloned();
        let now = self.clock.now();
        if let Some(known) = known.filter(|known| known.refresh_at > now) {
            return Ok(Token { value: known.value, refresh_after: self.clock.until(known.refresh_at) });
        }
        let answer = self.request(pod, audience, expiration_s).await?;
        let status = answer.status.ok_or("failed to fetch token: the answer has no status")?;
        let value = status.token.ok_or("failed to fetch token: the answer has no token")?;
        let expires = status.expiration_timestamp.ok_or("failed to fetch token: the answer has no end")?;
        let life = self.clock.until(expires.0);
        let jitter = Duration::from_secs(rand::random_range(0..=JITTER_S_MAX));
        let refresh_after = (life * USED_PERCENT / 100).min(AGE_MAX).saturating_sub(jitter);
        let refresh_at =
            now.saturating_add(jiff::SignedDuration::try_from(refresh_after).unwrap_or_default());
        let known = Known { value: value.clone(), refresh_at: refresh_at.unwrap_or(now) };
        self.known.lock().entry(uid.to_owned()).or_default().insert(key, known);
        Ok(Token { value, refresh_after })
    }
}
