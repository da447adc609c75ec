//! Preconditions: what a node needs of its machine, each with a way out.

use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::settings::Settings;

/// One precondition, judged.
pub struct Finding {
    pub what: String,
    /// What to do if it does not hold.
    pub problem: Option<String>,
}

impl Finding {
    fn judge(what: impl Into<String>, holds: bool, way_out: impl Into<String>) -> Finding {
        Finding { what: what.into(), problem: (!holds).then(|| way_out.into()) }
    }
}

/// Looks at everything; changes nothing. `running` is true if the cluster itself holds the ports.
pub fn all(settings: &Settings, running: bool) -> Vec<Finding> {
    let mut findings =
        vec![Finding::judge("root privileges", nix::unistd::geteuid().is_root(), "run it with sudo")];
    if !running {
        for (port, flag) in [(settings.port, "--port"), (settings.kubelet_port, "--kubelet-port")] {
            findings.push(Finding::judge(
                format!("port {port} is free"),
                TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok(),
                format!("another program listens there; end it or choose another with {flag}"),
            ));
        }
    }
    if settings.server_only {
        return findings;
    }
    findings.push(Finding::judge(
        "nftables (nft)",
        Command::new("nft").arg("--version").output().is_ok_and(|o| o.status.success()),
        "install the package nftables",
    ));
    findings.push(Finding::judge(
        "kernel: overlayfs",
        kernel_has("/proc/filesystems", "overlay"),
        "load the module: modprobe overlay",
    ));
    findings.push(Finding::judge(
        "kernel: control groups (v1, v2 or both)",
        Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
            || Path::new("/sys/fs/cgroup/memory").exists(),
        "mount cgroup2 on /sys/fs/cgroup, or boot a kernel with control groups",
    ));
    for namespace in ["mnt", "pid", "net", "ipc", "uts"] {
        let there = Path::new("/proc/self/ns").join(namespace).exists();
        findings.push(Finding::judge(
            format!("kernel: {namespace} namespaces"),
            there,
            "boot a kernel with namespaces",
        ));
    }
    if let Some(endpoint) = &settings.container_runtime_endpoint {
        let path = endpoint.trim_start_matches("unix://");
        let way_out = "start the container runtime, or leave --container-runtime-endpoint out";
        findings.push(Finding::judge(
            format!("container runtime at {path}"),
            Path::new(path).exists(),
            way_out,
        ));
    }
    findings
}

fn kernel_has(file: &str, name: &str) -> bool {
    let known = || std::fs::read_to_string(file).is_ok_and(|t| t.split_whitespace().any(|w| w == name));
    // Asking for the module costs nothing where it is there already.
    known() || (Command::new("modprobe").arg(name).status().is_ok_and(|s| s.success()) && known())
}

/// Prints the findings; fails if any precondition does not hold.
pub fn report(settings: &Settings, running: bool) -> Result<()> {
    let findings = all(settings, running);
    for finding in &findings {
        match &finding.problem {
            None => println!("✔ {}", finding.what),
            Some(way_out) => println!("✘ {}: {way_out}", finding.what),
        }
    }
    match findings.iter().filter(|f| f.problem.is_some()).count() {
        0 => Ok(()),
        1 => bail!("one precondition does not hold"),
        count => bail!("{count} preconditions do not hold"),
    }
}

/// The first broken precondition as an error: one sentence with the way out.
pub fn require(settings: &Settings) -> Result<()> {
    match all(settings, false).into_iter().find_map(|f| f.problem.map(|p| (f.what, p))) {
        None => Ok(()),
        Some((what, way_out)) => bail!("needed: {what}; {way_out}"),
    }
}
