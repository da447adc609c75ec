//! Ranges of addresses, of either family.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::str::FromStr;

/// A range of Service addresses, such as `10.96.0.0/16` or `fd00:10:96::/108`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cidr {
    base: IpAddr,
    prefix: u8,
}

/// Of larger ranges the first so many addresses are given out (2 to this power).
const HOST_BITS_MAX: u8 = 64;
/// Addresses below the band are only given on request (KEP-3070): so many at least and at most.
const BAND_MIN: u128 = 16;
const BAND_MAX: u128 = 256;

impl Cidr {
    /// `IPv4` or `IPv6`.
    pub fn family(&self) -> &'static str {
        if self.base.is_ipv4() { "IPv4" } else { "IPv6" }
    }

    /// The n-th address: 1 is the `kubernetes` service, 10 the cluster DNS.
    pub fn nth(&self, n: u32) -> IpAddr {
        self.at(u128::from(n))
    }

    pub fn contains(&self, address: IpAddr) -> bool {
        self.base.is_ipv4() == address.is_ipv4() && self.offset(address).is_some_and(|o| o < self.size())
    }

    /// Whether the address can be a service's: not the network's own, nor the broadcast address of IPv4.
    pub fn can_hold(&self, address: IpAddr) -> bool {
        self.contains(address) && self.offset(address).is_some_and(|o| self.hosts().contains(&o))
    }

    /// Offsets of usable addresses.
    pub fn hosts(&self) -> RangeInclusive<u128> {
        let last = if self.base.is_ipv4() { self.size().saturating_sub(2) } else { self.size() - 1 };
        1..=last
    }

    /// Usable offsets from here on are given out unasked.
    pub fn band(&self) -> u128 {
        let size = self.size();
        if size < BAND_MIN { 1 } else { (size / 16).clamp(BAND_MIN, BAND_MAX).min(size / 2) + 1 }
    }

    pub fn at(&self, offset: u128) -> IpAddr {
        match self.base {
            IpAddr::V4(v4) => IpAddr::V4(Ipv4Addr::from(u32::from(v4).wrapping_add(offset as u32))),
            IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from(u128::from(v6).wrapping_add(offset))),
        }
    }

    fn offset(&self, address: IpAddr) -> Option<u128> {
        match (self.base, address) {
            (IpAddr::V4(base), IpAddr::V4(v4)) => u32::from(v4).checked_sub(u32::from(base)).map(u128::from),
            (IpAddr::V6(base), IpAddr::V6(v6)) => u128::from(v6).checked_sub(u128::from(base)),
            _ => None,
        }
    }

    fn size(&self) -> u128 {
        let width = if self.base.is_ipv4() { 32 } else { 128 };
        1 << (width - self.prefix).min(HOST_BITS_MAX)
    }
}

impl FromStr for Cidr {
    type Err = String;

    fn from_str(text: &str) -> Result<Cidr, String> {
        let bad = || format!("{text:?} is no range of addresses, such as 10.96.0.0/16 or fd00:10:96::/108");
        let (base, prefix) = text.split_once('/').ok_or_else(bad)?;
        let base: IpAddr = base.parse().map_err(|_| bad())?;
        let width = if base.is_ipv4() { 32 } else { 128 };
        let prefix: u8 = prefix.parse().ok().filter(|p| *p <= width).ok_or_else(bad)?;
        // What lies below the prefix does not count.
        let base = match base {
            IpAddr::V4(v4) => {
                let mask = u32::MAX.checked_shl(u32::from(32 - prefix)).unwrap_or(0);
                IpAddr::V4(Ipv4Addr::from(u32::from(v4) & mask))
            }
            IpAddr::V6(v6) => {
                let mask = u128::MAX.checked_shl(u32::from(128 - prefix)).unwrap_or(0);
                IpAddr::V6(Ipv6Addr::from(u128::from(v6) & mask))
            }
        };
        Ok(Cidr { base, prefix })
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

/// One range, or one of each family, the cluster's own family first: `10.96.0.0/16,fd00::/108`.
#[derive(Debug, Clone, PartialEq)]
pub struct Ranges(Vec<Cidr>);

impl Ranges {
    pub fn primary(&self) -> Cidr {
        self.0[0]
    }

    pub fn iter(&self) -> impl Iterator<Item = Cidr> {
        self.0.iter().copied()
    }
}

impl FromStr for Ranges {
    type Err = String;

    fn from_str(text: &str) -> Result<Ranges, String> {
        let ranges = text.split(',').map(|one| one.trim().parse()).collect::<Result<Vec<Cidr>, String>>()?;
        for range in &ranges {
            let least = if range.base.is_ipv4() { 12 } else { 64 };
            let most = if range.base.is_ipv4() { 28 } else { 124 };
            if !(least..=most).contains(&range.prefix) {
                return Err(format!("{range} has a bad length: take /{least} to /{most}"));
            }
        }
        match &ranges[..] {
            [_] => Ok(Ranges(ranges)),
            [one, other] if one.family() != other.family() => Ok(Ranges(ranges)),
            _ => Err(format!("{text:?}: give one range, or one of IPv4 and one of IPv6")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_keep_their_first_addresses_for_who_asks() {
        for (text, first, last, band) in [
            ("10.96.0.0/16", "10.96.0.1", "10.96.255.254", "10.96.1.1"),
            ("10.96.0.0/28", "10.96.0.1", "10.96.0.14", "10.96.0.9"),
            ("10.96.0.0/30", "10.96.0.1", "10.96.0.2", "10.96.0.1"),
            ("fd00::/112", "fd00::1", "fd00::ffff", "fd00::101"),
        ] {
            let range: Cidr = text.parse().expect("a range");
            let shown =
                [*range.hosts().start(), *range.hosts().end(), range.band()].map(|o| range.at(o).to_string());
            assert_eq!(shown, [first, last, band], "{text}");
            assert_eq!(range.to_string(), text);
        }
        let range: Cidr = "10.96.0.0/24".parse().expect("a range");
        let can = |text: &str| range.can_hold(text.parse().expect("an address"));
        assert!(
            can("10.96.0.1") && !can("10.96.0.0") && !can("10.96.0.255") && !can("10.97.0.1") && !can("::1")
        );
    }

    #[test]
    fn a_cluster_has_one_range_of_a_family() {
        for good in ["10.96.0.0/12", "fd00::/108", "10.0.0.0/16, fd00::/108", "fd00::/108,10.0.0.0/16"] {
            assert!(good.parse::<Ranges>().is_ok(), "{good}");
        }
        for bad in ["", "10.0.0.0/8", "10.0.0.0/16,10.1.0.0/16", "fd00::/48", "10.0.0.0", "a/16"] {
            assert!(bad.parse::<Ranges>().is_err(), "{bad}");
        }
    }
}
