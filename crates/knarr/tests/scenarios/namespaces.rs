//! Namespaces: names are unique within one; it ends in order, and what has finalizers holds it.

use crate::cluster::{Scene, condition, text_of};
use crate::deployments::WEB;

/// A pod and a setting that somebody holds on to.
const HELD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: held, finalizers: [example.com/hold]}
spec: {containers: [{name: c, image: 'x:1'}]}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: settings, finalizers: [example.com/keep]}
";

#[test]
fn a_namespace_ends_with_all_that_is_in_it() {
    let s = Scene::new("ns-end");
    s.apply(WEB);
    s.rollout("deploy/web");
    s.says("delete namespace ns-end", "namespace \"ns-end\" deleted");
    // kubectl waited for the end.
    assert!(s.object("namespaces/ns-end").is_null());
    assert!(s.list("pods").is_empty() && s.list("deployments").is_empty() && s.list("events").is_empty());
    assert_eq!(
        s.fails("get namespace ns-end").trim(),
        "Error from server (NotFound): namespaces \"ns-end\" not found"
    );
}

#[test]
fn names_are_unique_in_a_namespace_only() {
    let (s, other) = (Scene::new("ns-one"), Scene::new("ns-two"));
    s.says("create configmap settings --from-literal=color=blue", "configmap/settings created");
    other.says("create configmap settings --from-literal=color=red", "configmap/settings created");
    let told = s.fails("create configmap settings");
    assert_eq!(told.trim(), "error: failed to create configmap: configmaps \"settings\" already exists");
    let told = s.fails("create namespace ns-one");
    assert_eq!(told.trim(), "Error from server (AlreadyExists): namespaces \"ns-one\" already exists");
    s.says("get configmap settings -o jsonpath={.data.color}", "blue");
    let old = text_of(&s.object("configmaps/settings")["metadata"]["uid"]);
    s.ok("delete configmap settings");
    s.ok("create configmap settings");
    assert_ne!(s.object("configmaps/settings")["metadata"]["uid"], old.as_str());
    let all = s.ok("get configmaps -A");
    assert!(all.lines().any(|line| line.starts_with("ns-two") && line.contains(" settings ")), "{all}");
}

#[test]
fn finalizers_hold_a_namespace_pods_first_and_nothing_new_comes() {
    let s = Scene::new("ns-held");
    s.apply(HELD);
    s.says("delete namespace ns-held --wait=false", "namespace \"ns-held\" deleted");
    let namespace = s.until("it says who holds it", "namespaces/ns-held", |namespace| {
        let held = text_of(&condition(namespace, "NamespaceFinalizersRemaining")["message"]);
        held.contains("example.com/hold in 1 resource instances")
    });
    assert_eq!(s.row("namespace ns-held"), ["ns-held", "Terminating"]);
    let remaining = condition(&namespace, "NamespaceContentRemaining");
    assert_eq!((&remaining["status"], &remaining["reason"]), (&"True".into(), &"SomeResourcesRemain".into()));
    assert!(text_of(&remaining["message"]).contains("pods. has 1 resource instances"), "{remaining}");
    assert!(s.object("configmaps/settings")["metadata"]["deletionTimestamp"].is_null(), "pods go first");
    let told = s.fails("create configmap more");
    assert_eq!(
        told.trim(),
        "error: failed to create configmap: configmaps \"more\" is forbidden: unable to create new content in namespace ns-held because it is being terminated"
    );
    assert!(s.ok("describe namespace ns-held").contains("No resource quota.\n\nNo LimitRange resource.\n"));
    s.ok(r#"patch pod held --type=merge -p '{"metadata":{"finalizers":null}}'"#);
    s.until("the setting holds it now", "namespaces/ns-held", |namespace| {
        let held = text_of(&condition(namespace, "NamespaceFinalizersRemaining")["message"]);
        held == "Some content in the namespace has finalizers remaining: example.com/keep in 1 resource instances"
    });
    s.ok(r#"patch configmap settings --type=merge -p '{"metadata":{"finalizers":null}}'"#);
    s.until("it is gone", "namespaces/ns-held", serde_json::Value::is_null);
}

#[test]
fn the_namespaces_that_every_cluster_has_stay() {
    let s = Scene::new("ns-builtin");
    for name in ["default", "kube-system", "kube-public"] {
        assert_eq!(s.row(&format!("namespace {name}")), [name, "Active"]);
        let told = s.fails(&format!("delete namespace {name}"));
        assert!(told.contains("is forbidden: this namespace may not be deleted"), "{told}");
    }
}
