//! The little of netlink's netfilter dialect that no library of ours speaks: framing and attributes.

use std::io;

use netlink_sys::Socket;

const HEADER_LEN: usize = 16;
/// `nfgenmsg`: family, version, resource.
const NETFILTER_LEN: usize = 4;
const ATTRIBUTE_LEN: usize = 4;
const KIND_MASK: u16 = 0x3fff;
const NESTED: u16 = 0x8000;

/// One netfilter message.
pub struct Message<'a> {
    /// Subsystem in the upper byte, operation in the lower.
    pub kind: u16,
    pub family: u8,
    pub attributes: &'a [u8],
}

/// A run of attributes.
#[derive(Clone, Copy)]
pub struct Attributes<'a>(pub &'a [u8]);

/// A request under construction.
pub struct MessageBuilder(Vec<u8>);

impl<'a> Attributes<'a> {
    /// The payload of the first attribute of this kind.
    pub fn find(self, wanted: u16) -> Option<&'a [u8]> {
        let mut rest = self.0;
        while rest.len() >= ATTRIBUTE_LEN {
            let len = usize::from(u16::from_ne_bytes([rest[0], rest[1]]));
            let kind = u16::from_ne_bytes([rest[2], rest[3]]) & KIND_MASK;
            let payload = rest.get(ATTRIBUTE_LEN..len)?;
            if kind == wanted {
                return Some(payload);
            }
            rest = rest.get(aligned(len)..)?;
        }
        None
    }
}

impl MessageBuilder {
    /// A message without attributes; `flags` are `NLM_F_*`.
    pub fn new(subsystem: u16, operation: u16, flags: u16, family: u8) -> MessageBuilder {
        let mut bytes = vec![0; 4];
        bytes.extend((subsystem << 8 | operation).to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend([family, 0, 0, 0]);
        MessageBuilder(bytes)
    }

    /// Names the subsystem a batch is for.
    pub fn resource(mut self, resource: u16) -> MessageBuilder {
        self.0[HEADER_LEN + 2..HEADER_LEN + NETFILTER_LEN].copy_from_slice(&resource.to_be_bytes());
        self
    }

    /// Opens an attribute whose payload is what is added until [`MessageBuilder::close`] is given its place.
    pub fn open(&mut self, kind: u16) -> usize {
        let place = self.0.len();
        self.0.extend([0; 2]);
        self.0.extend((kind | NESTED).to_ne_bytes());
        place
    }

    /// Closes an attribute.
    pub fn close(&mut self, place: usize) {
        let len = (self.0.len() - place) as u16;
        self.0[place..place + 2].copy_from_slice(&len.to_ne_bytes());
    }

    /// Adds an attribute.
    pub fn attribute(&mut self, kind: u16, payload: &[u8]) {
        let len = (ATTRIBUTE_LEN + payload.len()) as u16;
        self.0.extend(len.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(payload);
        self.0.resize(aligned(self.0.len()), 0);
    }

    /// Adds an attribute whose payload is attributes.
    pub fn nested(&mut self, kind: u16, payload: &[u8]) {
        self.attribute(kind | NESTED, payload);
    }

    /// The finished bytes.
    pub fn build(mut self) -> Vec<u8> {
        let len = self.0.len() as u32;
        self.0[..4].copy_from_slice(&len.to_ne_bytes());
        self.0
    }
}

/// Reads answers until the kernel says it is done or acknowledges.
///
/// # Errors
/// The socket's, or the error the kernel answers with.
pub fn read_answers(socket: &Socket, mut each: impl FnMut(Message<'_>)) -> io::Result<()> {
    loop {
        let (bytes, _) = socket.recv_from_full()?;
        if let Some(end) = split(&bytes, &mut each) {
            return end;
        }
    }
}

/// Splits a datagram into messages; `Some` when it ends the conversation.
pub fn split(mut bytes: &[u8], each: &mut dyn FnMut(Message<'_>)) -> Option<io::Result<()>> {
    while bytes.len() >= HEADER_LEN {
        let len = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize;
        let kind = u16::from_ne_bytes([bytes[4], bytes[5]]);
        let body = bytes.get(HEADER_LEN..len)?;
        match i32::from(kind) {
            nix::libc::NLMSG_DONE => return Some(Ok(())),
            nix::libc::NLMSG_ERROR => return Some(read_error(body)),
            _ if body.len() >= NETFILTER_LEN => {
                each(Message { kind, family: body[0], attributes: &body[NETFILTER_LEN..] });
            }
            _ => {}
        }
        bytes = bytes.get(aligned(len)..).unwrap_or_default();
    }
    None
}

fn read_error(body: &[u8]) -> io::Result<()> {
    let code = body.first_chunk().map_or(-nix::libc::EPROTO, |code| i32::from_ne_bytes(*code));
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) }
}

fn aligned(len: usize) -> usize {
    len.next_multiple_of(4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_survive_the_round_trip_and_cut_off_ones_are_not_found() {
        let mut builder = MessageBuilder::new(1, 2, 0, 2);
        builder.attribute(7, b"abc");
        builder.nested(8, b"defgh");
        let bytes = builder.build();
        let mut seen = 0;
        split(&bytes, &mut |message| {
            seen += 1;
            assert_eq!(message.kind, 0x0102);
            assert_eq!(Attributes(message.attributes).find(7), Some(&b"abc"[..]));
            assert_eq!(Attributes(message.attributes).find(8), Some(&b"defgh"[..]));
            assert_eq!(Attributes(message.attributes).find(9), None);
            assert_eq!(Attributes(&message.attributes[..6]).find(7), None);
        });
        assert_eq!(seen, 1);
    }
}
