//! GetContainerEvents: the engine's events on the wire, as a stream that ends with an error when it has to end.

use std::pin::Pin;

use futures::Stream;
use tonic::Status;

use crate::api::v1;
use crate::core::engine::{EventKind, EventStream, PodEvent};
use crate::cri::{Front, to_wire};

/// Answer of GetContainerEvents.
pub type Events = Pin<Box<dyn Stream<Item = Result<v1::ContainerEventResponse, Status>> + Send>>;

impl Front {
    pub(super) fn event_stream(&self) -> Events {
        let next = |mut events: EventStream| async move {
            let event = events.next().await?;
            Some((event.map(|e| to_message(&e)).map_err(Status::from), events))
        };
        Box::pin(futures::stream::unfold(self.engine.events(self.scope), next))
    }
}

fn to_message(event: &PodEvent) -> v1::ContainerEventResponse {
    let kind = match event.kind {
        EventKind::Created => v1::ContainerEventType::ContainerCreatedEvent,
        EventKind::Started => v1::ContainerEventType::ContainerStartedEvent,
        EventKind::Stopped => v1::ContainerEventType::ContainerStoppedEvent,
        EventKind::Deleted => v1::ContainerEventType::ContainerDeletedEvent,
    };
    v1::ContainerEventResponse {
        container_id: event.container.as_ref().map_or_else(|| event.pod.id.to_string(), ToString::to_string),
        container_event_type: kind.into(),
        created_at: event.at,
        pod_sandbox_status: Some(to_wire::pod_status(&event.pod)),
        containers_statuses: event.containers.iter().rev().map(|c| to_wire::container_status(c)).collect(),
    }
}
