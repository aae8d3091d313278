//! The monitor's loop: waits for whatever happens to the pod and hands it to who knows about it.
//!
//! `main` runs it; `ops` has the requests, `container`, `exec` and `init` have what they are about. The loop ends by
//! Shutdown, or when epoll itself fails. Nothing in it waits for a disk, a program or a peer.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use lxcri_monitor_proto::v1::{self, Reply, reply::Body};
use rustix::net::SocketFlags;

use crate::attach::Attached;
use crate::connection::{Asker, Connection};
use crate::container::Container;
use crate::exec::Exec;
use crate::execgroup::ExecGroup;
use crate::fail_point;
use crate::failure::{Failure, Result};
use crate::init::Init;
use crate::kept::Kept;
use crate::lifecycle::{Event, Program};
use crate::poll::{EventFlags, Poll, Source};
use crate::process::Process;
use crate::proctree;
use crate::program::Running;
use crate::reaper::{Ended, Reaper};
use crate::relay::{Owner, Relay};
use crate::stdio::set_nonblocking;
use crate::takeover::Foreign;
use crate::writer::{LogId, Report, Writer};

/// A program that was killed and is still there is killed again after this time.
const AGAIN: Duration = Duration::from_secs(5);

/// What a running program is for.
pub enum Purpose {
    /// A container's plan.
    Container(String, Program),
    /// An exec; its console socket.
    Exec(String, String),
    /// The pod's init.
    Init(Asker),
}

/// Everything the monitor has.
pub struct Server {
    /// What is waited for.
    pub poll: Poll,
    /// The log writer.
    pub writer: Writer,
    /// The reaper.
    pub reaper: Reaper,
    /// Opaque, the daemon's.
    pub pod_info: Vec<u8>,
    /// By id.
    pub containers: BTreeMap<String, Container>,
    /// By id.
    pub execs: BTreeMap<String, Exec>,
    /// Cgroups of execs that are over, while somebody is in them.
    pub groups: Vec<ExecGroup>,
    /// Copies of programs, from the daemon.
    pub kept: Kept,
    /// Programs that run, by pid.
    pub programs: BTreeMap<i32, (Purpose, Running)>,
    /// Attached clients, by number.
    pub attached: BTreeMap<u64, Attached>,
    /// The pod's init.
    pub init: Init,
    /// Who asked for the end.
    pub shutdown: Option<Asker>,
    /// The last log's name.
    pub next_log: LogId,
    /// Logs being opened anew, and for whom.
    pub reopening: Vec<(LogId, Asker)>,
    connections: BTreeMap<u64, Connection>,
    relays: BTreeMap<u64, Relay>,
    /// Processes that are not our children, by pid.
    pub foreign: BTreeMap<i32, Foreign>,
    listener: OwnedFd,
    socket_path: PathBuf,
    /// Requests and Shutdown are over: the loop ends.
    done: bool,
}

impl Server {
    /// Of a listening socket, bound at `socket_path`. Starts the writer's thread, so the reaper comes first.
    pub fn new(listener: OwnedFd, socket_path: PathBuf, pod_info: Vec<u8>, reaper: Reaper) -> std::io::Result<Self> {
        let mut poll = Poll::new()?;
        let writer = Writer::start()?;
        set_nonblocking(&listener)?;
        poll.add(&listener, Source::Listener, EventFlags::IN)?;
        poll.add(reaper.signals(), Source::Children, EventFlags::IN)?;
        poll.add(writer.reported(), Source::Writer, EventFlags::IN)?;
        Ok(Self {
            poll,
            writer,
            reaper,
            pod_info,
            containers: BTreeMap::new(),
            execs: BTreeMap::new(),
            groups: Vec::new(),
            kept: Kept::default(),
            programs: BTreeMap::new(),
            attached: BTreeMap::new(),
            init: Init::None,
            shutdown: None,
            next_log: 0,
            reopening: Vec::new(),
            connections: BTreeMap::new(),
            relays: BTreeMap::new(),
            foreign: BTreeMap::new(),
            listener,
            socket_path,
            done: false,
        })
    }

    /// Serves until Shutdown.
    pub fn run(&mut self) -> std::io::Result<()> {
        while !self.done {
            let timeout = self.next_timer().map(|at| at.saturating_duration_since(Instant::now()));
            for (token, source) in self.poll.wait(timeout)? {
                // What an earlier event of this round has removed is not there any more.
                if self.poll.knows(token) {
                    self.ready(token, source);
                }
            }
            self.timers();
            self.check_shutdown();
        }
        let _ = rustix::fs::unlink(&self.socket_path);
        Ok(())
    }

    fn ready(&mut self, token: u64, source: Source) {
        match source {
            Source::Listener => self.accept(),
            Source::Children => self.reap(),
            Source::Writer => self.writer.reports().into_iter().for_each(|r| self.report(r)),
            Source::Connection => self.serve(token),
            Source::Relay => self.step_relay(token),
            Source::Memory(log) => self.memory_event(log),
            Source::Foreign(pid) => self.foreign_ready(pid),
        }
    }

    // ------------------------------------------------------------------------------------------ connections

    fn accept(&mut self) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let Ok(socket) = rustix::net::accept_with(&self.listener, flags) else { return };
        // Only root decides about containers.
        if !rustix::net::sockopt::socket_peercred(&socket).is_ok_and(|peer| peer.uid.is_root()) {
            return;
        }
        if let Ok(token) = self.poll.add(&socket, Source::Connection, EventFlags::IN) {
            self.connections.insert(token, Connection::new(socket));
        }
    }

    fn serve(&mut self, token: u64) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        let received = connection.flush().and_then(|()| connection.receive());
        match received {
            Ok(Some((request, fds))) => self.request(token, request, fds),
            Ok(None) => {}
            Err(_) => return self.disconnect(token),
        }
        self.watch_connection(token);
    }

    /// A connection that waits to send is watched for that, too.
    fn watch_connection(&mut self, token: u64) {
        if let Some(connection) = self.connections.get(&token) {
            let flags = if connection.waits() { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
            let _ = self.poll.rewatch(connection.fd(), token, flags);
        }
    }

    fn disconnect(&mut self, token: u64) {
        if let Some(connection) = self.connections.remove(&token) {
            self.poll.unwatch(connection.fd());
            self.poll.forget(token);
            self.kill_execs_of(token);
        }
    }

    /// Marks a connection as one that gets events.
    pub fn greet(&mut self, token: u64) {
        if let Some(connection) = self.connections.get_mut(&token) {
            connection.greeted = true;
        }
    }

    /// Whether it has said Hello.
    pub fn greeted(&self, token: u64) -> bool {
        self.connections.get(&token).is_some_and(|c| c.greeted)
    }

    /// Answers a request; whoever is gone is not told.
    pub fn reply(&mut self, asker: Asker, answer: Result<Body>) {
        self.reply_with(asker, answer, Vec::new());
    }

    /// The same, with descriptors.
    pub fn reply_with(&mut self, asker: Asker, answer: Result<Body>, fds: Vec<OwnedFd>) {
        let body = answer.unwrap_or_else(|failure| Body::Error(failure.to_wire()));
        self.send(asker.connection, Reply { id: asker.request, body: Some(body) }, fds);
    }

    /// Tells everybody who said Hello.
    pub fn broadcast(&mut self, event: &Body) {
        let tokens: Vec<u64> = self.connections.iter().filter(|(_, c)| c.greeted).map(|(t, _)| *t).collect();
        for token in tokens {
            self.send(token, Reply { id: 0, body: Some(event.clone()) }, Vec::new());
        }
    }

    fn send(&mut self, token: u64, reply: Reply, fds: Vec<OwnedFd>) {
        if let Some(connection) = self.connections.get_mut(&token) {
            match connection.send(reply, fds) {
                Ok(()) => self.watch_connection(token),
                Err(_) => self.disconnect(token),
            }
        }
    }

    // ------------------------------------------------------------------------------------------ relays

    /// Copies from one descriptor to another for `owner`, both non-blocking.
    pub fn relay(&mut self, owner: Owner, from: OwnedFd, to: OwnedFd) {
        let token = self.poll.token(Source::Relay);
        self.relays.insert(token, Relay::new(owner, token, from, to));
        self.step_relay(token);
    }

    fn step_relay(&mut self, token: u64) {
        if self.relays.get_mut(&token).is_some_and(|relay| !relay.step(&self.poll)) {
            self.end_relay(token);
        }
    }

    fn end_relay(&mut self, token: u64) {
        if let Some(mut relay) = self.relays.remove(&token) {
            relay.unwatch(&self.poll);
            self.poll.forget(token);
            if let Owner::Attach(container, client) = &relay.owner {
                let (container, client) = (container.clone(), *client);
                drop(relay);
                self.attached_input_over(&container, client);
            }
        }
    }

    /// Ends an owner's as soon as their targets take no more: what a client that is gone has sent is not waited for.
    pub fn hurry_relays(&mut self, owner: &Owner) {
        let tokens: Vec<u64> = self.relays.iter().filter(|(_, r)| r.owner == *owner).map(|(t, _)| *t).collect();
        for token in tokens {
            if let Some(relay) = self.relays.get_mut(&token) {
                relay.set_last();
            }
            self.step_relay(token);
        }
    }

    /// Ends all of an owner's.
    pub fn end_relays(&mut self, owner: &Owner) {
        self.end_relays_if(|o| o == owner);
    }

    /// Ends all whose owner fits.
    pub fn end_relays_if(&mut self, fits: impl Fn(&Owner) -> bool) {
        let tokens: Vec<u64> = self.relays.iter().filter(|(_, r)| fits(&r.owner)).map(|(t, _)| *t).collect();
        tokens.into_iter().for_each(|token| self.end_relay(token));
    }

    // ------------------------------------------------------------------------------------------ processes

    fn reap(&mut self) {
        self.reaper.acknowledge();
        while let Some((pid, ended)) = self.reaper.next() {
            self.child_ended(pid, ended);
        }
    }

    /// A child, or a process that was watched, has ended.
    pub fn child_ended(&mut self, pid: i32, ended: Ended) {
        if let Some((purpose, running)) = self.programs.remove(&pid) {
            match purpose {
                Purpose::Container(id, program) => self.container_program_ended(&id, program, running, ended),
                Purpose::Exec(id, console_socket) => self.exec_program_ended(&id, &console_socket, running, ended),
                Purpose::Init(asker) => self.init_program_ended(asker, running, ended),
            }
            return;
        }
        let is = |process: &Option<Process>| process.as_ref().is_some_and(|p| p.pid == pid && p.pidfd.is_some());
        if let Some(id) = self.containers.iter().find(|(_, c)| is(&c.init)).map(|(id, _)| id.clone()) {
            self.container_init_ended(&id, ended);
        } else if let Some(id) = self.execs.iter().find(|(_, e)| is(&e.process)).map(|(id, _)| id.clone()) {
            self.exec_over(&id, ended);
        } else if matches!(&self.init, Init::Running(p) if p.pid == pid) {
            self.init_over(ended);
        } else if !self.holder_ended(pid) {
            self.reaper.keep(pid, ended);
        }
    }

    fn report(&mut self, report: Report) {
        match report {
            Report::Opened(log, Ok(())) => self.writer_answered(log, Event::LogOpened(true)),
            Report::Opened(log, Err(error)) => self.log_failed(log, &error),
            Report::Attached(client) => self.attached(client),
            Report::AttachOver(client, lagged) => self.attached_output_over(client, lagged),
            Report::Drained(log) => self.writer_answered(log, Event::Drained),
            Report::Closed(log) => self.writer_answered(log, Event::LogClosed),
            Report::Reopened(log, result) => self.log_reopened(log, result),
            Report::Trouble(log, message) => {
                if let Some(id) = self.containers.iter().find(|(_, c)| c.log == log).map(|(id, _)| id.clone()) {
                    self.broadcast(&Body::LogTrouble(v1::LogTrouble { container_id: id, message }));
                }
            }
            Report::Dropped(log, bytes) => {
                if let Some(id) = self.containers.iter().find(|(_, c)| c.log == log).map(|(id, _)| id.clone()) {
                    self.broadcast(&Body::LogDropped(v1::LogDropped { container_id: id, bytes }));
                }
            }
        }
    }

    // ------------------------------------------------------------------------------------------ time

    fn next_timer(&self) -> Option<Instant> {
        let programs = self.programs.values().map(|(_, r)| r.deadline);
        let execs = self.execs.values().filter_map(|e| e.deadline);
        let due = programs.chain(execs).chain(self.next_container_timer());
        due.chain(self.next_group_timer()).chain(self.next_foreign_timer()).chain(self.next_holder_timer()).min()
    }

    fn timers(&mut self) {
        let now = Instant::now();
        for (pid, (_, running)) in &mut self.programs {
            if running.deadline <= now {
                running.overdue = true;
                running.kill_at(now + AGAIN);
                proctree::kill_tree(*pid, None);
            }
        }
        self.exec_timers(now);
        self.group_timers(now);
        self.container_timers(now);
        self.foreign_timers(now);
        self.holder_timers(now);
    }

    // ------------------------------------------------------------------------------------------ the end

    /// Shutdown.
    pub fn shut_down(&mut self, asker: Asker, force: bool) -> Result<()> {
        if !self.containers.is_empty() && !force {
            return Err(Failure::state(format!("{} containers are there", self.containers.len())));
        }
        self.shutdown = Some(asker);
        fail_point!("monitor.shutdown");
        let execs: Vec<String> = self.execs.keys().cloned().collect();
        execs.iter().for_each(|id| self.kill_exec(id));
        let containers: Vec<String> = self.containers.keys().cloned().collect();
        containers.iter().for_each(|id| self.delete(None, id));
        if let Init::Running(process) = &self.init {
            let _ = process.signal(libc::SIGKILL);
        }
        Ok(())
    }

    /// A container could not be deleted: the monitor stays for it.
    pub fn refuse_shutdown(&mut self, failure: Failure) {
        if let Some(asker) = self.shutdown.take() {
            self.reply(asker, Err(failure));
        }
    }

    fn check_shutdown(&mut self) {
        let empty = self.containers.is_empty()
            && self.execs.is_empty()
            && self.programs.is_empty()
            && matches!(self.init, Init::None);
        if empty && let Some(asker) = self.shutdown.take() {
            self.reply(asker, Ok(Body::Done(v1::Done {})));
            self.done = true;
        }
    }
}
