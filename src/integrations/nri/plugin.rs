//! One plugin: who it is, what it wants to hear of, and how it is asked.
//!
//! A plugin that does not answer in time, or whose connection is broken, is closed, and the request goes on without it; it fails where
//! the node's configuration requires the plugin, or the plugin itself has asked for that.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use super::connection::{CallError, Connection, UNIMPLEMENTED};
use super::wire::{Container, Event, FailurePolicy, PodSandbox, StateChangeEvent};
use crate::core::error::{Error, Kind, Result};

/// All events that there are.
pub const ALL: i32 = (1 << 14) - 1;

/// A plugin that has registered and was configured.
pub struct Plugin {
    /// "10".
    pub index: String,
    /// "logger".
    pub base: String,
    /// Calls.
    pub connection: Arc<Connection>,
    /// Bit N-1: it wants event N.
    pub events: i32,
    /// What is to become of requests that it does not answer.
    pub policy: FailurePolicy,
    /// Nothing is made without it.
    pub required: bool,
    /// How long it has for an answer.
    pub within: Duration,
    /// Events that it knows as a StateChange alone: it is from before they had calls of their own.
    pub old: AtomicI32,
}

/// The method of an event's own call.
pub fn method(event: Event) -> &'static str {
    match event {
        Event::Unknown => "",
        Event::RunPodSandbox => "RunPodSandbox",
        Event::StopPodSandbox => "StopPodSandbox",
        Event::RemovePodSandbox => "RemovePodSandbox",
        Event::CreateContainer => "CreateContainer",
        Event::PostCreateContainer => "PostCreateContainer",
        Event::StartContainer => "StartContainer",
        Event::PostStartContainer => "PostStartContainer",
        Event::UpdateContainer => "UpdateContainer",
        Event::PostUpdateContainer => "PostUpdateContainer",
        Event::StopContainer => "StopContainer",
        Event::RemoveContainer => "RemoveContainer",
        Event::UpdatePodSandbox => "UpdatePodSandbox",
        Event::PostUpdatePodSandbox => "PostUpdatePodSandbox",
        Event::ValidateContainerAdjustment => "ValidateContainerAdjustment",
    }
}

fn bit(event: Event) -> i32 {
    1 << (event as i32 - 1)
}

impl Plugin {
    /// "10-logger".
    pub fn name(&self) -> String {
        format!("{}-{}", self.index, self.base)
    }

    /// Whether it is to hear of such an event.
    pub fn wants(&self, event: Event) -> bool {
        self.events & bit(event) != 0 && !self.connection.is_closed()
    }

    /// Asks it about an event. None: it does not want to hear of it, or is closed now; an error is its no.
    pub async fn ask<A: prost::Message + Default>(
        &self,
        event: Event,
        request: &impl prost::Message,
    ) -> Result<Option<A>> {
        if !self.wants(event) {
            return Ok(None);
        }
        self.settle(event, self.connection.call(method(event), request, self.within).await)
    }

    /// Tells it of an event; a plugin from before 0.12 gets it in the old form.
    pub async fn tell(
        &self,
        event: Event,
        request: &impl prost::Message,
        pod: &PodSandbox,
        container: Option<&Container>,
    ) -> Result<()> {
        if !self.wants(event) {
            return Ok(());
        }
        let mut done = Err(CallError::Refused { code: UNIMPLEMENTED, message: String::new() });
        if self.old.load(Ordering::Relaxed) & bit(event) == 0 {
            done = self.connection.call::<super::wire::Empty>(method(event), request, self.within).await;
        }
        if matches!(done, Err(CallError::Refused { code: UNIMPLEMENTED, .. })) {
            self.old.fetch_or(bit(event), Ordering::Relaxed);
            let (pod, container) = (Some(pod.clone()), container.cloned());
            let change = StateChangeEvent { event: event.into(), pod, container };
            done = self.connection.call("StateChange", &change, self.within).await;
        }
        self.settle(event, done).map(drop)
    }

    fn settle<A>(&self, event: Event, done: Result<A, CallError>) -> Result<Option<A>> {
        // Calls that older plugins do not have, and that were never anything else.
        let newer = matches!(event, Event::ValidateContainerAdjustment | Event::UpdatePodSandbox);
        let (name, event) = (self.name(), method(event));
        let e = match done {
            Ok(answer) => return Ok(Some(answer)),
            Err(CallError::Refused { code: UNIMPLEMENTED, .. }) if newer => return Ok(None),
            Err(CallError::Refused { message, .. }) => {
                return Err(Error::precondition(format!("plugin {name:?} refuses {event}: {message}")));
            }
            Err(e) => e,
        };
        let stays = matches!(e, CallError::Late(_)) && self.policy.keep_connected || matches!(e, CallError::TooLong(_));
        if !stays {
            tracing::error!(plugin = name, event, error = %e, "a plugin has failed, and is closed");
            self.connection.close();
        }
        if self.required || self.policy.fail_request {
            return Err(Error::because(Kind::Unavailable, format!("plugin {name:?} has failed at {event}"), e));
        }
        tracing::warn!(plugin = name, event, error = %e, "going on without a plugin");
        Ok(None)
    }
}
