//! What a pod's VM is to be like, and what is on the small disk with its configuration, as pure functions of the pod.

use std::fmt::Write as _;

use zeroize::Zeroizing;

use crate::backends::proxmox::Unit;
use crate::backends::proxmox::plan::{cpus, host_name, tags, words};
use crate::core::config::Addresses;
use crate::core::error::Result;
use crate::core::spec::{Resources, SandboxConfig};
use crate::integrations::proxmox_api::{CloneSpec, GuestChange, GuestKind, GuestNet, Identity, VmNet, Volume};

use super::ProxmoxVmConfig;

/// What a pod is in Proxmox.
pub const VM: Unit = Unit {
    kind: GuestKind::Vm,
    handler: "proxmox-vm",
    word: "VM",
    note: "proxmox-vm",
    taken: "proxmox-vm-taken",
    tool: "qm",
    dead_locks: ["clone", "create"],
    orphans: "handlers.proxmox-vm.orphans",
};
/// Serial number of the disk with the configuration, which the guest's init looks for.
const CONFIG_SERIAL: &str = "lxcri-config";
/// Its key. The template's disk is scsi0.
pub const CONFIG_DISK: &str = "scsi1";
/// MiB of it: what every kind of storage can make.
const CONFIG_MIB: u64 = 4;
/// Slots of images' disks.
pub const IMAGE_SLOTS: std::ops::RangeInclusive<u32> = 2..=30;

/// Size of a VM as Proxmox has it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// MiB.
    pub memory: u64,
    /// CPUs that it sees.
    pub cores: u32,
    /// CPU time; 0: no limit.
    pub cpulimit: f64,
}

/// The pod's limits and what the guest itself needs; the configuration's where it has none.
pub fn limits(resources: &Resources, overhead: &Resources, config: &ProxmoxVmConfig) -> Limits {
    let memory = match resources.memory_limit {
        limit if limit > 0 => {
            let mib = |bytes: i64| bytes.max(0).unsigned_abs().div_ceil(1 << 20);
            mib(limit).saturating_add(mib(overhead.memory_limit).max(config.guest_memory))
        }
        _ => config.memory,
    };
    match cpus(resources, overhead) {
        0.0 => Limits { memory, cores: config.cores, cpulimit: 0.0 },
        cpulimit => Limits { memory, cores: (cpulimit.ceil() as u32).max(1), cpulimit },
    }
}

/// The clone of the template.
pub fn clone(pod: &SandboxConfig, identity: &Identity, pool: &str) -> Result<CloneSpec> {
    Ok(CloneSpec {
        name: Some(host_name(pod)),
        description: Some(identity.notes(&words(pod))?),
        pool: Some(pool.to_owned()).filter(|p| !p.is_empty()),
        ..CloneSpec::default()
    })
}

/// What is changed of the clone before its first start.
pub fn change(pod: &SandboxConfig, limits: Limits, config: &ProxmoxVmConfig) -> Result<GuestChange> {
    let network = &config.network;
    let net = VmNet {
        model: "virtio".into(),
        bridge: Some(network.bridge.clone()),
        // What the bridge has.
        mtu: Some(network.mtu.unwrap_or(1)),
        tag: network.vlan,
        firewall: network.firewall,
        rate: network.rate,
        ..VmNet::default()
    };
    let disk = Volume {
        ro: Some(true),
        other: format!("backup=0,format=raw,serial={CONFIG_SERIAL}").parse().map_err(property)?,
        ..Volume::allocate(&config.storage, CONFIG_MIB)
    };
    let set = [
        ("memory", limits.memory.to_string()),
        ("cores", limits.cores.to_string()),
        ("cpulimit", limits.cpulimit.to_string()),
        ("net0", net.write().map_err(property)?),
        (CONFIG_DISK, disk.write().map_err(property)?),
        ("tags", tags(pod).to_string()),
        ("onboot", "0".to_owned()),
    ];
    Ok(GuestChange { set: set.map(|(k, v)| (k.to_owned(), v)).into(), ..GuestChange::default() })
}

pub fn property(e: crate::integrations::proxmox_api::PropertyError) -> crate::core::error::Error {
    crate::core::error::Error::internal(e.to_string())
}

/// The text of the configuration's disk; see `guest-agent/src/config.rs`.
pub fn text(secret: &str, port: u16, addresses: &[Option<Addresses>; 2], n: u32) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::with_capacity(512));
    let all = if addresses[0].is_some() { "0.0.0.0" } else { "[::]" };
    let _ = writeln!(text, "lxcri-guest 1\nsecret={secret}\nlisten={all}:{port}");
    for addresses in addresses.iter().flatten() {
        let _ = writeln!(text, "address={}", addresses.at(n));
        if let Some(gateway) = addresses.gateway() {
            let _ = writeln!(text, "gateway={gateway}");
        }
    }
    text
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use super::*;
    use crate::core::config::{Orphans, VmNetwork};
    use crate::integrations::proxmox_api::Vmid;

    /// Settings with nothing special in them.
    pub fn config() -> ProxmoxVmConfig {
        let vmid = |n| Vmid::new(n).expect("a number");
        let network = VmNetwork {
            bridge: "vmbr0".into(),
            vlan: Some(7),
            address: "10.0.5.10-10.0.5.19/24".into(),
            gateway: "10.0.5.1".into(),
            address6: "fd00::10-fd00::19/64".into(),
            ..VmNetwork::default()
        };
        ProxmoxVmConfig {
            node: "pve1".into(),
            installation: "i".into(),
            vmids: (vmid(910_000), vmid(910_009)),
            template: vmid(9000),
            storage: "local".into(),
            pool: "k8s".into(),
            memory: 512,
            guest_memory: 128,
            relay: "/relay".into(),
            cores: 2,
            port: 10750,
            start_timeout: Duration::from_secs(60),
            kubelet_root: "/var/lib/kubelet".into(),
            orphans: Orphans::Report,
            orphans_after: Duration::from_secs(60),
            images_after: Duration::from_secs(60),
            addresses: network.addresses(10).expect("addresses"),
            network,
        }
    }

    #[test]
    fn a_pods_limits_are_the_vms_and_the_guest_has_its_own() {
        let (none, config) = (Resources::default(), config());
        assert_eq!(limits(&none, &none, &config), Limits { memory: 512, cores: 2, cpulimit: 0.0 });
        let asked = Resources { memory_limit: (64 << 20) + 1, cpu_quota: 150_001, cpu_period: 100_000, ..none.clone() };
        let over = |mib: i64| Resources { memory_limit: mib << 20, ..none.clone() };
        assert_eq!(limits(&asked, &over(10), &config), Limits { memory: 65 + 128, cores: 2, cpulimit: 1.51 });
        assert_eq!(limits(&asked, &over(160), &config).memory, 65 + 160);
    }

    #[test]
    fn what_is_asked_of_proxmox() {
        let pod = crate::core::records::tests::pod("Web_1").config;
        let identity = Identity { installation: "i".into(), pod: "p".into() };
        let spec = clone(&pod, &identity, "k8s").expect("a clone");
        assert_eq!((spec.name.as_deref(), spec.full, spec.pool.as_deref()), (Some("web-1"), false, Some("k8s")));
        assert_eq!(Identity::find(spec.description.as_deref().expect("notes")), Some(identity));
        let set = change(&pod, Limits { memory: 512, cores: 2, cpulimit: 0.0 }, &config()).expect("a change").set;
        assert_eq!(set["net0"], "bridge=vmbr0,model=virtio,mtu=1,tag=7");
        assert_eq!(set["scsi1"], "backup=0,format=raw,ro=1,serial=lxcri-config,volume=local:0.00390625");
    }

    #[test]
    fn the_guest_is_told_its_secret_and_its_addresses() {
        let config = config();
        let text = text(&"ab".repeat(32), 10750, &config.addresses, 3);
        let expected = format!(
            "lxcri-guest 1\nsecret={}\nlisten=0.0.0.0:10750\naddress=10.0.5.13/24\ngateway=10.0.5.1\naddress=fd00::13/64\n",
            "ab".repeat(32)
        );
        assert_eq!(*text, expected);
    }
}
