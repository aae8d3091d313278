//! What a pod's CT is to be like, as a pure function of the pod.

use crate::backends::proxmox::Unit;
use crate::backends::proxmox::plan::{cpus, host_name, tags, words};
use crate::core::error::{Error, Result};
use crate::core::spec::{Resources, SandboxConfig};
use crate::integrations::proxmox_api::{CtSpec, GuestKind, Identity, NewGuest, Version, Vmid, Volume};

/// What a pod is in Proxmox.
pub const CT: Unit = Unit {
    kind: GuestKind::Ct,
    handler: "proxmox-lxc",
    word: "CT",
    note: "proxmox-ct",
    taken: "proxmox-ct-taken",
    tool: "pct",
    dead_locks: ["create", "destroyed"],
    orphans: "proxmox orphans; handlers.proxmox-lxc.orphans",
};
/// MiB of a CT's root file system: the init, and what Proxmox puts there.
const ROOTFS: u64 = 64;
/// Least memory that Proxmox takes, in MiB.
const MIN_MEMORY: u64 = 16;

/// First release whose CTs can have addresses that the node sets, and a program other than /sbin/init.
const SINCE: (u32, u32) = (9, 1);

/// The first two numbers of a version ("9.1.2", "6.17.2-1-pve").
pub fn numbers(version: &str) -> (u32, u32) {
    let mut numbers = version.split(['.', '-']).map_while(|n| n.parse::<u32>().ok());
    (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default())
}

/// Whether a release of Proxmox has what a key of the handler asks for.
pub fn check_release(version: &Version, key: &str, what: &str) -> Result<()> {
    if numbers(&version.version) >= SINCE {
        return Ok(());
    }
    let (major, minor) = SINCE;
    Err(Error::precondition(format!(
        "handlers.proxmox-lxc.{key} needs Proxmox VE {major}.{minor} or later, where {what}; this is {}",
        version.version
    )))
}

/// Cgroup of a CT, from the hierarchies' roots.
pub fn cgroup(vmid: Vmid) -> String {
    format!("/lxc/{vmid}")
}

/// Limits of a CT as Proxmox has them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// MiB.
    pub memory: u64,
    /// CPUs; 0: all.
    pub cpus: f64,
}

/// `node`: bytes of memory of the node, for pods without a limit: Proxmox would give them 512 MiB.
pub fn limits(resources: &Resources, overhead: &Resources, node: u64) -> Limits {
    let memory = match resources.memory_limit {
        limit if limit > 0 => limit.saturating_add(overhead.memory_limit.max(0)).unsigned_abs(),
        _ => node,
    };
    Limits { memory: memory.div_ceil(1 << 20).max(MIN_MEMORY), cpus: cpus(resources, overhead) }
}

/// The CT. `identity` says whose it is.
pub fn spec(
    pod: &SandboxConfig,
    identity: &Identity,
    template: &str,
    storage: &str,
    pool: &str,
    limits: Limits,
) -> Result<CtSpec> {
    Ok(CtSpec {
        ostemplate: template.to_owned(),
        rootfs: Some(Volume::allocate(storage, ROOTFS)),
        hostname: Some(host_name(pod)),
        swap: Some(0),
        guest: NewGuest {
            memory: Some(limits.memory),
            cpulimit: Some(limits.cpus),
            tags: tags(pod),
            description: Some(identity.notes(&words(pod))?),
            pool: Some(pool.to_owned()).filter(|p| !p.is_empty()),
            ..NewGuest::default()
        },
        ostype: Some("unmanaged".to_owned()),
        ..CtSpec::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, namespace: &str) -> SandboxConfig {
        let mut pod = crate::core::records::tests::pod(name).config;
        pod.metadata.namespace = namespace.into();
        pod
    }

    #[test]
    fn names_fit_dns_and_tags_are_words() {
        let identity = Identity { installation: "i".into(), pod: "p".into() };
        for (name, host) in [("web-0", "web-0"), ("Ä_b;c", "b-c"), ("", "pod"), (&"x".repeat(90), &"x".repeat(63))] {
            let limits = Limits { memory: 512, cpus: 0.0 };
            let spec = spec(&pod(name, "a;b=c\nx"), &identity, "local:vztmpl/t.tar", "local", "", limits).unwrap();
            assert_eq!(spec.hostname.as_deref(), Some(host), "{name:?}");
            assert_eq!(spec.guest.tags.to_string(), "k8s;ns-a-b-c-x");
            assert_eq!(Identity::find(spec.guest.description.as_deref().unwrap()), Some(identity.clone()));
            assert_eq!((spec.guest.pool, spec.privileged), (None, false));
        }
    }

    #[test]
    fn a_pod_without_limits_has_the_node() {
        let none = Resources::default();
        assert_eq!(limits(&none, &none, 8 << 30), Limits { memory: 8192, cpus: 0.0 });
        let asked = Resources { memory_limit: (64 << 20) + 1, cpu_quota: 50_001, cpu_period: 100_000, ..none.clone() };
        let over = Resources { memory_limit: 10 << 20, ..none.clone() };
        assert_eq!(limits(&asked, &over, 8 << 30), Limits { memory: 75, cpus: 0.51 });
        let tiny = Resources { memory_limit: 1, ..none.clone() };
        assert_eq!(limits(&tiny, &none, 0).memory, 16);
    }
}
