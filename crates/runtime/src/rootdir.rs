//! Reading and making things below a directory that somebody else filled: an image's root file system.
//! Every path is resolved by the kernel as if that directory were `/` (`openat2` with `RESOLVE_IN_ROOT`), so no
//! link and no `..` in an image leads out of it.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// A directory taken for `/`.
#[derive(Debug)]
pub struct RootDir {
    dir: OwnedFd,
}

impl RootDir {
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { dir: File::open(path)?.into() })
    }

    /// Opens a path inside; `flags` as for `open(2)`.
    pub fn open_at(&self, path: &Path, flags: i32) -> io::Result<OwnedFd> {
        openat2(self.dir.as_raw_fd(), path, flags, libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS)
    }

    /// Reads a file inside, at most `limit` bytes.
    pub fn read(&self, path: &Path, limit: u64) -> io::Result<Vec<u8>> {
        let file = File::from(self.open_at(path, libc::O_RDONLY | libc::O_NONBLOCK)?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let mut bytes = Vec::new();
        file.take(limit + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > limit {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {limit} bytes")));
        }
        Ok(bytes)
    }

    /// Opens a directory inside, making it and its parents (mode 0755) where they are missing. Links on the way
    /// are followed inside the root.
    pub fn make_dirs(&self, path: &Path) -> io::Result<OwnedFd> {
        let mut done = PathBuf::from("/");
        let mut dir = self.open_at(&done, libc::O_RDONLY | libc::O_DIRECTORY)?;
        for part in path.components() {
            let Component::Normal(name) = part else { continue };
            done.push(name);
            dir = match self.open_at(&done, libc::O_RDONLY | libc::O_DIRECTORY) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    mkdirat(dir.as_raw_fd(), name.as_bytes(), 0o755)?;
                    self.open_at(&done, libc::O_RDONLY | libc::O_DIRECTORY)?
                }
                other => other?,
            };
        }
        Ok(dir)
    }
}

impl AsFd for RootDir {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.dir.as_fd()
    }
}

/// `openat2(2)` with `RESOLVE_*` flags.
pub fn openat2(dir: i32, path: &Path, flags: i32, resolve: u64) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut how = unsafe_zeroed_how();
    how.flags = (flags | libc::O_CLOEXEC) as u64;
    how.mode = if flags & libc::O_CREAT != 0 { 0o600 } else { 0 };
    how.resolve = resolve;
    // SAFETY: `path` is NUL-terminated, `how` is a valid open_how of the size told, both outlive the call.
    let fd = unsafe {
        libc::syscall(libc::SYS_openat2, dir, path.as_ptr(), &how, std::mem::size_of::<libc::open_how>())
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn unsafe_zeroed_how() -> libc::open_how {
    // SAFETY: open_how is plain integers, for which zero is valid; it is non-exhaustive, so it cannot be written out.
    unsafe { std::mem::zeroed() }
}

fn mkdirat(dir: i32, name: &[u8], mode: libc::mode_t) -> io::Result<()> {
    let name = CString::new(name)?;
    // SAFETY: `name` is NUL-terminated and lives through the call.
    match unsafe { libc::mkdirat(dir, name.as_ptr(), mode) } {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            error => Err(error),
        },
    }
}

/// A path as the kernel takes it.
pub fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_and_dots_stay_inside() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("secret");
        std::fs::write(&outside, "outside").unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("etc")).unwrap();
        std::fs::write(root.join("secret"), "inside").unwrap();
        symlink("../../../../secret", root.join("etc/up")).unwrap();
        symlink(&outside, root.join("etc/absolute")).unwrap();

        let root = RootDir::open(&root).unwrap();
        assert_eq!(root.read(Path::new("/etc/up"), 100).unwrap(), b"inside");
        assert_eq!(root.read(Path::new("/../secret"), 100).unwrap(), b"inside");
        assert!(root.read(Path::new("/etc/absolute"), 100).is_err());
        assert!(root.read(Path::new("/secret"), 3).is_err(), "size limit");
    }
}
