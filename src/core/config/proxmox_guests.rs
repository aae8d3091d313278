//! What the tables of the handlers have in common whose pods are guests of Proxmox: numbers, addresses, `net0`.
//!
//! The tables themselves are written out in each handler's own file: what a key means there is in its words.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::error::Result;
use super::faults::{Fault, Faults};

/// Longest name of an interface of the kernel's (IFNAMSIZ without its end).
const NAME_MAX: usize = 15;

/// What becomes of CTs that carry this installation's identity and belong to no pod.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Orphans {
    /// They are told in the log.
    #[default]
    Report,
    /// They are deleted, too.
    Remove,
}

/// `FIRST-LAST` of the key `vmids` of a handler's table.
pub(super) fn parse_range(table: &str, vmids: &str) -> Result<(u32, u32), Fault> {
    let range = vmids.split_once('-').and_then(|(first, last)| {
        let range: (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        (100 <= range.0 && range.0 <= range.1 && range.1 <= 999_999_999).then_some(range)
    });
    range.ok_or_else(|| {
        Fault::new(format!("{table}.vmids"), format!("{vmids:?}: FIRST-LAST is needed, of 100 to 999999999"))
    })
}

/// Names of storages are one word.
pub(super) fn check_storage(key: String, name: &str, faults: &mut Faults) {
    if name.is_empty() || name.contains(char::is_whitespace) {
        faults.add(key, format!("{name:?} is no storage's name"));
    }
}

/// Those of pools are, too, or there is none.
pub(super) fn check_pool(key: String, name: &str, faults: &mut Faults) {
    if name.contains(char::is_whitespace) {
        faults.add(key, format!("{name:?} is no pool's name"));
    }
}

/// Addresses of one family that guests get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Addresses {
    /// By DHCP, which is also how Proxmox's IPAM hands out its own.
    Dhcp,
    /// Those of a range, by number.
    Range {
        /// The first.
        first: IpAddr,
        /// Bits of the network.
        prefix: u8,
        /// Gateway.
        gateway: Option<IpAddr>,
    },
}

impl Addresses {
    /// As Proxmox takes it: "dhcp", or the address of the guest that is `n`th of its range, with its prefix.
    pub fn at(&self, n: u32) -> String {
        match self {
            Self::Dhcp => "dhcp".to_owned(),
            Self::Range { first, prefix, .. } => {
                format!("{}/{prefix}", from_bits(*first, bits(*first) + u128::from(n)))
            }
        }
    }

    /// The gateway.
    pub fn gateway(&self) -> Option<String> {
        match self {
            Self::Range { gateway, .. } => gateway.map(|g| g.to_string()),
            Self::Dhcp => None,
        }
    }
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(a) => u32::from(a).into(),
        IpAddr::V6(a) => a.into(),
    }
}

fn from_bits(family: IpAddr, bits: u128) -> IpAddr {
    match family {
        IpAddr::V4(_) => Ipv4Addr::from(u32::try_from(bits).unwrap_or(u32::MAX)).into(),
        IpAddr::V6(_) => Ipv6Addr::from(bits).into(),
    }
}

/// What a handler's table `network` says of its guests' `net0`.
pub(super) struct Net0<'a> {
    /// The handler's table: "handlers.proxmox-lxc".
    pub(super) table: &'static str,
    /// The key that asks for all of this, if one does.
    pub(super) kind: Option<&'static str>,
    /// Why there is no DHCP, if there is none.
    pub(super) no_dhcp: Option<&'static str>,
    pub(super) bridge: &'a str,
    pub(super) vlan: Option<u16>,
    pub(super) mtu: Option<u16>,
    pub(super) rate: Option<f64>,
    /// IPv4 and IPv6: addresses and gateway.
    pub(super) addresses: [(&'a str, &'a str); 2],
}

impl Net0<'_> {
    /// Addresses of both families; `count`: how many guests there may be.
    pub(super) fn addresses(&self, count: u128) -> Result<[Option<Addresses>; 2]> {
        let [four, six] = self.families(count);
        Ok([four?, six?])
    }

    fn families(&self, count: u128) -> [Result<Option<Addresses>, Fault>; 2] {
        let [(address, gateway), (address6, gateway6)] = self.addresses;
        let (table, no_dhcp) = (self.table, self.no_dhcp);
        let four = Family { table, no_dhcp, key: "address", address, gateway_key: "gateway", gateway, width: 32 };
        let six = Family {
            key: "address6",
            address: address6,
            gateway_key: "gateway6",
            gateway: gateway6,
            width: 128,
            ..four
        };
        [four.parse(count), six.parse(count)]
    }

    pub(super) fn check(&self, count: u128, faults: &mut Faults) {
        let full = |key: &str| format!("{}.network.{key}", self.table);
        let needed = |key: &str, why: String| Fault { other: self.kind.map(full), ..Fault::new(full(key), why) };
        let word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let bridge = self.bridge;
        if bridge.is_empty() || bridge.len() > NAME_MAX || !bridge.chars().all(word) {
            faults.push(needed("bridge", format!("{bridge:?} is not the name of a bridge or vnet")));
        }
        if self.vlan.is_some_and(|v| !(1..=4094).contains(&v)) {
            faults.add(full("vlan"), "1 to 4094");
        }
        let least = if self.addresses[1].0.is_empty() { 68 } else { 1280 };
        if self.mtu.is_some_and(|m| m < least) {
            faults.add(full("mtu"), format!("at least {least}"));
        }
        if self.rate.is_some_and(|r| !(r.is_finite() && r > 0.0)) {
            faults.add(full("rate"), "more than 0, in megabytes a second");
        }
        let [four, six] = self.families(count);
        if matches!((&four, &six), (Ok(None), Ok(None))) {
            let dhcp = if self.no_dhcp.is_none() { "\"dhcp\", or " } else { "" };
            faults.push(needed("address", format!("pods need one: {dhcp}FIRST-LAST/PREFIX")));
        }
        for fault in [four, six].into_iter().filter_map(Result::err) {
            faults.push(fault);
        }
    }
}

/// The two keys of a family.
#[derive(Clone, Copy)]
struct Family<'a> {
    table: &'static str,
    no_dhcp: Option<&'static str>,
    /// Key of the addresses.
    key: &'static str,
    address: &'a str,
    gateway_key: &'static str,
    gateway: &'a str,
    /// Bits of an address.
    width: u8,
}

impl Family<'_> {
    fn is_of(&self, address: IpAddr) -> bool {
        address.is_ipv4() == (self.width == 32)
    }

    fn bad<T>(&self, key: &str, why: impl std::fmt::Display) -> Result<T, Fault> {
        Err(Fault::new(format!("{}.network.{key}", self.table), why))
    }

    /// `count`: how many guests there may be.
    fn parse(&self, count: u128) -> Result<Option<Addresses>, Fault> {
        let none = match (self.address, self.no_dhcp) {
            ("", _) => Some(None),
            ("dhcp" | "auto", Some(why)) => return self.bad(self.key, why),
            ("dhcp", None) => Some(Some(Addresses::Dhcp)),
            ("auto", None) => {
                return self
                    .bad(self.key, "addresses of router advertisements can't be had: Proxmox sets none for its CTs");
            }
            _ => None,
        };
        if let Some(found) = none {
            let why = format!("only with a range in `{}`", self.key);
            return if self.gateway.is_empty() { Ok(found) } else { self.bad(self.gateway_key, why) };
        }
        self.range(count).map(Some)
    }

    fn range(&self, count: u128) -> Result<Addresses, Fault> {
        let version = if self.width == 32 { 4 } else { 6 };
        let parts = self.address.split_once('/').and_then(|(range, prefix)| {
            let (first, last) = range.split_once('-')?;
            let (first, last) = (first.trim().parse::<IpAddr>().ok()?, last.trim().parse::<IpAddr>().ok()?);
            Some((first, last, prefix.trim().parse::<u8>().ok()?))
        });
        let Some((first, last, prefix)) = parts.filter(|(first, last, prefix)| {
            self.is_of(*first) && self.is_of(*last) && (1..=self.width).contains(prefix)
        }) else {
            let what = format!("{:?} is neither \"dhcp\" nor FIRST-LAST/PREFIX of IPv{version}", self.address);
            return self.bad(self.key, what);
        };
        let network = |a: IpAddr| bits(a).checked_shr(u32::from(self.width - prefix)).unwrap_or(0);
        let (from, to) = (bits(first), bits(last));
        if from > to || network(first) != network(last) {
            return self.bad(self.key, format!("{first} to {last} is no range within one network of {prefix} bits"));
        }
        // IPv4 has two that are nobody's, but in networks that are too small for them.
        let host = u128::MAX.checked_shr(128 - u32::from(self.width - prefix)).unwrap_or(0);
        let nobodys = |b: u128| self.width == 32 && prefix < 31 && [0, host].contains(&(b & host));
        if nobodys(from) || nobodys(to) {
            return self.bad(self.key, "the network's own address and its broadcast address are nobody's");
        }
        if to - from + 1 < count {
            let what = format!("{} addresses are too few for {count} numbers of {}.vmids", to - from + 1, self.table);
            return self.bad(self.key, what);
        }
        let gateway = match self.gateway {
            "" => None,
            text => match text.parse::<IpAddr>() {
                Ok(g) if self.is_of(g) && network(g) == network(first) && !(from..=to).contains(&bits(g)) => Some(g),
                Ok(g) if self.is_of(g) => {
                    return self.bad(
                        self.gateway_key,
                        format!("{g} is not in the network of `{}`, or in its range", self.key),
                    );
                }
                _ => return self.bad(self.gateway_key, format!("{text:?} is no IPv{version} address")),
            },
        };
        Ok(Addresses::Range { first, prefix, gateway })
    }
}
