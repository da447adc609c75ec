//! Node IPAM: every node gets a range of pod addresses of its own out of the cluster's, once, and gives it back when it
//! is deleted. Upstream's range allocator (`pkg/controller/nodeipam`). Nodes that bring a range keep it; nodes whose
//! ranges are somebody else's to give are left alone.

use crate::Context;
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::Node;
use knarr_client::{
    Change, Controller, Error, EventType, Informer, ObjectKey, Reconcile, Recorder, Requeue, Result,
    ignore_gone, patch,
};
use kube::api::Api;
use parking_lot::Mutex;
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// The size of a node's range in its two families. Upstream's defaults.
const PREFIX_V4: u8 = 24;
const PREFIX_V6: u8 = 64;
/// Of one cluster range at most so many are given out. Upstream's limit.
const BLOCKS_MAX: u128 = 1 << 16;

/// Which ranges nodes get.
#[derive(Clone, Debug, Default)]
pub struct NodeRanges {
    /// The cluster's ranges (`10.42.0.0/16`), one for each family; a node gets a part of each. Empty: nothing is given.
    pub cluster: Vec<String>,
    /// Ranges no node may get: those of services, and what a node is known to bring.
    pub reserved: Vec<String>,
    /// Nodes with this label get theirs from somebody else.
    pub elsewhere: Option<String>,
}

pub fn start(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let ranges = &context.config.node_ranges;
    if ranges.cluster.is_empty() {
        return Box::pin(async {});
    }
    let books = match Books::new(ranges) {
        Ok(books) => Arc::new(Mutex::new(books)),
        Err(why) => {
            return Box::pin(async move { tracing::error!(why, "no node gets a range of pod addresses") });
        }
    };
    let nodes = context.informers.get::<Node>();
    let (book, known) = (books.clone(), nodes.clone());
    let controller = Controller::new("node-ipam").watch_changes(&nodes, move |change| {
        let node = change.object();
        let name = node.metadata.name.clone().unwrap_or_default();
        let cidrs = cidrs(node);
        match change {
            Change::Deleted(_) => {
                book.lock().release(&name);
                // What is free now may be what others wait for.
                known
                    .list()
                    .iter()
                    .filter(|node| self::cidrs(node).is_empty())
                    .map(|node| ObjectKey::of(&**node))
                    .collect()
            }
            _ if cidrs.is_empty() => vec![ObjectKey::of(&**node)],
            Change::Updated { old, .. } if self::cidrs(old) == cidrs => Vec::new(),
            _ => {
                book.lock().hold(&name, cidrs);
                Vec::new()
            }
        }
    });
    let recorder = context.recorder.for_component("cidrAllocator");
    Box::pin(controller.run(Arc::new(Allocator { context, recorder, nodes, books }), shutdown))
}

fn cidrs(node: &Node) -> &[String] {
    let spec = node.spec.as_ref();
    let several = spec.and_then(|spec| spec.pod_cidrs.as_deref()).filter(|all| !all.is_empty());
    several
        .or_else(|| spec.and_then(|spec| spec.pod_cidr.as_ref()).map(std::slice::from_ref))
        .unwrap_or_default()
}

struct Allocator {
    context: Context,
    recorder: Recorder,
    nodes: Informer<Node>,
    books: Arc<Mutex<Books>>,
}

impl Reconcile for Allocator {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let Some(node) = self.nodes.get_key(&key) else {
            self.books.lock().release(&key.name);
            return Ok(Requeue::Done);
        };
        let label = self.context.config.node_ranges.elsewhere.as_ref();
        let labels = node.metadata.labels.as_ref();
        let elsewhere = label.is_some_and(|label| labels.is_some_and(|labels| labels.contains_key(label)));
        if elsewhere || !cidrs(&node).is_empty() {
            return Ok(Requeue::Done);
        }
        let Some(taken) = self.books.lock().take(&key.name) else {
            self.tell(&node, "CIDRNotAvailable");
            let reason = "failed to allocate cidr: there are no remaining CIDRs left to allocate in the accepted range";
            return Err(Error::not_yet(format!("give node {key} a range of pod addresses"), reason));
        };
        let api: Api<Node> = Api::all(self.context.client.clone());
        let change = json!({
            "metadata": {"uid": node.metadata.uid, "resourceVersion": node.metadata.resource_version},
            "spec": {"podCIDR": taken[0], "podCIDRs": taken},
        });
        let patched = ignore_gone(patch::merge(&api, &key.name, change).await);
        match &patched {
            Ok(()) => tracing::info!(node = key.name, ranges = ?taken, "gave a range of pod addresses"),
            Err(error) if error.is_conflict() => {}
            Err(_) => self.tell(&node, "CIDRAssignmentFailed"),
        }
        // What was taken stays taken for this node: nobody knows whether a failed write went through.
        patched.map(|()| Requeue::Done)
    }
}

impl Allocator {
    fn tell(&self, node: &Node, state: &str) {
        let name = node.metadata.name.as_deref().unwrap_or_default();
        let message = format!("Node {name} status is now: {state}");
        self.recorder.event(node, EventType::Normal, state, message);
    }
}

/// Who has what. Rebuilt from the nodes at every start.
#[derive(Debug)]
struct Books {
    pools: Vec<Pool>,
    /// By node: its blocks as (pool, numbers).
    held: HashMap<String, Vec<(usize, RangeInclusive<u128>)>>,
    /// By node: what is being written for it.
    pending: HashMap<String, Vec<u128>>,
}

/// One cluster range, cut into blocks.
#[derive(Debug)]
struct Pool {
    range: Cidr,
    /// The prefix of a block.
    prefix: u8,
    /// How many hold each block.
    taken: BTreeMap<u128, usize>,
    /// Where to look first: blocks that were given back come last, as pods may outlive their node.
    next: u128,
}

impl Books {
    fn new(ranges: &NodeRanges) -> Result<Books, String> {
        let mut pools = ranges.cluster.iter().map(|text| Pool::new(text)).collect::<Result<Vec<_>, _>>()?;
        for text in &ranges.reserved {
            let reserved = Cidr::parse(text)?;
            for pool in &mut pools {
                pool.count(pool.blocks_of(reserved), true);
            }
        }
        Ok(Books { pools, held: HashMap::new(), pending: HashMap::new() })
    }

    /// A node has these ranges, whoever gave them.
    fn hold(&mut self, node: &str, cidrs: &[String]) {
        self.release(node);
        let mut held = Vec::new();
        for cidr in cidrs.iter().filter_map(|text| Cidr::parse(text).ok()) {
            for (number, pool) in self.pools.iter_mut().enumerate() {
                let blocks = pool.blocks_of(cidr);
                if let Some(blocks) = blocks.clone() {
                    pool.count(Some(blocks.clone()), true);
                    held.push((number, blocks));
                }
            }
        }
        self.held.insert(node.to_owned(), held);
    }

    fn release(&mut self, node: &str) {
        for (number, blocks) in self.held.remove(node).unwrap_or_default() {
            self.pools[number].count(Some(blocks), false);
        }
        for (number, block) in self.pending.remove(node).unwrap_or_default().into_iter().enumerate() {
            self.pools[number].count(Some(block..=block), false);
        }
    }

    /// One block of every pool for a node; the same again until it is held.
    fn take(&mut self, node: &str) -> Option<Vec<String>> {
        if !self.pending.contains_key(node) {
            let free: Option<Vec<u128>> = self.pools.iter().map(Pool::free).collect();
            let free = free?;
            for (pool, block) in self.pools.iter_mut().zip(&free) {
                pool.count(Some(*block..=*block), true);
                pool.next = block + 1;
            }
            self.pending.insert(node.to_owned(), free);
        }
        let blocks = self.pending.get(node)?;
        Some(self.pools.iter().zip(blocks).map(|(pool, block)| pool.cidr(*block)).collect())
    }
}

impl Pool {
    fn new(text: &str) -> Result<Pool, String> {
        let range = Cidr::parse(text)?;
        let prefix = if range.bits == 32 { PREFIX_V4 } else { PREFIX_V6 };
        if range.prefix > prefix {
            return Err(format!("the cluster's range {text} is smaller than the /{prefix} of one node"));
        }
        Ok(Pool { range, prefix, taken: BTreeMap::new(), next: 0 })
    }

    /// How many blocks there are.
    fn size(&self) -> u128 {
        (1_u128 << (self.prefix - self.range.prefix).min(127)).min(BLOCKS_MAX)
    }

    fn free(&self) -> Option<u128> {
        let size = self.size();
        let next = self.next.min(size);
        (next..size).chain(0..next).find(|block| !self.taken.contains_key(block))
    }

    /// The blocks a range touches.
    fn blocks_of(&self, cidr: Cidr) -> Option<RangeInclusive<u128>> {
        if cidr.bits != self.range.bits {
            return None;
        }
        let (first, last) = (cidr.base.max(self.range.base), cidr.last().min(self.range.last()));
        let shift = u32::from(self.range.bits - self.prefix);
        let number = |address: u128| (address - self.range.base) >> shift;
        (first <= last).then(|| number(first)..=number(last).min(self.size() - 1))
    }

    fn count(&mut self, blocks: Option<RangeInclusive<u128>>, up: bool) {
        for block in blocks.into_iter().flatten() {
            let holders = self.taken.entry(block).or_insert(0);
            *holders = if up { *holders + 1 } else { holders.saturating_sub(1) };
            if *holders == 0 {
                self.taken.remove(&block);
            }
        }
    }

    fn cidr(&self, block: u128) -> String {
        let base = self.range.base + (block << u32::from(self.range.bits - self.prefix));
        let base = match self.range.bits {
            32 => IpAddr::V4(Ipv4Addr::from_bits(base as u32)),
            _ => IpAddr::V6(Ipv6Addr::from_bits(base)),
        };
        format!("{base}/{}", self.prefix)
    }
}

/// A range of addresses of one family.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Cidr {
    base: u128,
    prefix: u8,
    /// 32 or 128.
    bits: u8,
}

impl Cidr {
    fn parse(text: &str) -> Result<Cidr, String> {
        let wrong = || format!("{text:?} is not a range of addresses, which looks like 10.42.0.0/16");
        let (base, prefix) = text.trim().split_once('/').ok_or_else(wrong)?;
        let (base, bits) = match base.parse().map_err(|_| wrong())? {
            IpAddr::V4(v4) => (u128::from(v4.to_bits()), 32),
            IpAddr::V6(v6) => (v6.to_bits(), 128),
        };
        let prefix = prefix.parse().ok().filter(|prefix| *prefix <= bits).ok_or_else(wrong)?;
        let cidr = Cidr { base, prefix, bits };
        Ok(Cidr { base: base & !cidr.hosts(), ..cidr })
    }

    /// The bits that differ within the range.
    fn hosts(&self) -> u128 {
        1_u128.checked_shl(u32::from(self.bits - self.prefix)).map_or(u128::MAX, |size| size - 1)
    }

    fn last(&self) -> u128 {
        self.base | self.hosts()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Config;
    use crate::harness::Harness;
    use k8s_openapi::api::core::v1::Event;
    use knarr_client::testing::Faults;
    use kube::api::DeleteParams;
    use std::collections::BTreeSet;

    fn harness(cluster: &[&str], faults: Faults) -> Harness {
        let ranges = NodeRanges {
            cluster: cluster.iter().map(|text| (*text).to_owned()).collect(),
            reserved: vec!["10.0.1.0/24".into()],
            elsewhere: Some("other".into()),
        };
        Harness::with_config(7, faults, Config { node_ranges: ranges, ..Default::default() })
    }

    fn given(nodes: &[Node], name: &str) -> Vec<String> {
        let node = nodes.iter().find(|node| node.metadata.name.as_deref() == Some(name));
        node.map(|node| cidrs(node).to_vec()).unwrap_or_default()
    }

    async fn node(harness: &Harness, name: &str) {
        harness.create_global::<Node>(json!({"metadata": {"name": name}})).await;
    }

    #[test]
    fn blocks_are_cut_by_family_and_given_back_ones_come_last() {
        let cluster = vec!["10.0.0.0/22".to_owned(), "fd00::/62".to_owned()];
        let mut books = Books::new(&NodeRanges { cluster, ..Default::default() }).unwrap();
        books.hold("brings", &["10.0.1.0/25".to_owned(), "fd00:0:0:1::/64".to_owned()]);
        let mut take = |name| books.take(name);
        let both = |v4: &str, v6: &str| Some(vec![v4.to_owned(), v6.to_owned()]);
        assert_eq!(take("a"), both("10.0.0.0/24", "fd00::/64"));
        assert_eq!(take("a"), both("10.0.0.0/24", "fd00::/64"), "the same again");
        assert_eq!(take("b"), both("10.0.2.0/24", "fd00:0:0:2::/64"));
        books.hold("a", &["10.0.0.0/24".to_owned(), "fd00::/64".to_owned()]);
        books.release("a");
        assert_eq!(books.take("c"), both("10.0.3.0/24", "fd00:0:0:3::/64"));
        assert_eq!(books.take("d"), both("10.0.0.0/24", "fd00::/64"));
        assert_eq!(books.take("e"), None);
        assert!(
            Books::new(&NodeRanges { cluster: vec!["10.0.0.0/25".into()], ..Default::default() }).is_err()
        );
    }

    #[tokio::test(start_paused = true)]
    async fn every_node_gets_a_range_of_its_own_once() {
        let harness =
            harness(&["10.0.0.0/16"], Faults { conflict: 0.2, error: 0.2, drop_watch: 0.2, duplicate: 0.2 });
        harness.start(start);
        let own = json!({"metadata": {"name": "own"}, "spec": {"podCIDR": "10.0.0.0/24", "podCIDRs": ["10.0.0.0/24"]}});
        harness.create_global::<Node>(own).await;
        harness
            .create_global::<Node>(json!({"metadata": {"name": "other", "labels": {"other": "true"}}}))
            .await;
        for n in 0..20 {
            node(&harness, &format!("n{n}")).await;
        }
        let all = |nodes: &[Node]| (0..20).all(|n| !given(nodes, &format!("n{n}")).is_empty());
        let nodes = harness.api.wait_for::<Node>("ranges for all", all).await;
        let distinct: BTreeSet<_> = nodes.iter().flat_map(|node| cidrs(node).to_vec()).collect();
        assert_eq!(distinct.len(), 21);
        assert!(!distinct.contains("10.0.1.0/24"), "reserved");
        assert!(given(&nodes, "other").is_empty(), "somebody else's");
        harness.api.set_faults(Faults::default());
        harness.assert_quiet().await;
    }

    #[tokio::test(start_paused = true)]
    async fn who_finds_none_left_is_told_and_gets_what_comes_free() {
        let harness = harness(&["10.0.0.0/23"], Faults::default());
        harness.start(start);
        node(&harness, "first").await;
        harness.api.wait_for::<Node>("its range", |nodes| given(nodes, "first") == ["10.0.0.0/24"]).await;
        node(&harness, "second").await;
        let told = |events: &[Event]| {
            events.iter().any(|event| {
                event.reason.as_deref() == Some("CIDRNotAvailable")
                    && event.message.as_deref() == Some("Node second status is now: CIDRNotAvailable")
            })
        };
        harness.api.wait_for::<Event>("why it has none", told).await;
        let api: Api<Node> = Api::all(harness.client());
        api.delete("first", &DeleteParams::default()).await.unwrap();
        let began = tokio::time::Instant::now();
        harness.api.wait_for::<Node>("the range", |nodes| given(nodes, "second") == ["10.0.0.0/24"]).await;
        assert!(began.elapsed().as_secs() < 1, "at once, not after the back-off");
    }
}
