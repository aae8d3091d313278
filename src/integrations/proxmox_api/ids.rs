//! Identifiers of the API as types: VMIDs, and UPIDs, which name tasks.
//!
//! Pure; parsed once at the edge.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer};

use super::lenient;

/// A guest's number, unique in a cluster and shared by containers and virtual machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
pub struct Vmid(u32);

impl Vmid {
    /// The lowest that Proxmox takes.
    pub const MIN: u32 = 100;
    /// The highest.
    pub const MAX: u32 = 999_999_999;

    /// Checked.
    pub fn new(n: u64) -> Result<Self, BadId> {
        u32::try_from(n)
            .ok()
            .filter(|n| (Self::MIN..=Self::MAX).contains(n))
            .map(Self)
            .ok_or_else(|| BadId(format!("{n} is not a VMID (100 to 999999999)")))
    }

    /// The number.
    pub fn get(self) -> u32 {
        self.0
    }
}

/// An identifier that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadId(String);

impl fmt::Display for Vmid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Vmid {
    type Err = BadId;

    fn from_str(text: &str) -> Result<Self, BadId> {
        let digits = !text.is_empty() && text.len() <= 9 && text.bytes().all(|b| b.is_ascii_digit());
        match text.parse() {
            Ok(n) if digits => Self::new(n),
            _ => Err(BadId(format!("{text:?} is not a VMID (100 to 999999999)"))),
        }
    }
}

impl<'de> Deserialize<'de> for Vmid {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Self::new(lenient::u64(d)?).map_err(serde::de::Error::custom)
    }
}

/// A task's name: `UPID:node:pid:pstart:starttime:type:id:user:`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(into = "String")]
pub struct Upid {
    text: String,
    node: String,
    kind: String,
    id: String,
    user: String,
    started: u64,
    /// When its process started, in ticks since the node's boot.
    ticks: u64,
}

impl Upid {
    /// The node it runs on.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// What it does: "vzcreate", "vzstart".
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// What it does it to: a VMID, or "".
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Who started it: `root@pam`, `lxcri@pve!node1`.
    pub fn user(&self) -> &str {
        &self.user
    }

    /// When it started, in seconds since 1970.
    pub fn started(&self) -> u64 {
        self.started
    }

    /// Grows with the time of its start, also within a second. Of one node's tasks.
    pub fn start_order(&self) -> (u64, u64) {
        (self.started, self.ticks)
    }

    /// As the API writes it.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl FromStr for Upid {
    type Err = BadId;

    fn from_str(text: &str) -> Result<Self, BadId> {
        let bad = || BadId(format!("{text:?} is not a task's id (UPID:...)"));
        let parts: Vec<&str> = text.split(':').collect();
        let [tag, node, pid, pstart, start, kind, id, user, end] = parts.as_slice() else { return Err(bad()) };
        let hex = |field: &str| u64::from_str_radix(field, 16).map_err(|_| bad());
        hex(pid)?;
        let ticks = hex(pstart)?;
        let started = hex(start)?;
        let word = |text: &str| text.chars().all(|c| c.is_ascii_graphic() && c != '/');
        let whole = *tag == "UPID" && end.is_empty() && !node.is_empty() && !kind.is_empty() && !user.is_empty();
        // A node's name ends up in a path.
        let named = node.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.'));
        if !whole || !named || ![kind, id, user].iter().all(|t| word(t)) || text.len() > 512 {
            return Err(bad());
        }
        let own = |text: &str| text.to_owned();
        Ok(Self { text: own(text), node: own(node), kind: own(kind), id: own(id), user: own(user), started, ticks })
    }
}

impl fmt::Display for Upid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl From<Upid> for String {
    fn from(upid: Upid) -> Self {
        upid.text
    }
}

impl<'de> Deserialize<'de> for Upid {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vmids() {
        assert_eq!("100".parse::<Vmid>().expect("lowest").get(), 100);
        assert_eq!(serde_json::from_str::<Vmid>("\"105\"").expect("text"), Vmid(105));
        for bad in ["", "99", "1000000000", "+100", "1e3", "-100", " 100", "abc"] {
            assert!(bad.parse::<Vmid>().is_err(), "{bad}");
        }
        assert!(Vmid::new(u64::MAX).is_err());
    }

    #[test]
    fn upids() {
        let text = "UPID:pve1:0000A1B2:01C2D3E4:65F0A0B0:vzcreate:100:lxcri@pve!node1:";
        let upid: Upid = text.parse().expect("a task");
        assert_eq!((upid.node(), upid.kind(), upid.id(), upid.user()), ("pve1", "vzcreate", "100", "lxcri@pve!node1"));
        assert_eq!((upid.started(), upid.to_string()), (0x65F0_A0B0, text.to_owned()));
        let later: Upid = text.replace("D3E4", "D3E5").parse().expect("a later one");
        assert!(upid.start_order() < later.start_order());
        let without: Upid = "UPID:pve1:0000A1B2:01C2D3E4:65F0A0B0:aptupdate::root@pam:".parse().expect("no id");
        assert_eq!(without.id(), "");
        for bad in [
            "",
            "UPID:",
            "UPID:../x:1:1:1:a:b:c:",
            "UPID:a:zz:1:1:a:b:c:",
            "UPID:a:1:1:1:a:b:c",
            "UPID:a:1:1:1:a/b:c:d:",
        ] {
            assert!(bad.parse::<Upid>().is_err(), "{bad}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(text in "(UPID:)?[a-zA-Z0-9:/@!.]{0,60}") {
            if let Ok(upid) = text.parse::<Upid>() {
                proptest::prop_assert_eq!(upid.as_str(), text.as_str());
            }
            let _ = text.parse::<Vmid>();
        }
    }
}
