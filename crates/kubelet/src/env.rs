//! A container's environment: its own variables, those of ConfigMaps and Secrets, services of its namespace, and
//! `$(VAR)` references. Pure; the objects come through [`Lookup`].

use crate::fields::{self, Host};
use crate::names;
use k8s_openapi::api::core::v1::{ConfigMap, Container, EnvVar, EnvVarSource, Pod, Secret, Service};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Objects a pod refers to, by name in its namespace. `Ok(None)`: there is no such object; `Err`: it cannot be
/// told now.
pub trait Lookup: Send + Sync {
    fn config_map(&self, name: &str) -> Result<Option<Arc<ConfigMap>>, String>;
    fn secret(&self, name: &str) -> Result<Option<Arc<Secret>>, String>;
}

/// Variables in order, names unique. The error is upstream's message of `CreateContainerConfigError`.
pub fn environment(
    pod: &Pod,
    container: &Container,
    services: &[Arc<Service>],
    lookup: &dyn Lookup,
    host: &Host,
) -> Result<Vec<(String, String)>, String> {
    let mut out = Environment::default();
    for source in container.env_from.iter().flatten() {
        let prefix = source.prefix.as_deref().unwrap_or_default();
        if let Some(wanted) = &source.config_map_ref {
            let data = config_map(lookup, &wanted.name, wanted.optional)?;
            for (key, value) in data.iter().filter_map(|map| map.data.as_ref()).flatten() {
                out.set(format!("{prefix}{key}"), value.clone());
            }
        }
        if let Some(wanted) = &source.secret_ref {
            let data = secret(lookup, &wanted.name, wanted.optional)?;
            for (key, value) in data.iter().filter_map(|secret| secret.data.as_ref()).flatten() {
                out.set(format!("{prefix}{key}"), String::from_utf8_lossy(&value.0).into_owned());
            }
        }
    }
    let services = service_variables(pod, services);
    for variable in container.env.iter().flatten() {
        if let Some(value) = value_of(pod, container, variable, &out, &services, lookup, host)? {
            out.set(variable.name.clone(), value);
        }
    }
    for (name, value) in services {
        out.set_default(name, value);
    }
    Ok(out.variables)
}

#[derive(Default)]
struct Environment {
    variables: Vec<(String, String)>,
}

impl Environment {
    fn get(&self, name: &str) -> Option<&str> {
        self.variables.iter().find(|(have, _)| have == name).map(|(_, value)| value.as_str())
    }

    fn set(&mut self, name: String, value: String) {
        match self.variables.iter_mut().find(|(have, _)| *have == name) {
            Some(entry) => entry.1 = value,
            None => self.variables.push((name, value)),
        }
    }

    fn set_default(&mut self, name: String, value: String) {
        if self.get(&name).is_none() {
            self.variables.push((name, value));
        }
    }
}

fn value_of(
    pod: &Pod,
    container: &Container,
    variable: &EnvVar,
    so_far: &Environment,
    services: &BTreeMap<String, String>,
    lookup: &dyn Lookup,
    host: &Host,
) -> Result<Option<String>, String> {
    let Some(source) = &variable.value_from else {
        let text = variable.value.as_deref().unwrap_or_default();
        let known = |name: &str| so_far.get(name).or_else(|| services.get(name).map(String::as_str));
        return Ok(Some(expand(text, |name| known(name).map(str::to_owned))));
    };
    from_source(pod, container, source, lookup, host)
}

fn from_source(
    pod: &Pod,
    container: &Container,
    source: &EnvVarSource,
    lookup: &dyn Lookup,
    host: &Host,
) -> Result<Option<String>, String> {
    if let Some(wanted) = &source.field_ref {
        return fields::field(pod, &wanted.field_path, host).map(Some);
    }
    if let Some(wanted) = &source.resource_field_ref {
        return fields::resource(pod, Some(&container.name), wanted, host).map(Some);
    }
    let namespace = names::namespace(pod);
    let missing = |kind: &str, key: &str, name: &str, optional: Option<bool>| match optional {
        Some(true) => Ok(None),
        _ => Err(format!("couldn't find key {key} in {kind} {namespace}/{name}")),
    };
    if let Some(wanted) = &source.config_map_key_ref {
        let Some(map) = config_map(lookup, &wanted.name, wanted.optional)? else { return Ok(None) };
        let value = map.data.as_ref().and_then(|data| data.get(&wanted.key));
        return match value {
            Some(value) => Ok(Some(value.clone())),
            None => missing("ConfigMap", &wanted.key, &wanted.name, wanted.optional),
        };
    }
    if let Some(wanted) = &source.secret_key_ref {
        let Some(secret) = secret(lookup, &wanted.name, wanted.optional)? else { return Ok(None) };
        let value = secret.data.as_ref().and_then(|data| data.get(&wanted.key));
        return match value {
            Some(value) => Ok(Some(String::from_utf8_lossy(&value.0).into_owned())),
            None => missing("Secret", &wanted.key, &wanted.name, wanted.optional),
        };
    }
    Err("fileKeyRef is not supported by this node; use configMapKeyRef or secretKeyRef".to_owned())
}

fn config_map(
    lookup: &dyn Lookup,
    name: &str,
    optional: Option<bool>,
) -> Result<Option<Arc<ConfigMap>>, String> {
    match lookup.config_map(name)? {
        None if optional != Some(true) => Err(format!("configmap {name:?} not found")),
        found => Ok(found),
    }
}

fn secret(lookup: &dyn Lookup, name: &str, optional: Option<bool>) -> Result<Option<Arc<Secret>>, String> {
    match lookup.secret(name)? {
        None if optional != Some(true) => Err(format!("secret {name:?} not found")),
        found => Ok(found),
    }
}

/// Replaces `$(NAME)` where `value_of` knows the name; `$$` is a dollar sign.
pub fn expand(text: &str, value_of: impl Fn(&str) -> Option<String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
            continue;
        }
        let named = rest.strip_prefix('(').and_then(|inner| inner.split_once(')'));
        match named {
            Some((name, after)) => {
                match value_of(name) {
                    Some(value) => out.push_str(&value),
                    None => out.push_str(&format!("$({name})")),
                }
                rest = after;
            }
            None => out.push('$'),
        }
    }
    out.push_str(rest);
    out
}

/// Docker-style variables of the namespace's services; of `kubernetes` always, of others if the pod wants links.
fn service_variables(pod: &Pod, services: &[Arc<Service>]) -> BTreeMap<String, String> {
    let links = pod.spec.as_ref().and_then(|spec| spec.enable_service_links).unwrap_or(true);
    let namespace = names::namespace(pod);
    let mut out = BTreeMap::new();
    for service in services {
        let meta = &service.metadata;
        let (own, name) = (meta.namespace.as_deref(), meta.name.as_deref().unwrap_or_default());
        let master = own == Some("default") && name == "kubernetes";
        if master || (links && own == Some(namespace)) {
            // A namespace's own service called kubernetes hides the master's.
            let hidden = master && namespace != "default" && out.contains_key("KUBERNETES_SERVICE_HOST");
            if !hidden {
                add_service(&mut out, name, service);
            }
        }
    }
    out
}

fn add_service(out: &mut BTreeMap<String, String>, name: &str, service: &Service) {
    let Some(spec) = &service.spec else { return };
    let Some(ip) = spec.cluster_ip.as_deref().filter(|ip| !ip.is_empty() && *ip != "None") else { return };
    let ports = spec.ports.as_deref().unwrap_or_default();
    let Some(first) = ports.first() else { return };
    let prefix = name.to_uppercase().replace('-', "_");
    let address = if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() };
    out.insert(format!("{prefix}_SERVICE_HOST"), ip.to_owned());
    out.insert(format!("{prefix}_SERVICE_PORT"), first.port.to_string());
    for (index, port) in ports.iter().enumerate() {
        if let Some(port_name) = port.name.as_deref().filter(|name| !name.is_empty()) {
            let port_name = port_name.to_uppercase().replace('-', "_");
            out.insert(format!("{prefix}_SERVICE_PORT_{port_name}"), port.port.to_string());
        }
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        let url = format!("{}://{address}:{}", protocol.to_lowercase(), port.port);
        if index == 0 {
            out.insert(format!("{prefix}_PORT"), url.clone());
        }
        let each = format!("{prefix}_PORT_{}_{}", port.port, protocol.to_uppercase());
        out.insert(format!("{each}_PROTO"), protocol.to_lowercase());
        out.insert(format!("{each}_PORT"), port.port.to_string());
        out.insert(format!("{each}_ADDR"), ip.to_owned());
        out.insert(each, url);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// Objects given by a test.
    #[derive(Default)]
    pub(crate) struct Fixed {
        pub maps: BTreeMap<String, Arc<ConfigMap>>,
        pub secrets: BTreeMap<String, Arc<Secret>>,
    }

    impl Lookup for Fixed {
        fn config_map(&self, name: &str) -> Result<Option<Arc<ConfigMap>>, String> {
            Ok(self.maps.get(name).cloned())
        }

        fn secret(&self, name: &str) -> Result<Option<Arc<Secret>>, String> {
            Ok(self.secrets.get(name).cloned())
        }
    }

    fn fixed() -> Fixed {
        let map = json!({"metadata": {"name": "m"}, "data": {"A": "1", "B": "2"}});
        let secret = json!({"metadata": {"name": "s"}, "data": {"T": "dG9r"}});
        Fixed {
            maps: [("m".to_owned(), Arc::new(serde_json::from_value(map).unwrap()))].into(),
            secrets: [("s".to_owned(), Arc::new(serde_json::from_value(secret).unwrap()))].into(),
        }
    }

    fn run(container: Value) -> Result<Vec<(String, String)>, String> {
        let pod = json!({"metadata": {"name": "p", "namespace": "n"}, "spec": {"containers": [container]}});
        let pod: Pod = serde_json::from_value(pod).unwrap();
        let container = pod.spec.as_ref().unwrap().containers[0].clone();
        environment(&pod, &container, &[], &fixed(), &Host::default())
    }

    #[test]
    fn references_are_expanded_like_upstream() {
        let value_of = |name: &str| (name == "A").then(|| "x".to_owned());
        let cases = [
            ("$(A)", "x"),
            ("$$(A)", "$(A)"),
            ("$(B)", "$(B)"),
            ("$A $ $(", "$A $ $("),
            ("a$(A)b$(A)", "axbx"),
            ("$$$(A)", "$x"),
        ];
        for (text, want) in cases {
            assert_eq!(expand(text, value_of), want, "{text}");
        }
    }

    #[test]
    fn later_variables_see_earlier_ones_and_win_over_sources() {
        let env = run(json!({"name": "c",
            "envFrom": [{"prefix": "P_", "configMapRef": {"name": "m"}}],
            "env": [{"name": "X", "value": "$(P_A)-$(Y)"}, {"name": "P_B", "value": "own"},
                {"name": "T", "valueFrom": {"secretKeyRef": {"name": "s", "key": "T"}}},
                {"name": "N", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]}))
        .unwrap();
        let want = [("P_A", "1"), ("P_B", "own"), ("X", "1-$(Y)"), ("T", "tok"), ("N", "p")];
        assert_eq!(env, want.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }

    #[test]
    fn what_is_missing_is_told_in_upstreams_words() {
        let of = |source: Value| run(json!({"name": "c", "env": [{"name": "X", "valueFrom": source}]}));
        let cases = [
            (json!({"configMapKeyRef": {"name": "no", "key": "k"}}), "configmap \"no\" not found"),
            (json!({"secretKeyRef": {"name": "no", "key": "k"}}), "secret \"no\" not found"),
            (json!({"configMapKeyRef": {"name": "m", "key": "k"}}), "couldn't find key k in ConfigMap n/m"),
        ];
        for (source, want) in cases {
            assert_eq!(of(source).unwrap_err(), want);
        }
        assert!(
            of(json!({"secretKeyRef": {"name": "no", "key": "k", "optional": true}})).unwrap().is_empty()
        );
    }

    #[test]
    fn services_of_the_namespace_are_announced() {
        let service = json!({"metadata": {"name": "my-db", "namespace": "n"},
            "spec": {"clusterIP": "10.1.2.3", "ports": [{"name": "sql", "port": 5432, "protocol": "TCP"}]}});
        let other = json!({"metadata": {"name": "else", "namespace": "o"},
            "spec": {"clusterIP": "10.1.2.4", "ports": [{"port": 1}]}});
        let services: Vec<Arc<Service>> =
            [service, other].map(|service| Arc::new(serde_json::from_value(service).unwrap())).into();
        let pod =
            json!({"metadata": {"name": "p", "namespace": "n"}, "spec": {"containers": [{"name": "c"}]}});
        let mut pod: Pod = serde_json::from_value(pod).unwrap();
        let env = service_variables(&pod, &services);
        assert_eq!(env["MY_DB_SERVICE_HOST"], "10.1.2.3");
        assert_eq!(env["MY_DB_SERVICE_PORT_SQL"], "5432");
        assert_eq!(env["MY_DB_PORT_5432_TCP"], "tcp://10.1.2.3:5432");
        assert_eq!(env.len(), 8);
        pod.spec.as_mut().unwrap().enable_service_links = Some(false);
        assert!(service_variables(&pod, &services).is_empty());
    }
}
