//! The relay's loop: waits for the daemon, the guest and what passes between them, and hands it to who knows about it.
//!
//! `main` runs it; `requests` has what the daemon asks, `answers` what the guest says, `container`, `group` and `meeting` what they are
//! about. It ends by Shutdown, or when poll itself fails. Nothing in it waits for a peer; the node's disk it does wait for, as long as
//! a log's lines take.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use lxcri_guest_proto::v1::HelloAnswer;
use lxcri_guest_proto::{Event, StreamId};
use lxcri_monitor_proto::v1::{self, Reply, reply::Body};
use proxmox_lxcri_monitor::connection::{Asker, Connection};
use proxmox_lxcri_monitor::failure::{Failure, Result};
use proxmox_lxcri_monitor::setup::Given;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::SocketFlags;

use crate::container::Container;
use crate::group::{Group, Key};
use crate::link::{Link, News};
use crate::pump::{Pump, Step};
use crate::requests::{Pending, Waiting, Whereabouts};
use crate::target::Target;

/// What there is to wait for.
#[derive(Debug, Clone, Copy)]
enum Source {
    Listener,
    Client(u64),
    Guest,
    Pump(StreamId),
}

/// Everything the relay has.
pub struct Relay {
    listener: OwnedFd,
    /// The pod's folder.
    pub run_dir: PathBuf,
    /// Opaque, the daemon's.
    pub pod_info: Vec<u8>,
    clients: BTreeMap<u64, Connection>,
    last_client: u64,
    /// To the guest.
    pub link: Link,
    /// Where that is, as it was last read.
    pub target: Option<Target>,
    /// What it said of itself, while the link is ready.
    pub guest: Option<HelloAnswer>,
    /// Node's clock less the guest's, in nanoseconds.
    pub offset: i64,
    /// It was heard of in this relay's life.
    pub settled: bool,
    /// The guest has an init of a shared PID namespace, whose end is to be told.
    pub has_init: bool,
    /// By id.
    pub containers: BTreeMap<String, Container>,
    /// The folder that records were read from.
    pub folder: Option<PathBuf>,
    /// Whose log a stream is.
    pub logs: BTreeMap<StreamId, String>,
    /// Descriptors of the daemon's.
    pub pumps: BTreeMap<StreamId, Pump>,
    /// Execs and attached clients.
    pub groups: BTreeMap<Key, Group>,
    /// Requests that wait for the guest.
    pub waiting: VecDeque<Waiting>,
    /// First requests that do, until then, with the version.
    pub hellos: Vec<(Asker, u32, Instant)>,
    /// Calls that are not answered.
    pub pending: BTreeMap<u64, Pending>,
    /// Who asked for the end, and when it is not waited for any longer.
    pub shutdown: Option<(Asker, Instant)>,
    done: bool,
}

impl Relay {
    /// Of what the daemon gave.
    pub fn new(given: Given) -> std::result::Result<Self, String> {
        let Given { run_dir, listener, pod_info } = given;
        let flags = rustix::fs::fcntl_getfl(&listener).map_err(|e| format!("descriptor 3: {e}"))?;
        rustix::fs::fcntl_setfl(&listener, flags | rustix::fs::OFlags::NONBLOCK)
            .map_err(|e| format!("descriptor 3: {e}"))?;
        Ok(Self {
            listener,
            run_dir,
            pod_info,
            clients: BTreeMap::new(),
            last_client: 0,
            link: Link::new(),
            target: None,
            guest: None,
            offset: 0,
            settled: false,
            has_init: false,
            containers: BTreeMap::new(),
            folder: None,
            logs: BTreeMap::new(),
            pumps: BTreeMap::new(),
            groups: BTreeMap::new(),
            waiting: VecDeque::new(),
            hellos: Vec::new(),
            pending: BTreeMap::new(),
            shutdown: None,
            done: false,
        })
    }

    /// Serves until Shutdown.
    pub fn run(&mut self) -> std::result::Result<(), String> {
        // A relay before this one may have left containers: then the guest is looked for at once.
        let _ = self.look_at_target();
        while !self.done {
            for (source, flags) in self.wait().map_err(|e| format!("poll: {e}"))? {
                match source {
                    Source::Listener => self.accept(),
                    Source::Client(client) => self.serve(client),
                    // Looked at in any case.
                    Source::Guest => {}
                    Source::Pump(id) => self.pump_ready(id, flags),
                }
            }
            self.step_link();
            self.check_waiting(Instant::now());
            self.flush();
            self.check_shutdown();
        }
        let _ = rustix::fs::unlink(self.run_dir.join("monitor.sock"));
        Ok(())
    }

    fn wait(&mut self) -> rustix::io::Result<Vec<(Source, PollFlags)>> {
        let now = Instant::now();
        // Rounded up: what is waited for is due when we wake.
        let time = self.next_timer().map(|at| at.saturating_duration_since(now) + Duration::from_millis(1));
        let timeout =
            time.map(|t| rustix::time::Timespec { tv_sec: t.as_secs() as i64, tv_nsec: i64::from(t.subsec_nanos()) });
        let rooms: Vec<usize> = match self.link.session() {
            Some(session) => self.pumps.keys().map(|id| session.mux().room(*id)).collect(),
            None => Vec::new(),
        };
        let mut wanted: Vec<(Source, BorrowedFd<'_>, PollFlags)> =
            vec![(Source::Listener, self.listener.as_fd(), PollFlags::IN)];
        for (client, connection) in &self.clients {
            let out = if connection.waits() { PollFlags::OUT } else { PollFlags::empty() };
            wanted.push((Source::Client(*client), connection.fd(), PollFlags::IN | out));
        }
        wanted.extend(self.link.interest().map(|(fd, flags)| (Source::Guest, fd, flags)));
        for ((id, pump), room) in self.pumps.iter().zip(rooms) {
            wanted.extend(pump.interest(room).map(|(fd, flags)| (Source::Pump(*id), fd, flags)));
        }
        let mut fds: Vec<PollFd<'_>> =
            wanted.iter().map(|(_, fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)).collect();
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
        let ready = wanted.iter().zip(&fds).filter(|(_, fd)| !fd.revents().is_empty());
        Ok(ready.map(|((source, ..), fd)| (*source, fd.revents())).collect())
    }

    // ------------------------------------------------------------------------------------------ the daemon

    fn accept(&mut self) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let Ok(socket) = rustix::net::accept_with(&self.listener, flags) else { return };
        // Only root decides about containers.
        if rustix::net::sockopt::socket_peercred(&socket).is_ok_and(|peer| peer.uid.is_root()) {
            self.last_client += 1;
            self.clients.insert(self.last_client, Connection::new(socket));
        }
    }

    fn serve(&mut self, client: u64) {
        let Some(connection) = self.clients.get_mut(&client) else { return };
        match connection.flush().and_then(|()| connection.receive()) {
            Ok(Some((request, fds))) => self.request(client, request, fds),
            Ok(None) => {}
            Err(_) => self.disconnect(client),
        }
    }

    fn disconnect(&mut self, client: u64) {
        self.clients.remove(&client);
        self.waiting.retain(|waiting| waiting.asker.connection != client);
        self.hellos.retain(|(asker, ..)| asker.connection != client);
        self.kill_execs_of(client);
    }

    /// The connection gets events from now on; whether it did before.
    pub fn greet(&mut self, client: u64) -> bool {
        self.clients.get_mut(&client).is_some_and(|c| std::mem::replace(&mut c.greeted, true))
    }

    /// Whether it has said Hello.
    pub fn greeted(&self, client: u64) -> bool {
        self.clients.get(&client).is_some_and(|c| c.greeted)
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
        let clients: Vec<u64> = self.clients.iter().filter(|(_, c)| c.greeted).map(|(id, _)| *id).collect();
        for client in clients {
            self.send(client, Reply { id: 0, body: Some(event.clone()) }, Vec::new());
        }
    }

    fn send(&mut self, client: u64, reply: Reply, fds: Vec<OwnedFd>) {
        if let Some(connection) = self.clients.get_mut(&client)
            && connection.send(reply, fds).is_err()
        {
            self.disconnect(client);
        }
    }

    // ------------------------------------------------------------------------------------------ the guest

    /// Whether somebody needs it.
    fn wants_guest(&self) -> bool {
        let of_use = self.target.as_ref().is_some_and(|target| target.gone.is_none());
        of_use && !(self.containers.is_empty() && self.waiting.is_empty() && self.hellos.is_empty())
    }

    fn step_link(&mut self) {
        if self.link.is_due() && self.wants_guest() {
            // It may have moved, or be gone for good.
            match (self.look_at_target(), &self.target) {
                (Ok(Whereabouts::Known), Some(target)) => self.link.begin(target),
                (Ok(_), _) => self.link.postpone("it is not known where it is".into()),
                (Err(why), _) => self.link.postpone(why),
            }
        }
        let Some(target) = &self.target else { return };
        let mut news = Vec::new();
        self.link.step(target, &mut news);
        self.take(news);
    }

    fn take(&mut self, news: Vec<News>) {
        for news in news {
            match news {
                News::Ready(greeting) => self.met(greeting),
                News::Stream(event) => self.stream_event(event),
                News::Answer(answer) => self.answered(answer),
                News::Lost(why) => self.lost(&why),
            }
        }
    }

    fn stream_event(&mut self, event: Event) {
        match event {
            Event::Data(id, data) => match self.pumps.get_mut(&id) {
                Some(pump) if !pump.input => pump.take(&data),
                // Nobody has asked it for anything on this one.
                Some(_) => self.end_pump(id, true),
                None => self.log_data(id, &data),
            },
            Event::Ended(id) => match self.pumps.get_mut(&id) {
                Some(pump) if !pump.input => pump.end(),
                // Who was to read is gone, and all was read.
                Some(_) => self.end_pump(id, true),
                None => self.log_stream_ended(id),
            },
            Event::Reset(id, code) => match self.pumps.contains_key(&id) {
                true => self.end_pump(id, false),
                false => self.log_stream_reset(id, code),
            },
            Event::Acknowledged(..) | Event::Pong(_) | Event::Opened(..) => {}
        }
    }

    /// Sends, writes and reads until nothing more goes now.
    fn flush(&mut self) {
        loop {
            self.step_pumps();
            self.step_logs();
            let now = Instant::now();
            self.check_containers(now);
            self.check_groups(now);
            let Some(target) = &self.target else { return };
            let mut news = Vec::new();
            let sent = self.link.send(target, &mut news);
            self.take(news);
            if !sent {
                return;
            }
        }
    }

    // ------------------------------------------------------------------------------------------ descriptors

    fn pump_ready(&mut self, id: StreamId, flags: PollFlags) {
        let broken = flags.intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL);
        if broken && self.pumps.get(&id).is_some_and(|pump| !pump.input) {
            self.end_pump(id, true);
        }
    }

    fn step_pumps(&mut self) {
        let Some(session) = self.link.session() else { return };
        let (mut over, mut moved) = (Vec::new(), Vec::new());
        for (id, pump) in &mut self.pumps {
            match pump.step(*id, session.mux()) {
                Step::Going(0) => {}
                Step::Going(_) => moved.push(*id),
                Step::Over => over.push(*id),
            }
        }
        moved.into_iter().for_each(|id| self.group_moves(id));
        over.into_iter().for_each(|id| self.end_pump(id, false));
    }

    /// Closes a descriptor; `reset`: the stream is told, too.
    pub fn end_pump(&mut self, id: StreamId, reset: bool) {
        if self.pumps.remove(&id).is_some()
            && reset
            && let Some(session) = self.link.session()
        {
            session.mux().reset(id, lxcri_guest_proto::v1::ResetCode::ResetBroken as u32);
        }
    }

    // ------------------------------------------------------------------------------------------ time

    fn next_timer(&self) -> Option<Instant> {
        let waiting = self.waiting.iter().map(|w| w.until);
        let hellos = self.hellos.iter().map(|(.., until)| *until);
        let due = waiting.chain(hellos).chain(self.link.timer(self.wants_guest()));
        let due = due.chain(self.container_timers()).chain(self.group_timers());
        due.chain(self.shutdown.map(|(_, until)| until)).min()
    }

    // ------------------------------------------------------------------------------------------ the end

    /// Shutdown.
    pub fn shut_down(&mut self, asker: Asker, force: bool) -> Result<()> {
        if !self.containers.is_empty() && !force {
            return Err(Failure::state(format!("{} containers are there", self.containers.len())));
        }
        self.shutdown = Some((asker, Instant::now() + crate::requests::SHUTDOWN));
        let ids: Vec<String> = self.containers.keys().cloned().collect();
        for id in ids {
            // One that can't be reached goes with its machine.
            let _ = self.delete(None, &id);
        }
        Ok(())
    }

    fn check_shutdown(&mut self) {
        let Some((asker, until)) = self.shutdown else { return };
        if !self.containers.is_empty() && until > Instant::now() && self.link.session().is_some() {
            return;
        }
        let ids: Vec<String> = self.containers.keys().cloned().collect();
        ids.iter().for_each(|id| self.forget_container(id));
        self.shutdown = None;
        self.reply(asker, Ok(Body::Done(v1::Done {})));
        self.done = true;
    }
}
