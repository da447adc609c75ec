//! Typed caches of the cluster's objects. [`Informers`] keeps one watch per kind (and selection) for the whole
//! process; every loop that asks for the same kind shares the cache. List, watch, bookmarks, resumption, back-off
//! and the relist after `410 Gone` are `kube::runtime::watcher`'s; what is ours is the shared, indexed store and
//! the ordered notification of changes.
//!
//! Order: the store changes first, then the handlers hear of it, one change at a time. So a handler that looks
//! into the store sees at least what it is told. Lock order: `handlers` before `state`.

use crate::ObjectKey;
use futures::{Stream, StreamExt};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, ApiResource, DynamicObject, PartialObjectMeta};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, Resource};
use parking_lot::{Mutex, RwLock};
use serde::de::DeserializeOwned;
use std::any::{Any, TypeId};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Debug;
use std::sync::Arc;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;

/// What happened to one object. `Updated` is only told when the resource version differs.
#[derive(Debug)]
pub enum Change<K> {
    Added(Arc<K>),
    Updated {
        old: Arc<K>,
        new: Arc<K>,
    },
    /// The last state known; after a lost watch this may not be the very last one.
    Deleted(Arc<K>),
}

impl<K> Change<K> {
    /// The newest state known.
    pub fn object(&self) -> &Arc<K> {
        match self {
            Change::Added(object) | Change::Deleted(object) => object,
            Change::Updated { new, .. } => new,
        }
    }

    /// The state before an update.
    pub fn old(&self) -> Option<&Arc<K>> {
        match self {
            Change::Updated { old, .. } => Some(old),
            _ => None,
        }
    }

    pub fn is_deleted(&self) -> bool {
        matches!(self, Change::Deleted(_))
    }
}

/// What a metadata-only listener hears.
#[derive(Debug, Clone, Copy)]
pub enum MetaChange<'a> {
    Applied(&'a ObjectMeta),
    Deleted(&'a ObjectMeta),
}

/// A kind a typed informer can hold.
pub trait Cached: Resource + Clone + DeserializeOwned + Debug + Send + Sync + 'static {}
impl<K: Resource + Clone + DeserializeOwned + Debug + Send + Sync + 'static> Cached for K {}

/// Which objects of a kind to watch, and what to keep of each.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// A field selector (`spec.nodeName=node-1`); empty for all.
    pub fields: String,
    /// A label selector; empty for all.
    pub labels: String,
    /// Only this namespace; empty for all.
    pub namespace: String,
}

impl Selection {
    pub fn fields(selector: impl Into<String>) -> Self {
        Selection { fields: selector.into(), ..Default::default() }
    }

    pub fn namespace(namespace: impl Into<String>) -> Self {
        Selection { namespace: namespace.into(), ..Default::default() }
    }

    fn config(&self) -> watcher::Config {
        let mut config = watcher::Config::default();
        // `metadata.namespace` is selectable for every kind, so one path serves every scope.
        let namespace = match self.namespace.as_str() {
            "" => String::new(),
            namespace => format!("metadata.namespace={namespace}"),
        };
        let fields = [self.fields.as_str(), &namespace].into_iter().filter(|part| !part.is_empty());
        let fields = fields.collect::<Vec<_>>().join(",");
        if !fields.is_empty() {
            config = config.fields(&fields);
        }
        if !self.labels.is_empty() {
            config = config.labels(&self.labels);
        }
        config
    }
}

/// All informers of the process; clones share them. Dropping the last clone ends their watches.
#[derive(Clone)]
pub struct Informers {
    shared: Arc<Shared>,
    /// Whom the holder of this clone acts as.
    client: Client,
}

struct Shared {
    client: Client,
    entries: Mutex<HashMap<EntryKey, Entry>>,
    /// A `Trim<K>` by the type of `K`.
    trims: Mutex<HashMap<TypeId, Box<dyn Any + Send + Sync>>>,
}

/// Drops from an object what nobody here reads.
type Trim<K> = fn(&mut K);

#[derive(PartialEq, Eq, Hash)]
struct EntryKey {
    group: String,
    plural: String,
    metadata_only: bool,
    fields: String,
    labels: String,
    namespace: String,
}

impl EntryKey {
    fn new(group: &str, plural: &str, metadata_only: bool, selection: &Selection) -> Self {
        EntryKey {
            group: group.to_owned(),
            plural: plural.to_owned(),
            metadata_only,
            fields: selection.fields.clone(),
            labels: selection.labels.clone(),
            namespace: selection.namespace.clone(),
        }
    }
}

struct Entry {
    /// An `Informer<K>`.
    informer: Box<dyn Any + Send + Sync>,
    meta: MetaInformer,
    task: AbortHandle,
}

impl Drop for Shared {
    fn drop(&mut self) {
        for entry in self.entries.get_mut().values() {
            entry.task.abort();
        }
    }
}

impl Informers {
    pub fn new(client: Client) -> Self {
        let shared = Shared { client: client.clone(), entries: Mutex::default(), trims: Mutex::default() };
        Informers { shared: Arc::new(shared), client }
    }

    /// The same caches for somebody else of this process, who writes under a name of their own.
    pub fn acting_as(&self, client: Client) -> Self {
        Informers { shared: self.shared.clone(), client }
    }

    /// The client of the holder; the watches keep using the first one's.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// What to drop from objects of kind `K` before they are kept. Call it before anybody asks for an informer of `K`.
    pub fn trim<K: Cached>(&self, trim: fn(&mut K)) {
        self.shared.trims.lock().insert(TypeId::of::<K>(), Box::new(trim));
    }

    /// The informer of all objects of kind `K`; the first call starts its watch. Must run inside tokio.
    pub fn get<K>(&self) -> Informer<K>
    where
        K: Cached + Resource<DynamicType = ()>,
    {
        self.select(Selection::default())
    }

    /// The informer of some objects of kind `K`. Equal selections share one watch.
    pub fn select<K>(&self, selection: Selection) -> Informer<K>
    where
        K: Cached + Resource<DynamicType = ()>,
    {
        let key = EntryKey::new(&K::group(&()), &K::plural(&()), false, &selection);
        let mut entries = self.shared.entries.lock();
        if let Some(informer) = entries.get(&key).and_then(|entry| entry.informer.downcast_ref()) {
            return Informer::clone(informer);
        }
        let trim =
            self.shared.trims.lock().get(&TypeId::of::<K>()).and_then(|trim| trim.downcast_ref()).copied();
        let informer = Informer::new(trim.unwrap_or(|_| {}));
        let (api, config) = (Api::<K>::all(self.shared.client.clone()), selection.config());
        let events = move || watcher(api.clone(), config.clone());
        let task = tokio::spawn(drive(informer.clone(), events)).abort_handle();
        let meta = MetaInformer(Arc::new(informer.clone()));
        entries.insert(key, Entry { informer: Box::new(informer.clone()), meta, task });
        informer
    }

    /// The metadata of all objects of a kind known only at run time. Shares the watch of a typed informer of the
    /// same kind where one runs already; otherwise starts a metadata-only watch, and keeps only identity, owners,
    /// finalizers and deletion of each object.
    pub fn metadata(&self, resource: &ApiResource) -> MetaInformer {
        let all = Selection::default();
        let mut entries = self.shared.entries.lock();
        let typed = EntryKey::new(&resource.group, &resource.plural, false, &all);
        if let Some(entry) = entries.get(&typed) {
            return entry.meta.clone();
        }
        let key = EntryKey::new(&resource.group, &resource.plural, true, &all);
        if let Some(entry) = entries.get(&key) {
            return entry.meta.clone();
        }
        let api = Api::<PartialObjectMeta<DynamicObject>>::all_with(self.shared.client.clone(), resource);
        let informer = Informer::new(|object: &mut PartialObjectMeta<DynamicObject>| {
            keep_graph_fields(&mut object.metadata)
        });
        let events = move || watcher(api.clone(), watcher::Config::default());
        let task = tokio::spawn(drive(informer.clone(), events)).abort_handle();
        let meta = MetaInformer(Arc::new(informer.clone()));
        entries.insert(key, Entry { informer: Box::new(informer), meta: meta.clone(), task });
        meta
    }

    /// Ends all watches and forgets who listens: for whoever starts afresh with informers of their own. What is asked of
    /// these later starts new watches. Not to be called from a handler.
    pub fn close(&self) {
        let entries = std::mem::take(&mut *self.shared.entries.lock());
        for entry in entries.into_values() {
            entry.task.abort();
            entry.meta.0.forget_listeners();
        }
    }

    /// Ends the metadata watch of a kind that no longer exists. A typed watch stays.
    pub fn stop_metadata(&self, resource: &ApiResource) {
        let key = EntryKey::new(&resource.group, &resource.plural, true, &Selection::default());
        if let Some(entry) = self.shared.entries.lock().remove(&key) {
            entry.task.abort();
        }
    }
}

/// A metadata-only cache keeps what ownership needs.
fn keep_graph_fields(meta: &mut ObjectMeta) {
    meta.annotations = None;
    meta.labels = None;
    meta.self_link = None;
    meta.generate_name = None;
}

/// Feeds watches into a cache until the task is aborted.
async fn drive<K: Cached, S>(informer: Informer<K>, watch: impl Fn() -> S)
where
    S: Stream<Item = watcher::Result<watcher::Event<K>>>,
{
    loop {
        follow(&informer, watch()).await;
    }
}

/// Feeds one watch into a cache. Returns when the watch has to start over with a list: some servers answer a watch
/// from a forgotten version with HTTP 410 instead of an error event, which the watcher would repeat for ever.
async fn follow<K: Cached>(
    informer: &Informer<K>,
    events: impl Stream<Item = watcher::Result<watcher::Event<K>>>,
) {
    let events = events.default_backoff();
    let mut events = std::pin::pin!(events);
    let mut relist: Option<BTreeMap<ObjectKey, K>> = None;
    while let Some(event) = events.next().await {
        match event {
            Ok(watcher::Event::Init) => relist = Some(BTreeMap::new()),
            Ok(watcher::Event::InitApply(mut object)) => {
                informer.inner.trim(&mut object);
                relist.get_or_insert_default().insert(ObjectKey::of(&object), object);
            }
            Ok(watcher::Event::InitDone) => informer.inner.replace(relist.take().unwrap_or_default()),
            Ok(watcher::Event::Apply(object)) => informer.inner.apply(object),
            Ok(watcher::Event::Delete(object)) => {
                informer.inner.delete(&ObjectKey::of(&object), Some(object))
            }
            Err(error) => {
                tracing::debug!(kind = std::any::type_name::<K>(), %error, "watch failed, retrying");
                if matches!(&error, watcher::Error::WatchStartFailed(kube::Error::Api(status)) if status.code == 410)
                {
                    return;
                }
            }
        }
    }
}

/// The cache of one kind; clones share it.
pub struct Informer<K> {
    inner: Arc<Inner<K>>,
}

impl<K> Clone for Informer<K> {
    fn clone(&self) -> Self {
        Informer { inner: self.inner.clone() }
    }
}

type Handler<K> = Box<dyn Fn(&Change<K>) + Send + Sync>;
type IndexFn<K> = Box<dyn Fn(&K) -> Vec<String> + Send + Sync>;

struct Inner<K> {
    trim: Trim<K>,
    handlers: Mutex<Vec<Handler<K>>>,
    state: RwLock<State<K>>,
    synced: watch::Sender<bool>,
}

struct State<K> {
    objects: BTreeMap<ObjectKey, Arc<K>>,
    indexes: BTreeMap<&'static str, Index<K>>,
}

struct Index<K> {
    values_of: IndexFn<K>,
    keys: HashMap<String, BTreeSet<ObjectKey>>,
}

impl<K> Index<K> {
    fn insert(&mut self, key: &ObjectKey, object: &K) {
        for value in (self.values_of)(object) {
            self.keys.entry(value).or_default().insert(key.clone());
        }
    }

    fn remove(&mut self, key: &ObjectKey, object: &K) {
        for value in (self.values_of)(object) {
            if let Some(keys) = self.keys.get_mut(&value) {
                keys.remove(key);
                if keys.is_empty() {
                    self.keys.remove(&value);
                }
            }
        }
    }
}

impl<K> State<K> {
    fn insert(&mut self, key: ObjectKey, object: Arc<K>) -> Option<Arc<K>> {
        let old = self.objects.insert(key.clone(), object.clone());
        for index in self.indexes.values_mut() {
            if let Some(old) = &old {
                index.remove(&key, old);
            }
            index.insert(&key, &object);
        }
        old
    }

    fn remove(&mut self, key: &ObjectKey) -> Option<Arc<K>> {
        let old = self.objects.remove(key)?;
        for index in self.indexes.values_mut() {
            index.remove(key, &old);
        }
        Some(old)
    }
}

impl<K: Cached> Inner<K> {
    fn trim(&self, object: &mut K) {
        object.meta_mut().managed_fields = None;
        (self.trim)(object);
    }

    fn apply(&self, object: K) {
        let handlers = self.handlers.lock();
        if let Some(change) = self.store(object) {
            notify(&handlers, &change);
        }
    }

    /// `None` when nothing changed.
    fn store(&self, mut object: K) -> Option<Change<K>> {
        self.trim(&mut object);
        let key = ObjectKey::of(&object);
        let new = Arc::new(object);
        let mut state = self.state.write();
        let same = state.objects.get(&key).is_some_and(|old| {
            old.meta().resource_version == new.meta().resource_version && same_uid(&**old, &*new)
        });
        if same {
            return None;
        }
        Some(match state.insert(key, new.clone()) {
            None => Change::Added(new),
            Some(old) => Change::Updated { old, new },
        })
    }

    fn delete(&self, key: &ObjectKey, last: Option<K>) {
        let handlers = self.handlers.lock();
        let removed = self.state.write().remove(key);
        let Some(removed) = removed else { return };
        let last = match last {
            Some(mut object) => {
                self.trim(&mut object);
                Arc::new(object)
            }
            None => removed,
        };
        notify(&handlers, &Change::Deleted(last));
    }

    /// The result of a fresh list: what is missing in it was deleted while nobody watched.
    fn replace(&self, objects: BTreeMap<ObjectKey, K>) {
        let gone: Vec<ObjectKey> = {
            let state = self.state.read();
            let replaced = |(key, old): &(&ObjectKey, &Arc<K>)| match objects.get(*key) {
                None => true,
                Some(new) => !same_uid(&***old, new),
            };
            state.objects.iter().filter(replaced).map(|(key, _)| key.clone()).collect()
        };
        for key in gone {
            self.delete(&key, None);
        }
        for object in objects.into_values() {
            self.apply(object);
        }
        self.synced.send_replace(true);
    }
}

fn same_uid<K: Resource>(a: &K, b: &K) -> bool {
    a.meta().uid == b.meta().uid
}

fn notify<K>(handlers: &[Handler<K>], change: &Change<K>) {
    for handler in handlers {
        handler(change);
    }
}

impl<K: Cached> Informer<K> {
    fn new(trim: Trim<K>) -> Self {
        let state = State { objects: BTreeMap::new(), indexes: BTreeMap::new() };
        let inner = Inner {
            trim,
            handlers: Mutex::new(Vec::new()),
            state: RwLock::new(state),
            synced: watch::Sender::new(false),
        };
        Informer { inner: Arc::new(inner) }
    }

    /// The object, if the cache has it.
    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<K>> {
        self.get_key(&ObjectKey::new(namespace, name))
    }

    pub fn get_key(&self, key: &ObjectKey) -> Option<Arc<K>> {
        self.inner.state.read().objects.get(key).cloned()
    }

    /// All objects, ordered by namespace and name.
    pub fn list(&self) -> Vec<Arc<K>> {
        self.inner.state.read().objects.values().cloned().collect()
    }

    /// All objects of one namespace, ordered by name.
    pub fn list_in(&self, namespace: &str) -> Vec<Arc<K>> {
        let state = self.inner.state.read();
        let from = ObjectKey::new(namespace, "");
        state
            .objects
            .range(from..)
            .take_while(|(key, _)| key.namespace == namespace)
            .map(|(_, object)| object.clone())
            .collect()
    }

    /// Number of objects.
    pub fn len(&self) -> usize {
        self.inner.state.read().objects.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds an index: `values_of` says under which values an object is found by [`Informer::by_index`]. Adding a
    /// name twice keeps the first.
    pub fn add_index(
        &self,
        name: &'static str,
        values_of: impl Fn(&K) -> Vec<String> + Send + Sync + 'static,
    ) {
        let mut state = self.inner.state.write();
        if state.indexes.contains_key(name) {
            return;
        }
        let mut index = Index { values_of: Box::new(values_of), keys: HashMap::new() };
        for (key, object) in &state.objects {
            index.insert(key, object);
        }
        state.indexes.insert(name, index);
    }

    /// The objects found under `value` in an index added before, ordered by namespace and name; none for an index
    /// that was never added.
    pub fn by_index(&self, name: &str, value: &str) -> Vec<Arc<K>> {
        let state = self.inner.state.read();
        let keys = state.indexes.get(name).and_then(|index| index.keys.get(value));
        keys.into_iter().flatten().filter_map(|key| state.objects.get(key).cloned()).collect()
    }

    /// How many objects [`Informer::by_index`] would find.
    pub fn count_index(&self, name: &str, value: &str) -> usize {
        let state = self.inner.state.read();
        state.indexes.get(name).and_then(|index| index.keys.get(value)).map_or(0, BTreeSet::len)
    }

    /// Calls `handler` for every object already known (as `Added`) and then for every change, in order, one at a
    /// time. Handlers run on the watch's task: they must be quick and must not add handlers to the same informer.
    pub fn on_change(&self, handler: impl Fn(&Change<K>) + Send + Sync + 'static) {
        let mut handlers = self.inner.handlers.lock();
        for object in self.list() {
            handler(&Change::Added(object));
        }
        handlers.push(Box::new(handler));
    }

    /// A stream of the keys that changed, de-duplicated: a slow reader finds each key once. Starts with all keys
    /// known. Read the present state from the informer.
    pub fn subscribe(&self) -> Keys {
        let keys = Keys::default();
        let pending = keys.clone();
        self.on_change(move |change| pending.insert(ObjectKey::of(&**change.object())));
        keys
    }

    /// Whether the first list is complete.
    pub fn synced(&self) -> bool {
        *self.inner.synced.borrow()
    }

    /// Waits until the first list is complete.
    pub async fn wait_synced(&self) {
        // The sender lives in `self`, so waiting cannot fail.
        let _ = self.inner.synced.subscribe().wait_for(|synced| *synced).await;
    }
}

/// Keys that changed since they were last read; see [`Informer::subscribe`].
#[derive(Clone, Default)]
pub struct Keys {
    shared: Arc<(Mutex<BTreeSet<ObjectKey>>, Notify)>,
}

impl Keys {
    fn insert(&self, key: ObjectKey) {
        if self.shared.0.lock().insert(key) {
            self.shared.1.notify_one();
        }
    }

    /// The next changed key; waits for one.
    pub async fn next(&self) -> ObjectKey {
        loop {
            let changed = self.shared.1.notified();
            if let Some(key) = self.try_next() {
                return key;
            }
            changed.await;
        }
    }

    /// The next changed key, if there is one now.
    pub fn try_next(&self) -> Option<ObjectKey> {
        self.shared.0.lock().pop_first()
    }
}

/// Metadata of one kind; see [`Informers::metadata`].
#[derive(Clone)]
pub struct MetaInformer(Arc<dyn MetaSource>);

impl MetaInformer {
    /// Like [`Informer::on_change`], for metadata.
    pub fn on_change(&self, handler: impl Fn(MetaChange<'_>) + Send + Sync + 'static) {
        self.0.on_meta(Box::new(handler));
    }

    pub fn synced(&self) -> bool {
        self.0.is_synced()
    }

    pub async fn wait_synced(&self) {
        let mut synced = self.0.synced_signal();
        let _ = synced.wait_for(|synced| *synced).await;
    }
}

trait MetaSource: Send + Sync {
    fn on_meta(&self, handler: Box<dyn Fn(MetaChange<'_>) + Send + Sync>);
    fn is_synced(&self) -> bool;
    fn synced_signal(&self) -> watch::Receiver<bool>;
    fn forget_listeners(&self);
}

impl<K: Cached> MetaSource for Informer<K> {
    fn on_meta(&self, handler: Box<dyn Fn(MetaChange<'_>) + Send + Sync>) {
        self.on_change(move |change| match change {
            Change::Deleted(object) => handler(MetaChange::Deleted(object.meta())),
            _ => handler(MetaChange::Applied(change.object().meta())),
        });
    }

    fn is_synced(&self) -> bool {
        self.synced()
    }

    fn synced_signal(&self) -> watch::Receiver<bool> {
        self.inner.synced.subscribe()
    }

    fn forget_listeners(&self) {
        // Dropped after the lock: a handler may hold other informers, and these this one.
        let handlers = std::mem::take(&mut *self.inner.handlers.lock());
        drop(handlers);
    }
}
