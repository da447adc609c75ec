//! Kubernetes' channels over one WebSocket: the first byte of a message tells its stream. Spoken as a client to a
//! runtime's streaming server.

use futures::{FutureExt, SinkExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::{HeaderValue, header};

use crate::error::{Error, Kind, Result};
use crate::stream::{Duplex, ExecSession, TerminalSize};

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
const RESIZE: u8 = 4;
/// v5 only: ends the stream whose number follows.
const CLOSE: u8 = 255;
const V5: &str = "v5.channel.k8s.io";
const V4: &str = "v4.channel.k8s.io";
/// Bytes of a stream that may wait for their reader.
const BUFFER_BYTES: usize = 64 << 10;
const RESIZES_MAX: usize = 4;

#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub tty: bool,
}

type Socket = WebSocketStream<TcpStream>;

/// Joins the streams behind `url`.
pub async fn session(url: &str, wanted: Wanted) -> Result<ExecSession> {
    let (socket, protocol) = open(url, &format!("{V5}, {V4}")).await?;
    let pipe = |wanted: bool| wanted.then(|| tokio::io::duplex(BUFFER_BYTES)).unzip();
    let (stdin, from_caller) = pipe(wanted.stdin);
    let (stdout, to_stdout) = pipe(wanted.stdout);
    let (stderr, to_stderr) = pipe(wanted.stderr);
    let (resize, sizes) = wanted.tty.then(|| mpsc::channel(RESIZES_MAX)).unzip();
    let (told, exit) = oneshot::channel();
    let pump = Pump { socket, can_close: protocol == V5, stdin: from_caller, sizes, to_stdout, to_stderr };
    tokio::spawn(async move {
        // The caller may have lost interest.
        let _ = told.send(pump.run().await);
    });
    Ok(ExecSession {
        stdin: stdin.map(|stream| Box::pin(stream) as _),
        stdout: stdout.map(|stream| Box::pin(stream) as _),
        stderr: stderr.map(|stream| Box::pin(stream) as _),
        resize,
        exit: async move { exit.await.unwrap_or_else(|_| Err(hung_up())) }.boxed(),
    })
}

/// Connects to a port: one data channel and one for errors, each opened by the port's number.
pub async fn port(url: &str, port: u16) -> Result<Duplex> {
    let separator = if url.contains('?') { '&' } else { '?' };
    let (mut socket, _) = open(&format!("{url}{separator}port={port}"), V4).await?;
    let (ours, mut theirs) = tokio::io::duplex(BUFFER_BYTES);
    tokio::spawn(async move {
        let mut opened = [false; 2];
        let mut buffer = vec![0u8; 32 << 10];
        loop {
            tokio::select! {
                read = theirs.read(&mut buffer) => match read {
                    Ok(count) if count > 0 => {
                        if socket.send(message(0, &buffer[..count])).await.is_err() {
                            return;
                        }
                    }
                    _ => return drop(socket.close(None).await),
                },
                received = socket.next() => {
                    let Some(Ok(received)) = received else { return };
                    let Message::Binary(bytes) = received else { continue };
                    let Some((channel @ (0 | 1), data)) = bytes.split_first().map(|(first, rest)| (*first, rest))
                    else { continue };
                    // The first message of each channel repeats the port.
                    if !std::mem::replace(&mut opened[channel as usize], true) {
                        continue;
                    }
                    if channel == 1 {
                        tracing::debug!(error = %String::from_utf8_lossy(data), "port forwarding failed");
                        return;
                    }
                    if theirs.write_all(data).await.is_err() {
                        return;
                    }
                }
            }
        }
    });
    Ok(Box::pin(ours))
}

async fn open(url: &str, protocols: &str) -> Result<(Socket, String)> {
    let failed = |error: &dyn std::fmt::Display| {
        Error::new(Kind::Unavailable, format!("cannot reach the runtime's streaming server: {error}"))
    };
    let address = url.strip_prefix("http://").ok_or_else(|| {
        Error::unsupported(format!("the runtime's streaming address {url:?} is not plain http"))
    })?;
    let host = address.split('/').next().unwrap_or_default();
    let stream = TcpStream::connect(host).await.map_err(|error| failed(&error))?;
    let mut request = format!("ws://{address}").into_client_request().map_err(|error| failed(&error))?;
    let protocols = HeaderValue::from_str(protocols).map_err(|error| failed(&error))?;
    request.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, protocols);
    let (socket, response) =
        tokio_tungstenite::client_async(request, stream).await.map_err(|error| failed(&error))?;
    let protocol = response.headers().get(header::SEC_WEBSOCKET_PROTOCOL);
    let protocol = protocol.and_then(|value| value.to_str().ok()).unwrap_or(V4).to_owned();
    Ok((socket, protocol))
}

struct Pump {
    socket: Socket,
    can_close: bool,
    stdin: Option<DuplexStream>,
    sizes: Option<mpsc::Receiver<TerminalSize>>,
    to_stdout: Option<DuplexStream>,
    to_stderr: Option<DuplexStream>,
}

impl Pump {
    /// Moves bytes until the other side hangs up; returns the exit code it told.
    async fn run(mut self) -> Result<i32> {
        let mut exit = None;
        let mut buffer = vec![0u8; 32 << 10];
        loop {
            tokio::select! {
                count = read(&mut self.stdin, &mut buffer) => {
                    let send = match count {
                        0 => {
                            self.stdin = None;
                            // v4 cannot end one stream alone; the process then sees its end with the connection's.
                            self.can_close.then(|| message(CLOSE, &[STDIN]))
                        }
                        count => Some(message(STDIN, &buffer[..count])),
                    };
                    if let Some(send) = send {
                        self.socket.send(send).await.map_err(|_| hung_up())?;
                    }
                }
                size = next(&mut self.sizes) => {
                    match size {
                        Some(size) => {
                            let json = format!("{{\"Width\":{},\"Height\":{}}}", size.width, size.height);
                            self.socket.send(message(RESIZE, json.as_bytes())).await.map_err(|_| hung_up())?;
                        }
                        None => self.sizes = None,
                    }
                }
                received = self.socket.next() => {
                    match received {
                        Some(Ok(Message::Binary(bytes))) => {
                            let Some((channel, data)) = bytes.split_first() else { continue };
                            match *channel {
                                STDOUT => write(&mut self.to_stdout, data).await,
                                STDERR => write(&mut self.to_stderr, data).await,
                                STATUS => exit = Some(exit_code(data)),
                                _ => {}
                            }
                        }
                        Some(Ok(Message::Close(_))) | Some(Err(_)) | None => {
                            return exit.unwrap_or_else(|| Err(hung_up()));
                        }
                        Some(Ok(_)) => {}
                    }
                }
            }
        }
    }
}

async fn read(stream: &mut Option<DuplexStream>, buffer: &mut [u8]) -> usize {
    match stream {
        Some(stream) => stream.read(buffer).await.unwrap_or(0),
        None => std::future::pending().await,
    }
}

async fn next(sizes: &mut Option<mpsc::Receiver<TerminalSize>>) -> Option<TerminalSize> {
    match sizes {
        Some(sizes) => sizes.recv().await,
        None => std::future::pending().await,
    }
}

/// A reader that has gone away does not stop the others.
async fn write(stream: &mut Option<DuplexStream>, data: &[u8]) {
    if let Some(open) = stream
        && open.write_all(data).await.is_err()
    {
        *stream = None;
    }
}

fn message(channel: u8, data: &[u8]) -> Message {
    let mut bytes = Vec::with_capacity(data.len() + 1);
    bytes.push(channel);
    bytes.extend_from_slice(data);
    Message::Binary(bytes.into())
}

fn hung_up() -> Error {
    Error::new(Kind::Unavailable, "the runtime hung up before it told an exit code")
}

/// Reads the exit code out of a Kubernetes `Status`.
fn exit_code(status: &[u8]) -> Result<i32> {
    let value: serde_json::Value = serde_json::from_slice(status)
        .map_err(|_| Error::internal(String::from_utf8_lossy(status).into_owned()))?;
    if value["status"] == "Success" {
        return Ok(0);
    }
    let causes = value["details"]["causes"].as_array();
    let cause = causes.and_then(|causes| causes.iter().find(|cause| cause["reason"] == "ExitCode"));
    let code = cause.and_then(|cause| cause["message"].as_str()).and_then(|code| code.parse().ok());
    code.ok_or_else(|| Error::internal(value["message"].as_str().unwrap_or("the command failed").to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_in_the_status() {
        assert_eq!(exit_code(br#"{"status":"Success"}"#).unwrap(), 0);
        let failed = br#"{"status":"Failure","message":"command terminated with non-zero exit code",
            "details":{"causes":[{"reason":"ExitCode","message":"7"}]}}"#;
        assert_eq!(exit_code(failed).unwrap(), 7);
        let error = exit_code(br#"{"status":"Failure","message":"no such container"}"#).unwrap_err();
        assert_eq!(error.message, "no such container");
    }
}
