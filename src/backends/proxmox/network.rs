//! Whether this node has what guests are connected with.

use camino::Utf8Path;

use super::Unit;
use crate::core::ports::NetworkNotReady;

impl Unit {
    /// Whether there is such a bridge, or vnet of the SDN.
    pub fn bridge_status(&self, bridge: &str) -> Result<(), NetworkNotReady> {
        if Utf8Path::new("/sys/class/net").join(bridge).try_exists().unwrap_or(false) {
            return Ok(());
        }
        let message = format!("this node has no bridge or vnet {bridge} (handlers.{}.network.bridge)", self.handler);
        Err(NetworkNotReady { reason: "NetworkBridgeNotFound".into(), message })
    }
}
