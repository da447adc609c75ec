//! What follows from a decision, written in the background: volumes and the binding; or the explanation, the victims'
//! end and the nomination.

use crate::cycle::Refusal;
use crate::metrics::{Attempted, Status, metrics};
use crate::plugins::{Point, SELECTED_NODE, VolumePlan, has_selected_node, is_claim_bound};
use crate::pod::PodInfo;
use crate::preemption::Preemption;
use crate::queue::Attempt;
use crate::scheduler::{Outcome, Shared, node_of};
use k8s_openapi::api::core::v1::{
    Binding, ObjectReference, PersistentVolume, PersistentVolumeClaim, Pod, PodCondition,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use knarr_client::{During, Error, EventType, ObjectKey, Result, ignore_gone};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use serde_json::json;
use std::collections::HashSet;
use std::sync::Arc;
use tokio::time::Instant;

/// Who gave a volume to a claim, as the volume controller looks for it.
const BOUND_BY_CONTROLLER: &str = "pv.kubernetes.io/bound-by-controller";

pub(crate) async fn carry_out(shared: &Arc<Shared>, outcome: Outcome) {
    let mut next = Some(outcome);
    while let Some(outcome) = next.take() {
        match outcome {
            Outcome::Bind { attempt, node, plan, began } => {
                bind_and_tell(shared, &attempt, &node, &plan, began).await;
            }
            Outcome::Explain { pod, refusal } => explain_refusal(shared, &pod, &refusal).await,
            Outcome::Ask { attempt, nodes, began } => {
                match crate::extender::ask(shared, &attempt.pod, &nodes).await {
                    Ok(advice) => next = shared.decide_advised(attempt, &advice, began),
                    Err(error) => {
                        let pod = attempt.pod;
                        shared.update(|state| state.queue.retry(&pod.key, Instant::now()));
                        fail(shared, &pod, &error, began).await;
                    }
                }
            }
            Outcome::AskAboutVictims { pod, mut refusal } => {
                if let Some(found) = refusal.preemption.take() {
                    refusal.preemption =
                        crate::extender::choose_victims(&shared.extenders, &pod, found).await;
                }
                shared.update(|state| state.nominate(&pod, &refusal));
                explain_refusal(shared, &pod, &refusal).await;
            }
        }
    }
}

async fn bind_and_tell(
    shared: &Shared,
    attempt: &Attempt,
    node: &Arc<str>,
    plan: &VolumePlan,
    began: Instant,
) {
    let pod = &attempt.pod;
    let measured = |point, begin: std::time::Instant, succeeded| {
        let status = if succeeded { Status::Success } else { Status::Error };
        metrics().point(pod.scheduler_name(), point, status, begin.elapsed());
    };
    let begin = std::time::Instant::now();
    let volumes = bind_volumes(shared, pod, node, plan).await;
    measured(Point::PreBind, begin, volumes.is_ok());
    let result = match volumes {
        Ok(()) => {
            let begin = std::time::Instant::now();
            let bound = bind(shared, pod, node).await;
            measured(Point::Bind, begin, bound.is_ok());
            bound
        }
        Err(error) => Err(error),
    };
    match result {
        Ok(()) => {
            shared.update(|state| state.bound(&pod.key));
            shared.announcer.bound(pod, node, shared.clock.time());
            let profile: Arc<str> = pod.scheduler_name().into();
            metrics().attempt(&profile, Attempted::Scheduled, began.elapsed());
            metrics().bound(attempt.attempts, attempt.since.elapsed());
        }
        Err(error) => {
            tracing::debug!(pod = %pod.key, %error, "binding failed");
            let waits =
                |known: &Arc<Pod>| node_of(known).is_none() && known.metadata.uid == pod.pod.metadata.uid;
            let waits = shared.pods.get_key(&pod.key).is_some_and(|known| waits(&known));
            shared.update(|state| state.forget(pod, plan, waits));
            if waits && !error.is_not_found() && !error.is_conflict() {
                fail(shared, pod, &error.to_string(), began).await;
            }
        }
    }
}

/// Tells that something else than the pod's own rules went wrong.
async fn fail(shared: &Shared, pod: &PodInfo, message: &str, began: Instant) {
    let profile: Arc<str> = pod.scheduler_name().into();
    metrics().attempt(&profile, Attempted::Error, began.elapsed());
    explain(shared, pod, "SchedulerError", message, None).await;
}

async fn bind(shared: &Shared, pod: &PodInfo, node: &str) -> Result<()> {
    let step = || format!("bind pod {} to node {node}", pod.key);
    if let Some(extender) =
        shared.extenders.iter().find(|extender| extender.binds() && extender.is_interested(pod))
    {
        return extender.bind(pod, node).await.map_err(|reason| Error::not_yet(step(), reason));
    }
    let binding = Binding {
        metadata: ObjectMeta {
            name: Some(pod.key.name.clone()),
            namespace: Some(pod.key.namespace.clone()),
            uid: pod.pod.metadata.uid.clone(),
            ..Default::default()
        },
        target: ObjectReference {
            kind: Some("Node".to_owned()),
            name: Some(node.to_owned()),
            ..Default::default()
        },
    };
    let api: Api<Pod> = Api::namespaced(shared.client.clone(), &pod.key.namespace);
    let params = PostParams::default();
    api.create_subresource::<_, serde_json::Value>("binding", &pod.key.name, &params, &binding)
        .await
        .during(step)?;
    Ok(())
}

/// Gives volumes to claims, marks claims to be provisioned, and waits until all are bound.
async fn bind_volumes(shared: &Shared, pod: &PodInfo, node: &str, plan: &VolumePlan) -> Result<()> {
    if plan.is_empty() {
        return Ok(());
    }
    for (volume, claim) in &plan.bind {
        give_volume(shared, volume, claim).await?;
    }
    for claim in &plan.provision {
        select_node(shared, claim, node).await?;
    }
    let limit =
        shared.profile(pod).map(|profile| profile.args.volume_binding.bind_timeout).unwrap_or_default();
    let step = || format!("bind volumes of pod {}", pod.key);
    match tokio::time::timeout(limit, volumes_bound(shared, node, plan)).await {
        Ok(result) => result.map_err(|reason| Error::not_yet(step(), reason)),
        Err(_) => Err(Error::not_yet(step(), "binding volumes: context deadline exceeded")),
    }
}

async fn give_volume(shared: &Shared, volume: &str, claim: &ObjectKey) -> Result<()> {
    let (known, wanted) = {
        let state = shared.state.lock();
        let objects = &state.world.objects;
        (objects.volumes.get("", volume).cloned(), objects.claims.get_key(claim).cloned())
    };
    let step = || format!("give volume {volume} to claim {claim}");
    let (Some(known), Some(wanted)) = (known, wanted) else {
        return Err(Error::not_yet(step(), "one of them is gone"));
    };
    let mut volume = PersistentVolume::clone(&known);
    let spec = volume.spec.get_or_insert_default();
    if spec.claim_ref.as_ref().is_some_and(|claim| claim.uid == wanted.metadata.uid) {
        return Ok(());
    }
    let by_us = spec.claim_ref.is_none();
    spec.claim_ref = Some(ObjectReference { field_path: None, ..knarr_client::reference_to(&*wanted) });
    if by_us {
        let annotations = volume.metadata.annotations.get_or_insert_default();
        annotations.insert(BOUND_BY_CONTROLLER.to_owned(), "yes".to_owned());
    }
    let api: Api<PersistentVolume> = Api::all(shared.client.clone());
    let name = volume.metadata.name.clone().unwrap_or_default();
    api.replace(&name, &PostParams::default(), &volume).await.during(step)?;
    Ok(())
}

async fn select_node(shared: &Shared, claim: &ObjectKey, node: &str) -> Result<()> {
    let known = shared.state.lock().world.objects.claims.get_key(claim).cloned();
    let step = || format!("select node {node} for claim {claim}");
    let Some(known) = known else { return Err(Error::not_yet(step(), "it is gone")) };
    if has_selected_node(&known) == Some(node) {
        return Ok(());
    }
    let patch = json!({"metadata": {
        "resourceVersion": known.metadata.resource_version, "annotations": {SELECTED_NODE: node},
    }});
    let api: Api<PersistentVolumeClaim> = Api::namespaced(shared.client.clone(), &claim.namespace);
    api.patch(&claim.name, &PatchParams::default(), &Patch::Merge(patch)).await.during(step)?;
    Ok(())
}

/// Waits until all claims of the plan are bound; an error tells why they will not be.
async fn volumes_bound(shared: &Shared, node: &str, plan: &VolumePlan) -> Result<(), String> {
    let mut marked: HashSet<ObjectKey> = HashSet::new();
    loop {
        let changed = shared.storage_changed.notified();
        tokio::pin!(changed);
        changed.as_mut().enable();
        let pending = {
            let state = shared.state.lock();
            let claims = plan.bind.iter().map(|(_, claim)| (claim, false));
            let claims = claims.chain(plan.provision.iter().map(|claim| (claim, true)));
            let mut pending = false;
            for (key, provisioned) in claims {
                let Some(claim) = state.world.objects.claims.get_key(key) else {
                    return Err(format!(
                        "failed to check provisioning pvc: persistentvolumeclaim {:?} not found",
                        key.name
                    ));
                };
                if is_claim_bound(claim) {
                    continue;
                }
                // The provisioner takes our mark away where it cannot serve the node.
                match has_selected_node(claim) {
                    Some(selected) if provisioned && selected == node => _ = marked.insert(key.clone()),
                    None if !marked.contains(key) => {}
                    _ if provisioned => return Err(format!("provisioning failed for PVC {:?}", key.name)),
                    _ => {}
                }
                pending = true;
            }
            pending
        };
        if !pending {
            return Ok(());
        }
        changed.await;
    }
}

async fn explain_refusal(shared: &Shared, pod: &PodInfo, refusal: &Refusal) {
    if let Some(preemption) = &refusal.preemption {
        let evicted = preemption.victims.iter().map(|victim| evict(shared, pod, victim, preemption));
        if futures::future::join_all(evicted).await.contains(&false) {
            // What is left of them is looked at again.
            shared.update(|state| state.queue.reconsider(&pod.key, Instant::now()));
        }
        for other in &preemption.unpromised {
            let nothing = json!({"status": {"nominatedNodeName": null}});
            patch_status(shared, other, nothing).await;
        }
    }
    let nomination = match &refusal.preemption {
        Some(preemption) => Some(Some(&*preemption.node)),
        None => (refusal.forget_nomination && pod.nominated_node().is_some()).then_some(None),
    };
    explain(shared, pod, "Unschedulable", &refusal.message, nomination).await;
}

/// Ends a pod of lower priority, gracefully, and tells it why.
/// False if it could not be ended.
async fn evict(shared: &Shared, pod: &PodInfo, victim: &PodInfo, preemption: &Preemption) -> bool {
    if victim.is_terminating() {
        return true;
    }
    let message = format!("{}: preempting to accommodate a higher priority pod", pod.scheduler_name());
    let condition = PodCondition {
        type_: "DisruptionTarget".to_owned(),
        status: "True".to_owned(),
        reason: Some("PreemptionByScheduler".to_owned()),
        message: Some(message),
        last_transition_time: Some(shared.clock.time()),
        observed_generation: victim.pod.metadata.generation,
        ..Default::default()
    };
    patch_status(shared, victim, json!({"status": {"conditions": [condition]}})).await;
    let preconditions = Preconditions { uid: victim.pod.metadata.uid.clone(), resource_version: None };
    let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
    let api: Api<Pod> = Api::namespaced(shared.client.clone(), &victim.key.namespace);
    let deleted =
        api.delete(&victim.key.name, &params).await.during(|| format!("preempt pod {}", victim.key));
    match ignore_gone(deleted) {
        Ok(()) => {
            let message = format!("Preempted by pod {} on node {}", pod.uid(), preemption.node);
            shared.recorder(pod).event(&*victim.pod, EventType::Normal, "Preempted", message);
            true
        }
        Err(error) => {
            tracing::warn!(pod = %pod.key, victim = %victim.key, %error, "victim not deleted");
            false
        }
    }
}

async fn patch_status(shared: &Shared, pod: &PodInfo, mut patch: serde_json::Value) {
    patch["metadata"] = json!({"uid": pod.pod.metadata.uid});
    let api: Api<Pod> = Api::namespaced(shared.client.clone(), &pod.key.namespace);
    // Strategic: conditions of others, merged by type, stay.
    let patched = api.patch_status(&pod.key.name, &PatchParams::default(), &Patch::Strategic(patch)).await;
    if let Err(error) = ignore_gone(patched.during(|| format!("write status of pod {}", pod.key))) {
        tracing::debug!(pod = %pod.key, %error, "status not written");
    }
}

/// Tells why the pod has no node: an event and the PodScheduled condition; and the node it waits for, if that changes.
async fn explain(
    shared: &Shared,
    pod: &PodInfo,
    reason: &str,
    message: &str,
    nomination: Option<Option<&str>>,
) {
    shared.recorder(pod).event(&*pod.pod, EventType::Warning, "FailedScheduling", message);
    let condition = condition(shared, &pod.pod, reason, message);
    if condition.is_none() && nomination.is_none() {
        return;
    }
    let mut status = json!({});
    if let Some(condition) = condition {
        status["conditions"] = json!([condition]);
    }
    if let Some(node) = nomination {
        status["nominatedNodeName"] = json!(node);
    }
    patch_status(shared, pod, json!({"status": status})).await;
}

/// `None` when the pod says so already.
fn condition(shared: &Shared, pod: &Pod, reason: &str, message: &str) -> Option<PodCondition> {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    let old = conditions.into_iter().flatten().find(|condition| condition.type_ == "PodScheduled");
    let since = old.filter(|old| old.status == "False").and_then(|old| old.last_transition_time.clone());
    let new = PodCondition {
        type_: "PodScheduled".to_owned(),
        status: "False".to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message.to_owned()),
        last_transition_time: since.or_else(|| Some(shared.clock.time())),
        observed_generation: pod.metadata.generation,
        ..Default::default()
    };
    (old != Some(&new)).then_some(new)
}
