//! Notices when somebody else removes our rules: `nft flush ruleset`, a firewall's reload.
//!
//! The kernel announces every change of the rule set to whoever listens; we look for deletions in one
//! table. Nothing is polled.

use std::io;

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use tokio::io::unix::AsyncFd;

use crate::error::{NetworkError, Result};
use crate::netlink::{self, Attributes};

const GROUP_NFTABLES: u32 = 7;
const SUBSYSTEM_NFTABLES: u16 = 10;
const TABLE_DELETED: u16 = 2;
const CHAIN_DELETED: u16 = 5;
const RULE_DELETED: u16 = 8;
/// The attribute that names the table, the same in all three messages.
const TABLE_NAME: u16 = 1;

/// Listens for deletions in one table of this network namespace.
pub struct Watch {
    socket: AsyncFd<Socket>,
    table: &'static str,
}

impl Watch {
    /// Starts listening. Must be called inside a tokio runtime.
    pub fn new(table: &'static str) -> Result<Watch> {
        let open = || -> io::Result<AsyncFd<Socket>> {
            let mut socket = Socket::new(NETLINK_NETFILTER)?;
            socket.bind(&SocketAddr::new(0, 0))?;
            socket.add_membership(GROUP_NFTABLES)?;
            socket.set_non_blocking(true)?;
            // SAFETY: the socket owns its descriptor, always returns the same one, and is open until dropped.
            Ok(unsafe { AsyncFd::register(socket) }?)
        };
        let failed =
            |error: io::Error| NetworkError::Nftables { step: "watch rules", reason: error.to_string() };
        Ok(Watch { socket: open().map_err(failed)?, table })
    }

    /// Returns when something of the table was deleted, or may have been: the kernel drops announcements
    /// when many come at once, and says so.
    pub async fn deleted(&self) -> Result<()> {
        loop {
            let failed =
                |error: io::Error| NetworkError::Nftables { step: "watch rules", reason: error.to_string() };
            let mut guard = self.socket.readable().await.map_err(failed)?;
            match guard.try_io(|socket| self.read(socket.get_ref())) {
                Ok(Ok(true)) => return Ok(()),
                Ok(Ok(false)) | Err(_) => {}
                Ok(Err(error)) if error.raw_os_error() == Some(nix::libc::ENOBUFS) => return Ok(()),
                Ok(Err(error)) => return Err(failed(error)),
            }
        }
    }

    /// Forgets what was announced so far: call it after a deletion of our own.
    pub fn drain(&self) {
        loop {
            match self.read(self.socket.get_ref()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // ENOBUFS: some were lost; the rest is still to be read.
                _ => {}
            }
        }
    }

    fn read(&self, socket: &Socket) -> io::Result<bool> {
        let (bytes, _) = socket.recv_from_full()?;
        let mut deleted = false;
        netlink::split(&bytes, &mut |message| {
            let operation = message.kind & 0xff;
            let table = Attributes(message.attributes).find(TABLE_NAME).unwrap_or_default();
            deleted |= message.kind >> 8 == SUBSYSTEM_NFTABLES
                && [TABLE_DELETED, CHAIN_DELETED, RULE_DELETED].contains(&operation)
                && table.strip_suffix(&[0]) == Some(self.table.as_bytes());
        });
        Ok(deleted)
    }
}
