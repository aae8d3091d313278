//! `completion`: what a shell completes, made of the command registry, the commands of the library's user among them.
//!
//! Needs no daemon and no configuration. The package installs bash's, zsh's and fish's.

use anyhow::Result;
use clap::{Arg, ArgMatches};
use clap_complete::Shell;

use super::{Command, Context, PROGRAM, output};

pub(super) struct Completion;

#[async_trait::async_trait]
impl Command for Completion {
    fn name(&self) -> &'static str {
        "completion"
    }
    fn about(&self) -> &'static str {
        "Print what a shell completes: `source <(proxmox-lxcri completion bash)`"
    }
    fn arguments(&self) -> Vec<Arg> {
        vec![Arg::new("SHELL").required(true).value_parser(clap::value_parser!(Shell)).help("Which shell")]
    }
    fn reads_configuration(&self) -> bool {
        false
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        let Some(shell) = matches.get_one::<Shell>("SHELL") else { return Ok(2) };
        let mut script = Vec::new();
        clap_complete::generate(*shell, &mut context.registry.clap(), PROGRAM, &mut script);
        let mut script = String::from_utf8(script)?;
        if *shell == Shell::Bash {
            // clap_complete 4.6 looks for a program with a hyphen in its name by another word than the one it has set.
            script = script.replace("proxmox__subcmd__lxcri", "proxmox__lxcri");
        }
        output::print(&script)?;
        Ok(0)
    }
}
