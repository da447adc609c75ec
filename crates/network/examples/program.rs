//! How long it takes to program Services: all at once, one more, one endpoint changed; and to attach pods.
//!
//! `cargo run --release -p knarr-network --example program -- [SERVICES [ENDPOINTS]]`, as root. Works in a
//! network namespace of its own.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use knarr_network::nft::NftProgram;
use knarr_network::proxy::ProxyEvent;
use knarr_network::{PodNetwork, PodRef, ProxyConfig, RoutedConfig, RoutedNetwork, ServiceProxy};
use nix::sched::{CloneFlags, unshare};

const PODS: usize = 50;

fn main() {
    let mut arguments = std::env::args().skip(1).map(|text| text.parse().expect("a number"));
    let (services, endpoints) = (arguments.next().unwrap_or(10_000), arguments.next().unwrap_or(4));
    unshare(CloneFlags::CLONE_NEWNET).expect("root, to make a network namespace");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        program(services, endpoints).await;
        attach().await;
    });
}

async fn program(services: usize, endpoints: usize) {
    let config = ProxyConfig {
        node_name: "n1".into(),
        cluster_cidrs: vec!["10.128.0.0/9".parse().expect("a range")],
        service_cidrs: vec!["10.96.0.0/12".parse().expect("a range")],
    };
    let mut proxy = ServiceProxy::new(config, Arc::new(NftProgram));
    for number in 0..services {
        proxy.note(service(number));
        proxy.note(slice(number, endpoints));
    }
    timed(&mut proxy, &format!("{services} services x {endpoints} endpoints")).await;
    proxy.note(service(services));
    proxy.note(slice(services, endpoints));
    timed(&mut proxy, "one service more").await;
    proxy.note(slice(0, endpoints + 1));
    timed(&mut proxy, "one endpoint more").await;
    proxy.note(slice(0, endpoints));
    timed(&mut proxy, "one endpoint less").await;
}

async fn timed(proxy: &mut ServiceProxy, what: &str) {
    let start = Instant::now();
    let done = proxy.sync().await.expect("nft takes the rules");
    println!("{what}: {} entries in {:.1} ms", done.entries, start.elapsed().as_secs_f64() * 1e3);
}

async fn attach() {
    let state = tempfile::tempdir().expect("a directory");
    let config = RoutedConfig {
        device: "knarr0".into(),
        state_dir: state.path().join("network"),
        pod_cidrs: vec!["10.244.0.0/24".parse().expect("a range")],
        cluster_cidrs: vec![],
        service_cidrs: vec![],
        mtu: None,
    };
    let start = Instant::now();
    let network = RoutedNetwork::start(config).await.expect("the network starts");
    println!("network started in {:.1} ms", start.elapsed().as_secs_f64() * 1e3);
    let namespaces: Vec<std::fs::File> = (0..PODS)
        .map(|_| {
            let made = std::thread::spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET).expect("root");
                std::fs::File::open("/proc/thread-self/ns/net").expect("own namespace")
            });
            made.join().expect("a namespace")
        })
        .collect();
    let start = Instant::now();
    for (number, namespace) in namespaces.iter().enumerate() {
        use std::os::fd::AsRawFd;
        let pod = PodRef::new("default", format!("p{number}"), format!("uid-{number}"));
        let path = format!("/proc/self/fd/{}", namespace.as_raw_fd());
        network.attach(&pod, path.as_ref(), &[]).await.expect("the pod is attached");
    }
    println!("attach: {:.2} ms a pod", start.elapsed().as_secs_f64() * 1e3 / PODS as f64);
    let start = Instant::now();
    for number in 0..PODS {
        network.detach(&format!("uid-{number}")).await.expect("the pod is detached");
    }
    println!("detach: {:.2} ms a pod", start.elapsed().as_secs_f64() * 1e3 / PODS as f64);
}

fn service(number: usize) -> ProxyEvent {
    let ip = std::net::Ipv4Addr::from_bits(0x0a60_0100 + number as u32).to_string();
    let port = ServicePort { port: 80, ..Default::default() };
    let spec = ServiceSpec { cluster_ip: Some(ip), ports: Some(vec![port]), ..Default::default() };
    let name = format!("s{number}");
    let metadata = ObjectMeta { name: Some(name), namespace: Some("default".into()), ..Default::default() };
    ProxyEvent::Service(Arc::new(Service { metadata, spec: Some(spec), ..Default::default() }))
}

fn slice(number: usize, endpoints: usize) -> ProxyEvent {
    let endpoint = |index: usize| Endpoint {
        addresses: vec![std::net::Ipv4Addr::from_bits(0x0a80_0000 + (number * 8 + index) as u32).to_string()],
        ..Default::default()
    };
    let label = ("kubernetes.io/service-name".to_owned(), format!("s{number}"));
    let metadata = ObjectMeta {
        name: Some(format!("s{number}-x")),
        namespace: Some("default".into()),
        labels: Some(BTreeMap::from([label])),
        ..Default::default()
    };
    ProxyEvent::Slice(Arc::new(EndpointSlice {
        metadata,
        address_type: "IPv4".into(),
        endpoints: Some((0..endpoints).map(endpoint).collect()),
        ports: Some(vec![EndpointPort { port: Some(8080), ..Default::default() }]),
    }))
}
