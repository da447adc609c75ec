//! Deployments: sets of each template, made and scaled by name and hash; deletion, adoption, Recreate.

use crate::cluster::{Scene, condition, image, is_ready, name, names, owner};
use serde_json::Value;

/// Three pods of `web:1`; each is ready a tenth of a second after its start.
pub const WEB: &str = "
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 3
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}, annotations: {simulated.knarr.dev/ready-delay: 100ms}}
    spec: {containers: [{name: c, image: 'web:1'}]}
";

pub const DONE: &str = "deployment \"web\" successfully rolled out";

/// The replica set that makes pods of an image.
pub fn set_of(s: &Scene, wanted: &str) -> Value {
    let sets = s.list("replicasets");
    let found =
        sets.into_iter().find(|set| set["spec"]["template"]["spec"]["containers"][0]["image"] == wanted);
    found.unwrap_or_else(|| panic!("no replica set of {wanted}: {}", s.ok("get rs -o wide")))
}

#[test]
fn a_deployment_makes_a_set_named_by_its_hash_and_owns_its_pods_through_it() {
    let s = Scene::new("deploy-create");
    s.says("create deployment web --image=nginx:1 --replicas=2", "deployment.apps/web created");
    let lines = s.rollout("deployment/web");
    assert_eq!(lines.last().map(String::as_str), Some(DONE), "{lines:?}");
    assert_eq!(s.row("deploy web"), ["web", "2/2", "2", "2"]);
    let set = set_of(&s, "nginx:1");
    let hash = set["metadata"]["labels"]["pod-template-hash"].as_str().expect("a hash").to_owned();
    assert_eq!(name(&set), format!("web-{hash}"));
    assert_eq!(set["spec"]["selector"]["matchLabels"]["pod-template-hash"], hash);
    for pod in s.until_ready(2, "app=web") {
        assert!(
            name(&pod).starts_with(&format!("web-{hash}-"))
                && pod["metadata"]["labels"]["pod-template-hash"] == hash
        );
    }
    let owners = s.ok("get pods,rs -o custom-columns=NAME:.metadata.name,KIND:.metadata.ownerReferences[*].kind,OWNER:.metadata.ownerReferences[*].name --no-headers");
    assert_eq!(owners.matches("ReplicaSet").count(), 2, "{owners}");
    assert_eq!(owners.matches("Deployment").count(), 1, "{owners}");
    s.until_event("ScalingReplicaSet", &format!("Scaled up replica set web-{hash} from 0 to 2"));
}

#[test]
fn scaling_keeps_the_set_and_what_somebody_does_to_the_set_is_put_right() {
    let s = Scene::new("deploy-scale");
    assert_eq!(s.apply(WEB), "deployment.apps/web created");
    s.rollout("deploy/web");
    let set = name(&set_of(&s, "web:1"));
    s.says("scale deploy/web --replicas=5", "deployment.apps/web scaled");
    s.rollout("deploy/web");
    assert_eq!(s.row("deploy web"), ["web", "5/5", "5", "5"]);
    s.says("scale deploy/web --replicas=2 --current-replicas=5", "deployment.apps/web scaled");
    s.until_ready(2, "app=web");
    assert_eq!(names(&s.list("replicasets")), std::slice::from_ref(&set));
    s.ok(&format!("scale rs/{set} --replicas=4"));
    let which = format!("replicasets/{set}");
    s.until("the set is back at 2", &which, |set| {
        set["spec"]["replicas"] == 2 && set["status"]["replicas"] == 2
    });
    s.until_ready(2, "app=web");
    s.ok("label deploy web tier=front");
    s.until("the label is seen", "deployments/web", |d| {
        d["status"]["observedGeneration"] == d["metadata"]["generation"]
    });
    assert_eq!(names(&s.list("replicasets")), [set]);
}

#[test]
fn an_earlier_template_finds_its_set_again() {
    let s = Scene::new("deploy-reuse");
    s.apply(WEB);
    s.rollout("deploy/web");
    let first = name(&set_of(&s, "web:1"));
    assert_eq!(s.apply(&WEB.replace("web:1", "web:2")), "deployment.apps/web configured");
    s.rollout("deploy/web");
    s.until_ready(3, "app=web");
    assert_eq!(s.row(&format!("rs {first}")), [first.as_str(), "0", "0", "0"]);
    let second = name(&set_of(&s, "web:2"));
    s.until("3 ready", &format!("replicasets/{second}"), |set| set["status"]["readyReplicas"] == 3);
    assert_eq!(s.row(&format!("rs {second}")), [second.as_str(), "3", "3", "3"]);
    s.ok("scale deploy/web --replicas=4");
    s.rollout("deploy/web");
    assert_eq!(s.apply(WEB), "deployment.apps/web configured");
    s.rollout("deploy/web");
    let pods = s.until_ready(3, "app=web");
    assert!(pods.iter().all(|pod| owner(pod) == first), "{pods:#?}");
    assert_eq!(s.list("replicasets").len(), 2);
    assert_eq!(s.apply(WEB), "deployment.apps/web unchanged");
}

#[test]
fn deleting_a_deployment_takes_sets_and_pods_or_leaves_them_to_the_next() {
    let s = Scene::new("deploy-delete");
    s.apply(WEB);
    s.rollout("deploy/web");
    let (set, pods) = (names(&s.list("replicasets")), names(&s.until_ready(3, "app=web")));
    s.says(
        "delete deploy web --cascade=orphan",
        "deployment.apps \"web\" deleted from deploy-delete namespace",
    );
    let orphan = format!("replicasets/{}", set[0]);
    s.until("the set belongs to nobody", &orphan, |set| owner(set).is_empty());
    s.apply(WEB);
    s.rollout("deploy/web");
    assert_eq!((names(&s.list("replicasets")), names(&s.until_ready(3, "app=web"))), (set, pods));
    assert_eq!(owner(&s.object(&orphan)), "web");
    s.says(
        "delete deploy web --cascade=foreground",
        "deployment.apps \"web\" deleted from deploy-delete namespace",
    );
    // In the foreground the dependents go first: kubectl returned after them.
    assert!(s.list("replicasets").is_empty() && s.list("pods").is_empty(), "{}", s.ok("get all"));
}

#[test]
fn recreate_ends_all_old_pods_before_it_makes_a_new_one() {
    let s = Scene::new("deploy-recreate");
    let slow = WEB
        .replace("replicas: 3", "replicas: 3\n  strategy: {type: Recreate}")
        .replace("ready-delay: 100ms", "stop-delay: 200ms");
    s.apply(&slow);
    s.rollout("deploy/web");
    s.says("set image deploy/web c=web:2", "deployment.apps/web image updated");
    s.wait("3 new pods, never beside an old one", || {
        let pods = s.list("pods");
        let new = pods.iter().filter(|pod| image(pod) == "web:2").count();
        assert!(new == 0 || new == pods.len(), "old and new at a time: {}", s.ok("get pods"));
        if new == 3 && pods.iter().all(is_ready) { Ok(()) } else { Err(s.ok("get pods")) }
    });
    assert_eq!(s.rollout("deploy/web"), [DONE]);
}

#[test]
fn a_restart_replaces_every_pod() {
    let s = Scene::new("deploy-restart");
    s.apply(WEB);
    s.rollout("deploy/web");
    let before = names(&s.until_ready(3, "app=web"));
    s.says("rollout restart deploy/web", "deployment.apps/web restarted");
    s.rollout("deploy/web");
    let after = names(&s.until_ready(3, "app=web"));
    assert!(after.iter().all(|pod| !before.contains(pod)), "{before:?} {after:?}");
    let available = condition(&s.object("deployments/web"), "Available");
    assert_eq!(
        (&available["status"], &available["reason"]),
        (&"True".into(), &"MinimumReplicasAvailable".into())
    );
}

#[test]
fn a_node_that_may_run_nothing_loses_its_pods_to_others() {
    let s = Scene::new("deploy-evicted");
    let nodes = s.nodes(2);
    let spec = "spec: {nodeSelector: {pool: deploy-evicted}, tolerations: [{key: pool, operator: Exists}], containers:";
    s.apply(&WEB.replace("spec: {containers:", spec).replace("replicas: 3", "replicas: 4"));
    s.rollout("deploy/web");
    let on = |pods: &[Value], node: &str| pods.iter().filter(|pod| pod["spec"]["nodeName"] == node).count();
    let pods = s.until_ready(4, "app=web");
    assert_eq!((on(&pods, &nodes[0]), on(&pods, &nodes[1])), (2, 2), "spread over the nodes");
    s.says(&format!("taint node {} broken=yes:NoExecute", nodes[0]), &format!("node/{} tainted", nodes[0]));
    s.until_pods("4 ready pods on the other node", "app=web", |pods| {
        on(pods, &nodes[1]) == 4 && pods.len() == 4 && pods.iter().all(is_ready)
    });
}
