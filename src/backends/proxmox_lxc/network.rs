//! Network `pve`: a CT's `net0` on a bridge of the node or a vnet of its SDN, with the address that the configuration says. Proxmox
//! connects it when it starts the CT and sets the address from the node (`host-managed`), since a pod's init does not.
//!
//! [`CtNets`] is pure. [`CtNetwork`] is the port for it: it reads what the pod's network namespace has got. Nothing is made here and
//! nothing is left behind: what there is goes with the CT.

use std::net::IpAddr;
use std::sync::Arc;

use async_trait::async_trait;

use super::plan::{CT, check_release};
use crate::core::config::{Addresses, CtNetwork as Settings};
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::PodId;
use crate::core::ports::{NetworkNotReady, NetworkRequest, NetworkResult, PodNetwork};
use crate::core::spec::SandboxConfig;
use crate::integrations::netns;
use crate::integrations::proxmox_api::{Net, Version};

/// The pod's interface, the name that the kubelet and its tools look for.
const INTERFACE: &str = "eth0";

/// What CTs are connected with, as configured.
#[derive(Debug, Clone)]
pub struct CtNets {
    /// `[handlers.proxmox-lxc.network]`, of kind "pve".
    pub settings: Settings,
    /// IPv4 and IPv6 addresses.
    pub addresses: [Option<Addresses>; 2],
}

impl CtNets {
    /// The networks of the CT that is `n`th of its range of numbers.
    pub(super) fn of(&self, n: u32) -> Vec<Net> {
        let [four, six] = &self.addresses;
        let s = &self.settings;
        vec![Net {
            name: INTERFACE.to_owned(),
            bridge: Some(s.bridge.clone()),
            ip: four.map(|a| a.at(n)),
            gw: four.and_then(|a| a.gateway()),
            ip6: six.map(|a| a.at(n)),
            gw6: six.and_then(|a| a.gateway()),
            mtu: s.mtu,
            tag: s.vlan,
            firewall: s.firewall,
            rate: s.rate,
            host_managed: Some(true),
            ..Net::default()
        }]
    }

    /// Refuses what pods can't have on such a network.
    pub(super) fn check(pod: &SandboxConfig) -> Result<()> {
        let m = &pod.metadata;
        let named =
            |what: String| Err(Error::new(Kind::Unimplemented, format!("pod {}/{}: {what}", m.namespace, m.name)));
        if let Some(port) = pod.port_mappings.iter().find(|p| p.host_port != 0) {
            return named(format!(
                "host port {} can't be had: the pod is on a network of Proxmox (handlers.proxmox-lxc.network), where it has an address \
                 of its own",
                port.host_port
            ));
        }
        let limits = ["kubernetes.io/ingress-bandwidth", "kubernetes.io/egress-bandwidth"];
        if let Some(key) = limits.into_iter().find(|key| pod.annotations.contains_key(*key)) {
            return named(format!(
                "annotation {key}: on networks of Proxmox handlers.proxmox-lxc.network.rate limits all pods"
            ));
        }
        Ok(())
    }

    /// Whether a release of Proxmox has it.
    pub(super) fn check_release(version: &Version) -> Result<()> {
        check_release(version, "network.kind \"pve\"", "the node sets CTs' addresses")
    }
}

/// The port: pods are connected when their CTs are started, and disconnected with them. Those of an earlier configuration are still
/// the CNI plugins' to disconnect.
pub struct CtNetwork {
    bridge: String,
    wants: [bool; 2],
    earlier: Arc<dyn PodNetwork>,
}

impl CtNetwork {
    /// For what `nets` says; `earlier`: who has connected pods before that was so.
    pub fn new(nets: &CtNets, earlier: Arc<dyn PodNetwork>) -> Self {
        let wants = nets.addresses.map(|a| a.is_some());
        Self { bridge: nets.settings.bridge.clone(), wants, earlier }
    }

    async fn addresses(&self, request: &NetworkRequest) -> Result<Vec<IpAddr>> {
        let found = netns::addresses(&request.netns, INTERFACE).await.map_err(Error::from)?;
        let found = found.ok_or_else(|| {
            Error::precondition(format!(
                "the CT has no interface {INTERFACE}: its net0 is not on bridge {}",
                self.bridge
            ))
        })?;
        for (wanted, version) in self.wants.into_iter().zip(["IPv4", "IPv6"]) {
            let has = found.iter().any(|a| a.is_ipv4() == (version == "IPv4"));
            if wanted && !has {
                return Err(Error::new(
                    Kind::Unavailable,
                    format!(
                        "the CT has got no {version} address on {} (the log of its start's task says why)",
                        self.bridge
                    ),
                ));
            }
        }
        Ok(found)
    }
}

#[async_trait]
impl PodNetwork for CtNetwork {
    async fn status(&self) -> std::result::Result<(), NetworkNotReady> {
        CT.bridge_status(&self.bridge)
    }

    async fn add(&self, request: &NetworkRequest) -> Result<NetworkResult> {
        netns::lo_up(&request.netns).await.map_err(Error::from)?;
        Ok(NetworkResult { ips: self.addresses(request).await? })
    }

    async fn check(&self, request: &NetworkRequest) -> Result<()> {
        self.addresses(request).await.map(drop)
    }

    async fn del(&self, request: &NetworkRequest) -> Result<()> {
        // Pods of ours have no note of a network.
        self.earlier.del(request).await
    }

    async fn gc(&self, live: &[PodId]) -> Result<()> {
        self.earlier.gc(live).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(address: &str, address6: &str) -> CtNets {
        let settings = Settings {
            bridge: "vmbr0".into(),
            vlan: Some(7),
            mtu: Some(1450),
            firewall: Some(true),
            rate: Some(12.5),
            address: address.into(),
            address6: address6.into(),
            gateway: if address == "dhcp" { String::new() } else { "10.0.0.1".into() },
            ..Settings::default()
        };
        let addresses = settings.addresses(2).expect("addresses");
        CtNets { settings, addresses }
    }

    #[test]
    fn net0_is_what_the_configuration_says() {
        let written = |nets: &CtNets, n: u32| nets.of(n)[0].write().expect("written");
        let rest =
            "firewall=1,gw=10.0.0.1,host-managed=1,ip=10.0.0.6/24,ip6=fd00::6/64,mtu=1450,name=eth0,rate=12.5,tag=7";
        let range = nets("10.0.0.5-10.0.0.9/24", "fd00::5-fd00::9/64");
        assert_eq!(written(&range, 1), format!("bridge=vmbr0,{rest}"));
        let dhcp = "bridge=vmbr0,firewall=1,host-managed=1,ip=dhcp,mtu=1450,name=eth0,rate=12.5,tag=7";
        assert_eq!(written(&nets("dhcp", ""), 0), dhcp);
    }

    #[test]
    fn what_it_can_not_do_is_refused_by_name() {
        let pod = crate::core::records::tests::pod("a").config;
        CtNets::check(&pod).expect("a plain one");
        let mut limited = pod.clone();
        limited.annotations.insert("kubernetes.io/egress-bandwidth".into(), "1M".into());
        let e = CtNets::check(&limited).expect_err("a limit");
        assert!(e.kind() == Kind::Unimplemented && e.chain().contains("network.rate"), "{e:?}");
        let version = |v: &str| Version { version: v.into(), release: String::new() };
        for fits in ["9.1", "9.1.2", "9.2.11", "10.0-1"] {
            CtNets::check_release(&version(fits)).expect(fits);
        }
        for old in ["8.4.1", "9.0.11", "", "x"] {
            let e = CtNets::check_release(&version(old)).expect_err(old);
            assert!(e.chain().contains("needs Proxmox VE 9.1"), "{e:?}");
        }
    }
}
