//! Hints: for whom each endpoint is meant, by zone or node. `spec.trafficDistribution` keeps traffic where the endpoint
//! is; the annotation `service.kubernetes.io/topology-mode: Auto` shares endpoints out to zones by their CPU. Pure:
//! upstream's `endpointslice/topologycache` and `trafficdist`.

use super::ZONE_LABEL;
use crate::util;
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointHints, ForNode, ForZone};
use knarr_api::quantity::Quantity;
use std::collections::BTreeMap;

const MODE: &str = "service.kubernetes.io/topology-mode";
/// The annotation's older name, which goes first.
const OLD_MODE: &str = "service.kubernetes.io/topology-aware-hints";
/// Nodes that do not serve and so do not count.
const EXCLUDED: [&str; 2] = ["node-role.kubernetes.io/control-plane", "node-role.kubernetes.io/master"];
/// So much more than its share a zone's endpoints may have to bear. Upstream's value.
const OVERLOAD: f64 = 0.2;

/// How a Service wants its traffic to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    Anywhere,
    /// Shared out by the zones' CPU.
    Auto,
    SameZone,
    SameNode,
}

/// What a Service says; the annotation goes before the field.
pub fn wish(service: &Service) -> Wish {
    let annotations = service.metadata.annotations.as_ref();
    let mode = annotations.and_then(|all| all.get(OLD_MODE).or_else(|| all.get(MODE))).map(String::as_str);
    let distribution = service.spec.as_ref().and_then(|spec| spec.traffic_distribution.as_deref());
    match (mode, distribution) {
        (Some("Auto" | "auto"), _) => Wish::Auto,
        (_, Some("PreferClose" | "PreferSameZone")) => Wish::SameZone,
        (_, Some("PreferSameNode")) => Wish::SameNode,
        _ => Wish::Anywhere,
    }
}

/// The CPU of the nodes that serve, by zone. Kept up to date by each change of a node.
#[derive(Debug, Default)]
pub struct Capacity {
    /// Zone: nodes and thousandths of a CPU.
    zones: BTreeMap<String, (usize, i64)>,
    /// Nodes whose zone or CPU is not known: as long as there are any, nothing is shared out.
    unknown: usize,
}

/// What a node adds: its zone and CPU, or that these are not known.
#[derive(Debug, PartialEq)]
enum Share {
    Of(String, i64),
    Unknown,
}

fn share(node: &Node) -> Option<Share> {
    let (labels, status) = (node.metadata.labels.as_ref(), node.status.as_ref());
    let excluded = labels.is_some_and(|labels| EXCLUDED.iter().any(|label| labels.contains_key(*label)));
    if excluded || !status.is_some_and(|status| util::is_true(&status.conditions, "Ready")) {
        return None;
    }
    let zone = labels.and_then(|labels| labels.get(ZONE_LABEL)).filter(|zone| !zone.is_empty());
    let cpu = status.and_then(|status| status.allocatable.as_ref()?.get("cpu"));
    let cpu = cpu.and_then(|cpu| cpu.0.parse::<Quantity>().ok()).map_or(0, |cpu| cpu.millis());
    Some(match zone {
        Some(zone) if cpu > 0 => Share::Of(zone.clone(), cpu),
        _ => Share::Unknown,
    })
}

impl Capacity {
    /// Counts what a node is instead of what it was. Whether that makes a difference.
    pub fn count(&mut self, was: Option<&Node>, is: Option<&Node>) -> bool {
        let (was, is) = (was.and_then(share), is.and_then(share));
        if was == is {
            return false;
        }
        match was {
            Some(Share::Of(zone, cpu)) => {
                let entry = self.zones.entry(zone.clone()).or_default();
                *entry = (entry.0.saturating_sub(1), entry.1 - cpu);
                if entry.0 == 0 {
                    self.zones.remove(&zone);
                }
            }
            Some(Share::Unknown) => self.unknown = self.unknown.saturating_sub(1),
            None => {}
        }
        match is {
            Some(Share::Of(zone, cpu)) => {
                let entry = self.zones.entry(zone).or_default();
                *entry = (entry.0 + 1, entry.1 + cpu);
            }
            Some(Share::Unknown) => self.unknown += 1,
            None => {}
        }
        true
    }

    /// How many of so many endpoints each zone shall have.
    fn allocations(&self, endpoints: usize) -> Result<BTreeMap<&str, Allocation>, String> {
        // Upstream forgets the ratios when there is one zone only, so its message about that is never said.
        if self.unknown > 0 || self.zones.len() < 2 {
            return Err(
                "Insufficient Node information: allocatable CPU or zone not specified on one or more nodes"
                    .into(),
            );
        }
        let zones = self.zones.len();
        let counts = format!("({endpoints} endpoints, {zones} zones)");
        if zones > endpoints {
            return Err(format!("Insufficient number of endpoints {counts}"));
        }
        let total: i64 = self.zones.values().map(|(_, cpu)| cpu).sum();
        let mut allocations = BTreeMap::new();
        for (zone, (_, cpu)) in &self.zones {
            let desired = *cpu as f64 / total as f64 * endpoints as f64;
            let minimum = (desired / (1.0 + OVERLOAD)).ceil() as usize;
            let desired = desired.max(minimum as f64);
            allocations.insert(zone.as_str(), Allocation { minimum, maximum: 0, desired });
        }
        let least: usize = allocations.values().map(|allocation| allocation.minimum).sum();
        if least > endpoints {
            return Err(format!(
                "Unable to allocate minimum required endpoints to each zone without exceeding overload threshold {counts}"
            ));
        }
        for allocation in allocations.values_mut() {
            allocation.maximum = allocation.minimum + endpoints - least;
        }
        Ok(allocations)
    }

    /// Shares ready endpoints out to zones; `known` tells where an endpoint was meant for so far, and stays where that is
    /// still right. On an error none has a hint.
    pub fn share_out(
        &self,
        endpoints: &mut [&mut Endpoint],
        known: impl Fn(&Endpoint) -> Option<String>,
    ) -> Result<(), String> {
        let ready: Vec<_> = endpoints.iter_mut().filter(|endpoint| is_ready(endpoint)).collect();
        let allocations = self.allocations(ready.len())?;
        if ready.iter().any(|endpoint| endpoint.zone.as_ref().is_none_or(String::is_empty)) {
            return Err("One or more endpoints do not have a zone specified".into());
        }
        let (mut counts, mut free) = keep(&allocations, ready, known);
        let enough = |zone: &&str| counts.get(*zone).copied().unwrap_or(0) >= allocations[*zone].minimum;
        if free.is_empty() && !allocations.keys().all(enough) {
            // What was right before is no longer: all are shared out anew.
            let ready = endpoints.iter_mut().filter(|endpoint| is_ready(endpoint)).collect();
            (counts, free) = keep(&allocations, ready, |_| None);
        }
        for endpoint in &mut free {
            let zone = endpoint.zone.clone().unwrap_or_default();
            mean_for(endpoint, &zone);
            *counts.entry(zone).or_default() += 1;
        }
        let (mut giving, mut receiving) = moves(&allocations, &counts);
        for endpoint in free {
            let own = endpoint.zone.clone().unwrap_or_default();
            let Some(left) = giving.get_mut(&own).filter(|left| **left > 0) else { continue };
            let Some((zone, wanted)) = receiving.iter_mut().find(|(_, wanted)| **wanted > 0) else { break };
            mean_for(endpoint, zone);
            *left -= 1;
            *wanted -= 1;
        }
        Ok(())
    }
}

/// Leaves endpoints where they were meant for, as far as their zones may have so many. How many each zone has, and which
/// endpoints are free.
fn keep<'a, 'e>(
    allocations: &BTreeMap<&str, Allocation>,
    ready: Vec<&'a mut &'e mut Endpoint>,
    known: impl Fn(&Endpoint) -> Option<String>,
) -> (BTreeMap<String, usize>, Vec<&'a mut &'e mut Endpoint>) {
    let (mut counts, mut free): (BTreeMap<String, usize>, _) = (BTreeMap::new(), Vec::new());
    for endpoint in ready {
        let before = known(endpoint).and_then(|zone| Some((allocations.get(zone.as_str())?.maximum, zone)));
        match before {
            Some((most, zone)) if counts.get(&zone).copied().unwrap_or(0) < most => {
                mean_for(endpoint, &zone);
                *counts.entry(zone).or_default() += 1;
            }
            _ => free.push(endpoint),
        }
    }
    (counts, free)
}

struct Allocation {
    minimum: usize,
    maximum: usize,
    desired: f64,
}

/// How many endpoints each zone gives to others, and how many each gets.
fn moves(
    allocations: &BTreeMap<&str, Allocation>,
    counts: &BTreeMap<String, usize>,
) -> (BTreeMap<String, usize>, BTreeMap<String, usize>) {
    let surplus = |zone: &str, allocation: &Allocation| {
        counts.get(zone).copied().unwrap_or(0) as f64 - allocation.desired
    };
    let mut differences: BTreeMap<&str, f64> =
        allocations.iter().map(|(zone, allocation)| (*zone, surplus(zone, allocation))).collect();
    // A zone no node serves in keeps nothing.
    for (zone, count) in counts.iter().filter(|(zone, _)| !allocations.contains_key(zone.as_str())) {
        differences.insert(zone, *count as f64);
    }
    let (mut giving, mut receiving) = (BTreeMap::new(), BTreeMap::new());
    loop {
        let most = |sign: f64| {
            let by = |a: &(&&str, &f64), b: &(&&str, &f64)| (*a.1 * sign).total_cmp(&(*b.1 * sign));
            differences.iter().max_by(by).map(|(zone, difference)| (*zone, difference * sign))
        };
        let (Some((from, give)), Some((to, get))) = (most(1.0), most(-1.0)) else { break };
        if (give < 1.0 && get < 1.0) || give < 0.5 || get < 0.5 {
            break;
        }
        *giving.entry(from.to_owned()).or_insert(0) += 1;
        *receiving.entry(to.to_owned()).or_insert(0) += 1;
        *differences.entry(from).or_default() -= 1.0;
        *differences.entry(to).or_default() += 1.0;
    }
    (giving, receiving)
}

fn is_ready(endpoint: &Endpoint) -> bool {
    endpoint.conditions.as_ref().and_then(|conditions| conditions.ready) == Some(true)
}

fn mean_for(endpoint: &mut Endpoint, zone: &str) {
    let zones = vec![ForZone { name: zone.to_owned() }];
    endpoint.hints = Some(EndpointHints { for_zones: Some(zones), for_nodes: None });
}

/// The hint of an endpoint that is meant for where it is. Only ready ones have hints.
pub fn close(endpoint: &Endpoint, wish: Wish) -> Option<EndpointHints> {
    let zone = endpoint.zone.clone().map(|name| vec![ForZone { name }]);
    let node = endpoint.node_name.clone().filter(|_| wish == Wish::SameNode);
    let node = node.map(|name| vec![ForNode { name }]);
    let wanted = matches!(wish, Wish::SameZone | Wish::SameNode) && is_ready(endpoint);
    (wanted && (zone.is_some() || node.is_some()))
        .then_some(EndpointHints { for_zones: zone, for_nodes: node })
}

/// The zone an endpoint is meant for.
pub fn zone_meant(endpoint: &Endpoint) -> Option<String> {
    endpoint.hints.as_ref()?.for_zones.as_ref()?.first().map(|zone| zone.name.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn capacity(zones: &[(&str, &str)]) -> Capacity {
        let mut capacity = Capacity::default();
        for (zone, cpu) in zones {
            assert!(capacity.count(None, Some(&node(zone, cpu))));
        }
        capacity
    }

    fn node(zone: &str, cpu: &str) -> Node {
        let node = json!({
            "metadata": {"labels": {ZONE_LABEL: zone}},
            "status": {"allocatable": {"cpu": cpu}, "conditions": [{"type": "Ready", "status": "True"}]},
        });
        serde_json::from_value(node).unwrap()
    }

    fn endpoints(zones: &[(&str, usize)]) -> Vec<Endpoint> {
        let one = |zone: &str| {
            serde_json::from_value(json!({"addresses": ["x"], "conditions": {"ready": true}, "zone": zone}))
                .unwrap()
        };
        zones.iter().flat_map(|(zone, count)| (0..*count).map(move |_| one(zone))).collect()
    }

    fn shared(capacity: &Capacity, endpoints: &mut [Endpoint]) -> Result<BTreeMap<String, usize>, String> {
        let known: Vec<_> = endpoints.iter().map(zone_meant).collect();
        let index = std::cell::Cell::new(0);
        let mut all: Vec<&mut Endpoint> = endpoints.iter_mut().collect();
        capacity.share_out(&mut all, |_| {
            index.set(index.get() + 1);
            known[index.get() - 1].clone()
        })?;
        let mut counts = BTreeMap::new();
        endpoints.iter().filter_map(zone_meant).for_each(|zone| *counts.entry(zone).or_insert(0) += 1);
        Ok(counts)
    }

    fn counts(of: &[(&str, usize)]) -> BTreeMap<String, usize> {
        of.iter().filter(|(_, count)| *count > 0).map(|(zone, count)| ((*zone).to_owned(), *count)).collect()
    }

    #[test]
    fn endpoints_are_shared_out_by_the_cpu_of_the_zones() {
        type Zones<'a> = &'a [(&'a str, usize)];
        /// CPU by zone, endpoints by zone, hints by zone.
        type Case<'a> = (&'a [(&'a str, &'a str)], Zones<'a>, Zones<'a>);
        let cases: &[Case<'_>] = &[
            (&[("a", "1"), ("b", "1")], &[("a", 3), ("b", 3)], &[("a", 3), ("b", 3)]),
            (&[("a", "1"), ("b", "1")], &[("a", 6), ("b", 0)], &[("a", 3), ("b", 3)]),
            (&[("a", "3"), ("b", "1")], &[("a", 4), ("b", 4)], &[("a", 6), ("b", 2)]),
            (
                &[("a", "1"), ("b", "1"), ("c", "1")],
                &[("a", 5), ("b", 4), ("c", 3)],
                &[("a", 4), ("b", 4), ("c", 4)],
            ),
        ];
        for (zones, have, wanted) in cases {
            let (capacity, mut endpoints) = (capacity(zones), endpoints(have));
            assert_eq!(shared(&capacity, &mut endpoints).unwrap(), counts(wanted), "{have:?} over {zones:?}");
            let before = endpoints.clone();
            shared(&capacity, &mut endpoints).unwrap();
            assert_eq!(endpoints, before, "what is right stays");
        }
    }

    #[test]
    fn where_it_cannot_be_done_it_says_why() {
        let why = |zones: &[(&str, &str)], have: &[(&str, usize)]| {
            shared(&capacity(zones), &mut endpoints(have)).unwrap_err()
        };
        let nodes =
            "Insufficient Node information: allocatable CPU or zone not specified on one or more nodes";
        assert_eq!(why(&[("a", "1")], &[("a", 4)]), nodes);
        assert_eq!(why(&[("a", "1"), ("b", "0")], &[("a", 4)]), nodes);
        let two = [("a", "1"), ("b", "1")];
        assert_eq!(why(&two, &[("a", 1)]), "Insufficient number of endpoints (1 endpoints, 2 zones)");
        assert_eq!(
            why(&[("a", "2"), ("b", "1"), ("c", "1")], &[("a", 3)]),
            "Unable to allocate minimum required endpoints to each zone without exceeding overload threshold (3 \
             endpoints, 3 zones)"
        );
        assert_eq!(why(&two, &[("a", 3), ("", 1)]), "One or more endpoints do not have a zone specified");
    }

    #[test]
    fn nodes_that_go_are_no_longer_counted() {
        let mut all = capacity(&[("a", "1"), ("b", "1"), ("c", "1")]);
        assert!(all.count(Some(&node("c", "1")), None));
        assert!(!all.count(Some(&node("a", "1")), Some(&node("a", "1"))));
        assert_eq!(
            shared(&all, &mut endpoints(&[("a", 2), ("c", 2)])).unwrap(),
            counts(&[("a", 2), ("b", 2)])
        );
    }
}
