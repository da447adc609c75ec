//! What an autoscaler points at: any kind the API serves, and its scale.

use k8s_openapi::api::autoscaling::v1::Scale;
use k8s_openapi::api::autoscaling::v2::CrossVersionObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};
use knarr_api::selector::{LabelSelector as Parsed, Operator};
use knarr_client::selector::Selector;
use kube::Client;
use kube::api::{Api, ApiResource, DynamicObject, PostParams};
use kube::core::GroupVersionKind;
use kube::discovery::{self, Scope};

/// A kind with the name the API has for it.
#[derive(Clone, Debug)]
pub struct Mapped {
    pub kind: ApiResource,
    pub namespaced: bool,
}

/// Kinds that are always there, so that they need no discovery.
const KNOWN: [(&str, &str, &str); 4] = [
    ("apps", "Deployment", "deployments"),
    ("apps", "ReplicaSet", "replicasets"),
    ("apps", "StatefulSet", "statefulsets"),
    ("", "ReplicationController", "replicationcontrollers"),
];

/// Finds the kind a reference names. Any version of a built-in kind means the one there is.
pub async fn mapped(client: &Client, reference: &CrossVersionObjectReference) -> Result<Mapped, String> {
    let (group, version) = match reference.api_version.as_deref().unwrap_or("v1").split_once('/') {
        Some((_, version)) if version.contains('/') => {
            let given = reference.api_version.as_deref().unwrap_or_default();
            return Err(format!("unexpected GroupVersion string: {given}"));
        }
        Some(both) => both,
        None => ("", reference.api_version.as_deref().filter(|version| !version.is_empty()).unwrap_or("v1")),
    };
    if let Some((group, kind, plural)) =
        KNOWN.iter().find(|known| known.0 == group && known.1 == reference.kind)
    {
        let kind = GroupVersionKind::gvk(group, "v1", kind);
        return Ok(Mapped { kind: ApiResource::from_gvk_with_plural(&kind, plural), namespaced: true });
    }
    let kind = GroupVersionKind::gvk(group, version, &reference.kind);
    match discovery::oneshot::pinned_kind(client, &kind).await {
        Ok((kind, capabilities)) => Ok(Mapped { kind, namespaced: capabilities.scope == Scope::Namespaced }),
        Err(error) => {
            tracing::debug!(kind = reference.kind, group, version, %error, "kind not discovered");
            Err(format!("no matches for kind {:?} in group {group:?}", reference.kind))
        }
    }
}

/// The scale of an object.
pub async fn scale(client: &Client, namespace: &str, mapped: &Mapped, name: &str) -> Result<Scale, String> {
    api(client, namespace, mapped).get_scale(name).await.map_err(|error| worded(error, mapped))
}

/// Writes a scale; refused when somebody else changed it meanwhile.
pub async fn rescale(client: &Client, namespace: &str, mapped: &Mapped, scale: &Scale) -> Result<(), String> {
    let name = scale.metadata.name.as_deref().unwrap_or_default();
    let written = api(client, namespace, mapped).replace_scale(name, &PostParams::default(), scale).await;
    written.map(|_| ()).map_err(|error| worded(error, mapped))
}

fn api(client: &Client, namespace: &str, mapped: &Mapped) -> Api<DynamicObject> {
    Api::namespaced_with(client.clone(), namespace, &mapped.kind)
}

fn worded(error: kube::Error, mapped: &Mapped) -> String {
    match error {
        kube::Error::Api(status) if status.code == 404 && status.message.is_empty() => {
            format!("the server could not find the requested resource ({})", mapped.kind.plural)
        }
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}

/// Reads a selector as `status.selector` of a scale writes it.
pub fn selector(text: &str) -> Result<Selector, String> {
    let parsed = Parsed::parse(text).map_err(|error| error.to_string())?;
    let requirement = |one: &knarr_api::selector::Requirement| {
        let operator = match one.operator {
            Operator::In => "In",
            Operator::NotIn => "NotIn",
            Operator::Exists => "Exists",
            Operator::DoesNotExist => "DoesNotExist",
            Operator::GreaterThan | Operator::LessThan => {
                return Err(format!(
                    "label {} is compared as a number, which pods cannot be selected by",
                    one.key
                ));
            }
        };
        Ok(LabelSelectorRequirement {
            key: one.key.clone(),
            operator: operator.to_owned(),
            values: (!one.values.is_empty()).then(|| one.values.clone()),
        })
    };
    let expressions = parsed.requirements().iter().map(requirement).collect::<Result<Vec<_>, String>>()?;
    let selector = LabelSelector { match_expressions: Some(expressions), match_labels: None };
    Selector::new(&selector).map_err(|error| error.to_string())
}
