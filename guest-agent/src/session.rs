//! One node's connection: its calls, answers and streams.
//!
//! The agent's loop asks what is to be waited for ([`Session::interest`]) and has everything done that can be done
//! ([`Session::step`]); nothing here waits. A connection that fails is over, and with it its connection to the monitor, which
//! ends its execs. A crash does the same.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant, SystemTime};

use lxcri_guest_proto::v1::{self, ResetCode, answer::Answer as Body, call::Call as Op, purpose};
use lxcri_guest_proto::{Event, Secret, Side, StreamId, Talk};
use lxcri_monitor_proto::v1 as monitor_v1;
use lxcri_monitor_proto::wire::{self, WireError};
use monitor_v1::{ErrorCode, request};
use prost::Message;
use proxmox_lxcri_monitor::failure::{Failure, Result};
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use crate::keeper::{self, Keeper};
use crate::logs::{self, Follower};
use crate::pump::{Pump, Step};
use crate::settings::Settings;
use crate::{files, roots, volumes};

/// Time to prove who one is.
const GREETING: Duration = Duration::from_secs(10);
/// Bytes read from the connection at once.
const BUFFER: usize = 16 * 1024;
/// Reads before the other side has its turn.
const READS: usize = 16;
/// Answers that wait, in bytes: with more, no calls and no replies of the monitor are taken.
const ANSWERS_MAX: usize = 256 * 1024;
/// Requests that wait for the monitor.
const REQUESTS_MAX: usize = 256;

/// Why a connection is over; said to nobody but the agent's own stderr.
pub type End = String;

/// A stream that the node has opened.
enum Stream {
    /// It will be a descriptor of a request; what came before.
    Descriptor {
        descriptor: v1::Descriptor,
        early: Vec<u8>,
        ended: bool,
    },
    Pump(Pump),
    Log(Follower),
}

/// A connection.
pub struct Session {
    socket: OwnedFd,
    talk: Talk,
    /// Until then it has to be up.
    deadline: Instant,
    streams: BTreeMap<StreamId, Stream>,
    monitor: Option<OwnedFd>,
    requests: VecDeque<(monitor_v1::Request, Vec<OwnedFd>)>,
    changes: Option<OwnedFd>,
}

impl Session {
    /// Of an accepted, non-blocking socket.
    pub fn new(socket: OwnedFd, secret: &Secret) -> std::result::Result<Self, End> {
        Ok(Self {
            socket,
            talk: Talk::new(Side::Guest, secret).map_err(|e| e.to_string())?,
            deadline: Instant::now() + GREETING,
            streams: BTreeMap::new(),
            monitor: None,
            requests: VecDeque::new(),
            changes: None,
        })
    }

    /// Whether the node has proved who it is.
    pub fn is_up(&self) -> bool {
        self.talk.is_up()
    }

    /// When it is over, if the node proves nothing until then.
    pub fn deadline(&self) -> Option<Instant> {
        (!self.is_up()).then_some(self.deadline)
    }

    /// What is to be waited for.
    pub fn interest<'a>(&'a mut self, wanted: &mut Vec<(BorrowedFd<'a>, PollFlags)>) {
        let out = if self.talk.is_sending() { PollFlags::OUT } else { PollFlags::empty() };
        wanted.push((self.socket.as_fd(), PollFlags::IN | out));
        if let Some(monitor) = &self.monitor {
            let room = if self.talk.waiting() < ANSWERS_MAX { PollFlags::IN } else { PollFlags::empty() };
            let out = if self.requests.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
            wanted.push((monitor.as_fd(), room | out));
        }
        if let Some(changes) = &self.changes {
            wanted.push((changes.as_fd(), PollFlags::IN));
        }
        let mux = self.talk.mux();
        for (id, stream) in &self.streams {
            if let Stream::Pump(pump) = stream {
                pump.interest(*id, mux, wanted);
            }
        }
    }

    /// Does all that can be done now.
    pub fn step(&mut self, settings: &Settings, keeper: &mut Keeper) -> std::result::Result<(), End> {
        self.receive(settings)?;
        self.take_calls(settings, keeper)?;
        self.talk_to_monitor(keeper)?;
        if let Some(changes) = &self.changes {
            logs::drain(changes);
        }
        loop {
            self.step_streams();
            if !self.send()? {
                return Ok(());
            }
        }
    }

    // ------------------------------------------------------------------------------------------ the connection

    fn receive(&mut self, settings: &Settings) -> std::result::Result<(), End> {
        let mut buffer = [0; BUFFER];
        for _ in 0..READS {
            let count = match rustix::net::recv(&self.socket, &mut buffer, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err("closed by the node".into()),
                Ok((n, _)) => n,
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => continue,
                Err(e) => return Err(e.to_string()),
            };
            let events = self.talk.input(&buffer[..count]);
            for event in events.map_err(|e| format!("{e}: {}", source(&e)))? {
                self.event(settings, event);
            }
        }
        Ok(())
    }

    /// Whether something was sent.
    fn send(&mut self) -> std::result::Result<bool, End> {
        let mut sent = false;
        loop {
            let bytes = self.talk.output().map_err(|e| e.to_string())?;
            if bytes.is_empty() {
                return Ok(sent);
            }
            match rustix::net::send(&self.socket, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(n) => self.talk.sent(n),
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.to_string()),
            }
            sent = true;
        }
    }

    fn event(&mut self, settings: &Settings, event: Event) {
        match event {
            Event::Opened(id, purpose) => {
                if let Err(code) = self.opened(settings, id, &purpose) {
                    self.talk.mux().reset(id, code as u32);
                }
            }
            Event::Data(id, data) => {
                let taken = match self.streams.get_mut(&id) {
                    Some(Stream::Descriptor { descriptor, early, .. }) if descriptor.input => {
                        early.extend(data);
                        true
                    }
                    Some(Stream::Pump(pump)) => pump.input(&data),
                    Some(_) => false,
                    None => return,
                };
                if !taken {
                    self.reset(id, ResetCode::ResetInvalid);
                }
            }
            Event::Ended(id) => match self.streams.get_mut(&id) {
                Some(Stream::Descriptor { ended, .. }) => *ended = true,
                Some(Stream::Pump(pump)) => pump.end(),
                // What the node has to say of a log is nothing.
                Some(Stream::Log(_)) | None => {}
            },
            Event::Acknowledged(id, count) => {
                if let Some(Stream::Log(follower)) = self.streams.get_mut(&id) {
                    follower.acknowledged(count);
                    if follower.is_over() {
                        self.streams.remove(&id);
                    }
                }
            }
            Event::Reset(id, _) => drop(self.streams.remove(&id)),
            Event::Pong(_) => {}
        }
    }

    fn reset(&mut self, id: StreamId, code: ResetCode) {
        self.streams.remove(&id);
        self.talk.mux().reset(id, code as u32);
    }

    fn opened(&mut self, settings: &Settings, id: StreamId, purpose: &[u8]) -> std::result::Result<(), ResetCode> {
        let purpose = v1::Purpose::decode(purpose).ok().and_then(|p| p.purpose).ok_or(ResetCode::ResetInvalid)?;
        let stream = match purpose {
            purpose::Purpose::Descriptor(descriptor) => {
                Stream::Descriptor { descriptor, early: Vec::new(), ended: false }
            }
            purpose::Purpose::Log(log) => {
                if self.changes.is_none() {
                    self.changes = Some(logs::changes().map_err(|_| ResetCode::ResetSystem)?);
                }
                let changes = self.changes.as_ref().ok_or(ResetCode::ResetSystem)?;
                Stream::Log(Follower::open(settings, &log, changes)?)
            }
            purpose::Purpose::Port(port) => {
                let port = u16::try_from(port.port).ok().filter(|p| *p > 0).ok_or(ResetCode::ResetInvalid)?;
                Stream::Pump(Pump::connect(port))
            }
        };
        self.streams.insert(id, stream);
        Ok(())
    }

    fn step_streams(&mut self) {
        let mux = self.talk.mux();
        let mut over = Vec::new();
        for (id, stream) in &mut self.streams {
            match stream {
                Stream::Descriptor { .. } => {}
                Stream::Pump(pump) => match pump.step(*id, mux) {
                    Step::Going => {}
                    Step::Over => over.push((*id, None)),
                    Step::Broken(code) => over.push((*id, Some(code))),
                },
                Stream::Log(follower) => {
                    if follower.step(*id, mux).is_err() {
                        over.push((*id, Some(ResetCode::ResetSystem)));
                    } else if follower.is_over() {
                        over.push((*id, None));
                    }
                }
            }
        }
        for (id, code) in over {
            match code {
                Some(code) => self.reset(id, code),
                None => drop(self.streams.remove(&id)),
            }
        }
    }

    // ------------------------------------------------------------------------------------------ calls

    fn take_calls(&mut self, settings: &Settings, keeper: &mut Keeper) -> std::result::Result<(), End> {
        while self.talk.waiting() < ANSWERS_MAX && self.requests.len() < REQUESTS_MAX {
            let Some(call) = self.talk.take::<v1::Call>().map_err(|e| e.to_string())? else { return Ok(()) };
            let id = call.id;
            match self.call(settings, keeper, call) {
                Ok(Some(body)) => self.answer(id, body)?,
                Ok(None) => {}
                Err(failure) => self.answer(id, Body::Error(failure.to_wire()))?,
            }
        }
        Ok(())
    }

    fn answer(&mut self, id: u64, body: Body) -> std::result::Result<(), End> {
        let answer = v1::Answer { id, answer: Some(body) };
        self.talk.say(&answer).map_err(|e| e.to_string())
    }

    /// Its answer; None: it will come from the monitor.
    fn call(&mut self, settings: &Settings, keeper: &mut Keeper, call: v1::Call) -> Result<Option<Body>> {
        if call.id == 0 {
            return Err(Failure::invalid("a call needs an id"));
        }
        let Some(op) = call.call else {
            return Err(Failure::new(ErrorCode::ErrorUnknownOperation, "this agent does not know the call"));
        };
        let done = Body::Done(v1::Done {});
        Ok(Some(match op {
            Op::Hello(_) => Body::Hello(hello(settings)?),
            Op::Monitor(request) => {
                self.request(settings, keeper, call.id, request)?;
                return Ok(None);
            }
            Op::MakeRoot(call) => Body::Root(roots::make(settings, &call)?),
            Op::RemoveRoot(call) => {
                roots::remove(settings, &call.container_id)?;
                keeper::forget(settings, &call.container_id)?;
                done
            }
            Op::DropImage(call) => roots::drop_image(settings, &call).map(|()| done)?,
            Op::Write(call) => files::write(settings, &call).map(|()| done)?,
            Op::Sync(call) => volumes::sync(settings, &call).map(|()| done)?,
            Op::Remove(call) => {
                match call.what.ok_or_else(|| Failure::invalid("remove: nothing"))? {
                    v1::remove::What::Run(path) => files::remove(settings, &path)?,
                    v1::remove::What::Volume(volume) => volumes::remove(settings, &volume)?,
                }
                done
            }
            Op::Read(call) => Body::Contents(files::read(settings, &call)?),
            Op::EndLog(call) => {
                let stream = self.streams.iter_mut().find(|(id, _)| id.number() == call.stream);
                let Some((_, Stream::Log(follower))) = stream else {
                    return Err(Failure::not_found(format!("stream {}: no log", call.stream)));
                };
                follower.end();
                done
            }
            Op::ForgetLog(call) => logs::forget(settings, &call.container_id).map(|()| done)?,
        }))
    }

    // ------------------------------------------------------------------------------------------ the monitor

    fn request(&mut self, settings: &Settings, keeper: &mut Keeper, id: u64, call: v1::MonitorCall) -> Result<()> {
        let request = call.request.ok_or_else(|| Failure::invalid("no request for the monitor"))?;
        if request.id != id {
            return Err(Failure::invalid("a request has the id of its call"));
        }
        let own = matches!(request.op, Some(request::Op::Lend(_) | request::Op::Adopt(_) | request::Op::AdoptInit(_)));
        if own {
            return Err(Failure::new(ErrorCode::ErrorUnknownOperation, "what descriptors are held is the agent's own"));
        }
        let mut fds = Vec::new();
        for number in call.descriptors {
            fds.push(self.descriptor(number)?);
        }
        if self.monitor.is_none() {
            self.monitor = Some(keeper.connect(settings)?);
        }
        if let Some(request::Op::Create(plan)) = &request.op {
            keeper::save(settings, plan)?;
        }
        self.requests.push_back((request, fds));
        Ok(())
    }

    /// The guest's end of a stream.
    fn descriptor(&mut self, number: u32) -> Result<OwnedFd> {
        let missing = || Failure::not_found(format!("stream {number}: no descriptor"));
        let id = self.streams.keys().copied().find(|id| id.number() == number).ok_or_else(missing)?;
        let Some(Stream::Descriptor { descriptor, early, ended }) = self.streams.get(&id) else {
            return Err(missing());
        };
        let made = Pump::pipe(descriptor.input, descriptor.buffer);
        let (mut pump, fd) = made.map_err(|e| Failure::errno(format_args!("a pipe for stream {number}"), e))?;
        if descriptor.input {
            pump.input(early);
            if *ended {
                pump.end();
            }
        } else {
            // Nothing is written to what the guest writes.
            pump.end();
        }
        self.streams.insert(id, Stream::Pump(pump));
        Ok(fd)
    }

    fn talk_to_monitor(&mut self, keeper: &mut Keeper) -> std::result::Result<(), End> {
        let Some(monitor) = &self.monitor else { return Ok(()) };
        let gone = |e: WireError| format!("the guest's monitor: {e}");
        while let Some((request, fds)) = self.requests.front() {
            let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
            match wire::send(monitor, request, &fds) {
                Ok(()) => drop(self.requests.pop_front()),
                Err(WireError::NotReady) => break,
                Err(e) => return Err(gone(e)),
            }
        }
        while self.talk.waiting() < ANSWERS_MAX {
            match wire::recv::<monitor_v1::Reply>(monitor) {
                Ok((reply, _)) => {
                    keeper.look_at(&reply);
                    let answer = v1::Answer { id: reply.id, answer: Some(Body::Monitor(reply)) };
                    self.talk.say(&answer).map_err(|e| e.to_string())?;
                }
                Err(WireError::NotReady) => break,
                Err(e) => return Err(gone(e)),
            }
        }
        Ok(())
    }
}

fn hello(settings: &Settings) -> Result<v1::HelloAnswer> {
    let file = "/proc/sys/kernel/random/boot_id";
    let boot_id = std::fs::read_to_string(file).map_err(|e| Failure::io(file, &e))?;
    let time = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |t| i64::try_from(t.as_nanos()).unwrap_or(i64::MAX));
    Ok(v1::HelloAnswer {
        boot_id: boot_id.trim().to_owned(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        run_dir: settings.run_dir.display().to_string(),
        data_dir: settings.data_dir.display().to_string(),
        time,
    })
}

/// The innermost reason.
fn source(error: &dyn std::error::Error) -> String {
    std::iter::successors(error.source(), |e| e.source()).last().map(ToString::to_string).unwrap_or_default()
}
