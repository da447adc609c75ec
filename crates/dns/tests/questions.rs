//! Questions over real sockets on loopback, by the cases of the Kubernetes DNS specification 1.1.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use knarr_dns::{DnsConfig, DnsServer, Index, Upstreams};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(5);

struct World {
    address: SocketAddr,
    stop: CancellationToken,
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl World {
    async fn new(upstreams: Vec<SocketAddr>) -> World {
        let config = DnsConfig {
            domain: "cluster.local".into(),
            listen: vec!["127.0.0.1:0".parse().unwrap()],
            upstreams: Upstreams::fixed(upstreams),
        };
        let server = DnsServer::bind(config).await.unwrap();
        server.update(fill);
        let (address, stop) = (server.addresses().unwrap()[0], CancellationToken::new());
        tokio::spawn(server.run(stop.clone()));
        World { address, stop }
    }

    async fn ask(&self, name: &str, kind: RecordType) -> Message {
        let reply = self.raw(&question(name, kind).to_vec().unwrap()).await.expect("an answer");
        Message::from_vec(&reply).unwrap()
    }

    async fn raw(&self, bytes: &[u8]) -> Option<Vec<u8>> {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.send_to(bytes, self.address).await.unwrap();
        let mut buffer = vec![0; 65535];
        let len = tokio::time::timeout(PATIENCE, socket.recv(&mut buffer)).await.ok()?.unwrap();
        Some(buffer[..len].to_vec())
    }
}

fn question(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
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

fn service(name: &str, change: impl FnOnce(&mut ServiceSpec)) -> Service {
    let port = ServicePort {
        name: Some("http".into()),
        protocol: Some("TCP".into()),
        port: 80,
        ..Default::default()
    };
    let mut spec = ServiceSpec { ports: Some(vec![port]), ..Default::default() };
    change(&mut spec);
    Service { metadata: meta(name, &[]), spec: Some(spec), ..Default::default() }
}

fn slice(owner: &str, endpoints: &[(&str, Option<&str>, bool)]) -> EndpointSlice {
    let endpoint = |(ip, hostname, ready): &(&str, Option<&str>, bool)| Endpoint {
        addresses: vec![(*ip).into()],
        hostname: hostname.map(str::to_owned),
        conditions: Some(EndpointConditions { ready: Some(*ready), ..Default::default() }),
        ..Default::default()
    };
    let port = EndpointPort {
        name: Some("http".into()),
        protocol: Some("TCP".into()),
        port: Some(8080),
        ..Default::default()
    };
    EndpointSlice {
        metadata: meta(&format!("{owner}-1"), &[("kubernetes.io/service-name", owner)]),
        address_type: if endpoints[0].0.contains(':') { "IPv6" } else { "IPv4" }.into(),
        endpoints: Some(endpoints.iter().map(endpoint).collect()),
        ports: Some(vec![port]),
    }
}

fn fill(index: &mut Index) {
    let headless = |spec: &mut ServiceSpec| spec.cluster_ip = Some("None".into());
    let alias = |target: &'static str| {
        move |spec: &mut ServiceSpec| {
            spec.type_ = Some("ExternalName".into());
            spec.external_name = Some(target.into());
        }
    };
    index.set_service(&service("web", |spec| {
        spec.cluster_ip = Some("10.96.0.20".into());
        spec.cluster_ips = Some(vec!["10.96.0.20".into(), "fd00:96::20".into()]);
    }));
    index.set_slice(&slice("web", &[("10.244.0.9", None, true)]));
    index.set_service(&service("db", headless));
    let endpoints =
        [("10.244.0.2", Some("db-0"), true), ("10.244.0.3", None, true), ("10.244.0.4", None, false)];
    index.set_slice(&slice("db", &endpoints));
    index.set_service(&service("empty", headless));
    index.set_service(&service("many", headless));
    let ips: Vec<String> = (0..200).map(|i| format!("10.245.0.{i}")).collect();
    let endpoints: Vec<_> = ips.iter().map(|ip| (ip.as_str(), None, true)).collect();
    index.set_slice(&slice("many", &endpoints));
    index.set_service(&service("out", alias("Example.com.")));
    index.set_service(&service("in", alias("web.default.svc.cluster.local")));
    index.set_service(&service("circle", alias("circle.default.svc.cluster.local")));
}

/// The answer in one line: code, records as `data`, and `soa` when the zone says "no".
fn summary(message: &Message) -> String {
    let mut parts = vec![format!("{:?}", message.metadata.response_code)];
    let mut data: Vec<String> =
        message.answers.iter().map(|record: &Record| record.data.to_string()).collect();
    data.sort();
    parts.extend(data);
    if matches!(message.authorities.first().map(|record| &record.data), Some(RData::SOA(_))) {
        parts.push("soa".into());
    }
    parts.join(" | ")
}

#[tokio::test]
async fn every_name_of_the_specification_answers_as_written() {
    use RecordType::*;
    let world = World::new(vec![]).await;
    let cases = [
        ("web.default.svc.cluster.local.", A, "NoError | 10.96.0.20"),
        ("WEB.Default.svc.CLUSTER.local.", A, "NoError | 10.96.0.20"),
        ("web.default.svc.cluster.local.", AAAA, "NoError | fd00:96::20"),
        ("web.default.svc.cluster.local.", TXT, "NoError | soa"),
        (
            "_http._tcp.web.default.svc.cluster.local.",
            SRV,
            "NoError | 0 100 80 web.default.svc.cluster.local.",
        ),
        ("_http._udp.web.default.svc.cluster.local.", SRV, "NXDomain | soa"),
        ("_http._tcp.web.default.svc.cluster.local.", A, "NoError | soa"),
        ("_tcp.web.default.svc.cluster.local.", A, "NoError | soa"),
        ("db.default.svc.cluster.local.", A, "NoError | 10.244.0.2 | 10.244.0.3"),
        ("db.default.svc.cluster.local.", AAAA, "NoError | soa"),
        ("db-0.db.default.svc.cluster.local.", A, "NoError | 10.244.0.2"),
        ("10-244-0-3.db.default.svc.cluster.local.", A, "NoError | 10.244.0.3"),
        ("10-244-0-4.db.default.svc.cluster.local.", A, "NXDomain | soa"),
        (
            "_http._tcp.db.default.svc.cluster.local.",
            SRV,
            "NoError | 0 50 8080 10-244-0-3.db.default.svc.cluster.local. | 0 50 8080 db-0.db.default.svc.cluster.local.",
        ),
        ("empty.default.svc.cluster.local.", A, "NXDomain | soa"),
        ("gone.default.svc.cluster.local.", A, "NXDomain | soa"),
        ("web.nowhere.svc.cluster.local.", A, "NXDomain | soa"),
        ("default.svc.cluster.local.", A, "NoError | soa"),
        ("nowhere.svc.cluster.local.", A, "NXDomain | soa"),
        ("svc.cluster.local.", A, "NoError | soa"),
        ("cluster.local.", A, "NoError | soa"),
        ("cluster.local.", NS, "NoError | ns.dns.cluster.local."),
        ("example.cluster.local.", A, "NXDomain | soa"),
        ("1-2-3-4.default.pod.cluster.local.", A, "NoError | 1.2.3.4"),
        ("fd00--1.default.pod.cluster.local.", AAAA, "NoError | fd00::1"),
        ("nonsense.default.pod.cluster.local.", A, "NXDomain | soa"),
        ("dns-version.cluster.local.", TXT, "NoError | 1.1.0"),
        ("20.0.96.10.in-addr.arpa.", PTR, "NoError | web.default.svc.cluster.local."),
        ("2.0.244.10.in-addr.arpa.", PTR, "NoError | db-0.db.default.svc.cluster.local."),
        ("in.default.svc.cluster.local.", A, "NoError | 10.96.0.20 | web.default.svc.cluster.local."),
        ("out.default.svc.cluster.local.", CNAME, "NoError | example.com."),
        // Without upstream servers the alias is still right, and other names fail.
        ("out.default.svc.cluster.local.", A, "NoError | example.com."),
        ("example.com.", A, "ServFail"),
    ];
    for (name, kind, want) in cases {
        let answer = world.ask(name, kind).await;
        assert_eq!(summary(&answer), want, "{name} {kind}");
        assert!(answer.answers.iter().all(|record| record.ttl == 5), "{name} {kind}");
    }
    let circle = world.ask("circle.default.svc.cluster.local.", A).await;
    assert!(circle.answers.len() <= 8, "aliases in a circle end");
}

#[tokio::test]
async fn answers_too_long_for_udp_are_cut_and_come_whole_over_tcp() {
    let world = World::new(vec![]).await;
    let name = "many.default.svc.cluster.local.";
    let mut question = question(name, RecordType::A);
    let plain = world.raw(&question.to_vec().unwrap()).await.unwrap();
    assert!(plain.len() <= 512);
    let answer = Message::from_vec(&plain).unwrap();
    assert!(answer.metadata.truncation && !answer.answers.is_empty());

    let mut edns = Edns::new();
    edns.set_max_payload(4096);
    question.set_edns(edns);
    let bytes = question.to_vec().unwrap();
    let longer = world.raw(&bytes).await.unwrap();
    assert!(longer.len() > 512 && longer.len() <= 1232);
    assert!(Message::from_vec(&longer).unwrap().edns.is_some());

    let mut stream = TcpStream::connect(world.address).await.unwrap();
    for _ in 0..2 {
        stream.write_all(&(bytes.len() as u16).to_be_bytes()).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        let mut answer = vec![0; stream.read_u16().await.unwrap().into()];
        stream.read_exact(&mut answer).await.unwrap();
        let answer = Message::from_vec(&answer).unwrap();
        assert_eq!((answer.answers.len(), answer.metadata.truncation), (200, false));
    }
}

#[tokio::test]
async fn names_follow_the_objects() {
    let config = DnsConfig {
        domain: "cluster.local".into(),
        listen: vec!["127.0.0.1:0".parse().unwrap()],
        upstreams: Upstreams::fixed(vec![]),
    };
    let server = DnsServer::bind(config).await.unwrap();
    let mut index = Index::new();
    fill(&mut index);
    index.remove_service("default", "web");
    index.remove_slice("default", "db-1");
    assert!(index.service("default", "web").is_none());
    assert!(index.endpoints("default", "db").is_empty());
    assert!(index.names_of("10.96.0.20".parse().unwrap()).is_empty());
    assert!(index.names_of("10.244.0.2".parse().unwrap()).is_empty());
    drop(server);
}

/// A name server that says 192.0.2.1 to everything, over UDP only as "cut off".
async fn upstream(truncate: bool) -> SocketAddr {
    let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = tcp.local_addr().unwrap();
    let udp = UdpSocket::bind(address).await.unwrap();
    let reply = move |bytes: &[u8], cut: bool| {
        let mut message = Message::from_vec(bytes).unwrap().into_response();
        message.metadata.truncation = cut;
        if !cut {
            let name = message.queries[0].name().clone();
            message.add_answer(Record::from_rdata(
                name,
                60,
                RData::A(std::net::Ipv4Addr::new(192, 0, 2, 1).into()),
            ));
        }
        message.to_vec().unwrap()
    };
    tokio::spawn(async move {
        let mut buffer = vec![0; 2048];
        loop {
            let (len, peer) = udp.recv_from(&mut buffer).await.unwrap();
            // A forged answer first: another id.
            let mut forged = reply(&buffer[..len], false);
            forged[0] ^= 0xff;
            udp.send_to(&forged, peer).await.unwrap();
            udp.send_to(&reply(&buffer[..len], truncate), peer).await.unwrap();
        }
    });
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = tcp.accept().await.unwrap();
            let mut bytes = vec![0; stream.read_u16().await.unwrap().into()];
            stream.read_exact(&mut bytes).await.unwrap();
            let answer = reply(&bytes, false);
            stream.write_all(&(answer.len() as u16).to_be_bytes()).await.unwrap();
            stream.write_all(&answer).await.unwrap();
        }
    });
    address
}

#[tokio::test]
async fn other_names_are_forwarded_retried_over_tcp_and_cached() {
    for truncate in [false, true] {
        // The first server is dead; its port is closed.
        let dead = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let world = World::new(vec![dead, upstream(truncate).await]).await;
        for _ in 0..2 {
            let answer = world.ask("example.com.", RecordType::A).await;
            assert_eq!(summary(&answer), "NoError | 192.0.2.1");
            assert!(!answer.metadata.authoritative);
            assert_eq!(answer.metadata.id, 7);
        }
        let answer = world.ask("out.default.svc.cluster.local.", RecordType::A).await;
        assert_eq!(summary(&answer), "NoError | 192.0.2.1 | example.com.");
    }
}

#[tokio::test]
async fn requests_we_do_not_serve_get_the_right_code() {
    let world = World::new(vec![]).await;
    let mut notify = question("cluster.local.", RecordType::SOA);
    notify.metadata.op_code = OpCode::Notify;
    let mut two = question("cluster.local.", RecordType::SOA);
    two.add_query(two.queries[0].clone());
    for (message, code) in [(notify, ResponseCode::NotImp), (two, ResponseCode::FormErr)] {
        let reply = world.raw(&message.to_vec().unwrap()).await.unwrap();
        assert_eq!(Message::from_vec(&reply).unwrap().metadata.response_code, code);
    }
    let reply = world.raw(&[0, 9, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0xff]).await.unwrap();
    let reply = Message::from_vec(&reply).unwrap();
    assert_eq!((reply.metadata.id, reply.metadata.response_code), (9, ResponseCode::FormErr));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn hostile_packets_never_stop_the_server(packets in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..600), 1..20), flips in prop::collection::vec((0usize..40, any::<u8>()), 0..8)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let world = World::new(vec![]).await;
            let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let mut damaged = question("db.default.svc.cluster.local.", RecordType::SRV).to_vec().unwrap();
            for (place, value) in flips {
                let place = place % damaged.len();
                damaged[place] = value;
            }
            for packet in packets.iter().chain([&damaged]) {
                socket.send_to(packet, world.address).await.unwrap();
            }
            let answer = world.ask("web.default.svc.cluster.local.", RecordType::A).await;
            assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
        });
    }
}
