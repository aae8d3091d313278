//! `exec`: a command in a running container; its output here, its exit code as ours.

use std::io::Write;

use anyhow::Result;
use clap::{Arg, ArgMatches};

use super::client::{Client, called};
use super::stream::{self, Ended, Options};
use super::{Command, Context, required, rest, string, strings, switch};
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
            switch("stdin", Some('i'), "Pass stdin on"),
            switch("tty", Some('t'), "Give it a terminal, shown in ours"),
            Arg::new("timeout")
                .long("timeout")
                .value_name("SECONDS")
                .value_parser(clap::value_parser!(u32))
                .conflicts_with_all(["stdin", "tty"])
                .help("Kill it after so long; its output is shown at the end"),
            required("CONTAINER", "Id (or its beginning) or name"),
            rest("CMD", "The command").required(true),
        ]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        let mut client = Client::connect(&context.local_socket).await?;
        let container_id = client.container(&string(matches, "CONTAINER")).await?.id;
        let Some(timeout) = matches.get_one::<u32>("timeout").copied() else {
            let (stdin, tty) = (matches.get_flag("stdin"), matches.get_flag("tty"));
            let cmd = strings(matches, "CMD");
            let request = v1::ExecRequest { container_id, cmd, stdin, tty, stdout: true, stderr: !tty };
            let url = called(client.runtime.exec(request).await)?.url;
            let options = Options { stdin, tty, detach_keys: false };
            return match stream::connect(&url, options).await?.run().await? {
                Ended::Exit(code) => Ok(code),
                Ended::Detached => Ok(0),
            };
        };
        let request = v1::ExecSyncRequest { container_id, cmd: strings(matches, "CMD"), timeout: timeout.into() };
        let done = called(client.runtime.exec_sync(request).await)?;
        std::io::stdout().write_all(&done.stdout)?;
        std::io::stderr().write_all(&done.stderr)?;
        Ok(done.exit_code.clamp(0, 255) as u8)
    }
}
