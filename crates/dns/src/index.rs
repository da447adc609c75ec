//! What names exist: Services and their endpoints, kept so that every question is a hash lookup.
//!
//! Fed with objects as they change; knows nothing of packets.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;

const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
/// Longest DNS label.
const LABEL_LEN_MAX: usize = 63;

/// All names of the cluster.
#[derive(Debug, Default)]
pub struct Index {
    /// Namespace → name → Service.
    services: HashMap<String, HashMap<String, Entry>>,
    /// (namespace, slice) → the Service it belongs to.
    slice_owners: HashMap<(String, String), String>,
    /// Address → names, for PTR. Several Services may share an address (endpoints); the list is sorted.
    reverse: HashMap<IpAddr, Vec<Reverse>>,
}

/// The Service and its endpoints; either may be known before the other.
#[derive(Debug, Default)]
struct Entry {
    service: Option<Service>,
    /// By slice name.
    slices: BTreeMap<String, Slice>,
}

/// A Service's names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Service {
    /// Answers with its own addresses.
    Virtual { ips: Vec<IpAddr>, ports: Vec<Port> },
    /// Answers with its endpoints (`clusterIP: None`).
    Headless,
    /// Is another name (`type: ExternalName`).
    Alias { target: String },
}

/// A named port: `_name._protocol`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    pub name: String,
    /// Lower case, as in the name.
    pub protocol: String,
    pub number: u16,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Slice {
    ports: Vec<Port>,
    endpoints: Vec<Endpoint>,
}

/// A ready endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub ip: IpAddr,
    /// The first label of its own name: the pod's hostname, or its address with dashes.
    pub label: String,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Reverse {
    /// Services come before endpoints.
    endpoint: bool,
    namespace: String,
    service: String,
    label: String,
}

impl Index {
    /// An index without names.
    pub fn new() -> Index {
        Index::default()
    }

    /// Takes in a Service as it is now.
    pub fn set_service(&mut self, object: &core::Service) {
        let namespace = object.metadata.namespace.as_deref().unwrap_or_default();
        let name = object.metadata.name.as_deref().unwrap_or_default();
        self.change(namespace, name, |entry| entry.service = read_service(object));
    }

    /// Forgets a Service. Its endpoints stay until their slices go.
    pub fn remove_service(&mut self, namespace: &str, name: &str) {
        self.change(namespace, name, |entry| entry.service = None);
    }

    /// Takes in an EndpointSlice as it is now.
    pub fn set_slice(&mut self, object: &discovery::EndpointSlice) {
        let namespace = object.metadata.namespace.clone().unwrap_or_default();
        let name = object.metadata.name.clone().unwrap_or_default();
        let owner = object.metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME_LABEL));
        let key = (namespace.clone(), name.clone());
        if self.slice_owners.get(&key) != owner {
            self.remove_slice(&namespace, &name);
        }
        if let Some(owner) = owner.filter(|_| object.address_type != "FQDN") {
            self.slice_owners.insert(key, owner.clone());
            let slice = read_slice(object);
            self.change(&namespace, owner, |entry| _ = entry.slices.insert(name, slice));
        }
    }

    /// Forgets an EndpointSlice.
    pub fn remove_slice(&mut self, namespace: &str, name: &str) {
        if let Some(owner) = self.slice_owners.remove(&(namespace.to_owned(), name.to_owned())) {
            self.change(namespace, &owner, |entry| _ = entry.slices.remove(name));
        }
    }

    /// The Service of this name.
    pub fn service(&self, namespace: &str, name: &str) -> Option<&Service> {
        self.services.get(namespace)?.get(name)?.service.as_ref()
    }

    /// Whether any Service is in the namespace.
    pub fn has_namespace(&self, namespace: &str) -> bool {
        let services = self.services.get(namespace);
        services.is_some_and(|services| services.values().any(|entry| entry.service.is_some()))
    }

    /// The ready endpoints of a Service, each with the ports of its slice; an address once for each label.
    pub fn endpoints(&self, namespace: &str, name: &str) -> Vec<(&Endpoint, &[Port])> {
        let entry = self.services.get(namespace).and_then(|services| services.get(name));
        let slices = entry.into_iter().flat_map(|entry| entry.slices.values());
        let mut seen = HashSet::new();
        let all =
            slices.flat_map(|slice| slice.endpoints.iter().map(|endpoint| (endpoint, &slice.ports[..])));
        all.filter(|(endpoint, _)| seen.insert((endpoint.ip, endpoint.label.as_str()))).collect()
    }

    /// The names below `svc.ZONE` an address has, as labels: Services if any has it as its own, else the
    /// names of endpoints.
    pub fn names_of(&self, ip: IpAddr) -> Vec<Vec<&str>> {
        let names = self.reverse.get(&ip).map(Vec::as_slice).unwrap_or_default();
        let only_services = names.first().is_some_and(|name| !name.endpoint);
        let names = names.iter().filter(|name| name.endpoint != only_services);
        names
            .map(|name| match name.endpoint {
                true => vec![name.label.as_str(), &name.service, &name.namespace],
                false => vec![name.service.as_str(), &name.namespace],
            })
            .collect()
    }

    fn change(&mut self, namespace: &str, name: &str, change: impl FnOnce(&mut Entry)) {
        let services = self.services.entry(namespace.to_owned()).or_default();
        let entry = services.entry(name.to_owned()).or_default();
        let before = reverse_of(namespace, name, entry);
        change(entry);
        let after = reverse_of(namespace, name, entry);
        if entry.service.is_none() && entry.slices.is_empty() {
            services.remove(name);
            if services.is_empty() {
                self.services.remove(namespace);
            }
        }
        for (ip, name) in before.difference(&after) {
            if let Some(names) = self.reverse.get_mut(ip) {
                names.retain(|known| known != name);
                if names.is_empty() {
                    self.reverse.remove(ip);
                }
            }
        }
        for (ip, name) in after.difference(&before) {
            let names = self.reverse.entry(*ip).or_default();
            let place = names.partition_point(|known| known < name);
            names.insert(place, name.clone());
        }
    }
}

fn reverse_of(namespace: &str, name: &str, entry: &Entry) -> std::collections::BTreeSet<(IpAddr, Reverse)> {
    let reverse = |endpoint, label: &str| Reverse {
        endpoint,
        namespace: namespace.to_owned(),
        service: name.to_owned(),
        label: label.to_owned(),
    };
    match &entry.service {
        Some(Service::Virtual { ips, .. }) => ips.iter().map(|ip| (*ip, reverse(false, ""))).collect(),
        Some(Service::Headless) => {
            let endpoints = entry.slices.values().flat_map(|slice| &slice.endpoints);
            endpoints.map(|endpoint| (endpoint.ip, reverse(true, &endpoint.label))).collect()
        }
        _ => Default::default(),
    }
}

fn read_service(object: &core::Service) -> Option<Service> {
    let spec = object.spec.as_ref()?;
    if spec.type_.as_deref() == Some("ExternalName") {
        let target = spec.external_name.as_deref()?.trim_end_matches('.').to_ascii_lowercase();
        return Some(Service::Alias { target });
    }
    if spec.cluster_ip.as_deref() == Some("None") {
        return Some(Service::Headless);
    }
    let mut ips: Vec<IpAddr> =
        spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip).filter_map(|ip| ip.parse().ok()).collect();
    ips.sort_unstable();
    ips.dedup();
    let ports = spec.ports.iter().flatten().filter_map(|port| {
        let name = port.name.as_deref().unwrap_or_default();
        read_port(name, port.protocol.as_deref(), port.port)
    });
    Some(Service::Virtual { ips, ports: ports.collect() })
}

fn read_slice(object: &discovery::EndpointSlice) -> Slice {
    let ports = object.ports.iter().flatten().filter_map(|port| {
        read_port(port.name.as_deref().unwrap_or_default(), port.protocol.as_deref(), port.port?)
    });
    // Absent means unknown, to be taken for ready.
    let ready = |endpoint: &&discovery::Endpoint| {
        endpoint.conditions.as_ref().and_then(|conditions| conditions.ready).unwrap_or(true)
    };
    let endpoints = object.endpoints.iter().flatten().filter(ready).filter_map(|endpoint| {
        let ip: IpAddr = endpoint.addresses.first()?.parse().ok()?;
        let label = match endpoint.hostname.as_deref() {
            Some(name) if !name.is_empty() && name.len() <= LABEL_LEN_MAX => name.to_ascii_lowercase(),
            _ => dashed(ip),
        };
        Some(Endpoint { ip, label })
    });
    Slice { ports: ports.collect(), endpoints: endpoints.collect() }
}

fn read_port(name: &str, protocol: Option<&str>, number: i32) -> Option<Port> {
    let protocol = protocol.unwrap_or("TCP").to_ascii_lowercase();
    Some(Port { name: name.to_owned(), protocol, number: u16::try_from(number).ok()? })
}

/// An address as a label: `10-1-2-3`, `fd00--1`.
pub fn dashed(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(ip) => ip.to_string().replace('.', "-"),
        IpAddr::V6(ip) => ip.to_string().replace(':', "-"),
    }
}

/// The address a dashed label stands for.
pub fn undashed(label: &str) -> Option<IpAddr> {
    let dots = label.replace('-', ".");
    let colons = label.replace('-', ":");
    dots.parse().or_else(|_| colons.parse()).ok()
}
