//! What callers of `netns` say and hear: kinds of namespaces, what a pod wants, where it is pinned, what failed.
//!
//! Pure data.

use std::collections::BTreeMap;
use std::io;

use camino::Utf8PathBuf;
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use crate::core::error::{Error, Kind};
use crate::core::spec::UserNamespace;
use crate::integrations::mounts::MountError;

/// Kinds of namespaces that a pod shares among its containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Which {
    /// Network.
    Net,
    /// System V and POSIX message queues, semaphores, shared memory.
    Ipc,
    /// Hostname.
    Uts,
    /// Processes; pinned from the pod's init, never made here.
    Pid,
    /// Users; owns the others.
    User,
}

impl Which {
    pub(super) const ALL: [Self; 5] = [Self::Net, Self::Ipc, Self::Uts, Self::Pid, Self::User];

    /// Name of its file in /proc/<pid>/ns.
    pub fn file(self) -> &'static str {
        match self {
            Self::Net => "net",
            Self::Ipc => "ipc",
            Self::Uts => "uts",
            Self::Pid => "pid",
            Self::User => "user",
        }
    }

    pub(super) fn flag(self) -> UnshareFlags {
        match self {
            Self::Net => UnshareFlags::NEWNET,
            Self::Ipc => UnshareFlags::NEWIPC,
            Self::Uts => UnshareFlags::NEWUTS,
            Self::Pid => UnshareFlags::NEWPID,
            Self::User => UnshareFlags::NEWUSER,
        }
    }

    pub(super) fn link_type(self) -> LinkNameSpaceType {
        match self {
            Self::Net => LinkNameSpaceType::Network,
            Self::Ipc => LinkNameSpaceType::InterProcessCommunication,
            Self::Uts => LinkNameSpaceType::HostNameAndNISDomainName,
            Self::Pid => LinkNameSpaceType::ProcessID,
            Self::User => LinkNameSpaceType::User,
        }
    }
}

/// Namespaces that a pod wants of its own, and what is set inside them.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// A network namespace, with `lo` up.
    pub net: bool,
    /// An IPC namespace.
    pub ipc: bool,
    /// A UTS namespace.
    pub uts: bool,
    /// A user namespace with these maps, which owns the others.
    pub user: Option<UserNamespace>,
    /// Set in the UTS namespace; "" leaves the host's name.
    pub hostname: String,
    /// Sysctls by name ("net.ipv4.ip_forward", or with slashes as separators), see [`sysctl_path`].
    pub sysctls: BTreeMap<String, String>,
}

impl Wanted {
    /// What is to be pinned.
    pub(super) fn list(&self) -> Vec<Which> {
        let all = [
            (Which::User, self.user.is_some()),
            (Which::Net, self.net),
            (Which::Ipc, self.ipc),
            (Which::Uts, self.uts),
        ];
        all.into_iter().filter(|(_, wanted)| *wanted).map(|(which, _)| which).collect()
    }
}

/// Where a pod's namespaces are pinned; None: it uses the host's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pinned {
    /// Network namespace.
    pub net: Option<Utf8PathBuf>,
    /// IPC namespace.
    pub ipc: Option<Utf8PathBuf>,
    /// UTS namespace.
    pub uts: Option<Utf8PathBuf>,
    /// Shared PID namespace.
    pub pid: Option<Utf8PathBuf>,
    /// User namespace.
    pub user: Option<Utf8PathBuf>,
}

/// Why namespaces could not be made, entered or taken away.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// A sysctl that is no pod's to set, or whose namespace the pod shares with the host.
    #[error("sysctl {name:?}: {why}")]
    Sysctl {
        /// As asked for.
        name: String,
        /// For a human.
        why: String,
    },
    /// The kernel did not take a sysctl's value.
    #[error("set sysctl {name} to {value:?}")]
    SysctlValue {
        /// As asked for.
        name: String,
        /// As asked for.
        value: String,
        /// EINVAL, EACCES.
        source: io::Error,
    },
    /// A hostname the kernel can't take (more than 64 bytes).
    #[error("hostname {0:?} is longer than 64 bytes or has a NUL byte")]
    Hostname(String),
    /// Id maps that are empty, overlap or overflow.
    #[error("id map {0} is empty, overlaps or overflows")]
    IdMap(String),
    /// A mount failed.
    #[error("pin a namespace")]
    Mount(#[from] MountError),
    /// A system call failed.
    #[error("{step}")]
    System {
        /// What was done, and to what.
        step: String,
        /// errno.
        source: io::Error,
    },
}

impl NetnsError {
    pub(super) fn system(step: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::System { step: step.into(), source: source.into() }
    }
}

impl From<NetnsError> for Error {
    fn from(e: NetnsError) -> Self {
        match e {
            NetnsError::Sysctl { .. } | NetnsError::Hostname(_) | NetnsError::IdMap(_) => Error::invalid(e.to_string()),
            NetnsError::SysctlValue { .. } => {
                let message = e.to_string();
                let NetnsError::SysctlValue { source, .. } = e else { return Error::invalid(message) };
                Error::because(Kind::InvalidArgument, message, source)
            }
            NetnsError::Mount(source) => Error::from(source).context("pin a namespace"),
            NetnsError::System { step, source } => Error::io(step, source),
        }
    }
}
