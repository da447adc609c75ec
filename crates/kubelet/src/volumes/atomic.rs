//! Files that change all at once: they lie in a directory of their own, `..data` is a link to the present one, and
//! every visible name is a link through `..data`. Renaming the link swaps all files in one step, so a reader sees
//! the old set or the new one (`pkg/volume/util/atomic_writer.go`).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

const DATA: &str = "..data";
const DATA_NEW: &str = "..data_tmp";

/// One file of the payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    pub content: Vec<u8>,
    /// Permission bits.
    pub mode: u32,
    /// Its owner, where it is not root.
    pub owner: Option<u32>,
}

/// Paths below the volume (`a`, `dir/b`) and what is in them.
pub type Payload = BTreeMap<String, File>;

/// Makes the directory hold exactly the payload. Returns whether anything had to change.
pub fn write(dir: &Path, payload: &Payload, group: Option<u32>) -> Result<bool, String> {
    let failed = |step: &str, error: io::Error| format!("{step} in {}: {error}", dir.display());
    for path in payload.keys() {
        check_path(path)?;
    }
    fs::create_dir_all(dir).map_err(|error| failed("make directory", error))?;
    let present = fs::read_link(dir.join(DATA)).ok();
    let old_dir = present.as_ref().map(|name| dir.join(name));
    if old_dir.as_ref().is_some_and(|old| holds(old, payload, group)) {
        link_names(dir, payload).map_err(|error| failed("link names", error))?;
        return Ok(false);
    }
    let new_dir = fresh_dir(dir).map_err(|error| failed("make directory", error))?;
    write_files(&new_dir, payload, group).map_err(|error| failed("write files", error))?;
    let name = new_dir.file_name().expect("made by joining a name").to_owned();
    let link = dir.join(DATA_NEW);
    let _ = fs::remove_file(&link);
    symlink(&name, &link).map_err(|error| failed("link new files", error))?;
    fs::rename(&link, dir.join(DATA)).map_err(|error| failed("swap in new files", error))?;
    link_names(dir, payload).map_err(|error| failed("link names", error))?;
    remove_stale(dir, &name, payload).map_err(|error| failed("remove old files", error))?;
    Ok(true)
}

fn check_path(path: &str) -> Result<(), String> {
    let bad = path.is_empty()
        || path.starts_with('/')
        || path.starts_with("..")
        || path.split('/').any(|part| part == "..");
    if bad {
        Err(format!("invalid path {path:?}: must be relative and not contain or start with '..'"))
    } else {
        Ok(())
    }
}

/// Whether a directory holds exactly these files with these modes.
fn holds(dir: &Path, payload: &Payload, group: Option<u32>) -> bool {
    use std::os::unix::fs::MetadataExt;
    let mut found = BTreeSet::new();
    if list(dir, "", &mut found).is_err() || !found.iter().eq(payload.keys()) {
        return false;
    }
    payload.iter().all(|(path, file)| {
        let path = dir.join(path);
        let Ok(meta) = fs::metadata(&path) else { return false };
        meta.mode() & 0o7777 == file_mode(file, group)
            && meta.uid() == file.owner.unwrap_or(meta.uid())
            && fs::read(&path).is_ok_and(|content| content == file.content)
    })
}

fn list(dir: &Path, prefix: &str, found: &mut BTreeSet<String>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            list(&entry.path(), &format!("{name}/"), found)?;
        } else {
            found.insert(name);
        }
    }
    Ok(())
}

/// A new directory with the time as its name, as upstream has it.
fn fresh_dir(dir: &Path) -> io::Result<PathBuf> {
    loop {
        let stamp = jiff::Timestamp::now().strftime("%Y_%m_%d_%H_%M_%S").to_string();
        let path = dir.join(format!("..{stamp}.{:09}", rand::random_range(0..1_000_000_000u32)));
        match fs::create_dir(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            result => result?,
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        return Ok(path);
    }
}

/// With a group of its own, a volume's files can be read by that group.
fn file_mode(file: &File, group: Option<u32>) -> u32 {
    if group.is_some() { file.mode | 0o440 } else { file.mode }
}

fn write_files(dir: &Path, payload: &Payload, group: Option<u32>) -> io::Result<()> {
    for (path, file) in payload {
        let path = dir.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&path, &file.content)?;
        if file.owner.is_some() || group.is_some() {
            chown(&path, file.owner, group)?;
        }
        // After the owner: changing it drops some bits.
        fs::set_permissions(&path, fs::Permissions::from_mode(file_mode(file, group)))?;
    }
    Ok(())
}

fn top(path: &str) -> &str {
    path.split('/').next().unwrap_or(path)
}

fn link_names(dir: &Path, payload: &Payload) -> io::Result<()> {
    for name in payload.keys().map(|path| top(path)).collect::<BTreeSet<_>>() {
        match symlink(Path::new(DATA).join(name), dir.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn remove_stale(dir: &Path, present: &std::ffi::OsStr, payload: &Payload) -> io::Result<()> {
    let names: BTreeSet<&str> = payload.keys().map(|path| top(path)).collect();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let text = name.to_string_lossy();
        if name == present || text == DATA {
            continue;
        }
        if entry.file_type()?.is_dir() && text.starts_with("..") {
            fs::remove_dir_all(entry.path())?;
        } else if entry.file_type()?.is_symlink() && !names.contains(text.as_ref()) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(files: &[(&str, &str)]) -> Payload {
        let file = |content: &str| File { content: content.into(), mode: 0o644, owner: None };
        files.iter().map(|(path, content)| ((*path).to_owned(), file(content))).collect()
    }

    #[test]
    fn files_change_all_at_once_and_old_ones_go() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("v");
        assert!(write(&dir, &payload(&[("a", "1"), ("sub/b", "2")]), None).unwrap());
        assert_eq!(fs::read_to_string(dir.join("a")).unwrap(), "1");
        assert_eq!(fs::read_to_string(dir.join("sub/b")).unwrap(), "2");
        let first = fs::read_link(dir.join(DATA)).unwrap();
        assert!(!write(&dir, &payload(&[("a", "1"), ("sub/b", "2")]), None).unwrap(), "nothing changed");
        assert_eq!(fs::read_link(dir.join(DATA)).unwrap(), first);
        assert!(write(&dir, &payload(&[("a", "3")]), None).unwrap());
        assert_eq!(fs::read_to_string(dir.join("a")).unwrap(), "3");
        assert!(!dir.join("sub").exists() && !dir.join(first).exists());
        let names: BTreeSet<String> = fs::read_dir(&dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        assert_eq!(names.len(), 3, "the name, ..data and one directory: {names:?}");
    }

    #[test]
    fn paths_cannot_leave_the_volume() {
        let root = tempfile::tempdir().unwrap();
        for path in ["../x", "/x", "a/../../x", "..x", ""] {
            assert!(write(root.path(), &payload(&[(path, "")]), None).is_err(), "{path}");
        }
    }

    #[test]
    fn modes_are_kept_and_the_group_may_read() {
        let root = tempfile::tempdir().unwrap();
        let mut files = payload(&[("a", "1")]);
        files.get_mut("a").unwrap().mode = 0o400;
        write(root.path(), &files, None).unwrap();
        let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(root.path().join("a")), 0o400);
        assert_eq!(file_mode(&files["a"], Some(5)), 0o440);
    }
}
