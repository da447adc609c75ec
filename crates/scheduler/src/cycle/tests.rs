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
    Chooser::new(SmallRng::seed_from_u64(1))
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

/// A pod of this priority and cpu, running since that minute.
fn running(name: &str, priority: i32, cpu: &str, minute: u32, labels: Value) -> Arc<PodInfo> {
    let pod = json!({
        "metadata": {"name": name, "namespace": "ns", "uid": name, "labels": labels},
        "spec": {"priority": priority, "containers": [{"name": "c", "resources": {"requests": {"cpu": cpu}}}]},
        "status": {"startTime": format!("2026-01-01T00:{minute:02}:00Z")},
    });
    Arc::new(PodInfo::new(Arc::new(serde_json::from_value(pod).unwrap())))
}

/// Where room is made, and who goes.
fn preempted(pod: &PodInfo, world: &mut World) -> Option<(String, Vec<String>)> {
    match decide(pod, &Profile::default(), world, &mut chooser(), None) {
        Decision::Node(node, _) => panic!("it fits {node} already"),
        Decision::Unschedulable(refusal) => {
            let found = refusal.preemption?;
            let mut victims: Vec<String> =
                found.victims.iter().map(|victim| victim.key.name.clone()).collect();
            victims.sort();
            Some((found.node.to_string(), victims))
        }
    }
}

#[test]
fn preemption_harms_least() {
    let none = || json!({});
    let app = || json!({"app": "guarded"});
    // What runs where, and whom a pod of priority 100 that wants 3 of 4 cores displaces.
    let cases = [
        (
            "the lower of the most important victims",
            vec![("n0", running("a", 20, "3", 1, none())), ("n1", running("b", 10, "3", 1, none()))],
            ("n1", vec!["b"]),
        ),
        (
            "the smaller sum of priorities",
            vec![
                ("n0", running("a", 10, "2", 1, none())),
                ("n0", running("b", 10, "2", 1, none())),
                ("n1", running("c", 10, "3", 1, none())),
            ],
            ("n1", vec!["c"]),
        ),
        (
            "those that started last",
            vec![("n0", running("a", 10, "3", 1, none())), ("n1", running("b", 10, "3", 2, none()))],
            ("n1", vec!["b"]),
        ),
        (
            "no budget is broken if that can be",
            vec![("n0", running("a", 20, "3", 1, none())), ("n1", running("b", 10, "3", 1, app()))],
            ("n0", vec!["a"]),
        ),
        (
            "no more go than must: the most important stay",
            vec![
                ("n0", running("a", 10, "1", 1, none())),
                ("n0", running("b", 5, "2", 1, none())),
                ("n0", running("c", 1, "1", 1, none())),
                ("n1", running("d", 100, "4", 1, none())),
            ],
            ("n0", vec!["b", "c"]),
        ),
    ];
    for (what, there, (node, victims)) in cases {
        let mut world = world(&[json!({}), json!({})]);
        let budget = json!({
            "metadata": {"name": "guard", "namespace": "ns"}, "spec": {"selector": {"matchLabels": {"app": "guarded"}}},
            "status": {"disruptionsAllowed": 0, "currentHealthy": 1, "desiredHealthy": 1, "expectedPods": 1},
        });
        let budget = serde_json::from_value(budget).unwrap();
        world.objects.budgets.set(&knarr_client::Change::Added(Arc::new(budget)));
        for (on, pod) in there {
            world.table.add_pod(on, pod);
        }
        let mut important = wants("3");
        important["priority"] = json!(100);
        let expected = (node.to_owned(), victims.into_iter().map(str::to_owned).collect());
        assert_eq!(preempted(&pod("new", important), &mut world), Some(expected), "{what}");
    }
}

#[test]
fn preemption_follows_rules_other_than_room() {
    let host = "kubernetes.io/hostname";
    let term = json!([{"topologyKey": host, "labelSelector": {"matchLabels": {"app": "x"}}}]);
    let away = json!({"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": term}});
    let mut world = world(&[json!({})]);
    world.table.add_pod("n0", running("x", 1, "1", 1, json!({"app": "x"})));
    world.table.add_pod("n0", running("y", 1, "1", 1, json!({"app": "y"})));
    let new = pod("new", json!({"priority": 5, "affinity": away}));
    assert_eq!(preempted(&new, &mut world), Some(("n0".to_owned(), vec!["x".to_owned()])));
}

#[test]
fn what_preemption_says() {
    let cases = [
        (
            json!({"priority": 0}),
            "preemption: 0/2 nodes are available: 1 No preemption victims found for incoming pod, 1 Preemption is not helpful for scheduling.",
        ),
        (
            json!({"priority": 9, "preemptionPolicy": "Never"}),
            "preemption: not eligible due to preemptionPolicy=Never.",
        ),
        (
            json!({"priority": 9, "big": true}),
            "preemption: 0/2 nodes are available: 2 Preemption is not helpful for scheduling.",
        ),
    ];
    for (mut spec, expected) in cases {
        let mut world = world(&[json!({}), json!({"unschedulable": true})]);
        world.table.add_pod("n0", running("a", 3, "3", 1, json!({})));
        let cpu = if spec["big"].is_null() { "2" } else { "5" };
        spec["containers"] = wants(cpu)["containers"].clone();
        let said = message(&pod("new", spec), &mut world);
        assert!(said.ends_with(expected), "{said}");
    }
}

#[test]
fn room_that_was_promised_is_left_to_whom_it_was_promised() {
    let mut world = world(&[json!({})]);
    let mut important = wants("3");
    important["priority"] = json!(10);
    let important = Arc::new(pod("important", important));
    world.table.nominate(&important, Some("n0"));
    let mut lower = wants("2");
    lower["priority"] = json!(5);
    assert!(run(&pod("lower", lower.clone()), &mut world).is_err());
    lower["priority"] = json!(20);
    assert_eq!(run(&pod("higher", lower), &mut world), Ok("n0".into()));
    assert_eq!(run(&important, &mut world), Ok("n0".into()));
}
