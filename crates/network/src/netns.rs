//! Doing something inside another network namespace.

use std::fs::File;
use std::io;
use std::path::Path;

use nix::sched::{CloneFlags, setns};

use crate::error::{NetworkError, Result};

/// Opens a namespace, so that its path may vanish meanwhile.
pub fn open(path: &Path) -> Result<File> {
    File::open(path).map_err(|source| NetworkError::Namespace { path: path.to_owned(), source })
}

/// Runs `work` on a thread of its own that has entered the namespace. A socket opened there stays in the
/// namespace after the thread is gone; that is how the rest of this crate reaches into pods.
pub fn inside<T: Send>(path: &Path, work: impl FnOnce() -> io::Result<T> + Send) -> Result<T> {
    let namespace = open(path)?;
    let result = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("netns".into()).spawn_scoped(scope, || {
            setns(&namespace, CloneFlags::CLONE_NEWNET)?;
            work()
        })?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
    });
    result.map_err(|source| NetworkError::Namespace { path: path.to_owned(), source })
}
