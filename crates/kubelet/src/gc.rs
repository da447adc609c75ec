//! What is left over: containers older than the last ones of their name, and images nobody uses once the disk gets
//! full. Pinned images never go. Looked at when something changed on the node, and rarely otherwise.

use crate::context::NodeContext;
use crate::names;
use knarr_runtime::cri::v1;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::sync::Notify;

/// How often the disk is looked at.
const PERIOD: Duration = Duration::from_secs(300);
/// Images go once the disk is this full, until it is that full, in percent (upstream's defaults).
const DISK_HIGH_PERCENT: u64 = 85;
const DISK_LOW_PERCENT: u64 = 80;
/// Ended containers kept of each name, besides a running one: the one whose logs `--previous` shows.
const DEAD_KEPT: usize = 1;

/// Collects garbage until the task ends; `changed` is told when images have gone.
pub async fn keep(context: &NodeContext, changed: &Notify) {
    loop {
        tokio::time::sleep(PERIOD).await;
        if let Err(error) = containers(context).await {
            tracing::warn!(%error, "old containers stay");
        }
        match images(context).await {
            Ok(true) => changed.notify_one(),
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "unused images stay"),
        }
    }
}

async fn containers(context: &NodeContext) -> knarr_runtime::Result<()> {
    let all = context.runtime.list_containers(None).await?;
    for id in superseded(&all) {
        context.runtime.remove_container(&id).await?;
    }
    Ok(())
}

/// Ended containers beyond those kept, oldest first. Pods that are being removed take theirs with them.
fn superseded(all: &[v1::Container]) -> Vec<String> {
    let mut by_name: BTreeMap<(&str, &str), Vec<&v1::Container>> = BTreeMap::new();
    for container in all {
        let label = |key: &str| container.labels.get(key).map(String::as_str);
        if let (Some(uid), Some(name)) = (label(names::POD_UID), label(names::CONTAINER_NAME)) {
            by_name.entry((uid, name)).or_default().push(container);
        }
    }
    let exited = v1::ContainerState::ContainerExited as i32;
    let mut out = Vec::new();
    for mut containers in by_name.into_values() {
        containers.sort_by_key(|container| std::cmp::Reverse(container.created_at));
        // The newest one tells the present state, whatever that is.
        let old = containers.into_iter().skip(1).filter(|container| container.state == exited);
        out.extend(old.skip(DEAD_KEPT).map(|container| container.id.clone()));
    }
    out
}

/// Removes unused images while the disk is too full; whether any went.
async fn images(context: &NodeContext) -> knarr_runtime::Result<bool> {
    let info = context.runtime.image_fs_info().await?;
    let place =
        info.image_filesystems.first().and_then(|fs| fs.fs_id.as_ref()).map(|id| id.mountpoint.clone());
    let Some(place) = place.filter(|place| !place.is_empty()) else { return Ok(false) };
    let full = || usage_percent(&place).unwrap_or(0);
    if full() < DISK_HIGH_PERCENT {
        return Ok(false);
    }
    let containers = context.runtime.list_containers(None).await?;
    let used: BTreeSet<&str> =
        containers.iter().flat_map(|one| [one.image_ref.as_str(), one.image_id.as_str()]).collect();
    let mut removed = false;
    for image in context.runtime.list_images(None).await? {
        let in_use = used.contains(image.id.as_str())
            || image.repo_digests.iter().any(|name| used.contains(name.as_str()));
        if image.pinned || in_use {
            continue;
        }
        tracing::info!(image = image.id, bytes = image.size, "unused image removed, the disk is full");
        context.runtime.remove_image(v1::ImageSpec { image: image.id, ..Default::default() }).await?;
        removed = true;
        if full() < DISK_LOW_PERCENT {
            break;
        }
    }
    Ok(removed)
}

fn usage_percent(path: &str) -> Option<u64> {
    let stat = nix::sys::statvfs::statvfs(path).ok()?;
    let (total, free) = (stat.blocks() as u64, stat.blocks_available() as u64);
    (total > 0).then(|| 100 * (total - free.min(total)) / total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_container_and_one_ended_before_it_are_kept() {
        let container = |id: &str, at: i64, state: v1::ContainerState| v1::Container {
            id: id.to_owned(),
            created_at: at,
            state: state as i32,
            labels: [(names::POD_UID, "u"), (names::CONTAINER_NAME, "c")]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
            ..Default::default()
        };
        use v1::ContainerState::{ContainerExited, ContainerRunning};
        let all = [
            container("a", 1, ContainerExited),
            container("b", 2, ContainerExited),
            container("c", 3, ContainerExited),
            container("d", 4, ContainerRunning),
        ];
        assert_eq!(superseded(&all), ["b", "a"]);
    }
}
