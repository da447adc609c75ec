//! The users: they create, change, scale and delete whatever the dice say, and do not wait for anything.

use crate::history::{History, text};
use crate::wire::Life;
use crate::world::World;
use knarr_apiserver::identity::{MASTERS, User};
use knarr_client::Client;
use rand::Rng;
use rand::seq::IndexedRandom;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

/// Where the users work. The last has a quota from time to time.
pub const NAMESPACES: [&str; 4] = ["red", "green", "blue", "narrow"];
const NODES_MAX: usize = 8;

/// One user; it speaks JSON over the wire, like kubectl.
pub struct Workload {
    world: Arc<World>,
    client: Client,
    counter: u32,
}

type Operation = fn(&mut Workload) -> Option<Call>;

/// Operations and how often each is chosen.
const OPERATIONS: &[(u32, Operation)] = &[
    (8, create_deployment),
    (10, change_deployment),
    (8, scale),
    (5, create_stateful_set),
    (4, change_stateful_set),
    (3, create_daemon_set),
    (2, change_daemon_set),
    (8, create_job),
    (2, suspend_job),
    (2, create_cron_job),
    (4, create_service),
    (3, create_budget),
    (3, create_config_map),
    (3, create_owned_config_map),
    (2, create_pod),
    (6, delete_workload),
    (5, delete_pod),
    (3, evict_pod),
    (3, delete_other),
    (1, delete_namespace),
    (2, create_namespace),
    (2, set_quota),
    (2, add_node),
    (1, remove_node),
    (3, turn_node),
    (2, cordon_node),
];

/// A request to be made.
struct Call {
    method: &'static str,
    path: String,
    body: Value,
}

impl Call {
    fn new(method: &'static str, path: impl Into<String>, body: Value) -> Option<Call> {
        Some(Call { method, path: path.into(), body })
    }
}

impl Workload {
    pub fn new(world: &Arc<World>) -> Self {
        let life = Life::new("user", 1, User::new("admin", &[MASTERS]));
        Workload { world: world.clone(), client: world.client(life), counter: 0 }
    }

    /// Nodes and namespaces to begin with; insists on them.
    pub async fn prepare(&mut self) {
        for _ in 0..4 {
            let call = self.new_node();
            self.insist(call).await;
        }
        for name in NAMESPACES {
            let body = json!({ "metadata": { "name": name } });
            self.insist(Call { method: "POST", path: "/api/v1/namespaces".to_owned(), body }).await;
        }
    }

    /// Works until the time is over.
    pub async fn work(&mut self, time: Duration) {
        let end = tokio::time::Instant::now() + time;
        let total: u32 = OPERATIONS.iter().map(|(weight, _)| weight).sum();
        while tokio::time::Instant::now() < end && !self.world.trace.is_violated() {
            let mut chosen = self.dice(total as usize) as u32;
            let operation = OPERATIONS.iter().find(|(weight, _)| {
                let found = chosen < *weight;
                chosen = chosen.saturating_sub(*weight);
                found
            });
            if let Some(call) = operation.and_then(|(_, operation)| operation(self)) {
                // A user gives up waiting and goes on.
                let _ = tokio::time::timeout(Duration::from_secs(5), self.send(&call)).await;
            }
            let pause = self.dice(3000) as u64;
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
    }

    /// Ends what would go on for ever or stand in the way: dead and cordoned nodes, pauses, schedules, quotas.
    pub async fn settle(&mut self) {
        let mut calls = Vec::new();
        {
            let history = self.world.history.lock();
            for name in history.objects("nodes").keys() {
                let body = json!({ "metadata": { "annotations": { "simulated.knarr.dev/down": null } }, "spec": { "unschedulable": null } });
                calls.push(Call { method: "PATCH", path: format!("/api/v1/nodes/{name}"), body });
            }
            // A pause in the middle of an update keeps more or fewer pods than are wished for.
            for key in history.objects("deployments.apps").keys() {
                let body = json!({ "spec": { "paused": false } });
                calls.push(Call { method: "PATCH", path: path_of("deployments.apps", key), body });
            }
            for key in history.objects("cronjobs.batch").keys() {
                let body = json!({ "spec": { "suspend": true } });
                calls.push(Call { method: "PATCH", path: path_of("cronjobs.batch", key), body });
            }
            for key in history.objects("jobs.batch").keys() {
                let body = json!({ "spec": { "suspend": false } });
                calls.push(Call { method: "PATCH", path: path_of("jobs.batch", key), body });
            }
            for key in history.objects("resourcequotas").keys() {
                calls.push(Call { method: "DELETE", path: path_of("resourcequotas", key), body: json!({}) });
            }
        }
        for call in calls {
            self.insist(call).await;
        }
    }

    async fn insist(&mut self, call: Call) {
        for _ in 0..200 {
            if matches!(self.send(&call).await, Some(code) if code < 300 || matches!(code, 404 | 409 | 422)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        self.world.trace.violation(format!("{} {} is never answered", call.method, call.path));
    }

    async fn send(&self, call: &Call) -> Option<u16> {
        let content =
            if call.method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
        let request = http::Request::builder()
            .method(call.method)
            .uri(&call.path)
            .header("content-type", content)
            .body(call.body.to_string().into_bytes())
            .ok()?;
        let answer = self.client.send(request.map(Into::into)).await.ok()?;
        Some(answer.status().as_u16())
    }

    fn dice(&self, below: usize) -> usize {
        self.world.dice.lock().random_range(0..below.max(1))
    }

    fn chance(&self, chance: f64) -> bool {
        self.world.dice.lock().random_bool(chance)
    }

    fn one<T: Clone>(&self, of: &[T]) -> Option<T> {
        of.choose(&mut *self.world.dice.lock()).cloned()
    }

    fn name(&mut self, prefix: &str) -> String {
        self.counter += 1;
        format!("{prefix}-{}", self.counter)
    }

    fn namespace(&self) -> &'static str {
        NAMESPACES[self.dice(NAMESPACES.len())]
    }

    /// A key of a kind in the users' namespaces.
    fn any(&self, partition: &str) -> Option<String> {
        let keys: Vec<String> = {
            let history = self.world.history.lock();
            users_own(&history, partition)
        };
        self.one(&keys)
    }

    /// A collection, chosen among kinds.
    fn any_of(&self, partitions: &[&str]) -> Option<(String, String)> {
        let partition = self.one(partitions)?.to_owned();
        let key = self.any(&partition)?;
        Some((partition, key))
    }

    fn new_node(&mut self) -> Call {
        let annotations = json!({ "simulated.knarr.dev/capacity": "cpu=16" });
        let name = self.name("node");
        let labels = json!({ "simulated.knarr.dev/node": "true", "kubernetes.io/hostname": name, "topology.kubernetes.io/zone": format!("z{}", self.counter % 2) });
        let body = json!({ "metadata": { "name": name, "labels": labels, "annotations": annotations } });
        Call { method: "POST", path: "/api/v1/nodes".to_owned(), body }
    }

    fn template(&mut self, app: &str, extra: &[(&str, String)]) -> Value {
        let delay = |n: usize| format!("0s-{}ms", [0, 10, 500, 3000][n]);
        let mut annotations = json!({
            "simulated.knarr.dev/start-delay": delay(self.dice(4)),
            "simulated.knarr.dev/ready-delay": delay(self.dice(4)),
            "simulated.knarr.dev/stop-delay": delay(self.dice(4)),
        });
        for (key, value) in extra {
            annotations[format!("simulated.knarr.dev/{key}")] = json!(value);
        }
        let image = format!("app:{}", self.dice(100));
        let mut container = json!({ "name": "c", "image": image });
        if self.chance(0.5) {
            container["resources"] = json!({ "requests": { "cpu": format!("{}m", 100 * self.dice(10)) } });
        }
        json!({ "metadata": { "labels": { "app": app }, "annotations": annotations }, "spec": { "containers": [container], "terminationGracePeriodSeconds": self.dice(10) } })
    }
}

fn users_own(history: &History, partition: &str) -> Vec<String> {
    let objects = history.objects(partition).iter();
    let own = objects.filter(|(key, _)| NAMESPACES.iter().any(|ns| key.starts_with(&format!("{ns}/"))));
    own.filter(|(key, _)| !key.ends_with("/kube-root-ca.crt") && !key.ends_with("/default"))
        .map(|(key, _)| key.clone())
        .collect()
}

/// The path of an object by its partition and key.
fn path_of(partition: &str, key: &str) -> String {
    let (plural, group) = partition.split_once('.').unwrap_or((partition, ""));
    let prefix = if group.is_empty() { "/api/v1".to_owned() } else { format!("/apis/{group}/v1") };
    match key.split_once('/') {
        Some((namespace, name)) => format!("{prefix}/namespaces/{namespace}/{plural}/{name}"),
        None => format!("{prefix}/{plural}/{key}"),
    }
}

fn collection(partition: &str, namespace: &str) -> String {
    path_of(partition, &format!("{namespace}/")).trim_end_matches('/').to_owned()
}

fn post(partition: &str, namespace: &str, body: Value) -> Option<Call> {
    Call::new("POST", collection(partition, namespace), body)
}

fn patch(partition: &str, key: &str, body: Value) -> Option<Call> {
    Call::new("PATCH", path_of(partition, key), body)
}

// ---- what users do ----

fn create_deployment(user: &mut Workload) -> Option<Call> {
    let (namespace, name) = (user.namespace(), user.name("d"));
    let template = user.template(&name, &[]);
    let mut spec = json!({
        "replicas": user.dice(7), "selector": { "matchLabels": { "app": name } }, "template": template,
        "strategy": strategy(user),
    });
    if user.chance(0.3) {
        spec["revisionHistoryLimit"] = json!(user.dice(3));
    }
    post("deployments.apps", namespace, json!({ "metadata": { "name": name }, "spec": spec }))
}

fn strategy(user: &mut Workload) -> Value {
    let amount =
        |n: usize| [json!(0), json!(1), json!(2), json!("25%"), json!("50%"), json!("100%")][n].clone();
    if user.chance(0.2) {
        return json!({ "type": "Recreate" });
    }
    let (surge, unavailable) = (user.dice(6), user.dice(6));
    let unavailable = if surge == 0 { unavailable.max(1) } else { unavailable };
    json!({ "type": "RollingUpdate", "rollingUpdate": { "maxSurge": amount(surge), "maxUnavailable": amount(unavailable) } })
}

fn change_deployment(user: &mut Workload) -> Option<Call> {
    let key = user.any("deployments.apps")?;
    let image = format!("app:{}", user.dice(100));
    let body = match user.dice(6) {
        0 => json!({ "spec": { "paused": user.chance(0.3) } }),
        1 => json!({ "spec": { "strategy": { "type": "Recreate", "rollingUpdate": null } } }),
        _ => {
            json!({ "spec": { "template": { "spec": { "containers": [{ "name": "c", "image": image }] } } } })
        }
    };
    patch("deployments.apps", &key, body)
}

fn scale(user: &mut Workload) -> Option<Call> {
    let (partition, key) = user.any_of(&["deployments.apps", "deployments.apps", "statefulsets.apps"])?;
    let path = format!("{}/scale", path_of(&partition, &key));
    Call::new("PATCH", path, json!({ "spec": { "replicas": user.dice(9) } }))
}

fn create_stateful_set(user: &mut Workload) -> Option<Call> {
    let (namespace, name) = (user.namespace(), user.name("s"));
    let template = user.template(&name, &[]);
    let management = if user.chance(0.5) { "OrderedReady" } else { "Parallel" };
    let spec = json!({
        "replicas": user.dice(5), "selector": { "matchLabels": { "app": name } }, "template": template,
        "serviceName": name, "podManagementPolicy": management,
    });
    post("statefulsets.apps", namespace, json!({ "metadata": { "name": name }, "spec": spec }))
}

fn change_stateful_set(user: &mut Workload) -> Option<Call> {
    let key = user.any("statefulsets.apps")?;
    let image = format!("app:{}", user.dice(100));
    let body = match user.dice(4) {
        0 => json!({ "spec": { "updateStrategy": { "rollingUpdate": { "partition": user.dice(3) } } } }),
        _ => {
            json!({ "spec": { "template": { "spec": { "containers": [{ "name": "c", "image": image }] } } } })
        }
    };
    patch("statefulsets.apps", &key, body)
}

fn create_daemon_set(user: &mut Workload) -> Option<Call> {
    let (namespace, name) = (user.namespace(), user.name("a"));
    let template = user.template(&name, &[]);
    let rolling = if user.chance(0.3) {
        json!({ "maxSurge": 1, "maxUnavailable": 0 })
    } else {
        json!({ "maxUnavailable": 1 + user.dice(2) })
    };
    let spec = json!({
        "selector": { "matchLabels": { "app": name } }, "template": template,
        "updateStrategy": { "type": "RollingUpdate", "rollingUpdate": rolling },
    });
    post("daemonsets.apps", namespace, json!({ "metadata": { "name": name }, "spec": spec }))
}

fn change_daemon_set(user: &mut Workload) -> Option<Call> {
    let key = user.any("daemonsets.apps")?;
    let image = format!("app:{}", user.dice(100));
    patch(
        "daemonsets.apps",
        &key,
        json!({ "spec": { "template": { "spec": { "containers": [{ "name": "c", "image": image }] } } } }),
    )
}

fn job_spec(user: &mut Workload, name: &str) -> Value {
    let failure = ["0", "10%", "30%"][user.dice(3)].to_owned();
    let run = format!("0s-{}s", 1 + user.dice(20));
    let mut template = user.template(name, &[("run-time", run), ("failure-chance", failure)]);
    template["spec"]["restartPolicy"] = json!(if user.chance(0.7) { "Never" } else { "OnFailure" });
    let completions = 1 + user.dice(6);
    let mut spec = json!({ "completions": completions, "parallelism": 1 + user.dice(4), "backoffLimit": user.dice(8), "template": template });
    if user.chance(0.4) {
        spec["completionMode"] = json!("Indexed");
        if user.chance(0.3) {
            spec["backoffLimitPerIndex"] = json!(user.dice(3));
            spec["template"]["spec"]["restartPolicy"] = json!("Never");
        }
    }
    if user.chance(0.3) {
        spec["ttlSecondsAfterFinished"] = json!(user.dice(60));
    }
    if user.chance(0.1) {
        spec["activeDeadlineSeconds"] = json!(1 + user.dice(60));
    }
    spec
}

fn create_job(user: &mut Workload) -> Option<Call> {
    let (namespace, name) = (user.namespace(), user.name("j"));
    let spec = job_spec(user, &name);
    post("jobs.batch", namespace, json!({ "metadata": { "name": name }, "spec": spec }))
}

fn suspend_job(user: &mut Workload) -> Option<Call> {
    let key = user.any("jobs.batch")?;
    let suspend = user.chance(0.5);
    patch("jobs.batch", &key, json!({ "spec": { "suspend": suspend } }))
}

fn create_cron_job(user: &mut Workload) -> Option<Call> {
    let (namespace, name) = (user.namespace(), user.name("c"));
    let job = job_spec(user, &name);
    let policy = ["Allow", "Forbid", "Replace"][user.dice(3)];
    let spec = json!({
        "schedule": "* * * * *", "concurrencyPolicy": policy, "jobTemplate": { "spec": job },
        "successfulJobsHistoryLimit": user.dice(3), "failedJobsHistoryLimit": user.dice(3),
    });
    post("cronjobs.batch", namespace, json!({ "metadata": { "name": name }, "spec": spec }))
}

/// The label of some workload, to select its pods by.
fn some_app(user: &Workload) -> Option<(String, String)> {
    let (_, key) = user.any_of(&["deployments.apps", "statefulsets.apps"])?;
    let (namespace, name) = key.split_once('/')?;
    Some((namespace.to_owned(), name.to_owned()))
}

fn create_service(user: &mut Workload) -> Option<Call> {
    let (namespace, app) = some_app(user)?;
    let name = user.name("svc");
    let mut spec = json!({ "selector": { "app": app }, "ports": [{ "port": 80 }] });
    if user.chance(0.3) {
        spec["type"] = json!("NodePort");
    }
    post("services", &namespace, json!({ "metadata": { "name": name }, "spec": spec }))
}

fn create_budget(user: &mut Workload) -> Option<Call> {
    let (namespace, app) = some_app(user)?;
    let name = user.name("pdb");
    let limit = if user.chance(0.5) { "minAvailable" } else { "maxUnavailable" };
    let amount = [json!(1), json!("50%")][user.dice(2)].clone();
    let spec = json!({ "selector": { "matchLabels": { "app": app } }, limit: amount });
    post("poddisruptionbudgets.policy", &namespace, json!({ "metadata": { "name": name }, "spec": spec }))
}

fn create_config_map(user: &mut Workload) -> Option<Call> {
    let (namespace, name) = (user.namespace(), user.name("cm"));
    post("configmaps", namespace, json!({ "metadata": { "name": name }, "data": { "a": "b" } }))
}

/// A config map whose owner is there, or never was.
fn create_owned_config_map(user: &mut Workload) -> Option<Call> {
    let (partition, key) =
        user.any_of(&["deployments.apps", "jobs.batch", "configmaps", "statefulsets.apps"])?;
    let (uid, kind, version) = {
        let history = user.world.history.lock();
        let owner = history.get(&partition, &key)?;
        (
            text(&owner.value, "/metadata/uid").to_owned(),
            text(&owner.value, "/kind").to_owned(),
            text(&owner.value, "/apiVersion").to_owned(),
        )
    };
    let uid = if user.chance(0.2) { "00000000-0000-4000-8000-000000000000".to_owned() } else { uid };
    let (namespace, owner) = key.split_once('/')?;
    let name = user.name("cm");
    let owners = json!([{ "apiVersion": version, "kind": kind, "name": owner, "uid": uid, "blockOwnerDeletion": user.chance(0.5) }]);
    post("configmaps", namespace, json!({ "metadata": { "name": name, "ownerReferences": owners } }))
}

fn create_pod(user: &mut Workload) -> Option<Call> {
    let (namespace, name) = (user.namespace(), user.name("p"));
    let template = user.template(&name, &[]);
    let mut pod = template;
    pod["metadata"]["name"] = json!(name);
    post("pods", namespace, pod)
}

fn deletion(user: &Workload) -> Value {
    let policy = ["Background", "Foreground", "Orphan", "Background"][user.dice(4)];
    json!({ "kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": policy })
}

fn delete_workload(user: &mut Workload) -> Option<Call> {
    let kinds = [
        "deployments.apps",
        "deployments.apps",
        "statefulsets.apps",
        "daemonsets.apps",
        "jobs.batch",
        "jobs.batch",
        "cronjobs.batch",
        "replicasets.apps",
    ];
    let (partition, key) = user.any_of(&kinds)?;
    Call::new("DELETE", path_of(&partition, &key), deletion(user))
}

fn delete_other(user: &mut Workload) -> Option<Call> {
    let (partition, key) =
        user.any_of(&["services", "configmaps", "poddisruptionbudgets.policy", "resourcequotas"])?;
    Call::new("DELETE", path_of(&partition, &key), deletion(user))
}

fn delete_pod(user: &mut Workload) -> Option<Call> {
    let key = user.any("pods")?;
    let mut options = json!({ "kind": "DeleteOptions", "apiVersion": "v1" });
    if user.chance(0.2) {
        options["gracePeriodSeconds"] = json!(0);
    }
    Call::new("DELETE", path_of("pods", &key), options)
}

fn evict_pod(user: &mut Workload) -> Option<Call> {
    let key = user.any("pods")?;
    let (namespace, name) = key.split_once('/')?;
    let eviction = json!({ "apiVersion": "policy/v1", "kind": "Eviction", "metadata": { "namespace": namespace, "name": name } });
    Call::new("POST", format!("{}/eviction", path_of("pods", &key)), eviction)
}

fn delete_namespace(user: &mut Workload) -> Option<Call> {
    Call::new("DELETE", format!("/api/v1/namespaces/{}", user.namespace()), json!({}))
}

fn create_namespace(user: &mut Workload) -> Option<Call> {
    let missing: Vec<&str> = {
        let history = user.world.history.lock();
        NAMESPACES.into_iter().filter(|name| history.get("namespaces", name).is_none()).collect()
    };
    let name = user.one(&missing)?;
    Call::new("POST", "/api/v1/namespaces", json!({ "metadata": { "name": name } }))
}

fn set_quota(user: &mut Workload) -> Option<Call> {
    let hard = json!({ "hard": { "pods": user.dice(12).to_string() } });
    let known = user.world.history.lock().get("resourcequotas", "narrow/quota").is_some();
    match known {
        true => patch("resourcequotas", "narrow/quota", json!({ "spec": hard })),
        false => post("resourcequotas", "narrow", json!({ "metadata": { "name": "quota" }, "spec": hard })),
    }
}

fn add_node(user: &mut Workload) -> Option<Call> {
    let few = user.world.history.lock().objects("nodes").len() < NODES_MAX;
    few.then(|| user.new_node())
}

fn any_node(user: &Workload) -> Option<String> {
    let names: Vec<String> = user.world.history.lock().objects("nodes").keys().cloned().collect();
    user.one(&names)
}

fn remove_node(user: &mut Workload) -> Option<Call> {
    let many = user.world.history.lock().objects("nodes").len() > 3;
    let name = any_node(user).filter(|_| many)?;
    Call::new("DELETE", format!("/api/v1/nodes/{name}"), json!({}))
}

/// The power of a node goes off or on.
fn turn_node(user: &mut Workload) -> Option<Call> {
    let name = any_node(user)?;
    let down = if user.chance(0.4) { json!("true") } else { Value::Null };
    let body = json!({ "metadata": { "annotations": { "simulated.knarr.dev/down": down } } });
    Call::new("PATCH", format!("/api/v1/nodes/{name}"), body)
}

fn cordon_node(user: &mut Workload) -> Option<Call> {
    let name = any_node(user)?;
    let cordon = user.chance(0.4);
    Call::new("PATCH", format!("/api/v1/nodes/{name}"), json!({ "spec": { "unschedulable": cordon } }))
}
