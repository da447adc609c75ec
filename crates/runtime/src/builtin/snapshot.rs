//! A container's file system: the image's layers, read-only and shared, under a writable directory of its own, by
//! overlayfs.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};
use crate::rootdir::c_path;

const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 4;
/// Longest options that `mount(2)` takes.
const OPTIONS_BYTES_MAX: usize = 4095;

/// Mounts `layers` (lowest first) with `upper` on top at `target`. All directories must exist.
pub fn mount(layers: &[PathBuf], upper: &Path, work: &Path, target: &Path) -> Result<()> {
    match mount_by_parts(layers, upper, work, target) {
        // Kernels before 6.5 have no `lowerdir+`.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            mount_by_string(layers, upper, work, target)
        }
        result => result.step(|| format!("mount overlay on {}", target.display())),
    }
}

/// Mounts `layers` (lowest first) at `target`, to be read only. `empty` is an empty directory: overlayfs wants two.
pub fn mount_read_only(layers: &[PathBuf], empty: &Path, target: &Path) -> Result<()> {
    let step = || format!("mount overlay on {}", target.display());
    let lower: Vec<PathBuf> = std::iter::once(empty.to_owned()).chain(layers.iter().cloned()).collect();
    mount_parts(&lower, None).and_then(|mount| attach(&mount, target)).step(step)
}

/// Unmounts what is at `target`, if anything.
pub fn unmount(target: &Path) -> Result<()> {
    let path = c_path(target).step(|| format!("unmount {}", target.display()))?;
    // SAFETY: the path is NUL-terminated and outlives the call.
    match unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW) } {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => Ok(()),
            error => Err(error).step(|| format!("unmount {}", target.display())),
        },
    }
}

fn mount_by_parts(layers: &[PathBuf], upper: &Path, work: &Path, target: &Path) -> io::Result<()> {
    attach(&mount_parts(layers, Some((upper, work)))?, target)
}

/// The new mount calls: each layer is an argument of its own, so their number is not bounded by a page.
fn mount_parts(layers: &[PathBuf], writable: Option<(&Path, &Path)>) -> io::Result<OwnedFd> {
    let fs = fd_of(call(libc::SYS_fsopen, [c"overlay".as_ptr() as usize, 1, 0, 0, 0])?);
    set(&fs, c"source", c"overlay")?;
    // `lowerdir+` adds below what was added before.
    for layer in layers.iter().rev() {
        set(&fs, c"lowerdir+", &c_path(layer)?)?;
    }
    if let Some((upper, work)) = writable {
        set(&fs, c"upperdir", &c_path(upper)?)?;
        set(&fs, c"workdir", &c_path(work)?)?;
    }
    call(libc::SYS_fsconfig, [fs.as_raw_fd() as usize, FSCONFIG_CMD_CREATE as usize, 0, 0, 0])?;
    Ok(fd_of(call(libc::SYS_fsmount, [fs.as_raw_fd() as usize, 1, 0, 0, 0])?))
}

fn attach(mount: &OwnedFd, target: &Path) -> io::Result<()> {
    let target = c_path(target)?;
    let arguments = [
        mount.as_raw_fd() as usize,
        c"".as_ptr() as usize,
        libc::AT_FDCWD as usize,
        target.as_ptr() as usize,
        MOVE_MOUNT_F_EMPTY_PATH as usize,
    ];
    call(libc::SYS_move_mount, arguments)?;
    Ok(())
}

fn set(fs: &OwnedFd, key: &CStr, value: &CStr) -> io::Result<()> {
    let arguments = [
        fs.as_raw_fd() as usize,
        FSCONFIG_SET_STRING as usize,
        key.as_ptr() as usize,
        value.as_ptr() as usize,
        0,
    ];
    call(libc::SYS_fsconfig, arguments).map(drop)
}

fn call(number: libc::c_long, arguments: [usize; 5]) -> io::Result<libc::c_long> {
    let [a, b, c, d, e] = arguments;
    // SAFETY: callers pass what the call requires; pointers are to NUL-terminated strings that outlive it.
    let result = unsafe { libc::syscall(number, a, b, c, d, e) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn fd_of(raw: libc::c_long) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us.
    unsafe { OwnedFd::from_raw_fd(raw as i32) }
}

fn mount_by_string(layers: &[PathBuf], upper: &Path, work: &Path, target: &Path) -> Result<()> {
    let lower: Vec<String> = layers.iter().rev().map(|layer| layer.display().to_string()).collect();
    let options =
        format!("lowerdir={},upperdir={},workdir={}", lower.join(":"), upper.display(), work.display());
    if options.len() > OPTIONS_BYTES_MAX {
        return Err(Error::unsupported(format!(
            "an image of {} layers needs a kernel of 6.5 or later here",
            layers.len()
        )));
    }
    let step = || format!("mount overlay on {}", target.display());
    let options = CString::new(options).map_err(io::Error::from).step(step)?;
    let target = c_path(target).step(step)?;
    // SAFETY: all strings are NUL-terminated and outlive the call.
    let result = unsafe {
        libc::mount(c"overlay".as_ptr(), target.as_ptr(), c"overlay".as_ptr(), 0, options.as_ptr().cast())
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()).step(step),
    }
}

/// Bytes and inodes below a directory that belong to it (mounts inside are not entered).
pub fn usage(dir: &Path) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt;
    let Ok(data) = std::fs::symlink_metadata(dir) else { return (0, 0) };
    let (mut bytes, mut inodes) = (data.blocks() * 512, 1);
    let device = data.dev();
    let mut todo = vec![dir.to_owned()];
    while let Some(dir) = todo.pop() {
        let Ok(entries) = std::fs::read_dir(&dir) else { continue };
        for entry in entries.flatten() {
            let Ok(data) = entry.metadata() else { continue };
            bytes += data.blocks() * 512;
            inodes += 1;
            if data.is_dir() && data.dev() == device {
                todo.push(entry.path());
            }
        }
    }
    (bytes, inodes)
}
