//! Reads what a cgroup uses, on v2 and on v1: a handful of small files, no process, no disk.
//!
//! Called by the backends on a thread for blocking work, for every container of a list: each file is one open, and only
//! those that are wanted are read. A group that is gone has no readings; a file that is missing (no such controller, an
//! older kernel) is a reading that is not told. Nothing fails, nothing is left behind.

use std::collections::HashMap;
use std::io::Read;

use camino::{Utf8Path, Utf8PathBuf};

use super::parse::{blkio_v1, flat, io_stat_v2, limit, memory_stat_v1, memory_stat_v2, number, pressure};
use super::{Hierarchy, Mode};
use crate::core::stats::{CpuSample, DeviceIo, IoSample, MemorySample, TaskSample, Throttling, UnitSample};

/// Files longer than this are cut: none of the kernel's is.
const FILE_MAX: u64 = 256 << 10;
/// Groups below one that are looked at for processes.
const GROUPS_MAX: usize = 1000;

/// What is read of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Depth {
    /// All that metrics need.
    pub details: bool,
    /// Tasks, which details bring as well.
    pub tasks: bool,
}

/// Where each controller's files are, and a buffer that all reads share.
pub struct StatsReader {
    unified: Option<Utf8PathBuf>,
    cpuacct: Option<Utf8PathBuf>,
    cpu: Option<Utf8PathBuf>,
    memory: Option<Utf8PathBuf>,
    blkio: Option<Utf8PathBuf>,
    pids: Option<Utf8PathBuf>,
    buffer: String,
    /// In place of files: those of another kernel, by path.
    given: Option<HashMap<Utf8PathBuf, String>>,
}

/// Files of a v2 group that are looked at.
pub const V2_FILES: [&str; 15] = [
    "cpu.stat",
    "cpu.pressure",
    "memory.current",
    "memory.stat",
    "memory.max",
    "memory.swap.current",
    "memory.swap.max",
    "memory.pressure",
    "memory.peak",
    "memory.events",
    "io.pressure",
    "io.stat",
    "pids.current",
    "pids.max",
    "cgroup.procs",
];

impl Hierarchy {
    /// A reader for this host.
    pub fn stats_reader(&self) -> StatsReader {
        let v1 = |name: &str| self.legacy.get(name).cloned();
        StatsReader {
            unified: self.unified.clone().filter(|_| self.mode == Mode::Unified),
            cpuacct: v1("cpuacct"),
            cpu: v1("cpu"),
            memory: v1("memory"),
            blkio: v1("blkio"),
            pids: v1("pids"),
            buffer: String::with_capacity(8 << 10),
            given: None,
        }
    }
}

impl StatsReader {
    /// A reader of texts that were read elsewhere: [`V2_FILES`] of groups below `root`, by their whole paths.
    pub fn of_texts(root: &Utf8Path, texts: HashMap<Utf8PathBuf, String>) -> Self {
        let (cpuacct, cpu, memory, blkio, pids) = (None, None, None, None, None);
        Self {
            unified: Some(root.to_owned()),
            cpuacct,
            cpu,
            memory,
            blkio,
            pids,
            buffer: String::new(),
            given: Some(texts),
        }
    }

    /// What the group at `relative` (from the hierarchy's root) and all below it use. `now`: Unix time in nanoseconds.
    /// None: it is gone.
    pub fn read(&mut self, relative: &Utf8Path, depth: Depth, now: impl Fn() -> i64) -> Option<UnitSample> {
        let mut sample = match self.unified.clone() {
            Some(root) => self.read_v2(&root.join(relative), depth, now),
            None => self.read_v1(relative, depth, now),
        }?;
        sample.cgroup = format!("/{relative}");
        Some(sample)
    }

    fn read_v2(&mut self, folder: &Utf8Path, depth: Depth, now: impl Fn() -> i64) -> Option<UnitSample> {
        // Every group has cpu.stat, with the cpu controller or without.
        let mut sample = UnitSample { cpu: Some(self.cpu_v2(folder, depth.details)?), at: now(), ..Default::default() };
        sample.memory = self.memory_v2(folder, depth.details);
        let mut io = IoSample { pressure: self.with(folder, "io.pressure", pressure).flatten(), ..Default::default() };
        if depth.details {
            let devices = self.with(folder, "io.stat", io_stat_v2).unwrap_or_default();
            // Their numbers are this kernel's.
            io.devices = if self.given.is_none() { named(devices) } else { devices };
        }
        sample.io = (io != IoSample::default()).then_some(io);
        if depth.details || depth.tasks {
            sample.tasks = self.tasks(Some(folder), folder, depth.details);
        }
        Some(sample)
    }

    fn cpu_v2(&mut self, folder: &Utf8Path, details: bool) -> Option<CpuSample> {
        let mut cpu = CpuSample::default();
        let mut throttling = None;
        for (key, value) in flat(self.text(folder, "cpu.stat")?) {
            let ns = value.saturating_mul(1000);
            match key {
                "usage_usec" => cpu.usage_ns = ns,
                "user_usec" => cpu.user_ns = Some(ns).filter(|_| details),
                "system_usec" => cpu.system_ns = Some(ns).filter(|_| details),
                "nr_periods" => throttling.get_or_insert_with(Throttling::default).periods = value,
                "nr_throttled" => throttling.get_or_insert_with(Throttling::default).throttled_periods = value,
                "throttled_usec" => throttling.get_or_insert_with(Throttling::default).throttled_ns = ns,
                _ => {}
            }
        }
        cpu.throttling = throttling.filter(|_| details);
        cpu.pressure = self.with(folder, "cpu.pressure", pressure).flatten();
        Some(cpu)
    }

    fn memory_v2(&mut self, folder: &Utf8Path, details: bool) -> Option<MemorySample> {
        let usage = self.with(folder, "memory.current", number).flatten()?;
        let mut m = MemorySample { usage, ..Default::default() };
        memory_stat_v2(self.text(folder, "memory.stat")?, &mut m);
        m.limit = self.with(folder, "memory.max", limit).flatten();
        m.swap = self.with(folder, "memory.swap.current", number).flatten();
        m.swap_limit = self.with(folder, "memory.swap.max", limit).flatten();
        m.pressure = self.with(folder, "memory.pressure", pressure).flatten();
        if details {
            m.peak = self.with(folder, "memory.peak", number).flatten();
            for (key, value) in flat(self.text(folder, "memory.events").unwrap_or_default()) {
                match key {
                    "max" => m.limit_hits = Some(value),
                    "oom_kill" => m.oom_kills = Some(value),
                    _ => {}
                }
            }
        } else {
            m.kernel = None;
        }
        Some(m)
    }

    fn read_v1(&mut self, relative: &Utf8Path, depth: Depth, now: impl Fn() -> i64) -> Option<UnitSample> {
        let at = |root: &Option<Utf8PathBuf>| root.as_ref().map(|r| r.join(relative));
        let mut sample = UnitSample::default();
        if let Some(folder) = at(&self.cpuacct) {
            let usage_ns = self.with(&folder, "cpuacct.usage", number).flatten()?;
            sample.at = now();
            let mut cpu = CpuSample { usage_ns, ..Default::default() };
            if depth.details {
                cpu.user_ns = self.with(&folder, "cpuacct.usage_user", number).flatten();
                cpu.system_ns = self.with(&folder, "cpuacct.usage_sys", number).flatten();
                cpu.throttling = at(&self.cpu).and_then(|folder| self.throttling_v1(&folder));
            }
            sample.cpu = Some(cpu);
        }
        if let Some(folder) = at(&self.memory) {
            sample.memory = self.memory_v1(&folder, depth.details);
        }
        if let Some(folder) = at(&self.blkio).filter(|_| depth.details) {
            let bytes = self.text(&folder, "blkio.throttle.io_service_bytes_recursive").unwrap_or_default().to_owned();
            let operations = self.text(&folder, "blkio.throttle.io_serviced_recursive").unwrap_or_default();
            sample.io = Some(IoSample { devices: named(blkio_v1(&bytes, operations)), pressure: None });
        }
        if depth.details || depth.tasks {
            let (pids, any) = (at(&self.pids), at(&self.pids).or_else(|| at(&self.memory)));
            sample.tasks = any.and_then(|any| self.tasks(pids.as_deref(), &any, depth.details));
        }
        if sample.at == 0 {
            sample.at = now();
        }
        (sample.cpu.is_some() || sample.memory.is_some()).then_some(sample)
    }

    fn throttling_v1(&mut self, folder: &Utf8Path) -> Option<Throttling> {
        let mut found = Throttling::default();
        for (key, value) in flat(self.text(folder, "cpu.stat")?) {
            match key {
                "nr_periods" => found.periods = value,
                "nr_throttled" => found.throttled_periods = value,
                "throttled_time" => found.throttled_ns = value,
                _ => {}
            }
        }
        Some(found)
    }

    fn memory_v1(&mut self, folder: &Utf8Path, details: bool) -> Option<MemorySample> {
        let usage = self.with(folder, "memory.usage_in_bytes", number).flatten()?;
        let mut m = MemorySample { usage, ..Default::default() };
        memory_stat_v1(self.text(folder, "memory.stat")?, &mut m);
        if details {
            m.peak = self.with(folder, "memory.max_usage_in_bytes", number).flatten();
            m.limit_hits = self.with(folder, "memory.failcnt", number).flatten();
            m.kernel = self.with(folder, "memory.kmem.usage_in_bytes", number).flatten();
            let kills = |text: &str| flat(text).find(|(key, _)| *key == "oom_kill").map(|(_, n)| n);
            m.oom_kills = self.with(folder, "memory.oom_control", kills).flatten();
        }
        Some(m)
    }

    /// Threads by the pids controller; processes by walking the groups, since the controller does not count them.
    fn tasks(&mut self, pids: Option<&Utf8Path>, any: &Utf8Path, details: bool) -> Option<TaskSample> {
        let counted = pids.and_then(|folder| self.with(folder, "pids.current", number).flatten());
        let processes = details.then(|| self.processes(any));
        Some(TaskSample {
            threads: counted.or(processes)?,
            threads_limit: pids.and_then(|folder| self.with(folder, "pids.max", limit).flatten()),
            processes,
        })
    }

    fn processes(&mut self, folder: &Utf8Path) -> u64 {
        let mut count = 0;
        let mut folders = vec![folder.to_owned()];
        let mut looked_at = 0;
        while let Some(folder) = folders.pop() {
            count += self.text(&folder, "cgroup.procs").map_or(0, |text| text.lines().count() as u64);
            looked_at += 1;
            if self.given.is_some() {
                break;
            }
            let room = GROUPS_MAX.saturating_sub(looked_at + folders.len());
            folders.extend(super::manage::children(&folder).unwrap_or_default().into_iter().take(room));
        }
        count
    }

    fn with<T>(&mut self, folder: &Utf8Path, name: &str, parse: impl FnOnce(&str) -> T) -> Option<T> {
        self.text(folder, name).map(parse)
    }

    /// The file's text; None: there is none, or it can't be read now.
    fn text(&mut self, folder: &Utf8Path, name: &str) -> Option<&str> {
        if let Some(given) = &self.given {
            return given.get(&folder.join(name)).map(String::as_str);
        }
        self.buffer.clear();
        let mut file = std::fs::File::open(folder.join(name)).ok()?.take(FILE_MAX);
        // No read_to_string of the file itself: it would ask for the size first, which is always 0 here.
        let mut bytes = std::mem::take(&mut self.buffer).into_bytes();
        let read = file.read_to_end(&mut bytes);
        self.buffer = String::from_utf8(bytes).unwrap_or_default();
        read.ok()?;
        Some(&self.buffer)
    }
}

/// Devices by the names of their nodes, where sysfs tells them.
fn named(mut devices: Vec<DeviceIo>) -> Vec<DeviceIo> {
    for d in &mut devices {
        let link = std::fs::read_link(format!("/sys/dev/block/{}:{}", d.major, d.minor));
        if let Some(name) = link.ok().as_deref().and_then(|l| l.file_name()).and_then(|n| n.to_str()) {
            d.name = format!("/dev/{name}");
        }
    }
    devices
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn write(folder: &Utf8Path, name: &str, text: &str) {
        std::fs::create_dir_all(folder).expect("folder");
        let path = folder.join(name);
        crate::utils::atomic::write(
            path.as_std_path(),
            text.as_bytes(),
            0o600,
            crate::utils::atomic::Durability::Process,
        )
        .expect("file");
    }

    fn temporary() -> (tempfile::TempDir, Utf8PathBuf) {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = Utf8PathBuf::try_from(dir.path().to_path_buf()).expect("utf8");
        (dir, path)
    }

    #[test]
    fn a_group_of_v2() {
        let (_dir, root) = temporary();
        let unified = Some(root.clone());
        let host = Hierarchy { mode: Mode::Unified, unified, unified_controllers: vec![], legacy: BTreeMap::new() };
        let folder = root.join("kubepods.slice/x.scope");
        let psi = "some avg10=1.50 avg60=0.00 avg300=0.00 total=10\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=2\n";
        for (name, text) in [
            (
                "cpu.stat",
                "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnr_periods 7\nnr_throttled 2\nthrottled_usec 30\n",
            ),
            ("cpu.pressure", psi),
            ("memory.current", "4096000\n"),
            ("memory.stat", "anon 1000\nfile 2000\nkernel 300\ninactive_file 96000\npgfault 5\npgmajfault 1\n"),
            ("memory.max", "8192000\n"),
            ("memory.swap.current", "11\n"),
            ("memory.swap.max", "max\n"),
            ("memory.peak", "5000000\n"),
            ("memory.events", "low 0\nhigh 0\nmax 4\noom 1\noom_kill 1\noom_group_kill 0\n"),
            ("memory.pressure", psi),
            ("io.pressure", psi),
            ("io.stat", "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n"),
            ("pids.current", "9\n"),
            ("pids.max", "max\n"),
            ("cgroup.procs", "1\n2\n"),
        ] {
            write(&folder, name, text);
        }
        write(&folder.join("container"), "cgroup.procs", "3\n");
        let mut reader = host.stats_reader();
        let few = reader.read("kubepods.slice/x.scope".into(), Depth::default(), || 77).expect("there");
        assert_eq!((few.at, few.cgroup.as_str()), (77, "/kubepods.slice/x.scope"));
        let (cpu, memory) = (few.cpu.expect("cpu"), few.memory.expect("memory"));
        assert_eq!((cpu.usage_ns, cpu.user_ns, cpu.throttling), (1_500_000, None, None));
        assert_eq!(cpu.pressure.expect("psi").some.avg10, 1.5);
        assert_eq!((memory.usage, memory.working_set, memory.limit), (4_096_000, 4_000_000, Some(8_192_000)));
        assert_eq!((memory.swap, memory.swap_limit, memory.oom_kills), (Some(11), None, None));
        assert!(few.tasks.is_none() && few.io.as_ref().is_some_and(|io| io.devices.is_empty()));

        let all =
            reader.read("kubepods.slice/x.scope".into(), Depth { details: true, tasks: true }, || 78).expect("there");
        let (cpu, memory) = (all.cpu.expect("cpu"), all.memory.expect("memory"));
        assert_eq!(cpu.throttling, Some(Throttling { periods: 7, throttled_periods: 2, throttled_ns: 30_000 }));
        assert_eq!((memory.peak, memory.limit_hits, memory.oom_kills), (Some(5_000_000), Some(4), Some(1)));
        assert_eq!(all.tasks, Some(TaskSample { threads: 9, threads_limit: None, processes: Some(3) }));
        assert_eq!(all.io.expect("io").devices.len(), 1);
        assert_eq!(reader.read("gone".into(), Depth::default(), || 1), None);

        // A group without the memory controller tells its CPU time and nothing wrong.
        write(&root.join("bare"), "cpu.stat", "usage_usec 1\n");
        let bare = reader.read("bare".into(), Depth::default(), || 1).expect("there");
        assert!(bare.memory.is_none() && bare.io.is_none() && bare.cpu.expect("cpu").pressure.is_none());
    }

    #[test]
    fn texts_that_were_read_elsewhere() {
        let files = [
            ("cpu.stat", "usage_usec 5\n"),
            ("memory.current", "4096\n"),
            ("memory.stat", "anon 1\n"),
            ("pids.current", "3\n"),
        ];
        let texts = files.map(|(name, text)| (Utf8Path::new("/cg/a/b").join(name), text.to_owned())).into();
        let mut reader = StatsReader::of_texts("/cg".into(), texts);
        let depth = Depth { details: true, tasks: true };
        let sample = reader.read("a/b".into(), depth, || 7).expect("a reading");
        assert_eq!((sample.at, sample.cgroup.as_str()), (7, "/a/b"));
        assert_eq!(sample.cpu.map(|c| c.usage_ns), Some(5000));
        assert_eq!(sample.memory.map(|m| (m.usage, m.limit)), Some((4096, None)));
        assert_eq!(sample.tasks.map(|t| t.threads), Some(3));
        assert!(reader.read("a/c".into(), depth, || 7).is_none());
    }

    #[test]
    fn a_group_of_v1() {
        let (_dir, root) = temporary();
        let names = ["cpuacct", "cpu", "memory", "blkio", "pids"];
        let legacy = names.map(|name| (name.to_owned(), root.join(name))).into();
        let host = Hierarchy { mode: Mode::Legacy, unified: None, unified_controllers: vec![], legacy };
        for (controller, name, text) in [
            ("cpuacct", "cpuacct.usage", "123456789\n"),
            ("cpuacct", "cpuacct.usage_user", "100000000\n"),
            ("cpuacct", "cpuacct.usage_sys", "23456789\n"),
            ("cpu", "cpu.stat", "nr_periods 3\nnr_throttled 1\nthrottled_time 500\nnr_bursts 0\nburst_time 0\n"),
            ("memory", "memory.usage_in_bytes", "1000000\n"),
            (
                "memory",
                "memory.stat",
                "rss 1\ntotal_rss 400000\ntotal_inactive_file 100000\nhierarchical_memory_limit 2000000\ntotal_swap 5\n",
            ),
            ("memory", "memory.max_usage_in_bytes", "1500000\n"),
            ("memory", "memory.failcnt", "6\n"),
            ("memory", "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"),
            ("blkio", "blkio.throttle.io_service_bytes_recursive", "254:0 Read 10\nTotal 10\n"),
            ("pids", "pids.current", "4\n"),
            ("pids", "pids.max", "100\n"),
            ("pids", "cgroup.procs", "1\n2\n3\n"),
        ] {
            write(&root.join(controller).join("p/c"), name, text);
        }
        let mut reader = host.stats_reader();
        let all = reader.read("p/c".into(), Depth { details: true, tasks: true }, || 5).expect("there");
        let (cpu, memory) = (all.cpu.expect("cpu"), all.memory.expect("memory"));
        assert_eq!(
            (cpu.usage_ns, cpu.user_ns, cpu.throttling.map(|t| t.throttled_ns)),
            (123_456_789, Some(100_000_000), Some(500))
        );
        assert_eq!((memory.working_set, memory.rss, memory.limit), (900_000, 400_000, Some(2_000_000)));
        assert_eq!((memory.oom_kills, memory.limit_hits, memory.swap), (Some(2), Some(6), Some(5)));
        assert_eq!(all.tasks, Some(TaskSample { threads: 4, threads_limit: Some(100), processes: Some(3) }));
        assert_eq!(all.io.expect("io").devices[0].read_bytes, 10);
        assert_eq!(reader.read("p/gone".into(), Depth::default(), || 1), None);
    }

    #[test]
    fn this_host_can_be_read() {
        let host = Hierarchy::detect().expect("cgroups");
        let own = std::fs::read_to_string("/proc/self/cgroup").expect("own groups");
        let line = own.lines().find(|l| l.contains(":memory:") || l.starts_with("0::") && host.mode == Mode::Unified);
        let group = line.and_then(|l| l.splitn(3, ':').nth(2)).expect("a group").trim_start_matches('/').to_owned();
        let sample = host.stats_reader().read(Utf8Path::new(&group), Depth { details: true, tasks: true }, || 1);
        // On v1 each controller may have us in another group: then there is nothing to compare.
        if let Some(memory) = sample.and_then(|s| s.memory) {
            assert!(memory.usage > 0 && memory.working_set <= memory.usage, "{memory:?}");
        }
    }
}
