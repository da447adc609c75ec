//! What holds users back: quotas, limit ranges, disruption budgets; and an autoscaler that lacks metrics.

use crate::cluster::{Scene, condition, image, is_ready, name};
use crate::deployments::{DONE, WEB};
use serde_json::{Value, json};

fn quota(name: &str, hard: &str) -> String {
    format!("apiVersion: v1\nkind: ResourceQuota\nmetadata: {{name: {name}}}\nspec: {{hard: {{{hard}}}}}\n")
}

fn limit_range(limits: &str) -> String {
    format!(
        "apiVersion: v1\nkind: LimitRange\nmetadata: {{name: sizes}}\nspec: {{limits: [{{type: Container, {limits}}}]}}\n"
    )
}

fn pod(name: &str, resources: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, annotations: {{simulated.knarr.dev/run-time: 10ms}}}}\nspec: {{restartPolicy: Never, containers: [{{name: c, image: 'x:1', resources: {{{resources}}}}}]}}\n"
    )
}

fn in_force(s: &Scene, quota: &str) {
    s.until("the quota is in force", &format!("resourcequotas/{quota}"), |quota| {
        quota["status"]["hard"].is_object()
    });
}

#[test]
fn what_a_quota_forbids_is_told_in_its_sentence_and_goes_on_when_there_is_room() {
    let s = Scene::new("quota-pods");
    assert_eq!(s.apply(&quota("few", "pods: '2'")), "resourcequota/few created");
    in_force(&s, "few");
    s.apply(WEB);
    let told = s.until_event("FailedCreate", "exceeded quota");
    assert!(told.starts_with("Error creating: pods \"web-"), "{told}");
    assert!(
        told.ends_with(
            " is forbidden: exceeded quota: few, requested: pods=1, used: pods=2, limited: pods=2"
        ),
        "{told}"
    );
    let deployment = s.until("2 are available", "deployments/web", |deployment| {
        deployment["status"]["availableReplicas"] == 2
            && condition(deployment, "ReplicaFailure")["status"] == "True"
    });
    assert_eq!(condition(&deployment, "ReplicaFailure")["reason"], "FailedCreate");
    let available = condition(&deployment, "Available");
    assert_eq!(
        (&available["status"], &available["reason"]),
        (&json!("False"), &json!("MinimumReplicasUnavailable"))
    );
    let told = s.ok("describe quota few");
    assert!(
        told.lines().any(|line| line.split_whitespace().collect::<Vec<_>>() == ["pods", "2", "2"]),
        "{told}"
    );
    s.apply(&quota("few", "pods: '3'"));
    assert_eq!(s.rollout("deploy/web").last().map(String::as_str), Some(DONE));
    s.until("no failure is left", "deployments/web", |d| condition(d, "ReplicaFailure").is_null());
}

#[test]
fn a_rolling_update_counts_against_the_quota_too() {
    let s = Scene::new("quota-roll");
    s.apply(&quota(
        "some",
        "pods: '4', requests.cpu: '1', requests.memory: 1Gi, limits.cpu: '2', limits.memory: 2Gi",
    ));
    in_force(&s, "some");
    let manifest = WEB.replace("replicas: 3", "replicas: 4");
    s.apply(&manifest);
    let told = s.until_event("FailedCreate", "failed quota");
    assert!(told.contains("is forbidden: failed quota: some: must specify limits.cpu for: c; limits.memory for: c; requests.cpu for: c; requests.memory for: c"), "{told}");
    let sized = manifest.replace(
        "image: 'web:1'}",
        "image: 'web:2', resources: {requests: {cpu: 100m, memory: 150Mi}, limits: {cpu: 300m, memory: 300Mi}}}",
    );
    s.apply(&sized);
    s.rollout("deploy/web");
    s.until("the use is counted", "resourcequotas/some", |quota| {
        quota["status"]["used"]["limits.cpu"] == "1200m"
    });
    let told = s.ok("describe quota some");
    for row in [
        ["limits.cpu", "1200m", "2"],
        ["limits.memory", "1200Mi", "2Gi"],
        ["pods", "4", "4"],
        ["requests.cpu", "400m", "1"],
        ["requests.memory", "600Mi", "1Gi"],
    ] {
        assert!(
            told.lines().any(|line| line.split_whitespace().collect::<Vec<_>>() == row),
            "{row:?} is missing: {told}"
        );
    }
    // No room for a surge pod of the next version, but one old pod may go: it rolls in the room of that one.
    s.apply(&sized.replace("web:2", "web:3"));
    s.until_event("FailedCreate", "exceeded quota: some, requested: pods=1, used: pods=4, limited: pods=4");
    assert_eq!(s.rollout("deploy/web").last().map(String::as_str), Some(DONE));
    assert!(s.until_ready(4, "app=web").iter().all(|pod| image(pod) == "web:3"));
}

#[test]
fn pods_that_have_ended_take_no_room() {
    let s = Scene::new("quota-ended");
    s.apply(&quota("one", "pods: '1', requests.storage: 64Gi"));
    in_force(&s, "one");
    for name in ["first", "second"] {
        s.wait("there is room", || match s.run("apply -f -", &pod(name, "")) {
            (true, _) => Ok(()),
            (false, told) => Err(told),
        });
        s.says(
            &format!("wait --for=jsonpath={{.status.phase}}=Succeeded pod/{name} --timeout=20s"),
            &format!("pod/{name} condition met"),
        );
    }
    let claim = "apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {name: big}\nspec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 65Gi}}}\n";
    let told = s.refused(claim);
    assert!(told.contains("is forbidden: exceeded quota: one, requested: requests.storage=65Gi, used: requests.storage=0, limited: requests.storage=64Gi"), "{told}");
}

#[test]
fn a_limit_range_fills_in_what_is_missing_and_refuses_what_is_too_much() {
    let s = Scene::new("limit-range");
    let defaults = "default: {cpu: 0.5, memory: 512Mi}, defaultRequest: {cpu: 0.25, memory: 256Mi}, max: {cpu: 1, memory: 1Gi}, min: {cpu: 0.2, memory: 128Mi}";
    assert_eq!(s.apply(&limit_range(defaults)), "limitrange/sizes created");
    s.apply(&quota("all", "requests.cpu: '1', limits.cpu: '2'"));
    in_force(&s, "all");
    s.apply(&pod("plain", ""));
    assert_eq!(
        s.object("pods/plain")["spec"]["containers"][0]["resources"],
        json!({ "limits": { "cpu": "500m", "memory": "512Mi" }, "requests": { "cpu": "250m", "memory": "256Mi" } })
    );
    let told = s.refused(&pod("greedy", "limits: {cpu: 2}"));
    assert!(
        told.contains("pods \"greedy\" is forbidden: maximum cpu usage per Container is 1, but limit is 2"),
        "{told}"
    );
    let told = s.refused(&pod("tiny", "requests: {cpu: 100m}"));
    assert!(
        told.contains(
            "pods \"tiny\" is forbidden: minimum cpu usage per Container is 200m, but request is 100m"
        ),
        "{told}"
    );
    let told = s.ok("describe limits sizes");
    let row = ["Container", "cpu", "200m", "1", "250m", "500m", "-"];
    assert!(told.lines().any(|line| line.split_whitespace().collect::<Vec<_>>() == row), "{told}");
}

#[test]
fn a_disruption_budget_holds_evictions_back() {
    let s = Scene::new("budget-evict");
    s.apply(&WEB.replace("replicas: 3", "replicas: 2"));
    s.rollout("deploy/web");
    let budget = "apiVersion: policy/v1\nkind: PodDisruptionBudget\nmetadata: {name: web}\nspec: {minAvailable: 2, selector: {matchLabels: {app: web}}}\n";
    assert_eq!(s.apply(budget), "poddisruptionbudget.policy/web created");
    s.until("its pods are counted", "poddisruptionbudgets/web", |budget| {
        budget["status"]["currentHealthy"] == 2
    });
    assert_eq!(s.row("pdb web"), ["web", "2", "N/A", "0"]);
    let evict = |pod: &Value| {
        let pod = name(pod);
        let eviction = json!({ "apiVersion": "policy/v1", "kind": "Eviction", "metadata": { "name": pod } });
        s.post("pods", &format!("/{pod}/eviction"), &eviction)
    };
    let pods = s.until_ready(2, "app=web");
    let (status, told) = evict(&pods[0]);
    assert_eq!((status, &told["reason"]), (429, &json!("TooManyRequests")));
    assert_eq!(told["message"], "Cannot evict pod as it would violate the pod's disruption budget.");
    assert_eq!(
        told["details"]["causes"][0]["message"],
        "The disruption budget web needs 2 healthy pods and has 2 currently"
    );
    s.ok("scale deploy/web --replicas=3");
    s.until("one may go", "poddisruptionbudgets/web", |budget| budget["status"]["disruptionsAllowed"] == 1);
    let pods = s.until_ready(3, "app=web");
    assert_eq!((evict(&pods[0]).0, evict(&pods[1]).0), (201, 429));
    s.until_ready(3, "app=web");
    s.until("one may go again", "poddisruptionbudgets/web", |budget| {
        budget["status"]["disruptionsAllowed"] == 1
    });
}

#[test]
fn draining_a_node_respects_the_budget_and_ends_with_all_pods_elsewhere() {
    let s = Scene::new("budget-drain");
    let nodes = s.nodes(2);
    let spec = "spec: {nodeSelector: {pool: budget-drain}, tolerations: [{key: pool, operator: Exists}], containers:";
    // Slow enough that the second eviction comes while the first is being made good.
    s.apply(
        &WEB.replace("spec: {containers:", spec).replace("replicas: 3", "replicas: 4").replace("100ms", "1s"),
    );
    s.apply("apiVersion: policy/v1\nkind: PodDisruptionBudget\nmetadata: {name: web}\nspec: {maxUnavailable: 1, selector: {matchLabels: {app: web}}}\n");
    s.rollout("deploy/web");
    s.until("one may go", "poddisruptionbudgets/web", |budget| budget["status"]["disruptionsAllowed"] == 1);
    let told = std::thread::scope(|threads| {
        let drain = threads.spawn(|| s.ok(&format!("drain {} --timeout=30s", nodes[0])));
        s.wait("all pods elsewhere, 3 always ready", || {
            let pods = s.list("pods");
            let ready: Vec<_> = pods.iter().filter(|pod| is_ready(pod)).collect();
            assert!(ready.len() >= 3, "{}", s.ok("get pods -o wide"));
            let moved = ready.iter().filter(|pod| pod["spec"]["nodeName"] == nodes[1].as_str()).count();
            if moved == 4 { Ok(()) } else { Err(s.ok("get pods -o wide")) }
        });
        drain.join().expect("drain ends")
    });
    for part in [
        "cordoned",
        "evicting pod budget-drain/web-",
        "(will retry after 5s): Cannot evict pod as it would violate the pod's disruption budget.",
        "drained",
    ] {
        assert!(told.contains(part), "{part} is missing: {told}");
    }
    s.says(&format!("get node {} --no-headers -o custom-columns=S:.spec.unschedulable", nodes[0]), "true");
}

#[test]
fn an_autoscaler_keeps_its_bounds_and_says_that_metrics_are_missing() {
    let s = Scene::new("autoscale");
    s.apply(&WEB.replace("replicas: 3", "replicas: 1"));
    s.says(
        "autoscale deploy/web --min=2 --max=5 --cpu-percent=50",
        "horizontalpodautoscaler.autoscaling/web autoscaled",
    );
    s.until_ready(2, "app=web");
    s.until_event(
        "SuccessfulRescale",
        "New size: 2; reason: Current number of replicas below Spec.MinReplicas",
    );
    let scaler = s.until("it misses metrics", "horizontalpodautoscalers/web", |scaler| {
        condition(scaler, "ScalingActive")["status"] == "False"
    });
    assert_eq!(condition(&scaler, "ScalingActive")["reason"], "FailedGetResourceMetric");
    assert_eq!(s.row("hpa web"), ["web", "Deployment/web", "cpu:", "<unknown>/50%", "2", "5", "2"]);
    s.until_event("FailedGetResourceMetric", "failed to get cpu utilization: unable to get metrics for resource cpu: unable to fetch metrics from resource metrics API");
}
