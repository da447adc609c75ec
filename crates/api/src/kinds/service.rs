//! The strategy of services. Addresses and node ports are allocated by the registry.

use std::collections::HashSet;

use serde_json::{Value, json};

use crate::field::{self, child, index};
use crate::kinds::core::{ip, keep};
use crate::names;
use crate::object::Object;
use crate::rules::{Errors, Rules, labels, one_of};

pub const SERVICE: Rules = Rules {
    name: names::dns_label_1035,
    generation: false,
    create: |object| object.set_at("status", json!({ "loadBalancer": {} })),
    update: |new, old| {
        keep(new, old, "status");
        keep_allocations(new, old);
    },
    update_status: |new, old| keep(new, old, "spec"),
    validate,
    validate_update: |new, old, errors| {
        let (was, is) = (old.str_at("spec.clusterIP"), new.str_at("spec.clusterIP"));
        let external = [new, old].iter().any(|s| s.str_at("spec.type") == "ExternalName");
        if !external && !was.is_empty() && was != is {
            errors.push(field::Error::invalid("spec.clusterIPs[0]", is, "may not change once set"));
        }
    },
    selectable: &["spec.clusterIP", "spec.type"],
    returns_deleted: true,
    ..Rules::DEFAULT
};

/// A client that sends its own version of a service back keeps what the server allocated.
fn keep_allocations(new: &mut Value, old: &Value) {
    let (kind, was) = (new.str_at("spec.type").to_owned(), old.str_at("spec.type").to_owned());
    if kind == "ExternalName" {
        for name in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
            if new.at(&format!("spec.{name}")) == old.at(&format!("spec.{name}")) {
                new.remove_at(&format!("spec.{name}"));
            }
        }
        return;
    }
    if was != "ExternalName" {
        for name in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
            let path = format!("spec.{name}");
            if new.at(&path).is_none_or(|v| v == "")
                && !(name == "clusterIPs" && new.at("spec.clusterIP") != old.at("spec.clusterIP"))
            {
                keep(new, old, &path);
            }
        }
    }
    let needs_node_ports = |k: &str| matches!(k, "NodePort" | "LoadBalancer");
    if needs_node_ports(&kind) && needs_node_ports(&was) {
        let olds = old.list_at("spec.ports").to_vec();
        let Some(Value::Array(ports)) = new.get_mut("spec").and_then(|s| s.get_mut("ports")) else { return };
        for port in ports.iter_mut().filter(|p| p.int_at("nodePort").unwrap_or(0) == 0) {
            let same = olds.iter().find(|o| {
                o.get("port") == port.get("port") && o.str_at("protocol") == port.str_at("protocol")
            });
            if let Some(number) = same.and_then(|o| o.at("nodePort")) {
                port["nodePort"] = number.clone();
            }
        }
    } else if !needs_node_ports(&kind) && needs_node_ports(&was) {
        let Some(Value::Array(ports)) = new.get_mut("spec").and_then(|s| s.get_mut("ports")) else { return };
        ports.iter_mut().for_each(|p| drop(p.remove_at("nodePort")));
        new.remove_at("spec.externalTrafficPolicy");
        new.remove_at("spec.allocateLoadBalancerNodePorts");
    }
}

fn validate(object: &Value, errors: &mut Errors) {
    let spec = object.at("spec").unwrap_or(&Value::Null);
    let kind = spec.str_at("type");
    one_of("spec", spec, "sessionAffinity", &["ClientIP", "None"], errors);
    one_of("spec", spec, "externalTrafficPolicy", &["Cluster", "Local"], errors);
    one_of("spec", spec, "internalTrafficPolicy", &["Cluster", "Local"], errors);
    labels("spec.selector", spec.at("selector"), errors);
    let headless = spec.str_at("clusterIP") == "None";
    let ports = spec.list_at("ports");
    if ports.is_empty() && !headless && kind != "ExternalName" {
        errors.push(field::Error::required("spec.ports", ""));
    }
    one_of("spec", spec, "type", &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"], errors);
    if kind == "ExternalName" {
        if !spec.list_at("clusterIPs").is_empty() || !spec.str_at("clusterIP").is_empty() {
            let detail = "may not be set for ExternalName services";
            errors.push(field::Error::forbidden("spec.clusterIPs", detail));
        }
        let name = spec.str_at("externalName");
        if name.is_empty() {
            errors.push(field::Error::required("spec.externalName", ""));
        } else {
            let bare = name.strip_suffix('.').unwrap_or(name);
            for problem in names::dns_subdomain(bare) {
                errors.push(field::Error::invalid("spec.externalName", name, problem));
            }
        }
    }
    let address = spec.str_at("clusterIP");
    if !address.is_empty() && !headless {
        ip("spec.clusterIPs[0]", address, errors);
    }
    if headless && matches!(kind, "NodePort" | "LoadBalancer") {
        let detail = format!("may not be set to 'None' for {kind} services");
        errors.push(field::Error::invalid("spec.clusterIPs[0]", "None", detail));
    }
    for (i, address) in spec.list_at("externalIPs").iter().enumerate() {
        ip(&index("spec.externalIPs", i), address.as_str().unwrap_or_default(), errors);
    }
    if spec.str_at("sessionAffinity") == "ClientIP" {
        let seconds = spec.int_at("sessionAffinityConfig.clientIP.timeoutSeconds").unwrap_or(10_800);
        if !(1..=86_400).contains(&seconds) {
            let at = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
            errors.push(field::Error::invalid(at, seconds, "must be greater than 0 and less than 86400"));
        }
    }
    source_ranges(spec, errors);
    if !spec.str_at("externalTrafficPolicy").is_empty() && !matches!(kind, "NodePort" | "LoadBalancer") {
        let reachable = kind == "ClusterIP" && !spec.list_at("externalIPs").is_empty();
        if !reachable {
            let detail = "may only be set for externally-accessible services";
            let value = spec.str_at("externalTrafficPolicy");
            errors.push(field::Error::invalid("spec.externalTrafficPolicy", value, detail));
        }
    }
    validate_ports(ports, errors);
}

fn source_ranges(spec: &Value, errors: &mut Errors) {
    let ranges = spec.list_at("loadBalancerSourceRanges");
    // Upstream's path has the capital.
    let at = "spec.LoadBalancerSourceRanges";
    if ranges.is_empty() {
        return;
    }
    if spec.str_at("type") != "LoadBalancer" {
        errors.push(field::Error::forbidden(at, "may only be used when `type` is 'LoadBalancer'"));
    }
    for (i, range) in ranges.iter().enumerate() {
        let text = range.as_str().unwrap_or_default().trim();
        if crate::kinds::networking::Cidr::parse(text).is_none() {
            let path = index(at, i);
            errors.push(field::Error::invalid(path, text, crate::kinds::networking::BAD_CIDR));
        }
    }
}

fn validate_ports(ports: &[Value], errors: &mut Errors) {
    let (mut names_seen, mut pairs, mut node_ports) = (HashSet::new(), HashSet::new(), HashSet::new());
    for (i, port) in ports.iter().enumerate() {
        let at = index("spec.ports", i);
        let name = port.str_at("name");
        if name.is_empty() && ports.len() > 1 {
            errors.push(field::Error::required(child(&at, "name"), ""));
        } else if !name.is_empty() {
            for problem in names::dns_label(name) {
                errors.push(field::Error::invalid(child(&at, "name"), name, problem));
            }
            if !names_seen.insert(name.to_owned()) {
                errors.push(field::Error::duplicate(child(&at, "name"), name));
            }
        }
        let number = port.int_at("port").unwrap_or(0);
        for problem in names::port_number(number) {
            errors.push(field::Error::invalid(child(&at, "port"), number, problem));
        }
        match port.str_at("protocol") {
            "" => errors.push(field::Error::required(child(&at, "protocol"), "")),
            _ => one_of(&at, port, "protocol", &["SCTP", "TCP", "UDP"], errors),
        }
        match port.get("targetPort") {
            Some(Value::Number(n)) => {
                let number = n.as_i64().unwrap_or(0);
                for problem in names::port_number(number) {
                    errors.push(field::Error::invalid(child(&at, "targetPort"), number, problem));
                }
            }
            Some(Value::String(name)) => {
                for problem in names::port_name(name) {
                    errors.push(field::Error::invalid(child(&at, "targetPort"), name.as_str(), problem));
                }
            }
            // Go's zero, where neither port is given.
            _ if port.at("port").is_none() => {
                for problem in names::port_number(0) {
                    errors.push(field::Error::invalid(child(&at, "targetPort"), 0, problem));
                }
            }
            _ => {}
        }
        let protocol = port.str_at("appProtocol");
        if !protocol.is_empty() {
            crate::rules::named(&child(&at, "appProtocol"), protocol, names::qualified_name, errors);
        }
        if !pairs.insert((number, port.str_at("protocol").to_owned())) {
            let value = json!({ "port": number, "protocol": port.str_at("protocol") });
            errors.push(field::Error::duplicate(at.clone(), value));
        }
        let node_port = port.int_at("nodePort").unwrap_or(0);
        if node_port != 0 && !node_ports.insert((node_port, port.str_at("protocol").to_owned())) {
            errors.push(field::Error::duplicate(child(&at, "nodePort"), node_port));
        }
    }
}
