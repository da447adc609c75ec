//! OpenAPI versions 2 and 3, written from the schema when asked for.
//!
//! `kubectl apply`, `explain` and field validation read types, list types, merge keys, options and
//! descriptions from here. Documents are large and rarely asked for, so none is kept: only the digests that
//! tell clients whether theirs is still right.

mod definitions;
mod gnostic;
mod paths;
pub mod serve;
mod texts;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::OnceLock;

use knarr_api::schema::{Kind, TypeId};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha512};

use definitions::{Definitions, Needed, PATCH, UNLISTED, VERSION_INFO, list_name};
use paths::{Paths, group_path};
use texts::Texts;

use crate::discovery::Catalog;

/// The media type of version 2 in protobuf; `@` and `+` are upstream's.
pub const V2_PROTOBUF: &str = "application/com.github.proto-openapi.spec.v2@v1.0+protobuf";
/// The same as clients of late write it.
pub const V2_PROTOBUF_DOTTED: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";

/// Documents of version 3 that are not of one group and version.
const SERVER_DOCUMENTS: [&str; 5] =
    ["api", "apis", "version", ".well-known/openid-configuration", "openid/v1/jwks"];

/// The digest of content, as `ETag` and in the index.
pub fn digest(content: &[u8]) -> String {
    Sha512::digest(content).iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02X}").expect("strings can be written to");
        text
    })
}

/// The digests of all documents of version 3, by their path under `/openapi/v3/`; made at first use.
fn v3_digests(catalog: Catalog) -> &'static BTreeMap<String, String> {
    static DIGESTS: [OnceLock<BTreeMap<String, String>>; 2] = [const { OnceLock::new() }; 2];
    DIGESTS[usize::from(catalog.old)].get_or_init(|| {
        let texts = Texts::unpack();
        let written = v3_paths(catalog).into_iter().filter_map(|path| {
            let document = v3_write(catalog, &texts, &path)?;
            Some((path, digest(document.as_bytes())))
        });
        written.collect()
    })
}

fn v3_paths(catalog: Catalog) -> Vec<String> {
    let mut paths: Vec<String> = SERVER_DOCUMENTS.iter().map(|p| (*p).to_owned()).collect();
    for kind in catalog.kinds() {
        paths.push(group_path(&kind.group, &kind.version));
        if !kind.group.is_empty() {
            paths.push(format!("apis/{}", kind.group));
        }
    }
    paths.sort();
    paths.dedup();
    paths
}

/// `/openapi/v3`: every document with its digest.
pub fn v3_index(catalog: Catalog) -> Value {
    let entry = |(path, hash): (&String, &String)| {
        (path.clone(), json!({ "serverRelativeURL": format!("/openapi/v3/{path}?hash={hash}") }))
    };
    json!({ "paths": v3_digests(catalog).iter().map(entry).collect::<Map<_, _>>() })
}

/// The digest of a document of version 3, by its path under `/openapi/v3/`.
pub fn v3_digest(catalog: Catalog, path: &str) -> Option<&'static str> {
    v3_digests(catalog).get(path).map(String::as_str)
}

/// A document of version 3.
pub fn v3_document(catalog: Catalog, path: &str) -> Option<String> {
    v3_write(catalog, &Texts::unpack(), path)
}

/// The digest of version 2's document; made at first use.
pub fn v2_digest(catalog: Catalog) -> &'static str {
    static DIGEST: [OnceLock<String>; 2] = [const { OnceLock::new() }; 2];
    DIGEST[usize::from(catalog.old)].get_or_init(|| digest(v2_document(catalog).as_bytes()))
}

/// Version 2 as JSON.
pub fn v2_document(catalog: Catalog) -> String {
    let texts = Texts::unpack();
    let document = Document::whole(catalog, &texts, false);
    let mut out = format!(r#"{{"swagger":"2.0","info":{},"paths":"#, info());
    members(&mut out, document.paths());
    out.push_str(r#","definitions":"#);
    members(&mut out, document.definitions());
    out.push_str(&format!(
        r#","security":[{{"BearerToken":[]}}],"securityDefinitions":{}}}"#,
        json!({ "BearerToken": { "description": "Bearer Token authentication", "type": "apiKey", "name": "authorization", "in": "header" } })
    ));
    out
}

/// Version 2 as protobuf.
pub fn v2_protobuf(catalog: Catalog) -> Vec<u8> {
    let texts = Texts::unpack();
    let document = Document::whole(catalog, &texts, false);
    let mut out = gnostic::head(&info());
    out.extend(gnostic::paths(document.paths()));
    out.extend(gnostic::definitions(document.definitions()));
    out
}

fn v3_write(catalog: Catalog, texts: &Texts, path: &str) -> Option<String> {
    let document = Document::part(catalog, texts, path)?;
    let mut out = format!(r#"{{"openapi":"3.0.0","info":{},"paths":"#, info());
    members(&mut out, document.paths());
    out.push_str(r#","components":{"schemas":"#);
    members(&mut out, document.definitions());
    out.push_str(&format!(
        r#","securitySchemes":{}}}}}"#,
        json!({ "BearerToken": { "description": "Bearer Token authentication", "type": "apiKey", "name": "authorization", "in": "header" } })
    ));
    Some(out)
}

fn info() -> Value {
    json!({ "title": "Kubernetes", "version": crate::VERSION })
}

/// Writes an object one member at a time: no tree of the whole.
fn members(out: &mut String, items: impl Iterator<Item = (String, Value)>) {
    out.push('{');
    for (index, (name, value)) in items.enumerate() {
        let comma = if index == 0 { "" } else { "," };
        out.push_str(&format!("{comma}{}:{value}", Value::String(name)));
    }
    out.push('}');
}

/// What one document is about.
struct Document<'s> {
    definitions: Definitions<'s>,
    kinds: Vec<&'static Kind>,
    needed: Needed,
    /// Discovery and the like: path and what is read there.
    server: Vec<(String, Value)>,
}

impl<'s> Document<'s> {
    fn whole(catalog: Catalog, texts: &'s Texts, v3: bool) -> Self {
        let mut document = Document::of(catalog, texts, v3, catalog.kinds().collect());
        for path in v3_paths(catalog) {
            document.add_server_path(&path);
        }
        document
    }

    /// One document of version 3.
    fn part(catalog: Catalog, texts: &'s Texts, path: &str) -> Option<Self> {
        let of_path = |k: &&'static Kind| group_path(&k.group, &k.version) == path;
        let kinds: Vec<&'static Kind> = catalog.kinds().filter(of_path).collect();
        let group = path.strip_prefix("apis/").unwrap_or("-");
        let known = SERVER_DOCUMENTS.contains(&path) || catalog.kinds().any(|k| k.group == group);
        if kinds.is_empty() && !known {
            return None;
        }
        let mut document = Document::of(catalog, texts, true, kinds);
        document.add_server_path(path);
        Some(document)
    }

    fn of(catalog: Catalog, texts: &'s Texts, v3: bool, kinds: Vec<&'static Kind>) -> Self {
        let definitions = Definitions { catalog, texts, v3 };
        let mut document = Document { definitions, kinds, needed: Needed::new(), server: Vec::new() };
        let mut roots: Vec<TypeId> = document.kinds.iter().map(|k| k.type_id).collect();
        if !document.kinds.is_empty() {
            let shared =
                ["meta.v1.ListMeta", "meta.v1.Status", "meta.v1.DeleteOptions", "meta.v1.WatchEvent"];
            roots.extend(shared.iter().filter_map(|n| catalog.schema.type_named(n)));
            document.needed.insert(PATCH.to_owned(), None);
        }
        for (name, _, _, kind) in UNLISTED {
            let sub = match *kind {
                "Scale" => "scale",
                "Eviction" => "eviction",
                "TokenRequest" => "token",
                _ => continue,
            };
            if document.kinds.iter().any(|k| k.has_sub(sub)) {
                roots.extend(catalog.schema.type_named(name));
            }
        }
        document.need(&roots);
        document
    }

    fn need(&mut self, roots: &[TypeId]) {
        let found = self.definitions.reachable(roots.iter().copied());
        self.needed.extend(found);
    }

    /// The path of discovery, or of the server itself, that belongs to a document of this path.
    fn add_server_path(&mut self, path: &str) {
        let segments: Vec<&str> = path.split('/').collect();
        let (id, text, kind, tag) = match segments[..] {
            ["api"] => {
                ("getCoreAPIVersions".into(), "get available API versions", "APIVersions", "core".into())
            }
            ["apis"] => {
                ("getAPIVersions".into(), "get available API versions", "APIGroupList", "apis".into())
            }
            ["api", version] => {
                let id = format!("getCore{}APIResources", version.to_uppercase());
                (id, "get available resources", "APIResourceList", format!("core_{version}"))
            }
            ["apis", group] => {
                let id = format!("get{}APIGroup", paths::group_words(group));
                (id, "get information of a group", "APIGroup", paths::tag(group))
            }
            ["apis", group, version] => {
                let id = format!(
                    "get{}{}{}APIResources",
                    paths::group_words(group),
                    version[..1].to_uppercase(),
                    &version[1..]
                );
                (id, "get available resources", "APIResourceList", format!("{}_{version}", paths::tag(group)))
            }
            ["version"] => {
                ("getCodeVersion".into(), "get the version information for this server", "", "version".into())
            }
            ["openid", ..] => (
                "getServiceAccountIssuerOpenIDKeyset".into(),
                "get the keys that verify service account tokens",
                "",
                "openid".into(),
            ),
            _ => (
                "getServiceAccountIssuerOpenIDConfiguration".into(),
                "get the issuer of service account tokens, as OpenID Connect has it",
                "",
                "WellKnown".into(),
            ),
        };
        let mut answer = None;
        if let Some(id) = self.definitions.catalog.schema.type_named(&format!("meta.v1.{kind}")) {
            self.need(&[id]);
            answer = Some(definitions::definition_name(&format!("meta.v1.{kind}")));
        } else if path == "version" {
            self.needed.insert(VERSION_INFO.to_owned(), None);
            answer = Some(VERSION_INFO.to_owned());
        }
        let item = paths::plain(&self.definitions, &id, text, answer.as_deref(), &tag);
        self.server.push((format!("/{path}/"), item));
    }

    /// Every path, one kind at a time.
    fn paths(&self) -> impl Iterator<Item = (String, Value)> {
        let server = self.server.iter().cloned();
        let of_kind = |kind: &&'static Kind| Paths { definitions: &self.definitions, kind }.all();
        server.chain(self.kinds.iter().flat_map(of_kind))
    }

    /// Every definition, one at a time.
    fn definitions(&self) -> impl Iterator<Item = (String, Value)> {
        let needed =
            self.needed.iter().map(|(name, id)| (name.clone(), self.definitions.definition(name, *id)));
        let listed = self.kinds.iter().filter(|k| !k.create_only);
        let lists = listed.map(|k| (list_name(self.definitions.catalog.schema, k), self.definitions.list(k)));
        needed.chain(lists)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_of_the_content() {
        let schema = Catalog { schema: knarr_api::schema::Schema::builtin(), old: true };
        let document = v3_document(schema, "apis/apps/v1").expect("served");
        assert_eq!(v3_digest(schema, "apis/apps/v1"), Some(digest(document.as_bytes()).as_str()));
        let value: Value = serde_json::from_str(&document).expect("json");
        let pod = &value["components"]["schemas"]["io.k8s.api.core.v1.PodSpec"]["properties"];
        assert!(pod["containers"]["description"].as_str().is_some_and(|d| d.contains("containers")));
        assert!(v3_document(schema, "apis/nothing/v1").is_none());
    }
}
