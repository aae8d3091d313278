//! Exec, Attach and PortForward, past the pod's queue as ExecSync: they change nothing.
//!
//! Called by the streaming server. A process's streams are pipes whose other ends the monitor has: nothing of them goes
//! through its socket. Dropping a [`Process`] kills an exec and detaches from a container.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::net::unix::pipe;

use super::exec::give_ends;
use super::{Engine, Scope};
use crate::core::backend::ExecContext;
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::ContainerId;
use crate::core::ports::Monitor;
use crate::core::records::{ContainerRecord, PodRecord};
use crate::core::state::{ContainerPhase, PodPhase};

/// A client that lags behind a container's output by so many bytes is cut off: the pipe's size.
const LAG: usize = 1 << 20;
/// Size of the pipes of an exec's streams: whoever copies through them is woken less often than with the kernel's 64 KiB.
const ROOM: usize = 256 << 10;
/// An exec's terminal is not there at once; its size is set again after this time.
const AGAIN: Duration = Duration::from_millis(20);

/// The streams that a client wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wanted {
    /// A terminal; then there is no stderr.
    pub tty: bool,
    /// Input.
    pub stdin: bool,
    /// Output.
    pub stdout: bool,
    /// Errors.
    pub stderr: bool,
}

/// How a client's connection with a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessEnd {
    /// The exec's process ended with this code; 128 + n after signal n.
    Exit(i32),
    /// The container ended, or the client's input (where it wanted nothing else).
    Detached,
    /// The client lagged too far behind the container's output.
    Lagged,
}

/// A process that a client is connected with: our ends of its streams.
pub struct Process {
    /// Its input; dropped, the input ends.
    pub stdin: Option<pipe::Sender>,
    /// Its output.
    pub stdout: Option<pipe::Receiver>,
    /// Its errors.
    pub stderr: Option<pipe::Receiver>,
    /// Its terminal.
    pub terminal: Terminal,
    /// Starts it when it is first polled (one attached to runs already), and waits for the end. Dropped before that, an
    /// exec is killed.
    pub ended: BoxFuture<'static, Result<ProcessEnd>>,
}

/// The terminal of an exec or a container.
pub struct Terminal {
    monitor: Arc<dyn Monitor>,
    container: ContainerId,
    exec_id: Option<String>,
}

impl Terminal {
    /// Gives it a size in characters. That there is none, or not any more, is no error.
    pub async fn resize(&self, width: u16, height: u16) {
        // An exec's terminal exists when its process runs, which a client's first size does not wait for.
        for _ in 0..50 {
            match self.monitor.resize(&self.container, self.exec_id.as_deref(), width.into(), height.into()).await {
                Err(e) if matches!(e.kind(), Kind::NotFound | Kind::FailedPrecondition) && self.exec_id.is_some() => {
                    tokio::time::sleep(AGAIN).await;
                }
                Err(e) => {
                    tracing::debug!(container = %self.container, error = e.chain(), "a terminal can't be resized");
                    return;
                }
                Ok(()) => return,
            }
        }
    }
}

impl Engine {
    /// The running container that a client would be connected with.
    pub fn reachable(&self, scope: Scope, id: &str) -> Result<Arc<ContainerRecord>> {
        self.reach(scope, id).map(|(container, _)| container)
    }

    /// The ready pod whose ports a client would be connected with.
    pub fn ready_pod(&self, scope: Scope, id: &str) -> Result<Arc<PodRecord>> {
        let pod = self.pod(scope, id)?;
        if pod.phase != PodPhase::Ready {
            return Err(Error::precondition(format!("pod sandbox {} is not ready", pod.id)));
        }
        Ok(pod)
    }

    /// Runs `command` in a running container with streams of its own.
    pub async fn exec_stream(&self, scope: Scope, id: &str, command: &[String], wanted: Wanted) -> Result<Process> {
        let (container, monitor) = self.reach(scope, id)?;
        if command.is_empty() {
            return Err(Error::invalid(format!("exec in container {}: no command", container.id)));
        }
        let pod = self.shared.index().pod(&container.pod).ok_or_else(|| Error::not_found("the pod is gone"))?;
        let run_dir = self.container_run_dir(&container);
        let exec_id = uuid::Uuid::new_v4().simple().to_string();
        let backend = self.shared.backend(&pod.handler)?;
        let files = {
            let (backend, run_dir, exec_id) = (backend.clone(), run_dir.clone(), exec_id.clone());
            let (pod, container) = (pod.clone(), container.id.clone());
            Cleanup(Some(move || backend.end_exec(&pod, &container, &run_dir, &exec_id)))
        };
        let context = ExecContext {
            pod: &pod,
            container: &container,
            run_dir: &run_dir,
            exec_id: &exec_id,
            command,
            tty: wanted.tty,
        };
        let plan = backend.exec_plan(context).await?;
        let (stdin, in_end) = wanted.stdin.then(input_pipe).transpose()?.unzip();
        let (stdout, out_end) = wanted.stdout.then(output_pipe).transpose()?.unzip();
        let (stderr, err_end) = (wanted.stderr && !wanted.tty).then(output_pipe).transpose()?.unzip();
        for end in [&in_end, &out_end, &err_end].into_iter().flatten() {
            // A user with very many pipes gets small ones.
            let _ = rustix::pipe::fcntl_setpipe_size(end, ROOM);
        }
        give_ends(&pod, &container, [&in_end, &out_end, &err_end].into_iter().flatten())?;
        let terminal = Terminal { monitor: monitor.clone(), container: container.id.clone(), exec_id: Some(exec_id) };
        let ended = async move {
            let _files = files;
            let ended = monitor.exec(plan, [in_end, out_end, err_end]).await;
            let ended = ended.map_err(|e| e.context(format!("exec in container {}", container.id)))?;
            Ok(ProcessEnd::Exit(ended.exit.code))
        };
        Ok(Process { stdin, stdout, stderr, terminal, ended: ended.boxed() })
    }

    /// The container that a client can attach to: it runs, or, for our own command line, is about to.
    pub fn attachable(&self, scope: Scope, id: &str, wanted: Wanted) -> Result<Arc<ContainerRecord>> {
        let mut container = self.container(scope, id)?;
        if scope != Scope::Local || container.phase != ContainerPhase::Created {
            container = self.reachable(scope, id)?;
        }
        if wanted.stdin && !container.config.stdin && !container.config.tty {
            return Err(Error::precondition(format!("container {} was made without stdin", container.id)));
        }
        Ok(container)
    }

    /// Connects with the streams of a container's main process, from now on.
    pub async fn attach(&self, scope: Scope, id: &str, wanted: Wanted) -> Result<Process> {
        let container = self.attachable(scope, id, wanted)?;
        let monitor = self.shared.index().monitor(&container.pod);
        let monitor =
            monitor.ok_or_else(|| Error::new(Kind::Unavailable, format!("pod {} has no monitor", container.pod)))?;
        let tty = container.config.tty;
        let (stdin, in_end) = wanted.stdin.then(input_pipe).transpose()?.unzip();
        let (stdout, out_end) = wanted.stdout.then(output_pipe).transpose()?.unzip();
        let (stderr, err_end) = (wanted.stderr && !tty).then(output_pipe).transpose()?.unzip();
        for end in [&out_end, &err_end].into_iter().flatten() {
            // Less is allowed to a daemon without rights: then it may lag by less.
            let _ = rustix::pipe::fcntl_setpipe_size(end, LAG);
        }
        let terminal = Terminal { monitor: monitor.clone(), container: container.id.clone(), exec_id: None };
        let named = |e: Error, id: &ContainerId| e.context(format!("attach to container {id}"));
        let end = monitor.attach(&container.id, [in_end, out_end, err_end]).await;
        let end = end.map_err(|e| named(e, &container.id))?;
        let ended = async move {
            Ok(if end.await.map_err(|e| named(e, &container.id))? { ProcessEnd::Lagged } else { ProcessEnd::Detached })
        };
        Ok(Process { stdin, stdout, stderr, terminal, ended: ended.boxed() })
    }

    /// Connects with a TCP port of a ready pod, on its loopback interface.
    pub async fn dial(&self, scope: Scope, pod: &str, port: u16) -> Result<tokio::net::TcpStream> {
        let pod = self.ready_pod(scope, pod)?;
        let socket = self.shared.backend(&pod.handler)?.dial(&pod, port).await?;
        let failed = |e| Error::io(format!("the connection with port {port} of pod {}", pod.id), e);
        socket.set_nonblocking(true).map_err(failed)?;
        let _ = socket.set_nodelay(true);
        tokio::net::TcpStream::from_std(socket).map_err(failed)
    }
}

/// Done when it is dropped.
struct Cleanup<F: FnOnce()>(Option<F>);

impl<F: FnOnce()> Drop for Cleanup<F> {
    fn drop(&mut self) {
        if let Some(clean) = self.0.take() {
            clean();
        }
    }
}

fn make_pipe() -> Result<(OwnedFd, OwnedFd)> {
    pipe_with(PipeFlags::CLOEXEC).map_err(|e| Error::io("make a pipe", e.into()))
}

/// Only our end is non-blocking: the other may become a process's own.
fn ours(fd: &OwnedFd) -> Result<()> {
    rustix::io::ioctl_fionbio(fd, true).map_err(|e| Error::io("make a pipe", e.into()))
}

fn output_pipe() -> Result<(pipe::Receiver, OwnedFd)> {
    let (read, write) = make_pipe()?;
    ours(&read)?;
    Ok((pipe::Receiver::from_owned_fd(read).map_err(|e| Error::io("make a pipe", e))?, write))
}

fn input_pipe() -> Result<(pipe::Sender, OwnedFd)> {
    let (read, write) = make_pipe()?;
    ours(&write)?;
    Ok((pipe::Sender::from_owned_fd(write).map_err(|e| Error::io("make a pipe", e))?, read))
}
