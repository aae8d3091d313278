//! What a cluster has: release, nodes, guests and their numbers, storages and what is on them.
//!
//! Called by the command line and the backend. Fails with [`ApiError`].

use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::error::{ApiError, ErrorKind};
use super::ids::{Upid, Vmid};
use super::lenient;
use super::task::Running;
use super::transport::{Form, Proxmox, path};

/// Release of Proxmox VE.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub struct Version {
    /// "9.2.11".
    pub version: String,
    /// "9.2".
    #[serde(default)]
    pub release: String,
}

impl Version {
    /// First number of the release.
    pub fn major(&self) -> Option<u32> {
        self.version.split('.').next()?.parse().ok()
    }
}

/// A node.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub struct Node {
    /// Name.
    pub node: String,
    /// "online", "offline" or "unknown".
    #[serde(default)]
    pub status: String,
    /// CPUs.
    #[serde(default, deserialize_with = "lenient::u64")]
    pub maxcpu: u64,
    /// Bytes of memory in use.
    #[serde(default, deserialize_with = "lenient::u64")]
    pub mem: u64,
    /// Bytes of memory.
    #[serde(default, deserialize_with = "lenient::u64")]
    pub maxmem: u64,
    /// Seconds.
    #[serde(default, deserialize_with = "lenient::u64")]
    pub uptime: u64,
    /// SHA-256 fingerprint of its certificate.
    #[serde(default)]
    pub ssl_fingerprint: String,
}

/// A guest anywhere in the cluster. Up to ten seconds old: never to be decided on.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub struct Guest {
    /// Number.
    pub vmid: Vmid,
    /// "lxc" or "qemu".
    #[serde(rename = "type")]
    pub kind: String,
    /// Its node.
    pub node: String,
    /// Name.
    #[serde(default)]
    pub name: String,
    /// "running", "stopped" or "unknown".
    #[serde(default)]
    pub status: String,
    /// Pool, or "".
    #[serde(default)]
    pub pool: String,
    /// Tags.
    #[serde(default)]
    pub tags: String,
}

/// A storage of a node.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub struct Storage {
    /// Name.
    pub storage: String,
    /// "dir", "zfspool" and so on.
    #[serde(rename = "type", default)]
    pub kind: String,
    /// What it may hold, separated by commas.
    #[serde(default)]
    pub content: String,
    /// Whether it is there.
    #[serde(default, deserialize_with = "lenient::bool")]
    pub active: bool,
    /// Bytes.
    #[serde(default, deserialize_with = "lenient::u64")]
    pub total: u64,
    /// Bytes.
    #[serde(default, deserialize_with = "lenient::u64")]
    pub used: u64,
    /// Bytes.
    #[serde(default, deserialize_with = "lenient::u64")]
    pub avail: u64,
}

/// Something on a storage.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub struct Content {
    /// `STORAGE:NAME`.
    pub volid: String,
    /// "vztmpl", "rootdir", "images" and so on.
    #[serde(default)]
    pub content: String,
    /// "tzst", "subvol", "raw" and so on.
    #[serde(default)]
    pub format: String,
    /// Bytes.
    #[serde(default, deserialize_with = "lenient::u64")]
    pub size: u64,
    /// Guest that it belongs to.
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    pub vmid: Option<u64>,
}

impl Proxmox {
    /// The release.
    pub async fn version(&self) -> Result<Version, ApiError> {
        self.get("/version", Form::new()).await
    }

    /// All nodes.
    pub async fn nodes(&self) -> Result<Vec<Node>, ApiError> {
        self.get("/nodes", Form::new()).await
    }

    /// All guests of the cluster that we may see.
    pub async fn guests(&self) -> Result<Vec<Guest>, ApiError> {
        let form = vec![("type".to_owned(), "vm".to_owned())];
        let mut guests: Vec<Guest> = self.get("/cluster/resources", form).await?;
        guests.sort_by_key(|g| g.vmid);
        Ok(guests)
    }

    /// The lowest number that nobody has. Reserves nothing.
    pub async fn next_vmid(&self) -> Result<Vmid, ApiError> {
        self.get("/cluster/nextid", Form::new()).await
    }

    /// Whether nobody has the number now. Reserves nothing.
    pub async fn vmid_is_free(&self, vmid: Vmid) -> Result<bool, ApiError> {
        let answer = self.get::<Value>("/cluster/nextid", vec![("vmid".to_owned(), vmid.to_string())]).await;
        match answer {
            Ok(_) => Ok(true),
            Err(e) if *e.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Storages of a node, of those that may hold `content` if it is said.
    pub async fn storages(&self, node: &str, content: Option<&str>) -> Result<Vec<Storage>, ApiError> {
        let mut form = vec![("enabled".to_owned(), "1".to_owned())];
        form.extend(content.map(|c| ("content".to_owned(), c.to_owned())));
        self.get(&path(&["nodes", node, "storage"]), form).await
    }

    /// What is on a storage.
    pub async fn content(&self, node: &str, storage: &str, content: Option<&str>) -> Result<Vec<Content>, ApiError> {
        let form = content.map(|c| ("content".to_owned(), c.to_owned())).into_iter().collect();
        self.get(&path(&["nodes", node, "storage", storage, "content"]), form).await
    }

    /// Uploads a template from a file; its name ends in `.tar`, `.tar.gz`, `.tar.xz`, `.tar.zst` or `.tar.bz2`.
    pub async fn upload_template(&self, node: &str, storage: &str, file: &Utf8Path) -> Result<Running, ApiError> {
        let at = path(&["nodes", node, "storage", storage, "upload"]);
        let call = format!("POST {at}");
        let invalid = |why: String| ApiError::new(ErrorKind::Invalid, &call, why);
        let name = file.file_name().unwrap_or_default();
        let ends = [".tar", ".tar.gz", ".tar.xz", ".tar.zst", ".tar.bz2"];
        if !ends.iter().any(|e| name.len() > e.len() && name.ends_with(e)) {
            return Err(invalid(format!("{name:?} is no name of a template ({})", ends.join(", "))));
        }
        let opened = tokio::fs::File::open(file.as_std_path()).await;
        let opened = opened.map_err(|e| invalid(format!("{file}: {e}")))?;
        let meta = opened.metadata().await.map_err(|e| invalid(format!("{file}: {e}")))?;
        if !meta.is_file() {
            return Err(invalid(format!("{file}: not a regular file")));
        }
        let lane = self.storage_lane(node, storage, &at).await?;
        let fields = vec![("content".to_owned(), "vztmpl".to_owned())];
        let answer = self.upload(&at, fields, (name, opened, meta.len())).await?;
        let upid = serde_json::from_value::<Upid>(answer);
        let upid = upid.map_err(|e| ApiError::new(ErrorKind::Protocol, &call, format!("no task: {e}")))?;
        Ok(Running::new(self.clone(), upid, vec![lane]))
    }

    /// Where a node has a volume: a file or a block device. What its plug-in has not as either has a path that is none.
    pub async fn volume_path(&self, node: &str, storage: &str, volid: &str) -> Result<Utf8PathBuf, ApiError> {
        #[derive(Deserialize)]
        struct Info {
            path: Utf8PathBuf,
        }
        let info: Info = self.get(&path(&["nodes", node, "storage", storage, "content", volid]), Form::new()).await?;
        Ok(info.path)
    }

    /// Frees a volume or deletes a template.
    pub async fn delete_volume(&self, node: &str, storage: &str, volid: &str) -> Result<(), ApiError> {
        let at = path(&["nodes", node, "storage", storage, "content", volid]);
        let lane = self.storage_lane(node, storage, &at).await?;
        let upid: Option<Upid> = self.delete(&at, Form::new()).await?;
        match upid {
            Some(upid) => Running::new(self.clone(), upid, vec![lane]).wait().await.map(drop),
            None => Ok(()),
        }
    }
}
