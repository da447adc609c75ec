//! Pod security: the standards `baseline` and `restricted`, enforced, audited or warned of by a namespace's labels.

use knarr_api::object::Object;
use knarr_api::status::{Result, Status};
use serde_json::Value;

use crate::admission::{Attributes, Operation};
use crate::registry::Endpoint;

const LABEL: &str = "pod-security.kubernetes.io/";

#[derive(Clone, Copy, PartialEq, PartialOrd)]
enum Level {
    Privileged,
    Baseline,
    Restricted,
}

impl Level {
    fn read(text: &str) -> Option<Level> {
        match text {
            "privileged" => Some(Level::Privileged),
            "baseline" => Some(Level::Baseline),
            "restricted" => Some(Level::Restricted),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Level::Privileged => "privileged",
            Level::Baseline => "baseline",
            Level::Restricted => "restricted",
        }
    }
}

/// A broken rule: what upstream calls reason and detail.
struct Violation {
    reason: String,
    detail: String,
}

/// Workloads, and where their pod's spec is: they are warned of, never refused.
const TEMPLATES: [(&str, &str); 7] = [
    ("deployments.apps", "spec.template"),
    ("replicasets.apps", "spec.template"),
    ("statefulsets.apps", "spec.template"),
    ("daemonsets.apps", "spec.template"),
    ("replicationcontrollers", "spec.template"),
    ("jobs.batch", "spec.template"),
    ("cronjobs.batch", "spec.jobTemplate.spec.template"),
];

/// Judges new pods, changed pods, and the templates of workloads.
pub fn check(a: &Attributes, object: &Value) -> Result<()> {
    let resource = a.place.kind.resource();
    if resource == "namespaces" {
        return check_labels(a, object);
    }
    if a.operation == Operation::Delete || a.place.namespace.is_empty() {
        return Ok(());
    }
    let pod = resource == "pods";
    let template = TEMPLATES.iter().find(|(r, _)| *r == resource);
    if !pod && template.is_none() || a.endpoint == Endpoint::Status {
        return Ok(());
    }
    // Only images and the like may change in a pod; those do not matter here.
    let same =
        |old: &Value| pod && old.at("spec.ephemeralContainers") == object.at("spec.ephemeralContainers");
    if a.old.is_some_and(same) {
        return Ok(());
    }
    let Some(namespace) = a.registry.policy("namespaces", "", a.place.namespace) else { return Ok(()) };
    let label = |name: &str| {
        let labels = namespace.map_at("metadata.labels");
        labels.and_then(|l| l.get(&format!("{LABEL}{name}"))).and_then(Value::as_str)
    };
    let subject = match template {
        Some((_, path)) => object.at(path).unwrap_or(&Value::Null),
        None => object,
    };
    let version = |mode: &str| label(&format!("{mode}-version")).unwrap_or("latest");
    let judge = |mode: &str| {
        let level = label(mode).and_then(Level::read).unwrap_or(Level::Privileged);
        let broken = violations(subject, level);
        let text: Vec<String> = broken.iter().map(|v| format!("{} ({})", v.reason, v.detail)).collect();
        (!text.is_empty())
            .then(|| format!("{:?}: {}", format!("{}:{}", level.name(), version(mode)), text.join(", ")))
    };
    if pod && let Some(why) = judge("enforce") {
        let name = if a.place.name.is_empty() { object.name() } else { a.place.name };
        return Err(Status::forbidden(a.place.kind, name, format!("violates PodSecurity {why}")));
    }
    if let Some(why) = judge("warn") {
        a.context.warn(format!("would violate PodSecurity {why}"));
    }
    if let Some(why) = judge("audit") {
        tracing::info!(
            resource,
            namespace = a.place.namespace,
            name = object.name(),
            why,
            "pod security audit"
        );
    }
    Ok(())
}

/// A namespace's labels must name a level.
fn check_labels(a: &Attributes, namespace: &Value) -> Result<()> {
    let mut errors = Vec::new();
    for mode in ["enforce", "audit", "warn"] {
        let key = format!("{LABEL}{mode}");
        let value = namespace.map_at("metadata.labels").and_then(|l| l.get(&key)).and_then(Value::as_str);
        if let Some(value) = value.filter(|v| Level::read(v).is_none()) {
            let path = knarr_api::field::key("metadata.labels", &key);
            let detail = "must be one of privileged, baseline, restricted";
            errors.push(knarr_api::field::Error::invalid(path, value, detail));
        }
    }
    if errors.is_empty() || a.operation == Operation::Delete {
        return Ok(());
    }
    Err(Status::invalid(a.place.kind, namespace.name(), &errors))
}

fn violations(pod: &Value, level: Level) -> Vec<Violation> {
    let mut found = Vec::new();
    if level >= Level::Baseline {
        baseline(pod, level, &mut found);
    }
    if level >= Level::Restricted {
        restricted(pod, &mut found);
    }
    found
}

fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    ["spec.containers", "spec.initContainers", "spec.ephemeralContainers"]
        .into_iter()
        .flat_map(|l| pod.list_at(l))
}

/// `container "a"` or `containers "a", "b"`, of those that break a rule.
fn named(pod: &Value, breaks: impl Fn(&Value) -> bool) -> Option<(String, usize)> {
    let names: Vec<String> =
        containers(pod).filter(|c| breaks(c)).map(|c| format!("{:?}", c.str_at("name"))).collect();
    let plural = if names.len() == 1 { "" } else { "s" };
    (!names.is_empty()).then(|| (format!("container{plural} {}", names.join(", ")), names.len()))
}

fn quoted(mut values: Vec<String>) -> String {
    values.sort();
    values.dedup();
    values.iter().map(|v| format!("{v:?}")).collect::<Vec<_>>().join(", ")
}

fn texts(list: &[Value]) -> impl Iterator<Item = &str> {
    list.iter().filter_map(Value::as_str)
}

/// Capabilities a container engine gives by itself.
const CAPABILITIES: [&str; 13] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];
const SYSCTLS: [&str; 10] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_syncookies",
];

fn baseline(pod: &Value, level: Level, found: &mut Vec<Violation>) {
    let mut add = |reason: &str, detail: String| found.push(Violation { reason: reason.into(), detail });
    let spaces: Vec<String> = ["hostNetwork", "hostPID", "hostIPC"]
        .iter()
        .filter(|n| pod["spec"].bool_at(n))
        .map(|n| format!("{n}=true"))
        .collect();
    if !spaces.is_empty() {
        add("host namespaces", spaces.join(", "));
    }
    if let Some((who, count)) = named(pod, |c| c.bool_at("securityContext.privileged")) {
        add(
            "privileged",
            format!(
                "{who} must not set securityContext.privileged=true{}",
                if count == 0 { " " } else { "" }
            ),
        );
    }
    let extra = |c: &Value| -> Vec<String> {
        let added = texts(c.list_at("securityContext.capabilities.add"));
        added.filter(|cap| !CAPABILITIES.contains(cap)).map(str::to_owned).collect()
    };
    // The stricter level has its own, wider rule.
    if level == Level::Baseline
        && let Some((who, _)) = named(pod, |c| !extra(c).is_empty())
    {
        let all = containers(pod).flat_map(extra).collect();
        add(
            "non-default capabilities",
            format!("{who} must not include {} in securityContext.capabilities.add", quoted(all)),
        );
    }
    let hosts: Vec<&Value> =
        pod.list_at("spec.volumes").iter().filter(|v| v.at("hostPath").is_some()).collect();
    if level == Level::Baseline && !hosts.is_empty() {
        let names: Vec<String> = hosts.iter().map(|v| format!("{:?}", v.str_at("name"))).collect();
        let plural = if names.len() == 1 { "" } else { "s" };
        add("hostPath volumes", format!("volume{plural} {}", names.join(", ")));
    }
    let ports = |c: &Value| -> Vec<i64> {
        c.list_at("ports").iter().filter_map(|p| p.int_at("hostPort")).filter(|p| *p != 0).collect()
    };
    if let Some((who, count)) = named(pod, |c| !ports(c).is_empty()) {
        let mut all: Vec<i64> = containers(pod).flat_map(ports).collect();
        all.sort_unstable();
        all.dedup();
        let verb = if count == 1 { "uses" } else { "use" };
        let plural = if all.len() == 1 { "" } else { "s" };
        let list: Vec<String> = all.iter().map(ToString::to_string).collect();
        add("hostPort", format!("{who} {verb} hostPort{plural} {}", list.join(", ")));
    }
    if let Some((who, _)) = named(pod, |c| !matches!(c.str_at("securityContext.procMount"), "" | "Default")) {
        let all = containers(pod).map(|c| c.str_at("securityContext.procMount").to_owned());
        let all = quoted(all.filter(|m| !matches!(m.as_str(), "" | "Default")).collect());
        add("procMount", format!("{who} must not set securityContext.procMount to {all}"));
    }
    if level == Level::Baseline {
        seccomp_unconfined(pod, found);
    }
    windows_and_sysctls(pod, found);
}

fn seccomp_unconfined(pod: &Value, found: &mut Vec<Violation>) {
    const PATH: &str = "securityContext.seccompProfile.type";
    let unconfined = |v: &Value| v.str_at(PATH) == "Unconfined";
    let mut who = Vec::new();
    if unconfined(&pod["spec"]) {
        who.push("pod".to_owned());
    }
    who.extend(named(pod, unconfined).map(|(w, _)| w));
    if !who.is_empty() {
        let detail = format!("{} must not set {PATH} to \"Unconfined\"", who.join(" and "));
        found.push(Violation { reason: "seccompProfile".into(), detail });
    }
}

fn windows_and_sysctls(pod: &Value, found: &mut Vec<Violation>) {
    let host = |v: &Value| v.bool_at("securityContext.windowsOptions.hostProcess");
    let mut who = Vec::new();
    if host(&pod["spec"]) {
        who.push("pod".to_owned());
    }
    who.extend(named(pod, host).map(|(w, _)| w));
    if !who.is_empty() {
        let detail =
            format!("{} must not set securityContext.windowsOptions.hostProcess=true", who.join(" and "));
        found.push(Violation { reason: "hostProcess".into(), detail });
    }
    let sysctls = pod.list_at("spec.securityContext.sysctls").iter().map(|s| s.str_at("name"));
    let bad: Vec<String> = sysctls.filter(|n| !SYSCTLS.contains(n)).map(str::to_owned).collect();
    if !bad.is_empty() {
        let reason = if bad.len() == 1 { "forbidden sysctl" } else { "forbidden sysctls" };
        found.push(Violation { reason: reason.into(), detail: bad.join(", ") });
    }
}

const VOLUMES: [&str; 8] = [
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
];

fn restricted(pod: &Value, found: &mut Vec<Violation>) {
    let mut add = |reason: &str, detail: String| found.push(Violation { reason: reason.into(), detail });
    let context = |c: &Value, path: &str| c.at("securityContext").and_then(|s| s.at(path)).cloned();
    // What only Linux has is not asked of pods for another system.
    let linux = pod.str_at("spec.os.name") != "windows";
    if linux
        && let Some((who, _)) =
            named(pod, |c| context(c, "allowPrivilegeEscalation") != Some(Value::Bool(false)))
    {
        add(
            "allowPrivilegeEscalation != false",
            format!("{who} must set securityContext.allowPrivilegeEscalation=false"),
        );
    }
    if linux {
        capabilities(pod, &mut add);
    }
    let odd = |v: &&Value| {
        v.as_object().is_some_and(|v| v.keys().any(|k| k != "name" && !VOLUMES.contains(&k.as_str())))
    };
    let volumes: Vec<&Value> = pod.list_at("spec.volumes").iter().filter(odd).collect();
    if !volumes.is_empty() {
        let names: Vec<String> = volumes.iter().map(|v| format!("{:?}", v.str_at("name"))).collect();
        let kinds = volumes.iter().filter_map(|v| v.as_object()?.keys().find(|k| *k != "name").cloned());
        let kinds: Vec<String> = kinds.collect();
        let (plural, verb) = if names.len() == 1 { ("", "uses") } else { ("s", "use") };
        let mut unique = kinds.clone();
        unique.sort();
        unique.dedup();
        let types = if unique.len() == 1 { "type" } else { "types" };
        let detail =
            format!("volume{plural} {} {verb} restricted volume {types} {}", names.join(", "), quoted(kinds));
        add("restricted volume types", detail);
    }
    root_and_seccomp(pod, linux, &mut add);
}

fn capabilities(pod: &Value, add: &mut impl FnMut(&str, String)) {
    let keeps =
        named(pod, |c| !texts(c.list_at("securityContext.capabilities.drop")).any(|cap| cap == "ALL"));
    let more = |c: &Value| -> Vec<String> {
        let added = texts(c.list_at("securityContext.capabilities.add"));
        added.filter(|cap| *cap != "NET_BIND_SERVICE").map(str::to_owned).collect()
    };
    let adds = named(pod, |c| !more(c).is_empty());
    let mut details = Vec::new();
    if let Some((who, _)) = keeps {
        details.push(format!("{who} must set securityContext.capabilities.drop=[\"ALL\"]"));
    }
    if let Some((who, _)) = adds {
        let all = quoted(containers(pod).flat_map(more).collect());
        details.push(format!("{who} must not include {all} in securityContext.capabilities.add"));
    }
    if !details.is_empty() {
        add("unrestricted capabilities", details.join("; "));
    }
}

fn root_and_seccomp(pod: &Value, linux: bool, add: &mut impl FnMut(&str, String)) {
    let spec = &pod["spec"];
    let flag = |v: &Value| v.at("securityContext.runAsNonRoot").and_then(Value::as_bool);
    let own = flag(spec);
    let explicit = named(pod, |c| flag(c) == Some(false));
    if let Some((who, _)) = &explicit {
        add("runAsNonRoot != true", format!("{who} must not set securityContext.runAsNonRoot=false"));
    } else if own == Some(false) && named(pod, |c| flag(c).is_none()).is_some() {
        add("runAsNonRoot != true", "pod must not set securityContext.runAsNonRoot=false".into());
    } else if own != Some(true)
        && let Some((who, _)) = named(pod, |c| flag(c).is_none())
    {
        add("runAsNonRoot != true", format!("pod or {who} must set securityContext.runAsNonRoot=true"));
    }
    let root = |v: &Value| v.int_at("securityContext.runAsUser") == Some(0);
    let mut roots = Vec::new();
    if root(spec) {
        roots.push("pod".to_owned());
    }
    roots.extend(named(pod, root).map(|(who, _)| who));
    if !roots.is_empty() {
        add("runAsUser=0", format!("{} must not set runAsUser=0", roots.join(" and ")));
    }
    if !linux {
        return;
    }
    let profile = |v: &Value| v.str_at("securityContext.seccompProfile.type").to_owned();
    let good = |p: &str| matches!(p, "RuntimeDefault" | "Localhost");
    let bad = |v: &Value| !profile(v).is_empty() && !good(&profile(v));
    let mut wrong = Vec::new();
    if bad(spec) {
        wrong.push("pod".to_owned());
    }
    wrong.extend(named(pod, bad).map(|(who, _)| who));
    if !wrong.is_empty() {
        let all: Vec<String> =
            std::iter::once(spec).chain(containers(pod)).filter(|v| bad(v)).map(profile).collect();
        let detail = format!(
            "{} must not set securityContext.seccompProfile.type to {}",
            wrong.join(" and "),
            quoted(all)
        );
        add("seccompProfile", detail);
    } else if !good(&profile(spec))
        && let Some((who, _)) = named(pod, |c| profile(c).is_empty())
    {
        let detail = format!(
            "pod or {who} must set securityContext.seccompProfile.type to \"RuntimeDefault\" or \"Localhost\""
        );
        add("seccompProfile", detail);
    }
}
