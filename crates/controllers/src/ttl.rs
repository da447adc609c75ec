//! Tells each node's agent how long it may keep Secrets and ConfigMaps without asking again: the longer the more nodes
//! there are. Upstream's `pkg/controller/ttl`.

use crate::Context;
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::Node;
use knarr_client::{Change, Controller, Informer, ObjectKey, Reconcile, Requeue, Result, ignore_gone, patch};
use kube::api::Api;
use parking_lot::Mutex;
use serde_json::json;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

const ANNOTATION: &str = "node.alpha.kubernetes.io/ttl";
/// From how many nodes on, up to how many, and the seconds then. The steps overlap, so that a node more or less does
/// not rewrite all.
const STEPS: [(usize, usize, u32); 5] =
    [(0, 100, 0), (90, 500, 15), (450, 1000, 30), (900, 2000, 60), (1800, usize::MAX, 300)];

pub fn start(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let nodes = context.informers.get::<Node>();
    let (known, step) = (nodes.clone(), Arc::new(Mutex::new(0)));
    let current = step.clone();
    let controller = Controller::new("ttl").watch_changes(&nodes, move |change| {
        if !concerns(change) {
            return Vec::new();
        }
        let moved = {
            let mut step = current.lock();
            let before = *step;
            *step = step_for(known.len(), before);
            *step != before
        };
        let all = if moved { known.list() } else { vec![change.object().clone()] };
        all.iter().map(|node| ObjectKey::of(&**node)).collect()
    });
    Box::pin(controller.run(Arc::new(Ttl { context, nodes, step }), shutdown))
}

/// Heartbeats change nothing here.
fn concerns(change: &Change<Node>) -> bool {
    let of = |node: &Node| node.metadata.annotations.as_ref().and_then(|all| all.get(ANNOTATION).cloned());
    change.old().is_none_or(|old| of(old) != of(change.object()))
}

fn step_for(nodes: usize, mut step: usize) -> usize {
    while nodes > STEPS[step].1 {
        step += 1;
    }
    while nodes < STEPS[step].0 {
        step -= 1;
    }
    step
}

struct Ttl {
    context: Context,
    nodes: Informer<Node>,
    step: Arc<Mutex<usize>>,
}

impl Reconcile for Ttl {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let Some(node) = self.nodes.get_key(&key) else { return Ok(Requeue::Done) };
        let wanted = STEPS[*self.step.lock()].2.to_string();
        let present = node.metadata.annotations.as_ref().and_then(|all| all.get(ANNOTATION));
        if present != Some(&wanted) {
            let api: Api<Node> = Api::all(self.context.client.clone());
            let change = json!({"metadata": {"uid": node.metadata.uid, "annotations": {ANNOTATION: wanted}}});
            ignore_gone(patch::merge(&api, &key.name, change).await)?;
        }
        Ok(Requeue::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::Harness;
    use kube::api::DeleteParams;

    #[test]
    fn the_steps_overlap() {
        let cases = [
            (0, 0, 0),
            (100, 0, 0),
            (101, 0, 1),
            (95, 1, 1),
            (89, 1, 0),
            (2001, 0, 4),
            (1799, 4, 3),
            (5, 4, 0),
        ];
        for (nodes, from, to) in cases {
            assert_eq!(step_for(nodes, from), to, "{nodes} nodes after step {from}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn all_nodes_are_told_when_the_cluster_grows_and_shrinks() {
        let harness = Harness::quiet();
        harness.start(start);
        let told = |seconds: &'static str| {
            move |nodes: &[Node]| {
                let has = |node: &Node| {
                    node.metadata.annotations.as_ref().and_then(|all| all.get(ANNOTATION).cloned())
                };
                nodes.iter().all(|node| has(node).as_deref() == Some(seconds))
            }
        };
        for n in 0..101 {
            harness.create_global::<Node>(json!({"metadata": {"name": format!("n{n}")}})).await;
            if n == 50 {
                harness.api.wait_for::<Node>("nothing kept", told("0")).await;
            }
        }
        harness.api.wait_for::<Node>("15 seconds", told("15")).await;
        harness.assert_quiet().await;
        let api: Api<Node> = Api::all(harness.client());
        for n in 0..12 {
            api.delete(&format!("n{n}"), &DeleteParams::default()).await.unwrap();
        }
        harness.api.wait_for::<Node>("nothing kept again", told("0")).await;
    }
}
