//! What is the same of containers and VMs, as types: which guest, its state, configuration, changes, snapshots, clones, and what
//! a new one is like.
//!
//! Pure; `guest` has what can be done with them.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::ids::Vmid;
use super::lenient;
use super::property::{Features, PropertyError, Tags, Volume};
use super::transport::Form;

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

/// A network interface, `net0`, of one kind of guest; and what else tells the kinds' configurations apart.
pub trait GuestNet: FromStr<Err = PropertyError> + Default {
    /// Which.
    const KIND: GuestKind;

    /// Whether a key's value is a volume; `n`: the number at the key's end.
    fn is_volume(name: &str, n: Option<u32>) -> bool;

    /// As the API takes it.
    fn write(&self) -> Result<String, PropertyError>;
}

/// A guest's configuration.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GuestConfig<N> {
    /// Changes with every change; a change that names it fails if another came between.
    pub digest: String,
    /// Networks by number.
    pub nets: BTreeMap<u32, N>,
    /// A container's root file system and mount points ("rootfs", "mp0"), a VM's disks and CD drives ("scsi0", "ide2", "efidisk0").
    pub volumes: BTreeMap<String, Volume>,
    /// Tags.
    pub tags: Tags,
    /// What a container may beyond the usual.
    pub features: Features,
    /// Everything else: "memory", "hostname", "lock".
    pub other: BTreeMap<String, String>,
}

impl<N: GuestNet> GuestConfig<N> {
    /// From the API's answer, which has a digest: one without it is something else, and no configuration that has nothing in it.
    pub fn parse(answer: &Value) -> Result<Self, PropertyError> {
        let Value::Object(keys) = answer else {
            return Err(PropertyError::new("configuration", "the answer is no object"));
        };
        let mut config = Self::default();
        for (key, value) in keys {
            let text = lenient::as_string(value);
            let (name, n) = numbered(key);
            match (name, n) {
                ("digest", None) => config.digest = text,
                ("tags", None) => config.tags = text.parse()?,
                ("features", None) => config.features = text.parse()?,
                ("net", Some(n)) => drop(config.nets.insert(n, text.parse()?)),
                _ if N::is_volume(name, n) => drop(config.volumes.insert(key.clone(), text.parse()?)),
                _ => drop(config.other.insert(key.clone(), text)),
            }
        }
        if config.digest.is_empty() {
            return Err(PropertyError::new("configuration", "the answer has no digest"));
        }
        Ok(config)
    }

    /// Everything as the API writes it, sorted.
    pub fn keys(&self) -> Result<BTreeMap<String, String>, PropertyError> {
        let mut keys = self.other.clone();
        keys.insert("digest".into(), self.digest.clone());
        for (n, net) in &self.nets {
            keys.insert(format!("net{n}"), net.write()?);
        }
        for (key, volume) in &self.volumes {
            keys.insert(key.clone(), volume.write()?);
        }
        let words = [("tags", self.tags.to_string()), ("features", self.features.write()?)];
        keys.extend(words.into_iter().filter(|(_, v)| !v.is_empty()).map(|(k, v)| (k.to_owned(), v)));
        Ok(keys)
    }
}

impl<N> GuestConfig<N> {
    /// A value as text.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.other.get(key).map(String::as_str)
    }

    /// The notes.
    pub fn description(&self) -> &str {
        self.get("description").unwrap_or_default()
    }
}

/// What a new guest of either kind is like. What is None or empty is left to Proxmox.
#[derive(Clone, Default)]
pub struct NewGuest<N> {
    /// MiB; Proxmox's own default is 512.
    pub memory: Option<u64>,
    /// CPUs that it sees.
    pub cores: Option<u32>,
    /// CPU time; 0: no limit.
    pub cpulimit: Option<f64>,
    /// Networks.
    pub nets: Vec<N>,
    /// Tags.
    pub tags: Tags,
    /// Notes; at most 8 KiB.
    pub description: Option<String>,
    /// Pool.
    pub pool: Option<String>,
    /// Further keys as the API names them; a VM's win.
    pub extra: BTreeMap<String, String>,
}

/// Further keys may be passwords: their names only.
impl<N: fmt::Debug> fmt::Debug for NewGuest<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { memory, cores, cpulimit, nets, tags, description, pool, extra } = self;
        let mut told = f.debug_struct("NewGuest");
        told.field("memory", memory).field("cores", cores).field("cpulimit", cpulimit).field("nets", nets);
        told.field("tags", tags).field("description", description).field("pool", pool);
        told.field("extra", &extra.keys()).finish()
    }
}

impl<N: GuestNet> NewGuest<N> {
    /// The parameters of the call, but those of `extra`.
    pub(super) fn form(&self, vmid: Vmid) -> Result<Form, PropertyError> {
        let mut form = pairs([
            ("vmid", Some(vmid.to_string())),
            ("memory", self.memory.map(|n| n.to_string())),
            ("cores", self.cores.map(|n| n.to_string())),
            ("cpulimit", self.cpulimit.map(|n| n.to_string())),
            ("tags", Some(self.tags.to_string()).filter(|t| !t.is_empty())),
            ("description", self.description.clone()),
            ("pool", self.pool.clone()),
        ]);
        for (n, net) in self.nets.iter().enumerate() {
            form.push((format!("net{n}"), net.write()?));
        }
        Ok(form)
    }

    /// The storage that it is made on, of its first volume.
    pub(super) fn storage<'a>(&'a self, first: Option<&'a Volume>) -> &'a str {
        let named = first.and_then(Volume::storage);
        named.or_else(|| self.extra.get("storage").map(String::as_str)).unwrap_or("local")
    }
}

/// Those that there are.
pub(super) fn pairs<const N: usize>(list: [(&str, Option<String>); N]) -> Form {
    list.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect()
}

/// A change of a configuration.
#[derive(Clone, Default)]
pub struct GuestChange {
    /// New values, property strings included.
    pub set: BTreeMap<String, String>,
    /// Keys that are to go.
    pub delete: Vec<String>,
    /// Only if the configuration is still this one.
    pub digest: Option<String>,
}

/// New values may be passwords: their names only.
impl fmt::Debug for GuestChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut told = f.debug_struct("GuestChange");
        told.field("set", &self.set.keys()).field("delete", &self.delete).field("digest", &self.digest).finish()
    }
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

/// Name and number of a key as "net0"; all of it, and no number, where it has none.
fn numbered(key: &str) -> (&str, Option<u32>) {
    let digits = key.find(|c: char| c.is_ascii_digit());
    let parsed = digits.and_then(|at| Some((&key[..at], key[at..].parse().ok()?)));
    parsed.map_or((key, None), |(name, n)| (name, Some(n)))
}
