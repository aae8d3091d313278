//! Take-over: lending what a container hangs on, so that it outlives this monitor, and adopting the containers and the
//! init of a monitor that is gone.
//!
//! Called by the server for Lend, AdoptContainer and AdoptInit. An adopted init is nobody's child here: its end is seen by
//! its pidfd, and its code is the kernel's to tell. Of the output, what the dead monitor had read and not written is
//! lost: one read at most. Fails with the step; a crash leaves all as it was, for the next monitor.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use lxcri_monitor_proto::v1;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use rustix::time::Timespec;

use crate::cgroup::OomWatch;
use crate::connection::Asker;
use crate::container::{Container, OPEN_TIME};
use crate::crilog::Stream;
use crate::fail_point;
use crate::failure::{Failure, Result};
use crate::init::Init;
use crate::lifecycle::Lifecycle;
use crate::poll::{EventFlags, Source};
use crate::process::Process;
use crate::reaper::Ended;
use crate::relay::Owner;
use crate::server::Server;
use crate::stdio::{Ends, set_nonblocking};
use crate::writer::Order;

/// An ended process is reaped by whoever is its parent in this time, or its code is given up.
const REAPED: Duration = Duration::from_secs(5);
/// How often a file is looked for that its parent writes.
const LOOK: Duration = Duration::from_millis(20);
/// Why the code of an adopted container can be unknown.
const UNSEEN: &str = "it ended while neither daemon nor monitor watched it: the exit code is not known";

/// A process that is not our child and is watched by its pidfd.
pub struct Foreign {
    token: u64,
    pidfd: OwnedFd,
    /// It has ended, and its code is waited for no longer than this.
    until: Option<Instant>,
    /// When it is looked at again.
    again: Option<Instant>,
}

impl Server {
    /// Lend.
    pub fn lend(&mut self, id: &str) -> Result<(v1::Lent, Vec<OwnedFd>)> {
        let copy = |fd: &OwnedFd| fd.try_clone().map_err(|e| Failure::io("duplicate a stream", &e));
        let container = self.container(id)?;
        if !container.life.init_lives() {
            return Err(Failure::state(format!("container {id}: it does not run")));
        }
        let stdio = container.plan.stdio.clone().unwrap_or_default();
        let output = |path: &str| {
            if stdio.terminal || path.is_empty() {
                return Ok(None);
            }
            let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let opened = rustix::fs::open(path, flags, Mode::empty());
            opened.map(Some).map_err(|e| Failure::errno(format_args!("open {path}"), e))
        };
        let fds = [
            container.ends.stdin.as_ref().map(copy).transpose()?,
            output(&stdio.stdout)?,
            output(&stdio.stderr)?,
            container.terminal.as_ref().map(copy).transpose()?,
            container.init.as_ref().and_then(|i| i.pidfd.as_ref()).map(copy).transpose()?,
        ];
        let [has_stdin, has_stdout, has_stderr, has_terminal, has_pidfd] = fds.each_ref().map(Option::is_some);
        let lent = v1::Lent { has_stdin, has_stdout, has_stderr, has_terminal, has_pidfd };
        Ok((lent, fds.into_iter().flatten().collect()))
    }

    /// AdoptContainer.
    pub fn adopt_container(&mut self, asker: Asker, request: v1::AdoptContainer, fds: Vec<OwnedFd>) -> Result<()> {
        let v1::AdoptContainer { plan, pid, pid_start_time, started_at, running, streams } = request;
        let plan = plan.ok_or_else(|| Failure::invalid("a container needs a plan"))?;
        crate::container::check_adopted(&plan)?;
        if self.shutdown.is_some() {
            return Err(Failure::state("the monitor is about to end"));
        }
        if self.containers.contains_key(&plan.id) {
            let message = format!("container {}: it is there already", plan.id);
            return Err(Failure::new(v1::ErrorCode::ErrorExists, message));
        }
        let lent = streams.unwrap_or_default();
        let wanted = [lent.has_stdin, lent.has_stdout, lent.has_stderr, lent.has_terminal, lent.has_pidfd];
        if fds.len() != wanted.iter().filter(|w| **w).count() {
            return Err(Failure::invalid(format!("{} descriptors do not fit the container", fds.len())));
        }
        let mut fds = fds.into_iter();
        let [stdin, stdout, stderr, terminal, pidfd] = wanted.map(|wanted| if wanted { fds.next() } else { None });
        for fd in [&stdin, &stdout, &stderr, &terminal].into_iter().flatten() {
            set_nonblocking(fd).map_err(|e| Failure::errno("a container's stream", e))?;
        }
        self.next_log += 1;
        let (id, log) = (plan.id.clone(), self.next_log);
        let path = PathBuf::from(&plan.log_path);
        let (line_max, size_max) = (plan.log_line_max as usize, plan.log_size_max);
        self.writer.order(Order::TakeUp { id: log, path, line_max, size_max });
        let outputs = [(Stream::Stdout, stdout, false), (Stream::Stderr, stderr, false)];
        let copy = terminal.as_ref().map(|t| t.try_clone().map_err(|e| Failure::io("duplicate a terminal", &e)));
        let outputs = outputs.into_iter().chain([(Stream::Stdout, copy.transpose()?, true)]);
        for (stream, from, tty) in outputs {
            if let Some(from) = from {
                self.writer.order(Order::Follow { id: log, stream, from, tty });
            }
        }
        let ended = match &pidfd {
            Some(_) => None,
            None => Some(crate::held::told_late(&plan).unwrap_or_else(|| Ended::unknown(UNSEEN))),
        };
        let folder = plan.cgroups.as_ref().map_or("", |c| c.memory.as_str());
        let oom = OomWatch::adopt(folder).map(|watch| {
            let token = self.poll.token(Source::Memory(log));
            let _ = self.poll.watch(watch.fd(), token, EventFlags::PRI | EventFlags::ET);
            (watch, token)
        });
        let mut container = Container::new(plan, log, asker);
        container.life = Lifecycle::adopted(running);
        // The session is not known any more: execs without a cgroup are killed by descent alone.
        container.init = Some(Process { pid, start_time: pid_start_time, pidfd, session: 0 });
        (container.ended, container.started_at, container.oom) = (ended, started_at, oom);
        container.holder.lost = !container.plan.status_file.is_empty();
        container.writer_until = Some(Instant::now() + OPEN_TIME);
        container.terminal = terminal;
        container.ends = Ends { stdin, ..Ends::default() };
        let input = match &container.terminal {
            Some(master) => {
                let copy = master.try_clone().map_err(|e| Failure::io("duplicate a terminal", &e))?;
                container.ends.stdin.take().map(|fifo| (fifo, copy))
            }
            None => None,
        };
        self.containers.insert(id.clone(), container);
        if let Some((from, to)) = input {
            self.relay(Owner::Container(id), from, to);
        }
        fail_point!("monitor.adopt.inserted");
        Ok(())
    }

    /// AdoptInit.
    pub fn adopt_init(&mut self, request: &v1::AdoptInit, fds: Vec<OwnedFd>) -> Result<()> {
        if !matches!(self.init, Init::None) {
            return Err(Failure::state("the pod has an init"));
        }
        let Ok([pidfd]) = <[OwnedFd; 1]>::try_from(fds) else {
            return Err(Failure::invalid("an init needs its pidfd"));
        };
        self.watch_foreign(request.pid, &pidfd)?;
        let (pid, start_time) = (request.pid, request.pid_start_time);
        self.init = Init::Running(Process { pid, start_time, pidfd: Some(pidfd), session: 0 });
        Ok(())
    }

    /// Watches a process that is not our child.
    pub fn watch_foreign(&mut self, pid: i32, pidfd: &OwnedFd) -> Result<()> {
        let failed = |e: std::io::Error| Failure::io(format_args!("watch process {pid}"), &e);
        let pidfd = pidfd.try_clone().map_err(failed)?;
        let token = self.poll.add(&pidfd, Source::Foreign(pid), EventFlags::IN).map_err(|e| failed(e.into()))?;
        self.foreign.insert(pid, Foreign { token, pidfd, until: None, again: None });
        Ok(())
    }

    /// Such a process has ended, or has been reaped: only then the kernel tells its code.
    pub fn foreign_ready(&mut self, pid: i32) {
        // One whose parent is ours, or was, is told of otherwise.
        if self.held_init_ended(pid) {
            if let Some(foreign) = self.foreign.remove(&pid) {
                self.poll.unwatch(&foreign.pidfd);
                self.poll.forget(foreign.token);
            }
            return;
        }
        let told = self.told_of(pid);
        let Some(foreign) = self.foreign.get_mut(&pid) else { return };
        let now = Instant::now();
        // Also where the kernel tells the code: whether it killed for memory only the parent knows.
        if told.as_ref().is_some_and(|t| t.awaited) && foreign.until.is_none_or(|at| at > now) {
            // A hang-up would be told again and again: it is looked at by the clock.
            foreign.until.get_or_insert(now + REAPED);
            foreign.again = Some(now + LOOK);
            self.poll.unwatch(&foreign.pidfd);
            return;
        }
        // Looked at before its code is asked for: one that is reaped in between would be asked too early and never again.
        let reaped = reaped(&foreign.pidfd);
        let ended = told.and_then(|t| t.ended).or_else(|| Ended::foreign(foreign.pidfd.as_fd()));
        if ended.is_none() && !reaped && foreign.until.is_none_or(|at| at > now) {
            foreign.until.get_or_insert(now + REAPED);
            // A hang-up is told all the same: it comes when the process is reaped.
            let _ = self.poll.rewatch(&foreign.pidfd, foreign.token, EventFlags::empty());
            return;
        }
        if let Some(foreign) = self.foreign.remove(&pid) {
            self.poll.unwatch(&foreign.pidfd);
            self.poll.forget(foreign.token);
            let note = "the process was not this monitor's child and the kernel does not tell its exit code";
            self.child_ended(pid, ended.unwrap_or_else(|| Ended::unknown(note)));
        }
    }

    /// Those that nobody has reaped in time.
    pub fn foreign_timers(&mut self, now: Instant) {
        let due = |f: &Foreign| f.again.or(f.until).is_some_and(|at| at <= now);
        let pids: Vec<i32> = self.foreign.iter().filter(|(_, f)| due(f)).map(|(pid, _)| *pid).collect();
        pids.into_iter().for_each(|pid| self.foreign_ready(pid));
    }

    /// The next time at which [`Server::foreign_timers`] has work.
    pub fn next_foreign_timer(&self) -> Option<Instant> {
        self.foreign.values().filter_map(|f| f.again.or(f.until)).min()
    }
}

fn reaped(pidfd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pidfd, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().contains(PollFlags::HUP)
}
