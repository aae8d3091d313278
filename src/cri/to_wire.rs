//! From records to the wire. Pure.

use crate::api::v1;
use crate::core::ports::Image;
use crate::core::records::{ContainerRecord, PodRecord};
use crate::core::spec::*;
use crate::core::state::{ContainerPhase, PodPhase};

fn metadata(m: &PodMetadata) -> Option<v1::PodSandboxMetadata> {
    Some(v1::PodSandboxMetadata {
        name: m.name.clone(),
        uid: m.uid.clone(),
        namespace: m.namespace.clone(),
        attempt: m.attempt,
    })
}

/// State of a pod as the CRI knows it: ready or not.
pub fn pod_state(phase: PodPhase) -> v1::PodSandboxState {
    match phase {
        PodPhase::Ready => v1::PodSandboxState::SandboxReady,
        _ => v1::PodSandboxState::SandboxNotready,
    }
}

/// State of a container as the CRI knows it.
pub fn container_state(phase: ContainerPhase) -> v1::ContainerState {
    match phase {
        ContainerPhase::Created => v1::ContainerState::ContainerCreated,
        ContainerPhase::Running => v1::ContainerState::ContainerRunning,
        ContainerPhase::Exited | ContainerPhase::Removing => v1::ContainerState::ContainerExited,
        ContainerPhase::Creating => v1::ContainerState::ContainerUnknown,
    }
}

/// A line of ListPodSandbox.
pub fn pod(p: &PodRecord) -> v1::PodSandbox {
    v1::PodSandbox {
        id: p.id.to_string(),
        metadata: metadata(&p.config.metadata),
        state: pod_state(p.phase).into(),
        created_at: p.created_at,
        labels: p.config.labels.clone(),
        annotations: p.config.annotations.clone(),
        runtime_handler: p.handler.clone(),
    }
}

/// Status of a pod.
pub fn pod_status(p: &PodRecord) -> v1::PodSandboxStatus {
    let ips = p.facts.as_ref().filter(|_| p.phase == PodPhase::Ready).map(|f| &f.network.ips[..]).unwrap_or_default();
    let network = v1::PodSandboxNetworkStatus {
        ip: ips.first().map(ToString::to_string).unwrap_or_default(),
        additional_ips: ips.iter().skip(1).map(|ip| v1::PodIp { ip: ip.to_string() }).collect(),
    };
    v1::PodSandboxStatus {
        id: p.id.to_string(),
        metadata: metadata(&p.config.metadata),
        state: pod_state(p.phase).into(),
        created_at: p.created_at,
        network: Some(network),
        linux: Some(v1::LinuxPodSandboxStatus {
            namespaces: Some(v1::Namespace { options: Some(namespaces(&p.config.security.namespaces)) }),
        }),
        labels: p.config.labels.clone(),
        annotations: p.config.annotations.clone(),
        runtime_handler: p.handler.clone(),
    }
}

fn mode(m: NamespaceMode) -> i32 {
    match m {
        NamespaceMode::Pod => v1::NamespaceMode::Pod,
        NamespaceMode::Container => v1::NamespaceMode::Container,
        NamespaceMode::Node => v1::NamespaceMode::Node,
        NamespaceMode::Target => v1::NamespaceMode::Target,
    }
    .into()
}

fn mappings(list: &[IdMapping]) -> Vec<v1::IdMapping> {
    list.iter().map(|m| v1::IdMapping { host_id: m.host_id, container_id: m.container_id, length: m.length }).collect()
}

fn namespaces(n: &Namespaces) -> v1::NamespaceOption {
    v1::NamespaceOption {
        network: mode(n.network),
        pid: mode(n.pid),
        ipc: mode(n.ipc),
        target_id: n.target.clone().unwrap_or_default(),
        userns_options: n.user.as_ref().map(|u| v1::UserNamespace {
            mode: v1::NamespaceMode::Pod.into(),
            uids: mappings(&u.uids),
            gids: mappings(&u.gids),
        }),
    }
}

fn image_spec(i: &ImageSpec) -> v1::ImageSpec {
    v1::ImageSpec {
        image: i.image.clone(),
        annotations: i.annotations.clone(),
        user_specified_image: i.user_specified_image.clone(),
        runtime_handler: i.runtime_handler.clone(),
        image_ref: i.image_ref.clone(),
    }
}

/// As the pod names it: a kubelet gives the id of what it has pulled, and the pod's word beside it.
fn image_as_asked(i: &ImageSpec) -> v1::ImageSpec {
    let mut spec = image_spec(i);
    if !spec.user_specified_image.is_empty() {
        spec.image.clone_from(&spec.user_specified_image);
    }
    spec
}

fn container_metadata(c: &ContainerRecord) -> Option<v1::ContainerMetadata> {
    Some(v1::ContainerMetadata { name: c.config.name.clone(), attempt: c.config.attempt })
}

/// A line of ListContainers.
pub fn container(c: &ContainerRecord) -> v1::Container {
    v1::Container {
        id: c.id.to_string(),
        pod_sandbox_id: c.pod.to_string(),
        metadata: container_metadata(c),
        image: Some(image_spec(&c.config.image)),
        image_ref: c.image_ref.clone(),
        state: container_state(c.phase).into(),
        created_at: c.created_at,
        labels: c.config.labels.clone(),
        annotations: c.config.annotations.clone(),
        image_id: c.image_id.to_string(),
    }
}

fn resources(r: &Resources) -> v1::LinuxContainerResources {
    v1::LinuxContainerResources {
        cpu_period: r.cpu_period,
        cpu_quota: r.cpu_quota,
        cpu_shares: r.cpu_shares,
        memory_limit_in_bytes: r.memory_limit,
        oom_score_adj: r.oom_score_adj.unwrap_or_default(),
        cpuset_cpus: r.cpuset_cpus.clone(),
        cpuset_mems: r.cpuset_mems.clone(),
        hugepage_limits: r
            .hugepages
            .iter()
            .map(|(page_size, limit)| v1::HugepageLimit { page_size: page_size.clone(), limit: *limit })
            .collect(),
        unified: r.unified.clone(),
        memory_swap_limit_in_bytes: r.memory_swap_limit,
    }
}

fn mount(m: &Mount) -> v1::Mount {
    v1::Mount {
        container_path: m.container_path.clone(),
        host_path: m.host_path.clone(),
        readonly: m.readonly,
        selinux_relabel: m.selinux_relabel,
        propagation: match m.propagation {
            Propagation::Private => v1::MountPropagation::PropagationPrivate,
            Propagation::HostToContainer => v1::MountPropagation::PropagationHostToContainer,
            Propagation::Bidirectional => v1::MountPropagation::PropagationBidirectional,
        }
        .into(),
        uid_mappings: mappings(&m.uid_mappings),
        gid_mappings: mappings(&m.gid_mappings),
        recursive_read_only: m.recursive_read_only,
        image: m.image.as_ref().map(image_spec),
        image_sub_path: m.image_sub_path.clone(),
        mount_options: m.options.clone(),
    }
}

/// Status of a container.
pub fn container_status(c: &ContainerRecord) -> v1::ContainerStatus {
    v1::ContainerStatus {
        id: c.id.to_string(),
        metadata: container_metadata(c),
        state: container_state(c.phase).into(),
        created_at: c.created_at,
        started_at: c.started_at,
        finished_at: c.finished_at,
        exit_code: c.exit.as_ref().map_or(0, |e| e.code),
        image: Some(image_as_asked(&c.config.image)),
        image_ref: c.image_ref.clone(),
        reason: c.exit.as_ref().map(|e| e.reason.clone()).unwrap_or_default(),
        message: c.exit.as_ref().map(|e| e.message.clone()).unwrap_or_default(),
        labels: c.config.labels.clone(),
        annotations: c.config.annotations.clone(),
        mounts: c.config.mounts.iter().map(mount).collect(),
        log_path: c.log_path.as_ref().map(ToString::to_string).unwrap_or_default(),
        resources: Some(v1::ContainerResources { linux: Some(resources(&c.config.resources)), windows: None }),
        image_id: c.image_id.to_string(),
        user: Some(v1::ContainerUser {
            linux: Some(v1::LinuxContainerUser {
                uid: c.user.uid.into(),
                gid: c.user.gid.into(),
                supplemental_groups: c.user.groups.iter().map(|g| i64::from(*g)).collect(),
            }),
        }),
        stop_signal: super::convert::signal_to_wire(c.stop_signal).into(),
    }
}

/// An image.
pub fn image(i: &Image) -> v1::Image {
    let user = i.config.user.split(':').next().unwrap_or_default();
    let uid = user.parse::<i64>().ok().map(|value| v1::Int64Value { value });
    v1::Image {
        id: i.id.to_string(),
        repo_tags: i.repo_tags.clone(),
        repo_digests: i.repo_digests.clone(),
        size: i.size,
        username: if uid.is_some() { String::new() } else { user.to_string() },
        uid,
        spec: Some(v1::ImageSpec { image: i.id.to_string(), ..Default::default() }),
        pinned: i.pinned,
    }
}
