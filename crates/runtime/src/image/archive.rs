//! Importing image archives: OCI layouts and what `docker save` writes, as a tar file, plain or compressed by gzip
//! or zstd. The archive is read in place; layers are unpacked straight from it, never copied.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use super::manifest::{self, Config, DOCUMENT_BYTES_MAX, Descriptor, Index, Manifest};
use super::reference::Reference;
use super::store::{ImageStore, Names, decompress, digest_of};
use crate::error::{Context, Error, Result};

/// Most entries in an archive: documents and layers, nothing else.
const ENTRIES_MAX: usize = 100_000;
/// How deep indexes may lie in indexes.
const INDEX_DEPTH_MAX: usize = 3;
/// Links followed for one file (old `docker save` links equal layers).
const LINKS_MAX: usize = 8;

/// An image that was imported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Imported {
    pub id: String,
    /// Complete names with tags.
    pub tags: Vec<String>,
}

/// Imports every image of the archive at `path` that fits this machine. With `name`, the (single) image gets
/// that name; otherwise the names in the archive. Blocking: call on a thread that may wait.
///
/// Images appear one by one, each whole. A bad archive fails with [`crate::Kind::InvalidArgument`].
pub fn import(store: &ImageStore, path: &Path, name: Option<&str>, pinned: bool) -> Result<Vec<Imported>> {
    let shown = path.display().to_string();
    let file = File::open(path).step(|| format!("open {shown}"))?;
    let spool = store.temporary("archive");
    let result = plain_file(store, file, &spool)
        .and_then(Contents::read)
        .and_then(|contents| contents.import(store, name, pinned))
        .step(|| format!("import {shown}"));
    let _ = std::fs::remove_file(&spool);
    result
}

/// The archive uncompressed, because layers are read out of order.
fn plain_file(store: &ImageStore, mut file: File, spool: &Path) -> Result<File> {
    let mut magic = [0u8; 4];
    let count = file.read(&mut magic).step(|| "read the archive".into())?;
    file.rewind().step(|| "rewind the archive".into())?;
    let compressed = matches!(magic, [0x1f, 0x8b, ..] | [0x28, 0xb5, 0x2f, 0xfd]);
    if count < 4 || !compressed {
        return Ok(file);
    }
    let mut plain = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(spool)
        .step(|| format!("make {}", spool.display()))?;
    let limit = store.limits().bytes;
    let copied = io::copy(&mut decompress(file)?.take(limit), &mut plain)
        .map_err(|error| Error::invalid(format!("decompress the archive: {error}")))?;
    if copied >= limit {
        return Err(Error::invalid(format!("archive decompresses to more than {limit} bytes")));
    }
    plain.rewind().step(|| "rewind the archive".into())?;
    Ok(plain)
}

/// Where each file of the archive lies.
struct Contents {
    file: File,
    files: HashMap<PathBuf, (u64, u64)>,
    links: HashMap<PathBuf, PathBuf>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerManifest {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

impl Contents {
    fn read(mut file: File) -> Result<Self> {
        let invalid = |error: io::Error| Error::invalid(format!("not a valid tar archive: {error}"));
        let (mut files, mut links) = (HashMap::new(), HashMap::new());
        let mut archive = tar::Archive::new(&mut file);
        for entry in archive.entries_with_seek().map_err(invalid)? {
            let entry = entry.map_err(invalid)?;
            let raw = entry.path().map_err(invalid)?;
            let path = inside(Path::new(""), &raw)
                .ok_or_else(|| Error::invalid(format!("archive entry {raw:?} leads out of the archive")))?;
            let kind = entry.header().entry_type();
            if kind.is_file() {
                files.insert(path, (entry.raw_file_position(), entry.size()));
            } else if kind.is_symlink() || kind.is_hard_link() {
                let target = entry.link_name().map_err(invalid)?.unwrap_or_default();
                let base = match kind.is_symlink() {
                    true => path.parent().unwrap_or(Path::new("")).to_owned(),
                    false => PathBuf::new(),
                };
                let target = inside(&base, &target).ok_or_else(|| {
                    Error::invalid(format!("archive link {path:?} leads out of the archive"))
                })?;
                links.insert(path, target);
            } else if !kind.is_dir() && !kind.is_pax_global_extensions() {
                return Err(Error::invalid(format!("archive entry {path:?} has type {kind:?}")));
            }
            if files.len() + links.len() > ENTRIES_MAX {
                return Err(Error::invalid(format!("archive has more than {ENTRIES_MAX} entries")));
            }
        }
        Ok(Self { file, files, links })
    }

    fn import(self, store: &ImageStore, name: Option<&str>, pinned: bool) -> Result<Vec<Imported>> {
        let docker: Vec<DockerManifest> = match self.find(Path::new("manifest.json")) {
            Some(_) => self.json(Path::new("manifest.json"))?,
            None => Vec::new(),
        };
        let imported = if self.find(Path::new("index.json")).is_some() {
            self.import_oci(store, name, pinned, &docker)?
        } else if !docker.is_empty() {
            docker
                .iter()
                .map(|image| self.import_docker(store, image, name, pinned))
                .collect::<Result<_>>()?
        } else {
            return Err(Error::invalid(
                "neither index.json (OCI layout) nor manifest.json (docker save) is in the archive",
            ));
        };
        if imported.is_empty() {
            return Err(Error::invalid("the archive holds no image"));
        }
        Ok(imported)
    }

    fn import_oci(
        &self,
        store: &ImageStore,
        name: Option<&str>,
        pinned: bool,
        docker: &[DockerManifest],
    ) -> Result<Vec<Imported>> {
        let index: Index = self.json(Path::new("index.json"))?;
        if name.is_some() && index.manifests.len() > 1 {
            return Err(Error::invalid("the archive holds several images, one name does not fit"));
        }
        // Several entries may name the same manifest by different tags.
        let mut imported: Vec<Imported> = Vec::new();
        for descriptor in &index.manifests {
            let (manifest, bytes) = self.manifest(descriptor, 0)?;
            let config_digest = &manifest.config.digest;
            let tags = match name {
                Some(name) => vec![name.to_owned()],
                None => named(descriptor, docker, config_digest),
            };
            let config = self.blob(&manifest.config)?;
            let diff_ids = check_layers(&config, manifest.layers.len())?;
            let _lease = store.lease(&diff_ids);
            for (layer, diff_id) in manifest.layers.iter().zip(&diff_ids) {
                if !store.has_layer(diff_id) {
                    let stream = self.open(&blob_path(&layer.digest)?)?;
                    store.add_layer(diff_id, Some(&layer.digest), stream)?;
                }
            }
            let names = names(&tags, Some(&descriptor.digest))?;
            let id = store.commit(&names, &config, Some(&bytes), pinned)?;
            match imported.iter_mut().find(|have| have.id == id) {
                Some(have) => have.tags.extend(names.tags),
                None => imported.push(Imported { id, tags: names.tags }),
            }
        }
        Ok(imported)
    }

    fn import_docker(
        &self,
        store: &ImageStore,
        image: &DockerManifest,
        name: Option<&str>,
        pinned: bool,
    ) -> Result<Imported> {
        let config = self.bytes(Path::new(&image.config))?;
        let diff_ids = check_layers(&config, image.layers.len())?;
        let _lease = store.lease(&diff_ids);
        for (layer, diff_id) in image.layers.iter().zip(&diff_ids) {
            if !store.has_layer(diff_id) {
                store.add_layer(diff_id, None, self.open(Path::new(layer))?)?;
            }
        }
        let tags = match name {
            Some(name) => vec![name.to_owned()],
            None => image.repo_tags.clone().unwrap_or_default(),
        };
        let names = names(&tags, None)?;
        let id = store.commit(&names, &config, None, pinned)?;
        Ok(Imported { id, tags: names.tags })
    }

    /// The manifest a descriptor leads to, through indexes of several platforms.
    fn manifest(&self, descriptor: &Descriptor, depth: usize) -> Result<(Manifest, Vec<u8>)> {
        let bytes = self.blob(descriptor)?;
        let value: serde_json::Value = serde_json::from_slice(&bytes)
            .map_err(|error| Error::invalid(format!("manifest {}: {error}", descriptor.digest)))?;
        let parse =
            |error: serde_json::Error| Error::invalid(format!("manifest {}: {error}", descriptor.digest));
        if value.get("manifests").is_none() {
            let manifest: Manifest = serde_json::from_value(value).map_err(parse)?;
            return Ok((manifest, bytes));
        }
        if depth >= INDEX_DEPTH_MAX {
            return Err(Error::invalid(format!("indexes lie more than {INDEX_DEPTH_MAX} deep")));
        }
        let index: Index = serde_json::from_value(value).map_err(parse)?;
        self.manifest(manifest::select(&index.manifests)?, depth + 1)
    }

    fn json<T: for<'a> Deserialize<'a>>(&self, path: &Path) -> Result<T> {
        serde_json::from_slice(&self.bytes(path)?)
            .map_err(|error| Error::invalid(format!("{}: {error}", path.display())))
    }

    /// A document by descriptor, its digest checked.
    fn blob(&self, descriptor: &Descriptor) -> Result<Vec<u8>> {
        let bytes = self.bytes(&blob_path(&descriptor.digest)?)?;
        let got = digest_of(&bytes);
        if got != descriptor.digest {
            return Err(Error::invalid(format!(
                "document does not match its digest: expected {}, got {got}",
                descriptor.digest
            )));
        }
        Ok(bytes)
    }

    fn bytes(&self, path: &Path) -> Result<Vec<u8>> {
        let mut stream = self.open(path)?;
        if stream.limit() > DOCUMENT_BYTES_MAX {
            return Err(Error::invalid(format!(
                "{} is larger than {DOCUMENT_BYTES_MAX} bytes",
                path.display()
            )));
        }
        let mut bytes = Vec::with_capacity(stream.limit() as usize);
        stream.read_to_end(&mut bytes).step(|| format!("read {}", path.display()))?;
        Ok(bytes)
    }

    fn open(&self, path: &Path) -> Result<io::Take<At<'_>>> {
        let (offset, len) = self
            .find(path)
            .ok_or_else(|| Error::invalid(format!("{} is missing from the archive", path.display())))?;
        Ok(At { file: &self.file, offset }.take(len))
    }

    fn find(&self, path: &Path) -> Option<(u64, u64)> {
        let mut path = inside(Path::new(""), path)?;
        for _ in 0..LINKS_MAX {
            match self.links.get(&path) {
                Some(target) => path = target.clone(),
                None => break,
            }
        }
        self.files.get(&path).copied()
    }
}

/// Reads a file from a position of its own.
struct At<'a> {
    file: &'a File,
    offset: u64,
}

impl Read for At<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut file = self.file;
        file.seek(SeekFrom::Start(self.offset))?;
        let count = file.read(buffer)?;
        self.offset += count as u64;
        Ok(count)
    }
}

/// Joins without leaving; `None` if it would.
fn inside(base: &Path, path: &Path) -> Option<PathBuf> {
    let mut out = base.to_owned();
    for part in path.components() {
        match part {
            Component::Normal(part) => out.push(part),
            Component::CurDir => {}
            Component::ParentDir => {
                if !out.pop() {
                    return None;
                }
            }
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(out)
}

fn blob_path(digest: &str) -> Result<PathBuf> {
    if !super::reference::is_digest(digest) {
        return Err(Error::invalid(format!("{digest:?} is not a sha256 digest")));
    }
    Ok(Path::new("blobs").join(digest.replace(':', "/")))
}

fn check_layers(config: &[u8], layers: usize) -> Result<Vec<String>> {
    let diff_ids = Config::parse(config)?.rootfs.diff_ids;
    if diff_ids.len() != layers {
        return Err(Error::invalid(format!(
            "the configuration names {} layers, the manifest {layers}",
            diff_ids.len()
        )));
    }
    Ok(diff_ids)
}

/// The names in an index entry, or those that `docker save` has for the same configuration.
fn named(descriptor: &Descriptor, docker: &[DockerManifest], config_digest: &str) -> Vec<String> {
    let annotation = |key| descriptor.annotations.get(key).cloned();
    if let Some(name) = annotation(manifest::ANNOTATION_NAME) {
        return vec![name];
    }
    let hex = config_digest.trim_start_matches("sha256:");
    let same = docker.iter().find(|image| image.config.contains(hex));
    if let Some(tags) = same.and_then(|image| image.repo_tags.clone()).filter(|tags| !tags.is_empty()) {
        return tags;
    }
    // By the specification this is only a tag; a whole name is what most tools put there.
    let whole = |name: &String| name.contains(['/', ':']);
    annotation(manifest::ANNOTATION_REF).filter(whole).into_iter().collect()
}

fn names(tags: &[String], digest: Option<&str>) -> Result<Names> {
    let mut names = Names::default();
    for tag in tags {
        let reference: Reference = tag.parse()?;
        let one = Names::of(&reference, digest);
        names.tags.extend(one.tags);
        names.digests.extend(one.digests);
    }
    Ok(names)
}
