//! `[handlers.proxmox-lxc]`: pods as Proxmox containers (CTs): their numbers, storages, users, and what network they have.
//!
//! Plain data; checked with the rest of the configuration, so that what can't be is refused at start by its key.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::error::Result;
use super::super::policy::Policy;
use super::Span;
use super::faults::Faults;
use super::proxmox_guests::{Addresses, Net0, Orphans, check_pool, check_storage, parse_range};

const TABLE: &str = "handlers.proxmox-lxc";

/// Handler `proxmox-lxc`. Uses `[proxmox]`, the OCI runtime of `crun`, and the programs of `lxc`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ProxmoxLxcHandler {
    /// Whether there is such a handler.
    pub enabled: bool,
    /// What a pod's CT is. "pod": what its containers are in. "native": its one container itself.
    pub profile: CtProfile,
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

impl Default for ProxmoxLxcHandler {
    fn default() -> Self {
        Self {
            enabled: false,
            profile: CtProfile::default(),
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
        Ok(parse_range(TABLE, &self.vmids)?)
    }

    pub(super) fn check(&self, faults: &mut Faults) {
        if !self.enabled {
            return;
        }
        let key = |key: &str| format!("{TABLE}.{key}");
        if self.orphans_after.get() < Duration::from_secs(1) {
            faults.add(key("orphans_after"), "at least 1s");
        }
        check_storage(key("storage"), &self.storage, faults);
        check_storage(key("template_storage"), &self.template_storage, faults);
        check_pool(key("pool"), &self.pool, faults);
        faults.range(&key("first_id"), self.first_id, 1..=u32::MAX);
        faults.range(&key("ids"), self.ids, 1..=u32::MAX);
        match parse_range(TABLE, &self.vmids) {
            Ok((first, last)) => self.network.check(u128::from(last - first) + 1, faults),
            Err(fault) => faults.push(fault),
        }
    }
}

/// What a pod's CT is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CtProfile {
    /// What its containers are in.
    #[default]
    Pod,
    /// The pod's one container: the CT's init becomes the image's program.
    Native,
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

impl CtNetwork {
    fn net0(&self) -> Net0<'_> {
        Net0 {
            table: TABLE,
            kind: Some("kind"),
            no_dhcp: None,
            bridge: &self.bridge,
            vlan: self.vlan,
            mtu: self.mtu,
            rate: self.rate,
            addresses: [(&self.address, &self.gateway), (&self.address6, &self.gateway6)],
        }
    }

    /// IPv4 and IPv6 addresses of the CTs; `count`: how many there may be.
    pub fn addresses(&self, count: u128) -> Result<[Option<Addresses>; 2]> {
        self.net0().addresses(count)
    }

    fn check(&self, count: u128, faults: &mut Faults) {
        if self.kind == NetworkKind::Pve {
            return self.net0().check(count, faults);
        }
        let full = |key: &str| format!("{TABLE}.network.{key}");
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
            faults.with(full(key), &full("kind"), "only with kind = \"pve\"");
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
            ("profile = \"oci\"", "", "profile"),
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
