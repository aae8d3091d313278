//! The network of a node that has no CNI configuration: one bridge, for `make run` and single machines.
//!
//! Called by `main`, which puts the text into `CniConfig::embedded`. Pure but for looking which plugins are installed.

use std::net::Ipv4Addr;

use camino::Utf8PathBuf;
use serde_json::json;

use super::error::CniError;

/// Subnet of the embedded network unless configured: 4,093 pods, clear of what Kubernetes networks usually take
/// (10.244.0.0/16, 10.42.0.0/16, 10.96.0.0/12), podman (10.88.0.0/16), docker (172.17.0.0/16) and PVE's examples.
pub const DEFAULT_SUBNET: &str = "10.213.0.0/20";
/// Bridge of the embedded network; made by the bridge plugin with the first pod.
pub const BRIDGE: &str = "lxcri0";

/// A conflist for pods on an own bridge with NAT: `bridge` and `host-local`, and `portmap` where it is installed.
/// Blocks shortly.
pub fn embedded_conflist(plugin_folders: &[Utf8PathBuf], subnet: &str) -> Result<String, CniError> {
    check_subnet(subnet).ok_or_else(|| CniError::Subnet(subnet.to_owned()))?;
    let mut plugins = vec![json!({
        "type": "bridge", "bridge": BRIDGE, "isGateway": true, "ipMasq": true, "hairpinMode": true,
        "ipam": {"type": "host-local", "ranges": [[{"subnet": subnet}]], "routes": [{"dst": "0.0.0.0/0"}]},
    })];
    let portmap = plugin_folders.iter().any(|folder| folder.join("portmap").is_file());
    if portmap {
        plugins.push(json!({"type": "portmap", "capabilities": {"portMappings": true}}));
    }
    // 1.0.0: the newest that the plugins of Debian 12 and 13 speak. portmap's CHECK (1.1.1) looks for IPv6 rules of a
    // pod that has no IPv6 address and fails, so it is not asked.
    Ok(json!({"cniVersion": "1.0.0", "name": "lxcri", "disableCheck": portmap, "plugins": plugins}).to_string())
}

fn check_subnet(subnet: &str) -> Option<()> {
    let (address, bits) = subnet.split_once('/')?;
    let (address, bits): (Ipv4Addr, u32) = (address.parse().ok()?, bits.parse().ok()?);
    let host_bits = u32::MAX.checked_shr(bits)?;
    ((8..=29).contains(&bits) && u32::from(address) & host_bits == 0).then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_plugins_and_subnets_that_are_there() {
        let text = embedded_conflist(&[], DEFAULT_SUBNET).unwrap();
        assert!(text.contains("10.213.0.0/20") && !text.contains("portmap"), "{text}");
        for bad in ["", "10.0.0.0", "10.0.0.1/24", "10.0.0.0/30", "10.0.0.0/40", "fd00::/64", "10.0.0.0/-1"] {
            assert!(embedded_conflist(&[], bad).is_err(), "{bad}");
        }
    }
}
