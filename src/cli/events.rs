//! `events`: what happens to pods and containers, as it happens, a line or an object for each.
//!
//! Exit codes: 1 when the daemon ends, or said that events were lost; `--follow` goes on with the next daemon and says so.

use anyhow::Result;
use clap::{Arg, ArgMatches};
use serde::Serialize;

use super::client::{Client, PERIOD, called};
use super::{Command, Context, output, string, switch};
use crate::api::v1;
use crate::utils::time::rfc3339;

pub(super) struct Events;

/// An event for programs.
#[derive(Debug, PartialEq, Serialize)]
struct Event {
    time: String,
    /// "created", "started", "stopped", "deleted".
    event: &'static str,
    namespace: String,
    pod: String,
    pod_id: String,
    /// None: it is the pod's.
    container: Option<Of>,
}

#[derive(Debug, PartialEq, Serialize)]
struct Of {
    id: String,
    name: String,
    /// Of one that has ended.
    exit_code: Option<i32>,
    reason: Option<String>,
}

impl From<v1::ContainerEventResponse> for Event {
    fn from(told: v1::ContainerEventResponse) -> Self {
        let event = match told.container_event_type() {
            v1::ContainerEventType::ContainerCreatedEvent => "created",
            v1::ContainerEventType::ContainerStartedEvent => "started",
            v1::ContainerEventType::ContainerStoppedEvent => "stopped",
            v1::ContainerEventType::ContainerDeletedEvent => "deleted",
        };
        let pod = told.pod_sandbox_status.unwrap_or_default();
        let metadata = pod.metadata.unwrap_or_default();
        let container = (told.container_id != pod.id).then(|| {
            let status = told.containers_statuses.into_iter().find(|c| c.id == told.container_id).unwrap_or_default();
            let ended = status.finished_at != 0;
            Of {
                name: status.metadata.unwrap_or_default().name,
                exit_code: ended.then_some(status.exit_code),
                reason: (ended && !status.reason.is_empty()).then_some(status.reason),
                id: told.container_id,
            }
        });
        let time = rfc3339(told.created_at.unsigned_abs());
        Self { time, event, namespace: metadata.namespace, pod: metadata.name, pod_id: pod.id, container }
    }
}

impl Event {
    fn line(&self) -> String {
        let short = |id: &str| id.get(..13).unwrap_or(id).to_owned();
        let pod = format!("{}/{}", self.namespace, self.pod);
        let text = match &self.container {
            None => format!("{} {:<8} pod {} {pod}", self.time, self.event, short(&self.pod_id)),
            Some(c) => {
                let code = c.exit_code.map(|code| format!(" code {code}")).unwrap_or_default();
                let reason = c.reason.as_ref().map(|r| format!(" ({r})")).unwrap_or_default();
                format!("{} {:<8} container {} {} of {pod}{code}{reason}", self.time, self.event, short(&c.id), c.name)
            }
        };
        // Names of others' objects must not steer the terminal.
        format!("{}\n", text.replace(char::is_control, " "))
    }
}

#[async_trait::async_trait]
impl Command for Events {
    fn name(&self) -> &'static str {
        "events"
    }
    fn about(&self) -> &'static str {
        "Tell what happens to pods and containers, a kubelet's too, as it happens"
    }
    fn arguments(&self) -> Vec<Arg> {
        vec![
            switch(
                "follow",
                Some('f'),
                "Go on with the next daemon when this one ends; what happens in between is not told",
            ),
            Arg::new("pod")
                .long("pod")
                .value_name("POD")
                .help("Of this pod alone: its name, or the beginning of its id"),
            output::argument("table"),
        ]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        let mut first = true;
        loop {
            let ended = match Client::connect(&context.local_socket).await {
                Ok(client) => {
                    if !std::mem::replace(&mut first, false) {
                        eprintln!("proxmox-lxcri: the daemon is there again; what happened meanwhile is not told");
                    }
                    listen(client, matches).await
                }
                // One that was never there is no restart.
                Err(e) if first => return Err(e),
                Err(_) => {
                    tokio::time::sleep(PERIOD).await;
                    continue;
                }
            };
            match ended {
                Ok(()) => return Ok(0),
                Err(Ended::Stream(e)) if matches.get_flag("follow") => eprintln!("proxmox-lxcri: {e:#}"),
                Err(Ended::Stream(e) | Ended::Ours(e)) => return Err(e),
            }
        }
    }
}

/// Why it ended.
enum Ended {
    /// The daemon said so, or went.
    Stream(anyhow::Error),
    /// Printing failed.
    Ours(anyhow::Error),
}

async fn listen(mut client: Client, matches: &ArgMatches) -> Result<(), Ended> {
    let wanted = string(matches, "pod");
    let mut stream =
        called(client.runtime.get_container_events(v1::GetEventsRequest {}).await).map_err(Ended::Stream)?;
    loop {
        let event = match stream.message().await {
            Ok(Some(event)) => Event::from(event),
            Ok(None) => return Err(Ended::Stream(anyhow::anyhow!("the daemon has ended"))),
            Err(status) => return Err(Ended::Stream(anyhow::anyhow!("{}", status.message()))),
        };
        if !wanted.is_empty() && event.pod != wanted && !event.pod_id.starts_with(&wanted) {
            continue;
        }
        let text = match matches.get_one::<String>("output").map(String::as_str) {
            Some("json") => serde_json::to_string(&event).map(|t| t + "\n").map_err(anyhow::Error::from),
            Some("yaml") => {
                serde_saphyr::to_string(&event).map(|t| format!("---\n{}\n", t.trim_end())).map_err(Into::into)
            }
            _ => Ok(event.line()),
        };
        if !text.and_then(|t| output::print_more(&t)).map_err(Ended::Ours)? {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_and_containers_are_told_apart() {
        let pod = v1::PodSandboxStatus {
            id: "0123456789abcdef".into(),
            metadata: Some(v1::PodSandboxMetadata {
                name: "p\x1b".into(),
                namespace: "n".into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let told = |id: &str, kind: v1::ContainerEventType| v1::ContainerEventResponse {
            container_id: id.into(),
            container_event_type: kind.into(),
            created_at: 1_700_000_000_000_000_000,
            pod_sandbox_status: Some(pod.clone()),
            containers_statuses: vec![v1::ContainerStatus {
                id: "c".into(),
                metadata: Some(v1::ContainerMetadata { name: "web".into(), attempt: 0 }),
                finished_at: 5,
                exit_code: 3,
                reason: "Error".into(),
                ..Default::default()
            }],
        };
        let line = |id: &str, kind| Event::from(told(id, kind)).line();
        assert_eq!(
            line("0123456789abcdef", v1::ContainerEventType::ContainerCreatedEvent),
            "2023-11-14T22:13:20.000000000Z created  pod 0123456789abc n/p \n"
        );
        assert_eq!(
            line("c", v1::ContainerEventType::ContainerStoppedEvent),
            "2023-11-14T22:13:20.000000000Z stopped  container c web of n/p  code 3 (Error)\n"
        );
    }
}
