//! A command of one's own beside all of proxmox-lxcri's: how many containers each namespace has.
//!
//! ```text
//! cargo run --example custom_command -- namespaces [--running]
//! cargo run --example custom_command -- help
//! ```
//! It is in `help`, in completions and manual pages as every other. Without the library, a program `proxmox-lxcri-NAME` on PATH
//! is a command, too.

// An example speaks to people.
#![allow(clippy::print_stdout)]

use std::collections::BTreeMap;
use std::process::ExitCode;

use proxmox_lxcri::api::v1;
use proxmox_lxcri::cli::clap::{Arg, ArgAction, ArgMatches};
use proxmox_lxcri::cli::client::{Client, called};
use proxmox_lxcri::cli::{Command, Context, output};
use proxmox_lxcri::daemon::program;

struct Namespaces;

#[async_trait::async_trait]
impl Command for Namespaces {
    fn name(&self) -> &'static str {
        "namespaces"
    }
    fn aliases(&self) -> &'static [&'static str] {
        &["ns"]
    }
    fn about(&self) -> &'static str {
        "How many containers each namespace has"
    }
    fn arguments(&self) -> Vec<Arg> {
        let running = Arg::new("running").long("running").action(ArgAction::SetTrue).help("Only those that run");
        vec![running, output::argument("table")]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> anyhow::Result<u8> {
        let mut client = Client::connect(&context.local_socket).await?;
        let pods = called(client.runtime.list_pod_sandbox(v1::ListPodSandboxRequest::default()).await)?.items;
        let namespace = |m: v1::PodSandboxMetadata| m.namespace;
        let of: BTreeMap<String, String> =
            pods.into_iter().map(|p| (p.id, p.metadata.map(namespace).unwrap_or_default())).collect();
        let mut counts: BTreeMap<String, u64> = of.values().map(|n| (n.clone(), 0)).collect();
        for container in client.containers().await? {
            let counted = !matches.get_flag("running") || container.state() == v1::ContainerState::ContainerRunning;
            if let Some(namespace) = of.get(&container.pod_sandbox_id).filter(|_| counted) {
                *counts.entry(namespace.clone()).or_default() += 1;
            }
        }
        if output::structured(matches, &counts)?.is_none() {
            let rows: Vec<Vec<String>> = counts.iter().map(|(n, c)| vec![n.clone(), c.to_string()]).collect();
            output::print(&output::table(&["NAMESPACE", "CONTAINERS"], &rows, 1))?;
        }
        Ok(0)
    }
}

fn main() -> ExitCode {
    let mut registry = program::commands();
    registry.register(Namespaces);
    program::run(&registry)
}
