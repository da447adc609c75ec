//! Strategies of `networking.k8s.io`: Ingress, IngressClass, NetworkPolicy, IPAddress, ServiceCIDR.

use std::net::IpAddr;

use serde_json::{Value, json};

use crate::field::{self, child, index};
use crate::kinds::core::keep;
use crate::names;
use crate::object::Object;
use crate::rules::{Errors, Rules, immutable, label_selector, named, one_of, port_or_name, required};

pub const INGRESS: Rules = Rules {
    reported_group: Some("extensions"),
    create: |object| object.set_at("status", json!({ "loadBalancer": {} })),
    update_status: |new, old| keep(new, old, "spec"),
    validate: |object, errors| {
        let spec = object.at("spec").unwrap_or(&Value::Null);
        if spec.list_at("rules").is_empty() && spec.at("defaultBackend").is_none() {
            let detail = "either `defaultBackend` or `rules` must be specified";
            errors.push(field::Error::invalid("spec", Value::Null, detail));
        }
        if let Some(backend) = spec.at("defaultBackend") {
            ingress_backend("spec.defaultBackend", backend, errors);
        }
        for (i, rule) in spec.list_at("rules").iter().enumerate() {
            ingress_rule(&index("spec.rules", i), rule, errors);
        }
        for (i, tls) in spec.list_at("tls").iter().enumerate() {
            ingress_tls(&index("spec.tls", i), tls, errors);
        }
        if let Some(class) = spec.at("ingressClassName") {
            let class = class.as_str().unwrap_or_default();
            named("spec.ingressClassName", class, names::dns_subdomain, errors);
        }
    },
    ..Rules::DEFAULT
};

fn host_name(path: &str, host: &str, errors: &mut Errors) {
    if host.contains('*') {
        named(path, host, names::wildcard_subdomain, errors);
    } else {
        named(path, host, names::dns_subdomain, errors);
    }
}

fn ingress_rule(at: &str, rule: &Value, errors: &mut Errors) {
    let host = rule.str_at("host");
    if !host.is_empty() {
        if host.parse::<IpAddr>().is_ok() {
            let detail = "must be a DNS name, not an IP address";
            errors.push(field::Error::invalid(child(at, "host"), host, detail));
        }
        host_name(&child(at, "host"), host, errors);
    }
    let Some(http) = rule.at("http") else { return };
    let at = child(at, "http");
    required(&at, http, "paths", "", errors);
    for (i, path) in http.list_at("paths").iter().enumerate() {
        ingress_path(&index(&child(&at, "paths"), i), path, errors);
    }
}

fn ingress_path(at: &str, path: &Value, errors: &mut Errors) {
    let Some(kind) = path.at("pathType") else {
        errors.push(field::Error::required(child(at, "pathType"), "pathType must be specified"));
        return;
    };
    let (kind, text) = (kind.as_str().unwrap_or_default(), path.str_at("path"));
    let relative = !text.starts_with('/');
    match kind {
        "Exact" | "Prefix" => {
            if relative {
                errors.push(field::Error::invalid(child(at, "path"), text, "must be an absolute path"));
            }
            for bad in ["//", "/./", "/../", "%2f", "%2F"].iter().filter(|b| text.contains(**b)) {
                let detail = format!("must not contain '{bad}'");
                errors.push(field::Error::invalid(child(at, "path"), text, detail));
            }
            for bad in ["/..", "/."].iter().filter(|b| text.ends_with(**b)) {
                let detail = format!("cannot end with '{bad}'");
                errors.push(field::Error::invalid(child(at, "path"), text, detail));
            }
        }
        "ImplementationSpecific" => {
            if !text.is_empty() && relative {
                errors.push(field::Error::invalid(child(at, "path"), text, "must be an absolute path"));
            }
        }
        other => errors.push(field::Error::not_supported(
            child(at, "pathType"),
            other,
            &["Exact", "ImplementationSpecific", "Prefix"],
        )),
    }
    ingress_backend(&child(at, "backend"), path.at("backend").unwrap_or(&Value::Null), errors);
}

fn ingress_backend(at: &str, backend: &Value, errors: &mut Errors) {
    match (backend.at("resource"), backend.at("service")) {
        (Some(_), Some(_)) => {
            errors.push(field::Error::invalid(at, "", "cannot set both resource and service backends"));
        }
        (Some(resource), None) => typed_reference(&child(at, "resource"), resource, errors),
        (None, Some(service)) => {
            let path = child(at, "service");
            if required(&path, service, "name", "", errors) {
                named(&child(&path, "name"), service.str_at("name"), names::dns_label_1035, errors);
            }
            let (name, number) = (service.str_at("port.name"), service.int_at("port.number").unwrap_or(0));
            match (name, number) {
                ("", 0) => errors.push(field::Error::required(at, "port name or number is required")),
                ("", number) => port_or_name(&child(&path, "port.number"), &json!(number), errors),
                (name, 0) => named(&child(&path, "port.name"), name, names::port_name, errors),
                _ => errors.push(field::Error::invalid(at, "", "cannot set both port name & port number")),
            }
        }
        (None, None) => {
            errors.push(field::Error::invalid(at, "", "resource or service backend is required"));
        }
    }
}

/// `core.TypedLocalObjectReference`.
fn typed_reference(at: &str, reference: &Value, errors: &mut Errors) {
    if let Some(group) = reference.at("apiGroup") {
        named(&child(at, "apiGroup"), group.as_str().unwrap_or_default(), names::dns_subdomain, errors);
    }
    for name in ["kind", "name"] {
        if required(at, reference, name, &format!("{name} is required"), errors) {
            named(&child(at, name), reference.str_at(name), names::path_segment, errors);
        }
    }
}

fn ingress_tls(at: &str, tls: &Value, errors: &mut Errors) {
    for (i, host) in tls.list_at("hosts").iter().enumerate() {
        host_name(&index(&child(at, "hosts"), i), host.as_str().unwrap_or_default(), errors);
    }
    let secret = tls.str_at("secretName");
    if !secret.is_empty() {
        named(&child(at, "secretName"), secret, names::dns_subdomain, errors);
    }
}

const CONTROLLER_BYTES_MAX: usize = 250;

pub const INGRESS_CLASS: Rules = Rules {
    validate: |object, errors| {
        let controller = object.str_at("spec.controller");
        if controller.len() > CONTROLLER_BYTES_MAX {
            errors.push(field::Error::too_long("spec.controller", CONTROLLER_BYTES_MAX));
        }
        if controller.is_empty() {
            errors.push(field::Error::required("spec.controller", ""));
        } else {
            named("spec.controller", controller, names::domain_prefixed_path, errors);
        }
        if let Some(parameters) = object.at("spec.parameters") {
            class_parameters("spec.parameters", parameters, errors);
        }
    },
    validate_update: |new, old, errors| immutable("spec.controller", new, old, errors),
    ..Rules::DEFAULT
};

fn class_parameters(at: &str, parameters: &Value, errors: &mut Errors) {
    typed_reference(at, parameters, errors);
    match (parameters.str_at("scope"), parameters.at("namespace")) {
        ("", _) => errors.push(field::Error::required(child(at, "scope"), "")),
        ("Namespace", None) => {
            let detail = "`parameters.scope` is set to 'Namespace'";
            errors.push(field::Error::required(child(at, "namespace"), detail));
        }
        ("Namespace", Some(namespace)) => {
            let namespace = namespace.as_str().unwrap_or_default();
            named(&child(at, "namespace"), namespace, names::dns_label, errors);
        }
        ("Cluster", Some(_)) => {
            let detail = "`parameters.scope` is set to 'Cluster'";
            errors.push(field::Error::forbidden(child(at, "namespace"), detail));
        }
        ("Cluster", None) => {}
        (other, _) => {
            errors.push(field::Error::not_supported(child(at, "scope"), other, &["Cluster", "Namespace"]));
        }
    }
}

pub const NETWORK_POLICY: Rules = Rules {
    reported_group: Some("extensions"),
    validate: |object, errors| {
        label_selector("spec.podSelector", object.at("spec.podSelector"), errors);
        for (list, peers) in [("ingress", "from"), ("egress", "to")] {
            for (i, rule) in object.at("spec").unwrap_or(&Value::Null).list_at(list).iter().enumerate() {
                let at = index(&child("spec", list), i);
                for (j, port) in rule.list_at("ports").iter().enumerate() {
                    policy_port(&index(&child(&at, "ports"), j), port, errors);
                }
                for (j, peer) in rule.list_at(peers).iter().enumerate() {
                    policy_peer(&index(&child(&at, peers), j), peer, errors);
                }
            }
        }
        let types = object.list_at("spec.policyTypes");
        if types.len() > 2 {
            let detail = "may not specify more than two policyTypes";
            errors.push(field::Error::invalid("spec.policyTypes", types.to_vec(), detail));
            return;
        }
        for (i, name) in types.iter().enumerate().filter(|(_, t)| *t != "Ingress" && *t != "Egress") {
            let at = index("spec.policyTypes", i);
            errors.push(field::Error::not_supported(at, name.clone(), &["Ingress", "Egress"]));
        }
    },
    ..Rules::DEFAULT
};

fn policy_port(at: &str, port: &Value, errors: &mut Errors) {
    one_of(at, port, "protocol", &["SCTP", "TCP", "UDP"], errors);
    let end = port.int_at("endPort");
    let invalid = |number: i64, detail: &str| field::Error::invalid(child(at, "endPort"), number, detail);
    match (port.at("port"), end) {
        (None, Some(end)) => errors.push(invalid(end, "may not be specified when `port` is not specified")),
        (None, None) => {}
        (Some(value), end) => {
            port_or_name(&child(at, "port"), value, errors);
            match (value.as_i64(), end) {
                (_, None) => {}
                (None, Some(end)) => {
                    errors.push(invalid(end, "may not be specified when `port` is non-numeric"));
                }
                (Some(start), Some(end)) => {
                    if end < start {
                        // Upstream shows the port, not its end.
                        errors.push(invalid(start, "must be greater than or equal to `port`"));
                    }
                    port_or_name(&child(at, "endPort"), &json!(end), errors);
                }
            }
        }
    }
}

fn policy_peer(at: &str, peer: &Value, errors: &mut Errors) {
    let selectors = ["podSelector", "namespaceSelector"];
    for name in selectors {
        label_selector(&child(at, name), peer.at(name), errors);
    }
    let selected = selectors.iter().any(|n| peer.at(n).is_some());
    match (peer.at("ipBlock"), selected) {
        (None, false) => errors.push(field::Error::required(at, "must specify a peer")),
        (None, true) => {}
        (Some(block), selected) => {
            ip_block(&child(at, "ipBlock"), block, errors);
            if selected {
                errors.push(field::Error::forbidden(at, "may not specify both ipBlock and another peer"));
            }
        }
    }
}

pub const BAD_CIDR: &str = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";

fn ip_block(at: &str, block: &Value, errors: &mut Errors) {
    let text = block.str_at("cidr");
    if text.is_empty() {
        errors.push(field::Error::required(child(at, "cidr"), ""));
        return;
    }
    let Some(outer) = Cidr::parse(text) else {
        errors.push(field::Error::invalid(child(at, "cidr"), text, BAD_CIDR));
        return;
    };
    for (i, except) in block.list_at("except").iter().enumerate() {
        let (path, text) = (index(&child(at, "except"), i), except.as_str().unwrap_or_default());
        match Cidr::parse(text) {
            None => errors.push(field::Error::invalid(path, text, BAD_CIDR)),
            Some(inner) if !outer.contains(&inner) || inner.length <= outer.length => {
                errors.push(field::Error::invalid(path, text, "must be a strict subset of `cidr`"));
            }
            Some(_) => {}
        }
    }
}

/// An address and a prefix length.
pub struct Cidr {
    bits: u128,
    length: u8,
    width: u8,
}

impl Cidr {
    pub fn parse(text: &str) -> Option<Cidr> {
        let (address, length) = text.split_once('/')?;
        let (bits, width) = match address.parse::<IpAddr>().ok()? {
            IpAddr::V4(v4) => (u128::from(u32::from(v4)), 32),
            IpAddr::V6(v6) => (u128::from(v6), 128),
        };
        let length: u8 = length.parse().ok().filter(|l| *l <= width)?;
        Some(Cidr { bits, length, width })
    }

    fn contains(&self, other: &Cidr) -> bool {
        let shift = u32::from(self.width - self.length);
        let prefix = |bits: u128| bits.checked_shr(shift).unwrap_or(0);
        self.width == other.width && prefix(self.bits) == prefix(other.bits)
    }
}

pub const IP_ADDRESS: Rules = Rules {
    name: |name| match name.parse::<IpAddr>() {
        Ok(address) if address.to_string() == name => Vec::new(),
        Ok(address) => vec![format!("must be in canonical form ({:?})", address.to_string())],
        Err(_) => vec!["must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)".into()],
    },
    validate: |object, errors| {
        let Some(parent) = object.at("spec.parentRef") else {
            errors.push(field::Error::required("spec.parentRef", ""));
            return;
        };
        for name in ["resource", "name"] {
            required("spec.parentRef", parent, name, "", errors);
        }
    },
    validate_update: |new, old, errors| immutable("spec.parentRef", new, old, errors),
    selectable: &["spec.parentRef.resource", "spec.parentRef.name"],
    ..Rules::DEFAULT
};

pub const SERVICE_CIDR: Rules = Rules {
    create: |object| object.set_at("status", json!({})),
    update_status: |new, old| keep(new, old, "spec"),
    validate: |object, errors| {
        let blocks = object.list_at("spec.cidrs");
        if blocks.is_empty() {
            errors.push(field::Error::required("spec.cidrs", "at least one CIDR required"));
        } else if blocks.len() > 2 {
            let detail = "may only hold up to 2 values";
            errors.push(field::Error::invalid("spec", object["spec"].clone(), detail));
        }
        for (i, block) in blocks.iter().enumerate() {
            let text = block.as_str().unwrap_or_default();
            if Cidr::parse(text).is_none() {
                errors.push(field::Error::invalid(index("spec.cidrs", i), text, BAD_CIDR));
            }
        }
        if let [one, other] = blocks
            && one.as_str().map(|text| text.contains(':')) == other.as_str().map(|text| text.contains(':'))
        {
            let detail =
                "may specify no more than one IP for each IP family, i.e 192.168.0.0/24 and 2001:db8::/64";
            errors.push(field::Error::invalid("spec.cidrs", blocks.to_vec(), detail));
        }
    },
    // A second family may be added; nothing goes away.
    validate_update: |new, old, errors| {
        let (is, was) = (new.list_at("spec.cidrs"), old.list_at("spec.cidrs"));
        if was.len() > is.len() {
            errors.push(field::Error::invalid("spec.cidrs", is.to_vec(), crate::rules::IMMUTABLE));
        }
        for (i, (is, _)) in is.iter().zip(was).enumerate().filter(|(_, (is, was))| is != was) {
            errors.push(field::Error::invalid(index("spec.cidrs", i), is.clone(), crate::rules::IMMUTABLE));
        }
    },
    ..Rules::DEFAULT
};
