//! Volume protection: a claim that a pod uses, and a volume that is bound, outlive their deletion. Admission gives them
//! the finalizer; these loops take it away when nothing needs them any more.

use crate::Context;
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use knarr_client::patch::remove_finalizer;
use knarr_client::{Controller, Informer, ObjectKey, Reconcile, Requeue, Result};
use kube::api::Api;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

const CLAIM_FINALIZER: &str = "kubernetes.io/pvc-protection";
const VOLUME_FINALIZER: &str = "kubernetes.io/pv-protection";
const BY_CLAIM: &str = "claim";

pub fn start(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let claims = context.informers.get::<PersistentVolumeClaim>();
    let pods = context.informers.get::<Pod>();
    pods.add_index(BY_CLAIM, |pod| claims_of(pod).iter().map(ToString::to_string).collect());
    let controller = Controller::new("pvc-protection").watch(&claims).watch_changes(&pods, |change| {
        if change.is_deleted() { claims_of(change.object()) } else { Vec::new() }
    });
    Box::pin(controller.run(Arc::new(Claims { context, claims, pods }), shutdown))
}

pub fn start_volumes(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let volumes = context.informers.get::<PersistentVolume>();
    let controller = Controller::new("pv-protection").watch(&volumes);
    Box::pin(controller.run(Arc::new(Volumes { context, volumes }), shutdown))
}

/// The claims a pod holds. A pod on no node holds none: no kubelet will start it with a claim that is going away.
fn claims_of(pod: &Pod) -> Vec<ObjectKey> {
    let Some(spec) = pod.spec.as_ref().filter(|spec| spec.node_name.as_ref().is_some_and(|n| !n.is_empty()))
    else {
        return Vec::new();
    };
    let namespace = pod.metadata.namespace.clone().unwrap_or_default();
    let owner = pod.metadata.name.as_deref().unwrap_or_default();
    let names = spec.volumes.iter().flatten().filter_map(|volume| {
        let claim = volume.persistent_volume_claim.as_ref().map(|source| source.claim_name.clone());
        claim.or_else(|| volume.ephemeral.as_ref().map(|_| format!("{owner}-{}", volume.name)))
    });
    names.map(|name| ObjectKey::new(&namespace, &name)).collect()
}

struct Claims {
    context: Context,
    claims: Informer<PersistentVolumeClaim>,
    pods: Informer<Pod>,
}

impl Reconcile for Claims {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let Some(claim) = self.claims.get_key(&key) else { return Ok(Requeue::Done) };
        let going = claim.metadata.deletion_timestamp.is_some();
        if going && self.pods.count_index(BY_CLAIM, &key.to_string()) == 0 {
            let api = Api::namespaced(self.context.client.clone(), &key.namespace);
            remove_finalizer(&api, &*claim, CLAIM_FINALIZER).await?;
        }
        Ok(Requeue::Done)
    }
}

struct Volumes {
    context: Context,
    volumes: Informer<PersistentVolume>,
}

impl Reconcile for Volumes {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let Some(volume) = self.volumes.get_key(&key) else { return Ok(Requeue::Done) };
        let bound = volume.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Bound");
        if volume.metadata.deletion_timestamp.is_some() && !bound {
            let api = Api::all(self.context.client.clone());
            remove_finalizer(&api, &*volume, VOLUME_FINALIZER).await?;
        }
        Ok(Requeue::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::Harness;
    use serde_json::json;

    #[tokio::test(start_paused = true)]
    async fn a_claim_goes_when_no_pod_uses_it_any_more() {
        let harness = Harness::quiet();
        harness.start(start);
        harness
            .create::<PersistentVolumeClaim>(
                json!({"metadata": {"name": "data", "finalizers": [CLAIM_FINALIZER]}}),
            )
            .await;
        harness
            .create::<Pod>(json!({"metadata": {"name": "user"}, "spec": {"nodeName": "n", "containers": [],
                "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "data"}}]}}))
            .await;
        harness.delete::<PersistentVolumeClaim>("data").await;
        harness.assert_quiet().await;
        harness.api.wait_for::<PersistentVolumeClaim>("the claim held", |claims| claims.len() == 1).await;
        let api = harness.api_of::<Pod>();
        let now = kube::api::DeleteParams { grace_period_seconds: Some(0), ..Default::default() };
        let _ = api.delete("user", &now).await;
        harness.api.wait_for::<PersistentVolumeClaim>("the claim gone", |claims| claims.is_empty()).await;
        harness.assert_quiet().await;
    }
}
