//! Golden tables: for each plugin alone, which nodes of a small cluster fit and how they score. Numbers are those of
//! upstream's formulae, most of them of its own tests.

use super::*;
use crate::cycle::inspect::judge;
use crate::profile::Args;
use knarr_client::Change;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Arc;

/// A cluster, a pod, and what the plugin says: fitting nodes with scores, or the message.
struct Case {
    what: &'static str,
    nodes: Vec<Value>,
    /// Pods with their nodes.
    there: Vec<(&'static str, Value)>,
    pod: Value,
    args: Args,
    objects: Vec<Object>,
    expected: Result<Vec<(&'static str, i64)>, &'static str>,
}

enum Object {
    Claim(Value),
    Volume(Value),
    Class(Value),
    CsiNode(Value),
    Attachment(Value),
    CsiDriver(Value),
    CsiCapacity(Value),
    Service(Value),
}

impl Default for Case {
    fn default() -> Self {
        Case {
            what: "",
            nodes: Vec::new(),
            there: Vec::new(),
            pod: json!({}),
            args: Args::default(),
            objects: Vec::new(),
            expected: Ok(Vec::new()),
        }
    }
}

fn from<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).expect("a valid object")
}

/// A pod of namespace `ns` with these fields of its spec; `labels` and `name` are taken out of it.
fn pod(name: &str, mut spec: Value) -> PodInfo {
    let labels = spec["labels"].take();
    let owner = spec["owner"].take();
    if spec["containers"].is_null() {
        spec["containers"] = json!([{"name": "c"}]);
    }
    for key in ["labels", "owner"] {
        spec.as_object_mut().unwrap().remove(key);
    }
    let owners = if owner.is_null() { json!([]) } else { json!([owner]) };
    let pod = json!({
        "metadata": {"name": name, "namespace": "ns", "uid": name, "labels": labels, "ownerReferences": owners},
        "spec": spec,
    });
    PodInfo::new(Arc::new(from(pod)))
}

/// A node of that name with labels, and what else is given of spec and status.
fn node(name: &str, labels: Value, more: Value) -> Value {
    let mut all = json!({"kubernetes.io/hostname": name});
    all.as_object_mut().unwrap().extend(labels.as_object().cloned().unwrap_or_default());
    let allocatable = more["allocatable"].clone();
    let room = json!({"cpu": "4", "memory": "10000", "pods": "10"});
    json!({
        "metadata": {"name": name, "labels": all},
        "spec": {"taints": more["taints"], "unschedulable": more["unschedulable"]},
        "status": {"allocatable": if allocatable.is_null() { room } else { allocatable }, "images": more["images"]},
    })
}

fn zoned(name: &str, zone: &str) -> Value {
    node(name, json!({"zone": zone}), json!({}))
}

fn wants(cpu: &str, memory: &str) -> Value {
    json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": cpu, "memory": memory}}}]})
}

/// A profile in which only this plugin decides and scores.
fn only(plugin: &str, args: Args) -> Profile {
    let id = plugin_id(plugin).unwrap();
    let mut points: HashMap<Point, Vec<(PluginId, i64)>> =
        PLUGINS[id].points.iter().map(|point| (*point, vec![(id, 1)])).collect();
    // Without any score the first node that fits would do; this one has nothing to say about pods without images.
    if PLUGINS[id].score.is_none() {
        points.insert(Point::Score, vec![(plugin_id("ImageLocality").unwrap(), 1)]);
    }
    Profile::new("p", points, args, 100)
}

fn world(nodes: &[Value], there: &[(&str, Value)], objects: Vec<Object>) -> World {
    let mut world = World::default();
    for node in nodes {
        world.table.set_node(Arc::new(from(node.clone())));
    }
    for (index, (node, spec)) in there.iter().enumerate() {
        world.table.add_pod(node, Arc::new(pod(&format!("there-{index}"), spec.clone())));
    }
    let known = &mut world.objects;
    for object in objects {
        match object {
            Object::Claim(value) => known.claims.set(&Change::Added(Arc::new(from(value)))),
            Object::Volume(value) => known.volumes.set(&Change::Added(Arc::new(from(value)))),
            Object::Class(value) => known.storage_classes.set(&Change::Added(Arc::new(from(value)))),
            Object::Attachment(value) => known.attachments.set(&Change::Added(Arc::new(from(value)))),
            Object::CsiNode(value) => known.csi_nodes.set(&Change::Added(Arc::new(from(value)))),
            Object::CsiDriver(value) => known.csi_drivers.set(&Change::Added(Arc::new(from(value)))),
            Object::CsiCapacity(value) => known.csi_capacities.set(&Change::Added(Arc::new(from(value)))),
            Object::Service(value) => known.services.set(&Change::Added(Arc::new(from(value)))),
        }
    }
    world
}

fn check(plugin: &str, cases: Vec<Case>) {
    for case in cases {
        let nodes = case.nodes.len();
        let mut world = world(&case.nodes, &case.there, case.objects);
        let pod = pod("new", case.pod);
        let judged = judge(&pod, &only(plugin, case.args), &mut world);
        let expected = case.expected.map(|scores| {
            let mut scores: Vec<(String, i64)> =
                scores.into_iter().map(|(name, score)| (name.to_owned(), score)).collect();
            scores.sort();
            scores
        });
        let expected = expected.map_err(|reasons| format!("0/{nodes} nodes are available: {reasons}."));
        assert_eq!(judged, expected, "{plugin}: {}", case.what);
    }
}

#[test]
fn node_unschedulable() {
    let cordoned = node("a", json!({}), json!({"unschedulable": true}));
    let tolerates =
        json!({"tolerations": [{"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}]});
    check(
        "NodeUnschedulable",
        vec![
            Case {
                what: "a cordoned node takes no pods",
                nodes: vec![cordoned.clone()],
                expected: Err("1 node(s) were unschedulable"),
                ..Case::default()
            },
            Case {
                what: "except those that tolerate it",
                nodes: vec![cordoned],
                pod: tolerates,
                expected: Ok(vec![("a", 0)]),
                ..Case::default()
            },
        ],
    );
}

#[test]
fn node_name() {
    let nodes = || vec![zoned("a", "z"), zoned("b", "z")];
    check(
        "NodeName",
        vec![
            Case {
                what: "no name",
                nodes: nodes(),
                expected: Ok(vec![("a", 0), ("b", 0)]),
                ..Case::default()
            },
            Case {
                what: "its name",
                nodes: nodes(),
                pod: json!({"nodeName": "b"}),
                expected: Ok(vec![("b", 0)]),
                ..Case::default()
            },
            Case {
                what: "an unknown name",
                nodes: nodes(),
                pod: json!({"nodeName": "c"}),
                expected: Err("2 node(s) didn't match the requested node name"),
                ..Case::default()
            },
        ],
    );
}

#[test]
fn taint_toleration() {
    let tainted = |name: &str, effects: &[&str]| {
        let taints: Vec<Value> = effects
            .iter()
            .enumerate()
            .map(|(n, effect)| json!({"key": format!("k{n}"), "value": "v", "effect": effect}))
            .collect();
        node(name, json!({}), json!({"taints": taints}))
    };
    check(
        "TaintToleration",
        vec![
            Case {
                what: "taints that keep pods away",
                nodes: vec![tainted("a", &["NoSchedule"]), tainted("b", &["NoExecute"])],
                expected: Err("2 node(s) had untolerated taint {k0: v}"),
                ..Case::default()
            },
            Case {
                what: "tolerated by key and effect",
                nodes: vec![tainted("a", &["NoSchedule"]), tainted("b", &["NoExecute"])],
                pod: json!({"tolerations": [{"key": "k0", "operator": "Equal", "value": "v", "effect": "NoSchedule"}]}),
                expected: Ok(vec![("a", 100)]),
                ..Case::default()
            },
            Case {
                what: "soft taints lower the score",
                nodes: vec![
                    tainted("a", &[]),
                    tainted("b", &["PreferNoSchedule"]),
                    tainted("c", &["PreferNoSchedule", "PreferNoSchedule"]),
                ],
                expected: Ok(vec![("a", 100), ("b", 50), ("c", 0)]),
                ..Case::default()
            },
            Case {
                what: "unless all are tolerated",
                nodes: vec![tainted("a", &[]), tainted("b", &["PreferNoSchedule"])],
                pod: json!({"tolerations": [{"operator": "Exists"}]}),
                expected: Ok(vec![("a", 100), ("b", 100)]),
                ..Case::default()
            },
        ],
    );
}

#[test]
fn node_affinity() {
    let nodes = || vec![zoned("a", "x"), zoned("b", "y"), node("c", json!({}), json!({}))];
    let required = |terms: Value| json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}});
    let expression = |operator: &str, values: Value| json!([{"matchExpressions": [{"key": "zone", "operator": operator, "values": values}]}]);
    let preferred = json!({"affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
        {"weight": 3, "preference": {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["x"]}]}},
        {"weight": 6, "preference": {"matchExpressions": [{"key": "zone", "operator": "Exists"}]}},
    ]}}});
    let added: k8s_openapi::api::core::v1::NodeAffinity =
        from(required(expression("In", json!(["y"])))["affinity"]["nodeAffinity"].clone());
    let spec = k8s_openapi::api::core::v1::PodSpec {
        affinity: Some(k8s_openapi::api::core::v1::Affinity {
            node_affinity: Some(added.clone()),
            ..Default::default()
        }),
        ..Default::default()
    };
    let enforced = NodeAffinityArgs {
        added: Some(added),
        added_selection: crate::filters::Selection::of(&spec).map(Arc::new),
    };
    let all = |score| Ok(vec![("a", score), ("b", score), ("c", score)]);
    check(
        "NodeAffinity",
        vec![
            Case { what: "no wish", nodes: nodes(), expected: all(0), ..Case::default() },
            Case {
                what: "a selector",
                nodes: nodes(),
                pod: json!({"nodeSelector": {"zone": "x"}}),
                expected: Ok(vec![("a", 0)]),
                ..Case::default()
            },
            Case {
                what: "In",
                nodes: nodes(),
                pod: required(expression("In", json!(["y", "z"]))),
                expected: Ok(vec![("b", 0)]),
                ..Case::default()
            },
            Case {
                what: "NotIn holds without the label",
                nodes: nodes(),
                pod: required(expression("NotIn", json!(["y"]))),
                expected: Ok(vec![("a", 0), ("c", 0)]),
                ..Case::default()
            },
            Case {
                what: "an empty term matches nothing",
                nodes: nodes(),
                pod: required(json!([{}])),
                expected: Err("3 node(s) didn't match Pod's node affinity/selector"),
                ..Case::default()
            },
            Case {
                what: "a name",
                nodes: nodes(),
                pod: required(
                    json!([{"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["c"]}]}]),
                ),
                expected: Ok(vec![("c", 0)]),
                ..Case::default()
            },
            Case {
                what: "a name of no node",
                nodes: nodes(),
                pod: required(
                    json!([{"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["d"]}]}]),
                ),
                expected: Err("3 node(s) didn't satisfy plugin(s) [NodeAffinity]"),
                ..Case::default()
            },
            Case {
                what: "preferences",
                nodes: nodes(),
                pod: preferred,
                expected: Ok(vec![("a", 100), ("b", 66), ("c", 0)]),
                ..Case::default()
            },
            Case {
                what: "the configuration's own affinity",
                nodes: nodes(),
                args: Args { node_affinity: enforced.clone(), ..Args::default() },
                expected: Ok(vec![("b", 0)]),
                ..Case::default()
            },
            Case {
                what: "its words",
                nodes: vec![zoned("a", "x")],
                args: Args { node_affinity: enforced, ..Args::default() },
                expected: Err("1 node(s) didn't match scheduler-enforced node affinity"),
                ..Case::default()
            },
        ],
    );
}

#[test]
fn resources_fit() {
    let small = || {
        node("a", json!({}), json!({"allocatable": {"cpu": "1", "memory": "20", "pods": "2", "x.io/d": "1"}}))
    };
    let device =
        |amount: &str| json!({"containers": [{"name": "c", "resources": {"requests": {"x.io/d": amount}}}]});
    let ignoring = FitArgs { ignored_groups: vec!["x.io".to_owned()], ..FitArgs::default() };
    check(
        "NodeResourcesFit",
        vec![
            Case {
                what: "two are lacking",
                nodes: vec![small()],
                pod: wants("2", "30"),
                expected: Err("1 Insufficient cpu, 1 Insufficient memory"),
                ..Case::default()
            },
            Case {
                what: "what runs there counts",
                nodes: vec![small()],
                there: vec![("a", wants("600m", "5"))],
                pod: wants("500m", "5"),
                expected: Err("1 Insufficient cpu"),
                ..Case::default()
            },
            Case {
                what: "so does the number of pods",
                nodes: vec![small()],
                there: vec![("a", json!({})), ("a", json!({}))],
                expected: Err("1 Too many pods"),
                ..Case::default()
            },
            Case {
                what: "devices",
                nodes: vec![small()],
                pod: device("2"),
                expected: Err("1 Insufficient x.io/d"),
                ..Case::default()
            },
            Case {
                what: "devices that others look after",
                nodes: vec![small()],
                pod: device("2"),
                args: Args { fit: ignoring, ..Args::default() },
                expected: Ok(vec![("a", 45)]),
                ..Case::default()
            },
            Case {
                what: "overhead",
                nodes: vec![small()],
                pod: json!({"overhead": {"cpu": "600m"}, "containers": [{"name": "c", "resources": {"requests": {"cpu": "500m"}}}]}),
                expected: Err("1 Insufficient cpu"),
                ..Case::default()
            },
        ],
    );
}

#[test]
fn resources_are_scored_by_strategy() {
    let nodes = || {
        let larger = json!({"allocatable": {"cpu": "6", "memory": "10000", "pods": "10"}});
        vec![zoned("a", "z"), node("b", json!({}), larger)]
    };
    let both = || vec![("cpu".to_owned(), 1), ("memory".to_owned(), 1)];
    let cases = [
        ("least", Strategy::LeastAllocated(both()), (37, 50)),
        (
            "least, cpu counts double",
            Strategy::LeastAllocated(vec![("cpu".to_owned(), 2), ("memory".to_owned(), 1)]),
            (33, 50),
        ),
        ("most", Strategy::MostAllocated(both()), (62, 50)),
        ("ratio", Strategy::RequestedToCapacityRatio(both(), vec![(0, 100), (100, 0)]), (38, 50)),
    ];
    for (what, strategy, (a, b)) in cases {
        let args = Args { fit: FitArgs { strategy, ..FitArgs::default() }, ..Args::default() };
        let case = Case {
            what,
            nodes: nodes(),
            pod: wants("3", "5000"),
            args,
            expected: Ok(vec![("a", a), ("b", b)]),
            ..Case::default()
        };
        check("NodeResourcesFit", vec![case]);
    }
    check(
        "NodeResourcesBalancedAllocation",
        vec![
            Case {
                what: "even use is best",
                nodes: nodes(),
                pod: wants("3", "5000"),
                expected: Ok(vec![("a", 87), ("b", 100)]),
                ..Case::default()
            },
            Case {
                what: "no opinion without requests",
                nodes: nodes(),
                expected: Ok(vec![("a", 0), ("b", 0)]),
                ..Case::default()
            },
        ],
    );
}

#[test]
fn image_locality() {
    let with = |name: &str, images: &[(&str, i64)]| {
        let images: Vec<Value> = images
            .iter()
            .map(|(name, megabytes)| json!({"names": [name], "sizeBytes": megabytes << 20}))
            .collect();
        node(name, json!({}), json!({"images": images}))
    };
    let uses = |images: &[&str]| {
        let containers: Vec<Value> = images
            .iter()
            .enumerate()
            .map(|(n, image)| json!({"name": format!("c{n}"), "image": image}))
            .collect();
        json!({"containers": containers})
    };
    let nodes = || {
        vec![
            with("a", &[("r.io/40:latest", 40), ("r.io/300:latest", 300)]),
            with("b", &[("r.io/250:latest", 250)]),
        ]
    };
    check(
        "ImageLocality",
        vec![
            Case {
                what: "two on one node",
                nodes: nodes(),
                pod: uses(&["r.io/40", "r.io/300"]),
                expected: Ok(vec![("a", 7), ("b", 0)]),
                ..Case::default()
            },
            Case {
                what: "the larger image",
                nodes: nodes(),
                pod: uses(&["r.io/40", "r.io/250"]),
                expected: Ok(vec![("a", 0), ("b", 5)]),
                ..Case::default()
            },
            Case {
                what: "unknown images",
                nodes: nodes(),
                pod: uses(&["r.io/x"]),
                expected: Ok(vec![("a", 0), ("b", 0)]),
                ..Case::default()
            },
        ],
    );
}

#[test]
fn inter_pod_affinity() {
    let nodes = || vec![zoned("a", "x"), zoned("b", "x"), zoned("c", "y")];
    let term = |app: &str| json!({"topologyKey": "zone", "labelSelector": {"matchLabels": {"app": app}}});
    let soft = |kind: &str, app: &str| json!({"affinity": {kind: {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 5, "podAffinityTerm": term(app)}]}}});
    let hard = |kind: &str, app: &str| json!({"labels": {"app": "me"}, "affinity": {kind: {"requiredDuringSchedulingIgnoredDuringExecution": [term(app)]}}});
    let labelled = |app: &str| json!({"labels": {"app": app}});
    let heavy =
        Args { affinity: AffinityArgs { hard_weight: 0, ..AffinityArgs::default() }, ..Args::default() };
    check(
        "InterPodAffinity",
        vec![
            Case {
                what: "preferred near",
                nodes: nodes(),
                there: vec![("a", labelled("s"))],
                pod: soft("podAffinity", "s"),
                expected: Ok(vec![("a", 100), ("b", 100), ("c", 0)]),
                ..Case::default()
            },
            Case {
                what: "preferred away",
                nodes: nodes(),
                there: vec![("a", labelled("s"))],
                pod: soft("podAntiAffinity", "s"),
                expected: Ok(vec![("a", 0), ("b", 0), ("c", 100)]),
                ..Case::default()
            },
            Case {
                what: "a running pod's preference",
                nodes: nodes(),
                there: vec![("c", soft("podAffinity", "me"))],
                pod: labelled("me"),
                expected: Ok(vec![("a", 0), ("b", 0), ("c", 100)]),
                ..Case::default()
            },
            Case {
                what: "a running pod's required affinity scores",
                nodes: nodes(),
                there: vec![("c", hard("podAffinity", "me"))],
                pod: labelled("me"),
                expected: Ok(vec![("a", 0), ("b", 0), ("c", 100)]),
                ..Case::default()
            },
            Case {
                what: "unless it weighs nothing",
                nodes: nodes(),
                there: vec![("c", hard("podAffinity", "me"))],
                pod: labelled("me"),
                args: heavy,
                expected: Ok(vec![("a", 0), ("b", 0), ("c", 0)]),
                ..Case::default()
            },
            Case {
                what: "required near",
                nodes: nodes(),
                there: vec![("a", labelled("s"))],
                pod: hard("podAffinity", "s"),
                expected: Ok(vec![("a", 0), ("b", 0)]),
                ..Case::default()
            },
            Case {
                what: "nobody to be near to",
                nodes: nodes(),
                pod: hard("podAffinity", "s"),
                expected: Err("3 node(s) didn't match pod affinity rules"),
                ..Case::default()
            },
            Case {
                what: "the first of its group",
                nodes: nodes(),
                pod: hard("podAffinity", "me"),
                expected: Ok(vec![("a", 0), ("b", 0), ("c", 0)]),
                ..Case::default()
            },
            Case {
                what: "required away",
                nodes: nodes(),
                there: vec![("a", labelled("s")), ("c", labelled("s"))],
                pod: hard("podAntiAffinity", "s"),
                expected: Err("3 node(s) didn't match pod anti-affinity rules"),
                ..Case::default()
            },
            Case {
                what: "kept away by others",
                nodes: nodes(),
                there: vec![("a", hard("podAntiAffinity", "s")), ("c", hard("podAntiAffinity", "s"))],
                pod: labelled("s"),
                expected: Err("3 node(s) didn't satisfy existing pods anti-affinity rules"),
                ..Case::default()
            },
        ],
    );
}

#[test]
fn topology_spread() {
    let nodes = || vec![zoned("a", "x"), zoned("b", "y"), node("c", json!({}), json!({}))];
    let rule = |when: &str, key: &str, more: Value| {
        let mut rule = json!({
            "maxSkew": 1, "topologyKey": key, "whenUnsatisfiable": when, "labelSelector": {"matchLabels": {"app": "s"}},
        });
        rule.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap_or_default());
        json!({"labels": {"app": "s"}, "topologySpreadConstraints": [rule]})
    };
    let hard = |more: Value| rule("DoNotSchedule", "zone", more);
    let s = || json!({"labels": {"app": "s"}});
    let host = "kubernetes.io/hostname";
    check(
        "PodTopologySpread",
        vec![
            Case {
                what: "the emptier zone",
                nodes: nodes(),
                there: vec![("a", s())],
                pod: hard(json!({})),
                expected: Ok(vec![("b", 0)]),
                ..Case::default()
            },
            Case {
                what: "missing domains count as empty",
                nodes: nodes(),
                there: vec![("a", s()), ("b", s())],
                pod: hard(json!({"minDomains": 3})),
                expected: Err(
                    "1 node(s) didn't match pod topology spread constraints (missing required label), 2 node(s) didn't match pod topology spread constraints",
                ),
                ..Case::default()
            },
            Case {
                what: "zones the pod cannot use do not count",
                nodes: nodes(),
                there: vec![("a", s())],
                pod: {
                    let mut pod = hard(json!({}));
                    pod["nodeSelector"] = json!({"zone": "x"});
                    pod
                },
                expected: Ok(vec![("a", 0), ("b", 0)]),
                ..Case::default()
            },
            Case {
                what: "unless the policy says so",
                nodes: nodes(),
                there: vec![("a", s())],
                pod: {
                    let mut pod = hard(json!({"nodeAffinityPolicy": "Ignore"}));
                    pod["nodeSelector"] = json!({"zone": "x"});
                    pod
                },
                expected: Ok(vec![("b", 0)]),
                ..Case::default()
            },
            Case {
                what: "preferred over hosts",
                nodes: vec![zoned("a", "x"), zoned("b", "x")],
                there: vec![("a", s()), ("a", s()), ("b", s())],
                pod: rule("ScheduleAnyway", host, json!({})),
                expected: Ok(vec![("a", 33), ("b", 100)]),
                ..Case::default()
            },
            Case {
                what: "pods of a service spread by default",
                nodes: vec![zoned("a", "x"), zoned("b", "x")],
                there: vec![("a", s())],
                pod: s(),
                objects: vec![Object::Service(
                    json!({"metadata": {"name": "s", "namespace": "ns"}, "spec": {"selector": {"app": "s"}}}),
                )],
                expected: Ok(vec![("a", 66), ("b", 100)]),
                ..Case::default()
            },
            Case {
                what: "others have no opinion",
                nodes: vec![zoned("a", "x")],
                pod: s(),
                expected: Ok(vec![("a", 0)]),
                ..Case::default()
            },
        ],
    );
}

fn claim(more: Value) -> Value {
    let mut claim = json!({
        "metadata": {"name": "data", "namespace": "ns", "uid": "data"},
        "spec": {"accessModes": ["ReadWriteOnce"], "storageClassName": "late", "resources": {"requests": {"storage": "5"}}},
        "status": {"phase": "Pending"},
    });
    for part in ["metadata", "spec", "status"] {
        let fields = more[part].as_object().cloned().unwrap_or_default();
        claim[part].as_object_mut().unwrap().extend(fields);
    }
    claim
}

fn bound() -> Value {
    claim(
        json!({"metadata": {"annotations": {"pv.kubernetes.io/bind-completed": "yes"}}, "spec": {"volumeName": "v"}}),
    )
}

fn volume(name: &str, size: &str, zone: &str) -> Value {
    json!({
        "metadata": {"name": name},
        "spec": {
            "accessModes": ["ReadWriteOnce"], "capacity": {"storage": size}, "storageClassName": "late",
            "csi": {"driver": "d.io", "volumeHandle": name},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [
                {"matchExpressions": [{"key": "zone", "operator": "In", "values": [zone]}]},
            ]}},
        },
        "status": {"phase": "Available"},
    })
}

fn class(provisioner: &str, mode: &str) -> Value {
    json!({"metadata": {"name": "late"}, "provisioner": provisioner, "volumeBindingMode": mode})
}

fn uses_data() -> Value {
    json!({"volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "data"}}]})
}

#[test]
fn volume_binding() {
    let nodes = || vec![zoned("a", "x"), zoned("b", "y")];
    let late = || Object::Class(class("kubernetes.io/no-provisioner", "WaitForFirstConsumer"));
    let made = || Object::Class(class("d.io", "WaitForFirstConsumer"));
    let case = |what, objects, expected| Case {
        what,
        nodes: nodes(),
        pod: uses_data(),
        objects,
        expected,
        ..Case::default()
    };
    let driver = Object::CsiDriver(json!({"metadata": {"name": "d.io"}, "spec": {"storageCapacity": true}}));
    let capacity = |size: &str| {
        Object::CsiCapacity(json!({
            "metadata": {"name": "c", "namespace": "ns"}, "storageClassName": "late", "capacity": size,
            "nodeTopology": {"matchLabels": {"zone": "y"}},
        }))
    };
    let selected = claim(json!({"metadata": {"annotations": {"volume.kubernetes.io/selected-node": "a"}}}));
    let lost = claim(json!({"status": {"phase": "Lost"}, "spec": {"volumeName": "v"}}));
    let unbound = "pod has unbound immediate PersistentVolumeClaims";
    check(
        "VolumeBinding",
        vec![
            case("no claim", vec![], Err("persistentvolumeclaim \"data\" not found")),
            case(
                "a lost claim",
                vec![Object::Claim(lost)],
                Err("persistentvolumeclaim \"data\" bound to non-existent persistentvolume \"v\""),
            ),
            case(
                "immediate and unbound",
                vec![Object::Claim(claim(json!({}))), Object::Class(class("d.io", "Immediate"))],
                Err(unbound),
            ),
            case(
                "bound: where the volume is",
                vec![Object::Claim(bound()), Object::Volume(volume("v", "5", "y"))],
                Ok(vec![("b", 0)]),
            ),
            case(
                "bound elsewhere",
                vec![Object::Claim(bound()), Object::Volume(volume("v", "5", "z"))],
                Err("2 node(s) didn't match PersistentVolume's node affinity"),
            ),
            case(
                "bound to nothing",
                vec![Object::Claim(bound())],
                Err("2 node(s) unavailable due to one or more pvc(s) bound to non-existent pv(s)"),
            ),
            case(
                "a volume that matches",
                vec![Object::Claim(claim(json!({}))), late(), Object::Volume(volume("v", "7", "x"))],
                Ok(vec![("a", 0)]),
            ),
            case(
                "a volume too small",
                vec![Object::Claim(claim(json!({}))), late(), Object::Volume(volume("v", "4", "x"))],
                Err("2 node(s) didn't find available persistent volumes to bind"),
            ),
            case(
                "made where it is needed",
                vec![Object::Claim(claim(json!({}))), made()],
                Ok(vec![("a", 0), ("b", 0)]),
            ),
            case("made where it was promised", vec![Object::Claim(selected), made()], Ok(vec![("a", 0)])),
            case(
                "made where there is space",
                vec![Object::Claim(claim(json!({}))), made(), driver, capacity("10")],
                Ok(vec![("b", 0)]),
            ),
            case(
                "no space",
                vec![
                    Object::Claim(claim(json!({}))),
                    made(),
                    Object::CsiDriver(
                        json!({"metadata": {"name": "d.io"}, "spec": {"storageCapacity": true}}),
                    ),
                    capacity("3"),
                ],
                Err("2 node(s) did not have enough free storage"),
            ),
        ],
    );
}

#[test]
fn the_smallest_volume_is_chosen_and_one_meant_for_the_claim_first() {
    let mut meant = volume("meant", "90", "x");
    meant["spec"]["claimRef"] = json!({"name": "data", "namespace": "ns"});
    let cases = [
        (vec![volume("large", "50", "x"), volume("fits", "6", "x"), volume("far", "5", "y")], "fits"),
        (vec![volume("fits", "6", "x"), meant], "meant"),
    ];
    for (volumes, expected) in cases {
        let mut objects: Vec<Object> = volumes.into_iter().map(Object::Volume).collect();
        objects.push(Object::Claim(claim(json!({}))));
        objects.push(Object::Class(class("kubernetes.io/no-provisioner", "WaitForFirstConsumer")));
        let mut world = world(&[zoned("a", "x")], &[], objects);
        let (profile, pod) = (only("VolumeBinding", Args::default()), pod("p", uses_data()));
        let mut cycle = Cycle::begin(&pod, &profile, &mut world);
        assert_eq!((volume_binding::PLUGIN.prepare.unwrap())(&mut cycle, &mut world), Prepared::Ready);
        let plan = plan_volumes(&cycle, &world, 0);
        assert_eq!(plan.bind.iter().map(|(volume, _)| volume.as_str()).collect::<Vec<_>>(), [expected]);
        cycle.end(&mut world);
    }
}

#[test]
fn volume_restrictions_limits_and_zones() {
    let nodes = || {
        vec![
            node("a", json!({"topology.kubernetes.io/zone": "x"}), json!({})),
            node("b", json!({"topology.kubernetes.io/zone": "y"}), json!({})),
        ]
    };
    let single = claim(json!({"spec": {"accessModes": ["ReadWriteOncePod"]}}));
    let disk = json!({"volumes": [{"name": "v", "gcePersistentDisk": {"pdName": "d"}}]});
    check(
        "VolumeRestrictions",
        vec![
            Case {
                what: "one pod in the cluster",
                nodes: nodes(),
                there: vec![("a", uses_data())],
                pod: uses_data(),
                objects: vec![Object::Claim(single)],
                expected: Err(
                    "2 node has pod using PersistentVolumeClaim with the same name and ReadWriteOncePod access mode",
                ),
                ..Case::default()
            },
            Case {
                what: "one writer of a disk on a node",
                nodes: nodes(),
                there: vec![("a", disk.clone())],
                pod: disk,
                expected: Ok(vec![("b", 0)]),
                ..Case::default()
            },
        ],
    );
    let mut zoned = volume("v", "5", "x");
    zoned["metadata"]["labels"] = json!({"topology.kubernetes.io/zone": "y__z"});
    check(
        "VolumeZone",
        vec![Case {
            what: "the volume's zones",
            nodes: nodes(),
            pod: uses_data(),
            objects: vec![Object::Claim(bound()), Object::Volume(zoned)],
            expected: Ok(vec![("b", 0)]),
            ..Case::default()
        }],
    );
    let limit = |name: &str, count: i32| {
        Object::CsiNode(
            json!({"metadata": {"name": name}, "spec": {"drivers": [{"name": "d.io", "nodeID": name, "allocatable": {"count": count}}]}}),
        )
    };
    let mut other = bound();
    other["metadata"]["name"] = json!("other");
    other["spec"]["volumeName"] = json!("w");
    let uses_other = json!({"volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "other"}}]});
    check(
        "NodeVolumeLimits",
        vec![Case {
            what: "as many as the driver attaches",
            nodes: nodes(),
            there: vec![("a", uses_other)],
            pod: uses_data(),
            objects: vec![
                Object::Claim(bound()),
                Object::Claim(other),
                Object::Volume(volume("v", "5", "x")),
                Object::Volume(volume("w", "5", "x")),
                limit("a", 1),
                limit("b", 1),
            ],
            expected: Ok(vec![("b", 0)]),
            ..Case::default()
        }],
    );
    let attachment = |name: &str, volume: &str, node: &str| {
        Object::Attachment(json!({
            "metadata": {"name": name},
            "spec": {"attacher": "d.io", "nodeName": node, "source": {"persistentVolumeName": volume}},
        }))
    };
    let objects = |attached: Object| {
        vec![
            Object::Claim(bound()),
            Object::Volume(volume("v", "5", "x")),
            Object::Volume(volume("w", "5", "x")),
            limit("a", 1),
            limit("b", 1),
            attached,
        ]
    };
    check(
        "NodeVolumeLimits",
        vec![
            Case {
                what: "a volume still attached without a pod counts",
                nodes: nodes(),
                pod: uses_data(),
                objects: objects(attachment("old", "w", "a")),
                expected: Ok(vec![("b", 0)]),
                ..Case::default()
            },
            Case {
                what: "the pod's own volume, attached already, counts once",
                nodes: nodes(),
                pod: uses_data(),
                objects: objects(attachment("own", "v", "a")),
                expected: Ok(vec![("a", 0), ("b", 0)]),
                ..Case::default()
            },
        ],
    );
}
