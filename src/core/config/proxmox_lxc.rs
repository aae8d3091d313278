//! `[handlers.proxmox-lxc]`: pods as Proxmox containers (CTs): their numbers, storages, users, and what network they have.
//!
//! Plain data; checked with the rest of the configuration, so that what can't be is refused at start by its key.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::error::Result;
use super::super::policy::Policy;
use super::Span;
use super::faults::{Fault, Faults};

/// Longest name of an interface of the kernel's (IFNAMSIZ without its end).
pub(super) const NAME_MAX: usize = 15;

/// Handler `proxmox-lxc`. Uses `[proxmox]`, the OCI runtime of `crun`, and the programs of `lxc`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ProxmoxLxcHandler {
    /// Whether there is such a handler.
    pub enabled: bool,
    /// Numbers that CTs get: `FIRST-LAST`. Nobody else should use them.
    pub vmids: String,
    /// Storage of the CTs' root file systems.
    pub storage: String,
    /// Storage of the template that they are made of (with content `vztmpl`).
    pub template_storage: String,
    /// Pool that they are put into; "": none.
    pub pool: String,
    /// First id on the node of an unprivileged CT's users and groups, as /etc/subuid has it.
    pub first_id: u32,
    /// How many there are.
    pub ids: u32,
    /// What becomes of CTs of this installation that belong to no pod.
    pub orphans: Orphans,
    /// How often they are looked for, and how long one has to be nobody's before it is removed.
    pub orphans_after: Span,
    /// The CTs' network.
    pub network: CtNetwork,
    /// What its pods have to be like.
    pub policy: Policy,
}

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

impl Default for ProxmoxLxcHandler {
    fn default() -> Self {
        Self {
            enabled: false,
            vmids: "900000-909999".into(),
            storage: "local-zfs".into(),
            template_storage: "local".into(),
            pool: String::new(),
            first_id: 100_000,
            ids: 65_536,
            orphans: Orphans::default(),
            orphans_after: Span::from(Duration::from_secs(60)),
            network: CtNetwork::default(),
            policy: Policy::default(),
        }
    }
}

impl ProxmoxLxcHandler {
    /// The numbers that CTs get, first and last.
    pub fn vmids(&self) -> Result<(u32, u32)> {
        Ok(self.range()?)
    }

    fn range(&self) -> Result<(u32, u32), Fault> {
        parse_range("handlers.proxmox-lxc", &self.vmids)
    }

    pub(super) fn check(&self, faults: &mut Faults) {
        if !self.enabled {
            return;
        }
        if self.orphans_after.get() < Duration::from_secs(1) {
            faults.add("handlers.proxmox-lxc.orphans_after", "at least 1s");
        }
        let words = [("storage", &self.storage), ("template_storage", &self.template_storage)];
        for (key, word) in words {
            if word.is_empty() || word.contains(char::is_whitespace) {
                faults.add(format!("handlers.proxmox-lxc.{key}"), format!("{word:?} is no storage's name"));
            }
        }
        if self.pool.contains(char::is_whitespace) {
            faults.add("handlers.proxmox-lxc.pool", format!("{:?} is no pool's name", self.pool));
        }
        faults.range("handlers.proxmox-lxc.first_id", self.first_id, 1..=u32::MAX);
        faults.range("handlers.proxmox-lxc.ids", self.ids, 1..=u32::MAX);
        match self.range() {
            Ok((first, last)) => self.network.check(u128::from(last - first) + 1, faults),
            Err(fault) => faults.push(fault),
        }
    }
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

/// Who connects pods.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum NetworkKind {
    /// The node's CNI plugins, in the CT's network namespace.
    #[default]
    Cni,
    /// Proxmox: the CT's `net0` on a bridge or vnet.
    Pve,
}

/// `[handlers.proxmox-lxc.network]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CtNetwork {
    /// Who connects pods. What follows is for "pve".
    pub kind: NetworkKind,
    /// Bridge of the node, or vnet of its SDN.
    pub bridge: String,
    /// VLAN on it, 1 to 4094; not set: untagged.
    pub vlan: Option<u16>,
    /// Bytes of a packet, 68 to 65535; not set: the bridge's.
    pub mtu: Option<u16>,
    /// Whether Proxmox's firewall filters the CTs; not set: as Proxmox does without being told.
    pub firewall: Option<bool>,
    /// Megabytes a second, each way; not set: no limit.
    pub rate: Option<f64>,
    /// IPv4: "dhcp", or "FIRST-LAST/PREFIX", of which each CT has the one that its number has in `vmids`; "": none.
    pub address: String,
    /// IPv4 gateway, with a range.
    pub gateway: String,
    /// IPv6, as `address`.
    pub address6: String,
    /// IPv6 gateway, with a range.
    pub gateway6: String,
}

/// Addresses of one family that CTs get.
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
    /// As Proxmox takes it: "dhcp", or the address of the CT that is `n`th of its range, with its prefix.
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

fn full(key: &str) -> String {
    format!("handlers.proxmox-lxc.network.{key}")
}

/// The two keys of a family, in a handler's table `network`.
pub(super) struct Family<'a> {
    /// The handler's table: "handlers.proxmox-lxc".
    pub(super) table: &'static str,
    /// Key of the addresses.
    pub(super) key: &'static str,
    pub(super) address: &'a str,
    pub(super) gateway_key: &'static str,
    pub(super) gateway: &'a str,
    /// Bits of an address.
    pub(super) width: u8,
}

impl Family<'_> {
    fn is_of(&self, address: IpAddr) -> bool {
        address.is_ipv4() == (self.width == 32)
    }

    fn bad<T>(&self, key: &str, why: impl std::fmt::Display) -> Result<T, Fault> {
        Err(Fault::new(format!("{}.network.{key}", self.table), why))
    }

    /// `count`: how many CTs there may be.
    pub(super) fn parse(&self, count: u128) -> Result<Option<Addresses>, Fault> {
        let none = match self.address {
            "" => Some(None),
            "dhcp" => Some(Some(Addresses::Dhcp)),
            "auto" => {
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

impl CtNetwork {
    fn families(&self) -> [Family<'_>; 2] {
        let table = "handlers.proxmox-lxc";
        let four = Family {
            table,
            key: "address",
            address: &self.address,
            gateway_key: "gateway",
            gateway: &self.gateway,
            width: 32,
        };
        let six = Family {
            table,
            key: "address6",
            address: &self.address6,
            gateway_key: "gateway6",
            gateway: &self.gateway6,
            width: 128,
        };
        [four, six]
    }

    /// IPv4 and IPv6 addresses of the CTs; `count`: how many there may be.
    pub fn addresses(&self, count: u128) -> Result<[Option<Addresses>; 2]> {
        let [four, six] = self.families();
        Ok([four.parse(count)?, six.parse(count)?])
    }

    fn check(&self, count: u128, faults: &mut Faults) {
        let kind = full("kind");
        if self.kind == NetworkKind::Cni {
            let set = [
                ("bridge", !self.bridge.is_empty()),
                ("vlan", self.vlan.is_some()),
                ("mtu", self.mtu.is_some()),
                ("firewall", self.firewall.is_some()),
                ("rate", self.rate.is_some()),
                ("address", !self.address.is_empty()),
                ("gateway", !self.gateway.is_empty()),
                ("address6", !self.address6.is_empty()),
                ("gateway6", !self.gateway6.is_empty()),
            ];
            for (key, _) in set.into_iter().filter(|(_, set)| *set) {
                faults.with(full(key), &kind, "only with kind = \"pve\"");
            }
            return;
        }
        let word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if self.bridge.is_empty() || self.bridge.len() > NAME_MAX || !self.bridge.chars().all(word) {
            faults.with(full("bridge"), &kind, format!("{:?} is not the name of a bridge or vnet", self.bridge));
        }
        if self.vlan.is_some_and(|v| !(1..=4094).contains(&v)) {
            faults.add(full("vlan"), "1 to 4094");
        }
        let least = if self.address6.is_empty() { 68 } else { 1280 };
        if self.mtu.is_some_and(|m| m < least) {
            faults.add(full("mtu"), format!("at least {least}"));
        }
        if self.rate.is_some_and(|r| !(r.is_finite() && r > 0.0)) {
            faults.add(full("rate"), "more than 0, in megabytes a second");
        }
        let [four, six] = self.families().map(|family| family.parse(count));
        if matches!((&four, &six), (Ok(None), Ok(None))) {
            faults.with(full("address"), &kind, "pods need one: \"dhcp\", or FIRST-LAST/PREFIX");
        }
        for fault in [four, six].into_iter().filter_map(Result::err) {
            faults.push(fault);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Config;
    use super::*;

    fn parse(handler: &str, network: &str) -> Result<ProxmoxLxcHandler> {
        let text = format!(
            "[proxmox]\nendpoints = [\"https://127.0.0.1:8006\"]\ntoken_id = \"lxcri@pve!node1\"\n\
             [handlers.proxmox-lxc]\nenabled = true\n{handler}\n[handlers.proxmox-lxc.network]\n{network}\n"
        );
        Config::parse(&text, "c.toml").map(|c| c.handlers.proxmox_lxc)
    }

    const BRIDGE: &str = "kind = \"pve\"\nbridge = \"vmbr0\"\n";

    #[test]
    fn each_number_has_an_address() {
        let network = format!(
            "{BRIDGE}address = \"10.0.5.10-10.0.6.9/22\"\ngateway = \"10.0.4.1\"\naddress6 = \"fd00::1:0-fd00::1:ff/64\""
        );
        let handler = parse("vmids = \"900000-900255\"", &network).expect("fits");
        let [Some(four), Some(six)] = handler.network.addresses(256).expect("addresses") else { panic!("both") };
        assert_eq!((four.at(0), four.at(255)), ("10.0.5.10/22".into(), "10.0.6.9/22".into()));
        assert_eq!(
            (six.at(255), six.gateway(), four.gateway()),
            ("fd00::1:ff/64".into(), None, Some("10.0.4.1".into()))
        );
        let dhcp = parse("", &format!("{BRIDGE}address = \"dhcp\"")).expect("dhcp");
        assert_eq!(dhcp.network.addresses(1).expect("dhcp"), [Some(Addresses::Dhcp), None]);
        let defaults = parse("", "").expect("defaults");
        assert_eq!(
            (defaults.orphans, defaults.network.kind, defaults.vmids().expect("range")),
            (Orphans::Report, NetworkKind::Cni, (900_000, 909_999))
        );
    }

    #[test]
    fn refusals_name_the_key() {
        let small = "vmids = \"900000-900001\"";
        let range = "address = \"10.0.5.10-10.0.5.20/24\"";
        for (handler, network, key) in [
            ("vmids = \"10-20\"", "", "handlers.proxmox-lxc.vmids"),
            ("vmids = \"900001-900000\"", "", "handlers.proxmox-lxc.vmids"),
            ("orphans_after = \"10ms\"", "", "handlers.proxmox-lxc.orphans_after"),
            ("orphans = \"keep\"", "", "orphans"),
            ("", "kind = \"ovs\"", "kind"),
            ("", "bridge = \"vmbr0\"", "network.bridge: only with"),
            ("", "gateway6 = \"fd00::1\"", "network.gateway6: only with"),
            ("", "kind = \"pve\"\naddress = \"dhcp\"", "network.bridge"),
            ("", "kind = \"pve\"\nbridge = \"a/b\"\naddress = \"dhcp\"", "network.bridge"),
            ("", BRIDGE, "network.address: pods need one"),
            ("", &format!("{BRIDGE}address = \"dhcp\"\nvlan = 4095"), "network.vlan"),
            ("", &format!("{BRIDGE}address = \"dhcp\"\nmtu = 60"), "network.mtu"),
            ("", &format!("{BRIDGE}address6 = \"dhcp\"\nmtu = 1279"), "network.mtu"),
            ("", &format!("{BRIDGE}address = \"dhcp\"\nrate = 0.0"), "network.rate"),
            ("", &format!("{BRIDGE}address = \"dhcp\"\ngateway = \"10.0.0.1\""), "network.gateway: only with a range"),
            ("", &format!("{BRIDGE}address = \"dhcp\"\naddress6 = \"auto\""), "network.address6: addresses of router"),
            ("", &format!("{BRIDGE}{range}"), "network.address: 11 addresses are too few for 10000"),
            (small, &format!("{BRIDGE}address = \"10.0.5.10/24\""), "network.address"),
            (small, &format!("{BRIDGE}address = \"fd00::1-fd00::9/64\""), "network.address"),
            (small, &format!("{BRIDGE}address = \"10.0.5.10-10.0.6.20/24\""), "network.address"),
            (small, &format!("{BRIDGE}address = \"10.0.5.0-10.0.5.20/24\""), "network.address: the network's own"),
            (small, &format!("{BRIDGE}address = \"10.0.5.10-10.0.5.255/24\""), "network.address: the network's own"),
            (small, &format!("{BRIDGE}{range}\ngateway = \"10.0.6.1\""), "network.gateway"),
            (small, &format!("{BRIDGE}{range}\ngateway = \"10.0.5.12\""), "network.gateway"),
            (small, &format!("{BRIDGE}{range}\ngateway = \"fd00::1\""), "network.gateway"),
            (small, &format!("{BRIDGE}{range}\ndns = \"x\""), "dns"),
        ] {
            let e = parse(handler, network).expect_err(network).chain();
            assert!(e.contains(key), "{handler} {network}: {e}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(address in ".{0,40}", gateway in "[0-9a-f:.]{0,20}", prefix in 0u8..200) {
            for address in [address, format!("0.0.0.0-255.255.255.255/{prefix}"), format!("::-ffff::/{prefix}")] {
                let network = CtNetwork { address: address.clone(), address6: address, gateway: gateway.clone(), ..CtNetwork::default() };
                let _ = network.addresses(1);
            }
        }
    }
}
