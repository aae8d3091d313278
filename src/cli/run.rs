//! `run`: a local pod with one container; its output here, its exit code as ours.

use std::time::Duration;

use anyhow::{Context as _, Result};
use camino::Utf8PathBuf;
use clap::{Arg, ArgMatches};

use super::client::{Client, Keys, called};
use super::crilog::Follower;
use super::interrupts::Interrupts;
use super::output::say;
use super::stream::{self, Connected, Ended, Options};
use super::{Command, Context, required, rest, string, strings, switch};
use crate::api::v1;

/// Where the logs of local pods are.
pub(super) const LOG_ROOT: &str = "/var/log/proxmox-lxcri/local";
/// How often the log and the state are looked at.
const PERIOD: Duration = Duration::from_millis(50);
/// Hidden from the container: they tell of or change the node.
const MASKED: [&str; 8] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/scsi",
    "/sys/firmware",
];
/// Not writable in the container.
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

pub(super) struct Run;

#[async_trait::async_trait]
impl Command for Run {
    fn name(&self) -> &'static str {
        "run"
    }
    fn about(&self) -> &'static str {
        "Run a local pod with one container (a kubelet does not see it)"
    }
    fn arguments(&self) -> Vec<Arg> {
        let [key, password] = Keys::arguments();
        vec![
            key,
            password,
            switch("rm", None, "Remove the pod when its container ends"),
            switch("detach", Some('d'), "Print the container's id and leave it running"),
            switch("stdin", Some('i'), "Pass stdin on"),
            switch("tty", Some('t'), "Give it a terminal, shown in ours (with -i Ctrl-P Ctrl-Q detaches)"),
            switch("host-network", None, "Use the node's network"),
            Arg::new("name").long("name").value_name("NAME").help("Name of pod and container (default: made up)"),
            Arg::new("handler")
                .long("handler")
                .value_name("HANDLER")
                .help("Runtime handler (default: the configuration's)"),
            Arg::new("env")
                .long("env")
                .short('e')
                .value_name("NAME=VALUE")
                .action(clap::ArgAction::Append)
                .help("Environment variable"),
            required(
                "IMAGE",
                "Reference of an image (fetched when absent), its id, oci:DIR, oci-archive:FILE, docker-archive:FILE or bfc:FILE",
            ),
            rest("CMD", "Replaces the image's command"),
        ]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        let mut client = Client::connect(&context.local_socket).await?;
        let image = client.ensure_image(&string(matches, "IMAGE"), Keys::of(matches)).await?;
        let uid = uuid::Uuid::new_v4().simple().to_string();
        let name = match string(matches, "name") {
            empty if empty.is_empty() => format!("run-{}", &uid[..8]),
            name => name,
        };
        let detach = matches.get_flag("detach");
        let attach = !detach && (matches.get_flag("stdin") || matches.get_flag("tty"));
        // From here on there is something to take down: an interrupt waits until it can be stopped.
        let mut interrupts = (!detach).then(Interrupts::catch).transpose()?;
        let pod_config = pod_config(&name, &uid, matches.get_flag("host-network"));
        let request =
            v1::RunPodSandboxRequest { config: Some(pod_config.clone()), runtime_handler: string(matches, "handler") };
        let pod = called(client.runtime.run_pod_sandbox(request).await)?.pod_sandbox_id;
        let config = container_config(&name, image, matches)?;
        let started = start(&mut client, &pod, &pod_config, config, attach).await;
        let (container, connected) = match started {
            Ok(started) => started,
            Err(e) => {
                remove(&mut client, &pod, &pod_config.log_directory).await.context("after a failed start")?;
                return Err(e);
            }
        };
        let Some(interrupts) = &mut interrupts else {
            say!("{container}")?;
            return Ok(0);
        };
        let code = match connected {
            None => follow(&mut client, &container, interrupts).await,
            Some(connected) => match converse(&mut client, &container, connected, interrupts).await {
                Ok(None) => return Ok(0),
                Ok(Some(code)) => Ok(code),
                Err(e) => Err(e),
            },
        };
        if matches.get_flag("rm") {
            remove(&mut client, &pod, &pod_config.log_directory).await?;
        }
        code
    }
}

fn pod_config(name: &str, uid: &str, host_network: bool) -> v1::PodSandboxConfig {
    let network = if host_network { v1::NamespaceMode::Node } else { v1::NamespaceMode::Pod };
    v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: name.to_string(),
            uid: uid.to_string(),
            namespace: "local".to_string(),
            attempt: 0,
        }),
        hostname: if host_network { String::new() } else { name.chars().take(63).collect() },
        log_directory: format!("{LOG_ROOT}/{uid}"),
        linux: Some(v1::LinuxPodSandboxConfig {
            security_context: Some(v1::LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces(network)),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn namespaces(network: v1::NamespaceMode) -> v1::NamespaceOption {
    v1::NamespaceOption { network: network.into(), pid: v1::NamespaceMode::Container.into(), ..Default::default() }
}

fn container_config(name: &str, image: String, matches: &ArgMatches) -> Result<v1::ContainerConfig> {
    let mut envs = Vec::new();
    for line in strings(matches, "env") {
        let (key, value) = line.split_once('=').with_context(|| format!("--env {line:?} is not NAME=VALUE"))?;
        envs.push(v1::KeyValue { key: key.to_string(), value: value.as_bytes().to_vec() });
    }
    let network = if matches.get_flag("host-network") { v1::NamespaceMode::Node } else { v1::NamespaceMode::Pod };
    let default = v1::SecurityProfile {
        profile_type: v1::security_profile::ProfileType::RuntimeDefault.into(),
        localhost_ref: String::new(),
    };
    Ok(v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: name.to_string(), attempt: 0 }),
        image: Some(v1::ImageSpec { image, user_specified_image: string(matches, "IMAGE"), ..Default::default() }),
        args: strings(matches, "CMD"),
        envs,
        log_path: "0.log".to_string(),
        stdin: matches.get_flag("stdin"),
        stdin_once: matches.get_flag("stdin"),
        tty: matches.get_flag("tty"),
        linux: Some(v1::LinuxContainerConfig {
            security_context: Some(v1::LinuxContainerSecurityContext {
                namespace_options: Some(namespaces(network)),
                masked_paths: MASKED.map(String::from).to_vec(),
                readonly_paths: READ_ONLY.map(String::from).to_vec(),
                seccomp: Some(default),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    })
}

async fn start(
    client: &mut Client,
    pod: &str,
    pod_config: &v1::PodSandboxConfig,
    config: v1::ContainerConfig,
    attach: bool,
) -> Result<(String, Option<Connected>)> {
    let options = Options { stdin: config.stdin, tty: config.tty, detach_keys: config.stdin && config.tty };
    let request = v1::CreateContainerRequest {
        pod_sandbox_id: pod.to_string(),
        config: Some(config),
        sandbox_config: Some(pod_config.clone()),
    };
    let container_id = called(client.runtime.create_container(request).await)?.container_id;
    let mut connected = None;
    if attach {
        // Before it runs, so that its first words are seen.
        let Options { stdin, tty, .. } = options;
        let container_id = container_id.clone();
        let request = v1::AttachRequest { container_id, stdin, tty, stdout: true, stderr: !tty };
        let url = called(client.runtime.attach(request).await)?.url;
        connected = Some(stream::connect(&url, options).await?.ready().await?);
    }
    let request = v1::StartContainerRequest { container_id: container_id.clone() };
    called(client.runtime.start_container(request).await)?;
    Ok((container_id, connected))
}

/// Passes streams on until the container ends; its exit code, None when the keys to detach were pressed. Ctrl-C stops it
/// (a terminal passes that on like any other key).
async fn converse(
    client: &mut Client,
    container: &str,
    connected: Connected,
    interrupts: &mut Interrupts,
) -> Result<Option<u8>> {
    let mut talk = std::pin::pin!(connected.run());
    let ended = loop {
        tokio::select! {
            ended = &mut talk => break ended?,
            seen = interrupts.next() => stop(client, container, interrupts, seen).await?,
        }
    };
    if ended == Ended::Detached {
        return Ok(None);
    }
    loop {
        let status = client.container_status(container).await?;
        if status.state() == v1::ContainerState::ContainerExited {
            return Ok(Some(status.exit_code.clamp(0, 255) as u8));
        }
        tokio::time::sleep(PERIOD).await;
    }
}

/// Stops the container after the interrupt number `seen`; from the second one on there is no grace.
async fn stop(client: &mut Client, container: &str, interrupts: &mut Interrupts, seen: u32) -> Result<()> {
    let mut timeout = if seen > 1 { 0 } else { 10 };
    loop {
        let request = v1::StopContainerRequest { container_id: container.to_string(), timeout };
        tokio::select! {
            stopped = client.stop_container(request) => return stopped,
            _ = interrupts.next() => timeout = 0,
        }
    }
}

/// Prints the container's output until it ends; an interrupt stops it, a second one kills it.
async fn follow(client: &mut Client, container: &str, interrupts: &mut Interrupts) -> Result<u8> {
    let mut log: Option<Follower> = None;
    loop {
        let status = client.container_status(container).await?;
        if log.is_none() {
            log = Follower::open(&Utf8PathBuf::from(&status.log_path)).ok();
        }
        // The state was asked before the log is read: of a container that has ended nothing is missed.
        if let Some(log) = &mut log {
            log.print_available().context("print the container's output")?;
        }
        if status.state() == v1::ContainerState::ContainerExited {
            if !matches!(status.reason.as_str(), "Completed" | "Error") {
                eprintln!("proxmox-lxcri: {}: {}", status.reason, status.message);
            }
            return Ok(status.exit_code.clamp(0, 255) as u8);
        }
        tokio::select! {
            () = tokio::time::sleep(PERIOD) => {}
            seen = interrupts.next() => stop(client, container, interrupts, seen).await?,
        }
    }
}

async fn remove(client: &mut Client, pod: &str, log_directory: &str) -> Result<()> {
    client.remove_pod(pod).await?;
    remove_logs(log_directory)
}

/// Removes the log folder of a local pod that this is, or is in; others are a kubelet's.
pub(super) fn remove_logs(log_directory: &str) -> Result<()> {
    let given = Utf8PathBuf::from(log_directory);
    let of_pod = |path: &&camino::Utf8Path| path.parent().map(camino::Utf8Path::as_str) == Some(LOG_ROOT);
    let Some(folder) = given.ancestors().find(of_pod) else { return Ok(()) };
    crate::utils::beneath::remove_tree(folder.as_std_path()).with_context(|| format!("remove logs in {folder}"))
}
