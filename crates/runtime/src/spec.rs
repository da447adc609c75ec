//! From a CRI container config to an OCI runtime spec (`config.json`). Values in, value out: everything that needs
//! the host (user names, device numbers) has been looked up before and comes in [`Input`].
//!
//! Defaults are containerd's, because images and charts are written against them.

use std::path::Path;

use k8s_cri::v1;
use serde_json::{Value, json};

use crate::cgroup::DeviceRule;
use crate::error::{Error, Result};
use crate::host::HostLimits;
use crate::user::User;

/// The path a process searches for commands when neither image nor pod sets one.
pub const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Docker's default capabilities, which Kubernetes users expect.
const DEFAULT_CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// In the kernel's numbering.
const ALL_CAPABILITIES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

const MASKED_PATHS: [&str; 10] = [
    "/proc/acpi",
    "/proc/asound",
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

/// What a spec is made from.
pub struct Input<'a> {
    pub config: &'a v1::ContainerConfig,
    pub image: &'a ImageDefaults,
    pub user: &'a User,
    pub namespaces: &'a Namespaces,
    pub hostname: &'a str,
    /// Files every container of the sandbox sees (hostname, resolv.conf, shm), unless the pod mounts its own there.
    pub sandbox_mounts: &'a [v1::Mount],
    pub devices: &'a [HostDevice],
    /// Directories under `/sys/fs/cgroup` in the container, by name; sources as the container's maker sees them.
    pub cgroup_mounts: &'a [(String, String)],
    pub cgroup_path: &'a str,
    pub limits: HostLimits,
    /// An OCI seccomp section, if the container is to be confined.
    pub seccomp: Option<Value>,
}

/// What an image says about the process run from it.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ImageDefaults {
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    pub env: Vec<String>,
    pub working_dir: String,
    pub user: String,
    pub stop_signal: String,
}

/// Which namespaces the container joins or gets. `None` in an option: the host's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Namespaces {
    pub network: Option<String>,
    pub ipc: Option<String>,
    pub uts: Option<String>,
    pub pid: PidNamespace,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum PidNamespace {
    #[default]
    Own,
    Host,
    Path(String),
}

/// A device of the host to show in the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostDevice {
    pub container_path: String,
    pub rule: DeviceRule,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

/// Builds the spec.
///
/// Fails with [`crate::Kind::InvalidArgument`] when there is no command to run, when a mount or working directory
/// is not absolute, or an environment name is empty.
pub fn generate(input: &Input<'_>) -> Result<Value> {
    let linux = input.config.linux.clone().unwrap_or_default();
    let security = linux.security_context.unwrap_or_default();
    let resources = linux.resources.unwrap_or_default();
    let mut spec = json!({
        "ociVersion": "1.2.0",
        "hostname": Value::Null,
        "root": { "path": "rootfs", "readonly": security.readonly_rootfs },
        "process": process(input, &security, &resources)?,
        "mounts": mounts(input, &security)?,
        "linux": {
            "namespaces": namespaces(input.namespaces),
            "cgroupsPath": input.cgroup_path,
            "devices": devices(input.devices),
            "maskedPaths": paths(&security, &security.masked_paths, &MASKED_PATHS),
            "readonlyPaths": paths(&security, &security.readonly_paths, &READONLY_PATHS),
        },
    });
    if input.namespaces.uts.is_none() {
        // In the host's UTS namespace a hostname must not be set.
        spec.as_object_mut().expect("built as an object above").remove("hostname");
    } else {
        spec["hostname"] = input.hostname.into();
    }
    if let Some(seccomp) = &input.seccomp {
        spec["linux"]["seccomp"] = seccomp.clone();
    }
    if has_option(&spec["mounts"], "rshared") {
        // Otherwise the whole file system becomes a slave of the host's, and nothing goes back.
        spec["linux"]["rootfsPropagation"] = "shared".into();
    }
    Ok(spec)
}

/// Replaces the sources of binds of host paths that are not bidirectional by `staged(index)`; returns the sources
/// in that order, each with whether it follows the host's later mounts.
pub fn stage_mounts(spec: &mut Value, staged: impl Fn(usize) -> String) -> Vec<(String, bool)> {
    let mut out = Vec::new();
    for mount in spec["mounts"].as_array_mut().into_iter().flatten() {
        let has = |name: &str| has_option(&json!([mount]), name);
        let (private, slave) = (has("rprivate"), has("rslave"));
        if !private && !slave {
            continue;
        }
        let source = mount["source"].as_str().unwrap_or_default().to_owned();
        mount["source"] = staged(out.len()).into();
        out.push((source, slave));
    }
    out
}

fn has_option(mounts: &Value, name: &str) -> bool {
    let mounts = mounts.as_array().into_iter().flatten();
    mounts.flat_map(|mount| mount["options"].as_array().into_iter().flatten()).any(|option| option == name)
}

/// The process that an exec runs: the container's own, with another command, and a terminal or none.
pub fn exec_process(spec: &Value, command: &[String], terminal: bool) -> Value {
    let mut process = spec["process"].clone();
    process["args"] = json!(command);
    process["terminal"] = json!(terminal);
    if terminal && !has_env(&process, "TERM=") {
        process["env"].as_array_mut().expect("env is always a list").push("TERM=xterm".into());
    }
    process
}

fn has_env(process: &Value, prefix: &str) -> bool {
    let Some(env) = process["env"].as_array() else { return false };
    env.iter().any(|entry| entry.as_str().is_some_and(|entry| entry.starts_with(prefix)))
}

fn process(
    input: &Input<'_>,
    security: &v1::LinuxContainerSecurityContext,
    resources: &v1::LinuxContainerResources,
) -> Result<Value> {
    let open_files = input.limits.open_files_max;
    let mut process = json!({
        "terminal": input.config.tty,
        "args": arguments(input.config, input.image)?,
        "env": environment(input)?,
        "cwd": working_dir(input)?,
        "user": {
            "uid": input.user.uid,
            "gid": input.user.gid,
            "additionalGids": input.user.groups,
        },
        "capabilities": capabilities(security, &input.limits)?,
        "oomScoreAdj": resources.oom_score_adj.max(input.limits.oom_score_adj_min),
        "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": open_files, "soft": open_files }],
    });
    if security.no_new_privs {
        // Absent, not false, otherwise: libcontainer loads seccomp filters before dropping privileges only then.
        process["noNewPrivileges"] = true.into();
    }
    if let Some(profile) = apparmor_profile(security)? {
        process["apparmorProfile"] = profile.into();
    }
    Ok(process)
}

/// Kubernetes: `command` replaces the entrypoint and drops the image's `cmd`; `args` replaces `cmd`.
fn arguments(config: &v1::ContainerConfig, image: &ImageDefaults) -> Result<Vec<String>> {
    let mut arguments;
    if config.command.is_empty() {
        arguments = image.entrypoint.clone();
        arguments.extend_from_slice(if config.args.is_empty() { &image.cmd } else { &config.args });
    } else {
        arguments = config.command.clone();
        arguments.extend_from_slice(&config.args);
    }
    if arguments.first().is_none_or(String::is_empty) {
        return Err(Error::invalid("no command specified"));
    }
    Ok(arguments)
}

fn environment(input: &Input<'_>) -> Result<Vec<String>> {
    let mut env: Vec<String> = vec![format!("HOSTNAME={}", input.hostname)];
    let mut set = |entry: String| {
        let name = entry.split('=').next().unwrap_or_default().to_owned();
        env.retain(|have| have.split('=').next() != Some(name.as_str()));
        env.push(entry);
    };
    if input.config.tty {
        set("TERM=xterm".into());
    }
    set(DEFAULT_PATH.into());
    set(format!("HOME={}", input.user.home));
    input.image.env.iter().filter(|entry| entry.contains('=')).cloned().for_each(&mut set);
    for entry in &input.config.envs {
        if entry.key.is_empty() || entry.key.contains(['=', '\0']) || entry.value.contains('\0') {
            return Err(Error::invalid(format!("environment variable name {:?} is invalid", entry.key)));
        }
        set(format!("{}={}", entry.key, entry.value));
    }
    Ok(env)
}

fn working_dir(input: &Input<'_>) -> Result<String> {
    let wanted =
        [&input.config.working_dir, &input.image.working_dir].into_iter().find(|dir| !dir.is_empty());
    let dir = wanted.map_or("/", String::as_str);
    if !dir.starts_with('/') {
        return Err(Error::invalid(format!("working directory {dir:?} must be an absolute path")));
    }
    Ok(dir.to_owned())
}

fn capabilities(security: &v1::LinuxContainerSecurityContext, limits: &HostLimits) -> Result<Value> {
    let set = capability_names(security, limits)?;
    let mut value = json!({ "bounding": set, "effective": set, "permitted": set });
    let ambient = plain(&security.capabilities.clone().unwrap_or_default().add_ambient_capabilities)?;
    if !ambient.is_empty() && !security.privileged {
        value["inheritable"] = json!(ambient);
        value["ambient"] = json!(ambient);
    }
    Ok(value)
}

/// The capabilities a container gets: docker's default set with what the pod adds and drops, or all.
///
/// What the host does not let us pass on is left out, as containerd does it.
pub fn capability_names(
    security: &v1::LinuxContainerSecurityContext,
    limits: &HostLimits,
) -> Result<Vec<String>> {
    let ours = |name: &str| {
        let number = ALL_CAPABILITIES.iter().position(|have| *have == name);
        number.is_some_and(|number| limits.capabilities >> number & 1 == 1)
    };
    let all =
        || ALL_CAPABILITIES.map(str::to_owned).into_iter().filter(|name| ours(name)).collect::<Vec<_>>();
    if security.privileged {
        return Ok(all());
    }
    let asked = security.capabilities.clone().unwrap_or_default();
    let has_all = |names: &[String]| names.iter().any(|name| name.eq_ignore_ascii_case("all"));
    let mut set = match (has_all(&asked.add_capabilities), has_all(&asked.drop_capabilities)) {
        (true, _) => all(),
        (false, true) => Vec::new(),
        (false, false) => DEFAULT_CAPABILITIES.map(str::to_owned).to_vec(),
    };
    let dropped = plain(&asked.drop_capabilities)?;
    let added = plain(&asked.add_capabilities)?;
    let ambient = plain(&asked.add_ambient_capabilities)?;
    for name in added {
        if !set.contains(&name) {
            set.push(name);
        }
    }
    set.retain(|name| !dropped.contains(name));
    for name in ambient {
        if !set.contains(&name) {
            set.push(name);
        }
    }
    set.retain(|name| ours(name));
    Ok(set)
}

/// Names without `ALL`, with their prefix, checked.
fn plain(names: &[String]) -> Result<Vec<String>> {
    let mut out = Vec::new();
    for name in names.iter().filter(|name| !name.eq_ignore_ascii_case("all")) {
        let upper = name.to_ascii_uppercase();
        let full = if upper.starts_with("CAP_") { upper } else { format!("CAP_{upper}") };
        if !ALL_CAPABILITIES.contains(&full.as_str()) {
            return Err(Error::invalid(format!("unknown capability {name:?}")));
        }
        out.push(full);
    }
    Ok(out)
}

fn apparmor_profile(security: &v1::LinuxContainerSecurityContext) -> Result<Option<String>> {
    use v1::security_profile::ProfileType;
    let Some(profile) = &security.apparmor else { return Ok(None) };
    if security.privileged || profile.profile_type != ProfileType::Localhost as i32 {
        return Ok(None);
    }
    Ok(Some(profile.localhost_ref.clone()))
}

fn mounts(input: &Input<'_>, security: &v1::LinuxContainerSecurityContext) -> Result<Vec<Value>> {
    let own: Vec<&str> =
        input.config.mounts.iter().map(|mount| mount.container_path.trim_end_matches('/')).collect();
    let taken = |path: &str| own.contains(&path);
    let sys = if security.privileged { "rw" } else { "ro" };
    let mut out = vec![
        fs_mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        fs_mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        fs_mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        fs_mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        fs_mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", sys]),
    ];
    if !taken("/sys/fs/cgroup") {
        out.extend(cgroup_mounts(input.cgroup_mounts, sys));
    }
    for mount in input.sandbox_mounts {
        if !taken(&mount.container_path) {
            out.push(bind(mount, security)?);
        }
    }
    // Parents before children, or a parent would hide its child; otherwise in the pod's order.
    let mut asked: Vec<&v1::Mount> = input.config.mounts.iter().collect();
    asked.sort_by_key(|mount| Path::new(&mount.container_path).components().count());
    for mount in asked {
        let path = mount.container_path.trim_end_matches('/');
        out.retain(|have| have["destination"] != path);
        out.push(bind(mount, security)?);
    }
    Ok(out)
}

fn fs_mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Value {
    json!({ "destination": destination, "type": kind, "source": source, "options": options })
}

/// v1 shows one directory per controller on a small tmpfs, v2 just the container's own group.
fn cgroup_mounts(views: &[(String, String)], access: &str) -> Vec<Value> {
    let options = ["bind", "nosuid", "noexec", "nodev", access];
    let mut out = Vec::new();
    if views.iter().any(|(name, _)| !name.is_empty()) {
        out.push(fs_mount("/sys/fs/cgroup", "tmpfs", "tmpfs", &["nosuid", "noexec", "nodev", "mode=755"]));
    }
    for (name, source) in views {
        let destination = Path::new("/sys/fs/cgroup").join(name);
        out.push(fs_mount(&destination.to_string_lossy(), "bind", source, &options));
    }
    out
}

fn bind(mount: &v1::Mount, security: &v1::LinuxContainerSecurityContext) -> Result<Value> {
    use v1::MountPropagation;
    if !mount.container_path.starts_with('/') || mount.container_path.split('/').any(|part| part == "..") {
        return Err(Error::invalid(format!("mount path {:?} must be absolute", mount.container_path)));
    }
    if !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty() {
        return Err(Error::unsupported("id-mapped mounts are not supported by the built-in runtime"));
    }
    let propagation = match MountPropagation::try_from(mount.propagation) {
        Ok(MountPropagation::PropagationHostToContainer) => "rslave",
        Ok(MountPropagation::PropagationBidirectional) if security.privileged => "rshared",
        Ok(MountPropagation::PropagationBidirectional) => {
            return Err(Error::invalid("bidirectional mount propagation needs a privileged container"));
        }
        _ => "rprivate",
    };
    let access = match (mount.readonly, mount.recursive_read_only) {
        (true, true) => "rro",
        (true, false) => "ro",
        _ => "rw",
    };
    Ok(fs_mount(&mount.container_path, "bind", &mount.host_path, &["rbind", propagation, access]))
}

fn namespaces(namespaces: &Namespaces) -> Vec<Value> {
    let mut out = vec![json!({ "type": "mount" })];
    let joined = [("network", &namespaces.network), ("ipc", &namespaces.ipc), ("uts", &namespaces.uts)];
    for (kind, path) in joined {
        if let Some(path) = path {
            out.push(json!({ "type": kind, "path": path }));
        }
    }
    match &namespaces.pid {
        PidNamespace::Own => out.push(json!({ "type": "pid" })),
        PidNamespace::Host => {}
        PidNamespace::Path(path) => out.push(json!({ "type": "pid", "path": path })),
    }
    out
}

fn devices(devices: &[HostDevice]) -> Vec<Value> {
    devices
        .iter()
        .map(|device| {
            json!({
                "path": device.container_path,
                "type": device.rule.kind.to_string(),
                "major": device.rule.major,
                "minor": device.rule.minor,
                "fileMode": device.mode,
                "uid": device.uid,
                "gid": device.gid,
            })
        })
        .collect()
}

fn paths(security: &v1::LinuxContainerSecurityContext, asked: &[String], standard: &[&str]) -> Vec<String> {
    match (security.privileged, asked.is_empty()) {
        (true, _) => Vec::new(),
        (false, true) => standard.iter().map(|path| (*path).to_owned()).collect(),
        (false, false) => asked.to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: HostLimits =
        HostLimits { open_files_max: 1024, oom_score_adj_min: -1000, capabilities: u64::MAX };

    fn generate_with(config: &v1::ContainerConfig, image: &ImageDefaults) -> Result<Value> {
        generate(&Input {
            config,
            image,
            user: &User { uid: 0, gid: 0, groups: vec![0], home: "/root".into() },
            namespaces: &Namespaces { network: Some("/ns/net".into()), ..Default::default() },
            hostname: "pod",
            sandbox_mounts: &[v1::Mount {
                container_path: "/etc/hostname".into(),
                host_path: "/pod/hostname".into(),
                ..Default::default()
            }],
            devices: &[],
            cgroup_mounts: &[("memory".into(), "/view0".into())],
            cgroup_path: "/knarr/pod/id",
            limits: LIMITS,
            seccomp: None,
        })
    }

    fn image() -> ImageDefaults {
        ImageDefaults {
            entrypoint: vec!["/entry".into()],
            cmd: vec!["cmd".into()],
            env: vec!["PATH=/image".into(), "A=image".into()],
            working_dir: "/srv".into(),
            ..Default::default()
        }
    }

    #[test]
    fn a_plain_container_is_what_containerd_would_make() {
        let spec = generate_with(&v1::ContainerConfig::default(), &image()).unwrap();
        assert_eq!(
            spec["process"],
            json!({
                "terminal": false,
                "args": ["/entry", "cmd"],
                "env": ["HOSTNAME=pod", "HOME=/root", "PATH=/image", "A=image"],
                "cwd": "/srv",
                "user": { "uid": 0, "gid": 0, "additionalGids": [0] },
                "capabilities": {
                    "bounding": DEFAULT_CAPABILITIES,
                    "effective": DEFAULT_CAPABILITIES,
                    "permitted": DEFAULT_CAPABILITIES,
                },
                "oomScoreAdj": 0,
                "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
            })
        );
        let mounts: Vec<&str> = spec["mounts"]
            .as_array()
            .unwrap()
            .iter()
            .map(|mount| mount["destination"].as_str().unwrap())
            .collect();
        assert_eq!(
            mounts,
            [
                "/proc",
                "/dev",
                "/dev/pts",
                "/dev/mqueue",
                "/sys",
                "/sys/fs/cgroup",
                "/sys/fs/cgroup/memory",
                "/etc/hostname"
            ]
        );
        assert_eq!(
            spec["linux"]["namespaces"],
            json!([{ "type": "mount" }, { "type": "network", "path": "/ns/net" }, { "type": "pid" }])
        );
        assert_eq!(spec["linux"]["maskedPaths"].as_array().unwrap().len(), MASKED_PATHS.len());
    }

    #[test]
    fn command_and_args_replace_what_kubernetes_says_they_replace() {
        let cases: [(&[&str], &[&str], &[&str]); 4] = [
            (&[], &[], &["/entry", "cmd"]),
            (&[], &["x"], &["/entry", "x"]),
            (&["c"], &[], &["c"]),
            (&["c"], &["x"], &["c", "x"]),
        ];
        let owned = |list: &[&str]| list.iter().map(|item| (*item).to_owned()).collect::<Vec<_>>();
        for (command, args, want) in cases {
            let config =
                v1::ContainerConfig { command: owned(command), args: owned(args), ..Default::default() };
            assert_eq!(generate_with(&config, &image()).unwrap()["process"]["args"], json!(want));
        }
        let error = generate_with(&v1::ContainerConfig::default(), &ImageDefaults::default()).unwrap_err();
        assert_eq!(error.message, "no command specified");
    }

    #[test]
    fn mounts_of_the_pod_replace_ours_and_nest() {
        let mount = |path: &str, propagation: v1::MountPropagation| v1::Mount {
            container_path: path.into(),
            host_path: format!("/host{path}"),
            propagation: propagation as i32,
            ..Default::default()
        };
        use v1::MountPropagation::{
            PropagationBidirectional, PropagationHostToContainer, PropagationPrivate,
        };
        let mut config = v1::ContainerConfig {
            mounts: vec![
                mount("/a/b", PropagationHostToContainer),
                mount("/a", PropagationPrivate),
                mount("/etc/hostname", PropagationPrivate),
            ],
            ..Default::default()
        };
        let spec = generate_with(&config, &image()).unwrap();
        let shown: Vec<String> = spec["mounts"].as_array().unwrap()[7..]
            .iter()
            .map(|mount| format!("{} {} {}", mount["source"], mount["destination"], mount["options"][1]))
            .collect();
        assert_eq!(
            shown,
            [
                r#""/host/a" "/a" "rprivate""#,
                r#""/host/a/b" "/a/b" "rslave""#,
                r#""/host/etc/hostname" "/etc/hostname" "rprivate""#
            ]
        );
        config.mounts = vec![mount("/a", PropagationBidirectional)];
        assert!(generate_with(&config, &image()).unwrap_err().message.contains("privileged"));
        config.mounts = vec![mount("/a/../b", PropagationPrivate)];
        assert!(generate_with(&config, &image()).unwrap_err().message.contains("must be absolute"));
    }

    #[test]
    fn capabilities_follow_the_pod_within_the_host() {
        let names = |add: &[&str], drop: &[&str], privileged, capabilities| {
            let owned = |list: &[&str]| list.iter().map(|item| (*item).to_owned()).collect();
            let security = v1::LinuxContainerSecurityContext {
                privileged,
                capabilities: Some(v1::Capability {
                    add_capabilities: owned(add),
                    drop_capabilities: owned(drop),
                    ..Default::default()
                }),
                ..Default::default()
            };
            capability_names(&security, &HostLimits { capabilities, ..LIMITS })
        };
        let all = u64::MAX;
        assert_eq!(names(&["NET_ADMIN"], &["ALL"], false, all).unwrap(), ["CAP_NET_ADMIN"]);
        assert_eq!(names(&["ALL"], &["cap_chown"], false, all).unwrap().len(), 40);
        assert_eq!(names(&[], &["kill", "MKNOD"], false, all).unwrap().len(), 12);
        assert_eq!(names(&[], &[], true, all).unwrap().len(), 41);
        assert_eq!(names(&[], &[], true, 0b101).unwrap(), ["CAP_CHOWN", "CAP_DAC_READ_SEARCH"]);
        assert!(names(&["FLY"], &[], false, all).unwrap_err().message.contains("unknown capability"));
    }
}
