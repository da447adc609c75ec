//! HorizontalPodAutoscaler: brings the number of replicas of anything with a scale in line with metrics. Upstream's
//! `pkg/controller/podautoscaler`. What a metric asks for is [`calculator`]'s, what becomes of it [`behavior`]'s; where
//! metrics come from is [`metrics`]'s.
//!
//! An autoscaler is looked at when it is made or its spec changes, and every [`PERIOD`] from then on: metrics send no
//! events. Without autoscalers there is no timer.

mod behavior;
mod calculator;
mod metrics;
mod target;

use crate::{Context, util};
use behavior::{History, Outcome, Verdict, minimum};
use calculator::{Ground, Proposal, Tolerance, millis};
use futures::future::BoxFuture;
use k8s_openapi::api::autoscaling::v1::Scale;
use k8s_openapi::api::autoscaling::v2::{
    ContainerResourceMetricStatus, ExternalMetricSource, ExternalMetricStatus, HPAScalingRules,
    HorizontalPodAutoscaler, HorizontalPodAutoscalerCondition, HorizontalPodAutoscalerSpec,
    HorizontalPodAutoscalerStatus, MetricSpec, MetricStatus, MetricTarget, MetricValueStatus,
    ObjectMetricSource, ObjectMetricStatus, PodsMetricSource, PodsMetricStatus, ResourceMetricSource,
    ResourceMetricStatus,
};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use knarr_client::patch::{self, Guard};
use knarr_client::selector::Selector;
use knarr_client::{
    Change, Controller, EventType, Informer, ObjectKey, Reconcile, Recorder, Requeue, Result, ignore_gone,
};
use kube::api::Api;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Between two looks at an autoscaler. Upstream's default.
const PERIOD: Duration = Duration::from_secs(15);
/// How far a ratio may be from one without an effect. Upstream's default.
const TOLERANCE: f64 = 0.1;
/// What an autoscaler without metrics looks at: the CPU, in percent of the request. Upstream's default.
const CPU_TARGET: i32 = 80;

pub fn start(context: Context, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
    let autoscalers = context.informers.get::<HorizontalPodAutoscaler>();
    let pods = context.informers.get::<Pod>();
    let controller = Controller::new("horizontal-pod-autoscaling")
        .watch_changes(&autoscalers, |change| match change {
            // Our own status is no news.
            Change::Updated { old, new } if old.spec == new.spec => Vec::new(),
            change => vec![ObjectKey::of(&**change.object())],
        })
        .needs(&pods);
    let recorder = context.recorder.for_component("horizontal-pod-autoscaler");
    let this = Autoscaling { context, recorder, autoscalers, pods, memories: Mutex::default() };
    Box::pin(controller.run(Arc::new(this), shutdown))
}

struct Autoscaling {
    context: Context,
    recorder: Recorder,
    autoscalers: Informer<HorizontalPodAutoscaler>,
    pods: Informer<Pod>,
    memories: Mutex<BTreeMap<ObjectKey, Memory>>,
}

/// What is remembered of an autoscaler between two looks.
#[derive(Default)]
struct Memory {
    history: History,
    /// Which pods its target has, so that two autoscalers over the same pods notice each other.
    selector: Option<Selector>,
}

impl Reconcile for Autoscaling {
    async fn reconcile(&self, key: ObjectKey) -> Result<Requeue> {
        let Some(autoscaler) = self.autoscalers.get_key(&key) else {
            self.memories.lock().remove(&key);
            return Ok(Requeue::Done);
        };
        let before = autoscaler.status.clone();
        let mut turn = Turn {
            this: self,
            autoscaler: &autoscaler,
            spec: &autoscaler.spec,
            key: &key,
            status: before.clone().unwrap_or_default(),
        };
        if let Err(reason) = turn.run().await {
            tracing::debug!(autoscaler = %key, reason, "not scaled");
        }
        let api: Api<HorizontalPodAutoscaler> = Api::namespaced(self.context.client.clone(), &key.namespace);
        let written = patch::write_status(&api, &*autoscaler, &before, &turn.status, Guard::Uid).await;
        if let Err(error) = ignore_gone(written) {
            self.recorder.event(&*autoscaler, EventType::Warning, "FailedUpdateStatus", error.to_string());
        }
        Ok(Requeue::After(PERIOD))
    }
}

/// One look at one autoscaler; what it finds ends up in `status`.
struct Turn<'a> {
    this: &'a Autoscaling,
    autoscaler: &'a HorizontalPodAutoscaler,
    spec: &'a HorizontalPodAutoscalerSpec,
    key: &'a ObjectKey,
    status: HorizontalPodAutoscalerStatus,
}

/// What the metrics ask for together.
struct Asked {
    replicas: i32,
    /// Which of them asks for that many.
    metric: String,
    /// Others that could not be read.
    trouble: Option<String>,
}

/// What one metric asks for, its name in messages, and its value.
type Answer = (i32, String, MetricStatus);

/// Why a metric says nothing: `reason` and `why` for condition and event, `error` for the whole.
struct Failure {
    reason: &'static str,
    why: String,
    error: String,
}

impl Turn<'_> {
    async fn run(&mut self) -> Result<(), String> {
        let (client, namespace) = (self.this.context.client.clone(), self.key.namespace.as_str());
        let reference = &self.spec.scale_target_ref;
        let found = async {
            let mapped = target::mapped(&client, reference).await?;
            let scale = target::scale(&client, namespace, &mapped, &reference.name).await?;
            Ok::<_, String>((mapped, scale))
        };
        let (mapped, mut scale) = match found.await {
            Ok(found) => found,
            Err(why) => {
                self.warn("FailedGetScale", why.clone());
                let message =
                    format!("the HPA controller was unable to get the target's current scale: {why}");
                self.condition("AbleToScale", false, "FailedGetScale", message);
                return Err(why);
            }
        };
        let able = "the HPA controller was able to get the target's current scale";
        self.condition("AbleToScale", true, "SucceededGetScale", able);
        let current = scale.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(0);
        let now = self.this.context.clock.now();
        self.this.memories.lock().entry(self.key.clone()).or_default().history.begin(current, now);
        let (desired, why, trouble) = self.decide(&scale, current).await?;
        if desired != current {
            scale.spec.get_or_insert_default().replicas = Some(desired);
            if let Err(error) = target::rescale(&client, namespace, &mapped, &scale).await {
                let message = format!("New size: {desired}; reason: {why}; error: {error}");
                self.warn("FailedRescale", message);
                let message = format!("the HPA controller was unable to update the target scale: {error}");
                self.condition("AbleToScale", false, "FailedUpdateScale", message);
                self.status.current_replicas = Some(current);
                return Err(error);
            }
            self.rescaled(current, desired, &why);
        }
        self.status.current_replicas = Some(current);
        self.status.desired_replicas = desired;
        trouble.map_or(Ok(()), Err)
    }

    /// How many replicas there shall be, why, and what was not to be read on the way.
    async fn decide(&mut self, scale: &Scale, current: i32) -> Result<(i32, String, Option<String>), String> {
        let (least, most) = (minimum(self.spec), self.spec.max_replicas);
        let fixed = if current == 0 && least != 0 {
            let message = "scaling is disabled since the replica count of the target is zero";
            self.condition("ScalingActive", false, "ScalingDisabled", message);
            Some((0, ""))
        } else if current > most {
            Some((most, "Current number of replicas above Spec.MaxReplicas"))
        } else if current < least {
            Some((least, "Current number of replicas below Spec.MinReplicas"))
        } else {
            None
        };
        if let Some((desired, why)) = fixed {
            self.status.current_metrics = None;
            return Ok((desired, why.to_owned(), None));
        }
        let asked = match self.ask(scale, current).await {
            Ok(asked) => asked,
            Err(error) => {
                self.status.current_replicas = Some(current);
                self.warn("FailedComputeMetricsReplicas", error.clone());
                return Err(error);
            }
        };
        let why = if asked.replicas > current {
            format!("{} above target", asked.metric)
        } else {
            "All metrics below target".to_owned()
        };
        let outcome = self.settle(current, asked.replicas);
        Ok((outcome.replicas, why, asked.trouble))
    }

    fn settle(&mut self, current: i32, wanted: i32) -> Outcome {
        let now = self.this.context.clock.now();
        let outcome = {
            let mut memories = self.this.memories.lock();
            let memory = memories.entry(self.key.clone()).or_default();
            memory.history.settle(self.spec, current, wanted, now)
        };
        for (type_, verdict) in [("AbleToScale", outcome.able), ("ScalingLimited", outcome.limited)] {
            let Verdict { status, reason, message } = verdict;
            self.condition(type_, status, reason, message);
        }
        outcome
    }

    fn rescaled(&mut self, from: i32, to: i32, why: &str) {
        let clock = &self.this.context.clock;
        let message = format!("the HPA controller was able to update the target scale to {to}");
        self.condition("AbleToScale", true, "SucceededRescale", message);
        let message = format!("New size: {to}; reason: {why}");
        self.this.recorder.event(self.autoscaler, EventType::Normal, "SuccessfulRescale", message);
        let mut memories = self.this.memories.lock();
        let memory = memories.entry(self.key.clone()).or_default();
        memory.history.scaled(self.spec, from, to, clock.now());
        self.status.last_scale_time = Some(clock.time());
        tracing::info!(autoscaler = %self.key, from, to, why, "rescaled");
    }

    /// Asks every metric; the highest answer counts. A metric that cannot be read must not let the number go down.
    async fn ask(&mut self, scale: &Scale, current: i32) -> Result<Asked, String> {
        let (text, pods) = self.pods_of(scale)?;
        let observed = scale.status.as_ref().map_or(0, |status| status.replicas);
        let default = [cpu_metric()];
        let specs = self.spec.metrics.as_deref().filter(|specs| !specs.is_empty()).unwrap_or(&default);
        let ground = Ground {
            pods: &pods,
            current,
            tolerance: tolerance(self.spec),
            now: self.this.context.clock.now(),
        };
        let (mut best, mut statuses) = (None::<(i32, String)>, Vec::new());
        let (mut failed, mut first) = (0, None);
        for spec in specs {
            match self.ask_one(spec, &text, observed, &ground).await {
                Ok((replicas, metric, status)) => {
                    statuses.push(status);
                    if best.as_ref().is_none_or(|(most, _)| *most == 0 || replicas > *most) {
                        best = Some((replicas, metric));
                    }
                }
                Err(failure) => {
                    self.warn(failure.reason, failure.why.clone());
                    // A metric keeps its place in the list.
                    statuses.push(MetricStatus::default());
                    failed += 1;
                    first.get_or_insert(failure);
                }
            }
        }
        self.status.current_metrics = Some(statuses);
        let trouble = first.as_ref().map(|first| {
            format!(
                "invalid metrics ({failed} invalid out of {}), first error is: {}",
                specs.len(),
                first.error
            )
        });
        let useful = best.filter(|(replicas, _)| failed == 0 || *replicas >= current);
        match (useful, first) {
            (Some((replicas, metric)), _) => {
                let message =
                    format!("the HPA was able to successfully calculate a replica count from {metric}");
                self.condition("ScalingActive", true, "ValidMetricFound", message);
                Ok(Asked { replicas, metric, trouble })
            }
            (None, first) => {
                if let Some(Failure { reason, why, .. }) = first {
                    let message = format!("the HPA was unable to compute the replica count: {why}");
                    self.condition("ScalingActive", false, reason, message);
                }
                Err(trouble.unwrap_or_default())
            }
        }
    }

    /// The target's selector and pods, if they are the target's alone.
    fn pods_of(&mut self, scale: &Scale) -> Result<(String, Vec<Arc<Pod>>), String> {
        let text = scale.status.as_ref().and_then(|status| status.selector.clone()).unwrap_or_default();
        if text.is_empty() {
            let error = "selector is required".to_owned();
            self.warn("SelectorRequired", error.clone());
            let message = "the HPA target's scale is missing a selector";
            self.condition("ScalingActive", false, "InvalidSelector", message);
            return Err(error);
        }
        let selector = target::selector(&text).map_err(|error| {
            let error =
                format!("couldn't convert selector into a corresponding internal selector object: {error}");
            self.warn("InvalidSelector", error.clone());
            self.condition("ScalingActive", false, "InvalidSelector", error.clone());
            error
        })?;
        let mut pods = self.this.pods.list_in(&self.key.namespace);
        pods.retain(|pod| selector.matches(pod.metadata.labels.as_ref()));
        let rivals = self.rivals(selector, &pods);
        if rivals.len() > 1 {
            let rivals: Vec<_> =
                rivals.iter().map(|key| format!("{{{} {}}}", key.name, key.namespace)).collect();
            let error =
                format!("pods by selector {text} are controlled by multiple HPAs: [{}]", rivals.join(" "));
            self.warn("AmbiguousSelector", error.clone());
            self.condition("ScalingActive", false, "AmbiguousSelector", error.clone());
            return Err(error);
        }
        Ok((text, pods))
    }

    /// All autoscalers, this one among them, that any of the pods belongs to.
    fn rivals(&self, selector: Selector, pods: &[Arc<Pod>]) -> BTreeSet<ObjectKey> {
        let mut memories = self.this.memories.lock();
        memories.entry(self.key.clone()).or_default().selector = Some(selector);
        let over =
            |selector: &Selector| pods.iter().any(|pod| selector.matches(pod.metadata.labels.as_ref()));
        memories
            .iter()
            .filter(|(key, _)| key.namespace == self.key.namespace)
            .filter(|(_, memory)| memory.selector.as_ref().is_some_and(over))
            .map(|(key, _)| key.clone())
            .collect()
    }

    async fn ask_one(
        &self,
        spec: &MetricSpec,
        selector: &str,
        observed: i32,
        ground: &Ground<'_>,
    ) -> Result<Answer, Failure> {
        match (spec.type_.as_str(), spec) {
            ("Resource", MetricSpec { resource: Some(source), .. }) => {
                let ResourceMetricSource { name, target } = source;
                let asked = self.of_resource(name, None, target, selector, ground).await;
                asked.map_err(|why| Failure {
                    reason: "FailedGetResourceMetric",
                    error: format!("failed to get {name} resource metric value: {why}"),
                    why,
                })
            }
            ("ContainerResource", MetricSpec { container_resource: Some(source), .. }) => {
                let (name, container) = (&source.name, Some(source.container.as_str()));
                let asked = self.of_resource(name, container, &source.target, selector, ground).await;
                asked.map_err(|why| Failure {
                    reason: "FailedGetContainerResourceMetric",
                    error: format!("failed to get {name} container metric value: {why}"),
                    why,
                })
            }
            ("Pods", MetricSpec { pods: Some(source), .. }) => {
                self.of_pods(source, selector, ground).await.map_err(|why| Failure {
                    reason: "FailedGetPodsMetric",
                    error: format!("failed to get pods metric value: {why}"),
                    why,
                })
            }
            ("Object", MetricSpec { object: Some(source), .. }) => {
                self.of_object(source, observed, ground).await.map_err(|why| Failure {
                    reason: "FailedGetObjectMetric",
                    error: format!("failed to get object metric value: {why}"),
                    why,
                })
            }
            ("External", MetricSpec { external: Some(source), .. }) => {
                let name = &source.metric.name;
                self.of_outside(source, observed, ground).await.map_err(|why| Failure {
                    reason: "FailedGetExternalMetric",
                    error: format!("failed to get {name} external metric value: {why}"),
                    why,
                })
            }
            (other, _) => {
                let why = format!("unknown metric source type {other:?}");
                Err(Failure { reason: "InvalidMetricSourceType", error: why.clone(), why })
            }
        }
    }

    async fn of_resource(
        &self,
        name: &str,
        container: Option<&str>,
        target: &MetricTarget,
        selector: &str,
        ground: &Ground<'_>,
    ) -> Result<Answer, String> {
        let (client, namespace) = (&self.this.context.client, &self.key.namespace);
        let samples = || async {
            let samples = metrics::of_resource(client, namespace, selector, name, container).await;
            samples.map_err(|error| format!("unable to get metrics for resource {name}: {error}"))
        };
        let (proposal, shown) = if let Some(wanted) = &target.average_value {
            let proposal = samples()
                .await
                .and_then(|samples| calculator::of_mean(ground, samples, name, millis(&wanted.0)));
            let proposal = proposal.map_err(|error| format!("failed to get {name} usage: {error}"))?;
            let shown = if container.is_some() { "container resource" } else { "resource" };
            (proposal, format!("{name} {shown}"))
        } else if let Some(wanted) = target.average_utilization {
            let proposal = samples()
                .await
                .and_then(|samples| calculator::of_utilization(ground, samples, name, container, wanted));
            let proposal = proposal.map_err(|error| format!("failed to get {name} utilization: {error}"))?;
            let shown = if container.is_some() { "container resource" } else { "resource" };
            (proposal, format!("{name} {shown} utilization (percentage of request)"))
        } else {
            return Err(
                "invalid resource metric source: neither an average utilization target nor an average \
                        value (usage) target was set"
                    .to_owned(),
            );
        };
        let current = MetricValueStatus {
            average_utilization: proposal.utilization,
            average_value: Some(quantity(proposal.mean)),
            value: None,
        };
        let name = name.to_owned();
        let status = match container {
            None => MetricStatus {
                type_: "Resource".to_owned(),
                resource: Some(ResourceMetricStatus { name, current }),
                ..Default::default()
            },
            Some(container) => MetricStatus {
                type_: "ContainerResource".to_owned(),
                container_resource: Some(ContainerResourceMetricStatus {
                    name,
                    container: container.to_owned(),
                    current,
                }),
                ..Default::default()
            },
        };
        Ok((proposal.replicas, shown, status))
    }

    async fn of_pods(
        &self,
        source: &PodsMetricSource,
        selector: &str,
        ground: &Ground<'_>,
    ) -> Result<Answer, String> {
        let (client, namespace, name) = (&self.this.context.client, &self.key.namespace, &source.metric.name);
        let metric_selector = metrics::query_form(source.metric.selector.as_ref());
        let samples = metrics::of_pods(client, namespace, selector, name, &metric_selector).await;
        let samples = samples.map_err(|error| format!("unable to get metric {name}: {error}"))?;
        let wanted = source.target.average_value.as_ref().map_or(0, |wanted| millis(&wanted.0));
        let proposal = calculator::of_mean(ground, samples, "", wanted)?;
        let current =
            MetricValueStatus { average_value: Some(quantity(proposal.mean)), ..Default::default() };
        let status = MetricStatus {
            type_: "Pods".to_owned(),
            pods: Some(PodsMetricStatus { metric: source.metric.clone(), current }),
            ..Default::default()
        };
        Ok((proposal.replicas, format!("pods metric {name}"), status))
    }

    async fn of_object(
        &self,
        source: &ObjectMetricSource,
        observed: i32,
        ground: &Ground<'_>,
    ) -> Result<Answer, String> {
        let (client, namespace, name) = (&self.this.context.client, &self.key.namespace, &source.metric.name);
        let object = &source.described_object;
        let metric_selector = metrics::query_form(source.metric.selector.as_ref());
        let value = async {
            let mapped = target::mapped(client, object).await?;
            metrics::of_object(client, namespace, &mapped, &object.name, name, &metric_selector).await
        };
        let failed = |error| {
            format!("unable to get metric {name}: {} on {namespace} {}/{error}", object.kind, object.name)
        };
        let (proposal, current, shown) = match (source.target.type_.as_str(), &source.target) {
            ("Value", MetricTarget { value: Some(wanted), .. }) => {
                let proposal = calculator::of_value(ground, value.await.map_err(failed)?, millis(&wanted.0))?;
                (proposal, whole(&proposal), format!("{} metric {name}", object.kind))
            }
            ("AverageValue", MetricTarget { average_value: Some(wanted), .. }) => {
                let value = value.await.map_err(failed)?;
                let proposal = calculator::of_share(ground.tolerance, observed, value, millis(&wanted.0));
                (proposal, share(&proposal), shown_outside(name, source.metric.selector.as_ref()))
            }
            _ => {
                let why = "invalid object metric source: neither a value target nor an average value target was set";
                return Err(why.to_owned());
            }
        };
        let status = MetricStatus {
            type_: "Object".to_owned(),
            object: Some(ObjectMetricStatus {
                described_object: object.clone(),
                metric: source.metric.clone(),
                current,
            }),
            ..Default::default()
        };
        Ok((proposal.replicas, shown, status))
    }

    async fn of_outside(
        &self,
        source: &ExternalMetricSource,
        observed: i32,
        ground: &Ground<'_>,
    ) -> Result<Answer, String> {
        let (client, namespace, name) = (&self.this.context.client, &self.key.namespace, &source.metric.name);
        let selector = source.metric.selector.as_ref();
        let form = metrics::query_form(selector);
        let value = async {
            let values = metrics::of_outside(client, namespace, name, &form).await;
            values.map(|values| values.iter().sum::<i64>()).map_err(|error| {
                let selector = metrics::shown(selector);
                format!("unable to get external metric {namespace}/{name}/{selector}: {error}")
            })
        };
        let (proposal, current) = match &source.target {
            MetricTarget { average_value: Some(wanted), .. } => {
                let proposal =
                    calculator::of_share(ground.tolerance, observed, value.await?, millis(&wanted.0));
                (proposal, share(&proposal))
            }
            MetricTarget { value: Some(wanted), .. } => {
                let proposal = calculator::of_value(ground, value.await?, millis(&wanted.0))?;
                (proposal, whole(&proposal))
            }
            _ => {
                let why = "invalid external metric source: neither a value target nor an average value target was set";
                return Err(why.to_owned());
            }
        };
        let status = MetricStatus {
            type_: "External".to_owned(),
            external: Some(ExternalMetricStatus { metric: source.metric.clone(), current }),
            ..Default::default()
        };
        Ok((proposal.replicas, shown_outside(name, selector), status))
    }

    fn warn(&self, reason: &str, message: String) {
        self.this.recorder.event(self.autoscaler, EventType::Warning, reason, message);
    }

    fn condition(&mut self, type_: &str, status: bool, reason: &str, message: impl Into<String>) {
        let status = if status { "True" } else { "False" };
        let known = util::find(&self.status.conditions, type_).filter(|known| known.status == status);
        let since = known.and_then(|known| known.last_transition_time.clone());
        let new = HorizontalPodAutoscalerCondition {
            type_: type_.to_owned(),
            status: status.to_owned(),
            reason: Some(reason.to_owned()),
            message: Some(message.into()),
            last_transition_time: since.or_else(|| Some(self.this.context.clock.time())),
        };
        let conditions = self.status.conditions.get_or_insert_default();
        match conditions.iter_mut().find(|condition| condition.type_ == type_) {
            Some(condition) => *condition = new,
            None => conditions.push(new),
        }
    }
}

/// What an autoscaler without metrics follows.
fn cpu_metric() -> MetricSpec {
    let target = MetricTarget {
        type_: "Utilization".to_owned(),
        average_utilization: Some(CPU_TARGET),
        ..Default::default()
    };
    MetricSpec {
        type_: "Resource".to_owned(),
        resource: Some(ResourceMetricSource { name: "cpu".to_owned(), target }),
        ..Default::default()
    }
}

fn tolerance(spec: &HorizontalPodAutoscalerSpec) -> Tolerance {
    let behavior = spec.behavior.as_ref();
    let of = |rules: Option<&HPAScalingRules>| {
        let own = rules.and_then(|rules| rules.tolerance.as_ref());
        own.and_then(|own| own.0.parse::<knarr_api::quantity::Quantity>().ok())
            .map_or(TOLERANCE, |own| own.as_f64())
    };
    Tolerance {
        down: of(behavior.and_then(|behavior| behavior.scale_down.as_ref())),
        up: of(behavior.and_then(|behavior| behavior.scale_up.as_ref())),
    }
}

fn quantity(millis: i64) -> Quantity {
    Quantity(knarr_api::quantity::Quantity::from_millis(millis).to_string())
}

fn whole(proposal: &Proposal) -> MetricValueStatus {
    MetricValueStatus { value: Some(quantity(proposal.mean)), ..Default::default() }
}

fn share(proposal: &Proposal) -> MetricValueStatus {
    MetricValueStatus { average_value: Some(quantity(proposal.mean)), ..Default::default() }
}

fn shown_outside(name: &str, selector: Option<&LabelSelector>) -> String {
    format!("external metric {name}({})", metrics::shown(selector))
}

#[cfg(test)]
mod tests;
