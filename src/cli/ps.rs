//! `ps`: containers with their pods, addresses and quotas.

use std::collections::HashMap;

use anyhow::Result;
use clap::{Arg, ArgMatches};

use super::client::Client;
use super::output::say;
use super::{Command, Context, switch};
use crate::api::v1;

pub(super) struct Ps;

#[async_trait::async_trait]
impl Command for Ps {
    fn name(&self) -> &'static str {
        "ps"
    }
    fn aliases(&self) -> &'static [&'static str] {
        &["list"]
    }
    fn about(&self) -> &'static str {
        "List containers: all that run, a kubelet's too"
    }
    fn arguments(&self) -> Vec<Arg> {
        vec![switch("all", Some('a'), "Also those that do not run")]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        let mut client = Client::connect(&context.local_socket).await?;
        let mut pods: HashMap<String, v1::PodSandboxStatus> = HashMap::new();
        say!("{:<15} {:<24} {:<10} {:<16} {:<32} {:<8} IMAGE", "CONTAINER", "NAME", "STATE", "IP", "POD", "QUOTA")?;
        let quotas = client.quotas().await?;
        for c in client.containers().await? {
            let running = c.state() == v1::ContainerState::ContainerRunning;
            if !running && !matches.get_flag("all") {
                continue;
            }
            if !pods.contains_key(&c.pod_sandbox_id) {
                // A pod that went away since the list was made is no failure of this command.
                let Ok(status) = client.pod_status(&c.pod_sandbox_id).await else { continue };
                pods.insert(c.pod_sandbox_id.clone(), status);
            }
            let pod = &pods[&c.pod_sandbox_id];
            let m = pod.metadata.clone().unwrap_or_default();
            let ip = pod.network.as_ref().map(|n| n.ip.as_str()).filter(|ip| !ip.is_empty()).unwrap_or("-");
            let state = c.state().as_str_name().trim_start_matches("CONTAINER_").to_lowercase();
            let image = c
                .image
                .as_ref()
                .map(|i| if i.user_specified_image.is_empty() { &i.image } else { &i.user_specified_image });
            let name = c.metadata.as_ref().map(|m| m.name.as_str()).unwrap_or_default();
            say!(
                "{:<15} {name:<24} {state:<10} {ip:<16} {:<32} {:<8} {}",
                &c.id[..c.id.len().min(13)],
                format!("{}/{}", m.namespace, m.name),
                quota_of(quotas.get(&c.id).copied()),
                image.map(String::as_str).unwrap_or_default()
            )?;
        }
        Ok(0)
    }
}

/// As `10.0Gi`; "-" where there is none.
pub(super) fn quota_of(bytes: Option<u64>) -> String {
    match bytes {
        None | Some(0) => "-".into(),
        Some(bytes) => size(bytes),
    }
}

/// As people read it, in a unit that Kubernetes knows too.
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["", "Ki", "Mi", "Gi", "Ti", "Pi"];
    let mut unit = 0;
    let mut value = bytes as f64;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => bytes.to_string(),
        _ => format!("{value:.1}{}", UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        assert_eq!([quota_of(None), quota_of(Some(0)), quota_of(Some(24 << 20))], ["-", "-", "24.0Mi"]);
        assert_eq!([size(0), size(1023), size(1536), size(u64::MAX)], ["0", "1023", "1.5Ki", "16384.0Pi"]);
    }
}
