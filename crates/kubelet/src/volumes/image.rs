//! `image`: the files of an image, to be read only. The runtime mounts them; here they are only named.

use super::{Context, Kind, Ready};
use async_trait::async_trait;
use k8s_openapi::api::core::v1::Volume;

pub struct Images;

#[async_trait]
impl Kind for Images {
    fn name(&self) -> &'static str {
        "image"
    }

    fn is(&self, volume: &Volume) -> bool {
        volume.image.is_some()
    }

    async fn set_up(&self, volume: &Volume, _: &Context<'_>) -> Result<Ready, String> {
        Ok(Ready { image: volume.image.clone(), read_only: true, ..Ready::default() })
    }
}
