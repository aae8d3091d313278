//! Property strings, `key=value,key2=value2`, in which the API packs what belongs together: networks, disks, features.
//!
//! Pure. Unknown keys are kept, so that what we do not know is not lost when a value is read, changed and written back.
//! The order of keys means nothing; it is written default key first, then sorted.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

/// A value that does not fit into a property string, or a string that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {why}")]
pub struct PropertyError {
    what: String,
    why: String,
}

impl PropertyError {
    pub(super) fn new(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self { what: what.into(), why: why.into() }
    }
}

/// Keys and values. The value without a key has the key "".
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Properties(BTreeMap<String, String>);

impl Properties {
    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    /// Takes it out.
    pub(super) fn take(&mut self, key: &str) -> Option<String> {
        self.0.remove(key)
    }

    pub(super) fn take_bool(&mut self, key: &str) -> Result<Option<bool>, PropertyError> {
        let Some(text) = self.take(key) else { return Ok(None) };
        match text.as_str() {
            "1" | "on" | "yes" | "true" => Ok(Some(true)),
            "0" | "off" | "no" | "false" => Ok(Some(false)),
            _ => Err(PropertyError::new(key, format!("{text:?} is neither 1 nor 0"))),
        }
    }

    pub(super) fn take_number<T: FromStr>(&mut self, key: &str) -> Result<Option<T>, PropertyError> {
        let Some(text) = self.take(key) else { return Ok(None) };
        text.parse().map(Some).map_err(|_| PropertyError::new(key, format!("{text:?} is not a number")))
    }

    pub(super) fn set(&mut self, key: &str, value: Option<impl ToString>) {
        if let Some(value) = value {
            self.0.insert(key.to_owned(), value.to_string());
        }
    }

    /// As the API takes it; fails where a key or value could be read as something else.
    pub fn write(&self) -> Result<String, PropertyError> {
        let mut parts = Vec::new();
        for (key, value) in &self.0 {
            let clean = |text: &str| !text.contains([',', '\n', '\r', '\0']);
            if !clean(value) || (key.is_empty() && value.contains('=')) {
                return Err(PropertyError::new(key, format!("{value:?} holds a character that separates properties")));
            }
            if key.contains('=') || !clean(key) {
                return Err(PropertyError::new(key, "no key of a property"));
            }
            parts.push(if key.is_empty() { value.clone() } else { format!("{key}={value}") });
        }
        Ok(parts.join(","))
    }
}

impl FromStr for Properties {
    type Err = PropertyError;

    fn from_str(text: &str) -> Result<Self, PropertyError> {
        let mut found = BTreeMap::new();
        for part in text.split(',').filter(|p| !p.is_empty()) {
            let (key, value) = part.split_once('=').unwrap_or(("", part));
            if found.insert(key.trim().to_owned(), value.trim().to_owned()).is_some() {
                return Err(PropertyError::new(text, format!("{key:?} is there twice")));
            }
        }
        Ok(Self(found))
    }
}

/// A network interface: `net0`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Net {
    /// Name inside: "eth0".
    pub name: String,
    /// Bridge or SDN vnet.
    pub bridge: Option<String>,
    /// `10.0.0.5/24`, "dhcp" or "manual".
    pub ip: Option<String>,
    /// IPv4 gateway.
    pub gw: Option<String>,
    /// `fd00::5/64`, "auto", "dhcp" or "manual".
    pub ip6: Option<String>,
    /// IPv6 gateway.
    pub gw6: Option<String>,
    /// MAC address; the API chooses one.
    pub hwaddr: Option<String>,
    /// 64 to 65535 bytes.
    pub mtu: Option<u16>,
    /// VLAN.
    pub tag: Option<u16>,
    /// Whether Proxmox's firewall filters it.
    pub firewall: Option<bool>,
    /// Megabytes a second.
    pub rate: Option<f64>,
    /// The cable is out.
    pub link_down: Option<bool>,
    /// The host sets the address, not the guest's own init.
    pub host_managed: Option<bool>,
    /// What else is there.
    pub other: Properties,
}

impl FromStr for Net {
    type Err = PropertyError;

    fn from_str(text: &str) -> Result<Self, PropertyError> {
        let mut p: Properties = text.parse()?;
        Ok(Self {
            name: p.take("name").ok_or_else(|| PropertyError::new(text, "a network without a name"))?,
            bridge: p.take("bridge"),
            ip: p.take("ip"),
            gw: p.take("gw"),
            ip6: p.take("ip6"),
            gw6: p.take("gw6"),
            hwaddr: p.take("hwaddr"),
            mtu: p.take_number("mtu")?,
            tag: p.take_number("tag")?,
            firewall: p.take_bool("firewall")?,
            rate: p.take_number("rate")?,
            link_down: p.take_bool("link_down")?,
            host_managed: p.take_bool("host-managed")?,
            other: p,
        })
    }
}

impl Net {
    /// As the API takes it.
    pub fn write(&self) -> Result<String, PropertyError> {
        let mut p = self.other.clone();
        p.set("name", Some(&self.name));
        p.set("bridge", self.bridge.as_ref());
        p.set("ip", self.ip.as_ref());
        p.set("gw", self.gw.as_ref());
        p.set("ip6", self.ip6.as_ref());
        p.set("gw6", self.gw6.as_ref());
        p.set("hwaddr", self.hwaddr.as_ref());
        p.set("mtu", self.mtu);
        p.set("tag", self.tag);
        p.set("firewall", self.firewall.map(u8::from));
        p.set("rate", self.rate);
        p.set("link_down", self.link_down.map(u8::from));
        p.set("host-managed", self.host_managed.map(u8::from));
        p.write()
    }
}

/// A root file system or mount point of a container (`rootfs`, `mp0`), or a disk of a VM (`scsi0`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Volume {
    /// `STORAGE:NAME` of one that is there, or `STORAGE:GIB` for a new one.
    pub volume: String,
    /// Where it is mounted inside; None for the root and for disks.
    pub mp: Option<String>,
    /// Its size as Proxmox writes it: "8G".
    pub size: Option<String>,
    /// Read-only.
    pub ro: Option<bool>,
    /// What else is there.
    pub other: Properties,
}

impl FromStr for Volume {
    type Err = PropertyError;

    fn from_str(text: &str) -> Result<Self, PropertyError> {
        let mut p: Properties = text.parse()?;
        let volume = p.take("").or_else(|| p.take("volume")).or_else(|| p.take("file"));
        Ok(Self {
            volume: volume.ok_or_else(|| PropertyError::new(text, "no volume is named"))?,
            mp: p.take("mp"),
            size: p.take("size"),
            ro: p.take_bool("ro")?,
            other: p,
        })
    }
}

impl Volume {
    /// A new one of `mib` on `storage`; 0 is one without a limit, where the storage has such.
    pub fn allocate(storage: &str, mib: u64) -> Self {
        // The API counts in GiB with decimals.
        let gib = mib as f64 / 1024.0;
        Self { volume: format!("{storage}:{gib}"), ..Self::default() }
    }

    /// The storage it is on; None for a path of the host.
    pub fn storage(&self) -> Option<&str> {
        self.volume.split_once(':').map(|(storage, _)| storage).filter(|s| !s.starts_with('/'))
    }

    /// As the API takes it.
    pub fn write(&self) -> Result<String, PropertyError> {
        let mut p = self.other.clone();
        // With its key, since the name of a linked clone or a path may hold a `=`.
        p.set("volume", Some(&self.volume));
        p.set("mp", self.mp.as_ref());
        p.set("size", self.size.as_ref());
        p.set("ro", self.ro.map(u8::from));
        p.write()
    }
}

/// What a container may do beyond the usual: `features`. All but nesting need root@pam.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Features {
    /// Containers inside.
    pub nesting: bool,
    /// The keyctl system call.
    pub keyctl: bool,
    /// FUSE mounts.
    pub fuse: bool,
    /// Device nodes.
    pub mknod: bool,
    /// File systems it may mount.
    pub mount: BTreeSet<String>,
    /// What else is there.
    pub other: Properties,
}

impl FromStr for Features {
    type Err = PropertyError;

    fn from_str(text: &str) -> Result<Self, PropertyError> {
        let mut p: Properties = text.parse()?;
        let mount = p.take("mount").unwrap_or_default();
        Ok(Self {
            nesting: p.take_bool("nesting")?.unwrap_or_default(),
            keyctl: p.take_bool("keyctl")?.unwrap_or_default(),
            fuse: p.take_bool("fuse")?.unwrap_or_default(),
            mknod: p.take_bool("mknod")?.unwrap_or_default(),
            mount: mount.split([';', ' ']).filter(|m| !m.is_empty()).map(String::from).collect(),
            other: p,
        })
    }
}

impl Features {
    /// As the API takes it; "" when nothing is on.
    pub fn write(&self) -> Result<String, PropertyError> {
        let mut p = self.other.clone();
        let on = |b: bool| b.then_some(1);
        p.set("nesting", on(self.nesting));
        p.set("keyctl", on(self.keyctl));
        p.set("fuse", on(self.fuse));
        p.set("mknod", on(self.mknod));
        let mount = self.mount.iter().cloned().collect::<Vec<_>>().join(";");
        p.set("mount", (!mount.is_empty()).then_some(mount));
        p.write()
    }
}

/// A guest's tags: lower case, sorted, without duplicates.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tags(BTreeSet<String>);

impl Tags {
    /// Adds one; fails on what Proxmox takes for no tag.
    pub fn add(&mut self, tag: &str) -> Result<(), PropertyError> {
        let tag = tag.to_lowercase();
        let mut chars = tag.chars();
        let first = chars.next().is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
        if !first || !chars.all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '+' | '.')) {
            return Err(PropertyError::new("tags", format!("{tag:?} is not a tag (a-z, 0-9, then also _ - + .)")));
        }
        self.0.insert(tag);
        Ok(())
    }

    /// Whether it is among them.
    pub fn has(&self, tag: &str) -> bool {
        self.0.contains(&tag.to_lowercase())
    }

    /// All.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}

impl FromStr for Tags {
    type Err = PropertyError;

    fn from_str(text: &str) -> Result<Self, PropertyError> {
        let mut tags = Self::default();
        text.split([';', ',', ' ']).filter(|t| !t.is_empty()).try_for_each(|t| tags.add(t))?;
        Ok(tags)
    }
}

impl fmt::Display for Tags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.iter().cloned().collect::<Vec<_>>().join(";"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn networks() {
        let text = "name=eth0,bridge=vmbr0,firewall=1,hwaddr=BC:24:11:00:00:01,ip=10.0.0.5/24,gw=10.0.0.1,mtu=1450,tag=7,type=veth";
        let net: Net = text.parse().expect("a net");
        assert_eq!(
            (net.mtu, net.tag, net.firewall, net.other.get("type")),
            (Some(1450), Some(7), Some(true), Some("veth"))
        );
        assert_eq!(net.write().expect("written").parse::<Net>().expect("again"), net);
        assert!("bridge=vmbr0".parse::<Net>().is_err(), "no name");
        assert!("name=eth0,mtu=big".parse::<Net>().is_err());
        assert!("name=a,name=b".parse::<Net>().is_err());
        let evil = Net { name: "eth0".into(), bridge: Some("vmbr0,firewall=0".into()), ..Net::default() };
        assert!(evil.write().is_err());
    }

    #[test]
    fn volumes() {
        let v: Volume = "local-zfs:subvol-100-disk-0,size=8G".parse().expect("rootfs");
        assert_eq!((v.storage(), v.size.as_deref()), (Some("local-zfs"), Some("8G")));
        let v: Volume = "/mnt/x,mp=/data,ro=1,mountoptions=noatime;nodev".parse().expect("bind");
        assert_eq!((v.storage(), v.ro, v.mp.as_deref()), (None, Some(true), Some("/data")));
        assert_eq!(v.write().expect("written").parse::<Volume>().expect("again"), v);
        assert_eq!(Volume::allocate("local", 512).volume, "local:0.5");
        assert_eq!(Volume::allocate("local", 4096).volume, "local:4");
        assert!("size=8G".parse::<Volume>().is_err());
    }

    #[test]
    fn features_and_tags() {
        let f: Features = "nesting=1,mount=nfs;cifs".parse().expect("features");
        assert!(f.nesting && !f.keyctl && f.mount.len() == 2);
        assert_eq!(f.write().expect("written"), "mount=cifs;nfs,nesting=1");
        assert_eq!(Features::default().write().expect("written"), "");
        let t: Tags = "K8s;ns-default, k8s".parse().expect("tags");
        assert_eq!(t.to_string(), "k8s;ns-default");
        assert!(t.has("K8S"));
        assert!("-x".parse::<Tags>().is_err() && "a/b".parse::<Tags>().is_err());
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(pairs in proptest::collection::btree_map("[a-z][a-z0-9_-]{0,8}", "[ -+.-~]{0,12}", 0..6), value in proptest::option::of("[a-zA-Z0-9:/_.-]{1,20}")) {
            let mut p = Properties(pairs.into_iter().map(|(k, v)| (k, v.trim().to_owned())).collect());
            if let Some(value) = value { p.0.insert(String::new(), value); }
            let text = p.write().expect("clean values");
            prop_assert_eq!(text.parse::<Properties>().expect("read"), p);
        }

        #[test]
        fn no_text_panics(text in ".{0,80}") {
            let _ = text.parse::<Net>();
            let _ = text.parse::<Volume>();
            let _ = text.parse::<Features>();
            let _ = text.parse::<Tags>();
        }

        #[test]
        fn a_value_never_becomes_another_property(value in "[ -~]{0,20}") {
            let net = Net { name: "eth0".into(), bridge: Some(value.clone()), ..Net::default() };
            if let Ok(text) = net.write() {
                let again = text.parse::<Net>().expect("read");
                prop_assert_eq!(again.bridge.as_deref(), Some(value.trim()));
                prop_assert_eq!(again.firewall, None);
            }
        }
    }
}
