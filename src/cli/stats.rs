//! `stats`: what running containers use now: CPU, memory, and what they have written of what they may write.

use anyhow::Result;
use clap::ArgMatches;

use super::client::{Client, called};
use super::output::say;
use super::ps::{quota_of, size};
use super::{Command, Context};
use crate::api::v1;

pub(super) struct Stats;

#[async_trait::async_trait]
impl Command for Stats {
    fn name(&self) -> &'static str {
        "stats"
    }
    fn about(&self) -> &'static str {
        "What running containers use: CPU, memory, and disk with their quotas"
    }
    async fn run(&self, context: &Context, _: &ArgMatches) -> Result<u8> {
        let mut client = Client::connect(&context.local_socket).await?;
        let quotas = client.quotas().await?;
        let request = v1::ListContainerStatsRequest::default();
        say!("{:<15} {:<24} {:>8} {:>10} {:>10} {:>10}", "CONTAINER", "NAME", "CPU", "MEMORY", "DISK", "QUOTA")?;
        for s in called(client.runtime.list_container_stats(request).await)?.stats {
            let attributes = s.attributes.unwrap_or_default();
            // What was not measured yet is not nothing.
            let shown = |value: Option<u64>| value.map_or_else(|| "-".into(), size);
            let cpu = s.cpu.and_then(|c| c.usage_nano_cores).map(|n| format!("{}m", n.value / 1_000_000));
            say!(
                "{:<15} {:<24} {:>8} {:>10} {:>10} {:>10}",
                &attributes.id[..attributes.id.len().min(13)],
                attributes.metadata.map(|m| m.name).unwrap_or_default(),
                cpu.unwrap_or_else(|| "-".into()),
                shown(s.memory.and_then(|m| m.working_set_bytes).map(|b| b.value)),
                shown(s.writable_layer.and_then(|w| w.used_bytes).map(|b| b.value)),
                quota_of(quotas.get(&attributes.id).copied()),
            )?;
        }
        Ok(0)
    }
}
