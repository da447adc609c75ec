//! The Service proxy: makes cluster IPs, node ports and external addresses reach endpoints, in nftables.
//!
//! [`model`] says what is read from the API and which endpoints get traffic, [`rules`] how that becomes
//! firewall entries. This file keeps the state, turns events into one small transaction, and repairs the
//! table when somebody flushes it. One table (`inet knarr`), owned whole.
//!
//! When the proxy stops, its rules stay: Services go on working while the node process is replaced.

pub mod model;
pub mod rules;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use knarr_client::{Informer, Informers, ObjectKey};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::model::{Service, ServiceName, Slice};
use self::rules::{Chain, Entries, Frontend, Key, Transaction, Value};
use crate::conntrack;
use crate::error::Result;
use crate::ipam::Subnet;
use crate::nft::{self, Firewall};
use crate::pod::Protocol;
use crate::watch::Watch;

/// The nftables table (family `inet`) of the Service proxy.
pub const TABLE: &str = "knarr";
/// Names the Service of an EndpointSlice.
const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
/// Events that come within this time of the first become one transaction.
const COALESCE: Duration = Duration::from_millis(5);
/// Events on their way from the informers.
const EVENTS_MAX: usize = 256;
/// Wait after a failed transaction, doubled each time up to the second.
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(10);

/// What the proxy is told.
#[derive(Clone, Debug)]
pub struct ProxyConfig {
    /// This node's name, to know local endpoints.
    pub node_name: String,
    /// All pod ranges of the cluster: sources outside them are masqueraded when they call a cluster IP, and
    /// count as "outside" for `externalTrafficPolicy: Local`.
    pub cluster_cidrs: Vec<Subnet>,
    /// The Service ranges: addresses in them that are not in use are refused, not routed to the internet.
    pub service_cidrs: Vec<Subnet>,
}

/// What the proxy hears from the API. Order between Services and slices does not matter.
#[derive(Clone, Debug)]
pub enum ProxyEvent {
    /// A Service as it is now.
    Service(Arc<core::Service>),
    /// A Service that is gone.
    ServiceGone { namespace: String, name: String },
    /// An EndpointSlice as it is now.
    Slice(Arc<discovery::EndpointSlice>),
    /// An EndpointSlice that is gone.
    SliceGone { namespace: String, name: String },
    /// Both lists were delivered whole once. Nothing is programmed before, so that a restart does not cut
    /// Services off.
    Synced,
}

/// What one transaction did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Synced {
    /// Entries added and deleted.
    pub entries: usize,
    /// UDP flows cut.
    pub flows: usize,
}

/// The Service proxy of one node.
pub struct ServiceProxy {
    config: ProxyConfig,
    firewall: Arc<dyn Firewall>,
    services: HashMap<ServiceName, Service>,
    /// By Service, then by the slice's own name.
    slices: HashMap<ServiceName, HashMap<String, Slice>>,
    /// Which Service a slice belongs to, by namespace and slice name.
    slice_owners: HashMap<(String, String), ServiceName>,
    /// What the table holds for each Service.
    applied: HashMap<ServiceName, Entries>,
    /// Who holds a frontend. External addresses and node ports may be claimed twice; the first keeps them.
    holders: HashMap<Frontend, ServiceName>,
    /// Services that wait for a frontend somebody else holds.
    contenders: HashSet<ServiceName>,
    /// How many Services need the hairpin entry of an address.
    hairpins: HashMap<IpAddr, u32>,
    chains: BTreeSet<Chain>,
    dirty: HashSet<ServiceName>,
    /// The table is not known to be as remembered: write it whole.
    rebuild: bool,
}

impl ServiceProxy {
    /// A proxy that knows nothing yet.
    pub fn new(config: ProxyConfig, firewall: Arc<dyn Firewall>) -> ServiceProxy {
        ServiceProxy {
            config,
            firewall,
            services: HashMap::new(),
            slices: HashMap::new(),
            slice_owners: HashMap::new(),
            applied: HashMap::new(),
            holders: HashMap::new(),
            contenders: HashSet::new(),
            hairpins: HashMap::new(),
            chains: BTreeSet::new(),
            dirty: HashSet::new(),
            rebuild: true,
        }
    }

    /// [`ServiceProxy::run`], fed by the process's informers.
    ///
    /// # Errors
    /// As for `run`.
    pub async fn follow(self, informers: &Informers, shutdown: CancellationToken) -> Result<()> {
        let (sender, events) = mpsc::channel(EVENTS_MAX);
        let feeder = tokio::spawn(feed(informers.get(), informers.get(), sender));
        let result = self.run(events, shutdown).await;
        feeder.abort();
        result
    }

    /// Works until `shutdown`; the rules stay. A closed event channel ends it too.
    ///
    /// # Errors
    /// Only if the firewall cannot be watched; failing transactions are logged and retried.
    pub async fn run(
        mut self,
        mut events: mpsc::Receiver<ProxyEvent>,
        shutdown: CancellationToken,
    ) -> Result<()> {
        let watch = Watch::new(TABLE)?;
        let mut synced = false;
        let mut due: Option<Instant> = None;
        let mut retry = RETRY_MIN;
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                event = events.recv() => {
                    let Some(event) = event else { return Ok(()) };
                    synced |= matches!(event, ProxyEvent::Synced);
                    self.note(event);
                    if synced && due.is_none() && self.has_work() {
                        due = Some(Instant::now() + COALESCE);
                    }
                }
                deleted = watch.deleted(), if synced => {
                    deleted?;
                    if !self.rebuild && !nft::has_rules(&*self.firewall, TABLE, "frontends4").await {
                        tracing::warn!(table = TABLE, "firewall rules were removed by somebody else, restoring them");
                        self.rebuild = true;
                        due = Some(Instant::now());
                    }
                }
                () = wait(due) => {
                    due = None;
                    match self.sync().await {
                        Ok(done) => {
                            retry = RETRY_MIN;
                            tracing::debug!(entries = done.entries, flows = done.flows, "services programmed");
                        }
                        Err(error) => {
                            tracing::warn!(%error, retry_ms = retry.as_millis() as u64, "programming services failed");
                            due = Some(Instant::now() + retry);
                            retry = (retry * 2).min(RETRY_MAX);
                        }
                    }
                    watch.drain();
                }
            }
        }
    }

    /// Takes one event in; [`ServiceProxy::sync`] acts on it.
    pub fn note(&mut self, event: ProxyEvent) {
        match event {
            ProxyEvent::Service(object) => {
                let name = service_name(object.metadata.namespace.as_ref(), object.metadata.name.as_ref());
                self.note_service(name, Service::read(&object));
            }
            ProxyEvent::ServiceGone { namespace, name } => {
                self.note_service(ServiceName { namespace, name }, None)
            }
            ProxyEvent::Slice(object) => self.note_slice(&object),
            ProxyEvent::SliceGone { namespace, name } => self.forget_slice(namespace, name),
            ProxyEvent::Synced => {}
        }
    }

    /// Brings the table up to date in one transaction: only what changed, or everything after a failure or
    /// a flush. Afterwards UDP flows and remembered clients of endpoints that are gone are cut.
    ///
    /// # Errors
    /// The table is as before, and the next call writes it whole.
    pub async fn sync(&mut self) -> Result<Synced> {
        let rebuild = std::mem::take(&mut self.rebuild);
        if rebuild {
            self.forget_applied();
        }
        let transaction = self.plan();
        let applied = match rebuild {
            true => self.write_all(&transaction).await,
            false => self.write(&transaction).await,
        };
        if let Err(error) = applied {
            self.rebuild = true;
            return Err(error);
        }
        let udp = self.udp_frontends(&transaction);
        let flows = if udp.is_empty() { 0 } else { cut_flows(udp).await };
        self.forget_clients(&transaction).await;
        Ok(Synced { entries: transaction.len(), flows })
    }

    /// Removes the table.
    pub async fn purge(firewall: &dyn Firewall) -> Result<()> {
        firewall.apply(&nft::remove_table(TABLE)).await
    }

    /// New chains first: unused until the elements lead to them. Then the elements, at once.
    async fn write(&mut self, transaction: &Transaction) -> Result<()> {
        let script = transaction.script(&mut self.chains);
        if !script.is_empty() {
            self.firewall.apply(&script).await?;
        }
        self.firewall.change(TABLE, transaction.changes()).await
    }

    async fn write_all(&mut self, transaction: &Transaction) -> Result<()> {
        let mut script = rules::base_script(&self.config.cluster_cidrs, &self.config.service_cidrs);
        script.push_str(&transaction.script(&mut self.chains));
        if let Err(error) = self.firewall.apply(&script).await {
            tracing::info!(%error, table = TABLE, "the table cannot be taken over, making it anew");
            self.firewall.apply(&(nft::remove_table(TABLE) + &script)).await?;
        }
        let mut changes: Vec<nft::Change> = rules::PLACES.map(|set| nft::Change::Flush { set }).to_vec();
        changes.extend(transaction.changes());
        self.firewall.change(TABLE, changes).await
    }

    fn has_work(&self) -> bool {
        self.rebuild || !self.dirty.is_empty()
    }

    fn note_service(&mut self, name: ServiceName, service: Option<Service>) {
        let changed = match service {
            Some(service) => self.services.insert(name.clone(), service.clone()).as_ref() != Some(&service),
            None => self.services.remove(&name).is_some(),
        };
        if changed {
            self.dirty.insert(name);
        }
    }

    fn note_slice(&mut self, object: &discovery::EndpointSlice) {
        let meta = &object.metadata;
        let namespace = meta.namespace.clone().unwrap_or_default();
        let own_name = meta.name.clone().unwrap_or_default();
        let owner = meta.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME_LABEL));
        let slice = Slice::read(object, &self.config.node_name);
        let (Some(owner), Some(slice)) = (owner, slice) else {
            return self.forget_slice(namespace, own_name);
        };
        let owner = ServiceName { namespace: namespace.clone(), name: owner.clone() };
        let key = (namespace.clone(), own_name.clone());
        if self.slice_owners.get(&key).is_some_and(|before| *before != owner) {
            self.forget_slice(namespace, own_name.clone());
        }
        self.slice_owners.insert(key, owner.clone());
        let slices = self.slices.entry(owner.clone()).or_default();
        if slices.get(&own_name) != Some(&slice) {
            slices.insert(own_name, slice);
            self.dirty.insert(owner);
        }
    }

    fn forget_slice(&mut self, namespace: String, name: String) {
        let Some(owner) = self.slice_owners.remove(&(namespace, name.clone())) else { return };
        if let Some(slices) = self.slices.get_mut(&owner) {
            slices.remove(&name);
            if slices.is_empty() {
                self.slices.remove(&owner);
            }
        }
        self.dirty.insert(owner);
    }

    fn forget_applied(&mut self) {
        self.applied.clear();
        self.holders.clear();
        self.contenders.clear();
        self.hairpins.clear();
        self.chains.clear();
        self.dirty.extend(self.services.keys().cloned());
    }

    /// The transaction for all dirty Services; the state says afterwards what will be once it is applied.
    fn plan(&mut self) -> Transaction {
        let mut transaction = Transaction::default();
        let mut dirty: BTreeSet<ServiceName> = self.dirty.drain().collect();
        while let Some(name) = dirty.pop_first() {
            let old = self.applied.remove(&name).unwrap_or_default();
            let new = self.render(&name, &old);
            let released = self.update_holders(&name, &old, &new);
            if released {
                dirty.extend(self.contenders.drain().filter(|contender| *contender != name));
            }
            let (old_own, old_pins) = split_hairpins(&old);
            let (new_own, new_pins) = split_hairpins(&new);
            transaction.change(&old_own, &new_own);
            self.update_hairpins(&old_pins, &new_pins, &mut transaction);
            if !new.is_empty() {
                self.applied.insert(name, new);
            }
        }
        transaction
    }

    fn render(&mut self, name: &ServiceName, old: &Entries) -> Entries {
        let mut entries = Entries::new();
        let Some(service) = self.services.get(name) else { return entries };
        let none = HashMap::new();
        let slices = self.slices.get(name).unwrap_or(&none);
        for port in &service.ports {
            rules::render(service, port, |six| model::choose(port, six, slices), old, &mut entries);
        }
        let taken = |at: &Frontend| self.holders.get(at).filter(|holder| *holder != name);
        let lost: BTreeSet<Frontend> =
            entries.keys().filter_map(Key::at).filter(|at| taken(at).is_some()).collect();
        for at in &lost {
            let holder = taken(at).map(|holder| format!("{}/{}", holder.namespace, holder.name));
            tracing::warn!(
                service = %format_args!("{}/{}", name.namespace, name.name),
                address = %at,
                holder,
                "address is already held by another service"
            );
        }
        if !lost.is_empty() {
            entries.retain(|key, _| key.at().is_none_or(|at| !lost.contains(&at)));
            self.contenders.insert(name.clone());
        }
        entries
    }

    /// Says whether a frontend was given up that somebody waits for.
    fn update_holders(&mut self, name: &ServiceName, old: &Entries, new: &Entries) -> bool {
        let mut released = false;
        for at in old.keys().filter_map(Key::at) {
            released |= self.holders.remove(&at).is_some();
        }
        for at in new.keys().filter_map(Key::at) {
            self.holders.insert(at, name.clone());
        }
        released && !self.contenders.is_empty()
    }

    fn update_hairpins(
        &mut self,
        old: &BTreeSet<IpAddr>,
        new: &BTreeSet<IpAddr>,
        transaction: &mut Transaction,
    ) {
        for ip in new.difference(old) {
            let count = self.hairpins.entry(*ip).or_default();
            *count += 1;
            if *count == 1 {
                transaction.insert(Key::Hairpin { ip: *ip }, Value::Member);
            }
        }
        for ip in old.difference(new) {
            let count = self.hairpins.entry(*ip).or_default();
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.hairpins.remove(ip);
                transaction.remove(Key::Hairpin { ip: *ip });
            }
        }
    }

    /// The UDP frontends a transaction touched, each with the endpoints it has now.
    fn udp_frontends(&self, transaction: &Transaction) -> BTreeMap<Frontend, BTreeSet<SocketAddr>> {
        let touched = transaction.touched().filter_map(Key::at).filter(|at| at.protocol == Protocol::Udp);
        touched.map(|at| (at, self.endpoints_of(&at))).collect()
    }

    fn endpoints_of(&self, at: &Frontend) -> BTreeSet<SocketAddr> {
        let entries = self.holders.get(at).and_then(|holder| self.applied.get(holder));
        let endpoint = |(key, value): (&Key, &Value)| match value {
            Value::Endpoint(address) if key.at() == Some(*at) => Some(*address),
            _ => None,
        };
        entries.into_iter().flatten().filter_map(endpoint).collect()
    }

    /// Makes the firewall forget clients bound to slots whose endpoint changed. Until then they fall back
    /// to a random endpoint or reach the slot's new holder, so a failure is only worth a line in the log.
    async fn forget_clients(&self, transaction: &Transaction) {
        let slots: HashSet<(Frontend, u32)> = transaction.deleted_affine().collect();
        if slots.is_empty() {
            return;
        }
        for version in [4, 6] {
            let map = format!("affinity{version}");
            if !slots.iter().any(|(at, _)| at.ip.is_ipv4() == (version == 4)) {
                continue;
            }
            let forgotten = match self.firewall.query(&["list", "map", "inet", TABLE, &map]).await {
                Ok(listing) => rules::clients_of(&listing, &slots),
                Err(error) => {
                    tracing::warn!(%error, "cannot list remembered clients");
                    continue;
                }
            };
            for client in forgotten {
                let script = format!("delete element inet {TABLE} {map} {{ {client} }}\n");
                // An entry may expire between listing and deleting; then it is gone, as wanted.
                if let Err(error) = self.firewall.apply(&script).await {
                    tracing::debug!(%error, "remembered client was gone already");
                }
            }
        }
    }
}

/// Turns what informers know into events. The informers de-duplicate keys, so however fast objects change,
/// no more wait than there are objects.
async fn feed(
    services: Informer<core::Service>,
    slices: Informer<discovery::EndpointSlice>,
    sender: mpsc::Sender<ProxyEvent>,
) {
    let (service_keys, slice_keys) = (services.subscribe(), slices.subscribe());
    let service_event = |key: ObjectKey| match services.get_key(&key) {
        Some(object) => ProxyEvent::Service(object),
        None => ProxyEvent::ServiceGone { namespace: key.namespace, name: key.name },
    };
    let slice_event = |key: ObjectKey| match slices.get_key(&key) {
        Some(object) => ProxyEvent::Slice(object),
        None => ProxyEvent::SliceGone { namespace: key.namespace, name: key.name },
    };
    services.wait_synced().await;
    slices.wait_synced().await;
    let first = std::iter::from_fn(|| service_keys.try_next()).map(service_event);
    for event in first.collect::<Vec<_>>() {
        _ = sender.send(event).await;
    }
    let first = std::iter::from_fn(|| slice_keys.try_next()).map(slice_event);
    for event in first.collect::<Vec<_>>() {
        _ = sender.send(event).await;
    }
    _ = sender.send(ProxyEvent::Synced).await;
    loop {
        let event = tokio::select! {
            key = service_keys.next() => service_event(key),
            key = slice_keys.next() => slice_event(key),
        };
        if sender.send(event).await.is_err() {
            return;
        }
    }
}

async fn wait(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// Cuts UDP flows that go where their frontend no longer leads. Programming is done by now, so an error is
/// logged, not returned: a retry would find nothing changed.
async fn cut_flows(frontends: BTreeMap<Frontend, BTreeSet<SocketAddr>>) -> usize {
    let stale = move |flow: &conntrack::Flow| {
        let to = flow.destination;
        let any: IpAddr = if to.is_ipv4() { [0, 0, 0, 0].into() } else { [0; 16].into() };
        [to.ip(), any].into_iter().any(|ip| {
            let at = Frontend { ip, protocol: Protocol::Udp, port: to.port() };
            frontends.get(&at).is_some_and(|endpoints| !endpoints.contains(&flow.answers))
        })
    };
    match tokio::task::spawn_blocking(move || conntrack::delete_udp(stale)).await {
        Ok(Ok(count)) => count,
        Ok(Err(error)) => {
            tracing::warn!(%error, "cannot cut stale udp flows");
            0
        }
        Err(error) => {
            tracing::warn!(%error, "cutting stale udp flows was interrupted");
            0
        }
    }
}

fn split_hairpins(entries: &Entries) -> (Entries, BTreeSet<IpAddr>) {
    let mut own = entries.clone();
    let mut pins = BTreeSet::new();
    own.retain(|key, _| match key {
        Key::Hairpin { ip } => {
            pins.insert(*ip);
            false
        }
        _ => true,
    });
    (own, pins)
}

fn service_name(namespace: Option<&String>, name: Option<&String>) -> ServiceName {
    ServiceName { namespace: namespace.cloned().unwrap_or_default(), name: name.cloned().unwrap_or_default() }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

    use super::*;
    use crate::nft::testing::Recorder;

    fn proxy() -> (ServiceProxy, Arc<Recorder>) {
        let recorder = Arc::new(Recorder::default());
        let config = ProxyConfig { node_name: "n1".into(), cluster_cidrs: vec![], service_cidrs: vec![] };
        (ServiceProxy::new(config, recorder.clone()), recorder)
    }

    fn service(name: &str, ip: &str, external: &str) -> ProxyEvent {
        let port = core::ServicePort { port: 80, ..Default::default() };
        let spec = core::ServiceSpec {
            cluster_ip: Some(ip.into()),
            external_ips: Some(vec![external.into()]),
            ports: Some(vec![port]),
            ..Default::default()
        };
        let metadata = ObjectMeta { name: Some(name.into()), ..Default::default() };
        ProxyEvent::Service(Arc::new(core::Service { metadata, spec: Some(spec), ..Default::default() }))
    }

    fn holder(proxy: &ServiceProxy, ip: &str) -> Option<String> {
        let at = Frontend { ip: ip.parse().unwrap(), protocol: Protocol::Tcp, port: 80 };
        proxy.holders.get(&at).map(|name| name.name.clone())
    }

    #[tokio::test]
    async fn the_first_of_two_claimants_keeps_an_address_and_the_other_gets_it_later() {
        let (mut proxy, _) = proxy();
        proxy.note(service("a", "10.0.0.1", "192.0.2.1"));
        proxy.sync().await.unwrap();
        proxy.note(service("b", "10.0.0.2", "192.0.2.1"));
        proxy.sync().await.unwrap();
        assert_eq!(holder(&proxy, "192.0.2.1").as_deref(), Some("a"));
        assert_eq!(holder(&proxy, "10.0.0.2").as_deref(), Some("b"));
        proxy.note(ProxyEvent::ServiceGone { namespace: String::new(), name: "a".into() });
        proxy.sync().await.unwrap();
        assert_eq!(holder(&proxy, "192.0.2.1").as_deref(), Some("b"));
        assert_eq!(holder(&proxy, "10.0.0.1"), None);
    }

    #[tokio::test]
    async fn a_second_sync_changes_nothing() {
        let (mut proxy, recorder) = proxy();
        proxy.note(service("a", "10.0.0.1", "192.0.2.1"));
        assert_eq!(proxy.sync().await.unwrap().entries, 2);
        proxy.note(service("a", "10.0.0.1", "192.0.2.1"));
        assert_eq!(proxy.sync().await.unwrap().entries, 0);
        assert_eq!(recorder.scripts.lock().len(), 1, "no new chains");
        assert_eq!(recorder.changes.lock().last(), Some(&vec![]));
    }
}
