//! Jobs on an in-memory API; the test plays kubelet.

use super::*;
use crate::harness::Harness;
use k8s_openapi::api::core::v1::Event;
use knarr_client::testing::Faults;
use serde_json::{Value, json};
use std::collections::HashSet;

fn job(spec: Value) -> Value {
    let mut full = json!({
        "selector": {"matchLabels": {"job": "work"}},
        "template": {
            "metadata": {"labels": {"job": "work"}},
            "spec": {"containers": [{"name": "c"}], "restartPolicy": "Never"},
        },
    });
    for (field, value) in spec.as_object().unwrap() {
        full[field] = value.clone();
    }
    json!({"metadata": {"name": "work"}, "spec": full})
}

/// Ends every new pod with the exit code `code` says; deleted pods end at once.
fn run_kubelet(harness: &Harness, code: impl Fn(&Pod, usize) -> i32 + Send + 'static) {
    let pods = harness.context.informers.get::<Pod>();
    let (api, keys) = (harness.api_of::<Pod>(), pods.subscribe());
    let clock = harness.context.clock.clone();
    tokio::spawn(async move {
        let mut ended = HashSet::new();
        loop {
            let key = keys.next().await;
            let Some(pod) = pods.get_key(&key) else { continue };
            if pods::is_finished(&pod) || ended.contains(&key) {
                continue;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
            let code = code(&pod, ended.len());
            ended.insert(key.clone());
            let phase = if code == 0 { "Succeeded" } else { "Failed" };
            let terminated = json!({"exitCode": code, "finishedAt": clock.time()});
            let containers = json!([{
                "name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 0,
                "state": {"terminated": terminated},
            }]);
            let status = json!({"status": {"phase": phase, "containerStatuses": containers}});
            let patch = kube::api::Patch::Merge(&status);
            while api
                .patch_status(&key.name, &Default::default(), &patch)
                .await
                .is_err_and(|error| !matches!(error, kube::Error::Api(status) if status.code == 404))
            {
            }
        }
    });
}

fn has(type_: &'static str) -> impl Fn(&[Job]) -> bool {
    move |jobs| {
        let conditions = jobs[0].status.as_ref().and_then(|status| status.conditions.clone());
        util::is_true(&conditions, type_)
    }
}

fn reason(jobs: &[Job], type_: &str) -> (String, String) {
    let conditions = &jobs[0].status.as_ref().unwrap().conditions;
    let condition = util::find(conditions, type_).unwrap();
    (condition.reason.clone().unwrap(), condition.message.clone().unwrap())
}

#[tokio::test(start_paused = true)]
async fn every_success_is_counted_exactly_once_whatever_goes_wrong() {
    for seed in 0..10 {
        let harness =
            Harness::new(seed, Faults { conflict: 0.2, error: 0.1, drop_watch: 0.3, duplicate: 0.3 });
        harness.start(start);
        run_kubelet(&harness, |_, _| 0);
        harness.create::<Job>(job(json!({"completions": 9, "parallelism": 4}))).await;
        let limit = |pods: &[Pod]| {
            assert!(pods.len() <= 9, "seed {seed}: {} pods for 9 completions", pods.len());
            assert!(pods.iter().filter(|pod| pods::is_active(pod)).count() <= 4, "seed {seed}: parallelism");
            pods.len() == 9
        };
        harness.api.wait_for::<Pod>("9 pods", limit).await;
        let jobs = harness.api.wait_for::<Job>("completion", has("Complete")).await;
        let status = jobs[0].status.clone().unwrap();
        assert_eq!((status.succeeded, status.failed, status.active), (Some(9), None, None), "seed {seed}");
        assert!(status.completion_time.is_some() && status.start_time.is_some());
        assert_eq!(reason(&jobs, "SuccessCriteriaMet").0, "CompletionsReached");
        harness.api.set_faults(Faults::default());
        harness.assert_quiet().await;
        assert!(harness.api.objects::<Pod>().iter().all(|pod| !is_tracked(pod)), "all finalizers are gone");
    }
}

#[tokio::test(start_paused = true)]
async fn failures_are_retried_ever_later_until_the_limit() {
    let harness = Harness::quiet();
    harness.start(start);
    run_kubelet(&harness, |_, _| 1);
    let began = tokio::time::Instant::now();
    harness.create::<Job>(job(json!({"backoffLimit": 2}))).await;
    let jobs = harness.api.wait_for::<Job>("failure", has("Failed")).await;
    assert_eq!(reason(&jobs, "Failed").0, "BackoffLimitExceeded");
    assert_eq!(jobs[0].status.as_ref().unwrap().failed, Some(3));
    let elapsed = began.elapsed().as_secs();
    assert!((30..40).contains(&elapsed), "10 and 20 seconds apart, not {elapsed}");
    harness
        .api
        .wait_for::<Event>("the event", |events| {
            events.iter().any(|event| event.reason.as_deref() == Some("BackoffLimitExceeded"))
        })
        .await;
    harness.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn each_index_succeeds_once_and_knows_its_number() {
    for seed in 0..6 {
        let harness =
            Harness::new(seed, Faults { conflict: 0.2, error: 0.1, drop_watch: 0.3, duplicate: 0.3 });
        harness.start(start);
        // The third pod to end fails, so one index needs a second pod.
        run_kubelet(&harness, |_, ended| i32::from(ended == 2));
        let spec = json!({"completions": 5, "parallelism": 3, "completionMode": "Indexed"});
        harness.create::<Job>(job(spec)).await;
        let jobs = harness.api.wait_for::<Job>("completion", has("Complete")).await;
        let status = jobs[0].status.clone().unwrap();
        assert_eq!(status.completed_indexes.as_deref(), Some("0-4"));
        assert_eq!((status.succeeded, status.failed), (Some(5), Some(1)), "seed {seed}");
        let pods = harness.api.objects::<Pod>();
        let pod = pods.iter().find(|pod| index_of(pod) == Some(3)).unwrap();
        let spec = pod.spec.as_ref().unwrap();
        assert_eq!(spec.hostname.as_deref(), Some("work-3"));
        assert_eq!(spec.containers[0].env.as_ref().unwrap()[0].name, "JOB_COMPLETION_INDEX");
    }
}

#[tokio::test(start_paused = true)]
async fn an_index_fails_alone_beyond_its_own_limit() {
    let harness = Harness::quiet();
    harness.start(start);
    run_kubelet(&harness, |pod, _| i32::from(index_of(pod) == Some(1)));
    let spec = json!({
        "completions": 3, "parallelism": 3, "completionMode": "Indexed", "backoffLimitPerIndex": 1,
    });
    harness.create::<Job>(job(spec)).await;
    let jobs = harness.api.wait_for::<Job>("failure", has("Failed")).await;
    assert_eq!(reason(&jobs, "Failed"), ("FailedIndexes".into(), "Job has failed indexes".into()));
    let status = jobs[0].status.clone().unwrap();
    assert_eq!(status.failed_indexes.as_deref(), Some("1"));
    assert_eq!(status.completed_indexes.as_deref(), Some("0,2"));
    assert_eq!(status.failed, Some(2), "one try and one retry");
}

#[tokio::test(start_paused = true)]
async fn policies_decide_what_failures_and_successes_mean() {
    let rules = json!({"rules": [
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [42]}},
        {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [7]}},
    ]});
    let harness = Harness::quiet();
    harness.start(start);
    run_kubelet(&harness, |_, ended| if ended < 3 { 7 } else { 42 });
    harness.create::<Job>(job(json!({"podFailurePolicy": rules, "backoffLimit": 0}))).await;
    let jobs = harness.api.wait_for::<Job>("failure", has("Failed")).await;
    let (why, message) = reason(&jobs, "Failed");
    assert_eq!(why, "PodFailurePolicy");
    assert!(message.ends_with("failed with exit code 42 matching FailJob rule at index 0"), "{message}");
    assert_eq!(jobs[0].status.as_ref().unwrap().failed, Some(1), "ignored failures do not count");

    let harness = Harness::quiet();
    harness.start(start);
    run_kubelet(&harness, |pod, _| i32::from(index_of(pod) != Some(0)));
    let spec = json!({
        "completions": 3, "parallelism": 3, "completionMode": "Indexed",
        "successPolicy": {"rules": [{"succeededIndexes": "0"}]},
    });
    harness.create::<Job>(job(spec)).await;
    let jobs = harness.api.wait_for::<Job>("completion", has("Complete")).await;
    assert_eq!(reason(&jobs, "Complete"), ("SuccessPolicy".into(), "Matched rules at index 0".into()));
}

#[tokio::test(start_paused = true)]
async fn a_deadline_ends_a_job_and_suspension_stops_the_clock() {
    let harness = Harness::quiet();
    harness.start(start);
    harness.create::<Job>(job(json!({"activeDeadlineSeconds": 100, "parallelism": 2}))).await;
    harness.api.wait_for::<Pod>("2 pods", |pods| pods.len() == 2).await;
    harness.patch::<Job>("work", json!({"spec": {"suspend": true}})).await;
    harness.api.wait_for::<Pod>("no pods", |pods| pods.is_empty()).await;
    harness.api.wait_for::<Job>("suspension", has("Suspended")).await;
    harness.api.settle(Duration::from_secs(500)).await;
    assert!(!is_finished(&harness.api.objects::<Job>()[0]));
    harness.patch::<Job>("work", json!({"spec": {"suspend": false}})).await;
    harness.api.wait_for::<Pod>("2 pods again", |pods| pods.len() == 2).await;
    let began = tokio::time::Instant::now();
    let jobs = harness.api.wait_for::<Job>("the deadline", has("Failed")).await;
    assert!((98..103).contains(&began.elapsed().as_secs()));
    assert_eq!(reason(&jobs, "Failed").0, "DeadlineExceeded");
    assert!(harness.api.objects::<Pod>().is_empty(), "its pods are ended");
}

#[tokio::test(start_paused = true)]
async fn a_finished_job_goes_when_its_time_is_over() {
    let harness = Harness::quiet();
    harness.start(start);
    harness.start(start_ttl);
    harness.start(crate::garbage_collector::start);
    run_kubelet(&harness, |_, _| 0);
    harness.create::<Job>(job(json!({"ttlSecondsAfterFinished": 60}))).await;
    harness.api.wait_for::<Job>("completion", has("Complete")).await;
    let began = tokio::time::Instant::now();
    harness.api.wait_for::<Job>("no job", |jobs| jobs.is_empty()).await;
    assert!((58..65).contains(&began.elapsed().as_secs()));
    harness.api.wait_for::<Pod>("no pods", |pods| pods.is_empty()).await;
}

/// Found by the simulator: a job deleted with its pods orphaned left its finalizer on them, for ever.
#[tokio::test(start_paused = true)]
async fn a_pod_that_lost_its_job_loses_its_finalizer() {
    let harness = Harness::quiet();
    harness.start(start_orphans);
    let pod = json!({
        "metadata": {"name": "p", "finalizers": [FINALIZER, "example.com/kept"]},
        "spec": {"containers": [{"name": "c", "image": "i"}]},
    });
    harness.create::<Pod>(pod).await;
    let kept =
        |pods: &[Pod]| pods[0].metadata.finalizers.as_deref() == Some(&["example.com/kept".to_owned()]);
    harness.api.wait_for::<Pod>("the finalizer gone", kept).await;
    harness.assert_quiet().await;
}
