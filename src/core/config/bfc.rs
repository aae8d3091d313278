//! `[images.bfc]`: images in Binary File Containers, for nodes without a registry.
//!
//! Plain data; checked with the rest of the configuration.

use camino::Utf8PathBuf;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::faults::Faults;

/// What is done with a container that holds a plain root file system and no image layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PlainRootfs {
    /// It becomes an image of one layer, with a warning: owners are lost and become 0:0.
    #[default]
    Warn,
    /// It is refused.
    Refuse,
}

/// Images in Binary File Containers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BfcImages {
    /// Serve pulls of `bfc.local/NAME:TAG` from `directories`.
    pub enabled: bool,
    /// Folders with `.bfc` files; the first that has an image counts.
    #[schemars(with = "Vec<String>")]
    pub directories: Vec<Utf8PathBuf>,
    /// Key (32 bytes) of encrypted containers.
    #[schemars(with = "Option<String>")]
    pub key_file: Option<Utf8PathBuf>,
    /// Plain root file systems: "warn" or "refuse".
    pub plain_rootfs: PlainRootfs,
    /// Images that were pulled from `bfc.local` are never garbage collected.
    pub pinned: bool,
}

impl Default for BfcImages {
    fn default() -> Self {
        Self {
            enabled: false,
            directories: vec!["/var/lib/proxmox-lxcri/bfc".into()],
            key_file: None,
            plain_rootfs: PlainRootfs::default(),
            pinned: false,
        }
    }
}

impl BfcImages {
    pub(super) fn check(&self, faults: &mut Faults) {
        faults.absolute("images.bfc.directories", &self.directories);
        faults.absolute("images.bfc.key_file", &self.key_file);
        if self.enabled && self.directories.is_empty() {
            faults.with("images.bfc.directories", "images.bfc.enabled", "at least one, since images.bfc is enabled");
        }
    }
}
