//! Aggregated cluster roles: a ClusterRole with an aggregation rule holds the rules of all roles its selectors pick.

use crate::Context;
use futures::future::BoxFuture;
use k8s_openapi::api::rbac::v1::{ClusterRole, PolicyRule};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use knarr_client::{Controller, Informer, ObjectKey, Reconcile, Requeue, Result, ignore_gone, patch};
use kube::api::Api;
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

pub fn start(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let roles = context.informers.get::<ClusterRole>();
    let known = roles.clone();
    let controller = Controller::new("clusterrole-aggregation").watch_changes(&roles, move |_| {
        // Any role may be picked by any aggregate, or may just have ceased to be.
        let aggregates = known.list().into_iter().filter(|role| role.aggregation_rule.is_some());
        aggregates.map(|role| ObjectKey::of(&*role)).collect()
    });
    Box::pin(controller.run(Arc::new(Aggregation { context, roles }), shutdown))
}

struct Aggregation {
    context: Context,
    roles: Informer<ClusterRole>,
}

impl Reconcile for Aggregation {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let Some(role) = self.roles.get_key(&key) else { return Ok(Requeue::Done) };
        let Some(aggregation) = &role.aggregation_rule else { return Ok(Requeue::Done) };
        let mut others: Vec<Arc<ClusterRole>> = self.roles.list();
        others.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
        let mut rules: Vec<PolicyRule> = Vec::new();
        for selector in aggregation.cluster_role_selectors.iter().flatten() {
            let picked = others.iter().filter(|other| {
                other.metadata.name != role.metadata.name && matches(selector, &other.metadata.labels)
            });
            for rule in picked.flat_map(|other| other.rules.iter().flatten()) {
                if !rules.contains(rule) {
                    rules.push(rule.clone());
                }
            }
        }
        if role.rules.clone().unwrap_or_default() != rules {
            let api: Api<ClusterRole> = Api::all(self.context.client.clone());
            ignore_gone(patch::merge(&api, &key.name, json!({ "rules": rules })).await)?;
        }
        Ok(Requeue::Done)
    }
}

fn matches(selector: &LabelSelector, labels: &Option<BTreeMap<String, String>>) -> bool {
    let value = |key: &str| labels.as_ref().and_then(|labels| labels.get(key));
    let equal = selector.match_labels.iter().flatten().all(|(key, wanted)| value(key) == Some(wanted));
    equal
        && selector.match_expressions.iter().flatten().all(|item| {
            let (have, values) = (value(&item.key), item.values.as_deref().unwrap_or_default());
            match item.operator.as_str() {
                "In" => have.is_some_and(|v| values.contains(v)),
                "NotIn" => have.is_none_or(|v| !values.contains(v)),
                "Exists" => have.is_some(),
                "DoesNotExist" => have.is_none(),
                _ => false,
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::Harness;

    #[tokio::test(start_paused = true)]
    async fn an_aggregate_follows_the_roles_it_picks() {
        let harness = Harness::quiet();
        harness.start(start);
        let rule = json!([{"apiGroups": ["x.io"], "resources": ["things"], "verbs": ["get"]}]);
        harness
            .create_global::<ClusterRole>(json!({"metadata": {"name": "all"}, "rules": [],
                "aggregationRule": {"clusterRoleSelectors": [{"matchLabels": {"to": "all"}}]}}))
            .await;
        harness
            .create_global::<ClusterRole>(
                json!({"metadata": {"name": "part", "labels": {"to": "all"}}, "rules": rule}),
            )
            .await;
        let filled = |roles: &[ClusterRole]| {
            roles.iter().any(|r| {
                r.metadata.name.as_deref() == Some("all")
                    && r.rules.as_ref().is_some_and(|rules| rules.len() == 1)
            })
        };
        harness.api.wait_for::<ClusterRole>("the aggregate filled", filled).await;
        harness.assert_quiet().await;
    }
}
