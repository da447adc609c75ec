//! WebSockets for streams: the handshake with a choice of subprotocols, and messages whose first byte is the channel
//! (`channel.k8s.io` and its successors; the `base64.` ones carry text).

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{Bytes, BytesMut};
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode};
use tokio_tungstenite::tungstenite::{Error, Message};

/// The channel of v5 that closes another one.
pub const CLOSE_CHANNEL: u8 = 255;
/// A message larger than this ends the connection.
const MESSAGE_BYTES_MAX: usize = 32 << 20;

/// Whether a request asks for a WebSocket.
pub fn is_upgrade(headers: &HeaderMap) -> bool {
    let has = |name, wanted: &str| {
        let values = headers.get_all(name).iter().filter_map(|value: &HeaderValue| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|value| value.trim().eq_ignore_ascii_case(wanted))
    };
    has(header::UPGRADE, "websocket") && has(header::CONNECTION, "upgrade")
}

/// Every subprotocol a request offers, in its order.
pub fn offered(headers: &HeaderMap) -> Vec<String> {
    let values =
        headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(|value| value.trim().to_owned()).collect()
}

/// The first offered subprotocol that is among ours; none offered means the oldest, the empty one.
pub fn choose(headers: &HeaderMap, ours: &[&str]) -> Result<String, String> {
    let offered = offered(headers);
    if offered.is_empty() {
        return Ok(String::new());
    }
    let found = offered.iter().find(|name| ours.contains(&name.as_str()));
    found.cloned().ok_or_else(|| {
        format!(
            "unable to upgrade: none of the subprotocols {} is supported; offer one of {}",
            offered.join(", "),
            ours.join(", ")
        )
    })
}

/// The answer that turns a connection into a WebSocket with this subprotocol.
pub fn accept<B: Default>(headers: &HeaderMap, protocol: &str) -> Result<Response<B>, String> {
    let key =
        headers.get(header::SEC_WEBSOCKET_KEY).ok_or("unable to upgrade: Sec-WebSocket-Key is missing")?;
    let mut answer = Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(header::CONNECTION, "Upgrade")
        .header(header::UPGRADE, "websocket")
        .header(header::SEC_WEBSOCKET_ACCEPT, derive_accept_key(key.as_bytes()));
    if !protocol.is_empty() {
        answer = answer.header(header::SEC_WEBSOCKET_PROTOCOL, protocol);
    }
    answer.body(B::default()).map_err(|error| format!("unable to upgrade: {error}"))
}

/// Frames an upgraded connection.
pub async fn frame<C: AsyncRead + AsyncWrite + Unpin>(connection: C, role: Role) -> WebSocketStream<C> {
    let config = WebSocketConfig::default()
        .max_message_size(Some(MESSAGE_BYTES_MAX))
        .max_frame_size(Some(MESSAGE_BYTES_MAX));
    WebSocketStream::from_raw_socket(connection, role, Some(config)).await
}

/// A WebSocket as numbered channels, split into its two directions.
pub fn channels<C>(socket: WebSocketStream<C>, protocol: &str) -> (ChannelReader<C>, ChannelWriter<C>)
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    let base64 = protocol.starts_with("base64.");
    let (sink, stream) = socket.split();
    (ChannelReader { stream, base64 }, ChannelWriter { sink, base64 })
}

pub struct ChannelReader<C> {
    stream: SplitStream<WebSocketStream<C>>,
    base64: bool,
}

impl<C: AsyncRead + AsyncWrite + Unpin> ChannelReader<C> {
    /// The next message: channel and data. `None` when the other end has closed, or the connection broke.
    pub async fn next(&mut self) -> Option<(u8, Bytes)> {
        loop {
            let message = match self.stream.next().await? {
                Ok(message) => message,
                Err(error) => {
                    tracing::debug!(%error, "WebSocket broken");
                    return None;
                }
            };
            let data: Bytes = match message {
                Message::Binary(data) => data,
                Message::Text(text) => text.into(),
                Message::Close(_) => return None,
                _ => continue,
            };
            match split(data, self.base64) {
                Some(message) => return Some(message),
                None => continue,
            }
        }
    }
}

/// The channel is a byte, or with base64 a digit.
fn split(mut data: Bytes, base64: bool) -> Option<(u8, Bytes)> {
    if data.is_empty() {
        return None;
    }
    let first = data.split_to(1)[0];
    if !base64 {
        return Some((first, data));
    }
    Some((first.checked_sub(b'0')?, STANDARD.decode(&data).ok()?.into()))
}

pub struct ChannelWriter<C> {
    sink: SplitSink<WebSocketStream<C>, Message>,
    base64: bool,
}

impl<C: AsyncRead + AsyncWrite + Unpin> ChannelWriter<C> {
    /// Sends data on a channel.
    pub async fn send(&mut self, channel: u8, data: &[u8]) -> io::Result<()> {
        let message = if self.base64 {
            Message::text(format!("{}{}", char::from(b'0' + channel), STANDARD.encode(data)))
        } else {
            let mut out = BytesMut::with_capacity(data.len() + 1);
            out.extend_from_slice(&[channel]);
            out.extend_from_slice(data);
            Message::binary(out.freeze())
        };
        self.sink.send(message).await.map_err(into_io)
    }

    /// Closes the connection as intended.
    pub async fn close(&mut self) -> io::Result<()> {
        let frame = CloseFrame { code: CloseCode::Normal, reason: "".into() };
        match self.sink.send(Message::Close(Some(frame))).await {
            Err(Error::ConnectionClosed) => Ok(()),
            result => result.map_err(into_io),
        }
    }
}

fn into_io(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        error => io::Error::other(error),
    }
}

/// A WebSocket as one stream of bytes: for SPDY inside WebSockets.
pub struct Tunnel<C> {
    socket: WebSocketStream<C>,
    rest: Bytes,
}

impl<C> Tunnel<C> {
    pub fn new(socket: WebSocketStream<C>) -> Self {
        Tunnel { socket, rest: Bytes::new() }
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> AsyncRead for Tunnel<C> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.rest.is_empty() {
            match ready!(self.socket.poll_next_unpin(context)) {
                Some(Ok(Message::Binary(data))) => self.rest = data,
                Some(Ok(Message::Close(_))) | None => return Poll::Ready(Ok(())),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(into_io(error))),
            }
        }
        let count = self.rest.len().min(buffer.remaining());
        buffer.put_slice(&self.rest.split_to(count));
        Poll::Ready(Ok(()))
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Tunnel<C> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.socket.poll_ready_unpin(context)).map_err(into_io)?;
        self.socket.start_send_unpin(Message::binary(Bytes::copy_from_slice(data))).map_err(into_io)?;
        Poll::Ready(Ok(data.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket.poll_flush_unpin(context).map_err(into_io)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket.poll_close_unpin(context).map_err(into_io)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clients_first_choice_we_know_is_taken() {
        let headers = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::SEC_WEBSOCKET_PROTOCOL, value.parse().unwrap());
            headers
        };
        assert_eq!(choose(&headers("v5.a, v4.a"), &["v4.a", "v5.a"]).unwrap(), "v5.a");
        assert_eq!(choose(&HeaderMap::new(), &["v4.a"]).unwrap(), "");
        assert!(choose(&headers("other"), &["v4.a"]).is_err());
    }

    #[tokio::test]
    async fn channels_carry_bytes_plain_or_as_base64() {
        for protocol in ["v4.channel.k8s.io", "base64.channel.k8s.io"] {
            let (near, far) = tokio::io::duplex(4096);
            let (client, server) = tokio::join!(frame(near, Role::Client), frame(far, Role::Server));
            let (mut reader, _) = channels(server, protocol);
            let (_, mut writer) = channels(client, protocol);
            writer.send(2, b"\0data").await.unwrap();
            assert_eq!(reader.next().await, Some((2, Bytes::from_static(b"\0data"))), "{protocol}");
            writer.close().await.unwrap();
            assert_eq!(reader.next().await, None);
        }
    }
}
