//! ServiceAccount: every namespace has the account `default`.

use crate::Context;
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{Namespace, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use knarr_client::informer::Selection;
use knarr_client::{Controller, During, Informer, ObjectKey, Reconcile, Requeue, Result};
use kube::api::{Api, PostParams};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

const NAME: &str = "default";

pub fn start(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let namespaces = context.informers.get::<Namespace>();
    let accounts =
        context.informers.select::<ServiceAccount>(Selection::fields(format!("metadata.name={NAME}")));
    let controller = Controller::new("serviceaccount")
        .watch(&namespaces)
        .watch_map(&accounts, |account| account.metadata.namespace.iter().map(ObjectKey::cluster).collect());
    Box::pin(controller.run(Arc::new(ServiceAccounts { context, namespaces, accounts }), shutdown))
}

struct ServiceAccounts {
    context: Context,
    namespaces: Informer<Namespace>,
    accounts: Informer<ServiceAccount>,
}

impl Reconcile for ServiceAccounts {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let alive = |namespace: &Namespace| namespace.metadata.deletion_timestamp.is_none();
        let exists = self.namespaces.get_key(&key).is_some_and(|namespace| alive(&namespace));
        if !exists || self.accounts.get(&key.name, NAME).is_some() {
            return Ok(Requeue::Done);
        }
        let metadata = ObjectMeta { name: Some(NAME.to_owned()), ..Default::default() };
        let account = ServiceAccount { metadata, ..Default::default() };
        let api: Api<ServiceAccount> = Api::namespaced(self.context.client.clone(), &key.name);
        let created = api.create(&PostParams::default(), &account).await;
        match created.during(|| format!("create service account {}/{NAME}", key.name)) {
            Err(error) if !error.is_already_exists() && !error.is_namespace_terminating() => Err(error),
            _ => Ok(Requeue::Done),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::Harness;
    use serde_json::json;

    #[tokio::test(start_paused = true)]
    async fn the_default_account_comes_with_its_namespace_and_comes_back() {
        let harness = Harness::quiet();
        harness.start(start);
        harness.create_global::<Namespace>(json!({"metadata": {"name": crate::harness::NAMESPACE}})).await;
        harness.api.wait_for::<ServiceAccount>("the account", |accounts| accounts.len() == 1).await;
        harness.delete::<ServiceAccount>(NAME).await;
        harness.api.wait_for::<ServiceAccount>("the account again", |accounts| accounts.len() == 1).await;
        harness.assert_quiet().await;
    }
}
