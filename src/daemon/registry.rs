//! `registry explain IMAGE`: what a pull of it would ask, in which order, with which TLS and whose credentials.
//!
//! Reads the configuration as the daemon does; needs no daemon, asks nobody and runs no credential helper. Exit codes: 0 told,
//! 1 a pull would fail of the configuration.

// Printing is what a command line is for.
#![allow(clippy::print_stdout)]

use anyhow::{Result, anyhow, bail};
use clap::{Arg, ArgAction, ArgMatches};

use super::keychain;
use crate::cli::{Command, Context};
use crate::core::error::Error;
use crate::core::reference::Reference;
use crate::integrations::registry::explain::{Asked, Explanation, explain};

/// The command.
pub struct RegistryCommand;

#[async_trait::async_trait]
impl Command for RegistryCommand {
    fn name(&self) -> &'static str {
        "registry"
    }
    fn about(&self) -> &'static str {
        "Explain how an image's registry is asked"
    }
    fn subcommands(&self) -> Vec<clap::Command> {
        vec![
            clap::Command::new("explain")
                .about("Hosts that a pull would ask, with TLS and the source of credentials; asks nobody")
                .arg(Arg::new("IMAGE").required(true).help("As in a pod: busybox, quay.io/team/app:1, ...@sha256:..."))
                .arg(Arg::new("json").long("json").action(ArgAction::SetTrue).help("JSON instead of text")),
        ]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        let Some(("explain", matches)) = matches.subcommand() else { bail!("registry: no verb") };
        let images = &context.config.images;
        let image = matches.get_one::<String>("IMAGE").map(String::as_str).unwrap_or_default();
        let told = |e: Error| anyhow!(e.chain());
        let reference = Reference::parse(image, &images.default_registry).map_err(told)?;
        let told = explain(&reference, &images.config_path, &keychain(&context.config)).await.map_err(told)?;
        match matches.get_flag("json") {
            true => println!("{}", serde_json::to_string_pretty(&told)?),
            false => print(&told),
        }
        Ok(0)
    }
}

fn print(told: &Explanation) {
    println!("image:        {}", told.image);
    println!("hosts.toml:   {}", told.hosts_file.as_ref().map_or("none for this registry", |p| p.as_str()));
    for (n, host) in told.hosts.iter().enumerate() {
        println!("{}. {}", n + 1, host.url);
        println!("   asked for:   {}", asked_for(host));
        println!("   TLS:         {}", host.tls);
        if !host.headers.is_empty() {
            println!("   headers:     {}", host.headers.join(", "));
        }
        let first = if host.upstream { "the pull's own (a pod's pull secrets), then " } else { "" };
        println!("   credentials: {first}{}", host.credentials);
    }
}

fn asked_for(host: &Asked) -> String {
    let mut text = match (host.resolve, host.pull) {
        (true, true) => "tags and content",
        (true, false) => "tags",
        (false, true) => "content",
        (false, false) => "nothing",
    }
    .to_owned();
    if host.fallback {
        text.push_str(", where the host before it does not speak the other protocol");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_well_formed() {
        clap::Command::new("x").subcommands(RegistryCommand.subcommands()).debug_assert();
    }
}
