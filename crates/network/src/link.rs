//! Devices, addresses and routes by netlink, in this or another network namespace.
//!
//! Thin and named after what the callers mean; which devices there should be is [`crate::builtin`]'s.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::path::Path;

use futures::TryStreamExt;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, TokioSocket};
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
use rtnetlink::packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteScope};
use rtnetlink::{Error, Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};
use tokio::task::JoinHandle;

use crate::error::{NetworkError, Result};
use crate::ipam::Subnet;
use crate::netns;

/// The protocol number our routes carry (`/etc/iproute2/rt_protos`), so that they can be told apart.
const ROUTE_PROTOCOL: u8 = 107;

/// A netlink conversation with one network namespace.
pub struct Links {
    handle: Handle,
    pump: JoinHandle<()>,
}

/// What we ask of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    pub index: u32,
    pub name: String,
    /// `bridge`, `veth`, ...; empty for hardware and loopback.
    pub kind: String,
    pub mtu: u32,
    pub up: bool,
}

/// One end of a cable to be made.
#[derive(Clone, Copy, Debug)]
pub struct End<'a> {
    pub name: &'a str,
    pub hardware: [u8; 6],
}

impl Links {
    /// Talks to the calling thread's namespace.
    pub fn here() -> Result<Links> {
        Self::over(Socket::new(NETLINK_ROUTE).map_err(opening)?)
    }

    /// Talks to the namespace at a path.
    pub fn inside(path: &Path) -> Result<Links> {
        Self::over(netns::inside(path, || Socket::new(NETLINK_ROUTE))?)
    }

    fn over(mut socket: Socket) -> Result<Links> {
        socket.bind_auto().map_err(opening)?;
        // SAFETY: the descriptor is open and owned by nobody else: the socket just gave it up.
        let socket = unsafe { TokioSocket::from_raw_fd(socket.into_raw_fd()) };
        let (connection, handle, _) = rtnetlink::from_socket(socket);
        Ok(Links { handle, pump: tokio::spawn(connection) })
    }

    /// The device of this name.
    pub async fn find(&self, name: &str) -> Result<Option<Device>> {
        let mut answer = self.handle.link().get().match_name(name.to_owned()).execute();
        match answer.try_next().await {
            Ok(message) => Ok(message.map(|message| describe(&message))),
            Err(Error::NetlinkError(error)) if error.raw_code() == -(nix::libc::ENODEV) => Ok(None),
            Err(error) => Err(failed("look up", name, error)),
        }
    }

    /// The device of this name, which must exist.
    pub async fn expect(&self, name: &str) -> Result<Device> {
        let missing = || NetworkError::Netlink {
            step: "look up",
            subject: name.to_owned(),
            reason: "there is no such device".into(),
        };
        self.find(name).await?.ok_or_else(missing)
    }

    /// All devices.
    pub async fn list(&self) -> Result<Vec<Device>> {
        let messages: Vec<LinkMessage> = self
            .handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|e| failed("list", "devices", e))?;
        Ok(messages.iter().map(describe).collect())
    }

    /// Makes a bridge without ports: a device that leads nowhere, as a place for addresses. Every kernel
    /// that runs containers has bridges; the `dummy` device made for this is missing from small ones.
    pub async fn add_anchor(&self, name: &str) -> Result<()> {
        let message = LinkBridge::new(name).mcast_snooping(false).up().build();
        self.handle.link().add(message).execute().await.map_err(|e| failed("add bridge", name, e))
    }

    /// Makes a cable: `outer` here and up, the other end as `inner` in the namespace, still down. Answers
    /// the outer end.
    pub async fn add_cable(&self, outer: End<'_>, inner: End<'_>, into: &File, mtu: u32) -> Result<Device> {
        let peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(inner.name)
            .address(inner.hardware.to_vec())
            .mtu(mtu)
            .setns_by_fd(into.as_raw_fd());
        let message = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer.build())))
            .name(outer.name)
            .address(outer.hardware.to_vec())
            .mtu(mtu)
            .up()
            .build();
        self.handle.link().add(message).execute().await.map_err(|e| failed("add veth", outer.name, e))?;
        self.expect(outer.name).await
    }

    /// Writes down which hardware address an address has, for good: nobody needs to ask.
    pub async fn add_neighbour(&self, index: u32, ip: IpAddr, hardware: [u8; 6]) -> Result<()> {
        let request = self.handle.neighbours().add(index, ip).link_layer_address(&hardware).replace();
        request.execute().await.map_err(|e| failed("add neighbour", ip, e))
    }

    /// Deletes a device; one that is gone is fine.
    pub async fn delete(&self, name: &str) -> Result<()> {
        let Some(device) = self.find(name).await? else { return Ok(()) };
        match self.handle.link().del(device.index).execute().await {
            Err(Error::NetlinkError(error)) if error.raw_code() == -(nix::libc::ENODEV) => Ok(()),
            other => other.map_err(|e| failed("delete", name, e)),
        }
    }

    /// Brings a device up.
    pub async fn up(&self, index: u32) -> Result<()> {
        let message = LinkUnspec::new_with_index(index).up().build();
        self.handle.link().change(message).execute().await.map_err(|e| failed("bring up", index, e))
    }

    /// Gives a device an address; one it has is fine. IPv6 addresses skip duplicate detection, which would
    /// keep a pod silent for a second: nobody else assigns addresses of the range.
    pub async fn add_address(&self, index: u32, ip: IpAddr, prefix: u8) -> Result<()> {
        let mut request = self.handle.address().add(index, ip, prefix).replace();
        if ip.is_ipv6() {
            request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        request.execute().await.map_err(|e| failed("add address", ip, e))
    }

    /// The addresses of a device.
    pub async fn addresses(&self, index: u32) -> Result<Vec<IpAddr>> {
        let messages: Vec<_> = self
            .handle
            .address()
            .get()
            .set_link_index_filter(index)
            .execute()
            .try_collect()
            .await
            .map_err(|e| failed("list addresses of", index, e))?;
        let address = |attribute: &AddressAttribute| match attribute {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        };
        Ok(messages.iter().flat_map(|message| message.attributes.iter().filter_map(address)).collect())
    }

    /// Routes a range straight onto a device (`ip route add RANGE dev DEVICE src SOURCE metric METRIC`).
    pub async fn route(&self, range: Subnet, index: u32, source: Option<IpAddr>, metric: u32) -> Result<()> {
        let message = match range.base() {
            IpAddr::V4(base) => {
                let route = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(base, range.prefix());
                let route = route.output_interface(index).scope(RouteScope::Link).priority(metric);
                match source {
                    Some(IpAddr::V4(source)) => route.pref_source(source).build(),
                    _ => route.build(),
                }
            }
            IpAddr::V6(base) => {
                let route = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(base, range.prefix());
                let route = route.output_interface(index).priority(metric);
                match source {
                    Some(IpAddr::V6(source)) => route.pref_source(source).build(),
                    _ => route.build(),
                }
            }
        };
        self.add_route(message, range).await
    }

    /// The default route, by a gateway that need not lie in a connected range.
    pub async fn route_default(&self, gateway: IpAddr, index: u32) -> Result<()> {
        let message = match gateway {
            IpAddr::V4(ip) => {
                RouteMessageBuilder::<Ipv4Addr>::new().gateway(ip).output_interface(index).onlink().build()
            }
            IpAddr::V6(ip) => {
                RouteMessageBuilder::<Ipv6Addr>::new().gateway(ip).output_interface(index).onlink().build()
            }
        };
        self.add_route(message, gateway).await
    }

    async fn add_route(&self, mut message: RouteMessage, subject: impl ToString) -> Result<()> {
        message.header.protocol = ROUTE_PROTOCOL.into();
        let request = self.handle.route().add(message).replace();
        request.execute().await.map_err(|e| failed("add route", subject, e))
    }

    /// The MTU of the device the default route leaves by; `None` without a default route.
    pub async fn uplink_mtu(&self) -> Result<Option<u32>> {
        let query = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let routes: Vec<RouteMessage> = self
            .handle
            .route()
            .get(query)
            .execute()
            .try_collect()
            .await
            .map_err(|e| failed("list", "routes", e))?;
        let by_default = routes.iter().filter(|route| route.header.destination_prefix_length == 0);
        let Some(index) =
            by_default.flat_map(|route| &route.attributes).find_map(|attribute| match attribute {
                RouteAttribute::Oif(index) => Some(*index),
                _ => None,
            })
        else {
            return Ok(None);
        };
        Ok(self.list().await?.into_iter().find(|device| device.index == index).map(|device| device.mtu))
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        self.pump.abort();
    }
}

fn describe(message: &LinkMessage) -> Device {
    let mut device = Device {
        index: message.header.index,
        name: String::new(),
        kind: String::new(),
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => device.name = name.clone(),
            LinkAttribute::Mtu(mtu) => device.mtu = *mtu,
            LinkAttribute::LinkInfo(infos) => {
                let kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
                device.kind = kind.unwrap_or_default();
            }
            _ => {}
        }
    }
    device
}

fn opening(error: std::io::Error) -> NetworkError {
    NetworkError::Netlink { step: "open", subject: "netlink socket".into(), reason: error.to_string() }
}

fn failed(step: &'static str, subject: impl ToString, error: Error) -> NetworkError {
    let reason = match error {
        Error::NetlinkError(error) => error.to_io().to_string(),
        other => other.to_string(),
    };
    NetworkError::Netlink { step, subject: subject.to_string(), reason }
}
