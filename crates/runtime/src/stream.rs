//! Byte streams between the kubelet and a process in a container. Framing for the outside (WebSocket channels,
//! SPDY) is the kubelet's server's concern; here are only the ends.

use std::pin::Pin;

use futures::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

use crate::error::Result;

pub type Reader = Pin<Box<dyn AsyncRead + Send>>;
pub type Writer = Pin<Box<dyn AsyncWrite + Send>>;

/// Both directions of one connection.
pub type Duplex = Pin<Box<dyn ReadWrite>>;

/// What a [`Duplex`] is made of.
pub trait ReadWrite: AsyncRead + AsyncWrite + Send {}

impl<T: AsyncRead + AsyncWrite + Send> ReadWrite for T {}

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct TerminalSize {
    pub width: u16,
    pub height: u16,
}

/// A running exec or attach. Dropping a stream closes it; dropping everything does not kill the process of an
/// attach; the process of an exec sees its streams close, as with any runtime.
pub struct ExecSession {
    /// Shut down or drop to close the process's input.
    pub stdin: Option<Writer>,
    pub stdout: Option<Reader>,
    /// Absent with a terminal.
    pub stderr: Option<Reader>,
    /// Present with a terminal. Sizes beyond what the channel holds wait.
    pub resize: Option<mpsc::Sender<TerminalSize>>,
    /// The exit code, once the process has ended and its output was handed over to the streams.
    pub exit: BoxFuture<'static, Result<i32>>,
}
