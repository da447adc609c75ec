//! CertificateSigningRequests: approves what kubelets ask for themselves, signs for the cluster's own signers, and
//! cleans up what is over. Upstream's `pkg/controller/certificates`. Who may approve, sign, and ask for what is the API
//! server's to judge.

mod x509;

use crate::{Context, util};
use futures::future::BoxFuture;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::ByteString;
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use k8s_openapi::api::certificates::v1::{
    CertificateSigningRequest, CertificateSigningRequestCondition, CertificateSigningRequestSpec,
};
use knarr_client::{
    Client, Controller, During, Error, Informer, ObjectKey, Reconcile, Requeue, Result, ignore_gone,
};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use x509::Request;

const CLIENT: &str = "kubernetes.io/kube-apiserver-client";
const KUBELET_CLIENT: &str = "kubernetes.io/kube-apiserver-client-kubelet";
const KUBELET_SERVING: &str = "kubernetes.io/kubelet-serving";
const LEGACY: &str = "kubernetes.io/legacy-unknown";
const NODES: &str = "system:nodes";
const NODE_PREFIX: &str = "system:node:";

/// Certificates last this long unless less is asked for. Upstream's default.
const LASTS: SignedDuration = SignedDuration::from_hours(365 * 24);
/// No certificate is given out for less. Upstream's value.
const LASTS_MIN: SignedDuration = SignedDuration::from_mins(10);
/// Certificates begin in the past, so that a slow clock elsewhere does no harm. Upstream's value.
const BACKDATED: SignedDuration = SignedDuration::from_mins(5);
/// Of certificates this short the time in the past does not count. Upstream's value.
const SHORT: SignedDuration = SignedDuration::from_hours(8);
/// How long a request stays that nobody judged. Upstream's value.
const PENDING_STAYS: SignedDuration = SignedDuration::from_hours(24);
/// How long a request stays that was judged. Upstream's value.
const JUDGED_STAYS: SignedDuration = SignedDuration::from_hours(1);

/// Who signs for the cluster.
#[derive(Clone)]
pub struct Authority {
    /// PEM.
    pub certificate: String,
    /// PEM, PKCS#8.
    pub key: String,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("certificate", &self.certificate).finish_non_exhaustive()
    }
}

pub fn start_approving(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let requests = context.informers.get::<CertificateSigningRequest>();
    let controller = Controller::new("csrapproving").watch(&requests);
    Box::pin(controller.run(Arc::new(Approving { client: context.client, requests }), shutdown))
}

/// Without an authority nothing is signed here: somebody else may.
pub fn start_signing(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let Some(authority) = context.config.authority.clone() else { return Box::pin(async {}) };
    let requests = context.informers.get::<CertificateSigningRequest>();
    let controller = Controller::new("csrsigning").watch(&requests);
    Box::pin(controller.run(Arc::new(Signing { context, requests, authority }), shutdown))
}

pub fn start_cleaning(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let requests = context.informers.get::<CertificateSigningRequest>();
    let controller = Controller::new("csrcleaner").watch(&requests);
    Box::pin(controller.run(Arc::new(Cleaning { context, requests }), shutdown))
}

struct Approving {
    client: Client,
    requests: Informer<CertificateSigningRequest>,
}

impl Reconcile for Approving {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let Some(csr) = self.requests.get_key(&key) else { return Ok(Requeue::Done) };
        if certificate(&csr).is_some() || has(&csr, "Approved") || has(&csr, "Denied") {
            return Ok(Requeue::Done);
        }
        if csr.spec.signer_name != KUBELET_CLIENT {
            return Ok(Requeue::Done);
        }
        let request = parse(&key, &csr)?;
        if for_kubelet_client(&request, &usages(&csr.spec)).is_err() {
            return Ok(Requeue::Done);
        }
        let own = csr.spec.username.as_deref() == Some(&request.common_name);
        let ways = [
            (
                own,
                "selfnodeclient",
                "Auto approving self kubelet client certificate after SubjectAccessReview.",
            ),
            (true, "nodeclient", "Auto approving kubelet client certificate after SubjectAccessReview."),
        ];
        let mut tried = Vec::new();
        for (_, subresource, message) in ways.into_iter().filter(|(fits, ..)| *fits) {
            tried.push(subresource);
            if self.may(&csr.spec, subresource).await? {
                let verdict = json!({
                    "type": "Approved", "status": "True", "reason": "AutoApproved", "message": message,
                });
                let change = with_condition(&csr, verdict);
                let api: Api<CertificateSigningRequest> = Api::all(self.client.clone());
                let patched =
                    api.patch_approval(&key.name, &PatchParams::default(), &Patch::Merge(change)).await;
                ignore_gone(patched.during(|| format!("approve csr {key}")))?;
                return Ok(Requeue::Done);
            }
        }
        let reason =
            format!("recognized csr \"{key}\" as {tried:?} but subject access review was not approved");
        Err(Error::not_yet("approve", reason))
    }
}

impl Approving {
    /// Whether whoever asks may have such certificates without anybody looking.
    async fn may(&self, spec: &CertificateSigningRequestSpec, subresource: &str) -> Result<bool> {
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: spec.username.clone(),
                uid: spec.uid.clone(),
                groups: spec.groups.clone(),
                extra: spec.extra.clone(),
                resource_attributes: Some(ResourceAttributes {
                    group: Some("certificates.k8s.io".to_owned()),
                    resource: Some("certificatesigningrequests".to_owned()),
                    subresource: Some(subresource.to_owned()),
                    verb: Some("create".to_owned()),
                    ..Default::default()
                }),
                ..Default::default()
            },
            ..Default::default()
        };
        let api: Api<SubjectAccessReview> = Api::all(self.client.clone());
        let answer = api.create(&PostParams::default(), &review).await;
        let answer = answer.during(|| format!("ask whether {:?} may create {subresource}", spec.username))?;
        Ok(answer.status.is_some_and(|status| status.allowed))
    }
}

struct Signing {
    context: Context,
    requests: Informer<CertificateSigningRequest>,
    authority: Authority,
}

impl Reconcile for Signing {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let Some(csr) = self.requests.get_key(&key) else { return Ok(Requeue::Done) };
        let open = has(&csr, "Approved") && !has(&csr, "Denied") && !has(&csr, "Failed");
        let signer = csr.spec.signer_name.as_str();
        let ours = [CLIENT, KUBELET_CLIENT, KUBELET_SERVING, LEGACY].contains(&signer);
        if !open || !ours || certificate(&csr).is_some() {
            return Ok(Requeue::Done);
        }
        let request = parse(&key, &csr)?;
        let asked = usages(&csr.spec);
        let verdict = match signer {
            CLIENT => for_client(&asked),
            KUBELET_CLIENT => for_kubelet_client(&request, &asked),
            KUBELET_SERVING => for_kubelet_serving(&request, &asked),
            _ => Ok(()),
        };
        let change = match verdict {
            Ok(()) => {
                let signed = self.sign(&csr.spec, &request);
                let signed = signed.map_err(|error| Error::terminal(format!("sign csr {key}"), error))?;
                json!({
                    "metadata": guard(&csr), "status": {"certificate": ByteString(signed.into_bytes())},
                })
            }
            Err(why) => {
                let failed = json!({
                    "type": "Failed", "status": "True", "reason": "SignerValidationFailure", "message": why,
                    "lastUpdateTime": self.context.clock.time(),
                });
                with_condition(&csr, failed)
            }
        };
        let api: Api<CertificateSigningRequest> = Api::all(self.context.client.clone());
        let patched = api.patch_status(&key.name, &PatchParams::default(), &Patch::Merge(change)).await;
        ignore_gone(patched.during(|| format!("write the outcome of csr {key}")))?;
        tracing::info!(csr = %key, signer, "judged");
        Ok(Requeue::Done)
    }
}

impl Signing {
    fn sign(&self, spec: &CertificateSigningRequestSpec, request: &Request) -> Result<String, String> {
        let asked = spec.expiration_seconds.map(|seconds| SignedDuration::from_secs(seconds.into()));
        let lasts = asked.map_or(LASTS, |asked| asked.clamp(LASTS_MIN, LASTS));
        let now = self.context.clock.now();
        let from = now.saturating_sub(BACKDATED).unwrap_or(now);
        let counted = if lasts < SHORT { now } else { from };
        let until = counted.saturating_add(lasts).unwrap_or(Timestamp::MAX);
        x509::sign(&self.authority, request, spec.usages.as_deref().unwrap_or_default(), from, until)
    }
}

struct Cleaning {
    context: Context,
    requests: Informer<CertificateSigningRequest>,
}

impl Reconcile for Cleaning {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let Some(csr) = self.requests.get_key(&key) else { return Ok(Requeue::Done) };
        let Some(end) = stays_until(&csr) else { return Ok(Requeue::Done) };
        let left = self.context.clock.until(end);
        if !left.is_zero() {
            return Ok(Requeue::After(left));
        }
        tracing::info!(csr = %key, "cleaning up a request that is over");
        let params = DeleteParams {
            preconditions: Some(Preconditions { uid: csr.metadata.uid.clone(), resource_version: None }),
            ..Default::default()
        };
        let api: Api<CertificateSigningRequest> = Api::all(self.context.client.clone());
        ignore_gone(api.delete(&key.name, &params).await.during(|| format!("clean up csr {key}")))?;
        Ok(Requeue::Done)
    }
}

/// When a request may go: soon after its verdict, and when nobody gave one for a day. One that is approved and waits for
/// its signer stays.
fn stays_until(csr: &CertificateSigningRequest) -> Option<Timestamp> {
    let after = |time: Timestamp, by: SignedDuration| time.saturating_add(by).unwrap_or(Timestamp::MAX);
    let conditions = csr.status.as_ref().and_then(|status| status.conditions.clone()).unwrap_or_default();
    if conditions.is_empty() {
        let made = csr.metadata.creation_timestamp.as_ref()?.0;
        return Some(after(made, PENDING_STAYS));
    }
    let issued = certificate(csr);
    let expires = issued.and_then(x509::ends);
    let over = |condition: &CertificateSigningRequestCondition| {
        let approved = condition.type_ == "Approved";
        if approved && issued.is_none() {
            return None;
        }
        let judged = condition.last_update_time.as_ref().map(|time| after(time.0, JUDGED_STAYS));
        if approved { judged.into_iter().chain(expires).min() } else { judged }
    };
    conditions.iter().filter_map(over).min()
}

fn has(csr: &CertificateSigningRequest, type_: &str) -> bool {
    csr.status.as_ref().is_some_and(|status| util::find(&status.conditions, type_).is_some())
}

fn certificate(csr: &CertificateSigningRequest) -> Option<&[u8]> {
    let certificate = csr.status.as_ref()?.certificate.as_ref()?;
    (!certificate.0.is_empty()).then_some(certificate.0.as_slice())
}

fn parse(key: &ObjectKey, csr: &CertificateSigningRequest) -> Result<Request> {
    Request::parse(&csr.spec.request.0)
        .map_err(|error| Error::terminal(format!("unable to parse csr \"{key}\""), error))
}

fn usages(spec: &CertificateSigningRequestSpec) -> BTreeSet<&str> {
    spec.usages.iter().flatten().map(String::as_str).collect()
}

fn guard(csr: &CertificateSigningRequest) -> Value {
    json!({"uid": csr.metadata.uid, "resourceVersion": csr.metadata.resource_version})
}

fn with_condition(csr: &CertificateSigningRequest, condition: Value) -> Value {
    let known = csr.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let conditions: Vec<Value> = known.map(|known| json!(known)).chain([condition]).collect();
    json!({"metadata": guard(csr), "status": {"conditions": conditions}})
}

fn for_client(usages: &BTreeSet<&str>) -> Result<(), String> {
    let allowed = ["client auth", "digital signature", "key encipherment"];
    if let Some(other) = usages.iter().find(|usage| !allowed.contains(usage)) {
        return Err(format!("invalid usage for client certificate: {other}"));
    }
    if usages.contains("client auth") {
        Ok(())
    } else {
        Err("missing required usage for client certificate: client auth".to_owned())
    }
}

fn for_kubelet_client(request: &Request, usages: &BTreeSet<&str>) -> Result<(), String> {
    of_nodes(request)?;
    let unwanted = [
        (request.dns.is_empty(), "DNS subjectAltNames are not allowed"),
        (request.emails.is_empty(), "Email subjectAltNames are not allowed"),
        (request.addresses.is_empty(), "IP subjectAltNames are not allowed"),
        (request.uris.is_empty(), "URI subjectAltNames are not allowed"),
    ];
    if let Some((_, why)) = unwanted.iter().find(|(fine, _)| !fine) {
        return Err((*why).to_owned());
    }
    of_a_node(request)?;
    exactly(usages, "client auth")
}

fn for_kubelet_serving(request: &Request, usages: &BTreeSet<&str>) -> Result<(), String> {
    of_nodes(request)?;
    if request.dns.is_empty() && request.addresses.is_empty() {
        return Err("DNS or IP subjectAltName is required".to_owned());
    }
    if !request.emails.is_empty() {
        return Err("Email subjectAltNames are not allowed".to_owned());
    }
    if !request.uris.is_empty() {
        return Err("URI subjectAltNames are not allowed".to_owned());
    }
    exactly(usages, "server auth")?;
    of_a_node(request)
}

fn of_nodes(request: &Request) -> Result<(), String> {
    match request.organizations.as_slice() {
        [one] if one == NODES => Ok(()),
        _ => Err(format!("subject organization is not {NODES}")),
    }
}

fn of_a_node(request: &Request) -> Result<(), String> {
    match request.common_name.starts_with(NODE_PREFIX) {
        true => Ok(()),
        false => Err(format!("subject common name does not begin with {NODE_PREFIX}")),
    }
}

/// What a kubelet's certificate is for; keys that cannot encipher need not say they do.
fn exactly(usages: &BTreeSet<&str>, purpose: &str) -> Result<(), String> {
    let all = BTreeSet::from(["digital signature", "key encipherment", purpose]);
    if *usages == all || *usages == BTreeSet::from(["digital signature", purpose]) {
        return Ok(());
    }
    Err(format!("usages did not match [{}]", all.into_iter().collect::<Vec<_>>().join(" ")))
}

#[cfg(test)]
mod tests;
