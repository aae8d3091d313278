//! What the handlers whose pods are guests of Proxmox have in common, containers (`proxmox_lxc`) and virtual machines (`proxmox_vm`).
//!
//! [`Unit`] says which kind of guest, in the journal's words and in ours. [`Guests`] has their numbers (`numbers`), says whose one is as
//! far as that is the same of both (`owner`), and finds those that are nobody's (`orphans`). A number is in the pod's journal before it
//! is asked for. A crash leaves what the journal names, or a guest that says whose it is.

mod network;
mod numbers;
mod orphans;
mod owner;
pub mod plan;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub use orphans::Orphan;

use crate::core::error::{Error, Kind, Result};
use crate::core::records::PodRecord;
use crate::core::spec::{NamespaceMode, Namespaces};
use crate::integrations::proxmox_api::{ApiError, ErrorKind, GuestKind, Proxmox, Version, Vmid};

/// Oldest release that is supported.
const OLDEST: u32 = 8;
/// How long a look at the API may take.
const PATIENCE: Duration = Duration::from_secs(3);

/// Which kind of guest the pods of a handler are.
#[derive(Debug)]
pub struct Unit {
    /// The same in the API.
    pub kind: GuestKind,
    /// The handler, whose table in the configuration has this name.
    pub handler: &'static str,
    /// For messages: "CT".
    pub word: &'static str,
    /// Kind of the journal's notes of them.
    pub note: &'static str,
    /// Kind of its notes of numbers that it has asked for and somebody else has.
    pub taken: &'static str,
    /// Proxmox's program for them.
    pub tool: &'static str,
    /// Locks that a task may leave which has died.
    pub dead_locks: [&'static str; 2],
    /// Where a message about one that belongs to no pod leads.
    pub orphans: &'static str,
}

impl Unit {
    /// The number of a pod's guest: the last that it has asked for.
    pub fn vmid(&self, pod: &PodRecord) -> Result<Vmid> {
        let note = pod.resources.iter().rev().find(|note| note.kind == self.note);
        let note = note.ok_or_else(|| Error::precondition(format!("pod {} has no {}", pod.id, self.word)))?;
        note.name.parse().map_err(|e| Error::internal(format!("pod {}: {e}", pod.id)))
    }

    /// Whether the pod knows that somebody else has this number.
    pub fn is_taken(&self, pod: &PodRecord, vmid: Vmid) -> bool {
        pod.resources.iter().any(|n| n.kind == self.taken && n.name == vmid.to_string())
    }

    /// Numbers that pods have.
    pub fn claimed(&self, pods: &[PodRecord]) -> BTreeSet<Vmid> {
        let notes = pods.iter().flat_map(|p| &p.resources).filter(|note| note.kind == self.note);
        notes.filter_map(|note| note.name.parse().ok()).collect()
    }

    /// Why a pod with these namespaces can't be such a guest, which has its own.
    pub fn node_namespace(&self, of: &Namespaces) -> Option<String> {
        let all = [("network", of.network), ("PID", of.pid), ("IPC", of.ipc)];
        let (what, _) = all.into_iter().find(|(_, mode)| *mode == NamespaceMode::Node)?;
        Some(format!("a {} can't have the node's {what} namespace", self.word))
    }

    /// Says what a lock means for whoever waits until one can be removed: most go by themselves, some are what died of a task.
    pub fn locked(&self, vmid: Vmid, e: ApiError) -> Error {
        let hint = match e.kind() {
            ErrorKind::Locked(lock) if self.dead_locks.contains(&lock.as_str()) => {
                format!("what has locked it may have died: `{} unlock {vmid}` lets it be deleted", self.tool)
            }
            ErrorKind::Locked(lock) => {
                format!("{} {vmid} can't be removed as long as it has the lock {lock:?}", self.word)
            }
            _ => return failed(e),
        };
        Error::from(e).context(hint)
    }
}

/// A failure of the API as one of a pod's call: what is not there is not the pod, which the kubelet would take for gone.
pub fn failed(e: ApiError) -> Error {
    match e.is_not_found() {
        true => Error::new(Kind::FailedPrecondition, e.to_string()),
        false => e.into(),
    }
}

/// The guests of a handler.
pub struct Guests {
    unit: &'static Unit,
    api: Proxmox,
    /// This node.
    node: String,
    /// Identity of this installation.
    installation: String,
    /// Numbers that they get, first and last.
    vmids: (Vmid, Vmid),
    /// After what time one is deleted that is nobody's; None: never.
    remove_after: Option<Duration>,
    /// Numbers that are given, or about to be asked for.
    given: Mutex<BTreeSet<u32>>,
    /// Those of them that this process has asked for.
    asked: Mutex<BTreeSet<u32>>,
    /// Since when this process is there: what an earlier one has asked for may be done yet.
    since: Instant,
    /// Numbers about which no answer came.
    unsure: Mutex<BTreeMap<u32, numbers::Unsure>>,
    /// Those that were nobody's at the last look, by number.
    orphans: Mutex<BTreeMap<u32, orphans::Orphan>>,
}

impl Guests {
    /// Nothing is asked yet.
    pub fn new(
        unit: &'static Unit,
        api: &Proxmox,
        node: &str,
        installation: &str,
        vmids: (Vmid, Vmid),
        remove_after: Option<Duration>,
    ) -> Self {
        Self {
            unit,
            api: api.clone(),
            node: node.to_owned(),
            installation: installation.to_owned(),
            vmids,
            remove_after,
            given: Default::default(),
            asked: Default::default(),
            since: Instant::now(),
            unsure: Default::default(),
            orphans: Default::default(),
        }
    }

    /// The release of Proxmox, which has to be one that is supported, of a cluster that this node is in.
    pub async fn check_node(&self) -> Result<Version> {
        let version = look(self.api.version()).await??;
        if version.major().is_none_or(|n| n < OLDEST) {
            let what = format!("Proxmox VE {} is not supported: {OLDEST} or later is needed", version.version);
            return Err(Error::precondition(what));
        }
        let nodes = look(self.api.nodes()).await??;
        if !nodes.iter().any(|n| n.node == self.node) {
            let what = format!("the cluster has no node {:?} (proxmox.node)", self.node);
            return Err(Error::precondition(what));
        }
        Ok(version)
    }

    /// The notes of one.
    async fn notes(&self, node: &str, vmid: Vmid) -> Result<String, ApiError> {
        match self.unit.kind {
            GuestKind::Ct => self.api.ct_config(node, vmid).await.map(|c| c.description().to_owned()),
            GuestKind::Vm => self.api.vm_config(node, vmid).await.map(|c| c.description().to_owned()),
        }
    }
}

/// What the API answers to a look at it, which may not take long.
pub async fn look<T>(asked: impl Future<Output = Result<T, ApiError>>) -> Result<Result<T, ApiError>> {
    let late = |_| Error::new(Kind::DeadlineExceeded, format!("the Proxmox API has not answered within {PATIENCE:?}"));
    tokio::time::timeout(PATIENCE, asked).await.map_err(late)
}

/// Whether it was poisoned does not matter: no change of ours is done by halves.
pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
