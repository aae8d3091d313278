//! What is wrong with limits whatever the node: signs, ranges, lists that are none. Pure.
//!
//! Called by the engine before it makes or changes anything. What only some nodes can do is for the backends to refuse.

use std::collections::BTreeSet;

use super::error::{Error, Result};
use super::spec::Resources;

/// More CPUs or memory nodes than this has no Linux.
const NUMBER_MAX: u32 = 1 << 16;

/// Periods and the least quota of the CPU controller, in microseconds (kernel/sched/core.c, tg_set_cfs_bandwidth).
const PERIODS: std::ops::RangeInclusive<i64> = 1_000..=1_000_000;
const QUOTA_MIN: i64 = 1_000;

/// The numbers of a list as the kernel writes it ("0-2,7"); errors call it `name`.
pub fn numbers(name: &str, list: &str) -> Result<BTreeSet<u32>> {
    let bad = || Error::invalid(format!("{name} {list:?} is not a list of numbers and ranges"));
    let number = |text: &str| text.trim().parse::<u32>().ok().filter(|n| *n < NUMBER_MAX).ok_or_else(bad);
    let mut found = BTreeSet::new();
    for part in list.trim().split(',').filter(|p| !p.trim().is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err(bad());
        }
        found.extend(first..=last);
    }
    Ok(found)
}

/// What no kernel takes. `merged`: the limits as they will be, with what `asked` leaves as it is.
pub fn check(asked: &Resources, merged: &Resources) -> Result<()> {
    let bad = |what: String| Err(Error::invalid(what));
    if asked.cpu_period < 0 || asked.cpu_shares < 0 || asked.cpu_quota < -1 {
        return bad("a CPU limit is negative".into());
    }
    if asked.cpu_period != 0 && !PERIODS.contains(&asked.cpu_period) {
        return bad(format!("cpu_period {} is not in 1000..1000000 (microseconds)", asked.cpu_period));
    }
    if (1..QUOTA_MIN).contains(&asked.cpu_quota) {
        return bad(format!("cpu_quota {} is below {QUOTA_MIN} (microseconds)", asked.cpu_quota));
    }
    if asked.memory_limit < -1 || asked.memory_swap_limit < -1 {
        return bad("a memory limit is negative".into());
    }
    let (memory, both) = (merged.memory_limit, merged.memory_swap_limit);
    if both > 0 && (memory > both || memory == -1) {
        return bad(format!(
            "memory_limit_in_bytes {memory} is above memory_swap_limit_in_bytes {both}, which counts both"
        ));
    }
    for (name, list) in [("cpuset_cpus", &asked.cpuset_cpus), ("cpuset_mems", &asked.cpuset_mems)] {
        numbers(name, list)?;
    }
    match asked.oom_score_adj {
        Some(score) if !(-1000..=1000).contains(&score) => bad(format!("oom_score_adj {score} is not in -1000..1000")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonsense_is_refused_by_name() {
        let refused = |asked: Resources| check(&asked, &asked).expect_err("refused").chain();
        let base = Resources::default;
        assert!(refused(Resources { cpu_quota: -2, ..base() }).contains("CPU"));
        assert!(refused(Resources { cpu_period: 999, ..base() }).contains("cpu_period"));
        assert!(refused(Resources { cpu_period: 1_000_001, ..base() }).contains("cpu_period"));
        assert!(refused(Resources { cpu_quota: 999, ..base() }).contains("cpu_quota"));
        assert!(refused(Resources { memory_limit: -7, ..base() }).contains("memory"));
        assert!(refused(Resources { memory_limit: 9, memory_swap_limit: 8, ..base() }).contains("memory_swap_limit"));
        assert!(refused(Resources { cpuset_cpus: "0;1".into(), ..base() }).contains("cpuset_cpus"));
        assert!(refused(Resources { cpuset_cpus: "3-1".into(), ..base() }).contains("cpuset_cpus"));
        assert!(refused(Resources { cpuset_mems: "0-4294967295".into(), ..base() }).contains("cpuset_mems"));
        assert!(refused(Resources { oom_score_adj: Some(1001), ..base() }).contains("oom_score_adj"));
        let fits =
            Resources { cpu_quota: -1, memory_limit: 8, memory_swap_limit: 8, cpuset_cpus: "0-1,3".into(), ..base() };
        check(&fits, &fits).expect("fits");
    }
}
