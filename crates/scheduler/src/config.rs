//! `KubeSchedulerConfiguration` v1: profiles, plugins, arguments, extenders. Read strictly: what is unknown, out of range
//! or contradictory is an error that names the field; all of them are told at once.

mod arguments;
mod plugin_sets;
mod reader;

use crate::extender::Extender;
use crate::profile::Profile;
use crate::queue::Backoff;
use base64::Engine;
use reader::Reader;
use serde_json::Value;
use std::path::Path;
use std::time::Duration;

const API_VERSION: &str = "kubescheduler.config.k8s.io/v1";
const KIND: &str = "KubeSchedulerConfiguration";
/// How long an extender may take unless it says otherwise.
const EXTENDER_TIMEOUT: Duration = Duration::from_secs(5);

/// What a scheduler is told. The default is upstream's default.
#[derive(Debug, Clone)]
pub struct Config {
    pub profiles: Vec<Profile>,
    pub extenders: Vec<Extender>,
    pub backoff: Backoff,
    /// Where several processes may schedule, only the holder of this lease does.
    pub election: Option<Election>,
}

/// A lease to lead by: namespace, name and times.
#[derive(Debug, Clone, PartialEq)]
pub struct Election {
    pub namespace: String,
    pub name: String,
    pub lease: Duration,
    pub renew_deadline: Duration,
    pub retry: Duration,
}

impl Election {
    /// A candidacy of this process.
    pub fn lease(&self) -> knarr_client::leader::Election {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        knarr_client::leader::Election {
            namespace: self.namespace.clone(),
            name: self.name.clone(),
            identity: format!("{}_{:016x}", host.trim(), rand::random::<u64>()),
            lease: self.lease,
            renew_deadline: self.renew_deadline,
            retry: self.retry,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Config {
            profiles: vec![Profile::default()],
            extenders: Vec::new(),
            backoff: Backoff::default(),
            election: None,
        }
    }
}

/// What is wrong with a configuration: one line each, beginning with the field's path.
#[derive(Debug, thiserror::Error, PartialEq)]
#[error("invalid scheduler configuration: {}", .0.join("; "))]
pub struct ConfigError(pub Vec<String>);

impl Config {
    /// Reads a file. Must run inside tokio if it names extenders.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| ConfigError(vec![format!("read {}: {error}", path.display())]))?;
        Config::parse(&text)
    }

    /// Reads YAML or JSON.
    pub fn parse(text: &str) -> Result<Config, ConfigError> {
        let value: Value = serde_yaml_ng::from_str(text)
            .map_err(|error| ConfigError(vec![format!("read YAML: {error}")]))?;
        let mut errors = Vec::new();
        let config = read(&value, &mut errors);
        if errors.is_empty() { Ok(config) } else { Err(ConfigError(errors)) }
    }
}

fn read(value: &Value, errors: &mut Vec<String>) -> Config {
    let mut root = Reader::root(value, errors);
    let (version, kind) = (root.text("apiVersion"), root.text("kind"));
    if version.as_deref() != Some(API_VERSION) || kind.as_deref() != Some(KIND) {
        root.error("apiVersion", &format!("Unsupported value: wanted {API_VERSION}, kind {KIND}"));
    }
    // How upstream spreads its work over threads and connections: ours has none to spread, but the values are checked.
    if root.integer("parallelism").is_some_and(|parallelism| parallelism <= 0) {
        root.error("parallelism", "Invalid value: should be an integer value greater than zero");
    }
    for name in ["clientConnection", "enableProfiling", "enableContentionProfiling", "delayCacheUntilActive"]
    {
        root.accept(name);
    }
    let backoff = backoff(&mut root);
    let percentage = percentage(&mut root);
    let election = election(&mut root);
    let mut profiles: Vec<Profile> = root.list("profiles", |profile| read_profile(profile, percentage));
    if profiles.is_empty() {
        profiles.push(Profile { percentage_of_nodes_to_score: percentage, ..Profile::default() });
    }
    duplicates(&mut root, &profiles);
    let extenders = root.list("extenders", read_extender);
    let binders = extenders.iter().flatten().filter(|(extender, _)| extender.binds()).count();
    if binders > 1 {
        root.error(
            "extenders",
            &format!("Invalid value: found {binders} extenders implementing bind; only one may"),
        );
    }
    root.no_others();
    let extenders: Vec<(Extender, Vec<String>)> = extenders.into_iter().flatten().collect();
    // What an extender manages and the scheduler shall not look at is not a matter of fit.
    for profile in &mut profiles {
        let ignored = extenders.iter().flat_map(|(_, ignored)| ignored.iter().cloned());
        profile.args.fit.ignored_resources.extend(ignored);
        profile.asks_about_victims = extenders.iter().any(|(extender, _)| extender.preempts());
    }
    Config {
        profiles,
        extenders: extenders.into_iter().map(|(extender, _)| extender).collect(),
        backoff,
        election,
    }
}

fn backoff(root: &mut Reader) -> Backoff {
    let seconds = |value: Option<i64>, default: Duration| {
        value.map_or(default, |s| Duration::from_secs(s.max(0) as u64))
    };
    let (initial, max) = (root.integer("podInitialBackoffSeconds"), root.integer("podMaxBackoffSeconds"));
    let default = Backoff::default();
    let backoff = Backoff { initial: seconds(initial, default.initial), max: seconds(max, default.max) };
    if backoff.initial.is_zero() {
        root.error("podInitialBackoffSeconds", "Invalid value: must be greater than 0");
    }
    if backoff.max < backoff.initial {
        root.error(
            "podMaxBackoffSeconds",
            "Invalid value: must be greater than or equal to PodInitialBackoffSeconds",
        );
    }
    backoff
}

fn percentage(reader: &mut Reader) -> usize {
    let percentage = reader.integer("percentageOfNodesToScore").unwrap_or(0);
    if !(0..=100).contains(&percentage) {
        reader.error(
            "percentageOfNodesToScore",
            &format!("Invalid value: {percentage}: not in valid range [0-100]"),
        );
    }
    percentage.clamp(0, 100) as usize
}

/// Without the section there is no election: one process schedules.
fn election(root: &mut Reader) -> Option<Election> {
    let mut elected = None;
    root.object("leaderElection", |reader| {
        let wanted = reader.boolean("leaderElect").unwrap_or(true);
        let election = Election {
            namespace: reader.text("resourceNamespace").unwrap_or_else(|| "kube-system".to_owned()),
            name: reader.text("resourceName").unwrap_or_else(|| "kube-scheduler".to_owned()),
            lease: reader.duration("leaseDuration").unwrap_or(Duration::from_secs(15)),
            renew_deadline: reader.duration("renewDeadline").unwrap_or(Duration::from_secs(10)),
            retry: reader.duration("retryPeriod").unwrap_or(Duration::from_secs(2)),
        };
        if reader.text("resourceLock").is_some_and(|lock| lock != "leases") {
            reader.error("resourceLock", "Invalid value: only \"leases\" is supported");
        }
        if wanted && election.lease <= election.renew_deadline {
            reader.error("leaseDuration", "Invalid value: LeaseDuration must be greater than RenewDeadline");
        }
        reader.no_others();
        elected = wanted.then_some(election);
    });
    elected
}

fn read_profile(reader: &mut Reader, percentage_of_all: usize) -> Profile {
    let name = reader.text("schedulerName").unwrap_or_default();
    if name.is_empty() {
        reader.error("schedulerName", "Required value");
    }
    let percentage =
        if reader.has("percentageOfNodesToScore") { percentage(reader) } else { percentage_of_all };
    let points = plugin_sets::read(reader);
    let args = arguments::read(reader);
    reader.no_others();
    Profile::new(&name, points, args, percentage)
}

fn duplicates(root: &mut Reader, profiles: &[Profile]) {
    for (index, profile) in profiles.iter().enumerate() {
        if profiles[..index].iter().any(|other| other.scheduler_name == profile.scheduler_name) {
            let name = &profile.scheduler_name;
            root.error(&format!("profiles[{index}].schedulerName"), &format!("Duplicate value: {name:?}"));
        }
    }
}

/// The extender, and the resources that only it looks at. `None` if something was wrong with it.
fn read_extender(reader: &mut Reader) -> Option<(Extender, Vec<String>)> {
    let url = reader.text("urlPrefix").unwrap_or_default().trim_end_matches('/').to_owned();
    let verb = |text: Option<String>| text.filter(|verb| !verb.is_empty());
    let (filter, prioritize) = (verb(reader.text("filterVerb")), verb(reader.text("prioritizeVerb")));
    let (preempt, bind) = (verb(reader.text("preemptVerb")), verb(reader.text("bindVerb")));
    let weight = reader.integer("weight").unwrap_or(0);
    if prioritize.is_some() && weight <= 0 {
        reader
            .error("weight", &format!("Invalid value: {weight}: must have a positive weight applied to it"));
    }
    let node_cache_capable = reader.boolean("nodeCacheCapable").unwrap_or(false);
    let ignorable = reader.boolean("ignorable").unwrap_or(false);
    let timeout = reader.duration("httpTimeout").unwrap_or(EXTENDER_TIMEOUT);
    let managed: Vec<(String, bool)> = reader.list("managedResources", |resource| {
        let name = resource.text("name").unwrap_or_default();
        if name.is_empty() {
            resource.error("name", "Required value");
        }
        let ignored = resource.boolean("ignoredByScheduler").unwrap_or(false);
        resource.no_others();
        (name, ignored)
    });
    let client = extender_client(reader, &url, timeout);
    reader.no_others();
    let ignored = managed.iter().filter(|(_, ignored)| *ignored).map(|(name, _)| name.clone()).collect();
    let extender = Extender {
        url,
        client: client?,
        filter,
        prioritize,
        preempt,
        bind,
        weight,
        node_cache_capable,
        ignorable,
        managed_resources: managed.into_iter().map(|(name, _)| name).collect(),
    };
    Some((extender, ignored))
}

fn extender_client(reader: &mut Reader, url: &str, timeout: Duration) -> Option<kube::Client> {
    let https = reader.boolean("enableHTTPS").unwrap_or(false);
    let full = if url.contains("://") {
        url.to_owned()
    } else {
        format!("http{}://{url}", if https { "s" } else { "" })
    };
    let uri: http::Uri = match full.parse() {
        Ok(uri) if !url.is_empty() => uri,
        _ => {
            reader.error("urlPrefix", &format!("Invalid value: {url:?}: must be a URL"));
            reader.accept("tlsConfig");
            return None;
        }
    };
    let mut config = kube::Config::new(uri);
    (config.connect_timeout, config.read_timeout, config.write_timeout) =
        (Some(timeout), Some(timeout), Some(timeout));
    reader.object("tlsConfig", |tls| {
        config.accept_invalid_certs = tls.boolean("insecure").unwrap_or(false);
        config.tls_server_name = tls.text("serverName").filter(|name| !name.is_empty());
        let mut pem = |data: &str, file: &str| -> Option<String> {
            let inline = tls.text(data).filter(|text| !text.is_empty());
            let path = tls.text(file).filter(|path| !path.is_empty());
            let read = path
                .filter(|_| inline.is_none())
                .map(|path| std::fs::read_to_string(&path).map_err(|e| (path, e)));
            match read {
                None => inline,
                Some(Ok(text)) => Some(base64::engine::general_purpose::STANDARD.encode(text)),
                Some(Err((path, error))) => {
                    tls.error(file, &format!("Invalid value: {path:?}: {error}"));
                    None
                }
            }
        };
        config.auth_info.client_certificate_data = pem("certData", "certFile");
        config.auth_info.client_key_data = pem("keyData", "keyFile").map(Into::into);
        if let Some(root) = pem("caData", "caFile") {
            match pem_blocks(&root) {
                Some(blocks) => config.root_cert = Some(blocks),
                None => tls.error("caData", "Invalid value: no certificate in PEM"),
            }
        }
        tls.no_others();
    });
    match kube::Client::try_from(config) {
        Ok(client) => Some(client),
        Err(error) => {
            reader.error("urlPrefix", &format!("Invalid value: {url:?}: {error}"));
            None
        }
    }
}

/// The certificates of PEM in base64, each as its bytes.
fn pem_blocks(encoded: &str) -> Option<Vec<Vec<u8>>> {
    let engine = base64::engine::general_purpose::STANDARD;
    let text = String::from_utf8(engine.decode(encoded.trim()).ok()?).ok()?;
    let blocks = text.split("-----BEGIN CERTIFICATE-----").skip(1);
    let decode = |block: &str| {
        let body: String = block.split("-----END").next()?.split_whitespace().collect();
        engine.decode(body).ok()
    };
    let blocks: Vec<Vec<u8>> = blocks.map(decode).collect::<Option<_>>()?;
    (!blocks.is_empty()).then_some(blocks)
}

#[cfg(test)]
mod tests;
