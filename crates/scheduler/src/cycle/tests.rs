//! Decisions and their wording.

use super::*;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use serde_json::{Value, json};
use std::sync::Arc;

fn pod(name: &str, spec: Value) -> PodInfo {
    let mut spec = spec;
    if spec["containers"].is_null() {
        spec["containers"] = json!([{"name": "c"}]);
    }
    let labels = spec["labels"].take();
    let pod = json!({
        "metadata": {"name": name, "namespace": "ns", "uid": name, "labels": labels}, "spec": spec,
    });
    PodInfo::new(Arc::new(serde_json::from_value(pod).unwrap()))
}

fn wants(cpu: &str) -> Value {
    json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": cpu}}}]})
}

/// Nodes n0, n1, ... with 4 cores each, changed by `nodes`.
fn world(nodes: &[Value]) -> World {
    let mut world = World::default();
    let table = &mut world.table;
    for (index, extra) in nodes.iter().enumerate() {
        let name = format!("n{index}");
        let mut labels = json!({"kubernetes.io/hostname": name});
        if let Some(more) = extra["labels"].as_object() {
            labels.as_object_mut().unwrap().extend(more.clone());
        }
        let node = json!({
            "metadata": {"name": name, "labels": labels},
            "spec": {"taints": extra["taints"], "unschedulable": extra["unschedulable"]},
            "status": {"allocatable": {"cpu": "4", "memory": "8Gi", "pods": extra["pods"].as_str().unwrap_or("110")}},
        });
        table.set_node(Arc::new(serde_json::from_value(node).unwrap()));
    }
    world
}

fn chooser() -> Chooser<SmallRng> {
    Chooser { start: 0, random: SmallRng::seed_from_u64(1) }
}

/// The chosen node, or the message.
fn run(pod: &PodInfo, world: &mut World) -> Result<String, String> {
    match decide(pod, &Profile::default(), world, &mut chooser(), None) {
        Decision::Node(node, _) => Ok(node.to_string()),
        Decision::Unschedulable(refusal) => Err(refusal.message),
    }
}

fn message(pod: &PodInfo, world: &mut World) -> String {
    run(pod, world).expect_err("expected a refusal")
}

#[test]
fn refusals_are_worded_as_upstream() {
    let tainted = json!({"taints": [{"key": "gpu", "value": "yes", "effect": "NoSchedule"}]});
    let plain = json!({});
    let cordoned = json!({"unschedulable": true});
    let cases = [
        (
            vec![tainted.clone(), plain.clone(), plain.clone()],
            wants("5"),
            "0/3 nodes are available: 1 node(s) had untolerated taint {gpu: yes}, 2 Insufficient cpu. preemption: 0/3 \
             nodes are available: 3 Preemption is not helpful for scheduling.",
        ),
        (
            vec![cordoned.clone()],
            json!({}),
            "0/1 nodes are available: 1 node(s) were unschedulable. preemption: 0/1 nodes are available: 1 Preemption \
             is not helpful for scheduling.",
        ),
        (
            vec![plain.clone()],
            json!({"nodeSelector": {"disk": "ssd"}}),
            "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector. preemption: 0/1 nodes are \
             available: 1 Preemption is not helpful for scheduling.",
        ),
        (
            vec![json!({"pods": "0"})],
            json!({}),
            "0/1 nodes are available: 1 Too many pods. preemption: 0/1 nodes are available: 1 No preemption victims \
             found for incoming pod.",
        ),
        (
            vec![json!({"pods": "0"})],
            json!({"preemptionPolicy": "Never"}),
            "0/1 nodes are available: 1 Too many pods. preemption: not eligible due to preemptionPolicy=Never.",
        ),
        (
            vec![plain.clone()],
            json!({"volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "data"}}]}),
            "0/1 nodes are available: persistentvolumeclaim \"data\" not found. preemption: 0/1 nodes are available: 1 \
             Preemption is not helpful for scheduling.",
        ),
        (vec![], json!({}), "no nodes available to schedule pods"),
    ];
    for (nodes, spec, expected) in cases {
        assert_eq!(message(&pod("p", spec), &mut world(&nodes)), expected);
    }
}

#[test]
fn the_emptier_node_is_preferred_and_a_full_one_refused() {
    let mut world = world(&[json!({}), json!({})]);
    world.table.add_pod("n0", Arc::new(pod("a", wants("1"))));
    assert_eq!(run(&pod("b", wants("1")), &mut world), Ok("n1".into()));
    world.table.add_pod("n1", Arc::new(pod("b", wants("4"))));
    assert_eq!(run(&pod("c", wants("3")), &mut world), Ok("n0".into()));
    assert!(message(&pod("d", wants("3500m")), &mut world).contains("2 Insufficient cpu"));
}

#[test]
fn ties_are_broken_fairly() {
    let mut world = world(&[json!({}), json!({}), json!({})]);
    let mut chooser = chooser();
    let mut counts = std::collections::BTreeMap::new();
    for _ in 0..300 {
        let decision = decide(&pod("p", json!({})), &Profile::default(), &mut world, &mut chooser, None);
        let Decision::Node(node, _) = decision else { panic!() };
        *counts.entry(node).or_insert(0) += 1;
    }
    assert!(counts.len() == 3 && counts.values().all(|count| *count > 60), "{counts:?}");
}

#[test]
fn host_ports_collide_per_address_and_protocol() {
    let port = |ip: &str, protocol: &str| {
        json!({"containers": [{"name": "c", "ports": [
            {"containerPort": 80, "hostPort": 80, "hostIP": ip, "protocol": protocol},
        ]}]})
    };
    let cases = [
        (port("", "TCP"), port("", "TCP"), false),
        (port("", "TCP"), port("", "UDP"), true),
        (port("10.0.0.1", "TCP"), port("10.0.0.2", "TCP"), true),
        (port("10.0.0.1", "TCP"), port("", "TCP"), false),
    ];
    for (there, wanted, fits) in cases {
        let mut world = world(&[json!({})]);
        world.table.add_pod("n0", Arc::new(pod("there", there.clone())));
        let node = run(&pod("p", wanted.clone()), &mut world).is_ok();
        assert_eq!(node, fits, "{there} and {wanted}");
    }
}

#[test]
fn required_affinity_between_pods_is_kept_in_both_directions() {
    let zone = |name: &str| json!({"labels": {"zone": name}});
    let mut world = world(&[zone("a"), zone("a"), zone("b")]);
    let term = |app: &str| json!([{"topologyKey": "zone", "labelSelector": {"matchLabels": {"app": app}}}]);
    let rule = |kind: &str, app: &str| json!({"labels": {"app": "web"}, "affinity": {kind: {"requiredDuringSchedulingIgnoredDuringExecution": term(app)}}});
    let first = run(&pod("first", rule("podAffinity", "web")), &mut world);
    assert!(first.is_ok(), "the first of its group may go anywhere");
    assert!(
        message(&pod("p", rule("podAffinity", "db")), &mut world)
            .contains("3 node(s) didn't match pod affinity rules")
    );
    world.table.add_pod("n0", Arc::new(pod("db", json!({"labels": {"app": "db"}}))));
    let near = run(&pod("p", rule("podAffinity", "db")), &mut world);
    assert!(near == Ok("n0".into()) || near == Ok("n1".into()));
    assert_eq!(run(&pod("p", rule("podAntiAffinity", "db")), &mut world), Ok("n2".into()));
    let repelling = rule("podAntiAffinity", "web");
    world.table.add_pod("n2", Arc::new(pod("loner", repelling)));
    let web = pod("p", json!({"labels": {"app": "web"}, "nodeSelector": {"zone": "b"}}));
    assert!(message(&web, &mut world).contains("1 node(s) didn't satisfy existing pods anti-affinity rules"));
}

#[test]
fn hard_spread_constraints_keep_the_skew() {
    let zone = |name: &str| json!({"labels": {"zone": name}});
    let mut world = world(&[zone("a"), zone("b"), json!({})]);
    let spec = json!({"labels": {"app": "web"}, "topologySpreadConstraints": [{
        "maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": {"matchLabels": {"app": "web"}},
    }]});
    world.table.add_pod("n0", Arc::new(pod("one", json!({"labels": {"app": "web"}}))));
    assert_eq!(run(&pod("two", spec.clone()), &mut world), Ok("n1".into()));
    world.table.add_pod("n0", Arc::new(pod("three", json!({"labels": {"app": "web"}}))));
    world.table.add_pod("n0", Arc::new(pod("four", json!({"labels": {"app": "web"}}))));
    let mut only_a = spec;
    only_a["nodeSelector"] = json!({"kubernetes.io/hostname": "n1"});
    assert_eq!(run(&pod("p", only_a), &mut world), Ok("n1".into()));
}
