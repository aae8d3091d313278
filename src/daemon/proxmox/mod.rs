//! `proxmox`: what the Proxmox API can do, from the command line: containers, VMs, nodes, storages, tasks, numbers, what is left over.
//!
//! Registered beside `serve`, since it needs the API's client and no daemon. Answers are tables, or JSON with `--json`.
//! Exit codes: 0 done, 1 failed (`exists`: it is not there, 3: that can't be told), `exec`: the command's own.

// Printing is what a command line is for.
#![allow(clippy::print_stderr)]

mod args;
mod ct;
mod exec;
mod guest;
mod lists;
mod orphans;
mod vm;

use anyhow::{Context as _, Result, anyhow, bail};
use clap::ArgMatches;
use serde::Serialize;

use crate::cli::output::say;
use crate::cli::{Command, Context};
use crate::integrations::proxmox_api::{ApiError, Ended, Proxmox, Running, Vmid};

/// The command.
pub struct ProxmoxCommand;

#[async_trait::async_trait]
impl Command for ProxmoxCommand {
    fn name(&self) -> &'static str {
        "proxmox"
    }
    fn aliases(&self) -> &'static [&'static str] {
        &["pve"]
    }
    fn about(&self) -> &'static str {
        "Containers, VMs, nodes, storages and tasks of Proxmox, through its API"
    }
    fn subcommands(&self) -> Vec<clap::Command> {
        args::commands()
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        let (verb, matches) = matches.subcommand().ok_or_else(|| anyhow!("no command"))?;
        match self.verb(context, verb, matches).await {
            Err(e) if matches.subcommand_name() == Some("exists") => {
                eprintln!("proxmox-lxcri: {e:#}");
                Ok(UNKNOWN)
            }
            done => done,
        }
    }
}

impl ProxmoxCommand {
    async fn verb(&self, context: &Context, verb: &str, matches: &ArgMatches) -> Result<u8> {
        let api = Proxmox::new(&context.config.proxmox).map_err(|e| anyhow!(e.chain()))?;
        let inner = matches.subcommand().map_or(matches, |(_, deeper)| deeper);
        let node = inner.get_one::<String>("node").cloned().unwrap_or_else(|| api.node());
        let call = Call { api, node, json: inner.get_flag("json") };
        match verb {
            "ct" => ct::run(&call, matches).await,
            "vm" => vm::run(&call, matches).await,
            "orphans" => orphans::run(&call, &context.config.server.root, matches).await,
            verb => lists::run(&call, &context.config, verb, matches).await,
        }
    }
}

/// Exit code of `exists` where that can't be told.
const UNKNOWN: u8 = 3;

/// What every verb needs.
struct Call {
    api: Proxmox,
    node: String,
    json: bool,
}

impl Call {
    /// Waits for a task and shows what it says on stderr.
    async fn task(&self, started: Result<Running, ApiError>) -> Result<()> {
        let ended = started?.wait_with(|line| eprintln!("{}", clean(line))).await?;
        if let Ended::Warnings(n) = ended {
            eprintln!("done, with warnings: {n}");
        }
        Ok(())
    }

    /// Prints one thing as JSON; false: as text it is the caller's.
    fn json(&self, value: impl Serialize) -> Result<bool> {
        if self.json {
            say!("{}", serde_json::to_string_pretty(&value)?)?;
        }
        Ok(self.json)
    }

    /// Prints rows as JSON, or as a table of what `columns` takes from each.
    fn table<T: Serialize>(&self, rows: &[T], heads: &[&str], columns: impl Fn(&T) -> Vec<String>) -> Result<()> {
        if self.json {
            say!("{}", serde_json::to_string_pretty(rows)?)?;
            return Ok(());
        }
        let mut table = vec![heads.iter().map(|h| (*h).to_owned()).collect::<Vec<_>>()];
        table.extend(rows.iter().map(columns));
        for line in layout(&table) {
            say!("{line}")?;
        }
        Ok(())
    }
}

/// Columns as wide as their widest cell; the last one as it is.
fn layout(table: &[Vec<String>]) -> Vec<String> {
    let count = table.iter().map(Vec::len).max().unwrap_or_default();
    let width = |i: usize| table.iter().filter_map(|r| r.get(i)).map(|c| c.chars().count()).max().unwrap_or_default();
    let widths: Vec<usize> = (0..count).map(width).collect();
    let cell = |i: usize, text: &str| format!("{:<width$}", clean(text), width = widths[i]);
    table
        .iter()
        .map(|row| {
            let cells: Vec<String> = row.iter().enumerate().map(|(i, text)| cell(i, text)).collect();
            cells.join("  ").trim_end().to_owned()
        })
        .collect()
}

/// What comes from elsewhere must not steer the terminal.
fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

fn vmid(matches: &ArgMatches, name: &str) -> Result<Vmid> {
    let text = matches.get_one::<String>(name).map(String::as_str).unwrap_or_default();
    text.parse().with_context(|| name.to_owned())
}

fn text(matches: &ArgMatches, name: &str) -> Option<String> {
    matches.get_one::<String>(name).cloned()
}

fn texts(matches: &ArgMatches, name: &str) -> Vec<String> {
    matches.get_many::<String>(name).map(|v| v.cloned().collect()).unwrap_or_default()
}

/// `KEY=VALUE` of `--set` and `update`.
fn settings(list: &[String]) -> Result<std::collections::BTreeMap<String, String>> {
    let mut found = std::collections::BTreeMap::new();
    for item in list {
        let Some((key, value)) = item.split_once('=').filter(|(key, _)| !key.is_empty()) else {
            bail!("{item:?} is not of the form KEY=VALUE");
        };
        if found.insert(key.to_owned(), value.to_owned()).is_some() {
            bail!("{key} is there twice");
        }
    }
    Ok(found)
}

fn mib(bytes: u64) -> String {
    format!("{}", bytes >> 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_and_foreign_names() {
        let row = |a: &str, b: &str| vec![a.to_owned(), b.to_owned()];
        let lines = layout(&[row("VMID", "NAME"), row("100", "a\x1b[31mb"), row("100000", "")]);
        assert_eq!(lines, ["VMID    NAME", "100     a?[31mb", "100000"]);
    }

    #[test]
    fn keys_and_values() {
        let found = settings(&["net0=name=eth0,bridge=b".into(), "a=".into()]).unwrap();
        assert_eq!((found["net0"].as_str(), found["a"].as_str()), ("name=eth0,bridge=b", ""));
        assert!(settings(&["x".into()]).is_err() && settings(&["a=1".into(), "a=2".into()]).is_err());
    }

    #[test]
    fn the_arguments_are_well_formed() {
        clap::Command::new("x").subcommands(args::commands()).debug_assert();
    }
}
