//! The objects that lead pods to the server: Service `kube-system/kube-dns` and its EndpointSlice.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

pub const NAMESPACE: &str = "kube-system";
/// The name everybody looks for.
pub const SERVICE: &str = "kube-dns";
const PORTS: [(&str, &str, i32); 2] = [("dns", "UDP", 53), ("dns-tcp", "TCP", 53)];

/// One node's server.
pub struct Server {
    pub node: String,
    /// An address of the node every pod on it can reach: its pod network's gateway.
    pub address: IpAddr,
    pub port: u16,
}

/// The Service with this cluster IP, and the slice that names the servers (all of one address family).
///
/// The Service has no selector, so no controller touches the slice; whoever starts nodes applies it again
/// with all of them.
pub fn objects(cluster_ip: IpAddr, servers: &[Server]) -> (Service, EndpointSlice) {
    (service(cluster_ip), slice(servers))
}

fn service(cluster_ip: IpAddr) -> Service {
    let port = |(name, protocol, port): (&str, &str, i32)| ServicePort {
        name: Some(name.into()),
        protocol: Some(protocol.into()),
        port,
        target_port: Some(IntOrString::Int(port)),
        ..Default::default()
    };
    let spec = ServiceSpec {
        cluster_ip: Some(cluster_ip.to_string()),
        cluster_ips: Some(vec![cluster_ip.to_string()]),
        internal_traffic_policy: Some("Local".into()),
        ports: Some(PORTS.map(port).to_vec()),
        type_: Some("ClusterIP".into()),
        ..Default::default()
    };
    let labels = [("k8s-app", "kube-dns"), ("kubernetes.io/name", "CoreDNS")];
    Service { metadata: metadata(SERVICE, &labels), spec: Some(spec), ..Default::default() }
}

fn slice(servers: &[Server]) -> EndpointSlice {
    let endpoint = |server: &Server| Endpoint {
        addresses: vec![server.address.to_string()],
        conditions: Some(EndpointConditions { ready: Some(true), ..Default::default() }),
        node_name: Some(server.node.clone()),
        ..Default::default()
    };
    let number = servers.first().map_or(53, |server| i32::from(server.port));
    let port = |(name, protocol, _): (&str, &str, i32)| EndpointPort {
        name: Some(name.into()),
        protocol: Some(protocol.into()),
        port: Some(number),
        ..Default::default()
    };
    let six = servers.first().is_some_and(|server| server.address.is_ipv6());
    let labels =
        [("kubernetes.io/service-name", SERVICE), ("endpointslice.kubernetes.io/managed-by", "dns.knarr")];
    EndpointSlice {
        metadata: metadata(SERVICE, &labels),
        address_type: if six { "IPv6" } else { "IPv4" }.into(),
        endpoints: Some(servers.iter().map(endpoint).collect()),
        ports: Some(PORTS.map(port).to_vec()),
    }
}

fn metadata(name: &str, labels: &[(&str, &str)]) -> ObjectMeta {
    let labels: BTreeMap<String, String> =
        labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    ObjectMeta {
        name: Some(name.into()),
        namespace: Some(NAMESPACE.into()),
        labels: Some(labels),
        ..Default::default()
    }
}
