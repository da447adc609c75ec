//! Exec and attach: joins the streams of a process to those of a connection, and tells how it ended
//! (`k8s.io/kubelet/pkg/cri/streaming/remotecommand`).

use super::spdy::{self, Session, Stream, StreamReader, StreamWriter};
use super::websocket::{self, CLOSE_CHANNEL, ChannelReader, ChannelWriter};
use bytes::Bytes;
use knarr_runtime::{ExecSession, Reader, TerminalSize, Writer};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Mutex, mpsc};
use tokio_tungstenite::WebSocketStream;

/// Subprotocols over WebSockets, and versions over SPDY (`X-Stream-Protocol-Version`), the best first.
pub const WEBSOCKET_PROTOCOLS: [&str; 6] = [
    "v5.channel.k8s.io",
    "v4.channel.k8s.io",
    "v4.base64.channel.k8s.io",
    "base64.channel.k8s.io",
    "channel.k8s.io",
    "",
];
pub const SPDY_VERSIONS: [&str; 4] =
    ["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"];

/// How long a client has to open the streams it asked for.
const OPEN_TIMEOUT: Duration = Duration::from_secs(30);
/// Read from a process at once.
const CHUNK_BYTES: usize = 32 * 1024;

pub const STDIN: u8 = 0;
pub const STDOUT: u8 = 1;
pub const STDERR: u8 = 2;
pub const ERROR: u8 = 3;
pub const RESIZE: u8 = 4;

/// Which streams a client asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub tty: bool,
}

/// What the end of a process is told as: `metav1.Status`. `Err` is a message for what failed otherwise.
pub fn status(result: &Result<i32, String>) -> Value {
    let head = json!({"metadata": {}});
    let mut status = head;
    match result {
        Ok(0) => status["status"] = "Success".into(),
        Ok(code) => {
            status["status"] = "Failure".into();
            status["message"] =
                format!("command terminated with non-zero exit code: exit status {code}").into();
            status["reason"] = "NonZeroExitCode".into();
            status["details"] = json!({"causes": [{"reason": "ExitCode", "message": code.to_string()}]});
        }
        Err(message) => {
            status["status"] = "Failure".into();
            status["message"] = message.as_str().into();
            status["reason"] = "InternalError".into();
            status["details"] = json!({"causes": [{"message": message}]});
            status["code"] = 500.into();
        }
    }
    status
}

/// The exit code a status tells of, for clients: 0 for success.
pub fn exit_code(status: &Value) -> Option<i32> {
    if status["status"] == "Success" {
        return Some(0);
    }
    let causes = status["details"]["causes"].as_array()?;
    let code = causes.iter().find(|cause| cause["reason"] == "ExitCode")?;
    code["message"].as_str()?.parse().ok()
}

/// Copies a process's output piece by piece.
async fn pump<F>(from: Option<Reader>, mut send: impl FnMut(Bytes) -> F)
where
    F: Future<Output = io::Result<()>>,
{
    let Some(mut from) = from else { return };
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(count) => {
                if send(Bytes::copy_from_slice(&buffer[..count])).await.is_err() {
                    return;
                }
            }
        }
    }
}

fn resize(sizes: &Option<mpsc::Sender<TerminalSize>>, data: &[u8]) {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Size {
        width: u16,
        height: u16,
    }
    if let (Some(sizes), Ok(size)) = (sizes, serde_json::from_slice::<Size>(data)) {
        // A newer size follows; a full channel may lose this one.
        let _ = sizes.try_send(TerminalSize { width: size.width, height: size.height });
    }
}

/// Joins a process to a WebSocket. `session` starts it.
pub async fn over_websocket<C>(
    socket: WebSocketStream<C>,
    protocol: &str,
    wanted: Wanted,
    session: impl Future<Output = knarr_runtime::Result<ExecSession>>,
) where
    C: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let plain = protocol.strip_prefix("v4.").unwrap_or(protocol);
    let (mut reader, writer) = websocket::channels(socket, plain);
    let writer = Arc::new(Mutex::new(writer));
    let v4 = protocol.starts_with("v4.") || protocol.starts_with("v5.");
    // The oldest protocols say at once which channels there are, with empty messages.
    if !v4 {
        for (channel, there) in [(STDIN, wanted.stdin), (STDOUT, wanted.stdout), (STDERR, wanted.stderr)] {
            if there {
                let _ = writer.lock().await.send(channel, b"").await;
            }
        }
    }
    let result = match session.await {
        Ok(session) => join_websocket(&mut reader, &writer, session).await,
        Err(error) => Some(Err(error.to_string())),
    };
    if let Some(result) = result {
        let mut writer = writer.lock().await;
        let text = match (&result, v4) {
            (_, true) => status(&result).to_string(),
            (Ok(0), false) => String::new(),
            (Ok(code), false) => format!("command terminated with non-zero exit code: exit status {code}"),
            (Err(message), false) => message.clone(),
        };
        if !text.is_empty() {
            let _ = writer.send(ERROR, text.as_bytes()).await;
        }
        let _ = writer.close().await;
        drop(writer);
        // Until the client has closed, too: what was sent must arrive before the connection ends.
        let _ = tokio::time::timeout(OPEN_TIMEOUT, async { while reader.next().await.is_some() {} }).await;
    }
}

/// `None` when the client left first.
async fn join_websocket<C>(
    reader: &mut ChannelReader<C>,
    writer: &Arc<Mutex<ChannelWriter<C>>>,
    session: ExecSession,
) -> Option<Result<i32, String>>
where
    C: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let ExecSession { stdin, stdout, stderr, resize: sizes, exit } = session;
    let send = |channel: u8| {
        let writer = writer.clone();
        move |data: Bytes| {
            let writer = writer.clone();
            async move { writer.lock().await.send(channel, &data).await }
        }
    };
    let output = async { tokio::join!(pump(stdout, send(STDOUT)), pump(stderr, send(STDERR))) };
    let input = async {
        let mut stdin = stdin;
        while let Some((channel, data)) = reader.next().await {
            match channel {
                STDIN => write_input(&mut stdin, &data).await,
                RESIZE => resize(&sizes, &data),
                CLOSE_CHANNEL if data.first() == Some(&STDIN) => close_input(&mut stdin).await,
                _ => {}
            }
        }
    };
    let work = async {
        let (exit, _) = tokio::join!(exit, output);
        exit.map_err(|error| error.to_string())
    };
    tokio::select! {
        result = work => Some(result),
        () = input => None,
    }
}

async fn write_input(stdin: &mut Option<Writer>, data: &[u8]) {
    let Some(open) = stdin else { return };
    let written = async {
        open.write_all(data).await?;
        open.flush().await
    };
    if written.await.is_err() {
        // The process reads no more; what else comes is dropped.
        *stdin = None;
    }
}

async fn close_input(stdin: &mut Option<Writer>) {
    if let Some(mut open) = stdin.take() {
        let _ = open.shutdown().await;
    }
}

/// Joins a process to a SPDY session. The client opens one stream per direction; `start` is called once all are
/// there.
pub async fn over_spdy(
    mut connection: Session,
    version: &str,
    wanted: Wanted,
    session: impl Future<Output = knarr_runtime::Result<ExecSession>>,
) {
    let opened = tokio::time::timeout(OPEN_TIMEOUT, open_all(&mut connection, version, wanted)).await;
    let Ok(Some(mut streams)) = opened else {
        tracing::debug!("the client did not open the streams it asked for");
        return;
    };
    let mut error = streams.remove("error");
    let v4 = version == SPDY_VERSIONS[0];
    let result = match session.await {
        Ok(session) => join_spdy(&mut connection, &mut streams, session).await,
        Err(error) => Some(Err(error.to_string())),
    };
    let (Some(result), Some(error)) = (result, &mut error) else { return };
    let text = match (&result, v4) {
        (_, true) => status(&result).to_string(),
        (Ok(0), false) => String::new(),
        (Ok(code), false) => format!("command terminated with non-zero exit code: exit status {code}"),
        (Err(message), false) => message.clone(),
    };
    if !text.is_empty() {
        let _ = error.writer.send(text.into()).await;
    }
    let _ = error.writer.close().await;
    // The client closes when it has read everything.
    let _ = tokio::time::timeout(OPEN_TIMEOUT, async { while connection.accept().await.is_some() {} }).await;
}

async fn open_all(
    connection: &mut Session,
    version: &str,
    wanted: Wanted,
) -> Option<HashMap<String, Stream>> {
    let has_resize = wanted.tty && (version == "v3.channel.k8s.io" || version == "v4.channel.k8s.io");
    let expected = 1
        + usize::from(wanted.stdin)
        + usize::from(wanted.stdout)
        + usize::from(wanted.stderr && !wanted.tty)
        + usize::from(has_resize);
    let mut streams = HashMap::new();
    while streams.len() < expected {
        let stream = connection.accept().await?;
        let kind = spdy::header(&stream.headers, "streamtype")?.to_owned();
        streams.insert(kind, stream);
    }
    Some(streams)
}

/// `None` when the client left first.
async fn join_spdy(
    connection: &mut Session,
    streams: &mut HashMap<String, Stream>,
    session: ExecSession,
) -> Option<Result<i32, String>> {
    let ExecSession { stdin, stdout, stderr, resize: sizes, exit } = session;
    let (stdin_reader, _stdin_writer) = halves(streams.remove("stdin"));
    let (resize_reader, _resize_writer) = halves(streams.remove("resize"));
    let (_, stdout_writer) = halves(streams.remove("stdout"));
    let (_, stderr_writer) = halves(streams.remove("stderr"));
    let output = async { tokio::join!(pump_spdy(stdout, stdout_writer), pump_spdy(stderr, stderr_writer)) };
    let input = async {
        let mut stdin = stdin;
        let Some(mut reader) = stdin_reader else { return };
        while let Some(data) = reader.next().await {
            write_input(&mut stdin, &data).await;
        }
        close_input(&mut stdin).await;
    };
    let resizing = async {
        let Some(mut reader) = resize_reader else { return };
        let mut text = Vec::new();
        while let Some(data) = reader.next().await {
            // Values follow one another without anything between.
            text.extend_from_slice(&data);
            while let Some(end) = text.iter().position(|byte| *byte == b'}') {
                let value: Vec<u8> = text.drain(..=end).collect();
                resize(&sizes, &value);
            }
        }
    };
    let work = async {
        let (exit, _) = tokio::join!(exit, output);
        exit.map_err(|error| error.to_string())
    };
    let beside = async {
        let gone = async { while connection.accept().await.is_some() {} };
        let streams = async {
            tokio::join!(input, resizing);
            std::future::pending::<()>().await
        };
        tokio::select! {
            () = gone => {}
            () = streams => {}
        }
    };
    tokio::select! {
        result = work => Some(result),
        () = beside => None,
    }
}

fn halves(stream: Option<Stream>) -> (Option<StreamReader>, Option<StreamWriter>) {
    match stream {
        Some(stream) => (Some(stream.reader), Some(stream.writer)),
        None => (None, None),
    }
}

async fn pump_spdy(from: Option<Reader>, to: Option<StreamWriter>) {
    let Some(to) = to else {
        // Not asked for: read and dropped, so that the process is not held up.
        return pump(from, |_| async { Ok(()) }).await;
    };
    let to = Arc::new(Mutex::new(to));
    pump(from, |data| {
        let to = to.clone();
        async move { to.lock().await.send(data).await }
    })
    .await;
    let _ = to.lock().await.close().await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_tungstenite::tungstenite::protocol::Role;

    /// A process that copies its input to its output and ends with a code.
    fn echo(code: i32) -> ExecSession {
        let (near, far) = tokio::io::duplex(1024);
        let (from, _) = tokio::io::split(near);
        let (mut far_read, far_write) = tokio::io::split(far);
        let (stdin, stdin_far) = tokio::io::duplex(1024);
        let (done, finished) = tokio::sync::oneshot::channel();
        tokio::spawn(async move {
            let (mut input, mut output) = (stdin_far, far_write);
            let _ = tokio::io::copy(&mut input, &mut output).await;
            let _ = output.shutdown().await;
            let _ = far_read.read(&mut [0]).await;
            drop(output);
            let _ = done.send(code);
        });
        ExecSession {
            stdin: Some(Box::pin(stdin)),
            stdout: Some(Box::pin(from)),
            stderr: None,
            resize: None,
            exit: Box::pin(async move { Ok(finished.await.unwrap_or(code)) }),
        }
    }

    const BOTH: Wanted = Wanted { stdin: true, stdout: true, stderr: false, tty: false };

    #[test]
    fn exit_codes_are_told_and_understood() {
        for (result, want) in [(Ok(0), Some(0)), (Ok(3), Some(3)), (Err("x".to_owned()), None)] {
            assert_eq!(exit_code(&status(&result)), want);
        }
        assert_eq!(status(&Ok(3))["reason"], "NonZeroExitCode");
    }

    #[tokio::test]
    async fn a_process_is_joined_to_a_websocket() {
        let (near, far) = tokio::io::duplex(4096);
        let (client, server) =
            tokio::join!(websocket::frame(near, Role::Client), websocket::frame(far, Role::Server));
        let task = tokio::spawn(over_websocket(server, "v5.channel.k8s.io", BOTH, async { Ok(echo(7)) }));
        let (mut reader, mut writer) = websocket::channels(client, "v5.channel.k8s.io");
        writer.send(STDIN, b"hello").await.unwrap();
        assert_eq!(reader.next().await, Some((STDOUT, Bytes::from_static(b"hello"))));
        writer.send(CLOSE_CHANNEL, &[STDIN]).await.unwrap();
        let (channel, data) = reader.next().await.unwrap();
        assert_eq!(channel, ERROR);
        assert_eq!(exit_code(&serde_json::from_slice(&data).unwrap()), Some(7));
        assert_eq!(reader.next().await, None);
        task.await.unwrap();
    }

    #[tokio::test]
    async fn a_process_is_joined_to_spdy_streams() {
        let (near, far) = tokio::io::duplex(4096);
        let client = Session::new(near, spdy::Role::Client);
        let server = Session::new(far, spdy::Role::Server);
        let task = tokio::spawn(over_spdy(server, SPDY_VERSIONS[0], BOTH, async { Ok(echo(0)) }));
        let open =
            async |kind: &str| client.open(vec![("streamtype".to_owned(), kind.to_owned())]).await.unwrap();
        let mut error = open("error").await;
        let mut stdin = open("stdin").await;
        let mut stdout = open("stdout").await;
        stdin.writer.send(Bytes::from_static(b"hello")).await.unwrap();
        assert_eq!(stdout.reader.next().await.unwrap(), "hello");
        stdin.writer.close().await.unwrap();
        let told = error.reader.next().await.unwrap();
        assert_eq!(exit_code(&serde_json::from_slice(&told).unwrap()), Some(0));
        assert_eq!(stdout.reader.next().await, None);
        drop((client, error, stdin, stdout));
        task.await.unwrap();
    }
}
