//! Layers as streams of `zfs send`, from node to node.
//!
//! Called by the store, one at a time per chain. A layer is received beside the others (`layers/recv-<chain>-<number>`, not
//! mounted), gets its properties and then its name: a rename is what makes it count. Where the pool can (zfs-fuse can't), what came
//! of a stream that was cut stays as a [`Part`], for a stream that goes on with it, until the next collection of layers. Whatever
//! else fails before leaves a dataset of that name to the reaper, a crash the same to the next start. `zfs receive` trusts its
//! stream: so does whoever calls this. Fails by name when the stream does not fit: it is cut, or begins from a snapshot
//! that this pool has not.

use std::os::fd::OwnedFd;

use super::state::{Doomed, Layer, NUMBER_LEN, OWNER, Part, READY, RECEIVED, USAGE, usage_text};
use super::{Inner, blocking};
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::Digest;
use crate::core::ports::{LayerState, StreamFrom, Usage};
use crate::fail_point;
use crate::integrations::zfs::{Dataset, Property, Reason, ResumeToken, Snapshot, ZfsError};

impl Inner {
    pub(super) fn layer_states(&self) -> Vec<LayerState> {
        let state = self.state();
        let whole = |(chain, layer): (&Digest, &Layer)| LayerState {
            chain: chain.clone(),
            state: layer.guid.clone(),
            part: None,
        };
        let part = |(chain, part): (&Digest, &Part)| LayerState {
            chain: chain.clone(),
            state: String::new(),
            part: Some(part.token.clone()),
        };
        let mut all: Vec<_> = state.layers.iter().map(whole).chain(state.parts.iter().map(part)).collect();
        all.sort();
        all
    }

    /// Fails unless the token is about this layer in the state that it has here.
    pub(super) async fn can_go_on(&self, chain: &Digest, token: &str) -> Result<()> {
        let token: ResumeToken = token.parse().map_err(ZfsError::from)?;
        let told = self.zfs.read_token(&token).await.map_err(|e| self.noted(e))?;
        let ready = self.ready(chain)?.to_string();
        let guid = self.state().layers.get(chain).map(|l| l.guid.clone());
        match told.snapshot == ready && guid == Some(told.guid.to_string()) {
            true => Ok(()),
            // Whoever may read layers by a token that he made up himself may not read other datasets.
            false => Err(Error::precondition(format!("the token is about {}, not about {ready}", told.snapshot))),
        }
    }

    pub(super) async fn send_layer(&self, chain: &Digest, from: &StreamFrom, out: OwnedFd) -> Result<()> {
        let base = match from {
            StreamFrom::Cut(token) => {
                self.can_go_on(chain, token).await?;
                let token = token.parse().map_err(ZfsError::from)?;
                return self.zfs.send_rest(&token, out).await.map_err(|e| self.noted(e));
            }
            StreamFrom::Parent(base) => Some(self.ready(base)?),
            StreamFrom::Nothing => None,
        };
        self.zfs.send(base.as_ref(), &self.ready(chain)?, out).await.map_err(|e| self.noted(e))
    }

    pub(super) async fn receive_layer(
        &self,
        chain: &Digest,
        usage: Usage,
        token: Option<&str>,
        input: OwnedFd,
        verify: Box<dyn FnOnce() -> Result<()> + Send>,
    ) -> Result<()> {
        let dataset = self.layer(chain)?;
        if self.there_or_free(chain, &dataset).await?.is_some() {
            self.give_up(chain);
            return Ok(());
        }
        let beside = match token {
            Some(token) => self.take_part(chain, token)?,
            None => {
                self.give_up(chain);
                let number = uuid::Uuid::new_v4().simple().to_string();
                self.place(&format!("layers/{RECEIVED}{}-{}", chain.hex(), &number[..NUMBER_LEN]))?
            }
        };
        let done = self.receive_and_commit(chain, &dataset, &beside, usage, input, verify).await;
        if done.is_err() {
            self.keep_or_doom(chain, beside).await;
        }
        done
    }

    /// What came of a stream that was cut there.
    fn take_part(&self, chain: &Digest, token: &str) -> Result<Dataset> {
        let mut state = self.state();
        match state.parts.get(chain) {
            Some(part) if part.token == token => {}
            Some(_) => return Err(Error::precondition("the stream goes on at another place than where it was cut")),
            None => return Err(Error::precondition("nothing of it is here that this stream could go on with")),
        }
        let part = state.parts.remove(chain);
        part.map(|p| p.dataset).ok_or_else(|| Error::internal("a part that was there"))
    }

    /// Gives to the reaper what is here of a layer in part.
    pub(super) fn give_up(&self, chain: &Digest) {
        let part = self.state().parts.remove(chain);
        if let Some(part) = part {
            self.doom(part.dataset, Doomed::new(Vec::new()));
        }
    }

    async fn keep_or_doom(&self, chain: &Digest, beside: Dataset) {
        let token = match self.resumes {
            true => self.zfs.resume_token(&beside).await,
            false => Ok(None),
        };
        match token {
            Ok(Some(token)) => {
                tracing::info!(layer = %chain, "what came of it is kept: a stream can go on with it");
                let part = Part { dataset: beside, token: token.as_str().to_owned() };
                self.state().parts.insert(chain.clone(), part);
            }
            Ok(None) => self.doom(beside, Doomed::new(vec![READY.into()])),
            Err(e) => {
                if e.reason() != Reason::NotFound {
                    tracing::debug!(dataset = %beside, error = %e, "not known to be of use");
                }
                self.doom(beside, Doomed::new(vec![READY.into()]));
            }
        }
    }

    /// Refuses what a stream can hold beside a layer: other snapshots, file systems below, properties.
    async fn only_a_layer(&self, beside: &Dataset, ready: &Snapshot) -> Result<()> {
        let all = self.zfs.get_all(beside, &["type"]).await.map_err(|e| self.noted(e))?;
        let (name, ready) = (beside.to_string(), ready.to_string());
        if !all.contains_key(&ready) {
            return Err(Error::invalid(format!("the stream has no snapshot @{READY}")));
        }
        if let Some(more) = all.keys().find(|k| **k != name && **k != ready) {
            return Err(Error::invalid(format!("the stream has more than one snapshot of a layer: {more}")));
        }
        match self.zfs.received_property(beside).await.map_err(|e| self.noted(e))? {
            Some(property) => Err(Error::invalid(format!("the stream has the property {property}"))),
            None => Ok(()),
        }
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
        let received = self.zfs.receive(beside, input, self.resumes).await;
        // Told first if the stream was cut: that says more than what ZFS makes of it.
        blocking(verify).await?;
        received.map_err(|e| match e.reason() {
            Reason::BadStream | Reason::NotFound | Reason::Other => {
                let message =
                    "the stream can't be received: it is damaged or cut, or for another state of its parent than this node has";
                Error::because(Kind::FailedPrecondition, message, e)
            }
            _ => self.noted(e),
        })?;
        fail_point!("zfs.receive.received");
        let ready = beside.snapshot(READY).map_err(ZfsError::from)?;
        self.only_a_layer(beside, &ready).await?;
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
