//! ResourceClaims: pods that name a template get a claim of their own; claims whose pods are done are reserved no
//! longer, lose their allocation when nobody is left, and go when they were made for one pod. Upstream's
//! `pkg/controller/resourceclaim`. Allocating is the scheduler's.

use crate::{Context, pods};
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{Pod, PodResourceClaim, PodResourceClaimStatus};
use k8s_openapi::api::resource::v1::{
    ResourceClaim, ResourceClaimConsumerReference, ResourceClaimStatus, ResourceClaimTemplate,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use knarr_client::expectations::Expectations;
use knarr_client::patch::{self, Guard};
use knarr_client::{
    Change, Controller, During, Error, EventType, Informer, ObjectKey, Reconcile, Recorder, Requeue, Result,
    ignore_gone, or_none, owner,
};
use kube::api::{Api, DeleteParams, PostParams, Preconditions};
use serde_json::json;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// Says for which of its pod's claims a claim was made.
const ANNOTATION: &str = "resource.kubernetes.io/pod-claim-name";
const FINALIZER: &str = "resource.kubernetes.io/delete-protection";
/// Pods that may share a claim at most. Upstream's limit.
const RESERVED_MAX: usize = 256;
/// Letters of a generated name before the random ones.
const BASE_LEN_MAX: usize = 57;

pub fn start(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let (all_pods, claims) = (context.informers.get::<Pod>(), context.informers.get::<ResourceClaim>());
    let templates = context.informers.get::<ResourceClaimTemplate>();
    pods::index_by_controller(&claims);
    let this = Arc::new(Claiming {
        recorder: context.recorder.for_component("resource_claim"),
        pods: all_pods.clone(),
        claims: claims.clone(),
        templates: templates.clone(),
        expectations: Expectations::new(),
        context,
    });
    let (observer, known) = (this.clone(), all_pods.clone());
    let controller = Controller::new("resourceclaim")
        .watch_map(
            &all_pods,
            |pod| if claims_of(pod).is_empty() { Vec::new() } else { vec![ObjectKey::of(pod)] },
        )
        .watch_changes(&claims, move |change| observer.claim_changed(change))
        .watch_map(&templates, move |template| {
            let namespace = template.metadata.namespace.as_deref().unwrap_or_default();
            let uses = |pod: &&Arc<Pod>| {
                claims_of(pod).iter().any(|one| one.resource_claim_template_name == template.metadata.name)
            };
            known.list_in(namespace).iter().filter(uses).map(|pod| ObjectKey::of(&**pod)).collect()
        });
    Box::pin(controller.run(this, shutdown))
}

pub fn start_cleaning(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let (all_pods, claims) = (context.informers.get::<Pod>(), context.informers.get::<ResourceClaim>());
    let controller =
        Controller::new("resourceclaim-cleaner").watch(&claims).watch_changes(&all_pods, |change| {
            let pod = change.object();
            if !change.is_deleted() && !is_done(pod) {
                return Vec::new();
            }
            let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
            let names = claims_of(pod).iter().filter_map(|one| name_of(pod, one));
            names.map(|name| ObjectKey::new(namespace, name)).collect()
        });
    Box::pin(controller.run(Arc::new(Cleaning { context, pods: all_pods, claims }), shutdown))
}

fn claims_of(pod: &Pod) -> &[PodResourceClaim] {
    pod.spec.as_ref().and_then(|spec| spec.resource_claims.as_deref()).unwrap_or_default()
}

/// The name of the claim a pod's claim stands for, as far as there is one.
fn name_of(pod: &Pod, claim: &PodResourceClaim) -> Option<String> {
    let statuses = pod.status.iter().flat_map(|status| status.resource_claim_statuses.iter().flatten());
    let made = statuses.into_iter().find(|status| status.name == claim.name);
    claim.resource_claim_name.clone().or_else(|| made?.resource_claim_name.clone())
}

/// None of its containers runs or ever will.
fn is_done(pod: &Pod) -> bool {
    pods::is_finished(pod) || (pods::is_terminating(pod) && pods::node_of(pod).is_none())
}

struct Claiming {
    context: Context,
    recorder: Recorder,
    pods: Informer<Pod>,
    claims: Informer<ResourceClaim>,
    templates: Informer<ResourceClaimTemplate>,
    expectations: Expectations,
}

impl Reconcile for Claiming {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let Some(pod) = self.pods.get_key(&key) else {
            self.expectations.forget(&key);
            return Ok(Requeue::Done);
        };
        if pods::is_terminating(&pod) || is_done(&pod) {
            return Ok(Requeue::Done);
        }
        if let Some(wait) = self.expectations.pending(&key) {
            return Ok(Requeue::After(wait));
        }
        let mut statuses = pod.status.as_ref().and_then(|status| status.resource_claim_statuses.clone());
        let before = statuses.clone();
        for claim in claims_of(&pod) {
            let made = self.make(&key, &pod, claim).await.inspect_err(|error| {
                let message = format!("PodResourceClaim {}: {}", claim.name, pods::message_of(error));
                self.recorder.event(&*pod, EventType::Warning, "FailedResourceClaimCreation", message);
            })?;
            if let Some(made) = made {
                let list = statuses.get_or_insert_default();
                list.retain(|status| status.name != claim.name);
                let name = claim.name.clone();
                list.push(PodResourceClaimStatus { name, resource_claim_name: Some(made) });
            }
        }
        if statuses != before {
            let change = json!({
                "metadata": {"uid": pod.metadata.uid, "resourceVersion": pod.metadata.resource_version},
                "status": {"resourceClaimStatuses": statuses},
            });
            let api: Api<Pod> = Api::namespaced(self.context.client.clone(), &key.namespace);
            let patched =
                api.patch_status(&key.name, &Default::default(), &kube::api::Patch::Merge(change)).await;
            ignore_gone(patched.during(|| format!("write claims of pod {key}")))?;
            return Ok(Requeue::Done);
        }
        if pods::node_of(&pod).is_some() {
            self.reserve(&pod).await?;
        }
        Ok(Requeue::Done)
    }
}

impl Claiming {
    /// Which pods a claim's change concerns: its owner, and those it is reserved for.
    fn claim_changed(&self, change: &Change<ResourceClaim>) -> Vec<ObjectKey> {
        let claim = change.object();
        let Some(key) = owner::controller_key::<Pod>(&claim.metadata) else { return Vec::new() };
        self.expectations.creation_seen(&key, pods::uid(&claim.metadata));
        vec![key]
    }

    /// Sees to it that a pod's claim exists. Its name, if that is not in the pod's status yet.
    async fn make(&self, key: &ObjectKey, pod: &Pod, wanted: &PodResourceClaim) -> Result<Option<String>> {
        let Some(template) = &wanted.resource_claim_template_name else { return Ok(None) };
        let own = self.claims.by_index(pods::BY_CONTROLLER, pods::uid(&pod.metadata));
        if let Some(name) = name_of(pod, wanted)
            && own.iter().any(|claim| claim.metadata.name.as_ref() == Some(&name))
        {
            return Ok(None);
        }
        // One that was made but not yet told of.
        let of_claim = |claim: &&Arc<ResourceClaim>| {
            let annotations = claim.metadata.annotations.as_ref();
            annotations.and_then(|all| all.get(ANNOTATION)) == Some(&wanted.name)
                && claim.metadata.deletion_timestamp.is_none()
        };
        if let Some(claim) = own.iter().find(of_claim) {
            return Ok(claim.metadata.name.clone());
        }
        let Some(template) = self.templates.get(&key.namespace, template) else {
            let reason = format!("resourceclaimtemplate.resource.k8s.io {template:?} not found");
            return Err(Error::not_yet(format!("resource claim template {template:?}"), reason));
        };
        let claim = ResourceClaim {
            metadata: metadata(pod, wanted, &template),
            spec: template.spec.spec.clone(),
            status: None,
        };
        let api: Api<ResourceClaim> = Api::namespaced(self.context.client.clone(), &key.namespace);
        let created = api.create(&PostParams::default(), &claim).await;
        let created = created.during(|| format!("create ResourceClaim for pod {key}"))?;
        let cached = || self.claims.get_key(&ObjectKey::of(&created)).is_some();
        self.expectations.created(key, pods::uid(&created.metadata), cached);
        Ok(created.metadata.name)
    }

    /// Reserves allocated claims for a pod that came to its node without the scheduler.
    async fn reserve(&self, pod: &Pod) -> Result<()> {
        let key = ObjectKey::of(pod);
        for name in claims_of(pod).iter().filter_map(|claim| name_of(pod, claim)) {
            let Some(claim) = self.claims.get(&key.namespace, &name) else { continue };
            let mut status = claim.status.clone().unwrap_or_default();
            let reserved = status.reserved_for.get_or_insert_default();
            let uid = pods::uid(&pod.metadata);
            let held = reserved.iter().any(|one| one.uid == uid);
            if held || reserved.len() >= RESERVED_MAX || status.allocation.is_none() {
                continue;
            }
            reserved.push(ResourceClaimConsumerReference {
                api_group: None,
                resource: "pods".to_owned(),
                name: key.name.clone(),
                uid: uid.to_owned(),
            });
            let api: Api<ResourceClaim> = Api::namespaced(self.context.client.clone(), &key.namespace);
            ignore_gone(patch::write_status(&api, &*claim, &claim.status, &status, Guard::Version).await)?;
        }
        Ok(())
    }
}

fn metadata(pod: &Pod, wanted: &PodResourceClaim, template: &ResourceClaimTemplate) -> ObjectMeta {
    let given = template.spec.metadata.clone().unwrap_or_default();
    let mut annotations = given.annotations.unwrap_or_default();
    annotations.insert(ANNOTATION.to_owned(), wanted.name.clone());
    let mut reference = owner::controller_ref(pod);
    reference.block_owner_deletion = Some(true);
    ObjectMeta {
        generate_name: Some(generated(pod.metadata.name.as_deref().unwrap_or_default(), &wanted.name)),
        namespace: pod.metadata.namespace.clone(),
        labels: given.labels,
        annotations: Some(annotations),
        owner_references: Some(vec![reference]),
        ..Default::default()
    }
}

/// `pod-claim-`, both shortened alike when that is too long.
fn generated(pod: &str, claim: &str) -> String {
    let whole = format!("{pod}-{claim}-");
    if whole.len() <= BASE_LEN_MAX {
        return whole;
    }
    let part = |text: &str| text[..text.len() * BASE_LEN_MAX / whole.len()].to_owned();
    format!("{}-{}", part(pod), part(claim))
}

struct Cleaning {
    context: Context,
    pods: Informer<Pod>,
    claims: Informer<ResourceClaim>,
}

impl Reconcile for Cleaning {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let Some(claim) = self.claims.get_key(&key) else { return Ok(Requeue::Done) };
        let status = claim.status.clone().unwrap_or_default();
        let reserved = status.reserved_for.clone().unwrap_or_default();
        let mut valid = Vec::new();
        for consumer in &reserved {
            if self.still_uses(&key, consumer).await? {
                valid.push(consumer.clone());
            }
        }
        let deleted = claim.metadata.deletion_timestamp.is_some();
        let unused = valid.is_empty();
        if valid.len() < reserved.len() || (deleted && unused) {
            self.release(&key, &claim, status, valid).await?;
        }
        if unused && !deleted {
            self.delete_unneeded(&key, &claim).await?;
        }
        Ok(Requeue::Done)
    }
}

impl Cleaning {
    /// A pod the cache does not show is asked for: the scheduler may be ahead of us.
    async fn still_uses(&self, key: &ObjectKey, consumer: &ResourceClaimConsumerReference) -> Result<bool> {
        if consumer.resource != "pods" || consumer.api_group.as_ref().is_some_and(|group| !group.is_empty()) {
            let step = format!("check who uses claim {key}");
            return Err(Error::terminal(step, format!("unsupported ReservedFor entry: {consumer:?}")));
        }
        let same = |pod: &Pod| pod.metadata.uid.as_deref() == Some(consumer.uid.as_str());
        if let Some(pod) = self.pods.get(&key.namespace, &consumer.name) {
            return Ok(same(&pod) && !is_done(&pod));
        }
        let api: Api<Pod> = Api::namespaced(self.context.client.clone(), &key.namespace);
        let live = or_none(api.get(&consumer.name).await.during(|| format!("read pod {}", consumer.name)))?;
        Ok(live.is_some_and(|pod| same(&pod)))
    }

    /// Ends reservations. With the last one the allocation goes, so that the claim can be allocated anew, and with that
    /// the protection against deletion.
    async fn release(
        &self,
        key: &ObjectKey,
        claim: &ResourceClaim,
        before: ResourceClaimStatus,
        valid: Vec<ResourceClaimConsumerReference>,
    ) -> Result<()> {
        let protected = claim.metadata.finalizers.iter().flatten().any(|one| one == FINALIZER);
        let mut status = ResourceClaimStatus { reserved_for: Some(valid), ..before };
        if status.reserved_for.as_ref().is_some_and(Vec::is_empty) {
            status.reserved_for = None;
            if protected {
                status.allocation = None;
                status.devices = None;
            }
        }
        let free = status.allocation.is_none() && status.reserved_for.is_none();
        let api: Api<ResourceClaim> = Api::namespaced(self.context.client.clone(), &key.namespace);
        let written = patch::write_status(&api, claim, &claim.status, &status, Guard::Version).await;
        let written = match written {
            Err(error) if error.is_not_found() => return Ok(()),
            written => written?,
        };
        if free && protected {
            patch::remove_finalizer(&api, written.as_ref().unwrap_or(claim), FINALIZER).await?;
        }
        Ok(())
    }

    /// A claim made for one pod goes with it, though the pod itself may stay for a while.
    async fn delete_unneeded(&self, key: &ObjectKey, claim: &ResourceClaim) -> Result<()> {
        let Some(reference) = owner::controller_of(&claim.metadata).filter(|owner| owner.kind == "Pod")
        else {
            return Ok(());
        };
        // A pod that is not known may just not be known yet; one that is gone is the garbage collector's.
        let Some(pod) = self.pods.get(&key.namespace, &reference.name) else { return Ok(()) };
        if pod.metadata.uid.as_ref() == Some(&reference.uid) && !is_done(&pod) {
            return Ok(());
        }
        let params = DeleteParams {
            preconditions: Some(Preconditions { uid: claim.metadata.uid.clone(), resource_version: None }),
            ..Default::default()
        };
        let api: Api<ResourceClaim> = Api::namespaced(self.context.client.clone(), &key.namespace);
        ignore_gone(api.delete(&key.name, &params).await.during(|| format!("delete claim {key}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::{Harness, NAMESPACE};
    use k8s_openapi::api::core::v1::Event;
    use knarr_client::testing::Faults;

    async fn template(harness: &Harness) {
        let template = json!({
            "metadata": {"name": "gpu"},
            "spec": {"metadata": {"labels": {"team": "a"}}, "spec": {"devices": {"requests": [{"name": "one"}]}}},
        });
        harness.create::<ResourceClaimTemplate>(template).await;
    }

    async fn pod(harness: &Harness, name: &str) -> Pod {
        let claims = json!([
            {"name": "gpu", "resourceClaimTemplateName": "gpu"}, {"name": "shared", "resourceClaimName": "shared"},
        ]);
        harness
            .create::<Pod>(
                json!({"metadata": {"name": name}, "spec": {"containers": [], "resourceClaims": claims}}),
            )
            .await
    }

    fn told(pods: &[Pod], name: &str) -> Option<String> {
        let pod = pods.iter().find(|pod| pod.metadata.name.as_deref() == Some(name))?;
        name_of(pod, &claims_of(pod)[0])
    }

    /// As the scheduler would.
    async fn allocate(harness: &Harness, claim: &str, pod: &Pod) {
        let finalizers = json!({"metadata": {"finalizers": [FINALIZER]}});
        harness.patch::<ResourceClaim>(claim, finalizers).await;
        let consumer = json!({"resource": "pods", "name": pod.metadata.name, "uid": pod.metadata.uid});
        let status = json!({"allocation": {"devices": {"results": []}}, "reservedFor": [consumer]});
        harness.patch_status::<ResourceClaim>(claim, status).await;
    }

    #[tokio::test(start_paused = true)]
    async fn every_pod_gets_one_claim_of_its_own_whatever_goes_wrong() {
        for seed in 0..4 {
            let faults = Faults { conflict: 0.3, error: 0.3, drop_watch: 0.2, duplicate: 0.3 };
            let harness = Harness::new(seed, faults);
            harness.start(start);
            template(&harness).await;
            for name in ["a", "b"] {
                pod(&harness, name).await;
            }
            let all = |pods: &[Pod]| told(pods, "a").is_some() && told(pods, "b").is_some();
            let pods = harness.api.wait_for::<Pod>("the claims' names", all).await;
            harness.api.set_faults(Faults::default());
            harness.assert_quiet().await;
            let claims = harness.api.objects::<ResourceClaim>();
            assert_eq!(claims.len(), 2, "one each");
            let name = told(&pods, "a").unwrap();
            let claim = claims.iter().find(|claim| claim.metadata.name.as_ref() == Some(&name)).unwrap();
            assert!(name.starts_with("a-gpu-"));
            assert_eq!(claim.metadata.labels.as_ref().unwrap()["team"], "a");
            assert_eq!(claim.metadata.annotations.as_ref().unwrap()[ANNOTATION], "gpu");
            // One that is deleted by hand is made again.
            harness.delete::<ResourceClaim>(&name).await;
            let other = |pods: &[Pod]| told(pods, "a").is_some_and(|now| now != name);
            harness.api.wait_for::<Pod>("another claim", other).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_missing_template_is_told_and_awaited() {
        let harness = Harness::quiet();
        harness.start(start);
        pod(&harness, "a").await;
        let event = |events: &[Event]| {
            events.iter().any(|event| event.reason.as_deref() == Some("FailedResourceClaimCreation"))
        };
        harness.api.wait_for::<Event>("the event", event).await;
        tokio::time::sleep(std::time::Duration::from_secs(3600)).await;
        template(&harness).await;
        let began = tokio::time::Instant::now();
        harness.api.wait_for::<Pod>("the claim", |pods| told(pods, "a").is_some()).await;
        assert!(began.elapsed().as_secs() < 1, "at once, not after the back-off");
    }

    #[tokio::test(start_paused = true)]
    async fn claims_of_pods_that_are_done_are_released_and_go() {
        let harness = Harness::quiet();
        harness.start(start);
        harness.start(start_cleaning);
        template(&harness).await;
        harness.create::<ResourceClaim>(json!({"metadata": {"name": "shared"}, "spec": {}})).await;
        let first = pod(&harness, "a").await;
        let pods = harness.api.wait_for::<Pod>("the claim", |pods| told(pods, "a").is_some()).await;
        let own = told(&pods, "a").unwrap();
        allocate(&harness, &own, &first).await;
        allocate(&harness, "shared", &first).await;
        harness.assert_quiet().await;
        assert_eq!(harness.api.objects::<ResourceClaim>().len(), 2, "both in use");
        harness.patch_status::<Pod>("a", json!({"phase": "Succeeded"})).await;
        let free = |claims: &[ResourceClaim]| {
            claims.len() == 1
                && claims[0].metadata.name.as_deref() == Some("shared")
                && claims[0].metadata.finalizers.is_none()
                && claims[0].status.clone().unwrap_or_default() == ResourceClaimStatus::default()
        };
        harness.api.wait_for::<ResourceClaim>("only the shared one, free", free).await;
        harness.assert_quiet().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_claim_is_held_as_long_as_one_pod_uses_it_and_reserved_for_pods_bound_by_hand() {
        let harness = Harness::quiet();
        harness.start(start);
        harness.start(start_cleaning);
        template(&harness).await;
        harness.create::<ResourceClaim>(json!({"metadata": {"name": "shared"}, "spec": {}})).await;
        let first = pod(&harness, "a").await;
        pod(&harness, "b").await;
        allocate(&harness, "shared", &first).await;
        harness.patch::<Pod>("b", json!({"spec": {"nodeName": "n1"}})).await;
        let users = |count: usize| {
            move |claims: &[ResourceClaim]| {
                let shared = claims.iter().find(|claim| claim.metadata.name.as_deref() == Some("shared"));
                let status = shared.and_then(|claim| claim.status.clone()).unwrap_or_default();
                status.reserved_for.unwrap_or_default().len() == count && status.allocation.is_some()
            }
        };
        harness.api.wait_for::<ResourceClaim>("both", users(2)).await;
        harness.delete::<Pod>("a").await;
        harness.api.wait_for::<ResourceClaim>("one left", users(1)).await;
        assert_eq!(first.metadata.namespace.as_deref(), Some(NAMESPACE));
    }

    #[test]
    fn long_names_are_shortened_alike() {
        assert_eq!(generated("web", "gpu"), "web-gpu-");
        let long = generated(&"p".repeat(60), &"c".repeat(20));
        assert!(long.len() <= BASE_LEN_MAX && long.contains("-cc"), "{long}");
    }
}
