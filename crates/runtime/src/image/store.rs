//! What images are on this node. Layers are kept unpacked, one directory per diff id, shared by all images that have
//! them; compressed blobs are not kept, so an image costs its unpacked size once. Documents (manifest,
//! configuration) are kept by digest.
//!
//! ```text
//! images/records/<id>.json   one image: names, layers, size; written last, removed first
//! images/blobs/<digest>      manifests and configurations
//! images/layers/<diff id>/   fs: the files; facts.json: their size
//! images/tmp/                what is being unpacked; emptied at start
//! ```
//!
//! Everything appears by rename, so a crash leaves either the whole or nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use k8s_cri::v1;
use parking_lot::{Mutex, RwLock};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::layer::{self, Limits};
use super::manifest::Config;
use super::reference::{Reference, is_digest, is_hex256};
use crate::error::{Context, Error, Result};
use crate::spec::ImageDefaults;

/// One image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Digest of the configuration: what Kubernetes calls the image id.
    pub id: String,
    /// Complete names with tags.
    pub tags: BTreeSet<String>,
    /// Complete names with the digest of the manifest or index they were pulled by.
    pub digests: BTreeSet<String>,
    /// Diff ids, lowest first.
    pub layers: Vec<String>,
    /// Bytes unpacked.
    pub size: u64,
    /// Never collected as garbage.
    pub pinned: bool,
    pub defaults: ImageDefaults,
}

impl Image {
    pub fn to_cri(&self) -> v1::Image {
        let user = self.defaults.user.split(':').next().unwrap_or_default();
        let uid: Option<i64> = user.parse().ok();
        v1::Image {
            id: self.id.clone(),
            repo_tags: self.tags.iter().cloned().collect(),
            repo_digests: self.digests.iter().cloned().collect(),
            size: self.size,
            uid: uid.map(|value| v1::Int64Value { value }),
            username: if uid.is_none() { user.to_owned() } else { String::new() },
            spec: Some(v1::ImageSpec { image: self.id.clone(), ..Default::default() }),
            pinned: self.pinned,
        }
    }
}

/// Size of one unpacked layer.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct LayerFacts {
    bytes: u64,
    inodes: u64,
}

/// The images of this node. Cheap to clone.
#[derive(Clone)]
pub struct ImageStore {
    shared: Arc<Shared>,
}

struct Shared {
    dir: PathBuf,
    limits: Limits,
    images: RwLock<BTreeMap<String, Image>>,
    /// Layers somebody is working with, by diff id: not to be collected.
    leases: Mutex<HashMap<String, usize>>,
    next_temporary: std::sync::atomic::AtomicU64,
}

/// Keeps layers from being collected until dropped.
pub struct Lease {
    shared: Arc<Shared>,
    layers: Vec<String>,
}

impl Lease {
    /// Their diff ids.
    pub fn layers(&self) -> &[String] {
        &self.layers
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut leases = self.shared.leases.lock();
        for layer in &self.layers {
            if let Some(count) = leases.get_mut(layer) {
                *count -= 1;
                if *count == 0 {
                    leases.remove(layer);
                }
            }
        }
    }
}

impl ImageStore {
    /// Opens the store in `dir`, making it if needed. What a crash left unfinished is removed.
    pub fn open(dir: &Path, limits: Limits) -> Result<Self> {
        let _ = fs::remove_dir_all(dir.join("tmp"));
        for part in ["records", "blobs", "layers", "tmp"] {
            let part = dir.join(part);
            fs::create_dir_all(&part).step(|| format!("make {}", part.display()))?;
        }
        let mut images = BTreeMap::new();
        let records = dir.join("records");
        for entry in fs::read_dir(&records).step(|| format!("read {}", records.display()))? {
            let path = entry.step(|| format!("read {}", records.display()))?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                let _ = fs::remove_file(&path);
                continue;
            }
            let bytes = fs::read(&path).step(|| format!("read {}", path.display()))?;
            match serde_json::from_slice::<Image>(&bytes) {
                Ok(image) => {
                    images.insert(image.id.clone(), image);
                }
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "image record is damaged, left out")
                }
            }
        }
        let shared = Shared {
            dir: dir.to_owned(),
            limits,
            images: RwLock::new(images),
            leases: Mutex::default(),
            next_temporary: Default::default(),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    pub fn dir(&self) -> &Path {
        &self.shared.dir
    }

    pub fn list(&self) -> Vec<Image> {
        self.shared.images.read().values().cloned().collect()
    }

    /// Finds an image by what users and kubelet write: a name, a name with digest, an id with or without `sha256:`,
    /// or the beginning of an id.
    pub fn find(&self, text: &str) -> Option<Image> {
        let images = self.shared.images.read();
        if is_digest(text)
            && let Some(image) = images.get(text)
        {
            return Some(image.clone());
        }
        if is_hex256(text) {
            return images.get(&format!("sha256:{text}")).cloned();
        }
        if let Ok(reference) = text.parse::<Reference>() {
            let tagged = reference.tagged();
            let digested = reference.digest.as_ref().map(|digest| reference.with_digest(digest));
            let named = |image: &&Image| match (&digested, &tagged) {
                // With both, the digest decides.
                (Some(digested), _) => image.digests.contains(digested),
                (None, Some(tagged)) => image.tags.contains(tagged),
                (None, None) => false,
            };
            if let Some(image) = images.values().find(named) {
                return Some(image.clone());
            }
        }
        let prefix = text.strip_prefix("sha256:").unwrap_or(text);
        if prefix.len() < 4 || !prefix.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        let mut matching = images.values().filter(|image| image.id["sha256:".len()..].starts_with(prefix));
        match (matching.next(), matching.next()) {
            (Some(only), None) => Some(only.clone()),
            _ => None,
        }
    }

    /// Keeps `layers` from being collected while an image that needs them is being put together or used.
    pub fn lease(&self, layers: &[String]) -> Lease {
        let mut leases = self.shared.leases.lock();
        for layer in layers {
            *leases.entry(layer.clone()).or_default() += 1;
        }
        Lease { shared: self.shared.clone(), layers: layers.to_vec() }
    }

    /// The directory of an unpacked layer.
    pub fn layer_dir(&self, diff_id: &str) -> PathBuf {
        self.layer_home(diff_id).join("fs")
    }

    pub fn has_layer(&self, diff_id: &str) -> bool {
        self.layer_home(diff_id).exists()
    }

    fn layer_home(&self, diff_id: &str) -> PathBuf {
        self.shared.dir.join("layers").join(hex_part(diff_id))
    }

    /// Unpacks a layer from its stream, compressed by gzip, zstd or not at all. Checks the diff id and, if given,
    /// the digest of the stream. Nothing is left of a layer that fails.
    pub fn add_layer(&self, diff_id: &str, blob_digest: Option<&str>, stream: impl Read) -> Result<()> {
        let temporary = self.temporary("layer");
        let result = self.unpack_into(&temporary, diff_id, blob_digest, stream);
        if result.is_err() {
            let _ = fs::remove_dir_all(&temporary);
            return result;
        }
        let home = self.layer_home(diff_id);
        match fs::rename(&temporary, &home) {
            Ok(()) => Ok(()),
            Err(_) if home.exists() => {
                // Somebody else unpacked the same layer meanwhile.
                let _ = fs::remove_dir_all(&temporary);
                Ok(())
            }
            Err(error) => Err(error).step(|| format!("move layer to {}", home.display())),
        }
    }

    fn unpack_into(
        &self,
        temporary: &Path,
        diff_id: &str,
        blob_digest: Option<&str>,
        stream: impl Read,
    ) -> Result<()> {
        let files = temporary.join("fs");
        fs::create_dir_all(&files).step(|| format!("make {}", files.display()))?;
        let mut compressed = Hashing::new(stream);
        let mut plain = Hashing::new(decompress(&mut compressed)?);
        let unpacked = layer::unpack(&mut plain, &files, self.shared.limits)?;
        // Padding after the archive's end belongs to the digests.
        let limit = self.shared.limits.bytes;
        drain(&mut plain, limit).step(|| "read to the end of the layer".into())?;
        let got = plain.digest();
        drop(plain);
        if got != diff_id {
            return Err(Error::invalid(format!(
                "layer does not match its diff id: expected {diff_id}, got {got}"
            )));
        }
        if let Some(expected) = blob_digest {
            drain(&mut compressed, limit).step(|| "read to the end of the layer".into())?;
            let got = compressed.digest();
            if got != expected {
                return Err(Error::invalid(format!(
                    "layer does not match its digest: expected {expected}, got {got}"
                )));
            }
        }
        let facts = LayerFacts { bytes: unpacked.bytes, inodes: unpacked.inodes };
        let path = temporary.join("facts.json");
        fs::write(&path, serde_json::to_vec(&facts).step(|| "encode layer facts".into())?)
            .step(|| format!("write {}", path.display()))
    }

    /// Records an image whose layers are here. `digest` is that of the manifest or index it was found by. Returns
    /// its id.
    pub fn commit(
        &self,
        names: &Names,
        config: &[u8],
        manifest: Option<&[u8]>,
        pinned: bool,
    ) -> Result<String> {
        let parsed = Config::parse(config)?;
        let id = digest_of(config);
        let mut size = config.len() as u64;
        for layer in &parsed.rootfs.diff_ids {
            if !self.has_layer(layer) {
                return Err(Error::internal(format!("layer {layer} of image {id} is missing")));
            }
            size += self.layer_facts(layer).bytes;
        }
        self.put_blob(config)?;
        if let Some(manifest) = manifest {
            self.put_blob(manifest)?;
        }
        // One flush for all: a record must not outlive a power failure that its layers did not.
        sync_file_system(&self.shared.dir)?;
        let mut images = self.shared.images.write();
        let mut image = images.get(&id).cloned().unwrap_or_else(|| Image {
            id: id.clone(),
            layers: parsed.rootfs.diff_ids.clone(),
            size,
            defaults: parsed.defaults(),
            ..Image::default()
        });
        image.tags.extend(names.tags.iter().cloned());
        image.digests.extend(names.digests.iter().cloned());
        image.pinned |= pinned;
        // A tag names one image: take it from whoever had it.
        let robbed: Vec<Image> = images
            .values()
            .filter(|other| other.id != id && names.tags.iter().any(|tag| other.tags.contains(tag)))
            .cloned()
            .collect();
        for mut other in robbed {
            other.tags.retain(|tag| !names.tags.contains(tag));
            self.write_record(&other)?;
            images.insert(other.id.clone(), other);
        }
        self.write_record(&image)?;
        images.insert(id.clone(), image);
        Ok(id)
    }

    /// Forgets the image that `text` names. By id, the whole image; by one of several names, that name only.
    /// Layers go with the next [`ImageStore::collect`]. Unknown images are a success.
    pub fn remove(&self, text: &str) -> Result<()> {
        let Some(image) = self.find(text) else { return Ok(()) };
        let mut images = self.shared.images.write();
        let Some(mut image) = images.get(&image.id).cloned() else { return Ok(()) };
        // The kubelet removes by id; a name that is also written like one is a name here.
        let by_name = text.parse::<Reference>().ok().filter(|_| !is_digest(text) && !is_hex256(text));
        if let Some(reference) = by_name {
            if let Some(digest) = &reference.digest {
                image.digests.remove(&reference.with_digest(digest));
            } else if let Some(tag) = reference.tagged() {
                image.tags.remove(&tag);
            }
            if !image.tags.is_empty() {
                self.write_record(&image)?;
                images.insert(image.id.clone(), image);
                return Ok(());
            }
        }
        let path = self.record_path(&image.id);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).step(|| format!("remove {}", path.display()));
            }
            _ => {}
        }
        images.remove(&image.id);
        Ok(())
    }

    /// Removes layers and documents that no image, no lease and none of `in_use` (diff ids of containers' layers)
    /// needs. Returns the bytes freed.
    pub fn collect(&self, in_use: &BTreeSet<String>) -> Result<u64> {
        let images = self.shared.images.read();
        let leases = self.shared.leases.lock();
        let mut keep_layers: BTreeSet<&str> = in_use.iter().map(|id| hex_part(id)).collect();
        let mut keep_blobs: BTreeSet<String> = BTreeSet::new();
        keep_layers.extend(leases.keys().map(|id| hex_part(id)));
        for image in images.values() {
            keep_layers.extend(image.layers.iter().map(|id| hex_part(id)));
            keep_blobs.insert(hex_part(&image.id).to_owned());
            let digests = image.digests.iter().filter_map(|name| name.split_once('@'));
            keep_blobs.extend(digests.map(|(_, digest)| hex_part(digest).to_owned()));
        }
        let mut freed = 0;
        let mut doomed = Vec::new();
        let layers = self.shared.dir.join("layers");
        for name in names_in(&layers)? {
            if keep_layers.contains(name.as_str()) {
                continue;
            }
            freed += self.layer_facts(&name).bytes;
            // Out of sight at once, while the locks are held; the slow removal comes after.
            let grave = self.temporary("removed");
            let from = layers.join(&name);
            fs::rename(&from, &grave).step(|| format!("move {} away", from.display()))?;
            doomed.push(grave);
        }
        if leases.is_empty() {
            for name in names_in(&self.shared.dir.join("blobs"))? {
                if !keep_blobs.contains(&name) {
                    let _ = fs::remove_file(self.shared.dir.join("blobs").join(&name));
                }
            }
        }
        drop(leases);
        drop(images);
        for grave in doomed {
            fs::remove_dir_all(&grave).step(|| format!("remove {}", grave.display()))?;
        }
        Ok(freed)
    }

    /// Marks an image as never to be collected.
    pub fn pin(&self, text: &str) -> Result<()> {
        let found = self.find(text).ok_or_else(|| Error::not_found(format!("no image {text:?}")))?;
        let mut images = self.shared.images.write();
        let Some(image) = images.get_mut(&found.id) else { return Ok(()) };
        image.pinned = true;
        self.write_record(image)
    }

    /// Bytes and inodes of all layers.
    pub fn usage(&self) -> (u64, u64) {
        let names = names_in(&self.shared.dir.join("layers")).unwrap_or_default();
        names
            .iter()
            .map(|name| self.layer_facts(name))
            .fold((0, 0), |(bytes, inodes), facts| (bytes + facts.bytes, inodes + facts.inodes))
    }

    /// A configuration or manifest by digest.
    pub fn blob(&self, digest: &str) -> Result<Vec<u8>> {
        let path = self.shared.dir.join("blobs").join(hex_part(digest));
        fs::read(&path).step(|| format!("read {}", path.display()))
    }

    /// A path for something unfinished, on the same file system, removed at the next start.
    pub fn temporary(&self, what: &str) -> PathBuf {
        let number = self.shared.next_temporary.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        self.shared.dir.join("tmp").join(format!("{what}-{}-{number}", std::process::id()))
    }

    pub fn limits(&self) -> Limits {
        self.shared.limits
    }

    fn layer_facts(&self, diff_id: &str) -> LayerFacts {
        let path = self.layer_home(diff_id).join("facts.json");
        fs::read(path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
    }

    fn put_blob(&self, bytes: &[u8]) -> Result<()> {
        let digest = digest_of(bytes);
        let path = self.shared.dir.join("blobs").join(hex_part(&digest));
        if path.exists() {
            return Ok(());
        }
        write_atomically(&path, bytes, &self.temporary("blob"))
    }

    fn write_record(&self, image: &Image) -> Result<()> {
        let bytes = serde_json::to_vec(image).step(|| "encode image record".into())?;
        write_atomically(&self.record_path(&image.id), &bytes, &self.temporary("record"))
    }

    fn record_path(&self, id: &str) -> PathBuf {
        self.shared.dir.join("records").join(format!("{}.json", hex_part(id)))
    }
}

/// The names an image is to be found by.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names {
    pub tags: Vec<String>,
    pub digests: Vec<String>,
}

impl Names {
    /// Names for a reference whose manifest (or index) has `digest`.
    pub fn of(reference: &Reference, digest: Option<&str>) -> Self {
        Self {
            tags: reference.tagged().into_iter().collect(),
            digests: digest.map(|digest| reference.with_digest(digest)).into_iter().collect(),
        }
    }
}

/// `sha256:…` of bytes.
pub fn digest_of(bytes: &[u8]) -> String {
    hex_digest(Sha256::digest(bytes).as_slice())
}

fn hex_digest(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(71);
    text.push_str("sha256:");
    for byte in bytes {
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

fn hex_part(digest: &str) -> &str {
    digest.strip_prefix("sha256:").unwrap_or(digest)
}

/// Writes, flushes to disk, and renames into place.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8], temporary: &Path) -> Result<()> {
    let write = || -> io::Result<()> {
        let mut file = File::create(temporary)?;
        file.write_all(bytes)?;
        file.sync_data()?;
        fs::rename(temporary, path)
    };
    write().step(|| format!("write {}", path.display()))
}

fn sync_file_system(dir: &Path) -> Result<()> {
    let dir = File::open(dir).step(|| format!("open {}", dir.display()))?;
    // SAFETY: syncfs on a descriptor we own.
    match unsafe { libc::syncfs(dir.as_raw_fd()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()).step(|| "flush layers to disk".into()),
    }
}

fn names_in(dir: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(dir).step(|| format!("read {}", dir.display()))?;
    Ok(entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
}

/// Reads on to the end, at most `limit` bytes.
fn drain(reader: &mut impl Read, limit: u64) -> io::Result<()> {
    let read = io::copy(&mut reader.by_ref().take(limit), &mut io::sink())?;
    if read == limit {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {limit} bytes")));
    }
    Ok(())
}

/// Undoes gzip or zstd, told by the first bytes.
pub(super) fn decompress<'a>(mut stream: impl Read + 'a) -> Result<Box<dyn Read + 'a>> {
    let mut magic = [0u8; 4];
    let mut have = 0;
    while have < magic.len() {
        match stream.read(&mut magic[have..]).step(|| "read the layer".into())? {
            0 => break,
            count => have += count,
        }
    }
    let head = io::Cursor::new(magic[..have].to_vec());
    let whole = io::BufReader::with_capacity(64 << 10, head.chain(stream));
    match magic {
        [0x1f, 0x8b, ..] => Ok(Box::new(flate2::bufread::MultiGzDecoder::new(whole))),
        [0x28, 0xb5, 0x2f, 0xfd] => {
            let decoder = zstd::stream::read::Decoder::with_buffer(whole).step(|| "start zstd".into())?;
            Ok(Box::new(decoder))
        }
        _ => Ok(Box::new(whole)),
    }
}

/// Passes bytes on and remembers their digest.
pub(super) struct Hashing<R> {
    inner: R,
    hash: Sha256,
}

impl<R: Read> Hashing<R> {
    pub fn new(inner: R) -> Self {
        Self { inner, hash: Sha256::new() }
    }

    pub fn digest(&self) -> String {
        hex_digest(self.hash.clone().finalize().as_slice())
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hash.update(&buffer[..count]);
        Ok(count)
    }
}
