//! Starts all loops: one line each.

use crate::context::caches;
use crate::{Config, Context};
use futures::future::BoxFuture;
use knarr_client::{Client, Clock, Informers, leader};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

type Start = fn(Context, CancellationToken) -> BoxFuture<'static, ()>;

const LOOPS: &[(&str, Start)] = &[
    ("deployment", crate::deployment::start),
    ("replicaset", crate::replicaset::start),
    ("replication", crate::replicaset::start_replication_controllers),
    ("daemonset", crate::daemonset::start),
    ("statefulset", crate::statefulset::start),
    ("job", crate::job::start),
    ("job-orphans", crate::job::start_orphans),
    ("job-ttl", crate::job::start_ttl),
    ("cronjob", crate::cronjob::start),
    ("horizontal-pod-autoscaling", crate::autoscaler::start),
    ("disruption", crate::disruption::start),
    ("endpoints", crate::endpoints::start),
    ("endpointslice", crate::endpointslice::start),
    ("endpointslice-mirroring", crate::endpointslice::mirroring::start),
    ("namespace", crate::namespace::start),
    ("serviceaccount", crate::service_account::start),
    ("root-ca", crate::root_ca::start),
    ("node-ipam", crate::node_ipam::start),
    ("node-lifecycle", crate::node_lifecycle::start),
    ("taint-eviction", crate::node_lifecycle::start_eviction),
    ("pod-gc", crate::pod_gc::start),
    ("pvc-protection", crate::volume_protection::start),
    ("pv-protection", crate::volume_protection::start_volumes),
    ("service-cidr", crate::service_cidr::start),
    ("csrapproving", crate::certificates::start_approving),
    ("csrsigning", crate::certificates::start_signing),
    ("csrcleaner", crate::certificates::start_cleaning),
    ("bootstrapsigner", crate::bootstrap::start_signing),
    ("tokencleaner", crate::bootstrap::start_cleaning),
    ("ttl", crate::ttl::start),
    ("clusterrole-aggregation", crate::cluster_role_aggregation::start),
    ("resourceclaim", crate::resource_claim::start),
    ("resourceclaim-cleaner", crate::resource_claim::start_cleaning),
    // Last, so that it shares the typed watches of those above.
    ("garbage-collector", crate::garbage_collector::start),
];

/// All control loops of a cluster.
pub struct ControllerManager;

impl ControllerManager {
    /// Runs every loop until `shutdown`. `client` should carry the controllers' identity.
    pub async fn run(client: Client, config: Config, shutdown: CancellationToken) {
        Self::run_with(Context::new(client, config, Clock::System), shutdown).await;
    }

    /// The same over a context of the caller's making: to share informers with others in the process, or with
    /// another clock. With an election the loops run while this process holds the lease, each time with caches of their
    /// own: what they knew in an earlier term is worth nothing.
    pub async fn run_with(context: Context, shutdown: CancellationToken) {
        let Some(election) = context.config.election.clone() else {
            return run_loops(context, shutdown).await;
        };
        while !shutdown.is_cancelled() {
            let stop = shutdown.child_token();
            let lead = || lead(context.clone(), stop.clone());
            let (client, clock) = (context.client.clone(), context.clock.clone());
            if let Err(error) = leader::run(client, clock, election.clone(), shutdown.clone(), lead).await {
                tracing::warn!(%error, "the control loops stop until this process leads again");
            }
            stop.cancel();
        }
    }

    /// The names of all loops.
    pub fn names() -> impl Iterator<Item = &'static str> {
        LOOPS.iter().map(|(name, _)| *name)
    }
}

/// One term.
async fn lead(context: Context, shutdown: CancellationToken) {
    let informers = caches(context.client.clone());
    let _close = Close(informers.clone());
    run_loops(Context { informers, ..context }, shutdown).await;
}

/// Ends the watches of a term, however it ends.
struct Close(Informers);

impl Drop for Close {
    fn drop(&mut self) {
        self.0.close();
    }
}

async fn run_loops(context: Context, shutdown: CancellationToken) {
    let mut running = JoinSet::new();
    for (name, start) in LOOPS {
        tracing::debug!(controller = name, "starting");
        running.spawn(start(context.clone(), shutdown.clone()));
    }
    while let Some(ended) = running.join_next().await {
        if let Err(error) = ended
            && error.is_panic()
        {
            tracing::error!(%error, "a control loop died");
        }
    }
}

#[cfg(test)]
mod tests;
