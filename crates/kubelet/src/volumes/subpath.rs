//! Mounts of a container: volumes at their paths, parts of volumes (`subPath`), propagation, read-only.

use super::Ready;
use k8s_openapi::api::core::v1::Container;
use knarr_runtime::cri::v1;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, mkdirat};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

/// The container's mounts. `links` is a directory to bind parts of volumes into, so that what is mounted cannot be
/// changed behind our back by a symbolic link; the error is upstream's message of `CreateContainerConfigError`.
pub fn mounts(
    container: &Container,
    volumes: &BTreeMap<String, Ready>,
    env: &[(String, String)],
    links: &Path,
) -> Result<Vec<v1::Mount>, String> {
    let mut out = Vec::new();
    for (index, mount) in container.volume_mounts.iter().flatten().enumerate() {
        let volume = volumes.get(&mount.name).ok_or_else(|| {
            format!("cannot find volume {:?} to mount into container {:?}", mount.name, container.name)
        })?;
        let part = match (mount.sub_path.as_deref(), mount.sub_path_expr.as_deref()) {
            (Some(path), _) if !path.is_empty() => path.to_owned(),
            (_, Some(expression)) if !expression.is_empty() => expand(expression, env)?,
            _ => String::new(),
        };
        let mut path = mount.mount_path.clone();
        if !path.starts_with('/') {
            path.insert(0, '/');
        }
        if let Some(image) = &volume.image {
            if !part.is_empty() {
                return Err(format!(
                    "subPath {part:?} of the image volume {:?} is not supported",
                    mount.name
                ));
            }
            let image = image.reference.clone().unwrap_or_default();
            out.push(v1::Mount {
                container_path: path,
                image: Some(v1::ImageSpec { image: crate::images::with_tag(&image)?, ..Default::default() }),
                readonly: true,
                ..Default::default()
            });
            continue;
        }
        let host_path = if part.is_empty() {
            volume.path.clone()
        } else {
            bind_part(&volume.path, &part, volume.read_only, &links.join(index.to_string()))?
        };
        out.push(v1::Mount {
            container_path: path,
            host_path: host_path.display().to_string(),
            readonly: mount.read_only.unwrap_or(false) || volume.read_only,
            propagation: propagation(mount.mount_propagation.as_deref()),
            recursive_read_only: mount.recursive_read_only.as_deref() == Some("Enabled"),
            ..Default::default()
        });
    }
    Ok(out)
}

fn propagation(mode: Option<&str>) -> i32 {
    match mode {
        Some("HostToContainer") => v1::MountPropagation::PropagationHostToContainer as i32,
        Some("Bidirectional") => v1::MountPropagation::PropagationBidirectional as i32,
        _ => v1::MountPropagation::PropagationPrivate as i32,
    }
}

/// Unlike elsewhere, a reference to nothing is an error.
fn expand(expression: &str, env: &[(String, String)]) -> Result<String, String> {
    let missing = std::cell::Cell::new(false);
    let out = crate::env::expand(expression, |name| {
        let found = env.iter().find(|(have, _)| have == name).map(|(_, value)| value.clone());
        missing.set(missing.get() || found.is_none());
        found
    });
    match missing.get() {
        true => Err(format!("failed to expand subPathExpr: {expression:?}")),
        false => Ok(out),
    }
}

/// Binds a part of a volume to `link`. The part is opened below the volume without ever leaving it, whatever links
/// the pod has put there (as CVE-2017-1002101 taught), and made when it is missing.
fn bind_part(volume: &Path, part: &str, read_only: bool, link: &Path) -> Result<PathBuf, String> {
    let failed = |error: String| format!("failed to prepare subPath for volumeMount {part:?}: {error}");
    if Path::new(part).components().any(|step| !matches!(step, Component::Normal(_) | Component::CurDir)) {
        return Err(failed("must be a relative path without '..'".to_owned()));
    }
    let found = open_below(volume, part).or_else(|error| match (error, read_only) {
        (nix::Error::ENOENT, false) => make_below(volume, part),
        (error, _) => Err(error),
    });
    let file = found.map_err(|error| failed(error.desc().to_owned()))?;
    if !nix::unistd::geteuid().is_root() || cfg!(test) {
        return Ok(volume.join(part));
    }
    bind(&file, link).map_err(failed)?;
    Ok(link.to_owned())
}

fn below(directory: OFlag) -> OpenHow {
    OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC | directory).resolve(ResolveFlag::RESOLVE_BENEATH)
}

fn open_root(path: &Path) -> nix::Result<OwnedFd> {
    nix::fcntl::open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())
}

fn open_below(volume: &Path, part: &str) -> nix::Result<OwnedFd> {
    openat2(open_root(volume)?, part, below(OFlag::empty()))
}

fn make_below(volume: &Path, part: &str) -> nix::Result<OwnedFd> {
    let mut at = open_root(volume)?;
    for step in Path::new(part).components() {
        let Component::Normal(name) = step else { continue };
        match mkdirat(&at, name, Mode::from_bits_truncate(0o750)) {
            Ok(()) | Err(nix::Error::EEXIST) => {}
            Err(error) => return Err(error),
        }
        at = openat2(&at, name, below(OFlag::empty()))?;
    }
    Ok(at)
}

fn bind(file: &OwnedFd, link: &Path) -> Result<(), String> {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    let source = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    let _ = umount2(link, MntFlags::MNT_DETACH);
    let is_dir = std::fs::metadata(&source).map_err(|error| error.to_string())?.is_dir();
    if let Some(parent) = link.parent() {
        super::make_dir(parent)?;
    }
    if is_dir {
        super::make_dir(link)?;
    } else {
        std::fs::write(link, "").map_err(|error| format!("make {}: {error}", link.display()))?;
    }
    mount(Some(source.as_str()), link, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .map_err(|error| format!("bind {} to {}: {}", source, link.display(), error.desc()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn parts_of_a_volume_never_lead_out_of_it() {
        let root = tempfile::tempdir().unwrap();
        let volume = root.path().join("v");
        std::fs::create_dir(&volume).unwrap();
        symlink("/etc", volume.join("out")).unwrap();
        for part in ["out", "out/passwd", "../x", "/etc"] {
            assert!(bind_part(&volume, part, false, root.path()).is_err(), "{part}");
        }
        assert!(bind_part(&volume, "a/b", false, root.path()).is_ok());
        assert!(volume.join("a/b").is_dir());
        assert!(
            bind_part(&volume, "none", true, root.path()).is_err(),
            "nothing is made in what is read only"
        );
    }

    #[test]
    fn expressions_must_resolve() {
        let env = [("POD".to_owned(), "p".to_owned())];
        assert_eq!(expand("logs/$(POD)", &env).unwrap(), "logs/p");
        assert!(expand("$(NONE)", &env).is_err());
    }
}
