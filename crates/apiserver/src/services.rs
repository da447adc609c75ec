//! Addresses and node ports of services: handed out once each, given back with the service.
//!
//! What is in use is rebuilt from the stored services at start, so it can never drift from them.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;

use knarr_api::field;
use knarr_api::object::Object;
use knarr_api::schema::Kind;
use knarr_api::status::{Result, Status};
use knarr_store::{Range, Store};
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::encode;
use crate::registry::Registry;

/// The address range of ClusterIPs.
#[derive(Debug, Clone, Copy)]
pub struct Cidr {
    pub base: Ipv4Addr,
    pub prefix: u8,
}

impl Cidr {
    /// Usable addresses: without the network's own and the broadcast address.
    fn hosts(&self) -> RangeInclusive<u32> {
        let base = u32::from(self.base);
        let size = 1u32 << (32 - self.prefix);
        base + 1..=base + size - 2
    }

    /// The n-th address: 1 is the `kubernetes` service, 10 the cluster DNS.
    pub fn nth(&self, n: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.base) + n)
    }

    /// Addresses below this are only given on request (KEP-3070): between 16 and 256 of them.
    fn static_band(&self) -> u32 {
        let size = 1u32 << (32 - self.prefix);
        (size / 16).clamp(16, 256).min(size / 2)
    }
}

impl std::str::FromStr for Cidr {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Cidr, String> {
        let bad = || format!("{text:?} is no IPv4 range between /12 and /28, such as 10.96.0.0/16");
        let (base, prefix) = text.split_once('/').ok_or_else(bad)?;
        let base = base.parse().map_err(|_| bad())?;
        let prefix = prefix.parse().ok().filter(|p| (12..=28).contains(p)).ok_or_else(bad)?;
        Ok(Cidr { base, prefix })
    }
}

impl std::fmt::Display for Cidr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

/// Hands out addresses and ports.
pub struct Allocator {
    range: Cidr,
    ports: RangeInclusive<u16>,
    used: Mutex<Used>,
}

#[derive(Default)]
struct Used {
    /// Address → uid of the service.
    addresses: HashMap<u32, String>,
    /// Port and protocol → uid.
    ports: HashMap<(u16, String), String>,
    next_address: u32,
    next_port: u32,
}

/// What a write has reserved; given back when dropped before [`keep`](Reservation::keep).
pub struct Reservation<'a> {
    allocator: &'a Allocator,
    addresses: Vec<u32>,
    ports: Vec<(u16, String)>,
    /// Given up by the write: free once it has happened.
    freed_addresses: Vec<u32>,
    freed_ports: Vec<(u16, String)>,
}

impl Reservation<'_> {
    /// The write has happened.
    pub fn keep(mut self) {
        self.addresses.clear();
        self.ports.clear();
        let mut used = self.allocator.used.lock();
        self.freed_addresses.iter().for_each(|a| drop(used.addresses.remove(a)));
        self.freed_ports.iter().for_each(|p| drop(used.ports.remove(p)));
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if self.addresses.is_empty() && self.ports.is_empty() {
            return;
        }
        let mut used = self.allocator.used.lock();
        self.addresses.iter().for_each(|a| drop(used.addresses.remove(a)));
        self.ports.iter().for_each(|p| drop(used.ports.remove(p)));
    }
}

impl Allocator {
    /// An allocator that knows what the stored services use.
    pub fn load(store: &dyn Store, range: Cidr, ports: RangeInclusive<u16>) -> Allocator {
        let mut used = Used::default();
        let listing = store.list("services", &Range::default());
        for entry in listing.map(|l| l.entries).unwrap_or_default() {
            let service = encode::decode(&entry);
            used.addresses.extend(addresses(&service).into_iter().map(|a| (a, service.uid().to_owned())));
            used.ports.extend(node_ports(&service).into_iter().map(|p| (p, service.uid().to_owned())));
        }
        Allocator { range, ports, used: Mutex::new(used) }
    }

    pub fn range(&self) -> Cidr {
        self.range
    }

    /// Fills in what the service lacks and reserves what it names.
    pub fn reserve(
        &self,
        _registry: &Registry,
        kind: &Kind,
        object: &mut Value,
        old: Option<&Value>,
    ) -> Result<Reservation<'_>> {
        let mut reservation = Reservation {
            allocator: self,
            addresses: Vec::new(),
            ports: Vec::new(),
            freed_addresses: Vec::new(),
            freed_ports: Vec::new(),
        };
        if kind.resource() != "services" {
            return Ok(reservation);
        }
        let uid = object.uid().to_owned();
        let mut errors = Vec::new();
        let kind_of_service = object.str_at("spec.type").to_owned();
        if kind_of_service == "ExternalName" {
            for name in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy", "internalTrafficPolicy"] {
                object.remove_at(&format!("spec.{name}"));
            }
        } else {
            self.reserve_address(object, &uid, &mut reservation, &mut errors);
        }
        if matches!(kind_of_service.as_str(), "NodePort" | "LoadBalancer") {
            let wants = kind_of_service == "NodePort"
                || object.at("spec.allocateLoadBalancerNodePorts") != Some(&Value::Bool(false));
            self.reserve_ports(object, &uid, wants, &mut reservation, &mut errors);
        }
        if let Some(old) = old {
            let (kept_addresses, kept_ports) = (addresses(object), node_ports(object));
            reservation.freed_addresses =
                addresses(old).into_iter().filter(|a| !kept_addresses.contains(a)).collect();
            reservation.freed_ports =
                node_ports(old).into_iter().filter(|p| !kept_ports.contains(p)).collect();
        }
        if errors.is_empty() { Ok(reservation) } else { Err(Status::invalid(kind, object.name(), &errors)) }
    }

    fn reserve_address(
        &self,
        object: &mut Value,
        uid: &str,
        reservation: &mut Reservation,
        errors: &mut Vec<field::Error>,
    ) {
        let wanted = match (object.str_at("spec.clusterIP"), object.list_at("spec.clusterIPs").first()) {
            ("", Some(Value::String(first))) => first.clone(),
            (given, _) => given.to_owned(),
        };
        let chosen = match wanted.as_str() {
            "None" => "None".to_owned(),
            "" => match self.draw_address(uid) {
                Some(address) => {
                    reservation.addresses.push(address);
                    Ipv4Addr::from(address).to_string()
                }
                None => {
                    let detail = format!("failed to allocate IP 1: range is full: {}", self.range);
                    errors.push(field::Error::invalid("spec.clusterIPs[0]", "", detail));
                    return;
                }
            },
            given => {
                if let Ok(IpAddr::V4(address)) = given.parse::<IpAddr>() {
                    self.claim_address(u32::from(address), uid, reservation, errors);
                }
                given.to_owned()
            }
        };
        object.set_at("spec.clusterIP", chosen.clone());
        object.set_at("spec.clusterIPs", json!([chosen]));
        // A headless service without selector may be of any family its endpoints are.
        let any = chosen == "None" && object.map_at("spec.selector").is_none_or(|s| s.is_empty());
        if object.at("spec.ipFamilies").is_none() {
            let dual = any && object.str_at("spec.ipFamilyPolicy") != "SingleStack";
            object.set_at("spec.ipFamilies", if dual { json!(["IPv4", "IPv6"]) } else { json!(["IPv4"]) });
        }
        if object.str_at("spec.ipFamilyPolicy").is_empty() {
            object.set_at("spec.ipFamilyPolicy", if any { "RequireDualStack" } else { "SingleStack" });
        }
    }

    fn claim_address(
        &self,
        address: u32,
        uid: &str,
        reservation: &mut Reservation,
        errors: &mut Vec<field::Error>,
    ) {
        let text = Ipv4Addr::from(address).to_string();
        let at = "spec.clusterIPs";
        if !self.range.hosts().contains(&address) {
            let detail = format!(
                "failed to allocate IP {text}: the provided IP ({text}) is not in the valid range. The range of valid IPs is {}",
                self.range
            );
            errors.push(field::Error::invalid(at, json!([text]), detail));
            return;
        }
        let mut used = self.used.lock();
        match used.addresses.get(&address) {
            Some(owner) if owner == uid => {}
            Some(_) => {
                let detail = format!("failed to allocate IP {text}: provided IP is already allocated");
                errors.push(field::Error::invalid(at, json!([text]), detail));
            }
            None => {
                used.addresses.insert(address, uid.to_owned());
                reservation.addresses.push(address);
            }
        }
    }

    /// The next free address above the static band, then within it.
    fn draw_address(&self, uid: &str) -> Option<u32> {
        let mut used = self.used.lock();
        let (first, last) = (*self.range.hosts().start(), *self.range.hosts().end());
        let band = first + self.range.static_band();
        let start = if (band..=last).contains(&used.next_address) { used.next_address } else { band };
        let order = (start..=last).chain(band..start).chain(first..band);
        let free = order.into_iter().find(|a| !used.addresses.contains_key(a))?;
        used.addresses.insert(free, uid.to_owned());
        used.next_address = free + 1;
        Some(free)
    }

    fn reserve_ports(
        &self,
        object: &mut Value,
        uid: &str,
        wants: bool,
        reservation: &mut Reservation,
        errors: &mut Vec<field::Error>,
    ) {
        let Some(Value::Array(ports)) = object.get_mut("spec").and_then(|s| s.get_mut("ports")) else {
            return;
        };
        let mut given: Vec<(i64, String)> = Vec::new();
        for (index, port) in ports.iter_mut().enumerate() {
            let protocol = port.str_at("protocol").to_owned();
            let at = format!("spec.ports[{index}].nodePort");
            match port.int_at("nodePort").unwrap_or(0) {
                // One number may serve several protocols of the same port.
                0 if wants => {
                    let shared = given.iter().find(|(n, p)| {
                        *p != protocol
                            && self.claim_port(*n, &protocol, uid, reservation).is_ok()
                            && port.int_at("port").is_some()
                    });
                    let number = shared
                        .map(|(n, _)| *n as u16)
                        .or_else(|| self.draw_port(&protocol, uid, reservation));
                    match number {
                        Some(number) => port["nodePort"] = json!(number),
                        None => {
                            let detail = "failed to allocate a nodePort: range is full";
                            errors.push(field::Error::invalid(at, 0, detail));
                        }
                    }
                }
                0 => {}
                number => {
                    if let Err(detail) = self.claim_port(number, &protocol, uid, reservation) {
                        errors.push(field::Error::invalid(at, number, detail));
                    }
                    given.push((number, protocol));
                }
            }
        }
    }

    fn claim_port(
        &self,
        number: i64,
        protocol: &str,
        uid: &str,
        reservation: &mut Reservation,
    ) -> std::result::Result<(), String> {
        let (low, high) = (*self.ports.start(), *self.ports.end());
        let Some(number) = u16::try_from(number).ok().filter(|n| self.ports.contains(n)) else {
            return Err(format!(
                "provided port is not in the valid range. The range of valid ports is {low}-{high}"
            ));
        };
        let key = (number, protocol.to_owned());
        let mut used = self.used.lock();
        match used.ports.get(&key) {
            Some(owner) if owner == uid => Ok(()),
            Some(_) => Err("provided port is already allocated".to_owned()),
            None => {
                used.ports.insert(key.clone(), uid.to_owned());
                reservation.ports.push(key);
                Ok(())
            }
        }
    }

    fn draw_port(&self, protocol: &str, uid: &str, reservation: &mut Reservation) -> Option<u16> {
        let mut used = self.used.lock();
        let count = u32::from(*self.ports.end() - *self.ports.start()) + 1;
        // A stride that is prime to the range spreads the ports, so that a freed one is not reused at once.
        let number = (0..count)
            .map(|i| *self.ports.start() + ((used.next_port + i) * 1009 % count) as u16)
            .find(|n| !used.ports.keys().any(|(p, _)| p == n))?;
        used.next_port = (used.next_port + 1) % count;
        let key = (number, protocol.to_owned());
        used.ports.insert(key.clone(), uid.to_owned());
        reservation.ports.push(key);
        Some(number)
    }

    /// The service is gone.
    pub fn release(&self, kind: &Kind, object: &Value) {
        if kind.resource() != "services" {
            return;
        }
        let mut used = self.used.lock();
        let uid = object.uid();
        for address in addresses(object) {
            if used.addresses.get(&address).is_some_and(|o| o == uid) {
                used.addresses.remove(&address);
            }
        }
        for port in node_ports(object) {
            if used.ports.get(&port).is_some_and(|o| o == uid) {
                used.ports.remove(&port);
            }
        }
    }
}

fn addresses(service: &Value) -> Vec<u32> {
    let list = service.list_at("spec.clusterIPs").iter().filter_map(Value::as_str);
    list.filter_map(|a| a.parse::<Ipv4Addr>().ok()).map(u32::from).collect()
}

fn node_ports(service: &Value) -> Vec<(u16, String)> {
    let ports = service.list_at("spec.ports").iter();
    ports
        .filter_map(|p| {
            let number = u16::try_from(p.int_at("nodePort")?).ok().filter(|n| *n != 0)?;
            Some((number, p.str_at("protocol").to_owned()))
        })
        .collect()
}
