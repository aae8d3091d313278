//! The life of pods and containers, as pure decisions: for each request and phase, whether it is carried out,
//! is already done, or is refused. The engine asks here before it acts; nothing here does I/O.
//!
//! ```text
//! pod:        Creating ──> Ready ──> Stopping ──> NotReady ──> Removing ──> (gone)
//!                 └──────── a failed or interrupted create ──────┴────────────^
//! container:  Creating ──> Created ──> Running ──> Exited ──> Removing ──> (gone)
//! ```
//! Happy path: RunPodSandbox leads to Ready, CreateContainer and StartContainer to Running, the process's end to
//! Exited; StopPodSandbox ends what runs and frees the network; the removals forget. Failure paths: what fails in
//! Creating is taken back and gone; what fails in Stopping or Removing stays in that phase (it names the step to
//! resume) and the next request of the same kind, or the next start of the daemon, takes it up again.

use serde::{Deserialize, Serialize};

/// Where a pod is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PodPhase {
    /// Being made; not shown to anybody.
    Creating,
    /// Its namespaces and network are there.
    Ready,
    /// Containers are being ended and the network freed; shown as NOTREADY.
    Stopping,
    /// Stopped; nothing of it runs.
    NotReady,
    /// Being forgotten; shown as NOTREADY until it is gone.
    Removing,
}

/// Where a container is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ContainerPhase {
    /// Being made; not shown to anybody.
    Creating,
    /// Its init waits to be let run.
    Created,
    /// Runs.
    Running,
    /// Ended; its exit code is known, or why it is not.
    Exited,
    /// Being forgotten.
    Removing,
}

/// What a request meets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Carry it out.
    Go,
    /// It is done already: success.
    Done,
    /// It can't be done in this phase; why.
    Refuse(String),
}

/// Requests to a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PodRequest {
    /// Make a container in it.
    CreateContainer,
    /// StopPodSandbox.
    Stop,
    /// RemovePodSandbox.
    Remove,
    /// UpdatePodSandboxResources.
    Update,
}

/// Requests to a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContainerRequest {
    /// StartContainer.
    Start,
    /// StopContainer.
    Stop,
    /// RemoveContainer.
    Remove,
    /// ExecSync, Exec, Attach, ReopenContainerLog: needs a running process.
    Reach,
    /// UpdateContainerResources: needs a cgroup.
    Update,
}

impl PodPhase {
    /// What a request meets in this phase.
    pub fn verdict(self, request: PodRequest) -> Verdict {
        use PodPhase::*;
        match (request, self) {
            (PodRequest::CreateContainer | PodRequest::Update, Ready) => Verdict::Go,
            (PodRequest::CreateContainer | PodRequest::Update, phase) => {
                Verdict::Refuse(format!("the sandbox is {}", phase.word()))
            }
            (PodRequest::Stop, NotReady | Removing) => Verdict::Done,
            (PodRequest::Stop, Creating | Ready | Stopping) => Verdict::Go,
            (PodRequest::Remove, _) => Verdict::Go,
        }
    }

    /// For messages.
    pub fn word(self) -> &'static str {
        match self {
            Self::Creating => "being created",
            Self::Ready => "ready",
            Self::Stopping => "being stopped",
            Self::NotReady => "not ready",
            Self::Removing => "being removed",
        }
    }
}

impl ContainerPhase {
    /// What a request meets in this phase.
    pub fn verdict(self, request: ContainerRequest) -> Verdict {
        use ContainerPhase::*;
        match (request, self) {
            (ContainerRequest::Start, Created) | (ContainerRequest::Update, Created | Running) => Verdict::Go,
            (ContainerRequest::Update, phase) => Verdict::Refuse(format!("the container is {}", phase.word())),
            (ContainerRequest::Start | ContainerRequest::Reach, phase) if phase != Running => {
                Verdict::Refuse(format!("the container is {}", phase.word()))
            }
            (ContainerRequest::Start, _) => Verdict::Refuse("the container is running already".into()),
            (ContainerRequest::Reach, _) => Verdict::Go,
            (ContainerRequest::Stop, Running) => Verdict::Go,
            (ContainerRequest::Stop, _) => Verdict::Done,
            (ContainerRequest::Remove, _) => Verdict::Go,
        }
    }

    /// For messages.
    pub fn word(self) -> &'static str {
        match self {
            Self::Creating => "being created",
            Self::Created => "created but not running",
            Self::Running => "running",
            Self::Exited => "exited",
            Self::Removing => "being removed",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone, Copy)]
    enum Event {
        Create,
        Start,
        Exit,
        StopContainer,
        RemoveContainer,
        StopPod,
        Crash,
    }

    /// A model of the engine: one pod, one container, every accepted request succeeds or (Crash) is cut in its middle.
    #[derive(Debug)]
    struct Model {
        pod: Option<PodPhase>,
        container: Option<ContainerPhase>,
    }

    impl Model {
        fn apply(&mut self, event: Event) {
            let Some(pod) = self.pod else { return };
            match event {
                Event::Create
                    if pod.verdict(PodRequest::CreateContainer) == Verdict::Go && self.container.is_none() =>
                {
                    self.container = Some(ContainerPhase::Created);
                }
                Event::Start if self.asks(ContainerRequest::Start) => self.container = Some(ContainerPhase::Running),
                Event::Exit if self.container == Some(ContainerPhase::Running) => {
                    self.container = Some(ContainerPhase::Exited);
                }
                Event::StopContainer if self.asks(ContainerRequest::Stop) => {
                    self.container = Some(ContainerPhase::Exited);
                }
                Event::RemoveContainer if self.asks(ContainerRequest::Remove) => self.container = None,
                Event::StopPod => self.stop(),
                Event::Crash if pod == PodPhase::Ready => self.pod = Some(PodPhase::Stopping),
                _ => {}
            }
        }
        fn asks(&self, request: ContainerRequest) -> bool {
            self.container.is_some_and(|c| c.verdict(request) == Verdict::Go)
        }
        fn stop(&mut self) {
            if let Some(pod) = self.pod
                && pod.verdict(PodRequest::Stop) == Verdict::Go
            {
                if self.container.is_some() {
                    self.container = Some(ContainerPhase::Exited);
                }
                self.pod = Some(PodPhase::NotReady);
            }
        }
        fn remove(&mut self) {
            self.stop();
            if self.pod.is_some_and(|p| p.verdict(PodRequest::Remove) == Verdict::Go) {
                (self.pod, self.container) = (None, None);
            }
        }
    }

    proptest! {
        #[test]
        fn stop_then_remove_always_ends_in_gone(events in proptest::collection::vec(0..7u8, 0..40)) {
            let mut model = Model { pod: Some(PodPhase::Ready), container: None };
            for e in events {
                model.apply([Event::Create, Event::Start, Event::Exit, Event::StopContainer, Event::RemoveContainer,
                    Event::StopPod, Event::Crash][e as usize]);
                if model.pod == Some(PodPhase::NotReady) {
                    prop_assert!(model.container != Some(ContainerPhase::Running));
                }
            }
            model.stop();
            model.remove();
            prop_assert!(model.pod.is_none() && model.container.is_none());
        }
    }

    #[test]
    fn a_container_starts_once() {
        assert_eq!(ContainerPhase::Created.verdict(ContainerRequest::Start), Verdict::Go);
        for phase in [ContainerPhase::Running, ContainerPhase::Exited, ContainerPhase::Creating] {
            assert!(matches!(phase.verdict(ContainerRequest::Start), Verdict::Refuse(_)));
        }
        assert_eq!(ContainerPhase::Running.verdict(ContainerRequest::Reach), Verdict::Go);
        assert_eq!(ContainerPhase::Exited.verdict(ContainerRequest::Stop), Verdict::Done);
    }

    #[test]
    fn limits_change_while_there_is_a_cgroup() {
        for phase in [ContainerPhase::Created, ContainerPhase::Running] {
            assert_eq!(phase.verdict(ContainerRequest::Update), Verdict::Go);
        }
        for phase in [ContainerPhase::Creating, ContainerPhase::Exited, ContainerPhase::Removing] {
            assert!(matches!(phase.verdict(ContainerRequest::Update), Verdict::Refuse(_)), "{phase:?}");
        }
        assert_eq!(PodPhase::Ready.verdict(PodRequest::Update), Verdict::Go);
        assert!(matches!(PodPhase::NotReady.verdict(PodRequest::Update), Verdict::Refuse(_)));
    }
}
