//! What the words after a verb mean: `pods`, `pod a b`, `pod/a svc/b`, `deploy,svc web`, `all`.

use http::Method;
use knarr_api::object::Object;
use serde_json::Value;

use crate::context::{Ask, Context};
use crate::discovery::{Discovery, Resource};
use crate::error::{Error, Result};

/// A resource, and one object of it or all of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    pub resource: Resource,
    pub name: Option<String>,
}

/// One object, where it is and what it is.
pub struct Found {
    pub resource: Resource,
    pub namespace: Option<String>,
    pub object: Value,
}

impl Found {
    pub fn path(&self) -> String {
        self.resource.path(self.namespace.as_deref(), Some(self.object.name()))
    }

    /// `pod/x`.
    pub fn named(&self) -> String {
        self.resource.named(self.object.name())
    }
}

/// Reads the words.
pub fn resolve(discovery: &Discovery, words: &[String]) -> Result<Vec<Target>> {
    if words.iter().any(|w| w.contains('/')) {
        return words.iter().map(|word| resolve_slash(discovery, word)).collect();
    }
    let Some((types, names)) = words.split_first() else { return Ok(Vec::new()) };
    let mut targets = Vec::new();
    for word in types.split(',').filter(|w| !w.is_empty()) {
        let category = discovery.category(word);
        let resources = if category.is_empty() { vec![discovery.find(word)?] } else { category };
        for resource in resources {
            let resource = resource.clone();
            if names.is_empty() {
                targets.push(Target { resource, name: None });
            } else {
                targets.extend(
                    names.iter().map(|n| Target { resource: resource.clone(), name: Some(n.clone()) }),
                );
            }
        }
    }
    Ok(targets)
}

fn resolve_slash(discovery: &Discovery, word: &str) -> Result<Target> {
    let Some((kind, name)) = word.split_once('/') else {
        return Err(Error::plain(
            "there is no need to specify a resource type as a separate argument when passing arguments in \
             resource/name form (e.g. 'kubectl get resource/<resource_name>' instead of 'kubectl get resource \
             resource/<resource_name>'",
        ));
    };
    if kind.is_empty() || name.is_empty() || name.contains('/') {
        return Err(Error::plain("arguments in resource/name form must have a single resource and name"));
    }
    Ok(Target { resource: discovery.find(kind)?.clone(), name: Some(name.to_owned()) })
}

/// Fetches what the words and the selector name, in the request's namespace or in all.
pub async fn fetch(
    context: &Context,
    words: &[String],
    selector: Option<&str>,
    field_selector: Option<&str>,
    all_namespaces: bool,
) -> Result<Vec<Found>> {
    let targets = resolve(context.discovery().await?, words)?;
    let namespace = context.namespace()?;
    let mut found = Vec::new();
    for Target { resource, name } in targets {
        let scope = (resource.namespaced && !all_namespaces).then_some(namespace.as_str());
        match name {
            Some(name) => {
                if selector.is_some() {
                    return Err(Error::plain("name cannot be provided when a selector is specified"));
                }
                if all_namespaces && resource.namespaced {
                    return Err(Error::plain("a resource cannot be retrieved by name across all namespaces"));
                }
                let object = context.get(&resource.path(scope, Some(&name))).await?;
                let namespace = scope.map(str::to_owned);
                found.push(Found { resource, namespace, object });
            }
            None => {
                let query = selectors(selector, field_selector);
                let mut list = context.list(&resource.path(scope, None), &query, None).await?;
                let Value::Array(items) = list["items"].take() else { continue };
                for mut object in items {
                    // Items of a list do not say what they are.
                    object["apiVersion"] = resource.api_version().into();
                    object["kind"] = resource.kind.clone().into();
                    let namespace = resource.namespaced.then(|| object.namespace().to_owned());
                    found.push(Found { resource: resource.clone(), namespace, object });
                }
            }
        }
    }
    Ok(found)
}

/// Refuses a bare type where nothing says which of its objects are meant: a change of all must be asked for.
pub fn need_choice(words: &[String], chosen: bool) -> Result<()> {
    let bare = words.len() == 1 && !words[0].contains('/');
    if bare && !chosen {
        return Err(Error::plain("resource(s) were provided, but no name was specified"));
    }
    Ok(())
}

/// The query of a list with these selectors.
pub fn selectors(labels: Option<&str>, fields: Option<&str>) -> Vec<(&'static str, String)> {
    let mut query = Vec::new();
    query.extend(labels.map(|l| ("labelSelector", l.to_owned())));
    query.extend(fields.map(|f| ("fieldSelector", f.to_owned())));
    query
}

/// One object by `type/name` or `type name`.
pub async fn fetch_one(context: &Context, words: &[String], default_type: &str) -> Result<Found> {
    let words: Vec<String> = match words {
        [one] if !one.contains('/') && !default_type.is_empty() => vec![default_type.into(), one.clone()],
        more => more.to_vec(),
    };
    let mut found = fetch(context, &words, None, None, false).await?;
    if found.len() != 1 {
        return Err(Error::plain("exactly one resource must be named, as TYPE/NAME"));
    }
    Ok(found.remove(0))
}

impl Found {
    /// Patches the object, or a subresource of it.
    pub async fn patch(&self, context: &Context, sub: &str, ask: Ask<'_>) -> Result<Value> {
        let path = if sub.is_empty() { self.path() } else { format!("{}/{sub}", self.path()) };
        context.json(Method::PATCH, &path, ask).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> std::result::Result<String, String> {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        let targets = resolve(&crate::discovery::tests::sample(), &words).map_err(|e| e.to_string())?;
        Ok(targets
            .iter()
            .map(|t| format!("{}:{}", t.resource.qualified(), t.name.as_deref().unwrap_or("*")))
            .collect::<Vec<_>>()
            .join(" "))
    }

    #[test]
    fn words_name_types_and_objects() {
        for (line, expected) in [
            ("pods", "pods:*"),
            ("pod a b", "pods:a pods:b"),
            ("po/a svc/b", "pods:a services:b"),
            ("deploy,svc web", "deployments.apps:web services:web"),
            ("all", "pods:* services:* deployments.apps:*"),
        ] {
            assert_eq!(read(line).as_deref(), Ok(expected), "{line}");
        }
    }

    #[test]
    fn mixed_forms_are_refused() {
        assert!(
            read("pod pod/a").expect_err("mixed").contains("there is no need to specify a resource type")
        );
        assert!(read("pod/").expect_err("no name").contains("must have a single resource and name"));
    }
}
