//! Networks of the server's containers: `netN` on bridges of the node, as liblxc connects them, with VLANs as bridges of their own
//! (`vmbr0v7`), and addresses that the node sets: those of the configuration, of a DHCP server, of an IPAM of a vnet.
//!
//! A test makes bridges by [`Pve::add_bridge`] and [`Pve::add_vnet`]; they end with the tests' environment.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

use super::Pve;
use super::http::{Call, Failure};
use super::state::{Server, State};

/// A vnet: its zone, and who has which of its addresses.
#[derive(Debug, Clone)]
pub struct Vnet {
    pub zone: String,
    /// `10.0.0.` and the prefix.
    pub network: (String, u8),
    /// MAC address and host part.
    pub ipam: BTreeMap<String, u8>,
}

/// Keys of a net, as the schema has them.
const KEYS: [&str; 14] = [
    "name",
    "bridge",
    "ip",
    "gw",
    "ip6",
    "gw6",
    "hwaddr",
    "mtu",
    "tag",
    "trunks",
    "firewall",
    "rate",
    "link_down",
    "host-managed",
];

pub type Net = BTreeMap<String, String>;

pub fn parse(text: &str) -> Net {
    text.split(',').filter_map(|p| p.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
}

pub fn nets(config: &BTreeMap<String, String>) -> impl Iterator<Item = (u32, Net)> {
    config.iter().filter_map(|(key, value)| Some((key.strip_prefix("net")?.parse().ok()?, parse(value))))
}

fn is_host_managed(net: &Net) -> bool {
    net.get("host-managed").is_some_and(|v| v == "1")
}

/// The bridge that a net is connected with.
pub fn link(net: &Net) -> Option<String> {
    let bridge = net.get("bridge")?;
    Some(net.get("tag").map_or_else(|| bridge.clone(), |tag| format!("{bridge}v{tag}")))
}

/// liblxc's configuration of a container's networks.
pub fn lines(vmid: u32, config: &BTreeMap<String, String>) -> Result<String, String> {
    let mut text = String::new();
    for (n, net) in nets(config) {
        let link = link(&net).ok_or_else(|| format!("net{n}: missing bridge configuration"))?;
        let mtu = std::fs::read_to_string(Path::new("/sys/class/net").join(&link).join("mtu"));
        let most: u32 =
            mtu.ok().and_then(|m| m.trim().parse().ok()).ok_or_else(|| format!("bridge '{link}' does not exist"))?;
        let mtu = net.get("mtu").map_or(Ok(most), |m| m.parse()).map_err(|_| "no MTU".to_owned())?;
        if mtu > most {
            return Err(format!("net{n}: MTU size '{mtu}' is bigger than bridge MTU '{most}'"));
        }
        let mut put = |key: &str, value: &str| text.push_str(&format!("lxc.net.{n}.{key} = {value}\n"));
        put("type", "veth");
        put("veth.pair", &format!("veth{vmid}i{n}"));
        put("link", &link);
        put("mtu", &mtu.to_string());
        for (key, name) in [("hwaddr", "hwaddr"), ("name", "name")] {
            put(key, net.get(name).map(String::as_str).unwrap_or_default());
        }
        if is_host_managed(&net) {
            for (key, name) in
                [("ipv4.address", "ip"), ("ipv4.gateway", "gw"), ("ipv6.address", "ip6"), ("ipv6.gateway", "gw6")]
            {
                if let Some(value) = net.get(name).filter(|v| !["dhcp", "manual"].contains(&v.as_str())) {
                    put(key, value);
                }
            }
            put("flags", "up");
        }
    }
    if text.is_empty() {
        text.push_str("lxc.net.0.type = empty\n");
    }
    Ok(text)
}

/// Whether somebody may connect with a net's bridge or vnet.
pub fn bridge_access(state: &State, user: &str, net: &Net) -> Result<(), Failure> {
    let name = net.get("bridge").cloned().unwrap_or_default();
    let zone = state.vnets.get(&name).map_or("localnetwork", |v| &v.zone);
    let tag = net.get("tag").map(|t| format!("/{t}")).unwrap_or_default();
    state.need(user, &format!("/sdn/zones/{zone}/{name}{tag}"), "SDN.Use")
}

impl Server {
    /// A MAC address that no other guest has.
    pub fn mac(&self) -> String {
        let serial = self.next();
        format!("BC:24:11:00:{:02X}:{:02X}", (serial >> 8) & 0xff, serial & 0xff)
    }

    /// Checks a call's nets; as they are written into the configuration.
    pub fn check_nets(&self, state: &State, call: &Call) -> Result<Vec<(String, String)>, Failure> {
        let mut found = Vec::new();
        for (key, value) in call.params.iter().filter(|(k, _)| k.starts_with("net")) {
            let net = parse(value);
            if let Some(bad) = net.keys().find(|k| *k != "type" && !KEYS.contains(&k.as_str())) {
                let why = format!(
                    "{bad}: property is not defined in schema and the schema does not allow additional properties"
                );
                return Err(Failure::param(key, why));
            }
            bridge_access(state, &call.user, &net)?;
            if is_host_managed(&net) && net.get("ip6").is_some_and(|ip| ip == "auto") {
                return Err(Failure::die(format!(
                    "{key}: SLAAC is not supported for host-managed network configuration."
                )));
            }
            let mac = if net.contains_key("hwaddr") { String::new() } else { format!(",hwaddr={}", self.mac()) };
            found.push((key.clone(), format!("{value}{mac},type=veth")));
        }
        Ok(found)
    }

    /// What the node does after a start for addresses that are somebody's to lease: a client of DHCP in the container's network
    /// namespace, whose failure is a warning of the task.
    pub async fn lease_addresses(&self, vmid: u32, pid: u32) -> Result<(), String> {
        let config = self.lock().guests.get(&vmid).map(|g| g.config.clone()).unwrap_or_default();
        let mut warnings = 0;
        for (_, net) in
            nets(&config).filter(|(_, net)| is_host_managed(net) && net.get("ip").is_some_and(|ip| ip == "dhcp"))
        {
            let (name, mac) = (net["name"].clone(), net["hwaddr"].clone());
            let inside = |program: &[&str]| {
                let mut command = Command::new("nsenter");
                command.args(["-t", &pid.to_string(), "-n"]).args(program).stdin(Stdio::null());
                command.output().is_ok_and(|out| out.status.success())
            };
            let leased = match self.address_of(&net["bridge"], &mac) {
                Some(address) => inside(&["ip", "address", "add", &address, "dev", &name]),
                None => {
                    let script = self.folder.join("udhcpc");
                    std::fs::write(&script, UDHCPC).map_err(|e| e.to_string())?;
                    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
                    std::fs::set_permissions(&script, mode).map_err(|e| e.to_string())?;
                    let script = script.display().to_string();
                    inside(&["busybox", "udhcpc", "-f", "-n", "-q", "-t", "3", "-T", "1", "-i", &name, "-s", &script])
                }
            };
            warnings += u32::from(!leased);
        }
        if warnings == 0 { Ok(()) } else { Err(format!("WARNINGS: {warnings}")) }
    }

    /// The address that the IPAM of a vnet has for a MAC address.
    fn address_of(&self, bridge: &str, mac: &str) -> Option<String> {
        let mut state = self.lock();
        let vnet = state.vnets.get_mut(bridge)?;
        let free = (100..200).find(|n| !vnet.ipam.values().any(|used| used == n))?;
        let host = *vnet.ipam.entry(mac.to_owned()).or_insert(free);
        Some(format!("{}{host}/{}", vnet.network.0, vnet.network.1))
    }

    /// A guest that is deleted gives its addresses back.
    pub fn forget_addresses(&self, vmid: u32) {
        let mut state = self.lock();
        let Some(config) = state.guests.get(&vmid).map(|g| g.config.clone()) else { return };
        for (_, net) in nets(&config) {
            let vnet = net.get("bridge").and_then(|b| state.vnets.get_mut(b));
            if let (Some(vnet), Some(mac)) = (vnet, net.get("hwaddr")) {
                vnet.ipam.remove(mac);
            }
        }
    }
}

/// What a DHCP client does with its lease.
const UDHCPC: &str = r#"#!/bin/sh
[ "$1" = bound ] || exit 0
ip address add "$ip/$mask" dev "$interface"
[ -z "$router" ] || ip route add default via "$router"
"#;

fn ip(args: &str) {
    super::super::run(Command::new("ip").args(args.split(' ')));
}

/// What tests do to it.
impl Pve {
    /// A bridge of the node, with an address of the node's on it.
    pub fn add_bridge(&self, name: &str, address: &str) {
        ip(&format!("link add {name} type bridge"));
        ip(&format!("address add {address} dev {name}"));
        ip(&format!("link set {name} up"));
    }

    /// A vnet of the SDN, with an IPAM that gives its addresses from 100 on.
    pub fn add_vnet(&self, zone: &str, name: &str, network: &str, prefix: u8) {
        self.add_bridge(name, &format!("{network}1/{prefix}"));
        let vnet = Vnet { zone: zone.into(), network: (network.into(), prefix), ipam: BTreeMap::new() };
        self.state.lock().vnets.insert(name.into(), vnet);
    }

    /// How many addresses the IPAM of a vnet has given.
    pub fn leased(&self, vnet: &str) -> usize {
        self.state.lock().vnets[vnet].ipam.len()
    }

    /// A DHCP server on a bridge; ends with the environment.
    pub fn serve_dhcp(&self, bridge: &str, first: &str, last: &str, router: &str) {
        let (file, leases) = (self.file("udhcpd.conf"), self.file("leases"));
        std::fs::write(&leases, "").expect("no leases");
        let text = format!(
            "start {first}\nend {last}\ninterface {bridge}\nlease_file {leases}\npidfile {}\noption subnet 255.255.255.0\noption router \
             {router}\n",
            self.file("udhcpd.pid")
        );
        std::fs::write(&file, text).expect("its configuration");
        let mut command = Command::new("busybox");
        command.args(["udhcpd", "-f", file.as_str()]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().expect("udhcpd");
        self.state.lock().helpers.push(child);
    }
}
