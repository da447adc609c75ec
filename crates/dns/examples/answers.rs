//! How many questions one server answers: `cargo run --release -p knarr-dns --example answers -- [SECONDS]`.
//! Asks over loopback, with many questions under way, for a Service among 10,000.

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, MessageType, OpCode, Query};
use hickory_proto::rr::{Name, RecordType};
use k8s_openapi::api::core::v1::{Service, ServiceSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use knarr_dns::{DnsConfig, DnsServer, Upstreams};
use tokio_util::sync::CancellationToken;

const SERVICES: u32 = 10_000;
const UNDER_WAY: usize = 32;

fn main() {
    let seconds: u64 = std::env::args().nth(1).map_or(3, |text| text.parse().expect("a number"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let config = DnsConfig {
            domain: "cluster.local".into(),
            listen: vec!["127.0.0.1:0".parse().expect("an address")],
            upstreams: Upstreams::fixed(vec![]),
        };
        let server = DnsServer::bind(config).await.expect("a free port");
        server.update(|index| (0..SERVICES).for_each(|number| index.set_service(&service(number))));
        let address = server.addresses().expect("bound")[0];
        let answers = Arc::new(AtomicU64::new(0));
        let counter = answers.clone();
        let client = std::thread::spawn(move || {
            let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
            socket.connect(address).expect("a server");
            let questions: Vec<Vec<u8>> =
                (0..UNDER_WAY as u32).map(|number| question(number * 300)).collect();
            questions.iter().for_each(|bytes| drop(socket.send(bytes)));
            let end = Instant::now() + Duration::from_secs(seconds);
            let mut buffer = [0; 1500];
            let mut next = 0;
            while Instant::now() < end {
                socket.recv(&mut buffer).expect("an answer");
                counter.fetch_add(1, Ordering::Relaxed);
                socket.send(&questions[next]).expect("sent");
                next = (next + 1) % UNDER_WAY;
            }
        });
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let running = tokio::spawn(server.run(stop));
        tokio::task::spawn_blocking(move || client.join()).await.expect("joined").expect("no panic");
        stopped.cancel();
        running.await.expect("ended");
        println!("{:.0} answers/s with one thread", answers.load(Ordering::Relaxed) as f64 / seconds as f64);
    });
}

fn service(number: u32) -> Service {
    let ip = std::net::Ipv4Addr::from_bits(0x0a60_0100 + number).to_string();
    let spec = ServiceSpec { cluster_ip: Some(ip), ..Default::default() };
    let name = Some(format!("s{number}"));
    let metadata = ObjectMeta { name, namespace: Some("default".into()), ..Default::default() };
    Service { metadata, spec: Some(spec), ..Default::default() }
}

fn question(number: u32) -> Vec<u8> {
    let mut message = Message::new(number as u16, MessageType::Query, OpCode::Query);
    let name = Name::from_ascii(format!("s{number}.default.svc.cluster.local.")).expect("a name");
    message.add_query(Query::query(name, RecordType::A));
    message.to_vec().expect("encodes")
}
