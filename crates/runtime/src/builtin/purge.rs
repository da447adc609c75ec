//! Taking everything away: processes, mounts, control groups, namespaces, directories. And looking whether it is
//! gone. Only what lies below the paths and the control group of the configuration is touched.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{Config, snapshot};
use crate::cgroup::Cgroups;
use crate::error::{Context, Error, Result};
use crate::keeper::client;

/// How long killed processes may take to be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(5);
/// Rounds of unmounting: a mount may sit on another.
const UNMOUNT_ROUNDS: usize = 16;

/// One thing looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// What was looked at: `mounts below /var/lib/knarr/runtime`.
    pub what: String,
    /// What is still there; empty is clean.
    pub leftovers: Vec<String>,
}

/// Kills every container and the keeper, and removes everything of ours. Works with no runtime running as well as
/// with one that was just dropped. Blocking.
pub fn purge(config: &Config) -> Result<()> {
    let cgroups = Cgroups::detect()?;
    kill_all(&cgroups, &config.cgroup_root)?;
    client::dismiss(&config.keeper_socket(), KILL_TIMEOUT)?;
    for dir in [&config.run_dir, &config.data_dir] {
        unmount_below(dir)?;
    }
    cgroups.remove(&config.cgroup_root)?;
    for dir in [&config.run_dir, &config.data_dir] {
        super::sandbox::remove_dir(dir)?;
    }
    Ok(())
}

/// Kills every container and the keeper; images, records and writable layers stay, so that the next start finds
/// the containers as exited. Blocking.
pub fn stop_all(config: &Config) -> Result<()> {
    kill_all(&Cgroups::detect()?, &config.cgroup_root)?;
    client::dismiss(&config.keeper_socket(), KILL_TIMEOUT)
}

/// Looks for anything of ours: processes, mounts, control groups, directories. Blocking.
pub fn verify_clean(config: &Config) -> Result<Vec<Check>> {
    let cgroups = Cgroups::detect()?;
    let mut checks = vec![Check {
        what: format!("processes in control group {}", config.cgroup_root),
        leftovers: cgroups.pids(&config.cgroup_root).iter().map(i32::to_string).collect(),
    }];
    let groups = cgroups.dirs_anywhere(&config.cgroup_root);
    checks.push(Check {
        what: format!("control groups {}", config.cgroup_root),
        leftovers: groups.iter().filter(|dir| dir.exists()).map(|dir| dir.display().to_string()).collect(),
    });
    checks.push(Check {
        what: format!("keeper at {}", config.keeper_socket().display()),
        leftovers: client::keeper_pid(&config.keeper_socket()).iter().map(i32::to_string).collect(),
    });
    for dir in [&config.run_dir, &config.data_dir] {
        let mounts = mounts_below(dir)?;
        checks.push(Check {
            what: format!("mounts below {}", dir.display()),
            leftovers: mounts.iter().map(|mount| mount.display().to_string()).collect(),
        });
        checks.push(Check {
            what: format!("directory {}", dir.display()),
            leftovers: if dir.exists() { vec![dir.display().to_string()] } else { Vec::new() },
        });
    }
    Ok(checks)
}

fn kill_all(cgroups: &Cgroups, path: &str) -> Result<()> {
    let deadline = Instant::now() + KILL_TIMEOUT;
    loop {
        let left = cgroups.pids(path);
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(Error::internal(format!("processes {left:?} do not end after SIGKILL")));
        }
        cgroups.kill(path);
        std::thread::sleep(PAUSE);
    }
}

fn unmount_below(dir: &Path) -> Result<()> {
    for _ in 0..UNMOUNT_ROUNDS {
        let mounts = mounts_below(dir)?;
        if mounts.is_empty() {
            return Ok(());
        }
        // The latest first: later mounts lie on earlier ones.
        for mount in mounts.iter().rev() {
            snapshot::unmount(mount)?;
        }
    }
    Err(Error::internal(format!("mounts below {} come back after unmounting", dir.display())))
}

fn mounts_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let text = fs::read_to_string("/proc/self/mountinfo").step(|| "read /proc/self/mountinfo".into())?;
    let points = text.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape);
    Ok(points.filter(|point| point.starts_with(dir)).collect())
}

/// The kernel writes blanks and the like as three octal digits.
fn unescape(text: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = bytes.get(at + 1..at + 4).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if bytes[at] == b'\\' => {
                out.push(byte);
                at += 4;
            }
            _ => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_unescaped() {
        assert_eq!(unescape("/a\\040b\\134c"), Path::new("/a b\\c"));
        assert_eq!(unescape("/plain\\"), Path::new("/plain\\"));
    }
}
