//! The fast scheduler against the slow one, on random clusters that change all the time; and what must hold whatever
//! happens.

use super::*;
use crate::cycle::inspect::judge;
use crate::objects::World;
use crate::offline::{Answer, Offline};
use crate::pod::PodInfo;
use crate::profile::Profile;
use knarr_client::{Change, ObjectKey};
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use std::sync::Arc;

const SEEDS: u64 = 25;

/// Random objects of a small world, so that rules meet often.
struct Dice(SmallRng);

impl Dice {
    fn chance(&mut self, percent: u32) -> bool {
        self.0.random_range(0..100) < percent
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from.choose(&mut self.0).unwrap().clone()
    }

    fn node(&mut self, name: &str) -> Node {
        let mut labels = json!({"kubernetes.io/hostname": name});
        if self.chance(85) {
            labels["topology.kubernetes.io/zone"] = json!(self.pick(&["a", "b", "c"]));
        }
        if self.chance(50) {
            labels["disk"] = json!(self.pick(&["ssd", "hdd"]));
        }
        let mut taints = Vec::new();
        if self.chance(20) {
            let effect = self.pick(&["NoSchedule", "PreferNoSchedule", "NoExecute"]);
            taints.push(json!({"key": self.pick(&["k", "l"]), "value": "v", "effect": effect}));
        }
        let images: Vec<Value> = ["one:1", "two:2", "three:3"]
            .iter()
            .filter(|_| self.chance(40))
            .map(|name| json!({"names": [name], "sizeBytes": 300 << 20}))
            .collect();
        let node = json!({
            "metadata": {"name": name, "labels": labels},
            "spec": {"taints": taints, "unschedulable": self.chance(5)},
            "status": {
                "allocatable": {
                    "cpu": self.pick(&["2", "4", "8"]), "memory": self.pick(&["2Gi", "4Gi"]),
                    "pods": self.pick(&["4", "10", "20"]), "x.io/device": self.pick(&["0", "2"]),
                },
                "images": images,
            },
        });
        serde_json::from_value(node).unwrap()
    }

    fn selector(&mut self) -> Value {
        match self.0.random_range(0..4) {
            0 => json!({"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["a"]}]}),
            1 => json!({"matchExpressions": [{"key": "tier", "operator": "Exists"}]}),
            _ => json!({"matchLabels": {"app": self.pick(&["a", "b", "c"])}}),
        }
    }

    fn term(&mut self) -> Value {
        let topology = self.pick(&["kubernetes.io/hostname", "topology.kubernetes.io/zone", "disk"]);
        let mut term = json!({"topologyKey": topology, "labelSelector": self.selector()});
        match self.0.random_range(0..8) {
            0 => term["namespaces"] = json!(["x", "y"]),
            1 => term["namespaceSelector"] = json!({"matchLabels": {"team": "red"}}),
            2 => term["namespaceSelector"] = json!({}),
            3 => term["matchLabelKeys"] = json!(["tier"]),
            4 => term["mismatchLabelKeys"] = json!(["tier"]),
            _ => {}
        }
        term
    }

    fn terms(&mut self) -> Value {
        let mut rules = json!({});
        if self.chance(50) {
            rules["requiredDuringSchedulingIgnoredDuringExecution"] = json!([self.term()]);
        }
        if self.chance(15) {
            rules["requiredDuringSchedulingIgnoredDuringExecution"] = json!([self.term(), self.term()]);
        }
        if self.chance(50) {
            let weight = self.0.random_range(1..100);
            rules["preferredDuringSchedulingIgnoredDuringExecution"] =
                json!([{"weight": weight, "podAffinityTerm": self.term()}]);
        }
        rules
    }

    fn spread(&mut self) -> Value {
        let mut rule = json!({
            "maxSkew": self.0.random_range(1..3),
            "topologyKey": self.pick(&["kubernetes.io/hostname", "topology.kubernetes.io/zone", "disk"]),
            "whenUnsatisfiable": self.pick(&["DoNotSchedule", "ScheduleAnyway"]),
            "labelSelector": self.selector(),
        });
        if self.chance(30) {
            rule["nodeAffinityPolicy"] = json!("Ignore");
        }
        if self.chance(30) {
            rule["nodeTaintsPolicy"] = json!("Honor");
        }
        if self.chance(30) && rule["whenUnsatisfiable"] == "DoNotSchedule" {
            rule["minDomains"] = json!(self.0.random_range(1..5));
        }
        if self.chance(20) {
            rule["matchLabelKeys"] = json!(["tier"]);
        }
        rule
    }

    fn pod(&mut self, name: &str) -> Pod {
        let mut labels = json!({"app": self.pick(&["a", "b", "c"])});
        if self.chance(40) {
            labels["tier"] = json!(self.pick(&["1", "2"]));
        }
        let mut requests = json!({});
        if self.chance(70) {
            requests["cpu"] = json!(self.pick(&["100m", "500m", "1", "3"]));
        }
        if self.chance(70) {
            requests["memory"] = json!(self.pick(&["100Mi", "1Gi"]));
        }
        if self.chance(10) {
            requests["x.io/device"] = json!("1");
        }
        let mut container = json!({"name": "c", "image": self.pick(&["one:1", "two:2", "four:4"]), "resources": {"requests": requests}});
        if self.chance(15) {
            container["ports"] = json!([{"containerPort": 80, "hostPort": self.pick(&[80, 81])}]);
        }
        let mut spec =
            json!({"containers": [container], "affinity": {}, "priority": self.0.random_range(0..4)});
        if self.chance(15) {
            spec["nodeSelector"] = json!({"disk": "ssd"});
        }
        if self.chance(20) {
            spec["tolerations"] = json!([{"key": "k", "operator": "Exists"}]);
        }
        if self.chance(20) {
            let requirement = json!({"key": "disk", "operator": self.pick(&["Exists", "DoesNotExist"])});
            let term = json!({"matchExpressions": [requirement]});
            spec["affinity"]["nodeAffinity"] = match self.chance(50) {
                true => {
                    json!({"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}})
                }
                false => {
                    json!({"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 7, "preference": term}]})
                }
            };
        }
        if self.chance(30) {
            spec["affinity"]["podAffinity"] = self.terms();
        }
        if self.chance(30) {
            spec["affinity"]["podAntiAffinity"] = self.terms();
        }
        if self.chance(40) {
            let rules = self.0.random_range(1..3);
            spec["topologySpreadConstraints"] = (0..rules).map(|_| self.spread()).collect();
        }
        let namespace = self.pick(&["x", "y"]);
        let terminating = self.chance(5).then_some("2026-01-01T00:00:00Z");
        let pod = json!({
            "metadata": {
                "name": name, "namespace": namespace, "uid": name, "labels": labels,
                "deletionTimestamp": terminating,
            },
            "spec": spec,
        });
        serde_json::from_value(pod).unwrap()
    }

    fn service(&mut self) -> Service {
        let (namespace, app) = (self.pick(&["x", "y"]), self.pick(&["a", "b"]));
        let service = json!({
            "metadata": {"name": format!("{namespace}-{app}"), "namespace": namespace}, "spec": {"selector": {"app": app}},
        });
        serde_json::from_value(service).unwrap()
    }
}

/// The same changes made to both.
struct Both {
    slow: Cluster,
    fast: World,
}

impl Both {
    fn set_node(&mut self, node: Node) {
        self.slow.nodes.retain(|known| name(known) != name(&node));
        self.slow.nodes.push(node.clone());
        self.fast.table.set_node(Arc::new(node));
    }

    fn remove_node(&mut self, wanted: &str) {
        self.slow.nodes.retain(|node| name(node) != wanted);
        self.fast.table.remove_node(wanted);
    }

    fn add_pod(&mut self, pod: Pod, node: &str) {
        let key = ObjectKey::of(&pod);
        self.remove_pod(&key);
        self.slow.pods.push((pod.clone(), node.to_owned()));
        self.fast.table.add_pod(node, Arc::new(PodInfo::new(Arc::new(pod))));
    }

    fn remove_pod(&mut self, key: &ObjectKey) {
        self.slow.pods.retain(|(pod, _)| ObjectKey::of(pod) != *key);
        self.fast.table.remove_pod(key);
    }

    fn set_namespace(&mut self, name: &str, labels: Labels) {
        let table = &mut self.fast.table;
        table.groups.set_namespace(name, Some(&labels), &table.filters);
        self.slow.namespaces.insert(name.to_owned(), labels);
    }

    fn change(&mut self, dice: &mut Dice, step: usize) {
        let node = format!("n{}", dice.0.random_range(0..9));
        match dice.0.random_range(0..20) {
            0..3 => {
                let node = dice.node(&node);
                self.set_node(node);
            }
            3 => self.remove_node(&node),
            4 => {
                let team = dice.pick(&["red", "blue"]);
                let namespace = dice.pick(&["x", "y"]);
                self.set_namespace(namespace, [("team".to_owned(), team.to_owned())].into());
            }
            5 => {
                let service = dice.service();
                self.slow.services.retain(|known| known.metadata.name != service.metadata.name);
                self.slow.services.push(service.clone());
                self.fast.objects.services.set(&Change::Added(Arc::new(service)));
                self.fast.objects.selectors_changed();
            }
            6..10 if !self.slow.pods.is_empty() => {
                let key = ObjectKey::of(&dice.pick(&self.slow.pods).0);
                self.remove_pod(&key);
            }
            _ => {
                let pod = dice.pod(&format!("p{step}"));
                self.add_pod(pod, &node);
            }
        }
    }
}

#[test]
fn the_fast_scheduler_judges_as_the_slow_one() {
    let profile = Profile::default();
    let mut fitted = 0;
    for seed in 0..SEEDS {
        let mut dice = Dice(SmallRng::seed_from_u64(seed));
        let mut both = Both { slow: Cluster::default(), fast: World::default() };
        for number in 0..6 {
            let node = dice.node(&format!("n{number}"));
            both.set_node(node);
        }
        for step in 0..60 {
            both.change(&mut dice, step);
            let pod = dice.pod("new");
            let expected = both.slow.judge(&pod);
            let info = PodInfo::new(Arc::new(pod.clone()));
            let judged = judge(&info, &profile, &mut both.fast).unwrap_or_default();
            assert_eq!(
                judged,
                expected,
                "seed {seed}, step {step}: {}",
                serde_json::to_string_pretty(&pod).unwrap()
            );
            fitted += usize::from(!expected.is_empty());
        }
    }
    assert!(fitted > 500, "only {fitted} random pods fitted anywhere: the test shows little");
}

/// A cluster that schedules, preempts and loses nodes; the slow rules watch.
struct Running {
    cluster: Cluster,
    scheduler: Offline,
    waiting: Vec<Pod>,
}

impl Running {
    fn priority(pod: &Pod) -> i32 {
        pod.spec.as_ref().unwrap().priority.unwrap_or(0)
    }

    /// Tries every waiting pod, the most important first, until nothing moves.
    fn settle(&mut self, seed: u64) {
        for _ in 0..200 {
            self.waiting.sort_by_key(|pod| std::cmp::Reverse(Self::priority(pod)));
            let mut moved = false;
            for pod in std::mem::take(&mut self.waiting) {
                moved |= self.attempt(pod, seed);
            }
            if !moved {
                return;
            }
        }
        panic!("seed {seed}: pods never come to rest");
    }

    fn attempt(&mut self, pod: Pod, seed: u64) -> bool {
        match self.scheduler.decide(&Offline::wait(pod.clone())) {
            Answer::Node(node) => {
                let chosen = self.cluster.node(&node).unwrap();
                assert!(self.cluster.fits(&pod, chosen), "seed {seed}: {} does not fit {node}", name(chosen));
                self.scheduler.place(&Offline::wait(pod.clone()), &node);
                self.cluster.pods.push((pod, node));
                true
            }
            Answer::Preempt { node, victims } => {
                assert!(!victims.is_empty(), "seed {seed}: preemption without victims");
                for (namespace, victim) in victims {
                    let key = ObjectKey::new(namespace, victim);
                    let place =
                        self.cluster.pods.iter().position(|(pod, _)| ObjectKey::of(pod) == key).unwrap();
                    let (victim, on) = self.cluster.pods.remove(place);
                    assert!(
                        Self::priority(&victim) < Self::priority(&pod),
                        "seed {seed}: victim is not less important"
                    );
                    assert_eq!(on, node, "seed {seed}: victim runs elsewhere");
                    self.scheduler.remove(&key.namespace, &key.name);
                    self.waiting.push(victim);
                }
                let target = self.cluster.node(&node).unwrap();
                assert!(self.cluster.fits(&pod, target), "seed {seed}: preemption made no room");
                // At once, as the nomination of the node would keep the room for it.
                self.attempt(pod, seed)
            }
            Answer::Unschedulable(message) => {
                let fits = self.cluster.nodes.iter().any(|node| self.cluster.fits(&pod, node));
                assert!(!fits, "seed {seed}: refused though a node fits: {message}");
                self.waiting.push(pod);
                false
            }
        }
    }

    fn assert_not_overcommitted(&self, seed: u64) {
        for node in &self.cluster.nodes {
            for resource in ["cpu", "memory", "x.io/device"] {
                let (used, offered) =
                    (self.cluster.used(node, resource), self.cluster.offered(node, resource));
                assert!(used <= offered, "seed {seed}: {used} of {offered} {resource} on {}", name(node));
            }
            assert!(
                self.cluster.on(node).count() as i64 <= self.cluster.offered(node, "pods"),
                "seed {seed}"
            );
        }
    }
}

#[test]
fn no_node_is_overcommitted_no_rule_broken_and_lost_nodes_are_made_up_for() {
    for seed in 0..SEEDS {
        let mut dice = Dice(SmallRng::seed_from_u64(seed));
        let mut running = Running {
            cluster: Cluster::default(),
            scheduler: Offline::new(crate::Config::default(), seed),
            waiting: Vec::new(),
        };
        for number in 0..8 {
            let node = dice.node(&format!("n{number}"));
            running.cluster.nodes.push(node.clone());
            running.scheduler.set_node(node);
        }
        for step in 0..25 {
            let mut pod = dice.pod(&format!("p{step}"));
            pod.metadata.deletion_timestamp = None;
            running.waiting.push(pod);
            if step % 5 == 4 {
                running.settle(seed);
                running.assert_not_overcommitted(seed);
            }
        }
        let lost = "n1";
        running.cluster.nodes.retain(|node| name(node) != lost);
        running.scheduler.remove_node(lost);
        let (gone, left) =
            std::mem::take(&mut running.cluster.pods).into_iter().partition(|(_, on)| on == lost);
        running.cluster.pods = left;
        let gone: Vec<(Pod, String)> = gone;
        for (pod, _) in gone {
            let key = ObjectKey::of(&pod);
            running.scheduler.remove(&key.namespace, &key.name);
            running.waiting.push(pod);
        }
        running.settle(seed);
        running.assert_not_overcommitted(seed);
    }
}
