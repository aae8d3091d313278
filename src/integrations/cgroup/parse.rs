//! Parsers of cgroup files: flat keys and values, pressure, block I/O. Pure; called by `stats`.
//!
//! The text is the kernel's, but nothing here trusts it: what can't be understood is left out, never a panic.

use crate::core::stats::{DeviceIo, MemorySample, Pressure, PressureLine};

/// v1 says "no limit" with the largest number of whole pages.
const V1_UNLIMITED: u64 = 1 << 62;

/// "key value" lines.
pub(super) fn flat(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key, value.trim().parse().ok()?))
    })
}

/// The number of a file that holds one; "max" and v1's largest number are None.
pub(super) fn limit(text: &str) -> Option<u64> {
    number(text).filter(|n| *n < V1_UNLIMITED)
}

/// The number of a file that holds one.
pub(super) fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// A pressure file; None when there is no line "some".
pub(super) fn pressure(text: &str) -> Option<Pressure> {
    let mut found = Pressure::default();
    let mut some = false;
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let to = match words.next() {
            Some("some") => {
                some = true;
                &mut found.some
            }
            Some("full") => &mut found.full,
            _ => continue,
        };
        *to = pressure_line(words);
    }
    some.then_some(found)
}

fn pressure_line<'a>(words: impl Iterator<Item = &'a str>) -> PressureLine {
    let mut line = PressureLine::default();
    let percent = |value: &str| value.parse::<f64>().ok().filter(|p| p.is_finite()).unwrap_or_default();
    for (key, value) in words.filter_map(|w| w.split_once('=')) {
        match key {
            "avg10" => line.avg10 = percent(value),
            "avg60" => line.avg60 = percent(value),
            "avg300" => line.avg300 = percent(value),
            "total" => line.total_us = value.parse().unwrap_or_default(),
            _ => {}
        }
    }
    line
}

/// memory.stat of v2 into `to`.
pub(super) fn memory_stat_v2(text: &str, to: &mut MemorySample) {
    for (key, value) in flat(text) {
        match key {
            "anon" => to.rss = value,
            "file" => to.cache = value,
            "file_mapped" => to.mapped_file = value,
            "inactive_file" => to.inactive_file = value,
            "active_file" => to.active_file = value,
            "pgfault" => to.faults = value,
            "pgmajfault" => to.major_faults = value,
            "kernel" => to.kernel = Some(value),
            _ => {}
        }
    }
    to.working_set = to.usage.saturating_sub(to.inactive_file);
}

/// memory.stat of v1 into `to`: with everything below the group (`total_`), and the limits in force.
pub(super) fn memory_stat_v1(text: &str, to: &mut MemorySample) {
    let mut both_limit = None;
    for (key, value) in flat(text) {
        match key {
            "total_rss" => to.rss = value,
            "total_cache" => to.cache = value,
            "total_mapped_file" => to.mapped_file = value,
            "total_inactive_file" => to.inactive_file = value,
            "total_active_file" => to.active_file = value,
            "total_pgfault" => to.faults = value,
            "total_pgmajfault" => to.major_faults = value,
            "total_swap" => to.swap = Some(value),
            "hierarchical_memory_limit" => to.limit = Some(value).filter(|n| *n < V1_UNLIMITED),
            "hierarchical_memsw_limit" => both_limit = Some(value).filter(|n| *n < V1_UNLIMITED),
            _ => {}
        }
    }
    to.swap_limit = both_limit.zip(to.limit).map(|(both, memory)| both.saturating_sub(memory));
    to.working_set = to.usage.saturating_sub(to.inactive_file);
}

fn device(name: &str) -> Option<DeviceIo> {
    let (major, minor) = name.split_once(':')?;
    let (major, minor) = (major.parse().ok()?, minor.parse().ok()?);
    Some(DeviceIo { name: name.to_owned(), major, minor, ..Default::default() })
}

/// io.stat of v2: "8:0 rbytes=1 wbytes=2 rios=3 wios=4 ...".
pub(super) fn io_stat_v2(text: &str) -> Vec<DeviceIo> {
    let parse = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let mut io = device(words.next()?)?;
        let mut any = false;
        for (key, value) in words.filter_map(|w| w.split_once('=')) {
            let to = match key {
                "rbytes" => &mut io.read_bytes,
                "wbytes" => &mut io.written_bytes,
                "rios" => &mut io.reads,
                "wios" => &mut io.writes,
                _ => continue,
            };
            *to = value.parse().unwrap_or_default();
            any = true;
        }
        any.then_some(io)
    };
    text.lines().filter_map(parse).collect()
}

/// blkio.throttle.io_service_bytes_recursive and io_serviced_recursive of v1: "8:0 Read 1".
pub(super) fn blkio_v1(bytes: &str, operations: &str) -> Vec<DeviceIo> {
    let mut all: Vec<DeviceIo> = Vec::new();
    for (text, is_bytes) in [(bytes, true), (operations, false)] {
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            let (Some(Some(key)), Some(operation), Some(Ok(value))) =
                (words.next().map(device), words.next(), words.next().map(str::parse::<u64>))
            else {
                continue;
            };
            let i = match all.iter().position(|d| (d.major, d.minor) == (key.major, key.minor)) {
                Some(i) => i,
                None => {
                    all.push(key);
                    all.len() - 1
                }
            };
            match (operation, is_bytes) {
                ("Read", true) => all[i].read_bytes = value,
                ("Write", true) => all[i].written_bytes = value,
                ("Read", false) => all[i].reads = value,
                ("Write", false) => all[i].writes = value,
                _ => {}
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Captured from a container on a v1 host (6.18), shortened in the middle.
    const V1_MEMORY_STAT: &str = "cache 0\nrss 0\nrss_huge 0\nshmem 0\nswap 0\npgfault 0\nhierarchical_memory_limit 67108864\n\
        hierarchical_memsw_limit 9223372036854771712\ntotal_cache 20069195776\ntotal_rss 1787920384\ntotal_mapped_file 387305472\n\
        total_swap 0\ntotal_pgfault 142025016\ntotal_pgmajfault 33541\ntotal_inactive_anon 1787674624\ntotal_active_anon 172032\n\
        total_inactive_file 12548366336\ntotal_active_file 7520759808\ntotal_unevictable 0\n";
    const V1_BYTES: &str = "254:0 Read 3072000\n254:0 Write 4096\n254:0 Sync 3076096\n254:0 Async 0\n254:0 Discard 0\n\
        254:0 Total 3076096\n7:1 Read 512\n7:1 Write 0\nTotal 3076608\n";
    const V1_OPERATIONS: &str = "254:0 Read 120\n254:0 Write 1\n254:0 Total 121\n7:1 Read 1\nTotal 122\n";
    /// After Documentation/admin-guide/cgroup-v2.rst.
    const V2_MEMORY_STAT: &str = "anon 1048576\nfile 4194304\nkernel 262144\nkernel_stack 32768\npagetables 65536\nsec_pagetables 0\n\
        percpu 1080\nsock 0\nvmalloc 0\nshmem 0\nzswap 0\nfile_mapped 2097152\nfile_dirty 0\nfile_writeback 0\nswapcached 0\n\
        inactive_anon 1044480\nactive_anon 4096\ninactive_file 3145728\nactive_file 1048576\nunevictable 0\nslab_reclaimable 98304\n\
        slab_unreclaimable 45056\nworkingset_refault_anon 0\npgfault 812\npgmajfault 3\n";
    const V2_IO_STAT: &str = "8:16 rbytes=1459200 wbytes=314773504 rios=192 wios=353 dbytes=0 dios=0\n\
        8:0 rbytes=90430464 wbytes=299008000 rios=8950 wios=1252 dbytes=50331648 dios=3021\n7:0 \n253:0\n";
    const PRESSURE: &str =
        "some avg10=98.61 avg60=89.08 avg300=57.71 total=914707137\nfull avg10=0.00 avg60=0.12 avg300=0.00 total=7\n";

    #[test]
    fn v1_memory_is_that_of_the_whole_tree() {
        let mut m = MemorySample { usage: 22_726_680_576, ..Default::default() };
        memory_stat_v1(V1_MEMORY_STAT, &mut m);
        assert_eq!((m.rss, m.cache, m.faults, m.major_faults), (1_787_920_384, 20_069_195_776, 142_025_016, 33_541));
        assert_eq!(m.working_set, 22_726_680_576 - 12_548_366_336);
        assert_eq!((m.limit, m.swap, m.swap_limit), (Some(67_108_864), Some(0), None));
        let mut m = MemorySample::default();
        memory_stat_v1("hierarchical_memory_limit 10\nhierarchical_memsw_limit 30\n", &mut m);
        assert_eq!((m.limit, m.swap_limit), (Some(10), Some(20)));
    }

    #[test]
    fn v2_memory() {
        let mut m = MemorySample { usage: 5_000_000, ..Default::default() };
        memory_stat_v2(V2_MEMORY_STAT, &mut m);
        assert_eq!((m.rss, m.cache, m.mapped_file, m.kernel), (1_048_576, 4_194_304, 2_097_152, Some(262_144)));
        assert_eq!((m.faults, m.major_faults, m.working_set), (812, 3, 5_000_000 - 3_145_728));
        // The files are read one after the other: usage may be the smaller one.
        let mut m = MemorySample { usage: 1, ..Default::default() };
        memory_stat_v2(V2_MEMORY_STAT, &mut m);
        assert_eq!(m.working_set, 0);
    }

    #[test]
    fn limits_and_numbers() {
        assert_eq!(
            (limit("max\n"), limit("9223372036854771712\n"), limit("67108864\n")),
            (None, None, Some(67_108_864))
        );
        assert_eq!((number("42\n"), number("-1\n"), number("")), (Some(42), None, None));
    }

    #[test]
    fn pressure_has_two_lines() {
        let p = pressure(PRESSURE).expect("pressure");
        assert_eq!((p.some.avg10, p.some.total_us, p.full.avg60, p.full.total_us), (98.61, 914_707_137, 0.12, 7));
        // Before 5.13 the root's cpu.pressure had no line "full".
        assert!(pressure("some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n").is_some());
        assert_eq!(pressure(""), None);
    }

    #[test]
    fn block_io() {
        let v2 = io_stat_v2(V2_IO_STAT);
        assert_eq!(v2.len(), 2);
        let first = DeviceIo {
            name: "8:16".into(),
            major: 8,
            minor: 16,
            read_bytes: 1_459_200,
            written_bytes: 314_773_504,
            reads: 192,
            writes: 353,
        };
        assert_eq!(v2[0], first);
        let v1 = blkio_v1(V1_BYTES, V1_OPERATIONS);
        let first = DeviceIo {
            name: "254:0".into(),
            major: 254,
            minor: 0,
            read_bytes: 3_072_000,
            written_bytes: 4096,
            reads: 120,
            writes: 1,
        };
        assert_eq!((v1.len(), &v1[0], v1[1].reads), (2, &first, 1));
    }

    proptest! {
        #[test]
        fn hostile_files_never_panic(text in "(?s)[a-z0-9_:= .\n]{0,400}|(?s).{0,200}", key in "total_rss|anon|8:0|some|hierarchical_memory_limit") {
            for text in [text.clone(), format!("{key} {text}"), format!("{key} 18446744073709551615\n{text}"), format!("{key} rbytes={text}")] {
                let mut m = MemorySample { usage: u64::MAX, ..Default::default() };
                memory_stat_v1(&text, &mut m);
                memory_stat_v2(&text, &mut m);
                let _ = (pressure(&text), io_stat_v2(&text), blkio_v1(&text, &text), limit(&text), number(&text), flat(&text).count());
            }
        }
    }
}
