//! The overlay store's folders and metadata on disk.
//!
//! Called by the store on blocking threads. Metadata are small versioned JSON files. Fails with the I/O error and the
//! path; a layer or root file system appears by one rename, so a crash leaves either nothing or all of it.

use std::collections::HashMap;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};

use camino::Utf8Path;
use rustix::fs::FlockOperation;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::adopt;
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::{ContainerId, Digest};
use crate::core::ports::Usage;
use crate::core::spec::UserNamespace;
use crate::fail_point;
use crate::utils::atomic::{self, Durability};

/// What is known of a committed layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LayerMeta {
    pub parent: Option<Digest>,
    pub usage: Usage,
}

/// What is known of a container's root file system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RootfsMeta {
    /// Base first.
    pub chains: Vec<Digest>,
    /// More layers that the container uses (image volumes): they stay as long as it does.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<Digest>,
    /// Boot in which it was made.
    pub boot_id: String,
    /// Id maps, of a pod with a user namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<UserNamespace>,
}

#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    version: u32,
    #[serde(flatten)]
    content: T,
}

pub(super) fn make_folder(path: &Utf8Path, mode: u32) -> Result<()> {
    let done = DirBuilder::new().mode(mode).create(path).and_then(|()| {
        // Whatever the umask says.
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode))
    });
    done.map_err(|e| Error::io(format!("making {path}"), e))
}

pub(super) fn rename(from: &Utf8Path, to: &Utf8Path) -> Result<()> {
    std::fs::rename(from, to).map_err(|e| Error::io(format!("renaming {from} to {to}"), e))
}

fn sync_folder(path: &Utf8Path) -> Result<()> {
    File::open(path).and_then(|f| f.sync_all()).map_err(|e| Error::io(format!("syncing {path}"), e))
}

/// Makes the store's folders and takes its lock.
pub(super) fn prepare(root: &Utf8Path) -> Result<File> {
    for folder in ["", "layers", "containers", "tmp", "trash", "quarantine", "empty"] {
        let path = root.join(folder);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)
            .map_err(|e| Error::io(format!("making {path}"), e))?;
    }
    let path = root.join("lock");
    let lock = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(|e| Error::io(format!("opening {path}"), e))?;
    rustix::fs::flock(lock.as_fd(), FlockOperation::NonBlockingLockExclusive).map_err(|e| {
        Error::because(Kind::FailedPrecondition, format!("overlay store {root} is in use by another process"), e)
    })?;
    Ok(lock)
}

/// Names in a folder; those that are not UTF-8 are none of ours.
pub(super) fn names(folder: &Utf8Path) -> Result<Vec<String>> {
    let error = |e| Error::io(format!("listing {folder}"), e);
    let mut names = Vec::new();
    for entry in folder.read_dir_utf8().map_err(error)? {
        match entry {
            Ok(entry) => names.push(entry.file_name().to_owned()),
            Err(e) if e.kind() == ErrorKind::InvalidData => {}
            Err(e) => return Err(error(e)),
        }
    }
    Ok(names)
}

fn read<T: DeserializeOwned>(path: &Utf8Path) -> Result<T> {
    let text = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let bad = |e: serde_json::Error| Error::because(Kind::Internal, format!("{path} is damaged"), e);
    let envelope: Envelope<serde_json::Value> = serde_json::from_slice(&text).map_err(bad)?;
    if envelope.version != 1 {
        return Err(Error::internal(format!("{path} has the unknown version {}", envelope.version)));
    }
    serde_json::from_value(envelope.content).map_err(bad)
}

fn write<T: Serialize>(path: &Utf8Path, content: &T, durability: Durability) -> Result<()> {
    let text = serde_json::to_vec(&Envelope { version: 1, content })
        .map_err(|e| Error::because(Kind::Internal, path.to_string(), e))?;
    atomic::write(path.as_std_path(), &text, 0o600, durability).map_err(|e| Error::io(format!("writing {path}"), e))
}

/// All committed layers. What can't be read is set aside and reported: images that need it are pulled anew.
pub(super) fn load_layers(root: &Utf8Path) -> Result<HashMap<Digest, LayerMeta>> {
    let mut layers = HashMap::new();
    for name in names(&root.join("layers"))? {
        let folder = root.join("layers").join(&name);
        let loaded = format!("sha256:{name}").parse::<Digest>().and_then(|chain| {
            let meta = read(&folder.join("layer.json"))?;
            std::fs::metadata(folder.join("fs")).map_err(|e| Error::io(folder.join("fs"), e))?;
            Ok((chain, meta))
        });
        match loaded {
            Ok((chain, meta)) => {
                layers.insert(chain, meta);
            }
            Err(error) => {
                tracing::error!(layer = name, error = error.chain(), "layer can't be read, set aside in quarantine");
                let aside = root.join("quarantine").join(format!("{name}-{}", uuid::Uuid::new_v4().simple()));
                rename(&folder, &aside)?;
            }
        }
    }
    Ok(layers)
}

/// All root file systems, unreadable ones too.
pub(super) fn load_rootfs(root: &Utf8Path) -> Result<Vec<(ContainerId, Option<RootfsMeta>)>> {
    let mut list = Vec::new();
    for name in names(&root.join("containers"))? {
        let Ok(id) = name.parse::<ContainerId>() else {
            tracing::warn!(name, "not a container's folder, left alone");
            continue;
        };
        let meta = read(&root.join("containers").join(&name).join("rootfs.json"));
        if let Err(error) = &meta {
            tracing::error!(container = name, error = error.chain(), "root file system can't be read");
        }
        list.push((id, meta.ok()));
    }
    Ok(list)
}

/// Makes the unpacked layer in `folder` count: everything on disk first, then the name.
pub(super) fn commit_layer(root: &Utf8Path, folder: &Utf8Path, chain: &Digest, meta: &LayerMeta) -> Result<()> {
    write(&folder.join("layer.json"), meta, Durability::Process)?;
    let handle = File::open(folder).map_err(|e| Error::io(format!("opening {folder}"), e))?;
    rustix::fs::syncfs(&handle).map_err(|e| Error::io(format!("syncing {folder}"), e.into()))?;
    fail_point!("overlay.layer.synced");
    rename(folder, &root.join("layers").join(chain.hex()))?;
    fail_point!("overlay.layer.renamed");
    sync_folder(&root.join("layers"))
}

/// Fills `folder` with what a container's overlay needs. The upper folder is what `/` looks like in the mount, so it
/// takes the attributes of the uppermost layer's root, `lower`.
pub(super) fn make_rootfs(folder: &Utf8Path, lower: &Utf8Path, meta: &RootfsMeta) -> Result<()> {
    make_folder(folder, 0o700)?;
    make_folder(&folder.join("fs"), 0o755)?;
    make_folder(&folder.join("work"), 0o700)?;
    let fs = folder.join("fs");
    adopt::folder(lower, &fs).map_err(|e| Error::io(format!("copying attributes of {lower}"), e))?;
    if let Some(user) = &meta.user {
        give_root(&fs, user)?;
    }
    write(&folder.join("rootfs.json"), meta, Durability::Process)
}

/// The upper folder is not idmapped: what is in it, and so its root, belongs to the host's ids of the pod's users.
fn give_root(fs: &Utf8Path, user: &UserNamespace) -> Result<()> {
    let error = |e| Error::io(format!("giving {fs} to the pod's user"), e);
    let seen = std::fs::metadata(fs).map_err(error)?;
    let (Some(uid), Some(gid)) = (user.host_uid(seen.uid()), user.host_gid(seen.gid())) else {
        return Err(Error::invalid(format!(
            "the image's root folder belongs to {}:{}, which the pod's user namespace does not map",
            seen.uid(),
            seen.gid()
        )));
    };
    std::os::unix::fs::chown(fs, Some(uid), Some(gid)).map_err(error)
}

pub(super) fn boot_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    Ok(std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?.trim().to_owned())
}
