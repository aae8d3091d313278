//! The linux section: namespaces, cgroup and limits, devices, profiles, hidden paths.

use std::collections::HashMap;

use oci_spec::runtime::{
    Linux, LinuxCpu, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType, LinuxHugepageLimitBuilder,
    LinuxMemory, LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType, LinuxPidsBuilder, LinuxResources,
};

use super::process::host_pid;
use super::{HostFacts, SpecInput, built, mounts, selinux, userns};
use crate::core::error::{Error, Kind, Result};
use crate::core::limits;
use crate::core::spec::{NamespaceMode, Resources};

/// Bytes that the OCI runtime itself needs in a container's cgroup before the container's process is there.
const MEMORY_MIN: i64 = 512 << 10;

pub(super) fn plan(input: &SpecInput<'_>) -> Result<Linux> {
    let security = &input.config.security;
    let mut linux = Linux::default();
    linux.set_namespaces(Some(namespaces(input)?));
    linux.set_cgroups_path(Some(input.cgroups_path.into()));
    let mut limits = resources(&input.config.resources, input.host, input.pids_limit)?;
    limits.set_devices(Some(device_rules(input)?));
    linux.set_resources(Some(limits));
    linux.set_devices(Some(input.devices.iter().map(|(d, _)| d.clone()).collect()));
    linux.set_seccomp(input.seccomp.clone());
    linux.set_rootfs_propagation(mounts::root_propagation(input));
    let hidden = |paths: &[String]| (!security.privileged && !paths.is_empty()).then(|| paths.to_vec());
    linux.set_masked_paths(hidden(&security.masked_paths));
    linux.set_readonly_paths(hidden(&security.readonly_paths));
    linux.set_mount_label(selinux::labels(security.selinux.as_ref(), input.host.selinux)?.map(|l| l.mount));
    linux.set_sysctl(None);
    let user = security.namespaces.user.as_ref();
    linux.set_uid_mappings(user.map(|u| userns::mappings(&u.uids)).transpose()?);
    linux.set_gid_mappings(user.map(|u| userns::mappings(&u.gids)).transpose()?);
    Ok(linux)
}

fn namespaces(input: &SpecInput<'_>) -> Result<Vec<LinuxNamespace>> {
    let wanted = &input.config.security.namespaces;
    let mut list = vec![namespace(LinuxNamespaceType::Mount, None)?];
    if let Some(path) = &input.facts.userns {
        list.push(namespace(LinuxNamespaceType::User, Some(path.as_str()))?);
    }
    let joined = [
        (LinuxNamespaceType::Network, wanted.network, &input.facts.netns),
        (LinuxNamespaceType::Ipc, wanted.ipc, &input.facts.ipcns),
    ];
    for (kind, mode, path) in joined {
        match (mode, path) {
            (NamespaceMode::Pod, Some(path)) => list.push(namespace(kind, Some(path.as_str()))?),
            (NamespaceMode::Node, None) => {}
            (mode, _) => {
                return Err(Error::invalid(
                    format!("{kind} namespace {mode:?} does not fit the sandbox's").to_lowercase(),
                ));
            }
        }
    }
    if let Some(path) = &input.facts.utsns {
        list.push(namespace(LinuxNamespaceType::Uts, Some(path.as_str()))?);
    }
    match (wanted.pid, &input.facts.pidns, &input.target_pidns) {
        (NamespaceMode::Container, _, _) => list.push(namespace(LinuxNamespaceType::Pid, None)?),
        (NamespaceMode::Pod, Some(path), _) => list.push(namespace(LinuxNamespaceType::Pid, Some(path.as_str()))?),
        (NamespaceMode::Pod, None, _) => return Err(Error::invalid("the sandbox has no PID namespace to share")),
        (NamespaceMode::Target, _, Some(path)) => list.push(namespace(LinuxNamespaceType::Pid, Some(path))?),
        (NamespaceMode::Target, _, None) => return Err(Error::invalid("no target container is given")),
        (NamespaceMode::Node, _, _) => {}
    }
    if input.host.cgroup_v2 && !input.config.security.privileged {
        list.push(namespace(LinuxNamespaceType::Cgroup, None)?);
    }
    Ok(list)
}

fn namespace(kind: LinuxNamespaceType, path: Option<&str>) -> Result<LinuxNamespace> {
    let builder = LinuxNamespaceBuilder::default().typ(kind);
    built(match path {
        Some(path) => builder.path(path).build(),
        None => builder.build(),
    })
}

/// Limits for the OCI runtime; what the node can't enforce is refused, what only says "no limit" is left out.
pub fn resources(asked: &Resources, host: &HostFacts, pids_limit: i64) -> Result<LinuxResources> {
    for (name, list, online) in
        [("cpuset_cpus", &asked.cpuset_cpus, &host.online_cpus), ("cpuset_mems", &asked.cpuset_mems, &host.online_mems)]
    {
        if let Some(online) = online.as_ref().filter(|_| !list.is_empty())
            && let Some(absent) = limits::numbers(name, list)?.difference(online).next()
        {
            return Err(Error::invalid(format!("{name} {list:?}: this node has no number {absent}")));
        }
    }
    if (1..MEMORY_MIN).contains(&asked.memory_limit) {
        return Err(Error::invalid(format!(
            "memory_limit_in_bytes {}: no container starts with less than {MEMORY_MIN}",
            asked.memory_limit
        )));
    }
    let mut limits = LinuxResources::default();
    limits.set_devices(None);
    let mut cpu = LinuxCpu::default();
    let positive = |n: i64| u64::try_from(n).ok().filter(|n| *n > 0);
    cpu.set_shares(positive(asked.cpu_shares));
    cpu.set_period(positive(asked.cpu_period));
    cpu.set_quota((asked.cpu_quota != 0).then_some(asked.cpu_quota));
    cpu.set_cpus((!asked.cpuset_cpus.is_empty()).then(|| asked.cpuset_cpus.clone()));
    cpu.set_mems((!asked.cpuset_mems.is_empty()).then(|| asked.cpuset_mems.clone()));
    limits.set_cpu(Some(cpu));
    let mut memory = LinuxMemory::default();
    memory.set_limit((asked.memory_limit > 0).then_some(asked.memory_limit));
    if asked.memory_swap_limit > 0 && host.swap_limit {
        memory.set_swap(Some(asked.memory_swap_limit));
    } else if asked.memory_swap_limit > asked.memory_limit {
        return Err(Error::new(Kind::Unimplemented, "a swap limit is asked for, but this node can't limit swap"));
    }
    limits.set_memory(Some(memory));
    if pids_limit > 0 {
        limits.set_pids(Some(built(LinuxPidsBuilder::default().limit(pids_limit).build())?));
    }
    let mut huge = Vec::new();
    for (size, bytes) in &asked.hugepages {
        if !host.hugetlb {
            // Kubelets send a zero for every size to every node.
            if *bytes > 0 {
                return Err(Error::new(
                    Kind::Unimplemented,
                    format!("hugepages-{size}: this node has no hugetlb controller"),
                ));
            }
            continue;
        }
        if !host.hugepage_sizes.contains(size) {
            if *bytes > 0 {
                return Err(Error::invalid(format!("hugepages-{size}: this node has no pages of that size")));
            }
            continue;
        }
        let limit =
            i64::try_from(*bytes).map_err(|_| Error::invalid(format!("hugepages-{size}: {bytes} is out of range")))?;
        huge.push(built(LinuxHugepageLimitBuilder::default().page_size(size.clone()).limit(limit).build())?);
    }
    limits.set_hugepage_limits((!huge.is_empty()).then_some(huge));
    if !asked.unified.is_empty() {
        if !host.cgroup_v2 {
            return Err(Error::new(Kind::Unimplemented, "unified resources need cgroup v2"));
        }
        if let Some(bad) = asked.unified.keys().find(|k| k.contains('/') || k.starts_with("cgroup.")) {
            return Err(Error::invalid(format!("unified resource {bad:?} is not a controller's file")));
        }
        limits.set_unified(Some(asked.unified.clone().into_iter().collect::<HashMap<_, _>>()));
    }
    Ok(limits)
}

/// What changes in the limits of a container that is there: what is asked for, with what the kernel wants beside it.
/// Refused as in [`resources`].
pub fn update(asked: &Resources, merged: &Resources, host: &HostFacts) -> Result<LinuxResources> {
    let mut changed = asked.clone();
    if asked.cpu_quota != 0 || asked.cpu_period != 0 {
        (changed.cpu_quota, changed.cpu_period) = (merged.cpu_quota, merged.cpu_period);
    }
    if asked.memory_limit != 0 || asked.memory_swap_limit != 0 {
        (changed.memory_limit, changed.memory_swap_limit) = (merged.memory_limit, merged.memory_swap_limit);
    }
    let mut limits = resources(&changed, host, 0)?;
    if changed.memory_limit < 0 {
        let mut memory = LinuxMemory::default();
        memory.set_limit(Some(-1));
        memory.set_swap(host.swap_limit.then_some(-1));
        limits.set_memory(Some(memory));
    }
    Ok(limits)
}

/// Deny everything but what was asked for (the runtime adds null, zero and their like); privileged: allow everything.
fn device_rules(input: &SpecInput<'_>) -> Result<Vec<LinuxDeviceCgroup>> {
    let rule = || LinuxDeviceCgroupBuilder::default().access("rwm");
    if input.config.security.privileged {
        return Ok(vec![built(rule().allow(true).build())?]);
    }
    let mut rules = vec![built(rule().allow(false).build())?];
    for (device, access) in &input.devices {
        if matches!(device.typ(), LinuxDeviceType::C | LinuxDeviceType::B) {
            let rule = LinuxDeviceCgroupBuilder::default()
                .allow(true)
                .typ(device.typ())
                .major(device.major())
                .minor(device.minor())
                .access(access.as_str());
            rules.push(built(rule.build())?);
        }
    }
    Ok(rules)
}

/// Whether the end of its first process leaves others behind: no PID namespace of its own.
pub fn shares_pids(input: &SpecInput<'_>) -> bool {
    host_pid(input) || input.config.security.namespaces.pid != NamespaceMode::Container
}
