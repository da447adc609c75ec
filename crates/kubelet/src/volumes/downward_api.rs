//! `downwardAPI`: the pod's own fields as files, kept up to date.

use super::atomic::{File, Payload};
use super::config_map::MODE_DEFAULT;
use super::{Context, Kind, Ready, atomic};
use crate::fields;
use async_trait::async_trait;
use k8s_openapi::api::core::v1::{DownwardAPIVolumeFile, Volume};

pub struct DownwardApi;

#[async_trait]
impl Kind for DownwardApi {
    fn name(&self) -> &'static str {
        "downward-api"
    }

    fn is(&self, volume: &Volume) -> bool {
        volume.downward_api.is_some()
    }

    async fn set_up(&self, volume: &Volume, context: &Context<'_>) -> Result<Ready, String> {
        let source = volume.downward_api.clone().unwrap_or_default();
        let mode = source.default_mode.unwrap_or(MODE_DEFAULT);
        let files = collect(context, source.items.as_deref().unwrap_or_default(), mode)?;
        let path = context.dir(self.name(), volume);
        atomic::write(&path, &files, context.fs_group())?;
        Ok(Ready { path, read_only: true, ..Ready::default() })
    }
}

/// The files the items stand for.
pub fn collect(context: &Context<'_>, items: &[DownwardAPIVolumeFile], mode: i32) -> Result<Payload, String> {
    let mut out = Payload::new();
    for item in items {
        let text = if let Some(field) = &item.field_ref {
            fields::field(context.pod, &field.field_path, context.host)?
        } else if let Some(selector) = &item.resource_field_ref {
            fields::resource(context.pod, None, selector, context.host)?
        } else {
            return Err(format!("downwardAPI item {:?} names neither a field nor a resource", item.path));
        };
        let mode = item.mode.unwrap_or(mode) as u32 & 0o7777;
        out.insert(item.path.clone(), File { content: text.into_bytes(), mode, owner: None });
    }
    Ok(out)
}
