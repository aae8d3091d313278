//! Image records on disk: one JSON file per image in a versioned envelope, and the blobs that describe it.
//!
//! Called by the store, blocking. Layout below one root: `images/<id>.json`, `blobs/sha256/<digest>` (manifests, indexes
//! and configs; layers are not kept), `quarantine/`. A record that can't be read is set aside and reported, never fatal.
//! Writes are durable; a crash leaves at most a temporary file, removed at the next start.

use std::collections::HashSet;
use std::fs::DirBuilder;
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;

use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};

use crate::core::error::{Error, Kind, Result};
use crate::core::ids::Digest;
use crate::core::ports::{Image, ImageConfig, Usage};
use crate::utils::atomic::{self, Durability};

const VERSION: u32 = 1;

/// A layer of an image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct LayerRecord {
    pub chain: Digest,
    pub diff_id: Digest,
    pub usage: Usage,
}

/// An image as it is kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    pub id: Digest,
    pub repo_tags: Vec<String>,
    pub repo_digests: Vec<String>,
    /// Manifests and indexes that are this image here; their content is kept.
    pub manifests: Vec<Digest>,
    /// Base first.
    pub layers: Vec<LayerRecord>,
    pub config: ImageConfig,
    #[serde(default)]
    pub pinned: bool,
    /// Unix time in nanoseconds.
    pub pulled_at: i64,
    /// Unix time in nanoseconds of the last change; decides between two records with one tag.
    pub changed_at: i64,
}

impl Record {
    pub(super) fn image(&self) -> Image {
        Image {
            id: self.id.clone(),
            repo_tags: self.repo_tags.clone(),
            repo_digests: self.repo_digests.clone(),
            size: self.layers.iter().fold(0, |sum, l| sum.saturating_add(l.usage.bytes)),
            chains: self.layers.iter().map(|l| l.chain.clone()).collect(),
            config: self.config.clone(),
            pinned: self.pinned,
            pulled_at: self.pulled_at,
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    version: u32,
    image: T,
}

/// The folders of the store.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    root: Utf8PathBuf,
}

impl Disk {
    /// Opens, making what is missing.
    pub(super) fn open(root: &Utf8Path) -> Result<Self> {
        for folder in ["images", "blobs/sha256", "quarantine", "tmp"] {
            let path = root.join(folder);
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&path)
                .map_err(|e| Error::io(format!("making {path}"), e))?;
        }
        Ok(Self { root: root.to_owned() })
    }

    /// Where files for the time of a load are made.
    pub(super) fn scratch(&self) -> Utf8PathBuf {
        self.root.join("tmp")
    }

    fn record_path(&self, id: &Digest) -> Utf8PathBuf {
        self.root.join("images").join(format!("{}.json", id.hex()))
    }

    /// Where a kept blob is.
    pub(super) fn blob_path(&self, digest: &Digest) -> Utf8PathBuf {
        self.root.join("blobs/sha256").join(digest.hex())
    }

    /// All records, and whether any was ever set aside (its layers are unknown, so nothing may be collected).
    pub(super) fn load(&self) -> Result<(Vec<Record>, bool)> {
        let folder = self.root.join("images");
        let list = |folder: &Utf8Path| -> Result<Vec<String>> {
            let failed = |e| Error::io(format!("listing {folder}"), e);
            let entries = std::fs::read_dir(folder).map_err(failed)?;
            let names = entries.map(|e| Ok(e.map_err(failed)?.file_name().to_string_lossy().into_owned()));
            names.collect()
        };
        for name in list(&self.scratch())? {
            crate::utils::beneath::remove_tree(self.scratch().join(&name).as_std_path())
                .map_err(|e| Error::io(format!("removing {name}"), e))?;
        }
        for leftover in list(&self.root.join("blobs/sha256"))?.iter().filter(|n| atomic::is_temporary(n)) {
            let _ = std::fs::remove_file(self.root.join("blobs/sha256").join(leftover));
        }
        let mut records = Vec::new();
        for name in list(&folder)? {
            let path = folder.join(&name);
            if atomic::is_temporary(&name) {
                let _ = std::fs::remove_file(&path);
                continue;
            }
            match read(&path, &name) {
                Ok(record) => records.push(record),
                Err(error) => {
                    tracing::error!(record = %path, error = error.chain(), "image record can't be read, set aside in quarantine");
                    let aside = self.root.join("quarantine").join(format!("{name}.{}", uuid::Uuid::new_v4().simple()));
                    std::fs::rename(&path, &aside).map_err(|e| Error::io(format!("setting {path} aside"), e))?;
                }
            }
        }
        let quarantined = !list(&self.root.join("quarantine"))?.is_empty();
        if !quarantined {
            // A crash between a record and its blobs leaves these: a removal begins with the record, a pull ends with it.
            let named: HashSet<&str> =
                records.iter().flat_map(|r| r.manifests.iter().chain([&r.id])).map(|d| d.hex()).collect();
            for blob in list(&self.root.join("blobs/sha256"))?.iter().filter(|name| !named.contains(name.as_str())) {
                tracing::info!(blob, "removing a manifest or config that no image names");
                remove(&self.root.join("blobs/sha256").join(blob))?;
            }
        }
        Ok((records, quarantined))
    }

    /// Writes a record, durably.
    pub(super) fn save(&self, record: &Record) -> Result<()> {
        let path = self.record_path(&record.id);
        let text = serde_json::to_vec_pretty(&Envelope { version: VERSION, image: record })
            .map_err(|e| Error::because(Kind::Internal, format!("image record {}", record.id), e))?;
        atomic::write(path.as_std_path(), &text, 0o600, Durability::Machine)
            .map_err(|e| Error::io(format!("writing {path}"), e))
    }

    /// Removes a record; not there is success.
    pub(super) fn forget(&self, id: &Digest) -> Result<()> {
        remove(&self.record_path(id))
    }

    /// Keeps a blob, durably.
    pub(super) fn save_blob(&self, digest: &Digest, bytes: &[u8]) -> Result<()> {
        let path = self.blob_path(digest);
        atomic::write(path.as_std_path(), bytes, 0o600, Durability::Machine)
            .map_err(|e| Error::io(format!("writing {path}"), e))
    }

    /// Removes a blob; not there is success.
    pub(super) fn forget_blob(&self, digest: &Digest) -> Result<()> {
        remove(&self.blob_path(digest))
    }
}

fn remove(path: &Utf8Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::io(format!("removing {path}"), e)),
        _ => Ok(()),
    }
}

fn read(path: &Utf8Path, name: &str) -> Result<Record> {
    let text = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let damaged = |e: serde_json::Error| Error::because(Kind::Internal, format!("{path} is damaged"), e);
    let envelope: Envelope<serde_json::Value> = serde_json::from_slice(&text).map_err(damaged)?;
    if envelope.version != VERSION {
        return Err(Error::internal(format!("{path} has the unknown version {}", envelope.version)));
    }
    let record: Record = serde_json::from_value(envelope.image).map_err(damaged)?;
    if name != format!("{}.json", record.id.hex()) {
        return Err(Error::internal(format!("{path} holds the record of {}", record.id)));
    }
    Ok(record)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_are_not_to_be_believed_are_no_overflow() {
        let digest = |n: u8| Digest::from_sha256(&[n; 32]);
        let usage = Usage { bytes: u64::MAX, inodes: u64::MAX };
        let record = Record {
            id: digest(0),
            repo_tags: Vec::new(),
            repo_digests: Vec::new(),
            manifests: Vec::new(),
            layers: [1, 2].map(|n| LayerRecord { chain: digest(n), diff_id: digest(n), usage }).to_vec(),
            config: ImageConfig::default(),
            pinned: false,
            pulled_at: 0,
            changed_at: 0,
        };
        assert_eq!(record.image().size, u64::MAX);
    }
}
