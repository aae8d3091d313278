//! What the server knows: guests, tasks, storages, who may what, which faults are to come, what was asked.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::access::Access;
use super::guests::{Guest, Runner};
use super::http::Call;
use super::nets::Vnet;
use super::schema::Schema;
use super::storage::{Store, Upload};
use super::tasks::Task;

/// The node that the server is.
pub const NODE: &str = "pve1";

/// Names and values of a request.
pub type Params = BTreeMap<String, String>;

/// A request that came.
#[derive(Debug, Clone)]
pub struct Seen {
    pub method: String,
    pub path: String,
    pub params: Params,
}

/// What goes wrong.
#[derive(Debug, Clone)]
pub enum What {
    /// The answer comes late.
    Slow(Duration),
    /// Nothing is done and this is answered: 500 "got timeout", 595, 596.
    Status(u16, String),
    /// Nothing is done and the connection is cut.
    Cut,
    /// It is done, and the connection cut before the answer.
    CutAfter,
    /// Nothing is done and this data is answered.
    Data(Value),
    /// It is done and this data is answered in place of the real one.
    Garbled(Value),
    /// It is done after that time, whether or not somebody waits for the answer still.
    Late(Duration),
    /// The task that is started does nothing and ends so.
    TaskEnds(String),
    /// The task does its work and ends with so many warnings.
    TaskWarns(u32),
    /// The task makes half of it and dies: a container that stays locked.
    HalfDone,
}

/// A fault that waits for its request.
#[derive(Debug, Clone)]
pub struct Fault {
    pub method: String,
    /// A part of the path; with a `$` behind it, its end.
    pub path: String,
    pub times: usize,
    pub what: What,
}

impl Fault {
    fn fits(&self, path: &str) -> bool {
        self.path.strip_suffix('$').map_or_else(|| path.contains(&self.path), |end| path.ends_with(end))
    }
}

/// All that changes.
pub struct State {
    pub guests: BTreeMap<u32, Guest>,
    /// Other nodes of the cluster.
    pub others: Vec<String>,
    /// Vnets of its SDN.
    pub vnets: BTreeMap<String, Vnet>,
    /// Programs that serve its networks.
    pub helpers: Vec<std::process::Child>,
    pub tasks: Vec<Task>,
    pub stores: BTreeMap<String, Store>,
    pub access: Access,
    pub faults: Vec<Fault>,
    /// How much longer every create takes.
    pub dawdle: Duration,
    /// Requests that have met a fault.
    pub met: usize,
    pub seen: Vec<Seen>,
    pub violations: Vec<String>,
    pub upload: Option<Upload>,
    /// No quorum: nothing can be written.
    pub frozen: bool,
    /// Most tasks of a kind that were under way at once.
    pub most: BTreeMap<String, usize>,
    /// From when to when requests were worked on, and tasks.
    pub busy: Vec<(Instant, Instant)>,
}

/// The server.
pub struct Server {
    state: Mutex<State>,
    pub schema: Option<Schema>,
    pub runner: Runner,
    pub folder: PathBuf,
    pub scale: f64,
    pub counter: AtomicU64,
    locks: Mutex<HashMap<u32, Arc<tokio::sync::Mutex<()>>>>,
}

impl Server {
    pub fn new(options: super::Options, folder: PathBuf) -> Self {
        let stores = Store::usual(&folder);
        let state = State {
            guests: BTreeMap::new(),
            others: Vec::new(),
            vnets: BTreeMap::new(),
            helpers: Vec::new(),
            tasks: Vec::new(),
            stores,
            access: Access::usual(&folder),
            faults: Vec::new(),
            dawdle: Duration::ZERO,
            met: 0,
            seen: Vec::new(),
            violations: Vec::new(),
            upload: None,
            frozen: false,
            most: BTreeMap::new(),
            busy: Vec::new(),
        };
        Self {
            state: Mutex::new(state),
            schema: Schema::load(),
            runner: options.runner,
            folder,
            scale: options.scale,
            counter: AtomicU64::new(0x1000),
            locks: Mutex::default(),
        }
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// So many seconds of the real server.
    pub fn seconds(&self, n: f64) -> Duration {
        Duration::from_secs_f64(n * self.scale)
    }

    /// The lock file of a guest.
    pub fn guest_lock(&self, vmid: u32) -> Arc<tokio::sync::Mutex<()>> {
        self.locks.lock().unwrap_or_else(|e| e.into_inner()).entry(vmid).or_default().clone()
    }

    /// Takes note of a request and of what the real API would not have in it.
    pub fn note(&self, seen: Seen, call: &Call) {
        let found = self.schema.as_ref().map(|s| s.check(&call.method, &call.parts, &call.params)).unwrap_or_default();
        let mut state = self.lock();
        state.violations.extend(found);
        state.seen.push(seen);
    }

    /// Takes note of what the server was busy with from then to now.
    pub fn was_busy(&self, since: Instant) {
        self.lock().busy.push((since, Instant::now()));
    }

    /// The fault that this request meets.
    pub fn fault(&self, method: &str, path: &str) -> Option<What> {
        let mut state = self.lock();
        let at = state.faults.iter().position(|f| f.times > 0 && f.method == method && f.fits(path))?;
        state.faults[at].times -= 1;
        state.met += 1;
        Some(state.faults[at].what.clone())
    }
}
