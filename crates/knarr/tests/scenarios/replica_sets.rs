//! ReplicaSets and ReplicationControllers: a number is kept, pods come and go by their labels.

use crate::cluster::{Scene, is_ready, name, names, owner};
use serde_json::Value;

const SET: &str = "
apiVersion: apps/v1
kind: ReplicaSet
metadata: {name: web}
spec:
  replicas: 3
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: c, image: 'web:1'}]}
";

const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: alone, labels: {app: web}}
spec: {containers: [{name: c, image: 'web:1'}]}
";

#[test]
fn a_replica_set_scales_up_and_down_and_tells_so() {
    let s = Scene::new("rs-scale");
    assert_eq!(s.apply(SET), "replicaset.apps/web created");
    s.until("3 ready", "replicasets/web", |set| set["status"]["readyReplicas"] == 3);
    assert_eq!(s.row("rs web"), ["web", "3", "3", "3"]);
    s.says("scale rs/web --replicas=5", "replicaset.apps/web scaled");
    s.until("5 ready", "replicasets/web", |set| set["status"]["readyReplicas"] == 5);
    assert_eq!(s.row("rs web"), ["web", "5", "5", "5"]);
    let pods = s.until_ready(5, "app=web");
    assert!(pods.iter().all(|pod| owner(pod) == "web" && name(pod).len() == "web-".len() + 5), "{pods:#?}");
    assert_eq!(s.apply(&SET.replace("replicas: 3", "replicas: 2")), "replicaset.apps/web configured");
    s.until("2 left", "replicasets/web", |set| set["status"]["replicas"] == 2);
    s.until_event("SuccessfulCreate", "Created pod: web-");
    s.until_event("SuccessfulDelete", "Deleted pod: web-");
    let told = s.ok("describe rs web");
    for part in
        ["2 current / 2 desired", "2 Running / 0 Waiting / 0 Succeeded / 0 Failed", "SuccessfulDelete"]
    {
        assert!(told.contains(part), "{part} is missing: {told}");
    }
}

#[test]
fn a_deleted_pod_is_replaced_by_one_of_another_name() {
    let s = Scene::new("rs-replace");
    s.apply(SET);
    let before = names(&s.until_ready(3, "app=web"));
    let gone = &before[0];
    s.says(&format!("delete pod {gone}"), &format!("pod \"{gone}\" deleted from rs-replace namespace"));
    let after = names(&s.until_ready(3, "app=web"));
    assert!(!after.contains(gone), "{after:?}");
    assert_eq!(after.iter().filter(|name| before.contains(name)).count(), 2, "the others stay: {after:?}");
}

#[test]
fn a_relabelled_pod_is_released_and_replaced_and_on_its_return_one_is_too_many() {
    let s = Scene::new("rs-relabel");
    s.apply(SET);
    let released = name(&s.until_ready(3, "app=web")[0]);
    s.says(&format!("label pod {released} app=debug --overwrite"), &format!("pod/{released} labeled"));
    s.until_ready(3, "app=web");
    s.until("the pod belongs to nobody", &format!("pods/{released}"), |pod| owner(pod).is_empty());
    assert!(is_ready(&s.object(&format!("pods/{released}"))), "it goes on running");
    s.ok(&format!("label pod {released} app=web --overwrite"));
    s.until_event("SuccessfulDelete", "Deleted pod: web-");
    s.until_ready(3, "app=web");
}

#[test]
fn pods_that_are_there_already_are_adopted_and_only_the_missing_are_created() {
    let s = Scene::new("rs-adopt");
    assert_eq!(s.apply(POD), "pod/alone created");
    s.until_ready(1, "app=web");
    s.apply(SET);
    let pods = s.until_ready(3, "app=web");
    assert!(names(&pods).contains(&"alone".to_owned()), "{pods:#?}");
    assert!(pods.iter().all(|pod| owner(pod) == "web"), "{pods:#?}");
    s.ok("delete rs web");
    s.until_pods("all pods of the set are gone, adopted or not", "app=web", <[Value]>::is_empty);
}

#[test]
fn a_replication_controller_deletes_a_pod_too_many() {
    let s = Scene::new("rc-surplus");
    let controller = "
apiVersion: v1
kind: ReplicationController
metadata: {name: nginx}
spec:
  replicas: 2
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: c, image: 'web:1'}]}
";
    assert_eq!(s.apply(controller), "replicationcontroller/nginx created");
    s.until("2 ready", "replicationcontrollers/nginx", |set| set["status"]["readyReplicas"] == 2);
    assert_eq!(s.row("rc nginx"), ["nginx", "2", "2", "2"]);
    s.apply(POD);
    // Often the youngest, but ages count in whole seconds.
    s.until_event("SuccessfulDelete", "Deleted pod: ");
    s.until_ready(2, "app=web");
    s.says("delete rc nginx", "replicationcontroller \"nginx\" deleted from rc-surplus namespace");
    s.until_pods("its pods are gone", "app=web", <[Value]>::is_empty);
}

#[test]
fn orphaned_pods_stay_and_are_adopted_by_the_set_that_comes_back() {
    let s = Scene::new("rs-orphan");
    s.apply(SET);
    let before = names(&s.until_ready(3, "app=web"));
    s.says("delete rs web --cascade=orphan", "replicaset.apps \"web\" deleted from rs-orphan namespace");
    s.says("get rs", "No resources found in rs-orphan namespace.");
    let orphans = s.until_ready(3, "app=web");
    assert_eq!(names(&orphans), before);
    let owners =
        "get pods -o custom-columns=NAME:.metadata.name,OWNER:.metadata.ownerReferences[*].name --no-headers";
    assert!(s.ok(owners).lines().all(|line| line.ends_with("<none>")), "{}", s.ok(owners));
    assert_eq!(s.apply(SET), "replicaset.apps/web created");
    s.until_pods("all are adopted", "app=web", |pods| pods.iter().all(|pod| owner(pod) == "web"));
    s.until("3 ready", "replicasets/web", |set| set["status"]["readyReplicas"] == 3);
    assert_eq!(names(&s.pods("app=web")), before);
    s.ok("delete rs web");
    s.until_pods("they go with the set", "app=web", <[Value]>::is_empty);
}

#[test]
fn a_set_based_selector_counts_what_it_matches_and_nothing_else() {
    let s = Scene::new("rs-versions");
    s.apply(&POD.replace("app: web", "app: web, version: '0.3'"));
    let selector = "selector: {matchLabels: {app: web}, matchExpressions: [{key: version, operator: In, values: ['0.1', '0.2']}]}";
    let set = SET
        .replace("selector: {matchLabels: {app: web}}", selector)
        .replace("labels: {app: web}", "labels: {app: web, version: '0.1'}");
    s.apply(&set);
    s.until_ready(3, "version=0.1");
    s.until("3 counted", "replicasets/web", |set| set["status"]["readyReplicas"] == 3);
    assert_eq!(owner(&s.object("pods/alone")), "");
}

#[test]
fn a_selector_that_misses_its_template_is_refused_and_none_may_change() {
    let s = Scene::new("rs-selector");
    let told = s.refused(&SET.replace("labels: {app: web}", "labels: {app: other}"));
    assert!(
        told.starts_with("The ReplicaSet \"web\" is invalid: spec.template.metadata.labels: Invalid value:"),
        "{told}"
    );
    assert!(told.contains("`selector` does not match template `labels`"), "{told}");
    s.apply(SET);
    let both = SET
        .replace("matchLabels: {app: web}", "matchLabels: {app: x}")
        .replace("labels: {app: web}", "labels: {app: x}");
    let told = s.refused(&both);
    assert!(told.contains("spec.selector: Invalid value:") && told.contains("field is immutable"), "{told}");
}
