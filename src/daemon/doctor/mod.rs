//! `doctor`: whether this node has what pods need, and what to do where it has not. Asks, changes nothing, needs no daemon.
//!
//! Each check is a file's function from [`Host`] and the configuration to findings; tests plant each fault in a host of their own.
//! Exit codes: 0 no fault (there may be warnings), 1 a fault, 2 wrong usage.

mod classes;
mod host;
mod node;
mod programs;
pub(in crate::daemon) mod proxmox;
mod sockets;
mod storage;

use anyhow::Result;
use clap::ArgMatches;
use serde::Serialize;

use crate::cli::{Command, Context, output};
use crate::core::config::Config;

pub use host::Host;
pub use node::LIMITS;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it has to be.
    Good,
    /// Pods run, something can't be had or will fail some day.
    Warning,
    /// Pods of the default handler, or of one that is turned on, can't run, or not safely.
    Fault,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at: "crun", "cgroups".
    pub check: &'static str,
    /// How it is.
    pub state: State,
    /// In words.
    pub message: String,
    /// What to do; "": nothing.
    pub advice: String,
}

impl Finding {
    fn good(check: &'static str, message: impl Into<String>) -> Self {
        Self { check, state: State::Good, message: message.into(), advice: String::new() }
    }

    fn warning(check: &'static str, message: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { check, state: State::Warning, message: message.into(), advice: advice.into() }
    }

    fn fault(check: &'static str, message: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { check, state: State::Fault, message: message.into(), advice: advice.into() }
    }
}

/// Everything that is looked at. Programs and servers are asked at once, so that the slowest decides how long it takes.
pub async fn examine(host: &Host, config: &Config) -> Vec<Finding> {
    let (crun, lxc, storage, proxmox, sockets) = tokio::join!(
        programs::crun(host, config),
        programs::lxc(config),
        storage::check(host, config),
        proxmox::check(config),
        sockets::check(config),
    );
    let mut all = node::check(host, config);
    all.extend(crun);
    all.extend(lxc);
    all.extend(programs::monitor(config));
    all.extend(programs::network(host, config));
    all.extend(classes::check(host, config));
    all.extend([storage, proxmox, sockets].into_iter().flatten());
    all
}

/// The command.
pub struct Doctor;

#[async_trait::async_trait]
impl Command for Doctor {
    fn name(&self) -> &'static str {
        "doctor"
    }
    fn about(&self) -> &'static str {
        "Check what this node has to have for pods, and say what to do"
    }
    fn arguments(&self) -> Vec<clap::Arg> {
        vec![output::argument("table")]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        let found = examine(&Host::this(), &context.config).await;
        if output::structured(matches, &found)?.is_none() {
            output::print(&table(&found))?;
        }
        Ok(u8::from(found.iter().any(|f| f.state == State::Fault)))
    }
}

/// The findings as lines for people.
pub fn table(found: &[Finding]) -> String {
    let mut out = String::new();
    for finding in found {
        let word = match finding.state {
            State::Good => "good",
            State::Warning => "WARNING",
            State::Fault => "FAULT",
        };
        // Words of programs and servers must not steer the terminal.
        let clean = |text: &str| text.replace(char::is_control, " ");
        out.push_str(&format!("{word:<8} {:<11} {}\n", finding.check, clean(&finding.message)));
        if !finding.advice.is_empty() {
            out.push_str(&format!("{:<20} -> {}\n", "", clean(&finding.advice)));
        }
    }
    let count = |state| found.iter().filter(|f| f.state == state).count();
    out.push_str(&format!("faults: {}, warnings: {}\n", count(State::Fault), count(State::Warning)));
    out
}
