//! The command line: a registry of commands, each one file, all speaking gRPC to the daemon's sockets.
//!
//! Sees `core::config`, the wire types and nothing else of the daemon; `serve` is registered from outside (`daemon`).
//! Exit codes: 0 done, 1 failed, 2 wrong usage, and the process's own for `run` and `exec`.

// Printing is what a command line is for.
#![allow(clippy::print_stderr)]

mod archive;
mod attach;
pub mod client;
mod completion;
mod config;
mod container;
pub mod crilog;
mod events;
mod exec;
mod external;
mod image;
mod images;
pub(crate) mod interrupts;
mod logs;
mod man;
pub mod output;
mod pod;
mod ps;
mod pull;
mod push;
mod rm;
mod rmi;
mod run;
mod stats;
mod status;
mod stop;
mod storage;
mod stream;
mod tag;
mod terminal;
mod top;
mod version;

pub use storage::Storage;

/// What commands are described with.
pub use clap;

use std::sync::Arc;

use anyhow::Result;
use camino::Utf8PathBuf;
use clap::{Arg, ArgMatches};

use crate::core::config::{Config, Sources};

/// What every command gets.
pub struct Context {
    /// The configuration that was read.
    pub config: Config,
    /// The daemon's local socket: `--local-socket`, else the configuration's.
    pub local_socket: Utf8PathBuf,
    /// What the configuration was read from, to read it again.
    pub sources: Sources,
    /// All commands there are. The whole command line is made of them ([`Registry::clap`]) by whoever needs it: a daemon
    /// has half a megabyte better uses.
    pub registry: Registry,
}

/// The program's name.
pub const PROGRAM: &str = "proxmox-lxcri";
const EXIT_STATUS: &str = "Exit status: 0 done, 1 failed, 2 wrong usage; `run` and `exec` end as their process did.";

/// A command of the registry. Implement it and pass it to [`Registry::register`] to add one of your own.
#[async_trait::async_trait]
pub trait Command: Send + Sync {
    /// The word on the command line.
    fn name(&self) -> &'static str;
    /// Other words for it.
    fn aliases(&self) -> &'static [&'static str] {
        &[]
    }
    /// One line for `help`.
    fn about(&self) -> &'static str;
    /// Its arguments.
    fn arguments(&self) -> Vec<Arg> {
        Vec::new()
    }
    /// Its own commands; one of them has to be named then.
    fn subcommands(&self) -> Vec<clap::Command> {
        Vec::new()
    }
    /// Whether it needs the configuration, which has to fit then; else it gets the defaults.
    fn reads_configuration(&self) -> bool {
        true
    }
    /// Does it; the answer is the exit code.
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8>;
}

/// The commands of a program.
#[derive(Clone, Default)]
pub struct Registry {
    commands: Vec<Arc<dyn Command>>,
}

impl Registry {
    /// The commands that need nothing but the daemon's sockets.
    pub fn builtin() -> Self {
        let mut registry = Self::default();
        registry.register(run::Run);
        registry.register(pull::Pull);
        registry.register(images::Images);
        registry.register(images::Inspect);
        registry.register(archive::Export);
        registry.register(archive::Import);
        registry.register(push::Push);
        registry.register(rmi::Rmi);
        registry.register(rmi::Prune);
        registry.register(tag::Tag);
        registry.register(tag::Pin(true));
        registry.register(tag::Pin(false));
        registry.register(ps::Ps);
        registry.register(status::StatusCommand);
        registry.register(stats::Stats);
        registry.register(top::Top);
        registry.register(events::Events);
        registry.register(logs::Logs);
        registry.register(exec::Exec);
        registry.register(attach::Attach);
        registry.register(stop::Stop);
        registry.register(rm::Rm);
        registry.register(pod::Pod);
        registry.register(image::Image);
        registry.register(container::Container);
        registry.register(storage::Storage);
        registry.register(config::Config);
        registry.register(completion::Completion);
        registry.register(man::ManPages);
        registry.register(version::Version);
        registry
    }

    /// Adds a command; a later one of the same name replaces an earlier one.
    pub fn register(&mut self, command: impl Command + 'static) {
        self.commands.retain(|c| c.name() != command.name());
        self.commands.push(Arc::new(command));
    }

    /// The whole command line: every registered command with its arguments.
    pub fn clap(&self) -> clap::Command {
        let path = |name: &'static str, help: &'static str| {
            Arg::new(name)
                .long(name)
                .global(true)
                .value_name("PATH")
                .value_parser(clap::value_parser!(Utf8PathBuf))
                .help(help)
        };
        let base = clap::Command::new(PROGRAM)
            .after_long_help(EXIT_STATUS)
            .about("A Kubernetes CRI runtime for Proxmox nodes")
            .version(env!("CARGO_PKG_VERSION"))
            .subcommand_required(true)
            .arg_required_else_help(true)
            .arg(path("config", "Configuration file (default: /etc/proxmox-lxcri/config.toml)"))
            .arg(path(
                "config-dir",
                "Folder with more of it, *.toml (default: /etc/proxmox-lxcri/conf.d, without --config)",
            ))
            .arg(
                Arg::new("config-set")
                    .long("config-set")
                    .global(true)
                    .value_name("KEY=VALUE")
                    .action(clap::ArgAction::Append)
                    .help("A key of the configuration: section.key=value"),
            )
            .arg(path("local-socket", "The daemon's local socket (default: the configuration's)"));
        self.commands.iter().fold(base, |base, c| {
            let sub = clap::Command::new(c.name()).about(c.about()).visible_aliases(c.aliases().iter().copied());
            let subcommands = c.subcommands();
            let sub = sub.subcommand_required(!subcommands.is_empty()).arg_required_else_help(!subcommands.is_empty());
            base.subcommand(sub.args(c.arguments()).subcommands(subcommands))
        })
    }

    /// Parses `arguments` (the program's name first), runs the command, prints its failure; the exit code.
    pub async fn main(&self, arguments: impl IntoIterator<Item = std::ffi::OsString>) -> u8 {
        let program = self.clap();
        let arguments: Vec<std::ffi::OsString> = arguments.into_iter().collect();
        let matches = match program.clone().allow_external_subcommands(true).try_get_matches_from(&arguments) {
            // A word that is neither a command nor a program: told as what it may have been meant for.
            Ok(matches) if external_program(&program, &matches).is_some_and(|p| p.is_none()) => {
                program.clone().try_get_matches_from(&arguments)
            }
            parsed => parsed,
        };
        let matches = match matches {
            Ok(matches) => matches,
            Err(e) => {
                let _ = e.print();
                return if e.use_stderr() { 2 } else { 0 };
            }
        };
        let external = external_program(&program, &matches).flatten();
        drop(program);
        match self.dispatch(external, &matches).await {
            Ok(code) => code,
            Err(e) => {
                eprintln!("proxmox-lxcri: {e:#}");
                1
            }
        }
    }

    async fn dispatch(&self, external: Option<std::path::PathBuf>, matches: &ArgMatches) -> Result<u8> {
        let (name, sub) = matches.subcommand().ok_or_else(|| anyhow::anyhow!("no command"))?;
        if let Some(path) = external {
            return become_external(&path, matches, sub);
        }
        let command =
            self.commands.iter().find(|c| c.name() == name).ok_or_else(|| anyhow::anyhow!("no command {name:?}"))?;
        // Where an option stands for all, the innermost command has it wherever it was written.
        let mut inner = sub;
        while let Some((_, deeper)) = inner.subcommand() {
            inner = deeper;
        }
        let path = |name: &str| inner.get_one::<Utf8PathBuf>(name).cloned();
        let sources = Sources::of_process(path("config"), path("config-dir"), strings(inner, "config-set"));
        let config = match command.reads_configuration() {
            true => configuration(&sources)?,
            false => Config::default(),
        };
        // Who can do without the configuration is shown the daemon's socket all the same, where the configuration fits.
        let listens = || match command.reads_configuration() {
            true => config.server.local_listen.clone(),
            false => sources.load().map_or_else(|_| Config::default(), |l| l.config).server.local_listen,
        };
        let local_socket = path("local-socket").unwrap_or_else(listens);
        command.run(&Context { config, local_socket, sources, registry: self.clone() }, sub).await
    }
}

/// The program for a word that is no command of ours: None where it is one, Some(None) where there is no such program.
fn external_program(program: &clap::Command, matches: &ArgMatches) -> Option<Option<std::path::PathBuf>> {
    let (name, _) = matches.subcommand()?;
    if program.find_subcommand(name).is_some() || name == "help" {
        return None;
    }
    Some(external::find(name, std::env::var_os("PATH").as_deref()))
}

fn become_external(path: &std::path::Path, matches: &ArgMatches, sub: &ArgMatches) -> Result<u8> {
    let given = |name: &str| matches.get_one::<Utf8PathBuf>(name).cloned();
    let sources = Sources::of_process(given("config"), given("config-dir"), strings(matches, "config-set"));
    let socket = match given("local-socket") {
        Some(socket) => socket,
        None => configuration(&sources)?.server.local_listen,
    };
    let arguments = sub.get_many::<std::ffi::OsString>("").unwrap_or_default().cloned();
    external::become_it(path, arguments, &socket, given("config").as_deref())
}

fn configuration(sources: &Sources) -> Result<Config> {
    let loaded = sources.load().map_err(|e| anyhow::anyhow!("{e}"))?;
    for warning in &loaded.warnings {
        eprintln!("proxmox-lxcri: warning: {warning}");
    }
    Ok(loaded.config)
}

/// A required argument.
fn required(name: &'static str, help: &'static str) -> Arg {
    Arg::new(name).required(true).value_name(name).help(help)
}

/// All that follows, flags included.
fn rest(name: &'static str, help: &'static str) -> Arg {
    Arg::new(name).num_args(0..).trailing_var_arg(true).allow_hyphen_values(true).value_name(name).help(help)
}

/// A switch.
fn switch(name: &'static str, short: Option<char>, help: &'static str) -> Arg {
    let arg = Arg::new(name).long(name).action(clap::ArgAction::SetTrue).help(help);
    match short {
        Some(c) => arg.short(c),
        None => arg,
    }
}

/// What came of several names: one that fails is told, and does not keep the others from their turn.
struct Outcomes {
    several: bool,
    code: u8,
}

impl Outcomes {
    fn of(names: &[String]) -> Self {
        Self { several: names.len() > 1, code: 0 }
    }

    /// A failure of the only one is given back: the program tells it.
    fn note(&mut self, name: &str, done: Result<()>) -> Result<()> {
        match done {
            Err(e) if self.several => {
                eprintln!("{PROGRAM}: {name}: {e:#}");
                self.code = 1;
                Ok(())
            }
            done => done,
        }
    }
}

fn strings(matches: &ArgMatches, name: &str) -> Vec<String> {
    matches.get_many::<String>(name).map(|v| v.cloned().collect()).unwrap_or_default()
}

fn string(matches: &ArgMatches, name: &str) -> String {
    matches.get_one::<String>(name).cloned().unwrap_or_default()
}
