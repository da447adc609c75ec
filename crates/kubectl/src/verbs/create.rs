//! `create`: from manifests, or from a few words for the common kinds.

use base64::Engine;
use http::Method;
use knarr_api::object::Object;
use serde_json::{Map, Value, json};

use crate::context::{Ask, Context};
use crate::error::{Error, Result};
use crate::manifest;
use crate::merge;
use crate::output::OutputArgs;
use crate::verbs::apply::{DryRunArgs, ValidateArgs, locate};
use crate::verbs::expose::pairs;

#[derive(clap::Args)]
pub struct Args {
    #[arg(short, long)]
    filename: Vec<String>,
    #[arg(short = 'R', long)]
    recursive: bool,
    #[command(flatten)]
    validate: ValidateArgs,
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    kind: Option<Kind>,
}

/// The flags all forms share.
#[derive(clap::Args, Default)]
struct Common {
    #[command(flatten)]
    dry_run: DryRunArgs,
    #[command(flatten)]
    output: OutputArgs,
    /// Keep the configuration in the object's annotation, for a later apply.
    #[arg(long)]
    save_config: bool,
    #[arg(long, default_value = "kubectl-create")]
    field_manager: String,
}

#[derive(clap::Subcommand)]
enum Kind {
    /// Create a namespace with the specified name.
    #[command(alias = "ns")]
    Namespace(Named),
    /// Create a deployment with the specified name.
    #[command(alias = "deploy")]
    Deployment(DeploymentArgs),
    /// Create a config map from a local file, directory or literal value.
    #[command(alias = "cm")]
    Configmap(DataArgs),
    /// Create a secret.
    Secret(SecretArgs),
    /// Create a service.
    #[command(alias = "svc")]
    Service(ServiceArgs),
    /// Create a service account with the specified name.
    #[command(alias = "sa")]
    Serviceaccount(Named),
    /// Create a job with the specified name.
    Job(JobArgs),
    /// Create a role with single rule.
    Role(RoleArgs),
    /// Create a cluster role.
    Clusterrole(RoleArgs),
    /// Create a role binding for a particular role or cluster role.
    Rolebinding(BindingArgs),
    /// Create a cluster role binding for a particular cluster role.
    Clusterrolebinding(BindingArgs),
    /// Request a service account token.
    Token(TokenArgs),
}

#[derive(clap::Args)]
struct Named {
    name: String,
    #[command(flatten)]
    common: Common,
}

#[derive(clap::Args)]
struct DeploymentArgs {
    name: String,
    #[arg(long, required = true)]
    image: Vec<String>,
    #[arg(short, long, default_value_t = 1)]
    replicas: i64,
    #[arg(long)]
    port: Option<u16>,
    #[command(flatten)]
    common: Common,
    #[arg(last = true)]
    command: Vec<String>,
}

#[derive(clap::Args)]
struct JobArgs {
    name: String,
    #[arg(long)]
    image: Option<String>,
    /// The cron job to take the job from: cronjob/NAME.
    #[arg(long)]
    from: Option<String>,
    #[command(flatten)]
    common: Common,
    #[arg(last = true)]
    command: Vec<String>,
}

#[derive(clap::Args)]
struct DataArgs {
    name: String,
    /// KEY=VALUE
    #[arg(long)]
    from_literal: Vec<String>,
    /// [KEY=]PATH of a file, or a directory.
    #[arg(long)]
    from_file: Vec<String>,
    /// A file of KEY=VALUE lines.
    #[arg(long)]
    from_env_file: Vec<String>,
    /// The type of a secret.
    #[arg(long)]
    r#type: Option<String>,
    #[command(flatten)]
    common: Common,
}

#[derive(clap::Args)]
struct SecretArgs {
    #[command(subcommand)]
    kind: SecretKind,
}

#[derive(clap::Subcommand)]
enum SecretKind {
    /// Create a secret from a local file, directory, or literal value.
    Generic(DataArgs),
    /// Create a TLS secret.
    Tls {
        name: String,
        #[arg(long)]
        cert: String,
        #[arg(long)]
        key: String,
        #[command(flatten)]
        common: Common,
    },
    /// Create a secret for use with a registry.
    DockerRegistry {
        name: String,
        #[arg(long, default_value = "https://index.docker.io/v1/")]
        docker_server: String,
        #[arg(long)]
        docker_username: String,
        #[arg(long)]
        docker_password: String,
        #[arg(long, default_value = "")]
        docker_email: String,
        #[command(flatten)]
        common: Common,
    },
}

#[derive(clap::Args)]
struct ServiceArgs {
    #[command(subcommand)]
    kind: ServiceKind,
}

#[derive(clap::Subcommand)]
enum ServiceKind {
    Clusterip(PortsArgs),
    Nodeport(PortsArgs),
    Loadbalancer(PortsArgs),
    Externalname {
        name: String,
        #[arg(long)]
        external_name: String,
        #[command(flatten)]
        common: Common,
    },
}

#[derive(clap::Args)]
struct PortsArgs {
    name: String,
    /// PORT[:TARGET]
    #[arg(long, value_delimiter = ',')]
    tcp: Vec<String>,
    #[arg(long)]
    node_port: Option<u16>,
    /// "None" makes a headless service.
    #[arg(long)]
    clusterip: Option<String>,
    #[command(flatten)]
    common: Common,
}

#[derive(clap::Args)]
struct RoleArgs {
    name: String,
    #[arg(long, value_delimiter = ',')]
    verb: Vec<String>,
    /// RESOURCE[.GROUP][/SUBRESOURCE]
    #[arg(long, value_delimiter = ',')]
    resource: Vec<String>,
    #[arg(long)]
    resource_name: Vec<String>,
    #[arg(long, value_delimiter = ',')]
    non_resource_url: Vec<String>,
    #[command(flatten)]
    common: Common,
}

#[derive(clap::Args)]
struct BindingArgs {
    name: String,
    #[arg(long)]
    role: Option<String>,
    #[arg(long)]
    clusterrole: Option<String>,
    #[arg(long)]
    group: Vec<String>,
    /// NAMESPACE:NAME
    #[arg(long)]
    serviceaccount: Vec<String>,
    #[command(flatten)]
    common: Common,
}

#[derive(clap::Args)]
struct TokenArgs {
    name: String,
    #[arg(long)]
    audience: Vec<String>,
    /// How long the token is valid; the server's default where not given.
    #[arg(long)]
    duration: Option<String>,
    #[command(flatten)]
    common: Common,
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    let Some(kind) = args.kind else { return from_files(context, &args).await };
    let (object, common) = match kind {
        Kind::Namespace(a) => (json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": a.name } }), a.common),
        Kind::Serviceaccount(a) => (json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": { "name": a.name } }), a.common),
        Kind::Deployment(a) => (deployment(&a)?, a.common),
        Kind::Configmap(a) => (config_map(&a)?, a.common),
        Kind::Secret(a) => secret(a.kind)?,
        Kind::Service(a) => service(a.kind)?,
        Kind::Job(a) => (job(context, &a).await?, a.common),
        Kind::Role(a) => (role(context, "Role", &a).await?, a.common),
        Kind::Clusterrole(a) => (role(context, "ClusterRole", &a).await?, a.common),
        Kind::Rolebinding(a) => (binding(context, "RoleBinding", &a)?, a.common),
        Kind::Clusterrolebinding(a) => (binding(context, "ClusterRoleBinding", &a)?, a.common),
        Kind::Token(a) => return token(context, &a).await,
    };
    // `--user` of a binding names its subject, not an entry of the kubeconfig.
    if object.str_at("kind").ends_with("RoleBinding") && context.args.user.is_some() {
        let context = Context::new(crate::context::GlobalArgs { user: None, ..context.args.clone() });
        return send(&context, &common, object, "").await;
    }
    send(context, &common, object, "").await
}

async fn from_files(context: &Context, args: &Args) -> Result<()> {
    let mut errors = Vec::new();
    for document in manifest::read(&args.filename, args.recursive)? {
        let query = [("fieldValidation", args.validate.level())];
        if let Err(error) = create(context, &args.common, document.object, &document.source, &query).await {
            errors.push(error);
        }
    }
    Error::collect(errors)
}

async fn send(context: &Context, common: &Common, object: Value, source: &str) -> Result<()> {
    let failed = failure_words(&object);
    create(context, common, object, source, &[("fieldValidation", "Strict")]).await.map_err(|error| match (error, failed) {
        (Error::Server { status, .. }, Some(failed)) => Error::plain(format!("{failed} {}", status.str_at("message"))),
        (other, _) => other,
    })
}

/// What upstream says before the server's refusal; of some kinds it prints the refusal itself.
fn failure_words(object: &Value) -> Option<String> {
    match object.str_at("kind") {
        "Namespace" | "Role" | "ClusterRole" => None,
        "Secret" => Some("failed to create secret".into()),
        "Service" => Some(format!("failed to create {} service:", object.str_at("spec.type"))),
        kind => Some(format!("failed to create {}:", kind.to_lowercase())),
    }
}

async fn create(context: &Context, common: &Common, mut object: Value, source: &str, query: &[(&'static str, &str)]) -> Result<()> {
    let (resource, namespace) = match locate(context, &object).await {
        Ok(found) => found,
        // A dry run of the client needs no server.
        Err(Error::Raw(_)) if common.dry_run.is_client() => return print_unsent(common, &object),
        Err(error) => return Err(error),
    };
    if let (Some(namespace), true) = (&namespace, context.args.namespace.is_some() || !source.is_empty()) {
        object.set_at("metadata.namespace", namespace.clone());
    }
    if common.save_config {
        object = merge::with_last_applied(&object);
    }
    let words = common.dry_run.words("created");
    if common.dry_run.is_client() {
        return common.output.done(&resource.named(object.name()), &object, &words);
    }
    let mut ask = Ask::json(&object).with("fieldManager", common.field_manager.clone());
    for (key, value) in query {
        ask = ask.with(key, *value);
    }
    let path = resource.path(namespace.as_deref(), None);
    let created = context.json(Method::POST, &path, common.dry_run.ask(ask)).await.map_err(|e| e.when("creating", source))?;
    common.output.done(&resource.named(created.name()), &created, &words)
}

fn print_unsent(common: &Common, object: &Value) -> Result<()> {
    let group = object.str_at("apiVersion").split_once('/').map(|(g, _)| format!(".{g}")).unwrap_or_default();
    let named = format!("{}{group}/{}", object.str_at("kind").to_lowercase(), object.name());
    common.output.done(&named, object, &common.dry_run.words("created"))
}

/// `nginx` of `registry/nginx:latest@sha256:...`.
fn container_name(image: &str) -> String {
    let image = image.rsplit('/').next().unwrap_or(image);
    let image = image.split(['@', ':']).next().unwrap_or(image);
    image.to_lowercase().chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '-' }).collect()
}

fn deployment(args: &DeploymentArgs) -> Result<Value> {
    if args.image.len() > 1 && !args.command.is_empty() {
        return Err(Error::plain("cannot specify multiple --image options and command"));
    }
    let labels = json!({ "app": args.name });
    let containers: Vec<Value> = args
        .image
        .iter()
        .map(|image| {
            let mut container = json!({ "name": container_name(image), "image": image, "resources": {} });
            if !args.command.is_empty() {
                container["command"] = json!(args.command);
            }
            if let Some(port) = args.port {
                container["ports"] = json!([{ "containerPort": port }]);
            }
            container
        })
        .collect();
    Ok(json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": { "name": args.name, "labels": labels },
        "spec": {
            "replicas": args.replicas, "selector": { "matchLabels": labels }, "strategy": {},
            "template": { "metadata": { "labels": labels }, "spec": { "containers": containers } },
        },
        "status": {},
    }))
}

async fn job(context: &Context, args: &JobArgs) -> Result<Value> {
    let metadata = json!({ "name": args.name });
    match (&args.image, &args.from) {
        (Some(image), None) => {
            let mut container = json!({ "name": args.name, "image": image, "resources": {} });
            if !args.command.is_empty() {
                container["command"] = json!(args.command);
            }
            let template = json!({ "metadata": {}, "spec": { "containers": [container], "restartPolicy": "Never" } });
            Ok(json!({ "apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": { "template": template }, "status": {} }))
        }
        (None, Some(from)) => {
            let source = crate::target::fetch_one(context, std::slice::from_ref(from), "").await?;
            if source.resource.kind != "CronJob" {
                return Err(Error::plain(format!("from must be an existing cronjob, not {}", source.named())));
            }
            let spec = source.object.at("spec.jobTemplate.spec").cloned().unwrap_or_default();
            let mut annotations = source.object.map_at("spec.jobTemplate.metadata.annotations").cloned().unwrap_or_default();
            annotations.insert("cronjob.kubernetes.io/instantiate".into(), json!("manual"));
            let owner = json!([{ "apiVersion": "batch/v1", "kind": "CronJob", "name": source.object.name(), "uid": source.object.uid(), "controller": true }]);
            Ok(json!({ "apiVersion": "batch/v1", "kind": "Job",
                "metadata": { "name": args.name, "annotations": annotations, "labels": source.object.at("spec.jobTemplate.metadata.labels"), "ownerReferences": owner }, "spec": spec }))
        }
        _ => Err(Error::plain("either --image or --from must be specified")),
    }
}

/// Key and bytes from literals, files and env files.
fn data(args: &DataArgs) -> Result<Vec<(String, Vec<u8>)>> {
    let mut data = Vec::new();
    for literal in &args.from_literal {
        let (key, value) = literal.split_once('=').ok_or_else(|| Error::plain(format!("invalid literal source {literal}, expected key=value")))?;
        let value = value.strip_prefix('"').and_then(|v| v.strip_suffix('"')).unwrap_or(value);
        data.push((key.to_owned(), value.as_bytes().to_vec()));
    }
    for source in &args.from_file {
        let (key, path) = source.split_once('=').map_or((None, source.as_str()), |(k, p)| (Some(k), p));
        read_source(key, std::path::Path::new(path), &mut data)?;
    }
    for path in &args.from_env_file {
        let text = std::fs::read_to_string(path).map_err(|e| Error::plain(format!("error reading {path}: {e}")))?;
        for line in text.lines().map(str::trim_start).filter(|l| !l.is_empty() && !l.starts_with('#')) {
            let (key, value) = match line.split_once('=') {
                Some((key, value)) => (key, value.to_owned()),
                None => (line, std::env::var(line).unwrap_or_default()),
            };
            data.push((key.to_owned(), value.into_bytes()));
        }
    }
    let mut keys: Vec<&String> = data.iter().map(|(k, _)| k).collect();
    keys.sort();
    if let Some(twice) = keys.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::plain(format!("cannot add key {:?}, another key by that name already exists", twice[0])));
    }
    Ok(data)
}

fn read_source(key: Option<&str>, path: &std::path::Path, data: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
    let fail = |e: std::io::Error| Error::plain(format!("error reading {}: {e}", path.display()));
    let base = |p: &std::path::Path| p.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    if !path.is_dir() {
        let key = key.map_or_else(|| base(path), str::to_owned);
        data.push((key, std::fs::read(path).map_err(fail)?));
        return Ok(());
    }
    let mut files: Vec<_> = std::fs::read_dir(path).map_err(fail)?.filter_map(|e| e.ok().map(|e| e.path())).filter(|p| p.is_file()).collect();
    files.sort();
    for file in files {
        data.push((base(&file), std::fs::read(&file).map_err(fail)?));
    }
    Ok(())
}

fn config_map(args: &DataArgs) -> Result<Value> {
    let (mut text, mut binary) = (Map::new(), Map::new());
    for (key, bytes) in data(args)? {
        match String::from_utf8(bytes) {
            Ok(value) => text.insert(key, value.into()),
            Err(error) => binary.insert(key, encode(error.as_bytes())),
        };
    }
    let mut object = json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": args.name } });
    for (field, map) in [("data", text), ("binaryData", binary)] {
        if !map.is_empty() {
            object[field] = Value::Object(map);
        }
    }
    Ok(object)
}

fn encode(bytes: &[u8]) -> Value {
    base64::engine::general_purpose::STANDARD.encode(bytes).into()
}

fn secret(kind: SecretKind) -> Result<(Value, Common)> {
    let (name, type_name, data, common) = match kind {
        SecretKind::Generic(args) => {
            let pairs = data(&args)?;
            let type_name = args.r#type.clone().unwrap_or_default();
            (args.name, type_name, pairs, args.common)
        }
        SecretKind::Tls { name, cert, key, common } => {
            let read = |path: &str| std::fs::read(path).map_err(|e| Error::plain(format!("open {path}: {e}")));
            let pairs = vec![("tls.crt".to_owned(), read(&cert)?), ("tls.key".to_owned(), read(&key)?)];
            (name, "kubernetes.io/tls".to_owned(), pairs, common)
        }
        SecretKind::DockerRegistry { name, docker_server, docker_username, docker_password, docker_email, common } => {
            let auth = encode(format!("{docker_username}:{docker_password}").as_bytes());
            let mut entry = json!({ "username": docker_username, "password": docker_password, "auth": auth });
            if !docker_email.is_empty() {
                entry["email"] = docker_email.into();
            }
            let config = json!({ "auths": { docker_server: entry } }).to_string();
            (name, "kubernetes.io/dockerconfigjson".to_owned(), vec![(".dockerconfigjson".to_owned(), config.into_bytes())], common)
        }
    };
    let mut object = json!({ "apiVersion": "v1", "kind": "Secret", "metadata": { "name": name } });
    if !type_name.is_empty() {
        object["type"] = type_name.into();
    }
    if !data.is_empty() {
        object["data"] = Value::Object(data.into_iter().map(|(k, v)| (k, encode(&v))).collect());
    }
    Ok((object, common))
}

fn service(kind: ServiceKind) -> Result<(Value, Common)> {
    let (type_name, args) = match kind {
        ServiceKind::Clusterip(args) => ("ClusterIP", args),
        ServiceKind::Nodeport(args) => ("NodePort", args),
        ServiceKind::Loadbalancer(args) => ("LoadBalancer", args),
        ServiceKind::Externalname { name, external_name, common } => {
            let labels = json!({ "app": name });
            let object = json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": name, "labels": labels },
                "spec": { "type": "ExternalName", "externalName": external_name, "selector": labels } });
            return Ok((object, common));
        }
    };
    let headless = args.clusterip.as_deref() == Some("None");
    if args.tcp.is_empty() && !headless {
        return Err(Error::plain("at least one tcp port specifier must be provided"));
    }
    let mut ports = Vec::new();
    for text in &args.tcp {
        let (port, target) = text.split_once(':').unwrap_or((text, text));
        let number: u16 = port.parse().map_err(|_| Error::plain(format!("invalid port {port:?}")))?;
        let target = target.parse::<u16>().map_or_else(|_| json!(target), |n| json!(n));
        let mut made = json!({ "name": text.replace(':', "-"), "port": number, "protocol": "TCP", "targetPort": target });
        if let Some(node_port) = args.node_port {
            made["nodePort"] = node_port.into();
        }
        ports.push(made);
    }
    let labels = json!({ "app": args.name });
    let mut spec = json!({ "type": type_name, "selector": labels, "ports": ports });
    if let Some(ip) = &args.clusterip {
        spec["clusterIP"] = json!(ip);
    }
    Ok((json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": args.name, "labels": labels }, "spec": spec }), args.common))
}

async fn role(context: &Context, kind: &str, args: &RoleArgs) -> Result<Value> {
    if args.verb.is_empty() {
        return Err(Error::plain("at least one verb must be specified"));
    }
    let mut rules = Vec::new();
    let mut by_group: Vec<(String, Vec<String>)> = Vec::new();
    for word in &args.resource {
        let (name, sub) = word.split_once('/').map_or((word.as_str(), String::new()), |(n, s)| (n, format!("/{s}")));
        let (group, plural) = if name == "*" {
            ("*".to_owned(), name.to_owned())
        } else {
            let resource = context.resource(name).await?;
            (resource.group.clone(), resource.plural.clone())
        };
        let entry = format!("{plural}{sub}");
        match by_group.iter_mut().find(|(g, _)| *g == group) {
            Some((_, list)) => list.push(entry),
            None => by_group.push((group, vec![entry])),
        }
    }
    for (group, resources) in by_group {
        let mut rule = json!({ "apiGroups": [group], "resources": resources, "verbs": args.verb });
        if !args.resource_name.is_empty() {
            rule["resourceNames"] = json!(args.resource_name);
        }
        rules.push(rule);
    }
    if !args.non_resource_url.is_empty() {
        rules.push(json!({ "nonResourceURLs": args.non_resource_url, "verbs": args.verb }));
    }
    if rules.is_empty() {
        return Err(Error::plain("at least one resource must be specified"));
    }
    Ok(json!({ "apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, "metadata": { "name": args.name }, "rules": rules }))
}

fn binding(context: &Context, kind: &str, args: &BindingArgs) -> Result<Value> {
    const GROUP: &str = "rbac.authorization.k8s.io";
    let (role_kind, role) = match (&args.clusterrole, &args.role) {
        (Some(role), None) => ("ClusterRole", role),
        (None, Some(role)) => ("Role", role),
        _ => return Err(Error::plain("exactly one of clusterrole or role must be specified")),
    };
    let mut subjects = Vec::new();
    // `--user` is also the kubeconfig's user; upstream gives it the meaning of a subject here.
    if let Some(user) = &context.args.user {
        subjects.push(json!({ "apiGroup": GROUP, "kind": "User", "name": user }));
    }
    for group in &args.group {
        subjects.push(json!({ "apiGroup": GROUP, "kind": "Group", "name": group }));
    }
    for account in &args.serviceaccount {
        let (namespace, name) = account.split_once(':').ok_or_else(|| Error::plain("serviceaccount must be <namespace>:<name>"))?;
        subjects.push(json!({ "kind": "ServiceAccount", "name": name, "namespace": namespace }));
    }
    Ok(json!({ "apiVersion": format!("{GROUP}/v1"), "kind": kind, "metadata": { "name": args.name },
        "roleRef": { "apiGroup": GROUP, "kind": role_kind, "name": role }, "subjects": subjects }))
}

async fn token(context: &Context, args: &TokenArgs) -> Result<()> {
    let mut spec = json!({});
    if !args.audience.is_empty() {
        spec["audiences"] = json!(args.audience);
    }
    if let Some(duration) = &args.duration {
        let seconds = crate::context::parse_duration(duration).ok_or_else(|| Error::plain(format!("invalid duration {duration:?}")))?;
        spec["expirationSeconds"] = seconds.as_secs().into();
    }
    let path = format!("/api/v1/namespaces/{}/serviceaccounts/{}/token", context.namespace()?, args.name);
    let request = json!({ "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec });
    let answer = context.json(Method::POST, &path, Ask::json(&request)).await.map_err(|e| {
        if e.is_not_found() { Error::plain(format!("failed to create token: {}", e.message())) } else { e }
    })?;
    if args.common.output.output.is_some() {
        return args.common.output.done("tokenrequest.authentication.k8s.io", &answer, "created");
    }
    println!("{}", answer.str_at("status.token"));
    Ok(())
}

/// Labels given as `a=b,c=d`, for the verbs that make objects.
pub fn labels(text: &str) -> Result<Value> {
    pairs(text).map(Value::Object)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_are_named_after_their_image() {
        for (image, name) in [("nginx", "nginx"), ("nginx:latest", "nginx"), ("r.example:5000/a/Redis_x:1", "redis-x"), ("a@sha256:0", "a")] {
            assert_eq!(container_name(image), name, "{image}");
        }
    }
}
