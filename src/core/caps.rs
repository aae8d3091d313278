//! Linux capabilities by name, as Kubernetes writes them ("NET_ADMIN") and as OCI does ("CAP_NET_ADMIN").
//!
//! Pure; unknown names are refused.

use super::error::{Error, Result};

/// All capabilities by number (linux/capability.h), without the CAP_ prefix.
pub const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// A set of capabilities, one bit each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CapSet(pub u64);

impl CapSet {
    /// Everything that this build knows.
    pub const ALL: Self = Self((1 << NAMES.len()) - 1);

    /// From names; unknown ones are refused.
    pub fn of<S: AsRef<str>>(names: &[S]) -> Result<Self> {
        names.iter().try_fold(Self(0), |set, n| Ok(Self(set.0 | 1 << parse(n.as_ref())?)))
    }

    /// Whether `name` (without CAP_) is in it.
    pub fn has(self, name: &str) -> bool {
        NAMES.iter().position(|n| *n == name).is_some_and(|i| self.0 >> i & 1 == 1)
    }

    /// What is in both.
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// OCI names ("CAP_CHOWN"), in order of number.
    pub fn oci_names(self) -> Vec<String> {
        NAMES.iter().enumerate().filter(|(i, _)| self.0 >> i & 1 == 1).map(|(_, n)| format!("CAP_{n}")).collect()
    }

    /// The set asked for: `base` (or everything, or nothing, with "ALL") plus `add` minus `drop`; single names win over ALL.
    pub fn adjusted(self, add: &[String], drop: &[String]) -> Result<Self> {
        let is_all = |n: &String| n.eq_ignore_ascii_case("ALL");
        let mut set = self;
        if add.iter().any(is_all) {
            set = Self::ALL;
        }
        if drop.iter().any(is_all) {
            set = Self(0);
        }
        let named = |list: &[String]| Self::of(&list.iter().filter(|n| !is_all(n)).collect::<Vec<_>>());
        Ok(Self((set.0 | named(add)?.0) & !named(drop)?.0))
    }
}

/// Number of a capability, by either form of its name in any case.
pub fn parse(name: &str) -> Result<u32> {
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
    match NAMES.iter().position(|n| *n == bare) {
        Some(i) => Ok(i as u32),
        None => Err(Error::invalid(format!("unknown capability {name:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_and_single_names() {
        let base = CapSet::of(&["CHOWN", "CAP_KILL"]).expect("names");
        let s = |v: &[&str]| v.iter().map(|s| s.to_string()).collect::<Vec<_>>();
        assert_eq!(
            base.adjusted(&s(&["NET_ADMIN"]), &s(&["chown"])).expect("set").oci_names(),
            ["CAP_KILL", "CAP_NET_ADMIN"]
        );
        assert_eq!(base.adjusted(&s(&["ALL"]), &[]).expect("set"), CapSet::ALL);
        assert_eq!(base.adjusted(&s(&["SYS_TIME"]), &s(&["ALL"])).expect("set").oci_names(), ["CAP_SYS_TIME"]);
        assert!(!base.adjusted(&s(&["ALL"]), &s(&["SYS_ADMIN"])).expect("set").has("SYS_ADMIN"));
        assert!(base.adjusted(&s(&["NO_SUCH"]), &[]).is_err());
    }
}
