//! Control groups on every kind of host: v1, v2, and hybrid (v1 controllers with an empty v2 tree beside them).
//! One [`Cgroups`] makes a group with limits, reads its figures, kills what is in it and removes it.
//!
//! Which path a pod has, and what its limits are, is the kubelet's business. Processes join a group in the keeper
//! (see `keeper::create`), because how they join decides how long a container takes to start.
//!
//! Invariant: only the groups handed in are touched, never their siblings or the host's.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use k8s_cri::v1::LinuxContainerResources;

use crate::error::{Context, Error, Result};

/// Where the kernel's control groups are mounted on every supported host.
const MOUNT: &str = "/sys/fs/cgroup";
/// v1 hierarchies a container gets a group in. The rest of them have nothing Kubernetes limits or measures.
const V1_CONTROLLERS: [&str; 9] =
    ["cpu", "cpuacct", "cpuset", "memory", "pids", "blkio", "devices", "freezer", "hugetlb"];
/// Controllers switched on for children in v2.
const V2_CONTROLLERS: [&str; 6] = ["cpu", "cpuset", "memory", "pids", "io", "hugetlb"];

/// The host's control groups.
#[derive(Debug, Clone)]
pub struct Cgroups {
    layout: Layout,
    /// Mount points of hierarchies that we leave alone, but that other runtimes (runc) make groups in.
    others: Vec<PathBuf>,
}

#[derive(Debug, Clone, PartialEq)]
enum Layout {
    /// Mount points by controller; several controllers may share one.
    V1(Vec<(&'static str, PathBuf)>),
    V2(PathBuf),
}

/// Figures of one group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub cpu_nanos: u64,
    pub memory_bytes: u64,
    /// Memory that cannot be dropped at once: usage less inactive file pages, as the kubelet counts it.
    pub working_set_bytes: u64,
    pub rss_bytes: u64,
    pub page_faults: u64,
    pub major_page_faults: u64,
    /// `None` without a limit.
    pub memory_limit_bytes: Option<u64>,
    pub swap_bytes: Option<u64>,
    pub pids: u64,
}

impl Cgroups {
    /// Looks at the mounts of this host.
    pub fn detect() -> Result<Self> {
        let mounts =
            fs::read_to_string("/proc/self/mountinfo").step(|| "read /proc/self/mountinfo".into())?;
        Self::from_mountinfo(&mounts)
    }

    fn from_mountinfo(mountinfo: &str) -> Result<Self> {
        let mut v1: Vec<(&'static str, PathBuf)> = Vec::new();
        let mut v2 = None;
        let mut others = Vec::new();
        for line in mountinfo.lines() {
            let Some((mount, fs)) = line.split_once(" - ") else { continue };
            let Some(point) = mount.split(' ').nth(4).filter(|point| point.starts_with(MOUNT)) else {
                continue;
            };
            let mut fs = fs.split(' ');
            match fs.next() {
                Some("cgroup2") if point == MOUNT => v2 = Some(PathBuf::from(point)),
                Some("cgroup2") => others.push(PathBuf::from(point)),
                Some("cgroup") => {
                    let options = fs.nth(1).unwrap_or_default();
                    if !options.split(',').any(|option| V1_CONTROLLERS.contains(&option)) {
                        others.push(PathBuf::from(point));
                    }
                    for controller in V1_CONTROLLERS {
                        let known = v1.iter().any(|(have, _)| *have == controller);
                        if !known && options.split(',').any(|option| option == controller) {
                            v1.push((controller, PathBuf::from(point)));
                        }
                    }
                }
                _ => {}
            }
        }
        match (v2, v1.is_empty()) {
            (Some(root), _) => Ok(Self { layout: Layout::V2(root), others }),
            (None, false) => Ok(Self { layout: Layout::V1(v1), others }),
            (None, true) => Err(Error::internal(format!(
                "no control groups are mounted below {MOUNT}; mount cgroup2 there to run containers"
            ))),
        }
    }

    /// `v2`, or `v1` (also on hybrid hosts, whose controllers sit in v1).
    pub fn version(&self) -> &'static str {
        match self.layout {
            Layout::V1(_) => "v1",
            Layout::V2(_) => "v2",
        }
    }

    /// Every directory that makes up the group at `path` (absolute within the tree, `/knarr/pod1`).
    pub fn dirs(&self, path: &str) -> Vec<PathBuf> {
        let mut dirs: Vec<PathBuf> = match &self.layout {
            Layout::V1(mounts) => mounts.iter().map(|(_, mount)| join(mount, path)).collect(),
            Layout::V2(root) => vec![join(root, path)],
        };
        dirs.dedup();
        dirs
    }

    /// The same, and also where another runtime may have made the group.
    pub fn dirs_anywhere(&self, path: &str) -> Vec<PathBuf> {
        let mut dirs = self.dirs(path);
        dirs.extend(self.others.iter().map(|mount| join(mount, path)));
        dirs
    }

    /// Pairs of (name under `/sys/fs/cgroup` in the container, directory here) to show a container its own group.
    pub fn views(&self, path: &str) -> Vec<(String, PathBuf)> {
        match &self.layout {
            Layout::V2(root) => vec![(String::new(), join(root, path))],
            Layout::V1(mounts) => {
                mounts.iter().map(|(name, mount)| ((*name).to_owned(), join(mount, path))).collect()
            }
        }
    }

    /// Makes the group and its parents, and applies limits. Zero and empty fields mean "leave as it is".
    pub fn create(&self, path: &str, resources: &LinuxContainerResources) -> Result<()> {
        check_path(path)?;
        match &self.layout {
            Layout::V1(mounts) => {
                for (controller, mount) in mounts {
                    make_v1(controller, mount, path)?;
                }
            }
            Layout::V2(root) => make_v2(root, path)?,
        }
        self.update(path, resources)
    }

    /// Changes the limits of an existing group in place.
    pub fn update(&self, path: &str, resources: &LinuxContainerResources) -> Result<()> {
        let writes = match self.layout {
            Layout::V1(_) => v1_writes(resources)?,
            Layout::V2(_) => v2_writes(resources)?,
        };
        // On v2, a controller that the host keeps to itself has no files in the group.
        let delegated = match &self.layout {
            Layout::V2(root) if !writes.is_empty() => {
                let file = join(root, path).join("cgroup.controllers");
                Some(fs::read_to_string(&file).step(|| format!("read {}", file.display()))?)
            }
            _ => None,
        };
        let lacks = |controller: &str| {
            delegated.as_ref().is_some_and(|all| !all.split_whitespace().any(|have| have == controller))
        };
        for (controller, file, value) in writes {
            let Some(dir) = self.dir(path, controller).filter(|_| !lacks(controller)) else {
                tracing::warn!(controller, file, "no such controller on this host, limit not applied");
                continue;
            };
            self.write_limit(&dir, file.as_ref(), &value)?;
        }
        Ok(())
    }

    /// A lowered v1 memory limit must go below swap's first, a raised one after: try both orders.
    fn write_limit(&self, dir: &Path, file: &str, value: &str) -> Result<()> {
        let path = dir.join(file);
        match fs::write(&path, value) {
            Err(error) if file == "memory.limit_in_bytes" && error.raw_os_error() == Some(libc::EINVAL) => {
                // Above memory.memsw.limit_in_bytes: lift that one first.
                let _ = fs::write(dir.join("memory.memsw.limit_in_bytes"), value);
                fs::write(&path, value).step(|| format!("write {value} to {}", path.display()))
            }
            // Swap accounting may be off; then there is no swap to limit either.
            Err(error) if file.contains("swap") || file.contains("memsw") => {
                tracing::debug!(%error, path = %path.display(), "swap limit not applied");
                Ok(())
            }
            other => other.step(|| format!("write {value} to {}", path.display())),
        }
    }

    /// Limits the number of processes; `None` for no limit.
    pub fn set_pids_max(&self, path: &str, max: Option<u64>) -> Result<()> {
        let Some(dir) = self.dir(path, "pids") else { return Ok(()) };
        let value = max.map_or("max".to_owned(), |max| max.to_string());
        fs::write(dir.join("pids.max"), &value)
            .step(|| format!("write {value} to {}/pids.max", dir.display()))
    }

    /// On v1, restricts which devices may be used, one rule per line as the kernel writes them (`c 1:3 rwm`).
    /// On v2 the rules become a small program attached to the group.
    pub fn set_devices(&self, path: &str, rules: &DeviceRules) -> Result<()> {
        match &self.layout {
            Layout::V1(_) => {
                let Some(dir) = self.dir(path, "devices") else { return Ok(()) };
                if rules.all {
                    return write(&dir.join("devices.allow"), "a");
                }
                write(&dir.join("devices.deny"), "a")?;
                rules.allow.iter().try_for_each(|rule| write(&dir.join("devices.allow"), &rule.to_string()))
            }
            Layout::V2(root) if !rules.all => crate::device_filter::attach(&join(root, path), &rules.allow),
            Layout::V2(_) => Ok(()),
        }
    }

    /// How often the kernel killed for lack of memory in this group.
    pub fn oom_kills(&self, path: &str) -> u64 {
        match &self.layout {
            Layout::V1(_) => self
                .dir(path, "memory")
                .map_or(0, |dir| flat_value(&dir.join("memory.oom_control"), "oom_kill")),
            Layout::V2(root) => flat_value(&join(root, path).join("memory.events"), "oom_kill"),
        }
    }

    /// The file [`Cgroups::oom_kills`] reads, for the keeper, which must answer after the group's last process died.
    pub fn oom_file(&self, path: &str) -> Option<PathBuf> {
        match &self.layout {
            Layout::V1(_) => self.dir(path, "memory").map(|dir| dir.join("memory.oom_control")),
            Layout::V2(root) => Some(join(root, path).join("memory.events")),
        }
    }

    /// Figures of the group and everything below it.
    pub fn usage(&self, path: &str) -> Result<Usage> {
        match &self.layout {
            Layout::V1(_) => Ok(self.usage_v1(path)),
            Layout::V2(root) => usage_v2(&join(root, path)),
        }
    }

    fn usage_v1(&self, path: &str) -> Usage {
        let mut usage = Usage::default();
        if let Some(dir) = self.dir(path, "cpuacct") {
            usage.cpu_nanos = number(&dir.join("cpuacct.usage")).unwrap_or(0);
        }
        if let Some(dir) = self.dir(path, "memory") {
            let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
            usage.memory_bytes = number(&dir.join("memory.usage_in_bytes")).unwrap_or(0);
            usage.working_set_bytes =
                usage.memory_bytes.saturating_sub(flat(&stat, "total_inactive_file").unwrap_or(0));
            usage.rss_bytes = flat(&stat, "total_rss").unwrap_or(0);
            usage.page_faults = flat(&stat, "total_pgfault").unwrap_or(0);
            usage.major_page_faults = flat(&stat, "total_pgmajfault").unwrap_or(0);
            usage.swap_bytes = flat(&stat, "total_swap");
            usage.memory_limit_bytes =
                number(&dir.join("memory.limit_in_bytes")).filter(|limit| *limit < 1 << 62);
        }
        if let Some(dir) = self.dir(path, "pids") {
            usage.pids = number(&dir.join("pids.current")).unwrap_or(0);
        }
        usage
    }

    /// Processes in the group and in groups below it.
    pub fn pids(&self, path: &str) -> Vec<i32> {
        let dir = match &self.layout {
            Layout::V1(_) => self.dir(path, "pids").or_else(|| self.dirs(path).into_iter().next()),
            Layout::V2(root) => Some(join(root, path)),
        };
        let mut pids = Vec::new();
        if let Some(dir) = dir {
            collect_pids(&dir, &mut pids);
        }
        pids
    }

    /// Kills everything in the group and below. One round; the caller waits for the group to empty.
    pub fn kill(&self, path: &str) {
        if let Layout::V2(root) = &self.layout
            && fs::write(join(root, path).join("cgroup.kill"), "1").is_ok()
        {
            return;
        }
        for pid in self.pids(path) {
            // The pid was read from our own group a moment ago; a fork racing with this is caught next round.
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL);
        }
    }

    /// Removes the group and all groups below it, whoever made them. Fails while processes live in it. Absent is a
    /// success.
    pub fn remove(&self, path: &str) -> Result<()> {
        check_path(path)?;
        for dir in self.dirs_anywhere(path) {
            remove_tree(&dir).step(|| format!("remove control group {}", dir.display()))?;
        }
        Ok(())
    }

    /// Whether any directory of the group exists.
    pub fn exists(&self, path: &str) -> bool {
        self.dirs(path).iter().any(|dir| dir.exists())
    }

    fn dir(&self, path: &str, controller: &str) -> Option<PathBuf> {
        match &self.layout {
            Layout::V1(mounts) => {
                mounts.iter().find(|(name, _)| *name == controller).map(|(_, mount)| join(mount, path))
            }
            Layout::V2(root) => Some(join(root, path)),
        }
    }
}

/// Devices a container may use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceRules {
    /// Everything is allowed (privileged containers).
    pub all: bool,
    pub allow: Vec<DeviceRule>,
}

/// One allowed device or range of devices.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DeviceRule {
    /// `c` or `b`.
    pub kind: char,
    /// `None` is any.
    pub major: Option<u32>,
    pub minor: Option<u32>,
    /// Some of `rwm`.
    pub access: String,
}

impl std::fmt::Display for DeviceRule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let part = |number: Option<u32>| number.map_or("*".to_owned(), |number| number.to_string());
        write!(f, "{} {}:{} {}", self.kind, part(self.major), part(self.minor), self.access)
    }
}

impl DeviceRules {
    /// What every container may use: the pseudo devices of `/dev`, its terminals, and making nodes of any device.
    pub fn standard() -> Self {
        let rule =
            |kind, major, minor, access: &str| DeviceRule { kind, major, minor, access: access.into() };
        let mut allow = vec![rule('c', None, None, "m"), rule('b', None, None, "m")];
        for (major, minor) in [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2)] {
            allow.push(rule('c', Some(major), Some(minor), "rwm"));
        }
        allow.push(rule('c', Some(136), None, "rwm"));
        Self { all: false, allow }
    }
}

fn join(mount: &Path, path: &str) -> PathBuf {
    mount.join(path.trim_start_matches('/'))
}

/// A group's path must stay inside the tree and must not be the root itself.
fn check_path(path: &str) -> Result<()> {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    if parts.is_empty() || parts.contains(&"..") {
        return Err(Error::invalid(format!("{path:?} is not a usable control group path")));
    }
    Ok(())
}

fn make_v1(controller: &str, mount: &Path, path: &str) -> Result<()> {
    let mut dir = mount.to_owned();
    for part in path.split('/').filter(|part| !part.is_empty()) {
        let parent = dir.clone();
        dir.push(part);
        make_dir(&dir)?;
        if controller == "cpuset" {
            // A fresh v1 cpuset is empty and refuses processes until it has processors and memory nodes.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                inherit(&parent.join(file), &dir.join(file))?;
            }
        }
    }
    Ok(())
}

fn inherit(parent: &Path, child: &Path) -> Result<()> {
    let have = fs::read_to_string(child).step(|| format!("read {}", child.display()))?;
    if !have.trim().is_empty() {
        return Ok(());
    }
    let value = fs::read_to_string(parent).step(|| format!("read {}", parent.display()))?;
    write(child, value.trim())
}

fn make_v2(root: &Path, path: &str) -> Result<()> {
    let mut dir = root.to_owned();
    for part in path.split('/').filter(|part| !part.is_empty()) {
        enable_controllers(&dir);
        dir.push(part);
        make_dir(&dir)?;
    }
    Ok(())
}

/// One at a time: a controller the host lacks must not keep the others off.
fn enable_controllers(dir: &Path) {
    let enabled = fs::read_to_string(dir.join("cgroup.subtree_control")).unwrap_or_default();
    for controller in V2_CONTROLLERS {
        if !enabled.split_whitespace().any(|have| have == controller) {
            let _ = fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"));
        }
    }
}

fn make_dir(dir: &Path) -> Result<()> {
    match fs::create_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(error).step(|| format!("make control group {}", dir.display()))
        }
        _ => Ok(()),
    }
}

fn write(path: &Path, value: &str) -> Result<()> {
    fs::write(path, value).step(|| format!("write {value} to {}", path.display()))
}

type Write = (&'static str, String, String);

fn v1_writes(resources: &LinuxContainerResources) -> Result<Vec<Write>> {
    let mut writes: Vec<Write> = Vec::new();
    let mut put = |controller, file: &str, value: String| writes.push((controller, file.to_owned(), value));
    if resources.cpu_shares > 0 {
        put("cpu", "cpu.shares", resources.cpu_shares.max(2).to_string());
    }
    if resources.cpu_period > 0 {
        put("cpu", "cpu.cfs_period_us", resources.cpu_period.to_string());
    }
    if resources.cpu_quota != 0 {
        put("cpu", "cpu.cfs_quota_us", resources.cpu_quota.to_string());
    }
    if resources.memory_limit_in_bytes != 0 {
        put("memory", "memory.limit_in_bytes", resources.memory_limit_in_bytes.to_string());
    }
    if resources.memory_swap_limit_in_bytes != 0 {
        put("memory", "memory.memsw.limit_in_bytes", resources.memory_swap_limit_in_bytes.to_string());
    }
    if !resources.cpuset_cpus.is_empty() {
        put("cpuset", "cpuset.cpus", resources.cpuset_cpus.clone());
    }
    if !resources.cpuset_mems.is_empty() {
        put("cpuset", "cpuset.mems", resources.cpuset_mems.clone());
    }
    for limit in &resources.hugepage_limits {
        put("hugetlb", &format!("hugetlb.{}.limit_in_bytes", limit.page_size), limit.limit.to_string());
    }
    if !resources.unified.is_empty() {
        // Upstream sends these (memory.high, memory.oom.group) only to v2 hosts; nothing is lost by not having them.
        tracing::debug!(keys = ?resources.unified.keys(), "unified limits need cgroup v2, not applied");
    }
    Ok(writes)
}

fn v2_writes(resources: &LinuxContainerResources) -> Result<Vec<Write>> {
    let mut writes: Vec<Write> = Vec::new();
    let mut put = |controller, file: &str, value: String| writes.push((controller, file.to_owned(), value));
    if resources.cpu_shares > 0 {
        put("cpu", "cpu.weight", weight_of_shares(resources.cpu_shares as u64).to_string());
    }
    if resources.cpu_quota != 0 || resources.cpu_period > 0 {
        let period = if resources.cpu_period > 0 { resources.cpu_period } else { 100_000 };
        let quota = if resources.cpu_quota > 0 { resources.cpu_quota.to_string() } else { "max".into() };
        put("cpu", "cpu.max", format!("{quota} {period}"));
    }
    if resources.memory_limit_in_bytes != 0 {
        put("memory", "memory.max", limit_or_max(resources.memory_limit_in_bytes));
    }
    if resources.memory_swap_limit_in_bytes != 0 {
        // CRI counts memory and swap together, v2 counts swap alone.
        let swap = match resources.memory_swap_limit_in_bytes {
            -1 => -1,
            both => (both - resources.memory_limit_in_bytes.max(0)).max(0),
        };
        put("memory", "memory.swap.max", limit_or_max(swap));
    }
    if !resources.cpuset_cpus.is_empty() {
        put("cpuset", "cpuset.cpus", resources.cpuset_cpus.clone());
    }
    if !resources.cpuset_mems.is_empty() {
        put("cpuset", "cpuset.mems", resources.cpuset_mems.clone());
    }
    for limit in &resources.hugepage_limits {
        put("hugetlb", &format!("hugetlb.{}.max", limit.page_size), limit.limit.to_string());
    }
    for (file, value) in &resources.unified {
        let controller = file.split_once('.').map_or("", |(name, _)| name);
        let known = V2_CONTROLLERS.iter().find(|name| **name == controller && !file.contains('/'));
        let Some(known) = known else {
            return Err(Error::invalid(format!("unified resource {file:?} is not a controller's file")));
        };
        put(known, file, value.clone());
    }
    Ok(writes)
}

fn limit_or_max(value: i64) -> String {
    if value < 0 { "max".into() } else { value.to_string() }
}

/// The kernel documentation's mapping of [2, 262144] to [1, 10000], as upstream uses it.
fn weight_of_shares(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

fn usage_v2(dir: &Path) -> Result<Usage> {
    let cpu = fs::read_to_string(dir.join("cpu.stat")).step(|| format!("read {}/cpu.stat", dir.display()))?;
    let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
    let memory_bytes = number(&dir.join("memory.current")).unwrap_or(0);
    Ok(Usage {
        cpu_nanos: flat(&cpu, "usage_usec").unwrap_or(0) * 1000,
        memory_bytes,
        working_set_bytes: memory_bytes.saturating_sub(flat(&stat, "inactive_file").unwrap_or(0)),
        rss_bytes: flat(&stat, "anon").unwrap_or(0),
        page_faults: flat(&stat, "pgfault").unwrap_or(0),
        major_page_faults: flat(&stat, "pgmajfault").unwrap_or(0),
        memory_limit_bytes: number(&dir.join("memory.max")),
        swap_bytes: number(&dir.join("memory.swap.current")),
        pids: number(&dir.join("pids.current")).unwrap_or(0),
    })
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn flat(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

/// One value of a `key value` file; 0 when absent.
pub(crate) fn flat_value(path: &Path, key: &str) -> u64 {
    fs::read_to_string(path).ok().and_then(|text| flat(&text, key)).unwrap_or(0)
}

fn collect_pids(dir: &Path, pids: &mut Vec<i32>) {
    let procs = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    pids.extend(procs.lines().filter_map(|line| line.parse::<i32>().ok()));
    for child in subdirs(dir) {
        collect_pids(&child, pids);
    }
}

fn subdirs(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

fn remove_tree(dir: &Path) -> io::Result<()> {
    match fs::remove_dir(dir) {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(_) => {}
    }
    for child in subdirs(dir) {
        remove_tree(&child)?;
    }
    match fs::remove_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
30 25 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
33 30 0:29 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
34 30 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw";

    #[test]
    fn hybrid_hosts_use_their_v1_controllers() {
        let groups = Cgroups::from_mountinfo(HYBRID).unwrap();
        assert_eq!(groups.version(), "v1");
        let dirs = groups.dirs("/knarr/a");
        assert_eq!(
            dirs,
            [Path::new("/sys/fs/cgroup/cpu,cpuacct/knarr/a"), Path::new("/sys/fs/cgroup/memory/knarr/a")]
        );
    }

    #[test]
    fn groups_that_others_made_in_other_hierarchies_are_found() {
        let groups = Cgroups::from_mountinfo(HYBRID).unwrap();
        let all = groups.dirs_anywhere("/knarr/a");
        let others = &all[groups.dirs("/knarr/a").len()..];
        assert_eq!(
            others,
            [Path::new("/sys/fs/cgroup/systemd/knarr/a"), Path::new("/sys/fs/cgroup/unified/knarr/a")]
        );
    }

    /// A v2 tree as files, as the kernel shows them.
    #[test]
    fn a_unified_group_is_made_limited_measured_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let groups = Cgroups { layout: Layout::V2(dir.path().to_owned()), others: Vec::new() };
        let (parent, group) = (dir.path().join("knarr"), dir.path().join("knarr/pod"));
        fs::create_dir_all(&group).unwrap();
        for tree in [dir.path(), &parent] {
            fs::write(tree.join("cgroup.subtree_control"), "cpu memory\n").unwrap();
        }
        for (file, content) in [
            ("cpu.stat", "usage_usec 5\nuser_usec 3\n"),
            ("memory.stat", "anon 100\ninactive_file 30\npgfault 7\npgmajfault 1\n"),
            ("memory.current", "400\n"),
            ("memory.swap.current", "8\n"),
            ("memory.events", "low 0\noom 3\noom_kill 2\n"),
            ("pids.current", "4\n"),
            ("cgroup.procs", "11\n12\n"),
            ("cgroup.controllers", "cpu memory pids\n"),
        ] {
            fs::write(group.join(file), content).unwrap();
        }
        let resources = LinuxContainerResources {
            cpu_shares: 1024,
            memory_limit_in_bytes: 1 << 20,
            unified: [("memory.high".to_owned(), "1000".to_owned())].into(),
            ..Default::default()
        };
        groups.create("/knarr/pod", &resources).unwrap();
        let read = |file: &str| fs::read_to_string(group.join(file)).unwrap();
        assert_eq!(
            (read("cpu.weight"), read("memory.max"), read("memory.high")),
            ("39".into(), "1048576".into(), "1000".into())
        );
        // A real tree has them one after the other; this file keeps the last one asked for.
        assert_eq!(fs::read_to_string(parent.join("cgroup.subtree_control")).unwrap(), "+hugetlb");
        let lacking = LinuxContainerResources { cpuset_cpus: "0".into(), ..Default::default() };
        groups.update("/knarr/pod", &lacking).unwrap();
        assert!(!group.join("cpuset.cpus").exists(), "the host keeps that controller to itself");
        groups.set_pids_max("/knarr/pod", Some(9)).unwrap();
        assert_eq!(read("pids.max"), "9");
        let want = Usage {
            cpu_nanos: 5000,
            memory_bytes: 400,
            working_set_bytes: 370,
            rss_bytes: 100,
            page_faults: 7,
            major_page_faults: 1,
            memory_limit_bytes: Some(1 << 20),
            swap_bytes: Some(8),
            pids: 4,
        };
        assert_eq!(groups.usage("/knarr/pod").unwrap(), want);
        assert_eq!((groups.oom_kills("/knarr/pod"), groups.pids("/knarr")), (2, vec![11, 12]));
        groups.kill("/knarr/pod");
        assert_eq!(read("cgroup.kill"), "1");
        let escape = LinuxContainerResources {
            unified: [("../memory.max".to_owned(), "1".to_owned())].into(),
            ..Default::default()
        };
        assert!(groups.update("/knarr/pod", &escape).is_err());
    }

    #[test]
    fn unified_hosts_use_v2() {
        let groups = Cgroups::from_mountinfo("30 25 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw").unwrap();
        assert_eq!(groups.version(), "v2");
        assert_eq!(groups.dirs("/knarr/a"), [Path::new("/sys/fs/cgroup/knarr/a")]);
    }

    #[test]
    fn hosts_without_control_groups_say_what_to_do() {
        let error = Cgroups::from_mountinfo("").unwrap_err();
        assert!(error.message.contains("mount cgroup2"), "{error}");
    }

    #[test]
    fn limits_become_the_files_of_each_version() {
        let resources = LinuxContainerResources {
            cpu_shares: 1024,
            cpu_quota: 50_000,
            cpu_period: 100_000,
            memory_limit_in_bytes: 64 << 20,
            memory_swap_limit_in_bytes: 64 << 20,
            ..Default::default()
        };
        let show = |writes: Vec<Write>| {
            writes.into_iter().map(|(_, file, value)| format!("{file}={value}")).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(
            show(v1_writes(&resources).unwrap()),
            "cpu.shares=1024 cpu.cfs_period_us=100000 cpu.cfs_quota_us=50000 \
             memory.limit_in_bytes=67108864 memory.memsw.limit_in_bytes=67108864"
        );
        assert_eq!(
            show(v2_writes(&resources).unwrap()),
            "cpu.weight=39 cpu.max=50000 100000 memory.max=67108864 memory.swap.max=0"
        );
    }

    #[test]
    fn paths_that_leave_the_tree_are_refused() {
        for path in ["", "/", "/knarr/../x", ".."] {
            assert!(check_path(path).is_err(), "{path}");
        }
    }
}
