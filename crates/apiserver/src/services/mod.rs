//! Addresses and node ports of services: handed out once each, given back with the service.
//!
//! Addresses in use are objects ([`addresses`]); node ports are rebuilt from the stored services at start, so that
//! they can never drift from them.

pub mod addresses;
pub mod range;

use std::collections::HashMap;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use knarr_api::field;
use knarr_api::kinds::service::{init_families, needs_health_port, needs_node_ports};
use knarr_api::object::Object;
use knarr_api::schema::Kind;
use knarr_api::status::{Result, Status};
use knarr_store::{Range, Store};
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::encode;
use crate::registry::Registry;
use addresses::Promised;
pub use range::{Cidr, Ranges};

/// Hands out addresses and ports.
pub struct Allocator {
    configured: Ranges,
    ports: RangeInclusive<u16>,
    promised: Mutex<Promised>,
    used: Mutex<Used>,
}

#[derive(Default)]
struct Used {
    /// Port and protocol → uid.
    ports: HashMap<(u16, String), String>,
    next_port: u32,
}

/// What a write has reserved; given back when dropped before [`keep`](Reservation::keep).
pub struct Reservation<'a> {
    allocator: &'a Allocator,
    addresses: Vec<IpAddr>,
    /// The addresses are written as objects.
    held: bool,
    ports: Vec<(u16, String)>,
    /// Given up by the write: free once it has happened.
    freed_addresses: Vec<IpAddr>,
    freed_ports: Vec<(u16, String)>,
}

impl Reservation<'_> {
    /// Writes what has to be there before the service is.
    pub async fn hold(&mut self, registry: &Registry, service: &Value) -> Result<()> {
        if !self.addresses.is_empty() {
            addresses::hold(registry, &self.addresses, service).await?;
            self.held = true;
        }
        Ok(())
    }

    /// The write has happened.
    pub async fn keep(mut self, registry: &Registry, service: &Value) {
        self.ports.clear();
        if !self.freed_ports.is_empty() {
            let mut used = self.allocator.used.lock();
            self.freed_ports.iter().for_each(|p| drop(used.ports.remove(p)));
        }
        if !self.freed_addresses.is_empty() {
            addresses::give_up(registry, &self.freed_addresses, service).await;
        }
    }

    /// The write has not happened.
    pub async fn undo(self, registry: &Registry, service: &Value) {
        if self.held {
            addresses::give_up(registry, &self.addresses, service).await;
        }
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if !self.addresses.is_empty() {
            self.allocator.promised.lock().forget(&self.addresses);
        }
        if !self.ports.is_empty() {
            let mut used = self.allocator.used.lock();
            self.ports.iter().for_each(|p| drop(used.ports.remove(p)));
        }
    }
}

impl Allocator {
    /// An allocator that knows what the stored services use. The ranges are those of the cluster's first
    /// ServiceCIDR.
    pub fn load(store: &dyn Store, configured: Ranges, ports: RangeInclusive<u16>) -> Allocator {
        let mut used = Used::default();
        let listing = store.list("services", &Range::default());
        for entry in listing.map(|l| l.entries).unwrap_or_default() {
            let service = encode::decode(&entry);
            used.ports.extend(node_ports(&service).into_iter().map(|p| (p, service.uid().to_owned())));
        }
        Allocator { configured, ports, promised: Mutex::default(), used: Mutex::new(used) }
    }

    pub fn configured(&self) -> &Ranges {
        &self.configured
    }

    /// The range of the cluster's own family.
    pub fn range(&self) -> Cidr {
        self.configured.primary()
    }

    /// A write that takes nothing.
    pub fn nothing(&self) -> Reservation<'_> {
        Reservation {
            allocator: self,
            addresses: Vec::new(),
            held: false,
            ports: Vec::new(),
            freed_addresses: Vec::new(),
            freed_ports: Vec::new(),
        }
    }

    /// Fills in what the service lacks and reserves what it names.
    pub fn reserve(
        &self,
        registry: &Registry,
        kind: &Kind,
        object: &mut Value,
        old: Option<&Value>,
    ) -> Result<Reservation<'_>> {
        let mut reservation = self.nothing();
        if kind.plural != "services" || !kind.group.is_empty() {
            return Ok(reservation);
        }
        let refuse =
            |object: &Value, errors: &[field::Error]| Err(Status::invalid(kind, object.name(), errors));
        // A patch may try to change the uid, and is refused later.
        let uid = old.unwrap_or(object).uid().to_owned();
        if object.str_at("spec.type") != "ExternalName" {
            let ranges = addresses::ranges(registry.store.as_ref(), &self.configured);
            let mut families: Vec<&'static str> = ranges.iter().map(Cidr::family).collect();
            families.sort_by_key(|family| *family != self.range().family());
            families.dedup();
            let errors = init_families(object, old, &families);
            if !errors.is_empty() {
                return refuse(object, &errors);
            }
            self.reserve_addresses(registry, &ranges, object, old, &mut reservation)?;
        } else {
            object.remove_at("spec.internalTrafficPolicy");
        }
        let mut errors = Vec::new();
        if matches!(object.str_at("spec.type"), "NodePort" | "LoadBalancer") {
            let wants = needs_node_ports(object);
            self.reserve_ports(object, &uid, wants, &mut reservation, &mut errors);
        }
        if needs_health_port(object) {
            self.reserve_health_port(object, &uid, &mut reservation, &mut errors);
        }
        if let Some(old) = old {
            let (kept_addresses, kept_ports) = (addresses::of(object), node_ports(object));
            let given_up = addresses::of(old).into_iter().filter(|a| !kept_addresses.contains(a));
            reservation.freed_addresses = given_up.collect();
            reservation.freed_ports =
                node_ports(old).into_iter().filter(|p| !kept_ports.contains(p)).collect();
        }
        if errors.is_empty() { Ok(reservation) } else { refuse(object, &errors) }
    }

    /// One address for each family of the service; those it has are kept, those it names are claimed.
    fn reserve_addresses(
        &self,
        registry: &Registry,
        ranges: &[Cidr],
        object: &mut Value,
        old: Option<&Value>,
        reservation: &mut Reservation,
    ) -> Result<()> {
        if object.str_at("spec.clusterIP") == "None" {
            return Ok(());
        }
        let store = registry.store.as_ref();
        let had = old.map(addresses::of).unwrap_or_default();
        let texts = |path: &str| -> Vec<String> {
            object.list_at(path).iter().filter_map(|t| t.as_str().map(str::to_owned)).collect()
        };
        let (mut given, families) = (texts("spec.clusterIPs"), texts("spec.ipFamilies"));
        for (i, family) in families.iter().enumerate() {
            match given.get(i).map(|text| (text, text.parse::<IpAddr>())) {
                Some((_, Ok(address))) if had.contains(&address) => {}
                Some((text, Ok(address))) => {
                    if let Err(why) = self.promised.lock().claim(store, ranges, address) {
                        let detail = format!("failed to allocate IP {text}: {why}");
                        let error = field::Error::invalid("spec.clusterIPs", given.clone(), detail);
                        let kind =
                            registry.schema.resource("", "v1", "services").expect("services are built in");
                        return Err(Status::invalid(kind, object.name(), &[error]));
                    }
                    reservation.addresses.push(address);
                }
                // What is no address is for validation to refuse.
                Some((_, Err(_))) => {}
                None => {
                    let drawn = self.promised.lock().draw(store, ranges, family);
                    let full = || Status::internal("failed to allocate a serviceIP: range is full");
                    let address = drawn.ok_or_else(full)?;
                    reservation.addresses.push(address);
                    given.push(address.to_string());
                }
            }
        }
        if let Some(first) = given.first() {
            object.set_at("spec.clusterIP", first.clone());
            object.set_at("spec.clusterIPs", given);
        }
        Ok(())
    }

    fn reserve_health_port(
        &self,
        object: &mut Value,
        uid: &str,
        reservation: &mut Reservation,
        errors: &mut Vec<field::Error>,
    ) {
        const AT: &str = "spec.healthCheckNodePort";
        match object.int_at(AT).unwrap_or(0) {
            0 => match self.draw_port("TCP", uid, reservation) {
                Some(number) => object.set_at(AT, number),
                None => {
                    errors.push(field::Error::invalid(AT, 0, "failed to allocate a nodePort: range is full"))
                }
            },
            number => {
                if let Err(detail) = self.claim_port(number, "TCP", uid, reservation) {
                    let detail =
                        format!("failed to allocate requested HealthCheck NodePort {number}: {detail}");
                    errors.push(field::Error::invalid(AT, number, detail));
                }
            }
        }
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

    /// The object is gone: a service frees what it had, an address in use is locked again.
    pub async fn release(&self, registry: &Registry, kind: &Kind, object: &Value) {
        match (kind.group.as_str(), kind.plural.as_str()) {
            ("", "services") => {
                self.release_ports(object);
                addresses::give_up(registry, &addresses::of(object), object).await;
            }
            ("networking.k8s.io", "ipaddresses") => {
                if let Some(service) = addresses::holder(registry, object) {
                    addresses::restore(registry, &service).await;
                }
            }
            _ => {}
        }
    }

    fn release_ports(&self, service: &Value) {
        let mut used = self.used.lock();
        for port in node_ports(service) {
            if used.ports.get(&port).is_some_and(|owner| owner == service.uid()) {
                used.ports.remove(&port);
            }
        }
    }
}

/// Every port the service has on the nodes, with its protocol.
fn node_ports(service: &Value) -> Vec<(u16, String)> {
    let number = |value: Option<i64>| u16::try_from(value?).ok().filter(|n| *n != 0);
    let ports = service.list_at("spec.ports").iter();
    let ports = ports.filter_map(|p| Some((number(p.int_at("nodePort"))?, p.str_at("protocol").to_owned())));
    let health = number(service.int_at("spec.healthCheckNodePort")).map(|n| (n, "TCP".to_owned()));
    ports.chain(health).collect()
}
