//! Preconditions: what a node needs of its machine, each with a way out.

use std::io::Write;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Result, bail};

use crate::settings::Settings;

/// One precondition, judged.
pub struct Finding {
    pub what: String,
    /// What to do if it does not hold.
    pub problem: Option<String>,
    /// The cluster starts all the same; something in it will not work.
    pub warning: bool,
}

impl Finding {
    fn judge(what: impl Into<String>, holds: bool, way_out: impl Into<String>) -> Finding {
        Finding { what: what.into(), problem: (!holds).then(|| way_out.into()), warning: false }
    }

    fn warn(what: impl Into<String>, holds: bool, way_out: impl Into<String>) -> Finding {
        Finding { warning: true, ..Finding::judge(what, holds, way_out) }
    }
}

/// Looks at everything; changes nothing. `running` is true if the cluster itself holds the ports.
pub fn all(settings: &Settings, running: bool) -> Vec<Finding> {
    let root = nix::unistd::geteuid().is_root();
    let mut findings = vec![Finding::judge("root privileges", root, "run it with sudo")];
    if !running {
        for (port, flag) in [(settings.port, "--port"), (settings.kubelet_port, "--kubelet-port")] {
            findings.push(Finding::judge(
                format!("port {port} is free"),
                TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok(),
                format!("another program listens there; end it or choose another with {flag}"),
            ));
        }
    }
    if !settings.server_only {
        findings.extend(firewall(root));
        findings.extend(kernel());
        findings.extend(file_systems(settings));
        findings.extend(settings.container_runtime_endpoint.as_deref().map(runtime).unwrap_or_default());
    }
    findings
}

fn firewall(root: bool) -> Vec<Finding> {
    let program = succeeds(Command::new("nft").arg("--version"));
    let mut findings = vec![Finding::judge("nftables (nft)", program, "install the package nftables")];
    if !program || !root {
        return findings;
    }
    findings.push(Finding::judge(
        "kernel: nftables with address translation",
        nft_takes("table inet knarr_check {\nchain c { type nat hook prerouting priority 0; }\n}\n"),
        "load the modules: modprobe -a nf_tables nft_nat nft_chain_nat",
    ));
    // What our own tables accept, another one may still drop.
    let forward = output(Command::new("nft").args(["list", "chain", "ip", "filter", "FORWARD"]));
    findings.push(Finding::warn(
        "other firewalls let packets of pods pass",
        !forward.contains("policy drop"),
        "pods will not reach the outside; accept them: iptables -I FORWARD -i knarr+ -j ACCEPT; \
         iptables -I FORWARD -o knarr+ -j ACCEPT",
    ));
    findings
}

fn kernel() -> Vec<Finding> {
    let mut findings = vec![Finding::judge(
        "kernel: overlayfs",
        kernel_has("/proc/filesystems", "overlay"),
        "load the module: modprobe overlay",
    )];
    findings.push(control_groups(Path::new("/sys/fs/cgroup")));
    for namespace in ["mnt", "pid", "net", "ipc", "uts"] {
        let there = Path::new("/proc/self/ns").join(namespace).exists();
        findings.push(Finding::judge(
            format!("kernel: {namespace} namespaces"),
            there,
            "boot a kernel with namespaces",
        ));
    }
    findings
}

/// Controllers without which limits of pods could not be kept.
const CONTROLLERS: [&str; 4] = ["cpu", "cpuset", "memory", "pids"];

fn control_groups(mount: &Path) -> Finding {
    let unified = std::fs::read_to_string(mount.join("cgroup.controllers")).ok();
    let has = |name: &str| match &unified {
        Some(text) => text.split_whitespace().any(|have| have == name),
        None => v1_has(mount, name),
    };
    let what = format!("kernel: control groups {}", if unified.is_some() { "v2" } else { "v1" });
    let missing: Vec<&str> = CONTROLLERS.into_iter().filter(|name| !has(name)).collect();
    let what = format!("{what} with {}", CONTROLLERS.join(", "));
    let way_out = match missing.len() == CONTROLLERS.len() {
        true => "mount cgroup2 on /sys/fs/cgroup, or boot a kernel with control groups".to_owned(),
        false => format!(
            "{} missing; boot with cgroup_enable={}, or have whoever runs this machine delegate them",
            missing.join(" and "),
            missing.join(",")
        ),
    };
    Finding::judge(what, missing.is_empty(), way_out)
}

/// A v1 controller has a directory of its name, alone or with others (`cpu,cpuacct`).
fn v1_has(mount: &Path, controller: &str) -> bool {
    let entries = std::fs::read_dir(mount).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .any(|name| name.split(',').any(|part| part == controller))
}

fn file_systems(settings: &Settings) -> Vec<Finding> {
    let mut at = settings.data_dir.as_path();
    while !at.exists() {
        let Some(parent) = at.parent() else { break };
        at = parent;
    }
    let kind = nix::sys::statfs::statfs(at).map(|stat| stat.filesystem_type());
    let on_overlay = kind.is_ok_and(|kind| kind == nix::sys::statfs::OVERLAYFS_SUPER_MAGIC);
    vec![Finding::judge(
        format!("{} is on a file system that overlayfs can lie on", settings.data_dir.display()),
        !on_overlay || settings.container_runtime_endpoint.is_some(),
        "it is on overlayfs itself; choose a directory on a disk with --data-dir (in a container: on a volume)",
    )]
}

fn runtime(endpoint: &str) -> Vec<Finding> {
    let path = endpoint.trim_start_matches("unix://");
    vec![Finding::judge(
        format!("container runtime at {path}"),
        Path::new(path).exists(),
        "start the container runtime, or leave --container-runtime-endpoint out",
    )]
}

fn succeeds(command: &mut Command) -> bool {
    command.stdin(Stdio::null()).output().is_ok_and(|output| output.status.success())
}

fn output(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
}

/// Whether the kernel would take these rules; nothing is changed.
fn nft_takes(rules: &str) -> bool {
    let child = Command::new("nft")
        .args(["--check", "--file", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut child) = child else { return false };
    let written = child.stdin.take().is_some_and(|mut input| input.write_all(rules.as_bytes()).is_ok());
    child.wait().is_ok_and(|status| status.success()) && written
}

fn kernel_has(file: &str, name: &str) -> bool {
    let known = || std::fs::read_to_string(file).is_ok_and(|t| t.split_whitespace().any(|w| w == name));
    // Asking for the module costs nothing where it is there already.
    known() || (succeeds(Command::new("modprobe").arg(name)) && known())
}

/// Prints the findings; fails if any precondition does not hold.
pub fn report(settings: &Settings, running: bool) -> Result<()> {
    let findings = all(settings, running);
    for finding in &findings {
        match &finding.problem {
            None => println!("✔ {}", finding.what),
            Some(way_out) if finding.warning => println!("⚠ {}: {way_out}", finding.what),
            Some(way_out) => println!("✘ {}: {way_out}", finding.what),
        }
    }
    match findings.iter().filter(|f| f.problem.is_some() && !f.warning).count() {
        0 => Ok(()),
        1 => bail!("one precondition does not hold"),
        count => bail!("{count} preconditions do not hold"),
    }
}

/// The first broken precondition as an error: one sentence with the way out.
pub fn require(settings: &Settings) -> Result<()> {
    let mut broken = all(settings, false).into_iter().filter(|finding| !finding.warning);
    match broken.find_map(|finding| finding.problem.map(|problem| (finding.what, problem))) {
        None => Ok(()),
        Some((what, way_out)) => bail!("needed: {what}; {way_out}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_groups_of_both_versions_are_judged_by_their_controllers() {
        let dir = tempfile::tempdir().unwrap();
        let judge = || control_groups(dir.path()).problem;
        assert!(judge().unwrap().contains("mount cgroup2"));
        for name in ["cpu,cpuacct", "cpuset", "memory"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        assert!(judge().unwrap().starts_with("pids missing; boot with cgroup_enable=pids"));
        std::fs::create_dir(dir.path().join("pids")).unwrap();
        assert_eq!(judge(), None);
        std::fs::write(dir.path().join("cgroup.controllers"), "cpuset cpu io memory pids\n").unwrap();
        assert_eq!(judge(), None);
        std::fs::write(dir.path().join("cgroup.controllers"), "cpu pids\n").unwrap();
        assert!(judge().unwrap().starts_with("cpuset and memory missing"));
    }
}
