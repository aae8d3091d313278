//! A container's life, decided without doing anything: `next(event)` says what has to be done.
//!
//! ```text
//! Opening ──> Creating ──> Created ──> Starting ──> Running ──> Draining ──> Exited ──> Removing ──> Closing ──> Gone
//!   │            │            └──────────── init ends ─────────────^                       ^
//!   └ adopted: Created or Running ... as the other monitor left it
//!                └── create fails ──────────────────────────────────────────────────────────┘
//! ```
//! The happy path: the log is opened, `create` runs, then `start`; the init ends, its output is drained, the exit is
//! recorded and told. DeleteContainer is accepted everywhere and joins one under way: a program that runs is killed,
//! then the init; `delete` follows when the output is drained, and the log is closed last. A `delete` that fails
//! leaves the container Exited, so that the next DeleteContainer tries again. An init that ends while `start` still
//! runs is handled when `start` has been answered, so that nobody hears of an end before the beginning.
//!
//! Called by the server alone, which performs the actions in their order. Nothing here fails.

/// A program of the container's plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Program {
    /// Makes the container.
    Create,
    /// Lets its init run.
    Start,
    /// Removes it.
    Delete,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The log file is open, or could not be opened.
    LogOpened(bool),
    /// `create` ended well; `exited`: so did the init already.
    Created {
        /// The init has ended.
        exited: bool,
    },
    /// `start` or `delete` ended well.
    Ended(Program),
    /// A program failed, was killed, or left no init.
    Failed(Program),
    /// StartContainer was asked for.
    StartAsked,
    /// DeleteContainer was asked for.
    DeleteAsked,
    /// The init ended.
    InitExited,
    /// Its output is in the log, or as much of it as we wait for.
    Drained,
    /// The log is closed.
    LogClosed,
}

/// What to do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Run a program of the plan.
    Run(Program),
    /// Kill the program that runs, with all that it started.
    KillProgram,
    /// SIGKILL to the init, and to its cgroup.
    KillInit,
    /// The init is dead: what shares its PID namespace with others has to be killed with it.
    KillRest,
    /// Read the output to its end.
    Drain,
    /// Write the exit record and tell everybody.
    Record,
    /// Close the log.
    CloseLog,
    /// Answer CreateContainer; with the failure if false.
    AnswerCreate(bool),
    /// Answer StartContainer.
    AnswerStart(bool),
    /// Answer all DeleteContainers.
    AnswerDelete(bool),
    /// StartContainer does not fit the state.
    RefuseStart,
    /// Remove FIFOs and sockets: before any answer says that nothing is left.
    RemoveFiles,
    /// Watch an adopted init; it may have ended.
    Watch,
    /// Forget the container.
    Forget,
}

/// Where a container is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Its log is being opened.
    Opening,
    /// `create` runs.
    Creating,
    /// Its init waits.
    Created,
    /// `start` runs.
    Starting {
        /// The init has ended already.
        exited: bool,
    },
    /// Its init runs.
    Running,
    /// Its init has ended and its output is being read.
    Draining,
    /// It has ended and that is recorded.
    Exited,
    /// `delete` runs.
    Removing {
        /// Because `create` failed.
        undo: bool,
    },
    /// Its log is being closed.
    Closing {
        /// Because `create` failed.
        undo: bool,
    },
    /// It is forgotten.
    Gone,
}

/// The state machine.
#[derive(Debug)]
pub struct Lifecycle {
    phase: Phase,
    /// DeleteContainer was asked for and not answered yet.
    delete: bool,
    /// It was another monitor's: it is not created, but found created or (true) running.
    adopted: Option<bool>,
}

impl Lifecycle {
    /// A container whose log is being opened.
    pub fn new() -> Self {
        Self { phase: Phase::Opening, delete: false, adopted: None }
    }

    /// A container of a monitor that is gone; its init was let run or waits.
    pub fn adopted(running: bool) -> Self {
        Self { adopted: Some(running), ..Self::new() }
    }

    /// Where it is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether its init is there: created, and not seen to end.
    pub fn init_lives(&self) -> bool {
        matches!(self.phase, Phase::Created | Phase::Starting { exited: false } | Phase::Running)
    }

    /// The step that `event` leads to. An event that the phase has no use for changes nothing.
    pub fn next(&mut self, event: Event) -> Vec<Action> {
        use Action::*;
        use Phase::*;
        let mut out = Vec::new();
        if event == Event::DeleteAsked {
            self.delete = true;
        }
        match (self.phase, event) {
            (Opening, Event::LogOpened(true)) if self.adopted.is_some() => {
                self.phase = if self.adopted == Some(true) { Running } else { Created };
                out.extend([AnswerCreate(true), Watch]);
                self.settle(false, &mut out);
            }
            // It is there all the same, and so are its FIFOs.
            (Opening, Event::LogOpened(false)) if self.adopted.is_some() => {
                self.phase = Gone;
                out.push(AnswerCreate(false));
                if self.delete {
                    out.push(AnswerDelete(false));
                }
                out.push(Forget);
            }
            (Opening, Event::LogOpened(true)) if self.delete => {
                self.phase = Closing { undo: true };
                out.push(CloseLog);
            }
            (Opening, Event::LogOpened(true)) => {
                self.phase = Creating;
                out.push(Run(Program::Create));
            }
            (Opening, Event::LogOpened(false)) => self.gone(true, &mut out),

            (Creating, Event::Created { exited }) => {
                self.phase = Created;
                out.push(AnswerCreate(true));
                self.settle(exited, &mut out);
            }
            (Creating, Event::Failed(Program::Create)) => {
                self.phase = Removing { undo: true };
                out.push(Run(Program::Delete));
            }
            (Creating, Event::DeleteAsked) => out.push(KillProgram),

            (Created, Event::StartAsked) if !self.delete => {
                self.phase = Starting { exited: false };
                out.push(Run(Program::Start));
            }
            (Starting { .. }, Event::InitExited) => self.phase = Starting { exited: true },
            (Starting { exited }, Event::Ended(Program::Start)) => {
                self.phase = Running;
                out.push(AnswerStart(true));
                self.settle(exited, &mut out);
            }
            (Starting { exited }, Event::Failed(Program::Start)) => {
                self.phase = Created;
                out.push(AnswerStart(false));
                self.settle(exited, &mut out);
            }
            (Starting { .. }, Event::DeleteAsked) => out.extend([KillProgram, KillInit]),

            (Created | Running, Event::InitExited) => self.settle(true, &mut out),
            (Created | Running, Event::DeleteAsked) => out.push(KillInit),

            (Draining, Event::Drained) => {
                self.phase = Exited;
                out.push(Record);
                if self.delete {
                    self.remove(&mut out);
                }
            }
            (Exited, Event::DeleteAsked) => self.remove(&mut out),

            (Removing { undo }, Event::Ended(Program::Delete)) => self.close(undo, &mut out),
            // What could not be undone is for the daemon, which learns that `create` failed.
            (Removing { undo: true }, Event::Failed(Program::Delete)) => self.close(true, &mut out),
            (Removing { undo: false }, Event::Failed(Program::Delete)) => {
                self.phase = Exited;
                self.delete = false;
                out.push(AnswerDelete(false));
            }
            (Closing { undo }, Event::LogClosed) => self.gone(undo, &mut out),

            (_, Event::StartAsked) => out.push(RefuseStart),
            _ => {}
        }
        out
    }

    /// In Created or Running: goes on to what is due.
    fn settle(&mut self, exited: bool, out: &mut Vec<Action>) {
        if exited {
            self.phase = Phase::Draining;
            out.extend([Action::KillRest, Action::Drain]);
        } else if self.delete {
            out.push(Action::KillInit);
        }
    }

    fn remove(&mut self, out: &mut Vec<Action>) {
        self.phase = Phase::Removing { undo: false };
        out.push(Action::Run(Program::Delete));
    }

    fn close(&mut self, undo: bool, out: &mut Vec<Action>) {
        self.phase = Phase::Closing { undo };
        out.push(Action::CloseLog);
    }

    fn gone(&mut self, undo: bool, out: &mut Vec<Action>) {
        self.phase = Phase::Gone;
        out.push(Action::RemoveFiles);
        if undo {
            out.push(Action::AnswerCreate(false));
        }
        if self.delete {
            out.push(Action::AnswerDelete(true));
        }
        out.push(Action::Forget);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A world that answers actions, in an order and with results that `choice` picks.
    #[derive(Default)]
    struct World {
        opening: bool,
        program: Option<Program>,
        init: bool,
        draining: bool,
        closing: bool,
        answered_create: u32,
        recorded: u32,
        forgotten: bool,
        starts_open: u32,
    }

    impl World {
        fn perform(&mut self, actions: &[Action]) {
            for action in actions {
                assert!(!self.forgotten, "{action:?} after Forget");
                match action {
                    Action::Run(p) => assert!(self.program.replace(*p).is_none(), "two programs at once"),
                    Action::Drain => self.draining = true,
                    Action::CloseLog => self.closing = true,
                    Action::AnswerCreate(_) => self.answered_create += 1,
                    Action::Record => self.recorded += 1,
                    Action::AnswerStart(_) | Action::RefuseStart => self.starts_open -= 1,
                    Action::Forget => self.forgotten = true,
                    _ => {}
                }
            }
        }

        /// Something that the world can do now.
        fn event(&mut self, choice: u8) -> Option<Event> {
            let good = choice & 0x40 == 0;
            let mut can = Vec::new();
            if self.opening {
                can.push(Event::LogOpened(good));
            }
            match self.program {
                Some(Program::Create) if good => can.push(Event::Created { exited: choice & 0x80 != 0 }),
                Some(p) if good => can.push(Event::Ended(p)),
                Some(p) => can.push(Event::Failed(p)),
                None => {}
            }
            if self.init {
                can.push(Event::InitExited);
            }
            if self.draining {
                can.push(Event::Drained);
            }
            if self.closing {
                can.push(Event::LogClosed);
            }
            let event = *can.get(usize::from(choice & 0x3f) % can.len().max(1))?;
            match event {
                Event::LogOpened(_) => self.opening = false,
                Event::Created { exited } => (self.program, self.init) = (None, !exited),
                Event::Ended(_) | Event::Failed(_) => self.program = None,
                Event::InitExited => self.init = false,
                Event::Drained => self.draining = false,
                Event::LogClosed => self.closing = false,
                Event::StartAsked | Event::DeleteAsked => {}
            }
            Some(event)
        }
    }

    proptest! {
        #[test]
        fn after_anything_delete_ends_in_gone(choices in prop::collection::vec(any::<(u8, u8)>(), 0..40)) {
            let mut life = Lifecycle::new();
            let mut world = World { opening: true, ..World::default() };
            for (kind, choice) in choices {
                if world.forgotten {
                    break;
                }
                let event = match kind % 8 {
                    0 => { world.starts_open += 1; Some(Event::StartAsked) }
                    1 => Some(Event::DeleteAsked),
                    _ => world.event(choice),
                };
                if let Some(event) = event {
                    let actions = life.next(event);
                    world.perform(&actions);
                }
            }
            // Then everything works, and a killed init ends.
            for _ in 0..12 {
                if world.forgotten {
                    break;
                }
                let actions = life.next(Event::DeleteAsked);
                world.perform(&actions);
                while let Some(event) = world.event(0) {
                    let actions = life.next(event);
                    world.perform(&actions);
                }
            }
            prop_assert!(world.forgotten, "{:?}", life);
            prop_assert_eq!(life.phase(), Phase::Gone);
            prop_assert_eq!(world.answered_create, 1);
            prop_assert_eq!(world.starts_open, 0);
            prop_assert!(world.recorded <= 1);
            prop_assert!(world.program.is_none());
        }
    }

    #[test]
    fn an_end_is_never_told_before_the_start() {
        let mut life = Lifecycle::new();
        life.next(Event::LogOpened(true));
        life.next(Event::Created { exited: false });
        life.next(Event::StartAsked);
        assert_eq!(life.next(Event::InitExited), []);
        assert_eq!(
            life.next(Event::Ended(Program::Start)),
            [Action::AnswerStart(true), Action::KillRest, Action::Drain]
        );
        assert_eq!(life.next(Event::StartAsked), [Action::RefuseStart]);
    }

    #[test]
    fn delete_interrupts_a_create_that_hangs() {
        let mut life = Lifecycle::new();
        life.next(Event::LogOpened(true));
        assert_eq!(life.next(Event::DeleteAsked), [Action::KillProgram]);
        assert_eq!(life.next(Event::Failed(Program::Create)), [Action::Run(Program::Delete)]);
        assert_eq!(life.next(Event::Ended(Program::Delete)), [Action::CloseLog]);
        assert_eq!(
            life.next(Event::LogClosed),
            [Action::RemoveFiles, Action::AnswerCreate(false), Action::AnswerDelete(true), Action::Forget]
        );
    }
}
