//! Volumes of pods: made before containers start, kept up to date while they run, taken down after. Each kind is a
//! twin: a file with `set_up`, and a line in [`KINDS`].
//!
//! What a pod writes its files with, and where, never depends on the kind: directories are
//! `pods/UID/volumes/kubernetes.io~KIND/NAME`, as upstream's.

pub mod atomic;
mod config_map;
mod downward_api;
mod empty_dir;
mod host_path;
mod image;
mod projected;
mod secret;
pub mod subpath;
pub mod token;

use crate::config::KubeletConfig;
use crate::env::Lookup;
use crate::fields::Host;
use crate::names;
use async_trait::async_trait;
use k8s_openapi::api::core::v1::{ImageVolumeSource, Pod, Volume};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What a volume is made from.
pub struct Context<'a> {
    pub pod: &'a Pod,
    pub config: &'a KubeletConfig,
    pub lookup: &'a dyn Lookup,
    pub tokens: &'a dyn token::Tokens,
    pub host: &'a Host,
}

impl Context<'_> {
    fn fs_group(&self) -> Option<u32> {
        let security = self.pod.spec.as_ref()?.security_context.as_ref()?;
        u32::try_from(security.fs_group?).ok()
    }

    fn dir(&self, plugin: &str, volume: &Volume) -> PathBuf {
        self.config.volume_dir(names::uid(self.pod), plugin, &volume.name)
    }
}

/// A volume ready for use.
#[derive(Debug, Clone, Default)]
pub struct Ready {
    /// What is mounted into containers.
    pub path: PathBuf,
    /// An image to be mounted instead, which the runtime does; it is pulled when a container is started.
    pub image: Option<ImageVolumeSource>,
    /// Containers only ever read it, whatever their mounts say.
    pub read_only: bool,
    /// When it has to be set up again, without any object having changed (a token runs out).
    pub refresh: Option<Duration>,
}

/// One kind of volume.
#[async_trait]
trait Kind: Sync {
    /// `kubernetes.io~NAME`, and the field of the volume.
    fn name(&self) -> &'static str;

    /// Whether the volume is of this kind.
    fn is(&self, volume: &Volume) -> bool;

    /// Makes the volume or brings it up to date; called again whenever an object the pod refers to changed. The
    /// error is upstream's message of `FailedMount`.
    async fn set_up(&self, volume: &Volume, context: &Context<'_>) -> Result<Ready, String>;
}

const KINDS: [&dyn Kind; 7] = [
    &empty_dir::EmptyDir,
    &host_path::HostPath,
    &config_map::ConfigMaps,
    &secret::Secrets,
    &projected::Projected,
    &downward_api::DownwardApi,
    &image::Images,
];

/// Makes every volume of the pod, or brings it up to date.
pub async fn set_up(context: &Context<'_>) -> Result<BTreeMap<String, Ready>, String> {
    let mut out = BTreeMap::new();
    for volume in context.pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()) {
        let failed =
            |cause: String| format!("MountVolume.SetUp failed for volume {:?} : {cause}", volume.name);
        let kind = KINDS.iter().find(|kind| kind.is(volume)).ok_or_else(|| unsupported(volume))?;
        out.insert(volume.name.clone(), kind.set_up(volume, context).await.map_err(failed)?);
    }
    Ok(out)
}

fn unsupported(volume: &Volume) -> String {
    let fields = serde_json::to_value(volume).unwrap_or_default();
    let kind = fields.as_object().and_then(|fields| fields.keys().find(|key| *key != "name").cloned());
    let supported = KINDS.map(|kind| kind.name().trim_start_matches("kubernetes.io~")).join(", ");
    format!(
        "volume {:?} is of kind {}, which this node does not mount; it mounts {supported}",
        volume.name,
        kind.unwrap_or_else(|| "unknown".to_owned())
    )
}

/// Takes down everything below the pod's directory. Mounts are taken off first, so that nothing behind them is
/// removed; the rest of the directory is the pod's own.
pub fn tear_down(config: &KubeletConfig, uid: &str) -> Result<(), String> {
    let dir = config.pod_dir(uid);
    unmount_below(&dir)?;
    match std::fs::remove_dir_all(&dir) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(format!("remove {}: {error}", dir.display())),
    }
}

/// Takes off all mounts below `dir`, the last one first.
fn unmount_below(dir: &Path) -> Result<(), String> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut points: Vec<PathBuf> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|point| PathBuf::from(unescape(point)))
        .filter(|point| point.starts_with(dir) && point != dir)
        .collect();
    points.reverse();
    for point in points {
        nix::mount::umount2(&point, nix::mount::MntFlags::MNT_DETACH)
            .map_err(|error| format!("unmount {}: {}", point.display(), error.desc()))?;
    }
    Ok(())
}

/// Mount tables write blanks as octal numbers.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

fn make_dir(path: &Path) -> Result<(), String> {
    std::fs::create_dir_all(path).map_err(|error| format!("make directory {}: {error}", path.display()))
}

/// Largest volume of secrets and tokens: as large as the largest object, with room for two versions of it.
const MEMORY_BYTES_MAX: i64 = 8 << 20;

/// Puts the directory on a tmpfs of its own, so that secrets never reach a disk. Without the right to mount (tests,
/// rootless) it stays an ordinary directory only its owner can enter.
fn in_memory(path: &Path) -> Result<(), String> {
    make_dir(path)?;
    if nix::unistd::geteuid().is_root() && !cfg!(test) {
        return empty_dir::mount_memory(path, Some(MEMORY_BYTES_MAX));
    }
    Ok(())
}
