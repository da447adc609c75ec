//! ConfigMaps and Secrets that pods of this node refer to: one watch per object, for as long as some pod needs
//! it, and a wake-up for these pods when it changes. A kubelet may read no other ones (the Node authorizer), so a
//! shared informer would be refused.

use crate::env::Lookup;
use futures::StreamExt;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use knarr_client::ObjectKey;
use knarr_client::informer::Cached;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource};
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;

/// The watches of this node; clones share them.
#[derive(Clone)]
pub struct References {
    client: Client,
    maps: Arc<Table<ConfigMap>>,
    secrets: Arc<Table<Secret>>,
}

type Table<K> = Mutex<BTreeMap<ObjectKey, Weak<Watched<K>>>>;

/// One object under watch; the watch ends when the last holder drops it.
struct Watched<K> {
    /// `None` until the first answer; then the object, or that there is none.
    state: watch::Receiver<Option<Option<Arc<K>>>>,
    readers: Arc<Mutex<Vec<Weak<Notify>>>>,
    task: AbortHandle,
}

impl<K> Drop for Watched<K> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl References {
    pub fn new(client: Client) -> Self {
        References { client, maps: Arc::default(), secrets: Arc::default() }
    }

    /// Watches everything the pod refers to; `wake` is told of changes while the result lives.
    pub fn of_pod(&self, pod: &Pod, wake: &Arc<Notify>) -> PodReferences {
        let namespace = crate::names::namespace(pod);
        let (maps, secrets) = referred(pod);
        PodReferences {
            maps: self.all(&self.maps, namespace, maps, wake),
            secrets: self.all(&self.secrets, namespace, secrets, wake),
        }
    }

    fn all<K>(
        &self,
        table: &Table<K>,
        namespace: &str,
        names: BTreeSet<String>,
        wake: &Arc<Notify>,
    ) -> Held<K>
    where
        K: Cached + Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        let hold = |name: String| {
            let watched = self.one(table, ObjectKey::new(namespace, &name));
            let mut readers = watched.readers.lock();
            readers.retain(|reader| reader.strong_count() > 0);
            readers.push(Arc::downgrade(wake));
            drop(readers);
            (name, watched)
        };
        names.into_iter().map(hold).collect()
    }

    fn one<K>(&self, table: &Table<K>, key: ObjectKey) -> Arc<Watched<K>>
    where
        K: Cached + Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        let mut table = table.lock();
        if let Some(watched) = table.get(&key).and_then(Weak::upgrade) {
            return watched;
        }
        table.retain(|_, watched| watched.strong_count() > 0);
        let api = Api::<K>::namespaced(self.client.clone(), &key.namespace);
        let (sender, state) = watch::channel(None);
        let readers = Arc::<Mutex<Vec<Weak<Notify>>>>::default();
        let task = tokio::spawn(follow(api, key.name.clone(), sender, readers.clone())).abort_handle();
        let watched = Arc::new(Watched { state, readers, task });
        table.insert(key, Arc::downgrade(&watched));
        watched
    }
}

async fn follow<K: Cached>(
    api: Api<K>,
    name: String,
    state: watch::Sender<Option<Option<Arc<K>>>>,
    readers: Arc<Mutex<Vec<Weak<Notify>>>>,
) {
    let tell = |object: Option<K>| {
        let object = object.map(|mut object| {
            object.meta_mut().managed_fields = None;
            Arc::new(object)
        });
        state.send_replace(Some(object));
        for reader in readers.lock().iter().filter_map(Weak::upgrade) {
            reader.notify_one();
        }
    };
    loop {
        let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
        let mut events = std::pin::pin!(watcher(api.clone(), config).default_backoff());
        let mut listed = None;
        while let Some(event) = events.next().await {
            match event {
                Ok(watcher::Event::Init) => listed = None,
                Ok(watcher::Event::InitApply(object)) => listed = Some(object),
                Ok(watcher::Event::InitDone) => tell(listed.take()),
                Ok(watcher::Event::Apply(object)) => tell(Some(object)),
                Ok(watcher::Event::Delete(_)) => tell(None),
                Err(error) => tracing::debug!(%error, name, "watch of a pod's reference failed, retrying"),
            }
        }
    }
}

type Held<K> = BTreeMap<String, Arc<Watched<K>>>;

/// What one pod refers to.
#[derive(Default)]
pub struct PodReferences {
    maps: Held<ConfigMap>,
    secrets: Held<Secret>,
}

impl PodReferences {
    /// Waits until every object, or its absence, is known.
    pub async fn wait(&self) {
        for watched in self.maps.values() {
            // The sender lives as long as the task, and the task as long as `watched`.
            let _ = watched.state.clone().wait_for(Option::is_some).await;
        }
        for watched in self.secrets.values() {
            let _ = watched.state.clone().wait_for(Option::is_some).await;
        }
    }
}

fn read<K>(held: &Held<K>, kind: &str, name: &str) -> Result<Option<Arc<K>>, String> {
    let state = held.get(name).and_then(|watched| watched.state.borrow().clone());
    state.ok_or_else(|| format!("failed to sync {kind} cache: {name:?} is not known yet"))
}

impl Lookup for PodReferences {
    fn config_map(&self, name: &str) -> Result<Option<Arc<ConfigMap>>, String> {
        read(&self.maps, "configmap", name)
    }

    fn secret(&self, name: &str) -> Result<Option<Arc<Secret>>, String> {
        read(&self.secrets, "secret", name)
    }
}

/// Names of the ConfigMaps and Secrets a pod refers to.
pub fn referred(pod: &Pod) -> (BTreeSet<String>, BTreeSet<String>) {
    let (mut maps, mut secrets) = (BTreeSet::new(), BTreeSet::new());
    let Some(spec) = &pod.spec else { return (maps, secrets) };
    let ephemeral: Vec<_> = spec.ephemeral_containers.iter().flatten().map(crate::names::ordinary).collect();
    for container in spec.containers.iter().chain(spec.init_containers.iter().flatten()).chain(&ephemeral) {
        for source in container.env_from.iter().flatten() {
            maps.extend(source.config_map_ref.iter().map(|source| source.name.clone()));
            secrets.extend(source.secret_ref.iter().map(|source| source.name.clone()));
        }
        for source in container.env.iter().flatten().filter_map(|variable| variable.value_from.as_ref()) {
            maps.extend(source.config_map_key_ref.iter().map(|source| source.name.clone()));
            secrets.extend(source.secret_key_ref.iter().map(|source| source.name.clone()));
        }
    }
    for volume in spec.volumes.iter().flatten() {
        maps.extend(volume.config_map.iter().map(|source| source.name.clone()));
        secrets.extend(volume.secret.iter().filter_map(|source| source.secret_name.clone()));
        for source in volume.projected.iter().flat_map(|projected| projected.sources.iter().flatten()) {
            maps.extend(source.config_map.iter().map(|source| source.name.clone()));
            secrets.extend(source.secret.iter().map(|source| source.name.clone()));
        }
    }
    secrets.extend(spec.image_pull_secrets.iter().flatten().map(|secret| secret.name.clone()));
    (maps, secrets)
}
