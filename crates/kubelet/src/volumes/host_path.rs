//! `hostPath`: a path of the node, checked or made as its type says.

use super::{Context, Kind, Ready};
use async_trait::async_trait;
use k8s_openapi::api::core::v1::Volume;
use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

pub struct HostPath;

#[async_trait]
impl Kind for HostPath {
    fn name(&self) -> &'static str {
        "host-path"
    }

    fn is(&self, volume: &Volume) -> bool {
        volume.host_path.is_some()
    }

    async fn set_up(&self, volume: &Volume, _: &Context<'_>) -> Result<Ready, String> {
        let source = volume.host_path.clone().unwrap_or_default();
        let path = PathBuf::from(&source.path);
        check(&path, source.type_.as_deref().unwrap_or_default())?;
        Ok(Ready { path, read_only: false, ..Ready::default() })
    }
}

fn check(path: &Path, kind: &str) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("make {}: {error}", path.display());
    let found = fs::metadata(path).ok();
    let is = |test: fn(&fs::FileType) -> bool| found.as_ref().is_some_and(|meta| test(&meta.file_type()));
    let holds = match kind {
        // No check: the runtime makes a missing directory.
        "" => {
            if found.is_none() {
                fs::create_dir_all(path).map_err(failed)?;
            }
            true
        }
        "DirectoryOrCreate" if found.is_none() => {
            fs::create_dir_all(path).map_err(failed)?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).map_err(failed)?;
            true
        }
        "FileOrCreate" if found.is_none() => {
            fs::File::create_new(path).map_err(failed)?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o644)).map_err(failed)?;
            true
        }
        "Directory" | "DirectoryOrCreate" => is(fs::FileType::is_dir),
        "File" | "FileOrCreate" => is(fs::FileType::is_file),
        "Socket" => is(FileTypeExt::is_socket),
        "CharDevice" => is(FileTypeExt::is_char_device),
        "BlockDevice" => is(FileTypeExt::is_block_device),
        other => return Err(format!("unknown hostPath type {other:?}")),
    };
    let what = match kind {
        "Directory" | "DirectoryOrCreate" => "a directory",
        "File" | "FileOrCreate" => "a file",
        "Socket" => "a socket file",
        "CharDevice" => "a character device",
        _ => "a block device",
    };
    if holds { Ok(()) } else { Err(format!("hostPath type check failed: {} is not {what}", path.display())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_checked_or_made() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        fs::write(at("file"), "").unwrap();
        let cases = [
            ("", "new/deep", true),
            ("Directory", "none", false),
            ("DirectoryOrCreate", "made", true),
            ("Directory", "made", true),
            ("File", "made", false),
            ("FileOrCreate", "touched", true),
            ("File", "file", true),
            ("Directory", "file", false),
            ("Socket", "file", false),
            ("CharDevice", "file", false),
            ("Nonsense", "file", false),
        ];
        for (kind, name, want) in cases {
            assert_eq!(check(&at(name), kind).is_ok(), want, "{kind} {name}");
        }
        assert!(check(Path::new("/dev/null"), "CharDevice").is_ok());
        let error = check(&at("file"), "Directory").unwrap_err();
        assert!(error.ends_with("file is not a directory"), "{error}");
    }
}
