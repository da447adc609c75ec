//! How things of a pod are called: labels of containers, directories, log files. Other programs rely on these
//! names (crictl, log collectors), so they are upstream's (`pkg/kubelet/types/labels.go`, `kuberuntime/logs`).

use crate::config::KubeletConfig;
use k8s_openapi::api::core::v1::{EphemeralContainer, Pod};
use sha2::{Digest, Sha256};
use std::path::PathBuf;

pub const POD_NAME: &str = "io.kubernetes.pod.name";
pub const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
pub const POD_UID: &str = "io.kubernetes.pod.uid";
pub const CONTAINER_NAME: &str = "io.kubernetes.container.name";
pub const CONTAINER_HASH: &str = "io.kubernetes.container.hash";
pub const CONTAINER_RESTARTS: &str = "io.kubernetes.container.restartCount";
pub const MESSAGE_PATH: &str = "io.kubernetes.container.terminationMessagePath";
pub const MESSAGE_POLICY: &str = "io.kubernetes.container.terminationMessagePolicy";
/// Where the message file lies on the node; ours, so that any runtime can be read the same way.
pub const MESSAGE_FILE: &str = "io.knarr.container.terminationMessageFile";
pub const POD_GRACE: &str = "io.kubernetes.pod.terminationGracePeriod";

/// A pod's namespace, name and uid, all present on every pod the API serves.
pub fn namespace(pod: &Pod) -> &str {
    pod.metadata.namespace.as_deref().unwrap_or("default")
}

pub fn name(pod: &Pod) -> &str {
    pod.metadata.name.as_deref().unwrap_or_default()
}

pub fn uid(pod: &Pod) -> &str {
    pod.metadata.uid.as_deref().unwrap_or_default()
}

/// `name_namespace(uid)`, as messages name pods.
pub fn display(pod: &Pod) -> String {
    format!("{}_{}({})", name(pod), namespace(pod), uid(pod))
}

/// What decides that a running container is not the one the pod wants any more: its name and image. Everything
/// else of a container is immutable, or is changed in place.
pub fn container_hash(name: &str, image: &str) -> String {
    let digest = Sha256::digest(format!("{name}\0{image}"));
    digest[..4].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An ephemeral container as an ordinary one: the same fields, less those it may not have.
pub fn ordinary(ephemeral: &EphemeralContainer) -> k8s_openapi::api::core::v1::Container {
    k8s_openapi::api::core::v1::Container {
        name: ephemeral.name.clone(),
        args: ephemeral.args.clone(),
        command: ephemeral.command.clone(),
        env: ephemeral.env.clone(),
        env_from: ephemeral.env_from.clone(),
        image: ephemeral.image.clone(),
        image_pull_policy: ephemeral.image_pull_policy.clone(),
        security_context: ephemeral.security_context.clone(),
        stdin: ephemeral.stdin,
        stdin_once: ephemeral.stdin_once,
        termination_message_path: ephemeral.termination_message_path.clone(),
        termination_message_policy: ephemeral.termination_message_policy.clone(),
        tty: ephemeral.tty,
        volume_mounts: ephemeral.volume_mounts.clone(),
        working_dir: ephemeral.working_dir.clone(),
        ..Default::default()
    }
}

impl KubeletConfig {
    pub(crate) fn pods_dir(&self) -> PathBuf {
        self.root_dir.join("pods")
    }

    pub(crate) fn pod_dir(&self, uid: &str) -> PathBuf {
        self.pods_dir().join(uid)
    }

    pub(crate) fn volume_dir(&self, uid: &str, plugin: &str, volume: &str) -> PathBuf {
        self.pod_dir(uid).join("volumes").join(format!("kubernetes.io~{plugin}")).join(volume)
    }

    pub(crate) fn container_dir(&self, uid: &str, container: &str) -> PathBuf {
        self.pod_dir(uid).join("containers").join(container)
    }

    pub(crate) fn pod_log_dir(&self, namespace: &str, name: &str, uid: &str) -> PathBuf {
        self.log_dir.join(format!("{namespace}_{name}_{uid}"))
    }

    pub(crate) fn container_log_link(
        &self,
        namespace: &str,
        name: &str,
        container: &str,
        id: &str,
    ) -> Option<PathBuf> {
        let dir = self.log_link_dir.as_ref()?;
        Some(dir.join(format!("{name}_{namespace}_{container}-{id}.log")))
    }
}
