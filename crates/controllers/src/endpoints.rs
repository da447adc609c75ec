//! Endpoints: for each Service with a selector, the old-style object of the same name that lists its pods'
//! addresses. New clients read EndpointSlices.

use crate::context::REST_MAX;
use crate::service::{self, HEADLESS_LABEL};
use crate::{Context, pods};
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{EndpointAddress, EndpointPort, EndpointSubset, Endpoints, Pod, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use knarr_client::selector::Labels;
use knarr_client::{
    Controller, During, Error, EventType, Informer, ObjectKey, Reconcile, Recorder, Requeue, Result,
};
use knarr_client::{ignore_gone, patch};
use kube::api::{Api, DeleteParams, PostParams};
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// Addresses one object lists at most; more are cut off and the cut is told in an annotation.
const ADDRESSES_MAX: usize = 1000;
const OVER_CAPACITY: &str = "endpoints.kubernetes.io/over-capacity";
const MANAGED_BY: &str = "endpoints.kubernetes.io/managed-by";

pub fn start(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let services = context.informers.get::<Service>();
    let all_pods = context.informers.get::<Pod>();
    let endpoints = context.informers.get::<Endpoints>();
    let known = services.clone();
    let controller = Controller::new("endpoints")
        .paced(4, REST_MAX)
        .watch(&services)
        .watch(&endpoints)
        .watch_changes(&all_pods, move |change| service::keys_of_pod(&known, change));
    let recorder = context.recorder.for_component("endpoint-controller");
    let this = EndpointsLoop { context, recorder, services, pods: all_pods, endpoints };
    Box::pin(controller.run(Arc::new(this), shutdown))
}

struct EndpointsLoop {
    context: Context,
    recorder: Recorder,
    services: Informer<Service>,
    pods: Informer<Pod>,
    endpoints: Informer<Endpoints>,
}

impl Reconcile for EndpointsLoop {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let known = self.endpoints.get_key(&key);
        let Some(service) = self.services.get_key(&key) else {
            self.remove_left_over(&key, known.as_deref()).await?;
            return Ok(Requeue::Done);
        };
        if service::selector(&service).is_none() || service.metadata.deletion_timestamp.is_some() {
            return Ok(Requeue::Done);
        }
        let wanted = self.wanted(&service);
        let written = match known {
            None => self.create(&wanted, &key).await,
            Some(known) => self.update(&known, wanted, &key).await,
        };
        if let Err(error) = written {
            self.tell(&service, &key, &error);
            return Err(error);
        }
        Ok(Requeue::Done)
    }
}

impl EndpointsLoop {
    fn api(&self, key: &ObjectKey) -> Api<Endpoints> {
        Api::namespaced(self.context.client.clone(), &key.namespace)
    }

    /// The Service is gone and its endpoints with it, but only those this loop made: others' are not ours.
    async fn remove_left_over(&self, key: &ObjectKey, known: Option<&Endpoints>) -> Result<()> {
        let ours = |endpoints: &Endpoints| {
            endpoints.metadata.labels.iter().flatten().any(|(key, _)| key == MANAGED_BY)
        };
        if !known.is_some_and(ours) {
            return Ok(());
        }
        let deleted = self.api(key).delete(&key.name, &DeleteParams::default()).await;
        ignore_gone(deleted.during(|| format!("delete endpoints {key}")))
    }

    fn wanted(&self, service: &Service) -> Endpoints {
        let not_ready_too = service::publishes_not_ready(service);
        let mut subsets = Subsets::default();
        for pod in service::pods_of(service, &self.pods, not_ready_too) {
            subsets.add(service, &pod, not_ready_too || pods::is_ready(&pod));
        }
        let (subsets, cut) = subsets.finish();
        let mut labels: Labels = service.metadata.labels.clone().unwrap_or_default();
        labels.remove(HEADLESS_LABEL);
        if service::is_headless(service) {
            labels.insert(HEADLESS_LABEL.to_owned(), String::new());
        }
        labels.insert(MANAGED_BY.to_owned(), "endpoint-controller".to_owned());
        let annotations = cut.then(|| [(OVER_CAPACITY.to_owned(), "truncated".to_owned())].into());
        Endpoints {
            metadata: ObjectMeta {
                name: service.metadata.name.clone(),
                namespace: service.metadata.namespace.clone(),
                labels: Some(labels),
                annotations,
                ..Default::default()
            },
            subsets: Some(subsets).filter(|subsets| !subsets.is_empty()),
        }
    }

    async fn create(&self, wanted: &Endpoints, key: &ObjectKey) -> Result<()> {
        let created = self.api(key).create(&PostParams::default(), wanted).await;
        match created.during(|| format!("create endpoints {key}")) {
            Err(error) if error.is_namespace_terminating() => Ok(()),
            result => result.map(|_| ()),
        }
    }

    async fn update(&self, known: &Endpoints, wanted: Endpoints, key: &ObjectKey) -> Result<()> {
        let cut = |endpoints: &Endpoints| {
            endpoints
                .metadata
                .annotations
                .as_ref()
                .and_then(|annotations| annotations.get(OVER_CAPACITY))
                .cloned()
        };
        if known.subsets.as_deref().unwrap_or_default() == wanted.subsets.as_deref().unwrap_or_default()
            && known.metadata.labels == wanted.metadata.labels
            && cut(known) == cut(&wanted)
        {
            return Ok(());
        }
        let labels = patch::merge_diff(&json!(known.metadata.labels), &json!(wanted.metadata.labels));
        let mut change = json!({
            "metadata": {
                "uid": known.metadata.uid, "resourceVersion": known.metadata.resource_version,
                "annotations": {OVER_CAPACITY: cut(&wanted)},
            },
            "subsets": wanted.subsets,
        });
        if !labels.is_null() {
            change["metadata"]["labels"] = labels;
        }
        patch::merge(&self.api(key), &key.name, change).await.map(|_| ())
    }

    fn tell(&self, service: &Service, key: &ObjectKey, error: &Error) {
        if error.is_conflict() || error.is_already_exists() {
            return;
        }
        let message = format!("Failed to update endpoint {key}: {}", pods::message_of(error));
        self.recorder.event(service, EventType::Warning, "FailedToUpdateEndpoint", message);
    }
}

type Ports = Vec<(String, String, i32, Option<String>)>;

/// Addresses by the ports they offer.
#[derive(Default)]
struct Subsets {
    by_ports: BTreeMap<Ports, (Vec<EndpointAddress>, Vec<EndpointAddress>)>,
}

impl Subsets {
    fn add(&mut self, service: &Service, pod: &Pod, ready: bool) {
        let family = service::families(service)[0];
        let Some(ip) = service::addresses(pod).find(|ip| service::Family::of(*ip) == family) else { return };
        let address = EndpointAddress {
            ip: ip.to_string(),
            hostname: service::hostname(pod, service),
            node_name: pods::node_of(pod).map(str::to_owned),
            target_ref: Some(service::reference(pod)),
        };
        let service_ports = service.spec.as_ref().and_then(|spec| spec.ports.as_ref()).into_iter().flatten();
        let mut ports: Ports = service_ports
            .filter_map(|port| {
                let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
                let number = service::target_port(pod, port)?;
                Some((port.name.clone().unwrap_or_default(), protocol, number, port.app_protocol.clone()))
            })
            .collect();
        let has_ports =
            service.spec.as_ref().is_some_and(|spec| spec.ports.iter().flatten().next().is_some());
        // A pod without any of the Service's ports is not behind it.
        if has_ports && ports.is_empty() {
            return;
        }
        ports.sort();
        let (ready_ones, others) = self.by_ports.entry(ports).or_default();
        if ready { ready_ones.push(address) } else { others.push(address) }
    }

    /// In a fixed order, so that equal endpoints compare equal; and whether some had to be left out.
    fn finish(self) -> (Vec<EndpointSubset>, bool) {
        let mut room = ADDRESSES_MAX;
        let mut cut = false;
        let mut take = |mut addresses: Vec<EndpointAddress>| {
            addresses.sort_by(|a, b| a.ip.cmp(&b.ip));
            cut |= addresses.len() > room;
            addresses.truncate(room);
            room -= addresses.len();
            Some(addresses).filter(|addresses| !addresses.is_empty())
        };
        let subsets = self.by_ports.into_iter().map(|(ports, (ready, not_ready))| {
            let ports = ports.into_iter().map(|(name, protocol, port, app_protocol)| EndpointPort {
                name: Some(name).filter(|name| !name.is_empty()),
                port,
                protocol: Some(protocol),
                app_protocol,
            });
            let ports: Vec<_> = ports.collect();
            EndpointSubset {
                addresses: take(ready),
                not_ready_addresses: take(not_ready),
                ports: Some(ports).filter(|ports| !ports.is_empty()),
            }
        });
        let subsets: Vec<_> = subsets.collect();
        (subsets, cut)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpointslice::tests::{pod, service};
    use crate::harness::Harness;
    use knarr_client::testing::Faults;

    #[tokio::test(start_paused = true)]
    async fn endpoints_follow_pods_and_go_with_their_service() {
        for seed in 0..5 {
            let harness =
                Harness::new(seed, Faults { conflict: 0.2, error: 0.1, drop_watch: 0.3, duplicate: 0.3 });
            harness.start(start);
            harness.create::<Service>(service(json!({}))).await;
            for (name, ip, ready) in [("a", "10.0.0.1", true), ("b", "10.0.0.2", false)] {
                pod(&harness, name, ip, ready).await;
            }
            let split = |endpoints: &[Endpoints]| {
                let subset = endpoints.first().and_then(|endpoints| endpoints.subsets.as_ref()?.first());
                subset.is_some_and(|subset| {
                    let count = |list: &Option<Vec<EndpointAddress>>| list.as_ref().map_or(0, Vec::len);
                    count(&subset.addresses) == 1 && count(&subset.not_ready_addresses) == 1
                })
            };
            let endpoints = harness.api.wait_for::<Endpoints>("one ready, one not", split).await;
            let port = &endpoints[0].subsets.as_ref().unwrap()[0].ports.as_ref().unwrap()[0];
            assert_eq!((port.name.as_deref(), port.port), (Some("web"), 8080), "the named port is resolved");
            harness.api.set_faults(Faults::default());
            harness.assert_quiet().await;
            harness.delete::<Service>("web").await;
            harness.api.wait_for::<Endpoints>("no endpoints", |endpoints| endpoints.is_empty()).await;
        }
    }
}
