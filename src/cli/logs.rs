//! `logs`: a container's output so far, and on.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use camino::Utf8PathBuf;
use clap::{Arg, ArgMatches};

use super::client::Client;
use super::crilog::Follower;
use super::{Command, Context, required, string, switch};
use crate::api::v1;

pub(super) struct Logs;

#[async_trait::async_trait]
impl Command for Logs {
    fn name(&self) -> &'static str {
        "logs"
    }
    fn about(&self) -> &'static str {
        "Print a container's output"
    }
    fn arguments(&self) -> Vec<Arg> {
        vec![switch("follow", Some('f'), "Go on until it ends"), required("CONTAINER", "Id (or its beginning) or name")]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        let mut client = Client::connect(&context.local_socket).await?;
        let id = client.container(&string(matches, "CONTAINER")).await?.id;
        let path = client.container_status(&id).await?.log_path;
        ensure!(!path.is_empty(), "container {id} has no log: it was made without one");
        let mut log = Follower::open(&Utf8PathBuf::from(&path)).with_context(|| format!("log {path}"))?;
        loop {
            let ended = client.container_status(&id).await?.state() == v1::ContainerState::ContainerExited;
            log.print_available().with_context(|| format!("log {path}"))?;
            if ended || !matches.get_flag("follow") {
                return Ok(0);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}
