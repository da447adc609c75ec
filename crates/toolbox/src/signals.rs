//! Signals by name, waited for instead of handled: no code runs in a handler.

use std::mem::MaybeUninit;
use std::ptr;

use crate::Outcome;

const NAMES: [(&str, i32); 12] = [
    ("HUP", libc::SIGHUP),
    ("INT", libc::SIGINT),
    ("QUIT", libc::SIGQUIT),
    ("USR1", libc::SIGUSR1),
    ("USR2", libc::SIGUSR2),
    ("PIPE", libc::SIGPIPE),
    ("ALRM", libc::SIGALRM),
    ("TERM", libc::SIGTERM),
    ("CHLD", libc::SIGCHLD),
    ("CONT", libc::SIGCONT),
    ("TSTP", libc::SIGTSTP),
    ("WINCH", libc::SIGWINCH),
];

/// A set of signals, blocked for this thread and those it starts.
pub struct Blocked(libc::sigset_t);

impl Blocked {
    /// Blocks these signals.
    pub fn new(signals: impl IntoIterator<Item = i32>) -> Blocked {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset initialises the set it is given.
        let mut set = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            set.assume_init()
        };
        for signal in signals {
            // SAFETY: the set is initialised; an invalid signal is only an error return.
            unsafe { libc::sigaddset(&mut set, signal) };
        }
        // SAFETY: the set is initialised; the old mask is not asked for.
        unsafe { libc::sigprocmask(libc::SIG_BLOCK, &set, ptr::null_mut()) };
        Blocked(set)
    }

    /// Unblocks them, for a child that is to have them as usual.
    pub fn release(&self) {
        // SAFETY: the set is initialised; the old mask is not asked for.
        unsafe { libc::sigprocmask(libc::SIG_UNBLOCK, &self.0, ptr::null_mut()) };
    }

    /// Waits for one of them.
    pub fn wait(&self) -> i32 {
        let mut signal = 0;
        // SAFETY: the set is initialised and `signal` outlives the call.
        unsafe { libc::sigwait(&self.0, &mut signal) };
        signal
    }
}

/// Prints these signals as they come, for ever.
pub fn trap(names: &[&str]) -> Outcome {
    let signals: Vec<i32> = names.iter().map(|name| by_name(name)).collect::<Result<_, _>>()?;
    let blocked = Blocked::new(signals);
    println!("trapping {}", names.join(" "));
    loop {
        println!("received {}", name_of(blocked.wait()));
    }
}

/// Every signal that can be forwarded.
pub fn all() -> impl Iterator<Item = i32> {
    NAMES.iter().map(|(_, signal)| *signal)
}

fn by_name(name: &str) -> Result<i32, String> {
    let plain = name.trim_start_matches("SIG");
    let found = NAMES.iter().find(|(known, _)| *known == plain);
    found.map(|(_, signal)| *signal).ok_or_else(|| {
        let known: Vec<&str> = NAMES.iter().map(|(name, _)| *name).collect();
        format!("unknown signal {name:?}; known are {}", known.join(" "))
    })
}

fn name_of(signal: i32) -> String {
    match NAMES.iter().find(|(_, known)| *known == signal) {
        Some((name, _)) => format!("SIG{name}"),
        None => format!("signal {signal}"),
    }
}
