//! `rm`: removes containers, and local pods with their last one.

use anyhow::{Result, ensure};
use clap::{Arg, ArgMatches};

use super::client::{Client, called};
use super::output::say;
use super::run::remove_logs;
use super::{Command, Context, Outcomes, strings, switch};
use crate::api::v1;

pub(super) struct Rm;

#[async_trait::async_trait]
impl Command for Rm {
    fn name(&self) -> &'static str {
        "rm"
    }
    fn about(&self) -> &'static str {
        "Remove containers that have ended; a pod made by `run` goes with its last one"
    }
    fn arguments(&self) -> Vec<Arg> {
        vec![
            switch("force", Some('f'), "Also those that run"),
            Arg::new("CONTAINER").required(true).num_args(1..).help("Ids (or their beginnings) or names"),
        ]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        let mut client = Client::connect(&context.local_socket).await?;
        let names = strings(matches, "CONTAINER");
        let mut outcomes = Outcomes::of(&names);
        for name in &names {
            outcomes.note(name, remove(&mut client, name, matches.get_flag("force")).await)?;
        }
        Ok(outcomes.code)
    }
}

async fn remove(client: &mut Client, name: &str, force: bool) -> Result<()> {
    let container = client.container(name).await?;
    let runs = container.state() == v1::ContainerState::ContainerRunning;
    ensure!(!runs || force, "container {name} runs: stop it first, or use --force");
    let status = client.container_status(&container.id).await?;
    let request = v1::RemoveContainerRequest { container_id: container.id.clone() };
    called(client.runtime.remove_container(request).await)?;
    remove_empty_local_pod(client, &container.pod_sandbox_id, &status.log_path).await?;
    say!("{name}")
}

async fn remove_empty_local_pod(client: &mut Client, pod: &str, log_path: &str) -> Result<()> {
    let local = client.is_local(pod).await?;
    let empty = !client.containers().await?.iter().any(|c| c.pod_sandbox_id == pod);
    if local && empty {
        client.remove_pod(pod).await?;
        if let Some(folder) = camino::Utf8Path::new(log_path).parent() {
            remove_logs(folder.as_str())?;
        }
    }
    Ok(())
}
