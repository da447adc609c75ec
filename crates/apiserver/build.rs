//! Packs the descriptions of every type and field for `kubectl explain`.
//!
//! The texts are upstream's and are not copied into this repository: they are read from the sources of the
//! `k8s-openapi` crate, which the workspace depends on anyway, and embedded compressed (about 150 KB).
//! Reading 700 small files takes well under a second; compiling them a second time for the build (the
//! crate's `schemars` feature) would take minutes. See docs/decisions/descriptions-from-sources.md.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// The API level whose texts are taken; the workspace's `k8s-openapi` feature names the same.
const LEVEL: &str = "v1_36";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let mut texts = Vec::new();
    match sources() {
        Some(root) => {
            println!("cargo::rerun-if-changed={}", root.display());
            collect(&root, &mut texts);
        }
        None => {
            println!("cargo::warning=k8s-openapi's sources were not found: explain will show no descriptions")
        }
    }
    texts.sort();
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("descriptions.gz");
    let file = fs::File::create(out).expect("the build directory is writable");
    let mut packer = flate2::write::GzEncoder::new(file, flate2::Compression::best());
    packer.write_all(texts.concat().as_bytes()).expect("the build directory is writable");
    packer.finish().expect("the build directory is writable");
}

/// Where cargo keeps the crate's sources: registry, vendor directory or path, cargo knows.
fn sources() -> Option<PathBuf> {
    let cargo = env::var_os("CARGO")?;
    let manifest = env::var_os("CARGO_MANIFEST_DIR")?;
    let mut command = Command::new(cargo);
    command.args(["metadata", "--format-version", "1", "--offline", "--locked"]).current_dir(manifest);
    let output = command.output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // `"manifest_path":"/…/k8s-openapi-0.29.0/Cargo.toml"`: the one fact needed of the whole answer.
    text.split("\"manifest_path\":\"").skip(1).find_map(|rest| {
        let path = Path::new(rest.split('"').next()?);
        let folder = path.parent()?;
        let name = folder.file_name()?.to_str()?;
        let root = folder.join("src").join(LEVEL);
        (name.starts_with("k8s-openapi") && root.is_dir()).then_some(root)
    })
}

fn collect(folder: &Path, texts: &mut Vec<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            collect(&path, texts);
        } else if let Ok(source) = fs::read_to_string(&path) {
            texts.extend(definition(&source));
        }
    }
}

/// The definition's name and text, then a line for each field: name and text, separated by tabs.
///
/// The crate's code is generated, so its layout says what is what: descriptions of the type stand twelve
/// spaces in, names of fields sixteen, and their descriptions twenty.
fn definition(source: &str) -> Option<String> {
    let name = source.lines().find_map(|l| l.strip_prefix("// Generated from definition "))?;
    let schema = source.split("json_schema!({").nth(1)?;
    let (mut own, mut fields, mut field) = (String::new(), String::new(), None);
    for line in schema.lines() {
        let spaces = line.len() - line.trim_start().len();
        let content = line.trim_start();
        if spaces == 8 && content.starts_with("})") {
            break;
        }
        match spaces {
            12 if content.starts_with("\"description\": ") => {
                own = literal(content.strip_prefix("\"description\": ")?)?
            }
            16 if content.starts_with('"') => field = content[1..].split('"').next(),
            20 => {
                let inserted = "schema_obj.ensure_object().insert(\"description\".into(), ";
                let found =
                    content.strip_prefix("\"description\": ").or_else(|| content.strip_prefix(inserted));
                if let (Some(name), Some(text)) = (field, found.and_then(literal)) {
                    fields.push_str(&format!("\t{name}\t{text}\n"));
                }
            }
            _ => {}
        }
    }
    Some(format!("{}\t{own}\n{fields}", name.trim()))
}

/// The contents of a Rust string literal at the start of `text`; line breaks and tabs stay escaped.
fn literal(text: &str) -> Option<String> {
    let mut out = String::new();
    let mut rest = text.strip_prefix('"')?.chars();
    loop {
        match rest.next()? {
            '"' => return Some(out),
            '\\' => match rest.next()? {
                'u' => {
                    let code: String = rest.by_ref().skip(1).take_while(|c| *c != '}').collect();
                    out.push(char::from_u32(u32::from_str_radix(&code, 16).ok()?)?);
                }
                kept @ ('n' | 't' | '\\') => out.extend(['\\', kept]),
                other => out.push(other),
            },
            other => out.push(other),
        }
    }
}
