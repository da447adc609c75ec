//! EndpointSlice: the addresses of a Service's pods. Packing and writing slices is [`store`]'s, which serves the
//! mirroring loop ([`mirroring`]) as well.

pub mod mirroring;
mod store;
mod topology;

use crate::context::REST_MAX;
use crate::service::{self, Family, HEADLESS_LABEL};
use crate::{Context, pods};
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use knarr_client::selector::Labels;
use knarr_client::{
    Change, Controller, EventType, Informer, ObjectKey, Reconcile, Recorder, Requeue, Result, owner,
};
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use store::{Plan, Ports, SliceStore, pack};
use tokio_util::sync::CancellationToken;
use topology::{Capacity, Wish};

const SERVICE_LABEL: &str = "kubernetes.io/service-name";
const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
const MANAGER: &str = "endpointslice-controller.k8s.io";
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

pub fn start(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let services = context.informers.get::<Service>();
    let all_pods = context.informers.get::<Pod>();
    let nodes = context.informers.get::<Node>();
    let this = Arc::new(Slices {
        recorder: context.recorder.for_component("endpoint-slice-controller"),
        services: services.clone(),
        pods: all_pods.clone(),
        nodes: nodes.clone(),
        store: SliceStore::new(&context, MANAGER),
        capacity: Mutex::default(),
        shared: Mutex::default(),
    });
    let (known, observer, counter) = (services.clone(), this.clone(), this.clone());
    let controller = Controller::new("endpointslice")
        .paced(4, REST_MAX)
        .watch(&services)
        .watch_changes(&this.store.slices, move |change| observer.store.slice_changed(change))
        .watch_changes(&all_pods, move |change| service::keys_of_pod(&known, change))
        .watch_changes(&nodes, move |change| counter.node_changed(change));
    Box::pin(controller.run(this, shutdown))
}

struct Slices {
    recorder: Recorder,
    services: Informer<Service>,
    pods: Informer<Pod>,
    nodes: Informer<Node>,
    store: SliceStore,
    capacity: Mutex<Capacity>,
    /// Services whose endpoints are shared out to zones.
    shared: Mutex<HashSet<ObjectKey>>,
}

impl Reconcile for Slices {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let Some(service) = self.services.get_key(&key) else {
            // The slices go with their owner.
            self.store.expectations.forget(&key);
            self.shared.lock().remove(&key);
            return Ok(Requeue::Done);
        };
        if service::selector(&service).is_none() || service.metadata.deletion_timestamp.is_some() {
            return Ok(Requeue::Done);
        }
        if let Some(wait) = self.store.expectations.pending(&key) {
            return Ok(Requeue::After(wait));
        }
        let known = self.store.of(&key);
        let plan = self.plan(&service, &known);
        let carried_out = self.store.carry_out(&key, plan).await;
        if let Err(error) = carried_out {
            if !error.is_conflict() {
                let message =
                    format!("Error updating Endpoint Slices for Service {key}: {}", pods::message_of(&error));
                self.recorder.event(&*service, EventType::Warning, "FailedToUpdateEndpointSlices", message);
            }
            return Err(error);
        }
        Ok(Requeue::Done)
    }
}

impl Slices {
    fn plan(&self, service: &Service, known: &[Arc<EndpointSlice>]) -> Plan {
        let families = service::families(service);
        let mut plan = Plan::default();
        for family in &families {
            let of_family = |slice: &&Arc<EndpointSlice>| slice.address_type == family.address_type();
            let existing: Vec<_> = known.iter().filter(of_family).cloned().collect();
            let mut endpoints = self.endpoints(service, *family);
            self.hint(service, *family, &mut endpoints, &existing);
            pack(&template(service), *family, endpoints, existing, &mut plan);
        }
        let stale = |slice: &&Arc<EndpointSlice>| {
            families.iter().all(|family| slice.address_type != family.address_type())
        };
        plan.delete.extend(known.iter().filter(stale).cloned());
        plan
    }

    /// Which Services a node's change concerns: when the zones differ, those whose endpoints are shared out to them.
    fn node_changed(&self, change: &Change<Node>) -> Vec<ObjectKey> {
        let node = &**change.object();
        let (was, is) = match change {
            Change::Added(_) => (None, Some(node)),
            Change::Updated { old, .. } => (Some(&**old), Some(node)),
            Change::Deleted(_) => (Some(node), None),
        };
        if !self.capacity.lock().count(was, is) {
            return Vec::new();
        }
        let all = self.services.list();
        all.iter().filter(|one| topology::wish(one) == Wish::Auto).map(|one| ObjectKey::of(&**one)).collect()
    }

    /// Says of each endpoint for whom it is meant, as far as the Service wants that.
    fn hint(
        &self,
        service: &Service,
        family: Family,
        endpoints: &mut BTreeMap<Ports, Vec<Endpoint>>,
        existing: &[Arc<EndpointSlice>],
    ) {
        let (key, wish) = (ObjectKey::of(service), topology::wish(service));
        let tell = |type_: EventType, reason: &str, what: &str| {
            let message = format!("{what}, addressType: {}", family.address_type());
            self.recorder.event(service, type_, reason, message);
        };
        if wish != Wish::Auto {
            if self.shared.lock().remove(&key) {
                let what = "Topology Aware Hints has been disabled";
                tell(EventType::Warning, "TopologyAwareHintsDisabled", what);
            }
            for endpoint in endpoints.values_mut().flatten() {
                endpoint.hints = topology::close(endpoint, wish);
            }
            return;
        }
        let meant: HashMap<_, _> = existing
            .iter()
            .flat_map(|slice| slice.endpoints.iter().flatten())
            .filter_map(|endpoint| Some((store::identity(endpoint), topology::zone_meant(endpoint)?)))
            .collect();
        let mut all: Vec<&mut Endpoint> = endpoints.values_mut().flatten().collect();
        let known = |endpoint: &Endpoint| meant.get(&store::identity(endpoint)).cloned();
        match self.capacity.lock().share_out(&mut all, known) {
            Ok(()) => {
                // After a restart the hints are there already.
                if self.shared.lock().insert(key) && meant.is_empty() {
                    let what = "Topology Aware Hints has been enabled";
                    tell(EventType::Normal, "TopologyAwareHintsEnabled", what);
                }
            }
            Err(why) => {
                all.iter_mut().for_each(|endpoint| endpoint.hints = None);
                self.shared.lock().remove(&key);
                tell(EventType::Warning, "TopologyAwareHintsDisabled", &why);
            }
        }
    }

    /// The endpoints there should be, by the ports they offer.
    fn endpoints(&self, service: &Service, family: Family) -> BTreeMap<Ports, Vec<Endpoint>> {
        let mut wanted: BTreeMap<Ports, Vec<Endpoint>> = BTreeMap::new();
        for pod in service::pods_of(service, &self.pods, true) {
            let ips: Vec<String> = service::addresses(&pod)
                .filter(|ip| Family::of(*ip) == family)
                .take(1)
                .map(|ip| ip.to_string())
                .collect();
            if !ips.is_empty() {
                wanted.entry(ports_of(service, &pod)).or_default().push(self.endpoint(service, &pod, ips));
            }
        }
        wanted
    }

    fn endpoint(&self, service: &Service, pod: &Pod, addresses: Vec<String>) -> Endpoint {
        let (serving, terminating) = (pods::is_ready(pod), pods::is_terminating(pod));
        let ready = service::publishes_not_ready(service) || (serving && !terminating);
        let node_name = pods::node_of(pod).map(str::to_owned);
        let node = node_name.as_deref().and_then(|name| self.nodes.get("", name));
        let zone = node.and_then(|node| node.metadata.labels.as_ref()?.get(ZONE_LABEL).cloned());
        Endpoint {
            addresses,
            conditions: Some(EndpointConditions {
                ready: Some(ready),
                serving: Some(serving),
                terminating: Some(terminating),
            }),
            hostname: service::hostname(pod, service),
            node_name,
            target_ref: Some(service::reference(pod)),
            zone,
            ..Default::default()
        }
    }
}

fn ports_of(service: &Service, pod: &Pod) -> Ports {
    let service_ports = service.spec.as_ref().and_then(|spec| spec.ports.as_ref()).into_iter().flatten();
    let mut ports: Ports = service_ports
        .filter_map(|port| {
            let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
            let number = service::target_port(pod, port)?;
            Some((port.name.clone().unwrap_or_default(), protocol, number, port.app_protocol.clone()))
        })
        .collect();
    ports.sort();
    ports
}

/// What every slice of the Service carries.
fn template(service: &Service) -> ObjectMeta {
    ObjectMeta {
        generate_name: Some(format!("{}-", service.metadata.name.as_deref().unwrap_or_default())),
        namespace: service.metadata.namespace.clone(),
        labels: Some(labels(service)),
        owner_references: Some(vec![owner::controller_ref(service)]),
        ..Default::default()
    }
}

/// The Service's labels and ours.
fn labels(service: &Service) -> Labels {
    let mut labels = service.metadata.labels.clone().unwrap_or_default();
    labels.remove(HEADLESS_LABEL);
    if service::is_headless(service) {
        labels.insert(HEADLESS_LABEL.to_owned(), String::new());
    }
    labels.insert(SERVICE_LABEL.to_owned(), service.metadata.name.clone().unwrap_or_default());
    labels.insert(MANAGED_BY.to_owned(), MANAGER.to_owned());
    labels
}

#[cfg(test)]
pub mod tests {
    use super::store::ENDPOINTS_MAX;
    use super::*;
    use crate::harness::Harness;
    use knarr_client::testing::Faults;
    use serde_json::{Value, json};

    pub fn service(extra: Value) -> Value {
        let mut service = json!({
            "metadata": {"name": "web", "labels": {"team": "a"}},
            "spec": {
                "selector": {"app": "web"}, "clusterIP": "10.96.0.10",
                "ports": [{"name": "web", "port": 80, "targetPort": "http"}],
            },
        });
        for (field, value) in extra.as_object().into_iter().flatten() {
            service["spec"][field] = value.clone();
        }
        service
    }

    pub async fn pod(harness: &Harness, name: &str, ip: &str, ready: bool) {
        let pod = json!({
            "metadata": {"name": name, "labels": {"app": "web"}},
            "spec": {"nodeName": "n1", "containers": [
                {"name": "c", "ports": [{"name": "http", "containerPort": 8080}]},
            ]},
        });
        harness.create::<Pod>(pod).await;
        let ready = if ready { "True" } else { "False" };
        let status = json!({
            "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
            "conditions": [{"type": "Ready", "status": ready}],
        });
        harness.patch_status::<Pod>(name, status).await;
    }

    fn sizes(slices: &[EndpointSlice]) -> Vec<usize> {
        let mut sizes: Vec<_> =
            slices.iter().map(|slice| slice.endpoints.as_ref().map_or(0, Vec::len)).collect();
        sizes.sort_unstable();
        sizes
    }

    #[tokio::test(start_paused = true)]
    async fn slices_hold_a_hundred_and_every_pod_is_in_exactly_one() {
        for seed in 0..3 {
            let harness =
                Harness::new(seed, Faults { conflict: 0.1, error: 0.1, drop_watch: 0.2, duplicate: 0.3 });
            harness.start(start);
            harness.create::<Service>(service(json!({}))).await;
            harness.api.wait_for::<EndpointSlice>("an empty slice", |slices| sizes(slices) == [0]).await;
            for i in 0..120 {
                pod(&harness, &format!("p{i}"), &format!("10.0.0.{i}"), true).await;
            }
            let all = |slices: &[EndpointSlice]| {
                assert!(sizes(slices).iter().all(|size| *size <= ENDPOINTS_MAX));
                sizes(slices).iter().sum::<usize>() == 120
            };
            harness.api.wait_for::<EndpointSlice>("120 endpoints", all).await;
            harness.api.set_faults(Faults::default());
            harness.assert_quiet().await;
            let slices = harness.api.objects::<EndpointSlice>();
            let mut ips: Vec<_> = slices
                .iter()
                .flat_map(|slice| slice.endpoints.iter().flatten())
                .map(|one| &one.addresses[0])
                .collect();
            ips.sort();
            ips.dedup();
            assert_eq!(ips.len(), 120);
            assert_eq!(slices[0].metadata.labels.as_ref().unwrap()["team"], "a");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_terminating_pod_serves_but_is_not_ready() {
        let harness = Harness::quiet();
        harness.start(start);
        harness.create::<Service>(service(json!({}))).await;
        pod(&harness, "a", "10.0.0.1", true).await;
        harness.delete::<Pod>("a").await;
        let conditions = |slices: &[EndpointSlice]| {
            slices.iter().flat_map(|slice| slice.endpoints.iter().flatten()).any(|endpoint| {
                let conditions = endpoint.conditions.clone().unwrap();
                (conditions.ready, conditions.serving, conditions.terminating)
                    == (Some(false), Some(true), Some(true))
            })
        };
        harness.api.wait_for::<EndpointSlice>("the conditions", conditions).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_service_without_selector_is_left_alone() {
        let harness = Harness::quiet();
        harness.start(start);
        harness.start(crate::endpoints::start);
        harness.create::<Service>(service(json!({"selector": null}))).await;
        harness.api.settle(std::time::Duration::from_secs(30)).await;
        assert!(harness.api.objects::<EndpointSlice>().is_empty());
        assert!(harness.api.objects::<k8s_openapi::api::core::v1::Endpoints>().is_empty());
    }

    /// Two zones with a node each; pods `n1-…` and `n2-…` run on them.
    async fn zones(harness: &Harness) {
        for (name, zone) in [("n1", "a"), ("n2", "b")] {
            let node = json!({
                "metadata": {"name": name, "labels": {ZONE_LABEL: zone}},
                "status": {"allocatable": {"cpu": "4"}, "conditions": [{"type": "Ready", "status": "True"}]},
            });
            harness.create_global::<Node>(node).await;
        }
    }

    /// How many endpoints are meant for each zone, and how many for nodes.
    fn meant(slices: &[EndpointSlice]) -> (BTreeMap<String, usize>, usize) {
        let (mut zones, mut nodes) = (BTreeMap::new(), 0);
        for endpoint in slices.iter().flat_map(|slice| slice.endpoints.iter().flatten()) {
            if let Some(zone) = topology::zone_meant(endpoint) {
                *zones.entry(zone).or_insert(0) += 1;
            }
            nodes += endpoint.hints.as_ref().and_then(|hints| hints.for_nodes.as_ref()).map_or(0, Vec::len);
        }
        (zones, nodes)
    }

    fn of(zones: &[(&str, usize)]) -> BTreeMap<String, usize> {
        zones.iter().map(|(zone, count)| ((*zone).to_owned(), *count)).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn traffic_that_is_to_stay_near_is_hinted_so() {
        let harness = Harness::quiet();
        harness.start(start);
        zones(&harness).await;
        harness.create::<Service>(service(json!({"trafficDistribution": "PreferClose"}))).await;
        pod(&harness, "ready", "10.0.0.1", true).await;
        pod(&harness, "unready", "10.0.0.2", false).await;
        let zone = |slices: &[EndpointSlice]| meant(slices) == (of(&[("a", 1)]), 0);
        harness.api.wait_for::<EndpointSlice>("the zone", zone).await;
        harness.assert_quiet().await;
        let change = json!({"spec": {"trafficDistribution": "PreferSameNode"}});
        harness.patch::<Service>("web", change).await;
        let both = |slices: &[EndpointSlice]| meant(slices) == (of(&[("a", 1)]), 1);
        harness.api.wait_for::<EndpointSlice>("zone and node", both).await;
        harness.patch::<Service>("web", json!({"spec": {"trafficDistribution": null}})).await;
        let none = |slices: &[EndpointSlice]| meant(slices) == (of(&[]), 0);
        harness.api.wait_for::<EndpointSlice>("no hints", none).await;
    }

    #[tokio::test(start_paused = true)]
    async fn endpoints_are_shared_out_to_zones_while_that_is_possible() {
        let harness = Harness::quiet();
        harness.start(start);
        zones(&harness).await;
        let mut auto = service(json!({}));
        auto["metadata"]["annotations"] = json!({"service.kubernetes.io/topology-mode": "Auto"});
        harness.create::<Service>(auto).await;
        // All run in zone a.
        for n in 0..4 {
            pod(&harness, &format!("p{n}"), &format!("10.0.0.{n}"), true).await;
        }
        let halves = |slices: &[EndpointSlice]| meant(slices) == (of(&[("a", 2), ("b", 2)]), 0);
        harness.api.wait_for::<EndpointSlice>("halves", halves).await;
        let told = |reason: &'static str, message: &'static str| {
            move |events: &[k8s_openapi::api::core::v1::Event]| {
                events.iter().any(|event| {
                    event.reason.as_deref() == Some(reason) && event.message.as_deref() == Some(message)
                })
            }
        };
        let enabled =
            told("TopologyAwareHintsEnabled", "Topology Aware Hints has been enabled, addressType: IPv4");
        harness.api.wait_for("the event", enabled).await;
        harness.assert_quiet().await;
        let nodes: kube::api::Api<Node> = kube::api::Api::all(harness.client());
        nodes.delete("n2", &Default::default()).await.unwrap();
        let none = |slices: &[EndpointSlice]| meant(slices) == (of(&[]), 0);
        harness.api.wait_for::<EndpointSlice>("no hints", none).await;
        let disabled = told(
            "TopologyAwareHintsDisabled",
            "Insufficient Node information: allocatable CPU or zone not specified on one or more nodes, addressType: IPv4",
        );
        harness.api.wait_for("the event", disabled).await;
    }
}
