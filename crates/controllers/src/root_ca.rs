//! Root CA: every namespace has the ConfigMap `kube-root-ca.crt`, by which pods trust the API server.

use crate::Context;
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use knarr_client::informer::Selection;
use knarr_client::{Controller, During, Informer, ObjectKey, Reconcile, Requeue, Result, ignore_gone, patch};
use kube::api::{Api, PostParams};
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

const NAME: &str = "kube-root-ca.crt";
const DATA_KEY: &str = "ca.crt";
const DESCRIPTION_KEY: &str = "kubernetes.io/description";
const DESCRIPTION: &str = "Contains a CA bundle that can be used to verify the kube-apiserver when using internal \
                           endpoints such as the internal service IP or kubernetes.default.svc. No other usage is \
                           guaranteed across distributions of Kubernetes clusters.";

pub fn start(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    if context.config.root_ca.is_empty() {
        return Box::pin(async { tracing::warn!("no root CA is configured, none is published") });
    }
    let namespaces = context.informers.get::<Namespace>();
    let maps = context.informers.select::<ConfigMap>(Selection::fields(format!("metadata.name={NAME}")));
    let controller = Controller::new("root-ca")
        .watch(&namespaces)
        .watch_map(&maps, |map| map.metadata.namespace.iter().map(ObjectKey::cluster).collect());
    Box::pin(controller.run(Arc::new(RootCa { context, namespaces, maps }), shutdown))
}

struct RootCa {
    context: Context,
    namespaces: Informer<Namespace>,
    maps: Informer<ConfigMap>,
}

impl Reconcile for RootCa {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let namespace = self.namespaces.get_key(&key);
        if namespace.is_none_or(|namespace| namespace.metadata.deletion_timestamp.is_some()) {
            return Ok(Requeue::Done);
        }
        match self.maps.get(&key.name, NAME) {
            None => self.create(&key.name).await?,
            Some(map) if !self.is_right(&map) => self.repair(&key.name).await?,
            Some(_) => {}
        }
        Ok(Requeue::Done)
    }
}

impl RootCa {
    fn is_right(&self, map: &ConfigMap) -> bool {
        let described = map
            .metadata
            .annotations
            .iter()
            .flatten()
            .any(|(key, value)| key == DESCRIPTION_KEY && value == DESCRIPTION);
        described && map.data.as_ref() == Some(&self.data())
    }

    fn data(&self) -> BTreeMap<String, String> {
        [(DATA_KEY.to_owned(), self.context.config.root_ca.clone())].into()
    }

    fn api(&self, namespace: &str) -> Api<ConfigMap> {
        Api::namespaced(self.context.client.clone(), namespace)
    }

    async fn create(&self, namespace: &str) -> Result<()> {
        let map = ConfigMap {
            metadata: ObjectMeta {
                name: Some(NAME.to_owned()),
                annotations: Some([(DESCRIPTION_KEY.to_owned(), DESCRIPTION.to_owned())].into()),
                ..Default::default()
            },
            data: Some(self.data()),
            ..Default::default()
        };
        let created = self.api(namespace).create(&PostParams::default(), &map).await;
        match created.during(|| format!("create config map {namespace}/{NAME}")) {
            Err(error) if !error.is_already_exists() && !error.is_namespace_terminating() => Err(error),
            _ => Ok(()),
        }
    }

    async fn repair(&self, namespace: &str) -> Result<()> {
        // Keys that do not belong are removed as well: the map is replaced as a whole.
        let known = self.maps.get(namespace, NAME);
        let mut data = json!(self.data());
        for key in known.iter().flat_map(|map| map.data.iter().flatten()).map(|(key, _)| key) {
            if key != DATA_KEY {
                data[key] = serde_json::Value::Null;
            }
        }
        let change = json!({"metadata": {"annotations": {DESCRIPTION_KEY: DESCRIPTION}}, "data": data});
        ignore_gone(patch::merge(&self.api(namespace), NAME, change).await)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::Harness;

    #[tokio::test(start_paused = true)]
    async fn the_bundle_is_published_and_repaired() {
        let harness = Harness::quiet();
        harness.start(start);
        harness.create_global::<Namespace>(json!({"metadata": {"name": crate::harness::NAMESPACE}})).await;
        harness.api.wait_for::<ConfigMap>("the bundle", |maps| maps.len() == 1).await;
        harness.patch::<ConfigMap>(NAME, json!({"data": {"ca.crt": "forged", "more": "x"}})).await;
        let right =
            |maps: &[ConfigMap]| maps[0].data == Some([(DATA_KEY.to_owned(), "PEM".to_owned())].into());
        harness.api.wait_for::<ConfigMap>("the bundle repaired", right).await;
        harness.assert_quiet().await;
    }
}
