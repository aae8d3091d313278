//! `[images] driver`, `unpack_sandbox` and `[images.zfs]`: where layers and root file systems are kept, who unpacks.
//!
//! Plain data; checked with the rest of the configuration.

use std::time::Duration;

use camino::Utf8PathBuf;
use serde::{Deserialize, Serialize};

use super::super::error::{Error, Result};
use super::super::quota;

/// Which layer store there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LayerDriver {
    /// Folders, stacked by overlay mounts.
    #[default]
    Overlay,
    /// Datasets and clones of a ZFS pool.
    Zfs,
}

/// How closely layers are unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UnpackSandbox {
    /// By processes that can touch nothing but the layer; where the kernel lacks Landlock, with the other walls alone.
    #[default]
    Auto,
    /// Where the kernel lacks Landlock not at all.
    Required,
    /// By the daemon itself.
    Off,
}

/// The ZFS driver.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ZfsImages {
    /// Dataset that holds everything: "rpool/lxcri". Made if only its parent is there.
    pub dataset: String,
    /// The program `zfs`, absolute.
    pub zfs_path: Utf8PathBuf,
    /// The program `zpool`, absolute.
    pub zpool_path: Utf8PathBuf,
    /// Longest time for one operation of ZFS, in seconds.
    pub timeout: u64,
    /// Seconds between looks at the pool's health.
    pub health_interval: u64,
    /// What a container may write into its root file system if its pod does not say: "10Gi"; "0": no limit.
    pub container_quota: String,
}

impl Default for ZfsImages {
    fn default() -> Self {
        Self {
            dataset: String::new(),
            zfs_path: "/usr/sbin/zfs".into(),
            zpool_path: "/usr/sbin/zpool".into(),
            timeout: 60,
            health_interval: 5,
            container_quota: "0".into(),
        }
    }
}

impl ZfsImages {
    /// `timeout` as a duration.
    pub fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout.max(1))
    }

    /// `health_interval` as a duration.
    pub fn health_interval(&self) -> Duration {
        Duration::from_secs(self.health_interval.max(1))
    }

    /// `container_quota` in bytes; 0: no limit.
    pub fn container_quota(&self) -> Result<u64> {
        quota::bytes(&self.container_quota).map_err(|e| e.context("images.zfs.container_quota"))
    }

    pub(super) fn check(&self, driver: LayerDriver) -> Result<()> {
        if driver == LayerDriver::Zfs && self.dataset.is_empty() {
            return Err(Error::invalid("images.zfs.dataset: the zfs driver needs one, such as \"rpool/lxcri\""));
        }
        for (key, path) in [("images.zfs.zfs_path", &self.zfs_path), ("images.zfs.zpool_path", &self.zpool_path)] {
            if !path.is_absolute() {
                return Err(Error::invalid(format!("{key}: {path:?} is not an absolute path")));
            }
        }
        self.container_quota()?;
        Ok(())
    }
}
