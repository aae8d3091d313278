//! Opens the layer store that the configuration names, and says who unpacks.
//!
//! Called by the wiring. Fails by name when the pool is not there. The installation's id, which tags every dataset of
//! ours, is made at the first use of ZFS and kept in the root folder.

use std::sync::Arc;

use camino::Utf8Path;

use crate::core::config::{Config, LayerDriver, UnpackSandbox};
use crate::core::error::{Error, Result};
use crate::core::ports::LayerStore;
use crate::integrations::layers::confined::{Confined, Unpacker};
use crate::integrations::layers::unpack::Limits;
use crate::integrations::overlay::{OverlayOptions, OverlayStore};
use crate::integrations::zfs::{Dataset, ZfsConfig, ZfsError};
use crate::integrations::zfs_store::{ZfsStore, ZfsStoreConfig};
use crate::utils::atomic::{self, Durability};
use crate::utils::tasks::TaskSet;

/// File with the installation's id.
const INSTALLATION: &str = "installation";

/// Who unpacks layers, as the configuration wants it. What is weaker than it could be is said in the log, once.
pub(in crate::daemon) async fn unpacker(config: &Config, tasks: &TaskSet) -> Result<Unpacker> {
    let images = &config.images;
    let unpacker = match images.unpack_sandbox {
        UnpackSandbox::Off => Unpacker::Here,
        wanted => {
            let program = images.unpacker_path.as_ref().map(ToString::to_string);
            let required = wanted == UnpackSandbox::Required;
            Unpacker::Confined(Arc::new(Confined::probe(program, required, tasks.clone()).await?))
        }
    };
    if let Some(weakness) = unpacker.weakness() {
        tracing::warn!(reason = weakness.reason, "{}", weakness.message);
    }
    Ok(unpacker)
}

pub(super) async fn open(config: &Config, unpacker: Unpacker, tasks: &TaskSet) -> Result<Arc<dyn LayerStore>> {
    let root = &config.server.root;
    match config.images.driver {
        LayerDriver::Overlay => {
            let options = OverlayOptions { unpacker, ..OverlayOptions::default() };
            Ok(OverlayStore::open(root.join("overlay"), options, tasks.clone())?)
        }
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
                unpacker,
                health_interval: zfs.health_interval(),
            };
            Ok(ZfsStore::open(settings, tasks.clone()).await?)
        }
    }
}

/// The installation's id, which it gets at its first start.
pub(super) fn installation(root: &Utf8Path) -> Result<String> {
    if let Some(id) = known_installation(root)? {
        return Ok(id);
    }
    let path = root.join(INSTALLATION);
    let id = uuid::Uuid::new_v4().simple().to_string();
    atomic::write(path.as_std_path(), format!("{id}\n").as_bytes(), 0o600, Durability::Machine)
        .map_err(|e| Error::io(format!("writing {path}"), e))?;
    Ok(id)
}

/// The id that it has; None: it was never started.
pub(super) fn known_installation(root: &Utf8Path) -> Result<Option<String>> {
    let path = root.join(INSTALLATION);
    match std::fs::read_to_string(&path) {
        Ok(text) => {
            let id = text.trim();
            let fits = id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit());
            let bad = || Error::precondition(format!("{path} holds no installation's id"));
            fits.then(|| Some(id.to_owned())).ok_or_else(bad)
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(path, e)),
    }
}
