//! The first process of a pod's shared process namespace (`shareProcessNamespace`): it reaps orphans and does
//! nothing else. Forked from the keeper, without privileges, files or a view of the host's file system.

use std::ffi::CStr;
use std::io;

/// The user `pause` containers run as.
const NOBODY: libc::uid_t = 65535;

/// Forks the process into a new process namespace; returns its pid here.
pub fn start() -> io::Result<i32> {
    let mut args = libc::clone_args {
        flags: libc::CLONE_NEWPID as u64,
        pidfd: 0,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: libc::SIGCHLD as u64,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: 0,
    };
    // SAFETY: without CLONE_VM this is a fork; the keeper has one thread, so the child may go on running Rust code.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &mut args, std::mem::size_of::<libc::clone_args>()) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => run(),
        pid => Ok(pid as i32),
    }
}

fn run() -> ! {
    if let Err(error) = drop_everything() {
        eprintln!("pod init: {error}");
        std::process::exit(1);
    }
    // SAFETY: plain system calls on local memory; this process has a single thread.
    unsafe {
        libc::close_range(0, libc::c_uint::MAX, 0);
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGCHLD);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::sigprocmask(libc::SIG_SETMASK, &set, std::ptr::null_mut());
        loop {
            if libc::sigwaitinfo(&set, std::ptr::null_mut()) == libc::SIGTERM {
                libc::_exit(0);
            }
            while libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) > 0 {}
        }
    }
}

/// An empty root, no rights, the name users know from `ps`.
fn drop_everything() -> io::Result<()> {
    let check = |result: i32| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    const SLASH: &CStr = c"/";
    const SYS: &CStr = c"/sys";
    const TMPFS: &CStr = c"tmpfs";
    const OPTIONS: &CStr = c"size=4k,mode=555";
    // SAFETY: all strings are NUL-terminated constants; pointers may be null where the calls allow it.
    unsafe {
        check(libc::unshare(libc::CLONE_NEWNS))?;
        let private = libc::MS_REC | libc::MS_PRIVATE;
        check(libc::mount(std::ptr::null(), SLASH.as_ptr(), std::ptr::null(), private, std::ptr::null()))?;
        let options = OPTIONS.as_ptr().cast();
        check(libc::mount(TMPFS.as_ptr(), SYS.as_ptr(), TMPFS.as_ptr(), libc::MS_RDONLY, options))?;
        check(libc::chdir(SYS.as_ptr()))?;
        // `pivot_root(".", ".")` stacks the old root on the new one; unmounting it leaves the empty one.
        check(libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()) as i32)?;
        check(libc::umount2(c".".as_ptr(), libc::MNT_DETACH))?;
        check(libc::chdir(SLASH.as_ptr()))?;
        check(libc::prctl(libc::PR_SET_NAME, c"pause".as_ptr()))?;
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        check(libc::setgroups(0, std::ptr::null()))?;
        check(libc::setresgid(NOBODY, NOBODY, NOBODY))?;
        check(libc::setresuid(NOBODY, NOBODY, NOBODY))?;
        libc::setsid();
    }
    Ok(())
}
