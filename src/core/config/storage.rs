//! `[images] driver`, `unpack_sandbox` and `[images.zfs]`: where layers and root file systems are kept, who unpacks.
//!
//! Plain data; checked with the rest of the configuration.

use std::time::Duration;

use camino::Utf8PathBuf;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::error::Result;
use super::super::quota;
use super::faults::Faults;

/// Longest name of the dataset: the longest below it (a container's snapshot for a fork) needs 100 of ZFS's 255 characters, and those
/// of users have a name, too.
const DATASET_MAX: usize = 128;

/// Which layer store there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LayerDriver {
    /// Folders, stacked by overlay mounts.
    #[default]
    Overlay,
    /// Datasets and clones of a ZFS pool.
    Zfs,
}

/// How closely layers are unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ZfsImages {
    /// Dataset that holds everything: "rpool/lxcri". Made if only its parent is there.
    pub dataset: String,
    /// The program `zfs`, absolute.
    #[schemars(with = "String")]
    pub zfs_path: Utf8PathBuf,
    /// The program `zpool`, absolute.
    #[schemars(with = "String")]
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

    pub(super) fn check(&self, driver: LayerDriver, faults: &mut Faults) {
        let dataset = "images.zfs.dataset";
        if driver == LayerDriver::Zfs && self.dataset.is_empty() {
            faults.with(dataset, "images.driver", "the zfs driver needs one, such as \"rpool/lxcri\"");
        }
        let word = |part: &str| {
            let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':');
            part.chars().all(fits) && part.starts_with(|c: char| c.is_ascii_alphanumeric())
        };
        let pool = self.dataset.starts_with(|c: char| c.is_ascii_alphabetic());
        if !(self.dataset.is_empty() || pool && self.dataset.split('/').all(word)) {
            faults.add(dataset, format!("{:?} is no dataset's name, such as \"rpool/lxcri\"", self.dataset));
        }
        if self.dataset.len() > DATASET_MAX {
            faults.add(
                dataset,
                format!("a name of more than {DATASET_MAX} characters leaves too few to what is below it"),
            );
        }
        faults.absolute("images.zfs.zfs_path", [&self.zfs_path]);
        faults.absolute("images.zfs.zpool_path", [&self.zpool_path]);
        faults.range("images.zfs.timeout", self.timeout, 1..=86_400);
        faults.range("images.zfs.health_interval", self.health_interval, 1..=3600);
        if let Err(e) = quota::bytes(&self.container_quota) {
            faults.add("images.zfs.container_quota", e.chain());
        }
    }
}
