//! Rotation: a log that has grown too large is renamed, the runtime opens a new one, and the oldest ones go.

use crate::context::NodeContext;
use knarr_runtime::cri::v1;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

const SIZE_BYTES_MAX: u64 = 10 << 20;
/// Files of one container, the present one included.
const FILES_MAX: usize = 5;
/// How often sizes are looked at: no more than a few file lookups.
const PERIOD: Duration = Duration::from_secs(60);

/// Rotates logs until the task ends.
pub async fn keep(context: &NodeContext) {
    loop {
        tokio::time::sleep(PERIOD).await;
        let state = Some(v1::ContainerStateValue { state: v1::ContainerState::ContainerRunning as i32 });
        let filter = v1::ContainerFilter { state, ..Default::default() };
        let running = context.runtime.list_containers(Some(filter)).await.unwrap_or_default();
        for container in running {
            if let Err(error) = rotate(context, &container.id).await {
                tracing::warn!(container = container.id, %error, "log not rotated");
            }
        }
    }
}

async fn rotate(context: &NodeContext, id: &str) -> anyhow::Result<()> {
    let status = context.runtime.container_status(id, false).await?.status.unwrap_or_default();
    let path = PathBuf::from(&status.log_path);
    let size = std::fs::metadata(&path).map_or(0, |meta| meta.len());
    if status.log_path.is_empty() || size < SIZE_BYTES_MAX {
        return Ok(());
    }
    let aside = move_aside(&path, context.clock.now())?;
    if let Err(error) = context.runtime.reopen_container_log(id).await {
        // The container goes on writing into the old file: let it have its name back.
        std::fs::rename(&aside, &path)?;
        return Err(error.into());
    }
    remove_oldest(&path)?;
    Ok(())
}

fn move_aside(path: &Path, now: jiff::Timestamp) -> io::Result<PathBuf> {
    let mut name = path.as_os_str().to_owned();
    name.push(now.strftime(".%Y%m%d-%H%M%S").to_string());
    let aside = PathBuf::from(name);
    std::fs::rename(path, &aside)?;
    Ok(aside)
}

/// Rotated files have the time in their names, so the oldest ones sort first.
fn remove_oldest(path: &Path) -> io::Result<()> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return Ok(());
    };
    let prefix = format!("{name}.");
    let mut old: Vec<PathBuf> = std::fs::read_dir(dir)?
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
        .map(|entry| entry.path())
        .collect();
    old.sort();
    let surplus = old.len().saturating_sub(FILES_MAX - 1);
    for path in &old[..surplus] {
        std::fs::remove_file(path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_files_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        for second in 0..7 {
            std::fs::write(&path, "x").unwrap();
            move_aside(&path, jiff::Timestamp::from_second(second).unwrap()).unwrap();
        }
        remove_oldest(&path).unwrap();
        let mut left: Vec<_> =
            std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left.len(), 4);
        assert_eq!(left[0], "0.log.19700101-000003");
    }
}
