//! ServiceCIDRs: one that is there is made ready, so that addresses are given out of it; one that is deleted goes when
//! no address needs it any more (`pkg/controller/servicecidrs`).

use crate::Context;
use futures::future::BoxFuture;
use k8s_openapi::api::networking::v1::{IPAddress, ServiceCIDR};
use knarr_client::patch::remove_finalizer;
use knarr_client::{Controller, During, Informer, ObjectKey, Reconcile, Requeue, Result};
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

const FINALIZER: &str = "networking.k8s.io/service-cidr-finalizer";
const READY: &str = "Ready";
/// How long after its deletion a range stays at least: an address given out of it at that moment is seen by then.
const GRACE: Duration = Duration::from_secs(10);

pub fn start(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let ranges = context.informers.get::<ServiceCIDR>();
    let addresses = context.informers.get::<IPAddress>();
    let terminating = ranges.clone();
    // An address that goes may let a range go; one range more or less may cover what another one did.
    let controller =
        Controller::new("service-cidr").watch(&ranges).watch_changes(&addresses, move |change| {
            if change.is_deleted() { keys_of_terminating(&terminating) } else { Vec::new() }
        });
    let others = ranges.clone();
    let controller = controller.watch_changes(&ranges, move |_| keys_of_terminating(&others));
    Box::pin(controller.run(Arc::new(Ranges { context, ranges, addresses }), shutdown))
}

fn keys_of_terminating(ranges: &Informer<ServiceCIDR>) -> Vec<ObjectKey> {
    let all = ranges.list();
    let going = all.iter().filter(|range| range.metadata.deletion_timestamp.is_some());
    going.map(|range| ObjectKey::of(&**range)).collect()
}

struct Ranges {
    context: Context,
    ranges: Informer<ServiceCIDR>,
    addresses: Informer<IPAddress>,
}

impl Reconcile for Ranges {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let Some(range) = self.ranges.get_key(&key) else { return Ok(Requeue::Done) };
        let api = Api::<ServiceCIDR>::all(self.context.client.clone());
        let Some(deleted) = &range.metadata.deletion_timestamp else {
            if !range.metadata.finalizers.iter().flatten().any(|have| have == FINALIZER) {
                return self.protect(&api, &range).await;
            }
            self.tell(&range, "True", "", "Kubernetes Service CIDR is ready").await?;
            return Ok(Requeue::Done);
        };
        if self.is_needed(&range) {
            let message = "There are still IPAddresses referencing the ServiceCIDR, please remove them or create a new ServiceCIDR";
            self.tell(&range, "False", "Terminating", message).await?;
            return Ok(Requeue::Done);
        }
        let due = deleted.0 + jiff::SignedDuration::try_from(GRACE).unwrap_or_default();
        let left = self.context.clock.until(due);
        if !left.is_zero() {
            return Ok(Requeue::After(left));
        }
        remove_finalizer(&api, &*range, FINALIZER).await?;
        Ok(Requeue::Done)
    }
}

impl Ranges {
    /// Adds the finalizer; the change brings the range here again.
    async fn protect(&self, api: &Api<ServiceCIDR>, range: &ServiceCIDR) -> Result<Requeue> {
        let mut finalizers = range.metadata.finalizers.clone().unwrap_or_default();
        finalizers.push(FINALIZER.to_owned());
        let version = &range.metadata.resource_version;
        let patch = json!({ "metadata": { "resourceVersion": version, "finalizers": finalizers } });
        let name = range.metadata.name.as_deref().unwrap_or_default();
        let patched = api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await;
        patched.during(|| format!("protect service range {name}"))?;
        Ok(Requeue::Done)
    }

    /// Whether an address would be in no range without this one.
    fn is_needed(&self, range: &ServiceCIDR) -> bool {
        let blocks = |range: &ServiceCIDR| -> Vec<Block> {
            let cidrs = range.spec.iter().flat_map(|spec| spec.cidrs.iter().flatten());
            cidrs.filter_map(|cidr| Block::parse(cidr)).collect()
        };
        let others = self.ranges.list();
        let others = others.iter().filter(|other| {
            other.metadata.name != range.metadata.name && other.metadata.deletion_timestamp.is_none()
        });
        let others: Vec<Block> = others.flat_map(|other| blocks(other)).collect();
        let own = blocks(range);
        let of_services = |address: &IPAddress| {
            let parent = &address.spec.parent_ref;
            parent.resource == "services" && parent.group.as_deref().unwrap_or("").is_empty()
        };
        let addresses = self.addresses.list();
        let mut held = addresses
            .iter()
            .filter(|address| of_services(address))
            .filter_map(|address| address.metadata.name.as_deref()?.parse::<IpAddr>().ok());
        held.any(|address| {
            own.iter().any(|b| b.contains(address)) && !others.iter().any(|b| b.contains(address))
        })
    }

    async fn tell(&self, range: &ServiceCIDR, status: &str, reason: &str, message: &str) -> Result<()> {
        let conditions = range.status.iter().flat_map(|status| status.conditions.iter().flatten());
        let before = conditions.into_iter().find(|condition| condition.type_ == READY);
        if before.is_some_and(|before| before.status == status && before.reason == reason) {
            return Ok(());
        }
        let condition = json!({ "type": READY, "status": status, "reason": reason, "message": message,
            "lastTransitionTime": self.context.clock.time() });
        let patch = json!({
            "metadata": { "resourceVersion": range.metadata.resource_version },
            "status": { "conditions": [condition] },
        });
        let api = Api::<ServiceCIDR>::all(self.context.client.clone());
        let name = range.metadata.name.as_deref().unwrap_or_default();
        let patched = api.patch_status(name, &PatchParams::default(), &Patch::Merge(patch)).await;
        patched.during(|| format!("tell the state of service range {name}"))?;
        Ok(())
    }
}

/// A range of addresses.
struct Block {
    base: IpAddr,
    prefix: u32,
}

impl Block {
    fn parse(text: &str) -> Option<Block> {
        let (base, prefix) = text.split_once('/')?;
        Some(Block { base: base.parse().ok()?, prefix: prefix.parse().ok()? })
    }

    fn contains(&self, address: IpAddr) -> bool {
        match (self.base, address) {
            (IpAddr::V4(base), IpAddr::V4(v4)) => {
                let shift = 32_u32.saturating_sub(self.prefix);
                let network = |ip: u32| ip.checked_shr(shift).unwrap_or(0);
                network(base.into()) == network(v4.into())
            }
            (IpAddr::V6(base), IpAddr::V6(v6)) => {
                let shift = 128_u32.saturating_sub(self.prefix);
                let network = |ip: u128| ip.checked_shr(shift).unwrap_or(0);
                network(base.into()) == network(v6.into())
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::Harness;
    use kube::api::DeleteParams;

    fn is_ready(range: &ServiceCIDR, status: &str) -> bool {
        let conditions = range.status.iter().flat_map(|status| status.conditions.iter().flatten());
        conditions.into_iter().any(|condition| condition.type_ == READY && condition.status == status)
    }

    #[tokio::test(start_paused = true)]
    async fn a_range_is_made_ready_and_stays_while_an_address_needs_it() {
        let harness = Harness::quiet();
        harness.start(start);
        let ranges = Api::<ServiceCIDR>::all(harness.api.client());
        let addresses = Api::<IPAddress>::all(harness.api.client());
        let range = json!({ "metadata": { "name": "more" }, "spec": { "cidrs": ["10.99.0.0/24"] } });
        ranges.create(&Default::default(), &serde_json::from_value(range).unwrap()).await.unwrap();
        harness
            .api
            .wait_for::<ServiceCIDR>("the range ready", |all| all.iter().any(|range| is_ready(range, "True")))
            .await;
        let parent = json!({ "resource": "services", "namespace": "default", "name": "s" });
        let address = json!({ "metadata": { "name": "10.99.0.7" }, "spec": { "parentRef": parent } });
        addresses.create(&Default::default(), &serde_json::from_value(address).unwrap()).await.unwrap();
        harness.assert_quiet().await;
        let now = DeleteParams::default();
        ranges.delete("more", &now).await.unwrap();
        harness
            .api
            .wait_for::<ServiceCIDR>("why it stays", |all| all.iter().any(|range| is_ready(range, "False")))
            .await;
        harness.assert_quiet().await;
        addresses.delete("10.99.0.7", &now).await.unwrap();
        harness.api.wait_for::<ServiceCIDR>("the range gone", |all| all.is_empty()).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_range_goes_when_another_one_covers_its_addresses() {
        let harness = Harness::quiet();
        harness.start(start);
        let ranges = Api::<ServiceCIDR>::all(harness.api.client());
        for (name, cidr) in [("small", "10.99.0.0/24"), ("large", "10.99.0.0/16")] {
            let range = json!({ "metadata": { "name": name }, "spec": { "cidrs": [cidr] } });
            ranges.create(&Default::default(), &serde_json::from_value(range).unwrap()).await.unwrap();
        }
        let parent = json!({ "resource": "services", "namespace": "default", "name": "s" });
        let address = json!({ "metadata": { "name": "10.99.0.7" }, "spec": { "parentRef": parent } });
        let addresses = Api::<IPAddress>::all(harness.api.client());
        addresses.create(&Default::default(), &serde_json::from_value(address).unwrap()).await.unwrap();
        harness
            .api
            .wait_for::<ServiceCIDR>("both ready", |all| {
                all.iter().filter(|r| is_ready(r, "True")).count() == 2
            })
            .await;
        ranges.delete("small", &DeleteParams::default()).await.unwrap();
        harness.api.wait_for::<ServiceCIDR>("the small one gone", |all| all.len() == 1).await;
    }
}
