//! The built-in pod network of one node: a cable to each pod, a route at its end, addresses from
//! [`crate::ipam`].
//!
//! Pods do not share a link. Each holds a single address (`/32`) and sends everything to the gateway, an
//! address on the device `knarr0` that leads nowhere; the node routes each pod's address to its cable. So
//! packets between pods pass the node's IP layer like all others: the Service proxy can undo its
//! translation on the way back, policies see everything, a pod can neither forge its source nor answer for
//! another. A shared bridge would need `br_netfilter` for the first, does something else with it switched on than
//! off (Docker switches it on, for the whole host), and makes the kernel send redirects that use up the
//! budget for "port unreachable". Hardware addresses are fixed and known, so nobody ever asks for one.
//!
//! The table `knarr_pods` masquerades what leaves the pod ranges and opens host ports. Services are
//! [`crate::proxy`]'s. Every change to the host goes through the [`Ledger`]; [`purge`] walks it backwards.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::error::{NetworkError, Result};
use crate::ipam::{DEVICE_PREFIX, Ipam, Lease, Subnet};
use crate::ledger::{Change, Ledger};
use crate::link::{Device, End, Links};
use crate::nft::{self, Firewall, NftProgram};
use crate::pod::{HostPort, PodAddresses, PodNetwork, PodRef};
use crate::watch::Watch;
use crate::{netns, sysctl};

/// The nftables table (family `inet`) of the pod network.
pub const TABLE: &str = "knarr_pods";
/// The pod's end of the cable.
pub const POD_DEVICE: &str = "eth0";
/// Used when the host has no default route to take the MTU from.
const MTU_FALLBACK: u32 = 1500;
/// Last choice among routes: anything the host already has for the same range wins.
const SERVICE_ROUTE_METRIC: u32 = 1_000_000;
/// The node's end of every cable: locally administered, the same for all, so that pods can know it.
const GATEWAY_HARDWARE: [u8; 6] = [0x0a, 0x58, 0, 0, 0, 1];

/// The network of one node. Cheap to share behind an `Arc`; idle it is one parked task.
pub struct RoutedNetwork {
    config: RoutedConfig,
    mtu: u32,
    links: Links,
    ipam: Ipam,
    firewall: Arc<dyn Firewall>,
}

/// What the built-in network is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RoutedConfig {
    /// The device that holds the gateway's addresses, at most 15 bytes: `knarr0`.
    pub device: String,
    /// Where leases and the ledger live. On a tmpfs, since they describe kernel state: `/run/knarr/network`.
    pub state_dir: PathBuf,
    /// This node's pod ranges (`node.spec.podCIDRs`), at most one per family, first the primary.
    pub pod_cidrs: Vec<Subnet>,
    /// The whole cluster's pod ranges: traffic to them keeps its source address.
    pub cluster_cidrs: Vec<Subnet>,
    /// The Service ranges. Routed to `device` as a last resort, so that a host without a default route
    /// reaches Services too.
    pub service_cidrs: Vec<Subnet>,
    /// `None`: that of the default route's device, or 1500.
    pub mtu: Option<u32>,
}

/// What was looked for after a purge, and what was still there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CleanReport {
    /// One line for each thing looked for.
    pub checked: Vec<String>,
    /// One line for each thing found; empty means clean.
    pub leftovers: Vec<String>,
}

impl RoutedNetwork {
    /// Makes the device, the settings and the table be as configured. Safe to call over and over: pods
    /// attached before stay attached.
    ///
    /// # Errors
    /// No root, a foreign device of the same name, no `nft`, an unwritable state directory.
    pub async fn start(config: RoutedConfig) -> Result<RoutedNetwork> {
        Self::start_with(config, Arc::new(NftProgram)).await
    }

    /// [`RoutedNetwork::start`] over another firewall.
    pub async fn start_with(config: RoutedConfig, firewall: Arc<dyn Firewall>) -> Result<RoutedNetwork> {
        let network = Self::open(config, firewall).await?;
        let ledger = Ledger::new(&network.config.state_dir);
        network.make_device(&ledger).await?;
        network.make_settings(&ledger)?;
        ledger.record(Change::Table { name: TABLE.into() })?;
        network.firewall.apply(&table_script(&network.config, &network.leases()?)).await?;
        Ok(network)
    }

    /// Restores the table whenever somebody else removes it (a firewall's reload, `nft flush ruleset`), until
    /// `shutdown`. Nothing is polled.
    ///
    /// # Errors
    /// The firewall cannot be watched. A failed repair is logged and tried again at the next removal.
    pub async fn keep(&self, shutdown: CancellationToken) -> Result<()> {
        let watch = Watch::new(TABLE)?;
        while let Some(deleted) = shutdown.run_until_cancelled(watch.deleted()).await {
            deleted?;
            if nft::has_rules(&*self.firewall, TABLE, "postrouting").await {
                continue;
            }
            tracing::warn!(table = TABLE, "firewall rules were removed by somebody else, restoring them");
            let repaired = match self.leases() {
                Ok(leases) => self.firewall.apply(&table_script(&self.config, &leases)).await,
                Err(error) => Err(error),
            };
            if let Err(error) = repaired {
                tracing::error!(%error, table = TABLE, "restoring firewall rules failed");
            }
            watch.drain();
        }
        Ok(())
    }

    /// Opens a network that [`RoutedNetwork::start`] made, without looking at the host: the CNI plug-in's way.
    pub async fn open(config: RoutedConfig, firewall: Arc<dyn Firewall>) -> Result<RoutedNetwork> {
        let links = Links::here()?;
        let mtu = match config.mtu {
            Some(mtu) => mtu,
            None => links.uplink_mtu().await?.unwrap_or(MTU_FALLBACK),
        };
        let ipam = Ipam::new(&config.state_dir, config.pod_cidrs.clone());
        Ok(RoutedNetwork { config, mtu, links, ipam, firewall })
    }

    /// The gateways of the pods, which are addresses of the node that every pod can
    /// reach: cluster DNS listens there.
    pub fn gateways(&self) -> Vec<IpAddr> {
        self.config.pod_cidrs.iter().map(Subnet::gateway).collect()
    }

    /// What this network was told.
    pub fn config(&self) -> &RoutedConfig {
        &self.config
    }

    /// Like [`PodNetwork::attach`] for any owner and device name, as CNI needs it.
    pub async fn attach_as(
        &self,
        owner: &str,
        pod: &PodRef,
        namespace: &Path,
        device: &str,
        ports: &[HostPort],
    ) -> Result<Lease> {
        let lease = self.ipam.lease(owner, pod, ports)?;
        if !self.is_wired(&lease, namespace, device).await? {
            self.links.delete(&lease.device).await?;
            self.wire(&lease, namespace, device).await?;
        }
        if !lease.ports.is_empty() {
            self.firewall.apply(&ports_script(&lease)).await?;
        }
        Ok(lease)
    }

    /// Like [`PodNetwork::detach`] for any owner.
    pub async fn detach_owner(&self, owner: &str) -> Result<()> {
        let Some(lease) = self.ipam.find(owner)? else { return Ok(()) };
        self.links.delete(&lease.device).await?;
        self.ipam.release(owner)?;
        if !lease.ports.is_empty() {
            self.firewall.apply(&all_ports_script(&self.leases()?)).await?;
        }
        Ok(())
    }

    /// Whether the pod is attached as recorded.
    ///
    /// # Errors
    /// [`NetworkError::NotAttached`] says what is missing.
    pub async fn check(&self, owner: &str, namespace: &Path, device: &str) -> Result<Lease> {
        let missing = |what| NetworkError::NotAttached { pod: owner.to_owned(), what, address: None };
        let lease = self.ipam.find(owner)?.ok_or(missing("no address is recorded"))?;
        if !self.is_wired(&lease, namespace, device).await? {
            return Err(missing("its device or address is gone"));
        }
        Ok(lease)
    }

    /// Detaches every owner not in `live`; answers whom it detached.
    pub async fn gc_owners(&self, live: &BTreeSet<String>) -> Result<Vec<String>> {
        let dead: Vec<String> = self.ipam.all()?.into_keys().filter(|owner| !live.contains(owner)).collect();
        for owner in &dead {
            self.detach_owner(owner).await?;
        }
        Ok(dead)
    }

    fn leases(&self) -> Result<Vec<Lease>> {
        Ok(self.ipam.all()?.into_values().collect())
    }

    async fn make_device(&self, ledger: &Ledger) -> Result<()> {
        let name = &self.config.device;
        match self.links.find(name).await? {
            Some(device) if device.kind != "bridge" => {
                return Err(NetworkError::ForeignDevice { name: name.clone(), kind: device.kind });
            }
            Some(_) => {}
            None => {
                ledger.record(Change::Device { name: name.clone() })?;
                self.links.add_anchor(name).await?;
            }
        }
        let device = self.links.expect(name).await?.index;
        self.links.up(device).await?;
        for gateway in self.gateways() {
            self.links.add_address(device, gateway, Subnet::host(gateway).prefix()).await?;
        }
        for range in &self.config.service_cidrs {
            // Never sent there: translated or refused before. But without a route the kernel would refuse
            // to send before the firewall is asked, or look for the address on the internet.
            self.links.route(*range, device, None, SERVICE_ROUTE_METRIC).await?;
        }
        Ok(())
    }

    fn make_settings(&self, ledger: &Ledger) -> Result<()> {
        if self.config.pod_cidrs.iter().any(|range| !range.is_ipv6()) {
            sysctl::ensure(ledger, "net/ipv4/ip_forward", "1")?;
        }
        if self.config.pod_cidrs.iter().any(Subnet::is_ipv6) {
            sysctl::ensure(ledger, "net/ipv6/conf/all/forwarding", "1")?;
        }
        Ok(())
    }

    /// True if both ends of the cable are there and the inner one has its addresses.
    async fn is_wired(&self, lease: &Lease, namespace: &Path, device: &str) -> Result<bool> {
        let Some(Device { up: true, .. }) = self.links.find(&lease.device).await? else { return Ok(false) };
        let pod = Links::inside(namespace)?;
        let Some(inner) = pod.find(device).await? else { return Ok(false) };
        let has = pod.addresses(inner.index).await?;
        Ok(inner.up && lease.ips.iter().all(|ip| has.contains(ip)))
    }

    async fn wire(&self, lease: &Lease, namespace: &Path, device: &str) -> Result<()> {
        let into = netns::open(namespace)?;
        let hardware = hardware_address(lease.ips.first());
        let outer = End { name: &lease.device, hardware: GATEWAY_HARDWARE };
        let outer = self.links.add_cable(outer, End { name: device, hardware }, &into, self.mtu).await?;
        self.make_cable_settings(&lease.device, lease)?;
        let pod = Links::inside(namespace)?;
        pod.up(pod.expect("lo").await?.index).await?;
        let inner = pod.expect(device).await?.index;
        pod.up(inner).await?;
        for (ip, gateway) in lease.ips.iter().zip(self.gateways()) {
            let host = Subnet::host(*ip);
            pod.add_address(inner, *ip, host.prefix()).await?;
            pod.add_neighbour(inner, gateway, GATEWAY_HARDWARE).await?;
            pod.route(Subnet::host(gateway), inner, None, 0).await?;
            pod.route_default(gateway, inner).await?;
            self.links.add_neighbour(outer.index, *ip, hardware).await?;
            self.links.route(host, outer.index, Some(gateway), 0).await?;
        }
        // A device drops what it is given until the kernel's link watch has seen that its peer is up, and
        // that would cost the pod's first connection a second. Asking for the device makes it look at once.
        self.links.expect(&lease.device).await?;
        pod.expect(device).await?;
        Ok(())
    }

    /// Settings of the node's end of a cable; they go with it.
    fn make_cable_settings(&self, device: &str, lease: &Lease) -> Result<()> {
        if !lease.ips.iter().any(IpAddr::is_ipv4) {
            return Ok(());
        }
        // A pod may only send from its own address.
        sysctl::set(&format!("net/ipv4/conf/{device}/rp_filter"), "1")?;
        // Lets the host reach node ports and host ports as `localhost`: the translated packet carries
        // 127.0.0.1 until it is masqueraded. The table keeps pods from reaching the host's loopback this
        // way (the hole known as CVE-2020-8558).
        sysctl::set(&format!("net/ipv4/conf/{device}/route_localnet"), "1")
    }
}

#[async_trait]
impl PodNetwork for RoutedNetwork {
    async fn attach(&self, pod: &PodRef, netns: &Path, ports: &[HostPort]) -> Result<PodAddresses> {
        Ok(self.attach_as(&pod.uid, pod, netns, POD_DEVICE, ports).await?.addresses())
    }

    async fn detach(&self, uid: &str) -> Result<()> {
        self.detach_owner(uid).await
    }

    async fn gc(&self, live: &BTreeSet<String>) -> Result<Vec<String>> {
        self.gc_owners(live).await
    }
}

/// Takes back every change the ledger in `state_dir` knows, newest first, and removes the state itself.
/// Pods should be stopped; those that are not lose their network. Nothing recorded: nothing done.
pub async fn purge(state_dir: &Path) -> Result<()> {
    let links = Links::here()?;
    for lease in Ipam::new(state_dir, Vec::new()).all()?.into_values() {
        links.delete(&lease.device).await?;
    }
    let ledger = Ledger::new(state_dir);
    for change in ledger.changes()?.into_iter().rev() {
        undo(&change, &links).await?;
        ledger.strike(&change)?;
    }
    match std::fs::remove_dir_all(state_dir) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(NetworkError::State { path: state_dir.to_owned(), source })
        }
        _ => Ok(()),
    }
}

async fn undo(change: &Change, links: &Links) -> Result<()> {
    match change {
        Change::Device { name } => links.delete(name).await,
        Change::Table { name } => NftProgram.apply(&nft::remove_table(name)).await,
        // Somebody else may have changed the setting since; then it is theirs.
        Change::Sysctl { path, before, after } => match sysctl::get(path)? {
            Some(now) if now == *after => sysctl::set(path, before),
            _ => Ok(()),
        },
    }
}

/// Looks for everything this crate ever makes, ledger or no ledger: the device, pod cables, both nftables
/// tables, the state directory.
pub async fn verify_clean(device: &str, state_dir: &Path) -> Result<CleanReport> {
    let mut report = CleanReport::default();
    let links = Links::here()?;
    report.note(format!("network device {device}"), links.find(device).await?.is_some());
    let cables = links.list().await?.into_iter().filter(|device| is_ours(&device.name));
    let cables: Vec<String> = cables.map(|device| device.name).collect();
    report.note(format!("pod cables ({DEVICE_PREFIX}...): {}", cables.join(" ")), !cables.is_empty());
    for table in [TABLE, crate::proxy::TABLE] {
        report.note(format!("nftables table inet {table}"), nft::table_exists(&NftProgram, table).await?);
    }
    report.note(format!("state directory {}", state_dir.display()), state_dir.exists());
    Ok(report)
}

impl CleanReport {
    fn note(&mut self, what: String, found: bool) {
        if found {
            self.leftovers.push(what.clone());
        }
        self.checked.push(what);
    }
}

fn is_ours(device: &str) -> bool {
    let rest = device.strip_prefix(DEVICE_PREFIX);
    rest.is_some_and(|rest| rest.len() == 11 && rest.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// A locally administered hardware address made of the pod's address.
fn hardware_address(ip: Option<&IpAddr>) -> [u8; 6] {
    let [a, b, c, d] = match ip {
        Some(IpAddr::V4(ip)) => ip.octets(),
        Some(IpAddr::V6(ip)) => {
            let [.., a, b, c, d] = ip.octets();
            [a, b, c, d]
        }
        None => [0; 4],
    };
    [0x0a, 0x58, a, b, c, d]
}

/// The whole table, replacing what was there.
fn table_script(config: &RoutedConfig, leases: &[Lease]) -> String {
    let mut script = nft::remove_table(TABLE);
    let family = |six: bool, list: &[Subnet]| {
        let list: Vec<String> = list.iter().filter(|s| s.is_ipv6() == six).map(Subnet::to_string).collect();
        if list.is_empty() { String::new() } else { format!("elements = {{ {} }}; ", list.join(", ")) }
    };
    _ = writeln!(script, "table inet {TABLE} {{");
    for (version, six) in [(4, false), (6, true)] {
        let ip = format!("ipv{version}_addr");
        let pods = family(six, &config.pod_cidrs);
        let cluster = family(six, &config.cluster_cidrs);
        _ = writeln!(script, "set pods{version} {{ type {ip}; flags interval; auto-merge; {pods}}}");
        _ = writeln!(script, "set cluster{version} {{ type {ip}; flags interval; auto-merge; {cluster}}}");
        _ = writeln!(script, "set hairpin{version} {{ type {ip} . {ip}; }}");
        _ = writeln!(
            script,
            "map ports{version} {{ type inet_proto . inet_service : {ip} . inet_service; }}"
        );
        _ = writeln!(
            script,
            "map ports_at{version} {{ type {ip} . inet_proto . inet_service : {ip} . inet_service; }}"
        );
    }
    _ = write!(
        script,
        "chain ports {{
  dnat ip to ip daddr . meta l4proto . th dport map @ports_at4
  dnat ip6 to ip6 daddr . meta l4proto . th dport map @ports_at6
  fib daddr type local dnat ip to meta l4proto . th dport map @ports4
  fib daddr type local dnat ip6 to meta l4proto . th dport map @ports6
}}
chain prerouting {{ type nat hook prerouting priority dstnat + 5; jump ports; }}
chain output {{ type nat hook output priority -95; jump ports; }}
chain postrouting {{
  type nat hook postrouting priority srcnat + 5;
  ip saddr . ip daddr @hairpin4 ct status dnat masquerade
  ip6 saddr . ip6 daddr @hairpin6 ct status dnat masquerade
  oifname \"{DEVICE_PREFIX}*\" ip saddr 127.0.0.0/8 masquerade
  oifname != \"{DEVICE_PREFIX}*\" ip saddr @pods4 ip daddr != @cluster4 masquerade
  oifname != \"{DEVICE_PREFIX}*\" ip6 saddr @pods6 ip6 daddr != @cluster6 masquerade
}}
# Pods must not reach what listens on the host's loopback only.
chain input {{
  type filter hook input priority filter;
  iifname \"{DEVICE_PREFIX}*\" ip daddr 127.0.0.0/8 ct state != {{ established, related }} drop
}}
}}
"
    );
    script + &elements(leases)
}

/// Opens one pod's host ports.
fn ports_script(lease: &Lease) -> String {
    elements(std::slice::from_ref(lease))
}

/// Replaces the host ports of all pods.
fn all_ports_script(leases: &[Lease]) -> String {
    let mut script = String::new();
    for version in [4, 6] {
        for (what, name) in [("map", "ports"), ("map", "ports_at"), ("set", "hairpin")] {
            _ = writeln!(script, "flush {what} inet {TABLE} {name}{version}");
        }
    }
    script + &elements(leases)
}

fn elements(leases: &[Lease]) -> String {
    let mut script = String::new();
    for lease in leases {
        for port in &lease.ports {
            for ip in &lease.ips {
                element(&mut script, *ip, port);
            }
        }
    }
    script
}

fn element(script: &mut String, pod: IpAddr, port: &HostPort) {
    let version = if pod.is_ipv4() { 4 } else { 6 };
    let (protocol, from, to) = (port.protocol.as_nft(), port.host_port, port.container_port);
    match port.host_ip.filter(|ip| !ip.is_unspecified()) {
        None => {
            _ = writeln!(
                script,
                "add element inet {TABLE} ports{version} {{ {protocol} . {from} : {pod} . {to} }}"
            );
        }
        Some(host) if host.is_ipv4() == pod.is_ipv4() => {
            _ = writeln!(
                script,
                "add element inet {TABLE} ports_at{version} {{ {host} . {protocol} . {from} : {pod} . {to} }}"
            );
        }
        Some(_) => return,
    }
    _ = writeln!(script, "add element inet {TABLE} hairpin{version} {{ {pod} . {pod} }}");
}
