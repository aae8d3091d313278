//! Unpacking a layer into a clone of its parent, and the commit of it.
//!
//! Called by the store, one at a time per chain. Whatever fails leaves a dataset without `@ready` to the reaper; a crash
//! leaves the same to the next start. The snapshot is what counts: ZFS has it on disk when the command returns.

use std::io::Read;
use std::time::Duration;

use super::state::{Layer, OWNER, READY, USAGE, usage_text};
use super::{Doomed, Inner, blocking};
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::Digest;
use crate::core::ports::Usage;
use crate::fail_point;
use crate::integrations::layers::confined::Place;
use crate::integrations::layers::unpack::Whiteouts;
use crate::integrations::zfs::{Dataset, Property, Snapshot, ZfsError};

/// How long whoever wants a layer anew waits for what is left of it to go.
const GOING: Duration = Duration::from_secs(10);

impl Inner {
    /// The work of `LayerStore::apply`.
    pub(super) async fn apply(
        &self,
        parent: Option<&Digest>,
        chain: &Digest,
        tar: Box<dyn Read + Send>,
        verify: Box<dyn FnOnce() -> Result<()> + Send>,
    ) -> Result<Usage> {
        let dataset = self.layer(chain)?;
        if let Some(usage) = self.there_or_free(chain, &dataset).await? {
            return Ok(usage);
        }
        let done = self.unpack_and_commit(parent, chain, &dataset, tar, verify).await;
        match &done {
            Err(e) if e.kind() == Kind::AlreadyExists => {}
            Err(_) => self.doom(dataset, Doomed::new(Vec::new())),
            // Pulled before the rest of it was sent.
            Ok(_) => self.give_up(chain),
        }
        done
    }

    /// A layer that is there, or was to be destroyed and is there again. Waits while it is being destroyed; FailedPrecondition
    /// with the reason when it does not go.
    pub(super) async fn there_or_free(&self, chain: &Digest, dataset: &Dataset) -> Result<Option<Usage>> {
        let until = tokio::time::Instant::now() + GOING;
        let mut asked = false;
        loop {
            let mut reaped = std::pin::pin!(self.reaped.notified());
            reaped.as_mut().enable();
            {
                let mut state = self.state();
                if let Some(layer) = state.layers.get(chain) {
                    return Ok(Some(layer.usage));
                }
                match state.doomed.get_mut(dataset) {
                    None => return Ok(None),
                    Some(doomed) if !doomed.busy && doomed.layer.is_some() => {
                        let layer = state.doomed.remove(dataset).and_then(|d| d.layer);
                        return Ok(layer.map(|(chain, layer)| {
                            let usage = layer.usage;
                            state.layers.insert(chain, layer);
                            usage
                        }));
                    }
                    // Wanted now: no pause before the next try.
                    Some(doomed) if !asked => doomed.after = None,
                    Some(doomed) if tokio::time::Instant::now() >= until => {
                        let what = format!("dataset {dataset} is half destroyed and does not go: {}", doomed.why);
                        return Err(Error::precondition(what));
                    }
                    Some(_) => {}
                }
            }
            if !std::mem::replace(&mut asked, true) {
                self.doom.notify_one();
            }
            let _ = tokio::time::timeout_at(until, reaped).await;
        }
    }

    async fn unpack_and_commit(
        &self,
        parent: Option<&Digest>,
        chain: &Digest,
        dataset: &Dataset,
        tar: Box<dyn Read + Send>,
        verify: Box<dyn FnOnce() -> Result<()> + Send>,
    ) -> Result<Usage> {
        let mut properties = self.properties(dataset)?;
        properties.push(Property::new("setuid", "on").map_err(ZfsError::from)?);
        fail_point!("zfs.layer.before_create");
        match parent {
            None => self.zfs.create(dataset, &properties).await,
            Some(parent) => {
                if !self.state().layers.contains_key(parent) {
                    return Err(Error::precondition(format!("its parent {parent} is not in the ZFS store")));
                }
                self.zfs.clone_snapshot(&self.ready(parent)?, dataset, &properties).await
            }
        }
        .map_err(|e| self.noted(e))?;
        fail_point!("zfs.layer.created");
        let mount = self.mount(dataset).await?;
        fail_point!("zfs.layer.mounted");
        let (limits, unpacker) = (self.config.limits, self.config.unpacker.clone());
        let usage = blocking(move || {
            let unpacked = unpacker.unpack(Place::Mount(&mount), tar, Whiteouts::Apply, &limits)?;
            fail_point!("zfs.layer.unpacked");
            verify()?;
            fail_point!("zfs.layer.verified");
            Ok(unpacked.usage)
        })
        .await?;
        self.let_go_soon(dataset).await;
        fail_point!("zfs.layer.unmounted");
        self.commit(parent, chain, dataset, usage).await
    }

    /// What a committed layer refers to, and the guid of its snapshot.
    pub(super) async fn measured(&self, ready: &Snapshot) -> Result<(u64, String)> {
        let told = self.zfs.get_all(ready.dataset(), &["referenced", "guid"]).await.map_err(|e| self.noted(e))?;
        let told = told.get(&ready.to_string());
        let found = told.and_then(|p| Some((p.get("referenced")?.text.parse().ok()?, p.get("guid")?.text.clone())));
        found.ok_or_else(|| Error::internal(format!("{ready}: its size is not told")))
    }

    /// Makes the layer count.
    pub(super) async fn commit(
        &self,
        parent: Option<&Digest>,
        chain: &Digest,
        dataset: &Dataset,
        usage: Usage,
    ) -> Result<Usage> {
        let ready = dataset.snapshot(READY).map_err(ZfsError::from)?;
        let marks = [(OWNER, self.config.owner.clone()), (USAGE, usage_text(usage))];
        let marks: std::result::Result<Vec<_>, _> = marks.into_iter().map(|(k, v)| Property::new(k, v)).collect();
        let marks = marks.map_err(ZfsError::from)?;
        fail_point!("zfs.layer.before_snapshot");
        self.zfs.snapshot(std::slice::from_ref(&ready), &marks).await.map_err(|e| self.noted(e))?;
        fail_point!("zfs.layer.after_snapshot");
        let (referenced, guid) = self.measured(&ready).await?;
        self.state().layers.insert(chain.clone(), Layer { parent: parent.cloned(), usage, referenced, guid });
        fail_point!("zfs.layer.committed");
        Ok(usage)
    }
}
