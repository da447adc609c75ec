//! Real packets through real rules, in network namespaces made by the test. Needs root and nftables.
//!
//! The world: a node with an uplink to a client outside the cluster, and pods attached by the built-in
//! network. Namespaces live as long as the test holds their files, so nothing has to be cleaned up.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use knarr_network::cni;
use knarr_network::nft::NftProgram;
use knarr_network::proxy::ProxyEvent;
use knarr_network::{
    HostPort, NetworkError, PodNetwork, PodRef, Protocol, ProxyConfig, RoutedConfig, RoutedNetwork,
    ServiceProxy, builtin,
};
use nix::sched::{CloneFlags, setns, unshare};
use tokio_util::sync::CancellationToken;

const NODE_IP: &str = "192.168.50.1";
const CLIENT_IP: &str = "192.168.50.2";
const SERVICE_IP: &str = "10.96.0.77";
const PATIENCE: Duration = Duration::from_secs(5);

/// A network namespace kept alive by an open file.
struct Namespace(File);

impl Namespace {
    fn new() -> Namespace {
        let open = || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            run("ip link set lo up");
            Namespace(File::open("/proc/thread-self/ns/net").unwrap())
        };
        std::thread::spawn(open).join().unwrap()
    }

    fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()).into()
    }

    fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&self.0, CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Answers every TCP connection with `name` and the address it saw.
    fn serve(&self, name: &str, port: u16) {
        let (name, listener) = (name.to_owned(), self.within(|| TcpListener::bind(("::", port)).unwrap()));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let peer = stream.peer_addr().unwrap().ip().to_canonical();
                _ = stream.write_all(format!("{name} {peer}").as_bytes());
            }
        });
    }

    /// Answers every datagram with `name` and the address it saw.
    fn serve_udp(&self, name: &str, port: u16) {
        let (name, socket) = (name.to_owned(), self.within(|| UdpSocket::bind(("0.0.0.0", port)).unwrap()));
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((_, peer)) = socket.recv_from(&mut buffer) {
                _ = socket.send_to(format!("{name} {}", peer.ip()).as_bytes(), peer);
            }
        });
    }

    /// Connects and reads the answer, or says why not.
    fn call(&self, ip: &str, port: u16) -> Result<String, std::io::ErrorKind> {
        let to = SocketAddr::new(ip.parse().unwrap(), port);
        self.within(|| {
            let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(1)).map_err(|e| e.kind())?;
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).map_err(|e| e.kind())?;
            Ok(answer)
        })
    }

    fn expect(&self, ip: &str, port: u16, answer: &str) {
        assert_eq!(self.call(ip, port).as_deref(), Ok(answer), "calling {ip}:{port}");
    }

    fn expect_refused(&self, ip: &str, port: u16) {
        assert_eq!(self.call(ip, port), Err(std::io::ErrorKind::ConnectionRefused), "calling {ip}:{port}");
    }
}

/// A node, a client beyond its uplink, and pods.
struct World {
    node: Namespace,
    client: Namespace,
    state: tempfile::TempDir,
}

struct Pod {
    namespace: Namespace,
    reference: PodRef,
    ip: String,
    ip6: String,
}

impl World {
    fn new() -> Option<World> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: needs root to make network namespaces");
            return None;
        }
        let world =
            World { node: Namespace::new(), client: Namespace::new(), state: tempfile::tempdir().unwrap() };
        let client = world.client.path();
        world.node.within(|| {
            run(&format!("ip link add up0 type veth peer name eth0 netns {}", client.display()));
            run(&format!("ip addr add {NODE_IP}/24 dev up0"));
            run("ip link set up0 up");
        });
        world.client.within(|| {
            run(&format!("ip addr add {CLIENT_IP}/24 dev eth0"));
            run("ip link set eth0 up");
            run(&format!("ip route add default via {NODE_IP}"));
        });
        Some(world)
    }

    fn config(&self) -> RoutedConfig {
        let ranges = |list: &[&str]| list.iter().map(|text| text.parse().unwrap()).collect();
        RoutedConfig {
            device: "knarr0".into(),
            state_dir: self.state.path().join("network"),
            pod_cidrs: ranges(&["10.244.0.0/24", "fd00:10:244::/64"]),
            cluster_cidrs: ranges(&["10.244.0.0/16", "fd00:10:244::/56"]),
            service_cidrs: ranges(&["10.96.0.0/12", "fd00:10:96::/112"]),
            mtu: None,
        }
    }

    /// Runs a future inside the node.
    fn on_node<T: Send>(&self, work: impl AsyncFnOnce(&RoutedNetwork) -> T + Send) -> T {
        self.node.within(|| {
            // Threads inherit the namespace of the one that makes them.
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            runtime.block_on(async {
                let network = RoutedNetwork::start(self.config()).await.unwrap();
                work(&network).await
            })
        })
    }

    fn pod(&self, name: &str, ports: &[HostPort]) -> Pod {
        let namespace = Namespace::new();
        let reference = PodRef::new("default", name, format!("uid-{name}"));
        let path = namespace.path();
        let ips = self.on_node(async |network| network.attach(&reference, &path, ports).await.unwrap().ips);
        namespace.serve(name, 8080);
        namespace.serve_udp(name, 5353);
        Pod { namespace, reference, ip: ips[0].to_string(), ip6: ips[1].to_string() }
    }

    /// Programs Services from nothing, as a freshly started proxy does.
    fn program(&self, events: &[ProxyEvent]) {
        self.on_node(async |_| {
            let mut proxy = self.proxy();
            for event in events {
                proxy.note(event.clone());
            }
            proxy.sync().await.unwrap();
        });
    }

    fn proxy(&self) -> ServiceProxy {
        let config = ProxyConfig {
            node_name: "n1".into(),
            cluster_cidrs: self.config().cluster_cidrs,
            service_cidrs: self.config().service_cidrs,
        };
        ServiceProxy::new(config, Arc::new(NftProgram))
    }
}

fn run(command: &str) {
    let words: Vec<&str> = command.split(' ').collect();
    let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

fn service(change: impl FnOnce(&mut ServiceSpec)) -> ProxyEvent {
    let port = |name: &str, protocol: &str, port, node_port| ServicePort {
        name: Some(name.into()),
        protocol: Some(protocol.into()),
        port,
        node_port: Some(node_port),
        ..Default::default()
    };
    let mut spec = ServiceSpec {
        cluster_ip: Some(SERVICE_IP.into()),
        cluster_ips: Some(vec![SERVICE_IP.into()]),
        ports: Some(vec![port("web", "TCP", 80, 30080), port("dns", "UDP", 53, 30053)]),
        ..Default::default()
    };
    change(&mut spec);
    ProxyEvent::Service(Arc::new(Service {
        metadata: meta("web", &[]),
        spec: Some(spec),
        ..Default::default()
    }))
}

fn meta(name: &str, labels: &[(&str, &str)]) -> ObjectMeta {
    let labels: BTreeMap<String, String> = labels.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
    ObjectMeta {
        name: Some(name.into()),
        namespace: Some("default".into()),
        labels: Some(labels),
        ..Default::default()
    }
}

/// A slice of the Service `web`; addresses on node `n1` unless the list says otherwise.
fn slice(endpoints: &[(&str, &str)]) -> ProxyEvent {
    let endpoint = |(ip, node): &(&str, &str)| Endpoint {
        addresses: vec![(*ip).into()],
        conditions: Some(EndpointConditions { ready: Some(true), ..Default::default() }),
        node_name: Some((*node).into()),
        ..Default::default()
    };
    let port = |name: &str, protocol: &str, port| EndpointPort {
        name: Some(name.into()),
        protocol: Some(protocol.into()),
        port: Some(port),
        ..Default::default()
    };
    let six = endpoints.first().is_some_and(|(ip, _)| ip.contains(':'));
    ProxyEvent::Slice(Arc::new(EndpointSlice {
        metadata: meta(if six { "web-6" } else { "web-4" }, &[("kubernetes.io/service-name", "web")]),
        address_type: if six { "IPv6" } else { "IPv4" }.into(),
        endpoints: Some(endpoints.iter().map(endpoint).collect()),
        ports: Some(vec![port("web", "TCP", 8080), port("dns", "UDP", 5353)]),
    }))
}

#[test]
fn pods_reach_each_other_the_node_and_beyond() {
    let Some(world) = World::new() else { return };
    let (a, b) = (world.pod("a", &[]), world.pod("b", &[]));
    world.client.serve("client", 9000);
    world.node.serve("node", 9000);
    a.namespace.expect(&b.ip, 8080, &format!("b {}", a.ip));
    a.namespace.expect(&b.ip6, 8080, &format!("b {}", a.ip6));
    a.namespace.expect("10.244.0.1", 9000, &format!("node {}", a.ip));
    world.node.expect(&a.ip, 8080, "a 10.244.0.1");
    // Nobody outside knows the pods' addresses.
    a.namespace.expect(CLIENT_IP, 9000, &format!("client {NODE_IP}"));
}

#[test]
fn attaching_is_idempotent_and_mends_what_is_broken() {
    let Some(world) = World::new() else { return };
    let a = world.pod("a", &[]);
    let path = a.namespace.path();
    let again = world.on_node(async |network| network.attach(&a.reference, &path, &[]).await.unwrap());
    assert_eq!(again.ips[0].to_string(), a.ip);
    a.namespace.within(|| run("ip link set eth0 down"));
    let mended = world.on_node(async |network| network.attach(&a.reference, &path, &[]).await.unwrap());
    assert_eq!(mended.ips[0].to_string(), a.ip);
    world.node.expect(&a.ip, 8080, "a 10.244.0.1");
}

#[test]
fn detached_pods_leave_nothing_and_gc_finds_the_forgotten() {
    let Some(world) = World::new() else { return };
    let (a, b, c) = (world.pod("a", &[]), world.pod("b", &[]), world.pod("c", &[]));
    let freed = world.on_node(async |network| {
        network.detach(&a.reference.uid).await.unwrap();
        network.detach(&a.reference.uid).await.unwrap();
        network.detach("never-heard-of").await.unwrap();
        network.gc(&BTreeSet::from([b.reference.uid.clone()])).await.unwrap()
    });
    assert_eq!(freed, [c.reference.uid]);
    let links = world.node.within(|| Command::new("ip").args(["-o", "link"]).output().unwrap().stdout);
    let cables = String::from_utf8(links).unwrap().lines().filter(|line| line.contains(": knp")).count();
    assert_eq!(cables, 1, "only b's cable is left");
    world.node.expect(&b.ip, 8080, "b 10.244.0.1");
}

#[test]
fn purge_takes_everything_back_and_proves_it() {
    let Some(world) = World::new() else { return };
    let forward = || std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap();
    assert_eq!(world.node.within(forward), "0\n");
    let _a = world.pod("a", &[]);
    world.program(&[service(|_| {})]);
    assert_eq!(world.node.within(forward), "1\n");
    let state = world.config().state_dir;
    let report = world.node.within(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let before = builtin::verify_clean("knarr0", &state).await.unwrap();
            assert_eq!(before.leftovers.len(), 5, "{before:?}");
            builtin::purge(&state).await.unwrap();
            ServiceProxy::purge(&NftProgram).await.unwrap();
            builtin::verify_clean("knarr0", &state).await.unwrap()
        })
    });
    assert!(report.leftovers.is_empty(), "{report:?}");
    assert_eq!(report.checked.len(), 5);
    assert_eq!(world.node.within(forward), "0\n");
}

#[test]
fn a_foreign_device_of_the_same_name_is_left_alone() {
    let Some(world) = World::new() else { return };
    let error = world.node.within(|| {
        run("ip link add knarr0 type veth peer name other");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(RoutedNetwork::start(world.config())).err().unwrap()
    });
    assert!(matches!(error, NetworkError::ForeignDevice { .. }), "{error}");
}

#[test]
fn a_service_spreads_over_its_endpoints_from_pods_and_from_the_host() {
    let Some(world) = World::new() else { return };
    let (a, b, c) = (world.pod("a", &[]), world.pod("b", &[]), world.pod("c", &[]));
    world.program(&[service(|_| {}), slice(&[(&a.ip, "n1"), (&b.ip, "n1")])]);
    for from in [&c.namespace, &world.node] {
        let answers: BTreeSet<String> = (0..40)
            .map(|_| from.call(SERVICE_IP, 80).unwrap().split(' ').next().unwrap().to_owned())
            .collect();
        assert_eq!(answers.into_iter().collect::<Vec<_>>(), ["a", "b"]);
    }
    assert!(c.namespace.call(SERVICE_IP, 80).unwrap().ends_with(&c.ip), "pods keep their address");
}

#[test]
fn a_pod_reaches_itself_through_its_own_service() {
    let Some(world) = World::new() else { return };
    let a = world.pod("a", &[]);
    world.program(&[service(|_| {}), slice(&[(&a.ip, "n1")])]);
    a.namespace.expect(SERVICE_IP, 80, &format!("a {NODE_IP}"));
}

#[test]
fn node_ports_answer_on_every_address_of_the_node() {
    let Some(world) = World::new() else { return };
    let a = world.pod("a", &[]);
    world.program(&[service(|_| {}), slice(&[(&a.ip, "n1")])]);
    world.client.expect(NODE_IP, 30080, &format!("a {NODE_IP}"));
    world.node.expect(NODE_IP, 30080, &format!("a {NODE_IP}"));
    world.node.expect("127.0.0.1", 30080, &format!("a {NODE_IP}"));
    a.namespace.expect("10.244.0.1", 30080, &format!("a {NODE_IP}"));
}

#[test]
fn external_addresses_answer_and_other_ports_do_not() {
    let Some(world) = World::new() else { return };
    let a = world.pod("a", &[]);
    let external = service(|spec| spec.external_ips = Some(vec!["203.0.113.9".into()]));
    world.program(&[external, slice(&[(&a.ip, "n1")])]);
    world.client.expect("203.0.113.9", 80, &format!("a {NODE_IP}"));
    a.namespace.expect_refused(SERVICE_IP, 81);
}

#[test]
fn without_endpoints_callers_are_refused_at_once() {
    let Some(world) = World::new() else { return };
    let a = world.pod("a", &[]);
    world.program(&[service(|_| {})]);
    for from in [&a.namespace, &world.node] {
        from.expect_refused(SERVICE_IP, 80);
        from.expect_refused("10.96.200.200", 80);
    }
    world.client.expect_refused(NODE_IP, 30080);
    world.node.expect_refused("127.0.0.1", 30080);
}

#[test]
fn external_policy_local_keeps_the_clients_address_and_stays_on_the_node() {
    let Some(world) = World::new() else { return };
    let (a, b) = (world.pod("a", &[]), world.pod("b", &[]));
    let local = || service(|spec| spec.external_traffic_policy = Some("Local".into()));
    world.program(&[local(), slice(&[(&a.ip, "n1"), (&b.ip, "elsewhere")])]);
    for _ in 0..10 {
        world.client.expect(NODE_IP, 30080, &format!("a {CLIENT_IP}"));
    }
    // None here: dropped for the client, still served inside the cluster.
    world.program(&[local(), slice(&[(&b.ip, "elsewhere")])]);
    assert_eq!(world.client.call(NODE_IP, 30080), Err(std::io::ErrorKind::TimedOut));
    world.node.expect(NODE_IP, 30080, &format!("b {NODE_IP}"));
}

#[test]
fn internal_policy_local_uses_endpoints_of_the_node_only() {
    let Some(world) = World::new() else { return };
    let (a, b) = (world.pod("a", &[]), world.pod("b", &[]));
    let local = service(|spec| spec.internal_traffic_policy = Some("Local".into()));
    world.program(&[local, slice(&[(&a.ip, "n1"), (&b.ip, "elsewhere")])]);
    for _ in 0..10 {
        b.namespace.expect(SERVICE_IP, 80, &format!("a {}", b.ip));
    }
}

#[test]
fn session_affinity_sticks_until_the_endpoint_goes() {
    let Some(world) = World::new() else { return };
    let pods = [world.pod("a", &[]), world.pod("b", &[]), world.pod("c", &[])];
    let client = world.pod("client", &[]);
    let sticky = service(|spec| spec.session_affinity = Some("ClientIP".into()));
    world.on_node(async |_| {
        let mut proxy = world.proxy();
        let all: Vec<_> = pods.iter().map(|pod| (pod.ip.as_str(), "n1")).collect();
        proxy.note(sticky);
        proxy.note(slice(&all));
        proxy.sync().await.unwrap();
        let first = client.namespace.call(SERVICE_IP, 80).unwrap();
        let through_node = world.client.call(NODE_IP, 30080).unwrap();
        for _ in 0..10 {
            client.namespace.expect(SERVICE_IP, 80, &first);
            world.client.expect(NODE_IP, 30080, &through_node);
        }
        let others: Vec<_> = pods.iter().filter(|pod| !first.starts_with(&pod.reference.name)).collect();
        let rest: Vec<_> = others.iter().map(|pod| (pod.ip.as_str(), "n1")).collect();
        proxy.note(slice(&rest));
        proxy.sync().await.unwrap();
        let second = client.namespace.call(SERVICE_IP, 80).unwrap();
        assert_ne!(first, second);
        for _ in 0..10 {
            client.namespace.expect(SERVICE_IP, 80, &second);
        }
    });
}

#[test]
fn udp_clients_follow_when_their_endpoint_goes() {
    let Some(world) = World::new() else { return };
    let (a, b, c) = (world.pod("a", &[]), world.pod("b", &[]), world.pod("c", &[]));
    let socket = c.namespace.within(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let ask = || {
        let mut buffer = [0; 64];
        socket.send_to(b"?", (SERVICE_IP, 53)).unwrap();
        let len = socket.recv(&mut buffer).map_err(|e| e.kind())?;
        Ok::<_, std::io::ErrorKind>(String::from_utf8_lossy(&buffer[..len]).into_owned())
    };
    world.on_node(async |_| {
        let mut proxy = world.proxy();
        proxy.note(service(|_| {}));
        proxy.note(slice(&[(&a.ip, "n1")]));
        proxy.sync().await.unwrap();
        assert_eq!(ask().unwrap(), format!("a {}", c.ip));
        proxy.note(slice(&[(&b.ip, "n1")]));
        let done = proxy.sync().await.unwrap();
        assert_eq!(done.flows, 1);
        assert_eq!(ask().unwrap(), format!("b {}", c.ip));
    });
}

#[test]
fn host_ports_open_with_the_pod_and_close_with_it() {
    let Some(world) = World::new() else { return };
    let port = |host_port, host_ip: Option<&str>| HostPort {
        protocol: Protocol::Tcp,
        host_port,
        container_port: 8080,
        host_ip: host_ip.map(|ip| ip.parse::<IpAddr>().unwrap()),
    };
    let a = world.pod("a", &[port(8000, None), port(8001, Some(NODE_IP))]);
    world.client.expect(NODE_IP, 8000, &format!("a {CLIENT_IP}"));
    world.client.expect(NODE_IP, 8001, &format!("a {CLIENT_IP}"));
    world.node.expect("127.0.0.1", 8000, &format!("a {NODE_IP}"));
    world.node.expect_refused("127.0.0.1", 8001);
    a.namespace.expect(NODE_IP, 8000, &format!("a {NODE_IP}"));
    world.on_node(async |network| network.detach(&a.reference.uid).await.unwrap());
    world.client.expect_refused(NODE_IP, 8000);
}

#[test]
fn services_of_the_second_family_work_alike() {
    let Some(world) = World::new() else { return };
    let (a, b) = (world.pod("a", &[]), world.pod("b", &[]));
    let six = "fd00:10:96::77";
    let dual = service(|spec| spec.cluster_ips = Some(vec![SERVICE_IP.into(), six.into()]));
    world.program(&[dual, slice(&[(&a.ip, "n1")]), slice(&[(&a.ip6, "n1")])]);
    b.namespace.expect(six, 80, &format!("a {}", b.ip6));
    a.namespace.expect(six, 80, "a fd00:10:244::1");
    b.namespace.expect_refused(six, 81);
    world.node.expect("10.244.0.1", 30080, &format!("a {NODE_IP}"));
}

#[test]
fn pods_cannot_reach_the_hosts_loopback() {
    let Some(world) = World::new() else { return };
    let a = world.pod("a", &[]);
    world.node.serve("secret", 9999);
    a.namespace.within(|| {
        run("ip addr del 127.0.0.1/8 dev lo");
        run("ip route add 127.0.0.1 via 10.244.0.1 dev eth0 onlink");
    });
    assert!(a.namespace.call("127.0.0.1", 9999).is_err());
}

#[test]
fn flushed_rules_come_back_by_themselves() {
    let Some(world) = World::new() else { return };
    let a = world.pod("a", &[]);
    world.on_node(async |_| {
        let (sender, events) = tokio::sync::mpsc::channel(16);
        let stop = CancellationToken::new();
        let proxy = tokio::spawn(world.proxy().run(events, stop.clone()));
        for event in [service(|_| {}), slice(&[(&a.ip, "n1")]), ProxyEvent::Synced] {
            sender.send(event).await.unwrap();
        }
        reachable(&a, "the service programmed").await;
        for command in ["nft flush ruleset", "nft flush table inet knarr", "nft delete table inet knarr"] {
            run(command);
            reachable(&a, command).await;
        }
        stop.cancel();
        proxy.await.unwrap().unwrap();
        assert!(a.namespace.call(SERVICE_IP, 80).is_ok(), "rules stay when the proxy stops");
    });
}

async fn reachable(pod: &Pod, awaited: &str) {
    let deadline = Instant::now() + PATIENCE;
    // On another thread: the proxy under test needs this one.
    while tokio::task::block_in_place(|| pod.namespace.call(SERVICE_IP, 80)).is_err() {
        assert!(Instant::now() < deadline, "not reachable after: {awaited}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[test]
fn a_container_runtime_uses_it_as_a_plug_in() {
    let Some(world) = World::new() else { return };
    world.on_node(async |_| {});
    let pod = Namespace::new();
    let dir = tempfile::tempdir().unwrap();
    let list = cni::write_conflist(dir.path(), &world.config()).unwrap();
    let list: serde_json::Value = serde_json::from_slice(&std::fs::read(list).unwrap()).unwrap();
    let mut config = list["plugins"][0].clone();
    config["cniVersion"] = list["cniVersion"].clone();
    config["runtimeConfig"] = serde_json::json!({ "portMappings": [
        { "hostPort": 8000, "containerPort": 8080, "protocol": "tcp" }
    ] });
    let call_on = |config: &serde_json::Value, command: &str| {
        let call = cni::Call {
            command: command.into(),
            container: "c1".into(),
            namespace: pod.path().display().to_string(),
            device: "eth0".into(),
            args: "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=p".into(),
        };
        let mut output = Vec::new();
        let input = config.to_string();
        let code = world.on_node(async |_| cni::run(&call, input.as_bytes(), &mut output).await);
        (code, serde_json::from_slice::<serde_json::Value>(&output).unwrap_or_default())
    };
    let call = |command: &str| call_on(&config, command);
    let (code, result) = call("ADD");
    assert_eq!((code, result["ips"][0]["address"].as_str()), (0, Some("10.244.0.2/32")), "{result}");
    pod.serve("p", 8080);
    world.client.expect(NODE_IP, 8000, &format!("p {CLIENT_IP}"));
    assert_eq!(call("CHECK").0, 0);
    assert_eq!(call("ADD").1, result, "repeating is harmless");
    let mut with_valid = config.clone();
    with_valid["cni.dev/valid-attachments"] = serde_json::json!([{ "containerID": "c1", "ifname": "eth0" }]);
    assert_eq!(call_on(&with_valid, "GC").0, 0);
    assert_eq!(call("CHECK").0, 0);
    assert_eq!(call("DEL").0, 0);
    assert_eq!(call("DEL").0, 0);
    assert_eq!(call("CHECK").0, 1);
}

#[test]
fn masquerading_comes_back_after_a_flush() {
    let Some(world) = World::new() else { return };
    let a = world.pod("a", &[]);
    world.client.serve("client", 9000);
    world.on_node(async |network| {
        let stop = CancellationToken::new();
        let keeping = network.keep(stop.clone());
        let flushing = async {
            // Once before, so that the watch listens.
            tokio::task::yield_now().await;
            run("nft flush ruleset");
            let deadline = Instant::now() + PATIENCE;
            while tokio::task::block_in_place(|| a.namespace.call(CLIENT_IP, 9000)).is_err() {
                assert!(Instant::now() < deadline, "not reachable after a flush");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            stop.cancel();
        };
        tokio::join!(keeping, flushing).0.unwrap();
    });
}
