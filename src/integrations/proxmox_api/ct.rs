//! Containers of Proxmox: all that can be done with them.
//!
//! Called by the command line and the backend. What takes its time gives a [`Running`] task, whose end is the operation's.
//! The lanes of node and storage are held until then. Fails with [`ApiError`].

use serde_json::Value;

use super::ct_types::{CloneSpec, Ct, CtChange, CtConfig, CtSpec, Interface, Pending, Snapshot};
use super::error::{ApiError, ErrorKind};
use super::ids::{Upid, Vmid};
use super::task::{Ended, Running};
use super::transport::{Form, Proxmox, path};

fn pairs<const N: usize>(list: [(&str, Option<String>); N]) -> Form {
    list.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect()
}

fn flag(on: bool) -> Option<String> {
    on.then(|| "1".to_owned())
}

impl Proxmox {
    fn ct(node: &str, vmid: Vmid, rest: &[&str]) -> String {
        let vmid = vmid.to_string();
        let mut parts = vec!["nodes", node, "lxc", vmid.as_str()];
        parts.extend(rest);
        path(&parts)
    }

    /// A change of one container that ends with its task.
    async fn act(&self, node: &str, vmid: Vmid, rest: &[&str], form: Form) -> Result<Running, ApiError> {
        let at = Self::ct(node, vmid, rest);
        let lane = self.node_lane(node, &at).await?;
        let upid: Upid = self.settle(vmid, self.post(&at, form).await).await?;
        Ok(Running::new(self.clone(), upid, vec![lane]))
    }

    /// A token whose rights come from a pool gets 403 for a guest that is gone, since that is in no pool any more: what is
    /// refused for a number that nobody has is told as not found.
    async fn settle<T>(&self, vmid: Vmid, result: Result<T, ApiError>) -> Result<T, ApiError> {
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

    /// All containers of a node that we may see.
    pub async fn ct_list(&self, node: &str) -> Result<Vec<Ct>, ApiError> {
        self.get(&path(&["nodes", node, "lxc"]), Form::new()).await
    }

    /// The present state, from the node itself.
    pub async fn ct_status(&self, node: &str, vmid: Vmid) -> Result<Ct, ApiError> {
        self.settle(vmid, self.get(&Self::ct(node, vmid, &["status", "current"]), Form::new()).await).await
    }

    /// Whether it is there, on this node.
    pub async fn ct_exists(&self, node: &str, vmid: Vmid) -> Result<bool, ApiError> {
        match self.ct_status(node, vmid).await {
            Ok(_) => Ok(true),
            Err(e) if e.is_not_found() => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Its configuration as it is now.
    pub async fn ct_config(&self, node: &str, vmid: Vmid) -> Result<CtConfig, ApiError> {
        let at = Self::ct(node, vmid, &["config"]);
        let answer = self.get(&at, pairs([("current", flag(true))])).await;
        let answer: Value = self.settle(vmid, answer).await?;
        CtConfig::parse(&answer).map_err(|e| ApiError::new(ErrorKind::Protocol, format!("GET {at}"), e.to_string()))
    }

    /// Changes its configuration; the answer are the keys that wait for the next start.
    pub async fn ct_update(&self, node: &str, vmid: Vmid, change: &CtChange) -> Result<Vec<Pending>, ApiError> {
        let at = Self::ct(node, vmid, &["config"]);
        let mut form: Form = change.set.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
        let delete = change.delete.join(",");
        form.extend(pairs([("delete", Some(delete).filter(|d| !d.is_empty())), ("digest", change.digest.clone())]));
        {
            let _lane = self.node_lane(node, &at).await?;
            let answer: Value = self.settle(vmid, self.put(&at, form).await).await?;
            if !answer.is_null() {
                return Err(ApiError::new(
                    ErrorKind::Protocol,
                    format!("PUT {at}"),
                    "an answer where none is expected",
                ));
            }
        }
        let all: Vec<Pending> = self.get(&Self::ct(node, vmid, &["pending"]), Form::new()).await?;
        Ok(all.into_iter().filter(|p| p.delete || p.pending.is_some()).collect())
    }

    /// Makes one. `AlreadyExists`, here or from the task, means that the number is taken.
    pub async fn ct_create(&self, node: &str, vmid: Vmid, spec: &CtSpec) -> Result<Running, ApiError> {
        let at = path(&["nodes", node, "lxc"]);
        let form = spec.form(vmid);
        let form = form.map_err(|e| ApiError::new(ErrorKind::Invalid, format!("POST {at}"), e.to_string()))?;
        let storage = self.storage_lane(node, spec.storage(), &at).await?;
        let lane = self.node_lane(node, &at).await?;
        let upid: Upid = self.post(&at, form).await?;
        Ok(Running::new(self.clone(), upid, vec![storage, lane]))
    }

    /// Starts it; nothing to do if it runs.
    pub async fn ct_start(&self, node: &str, vmid: Vmid) -> Result<(), ApiError> {
        done(self.act(node, vmid, &["status", "start"], Form::new()).await, ErrorKind::AlreadyRunning).await
    }

    /// Kills it; nothing to do if it does not run. A shutdown under way is overruled.
    pub async fn ct_stop(&self, node: &str, vmid: Vmid) -> Result<(), ApiError> {
        let form = pairs([("overrule-shutdown", flag(true))]);
        done(self.act(node, vmid, &["status", "stop"], form).await, ErrorKind::NotRunning).await
    }

    /// Has it end by itself within `timeout` seconds, then kills it if `force`.
    pub async fn ct_shutdown(&self, node: &str, vmid: Vmid, timeout: u32, force: bool) -> Result<(), ApiError> {
        let form = pairs([("timeout", Some(timeout.to_string())), ("forceStop", flag(force))]);
        done(self.act(node, vmid, &["status", "shutdown"], form).await, ErrorKind::NotRunning).await
    }

    /// Deletes it with what other lists say of it; nothing to do if it is gone. `force`: also a running one.
    pub async fn ct_delete(&self, node: &str, vmid: Vmid, force: bool) -> Result<(), ApiError> {
        let at = Self::ct(node, vmid, &[]);
        let form = pairs([("purge", flag(true)), ("force", flag(force))]);
        let lane = self.node_lane(node, &at).await?;
        let ended = match self.settle(vmid, self.delete::<Upid>(&at, form).await).await {
            Ok(upid) => Running::new(self.clone(), upid, vec![lane]).wait().await.map(drop),
            Err(e) => Err(e),
        };
        match ended {
            // The words may be about its storage.
            Err(e) if e.is_not_found() && !self.ct_exists(node, vmid).await? => Ok(()),
            ended => ended,
        }
    }

    /// Makes a disk larger: `size` is absolute ("8G") or an addition ("+1G").
    pub async fn ct_resize(&self, node: &str, vmid: Vmid, disk: &str, size: &str) -> Result<Running, ApiError> {
        let at = Self::ct(node, vmid, &["resize"]);
        let form = pairs([("disk", Some(disk.to_owned())), ("size", Some(size.to_owned()))]);
        let lane = self.node_lane(node, &at).await?;
        let upid: Upid = self.settle(vmid, self.put(&at, form).await).await?;
        Ok(Running::new(self.clone(), upid, vec![lane]))
    }

    /// Its snapshots, without the present state.
    pub async fn ct_snapshots(&self, node: &str, vmid: Vmid) -> Result<Vec<Snapshot>, ApiError> {
        let all: Vec<Snapshot> =
            self.settle(vmid, self.get(&Self::ct(node, vmid, &["snapshot"]), Form::new()).await).await?;
        Ok(all.into_iter().filter(|s| s.name != "current").collect())
    }

    /// Takes one.
    pub async fn ct_snapshot(&self, node: &str, vmid: Vmid, name: &str, notes: &str) -> Result<Running, ApiError> {
        let notes = Some(notes.to_owned()).filter(|n| !n.is_empty());
        let form = pairs([("snapname", Some(name.to_owned())), ("description", notes)]);
        self.act(node, vmid, &["snapshot"], form).await
    }

    /// Removes one.
    pub async fn ct_delete_snapshot(&self, node: &str, vmid: Vmid, name: &str) -> Result<Running, ApiError> {
        let at = Self::ct(node, vmid, &["snapshot", name]);
        let lane = self.node_lane(node, &at).await?;
        let upid: Upid = self.settle(vmid, self.delete(&at, Form::new()).await).await?;
        Ok(Running::new(self.clone(), upid, vec![lane]))
    }

    /// Back to one; stops a running container, and starts it again if `start`.
    pub async fn ct_rollback(&self, node: &str, vmid: Vmid, name: &str, start: bool) -> Result<Running, ApiError> {
        self.act(node, vmid, &["snapshot", name, "rollback"], pairs([("start", flag(start))])).await
    }

    /// Copies it, or clones it where it is a template.
    pub async fn ct_clone(&self, node: &str, vmid: Vmid, new: Vmid, spec: &CloneSpec) -> Result<Running, ApiError> {
        let at = Self::ct(node, vmid, &["clone"]);
        let form = pairs([
            ("newid", Some(new.to_string())),
            ("hostname", spec.hostname.clone()),
            ("description", spec.description.clone()),
            ("pool", spec.pool.clone()),
            ("snapname", spec.snapshot.clone()),
            ("storage", spec.storage.clone()),
            ("full", flag(spec.full)),
        ]);
        let mut lanes = Vec::new();
        if let Some(storage) = &spec.storage {
            lanes.push(self.storage_lane(node, storage, &at).await?);
        }
        lanes.push(self.node_lane(node, &at).await?);
        let upid: Upid = self.settle(vmid, self.post(&at, form).await).await?;
        Ok(Running::new(self.clone(), upid, lanes))
    }

    /// Makes it a template. The API answers with nothing although a task goes on: the configuration is asked until it says so.
    pub async fn ct_make_template(&self, node: &str, vmid: Vmid) -> Result<(), ApiError> {
        let at = Self::ct(node, vmid, &["template"]);
        let _lane = self.node_lane(node, &at).await?;
        let _: Value = self.post(&at, Form::new()).await?;
        let limit = self.0.settings.task_timeout.get();
        let poll = async {
            loop {
                let config = self.ct_config(node, vmid).await?;
                if config.get("template") == Some("1") {
                    return Ok(());
                }
                tokio::time::sleep(std::time::Duration::from_millis(200)).await;
            }
        };
        let late = |_| ApiError::new(ErrorKind::Timeout, format!("POST {at}"), "it did not become a template");
        tokio::time::timeout(limit, poll).await.map_err(late)?
    }

    /// Interfaces of a running container; none of a stopped one.
    pub async fn ct_interfaces(&self, node: &str, vmid: Vmid) -> Result<Vec<Interface>, ApiError> {
        let list: Option<Vec<Interface>> = self.get(&Self::ct(node, vmid, &["interfaces"]), Form::new()).await?;
        Ok(list.unwrap_or_default())
    }
}

/// Waits for a task whose aim may have been reached before it: `kind` then is success, from the call and from the task.
async fn done(started: Result<Running, ApiError>, kind: ErrorKind) -> Result<(), ApiError> {
    let ended = match started {
        Ok(running) => running.wait().await,
        Err(e) => Err(e),
    };
    match ended {
        Ok(Ended::Ok | Ended::Warnings(_)) => Ok(()),
        Err(e) if *e.kind() == kind => Ok(()),
        Err(e) => Err(e),
    }
}
