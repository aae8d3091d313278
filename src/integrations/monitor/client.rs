//! A connection to one monitor: requests with their answers, events, execs.
//!
//! One reader task per connection, owned by the supervisor's task set, and no buffer at rest. Every call has a
//! deadline; a call whose future is dropped is forgotten (an exec is killed). When the connection ends all calls
//! fail with Gone and the last event is [`MonitorEvent::Gone`].

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use lxcri_monitor_proto::v1::{self, Reply, Request, reply::Body, request::Op};
use lxcri_monitor_proto::wire::{self, WireError};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tracing::{Instrument, Span};

use super::error::MonitorError;
use crate::core::error::Result;
use crate::core::ids::{ContainerId, PodId};
use crate::core::ports::{AttachEnd, ExecExit, Lent, Monitor, MonitorEvent};
use crate::utils::tasks::TaskSet;
use crate::utils::trace;
use crate::utils::watched::watch;

/// Most calls are answered from memory.
const QUICK: Duration = Duration::from_secs(30);
/// What has to be answered at once: a monitor that is not stuck does it in microseconds.
const AT_ONCE: Duration = Duration::from_secs(10);
/// A guest that is not there yet is waited for, and then it mounts a disk, or writes megabytes.
const GUEST: Duration = Duration::from_secs(90);
/// On top of the programs' own deadlines.
const MARGIN: Duration = Duration::from_secs(60);
/// An answer that takes longer than this has the monitor asked whether it is there.
const QUIET: Duration = Duration::from_secs(10);
/// It says so in this time, or it hangs.
const PING: Duration = Duration::from_secs(15);
/// A program's deadline when the plan says none (see monitor.proto).
const PROGRAM: Duration = Duration::from_secs(120);
/// Events that may wait for the engine; then the reader waits, too, and with it the answers that the engine waits for. So it is
/// more than a pod has containers, which may all end at once. Room is made as it is needed.
const EVENTS: usize = 4096;

/// The port's implementation.
pub(super) struct Client {
    shared: Arc<Shared>,
    tasks: TaskSet,
}

struct Shared {
    pod: PodId,
    socket: AsyncFd<OwnedFd>,
    next: AtomicU64,
    pid: AtomicI32,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    /// The reader has ended: nothing will be answered.
    gone: bool,
    calls: HashMap<u64, oneshot::Sender<(Body, Vec<OwnedFd>)>>,
    execs: HashMap<String, oneshot::Sender<v1::ExecExited>>,
    attaches: HashMap<String, oneshot::Sender<v1::AttachEnded>>,
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn gone(&self) -> MonitorError {
        MonitorError::Gone { pod: self.pod.to_string() }
    }

    fn wire(&self, source: WireError) -> MonitorError {
        match source {
            WireError::Closed => self.gone(),
            source => MonitorError::Wire { pod: self.pod.to_string(), source },
        }
    }

    fn nonsense(&self, operation: &'static str) -> MonitorError {
        MonitorError::Nonsense { pod: self.pod.to_string(), operation }
    }

    async fn send(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<(), MonitorError> {
        loop {
            let mut guard = self.socket.ready(Interest::WRITABLE).await.map_err(|e| self.host(e))?;
            match wire::send(self.socket.get_ref(), request, fds) {
                Err(WireError::NotReady) => guard.clear_ready(),
                result => return result.map_err(|e| self.wire(e)),
            }
        }
    }

    fn host(&self, source: std::io::Error) -> MonitorError {
        MonitorError::Host { what: format!("pod {}: wait for its monitor", self.pod), source }
    }

    /// Asks and waits for the answer, at most `after`.
    async fn call(
        &self,
        operation: &'static str,
        op: Op,
        fds: &[BorrowedFd<'_>],
        after: Duration,
    ) -> Result<Body, MonitorError> {
        self.call_for(operation, op, fds, after).await.map(|(body, _)| body)
    }

    /// The same for an answer with descriptors.
    async fn call_for(
        &self,
        operation: &'static str,
        op: Op,
        fds: &[BorrowedFd<'_>],
        after: Duration,
    ) -> Result<(Body, Vec<OwnedFd>), MonitorError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        let (tell, told) = oneshot::channel();
        {
            let mut waiting = self.waiting();
            if waiting.gone {
                return Err(self.gone());
            }
            waiting.calls.insert(id, tell);
        }
        // However this ends, nobody waits for the answer after it.
        let _forget = Forget(|| drop(self.waiting().calls.remove(&id)));
        let answer = timeout(after, async {
            self.send(&Request { id, op: Some(op) }, fds).await?;
            told.await.map_err(|_| self.gone())
        });
        tokio::select! {
            answer = answer => match answer {
                Ok(Ok((Body::Error(error), _))) => Err(error.into()),
                Ok(result) => result,
                Err(_) => Err(self.silent(operation, after)),
            },
            // Programs have their time, the monitor itself has none to lose.
            () = self.hangs() => Err(self.silent(operation, QUIET + PING)),
        }
    }

    fn silent(&self, operation: &'static str, after: Duration) -> MonitorError {
        MonitorError::Silent { pod: self.pod.to_string(), operation, after }
    }

    /// Ends when the monitor does not answer at all.
    async fn hangs(&self) {
        loop {
            tokio::time::sleep(QUIET).await;
            let id = self.next.fetch_add(1, Ordering::Relaxed) + 1;
            let (tell, told) = oneshot::channel();
            self.waiting().calls.insert(id, tell);
            let _forget = Forget(|| drop(self.waiting().calls.remove(&id)));
            let hello = Op::Hello(v1::Hello { version: lxcri_monitor_proto::VERSION });
            let ping = async {
                self.send(&Request { id, op: Some(hello) }, &[]).await.ok()?;
                told.await.ok()
            };
            match timeout(PING, ping).await {
                Err(_) => return,
                Ok(Some(_)) => {}
                // The connection is gone, which the call hears for itself.
                Ok(None) => std::future::pending().await,
            }
        }
    }

    async fn done(&self, operation: &'static str, op: Op, after: Duration) -> Result<(), MonitorError> {
        match self.call(operation, op, &[], after).await? {
            Body::Done(_) => Ok(()),
            _ => Err(self.nonsense(operation)),
        }
    }

    async fn read(&self) -> Result<(Reply, Vec<OwnedFd>), MonitorError> {
        loop {
            let mut guard = self.socket.readable().await.map_err(|e| self.host(e))?;
            match wire::recv::<Reply>(self.socket.get_ref()) {
                Err(WireError::NotReady) => guard.clear_ready(),
                result => return result.map_err(|e| self.wire(e)),
            }
        }
    }

    /// The reader task.
    async fn serve(self: Arc<Self>, events: mpsc::Sender<MonitorEvent>) {
        loop {
            match self.read().await {
                Ok((reply, fds)) => {
                    match self.take(reply, fds) {
                        // Only for the log, and as often as a disk fills up: it must never keep an answer waiting
                        // that the engine waits for, nor take the room of ends.
                        Some(MonitorEvent::LogTrouble(..) | MonitorEvent::LogDropped(..))
                            if events.capacity() <= EVENTS / 2 => {}
                        // An engine that has dropped its end still makes calls.
                        Some(event) => drop(events.send(event).await),
                        None => {}
                    }
                }
                Err(MonitorError::Gone { .. }) => break,
                Err(error) => {
                    let error = crate::core::error::Error::from(error);
                    tracing::warn!(pod = %self.pod, error = error.chain(), "connection to a monitor broken");
                    break;
                }
            }
        }
        {
            let mut waiting = self.waiting();
            waiting.gone = true;
            waiting.calls = HashMap::new();
            waiting.execs = HashMap::new();
            waiting.attaches = HashMap::new();
        }
        let _ = events.send(MonitorEvent::Gone).await;
    }

    /// Gives an answer to who waits for it; what is left is an event for the engine.
    fn take(&self, reply: Reply, fds: Vec<OwnedFd>) -> Option<MonitorEvent> {
        let body = reply.body?;
        if reply.id != 0 {
            if let Some(tell) = self.waiting().calls.remove(&reply.id) {
                let _ = tell.send((body, fds));
            }
            return None;
        }
        let container = |id: String| match id.parse::<ContainerId>() {
            Ok(id) => Some(id),
            Err(_) => {
                tracing::warn!(pod = %self.pod, container = id, "a monitor tells of a container with no id");
                None
            }
        };
        match body {
            Body::ExecExited(exited) => {
                if let Some(tell) = self.waiting().execs.remove(&exited.exec_id) {
                    let _ = tell.send(exited);
                }
                None
            }
            Body::AttachEnded(ended) => {
                if let Some(tell) = self.waiting().attaches.remove(&ended.attach_id) {
                    let _ = tell.send(ended);
                }
                None
            }
            Body::ContainerExited(e) => {
                Some(MonitorEvent::ContainerExited(container(e.id)?, e.exit.unwrap_or_else(unknown_exit)))
            }
            Body::InitExited(e) => Some(MonitorEvent::InitExited(e.exit.unwrap_or_else(unknown_exit))),
            Body::StdinClosed(c) => Some(MonitorEvent::StdinClosed(container(c.container_id)?)),
            Body::LogDropped(d) => Some(MonitorEvent::LogDropped(container(d.container_id)?, d.bytes)),
            Body::LogTrouble(t) => Some(MonitorEvent::LogTrouble(container(t.container_id)?, t.message)),
            // Events of a newer monitor.
            _ => None,
        }
    }
}

/// An end without a code is never success.
fn unknown_exit() -> v1::Exit {
    v1::Exit { code: 255, note: "the monitor told no exit".into(), ..v1::Exit::default() }
}

/// Runs something when it is dropped.
struct Forget<F: FnMut()>(F);

impl<F: FnMut()> Drop for Forget<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

impl Client {
    /// Says Hello on a connected socket.
    pub(super) async fn greet(
        pod: &PodId,
        socket: OwnedFd,
        tasks: &TaskSet,
        after: Duration,
    ) -> Result<(Arc<Self>, v1::HelloReply, mpsc::Receiver<MonitorEvent>), MonitorError> {
        let host = |e| MonitorError::host(format!("pod {pod}: wait for its monitor"), e);
        let shared = Arc::new(Shared {
            pod: pod.clone(),
            socket: watch(socket, Interest::READABLE | Interest::WRITABLE).map_err(host)?,
            next: AtomicU64::new(0),
            pid: AtomicI32::new(0),
            waiting: Mutex::default(),
        });
        let (tell, events) = mpsc::channel(EVENTS);
        tasks.spawn_cancellable("monitor connection", shared.clone().serve(tell));
        let op = Op::Hello(v1::Hello { version: lxcri_monitor_proto::VERSION });
        let client = Arc::new(Self { shared, tasks: tasks.clone() });
        match client.shared.call("Hello", op, &[], after).await? {
            Body::Hello(hello) => {
                client.shared.pid.store(hello.pid, Ordering::Relaxed);
                Ok((client, hello, events))
            }
            _ => Err(client.shared.nonsense("Hello")),
        }
    }
}

impl Client {
    /// Lends a copy of a program. Not waited for: an older monitor does not know it, and starts the file.
    pub(super) async fn keep_program(&self, program: v1::KeepProgram, copy: &OwnedFd) {
        let id = self.shared.next.fetch_add(1, Ordering::Relaxed) + 1;
        let request = Request { id, op: Some(Op::KeepProgram(program)) };
        // A connection that has ended is noticed by its reader.
        let _ = timeout(QUICK, self.shared.send(&request, &[copy.as_fd()])).await;
    }
}

/// The last user of a connection is gone: the reader must not keep it open.
impl Drop for Client {
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(self.shared.socket.get_ref(), rustix::net::Shutdown::Both);
    }
}

fn program_time(program: Option<&v1::Program>) -> Duration {
    match program.map_or(0, |p| p.deadline_ms) {
        0 => PROGRAM,
        ms => Duration::from_millis(ms.into()),
    }
}

/// The step that is the monitor's run of a program: "crun create".
fn program_step(program: Option<&v1::Program>, verb: &str) -> Span {
    let name = program.and_then(|p| p.path.rsplit('/').next()).unwrap_or_default();
    trace::step(&format!("{name} {verb}"))
}

#[async_trait]
impl Monitor for Client {
    fn pid(&self) -> i32 {
        self.shared.pid.load(Ordering::Relaxed)
    }

    async fn create(&self, plan: v1::CreateContainer, mounts: Vec<OwnedFd>) -> Result<v1::Created> {
        let after = program_time(plan.create.as_ref()) + program_time(plan.delete.as_ref()) + MARGIN;
        let fds: Vec<BorrowedFd<'_>> = mounts.iter().map(AsFd::as_fd).collect();
        let step = program_step(plan.create.as_ref(), "create");
        match self.shared.call("CreateContainer", Op::Create(plan), &fds, after).instrument(step).await? {
            Body::Created(created) => Ok(created),
            _ => Err(self.shared.nonsense("CreateContainer").into()),
        }
    }

    async fn start(&self, container: &ContainerId) -> Result<i64> {
        let op = Op::Start(v1::StartContainer { id: container.to_string() });
        let step = trace::step("monitor start");
        match self.shared.call("StartContainer", op, &[], PROGRAM + MARGIN).instrument(step).await? {
            Body::Started(started) => Ok(started.started_at),
            _ => Err(self.shared.nonsense("StartContainer").into()),
        }
    }

    async fn signal(&self, container: &ContainerId, signal: i32, all: bool) -> Result<()> {
        let op = Op::Signal(v1::SignalContainer { id: container.to_string(), signal, all });
        match self.shared.done("SignalContainer", op, AT_ONCE).await {
            Err(MonitorError::Refused { code: v1::ErrorCode::ErrorNotFound, .. }) => Ok(()),
            result => Ok(result?),
        }
    }

    async fn delete(&self, container: &ContainerId) -> Result<()> {
        let op = Op::Delete(v1::DeleteContainer { id: container.to_string() });
        Ok(self.shared.done("DeleteContainer", op, PROGRAM + MARGIN).await?)
    }

    async fn exec(&self, mut exec: v1::Exec, stdio: [Option<OwnedFd>; 3]) -> Result<ExecExit> {
        let [stdin, stdout, mut stderr] = stdio;
        if exec.terminal {
            stderr = None;
        }
        (exec.has_stdin, exec.has_stdout, exec.has_stderr) = (stdin.is_some(), stdout.is_some(), stderr.is_some());
        let id = exec.exec_id.clone();
        let (tell, told) = oneshot::channel();
        self.shared.waiting().execs.insert(id.clone(), tell);
        let mut kill = KillOnDrop { client: self, id, armed: true };
        let after = program_time(exec.program.as_ref()) + MARGIN;
        let limit = (exec.timeout_ms > 0).then(|| Duration::from_millis(exec.timeout_ms.into()) + MARGIN);
        let started = {
            let fds = [stdin, stdout, stderr];
            let fds: Vec<BorrowedFd<'_>> = fds.iter().flatten().map(AsFd::as_fd).collect();
            self.shared.call("Exec", Op::Exec(exec), &fds, after).await
            // Our copies are closed here: the process's end of its output must be seen.
        };
        match started {
            Ok(Body::ExecStarted(_)) => {}
            Ok(_) => return Err(self.shared.nonsense("Exec").into()),
            Err(error) => {
                kill.armed = !matches!(error, MonitorError::Refused { .. });
                return Err(error.into());
            }
        }
        let ended = async {
            match limit {
                None => Ok(told.await),
                Some(after) => timeout(after, told).await.map_err(|_| self.shared.silent("Exec", after)),
            }
        };
        let exited = tokio::select! {
            ended = ended => ended?,
            () = self.shared.hangs() => return Err(self.shared.silent("Exec", QUIET + PING).into()),
        };
        let exited = exited.map_err(|_| self.shared.gone())?;
        kill.armed = false;
        Ok(ExecExit { exit: exited.exit.unwrap_or_else(unknown_exit), timed_out: exited.timed_out })
    }

    async fn reopen_log(&self, container: &ContainerId) -> Result<()> {
        let op = Op::ReopenLog(v1::ReopenLog { container_id: container.to_string() });
        Ok(self.shared.done("ReopenLog", op, QUICK).await?)
    }

    async fn start_init(&self, request: v1::StartInit) -> Result<i32> {
        match self.shared.call("StartInit", Op::StartInit(request), &[], QUICK).await? {
            Body::InitStarted(started) => Ok(started.pid),
            _ => Err(self.shared.nonsense("StartInit").into()),
        }
    }

    async fn attach(&self, container: &ContainerId, stdio: [Option<OwnedFd>; 3]) -> Result<AttachEnd> {
        let [has_stdin, has_stdout, has_stderr] = stdio.each_ref().map(Option::is_some);
        let (container_id, attach_id) = (container.to_string(), uuid::Uuid::new_v4().simple().to_string());
        let (tell, told) = oneshot::channel();
        self.shared.waiting().attaches.insert(attach_id.clone(), tell);
        let (shared, id) = (self.shared.clone(), attach_id.clone());
        let forget = Forget(move || drop(shared.waiting().attaches.remove(&id)));
        let op = Op::Attach(v1::Attach { container_id, has_stdout, has_stderr, attach_id, has_stdin });
        let answer = {
            let fds: Vec<BorrowedFd<'_>> = stdio.iter().flatten().map(AsFd::as_fd).collect();
            self.shared.call("Attach", op, &fds, QUICK).await?
        };
        let Body::Done(_) = answer else { return Err(self.shared.nonsense("Attach").into()) };
        let shared = self.shared.clone();
        Ok(Box::pin(async move {
            let _forget = forget;
            Ok(told.await.map_err(|_| shared.gone())?.lagged)
        }))
    }

    async fn resize(&self, container: &ContainerId, exec: Option<&str>, width: u32, height: u32) -> Result<()> {
        let (container_id, exec_id) = (container.to_string(), exec.unwrap_or_default().to_owned());
        let op = Op::Resize(v1::ResizeTerminal { container_id, exec_id, width, height });
        Ok(self.shared.done("ResizeTerminal", op, QUICK).await?)
    }

    async fn close_stdin(&self, container: &ContainerId) -> Result<()> {
        let op = Op::CloseStdin(v1::CloseStdin { container_id: container.to_string() });
        Ok(self.shared.done("CloseStdin", op, QUICK).await?)
    }

    async fn lend(&self, container: &ContainerId) -> Result<Lent> {
        let op = Op::Lend(v1::Lend { container_id: container.to_string() });
        let (body, fds) = self.shared.call_for("Lend", op, &[], AT_ONCE).await?;
        let Body::Lent(lent) = body else { return Err(self.shared.nonsense("Lend").into()) };
        let wanted = [lent.has_stdin, lent.has_stdout, lent.has_stderr, lent.has_terminal, lent.has_pidfd];
        if fds.len() != wanted.iter().filter(|w| **w).count() {
            return Err(self.shared.nonsense("Lend").into());
        }
        let mut fds = fds.into_iter();
        let [stdin, stdout, stderr, terminal, pidfd] = wanted.map(|wanted| if wanted { fds.next() } else { None });
        Ok(Lent { stdin, stdout, stderr, terminal, pidfd })
    }

    async fn adopt(&self, mut adopt: v1::AdoptContainer, lent: &Lent) -> Result<()> {
        let fds = [&lent.stdin, &lent.stdout, &lent.stderr, &lent.terminal, &lent.pidfd];
        let [has_stdin, has_stdout, has_stderr, has_terminal, has_pidfd] = fds.map(Option::is_some);
        adopt.streams = Some(v1::Lent { has_stdin, has_stdout, has_stderr, has_terminal, has_pidfd });
        let fds: Vec<BorrowedFd<'_>> = fds.into_iter().flatten().map(AsFd::as_fd).collect();
        match self.shared.call("AdoptContainer", Op::Adopt(adopt), &fds, MARGIN).await? {
            Body::Created(_) => Ok(()),
            _ => Err(self.shared.nonsense("AdoptContainer").into()),
        }
    }

    async fn adopt_init(&self, pid: i32, start_time: u64, pidfd: BorrowedFd<'_>) -> Result<()> {
        let op = Op::AdoptInit(v1::AdoptInit { pid, pid_start_time: start_time });
        match self.shared.call("AdoptInit", op, &[pidfd], AT_ONCE).await? {
            Body::Done(_) => Ok(()),
            _ => Err(self.shared.nonsense("AdoptInit").into()),
        }
    }

    async fn guest(&self, call: Vec<u8>) -> Result<Vec<u8>> {
        let call = wire::to_memfd(&call).map_err(|e| self.shared.wire(e))?;
        let (body, fds) =
            self.shared.call_for("GuestCall", Op::GuestCall(v1::GuestCall {}), &[call.as_fd()], GUEST).await?;
        match (body, fds.as_slice()) {
            (Body::GuestAnswered(_), [answer]) => Ok(wire::from_memfd(answer).map_err(|e| self.shared.wire(e))?),
            _ => Err(self.shared.nonsense("GuestCall").into()),
        }
    }

    async fn ping(&self) -> Result<()> {
        let op = Op::Hello(v1::Hello { version: lxcri_monitor_proto::VERSION });
        match self.shared.call("Hello", op, &[], AT_ONCE).await? {
            Body::Hello(_) => Ok(()),
            _ => Err(self.shared.nonsense("Hello").into()),
        }
    }

    async fn set_pod_info(&self, pod_info: Vec<u8>) -> Result<()> {
        Ok(self.shared.done("SetPodInfo", Op::SetPodInfo(v1::SetPodInfo { pod_info }), QUICK).await?)
    }

    async fn shutdown(&self, force: bool) -> Result<()> {
        // Taken before it can end, so that it is this very process that is waited for.
        let pidfd = Pid::from_raw(self.pid()).and_then(|pid| pidfd_open(pid, PidfdFlags::NONBLOCK).ok());
        let op = Op::Shutdown(v1::Shutdown { force });
        self.shared.done("Shutdown", op, PROGRAM + MARGIN).await?;
        if let Some(pidfd) = pidfd {
            let ended = watch(pidfd, Interest::READABLE).map_err(|e| self.shared.host(e))?;
            let silent =
                || MonitorError::Silent { pod: self.shared.pod.to_string(), operation: "Shutdown", after: QUICK };
            let ready = timeout(QUICK, ended.readable()).await.map_err(|_| silent())?;
            ready.map_err(|e| self.shared.host(e))?.retain_ready();
        }
        Ok(())
    }
}

/// Kills an exec whose future is dropped before its end.
struct KillOnDrop<'a> {
    client: &'a Client,
    id: String,
    armed: bool,
}

impl Drop for KillOnDrop<'_> {
    fn drop(&mut self) {
        let shared = &self.client.shared;
        shared.waiting().execs.remove(&self.id);
        if !self.armed {
            return;
        }
        let id = shared.next.fetch_add(1, Ordering::Relaxed) + 1;
        let op = Op::KillExec(v1::KillExec { exec_id: std::mem::take(&mut self.id) });
        let request = Request { id, op: Some(op) };
        if let Err(WireError::NotReady) = wire::send(shared.socket.get_ref(), &request, &[]) {
            let shared = shared.clone();
            self.client.tasks.spawn_cancellable("kill an exec", async move {
                let _ = timeout(QUICK, shared.send(&request, &[])).await;
            });
        }
    }
}
