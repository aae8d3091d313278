//! Pods and containers in NRI's words: from records, and for a container that is being made from its specification. Pure.
//!
//! Records have no values of environment variables: only who makes a container is shown them.

use oci_spec::runtime::Spec;

use super::limits;
use super::wire::{
    CdiDevice, Container, ContainerState, Hook, Hooks, Image, LinuxContainer, LinuxDevice, LinuxNamespace,
    LinuxPodSandbox, Mount, OptionalInt, OptionalUInt32, PodSandbox, PosixRlimit, User,
};
use crate::core::ids::ContainerId;
use crate::core::records::{ContainerRecord, PodRecord, ResolvedUser};
use crate::core::spec::ContainerConfig;
use crate::core::state::ContainerPhase;

/// A pod.
pub fn pod(of: &PodRecord) -> PodSandbox {
    let (config, facts) = (&of.config, of.facts.clone().unwrap_or_default());
    let namespaces = [
        ("network", &facts.netns),
        ("ipc", &facts.ipcns),
        ("uts", &facts.utsns),
        ("pid", &facts.pidns),
        ("user", &facts.userns),
    ];
    let namespaces = namespaces
        .into_iter()
        .filter_map(|(kind, path)| Some(LinuxNamespace { r#type: kind.into(), path: path.as_ref()?.to_string() }));
    PodSandbox {
        id: of.id.to_string(),
        name: config.metadata.name.clone(),
        uid: config.metadata.uid.clone(),
        namespace: config.metadata.namespace.clone(),
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
        runtime_handler: of.handler.clone(),
        linux: Some(LinuxPodSandbox {
            pod_overhead: Some(limits::to_wire(&config.overhead)),
            pod_resources: Some(limits::to_wire(&config.resources)),
            cgroup_parent: config.cgroup_parent.clone(),
            namespaces: namespaces.collect(),
        }),
        ips: facts.network.ips.iter().map(ToString::to_string).collect(),
    }
}

fn asked_for(id: &ContainerId, pod: &PodRecord, config: &ContainerConfig, user: &ResolvedUser) -> Container {
    let mount = |m: &crate::core::spec::Mount| Mount {
        destination: m.container_path.clone(),
        r#type: "bind".into(),
        source: m.host_path.clone(),
        options: m.options.clone(),
    };
    Container {
        id: id.to_string(),
        pod_sandbox_id: pod.id.to_string(),
        name: config.name.clone(),
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
        args: [&config.command[..], &config.args[..]].concat(),
        mounts: config.mounts.iter().map(mount).collect(),
        linux: Some(LinuxContainer {
            resources: Some(limits::to_wire(&config.resources)),
            oom_score_adj: config.resources.oom_score_adj.map(|value| OptionalInt { value }),
            ..Default::default()
        }),
        cdi_devices: config.cdi_devices.iter().map(|name| CdiDevice { name: name.clone() }).collect(),
        user: Some(User { uid: user.uid, gid: user.gid, additional_gids: user.groups.clone() }),
        ..Default::default()
    }
}

/// A container that is there.
pub fn container(of: &ContainerRecord, pod: &PodRecord) -> Container {
    let state = match of.phase {
        ContainerPhase::Creating => ContainerState::ContainerUnknown,
        ContainerPhase::Created => ContainerState::ContainerCreated,
        ContainerPhase::Running => ContainerState::ContainerRunning,
        ContainerPhase::Exited | ContainerPhase::Removing => ContainerState::ContainerStopped,
    };
    let exit = of.exit.clone();
    Container {
        state: state.into(),
        pid: u32::try_from(of.pid).unwrap_or(0),
        created_at: of.created_at,
        started_at: of.started_at,
        finished_at: of.finished_at,
        exit_code: exit.as_ref().map_or(0, |e| e.code),
        status_reason: exit.as_ref().map(|e| e.reason.clone()).unwrap_or_default(),
        status_message: exit.map(|e| e.message).unwrap_or_default(),
        image: Some(Image {
            name: of.config.image.image.clone(),
            digest: of.image_ref.clone(),
            config_digest: of.image_id.to_string(),
        }),
        ..asked_for(&of.id, pod, &of.config, &of.user)
    }
}

/// One that is being made.
pub struct New<'a> {
    /// Its pod.
    pub pod: &'a PodRecord,
    /// Id.
    pub id: &'a ContainerId,
    /// As asked for.
    pub config: &'a ContainerConfig,
    /// Id of its image.
    pub image: String,
    /// Whom it runs as.
    pub user: &'a ResolvedUser,
    /// What it is.
    pub spec: &'a Spec,
}

/// A container that is being made, as its specification is.
pub fn new(of: &New<'_>) -> Container {
    let mut it = asked_for(of.id, of.pod, of.config, of.user);
    it.image =
        Some(Image { name: of.config.image.image.clone(), config_digest: of.image.clone(), ..Default::default() });
    let text = |path: &std::path::Path| path.to_string_lossy().into_owned();
    if let Some(process) = of.spec.process() {
        it.args = process.args().clone().unwrap_or_default();
        it.env = process.env().clone().unwrap_or_default();
        it.rlimits = process
            .rlimits()
            .iter()
            .flatten()
            .map(|l| PosixRlimit { r#type: word(&l.typ()), hard: l.hard(), soft: l.soft() })
            .collect();
    }
    it.mounts = of
        .spec
        .mounts()
        .iter()
        .flatten()
        .map(|m| Mount {
            destination: text(m.destination()),
            r#type: m.typ().clone().unwrap_or_default(),
            source: m.source().as_deref().map(text).unwrap_or_default(),
            options: m.options().clone().unwrap_or_default(),
        })
        .collect();
    it.hooks = of.spec.hooks().as_ref().map(hooks);
    let linux = it.linux.get_or_insert_default();
    if let Some(process) = of.spec.process() {
        linux.oom_score_adj = process.oom_score_adj().map(|n| OptionalInt { value: n.into() });
    }
    let Some(spec) = of.spec.linux() else { return it };
    linux.cgroups_path = spec.cgroups_path().as_deref().map(text).unwrap_or_default();
    linux.namespaces = spec
        .namespaces()
        .iter()
        .flatten()
        .map(|n| LinuxNamespace { r#type: word(&n.typ()), path: n.path().as_deref().map(text).unwrap_or_default() })
        .collect();
    let number = |value: Option<u32>| value.map(|value| OptionalUInt32 { value });
    linux.devices = spec
        .devices()
        .iter()
        .flatten()
        .map(|d| LinuxDevice {
            path: text(d.path()),
            r#type: word(&d.typ()),
            major: d.major(),
            minor: d.minor(),
            file_mode: number(d.file_mode()),
            uid: number(d.uid()),
            gid: number(d.gid()),
        })
        .collect();
    it
}

/// The specification's own word for it.
fn word(of: &impl serde::Serialize) -> String {
    serde_json::to_value(of).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

fn hooks(of: &oci_spec::runtime::Hooks) -> Hooks {
    let list = |hooks: &Option<Vec<oci_spec::runtime::Hook>>| {
        let hook = |h: &oci_spec::runtime::Hook| Hook {
            path: h.path().to_string_lossy().into_owned(),
            args: h.args().clone().unwrap_or_default(),
            env: h.env().clone().unwrap_or_default(),
            timeout: h.timeout().map(|value| OptionalInt { value }),
        };
        hooks.iter().flatten().map(hook).collect()
    };
    #[allow(deprecated)]
    let prestart = of.prestart();
    Hooks {
        prestart: list(prestart),
        create_runtime: list(of.create_runtime()),
        create_container: list(of.create_container()),
        start_container: list(of.start_container()),
        poststart: list(of.poststart()),
        poststop: list(of.poststop()),
    }
}
