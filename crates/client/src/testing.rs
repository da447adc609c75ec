//! An in-memory API for tests of control loops: a tower service that behaves like an API server where loops can
//! tell the difference (resource versions, conflicts, finalizers, graceful deletion, generation, status and scale
//! subresources, binding, eviction, `generateName`, watches, discovery), with faults a test can ask for. It does no
//! defaulting, validation, authentication or server-side apply.
//!
//! Tests use it through [`FakeApi::client`] only, so they can run against a real API server as well.

use crate::selector::Labels;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use jiff::{SignedDuration, Timestamp};
use kube::client::Body;
use kube::{Client, Resource};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// How long [`FakeApi::wait_for`] waits (in tokio's time, so a paused clock makes it instant).
pub const WAIT_MAX: Duration = Duration::from_secs(3600);

/// group, version, plural, kind, namespaced
const KINDS: &[(&str, &str, &str, &str, bool)] = &[
    ("", "v1", "configmaps", "ConfigMap", true),
    ("", "v1", "endpoints", "Endpoints", true),
    ("", "v1", "events", "Event", true),
    ("", "v1", "namespaces", "Namespace", false),
    ("", "v1", "nodes", "Node", false),
    ("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim", true),
    ("", "v1", "persistentvolumes", "PersistentVolume", false),
    ("", "v1", "pods", "Pod", true),
    ("", "v1", "replicationcontrollers", "ReplicationController", true),
    ("", "v1", "resourcequotas", "ResourceQuota", true),
    ("", "v1", "secrets", "Secret", true),
    ("", "v1", "serviceaccounts", "ServiceAccount", true),
    ("", "v1", "services", "Service", true),
    ("apps", "v1", "controllerrevisions", "ControllerRevision", true),
    ("apps", "v1", "daemonsets", "DaemonSet", true),
    ("apps", "v1", "deployments", "Deployment", true),
    ("apps", "v1", "replicasets", "ReplicaSet", true),
    ("apps", "v1", "statefulsets", "StatefulSet", true),
    ("autoscaling", "v2", "horizontalpodautoscalers", "HorizontalPodAutoscaler", true),
    ("authorization.k8s.io", "v1", "subjectaccessreviews", "SubjectAccessReview", false),
    ("batch", "v1", "cronjobs", "CronJob", true),
    ("batch", "v1", "jobs", "Job", true),
    ("certificates.k8s.io", "v1", "certificatesigningrequests", "CertificateSigningRequest", false),
    ("coordination.k8s.io", "v1", "leases", "Lease", true),
    ("networking.k8s.io", "v1", "ipaddresses", "IPAddress", false),
    ("networking.k8s.io", "v1", "servicecidrs", "ServiceCIDR", false),
    ("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice", true),
    ("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget", true),
    ("rbac.authorization.k8s.io", "v1", "clusterroles", "ClusterRole", false),
    ("resource.k8s.io", "v1", "deviceclasses", "DeviceClass", false),
    ("resource.k8s.io", "v1", "resourceclaims", "ResourceClaim", true),
    ("resource.k8s.io", "v1", "resourceclaimtemplates", "ResourceClaimTemplate", true),
    ("resource.k8s.io", "v1", "resourceslices", "ResourceSlice", false),
    ("scheduling.k8s.io", "v1", "priorityclasses", "PriorityClass", false),
    ("storage.k8s.io", "v1", "csidrivers", "CSIDriver", false),
    ("storage.k8s.io", "v1", "csinodes", "CSINode", false),
    ("storage.k8s.io", "v1", "csistoragecapacities", "CSIStorageCapacity", true),
    ("storage.k8s.io", "v1", "storageclasses", "StorageClass", false),
    ("storage.k8s.io", "v1", "volumeattachments", "VolumeAttachment", false),
];

/// What a test wants to go wrong. Probabilities are between 0 and 1.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// An update or patch fails with a conflict it does not deserve.
    pub conflict: f64,
    /// A write fails with 500 before it happens.
    pub error: f64,
    /// A watch ends after an event.
    pub drop_watch: f64,
    /// An event is sent twice.
    pub duplicate: f64,
}

/// The in-memory API; clones share it.
#[derive(Clone)]
pub struct FakeApi {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    revision: watch::Sender<u64>,
}

type Id = (String, String, String, String);

struct State {
    revision: u64,
    /// By group, plural, namespace, name.
    objects: BTreeMap<Id, Value>,
    log: Vec<LogEntry>,
    /// Watches from before this revision get `410 Gone`.
    compacted: u64,
    /// Watches of an older epoch end.
    epoch: u64,
    random: StdRng,
    faults: Faults,
    writes: Vec<String>,
    /// What other servers behind this API answer, by path.
    foreign: HashMap<String, Value>,
    /// The subresources that access reviews allow.
    allowed: Vec<String>,
}

#[derive(Clone)]
struct LogEntry {
    revision: u64,
    group: String,
    plural: String,
    namespace: String,
    event: &'static str,
    object: Value,
    previous: Option<Value>,
}

impl Default for FakeApi {
    fn default() -> Self {
        Self::new()
    }
}

impl FakeApi {
    pub fn new() -> Self {
        Self::seeded(0, Faults::default())
    }

    /// An API whose faults are drawn from `seed`.
    pub fn seeded(seed: u64, faults: Faults) -> Self {
        let state = State {
            revision: 1,
            objects: BTreeMap::new(),
            log: Vec::new(),
            compacted: 0,
            epoch: 0,
            random: StdRng::seed_from_u64(seed),
            faults,
            writes: Vec::new(),
            foreign: HashMap::new(),
            allowed: Vec::new(),
        };
        FakeApi { shared: Arc::new(Shared { state: Mutex::new(state), revision: watch::Sender::new(1) }) }
    }

    /// A client of this API. Must be called inside tokio.
    pub fn client(&self) -> Client {
        let shared = self.shared.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let shared = shared.clone();
            async move { Ok::<_, Infallible>(serve(&shared, request).await) }
        });
        crate::connect::in_process(service)
    }

    /// Changes the faults from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.shared.state.lock().faults = faults;
    }

    /// Ends all watches; clients resume where they were.
    pub fn drop_watches(&self) {
        self.shared.state.lock().epoch += 1;
        self.shared.revision.send_modify(|_| {});
    }

    /// Forgets the history: watches end, and resuming fails with `410 Gone`, so clients list again.
    pub fn compact(&self) {
        {
            let mut state = self.shared.state.lock();
            state.epoch += 1;
            state.revision += 1;
            state.compacted = state.revision;
            state.log.clear();
        }
        self.shared.revision.send_modify(|_| {});
    }

    /// What another server behind this API answers to `GET path` from now on.
    pub fn answer(&self, path: &str, document: Value) {
        self.shared.state.lock().foreign.insert(path.trim_matches('/').to_owned(), document);
    }

    /// From now on reviews of access to this subresource, of whatever, are answered with yes; all others with no.
    pub fn allow(&self, subresource: &str) {
        self.shared.state.lock().allowed.push(subresource.to_owned());
    }

    /// Every write since the last call, as `METHOD path`.
    pub fn take_writes(&self) -> Vec<String> {
        std::mem::take(&mut self.shared.state.lock().writes)
    }

    /// All objects of a kind, straight from the store.
    pub fn objects<K>(&self) -> Vec<K>
    where
        K: Resource<DynamicType = ()> + DeserializeOwned,
    {
        let (group, plural) = (K::group(&()).into_owned(), K::plural(&()).into_owned());
        let state = self.shared.state.lock();
        let of_kind = state.objects.iter().filter(|(id, _)| id.0 == group && id.1 == plural);
        of_kind
            .map(|(_, object)| {
                serde_json::from_value(object.clone()).expect("stored objects have their kind's shape")
            })
            .collect()
    }

    /// Waits until the objects of a kind satisfy `condition`, and returns them. Panics, saying what it waited for,
    /// after [`WAIT_MAX`].
    pub async fn wait_for<K>(&self, what: &str, condition: impl Fn(&[K]) -> bool) -> Vec<K>
    where
        K: Resource<DynamicType = ()> + DeserializeOwned,
    {
        let mut revision = self.shared.revision.subscribe();
        let wait = async {
            loop {
                revision.borrow_and_update();
                let objects = self.objects::<K>();
                if condition(&objects) {
                    return objects;
                }
                // The sender lives as long as `self`.
                let _ = revision.changed().await;
            }
        };
        match tokio::time::timeout(WAIT_MAX, wait).await {
            Ok(objects) => objects,
            Err(_) => panic!("waited {WAIT_MAX:?} for {what}"),
        }
    }

    /// Waits until nothing was written for `quiet` of tokio's time.
    pub async fn settle(&self, quiet: Duration) {
        let mut revision = self.shared.revision.subscribe();
        loop {
            revision.borrow_and_update();
            if tokio::time::timeout(quiet, revision.changed()).await.is_err() {
                return;
            }
        }
    }
}

/// What a request's path names.
struct Target {
    group: String,
    plural: String,
    kind: &'static str,
    version: &'static str,
    namespace: String,
    name: String,
    subresource: String,
}

impl Target {
    fn id(&self) -> Id {
        (self.group.clone(), self.plural.clone(), self.namespace.clone(), self.name.clone())
    }

    fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.to_owned()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }
}

type Answered = UnsyncBoxBody<Bytes, Infallible>;
type Answer = Result<Value, Refusal>;

struct Refusal {
    code: u16,
    reason: &'static str,
    message: String,
    causes: Vec<&'static str>,
}

fn refuse<T>(code: u16, reason: &'static str, message: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal { code, reason, message: message.into(), causes: Vec::new() })
}

async fn serve(shared: &Arc<Shared>, request: Request<Body>) -> Response<Answered> {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path().trim_matches('/').to_owned();
    let query: HashMap<String, String> = parts.uri.query().map(parse_query).unwrap_or_default();
    let Ok(body) = body.collect_bytes().await else {
        return error_response(400, "BadRequest", "unreadable body");
    };
    let foreign = shared.state.lock().foreign.get(&path).cloned();
    if let Some(document) = foreign.or_else(|| discovery(&path)) {
        return respond(Ok(document));
    }
    let Some(target) = parse_path(&path) else {
        return error_response(404, "NotFound", "the server could not find the requested resource");
    };
    if parts.method == Method::GET && query.get("watch").is_some_and(|value| value == "true" || value == "1")
    {
        return watch_response(shared.clone(), target, query);
    }
    let body: Value =
        if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).unwrap_or(Value::Null) };
    let content_type = parts.headers.get("content-type").and_then(|value| value.to_str().ok()).unwrap_or("");
    let answer = {
        let mut state = shared.state.lock();
        let before = state.revision;
        let answer = state.handle(&parts.method, &target, &query, content_type, body);
        if state.revision != before {
            state.writes.push(format!("{} /{path}", parts.method));
        }
        answer
    };
    let revision = shared.state.lock().revision;
    shared.revision.send_if_modified(|current| std::mem::replace(current, revision) != revision);
    respond(answer)
}

impl State {
    fn handle(
        &mut self,
        method: &Method,
        target: &Target,
        query: &HashMap<String, String>,
        content_type: &str,
        body: Value,
    ) -> Answer {
        if *method != Method::GET {
            self.inject(method)?;
        }
        let collection = target.name.is_empty();
        match (method.as_str(), target.subresource.as_str()) {
            ("GET", "scale") => Ok(scale_of(target, self.get(target)?)),
            ("GET", _) if collection => Ok(self.list(target, query)),
            ("GET", _) => self.get(target).cloned(),
            ("POST", "binding") => self.bind(target, &body),
            ("POST", "eviction") => self.delete(target, &body),
            ("POST", _) if collection => self.create(target, body),
            ("PUT", subresource) => self.update(target, subresource, body),
            ("PATCH", subresource) => {
                let current = match subresource {
                    "scale" => scale_of(target, self.get(target)?),
                    _ => self.get(target)?.clone(),
                };
                let patched = apply_patch(current, content_type, &body)?;
                self.update(target, subresource, patched)
            }
            ("DELETE", _) if collection => {
                let mut list = self.list(target, query);
                let mut items = list["items"].as_array().cloned().unwrap_or_default();
                // A token is the last name of the page before.
                let after = query.get("continue").map_or("", String::as_str);
                items.retain(|item| text(&item["metadata"]["name"]).as_str() > after);
                let limit = query.get("limit").and_then(|limit| limit.parse().ok()).unwrap_or(items.len());
                if limit < items.len() {
                    items.truncate(limit);
                    let last = items.last().map(|item| item["metadata"]["name"].clone());
                    list["metadata"]["continue"] = json!(last);
                }
                for item in &items {
                    let namespace = text(&item["metadata"]["namespace"]);
                    let one =
                        Target { name: text(&item["metadata"]["name"]), namespace, ..target_of(target) };
                    self.delete(&one, &body)?;
                }
                list["items"] = json!(items);
                Ok(list)
            }
            ("DELETE", _) => self.delete(target, &body),
            (method, _) => refuse(405, "MethodNotAllowed", format!("{method} is not supported")),
        }
    }

    fn inject(&mut self, method: &Method) -> Result<(), Refusal> {
        let Faults { conflict, error, .. } = self.faults;
        if error > 0.0 && self.random.random_bool(error) {
            return refuse(500, "InternalError", "injected error");
        }
        let update = *method == Method::PUT || *method == Method::PATCH;
        if update && conflict > 0.0 && self.random.random_bool(conflict) {
            return refuse(409, "Conflict", "injected conflict");
        }
        Ok(())
    }

    fn get(&self, target: &Target) -> Result<&Value, Refusal> {
        match self.objects.get(&target.id()) {
            Some(object) => Ok(object),
            None => refuse(404, "NotFound", format!("{} {:?} not found", target.plural, target.name)),
        }
    }

    fn list(&self, target: &Target, query: &HashMap<String, String>) -> Value {
        let fields = query.get("fieldSelector").map_or("", String::as_str);
        let labels = query.get("labelSelector").map_or("", String::as_str);
        let items: Vec<&Value> = self
            .objects
            .iter()
            .filter(|(id, _)| id.0 == target.group && id.1 == target.plural)
            .filter(|(id, _)| target.namespace.is_empty() || id.2 == target.namespace)
            .map(|(_, object)| object)
            .filter(|object| selected(object, fields, labels))
            .collect();
        json!({
            "kind": format!("{}List", target.kind), "apiVersion": target.api_version(),
            "metadata": {"resourceVersion": self.revision.to_string()}, "items": items,
        })
    }

    fn create(&mut self, target: &Target, mut object: Value) -> Answer {
        if target.plural == "subjectaccessreviews" {
            let asked = text(&object["spec"]["resourceAttributes"]["subresource"]);
            object["status"] = json!({"allowed": self.allowed.contains(&asked)});
            return Ok(object);
        }
        object["kind"] = json!(target.kind);
        object["apiVersion"] = json!(target.api_version());
        if !object["metadata"].is_object() {
            object["metadata"] = json!({});
        }
        if text(&object["metadata"]["name"]).is_empty() {
            let prefix = text(&object["metadata"]["generateName"]);
            if prefix.is_empty() {
                return refuse(
                    422,
                    "Invalid",
                    "metadata.name: Required value: name or generateName is required",
                );
            }
            object["metadata"]["name"] = json!(format!("{prefix}{}", self.suffix()));
        }
        let name = text(&object["metadata"]["name"]);
        if !target.namespace.is_empty() {
            object["metadata"]["namespace"] = json!(target.namespace);
            self.check_namespace(target)?;
        }
        let target = Target { name: name.clone(), ..target_of(target) };
        if self.objects.contains_key(&target.id()) {
            return refuse(409, "AlreadyExists", format!("{} {name:?} already exists", target.plural));
        }
        object["metadata"]["uid"] = json!(format!("{}-{:08x}", name, self.random.random::<u32>()));
        object["metadata"]["creationTimestamp"] = json!(now());
        object["metadata"]["generation"] = json!(1);
        object["metadata"]["deletionTimestamp"].take();
        prune_nulls(&mut object["metadata"]);
        prepare(&target, &mut object);
        self.write(&target, "ADDED", object)
    }

    /// Nothing is created in a namespace that is being deleted.
    fn check_namespace(&self, target: &Target) -> Result<(), Refusal> {
        let id = (String::new(), "namespaces".to_owned(), String::new(), target.namespace.clone());
        let terminating =
            self.objects.get(&id).is_some_and(|object| !object["metadata"]["deletionTimestamp"].is_null());
        if terminating && target.plural != "events" {
            let message = format!(
                "unable to create new content in namespace {} because it is being terminated",
                target.namespace
            );
            return Err(Refusal {
                code: 403,
                reason: "Forbidden",
                message,
                causes: vec!["NamespaceTerminating"],
            });
        }
        Ok(())
    }

    fn suffix(&mut self) -> String {
        const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
        (0..5).map(|_| char::from(ALPHABET[self.random.random_range(0..ALPHABET.len())])).collect()
    }

    fn update(&mut self, target: &Target, subresource: &str, mut new: Value) -> Answer {
        let old = self.get(target)?.clone();
        for field in ["resourceVersion", "uid"] {
            let wanted = text(&new["metadata"][field]);
            if !wanted.is_empty() && wanted != text(&old["metadata"][field]) {
                let message = format!(
                    "Operation cannot be fulfilled on {} {:?}: the object has been modified; please apply your \
                     changes to the latest version and try again",
                    target.plural, target.name
                );
                return refuse(409, "Conflict", message);
            }
        }
        match subresource {
            "status" | "approval" => {
                let status = new["status"].take();
                new = old.clone();
                new["status"] = status;
            }
            "scale" => {
                let replicas = new["spec"]["replicas"].take();
                new = old.clone();
                new["spec"]["replicas"] = replicas;
            }
            "finalize" => {
                let finalizers = new["spec"]["finalizers"].take();
                new = old.clone();
                new["spec"]["finalizers"] = finalizers;
            }
            _ => keep_system_fields(&old, &mut new),
        }
        if new["spec"] != old["spec"] || new["template"] != old["template"] {
            new["metadata"]["generation"] = json!(old["metadata"]["generation"].as_i64().unwrap_or(0) + 1);
        }
        prune_nulls(&mut new);
        prune_nulls(&mut new["metadata"]);
        if new == old {
            return Ok(answer_for(target, subresource, new));
        }
        let deleting = !new["metadata"]["deletionTimestamp"].is_null();
        let graceful = target.plural == "pods" && !grace_is_over(&new);
        if deleting && !has_finalizers(&new) && !graceful {
            return self.write(target, "DELETED", new);
        }
        let written = self.write(target, "MODIFIED", new)?;
        Ok(answer_for(target, subresource, written))
    }

    fn bind(&mut self, target: &Target, body: &Value) -> Answer {
        let mut pod = self.get(target)?.clone();
        let node = text(&body["target"]["name"]);
        let bound = text(&pod["spec"]["nodeName"]);
        if !bound.is_empty() {
            let message = format!("pod {} is already assigned to node {bound:?}", target.name);
            return refuse(409, "Conflict", message);
        }
        if pod["spec"]["schedulingGates"].as_array().is_some_and(|gates| !gates.is_empty()) {
            return refuse(
                409,
                "Conflict",
                format!("pod {} has non-empty .spec.schedulingGates", target.name),
            );
        }
        pod["spec"]["nodeName"] = json!(node);
        let scheduled = json!({"type": "PodScheduled", "status": "True", "lastTransitionTime": now()});
        let mut conditions = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
        conditions.retain(|condition| condition["type"] != "PodScheduled");
        conditions.push(scheduled);
        pod["status"]["conditions"] = json!(conditions);
        self.write(target, "MODIFIED", pod)?;
        Ok(json!({"kind": "Status", "apiVersion": "v1", "status": "Success", "metadata": {}}))
    }

    fn delete(&mut self, target: &Target, body: &Value) -> Answer {
        let mut object = self.get(target)?.clone();
        let options = if body["kind"] == "Eviction" { &body["deleteOptions"] } else { body };
        for field in ["uid", "resourceVersion"] {
            let wanted = text(&options["preconditions"][field]);
            if !wanted.is_empty() && wanted != text(&object["metadata"][field]) {
                return refuse(
                    409,
                    "Conflict",
                    format!("the {field} in the precondition ({wanted}) does not match"),
                );
            }
        }
        let finalizer = match options["propagationPolicy"].as_str() {
            Some("Foreground") => Some("foregroundDeletion"),
            Some("Orphan") => Some("orphan"),
            _ => None,
        };
        if let Some(finalizer) = finalizer {
            add_finalizer(&mut object, finalizer);
        }
        let grace = grace_seconds(target, &object, options);
        if object["metadata"]["deletionTimestamp"].is_null() {
            let due = Timestamp::now() + SignedDuration::from_secs(grace);
            object["metadata"]["deletionTimestamp"] = json!(due.strftime("%Y-%m-%dT%H:%M:%SZ").to_string());
        }
        object["metadata"]["deletionGracePeriodSeconds"] = json!(grace);
        if target.plural == "namespaces" {
            object["status"]["phase"] = json!("Terminating");
        }
        if grace > 0 || has_finalizers(&object) {
            if object == *self.get(target)? {
                return Ok(object);
            }
            return self.write(target, "MODIFIED", object);
        }
        self.write(target, "DELETED", object)
    }

    fn write(&mut self, target: &Target, event: &'static str, mut object: Value) -> Answer {
        self.revision += 1;
        object["metadata"]["resourceVersion"] = json!(self.revision.to_string());
        let previous = match event {
            "DELETED" => self.objects.remove(&target.id()),
            _ => self.objects.insert(target.id(), object.clone()),
        };
        let entry = LogEntry {
            revision: self.revision,
            group: target.group.clone(),
            plural: target.plural.clone(),
            namespace: target.namespace.clone(),
            event,
            object: object.clone(),
            previous,
        };
        let duplicate = self.faults.duplicate;
        if duplicate > 0.0 && self.random.random_bool(duplicate) {
            self.log.push(entry.clone());
        }
        self.log.push(entry);
        Ok(object)
    }
}

fn target_of(target: &Target) -> Target {
    Target {
        group: target.group.clone(),
        plural: target.plural.clone(),
        kind: target.kind,
        version: target.version,
        namespace: target.namespace.clone(),
        name: target.name.clone(),
        subresource: String::new(),
    }
}

/// What strategies do at creation, as far as loops can tell.
fn prepare(target: &Target, object: &mut Value) {
    match target.plural.as_str() {
        "pods" => object["status"] = json!({"phase": "Pending"}),
        "namespaces" => {
            object["spec"]["finalizers"] = json!(["kubernetes"]);
            object["status"] = json!({"phase": "Active"});
        }
        "deployments" | "replicasets" | "daemonsets" | "jobs" | "services" => object["status"] = json!({}),
        _ => {}
    }
}

/// An update of the main resource touches neither status nor what the server owns.
fn keep_system_fields(old: &Value, new: &mut Value) {
    new["kind"] = old["kind"].clone();
    new["apiVersion"] = old["apiVersion"].clone();
    const OWNED: [&str; 5] =
        ["uid", "creationTimestamp", "deletionTimestamp", "generation", "deletionGracePeriodSeconds"];
    for field in OWNED {
        new["metadata"][field] = old["metadata"][field].clone();
    }
    new["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"].clone();
    if !old["status"].is_null() {
        new["status"] = old["status"].clone();
    }
    if old["kind"] == "Namespace" {
        new["spec"]["finalizers"] = old["spec"]["finalizers"].clone();
    }
}

fn answer_for(target: &Target, subresource: &str, object: Value) -> Value {
    if subresource == "scale" { scale_of(target, &object) } else { object }
}

fn scale_of(_target: &Target, object: &Value) -> Value {
    let meta = &object["metadata"];
    json!({
        "kind": "Scale", "apiVersion": "autoscaling/v1",
        "metadata": {
            "name": meta["name"], "namespace": meta["namespace"], "uid": meta["uid"],
            "resourceVersion": meta["resourceVersion"],
        },
        "spec": {"replicas": object["spec"]["replicas"].as_i64().unwrap_or(1)},
        "status": {
            "replicas": object["status"]["replicas"].as_i64().unwrap_or(0), "selector": selector_of(object),
        },
    })
}

/// A workload's selector of equalities, in the form a scale tells it.
fn selector_of(object: &Value) -> String {
    let labels = object["spec"]["selector"]["matchLabels"].as_object().into_iter().flatten();
    labels.map(|(key, value)| format!("{key}={}", text(value))).collect::<Vec<_>>().join(",")
}

fn grace_seconds(target: &Target, object: &Value, options: &Value) -> i64 {
    let finished = matches!(object["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
    if target.plural != "pods" || text(&object["spec"]["nodeName"]).is_empty() || finished {
        return 0;
    }
    let asked = options["gracePeriodSeconds"].as_i64();
    asked.or(object["spec"]["terminationGracePeriodSeconds"].as_i64()).unwrap_or(30)
}

fn grace_is_over(object: &Value) -> bool {
    object["metadata"]["deletionGracePeriodSeconds"].as_i64().unwrap_or(0) == 0
}

fn has_finalizers(object: &Value) -> bool {
    let filled = |list: &Value| list.as_array().is_some_and(|list| !list.is_empty());
    filled(&object["metadata"]["finalizers"])
        || (object["kind"] == "Namespace" && filled(&object["spec"]["finalizers"]))
}

fn add_finalizer(object: &mut Value, finalizer: &str) {
    let mut finalizers = object["metadata"]["finalizers"].as_array().cloned().unwrap_or_default();
    if !finalizers.iter().any(|entry| entry == finalizer) {
        finalizers.push(json!(finalizer));
    }
    object["metadata"]["finalizers"] = json!(finalizers);
}

/// Objects read with missing fields and written back must compare equal: absent and null are the same.
fn prune_nulls(value: &mut Value) {
    if let Value::Object(map) = value {
        map.retain(|_, value| !value.is_null());
        if map.get("finalizers").is_some_and(|list| list == &json!([])) {
            map.remove("finalizers");
        }
        if map.get("ownerReferences").is_some_and(|list| list == &json!([])) {
            map.remove("ownerReferences");
        }
    }
}

fn apply_patch(mut current: Value, content_type: &str, patch: &Value) -> Answer {
    if content_type.starts_with("application/json-patch+json") {
        let parsed: json_patch::Patch = match serde_json::from_value(patch.clone()) {
            Ok(parsed) => parsed,
            Err(error) => return refuse(400, "BadRequest", error.to_string()),
        };
        return match json_patch::patch(&mut current, &parsed) {
            Ok(()) => Ok(current),
            Err(error) => refuse(422, "Invalid", error.to_string()),
        };
    }
    let mut patch = patch.clone();
    if content_type.starts_with("application/strategic-merge-patch+json") {
        merge_conditions(&current, &mut patch);
    }
    json_patch::merge(&mut current, &patch);
    Ok(current)
}

/// The one list loops patch strategically: conditions, merged by type.
fn merge_conditions(current: &Value, patch: &mut Value) {
    let Some(changed) = patch["status"]["conditions"].as_array().cloned() else { return };
    let mut merged = current["status"]["conditions"].as_array().cloned().unwrap_or_default();
    for condition in changed {
        match merged.iter_mut().find(|existing| existing["type"] == condition["type"]) {
            Some(existing) => json_patch::merge(existing, &condition),
            None => merged.push(condition),
        }
    }
    patch["status"]["conditions"] = json!(merged);
}

fn watch_response(shared: Arc<Shared>, target: Target, query: HashMap<String, String>) -> Response<Answered> {
    let from: u64 = query.get("resourceVersion").and_then(|version| version.parse().ok()).unwrap_or(0);
    let (epoch, gone) = {
        let state = shared.state.lock();
        (state.epoch, from < state.compacted)
    };
    if gone {
        return expired();
    }
    let watcher = Watcher { revision: shared.revision.subscribe(), shared, target, query, from, epoch };
    let frames = futures::stream::unfold(Some(watcher), |watcher| async move {
        let mut watcher = watcher?;
        let (lines, go_on) = watcher.next().await?;
        Some((Ok::<_, Infallible>(Frame::data(lines)), go_on.then_some(watcher)))
    });
    let body = StreamBody::new(frames).boxed_unsync();
    Response::builder()
        .status(200)
        .header("content-type", "application/json")
        .body(body)
        .expect("valid response")
}

/// As upstream: the watch starts and its first event is the error.
fn expired() -> Response<Answered> {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": 410,
        "reason": "Expired", "message": "too old resource version",
    });
    let body =
        Full::new(Bytes::from(format!("{}\n", json!({"type": "ERROR", "object": status})))).boxed_unsync();
    Response::builder()
        .status(200)
        .header("content-type", "application/json")
        .body(body)
        .expect("valid response")
}

struct Watcher {
    shared: Arc<Shared>,
    revision: watch::Receiver<u64>,
    target: Target,
    query: HashMap<String, String>,
    from: u64,
    epoch: u64,
}

impl Watcher {
    /// The next lines of the stream and whether it goes on; `None` when it ends without any.
    async fn next(&mut self) -> Option<(Bytes, bool)> {
        loop {
            self.revision.borrow_and_update();
            {
                let mut state = self.shared.state.lock();
                if state.epoch != self.epoch {
                    return None;
                }
                let lines = self.lines(&state);
                self.from = state.revision;
                if !lines.is_empty() {
                    let drop = state.faults.drop_watch;
                    let go_on = drop == 0.0 || !state.random.random_bool(drop);
                    return Some((Bytes::from(lines), go_on));
                }
            }
            self.revision.changed().await.ok()?;
        }
    }

    fn lines(&self, state: &State) -> Vec<u8> {
        let start = state.log.partition_point(|entry| entry.revision <= self.from);
        let mut lines = Vec::new();
        for entry in &state.log[start..] {
            if let Some(event) = self.event(entry) {
                lines.extend_from_slice(event.to_string().as_bytes());
                lines.push(b'\n');
            }
        }
        lines
    }

    /// What this watcher's selection sees of a change: entering it is `ADDED`, leaving it `DELETED`.
    fn event(&self, entry: &LogEntry) -> Option<Value> {
        let target = &self.target;
        let other_namespace = !target.namespace.is_empty() && target.namespace != entry.namespace;
        if entry.group != target.group || entry.plural != target.plural || other_namespace {
            return None;
        }
        let fields = self.query.get("fieldSelector").map_or("", String::as_str);
        let labels = self.query.get("labelSelector").map_or("", String::as_str);
        let before = entry.previous.as_ref().is_some_and(|object| selected(object, fields, labels));
        let after = entry.event != "DELETED" && selected(&entry.object, fields, labels);
        let event = match (before, after) {
            (false, true) => "ADDED",
            (true, true) => "MODIFIED",
            (true, false) => "DELETED",
            (false, false) => return None,
        };
        Some(json!({"type": event, "object": entry.object}))
    }
}

fn selected(object: &Value, fields: &str, labels: &str) -> bool {
    let field = |path: &str| text(path.split('.').fold(object, |value, part| &value[part]));
    let by_fields = fields.split(',').filter(|term| !term.is_empty()).all(|term| {
        if let Some((path, value)) = term.split_once("!=") {
            return field(path) != value;
        }
        term.split_once('=').is_some_and(|(path, value)| field(path) == value.trim_start_matches('='))
    });
    by_fields && labels_selected(object, labels)
}

fn labels_selected(object: &Value, selector: &str) -> bool {
    let labels: Labels = serde_json::from_value(object["metadata"]["labels"].clone()).unwrap_or_default();
    selector.split(',').filter(|term| !term.is_empty()).all(|term| {
        if let Some((key, value)) = term.split_once("!=") {
            return labels.get(key).is_none_or(|found| found != value);
        }
        match term.split_once('=') {
            Some((key, value)) => labels.get(key).is_some_and(|found| found == value.trim_start_matches('=')),
            None => labels.contains_key(term),
        }
    })
}

fn parse_path(path: &str) -> Option<Target> {
    let segments: Vec<&str> = path.split('/').collect();
    let (group, version, rest) = match segments.as_slice() {
        ["api", version, rest @ ..] => ("", *version, rest),
        ["apis", group, version, rest @ ..] => (*group, *version, rest),
        _ => return None,
    };
    let (namespace, rest) = match rest {
        ["namespaces", _, "status" | "finalize"] => ("", rest),
        ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (*namespace, rest),
        rest => ("", rest),
    };
    let plural = *rest.first()?;
    let row = KINDS.iter().find(|kind| kind.0 == group && kind.1 == version && kind.2 == plural)?;
    Some(Target {
        group: group.to_owned(),
        plural: plural.to_owned(),
        kind: row.3,
        version: row.1,
        namespace: namespace.to_owned(),
        name: rest.get(1).copied().unwrap_or("").to_owned(),
        subresource: rest.get(2).copied().unwrap_or("").to_owned(),
    })
}

fn discovery(path: &str) -> Option<Value> {
    let segments: Vec<&str> = path.split('/').collect();
    match segments.as_slice() {
        ["api"] => Some(json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []})),
        ["apis"] => Some(api_groups()),
        ["api", version] => Some(api_resources("", version)),
        ["apis", group, version] => Some(api_resources(group, version)),
        _ => None,
    }
}

fn api_groups() -> Value {
    let versions: BTreeMap<&str, &str> =
        KINDS.iter().filter(|kind| !kind.0.is_empty()).map(|kind| (kind.0, kind.1)).collect();
    let groups: Vec<Value> = versions
        .into_iter()
        .map(|(group, version)| {
            let version = json!({"groupVersion": format!("{group}/{version}"), "version": version});
            json!({"name": group, "versions": [version.clone()], "preferredVersion": version})
        })
        .collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

fn api_resources(group: &str, version: &str) -> Value {
    let verbs = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];
    let resources: Vec<Value> = KINDS
        .iter()
        .filter(|kind| kind.0 == group && kind.1 == version)
        .map(|(_, _, plural, kind, namespaced)| {
            json!({"name": plural, "singularName": "", "namespaced": namespaced, "kind": kind, "verbs": verbs})
        })
        .collect();
    let group_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": resources})
}

fn respond(answer: Answer) -> Response<Answered> {
    match answer {
        Ok(value) => json_response(StatusCode::OK, &value),
        Err(refusal) => refusal_response(&refusal),
    }
}

fn error_response(code: u16, reason: &'static str, message: &str) -> Response<Answered> {
    refusal_response(&Refusal { code, reason, message: message.to_owned(), causes: Vec::new() })
}

fn refusal_response(refusal: &Refusal) -> Response<Answered> {
    let causes: Vec<Value> =
        refusal.causes.iter().map(|reason| json!({"reason": reason, "message": "", "field": ""})).collect();
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": refusal.code,
        "reason": refusal.reason, "message": refusal.message, "details": {"causes": causes},
    });
    let code = StatusCode::from_u16(refusal.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    json_response(code, &status)
}

fn json_response(code: StatusCode, value: &Value) -> Response<Answered> {
    let body = Full::new(Bytes::from(value.to_string())).boxed_unsync();
    Response::builder()
        .status(code)
        .header("content-type", "application/json")
        .body(body)
        .expect("valid response")
}

fn parse_query(query: &str) -> HashMap<String, String> {
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(key, value)| (key.to_owned(), percent_decode(value))).collect()
}

fn percent_decode(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let hex = tail.get(..2).and_then(|hex| std::str::from_utf8(hex).ok());
        match (first, hex.and_then(|hex| u8::from_str_radix(hex, 16).ok())) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            (b'+', _) => {
                bytes.push(b' ');
                rest = tail;
            }
            (byte, _) => {
                bytes.push(byte);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn now() -> String {
    Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Change, Informers};
    use k8s_openapi::api::core::v1::{ConfigMap, Pod};
    use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};

    fn config_map(name: &str) -> ConfigMap {
        serde_json::from_value(json!({"metadata": {"name": name}})).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_write_of_an_old_version_is_a_conflict() {
        let api: Api<ConfigMap> = Api::namespaced(FakeApi::new().client(), "ns");
        let first = api.create(&PostParams::default(), &config_map("a")).await.unwrap();
        let patch = json!({"data": {"k": "v"}});
        api.patch("a", &PatchParams::default(), &Patch::Merge(patch)).await.unwrap();
        match api.replace("a", &PostParams::default(), &first).await {
            Err(kube::Error::Api(status)) => {
                assert_eq!((status.code, status.reason.as_str()), (409, "Conflict"))
            }
            other => panic!("expected a conflict, got {other:?}"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_deleted_object_stays_until_its_finalizers_are_gone() {
        let fake = FakeApi::new();
        let api: Api<ConfigMap> = Api::namespaced(fake.client(), "ns");
        let mut object = config_map("a");
        object.metadata.finalizers = Some(vec!["test/hold".into()]);
        api.create(&PostParams::default(), &object).await.unwrap();
        api.delete("a", &DeleteParams::default()).await.unwrap();
        let held = api.get("a").await.unwrap();
        assert!(held.metadata.deletion_timestamp.is_some());
        crate::patch::remove_finalizer(&api, &held, "test/hold").await.unwrap();
        assert!(api.get_opt("a").await.unwrap().is_none());
        assert_eq!(api.list(&ListParams::default()).await.unwrap().items.len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn an_informer_follows_through_lost_watches_and_compaction() {
        for seed in 0..10 {
            let faults = Faults { drop_watch: 0.5, duplicate: 0.3, ..Default::default() };
            let fake = FakeApi::seeded(seed, faults);
            let informers = Informers::new(fake.client());
            let informer = informers.get::<ConfigMap>();
            informer.add_index("name", |object| object.metadata.name.clone().into_iter().collect());
            let live = Arc::new(Mutex::new(std::collections::BTreeSet::new()));
            let seen = live.clone();
            informer.on_change(move |change| {
                let name = change.object().metadata.name.clone().unwrap();
                let fresh = match change {
                    Change::Added(_) => seen.lock().insert(name),
                    Change::Updated { .. } => seen.lock().contains(&name),
                    Change::Deleted(_) => seen.lock().remove(&name),
                };
                assert!(fresh, "changes must make sense in order");
            });
            let api: Api<ConfigMap> = Api::namespaced(fake.client(), "ns");
            for i in 0..20 {
                api.create(&PostParams::default(), &config_map(&format!("c{i}"))).await.unwrap();
                if i % 3 == 0 {
                    api.delete(&format!("c{i}"), &DeleteParams::default()).await.unwrap();
                }
                if i == 10 {
                    fake.compact();
                }
                tokio::task::yield_now().await;
            }
            let expected: Vec<_> = fake.objects::<ConfigMap>();
            let deadline = tokio::time::Instant::now() + WAIT_MAX;
            while informer.list().len() != expected.len() {
                assert!(
                    tokio::time::Instant::now() < deadline,
                    "waited for the cache to hold {}",
                    expected.len()
                );
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            assert_eq!(live.lock().len(), expected.len());
            assert_eq!(informer.by_index("name", "c1").len(), 1);
            assert_eq!(informer.by_index("name", "c0").len(), 0);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_selected_informer_sees_pods_enter_its_node() {
        let fake = FakeApi::new();
        let informers = Informers::new(fake.client());
        let informer = informers.select::<Pod>(crate::informer::Selection::fields("spec.nodeName=n1"));
        informer.wait_synced().await;
        let api: Api<Pod> = Api::namespaced(fake.client(), "ns");
        let pod: Pod =
            serde_json::from_value(json!({"metadata": {"name": "a"}, "spec": {"containers": []}})).unwrap();
        api.create(&PostParams::default(), &pod).await.unwrap();
        let binding = json!({"metadata": {"name": "a"}, "target": {"kind": "Node", "name": "n1"}});
        api.create_subresource::<Value, Value>("binding", "a", &PostParams::default(), &binding)
            .await
            .unwrap();
        let keys = informer.subscribe();
        assert_eq!(keys.next().await.to_string(), "ns/a");
        assert!(informer.get("ns", "a").is_some());
    }
}
