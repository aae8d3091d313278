//! `config`: what may be written into the configuration, what counts and where it is from, whether it fits, and a new file out of the
//! legacy program's.
//!
//! Reads the same sources as every command and needs no daemon; works where the configuration does not fit. Exit codes: 0 done,
//! 1 it does not fit (`check`, `dump`), or somebody has to decide what nothing was written for (`migrate`).

use anyhow::{Context as _, Result, anyhow, bail};
use camino::{Utf8Path, Utf8PathBuf};
use clap::{Arg, ArgMatches};

use super::{Command, Context, output, switch};
use crate::core::config::{self, Entry, Loaded, legacy};
use crate::utils::atomic::{self, Durability};

pub(super) struct Config;

#[async_trait::async_trait]
impl Command for Config {
    fn name(&self) -> &'static str {
        "config"
    }
    fn about(&self) -> &'static str {
        "Show, check and document the configuration; make one out of the legacy program's"
    }
    fn reads_configuration(&self) -> bool {
        false
    }
    fn subcommands(&self) -> Vec<clap::Command> {
        let verb = |name: &'static str, about: &'static str| clap::Command::new(name).about(about);
        let path = |name: &'static str, help: &'static str| {
            Arg::new(name).long(name).value_name("FILE").value_parser(clap::value_parser!(Utf8PathBuf)).help(help)
        };
        vec![
            verb("default", "A file with every key, its meaning and its default"),
            verb("dump", "What counts, with where each value is from").arg(output::argument("table")),
            verb("check", "Whether all sources fit; says everything that does not"),
            verb("schema", "The JSON schema of the file"),
            verb("reference", "All keys, as docs/configuration.md has them"),
            verb("migrate", "A configuration out of the legacy program's (JSON), and what became of each of its keys")
                .args([
                    Arg::new("OLD")
                        .required(true)
                        .value_parser(clap::value_parser!(Utf8PathBuf))
                        .help("The old config.json"),
                    path("to", "Write the new file here (default: print it)"),
                    path("token-to", "Write the API token's secret here, readable by its owner alone"),
                    switch("force", None, "Replace files that are there"),
                    switch("partial", None, "Write it though somebody has to decide something"),
                ]),
        ]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        match matches.subcommand() {
            Some(("default", _)) => output::print(&config::default_text())?,
            Some(("schema", _)) => output::print(&format!("{}\n", serde_json::to_string_pretty(&config::schema())?))?,
            Some(("reference", _)) => output::print(&config::reference())?,
            Some(("dump", matches)) => dump(&load(context)?, matches)?,
            Some(("check", _)) => {
                let loaded = load(context)?;
                output::print(&format!("the configuration fits ({})\n", read(&loaded)))?;
            }
            Some(("migrate", matches)) => return migrate(matches),
            _ => bail!("config: no verb"),
        }
        Ok(0)
    }
}

fn load(context: &Context) -> Result<Loaded> {
    let loaded = context.sources.load().map_err(|e| anyhow!("{e}"))?;
    for warning in &loaded.warnings {
        eprintln!("proxmox-lxcri: warning: {warning}");
    }
    Ok(loaded)
}

/// How much of it is not the default.
fn read(loaded: &Loaded) -> String {
    let entries = config::dump(loaded);
    match entries.iter().filter(|e| e.origin != "default").count() {
        0 => "nothing is set, all is the default".into(),
        n => format!("keys that are set: {n} of {}", entries.len()),
    }
}

fn dump(loaded: &Loaded, matches: &ArgMatches) -> Result<()> {
    let entries = config::dump(loaded);
    match output::structured(matches, &entries)? {
        Some(()) => Ok(()),
        None => output::print(&Entry::file(&entries)),
    }
}

fn migrate(matches: &ArgMatches) -> Result<u8> {
    let file = |name: &str| matches.get_one::<Utf8PathBuf>(name).map(Utf8PathBuf::as_path);
    let old = file("OLD").context("no file")?;
    let text = std::fs::read_to_string(old).with_context(|| old.to_string())?;
    let made = legacy::migrate(&text).map_err(|e| anyhow!("{old}: {}", e.chain()))?;
    for note in &made.notes {
        eprintln!("{note}");
    }
    if made.undecided() && !matches.get_flag("partial") {
        eprintln!("proxmox-lxcri: somebody has to decide: nothing was written (--partial writes the rest)");
        return Ok(1);
    }
    let force = matches.get_flag("force");
    for path in [file("to"), file("token-to")].into_iter().flatten() {
        if !force && path.symlink_metadata().is_ok() {
            bail!("{path} is there already (--force replaces it)");
        }
    }
    match (file("token-to"), &made.secret) {
        (Some(path), Some(secret)) => write(path, &format!("{secret}\n"), 0o600)?,
        (None, Some(_)) => eprintln!(
            "the token's secret was not written: put it into proxmox.token_file, mode 0600 (--token-to FILE does it)"
        ),
        (Some(_), None) => eprintln!("there is no token's secret in {old}"),
        (None, None) => {}
    }
    match file("to") {
        Some(path) => write(path, &made.text, 0o644)?,
        None => output::print(&made.text)?,
    }
    Ok(u8::from(made.undecided()))
}

fn write(path: &Utf8Path, text: &str, mode: u32) -> Result<()> {
    atomic::write(path.as_std_path(), text.as_bytes(), mode, Durability::Machine).with_context(|| path.to_string())
}
