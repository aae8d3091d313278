//! Sysctls of a pod: which names belong to its namespaces, and writing them from inside.
//!
//! Called by `netns::create` on its thread. A name that the kernel keeps for the whole node is refused before anything
//! is made; a value that the kernel refuses fails the create. Holds no state.

use std::fs::OpenOptions;
use std::io::{self, Write};

use camino::{Utf8Path, Utf8PathBuf};

use super::{NetnsError, Wanted, Which};

/// A sysctl that passed the check.
pub(super) struct Setting {
    which: Which,
    name: String,
    path: Utf8PathBuf,
    value: String,
}

impl Setting {
    /// Writes it from the namespace that the calling thread is in. `root`: the host's id of the namespace's root, where
    /// a user namespace owns it.
    pub(super) fn write(&self, root: Option<u32>) -> Result<(), NetnsError> {
        match root {
            // The kernel takes IPC sysctls from that user alone, whatever the capabilities of others.
            Some(root) if self.which == Which::Ipc => as_user(root, || self.write_here()),
            _ => self.write_here(),
        }
    }

    fn write_here(&self) -> Result<(), NetnsError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => NetnsError::Sysctl {
                name: self.name.clone(),
                why: "this kernel has none of that name inside a pod's namespace".into(),
            },
            _ => NetnsError::SysctlValue { name: self.name.clone(), value: self.value.clone(), source },
        };
        let mut file = OpenOptions::new().write(true).open(&self.path).map_err(failed)?;
        file.write_all(self.value.as_bytes()).map_err(failed)
    }
}

/// Runs `work` with the calling thread's effective uid changed, which ends before this returns.
fn as_user<T>(uid: u32, work: impl FnOnce() -> Result<T, NetnsError>) -> Result<T, NetnsError> {
    use rustix::process::{Uid, dumpable_behavior, set_dumpable_behavior};
    use rustix::thread::set_thread_res_uid;
    // The kernel makes the whole process undumpable when a uid changes; core dumps of the daemon are wanted.
    let dumpable = dumpable_behavior();
    let own = rustix::process::geteuid();
    let change = |to: Uid| {
        set_thread_res_uid(None, to, None).map_err(|e| NetnsError::system(format!("become uid {}", to.as_raw()), e))
    };
    change(Uid::from_raw(uid))?;
    let done = work();
    change(own)?;
    if let Ok(dumpable) = dumpable {
        let _ = set_dumpable_behavior(dumpable);
    }
    done
}

/// File of a sysctl that belongs to the pod, and the namespace that it belongs to.
///
/// As in sysctl(8): when the first separator is a slash, slashes separate and dots are part of names, else the other
/// way round. Only names that the kernel keeps per network or IPC namespace are taken.
pub fn sysctl_path(name: &str) -> Result<(Utf8PathBuf, Which), NetnsError> {
    let refuse = |why: &str| NetnsError::Sysctl { name: name.to_owned(), why: why.to_owned() };
    let slashes = name.find(['.', '/']).is_some_and(|at| name.as_bytes()[at] == b'/');
    let path: String = match slashes {
        true => name.to_owned(),
        false => name.chars().map(|c| [c, '/', '.'][usize::from(c == '.') + 2 * usize::from(c == '/')]).collect(),
    };
    if path.split('/').any(|part| part.is_empty() || part == "." || part == "..") || path.contains('\0') {
        return Err(refuse("not the name of a sysctl"));
    }
    let ipc = |rest: &str| rest == "sem" || rest.starts_with("shm") || rest.starts_with("msg");
    let which = if path.starts_with("net/") {
        Which::Net
    } else if path.starts_with("fs/mqueue/") || path.strip_prefix("kernel/").is_some_and(ipc) {
        Which::Ipc
    } else {
        return Err(refuse("not kept per pod by the kernel: setting it would change the whole node"));
    };
    Ok((Utf8Path::new("/proc/sys").join(path), which))
}

pub(super) fn check_sysctls(wanted: &Wanted) -> Result<Vec<Setting>, NetnsError> {
    let one = |(name, value): (&String, &String)| {
        let (path, which) = sysctl_path(name)?;
        let own = if which == Which::Net { wanted.net } else { wanted.ipc };
        if !own {
            let why = format!("the pod uses the host's {} namespace", which.file());
            return Err(NetnsError::Sysctl { name: name.clone(), why });
        }
        Ok(Setting { which, name: name.clone(), path, value: value.clone() })
    };
    wanted.sysctls.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctl_names() {
        let path = |name| sysctl_path(name).map(|(p, w)| (p.into_string(), w)).ok();
        let net = |p: &str| Some((format!("/proc/sys/{p}"), Which::Net));
        let ipc = |p: &str| Some((format!("/proc/sys/{p}"), Which::Ipc));
        assert_eq!(path("net.ipv4.ip_forward"), net("net/ipv4/ip_forward"));
        assert_eq!(path("net/ipv4/conf/eth0.1/forwarding"), net("net/ipv4/conf/eth0.1/forwarding"));
        assert_eq!(path("net.ipv4.conf.eth0/1.forwarding"), net("net/ipv4/conf/eth0.1/forwarding"));
        assert_eq!(path("kernel.shm_rmid_forced"), ipc("kernel/shm_rmid_forced"));
        assert_eq!(path("kernel.sem"), ipc("kernel/sem"));
        assert_eq!(path("fs.mqueue.msg_max"), ipc("fs/mqueue/msg_max"));
        for bad in [
            "",
            "net",
            "kernel.panic",
            "vm.swappiness",
            "net//../../etc",
            "net/../kernel/panic",
            "/net/x",
            "net.a..b",
            "kernel.semx",
        ] {
            assert!(matches!(sysctl_path(bad), Err(NetnsError::Sysctl { .. })), "{bad}");
        }
    }
}
