//! Ends of pipes and terminals as async streams.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::stream::TerminalSize;

/// Size asked for pipes that must not block a container: the most an unprivileged process may ask for.
const PIPE_BYTES: i32 = 1 << 20;

/// A pipe: (read end, write end), both closed on exec and blocking.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?)
}

/// Like [`pipe`], with room for [`PIPE_BYTES`].
pub fn large_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let pipe = pipe()?;
    // SAFETY: fcntl on a descriptor we own. A smaller pipe works too.
    unsafe { libc::fcntl(pipe.1.as_raw_fd(), libc::F_SETPIPE_SZ, PIPE_BYTES) };
    Ok(pipe)
}

/// A pipe's or terminal's descriptor, readable and writable without blocking. Clones share it.
#[derive(Clone)]
pub struct Fd {
    inner: Arc<AsyncFd<OwnedFd>>,
}

impl Fd {
    /// Takes the descriptor and makes it non-blocking. Must be called within a tokio runtime.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        // SAFETY: fcntl on a descriptor we own.
        unsafe {
            let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
            if flags < 0 || libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        // SAFETY: the descriptor is owned by the AsyncFd and stays open as long as it is registered.
        let inner = unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Sets a terminal's size.
    pub fn resize(&self, size: TerminalSize) -> io::Result<()> {
        let size = libc::winsize { ws_row: size.height, ws_col: size.width, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: `size` is what TIOCSWINSZ reads, and lives through the call.
        match unsafe { libc::ioctl(self.inner.as_raw_fd(), libc::TIOCSWINSZ, &size) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Another handle on the same terminal, to give away.
    pub fn try_clone_fd(&self) -> io::Result<OwnedFd> {
        self.inner.get_ref().try_clone()
    }
}

impl AsyncRead for Fd {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.inner.poll_read_ready(cx))?;
            let read = guard.try_io(|fd| {
                let space = buffer.initialize_unfilled();
                // SAFETY: the space is valid for its length; the descriptor is open.
                let count = unsafe { libc::read(fd.as_raw_fd(), space.as_mut_ptr().cast(), space.len()) };
                match count {
                    -1 => match io::Error::last_os_error() {
                        // How a terminal says that its last process is gone.
                        error if error.raw_os_error() == Some(libc::EIO) => Ok(0),
                        error => Err(error),
                    },
                    count => Ok(count as usize),
                }
            });
            match read {
                Ok(Ok(count)) => {
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Fd {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.inner.poll_write_ready(cx))?;
            let written = guard.try_io(|fd| {
                // SAFETY: the bytes are valid for their length; the descriptor is open.
                match unsafe { libc::write(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) } {
                    -1 => Err(io::Error::last_os_error()),
                    count => Ok(count as usize),
                }
            });
            if let Ok(result) = written {
                return Poll::Ready(result);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// The writing end of a pipe whose reader must see the end: shutting down closes it.
pub struct Closing {
    fd: Option<Fd>,
    /// Called once, when closed.
    on_close: Option<Box<dyn FnOnce() + Send>>,
}

impl Closing {
    pub fn new(fd: Fd, on_close: Option<Box<dyn FnOnce() + Send>>) -> Self {
        Self { fd: Some(fd), on_close }
    }

    fn close(&mut self) {
        self.fd = None;
        if let Some(on_close) = self.on_close.take() {
            on_close();
        }
    }
}

impl Drop for Closing {
    fn drop(&mut self) {
        self.close();
    }
}

impl AsyncWrite for Closing {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.fd {
            Some(fd) => Pin::new(fd).poll_write(cx, bytes),
            None => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.close();
        Poll::Ready(Ok(()))
    }
}
