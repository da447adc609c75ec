//! EndpointSlices of one manager: packed a hundred endpoints to a slice with as few changes as possible, and
//! written without ever acting on a cache that has not seen the last turn.

use super::{MANAGED_BY, SERVICE_LABEL};
use crate::service::Family;
use crate::{Context, pods};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use knarr_client::expectations::Expectations;
use knarr_client::{Change, Client, During, Informer, ObjectKey, Result, ignore_gone, patch};
use kube::api::{Api, DeleteParams, PostParams};
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Endpoints in a slice at most. Upstream's value.
pub const ENDPOINTS_MAX: usize = 100;

/// The slices one manager keeps.
pub struct SliceStore {
    client: Client,
    /// What the manager calls itself in the label `endpointslice.kubernetes.io/managed-by`; also the name of the
    /// index by the key of the Service.
    manager: &'static str,
    pub slices: Informer<EndpointSlice>,
    pub expectations: Expectations,
}

/// What has to be written.
#[derive(Default)]
pub struct Plan {
    pub create: Vec<EndpointSlice>,
    pub update: Vec<(Arc<EndpointSlice>, EndpointSlice)>,
    pub delete: Vec<Arc<EndpointSlice>>,
}

impl SliceStore {
    pub fn new(context: &Context, manager: &'static str) -> Self {
        let slices = context.informers.get::<EndpointSlice>();
        slices.add_index(manager, move |slice| {
            key_of(slice, manager).map(|key| key.to_string()).into_iter().collect()
        });
        SliceStore { client: context.client.clone(), manager, slices, expectations: Expectations::new() }
    }

    /// The manager's slices for a Service.
    pub fn of(&self, key: &ObjectKey) -> Vec<Arc<EndpointSlice>> {
        self.slices.by_index(self.manager, &key.to_string())
    }

    /// Which Services a slice's change concerns; on the way, fulfils expectations.
    pub fn slice_changed(&self, change: &Change<EndpointSlice>) -> Vec<ObjectKey> {
        let slice = change.object();
        let keys: Vec<_> = [Some(slice), change.old()]
            .into_iter()
            .flatten()
            .filter_map(|slice| key_of(slice, self.manager))
            .collect();
        if let Some(key) = keys.first() {
            let uid = pods::uid(&slice.metadata);
            self.expectations.creation_seen(key, uid);
            if change.is_deleted() {
                self.expectations.deletion_seen(key, uid);
            }
        }
        keys
    }

    /// Writes a plan. Done without an error when the namespace is going away.
    pub async fn carry_out(&self, key: &ObjectKey, plan: Plan) -> Result<()> {
        let api: Api<EndpointSlice> = Api::namespaced(self.client.clone(), &key.namespace);
        // Added before removed, so that no address is missing in between.
        for slice in plan.create {
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

/// The Service a slice of `manager` belongs to.
fn key_of(slice: &EndpointSlice, manager: &str) -> Option<ObjectKey> {
    let labels = slice.metadata.labels.as_ref()?;
    if labels.get(MANAGED_BY).map(String::as_str) != Some(manager) {
        return None;
    }
    Some(ObjectKey::new(slice.metadata.namespace.clone()?, labels.get(SERVICE_LABEL)?.clone()))
}

/// Name, protocol, number and application protocol of each port, sorted.
pub type Ports = Vec<(String, String, i32, Option<String>)>;

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
pub fn identity(endpoint: &Endpoint) -> (String, Vec<String>) {
    let uid = endpoint.target_ref.as_ref().and_then(|target| target.uid.clone()).unwrap_or_default();
    (uid, endpoint.addresses.clone())
}

/// Plans one address family, for new slices with the metadata of `template`: endpoints stay in the slice they are in; new ones fill slices that change anyway, then
/// the fullest that can take the rest, then new slices.
pub fn pack(
    template: &ObjectMeta,
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
        pack_ports(template, family, &ports, endpoints, existing, plan);
    }
    plan.delete.extend(existing_by_ports.into_values().flatten());
}

fn pack_ports(
    template: &ObjectMeta,
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
        plan.create.push(slice_of(template, family, ports, some));
    }
    let mut left = kept.iter().filter(|(_, stay)| !stay.is_empty()).count();
    for (slice, stay) in kept {
        if stay.is_empty() && (left > 0 || !plan_is_empty_for(plan, family, ports)) {
            plan.delete.push(slice);
            continue;
        }
        left += 1;
        let new = slice_of(template, family, ports, stay);
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

fn slice_of(template: &ObjectMeta, family: Family, ports: &Ports, endpoints: Vec<Endpoint>) -> EndpointSlice {
    let ports = ports.iter().map(|(name, protocol, port, app_protocol)| EndpointPort {
        name: Some(name.clone()),
        protocol: Some(protocol.clone()),
        port: Some(*port),
        app_protocol: app_protocol.clone(),
    });
    EndpointSlice {
        metadata: template.clone(),
        address_type: family.address_type().to_owned(),
        endpoints: Some(endpoints),
        ports: Some(ports.collect()),
    }
}
