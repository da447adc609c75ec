//! Authentication: client certificates and bearer tokens of service accounts.

use std::sync::Arc;

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use knarr_api::object::Object;
use knarr_api::status::{Result, Status};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::identity::User;
use crate::registry::Registry;

/// The user a verified client certificate stands for: common name and organisations.
pub fn from_certificate(der: &[u8]) -> Option<User> {
    let (_, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
    let subject = certificate.subject();
    let name = subject.iter_common_name().next()?.as_str().ok()?;
    let groups: Vec<&str> = subject.iter_organization().filter_map(|o| o.as_str().ok()).collect();
    Some(User::new(name, &groups))
}

/// Signs and verifies service account tokens.
pub struct Tokens {
    issuer: String,
    key_id: String,
    encoding: EncodingKey,
    decoding: DecodingKey,
    /// The public key as a JSON web key.
    jwk: Value,
}

/// What a token asks for.
pub struct Claims<'a> {
    pub namespace: &'a str,
    pub account: &'a str,
    pub account_uid: &'a str,
    pub audiences: Vec<String>,
    pub seconds: i64,
    /// Kind, name and uid of the object the token dies with.
    pub bound: Option<(String, String, String)>,
    /// Name and uid of the pod's node.
    pub node: Option<(String, String)>,
}

/// A token nobody accepts, and why: for the log, never for the client.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error("token: {0}")]
    Malformed(#[from] jsonwebtoken::errors::Error),
    #[error("token: {0} is gone or not the one the token was bound to")]
    Unbound(&'static str),
    #[error("token: no service account in it")]
    NoAccount,
}

impl Tokens {
    /// From a P-256 key: the private one as PKCS#8 PEM, the public one as the uncompressed point.
    pub fn new(issuer: impl Into<String>, private_pem: &[u8], public_point: &[u8]) -> Result<Self> {
        use base64::Engine;
        use base64::engine::general_purpose::URL_SAFE_NO_PAD as base64url;
        let fail = |e: jsonwebtoken::errors::Error| Status::internal(format!("service account key: {e}"));
        let [4, coordinates @ ..] = public_point else {
            return Err(Status::internal("service account key: not an uncompressed P-256 point"));
        };
        let (x, y) = coordinates.split_at(coordinates.len() / 2);
        let (x, y) = (base64url.encode(x), base64url.encode(y));
        let key_id = base64url.encode(Sha256::digest(public_point));
        Ok(Tokens {
            issuer: issuer.into(),
            encoding: EncodingKey::from_ec_pem(private_pem).map_err(fail)?,
            decoding: DecodingKey::from_ec_components(&x, &y).map_err(fail)?,
            jwk: json!({ "use": "sig", "kty": "EC", "kid": key_id, "crv": "P-256", "alg": "ES256", "x": x, "y": y }),
            key_id,
        })
    }

    pub fn issuer(&self) -> &str {
        &self.issuer
    }

    /// `/openid/v1/jwks`.
    pub fn key_set(&self) -> Value {
        json!({ "keys": [self.jwk] })
    }

    /// A signed token and when it ends, in seconds since 1970.
    pub fn sign(&self, claims: &Claims, now: jiff::Timestamp) -> Result<(String, i64)> {
        let issued = now.as_second();
        let expires = issued + claims.seconds;
        let mut kubernetes = json!({
            "namespace": claims.namespace,
            "serviceaccount": { "name": claims.account, "uid": claims.account_uid },
        });
        if let Some((kind, name, uid)) = &claims.bound {
            kubernetes[kind.to_lowercase()] = json!({ "name": name, "uid": uid });
        }
        if let Some((name, uid)) = &claims.node {
            kubernetes["node"] = json!({ "name": name, "uid": uid });
        }
        let audiences =
            if claims.audiences.is_empty() { vec![self.issuer.clone()] } else { claims.audiences.clone() };
        let body = json!({
            "iss": self.issuer,
            "sub": format!("system:serviceaccount:{}:{}", claims.namespace, claims.account),
            "aud": audiences,
            "iat": issued,
            "nbf": issued,
            "exp": expires,
            "jti": crate::registry::new_uid(),
            "kubernetes.io": kubernetes,
        });
        let mut header = Header::new(Algorithm::ES256);
        header.kid = Some(self.key_id.clone());
        let token = jsonwebtoken::encode(&header, &body, &self.encoding)
            .map_err(|e| Status::internal(format!("cannot sign the token: {e}")))?;
        Ok((token, expires))
    }

    /// The user of a token, if it is ours, in time, meant for `audiences`, and what it is bound to still exists.
    pub fn verify(
        &self,
        token: &str,
        audiences: &[String],
        registry: &Registry,
    ) -> std::result::Result<User, TokenError> {
        let mut validation = Validation::new(Algorithm::ES256);
        validation.set_issuer(&[&self.issuer]);
        let own = [self.issuer.clone()];
        validation.set_audience(if audiences.is_empty() { &own } else { audiences });
        validation.validate_nbf = true;
        let claims = jsonwebtoken::decode::<Value>(token, &self.decoding, &validation)?.claims;
        let about = claims.get("kubernetes.io").ok_or(TokenError::NoAccount)?;
        let (namespace, account) = (about.str_at("namespace"), about.str_at("serviceaccount.name"));
        let uid = about.str_at("serviceaccount.uid");
        let exists = |group, plural, namespace, name: &str, uid: &str| {
            registry.lookup(group, plural, namespace, name).is_some_and(|o| o.uid() == uid)
        };
        if !exists("", "serviceaccounts", namespace, account, uid) {
            return Err(TokenError::Unbound("service account"));
        }
        let mut user = User::service_account(namespace, account, uid);
        for (kind, plural, scope) in
            [("pod", "pods", namespace), ("secret", "secrets", namespace), ("node", "nodes", "")]
        {
            let Some(bound) = about.get(kind) else { continue };
            let (name, uid) = (bound.str_at("name"), bound.str_at("uid"));
            // A pod's token names its node for information only.
            let informational = kind == "node" && about.get("pod").is_some();
            if !informational && !exists("", plural, scope, name, uid) {
                return Err(TokenError::Unbound(kind));
            }
            for (key, value) in [("name", name), ("uid", uid)] {
                user.extra
                    .push((format!("authentication.kubernetes.io/{kind}-{key}"), vec![value.to_owned()]));
            }
        }
        if let Some(id) = claims.get("jti").and_then(Value::as_str) {
            user.extra.push(("authentication.kubernetes.io/credential-id".into(), vec![format!("JTI={id}")]));
        }
        Ok(user)
    }
}

/// Who makes this request: the certificate's user, the token's, or nobody in particular.
///
/// # Errors
/// 401 if a token was given and is not accepted.
pub fn authenticate(
    headers: &http::HeaderMap,
    certificate: Option<&User>,
    tokens: &Arc<Tokens>,
    registry: &Registry,
) -> Result<User> {
    if let Some(user) = certificate {
        return Ok(user.clone());
    }
    let Some(token) = bearer(headers) else { return Ok(User::anonymous()) };
    tokens.verify(token, &[], registry).map_err(|error| {
        tracing::debug!(%error, "a bearer token was refused");
        Status::unauthorized()
    })
}

fn bearer(headers: &http::HeaderMap) -> Option<&str> {
    if let Some(value) = headers.get(http::header::AUTHORIZATION) {
        return value.to_str().ok()?.strip_prefix("Bearer ").map(str::trim);
    }
    None
}
