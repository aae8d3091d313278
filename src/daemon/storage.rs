//! Opens the layer store that the configuration names.
//!
//! Called by the wiring. Fails by name when the pool is not there. The installation's id, which tags every dataset of
//! ours, is made at the first use of ZFS and kept in the root folder.

use std::sync::Arc;

use camino::Utf8Path;

use crate::core::config::{Config, LayerDriver};
use crate::core::error::{Error, Result};
use crate::core::ports::LayerStore;
use crate::integrations::layers::unpack::Limits;
use crate::integrations::overlay::{OverlayOptions, OverlayStore};
use crate::integrations::zfs::{Dataset, ZfsConfig, ZfsError};
use crate::integrations::zfs_store::{ZfsStore, ZfsStoreConfig};
use crate::utils::atomic::{self, Durability};
use crate::utils::tasks::TaskSet;

/// File with the installation's id.
const INSTALLATION: &str = "installation";

pub(super) async fn open(config: &Config, tasks: &TaskSet) -> Result<Arc<dyn LayerStore>> {
    let root = &config.server.root;
    match config.images.driver {
        LayerDriver::Overlay => Ok(OverlayStore::open(root.join("overlay"), OverlayOptions::default(), tasks.clone())?),
        LayerDriver::Zfs => {
            let zfs = &config.images.zfs;
            let settings = ZfsStoreConfig {
                zfs: ZfsConfig {
                    zfs: zfs.zfs_path.clone(),
                    zpool: zfs.zpool_path.clone(),
                    deadline: zfs.timeout(),
                    ..ZfsConfig::default()
                },
                dataset: zfs.dataset.parse::<Dataset>().map_err(ZfsError::from)?,
                folder: root.join("zfs"),
                owner: installation(root)?,
                limits: Limits::default(),
                health_interval: zfs.health_interval(),
            };
            Ok(ZfsStore::open(settings, tasks.clone()).await?)
        }
    }
}

/// The installation's id.
fn installation(root: &Utf8Path) -> Result<String> {
    let path = root.join(INSTALLATION);
    match std::fs::read_to_string(&path) {
        Ok(text) => {
            let id = text.trim();
            let fits = id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit());
            fits.then(|| id.to_owned()).ok_or_else(|| Error::precondition(format!("{path} holds no installation's id")))
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let id = uuid::Uuid::new_v4().simple().to_string();
            atomic::write(path.as_std_path(), format!("{id}\n").as_bytes(), 0o600, Durability::Machine)
                .map_err(|e| Error::io(format!("writing {path}"), e))?;
            Ok(id)
        }
        Err(e) => Err(Error::io(path, e)),
    }
}
