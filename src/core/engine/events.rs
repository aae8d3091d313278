//! What happens to pods and containers, told to whoever listens (the kubelet's evented PLEG, `crictl events`).
//!
//! Pods' tasks send, `cri` subscribes. Each subscriber has a bounded queue of its own: one that falls behind gets what is
//! queued and then an error, never a stream with a hole. Nobody listening costs nothing. A crash loses the streams; their
//! callers list anew, as after any broken stream.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;

use super::pod::PodTask;
use super::{Engine, Scope};
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::ContainerId;
use crate::core::records::{ContainerRecord, PodRecord};

/// Events that may wait for one subscriber.
pub const EVENT_QUEUE: usize = 1024;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// It is there.
    Created,
    /// It runs.
    Started,
    /// It has ended.
    Stopped,
    /// It is forgotten.
    Deleted,
}

/// Something happened to a container or a pod.
#[derive(Debug, Clone)]
pub struct PodEvent {
    /// What.
    pub kind: EventKind,
    /// To which container; None: to the pod itself.
    pub container: Option<ContainerId>,
    /// Unix time in nanoseconds.
    pub at: i64,
    /// The pod as it was then.
    pub pod: Arc<PodRecord>,
    /// Its containers as they were then, oldest first.
    pub containers: Vec<Arc<ContainerRecord>>,
}

struct Subscriber {
    scope: Scope,
    queue: mpsc::Sender<Arc<PodEvent>>,
    behind: Arc<AtomicBool>,
}

/// All who listen.
#[derive(Default)]
pub(super) struct Events {
    /// As many as in `subscribers`: read without the lock.
    listening: AtomicUsize,
    subscribers: Mutex<Listeners>,
}

#[derive(Default)]
struct Listeners {
    list: Vec<Subscriber>,
    /// For good.
    closed: bool,
}

/// One subscriber's events.
pub struct EventStream {
    queue: mpsc::Receiver<Arc<PodEvent>>,
    behind: Arc<AtomicBool>,
    ended: bool,
}

impl EventStream {
    /// The next event; once an error when the stream has an end, and then None.
    pub async fn next(&mut self) -> Option<Result<Arc<PodEvent>>> {
        if self.ended {
            return None;
        }
        if let Some(event) = self.queue.recv().await {
            return Some(Ok(event));
        }
        self.ended = true;
        Some(Err(match self.behind.load(Ordering::Acquire) {
            true => Error::new(
                Kind::ResourceExhausted,
                format!("the receiver of events fell {EVENT_QUEUE} behind: later ones are lost, list anew"),
            ),
            false => Error::new(Kind::Unavailable, "the daemon stops: no more events"),
        }))
    }
}

impl Events {
    fn locked(&self) -> std::sync::MutexGuard<'_, Listeners> {
        self.subscribers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn subscribe(&self, scope: Scope) -> EventStream {
        let (queue, receiver) = mpsc::channel(EVENT_QUEUE);
        let behind = Arc::new(AtomicBool::new(false));
        let mut listeners = self.locked();
        if !listeners.closed {
            // Those who went without a word are found by the next event, or here.
            listeners.list.retain(|s| !s.queue.is_closed());
            listeners.list.push(Subscriber { scope, queue, behind: behind.clone() });
            self.listening.store(listeners.list.len(), Ordering::Release);
        }
        EventStream { queue: receiver, behind, ended: false }
    }

    /// Whether an event would be heard by anybody.
    pub(super) fn anybody(&self) -> bool {
        self.listening.load(Ordering::Acquire) > 0
    }

    /// How many listen.
    pub(super) fn listeners(&self) -> usize {
        self.listening.load(Ordering::Acquire)
    }

    pub(super) fn send(&self, event: PodEvent) {
        let event = Arc::new(event);
        let mut listeners = self.locked();
        listeners.list.retain(|s| {
            if !s.scope.sees(event.pod.owner) {
                return !s.queue.is_closed();
            }
            match s.queue.try_send(event.clone()) {
                Ok(()) => true,
                Err(mpsc::error::TrySendError::Closed(_)) => false,
                Err(mpsc::error::TrySendError::Full(_)) => {
                    s.behind.store(true, Ordering::Release);
                    tracing::warn!(queue = EVENT_QUEUE, "a receiver of events fell behind; its stream is ended");
                    false
                }
            }
        });
        self.listening.store(listeners.list.len(), Ordering::Release);
    }

    pub(super) fn close(&self) {
        let mut listeners = self.locked();
        listeners.closed = true;
        listeners.list.clear();
        self.listening.store(0, Ordering::Release);
    }
}

impl Engine {
    /// Everything that happens from now on to the pods that `scope` sees.
    pub fn events(&self, scope: Scope) -> EventStream {
        self.shared.events.subscribe(scope)
    }

    /// Ends all streams of events, those to come included: an endless stream would keep a server from stopping.
    pub fn close_events(&self) {
        self.shared.events.close();
    }
}

impl PodTask {
    /// Tells of something that is on record and in the index already.
    pub(super) fn tell(&self, kind: EventKind, container: Option<&ContainerId>) {
        let events = &self.shared.events;
        if !events.anybody() {
            return;
        }
        let index = self.shared.index();
        let Some(pod) = index.pod(&self.pod.id) else { return };
        let containers = index.containers_of(&self.pod.id);
        drop(index);
        let at = self.shared.ports.clock.now_ns();
        events.send(PodEvent { kind, container: container.cloned(), at, pod, containers });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::records::tests::pod;
    use crate::core::spec::Owner;

    fn event(owner: Owner) -> PodEvent {
        let record = PodRecord { owner, ..pod("a") };
        PodEvent { kind: EventKind::Created, container: None, at: 1, pod: Arc::new(record), containers: vec![] }
    }

    #[tokio::test]
    async fn whoever_falls_behind_is_told_and_the_others_go_on() {
        let events = Events::default();
        assert!(!events.anybody());
        events.send(event(Owner::Cri));
        let (mut slow, mut quick) = (events.subscribe(Scope::Cri), events.subscribe(Scope::Local));
        for _ in 0..EVENT_QUEUE + 5 {
            events.send(event(Owner::Cri));
            assert!(quick.next().await.is_some_and(|e| e.is_ok()));
        }
        for _ in 0..EVENT_QUEUE {
            assert!(slow.next().await.is_some_and(|e| e.is_ok()));
        }
        let end = slow.next().await.expect("an end").expect_err("with an error");
        assert_eq!(end.kind(), Kind::ResourceExhausted);
        assert!(slow.next().await.is_none());
        assert!(events.anybody());
        drop(quick);
        events.send(event(Owner::Cri));
        assert!(!events.anybody());
    }

    #[tokio::test]
    async fn local_pods_are_not_heard_on_the_cri_and_closing_ends_all() {
        let events = Events::default();
        let (mut cri, mut local) = (events.subscribe(Scope::Cri), events.subscribe(Scope::Local));
        events.send(event(Owner::Local));
        events.send(event(Owner::Cri));
        assert_eq!(cri.next().await.expect("one").expect("event").pod.owner, Owner::Cri);
        assert_eq!(local.next().await.expect("one").expect("event").pod.owner, Owner::Local);
        events.close();
        let end = cri.next().await.expect("an end").expect_err("with an error");
        assert_eq!(end.kind(), Kind::Unavailable);
        let mut late = events.subscribe(Scope::Cri);
        assert!(late.next().await.is_some_and(|e| e.is_err()));
    }
}
