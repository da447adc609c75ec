//! Asks the world: forwards questions that are not about the cluster to the host's name servers.
//!
//! Over UDP with a fresh source port each, over TCP when the answer was cut off; the first server that
//! answers wins. Answers are cached briefly. Which servers: `/etc/resolv.conf`, read again when it changes.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RData, RecordType};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

const PORT: u16 = 53;
/// Servers taken from `resolv.conf`, like the C library.
const SERVERS_MAX: usize = 3;
/// What one server gets to answer.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Questions under way at once; more are refused with SERVFAIL rather than kept waiting.
const FORWARDS_MAX: usize = 256;
/// Cached answers, and how long the longest is kept: CoreDNS' default.
const CACHE_ENTRIES_MAX: usize = 1024;
const CACHE_SECONDS_MAX: u32 = 30;
/// The size announced to servers: fits one packet on any usual link (DNS flag day 2020).
const PAYLOAD_LEN: u16 = 1232;

/// The host's name servers.
pub struct Upstreams {
    source: Source,
    /// Addresses that lead back to us.
    own: Vec<IpAddr>,
    known: Mutex<Known>,
    cache: Mutex<HashMap<Key, Cached>>,
    slots: Semaphore,
}

enum Source {
    File(PathBuf),
    Fixed(Vec<SocketAddr>),
}

#[derive(Default)]
struct Known {
    modified: Option<SystemTime>,
    servers: Vec<SocketAddr>,
}

type Key = (Name, RecordType);

struct Cached {
    message: Message,
    stored: Instant,
    expires: Instant,
}

impl Upstreams {
    /// The servers in a `resolv.conf`, except those at our `own` addresses: asking them would go in circles.
    pub fn from_file(path: impl Into<PathBuf>, own: Vec<IpAddr>) -> Upstreams {
        Upstreams::new(Source::File(path.into()), own)
    }

    /// These servers.
    pub fn fixed(servers: Vec<SocketAddr>) -> Upstreams {
        Upstreams::new(Source::Fixed(servers), Vec::new())
    }

    fn new(source: Source, own: Vec<IpAddr>) -> Upstreams {
        Upstreams {
            source,
            own,
            known: Mutex::default(),
            cache: Mutex::default(),
            slots: Semaphore::new(FORWARDS_MAX),
        }
    }

    /// The answer to a question of class IN: from the cache, or from the first server that answers.
    /// SERVFAIL when none does.
    pub async fn ask(&self, name: &Name, kind: RecordType) -> Message {
        let key = (name.to_lowercase(), kind);
        if let Some(message) = self.cached(&key) {
            return message;
        }
        let Ok(_slot) = self.slots.try_acquire() else {
            tracing::warn!(limit = FORWARDS_MAX, "too many questions under way, refusing one");
            return failure();
        };
        for server in self.servers() {
            match timeout(TIMEOUT, exchange(server, name, kind)).await {
                Ok(Ok(message)) if message.metadata.response_code != ResponseCode::ServFail => {
                    self.remember(key, &message);
                    return message;
                }
                Ok(Ok(_)) => tracing::debug!(%server, %name, "name server failed"),
                Ok(Err(error)) => tracing::debug!(%server, %name, %error, "name server unreachable"),
                Err(_) => tracing::debug!(%server, %name, "name server does not answer"),
            }
        }
        failure()
    }

    fn servers(&self) -> Vec<SocketAddr> {
        let path = match &self.source {
            Source::Fixed(servers) => return servers.clone(),
            Source::File(path) => path,
        };
        let mut known = self.known.lock();
        let modified = std::fs::metadata(path).and_then(|meta| meta.modified()).ok();
        if modified != known.modified || modified.is_none() {
            let text = std::fs::read_to_string(path).unwrap_or_default();
            known.servers = parse_resolv_conf(&text, &self.own);
            known.modified = modified;
        }
        known.servers.clone()
    }

    fn cached(&self, key: &Key) -> Option<Message> {
        let cache = self.cache.lock();
        let cached = cache.get(key).filter(|cached| cached.expires > Instant::now())?;
        let age = cached.stored.elapsed().as_secs() as u32;
        let mut message = cached.message.clone();
        for record in message.answers.iter_mut().chain(&mut message.authorities) {
            record.ttl = record.ttl.saturating_sub(age);
        }
        Some(message)
    }

    fn remember(&self, key: Key, message: &Message) {
        let seconds = cache_seconds(message);
        if seconds == 0 {
            return;
        }
        let now = Instant::now();
        let mut cache = self.cache.lock();
        if cache.len() >= CACHE_ENTRIES_MAX {
            cache.retain(|_, cached| cached.expires > now);
        }
        if cache.len() >= CACHE_ENTRIES_MAX {
            // All are fresh: drop the one that expires first.
            let first = cache.iter().min_by_key(|(_, cached)| cached.expires).map(|(key, _)| key.clone());
            first.map(|first| cache.remove(&first));
        }
        let expires = now + Duration::from_secs(seconds.into());
        cache.insert(key, Cached { message: message.clone(), stored: now, expires });
    }
}

/// How long an answer may be kept: its shortest record, or for "no" what the SOA allows (RFC 2308).
fn cache_seconds(message: &Message) -> u32 {
    let negative = || {
        message.authorities.iter().find_map(|record| match &record.data {
            RData::SOA(soa) => Some(record.ttl.min(soa.minimum)),
            _ => None,
        })
    };
    let seconds = match message.metadata.response_code {
        ResponseCode::NoError if !message.answers.is_empty() => {
            message.answers.iter().map(|record| record.ttl).min()
        }
        ResponseCode::NoError | ResponseCode::NXDomain => negative(),
        _ => None,
    };
    seconds.unwrap_or(0).min(CACHE_SECONDS_MAX)
}

/// The usable `nameserver` lines.
pub fn parse_resolv_conf(text: &str, own: &[IpAddr]) -> Vec<SocketAddr> {
    let lines = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
    let addresses = lines.filter_map(|rest| rest.split_whitespace().next()?.parse::<IpAddr>().ok());
    addresses.filter(|ip| !own.contains(ip)).take(SERVERS_MAX).map(|ip| SocketAddr::new(ip, PORT)).collect()
}

/// The IPv4 addresses a DNS server gives for a name; none for a name it does not know. Waits as long as the
/// caller lets it.
pub async fn lookup(server: SocketAddr, name: &str) -> io::Result<Vec<Ipv4Addr>> {
    let name = Name::from_ascii(name).map_err(io::Error::other)?;
    let answer = exchange(server, &name, RecordType::A).await?;
    let addresses = answer.answers.iter().filter_map(|record| match &record.data {
        RData::A(address) => Some(address.0),
        _ => None,
    });
    Ok(addresses.collect())
}

async fn exchange(server: SocketAddr, name: &Name, kind: RecordType) -> io::Result<Message> {
    let mut question = Message::new(rand::random(), MessageType::Query, OpCode::Query);
    question.metadata.recursion_desired = true;
    question.add_query(Query::query(name.clone(), kind));
    let mut edns = Edns::new();
    edns.set_max_payload(PAYLOAD_LEN);
    question.set_edns(edns);
    let bytes = question.to_vec().map_err(io::Error::other)?;
    let answer = exchange_udp(server, &question, &bytes).await?;
    if answer.metadata.truncation { exchange_tcp(server, &question, &bytes).await } else { Ok(answer) }
}

async fn exchange_udp(server: SocketAddr, question: &Message, bytes: &[u8]) -> io::Result<Message> {
    let any: IpAddr =
        if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(bytes).await?;
    let mut buffer = vec![0; PAYLOAD_LEN.into()];
    loop {
        let len = socket.recv(&mut buffer).await?;
        // Anything else may be a forgery or a late answer; the right one may still come.
        if let Ok(answer) = Message::from_vec(&buffer[..len])
            && answers(question, &answer)
        {
            return Ok(answer);
        }
    }
}

async fn exchange_tcp(server: SocketAddr, question: &Message, bytes: &[u8]) -> io::Result<Message> {
    let mut stream = TcpStream::connect(server).await?;
    let len = u16::try_from(bytes.len()).map_err(io::Error::other)?;
    stream.write_all(&[&len.to_be_bytes(), bytes].concat()).await?;
    let len = stream.read_u16().await?;
    let mut buffer = vec![0; len.into()];
    stream.read_exact(&mut buffer).await?;
    let answer = Message::from_vec(&buffer).map_err(io::Error::other)?;
    if answers(question, &answer) {
        Ok(answer)
    } else {
        Err(io::Error::other("the answer is to another question"))
    }
}

fn answers(question: &Message, answer: &Message) -> bool {
    answer.metadata.message_type == MessageType::Response
        && answer.metadata.id == question.metadata.id
        && answer.queries.len() == 1
        && answer.queries[0].query_class() == DNSClass::IN
        && answer.queries[0].query_type() == question.queries[0].query_type()
        && answer.queries[0].name() == question.queries[0].name()
}

fn failure() -> Message {
    Message::error_msg(0, OpCode::Query, ResponseCode::ServFail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_gives_servers_but_never_ourselves() {
        let text = "# comment\nsearch x\nnameserver 10.0.0.1\n nameserver\t10.96.0.10 # us\nnameserver fe80::1%eth0\n\
                    nameserver ::1\nnameserver 1.1.1.1\nnameserver 8.8.8.8\n";
        let own = ["10.96.0.10".parse().unwrap()];
        let servers = parse_resolv_conf(text, &own);
        let servers: Vec<String> = servers.iter().map(|server| server.ip().to_string()).collect();
        assert_eq!(servers, ["10.0.0.1", "::1", "1.1.1.1"]);
    }
}
