//! System containers: whose program is an init (systemd, openrc, busybox), which wants a console, folders in memory, cgroups
//! of its own to write to, and to be stopped by its own signal.
//!
//! Called by `launch`; looks at the init in the root file system and changes nothing. What the pod asks for itself stays as it is.

use std::os::fd::{AsRawFd, OwnedFd};

use oci_spec::runtime::MountBuilder;
use rustix::fs::{Mode, OFlags};

use crate::backends::oci;
use crate::backends::pods::launch::Prepared;
use crate::core::backend::LaunchContext;
use crate::core::error::{Error, Result};
use crate::core::spec::{ContainerConfig, NamespaceMode};
use crate::utils::beneath;

/// Where distributions keep their init.
const FOLDERS: [&str; 6] = ["/sbin", "/usr/sbin", "/bin", "/usr/bin", "/lib/systemd", "/usr/lib/systemd"];
/// What it is called.
const NAMES: [&str; 3] = ["init", "systemd", "openrc-init"];
/// By these an init powers off, by the name of its program; an image or a pod that names a signal itself is heard.
const HALT: [(&str, i32); 3] = [
    // SIGRTMIN + 3
    ("systemd", 37),
    ("busybox", libc::SIGUSR2),
    ("openrc-init", libc::SIGTERM),
];
/// What it needs to power off, which ends its PID namespace and nothing else.
const BOOT: &str = "SYS_BOOT";
/// Folders that begin empty at each boot, and their modes.
const MEMORY: [(&str, &str); 3] = [("/run", "mode=755"), ("/run/lock", "mode=755"), ("/tmp", "mode=1777")];

/// Whether a program is an init.
pub fn is_init(args: &[String]) -> bool {
    let parts = args.first().and_then(|program| program.rsplit_once('/'));
    parts.is_some_and(|(folder, name)| FOLDERS.contains(&folder) && NAMES.contains(&name))
}

/// By which signal a program of that name powers off; SysV's init and others by SIGPWR, which liblxc sends, too.
fn halt_signal(program: &str) -> i32 {
    HALT.iter().find(|(name, _)| *name == program).map_or(libc::SIGPWR, |(_, signal)| *signal)
}

/// The name of what a path in the root file system leads to.
fn real_name(rootfs: OwnedFd, path: &str) -> Option<String> {
    let root = beneath::Root::from_fd(rootfs);
    let file = root.open_at(path.trim_start_matches('/'), OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let real = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
    Some(real.file_name()?.to_str()?.to_owned())
}

/// The container's configuration with what its init needs beside; None: it has it, or shall not have it.
pub fn with_boot(config: &ContainerConfig) -> Option<ContainerConfig> {
    let security = &config.security;
    let names =
        |list: &[String]| list.iter().any(|c| matches!(c.to_uppercase().trim_start_matches("CAP_"), "ALL" | BOOT));
    let own_pids = security.namespaces.pid == NamespaceMode::Container;
    if security.privileged || !own_pids || names(&security.add_capabilities) || names(&security.drop_capabilities) {
        return None;
    }
    let mut config = config.clone();
    config.security.add_capabilities.push(BOOT.into());
    Some(config)
}

/// Gives it what it wants. Blocks shortly.
pub fn prepare(prepared: &mut Prepared, context: &LaunchContext<'_>, program: &str) -> Result<()> {
    if context.config.stop_signal.is_none() && context.image.config.stop_signal.is_empty() {
        let rootfs = context.rootfs.try_clone_to_owned().map_err(|e| Error::io("duplicate a descriptor", e))?;
        prepared.stop_signal = halt_signal(&real_name(rootfs, program).unwrap_or_default());
    }
    let mut mounts = prepared.spec.mounts().clone().unwrap_or_default();
    for (path, mode) in MEMORY {
        // Before what is mounted below it.
        if !mounts.iter().any(|m| m.destination().to_str() == Some(path)) {
            let options = ["nosuid", "nodev", mode].map(String::from).to_vec();
            let mount = MountBuilder::default().destination(path).typ("tmpfs").source("tmpfs").options(options);
            mounts.push(oci::built(mount.build())?);
        }
    }
    mounts.sort_by_key(|m| m.destination().components().count());
    prepared.spec.set_mounts(Some(mounts));
    if let Some(mut process) = prepared.spec.process().clone() {
        let mut env = process.env().clone().unwrap_or_default();
        // By this systemd knows where it is.
        if !env.iter().any(|line| line.starts_with("container=")) {
            env.push("container=lxc".into());
        }
        process.set_env(Some(env));
        prepared.spec.set_process(Some(process));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inits_are_known_by_their_path() {
        let is = |program: &str| is_init(&[program.to_owned()]);
        for init in ["/sbin/init", "/lib/systemd/systemd", "/usr/lib/systemd/systemd", "/sbin/openrc-init"] {
            assert!(is(init), "{init}");
        }
        for other in ["init", "/app/init", "/sbin/tini", "/bin/sh", "", "/usr/bin/dumb-init"] {
            assert!(!is(other), "{other}");
        }
        assert!(!is_init(&[]));
    }

    #[test]
    fn the_program_behind_the_name_says_how_it_ends() {
        let temp = tempfile::tempdir().unwrap();
        for folder in ["sbin", "bin", "lib/systemd"] {
            std::fs::create_dir_all(temp.path().join(folder)).unwrap();
        }
        for (file, signal) in [("lib/systemd/systemd", 37), ("bin/busybox", libc::SIGUSR2), ("bin/own", libc::SIGPWR)] {
            std::fs::File::create(temp.path().join(file)).unwrap();
            let link = temp.path().join("sbin/init");
            let _ = std::fs::remove_file(&link);
            // From the root of the image, not of the node.
            std::os::unix::fs::symlink(format!("/{file}"), &link).unwrap();
            let root = || OwnedFd::from(std::fs::File::open(temp.path()).unwrap());
            assert_eq!(halt_signal(&real_name(root(), "/sbin/init").unwrap()), signal, "{file}");
            assert_eq!(real_name(root(), "/no/init"), None);
        }
    }
}
