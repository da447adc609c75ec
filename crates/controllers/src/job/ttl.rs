//! TTL after finished: deletes finished jobs when their time is over.

use super::is_finished;
use crate::Context;
use futures::future::BoxFuture;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::batch::v1::Job;
use knarr_client::{
    Controller, During, Informer, ObjectKey, Reconcile, Requeue, Result, ignore_gone, or_none,
};
use kube::api::{Api, DeleteParams, Preconditions};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

pub fn start_ttl(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let jobs = context.informers.get::<Job>();
    let controller = Controller::new("job-ttl").watch(&jobs);
    Box::pin(controller.run(Arc::new(Ttl { context, jobs }), shutdown))
}

struct Ttl {
    context: Context,
    jobs: Informer<Job>,
}

impl Reconcile for Ttl {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let Some(due) = self.jobs.get_key(&key).and_then(|job| due(&job)) else { return Ok(Requeue::Done) };
        let left = self.context.clock.until(due);
        if !left.is_zero() {
            // Whole seconds are compared, so look a moment later.
            return Ok(Requeue::After(left + Duration::from_millis(1)));
        }
        let api: Api<Job> = Api::namespaced(self.context.client.clone(), &key.namespace);
        // The time may have been extended since: the server knows.
        let fresh = or_none(api.get(&key.name).await.during(|| format!("read job {key}")))?;
        let Some(fresh) = fresh.filter(|fresh| self::due(fresh) == Some(due)) else {
            return Ok(Requeue::Done);
        };
        let params = DeleteParams {
            preconditions: Some(Preconditions {
                uid: fresh.metadata.uid,
                resource_version: fresh.metadata.resource_version,
            }),
            ..DeleteParams::foreground()
        };
        ignore_gone(api.delete(&key.name, &params).await.during(|| format!("delete finished job {key}")))?;
        Ok(Requeue::Done)
    }
}

/// When a finished job is to be deleted.
fn due(job: &Job) -> Option<Timestamp> {
    let ttl = job.spec.as_ref()?.ttl_seconds_after_finished?;
    if !is_finished(job) || job.metadata.deletion_timestamp.is_some() {
        return None;
    }
    let conditions = job.status.as_ref()?.conditions.iter().flatten();
    let last = |type_: &str| matches!(type_, "Complete" | "Failed");
    let finished = conditions
        .filter(|c| last(&c.type_) && c.status == "True")
        .find_map(|c| c.last_transition_time.clone())?;
    finished.0.saturating_add(SignedDuration::from_secs(ttl.into())).ok()
}
