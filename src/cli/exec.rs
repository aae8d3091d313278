//! `exec`: a command in a running container; its output here, its exit code as ours.

use std::io::Write;

use anyhow::Result;
use clap::{Arg, ArgMatches};

use super::client::{Client, called};
use super::{Command, Context, required, rest, string, strings};
use crate::api::v1;

pub(super) struct Exec;

#[async_trait::async_trait]
impl Command for Exec {
    fn name(&self) -> &'static str {
        "exec"
    }
    fn about(&self) -> &'static str {
        "Run a command in a running container"
    }
    fn arguments(&self) -> Vec<Arg> {
        vec![
            Arg::new("timeout")
                .long("timeout")
                .value_name("SECONDS")
                .value_parser(clap::value_parser!(u32))
                .help("Kill it after so long"),
            required("CONTAINER", "Id (or its beginning) or name"),
            rest("CMD", "The command").required(true),
        ]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        let mut client = Client::connect(&context.local_socket).await?;
        let container_id = client.container(&string(matches, "CONTAINER")).await?.id;
        let timeout = matches.get_one::<u32>("timeout").copied().unwrap_or(0);
        let request = v1::ExecSyncRequest { container_id, cmd: strings(matches, "CMD"), timeout: timeout.into() };
        let done = called(client.runtime.exec_sync(request).await)?;
        std::io::stdout().write_all(&done.stdout)?;
        std::io::stderr().write_all(&done.stderr)?;
        Ok(done.exit_code.clamp(0, 255) as u8)
    }
}
