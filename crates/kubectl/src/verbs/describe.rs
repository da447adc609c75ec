//! `describe`: everything about an object a person asks for first, and the events at the end.

mod limits;

use knarr_api::object::Object;
use serde_json::{Map, Value};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::output::labels_text;
use crate::pods;
use crate::table::{DESCRIBE, align};
use crate::target::{self, Found};
use crate::verbs::get::age_of;
use crate::workload::{controlled_by, selector_text};

/// The annotation that would print the object twice.
const LAST_APPLIED: &str = crate::merge::LAST_APPLIED;

#[derive(clap::Args)]
pub struct Args {
    words: Vec<String>,
    #[arg(short, long)]
    filename: Vec<String>,
    #[arg(short = 'l', long)]
    selector: Option<String>,
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// If true, display events related to the described object.
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "true")]
    show_events: bool,
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    let mut words = args.words.clone();
    for document in if args.filename.is_empty() { Vec::new() } else { crate::manifest::read(&args.filename, false)? } {
        words.push(format!("{}/{}", document.object.str_at("kind"), document.object.name()));
    }
    if words.is_empty() {
        return Err(Error::plain("You must specify the type of resource to describe. Use \"kubectl api-resources\" for a complete list of supported resources."));
    }
    let found = find(context, &args, &words).await?;
    if found.is_empty() {
        eprintln!("No resources found in {} namespace.", context.namespace()?);
    }
    for (index, found) in found.iter().enumerate() {
        if index > 0 {
            print!("\n\n");
        }
        let mut doc = describe(context, found).await?;
        if args.show_events && has_events(found) {
            events(context, found, &mut doc).await?;
        }
        print!("{}", align(&doc.text, DESCRIBE));
    }
    Ok(())
}

/// Kinds that upstream's describer shows no events of.
fn has_events(found: &Found) -> bool {
    !matches!(
        found.resource.kind.as_str(),
        "Secret" | "Namespace" | "ResourceQuota" | "LimitRange" | "Role" | "ClusterRole" | "RoleBinding" | "ClusterRoleBinding"
    )
}

/// Exact names; a name that is none also stands for all that begin with it, as upstream has it.
async fn find(context: &Context, args: &Args, words: &[String]) -> Result<Vec<Found>> {
    let selector = args.selector.as_deref();
    match (target::fetch(context, words, selector, None, args.all_namespaces).await, words) {
        (Err(error), [kind, prefix]) if error.is_not_found() => {
            let all = target::fetch(context, std::slice::from_ref(kind), None, None, false).await?;
            let begun: Vec<Found> = all.into_iter().filter(|f| f.object.name().starts_with(prefix.as_str())).collect();
            if begun.is_empty() { Err(error) } else { Ok(begun) }
        }
        (result, _) => result,
    }
}

/// Text in the making: tabs separate columns, aligned at the end.
#[derive(Default)]
pub struct Doc {
    pub text: String,
}

impl Doc {
    pub fn line(&mut self, level: usize, text: &str) {
        self.text.extend(std::iter::repeat_n("  ", level));
        self.text.push_str(text);
        self.text.push('\n');
    }

    /// `Name:  value`.
    pub fn field(&mut self, level: usize, name: &str, value: impl std::fmt::Display) {
        self.line(level, &format!("{name}:\t{value}"));
    }

    fn field_if(&mut self, level: usize, name: &str, value: &str) {
        if !value.is_empty() {
            self.field(level, name, value);
        }
    }

    /// A map, one pair a line, the name on the first.
    fn map(&mut self, level: usize, name: &str, map: Option<&Map<String, Value>>, separator: &str) {
        let pairs: Vec<String> = map
            .into_iter()
            .flatten()
            .filter(|(key, _)| *key != LAST_APPLIED)
            .map(|(key, value)| format!("{key}{separator}{}", crate::jsonpath::print(value).replace('\n', "\\n")))
            .collect();
        self.list(level, name, &pairs);
    }

    fn list(&mut self, level: usize, name: &str, items: &[String]) {
        let Some((first, rest)) = items.split_first() else { return self.field(level, name, "<none>") };
        self.field(level, name, first);
        for item in rest {
            self.line(level, &format!("\t{item}"));
        }
    }

    fn head(&mut self, object: &Value) {
        self.field(0, "Name", object.name());
        if !object.namespace().is_empty() {
            self.field(0, "Namespace", object.namespace());
        }
    }

    fn labels_and_annotations(&mut self, object: &Value) {
        self.map(0, "Labels", object.map_at("metadata.labels"), "=");
        self.map(0, "Annotations", object.map_at("metadata.annotations"), ": ");
    }

    /// The `Pod Template` of a workload, from its labels to its volumes.
    pub fn pod_template(&mut self, template: &Value, level: usize) {
        let indent = level;
        let labels = template.map_at("metadata.labels");
        let pairs: Vec<String> = labels.into_iter().flatten().map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or_default())).collect();
        self.list(indent, "Labels", &pairs);
        if template.map_at("metadata.annotations").is_some_and(|m| !m.is_empty()) {
            self.map(indent, "Annotations", template.map_at("metadata.annotations"), ": ");
        }
        self.field_if(indent, "Service Account", template.str_at("spec.serviceAccountName"));
        let none = Value::Null;
        for (title, list) in [("Init Containers", "spec.initContainers"), ("Containers", "spec.containers")] {
            if !template.list_at(list).is_empty() {
                self.containers(indent, title, template.list_at(list), &none);
            }
        }
        self.volumes(indent, template.list_at("spec.volumes"));
        self.field_if(indent, "Priority Class Name", template.str_at("spec.priorityClassName"));
        self.map(indent, "Node-Selectors", template.map_at("spec.nodeSelector"), "=");
        self.list(indent, "Tolerations", &tolerations(template.list_at("spec.tolerations")));
    }

    fn containers(&mut self, level: usize, title: &str, containers: &[Value], status: &Value) {
        self.line(level, &format!("{title}:"));
        for container in containers {
            let name = container.str_at("name");
            self.line(level + 1, &format!("{name}:"));
            let state = status.as_array().into_iter().flatten().find(|s| s.str_at("name") == name);
            self.container(level + 2, container, state);
        }
    }

    fn container(&mut self, level: usize, container: &Value, status: Option<&Value>) {
        if let Some(status) = status {
            self.field(level, "Container ID", status.str_at("containerID"));
        }
        self.field(level, "Image", container.str_at("image"));
        if let Some(status) = status {
            self.field(level, "Image ID", status.str_at("imageID"));
        }
        let ports = container.list_at("ports");
        let join = |field: &str| -> String {
            let all: Vec<String> = ports.iter().map(|p| format!("{}/{}", p.int_at(field).unwrap_or(0), p.at("protocol").and_then(Value::as_str).unwrap_or("TCP"))).collect();
            if all.is_empty() { "<none>".into() } else { all.join(", ") }
        };
        let (one, many) = if ports.len() > 1 { ("Ports", "Host Ports") } else { ("Port", "Host Port") };
        self.field(level, one, join("containerPort"));
        self.field(level, many, join("hostPort"));
        self.words(level, "Command", container.list_at("command"));
        self.words(level, "Args", container.list_at("args"));
        if let Some(status) = status {
            self.state(level, "State", status.at("state"));
            if status.map_at("lastState").is_some_and(|m| !m.is_empty()) {
                self.state(level, "Last State", status.at("lastState"));
            }
            self.field(level, "Ready", if status.bool_at("ready") { "True" } else { "False" });
            self.field(level, "Restart Count", status.int_at("restartCount").unwrap_or(0));
        }
        for (title, field) in [("Limits", "resources.limits"), ("Requests", "resources.requests")] {
            self.amounts(level, title, container.map_at(field));
        }
        for (title, field) in [("Liveness", "livenessProbe"), ("Readiness", "readinessProbe"), ("Startup", "startupProbe")] {
            if let Some(probe) = container.at(field) {
                self.field(level, title, probe_text(probe));
            }
        }
        self.env(level, container);
        self.mounts(level, container.list_at("volumeMounts"));
    }

    fn words(&mut self, level: usize, title: &str, words: &[Value]) {
        if words.is_empty() {
            return;
        }
        self.line(level, &format!("{title}:"));
        for line in words.iter().flat_map(|w| w.as_str().unwrap_or_default().lines()) {
            self.line(level + 1, line);
        }
    }

    fn amounts(&mut self, level: usize, title: &str, amounts: Option<&Map<String, Value>>) {
        let Some(amounts) = amounts.filter(|a| !a.is_empty()) else { return };
        self.line(level, &format!("{title}:"));
        for (name, amount) in amounts {
            self.field(level + 1, name, crate::jsonpath::print(amount));
        }
    }

    fn state(&mut self, level: usize, title: &str, state: Option<&Value>) {
        let Some((kind, state)) = state.and_then(Value::as_object).and_then(|m| m.iter().next()) else {
            return self.field(level, title, "Waiting");
        };
        match kind.as_str() {
            "running" => {
                self.field(level, title, "Running");
                self.field(level + 1, "Started", date(state.str_at("startedAt")));
            }
            "terminated" => {
                self.field(level, title, "Terminated");
                self.field_if(level + 1, "Reason", state.str_at("reason"));
                self.field_if(level + 1, "Message", state.str_at("message"));
                self.field(level + 1, "Exit Code", state.int_at("exitCode").unwrap_or(0));
                if let Some(signal) = state.int_at("signal").filter(|s| *s > 0) {
                    self.field(level + 1, "Signal", signal);
                }
                self.field(level + 1, "Started", date(state.str_at("startedAt")));
                self.field(level + 1, "Finished", date(state.str_at("finishedAt")));
            }
            _ => {
                self.field(level, title, "Waiting");
                self.field_if(level + 1, "Reason", state.str_at("reason"));
            }
        }
    }

    fn env(&mut self, level: usize, container: &Value) {
        let from = container.list_at("envFrom");
        if !from.is_empty() {
            self.line(level, "Environment Variables from:");
            for source in from {
                let (kind, source_of) = if source.at("configMapRef").is_some() { ("ConfigMap", "configMapRef") } else { ("Secret", "secretRef") };
                let reference = source.at(source_of).cloned().unwrap_or_default();
                self.line(level + 1, &format!("{}\t{kind}\tOptional: {}", reference.str_at("name"), reference.bool_at("optional")));
            }
        }
        let variables = container.list_at("env");
        if variables.is_empty() {
            return self.field(level, "Environment", "<none>");
        }
        self.line(level, "Environment:");
        for variable in variables {
            self.field(level + 1, variable.str_at("name"), env_text(variable));
        }
    }

    fn mounts(&mut self, level: usize, mounts: &[Value]) {
        if mounts.is_empty() {
            return self.field(level, "Mounts", "<none>");
        }
        self.line(level, "Mounts:");
        for mount in mounts {
            let mut flags = vec![if mount.bool_at("readOnly") { "ro".to_owned() } else { "rw".to_owned() }];
            if !mount.str_at("subPath").is_empty() {
                flags.push(format!("path=\"{}\"", mount.str_at("subPath")));
            }
            self.line(level + 1, &format!("{} from {} ({})", mount.str_at("mountPath"), mount.str_at("name"), flags.join(",")));
        }
    }

    fn volumes(&mut self, level: usize, volumes: &[Value]) {
        if volumes.is_empty() {
            return self.field(level, "Volumes", "<none>");
        }
        self.line(level, "Volumes:");
        for volume in volumes {
            self.line(level + 1, &format!("{}:", volume.str_at("name")));
            self.volume(level + 2, volume);
        }
    }

    fn volume(&mut self, level: usize, volume: &Value) {
        let source = volume.as_object().into_iter().flatten().find(|(k, _)| *k != "name");
        let Some((kind, source)) = source else { return self.field(level, "Type", "<unknown>") };
        match kind.as_str() {
            "configMap" => {
                self.field(level, "Type", "ConfigMap (a volume populated by a ConfigMap)");
                self.field(level, "Name", source.str_at("name"));
                self.field(level, "Optional", source.bool_at("optional"));
            }
            "secret" => {
                self.field(level, "Type", "Secret (a volume populated by a Secret)");
                self.field(level, "SecretName", source.str_at("secretName"));
                self.field(level, "Optional", source.bool_at("optional"));
            }
            "emptyDir" => {
                self.field(level, "Type", "EmptyDir (a temporary directory that shares a pod's lifetime)");
                self.field(level, "Medium", source.str_at("medium"));
                self.field(level, "SizeLimit", source.at("sizeLimit").map_or("<unset>".into(), crate::jsonpath::print));
            }
            "hostPath" => {
                self.field(level, "Type", "HostPath (bare host directory volume)");
                self.field(level, "Path", source.str_at("path"));
                self.field(level, "HostPathType", source.str_at("type"));
            }
            "persistentVolumeClaim" => {
                self.field(level, "Type", "PersistentVolumeClaim (a reference to a PersistentVolumeClaim in the same namespace)");
                self.field(level, "ClaimName", source.str_at("claimName"));
                self.field(level, "ReadOnly", source.bool_at("readOnly"));
            }
            "projected" => self.projected(level, source),
            other => {
                self.field(level, "Type", other);
                self.tree(level, source);
            }
        }
    }

    fn projected(&mut self, level: usize, source: &Value) {
        self.field(level, "Type", "Projected (a volume that contains injected data from multiple sources)");
        for part in source.list_at("sources") {
            if let Some(map) = part.at("configMap") {
                self.field(level, "ConfigMapName", map.str_at("name"));
                self.field(level, "Optional", map.bool_at("optional"));
            }
            if let Some(secret) = part.at("secret") {
                self.field(level, "SecretName", secret.str_at("name"));
                self.field(level, "Optional", secret.bool_at("optional"));
            }
            if part.at("downwardAPI").is_some() {
                self.field(level, "DownwardAPI", "true");
            }
            if let Some(token) = part.at("serviceAccountToken") {
                self.field(level, "TokenExpirationSeconds", token.int_at("expirationSeconds").unwrap_or(3600));
            }
        }
    }

    /// Any value as titled lines: for kinds without words of their own.
    fn tree(&mut self, level: usize, value: &Value) {
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    self.branch(level, &title(key), value);
                }
            }
            Value::Array(items) => items.iter().for_each(|item| self.tree(level, item)),
            other => self.line(level, &crate::jsonpath::print(other)),
        }
    }

    fn branch(&mut self, level: usize, name: &str, value: &Value) {
        match value {
            Value::Object(map) if map.is_empty() => self.line(level, &format!("{name}:")),
            Value::Object(_) | Value::Array(_) => {
                self.line(level, &format!("{name}:"));
                self.tree(level + 1, value);
            }
            other => self.field(level, name, crate::jsonpath::print(other)),
        }
    }

    /// A table with a dashed line below its head.
    fn table(&mut self, level: usize, heads: &[&str], rows: Vec<Vec<String>>) {
        self.line(level, &heads.join("\t"));
        self.line(level, &heads.iter().map(|h| "-".repeat(h.chars().count())).collect::<Vec<_>>().join("\t"));
        for row in rows {
            self.line(level, &row.join("\t"));
        }
    }

    fn conditions(&mut self, object: &Value, columns: &[(&str, &str)]) {
        let conditions = object.list_at("status.conditions");
        if conditions.is_empty() {
            return;
        }
        self.line(0, "Conditions:");
        let heads: Vec<&str> = columns.iter().map(|(head, _)| *head).collect();
        let cell = |c: &Value, path: &str| if path.ends_with("Time") { date(c.str_at(path)) } else { c.str_at(path).to_owned() };
        let rows = conditions.iter().map(|c| columns.iter().map(|(_, path)| cell(c, path)).collect());
        self.table(1, &heads, rows.collect());
    }
}

/// `podIPs` becomes `Pod I Ps`, as upstream's generic describer spells it.
fn title(key: &str) -> String {
    let mut title = String::new();
    for (index, c) in key.chars().enumerate() {
        if index == 0 {
            title.extend(c.to_uppercase());
        } else {
            if c.is_uppercase() {
                title.push(' ');
            }
            title.push(c);
        }
    }
    title
}

/// `Mon, 02 Jan 2006 15:04:05 +0000`.
fn date(time: &str) -> String {
    match time.parse::<jiff::Timestamp>() {
        Ok(time) => time.to_zoned(jiff::tz::TimeZone::UTC).strftime("%a, %d %b %Y %H:%M:%S %z").to_string(),
        Err(_) => "<unknown>".into(),
    }
}

fn env_text(variable: &Value) -> String {
    let Some(source) = variable.at("valueFrom") else { return variable.str_at("value").to_owned() };
    if let Some(key) = source.at("configMapKeyRef") {
        return format!("<set to the key '{}' of config map '{}'>\tOptional: {}", key.str_at("key"), key.str_at("name"), key.bool_at("optional"));
    }
    if let Some(key) = source.at("secretKeyRef") {
        return format!("<set to the key '{}' in secret '{}'>\tOptional: {}", key.str_at("key"), key.str_at("name"), key.bool_at("optional"));
    }
    if let Some(field) = source.at("fieldRef") {
        let version = field.at("apiVersion").and_then(Value::as_str).unwrap_or("v1");
        return format!(" ({version}:{})", field.str_at("fieldPath"));
    }
    let field = source.at("resourceFieldRef").cloned().unwrap_or_default();
    format!("{} ({})", field.str_at("divisor"), field.str_at("resource"))
}

fn probe_text(probe: &Value) -> String {
    let number = |field: &str, default: i64| probe.int_at(field).unwrap_or(default);
    let numbers = format!(
        "delay={}s timeout={}s period={}s #success={} #failure={}",
        number("initialDelaySeconds", 0), number("timeoutSeconds", 1), number("periodSeconds", 10), number("successThreshold", 1), number("failureThreshold", 3)
    );
    let text = |value: Option<&Value>| value.map(crate::jsonpath::print).unwrap_or_default();
    let what = if let Some(exec) = probe.at("exec") {
        let words: Vec<String> = exec.list_at("command").iter().map(crate::jsonpath::print).collect();
        format!("exec [{}]", words.join(" "))
    } else if let Some(get) = probe.at("httpGet") {
        let scheme = get.at("scheme").and_then(Value::as_str).unwrap_or("HTTP").to_lowercase();
        let path = get.str_at("path");
        let slash = if path.starts_with('/') { "" } else { "/" };
        format!("http-get {scheme}://{}:{}{slash}{path}", get.str_at("host"), text(get.at("port")))
    } else if let Some(socket) = probe.at("tcpSocket") {
        format!("tcp-socket {}:{}", socket.str_at("host"), text(socket.at("port")))
    } else if let Some(grpc) = probe.at("grpc") {
        format!("grpc <pod>:{} {}", text(grpc.at("port")), grpc.str_at("service"))
    } else {
        "unknown".into()
    };
    format!("{what} {numbers}")
}

fn tolerations(tolerations: &[Value]) -> Vec<String> {
    tolerations
        .iter()
        .map(|t| {
            let mut text = t.str_at("key").to_owned();
            if !t.str_at("value").is_empty() {
                text += &format!("={}", t.str_at("value"));
            }
            if !t.str_at("effect").is_empty() {
                text += &format!(":{}", t.str_at("effect"));
            }
            if t.str_at("operator") == "Exists" && t.str_at("value").is_empty() {
                text += if t.str_at("key").is_empty() && t.str_at("effect").is_empty() { "op=Exists" } else { " op=Exists" };
            }
            if let Some(seconds) = t.int_at("tolerationSeconds") {
                text += &format!(" for {seconds}s");
            }
            text
        })
        .collect()
}

async fn describe(context: &Context, found: &Found) -> Result<Doc> {
    let (object, mut doc) = (&found.object, Doc::default());
    match (found.resource.group.as_str(), found.resource.kind.as_str()) {
        ("", "Pod") => pod(object, &mut doc),
        ("", "Node") => node(context, object, &mut doc).await?,
        ("apps", "Deployment") => deployment(context, found, &mut doc).await?,
        ("apps", "ReplicaSet" | "StatefulSet" | "DaemonSet") => pod_owner(context, found, &mut doc).await?,
        ("batch", "Job") => job(object, &mut doc),
        ("", "Service") => service(context, found, &mut doc).await?,
        ("", "ConfigMap") => config_map(object, &mut doc),
        ("", "Secret") => secret(object, &mut doc),
        ("", "Namespace") => namespace(context, object, &mut doc).await?,
        ("", "ResourceQuota") => limits::quota(object, &mut doc),
        ("", "LimitRange") => limits::limit_range(object, &mut doc),
        ("", "ServiceAccount") => service_account(object, &mut doc),
        ("rbac.authorization.k8s.io", "Role" | "ClusterRole") => role(object, &mut doc),
        ("rbac.authorization.k8s.io", "RoleBinding" | "ClusterRoleBinding") => binding(object, &mut doc),
        _ => generic(object, &mut doc),
    }
    Ok(doc)
}

fn pod(object: &Value, doc: &mut Doc) {
    doc.head(object);
    if let Some(priority) = object.int_at("spec.priority") {
        doc.field(0, "Priority", priority);
        doc.field_if(0, "Priority Class Name", object.str_at("spec.priorityClassName"));
    }
    doc.field_if(0, "Runtime Class Name", object.str_at("spec.runtimeClassName"));
    doc.field_if(0, "Service Account", object.str_at("spec.serviceAccountName"));
    match object.str_at("spec.nodeName") {
        "" => doc.field(0, "Node", "<none>"),
        node => doc.field(0, "Node", format!("{node}/{}", object.str_at("status.hostIP"))),
    }
    if object.at("status.startTime").is_some() {
        doc.field(0, "Start Time", date(object.str_at("status.startTime")));
    }
    doc.labels_and_annotations(object);
    match object.at("metadata.deletionTimestamp") {
        Some(_) => {
            doc.field(0, "Status", format!("Terminating (lasts {})", age_of(object.str_at("metadata.deletionTimestamp"))));
            doc.field(0, "Termination Grace Period", format!("{}s", object.int_at("metadata.deletionGracePeriodSeconds").unwrap_or(0)));
        }
        None => doc.field(0, "Status", object.str_at("status.phase")),
    }
    doc.field_if(0, "Reason", object.str_at("status.reason"));
    doc.field_if(0, "Message", object.str_at("status.message"));
    doc.field(0, "IP", object.str_at("status.podIP"));
    let ips = object.list_at("status.podIPs");
    if ips.is_empty() {
        doc.field(0, "IPs", "<none>");
    } else {
        doc.line(0, "IPs:");
        ips.iter().for_each(|ip| doc.field(1, "IP", ip.str_at("ip")));
    }
    let owner = object.list_at("metadata.ownerReferences").iter().find(|o| o.bool_at("controller"));
    if let Some(owner) = owner {
        doc.field(0, "Controlled By", format!("{}/{}", owner.str_at("kind"), owner.str_at("name")));
    }
    for (title, list, status) in [
        ("Init Containers", "spec.initContainers", "status.initContainerStatuses"),
        ("Containers", "spec.containers", "status.containerStatuses"),
        ("Ephemeral Containers", "spec.ephemeralContainers", "status.ephemeralContainerStatuses"),
    ] {
        if !object.list_at(list).is_empty() {
            doc.containers(0, title, object.list_at(list), object.at(status).unwrap_or(&Value::Null));
        }
    }
    if !object.list_at("status.conditions").is_empty() {
        doc.line(0, "Conditions:");
        doc.line(1, "Type\tStatus");
        for condition in object.list_at("status.conditions") {
            doc.line(1, &format!("{} \t{} ", condition.str_at("type"), condition.str_at("status")));
        }
    }
    doc.volumes(0, object.list_at("spec.volumes"));
    doc.field_if(0, "QoS Class", object.str_at("status.qosClass"));
    doc.map(0, "Node-Selectors", object.map_at("spec.nodeSelector"), "=");
    doc.list(0, "Tolerations", &tolerations(object.list_at("spec.tolerations")));
}

async fn node(context: &Context, object: &Value, doc: &mut Doc) -> Result<()> {
    doc.field(0, "Name", object.name());
    let roles: Vec<&str> = object.map_at("metadata.labels").into_iter().flatten().filter_map(|(k, _)| k.strip_prefix("node-role.kubernetes.io/")).collect();
    doc.field(0, "Roles", if roles.is_empty() { "<none>".into() } else { roles.join(",") });
    doc.labels_and_annotations(object);
    doc.field(0, "CreationTimestamp", date(object.str_at("metadata.creationTimestamp")));
    let taints: Vec<String> = object
        .list_at("spec.taints")
        .iter()
        .map(|t| if t.str_at("value").is_empty() { format!("{}:{}", t.str_at("key"), t.str_at("effect")) } else { format!("{}={}:{}", t.str_at("key"), t.str_at("value"), t.str_at("effect")) })
        .collect();
    doc.list(0, "Taints", &taints);
    doc.field(0, "Unschedulable", object.bool_at("spec.unschedulable"));
    doc.conditions(object, &[("Type", "type"), ("Status", "status"), ("LastHeartbeatTime", "lastHeartbeatTime"), ("LastTransitionTime", "lastTransitionTime"), ("Reason", "reason"), ("Message", "message")]);
    doc.line(0, "Addresses:");
    for address in object.list_at("status.addresses") {
        doc.field(1, address.str_at("type"), address.str_at("address"));
    }
    doc.amounts(0, "Capacity", object.map_at("status.capacity"));
    doc.amounts(0, "Allocatable", object.map_at("status.allocatable"));
    doc.line(0, "System Info:");
    for (key, value) in object.map_at("status.nodeInfo").into_iter().flatten().filter(|(_, v)| v.is_string()) {
        let name = match key.as_str() {
            "machineID" => "Machine ID".into(),
            "systemUUID" => "System UUID".into(),
            "bootID" => "Boot ID".into(),
            "osImage" => "OS Image".into(),
            "kubeProxyVersion" => "Kube-Proxy Version".into(),
            other => title(other),
        };
        doc.field(1, &name, crate::jsonpath::print(value));
    }
    doc.field_if(0, "PodCIDR", object.str_at("spec.podCIDR"));
    let cidrs: Vec<&str> = object.list_at("spec.podCIDRs").iter().filter_map(Value::as_str).collect();
    doc.field_if(0, "PodCIDRs", &cidrs.join(","));
    let fields = format!("spec.nodeName={},status.phase!=Succeeded,status.phase!=Failed", object.name());
    node_pods(object, &pods::list(context, None, "", &fields).await?, doc);
    Ok(())
}

/// What the node's pods ask for, each and together.
fn node_pods(node: &Value, pods: &[Value], doc: &mut Doc) {
    doc.line(0, &format!("Non-terminated Pods:\t({} in total)", pods.len()));
    let share = |amount: i64, name: &str| {
        let of = node.at("status.allocatable").and_then(|a| a.get(name)).map_or(0, millis);
        if of == 0 { 0 } else { amount * 100 / of }
    };
    let shown = |amount: i64, name: &str| format!("{} ({}%)", amount_text(amount, name), share(amount, name));
    let mut totals = [0i64; 4];
    let kinds = [("requests", "cpu"), ("limits", "cpu"), ("requests", "memory"), ("limits", "memory")];
    let mut rows = Vec::new();
    for pod in pods {
        let mut row = vec![pod.namespace().to_owned(), pod.name().to_owned()];
        for (index, (kind, name)) in kinds.iter().enumerate() {
            let asked = requested(pod, kind, name);
            totals[index] += asked;
            row.push(shown(asked, name));
        }
        row.push(age_of(pod.str_at("metadata.creationTimestamp")));
        rows.push(row);
    }
    if !rows.is_empty() {
        doc.table(1, &["Namespace", "Name", "CPU Requests", "CPU Limits", "Memory Requests", "Memory Limits", "Age"], rows);
    }
    doc.line(0, "Allocated resources:");
    doc.line(1, "(Total limits may be over 100 percent, i.e., overcommitted.)");
    let rows = vec![
        vec!["cpu".to_owned(), shown(totals[0], "cpu"), shown(totals[1], "cpu")],
        vec!["memory".to_owned(), shown(totals[2], "memory"), shown(totals[3], "memory")],
    ];
    doc.table(1, &["Resource", "Requests", "Limits"], rows);
}

/// Thousandths, the finest the API has.
fn millis(amount: &Value) -> i64 {
    crate::jsonpath::print(amount).parse::<knarr_api::quantity::Quantity>().map_or(0, |q| q.millis())
}

/// The sum over containers, or the largest init container if that is more.
fn requested(pod: &Value, kind: &str, name: &str) -> i64 {
    let of = |c: &Value| c.at("resources").and_then(|r| r.get(kind)).and_then(|r| r.get(name)).map_or(0, millis);
    let sum: i64 = pod.list_at("spec.containers").iter().map(of).sum();
    sum.max(pod.list_at("spec.initContainers").iter().map(of).max().unwrap_or(0))
}

fn amount_text(millis: i64, name: &str) -> String {
    match name {
        "cpu" if millis % 1000 == 0 => (millis / 1000).to_string(),
        "cpu" => format!("{millis}m"),
        _ => knarr_api::quantity::Quantity::from_bytes(millis / 1000).to_string(),
    }
}

async fn deployment(context: &Context, found: &Found, doc: &mut Doc) -> Result<()> {
    let object = &found.object;
    doc.head(object);
    doc.field(0, "CreationTimestamp", date(object.str_at("metadata.creationTimestamp")));
    doc.labels_and_annotations(object);
    doc.field(0, "Selector", selector_or_none(object));
    let count = |path: &str| object.int_at(path).unwrap_or(0);
    doc.field(0, "Replicas", format!(
        "{} desired | {} updated | {} total | {} available | {} unavailable",
        count("spec.replicas"), count("status.updatedReplicas"), count("status.replicas"), count("status.availableReplicas"), count("status.unavailableReplicas")
    ));
    doc.field(0, "StrategyType", object.str_at("spec.strategy.type"));
    doc.field(0, "MinReadySeconds", count("spec.minReadySeconds"));
    if let Some(rolling) = object.at("spec.strategy.rollingUpdate") {
        let part = |name: &str| rolling.at(name).map(crate::jsonpath::print).unwrap_or_default();
        doc.field(0, "RollingUpdateStrategy", format!("{} max unavailable, {} max surge", part("maxUnavailable"), part("maxSurge")));
    }
    doc.line(0, "Pod Template:");
    doc.pod_template(&object["spec"]["template"], 1);
    doc.conditions(object, &[("Type", "type"), ("Status", "status"), ("Reason", "reason")]);
    let sets = owned_sets(context, found).await?;
    let shown = |sets: Vec<&Value>| {
        let all: Vec<String> = sets
            .iter()
            .map(|s| format!("{} ({}/{} replicas created)", s.name(), s.int_at("status.replicas").unwrap_or(0), s.int_at("spec.replicas").unwrap_or(0)))
            .collect();
        if all.is_empty() { "<none>".to_owned() } else { all.join(", ") }
    };
    let revision = |s: &Value| crate::workload::annotation(s, crate::workload::REVISION).and_then(|r| r.parse::<i64>().ok()).unwrap_or(0);
    let newest = sets.iter().map(revision).max().unwrap_or(0);
    doc.field(0, "OldReplicaSets", shown(sets.iter().filter(|s| revision(s) < newest).collect()));
    doc.field(0, "NewReplicaSet", shown(sets.iter().filter(|s| revision(s) == newest).collect()));
    Ok(())
}

async fn owned_sets(context: &Context, found: &Found) -> Result<Vec<Value>> {
    let sets = context.resource("replicasets.apps").await?;
    let query = [("labelSelector", selector_text(found.object.at("spec.selector")))];
    let mut list = context.list(&sets.path(found.namespace.as_deref(), None), &query, None).await?;
    let Value::Array(mut items) = list["items"].take() else { return Ok(Vec::new()) };
    items.retain(|s| controlled_by(s, found.object.uid()));
    Ok(items)
}

fn selector_or_none(object: &Value) -> String {
    let text = selector_text(object.at("spec.selector"));
    if text.is_empty() { "<none>".into() } else { text }
}

async fn pod_owner(context: &Context, found: &Found, doc: &mut Doc) -> Result<()> {
    let object = &found.object;
    doc.head(object);
    if found.resource.kind == "StatefulSet" {
        doc.field(0, "CreationTimestamp", date(object.str_at("metadata.creationTimestamp")));
    }
    doc.field(0, "Selector", selector_or_none(object));
    if found.resource.kind == "DaemonSet" {
        let nodes = labels_text(object.map_at("spec.template.spec.nodeSelector"));
        doc.field(0, "Node-Selector", nodes);
    }
    doc.labels_and_annotations(object);
    let count = |path: &str| object.int_at(path).unwrap_or(0);
    let owner = object.list_at("metadata.ownerReferences").iter().find(|o| o.bool_at("controller"));
    if let Some(owner) = owner {
        doc.field(0, "Controlled By", format!("{}/{}", owner.str_at("kind"), owner.str_at("name")));
    }
    match found.resource.kind.as_str() {
        "DaemonSet" => {
            doc.field(0, "Desired Number of Nodes Scheduled", count("status.desiredNumberScheduled"));
            doc.field(0, "Current Number of Nodes Scheduled", count("status.currentNumberScheduled"));
            doc.field(0, "Number of Nodes Scheduled with Up-to-date Pods", count("status.updatedNumberScheduled"));
            doc.field(0, "Number of Nodes Scheduled with Available Pods", count("status.numberAvailable"));
            doc.field(0, "Number of Nodes Misscheduled", count("status.numberMisscheduled"));
        }
        "StatefulSet" => {
            doc.field(0, "Replicas", format!("{} desired | {} total", count("spec.replicas"), count("status.replicas")));
            doc.field(0, "Update Strategy", object.str_at("spec.updateStrategy.type"));
        }
        _ => doc.field(0, "Replicas", format!("{} current / {} desired", count("status.replicas"), count("spec.replicas"))),
    }
    let pods = pods::of_workload(context, found).await?;
    let phase = |name: &str| pods.iter().filter(|p| p.str_at("status.phase") == name).count();
    doc.field(0, "Pods Status", format!(
        "{} Running / {} Waiting / {} Succeeded / {} Failed",
        phase("Running"), phase("Pending"), phase("Succeeded"), phase("Failed")
    ));
    doc.line(0, "Pod Template:");
    doc.pod_template(&object["spec"]["template"], 1);
    Ok(())
}

fn job(object: &Value, doc: &mut Doc) {
    doc.head(object);
    doc.field(0, "Selector", selector_or_none(object));
    doc.labels_and_annotations(object);
    let number = |path: &str| object.int_at(path).map_or("<unset>".to_owned(), |n| n.to_string());
    doc.field(0, "Parallelism", number("spec.parallelism"));
    doc.field(0, "Completions", number("spec.completions"));
    doc.field_if(0, "Completion Mode", object.str_at("spec.completionMode"));
    doc.field(0, "Suspend", object.bool_at("spec.suspend"));
    doc.field(0, "Backoff Limit", number("spec.backoffLimit"));
    if object.at("status.startTime").is_some() {
        doc.field(0, "Start Time", date(object.str_at("status.startTime")));
    }
    if object.at("status.completionTime").is_some() {
        doc.field(0, "Completed At", date(object.str_at("status.completionTime")));
    }
    let count = |path: &str| object.int_at(path).unwrap_or(0);
    doc.field(0, "Pods Statuses", format!(
        "{} Active ({} Ready) / {} Succeeded / {} Failed",
        count("status.active"), count("status.ready"), count("status.succeeded"), count("status.failed")
    ));
    if object.str_at("spec.completionMode") == "Indexed" {
        let indexes = object.str_at("status.completedIndexes");
        doc.field(0, "Completed Indexes", if indexes.is_empty() { "<none>" } else { indexes });
    }
    doc.line(0, "Pod Template:");
    doc.pod_template(&object["spec"]["template"], 1);
}

async fn service(context: &Context, found: &Found, doc: &mut Doc) -> Result<()> {
    let object = &found.object;
    doc.head(object);
    doc.labels_and_annotations(object);
    doc.field(0, "Selector", selector_or_none(object));
    doc.field(0, "Type", object.str_at("spec.type"));
    let words = |path: &str| -> Vec<&str> { object.list_at(path).iter().filter_map(Value::as_str).collect() };
    doc.field_if(0, "IP Family Policy", object.str_at("spec.ipFamilyPolicy"));
    doc.field_if(0, "IP Families", &words("spec.ipFamilies").join(","));
    doc.field(0, "IP", object.str_at("spec.clusterIP"));
    doc.field_if(0, "IPs", &words("spec.clusterIPs").join(","));
    doc.field_if(0, "External IPs", &words("spec.externalIPs").join(","));
    doc.field_if(0, "External Name", object.str_at("spec.externalName"));
    let ingress: Vec<&str> = object.list_at("status.loadBalancer.ingress").iter().map(|i| if i.str_at("ip").is_empty() { i.str_at("hostname") } else { i.str_at("ip") }).collect();
    doc.field_if(0, "LoadBalancer Ingress", &ingress.join(", "));
    let slices = endpoints(context, found).await?;
    for port in object.list_at("spec.ports") {
        let name = if port.str_at("name").is_empty() { "<unset>" } else { port.str_at("name") };
        doc.line(0, &format!("Port:\t{name}\t{}/{}", port.int_at("port").unwrap_or(0), port.str_at("protocol")));
        doc.line(0, &format!("TargetPort:\t{}/{}", port.at("targetPort").map(crate::jsonpath::print).unwrap_or_default(), port.str_at("protocol")));
        if let Some(node_port) = port.int_at("nodePort").filter(|p| *p > 0) {
            doc.line(0, &format!("NodePort:\t{name}\t{node_port}/{}", port.str_at("protocol")));
        }
        doc.field(0, "Endpoints", endpoints_text(&slices, port.str_at("name")));
    }
    doc.field(0, "Session Affinity", object.str_at("spec.sessionAffinity"));
    doc.field_if(0, "External Traffic Policy", object.str_at("spec.externalTrafficPolicy"));
    doc.field_if(0, "Internal Traffic Policy", object.str_at("spec.internalTrafficPolicy"));
    Ok(())
}

async fn endpoints(context: &Context, found: &Found) -> Result<Vec<Value>> {
    let slices = context.resource("endpointslices.discovery.k8s.io").await?;
    let query = [("labelSelector", format!("kubernetes.io/service-name={}", found.object.name()))];
    let mut list = context.list(&slices.path(found.namespace.as_deref(), None), &query, None).await?;
    Ok(match list["items"].take() {
        Value::Array(items) => items,
        _ => Vec::new(),
    })
}

/// The first three ready addresses with their port.
fn endpoints_text(slices: &[Value], port_name: &str) -> String {
    const SHOWN_MAX: usize = 3;
    let mut all = Vec::new();
    for slice in slices {
        let port = slice.list_at("ports").iter().find(|p| p.str_at("name") == port_name).and_then(|p| p.int_at("port"));
        for endpoint in slice.list_at("endpoints").iter().filter(|e| e.at("conditions.ready").is_none_or(|r| r == &Value::Bool(true))) {
            for address in endpoint.list_at("addresses").iter().filter_map(Value::as_str) {
                let address = if address.contains(':') { format!("[{address}]") } else { address.to_owned() };
                all.push(port.map_or(address.clone(), |p| format!("{address}:{p}")));
            }
        }
    }
    let more = all.len().saturating_sub(SHOWN_MAX);
    all.truncate(SHOWN_MAX);
    match more {
        0 => all.join(","),
        more => format!("{} + {more} more...", all.join(",")),
    }
}

fn config_map(object: &Value, doc: &mut Doc) {
    doc.head(object);
    doc.labels_and_annotations(object);
    doc.text += "\nData\n====\n";
    for (key, value) in object.map_at("data").into_iter().flatten() {
        doc.text += &format!("{key}:\n----\n{}\n\n", value.as_str().unwrap_or_default());
    }
    doc.text += "\nBinaryData\n====\n";
    for (key, value) in object.map_at("binaryData").into_iter().flatten() {
        doc.text += &format!("{key}: {} bytes\n", decoded_len(value));
    }
    doc.text += "\n";
}

fn decoded_len(value: &Value) -> usize {
    use base64::Engine;
    let text = value.as_str().unwrap_or_default();
    base64::engine::general_purpose::STANDARD.decode(text).map_or(0, |bytes| bytes.len())
}

fn secret(object: &Value, doc: &mut Doc) {
    doc.head(object);
    doc.labels_and_annotations(object);
    doc.text += &format!("\nType:\t{}\n\nData\n====\n", object.str_at("type"));
    for (key, value) in object.map_at("data").into_iter().flatten() {
        doc.field(0, key, format!("{} bytes", decoded_len(value)));
    }
}

async fn namespace(context: &Context, object: &Value, doc: &mut Doc) -> Result<()> {
    doc.field(0, "Name", object.name());
    doc.labels_and_annotations(object);
    doc.field(0, "Status", object.str_at("status.phase"));
    doc.conditions(object, &[("Type", "type"), ("Status", "status"), ("LastTransitionTime", "lastTransitionTime"), ("Reason", "reason"), ("Message", "message")]);
    for (plural, tell) in [("resourcequotas", limits::quotas as fn(&[Value], &mut Doc)), ("limitranges", limits::limit_ranges)] {
        let path = format!("/api/v1/namespaces/{}/{plural}", object.name());
        let list = context.list(&path, &[], None).await?;
        doc.text.push('\n');
        tell(list.list_at("items"), doc);
    }
    Ok(())
}

fn service_account(object: &Value, doc: &mut Doc) {
    doc.head(object);
    doc.labels_and_annotations(object);
    for (title, path) in [("Image pull secrets", "imagePullSecrets"), ("Mountable secrets", "secrets")] {
        let names: Vec<String> = object.list_at(path).iter().map(|s| s.str_at("name").to_owned()).collect();
        doc.list(0, title, &names);
    }
    doc.field(0, "Tokens", "<none>");
}

fn role(object: &Value, doc: &mut Doc) {
    doc.field(0, "Name", object.name());
    doc.labels_and_annotations(object);
    doc.line(0, "PolicyRule:");
    let join = |rule: &Value, path: &str| -> String { rule.list_at(path).iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" ") };
    let mut rows = Vec::new();
    for rule in object.list_at("rules") {
        let rest = |urls: &str| vec![format!("[{urls}]"), format!("[{}]", join(rule, "resourceNames")), format!("[{}]", join(rule, "verbs"))];
        for resource in rule.list_at("resources").iter().filter_map(Value::as_str) {
            for group in rule.list_at("apiGroups").iter().filter_map(Value::as_str) {
                let name = if group.is_empty() { resource.to_owned() } else { format!("{resource}.{group}") };
                rows.push([vec![name], rest("")].concat());
            }
        }
        if !rule.list_at("nonResourceURLs").is_empty() {
            rows.push([vec![String::new()], rest(&join(rule, "nonResourceURLs"))].concat());
        }
    }
    doc.table(1, &["Resources", "Non-Resource URLs", "Resource Names", "Verbs"], rows);
}

fn binding(object: &Value, doc: &mut Doc) {
    doc.field(0, "Name", object.name());
    doc.labels_and_annotations(object);
    doc.line(0, "Role:");
    doc.field(1, "Kind", object.str_at("roleRef.kind"));
    doc.field(1, "Name", object.str_at("roleRef.name"));
    doc.line(0, "Subjects:");
    let rows = object.list_at("subjects").iter().map(|s| ["kind", "name", "namespace"].map(|f| s.str_at(f).to_owned()).to_vec());
    doc.table(1, &["Kind", "Name", "Namespace"], rows.collect());
}

/// Kinds without words of their own: all their fields, as upstream does for custom resources.
fn generic(object: &Value, doc: &mut Doc) {
    doc.field(0, "Name", object.name());
    doc.field(0, "Namespace", object.namespace());
    doc.labels_and_annotations(object);
    doc.field(0, "API Version", object.str_at("apiVersion"));
    doc.field(0, "Kind", object.str_at("kind"));
    let mut rest = object.clone();
    for path in ["apiVersion", "kind", "metadata.name", "metadata.namespace", "metadata.labels", "metadata.annotations", "metadata.managedFields"] {
        rest.remove_at(path);
    }
    doc.tree(0, &rest);
}

/// The object's events, newest count and age of each.
async fn events(context: &Context, found: &Found, doc: &mut Doc) -> Result<()> {
    let object = &found.object;
    let mut fields = format!("involvedObject.name={}", object.name());
    for (field, value) in [("involvedObject.namespace", object.namespace()), ("involvedObject.kind", found.resource.kind.as_str())] {
        if !value.is_empty() {
            fields += &format!(",{field}={value}");
        }
    }
    // Events about a node carry its name as their object's uid; the name is enough.
    if found.resource.kind != "Node" && !object.uid().is_empty() {
        fields += &format!(",involvedObject.uid={}", object.uid());
    }
    let path = found.namespace.as_ref().map_or_else(|| "/api/v1/events".to_owned(), |n| format!("/api/v1/namespaces/{n}/events"));
    let list = context.list(&path, &[("fieldSelector", fields)], None).await?;
    let mut items: Vec<&Value> = list.list_at("items").iter().collect();
    if items.is_empty() {
        doc.field(0, "Events", "<none>");
        return Ok(());
    }
    items.sort_by_key(|e| event_time(e).to_owned());
    doc.line(0, "Events:");
    let rows = items.iter().map(|e| vec![e.str_at("type").to_owned(), e.str_at("reason").to_owned(), event_age(e), event_source(e), e.str_at("message").trim().to_owned()]);
    doc.table(1, &["Type", "Reason", "Age", "From", "Message"], rows.collect());
    Ok(())
}

/// When an event was seen last.
pub fn event_time(event: &Value) -> &str {
    ["series.lastObservedTime", "lastTimestamp", "eventTime", "firstTimestamp", "metadata.creationTimestamp"]
        .into_iter()
        .map(|path| event.str_at(path))
        .find(|time| !time.is_empty())
        .unwrap_or_default()
}

/// `5s`, or `5s (x3 over 2m)`.
pub fn event_age(event: &Value) -> String {
    let last = age_of(event_time(event));
    let count = event.int_at("series.count").or(event.int_at("count")).unwrap_or(1);
    let first = ["firstTimestamp", "eventTime"].into_iter().map(|p| event.str_at(p)).find(|t| !t.is_empty()).unwrap_or_default();
    if count > 1 { format!("{last} (x{count} over {})", age_of(first)) } else { last }
}

fn event_source(event: &Value) -> String {
    match event.str_at("source.component") {
        "" => event.str_at("reportingComponent").to_owned(),
        component => component.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_pod_reads_as_upstream_prints_it() {
        let object = json!({"metadata":{"name":"web","namespace":"default","labels":{"app":"web"}},
            "spec":{"nodeName":"n1","containers":[{"name":"nginx","image":"nginx:latest","ports":[{"containerPort":80,"protocol":"TCP"}]}]},
            "status":{"phase":"Running","podIP":"10.0.0.1","podIPs":[{"ip":"10.0.0.1"}],"hostIP":"192.0.2.1","qosClass":"BestEffort",
                "conditions":[{"type":"Ready","status":"True"}],
                "containerStatuses":[{"name":"nginx","containerID":"knarr://c","imageID":"i","ready":true,"restartCount":0,"state":{"running":{"startedAt":"2026-01-02T03:04:05Z"}}}]}});
        let mut doc = Doc::default();
        pod(&object, &mut doc);
        let text = align(&doc.text, DESCRIBE);
        for line in [
            "Name:         web",
            "Node:         n1/192.0.2.1",
            "Labels:       app=web",
            "Annotations:  <none>",
            "    Image:          nginx:latest",
            "    State:          Running",
            "      Started:      Fri, 02 Jan 2026 03:04:05 +0000",
            "  Type   Status",
            "  Ready  True",
        ] {
            let words = |l: &str| l.split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(text.lines().any(|l| words(l) == words(line)), "{line:?} is missing in\n{text}");
        }
    }

    #[test]
    fn events_say_how_often_they_came() {
        let event = json!({"count":3,"firstTimestamp":"2000-01-01T00:00:00Z","lastTimestamp":"2000-01-01T00:00:00Z"});
        let age = event_age(&event);
        assert!(age.contains("(x3 over"), "{age}");
    }
}
