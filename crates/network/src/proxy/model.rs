//! What the proxy needs to know of Services and their endpoints, and nothing more.
//!
//! Typed API objects come in, small values go out; which endpoints get traffic is decided here, by the
//! rules of the API (readiness, termination, traffic policies).

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;

use crate::pod::Protocol;

/// `namespace/name` of a Service.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceName {
    pub namespace: String,
    pub name: String,
}

/// A Service as the proxy sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Service {
    pub cluster_ips: Vec<IpAddr>,
    /// `externalIPs` and the load balancer's addresses: reached from outside, under the external policy.
    pub external_ips: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
    /// `sessionAffinity: ClientIP` and its timeout in seconds.
    pub affinity_seconds: Option<u32>,
    /// `externalTrafficPolicy: Local`.
    pub external_local: bool,
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
}

/// One port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Matches the EndpointSlice port of the same name; empty if the Service's only port has none.
    pub name: String,
    pub protocol: Protocol,
    pub port: u16,
    pub node_port: Option<u16>,
}

/// One EndpointSlice, reduced.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Slice {
    /// Port name to number. A slice's ports hold for all its endpoints.
    pub ports: Vec<(String, Protocol, u16)>,
    pub endpoints: Vec<Endpoint>,
}

/// One address of a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Endpoint {
    pub ip: IpAddr,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
    /// On the proxy's own node.
    pub local: bool,
}

/// The endpoints of one Service port, already chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chosen {
    /// Anywhere in the cluster, sorted.
    pub cluster: Vec<SocketAddr>,
    /// On this node only, sorted.
    pub local: Vec<SocketAddr>,
}

impl Service {
    /// Reads a Service; `None` for those without a virtual address (headless, ExternalName).
    pub fn read(object: &core::Service) -> Option<Service> {
        let spec = object.spec.as_ref()?;
        if spec.type_.as_deref() == Some("ExternalName") {
            return None;
        }
        let cluster_ips = addresses(spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip));
        if cluster_ips.is_empty() {
            return None;
        }
        let affinity = spec.session_affinity.as_deref() == Some("ClientIP");
        let timeout = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
        Some(Service {
            cluster_ips,
            external_ips: external_ips(spec, object.status.as_ref()),
            ports: spec.ports.iter().flatten().filter_map(service_port).collect(),
            affinity_seconds: affinity.then(|| {
                timeout
                    .and_then(|ip| ip.timeout_seconds)
                    .and_then(|s| u32::try_from(s).ok())
                    .unwrap_or(10_800)
            }),
            external_local: spec.external_traffic_policy.as_deref() == Some("Local"),
            internal_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
        })
    }
}

impl Slice {
    /// Reads an EndpointSlice for the node of this name; `None` for slices of host names.
    pub fn read(object: &discovery::EndpointSlice, node: &str) -> Option<Slice> {
        if object.address_type == "FQDN" {
            return None;
        }
        let ports = object.ports.iter().flatten().filter_map(|port| {
            let protocol = Protocol::from_api(port.protocol.as_deref()).ok()?;
            Some((port.name.clone().unwrap_or_default(), protocol, number(port.port?)?))
        });
        let endpoints = object.endpoints.iter().flatten().flat_map(|endpoint| {
            let conditions = endpoint.conditions.clone().unwrap_or_default();
            // Absent means: ready and serving unknown, to be taken for true; not terminating.
            let ready = conditions.ready.unwrap_or(true);
            let read = Endpoint {
                ip: IpAddr::from([0, 0, 0, 0]),
                ready,
                serving: conditions.serving.unwrap_or(ready),
                terminating: conditions.terminating.unwrap_or(false),
                local: endpoint.node_name.as_deref() == Some(node),
            };
            // Upstream's consumers use the first address only; the rest is documented as undefined.
            addresses(endpoint.addresses.iter().take(1)).into_iter().map(move |ip| Endpoint { ip, ..read })
        });
        Some(Slice { ports: ports.collect(), endpoints: endpoints.collect() })
    }
}

/// Chooses the endpoints of a port for one address family.
///
/// Ready ones; where none is ready, those still serving while they terminate. Decided for the cluster and
/// for the node separately, so that a node whose last pod is going away keeps answering.
/// <https://kubernetes.io/docs/reference/networking/virtual-ips/#traffic-to-terminating-endpoints>
pub fn choose(port: &ServicePort, six: bool, slices: &HashMap<String, Slice>) -> Chosen {
    let mut all: BTreeMap<SocketAddr, Endpoint> = BTreeMap::new();
    for slice in slices.values() {
        let wanted =
            |(name, protocol, _): &&(String, Protocol, u16)| *name == port.name && *protocol == port.protocol;
        for (_, _, number) in slice.ports.iter().filter(wanted) {
            for endpoint in slice.endpoints.iter().filter(|endpoint| endpoint.ip.is_ipv6() == six) {
                // An address may stand in two slices while the controller moves it; ready wins.
                let known = all.entry(SocketAddr::new(endpoint.ip, *number)).or_insert(*endpoint);
                if endpoint.ready {
                    *known = *endpoint;
                }
            }
        }
    }
    Chosen { cluster: usable(&all, |_| true), local: usable(&all, |endpoint| endpoint.local) }
}

fn usable(all: &BTreeMap<SocketAddr, Endpoint>, here: impl Fn(&Endpoint) -> bool) -> Vec<SocketAddr> {
    let pick = |good: fn(&Endpoint) -> bool| -> Vec<SocketAddr> {
        all.iter()
            .filter(|(_, endpoint)| here(endpoint) && good(endpoint))
            .map(|(address, _)| *address)
            .collect()
    };
    let ready = pick(|endpoint| endpoint.ready);
    if ready.is_empty() { pick(|endpoint| endpoint.serving && endpoint.terminating) } else { ready }
}

fn external_ips(spec: &core::ServiceSpec, status: Option<&core::ServiceStatus>) -> Vec<IpAddr> {
    let balancer = status.and_then(|status| status.load_balancer.as_ref()).and_then(|lb| lb.ingress.as_ref());
    // ipMode Proxy: the balancer wants the traffic itself, even from inside the cluster.
    let ingress =
        balancer.into_iter().flatten().filter(|ingress| ingress.ip_mode.as_deref() != Some("Proxy"));
    addresses(spec.external_ips.iter().flatten().chain(ingress.filter_map(|ingress| ingress.ip.as_ref())))
}

fn service_port(port: &core::ServicePort) -> Option<ServicePort> {
    Some(ServicePort {
        name: port.name.clone().unwrap_or_default(),
        protocol: Protocol::from_api(port.protocol.as_deref()).ok()?,
        port: number(port.port)?,
        node_port: port.node_port.and_then(number),
    })
}

fn addresses<'a>(texts: impl Iterator<Item = &'a String>) -> Vec<IpAddr> {
    let mut ips: Vec<IpAddr> = texts.filter_map(|text| text.parse().ok()).collect();
    ips.sort_unstable();
    ips.dedup();
    ips
}

fn number(port: i32) -> Option<u16> {
    u16::try_from(port).ok().filter(|port| *port != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(ip: &str, flags: &str) -> Endpoint {
        let has = |flag| flags.contains(flag);
        Endpoint {
            ip: ip.parse().unwrap(),
            ready: has('r'),
            serving: has('s'),
            terminating: has('t'),
            local: has('l'),
        }
    }

    fn chosen(endpoints: &[(&str, &str)]) -> (Vec<String>, Vec<String>) {
        let slice = Slice {
            ports: vec![("http".into(), Protocol::Tcp, 8080), ("dns".into(), Protocol::Udp, 53)],
            endpoints: endpoints.iter().map(|(ip, flags)| endpoint(ip, flags)).collect(),
        };
        let port = ServicePort { name: "http".into(), protocol: Protocol::Tcp, port: 80, node_port: None };
        let chosen = choose(&port, false, &HashMap::from([("a".to_owned(), slice)]));
        let text = |list: &[SocketAddr]| list.iter().map(|address| address.ip().to_string()).collect();
        (text(&chosen.cluster), text(&chosen.local))
    }

    #[test]
    fn traffic_goes_to_ready_endpoints_and_else_to_serving_terminating_ones() {
        type Case<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a [&'a str], &'a [&'a str]);
        let cases: &[Case] = &[
            ("ready wins", &[("10.0.0.1", "rs"), ("10.0.0.2", "st")], &["10.0.0.1"], &[]),
            ("none ready", &[("10.0.0.1", "t"), ("10.0.0.2", "st")], &["10.0.0.2"], &[]),
            ("not ready is not terminating", &[("10.0.0.1", "s")], &[], &[]),
            (
                "the node falls back alone",
                &[("10.0.0.1", "rs"), ("10.0.0.2", "stl")],
                &["10.0.0.1"],
                &["10.0.0.2"],
            ),
            ("other family", &[("fd00::1", "rs")], &[], &[]),
        ];
        for (name, endpoints, cluster, local) in cases {
            let got = chosen(endpoints);
            assert_eq!((&got.0[..], &got.1[..]), (&strings(cluster)[..], &strings(local)[..]), "{name}");
        }
    }

    fn strings(list: &[&str]) -> Vec<String> {
        list.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn services_without_a_virtual_address_are_not_proxied() {
        for (kind, ip, proxied) in
            [("ClusterIP", "None", false), ("ExternalName", "", false), ("ClusterIP", "10.96.0.1", true)]
        {
            let spec = core::ServiceSpec {
                type_: Some(kind.into()),
                cluster_ip: Some(ip.into()),
                ..Default::default()
            };
            let object = core::Service { spec: Some(spec), ..Default::default() };
            assert_eq!(Service::read(&object).is_some(), proxied, "{kind} {ip}");
        }
    }
}
