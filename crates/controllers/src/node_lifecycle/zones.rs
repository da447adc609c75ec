//! How fast nodes may be given up: a zone at a time, slower where much is broken, not at all where nothing reports —
//! then most likely it is us who are cut off. Pure: time and changes come in, verdicts go out.

use super::ready_status;
use k8s_openapi::api::core::v1::Node;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;
use tokio::time::Instant;

const REGION: [&str; 2] = ["topology.kubernetes.io/region", "failure-domain.beta.kubernetes.io/region"];
const ZONE: [&str; 2] = ["topology.kubernetes.io/zone", "failure-domain.beta.kubernetes.io/zone"];
/// Nodes that do not count when a zone is judged.
const EXCLUDED: &str = "node.kubernetes.io/exclude-disruption";
/// Fewer nodes down than this are nothing unusual.
const DISRUPTION_MIN: usize = 3;

/// How fast nodes are given up; the defaults are upstream's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EvictionRates {
    /// Nodes a second in each zone.
    pub healthy: f64,
    /// The same in a large zone of which much is down. In a small one nothing is given up then.
    pub disrupted: f64,
    /// A zone with more nodes than this is large.
    pub large_zone: usize,
    /// From this part down a zone counts as disrupted.
    pub unhealthy: f64,
}

impl Default for EvictionRates {
    fn default() -> Self {
        EvictionRates { healthy: 0.1, disrupted: 0.01, large_zone: 50, unhealthy: 0.55 }
    }
}

/// How a zone is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Normal,
    Partial,
    Full,
}

/// Whether a node may be given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Now,
    /// Not before this time.
    At(Instant),
    /// Not until its zone changes.
    No,
}

/// All nodes by zone.
#[derive(Default)]
pub struct Fleet {
    /// In order, so that who hears of a change hears in the same order every time.
    nodes: BTreeMap<String, Counted>,
    zones: HashMap<String, Zone>,
    /// May be given up and are not yet seen to be.
    granted: BTreeSet<String>,
}

struct Counted {
    zone: String,
    ready: bool,
    excluded: bool,
}

#[derive(Default)]
struct Zone {
    ready: usize,
    down: usize,
    /// When the last node was given up.
    last: Option<Instant>,
}

impl Zone {
    fn state(&self, rates: &EvictionRates) -> State {
        let all = self.ready + self.down;
        if self.ready == 0 && self.down > 0 {
            State::Full
        } else if self.down >= DISRUPTION_MIN && self.down as f64 / all as f64 >= rates.unhealthy {
            State::Partial
        } else {
            State::Normal
        }
    }

    /// Nodes a second.
    fn rate(&self, rates: &EvictionRates) -> f64 {
        match self.state(rates) {
            State::Partial if self.ready + self.down > rates.large_zone => rates.disrupted,
            State::Partial => 0.0,
            State::Normal | State::Full => rates.healthy,
        }
    }
}

impl Fleet {
    /// Counts a node as it is now, or as gone. Whom that concerns besides itself: the nodes of a zone that is in another
    /// state now, or all.
    pub fn count(&mut self, name: &str, node: Option<&Node>, rates: &EvictionRates) -> Vec<String> {
        let before = self.all_are_down(rates);
        let left = self.remove(name, rates);
        if node.is_none() {
            self.granted.remove(name);
        }
        let joined = node.and_then(|node| self.add(name, node, rates));
        let changed: Vec<String> = match (left, joined) {
            (Some((zone, old)), Some((same, new))) if zone == same && old == new => Vec::new(),
            (left, joined) => left.into_iter().chain(joined).map(|(zone, _)| zone).collect(),
        };
        let all = self.all_are_down(rates) != before;
        let concerned = self.nodes.iter().filter(|(other, counted)| {
            *other != name && (all || (!counted.ready && changed.contains(&counted.zone)))
        });
        concerned.map(|(name, _)| name.clone()).collect()
    }

    /// Takes a node out; its zone and the state that had.
    fn remove(&mut self, name: &str, rates: &EvictionRates) -> Option<(String, State)> {
        let counted = self.nodes.remove(name)?;
        let zone = self.zones.get_mut(&counted.zone)?;
        let state = zone.state(rates);
        if !counted.excluded {
            *(if counted.ready { &mut zone.ready } else { &mut zone.down }) -= 1;
        }
        Some((counted.zone, state))
    }

    /// Puts a node in; its zone and the state that has now.
    fn add(&mut self, name: &str, node: &Node, rates: &EvictionRates) -> Option<(String, State)> {
        let labels = node.metadata.labels.as_ref();
        let counted = Counted {
            zone: zone_of(node),
            ready: ready_status(node) == "True",
            excluded: labels.is_some_and(|labels| labels.contains_key(EXCLUDED)),
        };
        let zone = self.zones.entry(counted.zone.clone()).or_default();
        if !counted.excluded {
            *(if counted.ready { &mut zone.ready } else { &mut zone.down }) += 1;
        }
        if counted.ready {
            self.granted.remove(name);
        }
        let found = (counted.zone.clone(), zone.state(rates));
        self.nodes.insert(name.to_owned(), counted);
        Some(found)
    }

    /// Whether no zone has a node that reports.
    pub fn all_are_down(&self, rates: &EvictionRates) -> bool {
        let mut zones = self.zones.values().filter(|zone| zone.ready + zone.down > 0).peekable();
        zones.peek().is_some() && zones.all(|zone| zone.state(rates) == State::Full)
    }

    /// Asks to give up a node that is down. A yes holds until [`Fleet::given_up`] or until the node is ready.
    pub fn ask(&mut self, name: &str, rates: &EvictionRates, now: Instant) -> Verdict {
        if self.all_are_down(rates) {
            return Verdict::No;
        }
        // What is not yet counted as down waits for that: how its zone is shows only then.
        let Some(counted) = self.nodes.get(name).filter(|counted| !counted.ready) else { return Verdict::No };
        if self.granted.contains(name) {
            return Verdict::Now;
        }
        let Some(zone) = self.zones.get_mut(&counted.zone) else { return Verdict::No };
        let rate = zone.rate(rates);
        if rate <= 0.0 {
            return Verdict::No;
        }
        let next = zone.last.map(|last| last + Duration::from_secs_f64(1.0 / rate));
        match next.filter(|next| *next > now) {
            Some(next) => Verdict::At(next),
            None => {
                zone.last = Some(now);
                self.granted.insert(name.to_owned());
                Verdict::Now
            }
        }
    }

    /// A node is seen to be given up.
    pub fn given_up(&mut self, name: &str) {
        self.granted.remove(name);
    }
}

fn zone_of(node: &Node) -> String {
    let label = |keys: [&str; 2]| {
        let labels = node.metadata.labels.as_ref();
        keys.iter().find_map(|key| labels?.get(*key)).cloned().unwrap_or_default()
    };
    format!("{}\0{}", label(REGION), label(ZONE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const RATES: EvictionRates =
        EvictionRates { healthy: 0.1, disrupted: 0.01, large_zone: 50, unhealthy: 0.55 };

    /// A fleet of one zone: so many ready, so many down.
    fn fleet(zone: &str, ready: usize, down: usize, fleet: &mut Fleet) {
        for n in 0..ready + down {
            let status = if n < ready { "True" } else { "Unknown" };
            let name = format!("{zone}{n}");
            let node = json!({
                "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone}},
                "status": {"conditions": [{"type": "Ready", "status": status}]},
            });
            fleet.count(&name, Some(&serde_json::from_value(node).unwrap()), &RATES);
        }
    }

    /// After how many seconds the second node of a zone may be given up; `None`: not at all.
    fn pace(ready: usize, down: usize) -> Option<u64> {
        let mut all = Fleet::default();
        fleet("a", ready, down, &mut all);
        fleet("healthy", 1, 0, &mut all);
        let now = Instant::now();
        let (first, second) = (format!("a{ready}"), format!("a{}", ready + 1));
        match all.ask(&first, &RATES, now) {
            Verdict::Now => {}
            Verdict::No => return None,
            Verdict::At(_) => panic!("the first never waits"),
        }
        assert_eq!(all.ask(&first, &RATES, now), Verdict::Now, "a yes holds");
        match all.ask(&second, &RATES, now) {
            Verdict::At(at) => Some((at - now).as_secs()),
            other => panic!("the second waits, not {other:?}"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_zone_is_given_up_as_fast_as_it_is_well() {
        let cases = [
            ("a few are down", 10, 2, Some(10)),
            ("less than the threshold", 46, 54, Some(10)),
            ("two down are nothing unusual", 1, 2, Some(10)),
            ("a small zone that is mostly down", 4, 6, None),
            ("a large zone that is mostly down", 40, 60, Some(100)),
            ("exactly at the size is not yet large", 20, 30, None),
            ("a whole zone is down, others are not", 0, 10, Some(10)),
        ];
        for (what, ready, down, seconds) in cases {
            assert_eq!(pace(ready, down), seconds, "{what}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn when_no_zone_reports_nothing_is_given_up() {
        let mut all = Fleet::default();
        fleet("a", 0, 3, &mut all);
        fleet("b", 0, 1, &mut all);
        assert!(all.all_are_down(&RATES));
        assert_eq!(all.ask("a0", &RATES, Instant::now()), Verdict::No);
        let ready = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}});
        let concerned = all.count("b0", Some(&serde_json::from_value(ready).unwrap()), &RATES);
        assert_eq!(concerned.len(), 3, "all hear of the first that reports");
        assert_eq!(all.ask("a0", &RATES, Instant::now()), Verdict::Now);
        all.count("b0", None, &RATES);
        assert!(all.all_are_down(&RATES), "and of the last that goes");
        assert_eq!(all.ask("a0", &RATES, Instant::now()), Verdict::No);
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_of_a_zone_concerns_those_of_it_that_wait() {
        let mut all = Fleet::default();
        fleet("a", 4, 5, &mut all);
        fleet("b", 4, 5, &mut all);
        let gone = all.count("a0", None, &RATES);
        assert!(gone.iter().all(|name| name.starts_with('a')) && gone.len() == 5, "{gone:?}");
        assert_eq!(all.ask("a5", &RATES, Instant::now()), Verdict::No);
        assert_eq!(all.ask("b5", &RATES, Instant::now()), Verdict::No);
    }
}
