//! A backend's verbs from the library, without a daemon: create, start, list, info, exec, stop, delete.
//!
//! ```text
//! cargo run --example basic_backend -- oci:/path/to/layout [handler]
//! ```
//! Runs as root, on folders of its own below /tmp, with a host network pod: no CNI configuration is needed.

// An example speaks to people.
#![allow(clippy::print_stdout)]

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use proxmox_lxcri::core::config::Config;
use proxmox_lxcri::core::engine::Scope;
use proxmox_lxcri::core::error::Error;
use proxmox_lxcri::core::spec::Owner;
use proxmox_lxcri::cri::convert;
use proxmox_lxcri::cri::image::source;
use proxmox_lxcri::{api::v1, daemon};

fn plain(e: Error) -> anyhow::Error {
    anyhow!(e.chain())
}

fn main() -> Result<ExitCode> {
    // The daemon's own way to unpack layers: this program, started again.
    if let Some(code) = daemon::entry() {
        return Ok(code);
    }
    tokio::runtime::Runtime::new()?.block_on(verbs())?;
    Ok(ExitCode::SUCCESS)
}

async fn verbs() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let image = arguments.next().context("which image? oci:DIR, oci-archive:FILE or docker-archive:FILE")?;
    let handler = arguments.next().unwrap_or_default();

    let folder = format!("/tmp/lxcri-example-{}", std::process::id());
    let mut config = Config::default();
    config.server.root = format!("{folder}/root").into();
    config.server.state = format!("{folder}/state").into();
    let wired = daemon::wire(&config).await.map_err(plain)?;
    let engine = &wired.engine;

    let loaded = engine.images().load(&source(&image, None).map_err(plain)?, None).await.map_err(plain)?;
    let image = loaded.first().context("no image in it")?.id.to_string();

    // create
    let node = v1::NamespaceMode::Node.into();
    let namespaces =
        v1::NamespaceOption { network: node, pid: v1::NamespaceMode::Container.into(), ..Default::default() };
    let pod = v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: "example".into(),
            uid: "example".into(),
            namespace: "local".into(),
            attempt: 0,
        }),
        linux: Some(v1::LinuxPodSandboxConfig {
            security_context: Some(v1::LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces.clone()),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let pod = convert::sandbox(Some(pod)).map_err(plain)?;
    let pod = engine.run_sandbox(Owner::Local, pod, &handler).await.map_err(plain)?;
    let container = v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: "example".into(), attempt: 0 }),
        image: Some(v1::ImageSpec { image, ..Default::default() }),
        command: vec!["/bin/sh".into(), "-c".into(), "trap 'exit 3' TERM; while :; do sleep 1; done".into()],
        linux: Some(v1::LinuxContainerConfig {
            security_context: Some(v1::LinuxContainerSecurityContext {
                namespace_options: Some(namespaces),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let container = convert::container(Some(container)).map_err(plain)?;
    let id = engine.create_container(Scope::Local, pod.as_str(), container).await.map_err(plain)?;
    println!("create  {id}");

    // start
    engine.start_container(Scope::Local, id.as_str()).await.map_err(plain)?;
    println!("start   done");

    // list
    for c in engine.containers(Scope::Local) {
        println!("list    {} {}", c.id.short(), c.phase.word());
    }

    // info
    let info = engine.container(Scope::Local, id.as_str()).map_err(plain)?;
    println!("info    pid {}, uid {}, handler {}", info.pid, info.user.uid, engine.backends()[0].handler());

    // exec
    let command = ["/bin/sh".to_string(), "-c".to_string(), "echo hello from inside; exit 7".to_string()];
    let done =
        engine.exec_sync(Scope::Local, id.as_str(), &command, Some(Duration::from_secs(10))).await.map_err(plain)?;
    println!("exec    {:?}, exit code {}", String::from_utf8_lossy(&done.stdout).trim(), done.exit_code);

    // stop
    engine.stop_container(Scope::Local, id.as_str(), Duration::from_secs(10)).await.map_err(plain)?;
    let ended = engine.container(Scope::Local, id.as_str()).map_err(plain)?;
    println!("stop    exit code {}", ended.exit.as_ref().map_or(-1, |e| e.code));

    // delete
    engine.remove_sandbox(Scope::Local, pod.as_str()).await.map_err(plain)?;
    println!("delete  {} containers left", engine.containers(Scope::Local).len());
    wired.tasks.shutdown().await;
    Ok(())
}
