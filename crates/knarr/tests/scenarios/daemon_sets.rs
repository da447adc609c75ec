//! DaemonSets: a pod on each node that matches, node by node.

use crate::cluster::{Scene, count, image, is_ready, name, names, owner};
use serde_json::Value;

/// For the nodes of a scenario, whose taint its pods tolerate.
fn agent(s: &Scene) -> String {
    format!(
        "
apiVersion: apps/v1
kind: DaemonSet
metadata: {{name: agent}}
spec:
  selector: {{matchLabels: {{app: agent}}}}
  template:
    metadata: {{labels: {{app: agent}}, annotations: {{simulated.knarr.dev/ready-delay: 100ms}}}}
    spec:
      nodeSelector: {{pool: {}}}
      tolerations: [{{key: pool, operator: Exists}}]
      containers: [{{name: c, image: 'agent:1'}}]
",
        s.namespace
    )
}

fn nodes_of(pods: &[Value]) -> Vec<String> {
    let mut nodes: Vec<_> =
        pods.iter().map(|pod| crate::cluster::text_of(&pod["spec"]["nodeName"])).collect();
    nodes.sort();
    nodes
}

#[test]
fn a_daemon_set_follows_the_labels_of_nodes() {
    let s = Scene::new("ds-labels");
    let nodes = s.nodes(2);
    let manifest = agent(&s).replace("{pool: ds-labels}", "{rng: hw}");
    assert_eq!(s.apply(&manifest), "daemonset.apps/agent created");
    s.until("it is seen", "daemonsets/agent", |set| set["status"]["observedGeneration"] == 1);
    assert_eq!(s.row("ds agent"), ["agent", "0", "0", "0", "0", "0", "rng=hw"]);
    s.says("get pods", "No resources found in ds-labels namespace.");
    s.says(&format!("label node {} rng=hw", nodes[0]), &format!("node/{} labeled", nodes[0]));
    let pods = s.until_ready(1, "app=agent");
    assert_eq!(nodes_of(&pods), nodes[..1]);
    s.ok(&format!("label node {} rng=hw", nodes[1]));
    s.until_ready(2, "app=agent");
    s.until("2 available", "daemonsets/agent", |set| set["status"]["numberAvailable"] == 2);
    assert_eq!(s.row("ds agent"), ["agent", "2", "2", "2", "2", "2", "rng=hw"]);
    s.says(&format!("label node {} rng-", nodes[0]), &format!("node/{} unlabeled", nodes[0]));
    let pods = s.until_ready(1, "app=agent");
    assert_eq!(nodes_of(&pods), nodes[1..]);
    let lost = name(&pods[0]);
    s.ok(&format!("delete pod {lost}"));
    let pods = s.until_ready(1, "app=agent");
    assert!(name(&pods[0]) != lost && nodes_of(&pods) == nodes[1..], "{pods:#?}");
}

#[test]
fn a_new_node_gets_its_pod_and_tainted_ones_only_what_tolerates_them() {
    let s = Scene::new("ds-taints");
    let nodes = s.nodes(2);
    s.ok(&format!("taint node {} dedicated=db:NoSchedule", nodes[0]));
    s.says(&format!("cordon {}", nodes[1]), &format!("node/{} cordoned", nodes[1]));
    s.apply(&agent(&s));
    // What keeps others off a cordoned node does not keep off its daemons.
    let pods = s.until_ready(1, "app=agent");
    assert_eq!(nodes_of(&pods), nodes[1..]);
    s.apply(&agent(&s).replace("[{key: pool, operator: Exists}]", "[{operator: Exists}]"));
    assert_eq!(nodes_of(&s.until_ready(2, "app=agent")), nodes);
    s.rollout("ds/agent");
    s.ok(&format!("uncordon {}", nodes[1]));
    s.ok(&format!("delete node {}", nodes[0]));
    s.until_ready(1, "app=agent");
    s.nodes(1);
    assert_eq!(nodes_of(&s.until_ready(2, "app=agent")), nodes);
}

#[test]
fn a_rolling_update_goes_node_by_node_and_can_be_undone() {
    let s = Scene::new("ds-roll");
    let nodes = s.nodes(3);
    s.apply(&agent(&s));
    let done = "daemon set \"agent\" successfully rolled out";
    assert_eq!(s.rollout("ds/agent").last().map(String::as_str), Some(done));
    s.says("set image ds/agent c=agent:2", "daemonset.apps/agent image updated");
    let lines = std::thread::scope(|threads| {
        let status = threads.spawn(|| s.rollout("ds/agent"));
        s.wait("3 new pods, one node at a time", || {
            let pods = s.list("pods");
            let ready = pods.iter().filter(|pod| is_ready(pod)).count();
            assert!(ready >= 2 && pods.len() <= 3, "{}", s.ok("get pods -o wide"));
            let new = pods.iter().filter(|pod| image(pod) == "agent:2" && is_ready(pod)).count();
            if new == 3 { Ok(()) } else { Err(s.ok("get pods -o wide")) }
        });
        status.join().expect("rollout status ends")
    });
    let waiting = "Waiting for daemon set \"agent\" rollout to finish: ";
    let told = |end: &str| lines.iter().any(|line| line.starts_with(waiting) && line.ends_with(end));
    assert!(told(" out of 3 new pods have been updated..."), "{lines:#?}");
    assert_eq!(lines.last().map(String::as_str), Some(done));
    let told = s.fails("rollout pause ds/agent");
    assert_eq!(told.trim(), "error: daemonsets.apps \"agent\" pausing is not supported");
    let history = s.ok("rollout history ds/agent");
    assert!(history.starts_with("daemonset.apps/agent") && history.contains("\n2 "), "{history}");
    s.says("rollout undo ds/agent", "daemonset.apps/agent rolled back");
    s.rollout("ds/agent");
    let pods = s.until_ready(3, "app=agent");
    assert!(pods.iter().all(|pod| image(pod) == "agent:1") && nodes_of(&pods) == nodes);
    assert_eq!(s.list("controllerrevisions").len(), 2, "the old revision is used again");
}

#[test]
fn with_on_delete_only_deleted_pods_are_made_anew() {
    let s = Scene::new("ds-on-delete");
    let nodes = s.nodes(2);
    let manifest =
        agent(&s).replace("spec:\n  selector", "spec:\n  updateStrategy: {type: OnDelete}\n  selector");
    s.apply(&manifest);
    s.until_ready(2, "app=agent");
    s.ok("set image ds/agent c=agent:2");
    s.until("none is up to date", "daemonsets/agent", |set| {
        set["status"]["observedGeneration"] == 2 && count(&set["status"]["updatedNumberScheduled"]) == 0
    });
    let told = s.fails("rollout status ds/agent");
    assert_eq!(told.trim(), "error: rollout status is only available for RollingUpdate strategy type");
    let pods = s.until_ready(2, "app=agent");
    assert!(pods.iter().all(|pod| image(pod) == "agent:1"));
    let gone =
        pods.iter().find(|pod| pod["spec"]["nodeName"] == nodes[0].as_str()).expect("one on each node");
    s.ok(&format!("delete pod {}", name(gone)));
    s.until_pods("one of each image", "app=agent", |pods| {
        let images: Vec<_> = pods.iter().map(|pod| (pod["spec"]["nodeName"].clone(), image(pod))).collect();
        let has = |node: &String, image: &str| images.contains(&(node.as_str().into(), image.to_owned()));
        pods.len() == 2 && pods.iter().all(is_ready) && has(&nodes[0], "agent:2") && has(&nodes[1], "agent:1")
    });
}

#[test]
fn orphaned_daemons_stay_and_are_adopted() {
    let s = Scene::new("ds-orphan");
    s.nodes(2);
    s.apply(&agent(&s));
    let before = names(&s.until_ready(2, "app=agent"));
    s.says("delete ds agent --cascade=orphan", "daemonset.apps \"agent\" deleted from ds-orphan namespace");
    s.until_pods("the pods belong to nobody", "app=agent", |pods| {
        pods.iter().all(|pod| owner(pod).is_empty())
    });
    assert_eq!(names(&s.until_ready(2, "app=agent")), before);
    s.apply(&agent(&s));
    s.until_pods("the pods are adopted", "app=agent", |pods| pods.iter().all(|pod| owner(pod) == "agent"));
    s.rollout("ds/agent");
    assert_eq!(names(&s.pods("app=agent")), before);
    s.ok("delete ds agent");
    s.until_pods("the pods are gone", "app=agent", <[Value]>::is_empty);
}
