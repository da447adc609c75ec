//! `cp`: files to and from containers, by the container's own `tar`.

use std::path::Path;

use k8s_openapi::api::core::v1::Pod;
use knarr_api::object::Object;
use kube::Api;
use kube::api::AttachParams;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::pods;
use crate::verbs::exec::streaming_error;

#[derive(clap::Args)]
pub struct Args {
    /// A path here, or [NAMESPACE/]POD:PATH.
    from: String,
    to: String,
    #[arg(short, long)]
    container: Option<String>,
}

/// A path in a pod.
#[derive(Debug, PartialEq)]
struct Remote {
    namespace: Option<String>,
    pod: String,
    path: String,
}

fn parse(text: &str) -> Option<Remote> {
    let (pod, path) = text.split_once(':')?;
    if pod.starts_with(['.', '/']) {
        return None;
    }
    let (namespace, pod) = pod.split_once('/').map_or((None, pod), |(n, p)| (Some(n.to_owned()), p));
    Some(Remote { namespace, pod: pod.to_owned(), path: path.to_owned() })
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    match (parse(&args.from), parse(&args.to)) {
        (Some(_), Some(_)) => Err(Error::plain("one of src or dest must be a local file specification")),
        (None, None) => Err(Error::plain("one of src or dest must be a remote file specification")),
        (None, Some(remote)) => upload(context, &args, Path::new(&args.from), &remote).await,
        (Some(remote), None) => download(context, &args, &remote, Path::new(&args.to)).await,
    }
}

/// Runs a command in the container; gives it the input, returns its output.
async fn exec(context: &Context, args: &Args, remote: &Remote, command: Vec<String>, input: Option<Vec<u8>>) -> Result<Vec<u8>> {
    let namespace = match &remote.namespace {
        Some(namespace) => namespace.clone(),
        None => context.namespace()?,
    };
    let pod = context.get(&format!("/api/v1/namespaces/{namespace}/pods/{}", remote.pod)).await?;
    let container = pods::choose_container(&pod, args.container.as_deref(), false)?;
    let api: Api<Pod> = Api::namespaced(context.client().await?, &namespace);
    let params = AttachParams::default().container(container).stdin(input.is_some()).stdout(true).stderr(true);
    let mut process = api.exec(pod.name(), command, &params).await.map_err(|e| streaming_error(e, ""))?;
    let status = process.take_status();
    let (stdin, stdout, stderr) = (process.stdin(), process.stdout(), process.stderr());
    let write = async {
        if let (Some(mut stdin), Some(input)) = (stdin, input) {
            stdin.write_all(&input).await?;
            stdin.shutdown().await?;
        }
        Ok::<(), std::io::Error>(())
    };
    let (mut out, mut err) = (Vec::new(), String::new());
    let read_out = async {
        match stdout {
            Some(mut stdout) => stdout.read_to_end(&mut out).await.map(|_| ()),
            None => Ok(()),
        }
    };
    let read_err = async {
        match stderr {
            Some(mut stderr) => stderr.read_to_string(&mut err).await.map(|_| ()),
            None => Ok(()),
        }
    };
    let (written, read, _) = tokio::join!(write, read_out, read_err);
    let status = match status {
        Some(status) => serde_json::to_value(status.await).unwrap_or_default(),
        None => serde_json::Value::Null,
    };
    if status.str_at("status") == "Failure" {
        let why = if err.trim().is_empty() { status.str_at("message").to_owned() } else { err.trim().to_owned() };
        return Err(Error::plain(format!("in pod {}: {why}", remote.pod)));
    }
    written.and(read)?;
    Ok(out)
}

async fn upload(context: &Context, args: &Args, local: &Path, remote: &Remote) -> Result<()> {
    let fail = |e: std::io::Error| Error::plain(format!("{}: {e}", local.display()));
    let metadata = std::fs::metadata(local).map_err(|_| Error::plain(format!("{} doesn't exist in local filesystem", local.display())))?;
    let base = local.canonicalize().map_err(fail)?.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let target = remote.path.trim_end_matches('/');
    // Into a directory that is there, under the file's own name; else under the name given.
    let test = vec!["test".into(), "-d".into(), remote.path.clone()];
    let is_directory = exec(context, args, remote, test, None).await.is_ok();
    let (directory, name) = match (is_directory, target.rsplit_once('/')) {
        (true, _) => (remote.path.clone(), base),
        (false, Some((directory, name))) => (if directory.is_empty() { "/".into() } else { directory.to_owned() }, name.to_owned()),
        (false, None) => (".".into(), target.to_owned()),
    };
    let mut archive = tar::Builder::new(Vec::new());
    archive.follow_symlinks(false);
    if metadata.is_dir() {
        archive.append_dir_all(&name, local).map_err(fail)?;
    } else {
        archive.append_path_with_name(local, &name).map_err(fail)?;
    }
    let bytes = archive.into_inner().map_err(fail)?;
    let command = ["tar", "-xmf", "-", "-C", &directory].map(String::from).to_vec();
    exec(context, args, remote, command, Some(bytes)).await.map(|_| ())
}

async fn download(context: &Context, args: &Args, remote: &Remote, local: &Path) -> Result<()> {
    let path = remote.path.trim_end_matches('/');
    let (directory, name) = match path.rsplit_once('/') {
        Some(("", name)) => ("/", name),
        Some((directory, name)) => (directory, name),
        None => (".", path),
    };
    if name.is_empty() || name == ".." {
        return Err(Error::plain("filepath can not be empty"));
    }
    let command = ["tar", "-cf", "-", "-C", directory, name].map(String::from).to_vec();
    let bytes = exec(context, args, remote, command, None).await?;
    let target = if local.is_dir() { local.join(name) } else { local.to_owned() };
    unpack(&bytes, name, &target)
}

/// Writes the archive's files under `target`; nothing may leave it, whatever the container sends.
fn unpack(bytes: &[u8], name: &str, target: &Path) -> Result<()> {
    let mut archive = tar::Archive::new(bytes);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        let Ok(inside) = path.strip_prefix(name) else { continue };
        let plain = inside.components().all(|c| matches!(c, std::path::Component::Normal(_)));
        let kind = entry.header().entry_type();
        if !plain || kind.is_symlink() || kind.is_hard_link() {
            eprintln!("warning: skipping {:?}: links and paths outside the target are not copied", path.display().to_string());
            continue;
        }
        let to = if inside.as_os_str().is_empty() { target.to_owned() } else { target.join(inside) };
        if let Some(parent) = to.parent() {
            std::fs::create_dir_all(parent)?;
        }
        if kind.is_dir() {
            std::fs::create_dir_all(&to)?;
        } else {
            entry.unpack(&to)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remote_paths_name_their_pod() {
        let remote = |namespace: Option<&str>, pod: &str, path: &str| Some(Remote { namespace: namespace.map(str::to_owned), pod: pod.into(), path: path.into() });
        assert_eq!(parse("web:/a"), remote(None, "web", "/a"));
        assert_eq!(parse("ns/web:a"), remote(Some("ns"), "web", "a"));
        assert_eq!(parse("./a:b"), None);
        assert_eq!(parse("/tmp/a"), None);
    }

    #[test]
    fn hostile_archives_stay_in_their_directory() {
        let mut builder = tar::Builder::new(Vec::new());
        let mut add = |path: &str, kind: tar::EntryType| {
            let mut header = tar::Header::new_gnu();
            // The checked setters refuse such paths; a hostile container writes bytes.
            header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
            header.set_entry_type(kind);
            header.set_size(1);
            header.set_mode(0o644);
            header.set_cksum();
            builder.append(&header, &b"x"[..]).expect("appends");
        };
        add("d/good", tar::EntryType::Regular);
        add("d/../../evil", tar::EntryType::Regular);
        add("/etc/evil", tar::EntryType::Regular);
        let bytes = builder.into_inner().expect("ends");
        let root = tempfile::tempdir().expect("a directory");
        let target = root.path().join("a/b");
        unpack(&bytes, "d", &target).expect("unpacks");
        assert!(target.join("good").exists());
        assert!(!root.path().join("evil").exists() && !root.path().join("a/evil").exists());
    }
}
