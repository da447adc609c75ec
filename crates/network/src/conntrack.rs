//! The kernel's connection table, as far as the Service proxy must correct it.
//!
//! UDP has no end of connection: as long as a client keeps sending, its entry lives, and with it the
//! translation to an endpoint that may be gone. So those entries are deleted when a Service changes.
//! TCP needs nothing: a dead endpoint ends the connection.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr as NetlinkAddr};

use crate::error::{NetworkError, Result};
use crate::netlink::{self, Attributes, MessageBuilder};

const SUBSYSTEM: u16 = 1;
const MESSAGE_GET: u16 = 1;
const MESSAGE_DELETE: u16 = 2;
const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const ZONE: u16 = 18;
const PROTOCOL_UDP: u8 = 17;

/// One tracked UDP flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Who sent the first packet.
    pub source: SocketAddr,
    /// Where it was sent to, before translation.
    pub destination: SocketAddr,
    /// Who answers: the endpoint, or the destination itself where nothing was translated.
    pub answers: SocketAddr,
}

/// Deletes the UDP flows for which `stale` says so, in the calling thread's network namespace; answers how
/// many. Blocks for as long as the kernel takes to list its table.
pub fn delete_udp(stale: impl Fn(&Flow) -> bool) -> Result<usize> {
    let failed = |step| move |source| NetworkError::Conntrack { step, source };
    let mut socket = Socket::new(NETLINK_NETFILTER).map_err(failed("open socket"))?;
    socket.bind_auto().map_err(failed("bind socket"))?;
    socket.connect(&NetlinkAddr::new(0, 0)).map_err(failed("connect socket"))?;
    let doomed = list(&socket, stale).map_err(failed("list flows"))?;
    for (family, tuple, zone) in &doomed {
        delete(&socket, *family, tuple, zone.as_deref()).map_err(failed("delete flow"))?;
    }
    Ok(doomed.len())
}

type Doomed = (u8, Vec<u8>, Option<Vec<u8>>);

fn list(socket: &Socket, stale: impl Fn(&Flow) -> bool) -> io::Result<Vec<Doomed>> {
    let flags = nix::libc::NLM_F_REQUEST | nix::libc::NLM_F_DUMP;
    let request = MessageBuilder::new(SUBSYSTEM, MESSAGE_GET, flags as u16, 0).build();
    socket.send(&request, 0)?;
    let mut doomed = Vec::new();
    netlink::read_answers(socket, |message| {
        let attributes = Attributes(message.attributes);
        let original = attributes.find(TUPLE_ORIGINAL);
        let flow = read_flow(original, attributes.find(TUPLE_REPLY));
        if let (Some(original), Some(flow)) = (original, flow)
            && stale(&flow)
        {
            doomed.push((message.family, original.to_vec(), attributes.find(ZONE).map(<[u8]>::to_vec)));
        }
    })?;
    Ok(doomed)
}

fn delete(socket: &Socket, family: u8, tuple: &[u8], zone: Option<&[u8]>) -> io::Result<()> {
    let flags = nix::libc::NLM_F_REQUEST | nix::libc::NLM_F_ACK;
    let mut request = MessageBuilder::new(SUBSYSTEM, MESSAGE_DELETE, flags as u16, family);
    request.nested(TUPLE_ORIGINAL, tuple);
    if let Some(zone) = zone {
        request.attribute(ZONE, zone);
    }
    socket.send(&request.build(), 0)?;
    match netlink::read_answers(socket, |_| {}) {
        // Expired meanwhile.
        Err(error) if error.raw_os_error() == Some(nix::libc::ENOENT) => Ok(()),
        other => other,
    }
}

fn read_flow(original: Option<&[u8]>, reply: Option<&[u8]>) -> Option<Flow> {
    let (source, destination) = read_tuple(original?)?;
    let (answers, _) = read_tuple(reply?)?;
    Some(Flow { source, destination, answers })
}

/// Source and destination of a UDP tuple; `None` for other protocols.
fn read_tuple(bytes: &[u8]) -> Option<(SocketAddr, SocketAddr)> {
    let tuple = Attributes(bytes);
    let (ip, protocol) = (Attributes(tuple.find(1)?), Attributes(tuple.find(2)?));
    if protocol.find(1)? != [PROTOCOL_UDP] {
        return None;
    }
    let port = |kind| Some(u16::from_be_bytes(protocol.find(kind)?.try_into().ok()?));
    let address = |four, six| -> Option<IpAddr> {
        if let Some(bytes) = ip.find(four) {
            return Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into());
        }
        Some(Ipv6Addr::from(<[u8; 16]>::try_from(ip.find(six)?).ok()?).into())
    };
    Some((SocketAddr::new(address(1, 3)?, port(2)?), SocketAddr::new(address(2, 4)?, port(3)?)))
}
