//! `debug dump`: what the daemon is doing now. `debug level`: what it logs. `debug bundle`: an archive for whoever is to find a fault, without secrets.
//!
//! A bundle needs no daemon: where none answers, that is said in it. Exit codes: 0 done, 1 nothing could be written, or (`dump`) no
//! daemon answers.

mod bundle;
mod redact;

use std::time::SystemTime;

use anyhow::{Context as _, Result, bail};
use camino::Utf8PathBuf;
use clap::{Arg, ArgMatches, value_parser};

use crate::api::local;
use crate::cli::client::{Client, called};
use crate::cli::{Command, Context, output};
use crate::utils::atomic::{self, Durability};
use crate::utils::time::rfc3339;

/// The command.
pub struct Debug;

#[async_trait::async_trait]
impl Command for Debug {
    fn name(&self) -> &'static str {
        "debug"
    }
    fn about(&self) -> &'static str {
        "What the daemon is doing now, and logs; an archive for whoever is to find a fault"
    }
    fn reads_configuration(&self) -> bool {
        // What does not fit may be the fault.
        false
    }
    fn subcommands(&self) -> Vec<clap::Command> {
        vec![
            clap::Command::new("dump")
                .about("Tasks, queues, pods and monitors of the daemon")
                .arg(output::argument("json")),
            clap::Command::new("level")
                .about("What the daemon logs, or is to log until it ends or reads its configuration again (SIGHUP)")
                .arg(Arg::new("LEVELS").help("As log.level: \"info,proxmox_lxcri::core::engine=debug\"")),
            clap::Command::new("bundle")
                .about("Write an archive: the above, the doctor's findings, configuration, log and node. Secrets are blotted out")
                .args([
                    Arg::new("to")
                        .long("to")
                        .value_name("FILE")
                        .value_parser(value_parser!(Utf8PathBuf))
                        .help("The archive, readable by its owner alone (default: proxmox-lxcri-debug-TIME.tar.gz, here)"),
                    Arg::new("log")
                        .long("log")
                        .value_name("FILE")
                        .value_parser(value_parser!(Utf8PathBuf))
                        .help("The daemon's log, where it is not the unit's journal"),
                    Arg::new("lines")
                        .long("lines")
                        .value_name("NUMBER")
                        .value_parser(value_parser!(u64).range(1..))
                        .default_value("5000")
                        .help("So much of the end of the log"),
                ]),
        ]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        match matches.subcommand() {
            Some(("dump", matches)) => {
                let mut client = Client::connect(&context.local_socket).await?;
                let told = called(client.local.dump(local::DumpRequest {}).await)?.json;
                let told: serde_json::Value = serde_json::from_str(&told).context("the daemon's answer")?;
                output::structured(matches, &told)?;
            }
            Some(("level", matches)) => {
                let level = matches.get_one::<String>("LEVELS").cloned();
                if level.as_deref().is_some_and(|l| l.trim().is_empty()) {
                    bail!("debug level: no levels");
                }
                let request = local::SetLogLevelRequest { level: level.unwrap_or_default() };
                let mut client = Client::connect(&context.local_socket).await?;
                output::print(&format!("{}\n", called(client.local.set_log_level(request).await)?.level))?;
            }
            Some(("bundle", matches)) => write_bundle(context, matches).await?,
            _ => bail!("debug: no verb"),
        }
        Ok(0)
    }
}

async fn write_bundle(context: &Context, matches: &ArgMatches) -> Result<()> {
    let path = |name: &str| matches.get_one::<Utf8PathBuf>(name).cloned();
    let log = path("log").map_or(bundle::Log::Journal, bundle::Log::File);
    let lines = matches.get_one::<u64>("lines").copied().unwrap_or(5000);
    let parts = bundle::collect(context, log, lines).await;
    let to = path("to").unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let now = rfc3339(now.as_secs() * 1_000_000_000);
        format!("proxmox-lxcri-debug-{}.tar.gz", now[..19].replace([':', '-'], "")).into()
    });
    let absolute = std::path::absolute(&to).with_context(|| to.to_string())?;
    atomic::write(&absolute, &parts.archive()?, 0o600, Durability::Process).with_context(|| format!("write {to}"))?;
    for (name, why) in parts.missing() {
        tell(&format!("without {name}: {why}"));
    }
    output::print(&format!("{to}\n"))
}

// Printing is what a command line is for.
#[allow(clippy::print_stderr)]
fn tell(text: &str) {
    eprintln!("proxmox-lxcri: {text}");
}
