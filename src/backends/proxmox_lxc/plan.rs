//! What a pod's CT is to be like, as a pure function of the pod.
//!
//! Values that Proxmox would not take, or would take for something else, are made to fit where they only decorate (name, tags,
//! notes) and refused where they count.

use crate::backends::proxmox::Unit;
use crate::core::error::Result;
use crate::core::spec::{Resources, SandboxConfig};
use crate::integrations::proxmox_api::{CtSpec, GuestKind, Identity, NewGuest, Tags, Vmid, Volume};

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
/// Longest host name.
const NAME_MAX: usize = 63;

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
    let cpus = |r: &Resources| match (r.cpu_quota, r.cpu_period) {
        (quota, period) if quota > 0 && period > 0 => quota as f64 / period as f64,
        _ => 0.0,
    };
    let cpus = match cpus(resources) {
        0.0 => 0.0,
        // As precise as Proxmox shows it, and never less than was asked for.
        some => ((some + cpus(overhead)) * 100.0).ceil() / 100.0,
    };
    Limits { memory: memory.div_ceil(1 << 20).max(MIN_MEMORY), cpus }
}

/// Letters, digits and hyphens, as DNS has them; the pod's name where it is one.
pub(in crate::backends) fn host_name(pod: &SandboxConfig) -> String {
    let wanted = if pod.hostname.is_empty() { &pod.metadata.name } else { &pod.hostname };
    let name: String = wanted
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || c == '.' { c.to_ascii_lowercase() } else { '-' })
        .take(NAME_MAX)
        .collect();
    let name = name.trim_matches(['-', '.']).to_owned();
    if name.is_empty() { "pod".to_owned() } else { name }
}

/// Words for the GUI's lists.
pub(in crate::backends) fn tags(pod: &SandboxConfig) -> Tags {
    let word = |text: &str| {
        text.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' }).collect::<String>()
    };
    format!("k8s;ns-{}", word(&pod.metadata.namespace)).parse().unwrap_or_default()
}

/// What is to be seen in the GUI's notes; the identity comes below it.
pub(in crate::backends) fn words(pod: &SandboxConfig) -> String {
    let m = &pod.metadata;
    let line = |text: &str| text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(500).collect::<String>();
    format!("Pod {}/{}\n\nuid {}", line(&m.namespace), line(&m.name), line(&m.uid))
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
