//! What a container needs to be launched, whichever program does it: looked up in its image and on the node, as an OCI
//! spec, and the monitor's plan around it.
//!
//! Called by the backends that run containers in the node's own namespaces. What can't be honoured is refused by name.

use std::os::fd::OwnedFd;

use camino::{Utf8Path, Utf8PathBuf};
use oci_spec::runtime::{LinuxDevice, LinuxSeccomp, Process, Spec};

use super::{NodePods, destinations, devices};
use crate::backends::oci::mounts::clean;
use crate::backends::oci::{self, SpecInput, linux, seccomp, users};
use crate::core::backend::LaunchContext;
use crate::core::blocking::blocking;
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::ContainerId;
use crate::core::ports::monitor_v1;
use crate::core::records::{PodRecord, ResolvedUser};
use crate::core::spec::{ContainerConfig, Device, Mount, Profile, UserNamespace};
use crate::integrations::cgroup::Parent;
use crate::integrations::idmap::Maps;
use crate::integrations::oci_hooks::{self, OciHook};
use crate::integrations::{apparmor, cdi};
use crate::utils::atomic::{self, Durability};
use crate::utils::beneath;

/// passwd and group files of an image larger than this are refused.
const USERS_MAX: u64 = 4 << 20;
/// Seccomp profiles larger than this are refused.
const PROFILE_MAX: u64 = 1 << 20;

/// A container, looked up.
pub struct Prepared {
    /// What it is.
    pub spec: Spec,
    /// Whom it runs as.
    pub user: ResolvedUser,
    /// The host's ids of that.
    pub owner: (u32, u32),
    /// Whether the end of its first process leaves others behind.
    pub kill_with_init: bool,
    /// Its oom_score_adj.
    pub oom_score_adj: i32,
    /// Where its cgroup is made.
    pub parent: Parent,
    /// Signal that asks it to end.
    pub stop_signal: i32,
}

/// The calls that a plan consists of.
pub struct Calls {
    /// Makes it.
    pub create: monitor_v1::Program,
    /// Lets it run.
    pub start: monitor_v1::Program,
    /// Removes it.
    pub delete: monitor_v1::Program,
    /// Written by `create`.
    pub pid_file: Utf8PathBuf,
    /// Written by the first process' parent, if that stays.
    pub status_file: String,
    /// Its cgroups.
    pub cgroups: monitor_v1::Cgroups,
    /// It has a terminal.
    pub terminal: bool,
}

impl NodePods {
    /// Looks everything up and makes the spec. `recursive_read_only`: the runtime can do that to mounts.
    pub async fn prepare(&self, context: &LaunchContext<'_>, recursive_read_only: bool) -> Result<Prepared> {
        let LaunchContext {
            pod, facts, pod_dir, rootfs_mount_point, id, config, image, rootfs, volumes, target, ..
        } = *context;
        let rootfs =
            rootfs.try_clone_to_owned().map_err(|e| Error::io("duplicate the root file system's descriptor", e))?;
        let again = rootfs.try_clone().map_err(|e| Error::io("duplicate the root file system's descriptor", e))?;
        let found = {
            let (security, image_user) = (config.security.clone(), image.config.user.clone());
            let (mounts, devices) = (config.mounts.clone(), config.devices.clone());
            let names = cdi::wanted(&config.cdi_devices, &config.annotations)?;
            let (folders, hooks) = (self.config.cdi_spec_dirs.clone(), self.config.hooks_dirs.clone());
            blocking(move || {
                let mut found = look_up(rootfs, &security, &image_user, &mounts, &devices)?;
                found.cdi = devices::cdi(&folders, &names)?;
                found.hooks = oci_hooks::read(&hooks)?;
                Ok(found)
            })
            .await?
        };
        let parent = self.parent(pod)?;
        let host = oci::HostFacts { recursive_read_only, ..self.host_now(&config.resources) };
        let mut input = SpecInput {
            pod,
            facts,
            pod_dir,
            config,
            image,
            user: &found.user,
            rootfs: rootfs_mount_point,
            cgroups_path: &parent.oci_path(id),
            target_pidns: target.map(|t| format!("/proc/{}/ns/pid", t.pid)),
            mount_sources: with_volumes(found.sources, &volumes.sources),
            devices: found.devices,
            cdi: found.cdi,
            seccomp: None,
            apparmor: self.apparmor(config)?,
            pids_limit: self.config.pids_limit,
            default_caps: self.config.default_caps,
            host: &host,
        };
        input.seccomp = self.seccomp(&input).await?;
        let mut spec = oci::plan(&input)?;
        add_hooks(&mut spec, &found.hooks, pod, config)?;
        let kill_with_init = linux::shares_pids(&input);
        let spec = blocking(move || Ok(destinations::resolve_all(&beneath::Root::from_fd(again), spec))).await?;
        // FIFOs are the host's: inside, their owner is the container's user.
        let user = config.security.namespaces.user.as_ref();
        let owner = match user.map(|u| (u.host_uid(found.user.uid), u.host_gid(found.user.gid))) {
            None => (found.user.uid, found.user.gid),
            Some((Some(uid), Some(gid))) => (uid, gid),
            Some(_) => return Err(Error::internal("a user outside of the pod's user namespace")),
        };
        let oom_score_adj = spec.process().as_ref().and_then(|p| p.oom_score_adj()).unwrap_or(0);
        let stop_signal = stop_signal(config, &image.config.stop_signal);
        Ok(Prepared { spec, user: found.user, owner, kill_with_init, oom_score_adj, parent, stop_signal })
    }

    /// The monitor's plan of a container.
    pub fn monitor_plan(
        &self,
        context: &LaunchContext<'_>,
        prepared: &Prepared,
        calls: Calls,
    ) -> monitor_v1::CreateContainer {
        let LaunchContext { run_dir, rootfs_mount_point, id, config, volumes, log_path, .. } = *context;
        let console = self.console_socket(id.as_str());
        monitor_v1::CreateContainer {
            id: id.to_string(),
            create: Some(calls.create),
            start: Some(calls.start),
            delete: Some(calls.delete),
            pid_file: calls.pid_file.to_string(),
            status_file: calls.status_file,
            stdio: Some(monitor_v1::Stdio {
                terminal: calls.terminal,
                console_socket: if calls.terminal { console.to_string() } else { String::new() },
                stdin: if config.stdin && !calls.terminal { run_dir.join("stdin").to_string() } else { String::new() },
                stdout: run_dir.join("stdout").to_string(),
                stderr: run_dir.join("stderr").to_string(),
                stdin_once: config.stdin_once,
                uid: prepared.owner.0,
                gid: prepared.owner.1,
            }),
            log_path: log_path.map(ToString::to_string).unwrap_or_default(),
            log_line_max: self.config.log_line_max,
            log_size_max: self.config.log_size_max,
            exit_path: run_dir.join("exit.json").to_string(),
            rootfs_mount_point: rootfs_mount_point.to_string(),
            cgroups: Some(calls.cgroups),
            kill_with_init: prepared.kill_with_init,
            info: Vec::new(),
            volume_mount_points: volumes.mount_points.iter().map(ToString::to_string).collect(),
        }
    }

    /// The monitor's plan of an exec, whose `program` writes a pid file and leaves the process; `cgroups`: folders of its own groups.
    pub fn monitor_exec(
        &self,
        container: &ContainerId,
        exec_id: &str,
        program: monitor_v1::Program,
        pid_file: &Utf8Path,
        terminal: bool,
        cgroups: Vec<Utf8PathBuf>,
    ) -> monitor_v1::Exec {
        monitor_v1::Exec {
            container_id: container.to_string(),
            exec_id: exec_id.to_string(),
            program: Some(program),
            pid_file: pid_file.to_string(),
            terminal,
            console_socket: if terminal { self.console_socket(exec_id).to_string() } else { String::new() },
            cgroups: cgroups.into_iter().map(String::from).collect(),
            ..Default::default()
        }
    }

    /// Removes what an exec has left: its files and, unless the monitor has done it (an older one does not, nor one that never
    /// heard of the exec), its groups.
    pub fn remove_exec(&self, pod: &PodRecord, container: &ContainerId, run_dir: &Utf8Path, exec_id: &str) {
        let ExecFiles { process, pid, inner_pid, log } = ExecFiles::of(run_dir, exec_id);
        for path in [process, pid, inner_pid, log] {
            let _ = std::fs::remove_file(path);
        }
        if let Ok(parent) = self.parent(pod) {
            self.hierarchy.remove_exec(&parent, container, exec_id);
        }
    }

    /// Short: a socket's path has at most 107 bytes.
    pub fn console_socket(&self, id: &str) -> Utf8PathBuf {
        self.config.state.join("console").join(&id[..id.len().min(32)])
    }

    fn apparmor(&self, config: &ContainerConfig) -> Result<Option<String>> {
        self.check_apparmor(&config.security.apparmor)?;
        let name = match &config.security.apparmor {
            Profile::Unconfined => return Ok(None),
            Profile::RuntimeDefault if !self.host.apparmor || config.security.privileged => return Ok(None),
            Profile::RuntimeDefault => apparmor::DEFAULT_PROFILE,
            Profile::Localhost(name) => name,
        };
        if !apparmor::is_loaded(name)? {
            return Err(Error::precondition(format!("AppArmor profile {name:?} is not loaded")));
        }
        Ok(Some(name.to_string()))
    }

    pub(in crate::backends) async fn seccomp(&self, input: &SpecInput<'_>) -> Result<Option<LinuxSeccomp>> {
        if input.config.security.privileged {
            return Ok(None);
        }
        match &input.config.security.seccomp {
            Profile::Unconfined => Ok(None),
            Profile::RuntimeDefault => Ok(Some(seccomp::runtime_default(oci::process::bounding(input)?)?)),
            Profile::Localhost(name) => {
                let path = self.seccomp_path(name)?;
                let of = path.clone();
                let text = blocking(move || read_profile(&of)).await?;
                Ok(Some(seccomp::parse(&text, path.as_str())?))
            }
        }
    }

    /// The kubelet gives absolute paths, people relative ones below the kubelet's folder.
    fn seccomp_path(&self, name: &str) -> Result<Utf8PathBuf> {
        let name = name.strip_prefix("localhost/").unwrap_or(name);
        if Utf8Path::new(name).components().any(|c| matches!(c, camino::Utf8Component::ParentDir)) {
            return Err(Error::invalid(format!("seccomp profile {name:?} has .. in it")));
        }
        Ok(self.config.seccomp_root.join(name))
    }
}

/// The runtime's own words in its log about a program that is not there or can't be executed.
pub async fn cannot_run(log: Utf8PathBuf) -> Option<String> {
    let text = blocking(move || std::fs::read_to_string(&log).map_err(|e| Error::io(log, e))).await.ok()?;
    program_trouble(&text)
}

/// The same in its log's text.
pub(in crate::backends) fn program_trouble(log: &str) -> Option<String> {
    // How such a line begins, after time and level, and what it says.
    const WORDS: [(&str, &str); 3] = [
        ("executable file `", "` not found"),
        ("the path `", "` is not a regular file"),
        ("the path `", "` exists but it is not executable"),
    ];
    let words =
        |line: &str| WORDS.iter().find_map(|(begin, says)| line.find(begin).filter(|at| line[*at..].contains(says)));
    let (at, line) = log.lines().rev().find_map(|line| words(line).map(|at| (at, line)))?;
    Some(line[at..].chars().take(1000).collect())
}

/// Adds what the node's folders of hooks have for such a container.
pub fn add_hooks(spec: &mut Spec, hooks: &[OciHook], pod: &PodRecord, config: &ContainerConfig) -> Result<()> {
    let mut annotations = pod.config.annotations.clone();
    annotations.extend(config.annotations.clone());
    let args = spec.process().as_ref().and_then(|p| p.args().clone()).unwrap_or_default();
    let command = args.first().map(String::as_str).unwrap_or_default();
    let has_bind_mounts = config.mounts.iter().any(|m| m.image.is_none());
    let wanted = oci_hooks::of(hooks, oci_hooks::Container { annotations: &annotations, command, has_bind_mounts });
    oci::cdi::add_hooks(spec, &wanted)
}

/// What was looked up in the image and on the node.
struct Found {
    user: crate::core::records::ResolvedUser,
    sources: Vec<String>,
    devices: Vec<(LinuxDevice, String)>,
    cdi: Vec<oci::cdi::DeviceEdits>,
    hooks: Vec<OciHook>,
}

/// Whom a container runs as, by the files of its image. Blocks.
pub(in crate::backends) fn find_user(
    root: &beneath::Root,
    security: &crate::core::spec::ContainerSecurity,
    image_user: &str,
) -> Result<ResolvedUser> {
    let text = |path: &str| match root.read_file(path, USERS_MAX) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
            Ok(String::new())
        }
        // What is wrong with the file itself, and not with reading it: another image is needed.
        Err(e) if e.raw_os_error().is_none_or(|code| code == libc::ELOOP) => {
            Err(Error::because(Kind::InvalidArgument, format!("read /{path} of the image"), e))
        }
        Err(e) => Err(Error::io(format!("read /{path} of the image"), e)),
    };
    users::resolve(security, image_user, &text("etc/passwd")?, &text("etc/group")?)
}

fn look_up(
    rootfs: OwnedFd,
    security: &crate::core::spec::ContainerSecurity,
    image_user: &str,
    mounts: &[Mount],
    wanted_devices: &[Device],
) -> Result<Found> {
    let user = find_user(&beneath::Root::from_fd(rootfs), security, image_user)?;
    let sources = mounts.iter().map(mount_source).collect::<Result<Vec<_>>>()?;
    try_idmaps(mounts, &sources)?;
    let mut found = Vec::new();
    if security.privileged {
        devices::host_devices(Utf8Path::new("/dev"), Utf8Path::new("/dev"), "rwm", &mut found)?;
    }
    for d in wanted_devices {
        devices::requested_device(d, &mut found)?;
    }
    Ok(Found { user, sources, devices: found, cdi: Vec::new(), hooks: Vec::new() })
}

/// Sources of all mounts: an image's is where the monitor puts it.
fn with_volumes(mut sources: Vec<String>, volumes: &[Option<Utf8PathBuf>]) -> Vec<String> {
    for (source, volume) in sources.iter_mut().zip(volumes) {
        if let Some(path) = volume {
            *source = path.to_string();
        }
    }
    sources
}

/// The source with its links resolved; a folder is made where nothing is, as users of hostPath expect.
fn mount_source(m: &Mount) -> Result<String> {
    if m.image.is_some() {
        return Ok(String::new());
    }
    let path = Utf8Path::new(&m.host_path);
    if !path.is_absolute() {
        return Err(Error::invalid(format!("mount at {:?}: source {path:?} is not absolute", m.container_path)));
    }
    let named = |e| Error::because(Kind::InvalidArgument, format!("mount at {:?}: source {path}", m.container_path), e);
    match path.canonicalize_utf8() {
        // Anything else would hide from the container's programs, and from the OCI runtime, what the kernel says of them.
        Ok(path) if clean(&m.container_path) == "/proc" && !is_proc(&path) => {
            Err(Error::invalid(format!("mount at {:?}: source {path} is no proc file system", m.container_path)))
        }
        Ok(path) => Ok(path.to_string()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            std::fs::create_dir_all(path).map_err(named)?;
            Ok(path.canonicalize_utf8().map_err(named)?.to_string())
        }
        Err(e) => Err(named(e)),
    }
}

/// Makes the idmapped mounts that the runtime will make, for an error that says which of them can't be and why.
fn try_idmaps(mounts: &[Mount], sources: &[String]) -> Result<()> {
    let mut last: Option<(UserNamespace, Maps)> = None;
    for (m, source) in mounts.iter().zip(sources).filter(|(m, _)| m.image.is_none()) {
        let named = |e: Error| e.context(format!("mount at {:?}", m.container_path));
        let Some(user) = oci::userns::of_mount(m).map_err(named)? else { continue };
        // Those of one pod have all the same maps.
        let maps = match last.take() {
            Some((known, maps)) if known == user => maps,
            _ => Maps::new(&user).map_err(|e| named(e.into()))?,
        };
        maps.mount(source.as_ref(), true).map_err(|e| named(e.into()))?;
        last = Some((user, maps));
    }
    Ok(())
}

/// The request's, else the image's, else SIGTERM.
pub(in crate::backends) fn stop_signal(config: &ContainerConfig, image: &str) -> i32 {
    config.stop_signal.or_else(|| crate::core::signals::number(image)).unwrap_or(libc::SIGTERM)
}

/// A seccomp profile's text; what is no file (a FIFO would have nobody who writes) is refused.
fn read_profile(path: &Utf8Path) -> Result<String> {
    let text = beneath::read_file("/".as_ref(), path.as_std_path(), PROFILE_MAX)
        .and_then(|bytes| String::from_utf8(bytes).map_err(std::io::Error::other));
    text.map_err(|e| Error::because(Kind::InvalidArgument, format!("seccomp profile {path}"), e))
}

fn is_proc(path: &Utf8Path) -> bool {
    rustix::fs::statfs(path.as_std_path()).is_ok_and(|fs| fs.f_type == rustix::fs::PROC_SUPER_MAGIC)
}

/// Writes a file of a container's run folder, for root alone.
pub fn write(path: &Utf8Path, text: &[u8]) -> Result<()> {
    atomic::write(path.as_std_path(), text, 0o600, Durability::Process)
        .map_err(|e| Error::io(format!("write {path}"), e))
}

/// The files of an exec, in its container's folder.
pub struct ExecFiles {
    /// What it is.
    pub process: Utf8PathBuf,
    /// Its pid on the node.
    pub pid: Utf8PathBuf,
    /// Its pid as the OCI runtime sees it, where that runs in a PID namespace of its own.
    pub inner_pid: Utf8PathBuf,
    /// What who started it said of failures.
    pub log: Utf8PathBuf,
}

impl ExecFiles {
    /// Those of one.
    pub fn of(run_dir: &Utf8Path, exec_id: &str) -> Self {
        let file = |kind: &str| run_dir.join(format!("exec-{exec_id}.{kind}"));
        Self { process: file("process"), pid: file("pid"), inner_pid: file("pid.ct"), log: file("log") }
    }
}

/// The bundle of a container, and the process of an exec in it: the container's own with another command line. Reads the
/// bundle in `run_dir`; one that is absent or damaged is an error by name.
pub async fn exec_process(
    run_dir: &Utf8Path,
    container: &ContainerId,
    command: &[String],
    tty: bool,
) -> Result<(Spec, Process)> {
    let (bundle, of) = (run_dir.join("config.json"), container.clone());
    let spec: Spec = blocking(move || {
        let text = std::fs::read(&bundle).map_err(|e| Error::io(format!("read {bundle}"), e))?;
        serde_json::from_slice(&text)
            .map_err(|e| Error::because(Kind::Internal, format!("the bundle of container {of}"), e))
    })
    .await?;
    let mut process = spec.process().clone().ok_or_else(|| Error::internal("a bundle without a process"))?;
    process.set_args(Some(command.to_vec()));
    process.set_terminal(Some(tty));
    if tty && let Some(env) = process.env_mut() {
        env.retain(|e| !e.starts_with("TERM="));
        env.push("TERM=xterm".to_string());
    }
    Ok((spec, process))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seccomp_profile_is_a_file() {
        let temp = tempfile::tempdir().unwrap();
        let at = |name: &str| Utf8PathBuf::from_path_buf(temp.path().join(name)).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, at("fifo").as_std_path(), rustix::fs::Mode::RUSR).unwrap();
        atomic::write(at("good").as_std_path(), b"{}", 0o600, Durability::Process).unwrap();
        assert_eq!(read_profile(&at("good")).unwrap(), "{}");
        for bad in [at("fifo"), at("none"), "/dev/zero".into(), "/".into()] {
            assert_eq!(read_profile(&bad).unwrap_err().kind(), Kind::InvalidArgument, "{bad}");
        }
    }

    #[test]
    fn a_program_that_cannot_run_is_told_from_other_failures() {
        let log = "2026-11-23T05:18:11.0Z: executable file `/no/such` not found: No such file or directory\n";
        assert_eq!(
            program_trouble(log).as_deref(),
            Some("executable file `/no/such` not found: No such file or directory")
        );
        assert_eq!(program_trouble("mount `/x` to `/y`: Permission denied\n"), None);
        assert_eq!(program_trouble(""), None);
    }
}
