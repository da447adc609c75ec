//! StatefulSets: names that stay, one after the other, claims that outlive their pods.

use std::collections::BTreeMap;

use crate::cluster::{Scene, image, is_ready, name, names, owner, text_of};
use serde_json::{Value, json};

const SET: &str = "
apiVersion: v1
kind: Service
metadata: {name: db}
spec: {clusterIP: None, selector: {app: db}, ports: [{port: 5432}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db}
spec:
  serviceName: db
  replicas: 3
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}, annotations: {simulated.knarr.dev/ready-delay: 100ms}}
    spec: {containers: [{name: c, image: 'db:1'}]}
";

fn ready(s: &Scene) -> Vec<String> {
    let mut pods = s.list("pods");
    pods.retain(is_ready);
    names(&pods)
}

/// Who is there must be the first so many, and all but the last of them ready.
fn assert_in_order(s: &Scene) {
    let pods = s.list("pods");
    let wanted: Vec<String> = (0..pods.len()).map(|ordinal| format!("db-{ordinal}")).collect();
    let unready = pods.iter().filter(|pod| !is_ready(pod)).map(name).max();
    assert_eq!(names(&pods), wanted);
    assert!(
        unready.is_none() || unready.as_deref() == wanted.last().map(String::as_str),
        "{}",
        s.ok("get pods")
    );
}

#[test]
fn pods_start_in_order_and_leave_in_reverse() {
    let s = Scene::new("sts-order");
    assert_eq!(s.apply(SET), "service/db created\nstatefulset.apps/db created");
    s.wait("3 ready pods, one after the other", || {
        assert_in_order(&s);
        if ready(&s).len() == 3 { Ok(()) } else { Err(s.ok("get pods")) }
    });
    s.until("3 ready", "statefulsets/db", |set| set["status"]["readyReplicas"] == 3);
    assert_eq!(s.row("sts db"), ["db", "3/3"]);
    let pod = s.object("pods/db-1");
    assert_eq!((&pod["spec"]["hostname"], &pod["spec"]["subdomain"]), (&"db-1".into(), &"db".into()));
    assert_eq!(pod["metadata"]["labels"]["statefulset.kubernetes.io/pod-name"], "db-1");
    assert_eq!(pod["metadata"]["labels"]["apps.kubernetes.io/pod-index"], "1");
    s.until_event("SuccessfulCreate", "create Pod db-2 in StatefulSet db successful");
    s.says("scale sts/db --replicas=1", "statefulset.apps/db scaled");
    s.wait("one pod is left, the others went from the end", || {
        assert_in_order(&s);
        if s.list("pods").len() == 1 { Ok(()) } else { Err(s.ok("get pods")) }
    });
    s.until_event("SuccessfulDelete", "delete Pod db-1 in StatefulSet db successful");
    s.ok("delete pod db-0");
    s.wait(
        "db-0 is back under its name",
        || if ready(&s) == ["db-0"] { Ok(()) } else { Err(s.ok("get pods")) },
    );
}

#[test]
fn parallel_pods_wait_for_nobody() {
    let s = Scene::new("sts-parallel");
    s.apply(
        &SET.replace("serviceName: db", "serviceName: db\n  podManagementPolicy: Parallel")
            .replace("100ms", "1h"),
    );
    s.until_pods("3 pods, none ready", "app=db", |pods| pods.len() == 3 && !pods.iter().any(is_ready));
}

#[test]
fn a_rolling_update_goes_backwards_each_ready_before_the_next() {
    let s = Scene::new("sts-roll");
    s.apply(SET);
    let lines = s.rollout("sts/db");
    assert!(
        lines.iter().any(|line| line.starts_with("Waiting for ") && line.ends_with(" pods to be ready...")),
        "{lines:#?}"
    );
    s.says("set image sts/db c=db:2", "statefulset.apps/db image updated");
    s.wait("3 new pods, the last first", || {
        let pods = s.list("pods");
        let new: Vec<_> = pods.iter().filter(|pod| image(pod) == "db:2").collect();
        let least = new.iter().map(|pod| name(pod)).min().unwrap_or_default();
        let unready = pods.iter().filter(|pod| !is_ready(pod)).count() + 3 - pods.len();
        let after_least = pods.iter().filter(|pod| name(pod) > least && !least.is_empty());
        assert!(unready <= 1 && after_least.clone().all(|pod| image(pod) == "db:2"), "{}", s.ok("get pods"));
        if new.len() == 3 && unready == 0 { Ok(()) } else { Err(s.ok("get pods")) }
    });
    let lines = s.rollout("sts/db");
    let last = lines.last().cloned().unwrap_or_default();
    assert!(last.starts_with("statefulset rolling update complete 3 pods at revision db-"), "{lines:#?}");
    s.says("rollout undo sts/db", "statefulset.apps/db rolled back");
    s.rollout("sts/db");
    assert!(s.until_ready(3, "app=db").iter().all(|pod| image(pod) == "db:1"));
}

#[test]
fn a_partition_holds_back_those_below_it_even_when_they_are_made_anew() {
    let s = Scene::new("sts-partition");
    let manifest =
        SET.replace("serviceName: db", "serviceName: db\n  updateStrategy: {rollingUpdate: {partition: 1}}");
    s.apply(&manifest);
    s.rollout("sts/db");
    s.apply(&manifest.replace("db:1", "db:2"));
    let lines = s.rollout("sts/db");
    assert_eq!(
        lines.last().map(String::as_str),
        Some("partitioned roll out complete: 2 new pods have been updated...")
    );
    let images = |s: &Scene| {
        let pods = s.until_ready(3, "app=db");
        (0..3)
            .map(|i| image(pods.iter().find(|pod| name(pod) == format!("db-{i}")).expect("all are there")))
            .collect::<Vec<_>>()
    };
    assert_eq!(images(&s), ["db:1", "db:2", "db:2"]);
    let old = text_of(&s.object("pods/db-0")["metadata"]["uid"]);
    s.ok("delete pod db-0");
    s.until("db-0 is another one", "pods/db-0", |pod| {
        is_ready(pod) && pod["metadata"]["uid"] != old.as_str()
    });
    assert_eq!(images(&s), ["db:1", "db:2", "db:2"]);
    s.says(
        r#"patch sts db -p '{"spec":{"updateStrategy":{"rollingUpdate":{"partition":0}}}}'"#,
        "statefulset.apps/db patched",
    );
    s.rollout("sts/db");
    assert_eq!(images(&s), ["db:2", "db:2", "db:2"]);
}

#[test]
fn with_on_delete_only_deleted_pods_are_made_anew() {
    let s = Scene::new("sts-on-delete");
    s.apply(&SET.replace("serviceName: db", "serviceName: db\n  updateStrategy: {type: OnDelete}"));
    s.until_ready(3, "app=db");
    s.ok("set image sts/db c=db:2");
    let told = s.fails("rollout status sts/db");
    assert_eq!(told.trim(), "error: rollout status is only available for RollingUpdate strategy type");
    s.ok("delete pod db-1");
    s.until("db-1 is back, of the new image", "pods/db-1", |pod| is_ready(pod) && image(pod) == "db:2");
    let old = s.pods("app=db").iter().filter(|pod| image(pod) == "db:1").count();
    assert_eq!(old, 2);
}

#[test]
fn orphaned_pods_are_adopted_as_they_are() {
    let s = Scene::new("sts-orphan");
    s.apply(SET);
    s.rollout("sts/db");
    let uids = |pods: &[Value]| {
        pods.iter().map(|pod| (name(pod), text_of(&pod["metadata"]["uid"]))).collect::<BTreeMap<_, _>>()
    };
    let before = uids(&s.until_ready(3, "app=db"));
    s.says("delete sts db --cascade=orphan", "statefulset.apps \"db\" deleted from sts-orphan namespace");
    s.until_pods("the pods belong to nobody", "app=db", |pods| pods.iter().all(|pod| owner(pod).is_empty()));
    s.apply(SET);
    s.until_pods("the pods are adopted", "app=db", |pods| pods.iter().all(|pod| owner(pod) == "db"));
    s.rollout("sts/db");
    assert_eq!(uids(&s.until_ready(3, "app=db")), before);
    assert_eq!(s.list("controllerrevisions").len(), 1);
}

/// No loop of ours binds claims to volumes: a volume plug-in is played here.
fn bind_claims(s: &Scene) {
    for claim in s.list("persistentvolumeclaims") {
        if !claim["spec"]["volumeName"].is_null() {
            continue;
        }
        let claimed = name(&claim);
        let volume = format!("{}-{claimed}", s.namespace);
        let (status, answer) = s.post("persistentvolumes", "", &json!({
            "apiVersion": "v1", "kind": "PersistentVolume", "metadata": { "name": volume },
            "spec": { "capacity": { "storage": "1Gi" }, "accessModes": ["ReadWriteOnce"], "hostPath": { "path": "/data" },
                "claimRef": { "namespace": s.namespace, "name": claimed, "uid": claim["metadata"]["uid"] } },
        }));
        assert_eq!(status, 201, "{answer}");
        let bound = json!({ "spec": { "volumeName": volume }, "metadata": { "annotations": { "pv.kubernetes.io/bind-completed": "yes" } } });
        s.ok(&format!("patch pvc {claimed} --type=merge -p '{bound}'"));
        s.ok(&format!(
            r#"patch pvc {claimed} --subresource=status --type=merge -p '{{"status":{{"phase":"Bound"}}}}'"#
        ));
    }
}

#[test]
fn claims_are_made_by_ordinal_and_outlive_their_pods() {
    let s = Scene::new("sts-claims");
    let manifest = SET
        .replace("replicas: 3", "replicas: 2")
        .replace("image: 'db:1'}", "image: 'db:1', volumeMounts: [{name: data, mountPath: /data}]}")
        + "  volumeClaimTemplates:\n  - metadata: {name: data}\n    spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Gi}}}\n";
    s.apply(&manifest);
    let claims = |count: usize| (0..count).map(|i| format!("data-db-{i}")).collect::<Vec<_>>();
    let both_ready = |what: &str| {
        s.wait(what, || {
            bind_claims(&s);
            if ready(&s).len() == 2 { Ok(()) } else { Err(s.ok("get pods,pvc")) }
        });
    };
    both_ready("2 ready pods with volumes");
    assert_eq!(names(&s.list("persistentvolumeclaims")), claims(2));
    let pod = s.object("pods/db-1");
    let volumes = pod["spec"]["volumes"].as_array().cloned().unwrap_or_default();
    assert!(
        volumes.iter().any(|v| v["name"] == "data" && v["persistentVolumeClaim"]["claimName"] == "data-db-1"),
        "{volumes:?}"
    );
    let uids = |s: &Scene| {
        let list = s.list("persistentvolumeclaims");
        let mut uids: Vec<String> = list.iter().map(|claim| text_of(&claim["metadata"]["uid"])).collect();
        uids.sort();
        uids
    };
    let before = uids(&s);
    s.ok("delete pod db-1");
    both_ready("db-1 is back");
    s.ok("scale sts/db --replicas=0");
    s.until_pods("no pods", "app=db", <[Value]>::is_empty);
    s.ok("scale sts/db --replicas=2");
    both_ready("both are back");
    assert_eq!(uids(&s), before, "the same claims");
    s.says("delete sts db", "statefulset.apps \"db\" deleted from sts-claims namespace");
    s.until_pods("the pods are gone", "app=db", <[Value]>::is_empty);
    assert_eq!(uids(&s), before, "claims stay");
    let retaining = manifest.replace(
        "serviceName: db",
        "serviceName: db\n  persistentVolumeClaimRetentionPolicy: {whenDeleted: Delete, whenScaled: Delete}",
    );
    s.apply(&retaining);
    both_ready("both are back");
    s.ok("scale sts/db --replicas=1");
    s.wait("one claim is left", || match names(&s.list("persistentvolumeclaims")) {
        left if left == claims(1) => Ok(()),
        _ => Err(format!("{:#?}", s.list("persistentvolumeclaims"))),
    });
    s.ok("delete sts db");
    s.wait("no claims are left", || match names(&s.list("persistentvolumeclaims")) {
        left if left.is_empty() => Ok(()),
        left => Err(format!("{left:?}")),
    });
}
