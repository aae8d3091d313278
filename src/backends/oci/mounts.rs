//! The mounts section: what every container has, the pod's own files, and what was asked for.

use oci_spec::runtime::{Mount, MountBuilder};

use super::{SpecInput, built, userns};
use crate::core::error::{Error, Kind, Result};
use crate::core::spec::{self, Propagation};

/// Mount options that may be asked for by name.
const OPTIONS: [&str; 12] = [
    "nosuid",
    "suid",
    "nodev",
    "dev",
    "noexec",
    "exec",
    "noatime",
    "atime",
    "nodiratime",
    "diratime",
    "relatime",
    "nosymfollow",
];

pub(super) fn plan(input: &SpecInput<'_>) -> Result<Vec<Mount>> {
    let wanted: Vec<String> = input.config.mounts.iter().map(|m| clean(&m.container_path)).collect();
    let asked = |path: &str| wanted.iter().any(|w| w == path);
    // What lies below a folder that is asked for would be made in the caller's own folder.
    let covered = |path: &str| wanted.iter().any(|w| path.strip_prefix(w.as_str()).is_some_and(|r| r.starts_with('/')));
    let mut mounts = base(input)?;
    mounts.retain(|m| !m.destination().to_str().is_some_and(asked));
    if !asked("/dev/shm") {
        let source = input.facts.shm.as_ref().map_or("/dev/shm", |s| s.as_str());
        mounts.push(mount("/dev/shm", "bind", source, &["rbind", "nosuid", "nodev", "noexec", "rw", "rprivate"])?);
    }
    let access = if input.config.security.readonly_rootfs { "ro" } else { "rw" };
    for (path, file) in [("/etc/hostname", "hostname"), ("/etc/hosts", "hosts"), ("/etc/resolv.conf", "resolv.conf")] {
        if !asked(path) && !covered(path) {
            mounts.push(mount(path, "bind", input.pod_dir.join(file).as_str(), &["rbind", "rprivate", access])?);
        }
    }
    for (m, source) in input.config.mounts.iter().zip(&input.mount_sources) {
        mounts.push(requested(input, m, source)?);
    }
    // Parents before what lies below them; equals keep their order, so that a later one wins.
    mounts.sort_by_key(|m| m.destination().components().count());
    Ok(mounts)
}

fn base(input: &SpecInput<'_>) -> Result<Vec<Mount>> {
    let privileged = input.config.security.privileged;
    let sys = if privileged { "rw" } else { "ro" };
    let terminals = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"].map(String::from);
    let terminals: Vec<String> = terminals.into_iter().chain(userns::tty_group(input)).collect();
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"])?,
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"])?,
        mount("/dev/pts", "devpts", "devpts", &terminals.iter().map(String::as_str).collect::<Vec<_>>())?,
    ];
    // It shows the IPC namespace of whoever mounts it: the pod's, or the host's.
    mounts.push(mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"])?);
    mounts.push(mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", sys])?);
    mounts.push(mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", sys])?);
    Ok(mounts)
}

fn requested(input: &SpecInput<'_>, m: &spec::Mount, source: &str) -> Result<Mount> {
    let named = |e: Error| e.context(format!("mount at {:?}", m.container_path));
    if !m.container_path.starts_with('/') {
        return Err(Error::invalid(format!(
            "mount at {:?}: the path in the container is not absolute",
            m.container_path
        )));
    }
    if clean(&m.container_path) == "/" {
        return Err(named(Error::invalid("it would be on the container's root")));
    }
    if m.container_path.split('/').any(|part| part == "..") {
        // Where links are on the way, only the image knows where that leads.
        return Err(named(Error::invalid("'..' in the path in the container")));
    }
    if m.image.is_some() {
        return volume(input, m, source).map_err(named);
    }
    let mut options = vec!["rbind"];
    options.push(match m.propagation {
        Propagation::Private => "rprivate",
        Propagation::HostToContainer => "rslave",
        Propagation::Bidirectional => "rshared",
    });
    match (m.recursive_read_only, m.readonly) {
        (true, true) => {
            if m.propagation != Propagation::Private {
                return Err(named(Error::invalid("a recursively read-only mount can't propagate")));
            }
            if !input.host.recursive_read_only {
                return Err(named(Error::new(
                    Kind::Unimplemented,
                    "the OCI runtime knows no recursively read-only mounts",
                )));
            }
            options.push("rro");
        }
        (true, false) => return Err(named(Error::invalid("recursively read-only, but not read-only"))),
        (false, true) => options.push("ro"),
        (false, false) => options.push("rw"),
    }
    for option in &m.options {
        match OPTIONS.iter().find(|o| *o == option) {
            Some(known) => options.push(known),
            None => return Err(named(Error::invalid(format!("mount option {option:?} is not known")))),
        }
    }
    let Some(user) = userns::of_mount(m).map_err(named)? else {
        return mount(&m.container_path, "bind", source, &options);
    };
    // All of it: what is mounted below must not belong to nobody.
    options.push("ridmap");
    let mut mount = mount(&m.container_path, "bind", source, &options)?;
    mount.set_uid_mappings(Some(userns::mappings(&user.uids)?));
    mount.set_gid_mappings(Some(userns::mappings(&user.gids)?));
    Ok(mount)
}

/// An image's folder: read-only, and nothing in it runs (KEP-4639). Its layers are idmapped already as the pod is.
fn volume(input: &SpecInput<'_>, m: &spec::Mount, source: &str) -> Result<Mount> {
    let mut options = vec!["rbind", "rprivate", "ro", "nosuid", "nodev", "noexec"];
    for option in &m.options {
        match OPTIONS.iter().find(|o| *o == option) {
            Some(&o) if !["suid", "dev", "exec"].contains(&o) => options.push(o),
            _ => return Err(Error::invalid(format!("mount option {option:?} is not possible with an image"))),
        }
    }
    // Its layers have the pod's id maps already.
    let pods = input.pod.config.security.namespaces.user.as_ref();
    if let Some(user) = userns::asked_of_mount(m)?
        && Some(&user) != pods
    {
        return Err(Error::new(Kind::Unimplemented, "an image volume can't have other ids than its pod"));
    }
    mount(&m.container_path, "bind", source, &options)
}

/// Whether any mount lets something out, and how far the root must let it.
pub(super) fn root_propagation(input: &SpecInput<'_>) -> Option<String> {
    let any = |p| input.config.mounts.iter().any(|m| m.propagation == p);
    if any(Propagation::Bidirectional) {
        Some("rshared".into())
    } else if any(Propagation::HostToContainer) {
        Some("rslave".into())
    } else {
        None
    }
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Result<Mount> {
    built(
        MountBuilder::default()
            .destination(destination)
            .typ(kind)
            .source(source)
            .options(options.iter().map(|o| o.to_string()).collect::<Vec<_>>())
            .build(),
    )
}

/// Without a trailing slash or doubled ones.
pub fn clean(path: &str) -> String {
    format!("/{}", path.split('/').filter(|p| !p.is_empty() && *p != ".").collect::<Vec<_>>().join("/"))
}
