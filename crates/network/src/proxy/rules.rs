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
use crate::nft::{Change, Data, Element};
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
    Frontend {
        local: bool,
        at: Frontend,
    },
    Endpoint {
        local: bool,
        affine: bool,
        at: Frontend,
        slot: u16,
    },
    /// Refused: the Service has no endpoints at all.
    Refused {
        at: Frontend,
    },
    /// An endpoint on this node that may reach itself through a Service.
    Hairpin {
        ip: IpAddr,
    },
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

    /// The script that makes the chains the transaction needs. `known` are those that exist; those made here
    /// are added to it. To be applied before [`Transaction::changes`].
    pub fn script(&self, known: &mut BTreeSet<Chain>) -> String {
        let mut script = String::new();
        for chain in &self.chains {
            if known.insert(*chain) {
                write_chain(&mut script, chain);
            }
        }
        script
    }

    /// The elements, deletions first, grouped by where they are.
    pub fn changes(&self) -> Vec<Change> {
        let mut delete = self.delete.clone();
        delete.sort_by_key(Key::place);
        let mut add: Vec<&(Key, Value)> = self.add.iter().collect();
        add.sort_by_key(|(key, _)| key.place());
        let deletions = delete.iter().map(|key| Change::Delete { set: key.place(), key: key.bytes() });
        let additions = add.iter().map(|(key, value)| Change::Add {
            set: key.place(),
            element: Element { key: key.bytes(), data: value.data() },
        });
        deletions.chain(additions).collect()
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
    pub fn place(&self) -> &'static str {
        match self {
            Key::Frontend { local, at } => match (at.ip.is_ipv6(), local) {
                (false, false) => "frontends4",
                (false, true) => "frontends4_local",
                (true, false) => "frontends6",
                (true, true) => "frontends6_local",
            },
            Key::Endpoint { local, at, .. } => match (at.ip.is_ipv6(), local) {
                (false, false) => "endpoints4",
                (false, true) => "endpoints4_local",
                (true, false) => "endpoints6",
                (true, true) => "endpoints6_local",
            },
            Key::Refused { at } => {
                if at.ip.is_ipv6() {
                    "refused6"
                } else {
                    "refused4"
                }
            }
            Key::Hairpin { ip } => {
                if ip.is_ipv6() {
                    "hairpin6"
                } else {
                    "hairpin4"
                }
            }
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(28);
        match self {
            Key::Frontend { at, .. } | Key::Refused { at } => at.write(&mut bytes),
            Key::Endpoint { at, slot, .. } => {
                at.write(&mut bytes);
                bytes.extend((MARK | u32::from(*slot)).to_ne_bytes());
            }
            Key::Hairpin { ip } => {
                write_ip(&mut bytes, *ip);
                write_ip(&mut bytes, *ip);
            }
        }
        bytes
    }
}

/// Everything [`Key::place`] answers.
pub const PLACES: [&str; 12] = [
    "frontends4",
    "frontends4_local",
    "frontends6",
    "frontends6_local",
    "endpoints4",
    "endpoints4_local",
    "endpoints6",
    "endpoints6_local",
    "refused4",
    "refused6",
    "hairpin4",
    "hairpin6",
];

impl Value {
    fn data(&self) -> Data {
        match self {
            Value::Balance(chain) => Data::Goto(chain.to_string()),
            Value::Drop => Data::Drop,
            Value::Endpoint(to) => {
                let mut bytes = Vec::with_capacity(20);
                write_ip(&mut bytes, to.ip());
                write_port(&mut bytes, to.port());
                Data::Value(bytes)
            }
            Value::Member => Data::None,
        }
    }
}

fn write_ip(bytes: &mut Vec<u8>, ip: IpAddr) {
    match ip {
        IpAddr::V4(ip) => bytes.extend(ip.octets()),
        IpAddr::V6(ip) => bytes.extend(ip.octets()),
    }
}

fn write_port(bytes: &mut Vec<u8>, port: u16) {
    bytes.extend(port.to_be_bytes());
    bytes.extend([0; 2]);
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
    fn write(&self, bytes: &mut Vec<u8>) {
        write_ip(bytes, self.ip);
        bytes.extend([self.protocol.number(), 0, 0, 0]);
        write_port(bytes, self.port);
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
    let at = Frontend { ip: ip.as_str()?.parse().ok()?, protocol, port: u16::try_from(port.as_u64()?).ok()? };
    let slot = u32::try_from(element[1].as_u64()?).ok()?;
    slots.contains(&(at, slot)).then(|| Some(format!("{at} . {}", client.as_str()?)))?
}

/// The table with its fixed rules, whatever was there before. Entries of an earlier run stay until they are
/// replaced, so that Services work on through a restart; the chains they lead to have to be made again in the
/// same transaction. Fails if the table was made with other definitions; then `nft::remove_table` first.
pub fn base_script(cluster_cidrs: &[Subnet], service_cidrs: &[Subnet]) -> String {
    let mut script = format!("table inet {TABLE} {{\n");
    for (version, _) in FAMILIES {
        write_maps(&mut script, version);
    }
    script.push_str(CHAINS);
    _ = writeln!(script, "}}\nflush table inet {TABLE}");
    for (version, six) in FAMILIES {
        write_ranges(&mut script, &format!("pods{version}"), six, cluster_cidrs);
        write_ranges(&mut script, &format!("services{version}"), six, service_cidrs);
    }
    _ = writeln!(script, "table inet {TABLE} {{{RULES}");
    for (version, ip, any) in [(4, "ip", "0.0.0.0"), (6, "ip6", "::")] {
        write_lookups(&mut script, version, ip, any);
    }
    script.push_str("}\n");
    script
}

const FAMILIES: [(u8, bool); 2] = [(4, false), (6, true)];

fn write_ranges(script: &mut String, set: &str, six: bool, ranges: &[Subnet]) {
    _ = writeln!(script, "flush set inet {TABLE} {set}");
    let ranges: Vec<String> = ranges.iter().filter(|s| s.is_ipv6() == six).map(Subnet::to_string).collect();
    if !ranges.is_empty() {
        _ = writeln!(script, "add element inet {TABLE} {set} {{ {} }}", ranges.join(", "));
    }
}

fn write_maps(script: &mut String, version: u8) {
    let ip = format!("ipv{version}_addr");
    _ = writeln!(script, "set pods{version} {{ type {ip}; flags interval; auto-merge; }}");
    _ = writeln!(script, "set services{version} {{ type {ip}; flags interval; auto-merge; }}");
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

/// Hooks, still without rules. Services are looked up once per connection (the nat hooks see its first packet
/// only).
const CHAINS: &str = r#"
chain refuse { }
chain frontends4 { }
chain frontends6 { }
chain refusals4 { }
chain refusals6 { }
chain prerouting { type nat hook prerouting priority dstnat; }
chain output { type nat hook output priority -100; }
chain postrouting { type nat hook postrouting priority srcnat; }
chain filter_input { type filter hook input priority filter; }
chain filter_forward { type filter hook forward priority filter; }
chain filter_output { type filter hook output priority filter; }
"#;

/// A reset ends the caller's attempt at once. An ICMP error may meet a locked socket, or the kernel's limit of
/// one a second for each peer, and then the caller waits.
const RULES: &str = r#"
chain refuse {
  meta l4proto tcp reject with tcp reset
  reject
}
chain prerouting { meta nfproto vmap { ipv4 : jump frontends4, ipv6 : jump frontends6 }; }
chain output { meta nfproto vmap { ipv4 : jump frontends4, ipv6 : jump frontends6 }; }
chain postrouting {
  ct status dnat ip saddr . ip daddr @hairpin4 masquerade
  ct status dnat ip6 saddr . ip6 daddr @hairpin6 masquerade
  ct status dnat ct original ip daddr @services4 ct original ip saddr != @pods4 masquerade fully-random
  ct status dnat ct original ip6 daddr @services6 ct original ip6 saddr != @pods6 masquerade fully-random
  meta mark & 0xffff0000 != 0x4b4e0000 return
  meta mark & 0x4000 == 0 meta mark set 0 return
  meta mark set 0 masquerade fully-random
}
chain filter_input { ct state new meta nfproto vmap { ipv4 : goto refusals4, ipv6 : goto refusals6 }; }
chain filter_forward { ct state new meta nfproto vmap { ipv4 : goto refusals4, ipv6 : goto refusals6 }; }
chain filter_output { ct state new meta nfproto vmap { ipv4 : goto refusals4, ipv6 : goto refusals6 }; }
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

#[cfg(test)]
mod tests {
    use super::*;

    const PORT: ServicePort =
        ServicePort { name: String::new(), protocol: Protocol::Tcp, port: 80, node_port: Some(30080) };

    fn service(change: impl FnOnce(&mut Service)) -> Service {
        let mut service = Service { cluster_ips: vec!["10.96.0.1".parse().unwrap()], ..Default::default() };
        change(&mut service);
        service
    }

    fn endpoints(list: &[&str]) -> Vec<SocketAddr> {
        list.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn rendered(service: &Service, cluster: &[&str], local: &[&str], old: &Entries) -> Entries {
        let chosen = |six| match six {
            false => Chosen { cluster: endpoints(cluster), local: endpoints(local) },
            true => Chosen::default(),
        };
        let mut entries = Entries::new();
        render(service, &PORT, chosen, old, &mut entries);
        entries
    }

    fn lines(entries: &Entries) -> Vec<String> {
        let mut lines: Vec<String> =
            entries.iter().map(|(key, value)| format!("{} {key}{value}", key.place())).collect();
        lines.sort();
        lines
    }

    #[test]
    fn services_become_these_entries() {
        type Case<'a> = (&'a str, Service, &'a [&'a str], &'a [&'a str], &'a [&'a str]);
        let cases: &[Case] = &[
            (
                "plain",
                service(|_| {}),
                &["10.1.0.1:8080", "10.1.0.2:8080"],
                &["10.1.0.1:8080"],
                &[
                    "endpoints4 0.0.0.0 . tcp . 30080 . 1263419392 : 10.1.0.1 . 8080",
                    "endpoints4 0.0.0.0 . tcp . 30080 . 1263419393 : 10.1.0.2 . 8080",
                    "endpoints4 10.96.0.1 . tcp . 80 . 1263403008 : 10.1.0.1 . 8080",
                    "endpoints4 10.96.0.1 . tcp . 80 . 1263403009 : 10.1.0.2 . 8080",
                    "frontends4 0.0.0.0 . tcp . 30080 : goto np4_2_masq",
                    "frontends4 10.96.0.1 . tcp . 80 : goto lb4_2",
                    "hairpin4 10.1.0.1 . 10.1.0.1",
                ],
            ),
            (
                "nobody there",
                service(|_| {}),
                &[],
                &[],
                &["refused4 0.0.0.0 . tcp . 30080", "refused4 10.96.0.1 . tcp . 80"],
            ),
            (
                "nobody here, both policies local",
                service(|s| (s.external_local, s.internal_local) = (true, true)),
                &["10.1.0.2:8080"],
                &[],
                &[
                    "endpoints4 0.0.0.0 . tcp . 30080 . 1263419392 : 10.1.0.2 . 8080",
                    "frontends4 0.0.0.0 . tcp . 30080 : goto np4_1_masq",
                    "frontends4 10.96.0.1 . tcp . 80 : drop",
                    "frontends4_local 0.0.0.0 . tcp . 30080 : drop",
                ],
            ),
            (
                "sticky",
                service(|s| s.affinity_seconds = Some(60)),
                &["10.1.0.2:8080"],
                &[],
                &[
                    "endpoints4 0.0.0.0 . tcp . 30080 . 1263419392 : 10.1.0.2 . 8080",
                    "endpoints4 10.96.0.1 . tcp . 80 . 1263403008 : 10.1.0.2 . 8080",
                    "frontends4 0.0.0.0 . tcp . 30080 : goto np4_1_masq_sticky60",
                    "frontends4 10.96.0.1 . tcp . 80 : goto lb4_1_sticky60",
                ],
            ),
        ];
        for (name, service, cluster, local, want) in cases {
            assert_eq!(lines(&rendered(service, cluster, local, &Entries::new())), *want, "{name}");
        }
    }

    #[test]
    fn one_endpoint_going_moves_at_most_one_other() {
        let service = service(|_| {});
        let before = ["10.1.0.1:1", "10.1.0.2:1", "10.1.0.3:1", "10.1.0.4:1"];
        let old = rendered(&service, &before, &[], &Entries::new());
        let new = rendered(&service, &before[1..], &[], &old);
        let mut transaction = Transaction::default();
        transaction.change(&old, &new);
        // For both frontends: the last endpoint into the hole, its slot away, the balancing chain changed.
        assert_eq!((transaction.delete.len(), transaction.add.len()), (6, 4));
    }

    #[test]
    fn elements_look_to_the_kernel_as_it_wants_them() {
        let at = Frontend { ip: "10.96.0.1".parse().unwrap(), protocol: Protocol::Udp, port: 53 };
        let key = Key::Endpoint { local: false, affine: false, at, slot: 1 };
        let mark = (MARK + 1).to_ne_bytes();
        assert_eq!(key.bytes(), [&[10, 96, 0, 1, 17, 0, 0, 0, 0, 53, 0, 0], &mark[..]].concat());
        let value = Value::Endpoint("10.1.0.2:8080".parse().unwrap());
        assert_eq!(value.data(), Data::Value(vec![10, 1, 0, 2, 0x1f, 0x90, 0, 0]));
    }

    #[test]
    fn remembered_clients_of_a_slot_are_found_in_a_listing() {
        let listing = serde_json::json!({ "nftables": [{ "map": { "elem": [
            [{ "elem": { "val": { "concat": ["10.96.0.1", "tcp", 80, "10.1.0.9"] }, "expires": 5 } }, 7],
            [{ "concat": ["10.96.0.1", "tcp", 80, "10.1.0.8"] }, 8],
            [{ "concat": ["nonsense"] }, 7],
        ] } }] });
        let at = Frontend { ip: "10.96.0.1".parse().unwrap(), protocol: Protocol::Tcp, port: 80 };
        assert_eq!(clients_of(&listing, &HashSet::from([(at, 7)])), ["10.96.0.1 . tcp . 80 . 10.1.0.9"]);
    }
}
