//! Execs and attached clients: the streams of each, and telling its end when what it has said is with the daemon.
//!
//! Called by the relay. An end is not told before the output, but does not wait for a reader that takes nothing: who reads on gets the
//! rest. A connection that is lost ends all of them.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use lxcri_guest_proto::StreamId;
use lxcri_guest_proto::v1::{Descriptor, Purpose, purpose};
use lxcri_monitor_proto::v1::{self, reply::Body, request::Op};
use prost::Message;
use proxmox_lxcri_monitor::connection::Asker;
use proxmox_lxcri_monitor::failure::{Failure, Result};

use crate::pump::Pump;
use crate::requests::Pending;
use crate::server::Relay;

/// Output on which nothing moves for so long is not waited for, nor any for longer than this.
const QUIET: Duration = Duration::from_millis(500);
const LONGEST: Duration = Duration::from_secs(5);
/// Most execs and clients at a time.
const MAX: usize = 128;

/// Which of both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A process in a container.
    Exec,
    /// A client of its streams.
    Attach,
}

/// Its name: the daemon's id.
pub type Key = (Kind, String);

/// One of them.
pub struct Group {
    /// The container's id.
    pub container: String,
    /// The connection that it ends with.
    pub owner: u64,
    streams: Vec<StreamId>,
    /// What its end is told with, when nothing has moved until the first time, and at the second at the latest.
    end: Option<(Body, Instant, Instant)>,
}

impl Relay {
    /// Exec.
    pub fn exec(&mut self, asker: Asker, request: v1::Exec, fds: Vec<OwnedFd>) -> Result<()> {
        let wanted = [request.has_stdin, request.has_stdout, request.has_stderr];
        let key = (Kind::Exec, request.exec_id.clone());
        self.begin(asker, key, request.container_id.clone(), wanted, fds, Op::Exec(request))
    }

    /// Attach.
    pub fn attach(&mut self, asker: Asker, request: v1::Attach, fds: Vec<OwnedFd>) -> Result<()> {
        let wanted = [request.has_stdin, request.has_stdout, request.has_stderr];
        let key = (Kind::Attach, request.attach_id.clone());
        if fds.is_empty() {
            return Err(Failure::invalid("an attach needs descriptors"));
        }
        self.begin(asker, key, request.container_id.clone(), wanted, fds, Op::Attach(request))
    }

    fn begin(
        &mut self,
        asker: Asker,
        key: Key,
        container: String,
        wanted: [bool; 3],
        fds: Vec<OwnedFd>,
        op: Op,
    ) -> Result<()> {
        if key.1.is_empty() || fds.len() != wanted.iter().filter(|w| **w).count() {
            return Err(Failure::invalid(format!("{} descriptors do not fit the request", fds.len())));
        }
        if self.groups.contains_key(&key) {
            return Err(Failure::new(v1::ErrorCode::ErrorExists, format!("{}: it is there already", key.1)));
        }
        if self.groups.len() >= MAX {
            return Err(Failure::state(format!("{MAX} execs and clients are there in this pod already")));
        }
        self.running(&container)?;
        let inputs = [true, false, false].into_iter().zip(wanted).filter_map(|(input, wanted)| wanted.then_some(input));
        let mut pumps = Vec::new();
        for (fd, input) in fds.into_iter().zip(inputs) {
            pumps.push(Pump::new(fd, input).map_err(|e| Failure::errno("a descriptor", e))?);
        }
        let lost = || Failure::state("no connection to the guest");
        let session = self.link.session().ok_or_else(lost)?;
        let mut streams = Vec::new();
        for pump in pumps {
            let buffer = if key.0 == Kind::Attach && !pump.input { pump.buffer() } else { 0 };
            let descriptor = purpose::Purpose::Descriptor(Descriptor { input: pump.input, buffer });
            let opened = session.mux().open(&Purpose { purpose: Some(descriptor) }.encode_to_vec());
            let Some(id) = opened else {
                streams.into_iter().for_each(|id| self.end_pump(id, true));
                return Err(Failure::state("there are too many streams"));
            };
            if !pump.input {
                // Nothing is said to what says something.
                session.mux().end(id);
            }
            self.pumps.insert(id, pump);
            streams.push(id);
        }
        let asked = session.ask_with(op, streams.iter().map(|id| id.number()).collect());
        self.groups.insert(key.clone(), Group { container, owner: asker.connection, streams, end: None });
        match asked {
            Ok(call) => drop(self.pending.insert(call, Pending::Group { asker, key })),
            Err(e) => {
                self.drop_group(&key);
                return Err(Failure::invalid(e));
            }
        }
        Ok(())
    }

    /// It did not come to be, or nobody has to hear of it any more.
    pub fn drop_group(&mut self, key: &Key) {
        if let Some(group) = self.groups.remove(key) {
            group.streams.into_iter().for_each(|id| self.end_pump(id, true));
        }
    }

    /// Its end was told by the guest; it is passed on when its output is.
    pub fn group_ended(&mut self, key: &Key, body: Body) {
        let now = Instant::now();
        let Some(group) = self.groups.get_mut(key) else { return };
        group.end.get_or_insert((body, now + QUIET, now + LONGEST));
        let inputs: Vec<StreamId> =
            group.streams.iter().copied().filter(|id| self.pumps.get(id).is_some_and(|p| p.input)).collect();
        inputs.into_iter().for_each(|id| self.end_pump(id, true));
    }

    /// Bytes of a stream have moved.
    pub fn group_moves(&mut self, id: StreamId) {
        let groups = self.groups.values_mut().filter(|group| group.streams.contains(&id));
        for (_, quiet, _) in groups.filter_map(|group| group.end.as_mut()) {
            *quiet = Instant::now() + QUIET;
        }
    }

    /// Tells the ends that can be told.
    pub fn check_groups(&mut self, now: Instant) {
        let pumps = &self.pumps;
        let over = |group: &Group| {
            group.end.as_ref().is_some_and(|(_, quiet, latest)| {
                *quiet <= now || *latest <= now || !group.streams.iter().any(|id| pumps.contains_key(id))
            })
        };
        let keys: Vec<Key> = self.groups.iter().filter(|(_, g)| over(g)).map(|(key, _)| key.clone()).collect();
        for key in keys {
            let Some(group) = self.groups.remove(&key) else { continue };
            if let Some((body, ..)) = group.end {
                self.broadcast(&body);
            }
            // What an exec leaves running may go on talking; a client that is cut off hears nothing more.
            if key.0 == Kind::Attach {
                group.streams.into_iter().for_each(|id| self.end_pump(id, true));
            }
        }
    }

    /// When [`Self::check_groups`] has work.
    pub fn group_timers(&self) -> impl Iterator<Item = Instant> {
        self.groups.values().filter_map(|g| g.end.as_ref()).map(|(_, quiet, latest)| *quiet.min(latest))
    }

    /// A daemon's connection is gone, and its execs with it.
    pub fn kill_execs_of(&mut self, client: u64) {
        let is = |(key, group): &(&Key, &Group)| key.0 == Kind::Exec && group.owner == client;
        let keys: Vec<Key> = self.groups.iter().filter(is).map(|(key, _)| key.clone()).collect();
        for key in keys {
            let kill = Op::KillExec(v1::KillExec { exec_id: key.1 });
            if let Some(Ok(call)) = self.link.session().map(|session| session.ask(kill)) {
                self.pending.insert(call, Pending::Nobody);
            }
        }
    }

    /// The connection is gone, and with it all of them: those that are `pending` are answered otherwise.
    pub fn lose_groups(&mut self, why: &str, pending: &[Key]) {
        self.pumps.clear();
        for (key, group) in std::mem::take(&mut self.groups) {
            if pending.contains(&key) {
                continue;
            }
            let lost = || match key.0 {
                Kind::Exec => {
                    let exit = v1::Exit {
                        code: 255,
                        finished_at: proxmox_lxcri_monitor::clock::now_ns(),
                        note: format!("the connection to the virtual machine was lost: {why}"),
                        ..Default::default()
                    };
                    let (container_id, exec_id) = (group.container.clone(), key.1.clone());
                    Body::ExecExited(v1::ExecExited { container_id, exec_id, exit: Some(exit), timed_out: false })
                }
                Kind::Attach => {
                    let (container_id, attach_id) = (group.container.clone(), key.1.clone());
                    Body::AttachEnded(v1::AttachEnded { container_id, attach_id, lagged: false })
                }
            };
            let body = group.end.map_or_else(lost, |(body, ..)| body);
            self.broadcast(&body);
        }
    }
}
