//! `emptyDir`: a directory that lives as long as the pod, on disk or in memory.

use super::{Context, Kind, Ready, make_dir};
use async_trait::async_trait;
use k8s_openapi::api::core::v1::Volume;
use knarr_api::quantity::Quantity;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

pub struct EmptyDir;

#[async_trait]
impl Kind for EmptyDir {
    fn name(&self) -> &'static str {
        "empty-dir"
    }

    fn is(&self, volume: &Volume) -> bool {
        // A volume without any source is one, too.
        let fields = serde_json::to_value(volume).unwrap_or_default();
        volume.empty_dir.is_some() || fields.as_object().is_some_and(|fields| fields.len() == 1)
    }

    async fn set_up(&self, volume: &Volume, context: &Context<'_>) -> Result<Ready, String> {
        let path = context.dir(self.name(), volume);
        let source = volume.empty_dir.clone().unwrap_or_default();
        let fresh = !path.exists();
        make_dir(&path)?;
        match source.medium.as_deref() {
            None | Some("") => {}
            Some("Memory") => {
                let limit = source.size_limit.as_ref().map(|limit| limit.0.parse::<Quantity>());
                let limit = limit.transpose().map_err(|error| format!("sizeLimit: {error}"))?;
                mount_memory(&path, limit.map(|limit| limit.units()).filter(|limit| *limit > 0))?;
            }
            Some(medium) => return Err(format!("unknown storage medium {medium:?}; use \"\" or Memory")),
        }
        if fresh {
            own(&path, context.fs_group()).map_err(|error| format!("prepare {}: {error}", path.display()))?;
        }
        Ok(Ready { path, read_only: false, ..Ready::default() })
    }
}

/// Everybody may write; with a group, everything made in it belongs to the group.
fn own(path: &Path, group: Option<u32>) -> std::io::Result<()> {
    chown(path, None, group)?;
    let mode = if group.is_some() { 0o2777 } else { 0o777 };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
}

pub(super) fn mount_memory(path: &Path, size_bytes: Option<i64>) -> Result<(), String> {
    use nix::mount::{MsFlags, mount};
    if is_mount(path) {
        return Ok(());
    }
    let options = match size_bytes {
        Some(size) => format!("mode=0777,size={size}"),
        None => "mode=0777".to_owned(),
    };
    mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))
        .map_err(|error| format!("mount tmpfs on {}: {}", path.display(), error.desc()))
}

fn is_mount(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let device = |path: &Path| std::fs::metadata(path).map(|meta| meta.dev()).ok();
    path.parent().is_some_and(|parent| device(parent) != device(path))
}
