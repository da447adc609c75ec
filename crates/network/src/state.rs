//! Small JSON files that several processes share: read whole, written whole, under a lock.
//!
//! The files describe things that live in the kernel and vanish with a reboot, so they belong on a tmpfs
//! (`/run`); a rename makes each write atomic against a crash of the process, and nothing is fsynced.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{NetworkError, Result};

/// One shared file holding one `T`; absent means `T::default()`.
pub struct StateFile<T> {
    path: PathBuf,
    holds: PhantomData<fn() -> T>,
}

impl<T: Default + Clone + PartialEq + Serialize + DeserializeOwned> StateFile<T> {
    /// The file `name` in `dir`. Nothing is touched yet.
    pub fn new(dir: &Path, name: &str) -> StateFile<T> {
        StateFile { path: dir.join(name), holds: PhantomData }
    }

    /// What the file says now.
    pub fn read(&self) -> Result<T> {
        let text = match std::fs::read(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(T::default()),
            Err(error) => return Err(self.failed(error)),
        };
        serde_json::from_slice(&text)
            .map_err(|error| NetworkError::Corrupt { path: self.path.clone(), reason: error.to_string() })
    }

    /// Changes the content under the lock; writes only if `change` succeeded and changed something.
    pub fn update<R>(&self, change: impl FnOnce(&mut T) -> Result<R>) -> Result<R> {
        let _lock = self.lock()?;
        let before = self.read()?;
        let mut after = before.clone();
        let result = change(&mut after)?;
        if after != before {
            self.write(&after)?;
        }
        Ok(result)
    }

    /// Where the file is.
    #[cfg(test)]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn lock(&self) -> Result<File> {
        if let Some(dir) = self.path.parent() {
            std::fs::create_dir_all(dir).map_err(|error| self.failed(error))?;
        }
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.path.with_extension("lock"))
            .map_err(|error| self.failed(error))?;
        file.lock().map_err(|error| self.failed(error))?;
        Ok(file)
    }

    fn write(&self, value: &T) -> Result<()> {
        let text = serde_json::to_vec(value)
            .map_err(|error| NetworkError::Corrupt { path: self.path.clone(), reason: error.to_string() })?;
        let fresh = self.path.with_extension("new");
        std::fs::write(&fresh, text).map_err(|error| self.failed(error))?;
        std::fs::rename(&fresh, &self.path).map_err(|error| self.failed(error))
    }

    fn failed(&self, source: std::io::Error) -> NetworkError {
        NetworkError::State { path: self.path.clone(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absent_file_is_the_default_and_a_failed_change_writes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file: StateFile<Vec<u32>> = StateFile::new(dir.path(), "x.json");
        assert_eq!(file.read().unwrap(), Vec::<u32>::new());
        let failed = file.update(|list| -> Result<()> {
            list.push(1);
            Err(NetworkError::BadSubnet { value: String::new(), reason: "on purpose" })
        });
        assert!(failed.is_err());
        assert!(!file.path().exists());
        file.update(|list| {
            list.push(2);
            Ok(())
        })
        .unwrap();
        assert_eq!(file.read().unwrap(), [2]);
    }

    #[test]
    fn a_torn_file_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("x.json"), "[1,").unwrap();
        let file: StateFile<Vec<u32>> = StateFile::new(dir.path(), "x.json");
        let error = file.read().unwrap_err().to_string();
        assert!(error.contains("x.json"), "{error}");
    }
}
