//! The pod network as a CNI plug-in, for container runtimes that are not ours (containerd, CRI-O).
//!
//! The node's own binary is the plug-in: a runtime starts it with `CNI_COMMAND` in the environment and the
//! network's configuration on standard input, and reads the result from standard output
//! (<https://www.cni.dev/docs/spec/>, versions 0.3.1 to 1.1.0). Leases are shared with the node process
//! through the state directory; the node process must have started the network once.
//!
//! Called as `loopback`, which containerd asks for by that name before any network, it brings up `lo` and no more.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::builtin::{RoutedConfig, RoutedNetwork};
use crate::error::{NetworkError, Result};
use crate::ipam::{Lease, Subnet};
use crate::link::Links;
use crate::nft::NftProgram;
use crate::pod::{HostPort, PodRef, Protocol};

/// The plug-in's type: the name runtimes look for in `/opt/cni/bin`.
pub const PLUGIN_TYPE: &str = "knarr";
/// The file [`write_conflist`] writes; sorts before what others install.
pub const CONFLIST: &str = "10-knarr.conflist";
/// The other plug-in that runtimes look for; the reference plug-ins have one, which is as good.
pub const LOOPBACK_TYPE: &str = "loopback";
const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];
const VERSION_LATEST: &str = VERSIONS[3];
/// A configuration is a few hundred bytes, plus the runtime's list of attachments for GC.
const CONFIG_LEN_MAX: u64 = 4 << 20;

/// The environment of a call, as the runtime sets it.
#[derive(Clone, Debug, Default)]
pub struct Call {
    /// `CNI_COMMAND`.
    pub command: String,
    /// `CNI_CONTAINERID`.
    pub container: String,
    /// `CNI_NETNS`.
    pub namespace: String,
    /// `CNI_IFNAME`.
    pub device: String,
    /// `CNI_ARGS`: `K8S_POD_NAME=x;...`.
    pub args: String,
}

/// The plug-in's part of a network configuration.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Config {
    #[serde(flatten)]
    network: RoutedConfig,
    #[serde(default)]
    runtime_config: RuntimeConfig,
    /// For GC: who is alive.
    #[serde(default, rename = "cni.dev/valid-attachments")]
    valid: Vec<Attachment>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RuntimeConfig {
    #[serde(default)]
    port_mappings: Vec<PortMapping>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct PortMapping {
    host_port: u16,
    container_port: u16,
    #[serde(default)]
    protocol: String,
    #[serde(default, rename = "hostIP")]
    host_ip: String,
}

#[derive(Debug, Deserialize)]
struct Attachment {
    #[serde(rename = "containerID")]
    container: String,
    ifname: String,
}

/// What a runtime reads when a call fails.
#[derive(Debug, Serialize)]
struct Failure {
    #[serde(rename = "cniVersion")]
    cni_version: String,
    code: u32,
    msg: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    details: String,
}

impl Call {
    /// The call this process was started for; `None` if it was not started as a plug-in.
    pub fn from_environment() -> Option<Call> {
        let variable = |name| std::env::var(name).unwrap_or_default();
        let command = std::env::var("CNI_COMMAND").ok()?;
        Some(Call {
            command,
            container: variable("CNI_CONTAINERID"),
            namespace: variable("CNI_NETNS"),
            device: variable("CNI_IFNAME"),
            args: variable("CNI_ARGS"),
        })
    }

    fn owner(&self) -> String {
        owner(&self.container, &self.device)
    }

    fn pod(&self) -> PodRef {
        let args: BTreeMap<&str, &str> =
            self.args.split(';').filter_map(|pair| pair.split_once('=')).collect();
        let arg = |name: &str| args.get(name).copied().unwrap_or_default();
        PodRef::new(arg("K8S_POD_NAMESPACE"), arg("K8S_POD_NAME"), arg("K8S_POD_UID"))
    }
}

/// Serves one call; answers the process's exit code. What the runtime is to read goes to `output`.
pub async fn run(call: &Call, input: impl Read, mut output: impl Write) -> i32 {
    let mut text = String::new();
    let read = input.take(CONFIG_LEN_MAX).read_to_string(&mut text);
    let (answer, code) = match serve(call, read.map(|_| text.as_str())).await {
        Ok(answer) => (answer, 0),
        Err(failure) => (serde_json::to_value(failure).ok(), 1),
    };
    // A runtime that does not read its answer cannot be helped.
    if let Some(answer) = answer {
        _ = writeln!(output, "{answer}");
    }
    code
}

async fn serve(call: &Call, input: std::io::Result<&str>) -> Result<Option<Value>, Failure> {
    if call.command == "VERSION" {
        return Ok(Some(json!({ "cniVersion": VERSION_LATEST, "supportedVersions": VERSIONS })));
    }
    let input = decode(input)?;
    let version = input["cniVersion"].as_str().unwrap_or_default().to_owned();
    let failed =
        |error: NetworkError| failure(&version, code_of(&error), "knarr pod network", error.to_string());
    if ["ADD", "CHECK"].contains(&call.command.as_str()) && call.namespace.is_empty() {
        return Err(failure(&version, 4, "CNI_NETNS is not set", String::new()));
    }
    if ["ADD", "CHECK", "DEL"].contains(&call.command.as_str())
        && (call.container.is_empty() || call.device.is_empty())
    {
        return Err(failure(&version, 4, "CNI_CONTAINERID or CNI_IFNAME is not set", String::new()));
    }
    let namespace = PathBuf::from(&call.namespace);
    if input["type"] == LOOPBACK_TYPE {
        return loopback(call, &namespace, &version).await.map_err(failed);
    }
    let config: Config = serde_json::from_value(input).map_err(undecodable)?;
    let network = RoutedNetwork::open(config.network, Arc::new(NftProgram)).await.map_err(failed)?;
    match call.command.as_str() {
        "ADD" => {
            let ports = host_ports(&config.runtime_config.port_mappings)
                .map_err(|reason| failure(&version, 7, "bad port mapping", reason))?;
            let lease = network.attach_as(&call.owner(), &call.pod(), &namespace, &call.device, &ports).await;
            Ok(Some(success(&version, call, &lease.map_err(failed)?, &network.gateways())))
        }
        "DEL" => network.detach_owner(&call.owner()).await.map(|()| None).map_err(failed),
        "CHECK" => network.check(&call.owner(), &namespace, &call.device).await.map(|_| None).map_err(failed),
        "GC" => {
            let live: BTreeSet<String> =
                config.valid.iter().map(|a| owner(&a.container, &a.ifname)).collect();
            network.gc_owners(&live).await.map(|_| None).map_err(failed)
        }
        "STATUS" => Ok(None),
        other => Err(failure(&version, 4, &format!("unknown CNI_COMMAND {other:?}"), String::new())),
    }
}

fn owner(container: &str, device: &str) -> String {
    format!("{container}/{device}")
}

fn decode(input: std::io::Result<&str>) -> Result<Value, Failure> {
    let text = input
        .map_err(|error| failure(VERSION_LATEST, 5, "cannot read the configuration", error.to_string()))?;
    let config: Value = serde_json::from_str(text).map_err(undecodable)?;
    let version = config["cniVersion"].as_str().unwrap_or_default();
    if !VERSIONS.contains(&version) {
        let details = format!("{version} is not one of {}", VERSIONS.join(", "));
        return Err(failure(VERSION_LATEST, 1, "incompatible CNI version", details));
    }
    Ok(config)
}

fn undecodable(error: serde_json::Error) -> Failure {
    failure(VERSION_LATEST, 6, "cannot decode the configuration", error.to_string())
}

/// `lo` of a namespace: up, with the addresses the kernel gives it. It goes with the namespace.
async fn loopback(call: &Call, namespace: &Path, version: &str) -> Result<Option<Value>> {
    if call.command != "ADD" {
        return Ok(None);
    }
    let links = Links::inside(namespace)?;
    links.up(links.expect("lo").await?.index).await?;
    let mut address = json!({ "address": "127.0.0.1/8", "interface": 0 });
    if has_version_of_address(version) {
        address["version"] = json!("4");
    }
    let device = json!({ "name": "lo", "mac": "00:00:00:00:00:00", "sandbox": call.namespace });
    Ok(Some(json!({ "cniVersion": version, "interfaces": [device], "ips": [address], "dns": {} })))
}

/// Dropped from the specification with 1.0.0.
fn has_version_of_address(version: &str) -> bool {
    version.starts_with("0.")
}

fn host_ports(mappings: &[PortMapping]) -> Result<Vec<HostPort>, String> {
    let port = |mapping: &PortMapping| {
        Ok(HostPort {
            protocol: Protocol::from_api(Some(&mapping.protocol.to_ascii_uppercase()))?,
            host_port: mapping.host_port,
            container_port: mapping.container_port,
            host_ip: match mapping.host_ip.as_str() {
                "" => None,
                ip => Some(ip.parse().map_err(|_| format!("hostIP {ip:?}"))?),
            },
        })
    };
    mappings.iter().filter(|mapping| mapping.host_port != 0).map(port).collect()
}

fn success(version: &str, call: &Call, lease: &Lease, gateways: &[IpAddr]) -> Value {
    let ips: Vec<Value> = lease
        .ips
        .iter()
        .zip(gateways)
        .map(|(ip, gateway)| {
            let mut entry = json!({
                "address": Subnet::host(*ip).to_string(),
                "gateway": gateway.to_string(),
                "interface": 1,
            });
            if has_version_of_address(version) {
                entry["version"] = json!(if ip.is_ipv4() { "4" } else { "6" });
            }
            entry
        })
        .collect();
    let route = |gateway: &IpAddr| json!({ "dst": if gateway.is_ipv4() { "0.0.0.0/0" } else { "::/0" }, "gw": gateway.to_string() });
    json!({
        "cniVersion": version,
        "interfaces": [
            { "name": lease.device, "sandbox": "" },
            { "name": call.device, "sandbox": call.namespace },
        ],
        "ips": ips,
        "routes": gateways.iter().map(route).collect::<Vec<_>>(),
        "dns": {},
    })
}

/// The specification's codes where one fits, 100 otherwise; 11 asks the runtime to try again later.
fn code_of(error: &NetworkError) -> u32 {
    match error {
        NetworkError::Exhausted { .. } => 11,
        NetworkError::State { .. } => 5,
        _ => 100,
    }
}

fn failure(version: &str, code: u32, msg: &str, details: String) -> Failure {
    Failure { cni_version: version.to_owned(), code, msg: msg.to_owned(), details }
}

/// Writes the network configuration list into a runtime's directory (`/etc/cni/net.d`), atomically.
///
/// # Errors
/// The directory cannot be made or written.
pub fn write_conflist(dir: &Path, config: &RoutedConfig) -> Result<PathBuf> {
    let path = dir.join(CONFLIST);
    let failed = |source| NetworkError::State { path: path.clone(), source };
    let mut plugin = serde_json::to_value(config).map_err(|error| failed(error.into()))?;
    plugin["type"] = json!(PLUGIN_TYPE);
    plugin["capabilities"] = json!({ "portMappings": true });
    let list = json!({ "cniVersion": "1.0.0", "name": "knarr", "plugins": [plugin] });
    std::fs::create_dir_all(dir).map_err(failed)?;
    let fresh = dir.join(".10-knarr.conflist.new");
    std::fs::write(&fresh, format!("{list:#}\n")).map_err(failed)?;
    std::fs::rename(&fresh, &path).map_err(failed)?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn call(command: &str, input: &str) -> (i32, Value) {
        let mut output = Vec::new();
        let call =
            Call { command: command.into(), container: "c".into(), device: "eth0".into(), ..Call::default() };
        let code = run(&call, input.as_bytes(), &mut output).await;
        (code, serde_json::from_slice(&output).unwrap_or_default())
    }

    #[tokio::test]
    async fn version_needs_no_configuration() {
        let (code, answer) = call("VERSION", "").await;
        assert_eq!((code, &answer["supportedVersions"][0]), (0, &json!("0.3.1")));
    }

    #[tokio::test]
    async fn bad_calls_get_the_codes_of_the_specification() {
        let config = |version: &str| {
            json!({ "cniVersion": version, "name": "knarr", "type": "knarr", "device": "knarr0", "stateDir": "/nowhere",
                    "podCidrs": ["10.1.0.0/24"], "clusterCidrs": [], "serviceCidrs": [] })
            .to_string()
        };
        let cases = [
            ("ADD", "{".to_owned(), 6),
            ("ADD", config("0.3.0"), 1),
            ("ADD", config("1.0.0"), 4),
            ("EAT", config("1.0.0"), 4),
        ];
        for (command, input, code) in cases {
            let (exit, answer) = call(command, &input).await;
            assert_eq!((exit, &answer["code"]), (1, &json!(code)), "{command} {input}: {answer}");
        }
    }

    #[test]
    fn the_conflist_carries_the_configuration() {
        let dir = tempfile::tempdir().unwrap();
        let config = RoutedConfig {
            device: "knarr0".into(),
            state_dir: "/run/knarr/network".into(),
            pod_cidrs: vec!["10.244.0.0/24".parse().unwrap()],
            cluster_cidrs: vec!["10.244.0.0/16".parse().unwrap()],
            service_cidrs: vec!["10.96.0.0/12".parse().unwrap()],
            mtu: None,
        };
        let path = write_conflist(dir.path(), &config).unwrap();
        let list: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let mut plugin = list["plugins"][0].clone();
        plugin["cniVersion"] = list["cniVersion"].clone();
        let read: Config = serde_json::from_value(plugin).unwrap();
        assert_eq!(read.network, config);
    }
}
