//! Writes images as OCI layouts in a tar file, which every container engine loads. The same tree gives the
//! same bytes: paths sorted, times at the epoch, owners as told.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use flate2::{Compression, GzBuilder};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

/// Directories that are links into `/usr`.
pub const USR_MERGED: [&str; 4] = ["bin", "lib", "lib64", "sbin"];
const EPOCH: &str = "1970-01-01T00:00:00Z";

/// An image to be written.
pub struct Image {
    /// Full names, each a tag of the same image.
    pub names: Vec<String>,
    pub tree: Tree,
    /// The `config` object of the image's configuration.
    pub config: Value,
}

/// A root file system, by path without leading slash.
#[derive(Default)]
pub struct Tree(BTreeMap<String, Node>);

enum Node {
    Directory { mode: u32, owner: u64 },
    File { source: Source, mode: u32 },
    Link { target: String },
}

enum Source {
    Path(PathBuf),
    Bytes(Vec<u8>),
}

impl Tree {
    /// A tree without files.
    pub fn new() -> Tree {
        Tree::default()
    }

    /// What is below `root`, all of it owned by root.
    pub fn read(root: &Path) -> Result<Tree> {
        let mut tree = Tree::new();
        let mut open = vec![root.to_owned()];
        while let Some(dir) = open.pop() {
            for entry in fs::read_dir(&dir).with_context(|| format!("read {}", dir.display()))? {
                let path = entry?.path();
                let name = path.strip_prefix(root).expect("found below root");
                let name = name.to_str().with_context(|| format!("{name:?} is not UTF-8"))?;
                let data = path.symlink_metadata()?;
                let mode = data.permissions().mode() & 0o7777;
                if data.is_dir() {
                    if !USR_MERGED.contains(&name) {
                        tree.directory(name, mode, 0);
                    }
                    open.push(path);
                } else if data.is_symlink() {
                    let target = fs::read_link(&path)?;
                    tree.link(name, target.to_str().with_context(|| format!("{target:?} is not UTF-8"))?);
                } else if data.is_file() {
                    tree.file(name, &path, mode);
                } else {
                    bail!("{} is neither file, directory nor link", path.display());
                }
            }
        }
        Ok(tree)
    }

    /// Whether the path is taken.
    pub fn has(&self, path: &str) -> bool {
        self.0.contains_key(&merged(path))
    }

    /// Adds a directory.
    pub fn directory(&mut self, path: &str, mode: u32, owner: u64) {
        self.add(path, Node::Directory { mode, owner });
    }

    /// Adds a file with the content of one of this machine.
    pub fn file(&mut self, path: &str, source: &Path, mode: u32) {
        self.add(path, Node::File { source: Source::Path(source.to_owned()), mode });
    }

    /// Adds a file with this content.
    pub fn bytes(&mut self, path: &str, content: &[u8], mode: u32) {
        self.add(path, Node::File { source: Source::Bytes(content.to_vec()), mode });
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) {
        self.add(path, Node::Link { target: target.to_owned() });
    }

    fn add(&mut self, path: &str, node: Node) {
        let path = &merged(path);
        for (slash, _) in path.match_indices('/') {
            let parent = path[..slash].to_owned();
            self.0.entry(parent).or_insert(Node::Directory { mode: 0o755, owner: 0 });
        }
        self.0.insert(path.to_owned(), node);
    }
}

/// Where a path lies when `/bin` and the like are links into `/usr`, as in every current Debian.
fn merged(path: &str) -> String {
    let in_usr =
        USR_MERGED.iter().any(|dir| path.strip_prefix(dir).is_some_and(|rest| rest.starts_with('/')));
    if in_usr { format!("usr/{path}") } else { path.to_owned() }
}

/// Writes the archive, replacing what is there at the end.
pub fn write(image: &Image, path: &Path) -> Result<()> {
    let (layer, plain_digest) = layer(&image.tree)?;
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let config = json!({
        "created": EPOCH, "architecture": architecture, "os": "linux", "config": image.config,
        "rootfs": { "type": "layers", "diff_ids": [plain_digest] },
        "history": [{ "created": EPOCH, "created_by": "cargo xtask images" }],
    });
    let config = serde_json::to_vec(&config)?;
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar+gzip", &layer)],
    });
    let manifest = serde_json::to_vec(&manifest)?;
    let entry = |name: &String| {
        let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
        let tag = name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
        entry["platform"] = json!({ "architecture": architecture, "os": "linux" });
        entry["annotations"] =
            json!({ "io.containerd.image.name": name, "org.opencontainers.image.ref.name": tag });
        entry
    };
    let index = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": image.names.iter().map(entry).collect::<Vec<_>>(),
    });
    let fresh = path.with_extension("new");
    let mut archive =
        Builder::new(File::create(&fresh).with_context(|| format!("write {}", fresh.display()))?);
    append(&mut archive, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    append(&mut archive, "index.json", &serde_json::to_vec(&index)?)?;
    for blob in [&manifest, &config, &layer] {
        append(&mut archive, &format!("blobs/sha256/{}", hex(&Sha256::digest(blob))), blob)?;
    }
    archive.into_inner()?.flush()?;
    fs::rename(&fresh, path).with_context(|| format!("write {}", path.display()))
}

/// The compressed layer, and the digest of what is in it.
fn layer(tree: &Tree) -> Result<(Vec<u8>, String)> {
    let mut plain = Builder::new(Vec::new());
    for (path, node) in &tree.0 {
        append_node(&mut plain, path, node).with_context(|| format!("add {path}"))?;
    }
    let plain = plain.into_inner()?;
    let mut packed = GzBuilder::new().mtime(0).write(Vec::new(), Compression::new(6));
    packed.write_all(&plain)?;
    Ok((packed.finish()?, digest(&plain)))
}

fn append_node(archive: &mut Builder<Vec<u8>>, path: &str, node: &Node) -> io::Result<()> {
    match node {
        Node::Directory { mode, owner } => {
            let mut header = header(EntryType::Directory, *mode, 0);
            header.set_uid(*owner);
            header.set_gid(*owner);
            archive.append_data(&mut header, format!("{path}/"), io::empty())
        }
        Node::Link { target } => archive.append_link(&mut header(EntryType::Symlink, 0o777, 0), path, target),
        Node::File { source, mode } => {
            let content = match source {
                Source::Path(path) => &fs::read(path)?,
                Source::Bytes(bytes) => bytes,
            };
            archive.append_data(
                &mut header(EntryType::Regular, *mode, content.len() as u64),
                path,
                &content[..],
            )
        }
    }
}

fn append(archive: &mut Builder<File>, path: &str, content: &[u8]) -> io::Result<()> {
    archive.append_data(&mut header(EntryType::Regular, 0o644, content.len() as u64), path, content)
}

fn header(kind: EntryType, mode: u32, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header
}

fn descriptor(media_type: &str, content: &[u8]) -> Value {
    json!({ "mediaType": media_type, "digest": digest(content), "size": content.len() })
}

fn digest(content: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(content)))
}

/// Bytes in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> Image {
        let mut tree = Tree::new();
        tree.bytes("etc/motd", b"hello", 0o644);
        tree.directory("data", 0o700, 999);
        tree.link("bin/sh", "busybox");
        Image {
            names: vec!["docker.io/library/x:1".into(), "docker.io/library/x:2".into()],
            tree,
            config: json!({}),
        }
    }

    #[test]
    fn the_same_image_gives_the_same_bytes_and_names_every_tag() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one.tar"), dir.path().join("two.tar"));
        write(&image(), &one).unwrap();
        write(&image(), &two).unwrap();
        let bytes = fs::read(&one).unwrap();
        assert_eq!(bytes, fs::read(&two).unwrap());
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.contains(r#""io.containerd.image.name":"docker.io/library/x:2""#));
    }

    #[test]
    fn parents_come_before_their_children() {
        let mut archive = Builder::new(Vec::new());
        for (path, node) in &image().tree.0 {
            append_node(&mut archive, path, node).unwrap();
        }
        let bytes = archive.into_inner().unwrap();
        let mut reader = tar::Archive::new(&bytes[..]);
        let paths: Vec<String> = reader
            .entries()
            .unwrap()
            .map(|e| e.unwrap().path().unwrap().to_str().unwrap().to_owned())
            .collect();
        assert_eq!(paths, ["data/", "etc/", "etc/motd", "usr/", "usr/bin/", "usr/bin/sh"]);
    }
}
