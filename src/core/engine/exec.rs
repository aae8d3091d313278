//! ExecSync and ReopenContainerLog: they reach a running container past the pod's queue, since they change nothing.

use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use super::{Engine, Scope};
use crate::core::backend::ExecContext;
use crate::core::error::{Error, Kind, Result};
use crate::core::ports::Monitor;
use crate::core::records::{ContainerRecord, PodRecord};
use crate::core::state::{ContainerRequest, Verdict};
use crate::fail_point;

/// More output than this is read and thrown away. It counts for both streams together: a kubelet receives messages of at
/// most 16 MiB, and there is a little more in one than output.
const OUTPUT_CAP: usize = (16 << 20) - (4 << 10);

/// What an exec said and how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecOutput {
    /// With `stderr` a little less than 16 MiB at most.
    pub stdout: Vec<u8>,
    /// At most half of that where `stdout` takes the other half.
    pub stderr: Vec<u8>,
    /// Exit code, 128 + n after signal n.
    pub exit_code: i32,
}

impl Engine {
    /// Runs `command` in a running container and waits for its end; DeadlineExceeded after `timeout`, when it and its
    /// children are killed. Output is read for a bounded time after the end, whoever still holds it open.
    pub async fn exec_sync(
        &self,
        scope: Scope,
        id: &str,
        command: &[String],
        timeout: Option<Duration>,
    ) -> Result<ExecOutput> {
        let (container, monitor) = self.reach(scope, id)?;
        if command.is_empty() {
            return Err(Error::invalid(format!("exec in container {}: no command", container.id)));
        }
        let pod = self.shared.index().pod(&container.pod).ok_or_else(|| Error::not_found("the pod is gone"))?;
        let run_dir = self.container_run_dir(&container);
        let exec_id = uuid::Uuid::new_v4().simple().to_string();
        let backend = self.shared.backend(&pod.handler)?;
        let cleanup =
            ExecFiles { backend: &*backend, pod: &pod, container: &container.id, run_dir: &run_dir, exec_id: &exec_id };
        let mut plan = backend
            .exec_plan(ExecContext {
                pod: &pod,
                container: &container,
                run_dir: &run_dir,
                exec_id: &exec_id,
                command,
                tty: false,
            })
            .await?;
        fail_point!("exec.planned");
        plan.timeout_ms = timeout.map_or(0, |t| t.as_millis().clamp(1, u128::from(u32::MAX)) as u32);
        let (mut out, out_end) = output_pipe()?;
        let (mut err, err_end) = output_pipe()?;
        give_ends(&pod, &container, [&out_end, &err_end])?;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let ended = {
            let mut read = std::pin::pin!(async {
                tokio::join!(read_capped(&mut out, &mut stdout), read_capped(&mut err, &mut stderr));
            });
            let mut run = std::pin::pin!(monitor.exec(plan, [None, Some(out_end), Some(err_end)]));
            let mut drained = false;
            let ended = loop {
                tokio::select! {
                    ended = &mut run => break ended,
                    () = &mut read, if !drained => drained = true,
                }
            };
            if !drained && ended.as_ref().is_ok_and(|e| !e.timed_out) {
                let _ = tokio::time::timeout(self.shared.config.exec_drain, read).await;
            }
            ended
        };
        fail_point!("exec.ended");
        drop(cleanup);
        fail_point!("exec.cleaned");
        let ended = ended.map_err(|e| e.context(format!("exec in container {}", container.id)))?;
        if ended.timed_out {
            return Err(Error::new(
                Kind::DeadlineExceeded,
                format!(
                    "exec in container {}: {:?} did not end within {:?} and was killed",
                    container.id,
                    command[0],
                    timeout.unwrap_or_default()
                ),
            ));
        }
        cut(&mut stdout, &mut stderr);
        Ok(ExecOutput { stdout, stderr, exit_code: ended.exit.code })
    }

    /// Opens the container's log anew; answers after the swap.
    pub async fn reopen_log(&self, scope: Scope, id: &str) -> Result<()> {
        let (container, monitor) = self.reach(scope, id)?;
        monitor
            .reopen_log(&container.id)
            .await
            .map_err(|e| e.context(format!("reopen the log of container {}", container.id)))
    }

    pub(super) fn reach(
        &self,
        scope: Scope,
        id: &str,
    ) -> Result<(std::sync::Arc<ContainerRecord>, std::sync::Arc<dyn Monitor>)> {
        let container = self.container(scope, id)?;
        if let Verdict::Refuse(why) = container.phase.verdict(ContainerRequest::Reach) {
            return Err(Error::precondition(format!("container {}: {why}", container.id)));
        }
        let monitor = self.shared.index().monitor(&container.pod);
        let monitor =
            monitor.ok_or_else(|| Error::new(Kind::Unavailable, format!("pod {} has no monitor", container.pod)))?;
        Ok((container, monitor))
    }
}

/// Removes an exec's files, also when its caller goes away.
struct ExecFiles<'a> {
    backend: &'a dyn crate::core::backend::Backend,
    pod: &'a crate::core::records::PodRecord,
    container: &'a crate::core::ids::ContainerId,
    run_dir: &'a camino::Utf8Path,
    exec_id: &'a str,
}

impl Drop for ExecFiles<'_> {
    fn drop(&mut self) {
        self.backend.end_exec(self.pod, self.container, self.run_dir, self.exec_id);
    }
}

/// In a user namespace a process can open its own /dev/stdout only when a user of the namespace owns it; the runtime,
/// which is inside by then, can't give it away.
pub(super) fn give_ends<'a>(
    pod: &PodRecord,
    container: &ContainerRecord,
    ends: impl IntoIterator<Item = &'a OwnedFd>,
) -> Result<()> {
    use rustix::fs::{Gid, Uid};
    let Some(user) = &pod.config.security.namespaces.user else { return Ok(()) };
    let owner = user.host_uid(container.user.uid).map(Uid::from_raw);
    let group = user.host_gid(container.user.gid).map(Gid::from_raw);
    for end in ends {
        rustix::fs::fchown(end, owner, group)
            .map_err(|e| Error::io(format!("give a pipe to an exec in container {}", container.id), e.into()))?;
    }
    Ok(())
}

fn output_pipe() -> Result<(pipe::Receiver, OwnedFd)> {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map_err(|e| Error::io("make a pipe for an exec", e.into()))?;
    rustix::io::ioctl_fionbio(&read, true).map_err(|e| Error::io("make a pipe for an exec", e.into()))?;
    let read = pipe::Receiver::from_owned_fd(read).map_err(|e| Error::io("make a pipe for an exec", e))?;
    Ok((read, write))
}

/// Cuts both to [`OUTPUT_CAP`] together: each keeps at least half of it.
fn cut(stdout: &mut Vec<u8>, stderr: &mut Vec<u8>) {
    stdout.truncate(OUTPUT_CAP - stderr.len().min(OUTPUT_CAP / 2));
    stderr.truncate(OUTPUT_CAP - stdout.len());
}

/// Reads to the end; keeps the first [`OUTPUT_CAP`] bytes.
async fn read_capped(from: &mut pipe::Receiver, into: &mut Vec<u8>) {
    let mut buffer = [0u8; 8192];
    while let Ok(n @ 1..) = from.read(&mut buffer).await {
        let room = OUTPUT_CAP - into.len();
        into.extend_from_slice(&buffer[..n.min(room)]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_streams_fit_one_message() {
        let lengths = |out: usize, err: usize| {
            let (mut out, mut err) = (vec![0; out], vec![0; err]);
            cut(&mut out, &mut err);
            (out.len(), err.len())
        };
        assert_eq!(lengths(5, 7), (5, 7));
        assert_eq!(lengths(OUTPUT_CAP, 7), (OUTPUT_CAP - 7, 7));
        assert_eq!(lengths(7, OUTPUT_CAP), (7, OUTPUT_CAP - 7));
        assert_eq!(lengths(OUTPUT_CAP, OUTPUT_CAP), (OUTPUT_CAP / 2, OUTPUT_CAP / 2));
    }
}
