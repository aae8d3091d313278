//! `attach`: a running container's streams here, until it ends.

use anyhow::Result;
use clap::{Arg, ArgMatches};

use super::client::{Client, called};
use super::stream::{self, Ended, Options};
use super::{Command, Context, required, string, switch};
use crate::api::v1;

pub(super) struct Attach;

#[async_trait::async_trait]
impl Command for Attach {
    fn name(&self) -> &'static str {
        "attach"
    }
    fn about(&self) -> &'static str {
        "Be connected with a running container's output, input (-i) and terminal (-t)"
    }
    fn arguments(&self) -> Vec<Arg> {
        vec![
            switch("stdin", Some('i'), "Pass stdin on"),
            switch("tty", Some('t'), "The container has a terminal: show it in ours (Ctrl-P Ctrl-Q detaches)"),
            required("CONTAINER", "Id (or its beginning) or name"),
        ]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        let mut client = Client::connect(&context.local_socket).await?;
        let container_id = client.container(&string(matches, "CONTAINER")).await?.id;
        let (stdin, tty) = (matches.get_flag("stdin"), matches.get_flag("tty"));
        let request = v1::AttachRequest { container_id, stdin, tty, stdout: true, stderr: !tty };
        let url = called(client.runtime.attach(request).await)?.url;
        match stream::connect(&url, Options { stdin, tty, detach_keys: tty && stdin }).await?.run().await? {
            Ended::Exit(code) => Ok(code),
            Ended::Detached => Ok(0),
        }
    }
}
