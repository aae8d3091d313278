//! `man`: manual pages, and the reference of all commands (`docs/cli.md`), made of the command registry.
//!
//! Needs no daemon and no configuration. The package installs the pages.

use std::fmt::Write as _;

use anyhow::{Context as _, Result};
use camino::Utf8PathBuf;
use clap::{Arg, ArgMatches};

use super::{Command, Context, output, switch};

pub(super) struct ManPages;

#[async_trait::async_trait]
impl Command for ManPages {
    fn name(&self) -> &'static str {
        "man"
    }
    fn about(&self) -> &'static str {
        "Write the manual pages, or print the reference of all commands"
    }
    fn arguments(&self) -> Vec<Arg> {
        vec![
            Arg::new("to")
                .long("to")
                .value_name("DIR")
                .value_parser(clap::value_parser!(Utf8PathBuf))
                .required_unless_present("markdown")
                .help("Folder for a page of each command (section 1)"),
            switch("markdown", None, "Print all commands, as docs/cli.md has them").conflicts_with("to"),
        ]
    }
    fn reads_configuration(&self) -> bool {
        false
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        match matches.get_one::<Utf8PathBuf>("to") {
            Some(folder) => {
                std::fs::create_dir_all(folder).with_context(|| format!("make folder {folder}"))?;
                clap_mangen::generate_to(context.registry.clap(), folder.as_std_path())
                    .with_context(|| format!("write manual pages into {folder}"))?;
            }
            None => output::print(&markdown(&context.registry.clap()))?,
        }
        Ok(0)
    }
}

const INTRODUCTION: &str = "\
# The command line

Made of the program by `proxmox-lxcri man --markdown`; `proxmox-lxcri help COMMAND` says the same, and so does `man proxmox-lxcri-COMMAND`.

";

/// All commands with their arguments.
fn markdown(program: &clap::Command) -> String {
    let mut program = program.clone().disable_help_subcommand(true);
    program.build();
    let mut out = String::from(INTRODUCTION);
    if let Some(text) = program.get_after_long_help() {
        let _ = writeln!(out, "{}\n", text.to_string().trim());
    }
    out.push_str("Options of every command:\n\n");
    for arg in program.get_arguments().filter(|a| a.is_global_set()) {
        out.push_str(&item(arg));
    }
    sections(&mut out, &program, "", "##");
    out
}

fn sections(out: &mut String, parent: &clap::Command, path: &str, heading: &str) {
    for command in parent.get_subcommands().filter(|c| !c.is_hide_set()) {
        let path = format!("{path} {}", command.get_name());
        let _ = write!(out, "\n{heading} `{}`\n\n", path.trim_start());
        if let Some(about) = command.get_about() {
            let _ = writeln!(out, "{}\n", escaped(&about.to_string()));
        }
        if command.get_subcommands().next().is_none() {
            let usage = command.clone().render_usage().to_string();
            let usage = usage.trim_start_matches("Usage:").split_whitespace().collect::<Vec<_>>().join(" ");
            let _ = writeln!(out, "    {usage}\n");
        }
        let aliases: Vec<String> = command.get_visible_aliases().map(|a| format!("`{a}`")).collect();
        if !aliases.is_empty() {
            let _ = writeln!(out, "Also {}.\n", aliases.join(", "));
        }
        let own = |a: &&clap::Arg| {
            !a.is_global_set() && !a.is_hide_set() && !["help", "version"].contains(&a.get_id().as_str())
        };
        for arg in command.get_arguments().filter(own) {
            out.push_str(&item(arg));
        }
        sections(out, command, &path, &format!("{heading}#"));
    }
}

/// An argument as an item of a list.
fn item(arg: &clap::Arg) -> String {
    let value = arg.get_value_names().unwrap_or_default().iter().map(|n| n.to_string()).collect::<Vec<_>>().join(" ");
    let value = if value.is_empty() { arg.get_id().to_string() } else { value };
    let takes = arg.get_action().takes_values();
    let mut name = String::new();
    if let Some(short) = arg.get_short() {
        let _ = write!(name, "`-{short}`, ");
    }
    match arg.get_long() {
        Some(long) if takes => drop(write!(name, "`--{long} {}`", value)),
        Some(long) => drop(write!(name, "`--{long}`")),
        None if arg.get_short().is_some() => {
            name.truncate(name.len() - 3);
            let _ = if takes { write!(name, " {value}`") } else { write!(name, "`") };
        }
        None => drop(write!(name, "`{value}`")),
    }
    let mut text = arg.get_help().map(|h| escaped(&h.to_string())).unwrap_or_default();
    let words: Vec<String> = match takes {
        true => arg
            .get_possible_values()
            .iter()
            .filter(|v| !v.is_hide_set())
            .map(|v| format!("`{}`", v.get_name()))
            .collect(),
        false => Vec::new(),
    };
    if !words.is_empty() {
        let _ = write!(text, "; one of {}", words.join(", "));
    }
    let defaults: Vec<String> = arg.get_default_values().iter().map(|v| format!("`{}`", v.to_string_lossy())).collect();
    if takes && !defaults.is_empty() {
        let _ = write!(text, "; default {}", defaults.join(" "));
    }
    if takes && matches!(arg.get_action(), clap::ArgAction::Append) && !arg.is_positional() {
        text.push_str("; more than once");
    }
    format!("- {name}: {text}\n")
}

/// Words in angle brackets would be taken for tags, outside of code.
fn escaped(text: &str) -> String {
    let mut code = false;
    text.chars().fold(String::new(), |mut out, c| {
        code ^= c == '`';
        match c {
            '<' if !code => out.push_str("\\<"),
            '\n' => out.push(' '),
            c => out.push(c),
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::PROGRAM;

    #[test]
    fn every_kind_of_argument_is_written() {
        let program = clap::Command::new(PROGRAM)
            .arg(Arg::new("config").long("config").value_name("PATH").global(true).help("A file"))
            .subcommand(clap::Command::new("do").about("Does <it>, not `<that>`").visible_alias("make").args([
                Arg::new("WHAT").required(true).help("What"),
                Arg::new("form").long("form").short('f').value_parser(["a", "b"]).default_value("a").help("How"),
                switch("all", None, "All"),
                Arg::new("x").short('x').action(clap::ArgAction::SetTrue).help("Short"),
            ]))
            .subcommand(clap::Command::new("in").subcommand(clap::Command::new("deep").about("Below")));
        let text = markdown(&program);
        let own = text.split("- `--config PATH`: A file\n").nth(1).expect("the global option, once");
        assert_eq!(
            own,
            "\n## `do`\n\nDoes \\<it>, not `<that>`\n\n    proxmox-lxcri do [OPTIONS] <WHAT>\n\nAlso `make`.\n\n\
             - `WHAT`: What\n- `-f`, `--form form`: How; one of `a`, `b`; default `a`\n- `--all`: All\n- `-x`: Short\n\
             \n## `in`\n\n\n### `in deep`\n\nBelow\n\n    proxmox-lxcri in deep [OPTIONS]\n\n"
        );
    }
}
