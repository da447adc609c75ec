//! Jobs: pods that run to an end, counted, retried, bounded in time, resumed and cleaned up.

use std::collections::BTreeSet;

use crate::cluster::{Scene, condition, name, owner, text_of};
use serde_json::{Value, json};

const JOB: &str = "
apiVersion: batch/v1
kind: Job
metadata: {name: work}
spec:
  completions: 4
  parallelism: 2
  template:
    metadata: {annotations: {simulated.knarr.dev/run-time: 100ms}}
    spec: {restartPolicy: Never, containers: [{name: c, image: 'work:1'}]}
";

fn failing(manifest: &str) -> String {
    manifest.replace("run-time: 100ms", "run-time: 10ms, simulated.knarr.dev/exit-code: '3'")
}

fn fails_for(job: &Value) -> String {
    text_of(&condition(job, "Failed")["reason"])
}

#[test]
fn a_job_runs_so_many_pods_at_a_time_until_enough_have_succeeded() {
    let s = Scene::new("job-parallel");
    assert_eq!(s.apply(JOB), "job.batch/work created");
    s.wait("4 pods have ended, never more than 2 at a time", || {
        let pods = s.list("pods");
        let ended = pods.iter().filter(|pod| pod["status"]["phase"] == "Succeeded").count();
        assert!(pods.len() - ended <= 2 && pods.len() <= 4, "{}", s.ok("get pods"));
        if ended == 4 { Ok(()) } else { Err(s.ok("get pods")) }
    });
    s.says("wait --for=condition=complete job/work --timeout=20s", "job.batch/work condition met");
    assert_eq!(s.row("job work")[..3], ["work", "Complete", "4/4"]);
    s.until_event("Completed", "Job completed");
    let pods = s.ok("get pods --no-headers");
    assert_eq!(
        (pods.lines().count(), pods.matches("Completed").count()),
        (4, 4),
        "none is restarted: {pods}"
    );
    s.says("delete job work", "job.batch \"work\" deleted from job-parallel namespace");
    s.wait("its pods go with it", || if s.list("pods").is_empty() { Ok(()) } else { Err(s.ok("get pods")) });
}

#[test]
fn a_failed_pod_is_followed_by_another_until_the_limit() {
    let s = Scene::new("job-backoff");
    s.apply(&failing(JOB).replace("completions: 4\n  parallelism: 2", "backoffLimit: 1"));
    let job = s.until("it fails", "jobs/work", |job| fails_for(job) == "BackoffLimitExceeded");
    assert_eq!(job["status"]["failed"], 2);
    assert_eq!(s.list("pods").len(), 2);
    assert_eq!(s.row("job work")[..3], ["work", "Failed", "0/1"]);
    s.until_event("BackoffLimitExceeded", "Job has reached the specified backoff limit");
    let pods = s.ok("get pods --no-headers");
    assert_eq!(pods.matches("Error").count(), 2, "{pods}");
}

#[test]
fn containers_that_may_restart_do_so_in_their_pod() {
    let s = Scene::new("job-on-failure");
    s.apply(
        &failing(JOB)
            .replace("Never", "OnFailure")
            .replace("completions: 4\n  parallelism: 2", "backoffLimit: 1"),
    );
    s.wait("a restart in place", || {
        let restarts: i64 = s
            .list("pods")
            .iter()
            .filter_map(|pod| pod["status"]["containerStatuses"][0]["restartCount"].as_i64())
            .sum();
        if restarts > 0 || !fails_for(&s.object("jobs/work")).is_empty() {
            Ok(())
        } else {
            Err(s.ok("get pods"))
        }
    });
    s.until("it fails", "jobs/work", |job| fails_for(job) == "BackoffLimitExceeded");
}

#[test]
fn a_job_that_takes_too_long_is_ended() {
    let s = Scene::new("job-deadline");
    s.apply(&JOB.replace("100ms", "1h").replace("completions: 4\n", "activeDeadlineSeconds: 1\n"));
    s.until("it fails", "jobs/work", |job| fails_for(job) == "DeadlineExceeded");
    s.until_event("DeadlineExceeded", "Job was active longer than specified deadline");
    s.wait("its pods are ended", || {
        let pods = s.list("pods");
        let active = pods.iter().filter(|pod| pod["status"]["phase"] != "Failed").count();
        if active == 0 { Ok(()) } else { Err(s.ok("get pods")) }
    });
}

#[test]
fn every_index_is_completed_once() {
    let s = Scene::new("job-indexed");
    s.apply(&JOB.replace("completions: 4", "completionMode: Indexed\n  completions: 4"));
    let job = s.until("it completes", "jobs/work", |job| condition(job, "Complete")["status"] == "True");
    assert_eq!((&job["status"]["succeeded"], &job["status"]["completedIndexes"]), (&json!(4), &json!("0-3")));
    let pods = s.list("pods");
    let index =
        |pod: &Value| text_of(&pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"]);
    assert_eq!(
        pods.iter().map(index).collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>(),
        ["0", "1", "2", "3"]
    );
    for pod in &pods {
        assert!(name(pod).starts_with(&format!("work-{}-", index(pod))), "{}", name(pod));
        assert_eq!(text_of(&pod["spec"]["hostname"]), format!("work-{}", index(pod)));
    }
    assert!(s.ok("describe job work").contains("Completed Indexes:  0-3"), "{}", s.ok("describe job work"));
}

#[test]
fn a_suspended_job_runs_nothing_until_it_is_resumed() {
    let s = Scene::new("job-suspend");
    s.apply(&JOB.replace("completions: 4", "suspend: true\n  completions: 4").replace("100ms", "1h"));
    s.until("it is suspended", "jobs/work", |job| condition(job, "Suspended")["status"] == "True");
    assert_eq!(s.row("job work")[..3], ["work", "Suspended", "0/4"]);
    assert!(s.list("pods").is_empty());
    let patch = |suspend: bool| {
        s.says(
            &format!(r#"patch job work -p '{{"spec":{{"suspend":{suspend}}}}}'"#),
            "job.batch/work patched",
        );
    };
    patch(false);
    s.until("2 run", "jobs/work", |job| job["status"]["ready"] == 2);
    s.until_event("Resumed", "Job resumed");
    patch(true);
    s.wait("no pod is left", || if s.list("pods").is_empty() { Ok(()) } else { Err(s.ok("get pods")) });
    s.until_event("Suspended", "Job suspended");
}

#[test]
fn a_finished_job_lives_no_longer_than_told() {
    let s = Scene::new("job-ttl");
    s.apply(&JOB.replace("completions: 4", "ttlSecondsAfterFinished: 0\n  completions: 2"));
    s.until("the job is gone", "jobs/work", Value::is_null);
    s.wait("its pods too", || if s.list("pods").is_empty() { Ok(()) } else { Err(s.ok("get pods")) });
}

const CRON: &str = "
apiVersion: batch/v1
kind: CronJob
metadata: {name: tick}
spec:
  schedule: '0 0 1 1 *'
  timeZone: Etc/UTC
  suspend: true
  successfulJobsHistoryLimit: 1
  jobTemplate:
    spec:
      template:
        metadata: {annotations: {simulated.knarr.dev/run-time: 10ms}}
        spec: {restartPolicy: OnFailure, containers: [{name: c, image: 'tick:1'}]}
";

fn patch_cron(s: &Scene, what: &str, body: &Value) {
    let told = s.ok(&format!("patch cronjob tick {what} --type=merge -p '{body}'"));
    assert!(told.starts_with("cronjob.batch/tick patched"), "{told}");
}

/// Makes the first of that month, just past, a time that the cron job has missed: nobody waits for a minute to end.
fn comes_due(s: &Scene, month: u8) {
    patch_cron(s, "", &json!({ "spec": { "suspend": true, "schedule": format!("0 0 1 {month} *") } }));
    let long_ago = jiff::Timestamp::now() - jiff::SignedDuration::from_hours(400 * 24);
    let last = long_ago.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    patch_cron(s, "--subresource=status", &json!({ "status": { "lastScheduleTime": last } }));
    patch_cron(s, "", &json!({ "spec": { "suspend": false } }));
}

#[test]
fn a_cron_job_is_run_by_hand() {
    let s = Scene::new("cron-by-hand");
    assert_eq!(s.apply(CRON), "cronjob.batch/tick created");
    assert_eq!(s.row("cronjob tick"), ["tick", "0", "0", "1", "1", "*", "Etc/UTC", "True", "0", "<none>"]);
    s.says("create job now --from=cronjob/tick", "job.batch/now created");
    s.says("wait --for=condition=complete job/now --timeout=20s", "job.batch/now condition met");
    let job = s.object("jobs/now");
    assert_eq!(job["metadata"]["annotations"]["cronjob.kubernetes.io/instantiate"], "manual");
    assert_eq!(owner(&job), "tick");
}

#[test]
fn a_cron_job_starts_what_is_due_and_keeps_so_many_that_ended() {
    let s = Scene::new("cron-history");
    s.apply(CRON);
    s.until("it is seen", "cronjobs/tick", |cron| !cron.is_null());
    assert!(s.list("jobs").is_empty(), "it is suspended");
    let mut last = String::new();
    for month in 1..=3 {
        comes_due(&s, month);
        last = s.wait("the next job, completed and the only one", || {
            let jobs = s.list("jobs");
            let complete = jobs.iter().all(|job| condition(job, "Complete")["status"] == "True");
            match jobs.as_slice() {
                [job] if complete && name(job) != last => Ok(name(job)),
                _ => Err(s.ok("get jobs")),
            }
        });
        s.until_event("SawCompletedJob", &format!("Saw completed job: {last}, condition: Complete"));
    }
    s.until_event("SuccessfulCreate", &format!("Created job {last}"));
    s.until("its end is noted", "cronjobs/tick", |cron| {
        cron["status"]["active"].is_null() && cron["status"]["lastSuccessfulTime"].is_string()
    });
    s.says("delete cronjob tick", "cronjob.batch \"tick\" deleted from cron-history namespace");
    s.wait("its jobs go with it", || if s.list("jobs").is_empty() { Ok(()) } else { Err(s.ok("get jobs")) });
}

#[test]
fn the_concurrency_policy_says_what_becomes_of_a_job_that_still_runs() {
    let s = Scene::new("cron-policy");
    s.apply(
        &CRON.replace("10ms", "1h").replace("suspend: true", "suspend: true\n  concurrencyPolicy: Forbid"),
    );
    comes_due(&s, 1);
    let active = |count: usize| {
        s.until(&format!("{count} active"), "cronjobs/tick", |cron| {
            cron["status"]["active"].as_array().map_or(0, Vec::len) == count && s.list("jobs").len() == count
        });
        s.list("jobs").iter().map(name).collect::<BTreeSet<_>>()
    };
    let first = active(1);
    comes_due(&s, 2);
    s.until_event("JobAlreadyActive", "prior execution is running and concurrency policy is Forbid");
    assert_eq!(active(1), first);
    patch_cron(&s, "", &json!({ "spec": { "concurrencyPolicy": "Replace" } }));
    s.until_event("SuccessfulDelete", &format!("Deleted job {}", first.first().expect("one")));
    let second = active(1);
    assert_ne!(second, first);
    patch_cron(&s, "", &json!({ "spec": { "concurrencyPolicy": "Allow" } }));
    comes_due(&s, 3);
    assert!(active(2).is_superset(&second));
    assert_eq!(s.row("cronjob tick")[6..9], ["Etc/UTC", "False", "2"]);
}
