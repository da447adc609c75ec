//! What every verb shares: the global flags, the kubeconfig, the connection, and requests in JSON.
//!
//! Connection and discovery are made at first use: `config view` and `create --dry-run=client` need neither.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use futures::{AsyncBufRead, StreamExt, TryStreamExt};
use http::{Method, Request};
use http_body_util::BodyExt;
use knarr_api::object::Object;
use kube::client::Body;
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::{Value, json};
use tokio::sync::OnceCell;

use crate::discovery::{Discovery, Resource};
use crate::error::{Error, Result, unreachable};

/// The kubeconfig of a cluster made by `knarr up`: used where the user has none.
const ADMIN_KUBECONFIG: &str = "/var/lib/knarr/admin.kubeconfig";

const JSON: &str = "application/json";
/// What asks the server to print.
pub const TABLE: &str = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json";

pub const MERGE_PATCH: &str = "application/merge-patch+json";
pub const STRATEGIC_PATCH: &str = "application/strategic-merge-patch+json";
pub const JSON_PATCH: &str = "application/json-patch+json";
pub const APPLY_PATCH: &str = "application/apply-patch+yaml";

/// Objects asked for in one page of a list; upstream's `--chunk-size`.
const PAGE_SIZE: &str = "500";

#[derive(Args, Clone, Default)]
pub struct GlobalArgs {
    /// Path to the kubeconfig file to use.
    #[arg(long, global = true)]
    pub kubeconfig: Option<PathBuf>,
    /// The name of the kubeconfig context to use.
    #[arg(long, global = true)]
    pub context: Option<String>,
    /// The name of the kubeconfig cluster to use.
    #[arg(long, global = true)]
    pub cluster: Option<String>,
    /// The name of the kubeconfig user to use.
    #[arg(long, global = true)]
    pub user: Option<String>,
    /// If present, the namespace scope for this request.
    #[arg(short, long, global = true)]
    pub namespace: Option<String>,
    /// The address and port of the Kubernetes API server.
    #[arg(short, long, global = true)]
    pub server: Option<String>,
    /// Bearer token for authentication to the API server.
    #[arg(long, global = true)]
    pub token: Option<String>,
    /// Username to impersonate for the operation.
    #[arg(long = "as", global = true)]
    pub impersonate: Option<String>,
    /// Group to impersonate for the operation, may be repeated.
    #[arg(long = "as-group", global = true)]
    pub impersonate_groups: Vec<String>,
    /// If true, the server's certificate will not be checked for validity.
    #[arg(long, global = true)]
    pub insecure_skip_tls_verify: bool,
    /// The length of time to wait before giving up on a single server request; 0 waits for ever.
    #[arg(long, global = true, default_value = "0")]
    pub request_timeout: String,
    /// How much to say about requests: 6 and more prints each.
    #[arg(short = 'v', long = "v", global = true, default_value_t = 0)]
    pub verbosity: u8,
}

pub struct Context {
    pub args: GlobalArgs,
    connection: OnceCell<Connection>,
    discovery: OnceCell<Discovery>,
}

struct Connection {
    client: kube::Client,
    host: String,
    url: String,
}

/// Headers and query of a request beyond its path.
#[derive(Default)]
pub struct Ask<'a> {
    pub query: Vec<(&'a str, String)>,
    pub accept: Option<&'a str>,
    /// Content type and bytes.
    pub body: Option<(&'a str, Vec<u8>)>,
}

impl<'a> Ask<'a> {
    pub fn json(body: &Value) -> Self {
        Ask { body: Some((JSON, body.to_string().into_bytes())), ..Ask::default() }
    }

    pub fn patch(kind: &'a str, body: &Value) -> Self {
        Ask { body: Some((kind, body.to_string().into_bytes())), ..Ask::default() }
    }

    pub fn with(mut self, key: &'a str, value: impl Into<String>) -> Self {
        let value = value.into();
        if !value.is_empty() {
            self.query.push((key, value));
        }
        self
    }
}

/// One event of a watch: `ADDED`, `MODIFIED`, `DELETED`, `BOOKMARK`.
pub struct Event {
    pub kind: String,
    pub object: Value,
}

impl Context {
    pub fn new(args: GlobalArgs) -> Self {
        Context { args, connection: OnceCell::new(), discovery: OnceCell::new() }
    }

    /// A context over a client that is already there, as tests have it.
    pub fn with_client(client: kube::Client, args: GlobalArgs) -> Self {
        let connection = Connection { client, host: "test".into(), url: "http://test".into() };
        Context { connection: OnceCell::new_with(Some(connection)), ..Context::new(args) }
    }

    /// The namespace of the request: the flag, the context's, `default`.
    pub fn namespace(&self) -> Result<String> {
        if let Some(namespace) = &self.args.namespace {
            return Ok(namespace.clone());
        }
        let config = self.kubeconfig()?;
        let name = self.args.context.clone().or(config.current_context.clone()).unwrap_or_default();
        let context = config.contexts.iter().find(|c| c.name == name).and_then(|c| c.context.as_ref());
        let namespace = context.and_then(|c| c.namespace.clone()).filter(|n| !n.is_empty());
        Ok(namespace.unwrap_or_else(|| "default".into()))
    }

    /// Which kubeconfig files count, first wins; only those that exist unless named by `--kubeconfig`.
    pub fn kubeconfig_paths(&self) -> Vec<PathBuf> {
        if let Some(path) = &self.args.kubeconfig {
            return vec![path.clone()];
        }
        if let Some(list) = std::env::var_os("KUBECONFIG").filter(|l| !l.is_empty()) {
            return std::env::split_paths(&list).filter(|p| p.exists()).collect();
        }
        let home = std::env::var_os("HOME").map(|h| Path::new(&h).join(".kube/config"));
        let candidates = home.into_iter().chain([PathBuf::from(ADMIN_KUBECONFIG)]);
        candidates.filter(|p| p.exists()).take(1).collect()
    }

    pub fn kubeconfig(&self) -> Result<Kubeconfig> {
        let mut merged = Kubeconfig::default();
        for path in self.kubeconfig_paths() {
            let next = Kubeconfig::read_from(&path).map_err(|e| {
                Error::plain(format!("error loading config file {:?}: {e}", path.display().to_string()))
            })?;
            merged = merged.merge(next).map_err(|e| Error::plain(format!("merge kubeconfig files: {e}")))?;
        }
        Ok(merged)
    }

    async fn connect(&self) -> Result<Connection> {
        let mut kubeconfig = self.kubeconfig()?;
        self.check_names(&kubeconfig)?;
        if kubeconfig.clusters.is_empty() && self.args.server.is_none() {
            return Err(Error::Raw(
                "The connection to the server localhost:8080 was refused - did you specify the right host or port?\n\
                 There is no kubeconfig: start a cluster with `knarr up`, or set KUBECONFIG."
                    .into(),
            ));
        }
        let options = KubeConfigOptions {
            context: self.args.context.clone(),
            cluster: self.args.cluster.clone(),
            user: self.args.user.clone(),
        };
        let fail = |e: &dyn std::fmt::Display| Error::plain(format!("invalid configuration: {e}"));
        let mut config = if kubeconfig.contexts.is_empty() {
            kube::Config::new(self.args.server.as_deref().unwrap_or_default().parse().map_err(|e| fail(&e))?)
        } else {
            if options.context.is_none()
                && kubeconfig.current_context.as_deref().unwrap_or_default().is_empty()
            {
                kubeconfig.current_context = kubeconfig.contexts.first().map(|c| c.name.clone());
            }
            kube::Config::from_custom_kubeconfig(kubeconfig, &options).await.map_err(|e| fail(&e))?
        };
        self.override_config(&mut config)?;
        let url = config.cluster_url.to_string();
        let host = config.cluster_url.authority().map(ToString::to_string).unwrap_or_default();
        let client = kube::Client::try_from(config).map_err(|e| fail(&e))?;
        Ok(Connection { client, host, url })
    }

    fn check_names(&self, config: &Kubeconfig) -> Result<()> {
        let Some(name) = &self.args.context else { return Ok(()) };
        if config.contexts.iter().any(|c| &c.name == name) {
            return Ok(());
        }
        Err(Error::plain(format!("context {name:?} does not exist")))
    }

    fn override_config(&self, config: &mut kube::Config) -> Result<()> {
        // Watches, logs and terminals are silent for as long as nothing happens.
        (config.read_timeout, config.write_timeout) = (None, None);
        // A refused eviction is told and tried again by `drain`; the client must not do so in silence.
        config.default_retry = false;
        if let Some(server) = &self.args.server {
            let server = if server.contains("://") { server.clone() } else { format!("https://{server}") };
            config.cluster_url = server
                .parse()
                .map_err(|e| Error::plain(format!("invalid server address {server:?}: {e}")))?;
        }
        if let Some(token) = &self.args.token {
            config.auth_info.token = Some(token.clone().into());
        }
        if let Some(user) = &self.args.impersonate {
            config.auth_info.impersonate = Some(user.clone());
        }
        if !self.args.impersonate_groups.is_empty() {
            config.auth_info.impersonate_groups = Some(self.args.impersonate_groups.clone());
        }
        config.accept_invalid_certs |= self.args.insecure_skip_tls_verify;
        Ok(())
    }

    async fn connection(&self) -> Result<&Connection> {
        self.connection.get_or_try_init(|| self.connect()).await
    }

    /// For the streaming calls of `kube`: exec, attach, port-forward.
    pub async fn client(&self) -> Result<kube::Client> {
        Ok(self.connection().await?.client.clone())
    }

    /// The server's address, without a slash at its end.
    pub async fn server_url(&self) -> Result<String> {
        Ok(self.connection().await?.url.trim_end_matches('/').to_owned())
    }

    pub async fn discovery(&self) -> Result<&Discovery> {
        self.discovery.get_or_try_init(|| Discovery::load(self)).await
    }

    /// The resource of this name, in any of the forms users type.
    pub async fn resource(&self, name: &str) -> Result<&Resource> {
        self.discovery().await?.find(name)
    }

    async fn send(&self, method: Method, path: &str, ask: Ask<'_>) -> Result<http::Response<Body>> {
        let connection = self.connection().await?;
        let mut uri = path.to_owned();
        if !ask.query.is_empty() {
            let mut query = form_urlencoded::Serializer::new(String::new());
            query.extend_pairs(&ask.query);
            uri = format!("{path}?{}", query.finish());
        }
        let mut request =
            Request::builder().method(&method).uri(&uri).header("accept", ask.accept.unwrap_or(JSON));
        let body = ask.body.map(|(content_type, bytes)| {
            request = std::mem::take(&mut request).header("content-type", content_type);
            bytes
        });
        let request = request
            .body(Body::from(body.unwrap_or_default()))
            .map_err(|e| Error::plain(format!("invalid request {uri:?}: {e}")))?;
        let response =
            connection.client.send(request).await.map_err(|e| unreachable(&e, &connection.host))?;
        if self.args.verbosity >= 6 {
            eprintln!("{method} {}{uri} {}", connection.url.trim_end_matches('/'), response.status());
        }
        print_warnings(&response);
        if response.status().is_success() { Ok(response) } else { Err(refusal(response).await) }
    }

    /// Sends a request and reads the whole answer as text.
    pub async fn text(&self, method: Method, path: &str, ask: Ask<'_>) -> Result<String> {
        let read = async {
            let response = self.send(method, path, ask).await?;
            let host = &self.connection().await?.host;
            let bytes = response.into_body().collect().await.map_err(|e| unreachable(&e, host))?.to_bytes();
            String::from_utf8(bytes.to_vec()).map_err(|e| Error::plain(format!("answer of {path}: {e}")))
        };
        match self.request_timeout()? {
            None => read.await,
            Some(limit) => tokio::time::timeout(limit, read).await.unwrap_or_else(|_| {
                Err(Error::Raw(format!(
                    "Unable to connect to the server: context deadline exceeded (--request-timeout={})",
                    self.args.request_timeout
                )))
            }),
        }
    }

    /// Sends a request and reads the answer as JSON.
    pub async fn json(&self, method: Method, path: &str, ask: Ask<'_>) -> Result<Value> {
        let text = self.text(method, path, ask).await?;
        serde_json::from_str(&text).map_err(|e| Error::plain(format!("answer of {path} is not JSON: {e}")))
    }

    pub async fn get(&self, path: &str) -> Result<Value> {
        self.json(Method::GET, path, Ask::default()).await
    }

    /// A list with all its pages in one.
    pub async fn list(&self, path: &str, query: &[(&str, String)], accept: Option<&str>) -> Result<Value> {
        let items = if accept.is_some_and(|a| a.contains("as=Table")) { "rows" } else { "items" };
        let mut whole: Option<Value> = None;
        let mut next = String::new();
        loop {
            let mut ask = Ask { query: query.to_vec(), accept, body: None }.with("limit", PAGE_SIZE);
            ask = ask.with("continue", next);
            let mut page = self.json(Method::GET, path, ask).await?;
            next = page.str_at("metadata.continue").to_owned();
            let list = page.get_mut(items).map(Value::take);
            match &mut whole {
                None => {
                    page[items] = list.filter(Value::is_array).unwrap_or_else(|| json!([]));
                    whole = Some(page);
                }
                Some(all) => {
                    if let (Some(all), Some(Value::Array(more))) = (all[items].as_array_mut(), list) {
                        all.extend(more);
                    }
                }
            }
            if next.is_empty() {
                return Ok(whole.unwrap_or_default());
            }
        }
    }

    /// The lines of an answer that may never end: logs, watches.
    pub async fn stream(&self, path: &str, ask: Ask<'_>) -> Result<impl AsyncBufRead + Unpin + Send + use<>> {
        let response = self.send(Method::GET, path, ask).await?;
        Ok(response.into_body().into_data_stream().map_err(std::io::Error::other).boxed().into_async_read())
    }

    /// Watches from a resource version; the stream ends when the server ends it.
    pub async fn watch(
        &self,
        path: &str,
        query: &[(&str, String)],
        resource_version: &str,
        accept: Option<&str>,
    ) -> Result<impl futures::Stream<Item = Result<Event>> + Unpin + use<>> {
        use futures::AsyncBufReadExt;
        let ask = Ask { query: query.to_vec(), accept, body: None }
            .with("watch", "true")
            .with("resourceVersion", resource_version);
        let lines = self.stream(path, ask).await?.lines();
        Ok(lines.map(|line| parse_event(&line?)).boxed())
    }

    fn request_timeout(&self) -> Result<Option<Duration>> {
        let text = &self.args.request_timeout;
        let limit = parse_duration(text).ok_or_else(|| {
            Error::plain(format!("Invalid timeout value {text:?}. Timeout must be a single integer in seconds, or an integer followed by a corresponding time unit (e.g. 1s | 2m | 3h)"))
        })?;
        Ok((!limit.is_zero()).then_some(limit))
    }
}

fn parse_event(line: &str) -> Result<Event> {
    let mut event: Value = serde_json::from_str(line)
        .map_err(|e| Error::plain(format!("unable to decode an event from the watch stream: {e}")))?;
    let object = event["object"].take();
    match event.str_at("type") {
        "ERROR" => Err(Error::Server { status: object, during: None }),
        kind => Ok(Event { kind: kind.to_owned(), object }),
    }
}

/// `Warning: ...` for each `299` warning header, as client-go prints them.
fn print_warnings(response: &http::Response<Body>) {
    for header in response.headers().get_all("warning") {
        let text = header.to_str().unwrap_or_default();
        if let Some(words) = warning_words(text) {
            eprintln!("Warning: {words}");
        }
    }
}

/// What a warning header says: `299 - "it is \"so\""` says `it is "so"`.
fn warning_words(header: &str) -> Option<String> {
    let (_, quoted) = header.split_once('"')?;
    Some(quoted.strip_suffix('"').unwrap_or(quoted).replace("\\\"", "\""))
}

async fn refusal(response: http::Response<Body>) -> Error {
    let code = response.status();
    let bytes = response.into_body().collect().await.map(|b| b.to_bytes()).unwrap_or_default();
    match serde_json::from_slice::<Value>(&bytes) {
        Ok(status) if status.str_at("kind") == "Status" => Error::Server { status, during: None },
        _ => {
            let body = String::from_utf8_lossy(&bytes);
            let message = if body.trim().is_empty() {
                format!("the server answered {code}")
            } else {
                body.trim().to_owned()
            };
            let reason = if code == http::StatusCode::NOT_FOUND { "NotFound" } else { "" };
            Error::Server {
                status: json!({ "message": message, "reason": reason, "code": code.as_u16() }),
                during: None,
            }
        }
    }
}

/// Go's durations (`1h30m`, `250ms`), or a bare number of seconds.
pub fn parse_duration(text: &str) -> Option<Duration> {
    if let Ok(seconds) = text.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let mut total = 0.0;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit_len = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        total += number
            * match &rest[..unit_len] {
                "h" => 3600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 1e-3,
                "us" | "µs" => 1e-6,
                "ns" => 1e-9,
                _ => return None,
            };
        rest = &rest[unit_len..];
    }
    Duration::try_from_secs_f64(total).ok().filter(|_| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_within_a_warning_stay() {
        for (header, words) in [
            (r#"299 - "unknown field \"spec.x\"""#, Some(r#"unknown field "spec.x""#)),
            (r#"299 - "it is old""#, Some("it is old")),
            ("299", None),
        ] {
            assert_eq!(warning_words(header).as_deref(), words, "{header}");
        }
    }

    #[test]
    fn durations_are_gos() {
        for (text, millis) in [("5", 5000), ("1m30s", 90_000), ("250ms", 250), ("1.5h", 5_400_000), ("0s", 0)]
        {
            assert_eq!(parse_duration(text), Some(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "x", "5y", "-1s"] {
            assert_eq!(parse_duration(text), None, "{text}");
        }
    }
}
