//! Launch plans: writes what liblxc and the first process are told, and says which calls of the helper run them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use camino::{Utf8Path, Utf8PathBuf};
use oci_spec::runtime::Mount;
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, openat2};

use super::{LxcBackend, plan, seccomp, system};
use crate::backends::pods::launch::{Calls, ExecFiles, Prepared, exec_process, write};
use crate::core::backend::{ExecContext, Launch, LaunchContext};
use crate::core::blocking::blocking;
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::ContainerId;
use crate::core::ports::monitor_v1;
use crate::fail_point;
use crate::integrations::cgroup::{Driver, Parent};
use crate::utils::beneath;

/// Folders that liblxc needs in a root file system that it may not write to.
const POINTS: [&str; 3] = ["dev", "proc", "sys"];

impl LxcBackend {
    pub(super) async fn plan_launch(&self, context: LaunchContext<'_>) -> Result<Launch> {
        let mut prepared = self.pods.prepare(&context, true).await?;
        let LaunchContext { run_dir, id, config, .. } = context;
        let lacking = || Error::internal("a spec without a process");
        let args = prepared.spec.process().as_ref().and_then(|p| p.args().clone()).unwrap_or_default();
        let system = system::is_init(&args);
        if system {
            let with_boot = system::with_boot(config);
            if let Some(config) = &with_boot {
                prepared = self.pods.prepare(&LaunchContext { config, ..context }, true).await?;
            }
            system::prepare(&mut prepared, &context, args.first().map_or("", String::as_str))?;
        }
        // The system's own program is what the container is prepared for, and stays.
        self.pods.add_classes(context.pod, context.config, &mut prepared.spec).await?;
        let adjusted = self.pods.adjust(&context, &mut prepared).await?;
        let now = prepared.spec.process().as_ref().and_then(|p| p.args().clone()).unwrap_or_default();
        if (system || system::is_init(&now)) && now != args {
            return Err(Error::new(Kind::Unimplemented, "a plugin's args from or to an init system's"));
        }
        let mut process = prepared.spec.process().clone().ok_or_else(lacking)?;
        process.set_terminal(Some(system || config.tty));
        self.make_points(&context, &prepared).await?;
        let closed = closed_without_links(&context, &mut prepared).await?;
        let program = plan::process(&prepared.spec, &process)?;
        let policy = run_dir.join("seccomp");
        let filter = prepared.spec.linux().as_ref().and_then(|l| l.seccomp().clone());
        if let Some(profile) = &filter {
            write(&policy, seccomp::policy(profile)?.as_bytes())?;
        }
        let cgroup = self.cgroup(&prepared.parent, id);
        let folders = self.pods.hierarchy.container(&prepared.parent, id);
        let (memory, kills) = (self.memory_folder(&folders.memory), run_dir.join("kills"));
        let made = points_in_volumes(&prepared).await?;
        let sources = sources_that_are_folders(prepared.spec.mounts().clone().unwrap_or_default()).await?;
        let lxcfs = self.lxcfs().await?;
        let (text, staged) = plan::configuration(&plan::Input {
            spec: &prepared.spec,
            rootfs: context.rootfs_mount_point,
            cgroup: &cgroup,
            holder_cgroup: &self.holders.join(id.as_str()),
            pivot: &self.leaving(id),
            // Where also the root of a user namespace may pass.
            stage: &self.lxcpath().join(id.as_str()).join("mounts"),
            seccomp: filter.is_some().then_some(policy.as_path()),
            cgroup_v2: self.pods.host.cgroup_v2,
            apparmor: self.pods.host.apparmor,
            lxcfs: lxcfs.then_some(super::LXCFS.into()),
            system,
            node_net: node_net()?,
            kills: (!memory.as_str().is_empty()).then_some(plan::Kills {
                helper: &self.config.helper,
                group: memory.as_path(),
                file: &kills,
            }),
            is_folder: &|path| sources.contains(path),
            made: &made,
            closed: &closed,
            shm: context.facts.shm.as_deref(),
        })?;
        if let Some(above) = cgroup.parent() {
            self.pods.hierarchy.let_cpuset_be_inherited(above)?;
        }
        let folder = self.lxcpath().join(id.as_str());
        std::fs::create_dir_all(&folder).map_err(|e| Error::io(format!("make {folder}"), e))?;
        write(&folder.join("config"), text.as_bytes())?;
        // Execs are planned from it.
        prepared.spec.set_mounts(None);
        let spec =
            serde_json::to_vec(&prepared.spec).map_err(|e| Error::because(Kind::Internal, "encode the OCI spec", e))?;
        write(&run_dir.join("config.json"), &spec)?;
        let file = run_dir.join("init.plan");
        write(&file, &program.encode().map_err(Error::invalid)?)?;
        fail_point!("create.bundle");

        let at = |name: &str| run_dir.join(name);
        let (pid_file, status, log) = (at("pid"), at("status"), at("lxc.log"));
        let console = self.pods.console_socket(id.as_str());
        let net = self.hidden_net().await?;
        let mut create = vec!["create".to_owned()];
        let mut option = |name: &str, value: &str| create.extend([format!("--{name}"), value.to_owned()]);
        option("net", net.as_str());
        option("plan", file.as_str());
        option("init", self.config.init.as_str());
        option("pid-file", pid_file.as_str());
        option("start", at("start").as_str());
        option("status", status.as_str());
        option("kills", kills.as_str());
        for root in self.pods.hierarchy.roots() {
            option("cgroup", root.join(self.entry(id)).as_str());
        }
        for stage in &staged {
            option("stage-at", stage.place.as_str());
            option("stage-attributes", &stage.attributes.to_string());
            option("stage-recursive", if stage.recursive { "1" } else { "0" });
            if let Some(users) = &stage.idmap {
                option("stage-users", users);
            }
            option("stage", &stage.source);
        }
        let terminal = config.tty || system;
        if terminal {
            option("console-socket", console.as_str());
        }
        let create = self.scoped(self.call(id.as_str(), &log, create), &prepared.parent, id);
        let start = vec!["start".to_owned(), at("start").to_string()];
        let calls = Calls {
            create,
            start: self.call(id.as_str(), &log, start),
            delete: self.call(id.as_str(), &log, self.delete_arguments(&prepared.parent, id, &pid_file)),
            pid_file,
            status_file: status.to_string(),
            cgroups: monitor_v1::Cgroups { memory: memory.to_string(), kill: folders.kill.to_string() },
            terminal,
        };
        let plan = self.pods.monitor_plan(&context, &prepared, calls);
        Ok(Launch { plan, user: prepared.user, stop_signal: prepared.stop_signal, adjusted })
    }

    /// With systemd the processes are in a group below the scope, as crun has it, and so are the limits.
    fn memory_folder(&self, folder: &Utf8Path) -> Utf8PathBuf {
        match (folder.as_str(), self.pods.config.driver) {
            ("", _) => Utf8PathBuf::new(),
            (_, Driver::Cgroupfs) => folder.to_owned(),
            (_, Driver::Systemd) => folder.join(super::INNER),
        }
    }

    /// Where mounts go, and the working directory, have to be there when the root file system can't be written to.
    async fn make_points(&self, context: &LaunchContext<'_>, prepared: &Prepared) -> Result<()> {
        if !context.config.security.readonly_rootfs {
            return Ok(());
        }
        let folders = sources_that_are_folders(prepared.spec.mounts().clone().unwrap_or_default()).await?;
        let mut points: Vec<(String, bool)> = POINTS.iter().map(|p| (p.to_string(), true)).collect();
        let cwd = prepared.spec.process().as_ref().and_then(|p| p.cwd().to_str());
        points.extend(cwd.map(|cwd| (cwd.trim_start_matches('/').to_owned(), true)));
        for m in prepared.spec.mounts().iter().flatten() {
            let Some(place) = m.destination().to_str() else { continue };
            let bind = m.typ().as_deref() == Some("bind");
            let source = m.source().as_ref().and_then(|s| s.to_str()).unwrap_or_default();
            points.push((place.trim_start_matches('/').to_owned(), !bind || folders.contains(source)));
        }
        let rootfs = context.rootfs.try_clone_to_owned().map_err(|e| Error::io("duplicate a descriptor", e))?;
        blocking(move || {
            let root = beneath::Root::from_fd(rootfs);
            for (place, folder) in points {
                // What can't be made is inside of another mount, or is told by liblxc.
                let _ = root.make_point(&place, folder);
            }
            Ok(())
        })
        .await
    }

    /// Group of the helper until liblxc has made its own.
    fn entry(&self, id: &ContainerId) -> Utf8PathBuf {
        self.holders.join(format!("{id}.new"))
    }

    /// Group above the one that liblxc moves itself to at the end.
    fn leaving(&self, id: &ContainerId) -> Utf8PathBuf {
        self.holders.join(format!("{id}.end"))
    }

    pub(super) fn delete_arguments(&self, parent: &Parent, id: &ContainerId, pid_file: &Utf8Path) -> Vec<String> {
        let mut arguments = vec!["delete".to_owned(), "--pid-file".to_owned(), pid_file.to_string()];
        // Beside the daemon's own unit the group of all of them is ours to take away, too.
        let all = (self.holders.components().count() == 1).then(|| self.holders.clone());
        let prune = all.map(|group| ("--prune", group));
        // Who makes groups and processes goes first: it may be at it, when all that had started it were killed.
        let remove = [self.entry(id), self.holders.join(id.as_str()), parent.container(id), self.leaving(id)];
        let remove = remove.map(|group| ("--remove", group));
        for (option, group) in remove.into_iter().chain(prune) {
            for root in self.pods.hierarchy.roots() {
                arguments.extend([option.to_owned(), root.join(&group).to_string()]);
            }
        }
        arguments
    }

    pub(super) async fn plan_exec(&self, context: ExecContext<'_>) -> Result<monitor_v1::Exec> {
        let ExecContext { pod, container, run_dir, exec_id, command, tty } = context;
        let (spec, process) = exec_process(run_dir, &container.id, command, tty).await?;
        let mut program = plan::process(&spec, &process)?;
        program.nodes.clear();
        let files = ExecFiles::of(run_dir, exec_id);
        write(&files.process, &program.encode().map_err(Error::invalid)?)?;
        let console = self.pods.console_socket(exec_id);
        let net = self.hidden_net().await?;
        let mut verb = vec!["exec".to_owned()];
        let mut option = |name: &str, value: &str| verb.extend([format!("--{name}"), value.to_owned()]);
        option("net", net.as_str());
        option("plan", files.process.as_str());
        option("pid-file", files.pid.as_str());
        if tty {
            option("console-socket", console.as_str());
        }
        let (_, folders) = self.pods.hierarchy.create_exec(&self.pods.parent(pod)?, &container.id, exec_id)?;
        for folder in &folders {
            option("cgroup", folder.as_str());
        }
        let program = self.call(container.id.as_str(), &files.log, verb);
        Ok(self.pods.monitor_exec(&container.id, exec_id, program, &files.pid, tty, folders))
    }
}

/// A path to the node's network namespace that is the same for whoever opens it.
fn node_net() -> Result<&'static str> {
    const OF_INIT: &str = "/proc/1/ns/net";
    let of = |path: &str| rustix::fs::stat(path).map_err(|e| Error::io(format!("look at {path}"), e.into()));
    let (init, own) = (of(OF_INIT)?, of("/proc/self/ns/net")?);
    match (init.st_dev, init.st_ino) == (own.st_dev, own.st_ino) {
        true => Ok(OF_INIT),
        false => Err(Error::precondition("handler lxc: this daemon is not in the network namespace of process 1")),
    }
}

/// Whether the first process has been let run: it is not our own any more, or the word for that is under way. Blocks.
pub(super) fn has_started(run_dir: &Utf8Path) -> Result<bool> {
    let fifo = run_dir.join("start");
    // `start` takes it away when it has written.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let waiting = match rustix::fs::open(fifo.as_std_path(), flags, Mode::empty()) {
        Ok(fd) => rustix::io::ioctl_fionread(&fd).map_err(|e| Error::io(format!("look into {fifo}"), e.into()))? == 0,
        Err(rustix::io::Errno::NOENT) => return Ok(true),
        Err(e) => return Err(Error::io(format!("open {fifo}"), e.into())),
    };
    let path = run_dir.join("pid");
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(format!("read {path}"), e))?;
    let pid = text.split_whitespace().next().unwrap_or_default();
    // Executed by descriptor, with descriptors as arguments: no program of an image is.
    let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let mut words = line.trim_end_matches('\0').split('\0');
    let by_descriptor = words.next().is_some_and(|w| w.starts_with("/proc/self/fd/"));
    let ours = by_descriptor && words.all(|w| w.parse::<u32>().is_ok());
    Ok(!(waiting && ours))
}

/// Makes the points of mounts that land inside of another mount's folder, and gives their destinations. liblxc would make them by
/// the node's paths, through any link that users of that folder put there; it mounts through none. A link on the way is refused.
async fn points_in_volumes(prepared: &Prepared) -> Result<BTreeSet<String>> {
    let mounts = prepared.spec.mounts().clone().unwrap_or_default();
    blocking(move || {
        let text = |m: &Mount| m.destination().to_str().unwrap_or_default().trim_end_matches('/').to_owned();
        let is_bind = |m: &Mount| m.typ().as_deref() == Some("bind");
        let mut made = BTreeSet::new();
        for (n, m) in mounts.iter().enumerate() {
            let place = text(m);
            let inside = |b: &Mount| place.strip_prefix(&text(b)).and_then(|p| p.strip_prefix('/')).map(str::to_owned);
            let outer = mounts[..n].iter().rev().filter(|b| is_bind(b)).find_map(|b| Some((b, inside(b)?)));
            let Some((outer, rest)) = outer else { continue };
            let folder = !is_bind(m) || m.source().as_ref().is_some_and(|s| s.is_dir());
            make_point_in(outer, &rest, folder).map_err(|e| {
                let what = format!("mount {place:?}: its place in what is mounted at {:?}", text(outer));
                Error::because(Kind::InvalidArgument, what, e)
            })?;
            made.insert(m.destination().to_string_lossy().into_owned());
        }
        Ok(made)
    })
    .await
}

fn make_point_in(outer: &Mount, rest: &str, folder: bool) -> std::io::Result<()> {
    use std::os::fd::AsFd;

    use rustix::fs::CWD;
    let none = || std::io::Error::from(std::io::ErrorKind::NotFound);
    let source = outer.source().as_ref().ok_or_else(none)?;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let volume = rustix::fs::openat(CWD, source.as_path(), flags | OFlags::DIRECTORY, Mode::empty())?;
    let no_links = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    match openat2(&volume, rest, flags, Mode::empty(), no_links) {
        Ok(_) => return Ok(()),
        Err(rustix::io::Errno::NOENT) => {}
        Err(e) => return Err(e.into()),
    }
    if outer.options().iter().flatten().any(|o| o == "ro" || o == "rro") {
        return Err(none());
    }
    let root = beneath::Root::from_fd(volume);
    let path = std::path::Path::new(rest);
    if folder {
        return root.folder_without_links(path, 0o755).map(drop);
    }
    let parent = match path.parent().filter(|p| !p.as_os_str().is_empty()) {
        Some(parent) => root.folder_without_links(parent, 0o755)?,
        None => root.as_fd().try_clone_to_owned()?,
    };
    let name = path.file_name().and_then(|n| std::ffi::CString::new(n.as_encoded_bytes()).ok()).ok_or_else(none)?;
    match beneath::create_file_at(parent.as_fd(), &name, 0o644) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => Err(e),
        _ => Ok(()),
    }
}

/// liblxc mounts through no link, and says nothing of a masked or read-only path that is one: where such paths lead in the image is
/// closed, and a link in a volume, which its users can change at any time, is refused by name. Gives those that are there in a
/// volume, and whether they are folders.
async fn closed_without_links(context: &LaunchContext<'_>, prepared: &mut Prepared) -> Result<BTreeMap<String, bool>> {
    let Some(mut linux) = prepared.spec.linux().clone() else { return Ok(BTreeMap::new()) };
    let lists = [linux.masked_paths().clone(), linux.readonly_paths().clone()];
    let mounts = prepared.spec.mounts().clone().unwrap_or_default();
    let rootfs = context.rootfs.try_clone_to_owned().map_err(|e| Error::io("duplicate a descriptor", e))?;
    let ([masked, readonly], closed) = blocking(move || {
        let root = beneath::Root::from_fd(rootfs);
        let mut closed = BTreeMap::new();
        let mut resolved = |path: String| {
            let path = in_image(&root, &mounts, path)?;
            if let Some(folder) = in_volume(&mounts, &path)? {
                closed.insert(path.clone(), folder);
            }
            Ok(path)
        };
        let [masked, readonly] =
            lists.map(|list| list.map(|paths| paths.into_iter().map(&mut resolved).collect::<Result<Vec<_>>>()));
        Ok(([masked.transpose()?, readonly.transpose()?], closed))
    })
    .await?;
    linux.set_masked_paths(masked).set_readonly_paths(readonly);
    prepared.spec.set_linux(Some(linux));
    Ok(closed)
}

/// Where a path leads by links of the image; what is below a mount stays as it is.
fn in_image(root: &beneath::Root, mounts: &[Mount], path: String) -> Result<String> {
    let covered = |at: &Path| mounts.iter().any(|m| m.destination().strip_prefix("/").is_ok_and(|place| place == at));
    match root.resolve_until(path.as_ref(), &covered) {
        Ok(found) if found.components().any(|c| c == Component::ParentDir) => {
            Err(Error::invalid(format!("{path:?}: a \"..\" inside of a mount")))
        }
        Ok(found) => Path::new("/")
            .join(found)
            .into_os_string()
            .into_string()
            .map_err(|_| Error::invalid(format!("{path:?} leads to a path that is not UTF-8"))),
        Err(e) if e.kind() == std::io::ErrorKind::NotADirectory => Ok(path),
        Err(e) => Err(Error::io(format!("follow {path:?} in the image"), e)),
    }
}

/// Whether what a path leads to in a volume is a folder; None: it is in none, or not there.
fn in_volume(mounts: &[Mount], path: &str) -> Result<Option<bool>> {
    let inside = |m: &Mount| Path::new(path).strip_prefix(m.destination()).map(Path::to_owned).ok();
    let deepest =
        mounts.iter().rev().filter_map(|m| Some((m, inside(m)?))).min_by_key(|(_, rest)| rest.components().count());
    let Some((volume, rest)) = deepest else { return Ok(None) };
    if volume.typ().as_deref() != Some("bind") || rest.as_os_str().is_empty() {
        return Ok(None);
    }
    let Some(source) = volume.source() else { return Ok(None) };
    let failed = |e: rustix::io::Errno| Error::io(format!("look at {path:?} in {}", source.display()), e.into());
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let fd = rustix::fs::open(source.as_path(), flags, Mode::empty()).map_err(failed)?;
    match openat2(&fd, &rest, flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS) {
        Ok(fd) => {
            let kind = FileType::from_raw_mode(rustix::fs::fstat(&fd).map_err(failed)?.st_mode);
            Ok(Some(kind == FileType::Directory))
        }
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => Ok(None),
        Err(rustix::io::Errno::LOOP) => Err(Error::new(
            Kind::Unimplemented,
            format!(
                "masked or read-only path {path:?}: a link is on its way in what is mounted at {:?}, and liblxc mounts through none",
                volume.destination().display().to_string()
            ),
        )),
        Err(e) => Err(failed(e)),
    }
}

/// Those sources of mounts that are folders.
async fn sources_that_are_folders(mounts: Vec<Mount>) -> Result<BTreeSet<String>> {
    let source = |m: Mount| m.source().as_ref().and_then(|s| s.to_str()).map(str::to_owned);
    let is_folder = |path: &String| std::fs::metadata(path).is_ok_and(|m| m.is_dir());
    blocking(move || Ok(mounts.into_iter().filter_map(source).filter(is_folder).collect())).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::MountBuilder;
    use std::os::unix::fs::symlink;

    #[test]
    fn closed_paths_are_followed_in_the_image_and_not_in_volumes() {
        let dir = tempfile::tempdir().expect("a folder");
        let (image, volume) = (dir.path().join("image"), dir.path().join("volume"));
        for folder in [image.join("v"), image.join("real"), volume.join("real"), volume.join("inner")] {
            std::fs::create_dir_all(folder).expect("a folder");
        }
        // What the volume hides does not count.
        symlink("/etc", image.join("v/real")).expect("a link");
        symlink("v/real", image.join("to")).expect("a link");
        symlink("real", image.join("one")).expect("a link");
        symlink("real", volume.join("link")).expect("a link");
        std::fs::copy("/proc/version", volume.join("real/f")).expect("a file");
        let bind = |source: &Path, place: &str| {
            MountBuilder::default().source(source).destination(place).typ("bind").build().expect("a mount")
        };
        let proc = MountBuilder::default().source("proc").destination("/proc").typ("proc").build().expect("a mount");
        let mounts = [proc, bind(&volume, "/v"), bind(&volume.join("real"), "/v/inner")];
        let root = beneath::Root::open(&image).expect("the image");
        let leads = |path: &str| in_image(&root, &mounts, path.to_owned());
        for (path, to) in [
            ("/one", "/real"),
            ("/to/f", "/v/real/f"),
            ("/v/real/f", "/v/real/f"),
            ("/proc/self/mounts", "/proc/self/mounts"),
            ("/none/x", "/none/x"),
        ] {
            assert_eq!(leads(path).expect("followed"), to);
        }
        assert_eq!(leads("/v/../etc").expect_err("out of it").kind(), Kind::InvalidArgument);
        for (path, folder) in [
            ("/v/real/f", Some(false)),
            ("/v/real", Some(true)),
            ("/v/inner/f", Some(false)),
            ("/v/none", None),
            ("/v", None),
            ("/real", None),
            ("/proc/kcore", None),
        ] {
            assert_eq!(in_volume(&mounts, path).expect(path), folder, "{path}");
        }
        for path in ["/v/link", "/v/link/f"] {
            let e = in_volume(&mounts, path).expect_err(path);
            assert!(e.kind() == Kind::Unimplemented && e.chain().contains(path), "{e:?}");
        }
    }
}
