//! What pods and containers use: the readings that backends give and the engine puts together for `cri`.
//!
//! Plain data. An absent value is one that this node (or kind of unit) does not tell, never a zero in disguise.

use std::sync::Arc;

use super::ports::Usage;
use super::records::{ContainerRecord, PodRecord};

/// A line of a pressure file (kernel: Documentation/accounting/psi.rst).
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct PressureLine {
    /// Stall since the start, in microseconds.
    pub total_us: u64,
    /// Share of the last 10 seconds in percent.
    pub avg10: f64,
    /// Of the last minute.
    pub avg60: f64,
    /// Of the last five minutes.
    pub avg300: f64,
}

/// Pressure on one resource.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Pressure {
    /// Some tasks waited.
    pub some: PressureLine,
    /// All did.
    pub full: PressureLine,
}

/// CPU time since the start, all CPUs together.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct CpuSample {
    /// Nanoseconds.
    pub usage_ns: u64,
    /// Of these in user space. Only with [`StatsWanted::details`].
    pub user_ns: Option<u64>,
    /// Of these in the kernel. Only with details.
    pub system_ns: Option<u64>,
    /// What the CFS quota did. Only with details.
    pub throttling: Option<Throttling>,
    /// Pressure, where the kernel tells it.
    pub pressure: Option<Pressure>,
}

/// What the CFS quota did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Throttling {
    /// Periods in which there was something to run.
    pub periods: u64,
    /// Of these those that were cut short.
    pub throttled_periods: u64,
    /// Nanoseconds that were waited.
    pub throttled_ns: u64,
}

/// Memory in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct MemorySample {
    /// All that is charged, page cache included.
    pub usage: u64,
    /// `usage` less inactive file pages: what eviction looks at.
    pub working_set: u64,
    /// Anonymous memory.
    pub rss: u64,
    /// Page cache.
    pub cache: u64,
    /// Mapped files.
    pub mapped_file: u64,
    /// Inactive file pages.
    pub inactive_file: u64,
    /// Active file pages.
    pub active_file: u64,
    /// Page faults since the start.
    pub faults: u64,
    /// Of these those that had to wait for a disk.
    pub major_faults: u64,
    /// None: no limit.
    pub limit: Option<u64>,
    /// In swap; None: not told by this node.
    pub swap: Option<u64>,
    /// What may be in swap; None: no limit, or not told.
    pub swap_limit: Option<u64>,
    /// Kernel memory. Only with details.
    pub kernel: Option<u64>,
    /// Largest `usage` so far. Only with details.
    pub peak: Option<u64>,
    /// How often the limit was met. Only with details.
    pub limit_hits: Option<u64>,
    /// Processes that the kernel killed for want of memory. Only with details.
    pub oom_kills: Option<u64>,
    /// Pressure, where the kernel tells it.
    pub pressure: Option<Pressure>,
}

/// Block I/O since the start.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct IoSample {
    /// By device. Only with details.
    pub devices: Vec<DeviceIo>,
    /// Pressure, where the kernel tells it.
    pub pressure: Option<Pressure>,
}

/// Block I/O on one device since the start.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DeviceIo {
    /// "/dev/sda", or "8:0" for one without a node.
    pub name: String,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Read operations.
    pub reads: u64,
    /// Write operations.
    pub writes: u64,
}

/// Tasks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TaskSample {
    /// Threads, as the pids controller counts.
    pub threads: u64,
    /// None: no limit.
    pub threads_limit: Option<u64>,
    /// Processes. Only with details.
    pub processes: Option<u64>,
}

/// What one control group (or what stands for it) uses.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct UnitSample {
    /// Unix time in nanoseconds of the reading.
    pub at: i64,
    /// Its path from the hierarchy's root, "/..."; "": it has none.
    pub cgroup: String,
    /// CPU.
    pub cpu: Option<CpuSample>,
    /// Memory.
    pub memory: Option<MemorySample>,
    /// Block I/O.
    pub io: Option<IoSample>,
    /// Tasks. Of containers only with details.
    pub tasks: Option<TaskSample>,
}

/// Counters of a network interface since it was made.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct InterfaceSample {
    /// "eth0".
    pub name: String,
    /// Bytes in.
    pub rx_bytes: u64,
    /// Packets in.
    pub rx_packets: u64,
    /// Errors in.
    pub rx_errors: u64,
    /// Dropped coming in.
    pub rx_dropped: u64,
    /// Bytes out.
    pub tx_bytes: u64,
    /// Packets out.
    pub tx_packets: u64,
    /// Errors out.
    pub tx_errors: u64,
    /// Dropped going out.
    pub tx_dropped: u64,
}

/// Counters of a pod's network.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NetworkSample {
    /// Unix time in nanoseconds of the reading.
    pub at: i64,
    /// All interfaces but `lo`.
    pub interfaces: Vec<InterfaceSample>,
}

/// What is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StatsWanted {
    /// The pod's own readings and its network, too.
    pub pods: bool,
    /// All that metrics need, too.
    pub details: bool,
}

/// A pod whose use is asked for. Only containers that have a unit are named: created and running ones.
#[derive(Debug, Clone)]
pub struct StatsTarget {
    /// The pod.
    pub pod: Arc<PodRecord>,
    /// Its containers.
    pub containers: Vec<Arc<ContainerRecord>>,
}

/// What a backend reads of one [`StatsTarget`].
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PodSample {
    /// The pod's unit. None: not asked for, or there is none of its own.
    pub unit: Option<UnitSample>,
    /// Its network. None: not asked for, the host's, or gone.
    pub network: Option<NetworkSample>,
    /// In the order of the target's containers; None: gone.
    pub containers: Vec<Option<UnitSample>>,
}

/// What a container has written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Unix time in nanoseconds of the measurement.
    pub at: i64,
    /// How much.
    pub usage: Usage,
}

/// A container's use, as shown.
#[derive(Debug, Clone)]
pub struct ContainerStats {
    /// Whose.
    pub record: Arc<ContainerRecord>,
    /// None: it does not run.
    pub sample: Option<UnitSample>,
    /// Nanoseconds of CPU a second between the last two readings; None: there was one only.
    pub nano_cores: Option<u64>,
    /// Its writable layer; None: not measured yet.
    pub written: Option<Written>,
}

/// A pod's use, as shown.
#[derive(Debug, Clone)]
pub struct PodStats {
    /// Whose.
    pub record: Arc<PodRecord>,
    /// None: it does not run.
    pub sample: Option<UnitSample>,
    /// As [`ContainerStats::nano_cores`].
    pub nano_cores: Option<u64>,
    /// None: it uses the host's.
    pub network: Option<NetworkSample>,
    /// Its containers.
    pub containers: Vec<ContainerStats>,
}

impl UnitSample {
    /// What several units use together: for pods whose unit is shared with others.
    pub fn sum<'a>(samples: impl IntoIterator<Item = &'a UnitSample>) -> Option<Self> {
        let mut sum: Option<Self> = None;
        for one in samples {
            let sum = sum.get_or_insert_with(|| Self { at: one.at, ..Default::default() });
            sum.at = sum.at.max(one.at);
            if let Some(c) = &one.cpu {
                let total = sum.cpu.get_or_insert_default();
                total.usage_ns = total.usage_ns.saturating_add(c.usage_ns);
                total.user_ns = added(total.user_ns, c.user_ns);
                total.system_ns = added(total.system_ns, c.system_ns);
            }
            if let Some(m) = &one.memory {
                let total = sum.memory.get_or_insert_default();
                for (to, from) in [
                    (&mut total.usage, m.usage),
                    (&mut total.working_set, m.working_set),
                    (&mut total.rss, m.rss),
                    (&mut total.cache, m.cache),
                    (&mut total.mapped_file, m.mapped_file),
                    (&mut total.inactive_file, m.inactive_file),
                    (&mut total.active_file, m.active_file),
                    (&mut total.faults, m.faults),
                    (&mut total.major_faults, m.major_faults),
                ] {
                    *to = to.saturating_add(from);
                }
                total.swap = added(total.swap, m.swap);
            }
            if let Some(t) = &one.tasks {
                let total = sum.tasks.get_or_insert_default();
                total.threads = total.threads.saturating_add(t.threads);
                total.processes = added(total.processes, t.processes);
            }
        }
        sum
    }
}

fn added(a: Option<u64>, b: Option<u64>) -> Option<u64> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.saturating_add(b)),
        (a, b) => a.or(b),
    }
}
