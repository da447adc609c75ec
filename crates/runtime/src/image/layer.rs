//! Unpacking one layer of an image into a directory that overlayfs can use as a lower layer.
//!
//! A layer comes from a stranger. So: every path is resolved inside the target by the kernel, never by us; an entry
//! that would leave it, a link whose target leads out of it, a device node outside `/dev`, attributes that
//! overlayfs would obey, and more than the allowed bytes or entries all refuse the whole layer. The caller
//! unpacks into a temporary directory and drops it on failure, so nothing is left half-done.

use std::collections::HashSet;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use tar::{Archive, Entry, EntryType};

use crate::error::{Error, Result};
use crate::rootdir::{RootDir, openat2};

/// What one layer may bring.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub bytes: u64,
    pub entries: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes: 64 << 30, entries: 2_000_000 }
    }
}

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Longest link target, as the kernel has it.
const LINK_BYTES_MAX: usize = 4096;

/// What was unpacked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Unpacked {
    pub bytes: u64,
    pub inodes: u64,
}

/// Unpacks an uncompressed tar stream into `target`, an empty directory.
pub fn unpack(stream: impl Read, target: &Path, limits: Limits) -> Result<Unpacked> {
    let root = RootDir::open(target)
        .map_err(|error| Error::internal(format!("open {}: {error}", target.display())))?;
    let mut unpacker =
        Unpacker { root, limits, done: Unpacked::default(), dirs: Vec::new(), made: HashSet::new() };
    let mut archive = Archive::new(stream);
    archive.set_ignore_zeros(false);
    let entries = archive.entries().map_err(|error| broken(&error))?;
    for entry in entries {
        let entry = entry.map_err(|error| broken(&error))?;
        unpacker.entry(entry)?;
    }
    unpacker.finish()
}

fn broken(error: &io::Error) -> Error {
    Error::invalid(format!("layer is not a valid tar archive: {error}"))
}

struct Unpacker {
    root: RootDir,
    limits: Limits,
    done: Unpacked,
    /// Directories' times are set last: filling a directory changes them.
    dirs: Vec<(PathBuf, i64)>,
    /// Paths this layer itself has brought: whiteouts hide only what is below.
    made: HashSet<PathBuf>,
}

impl Unpacker {
    fn entry(&mut self, mut entry: Entry<'_, impl Read>) -> Result<()> {
        let kind = entry.header().entry_type();
        if matches!(kind, EntryType::XGlobalHeader) {
            return Ok(());
        }
        self.done.inodes += 1;
        if self.done.inodes > self.limits.entries {
            return Err(Error::invalid(format!("layer has more than {} entries", self.limits.entries)));
        }
        let name = entry.path_bytes().into_owned();
        let path = clean(&name)?;
        let Some(file_name) = path.file_name().map(|name| name.as_bytes().to_owned()) else {
            // The root directory itself.
            return self.directory_facts(&mut entry, Path::new(""));
        };
        let parent_path = path.parent().unwrap_or(Path::new("")).to_owned();
        let parent = self
            .root
            .make_dirs(&parent_path)
            .map_err(|error| at(&path, &format!("its directory cannot be made: {error}")))?;
        if file_name == OPAQUE {
            return set_opaque(&parent).map_err(|error| at(&path, &format!("mark as opaque: {error}")));
        }
        if file_name.starts_with(b".wh..wh.") {
            // Bookkeeping of the old aufs driver.
            return Ok(());
        }
        if let Some(hidden) = file_name.strip_prefix(WHITEOUT) {
            return self.whiteout(&parent, &parent_path, hidden, &path);
        }
        self.clear(&parent, &file_name, kind, &path)?;
        self.make(&mut entry, kind, &parent, &file_name, &path)?;
        self.made.insert(path);
        Ok(())
    }

    fn make(
        &mut self,
        entry: &mut Entry<'_, impl Read>,
        kind: EntryType,
        parent: &OwnedFd,
        name: &[u8],
        path: &Path,
    ) -> Result<()> {
        let c_name = c_name(name, path)?;
        match kind {
            EntryType::Directory => {
                // SAFETY: the name is NUL-terminated and outlives the call.
                let made = unsafe { libc::mkdirat(parent.as_raw_fd(), c_name.as_ptr(), 0o755) };
                if made < 0 && io::Error::last_os_error().kind() != io::ErrorKind::AlreadyExists {
                    return Err(os_error(path, "make directory"));
                }
                return self.directory_facts(entry, path);
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                self.file(entry, parent, path, name)?;
            }
            EntryType::Symlink => {
                let target = link_target(entry, path)?;
                check_symlink(path, &target)?;
                let target = self::c_name(&target, path)?;
                // SAFETY: both strings are NUL-terminated and outlive the call.
                let made = unsafe { libc::symlinkat(target.as_ptr(), parent.as_raw_fd(), c_name.as_ptr()) };
                check(made, path, "make link")?;
            }
            EntryType::Link => return self.hard_link(entry, parent, &c_name, path),
            EntryType::Fifo => {
                // SAFETY: the name is NUL-terminated and outlives the call.
                let made = unsafe { libc::mkfifoat(parent.as_raw_fd(), c_name.as_ptr(), 0o600) };
                check(made, path, "make pipe")?;
            }
            EntryType::Char | EntryType::Block => self.device(entry, kind, parent, &c_name, path)?,
            other => return Err(at(path, &format!("entries of type {other:?} are not allowed in a layer"))),
        }
        self.facts(entry, parent, &c_name, kind, path)
    }

    fn file(
        &mut self,
        entry: &mut Entry<'_, impl Read>,
        parent: &OwnedFd,
        path: &Path,
        name: &[u8],
    ) -> Result<()> {
        let flags = libc::O_CREAT | libc::O_EXCL | libc::O_WRONLY | libc::O_NOFOLLOW;
        let name = Path::new(std::ffi::OsStr::from_bytes(name));
        let fd = openat2(parent.as_raw_fd(), name, flags, libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS)
            .map_err(|error| at(path, &format!("make file: {error}")))?;
        let mut file = File::from(fd);
        let room = self.limits.bytes.saturating_sub(self.done.bytes);
        let copied = io::copy(&mut entry.by_ref().take(room + 1), &mut file)
            .map_err(|error| at(path, &format!("write: {error}")))?;
        self.done.bytes += copied;
        if copied > room {
            return Err(Error::invalid(format!("layer unpacks to more than {} bytes", self.limits.bytes)));
        }
        Ok(())
    }

    /// A hard link's target is a path in the layer; it is opened inside the root, without following a last link.
    fn hard_link(
        &mut self,
        entry: &mut Entry<'_, impl Read>,
        parent: &OwnedFd,
        name: &CString,
        path: &Path,
    ) -> Result<()> {
        let target = link_target(entry, path)?;
        let target = clean(&target).map_err(|_| at(path, "its link target leads out of the image"))?;
        let fd = self
            .root
            .open_at(&target, libc::O_PATH | libc::O_NOFOLLOW)
            .map_err(|error| at(path, &format!("its link target {}: {error}", target.display())))?;
        // SAFETY: the strings are NUL-terminated and outlive the call, the descriptors are open.
        let made = unsafe {
            libc::linkat(fd.as_raw_fd(), c"".as_ptr(), parent.as_raw_fd(), name.as_ptr(), libc::AT_EMPTY_PATH)
        };
        check(made, path, "make hard link")
    }

    fn device(
        &mut self,
        entry: &Entry<'_, impl Read>,
        kind: EntryType,
        parent: &OwnedFd,
        name: &CString,
        path: &Path,
    ) -> Result<()> {
        if !path.starts_with("dev") {
            return Err(at(path, "device nodes are allowed only in /dev"));
        }
        let number = |field: io::Result<Option<u32>>| field.map_err(|error| broken(&error));
        let major = number(entry.header().device_major())?.unwrap_or(0);
        let minor = number(entry.header().device_minor())?.unwrap_or(0);
        if (major, minor) == (0, 0) {
            return Err(at(path, "device 0:0 is overlayfs's own mark and not allowed in a layer"));
        }
        let format = if kind == EntryType::Char { libc::S_IFCHR } else { libc::S_IFBLK };
        // SAFETY: the name is NUL-terminated and outlives the call.
        let made = unsafe {
            libc::mknodat(parent.as_raw_fd(), name.as_ptr(), format | 0o600, libc::makedev(major, minor))
        };
        check(made, path, "make device node")
    }

    /// Marks a name of lower layers as removed. What this same layer brings under that name stays.
    fn whiteout(&mut self, parent: &OwnedFd, parent_path: &Path, name: &[u8], path: &Path) -> Result<()> {
        if name.is_empty() || name == b"." || name == b".." {
            return Err(at(path, "a whiteout must name a file"));
        }
        let hidden = parent_path.join(std::ffi::OsStr::from_bytes(name));
        if self.made.contains(&hidden) {
            if let Ok(dir) = self.root.open_at(&hidden, libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW)
            {
                set_opaque(&dir).map_err(|error| at(path, &format!("mark as opaque: {error}")))?;
            }
            return Ok(());
        }
        let name = c_name(name, path)?;
        // SAFETY: the name is NUL-terminated and outlives the call.
        let made = unsafe { libc::mknodat(parent.as_raw_fd(), name.as_ptr(), libc::S_IFCHR, 0) };
        if made < 0 && io::Error::last_os_error().kind() != io::ErrorKind::AlreadyExists {
            return Err(os_error(path, "make whiteout"));
        }
        Ok(())
    }

    /// A later entry replaces an earlier one of the same name; a directory over a directory keeps its content.
    fn clear(&mut self, parent: &OwnedFd, name: &[u8], kind: EntryType, path: &Path) -> Result<()> {
        let c_name = c_name(name, path)?;
        // SAFETY: `stat` is written by the kernel before it is read; the name outlives the call.
        let (found, mode) = unsafe {
            let mut stat: libc::stat = std::mem::zeroed();
            let found =
                libc::fstatat(parent.as_raw_fd(), c_name.as_ptr(), &mut stat, libc::AT_SYMLINK_NOFOLLOW);
            (found == 0, stat.st_mode & libc::S_IFMT)
        };
        if !found {
            return Ok(());
        }
        if mode == libc::S_IFDIR {
            if kind == EntryType::Directory {
                return Ok(());
            }
            let name = Path::new(std::ffi::OsStr::from_bytes(name));
            let full = PathBuf::from(format!("/proc/self/fd/{}", parent.as_raw_fd())).join(name);
            return std::fs::remove_dir_all(full).map_err(|error| at(path, &format!("replace: {error}")));
        }
        // SAFETY: the name is NUL-terminated and outlives the call.
        check(unsafe { libc::unlinkat(parent.as_raw_fd(), c_name.as_ptr(), 0) }, path, "replace")?;
        if kind == EntryType::Directory && mode == libc::S_IFCHR {
            // A whiteout came first: the new directory must not show what lower layers have there.
            // SAFETY: as above.
            let made = unsafe { libc::mkdirat(parent.as_raw_fd(), c_name.as_ptr(), 0o755) };
            check(made, path, "make directory")?;
            let dir = self
                .root
                .open_at(path, libc::O_RDONLY | libc::O_DIRECTORY)
                .map_err(|error| at(path, &error.to_string()))?;
            set_opaque(&dir).map_err(|error| at(path, &format!("mark as opaque: {error}")))?;
        }
        Ok(())
    }

    fn directory_facts(&mut self, entry: &mut Entry<'_, impl Read>, path: &Path) -> Result<()> {
        let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW;
        let dir = self
            .root
            .open_at(&Path::new("/").join(path), flags)
            .map_err(|error| at(path, &format!("open directory: {error}")))?;
        let header = entry.header();
        let (uid, gid, mode) = ownership(header)?;
        // SAFETY: plain calls on a descriptor we own.
        unsafe {
            check(libc::fchown(dir.as_raw_fd(), uid, gid), path, "set owner")?;
            check(libc::fchmod(dir.as_raw_fd(), mode), path, "set mode")?;
        }
        self.dirs.push((path.to_owned(), modified(entry)));
        self.made.insert(path.to_owned());
        let proc_path =
            CString::new(format!("/proc/self/fd/{}", dir.as_raw_fd())).expect("digits hold no NUL");
        attributes(entry, &proc_path, path)
    }

    /// Owner, mode, attributes and time, set without following a link.
    fn facts(
        &mut self,
        entry: &mut Entry<'_, impl Read>,
        parent: &OwnedFd,
        name: &CString,
        kind: EntryType,
        path: &Path,
    ) -> Result<()> {
        let (uid, gid, mode) = ownership(entry.header())?;
        let times = times(modified(entry));
        let nofollow = libc::AT_SYMLINK_NOFOLLOW;
        // SAFETY: the name and the times outlive the calls.
        unsafe {
            check(libc::fchownat(parent.as_raw_fd(), name.as_ptr(), uid, gid, nofollow), path, "set owner")?;
            if kind != EntryType::Symlink {
                // Just made by us under this name, and not a link, so following is no danger.
                check(libc::fchmodat(parent.as_raw_fd(), name.as_ptr(), mode, 0), path, "set mode")?;
            }
        }
        if kind != EntryType::Symlink {
            let mut full = format!("/proc/self/fd/{}/", parent.as_raw_fd()).into_bytes();
            full.extend_from_slice(name.as_bytes());
            attributes(entry, &c_name(&full, path)?, path)?;
        }
        // SAFETY: as above.
        unsafe {
            libc::utimensat(parent.as_raw_fd(), name.as_ptr(), times.as_ptr(), nofollow);
        }
        Ok(())
    }

    fn finish(self) -> Result<Unpacked> {
        for (path, seconds) in self.dirs.iter().rev() {
            let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW;
            // Gone or replaced by a later entry: nothing to set.
            let Ok(dir) = self.root.open_at(&Path::new("/").join(path), flags) else { continue };
            // SAFETY: the times outlive the call, the descriptor is open.
            unsafe { libc::futimens(dir.as_raw_fd(), times(*seconds).as_ptr()) };
        }
        Ok(self.done)
    }
}

/// Relative, without `.` and `..`. Absolute names and such that climb are refused, not repaired.
fn clean(name: &[u8]) -> Result<PathBuf> {
    let raw = Path::new(std::ffi::OsStr::from_bytes(name));
    let refuse = |why: &str| Error::invalid(format!("layer entry {:?} {why}", String::from_utf8_lossy(name)));
    if name.contains(&0) {
        return Err(refuse("has a NUL in its name"));
    }
    let mut path = PathBuf::new();
    for part in raw.components() {
        match part {
            Component::Normal(part) => path.push(part),
            Component::CurDir => {}
            Component::ParentDir => return Err(refuse("leads out of the image by \"..\"")),
            Component::RootDir | Component::Prefix(_) => return Err(refuse("is an absolute path")),
        }
    }
    Ok(path)
}

/// Links may point anywhere inside the image, absolute ones count from its root. Relative ones must not climb out:
/// docker refuses them too.
fn check_symlink(path: &Path, target: &[u8]) -> Result<()> {
    let target = Path::new(std::ffi::OsStr::from_bytes(target));
    let mut depth = match target.is_absolute() {
        true => 0,
        false => path.components().count() as i64 - 1,
    };
    for part in target.components() {
        match part {
            Component::Normal(_) => depth += 1,
            Component::ParentDir => depth -= 1,
            _ => {}
        }
        if depth < 0 && !target.is_absolute() {
            return Err(at(path, &format!("its link target {} leads out of the image", target.display())));
        }
    }
    Ok(())
}

fn link_target(entry: &Entry<'_, impl Read>, path: &Path) -> Result<Vec<u8>> {
    match entry.link_name_bytes() {
        Some(target) if !target.is_empty() && target.len() <= LINK_BYTES_MAX => Ok(target.into_owned()),
        _ => Err(at(path, "it is a link without a usable target")),
    }
}

fn ownership(header: &tar::Header) -> Result<(u32, u32, u32)> {
    let id = |value: io::Result<u64>| {
        value.map_err(|error| broken(&error)).and_then(|id| {
            u32::try_from(id)
                .map_err(|_| Error::invalid(format!("layer entry has the impossible owner {id}")))
        })
    };
    let mode = header.mode().map_err(|error| broken(&error))? & 0o7777;
    Ok((id(header.uid())?, id(header.gid())?, mode))
}

fn modified(entry: &Entry<'_, impl Read>) -> i64 {
    entry.header().mtime().map_or(0, |seconds| seconds.min(i64::MAX as u64) as i64)
}

fn times(seconds: i64) -> [libc::timespec; 2] {
    let time = libc::timespec { tv_sec: seconds, tv_nsec: 0 };
    [time, time]
}

/// File capabilities and user attributes are kept; `trusted.*` (which overlayfs obeys) refuses the layer; labels of
/// security modules belong to the host that wrote them and are left out.
fn attributes(entry: &mut Entry<'_, impl Read>, file: &CString, path: &Path) -> Result<()> {
    const PREFIX: &str = "SCHILY.xattr.";
    let Some(extensions) = entry.pax_extensions().map_err(|error| broken(&error))? else { return Ok(()) };
    for extension in extensions {
        let extension = extension.map_err(|error| broken(&error))?;
        let Ok(key) = extension.key() else { continue };
        let Some(name) = key.strip_prefix(PREFIX) else { continue };
        if name.starts_with("trusted.") {
            return Err(at(path, &format!("attribute {name} is not allowed in a layer")));
        }
        if name != "security.capability" && !name.starts_with("user.") {
            continue;
        }
        let name = c_name(name.as_bytes(), path)?;
        let value = extension.value_bytes();
        // SAFETY: strings are NUL-terminated, the value is valid for its length, all outlive the call.
        let set =
            unsafe { libc::setxattr(file.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
        if set < 0 && name.to_bytes() == b"security.capability" {
            return Err(os_error(path, "set file capabilities"));
        }
    }
    Ok(())
}

fn set_opaque(dir: &OwnedFd) -> io::Result<()> {
    // SAFETY: constants are NUL-terminated, the value is one byte long.
    let set = unsafe {
        libc::fsetxattr(dir.as_raw_fd(), c"trusted.overlay.opaque".as_ptr(), c"y".as_ptr().cast(), 1, 0)
    };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn c_name(name: &[u8], path: &Path) -> Result<CString> {
    CString::new(name).map_err(|_| at(path, "its name holds a NUL"))
}

fn check(result: i32, path: &Path, what: &str) -> Result<()> {
    if result < 0 { Err(os_error(path, what)) } else { Ok(()) }
}

fn os_error(path: &Path, what: &str) -> Error {
    at(path, &format!("{what}: {}", io::Error::last_os_error()))
}

fn at(path: &Path, why: &str) -> Error {
    Error::invalid(format!("layer entry {path:?}: {why}"))
}
