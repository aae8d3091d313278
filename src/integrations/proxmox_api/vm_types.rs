//! Virtual machines of Proxmox as types: what a configuration holds, and what a new VM is to be like.
//!
//! Pure; `vm` and `guest` have what can be done with them.

use std::collections::BTreeMap;
use std::str::FromStr;

use super::guest_types::{GuestConfig, GuestKind, GuestNet, NewGuest, pairs};
use super::ids::Vmid;
use super::property::{Properties, PropertyError, Volume};
use super::transport::Form;

/// Network cards that QEMU has, as the API names them.
const MODELS: [&str; 14] = [
    "virtio",
    "e1000",
    "e1000-82540em",
    "e1000-82544gc",
    "e1000-82545em",
    "e1000e",
    "i82551",
    "i82557b",
    "i82559er",
    "ne2k_isa",
    "ne2k_pci",
    "pcnet",
    "rtl8139",
    "vmxnet3",
];

/// A network interface of a VM: `net0`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct VmNet {
    /// The card: "virtio".
    pub model: String,
    /// MAC address; the API chooses one.
    pub macaddr: Option<String>,
    /// Bridge or SDN vnet; without one the card is connected with nothing but the node.
    pub bridge: Option<String>,
    /// Bytes; 1: the bridge's.
    pub mtu: Option<u16>,
    /// VLAN.
    pub tag: Option<u16>,
    /// Whether Proxmox's firewall filters it.
    pub firewall: Option<bool>,
    /// Megabytes a second.
    pub rate: Option<f64>,
    /// The cable is out.
    pub link_down: Option<bool>,
    /// What else is there.
    pub other: Properties,
}

impl FromStr for VmNet {
    type Err = PropertyError;

    fn from_str(text: &str) -> Result<Self, PropertyError> {
        let mut p: Properties = text.parse()?;
        // "virtio=MAC", "virtio", or "model=virtio,macaddr=MAC".
        let named = MODELS.iter().find_map(|model| Some((*model, p.take(model)?)));
        let (model, mac) = match named {
            Some((model, mac)) => (model.to_owned(), Some(mac)),
            None => {
                let model = p.take("").or_else(|| p.take("model"));
                (model.ok_or_else(|| PropertyError::new(text, "a network without a model"))?, None)
            }
        };
        if !MODELS.contains(&model.as_str()) {
            return Err(PropertyError::new(text, format!("{model:?} is no network card ({})", MODELS.join(", "))));
        }
        Ok(Self {
            model,
            macaddr: p.take("macaddr").or(mac),
            bridge: p.take("bridge"),
            mtu: p.take_number("mtu")?,
            tag: p.take_number("tag")?,
            firewall: p.take_bool("firewall")?,
            rate: p.take_number("rate")?,
            link_down: p.take_bool("link_down")?,
            other: p,
        })
    }
}

impl GuestNet for VmNet {
    const KIND: GuestKind = GuestKind::Vm;

    fn is_volume(name: &str, n: Option<u32>) -> bool {
        n.is_some() && ["scsi", "virtio", "ide", "sata", "efidisk", "tpmstate"].contains(&name)
    }

    fn write(&self) -> Result<String, PropertyError> {
        let mut p = self.other.clone();
        p.set("model", Some(&self.model));
        p.set("macaddr", self.macaddr.as_ref());
        p.set("bridge", self.bridge.as_ref());
        p.set("mtu", self.mtu);
        p.set("tag", self.tag);
        p.set("firewall", self.firewall.map(u8::from));
        p.set("rate", self.rate);
        p.set("link_down", self.link_down.map(u8::from));
        p.write()
    }
}

/// A VM's configuration.
pub type VmConfig = GuestConfig<VmNet>;

/// What a new VM is like. What is None or empty is left to Proxmox, except that it runs Linux, has a fast SCSI controller, a
/// serial console, and is not started at boot.
#[derive(Debug, Clone, Default)]
pub struct VmSpec {
    /// What every guest has.
    pub guest: NewGuest<VmNet>,
    /// Name, as a host's.
    pub name: Option<String>,
    /// Kind of CPU: "host".
    pub cpu: Option<String>,
    /// Disks, as `scsi0` and so on. The first one is booted from.
    pub disks: Vec<Volume>,
    /// A channel for the QEMU guest agent.
    pub agent: bool,
}

impl VmSpec {
    /// The parameters of the call.
    pub fn form(&self, vmid: Vmid) -> Result<Form, PropertyError> {
        let mut form: BTreeMap<String, String> = pairs([
            ("name", self.name.clone()),
            ("cpu", self.cpu.clone()),
            ("scsihw", Some("virtio-scsi-single".into())),
            ("boot", (!self.disks.is_empty()).then(|| "order=scsi0".into())),
            ("agent", self.agent.then(|| "enabled=1".into())),
            ("serial0", Some("socket".into())),
            ("ostype", Some("l26".into())),
            ("onboot", Some("0".into())),
        ])
        .into_iter()
        .chain(self.guest.form(vmid)?)
        .collect();
        for (n, disk) in self.disks.iter().enumerate() {
            form.insert(format!("scsi{n}"), disk.write()?);
        }
        form.extend(self.guest.extra.clone());
        form.insert("vmid".into(), vmid.to_string());
        Ok(form.into_iter().collect())
    }

    /// Storage of the first disk.
    pub(super) fn storage(&self) -> &str {
        self.guest.storage(self.disks.first())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    #[test]
    fn networks() {
        for (text, mac) in [
            ("virtio=BC:24:11:00:00:01,bridge=vmbr0,firewall=1,mtu=1,queues=2", Some("BC:24:11:00:00:01")),
            (
                "model=virtio,macaddr=BC:24:11:00:00:01,bridge=vmbr0,firewall=1,mtu=1,queues=2",
                Some("BC:24:11:00:00:01"),
            ),
            ("virtio,bridge=vmbr0,firewall=1,mtu=1,queues=2", None),
        ] {
            let net: VmNet = text.parse().unwrap();
            assert_eq!((net.model.as_str(), net.macaddr.as_deref(), net.mtu), ("virtio", mac, Some(1)), "{text}");
            assert_eq!((net.bridge.as_deref(), net.other.get("queues")), (Some("vmbr0"), Some("2")), "{text}");
            assert_eq!(net.write().unwrap().parse::<VmNet>().unwrap(), net, "{text}");
        }
        for bad in ["bridge=vmbr0", "ne3000,bridge=vmbr0", "virtio,mtu=big", ""] {
            assert!(bad.parse::<VmNet>().is_err(), "{bad}");
        }
        let evil = VmNet { model: "virtio".into(), bridge: Some("vmbr0,firewall=0".into()), ..VmNet::default() };
        assert!(evil.write().is_err());
    }

    #[test]
    fn a_configuration_as_the_api_sends_it() {
        let answer = serde_json::json!({
            "digest": "abc", "name": "v1", "memory": "512", "cores": 2, "agent": "enabled=1", "boot": "order=scsi0;net0",
            "scsi0": "local:100/vm-100-disk-0.qcow2,size=8G", "ide2": "none,media=cdrom", "scsihw": "virtio-scsi-single",
            "scsi1": "tank:base-9000-disk-1/vm-100-disk-1,ro=1,serial=img", "net0": "virtio=BC:24:11:00:00:01,bridge=vmbr0",
            "tags": "k8s", "meta": "creation-qemu=10.1,ctime=1", "unused0": "local:100/vm-100-disk-1.raw",
        });
        let c = VmConfig::parse(&answer).unwrap();
        assert_eq!(
            (c.digest.as_str(), c.get("cores"), c.get("scsihw")),
            ("abc", Some("2"), Some("virtio-scsi-single"))
        );
        assert_eq!(c.volumes.keys().collect::<Vec<_>>(), ["ide2", "scsi0", "scsi1"]);
        assert_eq!((c.volumes["scsi0"].storage(), c.volumes["scsi1"].ro), (Some("local"), Some(true)));
        assert_eq!(c.volumes["scsi1"].other.get("serial"), Some("img"));
        assert!(c.tags.has("k8s") && c.nets[&0].bridge.as_deref() == Some("vmbr0"));
        let keys = serde_json::to_value(c.keys().unwrap()).unwrap();
        assert_eq!(VmConfig::parse(&keys).unwrap(), c, "what is read can be written back");
        assert!(VmConfig::parse(&Value::Null).is_err());
        assert!(VmConfig::parse(&serde_json::json!({ "name": "no digest" })).is_err());
    }

    #[test]
    fn a_new_vm() {
        let spec = VmSpec {
            name: Some("v1".into()),
            disks: vec![Volume::allocate("tank", 512)],
            agent: true,
            guest: NewGuest { extra: [("ostype".to_owned(), "other".to_owned())].into(), ..NewGuest::default() },
            ..VmSpec::default()
        };
        let form: BTreeMap<_, _> = spec.form(Vmid::new(100).unwrap()).unwrap().into_iter().collect();
        let expected = [
            ("agent", "enabled=1"),
            ("boot", "order=scsi0"),
            ("name", "v1"),
            ("onboot", "0"),
            ("ostype", "other"),
            ("scsi0", "volume=tank:0.5"),
            ("scsihw", "virtio-scsi-single"),
            ("serial0", "socket"),
            ("vmid", "100"),
        ];
        assert_eq!(form.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect::<Vec<_>>(), expected);
        assert_eq!((spec.storage(), VmSpec::default().storage()), ("tank", "local"));
        let evil = VmSpec { disks: vec![Volume { volume: "a:1,ro=1".into(), ..Volume::default() }], ..spec };
        assert!(evil.form(Vmid::new(100).unwrap()).is_err());
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "(virtio|model=e1000|net0|)[=,]?.{0,60}") {
            if let Ok(net) = text.parse::<VmNet>() {
                let _ = net.write();
            }
        }
    }
}
