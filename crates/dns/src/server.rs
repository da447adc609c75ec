//! Moves packets: UDP and TCP in, answers out.
//!
//! Questions about the cluster are answered where they are received, without a task each; only those that
//! have to be forwarded get one. Hostile bytes cost a parse and at most a small error answer.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use knarr_client::{Informer, Informers};
use parking_lot::RwLock;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::answer::{self, Answer, Zone};
use crate::forward::Upstreams;
use crate::index::Index;

/// What may be sent over UDP: to clients without EDNS, and at most (DNS flag day 2020).
const UDP_LEN_MIN: u16 = 512;
const UDP_LEN_MAX: u16 = 1232;
/// Open TCP connections of clients; more wait in the kernel's backlog.
const CONNECTIONS_MAX: usize = 128;
/// How long a TCP connection may be silent.
const CONNECTION_IDLE: Duration = Duration::from_secs(10);
const HEADER_LEN: usize = 12;

/// What the server is told.
pub struct DnsConfig {
    /// The cluster's domain: `cluster.local`.
    pub domain: String,
    /// Where to listen, UDP and TCP each; usually port 53 of the pod network's gateways.
    pub listen: Vec<SocketAddr>,
    /// Who is asked about everything else.
    pub upstreams: Upstreams,
}

/// Cluster DNS of one node: bound sockets and the names it knows.
pub struct DnsServer {
    shared: Arc<Shared>,
    udp: Vec<Arc<UdpSocket>>,
    tcp: Vec<TcpListener>,
}

struct Shared {
    zone: Zone,
    index: RwLock<Index>,
    upstreams: Upstreams,
    connections: Arc<Semaphore>,
}

impl DnsServer {
    /// Binds all addresses.
    ///
    /// # Errors
    /// The domain is none, or an address is taken or not of this host; the error names it.
    pub async fn bind(config: DnsConfig) -> io::Result<DnsServer> {
        let zone = Zone::new(&config.domain)
            .map_err(|error| io::Error::other(format!("cluster domain {:?}: {error}", config.domain)))?;
        let mut udp = Vec::new();
        let mut tcp = Vec::new();
        for address in config.listen {
            let failed = |error: io::Error| {
                io::Error::new(error.kind(), format!("cluster dns cannot listen on {address}: {error}"))
            };
            let listener = TcpListener::bind(address).await.map_err(failed)?;
            // Port 0 means any; then both protocols get the same.
            let bound = listener.local_addr().map_err(failed)?;
            udp.push(Arc::new(UdpSocket::bind(bound).await.map_err(failed)?));
            tcp.push(listener);
        }
        let shared = Shared {
            zone,
            index: RwLock::default(),
            upstreams: config.upstreams,
            connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
        };
        Ok(DnsServer { shared: Arc::new(shared), udp, tcp })
    }

    /// Where it listens.
    pub fn addresses(&self) -> io::Result<Vec<SocketAddr>> {
        self.tcp.iter().map(TcpListener::local_addr).collect()
    }

    /// Changes the names: for tests, or sources other than informers.
    pub fn update(&self, change: impl FnOnce(&mut Index)) {
        change(&mut self.shared.index.write());
    }

    /// Keeps the names as the informers say. The handlers stay as long as the informers do.
    pub fn follow(&self, informers: &Informers) {
        let shared = self.shared.clone();
        informers.get::<Service>().on_change(move |change| {
            let meta = &change.object().metadata;
            let mut index = shared.index.write();
            match change.is_deleted() {
                true => index.remove_service(text(&meta.namespace), text(&meta.name)),
                false => index.set_service(change.object()),
            }
        });
        let shared = self.shared.clone();
        let slices: Informer<EndpointSlice> = informers.get();
        slices.on_change(move |change| {
            let meta = &change.object().metadata;
            let mut index = shared.index.write();
            match change.is_deleted() {
                true => index.remove_slice(text(&meta.namespace), text(&meta.name)),
                false => index.set_slice(change.object()),
            }
        });
    }

    /// Answers until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut tasks = JoinSet::new();
        for socket in self.udp {
            tasks.spawn(serve_udp(self.shared.clone(), socket));
        }
        for listener in self.tcp {
            tasks.spawn(serve_tcp(self.shared.clone(), listener));
        }
        shutdown.cancelled().await;
        tasks.shutdown().await;
    }
}

async fn serve_udp(shared: Arc<Shared>, socket: Arc<UdpSocket>) {
    let mut buffer = vec![0; usize::from(u16::MAX)];
    loop {
        let (len, client) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            // An earlier answer could not be delivered; nothing is wrong with the socket.
            Err(error) => {
                tracing::debug!(%error, "receiving a question failed");
                continue;
            }
        };
        let reply = match shared.handle(&buffer[..len]) {
            Handled::Nothing => continue,
            Handled::Reply(reply) => reply,
            Handled::Forward(forward) => {
                let (shared, socket) = (shared.clone(), socket.clone());
                tokio::spawn(async move {
                    let reply = shared.forward(forward).await;
                    send(&socket, &reply, client).await;
                });
                continue;
            }
        };
        send(&socket, &reply, client).await;
    }
}

async fn send(socket: &UdpSocket, reply: &Reply, client: SocketAddr) {
    let Some(bytes) = encode(&reply.message, reply.udp_len) else { return };
    if let Err(error) = socket.send_to(&bytes, client).await {
        tracing::debug!(%client, %error, "sending an answer failed");
    }
}

async fn serve_tcp(shared: Arc<Shared>, listener: TcpListener) {
    loop {
        let slot = shared.connections.clone().acquire_owned().await;
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely: wait for some connection to end.
                tracing::warn!(%error, "accepting a connection failed");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let shared = shared.clone();
        tokio::spawn(async move {
            let _slot = slot;
            if let Err(error) = converse(&shared, stream).await {
                tracing::debug!(%error, "connection ended");
            }
        });
    }
}

async fn converse(shared: &Shared, mut stream: TcpStream) -> io::Result<()> {
    loop {
        let len = timeout(CONNECTION_IDLE, stream.read_u16()).await??;
        let mut buffer = vec![0; len.into()];
        timeout(CONNECTION_IDLE, stream.read_exact(&mut buffer)).await??;
        let reply = match shared.handle(&buffer) {
            Handled::Nothing => return Ok(()),
            Handled::Reply(reply) => reply,
            Handled::Forward(forward) => shared.forward(forward).await,
        };
        let Some(bytes) = encode(&reply.message, u16::MAX) else { return Ok(()) };
        let framed = [&(bytes.len() as u16).to_be_bytes(), &bytes[..]].concat();
        timeout(CONNECTION_IDLE, stream.write_all(&framed)).await??;
    }
}

enum Handled {
    /// Not worth an answer: not a question, or too short to be answered.
    Nothing,
    Reply(Reply),
    Forward(Forward),
}

struct Reply {
    message: Message,
    /// What the client takes over UDP.
    udp_len: u16,
}

/// A question on its way out.
struct Forward {
    /// The beginnings of the answer: our part of a chain of aliases, or nothing.
    reply: Reply,
    target: Name,
}

impl Shared {
    fn handle(&self, bytes: &[u8]) -> Handled {
        let request = match Message::from_vec(bytes) {
            Ok(request) if request.metadata.message_type == MessageType::Query => request,
            Ok(_) => return Handled::Nothing,
            Err(_) => return malformed(bytes),
        };
        let mut reply = reply_to(&request);
        let question = match check(&request) {
            Ok(question) => question.clone(),
            Err(code) => {
                reply.message.metadata.response_code = code;
                return Handled::Reply(reply);
            }
        };
        let (name, kind) = (question.name(), question.query_type());
        let message = &mut reply.message;
        message.metadata.authoritative = true;
        match answer::answer(&self.index.read(), &self.zone, name, kind, rand::random::<u16>().into()) {
            Answer::Found { answers, additionals } => {
                message.answers = answers;
                message.additionals = additionals;
            }
            Answer::NoData => message.authorities = vec![self.zone.soa()],
            Answer::NoName => {
                message.metadata.response_code = ResponseCode::NXDomain;
                message.authorities = vec![self.zone.soa()];
            }
            Answer::Alias { answers, target } => {
                message.answers = answers;
                return Handled::Forward(Forward { reply, target });
            }
            Answer::Elsewhere => {
                message.metadata.authoritative = false;
                return Handled::Forward(Forward { reply, target: name.clone() });
            }
        }
        Handled::Reply(reply)
    }

    async fn forward(&self, Forward { mut reply, target }: Forward) -> Reply {
        let kind = reply.message.queries[0].query_type();
        let found = self.upstreams.ask(&target, kind).await;
        let message = &mut reply.message;
        // With an alias of ours in the answer, the alias is right even if its target cannot be found.
        if message.answers.is_empty() || found.metadata.response_code == ResponseCode::NoError {
            message.metadata.response_code = found.metadata.response_code;
            message.answers.extend(found.answers);
            message.authorities = found.authorities;
        }
        reply
    }
}

fn reply_to(request: &Message) -> Reply {
    let mut message = Message::response(request.metadata.id, request.metadata.op_code);
    message.metadata.recursion_desired = request.metadata.recursion_desired;
    message.metadata.recursion_available = true;
    message.metadata.checking_disabled = request.metadata.checking_disabled;
    message.queries = request.queries.clone();
    let mut udp_len = UDP_LEN_MIN;
    if let Some(edns) = &request.edns {
        udp_len = edns.max_payload().clamp(UDP_LEN_MIN, UDP_LEN_MAX);
        let mut edns = Edns::new();
        edns.set_max_payload(UDP_LEN_MAX);
        message.set_edns(edns);
    }
    Reply { message, udp_len }
}

/// The one question of a request, if we answer such.
fn check(request: &Message) -> Result<&Query, ResponseCode> {
    if request.metadata.op_code != OpCode::Query {
        return Err(ResponseCode::NotImp);
    }
    if request.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
        return Err(ResponseCode::BADVERS);
    }
    let [question] = &request.queries[..] else { return Err(ResponseCode::FormErr) };
    if question.query_class() != DNSClass::IN {
        return Err(ResponseCode::Refused);
    }
    Ok(question)
}

/// Tells the sender of an unreadable question so, unless it is an answer (two servers could go on for ever).
fn malformed(bytes: &[u8]) -> Handled {
    if bytes.len() < HEADER_LEN || bytes[2] & 0x80 != 0 {
        return Handled::Nothing;
    }
    let id = u16::from_be_bytes([bytes[0], bytes[1]]);
    let message = Message::error_msg(id, OpCode::Query, ResponseCode::FormErr);
    Handled::Reply(Reply { message, udp_len: UDP_LEN_MIN })
}

/// The bytes of an answer, at most `len_max`: what does not fit is left out and the answer marked as cut
/// off. Clients that cannot ask again over TCP (old musl) make do with the part.
fn encode(message: &Message, len_max: u16) -> Option<Vec<u8>> {
    let bytes = message.to_vec().ok();
    if let Some(bytes) = bytes.filter(|bytes| bytes.len() <= len_max.into()) {
        return Some(bytes);
    }
    let mut cut = message.clone();
    cut.additionals.clear();
    if let Some(bytes) = cut.to_vec().ok().filter(|bytes| bytes.len() <= len_max.into()) {
        return Some(bytes);
    }
    cut.metadata.truncation = true;
    cut.authorities.clear();
    loop {
        if let Some(bytes) = cut.to_vec().ok().filter(|bytes| bytes.len() <= len_max.into()) {
            return Some(bytes);
        }
        if cut.answers.is_empty() {
            return None;
        }
        // Halving keeps this short for answers of thousands of records.
        cut.answers.truncate(cut.answers.len() * 3 / 4);
    }
}

fn text(field: &Option<String>) -> &str {
    field.as_deref().unwrap_or_default()
}
