//! Manifests: files, directories and standard input; YAML documents and JSON, lists taken apart.

use std::io::Read;
use std::path::Path;

use knarr_api::object::Object;
use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, Result};

/// The most one manifest may hold; the server takes no object over 3 MiB.
const MANIFEST_BYTES_MAX: u64 = 64 << 20;

/// One object and where it came from (`STDIN` for standard input).
#[derive(Debug, PartialEq)]
pub struct Document {
    pub source: String,
    pub object: Value,
}

/// Reads all `-f` arguments.
pub fn read(names: &[String], recursive: bool) -> Result<Vec<Document>> {
    let mut documents = Vec::new();
    for name in names.iter().flat_map(|n| n.split(',')) {
        if name == "-" {
            let mut text = String::new();
            std::io::stdin().lock().take(MANIFEST_BYTES_MAX).read_to_string(&mut text)?;
            documents.extend(parse(&text, "STDIN")?);
        } else if name.starts_with("http://") || name.starts_with("https://") {
            return Err(Error::refused(
                "reading manifests from URLs",
                "fetch the file first: curl -fsSL URL | kubectl apply -f -",
            ));
        } else {
            read_path(Path::new(name), recursive, &mut documents)?;
        }
    }
    if documents.is_empty() {
        return Err(nothing_in(names));
    }
    Ok(documents)
}

fn nothing_in(names: &[String]) -> Error {
    match names.first() {
        None => Error::plain("must specify one of -f and -k"),
        Some(first) if Path::new(first).is_dir() => Error::plain(format!(
            "error reading [{}]: recognized file extensions are [.json .yaml .yml]",
            names.join(" ")
        )),
        Some(_) => Error::plain("no objects passed"),
    }
}

fn read_path(path: &Path, recursive: bool, documents: &mut Vec<Document>) -> Result<()> {
    let shown = path.display().to_string();
    let metadata = std::fs::metadata(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => Error::plain(format!("the path {shown:?} does not exist")),
        _ => Error::plain(format!("the path {shown:?} cannot be accessed: {e}")),
    })?;
    if !metadata.is_dir() {
        return read_file(path, documents);
    }
    let mut entries: Vec<_> = std::fs::read_dir(path)?.collect::<std::io::Result<Vec<_>>>()?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for path in entries.iter().map(std::fs::DirEntry::path) {
        let manifest = path.extension().is_some_and(|e| e == "yaml" || e == "yml" || e == "json");
        if path.is_dir() && recursive {
            read_path(&path, true, documents)?;
        } else if path.is_file() && manifest {
            read_file(&path, documents)?;
        }
    }
    Ok(())
}

fn read_file(path: &Path, documents: &mut Vec<Document>) -> Result<()> {
    let shown = path.display().to_string();
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(|e| Error::plain(format!("open {shown}: {e}")))?;
    file.take(MANIFEST_BYTES_MAX)
        .read_to_string(&mut text)
        .map_err(|e| Error::plain(format!("read {shown}: {e}")))?;
    documents.extend(parse(&text, &shown)?);
    Ok(())
}

/// Takes a text apart into objects.
pub fn parse(text: &str, source: &str) -> Result<Vec<Document>> {
    let mut documents = Vec::new();
    for document in serde_yaml_ng::Deserializer::from_str(text) {
        let value = Value::deserialize(document).map_err(|e| {
            Error::plain(format!("error parsing {source}: error converting YAML to JSON: {e}"))
        })?;
        push(value, source, &mut documents)?;
    }
    Ok(documents)
}

fn push(mut value: Value, source: &str, documents: &mut Vec<Document>) -> Result<()> {
    if value.is_null() {
        return Ok(());
    }
    let missing = |what: &str| {
        Error::plain(format!(
            "error validating {source:?}: error validating data: {what} not set; if you choose to ignore these errors, turn validation off with --validate=false"
        ))
    };
    if !value.is_object() {
        return Err(Error::plain(format!(
            "error parsing {source}: a manifest must be an object, found {value}"
        )));
    }
    if value.str_at("kind").ends_with("List") && value.get("items").is_some_and(Value::is_array) {
        let Value::Array(items) = value["items"].take() else { return Ok(()) };
        return items.into_iter().try_for_each(|item| push(item, source, documents));
    }
    match (value.str_at("apiVersion"), value.str_at("kind")) {
        ("", "") => Err(missing("apiVersion and kind")),
        ("", _) => Err(missing("apiVersion")),
        (_, "") => Err(missing("kind")),
        _ => {
            documents.push(Document { source: source.to_owned(), object: value });
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_lists_and_json_come_apart() {
        let text = "---\n# nothing\n---\napiVersion: v1\nkind: Pod\nmetadata: {name: a}\n---\napiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Pod, metadata: {name: b}}\n- {apiVersion: v1, kind: Pod, metadata: {name: c}}\n";
        let names: Vec<String> =
            parse(text, "x").expect("parses").iter().map(|d| d.object.name().to_owned()).collect();
        assert_eq!(names, ["a", "b", "c"]);
        let json = r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"d"}}"#;
        assert_eq!(parse(json, "x").expect("parses").len(), 1);
    }

    #[test]
    fn what_is_no_object_is_refused() {
        assert!(parse("a: [", "x.yaml").expect_err("broken").to_string().contains("error parsing x.yaml"));
        assert!(
            parse("kind: Pod\n", "x").expect_err("no version").to_string().contains("apiVersion not set")
        );
        assert!(parse("- a\n", "x").expect_err("a list").to_string().contains("must be an object"));
    }
}
