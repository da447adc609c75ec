//! The strategy of services. Addresses and node ports are allocated by the registry, which calls [`init_families`] first.

use std::collections::HashSet;
use std::net::IpAddr;

use serde_json::{Value, json};

use crate::field::{self, child, index};
use crate::kinds::core::{ip, keep};
use crate::names;
use crate::object::Object;
use crate::rules::{Errors, Rules, labels, one_of};

pub const SERVICE: Rules = Rules {
    name: names::dns_label_1035,
    generation: false,
    create: |object| {
        object.set_at("status", json!({ "loadBalancer": {} }));
        normalize_on_create(object);
    },
    update: |new, old| {
        keep(new, old, "status");
        keep_allocations(new, old);
        normalize_on_update(new, old);
        drop_what_the_type_lacks(new, old);
    },
    update_status: |new, old| keep(new, old, "spec"),
    validate,
    validate_update: |new, old, errors| {
        same_addresses(new, old, errors);
        same_families(new, old, errors);
        let class = "spec.loadBalancerClass";
        if is(new, "LoadBalancer") && is(old, "LoadBalancer") && new.at(class) != old.at(class) {
            errors.push(field::Error::invalid(class, value_at(new, class), ONCE_SET));
        }
        let health = "spec.healthCheckNodePort";
        if needs_health_port(new) && needs_health_port(old) && new.int_at(health) != old.int_at(health) {
            errors.push(field::Error::forbidden(health, crate::rules::IMMUTABLE));
        }
    },
    selectable: &["spec.clusterIP", "spec.type"],
    returns_deleted: true,
    ..Rules::DEFAULT
};

const ONCE_SET: &str = "may not change once set";
/// Fields that belong to a cluster address.
const ADDRESS_FIELDS: [&str; 4] = ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"];
pub const SINGLE: &str = "SingleStack";
pub const PREFER_DUAL: &str = "PreferDualStack";
pub const REQUIRE_DUAL: &str = "RequireDualStack";

fn is(service: &Value, kind: &str) -> bool {
    service.str_at("spec.type") == kind
}

fn value_at(service: &Value, path: &str) -> Value {
    service.at(path).cloned().unwrap_or(Value::Null)
}

/// Has a cluster address, or says that it wants none.
pub fn needs_address(service: &Value) -> bool {
    ["ClusterIP", "NodePort", "LoadBalancer"].contains(&service.str_at("spec.type"))
}

/// Has a port on every node for each of its ports.
pub fn needs_node_ports(service: &Value) -> bool {
    let declined = service.at("spec.allocateLoadBalancerNodePorts") == Some(&Value::Bool(false));
    is(service, "NodePort") || (is(service, "LoadBalancer") && !declined)
}

/// Has a port on every node that tells load balancers where its endpoints are.
pub fn needs_health_port(service: &Value) -> bool {
    is(service, "LoadBalancer") && service.str_at("spec.externalTrafficPolicy") == "Local"
}

pub fn is_headless(service: &Value) -> bool {
    service.str_at("spec.clusterIP") == "None" || addresses(service) == ["None"]
}

fn reachable_from_outside(service: &Value) -> bool {
    matches!(service.str_at("spec.type"), "LoadBalancer" | "NodePort")
        || (is(service, "ClusterIP") && !service.list_at("spec.externalIPs").is_empty())
}

fn texts<'v>(service: &'v Value, path: &str) -> Vec<&'v str> {
    service.list_at(path).iter().map(|item| item.as_str().unwrap_or_default()).collect()
}

fn addresses(service: &Value) -> Vec<&str> {
    texts(service, "spec.clusterIPs")
}

fn families(service: &Value) -> Vec<&str> {
    texts(service, "spec.ipFamilies")
}

/// `IPv4` or `IPv6`.
pub fn family_of(address: &str) -> &'static str {
    if address.contains(':') { "IPv6" } else { "IPv4" }
}

fn other_family(family: &str) -> &'static str {
    if family == "IPv4" { "IPv6" } else { "IPv4" }
}

// ---- what a client left out ----

/// Who knows only the first address means it.
fn normalize_on_create(service: &mut Value) {
    let address = service.str_at("spec.clusterIP").to_owned();
    if !address.is_empty() && addresses(service).is_empty() {
        service.set_at("spec.clusterIPs", json!([address]));
    }
}

/// A client that sends its own version of a service back keeps what the server allocated (`patchAllocatedValues`).
fn keep_allocations(new: &mut Value, old: &Value) {
    if needs_address(old) && needs_address(new) {
        if new.str_at("spec.clusterIP").is_empty() {
            keep(new, old, "spec.clusterIP");
        }
        if addresses(new).is_empty() && new.str_at("spec.clusterIP") == old.str_at("spec.clusterIP") {
            keep(new, old, "spec.clusterIPs");
        }
    }
    if needs_node_ports(old) && needs_node_ports(new) {
        keep_node_ports(new, old);
    }
    if needs_health_port(old)
        && needs_health_port(new)
        && new.int_at("spec.healthCheckNodePort").unwrap_or(0) == 0
    {
        keep(new, old, "spec.healthCheckNodePort");
    }
}

/// Ports are known by their names; a number is given back once.
fn keep_node_ports(new: &mut Value, old: &Value) {
    let numbers = |service: &Value| -> Vec<i64> {
        service
            .list_at("spec.ports")
            .iter()
            .filter_map(|p| p.int_at("nodePort"))
            .filter(|n| *n != 0)
            .collect()
    };
    let had = numbers(old);
    let mut used: Vec<i64> = numbers(new).into_iter().filter(|n| had.contains(n)).collect();
    let ports = new.get_mut("spec").and_then(|s| s.get_mut("ports")).and_then(Value::as_array_mut);
    for port in ports.into_iter().flatten().filter(|p| p.int_at("nodePort").unwrap_or(0) == 0) {
        let same = old.list_at("spec.ports").iter().rev().find(|o| o.str_at("name") == port.str_at("name"));
        let number = same.and_then(|o| o.int_at("nodePort")).filter(|n| *n != 0 && !used.contains(n));
        if let Some(number) = number {
            port["nodePort"] = json!(number);
            used.push(number);
        }
    }
}

/// Brings the first address and the list of them together, whichever the client knows (`normalizeClusterIPs`).
fn normalize_on_update(new: &mut Value, old: &Value) {
    let (is, was) = (new.str_at("spec.clusterIP").to_owned(), old.str_at("spec.clusterIP"));
    if is == was {
        if addresses(new).is_empty() && !addresses(old).is_empty() {
            keep(new, old, "spec.clusterIPs");
        }
    } else if addresses(new) == addresses(old) {
        match (was.is_empty(), is.is_empty()) {
            (false, true) => drop(new.remove_at("spec.clusterIPs")),
            _ if addresses(new).is_empty() => new.set_at("spec.clusterIPs", json!([is])),
            _ => new["spec"]["clusterIPs"][0] = json!(is),
        }
    } else if addresses(new).is_empty() && !is.is_empty() {
        new.set_at("spec.clusterIPs", json!([is]));
    }
}

/// Fields of the old type that the client did not touch go with it; those it changed are for validation to refuse.
fn drop_what_the_type_lacks(new: &mut Value, old: &Value) {
    if needs_address(old) && !needs_address(new) {
        if addresses(new) == addresses(old) {
            new.remove_at("spec.clusterIP");
            new.remove_at("spec.clusterIPs");
        }
        for name in ["ipFamilies", "ipFamilyPolicy"] {
            drop_unchanged(new, old, name);
        }
    }
    let numbers = |service: &Value| -> Vec<(String, i64)> {
        let ports = service.list_at("spec.ports").iter();
        ports.map(|p| (p.str_at("name").to_owned(), p.int_at("nodePort").unwrap_or(0))).collect()
    };
    let had = numbers(old);
    if needs_node_ports(old)
        && !needs_node_ports(new)
        && numbers(new).iter().all(|p| p.1 == 0 || had.contains(p))
    {
        let ports = new.get_mut("spec").and_then(|s| s.get_mut("ports")).and_then(Value::as_array_mut);
        ports.into_iter().flatten().for_each(|port| drop(port.remove_at("nodePort")));
    }
    if needs_health_port(old) && !needs_health_port(new) {
        drop_unchanged(new, old, "healthCheckNodePort");
    }
    if is(old, "LoadBalancer") && !is(new, "LoadBalancer") {
        drop_unchanged(new, old, "allocateLoadBalancerNodePorts");
        drop_unchanged(new, old, "loadBalancerClass");
    }
    if reachable_from_outside(old) && !reachable_from_outside(new) {
        drop_unchanged(new, old, "externalTrafficPolicy");
    }
    if !is(new, "LoadBalancer") && new.at("status.loadBalancer.ingress").is_some() {
        new.set_at("status.loadBalancer", json!({}));
    }
}

fn drop_unchanged(new: &mut Value, old: &Value, name: &str) {
    let path = format!("spec.{name}");
    if new.at(&path) == old.at(&path) {
        new.remove_at(&path);
    }
}

// ---- families ----

/// Works out `ipFamilyPolicy` and `ipFamilies` from what the client says, what the service was, and which families
/// the cluster has addresses of, its own one first (`initIPFamilyFields`). Nothing changes between one and two
/// families without being told to.
pub fn init_families(new: &mut Value, old: Option<&Value>, served: &[&'static str]) -> Errors {
    let mut errors = Errors::new();
    if is(new, "ExternalName") || old.is_some_and(|old| is_untouched_preference(new, old)) {
        return errors;
    }
    let selectorless = new.map_at("spec.selector").is_none_or(|s| s.is_empty());
    let any_family = new.str_at("spec.clusterIP") == "None" && selectorless;
    if new.at("spec.ipFamilyPolicy").is_none() {
        let before = old.map_or("", |old| old.str_at("spec.ipFamilyPolicy"));
        let policy = match before {
            "" if any_family => REQUIRE_DUAL,
            "" => SINGLE,
            before => before,
        };
        new.set_at("spec.ipFamilyPolicy", policy);
    }
    validate_addresses(new, &mut errors);
    if !errors.is_empty() {
        return errors;
    }
    if let Some(old) = old {
        release(new, old, &mut errors);
    }
    let policy = new.str_at("spec.ipFamilyPolicy").to_owned();
    let at = "spec.ipFamilyPolicy";
    if policy == SINGLE {
        for (list, what) in [(addresses(new), "cluster IPs"), (families(new), "IP families")] {
            if list.len() == 2 {
                let detail = format!(
                    "must be 'RequireDualStack' or 'PreferDualStack' when multiple {what} are specified"
                );
                errors.push(field::Error::invalid(at, policy.as_str(), detail));
            }
        }
    }
    let mut chosen: Vec<String> = families(new).into_iter().map(str::to_owned).collect();
    for (i, address) in addresses(new).into_iter().enumerate().take_while(|(_, a)| *a != "None") {
        if i >= chosen.len() {
            chosen.push(family_of(address).to_owned());
        }
    }
    let own = served.first().copied().unwrap_or("IPv4");
    if errors.is_empty() && any_family {
        // Its endpoints may be of any family, whatever the cluster gives out.
        if chosen.is_empty() {
            chosen.push(own.to_owned());
        }
        if chosen.len() < 2 && policy != SINGLE {
            chosen.push(other_family(&chosen[0]).to_owned());
        }
        new.set_at("spec.ipFamilies", chosen);
        return errors;
    }
    if errors.is_empty() {
        if policy == REQUIRE_DUAL && served.len() < 2 {
            let detail = "this cluster is not configured for dual-stack services";
            errors.push(field::Error::invalid(at, policy.as_str(), detail));
        }
        for (i, family) in chosen.iter().enumerate().filter(|(_, family)| !served.contains(&family.as_str()))
        {
            let path = index("spec.ipFamilies", i);
            errors.push(field::Error::invalid(path, family.as_str(), "not configured on this cluster"));
        }
    }
    if !errors.is_empty() {
        return errors;
    }
    if chosen.is_empty() {
        chosen.push(own.to_owned());
    }
    if policy != SINGLE && chosen.len() == 1 && served.len() == 2 {
        chosen.push(other_family(&chosen[0]).to_owned());
    }
    new.set_at("spec.ipFamilies", chosen);
    errors
}

/// A service that merely prefers two families is not changed because the cluster has become able to give them.
fn is_untouched_preference(new: &Value, old: &Value) -> bool {
    let prefers = |service: &Value| service.str_at("spec.ipFamilyPolicy") == PREFER_DUAL;
    needs_address(new)
        && new.str_at("spec.type") == old.str_at("spec.type")
        && prefers(new)
        && prefers(old)
        && addresses(new) == addresses(old)
        && families(new) == families(old)
}

/// Going back to one family: said by the policy, or by the lists together with it.
fn release(new: &mut Value, old: &Value, errors: &mut Errors) {
    let policy = new.str_at("spec.ipFamilyPolicy").to_owned();
    if policy == SINGLE {
        for path in ["spec.clusterIPs", "spec.ipFamilies"] {
            if texts(new, path) == texts(old, path) && texts(new, path).len() > 1 {
                let first = texts(new, path)[0].to_owned();
                new.set_at(path, json!([first]));
            }
        }
        return;
    }
    for (path, what) in [("spec.clusterIPs", "cluster IP"), ("spec.ipFamilies", "IP family")] {
        let (is, was) = (texts(new, path), texts(old, path));
        // Nothing named is no reduction: it is worked out again.
        if was.len() == 2 && is.len() == 1 && is[0] == was[0] {
            let detail = format!("must be 'SingleStack' to release the secondary {what}");
            errors.push(field::Error::invalid("spec.ipFamilyPolicy", policy.as_str(), detail));
        }
    }
}

/// Addresses, families and policy, and how they agree.
fn validate_addresses(service: &Value, errors: &mut Errors) {
    if is(service, "ExternalName") {
        return;
    }
    let at = "spec.clusterIPs";
    let (first, all, families) = (service.str_at("spec.clusterIP"), addresses(service), families(service));
    let before = errors.len();
    match (first, &all[..]) {
        ("", []) => {}
        ("", _) => errors.push(field::Error::invalid(
            at,
            value_at(service, at),
            "must be empty when `clusterIP` is not specified",
        )),
        (_, []) => errors.push(field::Error::required(at, "")),
        (first, [head, ..]) if first != *head => {
            errors.push(field::Error::invalid(
                at,
                value_at(service, at),
                "first value must match `clusterIP`",
            ));
        }
        _ => {}
    }
    for (i, family) in families.iter().enumerate() {
        let path = index("spec.ipFamilies", i);
        if !["IPv4", "IPv6"].contains(family) {
            errors.push(field::Error::not_supported(path.clone(), *family, &["IPv4", "IPv6"]));
        }
        if families[..i].contains(family) {
            errors.push(field::Error::duplicate(path, *family));
        }
    }
    let bad_families = errors.len() > before && !families.is_empty();
    one_of(
        "spec",
        service.at("spec").unwrap_or(&Value::Null),
        "ipFamilyPolicy",
        &[PREFER_DUAL, REQUIRE_DUAL, SINGLE],
        errors,
    );
    let before = errors.len();
    for (i, address) in all.iter().enumerate() {
        if i == 0 && *address == "None" {
            if all.len() > 1 {
                let detail = "'None' must be the first and only value";
                errors.push(field::Error::invalid(at, value_at(service, at), detail));
            }
        } else {
            ip(&index(at, i), address, errors);
        }
    }
    let bad_addresses = errors.len() > before;
    if all.len() > 2 {
        errors.push(field::Error::invalid(at, value_at(service, at), "may only hold up to 2 values"));
    }
    if bad_addresses {
        return;
    }
    if all.len() > 1 && family_of(all[0]) == family_of(all[1]) {
        let detail = "may specify no more than one IP for each IP family";
        errors.push(field::Error::invalid(at, value_at(service, at), detail));
    }
    if first != "None" && !bad_families {
        for (i, (address, family)) in all.iter().zip(&families).enumerate() {
            if family_of(address) != *family {
                let detail = format!("expected an {family} value as indicated by `ipFamilies[{i}]`");
                errors.push(field::Error::invalid(index(at, i), *address, detail));
            }
        }
    }
}

/// Addresses may be added and given up, the second one at that; they never change.
fn same_addresses(new: &Value, old: &Value, errors: &mut Errors) {
    if is(new, "ExternalName") || is(old, "ExternalName") || (is_headless(new) && is_headless(old)) {
        return;
    }
    same_list("spec.clusterIPs", "clusterIP", new, old, errors);
}

fn same_families(new: &Value, old: &Value, errors: &mut Errors) {
    if is(new, "ExternalName") || is(old, "ExternalName") || is_headless(new) || is_headless(old) {
        return;
    }
    same_list("spec.ipFamilies", "ipFamily", new, old, errors);
}

fn same_list(at: &str, what: &str, new: &Value, old: &Value, errors: &mut Errors) {
    let (is, was) = (texts(new, at), texts(old, at));
    let refuse = |i: usize, detail: &str| {
        field::Error::invalid(
            index(at, i),
            new.at(at).cloned().unwrap_or_else(|| json!([])),
            detail.to_owned(),
        )
    };
    if is.is_empty() && !was.is_empty() {
        errors.push(refuse(0, &format!("primary {what} can not be unset")));
    }
    for (i, _) in is.iter().zip(&was).enumerate().filter(|(_, (is, was))| is != was) {
        // Of lists that grow or shrink only the first item is compared.
        if i == 0 || is.len() == was.len() {
            errors.push(refuse(i, ONCE_SET));
        }
    }
    if was.len() > is.len() && is.len() == 1 && new.str_at("spec.ipFamilyPolicy") != SINGLE {
        let detail = format!("must be set to 'SingleStack' when releasing the secondary {what}");
        errors.push(field::Error::invalid(
            "spec.ipFamilyPolicy",
            value_at(new, "spec.ipFamilyPolicy"),
            detail,
        ));
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
        for name in &ADDRESS_FIELDS[1..] {
            let given = spec.at(name).is_some_and(|v| v.as_array().is_none_or(|items| !items.is_empty()));
            if given {
                let detail = "may not be set for ExternalName services";
                errors.push(field::Error::forbidden(child("spec", name), detail));
            }
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
    validate_addresses(object, errors);
    if headless && matches!(kind, "NodePort" | "LoadBalancer") {
        let detail = format!("may not be set to 'None' for {kind} services");
        errors.push(field::Error::invalid("spec.clusterIPs[0]", "None", detail));
    }
    for (i, address) in spec.list_at("externalIPs").iter().enumerate() {
        let (at, text) = (index("spec.externalIPs", i), address.as_str().unwrap_or_default());
        ip(&at, text, errors);
        not_special(&at, text, errors);
    }
    if spec.str_at("sessionAffinity") == "ClientIP" {
        let seconds = spec.int_at("sessionAffinityConfig.clientIP.timeoutSeconds").unwrap_or(10_800);
        if !(1..=86_400).contains(&seconds) {
            let at = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
            errors.push(field::Error::invalid(at, seconds, "must be greater than 0 and less than 86400"));
        }
    }
    source_ranges(spec, errors);
    if !spec.str_at("externalTrafficPolicy").is_empty() && !reachable_from_outside(object) {
        let detail = "may only be set for externally-accessible services";
        let value = spec.str_at("externalTrafficPolicy");
        errors.push(field::Error::invalid("spec.externalTrafficPolicy", value, detail));
    }
    let health = spec.int_at("healthCheckNodePort").unwrap_or(0);
    if health != 0 && !needs_health_port(object) {
        let detail = "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'";
        errors.push(field::Error::invalid("spec.healthCheckNodePort", health, detail));
    }
    if kind != "LoadBalancer" {
        for name in ["allocateLoadBalancerNodePorts", "loadBalancerClass"] {
            if spec.at(name).is_some() {
                let detail = "may only be used when `type` is 'LoadBalancer'";
                errors.push(field::Error::forbidden(child("spec", name), detail));
            }
        }
    } else if let Some(class) = spec.at("loadBalancerClass") {
        let class = class.as_str().unwrap_or_default();
        crate::rules::named("spec.loadBalancerClass", class, names::qualified_name, errors);
    }
    let distribution = ["PreferClose", "PreferSameNode", "PreferSameZone"];
    one_of("spec", spec, "trafficDistribution", &distribution, errors);
    validate_ports(ports, kind, errors);
}

/// Addresses that mean this machine, this link or nobody are no addresses to be reached at.
fn not_special(at: &str, text: &str, errors: &mut Errors) {
    let Ok(address) = text.parse::<IpAddr>() else { return };
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    let multicast = match address {
        IpAddr::V4(v4) => v4.octets()[..3] == [224, 0, 0],
        IpAddr::V6(v6) => v6.segments()[0] & 0xff0f == 0xff02,
    };
    for (special, detail) in [
        (address.is_unspecified(), format!("may not be unspecified ({text})")),
        (address.is_loopback(), "may not be in the loopback range (127.0.0.0/8, ::1/128)".to_owned()),
        (link_local, "may not be in the link-local range (169.254.0.0/16, fe80::/10)".to_owned()),
        (multicast, "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)".to_owned()),
    ] {
        if special {
            errors.push(field::Error::invalid(at, text, detail));
        }
    }
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

fn validate_ports(ports: &[Value], kind: &str, errors: &mut Errors) {
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
        if node_port != 0 && kind == "ClusterIP" {
            let detail = "may not be used when `type` is 'ClusterIP'";
            errors.push(field::Error::forbidden(child(&at, "nodePort"), detail));
        }
        if node_port != 0 && !node_ports.insert((node_port, port.str_at("protocol").to_owned())) {
            errors.push(field::Error::duplicate(child(&at, "nodePort"), node_port));
        }
    }
}
