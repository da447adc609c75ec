//! Strategies of the kinds that extend the API or prove identities: webhook configurations, API services,
//! certificate signing requests, runtime classes.

use std::collections::HashSet;

use base64::Engine;
use serde_json::{Value, json};

use crate::apply::Reach;
use crate::field::{self, child, index};
use crate::kinds::core::keep;
use crate::kinds::pod::validate_toleration;
use crate::names;
use crate::object::Object;
use crate::rules::{Errors, Face, Rules, immutable, label_selector, labels, named, required};

pub const WEBHOOKS: Rules = Rules {
    lenient_finalizers: true,
    validate: |object, errors| {
        let mut seen = HashSet::new();
        for (i, hook) in object.list_at("webhooks").iter().enumerate() {
            let at = index("webhooks", i);
            webhook(&at, hook, errors);
            if !hook.str_at("name").is_empty() && !seen.insert(hook.str_at("name")) {
                errors.push(field::Error::duplicate(child(&at, "name"), hook.str_at("name")));
            }
        }
    },
    ..Rules::DEFAULT
};

fn webhook(at: &str, hook: &Value, errors: &mut Errors) {
    // Hooks are named by at least three labels, as in `check.acme.io`.
    if required(at, hook, "name", "", errors) {
        let name = hook.str_at("name");
        let before = errors.len();
        named(&child(at, "name"), name, names::dns_subdomain, errors);
        if errors.len() == before && name.split('.').count() < 3 {
            let detail = "should be a domain with at least three segments separated by dots";
            errors.push(field::Error::invalid(child(at, "name"), name, detail));
        }
    }
    for (i, rule) in hook.list_at("rules").iter().enumerate() {
        webhook_rule(&index(&child(at, "rules"), i), rule, errors);
    }
    one_of_or_empty(at, hook, "failurePolicy", &["Fail", "Ignore"], errors);
    one_of_or_empty(at, hook, "matchPolicy", &["Equivalent", "Exact"], errors);
    one_of_or_empty(at, hook, "reinvocationPolicy", &["IfNeeded", "Never"], errors);
    match hook.at("sideEffects") {
        None => errors
            .push(field::Error::required(child(at, "sideEffects"), "must specify one of None, NoneOnDryRun")),
        Some(_) => one_of_or_empty(at, hook, "sideEffects", &["None", "NoneOnDryRun"], errors),
    }
    if let Some(seconds) = hook.int_at("timeoutSeconds").filter(|s| !(1..=30).contains(s)) {
        let detail = "the timeout value must be between 1 and 30 seconds";
        errors.push(field::Error::invalid(child(at, "timeoutSeconds"), seconds, detail));
    }
    for name in ["namespaceSelector", "objectSelector"] {
        label_selector(&child(at, name), hook.at(name), errors);
    }
    client_config(&child(at, "clientConfig"), hook.at("clientConfig").unwrap_or(&Value::Null), errors);
    review_versions(at, hook, errors);
}

/// Like `one_of`, but an empty text is a value like any other: the field is a pointer upstream.
fn one_of_or_empty(path: &str, object: &Value, name: &str, supported: &[&str], errors: &mut Errors) {
    if let Some(value) = object.at(name).and_then(Value::as_str).filter(|v| !supported.contains(v)) {
        errors.push(field::Error::not_supported(child(path, name), value, supported));
    }
}

fn review_versions(at: &str, hook: &Value, errors: &mut Errors) {
    let (path, versions) = (child(at, "admissionReviewVersions"), hook.list_at("admissionReviewVersions"));
    if versions.is_empty() {
        errors.push(field::Error::required(path, "must specify one of v1, v1beta1"));
        return;
    }
    let mut seen = HashSet::new();
    for (i, version) in versions.iter().enumerate() {
        let text = version.as_str().unwrap_or_default();
        if !seen.insert(text) {
            errors.push(field::Error::invalid(index(&path, i), text, "duplicate version"));
        }
        named(&index(&path, i), text, names::dns_label_1035, errors);
    }
    if !versions.iter().any(|v| v == "v1" || v == "v1beta1") {
        let detail = "must include at least one of v1, v1beta1";
        errors.push(field::Error::invalid(path, versions.to_vec(), detail));
    }
}

fn client_config(at: &str, config: &Value, errors: &mut Errors) {
    match (config.at("url"), config.at("service")) {
        (Some(url), None) => webhook_url(&child(at, "url"), url.as_str().unwrap_or_default(), errors),
        (None, Some(service)) => {
            let at = child(at, "service");
            required(&at, service, "name", "service name is required", errors);
            required(&at, service, "namespace", "service namespace is required", errors);
            if let Some(port) = service.int_at("port").filter(|p| !(1..=65_535).contains(p)) {
                let detail = "port is not valid: must be between 1 and 65535, inclusive";
                errors.push(field::Error::invalid(child(&at, "port"), port, detail));
            }
            let path = service.str_at("path");
            if !path.is_empty() && !path.starts_with('/') {
                let detail = "must start with a '/'";
                errors.push(field::Error::invalid(child(&at, "path"), path, detail));
            }
        }
        _ => errors.push(field::Error::required(at, "exactly one of url or service is required")),
    }
}

fn webhook_url(path: &str, url: &str, errors: &mut Errors) {
    const FORM: &str = "; desired format: https://host[/path]";
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let host_end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let host = if url.contains("://") { &rest[..host_end] } else { "" };
    let mut refuse =
        |part: &str, detail: &str| errors.push(field::Error::invalid(path, part, format!("{detail}{FORM}")));
    if scheme != "https" {
        refuse(scheme, "'https' is the only allowed URL scheme");
    }
    if host.is_empty() {
        refuse(host, "host must be provided");
    }
    if host.contains('@') {
        refuse(host, "user information is not permitted in the URL");
    }
    if rest.contains('#') {
        refuse(rest, "fragments are not permitted");
    }
    if rest.contains('?') {
        refuse(rest, "query parameters are not permitted");
    }
}

fn webhook_rule(at: &str, rule: &Value, errors: &mut Errors) {
    for (name, what) in
        [("operations", "operations"), ("apiGroups", "API groups"), ("apiVersions", "API versions")]
    {
        let (path, values) = (child(at, name), rule.list_at(name));
        if values.is_empty() {
            errors.push(field::Error::required(path.clone(), ""));
        }
        if values.len() > 1 && values.iter().any(|v| v == "*") {
            let detail = format!("if '*' is present, must not specify other {what}");
            errors.push(field::Error::invalid(path.clone(), values.to_vec(), detail));
        }
        let known = ["*", "CONNECT", "CREATE", "DELETE", "UPDATE"];
        for (i, value) in values.iter().enumerate() {
            let text = value.as_str().unwrap_or_default();
            if name == "operations" && !known.contains(&text) {
                errors.push(field::Error::not_supported(index(&path, i), text, &known));
            }
            if name == "apiVersions" && text.is_empty() {
                errors.push(field::Error::required(index(&path, i), ""));
            }
        }
    }
    rule_resources(&child(at, "resources"), rule.list_at("resources"), errors);
    one_of_or_empty(at, rule, "scope", &["*", "Cluster", "Namespaced"], errors);
}

fn rule_resources(path: &str, resources: &[Value], errors: &mut Errors) {
    if resources.is_empty() {
        errors.push(field::Error::required(path, ""));
    }
    // `*/x` covers the subresource of all, `x/*` all subresources of one.
    let (mut subs, mut owners) = (HashSet::new(), HashSet::new());
    for (i, resource) in resources.iter().enumerate() {
        let (at, text) = (index(path, i), resource.as_str().unwrap_or_default());
        if text.is_empty() {
            errors.push(field::Error::required(at.clone(), ""));
        }
        if text == "*/*" {
            subs.insert("*");
            owners.insert("*");
        }
        let Some((owner, sub)) = text.split_once('/').filter(|_| text != "*/*") else {
            if text == "*/*" && resources.len() > 1 && resources[..i].iter().any(|r| r == "*/*") {
                errors.push(field::Error::invalid(at, text, "if '*/*' is present, must not specify */*"));
            }
            continue;
        };
        if owners.contains(owner) {
            let detail = format!("if '{owner}/*' is present, must not specify {text}");
            errors.push(field::Error::invalid(at.clone(), text, detail));
        }
        if subs.contains(sub) {
            let detail = format!("if '*/{sub}' is present, must not specify {text}");
            errors.push(field::Error::invalid(at, text, detail));
        }
        if sub == "*" {
            owners.insert(owner);
        }
        if owner == "*" {
            subs.insert(sub);
        }
    }
    if resources.len() > 1 && resources.iter().any(|r| r == "*/*") {
        let detail = "if '*/*' is present, must not specify other resources";
        errors.push(field::Error::invalid(path, resources.to_vec(), detail));
    }
    if resources.iter().any(|r| r == "*")
        && resources.iter().any(|r| !r.as_str().unwrap_or_default().contains('/') && r != "*")
    {
        let detail = "if '*' is present, must not specify other resources without subresources";
        errors.push(field::Error::invalid(path, resources.to_vec(), detail));
    }
}

pub const API_SERVICE: Rules = Rules {
    name: names::path_segment,
    lenient_finalizers: true,
    generation: false,
    create: |object| {
        object.remove_at("status");
        if object.at("spec.service").is_none() {
            let condition = json!([{ "type": "Available", "status": "True", "reason": "Local",
                "lastTransitionTime": object.str_at("metadata.creationTimestamp"),
                "message": "Local APIServices are always available" }]);
            object.set_at("status.conditions", condition);
        }
    },
    update_status: |new, old| keep(new, old, "spec"),
    validate: |object, errors| {
        let (group, version) = (object.str_at("spec.group"), object.str_at("spec.version"));
        let wanted = format!("{version}.{group}");
        if object.name() != wanted && !object.name().is_empty() {
            let detail = format!("must be `spec.version+\".\"+spec.group`: {wanted:?}");
            errors.push(field::Error::invalid("metadata.name", object.name(), detail));
        }
        if group.is_empty() {
            if version != "v1" {
                errors.push(field::Error::required(
                    "spec.group",
                    "only v1 may have an empty group and it better be legacy kube",
                ));
            }
        } else {
            named("spec.group", group, names::dns_subdomain, errors);
        }
        named("spec.version", version, names::dns_label_1035, errors);
        for (name, most) in [("groupPriorityMinimum", 20_000), ("versionPriority", 1_000)] {
            let number = object.at("spec").and_then(|s| s.int_at(name)).unwrap_or(0);
            if number <= 0 || number > most {
                let detail = format!("must be positive and less than {most}");
                errors.push(field::Error::invalid(child("spec", name), number, detail));
            }
        }
        let trusting = object.bool_at("spec.insecureSkipTLSVerify");
        let Some(service) = object.at("spec.service") else {
            let bundle = object.str_at("spec.caBundle");
            if !bundle.is_empty() {
                let detail = "local APIServices may not have a caBundle";
                errors.push(field::Error::invalid(
                    "spec.caBundle",
                    format!("{} bytes", bundle.len()),
                    detail,
                ));
            }
            if trusting {
                let detail = "local APIServices may not have insecureSkipTLSVerify";
                errors.push(field::Error::invalid("spec.insecureSkipTLSVerify", true, detail));
            }
            return;
        };
        required("spec.service", service, "namespace", "", errors);
        required("spec.service", service, "name", "", errors);
        if let Some(port) = service.int_at("port").filter(|p| !(1..=65_535).contains(p)) {
            let detail = "port is not valid: must be between 1 and 65535, inclusive";
            errors.push(field::Error::invalid("spec.service.port", port, detail));
        }
        if trusting && !object.str_at("spec.caBundle").is_empty() {
            let detail = "may not be true if caBundle is present";
            errors.push(field::Error::invalid("spec.insecureSkipTLSVerify", true, detail));
        }
    },
    ..Rules::DEFAULT
};

const USAGES: [&str; 23] = [
    "any",
    "cert sign",
    "client auth",
    "code signing",
    "content commitment",
    "crl sign",
    "data encipherment",
    "decipher only",
    "digital signature",
    "email protection",
    "encipher only",
    "ipsec end system",
    "ipsec tunnel",
    "ipsec user",
    "key agreement",
    "key encipherment",
    "microsoft sgc",
    "netscape sgc",
    "ocsp signing",
    "s/mime",
    "server auth",
    "signing",
    "timestamping",
];

/// The identity fields are the server's; admission fills them in.
pub const CERTIFICATE_SIGNING_REQUEST: Rules = Rules {
    name: names::path_segment,
    generation: false,
    create: |object| object.set_at("status", json!({})),
    update: |new, old| {
        keep(new, old, "spec");
        keep(new, old, "status");
    },
    update_status: |new, old| {
        keep(new, old, "spec");
        keep_verdicts(new, old);
    },
    validate: |object, errors| {
        let spec = object.at("spec").unwrap_or(&Value::Null);
        let request = spec.str_at("request");
        if let Err(detail) = check_request(request) {
            errors.push(field::Error::invalid("spec.request", request, detail));
        }
        required("spec", spec, "usages", "usages must be provided", errors);
        let mut seen = HashSet::new();
        for (i, usage) in spec.list_at("usages").iter().enumerate() {
            let (at, usage) = (index("spec.usages", i), usage.as_str().unwrap_or_default());
            if !USAGES.contains(&usage) {
                errors.push(field::Error::not_supported(at.clone(), usage, &USAGES));
            }
            if !seen.insert(usage) {
                errors.push(field::Error::duplicate(at, usage));
            }
        }
        signer_name(spec.str_at("signerName"), errors);
        if let Some(seconds) = spec.int_at("expirationSeconds").filter(|s| *s < 600) {
            let detail = "may not specify a duration less than 600 seconds (10 minutes)";
            errors.push(field::Error::invalid("spec.expirationSeconds", seconds, detail));
        }
    },
    validate_status: |new, old, errors| judge_status(new, old, false, true, errors),
    faces: &[APPROVAL],
    selectable: &["spec.signerName"],
    ..Rules::DEFAULT
};

/// Conditions alone.
const APPROVAL: Face = Face {
    name: "approval",
    update: |new, old| {
        let conditions = new.remove_at("status.conditions");
        keep(new, old, "spec");
        keep(new, old, "status");
        match conditions {
            Some(conditions) => new.set_at("status.conditions", conditions),
            None => drop(new.remove_at("status.conditions")),
        }
    },
    validate: |new, old, errors| judge_status(new, old, true, false, errors),
    reach: Reach::AllBut(&["spec", "status.certificate"]),
};

/// Verdicts: written once, through `approval` alone, except that signers tell of failures.
const VERDICTS: [&str; 3] = ["Approved", "Denied", "Failed"];

fn conditions<'v>(request: &'v Value, kind: &'v str) -> impl Iterator<Item = &'v Value> {
    request.list_at("status.conditions").iter().filter(move |c| c.str_at("type") == kind)
}

/// Who writes the status does not change the verdicts that are there; how many there are is for validation to judge.
fn keep_verdicts(new: &mut Value, old: &Value) {
    for kind in ["Approved", "Denied"] {
        let kept: Vec<Value> = conditions(old, kind).cloned().collect();
        let list = new.get_mut("status").and_then(|s| s.get_mut("conditions")).and_then(Value::as_array_mut);
        let same = list.into_iter().flatten().filter(|c| c.str_at("type") == kind);
        same.zip(kept).for_each(|(condition, kept)| *condition = kept);
    }
}

/// What may happen to the status; `verdicts` and `certificate` say whether these may be written.
fn judge_status(new: &Value, old: &Value, verdicts: bool, certificate: bool, errors: &mut Errors) {
    let at = "status.conditions";
    let (mut seen, mut verdict) = (HashSet::new(), "");
    for (i, condition) in new.list_at(at).iter().enumerate() {
        let (path, kind) = (index(at, i), condition.str_at("type"));
        required(&path, condition, "type", "", errors);
        let states: &[&str] =
            if VERDICTS.contains(&kind) { &["True"] } else { &["False", "True", "Unknown"] };
        if required(&path, condition, "status", "", errors) {
            crate::rules::one_of(&path, condition, "status", states, errors);
        }
        if ["Approved", "Denied"].contains(&kind) {
            if !verdict.is_empty() && verdict != kind {
                let detail = "Approved and Denied conditions are mutually exclusive";
                errors.push(field::Error::invalid(child(&path, "type"), kind, detail));
            }
            verdict = kind;
        }
        if !seen.insert(kind) {
            errors.push(field::Error::duplicate(child(&path, "type"), kind));
        }
    }
    for kind in VERDICTS {
        let (is, was) = (conditions(new, kind).count(), conditions(old, kind).count());
        if is < was {
            let detail = format!("updates may not remove a condition of type {kind:?}");
            errors.push(field::Error::forbidden(at, detail));
        } else if is > was && !verdicts && kind != "Failed" {
            let detail = format!("updates may not add a condition of type {kind:?}");
            errors.push(field::Error::forbidden(at, detail));
        }
    }
    let (is, was) = (new.str_at("status.certificate"), old.str_at("status.certificate"));
    if is == was {
        return;
    }
    if !certificate {
        errors.push(field::Error::forbidden("status.certificate", "updates may not set certificate content"));
    } else if !was.is_empty() {
        let detail = "updates may not modify existing certificate content";
        errors.push(field::Error::forbidden("status.certificate", detail));
    }
    if let Err(detail) = check_certificate(is) {
        errors.push(field::Error::invalid("status.certificate", is, detail));
    }
}

/// One or more certificates in PEM, without headers, and nothing else.
fn check_certificate(encoded: &str) -> Result<(), String> {
    let bytes = base64::engine::general_purpose::STANDARD.decode(encoded).map_err(|e| e.to_string())?;
    let text = String::from_utf8(bytes).map_err(|_| "must contain one or more PEM blocks".to_owned())?;
    let mut blocks = 0;
    for block in text.split("-----BEGIN ").skip(1) {
        let kind = block.split("-----").next().unwrap_or_default();
        if kind != "CERTIFICATE" {
            return Err(format!("only CERTIFICATE PEM blocks are allowed, found {kind:?}"));
        }
        if !block.contains("-----END CERTIFICATE-----") {
            return Err("must contain one or more PEM blocks".to_owned());
        }
        if block.lines().any(|line| line.contains(": ")) {
            return Err("no PEM block headers are permitted".to_owned());
        }
        blocks += 1;
    }
    if blocks == 0 { Err("must contain one or more PEM blocks".to_owned()) } else { Ok(()) }
}

fn check_request(encoded: &str) -> Result<(), &'static str> {
    let wrong = "PEM block type must be CERTIFICATE REQUEST";
    let bytes = base64::engine::general_purpose::STANDARD.decode(encoded).map_err(|_| wrong)?;
    let text = String::from_utf8(bytes).map_err(|_| wrong)?;
    let (_, body) = text.split_once("-----BEGIN CERTIFICATE REQUEST-----").ok_or(wrong)?;
    body.contains("-----END CERTIFICATE REQUEST-----").then_some(()).ok_or(wrong)
}

fn signer_name(name: &str, errors: &mut Errors) {
    const AT: &str = "spec.signerName";
    if name.is_empty() {
        errors.push(field::Error::required(AT, "signerName must be provided"));
        return;
    }
    let parts: Vec<&str> = name.split('/').collect();
    let [domain, path] = parts[..] else {
        let detail = "must be a fully qualified domain and path of the form 'example.com/signer-name'";
        errors.push(field::Error::invalid(AT, name, detail));
        return;
    };
    let labels: Vec<&str> = domain.split('.').collect();
    for label in &labels {
        for problem in names::dns_label(label) {
            let detail = format!("validating label {label:?}: {problem}");
            errors.push(field::Error::invalid(AT, domain, detail));
        }
    }
    if labels.len() < 2 {
        let detail = "should be a domain with at least two segments separated by dots";
        errors.push(field::Error::invalid(AT, domain, detail));
    }
    named(AT, path, names::dns_subdomain, errors);
}

pub const RUNTIME_CLASS: Rules = Rules {
    generation: false,
    validate: |object, errors| {
        named("handler", object.str_at("handler"), names::dns_label, errors);
        labels("scheduling.nodeSelector", object.at("scheduling.nodeSelector"), errors);
        let tolerations = object.list_at("scheduling.tolerations");
        for (i, toleration) in tolerations.iter().enumerate() {
            // Upstream joins the field twice here.
            validate_toleration(&index("scheduling.tolerations.tolerations", i), toleration, errors);
            if tolerations[..i].contains(toleration) {
                errors.push(field::Error::duplicate(index("scheduling.tolerations", i), toleration.clone()));
            }
        }
    },
    validate_update: |new, old, errors| immutable("handler", new, old, errors),
    ..Rules::DEFAULT
};
