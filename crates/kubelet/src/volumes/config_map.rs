//! `configMap`: a ConfigMap's entries as files.

use super::atomic::{File, Payload};
use super::{Context, Kind, Ready, atomic};
use async_trait::async_trait;
use k8s_openapi::api::core::v1::{ConfigMap, KeyToPath, Volume};
use std::collections::BTreeMap;

pub struct ConfigMaps;

/// What a file of a volume may do when neither item nor volume says.
pub const MODE_DEFAULT: i32 = 0o644;

#[async_trait]
impl Kind for ConfigMaps {
    fn name(&self) -> &'static str {
        "configmap"
    }

    fn is(&self, volume: &Volume) -> bool {
        volume.config_map.is_some()
    }

    async fn set_up(&self, volume: &Volume, context: &Context<'_>) -> Result<Ready, String> {
        let source = volume.config_map.clone().unwrap_or_default();
        let mode = source.default_mode.unwrap_or(MODE_DEFAULT);
        let files = collect(context, &source.name, source.items.as_deref(), mode, source.optional)?;
        let path = context.dir(self.name(), volume);
        atomic::write(&path, &files, context.fs_group())?;
        Ok(Ready { path, read_only: true, ..Ready::default() })
    }
}

/// The files a ConfigMap stands for.
pub fn collect(
    context: &Context<'_>,
    name: &str,
    items: Option<&[KeyToPath]>,
    mode: i32,
    optional: Option<bool>,
) -> Result<Payload, String> {
    let optional = optional.unwrap_or(false);
    match context.lookup.config_map(name)? {
        Some(map) => select(entries(&map), items, mode, optional, "configmap"),
        None if optional => Ok(Payload::new()),
        None => Err(format!("configmap {name:?} not found")),
    }
}

fn entries(map: &ConfigMap) -> BTreeMap<String, Vec<u8>> {
    let text = map.data.iter().flatten().map(|(key, value)| (key.clone(), value.clone().into_bytes()));
    let binary = map.binary_data.iter().flatten().map(|(key, value)| (key.clone(), value.0.clone()));
    text.chain(binary).collect()
}

/// All entries under their own names, or the chosen ones under other names.
pub fn select(
    mut entries: BTreeMap<String, Vec<u8>>,
    items: Option<&[KeyToPath]>,
    mode: i32,
    optional: bool,
    kind: &str,
) -> Result<Payload, String> {
    let file = |content: Vec<u8>, mode: i32| File { content, mode: mode as u32 & 0o7777, owner: None };
    let items = items.unwrap_or_default();
    if items.is_empty() {
        return Ok(entries.into_iter().map(|(key, content)| (key, file(content, mode))).collect());
    }
    let mut out = Payload::new();
    for item in items {
        match entries.get_mut(&item.key) {
            Some(content) => {
                _ = out.insert(item.path.clone(), file(content.clone(), item.mode.unwrap_or(mode)))
            }
            None if optional => {}
            None => return Err(format!("{kind} references non-existent config key: {}", item.key)),
        }
    }
    Ok(out)
}
