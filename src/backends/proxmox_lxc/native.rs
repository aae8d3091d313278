//! Profile `native`: a CT is its pod's one container. The CT is made and connected as any other; its init waits, and becomes the
//! image's program when the container is made and let run, with its PID.
//!
//! The OCI runtime prepares the container in the CT's PID namespace, mounts and limits and all; then the CT's init takes the place of
//! its first process (the helper's `inherit`). That init is liblxc's child: how it ended, the kernel tells by its pidfd. Pods keep the
//! profile that they were made with, which their journal has. What a CT can't be is refused by name, before anything is made.

use camino::Utf8Path;

use super::ProxmoxLxcBackend;
use super::launch::Call;
use super::plan::{check_release, numbers};
use crate::backends::lxc;
use crate::backends::pods::launch::{Calls, write};
use crate::core::backend::{Launch, LaunchContext};
use crate::core::blocking::blocking;
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::PodId;
use crate::core::ports::monitor_v1;
use crate::core::records::{PodRecord, Resource};
use crate::core::spec::{ContainerConfig, Profile};
use crate::fail_point;
use crate::integrations::proxmox_api::Version;
use lxcri_lxc::plan::Plan;

/// First kernel that tells how a process ended that is not a child of whoever asks (PIDFD_INFO_EXIT).
const KERNEL: (u32, u32) = (6, 15);
/// The CT's program: the init of our template, as it waits.
const ENTRYPOINT: &str = "/sbin/init native";

/// What a pod's journal has of such a CT.
pub fn note() -> Resource {
    Resource { kind: "proxmox-ct-profile".into(), name: "native".into() }
}

/// Whether the pod's CT is one.
pub fn is(pod: &PodRecord) -> bool {
    pod.resources.contains(&note())
}

/// Keys of the CT in Proxmox. Its console is a shell in the container, since there is no terminal that somebody listens at.
pub fn keys() -> [(String, String); 2] {
    [("entrypoint", ENTRYPOINT), ("cmode", "shell")].map(|(key, value)| (key.to_owned(), value.to_owned()))
}

/// Whether this Proxmox can have such CTs.
pub fn check_proxmox(version: &Version) -> Result<()> {
    check_release(version, "profile \"native\"", "CTs can have a program other than /sbin/init")
}

/// Whether this node's kernel can.
pub fn check_kernel(release: &str) -> Result<()> {
    if numbers(release) >= KERNEL {
        return Ok(());
    }
    let (major, minor) = KERNEL;
    Err(Error::precondition(format!(
        "handlers.proxmox-lxc.profile \"native\" needs Linux {major}.{minor} or later, which tells how a CT's init has ended; this is \
         {release}"
    )))
}

/// Release of the kernel.
pub fn kernel() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// AppArmor profile of a CT's init, which execs are to have, too. None: it has none.
pub async fn profile_of(init: i32) -> Option<String> {
    let text = blocking(move || {
        let file = format!("/proc/{init}/attr/current");
        std::fs::read_to_string(&file).map_err(|e| Error::io(file, e))
    });
    // A kernel without AppArmor has no such file, or nothing in it.
    profile(&text.await.ok()?)
}

/// `NAME (MODE)`; with others on top of it, which nobody can ask for by name, the first.
fn profile(label: &str) -> Option<String> {
    let label = label.trim_end_matches(['\n', '\0']);
    let name = label.rsplit_once(" (").map_or(label, |(name, _)| name);
    let name = name.split_once("//&").map_or(name, |(first, _)| first);
    (!name.is_empty() && name != "unconfined").then(|| name.to_owned())
}

/// Refuses what a CT's init can't be.
pub fn check_container(container: &ContainerConfig) -> Result<()> {
    if let Profile::Localhost(name) = &container.security.apparmor {
        let what = format!(
            "AppArmor profile {name:?}: with profile \"native\" of handler proxmox-lxc a container has that of its CT, which Proxmox sets"
        );
        return Err(Error::new(Kind::Unimplemented, what));
    }
    Ok(())
}

/// Refuses a container of a CT that is one already.
pub fn check_only(state: &Utf8Path, pod: &PodId) -> Result<()> {
    let folder = state.join("pods").join(pod.as_str()).join("containers");
    let failed = |e| Error::io(format!("look into {folder}"), e);
    let entries = match std::fs::read_dir(&folder) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(failed)?,
    };
    for entry in entries {
        let entry = entry.map_err(failed)?;
        // Written when the init has become it.
        if entry.path().join("pid").try_exists().map_err(failed)? {
            return Err(Error::precondition(format!(
                "pod {pod} is container {}: with profile \"native\" of handler proxmox-lxc a CT is one container, so that there are no \
                 init containers and no others beside it (handlers.proxmox-lxc.profile)",
                entry.file_name().to_string_lossy()
            )));
        }
    }
    Ok(())
}

impl ProxmoxLxcBackend {
    pub(super) async fn plan_native(&self, context: LaunchContext<'_>) -> Result<Launch> {
        let pod = self.in_ct(context.pod)?;
        let context = LaunchContext { pod: &pod, ..context };
        let mut prepared = self.pods.prepare(&context, true).await?;
        let LaunchContext { run_dir, id, config, .. } = context;
        let process = prepared.spec.process().clone();
        let mut process = process.ok_or_else(|| Error::internal("a spec without a process"))?;
        let mut bare = prepared.spec.clone();
        bare.set_linux(None);
        // The init has its CT's.
        let plan = Plan { apparmor: None, ..lxc::plan::process(&bare, &process)? };
        // The runtime's process is never let run; the init makes its own terminal.
        process.set_terminal(Some(false));
        prepared.spec.set_process(Some(process));
        let encode = |e| Error::because(Kind::Internal, "encode the OCI spec", e);
        write(&run_dir.join("config.json"), &serde_json::to_vec(&prepared.spec).map_err(encode)?)?;
        let at = |name: &str| run_dir.join(name);
        let (log, pid_file, inner, file) = (at("crun.log"), at("pid"), at("pid.ct"), at("init.plan"));
        write(&file, &plan.encode().map_err(Error::invalid)?)?;
        fail_point!("create.bundle");
        let state = self.root().join(id.as_str());
        let mut options = vec![
            ("runtime-pid-file", inner.to_string()),
            ("pid-file", pid_file.to_string()),
            ("plan", file.to_string()),
            ("state", state.to_string()),
        ];
        if config.tty {
            options.push(("console-socket", self.pods.console_socket(id.as_str()).to_string()));
        }
        for root in self.pods.hierarchy.roots() {
            options.push(("cgroup", root.join(prepared.parent.container(id)).to_string()));
        }
        let create = vec!["create", "--bundle", run_dir.as_str(), "--pid-file", inner.as_str(), id.as_str()];
        let oom_score_adj = prepared.oom_score_adj;
        let create = Call { verb: "inherit", options, log: &log, oom_score_adj, runtime: create };
        // Where the runtime's own process would wait.
        let start = ["start", "--log", log.as_str(), state.join("exec.fifo").as_str()].map(String::from);
        let folders = self.pods.hierarchy.container(&prepared.parent, id);
        let calls = Calls {
            create: self.program(&pod, create)?,
            start: self.helper(start.into(), &log, 0),
            delete: self.program(&pod, self.delete_call(&prepared.parent, id, &log))?,
            pid_file,
            status_file: String::new(),
            cgroups: monitor_v1::Cgroups { memory: folders.memory.to_string(), kill: folders.kill.to_string() },
            terminal: config.tty,
        };
        let plan = self.pods.monitor_plan(&context, &prepared, calls);
        Ok(Launch { plan, user: prepared.user, stop_signal: prepared.stop_signal, adjusted: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_profile_of_an_init() {
        let of = |label| profile(label);
        assert_eq!(of("lxc-9000_</var/lib/lxc> (enforce)\n").as_deref(), Some("lxc-9000_</var/lib/lxc>"));
        assert_eq!(of("lxc-9_<x>//&:lxc-9_<x>:unconfined (mixed)\n").as_deref(), Some("lxc-9_<x>"));
        assert_eq!((of("unconfined\n"), of("")), (None, None));
    }

    #[test]
    fn a_node_that_is_too_old_is_refused_by_what_is_too_old() {
        let version = |v: &str| Version { version: v.into(), release: String::new() };
        check_proxmox(&version("9.1.2")).expect("new enough");
        for fits in ["6.15.0", "6.17.2-1-pve", "7.0.0-rc1"] {
            check_kernel(fits).expect(fits);
        }
        let e = check_proxmox(&version("9.0.3")).expect_err("no entrypoint");
        assert!(e.kind() == Kind::FailedPrecondition && e.chain().contains("profile \"native\" needs Proxmox VE 9.1"));
        let e = check_kernel("6.14.11-2-pve").expect_err("no exit codes");
        assert!(e.chain().contains("needs Linux 6.15") && e.chain().contains("6.14.11-2-pve"), "{e:?}");
    }
}
