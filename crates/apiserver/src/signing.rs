//! Certificate signing requests at admission: who may approve, who may sign, and what may be asked for.

use base64::Engine;
use knarr_api::object::Object;
use knarr_api::status::{Result, Status};
use serde_json::Value;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer;

use crate::admission::{Attributes, Operation};
use crate::identity::MASTERS;
use crate::rbac::Action;
use crate::registry::Endpoint;

const GROUP: &str = "certificates.k8s.io";
const CLIENT_SIGNER: &str = "kubernetes.io/kube-apiserver-client";

/// Judges new requests, approvals, and signatures.
pub fn check(a: &Attributes, request: &Value) -> Result<()> {
    if a.place.kind.resource() != "certificatesigningrequests.certificates.k8s.io" {
        return Ok(());
    }
    let name = if a.place.name.is_empty() { request.name() } else { a.place.name };
    let refuse = |why: String| Err(Status::forbidden(a.place.kind, name, why));
    let signer = a.old.unwrap_or(request).str_at("spec.signerName");
    match (a.operation, a.endpoint) {
        (Operation::Create, _) if signer == CLIENT_SIGNER && asks_for_masters(request) => {
            refuse(format!("use of {CLIENT_SIGNER} signer with {MASTERS} group is not allowed"))
        }
        (Operation::Update, Endpoint::Other("approval")) if !may(a, "approve", signer) => {
            refuse(format!("user not permitted to approve requests with signerName {signer:?}"))
        }
        (Operation::Update, Endpoint::Status) => {
            let old = a.old.unwrap_or(request);
            let signs = request.at("status.certificate") != old.at("status.certificate")
                || request.at("status.conditions") != old.at("status.conditions");
            if signs && !may(a, "sign", signer) {
                return refuse(format!("user not permitted to sign requests with signerName {signer:?}"));
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Verdicts say when they were written, and since when they hold.
pub fn date_conditions(a: &Attributes, request: &mut Value) -> Result<()> {
    let written = matches!(a.endpoint, Endpoint::Status | Endpoint::Other("approval"));
    if !written || a.place.kind.resource() != "certificatesigningrequests.certificates.k8s.io" {
        return Ok(());
    }
    let (now, none) = (a.registry.now(), Value::Null);
    let before = a.old.unwrap_or(&none).list_at("status.conditions");
    let conditions =
        request.get_mut("status").and_then(|s| s.get_mut("conditions")).and_then(Value::as_array_mut);
    for condition in conditions.into_iter().flatten() {
        if condition.at("lastUpdateTime").is_none() {
            condition["lastUpdateTime"] = Value::from(now.as_str());
        }
        let (kind, status) = (condition.str_at("type"), condition.str_at("status"));
        let same = before.iter().find(|c| c.str_at("type") == kind && c.str_at("status") == status);
        let since = same.and_then(|c| c.at("lastTransitionTime")).cloned();
        if let Some(since) = since {
            condition["lastTransitionTime"] = since;
        } else if condition.at("lastTransitionTime").is_none() {
            condition["lastTransitionTime"] = Value::from(now.as_str());
        }
    }
    Ok(())
}

/// The verb on the signer itself, or on all signers of its domain.
fn may(a: &Attributes, verb: &str, signer: &str) -> bool {
    let Some(rbac) = &a.context.rbac else { return true };
    let domain = format!("{}/*", signer.split('/').next().unwrap_or_default());
    [signer, domain.as_str()].iter().any(|name| {
        let action = Action {
            verb,
            group: GROUP,
            resource: "signers",
            subresource: "",
            namespace: "",
            name,
            path: None,
        };
        rbac.allows(&a.context.user, &action)
    })
}

/// What cannot be read asks for nothing; the signer will refuse it.
fn asks_for_masters(request: &Value) -> bool {
    let standard = base64::engine::general_purpose::STANDARD;
    let Ok(pem) = standard.decode(request.str_at("spec.request")) else { return false };
    let Ok((_, block)) = x509_parser::pem::parse_x509_pem(&pem) else { return false };
    let Ok((_, parsed)) = X509CertificationRequest::from_der(&block.contents) else { return false };
    let subject = &parsed.certification_request_info.subject;
    subject.iter_organization().any(|o| o.as_str().is_ok_and(|o| o == MASTERS))
}
