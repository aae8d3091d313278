//! `[images] driver` and `[images.zfs]`: where layers and root file systems are kept.
//!
//! Plain data; checked with the rest of the configuration.

use std::time::Duration;

use camino::Utf8PathBuf;
use serde::{Deserialize, Serialize};

use super::super::error::{Error, Result};

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
}

impl Default for ZfsImages {
    fn default() -> Self {
        Self {
            dataset: String::new(),
            zfs_path: "/usr/sbin/zfs".into(),
            zpool_path: "/usr/sbin/zpool".into(),
            timeout: 60,
            health_interval: 5,
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

    pub(super) fn check(&self, driver: LayerDriver) -> Result<()> {
        if driver == LayerDriver::Zfs && self.dataset.is_empty() {
            return Err(Error::invalid("images.zfs.dataset: the zfs driver needs one, such as \"rpool/lxcri\""));
        }
        for (key, path) in [("images.zfs.zfs_path", &self.zfs_path), ("images.zfs.zpool_path", &self.zpool_path)] {
            if !path.is_absolute() {
                return Err(Error::invalid(format!("{key}: {path:?} is not an absolute path")));
            }
        }
        Ok(())
    }
}
