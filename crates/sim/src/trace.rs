//! What happened, line by line with its virtual time, and one number for all of it. Two runs of a seed are the same
//! if that number is.

use crate::rim;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher};

/// Lines kept to be shown after a violation.
const LAST_LINES: usize = 60;

/// The trace of one simulation.
pub struct Trace {
    state: Mutex<State>,
    print: bool,
}

struct State {
    hasher: DefaultHasher,
    lines: u64,
    last: VecDeque<String>,
    violations: Vec<String>,
}

impl Trace {
    /// `print` shows every line at once.
    pub fn new(print: bool) -> Self {
        let state =
            State { hasher: DefaultHasher::new(), lines: 0, last: VecDeque::new(), violations: Vec::new() };
        Trace { state: Mutex::new(state), print }
    }

    /// `who` did or met `what`.
    pub fn line(&self, who: &str, what: &str) {
        let line = format!("{:>10.4} {who:<14} {what}", rim::elapsed().as_secs_f64());
        if self.print {
            println!("{line}");
        }
        let mut state = self.state.lock();
        line.hash(&mut state.hasher);
        state.lines += 1;
        if state.last.len() == LAST_LINES {
            state.last.pop_front();
        }
        state.last.push_back(line);
    }

    /// Something happened that must not.
    pub fn violation(&self, what: String) {
        self.line("VIOLATION", &what);
        self.state.lock().violations.push(what);
    }

    pub fn violations(&self) -> Vec<String> {
        self.state.lock().violations.clone()
    }

    pub fn is_violated(&self) -> bool {
        !self.state.lock().violations.is_empty()
    }

    /// The number for all lines, and how many there are.
    pub fn digest(&self) -> (u64, u64) {
        let state = self.state.lock();
        (state.hasher.finish(), state.lines)
    }

    pub fn last_lines(&self) -> Vec<String> {
        self.state.lock().last.iter().cloned().collect()
    }
}
