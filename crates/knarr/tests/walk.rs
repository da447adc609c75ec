//! A user's walk through a real cluster: real binary, real containers, real packets, a real kubectl.
//!
//! Needs root, the kernel's namespaces and the test images (`make images`); says so and ends without them,
//! except in CI, where their absence is a failure. Everything happens in a network namespace and a data
//! directory of its own and is proved gone at the end.

mod frame;

use frame::{Cluster, Place, knarr, ready};

const MANIFEST: &str = "
apiVersion: v1
kind: ConfigMap
metadata:
  name: settings
data:
  color: blue
---
apiVersion: v1
kind: Pod
metadata:
  name: client
spec:
  containers:
  - name: shell
    image: busybox
    imagePullPolicy: IfNotPresent
    command: [sleep, '3600']
    env:
    - name: COLOR
      valueFrom:
        configMapKeyRef: {name: settings, key: color}
";

#[test]
fn a_user_walks_through_a_cluster_with_the_machines_kubectl() {
    if ready("the walk with the machine's kubectl", &["kubectl", "curl"]) {
        walk("theirs", vec!["kubectl".into()]);
    }
}

#[test]
fn a_user_walks_through_a_cluster_with_knarr_kubectl() {
    if ready("the walk", &["curl"]) {
        walk("ours", vec![knarr().display().to_string(), "kubectl".into()]);
    }
}

fn walk(name: &str, kubectl: Vec<String>) {
    let mut c = Cluster::up(Place::new(name), kubectl, &[]);
    assert!(c.kubectl(&["get", "nodes"]).contains("Ready"));

    c.kubectl(&["create", "deployment", "web", "--image=nginx:latest"]);
    c.kubectl(&["patch", "deployment", "web", "-p", r#"{"spec":{"template":{"spec":{"containers":[{"name":"nginx","imagePullPolicy":"IfNotPresent"}],"terminationGracePeriodSeconds":1}}}}"#]);
    c.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"]);
    let wide = c.wait_for("one pod of web is left", &["get", "pods", "-l", "app=web", "-o", "wide"], |o| {
        o.lines().count() == 2
    });
    assert!(wide.contains("walker") && wide.contains("1/1"), "{wide}");
    assert!(c.kubectl(&["describe", "deployment", "web"]).contains("NewReplicaSet"));
    let pod = c.kubectl(&["get", "pods", "-l", "app=web", "-o", "jsonpath={.items[0].metadata.name}"]);
    assert!(c.kubectl(&["describe", "pod", &pod]).contains("Started"));
    assert!(c.kubectl(&["exec", &pod, "--", "cat", "/etc/hostname"]).contains(&pod));

    c.kubectl(&["expose", "deployment", "web", "--port=80", "--type=NodePort"]);
    let address = c.kubectl(&["get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"]);
    let port = c.kubectl(&["get", "service", "web", "-o", "jsonpath={.spec.ports[0].nodePort}"]);
    let page = c.wait("the service answers", || c.get(&format!("http://{address}/")));
    assert!(page.contains("nginx"), "{page}");
    let node = c.kubectl(&["get", "nodes", "-o", "jsonpath={.items[0].status.addresses[0].address}"]);
    assert!(c.wait("the node port answers", || c.get(&format!("http://{node}:{port}/"))).contains("nginx"));
    c.wait_for("the request is in the log", &["logs", &pod], |o| o.contains("GET /"));

    assert!(c.apply(MANIFEST).contains("pod/client created"));
    c.kubectl(&["wait", "--for=condition=Ready", "pod/client", "--timeout=60s"]);
    assert!(c.apply(MANIFEST).contains("pod/client unchanged"));
    assert!(
        c.apply(&MANIFEST.replace("color: blue", "color: green")).contains("configmap/settings configured")
    );
    assert_eq!(c.kubectl(&["exec", "client", "--", "sh", "-c", "echo $COLOR"]).trim(), "blue");
    for name in ["web", "web.default", "web.default.svc.cluster.local"] {
        let url = format!("http://{name}/");
        c.wait_for(
            "another pod reaches the service by name",
            &["exec", "client", "--", "wget", "-qO-", &url],
            |o| o.contains("nginx"),
        );
    }

    c.kubectl(&["scale", "deployment", "web", "--replicas=5"]);
    c.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"]);
    c.kubectl(&["delete", "pod", &pod, "--wait=false"]);
    c.wait_for("a deleted pod is replaced", &["get", "pods", "-l", "app=web"], |o| {
        !o.contains(&pod) && o.matches("1/1").count() == 5
    });

    c.kubectl(&["set", "image", "deployment/web", "nginx=nginx:next"]);
    c.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"]);
    assert!(
        c.wait("the new version answers", || c.get(&format!("http://{address}/"))).contains("next version")
    );
    assert!(c.kubectl(&["rollout", "history", "deployment/web"]).contains("REVISION"));
    c.kubectl(&["rollout", "undo", "deployment/web"]);
    c.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"]);
    assert!(
        !c.wait("the old version answers", || c.get(&format!("http://{address}/"))).contains("next version")
    );

    let page = c.forwarded("deployment/web");
    assert!(page.contains("nginx"), "{page}");
    survives_a_kill(&c, &address);

    c.kubectl(&["delete", "deployment,service", "web"]);
    c.kubectl(&["delete", "pod", "client", "--grace-period=1"]);
    c.wait_for("all pods are gone", &["get", "pods", "-o", "name"], |o| o.trim().is_empty());
    let verified = c.down();
    assert!(verified.contains("Nothing is left."), "{verified}");
}

/// `kill -9` of knarr: containers keep serving, and the next process adopts them with no restart.
fn survives_a_kill(c: &Cluster, address: &str) {
    let restarts = |c: &Cluster| {
        c.kubectl(&["get", "pods", "-o", "jsonpath={range .items[*]}{.metadata.name} {.status.containerStatuses[0].containerID} {.status.containerStatuses[0].restartCount}{\"\\n\"}{end}"])
    };
    let before = c.wait("all pods are settled", || {
        let pods = c.kubectl(&["get", "pods"]);
        (!pods.contains("Terminating") && pods.matches("1/1").count() == 6).then(|| restarts(c))
    });
    c.kill(address);
    let after = c.wait("all pods are known again", || {
        let pods = c.kubectl(&["get", "pods"]);
        (pods.matches("1/1").count() == 6).then(|| restarts(c))
    });
    assert_eq!(before, after, "no container was replaced or restarted");
    c.kubectl(&["scale", "deployment", "web", "--replicas=6"]);
    c.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"]);
}
