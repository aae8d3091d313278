//! `container commit`: an image of what a container has changed of its own.

use anyhow::{Context as _, Result, bail};
use clap::{Arg, ArgMatches};

use super::client::{Client, called};
use super::output::say;
use super::{Command, Context, required, rest, string, strings};
use crate::api::local;

pub(super) struct Container;

#[async_trait::async_trait]
impl Command for Container {
    fn name(&self) -> &'static str {
        "container"
    }
    fn about(&self) -> &'static str {
        "Make an image of a container: `container commit CONTAINER REFERENCE`"
    }
    fn arguments(&self) -> Vec<Arg> {
        let text = |name: &'static str, help: &'static str| Arg::new(name).long(name).value_name("TEXT").help(help);
        vec![
            text("author", "Who made it"),
            text("message", "What for"),
            Arg::new("env")
                .long("env")
                .short('e')
                .value_name("NAME=VALUE")
                .action(clap::ArgAction::Append)
                .help("Environment variable of the image"),
            required("VERB", "commit").value_parser(["commit"]),
            required("CONTAINER", "Its id (or the beginning) or name"),
            required("REFERENCE", "Name of the image, with a tag"),
            rest("CMD", "Replaces the image's command"),
        ]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        let mut client = Client::connect(&context.local_socket).await?;
        match string(matches, "VERB").as_str() {
            "commit" => {
                let cmd = strings(matches, "CMD");
                let request = local::CommitContainerRequest {
                    container: client.container(&string(matches, "CONTAINER")).await?.id,
                    reference: string(matches, "REFERENCE"),
                    author: string(matches, "author"),
                    message: string(matches, "message"),
                    env: strings(matches, "env"),
                    set_cmd: !cmd.is_empty(),
                    cmd,
                };
                let image = called(client.local.commit_container(request).await)?.image;
                let image = image.context("the daemon told no image")?;
                say!("{}  {}", image.id, image.repo_tags.join(" "))?;
                Ok(0)
            }
            verb => bail!("container {verb}: no such verb"),
        }
    }
}
