//! Making image archives: from a root file system or a list of files to an OCI layout in a tar file that this
//! runtime, containerd, docker and podman load. The same input gives the same bytes.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

use super::manifest::{self, Config, Descriptor, Index, Manifest, Platform, Process, Rootfs};
use super::reference::Reference;
use super::store::digest_of;
use crate::error::{Context, Error, Result};

/// What goes into an image.
#[derive(Debug, Clone, Default)]
pub struct Image {
    /// The name it gets, `busybox:1.35`; several for several tags.
    pub names: Vec<String>,
    pub files: Vec<Entry>,
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    pub env: Vec<String>,
    pub working_dir: String,
    /// `user`, `uid`, `user:group`.
    pub user: String,
    /// `80/tcp`.
    pub exposed_ports: Vec<String>,
    pub labels: BTreeMap<String, String>,
    pub stop_signal: String,
}

/// One file of the image. Paths are absolute in the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub path: String,
    pub kind: EntryKind,
    /// Permission bits; ignored for links.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    Directory,
    /// Content copied from a file of this machine.
    File(PathBuf),
    /// Content given here.
    Bytes(Vec<u8>),
    Symlink(String),
}

impl Entry {
    pub fn directory(path: &str, mode: u32) -> Self {
        Self { path: path.into(), kind: EntryKind::Directory, mode, uid: 0, gid: 0 }
    }

    pub fn file(path: &str, source: impl Into<PathBuf>, mode: u32) -> Self {
        Self { path: path.into(), kind: EntryKind::File(source.into()), mode, uid: 0, gid: 0 }
    }

    pub fn bytes(path: &str, content: impl Into<Vec<u8>>, mode: u32) -> Self {
        Self { path: path.into(), kind: EntryKind::Bytes(content.into()), mode, uid: 0, gid: 0 }
    }

    pub fn symlink(path: &str, target: &str) -> Self {
        Self { path: path.into(), kind: EntryKind::Symlink(target.into()), mode: 0o777, uid: 0, gid: 0 }
    }
}

/// Everything below `dir`, as entries with their owners and modes. Sockets are left out; device nodes refuse.
pub fn entries_of(dir: &Path) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    walk(dir, dir, &mut entries)?;
    Ok(entries)
}

fn walk(root: &Path, dir: &Path, out: &mut Vec<Entry>) -> Result<()> {
    let read = || format!("read {}", dir.display());
    let mut children: Vec<_> = fs::read_dir(dir).step(read)?.collect::<io::Result<_>>().step(read)?;
    children.sort_by_key(fs::DirEntry::file_name);
    for child in children {
        let path = child.path();
        let data = fs::symlink_metadata(&path).step(|| format!("read {}", path.display()))?;
        let inside = path.strip_prefix(root).expect("walked below root");
        let Some(inside) = inside.to_str() else {
            return Err(Error::invalid(format!("{inside:?} is not valid UTF-8")));
        };
        let kind = data.file_type();
        let entry = |kind| Entry {
            path: format!("/{inside}"),
            kind,
            mode: data.permissions().mode() & 0o7777,
            uid: data.uid(),
            gid: data.gid(),
        };
        if kind.is_dir() {
            out.push(entry(EntryKind::Directory));
            walk(root, &path, out)?;
        } else if kind.is_file() {
            out.push(entry(EntryKind::File(path.clone())));
        } else if kind.is_symlink() {
            let target = fs::read_link(&path).step(|| format!("read {}", path.display()))?;
            out.push(entry(EntryKind::Symlink(target.to_string_lossy().into_owned())));
        } else if !kind.is_socket() {
            return Err(Error::invalid(format!("{} is neither file, directory nor link", path.display())));
        }
    }
    Ok(())
}

/// Writes the archive to `path`, replacing what is there at the end. Returns the image's id.
///
/// With `gzip` the layer is compressed (smaller, slower to import).
pub fn write(image: &Image, path: &Path, gzip: bool) -> Result<String> {
    let temporary = path.with_extension("new");
    let result = write_to(image, &temporary, gzip);
    match &result {
        Ok(_) => fs::rename(&temporary, path).step(|| format!("move to {}", path.display()))?,
        Err(_) => drop(fs::remove_file(&temporary)),
    }
    result
}

fn write_to(image: &Image, path: &Path, gzip: bool) -> Result<String> {
    let layer_path = path.with_extension("layer");
    let layer = write_layer(&image.files, &layer_path, gzip);
    let result = layer.and_then(|layer| assemble(image, &layer, &layer_path, path));
    let _ = fs::remove_file(&layer_path);
    result
}

struct Layer {
    diff_id: String,
    digest: String,
    size: u64,
    media_type: String,
}

fn assemble(image: &Image, layer: &Layer, layer_path: &Path, path: &Path) -> Result<String> {
    let config = Config {
        architecture: manifest::host_architecture().into(),
        os: "linux".into(),
        config: process(image),
        rootfs: Rootfs { kind: "layers".into(), diff_ids: vec![layer.diff_id.clone()] },
        created: Some("1970-01-01T00:00:00Z".into()),
    };
    let encode = |what: &str| format!("encode {what}");
    let config = serde_json::to_vec(&config).step(|| encode("configuration"))?;
    let config_digest = digest_of(&config);
    let manifest = Manifest {
        schema_version: 2,
        media_type: manifest::OCI_MANIFEST.into(),
        config: descriptor(manifest::OCI_CONFIG, &config),
        layers: vec![Descriptor {
            media_type: layer.media_type.clone(),
            digest: layer.digest.clone(),
            size: layer.size,
            ..Descriptor::default()
        }],
    };
    let manifest = serde_json::to_vec(&manifest).step(|| encode("manifest"))?;
    let index = index(image, &manifest)?;
    let index = serde_json::to_vec(&index).step(|| encode("index"))?;

    let step = || format!("write {}", path.display());
    let mut tar = Builder::new(fs::File::create(path).step(step)?);
    add(&mut tar, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#).step(step)?;
    add(&mut tar, "index.json", &index).step(step)?;
    add(&mut tar, &blob_name(&digest_of(&manifest)), &manifest).step(step)?;
    add(&mut tar, &blob_name(&config_digest), &config).step(step)?;
    let mut header = header(EntryType::Regular, 0o644, layer.size);
    let file = fs::File::open(layer_path).step(|| format!("open {}", layer_path.display()))?;
    tar.append_data(&mut header, blob_name(&layer.digest), file).step(step)?;
    tar.into_inner().step(step)?.flush().step(step)?;
    Ok(config_digest)
}

fn process(image: &Image) -> Process {
    let list = |list: &Vec<String>| (!list.is_empty()).then(|| list.clone());
    let text = |text: &String| (!text.is_empty()).then(|| text.clone());
    let ports: BTreeMap<String, serde_json::Value> =
        image.exposed_ports.iter().map(|port| (port.clone(), serde_json::json!({}))).collect();
    Process {
        user: text(&image.user),
        exposed_ports: (!ports.is_empty()).then_some(ports),
        env: list(&image.env),
        entrypoint: list(&image.entrypoint),
        cmd: list(&image.cmd),
        working_dir: text(&image.working_dir),
        stop_signal: text(&image.stop_signal),
        labels: (!image.labels.is_empty()).then(|| image.labels.clone()),
        volumes: None,
    }
}

/// One entry per name, as `ctr` and `docker load` read them.
fn index(image: &Image, manifest: &[u8]) -> Result<Index> {
    let platform = Platform {
        architecture: manifest::host_architecture().into(),
        os: "linux".into(),
        variant: String::new(),
    };
    let base = Descriptor { platform: Some(platform), ..descriptor(manifest::OCI_MANIFEST, manifest) };
    let mut manifests = Vec::new();
    for name in &image.names {
        let reference: Reference = name.parse()?;
        let mut descriptor = base.clone();
        descriptor.annotations.insert(manifest::ANNOTATION_NAME.into(), reference.to_string());
        descriptor
            .annotations
            .insert(manifest::ANNOTATION_REF.into(), reference.tag.unwrap_or_else(|| "latest".into()));
        manifests.push(descriptor);
    }
    if manifests.is_empty() {
        manifests.push(base);
    }
    Ok(Index { schema_version: 2, media_type: manifest::OCI_INDEX.into(), manifests })
}

fn descriptor(media_type: &str, bytes: &[u8]) -> Descriptor {
    Descriptor {
        media_type: media_type.into(),
        digest: digest_of(bytes),
        size: bytes.len() as u64,
        ..Descriptor::default()
    }
}

fn blob_name(digest: &str) -> String {
    format!("blobs/{}", digest.replace(':', "/"))
}

fn write_layer(entries: &[Entry], path: &Path, gzip: bool) -> Result<Layer> {
    let step = || format!("write {}", path.display());
    let compressed = HashingWriter::new(fs::File::create(path).step(step)?);
    let (diff_id, compressed, media_type) = if gzip {
        let encoder = flate2::GzBuilder::new().mtime(0).write(compressed, flate2::Compression::new(6));
        let plain = write_entries(entries, HashingWriter::new(encoder))?;
        let (diff_id, encoder) = plain.finish();
        (diff_id, encoder.finish().step(step)?, format!("{}+gzip", manifest::OCI_LAYER))
    } else {
        let plain = write_entries(entries, HashingWriter::new(compressed))?;
        let (diff_id, compressed) = plain.finish();
        (diff_id, compressed, manifest::OCI_LAYER.to_owned())
    };
    let (digest, mut file) = compressed.finish();
    file.flush().step(step)?;
    let size = file.metadata().step(step)?.len();
    Ok(Layer { diff_id, digest, size, media_type })
}

/// Sorted by path, parents made where nobody listed them, times at the epoch.
fn write_entries<W: Write>(entries: &[Entry], out: W) -> Result<W> {
    let mut all: BTreeMap<&str, Entry> = BTreeMap::new();
    for entry in entries {
        let path = entry.path.trim_matches('/');
        if path.is_empty() || path.split('/').any(|part| matches!(part, "" | "." | "..")) {
            return Err(Error::invalid(format!("{:?} is not a path for an image", entry.path)));
        }
        let mut at = 0;
        while let Some(slash) = path[at..].find('/') {
            at += slash;
            all.entry(&path[..at]).or_insert_with(|| Entry::directory(&path[..at], 0o755));
            at += 1;
        }
        all.insert(path, entry.clone());
    }
    let mut tar = Builder::new(out);
    for (path, entry) in &all {
        write_entry(&mut tar, path, entry).step(|| format!("add {path} to the layer"))?;
    }
    tar.into_inner().step(|| "finish the layer".into())
}

fn write_entry<W: Write>(tar: &mut Builder<W>, path: &str, entry: &Entry) -> io::Result<()> {
    let owned = |kind, size| {
        let mut header = header(kind, entry.mode, size);
        header.set_uid(entry.uid.into());
        header.set_gid(entry.gid.into());
        header
    };
    match &entry.kind {
        EntryKind::Directory => {
            tar.append_data(&mut owned(EntryType::Directory, 0), format!("{path}/"), io::empty())
        }
        EntryKind::File(source) => {
            let file = fs::File::open(source)
                .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", source.display())))?;
            let size = file.metadata()?.len();
            // A file that grows meanwhile must not break the archive.
            tar.append_data(&mut owned(EntryType::Regular, size), path, file.take(size))
        }
        EntryKind::Bytes(content) => {
            tar.append_data(&mut owned(EntryType::Regular, content.len() as u64), path, content.as_slice())
        }
        EntryKind::Symlink(target) => tar.append_link(&mut owned(EntryType::Symlink, 0), path, target),
    }
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

fn add<W: Write>(tar: &mut Builder<W>, path: &str, content: &[u8]) -> io::Result<()> {
    tar.append_data(&mut header(EntryType::Regular, 0o644, content.len() as u64), path, content)
}

struct HashingWriter<W> {
    inner: W,
    hash: Sha256,
}

impl<W: Write> HashingWriter<W> {
    fn new(inner: W) -> Self {
        Self { inner, hash: Sha256::new() }
    }

    fn finish(self) -> (String, W) {
        let digest = self.hash.finalize();
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        (format!("sha256:{hex}"), self.inner)
    }
}

impl<W: Write> Write for HashingWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.hash.update(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
