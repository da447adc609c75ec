//! EndpointSlice: the addresses of a Service's pods, a hundred to a slice, changed with as few writes as possible.

use crate::service::{self, Family, HEADLESS_LABEL};
use crate::{Context, pods};
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use knarr_client::expectations::Expectations;
use knarr_client::selector::Labels;
use knarr_client::{
    Change, Controller, During, EventType, Informer, ObjectKey, Reconcile, Recorder, Requeue, Result,
};
use knarr_client::{ignore_gone, owner, patch};
use kube::api::{Api, DeleteParams, PostParams};
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

const ENDPOINTS_MAX: usize = 100;
const SERVICE_LABEL: &str = "kubernetes.io/service-name";
const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
const MANAGER: &str = "endpointslice-controller.k8s.io";
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
/// Slices by the namespace and name of their Service.
const BY_SERVICE: &str = "service";

pub fn start(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let services = context.informers.get::<Service>();
    let all_pods = context.informers.get::<Pod>();
    let nodes = context.informers.get::<Node>();
    let slices = context.informers.get::<EndpointSlice>();
    slices.add_index(BY_SERVICE, |slice| key_of(slice).map(|key| key.to_string()).into_iter().collect());
    let this = Arc::new(Slices {
        recorder: context.recorder.for_component("endpoint-slice-controller"),
        services: services.clone(),
        pods: all_pods.clone(),
        nodes: nodes.clone(),
        slices: slices.clone(),
        expectations: Expectations::new(),
        context,
    });
    let (known, observer) = (services.clone(), this.clone());
    let controller = Controller::new("endpointslice")
        .watch(&services)
        .watch_changes(&slices, move |change| observer.slice_changed(change))
        .watch_changes(&all_pods, move |change| service::keys_of_pod(&known, change))
        .needs(&nodes);
    Box::pin(controller.run(this, shutdown))
}

/// The Service a slice of ours belongs to.
fn key_of(slice: &EndpointSlice) -> Option<ObjectKey> {
    let labels = slice.metadata.labels.as_ref()?;
    if labels.get(MANAGED_BY).map(String::as_str) != Some(MANAGER) {
        return None;
    }
    Some(ObjectKey::new(slice.metadata.namespace.clone()?, labels.get(SERVICE_LABEL)?.clone()))
}

struct Slices {
    context: Context,
    recorder: Recorder,
    services: Informer<Service>,
    pods: Informer<Pod>,
    nodes: Informer<Node>,
    slices: Informer<EndpointSlice>,
    expectations: Expectations,
}

impl Reconcile for Slices {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let Some(service) = self.services.get_key(&key) else {
            // The slices go with their owner.
            self.expectations.forget(&key);
            return Ok(Requeue::Done);
        };
        if service::selector(&service).is_none() || service.metadata.deletion_timestamp.is_some() {
            return Ok(Requeue::Done);
        }
        if let Some(wait) = self.expectations.pending(&key) {
            return Ok(Requeue::After(wait));
        }
        let known = self.slices.by_index(BY_SERVICE, &key.to_string());
        let plan = self.plan(&service, &known);
        let carried_out = self.carry_out(&key, &service, plan).await;
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

/// What has to be written.
#[derive(Default)]
struct Plan {
    create: Vec<EndpointSlice>,
    update: Vec<(Arc<EndpointSlice>, EndpointSlice)>,
    delete: Vec<Arc<EndpointSlice>>,
}

impl Slices {
    fn slice_changed(&self, change: &Change<EndpointSlice>) -> Vec<ObjectKey> {
        let slice = change.object();
        let keys: Vec<_> =
            [Some(slice), change.old()].into_iter().flatten().filter_map(|slice| key_of(slice)).collect();
        if let Some(key) = keys.first() {
            let uid = pods::uid(&slice.metadata);
            self.expectations.creation_seen(key, uid);
            if change.is_deleted() {
                self.expectations.deletion_seen(key, uid);
            }
        }
        keys
    }

    fn plan(&self, service: &Service, known: &[Arc<EndpointSlice>]) -> Plan {
        let families = service::families(service);
        let mut plan = Plan::default();
        for family in &families {
            let of_family = |slice: &&Arc<EndpointSlice>| slice.address_type == family.address_type();
            let existing: Vec<_> = known.iter().filter(of_family).cloned().collect();
            pack(service, *family, self.endpoints(service, *family), existing, &mut plan);
        }
        let stale = |slice: &&Arc<EndpointSlice>| {
            families.iter().all(|family| slice.address_type != family.address_type())
        };
        plan.delete.extend(known.iter().filter(stale).cloned());
        plan
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

    async fn carry_out(&self, key: &ObjectKey, service: &Service, plan: Plan) -> Result<()> {
        let api: Api<EndpointSlice> = Api::namespaced(self.context.client.clone(), &key.namespace);
        // Added before removed, so that no address is missing in between.
        for mut slice in plan.create {
            slice.metadata.owner_references = Some(vec![owner::controller_ref(service)]);
            let created = api.create(&PostParams::default(), &slice).await;
            match created.during(|| format!("create endpoint slice for {key}")) {
                Ok(created) => {
                    let cached = || self.slices.get_key(&ObjectKey::of(&created)).is_some();
                    self.expectations.created(key, pods::uid(&created.metadata), cached);
                }
                Err(error) if error.is_namespace_terminating() => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        for (old, new) in plan.update {
            let name = old.metadata.name.clone().unwrap_or_default();
            let labels = patch::merge_diff(&json!(old.metadata.labels), &json!(new.metadata.labels));
            let mut change = json!({
                "metadata": {"uid": old.metadata.uid, "resourceVersion": old.metadata.resource_version},
                "endpoints": new.endpoints.unwrap_or_default(), "ports": new.ports.unwrap_or_default(),
            });
            if !labels.is_null() {
                change["metadata"]["labels"] = labels;
            }
            patch::merge(&api, &name, change).await?;
        }
        for slice in plan.delete {
            let name = slice.metadata.name.clone().unwrap_or_default();
            let uid = pods::uid(&slice.metadata);
            self.expectations.deleting(key, uid);
            let deleted = api.delete(&name, &DeleteParams::default()).await;
            let deleted =
                ignore_gone(deleted.during(|| format!("delete endpoint slice {}/{name}", key.namespace)));
            if deleted.is_err() || self.slices.get(&key.namespace, &name).is_none() {
                self.expectations.deletion_seen(key, uid);
            }
            deleted?;
        }
        Ok(())
    }
}

/// Name, protocol, number and application protocol of each port, sorted.
type Ports = Vec<(String, String, i32, Option<String>)>;

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

fn ports_in(slice: &EndpointSlice) -> Ports {
    let mut ports: Ports = slice
        .ports
        .iter()
        .flatten()
        .map(|port| {
            let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
            (
                port.name.clone().unwrap_or_default(),
                protocol,
                port.port.unwrap_or(0),
                port.app_protocol.clone(),
            )
        })
        .collect();
    ports.sort();
    ports
}

/// What makes an endpoint the same one.
fn identity(endpoint: &Endpoint) -> (String, Vec<String>) {
    let uid = endpoint.target_ref.as_ref().and_then(|target| target.uid.clone()).unwrap_or_default();
    (uid, endpoint.addresses.clone())
}

/// Plans one address family: endpoints stay in the slice they are in; new ones fill slices that change anyway, then
/// the fullest that can take the rest, then new slices.
fn pack(
    service: &Service,
    family: Family,
    wanted: BTreeMap<Ports, Vec<Endpoint>>,
    existing: Vec<Arc<EndpointSlice>>,
    plan: &mut Plan,
) {
    let mut existing_by_ports: BTreeMap<Ports, Vec<Arc<EndpointSlice>>> = BTreeMap::new();
    for slice in existing {
        existing_by_ports.entry(ports_in(&slice)).or_default().push(slice);
    }
    // A Service without endpoints keeps one empty slice: that says "known, and nobody there".
    let mut wanted = wanted;
    if wanted.is_empty() {
        wanted.insert(Vec::new(), Vec::new());
    }
    for (ports, endpoints) in wanted {
        let existing = existing_by_ports.remove(&ports).unwrap_or_default();
        pack_ports(service, family, &ports, endpoints, existing, plan);
    }
    plan.delete.extend(existing_by_ports.into_values().flatten());
}

fn pack_ports(
    service: &Service,
    family: Family,
    ports: &Ports,
    endpoints: Vec<Endpoint>,
    existing: Vec<Arc<EndpointSlice>>,
    plan: &mut Plan,
) {
    let mut missing: BTreeMap<_, Endpoint> = endpoints.into_iter().map(|one| (identity(&one), one)).collect();
    let mut kept: Vec<(Arc<EndpointSlice>, Vec<Endpoint>)> = Vec::new();
    for slice in existing {
        let known = slice.endpoints.clone().unwrap_or_default();
        let stay: Vec<Endpoint> = known.iter().filter_map(|one| missing.remove(&identity(one))).collect();
        kept.push((slice, stay));
    }
    let changes =
        |slice: &EndpointSlice, stay: &[Endpoint]| slice.endpoints.as_deref().unwrap_or_default() != stay;
    // Slices that change anyway first, fuller ones before emptier ones.
    kept.sort_by_key(|(slice, stay)| (!changes(slice, stay), std::cmp::Reverse(stay.len())));
    let mut rest: Vec<Endpoint> = missing.into_values().collect();
    for (slice, stay) in &mut kept {
        let room = ENDPOINTS_MAX.saturating_sub(stay.len());
        let takes = if changes(slice, stay) {
            room.min(rest.len())
        } else if rest.len() <= room {
            rest.len()
        } else {
            0
        };
        stay.extend(rest.drain(..takes));
    }
    while !rest.is_empty() || (kept.is_empty() && plan_is_empty_for(plan, family, ports)) {
        let some: Vec<Endpoint> = rest.drain(..rest.len().min(ENDPOINTS_MAX)).collect();
        plan.create.push(slice_of(service, family, ports, some));
    }
    let mut left = kept.iter().filter(|(_, stay)| !stay.is_empty()).count();
    for (slice, stay) in kept {
        if stay.is_empty() && (left > 0 || !plan_is_empty_for(plan, family, ports)) {
            plan.delete.push(slice);
            continue;
        }
        left += 1;
        let new = slice_of(service, family, ports, stay);
        let same =
            slice.endpoints.as_deref().unwrap_or_default() == new.endpoints.as_deref().unwrap_or_default();
        if !same || slice.metadata.labels != new.metadata.labels {
            plan.update.push((slice, new));
        }
    }
}

/// Whether no slice of this family and these ports is about to be created.
fn plan_is_empty_for(plan: &Plan, family: Family, ports: &Ports) -> bool {
    !plan.create.iter().any(|slice| slice.address_type == family.address_type() && ports_in(slice) == *ports)
}

fn slice_of(service: &Service, family: Family, ports: &Ports, endpoints: Vec<Endpoint>) -> EndpointSlice {
    let ports = ports.iter().map(|(name, protocol, port, app_protocol)| EndpointPort {
        name: Some(name.clone()),
        protocol: Some(protocol.clone()),
        port: Some(*port),
        app_protocol: app_protocol.clone(),
    });
    EndpointSlice {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}-", service.metadata.name.as_deref().unwrap_or_default())),
            namespace: service.metadata.namespace.clone(),
            labels: Some(labels(service)),
            ..Default::default()
        },
        address_type: family.address_type().to_owned(),
        endpoints: Some(endpoints),
        ports: Some(ports.collect()),
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
    use super::*;
    use crate::harness::Harness;
    use knarr_client::testing::Faults;
    use serde_json::Value;

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
}
