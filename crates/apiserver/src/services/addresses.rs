//! Cluster addresses: each one in use is an `IPAddress` object, which is its lock, whoever made it.
//!
//! They come from the ranges of the ServiceCIDR objects that are ready. A service's address is written before the
//! service and taken away after it; what a crash in between leaves behind is repaired at the next start.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use knarr_api::field;
use knarr_api::object::Object;
use knarr_api::status::Result;
use knarr_store::{Expect, Range, Store, Write, WriteError};
use serde_json::{Value, json};

use super::range::{Cidr, Ranges};
use crate::encode::{self, View};
use crate::registry::{Registry, new_uid};

const GROUP: &str = "networking.k8s.io";
pub const PARTITION: &str = "ipaddresses.networking.k8s.io";
const RANGES: &str = "servicecidrs.networking.k8s.io";
const MANAGED_BY: &str = "ipaddress.kubernetes.io/managed-by";
const FAMILY: &str = "ipaddress.kubernetes.io/ip-family";
const MANAGER: &str = "ipallocator.k8s.io";
/// Condition of a ServiceCIDR that gives addresses out.
pub const READY: &str = "Ready";

/// Addresses promised to writes under way, and where each range was last looked into.
#[derive(Default)]
pub struct Promised {
    addresses: HashSet<IpAddr>,
    next: HashMap<Cidr, u128>,
}

/// The ranges that give addresses out: the configured ones first, then those of other ready ServiceCIDRs.
pub fn ranges(store: &dyn Store, configured: &Ranges) -> Vec<Cidr> {
    let listing = store.list(RANGES, &Range::default());
    let stored: Vec<Arc<Value>> =
        listing.map(|l| l.entries).unwrap_or_default().iter().map(|e| View::tree(e)).collect();
    if stored.is_empty() {
        return configured.iter().collect();
    }
    let mut ranges: Vec<Cidr> = Vec::new();
    for cidr in stored.iter().filter(|cidr| is_ready(cidr)) {
        let parsed = cidr.list_at("spec.cidrs").iter().filter_map(|c| c.as_str()?.parse::<Cidr>().ok());
        ranges.extend(parsed);
    }
    ranges.sort_by_key(|range| configured.iter().position(|c| c == *range).unwrap_or(usize::MAX));
    ranges.dedup();
    ranges
}

fn is_ready(cidr: &Value) -> bool {
    let holds = |c: &Value| c.str_at("type") == READY && c.str_at("status") == "True";
    cidr.at("metadata.deletionTimestamp").is_none() && cidr.list_at("status.conditions").iter().any(holds)
}

impl Promised {
    fn is_free(&self, store: &dyn Store, address: IpAddr) -> bool {
        !self.addresses.contains(&address) && store.get(PARTITION, &key(address)).is_none()
    }

    /// The next free address of the family: above the bands of its ranges, then within them.
    pub fn draw(&mut self, store: &dyn Store, ranges: &[Cidr], family: &str) -> Option<IpAddr> {
        let ranges: Vec<Cidr> = ranges.iter().copied().filter(|r| r.family() == family).collect();
        let mut found = None;
        for range in &ranges {
            let (band, last) = (range.band(), *range.hosts().end());
            let start = self.next.get(range).copied().filter(|n| (band..=last).contains(n)).unwrap_or(band);
            let free = (start..=last).chain(band..start).find(|o| self.is_free(store, range.at(*o)));
            if let Some(offset) = free {
                self.next.insert(*range, offset + 1);
                found = Some(range.at(offset));
                break;
            }
        }
        let found = found.or_else(|| {
            let low = |range: &Cidr| (1..range.band()).map(|o| range.at(o)).collect::<Vec<_>>();
            let usable =
                ranges.iter().flat_map(|range| low(range).into_iter().filter(|a| range.can_hold(*a)));
            usable.into_iter().find(|address| self.is_free(store, *address))
        })?;
        self.addresses.insert(found);
        Some(found)
    }

    /// Promises one that was asked for.
    pub fn claim(
        &mut self,
        store: &dyn Store,
        ranges: &[Cidr],
        address: IpAddr,
    ) -> std::result::Result<(), String> {
        if !ranges.iter().any(|range| range.can_hold(address)) {
            let list: Vec<String> = ranges.iter().map(Cidr::to_string).collect();
            return Err(format!(
                "the provided IP ({address}) is not in the valid range. The range of valid IPs is {}",
                list.join(",")
            ));
        }
        if !self.is_free(store, address) {
            return Err("provided IP is already allocated".to_owned());
        }
        self.addresses.insert(address);
        Ok(())
    }

    pub fn forget(&mut self, addresses: &[IpAddr]) {
        addresses.iter().for_each(|address| {
            self.addresses.remove(address);
        });
    }
}

fn key(address: IpAddr) -> String {
    encode::key("", &address.to_string())
}

/// The addresses of a service.
pub fn of(service: &Value) -> Vec<IpAddr> {
    service.list_at("spec.clusterIPs").iter().filter_map(|a| a.as_str()?.parse().ok()).collect()
}

/// Writes the locks; if one cannot be had, takes those already written away.
pub async fn hold(registry: &Registry, addresses: &[IpAddr], service: &Value) -> Result<()> {
    for (index, address) in addresses.iter().enumerate() {
        let Err(error) = write(registry, *address, service).await else { continue };
        give_up(registry, &addresses[..index], service).await;
        if !matches!(error, WriteError::Exists) {
            return Err(registry.write_failed(&error));
        }
        let detail = format!("failed to allocate IP {address}: provided IP is already allocated");
        let given = service.at("spec.clusterIPs").cloned().unwrap_or_default();
        let error = field::Error::invalid("spec.clusterIPs", given, detail);
        let kind = registry.schema.resource("", "v1", "services").expect("services are built in");
        return Err(knarr_api::status::Status::invalid(kind, service.name(), &[error]));
    }
    Ok(())
}

async fn write(registry: &Registry, address: IpAddr, service: &Value) -> std::result::Result<(), WriteError> {
    let kind = registry.schema.resource(GROUP, "v1", "ipaddresses").expect("addresses are built in");
    let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
    let object = json!({
        "kind": "IPAddress",
        "apiVersion": "networking.k8s.io/v1",
        "metadata": {
            "name": address.to_string(),
            "uid": new_uid(),
            "creationTimestamp": registry.now(),
            "generation": 1,
            "labels": { FAMILY: family, MANAGED_BY: MANAGER },
        },
        "spec": { "parentRef": {
            "resource": "services", "namespace": service.namespace(), "name": service.name(),
        } },
    });
    let write = Write {
        partition: PARTITION.into(),
        key: key(address).into(),
        expect: Expect::Absent,
        change: encode::put(kind, &object, None),
    };
    registry.store.commit(write).await.map(drop)
}

/// Takes the locks of a service away. One that somebody else holds stays.
pub async fn give_up(registry: &Registry, addresses: &[IpAddr], service: &Value) {
    let kind = registry.schema.resource(GROUP, "v1", "ipaddresses").expect("addresses are built in");
    for address in addresses {
        let Some(entry) = registry.store.get(PARTITION, &key(*address)) else { continue };
        let object = encode::decode(&entry);
        if !is_of(&object, service) {
            continue;
        }
        let write = Write {
            partition: PARTITION.into(),
            key: entry.key.clone(),
            expect: Expect::Revision(entry.revision),
            change: encode::delete(kind, &object, None),
        };
        if let Err(error) = registry.store.commit(write).await {
            tracing::warn!(%address, %error, "a service's address stays taken until the next start");
        }
    }
}

fn is_of(address: &Value, service: &Value) -> bool {
    let parent = &address["spec"]["parentRef"];
    parent.str_at("resource") == "services"
        && parent.str_at("group").is_empty()
        && parent.str_at("name") == service.name()
        && parent.str_at("namespace") == service.namespace()
}

/// Brings addresses and services together: addresses of services that are gone are freed, those that services have
/// without a lock get one. Run at start, and when somebody deletes a lock.
pub async fn repair(registry: &Registry) {
    for address in decoded(registry, PARTITION) {
        let ours = address.at("metadata.labels").is_some_and(|l| l.get(MANAGED_BY) == Some(&json!(MANAGER)));
        let Ok(ip) = address.name().parse::<IpAddr>() else { continue };
        if ours && holder(registry, &address).is_none() {
            let parent = &address["spec"]["parentRef"];
            let gone = json!({ "metadata": { "name": parent["name"], "namespace": parent["namespace"] } });
            tracing::info!(address = address.name(), "freed an address that no service has");
            give_up(registry, &[ip], &gone).await;
        }
    }
    for service in decoded(registry, "services") {
        restore(registry, &service).await;
    }
}

/// Locks what the service has.
pub async fn restore(registry: &Registry, service: &Value) {
    for address in of(service) {
        match registry.store.get(PARTITION, &key(address)) {
            Some(entry) if is_of(&encode::decode(&entry), service) => {}
            Some(_) => tracing::warn!(
                %address, service = service.name(), namespace = service.namespace(),
                "a service has an address that belongs to something else; delete and recreate the service"
            ),
            None => {
                if let Err(error) = write(registry, address, service).await {
                    tracing::warn!(%address, %error, "a service's address could not be locked");
                }
            }
        }
    }
}

/// The service that has the address of a lock, if it still does.
pub fn holder(registry: &Registry, address: &Value) -> Option<Value> {
    let parent = address.at("spec.parentRef")?;
    let (namespace, name) = (parent.str_at("namespace"), parent.str_at("name"));
    let service = registry.lookup("", "services", namespace, name)?;
    let ip: IpAddr = address.name().parse().ok()?;
    (is_of(address, &service) && of(&service).contains(&ip)).then_some(service)
}

fn decoded(registry: &Registry, partition: &str) -> Vec<Value> {
    let listing = registry.store.list(partition, &Range::default());
    listing.map(|l| l.entries).unwrap_or_default().iter().map(|e| encode::decode(e)).collect()
}
