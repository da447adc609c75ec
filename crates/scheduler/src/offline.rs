//! The scheduler without an API: nodes and pods are put in by hand, decisions come back. For benchmarks, what-if
//! questions and tests.

use crate::config::Config;
use crate::cycle::{Chooser, Decision, decide};
use crate::objects::World;
use crate::pod::PodInfo;
use crate::profile::Profile;
use k8s_openapi::api::core::v1::{Node, Pod};
use knarr_client::ObjectKey;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use std::sync::Arc;

/// A cluster in memory, and a scheduler over it.
pub struct Offline {
    pub(crate) world: World,
    chooser: Chooser<SmallRng>,
    profile: Profile,
}

/// A pod made ready for decisions.
#[derive(Clone)]
pub struct Waiting(pub(crate) Arc<PodInfo>);

/// What became of a pod.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    Node(String),
    /// It fits once these pods (namespace, name) are gone from the node.
    Preempt {
        node: String,
        victims: Vec<(String, String)>,
    },
    /// Why it fits nowhere, as its event would say.
    Unschedulable(String),
}

impl Offline {
    /// A scheduler with the first profile of `config`; `seed` decides ties.
    pub fn new(config: Config, seed: u64) -> Self {
        let profile = config.profiles.into_iter().next().unwrap_or_default();
        let chooser = Chooser::new(SmallRng::seed_from_u64(seed));
        Offline { world: World::default(), chooser, profile }
    }

    pub fn set_node(&mut self, node: Node) {
        self.world.table.set_node(Arc::new(node));
    }

    pub fn remove_node(&mut self, name: &str) {
        self.world.table.remove_node(name);
    }

    pub fn wait(pod: Pod) -> Waiting {
        Waiting(Arc::new(PodInfo::new(Arc::new(pod))))
    }

    /// Counts a pod on a node.
    pub fn place(&mut self, pod: &Waiting, node: &str) {
        self.world.table.add_pod(node, pod.0.clone());
    }

    pub fn remove(&mut self, namespace: &str, name: &str) {
        self.world.table.remove_pod(&ObjectKey::new(namespace, name));
    }

    pub fn decide(&mut self, pod: &Waiting) -> Answer {
        match decide(&pod.0, &self.profile, &mut self.world, &mut self.chooser, None) {
            Decision::Node(node, _) => Answer::Node(node.to_string()),
            Decision::Unschedulable(refusal) => match refusal.preemption {
                None => Answer::Unschedulable(refusal.message),
                Some(preemption) => Answer::Preempt {
                    node: preemption.node.to_string(),
                    victims: preemption
                        .victims
                        .iter()
                        .map(|victim| (victim.key.namespace.clone(), victim.key.name.clone()))
                        .collect(),
                },
            },
        }
    }
}
