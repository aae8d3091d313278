//! Limits in NRI's words and in ours. Pure; what we can't keep is refused by its name.

use super::wire::{HugepageLimit, LinuxCpu, LinuxMemory, LinuxResources, OptionalInt64, OptionalUInt64};
use crate::core::error::{Error, Kind, Result};
use crate::core::spec::Resources;

/// Ours in NRI's words; what is not given is not there.
pub fn to_wire(of: &Resources) -> LinuxResources {
    let signed = |n: i64| (n != 0).then_some(OptionalInt64 { value: n });
    let unsigned = |n: i64| u64::try_from(n).ok().filter(|n| *n > 0).map(|value| OptionalUInt64 { value });
    LinuxResources {
        memory: Some(LinuxMemory {
            limit: signed(of.memory_limit),
            swap: signed(of.memory_swap_limit),
            ..Default::default()
        }),
        cpu: Some(LinuxCpu {
            shares: unsigned(of.cpu_shares),
            quota: signed(of.cpu_quota),
            period: unsigned(of.cpu_period),
            cpus: of.cpuset_cpus.clone(),
            mems: of.cpuset_mems.clone(),
            ..Default::default()
        }),
        hugepage_limits: of
            .hugepages
            .iter()
            .map(|(size, limit)| HugepageLimit { page_size: size.clone(), limit: *limit })
            .collect(),
        unified: of.unified.clone(),
        ..Default::default()
    }
}

/// NRI's in our words; the most processes are not among ours.
pub fn to_core(of: &LinuxResources) -> Result<Resources> {
    let unsigned = |name: &str, n: &Option<OptionalUInt64>| {
        i64::try_from(n.as_ref().map_or(0, |n| n.value)).map_err(|_| Error::invalid(format!("{name} is out of range")))
    };
    let signed = |n: &Option<OptionalInt64>| n.as_ref().map_or(0, |n| n.value);
    let (memory, cpu) = (of.memory.unwrap_or_default(), of.cpu.clone().unwrap_or_default());
    Ok(Resources {
        cpu_period: unsigned("cpu.period", &cpu.period)?,
        cpu_quota: signed(&cpu.quota),
        cpu_shares: unsigned("cpu.shares", &cpu.shares)?,
        memory_limit: signed(&memory.limit),
        memory_swap_limit: signed(&memory.swap),
        oom_score_adj: None,
        cpuset_cpus: cpu.cpus,
        cpuset_mems: cpu.mems,
        hugepages: of.hugepage_limits.iter().map(|h| (h.page_size.clone(), h.limit)).collect(),
        unified: of.unified.clone(),
    })
}

/// Refuses what no handler keeps. `made`: the container is being made, else it is there.
pub fn check(of: &LinuxResources, made: bool) -> Result<()> {
    let (memory, cpu) = (of.memory.unwrap_or_default(), of.cpu.clone().unwrap_or_default());
    for (name, there) in [
        ("memory.reservation", memory.reservation.is_some()),
        ("memory.kernel", memory.kernel.is_some()),
        ("memory.kernel_tcp", memory.kernel_tcp.is_some()),
        ("memory.swappiness", memory.swappiness.is_some()),
        ("memory.disable_oom_killer", memory.disable_oom_killer.is_some()),
        ("memory.use_hierarchy", memory.use_hierarchy.is_some()),
        ("cpu.realtime_runtime", cpu.realtime_runtime.is_some()),
        ("cpu.realtime_period", cpu.realtime_period.is_some()),
        ("blockio_class of a container that is there", of.blockio_class.is_some() && !made),
        ("rdt_class of a container that is there", of.rdt_class.is_some() && !made),
        ("devices", !of.devices.is_empty()),
        ("pids of a container that is there", of.pids.is_some() && !made),
    ] {
        if there {
            return Err(Error::new(
                Kind::Unimplemented,
                format!("linux.resources.{name} can't be set by a plugin here"),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_survive_the_way() {
        let ours = Resources {
            cpu_period: 50_000,
            cpu_quota: -1,
            cpu_shares: 512,
            memory_limit: 1 << 30,
            memory_swap_limit: 2 << 30,
            cpuset_cpus: "0-1".into(),
            hugepages: vec![("2MB".into(), 4)],
            unified: [("memory.high".to_owned(), "9".to_owned())].into(),
            ..Default::default()
        };
        assert_eq!(to_core(&to_wire(&ours)).expect("fits"), ours);
        assert_eq!(to_core(&LinuxResources::default()).expect("fits"), Resources::default());
        let mut bad = to_wire(&ours);
        check(&bad, false).expect("can be had");
        bad.cpu = Some(LinuxCpu { period: Some(OptionalUInt64 { value: u64::MAX }), ..Default::default() });
        assert!(to_core(&bad).expect_err("refused").chain().contains("cpu.period"));
    }
}
