//! What is the same of containers and VMs, as types: which guest, its state, changes, snapshots, clones.
//!
//! Pure; `guest` has what can be done with them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::ids::Vmid;
use super::lenient;

/// Which kind of guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestKind {
    /// A container.
    Ct,
    /// A virtual machine.
    Vm,
}

impl GuestKind {
    /// Its part of the API's paths, and what the API calls it in lists.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ct => "lxc",
            Self::Vm => "qemu",
        }
    }
}

/// A guest of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestId<'a> {
    /// Container or VM.
    pub kind: GuestKind,
    /// Its node.
    pub node: &'a str,
    /// Its number.
    pub vmid: Vmid,
}

impl<'a> GuestId<'a> {
    /// A container.
    pub fn ct(node: &'a str, vmid: Vmid) -> Self {
        Self { kind: GuestKind::Ct, node, vmid }
    }

    /// A virtual machine.
    pub fn vm(node: &'a str, vmid: Vmid) -> Self {
        Self { kind: GuestKind::Vm, node, vmid }
    }
}

/// A guest in a list, or its present state.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub struct GuestStatus {
    /// Number.
    pub vmid: Vmid,
    /// Name; a container's is its host name.
    #[serde(default)]
    pub name: String,
    /// "running" or "stopped".
    pub status: String,
    /// Seconds.
    #[serde(default, deserialize_with = "lenient::u64")]
    pub uptime: u64,
    /// CPUs in use.
    #[serde(default, deserialize_with = "lenient::f64")]
    pub cpu: f64,
    /// CPUs it may use.
    #[serde(default, deserialize_with = "lenient::f64")]
    pub cpus: f64,
    /// Bytes in use.
    #[serde(default, deserialize_with = "lenient::u64")]
    pub mem: u64,
    /// Bytes it may use.
    #[serde(default, deserialize_with = "lenient::u64")]
    pub maxmem: u64,
    /// Bytes of its root file system in use; 0 of VMs, of which Proxmox does not know.
    #[serde(default, deserialize_with = "lenient::u64")]
    pub disk: u64,
    /// Bytes of its root file system or first disk.
    #[serde(default, deserialize_with = "lenient::u64")]
    pub maxdisk: u64,
    /// Tags.
    #[serde(default)]
    pub tags: String,
    /// Lock, or "".
    #[serde(default)]
    pub lock: String,
    /// A template.
    #[serde(default, deserialize_with = "lenient::bool")]
    pub template: bool,
    /// A container's init or a VM's process on the node; 0 when it does not run or the API does not tell.
    #[serde(default, deserialize_with = "lenient::u64")]
    pub pid: u64,
    /// What QEMU says of a VM: "running", "paused", "prelaunch"; "" of containers, and in lists.
    #[serde(default)]
    pub qmpstatus: String,
}

impl GuestStatus {
    /// Whether it runs; also a VM that is paused does.
    pub fn is_running(&self) -> bool {
        self.status == "running"
    }

    /// Whether its CPUs stand still.
    pub fn is_paused(&self) -> bool {
        self.is_running() && self.qmpstatus == "paused"
    }
}

/// A change of a configuration.
#[derive(Debug, Clone, Default)]
pub struct GuestChange {
    /// New values, property strings included.
    pub set: BTreeMap<String, String>,
    /// Keys that are to go.
    pub delete: Vec<String>,
    /// Only if the configuration is still this one.
    pub digest: Option<String>,
}

/// A key that waits for the next start.
#[derive(Debug, Clone, Deserialize)]
pub struct Pending {
    /// Key.
    pub key: String,
    /// Present value.
    #[serde(default)]
    pub value: Value,
    /// Value at the next start.
    #[serde(default)]
    pub pending: Option<Value>,
    /// Goes at the next start.
    #[serde(default, deserialize_with = "lenient::bool")]
    pub delete: bool,
}

/// A snapshot.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub struct Snapshot {
    /// Name; the present state is not listed.
    pub name: String,
    /// Notes.
    #[serde(default)]
    pub description: String,
    /// Seconds since 1970.
    #[serde(default, deserialize_with = "lenient::u64")]
    pub snaptime: u64,
    /// The one before.
    #[serde(default)]
    pub parent: String,
}

/// A network interface of a running guest.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub struct Interface {
    /// Name inside.
    pub name: String,
    /// MAC address.
    #[serde(default)]
    pub hwaddr: String,
    /// IPv4 with prefix.
    #[serde(default)]
    pub inet: Option<String>,
    /// IPv6 with prefix.
    #[serde(default)]
    pub inet6: Option<String>,
}

/// What a clone is like.
#[derive(Debug, Clone, Default)]
pub struct CloneSpec {
    /// Name; a container's is its host name.
    pub name: Option<String>,
    /// Notes.
    pub description: Option<String>,
    /// Pool.
    pub pool: Option<String>,
    /// From this snapshot.
    pub snapshot: Option<String>,
    /// Storage of a full clone.
    pub storage: Option<String>,
    /// A copy, not a clone that needs its template.
    pub full: bool,
}

/// Name and number of a key as "net0".
pub(super) fn numbered(key: &str) -> Option<(&str, u32)> {
    let at = key.find(|c: char| c.is_ascii_digit())?;
    Some((&key[..at], key[at..].parse().ok()?))
}
