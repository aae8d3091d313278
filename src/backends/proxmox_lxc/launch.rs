//! Launch plans: the OCI runtime's calls, each made inside of the CT's PID namespace by the helper.

use camino::Utf8Path;

use super::{ProxmoxLxcBackend, native};
use crate::backends::pods::launch::{Calls, ExecFiles, exec_process, write};
use crate::backends::pods::{PATH, classes};
use crate::core::backend::{ExecContext, Launch, LaunchContext};
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::ContainerId;
use crate::core::ports::monitor_v1;
use crate::core::records::PodRecord;
use crate::fail_point;
use crate::integrations::cgroup::Parent;
use crate::utils::process::Spawn;

/// A call of the helper: its verb, its options, and the OCI runtime's own verb.
pub(super) struct Call<'a> {
    pub(super) verb: &'a str,
    pub(super) options: Vec<(&'a str, String)>,
    pub(super) log: &'a Utf8Path,
    pub(super) oom_score_adj: i32,
    pub(super) runtime: Vec<&'a str>,
}

impl ProxmoxLxcBackend {
    /// The process by which the CT's PID namespace is found: ours, and gone with it.
    fn inside(pod: &PodRecord) -> Result<String> {
        let watch = pod.facts.as_ref().and_then(|f| f.init.as_ref());
        let watch =
            watch.ok_or_else(|| Error::precondition(format!("nothing is known of the CT of pod {}", pod.id)))?;
        Ok(format!("{}:{}", watch.pid, watch.start_time))
    }

    pub(super) fn program(&self, pod: &PodRecord, call: Call<'_>) -> Result<monitor_v1::Program> {
        let mut args = vec![call.verb.to_owned(), "--init".to_owned(), Self::inside(pod)?];
        for (name, value) in call.options {
            args.extend([format!("--{name}"), value]);
        }
        args.extend(["--log", call.log.as_str(), "--", self.config.runtime.as_str()].map(String::from));
        args.extend(["--root", self.root().as_str(), "--log", call.log.as_str()].map(String::from));
        args.extend(call.runtime.into_iter().map(String::from));
        Ok(self.helper(args, call.log, call.oom_score_adj))
    }

    /// A call of the helper.
    pub(super) fn helper(&self, args: Vec<String>, log: &Utf8Path, oom_score_adj: i32) -> monitor_v1::Program {
        monitor_v1::Program {
            path: self.config.helper.to_string(),
            args,
            env: vec![format!("PATH={PATH}")],
            cwd: String::new(),
            deadline_ms: u32::try_from(self.config.timeout.as_millis()).unwrap_or(u32::MAX),
            error_log: log.to_string(),
            oom_score_adj,
        }
    }

    pub(super) async fn plan_launch(&self, context: LaunchContext<'_>) -> Result<Launch> {
        classes::refuse("proxmox-lxc", context.pod, context.config)?;
        let pod = self.in_ct(context.pod)?;
        let context = LaunchContext { pod: &pod, ..context };
        let prepared = self.pods.prepare(&context, true).await?;
        let LaunchContext { run_dir, id, config, .. } = context;
        let text =
            serde_json::to_vec(&prepared.spec).map_err(|e| Error::because(Kind::Internal, "encode the OCI spec", e))?;
        write(&run_dir.join("config.json"), &text)?;
        fail_point!("create.bundle");
        let at = |name: &str| run_dir.join(name);
        let (log, pid_file, inner, status) = (at("crun.log"), at("pid"), at("pid.ct"), at("status"));
        let console = self.pods.console_socket(id.as_str());
        let mut create = vec!["create", "--bundle", run_dir.as_str(), "--pid-file", inner.as_str()];
        if config.tty {
            create.extend(["--console-socket", console.as_str()]);
        }
        create.push(id.as_str());
        let files = [("runtime-pid-file", &inner), ("pid-file", &pid_file), ("status", &status)]
            .map(|(k, v)| (k, v.to_string()));
        let oom_score_adj = prepared.oom_score_adj;
        let create = Call { verb: "keep", options: files.into(), log: &log, oom_score_adj, runtime: create };
        let start = Call {
            verb: "within",
            options: Vec::new(),
            log: &log,
            oom_score_adj: 0,
            runtime: vec!["start", id.as_str()],
        };
        let folders = self.pods.hierarchy.container(&prepared.parent, id);
        let calls = Calls {
            create: self.program(&pod, create)?,
            start: self.program(&pod, start)?,
            delete: self.program(&pod, self.delete_call(&prepared.parent, id, &log))?,
            pid_file,
            status_file: status.to_string(),
            cgroups: monitor_v1::Cgroups { memory: folders.memory.to_string(), kill: folders.kill.to_string() },
            terminal: config.tty,
        };
        let plan = self.pods.monitor_plan(&context, &prepared, calls);
        Ok(Launch { plan, user: prepared.user, stop_signal: prepared.stop_signal, adjusted: None })
    }

    pub(super) fn delete_call<'a>(&self, parent: &Parent, id: &'a ContainerId, log: &'a Utf8Path) -> Call<'a> {
        let mut options = vec![("state", self.root().join(id.as_str()).to_string())];
        for root in self.pods.hierarchy.roots() {
            options.push(("remove", root.join(parent.container(id)).to_string()));
        }
        Call { verb: "forget", options, log, oom_score_adj: 0, runtime: vec!["delete", "--force", id.as_str()] }
    }

    /// Removes a container from the OCI runtime without its monitor.
    pub(super) async fn forget(&self, pod: &PodRecord, parent: &Parent, id: &ContainerId) -> Result<()> {
        let call = self.program(pod, self.delete_call(parent, id, "/dev/null".into()))?;
        Spawn::new(&call.path, &call.args).env("PATH", PATH).deadline(self.config.timeout).run_ok().await?;
        Ok(())
    }

    pub(super) async fn plan_exec(&self, context: ExecContext<'_>) -> Result<monitor_v1::Exec> {
        let ExecContext { pod, container, run_dir, exec_id, command, tty } = context;
        let pod = self.in_ct(pod)?;
        let (_, mut process) = exec_process(run_dir, &container.id, command, tty).await?;
        if native::is(&pod) {
            process.set_apparmor_profile(native::profile_of(container.pid).await);
        }
        let oom_score_adj = process.oom_score_adj().unwrap_or(0);
        let files = ExecFiles::of(run_dir, exec_id);
        let text =
            serde_json::to_vec(&process).map_err(|e| Error::because(Kind::Internal, "encode the exec's process", e))?;
        write(&files.process, &text)?;
        let console = self.pods.console_socket(exec_id);
        let mut verb =
            vec!["exec", "--detach", "--pid-file", files.inner_pid.as_str(), "--process", files.process.as_str()];
        if tty {
            verb.extend(["--console-socket", console.as_str()]);
        }
        let (group, folders) = self.pods.hierarchy.create_exec(&self.pods.parent(&pod)?, &container.id, exec_id)?;
        if !folders.is_empty() {
            verb.extend(["--cgroup", group.as_str()]);
        }
        verb.push(container.id.as_str());
        let options = vec![("runtime-pid-file", files.inner_pid.to_string()), ("pid-file", files.pid.to_string())];
        let program =
            self.program(&pod, Call { verb: "keep", options, log: &files.log, oom_score_adj, runtime: verb })?;
        Ok(self.pods.monitor_exec(&container.id, exec_id, program, &files.pid, tty, folders))
    }
}
