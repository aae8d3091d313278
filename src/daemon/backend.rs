//! `backend lxc ...`: liblxc containers made by hand, without pod and daemon: create, start, stop, delete, list, info, exec.
//!
//! Registered beside `serve`, since it needs the backend's library. Answers are tables, or JSON with `--json`. Exit codes: 0 done,
//! 1 failed, `exec`: the command's own.

// Printing is what a command line is for.
#![allow(clippy::print_stderr)]

use std::os::unix::process::CommandExt;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use camino::Utf8PathBuf;
use clap::{Arg, ArgAction, ArgMatches, value_parser};

use crate::backends::lxc::by_hand::{ByHand, Info, New, Source};
use crate::cli::interrupts::unless_interrupted;
use crate::cli::output::say;
use crate::cli::{Command, Context};
use crate::core::error::Error;

/// The command.
pub struct BackendCommand;

fn name() -> Arg {
    Arg::new("NAME").required(true).help("Name of the container")
}

fn option(name: &'static str, value: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).value_name(value).help(help)
}

fn switch(name: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).action(ArgAction::SetTrue).help(help)
}

fn rest(name: &'static str, help: &'static str) -> Arg {
    Arg::new(name).num_args(1..).trailing_var_arg(true).allow_hyphen_values(true).help(help)
}

fn verbs() -> Vec<clap::Command> {
    let verb = |name: &'static str, about: &'static str| clap::Command::new(name).about(about);
    let path = || value_parser!(Utf8PathBuf);
    let set = option("set", "KEY=VALUE", "A line of its configuration").action(ArgAction::Append);
    vec![
        verb("create", "Make a container of a template or of a root file system").args([
            name(),
            option("template", "NAME", "Template of liblxc's; its arguments follow after --").conflicts_with("root"),
            option("root", "DIR", "Folder with a root file system, which stays where it is").value_parser(path()),
            option("file", "FILE", "Configuration to begin with (default: /etc/lxc/default.conf)").value_parser(path()),
            set,
            rest("ARGUMENTS", "The template's"),
        ]),
        verb("start", "Start it").arg(name()),
        verb("stop", "Ask its init to end, and kill it then").args([
            name(),
            option("timeout", "SECONDS", "Time that it has").value_parser(value_parser!(u64)).default_value("60"),
        ]),
        verb("delete", "Remove it, with what a template has made for it")
            .visible_alias("rm")
            .args([name(), switch("force", "Also if it runs")]),
        verb("list", "List them, and those of pods").visible_alias("ls").arg(switch("json", "JSON instead of a table")),
        verb("info", "One of them, as JSON").arg(name()),
        verb("exec", "Run a command in it").args([
            name(),
            option("env", "KEY=VALUE", "A variable of its environment").action(ArgAction::Append),
            rest("CMD", "Command and arguments").required(true),
        ]),
    ]
}

#[async_trait::async_trait]
impl Command for BackendCommand {
    fn name(&self) -> &'static str {
        "backend"
    }
    fn about(&self) -> &'static str {
        "Containers made by hand, without pod and daemon"
    }
    fn subcommands(&self) -> Vec<clap::Command> {
        let lxc = clap::Command::new("lxc").about("liblxc's").subcommand_required(true).arg_required_else_help(true);
        vec![lxc.subcommands(verbs())]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        let verb = matches.subcommand_matches("lxc").and_then(ArgMatches::subcommand);
        let (verb, matches) = verb.ok_or_else(|| anyhow!("no command"))?;
        let server = &context.config.server;
        let config = super::lxc_config(&context.config, Utf8PathBuf::new());
        let containers = ByHand::new(config, &server.root, &server.state);
        // Helpers are in groups of their own, which a terminal's keys don't reach: they end with us.
        unless_interrupted(run(&containers, verb, matches)).await
    }
}

fn plain(e: Error) -> anyhow::Error {
    anyhow!(e.chain())
}

fn texts(matches: &ArgMatches, name: &str) -> Vec<String> {
    matches.get_many::<String>(name).map(|v| v.cloned().collect()).unwrap_or_default()
}

async fn run(containers: &ByHand, verb: &str, matches: &ArgMatches) -> Result<u8> {
    let name = match matches.try_get_one::<String>("NAME") {
        Ok(Some(name)) => name.as_str(),
        _ => "",
    };
    match verb {
        "create" => containers.create(&new(name, matches)?).await.map_err(plain)?,
        "start" => containers.start(name).await.map_err(plain)?,
        "stop" => {
            let seconds = matches.get_one::<u64>("timeout").copied().unwrap_or(60);
            containers.stop(name, Duration::from_secs(seconds)).await.map_err(plain)?;
        }
        "delete" => containers.delete(name, matches.get_flag("force")).await.map_err(plain)?,
        "list" => show(&containers.list().await.map_err(plain)?, matches.get_flag("json"))?,
        "info" => say!("{}", serde_json::to_string_pretty(&containers.info(name).await.map_err(plain)?)?)?,
        "exec" => {
            let mut env = texts(matches, "env");
            if !env.iter().any(|line| line.starts_with("TERM=")) {
                env.extend(std::env::var("TERM").ok().map(|term| format!("TERM={term}")));
            }
            let (program, arguments) = containers.exec(name, &texts(matches, "CMD"), &env).await.map_err(plain)?;
            // No child to wait for: streams, terminal and signals are the command's own.
            #[allow(clippy::disallowed_methods)]
            let failed = std::process::Command::new(&program).args(arguments).env_clear().exec();
            return Err(failed).with_context(|| format!("can't run {program}"));
        }
        other => bail!("no command {other:?}"),
    }
    Ok(0)
}

fn new(name: &str, matches: &ArgMatches) -> Result<New> {
    let arguments = texts(matches, "ARGUMENTS");
    let source = match (matches.get_one::<String>("template"), matches.get_one::<Utf8PathBuf>("root")) {
        (Some(template), _) => Source::Template(template.clone(), arguments),
        (None, Some(_)) if !arguments.is_empty() => bail!("a root file system takes no arguments"),
        (None, Some(root)) => Source::Root(absolute(root)?),
        (None, None) => bail!("--template or --root is needed"),
    };
    let pair = |line: &String| {
        let (key, value) = line.split_once('=').ok_or_else(|| anyhow!("{line:?} is not of the form KEY=VALUE"))?;
        Ok((key.trim().to_owned(), value.trim().to_owned()))
    };
    let set = texts(matches, "set").iter().map(pair).collect::<Result<_>>()?;
    let config = matches.get_one::<Utf8PathBuf>("file").map(absolute).transpose()?;
    Ok(New { name: name.to_owned(), source, config, set })
}

/// From where this is called.
fn absolute(path: &Utf8PathBuf) -> Result<Utf8PathBuf> {
    let found = std::path::absolute(path).with_context(|| format!("path {path:?}"))?;
    Utf8PathBuf::from_path_buf(found).map_err(|_| anyhow!("{path:?} is below a folder whose path is not UTF-8"))
}

fn show(all: &[Info], json: bool) -> Result<()> {
    if json {
        say!("{}", serde_json::to_string_pretty(all)?)?;
        return Ok(());
    }
    say!("{:<64}  {:<9}  {:>8}  OF", "NAME", "STATE", "PID")?;
    for info in all {
        let of = if info.of_pod { "a pod" } else { "hand" };
        say!("{:<64}  {:<9}  {:>8}  {of}", info.name, info.state, info.pid)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_lines_are_taken_as_people_write_them() {
        let create = verbs().into_iter().find(|v| v.get_name() == "create").expect("the verb");
        let line = ["create", "x", "--root", "r", "--file", "f", "--set", "lxc.uts.name = y"];
        let made = new("x", &create.get_matches_from(line)).expect("fits");
        let here = std::env::current_dir().expect("a folder");
        assert_eq!(made.source, Source::Root(Utf8PathBuf::from_path_buf(here.join("r")).expect("UTF-8")));
        assert_eq!(made.config.expect("a file"), here.join("f"));
        assert_eq!(made.set, [("lxc.uts.name".to_owned(), "y".to_owned())]);
    }

    #[test]
    fn the_arguments_are_well_formed() {
        clap::Command::new("x").subcommands(BackendCommand.subcommands()).debug_assert();
    }
}
