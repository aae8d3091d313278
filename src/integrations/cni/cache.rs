//! Attachments on disk: what ADD was given and what came of it, one file per pod in the cache folder.
//!
//! Called by `cni` alone; blocks shortly. A file is written *before* the first plugin runs, and synced: leases live on disk, too,
//! and after a power loss both sides must still know each other. The result gets a file of its own before success is told, and is
//! not synced: a pod that lost its machine is only disconnected, for which what ADD was given is enough. A file that can't be read
//! is moved aside (`.bad`), told, and never stops the others.

use std::io;

use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::conf::NetworkConf;
use super::error::CniError;
use crate::core::ids::PodId;
use crate::core::ports::NetworkRequest;
use crate::utils::atomic::{self, Durability};

const FORMAT: u32 = 1;

/// Which network namespace exactly: the path alone may lead to another one after a reboot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NetnsId {
    pub boot: String,
    pub inode: u64,
}

/// A pod's attachment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Attachment {
    pub format: u32,
    pub request: NetworkRequest,
    pub ifname: String,
    pub netns: Option<NetnsId>,
    pub conf: NetworkConf,
    /// Of the last plugin of the chain; None: ADD did not end, or what came of it was lost with the machine. On disk it is in a
    /// file of its own; older versions wrote it here.
    #[serde(default, skip_serializing)]
    pub result: Option<Value>,
}

impl Attachment {
    pub fn new(request: &NetworkRequest, ifname: &str, netns: Option<NetnsId>, conf: &NetworkConf) -> Self {
        let (request, conf) = (request.clone(), conf.clone());
        Self { format: FORMAT, request, ifname: ifname.into(), netns, conf, result: None }
    }
}

/// The folder of attachments.
#[derive(Debug, Clone)]
pub(super) struct Cache(pub Utf8PathBuf);

impl Cache {
    fn path(&self, pod: &PodId) -> Utf8PathBuf {
        self.0.join(format!("{pod}.json"))
    }

    fn result_path(&self, pod: &PodId) -> Utf8PathBuf {
        self.0.join(format!("{pod}.result"))
    }

    /// Keeps an attachment that has no result yet.
    pub fn write(&self, attachment: &Attachment) -> Result<(), CniError> {
        let path = self.path(&attachment.request.pod);
        let failed = |source| CniError::Cache { path: path.clone(), source };
        std::fs::create_dir_all(&self.0).map_err(failed)?;
        let text = serde_json::to_vec(attachment).map_err(|e| failed(e.into()))?;
        atomic::write(path.as_std_path(), &text, 0o600, Durability::Machine).map_err(failed)
    }

    /// Keeps the result beside an attachment that is there.
    pub fn write_result(&self, pod: &PodId, result: &Value) -> Result<(), CniError> {
        let path = self.result_path(pod);
        let failed = |source| CniError::Cache { path: path.clone(), source };
        let text = serde_json::to_vec(result).map_err(|e| failed(e.into()))?;
        atomic::write(path.as_std_path(), &text, 0o600, Durability::Process).map_err(failed)
    }

    /// The pod's attachment; None: there is none, or it can't be read any more.
    pub fn read(&self, pod: &PodId) -> Result<Option<Attachment>, CniError> {
        let path = self.path(pod);
        let text = match std::fs::read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text.map_err(|source| CniError::Cache { path: path.clone(), source })?,
        };
        match parse(&text, pod) {
            Ok(mut attachment) => {
                if let Some(result) = self.read_result(pod)? {
                    attachment.result = Some(result);
                }
                Ok(Some(attachment))
            }
            Err(why) => {
                tracing::error!(%path, why, "network attachment can't be read, moved aside");
                let aside = path.with_extension("json.bad");
                std::fs::rename(&path, &aside).map_err(|source| CniError::Cache { path, source })?;
                self.remove(pod)?;
                Ok(None)
            }
        }
    }

    /// None also when a power loss left a part of it.
    fn read_result(&self, pod: &PodId) -> Result<Option<Value>, CniError> {
        let path = self.result_path(pod);
        match std::fs::read(&path) {
            Ok(text) => Ok(serde_json::from_slice(&text)
                .inspect_err(|e| tracing::warn!(%path, why = %e, "a network's result can't be read: the pod is disconnected without it"))
                .ok()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(CniError::Cache { path, source }),
        }
    }

    /// The attachment goes last: what is left of it is found by that.
    pub fn remove(&self, pod: &PodId) -> Result<(), CniError> {
        for path in [self.result_path(pod), self.path(pod)] {
            match std::fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(CniError::Cache { path, source });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Pods with an attachment. Removes what another daemon's interrupted write left.
    pub fn pods(&self) -> Result<Vec<PodId>, CniError> {
        let failed = |source| CniError::Cache { path: self.0.clone(), source };
        let entries = match std::fs::read_dir(&self.0) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed)?,
        };
        let own = format!(".tmp-{}-", std::process::id());
        let mut pods = Vec::new();
        for entry in entries {
            let name = entry.map_err(failed)?.file_name();
            let Some(name) = name.to_str() else { continue };
            if let Some(pod) = name.strip_suffix(".json").and_then(|id| id.parse().ok()) {
                pods.push(pod);
            } else if let Some(pod) = name.strip_suffix(".result").and_then(|id| id.parse().ok()) {
                // Written after its attachment and removed before it: one that is alone is what a power loss left.
                if !self.path(&pod).try_exists().map_err(failed)? {
                    let _ = std::fs::remove_file(self.result_path(&pod));
                }
            } else if atomic::is_temporary(name) && !name.starts_with(&own) {
                let _ = std::fs::remove_file(self.0.join(name));
            }
        }
        pods.sort();
        Ok(pods)
    }
}

fn parse(text: &[u8], pod: &PodId) -> Result<Attachment, String> {
    let attachment: Attachment = serde_json::from_slice(text).map_err(|e| e.to_string())?;
    if attachment.format != FORMAT {
        return Err(format!("format {} is not known", attachment.format));
    }
    if attachment.request.pod != *pod {
        return Err(format!("it is that of pod {}", attachment.request.pod));
    }
    Ok(attachment)
}

/// Identity of the network namespace pinned at `path`; None: nothing is pinned there. Blocks shortly.
pub(super) fn netns_id(path: &Utf8Path) -> Option<NetnsId> {
    if !crate::integrations::netns::is_pinned(path).unwrap_or(false) {
        return None;
    }
    let inode = std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(path).ok()?);
    Some(NetnsId { boot: crate::utils::pidfd::boot_id().ok()?, inode })
}
