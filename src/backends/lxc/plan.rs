//! From an OCI spec to what liblxc and the container's first process are told.
//!
//! Pure: what must be looked up is in [`Input`]. liblxc gets namespaces, root file system, mounts, cgroup and seccomp; the
//! process itself (user, capabilities, limits, labels, terminal) is for our own first process, in all versions of liblxc
//! alike. What neither can do is refused by name.

use std::collections::{BTreeMap, BTreeSet};

use camino::{Utf8Path, Utf8PathBuf};
use lxcri_lxc::plan::{Limit, Node, Plan};
use oci_spec::runtime::{
    Capabilities, Hooks, LinuxCapabilities, LinuxDevice, LinuxDeviceType, LinuxNamespaceType, Mount, PosixRlimitType,
    Process, Spec,
};

use super::lines::Lines;
use super::{limits, seccomp};
use crate::core::caps::CapSet;
use crate::core::error::{Error, Kind, Result};

/// Everything that a configuration is made from.
pub struct Input<'a> {
    /// The container.
    pub spec: &'a Spec,
    /// Where its root file system is mounted.
    pub rootfs: &'a Utf8Path,
    /// Its cgroup, from the hierarchies' roots.
    pub cgroup: &'a Utf8Path,
    /// Cgroup of the process that liblxc runs in.
    pub holder_cgroup: &'a Utf8Path,
    /// Group below which liblxc leaves that process when the container has ended.
    pub pivot: &'a Utf8Path,
    /// Folder for mounts that the helper makes.
    pub stage: &'a Utf8Path,
    /// File of the seccomp policy.
    pub seccomp: Option<&'a Utf8Path>,
    /// cgroup v2 alone.
    pub cgroup_v2: bool,
    /// The kernel has AppArmor on.
    pub apparmor: bool,
    /// Folder where lxcfs is mounted, if it runs.
    pub lxcfs: Option<&'a Utf8Path>,
    /// Its entry point is an init: a system container.
    pub system: bool,
    /// The node's network namespace: liblxc itself is in another one.
    pub node_net: &'a str,
    /// Asks the memory cgroup for its last count.
    pub kills: Option<Kills<'a>>,
    /// Whether a path of the node is a folder.
    pub is_folder: &'a dyn Fn(&str) -> bool,
    /// Destinations whose mount points are there: liblxc must not make them.
    pub made: &'a BTreeSet<String>,
    /// Masked and read-only paths that are there in a volume, and whether they are folders.
    pub closed: &'a BTreeMap<String, bool>,
    /// The pod's own /dev/shm on the node.
    pub shm: Option<&'a Utf8Path>,
}

/// What liblxc runs between a container's end and the removal of its group.
#[derive(Debug, Clone, Copy)]
pub struct Kills<'a> {
    /// The helper.
    pub helper: &'a Utf8Path,
    /// Folder of the group.
    pub group: &'a Utf8Path,
    /// Where the count goes.
    pub file: &'a Utf8Path,
}

/// Flags that take something away.
const FLAGS: [&str; 7] = ["nosuid", "nodev", "noexec", "noatime", "nodiratime", "nosymfollow", "relatime"];
/// Numbers of those in mount_setattr(2), for what liblxc has no way to ask for.
fn attribute(flag: &str) -> Option<u64> {
    Some(match flag {
        "ro" | "rro" => libc::MOUNT_ATTR_RDONLY,
        "nosuid" => libc::MOUNT_ATTR_NOSUID,
        "nodev" => libc::MOUNT_ATTR_NODEV,
        "noexec" => libc::MOUNT_ATTR_NOEXEC,
        "noatime" => libc::MOUNT_ATTR_NOATIME,
        "nodiratime" => libc::MOUNT_ATTR_NODIRATIME,
        "nosymfollow" => libc::MOUNT_ATTR_NOSYMFOLLOW,
        _ => return None,
    })
}

/// A mount that the helper makes with its flags, for liblxc to take it from there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Staged {
    /// Where it is from.
    pub source: String,
    /// Where liblxc takes it.
    pub place: Utf8PathBuf,
    /// Flags for mount_setattr(2).
    pub attributes: u64,
    /// Of everything that is mounted below, too.
    pub recursive: bool,
    /// The ids in it are those of this user namespace.
    pub idmap: Option<String>,
}

/// Size of /dev in bytes, as other runtimes make it; liblxc's own is 500 KB.
const DEV_SIZE: &str = "67108864";

/// Device nodes that liblxc makes in each /dev of its own, and their numbers.
const OWN_NODES: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// The files of lxcfs.
const LXCFS: [&str; 6] = ["cpuinfo", "diskstats", "meminfo", "stat", "swaps", "uptime"];

/// liblxc's configuration, and the mounts that the helper has to make first.
pub fn configuration(input: &Input<'_>) -> Result<(String, Vec<Staged>)> {
    let mut staged = Vec::new();
    let mut lines = Lines::default();
    let linux = input.spec.linux().clone().unwrap_or_default();
    if input.spec.hooks().as_ref().is_some_and(|hooks| *hooks != Hooks::default()) {
        let why = "hooks (of a CDI device, or of runtime.hooks_dirs): liblxc runs no OCI hooks (its own get no state of the container)";
        return Err(Error::new(Kind::Unimplemented, why));
    }
    if linux.intel_rdt().is_some() {
        return Err(Error::new(
            Kind::Unimplemented,
            "a class of Intel RDT (of an annotation, a plugin or a CDI device): liblxc knows none",
        ));
    }
    let root = input.spec.root().clone().unwrap_or_default();
    lines.put("lxc.rootfs.path", &format!("dir:{}", input.rootfs))?;
    // The folder is every container's, and no tool of liblxc's may remove it.
    lines.put("lxc.rootfs.managed", "0")?;
    if root.readonly().unwrap_or(false) {
        lines.put("lxc.rootfs.options", "ro")?;
    }
    if linux.rootfs_propagation().as_deref() == Some("rshared") {
        return Err(Error::new(
            Kind::Unimplemented,
            "a Bidirectional mount: liblxc makes all mounts of a container dependent on the node's",
        ));
    }
    // Streams are the descriptors that we give; terminals are made inside.
    lines.put("lxc.console.path", "none")?;
    lines.put("lxc.tty.max", "0")?;
    // The container outlives the process that liblxc runs in.
    lines.put("lxc.monitor.signal.pdeath", "0")?;
    namespaces(&linux, input.cgroup_v2, input.node_net, &mut lines)?;
    for (kind, map) in [('u', linux.uid_mappings()), ('g', linux.gid_mappings())] {
        for m in map.iter().flatten() {
            lines.put("lxc.idmap", &format!("{kind} {} {} {}", m.container_id(), m.host_id(), m.size()))?;
        }
    }
    let Dev { own: own_dev, terminals } = mounts(input, &linux, &mut lines, &mut staged)?;
    lines.put("lxc.autodev", if own_dev { "1" } else { "0" })?;
    if own_dev {
        lines.put("lxc.autodev.tmpfs.size", DEV_SIZE)?;
    }
    lines.put("lxc.pty.max", if own_dev && terminals { "1024" } else { "0" })?;
    lines.put("lxc.cgroup.dir.container", input.cgroup.as_str())?;
    lines.put("lxc.cgroup.dir.monitor", input.holder_cgroup.as_str())?;
    lines.put("lxc.cgroup.dir.monitor.pivot", input.pivot.as_str())?;
    if let Some(resources) = linux.resources() {
        let prefix = if input.cgroup_v2 { "lxc.cgroup2" } else { "lxc.cgroup" };
        for (allow, rule) in limits::devices(resources.devices().as_deref().unwrap_or_default(), true) {
            lines.put(&format!("{prefix}.devices.{}", if allow { "allow" } else { "deny" }), &rule)?;
        }
        for (file, value) in limits::settings(resources, input.cgroup_v2)? {
            lines.put(&format!("{prefix}.{file}"), &value)?;
        }
    }
    // In version 0 hooks get arguments of liblxc's beside their own.
    lines.put("lxc.hook.version", "1")?;
    // liblxc takes a first process that ends by SIGHUP, as reboot(2) makes it, for one to be started again. Whether it is started
    // again is the kubelet's to say; this hook's failure stops it.
    lines.put("lxc.hook.post-stop", "/usr/bin/test \"$LXC_TARGET\" != reboot")?;
    if let Some(Kills { helper, group, file }) = input.kills {
        let [helper, group, file] = [helper, group, file].map(|path| for_shell(path.as_str()));
        // A shell's words, in front of which liblxc puts `exec`. Quotes at both ends of the line would be lost.
        lines.put("lxc.hook.stop", &format!("{helper} kills {group} {file} --"))?;
    }
    if let Some(policy) = input.seccomp {
        lines.put("lxc.seccomp.profile", policy.as_str())?;
    }
    if input.apparmor {
        // The first process sets the label of the program.
        lines.put("lxc.apparmor.profile", "unconfined")?;
    }
    let process = input.spec.process().clone().unwrap_or_default();
    if process.no_new_privileges().unwrap_or(false) {
        lines.put("lxc.no_new_privs", "1")?;
    }
    Ok((lines.finish(), staged))
}

/// One word of a shell's, whatever is in it.
fn for_shell(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

fn namespaces(linux: &oci_spec::runtime::Linux, cgroup_v2: bool, node_net: &str, lines: &mut Lines) -> Result<()> {
    let all = linux.namespaces().clone().unwrap_or_default();
    let find = |kind| all.iter().find(|n| n.typ() == kind);
    let mut keep = Vec::new();
    for (kind, word) in [
        (LinuxNamespaceType::Network, "net"),
        (LinuxNamespaceType::Ipc, "ipc"),
        (LinuxNamespaceType::Uts, "uts"),
        (LinuxNamespaceType::Pid, "pid"),
        (LinuxNamespaceType::User, "user"),
        (LinuxNamespaceType::Cgroup, "cgroup"),
    ] {
        match (find(kind), word) {
            (Some(found), _) => {
                if let Some(path) = found.path() {
                    let path = path.to_str().ok_or_else(|| Error::invalid("a namespace's path is not UTF-8"))?;
                    lines.put(&format!("lxc.namespace.share.{word}"), path)?;
                }
            }
            // On v1 the spec never asks for one, which liblxc's mounts of the hierarchies go by.
            (None, "cgroup") if !cgroup_v2 => {}
            (None, "net") => lines.put("lxc.namespace.share.net", node_net)?,
            (None, word) => keep.push(word),
        }
    }
    // Whatever is in no list is made anew, time among it.
    keep.push("time");
    lines.put("lxc.namespace.keep", &keep.join(" "))
}

/// What of /dev is liblxc's to make.
struct Dev {
    own: bool,
    /// Nothing else was asked for at /dev/pts.
    terminals: bool,
}

/// Mount entries.
fn mounts(
    input: &Input<'_>,
    linux: &oci_spec::runtime::Linux,
    lines: &mut Lines,
    staged: &mut Vec<Staged>,
) -> Result<Dev> {
    let list = input.spec.mounts().clone().unwrap_or_default();
    let text = |m: &Mount| m.destination().to_str().map(str::to_owned);
    let own_dev = list.iter().any(|m| m.typ().as_deref() == Some("tmpfs") && text(m).as_deref() == Some("/dev"));
    let terminals = list.iter().any(|m| m.typ().as_deref() == Some("devpts") && text(m).as_deref() == Some("/dev/pts"));
    for m in &list {
        let place = text(m).ok_or_else(|| Error::invalid("a mount's place is not UTF-8"))?;
        not_through_links_of_proc("mount", &place)?;
        let kind = m.typ().clone().unwrap_or_else(|| "bind".into());
        let options = m.options().clone().unwrap_or_default();
        match (kind.as_str(), place.as_str()) {
            ("tmpfs", "/dev") => {}
            ("devpts", "/dev/pts") if own_dev => {}
            // liblxc takes one away, and mounts another only together with a new /dev/ptmx, which here would be the node's: two of
            // them, so that one is left.
            ("devpts", "/dev/pts") => {
                let words: Vec<&str> = options.iter().map(String::as_str).collect();
                lines.mount("devpts", &place, "devpts", &words)?;
                lines.mount("devpts", &place, "devpts", &words)?;
            }
            // With the node's cgroup namespace the node's groups are seen, as with other runtimes. On v2 liblxc mounts groups only
            // in one of the container's own.
            ("cgroup", _) if input.cgroup_v2 && !has_own(linux, LinuxNamespaceType::Cgroup) => {
                let access = if options.iter().any(|o| o == "ro") { "ro" } else { "rw" };
                lines.mount("/sys/fs/cgroup", &place, "none", &["rbind", access])?;
            }
            ("cgroup", _) => cgroups(input, &options, lines)?,
            // As above, of whatever is there.
            ("bind", "/dev/pts") => {
                bind(input, m, &place, &options, lines, staged)?;
                bind(input, m, &place, &options, lines, staged)?;
            }
            ("bind", _) => bind(input, m, &place, &options, lines, staged)?,
            (kind, _) => {
                // sysfs and its like are one for all containers of a pod's namespace, and read-only for all of them if the first
                // of them mounts them so: it is the mount that has to be.
                let closes = kind != "tmpfs" && options.iter().any(|o| o == "ro");
                let mut words: Vec<&str> =
                    options.iter().map(String::as_str).filter(|o| !(closes && *o == "ro")).collect();
                if !input.made.contains(&place) {
                    words.push("create=dir");
                }
                lines.mount(kind, &place, kind, &words)?;
                if closes {
                    read_only(&place, lines)?;
                }
            }
        }
    }
    for (what, paths, whole) in [
        ("masked", linux.masked_paths(), &["", "/proc", "/sys", "/dev"][..]),
        ("read-only", linux.readonly_paths(), &["", "/dev"]),
    ] {
        // Of "/" nothing is left.
        let is_whole = |path: &&String| whole.contains(&path.trim_end_matches('/'));
        if let Some(path) = paths.iter().flatten().find(is_whole) {
            return Err(Error::new(
                Kind::Unimplemented,
                format!("{what} path {path:?}: liblxc can't close all of that, which it needs itself"),
            ));
        }
    }
    // Before what is masked: their places are among it, if that is asked for.
    if let Some(folder) = input.lxcfs {
        let taken = |path: &str| list.iter().any(|m| text(m).as_deref() == Some(path));
        for file in LXCFS.iter().filter(|f| !taken(&format!("/proc/{f}"))) {
            lines.mount(
                folder.join("proc").join(file).as_str(),
                &format!("proc/{file}"),
                "none",
                &["bind", "optional"],
            )?;
        }
    }
    for path in linux.masked_paths().iter().flatten() {
        not_through_links_of_proc("masked path", path)?;
        if let Some(folder) = input.closed.get(path) {
            // In a volume, whose users may put a link there yet: liblxc fails then.
            match folder {
                true => lines.mount("tmpfs", path, "tmpfs", &["ro", "nosuid", "nodev", "noexec", "size=0k"])?,
                false => lines.mount("/dev/null", path, "none", &["bind", "ro"])?,
            }
            continue;
        }
        // One of them fits what the container has there, which may be no folder where the node has one.
        // Read-only: it is the node's, and its mode and owner would be the container's to change.
        lines.mount("/dev/null", path, "none", &["bind", "ro", "optional"])?;
        lines.mount("tmpfs", path, "tmpfs", &["ro", "nosuid", "nodev", "noexec", "size=0k", "optional"])?;
    }
    for path in linux.readonly_paths().iter().flatten() {
        not_through_links_of_proc("read-only path", path)?;
        match input.closed.contains_key(path) {
            true => read_only(path, lines)?,
            false => {
                let words = ["rbind", "ro", "relative", "optional"];
                lines.mount(path.trim_start_matches('/'), path, "none", &words)?;
            }
        }
    }
    Ok(Dev { own: own_dev, terminals })
}

/// What is there becomes read-only by a mount of its own.
fn read_only(path: &str, lines: &mut Lines) -> Result<()> {
    lines.mount(path.trim_start_matches('/'), path, "none", &["rbind", "ro", "relative"])
}

/// liblxc mounts through no link, and of these there is none in an image.
fn not_through_links_of_proc(what: &str, path: &str) -> Result<()> {
    const LINKS: [&str; 4] = ["self", "thread-self", "net", "mounts"];
    let mut parts = path.split('/').filter(|part| !part.is_empty() && *part != ".");
    if parts.next() == Some("proc") && parts.next().is_some_and(|part| LINKS.contains(&part)) {
        let why = format!("{what} {path:?}: a link of the kernel's is on its way, and liblxc mounts through none");
        return Err(Error::new(Kind::Unimplemented, why));
    }
    Ok(())
}

fn has_own(linux: &oci_spec::runtime::Linux, kind: LinuxNamespaceType) -> bool {
    linux.namespaces().iter().flatten().any(|n| n.typ() == kind)
}

fn cgroups(input: &Input<'_>, options: &[String], lines: &mut Lines) -> Result<()> {
    let ro = options.iter().any(|o| o == "ro") && !input.system;
    lines.put("lxc.mount.auto", if ro { "cgroup:ro:force" } else { "cgroup:rw:force" })
}

fn bind(
    input: &Input<'_>,
    m: &Mount,
    place: &str,
    options: &[String],
    lines: &mut Lines,
    staged: &mut Vec<Staged>,
) -> Result<()> {
    let source = m.source().as_ref().and_then(|s| s.to_str()).unwrap_or_default();
    let create = match (input.made.contains(place), (input.is_folder)(source)) {
        (true, _) => None,
        (false, true) => Some("create=dir"),
        (false, false) => Some("create=file"),
    };
    let has = |word: &str| options.iter().any(|o| o == word);
    let flags = FLAGS.iter().any(|flag| has(flag));
    let idmap = if has("ridmap") || has("idmap") { Some(own_users(input, m, place)?) } else { None };
    // liblxc mounts as who is root inside, and folders of the node may be closed to that.
    let linux = input.spec.linux().as_ref();
    let closed = linux.and_then(|l| l.uid_mappings().as_ref()).is_some_and(|maps| !maps.is_empty());
    // liblxc sets flags of a bind mount only together with `ro`, and never of what is mounted below. The pod's own /dev/shm
    // has its flags where it comes from; the node's has not.
    let of_pod = input.shm.is_some_and(|shm| shm == source) && place == "/dev/shm";
    if !closed && idmap.is_none() && !has("rro") && (!flags || has("ro") || of_pod) {
        let words: Vec<&str> = options.iter().map(String::as_str).chain(create).collect();
        return lines.mount(source, place, "none", &words);
    }
    let at = input.stage.join(staged.len().to_string());
    let attributes = options.iter().filter_map(|o| attribute(o)).fold(0, |all, one| all | one);
    let recursive = has("rro") || has("ridmap");
    staged.push(Staged { source: source.to_owned(), place: at.clone(), attributes, recursive, idmap });
    let done = |o: &&str| attribute(o).is_some() || matches!(*o, "rw" | "ridmap" | "idmap");
    let words: Vec<&str> = options.iter().map(String::as_str).filter(|o| !done(o)).chain(create).collect();
    lines.mount(at.as_str(), place, "none", &words)
}

/// The container's user namespace, for a mount that has its ids.
fn own_users(input: &Input<'_>, m: &Mount, place: &str) -> Result<String> {
    let linux = input.spec.linux().as_ref();
    let (uids, gids) = linux.map_or((&None, &None), |l| (l.uid_mappings(), l.gid_mappings()));
    if m.uid_mappings() != uids || m.gid_mappings() != gids {
        return Err(Error::new(
            Kind::Unimplemented,
            format!("mount at {place:?}: it can't have other ids than its pod"),
        ));
    }
    let users = linux.and_then(|l| l.namespaces().as_ref()?.iter().find(|n| n.typ() == LinuxNamespaceType::User));
    let path = users.and_then(|n| n.path().as_ref()?.to_str());
    path.map(str::to_owned).ok_or_else(|| Error::internal(format!("mount at {place:?}: no user namespace")))
}

/// The container's process.
pub fn process(spec: &Spec, process: &Process) -> Result<Plan> {
    let user = process.user();
    let set = |names: &Capabilities| CapSet::of(&names.iter().map(ToString::to_string).collect::<Vec<_>>());
    let caps = process.capabilities().as_ref();
    let bits = |of: fn(&LinuxCapabilities) -> &Option<Capabilities>| {
        caps.and_then(|caps| of(caps).as_ref()).map_or(Ok(CapSet(0)), set)
    };
    let linux = spec.linux().clone().unwrap_or_default();
    let inside = linux.uid_mappings().as_ref().is_some_and(|m| !m.is_empty());
    let devices = linux.devices().clone().unwrap_or_default();
    if inside && let Some(device) = devices.first() {
        return Err(Error::new(
            Kind::Unimplemented,
            format!("device {} in a user namespace: liblxc can make no device nodes there", device.path().display()),
        ));
    }
    let read_only = spec.root().as_ref().is_some_and(|r| r.readonly().unwrap_or(false));
    let nodes = devices.iter().map(node).collect::<Result<Vec<_>>>()?;
    for node in &nodes {
        if read_only && !node.path.starts_with("/dev/") {
            return Err(Error::new(
                Kind::Unimplemented,
                format!(
                    "device {}: with a read-only root liblxc's containers have devices below /dev alone",
                    node.path
                ),
            ));
        }
        let own = OWN_NODES.iter().find(|(path, ..)| *path == node.path);
        if own.is_some_and(|(_, major, minor)| (*major, *minor) != (node.major, node.minor)) {
            return Err(Error::new(
                Kind::Unimplemented,
                format!("device {}: liblxc makes that node itself, and another can't have its place", node.path),
            ));
        }
    }
    Ok(Plan {
        args: process.args().clone().unwrap_or_default(),
        env: process.env().clone().unwrap_or_default(),
        cwd: process.cwd().to_str().unwrap_or("/").to_owned(),
        uid: user.uid(),
        gid: user.gid(),
        groups: user.additional_gids().clone().unwrap_or_default(),
        bounding: bits(LinuxCapabilities::bounding)?.0,
        permitted: bits(LinuxCapabilities::permitted)?.0,
        inheritable: bits(LinuxCapabilities::inheritable)?.0,
        ambient: bits(LinuxCapabilities::ambient)?.0,
        no_new_privs: process.no_new_privileges().unwrap_or(false),
        architectures: linux.seccomp().as_ref().map(seccomp::architectures).unwrap_or_default(),
        limits: process
            .rlimits()
            .iter()
            .flatten()
            .map(|l| Limit { resource: number(l.typ()), soft: l.soft(), hard: l.hard() })
            .collect(),
        oom_score_adj: process.oom_score_adj(),
        apparmor: process.apparmor_profile().clone(),
        selinux: process.selinux_label().clone(),
        terminal: process.terminal().unwrap_or(false),
        nodes,
    })
}

fn node(device: &LinuxDevice) -> Result<Node> {
    let kind = match device.typ() {
        LinuxDeviceType::B => libc::S_IFBLK,
        LinuxDeviceType::P => libc::S_IFIFO,
        _ => libc::S_IFCHR,
    };
    let path = device.path().to_str().filter(|p| p.starts_with('/') && !p.split('/').any(|part| part == ".."));
    let path = path.ok_or_else(|| Error::invalid(format!("device {}: not a path", device.path().display())))?;
    let number = |n: i64| u32::try_from(n).map_err(|_| Error::invalid(format!("device {path}: number {n}")));
    Ok(Node {
        path: path.to_owned(),
        mode: kind | device.file_mode().unwrap_or(0o666) & 0o7777,
        major: number(device.major())?,
        minor: number(device.minor())?,
        uid: device.uid().unwrap_or(0),
        gid: device.gid().unwrap_or(0),
    })
}

fn number(kind: PosixRlimitType) -> u32 {
    match kind {
        PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::{LinuxBuilder, LinuxDeviceBuilder, LinuxNamespaceBuilder, MountBuilder, RootBuilder};
    use proptest::prelude::*;

    fn configured(spec: &Spec) -> Result<String> {
        staged(spec).map(|(text, _)| text)
    }

    fn staged(spec: &Spec) -> Result<(String, Vec<Staged>)> {
        configuration(&Input {
            spec,
            rootfs: "/run/x/rootfs/mnt".into(),
            cgroup: "kubepods/pod1/c1".into(),
            holder_cgroup: "holders/c1".into(),
            pivot: "holders".into(),
            stage: "/run/x/mounts".into(),
            seccomp: Some("/run/x/seccomp".into()),
            cgroup_v2: true,
            apparmor: false,
            lxcfs: Some("/var/lib/lxcfs".into()),
            system: false,
            node_net: "/proc/1/ns/net",
            kills: Some(Kills {
                helper: "/usr/libexec/helper".into(),
                group: "/sys/fs/cgroup/kubepods/pod1/c1".into(),
                file: "/run/x y/it's".into(),
            }),
            is_folder: &|path| !path.contains("file"),
            made: &BTreeSet::new(),
            closed: &BTreeMap::from([("/v/folder".into(), true), ("/v/f".into(), false)]),
            shm: Some("/shm".into()),
        })
    }

    fn bind_of(source: &str, place: &str, options: &[&str]) -> Mount {
        let options: Vec<String> = options.iter().map(ToString::to_string).collect();
        MountBuilder::default().source(source).destination(place).typ("bind").options(options).build().unwrap()
    }

    fn spec(mounts: Vec<Mount>) -> Spec {
        let joined = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Network).path("/run/netns/cni-1");
        let own = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Pid);
        let namespaces = vec![joined.build().unwrap(), own.build().unwrap()];
        let linux = LinuxBuilder::default()
            .namespaces(namespaces)
            .masked_paths(vec!["/proc/kcore-file".into(), "/proc/acpi".into()])
            .readonly_paths(vec!["/proc/sys".into()])
            .build()
            .unwrap();
        let mut spec = Spec::default();
        spec.set_linux(Some(linux));
        spec.set_mounts(Some(mounts));
        spec.set_root(Some(RootBuilder::default().path("/x").readonly(true).build().unwrap()));
        spec
    }

    #[test]
    fn what_is_asked_for_is_in_it() {
        let text = configured(&spec(vec![
            bind_of("/data/a b", "/mnt/x y", &["rbind", "rslave", "ro", "nosuid"]),
            bind_of("/etc/file", "/etc/hosts", &["rbind", "rprivate", "rw"]),
            bind_of("/shm", "/dev/shm", &["rbind", "nosuid", "rw", "rprivate"]),
        ]))
        .unwrap();
        for line in [
            "lxc.rootfs.path = dir:/run/x/rootfs/mnt",
            "lxc.rootfs.options = ro",
            "lxc.namespace.share.net = /run/netns/cni-1",
            "lxc.namespace.keep = ipc uts user cgroup time",
            "lxc.mount.entry = /data/a\\040b mnt/x\\040y none rbind,rslave,ro,nosuid,create=dir 0 0",
            "lxc.mount.entry = /etc/file etc/hosts none rbind,rprivate,rw,create=file 0 0",
            "lxc.mount.entry = /shm dev/shm none rbind,nosuid,rw,rprivate,create=dir 0 0",
            "lxc.mount.entry = /dev/null proc/kcore-file none bind,ro,optional 0 0",
            "lxc.mount.entry = proc/sys proc/sys none rbind,ro,relative,optional 0 0",
            "lxc.mount.entry = /var/lib/lxcfs/proc/meminfo proc/meminfo none bind,optional 0 0",
            "lxc.cgroup.dir.container = kubepods/pod1/c1",
            "lxc.monitor.signal.pdeath = 0",
            r"lxc.hook.stop = '/usr/libexec/helper' kills '/sys/fs/cgroup/kubepods/pod1/c1' '/run/x y/it'\''s' --",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\nis not in\n{text}");
        }
    }

    #[test]
    fn cgroups_are_liblxcs_in_a_namespace_of_their_own_and_mounted_by_us_in_the_nodes() {
        let groups = MountBuilder::default().source("cgroup").destination("/sys/fs/cgroup").typ("cgroup");
        let groups =
            groups.options(["nosuid", "noexec", "nodev", "relatime", "rw"].map(str::to_owned)).build().unwrap();
        let mut spec = spec(vec![groups]);
        let text = configured(&spec).unwrap();
        let entry = "lxc.mount.entry = /sys/fs/cgroup sys/fs/cgroup none rbind,rw 0 0";
        assert!(text.contains(entry) && !text.contains("lxc.mount.auto = cgroup"), "{text}");
        let mut linux = spec.linux().clone().unwrap();
        let own = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Cgroup).build().unwrap();
        linux.set_namespaces(Some(vec![own]));
        spec.set_linux(Some(linux));
        let text = configured(&spec).unwrap();
        assert!(text.contains("lxc.mount.auto = cgroup:rw:force") && !text.contains(entry), "{text}");
    }

    #[test]
    fn flags_that_liblxc_would_not_set_are_the_helpers() {
        let (text, staged) = staged(&spec(vec![
            bind_of("/a", "/b", &["rbind", "rprivate", "rro"]),
            bind_of("/c/file", "/d", &["rbind", "rslave", "rw", "noexec", "nosuid"]),
        ]))
        .unwrap();
        let both = libc::MOUNT_ATTR_NOEXEC | libc::MOUNT_ATTR_NOSUID;
        let of = |source: &str, n: &str, attributes, recursive| Staged {
            source: source.into(),
            place: Utf8Path::new("/run/x/mounts").join(n),
            attributes,
            recursive,
            idmap: None,
        };
        assert_eq!(staged, [of("/a", "0", libc::MOUNT_ATTR_RDONLY, true), of("/c/file", "1", both, false)]);
        for line in [
            "lxc.mount.entry = /run/x/mounts/0 b none rbind,rprivate,create=dir 0 0",
            "lxc.mount.entry = /run/x/mounts/1 d none rbind,rslave,create=file 0 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\nis not in\n{text}");
        }
    }

    #[test]
    fn what_liblxc_lacks_is_named() {
        let mut shared = spec(vec![]);
        let mut linux = shared.linux().clone().unwrap();
        linux.set_rootfs_propagation(Some("rshared".into()));
        shared.set_linux(Some(linux));
        assert!(configured(&shared).unwrap_err().chain().contains("Bidirectional"));
        let mut hooked = spec(vec![]);
        let mut hooks = Hooks::default();
        let hook = oci_spec::runtime::HookBuilder::default().path("/bin/x").build().unwrap();
        hooks.set_create_container(Some(vec![hook]));
        hooked.set_hooks(Some(hooks));
        assert!(configured(&hooked).is_err_and(|e| e.kind() == Kind::Unimplemented && e.chain().contains("hooks")));
        let mut classed = spec(vec![]);
        let mut linux = classed.linux().clone().unwrap();
        linux.set_intel_rdt(Some(oci_spec::runtime::LinuxIntelRdt::default()));
        classed.set_linux(Some(linux));
        assert!(configured(&classed).is_err_and(|e| e.kind() == Kind::Unimplemented && e.chain().contains("RDT")));
        for whole in ["/", "", "/proc", "/sys/"] {
            let mut masked = spec(vec![]);
            let mut linux = masked.linux().clone().unwrap();
            linux.set_masked_paths(Some(vec![whole.into()]));
            masked.set_linux(Some(linux));
            let e = configured(&masked).unwrap_err();
            assert!(e.kind() == Kind::Unimplemented && e.chain().contains("masked path"), "{e:?}");
        }
        for (path, minor, good) in
            [("/dev/x", 9, true), ("/etc/x", 9, false), ("/dev/null", 3, true), ("/dev/null", 5, false)]
        {
            let device = LinuxDeviceBuilder::default().path(path).typ(LinuxDeviceType::C).major(1).minor(minor);
            let mut with = spec(vec![]);
            let mut linux = with.linux().clone().unwrap();
            linux.set_devices(Some(vec![device.build().unwrap()]));
            with.set_linux(Some(linux));
            let planned = process(&with, &Process::default());
            assert_eq!(planned.is_ok(), good, "{path} {minor}");
            assert!(planned.err().is_none_or(|e| e.kind() == Kind::Unimplemented));
        }
    }

    #[test]
    fn a_dev_of_the_nodes_has_terminals_of_the_containers() {
        let pts = MountBuilder::default().source("devpts").destination("/dev/pts").typ("devpts");
        let pts = pts.options(["newinstance", "ptmxmode=0666"].map(str::to_owned)).build().unwrap();
        let dev = MountBuilder::default().source("tmpfs").destination("/dev").typ("tmpfs").build().unwrap();
        let entry = "lxc.mount.entry = devpts dev/pts devpts newinstance,ptmxmode=0666 0 0";
        let own = configured(&spec(vec![dev, pts.clone()])).unwrap();
        assert!(own.contains("lxc.pty.max = 1024") && !own.contains(entry), "{own}");
        let nodes = configured(&spec(vec![bind_of("/dev", "/dev", &["rbind"]), pts])).unwrap();
        assert!(nodes.contains("lxc.pty.max = 0") && nodes.matches(entry).count() == 2, "{nodes}");
    }

    fn closing(masked: &[&str], readonly: &[&str]) -> Spec {
        let mut closing = spec(vec![bind_of("/volume", "/v", &["rbind", "rw"])]);
        let mut linux = closing.linux().clone().unwrap();
        let texts = |list: &[&str]| Some(list.iter().map(ToString::to_string).collect::<Vec<_>>());
        linux.set_masked_paths(texts(masked)).set_readonly_paths(texts(readonly));
        closing.set_linux(Some(linux));
        closing
    }

    #[test]
    fn masks_are_over_what_else_is_mounted_and_in_volumes_they_may_not_fail() {
        let text = configured(&closing(&["/proc/meminfo", "/v/folder", "/v/f"], &["/v/f"])).unwrap();
        let at =
            |line: &str| text.lines().position(|l| l == line).unwrap_or_else(|| panic!("{line}\nis not in\n{text}"));
        let lxcfs = at("lxc.mount.entry = /var/lib/lxcfs/proc/meminfo proc/meminfo none bind,optional 0 0");
        assert!(lxcfs < at("lxc.mount.entry = /dev/null proc/meminfo none bind,ro,optional 0 0"));
        at("lxc.mount.entry = tmpfs v/folder tmpfs ro,nosuid,nodev,noexec,size=0k 0 0");
        at("lxc.mount.entry = /dev/null v/f none bind,ro 0 0");
        at("lxc.mount.entry = v/f v/f none rbind,ro,relative 0 0");
        for (masked, readonly) in
            [(&["/proc/self/environ"][..], &[][..]), (&["/proc//net/tcp"], &[]), (&[], &["/proc/mounts"])]
        {
            let e = configured(&closing(masked, readonly)).unwrap_err();
            assert!(e.kind() == Kind::Unimplemented && e.chain().contains("link of the kernel's"), "{e:?}");
        }
        let e = configured(&spec(vec![bind_of("/a", "/proc/self/environ", &["rbind"])])).unwrap_err();
        assert!(e.kind() == Kind::Unimplemented && e.chain().contains("/proc/self/environ"), "{e:?}");
    }

    #[test]
    fn a_read_only_sysfs_is_so_by_its_mount_alone() {
        let sys = MountBuilder::default().source("sysfs").destination("/sys").typ("sysfs");
        let sys = sys.options(["nosuid", "noexec", "nodev", "ro"].map(str::to_owned)).build().unwrap();
        let text = configured(&spec(vec![sys])).unwrap();
        let lines: Vec<&str> = text.lines().filter(|l| l.contains(" sys ")).collect();
        assert_eq!(
            lines,
            [
                "lxc.mount.entry = sysfs sys sysfs nosuid,noexec,nodev,create=dir 0 0",
                "lxc.mount.entry = sys sys none rbind,ro,relative 0 0"
            ]
        );
    }

    #[test]
    fn the_nodes_shared_memory_gets_its_flags() {
        let (text, staged) =
            staged(&spec(vec![bind_of("/dev/shm", "/dev/shm", &["rbind", "nosuid", "noexec", "rw", "rprivate"])]))
                .unwrap();
        assert_eq!(staged[0].attributes, libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC);
        assert!(text.contains("lxc.mount.entry = /run/x/mounts/0 dev/shm none rbind,rprivate,create=dir"), "{text}");
    }

    #[test]
    fn a_volume_at_dev_pts_stays_to_be_seen() {
        let dev = MountBuilder::default().source("tmpfs").destination("/dev").typ("tmpfs").build().unwrap();
        let text = configured(&spec(vec![dev, bind_of("/a", "/dev/pts", &["rbind"])])).unwrap();
        let entry = "lxc.mount.entry = /a dev/pts none rbind,create=dir";
        assert!(text.contains("lxc.pty.max = 0") && text.contains("lxc.autodev = 1"), "{text}");
        assert_eq!(text.matches(entry).count(), 2, "{text}");
    }

    proptest! {
        #[test]
        fn no_path_forges_a_line(source in "/[^\0]*", place in "/[^\0]*") {
            let plain = configured(&spec(vec![bind_of("/a", "/b", &["rbind"])])).unwrap();
            if let Ok(text) = configured(&spec(vec![bind_of(&source, &place, &["rbind"])])) {
                let keys = |text: &str| -> Vec<String> {
                    text.split('\n').map(|l| l.split('=').next().unwrap_or_default().to_owned()).collect()
                };
                prop_assert_eq!(keys(&text), keys(&plain));
            }
        }
    }
}
