//! Kubeconfig files: the cluster's own, and the user's, into which a context is merged.
//!
//! The user's file is theirs: only entries of our name are added, replaced or removed, everything else
//! stays as it is, and the file keeps its owner.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use base64::Engine;
use knarr_api::object::Object;
use serde_json::{Value, json};

use crate::pki::Leaf;
use crate::settings::{Settings, write_private, write_unflushed};

/// Writes the administrator's kubeconfig into the data directory.
pub fn write_admin(settings: &Settings, authority: &str, leaf: &Leaf) -> Result<()> {
    let name = &settings.context;
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{ "name": name, "cluster": {
            "server": format!("https://127.0.0.1:{}", settings.port),
            "certificate-authority-data": encode(authority),
        } }],
        "users": [{ "name": format!("{name}-admin"), "user": {
            "client-certificate-data": encode(&leaf.certificate),
            "client-key-data": encode(&leaf.key),
        } }],
        "contexts": [{ "name": name, "context": { "cluster": name, "user": format!("{name}-admin") } }],
        "current-context": name,
    });
    // Not flushed: it is written at every start.
    write_unflushed(&settings.admin_kubeconfig(), serde_yaml_ng::to_string(&config)?.as_bytes())
}

fn encode(text: &str) -> String {
    base64::engine::general_purpose::STANDARD.encode(text)
}

/// The user's kubeconfig: of `$KUBECONFIG`, else `~/.kube/config` (of the user behind `sudo`).
pub fn user_path() -> Option<PathBuf> {
    if let Some(list) = std::env::var_os("KUBECONFIG").filter(|l| !l.is_empty()) {
        return of_list(&list);
    }
    let home = match std::env::var("SUDO_USER") {
        Ok(user) => nix::unistd::User::from_name(&user).ok().flatten().map(|u| u.dir),
        Err(_) => std::env::var_os("HOME").map(PathBuf::from),
    };
    home.map(|h| h.join(".kube/config"))
}

/// The file of a list that something new is written into, as kubectl chooses it: the first that exists, else the
/// last. Of files that name a current context, the first one counts, so ours does.
fn of_list(list: &std::ffi::OsStr) -> Option<PathBuf> {
    let paths: Vec<PathBuf> =
        std::env::split_paths(list).filter(|path| !path.as_os_str().is_empty()).collect();
    paths.iter().find(|path| path.exists()).or(paths.last()).cloned()
}

const LISTS: [&str; 3] = ["clusters", "users", "contexts"];

/// Merges the administrator's context into `path` and makes it the current one. True if the file changed.
pub fn merge(settings: &Settings, path: &Path) -> Result<bool> {
    let ours = read(&settings.admin_kubeconfig())?.context("the administrator's kubeconfig is missing")?;
    let theirs = read(path)?;
    let mut merged = theirs.clone().unwrap_or_else(|| json!({ "apiVersion": "v1", "kind": "Config" }));
    for list in LISTS {
        let mut entries = merged.list_at(list).to_vec();
        for entry in ours.list_at(list) {
            let name = entry.str_at("name");
            match entries.iter_mut().find(|e| e.str_at("name") == name) {
                Some(found) => *found = entry.clone(),
                None => entries.push(entry.clone()),
            }
        }
        merged[list] = Value::Array(entries);
    }
    merged["current-context"] = json!(settings.context);
    if theirs.as_ref() == Some(&merged) {
        return Ok(false);
    }
    write(path, &merged)?;
    Ok(true)
}

/// Takes our entries out of `path` again. True if there were any.
pub fn remove(settings: &Settings, path: &Path) -> Result<bool> {
    let Some(theirs) = read(path)? else { return Ok(false) };
    let (context, user) = (settings.context.clone(), format!("{}-admin", settings.context));
    let mut left = theirs.clone();
    for list in LISTS {
        let kept: Vec<Value> = theirs
            .list_at(list)
            .iter()
            .filter(|e| ![context.as_str(), user.as_str()].contains(&e.str_at("name")))
            .cloned()
            .collect();
        if left.get(list).is_some() {
            left[list] = Value::Array(kept);
        }
    }
    if left.str_at("current-context") == context {
        left["current-context"] = json!("");
    }
    if left == theirs {
        return Ok(false);
    }
    write(path, &left)?;
    Ok(true)
}

fn read(path: &Path) -> Result<Option<Value>> {
    match fs::read_to_string(path) {
        Ok(text) if text.trim().is_empty() => Ok(None),
        Ok(text) => serde_yaml_ng::from_str(&text)
            .map(Some)
            .with_context(|| format!("{} is no kubeconfig; move it away or set KUBECONFIG", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}

fn write(path: &Path, value: &Value) -> Result<()> {
    // A link stays one; what it leads to is replaced.
    let real = path.canonicalize();
    let path = real.as_deref().unwrap_or(path);
    let parent = path.parent().unwrap_or(Path::new("/"));
    let made = !parent.exists();
    fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))?;
    let owner = fs::metadata(path).or_else(|_| fs::metadata(parent.parent().unwrap_or(parent))).ok();
    write_private(path, serde_yaml_ng::to_string(value)?.as_bytes())?;
    if let Some(owner) = owner {
        // Under sudo, the file belongs to the user whose home it lies in.
        for path in [Some(path), made.then_some(parent)].into_iter().flatten() {
            chown(path, Some(owner.uid()), Some(owner.gid()))
                .with_context(|| format!("own {}", path.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const THEIRS: &str = "\
apiVersion: v1
kind: Config
preferences: {colors: true}
clusters: [{name: work, cluster: {server: 'https://work.example:6443', extensions: [{name: x}]}}]
users: [{name: me, user: {token: secret}}]
contexts: [{name: work, context: {cluster: work, user: me, namespace: team}}]
current-context: work
";

    /// A directory with the administrator's kubeconfig in it.
    fn made() -> (tempfile::TempDir, Settings) {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings { data_dir: dir.path().join("data"), ..Settings::default() };
        fs::create_dir(&settings.data_dir).unwrap();
        let leaf = Leaf { certificate: "certificate".into(), key: "key".into() };
        write_admin(&settings, "authority", &leaf).unwrap();
        (dir, settings)
    }

    #[test]
    fn a_merge_adds_our_context_and_removing_it_leaves_what_was() {
        let (dir, settings) = made();
        let path = dir.path().join("config");
        fs::write(&path, THEIRS).unwrap();
        assert!(merge(&settings, &path).unwrap());
        assert!(!merge(&settings, &path).unwrap(), "the second time nothing changes");
        let merged = read(&path).unwrap().unwrap();
        let names = |list: &str| -> Vec<String> {
            merged.list_at(list).iter().map(|entry| entry.str_at("name").to_owned()).collect()
        };
        assert_eq!(names("clusters"), ["work", "knarr"]);
        assert_eq!(names("contexts"), ["work", "knarr"]);
        assert_eq!(names("users"), ["me", "knarr-admin"]);
        assert_eq!(merged.str_at("current-context"), "knarr");
        let before: Value = serde_yaml_ng::from_str(THEIRS).unwrap();
        assert_eq!(
            (&merged["preferences"], &merged["clusters"][0]),
            (&before["preferences"], &before["clusters"][0])
        );
        assert!(remove(&settings, &path).unwrap());
        let mut left = read(&path).unwrap().unwrap();
        assert_eq!(left.str_at("current-context"), "");
        left["current-context"] = json!("work");
        assert_eq!(left, before);
        assert!(!remove(&settings, &path).unwrap());
    }

    #[test]
    fn of_several_files_the_first_that_exists_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let list = std::env::join_paths(["".into(), at("none"), at("second"), at("third")]).unwrap();
        assert_eq!(of_list(&list), Some(at("third")), "none exists: the last one is made");
        for name in ["second", "third"] {
            fs::write(at(name), THEIRS).unwrap();
        }
        assert_eq!(of_list(&list), Some(at("second")));
        assert_eq!(of_list(std::ffi::OsStr::new(":")), None);
    }

    #[test]
    fn links_stay_links_and_nonsense_is_left_alone() {
        let (dir, settings) = made();
        let (real, link) = (dir.path().join("real"), dir.path().join("link"));
        fs::write(&real, THEIRS).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        merge(&settings, &link).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert!(fs::read_to_string(&real).unwrap().contains("knarr-admin"));
        let nonsense = dir.path().join("nonsense");
        fs::write(&nonsense, "{[").unwrap();
        let error = merge(&settings, &nonsense).unwrap_err();
        assert!(error.to_string().contains("is no kubeconfig; move it away"), "{error}");
        assert_eq!(fs::read_to_string(&nonsense).unwrap(), "{[");
    }
}
