//! `ps`: containers with their pods and addresses.

use std::collections::HashMap;

use anyhow::Result;
use clap::{Arg, ArgMatches};

use super::client::Client;
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
        println!("{:<15} {:<24} {:<10} {:<16} {:<32} IMAGE", "CONTAINER", "NAME", "STATE", "IP", "POD");
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
            println!(
                "{:<15} {name:<24} {state:<10} {ip:<16} {:<32} {}",
                &c.id[..c.id.len().min(13)],
                format!("{}/{}", m.namespace, m.name),
                image.map(String::as_str).unwrap_or_default()
            );
        }
        Ok(0)
    }
}
