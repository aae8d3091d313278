//! The template of pods' CTs: an init that reaps and ends when it is told to, and empty folders. Built of this installation's
//! own program and uploaded once for each version of that.
//!
//! A crash leaves an upload to Proxmox, which another replaces.

use camino::Utf8Path;
use sha2::Digest as _;

use super::ProxmoxLxcBackend;
use crate::backends::proxmox::failed;
use crate::core::blocking::blocking;
use crate::core::error::{Error, Result};
use crate::utils::atomic::{self, Durability};

/// Empty folders that a CT is started with.
const FOLDERS: [&str; 9] = ["dev", "etc", "proc", "run", "sbin", "sys", "tmp", "usr", "var"];

/// The archive, of an init that is at `init` on this node.
fn build(init: &Utf8Path) -> std::io::Result<Vec<u8>> {
    let program = std::fs::read(init)?;
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    for folder in FOLDERS {
        header.set_entry_type(tar::EntryType::Directory);
        header.set_mode(0o755);
        header.set_size(0);
        tar.append_data(&mut header, format!("{folder}/"), std::io::empty())?;
    }
    header.set_entry_type(tar::EntryType::Regular);
    header.set_size(program.len() as u64);
    tar.append_data(&mut header, "sbin/init", program.as_slice())?;
    tar.into_inner()
}

impl ProxmoxLxcBackend {
    /// `STORAGE:vztmpl/NAME` of the template, which is there when this returns.
    pub(super) async fn template(&self) -> Result<String> {
        let mut known = self.template.lock().await;
        if let Some(volid) = &*known {
            return Ok(volid.clone());
        }
        let init = self.config.init.clone();
        let archive =
            blocking(move || build(&init).map_err(|e| Error::io(format!("the init {init} of pods' CTs"), e))).await?;
        let digest: String = sha2::Sha256::digest(&archive).iter().take(6).map(|b| format!("{b:02x}")).collect();
        let name = format!("proxmox-lxcri-pod-{}-{digest}.tar", env!("CARGO_PKG_VERSION"));
        let (node, storage) = (&self.config.node, &self.config.template_storage);
        let volid = format!("{storage}:vztmpl/{name}");
        let there = self.api.content(node, storage, Some("vztmpl")).await.map_err(failed)?;
        // One of another size is an upload that broke, or is under way.
        if !there.iter().any(|c| c.volid == volid && c.size == archive.len() as u64) {
            let file = self.pods.config.state.join(&name);
            let at = file.clone();
            blocking(move || {
                atomic::write(at.as_std_path(), &archive, 0o600, Durability::Process)
                    .map_err(|e| Error::io(format!("write {at}"), e))
            })
            .await?;
            let uploaded = match self.api.upload_template(node, storage, &file).await {
                Ok(task) => task.wait().await.map(drop),
                Err(e) => Err(e),
            };
            let _ = std::fs::remove_file(&file);
            uploaded.map_err(failed)?;
            tracing::info!(template = volid, "uploaded the template of pods' CTs");
        }
        *known = Some(volid.clone());
        Ok(volid)
    }

    /// The next pod looks whether it is there: somebody may have deleted it.
    pub(super) async fn forget_template(&self) {
        *self.template.lock().await = None;
    }
}
