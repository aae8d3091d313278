//! `storage check`: whether what is stored is what is known.

use anyhow::{Result, bail};
use clap::{Arg, ArgAction, ArgMatches};

use super::client::{Client, called};
use super::output::say;
use super::{Command, Context, required, string};
use crate::api::local;

/// The command.
pub struct Storage;

#[async_trait::async_trait]
impl Command for Storage {
    fn name(&self) -> &'static str {
        "storage"
    }
    fn about(&self) -> &'static str {
        "Look after layers and root file systems: `storage check` compares what is stored with what is known"
    }
    fn arguments(&self) -> Vec<Arg> {
        vec![
            required("VERB", "check").value_parser(["check"]),
            Arg::new("repair").long("repair").action(ArgAction::SetTrue).help(
                "Before, remove layers that no image and no container needs, also those that `image recv` has the beginning of",
            ),
        ]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        match string(matches, "VERB").as_str() {
            "check" => check(context, matches.get_flag("repair")).await,
            verb => bail!("storage {verb}: no such verb"),
        }
    }
}

async fn check(context: &Context, repair: bool) -> Result<u8> {
    let mut client = Client::connect(&context.local_socket).await?;
    let report = called(client.local.storage_check(local::StorageCheckRequest { repair }).await)?;
    for note in &report.notes {
        say!("{note}")?;
    }
    for problem in &report.problems {
        say!("problem: {problem}")?;
    }
    match report.problems.len() {
        0 => say!("{}: clean", report.driver)?,
        n => say!("{}: problems found: {n}", report.driver)?,
    }
    Ok(u8::from(!report.problems.is_empty()))
}
