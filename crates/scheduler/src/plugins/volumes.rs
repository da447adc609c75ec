//! VolumeBinding, as far as it goes: this cluster has no persistent volumes yet, so a claim is never found. A pod
//! that uses one must wait, not run as if it did not.

use super::{Cycle, Plugin};

pub const PLUGIN: Plugin =
    Plugin { name: "VolumeBinding", prepare: Some(prepare), filter: None, score: None, wakes: |_, _| false };

fn prepare(cycle: &mut Cycle) -> Result<(), String> {
    let Some(spec) = &cycle.pod.pod.spec else { return Ok(()) };
    let claim = spec.volumes.iter().flatten().find_map(|volume| {
        let claim = volume.persistent_volume_claim.as_ref().map(|claim| claim.claim_name.clone());
        let ephemeral = || {
            let pod = cycle.pod.pod.metadata.name.as_deref().unwrap_or_default();
            volume.ephemeral.as_ref().map(|_| format!("{pod}-{}", volume.name))
        };
        claim.or_else(ephemeral)
    });
    if let Some(claim) = claim {
        return Err(format!("persistentvolumeclaim {claim:?} not found"));
    }
    match spec.resource_claims.iter().flatten().next() {
        Some(claim) => {
            Err(format!("resource claim {:?}: dynamic resource allocation is not supported", claim.name))
        }
        None => Ok(()),
    }
}
