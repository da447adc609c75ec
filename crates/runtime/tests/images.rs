//! Image archives, good and hostile, and pulls from a registry on loopback. Unpacking sets owners and so needs
//! root; skips loudly without.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use knarr_runtime::Kind;
use knarr_runtime::cri::v1;
use knarr_runtime::image::Limits;
use knarr_runtime::image::archive::{self, Imported};
use knarr_runtime::image::build::{self, Entry};
use knarr_runtime::image::pull::{self, RegistryConfig};
use knarr_runtime::image::store::{ImageStore, digest_of};
use tar::EntryType;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt};

struct Fixture {
    dir: tempfile::TempDir,
    store: ImageStore,
}

fn fixture() -> Option<Fixture> {
    fixture_with(Limits::default())
}

fn fixture_with(limits: Limits) -> Option<Fixture> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: unpacking layers needs root");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(&dir.path().join("store"), limits).unwrap();
    Some(Fixture { dir, store })
}

impl Fixture {
    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn import(&self, bytes: &[u8]) -> knarr_runtime::Result<Vec<Imported>> {
        archive::import(&self.store, &self.file("archive.tar", bytes), None, false)
    }

    /// Imports an image of one layer; returns the layer's directory.
    fn layer(&self, tar: &[u8]) -> knarr_runtime::Result<PathBuf> {
        let imported = self.import(&docker_archive(&[tar], "layer:test"))?;
        let image = self.store.find(&imported[0].id).unwrap();
        Ok(self.store.layer_dir(&image.layers[0]))
    }

    fn assert_nothing_left(&self, case: &str) {
        let store = self.dir.path().join("store");
        for part in ["records", "layers", "tmp", "blobs"] {
            let left: Vec<_> = std::fs::read_dir(store.join(part)).unwrap().collect();
            assert!(left.is_empty(), "{case}: {left:?}");
        }
        let outside: Vec<_> = std::fs::read_dir(self.dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != "store" && name != "archive.tar")
            .collect();
        assert!(outside.is_empty(), "{case} wrote outside: {outside:?}");
    }
}

/// One raw tar entry: names and links are not checked here.
#[derive(Clone)]
struct Raw {
    name: String,
    kind: EntryType,
    link: String,
    content: Vec<u8>,
    mode: u32,
    uid: u64,
    device: (u32, u32),
    attribute: Option<(String, Vec<u8>)>,
}

fn raw(name: &str, kind: EntryType) -> Raw {
    Raw {
        name: name.into(),
        kind,
        link: String::new(),
        content: Vec::new(),
        mode: 0o644,
        uid: 0,
        device: (1, 3),
        attribute: None,
    }
}

fn file(name: &str, content: &str) -> Raw {
    Raw { content: content.as_bytes().to_vec(), ..raw(name, EntryType::Regular) }
}

fn link(name: &str, target: &str) -> Raw {
    Raw { link: target.into(), ..raw(name, EntryType::Symlink) }
}

fn hard_link(name: &str, target: &str) -> Raw {
    Raw { link: target.into(), ..raw(name, EntryType::Link) }
}

fn dir(name: &str) -> Raw {
    Raw { mode: 0o755, ..raw(name, EntryType::Directory) }
}

fn tar_of(entries: &[Raw]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for entry in entries {
        if let Some((name, value)) = &entry.attribute {
            let key = format!("SCHILY.xattr.{name}");
            builder.append_pax_extensions([(key.as_str(), value.as_slice())]).unwrap();
        }
        let mut header = tar::Header::new_gnu();
        let gnu = header.as_gnu_mut().unwrap();
        gnu.name[..entry.name.len()].copy_from_slice(entry.name.as_bytes());
        gnu.linkname[..entry.link.len()].copy_from_slice(entry.link.as_bytes());
        header.set_entry_type(entry.kind);
        header.set_size(entry.content.len() as u64);
        header.set_mode(entry.mode);
        header.set_uid(entry.uid);
        header.set_gid(0);
        header.set_mtime(1000);
        if matches!(entry.kind, EntryType::Char | EntryType::Block) {
            header.set_device_major(entry.device.0).unwrap();
            header.set_device_minor(entry.device.1).unwrap();
        }
        header.set_cksum();
        builder.append(&header, entry.content.as_slice()).unwrap();
    }
    builder.into_inner().unwrap()
}

/// What `docker save` writes.
fn docker_archive(layers: &[&[u8]], name: &str) -> Vec<u8> {
    let diff_ids: Vec<String> = layers.iter().map(|layer| digest_of(layer)).collect();
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux",
        "config": { "Cmd": ["sh"], "Env": null, "Entrypoint": null },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    })
    .to_string();
    let names: Vec<String> = (0..layers.len()).map(|index| format!("{index}/layer.tar")).collect();
    let manifest =
        serde_json::json!([{ "Config": "config.json", "RepoTags": [name], "Layers": names }]).to_string();
    let mut entries = Vec::new();
    for (layer, name) in layers.iter().zip(&names) {
        entries.push(Raw { content: layer.to_vec(), ..raw(name, EntryType::Regular) });
    }
    entries.push(file("config.json", &config));
    entries.push(file("manifest.json", &manifest));
    tar_of(&entries)
}

#[test]
fn hostile_layers_are_refused_and_leave_nothing() {
    let attribute = |name: &str| Raw { attribute: Some((name.into(), b"y".to_vec())), ..file("x", "x") };
    let cases: Vec<(&str, Vec<Raw>, &str)> = vec![
        ("parent path", vec![file("../evil", "x")], "leads out of the image"),
        ("parent path inside", vec![dir("a"), file("a/../../evil", "x")], "leads out of the image"),
        ("absolute path", vec![file("/evil", "x")], "absolute path"),
        ("climbing link", vec![link("out", "../../../../evil")], "leads out of the image"),
        ("climbing nested link", vec![dir("a"), link("a/out", "../../evil")], "leads out of the image"),
        ("hard link out", vec![hard_link("shadow", "../../../../etc/shadow")], "leads out of the image"),
        ("absolute hard link", vec![hard_link("shadow", "/etc/shadow")], "leads out of the image"),
        ("hard link to nothing", vec![hard_link("a", "nothing")], "its link target"),
        ("device", vec![raw("disk", EntryType::Block)], "only in /dev"),
        (
            "overlay's own mark",
            vec![dir("dev"), Raw { device: (0, 0), ..raw("dev/x", EntryType::Char) }],
            "overlayfs's own mark",
        ),
        ("overlay attribute", vec![attribute("trusted.overlay.redirect")], "not allowed in a layer"),
        ("whiteout of nothing", vec![file(".wh.", "")], "whiteout must name"),
        ("whiteout of the parent", vec![dir("a"), file("a/.wh...", "")], "whiteout must name"),
        ("impossible owner", vec![Raw { uid: 1 << 33, ..file("x", "") }], "impossible owner"),
        ("unknown type", vec![raw("x", EntryType::new(b'Z'))], "not allowed in a layer"),
    ];
    for (case, entries, want) in cases {
        let Some(fixture) = fixture() else { return };
        let error = fixture.layer(&tar_of(&entries)).unwrap_err();
        assert_eq!(error.kind, Kind::InvalidArgument, "{case}: {error}");
        assert!(error.message.contains(want), "{case}: {error}");
        fixture.assert_nothing_left(case);
    }
}

#[test]
fn links_inside_a_layer_are_followed_inside_only() {
    let Some(fixture) = fixture() else { return };
    let secret = fixture.dir.path().join("outside");
    std::fs::create_dir(&secret).unwrap();
    let error = fixture
        .layer(&tar_of(&[link("absolute", secret.to_str().unwrap()), file("absolute/planted", "x")]))
        .unwrap_err();
    assert!(
        error.message.contains("its directory cannot be made"),
        "the target is not in the image: {error}"
    );
    assert!(std::fs::read_dir(&secret).unwrap().next().is_none(), "nothing is written outside");
    let layer = fixture
        .layer(&tar_of(&[
            dir("srv"),
            link("absolute", "/srv"),
            file("absolute/planted", "inside"),
            dir("usr"),
            link("bin", "usr"),
            file("bin/tool", "tool"),
        ]))
        .unwrap();
    assert_eq!(std::fs::read_to_string(layer.join("srv/planted")).unwrap(), "inside");
    assert_eq!(std::fs::read_to_string(layer.join("usr/tool")).unwrap(), "tool");
}

#[test]
fn limits_hold_for_bytes_and_entries() {
    let limits = Limits { bytes: 10_000, entries: 5 };
    let Some(fixture) = fixture_with(limits) else { return };
    let many: Vec<Raw> = (0..6).map(|index| file(&format!("f{index}"), "")).collect();
    let error = fixture.layer(&tar_of(&many)).unwrap_err();
    assert!(error.message.contains("more than 5 entries"), "{error}");
    let error = fixture.layer(&tar_of(&[file("big", &"x".repeat(10_001))])).unwrap_err();
    assert!(error.message.contains("more than 10000 bytes"), "{error}");
    fixture.assert_nothing_left("limits");
}

#[test]
fn layers_become_what_overlayfs_reads() {
    let Some(fixture) = fixture() else { return };
    let capability = vec![1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let layer = fixture
        .layer(&tar_of(&[
            Raw { mode: 0o4755, uid: 7, ..file("su", "x") },
            Raw { attribute: Some(("security.capability".into(), capability)), ..file("ping", "x") },
            hard_link("su2", "su"),
            dir("dev"),
            raw("dev/null", EntryType::Char),
            dir("etc"),
            file("etc/.wh.gone", ""),
            dir("opaque"),
            file("opaque/.wh..wh..opq", ""),
            file("late/file", "parents are made"),
            file(".wh.su", ""),
            file("twice", "first"),
            file("twice", "second"),
        ]))
        .unwrap();
    let data = |name: &str| std::fs::symlink_metadata(layer.join(name)).unwrap();
    assert_eq!(
        (data("su").permissions().mode() & 0o7777, data("su").uid(), data("su").mtime()),
        (0o4755, 7, 1000)
    );
    assert_eq!(data("su").ino(), data("su2").ino());
    assert!(data("dev/null").file_type().is_char_device());
    let whiteout = data("etc/gone");
    assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
    assert!(data("su").is_file(), "a whiteout does not hide what its own layer brings");
    assert_eq!(std::fs::read_to_string(layer.join("twice")).unwrap(), "second");
    assert_eq!(std::fs::read_to_string(layer.join("late/file")).unwrap(), "parents are made");
}

#[test]
fn damaged_archives_are_refused_and_leave_nothing() {
    let good_layer = tar_of(&[file("x", "x")]);
    let good = docker_archive(&[&good_layer], "a:b");
    let wrong_layer = {
        let text = String::from_utf8_lossy(&good).into_owned();
        let digest = digest_of(&good_layer);
        let bad = digest.replace(&digest[70..], if digest.ends_with('0') { "1" } else { "0" });
        text.replace(&digest, &bad).into_bytes()
    };
    let missing_layer = tar_of(&[
        file("config.json", r#"{"rootfs":{"type":"layers","diff_ids":[]}}"#),
        file("manifest.json", r#"[{"Config":"config.json","RepoTags":["a:b"],"Layers":["0/layer.tar"]}]"#),
    ]);
    let bad_name = tar_of(&[
        file("config.json", r#"{"rootfs":{"type":"layers","diff_ids":[]}}"#),
        file("manifest.json", r#"[{"Config":"config.json","RepoTags":["../x"],"Layers":[]}]"#),
    ]);
    let climbing = tar_of(&[file("../manifest.json", "[]")]);
    let oci_mismatch = tar_of(&[
        file(
            "index.json",
            &format!(
                r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"m","digest":"{}","size":1}}]}}"#,
                digest_of(b"y")
            ),
        ),
        file(&format!("blobs/{}", digest_of(b"y").replace(':', "/")), "z"),
    ]);
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty", Vec::new(), "neither index.json"),
        ("text", b"hello world, I am not an archive".repeat(40), "not a valid tar archive"),
        ("truncated", good[..700].to_vec(), ""),
        ("no manifest", tar_of(&[file("x", "x")]), "neither index.json"),
        ("wrong layer", wrong_layer, "does not match its diff id"),
        ("missing layer", missing_layer, "the configuration names 0 layers, the manifest 1"),
        ("bad name", bad_name, "invalid reference format"),
        ("climbing", climbing, "leads out of the archive"),
        ("oci mismatch", oci_mismatch, "does not match its digest"),
        ("bad gzip", [0x1f, 0x8b, 8, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9].to_vec(), "decompress"),
    ];
    for (case, bytes, want) in cases {
        let Some(fixture) = fixture() else { return };
        let error = fixture.import(&bytes).unwrap_err();
        assert!(error.message.contains(want), "{case}: {error}");
        fixture.assert_nothing_left(case);
    }
}

#[test]
fn archives_come_plain_and_compressed_and_share_layers() {
    let Some(fixture) = fixture() else { return };
    let (base, top) = (tar_of(&[file("base", "base")]), tar_of(&[file("top", "top")]));
    let zipped_top = zstd::encode_all(top.as_slice(), 3).unwrap();
    let one = docker_archive(&[&base], "one:v1");
    let two = docker_archive(&[&base, &top], "two:v1");
    let imported = fixture.import(&one).unwrap();
    assert_eq!(imported[0].tags, ["docker.io/library/one:v1"]);
    let zipped = zstd::encode_all(two.as_slice(), 3).unwrap();
    fixture.import(&zipped).unwrap();
    drop(zipped_top);
    let (one, two) = (fixture.store.find("one:v1").unwrap(), fixture.store.find("two:v1").unwrap());
    assert_eq!(one.layers[0], two.layers[0]);
    for text in ["docker.io/library/two:v1", &two.id, &two.id[7..], &two.id[7..19]] {
        assert_eq!(fixture.store.find(text).unwrap().id, two.id, "{text}");
    }
    assert!(fixture.store.find("two").is_none(), "latest is another tag");

    fixture.store.remove("two:v1").unwrap();
    fixture.store.remove("two:v1").unwrap();
    let in_use = BTreeSet::from([two.layers[1].clone()]);
    fixture.store.collect(&in_use).unwrap();
    assert!(fixture.store.has_layer(&two.layers[1]), "a container still needs it");
    let lease = fixture.store.lease(&two.layers);
    fixture.store.collect(&BTreeSet::new()).unwrap();
    assert!(fixture.store.has_layer(&two.layers[1]), "leased");
    drop(lease);
    assert!(fixture.store.collect(&BTreeSet::new()).unwrap() > 0);
    assert!(!fixture.store.has_layer(&two.layers[1]) && fixture.store.has_layer(&one.layers[0]));

    let again = ImageStore::open(fixture.store.dir(), Limits::default()).unwrap();
    assert_eq!(again.list(), [one]);
}

#[test]
fn built_archives_are_deterministic_and_load() {
    let Some(fixture) = fixture() else { return };
    let image = build::Image {
        names: vec!["app:v1".into(), "registry.example/app:v1".into()],
        files: vec![
            Entry::bytes("/usr/bin/app", "binary", 0o755),
            Entry::symlink("/bin", "usr/bin"),
            Entry { uid: 5, ..Entry::directory("/data", 0o700) },
        ],
        entrypoint: vec!["/usr/bin/app".into()],
        env: vec!["A=b".into()],
        user: "5".into(),
        working_dir: "/data".into(),
        exposed_ports: vec!["80/tcp".into()],
        stop_signal: "SIGQUIT".into(),
        ..Default::default()
    };
    for gzip in [false, true] {
        let (first, second) = (fixture.dir.path().join("first.tar"), fixture.dir.path().join("second.tar"));
        let id = build::write(&image, &first, gzip).unwrap();
        assert_eq!(build::write(&image, &second, gzip).unwrap(), id);
        assert_eq!(std::fs::read(&first).unwrap(), std::fs::read(&second).unwrap());
        let imported = archive::import(&fixture.store, &first, None, true).unwrap();
        assert_eq!(
            imported,
            [Imported {
                id: id.clone(),
                tags: vec!["docker.io/library/app:v1".into(), "registry.example/app:v1".into()]
            }]
        );
        let found = fixture.store.find("registry.example/app:v1").unwrap();
        assert!(found.pinned);
        assert_eq!(found.defaults.entrypoint, ["/usr/bin/app"]);
        assert_eq!((found.defaults.user.as_str(), found.defaults.stop_signal.as_str()), ("5", "SIGQUIT"));
        let layer = fixture.store.layer_dir(&found.layers[0]);
        assert_eq!(std::fs::read_to_string(layer.join("bin/app")).unwrap(), "binary");
        assert_eq!(std::fs::metadata(layer.join("data")).unwrap().uid(), 5);
    }
    let bad = build::Image { files: vec![Entry::bytes("/a/../b", "", 0o644)], ..Default::default() };
    assert!(build::write(&bad, &fixture.dir.path().join("bad.tar"), false).is_err());
    assert!(!fixture.dir.path().join("bad.tar").exists());
}

/// A registry on loopback that serves what it is given, asking for a password if it has one.
struct Registry {
    address: String,
    layer_reads: Arc<AtomicUsize>,
}

async fn registry(
    documents: BTreeMap<String, (String, Vec<u8>)>,
    password: Option<&'static str>,
) -> Registry {
    use base64::Engine;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let layer_reads = Arc::new(AtomicUsize::new(0));
    let (documents, reads) = (Arc::new(documents), layer_reads.clone());
    let wanted = password.map(|password| {
        format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("user:{password}")))
    });
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (documents, reads, wanted) = (documents.clone(), reads.clone(), wanted.clone());
            tokio::spawn(async move {
                let mut stream = tokio::io::BufReader::new(stream);
                loop {
                    let (mut path, mut authorized) = (None, wanted.is_none());
                    let mut line = String::new();
                    while stream.read_line(&mut line).await.unwrap_or(0) > 2 {
                        if path.is_none() {
                            // Mirrors are told whom they stand for by a query.
                            path = line.split([' ', '?']).nth(1).map(str::to_owned);
                        }
                        if let Some((name, value)) = line.trim().split_once(": ")
                            && name.eq_ignore_ascii_case("authorization")
                        {
                            authorized |= wanted.as_deref() == Some(value);
                        }
                        line.clear();
                    }
                    let Some(path) = path else { return };
                    if path.contains("/blobs/") {
                        reads.fetch_add(1, Ordering::Relaxed);
                    }
                    let (status, kind, body) = match documents.get(&path) {
                        _ if !authorized => {
                            ("401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"x\"", "", &[][..])
                        }
                        _ if path == "/v2/" => ("200 OK", "", &[][..]),
                        Some((kind, body)) => ("200 OK", kind.as_str(), body.as_slice()),
                        None => ("404 Not Found", "", &[][..]),
                    };
                    let kind = if kind.is_empty() { "application/json" } else { kind };
                    let head = format!(
                        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n",
                        body.len()
                    );
                    let _ = stream.get_mut().write_all(head.as_bytes()).await;
                    let _ = stream.get_mut().write_all(body).await;
                }
            });
        }
    });
    Registry { address, layer_reads }
}

/// What a registry serves for one image of two platforms: by path, with media type.
fn served(name: &str, tag: &str) -> BTreeMap<String, (String, Vec<u8>)> {
    let layer = tar_of(&[file("pulled", "yes")]);
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut encoder, &layer).unwrap();
    let blob = encoder.finish().unwrap();
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "config": { "Cmd": ["sh"] },
        "rootfs": { "type": "layers", "diff_ids": [digest_of(&layer)] },
    })
    .to_string();
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": { "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": digest_of(config.as_bytes()), "size": config.len() },
        "layers": [{ "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
            "digest": digest_of(&blob), "size": blob.len() }],
    })
    .to_string();
    let entry = |architecture: &str, digest: String| {
        serde_json::json!({ "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest,
            "size": manifest.len(), "platform": { "os": "linux", "architecture": architecture } })
    };
    let host = knarr_runtime::image::manifest::host_architecture();
    let index = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [entry("s390x", digest_of(b"other")), entry(host, digest_of(manifest.as_bytes()))],
    })
    .to_string();
    let manifest_kind = "application/vnd.oci.image.manifest.v1+json";
    let index_kind = "application/vnd.oci.image.index.v1+json";
    let at = |kind: &str, what: &str| format!("/v2/{name}/{kind}/{what}");
    BTreeMap::from([
        (at("manifests", tag), (index_kind.to_owned(), index.clone().into_bytes())),
        (at("manifests", &digest_of(index.as_bytes())), (index_kind.to_owned(), index.into_bytes())),
        (
            at("manifests", &digest_of(manifest.as_bytes())),
            (manifest_kind.to_owned(), manifest.clone().into_bytes()),
        ),
        (
            at("blobs", &digest_of(config.as_bytes())),
            ("application/octet-stream".to_owned(), config.into_bytes()),
        ),
        (at("blobs", &digest_of(&blob)), ("application/octet-stream".to_owned(), blob)),
    ])
}

#[tokio::test]
async fn images_are_pulled_by_tag_digest_and_mirror() {
    let Some(fixture) = fixture() else { return };
    let config = RegistryConfig::default();
    let registry_ = registry(served("team/app", "v1"), Some("secret")).await;
    let name = format!("{}/team/app", registry_.address);
    let reference = format!("{name}:v1").parse().unwrap();
    let error = pull::pull(&fixture.store, &config, &reference, None).await.unwrap_err();
    assert_eq!(error.kind, Kind::Unauthorized, "{error}");
    let auth = v1::AuthConfig { username: "user".into(), password: "secret".into(), ..Default::default() };
    let id = pull::pull(&fixture.store, &config, &reference, Some(&auth)).await.unwrap();
    let image = fixture.store.find(&format!("{name}:v1")).unwrap();
    assert_eq!(image.id, id);
    let layer = fixture.store.layer_dir(&image.layers[0]);
    assert_eq!(std::fs::read_to_string(layer.join("pulled")).unwrap(), "yes");

    let before = registry_.layer_reads.load(Ordering::Relaxed);
    let digest = image.digests.first().unwrap().clone();
    pull::pull(&fixture.store, &config, &digest.parse().unwrap(), Some(&auth)).await.unwrap();
    assert_eq!(registry_.layer_reads.load(Ordering::Relaxed), before, "nothing is fetched twice");

    let missing = format!("{name}:nope").parse().unwrap();
    let error = pull::pull(&fixture.store, &config, &missing, Some(&auth)).await.unwrap_err();
    assert_eq!(error.kind, Kind::NotFound, "{error}");

    let mirror = registry(served("library/app", "v2"), None).await;
    let config = RegistryConfig {
        mirrors: BTreeMap::from([("docker.io".to_owned(), vec![mirror.address.clone()])]),
        ..Default::default()
    };
    pull::pull(&fixture.store, &config, &"app:v2".parse().unwrap(), None).await.unwrap();
    assert!(fixture.store.find("docker.io/library/app:v2").is_some());
}

#[tokio::test]
async fn what_a_registry_serves_must_match_its_digests() {
    for part in ["manifests/sha256", "blobs/"] {
        let Some(fixture) = fixture() else { return };
        let mut documents = served("app", "v1");
        for (path, (_, body)) in documents.iter_mut() {
            if path.contains(part) {
                body.push(b' ');
            }
        }
        let registry = registry(documents, None).await;
        let reference = format!("{}/app:v1", registry.address).parse().unwrap();
        pull::pull(&fixture.store, &RegistryConfig::default(), &reference, None).await.unwrap_err();
        fixture.assert_nothing_left(part);
    }
    let Some(fixture) = fixture() else { return };
    let nobody = "127.0.0.1:1/app:v1".parse().unwrap();
    let error = pull::pull(&fixture.store, &RegistryConfig::default(), &nobody, None).await.unwrap_err();
    assert_eq!(error.kind, Kind::Unavailable, "{error}");
}

#[test]
fn a_full_disk_leaves_nothing_half_done() {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    let Some(fixture) = fixture() else { return };
    let disk = fixture.dir.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    let options = Some("size=1m");
    mount(None::<&str>, &disk, Some("tmpfs"), MsFlags::empty(), options).unwrap();
    let big = docker_archive(&[&tar_of(&[file("big", &"x".repeat(3 << 20))])], "big:1");
    let archive = fixture.file("big.tar", &big);
    let store = ImageStore::open(&disk.join("store"), Limits::default()).unwrap();
    let error = archive::import(&store, &archive, None, false).unwrap_err();
    let free = || nix::sys::statvfs::statvfs(&disk).map(|stat| stat.blocks_available()).unwrap();
    let (left, free_after) = (store.list().len(), free());
    let small = docker_archive(&[&tar_of(&[file("small", "x")])], "small:1");
    let later = archive::import(&store, &fixture.file("small.tar", &small), None, false);
    drop(store);
    umount2(&disk, MntFlags::MNT_DETACH).unwrap();
    assert!(error.message.contains("No space left on device"), "{error}");
    assert_eq!(left, 0);
    assert!(free_after > 200, "what was written is gone: {free_after} blocks of 256 are free");
    later.expect("what fits is imported afterwards");
}
