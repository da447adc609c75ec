//! What this host lets us give to containers. Full root may give anything; inside another container or a restricted
//! service, CAP_SYS_RESOURCE is often missing, and asking for more than we have ourselves would fail every start.

use std::fs;

/// Open files a container may have where the host allows it, as most distributions set for runtimes.
const OPEN_FILES_MAX: u64 = 1_048_576;
const CAP_SYS_RESOURCE: u64 = 24;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostLimits {
    pub open_files_max: u64,
    /// The lowest `oom_score_adj` that can be set.
    pub oom_score_adj_min: i64,
    /// The capabilities we may pass on, as the kernel's bit set. It also tells which ones this kernel has.
    pub capabilities: u64,
}

impl HostLimits {
    pub fn detect() -> Self {
        let capabilities = capability_set("CapPrm:") & capability_set("CapBnd:");
        let system_max = read_number("/proc/sys/fs/nr_open").unwrap_or(OPEN_FILES_MAX as i64) as u64;
        if capabilities >> CAP_SYS_RESOURCE & 1 == 1 {
            return Self {
                open_files_max: OPEN_FILES_MAX.min(system_max),
                oom_score_adj_min: -1000,
                capabilities,
            };
        }
        let own_max = hard_limit().unwrap_or(1024);
        Self {
            open_files_max: OPEN_FILES_MAX.min(own_max),
            oom_score_adj_min: read_number("/proc/self/oom_score_adj").unwrap_or(0),
            capabilities,
        }
    }
}

fn hard_limit() -> Option<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is valid for writing through the call.
    (unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } == 0).then_some(limit.rlim_max)
}

fn capability_set(name: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let hex = status.lines().find_map(|line| line.strip_prefix(name));
    hex.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0)
}

fn read_number(path: &str) -> Option<i64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}
