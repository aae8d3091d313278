//! `registry explain IMAGE`: what a pull of it would ask, in which order, with which TLS and whose credentials. `registry import`:
//! mirrors out of a containers' registries.conf.
//!
//! Reads the configuration as the daemon does; needs no daemon, asks nobody and runs no credential helper. Exit codes: 0 done,
//! 1 a pull would fail of the configuration, or not all of a file can be said here: nothing is written then, but with `--partial`.

// Printing is what a command line is for.
#![allow(clippy::print_stderr)]

use anyhow::{Context as _, Result, anyhow, bail};
use camino::Utf8PathBuf;
use clap::{Arg, ArgAction, ArgMatches};

use super::keychain;
use crate::cli::output::say;
use crate::cli::{Command, Context};
use crate::core::error::Error;
use crate::core::reference::Reference;
use crate::integrations::registry::conf::convert;
use crate::integrations::registry::explain::{Asked, Explanation, explain};
use crate::integrations::registry::proxy::Proxies;
use crate::utils::atomic::{self, Durability};

/// The command.
pub struct RegistryCommand;

#[async_trait::async_trait]
impl Command for RegistryCommand {
    fn name(&self) -> &'static str {
        "registry"
    }
    fn about(&self) -> &'static str {
        "Explain how an image's registry is asked; take mirrors from a registries.conf"
    }
    fn subcommands(&self) -> Vec<clap::Command> {
        vec![
            clap::Command::new("explain")
                .about("Hosts that a pull would ask, with TLS and the source of credentials; asks nobody")
                .arg(Arg::new("IMAGE").required(true).help("As in a pod: busybox, quay.io/team/app:1, ...@sha256:..."))
                .arg(Arg::new("json").long("json").action(ArgAction::SetTrue).help("JSON instead of text")),
            clap::Command::new("import")
                .about("Write hosts.toml files as a containers' registries.conf (version 2) says")
                .arg(Arg::new("FILE").required(true).help("/etc/containers/registries.conf, for instance"))
                .arg(
                    Arg::new("to")
                        .long("to")
                        .value_name("DIR")
                        .help("Where to (default: the first of images.config_path)"),
                )
                .arg(flag("force", "Replace files that are there"))
                .arg(flag("partial", "Write what can be said, though not all can"))
                .arg(flag("dry-run", "Write nothing, print the files")),
        ]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        let matches = match matches.subcommand() {
            Some(("explain", matches)) => matches,
            Some(("import", matches)) => return import(context, matches),
            _ => bail!("registry: no verb"),
        };
        let images = &context.config.images;
        let image = matches.get_one::<String>("IMAGE").map(String::as_str).unwrap_or_default();
        let told = |e: Error| anyhow!(e.chain());
        let reference = Reference::parse(image, &images.default_registry).map_err(told)?;
        let proxies = Proxies::parse(&images.proxies).map_err(told)?;
        let told =
            explain(&reference, &images.config_path, &keychain(&context.config), &proxies).await.map_err(told)?;
        match matches.get_flag("json") {
            true => say!("{}", serde_json::to_string_pretty(&told)?)?,
            false => print(&told)?,
        }
        Ok(0)
    }
}

fn flag(name: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).action(ArgAction::SetTrue).help(help)
}

fn import(context: &Context, matches: &ArgMatches) -> Result<u8> {
    let text = |name: &str| matches.get_one::<String>(name).cloned();
    let file = text("FILE").unwrap_or_default();
    let content = std::fs::read_to_string(&file).with_context(|| file.clone())?;
    let done = convert(&content).map_err(|e| anyhow!("{file}: {}", e.chain()))?;
    for note in &done.notes {
        say!("note: {note}")?;
    }
    for left in &done.left_out {
        eprintln!("proxmox-lxcri: left out: {left}");
    }
    let whole = done.left_out.is_empty();
    if !whole && !matches.get_flag("partial") && !matches.get_flag("dry-run") {
        bail!("{file}: not all of it can be said in hosts.toml files; nothing was written (--partial writes the rest)");
    }
    let first = || context.config.images.config_path.first().cloned();
    let to =
        text("to").map(Utf8PathBuf::from).or_else(first).context("images.config_path names no folder: give --to")?;
    for (registry, hosts) in &done.files {
        let path = to.join(registry).join("hosts.toml");
        if matches.get_flag("dry-run") {
            say!("# {path}\n{hosts}")?;
            continue;
        }
        if !matches.get_flag("force") && path.symlink_metadata().is_ok() {
            bail!("{path} is there already (--force replaces it)");
        }
        std::fs::create_dir_all(to.join(registry)).with_context(|| path.to_string())?;
        atomic::write(path.as_std_path(), hosts.as_bytes(), 0o644, Durability::Machine)
            .with_context(|| path.to_string())?;
        say!("{path}")?;
    }
    Ok(u8::from(!whole && !matches.get_flag("partial")))
}

fn print(told: &Explanation) -> Result<()> {
    say!("image:        {}", told.image)?;
    say!("hosts.toml:   {}", told.hosts_file.as_ref().map_or("none for this registry", |p| p.as_str()))?;
    for (n, host) in told.hosts.iter().enumerate() {
        say!("{}. {}", n + 1, host.url)?;
        say!("   asked for:   {}", asked_for(host))?;
        say!("   reached:     {}", host.reached)?;
        say!("   TLS:         {}", host.tls)?;
        if !host.headers.is_empty() {
            say!("   headers:     {}", host.headers.join(", "))?;
        }
        let first = if host.upstream { "the pull's own (a pod's pull secrets), then " } else { "" };
        say!("   credentials: {first}{}", host.credentials)?;
    }
    Ok(())
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
