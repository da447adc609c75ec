//! The forked child that builds one container, or one exec, with libcontainer, reports and exits. A child of its
//! own, because libcontainer changes its process (oom score, working directory, dumpability) and waits; the
//! container's first process is made a sibling of the child, so that the keeper is its parent.
//!
//! Control groups are joined here instead of by libcontainer. Moving a process by writing its pid to
//! `cgroup.procs` takes the kernel's global thread-group lock, which waits for an RCU grace period: 10 to 15 ms
//! a start. A single-threaded process that writes `0` to a v1 `tasks` file moves only itself and needs no lock
//! (`cgroup_attach_lock` in kernel/cgroup/cgroup.c); on v2 it is born in its group (`CLONE_INTO_CGROUP`).
//! To keep libcontainer from doing it again, the child hides the mounts of control groups from it, in a mount
//! namespace of its own.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::oci_spec::runtime::{LinuxSeccomp, Spec};
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};
use nix::sys::socket::{self, ControlMessageOwned, MsgFlags, UnixAddr};

use super::protocol::{Failure, FailureKind, StagedMount, StartContainer, StartExec, Stdin};
use super::socket as packet;
use crate::rootdir::c_path;

/// Where control groups are mounted, and where the views of a container's own are put while it is built.
const CGROUP_MOUNT: &str = "/sys/fs/cgroup";
/// The constant in libc has too narrow a type.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// What the child reports; the terminal's descriptor comes along if there is one.
pub type Outcome = Result<i32, Failure>;

/// A running child.
pub struct Creator {
    /// One [`Outcome`], or end of file if the child died.
    pub result: OwnedFd,
}

/// Where the `index`th view of a container's control group appears to libcontainer: the bind source to put into
/// the spec.
pub fn view_path(index: usize) -> String {
    format!("{CGROUP_MOUNT}/view{index}")
}

/// Where the `index`th staged mount appears to libcontainer.
pub fn staged_path(index: usize) -> String {
    format!("{CGROUP_MOUNT}/mount{index}")
}

/// Forks a child to build and start a container.
pub fn start_container(start: &StartContainer) -> io::Result<Creator> {
    fork_creator(&start.cgroup_dirs, |result| {
        report(result, build_container(start));
    })
}

/// Forks a child to run a command in a container. `streams` are its stdin, stdout, stderr.
pub fn start_exec(exec: &StartExec, streams: [Option<OwnedFd>; 3]) -> io::Result<Creator> {
    fork_creator(&exec.cgroup_dirs, |result| {
        report(result, build_exec(exec, streams));
    })
}

fn fork_creator(cgroup_dirs: &[PathBuf], run: impl FnOnce(&OwnedFd)) -> io::Result<Creator> {
    let (ours, theirs) = packet::pair()?;
    let unified = match cgroup_dirs {
        [dir] if dir.join("cgroup.controllers").exists() => Some(File::open(dir)?),
        _ => None,
    };
    let into_cgroup = if unified.is_some() { CLONE_INTO_CGROUP } else { 0 };
    let mut args = libc::clone_args {
        flags: into_cgroup,
        pidfd: 0,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: libc::SIGCHLD as u64,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: unified.as_ref().map_or(0, |dir| dir.as_raw_fd() as u64),
    };
    // SAFETY: without CLONE_VM this is a fork; the keeper has one thread, so the child may go on running Rust code.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &mut args, std::mem::size_of::<libc::clone_args>()) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            drop(ours);
            restore_signals();
            if unified.is_none()
                && let Err(error) = join_v1(cgroup_dirs)
            {
                report(&theirs, Err(internal(format!("join control group: {error}"))));
            } else {
                run(&theirs);
            }
            // SAFETY: ends the child without running the keeper's exit handlers.
            unsafe { libc::_exit(0) }
        }
        _ => Ok(Creator { result: ours }),
    }
}

/// Undoes the keeper's signal set-up, which a container must not inherit.
fn restore_signals() {
    // SAFETY: plain system calls on local memory; this process has a single thread.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &set, std::ptr::null_mut());
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
}

fn join_v1(dirs: &[PathBuf]) -> io::Result<()> {
    for dir in dirs {
        let tasks = dir.join("tasks");
        let write = |path: &Path| OpenOptions::new().write(true).open(path)?.write_all(b"0");
        write(&tasks)
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", tasks.display())))?;
    }
    Ok(())
}

fn report(result: &OwnedFd, outcome: Result<(i32, Option<OwnedFd>), Failure>) {
    let (outcome, terminal): (Outcome, _) = match outcome {
        Ok((pid, terminal)) => (Ok(pid), terminal),
        Err(failure) => (Err(failure), None),
    };
    let fds: Vec<_> = terminal.iter().map(AsFd::as_fd).collect();
    // The keeper sees end of file if this fails, and reports that.
    let _ = packet::send(result.as_raw_fd(), &outcome, &fds);
}

fn build_container(start: &StartContainer) -> Result<(i32, Option<OwnedFd>), Failure> {
    hide_cgroups(&start.cgroup_views, &start.staged_mounts)
        .map_err(|error| internal(format!("prepare mounts: {error}")))?;
    let exec_error = ExecPipe::new()?;
    let mut builder = ContainerBuilder::new(start.id.clone(), SyscallType::Linux)
        .with_root_path(&start.oci_root)
        .map_err(|error| internal(chain(&error)))?
        .with_executor(Command { error_fd: exec_error.write.as_raw_fd(), seccomp: None });
    let console = if start.terminal {
        let (listener, path) = console_socket(&start.bundle)?;
        builder = builder.with_console_socket(Some(path));
        Some(listener)
    } else {
        let stdio = open_stdio(start).map_err(|error| internal(format!("open pipes: {error}")))?;
        let [stdin, stdout, stderr] = stdio;
        builder = builder.with_stdin(stdin).with_stdout(stdout).with_stderr(stderr);
        None
    };
    let mut container = builder
        .as_init(&start.bundle)
        .with_systemd(false)
        .with_detach(true)
        .as_sibling(true)
        .build()
        .map_err(|error| cannot_run(chain(&error)))?;
    let terminal = console.map(|listener| take_terminal(&listener)).transpose()?;
    container.start().map_err(|error| internal(chain(&error)))?;
    exec_error.wait()?;
    let pid = container.pid().ok_or_else(|| internal("libcontainer told no pid".into()))?;
    Ok((pid.as_raw(), terminal))
}

fn build_exec(exec: &StartExec, streams: [Option<OwnedFd>; 3]) -> Result<(i32, Option<OwnedFd>), Failure> {
    let spec = Spec::load(exec.bundle.join("config.json")).map_err(|error| internal(chain(&error)))?;
    let seccomp = spec.linux().as_ref().and_then(|linux| linux.seccomp().clone());
    hide_cgroups(&[], &[]).map_err(|error| internal(format!("prepare mounts: {error}")))?;
    let exec_error = ExecPipe::new()?;
    let mut builder = ContainerBuilder::new(exec.id.clone(), SyscallType::Linux)
        .with_root_path(&exec.oci_root)
        .map_err(|error| internal(chain(&error)))?
        .with_executor(Command { error_fd: exec_error.write.as_raw_fd(), seccomp });
    let console = if exec.terminal {
        let (listener, path) = console_socket(&exec.bundle)?;
        builder = builder.with_console_socket(Some(path));
        Some(listener)
    } else {
        let [stdin, stdout, stderr] = streams;
        let or_null = |stream: Option<OwnedFd>| match stream {
            Some(fd) => Ok(fd),
            None => dev_null().map_err(|error| internal(format!("open /dev/null: {error}"))),
        };
        builder =
            builder.with_stdin(or_null(stdin)?).with_stdout(or_null(stdout)?).with_stderr(or_null(stderr)?);
        None
    };
    let pid = builder
        .as_tenant()
        .with_process(Some(&exec.process))
        .with_detach(true)
        .as_sibling(true)
        .build()
        .map_err(|error| cannot_run(chain(&error)))?;
    let terminal = console.map(|listener| take_terminal(&listener)).transpose()?;
    exec_error.wait()?;
    Ok((pid.as_raw(), terminal))
}

/// The container's ends of its pipes. Output is opened for reading too: so a write never finds the pipe without a
/// reader, and the container blocks instead of dying while a keeper is replaced.
fn open_stdio(start: &StartContainer) -> io::Result<[OwnedFd; 3]> {
    let both = |name: &str| {
        OpenOptions::new().read(true).write(true).open(start.bundle.join(name)).map(OwnedFd::from)
    };
    let stdin = match start.stdin {
        Stdin::Null => dev_null()?,
        Stdin::Open => both("stdin")?,
        Stdin::Once => {
            let file = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(start.bundle.join("stdin"))?;
            set_blocking(&file)?;
            file.into()
        }
    };
    Ok([stdin, both("stdout")?, both("stderr")?])
}

fn set_blocking(file: &File) -> io::Result<()> {
    // SAFETY: fcntl on a descriptor we own.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, 0) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn dev_null() -> io::Result<OwnedFd> {
    Ok(OpenOptions::new().read(true).write(true).open("/dev/null")?.into())
}

/// In a mount namespace of its own, replaces `/sys/fs/cgroup` by a tmpfs that holds only `views` and `staged`.
///
/// libcontainer makes every mount of the container a slave of the host's and ignores what the spec says about
/// propagation. A mount that was made private, or a slave, before it gets there stays so.
fn hide_cgroups(views: &[PathBuf], staged: &[StagedMount]) -> io::Result<()> {
    let mut trees = Vec::new();
    for (index, view) in views.iter().enumerate() {
        trees.push((open_tree(view, false)?, PathBuf::from(view_path(index)), true));
    }
    for (index, mount) in staged.iter().enumerate() {
        let tree = open_tree(&mount.source, true)?;
        set_propagation(&tree, if mount.follows_host { libc::MS_SLAVE } else { libc::MS_PRIVATE })?;
        trees.push((tree, PathBuf::from(staged_path(index)), fs::metadata(&mount.source)?.is_dir()));
    }
    let mount_point = CString::new(CGROUP_MOUNT)?;
    let tmpfs = c"tmpfs";
    let none = std::ptr::null();
    // SAFETY: all strings are NUL-terminated and outlive the calls; null is allowed where passed.
    unsafe {
        check(libc::unshare(libc::CLONE_NEWNS).into(), "unshare mounts")?;
        // Private first: otherwise the unmount would reach the host.
        let private = libc::MS_REC | libc::MS_PRIVATE;
        check(libc::mount(none, c"/sys".as_ptr(), none, private, none.cast()).into(), "make /sys private")?;
        check(libc::umount2(mount_point.as_ptr(), libc::MNT_DETACH).into(), "unmount /sys/fs/cgroup")?;
        let options = c"mode=755".as_ptr().cast();
        check(
            libc::mount(tmpfs.as_ptr(), mount_point.as_ptr(), tmpfs.as_ptr(), 0, options).into(),
            "mount tmpfs on /sys/fs/cgroup",
        )?;
    }
    for (tree, target, is_dir) in &trees {
        if *is_dir {
            fs::create_dir(target)?;
        } else {
            File::create(target)?;
        }
        let target = c_path(target)?;
        let flags = libc::MOVE_MOUNT_F_EMPTY_PATH;
        // SAFETY: `tree` is a detached mount we own, the strings are NUL-terminated.
        let moved = unsafe {
            libc::syscall(
                libc::SYS_move_mount,
                tree.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_FDCWD,
                target.as_ptr(),
                flags,
            )
        };
        check(moved, "attach a mount")?;
    }
    Ok(())
}

/// A detached copy of the mounts at `path`.
fn open_tree(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let c_path = c_path(path)?;
    let recursive = if recursive { libc::AT_RECURSIVE as libc::c_uint } else { 0 };
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | recursive;
    // SAFETY: the path is NUL-terminated and outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, c_path.as_ptr(), flags) };
    let fd = check(fd, &path.display().to_string())?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

fn set_propagation(tree: &OwnedFd, propagation: libc::c_ulong) -> io::Result<()> {
    /// `struct mount_attr`.
    #[repr(C)]
    struct Attributes {
        set: u64,
        clear: u64,
        propagation: u64,
        user_namespace: u64,
    }
    let attributes = Attributes { set: 0, clear: 0, propagation, user_namespace: 0 };
    let flags = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
    // SAFETY: `attributes` has the size told and lives through the call; the string is NUL-terminated.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &attributes,
            std::mem::size_of::<Attributes>(),
        )
    };
    check(result, "set mount propagation").map(drop)
}

fn check(result: i64, what: &str) -> io::Result<i64> {
    match result {
        -1 => {
            let error = io::Error::last_os_error();
            Err(io::Error::new(error.kind(), format!("{what}: {error}")))
        }
        result => Ok(result),
    }
}

/// libcontainer sends a terminal's descriptor to a socket that it finds by path.
fn console_socket(dir: &Path) -> Result<(UnixListener, PathBuf), Failure> {
    let path = dir.join(format!("console-{}.sock", std::process::id()));
    let bind = || {
        // The path may be longer than an address may be: bind relative to its directory.
        std::env::set_current_dir(dir)?;
        let name = path.file_name().map(PathBuf::from).unwrap_or_default();
        UnixListener::bind(name)
    };
    let listener = bind().map_err(|error| internal(format!("bind {}: {error}", path.display())))?;
    Ok((listener, path))
}

fn take_terminal(listener: &UnixListener) -> Result<OwnedFd, Failure> {
    let take = || -> io::Result<Option<OwnedFd>> {
        let (stream, _) = listener.accept()?;
        if let Ok(local) = listener.local_addr()
            && let Some(path) = local.as_pathname()
        {
            let _ = fs::remove_file(path);
        }
        let mut bytes = [0u8; 256];
        let mut control = nix::cmsg_space!([RawFd; 1]);
        let mut slices = [io::IoSliceMut::new(&mut bytes)];
        let message = socket::recvmsg::<UnixAddr>(
            stream.as_raw_fd(),
            &mut slices,
            Some(&mut control),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        for part in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = part {
                // SAFETY: the kernel has just installed this descriptor for us.
                return Ok(fds.first().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }));
            }
        }
        Ok(None)
    };
    match take() {
        Ok(Some(fd)) => Ok(fd),
        Ok(None) => Err(internal("no terminal came over the console socket".into())),
        Err(error) => Err(internal(format!("take the terminal: {error}"))),
    }
}

/// Runs the container's command, saying what is wrong with it in the words users know from runc.
#[derive(Clone)]
struct Command {
    /// Closes by itself when the command starts.
    error_fd: RawFd,
    /// libcontainer confines a container's first process but not what is executed in it later; so we do.
    seccomp: Option<LinuxSeccomp>,
}

impl Executor for Command {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        find(spec).map(drop).map_err(ExecutorValidationError::ArgValidationError)
    }

    fn setup_envs(&self, _envs: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        // `exec` passes the spec's environment itself, in order.
        Ok(())
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let error = match confine(self.seccomp.as_ref()).and_then(|()| execute(spec)) {
            Ok(never) => match never {},
            Err(error) => error,
        };
        // SAFETY: the descriptor is open until exec succeeds, which it did not; this process owns it.
        let mut pipe = File::from(unsafe { OwnedFd::from_raw_fd(self.error_fd) });
        let _ = pipe.write_all(error.as_bytes());
        Err(ExecutorError::Other(error))
    }
}

/// Privileges are dropped by now, so the kernel takes a filter only from a process that can gain none.
fn confine(seccomp: Option<&LinuxSeccomp>) -> Result<(), String> {
    let Some(seccomp) = seccomp else { return Ok(()) };
    // SAFETY: prctl with plain numbers.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } < 0 {
        return Err(format!("confine the command: {}", io::Error::last_os_error()));
    }
    libcontainer::seccomp::initialize_seccomp(seccomp)
        .map(drop)
        .map_err(|error| format!("load the seccomp profile: {}", chain(&error)))
}

fn execute(spec: &Spec) -> Result<std::convert::Infallible, String> {
    let path = find(spec)?;
    let process = spec.process().as_ref().ok_or("no process")?;
    let strings = |list: &Option<Vec<String>>| -> Result<Vec<CString>, String> {
        let list = list.as_deref().unwrap_or_default();
        list.iter().map(|item| CString::new(item.as_bytes()).map_err(|error| error.to_string())).collect()
    };
    let (args, env) = (strings(process.args())?, strings(process.env())?);
    let c_path = CString::new(path.as_os_str().as_bytes()).map_err(|error| error.to_string())?;
    nix::unistd::execve(&c_path, &args, &env)
        .map_err(|error| format!("exec {}: {}", path.display(), error.desc().to_lowercase()))
}

/// Finds the executable as a shell would, in the container's `PATH` and root.
fn find(spec: &Spec) -> Result<PathBuf, String> {
    let process = spec.process().as_ref().ok_or("no process")?;
    let name = process.args().as_deref().and_then(|args| args.first()).ok_or("no command specified")?;
    if name.contains('/') {
        let path = process.cwd().join(name);
        return match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(format!("exec: {name:?}: stat {name}: no such file or directory"))
            }
            Err(error) => Err(format!("exec: {name:?}: stat {name}: {error}")),
            Ok(data) if data.is_dir() => Err(format!("exec: {name:?}: is a directory")),
            Ok(data) if data.permissions().mode() & 0o111 == 0 => {
                Err(format!("exec: {name:?}: permission denied"))
            }
            Ok(_) => Ok(path),
        };
    }
    let env = process.env().as_deref().unwrap_or_default();
    let search = env.iter().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or_default();
    for dir in search.split(':') {
        let path = process.cwd().join(dir).join(name);
        let runnable = |data: fs::Metadata| data.is_file() && data.permissions().mode() & 0o111 != 0;
        if fs::metadata(&path).is_ok_and(runnable) {
            return Ok(path);
        }
    }
    Err(format!("exec: {name:?}: executable file not found in $PATH"))
}

/// Carries the message of a failed exec; end of file says that it went well.
struct ExecPipe {
    read: OwnedFd,
    write: OwnedFd,
}

impl ExecPipe {
    fn new() -> Result<Self, Failure> {
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)
            .map_err(|error| internal(format!("make a pipe: {}", error.desc())))?;
        Ok(Self { read, write })
    }

    fn wait(self) -> Result<(), Failure> {
        drop(self.write);
        let mut message = String::new();
        File::from(self.read)
            .read_to_string(&mut message)
            .map_err(|error| internal(format!("wait for exec: {error}")))?;
        if message.is_empty() { Ok(()) } else { Err(cannot_run(message)) }
    }
}

fn internal(message: String) -> Failure {
    Failure { kind: FailureKind::Internal, message }
}

fn cannot_run(message: String) -> Failure {
    Failure { kind: FailureKind::CannotRun, message: format!("unable to start container process: {message}") }
}

/// The innermost causes, without libcontainer's repetitive wrappers.
fn chain(error: &dyn std::error::Error) -> String {
    let mut texts: Vec<String> = vec![error.to_string()];
    let mut source = error.source();
    while let Some(cause) = source {
        let text = cause.to_string();
        if texts.last() != Some(&text) {
            texts.push(text);
        }
        source = cause.source();
    }
    let wrappers = ["failed to create container", "error executing process", "error in executing process"];
    texts.retain(|text| !wrappers.contains(&text.as_str()));
    let text = texts.join(": ");
    match text.rfind("exec: \"") {
        Some(at) => text[at..].to_owned(),
        None => text,
    }
}
