//! Rolling updates of Deployments: their lines and bounds, pause and resume, history and undo, a bad image.

use crate::cluster::{Scene, condition, count, image, is_ready, names};
use crate::deployments::{DONE, WEB, set_of};
use serde_json::Value;

/// What to add to the template of [`WEB`] to make its pods fail to start, as with an image that does not exist.
const BAD: &str = "simulated.knarr.dev/start-failure-chance: '1'";

fn bad(manifest: &str) -> String {
    manifest.replace("simulated.knarr.dev/ready-delay: 100ms", BAD).replace("web:1", "web:bad")
}

#[test]
fn a_rolling_update_tells_its_progress_and_keeps_its_bounds() {
    let s = Scene::new("roll-progress");
    let manifest = WEB
        .replace("replicas: 3", "replicas: 5\n  strategy: {rollingUpdate: {maxSurge: 1, maxUnavailable: 2}}")
        .replace("100ms", "300ms");
    s.apply(&manifest);
    s.rollout("deploy/web");
    s.until_ready(5, "app=web");
    s.says("set image deploy/web c=web:2", "deployment.apps/web image updated");
    let lines = std::thread::scope(|threads| {
        let status = threads.spawn(|| s.rollout("deploy/web"));
        s.wait("5 new pods within the bounds", || {
            let pods = s.pods("app=web");
            let ready = pods.iter().filter(|pod| is_ready(pod)).count();
            assert!(pods.len() <= 6 && ready >= 3, "{}", s.ok("get pods"));
            let new = pods.iter().filter(|pod| image(pod) == "web:2" && is_ready(pod)).count();
            if new == 5 { Ok(()) } else { Err(s.ok("get pods")) }
        });
        status.join().expect("rollout status ends")
    });
    let says =
        |start: &str, end: &str| lines.iter().any(|line| line.starts_with(start) && line.ends_with(end));
    let waiting = "Waiting for deployment \"web\" rollout to finish: ";
    assert!(says(waiting, " out of 5 new replicas have been updated..."), "{lines:#?}");
    assert!(
        says(waiting, " old replicas are pending termination...")
            || says(waiting, " of 5 updated replicas are available..."),
        "{lines:#?}"
    );
    assert_eq!(lines.last().map(String::as_str), Some(DONE));
    assert_eq!(set_of(&s, "web:1")["spec"]["replicas"], 0);
    assert_eq!(s.row("deploy web"), ["web", "5/5", "5", "5"]);
    let told = s.ok("describe deploy web");
    for part in [
        "5 desired | 5 updated | 5 total | 5 available | 0 unavailable",
        "2 max unavailable, 1 max surge",
        "NewReplicaSetAvailable",
    ] {
        assert!(told.contains(part), "{part} is missing: {told}");
    }
}

#[test]
fn pods_count_as_available_only_after_their_minimum_time() {
    let s = Scene::new("roll-min-ready");
    s.apply(&WEB.replace("replicas: 3", "replicas: 2\n  minReadySeconds: 2"));
    s.until("2 ready, none available", "deployments/web", |deployment| {
        deployment["status"]["readyReplicas"] == 2 && count(&deployment["status"]["availableReplicas"]) == 0
    });
    assert_eq!(s.rollout("deploy/web").last().map(String::as_str), Some(DONE));
    assert_eq!(s.row("deploy web"), ["web", "2/2", "2", "2"]);
}

#[test]
fn a_paused_deployment_gathers_changes_and_rolls_them_out_once_when_resumed() {
    let s = Scene::new("roll-pause");
    s.apply(WEB);
    s.rollout("deploy/web");
    s.says("rollout pause deploy/web", "deployment.apps/web paused");
    assert_eq!(
        s.fails("rollout pause deploy/web").trim(),
        "error: deployments.apps \"web\" is already paused"
    );
    s.ok("set image deploy/web c=web:2");
    s.ok("set env deploy/web COLOR=blue");
    s.until("the changes are seen", "deployments/web", |deployment| {
        deployment["status"]["observedGeneration"] == deployment["metadata"]["generation"]
            && condition(deployment, "Progressing")["reason"] == "DeploymentPaused"
    });
    assert_eq!(s.list("replicasets").len(), 1);
    assert!(s.pods("app=web").iter().all(|pod| image(pod) == "web:1"));
    let told = s.fails("rollout undo deploy/web");
    assert!(told.starts_with("error: you cannot rollback a paused deployment; resume it first"), "{told}");
    // Scaling is not held up.
    s.ok("scale deploy/web --replicas=4");
    s.until_ready(4, "app=web");
    s.says("rollout resume deploy/web", "deployment.apps/web resumed");
    assert_eq!(s.fails("rollout resume deploy/web").trim(), "error: deployments.apps \"web\" is not paused");
    assert_eq!(s.rollout("deploy/web").last().map(String::as_str), Some(DONE));
    let pods = s.until_ready(4, "app=web");
    assert!(pods.iter().all(|pod| image(pod) == "web:2"));
    assert_eq!(s.list("replicasets").len(), 2, "one new set for both changes");
}

#[test]
fn history_tells_the_causes_and_undo_goes_back_to_any_revision() {
    let s = Scene::new("roll-history");
    s.apply(WEB);
    s.rollout("deploy/web");
    for version in 2..=3 {
        s.ok(&format!("set image deploy/web c=web:{version}"));
        s.says(
            &format!("annotate deploy/web 'kubernetes.io/change-cause=version {version}' --overwrite"),
            "deployment.apps/web annotated",
        );
        s.rollout("deploy/web");
    }
    let history = |s: &Scene| {
        let text = s.ok("rollout history deploy/web");
        text.trim_end().lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>()
    };
    s.wait("the causes are on the sets", || {
        let lines = history(&s);
        let wanted = [
            "deployment.apps/web",
            "REVISION  CHANGE-CAUSE",
            "1         <none>",
            "2         version 2",
            "3         version 3",
        ];
        if lines == wanted { Ok(()) } else { Err(format!("{lines:#?}")) }
    });
    let told = s.ok("rollout history deploy/web --revision=2");
    assert!(told.starts_with("deployment.apps/web with revision #2\nPod Template:\n"), "{told}");
    assert!(told.contains("web:2"), "{told}");

    s.says("rollout undo deploy/web", "deployment.apps/web rolled back");
    assert_eq!(s.rollout("deploy/web").last().map(String::as_str), Some(DONE));
    assert!(s.until_ready(3, "app=web").iter().all(|pod| image(pod) == "web:2"));
    s.wait("revision 2 has become 4", || {
        let lines = history(&s);
        let wanted = ["1         <none>", "3         version 3", "4         version 2"];
        if lines[2..] == wanted { Ok(()) } else { Err(format!("{lines:#?}")) }
    });
    s.says("rollout undo deploy/web --to-revision=1", "deployment.apps/web rolled back");
    s.rollout("deploy/web");
    assert!(s.until_ready(3, "app=web").iter().all(|pod| image(pod) == "web:1"));
    let told = s.fails("rollout undo deploy/web --to-revision=42");
    assert_eq!(told.trim(), "error: unable to find specified revision 42 in history");
    s.says(
        "rollout undo deploy/web --to-revision=5",
        "deployment.apps/web skipped rollback (current template already matches revision 5)",
    );
}

#[test]
fn old_sets_beyond_the_limit_of_history_are_gone_for_good() {
    let s = Scene::new("roll-limit");
    let manifest = WEB.replace("replicas: 3", "replicas: 1\n  revisionHistoryLimit: 1");
    for version in 1..=3 {
        s.apply(&manifest.replace("web:1", &format!("web:{version}")));
        s.rollout("deploy/web");
    }
    s.wait("two sets are left", || match s.list("replicasets").len() {
        2 => Ok(()),
        _ => Err(s.ok("get rs -o wide")),
    });
    let told = s.fails("rollout undo deploy/web --to-revision=1");
    assert_eq!(told.trim(), "error: unable to find specified revision 1 in history");
}

#[test]
fn a_bad_image_stalls_while_the_old_pods_serve_and_undo_mends_it() {
    let s = Scene::new("roll-bad-image");
    // The deadline comes with the bad image: a busy machine may take longer than that for the good one.
    let manifest = WEB.replace("replicas: 3", "replicas: 3\n  progressDeadlineSeconds: 2");
    s.apply(WEB);
    s.rollout("deploy/web");
    let before = names(&s.until_ready(3, "app=web"));
    assert_eq!(s.apply(&bad(&manifest)), "deployment.apps/web configured");
    let told = s.fails("rollout status deploy/web");
    assert!(
        told.contains(
            "Waiting for deployment \"web\" rollout to finish: 1 out of 3 new replicas have been updated..."
        ) && told.ends_with("error: deployment \"web\" exceeded its progress deadline\n"),
        "{told}"
    );
    let deployment = s.object("deployments/web");
    let (progressing, available) =
        (condition(&deployment, "Progressing"), condition(&deployment, "Available"));
    assert_eq!(
        (&progressing["status"], &progressing["reason"]),
        (&Value::from("False"), &Value::from("ProgressDeadlineExceeded"))
    );
    let message = progressing["message"].as_str().unwrap_or_default();
    assert!(
        message.starts_with("ReplicaSet \"web-") && message.ends_with("\" has timed out progressing."),
        "{message}"
    );
    assert_eq!(available["status"], "True");
    assert_eq!(s.row("deploy web"), ["web", "3/3", "1", "3"]);
    let pods = s.ok("get pods --no-headers");
    assert!(pods.contains("ImagePullBackOff") || pods.contains("ErrImagePull"), "{pods}");
    assert!(before.iter().all(|pod| pods.contains(pod)), "{pods}");

    s.says("rollout undo deploy/web", "deployment.apps/web rolled back");
    assert_eq!(s.rollout("deploy/web").last().map(String::as_str), Some(DONE));
    assert_eq!(names(&s.until_ready(3, "app=web")), before, "the old pods never went");
    s.until("progress is told", "deployments/web", |deployment| {
        condition(deployment, "Progressing")["reason"] == "NewReplicaSetAvailable"
    });
}

#[test]
fn a_good_update_replaces_a_stalled_one() {
    let s = Scene::new("roll-over");
    s.apply(WEB);
    s.rollout("deploy/web");
    s.apply(&bad(WEB));
    s.wait("a pod that does not start", || match s.ok("get pods") {
        pods if pods.contains("ImagePull") => Ok(()),
        pods => Err(pods),
    });
    s.apply(&WEB.replace("web:1", "web:3"));
    s.rollout("deploy/web");
    let pods = s.until_ready(3, "app=web");
    assert!(pods.iter().all(|pod| image(pod) == "web:3"));
}
