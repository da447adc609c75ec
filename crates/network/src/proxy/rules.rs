//! From chosen endpoints to firewall entries, and from entries to `nft` scripts.
//!
//! The layout is flat. Two maps carry all Services: `frontends` (address, protocol, port → how to balance)
//! and `endpoints` (address, protocol, port, slot → endpoint). Balancing needs one chain for each *number*
//! of endpoints, not for each Service: chain `lb4_3` draws a slot out of three and looks it up. So a packet
//! costs two hash lookups however many Services there are, and a change touches only its own entries.
//!
//! Node ports are frontends with the unspecified address. Maps ending in `_local` hold what sources outside
//! the cluster see under `externalTrafficPolicy: Local`.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::TABLE;
use super::model::{Chosen, Service, ServicePort};
use crate::ipam::Subnet;
use crate::nft;
use crate::pod::Protocol;

/// Endpoints of one Service port that get traffic; the slot shares the lower half of the mark with [`MASQUERADE`].
pub const ENDPOINTS_MAX: usize = 0x3fff;
/// The drawn slot travels in the packet mark, since `nft` cannot describe a map keyed by a random number in a
/// way it understands again later. The upper half keeps it from being taken for anybody else's mark; it is
/// cleared when the packet leaves.
const MARK: u32 = 0x4b4e_0000;
/// In the mark: to be masqueraded.
const MASQUERADE: u16 = 0x4000;
/// Remembered client/Service pairs per family, for session affinity.
const AFFINITY_ENTRIES_MAX: u32 = 65_536;
/// Elements in one `add element` line; keeps single lines (and error texts quoting them) bounded.
const ELEMENTS_PER_LINE: usize = 4096;

/// Where clients knock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Frontend {
    /// Unspecified for node ports.
    pub ip: IpAddr,
    pub protocol: Protocol,
    pub port: u16,
}

/// One thing in one of the table's maps or sets: where it goes, and what it says.
pub type Entries = BTreeMap<Key, Value>;

/// The place of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Key {
    Frontend { local: bool, at: Frontend },
    Endpoint { local: bool, affine: bool, at: Frontend, slot: u16 },
    /// Refused: the Service has no endpoints at all.
    Refused { at: Frontend },
    /// An endpoint on this node that may reach itself through a Service.
    Hairpin { ip: IpAddr },
}

/// The content of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    Balance(Chain),
    Drop,
    Endpoint(SocketAddr),
    Member,
}

/// One way of balancing; all Services that balance alike share its chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Chain {
    six: bool,
    /// For node ports: the packet's address is not part of the lookup.
    node_port: bool,
    local: bool,
    masquerade: bool,
    affinity_seconds: Option<u32>,
    endpoints: u16,
}

/// Everything the firewall should hold for one port of one Service.
///
/// `choose` gives the endpoints for IPv4 (`false`) and IPv6; `old` is what the firewall holds, so that
/// endpoints keep their slots.
pub fn render(
    service: &Service,
    port: &ServicePort,
    choose: impl Fn(bool) -> Chosen,
    old: &Entries,
    entries: &mut Entries,
) {
    let four = choose(false);
    let six = choose(true);
    let chosen = |ip: &IpAddr| if ip.is_ipv6() { &six } else { &four };
    let at = |ip: IpAddr, port_number| Frontend { ip, protocol: port.protocol, port: port_number };
    for ip in &service.cluster_ips {
        Face::internal(service).show(at(*ip, port.port), chosen(ip), old, entries);
    }
    let external = Face::external(service);
    for ip in &service.external_ips {
        external.show(at(*ip, port.port), chosen(ip), old, entries);
    }
    if let Some(node_port) = port.node_port {
        let four_too = service.cluster_ips.iter().any(IpAddr::is_ipv4);
        let six_too = service.cluster_ips.iter().any(IpAddr::is_ipv6);
        if four_too {
            external.show(at(Ipv4Addr::UNSPECIFIED.into(), node_port), &four, old, entries);
        }
        if six_too {
            external.show(at(Ipv6Addr::UNSPECIFIED.into(), node_port), &six, old, entries);
        }
    }
    for endpoint in four.local.iter().chain(&six.local) {
        entries.insert(Key::Hairpin { ip: endpoint.ip() }, Value::Member);
    }
}

/// How a Service looks from one side.
struct Face {
    affinity_seconds: Option<u32>,
    masquerade: bool,
    /// Only this node's endpoints, for everybody.
    only_local: bool,
    /// Only this node's endpoints, for sources outside the cluster.
    outside_local: bool,
}

impl Face {
    fn internal(service: &Service) -> Face {
        Face {
            affinity_seconds: service.affinity_seconds,
            masquerade: false,
            only_local: service.internal_local,
            outside_local: false,
        }
    }

    fn external(service: &Service) -> Face {
        Face {
            affinity_seconds: service.affinity_seconds,
            // The reply must come back through this node, whichever node the endpoint is on.
            masquerade: true,
            only_local: false,
            outside_local: service.external_local,
        }
    }

    fn show(&self, at: Frontend, chosen: &Chosen, old: &Entries, entries: &mut Entries) {
        if chosen.cluster.is_empty() && chosen.local.is_empty() {
            entries.insert(Key::Refused { at }, Value::Member);
            return;
        }
        let inside = if self.only_local { &chosen.local } else { &chosen.cluster };
        self.balance(at, (false, self.masquerade), inside, old, entries);
        if self.outside_local {
            self.balance(at, (true, false), &chosen.local, old, entries);
        }
    }

    fn balance(
        &self,
        at: Frontend,
        (local, masquerade): (bool, bool),
        to: &[SocketAddr],
        old: &Entries,
        entries: &mut Entries,
    ) {
        let to = &to[..to.len().min(ENDPOINTS_MAX)];
        if to.is_empty() {
            entries.insert(Key::Frontend { local, at }, Value::Drop);
            return;
        }
        let chain = Chain {
            six: at.ip.is_ipv6(),
            node_port: at.ip.is_unspecified(),
            local,
            masquerade,
            affinity_seconds: self.affinity_seconds,
            endpoints: to.len() as u16,
        };
        entries.insert(Key::Frontend { local, at }, Value::Balance(chain));
        let affine = self.affinity_seconds.is_some();
        let key = |slot| Key::Endpoint { local, affine, at, slot };
        let first = chain.first_slot();
        for (slot, endpoint) in (first..).zip(arrange(to, |slot| old.get(&key(first + slot)))) {
            entries.insert(key(slot), Value::Endpoint(endpoint));
        }
    }
}

/// Gives endpoints their slots: whoever has one below the new count keeps it, the others fill the holes.
/// So one endpoint's going moves at most one other, however many there are.
fn arrange<'a>(to: &[SocketAddr], holder: impl Fn(u16) -> Option<&'a Value>) -> Vec<SocketAddr> {
    let mut homeless: BTreeSet<SocketAddr> = to.iter().copied().collect();
    let keep = |slot| match holder(slot) {
        Some(Value::Endpoint(address)) if homeless.remove(address) => Some(*address),
        _ => None,
    };
    let kept: Vec<Option<SocketAddr>> = (0..to.len() as u16).map(keep).collect();
    kept.into_iter().filter_map(|slot| slot.or_else(|| homeless.pop_first())).collect()
}

/// A change of the table, to be applied at once.
#[derive(Debug, Default)]
pub struct Transaction {
    chains: BTreeSet<Chain>,
    delete: Vec<Key>,
    add: Vec<(Key, Value)>,
}

impl Transaction {
    /// Adds what leads from the old entries of a Service to its new ones.
    pub fn change(&mut self, old: &Entries, new: &Entries) {
        for (key, value) in old {
            if new.get(key) != Some(value) {
                self.delete.push(*key);
            }
        }
        for (key, value) in new {
            if old.get(key) != Some(value) {
                self.insert(*key, *value);
            }
        }
    }

    /// Deletes an entry.
    pub fn remove(&mut self, key: Key) {
        self.delete.push(key);
    }

    /// Adds an entry, and the chain it leads to.
    pub fn insert(&mut self, key: Key, value: Value) {
        if let Value::Balance(chain) = value {
            self.chains.insert(chain);
        }
        self.add.push((key, value));
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.delete.is_empty() && self.add.is_empty()
    }

    /// How many entries change.
    pub fn len(&self) -> usize {
        self.delete.len() + self.add.len()
    }

    /// The frontends whose endpoints change, for the connection and affinity tables.
    pub fn touched(&self) -> impl Iterator<Item = &Key> {
        self.delete.iter().chain(self.add.iter().map(|(key, _)| key))
    }

    /// The slots of session affinity whose endpoint goes or changes.
    pub fn deleted_affine(&self) -> impl Iterator<Item = (Frontend, u32)> {
        self.delete.iter().filter_map(|key| match key {
            Key::Endpoint { affine: true, at, slot, .. } => Some((*at, MARK | u32::from(*slot))),
            _ => None,
        })
    }

    /// The script. `known` are the chains that exist; those made here are added to it.
    pub fn script(&self, known: &mut BTreeSet<Chain>) -> String {
        // About 60 bytes an entry; growing a string of megabytes step by step would copy it many times.
        let mut script = String::with_capacity(80 * self.len() + 512);
        for chain in &self.chains {
            if known.insert(*chain) {
                write_chain(&mut script, chain);
            }
        }
        let mut lists: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for key in &self.delete {
            lists.entry(key.place()).or_default().push(key.to_string());
        }
        write_elements(&mut script, "delete", &lists);
        lists.clear();
        for (key, value) in &self.add {
            lists.entry(key.place()).or_default().push(format!("{key}{value}"));
        }
        write_elements(&mut script, "add", &lists);
        script
    }
}

fn write_elements(script: &mut String, verb: &str, lists: &BTreeMap<String, Vec<String>>) {
    for (place, elements) in lists {
        for some in elements.chunks(ELEMENTS_PER_LINE) {
            _ = writeln!(script, "{verb} element inet {TABLE} {place} {{ {} }}", some.join(", "));
        }
    }
}

impl Key {
    /// The frontend the entry belongs to.
    pub fn at(&self) -> Option<Frontend> {
        match self {
            Key::Frontend { at, .. } | Key::Endpoint { at, .. } | Key::Refused { at } => Some(*at),
            Key::Hairpin { .. } => None,
        }
    }

    /// The map or set the entry is in.
    fn place(&self) -> String {
        let suffix = |local: bool| if local { "_local" } else { "" };
        match self {
            Key::Frontend { local, at } => format!("frontends{}{}", at.version(), suffix(*local)),
            Key::Endpoint { local, at, .. } => format!("endpoints{}{}", at.version(), suffix(*local)),
            Key::Refused { at } => format!("refused{}", at.version()),
            Key::Hairpin { ip } => format!("hairpin{}", if ip.is_ipv4() { 4 } else { 6 }),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Key::Frontend { at, .. } | Key::Refused { at } => write!(f, "{at}"),
            Key::Endpoint { at, slot, .. } => write!(f, "{at} . {}", MARK | u32::from(*slot)),
            Key::Hairpin { ip } => write!(f, "{ip} . {ip}"),
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Balance(chain) => write!(f, " : goto {chain}"),
            Value::Drop => f.write_str(" : drop"),
            Value::Endpoint(to) => write!(f, " : {} . {}", to.ip(), to.port()),
            Value::Member => Ok(()),
        }
    }
}

impl Frontend {
    fn version(&self) -> u8 {
        if self.ip.is_ipv4() { 4 } else { 6 }
    }
}

impl fmt::Display for Frontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} . {} . {}", self.ip, self.protocol.as_nft(), self.port)
    }
}

impl Chain {
    /// Slots carry the masquerade bit.
    fn first_slot(&self) -> u16 {
        if self.masquerade { MASQUERADE } else { 0 }
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.node_port { "np" } else { "lb" };
        write!(f, "{kind}{}_{}", if self.six { 6 } else { 4 }, self.endpoints)?;
        if self.local {
            f.write_str("_local")?;
        }
        if self.masquerade {
            f.write_str("_masq")?;
        }
        match self.affinity_seconds {
            Some(seconds) => write!(f, "_sticky{seconds}"),
            None => Ok(()),
        }
    }
}

fn write_chain(script: &mut String, chain: &Chain) {
    let version = if chain.six { 6 } else { 4 };
    let (ip, any) = if chain.six { ("ip6", "::") } else { ("ip", "0.0.0.0") };
    let address = if chain.node_port { format!("{ip} daddr & {any}") } else { format!("{ip} daddr") };
    let at = format!("{address} . meta l4proto . th dport");
    let local = if chain.local { "_local" } else { "" };
    let first = MARK | u32::from(chain.first_slot());
    let draw = format!("numgen random mod {} offset {first}", chain.endpoints);
    let lookup = format!("dnat {ip} to {at} . meta mark map @endpoints{version}{local}");
    let mut rules: Vec<String> = Vec::new();
    // Remember a slot for the client unless one is remembered; use the remembered one; should its endpoint be
    // gone before the memory is corrected, draw afresh.
    if let Some(seconds) = chain.affinity_seconds {
        let who = format!("{at} . {ip} saddr");
        rules.push(format!("update @affinity{version} {{ {who} timeout {seconds}s : {draw} }}"));
        rules.push(format!("meta mark set {who} map @affinity{version}"));
        rules.push(lookup.clone());
    }
    rules.push(format!("meta mark set {draw}"));
    rules.push(lookup);
    _ = writeln!(script, "add chain inet {TABLE} {chain}");
    for rule in rules {
        _ = writeln!(script, "add rule inet {TABLE} {chain} {rule}");
    }
}

/// The keys, ready for `delete element`, of the remembered clients in a JSON listing of an affinity map that
/// are bound to one of the slots.
pub fn clients_of(listing: &serde_json::Value, slots: &HashSet<(Frontend, u32)>) -> Vec<String> {
    let maps = listing["nftables"].as_array().into_iter().flatten();
    let elements = maps.flat_map(|entry| entry["map"]["elem"].as_array().into_iter().flatten());
    elements.filter_map(|element| bound_client(element, slots)).collect()
}

fn bound_client(element: &serde_json::Value, slots: &HashSet<(Frontend, u32)>) -> Option<String> {
    // Elements with a timeout are wrapped: `[{"elem": {"val": {"concat": [...]}, "expires": 1}}, slot]`.
    let key = if element[0]["elem"].is_null() { &element[0] } else { &element[0]["elem"]["val"] };
    let [ip, protocol, port, client] = key["concat"].as_array()?.as_slice() else { return None };
    let protocol = match protocol.as_str()? {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "sctp" => Protocol::Sctp,
        _ => return None,
    };
    let at = Frontend {
        ip: ip.as_str()?.parse().ok()?,
        protocol,
        port: u16::try_from(port.as_u64()?).ok()?,
    };
    let slot = u32::try_from(element[1].as_u64()?).ok()?;
    slots.contains(&(at, slot)).then(|| Some(format!("{at} . {}", client.as_str()?)))?
}

/// The table without entries, replacing whatever was there.
pub fn base_script(cluster_cidrs: &[Subnet], service_cidrs: &[Subnet]) -> String {
    let mut script = nft::remove_table(TABLE);
    _ = writeln!(script, "table inet {TABLE} {{");
    for (version, six) in [(4, false), (6, true)] {
        write_maps(&mut script, version, six, cluster_cidrs, service_cidrs);
    }
    script.push_str(CHAINS);
    for (version, ip, any) in [(4, "ip", "0.0.0.0"), (6, "ip6", "::")] {
        write_lookups(&mut script, version, ip, any);
    }
    script.push_str("}\n");
    script
}

fn write_maps(script: &mut String, version: u8, six: bool, cluster: &[Subnet], services: &[Subnet]) {
    let ip = format!("ipv{version}_addr");
    let ranges = |list: &[Subnet]| {
        let list: Vec<String> = list.iter().filter(|s| s.is_ipv6() == six).map(Subnet::to_string).collect();
        if list.is_empty() { String::new() } else { format!("elements = {{ {} }}; ", list.join(", ")) }
    };
    _ = writeln!(script, "set pods{version} {{ type {ip}; flags interval; auto-merge; {}}}", ranges(cluster));
    _ = writeln!(script, "set services{version} {{ type {ip}; flags interval; auto-merge; {}}}", ranges(services));
    _ = writeln!(script, "set refused{version} {{ type {ip} . inet_proto . inet_service; }}");
    _ = writeln!(script, "set hairpin{version} {{ type {ip} . {ip}; }}");
    for local in ["", "_local"] {
        _ = writeln!(
            script,
            "map frontends{version}{local} {{ type {ip} . inet_proto . inet_service : verdict; }}
map endpoints{version}{local} {{ type {ip} . inet_proto . inet_service . mark : {ip} . inet_service; }}"
        );
    }
    _ = writeln!(
        script,
        "map affinity{version} {{ type {ip} . inet_proto . inet_service . {ip} : mark; \
         flags dynamic,timeout; size {AFFINITY_ENTRIES_MAX}; timeout 3h; }}"
    );
}

/// Hooks. Services are looked up once per connection (the nat hooks see its first packet only).
const CHAINS: &str = r#"
chain frontends4 { }
chain frontends6 { }
# A reset ends the caller's attempt at once. An ICMP error may meet a locked socket, or the kernel's limit of
# one a second for each peer, and then the caller waits.
chain refuse {
  meta l4proto tcp reject with tcp reset
  reject
}
chain refusals4 { }
chain refusals6 { }
chain prerouting { type nat hook prerouting priority dstnat; meta nfproto vmap { ipv4 : jump frontends4, ipv6 : jump frontends6 }; }
chain output { type nat hook output priority -100; meta nfproto vmap { ipv4 : jump frontends4, ipv6 : jump frontends6 }; }
chain postrouting {
  type nat hook postrouting priority srcnat;
  ct status dnat ip saddr . ip daddr @hairpin4 masquerade
  ct status dnat ip6 saddr . ip6 daddr @hairpin6 masquerade
  ct status dnat ct original ip daddr @services4 ct original ip saddr != @pods4 masquerade fully-random
  ct status dnat ct original ip6 daddr @services6 ct original ip6 saddr != @pods6 masquerade fully-random
  meta mark & 0xffff0000 != 0x4b4e0000 return
  meta mark & 0x4000 == 0 meta mark set 0 return
  meta mark set 0 masquerade fully-random
}
chain filter_input { type filter hook input priority filter; ct state new meta nfproto vmap { ipv4 : goto refusals4, ipv6 : goto refusals6 }; }
chain filter_forward { type filter hook forward priority filter; ct state new meta nfproto vmap { ipv4 : goto refusals4, ipv6 : goto refusals6 }; }
chain filter_output { type filter hook output priority filter; ct state new meta nfproto vmap { ipv4 : goto refusals4, ipv6 : goto refusals6 }; }
"#;

fn write_lookups(script: &mut String, version: u8, ip: &str, any: &str) {
    let at = format!("{ip} daddr . meta l4proto . th dport");
    let node_port = format!("{ip} daddr & {any} . meta l4proto . th dport");
    let outside = format!("{ip} saddr != @pods{version} fib saddr type != local");
    _ = write!(
        script,
        "chain frontends{version} {{
  {outside} {at} vmap @frontends{version}_local
  {at} vmap @frontends{version}
  fib daddr type != local return
  {outside} {node_port} vmap @frontends{version}_local
  {node_port} vmap @frontends{version}
}}
chain refusals{version} {{
  {at} @refused{version} goto refuse
  {ip} daddr @services{version} goto refuse
  fib daddr type local {node_port} @refused{version} goto refuse
}}
"
    );
}
