//! What the monitor's containers hang on, held a second time, so that they outlive the monitor.
//!
//! The agent's own connection to the monitor. It borrows (Lend) each container's streams and pidfd, and keeps the plans in files; when the
//! monitor dies it starts another one and gives them to that (Adopt), before any node talks to it. Called by the agent's loop. Its
//! requests are waited for, [`PATIENCE`] at most; a failure is told on the console, and the containers it is about are then known to
//! no monitor. A crash leaves the plans, and the next agent borrows anew.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use lxcri_monitor_proto::v1::{self, ContainerPhase, reply::Body, request::Op};
use lxcri_monitor_proto::wire::{self, WireError};
use prost::Message;
use proxmox_lxcri_monitor::failure::{Failure, Result};
use rustix::event::{PollFd, PollFlags, poll};

use crate::beneath::{self, Access};
use crate::monitor;
use crate::settings::Settings;

/// For an answer of the monitor.
const PATIENCE: Duration = Duration::from_secs(5);

/// A container that would outlive the monitor.
#[derive(Debug)]
struct Held {
    report: v1::ContainerReport,
    lent: v1::Lent,
    fds: Vec<OwnedFd>,
}

/// All of them.
#[derive(Debug, Default)]
pub struct Keeper {
    socket: Option<OwnedFd>,
    next: u64,
    held: BTreeMap<String, Held>,
    /// Containers have come, begun or ended.
    stale: bool,
}

fn plans(settings: &Settings) -> PathBuf {
    settings.run_dir.join("plans")
}

/// Keeps a plan, before the monitor has it.
pub fn save(settings: &Settings, plan: &v1::CreateContainer) -> Result<()> {
    let root = beneath::folder(&settings.run_dir)?;
    let access =
        Access { mode: 0o600, uid: rustix::process::geteuid().as_raw(), gid: rustix::process::getegid().as_raw() };
    beneath::write(root, &format!("plans/{}", beneath::component(&plan.id)?), &plan.encode_to_vec(), access, 0o700)
}

/// Removes a plan, when all else of its container is gone.
pub fn forget(settings: &Settings, id: &str) -> Result<()> {
    beneath::remove(&plans(settings).join(beneath::component(id)?))
}

fn load(settings: &Settings, id: &str) -> Result<v1::CreateContainer> {
    let path = plans(settings).join(beneath::component(id)?);
    let bytes = std::fs::read(&path).map_err(|e| Failure::io(path.display(), &e))?;
    v1::CreateContainer::decode(bytes.as_slice()).map_err(|_| Failure::invalid(format!("{}: no plan", path.display())))
}

impl Keeper {
    /// For the loop.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// A connection to the monitor for a node.
    pub fn connect(&mut self, settings: &Settings) -> Result<OwnedFd> {
        self.step(settings)?;
        self.begin(settings)?;
        monitor::connect(settings)
    }

    /// Sees what of the monitor's words to a node is about the containers that there are.
    pub fn look_at(&mut self, reply: &v1::Reply) {
        self.stale |=
            matches!(reply.body, Some(Body::Created(_) | Body::Started(_) | Body::ContainerExited(_) | Body::Done(_)));
    }

    /// What the monitor says to everybody.
    fn event(&mut self, event: &v1::Reply) {
        self.look_at(event);
        // A stdin has an end when nobody has its writer.
        if let Some(Body::StdinClosed(closed)) = &event.body
            && let Some(held) = self.held.get_mut(&closed.container_id)
            && std::mem::take(&mut held.lent.has_stdin)
            && !held.fds.is_empty()
        {
            held.fds.remove(0);
        }
    }

    /// Takes what the monitor says to everybody; if it is gone, has another one take over.
    pub fn step(&mut self, settings: &Settings) -> Result<()> {
        while let Some(socket) = &self.socket {
            match wire::recv::<v1::Reply>(socket) {
                Ok((reply, _)) => self.event(&reply),
                Err(WireError::NotReady) => break,
                Err(_) => {
                    self.socket = None;
                    self.take_over(settings)?;
                }
            }
        }
        Ok(())
    }

    /// Borrows what is new and gives back what is gone, if anything has changed.
    pub fn refresh(&mut self, settings: &Settings) -> Result<()> {
        if !std::mem::take(&mut self.stale) {
            return Ok(());
        }
        self.begin(settings)?;
        let containers = self.hello()?;
        self.held.retain(|id, _| containers.iter().any(|c| c.id == *id));
        for report in containers {
            let alive = matches!(report.phase(), ContainerPhase::PhaseCreated | ContainerPhase::PhaseRunning);
            if let Some(held) = self.held.get_mut(&report.id) {
                held.report = report;
                if !alive {
                    held.fds.clear();
                }
            } else if alive {
                let lend = Op::Lend(v1::Lend { container_id: report.id.clone() });
                match self.ask(lend, &[])? {
                    (Body::Lent(lent), fds) => drop(self.held.insert(report.id.clone(), Held { report, lent, fds })),
                    // It has ended meanwhile.
                    (Body::Error(_), _) => {}
                    (other, _) => return Err(unexpected(&other)),
                }
            }
        }
        Ok(())
    }

    /// Has a connection, if there is none: the first, or one that could not be had when it was needed.
    fn begin(&mut self, settings: &Settings) -> Result<()> {
        if self.socket.is_some() { Ok(()) } else { self.take_over(settings) }
    }

    fn hello(&mut self) -> Result<Vec<v1::ContainerReport>> {
        match self.ask(Op::Hello(v1::Hello { version: lxcri_monitor_proto::VERSION }), &[])? {
            (Body::Hello(hello), _) => Ok(hello.containers),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// A new monitor gets what the old one had, and this one does not know.
    fn take_over(&mut self, settings: &Settings) -> Result<()> {
        self.socket = Some(monitor::connect(settings)?);
        let known = self.hello()?;
        let held = std::mem::take(&mut self.held);
        let mut failed = Ok(());
        for (id, container) in held {
            let ended = container.report.phase() == ContainerPhase::PhaseExited;
            let is_known = known.iter().any(|c| c.id == id);
            let done = if ended || is_known { Ok(()) } else { self.adopt(settings, &id, &container) };
            match done {
                Ok(()) => drop(self.held.insert(id, container)),
                Err(e) => failed = Err(Failure { message: format!("container {id}: {}", e.message), ..e }),
            }
        }
        self.stale = true;
        failed
    }

    fn adopt(&mut self, settings: &Settings, id: &str, container: &Held) -> Result<()> {
        let adopt = Op::Adopt(v1::AdoptContainer {
            plan: Some(load(settings, id)?),
            pid: container.report.pid,
            pid_start_time: container.report.pid_start_time,
            started_at: container.report.started_at,
            running: container.report.phase() == ContainerPhase::PhaseRunning,
            streams: Some(container.lent),
        });
        let fds: Vec<BorrowedFd<'_>> = container.fds.iter().map(AsFd::as_fd).collect();
        match self.ask(adopt, &fds)? {
            (Body::Created(_), _) => Ok(()),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// The answer, with its descriptors. Without one there is no connection any more.
    fn ask(&mut self, op: Op, fds: &[BorrowedFd<'_>]) -> Result<(Body, Vec<OwnedFd>)> {
        self.next += 1;
        let id = self.next;
        let answer = self.exchange(&v1::Request { id, op: Some(op) }, fds);
        if answer.is_err() {
            self.socket = None;
        }
        answer
    }

    fn exchange(&mut self, request: &v1::Request, fds: &[BorrowedFd<'_>]) -> Result<(Body, Vec<OwnedFd>)> {
        let gone = || Failure::state("no connection to the monitor");
        let failed = |e: WireError| Failure::state(format!("the monitor: {e}"));
        wire::send(self.socket.as_ref().ok_or_else(gone)?, request, fds).map_err(failed)?;
        let end = Instant::now() + PATIENCE;
        loop {
            let socket = self.socket.as_ref().ok_or_else(gone)?;
            match wire::recv::<v1::Reply>(socket) {
                Ok((reply, fds)) if reply.id == request.id => {
                    return reply
                        .body
                        .map(|body| (body, fds))
                        .ok_or_else(|| Failure::state("the monitor says nothing"));
                }
                Ok((event, _)) => self.event(&event),
                Err(WireError::NotReady) => {
                    let left = end.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(Failure::state("the monitor does not answer"));
                    }
                    let timeout = rustix::time::Timespec {
                        tv_sec: left.as_secs() as i64,
                        tv_nsec: i64::from(left.subsec_nanos()),
                    };
                    let _ = poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&timeout));
                }
                Err(e) => return Err(failed(e)),
            }
        }
    }
}

fn unexpected(body: &Body) -> Failure {
    match body {
        Body::Error(error) => Failure::state(error.message.clone()),
        _ => Failure::state("the monitor answers something else"),
    }
}
