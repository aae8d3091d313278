//! `stop`: asks containers to end.

use anyhow::Result;
use clap::{Arg, ArgMatches};

use super::client::{Client, called};
use super::output::say;
use super::{Command, Context, Outcomes, strings};
use crate::api::v1;

pub(super) struct Stop;

#[async_trait::async_trait]
impl Command for Stop {
    fn name(&self) -> &'static str {
        "stop"
    }
    fn about(&self) -> &'static str {
        "Stop containers"
    }
    fn arguments(&self) -> Vec<Arg> {
        vec![
            Arg::new("time")
                .long("time")
                .short('t')
                .value_name("SECONDS")
                .default_value("10")
                .value_parser(clap::value_parser!(u32))
                .help("Kill after so long"),
            Arg::new("CONTAINER").required(true).num_args(1..).help("Ids (or their beginnings) or names"),
        ]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        let mut client = Client::connect(&context.local_socket).await?;
        let timeout = matches.get_one::<u32>("time").copied().unwrap_or(10).into();
        let names = strings(matches, "CONTAINER");
        let mut outcomes = Outcomes::of(&names);
        for name in &names {
            outcomes.note(name, stop(&mut client, name, timeout).await)?;
        }
        Ok(outcomes.code)
    }
}

async fn stop(client: &mut Client, name: &str, timeout: i64) -> Result<()> {
    let container_id = client.container(name).await?.id;
    called(client.runtime.stop_container(v1::StopContainerRequest { container_id, timeout }).await)?;
    say!("{name}")
}
