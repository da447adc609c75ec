//! The downward API: a pod's own fields and its containers' resources as text.

use crate::names;
use crate::resources::{amount, limit_of, request_of};
use k8s_openapi::api::core::v1::{Pod, ResourceFieldSelector};
use knarr_api::quantity::Quantity;
use std::collections::BTreeMap;

/// What the downward API can tell besides the pod: who hosts it.
#[derive(Clone, Debug, Default)]
pub struct Host {
    pub ips: Vec<String>,
    pub pod_ips: Vec<String>,
    /// Allocatable `cpu` in thousandths, others in units: the limit of who has none.
    pub allocatable: BTreeMap<String, i64>,
}

/// The value of a field path (`metadata.labels['x']`, `status.podIP`).
pub fn field(pod: &Pod, path: &str, host: &Host) -> Result<String, String> {
    let meta = &pod.metadata;
    let spec = pod.spec.as_ref();
    if let Some((list, key)) = subscript(path) {
        let map = match list {
            "metadata.labels" => &meta.labels,
            "metadata.annotations" => &meta.annotations,
            _ => return Err(format!("fieldPath {path:?} does not support subscript")),
        };
        return Ok(map.as_ref().and_then(|map| map.get(key)).cloned().unwrap_or_default());
    }
    let text = |value: Option<&String>| value.cloned().unwrap_or_default();
    Ok(match path {
        "metadata.name" => names::name(pod).to_owned(),
        "metadata.namespace" => names::namespace(pod).to_owned(),
        "metadata.uid" => names::uid(pod).to_owned(),
        "metadata.labels" => format_map(meta.labels.as_ref()),
        "metadata.annotations" => format_map(meta.annotations.as_ref()),
        "spec.nodeName" => text(spec.and_then(|spec| spec.node_name.as_ref())),
        "spec.serviceAccountName" => text(spec.and_then(|spec| spec.service_account_name.as_ref())),
        "status.hostIP" => text(host.ips.first()),
        "status.hostIPs" => host.ips.join(","),
        "status.podIP" => text(host.pod_ips.first()),
        "status.podIPs" => host.pod_ips.join(","),
        _ => return Err(format!("unsupported fieldPath: {path}")),
    })
}

fn subscript(path: &str) -> Option<(&str, &str)> {
    let (list, rest) = path.split_once("['")?;
    Some((list, rest.strip_suffix("']")?))
}

/// `key="value"` lines, as files of labels and annotations hold them.
fn format_map(map: Option<&BTreeMap<String, String>>) -> String {
    let lines = map.into_iter().flatten().map(|(key, value)| format!("{key}={value:?}"));
    lines.collect::<Vec<_>>().join("\n")
}

/// A container's request or limit in units of the divisor, rounded up.
pub fn resource(
    pod: &Pod,
    own_container: Option<&str>,
    selector: &ResourceFieldSelector,
    host: &Host,
) -> Result<String, String> {
    let name = selector.container_name.as_deref().filter(|name| !name.is_empty()).or(own_container);
    let name = name.ok_or("resourceFieldRef without a container name")?;
    let spec = pod.spec.as_ref().ok_or("pod without a spec")?;
    let mut containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let container =
        containers.find(|container| container.name == name).ok_or(format!("container {name} not found"))?;
    let unsupported = || format!("unsupported container resource: {}", selector.resource);
    let (kind, resource) = selector.resource.split_once('.').ok_or_else(unsupported)?;
    let known =
        matches!(resource, "cpu" | "memory" | "ephemeral-storage") || resource.starts_with("hugepages-");
    let value = match kind {
        _ if !known => return Err(unsupported()),
        "limits" => limit_of(container, resource).or_else(|| host.allocatable.get(resource).copied()),
        "requests" => {
            let requests = container.resources.as_ref().and_then(|resources| resources.requests.as_ref());
            amount(requests, resource).or_else(|| request_of(container, resource))
        }
        _ => return Err(unsupported()),
    };
    let divisor = selector.divisor.as_ref().map_or("", |divisor| divisor.0.as_str());
    divide(value.unwrap_or(0), resource, divisor)
}

fn divide(value: i64, resource: &str, divisor: &str) -> Result<String, String> {
    let divisor: Quantity = match divisor {
        "" | "0" => Quantity::from_units(1),
        text => text.parse().map_err(|_| format!("divisor {text:?} is not a quantity"))?,
    };
    let unit = if resource == "cpu" { divisor.millis() } else { divisor.units() }.max(1);
    Ok((value.max(0) as u64).div_ceil(unit as u64).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod() -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "n", "labels": {"a": "1", "b": "x\"y"}},
            "spec": {"nodeName": "node", "containers": [
                {"name": "c", "resources": {"limits": {"cpu": "1500m", "memory": "64Mi"}}}, {"name": "free"}]}
        }))
        .unwrap()
    }

    #[test]
    fn fields_are_told_as_text() {
        let host = Host { pod_ips: vec!["10.0.0.1".into(), "fd::1".into()], ..Default::default() };
        let cases = [
            ("metadata.name", "p"),
            ("metadata.labels['a']", "1"),
            ("metadata.labels['none']", ""),
            ("metadata.labels", "a=\"1\"\nb=\"x\\\"y\""),
            ("status.podIP", "10.0.0.1"),
            ("status.podIPs", "10.0.0.1,fd::1"),
            ("spec.nodeName", "node"),
        ];
        for (path, want) in cases {
            assert_eq!(field(&pod(), path, &host).unwrap(), want, "{path}");
        }
        assert!(field(&pod(), "spec.containers", &host).is_err());
    }

    #[test]
    fn resources_round_up_to_the_divisor_and_fall_back_to_the_node() {
        let host = Host { allocatable: [("cpu".to_owned(), 4000)].into(), ..Default::default() };
        let cases = [
            ("c", "limits.cpu", "1", "2"),
            ("c", "limits.cpu", "1m", "1500"),
            ("c", "limits.memory", "1Mi", "64"),
            ("free", "limits.cpu", "", "4"),
            ("free", "requests.cpu", "", "0"),
        ];
        for (container, resource_name, divisor, want) in cases {
            let selector = ResourceFieldSelector {
                container_name: None,
                resource: resource_name.to_owned(),
                divisor: Some(k8s_openapi::apimachinery::pkg::api::resource::Quantity(divisor.to_owned())),
            };
            assert_eq!(resource(&pod(), Some(container), &selector, &host).unwrap(), want, "{resource_name}");
        }
    }
}
