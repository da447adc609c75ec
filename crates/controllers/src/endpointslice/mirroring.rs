//! Mirrors Endpoints that somebody wrote by hand, for a Service without a selector, into EndpointSlices: what
//! proxies and DNS read. Upstream's `pkg/controller/endpointslicemirroring`.

use super::store::{Plan, Ports, SliceStore, pack};
use super::{MANAGED_BY, SERVICE_LABEL};
use crate::service::{self, Family};
use crate::{Context, pods};
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{EndpointAddress, EndpointSubset, Endpoints, Service};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use knarr_client::{Controller, EventType, Informer, ObjectKey, Reconcile, Recorder, Requeue, Result, owner};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

const MANAGER: &str = "endpointslicemirroring-controller.k8s.io";
const SKIP_LABEL: &str = "endpointslice.kubernetes.io/skip-mirror";
/// Endpoints that are a lock of the old leader election are not for anybody's traffic.
const LEADER: &str = "control-plane.alpha.kubernetes.io/leader";
/// Addresses mirrored of one subset. Upstream's value.
const ADDRESSES_MAX: usize = 1000;
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

pub fn start(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let services = context.informers.get::<Service>();
    let endpoints = context.informers.get::<Endpoints>();
    let this = Arc::new(Mirroring {
        recorder: context.recorder.for_component("endpoint-slice-mirroring-controller"),
        services: services.clone(),
        endpoints: endpoints.clone(),
        store: SliceStore::new(&context, MANAGER),
    });
    let observer = this.clone();
    let controller = Controller::new("endpointslice-mirroring")
        .watch(&services)
        .watch(&endpoints)
        .watch_changes(&this.store.slices, move |change| observer.store.slice_changed(change));
    Box::pin(controller.run(this, shutdown))
}

struct Mirroring {
    recorder: Recorder,
    services: Informer<Service>,
    endpoints: Informer<Endpoints>,
    store: SliceStore,
}

impl Reconcile for Mirroring {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        if let Some(wait) = self.store.expectations.pending(&key) {
            return Ok(Requeue::After(wait));
        }
        let service = self.services.get_key(&key).filter(|service| service::selector(service).is_none());
        let source =
            self.endpoints.get_key(&key).filter(|endpoints| service.is_some() && is_mirrored(endpoints));
        let known = self.store.of(&key);
        let mut plan = Plan::default();
        match &source {
            None => plan.delete = known,
            Some(endpoints) => {
                for family in FAMILIES {
                    let of_family = |slice: &&Arc<_>| is_of(slice, family);
                    let existing: Vec<_> = known.iter().filter(of_family).cloned().collect();
                    let wanted = self.wanted(endpoints, family);
                    if wanted.is_empty() {
                        plan.delete.extend(existing);
                    } else {
                        pack(&template(endpoints), family, wanted, existing, &mut plan);
                    }
                }
            }
        }
        let written = self.store.carry_out(&key, plan).await;
        if let (Err(error), Some(endpoints)) = (&written, &source)
            && !error.is_conflict()
        {
            let message =
                format!("Error updating Endpoint Slices for Endpoints {key}: {}", pods::message_of(error));
            self.recorder.event(&**endpoints, EventType::Warning, "FailedToUpdateEndpointSlices", message);
        }
        written.map(|()| Requeue::Done)
    }
}

fn is_of(slice: &k8s_openapi::api::discovery::v1::EndpointSlice, family: Family) -> bool {
    slice.address_type == family.address_type()
}

fn is_mirrored(endpoints: &Endpoints) -> bool {
    let labels = endpoints.metadata.labels.as_ref();
    let skipped = labels.and_then(|labels| labels.get(SKIP_LABEL)).is_some_and(|skip| skip == "true");
    let lock = endpoints.metadata.annotations.as_ref().is_some_and(|all| all.contains_key(LEADER));
    !skipped && !lock && endpoints.metadata.deletion_timestamp.is_none()
}

impl Mirroring {
    /// The endpoints of one family, by their ports.
    fn wanted(&self, endpoints: &Endpoints, family: Family) -> BTreeMap<Ports, Vec<Endpoint>> {
        let mut wanted: BTreeMap<Ports, Vec<Endpoint>> = BTreeMap::new();
        for subset in endpoints.subsets.iter().flatten() {
            let ready = subset.addresses.iter().flatten().map(|address| (address, true));
            let waiting = subset.not_ready_addresses.iter().flatten().map(|address| (address, false));
            let of_family = ready
                .chain(waiting)
                .filter(|(address, _)| address.ip.parse::<IpAddr>().is_ok_and(|ip| Family::of(ip) == family));
            let all: Vec<Endpoint> = of_family.map(|(address, ready)| endpoint(address, ready)).collect();
            if all.len() > ADDRESSES_MAX {
                let message = format!(
                    "A max of {ADDRESSES_MAX} addresses can be mirrored to EndpointSlices per Endpoints subset. {} addresses were skipped",
                    all.len() - ADDRESSES_MAX
                );
                self.recorder.event(endpoints, EventType::Warning, "TooManyAddressesToMirror", message);
            }
            if !all.is_empty() {
                wanted.entry(ports(subset)).or_default().extend(all.into_iter().take(ADDRESSES_MAX));
            }
        }
        wanted
    }
}

fn ports(subset: &EndpointSubset) -> Ports {
    let mut ports: Ports = subset
        .ports
        .iter()
        .flatten()
        .map(|port| {
            let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
            (port.name.clone().unwrap_or_default(), protocol, port.port, port.app_protocol.clone())
        })
        .collect();
    ports.sort();
    ports
}

fn endpoint(address: &EndpointAddress, ready: bool) -> Endpoint {
    Endpoint {
        addresses: vec![address.ip.clone()],
        conditions: Some(EndpointConditions { ready: Some(ready), ..Default::default() }),
        hostname: address.hostname.clone(),
        node_name: address.node_name.clone(),
        target_ref: address.target_ref.clone(),
        ..Default::default()
    }
}

/// What every mirror carries: the labels of its source, which it belongs to.
fn template(endpoints: &Endpoints) -> ObjectMeta {
    let name = endpoints.metadata.name.clone().unwrap_or_default();
    let mut labels = endpoints.metadata.labels.clone().unwrap_or_default();
    labels.insert(SERVICE_LABEL.to_owned(), name.clone());
    labels.insert(MANAGED_BY.to_owned(), MANAGER.to_owned());
    ObjectMeta {
        generate_name: Some(format!("{name}-")),
        namespace: endpoints.metadata.namespace.clone(),
        labels: Some(labels),
        owner_references: Some(vec![owner::controller_ref(endpoints)]),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::service;
    use super::*;
    use crate::harness::Harness;
    use k8s_openapi::api::discovery::v1::EndpointSlice;
    use knarr_client::testing::Faults;
    use serde_json::{Value, json};

    fn by_hand(addresses: Value) -> Value {
        json!({"metadata": {"name": "web"}, "subsets": [{"addresses": addresses, "ports": [{"port": 8080}]}]})
    }

    fn ips(slices: &[EndpointSlice]) -> Vec<String> {
        let endpoints = slices.iter().flat_map(|slice| slice.endpoints.iter().flatten());
        let mut ips: Vec<_> = endpoints.map(|endpoint| endpoint.addresses[0].clone()).collect();
        ips.sort();
        ips
    }

    #[tokio::test(start_paused = true)]
    async fn endpoints_by_hand_are_mirrored_and_the_mirror_follows_and_goes() {
        for seed in 0..5 {
            let faults = Faults { conflict: 0.2, error: 0.1, drop_watch: 0.2, duplicate: 0.3 };
            let harness = Harness::new(seed, faults);
            harness.start(start);
            harness.create::<Service>(service(json!({"selector": null}))).await;
            harness.create::<Endpoints>(by_hand(json!([{"ip": "192.0.2.1"}, {"ip": "2001:db8::1"}]))).await;
            let two =
                |slices: &[EndpointSlice]| slices.len() == 2 && ips(slices) == ["192.0.2.1", "2001:db8::1"];
            harness.api.wait_for::<EndpointSlice>("one slice a family", two).await;
            let subsets = by_hand(json!([{"ip": "192.0.2.2"}]))["subsets"].clone();
            harness.patch::<Endpoints>("web", json!({"subsets": subsets})).await;
            let one = |slices: &[EndpointSlice]| ips(slices) == ["192.0.2.2"];
            let slices = harness.api.wait_for::<EndpointSlice>("the new address", one).await;
            assert_eq!(slices[0].ports.as_ref().unwrap()[0].port, Some(8080));
            harness.api.set_faults(Faults::default());
            harness.assert_quiet().await;
            harness.delete::<Endpoints>("web").await;
            harness.api.wait_for::<EndpointSlice>("none", |slices| slices.is_empty()).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn those_of_a_service_with_a_selector_or_a_label_against_it_are_not_mirrored() {
        for (selector, labels) in
            [(json!({"app": "web"}), json!({})), (Value::Null, json!({SKIP_LABEL: "true"}))]
        {
            let harness = Harness::quiet();
            harness.start(start);
            harness.create::<Service>(service(json!({"selector": selector}))).await;
            let mut endpoints = by_hand(json!([{"ip": "192.0.2.1"}]));
            endpoints["metadata"]["labels"] = labels;
            harness.create::<Endpoints>(endpoints).await;
            harness.api.settle(std::time::Duration::from_secs(30)).await;
            assert!(harness.api.objects::<EndpointSlice>().is_empty());
        }
    }
}
