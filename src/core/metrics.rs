//! What is counted: calls of the CRI and of Proxmox, pulls, monitors, recoveries. One set for the process, added to from every
//! layer; shown by the daemon's listener (`[metrics]`), which also measures what there is when it is asked.
//!
//! Adding costs some atomic operations and can't fail. Labels have few values: no names or ids of pods, no paths.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

/// Upper bounds in seconds: from a list that is answered from memory to a pull or a stop with a long grace.
const BUCKETS: [f64; 13] = [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 120.0];

/// A call of the CRI.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Call {
    /// Method: "RunPodSandbox".
    pub method: String,
    /// gRPC code: "OK", "NotFound".
    pub code: &'static str,
}

/// How something ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Ended {
    /// "ok" or "failed".
    pub result: &'static str,
}

/// A call of the Proxmox API.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ProxmoxCall {
    /// "GET", "POST", "PUT" or "DELETE".
    pub method: String,
    /// "ok", or the kind of failure: "Busy", "Timeout".
    pub result: String,
}

type Durations<L> = Family<L, Histogram, fn() -> Histogram>;

fn histogram() -> Histogram {
    Histogram::new(BUCKETS)
}

/// Everything that is counted.
pub struct Metrics {
    /// How long calls of the CRI and of our own command line took.
    pub calls: Durations<Call>,
    /// How long pulls took that callers asked for, those that found the image among them.
    pub pulls: Durations<Ended>,
    /// How long calls of the Proxmox API took, with all tries.
    pub proxmox: Durations<ProxmoxCall>,
    /// Monitors that were found gone.
    pub monitors_lost: Counter,
    /// Pods that another monitor has taken over.
    pub monitors_replaced: Counter,
    /// Pods that a start of the daemon has taken up, whole ("ok") or not ("failed").
    pub recovered: Family<Ended, Counter>,
    /// Panics of pods' tasks.
    pub panics: Counter,
    /// Logs that had become too large and begin anew.
    pub logs_dropped: Counter,
    /// What was in them.
    pub log_bytes_dropped: Counter,
}

static METRICS: LazyLock<Metrics> = LazyLock::new(|| Metrics {
    calls: Family::new_with_constructor(histogram as fn() -> Histogram),
    pulls: Family::new_with_constructor(histogram as fn() -> Histogram),
    proxmox: Family::new_with_constructor(histogram as fn() -> Histogram),
    monitors_lost: Counter::default(),
    monitors_replaced: Counter::default(),
    recovered: Family::default(),
    panics: Counter::default(),
    logs_dropped: Counter::default(),
    log_bytes_dropped: Counter::default(),
});

/// This process's.
pub fn metrics() -> &'static Metrics {
    &METRICS
}

impl Metrics {
    /// Names them in `registry`.
    pub fn register(&self, registry: &mut Registry) {
        let seconds = Unit::Seconds;
        registry.register_with_unit(
            "cri_call_duration",
            "Calls by method and gRPC code",
            seconds.clone(),
            self.calls.clone(),
        );
        registry.register_with_unit(
            "image_pull_duration",
            "Pulls that were asked for",
            seconds.clone(),
            self.pulls.clone(),
        );
        registry.register_with_unit(
            "proxmox_call_duration",
            "Calls of the Proxmox API with all tries",
            seconds,
            self.proxmox.clone(),
        );
        registry.register("monitors_lost", "Monitors of pods that were found gone", self.monitors_lost.clone());
        registry.register(
            "monitors_replaced",
            "Pods that another monitor has taken over",
            self.monitors_replaced.clone(),
        );
        registry.register("pods_recovered", "Pods that starts of the daemon have taken up", self.recovered.clone());
        registry.register("pod_task_panics", "Panics of pods' tasks", self.panics.clone());
        registry.register(
            "logs_dropped",
            "Logs of containers that were larger than runtime.log_size_max and began anew",
            self.logs_dropped.clone(),
        );
        registry.register_with_unit("log_dropped", "What was in them", Unit::Bytes, self.log_bytes_dropped.clone());
    }

    /// A log of so many bytes was dropped.
    pub fn log_dropped(&self, bytes: u64) {
        self.logs_dropped.inc();
        self.log_bytes_dropped.inc_by(bytes);
    }

    /// A pull that began at `start` has ended.
    pub fn pulled(&self, start: Instant, ok: bool) {
        self.pulls.get_or_create(&Ended::of(ok)).observe(seconds(start.elapsed()));
    }

    /// A call of Proxmox that began at `start` has ended: None, or with this kind of failure.
    pub fn proxmox_called(&self, start: Instant, method: &str, failure: Option<String>) {
        let labels = ProxmoxCall { method: method.to_owned(), result: failure.unwrap_or_else(|| "ok".into()) };
        self.proxmox.get_or_create(&labels).observe(seconds(start.elapsed()));
    }

    /// A start of the daemon has taken up so many pods, and so many not.
    pub fn recovered(&self, whole: usize, failed: usize) {
        for (ok, count) in [(true, whole), (false, failed)] {
            self.recovered.get_or_create(&Ended::of(ok)).inc_by(count as u64);
        }
    }
}

impl Ended {
    fn of(ok: bool) -> Self {
        Self { result: if ok { "ok" } else { "failed" } }
    }
}

fn seconds(span: Duration) -> f64 {
    span.as_secs_f64()
}
