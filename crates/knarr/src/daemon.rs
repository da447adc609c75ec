//! Keeping the cluster running in the background: a systemd unit where systemd runs, else a supervisor.
//!
//! The supervisor is this program too: a tiny process that starts `knarr run`, and starts it again if it
//! dies, waiting a little longer each time.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::settings::Settings;

const UNIT: &str = "knarr.service";
const UNIT_DIR: &str = "/etc/systemd/system";
const RESTART_DELAY_MIN: Duration = Duration::from_millis(100);
const RESTART_DELAY_MAX: Duration = Duration::from_secs(10);
/// A run of this length counts as healthy: the next restart is quick again.
const HEALTHY_AFTER: Duration = Duration::from_secs(30);
/// How long a stop may take before it is forced.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);
/// How long the kernel may take to end a process that was killed.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// True where systemd is the init system.
pub fn has_systemd() -> bool {
    Path::new("/run/systemd/system").exists()
}

/// The unit is for the machine's one cluster; others, as in tests, are supervised.
fn uses_unit(settings: &Settings) -> bool {
    has_systemd() && settings.data_dir == Path::new(crate::settings::DATA_DIR)
}

/// Where the cluster's log is to be read.
pub fn log_place(settings: &Settings) -> String {
    match uses_unit(settings) {
        true => format!("journalctl -u {UNIT}"),
        false => settings.log_file().display().to_string(),
    }
}

/// Starts the cluster in the background.
pub fn start(settings: &Settings) -> Result<()> {
    let program = std::env::current_exe().context("find this program")?;
    fs::create_dir_all(&settings.run_dir).with_context(|| format!("make {}", settings.run_dir.display()))?;
    if uses_unit(settings) {
        let text = format!(
            "[Unit]\nDescription=Knarr: Kubernetes in one binary\nAfter=network-online.target\nWants=network-online.target\n\n\
             [Service]\nExecStart={} run --data-dir {}\nRestart=always\nRestartSec=1\nKillMode=process\nDelegate=yes\nLimitNOFILE=1048576\n\n\
             [Install]\nWantedBy=multi-user.target\n",
            program.display(),
            settings.data_dir.display()
        );
        fs::write(Path::new(UNIT_DIR).join(UNIT), text).context("write the systemd unit")?;
        systemctl(&["daemon-reload"])?;
        return systemctl(&["enable", "--now", UNIT]);
    }
    let log = OpenOptions::new().create(true).append(true).open(settings.log_file());
    let log = log.with_context(|| format!("open {}", settings.log_file().display()))?;
    let mut command = Command::new(program);
    command.arg("supervise").arg("--data-dir").arg(&settings.data_dir);
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).current_dir("/");
    // SAFETY: between fork and exec only setsid is called, which is async-signal-safe and allocates nothing.
    unsafe {
        command.pre_exec(|| nix::unistd::setsid().map(|_| ()).map_err(Into::into));
    }
    let child = command.spawn().context("start the supervisor")?;
    write_pid(&settings.pid_file(), child.id())
}

fn write_pid(path: &Path, pid: u32) -> Result<()> {
    let mut file = File::create(path).with_context(|| format!("write {}", path.display()))?;
    writeln!(file, "{pid}")?;
    Ok(())
}

fn systemctl(args: &[&str]) -> Result<()> {
    let output = Command::new("systemctl").args(args).output().context("run systemctl")?;
    if !output.status.success() {
        bail!("systemctl {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// The process id of the supervisor, if it runs.
pub fn supervisor(settings: &Settings) -> Option<Pid> {
    let text = fs::read_to_string(settings.pid_file()).ok()?;
    let pid: i32 = text.trim().parse().ok()?;
    // A pid may have been given to another program since.
    let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let ours = command.split(|b| *b == 0).any(|arg| arg == b"supervise");
    ours.then_some(Pid::from_raw(pid))
}

/// Does the cluster run (or at least: does somebody see to it that it does)?
pub fn is_running(settings: &Settings) -> bool {
    supervisor(settings).is_some()
        || (uses_unit(settings)
            && Command::new("systemctl")
                .args(["is-active", "--quiet", UNIT])
                .status()
                .is_ok_and(|s| s.success()))
}

/// Ends the cluster's processes; containers are not its children and stay. True if it ran.
pub fn stop(settings: &Settings) -> Result<bool> {
    let mut ran = false;
    if uses_unit(settings) && Path::new(UNIT_DIR).join(UNIT).exists() {
        ran = is_running(settings);
        systemctl(&["disable", "--now", UNIT])?;
        fs::remove_file(Path::new(UNIT_DIR).join(UNIT)).context("remove the systemd unit")?;
        systemctl(&["daemon-reload"])?;
    }
    if let Some(pid) = supervisor(settings) {
        ran = true;
        end(pid)?;
    }
    match fs::remove_file(settings.pid_file()) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).context("remove the pid file")
        }
        _ => Ok(ran),
    }
}

/// Asks the process to end and waits until it has; forces it after a while.
fn end(pid: Pid) -> Result<()> {
    for (signal, patience) in [(Signal::SIGTERM, STOP_TIMEOUT), (Signal::SIGKILL, KILL_TIMEOUT)] {
        if kill(pid, signal).is_err() || wait_for_exit(pid, patience)? {
            return Ok(());
        }
    }
    bail!("process {pid} does not end, not even when killed")
}

/// Waits for the end of a process that is not a child, at most so long; false if it still runs. One that ended and
/// was not asked for by its parent yet has ended.
fn wait_for_exit(pid: Pid, at_most: Duration) -> Result<bool> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::{AsFd, FromRawFd, OwnedFd};
    // SAFETY: pidfd_open takes two integers and returns a new descriptor or -1; nothing is borrowed.
    let fd = unsafe { nix::libc::syscall(nix::libc::SYS_pidfd_open, pid.as_raw(), 0) };
    if fd < 0 {
        let error = nix::errno::Errno::last();
        ensure!(error == nix::errno::Errno::ESRCH, "wait for process {pid}: {error}");
        return Ok(true);
    }
    // SAFETY: the descriptor was just returned to us and nobody else has it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let deadline = Instant::now() + at_most;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(ready) => return Ok(ready > 0),
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => bail!("wait for process {pid}: {error}"),
        }
    }
}

/// The supervisor: runs until told to end.
pub fn supervise(data_dir: &Path) -> Result<()> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD] {
        signals.add(signal);
    }
    signals.thread_block().context("block signals")?;
    let program = std::env::current_exe().context("find this program")?;
    let mut delay = RESTART_DELAY_MIN;
    loop {
        let started = Instant::now();
        let mut command = Command::new(&program);
        command.arg("run").arg("--data-dir").arg(data_dir);
        // SAFETY: only the signal mask is reset between fork and exec, by one async-signal-safe call.
        unsafe {
            command.pre_exec(move || signals.thread_unblock().map_err(Into::into));
        }
        let child = Pid::from_raw(command.spawn().context("start knarr")?.id() as i32);
        if !watch_child(child, &signals)? {
            return Ok(());
        }
        delay = if started.elapsed() > HEALTHY_AFTER {
            RESTART_DELAY_MIN
        } else {
            (delay * 2).min(RESTART_DELAY_MAX)
        };
        eprintln!("knarr: ended unexpectedly; starting again in {} ms", delay.as_millis());
        if told_to_end(&signals, delay) {
            return Ok(());
        }
    }
}

/// True if the child died by itself, false if we were told to end it.
fn watch_child(child: Pid, signals: &SigSet) -> Result<bool> {
    loop {
        match signals.wait().context("wait for signals")? {
            Signal::SIGCHLD => {
                let ended = waitpid(child, Some(WaitPidFlag::WNOHANG));
                if matches!(ended, Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..))) {
                    return Ok(true);
                }
            }
            _ => {
                kill(child, Signal::SIGTERM).context("end knarr")?;
                waitpid(child, None).context("wait for knarr")?;
                return Ok(false);
            }
        }
    }
}

/// Waits out the delay, unless told to end.
fn told_to_end(signals: &SigSet, delay: Duration) -> bool {
    let mut stop = *signals;
    stop.remove(Signal::SIGCHLD);
    let time =
        nix::libc::timespec { tv_sec: delay.as_secs() as i64, tv_nsec: i64::from(delay.subsec_nanos()) };
    // SAFETY: both pointers are to live values of the right types; the third argument may be null.
    let signal = unsafe { nix::libc::sigtimedwait(stop.as_ref(), std::ptr::null_mut(), &time) };
    signal > 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_nobody_reaps_has_ended() {
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        let pid = Pid::from_raw(child.id() as i32);
        assert!(!wait_for_exit(pid, Duration::from_millis(10)).unwrap());
        end(pid).unwrap();
        assert!(Path::new(&format!("/proc/{pid}")).exists(), "it waits for its parent");
        child.wait().unwrap();
        assert!(wait_for_exit(pid, Duration::from_millis(10)).unwrap());
    }
}
