//! SPDY/3.1 framing and a session of streams over one connection, for servers and clients.
//!
//! Only what Kubernetes uses (`moby/spdystream`): SYN_STREAM, SYN_REPLY, RST_STREAM, PING, GOAWAY, DATA. There is
//! no flow control, as there is none in that library: a session reads one frame after the other, and a slow reader
//! of one stream slows the whole connection.

use bytes::{Bytes, BytesMut};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

/// The value of the `Upgrade` header.
pub const PROTOCOL: &str = "SPDY/3.1";

const VERSION: u16 = 3;
const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;
const FLAG_FIN: u8 = 1;
/// RST_STREAM's status for a stream nobody wants any more.
const CANCEL: u32 = 5;
/// Headers, unpacked, and how many of them.
const HEADER_BYTES_MAX: usize = 256 * 1024;
const HEADERS_MAX: u32 = 1000;
/// Frames read ahead for a stream, and frames waiting to be written.
const QUEUE_LEN_MAX: usize = 16;
/// Data is sent in frames of at most this.
const CHUNK_BYTES_MAX: usize = 32 * 1024;
/// Streams one connection may have opened at a time.
const STREAMS_MAX: usize = 10_000;

/// Header names in lower case, and their values.
pub type Headers = Vec<(String, String)>;

/// The value of a header.
pub fn header<'a>(headers: &'a Headers, name: &str) -> Option<&'a str> {
    headers.iter().find(|(have, _)| have == name).map(|(_, value)| value.as_str())
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    SynStream {
        id: u32,
        fin: bool,
        headers: Headers,
    },
    SynReply {
        id: u32,
        fin: bool,
        headers: Headers,
    },
    Headers {
        id: u32,
        fin: bool,
        headers: Headers,
    },
    Reset {
        id: u32,
        status: u32,
    },
    Ping {
        id: u32,
    },
    GoAway {
        last_id: u32,
    },
    Data {
        id: u32,
        fin: bool,
        data: Bytes,
    },
    /// Settings and the like: nothing follows from them.
    Other,
}

/// Reads frames. Headers are packed with one dictionary for the whole connection, so frames are read in order.
pub struct Decoder {
    inflate: Decompress,
}

impl Default for Decoder {
    fn default() -> Self {
        Decoder { inflate: Decompress::new(true) }
    }
}

impl Decoder {
    /// Reads one frame; `None` at the end of the connection.
    pub async fn read(&mut self, from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Frame>> {
        let mut head = [0; 8];
        match from.read_exact(&mut head).await {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error),
        }
        let flags = head[4];
        let length = u32::from_be_bytes([0, head[5], head[6], head[7]]) as usize;
        let mut body = BytesMut::zeroed(length);
        from.read_exact(&mut body).await?;
        let first = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
        let fin = flags & FLAG_FIN != 0;
        if first & 0x8000_0000 == 0 {
            return Ok(Some(Frame::Data { id: first, fin, data: body.freeze() }));
        }
        let kind = (first & 0xffff) as u16;
        let version = ((first >> 16) & 0x7fff) as u16;
        if version != VERSION {
            return Err(bad(format!("SPDY version {version} is not {VERSION}")));
        }
        self.control(kind, fin, &body).map(Some)
    }

    fn control(&mut self, kind: u16, fin: bool, body: &[u8]) -> io::Result<Frame> {
        let word = |at: usize| -> io::Result<u32> {
            let bytes =
                body.get(at..at + 4).ok_or_else(|| bad(format!("control frame {kind} is too short")))?;
            Ok(u32::from_be_bytes(bytes.try_into().expect("four bytes were taken")))
        };
        let id = |at: usize| word(at).map(|id| id & 0x7fff_ffff);
        Ok(match kind {
            // After the two ids: priority and slot.
            SYN_STREAM => Frame::SynStream { id: id(0)?, fin, headers: self.headers(body.get(10..))? },
            SYN_REPLY => Frame::SynReply { id: id(0)?, fin, headers: self.headers(body.get(4..))? },
            HEADERS => Frame::Headers { id: id(0)?, fin, headers: self.headers(body.get(4..))? },
            RST_STREAM => Frame::Reset { id: id(0)?, status: word(4)? },
            PING => Frame::Ping { id: word(0)? },
            GOAWAY => Frame::GoAway { last_id: id(0)? },
            _ => Frame::Other,
        })
    }

    fn headers(&mut self, packed: Option<&[u8]>) -> io::Result<Headers> {
        let packed = packed.ok_or_else(|| bad("headers are cut off".to_owned()))?;
        let plain = self.unpack(packed)?;
        let mut rest = plain.as_slice();
        let count = take_word(&mut rest)?;
        if count > HEADERS_MAX {
            return Err(bad(format!("{count} headers are too many")));
        }
        let mut headers = Headers::new();
        for _ in 0..count {
            let name = take_text(&mut rest)?.to_lowercase();
            // Several values of one name are separated by NUL.
            let value = take_text(&mut rest)?;
            headers.extend(value.split('\0').map(|value| (name.clone(), value.to_owned())));
        }
        Ok(headers)
    }

    fn unpack(&mut self, packed: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::with_capacity(1024);
        let mut rest = packed;
        loop {
            let (before_in, before_out) = (self.inflate.total_in(), self.inflate.total_out());
            if out.len() == out.capacity() {
                out.reserve(1024);
            }
            let result = self.inflate.decompress_vec(rest, &mut out, FlushDecompress::Sync);
            rest = &rest[(self.inflate.total_in() - before_in) as usize..];
            match result {
                Err(error) if error.needs_dictionary().is_some() => {
                    self.inflate.set_dictionary(DICTIONARY).map_err(|error| bad(error.to_string()))?;
                    continue;
                }
                Err(error) => return Err(bad(format!("headers cannot be unpacked: {error}"))),
                Ok(Status::StreamEnd) => return Ok(out),
                Ok(_) => {}
            }
            if out.len() > HEADER_BYTES_MAX {
                return Err(bad(format!("headers are larger than {HEADER_BYTES_MAX} bytes")));
            }
            let stuck = self.inflate.total_in() == before_in && self.inflate.total_out() == before_out;
            if (rest.is_empty() && out.len() < out.capacity()) || (stuck && rest.is_empty()) {
                return Ok(out);
            }
            if stuck && out.len() < out.capacity() {
                return Err(bad("headers cannot be unpacked".to_owned()));
            }
        }
    }
}

fn bad(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

fn take_word(rest: &mut &[u8]) -> io::Result<u32> {
    let (word, after) = rest.split_first_chunk::<4>().ok_or_else(|| bad("headers are cut off".to_owned()))?;
    *rest = after;
    Ok(u32::from_be_bytes(*word))
}

fn take_text(rest: &mut &[u8]) -> io::Result<String> {
    let length = take_word(rest)? as usize;
    if length > rest.len() {
        return Err(bad("headers are cut off".to_owned()));
    }
    let (text, after) = rest.split_at(length);
    *rest = after;
    Ok(String::from_utf8_lossy(text).into_owned())
}

/// Prints frames.
pub struct Encoder {
    deflate: Compress,
}

impl Default for Encoder {
    fn default() -> Self {
        let mut deflate = Compress::new(Compression::default(), true);
        deflate.set_dictionary(DICTIONARY).expect("a fresh stream takes a dictionary");
        Encoder { deflate }
    }
}

impl Encoder {
    pub fn encode(&mut self, frame: &Frame) -> Vec<u8> {
        match frame {
            Frame::SynStream { id, fin, headers } => {
                let mut body = id.to_be_bytes().to_vec();
                // Belongs to no other stream; highest priority; slot 0.
                body.extend_from_slice(&[0, 0, 0, 0, 0, 0]);
                body.extend(self.pack(headers));
                control(SYN_STREAM, *fin, &body)
            }
            Frame::SynReply { id, fin, headers } => self.with_headers(SYN_REPLY, *id, *fin, headers),
            Frame::Headers { id, fin, headers } => self.with_headers(HEADERS, *id, *fin, headers),
            Frame::Reset { id, status } => {
                control(RST_STREAM, false, &[id.to_be_bytes(), status.to_be_bytes()].concat())
            }
            Frame::Ping { id } => control(PING, false, &id.to_be_bytes()),
            Frame::GoAway { last_id } => control(GOAWAY, false, &[last_id.to_be_bytes(), [0; 4]].concat()),
            Frame::Data { id, fin, data } => {
                let mut out = id.to_be_bytes().to_vec();
                out.extend_from_slice(&flags_and_length(*fin, data.len()));
                out.extend_from_slice(data);
                out
            }
            Frame::Other => Vec::new(),
        }
    }

    fn with_headers(&mut self, kind: u16, id: u32, fin: bool, headers: &Headers) -> Vec<u8> {
        let mut body = id.to_be_bytes().to_vec();
        body.extend(self.pack(headers));
        control(kind, fin, &body)
    }

    fn pack(&mut self, headers: &Headers) -> Vec<u8> {
        let mut plain = (headers.len() as u32).to_be_bytes().to_vec();
        for (name, value) in headers {
            for text in [name.to_lowercase(), value.clone()] {
                plain.extend_from_slice(&(text.len() as u32).to_be_bytes());
                plain.extend_from_slice(text.as_bytes());
            }
        }
        let mut out = Vec::with_capacity(plain.len() + 64);
        let mut rest = plain.as_slice();
        loop {
            let before = self.deflate.total_in();
            if out.capacity() - out.len() < 64 {
                out.reserve(1024);
            }
            let room = out.capacity();
            self.deflate
                .compress_vec(rest, &mut out, FlushCompress::Sync)
                .expect("packing into memory with room cannot fail");
            rest = &rest[(self.deflate.total_in() - before) as usize..];
            // With room left, everything was flushed.
            if rest.is_empty() && out.len() < room {
                return out;
            }
        }
    }
}

fn control(kind: u16, fin: bool, body: &[u8]) -> Vec<u8> {
    let mut out = (0x8000 | VERSION).to_be_bytes().to_vec();
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&flags_and_length(fin, body.len()));
    out.extend_from_slice(body);
    out
}

fn flags_and_length(fin: bool, length: usize) -> [u8; 4] {
    let length = (length as u32).to_be_bytes();
    [if fin { FLAG_FIN } else { 0 }, length[1], length[2], length[3]]
}

/// A connection full of streams. Dropping it, and all its streams, ends the connection.
pub struct Session {
    shared: Arc<Shared>,
    incoming: mpsc::Receiver<Stream>,
    reader: tokio::task::JoinHandle<()>,
}

struct Shared {
    frames: mpsc::Sender<Frame>,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    next_id: u32,
    /// Where the data of a stream goes, until its other end says it has no more.
    readers: HashMap<u32, mpsc::Sender<Bytes>>,
}

/// One stream: headers it was opened with, and data both ways.
pub struct Stream {
    pub headers: Headers,
    pub reader: StreamReader,
    pub writer: StreamWriter,
}

/// What the other end sends.
pub struct StreamReader {
    data: mpsc::Receiver<Bytes>,
}

impl StreamReader {
    /// The next piece; `None` when there is no more.
    pub async fn next(&mut self) -> Option<Bytes> {
        self.data.recv().await
    }
}

/// What we send. Dropping it without [`StreamWriter::close`] resets the stream.
pub struct StreamWriter {
    id: u32,
    frames: mpsc::Sender<Frame>,
    closed: bool,
}

impl StreamWriter {
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Sends data; waits while the connection is slow. Fails when it has ended.
    pub async fn send(&mut self, mut data: Bytes) -> io::Result<()> {
        while !data.is_empty() {
            let chunk = data.split_to(data.len().min(CHUNK_BYTES_MAX));
            self.put(Frame::Data { id: self.id, fin: false, data: chunk }).await?;
        }
        Ok(())
    }

    /// Says that there is no more.
    pub async fn close(&mut self) -> io::Result<()> {
        if std::mem::replace(&mut self.closed, true) {
            return Ok(());
        }
        self.put(Frame::Data { id: self.id, fin: true, data: Bytes::new() }).await
    }

    async fn put(&self, frame: Frame) -> io::Result<()> {
        self.frames.send(frame).await.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))
    }
}

impl Drop for StreamWriter {
    fn drop(&mut self) {
        if !self.closed {
            // Best effort: with a full queue the connection is in trouble anyway.
            let _ = self.frames.try_send(Frame::Reset { id: self.id, status: CANCEL });
        }
    }
}

/// Which end of the connection we are: servers open even streams, clients odd ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Client,
    Server,
}

impl Session {
    /// Takes a connection that has been upgraded.
    pub fn new<C>(connection: C, role: Role) -> Session
    where
        C: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (from, to) = tokio::io::split(connection);
        let (frames, queue) = mpsc::channel(QUEUE_LEN_MAX);
        let (accept, incoming) = mpsc::channel(QUEUE_LEN_MAX);
        let next_id = if role == Role::Client { 1 } else { 2 };
        let shared = Arc::new(Shared { frames, table: Mutex::new(Table { next_id, ..Table::default() }) });
        tokio::spawn(write_frames(to, queue));
        let reader = tokio::spawn(read_frames(from, shared.clone(), accept));
        Session { shared, incoming, reader }
    }

    /// The next stream the other end opens, already accepted; `None` when the connection has ended.
    pub async fn accept(&mut self) -> Option<Stream> {
        self.incoming.recv().await
    }

    /// Opens a stream with these headers. Does not wait for the reply.
    pub async fn open(&self, headers: Headers) -> io::Result<Stream> {
        let (data_in, data) = mpsc::channel(QUEUE_LEN_MAX);
        let id = {
            let mut table = self.shared.table.lock();
            let id = table.next_id;
            table.next_id += 2;
            table.readers.insert(id, data_in);
            id
        };
        let frame = Frame::SynStream { id, fin: false, headers: headers.clone() };
        let sent = self.shared.frames.send(frame).await;
        sent.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        let writer = StreamWriter { id, frames: self.shared.frames.clone(), closed: false };
        Ok(Stream { headers, reader: StreamReader { data }, writer })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // The writer ends by itself, when what is queued is written and the last stream is dropped.
        self.reader.abort();
    }
}

async fn write_frames(mut to: impl AsyncWrite + Unpin, mut queue: mpsc::Receiver<Frame>) {
    let mut encoder = Encoder::default();
    while let Some(frame) = queue.recv().await {
        if to.write_all(&encoder.encode(&frame)).await.is_err()
            || (queue.is_empty() && to.flush().await.is_err())
        {
            return;
        }
    }
    let _ = to.shutdown().await;
}

async fn read_frames(mut from: impl AsyncRead + Unpin, shared: Arc<Shared>, accept: mpsc::Sender<Stream>) {
    let mut decoder = Decoder::default();
    loop {
        let frame = match decoder.read(&mut from).await {
            Ok(Some(frame)) => frame,
            Ok(None) => break,
            Err(error) => {
                tracing::debug!(%error, "SPDY connection broken");
                break;
            }
        };
        if !handle(&shared, &accept, frame).await {
            break;
        }
    }
    shared.table.lock().readers.clear();
}

async fn handle(shared: &Arc<Shared>, accept: &mpsc::Sender<Stream>, frame: Frame) -> bool {
    match frame {
        Frame::SynStream { id, fin, headers } => {
            let (data_in, data) = mpsc::channel(QUEUE_LEN_MAX);
            {
                let mut table = shared.table.lock();
                if table.readers.len() >= STREAMS_MAX {
                    return false;
                }
                if !fin {
                    table.readers.insert(id, data_in);
                }
            }
            let reply = Frame::SynReply { id, fin: false, headers: Headers::new() };
            if shared.frames.send(reply).await.is_err() {
                return false;
            }
            let writer = StreamWriter { id, frames: shared.frames.clone(), closed: false };
            accept.send(Stream { headers, reader: StreamReader { data }, writer }).await.is_ok()
        }
        Frame::Data { id, fin, data } => {
            let reader = shared.table.lock().readers.get(&id).cloned();
            if let Some(reader) = reader.filter(|_| !data.is_empty()) {
                // Nobody may be reading any more; then it is dropped.
                let _ = reader.send(data).await;
            }
            if fin {
                shared.table.lock().readers.remove(&id);
            }
            true
        }
        Frame::Headers { id, fin, .. } | Frame::SynReply { id, fin, .. } => {
            if fin {
                shared.table.lock().readers.remove(&id);
            }
            true
        }
        Frame::Reset { id, .. } => {
            shared.table.lock().readers.remove(&id);
            true
        }
        // Ours come back; theirs are answered.
        Frame::Ping { id } => shared.frames.send(Frame::Ping { id }).await.is_ok(),
        Frame::GoAway { .. } | Frame::Other => true,
    }
}

/// What headers are packed with, from the SPDY/3 specification.
static DICTIONARY: &[u8] = &dictionary();

const DICTIONARY_LEN: usize = 1423;

/// Words with a length of four bytes before them, then text without.
const fn dictionary() -> [u8; DICTIONARY_LEN] {
    const WORDS: [&str; 49] = [
        "options",
        "head",
        "post",
        "put",
        "delete",
        "trace",
        "accept",
        "accept-charset",
        "accept-encoding",
        "accept-language",
        "accept-ranges",
        "age",
        "allow",
        "authorization",
        "cache-control",
        "connection",
        "content-base",
        "content-encoding",
        "content-language",
        "content-length",
        "content-location",
        "content-md5",
        "content-range",
        "content-type",
        "date",
        "etag",
        "expect",
        "expires",
        "from",
        "host",
        "if-match",
        "if-modified-since",
        "if-none-match",
        "if-range",
        "if-unmodified-since",
        "last-modified",
        "location",
        "max-forwards",
        "pragma",
        "proxy-authenticate",
        "proxy-authorization",
        "range",
        "referer",
        "retry-after",
        "server",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    ];
    const MORE: [&str; 10] = [
        "user-agent",
        "vary",
        "via",
        "warning",
        "www-authenticate",
        "method",
        "get",
        "status",
        "200 OK",
        "version",
    ];
    const LAST: [&str; 6] = ["HTTP/1.1", "url", "public", "set-cookie", "keep-alive", "origin"];
    const TEXT: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505\
        203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized\
        403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable\
        Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT\
        chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,\
        text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0.";
    let mut out = [0; DICTIONARY_LEN];
    let mut at = 0;
    let lists: [&[&str]; 3] = [&WORDS, &MORE, &LAST];
    let mut list = 0;
    while list < lists.len() {
        let mut word = 0;
        while word < lists[list].len() {
            let bytes = lists[list][word].as_bytes();
            out[at + 3] = bytes.len() as u8;
            at = put(&mut out, at + 4, bytes);
            word += 1;
        }
        list += 1;
    }
    at = put(&mut out, at, TEXT.as_bytes());
    assert!(at == DICTIONARY_LEN);
    out
}

const fn put(out: &mut [u8; DICTIONARY_LEN], at: usize, bytes: &[u8]) -> usize {
    let mut index = 0;
    while index < bytes.len() {
        out[at + index] = bytes[index];
        index += 1;
    }
    at + bytes.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(entries: &[(&str, &str)]) -> Headers {
        entries.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    /// The checksum stands in the first bytes of what every other implementation packs.
    #[test]
    fn dictionary_is_the_specifications() {
        let (mut a, mut b) = (1u32, 0u32);
        for byte in DICTIONARY {
            a = (a + u32::from(*byte)) % 65_521;
            b = (b + a) % 65_521;
        }
        assert_eq!((b << 16) | a, 0xe3c6_a7c2);
    }

    #[tokio::test]
    async fn frames_come_back_as_they_went() {
        let frames = [
            Frame::SynStream { id: 1, fin: false, headers: headers(&[("streamtype", "stdin"), ("a", "b")]) },
            Frame::SynReply { id: 1, fin: true, headers: headers(&[]) },
            Frame::SynStream {
                id: 3,
                fin: true,
                headers: headers(&[("streamtype", "error"), ("port", "80")]),
            },
            Frame::Headers { id: 3, fin: false, headers: headers(&[("long", &"x".repeat(20_000))]) },
            Frame::Data { id: 3, fin: false, data: Bytes::from_static(b"hello") },
            Frame::Data { id: 3, fin: true, data: Bytes::new() },
            Frame::Reset { id: 3, status: 5 },
            Frame::Ping { id: 7 },
            Frame::GoAway { last_id: 9 },
        ];
        let mut encoder = Encoder::default();
        let bytes: Vec<u8> = frames.iter().flat_map(|frame| encoder.encode(frame)).collect();
        let (mut decoder, mut from) = (Decoder::default(), bytes.as_slice());
        for frame in frames {
            assert_eq!(decoder.read(&mut from).await.unwrap(), Some(frame));
        }
        assert_eq!(decoder.read(&mut from).await.unwrap(), None);
    }

    #[tokio::test]
    async fn nonsense_is_an_error_and_never_a_panic() {
        for seed in 0..500u64 {
            let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let bytes: Vec<u8> = (0..64)
                .map(|index| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    // Mostly control frames of small length.
                    match index {
                        0 => 0x80,
                        1 => 3,
                        2 => 0,
                        3 => (state % 10) as u8,
                        5 | 6 => 0,
                        7 => 40,
                        _ => state as u8,
                    }
                })
                .collect();
            let (mut decoder, mut from) = (Decoder::default(), bytes.as_slice());
            while let Ok(Some(_)) = decoder.read(&mut from).await {}
        }
    }

    #[tokio::test]
    async fn sessions_carry_streams_both_ways() {
        let (near, far) = tokio::io::duplex(256);
        let client = Session::new(near, Role::Client);
        let mut server = Session::new(far, Role::Server);
        let mut ours = client.open(headers(&[("streamtype", "data")])).await.unwrap();
        let mut theirs = server.accept().await.unwrap();
        assert_eq!(header(&theirs.headers, "streamtype"), Some("data"));
        let send = async {
            ours.writer.send(Bytes::from(vec![7; 100_000])).await.unwrap();
            ours.writer.close().await.unwrap();
        };
        let receive = async {
            let mut count = 0;
            while let Some(data) = theirs.reader.next().await {
                count += data.len();
            }
            count
        };
        assert_eq!(tokio::join!(send, receive).1, 100_000);
        theirs.writer.send(Bytes::from_static(b"back")).await.unwrap();
        assert_eq!(ours.reader.next().await.unwrap(), "back");
        drop(theirs);
        assert_eq!(ours.reader.next().await, None, "a dropped stream is reset");
    }
}
