//! `projected`: several sources in one directory, among them the service account's token.

use super::atomic::{File, Payload};
use super::config_map::MODE_DEFAULT;
use super::{Context, Kind, Ready, atomic, config_map, downward_api, secret};
use async_trait::async_trait;
use k8s_openapi::api::core::v1::{ServiceAccountTokenProjection, Volume, VolumeProjection};
use std::time::Duration;

pub struct Projected;

/// Lifetime of a token whose projection does not say.
const EXPIRATION_S_DEFAULT: i64 = 3600;

#[async_trait]
impl Kind for Projected {
    fn name(&self) -> &'static str {
        "projected"
    }

    fn is(&self, volume: &Volume) -> bool {
        volume.projected.is_some()
    }

    async fn set_up(&self, volume: &Volume, context: &Context<'_>) -> Result<Ready, String> {
        let source = volume.projected.clone().unwrap_or_default();
        let mode = source.default_mode.unwrap_or(MODE_DEFAULT);
        let (mut files, mut refresh) = (Payload::new(), None::<Duration>);
        for source in source.sources.iter().flatten() {
            if let Some(token) = &source.service_account_token {
                let (file, after) = token_file(context, token, mode).await?;
                files.insert(token.path.clone(), file);
                refresh = Some(refresh.map_or(after, |earlier| earlier.min(after)));
            } else {
                files.extend(collect(context, source, mode)?);
            }
        }
        let path = context.dir(self.name(), volume);
        super::in_memory(&path)?;
        atomic::write(&path, &files, context.fs_group())?;
        Ok(Ready { path, read_only: true, refresh, ..Ready::default() })
    }
}

fn collect(context: &Context<'_>, source: &VolumeProjection, mode: i32) -> Result<Payload, String> {
    if let Some(map) = &source.config_map {
        return config_map::collect(context, &map.name, map.items.as_deref(), mode, map.optional);
    }
    if let Some(secret) = &source.secret {
        return secret::collect(context, &secret.name, secret.items.as_deref(), mode, secret.optional);
    }
    if let Some(fields) = &source.downward_api {
        return downward_api::collect(context, fields.items.as_deref().unwrap_or_default(), mode);
    }
    Err("this node projects configMap, secret, downwardAPI and serviceAccountToken; another source was asked for"
        .to_owned())
}

async fn token_file(
    context: &Context<'_>,
    source: &ServiceAccountTokenProjection,
    mode: i32,
) -> Result<(File, Duration), String> {
    let audience = source.audience.as_deref().unwrap_or_default();
    let seconds = source.expiration_seconds.unwrap_or(EXPIRATION_S_DEFAULT);
    let token = context.tokens.token(context.pod, audience, seconds).await?;
    let owner = token_owner(context);
    // Only the user of the pod, or its group, may read a token: everybody else's processes may not.
    let restricted = owner.is_some() || context.fs_group().is_some();
    let mode = if restricted { 0o600 } else { mode as u32 & 0o7777 };
    Ok((File { content: token.value.into_bytes(), mode, owner }, token.refresh_after))
}

/// The one user all containers run as, if there is one and the pod has no group for its files.
fn token_owner(context: &Context<'_>) -> Option<u32> {
    if context.fs_group().is_some() {
        return None;
    }
    let spec = context.pod.spec.as_ref()?;
    let default = spec.security_context.as_ref().and_then(|security| security.run_as_user);
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let mut users = containers.map(|container| {
        container.security_context.as_ref().and_then(|security| security.run_as_user).or(default)
    });
    let first = users.next()??;
    users.all(|user| user == Some(first)).then_some(())?;
    u32::try_from(first).ok()
}
