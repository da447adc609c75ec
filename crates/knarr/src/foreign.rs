//! A container runtime that is not ours, behind a CRI socket (containerd): the pod network as its CNI plug-in, the
//! image of its sandboxes' first process, archives imported into it, and all of that taken back. What CRI itself
//! can do is [`RemoteRuntime`]'s.
//!
//! CRI has no import: `ctr`, which comes with containerd, does it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use knarr_kubelet::names;
use knarr_network::RoutedConfig;
use knarr_network::cni::{self, CONFLIST, LOOPBACK_TYPE, PLUGIN_TYPE};
use knarr_runtime::cri::v1;
use knarr_runtime::image::{build, pause};
use knarr_runtime::{RemoteRuntime, Runtime};
use serde::{Deserialize, Serialize};

use crate::settings::Settings;

/// Where runtimes look for networks unless they tell otherwise.
const PLUGIN_DIR: &str = "/opt/cni/bin";
const NETWORK_DIR: &str = "/etc/cni/net.d";
/// The containerd namespace that its CRI plug-in works in.
const NAMESPACE: &str = "k8s.io";
/// How long an imported image may take to show in CRI, which hears of it by an event of its own.
const SHOW_TIMEOUT: Duration = Duration::from_secs(10);
const SHOW_INTERVAL: Duration = Duration::from_millis(20);

/// A runtime prepared for this node.
pub struct Foreign {
    pub runtime: RemoteRuntime,
    socket: PathBuf,
    sandbox_image: Option<String>,
}

/// What was put into the runtime's directories; kept on disk to take it back without the runtime.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Installed {
    plugins: Vec<PathBuf>,
    network: PathBuf,
}

impl Foreign {
    /// Connects, and makes the runtime use the pod network, which must have been started.
    pub async fn start(settings: &Settings, endpoint: &str, network: &RoutedConfig) -> Result<Foreign> {
        let runtime = connect(endpoint).await?;
        let told =
            runtime.configuration().await.context("ask the container runtime for its configuration")?;
        install(
            settings,
            told.plugin_dir.as_deref().unwrap_or(Path::new(PLUGIN_DIR)),
            told.network_dir.as_deref().unwrap_or(Path::new(NETWORK_DIR)),
            network,
        )?;
        let socket = PathBuf::from(endpoint.trim_start_matches("unix://"));
        Ok(Foreign { runtime, socket, sandbox_image: told.sandbox_image })
    }

    /// Makes sure that sandboxes can start where no registry can be reached.
    pub async fn ensure_pause(&self, settings: &Settings) -> Result<()> {
        let Some(name) = &self.sandbox_image else { return Ok(()) };
        let spec = v1::ImageSpec { image: name.clone(), ..Default::default() };
        if self.runtime.image_status(spec, false).await?.image.is_some() {
            return Ok(());
        }
        let path = settings.run_dir.join("pause.tar");
        build::write(&pause::image(name)?, &path, false)?;
        let imported = self.import(&path).await;
        std::fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
        imported.with_context(|| format!("import the sandbox image {name}")).map(drop)
    }

    /// Imports an archive; returns the names of its images once CRI has them.
    pub async fn import(&self, path: &Path) -> Result<Vec<String>> {
        let mut command = tokio::process::Command::new("ctr");
        command
            .arg("--address")
            .arg(&self.socket)
            .args(["--namespace", NAMESPACE, "images", "import"])
            .arg(path);
        let output = command
            .stdin(std::process::Stdio::null())
            .output()
            .await
            .context("run ctr, containerd's tool; other runtimes' images are imported with theirs")?;
        if !output.status.success() {
            bail!("ctr images import: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        let names = imported(&String::from_utf8_lossy(&output.stdout));
        for name in &names {
            self.wait_for(name).await?;
        }
        self.runtime.imports().arrived();
        Ok(names)
    }

    async fn wait_for(&self, name: &str) -> Result<()> {
        let deadline = Instant::now() + SHOW_TIMEOUT;
        let filter =
            v1::ImageFilter { image: Some(v1::ImageSpec { image: name.to_owned(), ..Default::default() }) };
        while self.runtime.list_images(Some(filter.clone())).await?.is_empty() {
            if Instant::now() > deadline {
                bail!("{name} was imported, but the runtime does not show it");
            }
            tokio::time::sleep(SHOW_INTERVAL).await;
        }
        Ok(())
    }
}

async fn connect(endpoint: &str) -> Result<RemoteRuntime> {
    let remote = RemoteRuntime::connect(endpoint).await;
    remote.with_context(|| format!("container runtime at {endpoint}"))
}

/// The names in what `ctr images import` prints: `unpacking NAME (DIGEST)...done`.
fn imported(output: &str) -> Vec<String> {
    let lines = output.lines().filter_map(|line| line.trim().strip_prefix("unpacking "));
    lines.filter_map(|line| line.split(' ').next()).map(str::to_owned).collect()
}

fn record(settings: &Settings) -> PathBuf {
    settings.data_dir.join("cni.json")
}

/// Puts plug-ins and configuration where the runtime looks.
fn install(settings: &Settings, plugins: &Path, networks: &Path, network: &RoutedConfig) -> Result<()> {
    let own = plugins.join(PLUGIN_TYPE);
    let loopback = plugins.join(LOOPBACK_TYPE);
    let config = networks.join(CONFLIST);
    check_owner(&own, &config, network)?;
    check_order(networks)?;
    let mut installed = Installed { plugins: vec![own], network: config };
    // Whoever else's loopback plug-in is there does as well.
    if std::fs::symlink_metadata(&loopback).map_or(true, |data| is_ours(&loopback, &data)) {
        installed.plugins.push(loopback);
    }
    // Written down before it is there, so that a purge finds it.
    std::fs::write(record(settings), serde_json::to_vec(&installed)?)
        .with_context(|| format!("write {}", record(settings).display()))?;
    let way_out = |dir: &Path| {
        format!(
            "{} must be writable, or set another directory in the container runtime's configuration",
            dir.display()
        )
    };
    let program = std::env::current_exe().context("find this program")?;
    for path in &installed.plugins {
        let linked = std::fs::create_dir_all(plugins).and_then(|()| link(&program, path));
        linked.with_context(|| {
            format!("install the network plug-in {}; {}", path.display(), way_out(plugins))
        })?;
    }
    cni::write_conflist(networks, network).with_context(|| way_out(networks))?;
    Ok(())
}

/// A link to a program of our name, wherever that lay when the link was made.
fn is_ours(path: &Path, data: &std::fs::Metadata) -> bool {
    let target = std::fs::read_link(path).unwrap_or_default();
    data.is_symlink() && target.file_name().is_some_and(|name| name.to_string_lossy().starts_with("knarr"))
}

fn link(program: &Path, path: &Path) -> std::io::Result<()> {
    if std::fs::read_link(path).is_ok_and(|target| target == program) {
        return Ok(());
    }
    let fresh = path.with_extension("new");
    match std::fs::remove_file(&fresh) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    std::os::unix::fs::symlink(program, &fresh)?;
    std::fs::rename(&fresh, path)
}

/// Refuses to replace what is not ours.
fn check_owner(plugin: &Path, config: &Path, network: &RoutedConfig) -> Result<()> {
    if std::fs::symlink_metadata(plugin).is_ok_and(|data| !data.is_symlink()) {
        bail!("{} is not a link that knarr made; move it away", plugin.display());
    }
    let Ok(text) = std::fs::read(config) else { return Ok(()) };
    let found: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
    let dir = found.pointer("/plugins/0/stateDir").and_then(|dir| dir.as_str()).unwrap_or_default();
    if Path::new(dir) != network.state_dir {
        bail!(
            "{} belongs to another cluster ({dir}); end that one with `knarr down --purge`, or remove the file",
            config.display()
        );
    }
    Ok(())
}

/// Runtimes take the first network by name.
fn check_order(networks: &Path) -> Result<()> {
    let mut before: Vec<String> = std::fs::read_dir(networks)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| [".conf", ".conflist", ".json"].iter().any(|end| name.ends_with(end)))
        .filter(|name| name.as_str() < CONFLIST && !name.starts_with('.'))
        .collect();
    before.sort();
    match before.first() {
        None => Ok(()),
        Some(first) => bail!(
            "{} would be used before the network of knarr; move it away",
            networks.join(first).display()
        ),
    }
}

/// Ends all pods' containers; their pods start anew with the next `up`.
pub async fn stop_pods(endpoint: &str) -> Result<()> {
    let runtime = connect(endpoint).await?;
    for sandbox in pods(&runtime).await? {
        runtime
            .stop_pod_sandbox(&sandbox.id)
            .await
            .with_context(|| format!("stop sandbox {}", sandbox.id))?;
    }
    Ok(())
}

/// Removes all pods' sandboxes and containers.
pub async fn remove_pods(endpoint: &str) -> Result<()> {
    let runtime = connect(endpoint).await?;
    for sandbox in pods(&runtime).await? {
        let step = || format!("remove sandbox {}", sandbox.id);
        runtime.stop_pod_sandbox(&sandbox.id).await.with_context(step)?;
        runtime.remove_pod_sandbox(&sandbox.id).await.with_context(step)?;
    }
    Ok(())
}

/// The ids of pods' sandboxes that are left.
pub async fn left_pods(endpoint: &str) -> Result<Vec<String>> {
    Ok(pods(&connect(endpoint).await?).await?.into_iter().map(|sandbox| sandbox.id).collect())
}

/// Sandboxes of Kubernetes' pods; what somebody runs by hand has no such label.
async fn pods(runtime: &RemoteRuntime) -> Result<Vec<v1::PodSandbox>> {
    let all = runtime.list_pod_sandbox(None).await.context("list the container runtime's sandboxes")?;
    Ok(all.into_iter().filter(|sandbox| sandbox.labels.contains_key(names::POD_UID)).collect())
}

/// Takes plug-in and configuration out of the runtime's directories.
pub fn uninstall(settings: &Settings) -> Result<()> {
    let Some(installed) = installed(settings)? else { return Ok(()) };
    for path in installed.plugins.iter().chain([&installed.network]) {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("remove {}", path.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

fn installed(settings: &Settings) -> Result<Option<Installed>> {
    match std::fs::read(record(settings)) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes).context("read cni.json")?)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context("read cni.json"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_of_imported_images_are_read() {
        let output = "unpacking docker.io/library/busybox:latest (sha256:0123)...done\nnoise\n";
        assert_eq!(imported(output), ["docker.io/library/busybox:latest"]);
    }

    #[test]
    fn plug_in_and_network_are_installed_and_never_over_others() {
        let dir = tempfile::tempdir().unwrap();
        let (plugins, networks) = (dir.path().join("bin"), dir.path().join("net.d"));
        let settings = Settings { data_dir: dir.path().into(), ..Settings::default() };
        let network = RoutedConfig {
            device: "knarr0".into(),
            state_dir: "/run/one".into(),
            pod_cidrs: Vec::new(),
            cluster_cidrs: Vec::new(),
            service_cidrs: Vec::new(),
            mtu: None,
        };
        let install = |network: &RoutedConfig| install(&settings, &plugins, &networks, network);
        install(&network).unwrap();
        install(&network).unwrap();
        assert!(plugins.join("knarr").exists() && networks.join(CONFLIST).exists());
        let other = RoutedConfig { state_dir: "/run/two".into(), ..network.clone() };
        assert!(install(&other).unwrap_err().to_string().contains("another cluster"));
        std::fs::write(networks.join("00-first.conflist"), "{}").unwrap();
        assert!(
            install(&network).unwrap_err().to_string().contains("00-first.conflist would be used before")
        );
        std::fs::remove_file(networks.join("00-first.conflist")).unwrap();
        uninstall(&settings).unwrap();
        assert!(!networks.join(CONFLIST).exists());
        assert_eq!(std::fs::read_dir(&plugins).unwrap().count(), 0);
        std::fs::write(plugins.join("knarr"), "a program of somebody").unwrap();
        assert!(install(&network).unwrap_err().to_string().contains("move it away"));
    }
}
