//! Extenders: others who are asked over HTTP about nodes (filter, prioritize), victims (preempt), or to bind. The
//! protocol is upstream's `extender/v1`. Questions are asked outside the lock; what they come to is checked again
//! against the world as it is then.

use crate::cycle::Advice;
use crate::pod::PodInfo;
use crate::preemption::Preemption;
use crate::scheduler::Shared;
use k8s_openapi::api::core::v1::{Container, Node};
use kube::Client;
use serde_json::{Value, json};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// An extender's best score, and how it becomes one of ours.
const SCORE_MAX: i64 = 10;
const SCALE: i64 = 100 / SCORE_MAX;

/// One extender, as configured.
#[derive(Clone)]
pub struct Extender {
    pub url: String,
    pub client: Client,
    /// Verbs are paths below the URL; without one the extender is not asked for that.
    pub filter: Option<String>,
    pub prioritize: Option<String>,
    pub preempt: Option<String>,
    pub bind: Option<String>,
    pub weight: i64,
    /// It keeps nodes itself: names are enough.
    pub node_cache_capable: bool,
    /// If it fails, the pod is scheduled without its opinion.
    pub ignorable: bool,
    /// Only pods that ask for one of these concern it; all do if there is none.
    pub managed_resources: Vec<String>,
}

impl std::fmt::Debug for Extender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Extender").field("url", &self.url).finish_non_exhaustive()
    }
}

impl Extender {
    pub fn is_interested(&self, pod: &PodInfo) -> bool {
        if self.managed_resources.is_empty() {
            return true;
        }
        let Some(spec) = pod.spec() else { return false };
        let wants = |container: &Container| {
            let resources = container.resources.as_ref();
            let lists = resources.into_iter().flat_map(|resources| [&resources.requests, &resources.limits]);
            lists.flatten().flat_map(|list| list.keys()).any(|name| self.managed_resources.contains(name))
        };
        spec.containers.iter().chain(spec.init_containers.iter().flatten()).any(wants)
    }

    pub fn preempts(&self) -> bool {
        self.preempt.is_some()
    }

    pub fn binds(&self) -> bool {
        self.bind.is_some()
    }

    /// Binds the pod in our stead.
    pub async fn bind(&self, pod: &PodInfo, node: &str) -> Result<(), String> {
        let args = json!({
            "PodName": pod.key.name, "PodNamespace": pod.key.namespace, "PodUID": pod.uid(), "Node": node,
        });
        let answer = self.call(self.bind.as_deref().unwrap_or_default(), &args).await?;
        complaint(&answer)
    }

    async fn call(&self, verb: &str, args: &Value) -> Result<Value, String> {
        let url = format!("{}/{verb}", self.url);
        let body = serde_json::to_vec(args).map_err(|error| format!("ask extender {url}: {error}"))?;
        let request =
            http::Request::post(format!("/{verb}")).header("content-type", "application/json").body(body);
        let request = request.map_err(|error| format!("ask extender {url}: {error}"))?;
        self.client.request(request).await.map_err(|error| format!("ask extender {url}: {error}"))
    }
}

/// Go reads field names in any case, so extenders write them in any case.
fn field<'a>(value: &'a Value, name: &str) -> Option<&'a Value> {
    let mut fields = value.as_object()?.iter();
    fields.find(|(key, value)| key.eq_ignore_ascii_case(name) && !value.is_null()).map(|(_, value)| value)
}

fn complaint(answer: &Value) -> Result<(), String> {
    match field(answer, "error").and_then(Value::as_str) {
        None | Some("") => Ok(()),
        Some(error) => Err(error.to_owned()),
    }
}

/// Asks all extenders that care about the pod which of the nodes they accept and how much they like them.
pub(crate) async fn ask(shared: &Shared, pod: &PodInfo, nodes: &[Arc<str>]) -> Result<Advice, String> {
    let mut advice = Advice { asked: nodes.iter().cloned().collect(), ..Advice::default() };
    let interested = || shared.extenders.iter().filter(|extender| extender.is_interested(pod));
    let mut left: Vec<Arc<str>> = nodes.to_vec();
    for extender in interested().filter(|extender| extender.filter.is_some()) {
        let answer = match filter(shared, extender, pod, &left).await {
            Err(error) if extender.ignorable => {
                tracing::warn!(extender = extender.url, %error, "extender failed and is ignored");
                continue;
            }
            answer => answer?,
        };
        let (accepted, refused) = answer;
        for name in &left {
            if !accepted.contains(&**name) {
                let unsaid = || (format!("node(s) refused by extender {}", extender.url), false);
                advice.refused.insert(name.to_string(), refused.get(&**name).cloned().unwrap_or_else(unsaid));
            }
        }
        left.retain(|name| accepted.contains(&**name));
        if left.is_empty() {
            return Ok(advice);
        }
    }
    let asked = interested().filter(|extender| extender.prioritize.is_some());
    let scores = asked.map(|extender| prioritize(shared, extender, pod, &left));
    for scores in futures::future::join_all(scores).await {
        for (node, score) in scores {
            *advice.scores.entry(node).or_insert(0) += score;
        }
    }
    Ok(advice)
}

fn question(shared: &Shared, extender: &Extender, pod: &PodInfo, names: &[Arc<str>]) -> Value {
    if extender.node_cache_capable {
        let names: Vec<&str> = names.iter().map(|name| &**name).collect();
        return json!({"Pod": &*pod.pod, "Nodes": null, "NodeNames": names});
    }
    let table = &shared.state.lock().world.table;
    let nodes = names.iter().filter_map(|name| Some(table.node(table.slot_of(name)?)));
    let nodes: Vec<&Node> = nodes.collect();
    json!({"Pod": &*pod.pod, "Nodes": {"metadata": {}, "items": nodes}, "NodeNames": null})
}

type Refused = HashMap<String, (String, bool)>;

async fn filter(
    shared: &Shared,
    extender: &Extender,
    pod: &PodInfo,
    names: &[Arc<str>],
) -> Result<(HashSet<String>, Refused), String> {
    let args = question(shared, extender, pod, names);
    let answer = extender.call(extender.filter.as_deref().unwrap_or_default(), &args).await?;
    complaint(&answer)?;
    let by_name = field(&answer, "nodenames").and_then(Value::as_array);
    let by_node = field(&answer, "nodes").and_then(|nodes| field(nodes, "items")).and_then(Value::as_array);
    let accepted = match (by_name, by_node) {
        (Some(names), _) => names.iter().filter_map(|name| name.as_str().map(str::to_owned)).collect(),
        (None, Some(nodes)) => {
            nodes.iter().filter_map(|node| node["metadata"]["name"].as_str().map(str::to_owned)).collect()
        }
        (None, None) => HashSet::new(),
    };
    let mut refused = Refused::new();
    for (list, hopeless) in [("failednodes", false), ("failedandunresolvablenodes", true)] {
        for (node, reason) in field(&answer, list).and_then(Value::as_object).into_iter().flatten() {
            refused.insert(node.clone(), (reason.as_str().unwrap_or_default().to_owned(), hopeless));
        }
    }
    Ok((accepted, refused))
}

/// A failure counts as no opinion, as upstream has it.
async fn prioritize(
    shared: &Shared,
    extender: &Extender,
    pod: &PodInfo,
    names: &[Arc<str>],
) -> Vec<(String, i64)> {
    let args = question(shared, extender, pod, names);
    let answer = match extender.call(extender.prioritize.as_deref().unwrap_or_default(), &args).await {
        Ok(answer) => answer,
        Err(error) => {
            tracing::warn!(extender = extender.url, %error, "extender did not score");
            return Vec::new();
        }
    };
    let scored = answer.as_array().into_iter().flatten().filter_map(|entry| {
        let score = field(entry, "score")?.as_i64()?;
        Some((field(entry, "host")?.as_str()?.to_owned(), score * extender.weight * SCALE))
    });
    scored.collect()
}

/// Lets extenders take candidates out, or change who has to go; `None` if they leave none.
pub(crate) async fn choose_victims(
    extenders: &[Extender],
    pod: &PodInfo,
    found: Preemption,
) -> Option<Preemption> {
    let unpromised = found.unpromised;
    let first = found.node.clone();
    let mut candidates = vec![(found.node, found.victims, found.violations)];
    candidates.extend(found.others);
    for extender in extenders.iter().filter(|extender| extender.preempts() && extender.is_interested(pod)) {
        candidates = match ask_about(extender, pod, &candidates).await {
            Ok(left) => left,
            Err(error) if extender.ignorable => {
                tracing::warn!(extender = extender.url, %error, "extender failed and is ignored");
                candidates
            }
            Err(error) => {
                tracing::warn!(extender = extender.url, %error, "no preemption without this extender");
                return None;
            }
        };
    }
    let (node, victims, violations) = candidates.into_iter().next()?;
    let unpromised = if node == first { unpromised } else { Vec::new() };
    Some(Preemption { node, victims, violations, unpromised, others: Vec::new() })
}

type Candidates = Vec<(Arc<str>, Vec<Arc<PodInfo>>, usize)>;

async fn ask_about(
    extender: &Extender,
    pod: &PodInfo,
    candidates: &Candidates,
) -> Result<Candidates, String> {
    let victims = |full: bool| -> Value {
        let of_node = candidates.iter().map(|(node, pods, violations)| {
            let pods: Vec<Value> = pods
                .iter()
                .map(|pod| if full { json!(&*pod.pod) } else { json!({"UID": pod.uid()}) })
                .collect();
            (node.to_string(), json!({"Pods": pods, "NumPDBViolations": violations}))
        });
        Value::Object(of_node.collect())
    };
    let args = match extender.node_cache_capable {
        true => json!({"Pod": &*pod.pod, "NodeNameToMetaVictims": victims(false)}),
        false => json!({"Pod": &*pod.pod, "NodeNameToVictims": victims(true)}),
    };
    let answer = extender.call(extender.preempt.as_deref().unwrap_or_default(), &args).await?;
    let left = field(&answer, "nodenametometavictims").and_then(Value::as_object);
    let accepted = candidates.iter().filter_map(|(node, pods, _)| {
        let entry = left?.get(&**node)?;
        let named = field(entry, "pods").and_then(Value::as_array).into_iter().flatten();
        let named: HashSet<&str> = named.filter_map(|pod| field(pod, "uid")?.as_str()).collect();
        let pods: Vec<Arc<PodInfo>> = pods.iter().filter(|pod| named.contains(pod.uid())).cloned().collect();
        let violations = field(entry, "numpdbviolations").and_then(Value::as_u64).unwrap_or(0) as usize;
        (!pods.is_empty()).then(|| (node.clone(), pods, violations))
    });
    Ok(accepted.collect())
}
