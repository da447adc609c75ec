//! Kernel settings below `/proc/sys`, named with slashes (`net/ipv4/ip_forward`).
//!
//! `/proc/sys/net` shows the settings of the calling thread's network namespace.

use std::path::PathBuf;

use crate::error::{NetworkError, Result};
use crate::ledger::{Change, Ledger};

/// The setting's value, without the newline; `None` where this kernel has no such setting.
pub fn get(path: &str) -> Result<Option<String>> {
    match std::fs::read_to_string(file(path)) {
        Ok(value) => Ok(Some(value.trim().to_owned())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(NetworkError::Sysctl { path: file(path), source }),
    }
}

/// Writes a setting.
pub fn set(path: &str, value: &str) -> Result<()> {
    std::fs::write(file(path), value).map_err(|source| NetworkError::Sysctl { path: file(path), source })
}

/// Makes a setting of the whole host be `value` and notes in the ledger what it was; nothing happens when
/// it is so already.
pub fn ensure(ledger: &Ledger, path: &str, value: &str) -> Result<()> {
    let before = get(path)?;
    if before.as_deref() == Some(value) {
        return Ok(());
    }
    if let Some(before) = before {
        ledger.record(Change::Sysctl { path: path.to_owned(), before, after: value.to_owned() })?;
    }
    set(path, value)
}

fn file(path: &str) -> PathBuf {
    PathBuf::from("/proc/sys").join(path)
}
