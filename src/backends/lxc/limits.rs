//! Limits of a container as files of its cgroup: in liblxc's configuration when it is made, written by us later.
//!
//! Pure. Values are the kernel's, from those of the OCI spec (which are cgroup v1's).

use oci_spec::runtime::{LinuxBlockIo, LinuxDeviceCgroup, LinuxDeviceType, LinuxResources};

use super::lines::is_key;
use crate::core::error::{Error, Result};

/// A file of a cgroup, named with its controller first ("memory.max"), and what is written into it.
pub type Setting = (String, String);

/// All files that `limits` mean, in the order in which they can be written.
pub fn settings(limits: &LinuxResources, v2: bool) -> Result<Vec<Setting>> {
    let mut out: Vec<Setting> = Vec::new();
    let mut put = |file: &str, value: String| out.push((file.to_owned(), value));
    if let Some(cpu) = limits.cpu() {
        let (quota, period) = (cpu.quota(), cpu.period());
        if v2 {
            if let Some(shares) = cpu.shares() {
                put("cpu.weight", weight(shares).to_string());
            }
            if quota.is_some() || period.is_some() {
                let quota = quota.filter(|q| *q > 0).map_or("max".to_owned(), |q| q.to_string());
                put("cpu.max", format!("{quota} {}", period.unwrap_or(100_000)));
            }
        } else {
            if let Some(shares) = cpu.shares() {
                put("cpu.shares", shares.to_string());
            }
            if let Some(period) = period {
                put("cpu.cfs_period_us", period.to_string());
            }
            if let Some(quota) = quota {
                put("cpu.cfs_quota_us", quota.to_string());
            }
        }
        for (file, list) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
            if let Some(list) = list {
                put(file, list.clone());
            }
        }
    }
    if let Some(memory) = limits.memory() {
        let bytes = |n: i64| if n < 0 { if v2 { "max".to_owned() } else { "-1".to_owned() } } else { n.to_string() };
        match (v2, memory.limit(), memory.swap()) {
            (true, limit, swap) => {
                if let Some(limit) = limit {
                    put("memory.max", bytes(limit));
                }
                if let Some(swap) = swap {
                    // v1's limit is of both together.
                    let alone = if swap < 0 { swap } else { (swap - limit.unwrap_or(0).max(0)).max(0) };
                    put("memory.swap.max", bytes(alone));
                }
            }
            (false, limit, swap) => {
                if let Some(limit) = limit {
                    put("memory.limit_in_bytes", bytes(limit));
                }
                if let Some(swap) = swap {
                    put("memory.memsw.limit_in_bytes", bytes(swap));
                }
            }
        }
    }
    if let Some(pids) = limits.pids() {
        let limit = pids.limit();
        put("pids.max", if limit > 0 { limit.to_string() } else { "max".into() });
    }
    for huge in limits.hugepage_limits().iter().flatten() {
        let file = if v2 { "max" } else { "limit_in_bytes" };
        put(&format!("hugetlb.{}.{file}", huge.page_size()), huge.limit().to_string());
    }
    if let Some(class) = limits.block_io() {
        out.extend(block_io(class, v2));
    }
    let mut unified: Vec<_> = limits.unified().iter().flatten().collect();
    unified.sort();
    for (file, value) in unified {
        if !is_key(file) || !file.contains('.') {
            return Err(Error::invalid(format!("unified resource {file:?} is not a controller's file")));
        }
        // In liblxc's configuration that is no file but its list of devices, and an empty value takes a line back.
        if file.starts_with("devices.") {
            return Err(Error::invalid(format!("unified resource {file:?}: cgroup v2 has no such file")));
        }
        if value.trim().is_empty() {
            return Err(Error::invalid(format!("unified resource {file:?} has no value")));
        }
        out.retain(|(known, _)| known != file);
        out.push((file.clone(), value.clone()));
    }
    Ok(out)
}

/// Weights and limits of block devices. On v1 the weights are those of BFQ: no kernel that we run on has the scheduler of the others.
fn block_io(class: &LinuxBlockIo, v2: bool) -> Vec<Setting> {
    let mut out = Vec::new();
    // 10 to 1000 as 1 to 10000.
    let weight = |n: u16| if v2 { 1 + (u64::from(n).max(10) - 10) * 9999 / 990 } else { u64::from(n) };
    let (all, one) = if v2 { ("io.weight", "io.weight") } else { ("blkio.bfq.weight", "blkio.bfq.weight_device") };
    if let Some(n) = class.weight() {
        out.push((all.to_owned(), weight(n).to_string()));
    }
    for device in class.weight_device().iter().flatten() {
        if let Some(n) = device.weight() {
            out.push((one.to_owned(), format!("{}:{} {}", device.major(), device.minor(), weight(n))));
        }
    }
    let limits = [
        (class.throttle_read_bps_device(), "rbps", "read_bps"),
        (class.throttle_write_bps_device(), "wbps", "write_bps"),
        (class.throttle_read_iops_device(), "riops", "read_iops"),
        (class.throttle_write_iops_device(), "wiops", "write_iops"),
    ];
    for (devices, v2_name, v1_name) in limits {
        for device in devices.iter().flatten() {
            let number = format!("{}:{}", device.major(), device.minor());
            out.push(match (v2, device.rate()) {
                // The kernel keeps what a line does not name.
                (true, 0) => ("io.max".to_owned(), format!("{number} {v2_name}=max")),
                (true, rate) => ("io.max".to_owned(), format!("{number} {v2_name}={rate}")),
                (false, rate) => (format!("blkio.throttle.{v1_name}_device"), format!("{number} {rate}")),
            });
        }
    }
    out
}

/// cpu.shares (2 to 262144, 1024 the default) as cpu.weight (1 to 10000, 100 the default): on a logarithmic scale, as
/// crun and runc do it since 2025, an exact 100 for 1024 and 1 and 10000 at the ends.
pub(in crate::backends) fn weight(shares: u64) -> u64 {
    match shares {
        0..=2 => 1,
        262_144.. => 10_000,
        _ => {
            let l = (shares as f64).log2();
            let exponent = (l * l + 125.0 * l) / 612.0 - 7.0 / 34.0;
            (10f64.powf(exponent).ceil() as u64).clamp(1, 10_000)
        }
    }
}

/// Device rules in liblxc's words: what is denied first, then what every container has, then what was asked for.
pub fn devices(rules: &[LinuxDeviceCgroup], terminals: bool) -> Vec<(bool, String)> {
    let word = |rule: &LinuxDeviceCgroup| {
        let kind = match rule.typ() {
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => "c",
            Some(LinuxDeviceType::B) => "b",
            _ => return "a".to_owned(),
        };
        let number = |n: Option<i64>| n.filter(|n| *n >= 0).map_or("*".to_owned(), |n| n.to_string());
        let access = rule.access().clone().unwrap_or_else(|| "rwm".into());
        format!("{kind} {}:{} {access}", number(rule.major()), number(rule.minor()))
    };
    let mut out: Vec<(bool, String)> = Vec::new();
    let mut own = terminals;
    for rule in rules {
        if rule.access().as_deref() == Some("") {
            continue;
        }
        out.push((rule.allow(), word(rule)));
        if own && !rule.allow() {
            // null, zero, full, random, urandom, tty, ptmx, terminals; nodes of anything may be made.
            for text in ["c *:* m", "b *:* m", "c 1:3 rwm", "c 1:5 rwm", "c 1:7 rwm", "c 1:8 rwm", "c 1:9 rwm"] {
                out.push((true, text.into()));
            }
            for text in ["c 5:0 rwm", "c 5:2 rwm", "c 136:* rwm"] {
                out.push((true, text.into()));
            }
            own = false;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backends::oci::HostFacts;
    use crate::backends::oci::linux;
    use crate::core::spec::Resources;

    fn of(asked: &Resources, v2: bool) -> Vec<(String, String)> {
        let host = HostFacts { cgroup_v2: v2, swap_limit: true, ..Default::default() };
        settings(&linux::resources(asked, &host, 50).expect("limits"), v2).expect("fit")
    }

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(a, b)| (a.to_string(), b.to_string())).collect()
    }

    #[test]
    fn unified_resources_that_liblxc_would_take_for_something_else() {
        for (file, value, good) in
            [("devices.allow", "a *:* rwm", false), ("memory.high", " ", false), ("memory.high", "1000000", true)]
        {
            let mut limits = LinuxResources::default();
            limits.set_unified(Some([(file.to_owned(), value.to_owned())].into()));
            assert_eq!(settings(&limits, true).is_ok(), good, "{file} {value:?}");
        }
    }

    #[test]
    fn both_kinds_of_cgroups() {
        let asked = Resources {
            cpu_shares: 1024,
            cpu_quota: 50_000,
            cpu_period: 100_000,
            memory_limit: 64 << 20,
            memory_swap_limit: 96 << 20,
            cpuset_cpus: "0-1".into(),
            ..Default::default()
        };
        assert_eq!(
            of(&asked, true),
            pairs(&[
                ("cpu.weight", "100"),
                ("cpu.max", "50000 100000"),
                ("cpuset.cpus", "0-1"),
                ("memory.max", "67108864"),
                ("memory.swap.max", "33554432"),
                ("pids.max", "50"),
            ])
        );
        assert_eq!(
            of(&asked, false),
            pairs(&[
                ("cpu.shares", "1024"),
                ("cpu.cfs_period_us", "100000"),
                ("cpu.cfs_quota_us", "50000"),
                ("cpuset.cpus", "0-1"),
                ("memory.limit_in_bytes", "67108864"),
                ("memory.memsw.limit_in_bytes", "100663296"),
                ("pids.max", "50"),
            ])
        );
    }

    #[test]
    fn classes_of_block_io() {
        let text = r#"{"weight": 1000, "weightDevice": [{"major": 8, "minor": 0, "weight": 10}],
            "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 5}, {"major": 8, "minor": 16, "rate": 0}],
            "throttleWriteIOPSDevice": [{"major": 8, "minor": 0, "rate": 7}]}"#;
        let mut limits = LinuxResources::default();
        limits.set_block_io(Some(serde_json::from_str(text).expect("a class")));
        let v2 = [
            ("io.weight", "10000"),
            ("io.weight", "8:0 1"),
            ("io.max", "8:0 rbps=5"),
            ("io.max", "8:16 rbps=max"),
            ("io.max", "8:0 wiops=7"),
        ];
        assert_eq!(settings(&limits, true).expect("fit"), pairs(&v2));
        let v1 = [
            ("blkio.bfq.weight", "1000"),
            ("blkio.bfq.weight_device", "8:0 10"),
            ("blkio.throttle.read_bps_device", "8:0 5"),
            ("blkio.throttle.read_bps_device", "8:16 0"),
            ("blkio.throttle.write_iops_device", "8:0 7"),
        ];
        assert_eq!(settings(&limits, false).expect("fit"), pairs(&v1));
    }

    #[test]
    fn weights_are_monotonous_and_exact_where_it_counts() {
        assert_eq!((weight(2), weight(1024), weight(262_144)), (1, 100, 10_000));
        assert!((2..3000).all(|s| weight(s) <= weight(s + 1)));
    }
}
