//! Which resolver a pod uses: the content of its `/etc/resolv.conf`, by `dnsPolicy` and `dnsConfig`
//! (`pkg/kubelet/network/dns`). Pure.

use crate::config::KubeletConfig;
use crate::names;
use k8s_openapi::api::core::v1::Pod;
use knarr_runtime::cri::v1::DnsConfig;

/// The resolver reads no more servers.
const SERVERS_MAX: usize = 3;
/// The resolver reads no more search domains, and no more characters of them.
const SEARCHES_MAX: usize = 32;
const SEARCHES_CHARS_MAX: usize = 2048;
/// Lets `name.namespace` be tried as a service before it is asked of the world.
const CLUSTER_OPTIONS: &str = "ndots:5";

/// The resolver configuration of a pod; `node` is the text of the node's own.
pub fn resolver(pod: &Pod, config: &KubeletConfig, node: &str) -> DnsConfig {
    let spec = pod.spec.as_ref();
    let host_network = spec.and_then(|spec| spec.host_network).unwrap_or(false);
    let policy = spec.and_then(|spec| spec.dns_policy.as_deref()).unwrap_or("ClusterFirst");
    let mut dns = match policy {
        "None" => DnsConfig::default(),
        "ClusterFirstWithHostNet" => cluster(pod, config, node),
        "ClusterFirst" if !host_network => cluster(pod, config, node),
        _ => parse(node),
    };
    if let Some(own) = spec.and_then(|spec| spec.dns_config.as_ref()) {
        append(&mut dns.servers, own.nameservers.iter().flatten());
        append(&mut dns.searches, own.searches.iter().flatten());
        for option in own.options.iter().flatten() {
            let Some(name) = &option.name else { continue };
            dns.options.retain(|have| have.split(':').next() != Some(name));
            dns.options.push(match option.value.as_deref() {
                None | Some("") => name.clone(),
                Some(value) => format!("{name}:{value}"),
            });
        }
    }
    cut(&mut dns);
    dns
}

fn cluster(pod: &Pod, config: &KubeletConfig, node: &str) -> DnsConfig {
    let node = parse(node);
    if config.cluster_dns.is_empty() {
        return node;
    }
    let domain = &config.cluster_domain;
    let own = [format!("{}.svc.{domain}", names::namespace(pod)), format!("svc.{domain}"), domain.clone()];
    let mut searches = own.to_vec();
    append(&mut searches, node.searches.iter());
    let servers = config.cluster_dns.iter().map(ToString::to_string).collect();
    DnsConfig { servers, searches, options: vec![CLUSTER_OPTIONS.to_owned()] }
}

fn append<'a>(list: &mut Vec<String>, more: impl Iterator<Item = &'a String>) {
    for entry in more {
        if !list.contains(entry) {
            list.push(entry.clone());
        }
    }
}

fn cut(dns: &mut DnsConfig) {
    dns.servers.truncate(SERVERS_MAX);
    dns.searches.truncate(SEARCHES_MAX);
    while dns.searches.join(" ").len() > SEARCHES_CHARS_MAX {
        dns.searches.pop();
    }
}

/// Reads a resolver configuration; the last of several `search` or `options` lines counts.
pub fn parse(text: &str) -> DnsConfig {
    let mut dns = DnsConfig::default();
    for line in text.lines().filter(|line| !line.starts_with(['#', ';'])) {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => dns.servers.extend(words.next().map(str::to_owned)),
            Some("search") => {
                dns.searches = words.map(|word| word.trim_end_matches('.').to_owned()).collect();
                dns.searches.retain(|word| !word.is_empty());
            }
            Some("options") => dns.options = words.map(str::to_owned).collect(),
            _ => {}
        }
    }
    dns
}

/// The file itself.
pub fn print(dns: &DnsConfig) -> String {
    let mut out = String::new();
    if !dns.searches.is_empty() {
        out += &format!("search {}\n", dns.searches.join(" "));
    }
    for server in &dns.servers {
        out += &format!("nameserver {server}\n");
    }
    if !dns.options.is_empty() {
        out += &format!("options {}\n", dns.options.join(" "));
    }
    out
}

/// The host name of a pod and, where it has a subdomain, its full name (`hostname`, `subdomain`,
/// `setHostnameAsFQDN`, `hostnameOverride`).
pub fn hostname(pod: &Pod, config: &KubeletConfig) -> (String, Option<String>) {
    let spec = pod.spec.as_ref();
    let given = |text: Option<&String>| text.filter(|text| !text.is_empty()).cloned();
    if let Some(name) = given(spec.and_then(|spec| spec.hostname_override.as_ref())) {
        return (name, None);
    }
    let host = given(spec.and_then(|spec| spec.hostname.as_ref())).unwrap_or_else(|| {
        let name = &names::name(pod)[..names::name(pod).len().min(63)];
        name.trim_end_matches(['-', '.']).to_owned()
    });
    let subdomain = given(spec.and_then(|spec| spec.subdomain.as_ref()));
    let full =
        subdomain.map(|sub| format!("{host}.{sub}.{}.svc.{}", names::namespace(pod), config.cluster_domain));
    match (&full, spec.and_then(|spec| spec.set_hostname_as_fqdn)) {
        (Some(full), Some(true)) => (full.clone(), Some(full.clone())),
        _ => (host, full),
    }
}

/// The content of `/etc/hosts` of a pod with its own network.
pub fn hosts_file(pod: &Pod, config: &KubeletConfig, pod_ips: &[String]) -> String {
    let (host, full) = hostname(pod, config);
    let mut out = String::from(
        "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n",
    );
    for ip in pod_ips {
        match &full {
            Some(full) if *full != host => out += &format!("{ip}\t{full}\t{host}\n"),
            _ => out += &format!("{ip}\t{host}\n"),
        }
    }
    out + &host_aliases(pod)
}

/// The host's file with the pod's aliases, for pods in the host's network.
pub fn node_hosts_file(pod: &Pod, node: &str) -> String {
    format!("# Kubernetes-managed hosts file (host network).\n{node}{}", host_aliases(pod))
}

fn host_aliases(pod: &Pod) -> String {
    let aliases = pod.spec.as_ref().and_then(|spec| spec.host_aliases.as_deref()).unwrap_or_default();
    if aliases.is_empty() {
        return String::new();
    }
    let mut out = String::from("\n# Entries added by HostAliases.\n");
    for alias in aliases {
        out += &format!("{}\t{}\n", alias.ip, alias.hostnames.as_deref().unwrap_or_default().join("\t"));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const NODE: &str = "# made by hand\nnameserver 9.9.9.9\nsearch example.org.\noptions timeout:2\n";

    fn file(spec: Value) -> String {
        let mut config = KubeletConfig::new("node");
        config.cluster_dns = vec!["10.96.0.10".parse().unwrap()];
        let pod: Pod =
            serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "n"}, "spec": spec}))
                .unwrap();
        print(&resolver(&pod, &config, NODE))
    }

    #[test]
    fn resolver_follows_the_policy() {
        let cluster = "search n.svc.cluster.local svc.cluster.local cluster.local example.org\n\
                       nameserver 10.96.0.10\noptions ndots:5\n";
        let node = "search example.org\nnameserver 9.9.9.9\noptions timeout:2\n";
        let cases = [
            (json!({"containers": []}), cluster),
            (json!({"containers": [], "hostNetwork": true}), node),
            (json!({"containers": [], "hostNetwork": true, "dnsPolicy": "ClusterFirstWithHostNet"}), cluster),
            (json!({"containers": [], "dnsPolicy": "Default"}), node),
            (
                json!({"containers": [], "dnsPolicy": "None", "dnsConfig": {"nameservers": ["1.1.1.1"],
                    "searches": ["a.b"], "options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}]}}),
                "search a.b\nnameserver 1.1.1.1\noptions ndots:2 edns0\n",
            ),
        ];
        for (spec, want) in cases {
            assert_eq!(file(spec.clone()), want, "{spec}");
        }
        let merged =
            file(json!({"containers": [], "dnsConfig": {"options": [{"name": "ndots", "value": "2"}]}}));
        assert!(merged.ends_with("options ndots:2\n"), "{merged}");
    }

    #[test]
    fn hosts_file_names_the_pod_and_its_aliases() {
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "n"}, "spec": {
            "containers": [], "hostname": "h", "subdomain": "s",
            "hostAliases": [{"ip": "1.2.3.4", "hostnames": ["a", "b"]}]}}))
        .unwrap();
        let text = hosts_file(&pod, &KubeletConfig::new("node"), &["10.0.0.7".to_owned()]);
        assert!(text.contains("\n10.0.0.7\th.s.n.svc.cluster.local\th\n"), "{text}");
        assert!(text.ends_with("# Entries added by HostAliases.\n1.2.3.4\ta\tb\n"), "{text}");
    }
}
