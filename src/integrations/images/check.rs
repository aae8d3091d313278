//! Looks whether the store's own files are what they should be: records, and the blobs that describe images.
//!
//! Called for `storage check`. Changes nothing. Layers are the layer store's to check.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Inner, blocking};
use crate::core::error::Result;
use crate::core::ids::Digest;
use crate::core::ports::StorageReport;
use crate::integrations::layers::pipeline::digest_of;

impl Inner {
    pub(super) async fn check(self: &Arc<Self>, deep: bool) -> Result<StorageReport> {
        let mut report = StorageReport::default();
        let mut named: BTreeMap<Digest, Digest> = BTreeMap::new();
        let mut missing = Vec::new();
        for (record, _) in self.read().values() {
            for blob in record.manifests.iter().chain([&record.id]) {
                named.insert(blob.clone(), record.id.clone());
            }
            missing.extend(record.layers.iter().map(|l| (record.id.clone(), l.chain.clone())));
        }
        for (id, chain) in missing {
            if !self.layers.has(&chain).await? {
                report.problems.push(format!("image {id} lacks layer {chain}: pull it again"));
            }
        }
        if self.quarantined {
            let root = &self.config.root;
            report.problems.push(format!("a record is in {root}/quarantine: no layer is removed while it is there"));
        }
        let (disk, count) = (self.disk.clone(), named.len());
        let bad = blocking(move || {
            let mut bad = Vec::new();
            for (blob, id) in named {
                let path = disk.blob_path(&blob);
                match std::fs::metadata(&path) {
                    Err(e) => bad.push(format!("image {id}: blob {blob}: {e}")),
                    Ok(_) if !deep => {}
                    Ok(_) => match std::fs::read(&path).map(|data| digest_of(&data)) {
                        Ok(got) if got == blob => {}
                        Ok(got) => bad.push(format!("image {id}: blob {blob} is damaged, it is {got}: pull it again")),
                        Err(e) => bad.push(format!("image {id}: blob {blob}: {e}")),
                    },
                }
            }
            Ok(bad)
        })
        .await?;
        report.problems.extend(bad);
        let images = self.read().len();
        report.notes.push(format!("{images} images, {count} blobs that describe them"));
        Ok(report)
    }
}
