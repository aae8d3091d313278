//! Layers as streams of `zfs send`, from node to node.
//!
//! Called by the store, one at a time per chain. A layer is received beside the others (`layers/recv-<number>`, not mounted), gets
//! its properties and then its name: a rename is what makes it count. Whatever fails before leaves a dataset of that name to the
//! reaper, a crash the same to the next start. `zfs receive` trusts its stream: so does whoever calls this. Fails by name
//! when the stream does not fit: it is cut, or begins from a snapshot that this pool has not.

use std::os::fd::OwnedFd;

use super::state::{Doomed, Layer, OWNER, READY, RECEIVED, USAGE, usage_text};
use super::{Inner, blocking};
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::Digest;
use crate::core::ports::{LayerState, Usage};
use crate::fail_point;
use crate::integrations::zfs::{Dataset, Property, Reason, Snapshot, ZfsError};

impl Inner {
    pub(super) fn layer_states(&self) -> Vec<LayerState> {
        let state = self.state();
        let each = |(chain, layer): (&Digest, &Layer)| LayerState { chain: chain.clone(), state: layer.guid.clone() };
        let mut all: Vec<_> = state.layers.iter().map(each).collect();
        all.sort();
        all
    }

    pub(super) async fn send_layer(&self, chain: &Digest, base: Option<&Digest>, out: OwnedFd) -> Result<()> {
        let base = base.map(|b| self.ready(b)).transpose()?;
        self.zfs.send(base.as_ref(), &self.ready(chain)?, out).await.map_err(|e| self.noted(e))
    }

    pub(super) async fn receive_layer(
        &self,
        chain: &Digest,
        usage: Usage,
        input: OwnedFd,
        verify: Box<dyn FnOnce() -> Result<()> + Send>,
    ) -> Result<()> {
        let dataset = self.layer(chain)?;
        if self.there_or_free(chain, &dataset).await.is_some() {
            return Ok(());
        }
        let beside = self.place(&format!("layers/{RECEIVED}{}", uuid::Uuid::new_v4().simple()))?;
        let done = self.receive_and_commit(chain, &dataset, &beside, usage, input, verify).await;
        if done.is_err() {
            self.doom(beside, Doomed::new(vec![READY.into()]));
        }
        done
    }

    async fn receive_and_commit(
        &self,
        chain: &Digest,
        dataset: &Dataset,
        beside: &Dataset,
        usage: Usage,
        input: OwnedFd,
        verify: Box<dyn FnOnce() -> Result<()> + Send>,
    ) -> Result<()> {
        fail_point!("zfs.receive.before");
        let received = self.zfs.receive(beside, input).await;
        // Told first if the stream was cut: that says more than what ZFS makes of it.
        blocking(verify).await?;
        received.map_err(|e| match e.reason() {
            Reason::BadStream | Reason::NotFound | Reason::Other => {
                let message =
                    "the stream can't be received: it is cut, or for another state of its parent than this node has";
                Error::because(Kind::FailedPrecondition, message, e)
            }
            _ => self.noted(e),
        })?;
        fail_point!("zfs.receive.received");
        let ready = beside.snapshot(READY).map_err(ZfsError::from)?;
        let property = |key: &str, value: String| Property::new(key, value).map_err(ZfsError::from);
        self.zfs.set_snapshot(&ready, &property(USAGE, usage_text(usage))?).await.map_err(|e| self.noted(e))?;
        self.zfs.set_snapshot(&ready, &property(OWNER, self.config.owner.clone())?).await.map_err(|e| self.noted(e))?;
        // Never mounted where it says: `noauto` comes before the place.
        let (place, first): (Vec<_>, Vec<_>) =
            self.properties(dataset)?.into_iter().partition(|p| p.argument().starts_with("mountpoint="));
        for property in first.iter().chain(&place).chain([&property("setuid", "on".into())?]) {
            self.zfs.set(beside, property).await.map_err(|e| self.noted(e))?;
        }
        fail_point!("zfs.receive.tagged");
        let told = self.zfs.get(beside, &["origin"]).await.map_err(|e| self.noted(e))?;
        let origin = told.get(beside.as_str()).and_then(|p| p.get("origin")).map(|v| v.text.clone());
        let layers = self.place("layers")?;
        let parent = origin.as_ref().and_then(|o| o.parse::<Snapshot>().ok());
        let parent = parent.and_then(|o| format!("sha256:{}", o.dataset().below(&layers)?).parse::<Digest>().ok());
        if let Some(origin) = origin.filter(|o| parent.is_none() && o != "-") {
            let message = format!("the stream was put onto {origin}, which is not of this store");
            return Err(Error::precondition(message));
        }
        let (referenced, guid) = self.measured(&ready).await?;
        self.zfs.rename(beside, dataset).await.map_err(|e| self.noted(e))?;
        fail_point!("zfs.receive.renamed");
        self.state().layers.insert(chain.clone(), Layer { parent, usage, referenced, guid });
        Ok(())
    }
}
