//! Pods that lost their job while they were tracked: nobody will count them, so their finalizer goes.

use super::{FINALIZER, is_tracked};
use crate::Context;
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::Pod;
use knarr_client::{Controller, Informer, ObjectKey, Reconcile, Requeue, Result, owner, patch};
use kube::api::Api;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

pub fn start_orphans(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let pods = context.informers.get::<Pod>();
    let controller = Controller::new("job-orphans").watch_changes(&pods, |change| {
        let pod = change.object();
        let orphaned = !change.is_deleted() && is_orphan(pod);
        orphaned.then(|| ObjectKey::of(&**pod)).into_iter().collect()
    });
    Box::pin(controller.run(Arc::new(Orphans { context, pods }), shutdown))
}

struct Orphans {
    context: Context,
    pods: Informer<Pod>,
}

impl Reconcile for Orphans {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let Some(pod) = self.pods.get_key(&key).filter(|pod| is_orphan(pod)) else {
            return Ok(Requeue::Done);
        };
        // Guarded by the pod's version: a job that adopts it meanwhile tracks it again.
        let api: Api<Pod> = Api::namespaced(self.context.client.clone(), &key.namespace);
        patch::remove_finalizer(&api, &*pod, FINALIZER).await?;
        Ok(Requeue::Done)
    }
}

fn is_orphan(pod: &Pod) -> bool {
    is_tracked(pod) && owner::controller_of(&pod.metadata).is_none()
}
