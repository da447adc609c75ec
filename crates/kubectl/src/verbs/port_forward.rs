//! `port-forward`: local ports that lead into a pod.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::Pod;
use knarr_api::object::Object;
use kube::Api;
use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::context::Context;
use crate::error::{Error, Result};
use crate::pods;
use crate::target;

/// Connections forwarded at once; more wait in the listener's queue.
const CONNECTIONS_MAX: usize = 1024;

#[derive(clap::Args)]
pub struct Args {
    /// TYPE/NAME, then [LOCAL:]REMOTE...
    #[arg(required = true)]
    words: Vec<String>,
    /// Addresses to listen on.
    #[arg(long, value_delimiter = ',', default_value = "localhost")]
    address: Vec<String>,
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    let (name, ports) = args.words.split_first().ok_or_else(|| Error::plain("TYPE/NAME and list of ports are required for port-forward"))?;
    if ports.is_empty() {
        return Err(Error::plain("TYPE/NAME and list of ports are required for port-forward"));
    }
    let found = target::fetch_one(context, std::slice::from_ref(name), "pods").await?;
    let pod = if found.resource.kind == "Pod" {
        found.object.clone()
    } else {
        let pods = pods::of_workload(context, &found).await?;
        pods.into_iter().next().ok_or_else(|| Error::plain(format!("no pods found for {}", found.named())))?
    };
    if pod.str_at("status.phase") != "Running" {
        return Err(Error::plain(format!("unable to forward port because pod is not running. Current status={}", pod.str_at("status.phase"))));
    }
    let service = (found.resource.kind == "Service").then_some(&found.object);
    let mut listeners = Vec::new();
    for port in ports {
        let (local, remote) = pair(port, service, &pod)?;
        listeners.extend(listen(&args.address, local, remote).await?);
    }
    let api: Api<Pod> = Api::namespaced(context.client().await?, pod.namespace());
    serve(api, pod.name(), listeners).await
}

/// `8080:80`, `8080:http`, `:80`, `80`.
fn pair(text: &str, service: Option<&Value>, pod: &Value) -> Result<(u16, u16)> {
    let invalid = || Error::plain(format!("error parsing local port: invalid port format {text:?}"));
    let (local, remote) = match text.split_once(':') {
        Some(("", remote)) => (Some(0), remote),
        Some((local, remote)) => (Some(local.parse().map_err(|_| invalid())?), remote),
        None => (None, text),
    };
    let port = remote_port(remote, service, pod)?;
    // A bare port is the same on both sides, as the user named it.
    let local = local.unwrap_or_else(|| remote.parse().unwrap_or(port));
    Ok((local, port))
}

/// The pod's port behind a port of the service, or a named port of a container.
fn remote_port(text: &str, service: Option<&Value>, pod: &Value) -> Result<u16> {
    let Some(service) = service else { return pod_port(text, pod) };
    let ports = service.list_at("spec.ports");
    let found = ports.iter().find(|p| p.str_at("name") == text || p.int_at("port").is_some_and(|n| text.parse() == Ok(n)));
    let Some(port) = found else {
        return Err(Error::plain(format!("Service {} does not have a service port {text}", service.name())));
    };
    if service.str_at("spec.clusterIP") == "None" {
        return pod_port(&port["port"].to_string(), pod);
    }
    match &port["targetPort"] {
        Value::String(name) => pod_port(name, pod),
        Value::Number(number) => pod_port(&number.to_string(), pod),
        _ => pod_port(&port["port"].to_string(), pod),
    }
}

fn pod_port(text: &str, pod: &Value) -> Result<u16> {
    if let Ok(port) = text.parse::<u16>()
        && port > 0
    {
        return Ok(port);
    }
    let ports = pod.list_at("spec.containers").iter().flat_map(|c| c.list_at("ports"));
    let found = ports.filter(|p| p.str_at("name") == text).find_map(|p| p.int_at("containerPort"));
    found.and_then(|p| u16::try_from(p).ok()).ok_or_else(|| Error::plain(format!("Pod '{}' does not have a named port '{text}'", pod.name())))
}

async fn listen(addresses: &[String], local: u16, remote: u16) -> Result<Vec<(TcpListener, u16)>> {
    let mut listeners: Vec<(TcpListener, u16)> = Vec::new();
    let mut failures = Vec::new();
    let mut port = local;
    for address in addresses {
        let ips: Vec<&str> = if address == "localhost" { vec!["127.0.0.1", "::1"] } else { vec![address] };
        for ip in ips {
            let ip: IpAddr = ip.parse().map_err(|_| Error::plain(format!("{ip} is not a valid IP")))?;
            match TcpListener::bind((ip, port)).await {
                Ok(listener) => {
                    let bound = listener.local_addr()?;
                    // A random port is the same on every address.
                    port = bound.port();
                    println!("Forwarding from {bound} -> {remote}");
                    listeners.push((listener, remote));
                }
                Err(error) => failures.push(format!("unable to listen on {ip} port {port}: {error}")),
            }
        }
    }
    if listeners.is_empty() {
        return Err(Error::plain(format!("unable to listen on any of the requested ports: [{{{local} {remote}}}]: {}", failures.join("; "))));
    }
    Ok(listeners)
}

/// Forwards connections until the process is interrupted.
async fn serve(api: Api<Pod>, pod: &str, listeners: Vec<(TcpListener, u16)>) -> Result<()> {
    let mut tasks = JoinSet::new();
    for (listener, remote) in listeners {
        let (api, pod) = (api.clone(), pod.to_owned());
        tasks.spawn(async move { accept(api, pod, listener, remote).await });
    }
    while let Some(ended) = tasks.join_next().await {
        ended.map_err(|e| Error::plain(format!("lost connection to pod: {e}")))??;
    }
    Ok(())
}

async fn accept(api: Api<Pod>, pod: String, listener: TcpListener, remote: u16) -> Result<()> {
    let port = listener.local_addr()?.port();
    let mut connections = JoinSet::new();
    loop {
        while connections.len() >= CONNECTIONS_MAX {
            connections.join_next().await;
        }
        let (stream, _) = listener.accept().await?;
        println!("Handling connection for {port}");
        while connections.try_join_next().is_some() {}
        let (api, pod) = (api.clone(), pod.clone());
        connections.spawn(async move {
            if let Err(error) = forward(&api, &pod, stream, remote).await {
                eprintln!("an error occurred forwarding {port} -> {remote}: {error}");
            }
        });
    }
}

async fn forward(api: &Api<Pod>, pod: &str, mut local: TcpStream, remote: u16) -> std::result::Result<(), String> {
    let mut forwarder = api.portforward(pod, &[remote]).await.map_err(|e| e.to_string())?;
    let failure = forwarder.take_error(remote);
    let mut stream = forwarder.take_stream(remote).ok_or("the server opened no stream")?;
    // Either side may close first; that is no failure of the forwarding.
    let _ = tokio::io::copy_bidirectional(&mut local, &mut stream).await;
    drop(stream);
    let _ = forwarder.join().await;
    match failure {
        Some(failure) => failure.await.map_or(Ok(()), Err),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn ports_lead_where_the_user_means() {
        let pod = json!({"metadata":{"name":"p"},"spec":{"containers":[{"ports":[{"name":"http","containerPort":8080}]}]}});
        let service = json!({"metadata":{"name":"s"},"spec":{"clusterIP":"10.0.0.1","ports":[{"name":"web","port":80,"targetPort":"http"},{"port":81,"targetPort":9000}]}});
        for (text, service, expected) in [
            ("80", None, (80, 80)),
            ("18080:80", None, (18080, 80)),
            (":80", None, (0, 80)),
            ("1:http", None, (1, 8080)),
            ("80", Some(&service), (80, 8080)),
            ("5:web", Some(&service), (5, 8080)),
            ("5:81", Some(&service), (5, 9000)),
        ] {
            assert_eq!(pair(text, service, &pod).expect(text), expected, "{text}");
        }
        assert!(pair("x:80", None, &pod).is_err());
        assert!(pair("5:99", Some(&service), &pod).expect_err("none").to_string().contains("does not have a service port 99"));
    }
}
