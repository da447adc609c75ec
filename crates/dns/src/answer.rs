//! Answers questions about the cluster's names, by the Kubernetes DNS specification 1.1
//! (<https://github.com/kubernetes/dns/blob/master/docs/specification.md>).
//!
//! Values in, values out. Where the specification is silent, CoreDNS' behaviour is matched.

use std::net::IpAddr;

use hickory_proto::rr::rdata::{CNAME, NS, PTR, SOA, SRV, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};

use crate::index::{Index, Port, Service, undashed};

/// Seconds an answer may be cached. Short: endpoints come and go.
pub const TTL_SECONDS: u32 = 5;
/// Version of the specification, served at `dns-version.ZONE`.
const SPECIFICATION: &str = "1.1.0";
/// Aliases followed inside the cluster; ends circles.
const ALIAS_DEPTH_MAX: usize = 8;

/// The cluster's domain, such as `cluster.local`.
#[derive(Clone, Debug)]
pub struct Zone {
    name: Name,
    labels: usize,
}

/// What there is to say.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// Records; `additionals` save the client a second question.
    Found { answers: Vec<Record>, additionals: Vec<Record> },
    /// The name exists, but not with this type: an empty answer with the zone's SOA.
    NoData,
    /// The name does not exist: NXDOMAIN with the zone's SOA.
    NoName,
    /// An alias of a name outside the cluster: these records, and the target's.
    Alias { answers: Vec<Record>, target: Name },
    /// Not a name of ours: somebody else has to be asked.
    Elsewhere,
}

impl Zone {
    /// A zone by its domain.
    ///
    /// # Errors
    /// The domain is no domain name.
    pub fn new(domain: &str) -> Result<Zone, hickory_proto::ProtoError> {
        let mut name = Name::from_ascii(domain)?.to_lowercase();
        name.set_fqdn(true);
        let labels = usize::from(name.num_labels());
        Ok(Zone { name, labels })
    }

    /// The record that says how long "no" may be cached.
    pub fn soa(&self) -> Record {
        let below = |label: &str| self.below(&[label]).unwrap_or_else(|| self.name.clone());
        // Nobody transfers this zone, so the serial need not move.
        let soa = SOA::new(below("ns.dns"), below("hostmaster"), 1, 7200, 1800, 86400, TTL_SECONDS);
        Record::from_rdata(self.name.clone(), TTL_SECONDS, RData::SOA(soa))
    }

    /// A name below the zone; labels may hold several, separated by dots. `None` if it would be too long.
    fn below(&self, labels: &[&str]) -> Option<Name> {
        let labels = labels.iter().flat_map(|label| label.split('.'));
        Name::from_labels(labels.map(str::as_bytes)).ok()?.append_domain(&self.name).ok()
    }
}

/// Answers one question of class IN. `turn` (any number, best random) rotates the addresses of an answer so
/// that clients that take the first spread over all.
pub fn answer(index: &Index, zone: &Zone, name: &Name, kind: RecordType, turn: usize) -> Answer {
    if let Some(ip) = reverse_address(name) {
        return reverse(index, zone, name, kind, ip);
    }
    let question = Question { index, zone, kind };
    let mut answers = Vec::new();
    let mut name = name.clone();
    for _ in 0..ALIAS_DEPTH_MAX {
        match question.look_up(&name) {
            Found::Nothing if answers.is_empty() => return Answer::NoName,
            Found::Elsewhere if answers.is_empty() => return Answer::Elsewhere,
            Found::Elsewhere => return Answer::Alias { answers, target: name },
            Found::Empty if answers.is_empty() => return Answer::NoData,
            Found::Nothing | Found::Empty => break,
            Found::Records(mut records, additionals) => {
                let by = turn % records.len().max(1);
                records.rotate_left(by);
                answers.extend(records);
                return Answer::Found { answers, additionals };
            }
            Found::Alias(target) => {
                answers.push(record(&name, RData::CNAME(CNAME(target.clone()))));
                if kind == RecordType::CNAME {
                    break;
                }
                name = target;
            }
        }
    }
    Answer::Found { answers, additionals: Vec::new() }
}

enum Found {
    /// There is no such name.
    Nothing,
    /// There is, without such records.
    Empty,
    Records(Vec<Record>, Vec<Record>),
    Alias(Name),
    /// Outside the zone.
    Elsewhere,
}

struct Question<'a> {
    index: &'a Index,
    zone: &'a Zone,
    kind: RecordType,
}

impl Question<'_> {
    fn look_up(&self, name: &Name) -> Found {
        if !self.zone.name.zone_of(name) {
            return Found::Elsewhere;
        }
        let lower = name.to_lowercase();
        let depth = usize::from(lower.num_labels()) - self.zone.labels;
        // Labels that are not UTF-8 name nothing of ours.
        let labels: Option<Vec<&str>> =
            lower.iter().take(depth).map(|label| std::str::from_utf8(label).ok()).collect();
        match labels.as_deref() {
            None => Found::Nothing,
            Some([]) => self.apex(name),
            Some(["dns-version"]) => self.some(name, [RData::TXT(TXT::new(vec![SPECIFICATION.to_owned()]))]),
            Some(["svc" | "pod"]) => Found::Empty,
            Some([namespace, "svc" | "pod"]) => self.empty_if(self.index.has_namespace(namespace)),
            Some([label, _namespace, "pod"]) => match undashed(label) {
                Some(ip) => self.addresses(name, [ip]),
                None => Found::Nothing,
            },
            Some([rest @ .., service, namespace, "svc"]) => self.service(name, rest, service, namespace),
            Some(_) => Found::Nothing,
        }
    }

    fn apex(&self, name: &Name) -> Found {
        match (self.kind, self.zone.below(&["ns.dns"])) {
            (RecordType::SOA, _) => Found::Records(vec![self.zone.soa()], Vec::new()),
            (RecordType::NS, Some(server)) => self.some(name, [RData::NS(NS(server))]),
            _ => Found::Empty,
        }
    }

    fn service(&self, name: &Name, rest: &[&str], service: &str, namespace: &str) -> Found {
        match (self.index.service(namespace, service), rest) {
            (None, _) => Found::Nothing,
            (Some(Service::Alias { target }), []) => match Name::from_ascii(target) {
                Ok(mut target) => {
                    target.set_fqdn(true);
                    Found::Alias(target)
                }
                Err(_) => Found::Nothing,
            },
            (Some(Service::Alias { .. }), _) => Found::Nothing,
            (Some(Service::Virtual { ips, ports }), []) => match self.kind {
                RecordType::SRV => self.virtual_ports(name, service, namespace, ips, ports.iter().collect()),
                _ => self.addresses(name, ips.iter().copied()),
            },
            (Some(Service::Virtual { ips, ports }), [port, protocol]) => {
                let wanted = ports.iter().filter(|candidate| is_port(candidate, port, protocol)).collect();
                self.virtual_ports(name, service, namespace, ips, wanted)
            }
            (Some(Service::Virtual { ports, .. }), [protocol]) => {
                self.empty_if(ports.iter().any(|port| is_protocol(port, protocol)))
            }
            (Some(Service::Headless), _) => self.headless(name, rest, service, namespace),
            (Some(_), _) => Found::Nothing,
        }
    }

    fn virtual_ports(
        &self,
        name: &Name,
        service: &str,
        namespace: &str,
        ips: &[IpAddr],
        ports: Vec<&Port>,
    ) -> Found {
        let Some(target) = self.zone.below(&[service, namespace, "svc"]) else { return Found::Nothing };
        let numbers = ports.iter().map(|port| (target.clone(), port.number)).collect();
        let additionals = ips.iter().map(|ip| record(&target, address(*ip))).collect();
        self.ports(name, numbers, additionals)
    }

    fn headless(&self, name: &Name, rest: &[&str], service: &str, namespace: &str) -> Found {
        let endpoints = self.index.endpoints(namespace, service);
        let own_name = |label: &str| self.zone.below(&[label, service, namespace, "svc"]);
        match rest {
            // Without a ready endpoint the name does not exist (2.4.1).
            [] if endpoints.is_empty() => Found::Nothing,
            [] if self.kind != RecordType::SRV => {
                self.addresses(name, endpoints.iter().map(|(endpoint, _)| endpoint.ip))
            }
            [] | [_, _] => {
                let mut numbers = Vec::new();
                let mut additionals = Vec::new();
                for (endpoint, ports) in &endpoints {
                    let wanted = |port: &&Port| match rest {
                        [wanted, protocol] => is_port(port, wanted, protocol),
                        _ => true,
                    };
                    let Some(target) = own_name(&endpoint.label) else { continue };
                    let before = numbers.len();
                    numbers.extend(ports.iter().filter(wanted).map(|port| (target.clone(), port.number)));
                    if numbers.len() > before {
                        additionals.push(record(&target, address(endpoint.ip)));
                    }
                }
                self.ports(name, numbers, additionals)
            }
            [label] => {
                let named: Vec<IpAddr> =
                    endpoints.iter().filter(|(e, _)| e.label == *label).map(|(e, _)| e.ip).collect();
                let protocol =
                    endpoints.iter().any(|(_, ports)| ports.iter().any(|port| is_protocol(port, label)));
                if named.is_empty() { self.empty_if(protocol) } else { self.addresses(name, named) }
            }
            _ => Found::Nothing,
        }
    }

    /// SRV records; a name with `_port._protocol` that leads nowhere does not exist.
    fn ports(&self, name: &Name, numbers: Vec<(Name, u16)>, additionals: Vec<Record>) -> Found {
        if numbers.is_empty() {
            return Found::Nothing;
        }
        if !matches!(self.kind, RecordType::SRV | RecordType::ANY) {
            return Found::Empty;
        }
        let weight = (100 / numbers.len()).max(1) as u16;
        let srv = |(target, port)| record(name, RData::SRV(SRV::new(0, weight, port, target)));
        Found::Records(numbers.into_iter().map(srv).collect(), additionals)
    }

    fn addresses(&self, name: &Name, ips: impl IntoIterator<Item = IpAddr>) -> Found {
        let mut ips: Vec<IpAddr> = ips.into_iter().collect();
        ips.sort_unstable();
        ips.dedup();
        self.some(name, ips.into_iter().map(address))
    }

    /// Those of the records that were asked for.
    fn some(&self, name: &Name, data: impl IntoIterator<Item = RData>) -> Found {
        let wanted = |data: &RData| self.kind == RecordType::ANY || data.record_type() == self.kind;
        let records: Vec<Record> = data.into_iter().filter(wanted).map(|data| record(name, data)).collect();
        if records.is_empty() { Found::Empty } else { Found::Records(records, Vec::new()) }
    }

    fn empty_if(&self, exists: bool) -> Found {
        if exists { Found::Empty } else { Found::Nothing }
    }
}

fn reverse(index: &Index, zone: &Zone, name: &Name, kind: RecordType, ip: IpAddr) -> Answer {
    let names = index.names_of(ip);
    if names.is_empty() {
        return Answer::Elsewhere;
    }
    if !matches!(kind, RecordType::PTR | RecordType::ANY) {
        return Answer::NoData;
    }
    let target = |labels: &Vec<&str>| zone.below(&[&labels[..], &["svc"]].concat());
    let answers =
        names.iter().filter_map(target).map(|target| record(name, RData::PTR(PTR(target)))).collect();
    Answer::Found { answers, additionals: Vec::new() }
}

/// The address in a complete `in-addr.arpa` or `ip6.arpa` name.
fn reverse_address(name: &Name) -> Option<IpAddr> {
    let labels = name.num_labels();
    let is_arpa = name.iter().next_back().is_some_and(|label| label.eq_ignore_ascii_case(b"arpa"));
    if !is_arpa || (labels != 6 && labels != 34) {
        return None;
    }
    Some(name.parse_arpa_name().ok()?.addr())
}

fn is_port(port: &Port, name: &str, protocol: &str) -> bool {
    name.strip_prefix('_').is_some_and(|name| !name.is_empty() && name == port.name)
        && is_protocol(port, protocol)
}

fn is_protocol(port: &Port, label: &str) -> bool {
    label.strip_prefix('_') == Some(&port.protocol)
}

fn address(ip: IpAddr) -> RData {
    match ip {
        IpAddr::V4(ip) => RData::A(ip.into()),
        IpAddr::V6(ip) => RData::AAAA(ip.into()),
    }
}

fn record(name: &Name, data: RData) -> Record {
    Record::from_rdata(name.clone(), TTL_SECONDS, data)
}
