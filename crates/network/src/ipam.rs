//! Which pod holds which address: host-local address management for the node's pod ranges.
//!
//! State is one file, so the node process and the CNI plug-in (another process) see the same leases.
//! This module decides and records; it touches no device.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{NetworkError, Result};
use crate::pod::{HostPort, PodAddresses, PodRef};
use crate::state::StateFile;

/// Addresses tried in one range before giving up; bounds the walk through a large IPv6 range.
const CANDIDATES_MAX: u64 = 1 << 16;

/// The leases of this node's pod ranges.
pub struct Ipam {
    subnets: Vec<Subnet>,
    file: StateFile<Leases>,
}

/// An address range such as `10.244.0.0/24` or `fd00:10:244::/64`, host bits zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Subnet {
    base: IpAddr,
    prefix: u8,
}

/// One pod's hold on the node's network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    pub pod: PodRef,
    pub ips: Vec<IpAddr>,
    /// The host side of the pod's cable.
    pub device: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<HostPort>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Leases {
    /// By owner: the pod's uid, or the sandbox's id when spoken to as a CNI plug-in.
    held: BTreeMap<String, Lease>,
    /// The offset given out last in each range: an address rests as long as possible before it is reused,
    /// so that late packets and stale caches do not reach a stranger.
    last: BTreeMap<String, u64>,
}

impl Ipam {
    /// Leases of `subnets`, at most one range per family, kept in `dir`.
    pub fn new(dir: &Path, subnets: Vec<Subnet>) -> Ipam {
        Ipam { subnets, file: StateFile::new(dir, "leases.json") }
    }

    /// The owner's lease; made if there is none. An existing lease keeps its addresses and takes over `ports`.
    ///
    /// # Errors
    /// No free address, a host port another pod holds, or the state file.
    pub fn lease(&self, owner: &str, pod: &PodRef, ports: &[HostPort]) -> Result<Lease> {
        self.file.update(|leases| {
            check_ports(leases, owner, ports)?;
            if let Some(lease) = leases.held.get_mut(owner) {
                lease.ports = ports.to_vec();
                return Ok(lease.clone());
            }
            let ips = self.subnets.iter().map(|subnet| pick(leases, subnet)).collect::<Result<Vec<_>>>()?;
            let lease = Lease { pod: pod.clone(), ips, device: device_name(owner), ports: ports.to_vec() };
            leases.held.insert(owner.to_owned(), lease.clone());
            Ok(lease)
        })
    }

    /// The owner's lease, if it has one.
    pub fn find(&self, owner: &str) -> Result<Option<Lease>> {
        Ok(self.file.read()?.held.remove(owner))
    }

    /// Gives the addresses back. Call it last: an address must not be given to another pod before its
    /// device is gone.
    pub fn release(&self, owner: &str) -> Result<()> {
        self.file.update(|leases| {
            leases.held.remove(owner);
            Ok(())
        })
    }

    /// Every lease, by owner.
    pub fn all(&self) -> Result<BTreeMap<String, Lease>> {
        Ok(self.file.read()?.held)
    }
}

impl Lease {
    /// The lease as the kubelet wants to know it.
    pub fn addresses(&self) -> PodAddresses {
        PodAddresses { ips: self.ips.clone() }
    }
}

impl Subnet {
    /// The range of one address.
    pub fn host(ip: IpAddr) -> Subnet {
        Subnet { base: ip, prefix: if ip.is_ipv4() { 32 } else { 128 } }
    }

    /// The range's prefix length.
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// The range's first address.
    pub fn base(&self) -> IpAddr {
        self.base
    }

    /// Whether this is an IPv6 range.
    pub fn is_ipv6(&self) -> bool {
        self.base.is_ipv6()
    }

    /// The first usable address: the bridge's, and every pod's gateway.
    pub fn gateway(&self) -> IpAddr {
        self.nth(1)
    }

    /// Whether the address lies in the range.
    pub fn contains(&self, ip: IpAddr) -> bool {
        ip.is_ipv4() == self.base.is_ipv4() && mask(ip, self.prefix) == self.base
    }

    /// The address at an offset from the base.
    pub fn nth(&self, offset: u64) -> IpAddr {
        match self.base {
            IpAddr::V4(base) => IpAddr::V4(Ipv4Addr::from_bits(base.to_bits().wrapping_add(offset as u32))),
            IpAddr::V6(base) => {
                IpAddr::V6(Ipv6Addr::from_bits(base.to_bits().wrapping_add(u128::from(offset))))
            }
        }
    }

    /// How many offsets there are, network and broadcast address included, cut off at 2^32.
    fn size(&self) -> u64 {
        let width = if self.is_ipv6() { 128 } else { 32 };
        1u64 << (width - self.prefix).min(32)
    }

    /// Offsets a pod may get: not the network address, the gateway, or (IPv4) the broadcast address.
    fn pod_offsets(&self) -> std::ops::Range<u64> {
        2..self.size() - u64::from(!self.is_ipv6())
    }
}

impl FromStr for Subnet {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Subnet> {
        let bad = |reason| NetworkError::BadSubnet { value: text.to_owned(), reason };
        let (base, prefix) = text.split_once('/').ok_or(bad("expected address/prefix"))?;
        let base: IpAddr = base.parse().map_err(|_| bad("the address cannot be parsed"))?;
        let prefix: u8 = prefix.parse().map_err(|_| bad("the prefix is not a number"))?;
        if prefix > if base.is_ipv4() { 32 } else { 128 } {
            return Err(bad("the prefix is too long"));
        }
        Ok(Subnet { base: mask(base, prefix), prefix })
    }
}

impl TryFrom<String> for Subnet {
    type Error = NetworkError;

    fn try_from(text: String) -> Result<Subnet> {
        text.parse()
    }
}

impl From<Subnet> for String {
    fn from(subnet: Subnet) -> String {
        subnet.to_string()
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

fn mask(ip: IpAddr, prefix: u8) -> IpAddr {
    let prefix = u32::from(prefix);
    match ip {
        IpAddr::V4(ip) => {
            Ipv4Addr::from_bits(ip.to_bits() & u32::MAX.checked_shl(32 - prefix).unwrap_or(0)).into()
        }
        IpAddr::V6(ip) => {
            Ipv6Addr::from_bits(ip.to_bits() & u128::MAX.checked_shl(128 - prefix).unwrap_or(0)).into()
        }
    }
}

/// Takes the next free address after the last one given out.
fn pick(leases: &mut Leases, subnet: &Subnet) -> Result<IpAddr> {
    let held: BTreeSet<IpAddr> = leases.held.values().flat_map(|lease| lease.ips.iter().copied()).collect();
    let offsets = subnet.pod_offsets();
    let count = offsets.end.saturating_sub(offsets.start);
    let last = leases.last.get(&subnet.to_string()).copied().unwrap_or(offsets.start.wrapping_sub(1));
    let start = if offsets.contains(&(last + 1)) { last + 1 - offsets.start } else { 0 };
    let free = (0..count.min(CANDIDATES_MAX))
        .map(|step| offsets.start + (start + step) % count)
        .find(|offset| !held.contains(&subnet.nth(*offset)));
    let Some(offset) = free else {
        return Err(NetworkError::Exhausted { subnet: subnet.to_string(), held: held.len() });
    };
    leases.last.insert(subnet.to_string(), offset);
    Ok(subnet.nth(offset))
}

fn check_ports(leases: &Leases, owner: &str, ports: &[HostPort]) -> Result<()> {
    for (holder, lease) in &leases.held {
        for port in ports {
            if holder != owner && lease.ports.iter().any(|other| clashes(port, other)) {
                let holder = lease.pod.to_string();
                return Err(NetworkError::PortTaken {
                    port: port.host_port,
                    protocol: port.protocol,
                    holder,
                });
            }
        }
    }
    Ok(())
}

/// The scheduler's rule for host ports: same protocol and port, and the same address or one of them all.
fn clashes(a: &HostPort, b: &HostPort) -> bool {
    let everywhere = |port: &HostPort| port.host_ip.is_none_or(|ip| ip.is_unspecified());
    a.protocol == b.protocol
        && a.host_port == b.host_port
        && (everywhere(a) || everywhere(b) || a.host_ip == b.host_ip)
}

/// What every device name of [`device_name`] begins with; nothing else of ours does.
pub const DEVICE_PREFIX: &str = "knp";

/// A device name that follows from the owner, so that a crash between creating and recording loses nothing.
/// Linux allows 15 bytes; 11 hexadecimal digits leave a clash among a node's pods out of the question.
pub fn device_name(owner: &str) -> String {
    // FNV-1a: stable across versions and processes, which std's hasher does not promise.
    let hash = owner.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{DEVICE_PREFIX}{:011x}", hash >> 20)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::Protocol;

    fn ipam(dir: &Path, subnets: &[&str]) -> Ipam {
        Ipam::new(dir, subnets.iter().map(|text| text.parse().unwrap()).collect())
    }

    fn pod(name: &str) -> PodRef {
        PodRef::new("default", name, name)
    }

    fn port(host_port: u16, host_ip: Option<&str>) -> HostPort {
        let host_ip = host_ip.map(|ip| ip.parse().unwrap());
        HostPort { protocol: Protocol::Tcp, host_port, container_port: 80, host_ip }
    }

    #[test]
    fn ranges_parse_and_say_what_is_wrong() {
        let cases = [
            ("10.244.3.7/24", Ok("10.244.3.0/24")),
            ("fd00::12/64", Ok("fd00::/64")),
            ("0.0.0.0/0", Ok("0.0.0.0/0")),
            ("10.0.0.0", Err("expected address/prefix")),
            ("10.0.0.0/33", Err("prefix is too long")),
            ("x/8", Err("cannot be parsed")),
        ];
        for (text, want) in cases {
            match (text.parse::<Subnet>(), want) {
                (Ok(subnet), Ok(want)) => assert_eq!(subnet.to_string(), want),
                (Err(error), Err(want)) => assert!(error.to_string().contains(want), "{error}"),
                (got, want) => panic!("{text}: {got:?}, wanted {want:?}"),
            }
        }
    }

    #[test]
    fn a_lease_is_stable_and_addresses_rest_before_reuse() {
        let dir = tempfile::tempdir().unwrap();
        let ipam = ipam(dir.path(), &["10.1.0.0/29", "fd00::/64"]);
        let first = ipam.lease("a", &pod("a"), &[]).unwrap();
        assert_eq!(first.ips, ["10.1.0.2".parse::<IpAddr>().unwrap(), "fd00::2".parse().unwrap()]);
        assert_eq!(ipam.lease("a", &pod("a"), &[]).unwrap(), first);
        ipam.release("a").unwrap();
        assert_eq!(ipam.lease("b", &pod("b"), &[]).unwrap().ips[0], "10.1.0.3".parse::<IpAddr>().unwrap());
    }

    #[test]
    fn a_full_range_is_an_error_and_a_freed_address_is_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let ipam = ipam(dir.path(), &["10.1.0.0/30"]);
        ipam.lease("a", &pod("a"), &[]).unwrap();
        let error = ipam.lease("b", &pod("b"), &[]).unwrap_err().to_string();
        assert!(error.contains("no free pod address left in 10.1.0.0/30"), "{error}");
        ipam.release("a").unwrap();
        assert_eq!(ipam.lease("b", &pod("b"), &[]).unwrap().ips[0], "10.1.0.2".parse::<IpAddr>().unwrap());
    }

    #[test]
    fn host_ports_clash_as_the_scheduler_says() {
        let cases = [
            (None, None, true),
            (None, Some("127.0.0.1"), true),
            (Some("0.0.0.0"), Some("127.0.0.1"), true),
            (Some("10.0.0.1"), Some("127.0.0.1"), false),
        ];
        for (one, other, clash) in cases {
            let dir = tempfile::tempdir().unwrap();
            let ipam = ipam(dir.path(), &["10.1.0.0/24"]);
            ipam.lease("a", &pod("a"), &[port(80, one)]).unwrap();
            assert_eq!(ipam.lease("b", &pod("b"), &[port(80, other)]).is_err(), clash, "{one:?} {other:?}");
        }
    }

    #[test]
    fn many_processes_never_share_an_address() {
        let dir = tempfile::tempdir().unwrap();
        let ips: Vec<IpAddr> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|number| {
                    let ipam = ipam(dir.path(), &["10.1.0.0/24"]);
                    scope.spawn(move || {
                        let lease =
                            |i: u32| ipam.lease(&format!("{number}-{i}"), &pod("p"), &[]).unwrap().ips[0];
                        (0..10).map(lease).collect::<Vec<_>>()
                    })
                })
                .collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(ips.iter().collect::<BTreeSet<_>>().len(), 80);
    }
}
