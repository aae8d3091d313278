//! `[handlers.proxmox-vm]`: pods as Proxmox virtual machines: their template, numbers, storage, size, and what network they have.
//!
//! Plain data; checked with the rest of the configuration, so that what can't be is refused at start by its key.

use std::time::Duration;

use camino::Utf8PathBuf;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::error::Result;
use super::super::policy::Policy;
use super::Span;
use super::faults::Faults;
use super::proxmox_guests::{Addresses, Net0, Orphans, check_pool, check_storage, parse_range};

const TABLE: &str = "handlers.proxmox-vm";
/// Least memory of a guest, in MiB: Debian's kernel and the agent.
const MEMORY_MIN: u64 = 96;

/// Handler `proxmox-vm`. Uses `[proxmox]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ProxmoxVmHandler {
    /// Whether there is such a handler.
    pub enabled: bool,
    /// Number of the template that pods' VMs are linked clones of; its disk is made by deploy/proxmox/vm-template.
    pub template: u32,
    /// Numbers that VMs get: `FIRST-LAST`; pods' from the first on, images' from the last on. Nobody else should use them.
    pub vmids: String,
    /// Storage of images' disks and of the disks with pods' configuration, which this node has to have as files or block devices.
    pub storage: String,
    /// Pool that they are put into; "": none.
    pub pool: String,
    /// MiB of a VM whose pod has no memory limit.
    pub memory: u64,
    /// MiB that a VM has at least beyond its pod's memory limit, for its kernel and the agent; a larger overhead of the pod counts in its
    /// place.
    pub guest_memory: u64,
    /// CPUs that a VM sees whose pod has no CPU limit.
    pub cores: u32,
    /// Port of the agent in the VM.
    pub port: u16,
    /// How long a VM may take from its start until its agent answers.
    pub start_timeout: Span,
    /// The kubelet's folder, of whose pods' volumes a guest gets copies.
    #[schemars(with = "String")]
    pub kubelet_root: Utf8PathBuf,
    /// What becomes of VMs of this installation that belong to no pod.
    pub orphans: Orphans,
    /// How often they are looked for, and how long one has to be nobody's before it is removed.
    pub orphans_after: Span,
    /// How long an image's disk is kept that no pod uses.
    pub images_after: Span,
    /// The relay's program; not set: beside ours, else /usr/libexec/proxmox-lxcri/.
    #[schemars(with = "Option<String>")]
    pub relay_path: Option<Utf8PathBuf>,
    /// The VMs' network.
    pub network: VmNetwork,
    /// What its pods have to be like.
    pub policy: Policy,
}

impl Default for ProxmoxVmHandler {
    fn default() -> Self {
        Self {
            enabled: false,
            template: 0,
            vmids: "910000-910199".into(),
            storage: "local-zfs".into(),
            pool: String::new(),
            memory: 512,
            guest_memory: 128,
            cores: 1,
            port: 10750,
            start_timeout: Span::from(Duration::from_secs(120)),
            kubelet_root: "/var/lib/kubelet".into(),
            orphans: Orphans::default(),
            orphans_after: Span::from(Duration::from_secs(60)),
            images_after: Span::from(Duration::from_secs(24 * 3600)),
            relay_path: None,
            network: VmNetwork::default(),
            policy: Policy::default(),
        }
    }
}

impl ProxmoxVmHandler {
    /// The numbers that VMs get, first and last.
    pub fn vmids(&self) -> Result<(u32, u32)> {
        Ok(parse_range(TABLE, &self.vmids)?)
    }

    pub(super) fn check(&self, faults: &mut Faults) {
        if !self.enabled {
            return;
        }
        let key = |key: &str| format!("{TABLE}.{key}");
        if !(100..=999_999_999).contains(&self.template) {
            faults.add(key("template"), "the number of a template is needed, 100 to 999999999 (docs/proxmox-vm.md)");
        }
        for (name, span) in [
            ("start_timeout", self.start_timeout),
            ("orphans_after", self.orphans_after),
            ("images_after", self.images_after),
        ] {
            if span.get() < Duration::from_secs(1) {
                faults.add(key(name), "at least 1s");
            }
        }
        check_storage(key("storage"), &self.storage, faults);
        check_pool(key("pool"), &self.pool, faults);
        faults.range(&key("memory"), self.memory, MEMORY_MIN..=1 << 24);
        faults.range(&key("guest_memory"), self.guest_memory, MEMORY_MIN..=1 << 20);
        faults.range(&key("cores"), self.cores, 1..=8192);
        faults.range(&key("port"), self.port, 1..=u16::MAX);
        faults.absolute(&key("kubelet_root"), [&self.kubelet_root]);
        faults.absolute(&key("relay_path"), &self.relay_path);
        match parse_range(TABLE, &self.vmids) {
            Ok((first, last)) if (first..=last).contains(&self.template) => {
                faults.with(key("template"), &key("vmids"), "the template's number can't be one that VMs get");
            }
            Ok((first, last)) => self.network.net0().check(u128::from(last - first) + 1, faults),
            Err(fault) => faults.push(fault),
        }
    }
}

/// `[handlers.proxmox-vm.network]`: the VMs' `net0`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct VmNetwork {
    /// Bridge of the node, or vnet of its SDN, on which the node itself has an address.
    pub bridge: String,
    /// VLAN on it, 1 to 4094; not set: untagged.
    pub vlan: Option<u16>,
    /// Bytes of a packet, 68 to 65535; not set: the bridge's.
    pub mtu: Option<u16>,
    /// Whether Proxmox's firewall filters the VMs; not set: as Proxmox does without being told.
    pub firewall: Option<bool>,
    /// Megabytes a second, each way; not set: no limit.
    pub rate: Option<f64>,
    /// IPv4: "FIRST-LAST/PREFIX", of which each VM has the one that its number has in `vmids`; "": none.
    pub address: String,
    /// IPv4 gateway.
    pub gateway: String,
    /// IPv6, as `address`.
    pub address6: String,
    /// IPv6 gateway.
    pub gateway6: String,
}

impl VmNetwork {
    fn net0(&self) -> Net0<'_> {
        Net0 {
            table: TABLE,
            kind: None,
            no_dhcp: Some("the agent in a VM asks nobody for an address: FIRST-LAST/PREFIX is needed"),
            bridge: &self.bridge,
            vlan: self.vlan,
            mtu: self.mtu,
            rate: self.rate,
            addresses: [(&self.address, &self.gateway), (&self.address6, &self.gateway6)],
        }
    }

    /// IPv4 and IPv6 addresses of the VMs; `count`: how many there may be.
    pub fn addresses(&self, count: u128) -> Result<[Option<Addresses>; 2]> {
        self.net0().addresses(count)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Config;
    use super::*;

    fn parse(handler: &str, network: &str) -> Result<ProxmoxVmHandler> {
        let text = format!(
            "[proxmox]\nendpoints = [\"https://127.0.0.1:8006\"]\ntoken_id = \"lxcri@pve!node1\"\n\
             [handlers.proxmox-vm]\nenabled = true\n{handler}\n[handlers.proxmox-vm.network]\n{network}\n"
        );
        Config::parse(&text, "c.toml").map(|c| c.handlers.proxmox_vm)
    }

    const HANDLER: &str = "template = 9000\nvmids = \"910000-910009\"\n";
    const NETWORK: &str = "bridge = \"vmbr0\"\naddress = \"10.0.5.10-10.0.5.19/24\"\ngateway = \"10.0.5.1\"\n";

    #[test]
    fn each_number_has_an_address() {
        let handler = parse(HANDLER, NETWORK).expect("fits");
        let [Some(four), None] = handler.network.addresses(10).expect("addresses") else { panic!("IPv4 alone") };
        assert_eq!((four.at(9), four.gateway()), ("10.0.5.19/24".into(), Some("10.0.5.1".into())));
        assert_eq!((handler.vmids().expect("range"), handler.guest_memory), ((910_000, 910_009), 128));
    }

    #[test]
    fn refusals_name_the_key() {
        for (handler, network, key) in [
            ("", NETWORK, "handlers.proxmox-vm.template"),
            ("template = 910003\nvmids = \"910000-910009\"", NETWORK, "handlers.proxmox-vm.template: the template's"),
            ("template = 9000\nvmids = \"9\"", NETWORK, "handlers.proxmox-vm.vmids"),
            (&format!("{HANDLER}storage = \"\""), NETWORK, "handlers.proxmox-vm.storage"),
            (&format!("{HANDLER}memory = 16"), NETWORK, "handlers.proxmox-vm.memory"),
            (&format!("{HANDLER}guest_memory = 16"), NETWORK, "handlers.proxmox-vm.guest_memory"),
            (&format!("{HANDLER}cores = 0"), NETWORK, "handlers.proxmox-vm.cores"),
            (&format!("{HANDLER}port = 0"), NETWORK, "handlers.proxmox-vm.port"),
            (&format!("{HANDLER}start_timeout = \"10ms\""), NETWORK, "handlers.proxmox-vm.start_timeout"),
            (&format!("{HANDLER}kubelet_root = \"kubelet\""), NETWORK, "handlers.proxmox-vm.kubelet_root"),
            (HANDLER, "bridge = \"vmbr0\"", "network.address: pods need one"),
            (HANDLER, "address = \"10.0.5.10-10.0.5.19/24\"", "network.bridge"),
            (HANDLER, "bridge = \"vmbr0\"\naddress = \"dhcp\"", "network.address: the agent in a VM asks nobody"),
            (
                HANDLER,
                "bridge = \"vmbr0\"\naddress = \"10.0.5.10-10.0.5.18/24\"",
                "handlers.proxmox-vm.network.address: 9 addresses are too few for 10 numbers of handlers.proxmox-vm.vmids",
            ),
            (HANDLER, &format!("{NETWORK}kind = \"pve\""), "kind"),
            (HANDLER, &format!("{NETWORK}vlan = 4095"), "network.vlan"),
        ] {
            let e = parse(handler, network).expect_err(network).chain();
            assert!(e.contains(key), "{handler} {network}: {e}");
        }
    }
}
