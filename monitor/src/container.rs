//! Containers: what one consists of, and performing what its [`Lifecycle`] decides.
//!
//! Called by the server for requests, ended programs, ended inits and the writer's reports. Failures go to whoever
//! asked. A crash of the monitor leaves the container running with its FIFOs; its exit code is then the kernel's to
//! tell.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lxcri_monitor_proto::null::{own_null, renew};
use lxcri_monitor_proto::v1::{self, reply::Body};

use crate::cgroup::{self, OomWatch};
use crate::connection::Asker;
use crate::crilog::Stream;
use crate::fail_point;
use crate::failure::{Failure, Result};
use crate::held::Holder;
use crate::lifecycle::{Action, Event, Lifecycle, Phase, Program};
use crate::poll::{EventFlags, Source};
use crate::process::Process;
use crate::program::{self, Running};
use crate::reaper::Ended;
use crate::relay::Owner;
use crate::server::{Purpose, Server};
use crate::stdio::{self, Ends};
use crate::writer::{LogId, Order};
use crate::{clock, exit_record, mounts, proctree};

/// The writer has this long to open a log.
pub const OPEN_TIME: Duration = Duration::from_secs(30);
/// It has this long to write what a container left, before the end is told without it.
const DRAIN_TIME: Duration = Duration::from_secs(15);
/// It has this long to close a log.
const CLOSE_TIME: Duration = Duration::from_secs(10);

/// A container.
pub struct Container {
    /// Its state.
    pub life: Lifecycle,
    /// Its log's name; unique to this container.
    pub log: LogId,
    /// What was asked for, without the program that is not needed any more.
    pub plan: v1::CreateContainer,
    /// Its main process.
    pub init: Option<Process>,
    /// That one's parent, if it is not us.
    pub holder: Holder,
    /// Unix time in nanoseconds; 0: not started.
    pub started_at: i64,
    /// How it ended, once recorded.
    pub exit: Option<v1::Exit>,
    /// Master of its pty.
    pub terminal: Option<OwnedFd>,
    /// How its init ended.
    pub ended: Option<Ended>,
    /// Its FIFOs.
    pub ends: Ends,
    /// What its processes have in place of a stream.
    null: Option<OwnedFd>,
    /// Detached mounts and where they go for the time of `create`.
    mounts: Vec<(OwnedFd, String)>,
    program: Option<i32>,
    /// Its memory cgroup.
    pub oom: Option<(OomWatch, u64)>,
    failure: Option<Failure>,
    creator: Asker,
    starter: Option<Asker>,
    deleters: Vec<Asker>,
    /// When an answer of the writer is not waited for any longer.
    pub writer_until: Option<Instant>,
}

/// Whether the plan can be carried out.
fn check(plan: &v1::CreateContainer, fds: &[OwnedFd]) -> Result<()> {
    program::check(plan.create.as_ref(), "create")?;
    check_adopted(plan)?;
    if fds.len() != mount_points(plan).count() {
        return Err(Failure::invalid(format!("{} descriptors do not fit the plan", fds.len())));
    }
    Ok(())
}

/// Whether it can be, from where `create` has been.
pub fn check_adopted(plan: &v1::CreateContainer) -> Result<()> {
    if plan.id.is_empty() || plan.id.contains('/') {
        return Err(Failure::invalid("a container needs an id"));
    }
    program::check(plan.start.as_ref(), "start")?;
    program::check(plan.delete.as_ref(), "delete")?;
    stdio::check(plan.stdio.as_ref().unwrap_or(&v1::Stdio::default()))?;
    for (path, needed) in [
        (&plan.pid_file, true),
        (&plan.exit_path, true),
        (&plan.log_path, false),
        (&plan.rootfs_mount_point, false),
        (&plan.status_file, false),
    ] {
        if !(Path::new(path).is_absolute() || path.is_empty() && !needed) {
            return Err(Failure::invalid(format!("{path:?} is not an absolute path")));
        }
    }
    if let Some(path) = plan.volume_mount_points.iter().find(|path| !Path::new(path).is_absolute()) {
        return Err(Failure::invalid(format!("{path:?} is not an absolute path")));
    }
    Ok(())
}

/// Where the mounts that come with the plan go, in the order of their descriptors.
fn mount_points(plan: &v1::CreateContainer) -> impl Iterator<Item = &String> {
    [&plan.rootfs_mount_point].into_iter().filter(|path| !path.is_empty()).chain(&plan.volume_mount_points)
}

impl Server {
    /// CreateContainer.
    pub fn create(&mut self, asker: Asker, plan: v1::CreateContainer, fds: Vec<OwnedFd>) -> Result<()> {
        check(&plan, &fds)?;
        if self.shutdown.is_some() {
            return Err(Failure::state("the monitor is about to end"));
        }
        if self.containers.contains_key(&plan.id) {
            let message = format!("container {}: it is there already", plan.id);
            return Err(Failure::new(v1::ErrorCode::ErrorExists, message));
        }
        let stdio = plan.stdio.clone().unwrap_or_default();
        let ends = stdio::make(&stdio).inspect_err(|_| stdio::remove(&stdio))?;
        // Left by an earlier life of the same id, it would be taken for the new one's.
        let _ = rustix::fs::unlink(plan.pid_file.as_str());
        fail_point!("monitor.create.fifos");
        self.next_log += 1;
        let log = self.next_log;
        let path = PathBuf::from(&plan.log_path);
        let mut container = Container::new(plan, log, asker);
        container.ends = ends;
        container.mounts = fds.into_iter().zip(mount_points(&container.plan).cloned()).collect();
        container.writer_until = Some(Instant::now() + OPEN_TIME);
        let (line_max, size_max) = (container.plan.log_line_max as usize, container.plan.log_size_max);
        self.writer.order(Order::Open { id: log, path, line_max, size_max });
        self.containers.insert(container.plan.id.clone(), container);
        Ok(())
    }

    /// StartContainer.
    pub fn start(&mut self, asker: Asker, id: &str) -> Result<()> {
        let container = self.container(id)?;
        if container.life.phase() != Phase::Created || container.starter.is_some() {
            return Err(Failure::state(format!("container {id}: it can't be started now")));
        }
        container.starter = Some(asker);
        self.container_event(id, Event::StartAsked);
        Ok(())
    }

    /// DeleteContainer.
    pub fn delete(&mut self, asker: Option<Asker>, id: &str) {
        match self.containers.get_mut(id) {
            Some(container) => {
                container.deleters.extend(asker);
                self.container_event(id, Event::DeleteAsked);
            }
            None => {
                if let Some(asker) = asker {
                    self.reply(asker, Ok(Body::Done(v1::Done {})));
                }
            }
        }
    }

    /// SignalContainer.
    pub fn signal(&mut self, request: &v1::SignalContainer) -> Result<()> {
        let container = self.container(&request.id)?;
        if container.life.init_lives()
            && let Some(init) = &container.init
        {
            init.signal(request.signal)?;
        }
        if request.all {
            cgroup::kill(container.kill_folder());
        }
        Ok(())
    }

    /// The container of that id.
    pub fn container(&mut self, id: &str) -> Result<&mut Container> {
        found(&mut self.containers, id)
    }

    /// Takes an event through the state machine and performs what it decides.
    pub fn container_event(&mut self, id: &str, event: Event) {
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            let Some(container) = self.containers.get_mut(id) else { return };
            for action in container.life.next(event) {
                events.extend(self.perform(id, action));
            }
        }
    }

    /// One action; what comes of it at once.
    fn perform(&mut self, id: &str, action: Action) -> Option<Event> {
        let container = self.containers.get_mut(id)?;
        match action {
            Action::Run(program) => {
                if let Err(failure) = self.start_program(id, program) {
                    self.containers.get_mut(id)?.keep_failure(program, failure);
                    return Some(Event::Failed(program));
                }
            }
            Action::KillProgram => {
                if let Some(pid) = container.program {
                    proctree::kill_tree(pid, None);
                }
            }
            Action::KillInit => {
                if let Some(init) = &container.init {
                    let _ = init.signal(libc::SIGKILL);
                }
                cgroup::kill(container.kill_folder());
            }
            Action::KillRest => {
                if container.plan.kill_with_init {
                    cgroup::kill(container.kill_folder());
                }
            }
            Action::Drain => {
                container.writer_until = Some(Instant::now() + DRAIN_TIME);
                self.writer.order(Order::Drain(container.log));
            }
            Action::Record => self.record(id),
            Action::CloseLog => {
                fail_point!("monitor.log.closing");
                container.writer_until = Some(Instant::now() + CLOSE_TIME);
                self.writer.order(Order::Close(container.log));
            }
            Action::AnswerCreate(good) => {
                let answer = match (&container.init, container.failure.take()) {
                    (Some(init), _) if good => {
                        Ok(Body::Created(v1::Created { pid: init.pid, pid_start_time: init.start_time }))
                    }
                    (_, Some(failure)) => Err(failure),
                    (_, None) => Err(Failure::state(format!("container {id}: deleted while it was created"))),
                };
                let asker = container.creator;
                fail_point!("monitor.create.known");
                self.reply(asker, answer);
                fail_point!("monitor.create.answered");
            }
            Action::AnswerStart(good) => {
                let answer = match container.failure.take() {
                    Some(failure) if !good => Err(failure),
                    _ => Ok(Body::Started(v1::Started { started_at: container.started_at })),
                };
                if let Some(asker) = container.starter.take() {
                    self.reply(asker, answer);
                }
                fail_point!("monitor.start.answered");
            }
            Action::RefuseStart => {
                if let Some(asker) = container.starter.take() {
                    self.reply(asker, Err(Failure::state(format!("container {id}: it can't be started now"))));
                }
            }
            Action::AnswerDelete(good) => {
                let failure = container.failure.take().filter(|_| !good);
                for asker in std::mem::take(&mut container.deleters) {
                    let answer = failure.clone().map_or(Ok(Body::Done(v1::Done {})), Err);
                    self.reply(asker, answer);
                }
                if let Some(failure) = failure {
                    self.refuse_shutdown(failure);
                }
            }
            Action::RemoveFiles => {
                if let Some(stdio) = &container.plan.stdio {
                    stdio::remove(stdio);
                }
            }
            Action::Watch => {
                let Some(Process { pid, pidfd: Some(pidfd), .. }) = &container.init else {
                    return Some(Event::InitExited);
                };
                let (pid, pidfd) = (*pid, pidfd.try_clone());
                let watched = pidfd.map_err(|e| Failure::io("duplicate a pidfd", &e));
                if watched.and_then(|pidfd| self.watch_foreign(pid, &pidfd)).is_err() {
                    self.containers.get_mut(id)?.ended = Some(Ended::unknown("the process can't be watched"));
                    return Some(Event::InitExited);
                }
            }
            Action::Forget => {
                if let Some(container) = self.containers.remove(id) {
                    self.end_relays(&Owner::Container(id.into()));
                    self.detach_all(id, container.log);
                    if let Some((watch, token)) = container.oom {
                        self.poll.unwatch(watch.fd());
                        self.poll.forget(token);
                    }
                }
            }
        }
        None
    }

    /// Starts a program of the plan.
    fn start_program(&mut self, id: &str, which: Program) -> Result<()> {
        let Self { containers, kept, .. } = self;
        let container = found(containers, id)?;
        let mut fds = program::Descriptors::default();
        let spec = match which {
            Program::Create => {
                for (mount, folder) in std::mem::take(&mut container.mounts) {
                    if let Err(failure) = mounts::attach(mount, &folder) {
                        container.unmount(which);
                        return Err(failure);
                    }
                }
                fail_point!("monitor.create.mounted");
                fds = std::mem::take(&mut container.ends.container);
                // Without it the start tries to make one, and says why it can't.
                fds.null = container.null().ok();
                container.plan.create.take()
            }
            Program::Start => container.plan.start.clone(),
            Program::Delete => container.plan.delete.clone(),
        };
        let spec = spec.unwrap_or_default();
        let running = match program::spawn(kept, &spec, fds) {
            Ok(running) => running,
            Err(failure) => {
                container.unmount(which);
                return Err(failure);
            }
        };
        match which {
            Program::Create => {
                fail_point!("monitor.create.spawned");
            }
            Program::Start => {
                fail_point!("monitor.start.spawned");
            }
            Program::Delete => {
                fail_point!("monitor.delete.spawned");
            }
        }
        container.program = Some(running.pid);
        let (log, outputs) = (container.log, std::mem::take(&mut container.ends.outputs));
        for (stream, from) in outputs {
            self.writer.order(Order::Follow { id: log, stream, from, tty: false });
        }
        self.programs.insert(running.pid, (Purpose::Container(id.into(), which), running));
        Ok(())
    }

    /// A program of the plan has ended.
    pub fn container_program_ended(&mut self, id: &str, which: Program, running: Running, ended: Ended) {
        let since = running.since;
        let Some(container) = self.containers.get_mut(id) else { return };
        match which {
            Program::Create => {
                fail_point!("monitor.create.ended");
            }
            Program::Start => {
                fail_point!("monitor.start.ended");
            }
            Program::Delete => {
                fail_point!("monitor.delete.ended");
            }
        }
        container.program = None;
        container.unmount(which);
        let event = match (running.outcome(ended), which) {
            (Ok(()), Program::Create) => self.adopt(id, since).map(|exited| Event::Created { exited }),
            (Ok(()), which) => {
                if which == Program::Start {
                    container.started_at = clock::now_ns();
                }
                Ok(Event::Ended(which))
            }
            (Err(failure), _) => Err(failure),
        };
        let event = event.unwrap_or_else(|failure| {
            if let Some(container) = self.containers.get_mut(id) {
                container.keep_failure(which, failure);
            }
            Event::Failed(which)
        });
        self.container_event(id, event);
    }

    /// Takes over what `create` made: the init, its terminal, its memory cgroup. True: the init has ended already.
    fn adopt(&mut self, id: &str, since: Instant) -> Result<bool> {
        let plan = &self.container(id)?.plan;
        let (pid_file, status_file) = (plan.pid_file.clone(), plan.status_file.clone());
        let (process, holder, ended) = if status_file.is_empty() {
            let (process, ended) = self.take_process(&pid_file, since)?;
            (process, Holder::default(), ended)
        } else {
            self.take_held(&pid_file, &status_file, since)?
        };
        let container = self.containers.get_mut(id).ok_or_else(|| Failure::not_found(id))?;
        container.holder = holder;
        let exited = ended.is_some();
        container.ended = ended;
        container.init = Some(process);
        let folder = container.plan.cgroups.as_ref().map_or("", |c| c.memory.as_str());
        let watch = OomWatch::open(folder);
        let log = container.log;
        let console = container.ends.console.take();
        if let Some(watch) = watch {
            // v1's file has no such events; it stays until it is asked at the end.
            let token = self.poll.token(Source::Memory(log));
            let _ = self.poll.watch(watch.fd(), token, EventFlags::PRI | EventFlags::ET);
            self.container(id)?.oom = Some((watch, token));
        }
        if let Some(console) = console {
            self.adopt_terminal(id, console.take()?)?;
        }
        Ok(exited)
    }

    fn adopt_terminal(&mut self, id: &str, master: OwnedFd) -> Result<()> {
        let copy = |fd: &OwnedFd| fd.try_clone().map_err(|e| Failure::io("dup a terminal", &e));
        let container = self.container(id)?;
        let (from, log) = (copy(&master)?, container.log);
        let input = match container.ends.stdin.take() {
            Some(fifo) => Some((fifo, copy(&master)?)),
            None => None,
        };
        container.terminal = Some(master);
        self.writer.order(Order::Follow { id: log, stream: Stream::Stdout, from, tty: true });
        if let Some((fifo, to)) = input {
            self.relay(Owner::Container(id.into()), fifo, to);
        }
        Ok(())
    }

    /// The init of a container has ended.
    pub fn container_init_ended(&mut self, id: &str, ended: Ended) {
        fail_point!("monitor.exit.seen");
        if let Some(container) = self.containers.get_mut(id) {
            container.ended = Some(ended);
            if let Some(init) = &mut container.init {
                init.pidfd = None;
            }
            container.refresh_oom();
            self.container_event(id, Event::InitExited);
        }
    }

    /// Writes the exit record and tells everybody.
    fn record(&mut self, id: &str) {
        fail_point!("monitor.exit.drained");
        let Some(container) = self.containers.get_mut(id) else { return };
        let mut exit = container.ended.map_or_else(v1::Exit::default, Ended::to_wire);
        exit.finished_at = exit.finished_at.max(container.started_at);
        // A parent that has asked the group itself knows best: it did so while the group was there.
        if container.ended.is_none_or(|ended| ended.oom.is_none())
            && let Some((watch, _)) = &mut container.oom
        {
            watch.refresh();
            exit.oom = watch.killed(exit.code == 128 + libc::SIGKILL);
        }
        // Whoever is connected is told all the same; the record is for those who are not.
        let _ = exit_record::write(Path::new(&container.plan.exit_path), id, container.started_at, &exit);
        fail_point!("monitor.exit.recorded");
        container.exit = Some(exit.clone());
        container.terminal = None;
        container.ends = Ends::default();
        let log = container.log;
        self.end_relays(&Owner::Container(id.into()));
        self.detach_all(id, log);
        self.broadcast(&Body::ContainerExited(v1::ContainerExited { id: id.into(), exit: Some(exit) }));
        fail_point!("monitor.exit.told");
    }

    /// The memory cgroup of a container has an event.
    pub fn memory_event(&mut self, log: LogId) {
        self.containers.values_mut().filter(|c| c.log == log).for_each(Container::refresh_oom);
    }

    /// The writer has answered, or has had its time.
    pub fn writer_answered(&mut self, log: LogId, event: Event) {
        let Some(id) = self.containers.iter().find(|(_, c)| c.log == log).map(|(id, _)| id.clone()) else {
            // Its container is forgotten: so must the log be.
            if event == Event::LogOpened(true) {
                self.writer.order(Order::Close(log));
            }
            return;
        };
        if let Some(container) = self.containers.get_mut(&id)
            && let (Phase::Opening, Event::LogOpened(_))
            | (Phase::Draining, Event::Drained)
            | (Phase::Closing { .. }, Event::LogClosed) = (container.life.phase(), event)
        {
            container.writer_until = None;
        }
        self.container_event(&id, event);
    }

    /// The log could not be opened.
    pub fn log_failed(&mut self, log: LogId, error: &std::io::Error) {
        for container in self.containers.values_mut().filter(|c| c.log == log) {
            container.failure = Some(Failure::io(format_args!("open the log {}", container.plan.log_path), error));
        }
        self.writer_answered(log, Event::LogOpened(false));
    }

    /// What is overdue is taken as done.
    pub fn container_timers(&mut self, now: Instant) {
        let due = |c: &&Container| c.writer_until.is_some_and(|at| at <= now);
        let due: Vec<(LogId, Phase)> = self.containers.values().filter(due).map(|c| (c.log, c.life.phase())).collect();
        for (log, phase) in due {
            match phase {
                Phase::Opening => self.log_failed(log, &std::io::Error::from(std::io::ErrorKind::TimedOut)),
                Phase::Draining => self.writer_answered(log, Event::Drained),
                Phase::Closing { .. } => self.writer_answered(log, Event::LogClosed),
                _ => {
                    self.containers.values_mut().filter(|c| c.log == log).for_each(|c| c.writer_until = None);
                }
            }
        }
    }

    /// The next time at which [`Server::container_timers`] has work.
    pub fn next_container_timer(&self) -> Option<Instant> {
        self.containers.values().filter_map(|c| c.writer_until).min()
    }
}

fn found<'a>(containers: &'a mut BTreeMap<String, Container>, id: &str) -> Result<&'a mut Container> {
    containers.get_mut(id).ok_or_else(|| Failure::not_found(format!("container {id}: there is none")))
}

impl Container {
    /// The null device of its own, as good as new: making one costs more than all else that an exec needs of us.
    pub fn null(&mut self) -> Result<OwnedFd> {
        let failed = |e| Failure::errno("make a null device", e);
        let null = match self.null.take() {
            Some(null) => {
                renew(&null).map_err(failed)?;
                null
            }
            None => own_null().map_err(failed)?,
        };
        let copy = null.try_clone().map_err(|e| Failure::io("dup", &e));
        self.null = Some(null);
        copy
    }

    /// One of which nothing is there yet.
    pub fn new(plan: v1::CreateContainer, log: LogId, creator: Asker) -> Self {
        Self {
            life: Lifecycle::new(),
            log,
            plan,
            init: None,
            holder: Holder::default(),
            started_at: 0,
            exit: None,
            terminal: None,
            ended: None,
            ends: Ends::default(),
            null: None,
            mounts: Vec::new(),
            program: None,
            oom: None,
            failure: None,
            creator,
            starter: None,
            deleters: Vec::new(),
            writer_until: None,
        }
    }

    /// What HelloReply says about it.
    pub fn report(&self) -> v1::ContainerReport {
        let phase = match self.life.phase() {
            Phase::Opening | Phase::Creating => v1::ContainerPhase::PhaseUnspecified,
            Phase::Created => v1::ContainerPhase::PhaseCreated,
            Phase::Starting { .. } | Phase::Running | Phase::Draining => v1::ContainerPhase::PhaseRunning,
            _ if self.exit.is_some() => v1::ContainerPhase::PhaseExited,
            _ => v1::ContainerPhase::PhaseUnspecified,
        };
        v1::ContainerReport {
            id: self.plan.id.clone(),
            phase: phase.into(),
            pid: self.init.as_ref().map_or(0, |i| i.pid),
            pid_start_time: self.init.as_ref().map_or(0, |i| i.start_time),
            started_at: self.started_at,
            exit: self.exit.clone(),
            info: self.plan.info.clone(),
        }
    }

    /// Where input of an attached client goes: the terminal, or the FIFO unless it is closed.
    pub fn input(&self) -> Option<&OwnedFd> {
        self.terminal.as_ref().or(self.ends.stdin.as_ref())
    }

    /// For good, so the FIFO goes, too.
    pub fn close_stdin(&mut self) {
        self.ends.stdin = None;
        if let Some(path) = self.plan.stdio.as_ref().map(|s| s.stdin.as_str()).filter(|p| !p.is_empty()) {
            let _ = rustix::fs::unlink(path);
        }
    }

    /// Reads what its memory cgroup tells, which may be gone soon.
    pub fn refresh_oom(&mut self) {
        if let Some((watch, _)) = &mut self.oom {
            watch.refresh();
        }
    }

    fn kill_folder(&self) -> &str {
        self.plan.cgroups.as_ref().map_or("", |c| c.kill.as_str())
    }

    fn unmount(&self, which: Program) {
        if which == Program::Create {
            mount_points(&self.plan).for_each(|folder| mounts::detach(folder));
        }
    }

    /// What `delete` says after a failed create is not what the caller has to know.
    fn keep_failure(&mut self, which: Program, failure: Failure) {
        if which != Program::Delete || self.failure.is_none() {
            self.failure = Some(failure);
        }
    }
}
