//! Which resources the server has, and which one a word means.

use http::Method;
use knarr_api::object::Object;
use serde_json::Value;

use crate::context::{Ask, Context};
use crate::error::{Error, Result};

const AGGREGATED: &str =
    "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json";

/// One resource as the server names it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Resource {
    pub group: String,
    pub version: String,
    pub kind: String,
    pub plural: String,
    pub singular: String,
    pub namespaced: bool,
    pub short: Vec<String>,
    pub categories: Vec<String>,
    pub verbs: Vec<String>,
    pub subresources: Vec<String>,
}

impl Resource {
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.clone() } else { format!("{}/{}", self.group, self.version) }
    }

    /// `pods`, `deployments.apps`.
    pub fn qualified(&self) -> String {
        if self.group.is_empty() { self.plural.clone() } else { format!("{}.{}", self.plural, self.group) }
    }

    /// `pod`, `deployment.apps`: how messages name an object of it.
    pub fn label(&self) -> String {
        let kind = self.kind.to_lowercase();
        if self.group.is_empty() { kind } else { format!("{kind}.{}", self.group) }
    }

    /// `pod/x`, `deployment.apps/x`.
    pub fn named(&self, name: &str) -> String {
        format!("{}/{name}", self.label())
    }

    /// The path of the collection, or of one object in it.
    pub fn path(&self, namespace: Option<&str>, name: Option<&str>) -> String {
        let mut path = if self.group.is_empty() {
            format!("/api/{}", self.version)
        } else {
            format!("/apis/{}/{}", self.group, self.version)
        };
        if let Some(namespace) = namespace.filter(|_| self.namespaced) {
            path += &format!("/namespaces/{namespace}");
        }
        path += &format!("/{}", self.plural);
        if let Some(name) = name {
            path += &format!("/{name}");
        }
        path
    }

    pub fn can(&self, verb: &str) -> bool {
        self.verbs.iter().any(|v| v == verb)
    }
}

/// All resources: the server's preferred versions first within each group.
pub struct Discovery {
    pub resources: Vec<Resource>,
    /// Group versions in the server's order, `v1` and `apps/v1`.
    pub versions: Vec<String>,
}

impl Discovery {
    pub async fn load(context: &Context) -> Result<Discovery> {
        let mut discovery = Discovery { resources: Vec::new(), versions: Vec::new() };
        for root in ["/api", "/apis"] {
            let ask = Ask { accept: Some(AGGREGATED), ..Ask::default() };
            let answer = context.json(Method::GET, root, ask).await?;
            if answer.str_at("kind") == "APIGroupDiscoveryList" {
                discovery.read_aggregated(&answer);
            } else {
                discovery.read_legacy(context, root, &answer).await?;
            }
        }
        Ok(discovery)
    }

    pub fn read_aggregated(&mut self, list: &Value) {
        for group in list.list_at("items") {
            for version in group.list_at("versions") {
                let (group, version_name) = (group.name(), version.str_at("version"));
                self.push_version(group, version_name);
                for found in version.list_at("resources") {
                    self.resources.push(Resource {
                        group: group.into(),
                        version: version_name.into(),
                        kind: found.str_at("responseKind.kind").into(),
                        plural: found.str_at("resource").into(),
                        singular: found.str_at("singularResource").into(),
                        namespaced: found.str_at("scope") == "Namespaced",
                        short: strings(found.list_at("shortNames")),
                        categories: strings(found.list_at("categories")),
                        verbs: strings(found.list_at("verbs")),
                        subresources: found
                            .list_at("subresources")
                            .iter()
                            .map(|s| s.str_at("subresource").into())
                            .collect(),
                    });
                }
            }
        }
    }

    /// Servers before 1.27: one call per group version.
    async fn read_legacy(&mut self, context: &Context, root: &str, answer: &Value) -> Result<()> {
        let mut versions: Vec<(String, String)> = Vec::new();
        for version in answer.list_at("versions") {
            versions.push((String::new(), version.as_str().unwrap_or_default().into()));
        }
        for group in answer.list_at("groups") {
            let mut of_group: Vec<&str> =
                group.list_at("versions").iter().map(|v| v.str_at("version")).collect();
            of_group.sort_by_key(|v| *v != group.str_at("preferredVersion.version"));
            versions.extend(of_group.into_iter().map(|v| (group.name_of_group(), v.to_owned())));
        }
        for (group, version) in versions {
            let path = if group.is_empty() {
                format!("{root}/{version}")
            } else {
                format!("{root}/{group}/{version}")
            };
            let list = context.get(&path).await?;
            self.push_version(&group, &version);
            self.read_resource_list(&group, &version, &list);
        }
        Ok(())
    }

    fn read_resource_list(&mut self, group: &str, version: &str, list: &Value) {
        let all = list.list_at("resources");
        for found in all.iter().filter(|r| !r.str_at("name").contains('/')) {
            let plural = found.str_at("name");
            let subs = all.iter().filter_map(|r| r.str_at("name").strip_prefix(plural)?.strip_prefix('/'));
            let singular = match found.str_at("singularName") {
                "" => found.str_at("kind").to_lowercase(),
                name => name.into(),
            };
            self.resources.push(Resource {
                group: group.into(),
                version: version.into(),
                kind: found.str_at("kind").into(),
                plural: plural.into(),
                singular,
                namespaced: found.bool_at("namespaced"),
                short: strings(found.list_at("shortNames")),
                categories: strings(found.list_at("categories")),
                verbs: strings(found.list_at("verbs")),
                subresources: subs.map(str::to_owned).collect(),
            });
        }
    }

    fn push_version(&mut self, group: &str, version: &str) {
        self.versions.push(if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") });
    }

    /// Plural, singular, short name or kind, with `.group` or `.version.group` behind it where needed.
    pub fn find(&self, word: &str) -> Result<&Resource> {
        let lower = word.to_lowercase();
        let (name, rest) = lower.split_once('.').map_or((lower.as_str(), None), |(n, r)| (n, Some(r)));
        let matches = |r: &&Resource| match rest {
            None => true,
            Some(rest) => {
                r.group == rest
                    || r.group.starts_with(&format!("{rest}."))
                    || format!("{}.{}", r.version, r.group) == rest
            }
        };
        let by = |test: &dyn Fn(&Resource) -> bool| self.resources.iter().filter(matches).find(|r| test(r));
        by(&|r| r.plural == name)
            .or_else(|| by(&|r| r.singular == name || r.kind.to_lowercase() == name))
            .or_else(|| by(&|r| r.short.iter().any(|s| s == name)))
            .ok_or_else(|| Error::plain(format!("the server doesn't have a resource type {word:?}")))
    }

    /// The resource that serves objects of this apiVersion and kind.
    pub fn of_kind(&self, api_version: &str, kind: &str) -> Option<&Resource> {
        self.resources.iter().find(|r| r.kind == kind && r.api_version() == api_version)
    }

    /// The members of a category such as `all`; each resource once, in its preferred version.
    pub fn category(&self, name: &str) -> Vec<&Resource> {
        let mut found: Vec<&Resource> = Vec::new();
        for resource in self.resources.iter().filter(|r| r.categories.iter().any(|c| c == name)) {
            if !found.iter().any(|f| f.group == resource.group && f.plural == resource.plural) {
                found.push(resource);
            }
        }
        found
    }
}

fn strings(list: &[Value]) -> Vec<String> {
    list.iter().filter_map(|v| v.as_str().map(str::to_owned)).collect()
}

trait GroupName {
    fn name_of_group(&self) -> String;
}

impl GroupName for Value {
    /// Legacy discovery has the name at the top, not in `metadata`.
    fn name_of_group(&self) -> String {
        self.str_at("name").to_owned()
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn sample() -> Discovery {
        let resource =
            |group: &str, version: &str, kind: &str, plural: &str, short: &[&str], namespaced: bool| {
                Resource {
                    group: group.into(),
                    version: version.into(),
                    kind: kind.into(),
                    plural: plural.into(),
                    singular: kind.to_lowercase(),
                    namespaced,
                    short: short.iter().map(|s| s.to_string()).collect(),
                    categories: if ["pods", "services", "deployments"].contains(&plural) {
                        vec!["all".into()]
                    } else {
                        vec![]
                    },
                    verbs: ["get", "list"].map(String::from).to_vec(),
                    subresources: vec![],
                }
            };
        Discovery {
            versions: vec!["v1".into(), "apps/v1".into(), "events.k8s.io/v1".into()],
            resources: vec![
                resource("", "v1", "Pod", "pods", &["po"], true),
                resource("", "v1", "Service", "services", &["svc"], true),
                resource("", "v1", "Node", "nodes", &["no"], false),
                resource("", "v1", "Event", "events", &["ev"], true),
                resource("apps", "v1", "Deployment", "deployments", &["deploy"], true),
                resource("events.k8s.io", "v1", "Event", "events", &["ev"], true),
            ],
        }
    }

    #[test]
    fn every_form_of_a_name_finds_its_resource() {
        let discovery = sample();
        for (word, qualified) in [
            ("pods", "pods"),
            ("pod", "pods"),
            ("po", "pods"),
            ("Pod", "pods"),
            ("svc", "services"),
            ("deploy", "deployments.apps"),
            ("deployments.apps", "deployments.apps"),
            ("deployment.v1.apps", "deployments.apps"),
            ("events", "events"),
            ("events.events.k8s.io", "events.events.k8s.io"),
            ("ev", "events"),
        ] {
            assert_eq!(discovery.find(word).expect(word).qualified(), qualified, "{word}");
        }
        let unknown = discovery.find("foo").expect_err("no such type");
        assert_eq!(unknown.to_string(), "error: the server doesn't have a resource type \"foo\"");
    }

    #[test]
    fn paths_follow_group_and_scope() {
        let discovery = sample();
        let deployments = discovery.find("deploy").expect("is there");
        assert_eq!(deployments.path(Some("x"), Some("web")), "/apis/apps/v1/namespaces/x/deployments/web");
        assert_eq!(deployments.path(None, None), "/apis/apps/v1/deployments");
        assert_eq!(discovery.find("no").expect("is there").path(Some("x"), Some("n")), "/api/v1/nodes/n");
    }
}
