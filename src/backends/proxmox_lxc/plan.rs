//! What a pod's CT is to be like, as a pure function of the pod.

use crate::backends::lxc::limits::weight;
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
    /// MiB.
    pub swap: u64,
    /// CPUs; 0: all.
    pub cpus: f64,
    /// Share of CPU time beside other CTs, 1 to 10000; None: Proxmox's own, 100.
    pub weight: Option<u64>,
}

impl Limits {
    /// As the keys of a configuration.
    pub fn keys(&self) -> Vec<(&'static str, String)> {
        let mut keys = vec![
            ("memory", self.memory.to_string()),
            ("swap", self.swap.to_string()),
            ("cpulimit", self.cpus.to_string()),
        ];
        keys.extend(self.weight.map(|weight| ("cpuunits", weight.to_string())));
        keys
    }
}

/// `node`: bytes of memory and of swap of the node, for pods without a limit. Proxmox would give them 512 MiB; and a kubelet limits
/// swap by container.
pub fn limits(resources: &Resources, overhead: &Resources, node: (u64, u64)) -> Limits {
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let memory = match resources.memory_limit {
        limit if limit > 0 => limit.saturating_add(overhead.memory_limit.max(0)).unsigned_abs(),
        _ => node.0,
    };
    let swap = match (resources.memory_limit, resources.memory_swap_limit) {
        // Of both together, as cgroup v1 has it.
        (limit, both) if limit > 0 && both > 0 => (both - limit).max(0).unsigned_abs(),
        _ => node.1,
    };
    let shares = Some(resources.cpu_shares).filter(|shares| *shares > 0);
    let weight = shares.map(|shares| weight(shares.saturating_add(overhead.cpu_shares.max(0)).unsigned_abs()));
    Limits { memory: mib(memory).max(MIN_MEMORY), swap: mib(swap), cpus: cpus(resources, overhead), weight }
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
        swap: Some(limits.swap),
        guest: NewGuest {
            memory: Some(limits.memory),
            cpulimit: Some(limits.cpus),
            tags: tags(pod),
            description: Some(identity.notes(&words(pod))?),
            pool: Some(pool.to_owned()).filter(|p| !p.is_empty()),
            extra: limits.weight.map(|weight| ("cpuunits".to_owned(), weight.to_string())).into_iter().collect(),
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
        for (name, host) in [
            ("web-0", "web-0"),
            ("Ä_b;c", "b-c"),
            ("", "pod"),
            ("a..b_.c-", "a.b.c"),
            (&"x".repeat(90), &"x".repeat(63)),
        ] {
            let limits = Limits { memory: 512, swap: 0, cpus: 0.0, weight: Some(39) };
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
        let node = (8 << 30, 1 << 30);
        let all = Limits { memory: 8192, swap: 1024, cpus: 0.0, weight: None };
        assert_eq!(limits(&none, &none, node), all);
        let asked = Resources { memory_limit: (64 << 20) + 1, cpu_quota: 50_001, cpu_period: 100_000, ..none.clone() };
        let over = Resources { memory_limit: 10 << 20, ..none.clone() };
        assert_eq!(limits(&asked, &over, node), Limits { memory: 75, cpus: 0.51, ..all });
        let tiny = Resources { memory_limit: 1, ..none.clone() };
        assert_eq!(limits(&tiny, &none, (0, 0)).memory, 16);
        let swaps = |both: i64| limits(&Resources { memory_swap_limit: both, ..asked.clone() }, &none, node).swap;
        assert_eq!([(64 << 20) + 1, 96 << 20, 1].map(swaps), [0, 32, 0]);
        let weighs = |shares: i64| limits(&Resources { cpu_shares: shares, ..none.clone() }, &none, node).weight;
        assert_eq!([0, 2, 1024, 262_144].map(weighs), [None, Some(1), Some(100), Some(10_000)]);
        let keys = Limits { weight: Some(1), ..all }.keys();
        assert_eq!(keys.iter().map(|(k, _)| *k).collect::<Vec<_>>(), ["memory", "swap", "cpulimit", "cpuunits"]);
    }
}
