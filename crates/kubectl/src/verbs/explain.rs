//! `explain`: what a resource and its fields are, from the server's OpenAPI v3.

use knarr_api::object::Object;
use serde_json::Value;

use crate::context::Context;
use crate::error::{Error, Result};

/// Where upstream breaks lines.
const WIDTH: usize = 80;
/// References followed in a row; deeper nesting is a loop.
const DEPTH_MAX: usize = 32;

#[derive(clap::Args)]
pub struct Args {
    /// TYPE[.FIELD...]
    path: String,
    /// Print the fields of fields, without descriptions.
    #[arg(long)]
    recursive: bool,
    /// GROUP/VERSION
    #[arg(long)]
    api_version: Option<String>,
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    let discovery = context.discovery().await?;
    let (kind, fields) = args.path.split_once('.').map_or((args.path.as_str(), ""), |(k, f)| (k, f));
    let mut resource = discovery.find(kind)?;
    if let Some(version) = &args.api_version {
        resource = discovery.of_kind(version, &resource.kind).ok_or_else(|| Error::plain(format!("couldn't find resource for {version}, Kind={}", resource.kind)))?;
    }
    let group_version = if resource.group.is_empty() { format!("api/{}", resource.version) } else { format!("apis/{}/{}", resource.group, resource.version) };
    let index = context.get("/openapi/v3").await?;
    let entry = index.get("paths").and_then(|p| p.get(&group_version));
    let Some(url) = entry.map(|e| e.str_at("serverRelativeURL")).filter(|u| !u.is_empty()) else {
        return Err(Error::plain(format!("the server has no OpenAPI document for {}", resource.api_version())));
    };
    let document = context.get(url).await?;
    let schema = schema_of(&document, &resource.group, &resource.version, &resource.kind)
        .ok_or_else(|| Error::plain(format!("GVR ({}) not found in OpenAPI schema", resource.qualified())))?;
    let explained = Explained { document: &document };
    let mut text = String::new();
    if !resource.group.is_empty() {
        text += &format!("GROUP:      {}\n", resource.group);
    }
    text += &format!("KIND:       {}\nVERSION:    {}\n\n", resource.kind, resource.version);
    text += &explained.page(schema, fields, args.recursive)?;
    print!("{text}");
    Ok(())
}

fn schema_of<'d>(document: &'d Value, group: &str, version: &str, kind: &str) -> Option<&'d Value> {
    let all = document.map_at("components.schemas")?;
    all.values().find(|schema| {
        let kinds = schema.list_at("x-kubernetes-group-version-kind");
        kinds.iter().any(|k| k.str_at("group") == group && k.str_at("version") == version && k.str_at("kind") == kind)
    })
}

struct Explained<'d> {
    document: &'d Value,
}

impl<'d> Explained<'d> {
    fn page(&self, schema: &'d Value, path: &str, recursive: bool) -> Result<String> {
        let (mut here, mut head) = (schema, String::new());
        let mut description = schema.str_at("description");
        for name in path.split('.').filter(|p| !p.is_empty()) {
            let parent = self.inner(here);
            let field = parent.get("properties").and_then(|p| p.get(name)).ok_or_else(|| Error::plain(format!("field {name:?} does not exist")))?;
            head = format!("FIELD: {name} <{}>{}\n", self.type_of(field), required(parent, name));
            description = field.str_at("description");
            here = field;
        }
        let mut text = head;
        if !text.is_empty() {
            text.push('\n');
        }
        let inner = self.inner(here);
        let of_type = if std::ptr::eq(inner, here) { "" } else { inner.str_at("description") };
        text += "\nDESCRIPTION:\n";
        for part in [description, of_type].into_iter().filter(|d| !d.is_empty()) {
            text += &wrap(part, 4);
        }
        if description.is_empty() && of_type.is_empty() {
            text += "    <empty>\n";
        }
        text += "    \n";
        if inner.get("properties").is_some() {
            text += "FIELDS:\n";
            self.fields(inner, 1, recursive, &mut text, 0);
        }
        text.push('\n');
        Ok(text)
    }

    fn fields(&self, schema: &Value, level: usize, recursive: bool, text: &mut String, depth: usize) {
        let Some(properties) = schema.map_at("properties") else { return };
        for (name, field) in properties {
            *text += &format!("{}{name}\t<{}>{}\n", "  ".repeat(level), self.type_of(field), required(schema, name));
            if !recursive {
                let description = match field.str_at("description") {
                    "" => self.inner(field).str_at("description"),
                    own => own,
                };
                *text += &wrap(if description.is_empty() { "<no description>" } else { description }, 4);
                text.push('\n');
            } else if depth < DEPTH_MAX && !refers_to_itself(field) {
                self.fields(self.inner(field), level + 1, true, text, depth + 1);
            }
        }
    }

    /// The schema of the objects in a field: through references, lists and maps.
    fn inner<'v>(&self, schema: &'v Value) -> &'v Value
    where
        'd: 'v,
    {
        let mut here = schema;
        for _ in 0..DEPTH_MAX {
            here = if let Some(target) = reference(here) {
                match self.document.map_at("components.schemas").and_then(|s| s.get(target)) {
                    Some(found) => found,
                    None => return here,
                }
            } else if let Some(items) = here.at("items") {
                items
            } else if let Some(values) = here.at("additionalProperties").filter(|v| v.is_object()) {
                values
            } else {
                return here;
            };
        }
        here
    }

    fn type_of(&self, field: &Value) -> String {
        if let Some(target) = reference(field) {
            let found = self.document.map_at("components.schemas").and_then(|s| s.get(target));
            // A reference to a plain type (Time, Quantity) reads as that type.
            return match found.map(|f| f.str_at("type")) {
                Some(plain) if !plain.is_empty() && plain != "object" => plain.to_owned(),
                _ => target.rsplit('.').next().unwrap_or(target).to_owned(),
            };
        }
        if let Some(items) = field.at("items") {
            return format!("[]{}", self.type_of(items));
        }
        if let Some(values) = field.at("additionalProperties").filter(|v| v.is_object()) {
            return format!("map[string]{}", self.type_of(values));
        }
        match field.str_at("type") {
            "object" | "" => "Object".to_owned(),
            plain => plain.to_owned(),
        }
    }
}

fn reference(schema: &Value) -> Option<&str> {
    let direct = schema.get("$ref").and_then(Value::as_str);
    let wrapped = || schema.list_at("allOf").first().and_then(|s| s.get("$ref")).and_then(Value::as_str);
    direct.or_else(wrapped)?.rsplit('/').next()
}

/// `JSONSchemaProps` contains itself; upstream stops there too.
fn refers_to_itself(field: &Value) -> bool {
    field.to_string().contains("JSONSchemaProps")
}

fn required(schema: &Value, name: &str) -> &'static str {
    if schema.list_at("required").iter().any(|r| r == name) { " -required-" } else { "" }
}

fn wrap(text: &str, indent: usize) -> String {
    let mut out = String::new();
    for paragraph in text.split('\n') {
        let mut line = String::new();
        for word in paragraph.split_whitespace() {
            if !line.is_empty() && line.len() + 1 + word.len() > WIDTH - indent {
                out += &format!("{}{line}\n", " ".repeat(indent));
                line.clear();
            }
            if !line.is_empty() {
                line.push(' ');
            }
            line += word;
        }
        out += &format!("{}{line}\n", " ".repeat(indent));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn fields_are_found_through_references() {
        let document = json!({"components":{"schemas":{
            "v1.Pod":{"description":"A pod.","type":"object","x-kubernetes-group-version-kind":[{"group":"","version":"v1","kind":"Pod"}],
                "properties":{"spec":{"description":"Its spec.","allOf":[{"$ref":"#/components/schemas/v1.PodSpec"}]}}},
            "v1.PodSpec":{"type":"object","description":"PodSpec is.","required":["containers"],
                "properties":{"containers":{"type":"array","description":"Them.","items":{"$ref":"#/components/schemas/v1.C"}},"n":{"type":"string"}}},
            "v1.C":{"type":"object","properties":{"image":{"type":"string"}}}}}});
        let schema = schema_of(&document, "", "v1", "Pod").expect("is there");
        let page = Explained { document: &document }.page(schema, "spec", false).expect("explains");
        for part in ["FIELD: spec <PodSpec>", "    Its spec.", "  containers\t<[]C> -required-", "  n\t<string>"] {
            assert!(page.contains(part), "{part:?} is missing in\n{page}");
        }
        let missing = Explained { document: &document }.page(schema, "spec.x", false).expect_err("no such field");
        assert_eq!(missing.to_string(), "error: field \"x\" does not exist");
    }
}
