//! A pod digested: requests, ports and rules in the form plugins want. Made once per version of the pod; strings here,
//! numbers in the table.

use crate::filters::Selection;
use crate::groups::{ClassKey, PredicateSpec, Term};
use crate::requests::{self, Requests};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    Affinity, Pod, PodAffinityTerm, PodSpec, Toleration, TopologySpreadConstraint,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};
use knarr_client::ObjectKey;
use knarr_client::selector::Selector;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A port a pod occupies on its node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostPort {
    pub ip: String,
    pub protocol: String,
    pub port: i32,
}

impl HostPort {
    /// The wildcard address collides with every address.
    pub fn collides(&self, other: &HostPort) -> bool {
        let any = |ip: &str| ip == "0.0.0.0";
        self.port == other.port
            && self.protocol == other.protocol
            && (self.ip == other.ip || any(&self.ip) || any(&other.ip))
    }
}

/// A pod as the scheduler sees it.
#[derive(Debug)]
pub struct PodInfo {
    pub pod: Arc<Pod>,
    pub key: ObjectKey,
    pub priority: i32,
    pub requests: Requests,
    /// Cpu and memory with defaults where nothing is requested: for scoring only.
    pub scored_cpu: i64,
    pub scored_memory: i64,
    pub ports: Vec<HostPort>,
    pub class: Arc<ClassKey>,
    /// `None` without rules about other pods.
    pub affinity: Option<Box<PodAffinity>>,
    /// `None` if any node's labels and name will do.
    pub selection: Option<Arc<Selection>>,
    /// The only nodes it may be on by name, if its required terms all name some.
    pub node_names: Option<Vec<String>>,
    pub spread: Vec<SpreadRule>,
    /// Names of the claims it mounts, in order of its volumes; true if the claim is made for the pod (ephemeral).
    pub claims: Vec<(String, bool)>,
    /// What is wrong with its rules; such a pod fits nowhere.
    pub error: Option<String>,
}

/// Rules about other pods.
#[derive(Debug, Default)]
pub struct PodAffinity {
    /// Upstream: a running pod counts for required affinity only if it matches all terms at once. The predicate is
    /// that conjunction, with the topology of each term.
    pub required: Option<(Arc<PredicateSpec>, Vec<String>)>,
    /// Each required term alone: what this pod, once it runs, means for others.
    pub attracts: Vec<Rule>,
    pub required_anti: Vec<Rule>,
    /// Weights are negative for anti-affinity.
    pub preferred: Vec<(i64, Rule)>,
}

#[derive(Clone, Debug)]
pub struct Rule {
    pub predicate: Arc<PredicateSpec>,
    pub topology: String,
}

/// A topology spread constraint.
#[derive(Clone, Debug)]
pub struct SpreadRule {
    pub hard: bool,
    pub topology: String,
    pub max_skew: i64,
    pub min_domains: i64,
    pub predicate: Arc<PredicateSpec>,
    pub honors_affinity: bool,
    pub honors_taints: bool,
    /// Whether the pod itself counts where it goes.
    pub counts_itself: bool,
}

impl PodInfo {
    pub fn new(pod: Arc<Pod>) -> Self {
        let (requests, scored_cpu, scored_memory) = requests::of_pod(&pod);
        let none = PodSpec::default();
        let spec = pod.spec.as_ref().unwrap_or(&none);
        let mut info = PodInfo {
            key: ObjectKey::of(&*pod),
            priority: spec.priority.unwrap_or(0),
            requests,
            scored_cpu,
            scored_memory,
            ports: host_ports(spec),
            class: Arc::new(ClassKey::of(&pod)),
            affinity: None,
            selection: Selection::of(spec).map(Arc::new),
            node_names: node_names(spec),
            spread: Vec::new(),
            claims: claims(&pod, spec),
            error: None,
            pod: pod.clone(),
        };
        if let Some(affinity) = &spec.affinity
            && (affinity.pod_affinity.is_some() || affinity.pod_anti_affinity.is_some())
        {
            match pod_affinity(&pod, affinity) {
                Ok(rules) => info.affinity = Some(Box::new(rules)),
                Err(error) => info.error = Some(error),
            }
        }
        let rules = spec.topology_spread_constraints.iter().flatten().map(|rule| spread_rule(&pod, rule));
        match rules.collect() {
            Ok(rules) => info.spread = rules,
            Err(error) => info.error = Some(error),
        }
        info
    }

    /// Whether this version changes nothing for other pods: rules and ports of a pod cannot change while it lives.
    pub fn counts_as(&self, newer: &PodInfo) -> bool {
        self.uid() == newer.uid()
            && self.class == newer.class
            && self.requests == newer.requests
            && self.scored_cpu == newer.scored_cpu
            && self.scored_memory == newer.scored_memory
    }

    pub fn uid(&self) -> &str {
        self.pod.metadata.uid.as_deref().unwrap_or_default()
    }

    pub fn namespace(&self) -> &str {
        &self.key.namespace
    }

    pub fn spec(&self) -> Option<&PodSpec> {
        self.pod.spec.as_ref()
    }

    pub fn labels(&self) -> Option<&BTreeMap<String, String>> {
        self.pod.metadata.labels.as_ref()
    }

    pub fn tolerations(&self) -> Option<&Vec<Toleration>> {
        self.spec().and_then(|spec| spec.tolerations.as_ref())
    }

    pub fn is_terminating(&self) -> bool {
        self.pod.metadata.deletion_timestamp.is_some()
    }

    /// When the kubelet took it over; the far future before that, as upstream compares it.
    pub fn started(&self) -> Timestamp {
        let started = self.pod.status.as_ref().and_then(|status| status.start_time.as_ref());
        started.map_or(Timestamp::MAX, |time| time.0)
    }

    /// The node it is to get once room was made there (`status.nominatedNodeName`).
    pub fn nominated_node(&self) -> Option<&str> {
        let status = self.pod.status.as_ref()?;
        status.nominated_node_name.as_deref().filter(|name| !name.is_empty())
    }

    /// The scheduler it asks for.
    pub fn scheduler_name(&self) -> &str {
        let name = self.spec().and_then(|spec| spec.scheduler_name.as_deref());
        name.filter(|name| !name.is_empty()).unwrap_or(crate::DEFAULT_NAME)
    }
}

fn host_ports(spec: &PodSpec) -> Vec<HostPort> {
    let sidecars = spec.init_containers.iter().flatten();
    let sidecars = sidecars.filter(|container| container.restart_policy.as_deref() == Some("Always"));
    let containers = spec.containers.iter().chain(sidecars);
    let ports = containers.flat_map(|container| container.ports.iter().flatten());
    ports
        .filter_map(|port| {
            let host_port = port.host_port.filter(|port| *port > 0)?;
            let ip = port.host_ip.clone().filter(|ip| !ip.is_empty()).unwrap_or_else(|| "0.0.0.0".to_owned());
            let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
            Some(HostPort { ip, protocol, port: host_port })
        })
        .collect()
}

fn claims(pod: &Pod, spec: &PodSpec) -> Vec<(String, bool)> {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let claim = |volume: &k8s_openapi::api::core::v1::Volume| {
        let named = volume.persistent_volume_claim.as_ref().map(|claim| (claim.claim_name.clone(), false));
        named.or_else(|| volume.ephemeral.as_ref().map(|_| (format!("{name}-{}", volume.name), true)))
    };
    spec.volumes.iter().flatten().filter_map(claim).collect()
}

/// The nodes that required terms name, if each term has `metadata.name In` (upstream's `PreFilterResult`).
fn node_names(spec: &PodSpec) -> Option<Vec<String>> {
    let required = spec
        .affinity
        .as_ref()?
        .node_affinity
        .as_ref()?
        .required_during_scheduling_ignored_during_execution
        .as_ref()?;
    let mut names: Vec<String> = Vec::new();
    for term in &required.node_selector_terms {
        let fields = term.match_fields.iter().flatten();
        let fields = fields.filter(|field| field.key == "metadata.name" && field.operator == "In");
        // Fields of one term must all hold: their names intersect.
        let of_term = fields
            .map(|field| field.values.clone().unwrap_or_default())
            .reduce(|a, b| a.into_iter().filter(|name| b.contains(name)).collect())?;
        names.extend(of_term);
    }
    names.sort();
    names.dedup();
    (!required.node_selector_terms.is_empty()).then_some(names)
}

fn pod_affinity(pod: &Pod, affinity: &Affinity) -> Result<PodAffinity, String> {
    let mut rules = PodAffinity::default();
    if let Some(affinity) = &affinity.pod_affinity {
        let required = affinity.required_during_scheduling_ignored_during_execution.iter().flatten();
        let terms = required.map(|term| Ok((affinity_term(pod, term)?, term.topology_key.clone())));
        let terms: Vec<(Term, String)> = terms.collect::<Result<_, String>>()?;
        if !terms.is_empty() {
            let topologies = terms.iter().map(|(_, topology)| topology.clone()).collect();
            let all = terms.iter().map(|(term, _)| term.clone()).collect();
            rules.required = Some((Arc::new(PredicateSpec { terms: all, living_only: false }), topologies));
        }
        rules.attracts = terms.into_iter().map(|(term, topology)| rule(term, topology)).collect();
        for preferred in affinity.preferred_during_scheduling_ignored_during_execution.iter().flatten() {
            let term = affinity_term(pod, &preferred.pod_affinity_term)?;
            let topology = preferred.pod_affinity_term.topology_key.clone();
            rules.preferred.push((preferred.weight.into(), rule(term, topology)));
        }
    }
    if let Some(affinity) = &affinity.pod_anti_affinity {
        for required in affinity.required_during_scheduling_ignored_during_execution.iter().flatten() {
            rules.required_anti.push(rule(affinity_term(pod, required)?, required.topology_key.clone()));
        }
        for preferred in affinity.preferred_during_scheduling_ignored_during_execution.iter().flatten() {
            let term = affinity_term(pod, &preferred.pod_affinity_term)?;
            let topology = preferred.pod_affinity_term.topology_key.clone();
            rules.preferred.push((-i64::from(preferred.weight), rule(term, topology)));
        }
    }
    Ok(rules)
}

fn rule(term: Term, topology: String) -> Rule {
    Rule { predicate: Arc::new(PredicateSpec { terms: vec![term], living_only: false }), topology }
}

/// A term with the pod's own values for `matchLabelKeys` and `mismatchLabelKeys`. (The API server merges them into
/// the selector too; once more does no harm, and other API servers may not have done it.)
fn affinity_term(pod: &Pod, term: &PodAffinityTerm) -> Result<Term, String> {
    let selector = match &term.label_selector {
        // No selector matches no pod.
        None => Selector::none(),
        Some(selector) => {
            let mut selector = selector.clone();
            add_label_keys(pod, &mut selector, "In", &term.match_label_keys);
            add_label_keys(pod, &mut selector, "NotIn", &term.mismatch_label_keys);
            Selector::new(&selector).map_err(|error| error.to_string())?
        }
    };
    let mut namespaces = term.namespaces.clone().unwrap_or_default();
    if namespaces.is_empty() && term.namespace_selector.is_none() {
        namespaces.push(pod.metadata.namespace.clone().unwrap_or_default());
    }
    namespaces.sort();
    let namespace_selector = term.namespace_selector.as_ref().map(Selector::new).transpose();
    let namespace_selector = namespace_selector.map_err(|error| error.to_string())?;
    Ok(Term { namespaces, namespace_selector, selector })
}

fn add_label_keys(pod: &Pod, selector: &mut LabelSelector, operator: &str, keys: &Option<Vec<String>>) {
    for key in keys.iter().flatten() {
        let Some(value) = pod.metadata.labels.as_ref().and_then(|labels| labels.get(key)) else { continue };
        let requirement = LabelSelectorRequirement {
            key: key.clone(),
            operator: operator.to_owned(),
            values: Some(vec![value.clone()]),
        };
        let requirements = selector.match_expressions.get_or_insert_default();
        if !requirements.contains(&requirement) {
            requirements.push(requirement);
        }
    }
}

fn spread_rule(pod: &Pod, constraint: &TopologySpreadConstraint) -> Result<SpreadRule, String> {
    let selector = match &constraint.label_selector {
        None => Selector::none(),
        Some(selector) => {
            let mut selector = selector.clone();
            add_label_keys(pod, &mut selector, "In", &constraint.match_label_keys);
            Selector::new(&selector).map_err(|error| error.to_string())?
        }
    };
    Ok(SpreadRule {
        hard: constraint.when_unsatisfiable == "DoNotSchedule",
        topology: constraint.topology_key.clone(),
        max_skew: constraint.max_skew.into(),
        min_domains: constraint.min_domains.unwrap_or(1).into(),
        honors_affinity: constraint.node_affinity_policy.as_deref() != Some("Ignore"),
        honors_taints: constraint.node_taints_policy.as_deref() == Some("Honor"),
        counts_itself: selector.matches(pod.metadata.labels.as_ref()),
        predicate: own_namespace(pod, selector),
    })
}

/// Living pods of the pod's own namespace that the selector matches: what spreading counts.
pub fn own_namespace(pod: &Pod, selector: Selector) -> Arc<PredicateSpec> {
    let namespaces = vec![pod.metadata.namespace.clone().unwrap_or_default()];
    let term = Term { namespaces, namespace_selector: None, selector };
    Arc::new(PredicateSpec { terms: vec![term], living_only: true })
}
