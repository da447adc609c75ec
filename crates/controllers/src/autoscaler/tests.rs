//! The documented cases of the calculation, and an autoscaler at work.

use super::*;
use crate::harness::{Harness, NAMESPACE};
use calculator::{Sample, Samples, of_mean, of_share, of_utilization, of_value};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Event;
use serde_json::{Value, json};

const USUAL: Tolerance = Tolerance { down: 0.1, up: 0.1 };

/// Running pods that request one CPU; `false`: not ready since the start.
fn pods(ready: &[bool], now: Timestamp) -> Vec<Arc<Pod>> {
    let pod = |(n, ready): (usize, &bool)| {
        let since = now - SignedDuration::from_mins(10);
        let pod = json!({
            "metadata": {"name": format!("p{n}"), "namespace": NAMESPACE},
            "spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": "1"}}}]},
            "status": {
                "phase": "Running", "startTime": since,
                "conditions": [{"type": "Ready", "status": if *ready { "True" } else { "False" }, "lastTransitionTime": since}],
            },
        });
        Arc::new(serde_json::from_value(pod).unwrap())
    };
    ready.iter().enumerate().map(pod).collect()
}

/// Samples of the pods by their numbers; pods beyond have none.
fn samples(values: &[i64], now: Timestamp) -> Samples {
    let sample = |value: &i64| Sample { value: *value, at: now, window: SignedDuration::from_secs(60) };
    values.iter().enumerate().map(|(n, value)| (format!("p{n}"), sample(value))).collect()
}

#[test]
fn utilization_asks_for_the_documented_number_of_replicas() {
    const T: bool = true;
    const F: bool = false;
    /// Readiness, use, target, replicas asked for, utilization found.
    type Case<'a> = (&'a str, &'a [bool], &'a [i64], i32, i32, i32);
    let cases: &[Case<'_>] = &[
        ("up", &[T, T, T], &[300, 500, 700], 30, 5, 50),
        ("up, an unready pod counts as idle", &[F, T, T], &[300, 500, 700], 30, 4, 60),
        ("too many are unready to tell", &[T, F, F], &[400, 500, 700], 30, 3, 40),
        ("down", &[T, T, T, T, T], &[100, 300, 500, 250, 250], 50, 3, 28),
        ("within tolerance", &[T, T, T], &[1010, 1030, 1020], 100, 3, 102),
        ("a missing one, at the target", &[T, T], &[1000], 100, 2, 100),
        ("a missing one, above", &[T, T], &[1900], 100, 2, 190),
        ("a missing one, below", &[T, T], &[600], 100, 2, 60),
        ("missing and unready, no change", &[F, T, T], &[100, 450], 50, 3, 45),
        ("missing and unready, up", &[F, T, T], &[100, 2000], 50, 4, 200),
        ("missing and unready, down", &[F, T, T, T], &[100, 100, 100], 50, 3, 10),
    ];
    let now = Timestamp::now();
    for (what, ready, values, target, replicas, utilization) in cases {
        let pods = pods(ready, now);
        let ground = Ground { pods: &pods, current: ready.len() as i32, tolerance: USUAL, now };
        let got = of_utilization(&ground, samples(values, now), "cpu", None, *target).unwrap();
        assert_eq!((got.replicas, got.utilization), (*replicas, Some(*utilization)), "{what}");
    }
}

#[test]
fn a_pod_that_just_started_does_not_count_its_cpu() {
    let now = Timestamp::now();
    let mut three = pods(&[true, true, true], now);
    let young = Arc::make_mut(&mut three[0]).status.as_mut().unwrap();
    let just = k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(now - SignedDuration::from_secs(20));
    young.start_time = Some(just.clone());
    young.conditions.as_mut().unwrap()[0].last_transition_time = Some(just);
    let ground = Ground { pods: &three, current: 3, tolerance: USUAL, now };
    let got = of_utilization(&ground, samples(&[300, 500, 700], now), "cpu", None, 30).unwrap();
    assert_eq!((got.replicas, got.utilization), (4, Some(60)));
    let memory = of_mean(&ground, samples(&[300, 500, 700], now), "memory", 300).unwrap();
    assert_eq!((memory.replicas, memory.mean), (5, 500), "its memory counts");
}

#[test]
fn plain_values_ask_for_the_documented_number_of_replicas() {
    let now = Timestamp::now();
    let pods = pods(&[true, true, true], now);
    let ground = |current| Ground { pods: &pods, current, tolerance: USUAL, now };
    let mean = of_mean(&ground(3), samples(&[20_000, 10_000, 30_000], now), "", 15_000).unwrap();
    assert_eq!((mean.replicas, mean.mean), (4, 20_000));
    assert_eq!(of_value(&ground(3), 20_000, 15_000).unwrap().replicas, 4);
    assert_eq!(of_value(&ground(3), 15_900, 15_000).unwrap().replicas, 3, "within tolerance");
    assert_eq!(of_value(&ground(0), 100_000, 15_000).unwrap().replicas, 7, "from none");
    let shared = of_share(USUAL, 3, 8_600, 2_150);
    assert_eq!((shared.replicas, shared.mean), (4, 2_867));
    assert_eq!(of_share(USUAL, 3, 6_500, 2_150).replicas, 3, "within tolerance");
    let careful = Tolerance { down: 0.5, up: 0.0 };
    assert_eq!(of_share(careful, 3, 6_500, 2_150).replicas, 4, "its own tolerance upwards");
    assert_eq!(of_share(careful, 3, 4_000, 2_150).replicas, 3, "its own tolerance downwards");
}

#[test]
fn what_cannot_be_computed_says_why() {
    let now = Timestamp::now();
    let pods = pods(&[true], now);
    let ground = Ground { pods: &pods, current: 1, tolerance: USUAL, now };
    let why = |got: Result<Proposal, String>| got.unwrap_err();
    assert_eq!(
        why(of_utilization(&ground, samples(&[5], now), "memory", None, 50)),
        "missing request for memory in container c of Pod p0"
    );
    assert_eq!(
        why(of_utilization(&ground, Samples::new(), "cpu", None, 50)),
        "did not receive metrics for targeted pods (pods might be unready)"
    );
    let empty = Ground { pods: &[], ..ground };
    assert_eq!(
        why(of_mean(&empty, samples(&[5], now), "", 50)),
        "no pods returned by selector while calculating replica count"
    );
}

fn spec(extra: Value) -> HorizontalPodAutoscalerSpec {
    let mut spec = json!({
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web"},
        "minReplicas": 2, "maxReplicas": 100,
    });
    for (field, value) in extra.as_object().into_iter().flatten() {
        spec[field] = value.clone();
    }
    serde_json::from_value(spec).unwrap()
}

#[test]
fn rates_and_bounds_limit_what_is_done() {
    let policies =
        |type_: &str, value: i32| json!({"policies": [{"type": type_, "value": value, "periodSeconds": 60}]});
    let both = |select: &str| {
        let two = json!([
            {"type": "Pods", "value": 4, "periodSeconds": 60}, {"type": "Percent", "value": 10, "periodSeconds": 60},
        ]);
        json!({"stabilizationWindowSeconds": 0, "selectPolicy": select, "policies": two})
    };
    let cases = [
        ("doubled at most", json!({}), 10, 50, 20, "ScaleUpLimit"),
        ("four are always allowed", json!({}), 1, 50, 4, "ScaleUpLimit"),
        ("the maximum", json!({"maxReplicas": 15}), 10, 50, 15, "TooManyReplicas"),
        ("the minimum", json!({}), 10, 1, 2, "TooFewReplicas"),
        ("in between", json!({}), 10, 12, 12, "DesiredWithinRange"),
        ("default behavior up", json!({"behavior": {}}), 1, 50, 5, "ScaleUpLimit"),
        (
            "pods per minute",
            json!({"behavior": {"scaleUp": policies("Pods", 3)}}),
            10,
            50,
            13,
            "ScaleUpLimit",
        ),
        (
            "percent rounds up",
            json!({"behavior": {"scaleUp": policies("Percent", 15)}}),
            10,
            50,
            12,
            "ScaleUpLimit",
        ),
        ("the largest", json!({"behavior": {"scaleDown": both("Max")}}), 20, 3, 16, "ScaleDownLimit"),
        ("the smallest", json!({"behavior": {"scaleDown": both("Min")}}), 20, 3, 18, "ScaleDownLimit"),
        ("none", json!({"behavior": {"scaleDown": both("Disabled")}}), 20, 3, 20, "ScaleDownLimit"),
        (
            "none up",
            json!({"behavior": {"scaleUp": {"selectPolicy": "Disabled"}}}),
            20,
            30,
            20,
            "ScaleUpLimit",
        ),
    ];
    let now = Timestamp::now();
    for (what, extra, current, wanted, replicas, reason) in cases {
        let outcome = History::default().settle(&spec(extra), current, wanted, now);
        assert_eq!((outcome.replicas, outcome.limited.reason), (replicas, reason), "{what}");
        assert_eq!(outcome.limited.status, replicas != wanted, "{what}");
    }
}

#[test]
fn a_period_counts_what_was_done_in_it() {
    let rules = json!({"policies": [{"type": "Pods", "value": 4, "periodSeconds": 60}]});
    let spec = spec(json!({"behavior": {"scaleUp": rules}}));
    let now = Timestamp::now();
    let mut history = History::default();
    assert_eq!(history.settle(&spec, 10, 50, now).replicas, 14);
    history.scaled(&spec, 10, 14, now);
    let later = |seconds| now + SignedDuration::from_secs(seconds);
    assert_eq!(history.settle(&spec, 14, 50, later(30)).replicas, 14, "the four of this minute are used up");
    assert_eq!(history.settle(&spec, 14, 50, later(61)).replicas, 18);
}

#[test]
fn the_windows_hold_back_both_directions() {
    let both = json!({"scaleUp": {"stabilizationWindowSeconds": 60}, "scaleDown": {"stabilizationWindowSeconds": 120}});
    let now = Timestamp::now();
    let later = |seconds| now + SignedDuration::from_secs(seconds);
    let behaved = spec(json!({"behavior": both}));
    let mut history = History::default();
    history.begin(10, now);
    let held = history.settle(&behaved, 10, 20, later(30));
    assert_eq!((held.replicas, held.able.reason), (10, "ScaleUpStabilized"));
    assert_eq!(history.settle(&behaved, 10, 20, later(61)).replicas, 20);
    let held = history.settle(&behaved, 20, 5, later(90));
    assert_eq!((held.replicas, held.able.reason), (20, "ScaleDownStabilized"));
    assert_eq!(history.settle(&behaved, 20, 10, later(185)).replicas, 10);
    let plain = spec(json!({}));
    let mut history = History::default();
    history.begin(10, now);
    let held = history.settle(&plain, 10, 5, later(299));
    assert_eq!((held.replicas, held.able.reason), (10, "ScaleDownStabilized"));
    assert_eq!(history.settle(&plain, 10, 5, later(301)).replicas, 5);
}

async fn deployment(harness: &Harness, replicas: i32, pods: usize) {
    let web = json!({
        "metadata": {"name": "web"},
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "web"}}, "template": {}},
    });
    harness.create::<Deployment>(web).await;
    harness.patch_status::<Deployment>("web", json!({"replicas": pods})).await;
    let since = harness.context.clock.now() - SignedDuration::from_mins(10);
    for n in 0..pods {
        let name = format!("p{n}");
        let pod = json!({
            "metadata": {"name": name, "labels": {"app": "web"}},
            "spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": "1"}}}]},
        });
        harness.create::<Pod>(pod).await;
        let ready = json!({"type": "Ready", "status": "True", "lastTransitionTime": since});
        let status = json!({"phase": "Running", "startTime": since, "conditions": [ready]});
        harness.patch_status::<Pod>(&name, status).await;
    }
}

async fn autoscaler(harness: &Harness, extra: Value) {
    let mut spec = serde_json::to_value(spec(json!({"minReplicas": 1, "maxReplicas": 10}))).unwrap();
    for (field, value) in extra.as_object().into_iter().flatten() {
        spec[field] = value.clone();
    }
    let web = json!({"metadata": {"name": "web"}, "spec": spec});
    harness.create::<HorizontalPodAutoscaler>(web).await;
}

fn measure(harness: &Harness, cpu: &[&str]) {
    let pod = |(n, cpu): (usize, &&str)| {
        json!({
            "metadata": {"name": format!("p{n}"), "namespace": NAMESPACE}, "window": "30s",
            "timestamp": harness.context.clock.now(), "containers": [{"name": "c", "usage": {"cpu": cpu}}],
        })
    };
    let items: Vec<_> = cpu.iter().enumerate().map(pod).collect();
    let list = json!({"kind": "PodMetricsList", "apiVersion": "metrics.k8s.io/v1beta1", "metadata": {}, "items": items});
    harness.api.answer(&format!("/apis/metrics.k8s.io/v1beta1/namespaces/{NAMESPACE}/pods"), list);
}

fn replicas(deployments: &[Deployment]) -> i32 {
    deployments[0].spec.as_ref().unwrap().replicas.unwrap()
}

/// Whether the condition of `type_` has this status and reason.
fn says(autoscalers: &[HorizontalPodAutoscaler], type_: &str, status: &str, reason: &str) -> bool {
    let conditions = &autoscalers[0].status.clone().unwrap_or_default().conditions;
    util::find(conditions, type_).is_some_and(|c| c.status == status && c.reason.as_deref() == Some(reason))
}

#[tokio::test(start_paused = true)]
async fn without_metrics_it_says_why_and_leaves_the_target_alone() {
    let harness = Harness::quiet();
    harness.start(start);
    deployment(&harness, 3, 3).await;
    autoscaler(&harness, json!({})).await;
    let told =
        |all: &[HorizontalPodAutoscaler]| says(all, "ScalingActive", "False", "FailedGetResourceMetric");
    let all = harness.api.wait_for::<HorizontalPodAutoscaler>("the condition", told).await;
    assert!(says(&all, "AbleToScale", "True", "SucceededGetScale"));
    let status = all[0].status.clone().unwrap();
    assert_eq!(status.current_replicas, Some(3));
    let message = util::find(&status.conditions, "ScalingActive").unwrap().message.clone().unwrap();
    assert_eq!(
        message,
        "the HPA was unable to compute the replica count: failed to get cpu utilization: unable to get metrics for \
         resource cpu: unable to fetch metrics from resource metrics API: the server could not find the requested \
         resource (get pods.metrics.k8s.io)"
    );
    let reasons = |events: &[Event]| {
        ["FailedGetResourceMetric", "FailedComputeMetricsReplicas"]
            .iter()
            .all(|reason| events.iter().any(|event| event.reason.as_deref() == Some(reason)))
    };
    harness.api.wait_for::<Event>("the events", reasons).await;
    assert_eq!(replicas(&harness.api.objects::<Deployment>()), 3);
}

#[tokio::test(start_paused = true)]
async fn the_target_follows_the_load_up_at_once_and_down_after_five_minutes() {
    let harness = Harness::quiet();
    harness.start(start);
    deployment(&harness, 3, 3).await;
    measure(&harness, &["600m", "600m", "600m"]);
    let target = json!({"type": "Utilization", "averageUtilization": 30});
    autoscaler(
        &harness,
        json!({"metrics": [{"type": "Resource", "resource": {"name": "cpu", "target": target}}]}),
    )
    .await;
    harness.api.wait_for::<Deployment>("six replicas", |all| replicas(all) == 6).await;
    let rescaled = |all: &[HorizontalPodAutoscaler]| says(all, "AbleToScale", "True", "SucceededRescale");
    let all = harness.api.wait_for::<HorizontalPodAutoscaler>("the condition", rescaled).await;
    let status = all[0].status.clone().unwrap();
    assert_eq!((status.current_replicas, status.desired_replicas), (Some(3), 6));
    assert!(status.last_scale_time.is_some());
    let current = status.current_metrics.unwrap()[0].resource.clone().unwrap().current;
    assert_eq!(current.average_utilization, Some(60));
    assert_eq!(current.average_value, Some(Quantity("600m".into())));
    let told = |events: &[Event]| {
        let wanted = "New size: 6; reason: cpu resource utilization (percentage of request) above target";
        events
            .iter()
            .any(|e| e.reason.as_deref() == Some("SuccessfulRescale") && e.message.as_deref() == Some(wanted))
    };
    harness.api.wait_for::<Event>("the event", told).await;
    measure(&harness, &["100m", "100m", "100m"]);
    let began = tokio::time::Instant::now();
    let held = |all: &[HorizontalPodAutoscaler]| says(all, "AbleToScale", "True", "ScaleDownStabilized");
    harness.api.wait_for::<HorizontalPodAutoscaler>("the window", held).await;
    harness.api.wait_for::<Deployment>("one replica", |all| replicas(all) == 1).await;
    let took = began.elapsed().as_secs();
    assert!((285..=330).contains(&took), "five minutes and at most a period more, not {took} s");
}

#[tokio::test(start_paused = true)]
async fn a_target_of_no_replicas_is_left_alone_and_one_out_of_bounds_is_brought_in() {
    let harness = Harness::quiet();
    harness.start(start);
    deployment(&harness, 0, 0).await;
    autoscaler(&harness, json!({})).await;
    let disabled = |all: &[HorizontalPodAutoscaler]| says(all, "ScalingActive", "False", "ScalingDisabled");
    harness.api.wait_for::<HorizontalPodAutoscaler>("why nothing happens", disabled).await;
    assert_eq!(replicas(&harness.api.objects::<Deployment>()), 0);
    harness.patch::<Deployment>("web", json!({"spec": {"replicas": 50}})).await;
    harness.api.wait_for::<Deployment>("the maximum", |all| replicas(all) == 10).await;
}

#[tokio::test(start_paused = true)]
async fn custom_and_external_metrics_are_read_from_their_apis() {
    let harness = Harness::quiet();
    let versions = json!([{"groupVersion": "custom.metrics.k8s.io/v1beta1", "version": "v1beta1"}]);
    harness.api.answer(
        "/apis/custom.metrics.k8s.io",
        json!({"kind": "APIGroup", "name": "x", "versions": versions}),
    );
    let base = format!("/apis/custom.metrics.k8s.io/v1beta1/namespaces/{NAMESPACE}");
    let item = |name: &str, value: &str| json!({"describedObject": {"name": name}, "value": value});
    harness
        .api
        .answer(&format!("{base}/pods/*/hits"), json!({"items": [item("p0", "30"), item("p1", "50")]}));
    harness.api.answer(&format!("{base}/services/front/depth"), json!({"items": [item("front", "90")]}));
    let outside = format!("/apis/external.metrics.k8s.io/v1beta1/namespaces/{NAMESPACE}/queue");
    harness.api.answer(&outside, json!({"items": [{"value": "10"}, {"value": "20"}]}));
    harness.start(start);
    deployment(&harness, 2, 2).await;
    let average = |value: &str| json!({"type": "AverageValue", "averageValue": value});
    let front = json!({"apiVersion": "v1", "kind": "Service", "name": "front"});
    let metrics = json!([
        {"type": "Pods", "pods": {"metric": {"name": "hits"}, "target": average("20")}},
        {"type": "Object", "object": {"metric": {"name": "depth"}, "describedObject": front,
            "target": {"type": "Value", "value": "60"}}},
        {"type": "External", "external": {"metric": {"name": "queue"}, "target": average("10")}},
        {"type": "External", "external": {"metric": {"name": "absent"}, "target": average("10")}},
    ]);
    autoscaler(&harness, json!({"metrics": metrics})).await;
    harness.api.wait_for::<Deployment>("four replicas", |all| replicas(all) == 4).await;
    let counted = |all: &[HorizontalPodAutoscaler]| {
        all[0].status.as_ref().is_some_and(|status| status.current_metrics.is_some())
    };
    let all = harness.api.wait_for::<HorizontalPodAutoscaler>("the metrics", counted).await;
    let metrics = all[0].status.clone().unwrap().current_metrics.unwrap();
    let value = |of: &MetricValueStatus| {
        of.average_value.clone().or(of.value.clone()).map(|quantity| quantity.0).unwrap_or_default()
    };
    assert_eq!(value(&metrics[0].pods.as_ref().unwrap().current), "40");
    assert_eq!(value(&metrics[1].object.as_ref().unwrap().current), "90");
    assert_eq!(value(&metrics[2].external.as_ref().unwrap().current), "15");
    assert_eq!(metrics[3].type_, "", "what cannot be read keeps its place");
    let reasons = |events: &[Event]| {
        events.iter().any(|event| event.reason.as_deref() == Some("FailedGetExternalMetric"))
    };
    harness.api.wait_for::<Event>("the event about the absent one", reasons).await;
}

#[tokio::test(start_paused = true)]
async fn without_a_target_it_says_so_and_without_autoscalers_nothing_runs() {
    let harness = Harness::quiet();
    harness.start(start);
    autoscaler(&harness, json!({})).await;
    let told = |all: &[HorizontalPodAutoscaler]| says(all, "AbleToScale", "False", "FailedGetScale");
    harness.api.wait_for::<HorizontalPodAutoscaler>("the condition", told).await;
    harness.delete::<HorizontalPodAutoscaler>("web").await;
    harness.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn two_autoscalers_over_the_same_pods_both_stand_still() {
    let harness = Harness::quiet();
    harness.start(start);
    deployment(&harness, 2, 2).await;
    measure(&harness, &["900m", "900m"]);
    for name in ["a", "b"] {
        let autoscaler = json!({"metadata": {"name": name}, "spec": spec(json!({}))});
        harness.create::<HorizontalPodAutoscaler>(autoscaler).await;
    }
    let both = |all: &[HorizontalPodAutoscaler]| {
        all.len() == 2
            && all
                .iter()
                .all(|one| says(std::slice::from_ref(one), "ScalingActive", "False", "AmbiguousSelector"))
    };
    harness.api.wait_for::<HorizontalPodAutoscaler>("both say so", both).await;
}

#[tokio::test(start_paused = true)]
async fn one_container_of_each_pod_can_be_followed() {
    let harness = Harness::quiet();
    harness.start(start);
    deployment(&harness, 2, 2).await;
    let pod = |name: &str| {
        json!({
            "metadata": {"name": name}, "window": "1m0s", "timestamp": harness.context.clock.now(),
            "containers": [{"name": "c", "usage": {"cpu": "900m"}}, {"name": "sidecar", "usage": {"cpu": "9"}}],
        })
    };
    let path = format!("/apis/metrics.k8s.io/v1beta1/namespaces/{NAMESPACE}/pods");
    harness.api.answer(&path, json!({"items": [pod("p0"), pod("p1")]}));
    let target = json!({"type": "Utilization", "averageUtilization": 60});
    let metric = |container: &str| {
        let source = json!({"name": "cpu", "container": container, "target": target});
        json!({"metrics": [{"type": "ContainerResource", "containerResource": source}]})
    };
    autoscaler(&harness, metric("c")).await;
    harness.api.wait_for::<Deployment>("three replicas", |all| replicas(all) == 3).await;
    harness.patch::<HorizontalPodAutoscaler>("web", json!({"spec": metric("other")})).await;
    let told = |events: &[Event]| {
        let wanted = "failed to get cpu utilization: unable to get metrics for resource cpu: container other not \
                      present in metrics for pod ns/p0";
        events.iter().any(|event| {
            event.reason.as_deref() == Some("FailedGetContainerResourceMetric")
                && event.message.as_deref() == Some(wanted)
        })
    };
    harness.api.wait_for::<Event>("why it cannot be", told).await;
}
