//! Subresources that are more than a view: scale, binding, eviction, tokens, finalize.

use knarr_api::object::Object;
use knarr_api::rules::Rules;
use knarr_api::schema::Kind;
use knarr_api::status::{Result, Status};
use knarr_api::{field, selector::LabelSelector, time};
use serde_json::{Map, Value, json};

use crate::authn::{Claims, Tokens};
use crate::encode::{self, View};
use crate::registry::{Context, DeleteOptions, Edit, Endpoint, Outcome, Place, Registry};

/// The `Scale` of a workload.
pub fn scale_of(object: &Value) -> Value {
    let selector = match object.at("spec.selector") {
        // Replication controllers select by plain labels.
        Some(plain) if plain.at("matchLabels").is_none() && plain.at("matchExpressions").is_none() => {
            LabelSelector::from_labels(Some(plain))
        }
        found => LabelSelector::from_value(found),
    };
    let metadata = &object["metadata"];
    let mut status = json!({ "replicas": object.int_at("status.replicas").unwrap_or(0) });
    let text = selector_text(&selector);
    if !text.is_empty() {
        status["selector"] = json!(text);
    }
    let mut scale = json!({
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {},
        "spec": {},
        "status": status,
    });
    for name in ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"] {
        if let Some(value) = metadata.get(name) {
            scale["metadata"][name] = value.clone();
        }
    }
    if let Some(replicas) = object.int_at("spec.replicas").filter(|n| *n != 0) {
        scale["spec"]["replicas"] = json!(replicas);
    }
    scale
}

fn selector_text(selector: &LabelSelector) -> String {
    use knarr_api::selector::Operator::*;
    let parts: Vec<String> = selector
        .requirements()
        .iter()
        .map(|r| match (r.operator, &r.values[..]) {
            (In, [one]) => format!("{}={one}", r.key),
            (In, many) => format!("{} in ({})", r.key, many.join(",")),
            (NotIn, many) => format!("{} notin ({})", r.key, many.join(",")),
            (Exists, _) => r.key.clone(),
            _ => format!("!{}", r.key),
        })
        .collect();
    parts.join(",")
}

/// Changes a workload through its scale. `edit` works on the `Scale` object.
pub async fn update_scale(
    registry: &Registry,
    place: Place<'_>,
    edit: &(dyn Fn(&Value) -> Result<Value> + Send + Sync),
    context: &Context,
) -> Result<Value> {
    let kind = place.kind;
    let change = |object: &Value| -> Result<Value> {
        let scale = edit(&scale_of(object))?;
        let revision = scale.str_at("metadata.resourceVersion");
        if !revision.is_empty() && revision != object.str_at("metadata.resourceVersion") {
            return Err(Status::modified(kind, place.name));
        }
        if !scale.name().is_empty() && scale.name() != place.name {
            return Err(Status::bad_request(format!(
                "the name of the object ({}) does not match the name on the URL ({})",
                scale.name(),
                place.name
            )));
        }
        let replicas = scale.int_at("spec.replicas").unwrap_or(0);
        if replicas < 0 {
            let error =
                field::Error::invalid("spec.replicas", replicas, "must be greater than or equal to 0");
            let mut status = Status::invalid(kind, place.name, &[error]);
            status.message =
                status.message.replacen(&format!("{}.{}", kind.kind, kind.group), "Scale.autoscaling", 1);
            return Err(status);
        }
        let mut new = object.clone();
        new.set_at("spec.replicas", replicas);
        new.remove_at("metadata.resourceVersion");
        Ok(new)
    };
    let outcome = registry.modify(place, Endpoint::Other("scale"), &Edit::With(&change), context).await?;
    Ok(scale_of(&outcome.value()))
}

/// Binds a pod to a node, once.
pub async fn bind(
    registry: &Registry,
    place: Place<'_>,
    binding: &Value,
    context: &Context,
) -> Result<Value> {
    let node = binding.str_at("target.name").to_owned();
    if node.is_empty() {
        let error = field::Error::required("target.name", "");
        return Err(Status::invalid(place.kind, place.name, &[error]));
    }
    let now = registry.now();
    let labels = topology_of(registry, &node);
    let change = |mut pod: Value| -> Result<Value> {
        let assigned = pod.str_at("spec.nodeName");
        let refuse = |why: String| {
            let mut status = Status::conflict(place.kind, place.name, why);
            status.message = status.message.replacen("pods ", "pods/binding ", 1);
            Err(status)
        };
        let uid = binding.uid();
        if !uid.is_empty() && uid != pod.uid() {
            return refuse(format!(
                "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
                pod.uid()
            ));
        }
        if pod.at("metadata.deletionTimestamp").is_some() {
            return refuse(format!("pod {} is being deleted, cannot be assigned to a host", place.name));
        }
        if !assigned.is_empty() {
            return refuse(format!("pod {} is already assigned to node {assigned:?}", place.name));
        }
        if !pod.list_at("spec.schedulingGates").is_empty() {
            return refuse(format!("pod {} has non-empty .spec.schedulingGates", place.name));
        }
        pod.set_at("spec.nodeName", node.as_str());
        pod.remove_at("status.nominatedNodeName");
        set_condition(
            &mut pod,
            json!({ "type": "PodScheduled", "status": "True", "lastTransitionTime": now, "lastProbeTime": null }),
        );
        for (key, value) in binding.map_at("metadata.annotations").into_iter().flatten() {
            entries(&mut pod, "annotations").insert(key.clone(), value.clone());
        }
        for (key, value) in binding.map_at("metadata.labels").into_iter().flatten().chain(&labels) {
            entries(&mut pod, "labels").entry(key).or_insert_with(|| value.clone());
        }
        Ok(pod)
    };
    registry.rewrite(place, change, context).await?;
    Ok(success(201))
}

/// The zone and region that a pod takes over from its node as labels (KEP-4742).
fn topology_of(registry: &Registry, node: &str) -> Map<String, Value> {
    let Some(entry) = registry.store.get("nodes", &encode::key("", node)) else { return Map::new() };
    let kind = registry.schema.resource("", "v1", "nodes").expect("nodes are built in");
    let labels = &View::selectable(Rules::of(kind), &entry).labels;
    let keys = ["topology.kubernetes.io/zone", "topology.kubernetes.io/region"];
    keys.iter().filter_map(|key| Some(((*key).to_owned(), labels.get(*key)?.clone()))).collect()
}

/// The labels or annotations of an object, to be changed.
fn entries<'o>(object: &'o mut Value, which: &str) -> &'o mut Map<String, Value> {
    let path = format!("metadata.{which}");
    if object.map_at(&path).is_none() {
        object.set_at(&path, json!({}));
    }
    object["metadata"][which].as_object_mut().expect("just looked at")
}

/// Replaces the condition of the same type.
fn set_condition(pod: &mut Value, condition: Value) {
    let kind = condition.str_at("type").to_owned();
    let mut conditions: Vec<Value> =
        pod.list_at("status.conditions").iter().filter(|c| c.str_at("type") != kind).cloned().collect();
    conditions.push(condition);
    pod.set_at("status.conditions", conditions);
}

/// `{"status": "Success"}`.
pub fn success(code: u16) -> Value {
    json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": code })
}

/// Deletes a pod if its disruption budgets allow it.
pub async fn evict(
    registry: &Registry,
    place: Place<'_>,
    eviction: &Value,
    context: &Context,
) -> Result<Value> {
    let empty = json!({});
    let options = DeleteOptions::read(eviction.at("deleteOptions").unwrap_or(&empty), &Default::default())?;
    let dry = options.dry_run.then(|| context.dry());
    let context = dry.as_ref().unwrap_or(context);
    let pod = registry.get(place)?;
    let pod = crate::encode::decode(&pod);
    crate::node::restrict_eviction(&context.user, place.kind, &pod)?;
    let ended = matches!(pod.str_at("status.phase"), "Succeeded" | "Failed" | "Pending" | "");
    if !ended && pod.at("metadata.deletionTimestamp").is_none() {
        take_disruption(registry, place, &pod, context).await?;
    }
    registry.delete(place, &options, context).await?;
    Ok(success(201))
}

/// Pods evicted and not yet seen gone by the disruption controller; more wait.
const DISRUPTED_PODS_MAX: usize = 2000;

/// Takes one of the disruptions the pod's budget still allows, before the pod goes.
async fn take_disruption(
    registry: &Registry,
    place: Place<'_>,
    pod: &Value,
    context: &Context,
) -> Result<()> {
    let budget = match &budgets_of(registry, place.namespace, pod)[..] {
        [] => return Ok(()),
        [one] => one.clone(),
        _ => {
            let why = "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.";
            return Err(Status::internal(why));
        }
    };
    let ready = pod
        .list_at("status.conditions")
        .iter()
        .any(|c| c.str_at("type") == "Ready" && c.str_at("status") == "True");
    let (healthy, desired) = (
        budget.int_at("status.currentHealthy").unwrap_or(0),
        budget.int_at("status.desiredHealthy").unwrap_or(0),
    );
    let always = budget.str_at("spec.unhealthyPodEvictionPolicy") == "AlwaysAllow";
    let served = budget.int_at("status.observedGeneration").unwrap_or(0) > 0;
    if !ready && (always || (served && desired > 0 && healthy >= desired)) {
        return Ok(());
    }
    let kind =
        registry.schema.resource("policy", "v1", "poddisruptionbudgets").expect("budgets are built in");
    let now = registry.now();
    let take = |budget: &Value| -> Result<Value> {
        if budget.int_at("status.observedGeneration").unwrap_or(0)
            < budget.int_at("metadata.generation").unwrap_or(0)
        {
            let why =
                format!("The disruption budget {} is still being processed by the server.", budget.name());
            return Err(would_violate(&why));
        }
        let pods = budget.map_at("status.disruptedPods").cloned().unwrap_or_default();
        if pods.len() > DISRUPTED_PODS_MAX {
            let why = format!(
                "DisruptedPods map too big - too many evictions not confirmed by PDB controller: {}",
                pods.len()
            );
            return Err(Status::forbidden(kind, budget.name(), why));
        }
        let allowed = budget.int_at("status.disruptionsAllowed").unwrap_or(0);
        if allowed <= 0 {
            let healthy = budget.int_at("status.currentHealthy").unwrap_or(0);
            let desired = budget.int_at("status.desiredHealthy").unwrap_or(0);
            let why = format!(
                "The disruption budget {} needs {desired} healthy pods and has {healthy} currently",
                budget.name()
            );
            return Err(would_violate(&why));
        }
        let mut new = budget.clone();
        let mut pods = pods;
        pods.insert(place.name.to_owned(), json!(now));
        new.set_at("status.disruptionsAllowed", allowed - 1);
        new.set_at("status.disruptedPods", Value::Object(pods));
        new.remove_at("metadata.resourceVersion");
        Ok(new)
    };
    let at = Place { kind, namespace: place.namespace, name: budget.name() };
    registry.modify(at, Endpoint::Status, &Edit::With(&take), context).await.map(|_| ())
}

fn would_violate(why: &str) -> Box<Status> {
    let text = "Cannot evict pod as it would violate the pod's disruption budget.";
    let mut status = Status::too_many_requests(text, 10);
    status.details = Some(
        json!({ "retryAfterSeconds": 10, "causes": [{ "reason": "DisruptionBudget", "message": why }] }),
    );
    status
}

fn budgets_of(registry: &Registry, namespace: &str, pod: &Value) -> Vec<Value> {
    let range = knarr_store::Range { prefix: crate::registry::prefix(namespace), ..Default::default() };
    let listing = registry.store.list("poddisruptionbudgets.policy", &range);
    let labels = pod.map_at("metadata.labels");
    let entries = listing.map(|l| l.entries).unwrap_or_default();
    let budgets = entries.iter().map(|e| crate::encode::decode(e));
    // An absent selector selects nothing, an empty one everything.
    budgets
        .filter(|b| b.at("spec.selector").is_some_and(|s| LabelSelector::from_value(Some(s)).matches(labels)))
        .collect()
}

/// Only `spec.finalizers` of a namespace; without any left, a namespace marked for deletion goes.
pub async fn finalize(
    registry: &Registry,
    place: Place<'_>,
    object: &Value,
    context: &Context,
) -> Result<Outcome> {
    let change = |namespace: &Value| -> Result<Value> {
        let revision = object.str_at("metadata.resourceVersion");
        if !revision.is_empty() && revision != namespace.str_at("metadata.resourceVersion") {
            return Err(Status::modified(place.kind, place.name));
        }
        let mut new = namespace.clone();
        new.set_at("spec.finalizers", object.list_at("spec.finalizers").to_vec());
        if object.list_at("spec.finalizers").is_empty() {
            new.remove_at("spec.finalizers");
        }
        Ok(new)
    };
    registry.modify(place, Endpoint::Other("finalize"), &Edit::With(&change), context).await
}

/// Tokens live at least ten minutes and at most so long.
const TOKEN_SECONDS_MAX: i64 = 1 << 32;
const TOKEN_SECONDS_MIN: i64 = 600;

/// Issues a token for a service account.
pub fn token(
    registry: &Registry,
    tokens: &Tokens,
    place: Place,
    request: &Value,
    context: &Context,
) -> Result<Value> {
    let account = registry
        .lookup("", "serviceaccounts", place.namespace, place.name)
        .ok_or_else(|| place.not_found())?;
    let seconds = request.int_at("spec.expirationSeconds").unwrap_or(3600);
    let kind = review_kind(registry, "authentication.k8s.io", "tokenreviews");
    let invalid = |error| {
        let mut status = Status::invalid(kind, "", &[error]);
        status.message = status.message.replacen("TokenReview.", "TokenRequest.", 1);
        status
    };
    if seconds < TOKEN_SECONDS_MIN {
        return Err(invalid(field::Error::invalid(
            "spec.expirationSeconds",
            seconds,
            "may not specify a duration less than 10 minutes",
        )));
    }
    if seconds > TOKEN_SECONDS_MAX {
        return Err(invalid(field::Error::invalid(
            "spec.expirationSeconds",
            seconds,
            "may not specify a duration larger than 2^32 seconds",
        )));
    }
    let bound = request.at("spec.boundObjectRef").filter(|b| !b.str_at("name").is_empty());
    let (mut bound_to, mut node) = (None, None);
    if let Some(reference) = bound {
        let (kind, name) = (reference.str_at("kind"), reference.str_at("name"));
        let (plural, scope) = match kind {
            "Pod" => ("pods", place.namespace),
            "Secret" => ("secrets", place.namespace),
            "Node" => ("nodes", ""),
            other => {
                return Err(Status::bad_request(format!(
                    "cannot bind token for serviceaccount {:?} to type {other}",
                    place.name
                )));
            }
        };
        let resource = registry.schema.resource("", "v1", plural).expect("bindable kinds are built in");
        let object =
            registry.lookup("", plural, scope, name).ok_or_else(|| Status::not_found(resource, name))?;
        let uid = reference.str_at("uid");
        if !uid.is_empty() && uid != object.uid() {
            let why = format!(
                "the UID in the bound object reference ({uid}) does not match the UID in record. The object might have been deleted and then recreated"
            );
            return Err(Status::conflict(resource, name, why));
        }
        if kind == "Pod" && object.str_at("spec.serviceAccountName") != place.name {
            return Err(Status::bad_request(format!(
                "cannot bind token for serviceaccount {:?} to pod running with different serviceaccount name.",
                place.name
            )));
        }
        let host = object.str_at("spec.nodeName");
        if kind == "Pod"
            && let Some(found) = registry.lookup("", "nodes", "", host)
        {
            node = Some((host.to_owned(), found.uid().to_owned()));
        }
        bound_to = Some((kind.to_owned(), name.to_owned(), object.uid().to_owned()));
    }
    let audiences: Vec<String> =
        request.list_at("spec.audiences").iter().filter_map(|a| a.as_str().map(str::to_owned)).collect();
    let claims = Claims {
        namespace: place.namespace,
        account: place.name,
        account_uid: account.uid(),
        audiences: audiences.clone(),
        seconds,
        bound: bound_to,
        node,
    };
    let (token, expires) = tokens.sign(&claims, (registry.clock)())?;
    let expires = jiff::Timestamp::from_second(expires).map_err(Status::internal)?;
    let mut answer = request.clone();
    answer["kind"] = json!("TokenRequest");
    answer["apiVersion"] = json!("authentication.k8s.io/v1");
    answer.set_at("metadata.name", place.name);
    answer.set_at("metadata.namespace", place.namespace);
    answer.set_at("metadata.creationTimestamp", registry.now());
    answer.set_at("spec.expirationSeconds", seconds);
    answer.set_at(
        "spec.audiences",
        if audiences.is_empty() { vec![tokens.issuer().to_owned()] } else { audiences },
    );
    // A dry run gives no key to anything.
    let token = if context.dry_run { String::new() } else { token };
    answer.set_at("status", json!({ "token": token, "expirationTimestamp": time::print(expires, 0) }));
    Ok(answer)
}

fn review_kind<'r>(registry: &'r Registry, group: &str, plural: &str) -> &'r Kind {
    registry.schema.resource(group, "v1", plural).expect("reviews are built in")
}
