//! A guest that is there (again), one that is lost, and one that is gone for good: what that means for all that is known of it.
//!
//! Called by the relay. A guest that was started again has none of its containers: they have ended. A crash in between is made good by
//! the next meeting.

use lxcri_guest_proto::v1::HelloAnswer;
use lxcri_monitor_proto::v1::{ContainerPhase, ContainerReport, Exit};
use proxmox_lxcri_monitor::clock;
use proxmox_lxcri_monitor::connection::Asker;
use proxmox_lxcri_monitor::failure::Failure;

use crate::link::Greeting;
use crate::requests::{Pending, Waiting};
use crate::server::Relay;
use crate::store::Phase;

/// Why an end has no code of its own.
const AGAIN: &str = "the virtual machine was started again";
const UNKNOWN: &str = "the guest does not know the container any more";

fn lost_exit(note: &str) -> Exit {
    Exit { code: 255, finished_at: clock::now_ns(), note: note.into(), ..Default::default() }
}

impl Relay {
    /// Both sides know each other: compares what is known, asks for all logs, and what has waited.
    pub fn met(&mut self, greeting: Greeting) {
        let Greeting { hello, monitor } = greeting;
        self.offset = if hello.time == 0 { 0 } else { clock::now_ns().saturating_sub(hello.time) };
        self.has_init = monitor.init_pid != 0;
        let ids: Vec<String> = self.containers.keys().cloned().collect();
        for id in ids {
            let report = monitor.containers.iter().find(|report| report.id == id);
            self.compare(&hello, &id, report);
            self.open_log(&id);
        }
        self.guest = Some(hello);
        self.settled = true;
        self.answer_hellos(std::time::Instant::now());
        self.pass_waiting();
    }

    fn compare(&mut self, hello: &HelloAnswer, id: &str, report: Option<&ContainerReport>) {
        let Some(container) = self.containers.get(id) else { return };
        let (phase, same) = (container.record.phase(), container.record.boot_id == hello.boot_id);
        let report = report.filter(|_| same);
        match (phase, report) {
            (Phase::Ended | Phase::Told, _) => {}
            // It was not told of that it was made.
            (Phase::Creating, None) => self.forget_container(id),
            (Phase::Created | Phase::Running, None) => {
                self.ended(id, lost_exit(if same { UNKNOWN } else { AGAIN }));
            }
            (_, Some(report)) => {
                self.set_phase(id, Phase::Created);
                if report.started_at != 0 || report.phase() == ContainerPhase::PhaseRunning {
                    self.started(id, report.started_at);
                }
                if report.phase() == ContainerPhase::PhaseExited {
                    let exit = self.exit_of(report.exit.clone());
                    self.ended(id, exit);
                }
            }
        }
    }

    /// The connection is gone: what was asked is not answered any more, execs have ended. Containers go on.
    pub fn lost(&mut self, why: &str) {
        self.guest = None;
        self.logs.clear();
        self.containers.values_mut().for_each(crate::container::Container::unlink);
        let groups = self.pending_groups();
        self.lose_groups(why, &groups);
        let failure = Failure::state(format!("the connection to the guest was lost: {why}"));
        for (_, pending) in std::mem::take(&mut self.pending) {
            match pending {
                Pending::Nobody | Pending::EndLog(..) => {}
                // Whether it runs is known when the guest is met again: what runs must not be called failed.
                Pending::Start(asker, id) => self.waiting.push_back(Waiting::start(asker, id)),
                Pending::Delete(id) => self.deleted(&id, Err(failure.clone())),
                Pending::Done(asker)
                | Pending::Unknown(asker)
                | Pending::Init(asker)
                | Pending::Create(asker, _)
                | Pending::Group { asker, .. }
                | Pending::Call(asker, _) => self.refuse(asker, &failure),
            }
        }
    }

    /// The machine does not run, and nobody has to wait for it: all that was in it has ended.
    pub fn machine_gone(&mut self, why: &str) {
        let ids: Vec<String> = self.containers.keys().cloned().collect();
        for id in ids {
            match self.containers.get(&id).map(|c| c.record.phase()) {
                Some(Phase::Creating) => self.forget_container(&id),
                Some(Phase::Created | Phase::Running) => self.ended(&id, lost_exit(why)),
                _ => {}
            }
            self.log_is_over(&id);
        }
        let failure = Failure::state(format!("the virtual machine does not run: {why}"));
        for waiting in std::mem::take(&mut self.waiting) {
            self.refuse(waiting.asker, &failure);
        }
        self.settled = true;
    }

    fn refuse(&mut self, asker: Asker, failure: &Failure) {
        self.reply(asker, Err(failure.clone()));
    }
}
