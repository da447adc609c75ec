//! The system calls a container may make: the default profile that docker and containerd share, as facts, and
//! profiles of the node's administrator.

use k8s_cri::v1::{LinuxContainerSecurityContext, security_profile::ProfileType};
use serde_json::{Value, json};

use crate::error::{Context, Error, Result};

/// Calls every container may make. `io_uring` is left out, as containerd 2 leaves it out.
const ALLOWED: &str = include_str!("seccomp_default.txt");

/// Calls that come with a capability.
const BY_CAPABILITY: [(&str, &[&str]); 12] = [
    ("CAP_DAC_READ_SEARCH", &["open_by_handle_at"]),
    (
        "CAP_SYS_ADMIN",
        &[
            "bpf",
            "clone",
            "clone3",
            "fanotify_init",
            "fsconfig",
            "fsmount",
            "fsopen",
            "fspick",
            "lookup_dcookie",
            "mount",
            "mount_setattr",
            "move_mount",
            "open_tree",
            "perf_event_open",
            "quotactl",
            "quotactl_fd",
            "setdomainname",
            "sethostname",
            "setns",
            "syslog",
            "umount",
            "umount2",
            "unshare",
        ],
    ),
    ("CAP_SYS_BOOT", &["reboot"]),
    ("CAP_SYS_CHROOT", &["chroot"]),
    ("CAP_SYS_MODULE", &["delete_module", "init_module", "finit_module"]),
    ("CAP_SYS_PACCT", &["acct"]),
    ("CAP_SYS_PTRACE", &["kcmp", "pidfd_getfd", "process_madvise"]),
    ("CAP_SYS_RAWIO", &["iopl", "ioperm"]),
    ("CAP_SYS_TIME", &["settimeofday", "stime", "clock_settime", "clock_settime64"]),
    ("CAP_SYS_TTY_CONFIG", &["vhangup"]),
    ("CAP_SYS_NICE", &["get_mempolicy", "mbind", "set_mempolicy", "set_mempolicy_home_node"]),
    ("CAP_SYSLOG", &["syslog"]),
];

/// All `CLONE_NEW*` flags: namespaces are not for containers to make.
const CLONE_NAMESPACES: u64 = 0x7e02_0000;
/// Personalities that change nothing of importance.
const PERSONALITIES: [u64; 5] = [0, 0x8, 0x20000, 0x20008, 0xffff_ffff];
/// Hands out connections to the hypervisor.
const AF_VSOCK: u64 = 40;

/// The seccomp section of the spec for what the pod asks; `None` leaves the container unconfined. `capabilities`
/// are those of the container.
///
/// Kubernetes: no profile and `Unconfined` do not confine, nor is a privileged container confined. A localhost
/// profile is an absolute path, made so by the kubelet.
pub fn profile(security: &LinuxContainerSecurityContext, capabilities: &[String]) -> Result<Option<Value>> {
    let Some(profile) = security.seccomp.as_ref().filter(|_| !security.privileged) else { return Ok(None) };
    match ProfileType::try_from(profile.profile_type) {
        Ok(ProfileType::Unconfined) => Ok(None),
        Ok(ProfileType::Localhost) => {
            let path = &profile.localhost_ref;
            let bytes = std::fs::read(path).step(|| format!("read seccomp profile {path}"))?;
            let value = serde_json::from_slice(&bytes)
                .map_err(|error| Error::invalid(format!("seccomp profile {path}: {error}")))?;
            Ok(Some(value))
        }
        _ => Ok(Some(default_profile(capabilities))),
    }
}

fn default_profile(capabilities: &[String]) -> Value {
    let has = |name: &str| capabilities.iter().any(|have| have == name);
    let mut allowed: Vec<&str> = ALLOWED.split_whitespace().collect();
    for (capability, calls) in BY_CAPABILITY {
        if has(capability) {
            allowed.extend(calls);
        }
    }
    allowed.extend(architecture_calls());
    allowed.sort_unstable();
    allowed.dedup();
    let allow =
        |names: Value, args: Value| json!({ "names": names, "action": "SCMP_ACT_ALLOW", "args": args });
    let mut calls = vec![json!({ "names": allowed, "action": "SCMP_ACT_ALLOW" })];
    calls.push(allow(json!(["socket"]), json!([{ "index": 0, "value": AF_VSOCK, "op": "SCMP_CMP_NE" }])));
    for personality in PERSONALITIES {
        let args = json!([{ "index": 0, "value": personality, "op": "SCMP_CMP_EQ" }]);
        calls.push(allow(json!(["personality"]), args));
    }
    if !has("CAP_SYS_ADMIN") {
        let masked =
            json!([{ "index": 0, "value": CLONE_NAMESPACES, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ" }]);
        calls.push(allow(json!(["clone"]), masked));
        // Its flags are behind a pointer; C libraries fall back to clone when it does not exist.
        let missing = json!({ "names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::ENOSYS });
        calls.push(missing);
    }
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": libc::EPERM,
        "architectures": architectures(),
        "syscalls": calls,
    })
}

fn architectures() -> &'static [&'static str] {
    match std::env::consts::ARCH {
        "x86_64" => &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "aarch64" => &["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
        "riscv64" => &["SCMP_ARCH_RISCV64"],
        _ => &[],
    }
}

fn architecture_calls() -> &'static [&'static str] {
    match std::env::consts::ARCH {
        "x86_64" => &["arch_prctl", "modify_ldt"],
        "aarch64" => {
            &["arm_fadvise64_64", "arm_sync_file_range", "sync_file_range2", "cacheflush", "set_tls"]
        }
        "riscv64" => &["riscv_flush_icache"],
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_cri::v1::SecurityProfile;

    #[test]
    fn confinement_follows_profile_privilege_and_capabilities() {
        let security = |kind, privileged| LinuxContainerSecurityContext {
            seccomp: Some(SecurityProfile { profile_type: kind as i32, localhost_ref: "/nope".into() }),
            privileged,
            ..Default::default()
        };
        assert!(profile(&Default::default(), &[]).unwrap().is_none());
        assert!(profile(&security(ProfileType::Unconfined, false), &[]).unwrap().is_none());
        assert!(profile(&security(ProfileType::RuntimeDefault, true), &[]).unwrap().is_none());
        assert!(profile(&security(ProfileType::Localhost, false), &[]).is_err());
        let plain = profile(&security(ProfileType::RuntimeDefault, false), &[]).unwrap().unwrap();
        let names = |value: &Value| value["syscalls"][0]["names"].as_array().unwrap().clone();
        assert!(!names(&plain).contains(&json!("mount")) && names(&plain).contains(&json!("read")));
        let admin = profile(&security(ProfileType::RuntimeDefault, false), &["CAP_SYS_ADMIN".into()]);
        assert!(names(&admin.unwrap().unwrap()).contains(&json!("mount")));
    }
}
