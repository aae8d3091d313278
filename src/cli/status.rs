//! `status`: how the daemon and the node are: conditions, handlers, what there is. Exit codes: 0 all is well, 1 a condition is not, or no
//! daemon answers.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use clap::{Arg, ArgMatches};
use serde::Serialize;

use super::client::{Client, called};
use super::{Command, Context, output};
use crate::api::v1;

pub(super) struct StatusCommand;

#[derive(Serialize)]
struct Shown {
    version: String,
    conditions: Vec<Condition>,
    handlers: Vec<String>,
    counts: BTreeMap<String, serde_json::Value>,
}

#[derive(Serialize)]
struct Condition {
    name: String,
    well: bool,
    reason: String,
    message: String,
}

#[async_trait::async_trait]
impl Command for StatusCommand {
    fn name(&self) -> &'static str {
        "status"
    }
    fn about(&self) -> &'static str {
        "How the daemon and the node are; `doctor` says more, and needs no daemon"
    }
    fn arguments(&self) -> Vec<Arg> {
        vec![output::argument("table")]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        let mut client = Client::connect(&context.local_socket)
            .await
            .context("the daemon does not answer: systemctl status proxmox-lxcri; proxmox-lxcri doctor")?;
        let version = called(client.runtime.version(v1::VersionRequest::default()).await)?.runtime_version;
        let told = called(client.runtime.status(v1::StatusRequest { verbose: true }).await)?;
        let shown = Shown {
            version,
            conditions: told.status.unwrap_or_default().conditions.into_iter().map(Condition::from).collect(),
            handlers: told.runtime_handlers.into_iter().map(|h| h.name).filter(|n| !n.is_empty()).collect(),
            counts: told.info.get("counts").map(|c| serde_json::from_str(c)).transpose()?.unwrap_or_default(),
        };
        if output::structured(matches, &shown)?.is_none() {
            output::print(&shown.text())?;
        }
        Ok(u8::from(!shown.conditions.iter().all(|c| c.well || c.is_minor())))
    }
}

impl From<v1::RuntimeCondition> for Condition {
    fn from(c: v1::RuntimeCondition) -> Self {
        Self { name: c.r#type, well: c.status, reason: c.reason, message: c.message }
    }
}

impl Condition {
    /// Pods run without it.
    fn is_minor(&self) -> bool {
        self.name == "UnpackingConfined"
    }
}

impl Shown {
    fn text(&self) -> String {
        let rows: Vec<Vec<String>> = self
            .conditions
            .iter()
            .map(|c| {
                let well = if c.well { "yes" } else { "NO" };
                // What programs said must not steer the terminal.
                vec![c.name.clone(), well.into(), c.reason.clone(), c.message.replace(char::is_control, " ")]
            })
            .collect();
        let counts: Vec<String> =
            self.counts.iter().map(|(k, v)| format!("{k}: {}", v.to_string().trim_matches('"'))).collect();
        format!(
            "version {}, handlers: {}\n{}\n\n{}",
            self.version,
            self.handlers.join(", "),
            counts.join(", "),
            output::table(&["CONDITION", "WELL", "REASON", "MESSAGE"], &rows, 0)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_programs_do_not_steer_the_terminal() {
        let bad = v1::RuntimeCondition {
            r#type: "RuntimeReady".into(),
            status: false,
            reason: "RuntimeNotReady".into(),
            message: "a\x1b[2Jb".into(),
        };
        let shown = Shown {
            version: "1".into(),
            conditions: vec![bad.into()],
            handlers: vec!["crun".into(), "lxc".into()],
            counts: [("pods".to_owned(), 3.into()), ("layerDriver".to_owned(), "zfs".into())].into(),
        };
        let text = shown.text();
        assert!(text.starts_with("version 1, handlers: crun, lxc\nlayerDriver: zfs, pods: 3\n\nCONDITION"), "{text}");
        assert!(text.contains("RuntimeReady  NO    RuntimeNotReady  a [2Jb\n"), "{text}");
    }
}
