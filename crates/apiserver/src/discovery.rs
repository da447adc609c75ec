//! Discovery: which groups, versions and resources the server has, in the legacy and aggregated forms.
//! Everything follows from the kinds' rows.

use knarr_api::schema::{Kind, Schema};
use serde_json::{Value, json};

/// Everything that is served: the schema's kinds, and on request their old versions.
#[derive(Debug, Clone, Copy)]
pub struct Catalog {
    pub schema: &'static Schema,
    /// With the versions that upstream has removed.
    pub old: bool,
}

impl Catalog {
    /// All kinds; old versions come last.
    pub fn kinds(self) -> impl Iterator<Item = &'static Kind> {
        let old = if self.old { self.schema.old_kinds() } else { &[] };
        self.schema.kinds().iter().chain(old)
    }

    /// The kind served at group, version and plural.
    pub fn resource(self, group: &str, version: &str, plural: &str) -> Option<&'static Kind> {
        let found = self.schema.any_resource(group, version, plural)?;
        (self.old || !found.is_old()).then_some(found)
    }
}

const VERBS: [&str; 8] = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];

/// `(verbs, kind, group of the kind, version of the kind)` of a subresource; empty names are the parent's.
fn subresource(
    kind: &Kind,
    name: &str,
) -> (&'static [&'static str], &'static str, &'static str, &'static str) {
    match name {
        "scale" => (&["get", "patch", "update"], "Scale", "autoscaling", "v1"),
        "eviction" => (&["create"], "Eviction", "policy", "v1"),
        "token" => (&["create"], "TokenRequest", "authentication.k8s.io", "v1"),
        "binding" => (&["create"], "Binding", "", "v1"),
        "exec" => (&["create", "get"], "PodExecOptions", "", "v1"),
        "attach" => (&["create", "get"], "PodAttachOptions", "", "v1"),
        "portforward" => (&["create", "get"], "PodPortForwardOptions", "", "v1"),
        "proxy" => {
            let options = match kind.plural.as_str() {
                "nodes" => "NodeProxyOptions",
                "services" => "ServiceProxyOptions",
                _ => "PodProxyOptions",
            };
            (&["create", "delete", "get", "patch", "update"], options, "", "v1")
        }
        "log" => (&["get"], "", "", ""),
        "finalize" => (&["update"], "", "", ""),
        _ => (&["get", "patch", "update"], "", "", ""),
    }
}

/// What can be done with objects of the kind.
pub fn verbs(kind: &Kind) -> Vec<&'static str> {
    match kind.resource().as_str() {
        _ if kind.create_only => vec!["create"],
        "componentstatuses" => vec!["get", "list"],
        "namespaces" => VERBS.into_iter().filter(|v| *v != "deletecollection").collect(),
        _ => VERBS.to_vec(),
    }
}

/// Groups with their versions, preferred first.
fn groups(catalog: Catalog) -> Vec<(String, Vec<String>)> {
    let mut groups: Vec<(String, Vec<String>)> = Vec::new();
    for kind in catalog.kinds() {
        match groups.iter_mut().find(|(group, _)| *group == kind.group) {
            Some((_, versions)) if versions.contains(&kind.version) => {}
            Some((_, versions)) => versions.push(kind.version.clone()),
            None => groups.push((kind.group.clone(), vec![kind.version.clone()])),
        }
    }
    for (_, versions) in &mut groups {
        versions.sort_by_cached_key(|version| std::cmp::Reverse(priority(version)));
    }
    groups
}

/// How versions are ordered: stable ones first, then beta and alpha; higher numbers before lower.
fn priority(version: &str) -> (u8, u32, u32) {
    let rest = version.strip_prefix('v').unwrap_or(version);
    let (major, stage, minor) = match (rest.split_once("beta"), rest.split_once("alpha")) {
        (Some((major, minor)), _) => (major, 1, minor),
        (_, Some((major, minor))) => (major, 0, minor),
        _ => (rest, 2, "0"),
    };
    (stage, major.parse().unwrap_or(0), minor.parse().unwrap_or(0))
}

/// `/api`.
pub fn core_versions(address: &str) -> Value {
    json!({
        "kind": "APIVersions",
        "versions": ["v1"],
        "serverAddressByClientCIDRs": [{ "clientCIDR": "0.0.0.0/0", "serverAddress": address }],
    })
}

/// `/apis`.
pub fn group_list(catalog: Catalog) -> Value {
    let groups: Vec<Value> = groups(catalog).iter().filter(|(g, _)| !g.is_empty()).map(group_value).collect();
    json!({ "kind": "APIGroupList", "apiVersion": "v1", "groups": groups })
}

/// `/apis/GROUP`.
pub fn group(catalog: Catalog, name: &str) -> Option<Value> {
    let groups = groups(catalog);
    let found = groups.iter().find(|(g, _)| g == name && !g.is_empty())?;
    let mut value = group_value(found);
    value["kind"] = json!("APIGroup");
    value["apiVersion"] = json!("v1");
    Some(value)
}

fn group_value((name, versions): &(String, Vec<String>)) -> Value {
    let version = |v: &String| json!({ "groupVersion": format!("{name}/{v}"), "version": v });
    json!({
        "name": name,
        "versions": versions.iter().map(version).collect::<Vec<_>>(),
        "preferredVersion": versions.first().map(version),
    })
}

/// `/api/v1` and `/apis/GROUP/VERSION`.
pub fn resource_list(catalog: Catalog, group: &str, version: &str) -> Option<Value> {
    let kinds: Vec<&Kind> = catalog.kinds().filter(|k| k.group == group && k.version == version).collect();
    let api_version = kinds.first()?.api_version();
    let mut resources = Vec::new();
    for kind in kinds {
        let mut entry = json!({
            "name": kind.plural,
            "singularName": kind.singular,
            "namespaced": kind.namespaced,
            "kind": kind.kind,
            "verbs": verbs(kind),
        });
        if !kind.short.is_empty() {
            entry["shortNames"] = json!(kind.short);
        }
        if !kind.categories.is_empty() {
            entry["categories"] = json!(kind.categories);
        }
        resources.push(entry);
        for name in &kind.subresources {
            let (verbs, other, group, version) = subresource(kind, name);
            let mut entry = json!({
                "name": format!("{}/{name}", kind.plural),
                "singularName": "",
                "namespaced": kind.namespaced,
                "kind": if other.is_empty() { kind.kind.as_str() } else { other },
                "verbs": verbs,
            });
            if !group.is_empty() {
                entry["group"] = json!(group);
                entry["version"] = json!(version);
            }
            resources.push(entry);
        }
    }
    resources.sort_by(|a, b| a["name"].as_str().cmp(&b["name"].as_str()));
    Some(
        json!({ "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": api_version, "resources": resources }),
    )
}

/// The aggregated form (KEP-3352) of `/api` (the core group) or `/apis` (all others).
pub fn aggregated(catalog: Catalog, core: bool, version: &str) -> Value {
    let items: Vec<Value> = groups(catalog)
        .iter()
        .filter(|(name, _)| name.is_empty() == core)
        .map(|(name, versions)| {
            let versions: Vec<Value> =
                versions.iter().map(|v| aggregated_version(catalog, name, v)).collect();
            let metadata = if name.is_empty() {
                json!({ "creationTimestamp": null })
            } else {
                json!({ "name": name, "creationTimestamp": null })
            };
            json!({ "metadata": metadata, "versions": versions })
        })
        .collect();
    json!({
        "kind": "APIGroupDiscoveryList",
        "apiVersion": format!("apidiscovery.k8s.io/{version}"),
        "metadata": {},
        "items": items,
    })
}

fn aggregated_version(catalog: Catalog, group: &str, version: &str) -> Value {
    let kinds = catalog.kinds().filter(|k| k.group == group && k.version == version);
    let scope = |kind: &Kind| if kind.namespaced { "Namespaced" } else { "Cluster" };
    let mut resources: Vec<Value> = kinds
        .map(|kind| {
            let mut entry = json!({
                "resource": kind.plural,
                "responseKind": { "group": group, "version": version, "kind": kind.kind },
                "scope": scope(kind),
                "singularResource": kind.singular,
                "verbs": verbs(kind),
            });
            if !kind.short.is_empty() {
                entry["shortNames"] = json!(kind.short);
            }
            if !kind.categories.is_empty() {
                entry["categories"] = json!(kind.categories);
            }
            let subresources: Vec<Value> = kind
                .subresources
                .iter()
                .map(|name| {
                    let (verbs, other, other_group, other_version) = subresource(kind, name);
                    let (kind, group, version) = match other {
                        "" => (kind.kind.as_str(), group, version),
                        other => (other, other_group, other_version),
                    };
                    json!({ "subresource": name, "verbs": verbs,
                        "responseKind": { "group": group, "version": version, "kind": kind } })
                })
                .collect();
            if !subresources.is_empty() {
                entry["subresources"] = Value::Array(subresources);
            }
            entry
        })
        .collect();
    resources.sort_by(|a, b| a["resource"].as_str().cmp(&b["resource"].as_str()));
    json!({ "version": version, "freshness": "Current", "resources": resources })
}
