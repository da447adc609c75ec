//! `secret`: a Secret's entries as files, in memory only: the volume lies on a tmpfs.

use super::atomic::Payload;
use super::config_map::{MODE_DEFAULT, select};
use super::{Context, Kind, Ready, atomic};
use async_trait::async_trait;
use k8s_openapi::api::core::v1::{KeyToPath, Volume};

pub struct Secrets;

#[async_trait]
impl Kind for Secrets {
    fn name(&self) -> &'static str {
        "secret"
    }

    fn is(&self, volume: &Volume) -> bool {
        volume.secret.is_some()
    }

    async fn set_up(&self, volume: &Volume, context: &Context<'_>) -> Result<Ready, String> {
        let source = volume.secret.clone().unwrap_or_default();
        let name = source.secret_name.unwrap_or_default();
        let mode = source.default_mode.unwrap_or(MODE_DEFAULT);
        let files = collect(context, &name, source.items.as_deref(), mode, source.optional)?;
        let path = context.dir(self.name(), volume);
        super::in_memory(&path)?;
        atomic::write(&path, &files, context.fs_group())?;
        Ok(Ready { path, read_only: true, ..Ready::default() })
    }
}

/// The files a Secret stands for.
pub fn collect(
    context: &Context<'_>,
    name: &str,
    items: Option<&[KeyToPath]>,
    mode: i32,
    optional: Option<bool>,
) -> Result<Payload, String> {
    let optional = optional.unwrap_or(false);
    match context.lookup.secret(name)? {
        Some(secret) => {
            let entries = secret.data.iter().flatten().map(|(key, value)| (key.clone(), value.0.clone()));
            select(entries.collect(), items, mode, optional, "secret")
        }
        None if optional => Ok(Payload::new()),
        None => Err(format!("secret {name:?} not found")),
    }
}
