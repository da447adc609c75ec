//! Bootstrap tokens: signs the public ConfigMap `cluster-info` with each of them, so that a machine that knows only a
//! token can trust what it reads there, and deletes tokens that have expired. Upstream's `pkg/controller/bootstrap`.

use crate::Context;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use futures::future::BoxFuture;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use knarr_client::informer::Selection;
use knarr_client::{Controller, During, Informer, ObjectKey, Reconcile, Requeue, Result, ignore_gone, patch};
use kube::api::{Api, DeleteParams, Preconditions};
use ring::hmac;
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

const PUBLIC: &str = "kube-public";
const SYSTEM: &str = "kube-system";
const CLUSTER_INFO: &str = "cluster-info";
/// What is signed.
const KUBECONFIG: &str = "kubeconfig";
const SIGNATURE_PREFIX: &str = "jws-kubeconfig-";
const TOKEN_TYPE: &str = "bootstrap.kubernetes.io/token";
const NAME_PREFIX: &str = "bootstrap-token-";

fn tokens(context: &Context) -> Informer<Secret> {
    let selection = Selection { fields: format!("type={TOKEN_TYPE}"), ..Selection::namespace(SYSTEM) };
    context.informers.select::<Secret>(selection)
}

pub fn start_signing(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let tokens = tokens(&context);
    let selection =
        Selection { fields: format!("metadata.name={CLUSTER_INFO}"), ..Selection::namespace(PUBLIC) };
    let maps = context.informers.select::<ConfigMap>(selection);
    let controller = Controller::new("bootstrap-signer")
        .watch(&maps)
        .watch_map(&tokens, |_| vec![ObjectKey::new(PUBLIC, CLUSTER_INFO)]);
    Box::pin(controller.run(Arc::new(Signer { context, maps, tokens }), shutdown))
}

pub fn start_cleaning(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let tokens = tokens(&context);
    let controller = Controller::new("token-cleaner").watch(&tokens);
    Box::pin(controller.run(Arc::new(Cleaner { context, tokens }), shutdown))
}

struct Signer {
    context: Context,
    maps: Informer<ConfigMap>,
    tokens: Informer<Secret>,
}

impl Reconcile for Signer {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let Some(map) = self.maps.get_key(&key) else { return Ok(Requeue::Done) };
        let data = map.data.clone().unwrap_or_default();
        let Some(content) = data.get(KUBECONFIG) else { return Ok(Requeue::Done) };
        let mut wanted = BTreeMap::new();
        for token in self.tokens.list() {
            if let Some((id, secret)) = signs(&token, self.context.clock.now()) {
                wanted.insert(format!("{SIGNATURE_PREFIX}{id}"), signature(content, &id, &secret));
            }
        }
        let signed = |(name, _): &(&String, &String)| name.starts_with(SIGNATURE_PREFIX);
        let present: BTreeMap<String, String> =
            data.iter().filter(signed).map(|(name, value)| (name.clone(), value.clone())).collect();
        let change = patch::merge_diff(&json!(present), &json!(wanted));
        if !change.is_null() {
            let version = &map.metadata.resource_version;
            let change = json!({"metadata": {"resourceVersion": version}, "data": change});
            let api: Api<ConfigMap> = Api::namespaced(self.context.client.clone(), &key.namespace);
            ignore_gone(patch::merge(&api, &key.name, change).await)?;
        }
        Ok(Requeue::Done)
    }
}

struct Cleaner {
    context: Context,
    tokens: Informer<Secret>,
}

impl Reconcile for Cleaner {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let Some(token) = self.tokens.get_key(&key) else { return Ok(Requeue::Done) };
        let Some(end) = expires(&token) else { return Ok(Requeue::Done) };
        let left = self.context.clock.until(end);
        if !left.is_zero() {
            return Ok(Requeue::After(left));
        }
        tracing::info!(secret = %key, "deleting an expired bootstrap token");
        let params = DeleteParams {
            preconditions: Some(Preconditions { uid: token.metadata.uid.clone(), resource_version: None }),
            ..Default::default()
        };
        let api: Api<Secret> = Api::namespaced(self.context.client.clone(), &key.namespace);
        let deleted = api.delete(&key.name, &params).await;
        ignore_gone(deleted.during(|| format!("delete expired bootstrap token {key}")))?;
        Ok(Requeue::Done)
    }
}

fn field(token: &Secret, name: &str) -> Option<String> {
    let value = token.data.as_ref()?.get(name)?;
    String::from_utf8(value.0.clone()).ok().filter(|value| !value.is_empty())
}

/// When a token ends, if it does. An end that cannot be read has come.
fn expires(token: &Secret) -> Option<Timestamp> {
    let end = field(token, "expiration")?;
    Some(end.parse().unwrap_or_else(|error| {
        let (name, error) = (token.metadata.name.as_deref(), format!("{error}"));
        tracing::warn!(
            secret = name,
            end,
            error,
            "the end of a bootstrap token is not readable, taken as over"
        );
        Timestamp::MIN
    }))
}

/// Identifier and secret of a token that may sign.
fn signs(token: &Secret, now: Timestamp) -> Option<(String, String)> {
    let name = token.metadata.name.as_deref()?;
    let (id, secret) = (field(token, "token-id")?, field(token, "token-secret")?);
    let named = name.strip_prefix(NAME_PREFIX) == Some(&id);
    let meant = field(token, "usage-bootstrap-signing").as_deref() == Some("true");
    let alive = expires(token).is_none_or(|end| end > now);
    (named && meant && alive).then_some((id, secret))
}

/// A JSON Web Signature whose content is left out: whoever checks it has read the content beside it.
fn signature(content: &str, id: &str, secret: &str) -> String {
    let header = URL_SAFE_NO_PAD.encode(json!({"alg": "HS256", "kid": id}).to_string());
    let signed = format!("{header}.{}", URL_SAFE_NO_PAD.encode(content));
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
    format!("{header}..{}", URL_SAFE_NO_PAD.encode(hmac::sign(&key, signed.as_bytes())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::Harness;
    use jiff::SignedDuration;
    use k8s_openapi::ByteString;
    use kube::api::{Patch, PatchParams, PostParams};
    use serde_json::Value;

    async fn token(harness: &Harness, id: &str, extra: Value) {
        let mut fields =
            json!({"token-id": id, "token-secret": "very-secret", "usage-bootstrap-signing": "true"});
        for (name, value) in extra.as_object().into_iter().flatten() {
            fields[name] = value.clone();
        }
        let data: BTreeMap<_, _> = fields
            .as_object()
            .into_iter()
            .flatten()
            .map(|(name, value)| (name.clone(), ByteString(value.as_str().unwrap().into())))
            .collect();
        let secret =
            json!({"metadata": {"name": format!("{NAME_PREFIX}{id}")}, "type": TOKEN_TYPE, "data": data});
        let api: Api<Secret> = Api::namespaced(harness.client(), SYSTEM);
        api.create(&PostParams::default(), &serde_json::from_value(secret).unwrap()).await.unwrap();
    }

    async fn cluster_info(harness: &Harness, kubeconfig: &str) {
        let map = json!({"metadata": {"name": CLUSTER_INFO}, "data": {KUBECONFIG: kubeconfig}});
        let api: Api<ConfigMap> = Api::namespaced(harness.client(), PUBLIC);
        api.create(&PostParams::default(), &serde_json::from_value(map).unwrap()).await.unwrap();
    }

    fn signatures(maps: &[ConfigMap]) -> Vec<&str> {
        let data = maps.iter().flat_map(|map| map.data.iter().flatten());
        data.filter_map(|(name, _)| name.strip_prefix(SIGNATURE_PREFIX)).collect()
    }

    #[test]
    fn a_signature_is_as_others_compute_it() {
        let content = "Hello from the other side. I must have called a thousand times.";
        let wanted = "eyJhbGciOiJIUzI1NiIsImtpZCI6Impvc2h1YSJ9..VShe2taLd-YTrmWuRkcL_8QTNDHYxQIEBsAYYiIj1_8";
        assert_eq!(signature(content, "joshua", "my voice is my passcode"), wanted);
    }

    #[tokio::test(start_paused = true)]
    async fn cluster_info_is_signed_by_every_token_that_may() {
        let harness = Harness::quiet();
        harness.start(start_signing);
        cluster_info(&harness, "one").await;
        token(&harness, "good", json!({})).await;
        token(&harness, "other", json!({"usage-bootstrap-signing": "false"})).await;
        token(&harness, "over", json!({"expiration": "2001-01-01T00:00:00Z"})).await;
        let one = |maps: &[ConfigMap]| signatures(maps) == ["good"];
        let maps = harness.api.wait_for::<ConfigMap>("the signature", one).await;
        let before = maps[0].data.clone().unwrap()["jws-kubeconfig-good"].clone();
        harness.assert_quiet().await;
        let api: Api<ConfigMap> = Api::namespaced(harness.client(), PUBLIC);
        let change = json!({"data": {KUBECONFIG: "two"}});
        api.patch(CLUSTER_INFO, &PatchParams::default(), &Patch::Merge(change)).await.unwrap();
        let anew = |maps: &[ConfigMap]| maps[0].data.as_ref().unwrap()["jws-kubeconfig-good"] != before;
        harness.api.wait_for::<ConfigMap>("another signature", anew).await;
        let secrets: Api<Secret> = Api::namespaced(harness.client(), SYSTEM);
        secrets.delete("bootstrap-token-good", &DeleteParams::default()).await.unwrap();
        harness.api.wait_for::<ConfigMap>("no signature", |maps| signatures(maps).is_empty()).await;
    }

    #[tokio::test(start_paused = true)]
    async fn tokens_go_when_they_expire() {
        let harness = Harness::quiet();
        harness.start(start_cleaning);
        let end = harness.context.clock.now() + SignedDuration::from_mins(10);
        token(&harness, "short", json!({"expiration": end.to_string()})).await;
        token(&harness, "odd", json!({"expiration": "tomorrow"})).await;
        token(&harness, "endless", json!({})).await;
        harness.api.wait_for::<Secret>("the odd one gone", |all| all.len() == 2).await;
        let began = tokio::time::Instant::now();
        let all = harness.api.wait_for::<Secret>("the short one gone", |all| all.len() == 1).await;
        assert_eq!(all[0].metadata.name.as_deref(), Some("bootstrap-token-endless"));
        assert!((595..=601).contains(&began.elapsed().as_secs()));
    }
}
