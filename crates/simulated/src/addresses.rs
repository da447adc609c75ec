//! Pod addresses: every node has a /24 of the range, every pod an address of its node's.

use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// Length of a node's range.
const NODE_PREFIX: u8 = 24;
/// The first address of a node's range is the node's own; .0 and .255 stay unused.
const FIRST_POD: u32 = 2;
const LAST_POD: u32 = 254;

/// An IPv4 range, at most a /24 long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    base: u32,
    prefix: u8,
}

impl FromStr for Range {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not an IPv4 range of at least a /24, such as 100.64.0.0/10");
        let (base, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let base: Ipv4Addr = base.parse().map_err(|_| wrong())?;
        let prefix: u8 =
            prefix.parse().ok().filter(|prefix| (1..=NODE_PREFIX).contains(prefix)).ok_or_else(wrong)?;
        let base = u32::from(base) & (u32::MAX << (32 - prefix));
        Ok(Range { base, prefix })
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", Ipv4Addr::from(self.base), self.prefix)
    }
}

impl Range {
    /// How many nodes it serves.
    pub fn nodes_max(&self) -> u32 {
        1 << (NODE_PREFIX - self.prefix)
    }

    fn node(&self, number: u32) -> String {
        let base = self.base + (number << (32 - NODE_PREFIX));
        format!("{}/{NODE_PREFIX}", Ipv4Addr::from(base))
    }

    fn number(&self, cidr: &str) -> Option<u32> {
        let base = u32::from(base_of(cidr)?);
        let number = base.checked_sub(self.base)? >> (32 - NODE_PREFIX);
        (number < self.nodes_max()).then_some(number)
    }
}

fn base_of(cidr: &str) -> Option<Ipv4Addr> {
    cidr.split('/').next()?.parse().ok()
}

/// The node's own address.
pub fn node_address(cidr: &str) -> Option<Ipv4Addr> {
    Some(Ipv4Addr::from(u32::from(base_of(cidr)?) + 1))
}

/// Ranges of nodes: which are taken, which is next.
pub struct NodeRanges {
    range: Range,
    state: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    by_node: HashMap<String, u32>,
    numbers: BTreeSet<u32>,
    /// Where to look first: ranges of nodes that are gone come last, as their pods may outlive them.
    next: u32,
}

impl NodeRanges {
    pub fn new(range: Range) -> Self {
        NodeRanges { range, state: Mutex::default() }
    }

    /// A node has this range.
    pub fn hold(&self, node: &str, cidr: &str) {
        let Some(number) = self.range.number(cidr) else { return };
        let mut taken = self.state.lock();
        taken.by_node.insert(node.to_owned(), number);
        taken.numbers.insert(number);
    }

    /// The node is gone.
    pub fn release(&self, node: &str) {
        let mut taken = self.state.lock();
        if let Some(number) = taken.by_node.remove(node) {
            taken.numbers.remove(&number);
        }
    }

    /// A range for a node: the one it was given before, or a free one. `None` when all are taken.
    pub fn take(&self, node: &str) -> Option<String> {
        let mut taken = self.state.lock();
        if let Some(number) = taken.by_node.get(node) {
            return Some(self.range.node(*number));
        }
        let all = (taken.next..self.range.nodes_max()).chain(0..taken.next);
        let number = all.into_iter().find(|number| !taken.numbers.contains(number))?;
        taken.next = number + 1;
        taken.numbers.insert(number);
        taken.by_node.insert(node.to_owned(), number);
        Some(self.range.node(number))
    }
}

/// Addresses of pods: who has which. Kept by range, not by node: a pod may outlive its node, whose range may go to
/// another.
#[derive(Default)]
pub struct PodAddresses {
    by_range: Mutex<HashMap<u32, NodeAddresses>>,
}

#[derive(Default)]
struct NodeAddresses {
    /// Last part of the address, and the pod's uid.
    held: BTreeMap<u32, String>,
    next: u32,
}

impl PodAddresses {
    /// A pod has this address.
    pub fn hold(&self, address: &str, uid: &str) {
        let Some((range, last)) = parts(address) else { return };
        self.by_range.lock().entry(range).or_default().held.insert(last, uid.to_owned());
    }

    /// A pod is over.
    pub fn release(&self, address: &str, uid: &str) {
        let Some((range, last)) = parts(address) else { return };
        let mut ranges = self.by_range.lock();
        if let Some(range) = ranges.get_mut(&range)
            && range.held.get(&last).is_some_and(|holder| holder == uid)
        {
            range.held.remove(&last);
        }
    }

    /// An address of a node's range for a pod; the one it was given before if there is one. Just released addresses
    /// come last. `None` when all are taken.
    pub fn take(&self, cidr: &str, uid: &str) -> Option<Ipv4Addr> {
        let base = u32::from(base_of(cidr)?);
        let mut ranges = self.by_range.lock();
        let range = ranges.entry(base >> (32 - NODE_PREFIX)).or_default();
        if let Some((last, _)) = range.held.iter().find(|(_, holder)| *holder == uid) {
            return Some(Ipv4Addr::from(base + last));
        }
        let start = range.next.clamp(FIRST_POD, LAST_POD);
        let last = (start..=LAST_POD).chain(FIRST_POD..start).find(|last| !range.held.contains_key(last))?;
        range.next = if last == LAST_POD { FIRST_POD } else { last + 1 };
        range.held.insert(last, uid.to_owned());
        Some(Ipv4Addr::from(base + last))
    }
}

/// The range of an address, and its place there.
fn parts(address: &str) -> Option<(u32, u32)> {
    let address = u32::from(address.parse::<Ipv4Addr>().ok()?);
    Some((address >> (32 - NODE_PREFIX), address & 0xff))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_get_ranges_of_their_own_and_released_ones_are_used_again() {
        let ranges = NodeRanges::new("10.0.0.0/22".parse().unwrap());
        ranges.hold("old", "10.0.1.0/24");
        let taken: Vec<_> = ["a", "b", "a", "c", "d"].map(|node| ranges.take(node)).to_vec();
        let cidr = |text: &str| Some(text.to_owned());
        let (first, second, third) = (cidr("10.0.0.0/24"), cidr("10.0.2.0/24"), cidr("10.0.3.0/24"));
        assert_eq!(taken, [first.clone(), second, first, third, None], "four ranges are all there are");
        ranges.release("old");
        assert_eq!(ranges.take("d"), cidr("10.0.1.0/24"));
        assert!("10.0.0.0/30".parse::<Range>().is_err());
    }

    #[test]
    fn pods_get_addresses_of_their_own_and_keep_them_when_asked_again() {
        let pods = PodAddresses::default();
        pods.hold("10.0.0.2", "old");
        let first = pods.take("10.0.0.0/24", "a");
        assert_eq!(first, Some(Ipv4Addr::new(10, 0, 0, 3)));
        assert_eq!(pods.take("10.0.0.0/24", "a"), first);
        pods.release("10.0.0.2", "somebody else");
        pods.release("10.0.0.2", "old");
        let rest = (0..300).filter_map(|n| pods.take("10.0.0.0/24", &n.to_string())).count();
        assert_eq!(rest, 252, "all but the one that is held");
        assert_eq!(pods.take("10.0.0.0/24", "late"), None);
    }
}
