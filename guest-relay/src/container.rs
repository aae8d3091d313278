//! Containers: what the relay knows of each, and the order in which its log and its end are told.
//!
//! ```text
//! Creating ──> Created ──> Running ──> Ended ──> Told ──> forgotten
//!                 └──────────────────────^   (the log's last line is written in between)
//! ```
//! The guest's monitor decides what becomes of a container; here is what the daemon may believe of that. An end is told when the log
//! is at its end, or can't be had in [`DRAIN`]; a container is forgotten when the guest has deleted it, and its log is at its end likewise.
//! Called by the relay. A crash leaves records and positions, with which the next relay goes on.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lxcri_guest_proto::StreamId;
use lxcri_guest_proto::v1::{ForgetLog, ResetCode, call::Call};
use lxcri_monitor_proto::v1::{self, ErrorCode, Exit, reply::Body, request::Op};
use proxmox_lxcri_monitor::connection::Asker;
use proxmox_lxcri_monitor::exit_record;
use proxmox_lxcri_monitor::failure::{Failure, Result};

use crate::lines;
use crate::log::Log;
use crate::requests::Pending;
use crate::server::Relay;
use crate::store::{Phase, Record, is_id};

/// The end of a log is waited for as long as this, when the container has ended.
const DRAIN: Duration = Duration::from_secs(15);
/// A guest's trouble with a log is told as often as this.
const TROUBLE: Duration = Duration::from_secs(1);

/// A container.
pub struct Container {
    /// What is written down of it.
    pub record: Record,
    /// None: what an earlier relay left can't be gone on with.
    pub log: Option<Log>,
    /// What it comes by.
    pub stream: Option<StreamId>,
    /// The guest was asked for its end.
    pub ending: bool,
    /// That came.
    pub ended: bool,
    /// When a stream that failed is asked for again.
    pub again: Option<Instant>,
    /// When the log's end is not waited for any longer.
    until: Option<Instant>,
    /// The guest has deleted it.
    pub deleted: bool,
    /// Who waits for that, and whether the guest was asked.
    deleters: Vec<Asker>,
    asked: bool,
    /// When the guest's trouble with the log was last told; that its stdin was closed was.
    trouble: Option<Instant>,
    closed: bool,
}

impl Container {
    fn new(record: Record, log: Option<Log>) -> Self {
        // Of one that has ended already, an earlier relay had no time to tell it.
        let until = (record.phase() == Phase::Ended).then(|| Instant::now() + DRAIN);
        Self {
            record,
            log,
            stream: None,
            ending: false,
            ended: false,
            again: None,
            until,
            deleters: Vec::new(),
            asked: false,
            deleted: false,
            trouble: None,
            closed: false,
        }
    }

    /// The connection is gone.
    pub fn unlink(&mut self) {
        (self.stream, self.ending, self.ended, self.asked) = (None, false, false, false);
        if let Some(log) = &mut self.log {
            log.forget_partial();
        }
    }

    /// Whether the guest's trouble is told now: not as often as a guest may say so.
    pub fn tells_trouble(&mut self) -> bool {
        let now = Instant::now();
        let tells = self.trouble.is_none_or(|at| now.duration_since(at) >= TROUBLE);
        self.trouble = if tells { Some(now) } else { self.trouble };
        tells
    }

    /// Whether it is told that its stdin was closed: once.
    pub fn tells_closed(&mut self) -> bool {
        !std::mem::replace(&mut self.closed, true)
    }

    /// Writes its record down.
    pub fn save(&self, folder: Option<&PathBuf>) {
        if let Some(folder) = folder {
            // What can't be written down now is found out again by the next relay, from the guest.
            let _ = self.record.save(folder);
        }
    }
}

impl Relay {
    /// The container of that id.
    pub fn container(&mut self, id: &str) -> Result<&mut Container> {
        self.containers.get_mut(id).ok_or_else(|| Failure::not_found(format!("container {id}: there is none")))
    }

    /// The same, if it has not ended.
    pub fn running(&mut self, id: &str) -> Result<&mut Container> {
        let container = self.container(id)?;
        match container.record.phase() {
            Phase::Created | Phase::Running => Ok(container),
            _ => Err(Failure::state(format!("container {id}: it does not run"))),
        }
    }

    /// Takes up what an earlier relay has left in its folder.
    pub fn load(&mut self, folder: &Path) -> std::result::Result<(), String> {
        if self.folder.as_deref() == Some(folder) {
            return Ok(());
        }
        if !self.containers.is_empty() {
            return Err(format!(
                "the containers' folder is {}, not {}",
                shown(self.folder.as_deref()),
                folder.display()
            ));
        }
        for mut record in Record::load_all(folder)? {
            let log = match Log::take_up(folder, &record.id, Path::new(&record.log_path), record.log_size_max) {
                Ok(log) => Some(log),
                Err(e) => {
                    let message = format!("the log of an earlier relay can't be gone on with: {e}");
                    self.log_trouble(&record.id, message);
                    record.log_over = true;
                    None
                }
            };
            let container = Container::new(record, log);
            self.containers.insert(container.record.id.clone(), container);
        }
        self.folder = Some(folder.to_owned());
        Ok(())
    }

    // ------------------------------------------------------------------------------------------ its life

    /// CreateContainer.
    pub fn create(&mut self, asker: Asker, mut plan: v1::CreateContainer, fds: &[std::os::fd::OwnedFd]) -> Result<()> {
        let id = plan.id.clone();
        if !is_id(&id) {
            return Err(Failure::invalid(format!("{id:?} is no container's id")));
        }
        if !fds.is_empty() || !plan.rootfs_mount_point.is_empty() || !plan.volume_mount_points.is_empty() {
            return Err(Failure::invalid("a guest's container has no mounts of the node's"));
        }
        if !Path::new(&plan.exit_path).is_absolute()
            || !(plan.log_path.is_empty() || Path::new(&plan.log_path).is_absolute())
        {
            return Err(Failure::invalid("the paths of log and exit record have to be absolute"));
        }
        let bundle = Path::new(&plan.pid_file).parent().filter(|folder| folder.is_absolute()).and_then(Path::to_str);
        let bundle = bundle.ok_or_else(|| Failure::invalid("the path of the pid file has to be absolute"))?.to_owned();
        if self.shutdown.is_some() {
            return Err(Failure::state("the relay is about to end"));
        }
        if self.containers.contains_key(&id) {
            return Err(Failure::new(ErrorCode::ErrorExists, format!("container {id}: it is there already")));
        }
        let unknown = || Failure::state("no connection to the guest");
        let (folder, guest) = (self.folder.clone().ok_or_else(unknown)?, self.guest.clone().ok_or_else(unknown)?);
        let record = Record {
            id: id.clone(),
            info: std::mem::take(&mut plan.info),
            log_path: std::mem::take(&mut plan.log_path),
            exit_path: std::mem::take(&mut plan.exit_path),
            boot_id: guest.boot_id,
            // The guest's own log is another matter: it is shortened as it comes here.
            log_size_max: std::mem::take(&mut plan.log_size_max),
            ..Default::default()
        };
        let log = Log::create(&folder, &id, Path::new(&record.log_path), record.log_size_max)
            .map_err(|e| Failure::io(format_args!("open the log {}", record.log_path), &e))?;
        record
            .save(&folder)
            .inspect_err(|_| drop(Record::forget(&folder, &id)))
            .map_err(|e| Failure::io(format_args!("what container {id} is, in {}", folder.display()), &e))?;
        plan.log_path = format!("{}/logs/{id}.log", guest.data_dir);
        plan.exit_path = format!("{bundle}/exit.json");
        plan.log_line_max = plan.log_line_max.min(lines::CONTENT_MAX);
        self.containers.insert(id.clone(), Container::new(record, Some(log)));
        // What an earlier one of the same id has left would be taken for this one's.
        let forgotten = self.call(Call::ForgetLog(ForgetLog { container_id: id.clone() }), Pending::Nobody);
        let asked = forgotten.and_then(|()| self.ask(Op::Create(plan), Pending::Create(asker, id.clone())));
        asked.inspect_err(|_| self.forget_container(&id))
    }

    /// The guest has made it, or not.
    pub fn created(&mut self, id: &str, good: bool) {
        if !good {
            return self.forget_container(id);
        }
        self.set_phase(id, Phase::Created);
        self.open_log(id);
    }

    /// The guest has started it; when.
    pub fn started(&mut self, id: &str, started_at: i64) -> i64 {
        let (time, now) = (self.node_time(started_at), proxmox_lxcri_monitor::clock::now_ns());
        let Some(container) = self.containers.get_mut(id) else { return now };
        let started_at = &mut container.record.started_at;
        if *started_at == 0 {
            *started_at = if time == 0 { now } else { time };
        }
        let started_at = *started_at;
        self.set_phase(id, Phase::Running);
        started_at
    }

    /// Phases only go forward.
    pub fn set_phase(&mut self, id: &str, phase: Phase) {
        if let Some(container) = self.containers.get_mut(id)
            && container.record.phase() <= phase
        {
            container.record.set_phase(phase);
            container.save(self.folder.as_ref());
        }
    }

    /// It has ended; that is told when its log is whole.
    pub fn ended(&mut self, id: &str, exit: Exit) {
        let Some(container) = self.containers.get_mut(id) else { return };
        if container.record.phase() >= Phase::Ended {
            return;
        }
        let finished_at = exit.finished_at.max(container.record.started_at);
        container.record.exit = Some(Exit { finished_at, ..exit });
        container.until = Some(Instant::now() + DRAIN);
        self.set_phase(id, Phase::Ended);
        self.open_log(id);
        self.end_log(id);
    }

    fn tell(&mut self, id: &str) {
        let Some(container) = self.containers.get_mut(id) else { return };
        let Record { exit_path, started_at, .. } = &container.record;
        let exit = container.record.exit.clone().unwrap_or_default();
        // Whoever is connected is told all the same; the record is for those who are not.
        let _ = exit_record::write(Path::new(exit_path), id, *started_at, &exit);
        self.set_phase(id, Phase::Told);
        self.broadcast(&Body::ContainerExited(v1::ContainerExited { id: id.into(), exit: Some(exit) }));
    }

    /// DeleteContainer, of one that is known.
    pub fn delete(&mut self, asker: Option<Asker>, id: &str) -> Result<()> {
        let container = self.container(id)?;
        container.deleters.extend(asker);
        if container.asked || container.deleted {
            return Ok(());
        }
        container.asked = true;
        let asked = self.ask(Op::Delete(v1::DeleteContainer { id: id.into() }), Pending::Delete(id.into()));
        if asked.is_err()
            && let Ok(container) = self.container(id)
        {
            container.asked = false;
            container.deleters.pop_if(|last| Some(*last) == asker);
        }
        asked
    }

    /// The guest has deleted it, or can't.
    pub fn deleted(&mut self, id: &str, done: Result<()>) {
        let Some(container) = self.containers.get_mut(id) else { return };
        container.asked = false;
        if let Err(failure) = done {
            for asker in std::mem::take(&mut container.deleters) {
                self.reply(asker, Err(failure.clone()));
            }
            return;
        }
        container.deleted = true;
        container.until.get_or_insert(Instant::now() + DRAIN);
        // One that was never started and is not told of has no end.
        if container.record.phase() == Phase::Creating {
            container.record.log_over = true;
        }
        self.end_log(id);
    }

    /// Nothing is known of it any more; who waits for its removal is told.
    pub fn forget_container(&mut self, id: &str) {
        let Some(container) = self.containers.remove(id) else { return };
        if let Some(stream) = container.stream {
            self.logs.remove(&stream);
            if let Some(session) = self.link.session() {
                session.mux().reset(stream, ResetCode::ResetBroken as u32);
            }
        }
        let _ = self.call(Call::ForgetLog(ForgetLog { container_id: id.into() }), Pending::Nobody);
        if let Some(folder) = &self.folder {
            let _ = Record::forget(folder, id);
        }
        for asker in container.deleters {
            self.reply(asker, Ok(Body::Done(v1::Done {})));
        }
    }

    /// Tells ends and forgets containers, where that is due.
    pub fn check_containers(&mut self, now: Instant) {
        let due = |c: &Container| c.record.log_over || c.until.is_some_and(|at| at <= now);
        let ids: Vec<String> = self.containers.iter().filter(|(_, c)| due(c)).map(|(id, _)| id.clone()).collect();
        for id in ids {
            let Some(container) = self.containers.get_mut(&id) else { continue };
            container.until = None;
            if container.record.phase() == Phase::Ended {
                self.tell(&id);
            }
            if self.containers.get(&id).is_some_and(|c| c.deleted) {
                self.forget_container(&id);
            }
        }
        let again = |c: &Container| c.again.is_some_and(|at| at <= now);
        let ids: Vec<String> = self.containers.iter().filter(|(_, c)| again(c)).map(|(id, _)| id.clone()).collect();
        ids.iter().for_each(|id| self.open_log(id));
    }

    /// When [`Self::check_containers`] or [`Self::step_logs`] has work.
    pub fn container_timers(&self) -> impl Iterator<Item = Instant> {
        let times = |c: &Container| [c.until, c.again, c.log.as_ref().and_then(Log::again)];
        self.containers.values().flat_map(times).flatten()
    }
}

fn shown(folder: Option<&Path>) -> String {
    folder.map(|f| f.display().to_string()).unwrap_or_default()
}
