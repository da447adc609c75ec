//! Port-forward: connections to ports of a pod, carried over SPDY (also inside a WebSocket) or WebSocket channels
//! (`k8s.io/kubelet/pkg/cri/streaming/portforward`).

use super::spdy::{self, Session, Stream};
use super::websocket::{self, ChannelWriter};
use bytes::Bytes;
use futures::future::BoxFuture;
use knarr_runtime::Duplex;
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{Mutex, mpsc};
use tokio_tungstenite::WebSocketStream;

/// The version over SPDY, and the subprotocols over WebSockets.
pub const SPDY_VERSION: &str = "portforward.k8s.io";
pub const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";
pub const WEBSOCKET_PROTOCOLS: [&str; 5] =
    [TUNNEL, "v4.channel.k8s.io", "v4.base64.channel.k8s.io", "portforward.k8s.io", ""];

/// A client opens two streams for each connection; one that stays alone this long is dropped.
const PAIR_TIMEOUT: Duration = Duration::from_secs(30);
/// Connections of one client at a time.
const PAIRS_MAX: usize = 1000;
const CHUNK_BYTES: usize = 32 * 1024;
const QUEUE_LEN_MAX: usize = 16;

/// Opens a connection to a port of the pod.
pub type Connect = Arc<dyn Fn(u16) -> BoxFuture<'static, knarr_runtime::Result<Duplex>> + Send + Sync>;

/// Serves a SPDY session until the client ends it: pairs of an error stream and a data stream, by request id.
pub async fn over_spdy(mut session: Session, connect: Connect) {
    let mut waiting: HashMap<String, (Stream, tokio::time::Instant)> = HashMap::new();
    let mut tasks = tokio::task::JoinSet::new();
    while let Some(stream) = session.accept().await {
        while tasks.try_join_next().is_some() {}
        waiting.retain(|_, (_, since)| since.elapsed() < PAIR_TIMEOUT);
        let id = match spdy::header(&stream.headers, "requestid") {
            Some(id) => id.to_owned(),
            // Old clients send none; then the streams of a pair follow one another.
            None => {
                let own = stream.writer.id();
                let error = spdy::header(&stream.headers, "streamtype") == Some("error");
                if error { own } else { own - 2 }.to_string()
            }
        };
        let Some((other, _)) = waiting.remove(&id) else {
            if waiting.len() + tasks.len() < PAIRS_MAX {
                waiting.insert(id, (stream, tokio::time::Instant::now()));
            }
            continue;
        };
        let is_error = spdy::header(&stream.headers, "streamtype") == Some("error");
        let (error, data) = if is_error { (stream, other) } else { (other, stream) };
        tasks.spawn(forward(error, data, connect.clone()));
    }
    tasks.shutdown().await;
}

async fn forward(mut error: Stream, mut data: Stream, connect: Connect) {
    let port = spdy::header(&data.headers, "port").and_then(|port| port.parse::<u16>().ok());
    let result = match port {
        Some(port) => match connect(port).await {
            Ok(connection) => copy(connection, &mut data).await.map_err(|error| error.to_string()),
            Err(cause) => Err(format!("error forwarding port {port} to pod: {cause}")),
        },
        None => Err("the stream names no port".to_owned()),
    };
    if let Err(message) = result {
        let _ = error.writer.send(message.into()).await;
    }
    let _ = data.writer.close().await;
    let _ = error.writer.close().await;
}

async fn copy(connection: Duplex, stream: &mut Stream) -> io::Result<()> {
    let (mut from, mut to) = tokio::io::split(connection);
    let (reader, writer) = (&mut stream.reader, &mut stream.writer);
    let upward = async {
        while let Some(data) = reader.next().await {
            to.write_all(&data).await?;
        }
        to.shutdown().await
    };
    let downward = async {
        let mut buffer = vec![0; CHUNK_BYTES];
        loop {
            let count = from.read(&mut buffer).await?;
            if count == 0 {
                return writer.close().await;
            }
            writer.send(Bytes::copy_from_slice(&buffer[..count])).await?;
        }
    };
    // When the pod has said all it had to say, nothing more comes of the rest.
    let mut upward = std::pin::pin!(upward);
    let mut downward = std::pin::pin!(downward);
    tokio::select! {
        result = &mut downward => result,
        result = &mut upward => {
            result?;
            downward.await
        }
    }
}

/// Serves a WebSocket: for the n-th port, channel 2n is data and 2n+1 errors; each begins with the port's number.
pub async fn over_websocket<C>(socket: WebSocketStream<C>, protocol: &str, ports: &[u16], connect: Connect)
where
    C: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut reader, writer) = websocket::channels(socket, protocol.strip_prefix("v4.").unwrap_or(protocol));
    let writer = Arc::new(Mutex::new(writer));
    let mut inputs: HashMap<u8, mpsc::Sender<Bytes>> = HashMap::new();
    let mut tasks = tokio::task::JoinSet::new();
    for (index, port) in ports.iter().enumerate() {
        let Ok(channel) = u8::try_from(index * 2) else { break };
        for channel in [channel, channel + 1] {
            if writer.lock().await.send(channel, &port.to_le_bytes()).await.is_err() {
                return;
            }
        }
        let (input, data) = mpsc::channel(QUEUE_LEN_MAX);
        inputs.insert(channel, input);
        tasks.spawn(forward_channel(*port, channel, data, writer.clone(), connect.clone()));
    }
    while let Some((channel, data)) = reader.next().await {
        if let Some(input) = inputs.get(&channel) {
            let _ = input.send(data).await;
        }
    }
    drop(inputs);
    tasks.shutdown().await;
}

async fn forward_channel<C>(
    port: u16,
    channel: u8,
    mut data: mpsc::Receiver<Bytes>,
    writer: Arc<Mutex<ChannelWriter<C>>>,
    connect: Connect,
) where
    C: AsyncRead + AsyncWrite + Unpin,
{
    let connection = match connect(port).await {
        Ok(connection) => connection,
        Err(cause) => {
            let message = format!("error forwarding port {port} to pod: {cause}");
            let _ = writer.lock().await.send(channel + 1, message.as_bytes()).await;
            return;
        }
    };
    let (from, mut to): (ReadHalf<Duplex>, WriteHalf<Duplex>) = tokio::io::split(connection);
    let upward = async {
        while let Some(data) = data.recv().await {
            if to.write_all(&data).await.is_err() {
                return;
            }
        }
        let _ = to.shutdown().await;
    };
    let downward = async {
        let (mut from, mut buffer) = (from, vec![0; CHUNK_BYTES]);
        while let Ok(count @ 1..) = from.read(&mut buffer).await {
            if writer.lock().await.send(channel, &buffer[..count]).await.is_err() {
                return;
            }
        }
    };
    tokio::join!(upward, downward);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_port_is_forwarded_and_a_refusal_told() {
        let (near, far) = tokio::io::duplex(4096);
        let client = Session::new(near, spdy::Role::Client);
        let connect: Connect = Arc::new(|port| {
            Box::pin(async move {
                if port != 80 {
                    return Err(knarr_runtime::Error::internal("connection refused"));
                }
                let (ours, mut theirs) = tokio::io::duplex(1024);
                tokio::spawn(async move {
                    let mut buffer = [0; 5];
                    let _ = theirs.read_exact(&mut buffer).await;
                    let _ = theirs.write_all(&buffer).await;
                });
                let stream: Duplex = Box::pin(ours);
                Ok(stream)
            })
        });
        let task = tokio::spawn(over_spdy(Session::new(far, spdy::Role::Server), connect));
        let open = async |kind: &str, port: &str, id: &str| {
            let headers = [("streamtype", kind), ("port", port), ("requestid", id)];
            client
                .open(headers.map(|(name, value)| (name.to_owned(), value.to_owned())).into())
                .await
                .unwrap()
        };
        let mut error = open("error", "80", "0").await;
        let mut data = open("data", "80", "0").await;
        data.writer.send(Bytes::from_static(b"hello")).await.unwrap();
        assert_eq!(data.reader.next().await.unwrap(), "hello");
        assert_eq!(data.reader.next().await, None);
        assert_eq!(error.reader.next().await, None);
        drop((error, data));
        let mut error = open("error", "81", "1").await;
        let data = open("data", "81", "1").await;
        assert_eq!(error.reader.next().await.unwrap(), "error forwarding port 81 to pod: connection refused");
        drop((client, error, data));
        task.await.unwrap();
    }
}
