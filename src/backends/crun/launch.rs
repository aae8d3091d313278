//! Launch plans: writes the bundle, and says which calls of crun run it.

use super::CrunBackend;
use crate::backends::pods::launch::{Calls, ExecFiles, exec_process, write};
use crate::core::backend::{ExecContext, Launch, LaunchContext};
use crate::core::error::{Error, Kind, Result};
use crate::core::ports::monitor_v1;
use crate::fail_point;

impl CrunBackend {
    pub(super) async fn plan_launch(&self, context: LaunchContext<'_>) -> Result<Launch> {
        let mut prepared = self.pods.prepare(&context, self.program.abilities().recursive_read_only).await?;
        self.pods.add_classes(context.pod, context.config, &mut prepared.spec).await?;
        let adjusted = self.pods.adjust(&context, &mut prepared).await?;
        let LaunchContext { run_dir, id, config, .. } = context;
        let text =
            serde_json::to_vec(&prepared.spec).map_err(|e| Error::because(Kind::Internal, "encode the OCI spec", e))?;
        write(&run_dir.join("config.json"), &text)?;
        fail_point!("create.bundle");
        let (log, pid_file) = (run_dir.join("crun.log"), run_dir.join("pid"));
        let console = self.pods.console_socket(id.as_str());
        let mut create = vec!["create", "--bundle", run_dir.as_str(), "--pid-file", pid_file.as_str()];
        if config.tty {
            create.extend(["--console-socket", console.as_str()]);
        }
        create.push(id.as_str());
        let folders = self.pods.hierarchy.container(&prepared.parent, id);
        let calls = Calls {
            create: self.call(&log, prepared.oom_score_adj, &create),
            start: self.call(&log, 0, &["start", id.as_str()]),
            delete: self.call(&log, 0, &["delete", "--force", id.as_str()]),
            pid_file: pid_file.clone(),
            status_file: String::new(),
            cgroups: monitor_v1::Cgroups { memory: folders.memory.to_string(), kill: folders.kill.to_string() },
            terminal: config.tty,
        };
        let plan = self.pods.monitor_plan(&context, &prepared, calls);
        Ok(Launch { plan, user: prepared.user, stop_signal: prepared.stop_signal, adjusted })
    }

    pub(super) async fn plan_exec(&self, context: ExecContext<'_>) -> Result<monitor_v1::Exec> {
        let ExecContext { pod, container, run_dir, exec_id, command, tty } = context;
        let (_, process) = exec_process(run_dir, &container.id, command, tty).await?;
        let oom = process.oom_score_adj().unwrap_or(0);
        let files = ExecFiles::of(run_dir, exec_id);
        let text =
            serde_json::to_vec(&process).map_err(|e| Error::because(Kind::Internal, "encode the exec's process", e))?;
        write(&files.process, &text)?;
        let console = self.pods.console_socket(exec_id);
        let mut verb = vec!["exec", "--detach", "--pid-file", files.pid.as_str(), "--process", files.process.as_str()];
        if tty {
            verb.extend(["--console-socket", console.as_str()]);
        }
        let (group, folders) = if self.program.abilities().exec_cgroup {
            self.pods.hierarchy.create_exec(&self.pods.parent(pod)?, &container.id, exec_id)?
        } else {
            Default::default()
        };
        if !folders.is_empty() {
            verb.extend(["--cgroup", group.as_str()]);
        }
        verb.push(container.id.as_str());
        let program = self.call(&files.log, oom, &verb);
        Ok(self.pods.monitor_exec(&container.id, exec_id, program, &files.pid, tty, folders))
    }
}
