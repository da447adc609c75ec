//! The first process of a container.
//!
//! The kernel ignores signals to it that it does not handle, and makes it the parent of orphans. So as
//! process 1, toolbox runs its command in a child, hands signals on to it, collects orphans, and ends as the
//! child ends. To the child nothing is special.

use crate::signals::{self, Blocked};

/// What shells add to a signal's number to make an exit code.
const SIGNALLED: i32 = 128;

/// Takes the part of the first process if this is it, and answers the exit code; `None` in any other process,
/// the child included.
pub fn run_if_first() -> Option<u8> {
    if std::process::id() != 1 {
        return None;
    }
    let blocked = Blocked::new(signals::all());
    // SAFETY: no other thread exists yet, so the child may do everything the parent may.
    match unsafe { libc::fork() } {
        0 => {
            blocked.release();
            None
        }
        child if child > 0 => Some(tend(child, &blocked)),
        _ => {
            eprintln!("toolbox: fork: {}", std::io::Error::last_os_error());
            Some(1)
        }
    }
}

fn tend(child: i32, blocked: &Blocked) -> u8 {
    loop {
        match blocked.wait() {
            libc::SIGCHLD => {
                if let Some(code) = collect(child) {
                    return code;
                }
            }
            signal => {
                // SAFETY: kill takes plain numbers. The child is not collected yet, so the number is its own.
                unsafe { libc::kill(child, signal) };
            }
        }
    }
}

/// Collects all that ended; the exit code once the child is among them.
fn collect(child: i32) -> Option<u8> {
    let mut code = None;
    loop {
        let mut status = 0;
        // SAFETY: `status` outlives the call.
        let ended = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) };
        if ended <= 0 {
            return code;
        }
        if ended == child {
            code = Some(if libc::WIFEXITED(status) {
                libc::WEXITSTATUS(status) as u8
            } else {
                (SIGNALLED + libc::WTERMSIG(status)) as u8
            });
        }
    }
}
