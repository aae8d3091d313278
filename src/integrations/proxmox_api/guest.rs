//! What is done with a guest whichever kind it is, container or VM: their calls have the same shape and mean the same.
//!
//! Called by the command line and the backends. What takes its time gives a [`Running`] task, whose end is the operation's.
//! The lanes of node and storage are held until then. Fails with [`ApiError`].

use std::time::Duration;

use serde_json::Value;

use super::error::{ApiError, ErrorKind};
use super::guest_types::{
    CloneSpec, GuestChange, GuestConfig, GuestId, GuestKind, GuestNet, GuestStatus, Pending, Snapshot, pairs,
};
use super::ids::{Upid, Vmid};
use super::lanes::Permit;
use super::lenient;
use super::property::PropertyError;
use super::retry;
use super::task::{Ended, Running};
use super::transport::{Form, Proxmox, path};

/// How often a change is begun whose task does not get the guest's lock, for which it waits ten seconds each time.
const BUSY: u32 = 4;

pub(super) fn flag(on: bool) -> Option<String> {
    on.then(|| "1".to_owned())
}

impl GuestId<'_> {
    pub(super) fn path(self, rest: &[&str]) -> String {
        let vmid = self.vmid.to_string();
        let mut parts = vec!["nodes", self.node, self.kind.name(), vmid.as_str()];
        parts.extend(rest);
        path(&parts)
    }
}

impl Proxmox {
    /// A change of one guest that ends with its task.
    async fn act(&self, guest: GuestId<'_>, rest: &[&str], form: Form) -> Result<Running, ApiError> {
        let at = guest.path(rest);
        let lane = self.node_lane(guest.node, &at).await?;
        let upid: Upid = self.settle(guest.vmid, self.post(&at, form).await).await?;
        Ok(Running::new(self.clone(), upid, vec![lane]))
    }

    /// The same of one that stops it, to its end; `patience`: longest time for the task, where it is not the usual.
    async fn halt(
        &self,
        guest: GuestId<'_>,
        what: &str,
        form: Form,
        patience: Option<Duration>,
    ) -> Result<Ended, ApiError> {
        let at = guest.path(&["status", what]);
        let lane = self.end_lane(guest.node, &at).await?;
        let upid: Upid = self.settle(guest.vmid, self.post(&at, form).await).await?;
        let running = Running::new(self.clone(), upid, vec![lane]);
        match patience {
            Some(patience) => running.wait_for(patience).await,
            None => running.wait().await,
        }
    }

    /// A token whose rights come from a pool gets 403 for a guest that is gone, since that is in no pool any more: what is
    /// refused for a number that nobody has is told as not found.
    pub(super) async fn settle<T>(&self, vmid: Vmid, result: Result<T, ApiError>) -> Result<T, ApiError> {
        match result {
            Err(e)
                if matches!(e.kind(), ErrorKind::Permission { .. })
                    && self.vmid_is_free(vmid).await.unwrap_or_default() =>
            {
                Err(ApiError::new(ErrorKind::NotFound, format!("guest {vmid}"), "there is no such guest"))
            }
            result => result,
        }
    }

    /// All guests of a kind on a node that we may see.
    pub async fn guest_list(&self, kind: GuestKind, node: &str) -> Result<Vec<GuestStatus>, ApiError> {
        self.get(&path(&["nodes", node, kind.name()]), Form::new()).await
    }

    /// The present state, from the node itself.
    pub async fn guest_status(&self, guest: GuestId<'_>) -> Result<GuestStatus, ApiError> {
        self.settle(guest.vmid, self.get(&guest.path(&["status", "current"]), Form::new()).await).await
    }

    /// Whether it is there, on this node, and of this kind.
    pub async fn guest_exists(&self, guest: GuestId<'_>) -> Result<bool, ApiError> {
        match self.guest_status(guest).await {
            Ok(_) => Ok(true),
            Err(e) if e.is_not_found() => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Its configuration as it is now, as the API sends it.
    async fn guest_config(&self, guest: GuestId<'_>) -> Result<Value, ApiError> {
        let answer = self.get(&guest.path(&["config"]), pairs([("current", flag(true))])).await;
        self.settle(guest.vmid, answer).await
    }

    /// The same as a type.
    pub(super) async fn config<N: GuestNet>(&self, node: &str, vmid: Vmid) -> Result<GuestConfig<N>, ApiError> {
        let guest = GuestId { kind: N::KIND, node, vmid };
        let unfit = |why: String| ApiError::new(ErrorKind::Protocol, format!("GET {}", guest.path(&["config"])), why);
        GuestConfig::parse(&self.guest_config(guest).await?).map_err(|e| unfit(e.to_string()))
    }

    /// Changes its configuration; the answer are the keys that wait for the next start.
    pub async fn guest_update(&self, guest: GuestId<'_>, change: &GuestChange) -> Result<Vec<Pending>, ApiError> {
        let at = guest.path(&["config"]);
        let mut form: Form = change.set.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
        let delete = change.delete.join(",");
        form.extend(pairs([("delete", Some(delete).filter(|d| !d.is_empty())), ("digest", change.digest.clone())]));
        let lane = self.node_lane(guest.node, &at).await?;
        // A change of a VM may make disks, for which the synchronous call has not the time.
        let answer = match guest.kind {
            GuestKind::Ct => self.put::<Option<Upid>>(&at, form).await,
            GuestKind::Vm => self.post(&at, form).await,
        };
        if let Some(upid) = self.settle(guest.vmid, answer).await? {
            Running::new(self.clone(), upid, vec![lane]).wait().await?;
        }
        let all: Vec<Pending> = self.get(&guest.path(&["pending"]), Form::new()).await?;
        Ok(all.into_iter().filter(|p| p.delete || p.pending.is_some()).collect())
    }

    /// Waits for places for one that is made with its disks on `storage`: nothing is sent.
    pub async fn place(&self, kind: GuestKind, node: &str, storage: &str) -> Result<Places, ApiError> {
        let at = path(&["nodes", node, kind.name()]);
        let storage = self.storage_lane(node, storage, &at).await?;
        Ok(Places(vec![storage, self.node_lane(node, &at).await?]))
    }

    /// Makes one with these parameters.
    pub(super) async fn make(
        &self,
        places: Places,
        guest: GuestId<'_>,
        form: Result<Form, PropertyError>,
    ) -> Result<Running, ApiError> {
        let at = path(&["nodes", guest.node, guest.kind.name()]);
        let form = form.map_err(|e| ApiError::new(ErrorKind::Invalid, format!("POST {at}"), e.to_string()))?;
        let upid: Upid = self.post(&at, form).await?;
        Ok(Running::new(self.clone(), upid, places.0))
    }

    /// Starts it; nothing to do if it runs.
    pub async fn guest_start(&self, guest: GuestId<'_>) -> Result<(), ApiError> {
        let start = || async { self.act(guest, &["status", "start"], Form::new()).await?.wait().await };
        done(unless_busy(start).await, ErrorKind::AlreadyRunning)
    }

    /// Kills it; nothing to do if it does not run. A shutdown under way is overruled.
    pub async fn guest_stop(&self, guest: GuestId<'_>) -> Result<(), ApiError> {
        let form = pairs([("overrule-shutdown", flag(true))]);
        let stop = || self.halt(guest, "stop", form.clone(), None);
        done(unless_busy(stop).await, ErrorKind::NotRunning)
    }

    /// Has it end by itself within `timeout` seconds, then kills it if `force`. A paused VM can't end by itself: `Paused`,
    /// unless it is killed.
    pub async fn guest_shutdown(&self, guest: GuestId<'_>, timeout: u32, force: bool) -> Result<(), ApiError> {
        let form = pairs([("timeout", Some(timeout.to_string())), ("forceStop", flag(force))]);
        // Of an init that does not end, and is not killed, the task takes twice as long.
        let task = Duration::from_secs(2 * u64::from(timeout) + 30).max(self.task_patience());
        let shutdown = || self.halt(guest, "shutdown", form.clone(), Some(task));
        done(unless_busy(shutdown).await, ErrorKind::NotRunning)
    }

    /// Deletes it with what other lists say of it; nothing to do if it is gone. `force`: also a running one.
    pub async fn guest_delete(&self, guest: GuestId<'_>, force: bool) -> Result<(), ApiError> {
        self.guest_destroy(guest, force, false).await.map(drop)
    }

    /// The same; false: it was gone, from this node at least. `unreferenced`: with the volumes of its number that its configuration
    /// does not name, of what a making or a deletion has left that died.
    pub async fn guest_destroy(&self, guest: GuestId<'_>, force: bool, unreferenced: bool) -> Result<bool, ApiError> {
        // The API deletes running containers when told to; a VM has to be stopped before.
        if force && guest.kind == GuestKind::Vm && self.guest_exists(guest).await? {
            self.guest_stop(guest).await?;
        }
        let at = guest.path(&[]);
        let form = pairs([
            ("purge", flag(true)),
            ("force", flag(force && guest.kind == GuestKind::Ct)),
            ("destroy-unreferenced-disks", flag(unreferenced)),
        ]);
        let delete = || async {
            let lane = self.end_lane(guest.node, &at).await?;
            let upid = self.settle(guest.vmid, self.delete::<Upid>(&at, form.clone()).await).await?;
            Running::new(self.clone(), upid, vec![lane]).wait().await
        };
        match unless_busy(delete).await {
            // The words may be about its storage.
            Err(e) if e.is_not_found() && !self.guest_exists(guest).await? => Ok(false),
            ended => ended.map(|_| true),
        }
    }

    /// Makes a disk larger: `size` is absolute ("8G") or an addition ("+1G").
    pub async fn guest_resize(&self, guest: GuestId<'_>, disk: &str, size: &str) -> Result<Running, ApiError> {
        let at = guest.path(&["resize"]);
        let form = pairs([("disk", Some(disk.to_owned())), ("size", Some(size.to_owned()))]);
        let lane = self.node_lane(guest.node, &at).await?;
        let upid: Upid = self.settle(guest.vmid, self.put(&at, form).await).await?;
        Ok(Running::new(self.clone(), upid, vec![lane]))
    }

    /// Its snapshots, without the present state.
    pub async fn guest_snapshots(&self, guest: GuestId<'_>) -> Result<Vec<Snapshot>, ApiError> {
        let all: Vec<Snapshot> =
            self.settle(guest.vmid, self.get(&guest.path(&["snapshot"]), Form::new()).await).await?;
        Ok(all.into_iter().filter(|s| s.name != "current").collect())
    }

    /// Takes one, of a VM without its memory.
    pub async fn guest_snapshot(&self, guest: GuestId<'_>, name: &str, notes: &str) -> Result<Running, ApiError> {
        let notes = Some(notes.to_owned()).filter(|n| !n.is_empty());
        let form = pairs([("snapname", Some(name.to_owned())), ("description", notes)]);
        self.act(guest, &["snapshot"], form).await
    }

    /// Removes one.
    pub async fn guest_delete_snapshot(&self, guest: GuestId<'_>, name: &str) -> Result<Running, ApiError> {
        let at = guest.path(&["snapshot", name]);
        let lane = self.node_lane(guest.node, &at).await?;
        let upid: Upid = self.settle(guest.vmid, self.delete(&at, Form::new()).await).await?;
        Ok(Running::new(self.clone(), upid, vec![lane]))
    }

    /// Back to one; stops a running guest, and starts it again if `start`.
    pub async fn guest_rollback(&self, guest: GuestId<'_>, name: &str, start: bool) -> Result<Running, ApiError> {
        self.act(guest, &["snapshot", name, "rollback"], pairs([("start", flag(start))])).await
    }

    /// Copies it, or clones it where it is a template.
    pub async fn guest_clone(&self, guest: GuestId<'_>, new: Vmid, spec: &CloneSpec) -> Result<Running, ApiError> {
        let at = guest.path(&["clone"]);
        let name = match guest.kind {
            GuestKind::Ct => "hostname",
            GuestKind::Vm => "name",
        };
        let form = pairs([
            ("newid", Some(new.to_string())),
            (name, spec.name.clone()),
            ("description", spec.description.clone()),
            ("pool", spec.pool.clone()),
            ("snapname", spec.snapshot.clone()),
            ("storage", spec.storage.clone()),
            ("full", flag(spec.full)),
        ]);
        let mut lanes = Vec::new();
        if let Some(storage) = &spec.storage {
            lanes.push(self.storage_lane(guest.node, storage, &at).await?);
        }
        lanes.push(self.node_lane(guest.node, &at).await?);
        let upid: Upid = self.settle(guest.vmid, self.post(&at, form).await).await?;
        Ok(Running::new(self.clone(), upid, lanes))
    }

    /// Makes it a template. For a container the API answers with nothing although a task goes on: then the configuration is
    /// asked until it says so.
    pub async fn guest_make_template(&self, guest: GuestId<'_>) -> Result<(), ApiError> {
        let at = guest.path(&["template"]);
        let lane = self.node_lane(guest.node, &at).await?;
        let answer = self.post::<Option<Upid>>(&at, Form::new()).await;
        if let Some(upid) = self.settle(guest.vmid, answer).await? {
            return Running::new(self.clone(), upid, vec![lane]).wait().await.map(drop);
        }
        let limit = self.0.settings.task_timeout.get();
        let poll = async {
            while !matches!(lenient::as_bool(&self.guest_config(guest).await?["template"]), Ok(Some(true))) {
                tokio::time::sleep(std::time::Duration::from_millis(200)).await;
            }
            Ok(())
        };
        let late = |_| ApiError::new(ErrorKind::Timeout, format!("POST {at}"), "it did not become a template");
        tokio::time::timeout(limit, poll).await.map_err(late)?
    }
}

/// Places in the queues of a node and a storage; given back with the task that they are for.
pub struct Places(Vec<Permit>);

/// `kind` is success, from the call and from the task: its aim was reached before it.
fn done(ended: Result<Ended, ApiError>, kind: ErrorKind) -> Result<(), ApiError> {
    match ended {
        Ok(Ended::Ok | Ended::Warnings(_)) => Ok(()),
        Err(e) if *e.kind() == kind => Ok(()),
        Err(e) => Err(e),
    }
}

/// A change whose task did not get the guest's lock has done nothing: it is done again. The call itself was repeated before.
async fn unless_busy<F: Future<Output = Result<Ended, ApiError>>>(change: impl Fn() -> F) -> Result<Ended, ApiError> {
    for tries in 1..BUSY {
        match change().await {
            Err(e) if *e.kind() == ErrorKind::Busy && e.status().is_none() => {
                tracing::debug!(error = %e, tries, "a task did not get its guest's lock: once more");
                tokio::time::sleep(retry::wait(tries)).await;
            }
            ended => return ended,
        }
    }
    change().await
}
