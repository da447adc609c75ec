//! Requests of real keys, signed by a real authority.

use super::*;
use crate::Config;
use crate::harness::Harness;
use knarr_client::testing::Faults;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, KeyUsagePurpose, SanType};
use std::time::Duration;

fn authority() -> Authority {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "the-ca");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    Authority { certificate: params.self_signed(&key).unwrap().pem(), key: key.serialize_pem() }
}

fn harness() -> Harness {
    let config = Config { authority: Some(authority()), ..Default::default() };
    Harness::with_config(0, Faults::default(), config)
}

/// A request as PEM.
fn request(name: &str, organization: &str, names: Vec<SanType>) -> String {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, organization);
    params.distinguished_name.push(DnType::CommonName, name);
    params.subject_alt_names = names;
    params.serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap()
}

const FOR_CLIENT: [&str; 2] = ["digital signature", "client auth"];
const FOR_SERVER: [&str; 2] = ["digital signature", "server auth"];

async fn ask(harness: &Harness, name: &str, signer: &str, pem: String, usages: &[&str], extra: Value) {
    let mut spec = json!({
        "signerName": signer, "request": ByteString(pem.into_bytes()), "usages": usages, "username": "somebody",
    });
    for (field, value) in extra.as_object().into_iter().flatten() {
        spec[field] = value.clone();
    }
    let csr = json!({"metadata": {"name": name}, "spec": spec});
    harness.create_global::<CertificateSigningRequest>(csr).await;
}

async fn judge(harness: &Harness, name: &str, verdict: &str) {
    let condition = json!({
        "type": verdict, "status": "True", "reason": "ByHand", "lastUpdateTime": harness.context.clock.time(),
    });
    let change = json!({"status": {"conditions": [condition]}});
    let api: Api<CertificateSigningRequest> = Api::all(harness.client());
    api.patch_approval(name, &PatchParams::default(), &Patch::Merge(change)).await.unwrap();
}

fn find<'a>(all: &'a [CertificateSigningRequest], name: &str) -> Option<&'a CertificateSigningRequest> {
    all.iter().find(|csr| csr.metadata.name.as_deref() == Some(name))
}

async fn signed(harness: &Harness, name: &str) -> Vec<u8> {
    let is_signed =
        |all: &[CertificateSigningRequest]| find(all, name).is_some_and(|c| certificate(c).is_some());
    let all = harness.api.wait_for::<CertificateSigningRequest>("the certificate", is_signed).await;
    let (_, block) =
        x509_parser::pem::parse_x509_pem(certificate(find(&all, name).unwrap()).unwrap()).unwrap();
    block.contents
}

#[tokio::test(start_paused = true)]
async fn an_approved_request_is_signed_as_it_asks() {
    let harness = harness();
    harness.start(start_signing);
    let names = vec![SanType::DnsName("n1".try_into().unwrap()), SanType::IpAddress([10, 0, 0, 7].into())];
    let pem = request("system:node:n1", NODES, names);
    ask(&harness, "serving", KUBELET_SERVING, pem, &FOR_SERVER, json!({"expirationSeconds": 3600})).await;
    harness.api.settle(Duration::from_secs(10)).await;
    assert!(
        certificate(&harness.api.objects::<CertificateSigningRequest>()[0]).is_none(),
        "not yet approved"
    );
    judge(&harness, "serving", "Approved").await;
    let der = signed(&harness, "serving").await;
    let (_, leaf) = x509_parser::parse_x509_certificate(&der).unwrap();
    let ca = harness.context.config.authority.clone().unwrap();
    let (_, ca) = x509_parser::pem::parse_x509_pem(ca.certificate.as_bytes()).unwrap();
    let (_, ca) = x509_parser::parse_x509_certificate(&ca.contents).unwrap();
    leaf.verify_signature(Some(ca.public_key())).expect("the authority signed it");
    assert_eq!(leaf.issuer(), ca.subject());
    assert_eq!(leaf.subject().to_string(), "O=system:nodes, CN=system:node:n1");
    let names = leaf.subject_alternative_name().unwrap().unwrap().value.general_names.len();
    assert_eq!(names, 2);
    assert!(leaf.extended_key_usage().unwrap().unwrap().value.server_auth);
    let usage = leaf.key_usage().unwrap().unwrap().value;
    assert!(usage.digital_signature() && !usage.key_encipherment() && !usage.key_cert_sign());
    assert!(!leaf.is_ca());
    let lasts = leaf.validity().not_after.timestamp() - harness.context.clock.now().as_second();
    assert!((3590..=3600).contains(&lasts), "as long as asked for, not {lasts} s");
    harness.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn what_does_not_fit_its_signer_fails_and_says_why() {
    let name = || vec![SanType::DnsName("n1".try_into().unwrap())];
    let node = |names| request("system:node:n1", NODES, names);
    let cases = [
        (KUBELET_SERVING, node(vec![]), &FOR_SERVER, "DNS or IP subjectAltName is required"),
        (
            KUBELET_SERVING,
            node(name()),
            &FOR_CLIENT,
            "usages did not match [digital signature key encipherment server auth]",
        ),
        (KUBELET_CLIENT, node(name()), &FOR_CLIENT, "DNS subjectAltNames are not allowed"),
        (
            KUBELET_CLIENT,
            request("system:node:n1", "x", vec![]),
            &FOR_CLIENT,
            "subject organization is not system:nodes",
        ),
        (
            KUBELET_CLIENT,
            request("n1", NODES, vec![]),
            &FOR_CLIENT,
            "subject common name does not begin with system:node:",
        ),
        (
            CLIENT,
            request("me", "x", vec![]),
            &FOR_SERVER,
            "invalid usage for client certificate: server auth",
        ),
    ];
    for (signer, pem, usages, why) in cases {
        let harness = harness();
        harness.start(start_signing);
        ask(&harness, "r", signer, pem, usages, json!({})).await;
        judge(&harness, "r", "Approved").await;
        let failed = |all: &[CertificateSigningRequest]| {
            let status = all[0].status.clone().unwrap_or_default();
            util::find(&status.conditions, "Failed").is_some_and(|condition| {
                condition.reason.as_deref() == Some("SignerValidationFailure")
                    && condition.message.as_deref() == Some(why)
            })
        };
        harness.api.wait_for::<CertificateSigningRequest>(why, failed).await;
        harness.assert_quiet().await;
    }
}

#[tokio::test(start_paused = true)]
async fn anything_is_signed_for_the_legacy_signer_and_nothing_for_strangers() {
    let harness = harness();
    harness.start(start_signing);
    let pem = request("whoever", "x", vec![]);
    ask(&harness, "legacy", LEGACY, pem.clone(), &["code signing"], json!({})).await;
    ask(&harness, "strange", "example.com/own", pem, &FOR_CLIENT, json!({})).await;
    judge(&harness, "legacy", "Approved").await;
    judge(&harness, "strange", "Approved").await;
    let der = signed(&harness, "legacy").await;
    let (_, leaf) = x509_parser::parse_x509_certificate(&der).unwrap();
    assert!(leaf.extended_key_usage().unwrap().unwrap().value.code_signing);
    let all = harness.api.objects::<CertificateSigningRequest>();
    assert!(certificate(find(&all, "strange").unwrap()).is_none());
}

#[tokio::test(start_paused = true)]
async fn kubelets_that_may_are_approved() {
    let harness = harness();
    harness.start(start_approving);
    harness.api.allow("selfnodeclient");
    let pem = request("system:node:n1", NODES, vec![]);
    ask(&harness, "other", KUBELET_CLIENT, pem.clone(), &FOR_CLIENT, json!({})).await;
    ask(&harness, "self", KUBELET_CLIENT, pem.clone(), &FOR_CLIENT, json!({"username": "system:node:n1"}))
        .await;
    ask(&harness, "client", CLIENT, pem, &FOR_CLIENT, json!({})).await;
    let approved =
        |all: &[CertificateSigningRequest]| find(all, "self").is_some_and(|csr| has(csr, "Approved"));
    let all = harness.api.wait_for::<CertificateSigningRequest>("the approval", approved).await;
    let status = find(&all, "self").unwrap().status.clone().unwrap();
    let condition = util::find(&status.conditions, "Approved").unwrap();
    assert_eq!(condition.reason.as_deref(), Some("AutoApproved"));
    harness.api.settle(Duration::from_secs(10)).await;
    let all = harness.api.objects::<CertificateSigningRequest>();
    assert!(!has(find(&all, "other").unwrap(), "Approved"), "another's name needs nodeclient");
    assert!(!has(find(&all, "client").unwrap(), "Approved"), "not a kubelet's");
    harness.api.allow("nodeclient");
    let approved =
        |all: &[CertificateSigningRequest]| find(all, "other").is_some_and(|csr| has(csr, "Approved"));
    harness.api.wait_for::<CertificateSigningRequest>("the other approval", approved).await;
}

#[tokio::test(start_paused = true)]
async fn requests_go_when_they_are_over() {
    let harness = harness();
    harness.start(start_signing);
    harness.start(start_cleaning);
    let pem = request("me", "x", vec![]);
    for name in ["pending", "denied", "issued", "waits"] {
        let signer = if name == "waits" { "example.com/own" } else { CLIENT };
        ask(&harness, name, signer, pem.clone(), &FOR_CLIENT, json!({})).await;
    }
    judge(&harness, "denied", "Denied").await;
    judge(&harness, "issued", "Approved").await;
    judge(&harness, "waits", "Approved").await;
    let began = tokio::time::Instant::now();
    let gone = |name: &'static str| move |all: &[CertificateSigningRequest]| find(all, name).is_none();
    for name in ["denied", "issued"] {
        harness.api.wait_for::<CertificateSigningRequest>(name, gone(name)).await;
    }
    let took = began.elapsed().as_secs();
    assert!((3590..=3610).contains(&took), "an hour, not {took} s");
    tokio::time::sleep(Duration::from_secs(22 * 3600)).await;
    assert!(find(&harness.api.objects(), "pending").is_some());
    tokio::time::sleep(Duration::from_secs(3 * 3600)).await;
    assert!(find(&harness.api.objects(), "pending").is_none());
    assert!(find(&harness.api.objects(), "waits").is_some());
}

#[tokio::test(start_paused = true)]
async fn a_server_that_trusts_the_authority_accepts_what_it_signed() {
    use rustls::pki_types::{CertificateDer, UnixTime};
    use rustls::server::WebPkiClientVerifier;
    let harness = harness();
    harness.start(start_signing);
    ask(&harness, "me", CLIENT, request("me", "people", vec![]), &FOR_CLIENT, json!({})).await;
    ask(&harness, "code", LEGACY, request("me", "people", vec![]), &["code signing"], json!({})).await;
    judge(&harness, "me", "Approved").await;
    judge(&harness, "code", "Approved").await;
    let ca = harness.context.config.authority.clone().unwrap();
    let (_, ca) = x509_parser::pem::parse_x509_pem(ca.certificate.as_bytes()).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from(ca.contents)).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
    let check = |der: Vec<u8>| verifier.verify_client_cert(&CertificateDer::from(der), &[], UnixTime::now());
    check(signed(&harness, "me").await).expect("a client's certificate is accepted");
    check(signed(&harness, "code").await).expect_err("one for other uses is not");
}
