//! Launch plans of containers in a VM: with the guest's paths, but for the log and the exit record, which are the node's and which the
//! relay replaces. What a plan needs in the guest is written there before; the bundle is on the node, too, for execs.

use camino::Utf8Path;
use oci_spec::runtime::{Hooks, LinuxNamespaceBuilder, LinuxNamespaceType, Spec};

use super::guest::{self, CGROUP, CGROUPS, DATA, RUN};
use super::plan::VM;
use super::{ProxmoxVmBackend, refused};
use crate::backends::oci::{self, HostFacts, SpecInput};
use crate::backends::pods::launch::{add_hooks, exec_process, find_user, program_trouble, stop_signal, write};
use crate::backends::pods::{PATH, classes, destinations};
use crate::core::backend::{ExecContext, Launch, LaunchContext};
use crate::core::blocking::blocking;
use crate::core::caps::CapSet;
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::ContainerId;
use crate::core::ports::{Monitor, monitor_v1};
use crate::core::records::PodRecord;
use crate::core::spec::ContainerConfig;
use crate::fail_point;
use crate::integrations::oci_hooks;
use crate::utils::beneath;

/// crun in the guest; see deploy/proxmox/vm-template.
const CRUN: &str = "/usr/bin/crun";
/// Longest call of it.
const CALL_MS: u32 = 120_000;
/// A disk that was attached is seen by the guest in this time.
const DISK: std::time::Duration = std::time::Duration::from_secs(30);
/// What a guest's processes may open.
const NOFILE: u64 = 1 << 20;

/// Folder of an exec's files in the guest's run folder. Short: a socket's path has at most 107 bytes.
pub(super) fn exec_folder(exec_id: &str) -> String {
    format!("x/{exec_id}")
}

/// The guest, as limits and profiles see it.
fn host_facts() -> HostFacts {
    HostFacts {
        cgroup_v2: true,
        swap_limit: true,
        bounding: CapSet::ALL,
        sys_resource: true,
        nofile_hard: NOFILE,
        recursive_read_only: true,
        ..HostFacts::default()
    }
}

/// A call of crun in the guest, whose own words go to `log`.
fn crun(log: &str, oom_score_adj: i32, verb: &[&str]) -> monitor_v1::Program {
    let root = format!("{RUN}/crun");
    let own = ["--root", &root, "--log", log, "--cgroup-manager", "cgroupfs"];
    monitor_v1::Program {
        path: CRUN.to_owned(),
        args: own.iter().chain(verb).map(|word| (*word).to_owned()).collect(),
        env: vec![format!("PATH={PATH}")],
        cwd: String::new(),
        deadline_ms: CALL_MS,
        error_log: log.to_owned(),
        oom_score_adj,
    }
}

impl ProxmoxVmBackend {
    pub(super) async fn plan_launch(&self, context: LaunchContext<'_>) -> Result<Launch> {
        let LaunchContext { pod, run_dir, id, config, image, rootfs, log_path, facts, .. } = context;
        classes::refuse("proxmox-vm", pod, config)?;
        let duplicate =
            || rootfs.try_clone_to_owned().map_err(|e| Error::io("duplicate the root file system's descriptor", e));
        let monitor = self.monitor_of(&pod.id)?;
        let vmid = VM.vmid(pod)?;
        let user = {
            let (root, security, image_user) = (duplicate()?, config.security.clone(), image.config.user.clone());
            blocking(move || find_user(&beneath::Root::from_fd(root), &security, &image_user)).await?
        };
        let serial = self.give_image(vmid, image, rootfs).await?;
        let root = self.make_root(&*monitor, id, &serial).await?;
        fail_point!("vm.root_made");
        // A guest that was started again has lost them.
        self.write_files(pod, &facts.network, &*monitor).await?;
        let sources = self.give_volumes(pod, id, config, &*monitor).await?;
        let host = host_facts();
        let cgroups_path = format!("{CGROUP}/{id}");
        let mut input = SpecInput {
            pod,
            facts,
            pod_dir: Utf8Path::new("/run/lxcri/pod"),
            config,
            image,
            user: &user,
            rootfs: Utf8Path::new(&root),
            cgroups_path: &cgroups_path,
            target_pidns: None,
            mount_sources: sources,
            devices: Vec::new(),
            cdi: Vec::new(),
            seccomp: None,
            apparmor: None,
            pids_limit: self.pods.config.pids_limit,
            default_caps: self.pods.config.default_caps,
            host: &host,
        };
        input.seccomp = self.pods.seccomp(&input).await?;
        let mut spec = oci::plan(&input)?;
        self.refuse_hooks(&mut spec, pod, config).await?;
        name_host(&mut spec, &pod.config.hostname)?;
        let again = duplicate()?;
        let spec = blocking(move || Ok(destinations::resolve_all(&beneath::Root::from_fd(again), spec))).await?;
        let text = serde_json::to_vec(&spec).map_err(|e| Error::because(Kind::Internal, "encode the OCI spec", e))?;
        write(&run_dir.join("config.json"), &text)?;
        guest::write(&*monitor, format!("{}/config.json", guest::bundle(id.as_str())), text, 0o600, guest::ROOT)
            .await?;
        fail_point!("create.bundle");
        let oom_score_adj = spec.process().as_ref().and_then(|p| p.oom_score_adj()).unwrap_or(0);
        let stop_signal = stop_signal(config, &image.config.stop_signal);
        let in_guest = |name: &str| format!("{RUN}/{}/{name}", guest::bundle(id.as_str()));
        let (bundle, pid_file, log) =
            (format!("{RUN}/{}", guest::bundle(id.as_str())), in_guest("pid"), in_guest("crun.log"));
        let console = in_guest("console");
        let mut create = vec!["create", "--bundle", &bundle, "--pid-file", &pid_file];
        if config.tty {
            create.extend(["--console-socket", &console]);
        }
        create.push(id.as_str());
        let cgroup = format!("{CGROUPS}{cgroups_path}");
        let plan = monitor_v1::CreateContainer {
            id: id.to_string(),
            create: Some(crun(&log, oom_score_adj, &create)),
            start: Some(crun(&log, 0, &["start", id.as_str()])),
            delete: Some(crun(&log, 0, &["delete", "--force", id.as_str()])),
            pid_file: pid_file.clone(),
            stdio: Some(monitor_v1::Stdio {
                terminal: config.tty,
                console_socket: if config.tty { console.clone() } else { String::new() },
                stdin: if config.stdin && !config.tty { in_guest("stdin") } else { String::new() },
                stdout: in_guest("stdout"),
                stderr: in_guest("stderr"),
                stdin_once: config.stdin_once,
                uid: user.uid,
                gid: user.gid,
            }),
            log_path: log_path.map(ToString::to_string).unwrap_or_default(),
            log_line_max: self.pods.config.log_line_max,
            log_size_max: self.pods.config.log_size_max,
            exit_path: run_dir.join("exit.json").to_string(),
            cgroups: Some(monitor_v1::Cgroups { memory: cgroup.clone(), kill: cgroup }),
            ..Default::default()
        };
        Ok(Launch { plan, user, stop_signal, adjusted: None })
    }

    /// Hooks are programs of the node, which is not where the container is.
    async fn refuse_hooks(&self, spec: &mut Spec, pod: &PodRecord, config: &ContainerConfig) -> Result<()> {
        let folders = self.pods.config.hooks_dirs.clone();
        add_hooks(spec, &blocking(move || oci_hooks::read(&folders)).await?, pod, config)?;
        match spec.hooks() {
            Some(hooks) if *hooks != Hooks::default() => {
                Err(refused("OCI hooks (runtime.hooks_dirs) can't run in a VM"))
            }
            _ => Ok(()),
        }
    }

    /// The root file system in the guest, as soon as its kernel has seen the image's disk.
    async fn make_root(&self, monitor: &dyn Monitor, id: &ContainerId, serial: &str) -> Result<String> {
        let end = tokio::time::Instant::now() + DISK;
        loop {
            match guest::make_root(monitor, id.as_str(), serial).await {
                Ok(root) if root.path.starts_with(RUN) || root.path.starts_with(DATA) => return Ok(root.path),
                Ok(root) => {
                    return Err(Error::internal(format!("the guest has made a root file system at {:?}", root.path)));
                }
                Err(e) if e.kind() == Kind::NotFound && tokio::time::Instant::now() < end => {
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
                Err(e) => return Err(e.context(format!("the root file system of container {id}"))),
            }
        }
    }

    pub(super) async fn plan_exec(&self, context: ExecContext<'_>) -> Result<monitor_v1::Exec> {
        let ExecContext { pod, container, run_dir, exec_id, command, tty } = context;
        let monitor = self.monitor_of(&pod.id)?;
        let (_, process) = exec_process(run_dir, &container.id, command, tty).await?;
        let oom_score_adj = process.oom_score_adj().unwrap_or(0);
        let text =
            serde_json::to_vec(&process).map_err(|e| Error::because(Kind::Internal, "encode the exec's process", e))?;
        let folder = exec_folder(exec_id);
        guest::write(&*monitor, format!("{folder}/process.json"), text, 0o600, guest::ROOT).await?;
        let at = |name: &str| format!("{RUN}/{folder}/{name}");
        let (spec, pid_file, console) = (at("process.json"), at("pid"), at("console"));
        let mut verb = vec!["exec", "--detach", "--pid-file", &pid_file, "--process", &spec];
        if tty {
            verb.extend(["--console-socket", &console]);
        }
        verb.push(container.id.as_str());
        Ok(monitor_v1::Exec {
            container_id: container.id.to_string(),
            exec_id: exec_id.to_owned(),
            program: Some(crun(&at("log"), oom_score_adj, &verb)),
            pid_file: pid_file.clone(),
            terminal: tty,
            console_socket: if tty { console.clone() } else { String::new() },
            ..Default::default()
        })
    }

    /// crun's own words about a program that can't be run; `run_dir` is `.../PODS/pods/POD/containers/CONTAINER`.
    pub(super) async fn why_not(&self, run_dir: &Utf8Path) -> Option<String> {
        let container = run_dir.file_name()?;
        let pod = run_dir.parent()?.parent()?.file_name()?.parse().ok()?;
        let log = format!("{RUN}/{}/crun.log", guest::bundle(container));
        let read = guest::read(&*self.monitor_if_any(&pod)?, vec![log]).await.ok()?;
        program_trouble(&String::from_utf8_lossy(&read.first()?.content))
    }

    /// Removes what a guest has of a container that its monitor has forgotten.
    pub(super) async fn forget(&self, pod: &PodRecord, container: &ContainerId) -> Result<()> {
        let Some(monitor) = self.monitor_if_any(&pod.id) else { return Ok(()) };
        guest::remove_root(&*monitor, container.as_str()).await?;
        guest::remove(&*monitor, guest::bundle(container.as_str())).await
    }
}

/// Gives the container a host name of its own: the guest has none.
fn name_host(spec: &mut Spec, hostname: &str) -> Result<()> {
    let Some(mut linux) = spec.linux().clone() else { return Err(Error::internal("a spec without Linux")) };
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    namespaces.push(oci::built(LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Uts).build())?);
    linux.set_namespaces(Some(namespaces));
    spec.set_linux(Some(linux));
    spec.set_hostname(Some(hostname.to_owned()).filter(|h| !h.is_empty()));
    Ok(())
}
