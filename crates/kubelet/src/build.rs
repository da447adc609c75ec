//! From a pod to CRI messages: the sandbox's configuration and each container's. Pure; what needs the machine or
//! the API (environment, mounts, image) has been looked up before.

use crate::config::KubeletConfig;
use crate::names;
use crate::resources;
use k8s_openapi::api::core::v1::{
    Container, EphemeralContainer, Pod, PodSecurityContext, PodSpec, SeccompProfile, SecurityContext,
};
use knarr_network::pod::{HostPort, Protocol};
use knarr_runtime::cri::v1;
use std::collections::HashMap;
use std::path::PathBuf;

/// Where the kubelet looks for seccomp profiles of pods, below its root directory.
const SECCOMP_DIR: &str = "seccomp";

/// The host's namespace, the pod's, or the container's own.
use v1::NamespaceMode::{Container as OwnNamespace, Node as HostNamespace, Pod as PodNamespace, Target};

/// What the sandbox of this pod is to be.
pub fn sandbox(
    pod: &Pod,
    config: &KubeletConfig,
    attempt: u32,
    dns: v1::DnsConfig,
    cgroup_parent: String,
) -> v1::PodSandboxConfig {
    let spec = pod.spec.clone().unwrap_or_default();
    let (namespace, name, uid) = (names::namespace(pod), names::name(pod), names::uid(pod));
    let host_network = spec.host_network.unwrap_or(false);
    let mut labels: HashMap<String, String> = pod.metadata.labels.clone().into_iter().flatten().collect();
    labels.extend(identity(pod));
    v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: name.to_owned(),
            namespace: namespace.to_owned(),
            uid: uid.to_owned(),
            attempt,
        }),
        hostname: if host_network { String::new() } else { crate::dns::hostname(pod, config).0 },
        log_directory: config.pod_log_dir(namespace, name, uid).display().to_string(),
        dns_config: Some(dns),
        port_mappings: port_mappings(&spec),
        labels,
        annotations: pod.metadata.annotations.clone().into_iter().flatten().collect(),
        linux: Some(v1::LinuxPodSandboxConfig {
            cgroup_parent,
            security_context: Some(sandbox_security(&spec, config)),
            sysctls: sysctls(spec.security_context.as_ref()),
            ..Default::default()
        }),
        windows: None,
    }
}

fn identity(pod: &Pod) -> [(String, String); 3] {
    [
        (names::POD_NAME.to_owned(), names::name(pod).to_owned()),
        (names::POD_NAMESPACE.to_owned(), names::namespace(pod).to_owned()),
        (names::POD_UID.to_owned(), names::uid(pod).to_owned()),
    ]
}

/// Every container's ports that are opened on the node.
pub fn host_ports(spec: &PodSpec) -> Result<Vec<HostPort>, String> {
    let mut out = Vec::new();
    if spec.host_network.unwrap_or(false) {
        return Ok(out);
    }
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    for port in containers.flat_map(|container| container.ports.iter().flatten()) {
        let Some(host_port) = port.host_port.filter(|port| *port > 0) else { continue };
        let number =
            |value: i32| u16::try_from(value).map_err(|_| format!("port {value} is not below 65536"));
        let host_ip = match port.host_ip.as_deref() {
            None | Some("") => None,
            Some(text) => Some(text.parse().map_err(|_| format!("hostIP {text:?} is not an address"))?),
        };
        out.push(HostPort {
            protocol: Protocol::from_api(port.protocol.as_deref())
                .map_err(|other| format!("protocol {other:?} is not TCP, UDP or SCTP"))?,
            host_port: number(host_port)?,
            container_port: number(port.container_port)?,
            host_ip,
        });
    }
    Ok(out)
}

fn port_mappings(spec: &PodSpec) -> Vec<v1::PortMapping> {
    let ports = host_ports(spec).unwrap_or_default();
    let map = |port: HostPort| v1::PortMapping {
        protocol: match port.protocol {
            Protocol::Tcp => v1::Protocol::Tcp as i32,
            Protocol::Udp => v1::Protocol::Udp as i32,
            Protocol::Sctp => v1::Protocol::Sctp as i32,
        },
        container_port: port.container_port.into(),
        host_port: port.host_port.into(),
        host_ip: port.host_ip.map(|ip| ip.to_string()).unwrap_or_default(),
    };
    ports.into_iter().map(map).collect()
}

fn sysctls(security: Option<&PodSecurityContext>) -> HashMap<String, String> {
    let sysctls = security.and_then(|security| security.sysctls.as_ref());
    // `kernel/shm_rmid_forced` is another spelling of `kernel.shm_rmid_forced`.
    sysctls
        .into_iter()
        .flatten()
        .map(|sysctl| (sysctl.name.replace('/', "."), sysctl.value.clone()))
        .collect()
}

fn namespaces(spec: &PodSpec, target: Option<&str>) -> v1::NamespaceOption {
    let of =
        |host: Option<bool>| if host.unwrap_or(false) { HostNamespace as i32 } else { PodNamespace as i32 };
    let pid = match target {
        Some(_) => Target as i32,
        None if spec.host_pid.unwrap_or(false) => HostNamespace as i32,
        None if spec.share_process_namespace.unwrap_or(false) => PodNamespace as i32,
        None => OwnNamespace as i32,
    };
    v1::NamespaceOption {
        network: of(spec.host_network),
        ipc: of(spec.host_ipc),
        pid,
        target_id: target.unwrap_or_default().to_owned(),
        userns_options: None,
    }
}

fn sandbox_security(spec: &PodSpec, config: &KubeletConfig) -> v1::LinuxSandboxSecurityContext {
    let security = spec.security_context.clone().unwrap_or_default();
    v1::LinuxSandboxSecurityContext {
        namespace_options: Some(namespaces(spec, None)),
        run_as_user: security.run_as_user.map(|value| v1::Int64Value { value }),
        run_as_group: security.run_as_group.map(|value| v1::Int64Value { value }),
        supplemental_groups: groups(&security),
        supplemental_groups_policy: groups_policy(&security),
        privileged: spec.containers.iter().chain(spec.init_containers.iter().flatten()).any(|container| {
            container.security_context.as_ref().and_then(|own| own.privileged) == Some(true)
        }),
        seccomp: Some(seccomp(
            security.seccomp_profile.as_ref(),
            config,
            v1::security_profile::ProfileType::RuntimeDefault,
        )),
        ..Default::default()
    }
}

fn groups(security: &PodSecurityContext) -> Vec<i64> {
    let mut out: Vec<i64> = security.fs_group.into_iter().collect();
    out.extend(security.supplemental_groups.iter().flatten());
    out
}

fn groups_policy(security: &PodSecurityContext) -> i32 {
    match security.supplemental_groups_policy.as_deref() {
        Some("Strict") => v1::SupplementalGroupsPolicy::Strict as i32,
        _ => v1::SupplementalGroupsPolicy::Merge as i32,
    }
}

fn seccomp(
    profile: Option<&SeccompProfile>,
    config: &KubeletConfig,
    default: v1::security_profile::ProfileType,
) -> v1::SecurityProfile {
    use v1::security_profile::ProfileType;
    let (kind, reference) = match profile.map(|profile| profile.type_.as_str()) {
        Some("RuntimeDefault") => (ProfileType::RuntimeDefault, String::new()),
        Some("Localhost") => {
            let name = profile.and_then(|profile| profile.localhost_profile.clone()).unwrap_or_default();
            (ProfileType::Localhost, config.root_dir.join(SECCOMP_DIR).join(name).display().to_string())
        }
        Some(_) => (ProfileType::Unconfined, String::new()),
        None => (default, String::new()),
    };
    v1::SecurityProfile { profile_type: kind as i32, localhost_ref: reference }
}

/// What a container is made from.
pub struct ContainerInput<'a> {
    pub pod: &'a Pod,
    pub container: &'a Container,
    pub attempt: u32,
    /// The image as the runtime found it, and as the pod asks for it.
    pub image_ref: String,
    pub env: Vec<(String, String)>,
    pub mounts: Vec<v1::Mount>,
    pub message_file: Option<PathBuf>,
    pub memory_capacity: i64,
    /// The id of the container whose processes an ephemeral container sees.
    pub target: Option<&'a str>,
    /// User of the image, needed when it must not be root: its uid, or its name.
    pub image_user: (Option<i64>, &'a str),
}

/// What the container is to be. The error is the message of `CreateContainerConfigError`.
pub fn container(input: &ContainerInput<'_>, config: &KubeletConfig) -> Result<v1::ContainerConfig, String> {
    let ContainerInput { pod, container, attempt, .. } = input;
    let spec = pod.spec.clone().unwrap_or_default();
    let pod_security = spec.security_context.clone().unwrap_or_default();
    let own = container.security_context.clone().unwrap_or_default();
    check_non_root(pod, container, &pod_security, &own, input.image_user)?;
    let known = |name: &str| input.env.iter().find(|(have, _)| have == name).map(|(_, value)| value.clone());
    let expand = |words: &Option<Vec<String>>| -> Vec<String> {
        words.iter().flatten().map(|word| crate::env::expand(word, known)).collect()
    };
    let mut labels: HashMap<String, String> = identity(pod).into();
    labels.insert(names::CONTAINER_NAME.to_owned(), container.name.clone());
    let image = container.image.clone().unwrap_or_default();
    Ok(v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: container.name.clone(), attempt: *attempt }),
        image: Some(v1::ImageSpec {
            image: input.image_ref.clone(),
            user_specified_image: image.clone(),
            ..Default::default()
        }),
        command: expand(&container.command),
        args: expand(&container.args),
        working_dir: container.working_dir.clone().unwrap_or_default(),
        envs: input
            .env
            .iter()
            .map(|(key, value)| v1::KeyValue { key: key.clone(), value: value.clone() })
            .collect(),
        mounts: input.mounts.clone(),
        devices: Vec::new(),
        labels,
        annotations: annotations(input, &image),
        log_path: format!("{}/{attempt}.log", container.name),
        stdin: container.stdin.unwrap_or(false),
        stdin_once: container.stdin_once.unwrap_or(false),
        tty: container.tty.unwrap_or(false),
        linux: Some(v1::LinuxContainerConfig {
            resources: Some(resources::container_resources(pod, container, input.memory_capacity)),
            security_context: Some(security(&spec, &pod_security, &own, config, input.target)),
        }),
        windows: None,
        cdi_devices: Vec::new(),
    })
}

fn annotations(input: &ContainerInput<'_>, image: &str) -> HashMap<String, String> {
    let container = input.container;
    let path = container.termination_message_path.as_deref().unwrap_or("/dev/termination-log");
    let policy = container.termination_message_policy.as_deref().unwrap_or("File");
    let mut out: HashMap<String, String> = [
        (names::CONTAINER_HASH, names::container_hash(&container.name, image)),
        (names::CONTAINER_RESTARTS, input.attempt.to_string()),
        (names::MESSAGE_PATH, path.to_owned()),
        (names::MESSAGE_POLICY, policy.to_owned()),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into();
    if let Some(file) = &input.message_file {
        out.insert(names::MESSAGE_FILE.to_owned(), file.display().to_string());
    }
    let grace = input.pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds);
    if let Some(grace) = grace {
        out.insert(names::POD_GRACE.to_owned(), grace.to_string());
    }
    out
}

/// `runAsNonRoot`: a container that would run as root is refused, in upstream's words.
fn check_non_root(
    pod: &Pod,
    container: &Container,
    pod_security: &PodSecurityContext,
    own: &SecurityContext,
    (image_uid, image_user): (Option<i64>, &str),
) -> Result<(), String> {
    if own.run_as_non_root.or(pod_security.run_as_non_root) != Some(true) {
        return Ok(());
    }
    let place = format!("(pod: \"{}\", container: {})", names::display(pod), container.name);
    match own.run_as_user.or(pod_security.run_as_user) {
        Some(0) => Err(format!("container's runAsUser breaks non-root policy {place}")),
        Some(_) => Ok(()),
        None if image_uid == Some(0) || (image_uid.is_none() && image_user.is_empty()) => {
            Err(format!("container has runAsNonRoot and image will run as root {place}"))
        }
        None if image_uid.is_some() => Ok(()),
        None => Err(format!(
            "container has runAsNonRoot and image has non-numeric user ({image_user}), cannot verify user is non-root {place}"
        )),
    }
}

fn security(
    spec: &PodSpec,
    pod: &PodSecurityContext,
    own: &SecurityContext,
    config: &KubeletConfig,
    target: Option<&str>,
) -> v1::LinuxContainerSecurityContext {
    let privileged = own.privileged.unwrap_or(false);
    let capabilities = own.capabilities.clone().unwrap_or_default();
    let adds_admin =
        capabilities.add.iter().flatten().any(|name| name == "CAP_SYS_ADMIN" || name == "SYS_ADMIN");
    let unmasked = own.proc_mount.as_deref() == Some("Unmasked");
    let apparmor = own.app_armor_profile.as_ref().or(pod.app_armor_profile.as_ref());
    v1::LinuxContainerSecurityContext {
        capabilities: Some(v1::Capability {
            add_capabilities: capabilities.add.unwrap_or_default(),
            drop_capabilities: capabilities.drop.unwrap_or_default(),
            add_ambient_capabilities: Vec::new(),
        }),
        privileged,
        namespace_options: Some(namespaces(spec, target)),
        run_as_user: own.run_as_user.or(pod.run_as_user).map(|value| v1::Int64Value { value }),
        run_as_group: own.run_as_group.or(pod.run_as_group).map(|value| v1::Int64Value { value }),
        readonly_rootfs: own.read_only_root_filesystem.unwrap_or(false),
        supplemental_groups: groups(pod),
        supplemental_groups_policy: groups_policy(pod),
        // Escalation may be taken away, but not from who is privileged already.
        no_new_privs: own.allow_privilege_escalation == Some(false) && !privileged && !adds_admin,
        masked_paths: if unmasked { Vec::new() } else { MASKED_PATHS.map(str::to_owned).to_vec() },
        readonly_paths: if unmasked { Vec::new() } else { READONLY_PATHS.map(str::to_owned).to_vec() },
        seccomp: Some(if privileged {
            seccomp(None, config, v1::security_profile::ProfileType::Unconfined)
        } else {
            let profile = own.seccomp_profile.as_ref().or(pod.seccomp_profile.as_ref());
            seccomp(profile, config, v1::security_profile::ProfileType::Unconfined)
        }),
        apparmor: apparmor.map(|profile| v1::SecurityProfile {
            profile_type: match profile.type_.as_str() {
                "Localhost" => v1::security_profile::ProfileType::Localhost as i32,
                "Unconfined" => v1::security_profile::ProfileType::Unconfined as i32,
                _ => v1::security_profile::ProfileType::RuntimeDefault as i32,
            },
            localhost_ref: profile.localhost_profile.clone().unwrap_or_default(),
        }),
        ..Default::default()
    }
}

/// Hidden in every container whose `procMount` is `Default` (`pkg/securitycontext/util.go`).
const MASKED_PATHS: [&str; 10] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/sys/firmware",
];
const READONLY_PATHS: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// The containers of a pod in the order they are looked after.
pub fn find_container(pod: &Pod, name: &str) -> Option<Container> {
    let spec = pod.spec.as_ref()?;
    let mut all = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    all.find(|container| container.name == name)
        .cloned()
        .or_else(|| find_ephemeral(pod, name).map(names::ordinary))
}

pub fn find_ephemeral<'a>(pod: &'a Pod, name: &str) -> Option<&'a EphemeralContainer> {
    pod.spec.as_ref()?.ephemeral_containers.iter().flatten().find(|container| container.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn build(
        pod_security: Value,
        container: Value,
        user: (Option<i64>, &str),
    ) -> Result<v1::ContainerConfig, String> {
        let pod: Pod =
            serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "n", "uid": "u"},
            "spec": {"securityContext": pod_security, "containers": [container]}}))
            .unwrap();
        let container = &pod.spec.as_ref().unwrap().containers[0];
        let input = ContainerInput {
            pod: &pod,
            container,
            attempt: 2,
            image_ref: "sha256:1".into(),
            env: vec![("A".into(), "x".into())],
            mounts: Vec::new(),
            message_file: None,
            memory_capacity: 1 << 30,
            target: None,
            image_user: user,
        };
        super::container(&input, &KubeletConfig::new("node"))
    }

    #[test]
    fn commands_are_expanded_and_logs_named_by_attempt() {
        let built = build(
            json!({}),
            json!({"name": "c", "command": ["sh", "$(A)"], "args": ["$$(A)"]}),
            (Some(0), ""),
        );
        let built = built.unwrap();
        assert_eq!((built.command, built.args), (vec!["sh".to_owned(), "x".into()], vec!["$(A)".to_owned()]));
        assert_eq!(built.log_path, "c/2.log");
        assert_eq!(built.labels[names::CONTAINER_NAME], "c");
    }

    #[test]
    fn root_is_refused_when_it_must_not_be() {
        let strict = || json!({"runAsNonRoot": true});
        let plain = || json!({"name": "c"});
        assert!(build(strict(), plain(), (Some(1000), "")).is_ok());
        let error = build(strict(), plain(), (Some(0), "")).unwrap_err();
        assert_eq!(
            error,
            "container has runAsNonRoot and image will run as root (pod: \"p_n(u)\", container: c)"
        );
        let error = build(strict(), plain(), (None, "app")).unwrap_err();
        assert!(error.contains("non-numeric user (app)"), "{error}");
        let own = json!({"name": "c", "securityContext": {"runAsUser": 0}});
        assert!(
            build(strict(), own, (Some(5), "")).unwrap_err().contains("runAsUser breaks non-root policy")
        );
    }

    #[test]
    fn security_of_the_container_wins_over_the_pods() {
        let built = build(
            json!({"runAsUser": 1, "fsGroup": 7, "supplementalGroups": [8]}),
            json!({"name": "c", "securityContext": {"runAsUser": 2, "allowPrivilegeEscalation": false,
                "capabilities": {"add": ["NET_ADMIN"], "drop": ["ALL"]}}}),
            (Some(0), ""),
        );
        let security = built.unwrap().linux.unwrap().security_context.unwrap();
        assert_eq!(security.run_as_user.unwrap().value, 2);
        assert_eq!(security.supplemental_groups, [7, 8]);
        assert!(security.no_new_privs);
        assert_eq!(security.capabilities.unwrap().drop_capabilities, ["ALL"]);
    }
}
