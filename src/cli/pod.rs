//! `pod snapshot`, `rollback`, `snapshots`, `diff` and `fork`: consistent cuts of a pod's root file systems. `pod checkpoint`: with
//! its processes.

use std::io::Write;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use clap::{Arg, ArgMatches};

use super::client::{Client, called};
use super::output::say;
use super::{Command, Context, required, string};
use crate::api::{local, v1};

pub(super) struct Pod;

#[async_trait::async_trait]
impl Command for Pod {
    fn name(&self) -> &'static str {
        "pod"
    }
    fn about(&self) -> &'static str {
        "Cut a pod's root file systems at one moment, put them back, see what changed, or fork it (driver zfs); checkpoint it"
    }
    fn arguments(&self) -> Vec<Arg> {
        vec![
            required("VERB", "snapshot, rollback, snapshots, diff, fork or checkpoint").value_parser([
                "snapshot",
                "rollback",
                "snapshots",
                "diff",
                "fork",
                "checkpoint",
            ]),
            required("POD", "Its id (or the beginning) or name"),
            Arg::new("NAME").help(
                "The snapshot; of `diff` what is compared with: the image if not given; of `fork` what it begins with: \
                 the pod as it is now if not given; of `checkpoint` the folder that is made, for RestorePod",
            ),
            Arg::new("as").long("as").value_name("NAME").help("Name of a fork (default: made up)"),
        ]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        let mut client = Client::connect(&context.local_socket).await?;
        ensure!(!matches.contains_id("as") || string(matches, "VERB") == "fork", "--as names a fork");
        let (verb, name) = (string(matches, "VERB"), string(matches, "NAME"));
        match (matches.contains_id("NAME"), verb.as_str()) {
            (true, "snapshots") => bail!("pod snapshots: there is nothing to name"),
            // A variable that is not set, most likely.
            (true, _) => ensure!(!name.is_empty(), "pod {verb}: an empty name"),
            (false, "snapshots" | "diff" | "fork") => {}
            (false, _) => bail!("pod {verb}: a name is needed"),
        }
        let pod = find(&mut client, &string(matches, "POD")).await?;
        match verb.as_str() {
            "snapshot" => {
                let request = local::SnapshotPodRequest { pod, name };
                tell(&called(client.local.snapshot_pod(request).await)?.containers)?;
            }
            "rollback" => {
                let request = local::SnapshotPodRequest { pod, name };
                tell(&called(client.local.rollback_pod(request).await)?.containers)?;
            }
            "snapshots" => {
                let request = local::PodSnapshotsRequest { pod };
                called(client.local.pod_snapshots(request).await)?.names.iter().try_for_each(|n| say!("{n}"))?;
            }
            "diff" => diff(&mut client, pod, name).await?,
            "fork" => {
                let log_directory = format!("{}/{}", super::run::LOG_ROOT, uuid::Uuid::new_v4().simple());
                let name_of_fork = string(matches, "as");
                let request = local::ForkPodRequest { pod, cut: name, name: name_of_fork, log_directory };
                let forked = called(client.local.fork_pod(request).await)?;
                say!("{}", forked.pod)?;
            }
            "checkpoint" => {
                let folder = std::path::absolute(&name).with_context(|| format!("folder {name}"))?;
                let output_path = folder.into_os_string().into_string();
                let output_path = output_path.map_err(|path| anyhow!("folder {path:?}: its name is not UTF-8"))?;
                let request = v1::CheckpointPodRequest { pod_sandbox_id: pod, output_path, ..Default::default() };
                called(client.runtime.checkpoint_pod(request).await)?;
            }
            verb => bail!("pod {verb}: no such verb"),
        }
        Ok(0)
    }
}

fn tell(containers: &[String]) -> Result<()> {
    containers.iter().try_for_each(|c| say!("{c}"))
}

async fn diff(client: &mut Client, pod: String, from: String) -> Result<()> {
    let mut changes = called(client.local.diff_pod(local::DiffPodRequest { pod, from }).await)?;
    while let Some(change) = changes.message().await.map_err(|s| anyhow::anyhow!("{}", s.message()))? {
        // Names are bytes; a line each, so that what would break one is escaped.
        let path = change.path.escape_ascii();
        writeln!(std::io::stdout(), "{} {} /{path}", change.container, change.kind)?;
    }
    Ok(())
}

/// The id of the pod with this id or name, else with this beginning of an id.
async fn find(client: &mut Client, pod: &str) -> Result<String> {
    ensure!(!pod.is_empty(), "the pod's id or name is empty");
    let all = called(client.runtime.list_pod_sandbox(v1::ListPodSandboxRequest::default()).await)?.items;
    let exact = |p: &&v1::PodSandbox| p.id == pod || p.metadata.as_ref().is_some_and(|m| m.name == pod);
    let named: Vec<_> = all.iter().filter(exact).collect();
    let begun = all.iter().filter(|p| named.is_empty() && p.id.starts_with(pod));
    let mut hits = named.iter().copied().chain(begun);
    match (hits.next(), hits.next()) {
        (Some(p), None) => Ok(p.id.clone()),
        (None, _) => bail!("no pod {pod:?}"),
        (Some(_), Some(_)) => bail!("more than one pod is {pod:?}: give more of its id"),
    }
}
