//! The default profile, slow and obvious: every rule is worked out from the objects themselves, for every pod and node,
//! with nothing remembered. What the fast one is compared with.

use crate::requests::{amounts, of_pod};
use k8s_openapi::api::core::v1::{Node, Pod, PodAffinityTerm, Service, Taint, TopologySpreadConstraint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};
use knarr_client::placement;
use knarr_client::selector::{Labels, Selector};
use std::collections::{BTreeMap, BTreeSet, HashMap};

#[derive(Clone, Default)]
pub struct Cluster {
    pub nodes: Vec<Node>,
    /// With their nodes, known or not.
    pub pods: Vec<(Pod, String)>,
    pub namespaces: HashMap<String, Labels>,
    pub services: Vec<Service>,
}

fn labels(pod: &Pod) -> Labels {
    pod.metadata.labels.clone().unwrap_or_default()
}

fn namespace(pod: &Pod) -> &str {
    pod.metadata.namespace.as_deref().unwrap()
}

fn name(node: &Node) -> &str {
    node.metadata.name.as_deref().unwrap()
}

fn label<'a>(node: &'a Node, key: &str) -> Option<&'a String> {
    node.metadata.labels.as_ref()?.get(key)
}

fn taints(node: &Node) -> Vec<Taint> {
    node.spec.as_ref().and_then(|spec| spec.taints.clone()).unwrap_or_default()
}

fn with_keys(pod: &Pod, selector: &LabelSelector, keys: &[(&str, Option<&Vec<String>>)]) -> LabelSelector {
    let mut selector = selector.clone();
    for (operator, keys) in keys {
        for key in keys.iter().flat_map(|keys| keys.iter()) {
            if let Some(value) = labels(pod).get(key) {
                selector.match_expressions.get_or_insert_default().push(LabelSelectorRequirement {
                    key: key.clone(),
                    operator: (*operator).to_owned(),
                    values: Some(vec![value.clone()]),
                });
            }
        }
    }
    selector
}

impl Cluster {
    fn on<'a>(&'a self, node: &'a Node) -> impl Iterator<Item = &'a Pod> {
        self.pods.iter().filter(move |(_, on)| on == name(node)).map(|(pod, _)| pod)
    }

    fn node(&self, wanted: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| name(node) == wanted)
    }

    /// Whether a term of `owner` means `pod`.
    fn means(&self, owner: &Pod, term: &PodAffinityTerm, pod: &Pod) -> bool {
        let named = term.namespaces.clone().unwrap_or_default();
        let own = named.is_empty() && term.namespace_selector.is_none() && namespace(owner) == namespace(pod);
        let listed = named.iter().any(|name| name == namespace(pod));
        let selected = term.namespace_selector.as_ref().is_some_and(|selector| {
            Selector::new(selector).unwrap().matches(self.namespaces.get(namespace(pod)))
        });
        let keys = [("In", term.match_label_keys.as_ref()), ("NotIn", term.mismatch_label_keys.as_ref())];
        let matches = term.label_selector.as_ref().is_some_and(|selector| {
            Selector::new(&with_keys(owner, selector, &keys)).unwrap().matches(Some(&labels(pod)))
        });
        (own || listed || selected) && matches
    }

    /// Every node that fits with its total score.
    pub fn judge(&self, pod: &Pod) -> Vec<(String, i64)> {
        let fitting: Vec<&Node> = self.nodes.iter().filter(|node| self.fits(pod, node)).collect();
        let scores = [
            (3, self.taint_scores(pod, &fitting)),
            (2, self.node_affinity_scores(pod, &fitting)),
            (1, self.least_allocated(pod, &fitting)),
            (2, self.spread_scores(pod, &fitting)),
            (2, self.affinity_scores(pod, &fitting)),
            (1, self.balanced(pod, &fitting)),
            (1, self.image_scores(pod, &fitting)),
        ];
        let total = |place: usize| scores.iter().map(|(weight, scores)| weight * scores[place]).sum();
        let mut judged: Vec<(String, i64)> =
            fitting.iter().enumerate().map(|(place, node)| (name(node).to_owned(), total(place))).collect();
        judged.sort();
        judged
    }

    pub fn fits(&self, pod: &Pod, node: &Node) -> bool {
        self.tolerated(pod, node)
            && self.selects(pod, node)
            && self.ports_free(pod, node)
            && self.has_room(pod, node)
            && self.spreads(pod, node)
            && self.is_near_and_away(pod, node)
    }

    fn tolerated(&self, pod: &Pod, node: &Node) -> bool {
        let tolerations = pod.spec.as_ref().unwrap().tolerations.as_ref();
        let mut all = taints(node);
        if node.spec.as_ref().is_some_and(|spec| spec.unschedulable == Some(true)) {
            all.push(Taint {
                key: "node.kubernetes.io/unschedulable".to_owned(),
                effect: "NoSchedule".to_owned(),
                ..Default::default()
            });
        }
        let mut hard = all.iter().filter(|taint| taint.effect != "PreferNoSchedule");
        hard.all(|taint| placement::tolerates(tolerations, taint))
    }

    fn selects(&self, pod: &Pod, node: &Node) -> bool {
        let none = BTreeMap::new();
        placement::selects_node(
            pod.spec.as_ref().unwrap(),
            node.metadata.labels.as_ref().unwrap_or(&none),
            name(node),
        )
    }

    fn ports_free(&self, pod: &Pod, node: &Node) -> bool {
        let ports = |pod: &Pod| -> Vec<(i32, String, String)> {
            let containers = &pod.spec.as_ref().unwrap().containers;
            let ports = containers.iter().flat_map(|container| container.ports.iter().flatten());
            ports
                .filter_map(|port| {
                    let ip = port.host_ip.clone().unwrap_or_else(|| "0.0.0.0".to_owned());
                    Some((port.host_port?, port.protocol.clone().unwrap_or_else(|| "TCP".to_owned()), ip))
                })
                .collect()
        };
        let taken: Vec<_> = self.on(node).flat_map(ports).collect();
        !ports(pod).iter().any(|(port, protocol, ip)| {
            taken.iter().any(|(other, other_protocol, other_ip)| {
                let any = "0.0.0.0";
                port == other
                    && protocol == other_protocol
                    && (ip == other_ip || ip == any || other_ip == any)
            })
        })
    }

    fn offered(&self, node: &Node, resource: &str) -> i64 {
        let status = node.status.as_ref();
        amounts(&status.and_then(|status| status.allocatable.clone())).get(resource).copied().unwrap_or(0)
    }

    fn used(&self, node: &Node, resource: &str) -> i64 {
        self.on(node).map(|pod| of_pod(pod).0.get(resource)).sum()
    }

    fn has_room(&self, pod: &Pod, node: &Node) -> bool {
        let wanted = of_pod(pod).0;
        let names = ["cpu", "memory", "ephemeral-storage"].map(str::to_owned).into_iter();
        let mut names = names.chain(wanted.others.iter().map(|(name, _)| name.to_string()));
        let fits = |name: &str| {
            wanted.get(name) == 0 || wanted.get(name) + self.used(node, name) <= self.offered(node, name)
        };
        (self.on(node).count() as i64) < self.offered(node, "pods") && names.all(|name| fits(&name))
    }

    fn constraints(&self, pod: &Pod, hard: bool) -> (Vec<TopologySpreadConstraint>, bool) {
        let own = pod.spec.as_ref().unwrap().topology_spread_constraints.clone().unwrap_or_default();
        let wanted = if hard { "DoNotSchedule" } else { "ScheduleAnyway" };
        if !own.is_empty() || hard {
            return (own.into_iter().filter(|rule| rule.when_unsatisfiable == wanted).collect(), true);
        }
        let mut equal = Labels::new();
        for service in &self.services {
            let selector = service.spec.as_ref().unwrap().selector.clone().unwrap_or_default();
            let here = service.metadata.namespace.as_deref() == Some(namespace(pod));
            if here && !selector.is_empty() && selector.iter().all(|(k, v)| labels(pod).get(k) == Some(v)) {
                equal.extend(selector);
            }
        }
        if equal.is_empty() {
            return (Vec::new(), false);
        }
        let rule = |key: &str, max_skew| TopologySpreadConstraint {
            topology_key: key.to_owned(),
            max_skew,
            when_unsatisfiable: wanted.to_owned(),
            label_selector: Some(LabelSelector { match_labels: Some(equal.clone()), ..Default::default() }),
            ..Default::default()
        };
        (vec![rule("kubernetes.io/hostname", 3), rule("topology.kubernetes.io/zone", 5)], false)
    }

    fn included(&self, pod: &Pod, rule: &TopologySpreadConstraint, node: &Node) -> bool {
        let affine = rule.node_affinity_policy.as_deref() == Some("Ignore") || self.selects(pod, node);
        let tolerations = pod.spec.as_ref().unwrap().tolerations.as_ref();
        let hard = taints(node).into_iter().filter(|taint| taint.effect != "PreferNoSchedule");
        let tolerated = rule.node_taints_policy.as_deref() != Some("Honor")
            || hard.into_iter().all(|taint| placement::tolerates(tolerations, &taint));
        affine && tolerated
    }

    fn spread_selector(&self, pod: &Pod, rule: &TopologySpreadConstraint) -> Selector {
        match &rule.label_selector {
            None => Selector::none(),
            Some(selector) => {
                Selector::new(&with_keys(pod, selector, &[("In", rule.match_label_keys.as_ref())])).unwrap()
            }
        }
    }

    fn matching_on(&self, pod: &Pod, rule: &TopologySpreadConstraint, node: &Node) -> i64 {
        let selector = self.spread_selector(pod, rule);
        let counted = self.on(node).filter(|other| {
            namespace(other) == namespace(pod)
                && other.metadata.deletion_timestamp.is_none()
                && selector.matches(Some(&labels(other)))
        });
        counted.count() as i64
    }

    fn spreads(&self, pod: &Pod, node: &Node) -> bool {
        let (rules, _) = self.constraints(pod, true);
        rules.iter().all(|rule| {
            let Some(here) = label(node, &rule.topology_key) else { return false };
            let mut domains: BTreeMap<String, i64> = BTreeMap::new();
            for other in &self.nodes {
                let has_all = rules.iter().all(|rule| label(other, &rule.topology_key).is_some());
                if has_all && self.included(pod, rule, other) {
                    let domain = label(other, &rule.topology_key).unwrap().clone();
                    *domains.entry(domain).or_insert(0) += self.matching_on(pod, rule, other);
                }
            }
            let enough = domains.len() as i64 >= i64::from(rule.min_domains.unwrap_or(1));
            let least = if enough { domains.values().copied().min().unwrap_or(0) } else { 0 };
            let own = i64::from(self.spread_selector(pod, rule).matches(Some(&labels(pod))));
            domains.get(here).copied().unwrap_or(0) + own - least <= i64::from(rule.max_skew)
        })
    }

    fn terms(pod: &Pod, anti: bool) -> (Vec<PodAffinityTerm>, Vec<(i64, PodAffinityTerm)>) {
        let affinity = pod.spec.as_ref().unwrap().affinity.clone().unwrap_or_default();
        let (required, preferred) = match anti {
            false => {
                let rules = affinity.pod_affinity.unwrap_or_default();
                (
                    rules.required_during_scheduling_ignored_during_execution,
                    rules.preferred_during_scheduling_ignored_during_execution,
                )
            }
            true => {
                let rules = affinity.pod_anti_affinity.unwrap_or_default();
                (
                    rules.required_during_scheduling_ignored_during_execution,
                    rules.preferred_during_scheduling_ignored_during_execution,
                )
            }
        };
        let sign = if anti { -1 } else { 1 };
        let preferred = preferred.into_iter().flatten();
        let preferred = preferred.map(|term| (sign * i64::from(term.weight), term.pod_affinity_term));
        (required.unwrap_or_default(), preferred.collect())
    }

    /// Whether the two nodes lie in the same domain of the topology.
    fn same_domain(&self, a: &Node, b: &Node, key: &str) -> bool {
        label(a, key).is_some() && label(a, key) == label(b, key)
    }

    fn known_pods(&self) -> impl Iterator<Item = (&Pod, &Node)> {
        self.pods.iter().filter_map(|(pod, on)| Some((pod, self.node(on)?)))
    }

    fn is_near_and_away(&self, pod: &Pod, node: &Node) -> bool {
        let (required, _) = Self::terms(pod, false);
        if !required.is_empty() {
            let all = |other: &Pod| required.iter().all(|term| self.means(pod, term, other));
            let near = |term: &PodAffinityTerm| {
                self.known_pods()
                    .any(|(other, on)| all(other) && self.same_domain(node, on, &term.topology_key))
            };
            let labelled = required.iter().all(|term| label(node, &term.topology_key).is_some());
            let nobody = required.iter().all(|term| {
                !self.known_pods().any(|(other, on)| all(other) && label(on, &term.topology_key).is_some())
            });
            if !(labelled && (required.iter().all(near) || (nobody && all(pod)))) {
                return false;
            }
        }
        let (anti, _) = Self::terms(pod, true);
        let kept_away = anti.iter().any(|term| {
            self.known_pods().any(|(other, on)| {
                self.means(pod, term, other) && self.same_domain(node, on, &term.topology_key)
            })
        });
        let repelled = self.known_pods().any(|(other, on)| {
            Self::terms(other, true)
                .0
                .iter()
                .any(|term| self.means(other, term, pod) && self.same_domain(node, on, &term.topology_key))
        });
        !kept_away && !repelled
    }

    fn taint_scores(&self, pod: &Pod, fitting: &[&Node]) -> Vec<i64> {
        let tolerations = pod.spec.as_ref().unwrap().tolerations.as_ref();
        let soft = |node: &&Node| {
            let soft = taints(node).into_iter().filter(|taint| taint.effect == "PreferNoSchedule");
            soft.filter(|taint| !placement::tolerates(tolerations, taint)).count() as i64
        };
        let counts: Vec<i64> = fitting.iter().map(soft).collect();
        let most = counts.iter().copied().max().unwrap_or(0);
        counts.into_iter().map(|count| if most == 0 { 100 } else { 100 - 100 * count / most }).collect()
    }

    fn node_affinity_scores(&self, pod: &Pod, fitting: &[&Node]) -> Vec<i64> {
        let affinity = pod.spec.as_ref().unwrap().affinity.as_ref();
        let affinity = affinity.and_then(|affinity| affinity.node_affinity.as_ref());
        let preferred =
            affinity.and_then(|rules| rules.preferred_during_scheduling_ignored_during_execution.clone());
        let sum = |node: &&Node| {
            let labels = node.metadata.labels.clone().unwrap_or_default();
            let terms = preferred.iter().flatten();
            let held = terms.filter(|term| placement::term_holds(&term.preference, &labels, name(node)));
            held.map(|term| i64::from(term.weight)).sum::<i64>()
        };
        let sums: Vec<i64> = fitting.iter().map(sum).collect();
        let most = sums.iter().copied().max().unwrap_or(0);
        sums.into_iter().map(|sum| if most == 0 { 0 } else { 100 * sum / most }).collect()
    }

    fn least_allocated(&self, pod: &Pod, fitting: &[&Node]) -> Vec<i64> {
        let score = |node: &&Node| {
            let used = |which: fn(&Pod) -> i64| self.on(node).map(which).sum::<i64>() + which(pod);
            let both = [
                (self.offered(node, "cpu"), used(|pod| of_pod(pod).1)),
                (self.offered(node, "memory"), used(|pod| of_pod(pod).2)),
            ];
            let shares: Vec<i64> = both
                .into_iter()
                .filter(|(offered, _)| *offered > 0)
                .map(|(offered, used)| if used > offered { 0 } else { (offered - used) * 100 / offered })
                .collect();
            if shares.is_empty() { 0 } else { shares.iter().sum::<i64>() / shares.len() as i64 }
        };
        fitting.iter().map(score).collect()
    }

    fn balanced(&self, pod: &Pod, fitting: &[&Node]) -> Vec<i64> {
        let wanted = of_pod(pod).0;
        let score = |node: &&Node| {
            if wanted.cpu == 0 && wanted.memory == 0 {
                return 0;
            }
            let share = |resource: &str| {
                let offered = self.offered(node, resource);
                let used = self.used(node, resource) + wanted.get(resource);
                (offered > 0).then(|| (used as f64 / offered as f64).min(1.0))
            };
            match (share("cpu"), share("memory")) {
                (Some(cpu), Some(memory)) => ((1.0 - ((cpu - memory) / 2.0).abs()) * 100.0) as i64,
                _ => 100,
            }
        };
        fitting.iter().map(score).collect()
    }

    fn image_scores(&self, pod: &Pod, fitting: &[&Node]) -> Vec<i64> {
        let containers = &pod.spec.as_ref().unwrap().containers;
        let images = |node: &Node| -> BTreeMap<String, i64> {
            let images = node.status.as_ref().and_then(|status| status.images.clone()).unwrap_or_default();
            let named = images.into_iter().flat_map(|image| {
                let size = image.size_bytes.unwrap_or(0);
                image.names.unwrap_or_default().into_iter().map(move |name| (name, size))
            });
            named.collect()
        };
        let score = |node: &&Node| {
            let there = images(node);
            let share = |container: &k8s_openapi::api::core::v1::Container| {
                let image = container.image.clone().unwrap_or_default();
                let size = there.get(&image)?;
                let nodes = self.nodes.iter().filter(|node| images(node).contains_key(&image)).count();
                Some((*size as f64 * (nodes as f64 / self.nodes.len() as f64)) as i64)
            };
            let (least, most) = (23 * 1024 * 1024, 1000 * 1024 * 1024 * containers.len() as i64);
            let sum: i64 = containers.iter().filter_map(share).sum();
            100 * (sum.clamp(least, most) - least) / (most - least)
        };
        fitting.iter().map(score).collect()
    }

    fn spread_scores(&self, pod: &Pod, fitting: &[&Node]) -> Vec<i64> {
        let (rules, require_all) = self.constraints(pod, false);
        if rules.is_empty() {
            return vec![0; fitting.len()];
        }
        let has_all = |node: &Node| rules.iter().all(|rule| label(node, &rule.topology_key).is_some());
        let ignored = |node: &Node| require_all && !has_all(node);
        let scored: Vec<&&Node> = fitting.iter().filter(|node| !ignored(node)).collect();
        let host = "kubernetes.io/hostname";
        let raw = |node: &&Node| {
            if ignored(node) {
                return -1;
            }
            let mut sum = 0.0;
            for rule in &rules {
                let Some(here) = label(node, &rule.topology_key) else { continue };
                let (size, count) = if rule.topology_key == host {
                    (scored.len(), self.matching_on(pod, rule, node))
                } else {
                    let values: BTreeSet<Option<&String>> =
                        scored.iter().map(|node| label(node, &rule.topology_key)).collect();
                    let counted = self.nodes.iter().filter(|other| {
                        !ignored(other)
                            && self.included(pod, rule, other)
                            && label(other, &rule.topology_key) == Some(here)
                    });
                    (values.len(), counted.map(|other| self.matching_on(pod, rule, other)).sum())
                };
                sum += count as f64 * ((size + 2) as f64).ln() + f64::from(rule.max_skew - 1);
            }
            sum.round() as i64
        };
        let raw: Vec<i64> = fitting.iter().map(raw).collect();
        let known: Vec<i64> = raw.iter().copied().filter(|score| *score >= 0).collect();
        let (least, most) =
            (known.iter().min().copied().unwrap_or(0), known.iter().max().copied().unwrap_or(0));
        raw.into_iter()
            .map(|score| match score {
                ..0 => 0,
                _ if most == 0 => 100,
                _ => 100 * (most + least - score) / most,
            })
            .collect()
    }

    fn affinity_scores(&self, pod: &Pod, fitting: &[&Node]) -> Vec<i64> {
        let mut own = Self::terms(pod, false).1;
        own.extend(Self::terms(pod, true).1);
        let raw = |node: &&Node| {
            let mut sum = 0;
            for (other, on) in self.known_pods() {
                for (weight, term) in &own {
                    if self.means(pod, term, other) && self.same_domain(node, on, &term.topology_key) {
                        sum += weight;
                    }
                }
                let (hard, mut theirs) = Self::terms(other, false);
                theirs.extend(Self::terms(other, true).1);
                theirs.extend(hard.into_iter().map(|term| (1, term)));
                for (weight, term) in &theirs {
                    if self.means(other, term, pod) && self.same_domain(node, on, &term.topology_key) {
                        sum += weight;
                    }
                }
            }
            sum
        };
        let raw: Vec<i64> = fitting.iter().map(raw).collect();
        let (least, most) = (raw.iter().min().copied().unwrap_or(0), raw.iter().max().copied().unwrap_or(0));
        let scale = |score: i64| match most - least {
            0 => 0,
            range => (100.0 * ((score - least) as f64 / range as f64)) as i64,
        };
        raw.into_iter().map(scale).collect()
    }
}

#[cfg(test)]
mod tests;
