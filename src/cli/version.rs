//! `version`: ours, and the daemon's where one answers.

use anyhow::Result;
use clap::ArgMatches;

use super::client::{Client, called};
use super::output::say;
use super::{Command, Context};
use crate::api::v1;

pub(super) struct Version;

#[async_trait::async_trait]
impl Command for Version {
    fn name(&self) -> &'static str {
        "version"
    }
    fn about(&self) -> &'static str {
        "Print the versions of this program and of the daemon"
    }
    async fn run(&self, context: &Context, _: &ArgMatches) -> Result<u8> {
        say!("proxmox-lxcri {}", env!("CARGO_PKG_VERSION"))?;
        match Client::connect(&context.local_socket).await {
            Ok(mut client) => {
                let v = called(client.runtime.version(v1::VersionRequest::default()).await)?;
                say!("daemon        {} (CRI {})", v.runtime_version, v.runtime_api_version)?;
            }
            Err(_) => say!("daemon        none answers at {}", context.local_socket)?,
        }
        Ok(0)
    }
}
