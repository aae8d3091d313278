//! Processes run in a container beside its main one.
//!
//! Called by the server. A program starts the process and leaves it to us; it ends by itself, or is killed with what
//! it started because its time is up, because KillExec says so, or because the connection that asked for it is gone.
//! With a cgroup of its own that is all that is in the group, daemons that it left among them; without one (an older
//! daemon, a runtime that can't) its descendants and its session. A crash of the monitor leaves it running.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use lxcri_monitor_proto::v1::{self, reply::Body};
use rustix::termios::Winsize;

use crate::connection::Asker;
use crate::container::Container;
use crate::execgroup::ExecGroup;
use crate::fail_point;
use crate::failure::{Failure, Result};
use crate::process::Process;
use crate::proctree;
use crate::program::{self, Descriptors, Running};
use crate::reaper::Ended;
use crate::relay::Owner;
use crate::server::{Purpose, Server};
use crate::stdio::{Console, set_nonblocking};

/// A killed exec that is still there is killed again after this time.
const AGAIN: Duration = Duration::from_secs(1);

/// An exec under way.
pub struct Exec {
    container: String,
    asker: Asker,
    /// What starts it, while that runs.
    program: Option<i32>,
    /// The process.
    pub process: Option<Process>,
    pid_file: String,
    group: ExecGroup,
    /// When it is killed (again).
    pub deadline: Option<Instant>,
    killed: bool,
    timed_out: bool,
    console: Option<Console>,
    input: Option<OwnedFd>,
    output: Option<OwnedFd>,
    /// Master of its pty.
    pub terminal: Option<OwnedFd>,
    /// What the terminal's size will be, asked for before it was there.
    pub size: Option<Winsize>,
}

impl Exec {
    /// Whether its terminal has not been sent yet.
    pub fn terminal_to_come(&self) -> bool {
        self.console.is_some()
    }
}

impl Server {
    /// Exec.
    pub fn exec(&mut self, asker: Asker, request: v1::Exec, fds: Vec<OwnedFd>) -> Result<()> {
        let v1::Exec {
            container_id, exec_id, program, pid_file, terminal, console_socket, timeout_ms, cgroups, ..
        } = request;
        let group = ExecGroup::new(cgroups)?;
        program::check(program.as_ref(), "exec")?;
        let program = program.unwrap_or_default();
        if exec_id.is_empty() || !pid_file.starts_with('/') || terminal && !console_socket.starts_with('/') {
            return Err(Failure::invalid("an exec needs an id and absolute paths"));
        }
        if self.execs.contains_key(&exec_id) {
            return Err(Failure::new(v1::ErrorCode::ErrorExists, format!("exec {exec_id}: it is there already")));
        }
        if !self.container(&container_id)?.life.init_lives() {
            return Err(Failure::state(format!("container {container_id}: it does not run")));
        }
        let wanted = [request.has_stdin, request.has_stdout, request.has_stderr && !terminal];
        if fds.len() != wanted.iter().filter(|w| **w).count() {
            return Err(Failure::invalid(format!("{} descriptors do not fit the exec", fds.len())));
        }
        let mut fds = fds.into_iter();
        let [stdin, stdout, stderr] = wanted.map(|wanted| if wanted { fds.next() } else { None });
        let mut exec = Exec {
            container: container_id,
            asker,
            program: None,
            process: None,
            pid_file,
            group,
            deadline: (timeout_ms > 0).then(|| Instant::now() + Duration::from_millis(timeout_ms.into())),
            killed: false,
            timed_out: false,
            console: None,
            input: None,
            output: None,
            terminal: None,
            size: None,
        };
        let null = Some(self.container(&exec.container)?.null()?);
        let mut descriptors = Descriptors { mute: true, null, ..Descriptors::default() };
        if terminal {
            for fd in [&stdin, &stdout].into_iter().flatten() {
                set_nonblocking(fd).map_err(|e| Failure::errno("exec: a descriptor", e))?;
            }
            exec.console = Some(Console::listen(&console_socket)?);
            (exec.input, exec.output) = (stdin, stdout);
        } else {
            (descriptors.stdin, descriptors.stdout, descriptors.stderr) = (stdin, stdout, stderr);
        }
        let _ = rustix::fs::unlink(exec.pid_file.as_str());
        let started = program::spawn(&self.kept, &program, descriptors);
        if terminal && started.is_err() {
            let _ = rustix::fs::unlink(console_socket.as_str());
        }
        let running = started?;
        fail_point!("monitor.exec.spawned");
        exec.program = Some(running.pid);
        self.programs.insert(running.pid, (Purpose::Exec(exec_id.clone(), console_socket), running));
        self.execs.insert(exec_id, exec);
        Ok(())
    }

    /// What starts an exec has ended.
    pub fn exec_program_ended(&mut self, id: &str, console_socket: &str, running: Running, ended: Ended) {
        let since = running.since;
        if !console_socket.is_empty() {
            let _ = rustix::fs::unlink(console_socket);
        }
        fail_point!("monitor.exec.started");
        let outcome = running.outcome(ended);
        let Some(exec) = self.execs.get_mut(id) else { return };
        exec.program = None;
        let (killed, timed_out) = (exec.killed, exec.timed_out);
        let pid_file = exec.pid_file.clone();
        // One that was interrupted may have left the process all the same.
        let process = match outcome {
            Ok(()) => self.take_process(&pid_file, since),
            Err(failure) if killed => match self.take_process(&pid_file, since) {
                Ok(process) => Ok(process),
                Err(_) => Err(failure),
            },
            Err(failure) => Err(failure),
        };
        let _ = rustix::fs::unlink(pid_file.as_str());
        let (process, process_ended) = match process {
            Ok(found) => found,
            Err(_) if timed_out => {
                self.exec_started(id, 0);
                let at = crate::clock::now_ns();
                self.exec_over(id, Ended { code: 137, signal: libc::SIGKILL, at, note: "", oom: None });
                return;
            }
            Err(failure) => {
                if let Some(exec) = self.execs.remove(id) {
                    self.reply(exec.asker, Err(failure));
                    self.end_group(exec.group);
                }
                return;
            }
        };
        let pid = process.pid;
        if let Some(exec) = self.execs.get_mut(id) {
            exec.process = Some(process);
        }
        // Of one that has ended already, too: what it said waits in its terminal.
        if let Err(failure) = self.exec_terminal(id)
            && process_ended.is_none()
        {
            proctree::kill_tree(pid, None);
            if let Some(mut exec) = self.execs.remove(id) {
                exec.group.kill();
                self.reply(exec.asker, Err(failure));
                self.end_group(exec.group);
            }
            return;
        }
        self.exec_started(id, pid);
        match process_ended {
            Some(ended) => self.exec_over(id, ended),
            None if killed => self.kill_exec(id),
            None => {}
        }
    }

    fn exec_started(&mut self, id: &str, pid: i32) {
        if let Some(exec) = self.execs.get(id) {
            let asker = exec.asker;
            self.reply(asker, Ok(Body::ExecStarted(v1::ExecStarted { pid })));
        }
    }

    /// Connects the pty that the runtime has sent with whoever asked.
    fn exec_terminal(&mut self, id: &str) -> Result<()> {
        let Some(exec) = self.execs.get_mut(id) else { return Ok(()) };
        let Some(console) = exec.console.take() else { return Ok(()) };
        let master = console.take()?;
        if let Some(size) = exec.size {
            let _ = rustix::termios::tcsetwinsize(&master, size);
        }
        let copy = || master.try_clone().map_err(|e| Failure::io("dup a terminal", &e));
        let input = exec.input.take().map(|from| Ok((from, copy()?))).transpose()?;
        let output = exec.output.take().map(|to| Ok((copy()?, to))).transpose()?;
        exec.terminal = Some(master);
        if let Some((from, to)) = input {
            self.relay(Owner::ExecInput(id.into()), from, to);
        }
        if let Some((from, to)) = output {
            self.relay(Owner::ExecOutput(id.into()), from, to);
        }
        Ok(())
    }

    /// An exec's process has ended.
    pub fn exec_over(&mut self, id: &str, ended: Ended) {
        let Some(exec) = self.execs.remove(id) else { return };
        fail_point!("monitor.exec.over");
        self.end_relays(&Owner::ExecInput(id.into()));
        self.broadcast(&Body::ExecExited(v1::ExecExited {
            container_id: exec.container,
            exec_id: id.into(),
            exit: Some(ended.to_wire()),
            timed_out: exec.timed_out,
        }));
        self.end_group(exec.group);
    }

    /// KillExec: the process and what it started.
    pub fn kill_exec(&mut self, id: &str) {
        let Some(exec) = self.execs.get_mut(id) else { return };
        exec.killed = true;
        exec.deadline = Some(Instant::now() + AGAIN);
        if let Some(pid) = exec.program {
            proctree::kill_tree(pid, None);
        }
        if !exec.group.is_none() {
            exec.group.kill();
            // It may have left the group: a privileged one can.
            if let Some(process) = &exec.process {
                let _ = process.signal(libc::SIGKILL);
            }
        } else if let Some(process) = &exec.process {
            // A session that it shares with the container's main process is not its own.
            let shared = |c: &Container| c.init.as_ref().is_some_and(|i| i.session == process.session);
            let own = !self.containers.values().any(shared);
            proctree::kill_tree(process.pid, own.then_some(process.session));
        }
        self.end_relays(&Owner::ExecOutput(id.into()));
    }

    /// Kills the execs that a connection asked for.
    pub fn kill_execs_of(&mut self, connection: u64) {
        let of = |e: &Exec| e.asker.connection == connection;
        let ids: Vec<String> = self.execs.iter().filter(|(_, e)| of(e)).map(|(id, _)| id.clone()).collect();
        ids.iter().for_each(|id| self.kill_exec(id));
    }

    /// Kills those whose time is up.
    pub fn exec_timers(&mut self, now: Instant) {
        let due = |e: &Exec| e.deadline.is_some_and(|at| at <= now);
        let ids: Vec<String> = self.execs.iter().filter(|(_, e)| due(e)).map(|(id, _)| id.clone()).collect();
        for id in ids {
            if let Some(exec) = self.execs.get_mut(&id) {
                exec.timed_out |= !exec.killed;
            }
            self.kill_exec(&id);
        }
    }
}
