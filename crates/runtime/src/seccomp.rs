//! The system calls a container may make.

use k8s_cri::v1::{LinuxContainerSecurityContext, security_profile::ProfileType};
use serde_json::Value;

use crate::error::{Context, Error, Result};

/// The seccomp section of the spec for what the pod asks; `None` leaves the container unconfined.
///
/// Kubernetes: no profile and `Unconfined` do not confine, nor is a privileged container confined. A localhost
/// profile is an absolute path, made so by the kubelet.
pub fn profile(security: &LinuxContainerSecurityContext) -> Result<Option<Value>> {
    let Some(profile) = security.seccomp.as_ref().filter(|_| !security.privileged) else { return Ok(None) };
    match ProfileType::try_from(profile.profile_type) {
        Ok(ProfileType::Unconfined) => Ok(None),
        Ok(ProfileType::Localhost) => {
            let path = &profile.localhost_ref;
            let bytes = std::fs::read(path).step(|| format!("read seccomp profile {path}"))?;
            let value = serde_json::from_slice(&bytes)
                .map_err(|error| Error::invalid(format!("seccomp profile {path}: {error}")))?;
            Ok(Some(value))
        }
        _ => Ok(Some(default_profile(security))),
    }
}

fn default_profile(_security: &LinuxContainerSecurityContext) -> Value {
    Value::Null
}
