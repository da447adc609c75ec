//! What the two endpoint loops share: which pods are behind a Service, at which ports, under which name.

use crate::pods;
use k8s_openapi::api::core::v1::{Container, ObjectReference, Pod, Service, ServicePort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use knarr_client::selector::Selector;
use knarr_client::{Change, Informer, ObjectKey};
use std::net::IpAddr;
use std::sync::Arc;

/// Marks what belongs to a Service without a cluster IP.
pub const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";

/// The Service's selector; `None` for one without, whose endpoints are somebody else's business.
pub fn selector(service: &Service) -> Option<Selector> {
    let spec = service.spec.as_ref()?;
    if spec.type_.as_deref() == Some("ExternalName") {
        return None;
    }
    spec.selector.as_ref().filter(|selector| !selector.is_empty()).map(Selector::equal)
}

/// Keys of the Services a pod's change concerns: those that select it or did.
pub fn keys_of_pod(services: &Informer<Service>, change: &Change<Pod>) -> Vec<ObjectKey> {
    if change.old().is_some_and(|old| looks_the_same(old, change.object())) {
        return Vec::new();
    }
    let versions = [Some(change.object()), change.old()];
    let namespace = change.object().metadata.namespace.as_deref().unwrap_or_default();
    let concerned = |service: &&Arc<Service>| {
        let selector = selector(service);
        let matches = |pod: &&Arc<Pod>| {
            selector.as_ref().is_some_and(|selector| selector.matches(pod.metadata.labels.as_ref()))
        };
        versions.iter().flatten().any(matches)
    };
    services.list_in(namespace).iter().filter(concerned).map(|service| ObjectKey::of(&**service)).collect()
}

/// Whether nothing changed that endpoints show.
fn looks_the_same(old: &Pod, new: &Pod) -> bool {
    let seen = |pod: &Pod| {
        let status = pod.status.clone().unwrap_or_default();
        let spec = pod.spec.as_ref();
        (
            pod.metadata.labels.clone(),
            pods::is_terminating(pod),
            pods::is_finished(pod),
            pods::is_ready(pod),
            status.pod_ips,
            status.pod_ip,
            pods::node_of(pod).map(str::to_owned),
            spec.and_then(|spec| spec.hostname.clone()),
        )
    };
    seen(old) == seen(new)
}

/// The pods behind a Service that have an address and have not ended, ordered by name.
pub fn pods_of(service: &Service, all: &Informer<Pod>, with_terminating: bool) -> Vec<Arc<Pod>> {
    let Some(selector) = selector(service) else { return Vec::new() };
    let namespace = service.metadata.namespace.as_deref().unwrap_or_default();
    let mut pods = all.list_in(namespace);
    pods.retain(|pod| {
        selector.matches(pod.metadata.labels.as_ref())
            && !pods::is_finished(pod)
            && (with_terminating || !pods::is_terminating(pod))
            && addresses(pod).next().is_some()
    });
    pods
}

/// All addresses of a pod.
pub fn addresses(pod: &Pod) -> impl Iterator<Item = IpAddr> {
    let status = pod.status.as_ref();
    let several =
        status.and_then(|status| status.pod_ips.as_ref()).into_iter().flatten().map(|ip| ip.ip.as_str());
    let one = status.and_then(|status| status.pod_ip.as_deref());
    let known = several.clone().next().is_some();
    several.chain(one.filter(move |_| !known)).filter_map(|ip| ip.parse().ok())
}

/// The families a Service has endpoints of, its first one first.
pub fn families(service: &Service) -> Vec<Family> {
    let spec = service.spec.as_ref();
    let listed = spec.and_then(|spec| spec.ip_families.as_ref()).into_iter().flatten();
    let listed: Vec<Family> =
        listed.map(|family| if family == "IPv6" { Family::V6 } else { Family::V4 }).collect();
    if !listed.is_empty() {
        return listed;
    }
    let cluster_ip = spec.and_then(|spec| spec.cluster_ip.as_deref()).and_then(|ip| ip.parse().ok());
    vec![cluster_ip.map_or(Family::V4, Family::of)]
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub fn of(ip: IpAddr) -> Self {
        if ip.is_ipv6() { Family::V6 } else { Family::V4 }
    }

    pub fn address_type(self) -> &'static str {
        match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        }
    }
}

/// Where a Service port leads in a pod: its number, or that of the container port of this name and protocol. `None`
/// when the pod has no such port.
pub fn target_port(pod: &Pod, port: &ServicePort) -> Option<i32> {
    let name = match &port.target_port {
        None => return Some(port.port),
        Some(IntOrString::Int(0)) => return Some(port.port),
        Some(IntOrString::Int(number)) => return Some(*number),
        Some(IntOrString::String(name)) if name.is_empty() => return Some(port.port),
        Some(IntOrString::String(name)) => name,
    };
    let spec = pod.spec.as_ref()?;
    let is_sidecar = |container: &&Container| container.restart_policy.as_deref() == Some("Always");
    let sidecars = spec.init_containers.iter().flatten().filter(is_sidecar);
    let ports = spec.containers.iter().chain(sidecars).flat_map(|container| container.ports.iter().flatten());
    let wanted = port.protocol.as_deref().unwrap_or("TCP");
    let matches = |candidate: &&k8s_openapi::api::core::v1::ContainerPort| {
        candidate.name.as_deref() == Some(name) && candidate.protocol.as_deref().unwrap_or("TCP") == wanted
    };
    ports.into_iter().find(matches).map(|port| port.container_port)
}

/// The name DNS gives a pod under a headless Service.
pub fn hostname(pod: &Pod, service: &Service) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let under = spec.subdomain.is_some() && spec.subdomain == service.metadata.name;
    spec.hostname.clone().filter(|hostname| under && !hostname.is_empty())
}

pub fn reference(pod: &Pod) -> ObjectReference {
    ObjectReference {
        kind: Some("Pod".to_owned()),
        namespace: pod.metadata.namespace.clone(),
        name: pod.metadata.name.clone(),
        uid: pod.metadata.uid.clone(),
        ..Default::default()
    }
}

pub fn is_headless(service: &Service) -> bool {
    let ip = service.spec.as_ref().and_then(|spec| spec.cluster_ip.as_deref());
    matches!(ip, Some("None"))
}

pub fn publishes_not_ready(service: &Service) -> bool {
    service.spec.as_ref().and_then(|spec| spec.publish_not_ready_addresses).unwrap_or(false)
}
