//! The daemon's requests (monitor.proto): what the relay answers itself, and what is the guest's to answer.
//!
//! Called by the relay for every packet. A request that fails here is answered here; one that the guest can't be asked now waits for it
//! for a while.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use lxcri_guest_proto::v1::{Call, call};
use lxcri_monitor_proto::v1::request::Op;
use lxcri_monitor_proto::v1::{self, ContainerPhase, ErrorCode, Request, reply::Body};
use lxcri_monitor_proto::wire;
use prost::Message;
use proxmox_lxcri_monitor::connection::Asker;
use proxmox_lxcri_monitor::failure::{Failure, Result};

use crate::group::Key;
use crate::link::short;
use crate::server::Relay;
use crate::store::Phase;
use crate::target::Target;

/// A request waits for the guest as long as this; the daemon waits for its answer longer. For a signal's it does not.
const PATIENCE: Duration = Duration::from_secs(25);
const SIGNAL: Duration = Duration::from_secs(8);
/// A first Hello does, of a relay that has not heard of the guest yet: it is to tell what runs.
const HELLO: Duration = Duration::from_secs(8);
/// Containers have this long to go at a Shutdown.
pub const SHUTDOWN: Duration = Duration::from_secs(20);
/// Most requests that wait.
const WAITING_MAX: usize = 256;
/// Most calls that are not answered.
const PENDING_MAX: usize = 1024;

/// A request that waits for the guest.
pub struct Waiting {
    /// Whose it is.
    pub asker: Asker,
    /// Until then.
    pub until: Instant,
    op: Op,
    fds: Vec<OwnedFd>,
    /// It was asked once, and the connection lost before it was answered.
    again: bool,
}

impl Waiting {
    /// StartContainer, of which is not known whether it was done.
    pub fn start(asker: Asker, id: String) -> Self {
        let (op, until) = (Op::Start(v1::StartContainer { id }), Instant::now() + PATIENCE);
        Self { asker, until, op, fds: Vec::new(), again: true }
    }
}

/// What `guest.json` says now.
pub enum Whereabouts {
    /// It is not there.
    Unknown,
    /// Where the guest is.
    Known,
    /// Its machine does not run, and why.
    Gone(String),
}

/// Who waits for an answer of the guest's, and for what.
pub enum Pending {
    /// The daemon is done with it, or never asked.
    Nobody,
    /// EndLog, of this container's stream of that number.
    EndLog(String, u32),
    /// Done.
    Done(Asker),
    /// InitStarted.
    Init(Asker),
    /// Created.
    Create(Asker, String),
    /// Started.
    Start(Asker, String),
    /// Done; those who wait are with the container.
    Delete(String),
    /// Done, of a container that the relay does not know.
    Unknown(Asker),
    /// ExecStarted, or Done.
    Group {
        /// Whose it is.
        asker: Asker,
        /// The exec or client.
        key: Key,
    },
    /// Anything; the call's own id.
    Call(Asker, u64),
}

impl Relay {
    /// Takes one request; descriptors that it has no use for are closed.
    pub fn request(&mut self, client: u64, request: Request, fds: Vec<OwnedFd>) {
        let asker = Asker { connection: client, request: request.id };
        match self.dispatch(asker, request, fds) {
            Ok(Some(body)) => self.reply(asker, Ok(body)),
            // It will be answered.
            Ok(None) => {}
            Err(failure) => self.reply(asker, Err(failure)),
        }
    }

    fn dispatch(&mut self, asker: Asker, request: Request, fds: Vec<OwnedFd>) -> Result<Option<Body>> {
        let done = Ok(Some(Body::Done(v1::Done {})));
        if request.id == 0 {
            return Err(Failure::invalid("a request needs an id"));
        }
        let unknown =
            || Failure::new(ErrorCode::ErrorUnknownOperation, "the monitor of a guest does not know the operation");
        let op = request.op.ok_or_else(unknown)?;
        if !matches!(op, Op::Hello(_)) && !self.greeted(asker.connection) {
            return Err(Failure::state("the first request is Hello"));
        }
        match op {
            Op::Hello(hello) => return self.hello(asker, &hello),
            Op::SetPodInfo(r) => {
                self.pod_info = r.pod_info;
                return done;
            }
            Op::Shutdown(r) => self.shut_down(asker, r.force)?,
            Op::ReopenLog(r) => {
                self.reopen_log(&r.container_id)?;
                return done;
            }
            // What containers hang on is held in the guest.
            Op::Lend(_) | Op::Adopt(_) | Op::AdoptInit(_) => return Err(unknown()),
            op => return self.for_guest(asker, op, fds),
        }
        Ok(None)
    }

    // ------------------------------------------------------------------------------------------ Hello

    fn hello(&mut self, asker: Asker, hello: &v1::Hello) -> Result<Option<Body>> {
        if hello.version == 0 {
            return Err(Failure::invalid("a version is 1 or more"));
        }
        // Later ones ask whether we are there.
        if !self.greeted(asker.connection) && !self.settled && matches!(self.look_at_target(), Ok(Whereabouts::Known)) {
            self.hellos.push((asker, hello.version, Instant::now() + HELLO));
            return Ok(None);
        }
        Ok(Some(self.introduce(asker, hello.version)))
    }

    fn introduce(&mut self, asker: Asker, version: u32) -> Body {
        self.greet(asker.connection);
        let report = |c: &crate::container::Container| v1::ContainerReport {
            id: c.record.id.clone(),
            phase: match c.record.phase() {
                Phase::Creating => ContainerPhase::PhaseUnspecified,
                Phase::Created => ContainerPhase::PhaseCreated,
                Phase::Running | Phase::Ended => ContainerPhase::PhaseRunning,
                Phase::Told => ContainerPhase::PhaseExited,
            }
            .into(),
            // Those of the guest mean nothing here.
            pid: 0,
            pid_start_time: 0,
            started_at: c.record.started_at,
            exit: c.record.exit.clone().filter(|_| c.record.phase() == Phase::Told),
            info: c.record.info.clone(),
        };
        Body::Hello(v1::HelloReply {
            version: version.min(lxcri_monitor_proto::VERSION),
            pid: i32::try_from(std::process::id()).unwrap_or_default(),
            pod_info: self.pod_info.clone(),
            containers: self.containers.values().map(report).collect(),
            init_pid: 0,
        })
    }

    /// Answers first requests that the guest was waited for with.
    pub fn answer_hellos(&mut self, now: Instant) {
        let (due, rest) = std::mem::take(&mut self.hellos).into_iter().partition(|h| self.settled || h.2 <= now);
        self.hellos = rest;
        let due: Vec<(Asker, u32, Instant)> = due;
        for (asker, version, _) in due {
            let hello = self.introduce(asker, version);
            self.reply(asker, Ok(hello));
        }
    }

    // ------------------------------------------------------------------------------------------ for the guest

    /// Reads where the guest is, and what an earlier relay knew of it.
    pub fn look_at_target(&mut self) -> std::result::Result<Whereabouts, String> {
        let Some(target) = Target::read(&self.run_dir)? else { return Ok(Whereabouts::Unknown) };
        if !self.target.as_ref().is_some_and(|old| old.is(&target)) {
            if self.link.drop_it("the guest is somewhere else now".into()) {
                self.lost("the guest is somewhere else now");
            }
            self.load(&target.log_dir)?;
            let gone = target.gone.clone();
            self.target = Some(target);
            if let Some(why) = gone {
                self.machine_gone(&why);
            }
        }
        Ok(match self.target.as_ref().and_then(|target| target.gone.as_deref()) {
            Some(why) => Whereabouts::Gone(short(why).to_owned()),
            None => Whereabouts::Known,
        })
    }

    fn for_guest(&mut self, asker: Asker, op: Op, fds: Vec<OwnedFd>) -> Result<Option<Body>> {
        match (self.look_at_target().map_err(Failure::state)?, &op) {
            (Whereabouts::Known, _) => {}
            (Whereabouts::Unknown, _) => return Err(Failure::state("the guest is not known yet")),
            // It has ended with its machine.
            (Whereabouts::Gone(_), Op::Signal(_) | Op::KillExec(_) | Op::CloseStdin(_)) => {
                return Ok(Some(Body::Done(v1::Done {})));
            }
            (Whereabouts::Gone(_), Op::Delete(r)) => {
                self.forget_container(&r.id);
                return Ok(Some(Body::Done(v1::Done {})));
            }
            (Whereabouts::Gone(why), _) => {
                return Err(Failure::state(format!("the virtual machine does not run: {why}")));
            }
        }
        if self.link.session().is_some() {
            return self.pass(asker, op, fds).map(|()| None);
        }
        if self.waiting.len() >= WAITING_MAX {
            return Err(Failure::state("too many requests wait for the guest"));
        }
        let patience = if matches!(op, Op::Signal(_)) { SIGNAL } else { PATIENCE };
        self.waiting.push_back(Waiting { asker, until: Instant::now() + patience, op, fds, again: false });
        Ok(None)
    }

    /// The guest is there: asks it what waits.
    pub fn pass_waiting(&mut self) {
        for Waiting { asker, op, fds, again, .. } in std::mem::take(&mut self.waiting) {
            if let (Op::Start(r), true) = (&op, again)
                && let Some(container) = self.containers.get(&r.id)
                && container.record.phase() >= Phase::Running
            {
                let started_at = container.record.started_at;
                self.reply(asker, Ok(Body::Started(v1::Started { started_at })));
                continue;
            }
            if let Err(failure) = self.pass(asker, op, fds) {
                self.reply(asker, Err(failure));
            }
        }
    }

    /// What has waited long enough is told so.
    pub fn check_waiting(&mut self, now: Instant) {
        self.answer_hellos(now);
        let (due, rest) = std::mem::take(&mut self.waiting).into_iter().partition(|w| w.until <= now);
        self.waiting = rest;
        let due: VecDeque<Waiting> = due;
        for Waiting { asker, op, .. } in due {
            // A signal that is answered too late would be taken for a monitor that hangs.
            let code = if matches!(op, Op::Signal(_)) { ErrorCode::ErrorState } else { ErrorCode::ErrorDeadline };
            let why = format!("the guest can't be reached: {}", short(self.link.why()));
            self.reply(asker, Err(Failure::new(code, why)));
        }
    }

    fn pass(&mut self, asker: Asker, op: Op, fds: Vec<OwnedFd>) -> Result<()> {
        if self.pending.len() >= PENDING_MAX || self.link.session().is_some_and(|session| !session.has_room()) {
            return Err(Failure::state("too much waits for the guest's answer"));
        }
        let ended = |relay: &Self, id: &str| relay.containers.get(id).is_some_and(|c| c.record.phase() >= Phase::Ended);
        match op {
            Op::Create(plan) => self.create(asker, plan, &fds),
            Op::Start(r) => {
                self.container(&r.id)?;
                let id = r.id.clone();
                self.ask(Op::Start(r), Pending::Start(asker, id))
            }
            Op::Signal(r) if ended(self, &r.id) => {
                self.reply(asker, Ok(Body::Done(v1::Done {})));
                Ok(())
            }
            Op::Delete(r) if self.containers.contains_key(&r.id) => self.delete(Some(asker), &r.id),
            Op::Delete(r) => self.ask(Op::Delete(r), Pending::Unknown(asker)),
            Op::Exec(r) => self.exec(asker, r, fds),
            Op::Attach(r) => self.attach(asker, r, fds),
            Op::StartInit(r) => self.ask(Op::StartInit(r), Pending::Init(asker)),
            Op::Signal(_) | Op::KillExec(_) | Op::Resize(_) | Op::CloseStdin(_) => self.ask(op, Pending::Done(asker)),
            Op::GuestCall(_) => self.guest_call(asker, &fds),
            Op::Hello(_)
            | Op::ReopenLog(_)
            | Op::SetPodInfo(_)
            | Op::Shutdown(_)
            | Op::Lend(_)
            | Op::Adopt(_)
            | Op::AdoptInit(_)
            | Op::KeepProgram(_) => Err(Failure::invalid("nothing for a guest")),
        }
    }

    /// Asks the guest's monitor.
    pub fn ask(&mut self, op: Op, pending: Pending) -> Result<()> {
        let session = self.link.session().ok_or_else(|| Failure::state("no connection to the guest"))?;
        let call = session.ask(op).map_err(Failure::invalid)?;
        self.pending.insert(call, pending);
        Ok(())
    }

    /// Asks the agent.
    pub fn call(&mut self, op: call::Call, pending: Pending) -> Result<()> {
        let session = self.link.session().ok_or_else(|| Failure::state("no connection to the guest"))?;
        let call = session.call(op).map_err(Failure::invalid)?;
        self.pending.insert(call, pending);
        Ok(())
    }

    /// GuestCall.
    fn guest_call(&mut self, asker: Asker, fds: &[OwnedFd]) -> Result<()> {
        use call::Call as Guest;
        let [memfd] = fds else { return Err(Failure::invalid("a call of the guest's comes in one descriptor")) };
        let bytes = wire::from_memfd(memfd).map_err(|e| Failure::invalid(format!("a call of the guest's: {e}")))?;
        let call =
            Call::decode(bytes.as_slice()).map_err(|_| Failure::invalid("what came is no call of the guest's"))?;
        match call.call {
            Some(
                op @ (Guest::Hello(_)
                | Guest::MakeRoot(_)
                | Guest::RemoveRoot(_)
                | Guest::DropImage(_)
                | Guest::Write(_)
                | Guest::Sync(_)
                | Guest::Remove(_)
                | Guest::Read(_)),
            ) => self.call(op, Pending::Call(asker, call.id)),
            Some(Guest::Monitor(_) | Guest::EndLog(_) | Guest::ForgetLog(_)) | None => {
                Err(Failure::invalid("not a call that is passed on"))
            }
        }
    }

    /// The exec or client that a request which is not answered is about.
    pub fn pending_groups(&self) -> Vec<Key> {
        let key = |pending: &Pending| match pending {
            Pending::Group { key, .. } => Some(key.clone()),
            _ => None,
        };
        self.pending.values().filter_map(key).collect()
    }
}
