//! Packets with descriptors on a `SOCK_SEQPACKET` Unix socket, non-blocking, for both ends.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::sys::socket::{
    self, AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType,
    UnixAddr, sockopt,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::protocol::{FDS_MAX, MESSAGE_BYTES_MAX};

/// What the kernel may hold for a slow reader before the connection is given up.
const SEND_BUFFER_BYTES: usize = 4 << 20;

pub fn listen(path: &Path) -> io::Result<OwnedFd> {
    let fd = new_socket()?;
    let _ = std::fs::remove_file(path);
    socket::bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    socket::listen(&fd, Backlog::new(16)?)?;
    Ok(fd)
}

pub fn connect(path: &Path) -> io::Result<OwnedFd> {
    let fd = new_socket()?;
    socket::connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    size_buffers(&fd);
    Ok(fd)
}

pub fn accept(listener: RawFd) -> io::Result<OwnedFd> {
    let fd = socket::accept4(listener, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
    // SAFETY: accept4 has just made this descriptor for us.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    size_buffers(&fd);
    Ok(fd)
}

/// A connected, blocking pair.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socket::socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?)
}

fn new_socket() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket::socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?)
}

fn size_buffers(fd: &OwnedFd) {
    // Needs privilege; without, the system's default of some 200 KiB still holds hundreds of messages.
    let _ = socket::setsockopt(fd, sockopt::SndBufForce, &SEND_BUFFER_BYTES);
}

/// Sends one message. `WouldBlock` when the peer does not keep up.
pub fn send(fd: RawFd, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    socket::sendmsg::<UnixAddr>(fd, &[IoSlice::new(&bytes)], control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Receives one message; `None` at the end of the connection.
pub fn receive<T: DeserializeOwned>(fd: RawFd) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut probe = [0u8; 1];
    // SAFETY: the buffer is valid for one byte; with MSG_PEEK | MSG_TRUNC the packet's true length is returned.
    let len = unsafe { libc::recv(fd, probe.as_mut_ptr().cast(), 1, libc::MSG_PEEK | libc::MSG_TRUNC) };
    let len = match len {
        -1 => return Err(io::Error::last_os_error()),
        0 => return Ok(None),
        len => len as usize,
    };
    if len > MESSAGE_BYTES_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("message of {len} bytes is too long"),
        ));
    }
    let mut bytes = vec![0u8; len];
    let mut control = nix::cmsg_space!([RawFd; FDS_MAX]);
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let message =
        socket::recvmsg::<UnixAddr>(fd, &mut slices, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = part {
            // SAFETY: the kernel has just installed these descriptors for us.
            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok(Some((serde_json::from_slice(&bytes)?, fds)))
}
