//! Pods as the control loops and the scheduler need them: without what only a node looks at (commands, environment,
//! probes, mounts, volumes that come from the node or the API). A decoded pod takes three times its JSON; this is most
//! of it. Never write such a pod back: loops change pods by patches.

use k8s_openapi::api::core::v1::{Container, Pod, Volume};

/// What `kubectl apply` sent, once more.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Drops from a pod what neither a control loop nor the scheduler reads.
pub fn pod(pod: &mut Pod) {
    pod.metadata.managed_fields = None;
    if let Some(annotations) = &mut pod.metadata.annotations {
        annotations.remove(LAST_APPLIED);
    }
    let Some(spec) = &mut pod.spec else { return };
    spec.containers.iter_mut().chain(spec.init_containers.iter_mut().flatten()).for_each(container);
    spec.ephemeral_containers = None;
    spec.dns_config = None;
    spec.host_aliases = None;
    spec.image_pull_secrets = None;
    spec.security_context = None;
    if let Some(volumes) = &mut spec.volumes {
        volumes.retain(|volume| !is_of_the_node(volume));
        volumes.shrink_to_fit();
    }
    spec.volumes.take_if(|volumes| volumes.is_empty());
}

fn container(container: &mut Container) {
    let Container { name, image, ports, resources, resize_policy, restart_policy, .. } =
        std::mem::take(container);
    *container =
        Container { name, image, ports, resources, resize_policy, restart_policy, ..Default::default() };
}

/// Whether the volume can be had on every node, so that nobody but the node need know of it.
fn is_of_the_node(volume: &Volume) -> bool {
    volume.config_map.is_some()
        || volume.secret.is_some()
        || volume.projected.is_some()
        || volume.downward_api.is_some()
        || volume.empty_dir.is_some()
        || volume.host_path.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_decides_where_a_pod_goes_and_whether_it_is_ready_stays() {
        let whole = json!({
            "metadata": {"name": "p", "annotations": {LAST_APPLIED: "{}", "a": "b"}},
            "spec": {
                "containers": [{
                    "name": "c", "image": "i", "command": ["sh"], "env": [{"name": "A", "value": "b"}],
                    "ports": [{"containerPort": 80, "name": "http"}],
                    "resources": {"requests": {"cpu": "1"}},
                    "volumeMounts": [{"name": "v", "mountPath": "/v"}],
                }],
                "initContainers": [{"name": "s", "restartPolicy": "Always", "args": ["x"]}],
                "volumes": [
                    {"name": "v", "emptyDir": {}}, {"name": "t", "projected": {}},
                    {"name": "d", "persistentVolumeClaim": {"claimName": "d"}},
                ],
            },
            "status": {"phase": "Running"},
        });
        let mut pod: Pod = serde_json::from_value(whole).unwrap();
        super::pod(&mut pod);
        let lean = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "p", "annotations": {"a": "b"}},
            "spec": {
                "containers": [{
                    "name": "c", "image": "i", "ports": [{"containerPort": 80, "name": "http"}],
                    "resources": {"requests": {"cpu": "1"}},
                }],
                "initContainers": [{"name": "s", "restartPolicy": "Always"}],
                "volumes": [{"name": "d", "persistentVolumeClaim": {"claimName": "d"}}],
            },
            "status": {"phase": "Running"},
        });
        assert_eq!(serde_json::to_value(pod).unwrap(), lean);
    }
}
